package main

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"reflect"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// What connections to PostgreSQL have that lib/pq's own don't: settings of the
// session, a look whether they are still there before they are used again, an end
// to waiting for a server that is silent, statements that are prepared anew when
// the table has changed, and an eye for poolers.
//
// A pooler lends the sessions of PostgreSQL to its clients for a transaction each. The
// name of a statement (lib/pq numbers them: 1, 2, 3) may be that of another client's
// statement there, and what is set for a session stays for others. So nothing is
// prepared or set before it is known what responds. PostgreSQL tells each client, when
// it connects, the process by which its statements are cancelled (BackendKeyData: its
// manual, "Start-up" in "Message Flow"), and that is the one that serves it. A pooler
// has to tell something of its own.
//
// This relies on lib/pq (1.12.3, conn.go) to keep what was told in the field pid of
// its conn. Were it not there any more, nothing would be prepared, which is correct
// and slower, and TestPoolerUnannounced would fail.

// planning has PostgreSQL plan each prepared statement once for a connection, and
// by its indexes alone (its manual, sections 20.7 and "PREPARE"). Left to itself, it
// plans most of them anew for the parameters of each execution, which takes longer
// than to execute them; and what it plans for an empty table reads all of it, when it
// has grown, until it is analyzed.
const planning = "SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off; SET enable_bitmapscan = off; " +
	"SET enable_hashjoin = off; SET enable_mergejoin = off; SET enable_sort = off; SET jit = off"

// A connector makes the connections of a pool. It is a [driver.Connector].
type connector struct {
	database    pq.Config
	settings    []string      // statements that each session of our own begins with
	readTimeout time.Duration // after which a silent PostgreSQL is given up; 0: never
	log         *slog.Logger
	// pooled is set once there is a pooler: no statement is prepared any more.
	pooled atomic.Bool
}

// newConnector returns the connector of the service's pool.
func newConnector(cfg config, log *slog.Logger) *connector {
	c := &connector{database: cfg.database, settings: []string{planning}, log: log}
	// A statement ends after the time of a request: a server that has not responded
	// even that soon after will not respond any more.
	c.readTimeout = cfg.requestTimeout + 250*time.Millisecond
	c.database.ConnectTimeout = min(c.database.ConnectTimeout, cfg.requestTimeout)
	c.database.BinaryParameters = true // what is not prepared goes out in one message, which no pooler can split
	c.pooled.Store(cfg.database.BinaryParameters)
	if cfg.database.Runtime["statement_timeout"] == "" { // else the operator has decided
		c.settings = append(c.settings, fmt.Sprintf("SET statement_timeout = %d", max(1, cfg.requestTimeout.Milliseconds())))
	}
	return c
}

// openAside returns a pool of one connection, which is not kept. With a timeout,
// connecting and each statement end after it.
func openAside(cfg config, timeout time.Duration) *sql.DB {
	c := &connector{database: cfg.database, readTimeout: timeout}
	c.pooled.Store(true)
	if timeout > 0 {
		c.database.ConnectTimeout = min(c.database.ConnectTimeout, timeout)
	}
	db := sql.OpenDB(c)
	db.SetMaxOpenConns(1)
	db.SetMaxIdleConns(0)
	return db
}

// primaryConnLifetime is for how long a connection to a primary is used before it is
// made anew, and its server asked again whether it is one. That it has become
// read-only, a refused write tells at once; reads alone would never find out.
const primaryConnLifetime = 20 * time.Second

// connLifetime returns how long a connection of the pool is used, so that it
// follows a database that moved.
func connLifetime(cfg config) time.Duration {
	switch cfg.database.TargetSessionAttrs {
	case pq.TargetSessionAttrsReadWrite, pq.TargetSessionAttrsPrimary:
		return primaryConnLifetime
	}
	return time.Hour
}

// A connectError says why there is no connection: nothing has been sent.
type connectError struct{ error }

func (e connectError) Unwrap() error { return e.error }

// Driver completes [driver.Connector].
func (c *connector) Driver() driver.Driver { return new(pq.Driver) }

