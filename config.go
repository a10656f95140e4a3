package main

import (
	"cmp"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/lib/pq"
)

// config is what the operator decides, read once at the start and never changed after.
type config struct {
	database pq.Config // DATABASE_URL, parsed, with rollcall's own defaults filled in

	host string // where to listen: an IP address without brackets, or a host name
	port int    // 0 takes a free one

	authOff    bool   // the API is open to everyone
	jwtSecret  []byte // signs what "rollcall token" prints; nil when there is none
	jwksURL    string // the key set of an identity provider; empty when there is none
	tokenRules        // what a token must have; at least one key unless authOff or with a jwksURL

	corsOrigins []string // which origins may call from a browser; nil means every one

	logLevel  slog.Level
	logFormat string // "json" or "text"

	dbMaxConns      int           // connections to PostgreSQL, at most
	requestTimeout  time.Duration // how long a request may take in all
	shutdownTimeout time.Duration // how long running requests get to finish once nothing new is accepted
	drainDelay      time.Duration // how long requests are still accepted after a signal; may be 0
	maxBodyBytes    int64         // the largest request body
	maxInFlight     int           // requests served at once; those beyond are refused
	rateLimit       int           // requests a second of one caller; 0 is no limit

	pageOff   bool   // there is no page at /
	adminAddr string // where metrics and profiles are; empty if nowhere

	tlsCertFile, tlsKeyFile string // both or neither

	warnings []string    // what was asked for in vain, a sentence each
	shown    []slog.Attr // every variable that is set and not secret, as it was given
}

// A variable of the environment.
type variable struct {
	name, defaultValue, help string
	parse                    func(value string) error // value is never empty, and the error continues the sentence that it begins
}

// secrets are the variables whose values are never shown. Each may be in a file, which a variable with _FILE in its name
// names.
var secrets = []string{"DATABASE_URL", "JWT_SECRET"}

// variables returns every variable that sets c, in the order in which mistakes are reported and -h lists them.
func (c *config) variables() []variable {
	return []variable{
		{"DATABASE_URL", "", "required: postgres://user:password@host:5432/database", c.setDatabase},
		{"DATABASE_URL_FILE", "", "file that holds DATABASE_URL, instead of it", fromFile(c.setDatabase)},
		{"HOST", "0.0.0.0", "address to listen on (127.0.0.1 with -dev)", parsed(&c.host, parseHost)},
		{"PORT", "3000", "port to listen on; 0 takes a free one", number(&c.port, 0, 65535)},
		{"AUTH", "jwt", "jwt, or off to open the API to everyone", choice(&c.authOff, map[string]bool{"jwt": false, "off": true})},
		{"JWT_SECRET", "", "secret of HS256, HS384 and HS512 tokens, at least 32 bytes", c.setSecret},
		{"JWT_SECRET_FILE", "", "file that holds JWT_SECRET, instead of it", fromFile(c.setSecret)},
		{"JWT_PUBLIC_KEY_FILE", "", "public keys of RSA, ECDSA and Ed25519 tokens, PEM or JWKS", c.setKeyFile},
		{"JWT_JWKS_URL", "", "key set of an identity provider: https://id.example/keys", c.setKeySetURL},
		{"JWT_ISSUER", "", "issuer that a token must name; unset or *, any will do", parsed(&c.issuer, valueOrAny)},
		{"JWT_AUDIENCE", "", "audience that a token must name; unset or *, any will do", parsed(&c.audience, valueOrAny)},
		{"JWT_READ_SCOPE", "users:read", "scope that a token must have to read", parsed(&c.readScope, parseScope)},
		{"JWT_WRITE_SCOPE", "users:write", "scope that a token must have to change", parsed(&c.writeScope, parseScope)},
		{"JWT_UNSCOPED", "", "allow or deny tokens without scopes (deny with JWT_JWKS_URL)",
			choice(&c.denyUnscoped, map[string]bool{"allow": false, "deny": true})},
		{"CORS_ORIGINS", "*", "origins of browsers that may call, comma-separated; * for all", parsed(&c.corsOrigins, parseOrigins)},
		{"LOG_LEVEL", "info", "debug, info, warn or error", choice(&c.logLevel, logLevels)},
		{"LOG_FORMAT", "json", "json or text", choice(&c.logFormat, map[string]string{"json": "json", "text": "text"})},
		{"DB_MAX_CONNS", "10", "connections to PostgreSQL, at most", number(&c.dbMaxConns, 1, 10_000)},
		{"REQUEST_TIMEOUT", "10s", "how long a request may take", duration(&c.requestTimeout, 1)},
		{"SHUTDOWN_TIMEOUT", "20s", "how long running requests may take to finish at a stop", duration(&c.shutdownTimeout, 1)},
		{"DRAIN_DELAY", "0s", "how long new requests are still served after a stop signal", duration(&c.drainDelay, 0)},
		{"MAX_BODY_BYTES", "65536", "largest body of a request", number(&c.maxBodyBytes, 1, 1<<30)},
		{"MAX_IN_FLIGHT", "1024", "requests served at once; those beyond get a 503", number(&c.maxInFlight, 1, 1_000_000)},
		{"RATE_LIMIT", "", "requests a second of one caller, with a burst of twice that", number(&c.rateLimit, 1, 1_000_000)},
		{"ADMIN_ADDR", "", "address of a listener for metrics and profiles: 127.0.0.1:9090", parsed(&c.adminAddr, parseAdminAddr)},
		{"PAGE", "on", "on, or off to take away the page at /", choice(&c.pageOff, map[string]bool{"on": false, "off": true})},
		{"TLS_CERT_FILE", "", "certificate in PEM, with its chain; serves HTTPS", parsed(&c.tlsCertFile, asGiven)},
		{"TLS_KEY_FILE", "", "private key of TLS_CERT_FILE", parsed(&c.tlsKeyFile, asGiven)},
	}
}

