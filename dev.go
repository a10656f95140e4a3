package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"time"
)

// devDir is the folder of -dev, below the working directory.
const devDir = ".dev"

// prepareDev makes up for what the environment does not set: a database, which
// is started, and a secret. The database is nil if DATABASE_URL brings one.
func prepareDev(ctx context.Context, getenv func(string) string, stderr io.Writer) (*devDatabase, func(string) string, error) {
	made := make(map[string]string)
	var private *devDatabase
	if getenv("DATABASE_URL") == "" {
		dir, err := filepath.Abs(devDir)
		if err != nil {
			return nil, nil, err
		}
		fmt.Fprintf(stderr, "rollcall: starting a private PostgreSQL, its data in %s\n", dir)
		if private, err = startDevDatabase(ctx, dir); err != nil {
			return nil, nil, err
		}
		made["DATABASE_URL"] = private.url()
	}
	if getenv("JWT_SECRET") == "" && getenv("JWT_PUBLIC_KEY_FILE") == "" {
		secret, err := devSecret(devDir)
		if err != nil {
			if private != nil {
				private.stop()
			}
			return nil, nil, err
		}
		made["JWT_SECRET"] = secret
	}
	return private, func(name string) string { return cmp.Or(getenv(name), made[name]) }, nil
}

// greet prints what a newcomer needs next: a token, and lines to paste.
func greet(w io.Writer, cfg config, addr net.Addr) {
	base := "http://" + addr.String()
	curl := "curl"
	if cfg.tlsCertFile != "" {
		base, curl = "https://"+addr.String(), "curl -k"
	}
	auth := ""
	if !cfg.authOff && cfg.jwtSecret != nil {
		token := mintToken(cfg.jwtSecret, grant{subject: "dev", ttl: 24 * time.Hour, issuer: cfg.issuer, audience: cfg.audience}, time.Now())
		fmt.Fprintf(w, "\nA token that may do everything for 24 hours:\n\n%s\n", token)
		auth = " -H 'Authorization: Bearer " + token + "'"
	}
	fmt.Fprintf(w, `
Create a user, then list all:

%[1]s%[2]s -H 'Content-Type: application/json' -d '{"email":"ada@example.com","name":"Ada Lovelace"}' %[3]s%[4]s

%[1]s%[2]s %[3]s%[4]s

Ctrl-C stops rollcall and its PostgreSQL; the users stay in %[5]s.

`, curl, auth, base, usersPath, devDir)
}
