package main

import (
	"log/slog"
	"net/http"
	"slices"
	"sync/atomic"
	"testing"
)

// A closer is an io.Closer that calls a function.
type closer func()

func (c closer) Close() error { c(); return nil }

func TestQuota(t *testing.T) {
	t.Parallel()
	var evicted []string
	q := &quota{free: 100}
	acquire := func(name string, bytes int64) (release func()) {
		return q.acquire(bytes, closer(func() { evicted = append(evicted, name) }))
	}
	expect := func(free int64, names ...string) {
		t.Helper()
		if q.free != free || !slices.Equal(evicted, names) {
			t.Errorf("%d bytes are free and %v have been evicted; want %d and %v", q.free, evicted, free, names)
		}
		evicted = nil
	}
	one, two, three := acquire("one", 40), acquire("two", 40), acquire("three", 20)
	expect(0)
	two()
	expect(40)
	four := acquire("four", 50)
	expect(30, "one")
	one()
	expect(30)
	all := acquire("all", 1000) // more than there is
	expect(-900, "three", "four")
	after := acquire("after", 1)
	expect(99, "all")
	for _, release := range []func(){three, four, all, after} {
		release()
	}
	expect(100)
	if len(q.leases) != 0 {
		t.Errorf("%d leases are left", len(q.leases))
	}
}

// A large response that is not read gives way to another.
func TestSlowLargeResponseGivesWay(t *testing.T) {
	t.Parallel()
	content := make([]byte, quotaBytes)
	log := new(syncBuffer)
	s := &service{t: t, log: log}
	s.url = serveOn(t, nil, observe(slog.New(slog.NewJSONHandler(log, nil)), new(atomic.Bool), patience, http.HandlerFunc(
		func(w http.ResponseWriter, r *http.Request) { w.Write(content) })))
	slow := dialRaw(t, s)
	slow.send("GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
	if _, err := slow.Read(make([]byte, 1)); err != nil { // it is being sent
		t.Fatal(err)
	}
	if a := s.call("GET", "/", ""); a.status != 200 || len(a.body) != len(content) {
		t.Errorf("the other: %d, %d bytes", a.status, len(a.body))
	}
	line := findLine(t, s, func(line map[string]any) bool { return line["path"] == "/slow" })
	if line["level"] != "WARN" || line["error"] == nil {
		t.Errorf("logged %v; want WARN, and the reason", line)
	}
	if line := findLine(t, s, func(line map[string]any) bool { return line["path"] == "/" }); line["error"] != nil {
		t.Errorf("logged %v; want no error", line)
	}
}
