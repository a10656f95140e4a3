package main

import (
	"cmp"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"
)

// One request and its answer: who asks, under which id, with what outcome; and
// the line in the log that says so.

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
	// conn is what the answer goes out on. It is nil where it is unknown, and with TLS,
	// which writes to it also from the goroutine that reads (RFC 8446, section 4.6.3),
	// whose Close waits for what is being written below it, and whose caller may say
	// good-bye without ending it.
	conn  *connection
	http2 *tls.Conn // what the answers of HTTP/2 go out on; nil: this is none
	head  bool      // the method is HEAD
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
		defer x.writing.take(int64(len(p)), x.cutOff)()
	}
	n, err := x.write(p)
	x.bytes += int64(n)
	if err != nil && x.cause == nil {
		x.cause = err // a caller who left, or was too slow
	}
	return n, err
}

// cutOff ends the writing of the answer. In HTTP/2, a deadline would only have a frame
// sent that says so, behind all that the caller does not read: so the connection ends.
func (x *exchange) cutOff() {
	if x.http2 != nil {
		x.http2.NetConn().Close()
		return
	}
	http.NewResponseController(x.ResponseWriter).SetWriteDeadline(time.Unix(1, 0))
}

// writeHTTP2 writes p in small frames, since a connection keeps a buffer of the largest,
// and returns when they are out: what waited longer would not be counted.
func (x *exchange) writeHTTP2(p []byte) (n int, err error) {
	for frame := range slices.Chunk(p, smallBytes) {
		written, err := x.ResponseWriter.Write(frame)
		if n += written; err != nil {
			return n, err
		}
	}
	if x.head { // the stream has ended
		return n, nil
	}
	return n, http.NewResponseController(x.ResponseWriter).Flush()
}

// write writes p, and what net/http holds of the answer so far, as one.
func (x *exchange) write(p []byte) (int, error) {
	if x.http2 != nil {
		return x.writeHTTP2(p)
	}
	if x.conn == nil || len(p) <= 2<<10 { // it stays in net/http's buffer, with the head, until all is there
		return x.ResponseWriter.Write(p)
	}
	x.conn.gather()
	n, err := x.ResponseWriter.Write(p)
	err = errors.Join(err, http.NewResponseController(x.ResponseWriter).Flush())
	if broken := x.conn.send(); broken != nil {
		// net/http takes it for written, and would go on with the next request.
		x.cause = cmp.Or(x.cause, broken)
		panic(http.ErrAbortHandler)
	}
	return n, err
}

// begin notes the status, just before the head of the answer goes out. That is the
// moment to see whether the service is to stop: it may have begun while the
// request was being served. And whether there is an ETag to ask by again: only
// such an answer may be kept (RFC 9111, section 5.2.2).
func (x *exchange) begin(status int) {
	x.status = status
	x.Header()["Cache-Control"] = noStore
	if x.Header()["Etag"] != nil {
		x.Header()["Cache-Control"] = noCache
	}
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

// observe gives each request an id, and a line in the log when it is over.
func observe(log *slog.Logger, next http.Handler) http.Handler {
	writing, streams := newBudget(budgetBytes), newBudget(streamsBudget)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		x := &exchange{ResponseWriter: w, head: r.Method == http.MethodHead, writing: writing, id: requestID(r.Header["X-Request-Id"]), traceID: traceID(r.Header["Traceparent"])}
		switch c := r.Context().Value(connectionKey{}).(type) {
		case *connection:
			x.conn = c
		case *tls.Conn:
			if r.ProtoMajor == 2 {
				x.http2 = c
				defer streams.take(streamBytes(r), x.cutOff)()
			}
		}
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
		if w, ok := w.(interface{ FlushError() error }); ok && x.status != 0 && !x.head {
			// What net/http still holds goes out now: else the log could not tell of a
			// connection that breaks.
			x.cause = cmp.Or(x.cause, w.FlushError())
		}
	})
}

// logAccess writes the one line of a request, at a level that follows the
// outcome: ERROR for a 5xx or no answer at all, WARN for a 4xx and for an answer
// that did not get through, whatever its status, else INFO. No query, no header
// and no body gets into it.
func logAccess(log *slog.Logger, x *exchange, r *http.Request, start time.Time) {
	level := slog.LevelInfo
	switch {
	case x.status >= 500 || x.status == 0:
		level = slog.LevelError
	case x.status >= 400 || x.cause != nil:
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
