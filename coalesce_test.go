package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// The mechanism, on statements that the test makes up. Time is that of
// testing/synctest: it passes only when everybody waits.

// statements is a run function whose statements take until the test lets them
// go, and whose answer is twice what was asked.
type statements struct {
	asked   chan []int    // what each statement has in it, when it begins
	release chan struct{} // lets one go
}

func newStatements() *statements {
	return &statements{asked: make(chan []int, 100), release: make(chan struct{})}
}

func (s *statements) run(ctx context.Context, calls []*call[int, int]) {
	var asks []int
	for _, c := range calls {
		asks = append(asks, c.ask)
	}
	s.asked <- asks
	<-s.release
	for _, c := range calls {
		c.answer, c.err = 2*c.ask, ctx.Err()
	}
}

// letGo lets a statement end, and waits for what follows from that.
func (s *statements) letGo() {
	s.release <- struct{}{}
	synctest.Wait()
}

// begun returns what the statements that have begun since the last look have in them.
func (s *statements) begun() (begun [][]int) {
	synctest.Wait()
	for {
		select {
		case asks := <-s.asked:
			begun = append(begun, asks)
		default:
			return begun
		}
	}
}

// ask calls do in a goroutine of its own, and checks the answer.
func ask(t *testing.T, ctx context.Context, c *coalescer[int, int], n int, want error) {
	go func() {
		answer, err := c.do(ctx, n)
		if !errors.Is(err, want) || err == nil && answer != 2*n {
			t.Errorf("do(%d): %d, %v; want %v", n, answer, err, want)
		}
	}()
	synctest.Wait()
}

func wantBegun(t *testing.T, s *statements, want ...[]int) {
	t.Helper()
	if got := s.begun(); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("statements began with %v, want %v", got, want)
	}
}

func TestCoalesceWhoWaitTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStatements()
		c := newCoalescer(newLane(), nil, s.run)
		ask(t, t.Context(), c, 1, nil)
		wantBegun(t, s, []int{1}) // a lone request travels alone, at once
		for n := 2; n <= 5; n++ {
			ask(t, t.Context(), c, n, nil)
		}
		wantBegun(t, s) // one statement is under way
		s.letGo()
		wantBegun(t, s, []int{2, 3, 4, 5})
		ask(t, t.Context(), c, 6, nil) // what has been sent, nobody joins
		wantBegun(t, s)
		s.letGo()
		wantBegun(t, s, []int{6})
		s.letGo()
		ask(t, t.Context(), c, 7, nil)
		wantBegun(t, s, []int{7})
		s.letGo()
	})
}

func TestCoalesceSlowStatement(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStatements()
		c := newCoalescer(newLane(), nil, s.run)
		ask(t, t.Context(), c, 1, nil)
		ask(t, t.Context(), c, 2, nil)
		wantBegun(t, s, []int{1})
		time.Sleep(patient) // of the bubble's time
		wantBegun(t, s, []int{2})
		ask(t, t.Context(), c, 3, nil)
		wantBegun(t, s) // it waits for the second, which is still young
		time.Sleep(patient)
		wantBegun(t, s, []int{3})
		time.Sleep(patient)
		ask(t, t.Context(), c, 4, nil) // all are slow: nobody is waited for
		wantBegun(t, s, []int{4})
		for range 4 {
			s.letGo()
		}
	})
}

// Coalescers of one lane take turns, in the order in which they came.
func TestCoalesceTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStatements()
		l := newLane()
		a, b := newCoalescer(l, nil, s.run), newCoalescer(l, nil, s.run)
		ask(t, t.Context(), a, 1, nil)
		ask(t, t.Context(), b, 2, nil)
		ask(t, t.Context(), a, 3, nil)
		ask(t, t.Context(), b, 4, nil)
		wantBegun(t, s, []int{1})
		s.letGo()
		wantBegun(t, s, []int{2, 4})
		s.letGo()
		wantBegun(t, s, []int{3})
		s.letGo()
	})
}

func TestCoalesceWhoLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStatements()
		c := newCoalescer(newLane(), nil, s.run)
		first, leaveFirst := context.WithCancel(t.Context())
		second, leaveSecond := context.WithCancel(t.Context())
		third, leaveThird := context.WithCancel(t.Context())
		ask(t, first, c, 1, context.Canceled) // alone in its statement, which ends with it
		ask(t, second, c, 2, context.Canceled)
		ask(t, third, c, 3, context.Canceled)
		ask(t, t.Context(), c, 4, nil)
		ask(t, t.Context(), c, 5, nil)
		leaveSecond()
		leaveFirst()
		s.letGo()
		wantBegun(t, s, []int{1}, []int{3, 4, 5}) // without 2
		leaveThird()                              // the others don't notice
		s.letGo()
		ask(t, t.Context(), c, 6, nil)
		wantBegun(t, s, []int{6})
		s.letGo()
	})
}

func TestCoalesceWhoLeavesFromAStatement(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStatements()
		c := newCoalescer(newLane(), nil, s.run)
		ctx, leave := context.WithTimeout(t.Context(), time.Millisecond)
		defer leave()
		ask(t, t.Context(), c, 1, nil)
		ask(t, t.Context(), c, 2, nil)
		ask(t, ctx, c, 3, context.DeadlineExceeded)
		s.letGo()
		wantBegun(t, s, []int{1}, []int{2, 3})
		time.Sleep(time.Millisecond)
		synctest.Wait() // 3 is gone, and its statement goes on
		s.letGo()
	})
}

// The deadline of a statement is that of its last caller.
func TestCoalesceDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var deadlines []time.Duration
		start := time.Now()
		begin := make(chan bool)
		c := newCoalescer(newLane(), nil, func(ctx context.Context, calls []*call[int, int]) {
			<-begin
			deadline, ok := ctx.Deadline()
			if !ok {
				t.Error("no deadline")
			}
			deadlines = append(deadlines, deadline.Sub(start))
		})
		for i, d := range []time.Duration{time.Hour, time.Minute, 3 * time.Minute, 2 * time.Minute} {
			ctx, cancel := context.WithTimeout(t.Context(), d)
			defer cancel()
			go c.do(ctx, i)
			synctest.Wait()
		}
		begin <- true
		begin <- true
		synctest.Wait()
		if want := []time.Duration{time.Hour, 3 * time.Minute}; !slices.Equal(deadlines, want) {
			t.Errorf("deadlines %v, want %v", deadlines, want)
		}
	})
}

func TestCoalesceBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStatements()
		c := newCoalescer(newLane(), make(lane, 2), s.run)
		ask(t, t.Context(), c, 0, nil)
		wantBegun(t, s, []int{0})
		for n := range 2 * maxCalls { // full ones need no turn, but there are two places for them
			ask(t, t.Context(), c, n, nil)
		}
		running := len(s.begun())
		if running != 2 {
			t.Fatalf("%d full statements began", running)
		}
		running++
		for n := range maxWaiting {
			go c.do(t.Context(), n)
		}
		synctest.Wait()
		var refused *failure
		if _, err := c.do(t.Context(), 1); !errors.As(err, &refused) || refused.kind != kindUnavailable {
			t.Errorf("one more than can wait: %v", err)
		}
		wantBegun(t, s)
		for left := maxWaiting; left > 0; {
			s.letGo()
			begun := s.begun()
			if len(begun) != 1 || len(begun[0]) != min(left, maxCalls) {
				// With the last few there is a full statement less.
				if left >= maxCalls || len(begun) > 0 {
					t.Fatalf("%d calls are left, and statements began with %v", left, begun)
				}
				running--
				continue
			}
			left -= len(begun[0])
		}
		for range running {
			s.letGo()
		}
	})
}

// A full statement sets out at once, beside the one whose turn it is. The rest
// waits.
func TestCoalesceFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStatements()
		c := newCoalescer(newLane(), make(lane, 1), s.run)
		ask(t, t.Context(), c, 0, nil)
		wantBegun(t, s, []int{0})
		var first, second []int
		for n := range maxCalls - 1 {
			ask(t, t.Context(), c, n, nil)
			first, second = append(first, n), append(second, 1000+n)
		}
		wantBegun(t, s)
		ask(t, t.Context(), c, 99, nil)
		wantBegun(t, s, append(first, 99))
		for _, n := range append(second, 1099, 1100) {
			ask(t, t.Context(), c, n, nil)
		}
		wantBegun(t, s) // the place is taken
		s.letGo()       // whichever of the two it is
		wantBegun(t, s, append(second, 1099))
		s.letGo()
		s.letGo()
		wantBegun(t, s, []int{1100})
		s.letGo()
		if len(c.full) != 0 || len(c.lane) != 0 {
			t.Error("a place is still taken")
		}
	})
}

