//go:build !linux || !(amd64 || arm64)

package main

import (
	"errors"
	"net"
	"syscall"
)

// A socket is a connection that can be looked at: see socket_linux.go.
type socket struct{ net.Conn }

func newSocket(c net.Conn) socket { return socket{c} }

// peek returns how much has arrived that nobody has read, up to one byte. It does
// not wait: [syscall.EAGAIN] is nothing yet, 0 without an error is the end, and any
// other error is one, too.
func (s socket) peek() (n int, err error) {
	c, ok := s.Conn.(syscall.Conn)
	if !ok {
		return 0, errors.ErrUnsupported
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	closed := raw.Control(func(fd uintptr) { // and not Read, which a deadline that is over would end
		var b [1]byte
		n, _, err = syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
	})
	if closed != nil {
		return 0, closed
	}
	return max(n, 0), err // recvfrom returns -1 with an error
}
