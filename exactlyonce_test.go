//go:build !plain

package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// The connection breaks when PostgreSQL has made the user, and before it could
// say so. The create that is repeated recognizes its own user.
func TestCreateWhoseAnswerIsLost(t *testing.T) {
	t.Parallel()
	s, r := throughRelay(t)
	for i := range 10 {
		r.lose("INSERT 0 1")
		a := createUser(s, fmt.Sprintf("%d@example.com", i))
		r.wantLost(t)
		if got := s.call("GET", a.header.Get("Location"), ""); got.body != a.body {
			t.Errorf("created %s\nstored  %s", a.body, got.body)
		}
	}
	if n := len(s.call("GET", usersPath, "").users(t)); n != 10 {
		t.Errorf("%d users, want 10", n)
	}
}

// The same for the other writes: to repeat them is to do them once, and what the
// first try did is no conflict.
func TestWritesWhoseAnswersAreLost(t *testing.T) {
	t.Parallel()
	s, r := throughRelay(t)
	for i := range 5 {
		made := createUser(s, fmt.Sprintf("%d@example.com", i))
		path := made.header.Get("Location")
		r.lose("UPDATE 1")
		renamed := s.call("PUT", path, `{"name":"B"}`, "If-Match: "+made.header.Get("ETag"))
		r.wantLost(t)
		if renamed.user(t)["name"] != "B" {
			t.Errorf("renamed: %s", renamed.body)
		}
		wantError(t, s.call("PUT", path, `{"name":"C"}`, "If-Match: "+made.header.Get("ETag")), 412, kindPrecondition.message)
		if got := s.call("GET", path, ""); got.body != renamed.body {
			t.Errorf("stored %s\nwant   %s", got.body, renamed.body)
		}
		r.lose("UPDATE 1")
		if got := s.call("PUT", path, `{"name":"D"}`).user(t); got["name"] != "D" {
			t.Errorf("renamed: %v", got)
		}
		r.wantLost(t)
		var when []string
		if i%2 == 0 {
			when = []string{"If-Match: " + s.call("GET", path, "").header.Get("ETag")}
		}
		r.lose("DELETE 1")
		if a := s.call("DELETE", path, "", when...); a.status != 200 {
			t.Errorf("DELETE: %d %s", a.status, a.body)
		}
		r.wantLost(t)
		wantError(t, s.call("DELETE", path, ""), 404, "Resource not found")
	}
}

// PostgreSQL goes away altogether: requests wait for it, and are answered as soon
// as it is back.
func TestDatabaseAway(t *testing.T) {
	t.Parallel()
	s, r := throughRelay(t, "REQUEST_TIMEOUT=60s")
	path := createUser(s, "a@example.com").header.Get("Location")
	back := r.away(s)
	var wg sync.WaitGroup
	var status [40]int
	for i := range status {
		wg.Go(func() {
			switch i % 4 {
			case 0:
				status[i] = s.call("GET", path, "").status
			case 1:
				status[i] = s.call("PUT", path, `{"name":"B"}`).status
			case 2:
				status[i] = s.call("POST", usersPath, fmt.Sprintf(`{"email":"%d@example.com","name":"N"}`, i)).status
			case 3:
				status[i] = s.call("GET", usersPath, "").status
			}
		})
	}
	waitFor(t, "readiness to end", func() bool { return s.call("GET", "/health/ready", "").status == 503 })
	back()
	wg.Wait()
	for i, got := range status {
		if got != 200 {
			t.Errorf("request %d: %d", i, got)
		}
	}
}

// Serialization failures are retried where nobody sees them.
func TestSerializationFailures(t *testing.T) {
	t.Parallel()
	databaseURL, _ := newSchema(t)
	s := startService(t, testEnv(databaseURL+" default_transaction_isolation=serializable"))
	s.waitReady()
	path := createUser(s, "a@example.com").header.Get("Location")
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 5 {
				if a, err := s.try("PUT", path, `{"name":"x"}`); err != nil || a.status != 200 {
					t.Errorf("PUT: %v %v", a, err)
				}
			}
		})
	}
	wg.Wait()
}

