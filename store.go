package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// The store is where SQL lives: everybody else speaks of users. Its methods
// return [errNotFound], [errEmailTaken], [errKeyReused], [errPrecondition],
// [errSkipped], failures of the kinds conflict and shape (a rule that others have
// made), unavailable, timeout, callerGone and database, and what their context ends
// with; nothing of the driver's gets out.

// columns are those of a user, in the order of [user.fields]. A table that was
// taken over may allow NULL, where one such row must not hide the others.
const columns = "id, COALESCE(email, ''), COALESCE(name, ''), COALESCE(created_at, 'infinity'), COALESCE(updated_at, '-infinity')"

// version is the version of a user in SQL: what [user.version] is in Go.
const version = "(extract(epoch FROM LEAST(GREATEST(updated_at, timestamptz '0001-01-01 00:00:00Z'), " + lastUpdate + ")) * 1000000)::bigint::text"

// newUpdate is the updated_at of an update. It is the version, so it moves on even
// if the clock does not; where there is no later version, it comes back to the clock.
const (
	newUpdate  = "GREATEST(now(), CASE WHEN updated_at < " + lastUpdate + " THEN updated_at + interval '1 microsecond' END)"
	lastUpdate = "timestamptz '9999-12-31 23:59:59.999999Z'"
)

// What -infinity and infinity are in Go: right outside of the times that
// PostgreSQL can store (its manual, table 8.9).
var (
	minusInfinity = time.Date(-4713, time.November, 24, 0, 0, 0, -1000, time.UTC) // 4714 BC
	plusInfinity  = time.Date(294277, time.January, 1, 0, 0, 0, 0, time.UTC)
)

func init() { pq.EnableInfinityTs(minusInfinity, plusInfinity) }

// timestamp returns t as PostgreSQL reads it. lib/pq's own way moves the leap days
// before year 1 by a day.
func timestamp(t time.Time) string {
	switch t = t.UTC(); {
	case !t.After(minusInfinity):
		return "-infinity"
	case !t.Before(plusInfinity):
		return "infinity"
	case t.Year() < 1: // year 0 is 1 BC
		return fmt.Sprintf("%04d-%sZ BC", 1-t.Year(), t.Format("01-02 15:04:05.000000"))
	}
	return t.Format(timeFormat)
}

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
	updateUser = "UPDATE users SET email = COALESCE($2, email), name = COALESCE($3, name), updated_at = " + newUpdate + " " +
		"WHERE id = $1 AND " + conditionsHold("$4", "$5") + " RETURNING " + columns
	deleteUser = "DELETE FROM users WHERE id = $1 AND " + conditionsHold("$2", "$3") + " RETURNING " + columns
)

// planning has PostgreSQL plan each prepared statement once for a connection, and
// by its indexes alone (its manual, sections 20.7 and "PREPARE"). Left to itself, it
// plans most of them anew for the parameters of each execution, which takes longer
// than to execute them; and what it plans for an empty table reads all of it, when it
// has grown, until it is analyzed.
const planning = "SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off; SET enable_bitmapscan = off; " +
	"SET enable_hashjoin = off; SET enable_mergejoin = off; SET enable_sort = off; SET jit = off;"

// readOnlyPatience is for how long a connection to a primary is used before it is
// made anew, and its server asked again whether it is one. That it has become
// read-only, a refused write tells at once; reads alone would never find out.
const readOnlyPatience = 20 * time.Second

// A store keeps users in PostgreSQL. It is safe for concurrent use.
type store struct {
	db    *sql.DB
	pool  *connector // of db
	aside *sql.DB    // beside the pool: for start, whose migrations take as long as they take
	probe *sql.DB    // beside the pool, for ping
	log   *slog.Logger
	limit time.Duration // after which PostgreSQL ends a statement by itself, without a pooler; 0: it does not

	prepared map[string]*sql.Stmt // by text; complete once started is true
	many     batches
	alone    *lockQueue // where a write that can't be done with others is done
	started  atomic.Bool
	answered atomic.Int64 // when PostgreSQL last answered, in nanoseconds since 1970
}

