package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// The program from outside: command line, exit codes, signals.

// A process is the program as a process of its own.
type process struct {
	t              testing.TB
	cmd            *exec.Cmd
	stdout, stderr *syncBuffer
	url            string
}

// startProcess runs the program in dir with these variables and no others.
func startProcess(t testing.TB, dir string, env map[string]string, args ...string) *process {
	t.Helper()
	p := newProcess(t, dir, env, args...)
	p.start()
	return p
}

// newProcess is startProcess without the start.
func newProcess(t testing.TB, dir string, env map[string]string, args ...string) *process {
	t.Helper()
	checkLeaks(t)
	p := &process{t: t, cmd: exec.Command(os.Args[0], args...), stdout: new(syncBuffer), stderr: new(syncBuffer)}
	p.cmd.Dir, p.cmd.Stdout, p.cmd.Stderr = dir, p.stdout, p.stderr
	p.cmd.Env = []string{"ROLLCALL_TEST_MAIN=1", "PATH=" + os.Getenv("PATH"), "GORACE=atexit_sleep_ms=0"}
	for name, value := range env {
		p.cmd.Env = append(p.cmd.Env, name+"="+value)
	}
	return p
}

// start starts the process, which ends with the test at the latest.
func (p *process) start() {
	p.t.Helper()
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() {
		if p.cmd.ProcessState == nil {
			p.cmd.Process.Kill()
			p.cmd.Wait()
		}
		if p.t.Failed() {
			p.t.Logf("stdout:\n%s\nstderr:\n%s", p.stdout, p.stderr)
		}
	})
}

// exit waits for the end and returns the exit code.
func (p *process) exit() int {
	p.t.Helper()
	ended := time.AfterFunc(patience, func() { p.cmd.Process.Kill() })
	defer ended.Stop()
	p.cmd.Wait()
	return p.cmd.ProcessState.ExitCode()
}

// waitReady waits for the log to say so, and takes the address from it.
func (p *process) waitReady() {
	p.t.Helper()
	address := regexp.MustCompile(`"msg":"listening","address":"([^"]*)"`)
	waitFor(p.t, "the program to be ready", func() bool { return strings.Contains(p.stderr.String(), `"msg":"ready"`) })
	p.url = "http://" + address.FindStringSubmatch(p.stderr.String())[1]
}

