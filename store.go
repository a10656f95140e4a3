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
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// The store is where SQL lives: one method, one statement. Nothing of the driver's
// gets out; what can go wrong is said at [userStore].

// columns are those of a user, in the order of [user.fields]. A table that was
// taken over may allow NULL, where one such row must not hide the others.
const columns = "id, COALESCE(email, ''), COALESCE(name, ''), COALESCE(created_at, 'infinity'), COALESCE(updated_at, '-infinity')"

// inputColumns are those that clients write.
var inputColumns = eachField("{name}", 0)

// eachField returns the text once for each of [userInput.fields], with commas between
// them: with its name, and its number from first on.
func eachField(text string, first int) string {
	var all []string
	for i, field := range new(userInput).fields() {
		all = append(all, strings.NewReplacer("{name}", field.name, "{n}", strconv.Itoa(first+i)).Replace(text))
	}
	return strings.Join(all, ", ")
}

// The statements. Each connection prepares them once. conditional.go has what versions and
// preconditions are in SQL.
var (
	insertUser  = "INSERT INTO users (id, " + inputColumns + ") VALUES ($1, " + eachField("${n}", 2) + ") RETURNING " + columns
	selectUser  = "SELECT " + columns + " FROM users WHERE id = $1"
	selectUsers = "SELECT " + columns + " FROM users WHERE id = ANY ($1::uuid[])"
	findUser    = "SELECT " + columns + " FROM users WHERE lower(email) = lower($1)"
	firstUsers  = "SELECT " + columns + " FROM users ORDER BY created_at DESC, id DESC LIMIT $1 OFFSET $2"
	nextUsers   = "SELECT " + columns + " FROM users WHERE (created_at, id) < ($2, $3) ORDER BY created_at DESC, id DESC LIMIT $1"
	updateUser  = "UPDATE users SET " + eachField("{name} = COALESCE(${n}, {name})", 4) + ", updated_at = " + newUpdate + " " +
		"WHERE id = $1 AND " + conditionsHold("$2", "$3") + " RETURNING " + columns
	deleteUser = "DELETE FROM users WHERE id = $1 AND " + conditionsHold("$2", "$3") + " RETURNING " + columns
)

// A pgStore keeps users in PostgreSQL. It is a [userStore].
type pgStore struct {
	db        *sql.DB
	connector *connector // of db
	migrateDB *sql.DB    // beside the pool, for start: migrations take as long as they take
	pingDB    *sql.DB    // beside the pool, so that a pool of slow statements is no outage
	log       *slog.Logger
	deep      chan struct{} // a semaphore of the deep list that is read
	deepQueue chan struct{} // a semaphore of those that wait for it, or are read
	answered  atomic.Int64  // when PostgreSQL last answered, in nanoseconds since 1970

	// observe is told of what the store does: of each statement, its seconds.
	observe func(what, label string, value float64)
}

// openStore returns the store of the configured database. It does not connect:
// [pgStore.start] does.
func openStore(cfg config, log *slog.Logger) *pgStore {
	s := &pgStore{log: log, connector: newConnector(cfg, log), observe: func(string, string, float64) {}}
	s.deep, s.deepQueue = make(chan struct{}, 1), make(chan struct{}, max(1, cfg.maxInFlight/4))
	s.db = sql.OpenDB(s.connector)
	s.db.SetMaxOpenConns(cfg.dbMaxConns)
	s.db.SetMaxIdleConns(cfg.dbMaxConns)
	s.db.SetConnMaxIdleTime(5 * time.Minute) // before firewalls forget an idle connection
	s.db.SetConnMaxLifetime(connLifetime(cfg))
	s.pingDB = openUnpooled(cfg, readyTimeout)
	s.migrateDB = openUnpooled(cfg, 0)
	return s
}

// close ends the pool. Statements that still run are cancelled with their requests.
func (s *pgStore) close() error {
	return errors.Join(s.db.Close(), s.migrateDB.Close(), s.pingDB.Close())
}

// ping reports whether PostgreSQL answers. One that answered a request within
// the last second needs no asking.
func (s *pgStore) ping(ctx context.Context) error {
	if time.Since(time.Unix(0, s.answered.Load())) < time.Second {
		return nil
	}
	return s.pingDB.PingContext(ctx)
}