// loadConfig reads the configuration through getenv; with dev, HOST defaults to this machine alone, and the database and
// the keys may be missing. The error reports every mistake at once, a line each: the variable, what it held unless that is
// a secret, and what it takes.
func loadConfig(getenv func(string) string, dev bool) (config, error) {
	var c config
	var mistakes []error
	for _, v := range c.variables() {
		if dev && v.name == "HOST" {
			v.defaultValue = "127.0.0.1" // an open or half-configured service is nobody else's business
		}
		if err := c.set(v, getenv); err != nil {
			mistakes = append(mistakes, err)
		}
	}
	refuse := func(name, format string, args ...any) {
		mistakes = append(mistakes, mistake(name, format, args...))
	}
	// What no variable can tell by itself.
	if !dev && !isSet(getenv, "DATABASE_URL") {
		refuse("DATABASE_URL", "not set; it takes %s; rollcall -dev brings a database of its own", databaseForms)
	}
	publicKeys := cmp.Or(getenv("JWT_PUBLIC_KEY_FILE"), getenv("JWT_JWKS_URL"))
	if !dev && !c.authOff && !isSet(getenv, "JWT_SECRET") && publicKeys == "" {
		refuse("AUTH", `"jwt" needs a key; set JWT_SECRET, JWT_PUBLIC_KEY_FILE or JWT_JWKS_URL, `+
			`or AUTH=off to open the API to everyone`)
	}
	for _, name := range []string{"JWT_ISSUER", "JWT_AUDIENCE"} {
		if !c.authOff && getenv("JWT_JWKS_URL") != "" && getenv(name) == "" {
			refuse(name, "not set; with JWT_JWKS_URL it has to be, since others may share the key set: "+
				"what a token must name, or * for any")
		}
	}
	if c.tlsCertFile != "" || c.tlsKeyFile != "" {
		if _, err := tls.LoadX509KeyPair(c.tlsCertFile, c.tlsKeyFile); err != nil {
			refuse("TLS_CERT_FILE", "%.80q and TLS_KEY_FILE %.80q are no pair: %v", c.tlsCertFile, c.tlsKeyFile, err)
		}
	}
	return c, errors.Join(mistakes...)
}

// loadSome reads the variables of these names alone, for a command that needs no others.
func loadSome(getenv func(string) string, names ...string) (c config, err error) {
	for _, v := range c.variables() {
		if slices.Contains(names, v.name) {
			err = errors.Join(err, c.set(v, getenv))
		}
	}
	return c, err
}

// set reads one variable.
func (c *config) set(v variable, getenv func(string) string) error {
	value := cmp.Or(getenv(v.name), v.defaultValue) // an empty variable counts as unset
	if value == "" {
		return nil
	}
	plain, _ := strings.CutSuffix(v.name, "_FILE")
	if plain != v.name && slices.Contains(secrets, plain) && getenv(plain) != "" {
		return mistake(v.name, "%.80q is set beside %s: leave one of them out", value, plain)
	}
	secret := slices.Contains(secrets, v.name)
	switch err := v.parse(value); {
	case err != nil && secret:
		return mistake(v.name, "%v", err)
	case err != nil:
		return mistake(v.name, "%.80q %v", value, err)
	case !secret:
		c.shown = append(c.shown, slog.String(v.name, value))
	}
	return nil
}

