// Rollcall is a users service: a REST API over one table of PostgreSQL.
//
//	GET    /health               the process is up
//	GET    /health/ready         it can serve: 200, or 503 and why not
//	POST   /api/v1/users         create a user; may be repeated with an Idempotency-Key
//	GET    /api/v1/users         list them, newest first; ?limit= ?offset= ?cursor= ?email=
//	GET    /api/v1/users/{id}    one user
//	PUT    /api/v1/users/{id}    change what is given; PATCH does the same
//	DELETE /api/v1/users/{id}    delete
//
// To try it, with nothing configured and a private PostgreSQL of its own:
//
//	make run
//
// Start reading here; README.md has a map of the other files.
package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode/utf16"
	"unicode/utf8"
)

func main() {
	if os.Getenv("GOGC") == "" {
		// What lives is a few megabytes: to collect at four times that costs little
		// memory, and at twice that, the default, a seventh of all time.
		debug.SetGCPercent(300)
	}
	signal.Ignore(syscall.SIGPIPE) // a log that nobody reads any more must not end the service
	ctx, stop := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	if !signal.Ignored(syscall.SIGHUP) { // else nohup has it outlive its terminal
		signal.Notify(signals, syscall.SIGHUP)
	}
	go func() {
		stop(fmt.Errorf("signal: %v", <-signals))
		for <-signals == syscall.SIGHUP { // a terminal that closes may say so twice
		}
		os.Exit(1) // who asks twice does not want to wait
	}()

	if err := run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintf(os.Stderr, "rollcall: %v\n", err)
		if _, ok := errors.AsType[usageError](err); ok {
			os.Exit(2)
		}
		os.Exit(1)
	}
}

// A usageError is bad configuration or a bad command line: exit code 2, since
// no other try will do better.
type usageError string

func (e usageError) Error() string { return string(e) }

const usage = `rollcall is a users service: a REST API over one table of PostgreSQL.

  rollcall               serve, as the environment and .env say
  rollcall -dev          serve with nothing configured, on a private PostgreSQL in ./.dev
  rollcall token -sub NAME [-ttl 1h] [-scope "users:read users:write"]
                         print a token signed with JWT_SECRET
  rollcall healthcheck   exit 0 if the service on this host is ready
  rollcall version       print the version

`

// run is the program: everything from outside comes in as an argument, so that
// a test can be the outside. It returns nil after a clean stop, a [usageError]
// for what the caller has to mend, and any other error for failures at run time.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("rollcall", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // errors are returned, not printed here
	dev := flags.Bool("dev", false, "")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(stdout, usage, variablesHelp())
		return nil
	case err != nil:
		return usageError(err.Error() + "; rollcall -h shows what there is")
	}
	switch command := flags.Arg(0); {
	case *dev && flags.NArg() > 0:
		return usageError("-dev goes with no command")
	case flags.NArg() == 0:
		return serve(ctx, *dev, getenv, stdout, stderr)
	case command == "token":
		return printToken(flags.Args()[1:], getenv, stdout, stderr)
	case flags.NArg() > 1:
		return usageError(fmt.Sprintf("%s takes no arguments", command))
	case command == "healthcheck":
		cfg, err := healthConfig(getenv)
		if err != nil {
			return err
		}
		return checkHealth(ctx, cfg)
	case command == "version":
		fmt.Fprintln(stdout, "rollcall", buildVersion())
		return nil
	default:
		return usageError(fmt.Sprintf("no command %q; rollcall -h shows what there is", command))
	}
}

// newHandler is the whole service on one screen: its routes, and what wraps
// them (middleware.go says why in this order).
func newHandler(cfg config, s *store, h *health, log *slog.Logger) http.Handler {
	u := &users{store: s, pages: sharer[page]{lane: s.many.reads}, deep: make(chan struct{}, 1)}

	api := http.NewServeMux() // behind a token, unless AUTH=off
	api.Handle("POST   /api/v1/users", handlerFunc(u.create))
	api.Handle("GET    /api/v1/users", handlerFunc(u.list))
	api.Handle("GET    /api/v1/users/{id}", handlerFunc(u.get))
	api.Handle("PUT    /api/v1/users/{id}", handlerFunc(u.update))
	api.Handle("PATCH  /api/v1/users/{id}", handlerFunc(u.update))
	api.Handle("DELETE /api/v1/users/{id}", handlerFunc(u.delete))
	api.Handle("/api/v1/users", otherMethods("GET, HEAD, POST, OPTIONS"))
	api.Handle("/api/v1/users/{id}", otherMethods("GET, HEAD, PUT, PATCH, DELETE, OPTIONS"))
	api.Handle("/", handlerFunc(notFound))

	open := http.NewServeMux() // for everybody
	open.Handle("GET /health", handlerFunc(h.live))
	open.Handle("GET /health/ready", handlerFunc(h.ready))
	open.Handle("/health", otherMethods("GET, HEAD, OPTIONS"))
	open.Handle("/health/ready", otherMethods("GET, HEAD, OPTIONS"))
	open.Handle("/", handlerFunc(notFound))

	guarded := compress(exactPath(api))
	guarded = limitBody(cfg.maxBodyBytes, guarded)
	guarded = deadline(cfg.requestTimeout, guarded)
	guarded = limitInFlight(cfg.maxInFlight, guarded)
	guarded = whenStarted(s, guarded)
	if !cfg.authOff {
		guarded = requireAuth(newVerifier(cfg.keys, cfg.issuer, cfg.audience), guarded)
	}

	root := cors(cfg.corsOrigins, split("/api/", guarded, exactPath(open)))
	root = sayGoodbye(&h.draining, root)
	return observe(log, recoverPanics(log, root))
}

