package main

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The PG variables of whoever runs the tests would change what they find. When a
// test runs this binary as the program, they are what it tests.
func init() {
	if os.Getenv("ROLLCALL_TEST_MAIN") == "" {
		unsetLibpq()
	}
}

const (
	soundURL    = "postgres://alice:hunter2@db.example/app"
	soundSecret = "hunter2-hunter2-hunter2-hunter2-"
)

// getenvOf returns a getenv for "NAME=value" each. The least that is required
// is there as well; an empty value takes it away.
func getenvOf(env ...string) func(string) string {
	vars := map[string]string{"DATABASE_URL": soundURL, "JWT_SECRET": soundSecret}
	for _, v := range env {
		name, value, _ := strings.Cut(v, "=")
		vars[name] = value
	}
	return func(name string) string { return vars[name] }
}

func TestConfigTakes(t *testing.T) {
	t.Parallel()
	cert, certKey := certificateFiles(t)
	keyFile := publicKeyFile(t)
	secretFile := func(content string) string { return secretFile(t, content) }

	for _, test := range []struct {
		env  string // variables, a line each, beside the least that is required
		get  func(c config) any
		want any
	}{
		{"DATABASE_URL=" + soundURL, func(c config) any { return c.database.Host }, "db.example"},

		{"HOST=", addressOf, "0.0.0.0:3000"},
		{"HOST=127.0.0.1", addressOf, "127.0.0.1:3000"},
		{"HOST=::1", addressOf, "[::1]:3000"},
		{"HOST=[::1]", addressOf, "[::1]:3000"},
		{"HOST=fe80::1%eth0", addressOf, "[fe80::1%eth0]:3000"},
		{"HOST=localhost", addressOf, "localhost:3000"},
		{"HOST=node-7.internal_net.example.", addressOf, "node-7.internal_net.example.:3000"},
		{"PORT=", addressOf, "0.0.0.0:3000"},
		{"PORT=0", addressOf, "0.0.0.0:0"},
		{"PORT=65535", addressOf, "0.0.0.0:65535"},

		{"AUTH=", func(c config) any { return c.authOff }, false},
		{"AUTH=JWT", func(c config) any { return c.authOff }, false},
		{"AUTH=off", func(c config) any { return c.authOff }, true},
		{"AUTH=Off", func(c config) any { return len(c.keys) }, 1},
		{"JWT_SECRET=" + soundSecret, func(c config) any { return string(c.jwtSecret) }, soundSecret},
		{"JWT_SECRET=" + soundSecret, func(c config) any { return len(c.keys) }, 1},
		{"JWT_PUBLIC_KEY_FILE=" + keyFile, func(c config) any { return len(c.keys) }, 2}, // the secret is the other
		{"JWT_SECRET=\nJWT_SECRET_FILE=" + secretFile(soundSecret), func(c config) any { return string(c.jwtSecret) }, soundSecret},
		{"JWT_SECRET=\nJWT_SECRET_FILE=" + secretFile(soundSecret+"\n"), func(c config) any { return string(c.jwtSecret) }, soundSecret},
		{"JWT_SECRET=\nJWT_SECRET_FILE=" + secretFile(soundSecret+"\r\n"), func(c config) any { return string(c.jwtSecret) }, soundSecret},
		{"JWT_SECRET=\nJWT_SECRET_FILE=" + secretFile(" "+soundSecret+"é\x00 "), func(c config) any { return string(c.jwtSecret) }, " " + soundSecret + "é\x00 "},
		{"JWT_SECRET=\nJWT_SECRET_FILE=" + secretFile(soundSecret), func(c config) any { return len(c.keys) }, 1},
		{"DATABASE_URL=\nDATABASE_URL_FILE=" + secretFile(soundURL+"\n"), func(c config) any { return c.database.Password }, "hunter2"},
		{"JWT_ISSUER=", func(c config) any { return c.issuer }, ""},
		{"JWT_ISSUER=https://id.example/", func(c config) any { return c.issuer }, "https://id.example/"},
		{"JWT_ISSUER=*", func(c config) any { return c.issuer }, ""},
		{"JWT_AUDIENCE=*", func(c config) any { return c.audience }, ""},
		{"JWT_AUDIENCE=rollcall", func(c config) any { return c.audience }, "rollcall"},

		{"JWT_READ_SCOPE=", func(c config) any { return c.readScope }, "users:read"},
		{"JWT_READ_SCOPE=https://api.example.com/users.read", func(c config) any { return c.readScope }, "https://api.example.com/users.read"},
		{"JWT_WRITE_SCOPE=", func(c config) any { return c.writeScope }, "users:write"},
		{"JWT_WRITE_SCOPE=Users.ReadWrite.All", func(c config) any { return c.writeScope }, "Users.ReadWrite.All"},
		{"JWT_UNSCOPED=", func(c config) any { return c.denyUnscoped }, false},
		{"JWT_UNSCOPED=Allow", func(c config) any { return c.denyUnscoped }, false},
		{"JWT_UNSCOPED=deny", func(c config) any { return c.denyUnscoped }, true},

		{"CORS_ORIGINS=", func(c config) any { return c.corsOrigins }, []string(nil)},
		{"CORS_ORIGINS=*", func(c config) any { return c.corsOrigins }, []string(nil)},
		{"CORS_ORIGINS=https://a.example", originsOf, "https://a.example"},
		{"CORS_ORIGINS=https://a.example, http://localhost:8080", originsOf, "https://a.example http://localhost:8080"},
		{"CORS_ORIGINS=HTTPS://A.Example", originsOf, "https://a.example"},
		{"CORS_ORIGINS=https://a.example:443", originsOf, "https://a.example"},
		{"CORS_ORIGINS=http://a.example:80", originsOf, "http://a.example"},
		{"CORS_ORIGINS=https://a.example:80", originsOf, "https://a.example:80"},
		{"CORS_ORIGINS=https://a.example:8443", originsOf, "https://a.example:8443"},
		{"CORS_ORIGINS=http://127.0.0.1:3000", originsOf, "http://127.0.0.1:3000"},
		{"CORS_ORIGINS=http://[::1]:3000", originsOf, "http://[::1]:3000"},
		{"CORS_ORIGINS=https://xn--bcher-kva.example", originsOf, "https://xn--bcher-kva.example"},
		{"CORS_ORIGINS=capacitor://localhost", originsOf, "capacitor://localhost"},

		{"LOG_LEVEL=", func(c config) any { return c.logLevel }, slog.LevelInfo},
		{"LOG_LEVEL=debug", func(c config) any { return c.logLevel }, slog.LevelDebug},
		{"LOG_LEVEL=Warn", func(c config) any { return c.logLevel }, slog.LevelWarn},
		{"LOG_LEVEL=ERROR", func(c config) any { return c.logLevel }, slog.LevelError},
		{"LOG_FORMAT=", func(c config) any { return c.logFormat }, "json"},
		{"LOG_FORMAT=TEXT", func(c config) any { return c.logFormat }, "text"},

		{"DB_MAX_CONNS=", func(c config) any { return c.dbMaxConns }, 10},
		{"DB_MAX_CONNS=1", func(c config) any { return c.dbMaxConns }, 1},
		{"DB_MAX_CONNS=10000", func(c config) any { return c.dbMaxConns }, 10000},
		{"REQUEST_TIMEOUT=", func(c config) any { return c.requestTimeout }, 10 * time.Second},
		{"REQUEST_TIMEOUT=1m30s", func(c config) any { return c.requestTimeout }, 90 * time.Second},
		{"REQUEST_TIMEOUT=24h", func(c config) any { return c.requestTimeout }, 24 * time.Hour},
		{"SHUTDOWN_TIMEOUT=", func(c config) any { return c.shutdownTimeout }, 20 * time.Second},
		{"SHUTDOWN_TIMEOUT=500ms", func(c config) any { return c.shutdownTimeout }, 500 * time.Millisecond},
		{"DRAIN_DELAY=", func(c config) any { return c.drainDelay }, time.Duration(0)},
		{"DRAIN_DELAY=0s", func(c config) any { return c.drainDelay }, time.Duration(0)},
		{"DRAIN_DELAY=15s", func(c config) any { return c.drainDelay }, 15 * time.Second},
		{"MAX_BODY_BYTES=", func(c config) any { return c.maxBodyBytes }, int64(65536)},
		{"MAX_BODY_BYTES=1", func(c config) any { return c.maxBodyBytes }, int64(1)},
		{"MAX_BODY_BYTES=1073741824", func(c config) any { return c.maxBodyBytes }, int64(1 << 30)},
		{"MAX_IN_FLIGHT=", func(c config) any { return c.maxInFlight }, 1024},
		{"MAX_IN_FLIGHT=1000000", func(c config) any { return c.maxInFlight }, 1000000},

		{"RATE_LIMIT=", func(c config) any { return c.rateLimit }, 0},
		{"RATE_LIMIT=50", func(c config) any { return c.rateLimit }, 50},

		{"JWT_JWKS_URL=", func(c config) any { return len(c.keys) }, 1},
		{"ADMIN_ADDR=", func(c config) any { return c.adminAddr }, ""},
		{"ADMIN_ADDR=:9090", func(c config) any { return c.adminAddr }, ":9090"},
		{"ADMIN_ADDR=[::1]:9090", func(c config) any { return c.adminAddr }, "[::1]:9090"},
		{"TLS_CERT_FILE=", func(c config) any { return c.tlsCertFile + c.tlsKeyFile }, ""},
	} {
		t.Run(test.env, func(t *testing.T) {
			t.Parallel()
			c, err := loadConfig(getenvOf(strings.Split(test.env, "\n")...), false)
			if err != nil {
				t.Fatal(err)
			}
			if got := test.get(c); !reflect.DeepEqual(got, test.want) {
				t.Errorf("got %v, want %v", got, test.want)
			}
		})
	}

	c, err := loadConfig(getenvOf("TLS_CERT_FILE="+cert, "TLS_KEY_FILE="+certKey), false)
	if err != nil || c.tlsCertFile != cert || c.tlsKeyFile != certKey {
		t.Errorf("TLS: got %v, %v", c, err)
	}
	if _, err := loadConfig(getenvOf("AUTH=off", "JWT_SECRET="), false); err != nil {
		t.Errorf("AUTH=off without a key: %v", err)
	}
	if _, err := loadConfig(getenvOf("JWT_SECRET=", "JWT_PUBLIC_KEY_FILE="+keyFile), false); err != nil {
		t.Errorf("a public key without a secret: %v", err)
	}
	const keySet = "https://id.example/keys"
	if c, err := loadConfig(getenvOf("JWT_SECRET=", "JWT_JWKS_URL="+keySet, "JWT_ISSUER=*", "JWT_AUDIENCE=users"), false); err != nil || c.jwksURL != keySet {
		t.Errorf("a key set without a secret: got %q, %v", c.jwksURL, err)
	}
	if _, err := loadConfig(getenvOf("AUTH=off", "JWT_JWKS_URL="+keySet), false); err != nil {
		t.Errorf("AUTH=off with a key set: %v", err)
	}
}

