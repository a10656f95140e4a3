//go:build !plain

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// The mechanism, on statements that the test makes up. Time is that of
// testing/synctest: it passes only when everybody waits.

// statements are the functions of a batcher whose statements take until the test
// lets them go, and whose answer is twice what was asked.
type statements struct {
	asked   chan []int    // what each statement has in it, when it begins
	release chan struct{} // lets one go
}

// newBatcher returns a batcher of such statements.
func newBatcher() (*batcher[int, int], *statements) {
	s := &statements{asked: make(chan []int, 100), release: make(chan struct{})}
	return &batcher[int, int]{one: s.one, many: s.many, turn: make(semaphore, 1), began: func(int) {}}, s
}

func (s *statements) one(ctx context.Context, n int) (int, error) {
	s.asked <- []int{n}
	<-s.release
	return 2 * n, ctx.Err()
}

func (s *statements) many(ctx context.Context, calls []*call[int, int]) {
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
func ask(t *testing.T, ctx context.Context, b *batcher[int, int], n int, want error) {
	go func() {
		answer, err := b.do(ctx, n)
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

// wantIdle fails the test if anything of a batcher is left.
func wantIdle[Q, A any](t *testing.T, b *batcher[Q, A]) {
	t.Helper()
	waitFor(t, "the last batch to end", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return !b.next && len(b.waiting) == 0 && len(b.turn) == 0
	})
}

func TestBatchOfThoseThatWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, s := newBatcher()
		ask(t, t.Context(), b, 1, nil)
		wantBegun(t, s, []int{1}) // a lone request goes alone, at once
		for n := 2; n <= 5; n++ {
			ask(t, t.Context(), b, n, nil)
		}
		wantBegun(t, s) // one statement is under way
		s.letGo()
		wantBegun(t, s, []int{2, 3, 4, 5})
		ask(t, t.Context(), b, 6, nil) // no call joins what has been sent
		wantBegun(t, s)
		s.letGo()
		wantBegun(t, s, []int{6})
		s.letGo()
		ask(t, t.Context(), b, 7, nil)
		wantBegun(t, s, []int{7})
		s.letGo()
		wantIdle(t, b)
	})
}

func TestBatchBehindASlowStatement(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, s := newBatcher()
		ask(t, t.Context(), b, 1, nil)
		ask(t, t.Context(), b, 2, nil)
		wantBegun(t, s, []int{1})
		time.Sleep(maxHold) // of the bubble's time
		wantBegun(t, s, []int{2})
		ask(t, t.Context(), b, 3, nil)
		wantBegun(t, s) // it waits for the second, which is still young
		time.Sleep(maxHold)
		wantBegun(t, s, []int{3})
		time.Sleep(maxHold)
		ask(t, t.Context(), b, 4, nil) // all are slow: none is waited for
		wantBegun(t, s, []int{4})
		for range 4 {
			s.letGo()
		}
		wantIdle(t, b)
	})
}

func TestBatchWithoutThoseThatLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, s := newBatcher()
		first, leaveFirst := context.WithCancel(t.Context())
		second, leaveSecond := context.WithCancel(t.Context())
		third, leaveThird := context.WithCancel(t.Context())
		ask(t, first, b, 1, context.Canceled) // alone in its statement, which ends with it
		ask(t, second, b, 2, context.Canceled)
		ask(t, third, b, 3, context.Canceled)
		ask(t, t.Context(), b, 4, nil)
		ask(t, t.Context(), b, 5, nil)
		leaveSecond()
		leaveFirst()
		synctest.Wait()
		s.letGo()
		wantBegun(t, s, []int{1}, []int{3, 4, 5}) // without 2
		leaveThird()                              // the others don't notice
		synctest.Wait()
		s.letGo()
		ask(t, t.Context(), b, 6, nil)
		wantBegun(t, s, []int{6})
		s.letGo()
		wantIdle(t, b)
	})
}