func (s *pgStore) create(ctx context.Context, u newUser) (user, error) {
	created, err := s.one(ctx, insertUser, u.args(&u.id)...)
	if errors.Is(err, errNotFound) {
		err = errSkipped
	}
	err = s.takenOr(ctx, u.id, u.email, err)
	if isRefused(err) && isKeyed(u.id) {
		return s.createdBefore(ctx, u.id, err)
	}
	return created, err
}

// takenOr returns err, or errEmailTaken where it is of a unique index that has another
// name than ours, and another user than id has the address.
func (s *pgStore) takenOr(ctx context.Context, id string, email *string, err error) error {
	if email != nil && pq.As(err, pqerror.UniqueViolation) != nil {
		if u, lookupErr := s.find(ctx, *email); lookupErr == nil && u.ID != id {
			return errEmailTaken
		}
	}
	return err
}

func (s *pgStore) get(ctx context.Context, id string) (user, error) {
	return s.one(ctx, selectUser, id)
}

func (s *pgStore) find(ctx context.Context, email string) (user, error) {
	return s.one(ctx, findUser, email)
}

func (s *pgStore) list(ctx context.Context, q listQuery) (*page, error) {
	var users []user
	var err error
	switch {
	case q.ids != "":
		users, err = s.query(ctx, selectUsers, "{"+q.ids+"}")
		sortByIDs(users, strings.Split(q.ids, ","))
	case q.after != (position{}):
		users, err = s.query(ctx, nextUsers, q.limit+1, timestamp(q.after.createdAt), q.after.id)
	case q.offset >= deepOffset:
		users, err = s.deepList(ctx, q)
	default:
		users, err = s.query(ctx, firstUsers, q.limit+1, q.offset)
	}
	return newPage(users, q.limit), err
}

func (s *pgStore) update(ctx context.Context, p userPatch) (user, error) {
	u, err := s.one(ctx, updateUser, p.args(&p.id, p.when.match, p.when.noneMatch)...)
	if errors.Is(err, errNotFound) {
		return u, s.missError(ctx, p.id, p.when)
	}
	return u, s.takenOr(ctx, p.id, p.email, err)
}

func (s *pgStore) delete(ctx context.Context, id string, when preconditions) error {
	_, err := s.one(ctx, deleteUser, id, when.match, when.noneMatch)
	if errors.Is(err, errNotFound) {
		return s.missError(ctx, id, when)
	}
	return err
}

// one runs a statement that returns at most one user; none is [errNotFound].
func (s *pgStore) one(ctx context.Context, text string, args ...any) (user, error) {
	users, err := s.query(ctx, text, args...)
	if err == nil && len(users) == 0 {
		err = errNotFound
	}
	if err != nil {
		return user{}, err
	}
	return users[0], nil
}

// query runs a statement that returns users.
func (s *pgStore) query(ctx context.Context, text string, args ...any) (users []user, err error) {
	var u user
	fields := u.fields()
	err = s.each(ctx, text, args, func(rows *sql.Rows) error {
		err := rows.Scan(fields...)
		users = append(users, u)
		return err
	})
	return users, err
}

// args returns the arguments of a statement: others, and behind them the fields. All are
// of type *string.
func (in userInput) args(others ...any) []any {
	for _, field := range in.fields() {
		others = append(others, *field.value)
	}
	return others
}

// fields returns where to scan the columns of a user.
func (u *user) fields() []any { return []any{&u.ID, &u.Email, &u.Name, &u.CreatedAt, &u.UpdatedAt} }

// each runs a statement and has scan take each of its rows.
func (s *pgStore) each(ctx context.Context, text string, args []any, scan func(*sql.Rows) error) error {
	start := time.Now()
	rows, err := s.db.QueryContext(ctx, text, args...)
	if err != nil {
		return translate(ctx, err)
	}
	defer rows.Close()
	for rows.Next() {
		if err := scan(rows); err != nil {
			return translate(ctx, err)
		}
	}
	if err := rows.Err(); err != nil {
		if isWrite(text) && err == ctx.Err() { // for which database/sql closes the rows
			err = unansweredError{cause: err}
		}
		return translate(ctx, err)
	}
	now := time.Now()
	s.answered.Store(now.UnixNano())
	s.observe("statement", "", now.Sub(start).Seconds())
	addTiming(ctx, 0, now.Sub(start))
	return nil
}