// The answer of a write is lost, and the next server can't tell what became of
// it, as a standby can't: that is no error of the write. It is asked again.
func TestRepeatMeetsAServerThatCannotTell(t *testing.T) {
	t.Parallel()
	s, r := throughRelay(t)
	made := createUser(s, "a@example.com")
	mustExec(t, s.db, "CREATE SEQUENCE tries")
	// A function of the test is found before PostgreSQL's own.
	mustExec(t, s.db, `CREATE FUNCTION pg_logical_emit_message(boolean, text, text) RETURNS pg_lsn LANGUAGE plpgsql AS $$
		BEGIN
			IF nextval('tries') <= 2 THEN RAISE EXCEPTION 'cannot assign TransactionIds during recovery' USING ERRCODE = 'XX000'; END IF;
			RETURN pg_current_wal_lsn();
		END $$`)
	r.lose("UPDATE 1")
	a := s.call("PUT", made.header.Get("Location"), `{"name":"B"}`, "If-Match: "+made.header.Get("ETag"))
	if a.user(t)["name"] != "B" {
		t.Errorf("%d %s", a.status, a.body)
	}
	if n := count(t, s.db, "SELECT last_value FROM tries"); n != 3 {
		t.Errorf("asked %d times, want 3", n)
	}
}

// Others use up PostgreSQL's own connections (SQLSTATE 53300): a request that
// needs one waits, and is served when one is free.
func TestConnectionsUsedUp(t *testing.T) {
	t.Parallel()
	testDatabase(t) // who can't start that one can't start one more either
	dir := socketDir(t)
	if err := copyCluster(dir); err != nil {
		t.Fatal(err)
	}
	const most = 8
	d, err := startPostgres(t.Context(), dir, fmt.Sprintf("max_connections=%d", most), "superuser_reserved_connections=0", "max_wal_senders=0", "fsync=off")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.stop() })
	s := startService(t, testEnv(d.url(), "REQUEST_TIMEOUT=60s"))
	s.waitReady()
	path := createUser(s, "a@example.com").header.Get("Location")

	others, err := sql.Open("postgres", d.url())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { others.Close() })
	var held []*sql.Conn
	for len(held) < most { // those that it takes from the service included
		c, err := others.Conn(context.Background())
		if err == nil {
			held = append(held, c)
			t.Cleanup(func() { c.Close() })
			continue
		}
		if pq.As(err, pqerror.TooManyConnections) == nil || len(held) == 0 {
			t.Fatal(err)
		}
		if _, err := held[0].ExecContext(t.Context(), "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'rollcall'"); err != nil {
			t.Fatal(err)
		}
	}
	var waiting pendingCalls
	waiting.goCall(s, "GET", path, "")
	waiting.goCall(s, "POST", usersPath, `{"email":"b@example.com","name":"x"}`)
	waitFor(t, "PostgreSQL to refuse the service", func() bool {
		log, err := os.ReadFile(d.log.Name())
		return err == nil && strings.Count(string(log), "too many clients") >= 3
	})
	if n := waiting.answered.Load(); n != 0 {
		t.Errorf("%d answers without a connection: %v", n, waiting.answers)
	}
	if a := s.call("GET", "/health", ""); a.status != 200 {
		t.Errorf("/health: %d", a.status)
	}
	for _, c := range held[1:] {
		c.Close()
	}
	others.SetMaxIdleConns(1)
	for _, a := range waiting.wait() {
		a.user(t)
	}
	wantHealthy(t, s)
	if n := count(t, others, "SELECT count(*) FROM users"); n != 2 {
		t.Errorf("%d users, want 2", n)
	}
}

