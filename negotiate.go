package main

import (
	"bytes"
	"compress/gzip"
	"io"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"sync"
)

// Content negotiation by the Accept fields (RFC 9110, section 12): in which form a
// client wants an error, and whether it takes gzip.

// weightForm matches 0 to 1 with up to three digits behind the point.
var weightForm = regexp.MustCompile(`^(0(\.\d{0,3})?|1(\.0{0,3})?)$`)

// quality returns the weight that an Accept or Accept-Encoding field gives to name: its
// "q" from 0 to 1 (RFC 9110, section 12.4.2), the highest if it is there more than once,
// or -1 if it is not. Other parameters are ignored; a broken weight counts as 0.
func quality(fields []string, name string) float64 {
	q := -1.0
	for member := range strings.SplitSeq(strings.Join(fields, ","), ",") {
		token, params, _ := strings.Cut(member, ";")
		if !strings.EqualFold(strings.TrimSpace(token), name) {
			continue
		}
		weight := 1.0
		for param := range strings.SplitSeq(params, ";") {
			key, value, _ := strings.Cut(strings.TrimSpace(param), "=")
			if strings.EqualFold(key, "q") {
				weight = 0
				if weightForm.MatchString(value) {
					weight, _ = strconv.ParseFloat(value, 64)
				}
			}
		}
		q = max(q, weight)
	}
	return q
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
	q := max(quality(accept, "gzip"), quality(accept, "x-gzip"))
	if q < 0 {
		q = quality(accept, "*")
	}
	return q > 0 && q >= quality(accept, "identity")
}

// gzipWriters are idle: to make one costs 800 KB.
var gzipWriters = sync.Pool{New: func() any { return gzip.NewWriter(io.Discard) }}

// compress is the layer that compresses responses of over 1 KiB, which one packet can't
// hold, for clients that accept gzip. A response with an ETag stays as it is: a strong
// validator promises the very bytes, and gzip makes others (RFC 9110, section 8.8.1).
func compress(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		next.ServeHTTP(w, r)
		rec := w.(*responseRecorder)
		h := rec.Header()
		if len(rec.body) <= 1024 || h["Etag"] != nil || h["Content-Encoding"] != nil {
			return
		}
		h.Add("Vary", "Accept-Encoding")
		if !acceptsGzip(r.Header["Accept-Encoding"]) {
			return
		}
		h.Set("Content-Encoding", "gzip")
		var compressed bytes.Buffer // which takes everything without an error
		gz := gzipWriters.Get().(*gzip.Writer)
		defer gzipWriters.Put(gz)
		gz.Reset(&compressed)
		gz.Write(rec.body)
		gz.Close()
		rec.body = compressed.Bytes()
	})
}
