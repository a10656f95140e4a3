package main

import (
	"context"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
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
//  4. Keep-alive is switched off, which closes the idle connections and drops no
//     request that was read.
//  5. When the last request has been answered, Shutdown finds nothing to break.
//     (HTTP/2 is what it does right: it says GOAWAY and waits.)
//
// What remains is what HTTP/1.1 leaves open (RFC 9112, section 9.5): a client that
// was silent all that time and sends a request just when its idle connection is
// closed. It gets no byte of an answer, and nothing of the request was done.

// lastCall is how long after the signal an idle connection stays open. It is a few
// times what a busy client leaves between two requests; connections that are idle
// for longer are as likely to be hit at any other moment.
const lastCall = 250 * time.Millisecond

// connections knows the state of each connection of a server.
type connections struct {
	states sync.Map // of net.Conn to *atomic.Int32, an http.ConnState
}

// track is the ConnState of an [http.Server].
func (c *connections) track(conn net.Conn, state http.ConnState) {
	switch state {
	case http.StateNew:
		c.states.Store(conn, new(atomic.Int32)) // StateNew is 0
	case http.StateHijacked, http.StateClosed:
		c.states.Delete(conn)
	default:
		if s, ok := c.states.Load(conn); ok {
			s.(*atomic.Int32).Store(int32(state))
		}
	}
}

// count returns how many connections are busy with a request, or may bring their
// first one any moment, and how many are idle.
func (c *connections) count() (busy, idle int) {
	for _, s := range c.states.Range {
		if http.ConnState(s.(*atomic.Int32).Load()) == http.StateIdle {
			idle++
		} else {
			busy++
		}
	}
	return busy, idle
}

// drain lets the requests of a server finish, from step 3 on: Serve has returned.
// Idle connections stay open until idleUntil. The error is that of ctx, if it ends
// before all is done.
func (c *connections) drain(ctx context.Context, server *http.Server, idleUntil time.Time) error {
	await := func(condition func() bool) error {
		tick := time.NewTicker(2 * time.Millisecond)
		defer tick.Stop()
		for !condition() {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	}
	if err := await(func() bool { _, idle := c.count(); return idle == 0 || time.Now().After(idleUntil) }); err != nil {
		return err
	}
	server.SetKeepAlivesEnabled(false)
	if err := await(func() bool { busy, _ := c.count(); return busy == 0 }); err != nil {
		return err
	}
	return server.Shutdown(ctx)
}
