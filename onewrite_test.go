package main

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// A countedConn counts what is written to it, call by call.
type countedConn struct {
	net.Conn
	writes *atomic.Int64
}

func (c countedConn) Write(p []byte) (int, error) {
	c.writes.Add(1)
	return c.Conn.Write(p)
}

type countedListener struct {
	net.Listener
	writes atomic.Int64
}

func (l *countedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return countedConn{c, &l.writes}, err
}

// However long an answer is, up to smallBytes, it goes out in one write.
func TestOneWritePerAnswer(t *testing.T) {
	t.Parallel()
	tcp, _ := newListener(t)
	counted := &countedListener{Listener: tcp}
	url := serveOn(t, counted, observe(slog.New(slog.DiscardHandler), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, _ := strconv.Atoi(r.URL.Path[1:])
		if r.URL.RawQuery == "" { // else it is sent in chunks
			w.Header().Set("Content-Length", strconv.Itoa(n))
		}
		if written, err := w.Write(bytes.Repeat([]byte("x"), n)); r.Method == "GET" && (written != n || err != nil) {
			t.Errorf("%d bytes: %d, %v", n, written, err)
		}
	})))
	transport := new(http.Transport)
	defer transport.CloseIdleConnections()
	for n := range smallBytes * 2 {
		if n > 64 && n%613 != 0 && (n < 3400 || n > 4200) {
			continue
		}
		for _, method := range []string{"GET", "HEAD"} {
			for _, query := range []string{"", "?chunked"} {
				before := counted.writes.Load()
				request, err := http.NewRequest(method, fmt.Sprintf("%s/%d%s", url, n, query), nil)
				if err != nil {
					t.Fatal(err)
				}
				resp, err := transport.RoundTrip(request)
				if err != nil {
					t.Fatal(err)
				}
				body, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				if err != nil || method == "GET" && len(body) != n || method == "HEAD" && len(body) != 0 {
					t.Fatalf("%s, %d bytes: got %d, %v", method, n, len(body), err)
				}
				if writes := counted.writes.Load() - before; n < smallBytes-1024 && query == "" && writes != 1 {
					t.Fatalf("%s, %d bytes: %d writes", method, n, writes)
				}
			}
		}
	}
}

// An answer of which net/http was told that it is written, and could not be, is
// the last one of its connection, though another request is there already.
func TestAnswerThatBreaksOff(t *testing.T) {
	t.Parallel()
	var served atomic.Int64
	log := new(syncBuffer)
	url := serveOn(t, nil, observe(slog.New(slog.NewJSONHandler(log, nil)), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		served.Add(1)
		http.NewResponseController(w).SetWriteDeadline(time.Unix(1, 0))
		w.Write(make([]byte, 5000))
	})))
	client := dialRaw(t, &service{t: t, url: url})
	client.SetReadDeadline(time.Now().Add(patience))
	client.send(strings.Repeat("GET / HTTP/1.1\r\nHost: x\r\n\r\n", 3))
	if got, err := io.ReadAll(client); err != nil || len(got) != 0 {
		t.Errorf("%q, %v", got, err)
	}
	if n := served.Load(); n != 1 {
		t.Errorf("%d requests were served", n)
	}
	if !strings.Contains(log.String(), "i/o timeout") {
		t.Errorf("logged %s", log)
	}
}
