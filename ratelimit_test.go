package main

import (
	"fmt"
	"hash/maphash"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// takeAll takes until it is refused, and returns how often it was not.
func takeAll(t *testing.T, l *rateLimiter, caller uint64) (taken int) {
	t.Helper()
	for {
		left, ok := l.take(caller)
		if !ok {
			if left != 0 {
				t.Errorf("refused with %d left", left)
			}
			return taken
		}
		taken++
	}
}

func TestRateLimiter(t *testing.T) {
	t.Parallel()
	for _, rate := range []int{1, 2, 3, 7, 1000, 99_991} {
		t.Run(fmt.Sprint(rate), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newRateLimiter(rate)
				expect := func(when string, want int) {
					t.Helper()
					if got := takeAll(t, l, 1); got != want {
						t.Errorf("%s: %d requests, want %d", when, got, want)
					}
				}
				if left, ok := l.take(2); left != 2*rate-1 || !ok {
					t.Errorf("the first request: %d left, %t", left, ok)
				}
				expect("at first", 2*rate)
				expect("at once", 0)
				time.Sleep(l.interval - 1)
				expect("right before the next", 0)
				time.Sleep(1 * time.Nanosecond)
				expect("with the next", 1)
				time.Sleep(5 * l.interval)
				expect("after five intervals", min(5, 2*rate))
				time.Sleep(l.burst)
				expect("after a pause", 2*rate)
				time.Sleep(24 * time.Hour)
				expect("after a day", 2*rate)
				if left, ok := l.take(2); left != 2*rate-1 || !ok {
					t.Errorf("another caller: %d left, %t", left, ok)
				}
			})
		})
	}
}

// What the limiter forgets makes no difference: it decides as if it kept all for ever.
func TestRateLimiterForgetsNothing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newRateLimiter(5)
		random, seed := rand.New(rand.NewPCG(1, 2)), time.Now()
		all := make(map[uint64]time.Duration) // when the burst of a caller is whole again
		refused := 0
		for range 5000 {
			caller, now := random.Uint64N(40), time.Since(seed)
			for range random.IntN(20) { // then nothing for two seconds or so
				spent := max(all[caller]-now, 0)
				want := spent+l.interval <= l.burst
				if want {
					all[caller] = now + spent + l.interval
				} else {
					refused++
				}
				if _, ok := l.take(caller); ok != want {
					t.Fatalf("caller %d at %v: %t, want %t", caller, now, ok, want)
				}
			}
			time.Sleep(time.Duration(random.Int64N(int64(100 * time.Millisecond))))
		}
		if refused < 5000 || refused > 40_000 {
			t.Errorf("%d requests were refused: that tells little", refused)
		}
		if n := len(l.whole) + len(l.before); n > 80 {
			t.Errorf("%d callers are kept", n)
		}
	})
}

// However many callers there are, few are kept, and those that come often are among them.
func TestManyCallers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newRateLimiter(1)
		const greedy = 0
		taken := takeAll(t, l, greedy)
		for i := range uint64(5 * maxCallers) {
			if _, ok := l.take(i + 1); !ok {
				t.Fatalf("caller %d is refused", i)
			}
			if i%1000 == 0 {
				taken += takeAll(t, l, greedy)
			}
			if n := len(l.whole) + len(l.before); n > 2*maxCallers {
				t.Fatalf("%d callers are kept", n)
			}
		}
		if taken != 2 {
			t.Errorf("the greedy caller got %d requests, want 2", taken)
		}
		time.Sleep(burstSeconds * time.Second)
		l.take(1)
		time.Sleep(burstSeconds * time.Second)
		l.take(1)
		if n := len(l.whole) + len(l.before); n > 2 {
			t.Errorf("%d callers are kept after a pause", n)
		}
	})
}

func TestLimitedCaller(t *testing.T) {
	t.Parallel()
	seed := maphash.MakeSeed()
	key := func(c caller, address string) (hash uint64) {
		h := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			infoFrom(r.Context()).caller = c
			hash = maphash.Comparable(seed, limitedCaller(r))
		})
		r := httptest.NewRequest("GET", usersPath, nil)
		r.RemoteAddr = address
		underObserve(h).ServeHTTP(httptest.NewRecorder(), r)
		return hash
	}
	none := caller{}
	for _, tt := range []struct {
		name               string
		a, b               caller
		addressA, addressB string
		same               bool
	}{
		{"one token, two addresses", caller{"i", "alice"}, caller{"i", "alice"}, "192.0.2.1:1", "[2001:db8::1]:2", true},
		{"two subjects", caller{"i", "alice"}, caller{"i", "bob"}, "192.0.2.1:1", "192.0.2.1:1", false},
		{"two issuers", caller{"i", "alice"}, caller{"j", "alice"}, "192.0.2.1:1", "192.0.2.1:1", false},
		{"issuer and subject swapped", caller{"a", "b"}, caller{"b", "a"}, "192.0.2.1:1", "192.0.2.1:1", false},
		{"an issuer alone", caller{"i", ""}, none, "192.0.2.1:1", "192.0.2.1:1", false},
		{"two ports", none, none, "192.0.2.1:1", "192.0.2.1:2", true},
		{"two addresses", none, none, "192.0.2.1:1", "192.0.2.2:1", false},
		{"IPv4 within IPv6", none, none, "192.0.2.1:1", "[::ffff:192.0.2.1]:1", true},
		{"two addresses of one IPv6 network", none, none, "[2001:db8::1]:1", "[2001:db8::ffff:0:0:1]:1", true},
		{"two IPv6 networks", none, none, "[2001:db8::1]:1", "[2001:db8:0:1::1]:1", false},
		{"an IPv6 zone", none, none, "[fe80::1%eth0]:1", "[fe80::1]:1", true},
		{"unix sockets", none, none, "@", "", true},
	} {
		if same := key(tt.a, tt.addressA) == key(tt.b, tt.addressB); same != tt.same {
			t.Errorf("%s: the same caller: %t, want %t", tt.name, same, tt.same)
		}
	}
}

