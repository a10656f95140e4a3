package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"time"
)

// printToken is the token command: it prints a token signed with JWT_SECRET. Its
// error is a [usageError], unless stdout fails.
func printToken(args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("rollcall token", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // errors are returned, not printed here
	sub := flags.String("sub", "", "")
	ttl := flags.Duration("ttl", time.Hour, "")
	scope := flags.String("scope", "", "")
	err := flags.Parse(args)
	scopeIsSet := false
	flags.Visit(func(f *flag.Flag) { scopeIsSet = scopeIsSet || f.Name == "scope" })
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(stdout, usage)
		return nil
	case err != nil:
		return usageError("token: " + err.Error())
	case flags.NArg() > 0:
		return usageError(fmt.Sprintf("token: %q is no flag", flags.Arg(0)))
	case *sub == "":
		return usageError("token: -sub is missing: whose token is it?")
	case scopeIsSet && *scope == "":
		return usageError("token: -scope is empty: leave it out for a token that may do everything")
	case *ttl < time.Second:
		return usageError("token: -ttl must be a second or more")
	}
	if getenv, err = withDotenv(getenv, dotenvFile, stderr); err != nil {
		return usageError(err.Error())
	}
	secret := []byte(getenv("JWT_SECRET"))
	if len(secret) == 0 {
		return usageError("token: JWT_SECRET is not set (that of rollcall -dev is in " + devDir + "/jwt_secret)")
	}
	if _, err := secretKey(secret); err != nil {
		return usageError("JWT_SECRET: " + err.Error())
	}
	g := grant{subject: *sub, scope: *scope, issuer: getenv("JWT_ISSUER"), audience: getenv("JWT_AUDIENCE"), ttl: *ttl}
	_, err = fmt.Fprintln(stdout, mintToken(secret, g, time.Now()))
	return err
}
