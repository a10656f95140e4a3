package main

import (
	"context"
	"fmt"
	"runtime"
	"runtime/debug"
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
// There is no added delay. A caller who finds no statement under way runs one
// at once, alone: a lone request travels alone. Those who come meanwhile wait;
// when the statement has ended, the next takes those who wait by then. The
// busier it gets, the more is asked at a time.
//
// One statement at a time is enough while statements are short, and the fewer
// there are, the more rides in each: so all kinds of reads take turns in one
// lane, and all kinds of writes in another. Two sorts of statements do without a
// turn: one that takes long (it waits for a lock, or reads from a slow disk) gives
// its turn up and goes on beside the next; and one that is full, which more calls
// would hardly make cheaper, sets out at once. So where PostgreSQL is far away,
// the network is not waited for by one statement after the other.

// A lane is where statements take turns: who has sent to it has the turn, and
// receives from it at the end.
type lane chan struct{}

func newLane() lane { return make(lane, 1) }

// A coalescer runs the calls that wait together as one. Q is what a call asks
// and A what it gets. It is safe for concurrent use.
type coalescer[Q, A any] struct {
	lane lane
	full lane // has a place for each statement of maxCalls beside it; nil: no number of calls is too many for one
	// run answers all calls of one statement, by setting the answer or the err
	// of each. ctx ends with the call, or, of several, when the last of them would.
	run func(ctx context.Context, calls []*call[Q, A])

	mu         sync.Mutex
	waiting    []*call[Q, A] // in the order of their arrival
	collecting bool          // somebody will take those who wait
}

// A call is one caller's part in a statement.
type call[Q, A any] struct {
	ask    Q
	answer A
	err    error
	panic  any // what run panicked with

	ctx  context.Context
	done chan struct{} // closed when all the above is set; nil if the caller does the work
}

const (
	// patient is for how long a statement may keep its turn: several times what
	// an ordinary commit takes.
	patient = 10 * time.Millisecond
	// maxCalls is what makes a statement full. By then, the cost of a statement as
	// such is some hundredths of what its calls cost.
	maxCalls = 24
	// maxWaiting bounds the queue: who would be behind so many is refused.
	maxWaiting = 4096
)

func newCoalescer[Q, A any](l, full lane, run func(context.Context, []*call[Q, A])) *coalescer[Q, A] {
	return &coalescer[Q, A]{lane: l, full: full, run: run}
}

// do asks, possibly together with others, and returns the answer. A call joins
// only a statement that has not been sent: so a read sees every write that was
// acknowledged before it was called.
//
// When ctx ends first, the error is ctx's, whatever the statement is doing, and
// what was asked may be done all the same, unless it had not been sent: then it
// never is. When too many wait, the error is a failure of the kind unavailable,
// and nothing was done. If run panics, so does do.
func (c *coalescer[Q, A]) do(ctx context.Context, ask Q) (answer A, err error) {
	me := &call[Q, A]{ask: ask, ctx: ctx}
	c.mu.Lock()
	if !c.collecting { // and so nobody waits
		select {
		case c.lane <- struct{}{}: // no other goroutine need be woken
			c.mu.Unlock()
			c.work([]*call[Q, A]{me})
			return me.result()
		default:
			c.collecting = true
			go c.collect()
		}
	}
	if len(c.waiting) >= maxWaiting {
		c.mu.Unlock()
		return answer, &failure{kind: kindUnavailable, message: "Too many requests are waiting", cause: errUnsent}
	}
	me.done = make(chan struct{})
	c.waiting = append(c.waiting, me)
	if len(c.waiting) >= maxCalls {
		select {
		case c.full <- struct{}{}:
			go c.runFull()
		default:
		}
	}
	c.mu.Unlock()

	select {
	case <-me.done:
		return me.result()
	case <-ctx.Done():
		c.mu.Lock()
		defer c.mu.Unlock()
		if i := slices.Index(c.waiting, me); i >= 0 {
			c.waiting = slices.Delete(c.waiting, i, i+1)
		}
		return answer, ctx.Err()
	}
}

// result returns what came of the call.
func (c *call[Q, A]) result() (A, error) {
	if c.panic != nil {
		panic(c.panic)
	}
	return c.answer, c.err
}

// collect waits for its turn, and runs one statement for those who wait by then.
func (c *coalescer[Q, A]) collect() {
	c.lane <- struct{}{}
	// Those who are ready to run, just answered or just asking, go first: what
	// they ask rides along, which pays more than to be quick.
	runtime.Gosched()
	c.work(c.take())
}

// take removes the calls of the next statement from the queue.
func (c *coalescer[Q, A]) take() (calls []*call[Q, A]) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := len(c.waiting)
	if c.full != nil {
		n = min(n, maxCalls)
	}
	calls = c.remove(n)
	if c.collecting = len(c.waiting) > 0; c.collecting {
		go c.collect()
	}
	return calls
}