func addressOf(c config) any { return c.listenAddr() }
func originsOf(c config) any { return strings.Join(c.corsOrigins, " ") }

func TestConfigForDev(t *testing.T) {
	t.Parallel()
	for env, want := range map[string]string{"HOST=": "127.0.0.1:3000", "HOST=0.0.0.0": "0.0.0.0:3000"} {
		if c, err := loadConfig(getenvOf(env), true); err != nil || c.listenAddr() != want {
			t.Errorf("%s: got %s, %v, want %s", env, c.listenAddr(), err, want)
		}
	}
}

func TestConfigRefuses(t *testing.T) {
	t.Parallel()
	cert, certKey := certificateFiles(t)
	otherCert, _ := certificateFiles(t)
	missing := filepath.Join(t.TempDir(), "missing")
	large, pipe := secretFile(t, strings.Repeat("hunter2", 1<<18)), filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	shortFile, emptyFile, lineFile := secretFile(t, "hunter2\n"), secretFile(t, ""), secretFile(t, "\n")
	linesFile := secretFile(t, soundSecret+"\n\n")
	wrongURL, urlFile, soundFile := secretFile(t, "mysql://alice:hunter2@db/app"), secretFile(t, soundURL), secretFile(t, soundSecret)

	const (
		host   = " is not an IP address or a host name; no scheme, and the port goes into PORT"
		port   = " is not a whole number from 0 to 65535"
		time   = ` is not a time with its unit from 1ns to 24h, such as "10s" or "1m30s"`
		origin = ", which is no origin; it takes *, or scheme://host[:port], comma-separated"
	)
	for _, test := range []struct {
		env  string // variables, a line each, beside the least that is required
		want string // what the error begins with
	}{
		{"DATABASE_URL=", "DATABASE_URL: not set; it takes postgres://user:password@host:5432/database"},
		{"DATABASE_URL=mysql://alice:hunter2@db/app", "DATABASE_URL: not shown, for it may hold a password; it takes postgres://"},

		{"HOST=127.0.0.1:3000", `HOST: "127.0.0.1:3000"` + host},
		{"HOST=http://localhost", `HOST: "http://localhost"` + host},
		{"HOST=localhost:3000", `HOST: "localhost:3000"` + host},
		{"HOST=[::1]:3000", `HOST: "[::1]:3000"` + host},
		{"HOST=[::1", `HOST: "[::1"` + host},
		{"HOST=[127.0.0.1]", `HOST: "[127.0.0.1]"` + host},
		{"HOST=127.0.0", `HOST: "127.0.0"` + host},
		{"HOST=256.1.1.1", `HOST: "256.1.1.1"` + host},
		{"HOST=*", `HOST: "*"` + host},
		{"HOST= localhost", `HOST: " localhost"` + host},
		{"PORT=65536", `PORT: "65536"` + port},
		{"PORT=-1", `PORT: "-1"` + port},
		{"PORT=http", `PORT: "http"` + port},
		{"PORT=3000\r", `PORT: "3000\r"` + port},
		{"PORT=99999999999999999999", `PORT: "99999999999999999999"` + port},
		{"PORT=" + strings.Repeat("9", 1000), `PORT: "` + strings.Repeat("9", 80) + `"` + port},

		{"AUTH=none", `AUTH: "none" is not one of jwt, off`},
		{"JWT_SECRET=", `AUTH: "jwt" needs a key; set JWT_SECRET, JWT_PUBLIC_KEY_FILE or JWT_JWKS_URL, or AUTH=off to open the API to everyone`},
		{"JWT_SECRET=hunter2", "JWT_SECRET: "},
		{"JWT_SECRET=hunter2\nAUTH=off", "JWT_SECRET: "},
		{"JWT_SECRET_FILE=" + soundFile, fmt.Sprintf("JWT_SECRET_FILE: %.80q is set beside JWT_SECRET: leave one of them out", soundFile)},
		{"DATABASE_URL_FILE=" + urlFile, fmt.Sprintf("DATABASE_URL_FILE: %.80q is set beside DATABASE_URL: leave one of them out", urlFile)},
		{"JWT_SECRET=\nJWT_SECRET_FILE=" + missing, fmt.Sprintf("JWT_SECRET_FILE: %.80q can't be read: stat ", missing)},
		{"JWT_SECRET=\nJWT_SECRET_FILE=" + t.TempDir(), `JWT_SECRET_FILE: "/`},
		{"JWT_SECRET=\nJWT_SECRET_FILE=" + pipe, fmt.Sprintf("JWT_SECRET_FILE: %.80q can't be read: expected a regular file of at most 1048576 bytes", pipe)},
		{"JWT_SECRET=\nJWT_SECRET_FILE=" + large, fmt.Sprintf("JWT_SECRET_FILE: %.80q can't be read: expected a regular file of at most", large)},
		{"JWT_SECRET=\nJWT_SECRET_FILE=" + shortFile, fmt.Sprintf("JWT_SECRET_FILE: %.80q is a file with a bad value: the secret has fewer than 32 bytes", shortFile)},
		{"JWT_SECRET=\nJWT_SECRET_FILE=" + linesFile, fmt.Sprintf("JWT_SECRET_FILE: %.80q is a file with a bad value: the secret has fewer than 32 bytes, or it ends with", linesFile)},
		{"JWT_SECRET=\nJWT_SECRET_FILE=" + emptyFile, fmt.Sprintf("JWT_SECRET_FILE: %.80q is an empty file", emptyFile)},
		{"DATABASE_URL=\nDATABASE_URL_FILE=" + lineFile, fmt.Sprintf("DATABASE_URL_FILE: %.80q is an empty file", lineFile)},
		{"DATABASE_URL=\nDATABASE_URL_FILE=" + wrongURL, fmt.Sprintf("DATABASE_URL_FILE: %.80q is a file with a bad value: not shown, for it may hold", wrongURL)},
		{"JWT_PUBLIC_KEY_FILE=" + missing, fmt.Sprintf("JWT_PUBLIC_KEY_FILE: %.80q is no file of public keys: ", missing)},
		{"JWT_PUBLIC_KEY_FILE=" + missing + "\nJWT_SECRET=", fmt.Sprintf("JWT_PUBLIC_KEY_FILE: %.80q is no", missing)},
		{"JWT_JWKS_URL=http://id.example/keys\nJWT_ISSUER=*\nJWT_AUDIENCE=*", `JWT_JWKS_URL: "http://id.example/keys" is not https; http is for loopback addresses alone`},
		{"JWT_JWKS_URL=https://id.example/keys\nJWT_AUDIENCE=users", `JWT_ISSUER: not set; with JWT_JWKS_URL it has to be`},
		{"JWT_JWKS_URL=https://id.example/keys\nJWT_ISSUER=*", `JWT_AUDIENCE: not set; with JWT_JWKS_URL it has to be`},
		{"ADMIN_ADDR=9090", `ADMIN_ADDR: "9090" is no address with a port, such as 127.0.0.1:9090`},
		{"ADMIN_ADDR=:99999", `ADMIN_ADDR: ":99999" is no address with a port`},
		{"ADMIN_ADDR=http://x:80", `ADMIN_ADDR: "http://x:80" is no address with a port`},

		{"JWT_READ_SCOPE=users:read users:write", `JWT_READ_SCOPE: "users:read users:write" is not one scope: 1 to 255 characters`},
		{`JWT_READ_SCOPE=a"b`, `JWT_READ_SCOPE: "a\"b" is not one scope`},
		{"JWT_WRITE_SCOPE=\\", `JWT_WRITE_SCOPE: "\\" is not one scope`},
		{"JWT_WRITE_SCOPE=é", `JWT_WRITE_SCOPE: "é" is not one scope`},
		{"JWT_WRITE_SCOPE=" + strings.Repeat("a", 256), `JWT_WRITE_SCOPE: "` + strings.Repeat("a", 80) + `" is not one scope`},
		{"JWT_UNSCOPED=off", `JWT_UNSCOPED: "off" is not one of allow, deny`},

		{"CORS_ORIGINS=https://a.example/", `CORS_ORIGINS: "https://a.example/" has "https://a.example/"` + origin},
		{"CORS_ORIGINS=https://a.example,*", `CORS_ORIGINS: "https://a.example,*" has "*"` + origin},
		{"CORS_ORIGINS=https://a.example,", `CORS_ORIGINS: "https://a.example," has ""` + origin},
		{"CORS_ORIGINS=https://*.example", `CORS_ORIGINS: "https://*.example" has "https://*.example"` + origin},
		{"CORS_ORIGINS=null", `CORS_ORIGINS: "null" has "null"` + origin},
		{"CORS_ORIGINS=a.example", `CORS_ORIGINS: "a.example" has "a.example"` + origin},
		{"CORS_ORIGINS=//a.example", `CORS_ORIGINS: "//a.example" has "//a.example"` + origin},
		{"CORS_ORIGINS=https://", `CORS_ORIGINS: "https://" has "https://"` + origin},
		{"CORS_ORIGINS=https://me@a.example", `CORS_ORIGINS: "https://me@a.example" has "https://me@a.example"` + origin},
		{"CORS_ORIGINS=https://a.example?", `CORS_ORIGINS: "https://a.example?" has "https://a.example?"` + origin},
		{"CORS_ORIGINS=https://a.example#", `CORS_ORIGINS: "https://a.example#" has "https://a.example#"` + origin},
		{"CORS_ORIGINS=https://a.example:", `CORS_ORIGINS: "https://a.example:" has "https://a.example:"` + origin},
		{"CORS_ORIGINS=https://a.example:0", `CORS_ORIGINS: "https://a.example:0" has "https://a.example:0"` + origin},
		{"CORS_ORIGINS=https://a.example:08443", `CORS_ORIGINS: "https://a.example:08443" has "https://a.example:08443"` + origin},
		{"CORS_ORIGINS=https://a.example:65536", `CORS_ORIGINS: "https://a.example:65536" has "https://a.example:65536"` + origin},
		{"CORS_ORIGINS=https://::1", `CORS_ORIGINS: "https://::1" has "https://::1"` + origin},
		{"CORS_ORIGINS=https://bücher.example", `CORS_ORIGINS: "https://bücher.example" has "https://bücher.example"` + origin},

		{"LOG_LEVEL=loud", `LOG_LEVEL: "loud" is not one of debug, error, info, warn`},
		{"LOG_LEVEL=info+1", `LOG_LEVEL: "info+1" is not one of debug, error, info, warn`},
		{"LOG_FORMAT=xml", `LOG_FORMAT: "xml" is not one of json, text`},

		{"DB_MAX_CONNS=0", `DB_MAX_CONNS: "0" is not a whole number from 1 to 10000`},
		{"DB_MAX_CONNS=10001", `DB_MAX_CONNS: "10001" is not a whole number from 1 to 10000`},
		{"DB_MAX_CONNS=1.5", `DB_MAX_CONNS: "1.5" is not a whole number from 1 to 10000`},
		{"REQUEST_TIMEOUT=10", `REQUEST_TIMEOUT: "10"` + time},
		{"REQUEST_TIMEOUT=0.5", `REQUEST_TIMEOUT: "0.5"` + time},
		{"REQUEST_TIMEOUT=0s", `REQUEST_TIMEOUT: "0s"` + time},
		{"REQUEST_TIMEOUT=-1s", `REQUEST_TIMEOUT: "-1s"` + time},
		{"REQUEST_TIMEOUT=24h1ns", `REQUEST_TIMEOUT: "24h1ns"` + time},
		{"REQUEST_TIMEOUT=10 seconds", `REQUEST_TIMEOUT: "10 seconds"` + time},
		{"REQUEST_TIMEOUT=9999999999h", `REQUEST_TIMEOUT: "9999999999h"` + time},
		{"SHUTDOWN_TIMEOUT=20", `SHUTDOWN_TIMEOUT: "20"` + time},
		{"SHUTDOWN_TIMEOUT=0s", `SHUTDOWN_TIMEOUT: "0s"` + time},
		{"DRAIN_DELAY=0", `DRAIN_DELAY: "0" is not a time with its unit from 0s to 24h`},
		{"DRAIN_DELAY=-1s", `DRAIN_DELAY: "-1s" is not a time with its unit from 0s to 24h, such as "10s" or "1m30s"`},
		{"DRAIN_DELAY=25h", `DRAIN_DELAY: "25h" is not a time with its unit`},
		{"MAX_BODY_BYTES=0", `MAX_BODY_BYTES: "0" is not a whole number from 1 to 1073741824`},
		{"MAX_BODY_BYTES=1073741825", `MAX_BODY_BYTES: "1073741825" is not a whole number from 1 to 1073741824`},
		{"MAX_BODY_BYTES=1MB", `MAX_BODY_BYTES: "1MB" is not a whole number from 1 to 1073741824`},
		{"MAX_IN_FLIGHT=0", `MAX_IN_FLIGHT: "0" is not a whole number from 1 to 1000000`},
		{"MAX_IN_FLIGHT=1000001", `MAX_IN_FLIGHT: "1000001" is not a whole number from 1 to 1000000`},

		{"RATE_LIMIT=0", `RATE_LIMIT: "0" is not a whole number from 1 to 1000000`},
		{"RATE_LIMIT=1.5", `RATE_LIMIT: "1.5" is not a whole number from 1 to 1000000`},
		{"RATE_LIMIT=1000001", `RATE_LIMIT: "1000001" is not a whole number from 1 to 1000000`},

		{"TLS_CERT_FILE=" + cert, fmt.Sprintf(`TLS_CERT_FILE: %.80q and TLS_KEY_FILE "" are no pair: open : no such file`, cert)},
		{"TLS_KEY_FILE=" + certKey, fmt.Sprintf(`TLS_CERT_FILE: "" and TLS_KEY_FILE %.80q are no pair: open : no such file`, certKey)},
		{"TLS_CERT_FILE=" + missing + "\nTLS_KEY_FILE=" + certKey, fmt.Sprintf("TLS_CERT_FILE: %.80q and TLS_KEY_FILE ", missing)},
		{"TLS_CERT_FILE=" + otherCert + "\nTLS_KEY_FILE=" + certKey, fmt.Sprintf("TLS_CERT_FILE: %.80q and TLS_KEY_FILE ", otherCert)},
	} {
		t.Run(test.env, func(t *testing.T) {
			t.Parallel()
			c, err := loadConfig(getenvOf(strings.Split(test.env, "\n")...), false)
			if err == nil {
				t.Fatalf("got %v, want an error", c)
			}
			if got := err.Error(); !strings.HasPrefix(got, test.want) || strings.Contains(got, "\n") {
				t.Errorf("got  %s\nwant %s", got, test.want)
			}
			if strings.Contains(err.Error(), "hunter2") {
				t.Errorf("the error gives a secret away: %v", err)
			}
		})
	}
}

