package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// The database: how it is migrated, taken over, waited for and lost.

// originalSchema is 001_create_users.sql of the service that rollcall replaces.
const originalSchema = `
CREATE TABLE IF NOT EXISTS users (
    id UUID PRIMARY KEY,
    email VARCHAR(255) UNIQUE NOT NULL,
    name VARCHAR(255) NOT NULL,
    created_at TIMESTAMPTZ NOT NULL DEFAULT NOW(),
    updated_at TIMESTAMPTZ NOT NULL DEFAULT NOW()
);
CREATE INDEX idx_users_email ON users(email);
CREATE INDEX idx_users_created_at ON users(created_at);`

// indexes returns the names of the indexes of users, in order.
func indexes(t *testing.T, db *sql.DB) string {
	t.Helper()
	var names string
	err := db.QueryRow(`SELECT string_agg(indexname, ' ' ORDER BY indexname) FROM pg_indexes
		WHERE tablename = 'users' AND schemaname = current_schema()`).Scan(&names)
	if err != nil {
		t.Fatal(err)
	}
	return names
}

const ourIndexes = "users_created_at_id_idx users_email_lower_key users_idempotency_key users_pkey"

func TestReplicasStartAtOnce(t *testing.T) {
	t.Parallel()
	databaseURL, db := newSchema(t)
	replicas := make([]*service, 6)
	var wg sync.WaitGroup
	for i := range replicas {
		wg.Go(func() { replicas[i] = startService(t, testEnv(databaseURL)) })
	}
	wg.Wait()
	for _, r := range replicas {
		r.waitReady()
	}
	newUser(replicas[0], "a@example.com")
	wantError(t, replicas[1].call("POST", usersPath, `{"email":"a@example.com","name":"x"}`), 409, "Email already in use")
	if got := indexes(t, db); got != ourIndexes {
		t.Errorf("indexes: %s", got)
	}
}

func TestAdoptOriginal(t *testing.T) {
	t.Parallel()
	databaseURL, db := newSchema(t)
	mustExec(t, db, originalSchema)
	mustExec(t, db, `INSERT INTO users (id, email, name) VALUES ($1, 'Old@Example.com', 'Old')`, noSuchID)
	s := startService(t, testEnv(databaseURL))
	s.waitReady()

	if got := indexes(t, db); got != ourIndexes {
		t.Errorf("indexes: %s\nwant     %s", got, ourIndexes)
	}
	if u := s.call("GET", usersPath+"/"+noSuchID, "").user(t); u["email"] != "Old@Example.com" || u["name"] != "Old" {
		t.Errorf("the old row: %v", u)
	}
	if list := s.call("GET", usersPath+"?email=OLD@example.com", "").users(t); len(list) != 1 {
		t.Errorf("by address: %v", list)
	}
	wantError(t, s.call("POST", usersPath, `{"email":"old@example.com","name":"x"}`), 409, "Email already in use")

	again := startService(t, testEnv(databaseURL))
	again.waitReady()
	for _, line := range again.logged() {
		if line["msg"] == "schema migrated" {
			t.Error("a second start migrates again")
		}
	}
}

