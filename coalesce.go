//go:build !plain

package main

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
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
// There is no added delay. A request that finds no statement under way runs its
// own at once, alone. Requests that come meanwhile wait; when the statement has
// ended, the next one takes those that wait by then. The busier it gets, the more
// requests share a statement. So all reads take turns, and all writes. Two kinds of
// statements do not keep the next one waiting: a full one, which more requests would
// hardly make cheaper, and one that takes longer than maxHold.
//
// A request that the shared statement leaves out runs a statement of its own, by
// the store below: because its row is locked, or because the shared statement
// failed and only one of its requests may be the reason.

const (
	// maxBatch is the number of requests that make a batch full. By then, the cost
	// of a statement as such is some hundredths of what its requests cost.
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

	limit  int       // calls that make a batch full
	writes bool      // a call that is given up may have been executed
	turn   semaphore // of the batch that keeps the next one waiting
	beside semaphore // of full batches that run beside that one

	mu      sync.Mutex
	waiting []*call[Q, A] // in the order of their arrival
	led     bool          // a goroutine waits for the turn, to take them
}

// A semaphore bounds what runs at a time: send to acquire, receive to release.
type semaphore chan struct{}

// A call is the part of one request in a batch.
type call[Q, A any] struct {
	ask    Q
	answer A
	err    error
	panic  any // what its batch panicked with

	batch *batch[Q, A]  // that has taken the call; nil while it waits
	done  chan struct{} // closed when answer, err and panic are set
}

// A batch is the calls of one statement.
type batch[Q, A any] struct {
	calls  []*call[Q, A]
	ctx    context.Context
	cancel context.CancelFunc
	left   int // calls whose requests still wait; under the lock of the batcher
}

