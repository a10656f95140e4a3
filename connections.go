package main

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"
)

// What the service knows of its connections. What it does with that is elsewhere:
//
//	socket_linux.go  reads and writes, as for those of PostgreSQL
//	onewrite.go      sends each answer in one piece
//	gone.go          sees whose caller has gone
//	limits.go        keeps them to a number
//	drain.go         ends them without failing a request

// A connection is one of the server's; below TLS, if there is any.
type connection struct {
	socket
	gathered *[]byte // of the answer that is to go out in one piece; nil: what is written goes out at once
	presence         // of the caller

	// The rest is under the lock of connections.
	state      http.ConnState
	over       *tls.Conn       // nil without TLS
	http2      bool            // known once it is not new any more
	list       *connectionList // where it stands; nil when it has been closed
	prev, next *connection     // in list
	cutShort   time.Duration   // what a request has to be read in, if hangUp has cut that short; else 0
}

// CloseWrite is what net/http says good-bye with where there may be something
// that it has not read: to close all at once would take the answer back.
func (c *connection) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}

// connections are all of a server's. They are safe for concurrent use.
type connections struct {
	most int // see makeRoom
	log  *slog.Logger

	mu sync.Mutex
	// Those between requests, the new ones among them, and those within one, each
	// in the order in which they came to be so.
	waiting, busy connectionList
	closed        int       // for newcomers, since it was last logged
	logged        time.Time // when that was
}

// newConnections keeps the connections to so many: see makeRoom.
func newConnections(most int, log *slog.Logger) *connections {
	return &connections{most: most, log: log}
}

// track is the ConnState of an [http.Server] whose connections come from a
// connectionListener.
func (cs *connections) track(conn net.Conn, state http.ConnState) {
	over, _ := conn.(*tls.Conn)
	if over != nil {
		conn = over.NetConn()
	}
	c := conn.(*connection)
	if state == http.StateNew {
		cs.makeRoom()
	}
	cs.mu.Lock()
	defer cs.mu.Unlock()
	switch state {
	case http.StateNew:
		c.over = over
		cs.waiting.add(c)
	case http.StateActive, http.StateIdle:
		if c.state == http.StateNew && over != nil { // the handshake is over
			c.http2 = over.ConnectionState().NegotiatedProtocol == "h2"
			if tcp, ok := c.Conn.(*net.TCPConn); ok && c.http2 {
				tcp.SetWriteBuffer(http2WriteBuffer)
			}
		}
		if c.list != nil { // else makeRoom has closed it
			c.list.remove(c)
			if state == http.StateActive {
				cs.busy.add(c)
			} else {
				cs.waiting.add(c)
			}
		}
		if c.cutShort > 0 { // a request was there first: it is served all the same
			c.SetReadDeadline(time.Now().Add(c.cutShort))
			c.cutShort = 0
		}
	default:
		if c.list != nil {
			c.list.remove(c)
		}
	}
	c.state = state
}

// A connectionList is a list in which nothing need be allocated or looked for,
// with several changes for each request.
type connectionList struct {
	first, last *connection
	len         int
}

func (l *connectionList) add(c *connection) {
	c.list, c.prev, c.next = l, l.last, nil
	if l.last == nil {
		l.first = c
	} else {
		l.last.next = c
	}
	l.last = c
	l.len++
}

func (l *connectionList) remove(c *connection) {
	if c.prev == nil {
		l.first = c.next
	} else {
		c.prev.next = c.next
	}
	if c.next == nil {
		l.last = c.prev
	} else {
		c.next.prev = c.prev
	}
	c.list, c.prev, c.next = nil, nil, nil
	l.len--
}

// all returns what is in the list now.
func (l *connectionList) all() []*connection {
	conns := make([]*connection, 0, l.len)
	for c := l.first; c != nil; c = c.next {
		conns = append(conns, c)
	}
	return conns
}

// A connectionListener makes a connection of each one that it accepts.
type connectionListener struct{ net.Listener }

func (l connectionListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &connection{socket: newSocket(c)}, nil
}

// connectionKey is what a request's context knows its connection by: a *connection,
// or with TLS the [*tls.Conn] on one.
type connectionKey struct{}

// withConnection is the ConnContext of an [http.Server] behind a connectionListener.
func withConnection(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, connectionKey{}, conn)
}
