package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// A mailbox is the socket of a service manager, and what it was told.
type mailbox struct {
	t    testing.TB
	name string

	mu       sync.Mutex
	messages []string
}

// newMailbox opens a mailbox under this name; if it is empty, under one of its own.
func newMailbox(t testing.TB, name string) *mailbox {
	t.Helper()
	checkLeaks(t)
	if name == "" {
		// Not t.TempDir: the name of a socket has at most 107 bytes, see unix(7).
		dir := socketDir(t)
		name = filepath.Join(dir, "notify")
	}
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	m := &mailbox{t: t, name: name}
	go func() {
		message := make([]byte, 4096)
		for {
			n, err := conn.Read(message)
			if err != nil {
				return
			}
			m.mu.Lock()
			m.messages = append(m.messages, string(message[:n]))
			m.mu.Unlock()
		}
	}()
	return m
}

// count returns how many messages had this assignment.
func (m *mailbox) count(assignment string) (n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, message := range m.messages {
		for line := range strings.SplitSeq(message, "\n") {
			if line == assignment {
				n++
			}
		}
	}
	return n
}

func (m *mailbox) wait(assignment string) {
	m.t.Helper()
	waitFor(m.t, "the service manager to be told "+assignment, func() bool { return m.count(assignment) > 0 })
}

// newManagedProcess returns the program to be started as a service manager does
// it: with a socket, if it is not nil, and an address for messages.
func newManagedProcess(t testing.TB, socket *os.File, env map[string]string) (*process, *mailbox) {
	t.Helper()
	heard := newMailbox(t, "")
	p := newProcess(t, t.TempDir(), env)
	p.cmd.Env = append([]string{"NOTIFY_SOCKET=" + heard.name, "LISTEN_FDS=1"}, p.cmd.Env...) // the last one counts
	if socket != nil {
		// LISTEN_PID is the id of the very process. The shell knows it, and becomes
		// the program.
		p.cmd.Path, p.cmd.Args = "/bin/sh", append([]string{"sh", "-c", `LISTEN_PID=$$; export LISTEN_PID; exec "$0" "$@"`}, p.cmd.Args...)
		p.cmd.ExtraFiles = []*os.File{socket}
	}
	return p, heard
}

func TestPassedSocket(t *testing.T) {
	t.Parallel()
	databaseURL, _ := newSchema(t)
	tcp, tcpFile := newListener(t)
	dir := socketDir(t)
	unix, err := net.ListenUnix("unix", &net.UnixAddr{Name: dir + "/http", Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close() })
	unixFile, err := unix.File()
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name     string
		listener net.Listener
		file     *os.File
	}{{"TCP", tcp, tcpFile}, {"Unix", unix, unixFile}} {
		t.Run(test.name, func(t *testing.T) {
			p, heard := newManagedProcess(t, test.file, testEnv(databaseURL, "PORT=1")) // one that can't be ours
			p.start()
			heard.wait("STATUS=looking for PostgreSQL")
			heard.wait("READY=1")
			heard.wait("STATUS=serving on " + test.listener.Addr().String())
			listening := fmt.Sprintf(`"msg":"listening","address":%q,"socket":"passed by the service manager"`, test.listener.Addr())
			waitFor(t, "the log to say "+listening, func() bool { return strings.Contains(p.stderr.String(), listening) })
			conn, err := net.Dial(test.listener.Addr().Network(), test.listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			fmt.Fprint(conn, "GET /health/ready HTTP/1.1\r\nHost: rollcall\r\n\r\n")
			if resp, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil || resp.StatusCode != 200 {
				t.Errorf("got %v, %v", resp, err)
			}
		})
	}
}

