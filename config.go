package main

import (
	"cmp"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/lib/pq"
)

// config is what the operator decides, read once at the start and never changed
// after.
type config struct {
	databaseURL string    // as given; may hold a password, so it is never logged
	database    pq.Config // the same, parsed, with rollcall's own defaults filled in
	warning     string    // what it asks for in vain; to be logged

	host string // where to listen: an IP address without brackets, or a host name
	port int    // 0 takes a free one

	authOff     bool    // the API is open to everyone
	keys        []key   // what a token may be signed with; at least one unless authOff
	ignoredKeys []error // those of JWT_PUBLIC_KEY_FILE that are not among keys, and why
	jwtSecret   []byte  // signs what "rollcall token" prints; nil when there is none
	issuer      string  // the iss that a token must have; empty means any
	audience    string  // the aud that a token must have; empty means any

	corsOrigins []string // who may call from a browser; nil means every origin

	logLevel  slog.Level
	logFormat string // "json" or "text"

	dbMaxConns      int           // connections to PostgreSQL, at most
	requestTimeout  time.Duration // how long a request may take in all
	shutdownTimeout time.Duration // how long running requests get to finish once nothing new is accepted
	drainDelay      time.Duration // how long requests are still accepted after a signal; may be 0
	maxBodyBytes    int64         // the largest request body
	maxInFlight     int           // requests served at once; those beyond are refused

	tlsCertFile, tlsKeyFile string // both or neither
}

// A variable of the environment, and how it gets into a config.
type variable struct {
	name      string
	byDefault string // what it is when unset or empty
	secret    bool   // what it holds is never shown
	help      string
	// set takes over a value, which is never empty. Its error continues the
	// sentence that begins with the value.
	set func(c *config, value string) error
}

// variables is every variable there is. loadConfig reads them and reports
// mistakes in this order, and -h lists them.
var variables = []variable{
	{name: "DATABASE_URL", secret: true, help: "required: postgres://user:password@host:5432/database",
		set: func(c *config, v string) (err error) {
			c.databaseURL = v
			c.database, c.warning, err = parseDatabaseURL(v)
			return err
		}},
	{name: "HOST", byDefault: "0.0.0.0", help: "address to listen on (127.0.0.1 with -dev)",
		set: func(c *config, v string) (err error) { c.host, err = parseHost(v); return err }},
	{name: "PORT", byDefault: "3000", help: "port to listen on; 0 takes a free one",
		set: func(c *config, v string) (err error) { c.port, err = parseNumber(v, 0, 65535); return err }},
	{name: "AUTH", byDefault: "jwt", help: "jwt, or off to open the API to everyone",
		set: func(c *config, v string) error {
			mode, err := parseChoice(v, "jwt", "off")
			c.authOff = mode == "off"
			return err
		}},
	{name: "JWT_SECRET", secret: true, help: "secret of HS256, HS384 and HS512 tokens, at least 32 bytes",
		set: (*config).setSecret},
	{name: "JWT_PUBLIC_KEY_FILE", help: "public keys of RSA, ECDSA and Ed25519 tokens, PEM or JWKS",
		set: (*config).setKeyFile},
	{name: "JWT_JWKS_URL", help: "not in this version: key set of an identity provider", set: notYet},
	{name: "JWT_ISSUER", help: "issuer that a token must name; unset, any will do",
		set: func(c *config, v string) error { c.issuer = v; return nil }},
	{name: "JWT_AUDIENCE", help: "audience that a token must name; unset, any will do",
		set: func(c *config, v string) error { c.audience = v; return nil }},
	{name: "CORS_ORIGINS", byDefault: "*", help: "origins of browsers that may call, comma-separated; * for all",
		set: func(c *config, v string) (err error) { c.corsOrigins, err = parseOrigins(v); return err }},
	{name: "LOG_LEVEL", byDefault: "info", help: "debug, info, warn or error",
		set: func(c *config, v string) error {
			level, err := parseChoice(v, "debug", "info", "warn", "error")
			if err != nil {
				return err
			}
			return c.logLevel.UnmarshalText([]byte(level))
		}},
	{name: "LOG_FORMAT", byDefault: "json", help: "json or text",
		set: func(c *config, v string) (err error) { c.logFormat, err = parseChoice(v, "json", "text"); return err }},
	{name: "DB_MAX_CONNS", byDefault: "10", help: "connections to PostgreSQL, at most",
		set: func(c *config, v string) (err error) { c.dbMaxConns, err = parseNumber(v, 1, 10_000); return err }},
	{name: "REQUEST_TIMEOUT", byDefault: "10s", help: "how long a request may take",
		set: func(c *config, v string) (err error) { c.requestTimeout, err = parseTime(v); return err }},
	{name: "SHUTDOWN_TIMEOUT", byDefault: "20s", help: "how long running requests may go on once nothing new is accepted",
		set: func(c *config, v string) (err error) { c.shutdownTimeout, err = parseTime(v); return err }},
	{name: "DRAIN_DELAY", byDefault: "0s", help: "how long new requests are still served after a stop signal",
		set: func(c *config, v string) (err error) { c.drainDelay, err = parseDelay(v); return err }},
	{name: "MAX_BODY_BYTES", byDefault: "1048576", help: "largest body of a request",
		set: func(c *config, v string) (err error) {
			c.maxBodyBytes, err = parseNumber[int64](v, 1, 1<<30)
			return err
		}},
	{name: "MAX_IN_FLIGHT", byDefault: "1024", help: "requests served at once; those beyond get a 503",
		set: func(c *config, v string) (err error) { c.maxInFlight, err = parseNumber(v, 1, 1_000_000); return err }},
	{name: "ADMIN_ADDR", help: "not in this version: address for metrics and profiles", set: notYet},
	{name: "TLS_CERT_FILE", help: "certificate in PEM, with its chain; serves HTTPS",
		set: func(c *config, v string) error { c.tlsCertFile = v; return nil }},
	{name: "TLS_KEY_FILE", help: "private key of TLS_CERT_FILE",
		set: func(c *config, v string) error { c.tlsKeyFile = v; return nil }},
}

