package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// devDir is the folder of -dev, below the working directory.
const devDir = ".dev"

// configure reads the configuration, with .env. With dev it makes what they lack: a secret,
// and a database, which it starts; private is the zero one if it starts none.
func configure(ctx context.Context, dev bool, getenv func(string) string, stderr io.Writer) (cfg config, private *privatePostgres, err error) {
	private = new(privatePostgres)
	if getenv, err = withDotenv(getenv, dotenvFile, stderr); err != nil {
		return cfg, nil, usageError(err.Error())
	}
	if cfg, err = loadConfig(getenv, dev); err != nil {
		return cfg, nil, usageError(err.Error())
	}
	if dev && !isSet(getenv, "JWT_SECRET") && cmp.Or(getenv("JWT_PUBLIC_KEY_FILE"), getenv("JWT_JWKS_URL")) == "" {
		secret, err := devSecret(devDir)
		if err != nil {
			return cfg, nil, err
		}
		if err := cfg.setSecret(secret); err != nil {
			return cfg, nil, usageError("JWT_SECRET: " + err.Error())
		}
	}
	if dev && !isSet(getenv, "DATABASE_URL") {
		fmt.Fprintf(stderr, "rollcall: starting a private PostgreSQL, its data in %s\n", devDir)
		unsetLibpq()
		if private, err = startPostgres(ctx, devDir); err != nil {
			return cfg, nil, err
		}
		if err := cfg.setDatabase(private.url()); err != nil {
			return cfg, nil, errors.Join(usageError("DATABASE_URL: "+err.Error()), private.stop())
		}
	}
	return cfg, private, nil
}

// unsetLibpq removes libpq's variables, which lib/pq reads, from the environment: a
// connection string can't override all of them (PGHOSTADDR, PGSERVICE). PGBIN is ours.
func unsetLibpq() {
	for _, variable := range os.Environ() {
		if name, _, _ := strings.Cut(variable, "="); isLibpq(name) && name != "PGBIN" {
			os.Unsetenv(name)
		}
	}
}

// devSecret returns the key that signs the tokens of rollcall -dev. It is kept in dir, so
// that a token outlives a restart.
func devSecret(dir string) (string, error) {
	name, fresh := filepath.Join(dir, "jwt_secret"), filepath.Join(dir, "jwt_secret."+rand.Text())
	secret := rand.Text() + rand.Text() + "\n" // 260 random bits
	if err := errors.Join(os.MkdirAll(dir, 0o700), os.WriteFile(fresh, []byte(secret), 0o600)); err != nil {
		return "", err
	}
	defer os.Remove(fresh)
	os.Link(fresh, name) // fails if there is one: the first to come makes it
	kept, err := os.ReadFile(name)
	return strings.TrimSpace(string(kept)), err
}

// printQuickstart prints what a newcomer needs next: a token, and lines to paste.
func printQuickstart(w io.Writer, cfg config, addr net.Addr) {
	curl, root := "curl", "http://"+addr.String()+"/"
	if cfg.tlsCertFile != "" {
		curl, root = "curl -k", "https://"+addr.String()+"/"
	}
	link := root
	switch {
	case cfg.authOff:
	case cfg.jwtSecret == nil:
		fmt.Fprintln(w, "\nThe calls take a token signed with a key of JWT_PUBLIC_KEY_FILE or JWT_JWKS_URL.")
		curl += ` -H "Authorization: Bearer $TOKEN"`
	default:
		token := cfg.mintToken(grant{subject: "dev", ttl: 24 * time.Hour})
		fmt.Fprintf(w, "\nA token that may do everything for 24 hours:\n\n%s\n", token)
		curl += " -H 'Authorization: Bearer " + token + "'"
		link += "#token=" + token // which a browser does not send
	}
	fmt.Fprintf(w, `
Create a user, then list all:

%[1]s -H 'Content-Type: application/json' -d '{"email":"ada@example.com","name":"Ada Lovelace"}' %[2]s

%[1]s %[2]s
`, curl, strings.TrimSuffix(root, "/")+usersPath)
	if !cfg.pageOff {
		fmt.Fprintf(w, "\nOr look at them in a browser:\n\n%s\n", link)
	}
	fmt.Fprintf(w, "\nCtrl-C stops all that rollcall -dev has started; what it has made stays in %s.\n\n", devDir)
}
