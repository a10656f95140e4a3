package main

import (
	"context"
	"database/sql"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// Callers who mean harm: they are slow on purpose, say what no client would, or
// say it far too often. What is measured here is printed, not asserted: the
// machine may have other things to do. With ROLLCALL_CHAOS set (make chaos) the
// tests take longer and larger numbers, and bring in slowhttptest.

func fullChaos() bool { return os.Getenv("ROLLCALL_CHAOS") != "" }

// countFiles returns the number of a process's file descriptors, 0 where there
// is no /proc.
func countFiles(pid int) int {
	files, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	return len(files)
}

// residentMB returns the memory of a process that is in RAM, in MB; 0 where
// there is no /proc.
func residentMB(pid int) int {
	var size, resident int
	if text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid)); err == nil {
		fmt.Sscan(string(text), &size, &resident)
	}
	return resident * os.Getpagesize() >> 20
}

// returnsToNormal takes stock, and returns a function that waits until there
// are no more goroutines and file descriptors than then. A test that uses it
// must not run beside others.
func returnsToNormal(t testing.TB, poolConns int) (wait func()) {
	closed := filesReturn(t, os.Getpid(), poolConns)
	goroutines := runtime.NumGoroutine()
	return func() {
		t.Helper()
		closed()
		waitFor(t, "the goroutines to end", func() bool { return runtime.NumGoroutine() <= goroutines })
	}
}

// filesReturn takes stock, and returns a function that waits until a process has
// no more file descriptors than then.
func filesReturn(t testing.TB, pid, poolConns int) (wait func()) {
	client.CloseIdleConnections()
	files := countFiles(pid)
	return func() {
		t.Helper()
		client.CloseIdleConnections()
		// Connections to PostgreSQL that were opened meanwhile are kept: those of the
		// pool, the one for readiness, and the test's own.
		waitFor(t, "the file descriptors to be closed", func() bool { return countFiles(pid) <= files+poolConns+2 })
	}
}

// A steadyLoad is good clients who ask for one thing, again and again.
type steadyLoad struct {
	answers, others atomic.Int64 // with 200; with anything else
	worst           atomic.Int64 // the longest wait for an answer, in nanoseconds
	other           atomic.Value // one of the others, a string
	quit            chan struct{}
	ended           sync.Once
	running         sync.WaitGroup
}

// startSteadyLoad begins the load of so many clients. A request that gets no answer
// at all is tried so often before it has failed.
func startSteadyLoad(s *service, clients, tries int, path string, fields ...string) *steadyLoad {
	l := &steadyLoad{quit: make(chan struct{})}
	s.t.Cleanup(l.end) // of a test that has failed halfway
	for range clients {
		l.running.Go(func() {
			for {
				select {
				case <-l.quit:
					return
				default:
				}
				begun := time.Now()
				a, err := s.try("GET", path, "", fields...)
				for try := 1; err != nil && try < tries; try++ {
					a, err = s.try("GET", path, "", fields...)
				}
				raise(&l.worst, int64(time.Since(begun)))
				if err == nil && a.status == 200 {
					l.answers.Add(1)
				} else {
					l.others.Add(1)
					l.other.Store(fmt.Sprint(a.status, " ", a.body, " ", err))
				}
			}
		})
	}
	return l
}

// raise makes a value the larger one of itself and another.
func raise(value *atomic.Int64, to int64) {
	for is := value.Load(); to > is && !value.CompareAndSwap(is, to); is = value.Load() {
	}
}

// rate returns the answers a second over the next so many answers.
func (l *steadyLoad) rate(t testing.TB, answers int64) float64 {
	t.Helper()
	start, from := time.Now(), l.answers.Load()
	waitFor(t, fmt.Sprintf("%d answers", answers), func() bool { return l.answers.Load() >= from+answers })
	return float64(l.answers.Load()-from) / time.Since(start).Seconds()
}

func (l *steadyLoad) end() {
	l.ended.Do(func() { close(l.quit) })
	l.running.Wait()
}

// stop ends the load, of which nothing may have failed.
func (l *steadyLoad) stop(t testing.TB) {
	t.Helper()
	if o := l.outcome(1); o.failed > 0 {
		t.Errorf("%d of %d requests failed, such as %v", o.failed, o.requests, o.details)
	}
}

// outcome ends the load, and returns what has become of it under so many faults.
func (l *steadyLoad) outcome(faults int) outcome {
	l.end()
	failed := int(l.others.Load())
	o := outcome{faults: faults, requests: int(l.answers.Load()) + failed, failed: failed, worst: time.Duration(l.worst.Load())}
	if failed > 0 {
		o.details = []string{"failed: " + l.other.Load().(string)}
	}
	return o
}

const head = "POST /api/v1/users HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"