// mistake returns the error of a variable, in one line.
func mistake(name, format string, args ...any) error {
	return errors.New(name + ": " + strings.ReplaceAll(fmt.Sprintf(format, args...), "\n", "; "))
}

// isSet reports whether one of the secrets is given, as it is or in a file.
func isSet(getenv func(string) string, secret string) bool {
	return cmp.Or(getenv(secret), getenv(secret+"_FILE")) != ""
}

// logTo logs what an operator has to know of the configuration.
func (c config) logTo(log *slog.Logger) {
	log.Debug("configuration", "values", c)
	for _, warning := range c.warnings {
		log.Warn(warning)
	}
	if c.authOff {
		log.Warn("AUTH=off: the API is open to everybody who can reach this address")
	}
}

// listenAddr returns the address that net.Listen takes.
func (c config) listenAddr() string { return net.JoinHostPort(c.host, strconv.Itoa(c.port)) }

// LogValue returns the variables that are set and not secret, for log/slog.
func (c config) LogValue() slog.Value { return slog.GroupValue(c.shown...) }

// variablesHelp returns every variable with its default and what it is for, a line each.
func variablesHelp() string {
	var b strings.Builder
	for _, v := range new(config).variables() {
		fmt.Fprintf(&b, "  %-20s %-11s %s\n", v.name, cmp.Or(v.defaultValue, "-"), v.help)
	}
	return b.String()
}

func asGiven(value string) (string, error) { return value, nil }

// parsed returns a function that stores what parse returns.
func parsed[T any](field *T, parse func(string) (T, error)) func(string) error {
	return func(value string) (err error) {
		*field, err = parse(value)
		return err
	}
}

var logLevels = map[string]slog.Level{
	"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError,
}

// choice takes one of some words, in any letter case, for what it means.
func choice[T any](field *T, meanings map[string]T) func(string) error {
	return parsed(field, func(value string) (T, error) {
		meaning, ok := meanings[strings.ToLower(value)]
		if !ok {
			return meaning, fmt.Errorf("is not one of %s", strings.Join(slices.Sorted(maps.Keys(meanings)), ", "))
		}
		return meaning, nil
	})
}

func number[T int | int64](field *T, low, high T) func(string) error {
	return parsed(field, func(value string) (T, error) {
		n, err := strconv.ParseInt(value, 10, 64)
		if err != nil || n < int64(low) || n > int64(high) {
			return 0, fmt.Errorf("is not a whole number from %d to %d", low, high)
		}
		return T(n), nil
	})
}

// duration takes at most a day, far beyond any use, and far below where sums of times overflow.
func duration(field *time.Duration, least time.Duration) func(string) error {
	return parsed(field, func(value string) (time.Duration, error) {
		d, err := time.ParseDuration(value)
		if err != nil || d < least || d > 24*time.Hour || strings.HasSuffix(value, "0") { // "0" is taken without a unit
			return 0, fmt.Errorf(`is not a time with its unit from %v to 24h, such as "10s" or "1m30s"`, least)
		}
		return d, nil
	})
}

// originForm matches an origin as browsers send it (RFC 6454, section 6.2).
var originForm = regexp.MustCompile(`^[a-z][a-z0-9+.-]*://([\w.-]+|\[[0-9a-f.:]+\])(:[1-9]\d{0,4})?$`)

// defaultPorts are what browsers leave out of an origin.
var defaultPorts = map[string]string{"http": ":80", "https": ":443"}

// parseOrigins returns the origins in a list with commas, or nil for "*".
func parseOrigins(v string) ([]string, error) {
	if strings.TrimSpace(v) == "*" {
		return nil, nil
	}
	var origins []string
	for item := range strings.SplitSeq(strings.ToLower(v), ",") {
		origin := strings.TrimSpace(item)
		u, err := url.Parse(origin)
		if err == nil {
			_, err = strconv.ParseUint(cmp.Or(u.Port(), "80"), 10, 16)
		}
		if err != nil || !originForm.MatchString(origin) {
			return nil, fmt.Errorf("has %.80q, which is no origin; it takes *, or scheme://host[:port], comma-separated", origin)
		}
		origins = append(origins, strings.TrimSuffix(origin, defaultPorts[u.Scheme]))
	}
	return origins, nil
}