// remove removes the first n who wait, and returns those who still do.
func (c *coalescer[Q, A]) remove(n int) []*call[Q, A] {
	calls := make([]*call[Q, A], 0, n)
	for _, call := range c.waiting[:n] {
		if call.ctx.Err() == nil { // else it is about to leave
			calls = append(calls, call)
		}
	}
	c.waiting = slices.Delete(c.waiting, 0, n)
	return calls
}

// runFull runs full statements as long as there are calls for them. It has a
// place for one, and gives it up.
func (c *coalescer[Q, A]) runFull() {
	for {
		c.mu.Lock()
		if len(c.waiting) < maxCalls { // they wait for their turn
			<-c.full
			c.mu.Unlock()
			return
		}
		calls := c.remove(maxCalls)
		c.mu.Unlock()
		c.serve(calls)
	}
}

// work runs a statement for calls. It has the turn, and gives it up.
func (c *coalescer[Q, A]) work(calls []*call[Q, A]) {
	impatience := time.AfterFunc(patient, func() { <-c.lane })
	c.serve(calls)
	if impatience.Stop() { // else it has given up the turn
		<-c.lane
	}
}

// serve runs a statement for calls, and tells them.
func (c *coalescer[Q, A]) serve(calls []*call[Q, A]) {
	if len(calls) == 0 {
		return
	}
	defer func() {
		v := recover() // each caller panics with it in its own goroutine, where it belongs
		if v != nil {
			v = fmt.Sprintf("%v\n%s", v, debug.Stack())
		}
		for _, call := range calls {
			call.panic = v
			if call.done != nil {
				close(call.done)
			}
		}
	}()
	ctx := calls[0].ctx
	if len(calls) > 1 { // the going away of one must not take the others' answers with it
		ctx = context.WithoutCancel(ctx)
		if latest, ok := latestDeadline(calls); ok {
			var cancel context.CancelFunc
			ctx, cancel = context.WithDeadline(ctx, latest)
			defer cancel()
		}
	}
	c.run(ctx, calls)
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
	lane  lane
	mu    sync.Mutex
	byKey map[string]*shared[A]
}

// shared is what the callers of one key have in common.
type shared[A any] struct {
	*coalescer[struct{}, A]
	callers int
}

// do returns what read does, possibly for another caller of the same key who
// waited at the same time. It keeps the promise of [coalescer.do]. Only who has
// company takes turns.
func (s *sharer[A]) do(ctx context.Context, key string, read func(context.Context) (A, error)) (A, error) {
	s.mu.Lock()
	one := s.byKey[key]
	if one == nil {
		one = &shared[A]{coalescer: newCoalescer(s.lane, nil, func(ctx context.Context, calls []*call[struct{}, A]) {
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
	lone := one.callers == 1
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if one.callers--; one.callers == 0 {
			delete(s.byKey, key)
		}
	}()
	if lone {
		return read(ctx)
	}
	return one.do(ctx, struct{}{})
}
