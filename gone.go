package main

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Whose caller has gone
//
// The work of a caller who has given up is not done to its end: in an overload,
// it would be most of the work. net/http finds such callers by a read that waits,
// beside the handler, for the connection to end. That takes a goroutine which
// sleeps and is woken up, and four deadlines, for each request: up to a tenth of
// the cost of all. So here it does not wait, and twice a second watch looks after the
// few who are still being served.
//
// A caller who has closed its half of the connection may be gone, or may only
// have said all that it has to say and wait for the answer (as "nc -N" does): TCP
// does not tell. So it has the grace to be answered in.

// grace is for how long, at least, the service works on for a caller who seems to
// be gone; it is at most twice as long.
const grace = time.Second

// presence is what a connection knows of its caller.
type presence struct {
	waits atomic.Bool // the next read of one byte is that of net/http that waits for the end

	mu   sync.Mutex
	end  func()    // ends the work for the request that is being served; nil when there is none
	gone time.Time // since when the caller has seemed to be; zero if not at the last look
}

// SetReadDeadline is how net/http begins to wait for the end: whatever else it
// reads, this server has it read with a deadline.
func (c *connection) SetReadDeadline(t time.Time) error {
	c.waits.Store(t.IsZero())
	return c.Conn.SetReadDeadline(t)
}

// Read reads, but does not wait for the end of the connection: to that it says
// once, as an [io.Reader] may, that nothing happened, and net/http leaves it at that.
func (c *connection) Read(p []byte) (int, error) {
	if len(p) == 1 && c.waits.CompareAndSwap(true, false) {
		return 0, nil
	}
	return c.socket.Read(p)
}

// serving notes how to end the work for the request that is being served from now
// on; nil says that it is served.
func (p *presence) serving(end func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.end, p.gone = end, time.Time{}
}

// endWork ends the work for the request that is being served, if there is one.
func (p *presence) endWork() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.end != nil {
		p.end()
	}
}

// look ends the work for a caller who has been gone for grace.
func (c *connection) look() {
	c.presence.mu.Lock()
	defer c.presence.mu.Unlock()
	if c.end == nil {
		return
	}
	n, err := c.peek()
	switch gone := n == 0 && err != syscall.EAGAIN && err != errors.ErrUnsupported; {
	case !gone:
		c.gone = time.Time{}
	case c.gone.IsZero():
		c.gone = time.Now()
	case time.Since(c.gone) >= grace:
		c.end()
	}
}

// watch looks after the callers who are being served, until ctx ends.
func (cs *connections) watch(ctx context.Context) {
	tick := time.NewTicker(grace / 2)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		cs.mu.Lock()
		busy := cs.busy.all()
		cs.mu.Unlock()
		for _, c := range busy {
			c.look()
		}
	}
}

// whileThere calls end when the caller of r has been gone for grace, until stop is
// called. Those who come by TLS, net/http waits for itself; one that has ended its
// stream of HTTP/2 can't be answered any more.
func whileThere(w http.ResponseWriter, r *http.Request, end func()) (stop func()) {
	if c := exchangeOf(w).conn; c != nil {
		c.serving(end)
		return func() { c.serving(nil) }
	}
	forget := context.AfterFunc(r.Context(), func() {
		if r.ProtoMajor == 2 {
			end()
		} else {
			time.AfterFunc(grace, end)
		}
	})
	return func() { forget() }
}