// loadConfig reads the configuration through getenv; with dev, HOST defaults to
// this machine alone. The error reports every mistake at once, a line each, so
// that nobody has to start the service once per mistake: the variable, what it
// held unless that is a secret, and what it takes.
func loadConfig(getenv func(string) string, dev bool) (config, error) {
	var c config
	mistakes := make(map[string]string) // by name of the variable
	for _, v := range variables {
		byDefault := v.byDefault
		if dev && v.name == "HOST" {
			byDefault = "127.0.0.1" // an open or half-configured service is nobody else's business
		}
		value := cmp.Or(getenv(v.name), byDefault) // an empty variable counts as unset
		if value == "" {
			continue
		}
		if err := v.set(&c, value); err != nil {
			mistakes[v.name] = err.Error()
			if !v.secret {
				mistakes[v.name] = fmt.Sprintf("%.80q %v", value, err)
			}
		}
	}
	c.checkTogether(mistakes)
	if len(mistakes) == 0 {
		return c, nil
	}
	var lines []string
	for _, v := range variables {
		if m, ok := mistakes[v.name]; ok {
			lines = append(lines, v.name+": "+strings.ReplaceAll(m, "\n", "; "))
		}
	}
	return config{}, errors.New(strings.Join(lines, "\n"))
}

// checkTogether adds to mistakes what no variable can tell by itself.
func (c *config) checkTogether(mistakes map[string]string) {
	wrong := func(name string) bool { _, ok := mistakes[name]; return ok }

	if c.databaseURL == "" {
		mistakes["DATABASE_URL"] = "not set; it takes " + databaseForms +
			"; rollcall -dev brings a database of its own"
	}
	// A broken key has its own line, which says enough.
	keyWrong := wrong("AUTH") || wrong("JWT_SECRET") || wrong("JWT_PUBLIC_KEY_FILE") || wrong("JWT_JWKS_URL")
	if !c.authOff && len(c.keys) == 0 && !keyWrong {
		mistakes["AUTH"] = `"jwt" needs a key; set JWT_SECRET or JWT_PUBLIC_KEY_FILE, ` +
			"or AUTH=off to open the API to everyone"
	}
	switch {
	case c.tlsCertFile == "" && c.tlsKeyFile != "":
		mistakes["TLS_CERT_FILE"] = "not set, but TLS_KEY_FILE is; it takes the file of the certificate"
	case c.tlsCertFile != "" && c.tlsKeyFile == "":
		mistakes["TLS_KEY_FILE"] = "not set, but TLS_CERT_FILE is; it takes the file of the private key"
	case c.tlsCertFile != "":
		if _, err := tls.LoadX509KeyPair(c.tlsCertFile, c.tlsKeyFile); err != nil {
			mistakes["TLS_CERT_FILE"] = fmt.Sprintf(
				"%.80q and TLS_KEY_FILE %.80q are not a certificate and its key: %v", c.tlsCertFile, c.tlsKeyFile, err)
		}
	}
}

