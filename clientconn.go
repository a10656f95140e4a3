//go:build !plain

package main

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// The connections of clients
//
// Beside each handler, a goroutine of net/http reads one byte, to notice the end of the
// connection; and what is longer than its buffer of 4 KiB net/http writes in two. Without
// TLS, that read returns at once here, the connection of a slow request is checked twice
// a second, and a response is one write.
//
// This relies on connReader.startBackgroundRead of net/http (Go 1.26, server.go): it
// sets the read deadline to zero and reads one byte, which nothing else does, and gives
// up when it reads nothing without an error. If that changes, the read waits, which is
// slower, and TestNobodyReadsInBackground fails.

// A socket is a [net.TCPConn] or a [net.UnixConn].
type socket interface {
	net.Conn
	syscall.Conn
	CloseWrite() error // net/http calls it before Close, when something may be unread
}

// A clientConn is the connection of a client.
type clientConn struct {
	socket
	background atomic.Bool // the next read of one byte is the one that waits for the end
	out        io.Writer   // what Write writes to: the socket, or the buffer of a oneWriter

	mu      sync.Mutex
	cancel  context.CancelFunc // of a request whose response has not begun; else nil
	secure  bool               // there is TLS above
	checked bool               // a timer runs, which calls check
	sent    int                // bytes of the response that are out already
}

// A clientListener makes a clientConn of each connection that it accepts.
type clientListener struct{ net.Listener }

func watchedListener(l net.Listener) net.Listener { return clientListener{l} }

func (l clientListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &clientConn{socket: conn.(socket), out: conn}, nil
}

// SetReadDeadline is how net/http begins to wait for the end: without a deadline.
func (c *clientConn) SetReadDeadline(t time.Time) error {
	c.background.Store(t.IsZero())
	return c.socket.SetReadDeadline(t)
}

func (c *clientConn) Read(p []byte) (int, error) {
	if len(p) == 1 && c.background.CompareAndSwap(true, false) {
		return 0, nil
	}
	return c.socket.Read(p)
}

// Write begins the response, or writes a part of it, but for what is out already.
func (c *clientConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	if !bytes.HasPrefix(p, []byte("HTTP/1.1 100 ")) {
		c.cancel = nil
	}
	sent := min(c.sent, len(p))
	c.sent -= sent
	c.mu.Unlock()
	n, err := c.out.Write(p[sent:])
	return sent + n, err
}

const checkInterval = time.Second / 2 // a client that has gone is noticed by the third check

// watch has cancel called when the client has gone, unless the response begins before.
func (c *clientConn) watch(cancel context.CancelFunc, secure bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cancel, c.secure = cancel, secure
	if !c.checked { // else the timer of an earlier request serves
		c.checked = true
		time.AfterFunc(checkInterval, c.check)
	}
}

// check cancels the request of a client that has gone. One that has closed its half of
// the connection is sent the first byte of the response, an H: if it has gone, its system
// resets the connection. With TLS, one half is closed by a close_notify, and TCP stays
// open (RFC 8446, section 6.1).
func (c *clientConn) check() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.checked = c.cancel != nil; !c.checked {
		return
	}
	n, err := peek(rawConn(c))
	switch {
	case n > 0 || err == syscall.EAGAIN: // it is there
	case err != nil || c.secure:
		c.cancel()
		c.cancel = nil
	case c.sent == 0:
		c.sent, _ = c.socket.Write([]byte("H"))
	}
	time.AfterFunc(checkInterval, c.check)
}

// watchClient is the layer around all others.
func watchClient(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn := connFrom(r.Context())
		c := conn.Conn.(*clientConn)
		switch {
		case r.ProtoMajor == 2:
			next.ServeHTTP(w, r)
		case conn.tls != nil: // net/http cancels at a close_notify, behind which TCP may be open
			ctx, cancel := context.WithCancel(context.WithoutCancel(r.Context()))
			defer cancel()
			defer context.AfterFunc(r.Context(), func() { c.watch(cancel, true) })()
			next.ServeHTTP(w, r.WithContext(ctx))
		default:
			c.watch(conn.cancel, false)
			one := &oneWriter{ResponseWriter: w, conn: c}
			next.ServeHTTP(one, r)
			if one.err != nil { // net/http takes the response for sent, and would serve another request
				panic(http.ErrAbortHandler)
			}
		}
	})
}

var heldBuffers = sync.Pool{New: func() any { return new(bytes.Buffer) }}

// A oneWriter is a response that goes out in one write.
type oneWriter struct {
	http.ResponseWriter
	conn *clientConn
	err  error // of that write
}

func (w *oneWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// Write writes a whole body.
func (w *oneWriter) Write(p []byte) (int, error) {
	if len(p) <= 2<<10 || len(p) > smallBytes { // it fits into net/http's buffer, or is too large to copy
		return w.ResponseWriter.Write(p)
	}
	held := heldBuffers.Get().(*bytes.Buffer)
	defer heldBuffers.Put(held)
	held.Reset()
	w.conn.out = held
	w.ResponseWriter.Write(p)
	http.NewResponseController(w.ResponseWriter).Flush()
	w.conn.out = w.conn.socket
	_, w.err = w.conn.socket.Write(held.Bytes())
	return len(p), w.err
}
