package main

import (
	"database/sql"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// What goes wrong within PostgreSQL while it runs: no space, no connection, a
// lock that somebody holds, a statement that does not end. Each has its own
// status, none delays more than it must, and nothing is left of it afterwards.
//
// A limit of 60 s on requests is more than the client of the tests waits: an
// answer that comes is one that did not wait for the deadline.

// pendingCalls are requests under way.
type pendingCalls struct {
	wg       sync.WaitGroup
	mu       sync.Mutex
	answers  []answer
	answered atomic.Int64
}

// goCall sends a request, without waiting for the answer.
func (p *pendingCalls) goCall(s *service, method, path, body string, fields ...string) {
	p.wg.Go(func() {
		a, err := s.try(method, path, body, fields...)
		if err != nil {
			s.t.Error(err)
		}
		p.answered.Add(1)
		p.mu.Lock()
		defer p.mu.Unlock()
		p.answers = append(p.answers, a)
	})
}

// wait returns the answers, in the order in which they came.
func (p *pendingCalls) wait() []answer {
	p.wg.Wait()
	return p.answers
}

// isUnavailable reports whether an answer is a 503 as it should be.
func (a answer) isUnavailable() bool {
	return a.status == 503 && a.header.Get("Retry-After") != "" && a.header.Get("Content-Type") == "application/json" && strings.Contains(a.body, `"message":"`)
}

// wantUnavailable checks that an answer is a 503 as it should be.
func wantUnavailable(t *testing.T, a answer) {
	t.Helper()
	if !a.isUnavailable() {
		t.Errorf("got %d %s, want a 503 with Retry-After and a message", a.status, a.body)
	}
}

// wantInTime checks that no request so far took longer than the deadline of the
// test's service, of two seconds at most. What more it is given here is for a
// machine that is busy.
func wantInTime(t *testing.T, s *service) {
	t.Helper()
	for _, line := range s.logged() {
		if took, _ := line["duration_ms"].(float64); took > 10_000 {
			t.Errorf("%v %v took %v ms", line["method"], line["path"], took)
		}
	}
}

// wantHealthy checks that the service says so.
func wantHealthy(t *testing.T, s *service) {
	t.Helper()
	for _, path := range []string{"/health", "/health/ready"} {
		if a := s.call("GET", path, ""); a.status != 200 {
			t.Errorf("%s: %d %s", path, a.status, a.body)
		}
	}
}

// wantAllServed checks that everything works, n times over, for users that
// nothing is the matter with.
func wantAllServed(t *testing.T, s *service, n int) {
	t.Helper()
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			made, err := s.try("POST", usersPath, fmt.Sprintf(`{"email":"served%d@example.com","name":"x"}`, servedUsers.Add(1)))
			if err != nil || made.status != 200 {
				t.Errorf("POST: %v %v", made, err)
				return
			}
			path := made.header.Get("Location")
			for _, request := range [][3]string{
				{"GET", path}, {"PUT", path, `{"name":"y"}`}, {"GET", usersPath + "?limit=3"}, {"DELETE", path},
			} {
				if a, err := s.try(request[0], request[1], request[2]); err != nil || a.status != 200 {
					t.Errorf("%s %s: %v %v", request[0], request[1], a, err)
				}
			}
		})
	}
	wg.Wait()
}

var servedUsers atomic.Int64

