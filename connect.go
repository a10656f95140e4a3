package main

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"reflect"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// What the connections to PostgreSQL have that lib/pq's own don't: an end to
// statements that take too long, on PostgreSQL's side, an end to waiting for one
// that does not answer at all, on ours, and a look at each connection before it
// is used again. For that look: whoever sends a statement on a connection that
// is dead already can't know afterwards whether it was done.
//
// And they know whether they lead to a session of their own. Behind a pooler, which
// lends the sessions of PostgreSQL to its clients for a transaction each, a
// statement's name (lib/pq numbers them: 1, 2, 3) may be that of another client's
// statement, and what is set for a session stays there for others. So nothing is
// prepared or set before it is known who answers. PostgreSQL tells each client, when it
// connects, the process by which its statements are cancelled (BackendKeyData: its
// manual, "Start-up" in "Message Flow"), and that is the one that serves it. A pooler has
// to tell something of its own. What was told, lib/pq keeps to itself, in the field pid
// that conn.startup sets (its conn.go): were it not there any more, nothing would be
// prepared, and TestPoolerUnannounced would fail.

// A connector makes the connections of a pool. It is a [driver.Connector].
type connector struct {
	database pq.Config
	session  string        // statements that each session of our own begins with
	patience time.Duration // after which a silent PostgreSQL is given up; 0: never
	identify bool          // ask who serves a connection
	log      *slog.Logger
	// pooled is whether there is a pooler: no statement is prepared any more. It
	// never becomes false again.
	pooled atomic.Bool
	// age is how often the connections had to be given up; those made before the
	// last time are not used again.
	age atomic.Int64
}

// A connectError says why there is no connection: nothing has been sent.
type connectError struct{ error }

func (e connectError) Unwrap() error { return e.error }

// Driver completes [driver.Connector].
func (c *connector) Driver() driver.Driver { return new(pq.Driver) }

// errUnsent is what an error is that came before anything was sent.
var errUnsent = errors.New("nothing was sent")

// Is says so of all connectErrors.
func (e connectError) Is(target error) bool { return target == errUnsent }

// Connect connects to one of the configured hosts. All its errors are
// connectErrors. What a session needs is set by statements, since not every pooler
// lets it be parameters of the connection.
func (c *connector) Connect(ctx context.Context) (driver.Conn, error) {
	if c.patience != 0 { // ctx may have no deadline: see runOnce
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.patience)
		defer cancel()
	}
	age := c.age.Load()
	one, err := pq.NewConnectorConfig(c.database)
	if err != nil {
		return nil, connectError{err}
	}
	dial := &dialer{patience: c.patience, connecting: true}
	one.Dialer(dial)
	made, err := one.Connect(ctx)
	if c.database.SSLMode == pq.SSLModePrefer && pq.As(err, pqerror.InvalidAuthorizationSpecification) != nil {
		// pg_hba.conf may admit us without TLS alone (hostnossl). As libpq does, try
		// that too; the other way round, for sslmode=allow, lib/pq does by itself.
		plain := c.database
		plain.SSLMode = pq.SSLModeDisable
		refused := err
		if one, err = pq.NewConnectorConfig(plain); err == nil {
			one.Dialer(dial)
			if made, err = one.Connect(ctx); err != nil {
				err = errors.Join(refused, err)
			}
		}
	}
	dial.connecting = false
	if err != nil {
		dial.closeLast()
		return nil, connectError{err}
	}
	cn := &conn{pqConn: made.(pqConn), socket: dial.last, connector: c, age: age}
	if c.identify && !c.pooled.Load() {
		if cn.backend, err = identify(ctx, cn); err != nil {
			made.Close()
			return nil, connectError{err}
		}
		if cn.backend.pid != cancelledBy(made) {
			cn.backend = backend{} // the next statement may be another one's
			c.findPooler()
		}
	}
	if c.session != "" && !c.pooled.Load() {
		if _, err := cn.ExecContext(ctx, c.session, nil); err != nil {
			made.Close()
			return nil, connectError{err}
		}
	}
	return cn, nil
}

