package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"
)

// A locked row delays its own callers alone
//
// A row that another session has locked, for a second or for an hour, is waited
// for until the deadline. A connection that waits with it serves nobody else, and
// a handful of such rows would take them all. So a statement that meets a lock
// gives up after lockPatience: PostgreSQL ends it (lock_timeout in its manual,
// section 20.11), and nothing of it remains. If it was one for many callers, each
// goes on alone; and whoever is alone tries again, here, in a queue:
//
//   - one caller at a time for each user or address: of those who want the same,
//     one asks for all, and who comes later joins them without a try of its own;
//   - at most half of the pool's connections, only while a statement runs: where
//     many rows are locked, their callers take turns.
//
// This needs a lock_timeout. Without one (see [connector]), half of the
// connections are left to the others, but those that meet a lock before they
// come here may take them.

// lockPatience is how long a statement waits for a lock: long beside what others
// need to commit, short beside what a connection is worth.
const lockPatience = 50 * time.Millisecond

// A lockQueue is where writes run alone, and wait for locks. It is safe for
// concurrent use.
type lockQueue struct {
	running lane // those who use a connection
	mu      sync.Mutex
	byKey   map[string]*lockTurn
}

// lockTurn is what those who want the same have in common.
type lockTurn struct {
	lane    lane
	callers int
}

// newLockQueue returns a queue that uses up to half of so many connections.
func newLockQueue(conns int) *lockQueue {
	return &lockQueue{running: make(lane, max(1, conns/2)), byKey: make(map[string]*lockTurn)}
}

// has reports whether somebody is in the queue for that key: who wants the same
// had better join at once.
func (q *lockQueue) has(key string) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.byKey[key] != nil
}

// do runs write, and again as long as it returns [errAlone] or [errAloneAgain]
// for a lock that it has met. It tells write whether an earlier try, or one
// before do was called, may have gone through. When ctx ends first, the error is
// ctx's.
func (q *lockQueue) do(ctx context.Context, key string, again bool, write func(again bool) (user, error)) (u user, err error) {
	q.mu.Lock()
	turn := q.byKey[key]
	if turn == nil {
		turn = &lockTurn{lane: newLane()}
		q.byKey[key] = turn
	}
	turn.callers++
	q.mu.Unlock()
	defer func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		if turn.callers--; turn.callers == 0 {
			delete(q.byKey, key)
		}
	}()
	if err := turn.lane.enter(ctx); err != nil {
		return u, err
	}
	defer func() { <-turn.lane }()
	try := func() (user, error) {
		if err := q.running.enter(ctx); err != nil {
			return user{}, err
		}
		defer func() { <-q.running }()
		return write(again)
	}
	// The pauses keep PostgreSQL's log readable: it notes each try that failed.
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		if u, err = try(); err != errAlone && err != errAloneAgain {
			return u, err
		}
		again = again || err == errAloneAgain
		select {
		case <-time.After(pause/2 + rand.N(pause)):
		case <-ctx.Done():
			return u, fmt.Errorf("waiting for a lock: %w", ctx.Err())
		}
	}
}

// enter waits for a turn. The error is that of ctx, if it ends first.
func (l lane) enter(ctx context.Context) error {
	select {
	case l <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("waiting for the turn: %w", ctx.Err())
	}
}