// The connection breaks while a commit waits for the standby. PostgreSQL then
// shows what it has not replicated, and a repeat that finds it there must not
// take it for done: were the standby promoted now, it would be lost.
func TestRepeatWaitsForStandby(t *testing.T) {
	onlyLinux(t)
	t.Parallel()
	primary := newPrimary(t)
	standby := primary.replicate(freePort(t))
	s := startService(t, testEnv(databaseURLOf(t, "10.0.0.1",
		"10.0.0.1", "127.0.0.1:"+primary.port, "10.0.0.2", "127.0.0.1:"+standby.port), "REQUEST_TIMEOUT=30s"))
	s.waitReady()
	receiver := 0 // of what the primary sends
	if err := standby.db.QueryRow("SELECT pid FROM pg_stat_wal_receiver").Scan(&receiver); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(receiver, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Kill(receiver, syscall.SIGCONT) })
	created := make(chan answer, 1)
	go func() {
		a, _ := s.try("POST", usersPath, `{"email":"a@example.com","name":"x"}`)
		created <- a
	}()
	waiting := "SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
	primary.waitTrue(waiting)
	mustExec(t, primary.db, "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
	waitFor(t, "the repeat to wait for the standby", func() (yes bool) {
		select {
		case a := <-created:
			t.Fatalf("acknowledged what the standby does not have: %d %s", a.status, a.body)
		default:
		}
		return primary.db.QueryRow(waiting).Scan(&yes) == nil && yes
	})
	if err := syscall.Kill(receiver, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	a := <-created
	a.user(t)
	standby.waitTrue("SELECT count(*) = 1 FROM users") // it has it, but may still have to read it
}

// The connection breaks when PostgreSQL has made the user: the create is
// repeated within the service, and then by the client.
func TestKeyWhoseAnswerIsLost(t *testing.T) {
	t.Parallel()
	s, r := throughRelay(t)
	r.lose("INSERT 0 1")
	first := s.call("POST", usersPath, adaBody, withKey("k"))
	r.wantLost(t)
	first.user(t)
	wantSame(t, first, s.call("POST", usersPath, adaBody, withKey("k")))
	wantRows(t, s, 1)
}

// The primary dies and the standby takes over, again and again: the dead one
// comes back as the new one's standby.
func TestChaosFailover(t *testing.T) {
	onlyLinux(t)
	rounds := chaosRounds(t, 5, 1)
	primary := newPrimary(t)
	standby := primary.replicate(freePort(t))
	l, calls := startFailover(t, databaseURLOf(t, "10.0.0.1",
		"10.0.0.1", "127.0.0.1:"+primary.port, "10.0.0.2", "127.0.0.1:"+standby.port))
	failOver(t, "primary killed, standby promoted", rounds, primary, standby, l, calls)
}

// The primary becomes read-only before the standby takes over, as in a planned
// change. It lives on, and answers whoever has a connection; so no connection
// may be kept, or what it answers is out of date.
func TestChaosReadOnly(t *testing.T) {
	rounds := chaosRounds(t, 5, 1)
	primary := newPrimary(t)
	standby := primary.replicate(freePort(t))
	l, calls := startFailover(t, databaseURLOf(t, "10.0.0.1",
		"10.0.0.1", "127.0.0.1:"+primary.port, "10.0.0.2", "127.0.0.1:"+standby.port))
	for round := range rounds {
		if round > 0 {
			standby.stop()
			standby = primary.replicate(standby.port)
		}
		l.wait(calls)
		primary.demote(standby)
		standby.promote()
		l.wait(calls)
		primary.waitTrue("SELECT count(*) = 0 FROM pg_stat_activity WHERE application_name = 'rollcall'")
		primary, standby = standby, primary
	}
	o := l.stop(primary.db)
	o.faults = rounds
	o.want(t, "primary turned read-only, standby promoted")
}

// HAProxy finds the node that can be written to.
func TestChaosHAProxy(t *testing.T) {
	onlyLinux(t)
	findProxy(t, "haproxy")
	rounds := chaosRounds(t, 5, 1)
	primary := newPrimary(t)
	standby := primary.replicate(freePort(t))
	port := startHAProxy(t, primary, standby)
	l, calls := startFailover(t, databaseURLOf(t, "127.0.0.1:5433", "5433", port))
	failOver(t, "HAProxy: primary killed, standby promoted", rounds, primary, standby, l, calls)
}

// PostgreSQL is killed and restarted, in turns, behind PgBouncer.
func TestChaosPgBouncer(t *testing.T) {
	onlyLinux(t)
	findProxy(t, "pgbouncer")
	rounds := chaosRounds(t, 10, 2)
	server := newPrimary(t)
	port := startPgBouncer(t, server, server.port)
	l, calls := startFailover(t, databaseURLOf(t, "127.0.0.1:6432", "6432", port))
	for round := range rounds {
		l.wait(calls)
		if round%2 == 0 {
			server.kill()
		} else {
			server.cancel()
			<-server.done
		}
		server.serve()
		l.wait(calls)
	}
	o := l.stop(server.db)
	o.faults = rounds
	o.want(t, "PgBouncer: PostgreSQL killed, or restarted")
}

// PgBouncer has its connections made by HAProxy, which leads them to the node that
// can be written to.
func TestChaosPgBouncerFailover(t *testing.T) {
	onlyLinux(t)
	findProxy(t, "haproxy")
	findProxy(t, "pgbouncer")
	rounds := chaosRounds(t, 5, 1)
	primary := newPrimary(t)
	standby := primary.replicate(freePort(t))
	haproxy := startHAProxy(t, primary, standby)
	db, err := sql.Open("postgres", "postgres://rollcall:secret@127.0.0.1:"+haproxy+"/rollcall?sslmode=disable")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	db.SetMaxIdleConns(0) // each question is led anew, to the nodes in turns
	waitFor(t, "HAProxy to have found the standby", func() bool {
		for range 4 {
			var standby bool
			if db.QueryRow("SELECT pg_is_in_recovery()").Scan(&standby) != nil || standby {
				return false
			}
		}
		return true
	})
	port := startPgBouncer(t, primary, haproxy)
	l, calls := startFailover(t, databaseURLOf(t, "127.0.0.1:6432", "6432", port))
	failOver(t, "PgBouncer, HAProxy: primary killed, standby promoted", rounds, primary, standby, l, calls)
}

// HAProxy sends nobody to a replica that is dead, before its checks have found out,
// and turns nobody away while PostgreSQL is away and so no replica ready.
func TestBalancer(t *testing.T) {
	findProxy(t, "haproxy")
	t.Parallel()
	checkLeaks(t)
	server := newPrimary(t)
	address, ports := startBalancer(t)
	var replicas [2]*process
	for i := range replicas {
		replicas[i] = startProcess(t, t.TempDir(), testEnv("postgres://rollcall:secret@127.0.0.1:"+server.port+"/rollcall?sslmode=disable",
			"PORT="+ports[i], "REQUEST_TIMEOUT=30s"))
		replicas[i].waitReady()
	}
	get := func() error {
		c := &rawClient{address: address}
		resp, err := c.do("GET", usersPath, "", 0)
		if err != nil {
			return err
		}
		defer c.conn.Close()
		if resp.StatusCode != 200 {
			return errors.New(resp.Status)
		}
		return nil
	}
	replicas[0].cmd.Process.Kill()
	replicas[0].exit()
	for range 4 { // which HAProxy would send to both, in turns
		if err := get(); err != nil {
			t.Errorf("one replica is dead: %v", err)
		}
	}

	server.cancel()
	<-server.done
	waitFor(t, "HAProxy to have asked in vain", func() bool {
		return strings.Count(replicas[1].stderr.String(), `"path":"/health/ready","status":503`) > 2
	})
	answered := make(chan error)
	go func() { answered <- get() }()
	server.serve()
	if err := <-answered; err != nil {
		t.Errorf("PostgreSQL was away: %v", err)
	}
}

// Rows that somebody has locked delay those who want to change them, and nobody
// else, however many these are.
func TestLockedRowsDelayTheirOwnCallers(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name          string
		rows, callers int
	}{
		{"more callers for a row than connections", 1, 40},
		{"more rows than connections", 25, 2},
		{"one after the other", 25, 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := newService(t, "DB_MAX_CONNS=10", "REQUEST_TIMEOUT=60s")
			var locked []string
			for i := range test.rows {
				locked = append(locked, createUser(s, fmt.Sprintf("locked%d@example.com", i)).header.Get("Location"))
			}
			tx := begin(t, s.db, "SELECT FROM users FOR UPDATE")
			var waiting pendingCalls
			for i := range test.callers {
				for _, path := range locked {
					method := "PUT"
					if i == 1 {
						method = "PATCH"
					}
					waiting.goCall(s, method, path, fmt.Sprintf(`{"name":"%d"}`, i))
					if test.callers == 1 { // each alone in its statement
						s.call("GET", path, "").user(t)
					}
				}
			}
			for range 5 {
				wantAllServed(t, s, 20)
			}
			wantHealthy(t, s)
			if n := waiting.answered.Load(); n != 0 {
				t.Errorf("%d writes did not wait for the lock", n)
			}
			tx.Rollback()
			for _, a := range waiting.wait() {
				a.user(t)
			}
		})
	}
}