// cancelledBy returns the process id that lib/pq was told to cancel the statements
// of a connection by, or 0.
func cancelledBy(c driver.Conn) int64 {
	pid := reflect.Indirect(reflect.ValueOf(c)).FieldByName("pid")
	if !pid.IsValid() || !pid.CanInt() {
		return 0
	}
	return pid.Int()
}

// findPooler notes that there is a pooler. Connections that have prepared statements
// are not used again.
func (c *connector) findPooler() {
	if c.pooled.CompareAndSwap(false, true) {
		c.age.Add(1)
		c.log.Warn("PostgreSQL is behind a connection pooler: no statement is prepared any more; add binary_parameters=yes to DATABASE_URL, or connect directly")
	}
}

// A backend is the process of PostgreSQL that serves a connection. Process ids
// come back; together with the time of its start it is the same one.
type backend struct {
	pid     int64
	started string
}

// identify returns the backend of a connection.
func identify(ctx context.Context, c driver.QueryerContext) (b backend, err error) {
	rows, err := c.QueryContext(ctx, "SELECT pid, backend_start::text FROM pg_stat_activity WHERE pid = pg_backend_pid()", nil)
	if err != nil {
		return b, err
	}
	defer rows.Close()
	values := make([]driver.Value, 2)
	if err := rows.Next(values); err != nil {
		return b, err
	}
	var ok [2]bool
	b.pid, ok[0] = values[0].(int64)
	b.started, ok[1] = values[1].(string)
	if !ok[0] || !ok[1] {
		return b, fmt.Errorf("pg_stat_activity has %T, %T", values[0], values[1])
	}
	return b, nil
}

// pqConn is what database/sql makes use of in a connection of lib/pq.
type pqConn interface {
	driver.Conn
	driver.ConnBeginTx
	driver.ConnPrepareContext
	driver.ExecerContext
	driver.NamedValueChecker
	driver.Pinger
	driver.QueryerContext
	driver.SessionResetter
	driver.Validator
}

// A conn is a connection of lib/pq that is looked at before it is used again.
type conn struct {
	pqConn
	socket    socket
	connector *connector
	age       int64
	backend   backend // the zero backend where it is not known
}

// sentOnce is an argument with which a statement is sent once at most. Where a
// connection breaks, database/sql repeats its statement on another one without a
// word, whether or not it has been done.
type sentOnce struct {
	value any
	to    **backend // who got it; nil: nobody so far
}

// errSentBefore is what a statement with a sentOnce meets the second time.
var errSentBefore = errors.New("the connection broke before the answer came")

// CheckNamedValue completes [driver.NamedValueChecker]: database/sql calls it for
// each argument, just before it sends the statement.
func (c *conn) CheckNamedValue(nv *driver.NamedValue) error {
	if once, ok := nv.Value.(sentOnce); ok {
		if *once.to != nil {
			return errSentBefore
		}
		*once.to = &c.backend
		nv.Value = once.value
	}
	return c.pqConn.CheckNamedValue(nv)
}

// ResetSession completes [driver.SessionResetter]: database/sql calls it before
// it uses the connection again, and on [driver.ErrBadConn] takes another one.
func (c *conn) ResetSession(ctx context.Context) error {
	if c.age != c.connector.age.Load() || isOver(c.socket) {
		return driver.ErrBadConn
	}
	return c.pqConn.ResetSession(ctx)
}

// PrepareContext completes [driver.ConnPrepareContext].
func (c *conn) PrepareContext(ctx context.Context, text string) (driver.Stmt, error) {
	s := &statement{conn: c, text: text}
	return s, s.prepare(ctx)
}

