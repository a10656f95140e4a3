package main

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"path"
	"runtime/debug"
	"slices"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"
)

// What wraps every request. Each layer is a plain http.Handler around the next
// one; newHandler in main.go puts them in this order, outermost first:
//
//	observe        first, so that every answer has an id and a line in the log
//	recoverPanics  inside observe, which logs the 500; around all that may panic
//	sayGoodbye     around all others, since any answer may be the last of a connection
//	cors           outside auth and mux, or a preflight would be a 401 or a 405
//
// then, for the API alone, since health must answer whatever happens:
//
//	requireAuth    before all else, so that a stranger learns and occupies nothing
//	whenStarted    before more is spent on a request that can't be served
//	limitInFlight  as early: refusing has to stay cheap when there is too much
//	deadline       once a request is let in, its time runs
//	limitBody      just around those who read it
//	compress       sees the answers of the handlers alone
//
// and around each mux:
//
//	exactPath      before the mux, which would redirect what this refuses

// An exchange is what is known of one request and its answer, for the access
// log. It is the http.ResponseWriter of all layers below observe.
type exchange struct {
	http.ResponseWriter
	status   int    // 0 until it has been written
	bytes    int64  // of the answer's body
	bodyRead bool   // the request's body has been read to its end
	id       string // X-Request-Id
	traceID  string // of a W3C traceparent; empty without one
	caller          // whose token it came with
	cause    error  // what went wrong, where the answer does not tell

	draining *atomic.Bool  // once true, this is the last answer of its connection; may be nil
	places   chan struct{} // those in flight, for enter; nil: there is no limit
	inside   bool          // it holds one of them
	writing  *budget       // of all large answers; nil: there is no limit
}

// enter takes a place among the requests in flight, or fails when there is none.
func (x *exchange) enter() error {
	if x.places == nil || x.inside {
		return nil
	}
	select {
	case x.places <- struct{}{}:
		x.inside = true
		return nil
	default:
		return &failure{kind: kindUnavailable, message: "Too many requests are being served"}
	}
}

// leave gives the place back, if there is one.
func (x *exchange) leave() {
	if x.inside {
		x.inside = false
		<-x.places
	}
}

func (x *exchange) Unwrap() http.ResponseWriter { return x.ResponseWriter }

func (x *exchange) WriteHeader(status int) {
	if x.status == 0 && status >= 200 { // the 1xx are not the answer yet
		x.begin(status)
	}
	x.ResponseWriter.WriteHeader(status)
}

func (x *exchange) Write(p []byte) (int, error) {
	if x.status == 0 {
		x.begin(http.StatusOK)
	}
	x.leave() // the work is done; how long the caller reads is its own affair
	if len(p) > smallBytes && x.writing != nil {
		giveBack := x.writing.take(int64(len(p)), func() {
			http.NewResponseController(x.ResponseWriter).SetWriteDeadline(time.Unix(1, 0))
		})
		defer giveBack()
	}
	n, err := x.ResponseWriter.Write(p)
	x.bytes += int64(n)
	if err != nil && x.cause == nil {
		x.cause = err // a caller who left, or was too slow
	}
	return n, err
}

// begin notes the status, just before the head of the answer goes out. That is the
// moment to see whether the service is to stop: it may have begun while the
// request was being served.
func (x *exchange) begin(status int) {
	x.status = status
	if x.draining != nil && x.draining.Load() {
		x.Header()["Connection"] = closing
	}
}

// exchangeOf returns the exchange that w is or wraps. Where there is none, what
// is written into the result is lost. (In a context it would be at hand just as
// well, but each request would have to be copied to carry it.)
func exchangeOf(w http.ResponseWriter) *exchange {
	for {
		switch inner := w.(type) {
		case *exchange:
			return inner
		case interface{ Unwrap() http.ResponseWriter }:
			w = inner.Unwrap()
		default:
			return new(exchange)
		}
	}
}

// Values of fields that nearly every answer has, in the form in which Header
// holds them: to share them spares each answer a few allocations. The names
// that they are stored under have to be in canonical form.
var (
	nosniff  = []string{"nosniff"}
	anybody  = []string{"*"}
	exposed  = []string{"ETag, Link, Location, Retry-After, X-Request-Id"}
	jsonType = []string{"application/json"}
	closing  = []string{"close"}
)

// observe gives each request an id, and a line in the log when it is over.
func observe(log *slog.Logger, next http.Handler) http.Handler {
	writing := newBudget(budgetBytes)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		x := &exchange{ResponseWriter: w, writing: writing, id: requestID(r.Header["X-Request-Id"]), traceID: traceID(r.Header["Traceparent"])}
		h := w.Header()
		h["X-Request-Id"] = []string{x.id}
		h["X-Content-Type-Options"] = nosniff
		if r.TransferEncoding != nil {
			// With a Content-Length beside it, the connection must not be used again,
			// since a proxy may have seen another end of the body (RFC 9112, section
			// 6.3). net/http has dropped that field by now, so this goes for all.
			h["Connection"] = closing
		}
		defer logAccess(log, x, r, start) // deferred: an aborted answer is logged too
		next.ServeHTTP(x, r)
	})
}

