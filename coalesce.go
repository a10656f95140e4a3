package main

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"
)

// Many requests, one statement
//
// To look up one row costs PostgreSQL less than to be asked: a message to
// parse, a process to wake, an answer to send, and for a write a disk to wait
// for. So requests that wait at the same moment are asked for together.
//
// There is no added delay and no goroutine behind it. A caller who finds no
// statement under way runs one at once, alone: a lone request travels alone.
// Those who come meanwhile wait; when the statement has ended, the first of
// them runs the next one, and all who wait by then ride along. The busier it
// gets, the more is asked at a time.
//
// One statement at a time is enough while statements are short, and the fewer
// there are, the more rides in each. One that takes long (it waits for a lock,
// or reads from a slow disk) no longer counts: the next begins beside it.

// A coalescer runs the calls that wait together as one. Q is what a call asks
// and A what it gets. It is safe for concurrent use.
type coalescer[Q, A any] struct {
	// run answers all calls of one statement, by setting the answer or the err
	// of each. ctx ends with the call, or, of several, when the last of them would.
	run func(ctx context.Context, calls []*call[Q, A])

	mu      sync.Mutex
	leader  *call[Q, A]   // whose statement the others wait for; nil: nobody's
	waiting []*call[Q, A] // in the order of their arrival
}

// A call is one caller's part in a statement.
type call[Q, A any] struct {
	ask    Q
	answer A
	err    error

	ctx  context.Context
	turn chan turn // of capacity 1, for the one thing that happens to a waiting call
}

// A turn is what a waiting caller wakes up to.
type turn bool

const (
	answered turn = false // the call has been answered by another's statement
	lead     turn = true  // run a statement for all who wait, yourself included
)

const (
	// patient is how long the others wait for a statement before the next
	// begins beside it: several times what an ordinary commit takes.
	patient = 10 * time.Millisecond
	// maxCalls bounds the calls of one statement, and so the memory that it takes.
	maxCalls = 256
	// maxWaiting bounds the queue: who would be behind so many is refused.
	maxWaiting = 4096
)

func newCoalescer[Q, A any](run func(context.Context, []*call[Q, A])) *coalescer[Q, A] {
	return &coalescer[Q, A]{run: run}
}

// do asks, possibly together with others, and returns the answer. A call joins
// only a statement that has not been sent: so a read sees every write that was
// acknowledged before it was called.
//
// When ctx ends first, the error is ctx's, and what was asked may have been
// done all the same. When too many wait, the error is a failure of the kind
// unavailable, and nothing was done.
func (c *coalescer[Q, A]) do(ctx context.Context, ask Q) (answer A, err error) {
	me := &call[Q, A]{ask: ask, ctx: ctx}
	c.mu.Lock()
	switch {
	case c.leader == nil:
		c.leader = me
		c.mu.Unlock()
		c.lead([]*call[Q, A]{me})
		return me.answer, me.err
	case len(c.waiting) >= maxWaiting:
		c.mu.Unlock()
		return answer, &failure{kind: kindUnavailable, message: "Too many requests are waiting"}
	}
	me.turn = make(chan turn, 1)
	c.waiting = append(c.waiting, me)
	c.mu.Unlock()

	select {
	case t := <-me.turn:
		if t == answered {
			return me.answer, me.err
		}
		if ctx.Err() == nil {
			c.lead(c.take(me))
			return me.answer, me.err
		}
	case <-ctx.Done():
	}
	c.leave(me)
	return answer, ctx.Err()
}

// take removes the calls of the next statement from the queue, and returns
// them behind the leader's own.
func (c *coalescer[Q, A]) take(leader *call[Q, A]) []*call[Q, A] {
	c.mu.Lock()
	defer c.mu.Unlock()
	calls := append(make([]*call[Q, A], 0, 1+len(c.waiting)), leader)
	n := 0
	for ; n < len(c.waiting) && len(calls) < maxCalls; n++ {
		if other := c.waiting[n]; other.ctx.Err() == nil { // else it is about to leave
			calls = append(calls, other)
		}
	}
	c.waiting = slices.Delete(c.waiting, 0, n)
	return calls
}

// leave takes back a call that its caller does not wait for any longer. If a
// statement has it already, nothing changes for the others in there.
func (c *coalescer[Q, A]) leave(me *call[Q, A]) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if i := slices.Index(c.waiting, me); i >= 0 {
		c.waiting = slices.Delete(c.waiting, i, i+1)
	}
	c.passOn(me) // in case that it has just become our turn
}

// passOn lets the first who waits lead, if it was me. The caller holds c.mu.
func (c *coalescer[Q, A]) passOn(me *call[Q, A]) {
	if c.leader != me {
		return
	}
	c.leader = nil
	if len(c.waiting) > 0 {
		c.leader = c.waiting[0]
		c.waiting = slices.Delete(c.waiting, 0, 1)
		c.leader.turn <- lead
	}
}

// lead runs one statement for calls, of which the first is the leader's own,
// tells the others, and passes the lead on, at the latest when it has taken long.
func (c *coalescer[Q, A]) lead(calls []*call[Q, A]) {
	passOn := func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.passOn(calls[0])
	}
	impatience := time.AfterFunc(patient, passOn)
	finished := false
	defer func() { // not even a panic may keep the others waiting
		for i, call := range calls {
			if !finished {
				call.err = errors.New("the statement was given up in a panic")
			}
			if i > 0 {
				call.turn <- answered
			}
		}
		impatience.Stop()
		passOn()
	}()
	ctx := calls[0].ctx
	if len(calls) > 1 { // the leader's going away must not take the others' answers with it
		ctx = context.WithoutCancel(ctx)
		if latest, ok := latestDeadline(calls); ok {
			var cancel context.CancelFunc
			ctx, cancel = context.WithDeadline(ctx, latest)
			defer cancel()
		}
	}
	c.run(ctx, calls)
	finished = true
}

// latestDeadline returns when the last of the calls has to be answered, and
// reports whether there is such a time.
func latestDeadline[Q, A any](calls []*call[Q, A]) (latest time.Time, ok bool) {
	for _, call := range calls {
		deadline, ok := call.ctx.Deadline()
		if !ok {
			return time.Time{}, false
		}
		if deadline.After(latest) {
			latest = deadline
		}
	}
	return latest, true
}

// A sharer runs equal calls that wait together once, and unequal ones side by
// side. It is safe for concurrent use.
type sharer[A any] struct {
	mu    sync.Mutex
	byKey map[string]*shared[A]
}

// shared is what the callers of one key have in common.
type shared[A any] struct {
	*coalescer[struct{}, A]
	callers int
}

// do returns what read does, possibly for another caller of the same key who
// waited at the same time. It keeps the promise of [coalescer.do].
func (s *sharer[A]) do(ctx context.Context, key string, read func(context.Context) (A, error)) (A, error) {
	s.mu.Lock()
	one := s.byKey[key]
	if one == nil {
		one = &shared[A]{coalescer: newCoalescer(func(ctx context.Context, calls []*call[struct{}, A]) {
			answer, err := read(ctx)
			for _, c := range calls {
				c.answer, c.err = answer, err
			}
		})}
		if s.byKey == nil {
			s.byKey = make(map[string]*shared[A])
		}
		s.byKey[key] = one
	}
	one.callers++
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if one.callers--; one.callers == 0 {
			delete(s.byKey, key)
		}
	}()
	return one.do(ctx, struct{}{})
}