// newDatabase makes a database that goes with the test, and returns a connection
// string for role, with a pool for the test itself.
func newDatabase(t *testing.T, options, role string) (databaseURL string, db *sql.DB) {
	t.Helper()
	_, admin := newSchema(t)
	name := fmt.Sprintf("database_%d", schemas.Add(1))
	mustExec(t, admin, "CREATE DATABASE "+name+" TEMPLATE template0 "+options)
	t.Cleanup(func() { mustExec(t, admin, "DROP DATABASE "+name+" WITH (FORCE)") })
	databaseURL = testDatabase(t).urlOf(name)
	db, err := sql.Open("postgres", databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return databaseURL + " user=" + role, db
}

// A database that can't hold all names is refused, with what to do.
func TestDatabaseWithoutUTF8(t *testing.T) {
	t.Parallel()
	for _, encoding := range []string{"LATIN1", "WIN1252", "EUC_JP", "SQL_ASCII"} {
		t.Run(encoding, func(t *testing.T) {
			t.Parallel()
			databaseURL, db := newDatabase(t, "LOCALE 'C' ENCODING '"+encoding+"'", "rollcall")
			err := runOnce(t, testEnv(databaseURL))
			var refused *schemaError
			if !errors.As(err, &refused) || !strings.Contains(err.Error(), encoding) || !strings.Contains(err.Error(), "ENCODING 'UTF8'") {
				t.Errorf("run returned %v", err)
			}
			if n := count(t, db, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"); n != 0 {
				t.Errorf("a refused start has made %d tables", n)
			}
		})
	}
}

// A migration takes longer than the role's statements may, and waits for locks; the
// log says what it is doing.
func TestSlowMigration(t *testing.T) {
	t.Parallel()
	role := fmt.Sprintf("slow_%d", schemas.Add(1))
	_, admin := newSchema(t)
	mustExec(t, admin, "CREATE ROLE "+role+" LOGIN; ALTER ROLE "+role+" SET statement_timeout = '200ms'; ALTER ROLE "+role+
		" SET lock_timeout = '100ms'; ALTER ROLE "+role+" SET idle_in_transaction_session_timeout = '200ms'")
	t.Cleanup(func() { mustExec(t, admin, "DROP ROLE "+role) })
	databaseURL, db := newDatabase(t, "OWNER "+role, role)
	mustExec(t, db, originalSchema+"ALTER TABLE users OWNER TO "+role+"; ALTER SCHEMA public OWNER TO "+role)
	locked := begin(t, db, "SELECT FROM users")
	first := startService(t, testEnv(databaseURL))
	if line := first.waitLog("still preparing the database"); line["step"] != "migration 2: an address belongs to one user, letter case ignored" {
		t.Errorf("logged %v", line)
	}
	second := startService(t, testEnv(databaseURL))
	if line := second.waitLog("still preparing the database"); line["step"] != "waiting for another rollcall, which migrates" {
		t.Errorf("logged %v", line)
	}
	locked.Rollback()
	for _, s := range []*service{first, second} {
		s.waitReady()
		for _, line := range s.logged() {
			if line["msg"] == "waiting for PostgreSQL" {
				t.Errorf("logged %v", line)
			}
		}
	}
}

func TestAdoptCollidingAddresses(t *testing.T) {
	t.Parallel()
	databaseURL, db := newSchema(t)
	mustExec(t, db, originalSchema)
	mustExec(t, db, `INSERT INTO users (id, email, name, created_at) VALUES (gen_random_uuid(), 'ada@example.com', 'x', now()),
		(gen_random_uuid(), 'Ada@example.com', 'x', now() - interval '1 day'), (gen_random_uuid(), 'only@example.com', 'x', now())`)
	err := runOnce(t, testEnv(databaseURL))
	var refused *schemaError
	if !errors.As(err, &refused) {
		t.Fatalf("run returned %v", err)
	}
	for _, want := range []string{"Ada@example.com, ada@example.com", "1 such groups", "Change or delete all but one"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not say %q: %v", want, err)
		}
	}
	if strings.Contains(err.Error(), "only@example.com") {
		t.Errorf("the error names an address that does not collide: %v", err)
	}
	if got := indexes(t, db); got != "idx_users_created_at idx_users_email users_email_key users_pkey" {
		t.Errorf("a refused start has changed the indexes: %s", got)
	}

	mustExec(t, db, "UPDATE users SET email = 'ada2@example.com' WHERE email = 'Ada@example.com'")
	s := startService(t, testEnv(databaseURL))
	s.waitReady()
	if n := len(s.call("GET", usersPath, "").users(t)); n != 3 {
		t.Errorf("%d users", n)
	}
}

// runOnce returns what run does, which has to be soon.
func runOnce(t *testing.T, env map[string]string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	err := run(ctx, nil, func(name string) string { return env[name] }, io.Discard, io.Discard)
	if ctx.Err() != nil {
		t.Fatal("run does not return")
	}
	return err
}

func TestRefusedDatabases(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ name, sql, want string }{
		{"somebody else's table", "CREATE TABLE users (id bigint PRIMARY KEY, email varchar(255), login text)",
			`the table "users" of this database is not one of ours: it lacks created_at timestamp with time zone, id uuid, name character varying, updated_at timestamp with time zone`},
		{"somebody else's table, looking like ours", "CREATE TABLE users (id uuid PRIMARY KEY, email varchar(255), name varchar(255), created_at timestamptz, updated_at timestamptz, password_hash text NOT NULL)",
			`the table "users" of this database is not one of ours: it demands password_hash`},
		{"a table without the key", "CREATE TABLE users (id uuid, email varchar(255), name varchar(255), created_at timestamptz, updated_at timestamptz)",
			`the table "users" of this database is not one of ours: it has no PRIMARY KEY (id)`},
		{"a changed migration", "UPDATE rollcall_migrations SET checksum = 'x' WHERE version = 2",
			"migration 2 (an address belongs to one user, letter case ignored) was applied to this database with another text"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			databaseURL, db := newSchema(t)
			if strings.Contains(test.sql, "rollcall_migrations") {
				s := startService(t, testEnv(databaseURL))
				s.waitReady()
			}
			mustExec(t, db, test.sql)
			var refused *schemaError
			if err := runOnce(t, testEnv(databaseURL)); !errors.As(err, &refused) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("run returned %v\nwant %s", err, test.want)
			}
		})
	}
}

func TestNewerDatabase(t *testing.T) {
	t.Parallel()
	first := newService(t)
	mustExec(t, first.db, "INSERT INTO rollcall_migrations (version, title, checksum) VALUES (99, 'x', 'x')")
	var schema string
	if err := first.db.QueryRow("SELECT current_schema()").Scan(&schema); err != nil {
		t.Fatal(err)
	}
	s := startService(t, testEnv(testDatabase(t).url()+" search_path="+schema))
	line := s.waitLog("the database is newer than this program: a newer rollcall has migrated it")
	if line["level"] != "WARN" || line["database_version"] != 99.0 {
		t.Errorf("logged %v", line)
	}
	s.waitReady()
	newUser(s, "a@example.com")
}

func TestParseMigrations(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, schema string
		want         int // migrations; 0: an error
	}{
		{"one", "-- migration 1: x\nSELECT 1;\n", 1},
		{"two, and text before", "-- about\n\n-- migration 1: x\nSELECT 1;\n-- migration 2: y\nSELECT 2;\n", 2},
		{"none", "SELECT 1;", 0},
		{"from 2", "-- migration 2: x\n", 0},
		{"a gap", "-- migration 1: x\n-- migration 3: y\n", 0},
		{"one twice", "-- migration 1: x\n-- migration 1: y\n", 0},
		{"a number without bounds", "-- migration 99999999999999999999: x\n", 0},
		{"our own", schemaSQL, 4},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := parseMigrations(test.schema)
			if len(got) != test.want || (err == nil) != (test.want > 0) {
				t.Errorf("got %d migrations, %v; want %d", len(got), err, test.want)
			}
		})
	}
}

