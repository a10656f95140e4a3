package main

import (
	"bufio"
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/exec"
	osuser "os/user" // user is a type of ours
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// When this variable names a folder, the test binary is no test: it starts the
// database in there, says so, and waits to be killed.
const helperVar = "ROLLCALL_TEST_POSTGRES_HELPER"

func init() {
	dir := os.Getenv(helperVar)
	if dir == "" {
		return
	}
	d, err := startPostgres(context.Background(), dir, "fsync=off")
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("ready")
	<-d.done
	os.Exit(1)
}

// startPrivate starts a database that is stopped when the test ends.
func startPrivate(t *testing.T, dir string, settings ...string) *privatePostgres {
	t.Helper()
	checkLeaks(t)
	d, err := startPostgres(t.Context(), dir, append(settings, "fsync=off")...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.stop() })
	return d
}

// stopPrivate stops a database, and checks that it leaves nothing behind.
func stopPrivate(t *testing.T, d *privatePostgres) {
	t.Helper()
	if err := d.stop(); err != nil {
		t.Error(err)
	}
	assertNoServer(t, d.dir)
	for _, name := range []string{d.path("data/.s.PGSQL.5432"), d.path("data/postmaster.pid"), cmp.Or(d.link, "/none")} {
		if exists(name) {
			t.Errorf("%s is still there", name)
		}
	}
}

// assertNoServer checks that no process of PostgreSQL runs on the data in dir, or not
// for long: each of them has the lock.
func assertNoServer(t *testing.T, dir string) {
	t.Helper()
	p := &privatePostgres{dir: dir}
	if err := p.lockFolder(t.Context()); err != nil {
		t.Errorf("PostgreSQL still runs: %v", err)
	}
	p.stop()
}

// chown gives a file to the user that PostgreSQL runs as.
func (p *privatePostgres) chown(name string) error {
	if p.account == nil {
		return nil
	}
	return os.Chown(name, int(p.account.Uid), int(p.account.Gid))
}

// serverPid returns the pid of the server's first process.
func serverPid(t testing.TB, d *privatePostgres) (pid int) {
	t.Helper()
	b, err := os.ReadFile(d.path("data/postmaster.pid"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscan(string(b), &pid); err != nil {
		t.Fatal(err)
	}
	return pid
}

func queryPostgres(t *testing.T, d *privatePostgres, query string) (answer string) {
	t.Helper()
	db, err := sql.Open("postgres", d.url())
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := db.QueryRowContext(t.Context(), query).Scan(&answer); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return answer
}

func exists(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}

func TestPrivatePostgresKeepsData(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "project", ".dev")
	d := startPrivate(t, dir, "application_name=from a test")

	for query, want := range map[string]string{
		"SHOW application_name":                               "from a test",
		"SHOW listen_addresses":                               "",
		"SHOW unix_socket_permissions":                        "0700",
		"SHOW server_encoding":                                "UTF8",
		"SELECT lower('ÄÖÉ')":                                 "äöé",
		"SELECT current_database() || ' of ' || current_user": "rollcall of rollcall",
	} {
		if got := queryPostgres(t, d, query); got != want {
			t.Errorf("%s: got %q, want %q", query, got, want)
		}
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the folder: got %v, %v, want it closed to others", info.Mode(), err)
	}
	// Ctrl-C signals the process group of the terminal.
	if pgid, err := syscall.Getpgid(serverPid(t, d)); err != nil || pgid == syscall.Getpgrp() {
		t.Errorf("the server is in our process group: %d, %v", pgid, err)
	}

	queryPostgres(t, d, "CREATE TABLE kept AS SELECT 'still here' AS word; SELECT word FROM kept")
	stopPrivate(t, d)
	stopPrivate(t, d)
	d = startPrivate(t, dir)
	if got := queryPostgres(t, d, "SELECT word FROM kept"); got != "still here" {
		t.Errorf("after a restart: got %q", got)
	}
	stopPrivate(t, d)
}

func TestPrivatePostgresInUse(t *testing.T) {
	t.Parallel()
	checkLeaks(t)
	dir := t.TempDir()
	inUse := fmt.Sprintf("the private PostgreSQL in %s: another rollcall (process %d) or the PostgreSQL that it left uses this folder", dir, os.Getpid())
	var (
		wg      sync.WaitGroup
		started = make([]*privatePostgres, 4)
		errs    = make([]error, len(started))
	)
	for i := range started {
		wg.Go(func() { started[i], errs[i] = startPostgres(t.Context(), dir, "fsync=off") })
	}
	wg.Wait()
	var winner *privatePostgres
	for i, d := range started {
		switch {
		case d != nil && winner != nil:
			t.Error("two have started")
			stopPrivate(t, d)
		case d != nil:
			winner = d
		case !strings.HasPrefix(errs[i].Error(), inUse):
			t.Error(errs[i])
		}
	}
	if winner == nil {
		t.Fatal("none has started")
	}
	if got := queryPostgres(t, winner, "SELECT 'unharmed'"); got != "unharmed" {
		t.Errorf("the winner: got %q", got)
	}
	stopPrivate(t, winner)
}

// A killed server leaves its pid file and its socket. Once the pid belongs to some
// other process of the same user, PostgreSQL alone would refuse to start.
func TestPrivatePostgresAfterServerWasKilled(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	d := startPrivate(t, dir)
	queryPostgres(t, d, "CREATE TABLE kept AS SELECT 'recovered' AS word; SELECT word FROM kept")
	syscall.Kill(serverPid(t, d), syscall.SIGKILL)
	<-d.done
	if err := d.stop(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("stop: got %v, want to hear that it was killed", err)
	}
	assertNoServer(t, dir)

	other := exec.Command("sleep", "600")
	other.SysProcAttr = &syscall.SysProcAttr{Credential: d.account}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer other.Wait()
	defer other.Process.Kill()
	pidFile := filepath.Join(dir, "data", "postmaster.pid")
	stale, err := os.ReadFile(pidFile)
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(stale), "\n")
	if err := os.WriteFile(pidFile, fmt.Appendf(nil, "%d\n%s", other.Process.Pid, rest), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(d.sockets, ".s.PGSQL.5432.lock"), fmt.Appendf(nil, "%d\n%s", other.Process.Pid, rest), 0o600); err != nil {
		t.Fatal(err)
	}

	d = startPrivate(t, dir)
	if got := queryPostgres(t, d, "SELECT word FROM kept"); got != "recovered" {
		t.Errorf("got %q", got)
	}
	stopPrivate(t, d)
}