// An address that another transaction is just giving to a user is a lock as
// well: only those who want it wait, to learn whether it is taken.
func TestLockedAddress(t *testing.T) {
	t.Parallel()
	for _, commit := range []bool{false, true} {
		t.Run(fmt.Sprintf("commit %t", commit), func(t *testing.T) {
			t.Parallel()
			s := newService(t, "DB_MAX_CONNS=4", "REQUEST_TIMEOUT=60s")
			mover := createUser(s, "mover@example.com").header.Get("Location")
			tx := begin(t, s.db, "INSERT INTO users (id, email, name) VALUES ($1, 'Wanted@example.com', 'x')", noSuchID)
			var waiting pendingCalls
			for range 30 {
				waiting.goCall(s, "POST", usersPath, `{"email":"wanted@example.com","name":"y"}`)
			}
			waiting.goCall(s, "PUT", mover, `{"email":"wanted@example.com"}`)
			for range 5 {
				wantAllServed(t, s, 20)
			}
			if n := waiting.answered.Load(); n != 0 {
				t.Errorf("%d did not wait", n)
			}
			var err error
			winners := 1
			if commit {
				winners = 0
				err = tx.Commit()
			} else {
				err = tx.Rollback()
			}
			if err != nil {
				t.Fatal(err)
			}
			won := 0
			for _, a := range waiting.wait() {
				if a.status == http.StatusOK {
					won++
				} else {
					wantError(t, a, 409, "Email already in use")
				}
			}
			if won != winners {
				t.Errorf("%d have got the address, want %d", won, winners)
			}
		})
	}
}