// longList makes the first page of 1000 users over 1 MB long: more than the
// kernel takes off the service's hands for one who does not read.
func longList(t testing.TB, s *service) {
	t.Helper()
	mustExec(t, s.db, `INSERT INTO users (id, email, name)
		SELECT gen_random_uuid(), 'user' || n || '@example.com', repeat('€', 255) FROM generate_series(1, 1000) n`)
}

// attackSlowly opens connections that are each slow in one of four ways, and
// returns a function that closes them. Those who read no answer have a place until
// theirs is made, so that a crowd of them at once would be a flood of work: each
// waits for the first byte, behind which it is slow and nothing else.
func attackSlowly(t testing.TB, s *service, conns int) (end func()) {
	t.Helper()
	attacks := []string{
		"GET /api/v1/users HTTP/1.1\r\nHost: x\r\nX-Slow: ", // and no more
		head + "Content-Length: 100\r\n\r\n{\"email\":",
		head + "Transfer-Encoding: chunked\r\n\r\n64\r\n{\"email\":",
		strings.Repeat("GET /api/v1/users?limit=1000 HTTP/1.1\r\nHost: x\r\n\r\n", 8), // and reads no more than a byte
	}
	smallWindow := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
		return raw.Control(func(fd uintptr) { syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4096) })
	}}
	var opened []net.Conn
	for i := range conns {
		conn, err := smallWindow.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		opened = append(opened, conn)
		attack := attacks[i%len(attacks)]
		if _, err := io.WriteString(conn, attack); err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(attack, "\r\n\r\n") { // it has asked for something
			conn.SetReadDeadline(time.Now().Add(patience))
			if _, err := conn.Read(make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
		}
	}
	return func() {
		for _, conn := range opened {
			conn.Close()
		}
	}
}

// Slow callers, far more than there are places in flight, lock nobody out, and
// leave nothing behind.
func TestChaosSlowClients(t *testing.T) {
	const places, poolConns = 8, 2
	s := newService(t, "REQUEST_TIMEOUT=1h", fmt.Sprintf("MAX_IN_FLIGHT=%d", places), fmt.Sprintf("DB_MAX_CONNS=%d", poolConns))
	longList(t, s)
	path := usersPath + "/" + s.call("GET", usersPath+"?limit=1", "").users(t)[0]["id"]
	normal := returnsToNormal(t, poolConns)
	conns, answers := 80, int64(200)
	if fullChaos() {
		conns, answers = 1000, 20_000
	}
	before := startSteadyLoad(s, places/2, 1, path)
	rate := before.rate(t, answers)
	before.stop(t)

	end := attackSlowly(t, s, conns)
	defer end()
	during := startSteadyLoad(s, places/4, 1, path)
	slowed := during.rate(t, answers)
	for _, path := range []string{"/health", "/health/ready"} {
		if a := s.call("GET", path, ""); a.status != 200 {
			t.Errorf("%s: %d %s", path, a.status, a.body)
		}
	}
	o := during.outcome(conns)
	memory := residentMB(os.Getpid())
	end()
	t.Logf("%d slow connections on %d places: %.0f answers/s before, %.0f during, %d MB resident", conns, places, rate, slowed, memory)
	o.want(t, "slow connections, of four kinds")
	normal()
}

