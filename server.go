package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// A server is an [http.Server] that bounds its connections, and that stops without failing a
// request. http.Server.Shutdown alone does not (net/http of Go 1.26): it closes, without a
// response, connections whose request has just been read, and those that have not been read
// yet. So before it is called there must be none of them:
//
//  1. From the signal on, every response says "Connection: close": no connection becomes idle
//     any more, and the client's next one is to the successor.
//  2. The listener is closed, after DRAIN_DELAY. When Serve has returned, every connection
//     that was accepted is known.
//  3. Idle connections get idleGrace to bring a request, and to be told.
//  4. Those that are still idle are closed. (SetKeepAlivesEnabled would close those on which a
//     byte has arrived, too: to net/http they are idle until a whole head is there.)
//  5. When the last request has got its response, Shutdown finds nothing to break. HTTP/2 it
//     does right: it sends GOAWAY and waits.
//
// What remains is what HTTP/1.1 leaves open (RFC 9112, section 9.5): a client that was silent
// all that time, and whose request is on its way when its connection is closed. It gets no
// byte of a response, and nothing of the request was done.
type server struct {
	http.Server
	draining atomic.Bool   // each response is the last of its connection
	max      int           // connections, at most: see makeRoom
	served   chan struct{} // closed when no connection is accepted any more
	log      *slog.Logger

	mu     sync.Mutex
	conns  map[net.Conn]*serverConn
	logged time.Time // when a connection was last said to be closed for another one
}

// A serverConn is one of the server's connections.
type serverConn struct {
	net.Conn                    // below TLS, if there is any
	tls      *tls.Conn          // nil without TLS
	cancel   context.CancelFunc // ends the requests that are being served

	// The rest is under the lock of the server.
	state   http.ConnState
	rank    time.Time // when it came to that state, or, within a request, a week later: see makeRoom
	http2   bool      // known once it is not new any more
	expired bool      // expireIdle has ended its wait for a request
}

// http2Limits keeps a connection of HTTP/2 to what one of HTTP/1 may hold. net/http
// has no time limit for a head there, but while one is coming in no frame is complete:
// neither is the response to a PING, which is due 5 s after the last frame.
var http2Limits = &http.HTTP2Config{
	MaxConcurrentStreams:          32,
	MaxReadFrameSize:              smallBytes, // the least there is: each connection keeps a buffer of the largest
	MaxReceiveBufferPerConnection: 64 << 10,   // bytes
	MaxReceiveBufferPerStream:     64 << 10,
	SendPingTimeout:               2 * time.Second, // without a frame
	PingTimeout:                   3 * time.Second,
	WriteByteTimeout:              10 * time.Second, // without a byte read
}

// http2WriteBuffer is how much of its responses, in bytes, may lie in the kernel before
// a PING: a client that reads 350 kbit/s responds to that in time.
const http2WriteBuffer = 64 << 10

// newServer returns the server of the configuration. It has no handler yet.
func newServer(cfg config, log *slog.Logger) *server {
	s := &server{
		max:    maxConnections(2*cfg.dbMaxConns + 64), // a statement that is cancelled takes two
		served: make(chan struct{}),
		log:    log,
		conns:  make(map[net.Conn]*serverConn),
	}
	s.Server = http.Server{
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       5*time.Second + cfg.requestTimeout,  // headers, then the body
		WriteTimeout:      30*time.Second + cfg.requestTimeout, // from the headers on: handler, then the response
		IdleTimeout:       120 * time.Second,
		MaxHeaderBytes:    32 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		ConnState:         s.track,
		ConnContext:       s.connContext,
		HTTP2:             http2Limits,

		DisableGeneralOptionsHandler: true, // exactPath answers OPTIONS * like all else
	}
	return s
}

