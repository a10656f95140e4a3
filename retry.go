package main

import (
	"cmp"
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// Once, whatever happens
//
// PostgreSQL restarts, crashes, fails over. A statement that meets that is tried
// again until the deadline of its request. One that was sent and not answered may
// have been done all the same, so before a write is repeated,
//
//   - nobody is left who could do it late, after what replaces it (end);
//   - and whoever repeats it knows, to tell what its first try did from what
//     somebody else did (the xAlone methods of store.go).
//
// What is never repeated is what PostgreSQL has refused for good.

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

func (s *store) runOnce(ctx context.Context, text string, args []any, read func(*sql.Rows) error) error {
	if err := ctx.Err(); err != nil { // nobody waits for it any more
		return err
	}
	// To watch ctx, database/sql and lib/pq take a goroutine each. PostgreSQL ends
	// the statement by itself, so ctx matters only where that would be later than
	// the deadline, or where a connection has to be waited for.
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) > s.limit-100*time.Millisecond && s.limit > 0 && !s.pool.pooled.Load() && s.db.Stats().Idle > 0 &&
		!(text == firstUsers && args[1].(int64) >= deepOffset) { // a deep list ends with its caller: others wait for it
		ctx = context.WithoutCancel(ctx)
	}
	rows, err := s.prepared[text].QueryContext(ctx, args...)
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
	case refused == nil:
		return &failure{kind: kindDatabase, cause: err}
	case refused.Code == pqerror.UniqueViolation && refused.Constraint == "users_email_lower_key":
		return errEmailTaken
	// What others have added to the table: constraints, shorter types, triggers. Their
	// names are in the text of err. (Or, of a create that is repeated, it is the id that
	// its first try has taken: see createAlone.)
	case pq.As(err, pqerror.UniqueViolation, pqerror.ExclusionViolation, pqerror.ForeignKeyViolation, pqerror.RestrictViolation) != nil:
		return &failure{kind: kindConflict, message: "The change conflicts with other data in the database", cause: err}
	case refused.Code.Class() == "P0", refused.Code.Class() == "45", refused.Code.Class() == pqerror.ClassDataException, // P0 and 45 by a trigger
		refused.Code.Class() == pqerror.ClassIntegrityConstraintViolation:
		return &failure{kind: kindShape, message: "The change breaks a rule of the database", cause: err}
	default:
		return &failure{kind: kindDatabase, cause: err}
	}
}

// isRefused reports whether err, of a write, is about the row and what is there
// already: the change is not made, now or later.
func isRefused(err error) bool {
	f, ok := errors.AsType[*failure](err)
	return ok && (f.kind == kindConflict || f.kind == kindShape)
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
	}
	return passes(err)
}
