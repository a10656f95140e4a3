package main

import (
	"bytes"
	"compress/gzip"
	"io"
	"net/http"
	"sync"
)

// gzipMinBytes is the length beyond which a response is worth compressing: one
// up to that fits into a packet as it is.
const gzipMinBytes = 1024

// gzipWriters are idle: to make one costs 800 KB.
var gzipWriters = sync.Pool{New: func() any { return gzip.NewWriter(io.Discard) }}

// compress is the layer that compresses responses of over 1 KiB for clients that
// accept gzip. A response with an ETag stays as it is: a strong validator
// promises the very bytes, and gzip makes others (RFC 9110, section 8.8.1).
func compress(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		next.ServeHTTP(w, r)
		rec := w.(*responseRecorder)
		h := rec.Header()
		if len(rec.body) <= gzipMinBytes || h["Etag"] != nil || h["Content-Encoding"] != nil {
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

// acceptsGzip reports whether an Accept-Encoding field allows gzip and does
// not prefer the bare content (RFC 9110, section 12.5.3).
func acceptsGzip(accept []string) bool {
	q := max(quality(accept, "gzip"), quality(accept, "x-gzip"))
	if q < 0 {
		q = quality(accept, "*")
	}
	return q > 0 && q >= quality(accept, "identity")
}