func TestExitCodes(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { taken.Close() }) // after the parallel subtests
	_, port, _ := net.SplitHostPort(taken.Addr().String())
	const secret = "0123456789abcdef0123456789abcdef"
	for _, test := range []struct {
		name   string
		args   string
		env    map[string]string
		code   int
		stdout string // regular expressions
		stderr string
	}{
		{"version", "version", nil, 0, `^rollcall \S+ go1\.`, `^$`},
		{"help", "-h", nil, 0, `(?s)rollcall -dev.*DATABASE_URL.*TLS_KEY_FILE`, `^$`},
		{"nothing configured", "", nil, 2, `^$`, `(?s)DATABASE_URL: not set.*AUTH: "jwt" needs a key`},
		{"two mistakes at once", "", map[string]string{"PORT": "x", "LOG_LEVEL": "loud"}, 2, `^$`, `(?s)PORT: "x".*LOG_LEVEL: "loud"`},
		{"unknown command", "serve", nil, 2, `^$`, `no command "serve"`},
		{"unknown flag", "-x", nil, 2, `^$`, `-x`},
		{"an argument too many", "version x", nil, 2, `^$`, `version takes no arguments`},
		{"-dev with a command", "-dev version", nil, 2, `^$`, `-dev goes with no command`},
		{"HOST of another machine", "", testEnv("dbname=x", "HOST=192.0.2.1"), 2, `^$`, `^rollcall: HOST: "192.0.2.1" is not [^\n]*cannot assign[^\n]*\n$`},
		{"HOST of an unknown interface", "", testEnv("dbname=x", "HOST=fe80::1%nosuch"), 2, `^$`, `^rollcall: HOST: "fe80::1%nosuch" is not [^\n]*\n$`},
		{"HOST that does not resolve", "", testEnv("dbname=x", "HOST="+strings.Repeat("a", 64)), 2, `^$`, `^rollcall: HOST: "a{64}" is not [^\n]*no such host\n$`},
		{"port taken", "", testEnv(testDatabase(t).url(), "PORT="+port), 1, `^$`, `address already in use`},
		{"token", "token -sub alice", map[string]string{"JWT_SECRET": secret}, 0, `^eyJ[\w-]+\.[\w-]+\.[\w-]+\n$`, `^$`},
		{"token without secret", "token -sub alice", nil, 2, `^$`, `neither JWT_SECRET nor JWT_SECRET_FILE is set`},
		{"token with a short secret", "token -sub alice", map[string]string{"JWT_SECRET": "tooshort"}, 2, `^$`, `JWT_SECRET: .*32`},
		{"token with a secret and its line break", "token -sub alice", map[string]string{"JWT_SECRET": secret + "\n"}, 2, `^$`, `^rollcall: JWT_SECRET: [^\n]*ends with a line break[^\n]*\n$`},
		{"a secret with its line break", "", map[string]string{"DATABASE_URL": "dbname=x", "JWT_SECRET": secret + "\r\n"}, 2, `^$`, `^rollcall: JWT_SECRET: [^\n]*ends with a line break[^\n]*\n$`},
		{"token for nobody", "token", map[string]string{"JWT_SECRET": secret}, 2, `^$`, `-sub is missing`},
		{"token with an empty scope", "token -sub a -scope=", map[string]string{"JWT_SECRET": secret}, 2, `^$`, `-scope is empty`},
		{"token that never lived", "token -sub a -ttl -1h", map[string]string{"JWT_SECRET": secret}, 2, `^$`, `-ttl must be`},
		{"token with a stray word", "token -sub a b", map[string]string{"JWT_SECRET": secret}, 2, `^$`, `"b" is no flag`},
		{"healthcheck of nothing", "healthcheck", testEnv("dbname=x", "PORT=1"), 1, `^$`, `refused`},
		{"healthcheck with nothing else configured", "healthcheck", map[string]string{"PORT": "1"}, 1, `^$`, `0.0.0.0:1: .*refused`},
		{"-dev with a mistake", "-dev", map[string]string{"PORT": "x"}, 2, `^$`, `^rollcall: PORT: "x"[^\n]*\n$`},
		{"healthcheck of any port", "healthcheck", testEnv("dbname=x"), 2, `^$`, `PORT=0`},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			p := startProcess(t, t.TempDir(), test.env, strings.Fields(test.args)...)
			if code := p.exit(); code != test.code {
				t.Errorf("exit code %d, want %d", code, test.code)
			}
			for _, out := range []struct{ got, want string }{{p.stdout.String(), test.stdout}, {p.stderr.String(), test.stderr}} {
				if !regexp.MustCompile(out.want).MatchString(out.got) {
					t.Errorf("got %q\nwant %s", out.got, out.want)
				}
			}
			if strings.Contains(p.stderr.String(), "tooshort") {
				t.Error("a secret was printed")
			}
		})
	}
}

func TestDotenvIsRead(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/.env", []byte("PORT=x\nLOG_LEVEL=loud\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	p := startProcess(t, dir, map[string]string{"LOG_LEVEL": "info"})
	if code := p.exit(); code != 2 || !strings.Contains(p.stderr.String(), `PORT: "x"`) || strings.Contains(p.stderr.String(), "loud") {
		t.Errorf("exit code %d: %s", code, p.stderr)
	}
}