// Connect completes [driver.Connector].
func (c *connector) Connect(ctx context.Context) (driver.Conn, error) {
	cn, err := c.connect(ctx)
	if err != nil {
		return nil, err
	}
	return cn, nil
}

// connect connects to one of the configured hosts. All its errors are
// connectErrors. What a session needs is set by statements, since not every pooler
// lets it be parameters of the connection.
func (c *connector) connect(ctx context.Context) (*pgConn, error) {
	dial := &dialer{readTimeout: c.readTimeout, connecting: true}
	made, err := c.open(ctx, dial, c.database)
	if c.database.SSLMode == pq.SSLModePrefer && pq.As(err, pqerror.InvalidAuthorizationSpecification) != nil {
		// pg_hba.conf may admit us without TLS alone (hostnossl). As libpq does, try
		// that too; the other way round, for sslmode=allow, lib/pq does by itself.
		plain, refused := c.database, err
		plain.SSLMode = pq.SSLModeDisable
		if made, err = c.open(ctx, dial, plain); err != nil {
			err = errors.Join(refused, err)
		}
	}
	dial.connecting = false
	if err != nil {
		dial.closeLast()
		return nil, connectError{err}
	}
	cn := &pgConn{pqConn: made.(pqConn), socket: rawConn(dial.last), connector: c, pooled: c.pooled.Load()}
	if err := cn.begin(ctx); err != nil {
		cn.Close()
		return nil, connectError{err}
	}
	return cn, nil
}

func (c *connector) open(ctx context.Context, dial *dialer, database pq.Config) (driver.Conn, error) {
	one, err := pq.NewConnectorConfig(database)
	if err != nil {
		return nil, err
	}
	one.Dialer(dial)
	return one.Connect(ctx)
}

