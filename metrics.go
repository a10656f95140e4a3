package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"runtime"
	"runtime/debug"
	runtimemetrics "runtime/metrics"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Metrics and profiles
//
// ADMIN_ADDR serves them on a listener of their own, so that nobody who reaches the API
// reaches them. Metrics are in Prometheus' text format 0.0.4, and have the names that its
// conventions and client_golang give them. To count a request takes a few atomic additions
// and no lock; without ADMIN_ADDR, nothing is counted.

// metrics are the counts of a service. They are safe for concurrent use.
type metrics struct {
	service  *rollcall
	start    time.Time
	inFlight atomic.Int64

	requests   vector[requests]     // by method, route
	shed       vector[atomic.Int64] // by reason
	refused    vector[atomic.Int64] // by reason
	batches    vector[histogram]    // by statement
	statements vector[histogram]
	retries    vector[atomic.Int64] // by reason
}

// labels are the values of up to two labels. They come from sets of our own, so that no
// client can make more of them.
type labels [2]string

// A vector has a T for each of the labels that came up.
type vector[T any] struct{ all sync.Map }

func (v *vector[T]) with(l labels) *T {
	t, ok := v.all.Load(l)
	if !ok {
		t, _ = v.all.LoadOrStore(l, new(T))
	}
	return t.(*T)
}

var (
	secondBounds = []float64{0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10}
	callBounds   = []float64{1, 2, 4, 8, 16, 24}
)

// requests are those of a method and a route: the seconds that they took, and how many had
// each status.
type requests struct {
	histogram
	status [600]atomic.Int64
}

// A histogram counts values up to each of its bounds, and those beyond the last.
type histogram struct {
	counts [15]atomic.Int64
	sum    atomic.Int64 // in billionths
}

func (h *histogram) observe(value float64, bounds []float64) {
	i, _ := slices.BinarySearch(bounds, value)
	h.counts[i].Add(1)
	h.sum.Add(int64(value * 1e9))
}

// newMetrics returns the metrics of r, or nil without ADMIN_ADDR.
func newMetrics(cfg config, r *rollcall) *metrics {
	if cfg.adminAddr == "" {
		return nil
	}
	m := &metrics{service: r, start: time.Now()}
	r.store.observe = m.observe
	return m
}

// count is the layer that counts requests; routes are those of the API.
func (m *metrics) count(routes *http.ServeMux, next http.Handler) http.Handler {
	if m == nil {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		m.inFlight.Add(1)
		defer m.inFlight.Add(-1)
		next.ServeHTTP(w, r)
		pattern := r.Pattern
		if pattern == "" { // refused before it reached the mux
			_, pattern = routes.Handler(r)
		}
		route, method := pattern[max(0, strings.IndexByte(pattern, '/')):], r.Method
		if route == "/" || route == "" {
			route = "other"
		}
		if !slices.Contains(knownMethods, method) {
			method = "other"
		}
		status := cmp.Or(w.(*responseRecorder).status, http.StatusOK)
		info, same := infoFrom(r.Context()), m.requests.with(labels{method, route})
		same.status[status].Add(1)
		same.observe(time.Since(info.start).Seconds(), secondBounds)
		switch failure := info.failure; status {
		case http.StatusUnauthorized:
			m.refused.with(labels{cmp.Or(refusalReasons[failure.message], "malformed")}).Add(1)
		case http.StatusForbidden:
			m.refused.with(labels{"scope"}).Add(1)
		case http.StatusTooManyRequests, http.StatusServiceUnavailable:
			if strings.HasPrefix(r.URL.Path, "/api/") {
				reason := cmp.Or(shedReasons[failure.message], shedReasons[failure.kind.message], "database")
				m.shed.with(labels{reason}).Add(1)
			}
		}
	})
}

var knownMethods = strings.Split(corsMethods+", OPTIONS", ", ")

// The reasons of refusals, by what the client is told.
var (
	refusalReasons = map[string]string{
		kindUnauthorized.message: "missing", string(errExpired): "expired", string(errNotYet): "not_yet_valid",
		string(errNoKey): "key", string(errSignature): "signature", string(errIssuer): "issuer", string(errAudience): "audience",
	}
	shedReasons = map[string]string{
		errInFlight.message: "in_flight", errDeepLists.message: "deep_lists", errStarting.message: "starting",
		keysAway: "keys", kindTooMany.message: "rate_limit", kindTimeout.message: "timeout",
	}
)

