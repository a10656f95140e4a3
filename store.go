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
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// The store is where SQL lives: everybody else speaks of users. Its methods
// return [errNotFound], [errEmailTaken], [errKeyReused], [errPrecondition],
// failures of the kinds unavailable, timeout, callerGone and database, and what
// their context ends with; nothing of the driver's gets out.

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
	pool       *connector // of db
	aside      *sql.DB    // beside the pool: for start, whose migrations take as long as they take
	probe      *sql.DB    // beside the pool, for ping
	log        *slog.Logger
	unprepared bool          // binary_parameters=yes: no statement outlives its transaction
	limit      time.Duration // after which PostgreSQL ends a statement by itself; 0: it does not

	prepared map[string]*sql.Stmt // by text; complete once started is true
	many     batches
	alone    *lockQueue // where a write that can't be done with others is done
	started  atomic.Bool
	answered atomic.Int64 // when PostgreSQL last answered, in nanoseconds since 1970
}

// openStore returns the store of the configured database. It does not connect:
// [store.start] does.
func openStore(cfg config, log *slog.Logger) *store {
	s := &store{log: log, unprepared: cfg.database.BinaryParameters, prepared: make(map[string]*sql.Stmt)}
	s.many = newBatches(s)
	s.alone = newLockQueue(cfg.dbMaxConns)
	database := cfg.database
	database.ConnectTimeout = min(database.ConnectTimeout, cfg.requestTimeout)
	s.limit = cfg.requestTimeout
	if s.unprepared || cfg.database.Runtime["statement_timeout"] != "" {
		s.limit = 0 // others share the session, or the operator has decided
	}
	// A statement ends after the time of a request; who has not answered even
	// that soon after will not answer any more.
	s.pool = &connector{database: database, limit: s.limit, patience: cfg.requestTimeout + 250*time.Millisecond, identify: !s.unprepared}
	s.db = sql.OpenDB(s.pool)
	s.db.SetMaxOpenConns(cfg.dbMaxConns)
	s.db.SetMaxIdleConns(cfg.dbMaxConns)
	s.db.SetConnMaxIdleTime(5 * time.Minute) // before firewalls forget an idle connection
	s.db.SetConnMaxLifetime(time.Hour)       // so that the pool follows a database that moved
	s.probe = sql.OpenDB(&connector{database: database, patience: readyTimeout})
	s.probe.SetMaxOpenConns(1)
	s.probe.SetMaxIdleConns(0) // used once in a while: it connects anew
	s.aside = sql.OpenDB(&connector{database: database})
	s.aside.SetMaxOpenConns(1)
	s.aside.SetMaxIdleConns(0) // used once in a while: it connects anew
	return s
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
		selectKeyed, insertUsers, selectUsers, findUsers, updateUsers, deleteUsers} {
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
func (s *store) close() error { return errors.Join(s.db.Close(), s.aside.Close(), s.probe.Close()) }

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
	err := s.probe.PingContext(ctx)
	if err == nil {
		s.answered.Store(time.Now().UnixNano())
	}
	for _, c := range calls {
		c.err = err
	}
}

// create stores a new user. The error is [errEmailTaken] if another user has
// the address, letter case ignored. With an id from [keyedUUID] it returns the
// user that has been created with this id before, if there is one, and the
// error is [errKeyReused] if the key was used with another body.
func (s *store) create(ctx context.Context, id, email, name string) (user, error) {
	in := draft{id, email, name}
	u, err, key := user{}, errAlone, strings.ToLower(email)
	if !s.alone.has(key) {
		u, err = s.many.creates.do(ctx, in)
	}
	if err == errAlone || err == errAloneAgain {
		u, err = s.alone.do(ctx, key, err == errAloneAgain, func(again bool) (user, error) { return s.createAlone(ctx, in, again) })
	}
	return u, unsure(err)
}