// The secrets come from files, as containers and systemd have them. In the environment one
// form of a secret wins over the other in .env.
func TestSecretsInFiles(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	databaseURL, _ := newSchema(t)
	const secret = "0123456789abcdef0123456789abcdef"
	for name, content := range map[string]string{
		"url": databaseURL + "\n", "secret": secret + "\n",
		".env": "DATABASE_URL=host=nowhere.invalid\nJWT_SECRET_FILE=secret\nPORT=0\nHOST=127.0.0.1\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	p := startProcess(t, dir, map[string]string{"DATABASE_URL_FILE": "url"})
	p.waitReady()
	s := &service{t: t, url: p.url}
	token := startProcess(t, dir, nil, "token", "-sub", "alice")
	if code := token.exit(); code != 0 {
		t.Fatalf("token: exit code %d, %s", code, token.stderr)
	}
	if a := s.call("GET", usersPath, "", "Authorization: Bearer "+strings.TrimSpace(token.stdout.String())); a.status != 200 {
		t.Errorf("%d %s", a.status, a.body)
	}
	dev := startProcess(t, dir, map[string]string{"DATABASE_URL_FILE": "url"}, "-dev")
	dev.waitReady()
	if _, err := os.Stat(filepath.Join(dir, devDir)); err == nil {
		t.Error("-dev has made a database or a secret of its own")
	}
	both := startProcess(t, dir, map[string]string{"JWT_SECRET": secret, "JWT_SECRET_FILE": "secret"}, "token", "-sub", "alice")
	if code := both.exit(); code != 2 || !strings.Contains(both.stderr.String(), `JWT_SECRET_FILE: "secret" is set beside JWT_SECRET`) {
		t.Errorf("both: exit code %d, %s", code, both.stderr)
	}
	other := startProcess(t, dir, map[string]string{"JWT_SECRET": "another" + secret}, "token", "-sub", "alice")
	if code := other.exit(); code != 0 {
		t.Fatalf("token with a secret in the environment: exit code %d, %s", code, other.stderr)
	}
	if a := s.call("GET", usersPath, "", "Authorization: Bearer "+strings.TrimSpace(other.stdout.String())); a.status != 401 {
		t.Errorf("signed with another secret: %d %s", a.status, a.body)
	}
}

// A broken .env is an error for serving and token alone.
func TestBrokenDotenv(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/.env", []byte("\nPORT\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for args, want := range map[string]struct {
		code   int
		stderr string // a regular expression
	}{
		"":                {2, `^rollcall: \.env: line 2: expected NAME=value`},
		"-dev":            {2, `^rollcall: \.env: line 2: expected NAME=value`},
		"token -sub a":    {2, `^rollcall: \.env: line 2: expected NAME=value`},
		"-h":              {0, `^$`},
		"version":         {0, `^$`},
		"token -h":        {0, `^$`},
		"token":           {2, `-sub is missing`},
		"-x":              {2, `-x`},
		"serve":           {2, `no command "serve"`},
		"healthcheck":     {1, `0.0.0.0:1: .*refused`},
		"healthcheck two": {2, `healthcheck takes no arguments`},
	} {
		t.Run(args, func(t *testing.T) {
			t.Parallel()
			p := startProcess(t, dir, map[string]string{"PORT": "1"}, strings.Fields(args)...)
			if code := p.exit(); code != want.code || !regexp.MustCompile(want.stderr).MatchString(p.stderr.String()) {
				t.Errorf("exit code %d, %q, want %d, %s", code, p.stderr, want.code, want.stderr)
			}
		})
	}
}

// Other programs share the file: it starts, with a warning that says where.
func TestDotenvIsShared(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	databaseURL, _ := newSchema(t)
	const secret = "0123456789abcdef0123456789abcdef"
	file := "export FOO\nspring.profiles-active=dev\nPATTERN=\"^\\d+\\/$\"\nTWICE=1\nTWICE=2\nPORT=0\nJWT_SECRET=" + secret + "\n" +
		`DATABASE_URL="` + databaseURL + "\"\n"
	if err := os.WriteFile(dir+"/.env", []byte(file), 0o600); err != nil {
		t.Fatal(err)
	}
	p := startProcess(t, dir, nil)
	p.waitReady()
	for _, want := range []string{`"level":"WARN"`, `"file":".env"`, "line 1: ", "line 2: ", "line 5: "} {
		if first, _, _ := strings.Cut(p.stderr.String(), "\n"); !strings.Contains(first, want) {
			t.Errorf("no %s in %s", want, first)
		}
	}
	p = startProcess(t, dir, nil, "token", "-sub", "a")
	if code := p.exit(); code != 0 || !strings.Contains(p.stderr.String(), "line 1: ") {
		t.Errorf("token: exit code %d, %s", code, p.stderr)
	}
}

// A signal in the middle of a request: it finishes, nobody new gets in, exit 0.
func TestStopWithRequestInFlight(t *testing.T) {
	t.Parallel()
	for _, sig := range []os.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			p, unlock, answered := processWithRequest(t)
			p.cmd.Process.Signal(sig)
			waitFor(t, "the listener to close", func() bool {
				c, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
				if err == nil {
					c.Close()
				}
				return err != nil
			})
			if sig == syscall.SIGHUP { // an interactive bash passes on what the kernel has sent already
				p.cmd.Process.Signal(sig)
			}
			unlock()
			if a := <-answered; a.err != nil || a.status != 200 || !strings.Contains(a.body, `"name":"changed"`) {
				t.Errorf("the request in flight: %+v", a)
			}
			if code := p.exit(); code != 0 {
				t.Errorf("exit code %d", code)
			}
			if !strings.Contains(p.stderr.String(), `"msg":"stopped"`) {
				t.Error("the log does not end with stopped")
			}
		})
	}
}

