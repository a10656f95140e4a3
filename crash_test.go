//go:build !plain

package main

import (
	"database/sql"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"regexp"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Exactly once, whatever becomes of PostgreSQL: it is killed, and its answers are
// lost. What a write that was sent and not answered has done, nobody can tell:
// the service has to repeat it so that it is done once all the same.

// TestChaosCrash kills every process of PostgreSQL at once, again and again.
func TestChaosCrash(t *testing.T) {
	onlyLinux(t)
	rounds := chaosRounds(t, 5, 1)
	dir := socketDir(t)
	if err := copyCluster(dir); err != nil {
		t.Fatal(err)
	}
	d, err := startPostgres(t.Context(), dir) // with PostgreSQL's defaults: it acknowledges what is on disk
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.stop() })
	for _, setting := range []string{"fsync", "synchronous_commit", "full_page_writes"} {
		if got := queryPostgres(t, d, "SHOW "+setting); got != "on" {
			t.Fatalf("%s is %s: PostgreSQL may forget what it has acknowledged", setting, got)
		}
	}
	s := startService(t, testEnv(d.url(), "REQUEST_TIMEOUT=30s"))
	s.waitReady()
	l := startLoad(t, s.url, chaosConns)
	var outage time.Duration // the longest
	for range rounds {
		l.wait(300 + rand.IntN(300))
		killed := time.Now()
		killDatabase(t, d)
		d.stop() // tidies up; its error is that PostgreSQL was killed
		url := d.url()
		if d, err = startPostgres(t.Context(), dir); err != nil {
			t.Fatal(err)
		}
		if d.url() != url {
			t.Fatalf("PostgreSQL is back at another address: %s, not %s", d.url(), url)
		}
		outage = max(outage, time.Since(killed))
	}
	l.wait(300)
	db, err := sql.Open("postgres", d.url())
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	o := l.stop(db)
	o.faults = rounds
	o.want(t, "kill -9 of the whole PostgreSQL")
	t.Logf("PostgreSQL was away for up to %.2f s", outage.Seconds())
}

// TestChaosAnswersLost lets statements through to PostgreSQL and loses what it
// answers: a kill hardly ever falls between a commit and its answer, this always.
func TestChaosAnswersLost(t *testing.T) {
	rounds := chaosRounds(t, 25, 5)
	databaseURL, db := newSchema(t)
	r := startLossyRelay(t)
	s := startService(t, testEnv(databaseURL+" application_name=answers_lost "+r.address(), "REQUEST_TIMEOUT=30s"))
	s.waitReady()
	l := startLoad(t, s.url, chaosConns)
	for range rounds {
		l.wait(rand.IntN(300))
		r.loseAnswers(t)
	}
	l.wait(300)

	// What was sent on connections that are gone may still be under way.
	l.end()
	s.stop()
	waitFor(t, "PostgreSQL to be done", func() bool {
		var busy bool
		err := db.QueryRow("SELECT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = 'answers_lost')").Scan(&busy)
		return err == nil && !busy
	})
	o := l.stop(db)
	o.faults = rounds
	o.want(t, "answers lost and all connections reset")
	t.Logf("%d writes were done and their answers lost", r.lost.Load())
	if r.lost.Load() < int64(rounds) {
		t.Errorf("the answers of %d writes were lost in %d rounds: not one in each", r.lost.Load(), rounds)
	}
}

// A lossyRelay passes connections on to the test's PostgreSQL, and at times loses
// what comes back.
type lossyRelay struct {
	listener net.Listener
	armed    atomic.Bool  // the next answer to a write will be lost
	deaf     atomic.Bool  // every answer is
	lost     atomic.Int64 // writes that were committed, and whose answers were lost

	mu    sync.Mutex
	pairs map[net.Conn]net.Conn // the service's side to PostgreSQL's
}

func startLossyRelay(t *testing.T) *lossyRelay {
	t.Helper()
	// Over TCP: a unix socket can't be reset, only closed.
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &lossyRelay{listener: listener, pairs: make(map[net.Conn]net.Conn)}
	t.Cleanup(r.reset)
	relayTo(t, listener, func(from, to net.Conn) {
		r.mu.Lock()
		r.pairs[from] = to
		r.mu.Unlock()
		go func() {
			io.Copy(to, from)
			to.Close()
		}()
		r.answer(from, to)
		r.mu.Lock()
		delete(r.pairs, from)
		r.mu.Unlock()
	})
	return r
}

// address is where the relay is, for a connection string.
func (r *lossyRelay) address() string {
	return fmt.Sprintf("host=127.0.0.1 port=%d", r.listener.Addr().(*net.TCPAddr).Port)
}

// wroteRows matches the end of an answer to a write of at least one row that is
// committed: CommandComplete with its tag, and ReadyForQuery outside a transaction
// (PostgreSQL's manual, section 55.7).
var wroteRows = regexp.MustCompile(`(?s)C\x00\x00\x00.(INSERT 0|UPDATE|DELETE) [1-9][0-9]*\x00Z\x00\x00\x00\x05I$`)

// answer passes on what PostgreSQL answers.
func (r *lossyRelay) answer(from, to net.Conn) {
	b := make([]byte, 1<<16)
	for {
		n, err := to.Read(b)
		if err != nil {
			return
		}
		wrote := wroteRows.Match(b[:n])
		if wrote && r.armed.CompareAndSwap(true, false) {
			r.deaf.Store(true)
		}
		if !r.deaf.Load() {
			from.Write(b[:n])
		} else if wrote {
			r.lost.Add(1)
		}
	}
}

// loseAnswers loses the answer to the next write, and from there on every answer
// for a moment, in which statements go on to get through. Then it resets all
// connections.
func (r *lossyRelay) loseAnswers(t *testing.T) {
	t.Helper()
	r.armed.Store(true)
	waitFor(t, "the answer to a write", r.deaf.Load)
	if rand.IntN(2) == 0 { // else what else has got through is still under way
		time.Sleep(rand.N(100 * time.Millisecond)) // how long this fault lasts: nobody waits for anything
	}
	r.reset()
}

// reset breaks all connections. Who was waiting for an answer gets none.
func (r *lossyRelay) reset() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for from, to := range r.pairs {
		from.(*net.TCPConn).SetLinger(0) // to close is to reset, then: socket(7)
		from.Close()
		to.Close()
	}
	clear(r.pairs)
	r.deaf.Store(false)
}
