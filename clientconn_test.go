//go:build !plain

package main

import (
	"bufio"
	"bytes"
	"crypto/tls"
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

// A client that has closed its half of the connection is sent the first byte of its
// response, to find out whether it is there. If it is, it gets the rest.
func TestHalfClosedClient(t *testing.T) {
	t.Parallel()
	for _, size := range []int{2, 5000, 2 * smallBytes} {
		content := strings.Repeat("x", size)
		url := serveOn(t, nil, underObserve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			c := connFrom(r.Context()).Conn.(*clientConn)
			waitFor(t, "the first byte to be sent", func() bool {
				c.mu.Lock()
				defer c.mu.Unlock()
				return c.sent == 1
			})
			if err := r.Context().Err(); err != nil {
				t.Errorf("the context says %v", err)
			}
			io.WriteString(w, content)
		})))
		conn := dialRaw(t, &service{t: t, url: url})
		conn.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		if err := conn.Conn.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if a := conn.answer(); a.status != 200 || a.body != content {
			t.Errorf("%d, %d bytes; want %d", a.status, len(a.body), size)
		}
	}
}

// net/http's own wait for the end of a connection, which costs a tenth of every
// request, is not there. (Not parallel: the servers of other tests may have it.)
func TestNobodyReadsInBackground(t *testing.T) {
	entered, goOn := make(chan *clientConn), make(chan struct{})
	url := serveOn(t, nil, underObserve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		infoFrom(r.Context()).bodyRead = true
		entered <- connFrom(r.Context()).Conn.(*clientConn)
		<-goOn
	})))
	defer close(goOn)
	conn := dialRaw(t, &service{t: t, url: url})
	for _, request := range []string{"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx",
		"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"} {
		conn.send(request)
		c := <-entered
		waitFor(t, "net/http to try", func() bool { return !c.background.Load() })
		if left := waitGone("backgroundRead"); left != "" {
			t.Errorf("%q: %s", request, left)
		}
		goOn <- struct{}{}
		if a := conn.answer(); a.status != 200 {
			t.Errorf("%q: %d", request, a.status)
		}
	}
}

// A countedWriter counts what is written to it, call by call.
type countedWriter struct {
	io.Writer
	writes *atomic.Int64
}

func (w countedWriter) Write(p []byte) (int, error) {
	w.writes.Add(1)
	return w.Writer.Write(p)
}

// However long a response is, up to smallBytes, it goes out in one write.
func TestOneWritePerResponse(t *testing.T) {
	t.Parallel()
	var written atomic.Int64
	url := serveOn(t, nil, underObserve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c := connFrom(r.Context()).Conn.(*clientConn)
		c.out = countedWriter{c.TCPConn, &written}
		n, _ := strconv.Atoi(r.URL.Path[1:])
		w.Write(bytes.Repeat([]byte("x"), n))
	})))
	transport := new(http.Transport)
	defer transport.CloseIdleConnections()
	for n := range smallBytes * 2 {
		if n > 64 && n%613 != 0 && (n < 3400 || n > 4200) {
			continue
		}
		for _, method := range []string{"GET", "HEAD"} {
			before := written.Load()
			request, err := http.NewRequest(method, fmt.Sprintf("%s/%d", url, n), nil)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := transport.RoundTrip(request)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil || resp.ContentLength != int64(n) || method == "GET" && len(body) != n || method == "HEAD" && len(body) != 0 {
				t.Fatalf("%s, %d bytes: got %d of %d, %v", method, n, len(body), resp.ContentLength, err)
			}
			if writes := written.Load() - before; n < smallBytes-1024 && writes != 1 {
				t.Fatalf("%s, %d bytes: %d writes", method, n, writes)
			}
		}
	}
}

// A response of which net/http was told that it is written, and could not be, is
// the last one of its connection, though another request is there already.
func TestResponseThatBreaksOff(t *testing.T) {
	t.Parallel()
	var served atomic.Int64
	log := new(syncBuffer)
	url := serveOn(t, nil, observe(slog.New(slog.NewJSONHandler(log, nil)), new(atomic.Bool), patience, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
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
	findLine(t, &service{t: t, log: log}, func(line map[string]any) bool {
		return line["level"] == "WARN" && strings.Contains(fmt.Sprint(line["error"]), "i/o timeout")
	})
}

// A caller who has closed its half of the connection is answered.
func TestChaosHalfClosed(t *testing.T) {
	const poolConns = 2
	s := newService(t, fmt.Sprintf("DB_MAX_CONNS=%d", poolConns))
	path := createUser(s, "a@example.com").header.Get("Location")
	normal := returnsToNormal(t, poolConns)
	const body = `{"email":"b@example.com","name":"B"}`
	tx := begin(t, s.db, "LOCK TABLE users IN ACCESS EXCLUSIVE MODE") // all have to wait
	requests := []string{
		"GET " + path + " HTTP/1.1\r\nHost: x\r\n\r\n",
		"GET /api/v1/users HTTP/1.0\r\n\r\n",
		fmt.Sprintf("%sContent-Length: %d\r\n\r\n%s", head, len(body), body),
	}
	var conns []*wireConn
	for _, request := range requests {
		conn := dialRaw(t, s)
		conn.send(request)
		if err := conn.Conn.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	first := make([]byte, 1)
	for _, conn := range conns { // until the service has found out that they are there
		conn.SetReadDeadline(time.Now().Add(patience))
		if _, err := conn.Read(first); err != nil {
			t.Fatal(err)
		}
	}
	tx.Rollback()
	for i, conn := range conns {
		if got := string(first) + readToEnd(t, conn); !strings.HasPrefix(got, "HTTP/1.") || !strings.Contains(got, " 200 OK\r\n") {
			t.Errorf("%q: %s", requests[i], got)
		}
		conn.Close()
	}
	normal()
}

// By TLS, too, a client may say that it has sent all before it reads the response,
// however long that takes.
func TestHalfClosedTLS(t *testing.T) {
	t.Parallel()
	certFile, keyFile := writeCertificate(t, t.TempDir(), "rollcall.test")
	s := newService(t, "TLS_CERT_FILE="+certFile, "TLS_KEY_FILE="+keyFile)
	create := func(i int) *tls.Conn {
		conn := dialTLS(t, s)
		body := fmt.Sprintf(`{"email":"%d@example.com","name":"x"}`, i)
		fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", usersPath, len(body), body)
		if err := conn.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	expectOK := func(conn *tls.Conn) {
		t.Helper()
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil || resp.StatusCode != 200 {
			t.Errorf("%v, %v", resp, err)
		}
		conn.Close()
	}
	for i := range 20 {
		expectOK(create(i))
	}
	tx := begin(t, s.db, "LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
	waits, leaves := create(20), create(21)
	time.Sleep(5 * checkInterval) // a response that takes long is what is tested, so there is nothing to wait for
	leaves.Close()
	findLine(t, s, func(line map[string]any) bool { return line["status"] == 499.0 })
	tx.Rollback()
	expectOK(waits)
}
