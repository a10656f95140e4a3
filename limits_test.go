package main

import (
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestBudget(t *testing.T) {
	t.Parallel()
	var cut []string
	b := newBudget(100)
	take := func(name string, bytes int64) (giveBack func()) {
		return b.take(bytes, func() { cut = append(cut, name) })
	}
	expect := func(free int64, names ...string) {
		t.Helper()
		if b.free != free || !slices.Equal(cut, names) {
			t.Errorf("%d bytes are free and %v have been cut off; want %d and %v", b.free, cut, free, names)
		}
		cut = nil
	}
	one, two, three := take("one", 40), take("two", 40), take("three", 20)
	expect(0)
	two()
	two() // once is enough
	expect(40)
	four := take("four", 50)
	expect(30, "one")
	one()
	expect(30)
	all := take("all", 1000) // more than there is
	expect(-900, "three", "four")
	after := take("after", 1)
	expect(99, "all")
	for _, giveBack := range []func(){three, four, all, after} {
		giveBack()
	}
	expect(100)
}

// A large body that does not come gives way to another.
func TestSlowLargeBodyGivesWay(t *testing.T) {
	t.Parallel()
	s := newService(t, "REQUEST_TIMEOUT=1h", fmt.Sprintf("MAX_BODY_BYTES=%d", budgetBytes)) // one takes it all
	const head = "POST /api/v1/users HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
	slow := dialRaw(t, s)
	slow.send(head + "Transfer-Encoding: chunked\r\n\r\n5\r\n{\"ema")
	small := dialRaw(t, s)
	small.send(head + "Content-Length: 41\r\n\r\n{\"email\"")
	answered := make(chan answer)
	go func() { answered <- slow.answer() }()
	var a answer
	waitFor(t, "the slow one to be cut off", func() bool {
		large := fmt.Sprintf(`{"email":"ada@example.com","name":"Ada","rest":"%s"}`, strings.Repeat("x", smallBytes))
		if b := s.call("POST", usersPath, large); b.status != 200 && b.status != 409 {
			t.Errorf("a large body: %d %s", b.status, b.body)
		}
		select {
		case a = <-answered:
			return true
		default:
			return false
		}
	})
	if a.status != 503 || !strings.Contains(a.body, "did not arrive in time") {
		t.Errorf("the slow one: %d %s", a.status, a.body)
	}
	if a := small.answerTo(`:"bob@example.com","name":"Bob"}` + " "); a.status != 200 {
		t.Errorf("a small one that was slow, too: %d %s", a.status, a.body)
	}
}

// A large answer that is not read gives way to another.
func TestSlowLargeAnswerGivesWay(t *testing.T) {
	t.Parallel()
	content := make([]byte, budgetBytes)
	ended := make(chan string, 1)
	h := observe(slog.New(slog.DiscardHandler), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, err := w.Write(content)
		if err != nil {
			ended <- r.URL.Path
		}
	}))
	checkLeaks(t)
	server := httptest.NewServer(h)
	defer server.Close()
	s := &service{t: t, url: server.URL}
	slow := dialRaw(t, s)
	slow.send("GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
	if _, err := slow.Read(make([]byte, 1)); err != nil { // it is being sent
		t.Fatal(err)
	}
	if a := s.call("GET", "/", ""); a.status != 200 || len(a.body) != len(content) {
		t.Errorf("the other: %d, %d bytes", a.status, len(a.body))
	}
	select {
	case path := <-ended:
		if path != "/slow" {
			t.Errorf("%s was cut off", path)
		}
	case <-time.After(patience):
		t.Error("the slow one is still being sent")
	}
}

func TestConnections(t *testing.T) {
	t.Parallel()
	log := new(syncBuffer)
	c := newConnections(3, slog.New(slog.NewTextHandler(log, nil)))
	conns := make(map[string]net.Conn)
	arrive := func(name string) {
		server, client := net.Pipe()
		t.Cleanup(func() { server.Close(); client.Close() })
		conns[name] = client
		conns["server "+name] = &connection{socket: newSocket(server)}
		c.track(conns["server "+name], http.StateNew)
	}
	change := func(name string, state http.ConnState) { c.track(conns["server "+name], state) }
	open := func(want string) {
		t.Helper()
		var names []string
		for name, conn := range conns {
			if _, served := strings.CutPrefix(name, "server "); served {
				continue
			}
			conn.SetReadDeadline(time.Now().Add(5 * time.Millisecond)) // there is nothing to read
			if _, err := conn.Read(make([]byte, 1)); err != io.EOF {
				names = append(names, name)
			}
		}
		slices.Sort(names)
		if got := strings.Join(names, " "); got != want {
			t.Errorf("open: %s; want %s", got, want)
		}
	}
	arrive("a")
	arrive("b")
	arrive("c")
	open("a b c")
	change("a", http.StateActive)
	arrive("d") // b has waited the longest
	open("a c d")
	change("b", http.StateClosed) // which the server notices later
	change("a", http.StateIdle)
	arrive("e")
	open("a d e")
	for _, name := range []string{"e", "a", "d"} {
		change(name, http.StateActive)
	}
	ended := false
	conns["server e"].(*connection).serving(func() { ended = true })
	arrive("f") // nobody waits: e has been at it the longest
	if !ended {
		t.Error("the work for e goes on")
	}
	open("a d f")
	for _, name := range []string{"a", "b", "c", "d", "e", "f"} {
		change(name, http.StateClosed)
	}
	if c.waiting != (connectionList{}) || c.busy != (connectionList{}) {
		t.Errorf("still counted: %v and %v", c.waiting.all(), c.busy.all())
	}
	if n := strings.Count(log.String(), "too many connections"); n != 1 {
		t.Errorf("%d lines in the log within a second; want 1", n)
	}
}