// A released migration is never edited; who adds one adds a line here.
func TestMigrationsAreAsReleased(t *testing.T) {
	t.Parallel()
	migrations, err := parseMigrations(schemaSQL)
	if err != nil {
		t.Fatal(err)
	}
	released := []string{
		"506b90beddca30ddada373c838719c58166c6f1d7d7b13ebfd78dc886ddfa556",
		"51ae22d21b437a26a95fc9d966247b252732a8e0153873809df840e68490b036",
		"05a3c7316ea2fdd4d39de417323470f56e08fa489469ff6818566d814dc1f839",
		"c7a61718a47a79bb317d47c0b58aad6213c6ef63b0dcfe46d8b9d1424d107023",
	}
	for i, m := range migrations {
		if i >= len(released) || m.checksum != released[i] {
			t.Errorf("migration %d has the checksum %s", m.version, m.checksum)
		}
	}
}

// The indexes serve all statements, though they were planned while the table was
// empty, and nobody has analyzed it since.
func TestPlans(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	ctx := t.Context()
	c, err := s.db.Conn(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for text := range s.prepared {
		params := 0
		for strings.Contains(text, fmt.Sprintf("$%d", params+1)) {
			params++
		}
		if _, err := c.ExecContext(ctx, "PREPARE planned AS "+text); err != nil {
			t.Fatal(err)
		}
		rows, err := c.QueryContext(ctx, "EXPLAIN EXECUTE planned(NULL"+strings.Repeat(", NULL", params-1)+")")
		if err != nil {
			t.Fatal(err)
		}
		var lines []string
		for rows.Next() {
			var line string
			if err := rows.Scan(&line); err != nil {
				t.Fatal(err)
			}
			lines = append(lines, line)
		}
		if err := rows.Err(); err != nil {
			t.Fatal(err)
		}
		plan := strings.Join(lines, "\n")
		// Only the first page is read from one end of its index; all else is found.
		scans, found := strings.Count(plan, " on users"), strings.Count(plan, "Index Cond: ")+strings.Count(plan, "TID Cond: ")
		scans -= strings.Count(plan, "Insert on users") + strings.Count(plan, "Update on users") + strings.Count(plan, "Delete on users")
		if text == firstUsers {
			found++
		}
		if strings.Contains(plan, "Seq Scan") || strings.Contains(plan, "Sort") || strings.Contains(plan, "Hash") || scans != found {
			t.Errorf("%s\n%s", text, plan)
		}
		if _, err := c.ExecContext(ctx, "DEALLOCATE planned"); err != nil {
			t.Fatal(err)
		}
	}
}

// Without prepared statements, for a pooler that shares sessions, all is the same.
func TestBinaryParameters(t *testing.T) {
	t.Parallel()
	databaseURL, _ := newSchema(t)
	s := startService(t, testEnv(databaseURL+" binary_parameters=yes"))
	s.waitReady()
	a := newUser(s, "a@example.com")
	newUser(s, "b@example.com")
	path := a.header.Get("Location")
	if got := s.call("GET", path, ""); got.body != a.body {
		t.Errorf("GET: %s", got.body)
	}
	page := s.call("GET", usersPath+"?limit=1", "")
	next, _, _ := strings.Cut(strings.TrimPrefix(page.header.Get("Link"), "<"), ">")
	if rest := s.call("GET", next, "").users(t); len(rest) != 1 || rest[0]["email"] != "a@example.com" {
		t.Errorf("the second page: %v", rest)
	}
	if found := s.call("GET", usersPath+"?email=A@example.com", "").users(t); len(found) != 1 {
		t.Errorf("found %v", found)
	}
	wantError(t, s.call("POST", usersPath, `{"email":"A@example.com","name":"x"}`), 409, "Email already in use")
	put := s.call("PUT", path, `{"name":"x"}`, "If-Match: "+a.header.Get("ETag"))
	put.user(t)
	if stale := s.call("DELETE", path, "", "If-Match: "+a.header.Get("ETag")); stale.status != 412 {
		t.Errorf("DELETE: %d %s", stale.status, stale.body)
	}
	if gone := s.call("DELETE", path, "", "If-Match: "+put.header.Get("ETag")); gone.status != 200 {
		t.Errorf("DELETE: %d %s", gone.status, gone.body)
	}
	var prepared int // in the session that serves next, which is any of the pool
	cfg, err := loadConfig(func(name string) string { return testEnv(databaseURL + " binary_parameters=yes")[name] }, false)
	if err != nil {
		t.Fatal(err)
	}
	direct := openStore(cfg, newLogger(cfg, io.Discard))
	defer direct.close()
	direct.db.SetMaxOpenConns(1)
	if err := direct.start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := direct.get(t.Context(), noSuchID); err != errNotFound {
		t.Fatal(err)
	}
	if err := direct.db.QueryRow("SELECT count(*) FROM pg_prepared_statements").Scan(&prepared); err != nil || prepared != 0 {
		t.Errorf("%d prepared statements, %v", prepared, err)
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
			a := newUser(s, "a@example.com")
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

// numbered returns format with each number from 1 to n.
func numbered(format string, n int) (texts []string) {
	for i := range n {
		texts = append(texts, fmt.Sprintf(format, i+1))
	}
	return texts
}

// wantCalls sends each kind of call, at the time of that name, beside a user who is
// there already. Those that it makes are gone in the end.
func wantCalls(t *testing.T, s *service, name string) {
	t.Helper()
	call := func(method, path, body string, fields ...string) answer {
		t.Helper()
		a := s.call(method, path, body, fields...)
		if a.status != 200 {
			t.Errorf("%s: %s %s: %d %s", name, method, path, a.status, a.body)
		}
		return a
	}
	for i, key := range []string{"", "Idempotency-Key: k"} {
		email := fmt.Sprintf("called%d@example.com", i)
		made := call("POST", usersPath, userJSON(email, "old"), key)
		path := made.header.Get("Location")
		if key != "" {
			if again := call("POST", usersPath, userJSON(email, "old"), key); again.body != made.body {
				t.Errorf("%s: again with the key: %s\nwant %s", name, again.body, made.body)
			}
		}
		if got := call("GET", path, ""); got.body != made.body {
			t.Errorf("%s: GET: %s\nwant %s", name, got.body, made.body)
		}
		if found := call("GET", usersPath+"?email="+email, ""); found.body != "["+made.body+"]" {
			t.Errorf("%s: found %s\nwant %s", name, found.body, made.body)
		}
		page := call("GET", usersPath+"?limit=1", "")
		next, _, _ := strings.Cut(strings.TrimPrefix(page.header.Get("Link"), "<"), ">")
		if rest := call("GET", next, "").users(t); page.body != "["+made.body+"]" || len(rest) != 1 || rest[0]["email"] == email {
			t.Errorf("%s: the list: %s, %v", name, page.body, rest)
		}
		put := call("PUT", path, userJSON("", "new"), "If-Match: "+made.header.Get("ETag"))
		if put.user(t)["name"] != "new" {
			t.Errorf("%s: PUT: %s", name, put.body)
		}
		wantError(t, s.call("PUT", path, userJSON("", "newer"), "If-Match: "+made.header.Get("ETag")), 412, answers[kindPrecondition].message)
		call("DELETE", path, "", "If-Match: "+put.header.Get("ETag"))
		wantError(t, s.call("GET", path, ""), 404, "Resource not found")
	}
}

// The table is changed below the service: nobody who asks sees it, under load or alone.
func TestTableChanges(t *testing.T) {
	t.Parallel()
	const replaced = "BEGIN; ALTER TABLE users RENAME TO old; CREATE TABLE users (LIKE old INCLUDING ALL); " +
		"INSERT INTO users SELECT * FROM old; DROP TABLE old; COMMIT"
	changes := []string{
		"ALTER TABLE users ALTER name TYPE varchar(500)",
		"ALTER TABLE users ALTER email TYPE varchar(500)",
		"ALTER TABLE users ALTER name TYPE text, ALTER email TYPE text",
		"ALTER TABLE users ADD note text, ALTER email TYPE varchar(600)",
		replaced,
		"ALTER TABLE users ALTER email TYPE address", // not what its parameter had been taken for
		"ALTER TABLE users ALTER email TYPE text, ALTER name TYPE varchar(255)",
		strings.Replace(replaced, "INCLUDING ALL);", "INCLUDING ALL); ALTER TABLE users ALTER name TYPE varchar(700);", 1),
	}
	// A type as the extension citext has one, which not every PostgreSQL has.
	const address = "CREATE TYPE address; CREATE FUNCTION address_in(cstring) RETURNS address LANGUAGE internal IMMUTABLE STRICT AS 'textin'; " +
		"CREATE FUNCTION address_out(address) RETURNS cstring LANGUAGE internal IMMUTABLE STRICT AS 'textout'; " +
		"CREATE TYPE address (INPUT = address_in, OUTPUT = address_out, LIKE = text, CATEGORY = 'S'); " +
		"CREATE CAST (address AS text) WITHOUT FUNCTION AS IMPLICIT; CREATE CAST (text AS address) WITHOUT FUNCTION AS ASSIGNMENT; " +
		"CREATE CAST (address AS varchar) WITHOUT FUNCTION AS ASSIGNMENT; CREATE CAST (varchar AS address) WITHOUT FUNCTION AS ASSIGNMENT"
	t.Run("alone", func(t *testing.T) {
		t.Parallel()
		s := newService(t, "DB_MAX_CONNS=1")
		mustExec(t, s.db, address)
		newUser(s, "first@example.com")
		wantCalls(t, s, "as it was")
		for _, change := range append(changes, "ALTER TABLE users ALTER created_at TYPE timestamptz(3), ALTER updated_at TYPE timestamptz(5)") {
			mustExec(t, s.db, change)
			wantCalls(t, s, change)
		}
	})
	t.Run("under load", func(t *testing.T) {
		t.Parallel()
		s := newService(t)
		mustExec(t, s.db, address)
		l := startLoad(t, s.url, chaosConns)
		l.wait(300)
		for _, change := range changes {
			mustExec(t, s.db, change)
			l.wait(300)
		}
		o := l.stop(s.db)
		o.faults = len(changes)
		o.want(t, "table altered, or replaced")
	})
}

// PostgreSQL comes up after the service: it waits, says so, and then serves.
func TestDatabaseNotThereYet(t *testing.T) {
	t.Parallel()
	databaseURL, _ := newSchema(t)
	dir := socketDir(t)
	s := startService(t, testEnv(databaseURL+" host="+dir))
	line := s.waitLog("waiting for PostgreSQL")
	if line["level"] != "WARN" || line["error"] == "" {
		t.Errorf("logged %v", line)
	}
	if a := s.call("GET", "/health", ""); a.status != 200 {
		t.Errorf("GET /health: %d", a.status)
	}
	for _, path := range []string{"/health/ready", usersPath} {
		a := s.call("GET", path, "")
		wantError(t, a, 503, "The service is starting")
		if a.header.Get("Retry-After") == "" {
			t.Errorf("%s: a 503 without Retry-After", path)
		}
	}
	startRelay(t, dir)
	s.waitReady()
	newUser(s, "a@example.com")
}

// A PostgreSQL without TLS refuses it first (sslmode=prefer): each connection of the
// pool is one connection for PostgreSQL all the same.
func TestNoConnectionLeaks(t *testing.T) {
	t.Parallel()
	databaseURL, db := newSchema(t)
	listener, _ := newListener(t)
	var refused, open atomic.Int64
	relayTo(t, listener, func(from, to net.Conn) {
		open.Add(1)
		defer open.Add(-1)
		go func() {
			io.Copy(to, from)
			to.Close()
		}()
		first := make([]byte, 1)
		if _, err := io.ReadFull(to, first); err != nil {
			return
		}
		if first[0] == 'N' { // no TLS (PostgreSQL's manual, section "SSL Session Encryption")
			refused.Add(1)
		}
		from.Write(first)
		io.Copy(from, to)
	})
	_, port, _ := net.SplitHostPort(listener.Addr().String())
	// Without the collector of garbage, which would close in the end what has been forgotten.
	p := startProcess(t, t.TempDir(), testEnv(databaseURL+" sslmode=prefer application_name=leak host=127.0.0.1 port="+port, "DB_MAX_CONNS=1", "GOGC=off"))
	p.waitReady()
	const reconnects = 10
	for range reconnects {
		mustExec(t, db, "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE application_name = 'leak'")
		resp, err := client.Get(p.url + usersPath)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != 200 {
			t.Errorf("GET: %s", resp.Status)
		}
	}
	if n := refused.Load(); n < reconnects {
		t.Errorf("TLS was refused %d times only", n)
	}
	waitFor(t, "the pool's connection to be the only one", func() bool { return open.Load() == 1 })
}

// The connection breaks when PostgreSQL has made the user, and before it could
// say so. The create that is repeated recognizes its own user.
func TestCreateWhoseAnswerIsLost(t *testing.T) {
	t.Parallel()
	s, r := throughRelay(t)
	for i := range 10 {
		r.lose("INSERT 0 1")
		a := newUser(s, fmt.Sprintf("%d@example.com", i))
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
		made := newUser(s, fmt.Sprintf("%d@example.com", i))
		path := made.header.Get("Location")
		r.lose("UPDATE 1")
		renamed := s.call("PUT", path, `{"name":"B"}`, "If-Match: "+made.header.Get("ETag"))
		r.wantLost(t)
		if renamed.user(t)["name"] != "B" {
			t.Errorf("renamed: %s", renamed.body)
		}
		wantError(t, s.call("PUT", path, `{"name":"C"}`, "If-Match: "+made.header.Get("ETag")), 412, answers[kindPrecondition].message)
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

// A connection that died while it was idle leaves nothing open: a delete that
// finds nobody is a 404, for no earlier try was sent.
func TestDeadConnectionsAreNotUsed(t *testing.T) {
	t.Parallel()
	databaseURL, db := newSchema(t)
	s := startService(t, testEnv(databaseURL+" application_name=dead"))
	s.waitReady()
	path := newUser(s, "a@example.com").header.Get("Location")
	s.call("DELETE", path, "")
	for range 10 {
		mustExec(t, db, "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE application_name = 'dead'")
		wantError(t, s.call("DELETE", path, ""), 404, "Resource not found")
	}
}

// PostgreSQL holds the connections and says nothing: the deadline holds all the
// same, and so does that of readiness.
func TestSilentDatabase(t *testing.T) {
	t.Parallel()
	s, r := throughRelay(t, "REQUEST_TIMEOUT=300ms")
	r.away(s)
	silent, err := net.Listen("unix", r.socket()) // accepts, and never says a word
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	// Connecting may take as long as a request: which of the two ends first is chance.
	if a := s.call("GET", usersPath, ""); a.status != 503 || a.header.Get("Retry-After") == "" ||
		a.body != errorBody(503, "The request took too long") && a.body != errorBody(503, "The database is not available") {
		t.Errorf("GET: %d %s", a.status, a.body)
	}
	waitFor(t, "readiness to end", func() bool { return s.call("GET", "/health/ready", "").status != 200 })
	wantError(t, s.call("GET", "/health/ready", ""), 503, "PostgreSQL does not answer")
}

// Statements that take long, on every connection of the pool, are no outage.
func TestReadyWithFullPool(t *testing.T) {
	t.Parallel()
	s := newService(t, "DB_MAX_CONNS=1")
	path := newUser(s, "a@example.com").header.Get("Location")
	tx := begin(t, s.db, "SELECT FROM users FOR UPDATE")
	done := make(chan bool)
	go func() {
		defer close(done)
		s.try("PUT", path, `{"name":"x"}`)
	}()
	start := time.Now()
	waitFor(t, "the last answer to be a second old", func() bool { return time.Since(start) > 1100*time.Millisecond })
	if a := s.call("GET", "/health/ready", ""); a.status != 200 {
		t.Errorf("readiness: %d %s", a.status, a.body)
	}
	tx.Rollback()
	<-done
}

// What waiting does not cure ends the start.
func TestRoleWithoutRights(t *testing.T) {
	t.Parallel()
	databaseURL, db := newSchema(t)
	role := "role_of_" + schemaOf(t, databaseURL)
	mustExec(t, db, "CREATE ROLE "+role+" LOGIN")
	mustExec(t, db, "GRANT USAGE ON SCHEMA "+schemaOf(t, databaseURL)+" TO "+role)
	t.Cleanup(func() { mustExec(t, db, "DROP OWNED BY "+role+"; DROP ROLE "+role) })
	err := runOnce(t, testEnv(databaseURL+" user="+role))
	want := fmt.Sprintf("permission denied for schema %[1]s: as the owner of the schema, run GRANT CREATE ON SCHEMA %[1]s TO %[2]s", schemaOf(t, databaseURL), role)
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("run returned %v\nwant %s", err, want)
	}
}

// Connections that die while they are idle cost nobody an error.
func TestConnectionsDieIdle(t *testing.T) {
	t.Parallel()
	databaseURL, db := newSchema(t)
	s := startService(t, testEnv(databaseURL+" application_name=die_idle"))
	s.waitReady()
	path := newUser(s, "a@example.com").header.Get("Location")
	for i := range 20 {
		mustExec(t, db, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'die_idle'")
		s.call("GET", path, "").user(t)
		mustExec(t, db, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'die_idle'")
		newUser(s, fmt.Sprintf("%d@example.com", i))
	}
}

// Serialization failures are retried where nobody sees them.
func TestSerializationFailures(t *testing.T) {
	t.Parallel()
	databaseURL, _ := newSchema(t)
	s := startService(t, testEnv(databaseURL+" default_transaction_isolation=serializable"))
	s.waitReady()
	path := newUser(s, "a@example.com").header.Get("Location")
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

// A locked row delays its own callers, until their deadline and no longer, and
// what was cancelled then does not happen later.
func TestLockedRow(t *testing.T) {
	t.Parallel()
	s := newService(t, "REQUEST_TIMEOUT=500ms")
	before := newUser(s, "locked@example.com")
	other := newUser(s, "other@example.com")
	tx := begin(t, s.db, "SELECT FROM users WHERE email = 'locked@example.com' FOR UPDATE")
	a := s.call("PUT", before.header.Get("Location"), `{"name":"late"}`)
	wantError(t, a, 503, "The request took too long; the change may have been made all the same")
	if a.header.Get("Retry-After") == "" {
		t.Error("no Retry-After")
	}
	s.call("GET", before.header.Get("Location"), "").user(t)
	s.call("PUT", other.header.Get("Location"), `{"name":"x"}`).user(t)
	if err := tx.Rollback(); err != nil {
		t.Fatal(err)
	}
	if after := s.call("GET", before.header.Get("Location"), ""); after.body != before.body {
		t.Errorf("before %s\nafter  %s", before.body, after.body)
	}
}

// A request that has waited before its statement was sent does not get the time
// of a whole request once more: its statement ends at its own deadline.
func TestStatementEndsAtTheDeadline(t *testing.T) {
	t.Parallel()
	s := newStore(t) // whose statements PostgreSQL ends after 10 s
	u := mustCreate(t, s, "a@example.com")
	mustExec(t, s.db, "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(60); RETURN NEW; END'")
	mustExec(t, s.db, "CREATE TRIGGER slow BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION slow()")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	name := "late"
	var f *failure
	if _, err := s.update(ctx, u.ID, nil, &name, preconditions{}); !errors.As(err, &f) || f.kind != kindTimeout || ctx.Err() == nil {
		t.Errorf("update: %v", err)
	}
	waitFor(t, "the statement to end", func() bool {
		var runs bool
		err := s.db.QueryRow("SELECT EXISTS (SELECT FROM pg_locks WHERE relation = 'users'::regclass AND mode = 'RowExclusiveLock')").Scan(&runs)
		return err == nil && !runs
	})
	if got, err := s.get(t.Context(), u.ID); err != nil || got.Name != "x" {
		t.Errorf("what was given up has been done: %+v, %v", got, err)
	}
}

// PostgreSQL goes away altogether: requests wait for it, and are answered as soon
// as it is back.
func TestDatabaseAway(t *testing.T) {
	t.Parallel()
	s, r := throughRelay(t, "REQUEST_TIMEOUT=60s")
	path := newUser(s, "a@example.com").header.Get("Location")
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

// It stays away for longer than a request may wait: 503 with the reason, and
// /health stays 200.
func TestDatabaseGone(t *testing.T) {
	t.Parallel()
	s, r := throughRelay(t, "REQUEST_TIMEOUT=1s")
	path := newUser(s, "a@example.com").header.Get("Location")
	back := r.away(s)
	wantError(t, s.call("GET", path, ""), 503, "The database is not available")
	wantError(t, s.call("PUT", path, `{"name":"x"}`), 503, "The database is not available") // and nothing was sent
	waitFor(t, "readiness to end", func() bool { return s.call("GET", "/health/ready", "").status == 503 })
	wantError(t, s.call("GET", "/health/ready", ""), 503, "PostgreSQL does not answer")
	if a := s.call("GET", "/health", ""); a.status != 200 || a.body != "OK" {
		t.Errorf("GET /health: %d %q", a.status, a.body)
	}
	back()
	s.call("GET", path, "").user(t)
	waitFor(t, "readiness", func() bool { return s.call("GET", "/health/ready", "").status == 200 })
}

func TestImpatientConn(t *testing.T) {
	t.Parallel()
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	c, err := (&dialer{patience: time.Millisecond}).DialTimeout("tcp", silent.Addr().String(), patience)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) || !isUnavailable(err) {
		t.Errorf("a silent server: %v", err)
	}
}

// A connection that is idle for longer than PostgreSQL may be silent is as good
// as before: whether it has ended is seen by what there is to read, and the
// deadline of the last answer has no say in it.
func TestIsOver(t *testing.T) {
	t.Parallel()
	c, server := connect(t)
	c.SetReadDeadline(time.Unix(1, 0))
	if isOver(newSocket(c)) {
		t.Error("an idle connection is over")
	}
	server.Close()
	waitFor(t, "the end to be seen", func() bool { return isOver(newSocket(c)) })
}

// The answer of a write is lost, and the next server can't tell what became of
// it, as a standby can't: that is no error of the write. It is asked again.
func TestRepeatMeetsAServerThatCannotTell(t *testing.T) {
	t.Parallel()
	s, r := throughRelay(t)
	made := newUser(s, "a@example.com")
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

const (
	conflicts  = "The change conflicts with other data in the database"
	breaksRule = "The change breaks a rule of the database"
	notMade    = "The database did not make this change"
)

// ruleTrigger is a trigger name_rule on users that does body with a row named bad.
func ruleTrigger(kind, when, row, body string) string {
	return fmt.Sprintf(`CREATE FUNCTION name_rule() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN IF %[3]s.name = 'bad' THEN %[4]s; END IF; RETURN %[3]s; END $$;
		CREATE %[1]s TRIGGER name_rule %[2]s FOR EACH ROW EXECUTE FUNCTION name_rule()`, kind, when, row, body)
}

// Others have added a rule to the table that a name breaks. Who breaks it is told so,
// whoever shares the statement, and the log has the name of the rule.
func TestRulesOfOthers(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, sql, logged string
		status            int
		message           string
	}{
		{"unique index", "CREATE UNIQUE INDEX name_rule ON users (name)", "name_rule", 409, conflicts},
		{"deferred unique constraint", "ALTER TABLE users ADD CONSTRAINT name_rule UNIQUE (name) DEFERRABLE INITIALLY DEFERRED", "name_rule", 409, conflicts},
		{"exclusion", "ALTER TABLE users ADD CONSTRAINT name_rule EXCLUDE USING btree (name WITH =)", "name_rule", 409, conflicts},
		{"foreign key", `CREATE TABLE names (name varchar PRIMARY KEY); INSERT INTO names SELECT n FROM generate_series(10, 99) n;
			ALTER TABLE users ADD CONSTRAINT name_rule FOREIGN KEY (name) REFERENCES names NOT VALID`, "name_rule", 409, conflicts},
		{"check", "ALTER TABLE users ADD CONSTRAINT name_rule CHECK (name <> 'bad') NOT VALID", "name_rule", 422, breaksRule},
		{"not null", "UPDATE users SET name = 'x'; ALTER TABLE users ADD name_rule text GENERATED ALWAYS AS (NULLIF(name, 'bad')) STORED NOT NULL", "name_rule", 422, breaksRule},
		{"a shorter type", "ALTER TABLE users ALTER name TYPE varchar(2) USING 'x'", "character varying(2)", 422, breaksRule},
		{"a trigger that fails to compute", ruleTrigger("", "BEFORE INSERT OR UPDATE ON users", "NEW", "PERFORM 1 / 0"), "division by zero", 422, breaksRule},
		{"a trigger that raises", ruleTrigger("", "BEFORE INSERT OR UPDATE ON users", "NEW", "RAISE EXCEPTION 'the name_rule'"), "the name_rule", 422, breaksRule},
		{"a deferred trigger that raises", ruleTrigger("CONSTRAINT", "AFTER INSERT OR UPDATE ON users DEFERRABLE INITIALLY DEFERRED", "NEW", "RAISE EXCEPTION 'the name_rule'"), "the name_rule", 422, breaksRule},
		{"a trigger that skips", ruleTrigger("", "BEFORE INSERT OR UPDATE ON users", "NEW", "RETURN NULL"), "a trigger on the table has skipped the row", 422, notMade},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := newService(t)
			before := s.call("POST", usersPath, `{"email":"before@example.com","name":"bad"}`, withKey("before")).user(t)
			mustExec(t, s.db, test.sql)
			refuse := func(a answer) {
				t.Helper()
				if a.status != test.status || a.body != errorBody(test.status, test.message) {
					t.Errorf("got %d %s", a.status, a.body)
				}
			}
			refuse(s.call("POST", usersPath, `{"email":"a@example.com","name":"bad"}`))
			var logged bool
			for _, line := range s.logged() {
				text, _ := line["error"].(string)
				logged = logged || line["status"] == float64(test.status) && strings.Contains(text, test.logged)
			}
			if !logged {
				t.Errorf("the log does not say %q:\n%s", test.logged, s.log)
			}
			// What the key has made is there, rule or not; a key that was refused is unused.
			if again := s.call("POST", usersPath, `{"email":"before@example.com","name":"bad"}`, withKey("before")).user(t); again["id"] != before["id"] {
				t.Errorf("repeated: %v", again)
			}
			refuse(s.call("POST", usersPath, `{"email":"a@example.com","name":"bad"}`, withKey("k")))
			s.call("POST", usersPath, `{"email":"a@example.com","name":"10"}`, withKey("k")).user(t)
			wantError(t, s.call("POST", usersPath, `{"email":"A@example.com","name":"11"}`), 409, taken)

			one := s.call("POST", usersPath, `{"email":"one@example.com","name":"12"}`)
			path, tag := one.header.Get("Location"), one.header.Get("ETag")
			refuse(s.call("PUT", path, `{"name":"bad"}`))
			refuse(s.call("PUT", path, `{"name":"bad"}`, "If-Match: "+tag))
			wantError(t, s.call("PUT", path, `{"name":"bad"}`, `If-Match: "1"`), 412, answers[kindPrecondition].message)
			wantError(t, s.call("PUT", usersPath+"/"+noSuchID, `{"name":"bad"}`), 404, missing)
			if got := s.call("GET", path, ""); got.body != one.body {
				t.Errorf("refused, and yet now %s", got.body)
			}

			var wg sync.WaitGroup // many in a statement: each has its own answer
			for i := range 80 {
				wg.Go(func() {
					good, address := fmt.Sprint(20+i%80), fmt.Sprintf("%d@example.com", i)
					switch i % 4 {
					case 0:
						made := s.call("POST", usersPath, `{"email":"`+address+`","name":"`+good+`"}`)
						made.user(t)
						refuse(s.call("PUT", made.header.Get("Location"), `{"name":"bad"}`))
						s.call("PUT", made.header.Get("Location"), `{"email":"new`+address+`"}`).user(t)
					case 1:
						refuse(s.call("POST", usersPath, `{"email":"`+address+`","name":"bad"}`))
					case 2:
						refuse(s.call("POST", usersPath, `{"email":"`+address+`","name":"bad"}`, withKey(address)))
					case 3:
						wantError(t, s.call("POST", usersPath, `{"email":"One@example.com","name":"`+good+`"}`), 409, taken)
					}
				})
			}
			wg.Wait()
			if n := count(t, s.db, "SELECT count(*) FROM users"); n != 3+20 {
				t.Errorf("%d users", n)
			}
		})
	}
}

// The same for what others keep from being deleted.
func TestRulesOfOthersOnDelete(t *testing.T) {
	t.Parallel()
	const orders = "CREATE TABLE orders (id uuid CONSTRAINT name_rule REFERENCES users %s); INSERT INTO orders SELECT id FROM users WHERE name = 'bad'"
	for _, test := range []struct {
		name, sql string
		status    int
		message   string
	}{
		{"foreign key", fmt.Sprintf(orders, ""), 409, conflicts},
		{"restricting foreign key", fmt.Sprintf(orders, "ON DELETE RESTRICT"), 409, conflicts},
		{"deferred foreign key", fmt.Sprintf(orders, "DEFERRABLE INITIALLY DEFERRED"), 409, conflicts},
		{"a trigger that raises", ruleTrigger("", "BEFORE DELETE ON users", "OLD", "RAISE EXCEPTION 'no'"), 422, breaksRule},
		{"a trigger that skips", ruleTrigger("", "BEFORE DELETE ON users", "OLD", "RETURN NULL"), 422, notMade},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := newService(t)
			mustExec(t, s.db, `INSERT INTO users (id, email, name) SELECT ('00000000-0000-4000-8000-0000000000' || i)::uuid, i || '@example.com',
				CASE WHEN i % 2 = 0 THEN 'bad' ELSE 'good' END FROM generate_series(10, 89) i`)
			mustExec(t, s.db, test.sql)
			path := func(i int) string { return fmt.Sprintf("%s/00000000-0000-4000-8000-0000000000%d", usersPath, i) }
			wantError(t, s.call("DELETE", path(10), ""), test.status, test.message)
			wantError(t, s.call("DELETE", path(10), "", "If-Match: "+s.call("GET", path(10), "").header.Get("ETag")), test.status, test.message)
			wantError(t, s.call("DELETE", path(10), "", `If-Match: "1"`), 412, answers[kindPrecondition].message)
			wantError(t, s.call("DELETE", path(90), ""), 404, missing)
			var wg sync.WaitGroup
			for i := 10; i < 90; i++ {
				wg.Go(func() {
					a := s.call("DELETE", path(i), "")
					if i%2 != 0 && a.status != 200 || i%2 == 0 && a.body != errorBody(test.status, test.message) {
						t.Errorf("DELETE %d: %d %s", i, a.status, a.body)
					}
				})
			}
			wg.Wait()
			if n := count(t, s.db, "SELECT count(*) FROM users WHERE name = 'bad'"); n != 40 || count(t, s.db, "SELECT count(*) FROM users") != 40 {
				t.Errorf("%d users are left, want 40", n)
			}
		})
	}
}