// observe takes what a [pgStore] observes.
func (m *metrics) observe(what, label string, value float64) {
	switch what {
	case "statement":
		m.statements.with(labels{label}).observe(value, secondBounds)
	case "batch":
		m.batches.with(labels{label}).observe(value, callBounds)
	case "retry":
		m.retries.with(labels{label}).Add(1)
	}
}

// listen serves the metrics and profiles on ADMIN_ADDR until stop is called.
func (m *metrics) listen(cfg config, log *slog.Logger) (stop func(), err error) {
	if m == nil {
		return func() {}, nil
	}
	listener, err := net.Listen("tcp", cfg.adminAddr)
	if err != nil {
		return nil, fmt.Errorf("ADMIN_ADDR: %w", err)
	}
	log.Info("listening for metrics and profiles", "address", listener.Addr().String())
	if tcp, ok := listener.Addr().(*net.TCPAddr); ok && !tcp.IP.IsLoopback() {
		log.Warn("ADMIN_ADDR: metrics and profiles are open to everybody who can reach this address")
	}
	admin := newServer(cfg, log) // whose timeout for a response leaves room for a profile of 30 s
	admin.Handler = m.routes(cfg)
	go admin.serve(context.Background(), listener)
	return func() { admin.Close() }, nil
}

// routes are those of ADMIN_ADDR. A request to them leaves no line in the log.
func (m *metrics) routes(cfg config) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	for pattern, h := range map[string]handlerFunc{
		"GET /metrics": m.scrape, "GET /health": m.service.health.live, "GET /health/ready": m.service.health.ready,
	} {
		mux.Handle(pattern, observe(slog.New(slog.DiscardHandler), new(atomic.Bool), cfg.requestTimeout, h))
	}
	return mux
}

// scrape answers GET /metrics.
func (m *metrics) scrape(w http.ResponseWriter, r *http.Request) error {
	var x exposition
	m.writeRequests(&x)
	m.writeService(r.Context(), &x)
	writeProcess(&x, m.start)
	writeBody(w, http.StatusOK, []string{"text/plain; version=0.0.4; charset=utf-8"}, x.Bytes())
	return nil
}

func (m *metrics) writeRequests(x *exposition) {
	const total, duration = "rollcall_http_requests_total", "rollcall_http_request_duration_seconds"
	route := []string{"method", "route"}
	x.family(total, "counter", "Requests, by the status of their responses.")
	each(&m.requests, route, func(labels []string, same *requests) {
		for status := range same.status {
			if n := same.status[status].Load(); n > 0 {
				x.sample(total, float64(n), append(slices.Clip(labels), "code", strconv.Itoa(status))...)
			}
		}
	})
	x.family(duration, "histogram", "Time until the response was there, without sending it.")
	each(&m.requests, route, func(labels []string, same *requests) {
		x.histogram(duration, &same.histogram, secondBounds, labels)
	})
	x.value("rollcall_http_requests_in_flight", "gauge", "Requests whose response is not there yet.", float64(m.inFlight.Load()))
	counters(x, "rollcall_http_shed_total", "Requests refused with 429 or 503.", &m.shed, "reason")
	counters(x, "rollcall_auth_refused_total", "Requests refused with 401 or 403.", &m.refused, "reason")
	histograms(x, "rollcall_batch_size", "Requests that shared a statement.", &m.batches, callBounds, "statement")
	histograms(x, "rollcall_statement_duration_seconds", "Time of statements that were answered, with the wait for a connection.", &m.statements, secondBounds)
	counters(x, "rollcall_db_retries_total", "Statements that were tried again.", &m.retries, "reason") // a SQLSTATE, or "connection"
}

