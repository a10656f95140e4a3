// Rollcall is a users service: a REST API over one table of PostgreSQL.
//
//	GET    /health               the process is up
//	GET    /health/ready         it can serve: 200, or 503 and why not
//	GET    /                     a page to look at the users, for browsers
//	GET    /openapi.json         the description of all calls
//	POST   /api/v1/users         create a user; may be repeated with an Idempotency-Key
//	GET    /api/v1/users         list them, newest first; ?limit= ?offset= ?cursor= ?email= ?id=
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
	"cmp"
	"context"
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
	"strings"
	"syscall"
)

func main() {
	if os.Getenv("GOGC") == "" {
		// The live heap is a few MB: this costs little memory and saves 14 % of the
		// processor time.
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
                         print a token signed with JWT_SECRET or the secret in JWT_SECRET_FILE
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
		return checkHealth(ctx, getenv)
	case command == "version":
		fmt.Fprintln(stdout, "rollcall", buildVersion())
		return nil
	default:
		return usageError(fmt.Sprintf("no command %q; rollcall -h shows what there is", command))
	}
}

// newHandler is the whole service on one screen: its routes, and what wraps
// them (middleware.go says why in this order).
func newHandler(cfg config, store userStore, set *keySet, h *health, m *metrics, log *slog.Logger) http.Handler {
	u := &users{store}
	inFlight := make(chan struct{}, cfg.maxInFlight)
	admit := func(h handlerFunc) http.Handler { return limitInFlight(inFlight, compress(h)) }
	withBody := func(h handlerFunc) http.Handler { return readBody(cfg.maxBodyBytes, admit(h)) }

	api := http.NewServeMux() // behind a token, unless AUTH=off
	api.Handle("POST   /api/v1/users", withBody(u.create))
	api.Handle("GET    /api/v1/users", admit(u.list))
	api.Handle("GET    /api/v1/users/{id}", admit(u.get))
	api.Handle("PUT    /api/v1/users/{id}", withBody(u.update))
	api.Handle("PATCH  /api/v1/users/{id}", withBody(u.update))
	api.Handle("DELETE /api/v1/users/{id}", admit(u.delete))
	api.Handle("/api/v1/users", otherMethods("GET, HEAD, POST, OPTIONS"))
	api.Handle("/api/v1/users/{id}", otherMethods("GET, HEAD, PUT, PATCH, DELETE, OPTIONS"))
	api.Handle("/", handlerFunc(notFound))

	open := http.NewServeMux() // for everybody
	open.Handle("GET /health", handlerFunc(h.live))
	open.Handle("GET /health/ready", handlerFunc(h.ready))
	if !cfg.pageOff {
		open.Handle("GET /{$}", compress(handlerFunc(showPage)))
		open.Handle("/{$}", otherMethods("GET, HEAD, OPTIONS"))
	}
	open.Handle("GET /openapi.json", compress(handlerFunc(describeAPI)))
	open.Handle("/health", otherMethods("GET, HEAD, OPTIONS"))
	open.Handle("/health/ready", otherMethods("GET, HEAD, OPTIONS"))
	open.Handle("/openapi.json", otherMethods("GET, HEAD, OPTIONS"))
	open.Handle("/", handlerFunc(notFound))

	guarded := requireReady(h, exactPath(api))
	guarded = limitRate(cfg.rateLimit, guarded)
	if !cfg.authOff {
		guarded = requireAuth(newVerifier(cfg.tokenRules, set), guarded)
	}

	root := cors(cfg.corsOrigins, split("/api/", guarded, exactPath(open)))
	root = m.count(api, recoverPanics(log, root))
	return observe(log, h.draining, cfg.requestTimeout, root)
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
			return &apiError{kind: kindMethod, header: http.Header{"Allow": {allow}}}
		}
		w.Header().Set("Allow", allow)
		w.WriteHeader(http.StatusNoContent)
		return nil
	}
}

// A rollcall is the service, put together.
type rollcall struct {
	cfg     config
	log     *slog.Logger
	store   *pgStore
	keySet  *keySet // nil when none is configured
	health  *health
	server  *server
	metrics *metrics // nil without ADMIN_ADDR
}

