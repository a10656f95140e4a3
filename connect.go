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
	pooled      atomic.Bool  // there is a pooler: no statement is prepared any more
	generation  atomic.Int64 // of the connections; those of an earlier one are not used again
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

// openUnpooled returns a pool of one connection, which is not kept. With a timeout,
// connecting and each statement end after it.
func openUnpooled(cfg config, timeout time.Duration) *sql.DB {
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

// A connectError says why there is no connection that the statement could be sent on.
type connectError struct{ error }

func (e connectError) Unwrap() error { return e.error }

// Driver completes [driver.Connector].
func (c *connector) Driver() driver.Driver { return new(pq.Driver) }

// Connect completes [driver.Connector]. It connects to one of the configured hosts. All
// its errors are connectErrors. What a session needs is set by statements, since not
// every pooler lets it be parameters of the connection.
func (c *connector) Connect(ctx context.Context) (driver.Conn, error) {
	generation := c.generation.Load()
	dial := &dialer{readTimeout: c.readTimeout, connecting: true}
	made, err := c.open(ctx, dial, c.database)
	if c.database.SSLMode == pq.SSLModePrefer && pq.As(err, pqerror.InvalidAuthorizationSpecification) != nil {
		// pg_hba.conf may admit us without TLS alone (hostnossl). As libpq does, try
		// that too; the other way round, for sslmode=allow, lib/pq does by itself.
		plain, overTLS := c.database, err
		plain.SSLMode = pq.SSLModeDisable
		if made, err = c.open(ctx, dial, plain); err != nil {
			err = errors.Join(overTLS, err)
		}
	}
	dial.connecting = false
	if err != nil {
		dial.closeLast()
		return nil, connectError{err}
	}
	cn := &pgConn{made.(pqConn), rawConn(dial.last), c, generation, backend{}, make(map[string]driver.Stmt)}
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

// findPooler notes that there is a pooler. Connections that may have prepared
// statements are not used again.
func (c *connector) findPooler() {
	if c.pooled.CompareAndSwap(false, true) {
		c.generation.Add(1)
		c.log.Warn("PostgreSQL is behind a connection pooler: no statement is prepared any more; " +
			"add binary_parameters=yes to DATABASE_URL, or connect directly")
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
	socket     syscall.RawConn // below TLS; nil without a file descriptor
	connector  *connector
	generation int64
	backend    backend
	prepared   map[string]driver.Stmt // by text
}

// begin asks for the backend of a connection, and makes the settings of its session.
func (c *pgConn) begin(ctx context.Context) error {
	if c.connector.pooled.Load() {
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
	pid, _ := values[0].(int64)
	told := reflect.Indirect(reflect.ValueOf(c.pqConn)).FieldByName("pid")
	if !told.IsValid() || !told.CanInt() || told.Int() != pid {
		c.connector.findPooler() // the next statement may go to another backend
		return nil
	}
	c.backend.pid = pid
	c.backend.started, _ = values[1].(string)
	_, err = c.ExecContext(ctx, strings.Join(c.connector.settings, "; "), nil)
	return err
}

// ResetSession completes [driver.SessionResetter]: database/sql calls it before
// it uses a connection again, and on [driver.ErrBadConn] takes another one. A
// connection that has something to read has ended.
func (c *pgConn) ResetSession(ctx context.Context) error {
	if _, err := peek(c.socket); err != syscall.EAGAIN || c.generation != c.connector.generation.Load() {
		return driver.ErrBadConn
	}
	return c.pqConn.ResetSession(ctx)
}

// QueryContext completes [driver.QueryerContext]. Where it was not answered, the error of
// a write is an [unansweredError].
func (c *pgConn) QueryContext(ctx context.Context, text string, args []driver.NamedValue) (driver.Rows, error) {
	rows, err := c.queryPrepared(ctx, text, args)
	if err == errNotPrepared {
		rows, err = c.pqConn.QueryContext(ctx, text, args)
	}
	if !isWrite(text) {
		return rows, err
	}
	return writtenRows{rows, c.backend}, unanswered(err, c.backend)
}

// errNotPrepared is the error of a statement that has to be sent without being prepared.
var errNotPrepared = errors.New("not prepared")

// queryPrepared executes a statement that is prepared. The error is [errNotPrepared]
// behind a pooler, and where PostgreSQL has to plan the statement anew.
func (c *pgConn) queryPrepared(ctx context.Context, text string, args []driver.NamedValue) (rows driver.Rows, err error) {
	if c.connector.pooled.Load() {
		return nil, errNotPrepared
	}
	stmt := c.prepared[text]
	if stmt == nil {
		if stmt, err = c.PrepareContext(ctx, text); err != nil {
			err = connectError{err}
		} else {
			c.prepared[text] = stmt
		}
	}
	if err == nil {
		rows, err = stmt.(driver.StmtQueryContext).QueryContext(ctx, args)
	}
	switch pgErr := pq.As(err); {
	case pgErr == nil:
	case pgErr.Code == pqerror.InvalidSQLStatementName || pgErr.Code == pqerror.DuplicatePstatement:
		c.connector.findPooler()
		return nil, errNotPrepared
	case pgErr.Code == pqerror.ProtocolViolation: // or a pooler has lost the response
		c.connector.findPooler()
	case pgErr.Code == pqerror.FeatureNotSupported || pgErr.Code.Class() == "42":
		// The table may have changed since ("cached plan must not change result type"),
		// or what PostgreSQL takes the parameters for. The next use prepares it anew; this
		// one does not, since the table might change again in between.
		delete(c.prepared, text)
		if stmt != nil {
			stmt.Close()
		}
		return nil, errNotPrepared
	}
	return rows, err
}

// An unansweredError is the error of a write that PostgreSQL has not answered: it may have
// been executed. It matches [errAmbiguous], and not [driver.ErrBadConn], with which
// database/sql would execute the write a second time.
type unansweredError struct {
	cause   error
	backend backend // that may execute the write still
}

func (e unansweredError) Error() string        { return "no response to a write: " + e.cause.Error() }
func (e unansweredError) Is(target error) bool { return target == errAmbiguous }

// unanswered returns err, of a write, or an unansweredError where it leaves open what
// became of the write. An error of PostgreSQL says that the write was undone, except from
// a pooler that has lost its server (class 08).
func unanswered(err error, b backend) error {
	_, unsent := errors.AsType[connectError](err)
	if pgErr := pq.As(err); err == nil || unsent || pgErr != nil && pgErr.Code.Class() != "08" {
		return err
	}
	return unansweredError{err, b}
}

// writtenRows are the rows that a write returns.
type writtenRows struct {
	driver.Rows
	backend backend
}

func (r writtenRows) Next(values []driver.Value) error {
	err := r.Rows.Next(values)
	if err == io.EOF { // PostgreSQL is ready for the next statement: this one is committed
		return err
	}
	return unanswered(err, r.backend)
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
	explicit    bool // lib/pq has set a deadline of its own: it is connecting
}

// NetConn returns the connection below, as [tls.Conn.NetConn] does.
func (c *timeoutConn) NetConn() net.Conn { return c.Conn }

func (c *timeoutConn) SetDeadline(t time.Time) error {
	c.explicit = !t.IsZero()
	return c.Conn.SetDeadline(t)
}

func (c *timeoutConn) Read(p []byte) (int, error) {
	if !c.explicit {
		c.Conn.SetReadDeadline(time.Now().Add(c.readTimeout))
	}
	return c.Conn.Read(p)
}