// count returns the number that a query has for an answer.
func count(t *testing.T, db *sql.DB, query string, args ...any) (n int) {
	t.Helper()
	if err := db.QueryRow(query, args...).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

// The disk is full, as PostgreSQL says with SQLSTATE 53100 of any row that does
// not fit: that is no wait, and what fits is done once.
func TestDiskFull(t *testing.T) {
	t.Parallel()
	s := newService(t, "REQUEST_TIMEOUT=60s")
	path := createUser(s, "a@example.com").header.Get("Location")
	mustExec(t, s.db, `CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = '53100'; END $$`)
	mustExec(t, s.db, `CREATE TRIGGER full_disk BEFORE INSERT OR UPDATE ON users FOR EACH ROW
		WHEN (NEW.name = 'large') EXECUTE FUNCTION full_disk()`)
	large := s.call("POST", usersPath, `{"email":"large@example.com","name":"large"}`)
	wantUnavailable(t, large)
	wantError(t, large, 503, "The database has no space left") // and so nothing may have been made
	wantError(t, s.call("PUT", path, `{"name":"large"}`), 503, "The database has no space left")
	s.call("GET", path, "").user(t)
	s.call("GET", usersPath, "").users(t)
	wantHealthy(t, s)

	// Now many at a time, every fourth of which does not fit.
	var mixed pendingCalls
	for i := range 40 {
		name := "small"
		if i%4 == 0 {
			name = "large"
		}
		mixed.goCall(s, "POST", usersPath, fmt.Sprintf(`{"email":"%s%d@example.com","name":"%s"}`, name, i, name))
	}
	done := 0
	for _, a := range mixed.wait() {
		if a.status == 200 {
			done++
		} else {
			wantUnavailable(t, a)
		}
	}
	if n := count(t, s.db, "SELECT count(*) FROM users WHERE name = 'small'"); n != done {
		t.Errorf("%d answers are 200, but %d users were made", done, n)
	}
	if n := count(t, s.db, "SELECT count(*) FROM users WHERE name = 'large'"); n != 0 {
		t.Errorf("%d users who do not fit", n)
	}
	mustExec(t, s.db, "DROP TRIGGER full_disk ON users")
	wantAllServed(t, s, 5)
}

// The same with a disk that is full indeed: a file system of a few megabytes,
// which only root can mount. It fills and gets room again, several times.
func TestChaosDiskFull(t *testing.T) {
	if !fullChaos() {
		t.Skip("it mounts a file system; make chaos runs it")
	}
	d := testDatabase(t)
	dir := filepath.Join(d.dir, "small")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", dir).CombinedOutput(); err != nil {
		t.Skipf("only root can mount a file system: %v %s", err, out)
	}
	t.Cleanup(func() { // when the table is gone
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v %s", err, out)
		}
	})
	if err := d.chown(dir); err != nil {
		t.Fatal(err)
	}
	_, owner := newSchema(t)
	mustExec(t, owner, "CREATE TABLESPACE small LOCATION '"+dir+"'")
	t.Cleanup(func() { mustExec(t, owner, "DROP TABLESPACE small") })

	s := newService(t, "REQUEST_TIMEOUT=60s")
	path := createUser(s, "a@example.com").header.Get("Location")
	mustExec(t, s.db, "ALTER TABLE users SET TABLESPACE small")
	fill := func() (err error) {
		mustExec(t, s.db, "CREATE TABLE filler (b bytea) TABLESPACE small")
		for err == nil {
			_, err = s.db.Exec("INSERT INTO filler SELECT decode(repeat('00', 2000), 'hex') FROM generate_series(1, 4)")
		}
		return err
	}
	const rounds = 5
	l := newLedger()
	l.made["a@example.com"] = true
	create := func() int { return l.create(client, s.url, strings.Repeat("x", 250)) }
	for range rounds {
		if err := fill(); pq.As(err, pqerror.DiskFull) == nil {
			t.Fatalf("the disk fills with %v", err)
		}
		// The last page of users still has room.
		waitFor(t, "a user who does not fit", func() bool { return create() != 200 })
		var crowd sync.WaitGroup
		for range 100 {
			crowd.Go(func() { create() })
		}
		crowd.Wait()
		for range 20 {
			s.call("GET", path, "").user(t)
		}
		if n := len(s.call("GET", usersPath+"?limit=1000", "").users(t)); n != len(l.made) {
			t.Errorf("%d users, want %d", n, len(l.made))
		}
		wantHealthy(t, s)
		mustExec(t, s.db, "DROP TABLE filler")
		if status := create(); status != 200 {
			t.Errorf("there is room again, and a create is %d", status)
		}
	}
	o := l.close(t, s.db)
	o.faults = rounds
	o.want(t, "the disk full, and free again")
	wantAllServed(t, s, 5)
}

