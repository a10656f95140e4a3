package main

import (
	"cmp"
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
// response, connections whose request has just been read, or not yet. So there must be none:
//
//  1. From the signal on, every response says "Connection: close": the client's next
//     connection is to the successor.
//  2. The listener is closed, after DRAIN_DELAY. When Serve has returned, every connection
//     that was accepted is known.
//  3. Idle connections get idleGrace to bring a request, then they are closed.
//     (SetKeepAlivesEnabled would close those on which a part of a head has arrived, too.)
//  4. When the last request has got its response, Shutdown finds nothing to break. HTTP/2 it
//     does right: it sends GOAWAY and waits.
//
// What remains is what HTTP/1.1 leaves open (RFC 9112, section 9.5): a request that is on its
// way when its idle connection is closed gets no response. Nothing of it was done.
type server struct {
	http.Server
	draining atomic.Bool   // each response is the last of its connection
	max      int           // connections, at most: see makeRoom
	served   chan struct{} // closed when no connection is accepted any more
	log      *slog.Logger

	mu     sync.Mutex
	conns  map[net.Conn]*serverConn
	logged time.Time // when makeRoom has logged last
}

// A serverConn is one of the server's connections.
type serverConn struct {
	net.Conn                    // below TLS, if there is any
	tls      *tls.Conn          // nil without TLS
	ctx      context.Context    // ends with the connection, at the latest
	cancel   context.CancelFunc // of ctx

	// The rest is under the lock of the server.
	state   http.ConnState
	since   time.Time // when it came to that state
	http2   bool      // known once it is not new any more
	expired bool      // expireIdle has ended its wait for a request
}

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
		MaxHeaderBytes:    48 << 10, // a list of 1000 ids takes 40 KB
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		ConnState:         s.track,
		ConnContext:       s.connContext,

		DisableGeneralOptionsHandler: true, // exactPath answers OPTIONS * like all else

		// A connection of HTTP/2 may hold what one of HTTP/1 may. net/http has no time limit
		// for a head there, but while one is coming in no frame is complete: neither is the
		// response to a PING, which is due 5 s after the last frame.
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams:          32,
			MaxReadFrameSize:              smallBytes, // the least there is: each connection keeps a buffer of the largest
			MaxReceiveBufferPerConnection: 64 << 10,   // bytes
			MaxReceiveBufferPerStream:     64 << 10,
			SendPingTimeout:               2 * time.Second, // without a frame
			PingTimeout:                   3 * time.Second,
			WriteByteTimeout:              10 * time.Second, // without a byte read
		},
	}
	return s
}

// http2WriteBuffer is how much of its responses, in bytes, may lie in the kernel before
// a PING: a client that reads 350 kbit/s responds to that in time.
const http2WriteBuffer = 64 << 10

// serve serves until the listener is closed, which is no error. If ctx has ended before, it
// serves nobody: connections in the backlog are for the successor.
func (s *server) serve(ctx context.Context, listener net.Listener) error {
	defer close(s.served)
	if ctx.Err() != nil {
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

// idleGrace is how long an idle connection stays open in a stop: a few times what a busy
// client leaves between two requests.
const idleGrace = 250 * time.Millisecond

// stop stops the server as described above, in timeout once delay is over. The error is
// that requests had to be cut off.
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
		time.Sleep(2 * time.Millisecond)
	}
	if err := s.Shutdown(ctx); err != nil {
		s.Close()
		return fmt.Errorf("requests were cut off after SHUTDOWN_TIMEOUT (%v)", timeout)
	}
	return nil
}

// expireIdle closes, from idleUntil on, connections that wait for a request of which no byte
// is there. It returns how many connections of HTTP/1 are open.
//
// It does so by a read deadline, which does no harm to a request that has just come: net/http
// sets deadlines of its own when it reads one, and track restores the last of them. Only a
// request of which net/http has read a part gets no response.
func (s *server) expireIdle(idleUntil time.Time) (open int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.conns {
		if c.http2 {
			continue
		}
		open++
		handshake := c.state == http.StateNew && c.tls != nil
		if c.state == http.StateActive || handshake || time.Now().Before(idleUntil) {
			continue
		}
		if n, _ := peek(rawConn(c.Conn)); n == 0 {
			c.expired = true
			c.SetReadDeadline(time.Unix(1, 0)) // long ago
		}
	}
	return open
}

type connKey struct{}

// connFrom returns the connection of a request's context.
func connFrom(ctx context.Context) *serverConn { return ctx.Value(connKey{}).(*serverConn) }

// connContext is the ConnContext of the server: it makes a serverConn of each connection
// that is accepted.
func (s *server) connContext(ctx context.Context, conn net.Conn) context.Context {
	c := &serverConn{Conn: conn, since: time.Now()}
	if overTLS, ok := conn.(*tls.Conn); ok {
		c.Conn, c.tls = overTLS.NetConn(), overTLS
	}
	c.ctx, c.cancel = context.WithCancel(context.WithValue(ctx, connKey{}, c))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.makeRoom()
	s.conns[conn] = c
	return c.ctx
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
			rawConn(c.Conn).Control(func(fd uintptr) {
				syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_SNDBUF, http2WriteBuffer)
			})
		}
		if c.expired { // a request was there first: it is served all the same
			c.SetReadDeadline(time.Now().Add(s.ReadTimeout))
			c.expired = false
		}
	case http.StateClosed:
		delete(s.conns, conn)
		c.cancel()
	}
	c.state, c.since = state, time.Now()
}

// maxConns bounds memory, since net/http takes some 20 KB for each connection.
const maxConns = 10_000

// maxConnections returns how many connections a server may have: as many as the process may
// have files, less reserved ones, which are for PostgreSQL, up to [maxConns].
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
	var oldest *serverConn
	for conn, c := range s.conns {
		if oldest == nil || c.closesBefore(oldest) {
			key, oldest = conn, c
		}
	}
	delete(s.conns, key)
	oldest.cancel()
	oldest.Close() // and not TLS, which would wait for the client to read its close_notify
	if time.Since(s.logged) > time.Second {
		s.log.Warn("too many connections: those that were idle the longest are closed", "max", s.max)
		s.logged = time.Now()
	}
}

// closesBefore reports whether makeRoom is to close c rather than other.
func (c *serverConn) closesBefore(other *serverConn) bool {
	active, otherActive := c.state == http.StateActive, other.state == http.StateActive
	if active != otherActive {
		return otherActive
	}
	return c.since.Before(other.since)
}

// rawConn returns the file descriptor of a connection, or nil if it has none.
func rawConn(conn net.Conn) (raw syscall.RawConn) {
	switch c := conn.(type) {
	case interface{ NetConn() net.Conn }:
		return rawConn(c.NetConn())
	case syscall.Conn:
		raw, _ = c.SyscallConn()
	}
	return raw
}

// peek returns how many bytes have arrived that nobody has read, up to one. It does not
// wait: [syscall.EAGAIN] is nothing yet, 0 without an error is the end of what the peer
// sends, and any other error is the end of the connection.
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
	return max(n, 0), cmp.Or(closed, err)
}
