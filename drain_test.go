package main

import (
	"bufio"
	"crypto/tls"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// The program is replaced under load, 3 times over, or 20 with ROLLCALL_CHAOS: no
// request fails. The test is the service manager: it holds the listening socket,
// and hears from each process when it is ready.
func TestChaosReplace(t *testing.T) {
	restarts, delay := chaosRounds(t, 20, 3), "500ms" // that of the unit: a machine that stood still for lastCall fails nobody
	if os.Getenv("ROLLCALL_CHAOS") != "" {
		delay = "0s" // the hardest
	}
	for _, mode := range []struct {
		name    string
		overlap bool // the next process is ready before the one before is stopped
	}{{"one after the other", false}, {"overlapping", true}} {
		t.Run(mode.name, func(t *testing.T) {
			databaseURL, db := newSchema(t)
			listener, socket := newListener(t)
			start := func() *process {
				p, heard := newManagedProcess(t, socket, testEnv(databaseURL, "DRAIN_DELAY="+delay))
				p.start()
				heard.wait("READY=1")
				return p
			}
			p := start()
			crowd := startCrowd(t, listener.Addr().String())
			for range restarts {
				crowd.wait(200)
				before := p
				if mode.overlap {
					p = start()
					before.stop()
				} else {
					before.stop()
					p = start()
				}
			}
			crowd.end()
			crowd.outcome(db, restarts).want(t, "the program replaced, "+mode.name)
			p.stop()
		})
	}
}

// stop asks the process to stop, and waits until it has, without a failure.
func (p *process) stop() {
	p.t.Helper()
	p.cmd.Process.Signal(syscall.SIGTERM)
	if code := p.exit(); code != 0 {
		p.t.Errorf("exit code %d", code)
	}
}

// Two replicas behind HAProxy are replaced in turns under load, each at its old
// address, where nobody listens meanwhile: no request fails. HAProxy is told by
// readiness alone, as README.md has it.
func TestChaosReplicas(t *testing.T) {
	findProxy(t, "haproxy")
	replacements := chaosRounds(t, 10, 2)
	databaseURL, db := newSchema(t)
	address, ports := startBalancer(t)
	var replicas [2]*process
	start := func(i int) {
		replicas[i] = startProcess(t, t.TempDir(), testEnv(databaseURL, "DRAIN_DELAY=5s", "PORT="+ports[i]))
		replicas[i].waitReady()
	}
	start(0)
	start(1)
	served := func(i int) { // since its start
		waitFor(t, "HAProxy to send requests", func() bool {
			return strings.Contains(replicas[i].stderr.String(), `"path":"`+usersPath)
		})
	}
	crowd := startCrowd(t, address)
	served(0)
	served(1)
	for i := range replacements {
		crowd.wait(200)
		replicas[i%2].stop()
		crowd.wait(200) // by the other one alone
		start(i % 2)
		served(i % 2)
	}
	crowd.end()
	crowd.outcome(db, replacements).want(t, "one of two replicas behind HAProxy replaced")
	var stops sync.WaitGroup // side by side, as each takes its DRAIN_DELAY
	for _, p := range replicas {
		stops.Go(p.stop)
	}
	stops.Wait()
}

// startBalancer starts HAProxy in front of two replicas on 127.0.0.1, and returns
// its address and the ports that it expects them at.
func startBalancer(t *testing.T) (address string, ports [2]string) {
	t.Helper()
	port := freePort(t)
	ports = [2]string{freePort(t), freePort(t)}
	address = "127.0.0.1:" + port
	startProxy(t, newNode(t, ""), port, findProxy(t, "haproxy"), readmeBlock(t, "# haproxy.cfg, in front of rollcall",
		"127.0.0.1:8080", address, "10.0.0.11:3000", "127.0.0.1:"+ports[0], "10.0.0.12:3000", "127.0.0.1:"+ports[1]), "-db", "-f")
	return address, ports
}

// newListener returns a listening socket and the file to pass it on.
func newListener(t testing.TB) (net.Listener, *os.File) {
	t.Helper()
	checkLeaks(t)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	socket, err := listener.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { socket.Close() })
	return listener, socket
}