// A session whose prepared statements others have a hand in shows that it is shared:
// nothing is prepared any more, and no answer is a wrong one.
func TestStatementsOfOthers(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ name, others string }{
		{"gone", "DEALLOCATE ALL"},
		{"another's", "DEALLOCATE ALL; " + strings.Join(numbered(`PREPARE "%d" AS SELECT $1::text, $2::text, $3::text, $4::text, $5::text, $6::text`, 40), "; ")},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := newService(t, "DB_MAX_CONNS=1")
			a := createUser(s, "a@example.com")
			path := a.header.Get("Location")
			mustExec(t, s.db, "CREATE FUNCTION others() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "+
				"IF NEW.name = 'others' THEN EXECUTE '"+test.others+"'; END IF; RETURN NULL; END $$")
			mustExec(t, s.db, "CREATE TRIGGER others AFTER UPDATE ON users FOR EACH ROW EXECUTE FUNCTION others()")
			put := s.call("PUT", path, `{"name":"others"}`)
			put.user(t)
			if got := s.call("GET", path, ""); got.body != put.body {
				t.Errorf("GET: %d %s\nwant %s", got.status, got.body, put.body)
			}
			wantCalls(t, s, "after")
			if warned := strings.Count(s.log.String(), "binary_parameters=yes"); warned != 1 {
				t.Errorf("warned %d times", warned)
			}
		})
	}
}