func TestPassedSocketRefused(t *testing.T) {
	t.Parallel()
	_, tcp := newListener(t)
	conn, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	udp, err := conn.File()
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	connected := os.NewFile(uintptr(pair[0]), "")
	syscall.Close(pair[1])
	file, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { udp.Close(); connected.Close(); file.Close() })

	const noListener = `is not a socket that listens; a socket unit needs ListenStream= and Accept=no`
	for _, test := range []struct {
		name   string
		socket *os.File
		env    string
		want   string // a regular expression for the log
	}{
		{"two", tcp, "LISTEN_FDS=2", `LISTEN_FDS: 2; rollcall takes exactly 1 socket`},
		{"none", tcp, "LISTEN_FDS=0", `LISTEN_FDS: 0; rollcall takes exactly 1 socket`},
		{"no number", tcp, "LISTEN_FDS=one", `LISTEN_FDS: "one" is not a whole number`},
		{"datagrams", udp, "", noListener},
		{"a connection", connected, "", noListener},
		{"a file", file, "", noListener},
		{"a watchdog without sense", tcp, "WATCHDOG_USEC=1s", `WATCHDOG_USEC: "1s" is not a whole number`},
		{"a watchdog of nobody", tcp, "WATCHDOG_USEC=1\nWATCHDOG_PID=me", `WATCHDOG_PID: "me" is not a whole number`},
		{"a watchdog of less than nobody", tcp, "WATCHDOG_PID=-1", `WATCHDOG_PID: "-1" is not a whole number`},
		{"a watchdog beyond all time", tcp, "WATCHDOG_USEC=9223372036854775807", `WATCHDOG_USEC: "9223372036854775807" is not`},
	} {
		t.Run(test.name, func(t *testing.T) {
			p, _ := newManagedProcess(t, test.socket, testEnv("dbname=x", strings.Split(test.env, "\n")...))
			p.start()
			if code := p.exit(); code != 2 || !regexp.MustCompile(test.want).MatchString(p.stderr.String()) {
				t.Errorf("exit code %d, want 2 and %s", code, test.want)
			}
		})
	}
}

// What is for another process, such as our parent, is not taken.
func TestPassedSocketOfAnother(t *testing.T) {
	t.Parallel()
	databaseURL, _ := newSchema(t)
	listener, socket := newListener(t)
	p := newProcess(t, t.TempDir(), testEnv(databaseURL, fmt.Sprintf("LISTEN_PID=%d", os.Getpid()), "LISTEN_FDS=1",
		fmt.Sprintf("WATCHDOG_PID=%d", os.Getpid()), "WATCHDOG_USEC=1"))
	p.cmd.ExtraFiles = []*os.File{socket}
	p.start()
	p.waitReady()
	if strings.HasSuffix(p.url, listener.Addr().String()) || !strings.Contains(p.stderr.String(), `"socket":"own"`) {
		t.Errorf("it listens on %s", p.url)
	}
}

