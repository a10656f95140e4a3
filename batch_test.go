package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

// The statements for many, on a real PostgreSQL: each call gets its own answer.

// newStore returns a store on a schema of its own.
func newStore(t *testing.T) *store {
	t.Helper()
	databaseURL, _ := newSchema(t)
	env := testEnv(databaseURL)
	cfg, err := loadConfig(func(name string) string { return env[name] }, false)
	if err != nil {
		t.Fatal(err)
	}
	s := openStore(cfg, newLogger(cfg, io.Discard))
	t.Cleanup(func() { s.close() })
	if err := s.start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return s
}

// callsOf returns a call for each ask.
func callsOf[Q any](asks ...Q) (calls []*call[Q, user]) {
	for _, a := range asks {
		calls = append(calls, &call[Q, user]{ask: a, ctx: context.Background()})
	}
	return calls
}

// outcomes describes what the calls got: the address and name of a user, or the error.
func outcomes[Q any](calls []*call[Q, user]) (got []string) {
	for _, c := range calls {
		if c.err != nil {
			got = append(got, c.err.Error())
		} else {
			got = append(got, c.answer.Email+" "+c.answer.Name)
		}
	}
	return got
}

func wantOutcomes[Q any](t *testing.T, calls []*call[Q, user], want ...string) {
	t.Helper()
	if got := outcomes(calls); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

// mustCreate makes a user directly.
func mustCreate(t *testing.T, s *store, email string) user {
	t.Helper()
	u, err := s.create(t.Context(), newUUID(), email, "x")
	if err != nil {
		t.Fatal(err)
	}
	return u
}

const (
	alone   = "run it alone"
	missing = "Resource not found"
	taken   = "Email already in use"
)

func TestCreateMany(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	mustCreate(t, s, "taken@example.com")
	odd := "\"\\{},NULL '\n\t😀"
	calls := callsOf(
		draft{newUUID(), "first@example.com", "x"},
		draft{newUUID(), "TAKEN@example.com", "x"},
		draft{newUUID(), "last@example.com", "x"},
	)
	s.createMany(t.Context(), calls)
	wantOutcomes(t, calls, "first@example.com x", taken, "last@example.com x")

	calls = callsOf( // two of them alike: PostgreSQL finds that out when it inserts the second
		draft{newUUID(), "a@example.com", odd},
		draft{newUUID(), "TAKEN@example.com", "x"},
		draft{newUUID(), "same@example.com", "first"},
		draft{newUUID(), "Same@example.com", "second"},
		draft{newUUID(), "b@example.com", "NULL"},
	)
	s.createMany(t.Context(), calls)
	wantOutcomes(t, calls, "a@example.com "+odd, taken, "same@example.com first", taken, "b@example.com NULL")
	for _, c := range calls {
		if c.err == nil && (c.answer.ID != c.ask.id || !c.answer.CreatedAt.Equal(c.answer.UpdatedAt)) {
			t.Errorf("%+v made %+v", c.ask, c.answer)
		}
	}
}

func TestGetMany(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	a, b := mustCreate(t, s, "a@example.com"), mustCreate(t, s, "b@example.com")
	calls := callsOf(lookUp(b.ID), noSuchID, lookUp(a.ID), lookUp(b.ID))
	s.getMany(t.Context(), calls)
	wantOutcomes(t, calls, "b@example.com x", missing, "a@example.com x", "b@example.com x")
}

func TestFindMany(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	mustCreate(t, s, "Ada@example.com")
	mustCreate(t, s, "Ünal@example.com")
	calls := callsOf[lookUp]("ada@EXAMPLE.com", "nobody@example.com", "ünal@example.com", "Ada@example.com", `{"\`)
	s.findMany(t.Context(), calls)
	wantOutcomes(t, calls, "Ada@example.com x", missing, "Ünal@example.com x", "Ada@example.com x", missing)
}

func TestUpdateMany(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	a, b, c := mustCreate(t, s, "a@example.com"), mustCreate(t, s, "b@example.com"), mustCreate(t, s, "c@example.com")
	name, email := "new", "C@example.com"
	stale, current := "1", b.version()
	calls := callsOf(
		userChange{id: a.ID, name: &name},
		userChange{id: noSuchID, name: &name},
		userChange{id: b.ID, name: &name, when: preconditions{match: &current}},
		userChange{id: a.ID, name: &email}, // the second of one user
		userChange{id: c.ID, email: &email, when: preconditions{noneMatch: &stale}},
	)
	s.updateMany(t.Context(), calls)
	wantOutcomes(t, calls, "a@example.com new", alone, "b@example.com new", alone, "C@example.com x")
	if u := calls[0].answer; !u.UpdatedAt.After(a.UpdatedAt) || !u.CreatedAt.Equal(a.CreatedAt) {
		t.Errorf("%+v became %+v", a, u)
	}

	calls = callsOf( // what b was is not what it is
		userChange{id: b.ID, name: &email, when: preconditions{match: &current}},
		userChange{id: a.ID, email: &email}, // c has it: the statement fails, and each is on its own
	)
	s.updateMany(t.Context(), calls)
	wantOutcomes(t, calls, alone, alone)
	if u, err := s.get(t.Context(), a.ID); err != nil || u.Email != "a@example.com" || u.Name != "new" {
		t.Errorf("%+v, %v", u, err)
	}
}

func TestDeleteMany(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	a, b, c := mustCreate(t, s, "a@example.com"), mustCreate(t, s, "b@example.com"), mustCreate(t, s, "c@example.com")
	stale, any := "1", "*"
	calls := callsOf(
		userChange{id: a.ID},
		userChange{id: b.ID, when: preconditions{match: &stale}},
		userChange{id: c.ID, when: preconditions{noneMatch: &any}},
		userChange{id: noSuchID},
		userChange{id: a.ID},
	)
	s.deleteMany(t.Context(), calls)
	wantOutcomes(t, calls, "a@example.com x", alone, alone, alone, alone)
	for _, u := range []user{b, c} {
		if _, err := s.get(t.Context(), u.ID); err != nil {
			t.Errorf("%s: %v", u.Email, err)
		}
	}
}

// A table that inherits from users has rows in the same places, under other ids.
// They are nobody's who was asked for.
func TestManyBesideAnInheritedTable(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	a, b := mustCreate(t, s, "a@example.com"), mustCreate(t, s, "b@example.com")
	mustExec(t, s.db, "CREATE TABLE old_users () INHERITS (users)")
	mustExec(t, s.db, "INSERT INTO old_users (id, email, name) SELECT gen_random_uuid(), 'old' || n, 'old' FROM generate_series(1, 20) n")
	name := "new"
	calls := callsOf(userChange{id: a.ID, name: &name}, userChange{id: b.ID, name: &name})
	s.updateMany(t.Context(), calls)
	wantOutcomes(t, calls, "a@example.com new", "b@example.com new")
	calls = callsOf(userChange{id: a.ID}, userChange{id: b.ID})
	s.deleteMany(t.Context(), calls)
	wantOutcomes(t, calls, "a@example.com new", "b@example.com new")
	if n := count(t, s.db, "SELECT count(*) FROM old_users WHERE name = 'old'"); n != 20 {
		t.Errorf("%d of 20 are as they were", n)
	}
}

// A row that somebody has locked is left out, and the others don't wait for it.
func TestManyAroundALockedRow(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	a, locked := mustCreate(t, s, "a@example.com"), mustCreate(t, s, "locked@example.com")
	begin(t, s.db, "SELECT FROM users WHERE id = $1 FOR UPDATE", locked.ID)
	name := "new"
	calls := callsOf(userChange{id: locked.ID, name: &name}, userChange{id: a.ID, name: &name})
	s.updateMany(t.Context(), calls)
	wantOutcomes(t, calls, alone, "a@example.com new")
	calls = callsOf(userChange{id: locked.ID}, userChange{id: a.ID})
	s.deleteMany(t.Context(), calls)
	wantOutcomes(t, calls, alone, "a@example.com new")
}

// When PostgreSQL does not answer, nobody is sent to ask it again alone.
func TestManyWithoutDatabase(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Nanosecond)
	defer cancel()
	<-ctx.Done()
	calls := callsOf(lookUp(noSuchID), noSuchID)
	s.getMany(ctx, calls)
	for _, c := range calls {
		var f *failure
		if !errors.As(c.err, &f) || f.kind != kindTimeout {
			t.Errorf("got %v", c.err)
		}
	}
}

// Under a mixed load with contested addresses, every answer is true, and the
// table is in the end what the answers said.
func TestMixedLoad(t *testing.T) {
	t.Parallel()
	s := newService(t)
	const workers, rounds = 32, 30
	var mu sync.Mutex
	owner := make(map[string]string) // of an address: the id that an answer gave it to
	var wg sync.WaitGroup
	for worker := range workers {
		wg.Go(func() {
			for round := range rounds {
				contested := fmt.Sprintf("%d-%d@example.com", round, worker%4)
				a, err := s.try("POST", usersPath, fmt.Sprintf(`{"email":%q,"name":"%d"}`, contested, worker))
				if err != nil || a.status != 200 && a.status != 409 {
					t.Errorf("create: %v %v", a, err)
					return
				}
				if a.status == 409 {
					continue
				}
				id := a.user(t)["id"]
				mu.Lock()
				if other, ok := owner[contested]; ok {
					t.Errorf("%s was given to %s and to %s", contested, other, id)
				}
				owner[contested] = id
				mu.Unlock()
				path, tag := usersPath+"/"+id, a.header.Get("ETag")
				for _, step := range []struct {
					method, path, body, condition string
					status                        int
					name                          string // in the answer
				}{
					{"GET", path, "", "", 200, fmt.Sprint(worker)},
					{"PUT", path, `{"name":"one"}`, "If-Match: " + tag, 200, "one"},
					{"PUT", path, `{"name":"two"}`, "If-Match: " + tag, 412, ""},
					{"GET", path, "", "", 200, "one"}, // a read sees what was acknowledged
					{"GET", usersPath + "?email=" + strings.ToUpper(contested), "", "", 200, "one"},
					{"PATCH", path, `{"name":"three"}`, "", 200, "three"},
					{"GET", path, "", "If-None-Match: " + tag, 200, "three"},
					{"DELETE", path, "", "If-Match: " + tag, 412, ""},
				} {
					a, err := s.try(step.method, step.path, step.body, step.condition)
					if err != nil || a.status != step.status || !strings.Contains(a.body, `"name":"`+step.name) && step.name != "" {
						t.Errorf("%+v: %v %v", step, a, err)
					}
				}
				if round%3 == 0 {
					mu.Lock()
					delete(owner, contested) // from now on, another may get it
					mu.Unlock()
					if a, err := s.try("DELETE", path, ""); err != nil || a.status != 200 {
						t.Errorf("delete: %v %v", a, err)
					}
					if a, err := s.try("GET", path, ""); err != nil || a.status != 404 {
						t.Errorf("after delete: %v %v", a, err)
					}
				}
			}
		})
	}
	wg.Wait()
	stored := make(map[string]string)
	for _, u := range s.call("GET", usersPath+"?limit=1000", "").users(t) {
		stored[u["email"]] = u["id"]
		if u["name"] != "three" {
			t.Errorf("left behind: %v", u)
		}
	}
	if fmt.Sprint(stored) != fmt.Sprint(owner) {
		t.Errorf("the table has %d users, the answers said %d", len(stored), len(owner))
	}
}

