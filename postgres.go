package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/exec"
	osuser "os/user" // user is a type of ours
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// A privatePostgres is the PostgreSQL of rollcall -dev and of the tests: made, started
// and stopped by this process; the zero value is none. All that it has is in one folder,
// which is closed to all other users of the machine, so there is no password, and no TCP port:
//
//	data/         the database cluster with its unix socket, kept between runs
//	data.new/     a cluster that initdb still makes; renamed to data when complete
//	postgres.log  the log of this run
//	jwt_secret    see [devSecret]
//	lock          locked while a rollcall or its PostgreSQL runs; holds rollcall's pid
//
// PostgreSQL inherits the lock, and the kernel releases it when the last process that
// has it ends, however it ends. A pid alone proves nothing: small ones are soon used again.
type privatePostgres struct {
	dir       string   // absolute, as PostgreSQL runs elsewhere
	settings  []string // of the server, "name=value" each
	version   int      // major, of the PostgreSQL that made the data; 0 if there is none yet
	programs  string   // the folder of PostgreSQL's programs
	sockets   string   // the folder of the unix socket, as clients see it
	link      string   // sockets, if it is a symbolic link that goes with the server
	lock, log *os.File
	account   *syscall.Credential // the user that PostgreSQL runs as; nil is our own
	cancel    context.CancelFunc  // stops the server
	done      chan struct{}       // closed when the server has ended; nil before its start
	err       error               // how it ended; set before done is closed
}

const (
	// oldestPostgres is the oldest major version that rollcall supports.
	oldestPostgres = 14
	// usualFolders are where Debian, Red Hat and Homebrew keep PostgreSQL's programs, off
	// PATH, to have several versions side by side.
	usualFolders = "/usr/lib/postgresql/*/bin:/usr/pgsql-*/bin:/opt/homebrew/opt/postgresql*/bin:/usr/local/opt/postgresql*/bin"
)

// startPostgres starts PostgreSQL with its data in dir, made if absent, and returns when
// it answers. Each of settings, as "name=value", is a setting of the server. Cancelling
// ctx ends the start, but not a server that has started.
func startPostgres(ctx context.Context, dir string, settings ...string) (*privatePostgres, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	p := &privatePostgres{dir: dir, settings: settings}
	for _, step := range []func(context.Context) error{
		p.lockFolder, p.choosePrograms, p.chooseAccount, p.initialize, p.startServer, p.waitReady,
	} {
		if err := step(ctx); err != nil {
			p.stop() // its error would only hide the first one
			return nil, fmt.Errorf("the private PostgreSQL in %s: %w", dir, cmp.Or(ctx.Err(), err))
		}
	}
	return p, nil
}

// url returns the connection string for lib/pq.
func (p *privatePostgres) url() string {
	return setting("host", p.sockets) + "port=5432 user=rollcall dbname=rollcall sslmode=disable"
}

// stop ends the server, if it was started, and returns its error when it has ended.
func (p *privatePostgres) stop() error {
	if p.done != nil {
		p.cancel()
		<-p.done
	}
	p.log.Close() // of a nil file, it does nothing
	p.lock.Close()
	return errors.Join(p.err, os.RemoveAll(p.link)) // of "", it removes nothing
}

func (p *privatePostgres) path(name string) string { return filepath.Join(p.dir, name) }

