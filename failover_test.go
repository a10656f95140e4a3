package main

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// Two PostgreSQL, of which the second takes over when the first fails: reached
// by their addresses, through HAProxy, and one of them through PgBouncer. The
// configurations are those of README.md, word for word.

// A node is a PostgreSQL that listens on 127.0.0.1.
type node struct {
	*privatePostgres
	t    *testing.T
	port string
	db   *sql.DB // for the test itself
}

// newNode makes the folder of a node, still without data. It is gone with the test.
func newNode(t *testing.T, port string) *node {
	t.Helper()
	n := &node{t: t, port: port, privatePostgres: &privatePostgres{dir: t.TempDir()}}
	t.Cleanup(func() {
		if n.db != nil {
			n.db.Close()
		}
		n.stop() // how it ends is no matter: the data goes too
	})
	err := n.lockFolder(t.Context())
	if err == nil {
		err = n.choosePrograms(t.Context())
	}
	if err == nil {
		err = n.chooseAccount(t.Context())
	}
	if err == nil { // where one of them is a link, as a link to it alone, the others are beside what it leads to
		n.programs, err = filepath.EvalSymlinks(filepath.Join(n.programs, "initdb"))
		n.programs = filepath.Dir(n.programs)
	}
	if err == nil {
		n.db, err = sql.Open("postgres", "postgres://rollcall:secret@127.0.0.1:"+port+"/rollcall?sslmode=disable&application_name=test")
	}
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// newPrimary starts a node with an empty database.
func newPrimary(t *testing.T) *node {
	t.Helper()
	n := newNode(t, freePort(t))
	if err := copyCluster(n.dir); err != nil {
		t.Fatal(err)
	}
	n.serve()
	admin, err := sql.Open("postgres", "postgres://rollcall@127.0.0.1:"+n.port+"/postgres?sslmode=disable")
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close()
	waitFor(t, "PostgreSQL", func() bool { return admin.Ping() == nil })
	mustExec(t, admin, "CREATE DATABASE rollcall")
	mustExec(t, admin, "CREATE ROLE haproxy LOGIN")
	mustExec(t, admin, "ALTER ROLE rollcall PASSWORD 'secret'")
	access := readmeBlock(t, "# pg_hba.conf", "10.0.0.3/32", "127.0.0.1/32", "10.0.0.0/24", "127.0.0.1/32") +
		"host replication rollcall 127.0.0.1/32 scram-sha-256\n"
	if err := os.WriteFile(n.path("data/pg_hba.conf"), []byte(access), 0o600); err != nil {
		t.Fatal(err)
	}
	mustExec(t, admin, "SELECT pg_reload_conf()")
	return n
}

// serve starts the server, and does not wait until it answers.
func (n *node) serve() {
	n.t.Helper()
	n.settings = []string{"listen_addresses=127.0.0.1", "port=" + n.port, "unix_socket_directories=", "max_connections=200",
		"wal_retrieve_retry_interval=500ms", // as README.md has it: a standby that waits for more is promoted after that
		"fsync=off",                         // kill -9 takes nothing back from the kernel
		"dynamic_shared_memory_type=mmap"}   // in the folder, to go with it
	if err := n.startServer(n.t.Context()); err != nil {
		n.t.Fatal(err)
	}
}

// replicate starts a standby of n on that port, and makes it synchronous: a
// commit is acknowledged when it is on both. The setting is n's alone, so that
// a standby that is promoted does not wait for a standby of its own.
func (n *node) replicate(port string) *node {
	n.t.Helper()
	standby := newNode(n.t, port)
	standby.runProgram("pg_basebackup", "-d", "postgres://rollcall:secret@127.0.0.1:"+n.port, "-D", standby.path("data"),
		"-R", "-c", "fast", "--no-sync")
	standby.serve()
	n.waitTrue("SELECT count(*) = 1 FROM pg_stat_replication WHERE state = 'streaming'")
	mustExec(n.t, n.db, "ALTER SYSTEM SET synchronous_standby_names = '*'")
	mustExec(n.t, n.db, "SELECT pg_reload_conf()")
	n.waitTrue("SELECT sync_state = 'sync' FROM pg_stat_replication")
	standby.waitTrue("SELECT pg_is_in_recovery()")
	return standby
}

// promote makes a standby the primary, and returns when it is.
func (n *node) promote() {
	n.t.Helper()
	n.runProgram("pg_ctl", "promote", "-D", n.path("data"))
}

// runProgram runs one of PostgreSQL's programs to its end.
func (n *node) runProgram(program string, args ...string) {
	n.t.Helper()
	if err := n.run(n.t.Context(), program, args...); err != nil {
		n.t.Fatal(err)
	}
}

// waitTrue waits until the node answers a question with true.
func (n *node) waitTrue(query string) {
	n.t.Helper()
	waitFor(n.t, query, func() (yes bool) { return n.db.QueryRow(query).Scan(&yes) == nil && yes })
}

// kill kills all processes of the server at once, for good.
func (n *node) kill() {
	n.t.Helper()
	killDatabase(n.t, n.privatePostgres)
	// The kernel keeps the memory by which a next server would see that this one
	// still runs. It is not to be kept for ever: its number is the last on the
	// seventh line.
	b, err := os.ReadFile(n.path("data/postmaster.pid"))
	if err != nil {
		n.t.Fatal(err)
	}
	if lines := strings.Split(string(b), "\n"); len(lines) > 6 {
		if fields := strings.Fields(lines[6]); len(fields) == 2 {
			exec.Command("ipcrm", "-m", fields[1]).Run() // without it, 56 bytes are lost
		}
	}
}

// freePort returns a port of 127.0.0.1 that nobody listens on. It is below those
// that clients are given as their own (from 32768 on; ip(7)): what is restarted
// finds it free.
func freePort(t testing.TB) string {
	t.Helper()
	for {
		port := strconv.Itoa(10000 + rand.IntN(22000))
		listener, err := net.Listen("tcp", "127.0.0.1:"+port)
		if err == nil {
			listener.Close()
			return port
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			t.Fatal(err)
		}
	}
}

// readmeBlock returns the line of docs/operations.md that begins with this text, and
// what follows it up to the end of its indented block, without the indentation. Of
// replacements, each text and what to write instead, all have to be in there.
func readmeBlock(t testing.TB, first string, replacements ...string) string {
	t.Helper()
	page, err := os.ReadFile("docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(page), "\n    "+first)
	if !found {
		t.Fatalf("docs/operations.md has no block with a line that begins with %s", first)
	}
	var block strings.Builder
	for line := range strings.Lines("    " + first + rest) {
		text, indented := strings.CutPrefix(line, "    ")
		if !indented && strings.TrimSpace(line) != "" {
			break
		}
		block.WriteString(strings.TrimSpace(text) + "\n")
	}
	for i := 0; i < len(replacements); i += 2 {
		if !strings.Contains(block.String(), replacements[i]) {
			t.Fatalf("docs/operations.md: no %s in\n%s", replacements[i], block.String())
		}
	}
	return strings.NewReplacer(replacements...).Replace(block.String())
}

// findProxy returns the path of a program of Debian's whose package has its
// name, and skips the test without it.
func findProxy(t *testing.T, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil { // Debian has them where not every user's PATH leads
		path, err = exec.LookPath("/usr/sbin/" + program)
	}
	if err != nil {
		notInstalled(t, program, program)
	}
	return path
}

// startProxy runs the program at path with this configuration, as the user that
// PostgreSQL runs as, until the test ends; and returns when it listens on that
// port.
func startProxy(t *testing.T, n *node, port, path, configuration string, args ...string) {
	t.Helper()
	program := filepath.Base(path)
	file := n.path(program + ".conf")
	if err := os.WriteFile(file, []byte(configuration), 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(n.path(program + ".log"))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(n.chown(file), n.chown(log.Name())); err != nil {
		t.Fatal(err)
	}
	proxy := privatePostgres{account: n.account, programs: filepath.Dir(path), log: log}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- proxy.run(ctx, program, append(args, file)...) }()
	t.Cleanup(func() {
		stop()
		<-ended // with an error: it was interrupted
		log.Close()
		if content, _ := os.ReadFile(log.Name()); t.Failed() {
			t.Logf("%s:\n%s", program, content[max(0, len(content)-8<<10):])
		}
	})
	waitFor(t, program+" to listen", func() bool {
		c, err := net.Dial("tcp", "127.0.0.1:"+port)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

// databaseURLOf returns the DATABASE_URL of README.md for that host.
func databaseURLOf(t testing.TB, host string, replacements ...string) string {
	t.Helper()
	name := "DATABASE_URL="
	line, _, _ := strings.Cut(readmeBlock(t, name+"postgres://rollcall:secret@"+host, replacements...), "\n")
	return strings.TrimPrefix(line, name)
}

// startFailover starts a service and the load on it, and returns how many
// answers to wait for between two faults. The full form is with the defaults.
func startFailover(t *testing.T, databaseURL string) (l *load, calls int) {
	t.Helper()
	env := testEnv(databaseURL)
	calls = 3000
	if os.Getenv("ROLLCALL_CHAOS") == "" { // beside other tests
		env["REQUEST_TIMEOUT"] = "30s"
		calls = 500
	}
	s := startService(t, env)
	s.waitReady()
	return startLoad(t, s.url, chaosConns), calls
}

// onlyLinux skips a test where killDatabase does not find the processes.
func onlyLinux(t *testing.T) {
	t.Helper()
	if runtime.GOOS != "linux" {
		t.Skip("finds the processes of PostgreSQL in /proc, which only Linux has")
	}
}

// failOver kills the primary and promotes the standby, in each round, under that
// load, with so many calls before and after; and checks what came of it.
func failOver(t *testing.T, name string, rounds int, primary, standby *node, l *load, calls int) {
	t.Helper()
	for round := range rounds {
		if round > 0 {
			standby = primary.replicate(standby.port)
		}
		l.wait(calls)
		primary.kill()
		standby.promote()
		primary, standby = standby, primary
		l.wait(calls)
	}
	o := l.stop(primary.db)
	o.faults = rounds
	o.want(t, name)
}

// Where nobody writes, reads leave a primary that became read-only all the same.
func TestChaosReadOnlyUnnoticed(t *testing.T) {
	if !fullChaos() {
		t.Skip("takes half a minute: only with ROLLCALL_CHAOS set")
	}
	primary := newPrimary(t)
	standby := primary.replicate(freePort(t))
	s := startService(t, testEnv(databaseURLOf(t, "10.0.0.1",
		"10.0.0.1", "127.0.0.1:"+primary.port, "10.0.0.2", "127.0.0.1:"+standby.port)))
	s.waitReady()
	path := createUser(s, "a@example.com").header.Get("Location")
	primary.demote(standby)
	standby.promote()
	mustExec(t, standby.db, "UPDATE users SET name = 'new'")
	waitFor(t, "the answer of the new primary", func() bool {
		return s.call("GET", path, "").user(t)["name"] == "new"
	})
}

// demote makes a primary read-only, and returns when the standby has all that
// was ever written to it.
func (n *node) demote(standby *node) {
	n.t.Helper()
	mustExec(n.t, n.db, "ALTER SYSTEM SET default_transaction_read_only = on")
	mustExec(n.t, n.db, "SELECT pg_reload_conf()")
	// A new session that has the setting shows that all others have been told. What
	// they have begun before, they may still write.
	n.db.SetMaxIdleConns(0)
	waitFor(n.t, "the primary to be read-only", func() bool {
		var writes int
		var readOnly string
		err := errors.Join(n.db.QueryRow("SHOW default_transaction_read_only").Scan(&readOnly),
			n.db.QueryRow("SELECT count(*) FROM pg_stat_activity WHERE backend_xid IS NOT NULL").Scan(&writes))
		return err == nil && readOnly == "on" && writes == 0
	})
	var position string
	if err := n.db.QueryRow("SELECT pg_current_wal_lsn()").Scan(&position); err != nil {
		n.t.Fatal(err)
	}
	standby.waitTrue("SELECT pg_last_wal_replay_lsn() >= '" + position + "'::pg_lsn")
}

// startHAProxy starts HAProxy in front of two nodes, and returns its port.
func startHAProxy(t *testing.T, primary, standby *node) (port string) {
	t.Helper()
	port = freePort(t)
	startProxy(t, primary, port, findProxy(t, "haproxy"), readmeBlock(t, "# haproxy.cfg",
		"10.0.0.1:5432", "127.0.0.1:"+primary.port, "10.0.0.2:5432", "127.0.0.1:"+standby.port,
		"127.0.0.1:5433", "127.0.0.1:"+port), "-db", "-f")
	return port
}

// startPgBouncer starts PgBouncer with further settings, which connects to serverPort,
// and returns its port. Its files are in the folder of n.
func startPgBouncer(t *testing.T, n *node, serverPort string, settings ...string) (port string) {
	t.Helper()
	port = freePort(t)
	users := n.path("userlist.txt")
	if err := os.WriteFile(users, []byte(`"rollcall" "secret"`+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := n.chown(users); err != nil {
		t.Fatal(err)
	}
	startProxy(t, n, port, findProxy(t, "pgbouncer"), readmeBlock(t, "; pgbouncer.ini",
		"host=10.0.0.1 port=5432", "host=127.0.0.1 port="+serverPort, "listen_port = 6432", "listen_port = "+port,
		"/etc/pgbouncer/userlist.txt", users)+strings.Join(settings, "\n"))
	return port
}

// The service starts on a standby, as HAProxy or a name may lead it there: it waits
// for one that can be written to.
func TestStartOnStandby(t *testing.T) {
	t.Parallel()
	primary := newPrimary(t)
	standby := primary.replicate(freePort(t))
	s := startService(t, testEnv("postgres://rollcall:secret@127.0.0.1:"+standby.port+"/rollcall?sslmode=disable"))
	if line := s.waitLog("waiting for PostgreSQL"); !strings.Contains(fmt.Sprint(line["error"]), "recovery") {
		t.Errorf("it waits for another reason: %v", line)
	}
	standby.promote()
	s.waitReady()
}

// killDatabase kills all processes of a PostgreSQL at once, and returns when its
// first one has ended. Each of them leads a process group of its own, so a signal
// to the group of the first would leave the others time to finish and to answer.
func killDatabase(t *testing.T, d *privatePostgres) {
	t.Helper()
	first := serverPid(t, d)
	if err := syscall.Kill(first, syscall.SIGSTOP); err != nil { // so that it starts no more of them
		t.Fatal(err)
	}
	waitFor(t, "PostgreSQL to stand still", func() bool {
		state, _ := processStat(first)
		return state == "T"
	})
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	pids := []int{first}
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			if _, parent := processStat(pid); parent == first {
				pids = append(pids, pid)
			}
		}
	}
	if len(pids) < 5 { // the checkpointer, the writers, and those who serve
		t.Fatalf("PostgreSQL has %d processes only", len(pids))
	}
	for _, pid := range pids {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Fatal(err)
		}
	}
	<-d.done
}

// processStat returns the state of a process and the pid of its parent, or
// nothing of one that is gone: fields 3 and 4 of /proc/pid/stat (proc(5)).
func processStat(pid int) (state string, parent int) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", 0
	}
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:])) // a program's name may have anything in it
	parent, _ = strconv.Atoi(fields[1])
	return fields[0], parent
}

// Nobody has said that there is a pooler (binary_parameters=yes): it is noticed at the
// start, in both builds. What happens when it comes later, TestPoolerUnannounced tells.
func TestPooler(t *testing.T) {
	findProxy(t, "pgbouncer")
	t.Parallel()
	server := newPrimary(t)
	pooler := startPgBouncer(t, server, server.port, "default_pool_size = 3")
	s := startService(t, testEnv("postgres://rollcall:secret@127.0.0.1:"+pooler+"/rollcall?sslmode=disable", "REQUEST_TIMEOUT=30s"))
	s.waitReady()
	l := startLoad(t, s.url, chaosConns)
	l.wait(1000)
	o := l.stop(server.db)
	o.faults = 1
	o.want(t, "PgBouncer, unannounced, from the start")
	if warned := strings.Count(s.log.String(), "binary_parameters=yes"); warned != 1 {
		t.Errorf("warned of the pooler %d times", warned)
	}
}
