package main

import (
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/lib/pq"
)

// describeDatabase writes down what the tests look at, in libpq's order of things.
func describeDatabase(cfg pq.Config) string {
	s := fmt.Sprintf("%s:%d", cfg.Host, cfg.Port)
	for _, other := range cfg.Multi {
		s += fmt.Sprintf(",%s:%d", other.Host, other.Port)
	}
	return fmt.Sprintf("%s|%s|%s|%s|%s", cfg.User, cfg.Password, s, cfg.Database, cfg.SSLMode)
}

func TestDatabaseURLTakes(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ raw, want string }{ // want is user|password|hosts|database|sslmode
		// What lib/pq takes.
		{"postgres://al:pw@db/app", "al|pw|db:5432|app|prefer"},
		{"postgresql://al:pw@db:5433/app", "al|pw|db:5433|app|prefer"},
		{"postgres://al:pw@db:/app", "al|pw|db:5432|app|prefer"},
		{"postgres://al@db", "al||db:5432||prefer"},
		{"postgres://al@db/", "al||db:5432||prefer"},
		{"postgres://al:@db/app", "al||db:5432|app|prefer"},
		{"postgres://al:pw@/app", "al|pw|localhost:5432|app|prefer"},
		{"postgres:///app?user=al&password=pw&host=db&port=5433", "al|pw|db:5433|app|prefer"},
		{"postgres://al@[::1]:5433/app", "al||::1:5433|app|prefer"},
		{"postgres://al@db/app?sslmode=require", "al||db:5432|app|require"},
		{"postgres://al@db/app?sslmode=disable", "al||db:5432|app|disable"},
		{"postgres://al@db/app?sslmode=", "al||db:5432|app|prefer"},
		{"postgres://al@db/app?sslnegotiation=direct", "al||db:5432|app|"}, // lib/pq takes this for require
		{"postgres://al@db/app?sslrootcert=system", "al||db:5432|app|verify-full"},
		{"postgres://al@h1,h2/app?port=5432,5433", "al||h1:5432,h2:5433|app|prefer"},
		{"postgres://al@h1,h2/app?port=5433", "al||h1:5433,h2:5433|app|prefer"},
		{"postgres:///app?user=al&host=/run/postgresql", "al||/run/postgresql:5432|app|disable"},
		{"postgres://db/app?user=al@corp", "al@corp||db:5432|app|prefer"},
		{" postgres://al:pw@db/app\n", "al|pw|db:5432|app|prefer"}, // from a file
		{"user=al password='p w' host=db dbname=app", "al|p w|db:5432|app|prefer"},
		{"user=al password=p\\  host=db dbname=app", "al|p |db:5432|app|prefer"},
		{"user=al host=db dbname=app password=p\\ ", "al|p |db:5432|app|prefer"},
		{"user=al host=h1,h2 port=5432,5433", "al||h1:5432,h2:5433||prefer"},
		{"user=al host=/run/postgresql", "al||/run/postgresql:5432||disable"},
		{"user=al host=db sslmode=verify-full", "al||db:5432||verify-full"},
		{"user=al host=db search_path=test", "al||db:5432||prefer"},

		// What libpq takes beyond that.
		{"postgres://al:pw@h1:5432,h2:5433/app?target_session_attrs=read-write", "al|pw|h1:5432,h2:5433|app|prefer"},
		{"postgres://al@h1,h2:5433,h3/app", "al||h1:5432,h2:5433,h3:5432|app|prefer"},
		{"postgres://al@[::1]/app", "al||::1:5432|app|prefer"},
		{"postgres://al@[::1],[fe80::1%25eth0]:5433/app", "al||::1:5432,fe80::1%eth0:5433|app|prefer"},
		{"postgres://al@%2Fvar%2Frun%2Fpostgresql/app", "al||/var/run/postgresql:5432|app|disable"},
		{"postgres://al@%2Ftmp:5433/app", "al||/tmp:5433|app|disable"},
		{"postgres://al@h1:5433/app?host=h2&port=5434", "al||h2:5434|app|prefer"},
		{"postgres://al@db/app?ssl=true", "al||db:5432|app|require"},
		{"postgres://al@db/app?ssl=false", "al||db:5432|app|disable"},
		{"postgres://al@db/app?sslmode=verify-full&ssl=true", "al||db:5432|app|verify-full"},
		{"postgres://al@db/app?sslmode=disable&sslmode=require", "al||db:5432|app|require"},
		{"postgres://al@db/app?sslmode=require&sslmode=", "al||db:5432|app|require"},
		{"postgres://al@db/app?password=a&password=b&host=h1&host=h2", "al|b|h2:5432|app|prefer"},
		{"postgres://al@h1,%2Ftmp/app", "al||h1:5432,/tmp:5432|app|prefer"},

		// What asks for what is the case anyway.
		{"postgres://al@db/app?gssencmode=disable&channel_binding=prefer&keepalives=1&sslcompression=0&sslcertmode=allow", "al||db:5432|app|prefer"},
		{"user=al host=db gssencmode=prefer channel_binding=disable keepalives_idle=0 tcp_user_timeout=0 sslcrl=''", "al||db:5432||prefer"},

		// What no driver in Go has, but TLS can make up for.
		{"postgres://al@db/app?channel_binding=require", "al||db:5432|app|require"},
		{"postgres://al@db/app?sslmode=prefer&channel_binding=require", "al||db:5432|app|require"},
		{"postgres://al@db/app?sslmode=require&channel_binding=require", "al||db:5432|app|require"},
		{"postgres://al@db/app?sslmode=verify-full&channel_binding=require", "al||db:5432|app|verify-full"},
		{"user=al host=db channel_binding=require", "al||db:5432||require"},

		// Special characters, as they are where nothing else is possible.
		{"postgres://al%40corp:%3A%2F%3F%23%5B%5D%40%25%20%2B%27%22%5C@db/app", `al@corp|:/?#[]@% +'"\|db:5432|app|prefer`},
		{"postgres://al:a:b@c+d&e=f'g\"h\\i^j{k}@db/app", `al|a:b@c+d&e=f'g"h\i^j{k}|db:5432|app|prefer`},
		{"postgres://al:gr%C3%BC%C3%9Fe@db/app", "al|grüße|db:5432|app|prefer"},
		{"postgres://al:grüße@db/a%2Fb%40c", "al|grüße|db:5432|a/b@c|prefer"},
		{"postgres://al@db/app?password=a%26b%3D'%5C", `al|a&b='\|db:5432|app|prefer`},
	} {
		t.Run(test.raw, func(t *testing.T) {
			t.Parallel()
			cfg, warnings, err := parseDatabaseURL(test.raw)
			if err != nil {
				t.Fatal(err)
			}
			if want := strings.Contains(test.raw, "channel_binding=require") && !strings.Contains(test.raw, "verify-full"); (len(warnings) == 1) != want {
				t.Errorf("the warnings are %q", warnings)
			}
			for name := range cfg.Runtime { // the server would refuse what it does not know
				if name != "search_path" {
					t.Errorf("%s is sent to the server", name)
				}
			}
			if got := describeDatabase(cfg); got != test.want {
				t.Errorf("got %s, want %s", got, test.want)
			}
		})
	}
}

