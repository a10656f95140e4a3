package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// What a service and systemd tell one another, by sd_listen_fds(3), sd_notify(3) and
// sd_watchdog_enabled(3): a listening socket that is passed on, and datagrams about how
// the service is doing. Where the variables are unset, nothing in here does anything.

// managerVariables are meant for one process: they are not read from a file, and not
// handed on to children.
var managerVariables = []string{"LISTEN_PID", "LISTEN_FDS", "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"}

// A manager is the service manager that started the process. The zero manager is none.
type manager struct {
	listener   net.Listener  // the socket that it passed; nil if it passed none
	socketName string        // where notify sends to; empty if nowhere
	watchdog   time.Duration // it restarts a process silent for this long; 0 if it does not
}

// newManager reads the variables of the manager, removes them from the environment, and
// takes over the socket that was passed. What names the pid of another process is left
// alone: it was inherited. The error is for whoever configured the manager.
func newManager(getenv func(string) string) (m manager, err error) {
	m.socketName = getenv("NOTIFY_SOCKET")
	numbers := make(map[string]uint64)
	for _, name := range managerVariables {
		value := getenv(name)
		os.Unsetenv(name)
		if value == "" || name == "NOTIFY_SOCKET" {
			continue
		}
		if numbers[name], err = strconv.ParseUint(value, 10, 52); err != nil { // as µs, 52 bits fit a Duration
			return manager{}, fmt.Errorf("%s: %.80q is not a whole number", name, value)
		}
	}
	pid := uint64(os.Getpid())
	if cmp.Or(numbers["WATCHDOG_PID"], pid) == pid {
		m.watchdog = time.Duration(numbers["WATCHDOG_USEC"]) * time.Microsecond
	}
	if numbers["LISTEN_PID"] != pid {
		return m, nil
	}
	if n := numbers["LISTEN_FDS"]; n != 1 {
		return manager{}, fmt.Errorf("LISTEN_FDS: %d; rollcall takes exactly 1 socket", n)
	}
	const fd = 3 // SD_LISTEN_FDS_START of <systemd/sd-daemon.h>
	// Look before touching it: if the environment is wrong, it may be any file.
	listens, err := syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_ACCEPTCONN)
	if err != nil || listens == 0 {
		return manager{}, fmt.Errorf("LISTEN_FDS: file descriptor %d is not a socket that listens; "+
			"a socket unit needs ListenStream= and Accept=no", fd)
	}
	f := os.NewFile(fd, "LISTEN_FDS")
	defer f.Close() // the listener has a copy
	m.listener, err = net.FileListener(f)
	return m, err
}

// hostName matches what a name in the DNS is made of; of digits and dots alone, it is an address that is mistyped.
var hostName = regexp.MustCompile(`^[\w.-]*[A-Za-z_-][\w.-]*$`)

// parseHost returns a host name, or an IP address without the brackets that one of IPv6 may stand in. Whether this machine
// can listen there, net.Listen finds out.
func parseHost(v string) (string, error) {
	host := v
	if strings.HasPrefix(v, "[") && strings.HasSuffix(v, "]") && strings.Contains(v, ":") {
		host = v[1 : len(v)-1]
	}
	_, err := netip.ParseAddr(host)
	if err != nil && !hostName.MatchString(host) || strings.ContainsAny(host, "[]") {
		return "", errors.New("is not an IP address or a host name; no scheme, and the port goes into PORT")
	}
	return host, nil
}

// listen returns the listener that was passed, or else one of its own. The error is a
// [usageError] where HOST is at fault, and not the port: an unknown name, an address of
// another machine (EADDRNOTAVAIL), an unknown interface (EINVAL), or IPv6 on a machine that
// has none (EAFNOSUPPORT).
func (m manager) listen(cfg config) (net.Listener, error) {
	if m.listener != nil {
		return m.listener, nil
	}
	listener, err := net.Listen("tcp", cfg.listenAddr())
	dns, ok := errors.AsType[*net.DNSError](err)
	if ok && dns.IsNotFound || errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.EAFNOSUPPORT) {
		err = usageError(fmt.Sprintf("HOST: %.80q is not an address or a name that this machine can listen on: %v", cfg.host, err))
	}
	return listener, err
}

// socket tells where the listener comes from.
func (m manager) socket() string {
	if m.listener != nil {
		return "passed by the service manager"
	}
	return "own"
}

// holdBack leaves the connections to a passed socket in its backlog, as during all of a
// restart, until the service has started, or timeout or ctx is over.
func (m manager) holdBack(ctx context.Context, started <-chan struct{}, timeout time.Duration) {
	if m.listener == nil {
		return
	}
	select {
	case <-started:
	case <-time.After(timeout):
	case <-ctx.Done():
	}
}

// notify sends the manager assignments such as READY=1, a line each. An error is no
// reason to stop serving, and goes to the log alone.
func (m manager) notify(log *slog.Logger, assignments ...string) {
	if m.socketName == "" {
		return
	}
	conn, err := net.Dial("unixgram", m.socketName) // a path or, after @, an abstract name
	if err == nil {
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(time.Second)) // its queue may be full
		_, err = conn.Write([]byte(strings.Join(assignments, "\n")))
	}
	if err != nil {
		log.Warn("the service manager can't be told", "message", assignments[0], "error", err.Error())
	}
}

// notifyStopping tells the manager that stopping takes up to timeout.
func (m manager) notifyStopping(log *slog.Logger, timeout time.Duration) {
	m.notify(log, "STOPPING=1", "STATUS=finishing requests", fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d", (timeout+5*time.Second).Microseconds()))
}

// watch tells the watchdog that the service lives whenever check finds so, at half its
// interval, as sd_watchdog_enabled(3) advises. A check that failed is repeated soon, so
// that one failure alone is no restart. After STOPPING=1, with which ctx ends, the manager
// expects nothing more.
func (m manager) watch(ctx context.Context, log *slog.Logger, check func(context.Context) error) {
	for m.watchdog > 0 && ctx.Err() == nil {
		attempt, cancel := context.WithTimeout(ctx, m.watchdog/2)
		err := check(attempt)
		cancel()
		pause := m.watchdog / 2
		if err == nil {
			m.notify(log, "WATCHDOG=1")
		} else if ctx.Err() == nil {
			log.Error("the service does not answer itself; its watchdog is not told that it lives", "error", err.Error())
			pause = m.watchdog / 16
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}
