package main

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"syscall"
	"testing"
)

// A caller who has closed its half of the connection has the grace to be
// answered in; then it counts as gone, and so does one who has closed all of it.
func TestCallerGone(t *testing.T) {
	t.Parallel()
	t.Run("watched", func(t *testing.T) {
		t.Parallel()
		testCallerGone(t, func(h http.Handler) string { return serveOn(t, nil, h) }, func(w http.ResponseWriter, r *http.Request) bool {
			c := exchangeOf(w).conn
			c.presence.mu.Lock()
			defer c.presence.mu.Unlock()
			return !c.gone.IsZero()
		})
	})
	t.Run("as with TLS", func(t *testing.T) {
		t.Parallel()
		testCallerGone(t, func(h http.Handler) string {
			checkLeaks(t)
			server := httptest.NewServer(h) // which knows nothing of connections
			t.Cleanup(server.Close)
			return server.URL
		}, func(w http.ResponseWriter, r *http.Request) bool {
			return r.Context().Err() != nil // net/http has seen it
		})
	})
}

func testCallerGone(t *testing.T, start func(http.Handler) (url string), seen func(http.ResponseWriter, *http.Request) bool) {
	ended := make(chan error, 1)
	url := start(observe(slog.New(slog.DiscardHandler), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		outer := r
		deadline(2*patience, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			defer func() { ended <- r.Context().Err() }()
			waitFor(t, "the end to be seen", func() bool { return seen(w, outer) })
			if r.URL.Path == "/soon" {
				w.WriteHeader(http.StatusOK)
			} else {
				<-r.Context().Done()
			}
		})).ServeHTTP(w, r)
	})))
	for _, tt := range []struct {
		path string
		end  func(*net.TCPConn) error
		want error
	}{
		{"/soon", (*net.TCPConn).CloseWrite, nil},
		{"/late", (*net.TCPConn).CloseWrite, context.Canceled},
		{"/late", (*net.TCPConn).Close, context.Canceled},
		{"/late", func(c *net.TCPConn) error { c.SetLinger(0); return c.Close() }, context.Canceled}, // a reset
	} {
		conn := dialRaw(t, &service{t: t, url: url})
		conn.send("GET " + tt.path + " HTTP/1.1\r\nHost: x\r\n\r\n")
		if err := tt.end(conn.Conn.(*net.TCPConn)); err != nil {
			t.Fatal(err)
		}
		if err := <-ended; err != tt.want {
			t.Errorf("%s: the context says %v; want %v", tt.path, err, tt.want)
		}
		if tt.want == nil {
			if got := readToEnd(t, conn); !strings.HasPrefix(got, "HTTP/1.1 200") {
				t.Errorf("%s: %q", tt.path, got)
			}
		}
	}
}

// net/http's own wait for the end of a connection, which costs a tenth of every
// request, is not there. (Not parallel: the servers of other tests have it.)
func TestNobodyReadsInBackground(t *testing.T) {
	entered, goOn := make(chan *connection), make(chan struct{})
	url := serveOn(t, nil, observe(slog.New(slog.DiscardHandler), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		entered <- exchangeOf(w).conn
		<-goOn
	})))
	defer close(goOn)
	conn := dialRaw(t, &service{t: t, url: url})
	for _, request := range []string{"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx",
		"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"} {
		conn.send(request)
		c := <-entered
		waitFor(t, "net/http to try", func() bool { return !c.waits.Load() })
		if left := waitGone("backgroundRead"); left != "" {
			t.Errorf("%q: %s", request, left)
		}
		goOn <- struct{}{}
		if a := conn.answer(); a.status != 200 {
			t.Errorf("%q: %d", request, a.status)
		}
	}
}

// The end of a connection is seen at once, however it came.
func TestPeek(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		do    func(*net.TCPConn) error
		wantN int
		want  error
	}{
		"a byte": {func(c *net.TCPConn) error { _, err := c.Write([]byte("x")); return err }, 1, nil},
		"an end": {(*net.TCPConn).CloseWrite, 0, nil},
		"reset":  {func(c *net.TCPConn) error { c.SetLinger(0); return c.Close() }, 0, syscall.ECONNRESET},
	} {
		client, conn := connect(t)
		if n, err := newSocket(conn).peek(); n != 0 || err != syscall.EAGAIN {
			t.Errorf("%s, before: %d, %v", name, n, err)
		}
		if err := tt.do(client); err != nil {
			t.Fatal(err)
		}
		var n int
		var err error
		waitFor(t, "something to arrive", func() bool {
			n, err = newSocket(conn).peek()
			return err != syscall.EAGAIN
		})
		if n != tt.wantN || err != tt.want {
			t.Errorf("%s: %d, %v; want %d, %v", name, n, err, tt.wantN, tt.want)
		}
	}
}