// Children inherit nothing of it, and no file can make it up.
func TestManagerVariables(t *testing.T) {
	for _, name := range managerVariables {
		t.Setenv(name, fmt.Sprint(os.Getppid()))
	}
	m, err := newManager(os.Getenv)
	if err != nil || m.listener != nil || m.watchdog != 0 || m.socketName == "" {
		t.Errorf("got %+v, %v", m, err)
	}
	for _, name := range managerVariables {
		if v, ok := os.LookupEnv(name); ok {
			t.Errorf("%s is still %q", name, v)
		}
	}

	file := filepath.Join(t.TempDir(), ".env")
	if err := os.WriteFile(file, []byte(strings.Join(managerVariables, "=1\n")+"=1\nPORT=1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	getenv, err := withDotenv(func(string) string { return "" }, file, io.Discard)
	if err != nil || getenv("PORT") != "1" {
		t.Fatalf("PORT=%s, %v", getenv("PORT"), err)
	}
	for _, name := range managerVariables {
		if v := getenv(name); v != "" {
			t.Errorf("%s is %q, from a file", name, v)
		}
	}
}

// The manager hears of the start, that the service lives, and of the stop.
func TestManagerIsTold(t *testing.T) {
	t.Parallel()
	databaseURL, _ := newSchema(t)
	p, heard := newManagedProcess(t, nil, testEnv(databaseURL, "WATCHDOG_USEC=100000", "DRAIN_DELAY=200ms", "SHUTDOWN_TIMEOUT=3s"))
	p.start()
	heard.wait("READY=1")
	waitFor(t, "the watchdog to be told three times", func() bool { return heard.count("WATCHDOG=1") >= 3 })
	waitFor(t, "the log to have three of the checks", func() bool {
		return strings.Count(p.stderr.String(), `"path":"/health","status":200`) >= 3
	})
	if heard.count("STOPPING=1") != 0 {
		t.Error("STOPPING=1 before the stop")
	}
	p.cmd.Process.Signal(syscall.SIGTERM)
	heard.wait("STOPPING=1")
	heard.wait("EXTEND_TIMEOUT_USEC=8200000") // DRAIN_DELAY, SHUTDOWN_TIMEOUT, and 5 s more
	if code := p.exit(); code != 0 || heard.count("READY=1") != 1 {
		t.Errorf("exit code %d, ready %d times", code, heard.count("READY=1"))
	}
}

// While the service waits for PostgreSQL, it is not ready, and who connects to its
// socket waits as well: for this process, or for the next one.
func TestManagerDuringStart(t *testing.T) {
	t.Parallel()
	listener, socket := newListener(t)
	p, heard := newManagedProcess(t, socket, testEnv(fmt.Sprintf("host=%s dbname=x user=x", t.TempDir()), "REQUEST_TIMEOUT=1h"))
	p.start()
	conn, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "GET "+usersPath+" HTTP/1.1\r\nHost: rollcall\r\n\r\n")
	waitFor(t, "the service to wait", func() bool { return strings.Contains(p.stderr.String(), "waiting for PostgreSQL") })
	p.cmd.Process.Signal(syscall.SIGTERM)
	if code := p.exit(); code != 0 || heard.count("READY=1") != 0 || heard.count("STOPPING=1") != 1 {
		t.Errorf("exit code %d, READY=1 %d times, STOPPING=1 %d times", code, heard.count("READY=1"), heard.count("STOPPING=1"))
	}

	databaseURL, _ := newSchema(t)
	p, heard = newManagedProcess(t, socket, testEnv(databaseURL))
	p.start()
	heard.wait("READY=1")
	conn.SetDeadline(time.Now().Add(patience))
	if resp, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil || resp.StatusCode != 200 {
		t.Errorf("got %v, %v", resp, err)
	}
}

// Whoever has waited for as long as a request may take is answered.
func TestManagerDuringLongStart(t *testing.T) {
	t.Parallel()
	listener, socket := newListener(t)
	p, _ := newManagedProcess(t, socket, testEnv(fmt.Sprintf("host=%s dbname=x user=x", t.TempDir()), "REQUEST_TIMEOUT=50ms"))
	p.start()
	s := &service{t: t, url: "http://" + listener.Addr().String()}
	if a := s.call("GET", usersPath, ""); a.status != 503 || a.header.Get("Retry-After") == "" {
		t.Errorf("got %+v", a)
	}
}

func TestNotify(t *testing.T) {
	t.Parallel()
	log := new(syncBuffer)
	logger := slog.New(slog.NewTextHandler(log, nil))
	manager{}.notify(logger, "READY=1")
	if log.String() != "" {
		t.Errorf("without a manager: %s", log)
	}
	for _, socket := range []string{"/no/such/socket", "vsock:2:1", "notify"} { // told or not, it goes on
		manager{socketName: socket}.notify(logger, "READY=1")
	}
	if n := strings.Count(log.String(), "the service manager can't be told"); n != 3 {
		t.Errorf("3 failures, logged %d times: %s", n, log)
	}
	box := newMailbox(t, "")
	manager{socketName: box.name}.notify(logger, "READY=1", "STATUS=a status")
	box.wait("STATUS=a status")
	if !slices.Equal(box.messages, []string{"READY=1\nSTATUS=a status"}) {
		t.Errorf("got %q", box.messages)
	}
}

func TestNotifyAbstractName(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("only Linux has names of sockets outside of the file system")
	}
	box := newMailbox(t, fmt.Sprintf("@rollcall-test-%d", os.Getpid()))
	manager{socketName: box.name}.notify(slog.New(slog.DiscardHandler), "READY=1")
	box.wait("READY=1")
}

func TestWatch(t *testing.T) {
	t.Parallel()
	box, log := newMailbox(t, ""), new(syncBuffer)
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 40*time.Second)
		defer cancel()
		begun := time.Now()
		var got []string
		m := manager{socketName: box.name, watchdog: 16 * time.Second}
		m.watch(ctx, slog.New(slog.NewTextHandler(log, nil)), func(ctx context.Context) error {
			got = append(got, time.Since(begun).String())
			switch len(got) {
			case 2: // does not answer
				<-ctx.Done()
				return ctx.Err()
			case 4:
				return errors.New("refused")
			}
			return nil
		})
		if want := []string{"0s", "8s", "17s", "25s", "26s", "34s"}; !slices.Equal(got, want) {
			t.Errorf("checked at %q; want %q", got, want)
		}
	})
	waitFor(t, "four reports", func() bool { return box.count("WATCHDOG=1") == 4 })
	for _, want := range []string{"context deadline exceeded", "refused"} {
		if strings.Count(log.String(), want) != 1 {
			t.Errorf("not once %q in the log: %s", want, log)
		}
	}
}