func (m *metrics) writeService(ctx context.Context, x *exposition) {
	s := m.service.server
	states := map[http.ConnState]int{http.StateNew: 0, http.StateActive: 0, http.StateIdle: 0}
	s.mu.Lock()
	for _, c := range s.conns {
		states[c.state]++
	}
	s.mu.Unlock()
	x.family("rollcall_http_connections", "gauge", "Connections of clients.")
	for state, n := range states {
		x.sample("rollcall_http_connections", float64(n), "state", state.String())
	}
	pool := m.service.store.db.Stats()
	x.value("rollcall_db_pool_max_connections", "gauge", "DB_MAX_CONNS.", float64(pool.MaxOpenConnections))
	x.value("rollcall_db_pool_open_connections", "gauge", "Connections to PostgreSQL.", float64(pool.OpenConnections))
	x.value("rollcall_db_pool_in_use_connections", "gauge", "Connections that run a statement.", float64(pool.InUse))
	x.value("rollcall_db_pool_idle_connections", "gauge", "Connections that run none.", float64(pool.Idle))
	x.value("rollcall_db_pool_waits_total", "counter", "Statements that waited for a connection.", float64(pool.WaitCount))
	x.value("rollcall_db_pool_wait_seconds_total", "counter", "Time that they waited.", pool.WaitDuration.Seconds())
	if set := m.service.keySet; set != nil {
		set.mu.Lock()
		fetched, failures := set.fetched, set.failures
		set.mu.Unlock()
		x.value("rollcall_jwks_keys", "gauge", "Keys of the identity provider.", float64(len(set.keyring.Load().keys)-len(set.own)))
		x.value("rollcall_jwks_last_success_timestamp_seconds", "gauge", "When the key set was fetched last, since 1970; 0 if never.", float64(max(0, fetched.Unix())))
		x.value("rollcall_jwks_failures_total", "counter", "Fetches of the key set that failed.", float64(failures))
	}
	ready := 0.0
	if m.service.health.check(ctx) == nil {
		ready = 1
	}
	x.value("rollcall_ready", "gauge", "1 if /health/ready says so.", ready)
	x.family("rollcall_build_info", "gauge", "Always 1.")
	version, goVersion, _ := strings.Cut(buildVersion(), " ")
	x.sample("rollcall_build_info", 1, "version", version, "goversion", goVersion)
}

// processMetrics are the gauges and counters (_total) that runtime/metrics has.
var processMetrics = []struct{ name, source, help string }{
	{"go_goroutines", "/sched/goroutines:goroutines", "Goroutines."},
	{"go_threads", "/sched/threads/total:threads", "Threads of the operating system."},
	{"go_sched_gomaxprocs_threads", "/sched/gomaxprocs:threads", "GOMAXPROCS."},
	{"go_memstats_heap_alloc_bytes", "/memory/classes/heap/objects:bytes", "Bytes of objects, dead ones that are not swept included."},
	{"go_memstats_heap_objects", "/gc/heap/objects:objects", "Objects."},
	{"go_memstats_next_gc_bytes", "/gc/heap/goal:bytes", "Heap at which the next garbage collection ends."},
	{"go_memstats_sys_bytes", "/memory/classes/total:bytes", "Bytes that the runtime has of the system."},
	{"go_memstats_alloc_bytes_total", "/gc/heap/allocs:bytes", "Bytes allocated so far."},
	{"go_memstats_mallocs_total", "/gc/heap/allocs:objects", "Objects allocated so far."},
	{"go_memstats_frees_total", "/gc/heap/frees:objects", "Objects freed so far."},
}