// do answers ask, possibly together with others. A call joins only a batch that
// has not been sent: so a read sees every write that was acknowledged before it.
// When ctx ends first, the error is ctx's; of a write whose batch was sent, it
// matches [errAmbiguous].
func (b *batcher[Q, A]) do(ctx context.Context, ask Q) (answer A, err error) {
	b.mu.Lock()
	if !b.led { // and so nobody waits
		select {
		case b.turn <- struct{}{}:
			b.mu.Unlock()
			defer b.hold()()
			return b.one(ctx, ask)
		default:
			b.led = true
			go b.lead()
		}
	}
	me := &call[Q, A]{ask: ask, done: make(chan struct{})}
	b.waiting = append(b.waiting, me)
	if len(b.waiting) >= b.limit {
		select {
		case b.beside <- struct{}{}:
			go b.runBeside(b.take())
		default:
		}
	}
	b.mu.Unlock()

	select {
	case <-me.done:
		if me.panic != nil {
			panic(me.panic)
		}
		return me.answer, me.err
	case <-ctx.Done():
		b.mu.Lock()
		defer b.mu.Unlock()
		select {
		case <-me.done: // at the same moment
			return me.answer, me.err
		default:
		}
		if me.batch == nil {
			b.waiting = slices.DeleteFunc(b.waiting, func(c *call[Q, A]) bool { return c == me })
			return answer, ctx.Err()
		}
		if me.batch.left--; me.batch.left == 0 {
			me.batch.cancel() // nobody waits for it any more
		}
		if b.writes {
			return answer, fmt.Errorf("%w (%w)", ctx.Err(), errAmbiguous)
		}
		return answer, ctx.Err()
	}
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

// lead waits for the turn, and runs a batch of the calls that wait by then.
func (b *batcher[Q, A]) lead() {
	b.turn <- struct{}{}
	defer b.hold()()
	runtime.Gosched() // requests that are ready to run come first, and share the batch
	b.mu.Lock()
	taken := b.take()
	if b.led = len(b.waiting) > 0; b.led {
		go b.lead()
	}
	b.mu.Unlock()
	b.run(taken)
}

func (b *batcher[Q, A]) runBeside(full *batch[Q, A]) {
	b.run(full)
	<-b.beside
}

// take makes a batch of calls that wait.
func (b *batcher[Q, A]) take() *batch[Q, A] {
	n := min(len(b.waiting), b.limit)
	taken := &batch[Q, A]{calls: slices.Clone(b.waiting[:n]), left: n}
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
	guard(calls, func() {
		switch len(calls) {
		case 0: // they have left
		case 1:
			calls[0].answer, calls[0].err = b.one(taken.ctx, calls[0].ask)
		default:
			b.many(taken.ctx, calls)
		}
	})
	for _, c := range calls {
		close(c.done)
	}
}

// guard calls f. If it panics, so do the calls, each in the goroutine of its request.
func guard[Q, A any](calls []*call[Q, A], f func()) {
	defer func() {
		if v := recover(); v != nil {
			for _, c := range calls {
				c.panic = fmt.Sprintf("%v\n%s", v, debug.Stack())
			}
		}
	}()
	f()
}

// A batchedStore is a [userStore] that batches what it asks of another one.
type batchedStore struct {
	userStore
	pg      *pgStore
	singles semaphore // of writes that run alone, beside the batches
	reading semaphore // of statements of lists, so that they leave connections to others

	creates *batcher[newUser, user]
	gets    *batcher[string, user]
	updates *batcher[userPatch, user]
	lists   *batcher[listQuery, *page]
}

// coalesce returns a store that does what next does, for many requests at a time
// by statements of its own on pg, which has so many connections.
func coalesce(next userStore, pg *pgStore, conns int) userStore {
	s := &batchedStore{userStore: next, pg: pg, singles: make(semaphore, max(1, conns/2)), reading: make(semaphore, max(1, conns/2))}
	reads, besideReads := make(semaphore, 1), make(semaphore, max(1, conns/4))
	writes, besideWrites := make(semaphore, 1), make(semaphore, max(1, conns/4))
	s.creates = &batcher[newUser, user]{one: next.create, many: s.createMany, limit: maxBatch, writes: true, turn: writes, beside: besideWrites}
	s.updates = &batcher[userPatch, user]{one: next.update, many: s.updateMany, limit: maxBatch, writes: true, turn: writes, beside: besideWrites}
	s.gets = &batcher[string, user]{one: next.get, many: s.getMany, limit: maxBatch, turn: reads, beside: besideReads}
	s.lists = &batcher[listQuery, *page]{one: next.list, many: s.listMany, limit: 4 * maxBatch, turn: reads, beside: besideReads}
	return s
}

// errLeftOut is the error of a call that its batch has left out.
var errLeftOut = errors.New("left out of the batch")

func (s *batchedStore) create(ctx context.Context, u newUser) (created user, err error) {
	if created, err = s.creates.do(ctx, u); err == errLeftOut {
		err = s.alone(ctx, func() error {
			created, err = s.userStore.create(ctx, u)
			return err
		})
	}
	return created, err
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

func (s *batchedStore) update(ctx context.Context, p userPatch) (updated user, err error) {
	if updated, err = s.updates.do(ctx, p); err == errLeftOut {
		err = s.alone(ctx, func() error {
			updated, err = s.userStore.update(ctx, p)
			return err
		})
	}
	return updated, err
}

func (s *batchedStore) delete(ctx context.Context, id string, when preconditions) error {
	return s.alone(ctx, func() error { return s.userStore.delete(ctx, id, when) })
}

// alone runs a write that may meet a lock, and again until it gets it: in a batch, it
// would keep the others waiting. Such writes leave half of the connections to the
// others, and none is held in the pause between two tries.
func (s *batchedStore) alone(ctx context.Context, write func() error) (err error) {
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, 200*time.Millisecond) {
		select {
		case s.singles <- struct{}{}:
			err = write()
			<-s.singles
		case <-ctx.Done():
			return cmp.Or(err, ctx.Err())
		}
		if pq.As(err, pqerror.LockNotAvailable) == nil {
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return err
		}
	}
}

// The statements for many users tell them apart by their ids. They skip rows that
// are locked. A locked row is reached by its place, ctid, and by its id too, since
// in a table that inherits from users another row may have the same place.
//
// insertUsers skips rows whose email is already in use. ON CONFLICT would do that
// too, but inserts each row on trial first, which is one more record in the
// write-ahead log for each: insertUsersOnce is for a batch in which two want the
// same address.
var (
	insertUsers = "INSERT INTO users (id, " + inputColumns + ") SELECT new.* FROM unnest($1::uuid[], $2::text[], $3::text[]) AS new (id, " + inputColumns + ") " +
		"WHERE NOT EXISTS (SELECT FROM ONLY users AS old WHERE lower(old.email) = lower(new.email)) RETURNING " + columns
	insertUsersOnce = strings.Replace(insertUsers, " RETURNING ", " ON CONFLICT DO NOTHING RETURNING ", 1)
	selectUsers     = "SELECT " + columns + " FROM users WHERE id = ANY ($1::uuid[])"
	findUsers       = "SELECT " + columns + ", wanted FROM unnest($1::text[]) AS wanted JOIN users ON lower(email) = lower(wanted)"
	updateUsers     = "WITH free AS MATERIALIZED (SELECT users.ctid AS place, user_id, new_email, new_name " +
		"FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[]) AS change (user_id, match, none_match, new_email, new_name) " +
		"JOIN users ON id = user_id AND " + conditionsHold("match", "none_match") + " FOR NO KEY UPDATE OF users SKIP LOCKED) " +
		"UPDATE users SET email = COALESCE(new_email, email), name = COALESCE(new_name, name), " +
		"updated_at = " + newUpdate + " FROM free WHERE users.ctid = place AND id = user_id RETURNING " + columns
)

func (s *batchedStore) getMany(ctx context.Context, calls []*call[string, user]) {
	found, err := s.pg.query(ctx, selectUsers, textArray(calls, func(id *string) *string { return id }))
	distribute(calls, func(id string) string { return id }, byID(found), err, errNotFound)
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
			guard(same, func() {
				s.reading <- struct{}{}
				defer func() { <-s.reading }()
				p, err := s.userStore.list(ctx, q)
				for _, c := range same {
					c.answer, c.err = p, err
				}
			})
		})
	}
	reads.Wait()
}

