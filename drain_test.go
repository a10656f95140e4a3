package main

import (
	"bufio"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// The program is replaced under load, 5 times over, or 20 with ROLLCALL_CHAOS: no
// request fails. The test is the service manager: it holds the listening socket,
// and hears from each process when it is ready.
func TestRestarts(t *testing.T) {
	t.Parallel()
	restarts := 5
	if os.Getenv("ROLLCALL_CHAOS") != "" {
		restarts = 20
	}
	for _, mode := range []struct {
		name    string
		overlap bool // the next process is ready before the one before is stopped
	}{{"one after the other", false}, {"overlapping", true}} {
		t.Run(mode.name, func(t *testing.T) {
			databaseURL, db := newSchema(t)
			listener, socket := newListener(t)
			start := func() *process {
				p, heard := newManagedProcess(t, socket, testEnv(databaseURL))
				p.start()
				heard.wait("READY=1")
				return p
			}
			stop := func(p *process) {
				p.cmd.Process.Signal(syscall.SIGTERM)
				if code := p.exit(); code != 0 {
					t.Errorf("exit code %d", code)
				}
			}
			p := start()
			load := startLoad(t, listener.Addr().String())
			for range restarts {
				enough := load.answered.Load() + 200
				waitFor(t, "200 more answers", func() bool { return load.answered.Load() >= enough })
				before := p
				if mode.overlap {
					p = start()
					stop(before)
				} else {
					stop(before)
					p = start()
				}
			}
			load.end()
			var users int64
			if err := db.QueryRow("SELECT count(*) FROM users").Scan(&users); err != nil {
				t.Fatal(err)
			}
			t.Logf("%d restarts, %d requests, %d failed, %d lost or doubled, worst wait %v", restarts,
				load.answered.Load()+load.failed.Load(), load.failed.Load(), users-load.created.Load(), time.Duration(load.worst.Load()))
			if load.failed.Load() > 0 {
				t.Errorf("failed requests, such as\n%s", strings.Join(load.failures, "\n"))
			}
			if users != load.created.Load() {
				t.Errorf("%d creates were answered with 200, and there are %d users", load.created.Load(), users)
			}
			stop(p)
		})
	}
}

// newListener returns a listening socket and the file to pass it on.
func newListener(t testing.TB) (net.Listener, *os.File) {
	t.Helper()
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

// A load is clients of three kinds that create and list users until its end: some
// keep their connection and never repeat a request, some are net/http's, which
// repeats a GET, but no POST, whose connection it finds dead, and some connect
// anew for each request.
type load struct {
	t       testing.TB
	address string
	done    chan struct{}
	clients sync.WaitGroup
	next    atomic.Int64 // the number in the next address

	answered, created, failed atomic.Int64 // requests: with 200, POSTs of these, and the others
	worst                     atomic.Int64 // the longest wait for an answer, in nanoseconds

	mu       sync.Mutex
	failures []string // the first few
}

func startLoad(t testing.TB, address string) *load {
	l := &load{t: t, address: address, done: make(chan struct{})}
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
func (l *load) end() {
	close(l.done)
	l.clients.Wait()
}

// request returns what to ask next: three reads to a write.
func (l *load) request() (method, path, body string) {
	if rand.N(4) > 0 {
		return "GET", usersPath + "?limit=2", ""
	}
	return "POST", usersPath, fmt.Sprintf(`{"email":"u%d@example.com","name":"U"}`, l.next.Add(1))
}

// answer counts an answer.
func (l *load) answer(method string, resp *http.Response, begun time.Time) error {
	body, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil || resp.StatusCode != 200 {
		return fmt.Errorf("%s: %d %s, %v", method, resp.StatusCode, body, err)
	}
	l.answered.Add(1)
	if method == "POST" {
		l.created.Add(1)
	}
	for wait, worst := int64(time.Since(begun)), l.worst.Load(); wait > worst && !l.worst.CompareAndSwap(worst, wait); worst = l.worst.Load() {
	}
	return nil
}

// netHTTPTurn returns what makes a request with a client of net/http.
func (l *load) netHTTPTurn(client *http.Client) func() error {
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
		return l.answer(method, resp, begun)
	}
}

// A rawClient sends each request once.
type rawClient struct {
	address string
	conn    net.Conn // nil: connect anew
	r       *bufio.Reader
}

// newTurn returns what makes a request; the connection is used again unless anew.
func (c *rawClient) newTurn(l *load, anew bool) func() error {
	return func() error {
		method, path, body := l.request()
		begun := time.Now()
		resp, err := c.do(method, path, body, rand.N(5*time.Millisecond))
		if err == nil {
			err = l.answer(method, resp, begun)
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
