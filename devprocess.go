package main

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"syscall"
	"time"
)

// PostgreSQL's programs: where they are, and how to run them so that they end
// with us.

// programFolders lists where PostgreSQL's programs may be. Debian, Red Hat and
// Homebrew keep them off PATH, to have several versions side by side.
func programFolders() []string {
	folders := filepath.SplitList(os.Getenv("PATH"))
	for _, pattern := range []string{
		"/usr/lib/postgresql/*/bin",
		"/usr/pgsql-*/bin",
		"/opt/homebrew/opt/postgresql*/bin",
		"/usr/local/opt/postgresql*/bin",
	} {
		found, _ := filepath.Glob(pattern) // its only error is a bad pattern
		folders = append(folders, found...)
	}
	return folders
}

var postgresVersion = regexp.MustCompile(`\(PostgreSQL\) (\d+)`)

// findPrograms returns the one of folders that has PostgreSQL's programs of major
// version want, since no other version can read its data; if want is 0, the newest.
func findPrograms(folders []string, want int) (string, error) {
	newest, byVersion := 0, make(map[int]string)
	for _, folder := range folders {
		if _, err := exec.LookPath(filepath.Join(folder, "initdb")); err != nil || !filepath.IsAbs(folder) {
			continue
		}
		out, _ := exec.Command(filepath.Join(folder, "postgres"), "--version").Output()
		if m := postgresVersion.FindSubmatch(out); m != nil {
			v, _ := strconv.Atoi(string(m[1]))
			byVersion[v] = cmp.Or(byVersion[v], folder) // PATH comes first
			newest = max(newest, v)
		}
	}
	switch {
	case newest == 0:
		return "", errors.New("the programs of the PostgreSQL server were not found: install the package postgresql (postgresql-server on Fedora), or set DATABASE_URL")
	case want == 0 && newest < devOldest:
		return "", fmt.Errorf("PostgreSQL %d is too old: install version %d or newer", newest, devOldest)
	case want != 0 && want < devOldest:
		return "", fmt.Errorf("the data was made by PostgreSQL %d, and rollcall needs %d or newer: move the folder away to start afresh", want, devOldest)
	case want != 0 && byVersion[want] == "":
		return "", fmt.Errorf("the data was made by PostgreSQL %d, and PostgreSQL %d is installed: install version %[1]d too, or move the folder away to start afresh", want, newest)
	}
	return byVersion[cmp.Or(want, newest)], nil
}

// A devProcess is a running program of PostgreSQL.
type devProcess struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	err  error         // how it ended; set before that
}

// start starts one of PostgreSQL's programs.
func (d *devDatabase) start(program string, args ...string) (*devProcess, error) {
	p := &devProcess{done: make(chan struct{})}
	started := make(chan error)
	go func() {
		// Linux ends PostgreSQL when the thread that has started it ends, which may
		// be long before the process does: so this goroutine keeps its thread.
		runtime.LockOSThread()
		var err error
		for _, attr := range processAttributes(d.account) {
			p.cmd = exec.Command(filepath.Join(d.programs, program), args...)
			p.cmd.Dir = "/" // PostgreSQL's user may not be allowed into ours
			// No more than this: PGDATA, PGOPTIONS or LANG would have their effect.
			p.cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C", "TZ=UTC"}
			p.cmd.Stdout, p.cmd.Stderr = d.log, d.log
			p.cmd.ExtraFiles = []*os.File{d.serverLock}
			p.cmd.SysProcAttr = attr
			if err = p.cmd.Start(); err == nil {
				break
			}
		}
		started <- err
		if err == nil {
			p.err = p.cmd.Wait()
			close(p.done)
		}
	}()
	if err := <-started; err != nil {
		return nil, d.refused(err)
	}
	return p, nil
}

// stop ends the process, ever less politely, and returns how it ended.
func (p *devProcess) stop() error {
	for _, s := range []struct {
		signal   syscall.Signal
		patience time.Duration
	}{
		{syscall.SIGINT, 15 * time.Second}, // a fast shutdown: ends all sessions, and leaves the data in order
		{syscall.SIGQUIT, 5 * time.Second}, // an immediate one: the next start has to recover the data
		{syscall.SIGKILL, 0},
	} {
		p.cmd.Process.Signal(s.signal) // it fails if the process has just ended
		select {
		case <-p.done:
			return p.err
		case <-time.After(s.patience):
		}
	}
	<-p.done
	return p.err
}
