package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// More than the service can carry.

// With every place in flight taken, each further request is refused at once,
// by whatever method it comes, on a connection that stays open; health and
// readiness go on; and who has a place is answered in the end.
func TestChaosOverload(t *testing.T) {
	const places, poolConns = 16, 4
	s := newService(t, fmt.Sprintf("MAX_IN_FLIGHT=%d", places), fmt.Sprintf("DB_MAX_CONNS=%d", poolConns), "REQUEST_TIMEOUT=1h")
	path := createUser(s, "a@example.com").header.Get("Location")
	normal := returnsToNormal(t, poolConns)
	tx := begin(t, s.db, "LOCK TABLE users IN ACCESS EXCLUSIVE MODE")

	const clients = 10 * places
	var served, refused, wrong atomic.Int64
	var running sync.WaitGroup
	for range clients {
		running.Go(func() {
			switch a, err := s.try("GET", path, ""); {
			case err == nil && a.status == 200:
				served.Add(1)
			case err == nil && a.status == 503 && a.header.Get("Retry-After") != "":
				refused.Add(1)
			default:
				wrong.Add(1)
			}
		})
	}
	waitFor(t, "all places to be taken and the rest to be refused", func() bool { return refused.Load() == clients-places })

	const body = `{"email":"b@example.com","name":"B"}`
	for _, method := range []string{"GET", "HEAD", "DELETE", "PUT", "PATCH"} {
		if a := s.call(method, path, body); a.status != 503 {
			t.Errorf("%s: %d %s", method, a.status, a.body)
		}
	}
	for method, want := range map[string]int{"POST": 405, "OPTIONS": 204} { // which take no place
		if a := s.call(method, path, body); a.status != want {
			t.Errorf("%s: %d %s; want %d", method, a.status, a.body, want)
		}
	}
	conn := dialRaw(t, s) // which stays open, though each answer is a refusal
	for _, request := range []string{"POST /api/v1/users", "GET /api/v1/users", "PUT " + path, "PATCH " + path} {
		a := conn.answerTo(fmt.Sprintf("%s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
			request, len(body), body))
		if a.status != 503 || a.header.Get("Retry-After") == "" {
			t.Errorf("%s: %d %s", request, a.status, a.body)
		}
		if strings.HasPrefix(request, "GET") {
			conn.Close()
			conn = dialRaw(t, s) // its body is not read, and so might be taken for a request
		}
	}
	conn.Close()
	for range 10 {
		for _, path := range []string{"/health", "/health/ready"} {
			if a := s.call("GET", path, ""); a.status != 200 {
				t.Errorf("%s: %d %s", path, a.status, a.body)
			}
		}
	}

	tx.Rollback()
	running.Wait()
	if served.Load() != places || wrong.Load() != 0 {
		t.Errorf("%d served, %d refused, %d neither; want %d served and the rest refused", served.Load(), refused.Load(), wrong.Load(), places)
	}
	for range places { // all places are free again
		s.call("GET", path, "").user(t)
	}
	normal()
}