// nohup has the program outlive its terminal.
func TestIgnoredHangUp(t *testing.T) {
	t.Parallel()
	p := newProcess(t, t.TempDir(), testEnv("dbname=x"))
	p.cmd.Args = append([]string{"nohup", p.cmd.Path}, p.cmd.Args[1:]...)
	nohup, err := exec.LookPath("nohup")
	if err != nil {
		t.Fatal(err)
	}
	p.cmd.Path = nohup
	p.start()
	waitFor(t, "the program to listen", func() bool { return strings.Contains(p.stderr.String(), `"msg":"listening"`) })
	p.cmd.Process.Signal(syscall.SIGHUP)
	p.cmd.Process.Signal(syscall.SIGTERM)
	if code := p.exit(); code != 0 || !strings.Contains(p.stderr.String(), "signal: terminated") {
		t.Errorf("exit code %d: %s", code, p.stderr)
	}
}

func TestStopRunsOutOfTime(t *testing.T) {
	t.Parallel()
	p, _, answered := processWithRequest(t, "SHUTDOWN_TIMEOUT=100ms")
	p.cmd.Process.Signal(syscall.SIGTERM)
	if code := p.exit(); code != 1 || !strings.Contains(p.stderr.String(), "SHUTDOWN_TIMEOUT") {
		t.Errorf("exit code %d", code)
	}
	if a := <-answered; a.err == nil {
		t.Errorf("the request was answered with %d", a.status)
	}
}

func TestSecondSignal(t *testing.T) {
	t.Parallel()
	p, _, answered := processWithRequest(t, "SHUTDOWN_TIMEOUT=1h", "REQUEST_TIMEOUT=1h")
	p.cmd.Process.Signal(syscall.SIGTERM)
	waitFor(t, "the stop to begin", func() bool { return strings.Contains(p.stderr.String(), `"msg":"stopping"`) })
	p.cmd.Process.Signal(syscall.SIGTERM)
	if code := p.exit(); code != 1 {
		t.Errorf("exit code %d", code)
	}
	<-answered
}

type answerOrError struct {
	answer
	err error
}

// processWithRequest starts the program and a PUT that waits for a lock in the
// database until unlock is called.
func processWithRequest(t *testing.T, env ...string) (p *process, unlock func(), answered chan answerOrError) {
	t.Helper()
	databaseURL, db := newSchema(t)
	p = startProcess(t, t.TempDir(), testEnv(databaseURL, env...))
	p.waitReady()
	s := &service{t: t, url: p.url}
	path := createUser(s, "a@example.com").header.Get("Location")
	tx, err := db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tx.Rollback() })
	if _, err := tx.Exec("SELECT FROM users FOR UPDATE"); err != nil {
		t.Fatal(err)
	}
	answered = make(chan answerOrError, 1)
	go func() {
		a, err := s.try("PUT", path, `{"name":"changed"}`)
		answered <- answerOrError{a, err}
	}()
	waitFor(t, "the request to wait for the lock", func() bool {
		var waiting bool
		err := db.QueryRow(`SELECT EXISTS (SELECT FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE NOT l.granted AND $1::text IN
			(SELECT nspname FROM pg_namespace n JOIN pg_class c ON c.relnamespace = n.oid JOIN pg_locks h ON h.relation = c.oid WHERE h.pid = l.pid))`,
			schemaOf(t, databaseURL)).Scan(&waiting)
		if err != nil {
			t.Fatal(err)
		}
		return waiting
	})
	return p, func() { tx.Rollback() }, answered
}