// createAlone makes a user who may have been made before, if again is true.
func (s *store) createAlone(ctx context.Context, in draft, again bool) (u user, err error) {
	defer func() { err = afterLost(err, again) }()
	u, repeated, err := s.one(ctx, insertUser, in.id, in.email, in.name)
	again = again || repeated
	switch {
	case !errors.Is(err, errEmailTaken):
		return u, err
	case isKeyed(in.id):
		return s.madeBefore(ctx, in.id)
	}
	// An earlier try may have gone through, here or in [store.createMany]: then it
	// is this very user who has the id and the address.
	u, _, err = s.one(ctx, selectUser, in.id)
	if errors.Is(err, errNotFound) {
		err = errEmailTaken
	}
	return u, err
}

// get returns the user of that id, or [errNotFound].
func (s *store) get(ctx context.Context, id string) (user, error) {
	u, err := s.many.gets.do(ctx, lookUp(id))
	if err == errAlone {
		u, _, err = s.one(ctx, selectUser, id)
	}
	return u, err
}

// find returns the user of that address, letter case ignored, or [errNotFound].
func (s *store) find(ctx context.Context, email string) (user, error) {
	u, err := s.many.finds.do(ctx, lookUp(email))
	if err == errAlone {
		u, _, err = s.one(ctx, findUser, email)
	}
	return u, err
}

// list returns up to limit users, newest first: those behind after, or, where
// that is nil, those behind the first offset ones.
func (s *store) list(ctx context.Context, limit, offset int64, after *position) (users []user, err error) {
	if after != nil {
		users, _, err = s.query(ctx, nextUsers, limit, after.createdAt, after.id)
	} else {
		users, _, err = s.query(ctx, firstUsers, limit, offset)
	}
	return users, err
}

// update changes the fields that are not nil. The error is [errNotFound], or
// [errPrecondition] if the user is in a version that when excludes, or
// [errEmailTaken].
func (s *store) update(ctx context.Context, id string, email, name *string, when preconditions) (user, error) {
	in := userChange{id, email, name, when}
	u, err := user{}, errAlone
	if !s.alone.has(id) {
		u, err = s.many.updates.do(ctx, in)
	}
	if err == errAlone || err == errAloneAgain {
		u, err = s.alone.do(ctx, id, err == errAloneAgain, func(again bool) (user, error) { return s.updateAlone(ctx, in, again) })
	}
	return u, unsure(err)
}

// updateAlone makes a change that may have been made before, if again is true.
// To make it twice is to make it once, since it says how the user is to be; but
// the second time a precondition does not hold any more, which then is no
// conflict (RFC 9110, section 13.1.1: "appears to have already been applied").
func (s *store) updateAlone(ctx context.Context, in userChange, again bool) (u user, err error) {
	defer func() { err = afterLost(err, again) }()
	u, repeated, err := s.one(ctx, updateUser, in.id, in.email, in.name, in.when.match, in.when.noneMatch)
	again = again || repeated
	if !errors.Is(err, errNotFound) || !in.when.some() {
		return u, err
	}
	u, _, err = s.one(ctx, selectUser, in.id)
	if err != nil {
		return u, err
	}
	asWanted := (in.email != nil || in.name != nil) && (in.email == nil || u.Email == *in.email) && (in.name == nil || u.Name == *in.name)
	if again && asWanted {
		return u, nil
	}
	return u, errPrecondition
}

// delete removes the user of that id. The error is [errNotFound], or
// [errPrecondition] if the user is in a version that when excludes.
func (s *store) delete(ctx context.Context, id string, when preconditions) error {
	in := userChange{id: id, when: when}
	err := errAlone
	if !s.alone.has(id) {
		_, err = s.many.deletes.do(ctx, in)
	}
	if err == errAlone || err == errAloneAgain {
		_, err = s.alone.do(ctx, id, err == errAloneAgain, func(again bool) (user, error) { return s.deleteAlone(ctx, in, again) })
	}
	return unsure(err)
}

// deleteAlone removes a user who may be removed already, if again is true: to
// find nobody then is success.
func (s *store) deleteAlone(ctx context.Context, in userChange, again bool) (u user, err error) {
	defer func() { err = afterLost(err, again) }()
	u, repeated, err := s.one(ctx, deleteUser, in.id, in.when.match, in.when.noneMatch)
	again = again || repeated
	if !errors.Is(err, errNotFound) {
		return u, err
	}
	if in.when.some() {
		if _, _, err = s.one(ctx, selectUser, in.id); err == nil {
			return u, errPrecondition
		}
	}
	if errors.Is(err, errNotFound) && again {
		return u, nil
	}
	return u, err
}

