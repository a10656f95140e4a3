//go:build !plain

package main

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// Many requests, one statement
//
// To look up one row costs PostgreSQL less than to be asked: a message to parse, a
// process to wake, a response to send, and for a write a disk to wait for. So
// requests that wait at the same moment share a statement.
//
// There is no added delay. A request that finds no statement under way runs its own at
// once. Requests that come meanwhile wait; when the statement has ended, the next one
// takes those that wait by then. The busier it gets, the more requests share a
// statement. So all reads take turns, and all writes; but a statement that takes longer
// than maxHold does not keep the next one waiting.
//
// A request that the shared statement leaves out runs a statement of its own, by
// the store below: because its row is locked, or because the shared statement
// failed and only one of its requests may be the reason.

const (
	// maxBatch is how many requests share a statement at most. By then, the cost of a
	// statement as such is some hundredths of what its requests cost.
	maxBatch = 24
	// maxHold is how long a statement keeps the next one waiting: several times what
	// an ordinary commit takes.
	maxHold = 10 * time.Millisecond
)

// A batcher runs calls that wait together as one batch. Q is what a call asks, A
// what it gets. It is safe for concurrent use.
type batcher[Q, A any] struct {
	// one answers a call that has no company.
	one func(ctx context.Context, ask Q) (A, error)
	// many answers the calls of a batch, by setting answer or err of each. ctx ends
	// when no request waits for it any more.
	many func(ctx context.Context, calls []*call[Q, A])

	began func(calls int) // told of each statement

	writes bool      // a call that is given up may have been executed
	turn   semaphore // of the statement that keeps the next one waiting

	mu      sync.Mutex
	waiting []*call[Q, A] // in the order of their arrival
	next    bool          // runNext is under way, to take them
}

// A semaphore bounds what runs at a time: send to acquire, receive to release.
type semaphore chan struct{}

// A call is the part of one request in a batch.
type call[Q, A any] struct {
	ask    Q
	answer A
	err    error

	batch *batch[Q, A]  // that has taken the call; nil while it waits
	done  chan struct{} // closed when answer and err are set
}

// A batch is the calls of one statement.
type batch[Q, A any] struct {
	calls   []*call[Q, A]
	took    time.Duration // of the statement; set before its calls are done
	ctx     context.Context
	cancel  context.CancelFunc
	waiting int // requests that wait for it; under the lock of the batcher
}

// do answers ask, possibly together with others. A call joins only a batch that
// has not been sent: so a read sees every write that was acknowledged before it.
// When ctx ends first, the error is ctx's; of a write whose batch was sent, it
// matches [errAmbiguous].
func (b *batcher[Q, A]) do(ctx context.Context, ask Q) (A, error) {
	b.mu.Lock()
	if !b.next { // and so nobody waits
		select {
		case b.turn <- struct{}{}:
			b.mu.Unlock()
			defer b.hold()()
			b.began(1)
			return b.one(ctx, ask)
		default:
			b.next = true
			go b.runNext()
		}
	}
	start := time.Now()
	me := &call[Q, A]{ask: ask, done: make(chan struct{})}
	b.waiting = append(b.waiting, me)
	b.mu.Unlock()

	select {
	case <-me.done:
		addTiming(ctx, time.Since(start)-me.batch.took, me.batch.took)
		return me.answer, me.err
	case <-ctx.Done():
		var none A
		return none, b.leave(me, ctx.Err())
	}
}

// leave gives up a call. It returns the error of the call, made of cause.
func (b *batcher[Q, A]) leave(me *call[Q, A], cause error) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if me.batch == nil {
		b.waiting = slices.DeleteFunc(b.waiting, func(c *call[Q, A]) bool { return c == me })
		return cause
	}
	if me.batch.waiting--; me.batch.waiting == 0 {
		me.batch.cancel()
	}
	if b.writes {
		return fmt.Errorf("%w (%w)", cause, errAmbiguous)
	}
	return cause
}

// hold keeps the turn until release is called, or for maxHold.
func (b *batcher[Q, A]) hold() (release func()) {
	timer := time.AfterFunc(maxHold, func() { <-b.turn })
	return func() {
		if timer.Stop() {
			<-b.turn
		}
	}
}