// listenAddr returns the address that net.Listen takes.
func (c config) listenAddr() string { return net.JoinHostPort(c.host, strconv.Itoa(c.port)) }

// String returns the configuration on one line, without its secrets: it is safe
// to log.
func (c config) String() string {
	return fmt.Sprintf("database=%q listen=%q auth_off=%t keys=%d issuer=%q audience=%q cors_origins=%q "+
		"log_level=%s log_format=%s db_max_conns=%d request_timeout=%s shutdown_timeout=%s drain_delay=%s "+
		"max_body_bytes=%d max_in_flight=%d tls_cert_file=%q tls_key_file=%q",
		fmt.Sprintf("%s:%d/%s", c.database.Host, c.database.Port, c.database.Database),
		c.listenAddr(), c.authOff, len(c.keys), c.issuer, c.audience, c.corsOrigins,
		c.logLevel, c.logFormat, c.dbMaxConns, c.requestTimeout, c.shutdownTimeout, c.drainDelay,
		c.maxBodyBytes, c.maxInFlight, c.tlsCertFile, c.tlsKeyFile)
}

// Format is String whatever the verb, for %#v and %d would show the fields.
func (c config) Format(f fmt.State, _ rune) { fmt.Fprint(f, c.String()) }

// LogValue is String, for log/slog.
func (c config) LogValue() slog.Value { return slog.StringValue(c.String()) }

// variablesHelp returns every variable with its default and what it is for, a
// line each.
func variablesHelp() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for _, v := range variables {
		fmt.Fprintf(w, "  %s\t%s\t%s\n", v.name, cmp.Or(v.byDefault, "-"), v.help)
	}
	w.Flush() // a strings.Builder takes everything
	return b.String()
}

func (c *config) setSecret(v string) error {
	k, err := secretKey([]byte(v))
	if err != nil {
		return err
	}
	c.jwtSecret, c.keys = []byte(v), append(c.keys, k)
	return nil
}

func (c *config) setKeyFile(path string) error {
	set, err := readKeyFile(path)
	if err != nil {
		return fmt.Errorf("is no file of public keys: %w", err)
	}
	c.keys, c.ignoredKeys = append(c.keys, set.keys...), set.ignored
	return nil
}

// notYet refuses what a later version will have. Ignoring it would be worse:
// the operator believes that it is on.
func notYet(*config, string) error {
	return errors.New("is for a later version: this one does not have it yet, leave it unset")
}

func parseChoice(v string, choices ...string) (string, error) {
	if choice := strings.ToLower(v); slices.Contains(choices, choice) {
		return choice, nil
	}
	return "", fmt.Errorf("is not one of %s", strings.Join(choices, ", "))
}

func parseNumber[T int | int64](v string, low, high T) (T, error) {
	n, err := strconv.ParseInt(v, 10, 64)
	if err != nil || n < int64(low) || n > int64(high) {
		return 0, fmt.Errorf("is not a whole number from %d to %d", low, high)
	}
	return T(n), nil
}

// maxTime is far beyond any use, and far below where sums of times overflow.
const maxTime = 24 * time.Hour

func parseTime(v string) (time.Duration, error)  { return timeFrom(1, "above zero and", v) }
func parseDelay(v string) (time.Duration, error) { return timeFrom(0, "from 0s", v) }