func TestConfigReportsAllMistakesAtOnce(t *testing.T) {
	t.Parallel()
	// Every variable is wrong, except for the two that take anything.
	env := make(map[string]string)
	var want []string
	for _, v := range new(config).variables() {
		if v.name == "JWT_ISSUER" || v.name == "JWT_AUDIENCE" {
			env[v.name] = "anything" // JWT_JWKS_URL asks for them
			continue
		}
		env[v.name] = "no such\nthing"
		if v.name != "TLS_KEY_FILE" { // the pair has one line
			want = append(want, v.name)
		}
	}
	_, err := loadConfig(func(name string) string { return env[name] }, false)
	if err == nil {
		t.Fatal("no error")
	}
	var got []string
	for line := range strings.SplitSeq(err.Error(), "\n") {
		name, _, _ := strings.Cut(line, ": ")
		got = append(got, name)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got a line for each of\n%q, want\n%q", got, want)
	}

	// With nothing set, what is required is asked for at once.
	_, err = loadConfig(func(string) string { return "" }, false)
	if err == nil || !strings.HasPrefix(err.Error(), "DATABASE_URL: ") || !strings.Contains(err.Error(), "\nAUTH: ") {
		t.Errorf("got %v", err)
	}
}

func TestConfigShowsNoSecret(t *testing.T) {
	t.Parallel()
	for _, databaseURL := range []string{soundURL, soundURL + "?sslinline=1&sslkey=hunter2", "host=db password=hunter2"} {
		c, err := loadConfig(getenvOf("DATABASE_URL="+databaseURL, "JWT_ISSUER=https://id.example"), false)
		if err != nil {
			t.Fatal(err)
		}
		var log strings.Builder
		slog.New(slog.NewJSONHandler(&log, nil)).Info("start", "config", c, "pointer", &c)
		slog.New(slog.NewTextHandler(&log, nil)).Info("start", "config", c, "pointer", &c)
		for line := range strings.Lines(log.String()) {
			if strings.Contains(line, "hunter2") || strings.Contains(line, fmt.Sprintf("%d", []byte("hunter2"))) {
				t.Errorf("a secret in %s", line)
			}
			if !strings.Contains(line, "https://id.example") {
				t.Errorf("what is no secret is missing in %s", line)
			}
		}
	}
}

