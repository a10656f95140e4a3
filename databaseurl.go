package main

import (
	"cmp"
	"errors"
	"fmt"
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

// errDatabaseURL is all that is said of a value that makes no sense. Any piece of it may be a piece of the password, and
// the errors of net/url and lib/pq quote such pieces.
var errDatabaseURL = errors.New("not shown, for it may hold a password; it takes " + databaseForms +
	"; in a URL, special characters of the password are percent-encoded (@ as %40, / as %2F, # as %23); quotes stand around " +
	"single values of the second form alone (docker's --env-file takes none off); a service is one of PGSERVICEFILE")

// safeReason matches what may be shown of an error of lib/pq: the setting or the variable at fault, not its value.
var safeReason = regexp.MustCompile(`^pq: ((wrong value for|unsupported|environment variable) ["$]?\w+"?|` +
	`could not match \d+ .*|weak sslmode .*|m(in|ax)_protocol_version .*)`)

// settingName matches the names of libpq's settings and of the server's, which may have a dot.
var settingName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.]*$`)

// parseDatabaseURL returns what to connect with, and warnings. It takes all that lib/pq takes and in addition what libpq,
// and so psql, understands in a URL. The defaults, behind raw and the PG variables of the environment, are those of a
// service: sslmode=prefer as in libpq, a connect_timeout and an application_name. Its errors never quote raw.
func parseDatabaseURL(raw string) (cfg pq.Config, warnings []string, err error) {
	dsn := raw
	// In the other form, a space at the end may be an escaped one.
	if scheme, rest, _ := strings.Cut(strings.TrimSpace(raw), "://"); scheme == "postgres" || scheme == "postgresql" {
		dsn, err = keywordForm(rest)
	}
	if err != nil || !utf8.ValidString(dsn) || strings.Contains(dsn, "\x00") {
		return cfg, nil, errDatabaseURL
	}
	if cfg, err = newPQConfig(dsn); err != nil {
		return cfg, nil, err
	}
	if cfg.SSLMode == "" && cfg.SSLNegotiation != pq.SSLNegotiationDirect { // direct is TLS or nothing
		cfg.SSLMode = pq.SSLModePrefer
	}
	cfg.ConnectTimeout = cmp.Or(cfg.ConnectTimeout, 5*time.Second) // a host that doesn't answer must not hang a service
	cfg.ApplicationName = cmp.Or(cfg.ApplicationName, "rollcall")
	warnings, err = checkDatabase(&cfg)
	return cfg, warnings, err
}

// hostForm matches a host of a URL, an IPv6 address in brackets, and its port.
var hostForm = regexp.MustCompile(`^(?:\[([^\[\]]*)\]|([^:\[\]]*))(?::(\d*))?$`)

// keywordForm returns the settings in a URL, given from behind its "://", in libpq's other form. It is here, and not net/url
// with lib/pq behind it, for what libpq takes and they don't: several hosts with a port each, an IPv6 address without a
// port, a folder of sockets as a host (%2Frun%2Fpostgresql), any character in the password but those that end it, ssl=true.
func keywordForm(rest string) (dsn string, err error) {
	rest, query, _ := strings.Cut(rest, "?")
	authority, database, hasPath := strings.Cut(strings.ReplaceAll(rest, "+", "%2B"), "/") // + is a space in a query alone
	i := strings.LastIndexByte(authority, '@')
	user, password, _ := strings.Cut(authority[:max(i, 0)], ":")
	if strings.Contains(database, "@") || strings.Contains(rest+query, "#") || i < 0 && !hasPath && strings.Contains(query, "@") {
		return "", errDatabaseURL // most likely, a part of a password that has a bare / # or ?
	}
	var hosts, ports []string
	for item := range strings.SplitSeq(authority[i+1:], ",") {
		m := hostForm.FindStringSubmatch(item)
		if m == nil {
			return "", errDatabaseURL
		}
		hosts, ports = append(hosts, m[1]+m[2]), append(ports, m[3])
	}
	pairs := []string{"user=" + user, "password=" + password, "dbname=" + database, "host=" + strings.Join(hosts, ",")}
	if strings.Join(ports, "") != "" { // else the setting port, or PGPORT, is for all hosts
		ports[0] = cmp.Or(ports[0], "5432") // lib/pq does so for those behind the first
		pairs = append(pairs, "port="+strings.Join(ports, ","))
	}
	for _, pair := range append(pairs, strings.Split(query, "&")...) { // of a setting given twice, the last counts
		name, value, _ := strings.Cut(pair, "=")
		value, err := url.QueryUnescape(value)
		switch {
		case err != nil:
			return "", errDatabaseURL
		case name == "ssl" && value == "true": // as JDBC and others write it; sslmode, which says it more exactly, wins
			dsn = setting("sslmode", "require") + dsn
		case name == "ssl" && value == "false":
			dsn = setting("sslmode", "disable") + dsn
		case value != "": // else a PG variable can fill it in
			dsn += setting(name, value)
		}
	}
	return dsn, nil
}

// setting returns a setting in that form, with a space behind it.
func setting(name, value string) string {
	return name + "='" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(value) + "' "
}

// newPQConfig is [pq.NewConfig] in an environment without those variables of libpq that are empty or ask for what is the
// case anyway, over which lib/pq would refuse. Its errors tell nothing but [safeReason].
func newPQConfig(dsn string) (pq.Config, error) {
	for _, v := range os.Environ() {
		variable, value, _ := strings.Cut(v, "=")
		name := strings.ToLower(strings.TrimPrefix(variable, "PG"))
		name = strings.Replace(name, "channelb", "channel_b", 1)
		isHarmless := slices.Contains(libpqOnly[name], value)
		if !isLibpq(variable) || value != "" && !isHarmless {
			continue
		}
		os.Unsetenv(variable)
		defer os.Setenv(variable, value)
		if isHarmless {
			dsn = setting(name, value) + dsn // for checkDatabase; the last of a setting given twice counts
		}
	}
	cfg, err := pq.NewConfig(dsn)
	if err == nil {
		return cfg, nil
	}
	if m := safeReason.FindStringSubmatch(err.Error()); m != nil {
		return cfg, fmt.Errorf("refused: %s", m[1])
	}
	return cfg, errDatabaseURL
}

// isLibpq reports whether a variable is one of libpq, or of the two that lib/pq calls otherwise (SSLPGMINPROTOCOLVERSION).
func isLibpq(name string) bool { return strings.HasPrefix(strings.TrimPrefix(name, "SSL"), "PG") }

// libpqOnly are the settings of libpq that lib/pq lacks, each with the values, if any, that need none. lib/pq would send them
// to the server, which refuses every connection over them.
var libpqOnly = map[string][]string{
	"channel_binding": {"disable", "prefer", "require"}, // require: see checkDatabase
	"gssencmode":      {"disable", "prefer"}, "gsslib": {"gssapi"}, "krbsrvname": {"postgres"}, "gssdelegation": {"0"},
	"keepalives": {"1"}, "keepalives_count": {"0"}, "keepalives_idle": {"0"}, "keepalives_interval": {"0"}, "tcp_user_timeout": {"0"},
	"requiressl": {"0"}, "sslcertmode": {"allow"}, "sslcompression": {"0"}, "sslcrl": nil, "sslcrldir": nil, "sslkeylogfile": nil,
	"sslpassword": nil, "require_auth": nil, "requirepeer": nil, "scram_client_key": nil, "scram_server_key": nil, "servicefile": nil,
}

// checkDatabase refuses what lib/pq takes without a word but would fail, or harm, at the first connection, and takes out of
// cfg what does nothing.
func checkDatabase(cfg *pq.Config) (warnings []string, err error) {
	binding := cfg.Runtime["channel_binding"] == "require"
	for name, harmless := range libpqOnly {
		if value := cfg.Runtime[name]; value != "" && !slices.Contains(harmless, value) {
			return nil, fmt.Errorf("has the setting %s, which libpq knows but lib/pq does not: leave it out", name)
		}
		delete(cfg.Runtime, name)
	}
	for name := range cfg.Runtime {
		if !settingName.MatchString(name) { // such as all before the = of mysql://user:password@host/?ssl=1
			return nil, errDatabaseURL
		}
	}
	if binding && (cfg.SSLMode == pq.SSLModeAllow || cfg.SSLMode == pq.SSLModePrefer) {
		cfg.SSLMode = pq.SSLModeRequire // without TLS there would be nothing to bind to
	}
	if binding && cfg.SSLMode != pq.SSLModeVerifyFull {
		warnings = append(warnings, "DATABASE_URL: channel_binding=require: the driver, lib/pq, has no channel binding, "+
			"so nothing proves that the server is the right one; sslmode=verify-full does")
	}
	first := pq.ConfigMultihost{Host: cfg.Host, Hostaddr: cfg.Hostaddr}
	isTCP := func(h pq.ConfigMultihost) bool {
		return h.Hostaddr.IsValid() || !filepath.IsAbs(h.Host) && !strings.HasPrefix(h.Host, "@")
	}
	if !isTCP(first) && slices.ContainsFunc(cfg.Multi, isTCP) {
		return nil, errors.New("has a unix socket in front of other hosts, which then go without TLS: put it last")
	}
	return warnings, nil
}

// setDatabase sets DATABASE_URL.
func (c *config) setDatabase(value string) (err error) {
	var warnings []string
	c.database, warnings, err = parseDatabaseURL(value)
	c.warnings = append(c.warnings, warnings...)
	return err
}