// runNext waits for the turn, and runs a batch of the calls that wait by then.
func (b *batcher[Q, A]) runNext() {
	b.turn <- struct{}{}
	defer b.hold()()
	b.mu.Lock()
	taken := b.take()
	if b.next = len(b.waiting) > 0; b.next {
		go b.runNext()
	}
	b.mu.Unlock()
	b.run(taken)
}

// take makes a batch of calls that wait.
func (b *batcher[Q, A]) take() *batch[Q, A] {
	n := min(len(b.waiting), maxBatch)
	taken := &batch[Q, A]{calls: slices.Clone(b.waiting[:n]), waiting: n}
	taken.ctx, taken.cancel = context.WithCancel(context.Background())
	for _, c := range taken.calls {
		c.batch = taken
	}
	b.waiting = slices.Delete(b.waiting, 0, n)
	return taken
}

// run answers the calls of a batch.
func (b *batcher[Q, A]) run(taken *batch[Q, A]) {
	defer taken.cancel()
	calls := taken.calls
	if len(calls) == 0 { // they have left
		return
	}
	b.began(len(calls))
	start := time.Now()
	catchPanic(calls, func() {
		if len(calls) == 1 {
			calls[0].answer, calls[0].err = b.one(taken.ctx, calls[0].ask)
		} else {
			b.many(taken.ctx, calls)
		}
	})
	taken.took = time.Since(start)
	for _, c := range calls {
		close(c.done)
	}
}

// catchPanic calls f, and has the calls fail if it panics.
func catchPanic[Q, A any](calls []*call[Q, A], f func()) {
	defer func() {
		if v := recover(); v != nil {
			for _, c := range calls {
				c.err = fmt.Errorf("panic: %v\n%s", v, debug.Stack())
			}
		}
	}()
	f()
}

// A batchedStore is a [userStore] that asks PostgreSQL for many requests at a time.
type batchedStore struct {
	userStore
	pg      *pgStore
	singles semaphore // of writes that run alone, beside the batches
	pages   semaphore // of statements of lists, so that they leave connections to others

	creates *batcher[newUser, user]
	gets    *batcher[string, user]
	updates *batcher[userPatch, user]
	lists   *batcher[listQuery, *page]
}

// coalesce returns a store that does what next does, for many requests at a time by
// statements of its own on pg, which has so many connections.
func coalesce(next userStore, pg *pgStore, conns int) userStore {
	half := max(1, conns/2)
	s := &batchedStore{userStore: next, pg: pg, singles: make(semaphore, half), pages: make(semaphore, half)}
	reads, writes := make(semaphore, 1), make(semaphore, 1)
	began := func(statement string) func(int) {
		return func(calls int) { pg.observe("batch", statement, float64(calls)) }
	}
	s.creates = &batcher[newUser, user]{began: began("create"), one: next.create, many: s.createMany, writes: true, turn: writes}
	s.updates = &batcher[userPatch, user]{began: began("update"), one: next.update, many: s.updateMany, writes: true, turn: writes}
	s.gets = &batcher[string, user]{began: began("get"), one: next.get, many: s.getMany, turn: reads}
	s.lists = &batcher[listQuery, *page]{began: began("list"), one: next.list, many: s.listMany, turn: reads}
	return s
}

// errLeftOut is the error of a call that its batch has left out.
var errLeftOut = errors.New("left out of the batch")

func (s *batchedStore) create(ctx context.Context, in newUser) (user, error) {
	u, err := s.creates.do(ctx, in)
	if err == errLeftOut {
		return s.alone(ctx, func() (user, error) { return s.userStore.create(ctx, in) })
	}
	return u, err
}

func (s *batchedStore) get(ctx context.Context, id string) (user, error) {
	u, err := s.gets.do(ctx, id)
	if err == errLeftOut {
		return s.userStore.get(ctx, id)
	}
	return u, err
}