// A service that hangs is not reported, though its process runs and its socket
// takes connections; one that answers again is.
func TestWatchdogOfHangingService(t *testing.T) {
	t.Parallel()
	box, log := newMailbox(t, ""), new(syncBuffer)
	var hangs atomic.Bool
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if hangs.Load() {
			<-r.Context().Done()
		}
	}))
	defer server.Close()
	ctx, cancel := context.WithCancel(t.Context())
	reported := make(chan struct{})
	go func() {
		defer close(reported)
		m := manager{socketName: box.name, watchdog: 100 * time.Millisecond}
		m.watch(ctx, slog.New(slog.NewTextHandler(log, nil)), func(ctx context.Context) error {
			return askHere(ctx, server.Listener.Addr(), false, "/health")
		})
	}()
	failures := func() int { return strings.Count(log.String(), "does not answer itself") }

	box.wait("WATCHDOG=1")
	hangs.Store(true)
	waitFor(t, "a check to fail", func() bool { return failures() > 0 })
	before := box.count("WATCHDOG=1")
	waitFor(t, "three more to fail", func() bool { return failures() > 3 })
	if n := box.count("WATCHDOG=1"); n > before {
		t.Errorf("reported %d times while it hung", n-before)
	}
	hangs.Store(false)
	waitFor(t, "it to be reported again", func() bool { return box.count("WATCHDOG=1") > before })
	cancel()
	<-reported
}

// A service that listens everywhere is asked on this host, be it without IPv6.
func TestAskHere(t *testing.T) {
	t.Parallel()
	for _, address := range []string{"127.0.0.1:0", "0.0.0.0:0", "[::]:0", "[::1]:0"} {
		listener, err := net.Listen("tcp", address)
		if err != nil {
			if strings.HasPrefix(address, "[::") {
				t.Logf("not tried, as this host has no IPv6: %v", err)
				continue
			}
			t.Fatal(err)
		}
		server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/health" {
				w.WriteHeader(503)
			}
		})}
		go server.Serve(listener)
		defer server.Close()
		if err := askHere(t.Context(), listener.Addr(), false, "/health"); err != nil {
			t.Errorf("%s: %v", address, err)
		}
		if err := askHere(t.Context(), listener.Addr(), false, "/"); err == nil {
			t.Errorf("%s: a 503 is taken for a 200", address)
		}
	}
	// One that takes IPv4 alone stands in for a host without IPv6.
	server := httptest.NewServer(http.NotFoundHandler())
	defer server.Close()
	addr := &net.TCPAddr{IP: net.IPv6unspecified, Port: server.Listener.Addr().(*net.TCPAddr).Port}
	if err := askHere(t.Context(), addr, false, "/"); err == nil || !strings.Contains(err.Error(), "404") {
		t.Errorf("without IPv6: %v", err)
	}
}

// The watchdog ends a hanging process with SIGABRT. A Go program then exits with 2
// unless told otherwise: the code for which the unit forbids a restart.
func TestAbortIsNoExitCode(t *testing.T) {
	t.Parallel()
	unit, err := os.ReadFile("deploy/rollcall.service")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(unit, []byte("\nRestartPreventExitStatus=2\n")) || !bytes.Contains(unit, []byte("\nEnvironment=GOTRACEBACK=crash\n")) {
		t.Error("the unit is not the one that this test is about")
	}
	databaseURL, _ := newSchema(t)
	p := startProcess(t, t.TempDir(), testEnv(databaseURL, "GOTRACEBACK=crash"))
	p.waitReady()
	p.cmd.Process.Signal(syscall.SIGABRT)
	p.exit()
	if status := p.cmd.ProcessState.Sys().(syscall.WaitStatus); !status.Signaled() || status.Signal() != syscall.SIGABRT {
		t.Errorf("it ended with %v", p.cmd.ProcessState)
	}
}

// systemd reads the units as they are meant, and finds little to attack.
func TestUnits(t *testing.T) {
	t.Parallel()
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("systemd-analyze, which checks units, is not installed (package systemd)")
	}
	// The program of the unit is hardly installed here, so this one stands in for it.
	dir := t.TempDir()
	for _, name := range []string{"rollcall.service", "rollcall.socket"} {
		unit, err := os.ReadFile("deploy/" + name)
		if err != nil {
			t.Fatal(err)
		}
		unit = bytes.ReplaceAll(unit, []byte("ExecStart=/usr/local/bin/rollcall\n"), []byte("ExecStart="+os.Args[0]+"\n"))
		if err := os.WriteFile(filepath.Join(dir, name), unit, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	service, socket := filepath.Join(dir, "rollcall.service"), filepath.Join(dir, "rollcall.socket")
	if out, err := exec.Command(analyze, "verify", service, socket).CombinedOutput(); err != nil || bytes.Contains(out, []byte("rollcall")) {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
	out, err := exec.Command(analyze, "security", "--offline=true", "--no-pager", "--threshold=15", service).CombinedOutput()
	if bytes.Contains(out, []byte("unrecognized option")) {
		t.Skip("this systemd-analyze can't rate a unit that is not loaded: it takes version 250")
	}
	rating := regexp.MustCompile(`Overall exposure level for rollcall.service: (.*)`).FindString(string(out))
	if err != nil || rating == "" {
		t.Errorf("systemd-analyze security: %v\n%s", err, out)
	}
	t.Log(rating)
}