// one runs a statement that returns at most one user; none is [errNotFound].
// For repeated see [store.run].
func (s *store) one(ctx context.Context, text string, args ...any) (u user, repeated bool, err error) {
	users, repeated, err := s.query(ctx, text, args...)
	if err != nil {
		return user{}, repeated, err
	}
	if len(users) == 0 {
		return user{}, repeated, errNotFound
	}
	return users[0], repeated, nil
}

// query runs a statement that returns users. For repeated see [store.run].
func (s *store) query(ctx context.Context, text string, args ...any) (users []user, repeated bool, err error) {
	repeated, err = s.run(ctx, text, args, func(rows *sql.Rows) error {
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
	return users, repeated, err
}

// fields returns where to scan the columns of a user.
func (u *user) fields() []any { return []any{&u.ID, &u.Email, &u.Name, &u.CreatedAt, &u.UpdatedAt} }

// run runs a statement and has read take its rows; and again, from the start,
// as long as what prevents it passes ([passes]) and ctx has time for another
// try. repeated reports whether an earlier try may have gone through all the
// same: its connection broke, so that PostgreSQL could not say. The error is
// translated.
func (s *store) run(ctx context.Context, text string, args []any, read func(*sql.Rows) error) (repeated bool, err error) {
	var sentTo *backend // who has a write of which nothing was heard since
	write := !strings.HasPrefix(text, "SELECT")
	if write {
		args = slices.Clone(args)
		args[0] = sentOnce{args[0], &sentTo}
	}
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, 200*time.Millisecond) {
		age := s.pool.age.Load()
		err := s.end(ctx, sentTo)
		refused := pq.As(err)
		if err != nil && refused != nil { // of this question, not of the write
			s.pool.age.CompareAndSwap(age, age+1) // such as a standby, which can't answer it: connect anew
			err, refused = fmt.Errorf("%w: %v", errUnsettled, err), nil
		}
		if err == nil {
			sentTo = nil
			if err = s.runOnce(ctx, text, args, read); err == nil {
				s.answered.Store(time.Now().UnixNano())
				return repeated, nil
			}
			refused = pq.As(err)
		}
		if refused != nil && !refused.Fatal() && refused.Code.Class() != "08" {
			sentTo = nil // PostgreSQL has undone it, and says so (a pooler that lost it says 08)
		}
		repeated = repeated || sentTo != nil
		if refused != nil && refused.Code == pqerror.LockNotAvailable && write && ctx.Err() == nil {
			return repeated, rerun(repeated) // where it keeps nobody waiting: see [lockQueue]
		}
		if !passes(err) || ctx.Err() != nil {
			return repeated, giveUp(ctx, err, repeated)
		}
		if refused != nil && refused.Code == pqerror.ReadOnlySQLTransaction {
			s.pool.age.CompareAndSwap(age, age+1) // this server is the wrong one by now: connect anew
		}
		wait := pause/2 + rand.N(pause) // unlike the others' who wait for the same
		if deadline, ok := ctx.Deadline(); ok {
			left := time.Until(deadline) - 100*time.Millisecond // to answer in
			if left <= 0 {
				return repeated, giveUp(ctx, err, repeated)
			}
			wait = min(wait, left)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return repeated, giveUp(ctx, err, repeated)
		}
	}
}

// end ends a backend whose connection broke, and waits until it has ended.
// What was sent to it may still lie in a buffer on the way: once there is nobody
// who could do it late, after what replaces it, it can be repeated.
func (s *store) end(ctx context.Context, b *backend) error {
	if b == nil {
		return nil
	}
	if b.pid != 0 {
		var ended bool
		err := s.db.QueryRowContext(ctx, "SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity WHERE pid = $1 AND backend_start = $2",
			b.pid, b.started).Scan(&ended)
		switch {
		case errors.Is(err, sql.ErrNoRows): // it has ended, or this is another server
		case err == nil && !ended:
			return errUnsettled
		case err != nil:
			return err
		}
	}
	// What it has done may be on this server alone: PostgreSQL shows a commit whose
	// wait for the standby was cut short. A commit of our own waits for all before it.
	_, err := s.db.ExecContext(ctx, "SELECT pg_logical_emit_message(true, 'rollcall', '')")
	return err
}

var errUnsettled = errors.New("what became of an earlier try is not known yet")

// giveUp translates the error of the last try. If an earlier one may have gone
// through, it no longer is the error of a statement that was not sent.
func giveUp(ctx context.Context, err error, repeated bool) error {
	return afterLost(translate(ctx, err), repeated)
}

// afterLost returns err, or, if an earlier try may have gone through, err as one
// that leaves open what has become of the write, whatever its cause says.
func afterLost(err error, repeated bool) error {
	f, ok := errors.AsType[*failure](err)
	if !ok || !repeated || f.kind != kindUnavailable {
		return err
	}
	g := *f
	g.cause = fmt.Errorf("after a try whose answer was lost: %v", f.cause) // and so not errUnsent
	return &g
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
// error which came instead of PostgreSQL's answer leaves open what it did. (Not
// if there was no connection: then nothing was sent; nor if PostgreSQL says what
// it lacks: then it has undone all.)
func unsure(err error) error {
	if err == nil {
		return nil
	}
	f := asFailure(err)
	if refused := pq.As(err); refused != nil && refused.Code.Class() == "53" { // insufficient resources
		return err
	}
	if errors.Is(err, errUnsent) || f.kind != kindTimeout && f.kind != kindUnavailable {
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
	case pq.As(err, pqerror.QueryCanceled, pqerror.LockNotAvailable) != nil: // by statement_timeout, or after many times lock_timeout
		return &failure{kind: kindTimeout, cause: err}
	case pq.As(err, pqerror.DiskFull) != nil:
		return &failure{kind: kindUnavailable, message: "The database has no space left", cause: err}
	case isUnavailable(err):
		return &failure{kind: kindUnavailable, message: "The database is not available", cause: err}
	case refused != nil && refused.Code == pqerror.UniqueViolation: // of the address, or of an id: see createAlone
		return errEmailTaken
	default:
		return &failure{kind: kindDatabase, cause: err}
	}
}

// passes reports whether err is of the kind that another try may not meet:
// PostgreSQL starts, stops, crashed, fails over or can't be reached, or it has
// undone the statement for the sake of another one.
func passes(err error) bool {
	if refused := pq.As(err); refused != nil {
		switch refused.Code {
		case pqerror.TRDeadlockDetected, pqerror.TRSerializationFailure,
			pqerror.AdminShutdown, pqerror.CrashShutdown, pqerror.CannotConnectNow, pqerror.IdleSessionTimeout,
			pqerror.ReadOnlySQLTransaction, // a standby, or a primary that became one
			pqerror.TooManyConnections,
			pqerror.LockNotAvailable: // within lockPatience
			return true
		}
		return refused.Code.Class() == "08" // connection exception
	}
	if _, ok := errors.AsType[connectError](err); ok || errors.Is(err, errSentBefore) || errors.Is(err, errUnsettled) {
		return true
	}
	var netErr net.Error
	return errors.Is(err, driver.ErrBadConn) || errors.Is(err, sql.ErrConnDone) || errors.As(err, &netErr) ||
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}

// isUnavailable reports whether err is the database's failure and nobody's
// fault here: it passes, or PostgreSQL lacks what it needs right now.
func isUnavailable(err error) bool {
	if refused := pq.As(err); refused != nil {
		switch refused.Code.Class() {
		case "40", // transaction rollback: the tries ran out
			"53", // insufficient resources: connections, memory, disk
			"57", // operator intervention: shutdown, crash, starting up, cancelled by an administrator
			"58": // system error, outside PostgreSQL
			return true
		}
		return passes(err) || refused.Code == pqerror.LockNotAvailable
	}
	return passes(err)
}