func (s *batchedStore) list(ctx context.Context, q listQuery) (*page, error) {
	if q.offset >= deepOffset { // others must not wait for it
		return s.userStore.list(ctx, q)
	}
	return s.lists.do(ctx, q)
}

func (s *batchedStore) update(ctx context.Context, p userPatch) (user, error) {
	u, err := s.updates.do(ctx, p)
	if err == errLeftOut {
		return s.alone(ctx, func() (user, error) { return s.userStore.update(ctx, p) })
	}
	return u, err
}

func (s *batchedStore) delete(ctx context.Context, id string, when preconditions) error {
	_, err := s.alone(ctx, func() (user, error) { return user{}, s.userStore.delete(ctx, id, when) })
	return err
}

// alone runs a write that may meet a lock, and again until it gets it: in a batch, it
// would keep the others waiting. Such writes leave half of the connections to the
// others, and hold none in the pause between two tries.
func (s *batchedStore) alone(ctx context.Context, write func() (user, error)) (u user, err error) {
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, 200*time.Millisecond) {
		select {
		case s.singles <- struct{}{}:
			u, err = write()
			<-s.singles
		case <-ctx.Done():
			return u, cmp.Or(err, ctx.Err())
		}
		if pq.As(err, pqerror.LockNotAvailable) == nil {
			return u, err
		}
		select {
		case <-time.After(pause):
			s.pg.observe("retry", string(pqerror.LockNotAvailable), 1)
		case <-ctx.Done():
			return u, err
		}
	}
}

// The statements for many users. Rows of the writes begin with whether the user was
// written, or else is why not: a user of that id, or a new one whose address is taken.
// They skip rows that are locked. A locked row is reached by its place, ctid, and by its
// id too, since in a table that inherits from users another row may have the same place.
var (
	insertUsers = "WITH new AS (SELECT * FROM unnest($1::uuid[], " + eachField("${n}::text[]", 2) + ") AS new (id, " + inputColumns + ")), " +
		"taken AS (SELECT new.*, now() AS created_at, now() AS updated_at FROM new " +
		"JOIN ONLY users AS old ON lower(old.email) = lower(new.email)), " +
		"written AS (INSERT INTO users (id, " + inputColumns + ") SELECT * FROM new WHERE id NOT IN (SELECT id FROM taken) ON CONFLICT DO NOTHING RETURNING *) " +
		"SELECT true, " + columns + " FROM written UNION ALL SELECT false, " + columns + " FROM taken"

	updateUsers = "WITH change AS (SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[], " + eachField("${n}::text[]", 4) + ") " +
		"AS change (key, match, none_match, " + eachField("new_{name}", 0) + ")), " +
		"free AS MATERIALIZED (SELECT users.ctid AS place, change.* FROM change JOIN users ON id = key AND " +
		conditionsHold("match", "none_match") + " FOR NO KEY UPDATE OF users SKIP LOCKED), " +
		"written AS (UPDATE users SET " + eachField("{name} = COALESCE(new_{name}, {name})", 0) + ", updated_at = " + newUpdate + " " +
		"FROM free WHERE users.ctid = place AND id = key RETURNING users.*) " +
		"SELECT true, " + columns + " FROM written UNION ALL " +
		"SELECT false, " + columns + " FROM change JOIN users ON id = key WHERE key NOT IN (SELECT id FROM written)"
)

// A batchResult is what a statement for many users says of one call.
type batchResult struct {
	done bool // the user is the answer; else it is the reason why there is none
	user user
}

func (s *batchedStore) getMany(ctx context.Context, calls []*call[string, user]) {
	users, err := s.pg.query(ctx, selectUsers, arrays(calls, func(id *string) []any { return []any{id} })...)
	found := make(map[string]batchResult, len(users))
	for _, u := range users {
		found[u.ID] = batchResult{true, u}
	}
	distribute(calls, found, err, func(id string) string { return id }, func(string, batchResult) error { return errNotFound })
}