// When every request of a batch has left, its statement is cancelled; all waited in
// vain, and where a batch writes, those whose batch was sent are told so.
func TestBatchThatAllLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var cancelled atomic.Bool
		b, s := newBatcher()
		b.writes = true
		b.many = func(ctx context.Context, calls []*call[int, int]) {
			<-ctx.Done()
			cancelled.Store(true)
			s.many(ctx, calls)
		}
		ask(t, t.Context(), b, 1, nil)
		ctx, leave := context.WithTimeout(t.Context(), 3*maxHold)
		defer leave()
		ask(t, ctx, b, 2, errAmbiguous)
		ask(t, ctx, b, 3, errAmbiguous)
		time.Sleep(maxHold)
		synctest.Wait() // 2 and 3 are sent
		ask(t, ctx, b, 5, context.DeadlineExceeded)
		early, leaveEarly := context.WithCancel(t.Context())
		go func() { // one whose batch is not sent is sure
			if _, err := b.do(early, 4); err != context.Canceled {
				t.Errorf("one that left before it was sent: %v", err)
			}
		}()
		synctest.Wait()
		leaveEarly()
		synctest.Wait()
		if cancelled.Load() {
			t.Error("cancelled before all have left")
		}
		time.Sleep(4 * maxHold)
		if !cancelled.Load() {
			t.Error("the statement of those that have left goes on")
		}
		for range 3 {
			s.letGo()
		}
		wantIdle(t, b)
	})
}

// A batch takes those that came first. The rest waits for its turn.
func TestFullBatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, s := newBatcher()
		ask(t, t.Context(), b, 0, nil)
		wantBegun(t, s, []int{0})
		var all []int
		for n := range maxBatch + 2 {
			all = append(all, n)
			ask(t, t.Context(), b, n, nil)
		}
		wantBegun(t, s)
		s.letGo()
		wantBegun(t, s, all[:maxBatch])
		s.letGo()
		wantBegun(t, s, all[maxBatch:])
		s.letGo()
		wantIdle(t, b)
	})
}

// Batchers of one turn run one after the other.
func TestBatchersTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, s := newBatcher()
		b := &batcher[int, int]{one: s.one, many: s.many, turn: a.turn, began: a.began}
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
		wantIdle(t, a)
		wantIdle(t, b)
	})
}

func TestBatchPanic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := make(chan bool)
		b := &batcher[int, int]{
			turn: make(semaphore, 1), began: func(int) {},
			one:  func(context.Context, int) (int, error) { <-begin; return 0, nil },
			many: func(context.Context, []*call[int, int]) { <-begin; panic("as the test wants it") },
		}
		errs := make([]error, 4)
		for n := range 4 {
			go func() { _, errs[n] = b.do(t.Context(), n+1) }()
			synctest.Wait()
		}
		begin <- true // 1, alone
		begin <- true // 2, with 3 and 4
		synctest.Wait()
		if errs[0] != nil || errs[1] == nil || errs[2] == nil || errs[3] == nil {
			t.Errorf("errors %v", errs)
		}
		go func() { begin <- true }() // 5
		if _, err := b.do(t.Context(), 5); err != nil {
			t.Errorf("after a panic: %v", err)
		}
		wantIdle(t, b)
	})
}

// A read sees every write that was acknowledged before it was called. If a call
// could join a statement that is under way, it would not: a reader checks that
// against what was written when it asked.
func TestBatchedReadsSeeWrites(t *testing.T) {
	t.Parallel()
	var written, acknowledged atomic.Int64
	look := func() int64 {
		seen := written.Load()
		runtime.Gosched() // a statement takes longer than its look into the table
		return seen
	}
	reads := &batcher[int, int64]{
		turn: make(semaphore, 1), began: func(int) {},
		one: func(context.Context, int) (int64, error) { return look(), nil },
		many: func(ctx context.Context, calls []*call[int, int64]) {
			seen := look()
			for _, c := range calls {
				c.answer = seen
			}
		},
	}
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
	wantIdle(t, reads)
}

// Requests come and leave at random, and each that stays gets its own answer.
func TestBatchStress(t *testing.T) {
	t.Parallel()
	b := &batcher[int, int]{
		turn: make(semaphore, 1), began: func(int) {},
		one: func(_ context.Context, n int) (int, error) { return 2 * n, nil },
		many: func(ctx context.Context, calls []*call[int, int]) {
			for _, c := range calls {
				c.answer = 2 * c.ask
			}
		},
	}
	var wg sync.WaitGroup
	for worker := range 50 {
		wg.Go(func() {
			for i := range 500 {
				ctx, cancel := context.WithCancel(t.Context())
				if rand.IntN(3) == 0 {
					go cancel()
				}
				n := worker*1000 + i
				if answer, err := b.do(ctx, n); err == nil && answer != 2*n || err != nil && !errors.Is(err, context.Canceled) {
					t.Errorf("do(%d): %d, %v", n, answer, err)
				}
				cancel()
			}
		})
	}
	wg.Wait()
	wantIdle(t, b)
}

// slowLists is a store whose lists take until the test lets them go.
type slowLists struct {
	userStore
	begun   chan int64 // the limit of each
	release chan bool
}