// findPooler notes that there is a pooler.
func (c *connector) findPooler() {
	if c.pooled.CompareAndSwap(false, true) {
		c.log.Warn("PostgreSQL is behind a connection pooler: no statement is prepared any more; add binary_parameters=yes to DATABASE_URL, or connect directly")
	}
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

// A backend is the process of PostgreSQL that serves a connection. Process ids
// come back; together with the time of its start it is the same one.
type backend struct {
	pid     int64 // 0 where it is not known, as behind a pooler
	started string
}

// A pgConn is a connection of lib/pq. It prepares each statement when it is first used.
type pgConn struct {
	pqConn
	socket    syscall.RawConn // below TLS; nil without a file descriptor
	connector *connector
	pooled    bool // what connector.pooled was when it was made
	backend   backend
	prepared  map[string]driver.Stmt // by text
}

// begin asks for the backend of a connection, and makes the settings of its session.
func (c *pgConn) begin(ctx context.Context) error {
	if c.pooled {
		return nil
	}
	rows, err := c.pqConn.QueryContext(ctx, "SELECT pid, backend_start::text FROM pg_stat_activity WHERE pid = pg_backend_pid()", nil)
	if err != nil {
		return err
	}
	values := make([]driver.Value, 2)
	err = rows.Next(values)
	rows.Close()
	if err != nil {
		return err
	}
	c.backend.pid, _ = values[0].(int64)
	c.backend.started, _ = values[1].(string)
	if told := reflect.Indirect(reflect.ValueOf(c.pqConn)).FieldByName("pid"); !told.IsValid() || !told.CanInt() || told.Int() != c.backend.pid {
		c.connector.findPooler()
		c.pooled, c.backend = true, backend{} // the next statement may be another one's
		return nil
	}
	_, err = c.ExecContext(ctx, strings.Join(c.connector.settings, "; "), nil)
	return err
}

// ResetSession completes [driver.SessionResetter]: database/sql calls it before
// it uses a connection again, and on [driver.ErrBadConn] takes another one. A
// connection that has something to read has ended.
func (c *pgConn) ResetSession(ctx context.Context) error {
	if _, err := peek(c.socket); err != syscall.EAGAIN {
		return driver.ErrBadConn
	}
	if c.pooled != c.connector.pooled.Load() { // it may have prepared statements
		return driver.ErrBadConn
	}
	return c.pqConn.ResetSession(ctx)
}

// QueryContext completes [driver.QueryerContext].
func (c *pgConn) QueryContext(ctx context.Context, text string, args []driver.NamedValue) (driver.Rows, error) {
	stmt, err := c.prepare(ctx, text)
	if err == nil && stmt != nil {
		var rows driver.Rows
		if rows, err = stmt.(driver.StmtQueryContext).QueryContext(ctx, args); err == nil {
			return rows, nil
		}
	}
	switch refused := pq.As(err); {
	case err == nil: // behind a pooler
	case pq.As(err, pqerror.InvalidSQLStatementName, pqerror.DuplicatePstatement) != nil:
		c.connector.findPooler()
	case pq.As(err, pqerror.ProtocolViolation) != nil: // or a pooler has lost the response
		c.connector.findPooler()
		return nil, err
	case refused != nil && (refused.Code == pqerror.FeatureNotSupported || refused.Code.Class() == "42"):
		// The table may have changed since ("cached plan must not change result type"),
		// or what PostgreSQL takes the parameters for. The next use prepares it anew; this
		// one does not, since the table might change again in between.
		delete(c.prepared, text)
		if stmt != nil {
			stmt.Close()
		}
	case stmt == nil: // it was not sent
		return nil, err
	default:
		return nil, sent(text, err)
	}
	rows, err := c.pqConn.QueryContext(ctx, text, args)
	return rows, sent(text, err)
}

// sent returns the error of a statement that was sent. That of a write is not
// [driver.ErrBadConn], with which database/sql would execute it a second time.
func sent(text string, err error) error {
	if isWrite(text) && errors.Is(err, driver.ErrBadConn) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// prepare returns a prepared statement, or nil behind a pooler.
func (c *pgConn) prepare(ctx context.Context, text string) (driver.Stmt, error) {
	if c.connector.pooled.Load() {
		return nil, nil
	}
	if stmt := c.prepared[text]; stmt != nil {
		return stmt, nil
	}
	stmt, err := c.PrepareContext(ctx, text)
	if err != nil {
		return nil, err
	}
	if c.prepared == nil {
		c.prepared = make(map[string]driver.Stmt)
	}
	c.prepared[text] = stmt
	return stmt, nil
}

// A dialer connects to PostgreSQL. Its connections give up on a server that is
// silent for longer than readTimeout while a response is due: a network that
// swallows packets would otherwise hold a connection for a quarter of an hour.
type dialer struct {
	net.Dialer
	readTimeout time.Duration // 0: no limit

	// While lib/pq connects, in the goroutine of connect, last is the connection that it
	// dialed last: it leaves one open when it dials again to go without TLS, or with it
	// (Connector.open in its conn.go). Once connected, it dials to cancel statements.
	connecting bool
	last       net.Conn
}

// closeLast closes the connection that lib/pq dialed last, if there is one. It may be
// closed already.
func (d *dialer) closeLast() {
	if d.last != nil {
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
	if d.readTimeout > 0 {
		c = &timeoutConn{Conn: c, readTimeout: d.readTimeout}
	}
	if d.connecting {
		d.last = c
	}
	return c, nil
}

// A timeoutConn limits how long a Read waits. lib/pq reads only when a response is
// due, so an idle connection never runs into the limit.
type timeoutConn struct {
	net.Conn
	readTimeout time.Duration
	explicit    bool      // lib/pq has set a deadline of its own: it is connecting
	counted     time.Time // from when the time counts
}

// NetConn returns the connection below, as [tls.Conn.NetConn] does.
func (c *timeoutConn) NetConn() net.Conn { return c.Conn }

func (c *timeoutConn) SetDeadline(t time.Time) error {
	c.explicit, c.counted = !t.IsZero(), time.Time{}
	return c.Conn.SetDeadline(t)
}

func (c *timeoutConn) Read(p []byte) (int, error) {
	// To set it anew ten times a second is exact enough, and costs a busy connection nothing.
	if now := time.Now(); !c.explicit && now.Sub(c.counted) > time.Second/10 {
		c.counted = now
		c.Conn.SetReadDeadline(now.Add(c.readTimeout + time.Second/10))
	}
	return c.Conn.Read(p)
}