// split sends the paths below prefix to one handler and all others to another.
func split(prefix string, below, others http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, prefix) {
			below.ServeHTTP(w, r)
		} else {
			others.ServeHTTP(w, r)
		}
	})
}

func notFound(http.ResponseWriter, *http.Request) error { return errNotFound }

// otherMethods answers for a path whose methods have handlers of their own:
// OPTIONS with Allow, whatever else with 405 and Allow.
func otherMethods(allow string) handlerFunc {
	return func(w http.ResponseWriter, r *http.Request) error {
		if r.Method != http.MethodOptions {
			return &failure{kind: kindMethod, header: http.Header{"Allow": {allow}}}
		}
		w.Header().Set("Allow", allow)
		w.WriteHeader(http.StatusNoContent)
		return nil
	}
}

// serve runs the service until ctx ends, then lets what runs finish.
func serve(ctx context.Context, dev bool, getenv func(string) string, stdout, stderr io.Writer) (err error) {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	manager, err := newManager(getenv)
	if err != nil {
		return usageError(err.Error())
	}
	if getenv, err = withDotenv(getenv, dotenvFile, stderr); err != nil {
		return usageError(err.Error())
	}
	var private *privatePostgres
	if dev {
		if private, getenv, err = prepareDev(ctx, getenv, stderr); err != nil {
			if ctx.Err() != nil { // Ctrl-C while it was starting
				return nil
			}
			return err
		}
		defer func() { err = errors.Join(err, private.stop()) }()
	}
	cfg, err := loadConfig(getenv, dev)
	if err != nil {
		return usageError(err.Error())
	}
	log := newLogger(cfg, stderr)
	log.Debug("configuration", "values", cfg)
	for _, warning := range cfg.warnings {
		log.Warn(warning)
	}
	s := openStore(cfg, log)
	defer s.close()

	var cert *certificate
	if cfg.tlsCertFile != "" {
		if cert, err = loadCertificate(cfg.tlsCertFile, cfg.tlsKeyFile, log); err != nil {
			return err
		}
	}
	// Listen first: a port that is taken is an error at once, and whoever
	// connects from now on is served, if only to be told to wait.
	listener, socket := manager.listener, "passed by the service manager"
	if listener == nil {
		if listener, err = net.Listen("tcp", cfg.listenAddr()); err != nil {
			return listenError(cfg.host, err)
		}
		socket = "own"
	}
	defer listener.Close()
	h := &health{store: s}
	conns := newConnections(mostConnections(2*cfg.dbMaxConns+64), log) // a statement that is cancelled takes two
	server := newServer(cfg, newHandler(cfg, s, h, log), log)
	if cert != nil {
		server.TLSConfig = &tls.Config{GetCertificate: cert.get}
	}
	log.Info("listening", "address", listener.Addr().String(), "socket", socket, "tls", cert != nil, "version", buildVersion())
	if cfg.authOff {
		log.Warn("AUTH=off: the API is open to everybody who can reach this address")
	}
	failed := make(chan error, 2)
	started := make(chan struct{}) // closed once the store is there
	served := make(chan struct{})  // closed once no connection is accepted any more
	watching, stopWatching := context.WithCancel(context.Background())
	defer stopWatching()
	go conns.watch(watching)
	go func() {
		defer close(served)
		if manager.listener != nil {
			// Who connects meanwhile waits in the queue of the socket, as during all of a
			// restart; but no longer than a request may take.
			select {
			case <-started:
			case <-time.After(cfg.requestTimeout):
			case <-ctx.Done(): // they are for our successor
				return
			}
		}
		if err := listen(server, listener, conns); err != nil {
			failed <- err
		}
	}()
	manager.tell(log, "STATUS=looking for PostgreSQL")
	go func() {
		if err := s.start(ctx); err != nil {
			if ctx.Err() == nil { // else it only did as it was told
				failed <- err
			}
			return
		}
		close(started)
		log.Info("ready")
		manager.tell(log, "READY=1", "STATUS=serving on "+listener.Addr().String())
		if manager.watchdog > 0 {
			go h.report(ctx, manager, listener.Addr(), cert != nil, log)
		}
		if dev {
			printQuickstart(stdout, cfg, listener.Addr())
		}
	}()

	select {
	case err := <-failed:
		server.Close()
		return err
	case <-private.exited():
		server.Close()
		return errors.New("the private PostgreSQL has ended; .dev/postgres.log tells why")
	case <-ctx.Done():
	}
	log.Info("stopping", "cause", context.Cause(ctx).Error(), "delay", cfg.drainDelay.String(), "patience", cfg.shutdownTimeout.String())
	h.draining.Store(true)
	idleUntil := time.Now().Add(min(lastCall, cfg.shutdownTimeout/2))
	manager.tell(log, "STOPPING=1", "STATUS=finishing what runs", fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d",
		(cfg.drainDelay+cfg.shutdownTimeout+5*time.Second).Microseconds()))
	if s.started.Load() { // else nobody has been told that it may send requests
		select {
		case <-time.After(cfg.drainDelay):
		case <-served:
		}
	}
	listener.Close()
	<-served
	patience, cancel := context.WithTimeout(context.Background(), cfg.shutdownTimeout)
	defer cancel()
	if err := conns.drain(patience, server, idleUntil); err != nil {
		server.Close()
		return fmt.Errorf("requests were cut off after SHUTDOWN_TIMEOUT (%v)", cfg.shutdownTimeout)
	}
	log.Info("stopped")
	return nil
}