// A crowd is clients of three kinds that create and list users until its end: some
// keep their connection and never repeat a request, some are net/http's, which
// repeats a GET, but no POST, whose connection it finds dead, and some connect
// anew for each request.
type crowd struct {
	t       testing.TB
	address string
	done    chan struct{}
	clients sync.WaitGroup
	next    atomic.Int64 // the number in the next address

	answered, failed atomic.Int64 // requests: with 200, and the others
	worst            atomic.Int64 // the longest wait for an answer, in nanoseconds

	mu           sync.Mutex
	acknowledged map[string]bool // the addresses of users whose create was answered
	failures     []string        // the first few
}

func startCrowd(t testing.TB, address string) *crowd {
	t.Helper()
	l := &crowd{t: t, address: address, done: make(chan struct{}), acknowledged: make(map[string]bool)}
	for range 5 {
		transport := &http.Transport{}
		t.Cleanup(transport.CloseIdleConnections)
		for _, client := range []func() error{
			(&rawClient{address: address}).newTurn(l, false),
			(&rawClient{address: address}).newTurn(l, true),
			l.netHTTPTurn(&http.Client{Transport: transport, Timeout: patience}),
		} {
			l.clients.Go(func() {
				for {
					select {
					case <-l.done:
						return
					default:
					}
					if err := client(); err != nil {
						l.failed.Add(1)
						l.mu.Lock()
						if len(l.failures) < 5 {
							l.failures = append(l.failures, err.Error())
						}
						l.mu.Unlock()
					}
				}
			})
		}
	}
	return l
}

// end stops the clients; each request that has begun is answered first.
func (l *crowd) end() {
	close(l.done)
	l.clients.Wait()
}

// wait waits until n more requests have been answered.
func (l *crowd) wait(n int64) {
	l.t.Helper()
	enough := l.answered.Load() + n
	waitFor(l.t, fmt.Sprintf("%d more answers", n), func() bool { return l.answered.Load() >= enough })
}

// outcome compares the table in db, after the end, with what the clients were
// told: an acknowledged address that it does not have is lost, a row that nobody
// was told of is doubled (or made by a request that counts as failed already).
func (l *crowd) outcome(db *sql.DB, faults int) outcome {
	l.t.Helper()
	o := outcome{
		faults:   faults,
		requests: int(l.answered.Load() + l.failed.Load()),
		failed:   int(l.failed.Load()),
		worst:    time.Duration(l.worst.Load()),
		details:  l.failures,
	}
	o.compare(l.t, db, l.acknowledged, nil)
	return o
}

// A row in place of another is seen, though their number is right.
func TestCrowd(t *testing.T) {
	t.Parallel()
	s := newService(t)
	l := startCrowd(t, strings.TrimPrefix(s.url, "http://"))
	l.wait(200)
	l.end()
	if o := l.outcome(s.db, 1); o.requests < 200 || o.failed+o.lost+o.doubled > 0 {
		t.Errorf("untouched: %+v", o)
	}
	mustExec(t, s.db, "UPDATE users SET email = 'twin@example.com' WHERE id = (SELECT id FROM users LIMIT 1)")
	if o := l.outcome(s.db, 1); o.lost != 1 || o.doubled != 1 {
		t.Errorf("want 1 lost and 1 doubled: %+v", o)
	}
}

// request returns what to ask next: three reads to a write.
func (l *crowd) request() (method, path, body string) {
	if rand.N(4) > 0 {
		return "GET", usersPath + "?limit=2", ""
	}
	return "POST", usersPath, fmt.Sprintf(`{"email":"u%d@example.com","name":"U"}`, l.next.Add(1))
}

