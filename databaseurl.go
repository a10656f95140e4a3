package main

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/lib/pq"
)

// databaseForms tells what DATABASE_URL takes.
const databaseForms = "postgres://user:password@host:5432/database?sslmode=require, " +
	"or user=... password=... host=... dbname=... as libpq knows them"

// errDatabaseURL is all that is said of a value that makes no sense. Any piece
// of it may be a piece of the password, and the errors of net/url and lib/pq
// quote such pieces.
var errDatabaseURL = errors.New("not shown, for it may hold a password; it takes " + databaseForms +
	"; in a URL, special characters of the password are percent-encoded (@ as %40, / as %2F, # as %23), " +
	"in the second form a value with spaces stands in single quotes")

// parseDatabaseURL returns what to connect with, and a warning or "". It takes all
// that lib/pq takes and in addition what libpq, and so psql, understands in a URL.
// What neither raw nor the PG variables of the environment settle is settled for a
// service: sslmode=prefer as libpq has it, a connect_timeout, and a name to be
// recognized by. Its errors never quote raw, unless a setting outside the
// password is at fault.
func parseDatabaseURL(raw string) (cfg pq.Config, warning string, err error) {
	if !utf8.ValidString(raw) {
		return pq.Config{}, "", errDatabaseURL
	}
	dsn, mayQuote := raw, true
	trimmed := strings.TrimSpace(raw) // only of a URL: in the other form, a space at the end may be an escaped one
	if strings.HasPrefix(trimmed, `"`) || strings.HasPrefix(trimmed, "'") {
		return pq.Config{}, "", errors.New("not shown, for it may hold a password; it begins with a quote: leave the quotes out, " +
			"docker's --env-file and others take them for a part of the value")
	}
	if rest, ok := cutScheme(trimmed); ok {
		settings, err := parsePostgresURL(rest)
		if err != nil {
			return pq.Config{}, "", err
		}
		dsn = keywordString(settings)
		_, query, _ := strings.Cut(rest, "?")
		mayQuote = !strings.Contains(query, "@") // else it may begin with the end of a password that has a bare ?
	}
	if cfg, err = newPQConfig(dsn); err != nil {
		return pq.Config{}, "", explain(err, dsn, mayQuote)
	}
	if warning, err = checkDatabase(&cfg); err != nil {
		return pq.Config{}, "", err
	}
	if cfg.SSLMode == "" && cfg.SSLNegotiation != pq.SSLNegotiationDirect { // direct is TLS or nothing
		cfg.SSLMode = pq.SSLModePrefer
	}
	if cfg.ConnectTimeout == 0 {
		// Also for connect_timeout=0: a host that doesn't answer must not hang a
		// service. Whoever wants that all the same writes -1.
		cfg.ConnectTimeout = 5 * time.Second
	}
	cfg.ApplicationName = cmp.Or(cfg.ApplicationName, "rollcall")
	return cfg, warning, nil
}

// newPQConfig is [pq.NewConfig] in an environment without those variables of libpq
// that are empty or ask for what is the case anyway, over which lib/pq would refuse.
// PGCHANNELBINDING is left to [checkDatabase].
func newPQConfig(dsn string) (pq.Config, error) {
	for _, v := range os.Environ() {
		name, value, _ := strings.Cut(v, "=")
		if isLibpq(name) && (value == "" || name == "PGCHANNELBINDING" || isIdle(envSetting(name), value)) {
			os.Unsetenv(name)
			defer os.Setenv(name, value)
		}
	}
	return pq.NewConfig(dsn)
}

// isLibpq reports whether a variable of the environment is one of libpq, or one of
// the two that lib/pq calls otherwise (SSLPGMINPROTOCOLVERSION).
func isLibpq(name string) bool { return strings.HasPrefix(strings.TrimPrefix(name, "SSL"), "PG") }

func cutScheme(s string) (rest string, ok bool) {
	if rest, ok = strings.CutPrefix(s, "postgres://"); !ok {
		rest, ok = strings.CutPrefix(s, "postgresql://")
	}
	return rest, ok
}