func TestCoalescePanic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := make(chan bool)
		c := newCoalescer(newLane(), nil, func(ctx context.Context, calls []*call[int, int]) {
			if <-begin; calls[0].ask == 2 {
				panic("as the test wants it")
			}
		})
		errs := make([]error, 4)
		panics := make([]any, 4)
		for n := range 4 {
			go func() {
				defer func() { panics[n] = recover() }()
				_, errs[n] = c.do(t.Context(), n+1)
			}()
			synctest.Wait()
		}
		begin <- true // 1, alone
		begin <- true // 2, with 3 and 4
		synctest.Wait()
		if errs[0] != nil || panics[0] != nil || panics[1] == nil || panics[2] == nil || panics[3] == nil {
			t.Errorf("errors %v, panics %v", errs, panics)
		}
		go func() { begin <- true }() // 5
		if _, err := c.do(t.Context(), 5); err != nil {
			t.Errorf("after a panic: %v", err)
		}
	})
}

// A read sees every write that was acknowledged before it was called. If a call
// could join a statement that is under way, it would not: a reader checks that
// against what was written when it asked.
func TestCoalesceReadsSeeWrites(t *testing.T) {
	t.Parallel()
	var written, acknowledged atomic.Int64
	reads := newCoalescer(newLane(), nil, func(ctx context.Context, calls []*call[int, int64]) {
		seen := written.Load()
		runtime.Gosched() // a statement takes longer than its look into the table
		for _, c := range calls {
			c.answer = seen
		}
	})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 2000 {
				before := acknowledged.Load()
				seen, err := reads.do(t.Context(), 0)
				if err != nil || seen < before {
					t.Errorf("a read sees %d, %d was acknowledged before: %v", seen, before, err)
					return
				}
			}
		})
	}
	wg.Go(func() {
		for range 20000 {
			acknowledged.Store(written.Add(1))
		}
	})
	wg.Wait()
}

// Callers come and leave at random, and each who stays gets its own answer.
func TestCoalesceStress(t *testing.T) {
	t.Parallel()
	c := newCoalescer(newLane(), nil, func(ctx context.Context, calls []*call[int, int]) {
		for _, c := range calls {
			c.answer = 2 * c.ask
		}
	})
	var wg sync.WaitGroup
	for worker := range 50 {
		wg.Go(func() {
			for i := range 500 {
				ctx, cancel := context.WithCancel(t.Context())
				if rand.IntN(3) == 0 {
					go cancel()
				}
				n := worker*1000 + i
				if answer, err := c.do(ctx, n); err == nil && answer != 2*n || err != nil && !errors.Is(err, context.Canceled) {
					t.Errorf("do(%d): %d, %v", n, answer, err)
				}
				cancel()
			}
		})
	}
	wg.Wait()
	waitFor(t, "the last worker to end", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return !c.collecting && len(c.waiting) == 0 && len(c.lane) == 0
	})
}

func TestSharer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := sharer[string]{lane: newLane()}
		reads := make(chan string, 100)
		release := make(chan bool)
		get := func(key string) {
			go func() {
				got, err := s.do(t.Context(), key, func(context.Context) (string, error) {
					reads <- key
					<-release
					return "page " + key, nil
				})
				if got != "page "+key || err != nil {
					t.Errorf("do(%s): %s, %v", key, got, err)
				}
			}()
			synctest.Wait()
		}
		for _, key := range strings.Fields("a a a b a b") {
			get(key)
		}
		begun := func() (keys string) {
			synctest.Wait()
			for len(reads) > 0 {
				keys += <-reads
			}
			return keys
		}
		if got := begun(); got != "aab" {
			t.Errorf("reads of %q, want one each for who is alone, and the first turn of who is not", got)
		}
		for range 3 {
			release <- true
			synctest.Wait()
		}
		if got := begun(); got != "a" {
			t.Errorf("then reads of %q, want one for all who waited for the page", got)
		}
		release <- true
		if got := begun(); got != "b" {
			t.Errorf("at last reads of %q, want one, in its turn", got)
		}
		release <- true
		synctest.Wait()
		if len(s.byKey) != 0 {
			t.Errorf("%d keys are remembered for nobody", len(s.byKey))
		}
	})
}