// listenError returns err, or a [usageError] that names HOST where it is not the port
// that keeps the service from listening: a name that nobody knows, an address of
// another machine (EADDRNOTAVAIL), an unknown interface (EINVAL), or IPv6 where there
// is none (EAFNOSUPPORT).
func listenError(host string, err error) error {
	dns, ok := errors.AsType[*net.DNSError](err)
	if ok && dns.IsNotFound || errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.EAFNOSUPPORT) {
		return usageError(fmt.Sprintf("HOST: %.80q is not an address or a name that this machine can listen on: %v", host, err))
	}
	return err
}

// newServer returns the server of handler, for [listen].
func newServer(cfg config, handler http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       5*time.Second + cfg.requestTimeout,  // headers, then the body
		WriteTimeout:      30*time.Second + cfg.requestTimeout, // from the headers on: handler, then the answer
		IdleTimeout:       120 * time.Second,
		MaxHeaderBytes:    32 << 10,
		HTTP2:             http2Limits,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),

		DisableGeneralOptionsHandler: true, // exactPath answers OPTIONS * like all else
	}
}

// listen serves until the listener is closed. That is no error. conns gets to know
// each connection.
func listen(server *http.Server, listener net.Listener, conns *connections) error {
	var err error
	server.ConnState, server.ConnContext = conns.track, withConnection
	listener = connectionListener{listener}
	if server.TLSConfig != nil {
		err = server.ServeTLS(listener, "", "")
	} else {
		err = server.Serve(listener)
	}
	if errors.Is(err, http.ErrServerClosed) || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// newLogger returns the log that cfg asks for.
func newLogger(cfg config, w io.Writer) *slog.Logger {
	options := &slog.HandlerOptions{Level: cfg.logLevel}
	if cfg.logFormat == "text" {
		return slog.New(slog.NewTextHandler(w, options))
	}
	return slog.New(slog.NewJSONHandler(printableWriter{w}, options))
}

// A printableWriter escapes what is not printable in a line of JSON: what anybody
// may put into a path must not move the cursor of a terminal, or turn the letters
// around. slog does so in text, but of JSON only what RFC 8259 demands.
type printableWriter struct{ io.Writer }

func (w printableWriter) Write(line []byte) (int, error) {
	escaped := line
	if bytes.ContainsFunc(line, notPrintable) {
		escaped = nil
		for _, r := range string(line) {
			if !notPrintable(r) {
				escaped = utf8.AppendRune(escaped, r)
				continue
			}
			for _, unit := range utf16.AppendRune(nil, r) {
				escaped = fmt.Appendf(escaped, `\u%04x`, unit)
			}
		}
	}
	_, err := w.Writer.Write(escaped)
	return len(line), err
}

func notPrintable(r rune) bool { return r > '~' && !strconv.IsPrint(r) }

// buildVersion tells which source the program was built from, as far as the
// build information knows.
func buildVersion() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	v := info.Main.Version // of the module; with git, derived from the commit
	if v == "" {
		v = "(devel)"
	}
	return v + " " + info.GoVersion
}