func (s *slowLists) list(ctx context.Context, q listQuery) (*page, error) {
	s.begun <- q.limit
	<-s.release
	return newPage(nil, q.limit), nil
}

// Requests for one page that wait together share it, and those for other pages don't
// wait for them.
func TestBatchedLists(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lists := &slowLists{begun: make(chan int64, 100), release: make(chan bool)}
		s := coalesce(lists, &pgStore{observe: func(string, string, float64) {}}, 10).(*batchedStore)
		wantBegun := func(want ...int64) {
			t.Helper()
			synctest.Wait()
			var got []int64
			for len(lists.begun) > 0 {
				got = append(got, <-lists.begun)
			}
			slices.Sort(got)
			if !slices.Equal(got, want) {
				t.Errorf("lists of %v began, want %v", got, want)
			}
		}
		pages := make(chan *page, 6)
		for _, limit := range []int64{1, 1, 1, 2, 1, 2} {
			go func() {
				p, err := s.list(t.Context(), listQuery{limit: limit})
				if err != nil {
					t.Error(err)
				}
				if limit == 1 {
					pages <- p
				}
			}()
			synctest.Wait()
		}
		wantBegun(1)
		lists.release <- true
		wantBegun(1, 2)
		<-pages
		lists.release <- true
		lists.release <- true
		synctest.Wait()
		if a, b, c := <-pages, <-pages, <-pages; a != b || b != c {
			t.Error("those that waited together don't share a page")
		}
		wantIdle(t, s.lists)
	})
}

// The statements for many users, on a real PostgreSQL: each call gets its own answer.

// newBatchedStore returns a store with this mechanism alone around the plain one.
func newBatchedStore(t *testing.T) *batchedStore {
	t.Helper()
	s := newStore(t)
	return coalesce(s, s, 10).(*batchedStore)
}

// callsOf returns a call for each ask.
func callsOf[Q any](asks ...Q) (calls []*call[Q, user]) {
	for _, a := range asks {
		calls = append(calls, &call[Q, user]{ask: a})
	}
	return calls
}