// A name that only looks like one is refused when it is listened on.
func TestHostThatIsNone(t *testing.T) {
	t.Parallel()
	for _, host := range []string{"a..b", "-a"} {
		c, err := loadConfig(getenvOf("HOST="+host, "PORT=0"), false)
		if err != nil {
			t.Fatal(err)
		}
		_, err = manager{}.listen(c)
		if _, ok := errors.AsType[usageError](err); !ok {
			t.Errorf("HOST=%s: %v", host, err)
		}
	}
}

func TestVariablesHelp(t *testing.T) {
	t.Parallel()
	help := variablesHelp()
	for _, line := range strings.Split(strings.TrimSuffix(help, "\n"), "\n") {
		if len(line) > 100 {
			t.Errorf("too wide for a terminal: %s", line)
		}
	}
	// The names and defaults of the contract, so that the table can't lose one.
	for name, byDefault := range map[string]string{
		"DATABASE_URL": "-", "DATABASE_URL_FILE": "-", "HOST": "0.0.0.0", "PORT": "3000", "AUTH": "jwt", "JWT_SECRET": "-",
		"JWT_SECRET_FILE": "-", "JWT_PUBLIC_KEY_FILE": "-",
		"JWT_JWKS_URL": "-", "JWT_ISSUER": "-", "JWT_AUDIENCE": "-", "JWT_READ_SCOPE": "users:read", "JWT_WRITE_SCOPE": "users:write",
		"JWT_UNSCOPED": "-", "CORS_ORIGINS": "*", "LOG_LEVEL": "info",
		"LOG_FORMAT": "json", "DB_MAX_CONNS": "10", "REQUEST_TIMEOUT": "10s", "SHUTDOWN_TIMEOUT": "20s", "DRAIN_DELAY": "0s",
		"MAX_BODY_BYTES": "65536", "MAX_IN_FLIGHT": "1024", "RATE_LIMIT": "-", "ADMIN_ADDR": "-", "PAGE": "on", "TLS_CERT_FILE": "-", "TLS_KEY_FILE": "-",
	} {
		found := false
		for line := range strings.SplitSeq(help, "\n") {
			fields := strings.Fields(line)
			found = found || len(fields) > 2 && fields[0] == name && fields[1] == byDefault
		}
		if !found {
			t.Errorf("no line for %s with its default %s in\n%s", name, byDefault, help)
		}
	}
}

// certificateFiles returns the files of a certificate and its key.
func certificateFiles(t *testing.T) (certFile, keyFile string) {
	t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotAfter: time.Now().Add(time.Hour)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, public, private)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return pemFile(t, "CERTIFICATE", cert), pemFile(t, "PRIVATE KEY", der)
}

func publicKeyFile(t *testing.T) string {
	t.Helper()
	public, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	return pemFile(t, "PUBLIC KEY", der)
}

// secretFile returns the path of a file with this content.
func secretFile(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func pemFile(t *testing.T, kind string, der []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file.pem")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
