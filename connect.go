package main

import (
	"context"
	"database/sql/driver"
	"fmt"
	"net"
	"time"

	"github.com/lib/pq"
)

// What the connections to PostgreSQL have that lib/pq's own don't: an end to
// statements that take too long, on PostgreSQL's side, and an end to waiting for
// one that does not answer at all, on ours.

// limited makes connections on which PostgreSQL ends every statement that takes
// longer than limit; 0 is no limit. It is set by a statement, since not every
// pooler lets it be a parameter of the connection.
type limited struct {
	*pq.Connector
	limit time.Duration
}

func (l limited) Connect(ctx context.Context) (driver.Conn, error) {
	c, err := l.Connector.Connect(ctx)
	if err != nil || l.limit == 0 {
		return c, err
	}
	text := fmt.Sprintf("SET statement_timeout = %d", max(1, l.limit.Milliseconds()))
	if _, err := c.(driver.ExecerContext).ExecContext(ctx, text, nil); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// A dialer connects to PostgreSQL. Its connections give up on a server that is
// silent for longer than patience while an answer is due: a network that
// swallows packets would otherwise hold a connection for a quarter of an hour.
type dialer struct {
	net.Dialer
	patience time.Duration // 0: no limit
}

// DialTimeout completes [pq.Dialer]. lib/pq prefers DialContext.
func (d *dialer) DialTimeout(network, address string, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return d.DialContext(ctx, network, address)
}

func (d *dialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	c, err := d.Dialer.DialContext(ctx, network, address)
	if err != nil || d.patience == 0 {
		return c, err
	}
	return &impatientConn{Conn: c, patience: d.patience}, nil
}

// An impatientConn limits how long a Read waits. lib/pq reads only when an
// answer is due, so an idle connection never runs into the limit.
type impatientConn struct {
	net.Conn
	patience time.Duration
	explicit bool      // lib/pq has set a deadline of its own: it is connecting
	counted  time.Time // from when patience counts
}

func (c *impatientConn) SetDeadline(t time.Time) error {
	c.explicit, c.counted = !t.IsZero(), time.Time{}
	return c.Conn.SetDeadline(t)
}

func (c *impatientConn) Read(p []byte) (int, error) {
	// To set it anew ten times a second is exact enough, and costs a busy connection nothing.
	if now := time.Now(); !c.explicit && now.Sub(c.counted) > time.Second/10 {
		c.counted = now
		c.Conn.SetReadDeadline(now.Add(c.patience + time.Second/10))
	}
	return c.Conn.Read(p)
}