// gate makes updates to the name slow take until the gate is opened.
func gate(t *testing.T, s *service) (open func()) {
	t.Helper()
	mustExec(t, s.db, "CREATE TABLE gate (closed bool)")
	mustExec(t, s.db, "INSERT INTO gate VALUES (true)")
	mustExec(t, s.db, `CREATE FUNCTION pass_gate() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN
			WHILE (SELECT closed FROM gate) LOOP PERFORM pg_sleep(0.005); END LOOP;
			RETURN NEW;
		END $$`)
	mustExec(t, s.db, `CREATE TRIGGER pass_gate BEFORE UPDATE ON users FOR EACH ROW
		WHEN (NEW.name = 'slow') EXECUTE FUNCTION pass_gate()`)
	return func() { mustExec(t, s.db, "UPDATE gate SET closed = false") }
}

// waitSlow waits until n statements are at the gate.
func waitSlow(t *testing.T, s *service, n int) {
	t.Helper()
	waitFor(t, fmt.Sprintf("%d slow statements", n), func() bool {
		return count(t, s.db, `SELECT count(*) FROM pg_stat_activity a WHERE wait_event = 'PgSleep' AND application_name = current_schema()`) == n
	})
}

// newNamedService is newService, with connections that are told from others'
// by the name of its schema.
func newNamedService(t *testing.T, env ...string) *service {
	t.Helper()
	databaseURL, db := newSchema(t)
	s := startService(t, testEnv(databaseURL+" application_name="+schemaOf(t, databaseURL), env...))
	s.db = db
	s.waitReady()
	return s
}

// Slow statements hold all connections: others wait for one as long as they
// may, and the service says that it is well all the time.
func TestPoolUsedUp(t *testing.T) {
	t.Parallel()
	s := newNamedService(t, "DB_MAX_CONNS=2", "REQUEST_TIMEOUT=2s")
	a, b := createUser(s, "a@example.com").header.Get("Location"), createUser(s, "b@example.com").header.Get("Location")
	open := gate(t, s)
	var slow, waiting pendingCalls
	slow.goCall(s, "PUT", a, `{"name":"slow"}`)
	waitSlow(t, s, 1)
	slow.goCall(s, "PUT", b, `{"name":"slow"}`)
	waitSlow(t, s, 2)
	waiting.goCall(s, "GET", a, "")
	waiting.goCall(s, "GET", usersPath, "")
	waiting.goCall(s, "PUT", a, `{"name":"x"}`)
	waiting.goCall(s, "POST", usersPath, `{"email":"c@example.com","name":"x"}`)
	wantHealthy(t, s)
	for _, answer := range slow.wait() {
		wantUnavailable(t, answer)
	}
	for _, answer := range waiting.wait() {
		if answer.status != 200 { // just in time
			wantUnavailable(t, answer)
		}
	}
	wantInTime(t, s)
	waitSlow(t, s, 0) // PostgreSQL ends them a moment after their callers were answered
	open()
	wantAllServed(t, s, 5)
	if n := count(t, s.db, "SELECT count(*) FROM users WHERE name = 'slow'"); n != 0 {
		t.Errorf("%d writes were done after they had been given up", n)
	}
}

// The same where the slow statements end in time: so do those who wait.
func TestPoolUsedUpForAWhile(t *testing.T) {
	t.Parallel()
	s := newNamedService(t, "DB_MAX_CONNS=2", "REQUEST_TIMEOUT=60s")
	a, b := createUser(s, "a@example.com").header.Get("Location"), createUser(s, "b@example.com").header.Get("Location")
	open := gate(t, s)
	var calls pendingCalls
	calls.goCall(s, "PUT", a, `{"name":"slow"}`)
	waitSlow(t, s, 1)
	calls.goCall(s, "PUT", b, `{"name":"slow"}`)
	waitSlow(t, s, 2)
	for i := range 20 {
		calls.goCall(s, "GET", a, "")
		calls.goCall(s, "POST", usersPath, fmt.Sprintf(`{"email":"%d@example.com","name":"x"}`, i))
	}
	wantHealthy(t, s)
	if n := calls.answered.Load(); n != 0 {
		t.Errorf("%d answers without a connection", n)
	}
	open()
	for _, answer := range calls.wait() {
		answer.user(t)
	}
}