func TestPrivatePostgresDiesWithItsParent(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("only Linux tells a process that its parent has died")
	}
	t.Parallel()
	dir := t.TempDir()
	parent := exec.Command(os.Args[0])
	parent.Env = append(os.Environ(), helperVar+"="+dir)
	out, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	defer parent.Process.Kill()
	if line, _ := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		t.Fatalf("the helper says %q", line)
	}
	_, err = startPostgres(t.Context(), dir)
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("(process %d)", parent.Process.Pid)) {
		t.Errorf("while it runs: got %v, want its pid, %d", err, parent.Process.Pid)
	}

	parent.Process.Kill()
	parent.Wait()
	stopPrivate(t, startPrivate(t, dir)) // it waits for the old server, which therefore ends
}

func TestPrivatePostgresFolders(t *testing.T) {
	t.Parallel()
	for name, folder := range map[string]string{
		"short": `it's "100%s\ $HOME`,
		"long":  strings.Repeat("one, very long/", 20),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := startPrivate(t, filepath.Join(t.TempDir(), folder))
			if got := queryPostgres(t, d, "SELECT 'reached'"); got != "reached" {
				t.Errorf("got %q", got)
			}
			stopPrivate(t, d)
		})
	}
}

// Root starts PostgreSQL as another user, the owner of the folder, who can't enter
// the folders around it. As root, the other tests see that too, with the user
// postgres: t.TempDir is closed to others.
func TestPrivatePostgresAsRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	t.Parallel()
	nobody, err := osuser.Lookup("nobody")
	if err != nil {
		t.Fatal(err)
	}
	uid, err := strconv.Atoi(nobody.Uid)
	if err != nil {
		t.Fatal(err)
	}
	around := filepath.Join(t.TempDir(), "closed")
	dir := filepath.Join(around, ".dev")
	if err := errors.Join(os.MkdirAll(dir, 0o700), os.Chown(dir, uid, -1)); err != nil {
		t.Fatal(err)
	}
	d := startPrivate(t, dir)
	for name, want := range map[string]int{around: 0, dir: uid, filepath.Join(dir, "data"): uid} {
		info, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Sys().(*syscall.Stat_t).Uid; int(got) != want || info.Mode().Perm() != 0o700 {
			t.Errorf("%s: got %v of user %d, want it closed, of user %d", name, info.Mode(), got, want)
		}
	}
	stopPrivate(t, d)
}

