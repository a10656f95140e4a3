//go:build !plain

package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// Exactly-once writes
//
// PostgreSQL restarts, crashes, fails over. A statement that meets that is tried
// again until the deadline of its request. A write whose response was lost may have
// been executed all the same. So before it is repeated, the backend that it was
// sent to is terminated, and what that has committed is waited for. Then the
// repeated write can tell what its first try did from what another client did.
//
// A row that another session has locked is an obstacle of the same kind: the
// statement gives up after lockTimeout, releases its connection, and is tried again.
//
// This relies on what database/sql does beyond its documentation (Go 1.26,
// sql.go): DB.conn calls ResetSession before it uses a connection again, and
// DB.retry repeats a statement by itself only where its error matches
// driver.ErrBadConn. Were that to change, a connection that was given up might be
// used, which costs a retry, or a write be repeated unseen, and
// TestWritesWhoseAnswersAreLost would fail.

// lockTimeout is how long a statement waits for a lock: long beside what others
// need to commit, short beside what a connection is worth.
const lockTimeout = 50 * time.Millisecond

// An onceStore is a [userStore] that has another one execute each write once.
type onceStore struct {
	userStore
	pg *pgStore
}

// exactlyOnce goes around a store whose statements run on pg, before it has connected.
func exactlyOnce(next userStore, pg *pgStore) userStore {
	pg.connector.settings = append(pg.connector.settings, fmt.Sprintf("SET lock_timeout = %d", lockTimeout.Milliseconds()))
	return &onceStore{next, pg}
}

func (o *onceStore) create(ctx context.Context, in newUser) (user, error) {
	u, repeated, err := retry(ctx, o, func() (user, error) { return o.userStore.create(ctx, in) })
	if repeated && isRefused(err) { // perhaps because of the first try
		if mine, err := o.get(ctx, in.id); !errors.Is(err, errNotFound) {
			return mine, markAmbiguous(err)
		}
	}
	return u, err
}

func (o *onceStore) get(ctx context.Context, id string) (user, error) {
	u, _, err := retry(ctx, o, func() (user, error) { return o.userStore.get(ctx, id) })
	return u, err
}

func (o *onceStore) find(ctx context.Context, email string) (user, error) {
	u, _, err := retry(ctx, o, func() (user, error) { return o.userStore.find(ctx, email) })
	return u, err
}

func (o *onceStore) list(ctx context.Context, q listQuery) (*page, error) {
	p, _, err := retry(ctx, o, func() (*page, error) { return o.userStore.list(ctx, q) })
	return p, err
}

// update repeats a patch, which says how the user is to be: to make it twice is to
// make it once. But the second time a precondition does not hold any more, which
// is no conflict if all is as asked for (RFC 9110, section 13.1.1: "appears to have
// already been applied").
func (o *onceStore) update(ctx context.Context, p userPatch) (user, error) {
	u, repeated, err := retry(ctx, o, func() (user, error) { return o.userStore.update(ctx, p) })
	if !repeated || !errors.Is(err, errPrecondition) || p.userInput == (userInput{}) {
		return u, err
	}
	u, err = o.get(ctx, p.id)
	stored := userInput{&u.Email, &u.Name}
	for i, field := range stored.fields() {
		if wanted := *p.fields()[i].value; err == nil && wanted != nil && *wanted != **field.value {
			err = errPrecondition
		}
	}
	return u, markAmbiguous(err)
}

// delete repeats a delete: to find nobody the second time is success.
func (o *onceStore) delete(ctx context.Context, id string, when preconditions) error {
	_, repeated, err := retry(ctx, o, func() (user, error) { return user{}, o.userStore.delete(ctx, id, when) })
	if repeated && errors.Is(err, errNotFound) {
		return nil
	}
	return err
}

// retry calls try, and again as long as its error is one that another try may not
// meet and ctx has time for it. repeated reports whether an earlier try may have
// executed its write.
func retry[T any](ctx context.Context, o *onceStore, try func() (T, error)) (answer T, repeated bool, err error) {
	var before error
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, 200*time.Millisecond) {
		generation := o.pg.connector.generation.Load()
		if answer, err = try(); err != nil && before != nil && ctx.Err() == context.DeadlineExceeded {
			err = before // which says why there was no time
		}
		before = err
		lost, wasLost := errors.AsType[unansweredError](err)
		if repeated = repeated || wasLost; repeated {
			err = markAmbiguous(err)
		}
		if !isRetryable(err) {
			return answer, repeated, err
		}
		if pq.As(err, pqerror.ReadOnlySQLTransaction) != nil {
			o.pg.connector.renew(generation) // another server is the primary by now
		}
		for settled := false; !settled; settled = !wasLost || o.settle(ctx, lost.backend) {
			if !wait(ctx, pause/2+rand.N(pause)) { // unlike others that wait for the same
				if ctx.Err() == context.Canceled {
					err = asAPIError(ctx.Err())
				}
				return answer, repeated, err
			}
		}
		reason := "connection"
		if pgErr := pq.As(err); pgErr != nil {
			reason = string(pgErr.Code)
		}
		o.pg.observe("retry", reason, 1)
	}
}

// wait waits for d, and reports whether ctx leaves time for another try.
func wait(ctx context.Context, d time.Duration) bool {
	if deadline, ok := ctx.Deadline(); ok {
		left := time.Until(deadline) - 100*time.Millisecond // to respond in
		if left <= 0 {
			return false
		}
		d = min(d, left)
	}
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// settle terminates a backend whose connection broke, and reports whether it has
// ended and all that it committed is there to stay.
func (o *onceStore) settle(ctx context.Context, b backend) bool {
	generation := o.pg.connector.generation.Load()
	ended, err := true, error(nil)
	if b.pid != 0 {
		err = o.pg.db.QueryRowContext(ctx, "SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity WHERE pid = $1 AND backend_start = $2",
			b.pid, b.started).Scan(&ended)
		if errors.Is(err, sql.ErrNoRows) { // it has ended, or this is another server
			ended, err = true, nil
		}
	}
	if err == nil && ended {
		// What it has done may be on this server alone: PostgreSQL shows a commit whose
		// wait for the standby was cut short. A commit of our own waits for all before it.
		_, err = o.pg.db.ExecContext(ctx, "SELECT pg_logical_emit_message(true, 'rollcall', '')")
	}
	if pq.As(err) != nil { // such as of a standby, which can't answer
		o.pg.connector.renew(generation)
	}
	return err == nil && ended
}

// renew has the connections of a generation not be used again.
func (c *connector) renew(generation int64) { c.generation.CompareAndSwap(generation, generation+1) }

// isRetryable reports whether another try may not meet err: PostgreSQL starts,
// stops, crashed, fails over or can't be reached, a row is locked, or the statement
// was undone for the sake of another one.
func isRetryable(err error) bool {
	if pq.As(err, pqerror.LockNotAvailable) != nil {
		return true
	}
	return err != nil && asAPIError(err).kind == kindUnavailable && isTransient(err)
}

// markAmbiguous returns err, or, if it leaves open what became of a write, err as
// one that says so.
func markAmbiguous(err error) error {
	e := asAPIError(err)
	if errors.Is(err, errAmbiguous) || e.kind != kindUnavailable && e.kind != kindTimeout {
		return err
	}
	return &apiError{kind: e.kind, message: e.message, cause: fmt.Errorf("%w: %w", errAmbiguous, e.cause)}
}