// Ten times the load that it can carry: who is refused has changed nothing, and
// nobody else notices more than a longer wait. PostgreSQL is made slow, so that it
// is the service that decides what to do, and not the scheduler of a machine
// without a processor to spare.
func TestChaosTenfold(t *testing.T) {
	clients := chaosRounds(t, 5000, 200)
	places, commit, length := 16, 200*time.Millisecond, 800*time.Millisecond
	if fullChaos() {
		places, commit, length = 64, 500*time.Millisecond, 10*time.Second
	}
	const poolConns = 10
	databaseURL, db := newSchema(t)
	p := startProcess(t, t.TempDir(), testEnv(databaseURL, fmt.Sprintf("MAX_IN_FLIGHT=%d", places), fmt.Sprintf("DB_MAX_CONNS=%d", poolConns)))
	p.waitReady()
	s := &service{t: t, url: p.url}
	// A disk that takes its time to commit.
	mustExec(t, db, fmt.Sprintf(`CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS
		'BEGIN PERFORM pg_sleep(%g); RETURN NULL; END'`, commit.Seconds()))
	mustExec(t, db, `CREATE TRIGGER slowly AFTER INSERT ON users FOR EACH STATEMENT EXECUTE FUNCTION slowly()`)

	closed := filesReturn(t, p.cmd.Process.Pid, poolConns)
	l := newLedger()
	// phase runs clients that each begin a create every so often, or, with 0, as
	// soon as the last one is answered.
	phase := func(name string, clients int, every, length time.Duration) (served, refused int) {
		fromServed, fromRefused := len(l.served), len(l.refused)
		var running sync.WaitGroup
		start := time.Now()
		for i := range clients {
			running.Go(func() {
				transport := new(http.Transport) // for a connection of its own
				defer transport.CloseIdleConnections()
				client := &http.Client{Timeout: patience, Transport: transport}
				next := start.Add(every * time.Duration(i) / time.Duration(clients))
				for ; time.Since(start) < length; next = next.Add(every) {
					if every > 0 {
						time.Sleep(time.Until(next)) // the load is that of a clock
					}
					l.create(client, s.url, "U")
				}
			})
		}
		running.Wait()
		seconds := time.Since(start).Seconds()
		servedIn, refusedIn := l.served[fromServed:], l.refused[fromRefused:]
		served, refused = len(servedIn), len(refusedIn)
		t.Logf("%-13s %5.0f requests/s: %4.0f/s served, p50 %v, p99 %v; %5.0f/s refused, p50 %v, p99 %v; %d MB resident, %d files",
			name, float64(served+refused)/seconds, float64(served)/seconds, percentile(servedIn, 50), percentile(servedIn, 99),
			float64(refused)/seconds, percentile(refusedIn, 50), percentile(refusedIn, 99), p.residentMB(), p.openFiles())
		return served, refused
	}
	phase("one client:", 1, 0, length*3/10)
	full, _ := phase("full load:", places, 0, length)

	var unhealthy, asked int
	var slowest time.Duration
	quit := make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() {
		for {
			select {
			case <-quit:
				return
			case <-time.After(20 * time.Millisecond):
			}
			for _, path := range []string{"/health", "/health/ready"} {
				sent := time.Now()
				if a, err := s.try("GET", path, "", "Connection: close"); err != nil || a.status != 200 {
					unhealthy++
				}
				slowest = max(slowest, time.Since(sent))
				asked++
			}
		}
	})
	_, refused := phase("ten times it:", clients, length*time.Duration(clients)/time.Duration(10*max(full, 1)), 2*length)
	close(quit)
	watching.Wait()
	if refused == 0 && fullChaos() { // a short one may find the machine too busy
		t.Error("that was no overload")
	}
	over := time.Now()
	var sent time.Time
	waitFor(t, "a create that takes as long as alone", func() bool {
		sent = time.Now()
		return l.create(client, s.url, "U") == 200 && time.Since(sent) < commit+time.Second/2
	})
	t.Logf("health and readiness: %d of %d with 200, the slowest took %v; the first create to be served came %v after it and took %v; %d MB resident",
		asked-unhealthy, asked, slowest.Round(time.Millisecond), sent.Sub(over).Round(time.Millisecond),
		time.Since(sent).Round(time.Millisecond), p.residentMB())

	o := l.close(t, db)
	o.faults = clients - places
	o.requests += asked
	if o.failed += unhealthy; unhealthy > 0 {
		o.details = append(o.details, fmt.Sprintf("failed: health or readiness said no %d times", unhealthy))
	}
	o.want(t, "ten times the load that it can carry")
	closed()
}

// percentile returns the value that p percent of the values don't exceed, 0 of none.
func percentile(values []time.Duration, p int) time.Duration {
	if len(values) == 0 {
		return 0
	}
	slices.Sort(values)
	return values[(len(values)-1)*p/100].Round(100 * time.Microsecond)
}

func (p *process) residentMB() int { return residentMB(p.cmd.Process.Pid) }

func (p *process) openFiles() int { return countFiles(p.cmd.Process.Pid) }