// answer counts an answer to a request with that body.
func (l *crowd) answer(method, body string, resp *http.Response, begun time.Time) error {
	content, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil || resp.StatusCode != 200 {
		return fmt.Errorf("%s: %d %s, %v", method, resp.StatusCode, content, err)
	}
	if method == "POST" {
		var asked, made user
		if err := errors.Join(json.Unmarshal([]byte(body), &asked), json.Unmarshal(content, &made)); err != nil || made.Email != asked.Email {
			return fmt.Errorf("POST of %s: %s, %v", body, content, err)
		}
		l.mu.Lock()
		l.acknowledged[made.Email] = true
		l.mu.Unlock()
	}
	l.answered.Add(1)
	raise(&l.worst, int64(time.Since(begun)))
	return nil
}

// netHTTPTurn returns what makes a request with a client of net/http.
func (l *crowd) netHTTPTurn(client *http.Client) func() error {
	return func() error {
		method, path, body := l.request()
		req, err := http.NewRequest(method, "http://"+l.address+path, strings.NewReader(body))
		if err != nil {
			return err
		}
		if body == "" {
			req.Body = http.NoBody
		}
		req.Header.Set("Content-Type", "application/json")
		begun := time.Now()
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		return l.answer(method, body, resp, begun)
	}
}

// A rawClient sends each request once.
type rawClient struct {
	address string
	conn    net.Conn // nil: connect anew
	r       *bufio.Reader
}

// newTurn returns what makes a request; the connection is used again unless anew.
func (c *rawClient) newTurn(l *crowd, anew bool) func() error {
	return func() error {
		method, path, body := l.request()
		begun := time.Now()
		resp, err := c.do(method, path, body, rand.N(5*time.Millisecond))
		if err == nil {
			err = l.answer(method, body, resp, begun)
		}
		if c.conn != nil && (err != nil || resp.Close || anew) {
			c.conn.Close()
			c.conn = nil
		}
		return err
	}
}

// do waits, then makes a request. A connection that the server closes meanwhile is
// replaced, as every client does that keeps connections.
func (c *rawClient) do(method, path, body string, wait time.Duration) (resp *http.Response, err error) {
	if c.conn != nil {
		c.conn.SetReadDeadline(time.Now().Add(wait))
		if _, err := c.r.Peek(1); err == nil {
			return nil, fmt.Errorf("%s: an answer before the request", method)
		} else if err == io.EOF {
			c.conn.Close()
			c.conn = nil
		}
	}
	if c.conn == nil {
		if c.conn, err = net.Dial("tcp", c.address); err != nil {
			return nil, err
		}
		c.r = bufio.NewReader(c.conn)
	}
	c.conn.SetDeadline(time.Now().Add(patience))
	if _, err := fmt.Fprintf(c.conn, "%s %s HTTP/1.1\r\nHost: rollcall\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
		method, path, len(body), body); err != nil {
		return nil, fmt.Errorf("%s: %w", method, err)
	}
	if resp, err = http.ReadResponse(c.r, &http.Request{Method: method}); err != nil {
		return nil, fmt.Errorf("%s: %w", method, err)
	}
	return resp, nil
}