// The limit in its place among the layers, on a clock of the test.
func TestRateLimitOfTheHandler(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		vars := testEnv("dbname=none", append(withAuth, "RATE_LIMIT=3")...)
		cfg, err := loadConfig(func(name string) string { return vars[name] }, false)
		if err != nil {
			t.Fatal(err)
		}
		health := newHealth(nil, nil, new(atomic.Bool))
		close(health.started)
		h := newHandler(cfg, nil, nil, health, nil, slog.New(slog.DiscardHandler))
		call := func(method, path string, fields ...string) *httptest.ResponseRecorder {
			r := httptest.NewRequest(method, path, nil)
			for i := 0; i < len(fields); i += 2 {
				r.Header.Set(fields[i], fields[i+1])
			}
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			return w
		}
		tokenOf := func(subject, scope string) string {
			return "Bearer " + mintToken([]byte(middlewareSecret), grant{subject: subject, scope: scope, ttl: time.Hour}, time.Now())
		}
		alice, bob := tokenOf("alice", ""), tokenOf("bob", "")
		expect := func(authorization string, status int, limit string) {
			t.Helper()
			w := call("GET", "/api/nothing", "Authorization", authorization) // a 404, which counts as well
			if got := w.Header().Get("RateLimit"); w.Code != status || got != limit {
				t.Errorf("%d, RateLimit %s; want %d, %s", w.Code, got, status, limit)
			}
			if policy := w.Header().Get("RateLimit-Policy"); (policy == `"caller";q=6;w=2`) != (status != 401 && status != 403) {
				t.Errorf("%d with RateLimit-Policy %q", status, policy)
			}
			if retry := w.Header().Get("Retry-After"); (retry == "1") != (status == 429) {
				t.Errorf("%d with Retry-After %q", status, retry)
			}
			if want := errorBody(429, "Too many requests of this caller"); status == 429 && w.Body.String() != want {
				t.Errorf("%s, want %s", w.Body, want)
			}
		}
		expect(alice, 404, `"caller";r=5;t=2`)
		expect(alice, 404, `"caller";r=4;t=2`)
		for range 20 { // that is nobody's
			expect("", 401, "")
			expect(alice+"x", 401, "")
			expect(tokenOf("alice", "openid"), 403, "")
			if w := call("OPTIONS", usersPath, "Origin", "https://app.example", "Access-Control-Request-Method", "GET"); w.Code != 204 {
				t.Errorf("a preflight: %d", w.Code)
			}
		}
		expect(alice, 404, `"caller";r=3;t=1`)
		expect(tokenOf("alice", "users:read"), 404, `"caller";r=2;t=1`) // another token of the same caller
		expect(alice, 404, `"caller";r=1;t=1`)
		expect(alice, 404, `"caller";r=0;t=1`)
		expect(alice, 429, `"caller";r=0;t=1`)
		expect(bob, 404, `"caller";r=5;t=2`)
		for range 20 {
			for _, path := range []string{"/health", "/nothing"} {
				if w := call("GET", path, "Authorization", alice); w.Code == 429 || w.Header()["Ratelimit"] != nil {
					t.Errorf("%s: %d %v", path, w.Code, w.Header())
				}
			}
		}
		time.Sleep(time.Second)
		for _, left := range []string{"2", "1", "0"} {
			expect(alice, 404, `"caller";r=`+left+`;t=1`)
		}
		expect(alice, 429, `"caller";r=0;t=1`)
	})
}

// Over HTTP, by the address where there are no tokens; on the real clock, so that how many
// get through is open.
func TestRateLimitOverHTTP(t *testing.T) {
	t.Parallel()
	s := newService(t, "RATE_LIMIT=1")
	statuses := make(map[int]int)
	waitFor(t, "a request to be refused", func() bool {
		a := s.call("GET", usersPath, "", "Origin: https://app.example")
		statuses[a.status]++
		if a.header.Get("RateLimit-Policy") != `"caller";q=2;w=2` || a.header.Get("RateLimit") == "" || a.header.Get("Access-Control-Expose-Headers") != exposedFields {
			t.Errorf("%d: %v", a.status, a.header)
		}
		if a.status == 429 {
			wantError(t, a, 429, "Too many requests of this caller")
		}
		return a.status == 429
	})
	if statuses[200] < 2 || len(statuses) != 2 {
		t.Errorf("statuses: %v", statuses)
	}
	for range 10 {
		for _, path := range []string{"/health", "/health/ready"} {
			if a := s.call("GET", path, ""); a.status != 200 {
				t.Errorf("%s: %d", path, a.status)
			}
		}
	}
	waitFor(t, "the caller to be let in again", func() bool { return s.call("GET", usersPath, "").status == 200 })

	unlimited := newService(t)
	for range 50 {
		if a := unlimited.call("GET", usersPath, ""); a.status != 200 || a.header["Ratelimit"] != nil {
			t.Fatalf("without a limit: %d %v", a.status, a.header)
		}
	}
}
