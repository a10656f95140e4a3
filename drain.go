package main

import (
	"context"
	"net/http"
	"slices"
	"time"
)

// How the service stops without failing a request. http.Server.Shutdown alone
// does not do it (net/http of Go 1.26): from the moment it is called, the server
// closes a connection whose request it has just read, without an answer, and that
// of a client which had connected and not been read yet. So before it is called
// there must be no such connection:
//
//  1. From the signal on, every answer says "Connection: close" (exchange.begin):
//     a client that is told so opens its next connection to the successor. No
//     connection becomes idle any more, and those that are leave one by one.
//  2. The listener is closed, after DRAIN_DELAY. When Serve has returned, every
//     connection that was accepted is known.
//  3. Idle connections get until lastCall to bring a request, and to be told.
//  4. Those that are still idle are closed. (SetKeepAlivesEnabled would do it as
//     well, but to net/http a connection is idle until the head of a request has
//     been parsed: here, one on which a byte has arrived is not.)
//  5. When the last request has been answered, Shutdown finds nothing to break.
//     HTTP/2 is what it does right: it says GOAWAY and waits.
//
// What remains is what HTTP/1.1 leaves open (RFC 9112, section 9.5): a client that
// was silent all that time, and whose request is on its way when its connection is
// closed. It gets no byte of an answer, and nothing of the request was done.

// lastCall is how long after the signal an idle connection stays open. It is a few
// times what a busy client leaves between two requests; connections that are idle
// for longer are as likely to be hit at any other moment.
const lastCall = 250 * time.Millisecond

// hangUp has the server give up waiting for a request on a connection, if it is
// idle and no byte of one is there. A deadline does that, and no harm to a request
// that is being read: the server sets the deadlines of its own when it begins to,
// and track restores the last one of them.
//
// A request of which only a part has arrived, and been read, when it is called is
// not seen: its caller gets no answer, and nothing of it was done.
func (cs *connections) hangUp(c *connection, readTimeout time.Duration, newToo bool) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if c.over != nil { // while it is new, it may be in its handshake
		newToo = false
	}
	if (c.state == http.StateIdle || c.state == http.StateNew && newToo) && !c.unread() {
		c.cutShort = readTimeout
		c.SetReadDeadline(time.Unix(1, 0)) // long ago
	}
}

// unread reports whether bytes have arrived that nobody has read.
func (c *connection) unread() bool {
	n, err := c.peek()
	return err == nil && n > 0
}

// open returns the connections of HTTP/1.
func (cs *connections) open() []*connection {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	return slices.DeleteFunc(append(cs.waiting.all(), cs.busy.all()...), func(c *connection) bool { return c.http2 })
}

// drain lets the requests of a server finish, from step 3 on: Serve has returned.
// Idle connections stay open until idleUntil. The error is that of ctx, if it ends
// before all is done.
func (cs *connections) drain(ctx context.Context, server *http.Server, idleUntil time.Time) error {
	newUntil := time.Now().Add(lastCall) // those that were accepted last have had no time before
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		open := cs.open()
		if len(open) == 0 {
			return server.Shutdown(ctx)
		}
		if time.Now().After(idleUntil) {
			for _, c := range open {
				cs.hangUp(c, server.ReadTimeout, time.Now().After(newUntil))
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
