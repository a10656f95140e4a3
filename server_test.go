package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

func TestMakeRoom(t *testing.T) {
	t.Parallel()
	log := new(syncBuffer)
	s := newServer(config{dbMaxConns: 1}, slog.New(slog.NewTextHandler(log, nil)))
	s.max = 3
	clients, conns, contexts := make(map[string]net.Conn), make(map[string]net.Conn), make(map[string]context.Context)
	arrive := func(name string) {
		server, client := net.Pipe()
		t.Cleanup(func() { server.Close(); client.Close() })
		clients[name], conns[name] = client, server
		contexts[name] = s.connContext(t.Context(), server)
		s.track(server, http.StateNew)
	}
	change := func(name string, state http.ConnState) { s.track(conns[name], state) }
	open := func(want string) {
		t.Helper()
		var names []string
		for name, conn := range clients {
			conn.SetReadDeadline(time.Now().Add(5 * time.Millisecond)) // there is nothing to read
			if _, err := conn.Read(make([]byte, 1)); err != io.EOF {
				names = append(names, name)
			}
		}
		slices.Sort(names)
		if got := strings.Join(names, " "); got != want {
			t.Errorf("open: %s; want %s", got, want)
		}
	}
	arrive("a")
	arrive("b")
	arrive("c")
	open("a b c")
	change("a", http.StateActive)
	arrive("d") // b has waited the longest
	open("a c d")
	change("b", http.StateClosed) // which the server notices later
	change("a", http.StateIdle)
	arrive("e") // c has waited the longest
	open("a d e")
	for _, name := range []string{"e", "a", "d"} {
		change(name, http.StateActive)
	}
	arrive("f") // no connection is idle: e has been within a request the longest
	open("a d f")
	for _, name := range []string{"a", "b", "c", "d", "e", "f"} {
		if cancelled := contexts[name].Err() != nil; cancelled != strings.Contains("b c e", name) {
			t.Errorf("the requests of %s are cancelled: %t", name, cancelled)
		}
	}
	for _, name := range []string{"a", "b", "c", "d", "e", "f"} {
		change(name, http.StateClosed)
	}
	if len(s.conns) != 0 {
		t.Errorf("%d are still counted", len(s.conns))
	}
	if n := strings.Count(log.String(), "too many connections"); n != 1 {
		t.Errorf("%d lines in the log within a second; want 1", n)
	}
}

// The end of a connection is seen at once, however it came, and whatever deadline
// was set for an earlier read.
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
		conn.SetReadDeadline(time.Unix(1, 0))
		if n, err := peek(rawConn(conn)); n != 0 || err != syscall.EAGAIN {
			t.Errorf("%s, before: %d, %v", name, n, err)
		}
		if err := tt.do(client); err != nil {
			t.Fatal(err)
		}
		var n int
		var err error
		waitFor(t, "something to arrive", func() bool {
			n, err = peek(rawConn(conn))
			return err != syscall.EAGAIN
		})
		if n != tt.wantN || err != tt.want {
			t.Errorf("%s: %d, %v; want %d, %v", name, n, err, tt.wantN, tt.want)
		}
	}
	_, conn := connect(t)
	raw := rawConn(conn)
	conn.Close()
	if _, err := peek(raw); err == nil || err == syscall.EAGAIN {
		t.Errorf("closed on this side: %v", err)
	}
	if _, err := peek(nil); err == nil || err == syscall.EAGAIN {
		t.Errorf("without a file descriptor: %v", err)
	}
}

// The request of a client that leaves is cancelled, however it leaves, and so is that
// of a connection which the server closes.
func TestClientThatLeaves(t *testing.T) {
	t.Parallel()
	t.Run("plain", func(t *testing.T) { testClientThatLeaves(t, false) })
	t.Run("TLS", func(t *testing.T) { testClientThatLeaves(t, true) })
}