// slowhttptest's three modes, while good clients go on.
func TestChaosSlowHTTPTest(t *testing.T) {
	if !fullChaos() {
		t.Skip("takes a minute: only with ROLLCALL_CHAOS set")
	}
	for program, pkg := range map[string]string{"slowhttptest": "slowhttptest", "stdbuf": "coreutils", "taskset": "util-linux"} {
		if _, err := exec.LookPath(program); err != nil {
			notInstalled(t, program, pkg)
		}
	}
	const good, conns, answers = 50, 1000, 25_000
	status := regexp.MustCompile(`(connected|error|closed):\s*\x1b\[[\d;]*m\s*(\d+)`) // in colours
	for _, mode := range []struct{ name, args string }{
		{"slow headers", "-H -r 250 -i 2"},
		{"slow bodies", "-B -r 250 -i 2 -s 8192 -t POST -f application/json"},
		// Each asks for one page of 1 MB, which has to be made: at a rate that leaves
		// the service time for others, lest it be refusals of work that are measured.
		{"slow readers", "-X -r 50 -k 1 -w 512 -y 1024 -n 2 -z 32"},
	} {
		t.Run(mode.name, func(t *testing.T) {
			const poolConns = 4
			s := newService(t, "MAX_IN_FLIGHT=128", fmt.Sprintf("DB_MAX_CONNS=%d", poolConns))
			longList(t, s)
			path := usersPath + "/" + s.call("GET", usersPath+"?limit=1", "").users(t)[0]["id"]
			normal := returnsToNormal(t, poolConns)
			attacker := ownProcessor(t, s.db)
			l := startSteadyLoad(s, good, 1, path)
			cost := func() (rate float64, each time.Duration) { // the processor time of an answer, client and all
				from, used := l.answers.Load(), processorTime()
				rate = l.rate(t, answers)
				return rate, (processorTime() - used) / time.Duration(l.answers.Load()-from)
			}
			before, eachBefore := cost()

			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			args := fmt.Sprintf("%s -c %d -l 90 -p 3 -u %s/api/v1/users?limit=1000", mode.args, conns, s.url)
			attack := exec.CommandContext(ctx, "taskset", slices.Concat([]string{"-c", attacker, "stdbuf", "-oL", "slowhttptest"}, strings.Fields(args))...)
			attack.Dir = t.TempDir() // it writes files
			output := new(syncBuffer)
			attack.Stdout = output
			files := countFiles(os.Getpid())
			if err := attack.Start(); err != nil {
				t.Fatal(err)
			}
			for _, want := range []int{conns / 2, conns} {
				waitFor(t, fmt.Sprintf("%d connections to have been opened", want), func() bool {
					text := output.String() // a status every 5 s
					text = text[max(0, strings.LastIndex(text, "initializing:")):]
					opened := 0
					for _, match := range status.FindAllStringSubmatch(text, -1) {
						n, _ := strconv.Atoi(match[2])
						opened += n
					}
					return opened >= want
				})
			}
			most := countFiles(os.Getpid()) - files
			during, eachDuring := cost()
			memory := residentMB(os.Getpid())
			cancel()
			attack.Wait()
			after, _ := cost()
			o := l.outcome(conns)
			t.Logf("%s, %d of them open: %.0f answers/s before, %.0f during (%.0f %% of those before and after), %.0f after; %v of processor time each before, %v during, and %v for the attacker; %d MB resident",
				mode.name, most, before, during, 200*during/(before+after), after, eachBefore, eachDuring,
				attack.ProcessState.UserTime()+attack.ProcessState.SystemTime(), memory)
			o.want(t, "slowhttptest: "+mode.name)
			normal()
		})
	}
}

// ownProcessor has the service, its clients and PostgreSQL leave the last
// processor, until the test ends, to an attacker, who in earnest brings those of
// another machine; and returns its number for taskset. slowhttptest takes all of
// one, whatever the service does.
func ownProcessor(t testing.TB, db *sql.DB) string {
	t.Helper()
	last := runtime.NumCPU() - 1
	if last == 0 {
		t.Log("there is one processor, which the attacker shares")
		return "0"
	}
	move := func(to int) {
		pids := []int{os.Getpid(), serverPid(t, testDatabase(t))}
		rows, err := db.Query("SELECT pid FROM pg_stat_activity")
		if err != nil {
			t.Fatal(err)
		}
		defer rows.Close()
		for rows.Next() {
			var pid int
			if err := rows.Scan(&pid); err != nil {
				t.Fatal(err)
			}
			pids = append(pids, pid)
		}
		for _, pid := range pids {
			out, err := exec.Command("taskset", "-acp", fmt.Sprintf("0-%d", to), strconv.Itoa(pid)).CombinedOutput()
			if err != nil && !strings.Contains(string(out), "No such process") {
				t.Fatalf("%v: %s", err, out)
			}
		}
	}
	move(last - 1)
	t.Cleanup(func() { move(last) })
	return strconv.Itoa(last)
}

// A process that may have few files, and a crowd that takes them all: health,
// the callers in the middle of something, and new connections to PostgreSQL
// still have theirs.
func TestChaosConnections(t *testing.T) {
	databaseURL, _ := newSchema(t)
	const files, poolConns = 200, 2
	p := startProcess(t, t.TempDir(), testEnv(databaseURL, fmt.Sprintf("DB_MAX_CONNS=%d", poolConns), fmt.Sprintf("ROLLCALL_TEST_FILES=%d", files)))
	p.waitReady()
	s := &service{t: t, url: p.url}
	path := createUser(s, "a@example.com").header.Get("Location")
	closed := filesReturn(t, p.cmd.Process.Pid, poolConns)
	// A connection that has done nothing yet, or between two requests, may be the one
	// that is closed: its client then asks again, on another.
	l := startSteadyLoad(s, 4, 3, path)
	crowd := make([]net.Conn, 0, 3*files)
	for len(crowd) < cap(crowd) {
		conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if len(crowd)%2 == 0 { // the others say nothing at all
			io.WriteString(conn, "GET / HTTP/1.1\r\n")
		}
		crowd = append(crowd, conn)
	}
	for range 20 {
		for _, path := range []string{"/health", "/health/ready"} {
			if a := s.call("GET", path, "", "Connection: close"); a.status != 200 {
				t.Errorf("%s: %d %s", path, a.status, a.body)
			}
		}
	}
	l.rate(t, 500)
	l.outcome(len(crowd)).want(t, fmt.Sprintf("%d connections on %d file descriptors", len(crowd), files))
	for _, conn := range crowd {
		conn.Close()
	}
	closed()
	if log := p.stderr.String(); !strings.Contains(log, "too many connections") || strings.Contains(log, "too many open files") {
		t.Errorf("the log says: %s", log)
	}
}