// During DRAIN_DELAY, load balancers are told to send no more, by an answer on a
// connection that they make for it, and whatever they still send is served.
func TestDrainDelay(t *testing.T) {
	t.Parallel()
	databaseURL, _ := newSchema(t)
	p := startProcess(t, t.TempDir(), testEnv(databaseURL, "DRAIN_DELAY=1h"))
	p.waitReady()
	address := strings.TrimPrefix(p.url, "http://")
	ask := func(c *rawClient, method, path, body string) (status int, last bool) {
		t.Helper()
		resp, err := c.do(method, path, body, time.Millisecond)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		io.Copy(io.Discard, resp.Body)
		return resp.StatusCode, resp.Close
	}
	idle := &rawClient{address: address}
	if status, last := ask(idle, "GET", usersPath, ""); status != 200 || last {
		t.Fatalf("before the signal: %d, last: %t", status, last)
	}
	p.cmd.Process.Signal(syscall.SIGTERM)
	waitFor(t, "readiness to say no", func() bool {
		status, _ := ask(&rawClient{address: address}, "GET", "/health/ready", "")
		return status == 503
	})
	for _, c := range []struct {
		name string
		*rawClient
	}{{"a new connection", &rawClient{address: address}}, {"a connection from before", idle}} {
		conn := c.conn
		if status, last := ask(c.rawClient, "POST", usersPath, fmt.Sprintf(`{"email":"%p@example.com","name":"U"}`, c.rawClient)); status != 200 || !last {
			t.Errorf("on %s: %d, last: %t", c.name, status, last)
		}
		if conn != nil && conn != c.conn {
			t.Errorf("%s had been closed", c.name)
		}
	}
	if status, _ := ask(&rawClient{address: address}, "GET", "/health", ""); status != 200 {
		t.Errorf("liveness: %d", status)
	}
	p.cmd.Process.Signal(syscall.SIGTERM)
	if code := p.exit(); code != 1 {
		t.Errorf("exit code %d after a second signal", code)
	}
}

func TestDrainDelayEnds(t *testing.T) {
	t.Parallel()
	databaseURL, _ := newSchema(t)
	p := startProcess(t, t.TempDir(), testEnv(databaseURL, "DRAIN_DELAY=300ms"))
	p.waitReady()
	begun := time.Now()
	p.cmd.Process.Signal(syscall.SIGTERM)
	if code := p.exit(); code != 0 || time.Since(begun) < 300*time.Millisecond {
		t.Errorf("exit code %d after %v", code, time.Since(begun))
	}
}

// The stop begins while a request is being served: its answer, too, says that it
// is the last one of the connection, however it comes about.
func TestLastAnswerOfConnection(t *testing.T) {
	t.Parallel()
	for name, handler := range map[string]http.HandlerFunc{
		"a body":     func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "OK") },
		"a status":   func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusNoContent) },
		"both":       func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(404); io.WriteString(w, "no") },
		"a panic":    func(w http.ResponseWriter, r *http.Request) { panic("oh") },
		"compressed": compress(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.Write(make([]byte, 4096)) })).ServeHTTP,
	} {
		t.Run(name, func(t *testing.T) {
			checkLeaks(t)
			var draining atomic.Bool
			log := slog.New(slog.DiscardHandler)
			server := httptest.NewServer(observe(log, &draining, patience, recoverPanics(log, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				draining.Store(r.URL.Path == "/stop")
				handler(w, r)
			}))))
			defer server.Close()
			c := &rawClient{address: server.Listener.Addr().String()}
			for _, path := range []string{"/", "/stop"} {
				resp, err := c.do("GET", path, "", 0)
				if err != nil {
					t.Fatal(err)
				}
				io.Copy(io.Discard, resp.Body)
				if resp.Close != (path == "/stop") {
					t.Errorf("%s: the last answer: %t", path, resp.Close)
				}
			}
			c.conn.Close()
		})
	}
}

// The server gives up waiting on idle connections, but on none whose request is
// there, be it in the kernel or half read.
func TestExpireIdle(t *testing.T) {
	t.Parallel()
	t.Run("plain", func(t *testing.T) { testExpireIdle(t, false) })
	t.Run("TLS", func(t *testing.T) { testExpireIdle(t, true) })
}

