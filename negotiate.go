package main

import (
	"bytes"
	"compress/gzip"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
)

// What the caller prefers: content negotiation by the Accept fields (RFC 9110,
// section 12), and the one layer that depends on it, compression.

// quality returns the weight that a list of the form of Accept or
// Accept-Encoding gives to name: its "q" from 0 to 1 (RFC 9110, section
// 12.4.2), or -1 if no member names it. Parameters other than q are ignored; a
// member with a broken weight counts as refused.
func quality(fields []string, name string) float64 {
	q := -1.0
	for _, field := range fields {
		for member := range strings.SplitSeq(field, ",") {
			token, params, _ := strings.Cut(member, ";")
			if !strings.EqualFold(strings.TrimSpace(token), name) {
				continue
			}
			weight := 1.0
			for param := range strings.SplitSeq(params, ";") {
				key, value, _ := strings.Cut(strings.TrimSpace(param), "=")
				if strings.EqualFold(key, "q") {
					weight = parseWeight(value)
				}
			}
			q = max(q, weight)
		}
	}
	return q
}

// parseWeight returns the weight that s spells: 0 to 1 with up to three
// digits behind the point. Anything else is 0.
func parseWeight(s string) float64 {
	if len(s) > 5 || len(s) > 1 && s[1] != '.' || strings.Trim(s, "0123456789.") != "" {
		return 0
	}
	weight, err := strconv.ParseFloat(s, 64)
	if err != nil || weight > 1 {
		return 0
	}
	return weight
}

// prefersProblem reports whether an Accept field asks for errors as
// application/problem+json: by that name, and not less than for plain JSON.
func prefersProblem(accept []string) bool {
	q := quality(accept, "application/problem+json")
	return q > 0 && q >= quality(accept, "application/json")
}

// acceptsGzip reports whether an Accept-Encoding field allows gzip and does
// not prefer the bare content (RFC 9110, section 12.5.3).
func acceptsGzip(accept []string) bool {
	if len(accept) == 0 {
		return false
	}
	q := max(quality(accept, "gzip"), quality(accept, "x-gzip"))
	if q < 0 {
		q = quality(accept, "*")
	}
	return q > 0 && q >= quality(accept, "identity")
}

// gzipMinBytes is the length beyond which an answer is worth compressing: one
// up to that fits into a packet as it is.
const gzipMinBytes = 1024

// compress is the layer that sends answers of over 1 KiB with gzip to those
// who accept it. An answer with an ETag stays as it is: a strong validator
// promises the very bytes, and gzip makes others (RFC 9110, section 8.8.1).
func compress(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		gz := &gzipWriter{ResponseWriter: w, accepted: acceptsGzip(r.Header["Accept-Encoding"])}
		next.ServeHTTP(gz, r)
		gz.finish() // not deferred: after a panic there is nothing to complete
	})
}

// gzippers are idle writers: each costs 800 KB to make.
var gzippers = sync.Pool{New: func() any { return gzip.NewWriter(io.Discard) }}

// A gzipWriter decides with the header, by the length that it announces.
type gzipWriter struct {
	http.ResponseWriter
	accepted bool
	decided  bool
	status   int          // of an answer that is being packed: its head waits for the length
	gz       *gzip.Writer // nil: the answer passes as it is
	packed   bytes.Buffer // what gz has made: no caller, however slow it reads, holds on to gz
}

func (w *gzipWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *gzipWriter) WriteHeader(status int) {
	if h := w.Header(); !w.decided && status >= 200 {
		w.decided = true
		length, _ := strconv.Atoi(h.Get("Content-Length"))
		if length > gzipMinBytes && h.Get("ETag") == "" && h.Get("Content-Encoding") == "" {
			h.Add("Vary", "Accept-Encoding")
			if w.accepted {
				w.status = status
				w.gz = gzippers.Get().(*gzip.Writer)
				w.gz.Reset(&w.packed)
				return
			}
		}
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *gzipWriter) Write(p []byte) (int, error) {
	if !w.decided {
		w.WriteHeader(http.StatusOK)
	}
	if w.gz != nil {
		return w.gz.Write(p)
	}
	return w.ResponseWriter.Write(p)
}

func (w *gzipWriter) finish() {
	if w.gz != nil {
		w.gz.Close()
		gzippers.Put(w.gz)
		w.Header().Set("Content-Encoding", "gzip")
		w.Header().Set("Content-Length", strconv.Itoa(w.packed.Len()))
		w.ResponseWriter.WriteHeader(w.status)
		w.ResponseWriter.Write(w.packed.Bytes()) // an error here means that the caller is gone
	}
}