func testClientThatLeaves(t *testing.T, secure bool) {
	checkLeaks(t)
	log := slog.New(slog.DiscardHandler)
	s := newServer(config{requestTimeout: patience, dbMaxConns: 1}, log)
	entered, ended := make(chan *serverConn, 1), make(chan error, 1)
	s.Handler = watchClient(observe(log, new(atomic.Bool), 2*patience, readPosts(10, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		entered <- connFrom(r.Context())
		<-r.Context().Done()
		ended <- r.Context().Err()
	}))))
	if secure {
		certFile, keyFile := writeCertificate(t, t.TempDir(), "rollcall.test")
		var err error
		if s.TLSConfig, err = newTLSConfig(config{tlsCertFile: certFile, tlsKeyFile: keyFile}, log); err != nil {
			t.Fatal(err)
		}
	}
	listener, _ := newListener(t)
	startServer(t, s, listener)
	for name, leave := range map[string]func(client *net.TCPConn, server *serverConn){
		"closed":               func(client *net.TCPConn, _ *serverConn) { client.Close() },
		"reset":                func(client *net.TCPConn, _ *serverConn) { client.SetLinger(0); client.Close() },
		"closed by the server": func(_ *net.TCPConn, server *serverConn) { server.Close() },
	} {
		for _, request := range []string{
			"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
			"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
			"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
			"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
		} {
			tcp, err := net.Dial("tcp", listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer tcp.Close()
			client := tcp
			if secure {
				client = tls.Client(tcp, &tls.Config{InsecureSkipVerify: true})
			}
			if _, err := io.WriteString(client, request); err != nil {
				t.Fatal(err)
			}
			select {
			case conn := <-entered:
				leave(tcp.(*net.TCPConn), conn)
			case <-time.After(patience):
				t.Fatalf("%s, %q: the request is not served", name, request)
			}
			select {
			case err := <-ended:
				if err != context.Canceled {
					t.Errorf("%s, %q: the context says %v", name, request, err)
				}
			case <-time.After(patience):
				t.Fatalf("%s, %q: the request goes on", name, request)
			}
		}
	}
}

// The statement of a client that has left ends in PostgreSQL, too.
func TestStatementOfAClientThatLeaves(t *testing.T) {
	t.Parallel()
	forEachTransport(t, func(t *testing.T, s *service, dial func(*testing.T) net.Conn) {
		const id = "00000000-0000-4000-8000-000000000001"
		mustExec(t, s.db, "INSERT INTO users (id, email, name) VALUES ('"+id+"', 'a@example.com', 'A')")
		mustExec(t, s.db, "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(3600); RETURN NULL; END'")
		mustExec(t, s.db, "CREATE TRIGGER slow BEFORE INSERT ON users FOR EACH STATEMENT EXECUTE FUNCTION slow()")
		mustExec(t, s.db, "ALTER TABLE users RENAME TO quick")
		mustExec(t, s.db, "CREATE VIEW users AS SELECT * FROM quick WHERE (SELECT pg_sleep(3600)) IS NOT NULL")
		running := func() int {
			return count(t, s.db, "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND application_name = current_schema()")
		}
		const body = `{"email":"b@example.com","name":"B"}`
		for _, request := range []string{"GET " + usersPath, "GET " + usersPath + "?email=a@example.com", "GET " + usersPath + "/" + id, "DELETE " + usersPath + "/" + id,
			"POST " + usersPath, "PUT " + usersPath + "/" + id} {
			conn := dial(t)
			request += " HTTP/1.1\r\nHost: x\r\n" + bearer("a") + "\r\n"
			if request[0] == 'P' {
				request += fmt.Sprintf("Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
			}
			if _, err := io.WriteString(conn, request+"\r\n"); err != nil {
				t.Fatal(err)
			}
			waitFor(t, "a statement of "+request, func() bool { return running() == 1 })
			conn.Close()
			waitFor(t, "the end of a statement of "+request, func() bool { return running() == 0 })
		}
		if n := count(t, s.db, "SELECT count(*) FROM quick WHERE name = 'A'"); n != 1 {
			t.Errorf("%d users are as they were; want 1", n)
		}
	})
}