// newRollcall puts the service together: the plain store and the plain server, and
// around them the mechanisms, each of which is a file of its own.
func newRollcall(cfg config, log *slog.Logger) *rollcall {
	r := &rollcall{cfg: cfg, log: log, store: openStore(cfg, log), keySet: newKeySet(cfg, log), server: newServer(cfg, log)}
	r.health = newHealth(r.store.ping, r.keySet, &r.server.draining)
	r.metrics = newMetrics(cfg, r)
	users := exactlyOnce(coalesce(r.store, r.store, cfg.dbMaxConns), r.store)
	r.server.Handler = watchClient(newHandler(cfg, users, r.keySet, r.health, r.metrics, log))
	return r
}

// serve runs the service until ctx ends, then lets the requests finish.
func serve(ctx context.Context, dev bool, getenv func(string) string, stdout, stderr io.Writer) (err error) {
	manager, err := newManager(getenv)
	if err != nil {
		return usageError(err.Error())
	}
	cfg, private, err := configure(ctx, dev, getenv, stderr)
	if err != nil && ctx.Err() != nil { // Ctrl-C while the private PostgreSQL was starting
		return nil
	} else if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, private.stop()) }()
	log := newLogger(cfg, stderr)
	r := newRollcall(cfg, log)
	defer r.store.close()
	if r.server.TLSConfig, err = newTLSConfig(cfg, log); err != nil {
		return err
	}
	stopAdmin, err := r.metrics.listen(cfg, log)
	if err != nil {
		return err
	}
	defer stopAdmin() // last, so that a stop can be watched
	// Listen first: a port that is taken is an error at once, and a client that
	// connects from now on gets a response, if only to be told to wait.
	listener, err := manager.listen(cfg)
	if err != nil {
		return err
	}
	defer listener.Close()
	cfg.logTo(log)
	log.Info("listening", "address", listener.Addr().String(), "socket", manager.socket(), "tls", cfg.tlsCertFile != "", "version", buildVersion())
	manager.notify(log, "STATUS=looking for PostgreSQL")

	fetching, stopFetching := context.WithCancel(context.Background()) // for requests to the last
	defer stopFetching()
	go r.keySet.refresh(fetching)
	failed := make(chan error, 2)
	go r.start(ctx, failed, func() {
		manager.notify(log, "READY=1", "STATUS=serving on "+listener.Addr().String())
		go manager.watch(ctx, log, func(ctx context.Context) error {
			return askHere(ctx, listener.Addr(), cfg.tlsCertFile != "", "/health")
		})
		if dev {
			printQuickstart(stdout, cfg, listener.Addr())
		}
	})
	go func() {
		manager.holdBack(ctx, r.health.started, cfg.requestTimeout)
		if err := r.server.serve(ctx, watchedListener(listener)); err != nil {
			failed <- err
		}
	}()

	select {
	case <-ctx.Done():
		manager.notifyStopping(log, cfg.drainDelay+cfg.shutdownTimeout)
		return r.stop(context.Cause(ctx), listener)
	case err := <-failed:
		r.server.Close()
		return err
	case <-private.done:
		r.server.Close()
		return errors.New("the private PostgreSQL has ended; .dev/postgres.log tells why")
	}
}

// start starts the store, which may take as long as PostgreSQL is away, and then has
// requests served.
func (r *rollcall) start(ctx context.Context, failed chan<- error, ready func()) {
	if err := r.store.start(ctx); err != nil {
		if ctx.Err() == nil {
			failed <- err
		}
		return
	}
	close(r.health.started)
	r.log.Info("ready")
	ready()
}

// stop lets the requests finish. The error is that some had to be cut off.
func (r *rollcall) stop(cause error, listener net.Listener) error {
	delay := r.cfg.drainDelay
	if !r.health.isStarted() { // nobody has been told that it may send requests
		delay = 0
	}
	r.log.Info("stopping", "cause", cause.Error(), "delay", delay.String(), "timeout", r.cfg.shutdownTimeout.String())
	if err := r.server.stop(listener, delay, r.cfg.shutdownTimeout); err != nil {
		return err
	}
	r.log.Info("stopped")
	return nil
}

// buildVersion tells which source the program was built from, as far as the
// build information knows.
func buildVersion() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	return cmp.Or(info.Main.Version, "(devel)") + " " + info.GoVersion // with git, the version is derived from the commit
}
