package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// The key set of an identity provider
//
// JWT_JWKS_URL names a JSON Web Key Set (RFC 7517, section 5) whose keys come and go. One
// goroutine fetches it: at the start, when its time is over, and when a request brings a
// token that a new key may have signed. Such a request waits, and no other.

const (
	fetchTimeout   = 5 * time.Second
	maxKeySetBytes = 1 << 20
	keySetAge      = 15 * time.Minute // from one fetch to the next, if the response has no max-age
	minKeySetAge   = time.Minute
	maxKeySetAge   = 24 * time.Hour
	keySetGrace    = 24 * time.Hour   // for which keys are good that could not be fetched again
	fetchRetry     = 5 * time.Second  // from a failure to the next fetch
	requestPause   = 10 * time.Second // between two fetches that requests ask for
)

// A keySet is the key set of an identity provider, cached. It is safe for concurrent use.
type keySet struct {
	url       string
	own       []key // those of the configuration
	transport http.RoundTripper
	log       *slog.Logger
	keyring   atomic.Pointer[keyring] // own, and the keys of the set behind them

	mu      sync.Mutex
	next    *time.Timer   // of the next fetch
	flight  chan struct{} // of a fetch that runs or was asked for, closed at its end; nil if there is none
	asked   time.Time     // when a request asked for a fetch last
	body    []byte        // what the keys were read from; nil if there are none
	expires time.Time     // when the keys are no longer good
	err     error         // of the last fetch

	fetched  time.Time // when a fetch last succeeded
	failures int       // fetches that failed
}

// newKeySet returns the key set that cfg names, not fetched yet, or nil if it names none.
func newKeySet(cfg config, log *slog.Logger) *keySet {
	if cfg.jwksURL == "" || cfg.authOff {
		return nil
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.DisableKeepAlives = true // the next fetch is minutes away
	transport.MaxResponseHeaderBytes = 64 << 10
	s := &keySet{url: cfg.jwksURL, own: cfg.keys, transport: transport, log: log, next: time.NewTimer(0)}
	s.keyring.Store(&keyring{keys: s.own})
	return s
}

// refresh fetches the set, again and again, until ctx ends. For nil it does nothing.
func (s *keySet) refresh(ctx context.Context) {
	for s != nil {
		select {
		case <-s.next.C:
		case <-ctx.Done():
			return
		}
		s.mu.Lock()
		if s.flight == nil {
			s.flight = make(chan struct{})
		}
		s.mu.Unlock()
		body, age, err := s.fetch(ctx)
		if ctx.Err() != nil {
			return
		}
		s.mu.Lock()
		s.next.Reset(s.update(body, age, err))
		close(s.flight)
		s.flight = nil
		s.mu.Unlock()
	}
}

// fetch returns the body of the set, and how long it is to be used.
func (s *keySet) fetch(ctx context.Context) (body []byte, age time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url, nil)
	if err != nil {
		return nil, 0, err
	}
	req.Header.Set("Accept", "application/jwk-set+json, application/json")
	resp, err := s.transport.RoundTrip(req) // which follows no redirect
	if err != nil {
		return nil, 0, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, 0, fmt.Errorf("the response is %.64q, not 200", resp.Status)
	}
	body, err = io.ReadAll(io.LimitReader(resp.Body, maxKeySetBytes+1))
	if len(body) > maxKeySetBytes {
		err = fmt.Errorf("the response is larger than %d bytes", maxKeySetBytes)
	}
	return body, parseMaxAge(resp.Header["Cache-Control"]), err
}

// update takes in what a fetch brought, and returns the time until the next one. The
// caller holds s.mu.
func (s *keySet) update(body []byte, age time.Duration, err error) time.Duration {
	if err == nil {
		err = s.replace(body)
	}
	if err == nil && s.err != nil {
		s.log.Info("JWT_JWKS_URL: the key set can be fetched again")
	}
	if s.err = err; err == nil {
		s.fetched = time.Now()
		s.expires = s.fetched.Add(age + keySetGrace)
		return age
	}
	s.failures++
	s.log.Warn("JWT_JWKS_URL: the key set can't be fetched", "error", err.Error(), "next_try", fetchRetry.String())
	if s.body != nil && time.Now().After(s.expires) {
		s.body = nil
		s.keyring.Store(&keyring{keys: s.own})
		s.log.Error("JWT_JWKS_URL: the keys are too old, and no longer good")
	}
	return fetchRetry
}

// replace makes a new keyring of a set. If the set is the one before, the keyring stays, and
// with it the tokens that it remembers. The caller holds s.mu.
func (s *keySet) replace(body []byte) error {
	if s.body != nil && bytes.Equal(body, s.body) {
		return nil
	}
	keys, ignored, err := parseJWKS(body, true)
	if err != nil {
		return err
	}
	for _, err := range ignored[:min(len(ignored), 10)] { // of a few it helps to know why
		s.log.Warn("JWT_JWKS_URL: a key is passed over: " + err.Error())
	}
	s.log.Info("JWT_JWKS_URL: new key set", "keys", len(keys), "passed_over", len(ignored))
	s.body = body
	s.keyring.Store(&keyring{keys: slices.Concat(s.own, keys)})
	return nil
}

