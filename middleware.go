package main

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"path"
	"runtime/debug"
	"slices"
	"sync/atomic"
	"time"
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

// Values of fields that nearly every answer has, in the form in which Header
// holds them: to share them spares each answer a few allocations. The names
// that they are stored under have to be in canonical form.
var (
	nosniff  = []string{"nosniff"}
	anybody  = []string{"*"}
	exposed  = []string{"ETag, Link, Location, RateLimit, RateLimit-Policy, Retry-After, WWW-Authenticate, X-Request-Id"}
	jsonType = []string{"application/json"}
	closing  = []string{"close"}
	noStore  = []string{"no-store"}
	noCache  = []string{"private, no-cache"} // a browser may keep it, and has to ask each time
)

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
			x := exchangeOf(w)
			err := fmt.Errorf("panic: %v", v)
			x.cause = cmp.Or(x.cause, err) // why the response is cut off, if it is
			if v == http.ErrAbortHandler { // somebody wants just that
				panic(v)
			}
			log.Error("panic", "value", fmt.Sprint(v), "request_id", x.id, "stack", string(debug.Stack()))
			if x.status != 0 {
				panic(http.ErrAbortHandler)
			}
			writeError(w, r, err)
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

// What cors lets scripts of other origins do (Fetch standard, section 3.2). They
// may send any field, since libraries add those of their own, such as sentry-trace;
// Authorization is the one that * does not cover.
const (
	corsMethods = "GET, HEAD, POST, PUT, PATCH, DELETE"
	corsHeaders = "*, Authorization"
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

// deadline limits how long a request may take, down to its SQL: what is still
// running then is cancelled, and the answer is 503.
func deadline(limit time.Duration, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), limit)
		defer cancel()
		defer whileThere(w, r, cancel)()
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
		if r.Body == http.NoBody {
			next.ServeHTTP(w, r)
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
