package main

import (
	"cmp"
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// The store is where SQL lives: everybody else speaks of users. Its methods
// return [errNotFound], [errEmailTaken], [errPrecondition], failures of the kinds
// unavailable, timeout, callerGone and database, and what their context ends
// with; nothing of the driver's gets out.

// columns are those of a user, in the order of [user.fields].
const columns = "id, email, name, created_at, updated_at"

// version is the version of a user in SQL: what [user.version] is in Go.
const version = "(extract(epoch FROM updated_at) * 1000000)::bigint::text"

// conditionsHold is true, in SQL, of a user in a version that [preconditions]
// allow, whose fields are the values of the two placeholders.
func conditionsHold(match, noneMatch string) string {
	return fmt.Sprintf("(%[2]s::text IS NULL OR %[1]s = ANY (string_to_array(%[2]s, ','))) AND "+
		"(%[3]s::text IS NULL OR %[3]s <> '*' AND %[1]s <> ALL (string_to_array(%[3]s, ',')))", version, match, noneMatch)
}

// The statements, prepared once for each connection.
var (
	insertUser = "INSERT INTO users (id, email, name) VALUES ($1, $2, $3) RETURNING " + columns
	selectUser = "SELECT " + columns + " FROM users WHERE id = $1"
	findUser   = "SELECT " + columns + " FROM users WHERE lower(email) = lower($1)"
	firstUsers = "SELECT " + columns + " FROM users ORDER BY created_at DESC, id DESC LIMIT $1 OFFSET $2"
	nextUsers  = "SELECT " + columns + " FROM users WHERE (created_at, id) < ($2, $3) ORDER BY created_at DESC, id DESC LIMIT $1"
	// updated_at is the version, so it moves on even if the clock does not.
	updateUser = "UPDATE users SET email = COALESCE($2, email), name = COALESCE($3, name), " +
		"updated_at = GREATEST(now(), updated_at + interval '1 microsecond') " +
		"WHERE id = $1 AND " + conditionsHold("$4", "$5") + " RETURNING " + columns
	deleteUser = "DELETE FROM users WHERE id = $1 AND " + conditionsHold("$2", "$3") + " RETURNING " + columns
)

// A store keeps users in PostgreSQL. It is safe for concurrent use.
type store struct {
	db         *sql.DB
	aside      *sql.DB // beside the pool: for start, whose migrations take as long as they take, and for ping
	log        *slog.Logger
	unprepared bool          // binary_parameters=yes: no statement outlives its transaction
	limit      time.Duration // after which PostgreSQL ends a statement by itself; 0: it does not

	prepared map[string]*sql.Stmt // by text; complete once started is true
	many     batches
	started  atomic.Bool
	answered atomic.Int64 // when PostgreSQL last answered, in nanoseconds since 1970
}

// openStore returns the store of the configured database. It does not connect:
// [store.start] does.
func openStore(cfg config, log *slog.Logger) (*store, error) {
	s := &store{log: log, unprepared: cfg.database.BinaryParameters, prepared: make(map[string]*sql.Stmt)}
	s.many = newBatches(s)
	database := cfg.database
	database.ConnectTimeout = min(database.ConnectTimeout, cfg.requestTimeout)
	open := func(patience, limit time.Duration, conns int) (*sql.DB, error) {
		connector, err := pq.NewConnectorConfig(database)
		if err != nil {
			return nil, err
		}
		connector.Dialer(&dialer{patience: patience})
		db := sql.OpenDB(limited{connector, limit})
		db.SetMaxOpenConns(conns)
		db.SetMaxIdleConns(conns)
		db.SetConnMaxIdleTime(5 * time.Minute) // before firewalls forget an idle connection
		db.SetConnMaxLifetime(time.Hour)       // so that the pool follows a database that moved
		return db, nil
	}
	var err error
	s.limit = cfg.requestTimeout
	if s.unprepared || cfg.database.Runtime["statement_timeout"] != "" {
		s.limit = 0 // others share the session, or the operator has decided
	}
	// A statement ends after the time of a request; who has not answered even
	// that soon after will not answer any more.
	if s.db, err = open(cfg.requestTimeout+250*time.Millisecond, s.limit, cfg.dbMaxConns); err != nil {
		return nil, err
	}
	if s.aside, err = open(0, 0, 1); err != nil {
		return nil, err
	}
	s.aside.SetMaxIdleConns(0) // used once in a while: it connects anew
	return s, nil
}

// start connects, migrates and prepares. While PostgreSQL is not there, or does
// not let us in, it waits, and says so in the log, until ctx ends. What waiting
// does not cure is a [*schemaError].
func (s *store) start(ctx context.Context) error {
	migrations, err := parseMigrations(schemaSQL)
	if err != nil {
		return err
	}
	for pause := 100 * time.Millisecond; ; pause = min(2*pause, 5*time.Second) {
		if err = migrate(ctx, s.aside, migrations, s.log); err == nil {
			if err = s.prepare(ctx); err == nil {
				s.started.Store(true)
				return nil
			}
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if _, ok := errors.AsType[*schemaError](err); ok {
			return err
		}
		if refused := pq.As(err); refused != nil && !isUnavailable(err) && refused.Code.Class() != "28" && // not let in
			refused.Code != pqerror.InvalidCatalogName { // no such database
			return &schemaError{"PostgreSQL refuses: " + describe(refused)}
		}
		s.log.Warn("waiting for PostgreSQL", "error", err.Error(), "next_try", pause.String())
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (s *store) prepare(ctx context.Context) error {
	if s.unprepared {
		return s.db.PingContext(ctx)
	}
	for _, text := range []string{insertUser, selectUser, findUser, firstUsers, nextUsers, updateUser, deleteUser,
		insertUsers, selectUsers, findUsers, updateUsers, deleteUsers} {
		if s.prepared[text] != nil {
			continue // from an earlier try
		}
		stmt, err := s.db.PrepareContext(ctx, text)
		if err != nil {
			return err
		}
		s.prepared[text] = stmt
	}
	s.answered.Store(time.Now().UnixNano())
	return nil
}

// close ends the pool. Statements that still run are cancelled with their requests.
func (s *store) close() error { return errors.Join(s.db.Close(), s.aside.Close()) }

// ping reports whether PostgreSQL answers. One that answered a request within
// the last second needs no asking. It is asked on a connection beside the pool,
// so that a pool of slow statements is not taken for an outage, and by one for
// all who wait.
func (s *store) ping(ctx context.Context) error {
	if time.Since(time.Unix(0, s.answered.Load())) < time.Second {
		return nil
	}
	answered := make(chan error, 1)
	go func() { // lib/pq hears of the end of ctx only when it has connected
		_, err := s.many.pings.do(ctx, struct{}{})
		answered <- err
	}()
	select {
	case err := <-answered:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *store) pingMany(ctx context.Context, calls []*call[struct{}, struct{}]) {
	err := s.aside.PingContext(ctx)
	if err == nil {
		s.answered.Store(time.Now().UnixNano())
	}
	for _, c := range calls {
		c.err = err
	}
}

// create stores a new user. The error is [errEmailTaken] if another user has
// the address, letter case ignored.
func (s *store) create(ctx context.Context, id, email, name string) (user, error) {
	in := draft{id, email, name}
	u, err := s.many.creates.do(ctx, in)
	if err == errAlone {
		u, err = s.createAlone(ctx, in)
	}
	return u, unsure(err)
}

func (s *store) createAlone(ctx context.Context, in draft) (user, error) {
	u, err := s.one(ctx, insertUser, in.id, in.email, in.name)
	if errors.Is(err, errEmailTaken) {
		// database/sql repeats a statement whose connection broke, and the first
		// try may have gone through: then it is this very user who has the id and
		// the address.
		if mine, getErr := s.one(ctx, selectUser, in.id); getErr == nil {
			return mine, nil
		}
	}
	return u, err
}

// get returns the user of that id, or [errNotFound].
func (s *store) get(ctx context.Context, id string) (user, error) {
	u, err := s.many.gets.do(ctx, lookUp(id))
	if err == errAlone {
		u, err = s.one(ctx, selectUser, id)
	}
	return u, err
}

// find returns the user of that address, letter case ignored, or [errNotFound].
func (s *store) find(ctx context.Context, email string) (user, error) {
	u, err := s.many.finds.do(ctx, lookUp(email))
	if err == errAlone {
		u, err = s.one(ctx, findUser, email)
	}
	return u, err
}

// list returns up to limit users, newest first: those behind after, or, where
// that is nil, those behind the first offset ones.
func (s *store) list(ctx context.Context, limit, offset int64, after *position) ([]user, error) {
	if after != nil {
		return s.query(ctx, nextUsers, limit, after.createdAt, after.id)
	}
	return s.query(ctx, firstUsers, limit, offset)
}

// update changes the fields that are not nil. The error is [errNotFound], or
// [errPrecondition] if the user is in a version that when excludes, or
// [errEmailTaken].
func (s *store) update(ctx context.Context, id string, email, name *string, when preconditions) (user, error) {
	in := userChange{id, email, name, when}
	u, err := s.many.updates.do(ctx, in)
	if err == errAlone {
		u, err = s.updateAlone(ctx, in)
	}
	return u, unsure(err)
}

func (s *store) updateAlone(ctx context.Context, in userChange) (user, error) {
	u, err := s.one(ctx, updateUser, in.id, in.email, in.name, in.when.match, in.when.noneMatch)
	if errors.Is(err, errNotFound) && in.when.some() {
		err = s.whyNot(ctx, in.id)
	}
	return u, err
}

// delete removes the user of that id. The error is [errNotFound], or
// [errPrecondition] if the user is in a version that when excludes.
func (s *store) delete(ctx context.Context, id string, when preconditions) error {
	in := userChange{id: id, when: when}
	_, err := s.many.deletes.do(ctx, in)
	if err == errAlone {
		_, err = s.deleteAlone(ctx, in)
	}
	return unsure(err)
}

func (s *store) deleteAlone(ctx context.Context, in userChange) (user, error) {
	u, err := s.one(ctx, deleteUser, in.id, in.when.match, in.when.noneMatch)
	if errors.Is(err, errNotFound) && in.when.some() {
		err = s.whyNot(ctx, in.id)
	}
	return u, err
}

// whyNot tells a user that is missing from one that a precondition excluded.
func (s *store) whyNot(ctx context.Context, id string) error {
	if _, err := s.one(ctx, selectUser, id); err != nil {
		return err
	}
	return errPrecondition
}

// one runs a statement that returns at most one user; none is [errNotFound].
func (s *store) one(ctx context.Context, text string, args ...any) (user, error) {
	users, err := s.query(ctx, text, args...)
	if err != nil {
		return user{}, err
	}
	if len(users) == 0 {
		return user{}, errNotFound
	}
	return users[0], nil
}

// query runs a statement that returns users.
func (s *store) query(ctx context.Context, text string, args ...any) (users []user, err error) {
	err = s.run(ctx, text, args, func(rows *sql.Rows) error {
		users = users[:0]
		for rows.Next() {
			var u user
			if err := rows.Scan(u.fields()...); err != nil {
				return err
			}
			users = append(users, u)
		}
		return nil
	})
	return users, err
}

// fields returns where to scan the columns of a user.
func (u *user) fields() []any { return []any{&u.ID, &u.Email, &u.Name, &u.CreatedAt, &u.UpdatedAt} }

// run runs a statement and has read take its rows; and again, from the start,
// where PostgreSQL has undone it for the sake of another one: after a deadlock
// or a serialization failure nothing of it remains, and a new try finds the
// way clear. (Where the connection breaks, database/sql repeats the statement
// on another one: mostly the first has died while it was idle, but it may also
// have gone through. See createAlone.) The error is translated.
func (s *store) run(ctx context.Context, text string, args []any, read func(*sql.Rows) error) error {
	for try := 1; ; try++ {
		err := s.runOnce(ctx, text, args, read)
		if err == nil {
			s.answered.Store(time.Now().UnixNano())
			return nil
		}
		if pq.As(err, pqerror.TRDeadlockDetected, pqerror.TRSerializationFailure) == nil || try == 10 {
			return translate(ctx, err)
		}
		select {
		case <-time.After(rand.N(time.Duration(try) * 10 * time.Millisecond)):
		case <-ctx.Done():
			return translate(ctx, ctx.Err())
		}
	}
}

func (s *store) runOnce(ctx context.Context, text string, args []any, read func(*sql.Rows) error) (err error) {
	if err := ctx.Err(); err != nil { // nobody waits for it any more
		return err
	}
	// To watch ctx, database/sql and lib/pq take a goroutine each. PostgreSQL ends
	// the statement by itself, so ctx matters only where that would be later than
	// the deadline, or where a connection has to be waited for.
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) > s.limit-100*time.Millisecond && s.limit > 0 && s.db.Stats().Idle > 0 {
		ctx = context.WithoutCancel(ctx)
	}
	var rows *sql.Rows
	if s.unprepared {
		rows, err = s.db.QueryContext(ctx, text, args...)
	} else {
		rows, err = s.prepared[text].QueryContext(ctx, args...)
	}
	if err != nil {
		return err
	}
	defer rows.Close()
	if err := read(rows); err != nil {
		return err
	}
	return rows.Err()
}

// unsure adds to the error of a write what its caller has to know: that an
// error which came instead of PostgreSQL's answer leaves open what it did.
func unsure(err error) error {
	if err == nil {
		return nil
	}
	f := asFailure(err)
	if f.kind != kindTimeout && f.kind != kindUnavailable {
		return err
	}
	g := *f
	g.message = cmp.Or(f.message, answers[f.kind].message) + "; the change may have been made all the same"
	return &g
}

// translate turns an error of the driver into one of ours, by its SQLSTATE
// (PostgreSQL's manual, appendix A) and never by its text.
func translate(ctx context.Context, err error) error {
	switch refused := pq.As(err); {
	case ctx.Err() != nil: // whatever the driver made of it
		return asFailure(fmt.Errorf("%w (%v)", ctx.Err(), err))
	case pq.As(err, pqerror.QueryCanceled) != nil: // by statement_timeout
		return &failure{kind: kindTimeout, cause: err}
	case isUnavailable(err):
		return &failure{kind: kindUnavailable, message: "The database is not available", cause: err}
	case refused != nil && refused.Code == pqerror.UniqueViolation: // of the address, or of an id: see createAlone
		return errEmailTaken
	default:
		return &failure{kind: kindDatabase, cause: err}
	}
}

// isUnavailable reports whether err is of the kind that passes: PostgreSQL
// can't be reached, starts, stops, or lacks what it needs right now.
func isUnavailable(err error) bool {
	if refused := pq.As(err); refused != nil {
		switch refused.Code.Class() {
		case "08", // connection exception
			"40", // transaction rollback: the tries ran out
			"53", // insufficient resources: connections, memory, disk
			"57", // operator intervention: shutdown, crash, starting up, cancelled by an administrator
			"58": // system error, outside PostgreSQL
			return true
		}
		return refused.Code == pqerror.ReadOnlySQLTransaction || // a standby, or a primary that became one
			refused.Code == pqerror.LockNotAvailable
	}
	var netErr net.Error
	return errors.Is(err, driver.ErrBadConn) || errors.Is(err, sql.ErrConnDone) || errors.As(err, &netErr) ||
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}
