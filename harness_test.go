package main

import (
	"bytes"
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// What the tests stand on: one real PostgreSQL for all of them, a schema of
// its own for each, and the real program behind a real port.

// patience is how long a test waits for what has to happen.
const patience = time.Minute

func TestMain(m *testing.M) {
	if os.Getenv("ROLLCALL_TEST_MAIN") != "" { // a test runs this binary as the program
		if files, err := strconv.ParseUint(os.Getenv("ROLLCALL_TEST_FILES"), 10, 64); err == nil { // as ulimit -n does
			syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: files, Max: files})
		}
		main()
		return
	}
	dotenvFile = "" // that of whoever runs the tests is none of theirs
	flag.Parse()
	if parallel := flag.Lookup("test.parallel"); parallel.Value.String() == parallel.DefValue {
		parallel.Value.Set(strconv.Itoa(4 * runtime.GOMAXPROCS(0))) // most of them wait most of the time
	}
	os.Exit(runTests(m))
}

// postgres is the PostgreSQL of this test run, which the first to need it starts.
var postgres struct {
	once    sync.Once
	dir     string
	started *privatePostgres
	err     error
}

func testDatabase(t testing.TB) *privatePostgres {
	t.Helper()
	postgres.once.Do(inBackground(func() {
		if postgres.dir, postgres.err = os.MkdirTemp("", "rollcall-test-"); postgres.err == nil {
			postgres.err = copyCluster(postgres.dir)
		}
		if postgres.err == nil {
			// The data is thrown away, so it need not survive a crash of the machine.
			postgres.started, postgres.err = startPostgres(context.Background(), postgres.dir,
				"fsync=off", "synchronous_commit=off", "full_page_writes=off", "max_connections=400")
		}
	}))
	if postgres.err != nil {
		t.Fatal(postgres.err)
	}
	return postgres.started
}

// cluster is what initdb makes: once for all tests of which it is not the subject.
var cluster struct {
	once sync.Once
	privatePostgres
	err error
}

// copyCluster puts a cluster into dir, for a PostgreSQL that is started there.
func copyCluster(dir string) error {
	cluster.once.Do(inBackground(func() {
		if cluster.dir, cluster.err = os.MkdirTemp("", "rollcall-test-"); cluster.err != nil {
			return
		}
		for _, step := range []func(context.Context) error{
			cluster.lockFolder, cluster.choosePrograms, cluster.chooseAccount, cluster.initialize,
		} {
			if cluster.err = step(context.Background()); cluster.err != nil {
				break
			}
		}
		cluster.err = cmp.Or(cluster.err, cluster.stop())
	}))
	if cluster.err != nil {
		return cluster.err
	}
	out, err := exec.Command("cp", "-Rp", cluster.path("data"), dir).CombinedOutput() // root keeps its owner
	if err != nil {
		return fmt.Errorf("cp: %w: %s", err, out)
	}
	return nil
}

var schemas atomic.Int64

// newSchema makes an empty schema and returns a connection string that puts
// all tables there, with a pool for the test itself. Both go with the test.
func newSchema(t testing.TB) (databaseURL string, db *sql.DB) {
	t.Helper()
	checkLeaks(t)
	schema := fmt.Sprintf("test_%d", schemas.Add(1))
	databaseURL = testDatabase(t).url() + " search_path=" + schema
	db, err := sql.Open("postgres", databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	mustExec(t, db, "CREATE SCHEMA "+schema)
	t.Cleanup(func() {
		mustExec(t, db, "DROP SCHEMA "+schema+" CASCADE")
		db.Close()
	})
	return databaseURL, db
}

func mustExec(t testing.TB, db *sql.DB, text string, args ...any) {
	t.Helper()
	if _, err := db.Exec(text, args...); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
}

// begin begins a transaction with this statement, such as one that locks. It is
// rolled back with the end of the test, if it has not ended before.
func begin(t testing.TB, db *sql.DB, text string, args ...any) *sql.Tx {
	t.Helper()
	tx, err := db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tx.Rollback() })
	if _, err := tx.Exec(text, args...); err != nil {
		t.Fatal(err)
	}
	return tx
}

// connect returns the two ends of a connection, which is closed with the test.
func connect(t testing.TB) (client *net.TCPConn, server net.Conn) {
	t.Helper()
	listener, _ := newListener(t)
	conn, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if server, err = listener.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	return conn.(*net.TCPConn), server
}

// serveOn has h serve the clients that connect to listener as the service would, until
// t ends, and returns the URL. nil is a listener of its own.
func serveOn(t testing.TB, listener net.Listener, h http.Handler) string {
	t.Helper()
	checkLeaks(t)
	if listener == nil {
		listener, _ = newListener(t)
	}
	s := newServer(config{requestTimeout: patience, dbMaxConns: 10}, slog.New(slog.DiscardHandler))
	s.Handler = watchClient(h)
	startServer(t, s, listener)
	return "http://" + listener.Addr().String()
}

