package main

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"
)

// TestSocketWaits writes more than there is room for, to a peer that reads later.
func TestSocketWaits(t *testing.T) {
	t.Parallel()
	c, peer := connect(t)
	s := newSocket(c)
	sent := bytes.Repeat([]byte("0123456789abcde\n"), 1<<20)
	written := make(chan error, 1)
	go func() {
		n, err := s.Write(sent)
		if err == nil && n != len(sent) {
			err = io.ErrShortWrite
		}
		written <- errors.Join(err, s.Close())
	}()
	got, err := io.ReadAll(peer)
	if err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d bytes came, of %d (%v)", len(got), len(sent), err)
	}
	if err := <-written; err != nil {
		t.Error(err)
	}
}

// TestSocketErrors holds that what is wrong is told as net tells it, and that n is
// what has been sent.
func TestSocketErrors(t *testing.T) {
	t.Parallel()
	c, peer := connect(t)
	s := newSocket(c)
	if n, err := s.Write(nil); n != 0 || err != nil {
		t.Errorf("nothing: %d, %v", n, err)
	}
	go func() { // some has been sent, and the rest waits
		io.ReadFull(peer, make([]byte, 1))
		s.SetWriteDeadline(time.Unix(1, 0))
	}()
	large := make([]byte, 64<<20)
	n, err := s.Write(large)
	if !errors.Is(err, os.ErrDeadlineExceeded) || n == 0 || n == len(large) {
		t.Errorf("to one who does not read: %d, %v", n, err)
	}
	if n, err := s.Write([]byte("x")); !errors.Is(err, os.ErrDeadlineExceeded) || n != 0 {
		t.Errorf("after the deadline: %d, %v", n, err)
	}
	s.SetWriteDeadline(time.Time{})
	got := make(chan int64, 1)
	go func() {
		n, _ := io.Copy(io.Discard, peer)
		got <- n
	}()
	s.Close()
	if received := <-got; received+1 != int64(n) {
		t.Errorf("%d bytes came, of %d", received+1, n)
	}
	if _, err := s.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("when closed: %v", err)
	}

	c, peer = connect(t)
	s = newSocket(c)
	peer.Close()
	err = nil
	for until := time.Now().Add(patience); err == nil && time.Now().Before(until); {
		_, err = s.Write(make([]byte, 1<<10))
	}
	if op, ok := errors.AsType[*net.OpError](err); !ok || op.Op != "write" {
		t.Errorf("when the peer has gone: %#v", err)
	}
}

// TestSocketReads holds the same of reading.
func TestSocketReads(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		before func(s socket, peer net.Conn)
		want   error
	}{
		"an end":      {func(s socket, peer net.Conn) { peer.Close() }, io.EOF},
		"a reset":     {func(s socket, peer net.Conn) { peer.(*net.TCPConn).SetLinger(0); peer.Close() }, syscall.ECONNRESET},
		"a deadline":  {func(s socket, peer net.Conn) { s.SetReadDeadline(time.Unix(1, 0)) }, os.ErrDeadlineExceeded},
		"when closed": {func(s socket, peer net.Conn) { s.Close() }, net.ErrClosed},
	} {
		for _, waits := range []bool{false, true} {
			c, peer := connect(t)
			s := newSocket(c)
			if _, err := peer.Write([]byte("ab")); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, 2)
			if n, err := s.Read(got[:1]); n != 1 || err != nil {
				t.Fatalf("%s: %d, %v", name, n, err)
			}
			if n, err := io.ReadFull(s, got[1:]); n != 1 || err != nil || string(got) != "ab" {
				t.Fatalf("%s: %q, %v", name, got, err)
			}
			if n, err := s.Read(nil); n != 0 || err != nil {
				t.Errorf("nothing: %d, %v", n, err)
			}
			if waits {
				time.AfterFunc(10*time.Millisecond, func() { tt.before(s, peer) })
			} else {
				tt.before(s, peer)
			}
			n, err := s.Read(got)
			if n != 0 || !errors.Is(err, tt.want) {
				t.Errorf("%s: %d, %v", name, n, err)
			}
			if op, ok := errors.AsType[*net.OpError](err); err != io.EOF && (!ok || op.Op != "read") {
				t.Errorf("%s: %#v", name, err)
			}
		}
	}
}
