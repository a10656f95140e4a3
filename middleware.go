package main

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"path"
	"runtime/debug"
	"slices"
)

// What wraps every request. Each layer is an http.Handler around the next one, in the
// order in which newHandler in main.go puts them, outermost first:
//
//	observe        first, so that every response has an id, a deadline and a line in the log
//	recoverPanics  inside observe, which sends and logs the 500; around all that may panic
//	cors           outside auth and mux, or a preflight would be a 401 or a 405
//
// then, for the API alone, since health must always respond:
//
//	requireAuth    before all else, so that a stranger learns and occupies nothing
//	limitRate      behind requireAuth, which knows whose request it is
//	requireReady   before more is spent on a request that can't be served
//
// around each mux:
//
//	exactPath      before the mux, which would redirect what this refuses
//
// and around the handlers of routes, so that a body that none of them wants is not read:
//
//	readBody       a client that sends slowly occupies nothing but its connection
//	limitInFlight  behind readBody, so that only work of the service counts
//	compress       sees the responses of the handlers alone

// Values of fields that nearly every response has, in the form in which Header holds
// them under canonical names: to share them spares each response a few allocations.
var (
	nosniff         = []string{"nosniff"}
	anyOrigin       = []string{"*"}
	corsExposed     = []string{"ETag, Link, Location, RateLimit, RateLimit-Policy, Retry-After, WWW-Authenticate, X-Request-Id"}
	jsonType        = []string{"application/json"}
	connectionClose = []string{"close"}
	noStore         = []string{"no-store"}
	noCache         = []string{"private, no-cache"} // a browser may keep it, and has to ask each time
)

// recoverPanics turns a panic into a 500, its stack into the log.
func recoverPanics(log *slog.Logger, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			switch v := recover(); v {
			case nil:
			case http.ErrAbortHandler: // the handler wants the connection to end
				panic(v)
			default:
				log.Error("panic", "value", fmt.Sprint(v), "request_id", infoFrom(r.Context()).id, "stack", string(debug.Stack()))
				writeError(w, r, fmt.Errorf("panic: %v", v))
			}
		}()
		next.ServeHTTP(w, r)
	})
}

// What cors lets scripts of other origins do (Fetch standard, section 3.2). They may send
// any field, since libraries add those of their own; * does not cover Authorization.
const (
	corsMethods = "GET, HEAD, POST, PUT, PATCH, DELETE"
	corsHeaders = "*, Authorization"
)

// cors lets browsers use the service from scripts of the given origins; nil means all.
// Credentials are not a matter: tokens are sent by the script itself.
func cors(origins []string, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h, origin := w.Header(), r.Header["Origin"]
		allowed := origins == nil
		if allowed {
			h["Access-Control-Allow-Origin"] = anyOrigin
		} else {
			h.Add("Vary", "Origin") // also without one: a cache must not mix the two
			if allowed = len(origin) == 1 && slices.Contains(origins, origin[0]); allowed {
				h["Access-Control-Allow-Origin"] = origin
			}
		}
		preflight := r.Method == http.MethodOptions && origin != nil && r.Header["Access-Control-Request-Method"] != nil
		if preflight {
			if allowed {
				h.Set("Access-Control-Allow-Methods", corsMethods)
				h.Set("Access-Control-Allow-Headers", corsHeaders)
				h.Set("Access-Control-Max-Age", "7200") // seconds; the longest that all browsers keep
			}
			w.WriteHeader(http.StatusNoContent)
			return
		}
		if allowed {
			h["Access-Control-Expose-Headers"] = corsExposed
		}
		next.ServeHTTP(w, r)
	})
}

// exactPath refuses the paths that ServeMux would redirect to a cleaner one, such as
// /api/../health: a check that sees another path than the handler is a hole. It also
// answers "OPTIONS *", which asks about the server (RFC 9110, section 9.3.7).
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

// readBody reads the body of a request, of max bytes at most, before the next layer sees
// the request.
func readBody(max int64, next http.Handler) http.Handler {
	return handlerFunc(func(w http.ResponseWriter, r *http.Request) error {
		body, err := readAll(w, r, max)
		if err != nil {
			return err
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		next.ServeHTTP(w, r)
		return nil
	})
}

var errInFlight = &apiError{kind: kindUnavailable, message: "Too many requests are being served"}

// limitInFlight refuses the requests beyond the size of inFlight, a semaphore: send to
// acquire, receive to release. It does so at once, which is better than a queue in which
// all wait until none can be served in time.
func limitInFlight(inFlight chan struct{}, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case inFlight <- struct{}{}:
			defer func() { <-inFlight }()
			next.ServeHTTP(w, r)
		default:
			writeError(w, r, errInFlight)
		}
	})
}