// startServer has s serve on listener until t ends.
func startServer(t testing.TB, s *server, listener net.Listener) {
	done := make(chan error, 1)
	go func() { done <- s.serve(context.Background(), watchedListener(listener)) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// underObserve returns h with the outermost layer around it: nothing else may be
// without. Its log is not kept.
func underObserve(h http.Handler) http.Handler {
	return observe(slog.New(slog.DiscardHandler), new(atomic.Bool), patience, h)
}

// readPosts returns h with [readBody] around it for POST alone.
func readPosts(max int64, h http.Handler) http.Handler {
	routes := http.NewServeMux()
	routes.Handle("/", h)
	routes.Handle("POST /", readBody(max, h))
	return routes
}

// A service is a running rollcall.
type service struct {
	t    testing.TB
	url  string // http://127.0.0.1:port
	db   *sql.DB
	log  *syncBuffer
	stop context.CancelFunc
	done chan error // what run returned
}

// testEnv is the least that a service needs, changed by env, "NAME=value" each.
func testEnv(databaseURL string, env ...string) map[string]string {
	vars := map[string]string{"DATABASE_URL": databaseURL, "HOST": "127.0.0.1", "PORT": "0", "AUTH": "off"}
	for _, v := range env {
		name, value, _ := strings.Cut(v, "=")
		vars[name] = value
	}
	return vars
}

// newService runs the program on a schema of its own until the test ends.
func newService(t testing.TB, env ...string) *service {
	t.Helper()
	databaseURL, db := newSchema(t)
	s := startService(t, testEnv(databaseURL, env...))
	s.db = db
	s.waitReady()
	return s
}

// startService runs the program with these variables until the test ends, and
// returns when it listens.
func startService(t testing.TB, env map[string]string) *service {
	t.Helper()
	checkLeaks(t)
	ctx, cancel := context.WithCancel(context.Background())
	s := &service{t: t, log: new(syncBuffer), stop: cancel, done: make(chan error, 1)}
	env = maps.Clone(env)
	go func() {
		s.done <- run(ctx, nil, func(name string) string { return env[name] }, io.Discard, s.log)
	}()
	t.Cleanup(func() {
		cancel()
		client.CloseIdleConnections() // else the service waits whether they bring a last request
		select {
		case <-s.done:
		case <-time.After(patience):
			t.Error("the service does not stop")
		}
		if t.Failed() {
			for line := range strings.Lines(s.log.String()) {
				if !strings.Contains(line, `"msg":"request"`) || strings.Contains(line, `"error":`) {
					t.Log(strings.TrimSpace(line))
				}
			}
		}
	})
	scheme := "http"
	if env["TLS_CERT_FILE"] != "" {
		scheme = "https"
	}
	address := s.waitLog("listening")["address"].(string)
	described.hosts.Store(address, true)
	t.Cleanup(func() { described.hosts.Delete(address) })
	s.url = scheme + "://" + address
	return s
}

// waitLog waits for a line of the log with this message and returns it.
func (s *service) waitLog(message string) map[string]any {
	s.t.Helper()
	var found map[string]any
	waitFor(s.t, "the log to say "+message, func() bool {
		for _, line := range s.logged() {
			if line["msg"] == message {
				found = line
				return true
			}
		}
		select {
		case err := <-s.done:
			s.done <- err
			s.t.Fatalf("the service ended before it logged %q: %v\n%s", message, err, s.log)
		default:
		}
		return false
	})
	return found
}

// logged returns the lines of the log so far.
func (s *service) logged() (lines []map[string]any) {
	for line := range strings.Lines(s.log.String()) {
		var fields map[string]any
		if json.Unmarshal([]byte(line), &fields) == nil {
			lines = append(lines, fields)
		}
	}
	return lines
}

func (s *service) waitReady() {
	s.t.Helper()
	s.waitLog("ready")
}

// An answer is what came back.
type answer struct {
	status int
	header http.Header
	body   string
}

// user returns the body as a user.
func (a answer) user(t testing.TB) (u map[string]string) {
	t.Helper()
	if err := json.Unmarshal([]byte(a.body), &u); err != nil || a.status != 200 {
		t.Fatalf("not a user: %d %s", a.status, a.body)
	}
	return u
}

// users returns the body as a list of users.
func (a answer) users(t testing.TB) (list []map[string]string) {
	t.Helper()
	if err := json.Unmarshal([]byte(a.body), &list); err != nil || a.status != 200 || list == nil {
		t.Fatalf("not a list: %d %s", a.status, a.body)
	}
	return list
}

// client keeps what the service sends as it is.
var client = &http.Client{
	Timeout: patience,
	Transport: describedTransport{&http.Transport{
		DisableCompression:  true,
		MaxIdleConnsPerHost: 300,
	}},
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
}

// call sends a request with further header fields, "Name: value" each. A body
// goes out as application/json if they don't say otherwise.
func (s *service) call(method, path, body string, fields ...string) answer {
	s.t.Helper()
	a, err := s.try(method, path, body, fields...)
	if err != nil {
		s.t.Fatal(err)
	}
	return a
}

// try is call for goroutines, and for when it may fail.
func (s *service) try(method, path, body string, fields ...string) (answer, error) {
	var reader io.Reader
	if body != "" {
		reader = strings.NewReader(body)
	}
	req, err := http.NewRequest(method, s.url+path, reader)
	if err != nil {
		return answer{}, err
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	replaced := make(map[string]bool)
	for _, field := range fields {
		name, value, _ := strings.Cut(field, ":")
		name = http.CanonicalHeaderKey(name)
		if !replaced[name] {
			req.Header.Del(name)
		}
		replaced[name] = true
		if value = strings.TrimSpace(value); value != "" {
			req.Header.Add(name, value)
		}
	}
	resp, err := client.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, resp.Header, string(content)}, err
}

// waitFor waits until a condition holds.
func waitFor(t testing.TB, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatalf("waited %v for %s", patience, what)
		}
		time.Sleep(2 * time.Millisecond) // between two looks at the condition
	}
}

// A syncBuffer is a bytes.Buffer for several goroutines.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