// serve serves until the listener is closed, which is no error. When ctx has ended
// before, it serves nobody.
func (s *server) serve(ctx context.Context, listener net.Listener) error {
	defer close(s.served)
	if ctx.Err() != nil { // those that wait in the backlog are for the successor
		return nil
	}

	var err error
	if s.TLSConfig != nil {
		err = s.ServeTLS(listener, "", "")
	} else {
		err = s.Serve(listener)
	}
	if errors.Is(err, http.ErrServerClosed) || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// idleGrace is how long an idle connection stays open in a stop. It is a few times what a
// busy client leaves between two requests; connections that are idle for longer are as
// likely to be hit at any other moment.
const idleGrace = 250 * time.Millisecond

// stop stops the server, as described above, in timeout at most once delay is over. The
// error is that requests had to be cut off.
func (s *server) stop(listener net.Listener, delay, timeout time.Duration) error {
	s.draining.Store(true)
	select {
	case <-time.After(delay):
	case <-s.served:
	}
	listener.Close()
	<-s.served
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	idleUntil := time.Now().Add(min(idleGrace, timeout/2))
	for s.expireIdle(idleUntil) > 0 && ctx.Err() == nil {
		time.Sleep(2 * time.Millisecond) // until the next look
	}
	if err := s.Shutdown(ctx); err != nil {
		s.Close()
		return fmt.Errorf("requests were cut off after SHUTDOWN_TIMEOUT (%v)", timeout)
	}
	return nil
}

// expireIdle has the server give up, from idleUntil on, on connections that wait for a
// request of which no byte is there. It returns how many of HTTP/1 there are.
//
// A deadline does that, and no harm to a request that is being read: the server sets the
// deadlines of its own when it begins to, and track restores the last one of them. A request
// of which a part has been read is not seen: it gets no response, and nothing of it was done.
func (s *server) expireIdle(idleUntil time.Time) (open int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.conns {
		if c.http2 {
			continue
		}
		open++
		if c.state == http.StateActive || c.state == http.StateNew && c.tls != nil || time.Now().Before(idleUntil) {
			continue // with TLS, a new one may be in its handshake
		}
		if n, err := peek(rawConn(c.Conn)); n == 0 || err != nil {
			c.expired = true
			c.SetReadDeadline(time.Unix(1, 0)) // long ago
		}
	}
	return open
}

type connKey struct{}

// connFrom returns the connection of a request's context.
func connFrom(ctx context.Context) *serverConn { return ctx.Value(connKey{}).(*serverConn) }

// connContext is the ConnContext of the server, which calls it with each connection that
// it has accepted. It returns a context that ends with the connection, at the latest.
func (s *server) connContext(ctx context.Context, conn net.Conn) context.Context {
	c := &serverConn{Conn: conn, rank: time.Now()}
	if overTLS, ok := conn.(*tls.Conn); ok {
		c.Conn, c.tls = overTLS.NetConn(), overTLS
	}
	ctx, c.cancel = context.WithCancel(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.makeRoom()
	s.conns[conn] = c
	return context.WithValue(ctx, connKey{}, c)
}

// track is the ConnState of the server.
func (s *server) track(conn net.Conn, state http.ConnState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.conns[conn]
	if c == nil { // closed by makeRoom
		return
	}
	switch state {
	case http.StateActive, http.StateIdle:
		if c.state == http.StateNew && c.tls != nil && c.tls.ConnectionState().NegotiatedProtocol == "h2" {
			c.http2 = true
			rawConn(conn).Control(func(fd uintptr) {
				syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_SNDBUF, http2WriteBuffer)
			})
		}
		if c.expired { // a request was there first: it is served all the same
			c.SetReadDeadline(time.Now().Add(s.ReadTimeout))
			c.expired = false
		}
	case http.StateClosed, http.StateHijacked:
		delete(s.conns, conn)
		c.cancel()
	}
	c.state, c.rank = state, time.Now()
	if state == http.StateActive {
		c.rank = c.rank.AddDate(0, 0, 7)
	}
}

// maxConns bounds memory, since net/http takes some 20 KB for each connection.
const maxConns = 10_000

// maxConnections returns how many connections a server may have: as many as the
// process may have files, less reserved ones, up to [maxConns]. Beyond that,
// accept(2) would fail with EMFILE: then not even health gets in, and no new
// connection to PostgreSQL comes about.
func maxConnections(reserved int) int {
	var files syscall.Rlimit
	syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files) // the soft limit, which the os package has raised to the hard one
	return max(int(min(files.Cur, uint64(maxConns+reserved)))-reserved, 8)
}

// makeRoom closes a connection if there are as many as there may be: the one that has
// waited the longest for its next request, or, when none does, the one that has been
// within one the longest.
func (s *server) makeRoom() {
	if len(s.conns) < s.max {
		return
	}
	var key net.Conn
	var victim *serverConn
	for conn, c := range s.conns {
		if victim == nil || c.rank.Before(victim.rank) {
			key, victim = conn, c
		}
	}
	delete(s.conns, key)
	victim.cancel()
	victim.Close() // and not TLS, which would wait for the client to read its close_notify
	if time.Since(s.logged) > time.Second {
		s.log.Warn("too many connections: those that were idle the longest are closed", "max", s.max)
		s.logged = time.Now()
	}
}

// rawConn returns the file descriptor of a connection, or nil if it has none.
func rawConn(c net.Conn) syscall.RawConn {
	switch inner := c.(type) {
	case interface{ NetConn() net.Conn }:
		return rawConn(inner.NetConn())
	case syscall.Conn:
		raw, _ := inner.SyscallConn()
		return raw
	default:
		return nil
	}
}

// peek returns how many bytes have arrived that nobody has read, up to one. It does
// not wait: [syscall.EAGAIN] is nothing yet, 0 without an error is the end, and any
// other error is one, too.
func peek(raw syscall.RawConn) (n int, err error) {
	if raw == nil {
		return 0, errors.ErrUnsupported
	}
	closed := raw.Control(func(fd uintptr) {
		var b [1]byte
		for err = syscall.EINTR; err == syscall.EINTR; {
			n, _, err = syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		}
		if n == 0 && err == nil { // behind the end, reading tells of no reset
			if errno, _ := syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_ERROR); errno != 0 {
				err = syscall.Errno(errno)
			}
		}
	})
	if closed != nil {
		return 0, closed
	}
	return max(n, 0), err
}