// parsePostgresURL returns the settings in a URL, from behind its "://". It is
// here, and not net/url with lib/pq behind it, for what libpq takes and they
// don't: several hosts with a port each, an IPv6 address without a port, a
// folder of sockets as a host (%2Frun%2Fpostgresql), any character in the
// password but the ones that end it, ssl=true.
func parsePostgresURL(rest string) (map[string]string, error) {
	if strings.Contains(rest, "#") {
		return nil, errDatabaseURL // net/url would cut off the rest, which is most likely half a password
	}
	rest, query, _ := strings.Cut(rest, "?")
	authority, database, hasPath := strings.Cut(rest, "/")
	login, hosts := "", authority
	if i := strings.LastIndexByte(authority, '@'); i >= 0 {
		login, hosts = authority[:i], authority[i+1:]
	} else if !hasPath && strings.Contains(query, "@") {
		return nil, errDatabaseURL // the password has a bare ?
	}
	if strings.Contains(database, "@") {
		return nil, errDatabaseURL // the password has a bare /
	}
	user, password, _ := strings.Cut(login, ":")

	settings := map[string]string{"user": user, "password": password, "dbname": database}
	var err error
	for name, value := range settings {
		if settings[name], err = url.PathUnescape(value); err != nil {
			return nil, errDatabaseURL
		}
	}
	if settings["host"], settings["port"], err = parseHosts(hosts); err != nil {
		return nil, err
	}
	ssl := ""
	for pair := range strings.SplitSeq(query, "&") { // of a setting given twice, the last counts
		name, value, _ := strings.Cut(pair, "=")
		if name, err = url.QueryUnescape(name); err != nil || strings.Contains(pair, ";") {
			return nil, errDatabaseURL
		}
		if value, err = url.QueryUnescape(value); err != nil {
			return nil, errDatabaseURL
		}
		switch {
		case value == "":
		case name == "ssl" && (value == "true" || value == "false"):
			ssl = map[string]string{"true": "require", "false": "disable"}[value]
		default:
			settings[name] = value // over what stands in front of the question mark, as libpq does
		}
	}
	settings["sslmode"] = cmp.Or(settings["sslmode"], ssl) // ssl is what JDBC and others write; sslmode says it more exactly
	for name, value := range settings {
		if !settingName.MatchString(name) || !utf8.ValidString(value) || strings.Contains(value, "\x00") {
			return nil, errDatabaseURL
		}
	}
	return settings, nil
}

// parseHosts turns "h1:5432,h2" into the lists that lib/pq takes. Where one
// host has a port, those without have 5432; where none has, the list of ports
// is empty and left to the port setting.
func parseHosts(s string) (hostList, portList string, err error) {
	var hosts, ports []string
	for item := range strings.SplitSeq(s, ",") {
		host, port, err := splitHostPort(strings.TrimSuffix(item, ":"))
		if err != nil {
			return "", "", errDatabaseURL
		}
		if host, err = url.PathUnescape(host); err != nil {
			return "", "", errDatabaseURL
		}
		if bare, ok := strings.CutPrefix(host, "["); ok {
			host = strings.TrimSuffix(bare, "]")
		}
		hosts, ports = append(hosts, host), append(ports, port)
	}
	if slices.ContainsFunc(ports, func(p string) bool { return p != "" }) {
		for i := range ports {
			ports[i] = cmp.Or(ports[i], "5432")
		}
		portList = strings.Join(ports, ",")
	}
	return strings.Join(hosts, ","), portList, nil
}

// settingName matches the names of libpq's settings and of the server's, which
// may have a dot.
var settingName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.]*$`)

// keywordString writes settings in libpq's other form. Empty ones are left out,
// so that PG variables can fill them in.
func keywordString(settings map[string]string) string {
	escape := strings.NewReplacer(`\`, `\\`, `'`, `\'`)
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		if settings[name] != "" {
			fmt.Fprintf(&b, "%s='%s' ", name, escape.Replace(settings[name]))
		}
	}
	return strings.TrimSuffix(b.String(), " ")
}

// soundSettings are values that lib/pq takes, for each setting whose value it
// checks.
const soundSettings = " sslmode=disable sslnegotiation=postgres sslrootcert='' sslsni=1 sslinline=0" +
	" ssl_min_protocol_version=TLSv1.2 ssl_max_protocol_version=TLSv1.3" +
	" min_protocol_version=3.0 max_protocol_version=3.0" +
	" target_session_attrs=any load_balance_hosts=disable port=5432 connect_timeout=5" +
	" binary_parameters=0 disable_prepared_binary_result=0 client_encoding=UTF8 datestyle='ISO, MDY'"

