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
// To notice the end of a connection, net/http reads one byte in a goroutine beside each
// handler. Without TLS, that read returns at once here, and the connection of a slow request
// is checked twice a second. A response of more than 4 KiB is one write here, and not two.
//
// This relies on connReader.startBackgroundRead of net/http (Go 1.26, server.go): it sets
// the read deadline to zero and reads one byte, which nothing else does, and gives up when
// it reads nothing without an error. If that changes, the read waits, which is slower, and
// TestNobodyReadsInBackground fails.

// A clientConn is the connection of a client.
type clientConn struct {
	*net.TCPConn
	background atomic.Bool // the next read of one byte is the one that waits for the end
	out        io.Writer   // what Write writes to: the TCPConn, or the buffer of a oneWriter

	mu      sync.Mutex
	watched *serverConn // cancelled when the client has gone; nil once the response begins
	checked bool        // a timer runs, which calls check
	sent    int         // bytes of the response that are out already
}

// A clientListener makes a clientConn of each TCP connection that it accepts.
type clientListener struct{ net.Listener }

func watchedListener(l net.Listener) net.Listener { return clientListener{l} }

func (l clientListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if tcp, ok := conn.(*net.TCPConn); ok {
		return &clientConn{TCPConn: tcp, out: tcp}, nil
	}
	return conn, err
}

// SetReadDeadline is how net/http begins to wait for the end: without a deadline.
func (c *clientConn) SetReadDeadline(t time.Time) error {
	c.background.Store(t.IsZero())
	return c.TCPConn.SetReadDeadline(t)
}

func (c *clientConn) Read(p []byte) (int, error) {
	if len(p) == 1 && c.background.CompareAndSwap(true, false) {
		return 0, nil
	}
	return c.TCPConn.Read(p)
}

// Write begins the response, or writes a part of it, but for what is out already.
func (c *clientConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	if !bytes.HasPrefix(p, []byte("HTTP/1.1 100 ")) {
		c.watched = nil
	}
	sent := min(c.sent, len(p))
	c.sent -= sent
	c.mu.Unlock()
	n, err := c.out.Write(p[sent:])
	return sent + n, err
}

const checkInterval = time.Second / 2 // a client that has gone is noticed by the third check

// watch has the request of conn cancelled if the client goes before the response begins.
func (c *clientConn) watch(conn *serverConn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.watched = conn
	if !c.checked { // else the timer of an earlier request serves
		c.checked = true
		time.AfterFunc(checkInterval, c.check)
	}
}

// check cancels the request of a client that has gone. One that has closed its half is sent
// the first byte of any response, an H: the system of one that has gone then resets the
// connection. Over TLS, a half is closed without TCP noticing (RFC 8446, section 6.1).
func (c *clientConn) check() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.checked = c.watched != nil; !c.checked {
		return
	}
	switch n, err := peek(rawConn(c)); {
	case n > 0 || err == syscall.EAGAIN: // it is there
	case err != nil || c.watched.tls != nil:
		c.watched.cancel()
		c.watched = nil
	case c.sent == 0:
		c.sent, _ = c.TCPConn.Write([]byte("H"))
	}
	time.AfterFunc(checkInterval, c.check)
}

// watchClient is the layer around all others.
func watchClient(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn := connFrom(r.Context())
		c, ok := conn.Conn.(*clientConn)
		switch {
		case !ok || r.ProtoMajor == 2:
			next.ServeHTTP(w, r)
		case conn.tls != nil: // net/http cancels at a close_notify, behind which TCP may be open
			defer context.AfterFunc(r.Context(), func() { c.watch(conn) })()
			next.ServeHTTP(w, r.WithContext(conn.ctx))
		default:
			c.watch(conn)
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
	out := w.conn.out
	w.conn.out = held
	w.ResponseWriter.Write(p)
	http.NewResponseController(w.ResponseWriter).Flush()
	w.conn.out = out
	_, w.err = out.Write(held.Bytes())
	return len(p), w.err
}