// What a connection costs, measured.
func TestChaosMemory(t *testing.T) {
	if !fullChaos() {
		t.Skip("it only measures: with ROLLCALL_CHAOS set")
	}
	const conns, poolConns = 5000, 2
	for _, tt := range []struct{ name, request string }{
		{"that has been answered and is idle", "GET /health HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"with 30 KB of a header", "GET /health HTTP/1.1\r\nHost: x\r\n" + strings.Repeat("X: "+strings.Repeat("x", 995)+"\r\n", 30)},
		{"with 900 KB of a body of 1 MB", "POST /api/v1/users HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n" +
			strings.Repeat(" ", 900_000)},
	} {
		databaseURL, _ := newSchema(t)
		p := startProcess(t, t.TempDir(), testEnv(databaseURL, fmt.Sprintf("DB_MAX_CONNS=%d", poolConns)))
		p.waitReady()
		closed := filesReturn(t, p.cmd.Process.Pid, poolConns)
		before, most := p.residentMB(), 0
		var opened []net.Conn
		for range conns {
			conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
			if err != nil {
				t.Fatal(err)
			}
			opened = append(opened, conn)
			io.WriteString(conn, tt.request) // of a body that is cut off, not all
			most = max(most, p.residentMB())
		}
		t.Logf("%d connections, each %s: %d MB resident before, %d at most", conns, tt.name, before, most)
		for _, conn := range opened {
			conn.Close()
		}
		closed()
	}
}

// Lists that begin far behind the first user, by offset, are right, and as many as may
// ask for them, they keep nobody else waiting: one is read at a time, and none for
// those who have gone.
func TestDeepLists(t *testing.T) {
	t.Parallel()
	const places = 8
	databaseURL, db := newSchema(t)
	s := startService(t, testEnv(databaseURL))
	s.waitReady()
	mustExec(t, db, `INSERT INTO users (id, email, name, created_at)
		SELECT gen_random_uuid(), 'user' || n || '@example.com', 'U', now() - n / 3 * interval '1 s' FROM generate_series(1, 1100) n`) // three at a time
	var want string
	if err := db.QueryRow(`SELECT string_agg(id::text, ' ') FROM
		(SELECT id FROM users ORDER BY created_at DESC, id DESC OFFSET 1000) u`).Scan(&want); err != nil {
		t.Fatal(err)
	}
	list := func(query string) string {
		var ids []string
		a := s.call("GET", usersPath+query, "")
		for _, u := range a.users(t) {
			ids = append(ids, u["id"])
		}
		if next := a.header.Get("Link"); (next != "") != strings.Contains(query, "limit=40") {
			t.Errorf("%s: Link %q", query, next)
		}
		return strings.Join(ids, " ")
	}
	if got := list("?limit=200&offset=1000"); got != want {
		t.Errorf("the last 100: %s; want %s", got, want)
	}
	if got := list("?limit=40&offset=1000") + " " + list("?limit=60&offset=1040"); got != want {
		t.Errorf("the last 100 in two: %s; want %s", got, want)
	}
	if got := list("?offset=1100"); got != "" {
		t.Errorf("behind the last: %s", got)
	}
	path := usersPath + "/" + want[:36]

	// A row takes 50 ms to be read: a deep list takes a minute.
	mustExec(t, db, `CREATE FUNCTION slowly(uuid) RETURNS boolean LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.05); RETURN true; END'`)
	mustExec(t, db, `CREATE ROLE reads_slowly IN ROLE pg_read_all_stats`) // none of a superuser is checked
	t.Cleanup(func() {
		mustExec(t, db, `DROP OWNED BY reads_slowly`)
		mustExec(t, db, `DROP ROLE reads_slowly`)
	})
	mustExec(t, db, `DO $$ BEGIN EXECUTE 'GRANT ALL ON SCHEMA ' || current_schema || ' TO reads_slowly';
		EXECUTE 'GRANT ALL ON ALL TABLES IN SCHEMA ' || current_schema || ' TO reads_slowly'; END $$`)
	mustExec(t, db, `ALTER TABLE users ENABLE ROW LEVEL SECURITY`)
	mustExec(t, db, `CREATE POLICY slowly ON users USING (slowly(id))`)
	databaseURL += " role=reads_slowly"
	s = startService(t, testEnv(databaseURL+" application_name=deep", "REQUEST_TIMEOUT=1h", "DB_MAX_CONNS=4", fmt.Sprintf("MAX_IN_FLIGHT=%d", places)))
	s.waitReady()
	running := func() (n int) {
		if err := db.QueryRow("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'deep' AND state = 'active' AND query LIKE '%OFFSET%'").Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	var conns []*wireConn
	for i := range 4 * places {
		conn := dialRaw(t, s)
		conn.send(fmt.Sprintf("GET %s?offset=%d HTTP/1.1\r\nHost: x\r\n\r\n", usersPath, 1000+i%2))
		conns = append(conns, conn)
	}
	waitFor(t, "a deep list to be read", func() bool { return running() > 0 })
	for range 50 {
		s.call("GET", path, "").user(t)
		if n := running(); n > 1 {
			t.Fatalf("%d deep lists are read at a time; want 1", n)
		}
	}
	for _, conn := range conns {
		conn.Close()
	}
	waitFor(t, "the deep lists of those who have gone to end", func() bool { return running() == 0 })

	s = startService(t, testEnv(databaseURL, "REQUEST_TIMEOUT=1s"))
	s.waitReady()
	var waiting sync.WaitGroup
	for range 3 {
		waiting.Go(func() {
			if a, err := s.try("GET", usersPath+"?offset=1000", ""); err != nil || a.status != 503 || a.header.Get("Retry-After") == "" {
				t.Errorf("one that is not read in time: %d %s %v", a.status, a.body, err)
			}
		})
	}
	waiting.Wait()
}

// Bodies that come slowly keep nobody out, however many, and whatever their length
// is or may be.
func TestSlowBodies(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for range 200 {
		dialRaw(t, s).send(head + "Content-Length: 65536\r\n\r\n") // and nothing of it
	}
	var conns []*wireConn
	for i := range 100 {
		conn := dialRaw(t, s)
		conn.send(head + "Transfer-Encoding: chunked\r\n\r\n" + chunk(fmt.Sprintf(`{"email":"%d@example.com",`, i)))
		conns = append(conns, conn)
	}
	a := s.call("POST", usersPath, `{"email":"large@example.com","name":"x"}`+strings.Repeat(" ", 60_000))
	a.user(t)
	for _, conn := range conns {
		conn.send(chunk(`"name":"x"}`) + "0\r\n\r\n")
	}
	for _, conn := range conns {
		conn.answer().user(t)
	}
}

func chunk(s string) string { return fmt.Sprintf("%x\r\n%s\r\n", len(s), s) }