// explain returns what may be said of err, with which lib/pq refused dsn. Later
// settings win over earlier ones: where sound ones behind dsn cure it, err is
// about one of these, none of which is a secret, and may be shown. Where they
// don't, dsn is malformed, and err may quote any piece of it.
func explain(err error, dsn string, mayQuote bool) error {
	reason := strings.TrimPrefix(err.Error(), "pq: ")
	if _, envErr := newPQConfig("service=''"); envErr != nil && envErr.Error() == err.Error() {
		return fmt.Errorf("can't be used together with the environment: %s", reason)
	}
	if _, cured := newPQConfig(dsn + soundSettings); cured == nil && mayQuote {
		return fmt.Errorf("refused: %s", reason)
	}
	if _, cured := newPQConfig(dsn + " service=''"); cured == nil {
		return errors.New("names a service that the service file (PGSERVICEFILE) lacks or describes wrongly")
	}
	return errDatabaseURL
}

// libpqOnly are the settings of libpq that lib/pq lacks: it refuses their variables,
// and would send the settings to the server, which refuses every connection over
// them. Each has the values, if any, that ask for what is the case anyway.
var libpqOnly = map[string][]string{
	"channel_binding":     {"disable", "prefer"},
	"gssdelegation":       {"0"},
	"gssencmode":          {"disable", "prefer"},
	"gsslib":              {"gssapi"},
	"keepalives":          {"1"}, // Go's are on
	"keepalives_count":    {"0"}, // as the system has it
	"keepalives_idle":     {"0"},
	"keepalives_interval": {"0"},
	"krbsrvname":          {"postgres"},
	"require_auth":        nil,
	"requirepeer":         nil,
	"requiressl":          {"0"},
	"scram_client_key":    nil,
	"scram_server_key":    nil,
	"servicefile":         nil,
	"sslcertmode":         {"allow"},
	"sslcompression":      {"0"},
	"sslcrl":              nil,
	"sslcrldir":           nil,
	"sslkeylogfile":       nil,
	"sslpassword":         nil,
	"tcp_user_timeout":    {"0"},
}

// isIdle reports whether a setting of libpq asks for what is the case anyway.
func isIdle(name, value string) bool { return slices.Contains(libpqOnly[name], value) }

// envSetting returns the one of [libpqOnly] that a variable stands for, or "".
func envSetting(variable string) string {
	for name := range libpqOnly {
		if variable == "PG"+strings.ToUpper(strings.ReplaceAll(name, "_", "")) {
			return name
		}
	}
	return ""
}

// checkDatabase refuses what lib/pq takes without a word but would fail, or
// harm, at the first connection, and takes out of cfg what does nothing.
func checkDatabase(cfg *pq.Config) (warning string, err error) {
	binding := cmp.Or(cfg.Runtime["channel_binding"], os.Getenv("PGCHANNELBINDING"))
	if binding == "require" {
		delete(cfg.Runtime, "channel_binding")
		switch cfg.SSLMode {
		case "", pq.SSLModeAllow, pq.SSLModePrefer:
			cfg.SSLMode = pq.SSLModeRequire // without TLS there would be nothing to bind to
		}
		if cfg.SSLMode != pq.SSLModeVerifyFull {
			warning = "channel_binding=require: the driver, lib/pq, has no channel binding, so nothing proves that the server is the right one; " +
				"sslmode=verify-full does"
		}
	} else if _, given := cfg.Runtime["channel_binding"]; !given && binding != "" && !isIdle("channel_binding", binding) {
		return "", errors.New("can't be used together with the environment: wrong value for $PGCHANNELBINDING; it takes disable, prefer or require")
	}
	for _, name := range slices.Sorted(maps.Keys(cfg.Runtime)) {
		if !settingName.MatchString(name) {
			// Such as mysql://user:password@host/?ssl=1, of which everything
			// before the = is a name.
			return "", errDatabaseURL
		}
		if _, ok := libpqOnly[name]; !ok {
			continue
		}
		if value := cfg.Runtime[name]; value != "" && !isIdle(name, value) {
			return "", fmt.Errorf("has the setting %s, which libpq knows but lib/pq does not: leave it out", name)
		}
		delete(cfg.Runtime, name)
	}
	socket := func(host string, addr netip.Addr) bool {
		return !addr.IsValid() && (filepath.IsAbs(host) || strings.HasPrefix(host, "@"))
	}
	for _, other := range cfg.Multi {
		if socket(cfg.Host, cfg.Hostaddr) && !socket(other.Host, other.Hostaddr) {
			return "", errors.New("has a unix socket in front of other hosts, which then go without TLS: put it last")
		}
	}
	return warning, nil
}