func schemaOf(t *testing.T, databaseURL string) string {
	_, schema, ok := strings.Cut(databaseURL, "search_path=")
	if !ok {
		t.Fatal("no search_path")
	}
	return schema
}

func TestHealthcheck(t *testing.T) {
	t.Parallel()
	s := newService(t)
	_, port, _ := net.SplitHostPort(strings.TrimPrefix(s.url, "http://"))
	for _, host := range []string{"127.0.0.1", "0.0.0.0", "localhost"} {
		env := testEnv("dbname=x", "HOST="+host, "PORT="+port)
		if err := run(t.Context(), []string{"healthcheck"}, func(name string) string { return env[name] }, io.Discard, io.Discard); err != nil {
			t.Errorf("HOST=%s: %v", host, err)
		}
	}
	var draining atomic.Bool
	draining.Store(true)
	h := newHealth(nil, nil, &draining)
	if err := h.check(t.Context()); err == nil || asAPIError(err).kind != kindUnavailable || err.Error() != "The service is stopping" {
		t.Errorf("readiness while draining: %v", err)
	}
}

func TestTLSService(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	certFile, keyFile := writeCertificate(t, dir, "rollcall.test")
	databaseURL, _ := newSchema(t)
	s := startService(t, testEnv(databaseURL, "TLS_CERT_FILE="+certFile, "TLS_KEY_FILE="+keyFile))
	s.waitLog("ready")
	_, port, _ := net.SplitHostPort(strings.TrimPrefix(s.url, "https://"))
	env := testEnv("dbname=x", "PORT="+port, "TLS_CERT_FILE="+certFile, "TLS_KEY_FILE="+keyFile)
	if err := run(t.Context(), []string{"healthcheck"}, func(name string) string { return env[name] }, io.Discard, io.Discard); err != nil {
		t.Errorf("healthcheck: %v", err)
	}
	if resp, err := http.Get("http://127.0.0.1:" + port + "/health"); err == nil {
		resp.Body.Close()
		if resp.StatusCode == 200 {
			t.Error("a service with TLS answers without")
		}
	}
}

