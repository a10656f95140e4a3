package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// What a service and systemd tell one another, by hand from sd_listen_fds(3),
// sd_notify(3) and sd_watchdog_enabled(3): a listening socket that is passed on,
// and datagrams about how the service is doing. It is all in variables of the
// environment. Where they are unset, nobody manages the process, and nothing in
// here does anything.

// managerVariables are meant for one process, so that they are not read from a
// file, and not handed on to children.
var managerVariables = []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"}

// firstPassed is the file descriptor of the first socket that is passed:
// SD_LISTEN_FDS_START of <systemd/sd-daemon.h>.
const firstPassed = 3

// A manager is what started the process and looks after it. The zero manager is
// nobody.
type manager struct {
	listener net.Listener  // the socket that it passed; nil if it passed none
	notify   string        // where it wants to be told; empty if it does not
	watchdog time.Duration // it restarts a process silent for this long; 0 if it does not
}

// newManager reads the variables of the manager, and removes them from the
// environment. It takes over the socket that was passed. The error is for whoever
// configured the manager.
func newManager(getenv func(string) string) (m manager, err error) {
	defer func() {
		for _, name := range managerVariables {
			os.Unsetenv(name)
		}
	}()
	m.notify = getenv("NOTIFY_SOCKET")
	if m.watchdog, err = watchdogInterval(getenv); err != nil {
		return manager{}, err
	}
	// Without LISTEN_PID there are no sockets, and with the one of another process
	// they are not ours: we are a child that has inherited its environment.
	if pid := getenv("LISTEN_PID"); pid == "" || getenv("LISTEN_FDS") == "" {
		return m, nil
	} else if ours, err := isOurs(pid); err != nil || !ours {
		return m, err
	}
	if n, err := strconv.Atoi(getenv("LISTEN_FDS")); err != nil || n != 1 {
		return manager{}, fmt.Errorf("LISTEN_FDS: %.80q; rollcall takes exactly 1 socket", getenv("LISTEN_FDS"))
	}
	m.listener, err = takeListener(firstPassed)
	return m, err
}

// isOurs reports whether pid is this process.
func isOurs(pid string) (bool, error) {
	n, err := strconv.Atoi(pid)
	if err != nil || n <= 0 {
		return false, fmt.Errorf("%.80q is not the id of a process", pid)
	}
	return n == os.Getpid(), nil
}

func watchdogInterval(getenv func(string) string) (time.Duration, error) {
	usec := getenv("WATCHDOG_USEC")
	if usec == "" {
		return 0, nil
	}
	if pid := getenv("WATCHDOG_PID"); pid != "" {
		if ours, err := isOurs(pid); err != nil || !ours {
			return 0, err
		}
	}
	n, err := strconv.ParseInt(usec, 10, 64)
	if err != nil || n <= 0 || n > int64(365*24*time.Hour/time.Microsecond) {
		return 0, fmt.Errorf("WATCHDOG_USEC: %.80q is not a number of microseconds", usec)
	}
	return time.Duration(n) * time.Microsecond, nil
}

// takeListener makes a listener of a file descriptor, which has to be a stream
// socket that listens, and closes the descriptor: the listener has one of its own.
func takeListener(fd int) (net.Listener, error) {
	// Look before touching it: if the environment is wrong, it may be any file of
	// this process.
	kind, err := syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_TYPE)
	if err != nil {
		return nil, fmt.Errorf("LISTEN_FDS: file descriptor %d is not a socket: %w", fd, err)
	}
	listens, err := syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_ACCEPTCONN)
	if err != nil || kind != syscall.SOCK_STREAM || listens == 0 {
		return nil, fmt.Errorf("LISTEN_FDS: file descriptor %d is not a stream socket that listens; "+
			"a socket unit needs ListenStream= and Accept=no", fd)
	}
	syscall.CloseOnExec(fd)
	f := os.NewFile(uintptr(fd), "LISTEN_FDS")
	defer f.Close()
	return net.FileListener(f)
}

// tell sends the manager assignments such as READY=1, a line each. That it could
// not be told is no reason to stop serving, so an error goes to the log alone.
func (m manager) tell(log *slog.Logger, assignments ...string) {
	if m.notify == "" {
		return
	}
	if err := sendDatagram(m.notify, strings.Join(assignments, "\n")); err != nil {
		log.Warn("the service manager can't be told", "message", assignments[0], "error", err.Error())
	}
}

// sendDatagram sends a message to a socket of the file system or, if its name
// begins with @, to one of Linux's abstract names, which package net knows by the
// same sign.
func sendDatagram(socket, message string) error {
	if !strings.HasPrefix(socket, "/") && !strings.HasPrefix(socket, "@") {
		return errors.New("NOTIFY_SOCKET is neither an absolute path nor an abstract name")
	}
	conn, err := net.Dial("unixgram", socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Second)) // its queue may be full
	_, err = conn.Write([]byte(message))
	return err
}

// watch calls alive until ctx ends, at half the manager's interval, as
// sd_watchdog_enabled(3) advises, but only when check has found the service alive.
// After a check that failed, the next one follows soon, to have more than one
// before the manager loses its patience.
func watch(ctx context.Context, interval time.Duration, check func(context.Context) error, alive func(error)) {
	for {
		attempt, cancel := context.WithTimeout(ctx, interval/2)
		err := check(attempt)
		cancel()
		if ctx.Err() != nil {
			return
		}
		alive(err)
		pause := interval / 2
		if err != nil {
			pause = interval / 16
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
	}
}

// dialSelf connects to a listener of this process, where it can be reached from
// this host.
func dialSelf(ctx context.Context, addr net.Addr) (net.Conn, error) {
	var d net.Dialer
	tcp, ok := addr.(*net.TCPAddr)
	if !ok || !tcp.IP.IsUnspecified() {
		return d.DialContext(ctx, addr.Network(), addr.String())
	}
	// One that listens on [::] mostly takes IPv4 too, and the host may have no other.
	port := strconv.Itoa(tcp.Port)
	conn, err := d.DialContext(ctx, "tcp", net.JoinHostPort("127.0.0.1", port))
	if err != nil && tcp.IP.To4() == nil {
		return d.DialContext(ctx, "tcp", net.JoinHostPort("::1", port))
	}
	return conn, err
}
