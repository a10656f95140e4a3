//go:build amd64 || arm64

package main

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"unsafe"
)

// System calls that do not wait
//
// Go tells its scheduler of each system call. Its monitor, a thread of its own, is
// woken for that where all was quiet, and from then on looks every 20 µs whether
// the call takes longer: then another thread takes the caller's place, since most
// that take so long wait for something. A call on a socket never waits (where it
// would have to, it fails, and net waits for it to be ready). But to send takes
// the kernel some of that time, and whom it wakes may get the processor first: so
// the place is lost all the same, and one thread too many is at work, to be put to
// sleep and woken in turns.
//
// So these calls are made without a word to the scheduler. Where client, service
// and PostgreSQL share two processors, that is 5 % more gets and creates and 7 to
// 18 % more of the mixed load; and a fifth more where one client asks at a time.

// A socket is a connection whose system calls are made in this way. Its errors are
// those of net.
type socket struct {
	net.Conn
	raw syscall.RawConn // nil: it has no file descriptor
}

func newSocket(c net.Conn) socket {
	s := socket{Conn: c}
	if c, ok := c.(syscall.Conn); ok {
		s.raw, _ = c.SyscallConn()
	}
	return s
}

func (s socket) Read(p []byte) (n int, err error) {
	if s.raw == nil || len(p) == 0 {
		return s.Conn.Read(p)
	}
	var failed error
	err = s.raw.Read(func(fd uintptr) (done bool) {
		n, failed = unannounced(syscall.SYS_READ, fd, p, 0)
		return failed != syscall.EAGAIN
	})
	if err == nil && failed == nil && n == 0 {
		return 0, io.EOF
	}
	return n, s.failure("read", err, failed)
}

func (s socket) Write(p []byte) (n int, err error) {
	if s.raw == nil {
		return s.Conn.Write(p)
	}
	var failed error
	err = s.raw.Write(func(fd uintptr) (done bool) {
		for n < len(p) && failed == nil {
			var written int
			written, failed = unannounced(syscall.SYS_WRITE, fd, p[n:], 0)
			n += written
		}
		if failed == syscall.EAGAIN {
			failed = nil
			return false
		}
		return true
	})
	return n, s.failure("write", err, failed)
}

// peek returns how much has arrived that nobody has read, up to one byte. It does
// not wait: [syscall.EAGAIN] is nothing yet, 0 without an error is the end, and any
// other error is one, too.
func (s socket) peek() (n int, err error) {
	if s.raw == nil {
		return 0, errors.ErrUnsupported
	}
	closed := s.raw.Control(func(fd uintptr) { // and not Read, which a deadline that is over would end
		var b [1]byte
		n, err = unannounced(syscall.SYS_RECVFROM, fd, b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
	})
	if closed != nil {
		return 0, closed
	}
	return n, err
}

// failure returns the error as net would have it: err is why there was no waiting,
// and failed is what a system call failed with.
func (s socket) failure(op string, err, failed error) error {
	if known, ok := err.(*net.OpError); ok {
		known.Op = op // "raw-read" or "raw-write"
	}
	if err != nil || failed == nil {
		return err
	}
	return &net.OpError{Op: op, Net: s.LocalAddr().Network(), Source: s.LocalAddr(), Addr: s.RemoteAddr(), Err: os.NewSyscallError(op, failed)}
}

// unannounced makes a system call with a buffer, and again if a signal comes in
// between. The error is a [syscall.Errno].
func unannounced(trap, fd uintptr, p []byte, flags uintptr) (n int, err error) {
	for {
		r, _, errno := syscall.RawSyscall6(trap, fd, uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), flags, 0, 0)
		switch errno {
		case 0:
			return int(r), nil
		case syscall.EINTR:
		default:
			return 0, errno
		}
	}
}
