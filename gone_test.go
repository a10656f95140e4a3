package main

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// A caller who has closed its half of the connection has the grace to be
// answered in; then it counts as gone, and so does one who has closed all of it.
func TestCallerGone(t *testing.T) {
	t.Parallel()
	t.Run("watched", func(t *testing.T) {
		t.Parallel()
		testCallerGone(t, watchedServer, func(w http.ResponseWriter, r *http.Request) bool {
			c := exchangeOf(w).conn
			c.presence.mu.Lock()
			defer c.presence.mu.Unlock()
			return !c.gone.IsZero()
		})
	})
	t.Run("as with TLS", func(t *testing.T) {
		t.Parallel()
		testCallerGone(t, httptest.NewUnstartedServer, func(w http.ResponseWriter, r *http.Request) bool {
			return r.Context().Err() != nil // net/http has seen it
		})
	})
}

// watchedServer returns a server whose connections are known and watched, when
// it is started.
func watchedServer(h http.Handler) *httptest.Server {
	server := httptest.NewUnstartedServer(h)
	conns := newConnections(100, slog.New(slog.DiscardHandler))
	watching, stop := context.WithCancel(context.Background())
	go conns.watch(watching)
	server.Config.RegisterOnShutdown(stop)
	server.Config.ConnState, server.Config.ConnContext = conns.track, withConnection
	server.Listener = connectionListener{server.Listener}
	return server
}

func testCallerGone(t *testing.T, newServer func(http.Handler) *httptest.Server, seen func(http.ResponseWriter, *http.Request) bool) {
	checkLeaks(t)
	ended := make(chan error, 1)
	server := newServer(observe(slog.New(slog.DiscardHandler), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		outer := r
		deadline(time.Hour, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			waitFor(t, "the end to be seen", func() bool { return seen(w, outer) })
			if r.URL.Path == "/soon" {
				w.WriteHeader(http.StatusOK)
			} else {
				<-r.Context().Done()
			}
			ended <- r.Context().Err()
		})).ServeHTTP(w, r)
	})))
	server.Start()
	defer server.Config.Shutdown(context.Background())
	defer server.Close()
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
		conn := dialRaw(t, &service{t: t, url: server.URL})
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
	server := watchedServer(observe(slog.New(slog.DiscardHandler), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		entered <- exchangeOf(w).conn
		<-goOn
	})))
	server.Config.ReadTimeout = patience // as the service has it
	server.Start()
	defer server.Config.Shutdown(context.Background())
	defer server.Close()
	defer close(goOn) // for Close waits
	conn := dialRaw(t, &service{t: t, url: server.URL})
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