// isShared reports whether err tells that a prepared statement is not there, or is
// not ours, and so that the session is not ours alone.
func (c *conn) isShared(err error) bool {
	if pq.As(err, pqerror.InvalidSQLStatementName, pqerror.DuplicatePstatement, pqerror.ProtocolViolation) == nil {
		return false
	}
	c.connector.findPooler()
	return true
}

// A statement is a prepared one, or behind a pooler one whose text is sent each time,
// in one message with its parameters (lib/pq's binary_parameters).
type statement struct {
	driver.Stmt // nil: it is not prepared
	conn        *conn
	text        string
}

// prepare has PostgreSQL prepare the statement, but not behind a pooler.
func (s *statement) prepare(ctx context.Context) error {
	if s.conn.connector.pooled.Load() {
		return nil
	}
	prepared, err := s.conn.pqConn.PrepareContext(ctx, s.text)
	if err == nil {
		s.Stmt = prepared
	} else if s.conn.isShared(err) {
		return nil
	}
	return err
}

// Close completes [driver.Stmt]. Behind a pooler it might close another client's.
func (s *statement) Close() error {
	if s.Stmt == nil || s.conn.connector.pooled.Load() {
		return nil
	}
	return s.Stmt.Close()
}

// NumInput completes [driver.Stmt]: PostgreSQL knows how many parameters there are.
func (s *statement) NumInput() int { return -1 }

// QueryContext completes [driver.StmtQueryContext].
func (s *statement) QueryContext(ctx context.Context, args []driver.NamedValue) (driver.Rows, error) {
	if s.Stmt == nil {
		if err := s.prepare(ctx); err != nil {
			return nil, err
		}
	}
	if s.Stmt != nil {
		rows, err := s.Stmt.(driver.StmtQueryContext).QueryContext(ctx, args)
		refused := pq.As(err)
		switch {
		case refused == nil:
			return rows, err
		case s.conn.isShared(err):
			if refused.Code == pqerror.ProtocolViolation { // or a pooler has lost the answer: see [store.run]
				return nil, err
			}
		case refused.Code == pqerror.FeatureNotSupported || refused.Code.Class() == "42":
			// The table may have changed since ("cached plan must not change result type"),
			// or what PostgreSQL takes the parameters for. The next use prepares it anew; this
			// one does not, since the table might change again in between.
			s.Close()
		default:
			return nil, err
		}
		s.Stmt = nil
	}
	return s.conn.QueryContext(ctx, s.text, args)
}

// isOver reports whether there is something to read on an idle connection: its
// end, or what PostgreSQL says before it ends one.
func isOver(s socket) bool {
	_, err := s.peek()
	return err != syscall.EAGAIN
}

// A dialer connects to PostgreSQL. Its connections give up on a server that is
// silent for longer than patience while an answer is due: a network that
// swallows packets would otherwise hold a connection for a quarter of an hour.
type dialer struct {
	net.Dialer
	patience time.Duration // 0: no limit

	// While lib/pq connects, in the goroutine of Connect, last is the connection that it
	// dialed last: it leaves one open when it dials again to go without TLS, or with it
	// (Connector.open in its conn.go). Once connected, it dials to cancel statements.
	connecting bool
	last       socket
}

// closeLast closes the connection that lib/pq dialed last, unless there is none. It may be closed already.
func (d *dialer) closeLast() {
	if d.last.Conn != nil {
		d.last.Close()
	}
}

// DialTimeout completes [pq.Dialer]. lib/pq prefers DialContext.
func (d *dialer) DialTimeout(network, address string, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return d.DialContext(ctx, network, address)
}

func (d *dialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if d.connecting {
		d.closeLast()
	}
	c, err := d.Dialer.DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	s := newSocket(c)
	if d.connecting {
		d.last = s
	}
	if d.patience == 0 {
		return s, nil
	}
	return &impatientConn{socket: s, patience: d.patience}, nil
}

// An impatientConn limits how long a Read waits. lib/pq reads only when an
// answer is due, so an idle connection never runs into the limit.
type impatientConn struct {
	socket
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
	return c.socket.Read(p)
}