// writeCertificate makes a certificate for a host, and returns its two files in dir.
func writeCertificate(t *testing.T, dir, host string) (certFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{host},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for name, block := range map[string]*pem.Block{
		certFile: {Type: "CERTIFICATE", Bytes: cert},
		keyFile:  {Type: "PRIVATE KEY", Bytes: pkcs8},
	} {
		if err := os.WriteFile(name, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return certFile, keyFile
}

// -dev from an empty folder: the printed lines work, Ctrl-C leaves nothing
// behind, and the users and the token outlive the restart.
func TestDev(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var token string
	for round := range 2 {
		p := startProcess(t, dir, map[string]string{"PORT": "0"}, "-dev")
		p.waitReady()
		waitFor(t, "the greeting", func() bool { return strings.Contains(p.stdout.String(), "Ctrl-C") })
		line := regexp.MustCompile(`(?m)^curl -H 'Authorization: Bearer (\S+)' -H 'Content-Type: application/json' -d '(.*)' (\S+)$`).
			FindStringSubmatch(p.stdout.String())
		if line == nil {
			t.Fatalf("no line to paste in:\n%s", p.stdout)
		}
		s := &service{t: t, url: p.url}
		if line[3] != p.url+usersPath || !strings.HasPrefix(p.url, "http://127.0.0.1:") {
			t.Errorf("the line goes to %s, the service is at %s", line[3], p.url)
		}
		if a := s.call("GET", usersPath, ""); a.status != 401 {
			t.Errorf("without a token: %d", a.status)
		}
		if round == 0 {
			token = line[1]
			s.call("POST", usersPath, line[2], "Authorization: Bearer "+token).user(t)
		} else if list := s.call("GET", usersPath, "", "Authorization: Bearer "+token).users(t); len(list) != 1 {
			t.Errorf("after a restart: %v", list)
		}
		p.cmd.Process.Signal(os.Interrupt)
		if code := p.exit(); code != 0 {
			t.Errorf("exit code %d", code)
		}
		if _, err := os.Stat(dir + "/.dev/data/postmaster.pid"); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("PostgreSQL was not stopped: %v", err)
		}
	}
}

// libpqVariables are those of PostgreSQL's manual, section 34.15, of its server and of
// lib/pq, each with a value that would do harm.
var libpqVariables = map[string]string{
	"PGHOST": "127.0.0.9", "PGHOSTADDR": "127.0.0.9", "PGPORT": "1", "PGDATABASE": "other", "PGUSER": "other", "PGPASSWORD": "other",
	"PGPASSFILE": "/dev/null", "PGSERVICE": "missing", "PGSERVICEFILE": "/dev/null", "PGSYSCONFDIR": "/", "PGLOCALEDIR": "/",
	"PGOPTIONS": "-c default_transaction_read_only=on", "PGAPPNAME": "other", "PGCONNECT_TIMEOUT": "soon", "PGCLIENTENCODING": "LATIN1",
	"PGDATESTYLE": "German", "PGTZ": "nowhere", "PGGEQO": "maybe", "PGTARGETSESSIONATTRS": "standby", "PGLOADBALANCEHOSTS": "maybe",
	"PGREQUIREAUTH": "none", "PGCHANNELBINDING": "require", "PGREQUIREPEER": "other", "PGREQUIRESSL": "1", "PGSSLMODE": "verify-full",
	"PGSSLNEGOTIATION": "direct", "PGSSLCOMPRESSION": "1", "PGSSLCERT": "/dev/null", "PGSSLKEY": "/dev/null", "PGSSLCERTMODE": "require",
	"PGSSLROOTCERT": "system", "PGSSLCRL": "/dev/null", "PGSSLCRLDIR": "/dev/null", "PGSSLSNI": "maybe", "PGSSLKEYLOGFILE": "/dev/null",
	"PGSSLMINPROTOCOLVERSION": "TLSv9", "PGSSLMAXPROTOCOLVERSION": "TLSv0", "SSLPGMINPROTOCOLVERSION": "TLSv9", "SSLPGMAXPROTOCOLVERSION": "TLSv0",
	"PGMINPROTOCOLVERSION": "9.9", "PGMAXPROTOCOLVERSION": "0.0", "PGGSSENCMODE": "require", "PGGSSLIB": "sspi", "PGGSSDELEGATION": "1",
	"PGKRBSRVNAME": "other", "PGREALM": "other", "PGDATA": "/dev/null",
}

// No variable of libpq has a say in the private PostgreSQL.
func TestDevWithoutLibpq(t *testing.T) {
	t.Parallel()
	env := map[string]string{"PORT": "0", "AUTH": "off"}
	maps.Copy(env, libpqVariables)
	p := startProcess(t, t.TempDir(), env, "-dev")
	p.waitReady()
	createUser(&service{t: t, url: p.url}, "a@example.com")
	p.cmd.Process.Signal(os.Interrupt)
	if code := p.exit(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// What the environment sets wins over what -dev would make.
func TestDevWithDatabase(t *testing.T) {
	t.Parallel()
	databaseURL, _ := newSchema(t)
	dir := t.TempDir()
	p := startProcess(t, dir, map[string]string{"PORT": "0", "DATABASE_URL": databaseURL, "AUTH": "off"}, "-dev")
	p.waitReady()
	createUser(&service{t: t, url: p.url}, "a@example.com")
	if _, err := os.Stat(dir + "/.dev/data"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a private PostgreSQL was made all the same: %v", err)
	}
	waitFor(t, "the greeting", func() bool { return strings.Contains(p.stdout.String(), "Ctrl-C") })
	if strings.Contains(p.stdout.String(), "Bearer") {
		t.Errorf("a token with AUTH=off:\n%s", p.stdout)
	}
}

// A start that is interrupted while it waits for PostgreSQL stops cleanly.
func TestStopWhileStarting(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	log := new(syncBuffer)
	env := testEnv(fmt.Sprintf("host=%s dbname=x user=x", t.TempDir()))
	done := make(chan error, 1)
	go func() {
		done <- run(ctx, nil, func(name string) string { return env[name] }, io.Discard, log)
	}()
	waitFor(t, "the service to wait", func() bool { return strings.Contains(log.String(), "waiting for PostgreSQL") })
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("run returned %v", err)
		}
	case <-time.After(patience):
		t.Error("run does not return")
	}
}
