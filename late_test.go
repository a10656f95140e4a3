//go:build !plain

package main

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"path/filepath"
	"sync"
	"testing"
)

// A statement that is late: the connection that it was sent on breaks for the
// service, but what was sent still lies in some buffer on the way (of a proxy, of
// a network that stalls, of a PostgreSQL that has no time). The service repeats it
// and answers; the first try arrives after that. It must not be done any more: an
// update would undo those that were acknowledged since, and a create would bring
// back a user that was deleted since.
func TestLateStatement(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name string
		// send sends the request whose first try is late, the one with "arrives
		// late" in it, and one more. It returns what has to be the answer to a GET of path.
		send func(s *service, path string) (want answer)
	}{
		{"update", func(s *service, path string) answer {
			s.call("PUT", path, `{"name":"arrives late"}`).user(s.t)
			return s.call("PUT", path, `{"name":"newer"}`)
		}},
		{"update that was the last one", func(s *service, path string) answer {
			return s.call("PUT", path, `{"name":"arrives late"}`)
		}},
		{"update with If-Match", func(s *service, path string) answer {
			return s.call("PUT", path, `{"name":"arrives late"}`, "If-Match: "+s.call("GET", path, "").header.Get("ETag"))
		}},
		{"create", func(s *service, path string) answer {
			a := s.call("POST", usersPath, `{"email":"late@example.com","name":"arrives late"}`)
			a.user(s.t)
			s.call("DELETE", a.header.Get("Location"), "")
			if list := s.call("GET", usersPath+"?email=late@example.com", "").users(s.t); len(list) != 0 {
				s.t.Errorf("deleted, and still there: %v", list)
			}
			return s.call("GET", path, "")
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			databaseURL, _ := newSchema(t)
			dir := socketDir(t)
			arrive := holdBack(t, filepath.Join(dir, ".s.PGSQL.5432"), "arrives late")
			s := startService(t, testEnv(databaseURL+" host="+dir))
			s.waitReady()
			path := createUser(s, "a@example.com").header.Get("Location")
			want := test.send(s, path)
			arrive()
			if got := s.call("GET", path, ""); got.body != want.body || got.header.Get("ETag") != want.header.Get("ETag") {
				t.Errorf("answered %s\nstored   %s", want.body, got.body)
			}
			if list := s.call("GET", usersPath+"?email=late@example.com", "").users(t); len(list) != 0 {
				t.Errorf("a user who was deleted is back: %v", list)
			}
		})
	}
}

// holdBack passes what comes to the socket at path on to the test's PostgreSQL,
// but for the first message with text in it: that is kept, and its connection
// breaks for the service. arrive delivers it after all, and returns when
// PostgreSQL is done with that connection.
func holdBack(t *testing.T, path, text string) (arrive func()) {
	t.Helper()
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	late := make(chan func(), 1)
	var once sync.Once
	relayTo(t, listener, func(from, to net.Conn) {
		ended := make(chan struct{})
		go func() {
			io.Copy(from, to)
			from.Close()
			io.Copy(io.Discard, to) // of the one that is late, nobody hears
			close(ended)
		}()
		b := make([]byte, 1<<16)
		for {
			n, err := from.Read(b)
			if err != nil {
				return
			}
			kept := false
			if bytes.Contains(b[:n], []byte(text)) {
				once.Do(func() { kept = true })
			}
			if kept {
				from.Close()
				late <- func() {
					to.Write(b[:n]) // an error: PostgreSQL has ended the connection, and is done with it
					to.(*net.UnixConn).CloseWrite()
					<-ended
				}
				<-ended
				return
			}
			to.Write(b[:n])
		}
	})
	return func() {
		t.Helper()
		select {
		case deliver := <-late:
			deliver()
		default:
			t.Fatalf("no message with %q was held back", text)
		}
	}
}

// A pooler loses its server after the statement was sent, and says so in words of
// its own: the error that PgBouncer makes up, of class 08, is no word of
// PostgreSQL's on what has become of the statement. It is an ERROR in older
// versions, in newer ones FATAL, of which lib/pq makes a broken connection.
func TestPoolerLosesServer(t *testing.T) {
	t.Parallel()
	for _, severity := range []string{"ERROR", "FATAL"} {
		t.Run(severity, func(t *testing.T) {
			t.Parallel()
			testPoolerLosesServer(t, severity)
		})
	}
}

func testPoolerLosesServer(t *testing.T, severity string) {
	databaseURL, _ := newSchema(t)
	// An ErrorResponse (PostgreSQL's manual, section 55.7).
	fields := "S" + severity + "\x00C08P01\x00Mserver conn crashed?\x00\x00"
	lost := binary.BigEndian.AppendUint32([]byte("E"), uint32(4+len(fields)))
	r := startRelay(t, socketDir(t), append(lost, fields...)...)
	s := startService(t, testEnv(databaseURL+" host="+r.dir))
	s.waitReady()
	call := func(tag, method, path, body string, fields ...string) answer {
		t.Helper()
		r.lose(tag)
		a := s.call(method, path, body, fields...)
		r.wantLost(t)
		if a.status != 200 {
			t.Errorf("%s, which was done: %d %s", method, a.status, a.body)
		}
		return a
	}
	created := call("INSERT 0 1", "POST", usersPath, `{"email":"a@example.com","name":"x"}`)
	path, etag := created.header.Get("Location"), created.header.Get("ETag")
	updated := call("UPDATE 1", "PUT", path, `{"name":"y"}`, "If-Match: "+etag)
	if got := s.call("GET", path, ""); got.body != updated.body {
		t.Errorf("answered %s\nstored   %s", updated.body, got.body)
	}
	call("DELETE 1", "DELETE", path, "")
}