func TestDatabaseURLDefaults(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		raw     string
		timeout time.Duration
		name    string
	}{
		{"user=al host=db", 5 * time.Second, "rollcall"},
		{"user=al host=db connect_timeout=2 application_name=mine", 2 * time.Second, "mine"},
		{"user=al host=db connect_timeout=0 fallback_application_name=mine", 5 * time.Second, "mine"},
		{"postgres://al@db?connect_timeout=60&application_name=mine", time.Minute, "mine"},
	} {
		cfg, _, err := parseDatabaseURL(test.raw)
		if err != nil || cfg.ConnectTimeout != test.timeout || cfg.ApplicationName != test.name {
			t.Errorf("%s: got %v, %q, %v", test.raw, cfg.ConnectTimeout, cfg.ApplicationName, err)
		}
	}
}

func TestDatabaseURLRefuses(t *testing.T) {
	t.Parallel()
	const hidden = "not shown, for it may hold a password; it takes "
	const quoted = hidden                              // which tells of quotes, too
	for _, test := range []struct{ raw, want string }{ // want is what the error begins with
		// A password that is not percent-encoded falls apart in many ways.
		{"postgres://al:hunter2/x@db/app", hidden},
		{"postgres://al:1/hunter2@db/app", hidden},
		{"postgres://al:1?hunter2@db/app", hidden},
		{"postgres://al:1?sslmode=hunter2@db/app", hidden},
		{"postgres://al:1?application_name=hunter2@db/app", hidden},
		{"postgres://al:1?application_name=hunter2@db", hidden},
		{"postgres://al:p@1/?sslmode=hunter2@db/app", `refused: wrong value for "sslmode"`},
		{"postgres://al:hunter2#x@db/app", hidden},
		{"postgres://al:hunter2@db/app#x", hidden},
		{"postgres://al:hunter2%@db/app", hidden},
		{"postgres://al:hunter2%zz@db/app", hidden},
		{"postgres://al:hunter2%00@db/app", hidden},
		{"postgres://al:hunter2%ff@db/app", hidden},
		{"postgres://al:hunter2\xff@db/app", hidden},
		{"postgres://al:hunter2@db:port/app", hidden},
		{"postgres://al:hunter2@db:65536/app", `refused: wrong value for "port"`},
		{"postgres://al:hunter2@::1/app", hidden},
		{"postgres://al:hunter2@db/app?hunter2", ""}, // a setting without a value is none
		{"postgres://al:hunter2@db/app?=x", hidden},
		{"postgres://al:hunter2@db/app?a;b=x", hidden},
		{"postgres://al:hunter2@db/app?a'b=x", hidden},
		{"user=al password=hunter2 hunter2", hidden},
		{"user=al password='hunter2", hidden},
		{"user=al password=hunter2 =x", hidden},
		{"hunter2", hidden},
		// Another system's URL has one = and so looks like a setting to lib/pq.
		{"mysql://al:hunter2@db/app?ssl=1", hidden},
		{"jdbc:postgresql://db/app?password=hunter2", hidden},
		{`"postgres://al:hunter2@db/app?sslmode=disable"`, quoted},
		{`'postgres://al:hunter2@db/app'`, quoted},
		{`"user=al password=hunter2"`, quoted},
		{"POSTGRES://al:hunter2@db/app?sslmode=disable", hidden},

		// What is wrong beside the password is said.
		{"postgres://al:hunter2@db/app?sslmode=on", `refused: wrong value for "sslmode"`},
		{"user=al password=hunter2 sslmode=on", `refused: wrong value for "sslmode"`},
		{"postgres://al:hunter2@h1,h2,h3/app?port=1,2", `refused: could not match 2 port numbers to 3 hosts`},
		{"user=al password=hunter2 connect_timeout=5s", `refused: wrong value for "connect_timeout"`},
		{"user=al password=hunter2 target_session_attrs=master", `refused: wrong value for "target_session_attrs"`},
		{"postgres://al:hunter2@db/app?sslnegotiation=direct&sslmode=prefer", `refused: weak sslmode "prefer" may not be used with sslnegotiation=direct`},
		{"postgres://al:hunter2@db/app?sslrootcert=system&sslmode=require", `refused: weak sslmode "require" may not be used with sslrootcert=system`},
		{"postgres://al:hunter2@db/app?channel_binding=hunter2", "has the setting channel_binding, which libpq knows but lib/pq does not"},
		{"postgres://al:hunter2@db/app?gssencmode=require", "has the setting gssencmode, which libpq knows but lib/pq does not"},
		{"user=al password=hunter2 keepalives=0", "has the setting keepalives, which"},
		{"postgres://al:hunter2@%2Ftmp,db/app", "has a unix socket in front of other hosts"},
	} {
		t.Run(test.raw, func(t *testing.T) {
			t.Parallel()
			cfg, _, err := parseDatabaseURL(test.raw)
			if got := errorText(err); !strings.HasPrefix(got, test.want) || (err == nil) != (test.want == "") {
				t.Errorf("got %s, %q, want %q", describeDatabase(cfg), got, test.want)
			}
			if strings.Contains(errorText(err), "hunter2") {
				t.Errorf("the error gives the password away: %v", err)
			}
		})
	}
}

