//go:build !plain

package main

import (
	"context"
	"errors"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// The connections of clients
//
// For HTTP/1 without TLS, two things that net/http does are done otherwise here:
//
//   - Beside each handler it waits for the connection to end, by a read of one byte:
//     a goroutine that sleeps and is woken up, and four deadlines. Here that read
//     returns at once, and a busy connection is looked at twice a second.
//   - It writes in two what is longer than its buffer of 4 KiB, and so wakes the
//     client twice. Here that goes out in one write.
//
// A client that has closed its half of the connection may have gone, or may wait for
// the response (as "nc -N" does). To tell, it is sent the first byte of the response,
// an H: the system of one that has gone resets the connection.
//
// This relies on connReader.startBackgroundRead of net/http (Go 1.26, server.go): it
// sets the read deadline to zero and reads one byte, which nothing else does, and gives
// up when it reads nothing without an error. Were that to change, the read would wait,
// which is slower, and TestNobodyReadsInBackground would fail.

// A clientConn is the connection of a client.
type clientConn struct {
	net.Conn
	raw        syscall.RawConn
	background atomic.Bool // the next read of one byte is the one that waits for the end
	watch      *time.Timer // calls look

	mu      sync.Mutex
	cancel  context.CancelFunc // of a request without a response so far; else nil
	watched bool               // watch runs
	probed  bool               // the first byte of the response is out already

	held *[]byte // what Write keeps for a oneWriter; nil while it keeps nothing
}

// A clientListener makes a clientConn of each connection that it accepts.
type clientListener struct{ net.Listener }

func watchedListener(l net.Listener) net.Listener { return clientListener{l} }

func (l clientListener) Accept() (net.Conn, error) {
	inner, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &clientConn{Conn: inner, raw: rawConn(inner)}
	c.watch = time.AfterFunc(lookAgain, c.look)
	c.watch.Stop()
	return c, nil
}

// NetConn returns the connection below, as [tls.Conn.NetConn] does.
func (c *clientConn) NetConn() net.Conn { return c.Conn }

// CloseWrite is how net/http ends a connection on which something may be unread.
func (c *clientConn) CloseWrite() error {
	return c.Conn.(interface{ CloseWrite() error }).CloseWrite()
}

// SetReadDeadline is how net/http begins to wait for the end: without a deadline.
func (c *clientConn) SetReadDeadline(t time.Time) error {
	c.background.Store(t.IsZero())
	return c.Conn.SetReadDeadline(t)
}

func (c *clientConn) Read(p []byte) (int, error) {
	if len(p) == 1 && c.background.CompareAndSwap(true, false) {
		return 0, nil
	}
	return c.Conn.Read(p)
}

// watchClient is the layer around all others that does both.
func watchClient(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		server := connFrom(r.Context())
		if c, ok := server.Conn.(*clientConn); ok && server.tls == nil && r.ProtoMajor == 1 {
			c.serve(server.cancel)
			one := &oneWriter{ResponseWriter: w, conn: c}
			next.ServeHTTP(one, r)
			if one.broken { // net/http takes the response for sent, and would serve another request
				panic(http.ErrAbortHandler)
			}
			return
		}
		if r.ProtoMajor == 1 { // net/http cancels at once; one that waits for the response gets a second
			ctx, cancel := context.WithCancel(context.WithoutCancel(r.Context()))
			defer cancel()
			defer context.AfterFunc(r.Context(), func() { time.AfterFunc(time.Second, cancel) })()
			r = r.WithContext(ctx)
		}
		next.ServeHTTP(w, r)
	})
}

const lookAgain = time.Second / 2 // a client that has gone is noticed by the third look

// serve has the connection looked at until the response begins.
func (c *clientConn) serve(cancel context.CancelFunc) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cancel = cancel
	if !c.watched { // else the timer of an earlier request serves: to set it costs more than a look
		c.watched = true
		c.watch.Reset(lookAgain)
	}
}

// look cancels the request of a client that has gone.
func (c *clientConn) look() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.watched = c.cancel != nil; !c.watched {
		return
	}
	n, err := peek(c.raw)
	switch {
	case n > 0 || err == syscall.EAGAIN || err == errors.ErrUnsupported: // it is there
	case err != nil:
		c.cancel()
		c.cancel = nil
	case !c.probed:
		n, _ := c.Conn.Write([]byte("H"))
		c.probed = n == 1
	}
	c.watch.Reset(lookAgain)
}

// Write writes a part of the response, but for a first byte that is out already.
func (c *clientConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	rest := p
	if c.probed && len(p) > 0 {
		c.probed, rest = false, p[1:]
	}
	c.mu.Unlock()
	if c.held != nil {
		*c.held = append(*c.held, rest...)
		return len(p), nil
	}
	n, err := c.Conn.Write(rest)
	return n + len(p) - len(rest), err
}

var heldBuffers = sync.Pool{New: func() any { return new([]byte) }}

// A oneWriter is a response that goes out in one write.
type oneWriter struct {
	http.ResponseWriter
	conn   *clientConn
	broken bool // it could not be written whole
}

func (w *oneWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// WriteHeader begins the response: it is too late to look for the client.
func (w *oneWriter) WriteHeader(status int) {
	w.conn.mu.Lock()
	w.conn.cancel = nil
	w.conn.mu.Unlock()
	w.ResponseWriter.WriteHeader(status)
}

// Write writes a whole body.
func (w *oneWriter) Write(p []byte) (int, error) {
	if len(p) <= 2<<10 || len(p) > smallBytes { // it fits into net/http's buffer, or is too large to copy
		return w.ResponseWriter.Write(p)
	}
	held := heldBuffers.Get().(*[]byte)
	defer heldBuffers.Put(held)
	*held, w.conn.held = (*held)[:0], held
	n, err := w.ResponseWriter.Write(p)
	err = errors.Join(err, http.NewResponseController(w.ResponseWriter).Flush())
	w.conn.held = nil
	if _, broken := w.conn.Conn.Write(*held); broken != nil {
		w.broken, err = true, broken
	}
	return n, err
}