// findMany answers by address.
func (s *batchedStore) findMany(ctx context.Context, calls []*call[string, user]) {
	found := make(map[string]user, len(calls)) // by the address asked for: only PostgreSQL knows how it folds letters
	err := s.pg.each(ctx, findUsers, []any{textArray(calls, func(email *string) *string { return email })}, func(rows *sql.Rows) error {
		var u user
		var wanted string
		err := rows.Scan(append(u.fields(), &wanted)...)
		found[wanted] = u
		return err
	})
	distribute(calls, func(email string) string { return email }, found, err, errNotFound)
}

func (s *batchedStore) createMany(ctx context.Context, calls []*call[newUser, user]) {
	args := []any{textArray(calls, func(u *newUser) *string { return &u.id })}
	for i := range len(userInput{}.values()) {
		args = append(args, textArray(calls, func(u *newUser) *string { return u.values()[i] }))
	}
	created, err := s.pg.query(ctx, insertUsers, args...)
	if isRefused(err) { // because of another batch meanwhile, or of one of these
		created, err = s.pg.query(ctx, insertUsersOnce, args...)
	}
	distribute(calls, func(u newUser) string { return u.id }, byID(created), err, errLeftOut)
	recheck(ctx, calls, s.findMany, func(u newUser) string { return *u.email }, func(u newUser, _ user, err error) error {
		if err != nil || isKeyed(u.id) { // one that repeats an earlier request may be the owner
			return errLeftOut
		}
		return errEmailTaken
	})
}