// A stop while many wait behind a locked table: all are answered.
func TestStopWithAFullQueue(t *testing.T) {
	t.Parallel()
	s := newService(t)
	tx := begin(t, s.db, "LOCK TABLE users IN EXCLUSIVE MODE")
	const many = 150
	answers := make(chan answerOrError, many)
	for i := range many {
		go func() {
			a, err := s.try("POST", usersPath, fmt.Sprintf(`{"email":"%d@example.com","name":"x"}`, i%100))
			answers <- answerOrError{a, err}
		}()
	}
	waitFor(t, "a statement to wait for the lock", func() bool {
		var waiting int
		err := s.db.QueryRow("SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'users'::regclass").Scan(&waiting)
		return err == nil && waiting > 0
	})
	s.stop()
	s.waitLog("stopping")
	tx.Rollback()
	statuses := make(map[int]int)
	for range many {
		switch a := <-answers; {
		case a.err == nil:
			statuses[a.status]++
		default: // it had not been accepted when the listener closed
			statuses[0]++
		}
	}
	if statuses[http.StatusOK]+statuses[http.StatusConflict]+statuses[0] != many || statuses[http.StatusOK] == 0 {
		t.Errorf("statuses: %v", statuses)
	}
	if err := <-s.done; err != nil {
		t.Errorf("run returned %v", err)
	}
	s.done <- nil
	var stored int
	if err := s.db.QueryRow("SELECT count(*) FROM users").Scan(&stored); err != nil || stored < statuses[http.StatusOK] {
		t.Errorf("%d creates were acknowledged, %d users are stored: %v", statuses[http.StatusOK], stored, err)
	}
}

