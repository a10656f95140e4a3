package main

import (
	"bytes"
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"os"
	osuser "os/user" // user is a type of ours
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// A devDatabase is the private PostgreSQL of rollcall -dev and of the tests: made,
// started and stopped by this process, so that there is nothing to configure and
// nothing left behind. All that it has is in one folder:
//
//	data/          the database cluster, kept between runs
//	data.new/      one that initdb is still making; renamed to data when complete,
//	               so that a kill in between leaves nothing half made
//	run/           the unix socket; there is no TCP port that could clash
//	postgres.log   what PostgreSQL had to say in this run
//	jwt_secret     see [devSecret]
//	lock           locked as long as a rollcall uses the folder; holds its pid
//	lock.postgres  locked as long as a process of PostgreSQL runs on the data
//
// There is no password, because nobody else gets in: the folder is closed to all
// other users of the machine.
//
// A lock is the kernel's: it goes when the last process with the open file ends,
// however it ends. PostgreSQL inherits lock.postgres, so whoever gets both locks
// knows that nothing of an earlier run is alive. A pid in a file can't prove that:
// in a container, the small pids soon belong to other processes.
//
// PostgreSQL must not outlive rollcall, not even after kill -9, and it refuses to
// run as root: devdb_linux.go tells how Linux helps with both.
type devDatabase struct {
	dir        string              // absolute, as PostgreSQL runs elsewhere
	account    *syscall.Credential // who PostgreSQL runs as; nil is our own user
	programs   string              // the folder of PostgreSQL's programs
	sockets    string              // the folder of the unix socket
	lock       *os.File
	serverLock *os.File
	log        *os.File
	server     *devProcess
	stopOnce   sync.Once
	stopErr    error
}

const (
	devOldest      = 14  // the oldest PostgreSQL that rollcall supports
	devSocketLimit = 103 // bytes of a socket's path; Linux takes 107, macOS and the BSDs 103
)

// startDevDatabase starts PostgreSQL with its data in dir (made if absent), and
// waits until it answers. Each of settings, as "name=value", is a setting of the
// server. Cancelling ctx ends the start, but not a database that has started.
func startDevDatabase(ctx context.Context, dir string, settings ...string) (_ *devDatabase, err error) {
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	d := &devDatabase{dir: dir}
	defer func() {
		if err != nil {
			d.stop() // its error would only hide the first one
			err = fmt.Errorf("the private PostgreSQL in %s: %w", dir, err)
		}
	}()
	if err := d.openFolder(ctx); err != nil {
		return nil, err
	}
	version, err := d.dataVersion()
	if err != nil {
		return nil, err
	}
	if d.programs, err = findPrograms(programFolders(), version); err != nil {
		return nil, err
	}
	if version == 0 {
		if err := d.initialize(ctx); err != nil {
			return nil, err
		}
	}
	if err := d.startServer(settings); err != nil {
		return nil, err
	}
	if err := d.waitReady(ctx); err != nil {
		return nil, err
	}
	return d, nil
}

// unsetLibpq removes the variables of libpq, which lib/pq reads by itself, from the
// environment: none has a say in a private database. Some can't be overridden by a
// connection string (PGHOSTADDR), or go before one (PGSERVICE).
func unsetLibpq() {
	for _, v := range os.Environ() {
		if name, _, _ := strings.Cut(v, "="); isLibpq(name) {
			os.Unsetenv(name)
		}
	}
}

// url returns the connection string for lib/pq.
func (d *devDatabase) url() string { return d.urlOf("rollcall") }

func (d *devDatabase) urlOf(database string) string {
	host := strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(d.sockets)
	return fmt.Sprintf("host='%s' port=5432 user=rollcall dbname=%s sslmode=disable", host, database)
}

// exited returns a channel that is closed when the server has ended, wanted or not.
func (d *devDatabase) exited() <-chan struct{} { return d.server.done }

// stop ends the server, and returns when the last of its processes is gone. To
// call it again does nothing.
func (d *devDatabase) stop() error {
	d.stopOnce.Do(func() { d.stopErr = d.shutDown() })
	return d.stopErr
}

// shutDown undoes what a start has done, however far it came.
func (d *devDatabase) shutDown() (err error) {
	if d.server != nil {
		if err = d.server.stop(); err != nil {
			err = fmt.Errorf("PostgreSQL did not end well (%w): see %s", err, d.log.Name())
		}
	}
	if d.sockets != "" {
		err = errors.Join(err, os.RemoveAll(d.sockets))
	}
	d.log.Close() // of a nil file, it does nothing
	if d.serverLock != nil {
		// To unlock it would unlock it for all who inherited it, so only close it.
		// When it can be locked anew, they are gone: the children of a server that
		// was killed take a moment.
		d.serverLock.Close()
		f, lockErr := waitLock(context.Background(), d.path("lock.postgres"))
		f.Close()
		err = errors.Join(err, lockErr)
	}
	if d.lock != nil {
		d.lock.Truncate(0)
		// To close it would not be enough: a child that another goroutine is just
		// forking has it open too, until it executes its program.
		syscall.Flock(int(d.lock.Fd()), syscall.LOCK_UN)
		d.lock.Close()
	}
	return err
}

func (d *devDatabase) path(name string) string { return filepath.Join(d.dir, name) }

// openFolder makes the folder if need be, closes it to others, and locks it.
func (d *devDatabase) openFolder(ctx context.Context) (err error) {
	if err := os.MkdirAll(d.dir, 0o700); err != nil {
		return err
	}
	if err := os.Chmod(d.dir, 0o700); err != nil {
		return fmt.Errorf("%w: it belongs to another user; was rollcall run as root before?", err)
	}
	if d.lock, err = lockFile(d.path("lock")); errors.Is(err, syscall.EWOULDBLOCK) {
		pid, _ := os.ReadFile(d.path("lock"))
		return fmt.Errorf("another rollcall uses this folder (process %s): stop that one, or start this one elsewhere", cmp.Or(string(pid), "unknown"))
	} else if err != nil {
		return err
	}
	d.lock.Truncate(0) // it may hold the pid of one that was killed
	if _, err := fmt.Fprint(d.lock, os.Getpid()); err != nil {
		return err
	}
	if d.serverLock, err = waitLock(ctx, d.path("lock.postgres")); err != nil {
		return fmt.Errorf("the PostgreSQL of an earlier run has not ended (%w): end it with kill -INT $(head -1 '%s')", err, d.path("data/postmaster.pid"))
	}
	if d.log, err = os.OpenFile(d.path("postgres.log"), os.O_CREATE|os.O_WRONLY|os.O_TRUNC|os.O_APPEND, 0o600); err != nil {
		return err
	}
	if d.account, err = serverAccount(d.dir); err != nil {
		return err
	}
	return d.own(d.dir)
}

// lockFile opens and locks a file, made if absent. The error is EWOULDBLOCK when
// somebody else has it locked.
func lockFile(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	return f, nil
}

// waitLock is lockFile for a lock that will be released soon.
func waitLock(ctx context.Context, name string) (*os.File, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		f, err := lockFile(name)
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return f, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// serverAccount returns who PostgreSQL runs as: if we are root, the owner of the
// folder, or if that is root too, the user postgres or else nobody.
func serverAccount(dir string) (*syscall.Credential, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	info, err := os.Stat(dir)
	if err != nil {
		return nil, err
	}
	owner := info.Sys().(*syscall.Stat_t).Uid
	u, err := osuser.LookupId(fmt.Sprint(owner))
	if err != nil || owner == 0 {
		u, err = osuser.Lookup("postgres")
	}
	if err != nil {
		u, err = osuser.Lookup("nobody")
	}
	if err != nil {
		return nil, errors.New("PostgreSQL refuses to run as root, and there is no user postgres or nobody: run rollcall as an ordinary user")
	}
	uid, uidErr := strconv.ParseUint(u.Uid, 10, 32)
	gid, gidErr := strconv.ParseUint(u.Gid, 10, 32)
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, errors.Join(uidErr, gidErr)
}

// own hands a file over to the user that PostgreSQL runs as.
func (d *devDatabase) own(name string) error {
	if d.account == nil {
		return nil
	}
	return d.refused(os.Chown(name, int(d.account.Uid), int(d.account.Gid)))
}

// refused says what to do if root may not do what root usually may.
func (d *devDatabase) refused(err error) error {
	if err == nil || d.account == nil {
		return err
	}
	return fmt.Errorf("PostgreSQL refuses to run as root, and running it as user %d failed (%w): run rollcall as an ordinary user", d.account.Uid, err)
}

// dataVersion returns the major version of the PostgreSQL that made the data, 0 if
// there is none yet.
func (d *devDatabase) dataVersion() (int, error) {
	name := d.path("data/PG_VERSION")
	b, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		if files, _ := os.ReadDir(d.path("data")); len(files) == 0 {
			return 0, nil
		}
	} else if err != nil {
		return 0, err
	}
	major, _, _ := strings.Cut(strings.TrimSpace(string(b)), ".") // up to 9.6, a version was two numbers
	version, err := strconv.Atoi(major)
	if err != nil || version < 1 {
		return 0, fmt.Errorf("%s is missing or damaged: it names the PostgreSQL that made the data, such as 15; "+
			"restore the data from a copy, or move the folder away to start afresh", name)
	}
	return version, nil
}

// initialize makes the cluster.
func (d *devDatabase) initialize(ctx context.Context) error {
	fresh := d.path("data.new")
	if err := d.emptyFolder(fresh); err != nil {
		return err
	}
	initdb, err := d.start("initdb", "--pgdata="+fresh, "--username=rollcall", "--auth=trust",
		"--encoding=UTF8", "--locale=C", "--lc-ctype="+devCType,
		"--no-sync") // faster, and nobody misses an empty database if the machine crashes now
	if err != nil {
		return err
	}
	select {
	case <-initdb.done:
	case <-ctx.Done():
		initdb.stop()
		return ctx.Err()
	}
	if initdb.err != nil {
		return d.failure("initdb", initdb.err)
	}
	return os.Rename(fresh, d.path("data"))
}

// emptyFolder makes an empty folder that belongs to PostgreSQL alone.
func (d *devDatabase) emptyFolder(name string) error {
	if err := os.RemoveAll(name); err != nil {
		return err
	}
	if err := os.Mkdir(name, 0o700); err != nil {
		return err
	}
	return d.own(name)
}

// startServer starts the server, and does not wait until it answers.
func (d *devDatabase) startServer(settings []string) (err error) {
	d.sockets = d.path("run")
	// A comma would be read as the end of the first of several hosts.
	if len(d.sockets+"/.s.PGSQL.5432") > devSocketLimit || strings.Contains(d.sockets, ",") {
		if d.sockets, err = os.MkdirTemp("", "rollcall-"); err != nil {
			return err
		}
	}
	if err := d.emptyFolder(d.sockets); err != nil {
		return err
	}
	// A killed server leaves this file, and the next one would refuse to start if
	// the pid in it is in use by whomever. We have the locks, and know better.
	if err := os.Remove(d.path("data/postmaster.pid")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	args := []string{"-D", d.path("data")}
	for _, s := range slices.Concat(settings, []string{ // the last one wins
		"listen_addresses=", "port=5432", "unix_socket_permissions=0700",
		`unix_socket_directories="` + strings.ReplaceAll(d.sockets, `"`, `""`) + `"`,
		"logging_collector=off", "log_destination=stderr",
	}) {
		args = append(args, "-c", s)
	}
	d.server, err = d.start("postgres", args...)
	return err
}

// waitReady waits until the server answers, and makes the database if need be.
func (d *devDatabase) waitReady(ctx context.Context) error {
	db, err := sql.Open("postgres", d.urlOf("postgres"))
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
		if err == nil {
			return nil
		}
		if pq.As(err) != nil && pq.As(err, pqerror.CannotConnectNow) == nil {
			return err // it answers, and not that it is still starting
		}
		select {
		case <-d.server.done:
			return d.failure("PostgreSQL", d.server.err)
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// failure says that a program failed, and what it wrote last.
func (d *devDatabase) failure(program string, cause error) error {
	log, _ := os.ReadFile(d.log.Name())
	lines := bytes.Split(bytes.TrimSpace(log), []byte("\n"))
	last := bytes.Join(lines[max(0, len(lines)-10):], []byte("\n"))
	err := fmt.Errorf("%s failed (%w); %s ends with:\n%s", program, cause, d.log.Name(), last)
	if d.account != nil && bytes.Contains(last, []byte("Permission denied")) {
		err = fmt.Errorf("%w\nAs rollcall is root, PostgreSQL runs as user %d: move to a folder that this user may enter, or run rollcall as an ordinary user", err, d.account.Uid)
	}
	return err
}