func testExpireIdle(t *testing.T, secure bool) {
	checkLeaks(t)
	log := slog.New(slog.DiscardHandler)
	s := newServer(config{requestTimeout: patience, dbMaxConns: 1}, log)
	entered, goOn := make(chan struct{}, 1), make(chan struct{})
	s.Handler = watchClient(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == "POST" {
			entered <- struct{}{}
			<-goOn
			if _, err := io.ReadAll(r.Body); err != nil {
				w.WriteHeader(500)
			}
		}
	}))
	dial := net.Dial
	if secure {
		certFile, keyFile := writeCertificate(t, t.TempDir(), "rollcall.test")
		var err error
		if s.TLSConfig, err = newTLSConfig(config{tlsCertFile: certFile, tlsKeyFile: keyFile}, log); err != nil {
			t.Fatal(err)
		}
		dial = func(network, address string) (net.Conn, error) {
			return tls.Dial(network, address, &tls.Config{InsecureSkipVerify: true})
		}
	}
	listener, _ := newListener(t)
	startServer(t, s, listener)
	the := func(state http.ConnState) (c *serverConn) {
		waitFor(t, "the connection to be "+state.String(), func() bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			for _, c = range s.conns {
			}
			return len(s.conns) == 1 && c.state == state
		})
		return c
	}

	client, err := dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	client.SetDeadline(time.Now().Add(patience))
	r := bufio.NewReader(client)
	fmt.Fprint(client, "POST / HTTP/1.1\r\nHost: rollcall\r\nContent-Length: 4\r\n\r\n")
	<-entered
	c := the(http.StateActive)
	// expire calls expireIdle with c in that state, and returns what c got.
	expire := func(state http.ConnState) (expired bool) {
		s.mu.Lock()
		c.state = state
		s.mu.Unlock()
		s.expireIdle(time.Time{})
		s.mu.Lock()
		defer s.mu.Unlock()
		return c.expired
	}

	// What can't be arranged from outside: a request that is found just when the
	// connection, which is idle for a moment more, is given up.
	if !expire(http.StateIdle) {
		t.Fatal("the connection was not given up")
	}
	tracked := c.Conn
	if secure {
		tracked = c.tls
	}
	s.track(tracked, http.StateActive)
	fmt.Fprint(client, "body")
	waitFor(t, "the body to arrive", func() bool { n, err := peek(rawConn(c.Conn)); return err == nil && n > 0 })
	if expire(http.StateIdle) { // and one whose bytes nobody has read yet
		t.Error("given up in spite of what has arrived")
	}
	if expire(http.StateActive) {
		t.Error("given up in the middle of a request")
	}
	close(goOn)
	if resp, err := http.ReadResponse(r, nil); err != nil || resp.StatusCode != 200 {
		t.Fatalf("the request: %v, %v", resp, err)
	}

	the(http.StateIdle)
	waitFor(t, "the idle connection to be closed", func() bool {
		// Again: the server may have set its own deadline just then.
		return s.expireIdle(time.Time{}) == 0
	})
	if _, err := r.ReadByte(); err != io.EOF {
		t.Errorf("the client reads %v", err)
	}
}

// HTTP/2 has a goodbye of its own (RFC 9113, section 6.8).
func TestStopHTTP2(t *testing.T) {
	t.Parallel()
	certFile, keyFile := writeCertificate(t, t.TempDir(), "rollcall.test")
	databaseURL, _ := newSchema(t)
	s := startService(t, testEnv(databaseURL, "TLS_CERT_FILE="+certFile, "TLS_KEY_FILE="+keyFile))
	s.waitReady()
	transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	resp, err := (&http.Client{Transport: transport, Timeout: patience}).Get(s.url + usersPath)
	if err != nil {
		t.Fatal(err)
	}
	io.Copy(io.Discard, resp.Body)
	resp.Body.Close()
	if resp.ProtoMajor != 2 || resp.StatusCode != 200 {
		t.Errorf("got %s %s", resp.Proto, resp.Status)
	}
	if resp, err = (&http.Client{Transport: transport, Timeout: patience}).Head(s.url + "/health"); err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if line := findLine(t, s, withID(resp.Header.Get("X-Request-Id"))); line["level"] != "INFO" {
		t.Errorf("HEAD is logged as %v", line)
	}
	s.stop()
	select {
	case err := <-s.done:
		s.done <- err
		if err != nil {
			t.Errorf("the stop: %v", err)
		}
	case <-time.After(patience):
		t.Error("the service does not stop")
	}
}