// logAccess writes the one line of a request, at a level that follows the
// outcome. No query, no header and no body gets into it.
func logAccess(log *slog.Logger, x *exchange, r *http.Request, start time.Time) {
	level := slog.LevelInfo
	switch {
	case x.status >= 500 || x.status == 0:
		level = slog.LevelError
	case x.status >= 400:
		level = slog.LevelWarn
	}
	if !log.Enabled(r.Context(), level) {
		return
	}
	if r.Method == http.MethodHead {
		x.bytes = 0 // net/http keeps the body to itself
	}
	attrs := make([]slog.Attr, 0, 10)
	attrs = append(attrs,
		slog.String("method", cut(r.Method, 32)),
		slog.String("path", loggedPath(r.URL.Path)),
		slog.Int("status", x.status),
		slog.Float64("duration_ms", float64(time.Since(start).Microseconds())/1000),
		slog.Int64("bytes", x.bytes),
		slog.String("request_id", x.id),
		slog.String("remote", r.RemoteAddr),
	)
	if x.subject != "" {
		attrs = append(attrs, slog.String("sub", cut(mask(x.subject), 256)))
	}
	if x.traceID != "" {
		attrs = append(attrs, slog.String("trace_id", x.traceID))
	}
	if x.cause != nil {
		attrs = append(attrs, slog.String("error", x.cause.Error()))
	}
	log.LogAttrs(r.Context(), level, "request", attrs...)
}

// loggedPath returns path with every segment that may be an e-mail address
// masked, cut at 256 bytes.
func loggedPath(path string) string {
	if strings.ContainsAny(path, "@%") { // %: an @ that was encoded twice
		segments := strings.Split(path, "/")
		for i, s := range segments {
			segments[i] = mask(s)
		}
		path = strings.Join(segments, "/")
	}
	return cut(path, 256)
}

// mask returns s, or stars if it may hold an e-mail address.
func mask(s string) string {
	if strings.Contains(s, "@") || strings.Contains(s, "%40") {
		return "***"
	}
	return s
}

// cut returns at most the first n bytes of s, and no part of a character.
func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

// requestID returns the caller's id if it is one that can go into a log and a
// header as it is, else a new one.
func requestID(given []string) string {
	if len(given) == 1 && len(given[0]) >= 1 && len(given[0]) <= 128 &&
		strings.IndexFunc(given[0], func(c rune) bool { return !isIDChar(c) }) < 0 {
		return given[0]
	}
	var b [16]byte // to tell requests apart, not a secret
	binary.NativeEndian.PutUint64(b[:8], rand.Uint64())
	binary.NativeEndian.PutUint64(b[8:], rand.Uint64())
	return hex.EncodeToString(b[:])
}

func isIDChar(c rune) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.ContainsRune("._~+/=:-", c)
}

// traceID returns the trace-id of a traceparent field, or "" if it is not one:
// "00-<32 hex digits>-<16>-<2>", and more after that in versions above 00
// (W3C Trace Context, section 3.2).
func traceID(given []string) string {
	if len(given) != 1 || len(given[0]) < 55 {
		return ""
	}
	s := given[0]
	version, id, parent, flags := s[:2], s[3:35], s[36:52], s[53:55]
	for _, part := range []string{version, id, parent, flags} {
		if strings.Trim(part, "0123456789abcdef") != "" {
			return ""
		}
	}
	if s[2] != '-' || s[35] != '-' || s[52] != '-' || version == "ff" ||
		strings.Trim(id, "0") == "" || strings.Trim(parent, "0") == "" ||
		len(s) > 55 && (version == "00" || s[55] != '-') {
		return ""
	}
	return id
}

// recoverPanics turns a panic into a 500, its stack into the log. If a part of
// the answer is out already, the connection is cut, so that the caller does
// not take the part for the whole.
func recoverPanics(log *slog.Logger, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			v := recover()
			if v == nil {
				return
			}
			if v == http.ErrAbortHandler { // somebody wants just that
				panic(v)
			}
			x := exchangeOf(w)
			log.Error("panic", "value", fmt.Sprint(v), "request_id", x.id, "stack", string(debug.Stack()))
			if x.status != 0 {
				panic(http.ErrAbortHandler)
			}
			writeError(w, r, fmt.Errorf("panic: %v", v))
		}()
		next.ServeHTTP(w, r)
	})
}

// sayGoodbye has the answers end their connections once the service is draining:
// drain.go says why.
func sayGoodbye(draining *atomic.Bool, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		exchangeOf(w).draining = draining
		next.ServeHTTP(w, r)
	})
}

// What cors lets scripts of other origins do (Fetch standard, section 3.2).
const (
	corsMethods = "GET, HEAD, POST, PUT, PATCH, DELETE"
	corsHeaders = "Authorization, Content-Type, Idempotency-Key, If-Match, If-None-Match, X-Request-Id, Traceparent"
)