func writeProcess(x *exposition, start time.Time) {
	for _, p := range processMetrics {
		sample := []runtimemetrics.Sample{{Name: p.source}}
		if runtimemetrics.Read(sample); sample[0].Value.Kind() != runtimemetrics.KindUint64 {
			continue // this Go does not have it
		}
		kind := "gauge"
		if strings.HasSuffix(p.name, "_total") {
			kind = "counter"
		}
		x.value(p.name, kind, p.help, float64(sample[0].Value.Uint64()))
	}
	gc := debug.GCStats{PauseQuantiles: make([]time.Duration, 5)}
	debug.ReadGCStats(&gc)
	x.family("go_gc_duration_seconds", "summary", "Pauses for garbage collection.")
	for i, quantile := range []string{"0", "0.25", "0.5", "0.75", "1"} {
		x.sample("go_gc_duration_seconds", gc.PauseQuantiles[i].Seconds(), "quantile", quantile)
	}
	x.sample("go_gc_duration_seconds_sum", gc.PauseTotal.Seconds())
	x.sample("go_gc_duration_seconds_count", float64(gc.NumGC))
	x.family("go_info", "gauge", "Always 1.")
	x.sample("go_info", 1, "version", runtime.Version())

	var used syscall.Rusage
	var files syscall.Rlimit
	syscall.Getrusage(syscall.RUSAGE_SELF, &used)
	syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files)
	seconds := time.Duration(used.Utime.Nano() + used.Stime.Nano()).Seconds()
	x.value("process_cpu_seconds_total", "counter", "Processor time, user and system.", seconds)
	x.value("process_start_time_seconds", "gauge", "When the process started, since 1970.", float64(start.UnixMilli())/1000)
	x.value("process_max_fds", "gauge", "Open files, at most.", float64(files.Cur))
	if open, err := os.ReadDir("/proc/self/fd"); err == nil {
		x.value("process_open_fds", "gauge", "Open files.", float64(len(open)))
	}
	var virtual, resident float64 // in pages: proc(5)
	statm, _ := os.ReadFile("/proc/self/statm")
	if n, _ := fmt.Sscan(string(statm), &virtual, &resident); n == 2 {
		x.value("process_virtual_memory_bytes", "gauge", "Virtual memory.", virtual*float64(os.Getpagesize()))
		x.value("process_resident_memory_bytes", "gauge", "Resident memory.", resident*float64(os.Getpagesize()))
	}
}

// An exposition is a text in Prometheus' format.
type exposition struct{ bytes.Buffer }

func (x *exposition) family(name, kind, help string) {
	fmt.Fprintf(x, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
}

// sample writes a sample with labels, each a name and a value.
func (x *exposition) sample(name string, value float64, labels ...string) {
	x.WriteString(name)
	before := "{"
	for pair := range slices.Chunk(labels, 2) {
		fmt.Fprintf(x, "%s%s=%q", before, pair[0], pair[1])
		before = ","
	}
	if before == "," {
		x.WriteByte('}')
	}
	fmt.Fprintf(x, " %v\n", value)
}

// value writes a family of one sample.
func (x *exposition) value(name, kind, help string, value float64) {
	x.family(name, kind, help)
	x.sample(name, value)
}

// each calls f with the labels of a vector, in order, named.
func each[T any](v *vector[T], names []string, f func(labels []string, t *T)) {
	all := make(map[labels]*T)
	v.all.Range(func(l, t any) bool {
		all[l.(labels)] = t.(*T)
		return true
	})
	byLabels := func(a, b labels) int { return slices.Compare(a[:], b[:]) }
	for _, l := range slices.SortedFunc(maps.Keys(all), byLabels) {
		var named []string
		for i, name := range names {
			named = append(named, name, l[i])
		}
		f(named, all[l])
	}
}

func counters(x *exposition, name, help string, v *vector[atomic.Int64], names ...string) {
	x.family(name, "counter", help)
	each(v, names, func(labels []string, n *atomic.Int64) { x.sample(name, float64(n.Load()), labels...) })
}

func histograms(x *exposition, name, help string, v *vector[histogram], bounds []float64, names ...string) {
	x.family(name, "histogram", help)
	each(v, names, func(labels []string, h *histogram) { x.histogram(name, h, bounds, labels) })
}

func (x *exposition) histogram(name string, h *histogram, bounds []float64, labels []string) {
	var sum int64
	for i := range len(bounds) + 1 {
		bound := "+Inf"
		if i < len(bounds) {
			bound = fmt.Sprint(bounds[i])
		}
		sum += h.counts[i].Load()
		x.sample(name+"_bucket", float64(sum), append(slices.Clip(labels), "le", bound)...)
	}
	x.sample(name+"_sum", float64(h.sum.Load())/1e9, labels...)
	x.sample(name+"_count", float64(sum), labels...)
}

// parseAdminAddr returns an address that net.Listen takes, if there is such a host.
func parseAdminAddr(value string) (string, error) {
	_, port, err := net.SplitHostPort(value)
	if _, portErr := strconv.ParseUint(port, 10, 16); err != nil || portErr != nil {
		return "", errors.New("is no address with a port, such as 127.0.0.1:9090")
	}
	return value, nil
}