// listMany runs a statement for each page that is asked for, side by side.
func (s *batchedStore) listMany(ctx context.Context, calls []*call[listQuery, *page]) {
	byQuery := make(map[listQuery][]*call[listQuery, *page])
	for _, c := range calls {
		byQuery[c.ask] = append(byQuery[c.ask], c)
	}
	var reads sync.WaitGroup
	for q, same := range byQuery {
		reads.Go(func() {
			catchPanic(same, func() {
				s.pages <- struct{}{}
				defer func() { <-s.pages }()
				p, err := s.userStore.list(ctx, q)
				for _, c := range same {
					c.answer, c.err = p, err
				}
			})
		})
	}
	reads.Wait()
}

func (s *batchedStore) createMany(ctx context.Context, calls []*call[newUser, user]) {
	found, err := s.write(ctx, insertUsers, arrays(calls, func(u *newUser) []any { return u.args(&u.id) }))
	distribute(calls, found, err, func(u newUser) string { return u.id }, func(u newUser, taken batchResult) error {
		if taken.user.ID == "" || isKeyed(u.id) { // two of the batch want the address; or it repeats an earlier request
			return errLeftOut
		}
		return errEmailTaken
	})
}

func (s *batchedStore) updateMany(ctx context.Context, calls []*call[userPatch, user]) {
	id := func(p userPatch) string { return p.id }
	refuse := func(p userPatch, is batchResult) error {
		if is.user.ID == "" {
			return errNotFound
		}
		return cmp.Or(p.when.check(&is.user), errLeftOut) // its row is locked, or was changed meanwhile
	}
	first, repeats := splitRepeats(calls)
	args := arrays(first, func(p *userPatch) []any { return p.args(&p.id, p.when.match, p.when.noneMatch) })
	found, err := s.write(ctx, updateUsers, args)
	distribute(first, found, err, id, refuse)
	for id, result := range found {
		found[id] = batchResult{user: result.user} // which is not the answer to a repeat
	}
	distribute(repeats, found, err, id, refuse)
}

// splitRepeats returns the first call for each user, and the others: of two writes to one
// user, the second could not see the first in the same statement.
func splitRepeats(calls []*call[userPatch, user]) (first, repeats []*call[userPatch, user]) {
	seen := make(map[string]bool, len(calls))
	for _, c := range calls {
		if seen[c.ask.id] {
			repeats = append(repeats, c)
		} else {
			first, seen[c.ask.id] = append(first, c), true
		}
	}
	return first, repeats
}

// write runs a statement that writes many users. It returns its results by id.
func (s *batchedStore) write(ctx context.Context, text string, args []any) (map[string]batchResult, error) {
	found := make(map[string]batchResult)
	var result batchResult
	fields := append([]any{&result.done}, result.user.fields()...)
	err := s.pg.each(ctx, text, args, func(rows *sql.Rows) error {
		err := rows.Scan(fields...)
		found[result.user.ID] = result
		return err
	})
	return found, err
}

// distribute gives each call its batchResult, or the error that refuse makes of it; of none,
// refuse gets the zero result. A failed statement is the database's failure for all
// calls, or because of one of them, which may wait for a lock: then all are left out, to
// find out which.
func distribute[Q any](calls []*call[Q, user], found map[string]batchResult, err error,
	key func(Q) string, refuse func(Q, batchResult) error) {
	if kind := asAPIError(err).kind; err != nil && kind != kindUnavailable && kind != kindTimeout && !errors.Is(err, errAmbiguous) ||
		pq.As(err, pqerror.LockNotAvailable) != nil {
		err = errLeftOut
	}
	for _, c := range calls {
		result := found[key(c.ask)]
		switch c.answer = result.user; {
		case err != nil:
			c.err = err
		case !result.done:
			c.err = refuse(c.ask, result)
		}
	}
}

// arrays returns an array for each of the values that row returns: all are of type
// *string, and nil is NULL.
func arrays[Q any](calls []*call[Q, user], row func(*Q) []any) []any {
	columns := make([][]*string, len(row(&calls[0].ask)))
	for _, c := range calls {
		for i, value := range row(&c.ask) {
			columns[i] = append(columns[i], value.(*string))
		}
	}
	args := make([]any, len(columns))
	for i, column := range columns {
		args[i] = pq.Array(column)
	}
	return args
}