func TestPrivatePostgresOfOtherVersion(t *testing.T) {
	t.Parallel()
	for version, want := range map[string]string{
		"9.6": "the data was made by PostgreSQL 9, and no PostgreSQL 9 that rollcall supports (14 or newer) was found: install it, or move the folder away",
		"13":  "the data was made by PostgreSQL 13, and no PostgreSQL 13 that rollcall supports (14 or newer) was found: install it, or move the folder away",
		"99":  "the data was made by PostgreSQL 99, and no PostgreSQL 99 that rollcall supports (14 or newer) was found: install it, or move the folder away",
	} {
		dir := t.TempDir()
		if err := os.Mkdir(filepath.Join(dir, "data"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "data", "PG_VERSION"), []byte(version+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := startPostgres(t.Context(), dir)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("data of version %s: got %v, want %s", version, err, want)
		}
	}
}

func TestPrivatePostgresDamaged(t *testing.T) {
	t.Parallel()
	for name, damage := range map[string]func(file string) error{
		"empty":   func(file string) error { return os.WriteFile(file, nil, 0o600) },
		"zeroes":  func(file string) error { return os.WriteFile(file, make([]byte, 3), 0o600) },
		"no text": func(file string) error { return os.WriteFile(file, []byte("fifteen\n"), 0o600) },
		"zero":    func(file string) error { return os.WriteFile(file, []byte("0\n"), 0o600) },
		"missing": func(file string) error { return os.Mkdir(filepath.Join(filepath.Dir(file), "base"), 0o700) },
	} {
		dir := t.TempDir()
		file := filepath.Join(dir, ".dev", "data", "PG_VERSION")
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o700), damage(file)); err != nil {
			t.Fatal(err)
		}
		p := startProcess(t, dir, map[string]string{"PORT": "0"}, "-dev")
		if code := p.exit(); code != 1 || !strings.Contains(p.stderr.String(), file+" is missing or damaged") ||
			!strings.Contains(p.stderr.String(), "move the folder away") || strings.Contains(p.stderr.String(), "strconv") {
			t.Errorf("%s: exit code %d, %s", name, code, p.stderr)
		}
	}
}

func TestPrivatePostgresInterrupted(t *testing.T) {
	t.Parallel()
	checkLeaks(t)
	dir := t.TempDir()
	for _, sign := range []string{"data.new/PG_VERSION", "data/postmaster.pid"} { // of initdb, and of the server
		// What is left when even rollcall was killed during initdb.
		halfMade := filepath.Join(dir, "data.new", "rubbish")
		if err := os.MkdirAll(halfMade, 0o700); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() {
			// The delay makes the server too slow to be ready before it is cancelled. A session
			// that has got into it ends with it: sooner than the server would be killed.
			_, err := startPostgres(ctx, dir, "fsync=off", "post_auth_delay=5")
			ended <- err
		}()
		waitFor(t, sign, func() bool { return exists(filepath.Join(dir, sign)) })
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled at %s: got %v, want %v", sign, err, context.Canceled)
		}
		assertNoServer(t, dir)
		if exists(halfMade) {
			t.Error("what was half made is still there")
		}
	}
	stopPrivate(t, startPrivate(t, dir))
}

func TestPrivatePostgresThatFails(t *testing.T) {
	t.Parallel()
	checkLeaks(t)
	dir := t.TempDir()
	_, err := startPostgres(t.Context(), dir, "no_such_setting=1")
	for _, want := range []string{"exit status 1", "postgres.log", `unrecognized configuration parameter "no_such_setting"`} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
	assertNoServer(t, dir)
}

// Not parallel: a program that was just written can't be started ("text file busy")
// while a child of another test, just forked, has it open for writing as well.
func TestChoosePrograms(t *testing.T) {
	fake := func(version string) string {
		dir := t.TempDir()
		script := fmt.Sprintf("#!/bin/sh\necho 'postgres (PostgreSQL) %s (Debian)'\n", version)
		for _, name := range []string{"postgres", "initdb"} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o700); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	v13, v14, v17, v17too, v9 := fake("13.4"), fake("14beta1"), fake("17.2"), fake("17.0"), fake("9.6.1")
	empty := t.TempDir()
	for _, test := range []struct {
		name    string
		folders []string
		want    int
		found   string
		err     string
	}{
		{"the first", []string{empty, v13, v17, v14}, 0, v17, ""},
		{"the first of the version", []string{v14, v17, v17too}, 17, v17, ""},
		{"that of the data", []string{v17, v14}, 14, v14, ""},
		{"not that of the data", []string{v13, v17, v14}, 15, "", "made by PostgreSQL 15, and no PostgreSQL 15 that"},
		{"data too old", []string{v13, v17}, 13, "", "supports (14 or newer)"},
		{"too old", []string{v9, v13}, 0, "", "no server of PostgreSQL 14 or newer"},
		{"none", []string{empty, "", "no/such"}, 0, "", "install the package postgresql"},
	} {
		t.Setenv("PGBIN", strings.Join(test.folders, ":"))
		p := &privatePostgres{dir: empty, version: test.want}
		err := p.choosePrograms(t.Context())
		if p.programs != test.found || (err == nil) != (test.err == "") || err != nil && !strings.Contains(err.Error(), test.err) {
			t.Errorf("%s: got %q, %v, want %q, %s", test.name, p.programs, err, test.found, test.err)
		}
	}

	// PATH comes before the usual folders, and PGBIN alone if it is set.
	t.Setenv("PATH", v17)
	for pgbin, want := range map[string]string{"": v17, v14: v14, empty: ""} {
		t.Setenv("PGBIN", pgbin)
		p := &privatePostgres{dir: empty}
		if err := p.choosePrograms(t.Context()); p.programs != want || (err == nil) != (want != "") {
			t.Errorf("PGBIN=%s: got %q, %v, want %q", pgbin, p.programs, err, want)
		}
	}
}