// missing returns why there are no keys, or nil if there are, or need not be.
func (s *keySet) missing() error {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.body != nil {
		return nil
	}
	return cmp.Or(s.err, errors.New("the key set has not been fetched yet"))
}

// await reports whether there may be other keys by now than those seen. For that it waits for
// the fetch that runs, else for a new one if the last that a request asked for is long enough
// ago.
func (s *keySet) await(ctx context.Context, seen *keyring) bool {
	s.mu.Lock()
	changed := s.keyring.Load() != seen
	if !changed && s.flight == nil && time.Since(s.asked) >= requestPause {
		s.flight, s.asked = make(chan struct{}), time.Now()
		s.next.Reset(0)
	}
	flight := s.flight
	s.mu.Unlock()
	if changed || flight == nil {
		return changed
	}
	select {
	case <-flight:
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.err == nil
	case <-ctx.Done():
		return false
	}
}

// verifyWaiting is verify for requests: it waits for a key that is not there yet. Its error
// is a [tokenError], or that of ctx, or an *[apiError] if the key can't be fetched.
func (v *verifier) verifyWaiting(ctx context.Context, token string) (c claims, err error) {
	for range 3 { // a fetch that runs already may have begun too early, so there may be two
		ring := v.keyring()
		c, err = v.verify(token)
		if v.keySet == nil || err != errNoKey && err != errSignature {
			return c, err
		}
		if err := v.checkUnsigned(token, ring.keys[len(v.keySet.own):], err); err != nil {
			return claims{}, err
		}
		if !v.keySet.await(ctx, ring) {
			break
		}
	}
	return claims{}, cmp.Or(ctx.Err(), v.keySet.explain(err))
}

const keysAway = "The keys of the identity provider can't be fetched"

// explain returns err, the error of a token that no key has signed, or that of the last
// fetch if it may be the reason.
func (s *keySet) explain(err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil && (err == errNoKey || s.body == nil) {
		return &apiError{kind: kindUnavailable, message: keysAway, cause: s.err}
	}
	return err
}

// publicAlgorithm matches the values of alg that are for public keys.
var publicAlgorithm = regexp.MustCompile(`^([RPE]S(256|384|512)|EdDSA|Ed25519)$`)

// checkUnsigned returns what is wrong with a token in any case, or nil if a new key of the
// set may have signed it. Those that are known have not, for which the error is unsigned.
func (v *verifier) checkUnsigned(token string, known []key, unsigned error) error {
	parts := strings.Split(token, ".")
	header, _ := decodeBase64(parts[0]) // without an error: verify has found none
	payload, _ := decodeBase64(parts[1])
	members, _ := uniqueMembers(header)
	algorithm, _ := jsonString(members["alg"])
	kid, _ := jsonString(members["kid"])
	isNamed := func(k key) bool { return kid == "" || k.id == kid }
	if !publicAlgorithm.MatchString(algorithm) || unsigned == errNoKey && slices.ContainsFunc(known, isNamed) {
		return unsigned // no key has this algorithm, or the key has another one
	}
	c, err := v.readClaims(payload)
	return cmp.Or(err, v.checkTime(c))
}

// parseMaxAge returns how long a response may be used by its Cache-Control fields (RFC
// 9111, section 5.2.2.1), within our own bounds.
func parseMaxAge(fields []string) time.Duration {
	for directive := range strings.SplitSeq(strings.Join(fields, ","), ",") {
		name, value, _ := strings.Cut(strings.TrimSpace(directive), "=")
		// If there are too many digits, the number is the largest one: section 1.2.2.
		seconds, err := strconv.ParseUint(strings.Trim(value, `"`), 10, 31)
		if strings.EqualFold(name, "max-age") && (err == nil || errors.Is(err, strconv.ErrRange)) {
			return min(max(time.Duration(seconds)*time.Second, minKeySetAge), maxKeySetAge)
		}
	}
	return keySetAge
}

// parseKeySetURL returns the URL of a key set that nobody on the way can change.
func parseKeySetURL(value string) (string, error) {
	u, err := url.Parse(value)
	if err == nil {
		_, err = strconv.ParseUint(cmp.Or(u.Port(), "443"), 10, 16)
	}
	if err != nil || u.Hostname() == "" || u.User != nil || u.Fragment != "" {
		return "", errors.New("is no URL such as https://id.example/keys, without a user and a fragment")
	}
	isLoopback := u.Hostname() == "localhost" || net.ParseIP(u.Hostname()).IsLoopback()
	if u.Scheme != "https" && (u.Scheme != "http" || !isLoopback) {
		return "", errors.New("is not https; http is for loopback addresses alone")
	}
	return value, nil
}

// setKeySetURL sets the key set of an identity provider. Its tokens for other services are
// signed with the same keys: so one without scopes may do nothing, unless JWT_UNSCOPED says so.
func (c *config) setKeySetURL(value string) (err error) {
	c.jwksURL, err = parseKeySetURL(value)
	c.denyUnscoped = true
	return err
}
