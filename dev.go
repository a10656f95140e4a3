package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// devDir is the folder of -dev, below the working directory.
const devDir = ".dev"

// prepareDev makes up for what the environment does not set: a database, which
// is started, and a secret. The database is nil if DATABASE_URL brings one.
func prepareDev(ctx context.Context, getenv func(string) string, stderr io.Writer) (*devDatabase, func(string) string, error) {
	if getenv("DATABASE_URL") == "" {
		unsetLibpq()
	}
	// A mistake in the rest of the configuration is found before anything is made.
	complete := map[string]string{"DATABASE_URL": "dbname=rollcall", "JWT_SECRET": strings.Repeat("x", minSecretBytes)}
	if _, err := loadConfig(func(name string) string { return cmp.Or(getenv(name), complete[name]) }, true); err != nil {
		return nil, nil, usageError(err.Error())
	}
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
func greet(w io.Writer, cfg config, addr net.Addr, private bool) {
	base := "http://" + addr.String()
	curl := "curl"
	if cfg.tlsCertFile != "" {
		base, curl = "https://"+addr.String(), "curl -k"
	}
	auth, ending := "", "Ctrl-C stops rollcall."
	if private {
		ending = "Ctrl-C stops rollcall and its PostgreSQL; the users stay in " + devDir + "."
	}
	switch {
	case cfg.authOff:
	case cfg.jwtSecret == nil:
		fmt.Fprintf(w, "\nThe calls take a token signed with a key of JWT_PUBLIC_KEY_FILE.\n")
		auth = ` -H "Authorization: Bearer $TOKEN"`
	default:
		token := mintToken(cfg.jwtSecret, grant{subject: "dev", ttl: 24 * time.Hour, issuer: cfg.issuer, audience: cfg.audience}, time.Now())
		fmt.Fprintf(w, "\nA token that may do everything for 24 hours:\n\n%s\n", token)
		auth = " -H 'Authorization: Bearer " + token + "'"
	}
	fmt.Fprintf(w, `
Create a user, then list all:

%[1]s%[2]s -H 'Content-Type: application/json' -d '{"email":"ada@example.com","name":"Ada Lovelace"}' %[3]s%[4]s

%[1]s%[2]s %[3]s%[4]s

%[5]s

`, curl, auth, base, usersPath, ending)
}

// devSecret returns the key that signs the tokens of rollcall -dev. It is kept in
// dir, so that a token outlives a restart.
func devSecret(dir string) (string, error) {
	name := filepath.Join(dir, "jwt_secret")
	if b, err := os.ReadFile(name); !errors.Is(err, fs.ErrNotExist) {
		return strings.TrimSpace(string(b)), err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	f, err := os.CreateTemp(dir, "jwt_secret.*") // for its owner's eyes alone
	if err != nil {
		return "", err
	}
	defer os.Remove(f.Name())
	key := make([]byte, 32)
	rand.Read(key) // never fails
	_, err = fmt.Fprintln(f, hex.EncodeToString(key))
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return "", err
	}
	// A link appears whole or not at all, and unlike a rename it does not replace
	// the file of another process that was faster.
	if err := os.Link(f.Name(), name); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	b, err := os.ReadFile(name)
	return strings.TrimSpace(string(b)), err
}
