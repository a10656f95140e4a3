package main

import (
	"io"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"
)

// A response is built whole, then sent
//
// Every response of this service fits into memory. So the handlers write to a
// responseRecorder, which is sent when they have returned: a panic or a late error is
// always a clean 500, compression and the access log see the whole response, and a slow
// reader occupies nothing but the bytes of it. All large responses share a quota.

// A responseRecorder is an [http.ResponseWriter] that keeps the response.
type responseRecorder struct {
	http.ResponseWriter
	status int // 0 until it is written
	body   []byte
}

func (rec *responseRecorder) Unwrap() http.ResponseWriter { return rec.ResponseWriter }

func (rec *responseRecorder) WriteHeader(status int) {
	if rec.status == 0 {
		rec.status = status
	}
}

func (rec *responseRecorder) Write(p []byte) (int, error) {
	rec.WriteHeader(http.StatusOK)
	rec.body = append(rec.body, p...)
	return len(p), nil
}

// writeBody writes a whole response. The body must not be changed after.
func writeBody(w http.ResponseWriter, status int, contentType []string, body []byte) {
	rec := w.(*responseRecorder)
	rec.Header()["Content-Type"] = contentType
	rec.status, rec.body = status, body
}

const (
	// smallBytes is what one client may have in memory uncounted: net/http's
	// buffers and the header of a request take as much.
	smallBytes = 16 << 10
	// quotaBytes bounds all large responses together: 300 lists of 1000 users. The
	// requests of HTTP/2, of which one connection may have 32, count as well.
	quotaBytes = 64 << 20
)

// send sends the response to r. With last, the connection ends after it. The error is
// that of a client that has gone, or that reads too slowly.
func (rec *responseRecorder) send(r *http.Request, sending *quota, last bool) error {
	rec.WriteHeader(http.StatusOK) // unless it is written
	h := rec.Header()
	if last {
		h["Connection"] = connectionClose
	}
	h["Cache-Control"] = noStore
	if h["Etag"] != nil { // to ask by again (RFC 9111, section 5.2.2)
		h["Cache-Control"] = noCache
	}
	if rec.status != http.StatusNoContent && rec.status != http.StatusNotModified {
		h["Content-Length"] = []string{strconv.Itoa(len(rec.body))}
	}
	if len(rec.body) > smallBytes {
		defer sending.acquire(int64(len(rec.body)), connFrom(r.Context()))()
	}
	rec.ResponseWriter.WriteHeader(rec.status)
	if r.Method == http.MethodHead {
		return nil
	}
	part := max(len(rec.body), 1)
	if r.ProtoMajor == 2 { // a connection keeps a buffer of the largest part
		part = smallBytes
	}
	for p := range slices.Chunk(rec.body, part) {
		if _, err := rec.ResponseWriter.Write(p); err != nil {
			return err
		}
	}
	return http.NewResponseController(rec.ResponseWriter).Flush() // else the log could not tell of an error
}

const (
	lingerBytes = 1 << 20
	lingerTime  = 2 * time.Second
)

// linger reads on for a bounded while, for a client that sends its whole body before
// it reads the response: closing a connection with unread bytes resets it, and takes
// the response back (RFC 9112, section 9.6).
func (rec *responseRecorder) linger(r *http.Request) {
	rec.body = nil // it is sent
	control := http.NewResponseController(rec.ResponseWriter)
	control.Flush() // a response to HEAD
	control.SetReadDeadline(time.Now().Add(lingerTime))
	io.CopyN(io.Discard, r.Body, lingerBytes)
}

// A quota bounds the bytes that slow readers hold. To make room for a newcomer it
// evicts those that have held theirs the longest: a client that reads as fast as
// it can is never that one. It is safe for concurrent use.
type quota struct {
	mu     sync.Mutex
	free   int64
	leases []*lease // the oldest first
}

type lease struct {
	bytes int64
	conn  io.Closer
}

// acquire takes some bytes until release is called, even more than there are. If others
// need them before, conn is closed.
func (q *quota) acquire(bytes int64, conn io.Closer) (release func()) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.free < bytes && len(q.leases) > 0 {
		oldest := q.leases[0]
		q.leases = slices.Delete(q.leases, 0, 1)
		q.free += oldest.bytes
		oldest.conn.Close()
	}
	q.free -= bytes
	mine := &lease{bytes, conn}
	q.leases = append(q.leases, mine)
	return func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		if i := slices.Index(q.leases, mine); i >= 0 { // else it was evicted
			q.leases = slices.Delete(q.leases, i, i+1)
			q.free += bytes
		}
	}
}