// readToEnd reads answers until the service closes the connection.
func readToEnd(t testing.TB, conn net.Conn) string {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(patience))
	all, err := io.ReadAll(conn)
	if err, ok := err.(net.Error); ok && err.Timeout() {
		t.Errorf("the connection stays open after %q", cut(string(all), 500))
	}
	return string(all) // of a connection that was reset, what came before
}

// What stands behind a request that is refused or ambiguous is never taken for
// a request: nobody smuggles one past a proxy that reads the first one otherwise
// (RFC 9112, sections 6.3 and 11.2).
func TestChaosFraming(t *testing.T) {
	const poolConns = 2
	s := newService(t, fmt.Sprintf("DB_MAX_CONNS=%d", poolConns))
	t.Cleanup(returnsToNormal(t, poolConns))
	const smuggled = "GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
	const ask = "POST /api/v1/users HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
	tests := []struct {
		name, request string
		want          string // the status of the one answer
	}{
		{"length and chunked", ask + "Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled, "400"},
		{"chunked and length", ask + "Transfer-Encoding: chunked\r\nContent-Length: 60\r\n\r\n0\r\n\r\n" + smuggled, "400"},
		{"two lengths", ask + "Content-Length: 0\r\nContent-Length: 40\r\n\r\n" + smuggled, "400"},
		{"two lengths in one field", ask + "Content-Length: 2, 40\r\n\r\n{}" + smuggled, "400"},
		{"length with a sign", ask + "Content-Length: +2\r\n\r\n{}" + smuggled, "400"},
		{"negative length", ask + "Content-Length: -1\r\n\r\n{}" + smuggled, "400"},
		{"hexadecimal length", ask + "Content-Length: 0x2\r\n\r\n{}" + smuggled, "400"},
		{"length beyond 63 bits", ask + "Content-Length: 18446744073709551618\r\n\r\n{}" + smuggled, "400"},
		{"empty length", ask + "Content-Length: \r\n\r\n{}" + smuggled, "400"},
		{"unknown coding", ask + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + smuggled, "501"},
		{"chunked twice", ask + "Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n" + smuggled, "501"},
		{"two codings", ask + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n" + smuggled, "501"},
		{"two fields of codings", ask + "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n" + smuggled, "501"},
		{"vertical tab before chunked", ask + "Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n" + smuggled, "400"},
		{"space before the colon", ask + "Content-Length : 40\r\n\r\n" + smuggled, "400"},
		{"tab before the colon", ask + "Transfer-Encoding\t: chunked\r\n\r\n0\r\n\r\n" + smuggled, "400"},
		{"space before a field", "GET / HTTP/1.1\r\n Host: x\r\n\r\n" + smuggled, "400"},
		{"NUL in a value", "GET /health HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n" + smuggled, "400"},
		{"bare CR in a value", "GET /health HTTP/1.1\r\nHost: x\r\nX: a\rContent-Length: 40\r\n\r\n" + smuggled, "400"},
		{"NUL in a name", "GET /health HTTP/1.1\r\nHost: x\r\nX\x00: a\r\n\r\n" + smuggled, "400"},
		{"two hosts", "GET /health HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n" + smuggled, "400"},
		{"no host", "GET /health HTTP/1.1\r\n\r\n" + smuggled, "400"},
		{"control character in the path", "GET /hea\x01lth HTTP/1.1\r\nHost: x\r\n\r\n" + smuggled, "400"},
		{"four words", "GET /health x HTTP/1.1\r\nHost: x\r\n\r\n" + smuggled, "400"},
		{"HTTP/0.9", "GET /health\r\n" + smuggled, "400"},
		{"HTTP/1.10", "GET /health HTTP/1.10\r\nHost: x\r\n\r\n" + smuggled, "400"},
		{"HTTP/3.0", "GET /health HTTP/3.0\r\nHost: x\r\n\r\n" + smuggled, "505"},
		{"chunk size that is none", ask + "Transfer-Encoding: chunked\r\n\r\nxyz\r\n" + smuggled, "400"},
		{"chunk size with a sign", ask + "Transfer-Encoding: chunked\r\n\r\n+2\r\n{}\r\n0\r\n\r\n" + smuggled, "400"},
		{"chunk size beyond 64 bits", ask + "Transfer-Encoding: chunked\r\n\r\n10000000000000002\r\n{}\r\n0\r\n\r\n" + smuggled, "400"},
		{"chunk longer than it says", ask + "Transfer-Encoding: chunked\r\n\r\n2\r\n{}{}\r\n0\r\n\r\n" + smuggled, "400"},
		{"chunk size ended by a bare LF", ask + "Transfer-Encoding: chunked\r\n\r\n2;\n{}\r\n0\r\n\r\n" + smuggled, "400"},
		{"oversized chunk extension", ask + "Transfer-Encoding: chunked\r\n\r\n2;" + strings.Repeat("x", 64<<10) + "\r\n{}\r\n0\r\n\r\n" + smuggled, "400"},
		{"many small chunk extensions", ask + "Transfer-Encoding: chunked\r\n\r\n" +
			strings.Repeat("1;"+strings.Repeat("x", 1000)+"\r\n \r\n", 100) + "0\r\n\r\n" + smuggled, "400"},
		{"header of 56 KiB", "GET /health HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 56<<10) + "\r\n\r\n" + smuggled, "431"},
		{"10,000 fields", "GET /health HTTP/1.1\r\nHost: x\r\n" + strings.Repeat("X: y\r\n", 10_000) + "\r\n" + smuggled, "431"},
		{"body too large", ask + "Content-Length: 99999999\r\n\r\n" + smuggled, "413"},
		{"chunked body too large", ask + "Transfer-Encoding: chunked\r\n\r\n200000\r\n" + strings.Repeat(" ", 2<<20) + "\r\n0\r\n\r\n" + smuggled, "413"},
		{"refused with its body unread", "POST /smuggling HTTP/1.1\r\nHost: x\r\nContent-Length: 40\r\n\r\n" + smuggled, "404"},
		{"wrong type, its body unread", "POST /api/v1/users HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: 40\r\n\r\n" + smuggled, "415"},
		{"100-continue not waited for, refused", "POST /x HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 40\r\n\r\n" + smuggled, "404"},
		{"an unknown expectation", "GET /health HTTP/1.1\r\nHost: x\r\nExpect: x\r\n\r\n" + smuggled, "417"},
		// These are taken as they are meant; but see observe.
		{"a small chunk extension", ask + "Transfer-Encoding: chunked\r\n\r\n2;a=b\r\n{}\r\n0\r\n\r\n" + smuggled, "422"},
		{"a trailer", ask + "Transfer-Encoding: chunked\r\nTrailer: X\r\n\r\n2\r\n{}\r\n0\r\nX: y\r\n\r\n" + smuggled, "422"},
		{"chunked where no body is read", "GET /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled, "200"},
		{"a body where none is read", "GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 40\r\n\r\n" + smuggled, "200"},
		{"HTTP/2 preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + smuggled, "404"},
		{"TLS", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n" + smuggled, "400"},
		{"garbage", "\x00\xff\xfe garbage\r\n\r\n" + smuggled, "400"},
		{"HTTP/1.0, which closes", "GET /health HTTP/1.0\r\n\r\n" + smuggled, "200"},
		{"HTTP/1.0 and chunked", "POST /api/v1/users HTTP/1.0\r\nHost: x\r\nContent-Type: application/json\r\n" +
			"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled, "400"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			conn := dialRaw(t, s)
			go io.WriteString(conn, tt.request) // it may be refused before all is sent
			got := readToEnd(t, conn)
			if n := strings.Count(got, "HTTP/1."); n != 1 || len(got) < 12 || got[9:12] != tt.want {
				t.Errorf("%d answers; want one, %s:\n%s", n, tt.want, cut(got, 1000))
			}
		})
	}
	t.Cleanup(func() { // the parallel subtests are over
		for _, line := range s.logged() {
			if line["path"] == "/smuggled" {
				t.Errorf("what followed a broken request was served: %v", line)
			}
		}
	})
}

// What RFC 9112 lets pass, and what can mean one thing only, is answered, and
// so is the request behind it.
func TestUncommonFraming(t *testing.T) {
	t.Parallel()
	s := newService(t)
	const next = "GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
	for _, tt := range []struct{ name, request, want string }{
		{"bare LF", "GET /health HTTP/1.1\nHost: x\n\n", "200"},
		{"a line break before the request", "\r\nGET /health HTTP/1.1\r\nHost: x\r\n\r\n", "400"}, // section 2.2 asks only to be kind
		{"equal lengths", head + "Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}", "422"},
		{"a folded field", "GET /health HTTP/1.1\r\nHost: x\r\nX: a\r\n b\r\n\r\n", "200"},
		{"a whole URL, and another host", "GET http://elsewhere.example/health HTTP/1.1\r\nHost: x\r\n\r\n", "200"},
		{"HTTP/1.0 that stays", "GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", "200"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			conn := dialRaw(t, s)
			conn.send(tt.request + next)
			got := readToEnd(t, conn)
			want := 2
			if tt.want == "400" {
				want = 1
			}
			if n := strings.Count(got, "HTTP/1."); n != want || got[9:12] != tt.want || want == 2 && !strings.HasSuffix(got, "OK") {
				t.Errorf("%d answers; want %d, the first %s:\n%s", n, want, tt.want, got)
			}
		})
	}
}

// 2,000 requests at once on one connection are answered, one after the other.
func TestPipelined(t *testing.T) {
	t.Parallel()
	const requests = 2000
	s := newService(t)
	conn := dialRaw(t, s)
	go func() {
		io.WriteString(conn, strings.Repeat("GET /health HTTP/1.1\r\nHost: x\r\n\r\n", requests-1)+
			"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	}()
	got := readToEnd(t, conn)
	if ok, last := strings.Count(got, "HTTP/1.1 200 OK\r\n"), strings.LastIndex(got, "HTTP/1.1 404 "); ok != requests-1 || last < strings.LastIndex(got, "HTTP/1.1 200") {
		t.Errorf("%d answers with 200; want %d, and one with 404 behind them", ok, requests-1)
	}
}

// Between two requests, and while one runs, the time for reading does not count:
// a deadline left on the connection would cancel the next request.
func TestReadTimeoutIsForReading(t *testing.T) {
	t.Parallel()
	const readTimeout = 100 * time.Millisecond
	h := readPosts(1<<20, handlerFunc(func(w http.ResponseWriter, r *http.Request) error {
		select {
		case <-r.Context().Done():
			return r.Context().Err()
		case <-time.After(3 * readTimeout): // a slow statement
			w.WriteHeader(http.StatusOK)
			return nil
		}
	}))
	checkLeaks(t)
	server := httptest.NewUnstartedServer(underObserve(h))
	server.Config.ReadTimeout = readTimeout
	server.Start()
	defer server.Close()
	conn := dialRaw(t, &service{t: t, url: server.URL})
	for _, request := range []string{head + "Content-Length: 2\r\n\r\n{}", "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
		head + "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"} {
		if a := conn.answerTo(request); a.status != 200 {
			t.Errorf("%q: %d %s", request, a.status, a.body)
		}
	}
}

// A body that ends too early is told as that, whatever net/http makes of its end.
func TestBodyCutOff(t *testing.T) {
	t.Parallel()
	s := newService(t)
	conn := dialRaw(t, s)
	io.WriteString(conn, head+"Content-Length: 100\r\n\r\n{")
	if err := conn.Conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	wantError(t, conn.answer(), 400, "The body could not be read")
}

// Who has no good token occupies nothing, whatever it sends and however often.
func TestChaosTokenFlood(t *testing.T) {
	const poolConns = 2
	s := newService(t, append(withAuth, "MAX_IN_FLIGHT=1", fmt.Sprintf("DB_MAX_CONNS=%d", poolConns))...)
	good := bearer("ada")
	tokens := []string{
		"", "Authorization: Bearer", "Authorization: Bearer x", "Authorization: Basic YTpi",
		"Authorization: Bearer " + strings.Repeat("x", 20_000),
		"Authorization: Bearer " + strings.Repeat(".", 5000),
		"Authorization: Bearer eyJhbGciOiJub25lIn0.e30.",
		good + "x",
		good[:len(good)-5] + "AAAAA",
		"Authorization: Bearer " + mintToken([]byte("another secret of thirty-two bytes, or more"), grant{subject: "eve", ttl: time.Hour}, time.Now()),
		"Authorization: Bearer " + mintToken([]byte(middlewareSecret), grant{subject: "ada", ttl: time.Second}, time.Now().Add(-time.Hour)),
	}
	s.call("GET", usersPath, "", good)
	normal := returnsToNormal(t, poolConns)
	flood, clients := 600, 16
	if fullChaos() {
		flood = 200_000
	}
	logged, memory, start := len(s.log.String()), residentMB(os.Getpid()), time.Now()
	cpu := processorTime()
	var next, wrong atomic.Int64
	var running sync.WaitGroup
	for range clients {
		running.Go(func() {
			for i := next.Add(1); i <= int64(flood); i = next.Add(1) {
				if a, err := s.try("GET", usersPath, "", tokens[i%int64(len(tokens))]); err != nil || a.status != 401 {
					wrong.Add(1)
				}
			}
		})
	}
	l := startSteadyLoad(s, 1, 1, usersPath, good)
	l.rate(t, 10)
	running.Wait()
	o := l.outcome(flood)
	if wrong.Load() > 0 {
		t.Errorf("%d of %d were not refused with 401", wrong.Load(), flood)
	}
	if strings.Contains(s.log.String(), "eyJ") {
		t.Error("a token got into the log")
	}
	t.Logf("%d bad tokens: %.0f/s, %.0f µs of processor time each with the client's part, %d bytes of log each, %d MB resident before and %d after",
		flood, float64(flood)/time.Since(start).Seconds(), float64((processorTime()-cpu).Microseconds())/float64(flood),
		(len(s.log.String())-logged)/flood, memory, residentMB(os.Getpid()))
	o.want(t, "bad tokens, in a flood")
	normal()
}

// processorTime returns what this process has used of it.
func processorTime() time.Duration {
	var used syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &used)
	return time.Duration(used.Utime.Nano() + used.Stime.Nano())
}

// http2Frame returns a frame of HTTP/2 (RFC 9113, section 4.1).
func http2Frame(kind, flags byte, stream int, payload string) string {
	n := len(payload)
	return string([]byte{byte(n >> 16), byte(n >> 8), byte(n), kind, flags, byte(stream >> 24), byte(stream >> 16), byte(stream >> 8), byte(stream)}) + payload
}

// http2Head returns a head, "name: value" each, in literals (RFC 7541, section 6.2.2).
func http2Head(method, path string, fields ...string) string {
	var b strings.Builder
	literal := func(s string) {
		if len(s) < 127 {
			b.WriteByte(byte(len(s)))
		} else { // section 5.1, for up to 16,510 bytes
			b.Write([]byte{127, byte(len(s)-127)&127 | 128, byte((len(s) - 127) >> 7)})
		}
		b.WriteString(s)
	}
	for _, field := range append([]string{":method: " + method, ":scheme: https", ":authority: x", ":path: " + path}, fields...) {
		i := strings.LastIndex(field, ": ")
		b.WriteByte(0)
		literal(field[:i])
		literal(field[i+2:])
	}
	return b.String()
}

// http2Headers returns the HEADERS of a request with this head, and as many
// CONTINUATIONs as it takes.
func http2Headers(stream int, endsStream bool, head string) string {
	const most = 16 << 10
	kind, flags, frames := byte(1), byte(0), ""
	if endsStream {
		flags = 1
	}
	for len(head) > most {
		frames += http2Frame(kind, flags, stream, head[:most])
		kind, flags, head = 9, 0, head[most:]
	}
	return frames + http2Frame(kind, flags|4, stream, head)
}

// A connection of HTTP/2 may have 32 requests at a time, and stays open while its
// client answers the PINGs of the service.
func TestHTTP2Connection(t *testing.T) {
	t.Parallel()
	certFile, keyFile := writeCertificate(t, t.TempDir(), "rollcall.test")
	databaseURL, _ := newSchema(t)
	conn := dialTLS(t, startService(t, testEnv(databaseURL, "TLS_CERT_FILE="+certFile, "TLS_KEY_FILE="+keyFile)), "h2")
	send := func(frames string) {
		if _, err := io.WriteString(conn, frames); err != nil {
			t.Fatal(err)
		}
	}
	send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + http2Frame(4, 0, 0, ""))
	conn.SetReadDeadline(time.Now().Add(patience))
	for streams, pings := 0, 0; ; {
		frame := make([]byte, 9)
		if _, err := io.ReadFull(conn, frame); err != nil {
			t.Fatalf("after %d PINGs: %v", pings, err)
		}
		payload := make([]byte, int(frame[0])<<16|int(frame[1])<<8|int(frame[2]))
		if _, err := io.ReadFull(conn, payload); err != nil {
			t.Fatal(err)
		}
		switch kind, ack := frame[3], frame[4]&1 != 0; {
		case kind == 4 && !ack:
			for s := range slices.Chunk(payload, 6) {
				if s[1] == 3 { // SETTINGS_MAX_CONCURRENT_STREAMS
					streams = int(s[2])<<24 | int(s[3])<<16 | int(s[4])<<8 | int(s[5])
				}
			}
		case kind == 6 && !ack:
			send(http2Frame(6, 1, 0, string(payload)))
			if pings++; pings == 3 {
				send(http2Headers(1, true, http2Head("GET", "/health")))
			}
		case kind == 1: // the answer
			if streams != 32 {
				t.Errorf("%d requests at a time; want 32", streams)
			}
			return
		}
	}
}

// The same attacks over HTTP/1.1 and over HTTP/2, where a connection has as many
// requests as it likes: what they hold in memory is bounded, and in the end they are
// all cut off.
func TestSlowClientsHoldLittle(t *testing.T) {
	t.Parallel()
	const streams, poolConns = 250, 2
	mostMB := 100
	if info, ok := debug.ReadBuildInfo(); ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		mostMB *= 4 // the race detector's own
	}
	const begin = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	settings := func(window int) string { // of each stream, for the answer
		return begin + http2Frame(4, 0, 0, string([]byte{0, 4, byte(window >> 24), byte(window >> 16), byte(window >> 8), byte(window)})) +
			http2Frame(8, 0, 0, "\x7f\x00\x00\x00") // of the connection: all there is
	}
	each := func(request func(stream int) string) (all string) {
		for i := range streams {
			all += request(2*i + 1)
		}
		return all
	}
	fields1, fields2 := "", []string{}
	for i := range 44 {
		fields1 += fmt.Sprintf("X-%d: %s\r\n", i, strings.Repeat("x", 990))
		fields2 = append(fields2, fmt.Sprintf("x-%d: %s", i, strings.Repeat("x", 950)))
	}
	const list = usersPath + "?limit=1000"
	json := "content-type: application/json"
	for _, tt := range []struct {
		name         string
		http1, http2 string
		conns        int
	}{
		{"a head without an end", "GET / HTTP/1.1\r\n" + fields1,
			settings(0) + http2Frame(1, 1, 1, http2Head("GET", "/")) + http2Frame(9, 0, 1, http2Head("GET", "/", fields2...)[:16<<10]), 25},
		{"half a frame", "", settings(0) + http2Frame(1, 5, 1, http2Head("GET", "/", fields2...)[:16<<10])[:16<<9], 25},
		{"bodies without an end", head + "Content-Length: 16000\r\n\r\n" + strings.Repeat(" ", 1000),
			settings(0) + each(func(stream int) string {
				return http2Headers(stream, false, http2Head("POST", usersPath, json, "content-length: 16000")) + http2Frame(0, 0, stream, strings.Repeat(" ", 200))
			}), 25},
		{"large heads, and bodies that don't come", head + fields1 + "Content-Length: 16000\r\n\r\n",
			settings(0) + each(func(stream int) string {
				return http2Headers(stream, false, http2Head("POST", usersPath, append(fields2, json)...))
			}), 20},
		{"large heads, answers without a window", "",
			settings(0) + each(func(stream int) string { return http2Headers(stream, true, http2Head("GET", "/nothing", fields2...)) }), 20},
		{"lists without a window", "", settings(16) + each(func(stream int) string { return http2Headers(stream, true, http2Head("GET", list)) }), 6},
		{"lists that nobody reads", strings.Repeat("GET "+list+" HTTP/1.1\r\nHost: x\r\n\r\n", 64), // more than fit into the buffers of the kernel, even where half are 503
			settings(1<<31-1) + each(func(stream int) string { return http2Headers(stream, true, http2Head("GET", list)) }), 6},
		{"a large frame that nobody reads", "",
			begin + http2Frame(4, 0, 0, "\x00\x04\x7f\xff\xff\xff\x00\x05\x00\xff\xff\xff") + http2Frame(8, 0, 0, "\x7f\x00\x00\x00") + http2Headers(1, true, http2Head("GET", list)), 50},
	} {
		for protocol, attack := range map[string]string{"http/1.1": tt.http1, "h2": tt.http2} {
			if attack == "" {
				continue // there is nothing like it
			}
			t.Run(tt.name+"/"+protocol, func(t *testing.T) {
				t.Parallel()
				certFile, keyFile := writeCertificate(t, t.TempDir(), "rollcall.test")
				databaseURL, db := newSchema(t)
				p := startProcess(t, t.TempDir(), testEnv(databaseURL, fmt.Sprintf("DB_MAX_CONNS=%d", poolConns), "REQUEST_TIMEOUT=2s",
					"GOGC=100", "TLS_CERT_FILE="+certFile, "TLS_KEY_FILE="+keyFile))
				p.waitReady()
				s := &service{t: t, url: p.url, db: db}
				longList(t, s)
				s.url = strings.TrimPrefix(p.url, "http://")
				files, memory, most := p.openFiles(), p.residentMB(), 0
				var sending sync.WaitGroup
				for range tt.conns {
					conn := dialTLS(t, s, protocol)
					sending.Go(func() { io.WriteString(conn, attack) }) // not all of it, where it is cut off
				}
				for deadline := time.Now().Add(4 * patience); ; time.Sleep(10 * time.Millisecond) { // between two looks
					most = max(most, p.residentMB()-memory)
					open := p.openFiles() - files
					if open <= poolConns {
						break
					}
					if time.Now().After(deadline) {
						t.Errorf("%d connections are still open", open)
						break
					}
				}
				sending.Wait()
				if most > mostMB {
					t.Errorf("%d connections held %d MB; want %d at most", tt.conns, most, mostMB)
				}
			})
		}
	}
}