func (s *batchedStore) updateMany(ctx context.Context, calls []*call[userPatch, user]) {
	first := withoutRepeats(calls)
	args := []any{
		textArray(first, func(p *userPatch) *string { return &p.id }),
		textArray(first, func(p *userPatch) *string { return p.when.match }),
		textArray(first, func(p *userPatch) *string { return p.when.noneMatch }),
	}
	for i := range len(userInput{}.values()) {
		args = append(args, textArray(first, func(p *userPatch) *string { return p.values()[i] }))
	}
	updated, err := s.pg.query(ctx, updateUsers, args...)
	distribute(first, userPatch.key, byID(updated), err, errLeftOut)
	recheck(ctx, calls, s.getMany, userPatch.key, userPatch.refusal)
}

func (p userPatch) key() string { return p.id }

// refusal returns why a user, or the error of looking for it, left p out of a batch.
func (p userPatch) refusal(u user, err error) error {
	switch {
	case errors.Is(err, errNotFound):
		return errNotFound
	case err == nil && !(p.when.matched(&u) && p.when.noneMatched(&u)):
		return errPrecondition
	}
	return errLeftOut // its row is locked, or was changed meanwhile
}

// recheck looks once more for the users of the calls that a batch has left out, by
// one statement for all of them, and has refusal say why.
func recheck[Q any](ctx context.Context, calls []*call[Q, user], look func(context.Context, []*call[string, user]),
	key func(Q) string, refusal func(Q, user, error) error) {
	var left []*call[Q, user]
	var looks []*call[string, user]
	for _, c := range calls {
		if c.err == errLeftOut {
			left, looks = append(left, c), append(looks, &call[string, user]{ask: key(c.ask)})
		}
	}
	if len(left) == 0 {
		return
	}
	look(ctx, looks)
	for i, c := range left {
		c.err = refusal(c.ask, looks[i].answer, looks[i].err)
	}
}

// withoutRepeats returns the first call for each user: of two writes to one user,
// the second could not see the first in the same statement.
func withoutRepeats(calls []*call[userPatch, user]) []*call[userPatch, user] {
	seen := make(map[string]bool, len(calls))
	return slices.DeleteFunc(slices.Clone(calls), func(c *call[userPatch, user]) bool {
		if seen[c.ask.id] {
			c.err = errLeftOut
			return true
		}
		seen[c.ask.id] = true
		return false
	})
}

func byID(users []user) map[string]user {
	m := make(map[string]user, len(users))
	for _, u := range users {
		m[u.ID] = u
	}
	return m
}

// distribute gives each call its user, or missing. A failed statement is the
// database's failure for all of them, or because of one of them, which may wait for a
// lock: then all are left out, to find out which.
func distribute[Q any](calls []*call[Q, user], key func(Q) string, users map[string]user, err, missing error) {
	if kind := asAPIError(err).kind; err != nil && kind != kindUnavailable && kind != kindTimeout && !errors.Is(err, errAmbiguous) ||
		pq.As(err, pqerror.LockNotAvailable) != nil {
		err = errLeftOut
	}
	for _, c := range calls {
		u, ok := users[key(c.ask)]
		switch c.answer = u; {
		case err != nil:
			c.err = err
		case !ok:
			c.err = missing
		}
	}
}

// textArray returns a PostgreSQL array in its text form (its manual, section
// 8.15.6) of a field of each call; nil is NULL.
func textArray[Q any](calls []*call[Q, user], field func(*Q) *string) string {
	b := make([]byte, 0, 48*len(calls))
	for _, c := range calls {
		s := field(&c.ask)
		if s == nil {
			b = append(b, ",NULL"...)
			continue
		}
		b = append(b, ',', '"')
		for i := 0; i < len(*s); i++ {
			if (*s)[i] == '"' || (*s)[i] == '\\' {
				b = append(b, '\\')
			}
			b = append(b, (*s)[i])
		}
		b = append(b, '"')
	}
	b[0] = '{' // instead of the first comma
	return string(append(b, '}'))
}