// Not parallel: it sets variables of the process, which lib/pq looks at.
func TestDatabaseURLAndPGVariables(t *testing.T) {
	service := filepath.Join(t.TempDir(), "service")
	if err := os.WriteFile(service, []byte("[sound]\nhost=db\n\n[broken]\npassword hunter2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ env, raw, want, wantErr string }{
		{"PGSSLMODE=disable", "user=al host=db", "al||db:5432||disable", ""},
		{"PGSSLMODE=disable", "user=al host=db sslmode=require", "al||db:5432||require", ""},
		{"PGSSLNEGOTIATION=direct", "user=al host=db", "al||db:5432||", ""},
		{"PGSSLMODE=disable", "postgres://al@db", "al||db:5432||disable", ""},
		{"PGPASSWORD=hunter2", "postgres://al@db", "al|hunter2|db:5432||prefer", ""},
		{"PGHOST=db", "postgres://al@/app", "al||db:5432|app|prefer", ""},
		{"PGPORT=5433", "postgres://al@db/app", "al||db:5433|app|prefer", ""},
		{"PGPORT=5433", "postgres://al@h1,h2/app", "al||h1:5433,h2:5433|app|prefer", ""},
		{"PGPORT=", "postgres://al@db", "al||db:5432||prefer", ""},
		{"PGSSLMODE=", "postgres://al@db", "al||db:5432||prefer", ""},
		{"PGHOSTADDR=", "user=al host=db", "al||db:5432||prefer", ""},
		{"PGCONNECT_TIMEOUT=", "user=al host=db", "al||db:5432||prefer", ""},
		{"PGSSLCRL=", "user=al host=db", "al||db:5432||prefer", ""},
		{"PGREQUIREPEER=", "user=al host=db", "al||db:5432||prefer", ""},
		{"SSLPGMINPROTOCOLVERSION=", "user=al host=db", "al||db:5432||prefer", ""},
		{"PGGSSENCMODE=disable", "user=al host=db", "al||db:5432||prefer", ""},
		{"PGGSSENCMODE=require", "user=al host=db", "", "refused: environment variable $PGGSSENCMODE"},
		{"PGCHANNELBINDING=prefer", "user=al host=db", "al||db:5432||prefer", ""},
		{"PGCHANNELBINDING=require", "user=al host=db", "al||db:5432||require", ""},
		{"PGCHANNELBINDING=require", "user=al host=db channel_binding=prefer", "al||db:5432||prefer", ""},
		{"PGCHANNELBINDING=on", "user=al host=db", "", "refused: environment variable $PGCHANNELBINDING"},
		{"PGKRBSRVNAME=postgres", "user=al host=db", "al||db:5432||prefer", ""},
		{"PGSSLCOMPRESSION=0", "user=al host=db", "al||db:5432||prefer", ""},
		{"PGSSLMODE=on", "postgres://al@db", "", "refused: wrong value for $PGSSLMODE"},
		{"PGREQUIREPEER=x", "postgres://al@db", "", "refused: environment variable $PGREQUIREPEER"},
		{"PGSERVICEFILE=" + service, "user=al service=sound", "al||db:5432||prefer", ""},
		{"PGSERVICEFILE=" + service, "user=al service=broken", "", "not shown, for it may hold a password"},
		{"PGSERVICEFILE=" + service, "user=al service=missing", "", "not shown, for it may hold a password"},
	} {
		t.Run(test.env+" "+test.raw, func(t *testing.T) {
			name, value, _ := strings.Cut(test.env, "=")
			t.Setenv(name, value)
			cfg, _, err := parseDatabaseURL(test.raw)
			if got := errorText(err); !strings.HasPrefix(got, test.wantErr) || (err == nil) != (test.wantErr == "") || strings.Contains(got, "hunter2") {
				t.Fatalf("got %q, want %q", got, test.wantErr)
			}
			if got := describeDatabase(cfg); err == nil && got != test.want {
				t.Errorf("got %s, want %s", got, test.want)
			}
			if os.Getenv(name) != value {
				t.Errorf("%s has become %q", name, os.Getenv(name))
			}
		})
	}
}

// Whatever pg_hba.conf asks for, the service starts as psql would connect.
func TestSSLModes(t *testing.T) {
	t.Parallel()
	n := newNode(t, freePort(t))
	if err := n.initialize(t.Context()); err != nil {
		t.Fatal(err)
	}
	certFile, keyFile := writeCertificate(t, n.path("data"), "rollcall.test")
	access := "host all rollcall 127.0.0.1/32 trust\nhostnossl all plain 127.0.0.1/32 trust\nhostssl all secure 127.0.0.1/32 trust\n"
	conf := "ssl = on\nssl_cert_file = 'cert.pem'\nssl_key_file = 'key.pem'\n"
	err := errors.Join(n.chown(certFile), n.chown(keyFile), os.WriteFile(n.path("data/pg_hba.conf"), []byte(access), 0o600),
		os.WriteFile(n.path("data/postgresql.auto.conf"), []byte(conf), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	n.serve()
	admin, err := sql.Open("postgres", "postgres://rollcall@127.0.0.1:"+n.port+"/postgres?sslmode=disable")
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close()
	waitFor(t, "PostgreSQL", func() bool { return admin.Ping() == nil })
	mustExec(t, admin, "CREATE ROLE plain SUPERUSER LOGIN; CREATE ROLE secure SUPERUSER LOGIN")
	verified := "host=rollcall.test hostaddr=127.0.0.1 user=secure sslmode=verify-full sslrootcert=" + certFile
	for _, test := range []struct {
		settings     string
		tls, warning bool
	}{
		{"host=127.0.0.1 user=plain", false, false},
		{"host=127.0.0.1 user=plain sslmode=allow", false, false},
		{"host=127.0.0.1 user=secure", true, false},
		{"host=127.0.0.1 user=secure sslmode=allow", true, false},
		{"host=127.0.0.1 user=secure sslmode=require channel_binding=require", true, true},
		{verified + " channel_binding=require", true, false},
	} {
		s := startService(t, testEnv(test.settings+" dbname=postgres port="+n.port))
		s.waitReady()
		var tls bool
		if err := admin.QueryRow("SELECT bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name = 'rollcall'").Scan(&tls); err != nil || tls != test.tls {
			t.Errorf("%s: with TLS %t, %v", test.settings, tls, err)
		}
		if warned := strings.Contains(s.log.String(), `"level":"WARN","msg":"DATABASE_URL: channel_binding=require`); warned != test.warning {
			t.Errorf("%s: a warning %t", test.settings, warned)
		}
		s.stop()
		s.done <- <-s.done
		waitFor(t, "the connections to end", func() bool {
			var left int
			err := admin.QueryRow("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'rollcall'").Scan(&left)
			return err == nil && left == 0
		})
	}
}

// FuzzDatabaseURL checks that no value makes the parser panic, that a password
// survives in each form, and that no error shows it, well-formed or not.
func FuzzDatabaseURL(f *testing.F) {
	for _, seed := range []struct{ password, tail string }{
		{"", ""}, {`:/?#[]@!$&'()*+,;= %"\`, "?sslmode=on"}, {"1?sslmode=x", "?a=b"}, {"1/", "?host=/tmp&x=@"}, {"%00", ":5432/app"},
		{"", "?ssl=false&channel_binding=require&gssencmode=disable"}, {"a b", " sslmode=on"}, {"@h/db?port=x", ",h2:5433"}, {"'", "#"}, {"\n\xff", "?service=x"},
	} {
		f.Add(seed.password, seed.tail)
	}
	const mark = "S3cr3t"
	keywordEscape := strings.NewReplacer(`\`, `\\`, `'`, `\'`)
	f.Fuzz(func(t *testing.T, password, tail string) {
		parseDatabaseURL(password)
		parseDatabaseURL("postgres://" + password)
		if strings.Contains(tail, mark) {
			return
		}

		password = mark + password + mark
		bare := []string{"postgres://al:" + password + "@db" + tail, "postgres://al:1" + password + "@db/" + tail}
		if !strings.Contains(password, "=") { // with one, it may look like a setting
			bare = append(bare, "user=al password="+password+" "+tail)
		}
		for _, raw := range bare {
			if _, _, err := parseDatabaseURL(raw); err != nil && strings.Contains(err.Error(), mark) {
				t.Errorf("%q: the error gives the password away: %v", raw, err)
			}
		}

		sound := utf8.ValidString(password) && !strings.Contains(password, "\x00")
		for _, raw := range []string{
			"postgres://al:" + url.PathEscape(password) + "@db",
			"postgres://db?user=al&password=" + url.QueryEscape(password),
			"user=al host=db password='" + keywordEscape.Replace(password) + "'",
		} {
			cfg, _, err := parseDatabaseURL(raw)
			if sound && (err != nil || cfg.Password != password) {
				t.Errorf("%q: got password %q, %v", raw, cfg.Password, err)
			}
			if err != nil && strings.Contains(err.Error(), mark) {
				t.Errorf("%q: the error gives the password away: %v", raw, err)
			}
		}
	})
}
