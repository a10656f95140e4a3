package main

import (
	"database/sql"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptrace"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// What the tests of failures have in common (make chaos runs them in full): a
// load whose clients know at any time what the true answer to a request is, and
// what has to be in the table in the end.
//
// No two clients write to one user. So each knows the state of its own users
// exactly, however the requests of all of them interleave, and every answer but
// that state is wrong: an error of the server, but also a 409 to the create
// whose own first try has taken the address, or a 412 to an update that holds
// the right ETag.

// chaosRounds returns how often a test injects its fault: the full number for
// make chaos, which runs one test after the other, else the short one, beside
// the other tests.
func chaosRounds(t *testing.T, full, short int) int {
	checkLeaks(t) // before there is anything that it could leave behind
	t.Helper()
	if os.Getenv("ROLLCALL_CHAOS") != "" {
		return full
	}
	t.Parallel()
	return short
}

// notInstalled skips a test for which a program of this package of Debian's is not
// installed. It fails it in make chaos, whose table would lack a line.
func notInstalled(t testing.TB, program, pkg string) {
	t.Helper()
	say := t.Skipf
	if fullChaos() {
		say = t.Fatalf
	}
	say("%s is not installed: apt-get install %s", program, pkg)
}

// An outcome is a line of the table that make chaos prints.
type outcome struct {
	faults   int           // injected by the test, which sets it
	requests int           // sent
	failed   int           // those without their true answer
	lost     int           // acknowledged changes that the table does not show
	doubled  int           // changes in the table that no answer explains
	worst    time.Duration // the longest that a request took

	details []string // of the first few that failed, were lost or doubled
}

// count counts something of the outcome, and keeps the details of the first of them.
func (o *outcome) count(what *int, format string, args ...any) {
	if *what++; *what <= 5 {
		o.details = append(o.details, fmt.Sprintf(format, args...))
	}
}

// chaosTable holds the outcomes of this run, for [printChaosTable].
var chaosTable struct {
	mu    sync.Mutex
	lines []string
}

// want reports each thing that failed, was lost or doubled as an error of the
// test, and enters the outcome in the table under a name that says what the
// fault was.
func (o outcome) want(t testing.TB, name string) {
	t.Helper()
	line := fmt.Sprintf("| %-52s | %6d | %8d | %6d | %4d | %7d | %8.2f s |",
		name, o.faults, o.requests, o.failed, o.lost, o.doubled, o.worst.Seconds())
	t.Log(line)
	chaosTable.mu.Lock()
	chaosTable.lines = append(chaosTable.lines, line)
	chaosTable.mu.Unlock()
	if o.failed+o.lost+o.doubled > 0 {
		t.Errorf("of %d requests %d failed, %d changes were lost and %d doubled; the first of each:\n%s",
			o.requests, o.failed, o.lost, o.doubled, strings.Join(o.details, "\n"))
	}
	if o.faults == 0 || o.requests == 0 {
		t.Errorf("%d faults and %d requests prove nothing", o.faults, o.requests)
	}
}

// printChaosTable prints the table of this run, in Markdown.
func printChaosTable(w io.Writer) {
	if os.Getenv("ROLLCALL_CHAOS") == "" || len(chaosTable.lines) == 0 {
		return
	}
	fmt.Fprintf(w, "\n| %-52s | faults | requests | failed | lost | doubled | worst wait |\n", "")
	fmt.Fprintf(w, "|:%s-|-------:|---------:|-------:|-----:|--------:|-----------:|\n", strings.Repeat("-", 52))
	fmt.Fprintf(w, "%s\n\n", strings.Join(chaosTable.lines, "\n"))
}

// A load is a number of clients that send one request after the other.
type load struct {
	t       testing.TB
	urls    []string
	http    *http.Client
	clients []*loadClient
	running sync.WaitGroup
	quit    chan struct{}
	ended   sync.Once
	answers atomic.Int64 // requests that have ended, however they did

	mu  sync.Mutex
	sum outcome
}

// chaosConns is how many clients the load has.
const chaosConns = 64

// startLoad begins a mixed load of conns clients on the service at url
// (AUTH=off), and on its other replicas. Nobody else may write to its table.
func startLoad(t testing.TB, url string, conns int, replicas ...string) *load {
	t.Helper()
	l := &load{t: t, urls: append(replicas, url), quit: make(chan struct{}), http: &http.Client{
		Timeout:   2 * time.Minute, // longer than any REQUEST_TIMEOUT of a test
		Transport: &http.Transport{MaxIdleConnsPerHost: conns, DisableCompression: true},
	}}
	for i := range conns {
		c := &loadClient{load: l, prefix: fmt.Sprintf("c%d", i), byID: make(map[string]*account)}
		l.clients = append(l.clients, c)
		l.running.Go(func() {
			for {
				select {
				case <-l.quit:
					return
				default:
					c.step()
				}
			}
		})
	}
	t.Cleanup(l.end) // of a test that has failed halfway
	return l
}

// end lets the requests in flight be answered, and ends the clients.
func (l *load) end() {
	l.ended.Do(func() { close(l.quit) })
	l.running.Wait()
	l.http.CloseIdleConnections()
}

// wait waits until n more requests have been answered.
func (l *load) wait(n int) {
	l.t.Helper()
	until := l.answers.Load() + int64(n)
	waitFor(l.t, fmt.Sprintf("%d more answers", n), func() bool { return l.answers.Load() >= until })
}

// stop lets the requests in flight be answered, ends the clients, and checks the
// table in db row by row against what the answers said.
func (l *load) stop(db *sql.DB) outcome {
	l.t.Helper()
	l.end()
	rows, err := db.Query("SELECT " + columns + " FROM users")
	if err != nil {
		l.t.Fatal(err)
	}
	defer rows.Close()
	table := make(map[string]user)
	for rows.Next() {
		var u user
		if err := rows.Scan(u.fields()...); err != nil {
			l.t.Fatal(err)
		}
		table[u.ID] = u
	}
	if err := rows.Err(); err != nil {
		l.t.Fatal(err)
	}
	maybe := make(map[string]bool) // the addresses of creates that may have gone through
	for _, c := range l.clients {
		for _, a := range c.all {
			if a.id == "" {
				maybe[a.maybe.email] = true
				continue
			}
			row, exists := table[a.id]
			delete(table, a.id)
			l.compare(a, row, exists)
		}
	}
	for _, row := range table {
		if !maybe[row.Email] {
			l.count(&l.sum.doubled, "doubled: no create made %s", row.appendJSON(nil))
		}
		delete(maybe, row.Email)
	}
	l.sum.requests = int(l.answers.Load())
	for _, c := range l.clients {
		l.sum.worst = max(l.sum.worst, c.worst)
	}
	return l.sum
}

// compare checks what has become of a user.
func (l *load) compare(a *account, row user, exists bool) {
	stored := string(row.appendJSON(nil))
	switch {
	case !exists && (a.gone || a.maybe.gone):
	case !exists:
		l.count(&l.sum.lost, "lost: acknowledged %s\nis not in the table", a.body)
	case a.gone:
		l.count(&l.sum.lost, "lost: the delete of %s", stored)
	case stored == a.body:
	case a.maybe.email == row.Email && a.maybe.name == row.Name:
	case row.UpdatedAt.UTC().Format(timeFormat) < a.updated:
		l.count(&l.sum.lost, "lost: acknowledged %s\nthe table has      %s", a.body, stored)
	default: // what was refused has been done, or what was answered was done again
		l.count(&l.sum.doubled, "doubled: acknowledged %s\nthe table has         %s", a.body, stored)
	}
}

// count counts something in l.sum.
func (l *load) count(what *int, format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sum.count(what, format, args...)
}

// A loadClient is one client with its users.
type loadClient struct {
	load   *load
	prefix string // of its addresses
	serial int    // of what it last wrote
	all    []*account
	live   []*account // those that it goes on with
	gone   *account   // the last one that it deleted
	byID   map[string]*account
	worst  time.Duration
}

// An account is a user as its owner knows it from the answers.
type account struct {
	id      string // empty if the create was never answered
	email   string
	name    string
	created string
	updated string
	body    string // of the last acknowledged answer, as a GET has to repeat it
	etag    string
	stale   string // an ETag that it had before; empty if there is none
	gone    bool
	left    bool // a request has failed: the client leaves it as it is

	// maybe is what a write of which nobody knows whether it was done has made of
	// it, if it was: the answer was an error of the server, or there was none.
	maybe struct {
		email, name string
		gone        bool
	}
}

func (a *account) path() string { return usersPath + "/" + a.id }

// maxLive is how many users a client has at a time, at most.
const maxLive = 40

// step sends one request: as many as there are kinds of writes, of refusals and
// of reads, with and without a condition.
func (c *loadClient) step() {
	kind := rand.IntN(100)
	if len(c.live) == 0 {
		c.create()
		return
	}
	a := c.live[rand.IntN(len(c.live))]
	if len(c.live) >= maxLive && kind < 20 {
		c.delete(a, "")
		return
	}
	switch {
	case kind < 20:
		c.create()
	case kind < 32:
		c.update(a, "")
	case kind < 44:
		c.update(a, a.etag)
	case kind < 48:
		c.delete(a, "")
	case kind < 52:
		c.delete(a, a.etag)
	case kind < 57:
		c.refused(a, 409, "POST", usersPath, userJSON(strings.ToUpper(a.email), "Twin"), "")
	case kind < 59:
		if b := c.live[0]; b != a {
			c.refused(a, 409, "PATCH", a.path(), userJSON(b.email, "Twin"), "")
		}
	case kind < 63:
		if a.stale != "" {
			c.refused(a, 412, "PUT", a.path(), userJSON("", "Stale"), a.stale)
		}
	case kind < 65:
		if a.stale != "" {
			c.refused(a, 412, "DELETE", a.path(), "", a.stale)
		}
	case kind < 67:
		c.deleteAgain()
	case kind < 69:
		c.refused(nil, 404, "GET", usersPath+"/"+newUUID(), "", "")
	case kind < 71:
		if c.gone != nil {
			c.refused(nil, 404, "GET", c.gone.path(), "", "")
		}
	case kind < 76:
		c.list()
	default:
		c.get(a)
	}
}

// userJSON is the body of a create or an update. An empty field is absent.
func userJSON(email, name string) string {
	fields := make(map[string]string)
	if email != "" {
		fields["email"] = email
	}
	if name != "" {
		fields["name"] = name
	}
	body, err := json.Marshal(fields)
	if err != nil {
		panic(err) // strings can always be encoded
	}
	return string(body)
}

// next returns an address and a name that nobody has had before.
func (c *loadClient) next() (email, name string) {
	c.serial++
	return fmt.Sprintf("%s-%d@example.com", c.prefix, c.serial), fmt.Sprintf("Name %d", c.serial)
}

// create makes a user, one of three times with an Idempotency-Key, and then
// twice: the second answer has to be the first.
func (c *loadClient) create() {
	email, name := c.next()
	a := &account{email: email, name: name}
	var key []string
	if rand.IntN(3) == 0 {
		key = []string{"Idempotency-Key", strconv.Quote(email)}
	}
	got := c.ask("POST", usersPath, userJSON(email, name), "", key...)
	if got.status == 0 || got.status >= 500 {
		a.maybe.email = email
		c.all = append(c.all, a)
	}
	if got.status != 200 {
		c.failed(a, got, "POST of a new address %s", email)
		return
	}
	c.all = append(c.all, a)
	c.live = append(c.live, a)
	c.acknowledge(a, got)
	c.byID[a.id] = a
	if key == nil {
		return
	}
	if again := c.ask("POST", usersPath, userJSON(email, name), "", key...); again.status != 200 || again.body != got.body {
		c.failed(a, again, "POST again with the key of %s", got.body)
	}
}

// update changes the name, the address or both.
func (c *loadClient) update(a *account, ifMatch string) {
	var newEmail, newName string
	switch email, name := c.next(); rand.IntN(4) {
	case 0:
		newEmail = email
	case 1:
		newEmail, newName = email, name
	default:
		newName = name
	}
	before := *a
	if newEmail != "" {
		a.email = newEmail
	}
	if newName != "" {
		a.name = newName
	}
	method := "PUT"
	if rand.IntN(2) == 0 {
		method = "PATCH"
	}
	got := c.ask(method, a.path(), userJSON(newEmail, newName), ifMatch)
	if got.status != 200 {
		if got.status == 0 || got.status >= 500 {
			a.maybe.email, a.maybe.name = a.email, a.name
		}
		a.email, a.name = before.email, before.name
		c.failed(a, got, "%s of %s, If-Match: %s", method, before.body, ifMatch)
		return
	}
	a.stale = before.etag
	c.acknowledge(a, got)
	if a.id != before.id || a.created != before.created || a.updated <= before.updated || a.etag == before.etag {
		c.failed(a, got, "%s of %s", method, before.body)
	}
}

// acknowledge takes over the user in an answer, whose fields have to be those
// that were asked for.
func (c *loadClient) acknowledge(a *account, got answer) {
	var u map[string]string
	if err := json.Unmarshal([]byte(got.body), &u); err != nil {
		c.failed(a, got, "no user: %v", err)
		return
	}
	a.id, a.created, a.updated = u["id"], u["created_at"], u["updated_at"]
	a.body, a.etag = got.body, got.header.Get("ETag")
	if u["email"] != a.email || u["name"] != a.name || a.etag == "" {
		c.failed(a, got, "not the user that was asked for, %s, %s", a.email, a.name)
	}
}

func (c *loadClient) delete(a *account, ifMatch string) {
	got := c.ask("DELETE", a.path(), "", ifMatch)
	if got.status != 200 {
		a.maybe.gone = got.status == 0 || got.status >= 500
		c.failed(a, got, "DELETE of %s, If-Match: %s", a.body, ifMatch)
		return
	}
	a.gone = true
	c.leave(a)
	c.gone = a
}

// deleteAgain deletes a user that is gone. 404 is the answer; but if the
// connection breaks under way, the service can't tell whether it was its own
// first try that has deleted the user, and may answer that it is done: 200 too
// leaves the caller with the truth, that the user is gone.
func (c *loadClient) deleteAgain() {
	if c.gone == nil {
		return
	}
	if got := c.ask("DELETE", c.gone.path(), "", ""); got.status != 404 && got.status != 200 {
		c.failed(nil, got, "DELETE again of %s", c.gone.body)
	}
}

// refused sends what changes nothing, and wants this status. It may be about a.
func (c *loadClient) refused(a *account, status int, method, path, body, ifMatch string) {
	if got := c.ask(method, path, body, ifMatch); got.status != status {
		c.failed(a, got, "want %d: %s %s %s, If-Match: %s", status, method, path, body, ifMatch)
	}
}

func (c *loadClient) get(a *account) {
	if got := c.ask("GET", a.path(), "", ""); got.status != 200 || got.body != a.body || got.header.Get("ETag") != a.etag {
		c.failed(a, got, "GET of %s, ETag %s", a.body, a.etag)
	}
}

// list gets the first page. Of the users in it, the client knows its own.
func (c *loadClient) list() {
	got := c.ask("GET", usersPath+"?limit=20", "", "")
	var page []json.RawMessage
	if got.status != 200 || json.Unmarshal([]byte(got.body), &page) != nil {
		c.failed(nil, got, "the first page")
		return
	}
	for _, item := range page {
		id, _, _ := strings.Cut(strings.TrimPrefix(string(item), `{"id":"`), `"`)
		if a := c.byID[id]; a != nil && (a.gone || !a.left && string(item) != a.body) {
			c.failed(a, answer{200, got.header, string(item)}, "the first page, of %s", a.body)
		}
	}
}

// failed counts a request whose answer is not the true one. What follows from it
// would be the same failure again: the client leaves this user alone.
func (c *loadClient) failed(a *account, got answer, format string, args ...any) {
	c.load.count(&c.load.sum.failed, "failed: %s\ngot %d %s", fmt.Sprintf(format, args...), got.status, got.body)
	if a != nil {
		c.leave(a)
	}
}

func (c *loadClient) leave(a *account) {
	a.left = true
	c.live = slices.DeleteFunc(c.live, func(b *account) bool { return b == a })
}

// ask sends a request, with further fields as pairs of name and value, and
// returns its answer, of status 0 if there was none.
func (c *loadClient) ask(method, path, body, ifMatch string, fields ...string) (got answer) {
	start := time.Now()
	got, err := c.exchange(method, path, body, append(fields, "If-Match", ifMatch))
	c.worst = max(c.worst, time.Since(start))
	c.load.answers.Add(1)
	if err != nil {
		return answer{body: err.Error()}
	}
	return got
}

func (c *loadClient) exchange(method, path, body string, fields []string) (got answer, err error) {
	req, err := http.NewRequest(method, c.load.urls[rand.IntN(len(c.load.urls))]+path, strings.NewReader(body))
	if err != nil {
		return got, err
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	for pair := range slices.Chunk(fields, 2) {
		if pair[1] != "" {
			req.Header.Set(pair[0], pair[1])
		}
	}
	// net/http repeats a GET by itself when a connection that it had kept turns out
	// to be dead. That would hide a request that the service has dropped.
	var sent atomic.Int64
	req = req.WithContext(httptrace.WithClientTrace(req.Context(), &httptrace.ClientTrace{
		WroteRequest: func(httptrace.WroteRequestInfo) { sent.Add(1) },
	}))
	resp, err := c.load.http.Do(req)
	if err != nil {
		return got, err
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(resp.Body)
	if err == nil && sent.Load() > 1 {
		err = fmt.Errorf("answered %d only on its second connection: the first one dropped it", resp.StatusCode)
	}
	return answer{resp.StatusCode, resp.Header, string(content)}, err
}

// A ledger holds what the answers to creates have said, where a refusal is a true
// answer too, which a [load] does not know: a 503 as it should be.
type ledger struct {
	mu              sync.Mutex
	sum             outcome
	made            map[string]bool // the addresses of acknowledged users
	open            map[string]bool // those of users who may have been made
	served, refused []time.Duration // how long that took
}

func newLedger() *ledger {
	return &ledger{made: make(map[string]bool), open: make(map[string]bool)}
}

// create asks the service at url for a user of a new address, and returns the
// status of the answer, 0 if there was none.
func (l *ledger) create(client *http.Client, url, name string) (status int) {
	l.mu.Lock()
	l.sum.requests++
	email := fmt.Sprintf("u%d@example.com", l.sum.requests)
	l.mu.Unlock()
	var got answer
	sent := time.Now()
	resp, err := client.Post(url+usersPath, "application/json", strings.NewReader(userJSON(email, name)))
	if err == nil {
		var body []byte
		body, err = io.ReadAll(resp.Body)
		resp.Body.Close()
		got = answer{resp.StatusCode, resp.Header, string(body)}
	}
	took := time.Since(sent)
	if err != nil {
		got = answer{body: err.Error()}
	}

	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case got.status == 200:
		l.made[email] = true
		l.served = append(l.served, took)
		l.sum.worst = max(l.sum.worst, took)
	case got.isUnavailable():
		l.open[email] = strings.Contains(got.body, "may have been made")
		l.refused = append(l.refused, took)
	default:
		l.open[email] = true
		l.sum.count(&l.sum.failed, "failed: POST of %s: %d %s", email, got.status, got.body)
	}
	return got.status
}

// close compares the table in db with the answers. All are there.
func (l *ledger) close(t testing.TB, db *sql.DB) outcome {
	t.Helper()
	l.sum.compare(t, db, l.made, l.open)
	return l.sum
}

// compare compares the addresses in the table in db, to which nobody else may have
// written, with those of acknowledged users and those of users who may have been made.
func (o *outcome) compare(t testing.TB, db *sql.DB, made, open map[string]bool) {
	t.Helper()
	rows, err := db.Query("SELECT email FROM users")
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	lost := maps.Clone(made)
	for rows.Next() {
		var email string
		if err := rows.Scan(&email); err != nil {
			t.Fatal(err)
		}
		if !lost[email] && !open[email] {
			o.count(&o.doubled, "doubled: no answer says that %s was made", email)
		}
		delete(lost, email)
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	for email := range lost {
		o.count(&o.lost, "lost: acknowledged %s is not in the table", email)
	}
}

// A ledger, too, sees what is wrong with the table.
func TestLedger(t *testing.T) {
	t.Parallel()
	s := newService(t)
	l := newLedger()
	for range 3 {
		l.create(client, s.url, "U")
	}
	if o := l.close(t, s.db); o.requests != 3 || o.worst == 0 || o.failed+o.lost+o.doubled > 0 {
		t.Errorf("untouched: %+v", o)
	}
	l.create(client, s.url, "") // it has to have a name
	mustExec(t, s.db, "DELETE FROM users WHERE email = 'u1@example.com'")
	mustExec(t, s.db, "INSERT INTO users (id, email, name) VALUES ($1, 'twin@example.com', 'x')", noSuchID)
	if o := l.close(t, s.db); o.failed != 1 || o.lost != 1 || o.doubled != 1 {
		t.Errorf("want 1 of each: %+v", o)
	}
}

// A sound service comes out clean, and whatever is wrong with the table is seen.
func TestLoad(t *testing.T) {
	t.Parallel()
	s := newService(t)
	l := startLoad(t, s.url, 8)
	l.wait(600)
	l.end()
	var live []*account
	for _, c := range l.clients {
		live = append(live, c.live...)
	}
	if len(live) < 5 {
		t.Fatalf("%d users are left to tamper with", len(live))
	}
	if o := l.stop(s.db); o.requests < 600 || o.worst == 0 || o.failed+o.lost+o.doubled > 0 {
		t.Errorf("untouched: %+v", o)
	}
	mustExec(t, s.db, "DELETE FROM users WHERE id = $1", live[0].id)
	mustExec(t, s.db, "UPDATE users SET name = 'before', updated_at = updated_at - interval '1 second' WHERE id = $1", live[1].id)
	mustExec(t, s.db, "UPDATE users SET updated_at = updated_at + interval '1 microsecond' WHERE id = $1", live[2].id)
	mustExec(t, s.db, "INSERT INTO users (id, email, name) VALUES ($1, 'twin@example.com', 'x')", noSuchID)
	live[3].gone = true
	if o := l.stop(s.db); o.lost != 3 || o.doubled != 2 {
		t.Errorf("want 3 lost and 2 doubled: %+v", o)
	}
	live[0].maybe.gone, live[2].maybe.email, live[2].maybe.name = true, live[2].email, live[2].name
	l.sum = outcome{}
	if o := l.stop(s.db); o.lost != 2 || o.doubled != 1 {
		t.Errorf("of what may have been done: want 2 lost and 1 doubled: %+v", o)
	}
}
