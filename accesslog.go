package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf16"
	"unicode/utf8"
)

// A requestInfo is what is known of a request beside the request itself. The layers
// write into the one in its context; the access log reads it.
type requestInfo struct {
	start    time.Time
	id       string        // X-Request-Id
	traceID  string        // of a W3C traceparent; empty without one
	caller                 // of its token; set by requireAuth
	wait, db time.Duration // for the turn of a batch; for statements, with the wait for a connection
	bodyRead bool          // its body has been read to the end
	failure  *apiError     // what the response says, and its cause; nil of a success
}

type infoKey struct{}

// infoFrom returns the requestInfo of a request's context, and panics if there is none:
// whose request it is must not be guessed.
func infoFrom(ctx context.Context) *requestInfo { return ctx.Value(infoKey{}).(*requestInfo) }

// observe is the outermost layer. It gives each request an id, a requestInfo and a
// deadline, which holds down to its SQL. It sends the response when the handlers have
// returned, and logs one line. While draining, each response ends its connection.
func observe(log *slog.Logger, draining *atomic.Bool, limit time.Duration, next http.Handler) http.Handler {
	sending := &quota{free: quotaBytes}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		info := &requestInfo{start: time.Now(), id: requestID(r.Header["X-Request-Id"]), traceID: traceID(r.Header["Traceparent"])}
		h := w.Header()
		h["X-Request-Id"] = []string{info.id}
		h["X-Content-Type-Options"] = nosniff
		rec := &responseRecorder{ResponseWriter: w}
		if r.ProtoMajor == 2 {
			defer sending.acquire(requestBytes(r), connFrom(r.Context()))()
		}
		unread := false
		err := http.ErrAbortHandler // unless the handlers return
		defer func() {
			logAccess(log, r, rec, info, err)
			if unread && err == nil {
				rec.linger(r)
			}
		}()
		ctx, cancel := context.WithTimeout(context.WithValue(r.Context(), infoKey{}, info), limit)
		defer cancel()
		next.ServeHTTP(rec, r.WithContext(ctx))
		// A proxy may have seen another end of a chunked body, if a Content-Length
		// stood beside it (RFC 9112, section 6.3): net/http has dropped that field.
		last := draining.Load() || r.TransferEncoding != nil
		// net/http would wait for the rest of a body before it sends anything.
		unread = r.ProtoMajor == 1 && r.Body != http.NoBody && !info.bodyRead
		if log.Enabled(ctx, slog.LevelDebug) {
			h.Set("Server-Timing", fmt.Sprintf("db;dur=%.3f, wait;dur=%.3f", info.db.Seconds()*1e3, info.wait.Seconds()*1e3))
		}
		err = rec.send(r, sending, last || unread)
	})
}

// addTiming notes, if ctx is that of a request, for how long it has waited, and for how long
// its statement took.
func addTiming(ctx context.Context, wait, db time.Duration) {
	if info, ok := ctx.Value(infoKey{}).(*requestInfo); ok {
		info.wait += wait
		info.db += db
	}
}

// requestBytes returns what a request of HTTP/2 may hold while it is served: its head,
// buffers, and a small body.
func requestBytes(r *http.Request) int64 {
	bytes := smallBytes + len(r.RequestURI)
	if r.ContentLength != 0 {
		bytes += 2 * smallBytes
	}
	for name, values := range r.Header {
		for _, value := range values {
			bytes += 64 + len(name) + len(value) // with its place in the map
		}
	}
	return int64(bytes)
}

// logAccess writes the line of a request, at a level that follows the outcome. Nothing
// of the query, the header or the body gets into it.
func logAccess(log *slog.Logger, r *http.Request, rec *responseRecorder, info *requestInfo, aborted error) {
	level := slog.LevelInfo
	switch {
	case rec.status >= 500:
		level = slog.LevelError
	case rec.status >= 400 || aborted != nil:
		level = slog.LevelWarn
	}
	if !log.Enabled(r.Context(), level) {
		return
	}
	bytes := len(rec.body)
	if r.Method == http.MethodHead {
		bytes = 0
	}
	attrs := append(make([]slog.Attr, 0, 10),
		slog.String("method", cut(r.Method, 32)),
		slog.String("path", loggedPath(r.URL.Path)),
		slog.Int("status", rec.status),
		slog.Float64("duration_ms", float64(time.Since(info.start).Microseconds())/1000),
		slog.Int("bytes", bytes),
		slog.String("request_id", info.id),
		slog.String("remote", r.RemoteAddr),
	)
	if info.subject != "" {
		attrs = append(attrs, slog.String("sub", cut(mask(info.subject), 256)))
	}
	if info.traceID != "" {
		attrs = append(attrs, slog.String("trace_id", info.traceID))
	}
	cause := aborted
	if info.failure != nil && info.failure.cause != nil {
		cause = info.failure.cause
	}
	if cause != nil {
		attrs = append(attrs, slog.String("error", cause.Error()))
	}
	log.LogAttrs(r.Context(), level, "request", attrs...)
}

// loggedPath returns path, cut at 256 bytes, with every segment masked that may be an
// e-mail address.
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

const idChars = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._~+/=:-"

// requestID returns the caller's id if it is one that can go into a log and a header as
// it is, else a new one, which tells requests apart, and is no secret.
func requestID(given []string) string {
	if len(given) == 1 && given[0] != "" && len(given[0]) <= 128 && strings.Trim(given[0], idChars) == "" {
		return given[0]
	}
	var b [16]byte
	binary.NativeEndian.PutUint64(b[:8], rand.Uint64())
	binary.NativeEndian.PutUint64(b[8:], rand.Uint64())
	return hex.EncodeToString(b[:])
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

// newLogger returns the log that cfg asks for.
func newLogger(cfg config, w io.Writer) *slog.Logger {
	options := &slog.HandlerOptions{Level: cfg.logLevel}
	if cfg.logFormat == "text" {
		return slog.New(slog.NewTextHandler(w, options))
	}
	return slog.New(slog.NewJSONHandler(printableWriter{w}, options))
}

// A printableWriter escapes what is not printable in a line of JSON: a path must not move
// the cursor of a terminal, or turn the letters around. slog does so in text, but in JSON
// only what RFC 8259 demands.
type printableWriter struct{ io.Writer }

func (w printableWriter) Write(line []byte) (int, error) {
	if !bytes.ContainsFunc(line, notPrintable) {
		return w.Writer.Write(line)
	}
	var escaped []byte
	for _, r := range string(line) {
		if !notPrintable(r) {
			escaped = utf8.AppendRune(escaped, r)
			continue
		}
		for _, unit := range utf16.AppendRune(nil, r) {
			escaped = fmt.Appendf(escaped, `\u%04x`, unit)
		}
	}
	_, err := w.Writer.Write(escaped)
	return len(line), err
}

func notPrintable(r rune) bool { return r > '~' && !strconv.IsPrint(r) }