// lockFolder makes the folder if it is absent, closes it to other users, and locks it. A
// PostgreSQL that a rollcall has left gets 10 s to end.
func (p *privatePostgres) lockFolder(ctx context.Context) (err error) {
	if err := errors.Join(os.MkdirAll(p.dir, 0o700), os.Chmod(p.dir, 0o700)); err != nil {
		return err
	}
	if p.lock, err = os.OpenFile(p.path("lock"), os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return err
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		err = syscall.Flock(int(p.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err != syscall.EWOULDBLOCK || ctx.Err() != nil || time.Now().After(deadline) {
			break
		}
	}
	if err == syscall.EWOULDBLOCK {
		pid, _ := os.ReadFile(p.path("lock"))
		return fmt.Errorf("another rollcall (process %s) or the PostgreSQL that it left uses this folder: stop it, "+
			"the latter with kill -INT $(head -1 '%s'), or start this one elsewhere", pid, p.path("data/postmaster.pid"))
	}
	if err != nil {
		return err
	}
	if p.log, err = os.OpenFile(p.path("postgres.log"), os.O_CREATE|os.O_WRONLY|os.O_TRUNC|os.O_APPEND, 0o600); err != nil {
		return err
	}
	return os.WriteFile(p.path("lock"), fmt.Append(nil, os.Getpid()), 0o600)
}

// choosePrograms finds the programs of the PostgreSQL that made the data, as no other
// version can read it, or of any if there is no data yet.
func (p *privatePostgres) choosePrograms(context.Context) error {
	if files, _ := os.ReadDir(p.path("data")); len(files) > 0 {
		name := p.path("data/PG_VERSION")
		b, _ := os.ReadFile(name)
		if _, err := fmt.Sscan(string(b), &p.version); err != nil || p.version < 1 {
			return fmt.Errorf("%s is missing or damaged: it names the PostgreSQL that made the data, such as 15; "+
				"restore the data from a copy, or move the folder away to start afresh", name)
		}
	}
	for _, folder := range filepath.SplitList(cmp.Or(os.Getenv("PGBIN"), os.Getenv("PATH")+":"+usualFolders)) {
		if !filepath.IsAbs(folder) { // as os/exec, run nothing from the working directory
			continue
		}
		found, _ := filepath.Glob(filepath.Join(folder, "postgres")) // its only error is a bad pattern
		slices.Reverse(found)                                        // so that the newest comes first
		for _, program := range found {
			var version int
			out, _ := exec.Command(program, "--version").Output()
			fmt.Sscanf(string(out), "postgres (PostgreSQL) %d", &version) // 0 if it is something else
			if version >= oldestPostgres && (version == p.version || p.version == 0) {
				p.programs = filepath.Dir(program)
				return nil
			}
		}
	}
	if p.version != 0 {
		return fmt.Errorf("the data was made by PostgreSQL %[1]d, and no PostgreSQL %[1]d that rollcall supports (%d or newer) was found: "+
			"install it, or move the folder away to start afresh", p.version, oldestPostgres)
	}
	return fmt.Errorf("no server of PostgreSQL %d or newer was found: install the package postgresql (postgresql-server on Fedora), "+
		"name the folder of its programs in PGBIN, or set DATABASE_URL", oldestPostgres)
}

// chooseAccount chooses another user for PostgreSQL if rollcall is root, and gives it the
// folder: the folder's owner or, as PostgreSQL refuses to run as root, postgres or nobody.
func (p *privatePostgres) chooseAccount(context.Context) error {
	if os.Geteuid() != 0 {
		return nil
	}
	info, err := os.Stat(p.dir)
	if err != nil {
		return err
	}
	account, err := osuser.LookupId(fmt.Sprint(info.Sys().(*syscall.Stat_t).Uid))
	if err != nil || account.Uid == "0" {
		account, err = osuser.Lookup("postgres")
	}
	if err != nil {
		account, err = osuser.Lookup("nobody")
	}
	if err != nil {
		return fmt.Errorf("PostgreSQL refuses to run as root: run rollcall as an ordinary user (%w)", err)
	}
	p.account = new(syscall.Credential)
	if _, err := fmt.Sscan(account.Uid+" "+account.Gid, &p.account.Uid, &p.account.Gid); err != nil {
		return err
	}
	return os.Chown(p.dir, int(p.account.Uid), int(p.account.Gid))
}

// initialize makes the cluster if there is none. A kill leaves nothing half made in data.
func (p *privatePostgres) initialize(ctx context.Context) error {
	if p.version != 0 {
		return nil
	}
	fresh := p.path("data.new")
	if err := os.RemoveAll(fresh); err != nil {
		return err
	}
	ctype := "C.UTF-8" // in C, lower() would fold ASCII alone
	if runtime.GOOS == "darwin" {
		ctype = "en_US.UTF-8"
	}
	err := p.run(ctx, "initdb", "--pgdata="+fresh, "--username=rollcall", "--auth=trust",
		"--encoding=UTF8", "--locale=C", "--lc-ctype="+ctype,
		"--no-sync") // faster, and an empty database may be lost in a crash of the machine
	if err := cmp.Or(err, ctx.Err()); err != nil {
		return err
	}
	return os.Rename(fresh, p.path("data"))
}

// startServer starts the server, and does not wait until it answers.
func (p *privatePostgres) startServer(context.Context) error {
	// A killed server leaves these, and the next one would refuse to start if any
	// process has the pid in them. The lock tells that the server is gone.
	os.Remove(p.path("data/postmaster.pid"))
	os.Remove(p.path("data/.s.PGSQL.5432.lock"))
	args := []string{"-D", p.path("data")}
	for _, setting := range append([]string{
		"listen_addresses=", "port=5432", "unix_socket_directories=.", "unix_socket_permissions=0700",
	}, p.settings...) { // the last one wins
		args = append(args, "-c", setting)
	}
	ctx, cancel := context.WithCancel(context.Background())
	p.cancel, p.done = cancel, make(chan struct{})
	go func() {
		defer close(p.done)
		p.err = p.run(ctx, "postgres", args...)
	}()
	p.sockets = p.path("data")
	// Clients take no path of a socket over 107 bytes (Linux) or 103 (macOS and the BSDs), and
	// a comma would end the name of a host.
	if len(p.sockets+"/.s.PGSQL.5432") > 103 || strings.Contains(p.sockets, ",") {
		p.link = filepath.Join(os.TempDir(), "rollcall-"+rand.Text())
		p.sockets = p.link
		return os.Symlink(p.path("data"), p.link)
	}
	return nil
}

// waitReady waits until the server answers, and makes the database if it is absent.
func (p *privatePostgres) waitReady(ctx context.Context) error {
	db, err := sql.Open("postgres", p.url()+" dbname=postgres")
	if err != nil {
		return err
	}
	defer db.Close()
	for {
		var exists bool
		err := db.QueryRowContext(ctx, "SELECT EXISTS (SELECT FROM pg_database WHERE datname = 'rollcall')").Scan(&exists)
		if err == nil && !exists {
			_, err = db.ExecContext(ctx, "CREATE DATABASE rollcall")
		}
		if err == nil || pq.As(err) != nil && pq.As(err, pqerror.CannotConnectNow) == nil {
			return err // any answer but that it still starts
		}
		select {
		case <-p.done:
			return fmt.Errorf("the server has ended: %w", p.err)
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// processAttributes returns how to start a program, the best way first; for Linux, see
// postgres_linux.go. In a process group of its own, Ctrl-C does not reach PostgreSQL, which
// requests in flight still need.
var processAttributes = func(account *syscall.Credential) []*syscall.SysProcAttr {
	return []*syscall.SysProcAttr{{Credential: account, Setpgid: true}}
}

// run runs one of PostgreSQL's programs until it ends, or interrupts it when ctx ends. The
// error quotes the end of the log.
func (p *privatePostgres) run(ctx context.Context, program string, args ...string) (err error) {
	// Linux ends the program with the thread that started it, so this goroutine keeps its thread.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for _, attr := range processAttributes(p.account) {
		cmd := exec.CommandContext(ctx, filepath.Join(p.programs, program), args...)
		cmd.Cancel = func() error {
			cmd.Process.Signal(syscall.SIGINT) // for a server, a fast shutdown: it ends all sessions
			return os.ErrProcessDone           // so that Run returns how it ends, not ctx.Err()
		}
		cmd.WaitDelay = 15 * time.Second // then it is killed
		cmd.Dir = "/"                    // PostgreSQL's user may not be allowed into ours
		// No more than this: PGDATA or LANG would have their effect.
		cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C", "TZ=UTC"}
		cmd.Stdout, cmd.Stderr = p.log, p.log
		cmd.ExtraFiles = []*os.File{p.lock}
		cmd.SysProcAttr = attr
		if err = cmd.Run(); cmd.Process != nil {
			break
		}
	}
	if err == nil {
		return nil
	}
	log, _ := os.ReadFile(p.log.Name())
	lines := strings.Split(strings.TrimSpace(string(log)), "\n")
	end := strings.Join(lines[max(0, len(lines)-10):], "\n")
	return fmt.Errorf("%s failed (%w); %s ends with:\n%s", program, err, p.log.Name(), end)
}