// isWrite reports whether a statement changes anything.
func isWrite(text string) bool { return !strings.HasPrefix(text, "SELECT") }

// translate turns an error of the driver into one of ours, by its SQLSTATE
// (PostgreSQL's manual, appendix A) and never by its text.
func translate(ctx context.Context, err error) error {
	switch pgErr := pq.As(err); {
	case ctx.Err() != nil: // whatever the driver made of it
		return asAPIError(fmt.Errorf("%w (%w)", ctx.Err(), err))
	case pq.As(err, pqerror.QueryCanceled, pqerror.LockNotAvailable) != nil: // by statement_timeout or lock_timeout
		return &apiError{kind: kindTimeout, cause: err}
	case pq.As(err, pqerror.DiskFull) != nil:
		return &apiError{kind: kindUnavailable, message: "The database has no space left", cause: err}
	case isUnavailable(err):
		return &apiError{kind: kindUnavailable, message: "The database is not available", cause: err}
	case pgErr == nil:
		return &apiError{kind: kindDatabase, cause: err}
	case pgErr.Code == pqerror.UniqueViolation && pgErr.Constraint == "users_email_lower_key":
		return errEmailTaken
	// What others have added to the table: constraints, shorter types, triggers. Their
	// names are in the text of err.
	case pq.As(err, pqerror.UniqueViolation, pqerror.ExclusionViolation, pqerror.ForeignKeyViolation, pqerror.RestrictViolation) != nil:
		return &apiError{kind: kindConflict, message: "The change conflicts with other data in the database", cause: err}
	case slices.Contains(ruleClasses, pgErr.Code.Class()):
		return &apiError{kind: kindUnprocessable, message: "The change breaks a rule of the database", cause: err}
	default:
		return &apiError{kind: kindDatabase, cause: err}
	}
}

// ruleClasses are the classes of errors about the row itself; P0 and 45 are those of triggers.
var ruleClasses = []pqerror.Class{pqerror.ClassDataException, pqerror.ClassIntegrityConstraintViolation, "P0", "45"}

// isRefused reports whether err, of a write, is about the row and what is there
// already: the change is not made, now or later.
func isRefused(err error) bool {
	e, ok := errors.AsType[*apiError](err)
	return ok && (e.kind == kindConflict || e.kind == kindUnprocessable)
}

// isTransient reports whether another try may not meet err: PostgreSQL starts,
// stops, crashed, fails over or can't be reached, or it has undone the statement
// for the sake of another one.
func isTransient(err error) bool {
	if pgErr := pq.As(err); pgErr != nil {
		switch pgErr.Code {
		case pqerror.TRDeadlockDetected, pqerror.TRSerializationFailure,
			pqerror.AdminShutdown, pqerror.CrashShutdown, pqerror.CannotConnectNow, pqerror.IdleSessionTimeout,
			pqerror.ReadOnlySQLTransaction, // a standby, or a primary that became one
			pqerror.TooManyConnections:
			return true
		}
		return pgErr.Code.Class() == "08" // connection exception
	}
	return errors.As(err, new(connectError)) || errors.As(err, new(net.Error)) || errors.Is(err, errAmbiguous) ||
		errors.Is(err, driver.ErrBadConn) || errors.Is(err, sql.ErrConnDone) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}

// isUnavailable reports whether err is the database's failure and nobody's
// fault here: it is transient, or PostgreSQL lacks what it needs right now.
func isUnavailable(err error) bool {
	if pgErr := pq.As(err); pgErr != nil {
		switch pgErr.Code.Class() {
		case "40", // transaction rollback: the tries ran out
			"53", // insufficient resources: connections, memory, disk
			"57", // operator intervention: shutdown, crash, starting up, cancelled by an administrator
			"58": // system error, outside PostgreSQL
			return true
		}
	}
	return isTransient(err)
}
