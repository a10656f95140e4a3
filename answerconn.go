package main

import (
	"context"
	"net"
	"sync"
)

// One write an answer. By itself, net/http writes in two what is longer than its
// buffer of 4 KiB, and so wakes the caller twice: for a page of 20 users, a
// seventh of the whole cost.

// An answerConn is a connection on which an answer can go out in one piece: see
// exchange.write.
type answerConn struct {
	net.Conn
	gathered *[]byte // nil: what is written goes out at once
}

var gatherings = sync.Pool{New: func() any { return new([]byte) }}

// gather holds back what is written from now on, until send. It is for the
// goroutine that serves the connection's requests: nobody else writes to it.
func (c *answerConn) gather() { c.gathered = gatherings.Get().(*[]byte) }

// send writes what was held back.
func (c *answerConn) send() error {
	err := c.flush()
	gatherings.Put(c.gathered)
	c.gathered = nil
	return err
}

func (c *answerConn) flush() (err error) {
	if len(*c.gathered) > 0 {
		_, err = c.Conn.Write(*c.gathered)
		*c.gathered = (*c.gathered)[:0]
	}
	return err
}

func (c *answerConn) Write(p []byte) (int, error) {
	if c.gathered == nil {
		return c.Conn.Write(p)
	}
	if len(*c.gathered)+len(p) <= smallBytes { // what is larger is not copied: one more write costs less
		*c.gathered = append(*c.gathered, p...)
		return len(p), nil
	}
	if err := c.flush(); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}

// NetConn returns the connection below, as [tls.Conn.NetConn] does.
func (c *answerConn) NetConn() net.Conn { return c.Conn }

// CloseWrite is what net/http says good-bye with where there may be something
// that it has not read: to close all at once would take the answer back.
func (c *answerConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}

// An answerListener makes an answerConn of each connection.
type answerListener struct{ net.Listener }

func (l answerListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &answerConn{Conn: c}, nil
}

// connKey is what a request's context knows its connection by.
type connKey struct{}

// withAnswerConn is the ConnContext of an [http.Server] behind an answerListener.
// TLS is left alone: it also writes from the goroutine that reads (RFC 8446,
// section 4.6.3), and its Close waits for what is being written below it.
func withAnswerConn(ctx context.Context, c net.Conn) context.Context {
	if answers, ok := c.(*answerConn); ok {
		return context.WithValue(ctx, connKey{}, answers)
	}
	return ctx
}