func timeFrom(least time.Duration, bound, v string) (time.Duration, error) {
	d, err := time.ParseDuration(v)
	switch _, numberErr := strconv.ParseFloat(v, 64); {
	case numberErr == nil:
		return 0, fmt.Errorf("has no unit; it takes a time such as %q or %q", "10s", "1m30s")
	case err != nil || d < least || d > maxTime:
		return 0, fmt.Errorf("is not a time %s up to 24h, such as %q or %q", bound, "10s", "1m30s")
	}
	return d, nil
}

// hostName matches a name of the DNS, labels of letters, digits, _ and inner
// hyphens.
var hostName = regexp.MustCompile(`^(\w([\w-]*\w)?\.)*\w([\w-]*\w)?\.?$`)

// zoneName matches the name of a network interface, which an address of IPv6 may
// end with (RFC 4007, section 11), or none.
var zoneName = regexp.MustCompile(`^[\w.-]*$`)

// parseHost returns the host without the brackets that an IPv6 address may
// stand in.
func parseHost(v string) (string, error) {
	bare, bracketed := strings.CutPrefix(v, "[")
	if bracketed {
		bare, bracketed = strings.CutSuffix(bare, "]")
	}
	addr, err := netip.ParseAddr(bare)
	switch {
	case err == nil && (bracketed && addr.Is6() || bare == v) && zoneName.MatchString(addr.Zone()):
		return bare, nil
	case strings.Trim(v, "0123456789.") == "": // a mistyped address, such as 127.0.0
	case len(v) <= 253 && hostName.MatchString(v):
		return v, nil
	}
	return "", errors.New("is not an IP address or a host name; no scheme, and the port goes into PORT")
}

// parseOrigins returns the origins in the form in which browsers send them (RFC
// 6454, section 6.2), or nil for "*".
func parseOrigins(v string) ([]string, error) {
	if strings.TrimSpace(v) == "*" {
		return nil, nil
	}
	var origins []string
	for _, item := range strings.Split(v, ",") {
		origin, err := parseOrigin(strings.TrimSpace(item))
		if err != nil {
			return nil, err
		}
		if !slices.Contains(origins, origin) {
			origins = append(origins, origin)
		}
	}
	return origins, nil
}

// originScheme matches the scheme of a URL (RFC 3986, section 3.1).
var originScheme = regexp.MustCompile(`^[a-z][a-z0-9+.-]*$`)

// defaultPorts are left out of an origin by browsers.
var defaultPorts = map[string]string{"http": "80", "https": "443"}

func parseOrigin(s string) (string, error) {
	refused := fmt.Errorf("has %.80q, which is no origin; it takes * alone, or scheme://host[:port] without "+
		"a path or closing slash, several with commas between, names beyond ASCII as xn--", s)
	scheme, rest, _ := strings.Cut(strings.ToLower(s), "://")
	host, port, err := splitHostPort(rest)
	if err != nil || !originScheme.MatchString(scheme) {
		return "", refused
	}
	if host, err = parseHost(host); err != nil || strings.Contains(host, "%") {
		return "", refused
	}
	if addr, err := netip.ParseAddr(host); err == nil {
		if host = addr.String(); addr.Is6() {
			host = "[" + host + "]"
		}
	}
	if port == "" || port == defaultPorts[scheme] {
		return scheme + "://" + host, nil
	}
	return scheme + "://" + host + ":" + port, nil
}

// splitHostPort splits "host", "host:port", "[::1]" or "[::1]:port". The port
// is empty when there is none and otherwise a number from 1 to 65535; the host
// is not looked at, except that it has no colon outside brackets, which it
// keeps.
func splitHostPort(s string) (host, port string, err error) {
	host, port = s, ""
	if i := strings.LastIndexByte(s, ':'); i > strings.LastIndexByte(s, ']') {
		n, err := parseNumber(s[i+1:], 1, 65535)
		if err != nil {
			return "", "", err
		}
		host, port = s[:i], strconv.Itoa(n)
	}
	if strings.Contains(host, ":") && !(strings.HasPrefix(host, "[") && strings.HasSuffix(host, "]")) {
		return "", "", errors.New("is not host or host:port")
	}
	return host, port, nil
}