// cors lets browsers use the service from scripts of the given origins; nil
// means all. Credentials are not a matter: tokens are sent by the script itself.
func cors(origins []string, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		allowed := true
		if origins == nil {
			h["Access-Control-Allow-Origin"] = anybody
		} else {
			h.Add("Vary", "Origin") // also without one: a cache must not mix the two
			origin := r.Header["Origin"]
			if allowed = len(origin) == 1 && slices.Contains(origins, origin[0]); allowed {
				h["Access-Control-Allow-Origin"] = origin
			}
		}
		preflight := r.Method == http.MethodOptions && r.Header["Origin"] != nil && r.Header["Access-Control-Request-Method"] != nil
		switch {
		case preflight && allowed:
			h.Set("Access-Control-Allow-Methods", corsMethods)
			h.Set("Access-Control-Allow-Headers", corsHeaders)
			h.Set("Access-Control-Max-Age", "7200") // seconds; the longest that all browsers keep
		case allowed:
			h["Access-Control-Expose-Headers"] = exposed
		}
		if preflight {
			w.WriteHeader(http.StatusNoContent)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// exactPath refuses the paths that ServeMux would redirect to a cleaner one,
// such as //health or /api/../health: no client of ours sends them, and a
// check that sees another path than the handler is a hole. It also answers
// "OPTIONS *", which asks about the server as a whole (RFC 9110, section 9.3.7).
func exactPath(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch p := r.URL.Path; {
		case r.RequestURI == "*" && r.Method == http.MethodOptions:
			w.Header().Set("Allow", corsMethods+", OPTIONS")
			w.WriteHeader(http.StatusNoContent)
		case r.RequestURI != "*" && p != "" && path.Clean(p) == p:
			next.ServeHTTP(w, r)
		default:
			writeError(w, r, errNotFound)
		}
	})
}

// whenStarted refuses requests until the store is ready to serve them.
func whenStarted(s *store, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !s.started.Load() {
			writeError(w, r, &failure{kind: kindUnavailable, message: "The service is starting"})
			return
		}
		next.ServeHTTP(w, r)
	})
}

// limitInFlight refuses the requests beyond most at a time. To refuse at once
// is kinder than a queue in which all wait until nobody can be served in time.
//
// A request is in flight while the service works for it, and not while its
// caller sends or reads: else a few slow callers would lock out all others. So
// the methods that come with a body enter when [readJSON] has read it, and do
// nothing before that; all leave with the first byte of the answer.
func limitInFlight(most int, next http.Handler) http.Handler {
	places := make(chan struct{}, most)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		x := exchangeOf(w)
		x.places = places
		defer x.leave()
		switch r.Method {
		case http.MethodPost, http.MethodPut, http.MethodPatch:
		default:
			if err := x.enter(); err != nil {
				writeError(w, r, err)
				return
			}
		}
		next.ServeHTTP(w, r)
	})
}

// grace is for how long the service works on for a caller who seems to be gone.
const grace = time.Second

// deadline limits how long a request may take, down to its SQL: what is still
// running then is cancelled, and the answer is 503.
//
// A caller who has closed its half of the connection may be gone, or may only
// have said all that it has to say and wait for the answer (as "nc -N" does):
// TCP does not tell. So it gets its answer if that is soon; but in an overload
// the work of those who gave up is not done.
func deadline(limit time.Duration, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Body == http.NoBody {
			// The deadline for reading the request: it has been read, and if it passed
			// while a slow caller reads the answer, net/http would take the next request
			// of the connection for one whose caller is gone.
			http.NewResponseController(w).SetReadDeadline(time.Time{})
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), limit)
		defer cancel()
		back := context.AfterFunc(r.Context(), func() { time.AfterFunc(grace, cancel) })
		defer back()
		next.ServeHTTP(w, r.WithContext(ctx))
	})
}

func bodyTooLarge(most int64) *failure {
	return &failure{kind: kindTooLarge, message: fmt.Sprintf("The body is larger than %d bytes", most)}
}

// limitBody refuses bodies of more than most bytes: at once if they announce
// it, else when they are read. All that are large share a [budget].
func limitBody(most int64, next http.Handler) http.Handler {
	reading := newBudget(budgetBytes)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength > most { // before the caller, who may be waiting for a 100, sends it
			writeError(w, r, bodyTooLarge(most))
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, most)
		if bytes := r.ContentLength; bytes > smallBytes || bytes < 0 {
			if bytes < 0 { // unknown: it is sent in chunks
				bytes = most
			}
			body := &countedBody{ReadCloser: r.Body, bytes: bytes, budget: reading, control: http.NewResponseController(w)}
			r.Body = body
			defer func() {
				if body.giveBack != nil {
					body.giveBack()
				}
			}()
		}
		next.ServeHTTP(w, r)
	})
}