// Nobody has said that there is a pooler (binary_parameters=yes). One replica meets it at
// its start, the other one later, in place of PostgreSQL itself.
func TestPoolerUnannounced(t *testing.T) {
	findProxy(t, "pgbouncer")
	t.Parallel()
	checkLeaks(t)
	server := newPrimary(t)
	const sessions = 3
	pooler := startPgBouncer(t, server, server.port, fmt.Sprintf("default_pool_size = %d", sessions))
	listener, _ := newListener(t)
	_, between, _ := net.SplitHostPort(listener.Addr().String())
	var behind atomic.Value // the port that listener leads to
	behind.Store(server.port)
	go func() {
		for {
			from, err := listener.Accept()
			if err != nil {
				return
			}
			to, err := net.Dial("tcp", "127.0.0.1:"+behind.Load().(string))
			if err != nil {
				from.Close()
				continue
			}
			for _, pair := range [][2]net.Conn{{from, to}, {to, from}} {
				go func() {
					io.Copy(pair[0], pair[1])
					from.Close()
					to.Close()
				}()
			}
		}
	}()
	databaseURL := func(port string) string {
		return "postgres://rollcall:secret@127.0.0.1:" + port + "/rollcall?sslmode=disable"
	}
	var replicas [2]*service
	for i, port := range []string{between, pooler} {
		replicas[i] = startService(t, testEnv(databaseURL(port), "REQUEST_TIMEOUT=30s"))
		replicas[i].waitReady()
	}
	warnings := func(s *service) (n int) {
		for _, line := range s.logged() {
			if line["level"] == "WARN" && strings.Contains(fmt.Sprint(line["msg"]), "binary_parameters=yes") {
				n++
			}
		}
		return n
	}
	l := startLoad(t, replicas[0].url, chaosConns, replicas[1].url)
	l.wait(2000)
	if warnings(replicas[0]) != 0 {
		t.Error("PostgreSQL itself is taken for a pooler")
	}
	behind.Store(pooler)
	mustExec(t, server.db, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'rollcall'")
	waitFor(t, "the pooler to be noticed", func() bool { return warnings(replicas[0]) > 0 })
	l.wait(2000)
	o := l.stop(server.db)
	o.faults = 1
	o.want(t, "PgBouncer, unannounced, in place of PostgreSQL")
	for i, s := range replicas {
		if n := warnings(s); n != 1 {
			t.Errorf("replica %d warns of the pooler %d times", i, n)
		}
	}

	// Nothing is left in the sessions: each serves a transaction of its own here.
	db, err := sql.Open("postgres", databaseURL(pooler)+"&binary_parameters=yes")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for range sessions {
		left := ""
		err := begin(t, db, "SELECT").QueryRow("SELECT concat_ws(' ', (SELECT string_agg(name, ' ') FROM pg_settings " +
			"WHERE source = 'session' AND name NOT IN ('application_name', 'transaction_read_only')), (SELECT string_agg(name, ' ') FROM pg_prepared_statements))").Scan(&left)
		if err != nil || left != "" {
			t.Errorf("left in a session: %q, %v", left, err)
		}
	}
}

// Each retry is counted by its reason.
func TestMetricsOfRetries(t *testing.T) {
	t.Parallel()
	s := newService(t, "ADMIN_ADDR=127.0.0.1:0", "REQUEST_TIMEOUT=1m")
	path := createUser(s, "ada@example.com").header.Get("Location")
	tx := begin(t, s.db, "SELECT FROM users FOR UPDATE")
	var waiting pendingCalls
	waiting.goCall(s, "PUT", path, `{"name":"Ada King"}`)
	waiting.goCall(s, "DELETE", usersPath+"/"+noSuchID, "") // which waits for nobody
	waitFor(t, "two retries", func() bool { return scrape(t, s.admin())[`rollcall_db_retries_total{reason="55P03"}`] >= 2 })
	tx.Rollback()
	waiting.wait()
}
