package main

import (
	"fmt"
	"hash/maphash"
	"net/http"
	"net/netip"
	"sync"
	"time"
)

// A limit for each caller
//
// A caller may send RATE_LIMIT requests a second in the long run, and burstSeconds times as
// many at once. This is the generic cell rate algorithm (ITU-T I.371): of a caller, a
// rateLimiter keeps nothing but the time at which its burst is whole again. A caller that it
// keeps nothing of has its whole burst.

const (
	burstSeconds = 2
	// maxCallers bounds each of the two maps of a rateLimiter, which take 5 MB together. When
	// more callers come within burstSeconds, the limiter forgets some too early, and they
	// have their whole burst again.
	maxCallers = 1 << 16
)

// A rateLimiter counts the requests of callers. It is safe for concurrent use.
type rateLimiter struct {
	interval time.Duration // between two requests at the rate
	burst    time.Duration // as many intervals as a burst has requests
	seed     maphash.Seed  // a caller can't choose whose hash it shares
	start    time.Time

	mu sync.Mutex
	// whole has the times at which bursts are whole again, from start on, by the hash of the
	// caller. After burstSeconds, or with maxCallers in it, it becomes before, and before is
	// forgotten. All bursts in there are whole by then, unless too many callers came.
	whole, before map[uint64]time.Duration
	turned        time.Duration // when that happened last, from start on
}

func newRateLimiter(perSecond int) *rateLimiter {
	interval := time.Second / time.Duration(perSecond)
	burst := burstSeconds * time.Duration(perSecond) * interval
	return &rateLimiter{interval: interval, burst: burst, seed: maphash.MakeSeed(), start: time.Now(),
		whole: make(map[uint64]time.Duration)}
}

// take counts a request of the caller, and reports whether the caller may send it. left is
// how many more it may send at once.
func (l *rateLimiter) take(caller uint64) (left int, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Since(l.start)
	if now-l.turned >= burstSeconds*time.Second || len(l.whole) >= maxCallers {
		l.whole, l.before, l.turned = make(map[uint64]time.Duration), l.whole, now
	}
	whole := max(now, l.whole[caller], l.before[caller])
	if ok = whole-now+l.interval <= l.burst; ok {
		whole += l.interval
	}
	l.whole[caller] = whole
	return int((l.burst - (whole - now)) / l.interval), ok
}

// limitRate refuses the requests of a caller beyond perSecond; 0 refuses none. Its fields are
// those of draft-ietf-httpapi-ratelimit-headers-11: the policy is q requests in w seconds, and
// r are left for the next t. A client that spreads them over that time can go on like that.
func limitRate(perSecond int, next http.Handler) http.Handler {
	if perSecond == 0 {
		return next
	}
	limiter := newRateLimiter(perSecond)
	policy := fmt.Sprintf(`"caller";q=%d;w=%d`, burstSeconds*perSecond, burstSeconds)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		left, ok := limiter.take(maphash.Comparable(limiter.seed, limitedCaller(r)))
		seconds := max(1, (left+perSecond-1)/perSecond)
		w.Header().Set("RateLimit-Policy", policy)
		w.Header().Set("RateLimit", fmt.Sprintf(`"caller";r=%d;t=%d`, left, seconds))
		if !ok {
			writeError(w, r, &apiError{kind: kindTooMany})
			return
		}
		next.ServeHTTP(w, r)
	})
}

// A rateKey tells callers apart: those of a token by the token, others by their address.
type rateKey struct {
	caller
	network netip.Prefix
}

// limitedCaller returns whose request r is. Of IPv6 the first 64 bits of the address count,
// since one client mostly has all addresses below them.
func limitedCaller(r *http.Request) rateKey {
	if c := infoFrom(r.Context()).caller; c != (caller{}) {
		return rateKey{caller: c}
	}
	address, _ := netip.ParseAddrPort(r.RemoteAddr) // none of a unix socket: all its clients are one
	ip := address.Addr().Unmap()
	network, _ := ip.Prefix(min(64, ip.BitLen())) // without the zone
	return rateKey{network: network}
}
