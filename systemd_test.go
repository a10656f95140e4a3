package main

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// A mailbox is the socket of a service manager, and what it was told.
type mailbox struct {
	t    testing.TB
	name string

	mu       sync.Mutex
	messages []string
}

// newMailbox opens a mailbox under this name; if it is empty, under one of its own.
func newMailbox(t testing.TB, name string) *mailbox {
	t.Helper()
	if name == "" {
		// Not t.TempDir: the name of a socket has at most 107 bytes, see unix(7).
		dir, err := os.MkdirTemp("", "rollcall-notify-")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		name = filepath.Join(dir, "notify")
	}
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	m := &mailbox{t: t, name: name}
	go func() {
		message := make([]byte, 4096)
		for {
			n, err := conn.Read(message)
			if err != nil {
				return
			}
			m.mu.Lock()
			m.messages = append(m.messages, string(message[:n]))
			m.mu.Unlock()
		}
	}()
	return m
}

// count returns how many messages had this assignment.
func (m *mailbox) count(assignment string) (n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, message := range m.messages {
		for line := range strings.SplitSeq(message, "\n") {
			if line == assignment {
				n++
			}
		}
	}
	return n
}

func (m *mailbox) wait(assignment string) {
	m.t.Helper()
	waitFor(m.t, "the service manager to be told "+assignment, func() bool { return m.count(assignment) > 0 })
}

// newManagedProcess returns the program to be started as a service manager does
// it: with a socket, if it is not nil, and an address for messages.
func newManagedProcess(t testing.TB, socket *os.File, env map[string]string) (*process, *mailbox) {
	t.Helper()
	heard := newMailbox(t, "")
	p := newProcess(t, t.TempDir(), env)
	p.cmd.Env = append([]string{"NOTIFY_SOCKET=" + heard.name, "LISTEN_FDS=1"}, p.cmd.Env...) // the last one counts
	if socket != nil {
		// LISTEN_PID is the id of the very process. The shell knows it, and becomes
		// the program.
		p.cmd.Path, p.cmd.Args = "/bin/sh", append([]string{"sh", "-c", `LISTEN_PID=$$; export LISTEN_PID; exec "$0" "$@"`}, p.cmd.Args...)
		p.cmd.ExtraFiles = []*os.File{socket}
	}
	return p, heard
}