// wantOutcomes compares what the calls got: the address and name of a user, or the error.
func wantOutcomes[Q any](t *testing.T, calls []*call[Q, user], want ...string) {
	t.Helper()
	var got []string
	for _, c := range calls {
		if c.err != nil {
			got = append(got, c.err.Error())
		} else {
			got = append(got, c.answer.Email+" "+c.answer.Name)
		}
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

var (
	leftOut = errLeftOut.Error()
	stale   = kindPrecondition.message
)

func TestCreateMany(t *testing.T) {
	t.Parallel()
	s := newBatchedStore(t)
	mustCreate(t, s.pg, "taken@example.com")
	odd := "\"\\{},NULL '\n\t😀"
	calls := callsOf(
		testUser(newUUID(), "first@example.com", "x"),
		testUser(newUUID(), "TAKEN@example.com", "x"),
		testUser(newUUID(), "last@example.com", "x"),
	)
	s.createMany(t.Context(), calls)
	wantOutcomes(t, calls, "first@example.com x", taken, "last@example.com x")

	calls = callsOf( // two of them alike: PostgreSQL finds that out when it inserts the second
		testUser(newUUID(), "a@example.com", odd),
		testUser(newUUID(), "TAKEN@example.com", "x"),
		testUser(newUUID(), "same@example.com", "first"),
		testUser(newUUID(), "Same@example.com", "second"),
		testUser(newUUID(), "b@example.com", "NULL"),
	)
	s.createMany(t.Context(), calls)
	wantOutcomes(t, calls, "a@example.com "+odd, taken, "same@example.com first", leftOut, "b@example.com NULL")
	for _, c := range calls {
		if c.err == nil && (c.answer.ID != c.ask.id || !c.answer.CreatedAt.Equal(c.answer.UpdatedAt)) {
			t.Errorf("%+v made %+v", c.ask, c.answer)
		}
	}
}

func TestGetMany(t *testing.T) {
	t.Parallel()
	s := newBatchedStore(t)
	a, b := mustCreate(t, s.pg, "a@example.com"), mustCreate(t, s.pg, "b@example.com")
	calls := callsOf(b.ID, noSuchID, a.ID, b.ID)
	s.getMany(t.Context(), calls)
	wantOutcomes(t, calls, "b@example.com x", missing, "a@example.com x", "b@example.com x")
}

func TestUpdateMany(t *testing.T) {
	t.Parallel()
	s := newBatchedStore(t)
	a, b, c := mustCreate(t, s.pg, "a@example.com"), mustCreate(t, s.pg, "b@example.com"), mustCreate(t, s.pg, "c@example.com")
	name, email := "new", "C@example.com"
	old, current := "1", b.version()
	calls := callsOf(
		userPatch{id: a.ID, userInput: userInput{name: &name}},
		userPatch{id: noSuchID, userInput: userInput{name: &name}},
		userPatch{id: b.ID, userInput: userInput{name: &name}, when: preconditions{match: &current}},
		userPatch{id: a.ID, userInput: userInput{name: &email}}, // the second of one user
		userPatch{id: c.ID, userInput: userInput{email: &email}, when: preconditions{noneMatch: &old}},
	)
	s.updateMany(t.Context(), calls)
	wantOutcomes(t, calls, "a@example.com new", missing, "b@example.com new", leftOut, "C@example.com x")
	if u := calls[0].answer; !u.UpdatedAt.After(a.UpdatedAt) || !u.CreatedAt.Equal(a.CreatedAt) {
		t.Errorf("%+v became %+v", a, u)
	}

	calls = callsOf(
		userPatch{id: b.ID, userInput: userInput{name: &email}, when: preconditions{match: &current}},
		userPatch{id: b.ID, userInput: userInput{name: &name}}, // the second of one user, which the first has left as it is
	)
	s.updateMany(t.Context(), calls)
	wantOutcomes(t, calls, stale, leftOut)

	calls = callsOf( // what b was is not what it is
		userPatch{id: b.ID, userInput: userInput{name: &email}, when: preconditions{match: &current}},
		userPatch{id: a.ID, userInput: userInput{email: &email}}, // c has it: the statement fails, and each is on its own
	)
	s.updateMany(t.Context(), calls)
	wantOutcomes(t, calls, leftOut, leftOut)
	if u, err := s.get(t.Context(), a.ID); err != nil || u.Email != "a@example.com" || u.Name != "new" {
		t.Errorf("%+v, %v", u, err)
	}
}

// A table that inherits from users has rows in the same places, under other ids.
// They are nobody's who was asked for.
func TestManyBesideAnInheritedTable(t *testing.T) {
	t.Parallel()
	s := newBatchedStore(t)
	a, b := mustCreate(t, s.pg, "a@example.com"), mustCreate(t, s.pg, "b@example.com")
	mustExec(t, s.pg.db, "CREATE TABLE old_users () INHERITS (users)")
	mustExec(t, s.pg.db, "INSERT INTO old_users (id, email, name) SELECT gen_random_uuid(), 'old' || n, 'old' FROM generate_series(1, 20) n")
	name := "new"
	calls := callsOf(userPatch{id: a.ID, userInput: userInput{name: &name}}, userPatch{id: b.ID, userInput: userInput{name: &name}})
	s.updateMany(t.Context(), calls)
	wantOutcomes(t, calls, "a@example.com new", "b@example.com new")
	if n := count(t, s.pg.db, "SELECT count(*) FROM old_users WHERE name = 'old'"); n != 20 {
		t.Errorf("%d of 20 are as they were", n)
	}
}

// A row that somebody has locked is left out, and the others don't wait for it.
func TestManyAroundALockedRow(t *testing.T) {
	t.Parallel()
	s := newBatchedStore(t)
	a, locked := mustCreate(t, s.pg, "a@example.com"), mustCreate(t, s.pg, "locked@example.com")
	begin(t, s.pg.db, "SELECT FROM users WHERE id = $1 FOR UPDATE", locked.ID)
	name := "new"
	calls := callsOf(userPatch{id: locked.ID, userInput: userInput{name: &name}}, userPatch{id: a.ID, userInput: userInput{name: &name}})
	s.updateMany(t.Context(), calls)
	wantOutcomes(t, calls, leftOut, "a@example.com new")
}

// When PostgreSQL does not answer, no call is left out, to ask it again alone.
func TestManyWithoutDatabase(t *testing.T) {
	t.Parallel()
	s := newBatchedStore(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Nanosecond)
	defer cancel()
	<-ctx.Done()
	calls := callsOf(noSuchID, noSuchID)
	s.getMany(ctx, calls)
	for _, c := range calls {
		if c.err == nil || asAPIError(c.err).kind != kindTimeout {
			t.Errorf("got %v", c.err)
		}
	}
}

// One statement for calls that share a key.
func TestCreateManyWithOneKey(t *testing.T) {
	t.Parallel()
	s := newBatchedStore(t)
	create := func(key, email, name string) newUser {
		return testUser(keyedUUID(caller{}, key, testUser("", email, name).userInput), email, name)
	}
	mustCreate(t, s.pg, "taken@example.com")
	calls := callsOf(
		create("same", "a@example.com", "x"),
		create("two", "b@example.com", "x"),
		create("same", "a@example.com", "x"),
		create("two", "c@example.com", "x"),
		create("taken", "taken@example.com", "x"),
	)
	s.createMany(t.Context(), calls)
	wantOutcomes(t, calls, "a@example.com x", "b@example.com x", "a@example.com x", leftOut, leftOut)
	if calls[0].answer != calls[2].answer {
		t.Errorf("%+v and %+v", calls[0].answer, calls[2].answer)
	}
	for i, want := range map[int]error{0: nil, 3: errKeyReused, 4: errEmailTaken} {
		u, err := s.create(t.Context(), calls[i].ask)
		if err != want || err == nil && u.ID != calls[i].ask.id {
			t.Errorf("call %d alone: %+v, %v; want %v", i, u, err, want)
		}
	}
}

// The indexes serve the statements for many as well.
func TestPlansOfMany(t *testing.T) {
	t.Parallel()
	wantPlans(t, newStore(t), insertUsers, updateUsers)
}

// Refusals share statements like all else: those that a batch can tell of its
// requests, even many about one user, are no statements of their own.
func TestRefusalsShareStatements(t *testing.T) {
	t.Parallel()
	s := newService(t)
	taken := createUser(s, "taken@example.com")
	mustExec(t, s.db, "CREATE SEQUENCE statements")
	mustExec(t, s.db, `CREATE FUNCTION count_statement() RETURNS trigger LANGUAGE plpgsql AS
		'BEGIN PERFORM nextval(''statements''), pg_sleep(0.02); RETURN NULL; END'`) // a sequence counts what is undone, too
	mustExec(t, s.db, `CREATE TRIGGER count_statement BEFORE INSERT OR UPDATE ON users FOR EACH STATEMENT EXECUTE FUNCTION count_statement()`)
	statements := func() int { return count(t, s.db, "SELECT last_value FROM statements") }
	const requests = 100
	for _, refusal := range []struct {
		method, path, body, field string
		want                      int
	}{
		{"POST", usersPath, `{"email":"taken@example.com","name":"x"}`, "X: x", 409},
		{"PUT", taken.header.Get("Location"), `{"name":"x"}`, `If-Match: "1"`, 412},
		{"PUT", usersPath + "/" + noSuchID, `{"name":"x"}`, "X: x", 404},
	} {
		waitFor(t, fmt.Sprintf("%d answers with %d to share statements", requests, refusal.want), func() bool {
			before := statements()
			var calls pendingCalls
			for range requests {
				calls.goCall(s, refusal.method, refusal.path, refusal.body, refusal.field)
			}
			for _, a := range calls.wait() {
				if a.status != refusal.want {
					t.Fatalf("%d %s; want %d", a.status, a.body, refusal.want)
				}
			}
			return statements()-before < requests/3 // unless they came one by one
		})
	}
}

// A statement for many that fails is told to each as its own would be.
func TestFailedBatchOfGets(t *testing.T) {
	t.Parallel()
	s := newService(t)
	mustExec(t, s.db, "ALTER TABLE users RENAME TO users_away")
	var clients sync.WaitGroup
	for range 40 {
		clients.Go(func() {
			for range 5 {
				wantError(t, s.call("GET", usersPath+"/"+noSuchID, ""), 500, "Database error")
			}
		})
	}
	clients.Wait()
	mustExec(t, s.db, "ALTER TABLE users_away RENAME TO users")
}

// Each request counts in the size of one batch.
func TestMetricsOfBatches(t *testing.T) {
	t.Parallel()
	s := newService(t, "ADMIN_ADDR=127.0.0.1:0")
	path := createUser(s, "ada@example.com").header.Get("Location")
	var clients sync.WaitGroup
	for range 8 {
		clients.Go(func() {
			for range 20 {
				s.try("GET", path, "")
			}
		})
	}
	clients.Wait()
	got := scrape(t, s.admin())
	if gets, creates := got[`rollcall_batch_size_sum{statement="get"}`], got[`rollcall_batch_size_sum{statement="create"}`]; gets != 160 || creates != 1 {
		t.Errorf("batches of %v gets and %v creates in all; want 160 and 1", gets, creates)
	}
}
