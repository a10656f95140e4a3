package main

import (
	"cmp"
	"container/list"
	"io"
	"net/http"
	"sync"
	"syscall"
	"time"
)

// What callers may occupy
//
// A caller who sends or reads slowly costs no time, but holds on to what was
// given to it. Three things could run out, and each has a bound:
//
//	places in flight   held only while the service works: not while a body comes
//	                   in, and not while an answer goes out (middleware.go)
//	memory             large bodies, large answers and the requests of HTTP/2, of which
//	                   a connection may have 32, share a budget each
//	connections        no more than there are file descriptors for
//
// A place in flight that is taken is a refusal, since the work will be done in
// a moment. The other two are held for as long as the caller likes: there a
// newcomer is let in, and who has been there the longest is cut off. Whoever
// sends and reads as fast as it can is never that one: an attacker is.

const (
	// smallBytes is what one caller may have in memory uncounted: net/http's
	// buffers and a request's header take as much.
	smallBytes = 16 << 10
	// budgetBytes bounds all large bodies together, and all large answers: 300
	// lists of 1000 users each.
	budgetBytes = 64 << 20
	// maxConnections bounds memory, since net/http takes some 20 KB for each: see
	// mostConnections.
	maxConnections = 10_000
	// streamsBudget bounds all requests of HTTP/2 together, in bytes: as many small
	// ones as there may be connections.
	streamsBudget = maxConnections * smallBytes
)

// http2Limits keeps a connection of HTTP/2 to what one of HTTP/1 may hold. net/http
// has no time limit for a head there, but while one is coming in no frame is complete:
// neither is the answer to a PING, which is due 5 s after the last frame.
var http2Limits = &http.HTTP2Config{
	MaxConcurrentStreams:          32,
	MaxReadFrameSize:              16 << 10, // bytes; the least there is: each connection keeps a buffer of the largest
	MaxReceiveBufferPerConnection: 64 << 10, // bytes
	MaxReceiveBufferPerStream:     64 << 10,
	SendPingTimeout:               2 * time.Second, // without a frame
	PingTimeout:                   3 * time.Second,
	WriteByteTimeout:              10 * time.Second, // without a byte read
}

// http2WriteBuffer is how much of its answers, in bytes, may lie in the kernel before a
// PING: a client that reads 350 kbit/s answers that in time.
const http2WriteBuffer = 64 << 10

// streamBytes returns what a request of HTTP/2 may hold while it is served: its head,
// buffers, and a body that is small.
func streamBytes(r *http.Request) int64 {
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

// A budget bounds the bytes that slow callers hold. It is safe for concurrent use.
type budget struct {
	mu      sync.Mutex
	free    int64
	holders list.List // of *holder, in the order of their arrival
}

type holder struct {
	bytes  int64
	cutOff func()
}

func newBudget(bytes int64) *budget { return &budget{free: bytes} }

// take lets the caller hold some bytes until it calls giveBack. To make room it
// cuts off those who have held theirs the longest, even for one who takes more
// than there is. cutOff may be called until giveBack returns, and must not wait.
func (b *budget) take(bytes int64, cutOff func()) (giveBack func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.free < bytes && b.holders.Len() > 0 {
		first := b.holders.Remove(b.holders.Front()).(*holder)
		b.free += first.bytes
		first.cutOff()
		first.bytes = 0 // it has given back
	}
	b.free -= bytes
	me := &holder{bytes, cutOff}
	place := b.holders.PushBack(me)
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.free += me.bytes
		me.bytes = 0
		b.holders.Remove(place) // does nothing if it is out already
	}
}

// A countedBody is the body of a request that may be large. It takes its part of
// the budget with the first read, and gives it back with the end or an error,
// so that nobody is cut off who has sent all.
type countedBody struct {
	io.ReadCloser
	bytes    int64
	budget   *budget
	control  *http.ResponseController
	giveBack func() // nil before the first read
}

func (b *countedBody) Read(p []byte) (int, error) {
	if b.giveBack == nil {
		b.giveBack = b.budget.take(b.bytes, func() { b.control.SetReadDeadline(time.Unix(1, 0)) })
	}
	n, err := b.ReadCloser.Read(p)
	if err != nil {
		b.giveBack()
	}
	return n, err
}

// mostConnections returns how many connections a server may have: as many as the
// process may have files, less reserved ones, up to [maxConnections]. Beyond that,
// accept(2) would fail with EMFILE: then not even health gets in, and no new
// connection to PostgreSQL comes about.
func mostConnections(reserved int) int {
	most := maxConnections
	var files syscall.Rlimit
	// The soft limit, which the os package has raised to the hard one.
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err == nil && files.Cur < uint64(most+reserved) {
		most = max(int(files.Cur)-reserved, 8)
	}
	return most
}

// makeRoom closes a connection if there are as many as there may be: the one that
// has been waiting for its next request the longest, or, when none is, the one that
// has been within one the longest.
func (cs *connections) makeRoom() {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if cs.waiting.len+cs.busy.len < cs.most {
		return
	}
	victim := cmp.Or(cs.waiting.first, cs.busy.first)
	victim.list.remove(victim)
	victim.Close() // and not TLS, which would wait for the caller to read its good-bye
	victim.endWork()
	cs.closed++
	if now := time.Now(); now.Sub(cs.logged) > time.Second {
		cs.log.Warn("too many connections: those that did nothing the longest were closed", "most", cs.most, "closed", cs.closed)
		cs.closed, cs.logged = 0, now
	}
}
