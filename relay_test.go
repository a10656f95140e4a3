package main

import (
	"bytes"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
)

// A service whose PostgreSQL is behind a relay of the test, which can lose what a
// network loses.

// socketDir makes a directory for a socket, until the test ends. The name of a
// socket has at most 107 bytes (unix(7)), and that of t.TempDir may be longer.
func socketDir(t testing.TB) string {
	t.Helper()
	checkLeaks(t)
	dir, err := os.MkdirTemp("", "rollcall-socket-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// relayTo has pass called, in a goroutine, for each connection that listener
// accepts, with one to the test's PostgreSQL. It closes both when pass returns.
func relayTo(t *testing.T, listener net.Listener, pass func(from, to net.Conn)) {
	t.Helper()
	checkLeaks(t)
	t.Cleanup(func() { listener.Close() })
	server := filepath.Join(testDatabase(t).sockets, ".s.PGSQL.5432")
	go func() {
		for {
			from, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer from.Close()
				to, err := net.Dial("unix", server)
				if err != nil {
					return
				}
				defer to.Close()
				pass(from, to)
			}()
		}
	}()
}

// A relay is a socket of PostgreSQL's, in a folder of its own, behind which is the
// test's PostgreSQL.
type relay struct {
	dir     string
	instead []byte       // what the service hears in place of what lose has lost
	losing  atomic.Value // string; empty: nothing
	silent  atomic.Bool  // the connection of what is lost does not break
}

// startRelay starts a relay in the folder dir.
func startRelay(t *testing.T, dir string, instead ...byte) *relay {
	t.Helper()
	r := &relay{dir: dir, instead: instead}
	r.losing.Store("")
	listener, err := net.Listen("unix", r.socket())
	if err != nil {
		t.Fatal(err)
	}
	relayTo(t, listener, func(from, to net.Conn) {
		go func() {
			io.Copy(to, from)
			to.Close()
		}()
		b := make([]byte, 1<<16)
		for {
			n, err := to.Read(b)
			if err != nil {
				return
			}
			text := r.losing.Load().(string)
			if text != "" && bytes.Contains(b[:n], []byte(text)) && r.losing.CompareAndSwap(text, "") {
				if r.silent.Load() {
					io.Copy(io.Discard, to)
				}
				from.Write(r.instead)
				return
			}
			from.Write(b[:n])
		}
	})
	return r
}

func (r *relay) socket() string { return filepath.Join(r.dir, ".s.PGSQL.5432") }

// lose has the first answer with text in it lost, and its connection broken.
func (r *relay) lose(text string) { r.losing.Store(text) }

// wantLost fails the test if what was to be lost was not.
func (r *relay) wantLost(t *testing.T) {
	t.Helper()
	if text := r.losing.Load(); text != "" {
		t.Fatalf("no answer %s was lost", text)
	}
}

// away has PostgreSQL gone until back is called: the service's connections, which
// are known by their application_name, are broken, and none can be made.
func (r *relay) away(s *service) (back func()) {
	s.t.Helper()
	if err := os.Rename(r.socket(), r.socket()+".away"); err != nil {
		s.t.Fatal(err)
	}
	mustExec(s.t, s.db, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1", filepath.Base(r.dir))
	return func() {
		s.t.Helper()
		if err := os.Rename(r.socket()+".away", r.socket()); err != nil {
			s.t.Fatal(err)
		}
	}
}

// throughRelay starts a service whose PostgreSQL is behind a relay. Functions in
// the service's schema go before PostgreSQL's own.
func throughRelay(t *testing.T, env ...string) (*service, *relay) {
	t.Helper()
	databaseURL, db := newSchema(t)
	r := startRelay(t, socketDir(t))
	s := startService(t, testEnv(databaseURL+",pg_catalog host="+r.dir+" application_name="+filepath.Base(r.dir), env...))
	s.db = db
	s.waitReady()
	return s, r
}