func FuzzArray(f *testing.F) {
	f.Add("a", `"{},\NULL `)
	f.Fuzz(func(t *testing.T, a, b string) {
		text := array(appendElement(appendElement(appendElement(nil, &a), nil), &b))
		got, rest := parseArray(text)
		if rest != "" || len(got) != 3 || got[0] == nil || *got[0] != a || got[1] != nil || got[2] == nil || *got[2] != b {
			t.Errorf("%q and %q became %s", a, b, text)
		}
	})
}

// parseArray reads the text of an array as PostgreSQL's manual, section
// 8.15.6, describes it, and returns what it could not read.
func parseArray(s string) (elements []*string, rest string) {
	s, _ = strings.CutPrefix(s, "{")
	for {
		if after, ok := strings.CutPrefix(s, "NULL"); ok {
			elements, s = append(elements, nil), after
		} else if after, ok := strings.CutPrefix(s, `"`); ok {
			var b []byte
			i := 0
			for ; i < len(after) && after[i] != '"'; i++ {
				if after[i] == '\\' {
					i++
				}
				b = append(b, after[i])
			}
			text := string(b)
			elements, s = append(elements, &text), after[i+1:]
		}
		after, more := strings.CutPrefix(s, ",")
		if !more {
			rest, _ = strings.CutSuffix(s, "}")
			return elements, rest
		}
		s = after
	}
}