// A statement that takes long, with connections to spare, delays nobody else.
func TestSlowStatement(t *testing.T) {
	t.Parallel()
	s := newNamedService(t, "REQUEST_TIMEOUT=60s")
	path := createUser(s, "a@example.com").header.Get("Location")
	open := gate(t, s)
	var slow pendingCalls
	slow.goCall(s, "PUT", path, `{"name":"slow"}`)
	waitSlow(t, s, 1)
	wantAllServed(t, s, 20)
	if slow.answered.Load() != 0 {
		t.Error("the slow statement did not wait")
	}
	open()
	for _, a := range slow.wait() {
		a.user(t)
	}
}

// At their deadline they are told, and what they wanted does not happen later.
func TestLockedRowUntilTheDeadline(t *testing.T) {
	t.Parallel()
	s := newService(t, "REQUEST_TIMEOUT=1s")
	before := createUser(s, "locked@example.com")
	path := before.header.Get("Location")
	tx := begin(t, s.db, "SELECT FROM users FOR UPDATE")
	var waiting pendingCalls
	for range 20 {
		waiting.goCall(s, "PUT", path, `{"name":"late"}`)
		waiting.goCall(s, "PUT", path, `{"name":"late"}`, "If-Match: "+before.header.Get("ETag"))
		waiting.goCall(s, "DELETE", path, "")
	}
	for _, a := range waiting.wait() {
		// Nothing was done; but a request that leaves its batch can't know that.
		if a.body != errorBody(503, "The request took too long") && a.body != errorBody(503, "The request took too long; the change may have been made all the same") {
			t.Errorf("%d %s", a.status, a.body)
		}
		wantUnavailable(t, a)
	}
	wantInTime(t, s)
	tx.Rollback()
	if after := s.call("GET", path, ""); after.body != before.body {
		t.Errorf("before %s\nafter  %s", before.body, after.body)
	}
	wantAllServed(t, s, 5)
	if a := s.call("DELETE", path, ""); a.status != 200 {
		t.Errorf("DELETE: %d %s", a.status, a.body)
	}
}

// Somebody has locked the whole table, as some changes of a schema do: all wait,
// and are served when they come to it.
func TestLockedTable(t *testing.T) {
	t.Parallel()
	send := func(s *service, path string) (calls *pendingCalls) {
		calls = new(pendingCalls)
		for i := range 10 {
			calls.goCall(s, "GET", path, "")
			calls.goCall(s, "GET", usersPath, "")
			calls.goCall(s, "GET", usersPath+"?email=a@example.com", "")
			calls.goCall(s, "PUT", path, `{"name":"late"}`)
			calls.goCall(s, "POST", usersPath, fmt.Sprintf(`{"email":"%d@example.com","name":"late"}`, i))
			calls.goCall(s, "DELETE", usersPath+"/"+noSuchID, "")
		}
		return calls
	}
	t.Run("until the deadline", func(t *testing.T) {
		t.Parallel()
		s := newService(t, "REQUEST_TIMEOUT=1s")
		path := createUser(s, "a@example.com").header.Get("Location")
		tx := begin(t, s.db, "LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
		calls := send(s, path)
		wantHealthy(t, s)
		for _, a := range calls.wait() {
			wantUnavailable(t, a)
		}
		wantInTime(t, s)
		tx.Rollback()
		wantAllServed(t, s, 20)
		if n := count(t, s.db, "SELECT count(*) FROM users WHERE name = 'late'"); n != 0 {
			t.Errorf("%d writes were done after they had been given up", n)
		}
	})
	t.Run("for a while", func(t *testing.T) {
		t.Parallel()
		s := newService(t, "REQUEST_TIMEOUT=60s")
		path := createUser(s, "a@example.com").header.Get("Location")
		tx := begin(t, s.db, "LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
		calls := send(s, path)
		wantHealthy(t, s)
		if n := calls.answered.Load(); n != 0 {
			t.Errorf("%d did not wait for the table", n)
		}
		tx.Rollback()
		statuses := make(map[int]int)
		for _, a := range calls.wait() {
			statuses[a.status]++
		}
		if statuses[200] != 50 || statuses[404] != 10 {
			t.Errorf("statuses %v, want 50 of 200 and 10 of 404", statuses)
		}
		if n := count(t, s.db, "SELECT count(*) FROM users WHERE name = 'late'"); n != 11 {
			t.Errorf("%d users are as wanted, want 11", n)
		}
	})
}