// openStore returns the store of the configured database. It does not connect:
// [store.start] does.
func openStore(cfg config, log *slog.Logger) *store {
	s := &store{log: log, prepared: make(map[string]*sql.Stmt)}
	s.many = newBatches(s, cfg.dbMaxConns)
	s.alone = newLockQueue(cfg.dbMaxConns)
	database := cfg.database
	database.ConnectTimeout = min(database.ConnectTimeout, cfg.requestTimeout)
	database.BinaryParameters = true // what is not prepared goes out in one message, which no pooler can split
	s.limit = cfg.requestTimeout
	if cfg.database.Runtime["statement_timeout"] != "" {
		s.limit = 0 // the operator has decided
	}
	session := planning
	if s.limit != 0 {
		session += fmt.Sprintf("SET statement_timeout = %d; SET lock_timeout = %d;", max(1, s.limit.Milliseconds()), lockPatience.Milliseconds())
	}
	// A statement ends after the time of a request; who has not answered even
	// that soon after will not answer any more.
	s.pool = &connector{database: database, session: session, patience: cfg.requestTimeout + 250*time.Millisecond, identify: true, log: log}
	s.pool.pooled.Store(cfg.database.BinaryParameters)
	s.db = sql.OpenDB(s.pool)
	s.db.SetMaxOpenConns(cfg.dbMaxConns)
	s.db.SetMaxIdleConns(cfg.dbMaxConns)
	s.db.SetConnMaxIdleTime(5 * time.Minute) // before firewalls forget an idle connection
	lifetime := time.Hour                    // so that the pool follows a database that moved
	if attrs := cfg.database.TargetSessionAttrs; attrs == pq.TargetSessionAttrsReadWrite || attrs == pq.TargetSessionAttrsPrimary {
		lifetime = readOnlyPatience
	}
	s.db.SetConnMaxLifetime(lifetime)
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
// does not cure is a [*schemaError], or a [usageError] where it is the connection.
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
			switch refused.Code.Class() {
			case "22", "42", "55": // it is asked for something that is not there, or not so
				if refused.Fatal() { // by the connection
					return usageError("DATABASE_URL: PostgreSQL refuses the connection: " + strings.ReplaceAll(describe(refused), "\n", "; "))
				}
			}
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
	for _, text := range []string{insertUser, selectUser, findUser, firstUsers, nextUsers, updateUser, deleteUser,
		selectKeyed, insertUsers, insertUsersOnce, selectUsers, findUsers, updateUsers, deleteUsers} {
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
// the address, letter case ignored, and [errSkipped] if a trigger does not let it. With an id from [keyedUUID] it returns the
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
	if errors.Is(err, errNotFound) { // RETURNING nothing
		err = errSkipped
	}
	switch {
	case !isRefused(err):
		return u, err
	case isKeyed(in.id):
		return s.madeBefore(ctx, in.id, s.takenOr(ctx, in.id, in.email, err))
	}
	// An earlier try may have gone through, here or in [store.createMany]: then it
	// is this very user who has the id and the address.
	u, _, lookupErr := s.one(ctx, selectUser, in.id)
	if errors.Is(lookupErr, errNotFound) {
		return u, s.takenOr(ctx, in.id, in.email, err)
	}
	return u, lookupErr
}

// takenOr returns err, or [errEmailTaken] where it is of a unique index that has another
// name than ours, and another user than id has the address.
func (s *store) takenOr(ctx context.Context, id, email string, err error) error {
	if pq.As(err, pqerror.UniqueViolation) != nil {
		if u, _, lookupErr := s.one(ctx, findUser, email); lookupErr == nil && u.ID != id {
			return errEmailTaken
		}
	}
	return err
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

// deepOffset is from which offset on a list is deep: PostgreSQL takes 0.1 ms or more to
// find its begin, row by row. [users.deepPage] says how few of those there may be.
const deepOffset = 1000

// list returns up to limit users, newest first: those behind after, or, where
// that is nil, those behind the first offset ones.
func (s *store) list(ctx context.Context, limit, offset int64, after *position) (users []user, err error) {
	if after != nil {
		users, _, err = s.query(ctx, nextUsers, limit, timestamp(after.createdAt), after.id)
	} else {
		users, _, err = s.query(ctx, firstUsers, limit, offset)
	}
	return users, err
}

// update changes the fields that are not nil. The error is [errNotFound], or
// [errPrecondition] if the user is in a version that when excludes, or
// [errEmailTaken], or [errSkipped] if a trigger does not let it.
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
	if !errors.Is(err, errNotFound) {
		if in.email != nil {
			err = s.takenOr(ctx, in.id, *in.email, err)
		}
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
	return u, in.when.whyNot(&u)
}

// delete removes the user of that id. The error is [errNotFound], or
// [errPrecondition] if the user is in a version that when excludes, or
// [errSkipped] if a trigger does not let it.
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
	u, _, err = s.one(ctx, selectUser, in.id)
	switch {
	case err == nil:
		return u, in.when.whyNot(&u)
	case errors.Is(err, errNotFound) && again:
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
		var u user
		fields := u.fields()
		for rows.Next() {
			if err := rows.Scan(fields...); err != nil {
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
