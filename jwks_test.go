package main

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// A provider is an identity provider, which answers as its test tells it to.
type provider struct {
	t       testing.TB
	server  *httptest.Server
	fetches atomic.Int64
	answer  atomic.Pointer[http.HandlerFunc]
}

// newProvider serves, until the test ends, a set of these keys.
func newProvider(t testing.TB, keys ...string) *provider {
	checkLeaks(t)
	p := &provider{t: t}
	p.publish(keys...)
	p.server = httptest.NewServer(http.HandlerFunc(p.ServeHTTP))
	t.Cleanup(p.server.Close)
	return p
}

func (p *provider) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.fetches.Add(1)
	(*p.answer.Load())(w, r)
}

func (p *provider) answerWith(h http.HandlerFunc) { p.answer.Store(&h) }

func (p *provider) publish(keys ...string) {
	p.answerWith(textAnswer(`{"keys":[` + strings.Join(keys, ",") + `]}`))
}

// hang has the provider answer nothing until release is called.
func (p *provider) hang() (release func()) {
	released := make(chan struct{})
	release = sync.OnceFunc(func() { close(released) })
	p.t.Cleanup(release) // before the server waits for its handlers
	answer := *p.answer.Load()
	p.answerWith(func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-released:
			answer(w, r)
		case <-r.Context().Done():
		}
	})
	return release
}

// env is what a service needs for the key set of the provider, and these variables.
func (p *provider) env(env ...string) []string {
	return append([]string{"AUTH=jwt", "JWT_JWKS_URL=" + p.server.URL, "JWT_ISSUER=*", "JWT_AUDIENCE=*"}, env...)
}

// serve runs the service until it has the key set of the provider.
func (p *provider) serve(env ...string) *service {
	p.t.Helper()
	s := newService(p.t, p.env(env...)...)
	waitFor(p.t, "the key set", func() bool { return s.call("GET", "/health/ready", "").status == 200 })
	return s
}

// namedKey returns the JWK of one of the [tokenSigners], with a kid.
func namedKey(t testing.TB, signer, kid string) string {
	t.Helper()
	return jwkWith(jwkText(t, tokenSigners()[signer].Public()), fmt.Sprintf(`"kid":%q`, kid))
}

// keyAlgorithms are the algorithms that the tests have the [tokenSigners] sign with.
var keyAlgorithms = map[string]string{"P-256": "ES256", "P-384": "ES384", "Ed25519": "EdDSA"}

// secretToken returns a token that is good for an hour, signed with [middlewareSecret].
func secretToken() string {
	return mintToken([]byte(middlewareSecret), grant{subject: "alice", scope: "users:read", ttl: time.Hour}, time.Now())
}

// namedToken returns a token that is good for an hour, signed by one of the [tokenSigners];
// an empty kid is left out.
func namedToken(t testing.TB, signer, kid string) string {
	t.Helper()
	expiry := time.Now().Add(time.Hour).Unix()
	return tokenOf(t, signer, kid, fmt.Sprintf(`{"sub":"alice","exp":%d,"scope":"users:read users:write"}`, expiry))
}

func tokenOf(t testing.TB, signer, kid, payload string) string {
	t.Helper()
	algorithm := keyAlgorithms[signer]
	header := fmt.Sprintf(`{"alg":%q,"kid":%q}`, algorithm, kid)
	if kid == "" {
		header = fmt.Sprintf(`{"alg":%q}`, algorithm)
	}
	return signToken(t, tokenSigners()[signer], algorithm, header, payload)
}

// expect sends a GET with the token, and checks the status.
func (s *service) expect(token string, status int) answer {
	s.t.Helper()
	a := s.call("GET", usersPath, "", "Authorization: Bearer "+token)
	if a.status != status {
		s.t.Errorf("%d %s, want %d", a.status, a.body, status)
	}
	return a
}

// expectFetches checks how often the key set was fetched so far.
func (p *provider) expectFetches(want int64) {
	p.t.Helper()
	if n := p.fetches.Load(); n != want {
		p.t.Errorf("%d fetches, want %d", n, want)
	}
}

// expectNoFailure checks that the fetch from a provider that hangs has not ended yet, so that
// what has ended did not wait for it.
func (s *service) expectNoFailure() {
	s.t.Helper()
	if strings.Contains(s.log.String(), "the key set can't be fetched") {
		s.t.Error("the fetch has ended, when its time was over")
	}
}

// A key that comes is good with the first token that names it; the tokens of a key that
// goes, which are remembered, are refused from then on.
func TestKeySetRotates(t *testing.T) {
	t.Parallel()
	p := newProvider(t, namedKey(t, "P-256", "old"))
	s := p.serve()
	old, fresh := namedToken(t, "P-256", "old"), namedToken(t, "P-384", "new")
	s.expect(old, 200)
	s.expect(old, 200)
	p.expectFetches(1)
	p.publish(namedKey(t, "P-384", "new"))
	s.expect(old, 200) // nobody has told the service yet
	s.expect(fresh, 200)
	s.expect(old, 401)
	p.expectFetches(2)
}

// Some providers give a new key the name of the old one.
func TestKeySetRotatesUnderOneKid(t *testing.T) {
	t.Parallel()
	p := newProvider(t, jwkWith(rfcKeyP256, `"kid":"one"`))
	s := p.serve()
	p.publish(namedKey(t, "P-256", "one"))
	s.expect(namedToken(t, "P-256", "one"), 200)
	p.expectFetches(2)
}

// Neither many tokens of unknown keys nor tokens that no key could save make a flood of fetches.
func TestKeySetFlood(t *testing.T) {
	t.Parallel()
	p := newProvider(t, namedKey(t, "P-256", "a"))
	s := p.serve("JWT_SECRET="+middlewareSecret, "JWT_ISSUER=https://id.example")
	const good = `"iss":"https://id.example","exp":4000000000,"scope":"users:read"`
	// forged returns a token with the kid and the alg of a known key.
	forged := func(payload string) string {
		parts := strings.Split(tokenOf(t, "P-256", "a", `{"exp":4000000001}`), ".")
		return parts[0] + "." + encode64(payload) + "." + parts[2]
	}
	p384 := tokenSigners()["P-384"]
	hopeless := map[string]string{
		"expired":                    tokenOf(t, "P-384", "x", `{"iss":"https://id.example","exp":1600000000}`),
		"expired, known kid":         tokenOf(t, "P-384", "a", `{"iss":"https://id.example","exp":1600000000}`),
		"expired, a wrong signature": forged(`{"iss":"https://id.example","exp":1600000000}`),
		"not valid yet":              tokenOf(t, "P-384", "x", `{`+good+`,"nbf":3900000000}`),
		"another issuer":             tokenOf(t, "P-384", "x", `{"iss":"https://other.example","exp":4000000000}`),
		"claims that are none":       tokenOf(t, "P-384", "x", `[]`),
		"another algorithm of a kid": tokenOf(t, "P-384", "a", `{`+good+`}`),
		"another algorithm, no kid":  tokenOf(t, "P-384", "", `{`+good+`}`),
		"none":                       encode64(`{"alg":"none","kid":"x"}`) + "." + encode64(`{`+good+`}`) + ".",
		"an unknown algorithm":       encode64(`{"alg":"ES257","kid":"x"}`) + "." + encode64(`{`+good+`}`) + ".",
		"HS256 of an unknown kid":    signToken(t, tokenSecret, "HS256", `{"alg":"HS256","kid":"x"}`, `{`+good+`}`),
		"no token":                   "a.b.c",
		"a header that is none":      encode64(`{`) + "." + encode64(`{`+good+`}`) + ".",
		"a crit":                     signToken(t, p384, "ES384", `{"alg":"ES384","kid":"x","crit":[]}`, `{`+good+`}`),
		"two kids":                   signToken(t, p384, "ES384", `{"alg":"ES384","kid":"x","kid":"y"}`, `{`+good+`}`),
	}
	for name, token := range hopeless {
		if a := s.expect(token, 401); p.fetches.Load() != 1 {
			t.Fatalf("%s: fetched anew, and answered %d %s", name, a.status, a.body)
		}
	}
	begin := time.Now()
	var clients sync.WaitGroup
	for i := range 20 {
		clients.Go(func() {
			for j := range 5 {
				for _, token := range []string{
					tokenOf(t, "P-384", fmt.Sprintf("%d of %d", j, i), `{`+good+`}`),
					forged(fmt.Sprintf(`{`+good+`,"sub":"%d of %d"}`, j, i)),
				} {
					if a, err := s.try("GET", usersPath, "", "Authorization: Bearer "+token); err != nil || a.status != 401 {
						t.Errorf("%d %s, %v", a.status, a.body, err)
					}
				}
			}
		})
	}
	clients.Wait()
	if n, most := p.fetches.Load(), 2+int64(time.Since(begin)/(10*time.Second)); n < 2 || n > most {
		t.Errorf("%d fetches, want 2 to %d", n, most)
	}
	s.expect(tokenOf(t, "P-256", "a", `{`+good+`}`), 200)
}

// While the provider hangs, all that need a new key wait for one fetch, and those that
// don't do not wait at all.
func TestKeySetHangs(t *testing.T) {
	t.Parallel()
	p := newProvider(t, namedKey(t, "P-256", "known"))
	s := p.serve("REQUEST_TIMEOUT=29s", "JWT_SECRET="+middlewareSecret)
	known, fresh := namedToken(t, "P-256", "known"), namedToken(t, "P-384", "new")
	s.expect(namedToken(t, "P-256", "known"), 200)
	p.publish(namedKey(t, "P-256", "known"), namedKey(t, "P-384", "new"))
	release := p.hang()
	var waiting sync.WaitGroup
	for range 10 {
		waiting.Go(func() {
			if a, err := s.try("GET", usersPath, "", "Authorization: Bearer "+fresh); err != nil || a.status != 200 {
				t.Errorf("a new key: %d %s, %v", a.status, a.body, err)
			}
		})
	}
	waitFor(t, "the fetch", func() bool { return p.fetches.Load() == 2 })
	s.expect(known, 200)
	s.expect(namedToken(t, "P-256", "known"), 200)
	s.expect(secretToken(), 200)
	s.expect(tokenOf(t, "P-384", "new", `{"exp":1600000000}`), 401)
	s.expectNoFailure()
	release()
	waiting.Wait()
	p.expectFetches(2)
}

// A request waits for a fetch no longer than it may take.
func TestKeySetDeadline(t *testing.T) {
	t.Parallel()
	p := newProvider(t, namedKey(t, "P-256", "known"))
	s := p.serve("REQUEST_TIMEOUT=100ms")
	p.hang()
	a := s.expect(namedToken(t, "P-384", "new"), 503)
	if !strings.Contains(a.body, "The request took too long") || a.header.Get("Retry-After") == "" {
		t.Errorf("%v %s", a.header, a.body)
	}
	s.expectNoFailure()
}

// The provider is away at the start, and comes.
func TestKeySetAwayAtTheStart(t *testing.T) {
	t.Parallel()
	p := newProvider(t)
	p.answerWith(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusBadGateway) })
	databaseURL, _ := newSchema(t)
	s := startService(t, testEnv(databaseURL, p.env("JWT_SECRET="+middlewareSecret)...))
	s.waitReady()
	s.waitLog("JWT_JWKS_URL: the key set can't be fetched")
	token := namedToken(t, "P-256", "a")
	for _, token := range []string{token, namedToken(t, "P-256", ""), namedToken(t, "P-384", "x")} {
		if a := s.expect(token, 503); a.header.Get("Retry-After") == "" || !strings.Contains(a.body, "identity provider") {
			t.Errorf("%v %s", a.header, a.body)
		}
	}
	s.expect(tokenOf(t, "P-256", "a", `{"exp":1600000000}`), 401)
	s.expect(signToken(t, tokenSecret, "HS256", `{"alg":"HS256"}`, `{"exp":4000000000}`), 401)
	s.expect("a.b.c", 401)
	s.expect(secretToken(), 200)
	if a := s.call("GET", "/health/ready", ""); a.status != 503 || !strings.Contains(a.body, "JWT_JWKS_URL") {
		t.Errorf("readiness: %d %s", a.status, a.body)
	}
	if a := s.call("GET", "/health", ""); a.status != 200 {
		t.Errorf("health: %d %s", a.status, a.body)
	}
	p.publish(namedKey(t, "P-256", "a"))
	waitFor(t, "readiness", func() bool { return s.call("GET", "/health/ready", "").status == 200 })
	s.expect(token, 200)
	s.waitLog("JWT_JWKS_URL: the key set can be fetched again")
}

// Whatever the provider answers that is no key set, the known keys stay good.
func TestKeySetBadAnswers(t *testing.T) {
	t.Parallel()
	redirected := newProvider(t, namedKey(t, "P-384", "new"))
	for _, tt := range []struct {
		name   string
		answer http.HandlerFunc
		logged string
	}{
		{"HTML", textAnswer("<!DOCTYPE html><title>Sign in</title>"), "not a JSON Web Key Set: Malformed JSON at byte 1"},
		{"nothing", textAnswer(""), "not a JSON Web Key Set: Malformed JSON"},
		{"an empty set", textAnswer(`{"keys":[]}`), "none of the 0 keys"},
		{"no usable key", textAnswer(`{"keys":[null,{"kty":"RSA"},7]}`), "none of the 3 keys"},
		{"another object", textAnswer(`{"error":"sorry"}`), "none of the 1 keys"},
		{"a set cut off", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "1000")
			io.WriteString(w, `{"keys":[]}`)
		}, "unexpected EOF"},
		{"a redirect", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, redirected.server.URL, http.StatusFound)
		}, `the response is "302 Found"`},
		{"an error with a set", func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusNotFound)
			io.WriteString(w, `{"keys":[`+namedKey(t, "P-384", "new")+`]}`)
		}, `the response is "404 Not Found"`},
		{"more than 1 MiB", textAnswer(`{"keys":[` + namedKey(t, "P-384", "new") + `]}` + strings.Repeat(" ", 1<<20)),
			"larger than 1048576 bytes"},
		{"a set that never ends", func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, `{"keys":[`)
			w.(http.Flusher).Flush()
			<-r.Context().Done() // for the 5 s that a fetch may take
		}, "deadline exceeded"},
		{"a broken connection", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "EOF"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := newProvider(t, namedKey(t, "P-256", "known"))
			s := p.serve()
			p.answerWith(tt.answer)
			s.expect(namedToken(t, "P-384", "new"), 503) // is its key a new one? who knows
			s.expect(tokenOf(t, "P-384", "known", `{"exp":4000000000}`), 401)
			s.expect(namedToken(t, "P-256", "known"), 200)
			line := s.waitLog("JWT_JWKS_URL: the key set can't be fetched")
			if why := fmt.Sprint(line["error"]); line["level"] != "WARN" || !strings.Contains(why, tt.logged) {
				t.Errorf("logged %v", line)
			}
			if a := s.call("GET", "/health/ready", ""); a.status != 200 {
				t.Errorf("readiness: %d %s", a.status, a.body)
			}
		})
	}
	redirected.expectFetches(0)
}

func textAnswer(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, text) }
}

// Keys of all sources are good; broken ones of the set, and those for other uses, are
// passed over.
func TestKeySetAmongOtherKeys(t *testing.T) {
	t.Parallel()
	p := newProvider(t, `{"kty":"RSA","kid":"broken"}`, namedKey(t, "P-256", "a"),
		jwkWith(namedKey(t, "P-384", "enc"), `"use":"enc"`), jwkWith(rfcKeyP256, `"d":"AQAB","kid":"private"`))
	path := filepath.Join(t.TempDir(), "key.pem")
	if err := os.WriteFile(path, pemOf(t, tokenSigners()["Ed25519"].Public()), 0o600); err != nil {
		t.Fatal(err)
	}
	s := p.serve("JWT_SECRET="+middlewareSecret, "JWT_PUBLIC_KEY_FILE="+path)
	s.expect(namedToken(t, "P-256", "a"), 200)
	s.expect(namedToken(t, "P-256", ""), 200)
	s.expect(namedToken(t, "Ed25519", "any"), 200)
	s.expect(secretToken(), 200)
	s.expect(namedToken(t, "P-384", "enc"), 401)
	var passedOver []string
	for _, line := range s.logged() {
		key, ok := strings.CutPrefix(fmt.Sprint(line["msg"]), "JWT_JWKS_URL: a key is passed over: ")
		if key, _, _ = strings.Cut(key, ":"); ok && line["level"] == "WARN" {
			passedOver = append(passedOver, key)
		}
	}
	if want := []string{"key 1", "key 3", "key 4"}; !slices.Equal(passedOver, want) {
		t.Errorf("passed over %q, want %q", passedOver, want)
	}
}

// With a key set that others share, issuer and audience count.
func TestKeySetIssuerAndAudience(t *testing.T) {
	t.Parallel()
	p := newProvider(t, namedKey(t, "P-256", "a"))
	s := p.serve("JWT_ISSUER=https://id.example", "JWT_AUDIENCE=users")
	const readable = `"exp":4000000000,"scope":"users:read"`
	s.expect(tokenOf(t, "P-256", "a", `{`+readable+`,"iss":"https://id.example","aud":"users"}`), 200)
	s.expect(tokenOf(t, "P-256", "a", `{`+readable+`,"iss":"https://id.example","aud":"orders"}`), 401)
	s.expect(tokenOf(t, "P-256", "a", `{`+readable+`,"iss":"https://other.example","aud":"users"}`), 401)
	s.expect(namedToken(t, "P-256", "a"), 401)
}

// A provider with a certificate is trusted if the system, or SSL_CERT_FILE, says so.
func TestKeySetCertificate(t *testing.T) {
	t.Parallel()
	p := &provider{t: t}
	p.publish(namedKey(t, "P-256", "a"))
	p.server = httptest.NewUnstartedServer(http.HandlerFunc(p.ServeHTTP))
	p.server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	p.server.StartTLS()
	t.Cleanup(p.server.Close)
	dir := t.TempDir()
	ca := filepath.Join(dir, "ca.pem")
	block := &pem.Block{Type: "CERTIFICATE", Bytes: p.server.Certificate().Raw}
	if err := os.WriteFile(ca, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	databaseURL, _ := newSchema(t)
	for _, tt := range []struct {
		file   string
		status int
	}{{"", 503}, {ca, 200}} {
		proc := startProcess(t, dir, testEnv(databaseURL, p.env("SSL_CERT_FILE="+tt.file)...))
		proc.waitReady()
		s := &service{t: t, url: proc.url}
		s.expect(namedToken(t, "P-256", "a"), tt.status)
	}
}

// The service stops while a fetch hangs, and leaves nothing behind (see checkLeaks).
func TestKeySetStops(t *testing.T) {
	t.Parallel()
	p := newProvider(t, namedKey(t, "P-256", "a"))
	p.hang()
	s := newService(t, p.env()...)
	waitFor(t, "the fetch", func() bool { return p.fetches.Load() == 1 })
	s.stop()
	if err := <-s.done; err != nil {
		t.Error(err)
	}
	s.done <- nil
	for _, line := range s.logged() {
		if line["msg"] == "JWT_JWKS_URL: the key set can't be fetched" {
			t.Errorf("a stop is logged as a failure: %v", line)
		}
	}
}

// With AUTH=off nobody needs the keys.
func TestKeySetWithoutAuth(t *testing.T) {
	t.Parallel()
	p := newProvider(t)
	s := newService(t, p.env("AUTH=off")...)
	if a := s.call("GET", "/health/ready", ""); a.status != 200 {
		t.Errorf("readiness: %d %s", a.status, a.body)
	}
	p.expectFetches(0)
}

// A keySetBubble is a key set within a bubble of testing/synctest, where time passes when all wait.
type keySetBubble struct {
	*keySet
	*verifier
	fetched []time.Duration // since bubbleStart
	answer  atomic.Value    // a func() (*http.Response, error)
}

// bubbleStart is when the time of a bubble begins.
var bubbleStart = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

func (b *keySetBubble) RoundTrip(*http.Request) (*http.Response, error) {
	b.fetched = append(b.fetched, time.Since(bubbleStart))
	return b.answer.Load().(func() (*http.Response, error))()
}

// inBubble runs f with a key set that is kept fresh.
func inBubble(t *testing.T, answer func() (*http.Response, error), f func(b *keySetBubble)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		b := &keySetBubble{keySet: newKeySet(config{jwksURL: "https://id.example/keys"}, slog.New(slog.DiscardHandler))}
		b.answer.Store(answer)
		b.keySet.transport = b
		b.verifier = newVerifier(rulesOf("", ""), b.keySet)
		ctx, stop := context.WithCancel(context.Background())
		defer stop()
		go b.refresh(ctx)
		synctest.Wait()
		f(b)
	})
}

// sleepUntil sleeps until that long after the beginning, and what is due then has been done.
func (b *keySetBubble) sleepUntil(d time.Duration) {
	time.Sleep(d - time.Since(bubbleStart))
	synctest.Wait()
}

func keySetAnswer(cacheControl string, keys ...string) func() (*http.Response, error) {
	return func() (*http.Response, error) {
		body := io.NopCloser(strings.NewReader(`{"keys":[` + strings.Join(keys, ",") + `]}`))
		return &http.Response{StatusCode: 200, Header: http.Header{"Cache-Control": {cacheControl}}, Body: body}, nil
	}
}

func noAnswer() (*http.Response, error) { return nil, errors.New("the provider is away") }

// The set is fetched every 15 minutes, or as its response says.
func TestKeySetSchedule(t *testing.T) {
	t.Parallel()
	for cacheControl, want := range map[string]time.Duration{
		"":                             15 * time.Minute,
		"public, max-age=600":          10 * time.Minute,
		`MAX-AGE="120",no-transform`:   2 * time.Minute,
		"max-age=0, must-revalidate":   time.Minute,
		"max-age=59":                   time.Minute,
		"max-age=86401":                24 * time.Hour,
		"max-age=99999999999999999999": 24 * time.Hour,
		"s-maxage=60":                  15 * time.Minute,
		"max-age=-1":                   15 * time.Minute,
		"max-age":                      15 * time.Minute,
		"max-age=1e3":                  15 * time.Minute,
	} {
		t.Run(cacheControl, func(t *testing.T) {
			t.Parallel()
			inBubble(t, keySetAnswer(cacheControl, rfcKeyP256), func(b *keySetBubble) {
				b.sleepUntil(2 * want)
				if got := []time.Duration{0, want, 2 * want}; !slices.Equal(b.fetched, got) {
					t.Errorf("fetched at %v, want %v", b.fetched, got)
				}
			})
		})
	}
}

// The keys of a provider that is away are good for 24 hours from when they were due, and
// come back with it.
func TestKeySetExpires(t *testing.T) {
	t.Parallel()
	token := tokenOf(t, "P-256", "a", `{"exp":4000000000}`)
	present := keySetAnswer("", namedKey(t, "P-256", "a"))
	inBubble(t, present, func(b *keySetBubble) {
		check := func(at time.Duration, good bool) {
			t.Helper()
			b.sleepUntil(at)
			_, err := b.verifyWaiting(context.Background(), token)
			if _, unavailable := errors.AsType[*apiError](err); good && err != nil || !good && !unavailable {
				t.Errorf("after %v: %v", at, err)
			}
			if missing := b.missing(); good != (missing == nil) {
				t.Errorf("after %v: the set is missing: %v", at, missing)
			}
		}
		const due = 15 * time.Minute
		check(0, true)
		b.answer.Store(noAnswer)
		check(24*time.Hour, true)
		check(24*time.Hour+due-time.Second, true)
		check(24*time.Hour+due+10*time.Second, false) // by the next try
		b.answer.Store(present)
		check(24*time.Hour+due+21*time.Second, true)
	})
}

// After a failure, the next try is 5 s later.
func TestKeySetRetries(t *testing.T) {
	t.Parallel()
	inBubble(t, noAnswer, func(b *keySetBubble) {
		b.sleepUntil(9 * time.Second)
		b.answer.Store(keySetAnswer("", rfcKeyP256))
		b.sleepUntil(11 * time.Second)
		b.answer.Store(noAnswer)
		b.sleepUntil(916 * time.Second) // 15 minutes after the success, and a bit
		var want []time.Duration
		for _, seconds := range []int{0, 5, 10, 910, 915} {
			want = append(want, time.Duration(seconds)*time.Second)
		}
		if !slices.Equal(b.fetched, want) {
			t.Errorf("fetched at %v, want %v", b.fetched, want)
		}
	})
}

// Tokens of unknown keys make a fetch every 10 s at most.
func TestKeySetAsked(t *testing.T) {
	t.Parallel()
	token := tokenOf(t, "P-256", "unknown", `{"exp":4000000000}`)
	inBubble(t, keySetAnswer("", namedKey(t, "P-384", "a")), func(b *keySetBubble) {
		for range 4 * 25 {
			if _, err := b.verifyWaiting(context.Background(), token); err != errNoKey {
				t.Fatal(err)
			}
			time.Sleep(time.Second / 4)
		}
		if want := []time.Duration{0, 0, 10 * time.Second, 20 * time.Second}; !slices.Equal(b.fetched, want) {
			t.Errorf("fetched at %v, want %v", b.fetched, want)
		}
	})
}

// A fetch that began before a key came is followed by another one.
func TestKeySetFetchedTooEarly(t *testing.T) {
	t.Parallel()
	token := tokenOf(t, "P-384", "new", `{"exp":4000000000}`)
	before, after := keySetAnswer("", namedKey(t, "P-256", "old")), keySetAnswer("", namedKey(t, "P-384", "new"))
	inBubble(t, before, func(b *keySetBubble) {
		release := make(chan struct{})
		b.answer.Store(func() (*http.Response, error) {
			<-release
			return before()
		})
		b.sleepUntil(keySetAge)
		verified := make(chan error, 1)
		go func() {
			_, err := b.verifyWaiting(context.Background(), token)
			verified <- err
		}()
		synctest.Wait()
		b.answer.Store(after)
		close(release)
		if err := <-verified; err != nil || len(b.fetched) != 3 {
			t.Errorf("%v after %d fetches", err, len(b.fetched))
		}
	})
}

// A set that is the same as before leaves the remembered tokens remembered.
func TestKeySetUnchanged(t *testing.T) {
	t.Parallel()
	inBubble(t, keySetAnswer("", namedKey(t, "P-256", "a")), func(b *keySetBubble) {
		before := b.keySet.keyring.Load()
		b.sleepUntil(20 * time.Minute)
		if len(b.fetched) != 2 || b.keySet.keyring.Load() != before {
			t.Errorf("fetched at %v, and the keyring is a new one", b.fetched)
		}
	})
}

func TestKeySetURL(t *testing.T) {
	t.Parallel()
	for value, want := range map[string]bool{
		"https://id.example/keys":            true,
		"https://id.example:8443/keys?app=1": true,
		"HTTPS://id.example":                 true,
		"http://127.0.0.1:8080/keys":         true,
		"http://127.9.9.9/keys":              true,
		"http://[::1]:8080/keys":             true,
		"http://localhost:8080/keys":         true,
		"http://id.example/keys":             false,
		"http://localhost.example/keys":      false,
		"http://10.0.0.1/keys":               false,
		"http://0.0.0.0/keys":                false,
		"http://127.0.0.1.example/keys":      false,
		"http://127.0.0.1@id.example/keys":   false,
		"ftp://127.0.0.1/keys":               false,
		"file:///etc/keys":                   false,
		"https:///keys":                      false,
		"https:id.example":                   false,
		"https://:443/keys":                  false,
		"https://id.example:65536/":          false,
		"https://user:secret@id.example/":    false,
		"https://id.example/#keys":           false,
		"id.example/keys":                    false,
		"https://id.example/\x7f":            false,
		"://":                                false,
	} {
		got, err := parseKeySetURL(value)
		if want && (err != nil || got != value) || !want && err == nil {
			t.Errorf("%s: %q, %v; want it taken: %v", value, got, err, want)
		}
	}
}

// FuzzKeySetURL holds that a key set comes from this machine or with TLS.
func FuzzKeySetURL(f *testing.F) {
	for _, seed := range []string{"https://id.example/keys", "http://127.0.0.1:80/", "http://[::1]/", "http://localhost?a#b",
		"http://a@127.0.0.1", "http://[::1%25lo]/", "http://127.1/", "https:", "HTTP://LOCALHOST"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, value string) {
		accepted, err := parseKeySetURL(value)
		if err != nil {
			return
		}
		req, err := http.NewRequest("GET", accepted, nil)
		if err != nil || req.URL.Host == "" || req.URL.User != nil {
			t.Fatalf("%q: %v", value, err)
		}
		host := req.URL.Hostname()
		addr, _ := netip.ParseAddr(host)
		if req.URL.Scheme != "https" && host != "localhost" && !addr.Unmap().IsLoopback() {
			t.Errorf("%q is without TLS", value)
		}
	})
}

// A token of the token command is for any issuer and audience where these are wanted.
func TestTokenForAnyIssuer(t *testing.T) {
	t.Parallel()
	env := map[string]string{"JWT_SECRET": middlewareSecret, "JWT_ISSUER": "*", "JWT_AUDIENCE": "*"}
	var stdout strings.Builder
	err := run(t.Context(), []string{"token", "-sub", "alice"}, func(name string) string { return env[name] }, &stdout, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	payload := string(mustDecode64(t, strings.Split(stdout.String(), ".")[1]))
	if strings.Contains(payload, "iss") || strings.Contains(payload, "aud") {
		t.Error(payload)
	}
}

// FuzzKeySet holds that what a provider may answer is an error, or keys that can be used.
func FuzzKeySet(f *testing.F) {
	for _, tt := range keyFileTests(f) {
		if len(tt.text) <= 4096 {
			f.Add([]byte(tt.text), "max-age=600")
		}
	}
	f.Add([]byte(`{"keys":[1,null,{},`+rfcKeyP256+`]}`), `public, max-age="0"`)
	f.Fuzz(func(t *testing.T, body []byte, cacheControl string) {
		s := newKeySet(config{jwksURL: "https://id.example/keys"}, slog.New(slog.DiscardHandler))
		err := s.replace(body)
		keys := s.keyring.Load().keys
		if (err == nil) != (len(keys) > 0) || (err == nil) != (s.body != nil) {
			t.Fatalf("%d keys and the error %v", len(keys), err)
		}
		for _, k := range keys {
			if len(k.checks) == 0 {
				t.Error("a key that takes no algorithm")
			}
			for algorithm, check := range k.checks {
				if !publicAlgorithm.MatchString(algorithm) || check(body, make([]byte, 64)) {
					t.Errorf("%s: not of a public key, or it takes a signature of zeros", algorithm)
				}
			}
		}
		// Whatever is sound in a file is so here.
		if inFile, _, fileErr := parseJWKS(body, false); fileErr == nil && (err != nil || len(inFile) != len(keys)) {
			t.Errorf("%d keys of a file, here %d and %v", len(inFile), len(keys), err)
		}
		if age := parseMaxAge([]string{cacheControl}); age < minKeySetAge || age > maxKeySetAge {
			t.Errorf("%q: %v", cacheControl, age)
		}
	})
}

// With a key set, a token without scopes may do nothing, unless JWT_UNSCOPED says so.
func TestKeySetDeniesUnscoped(t *testing.T) {
	for unscoped, want := range map[string]bool{"": true, "deny": true, "allow": false} {
		vars := map[string]string{"DATABASE_URL": "dbname=x", "JWT_JWKS_URL": "https://id.example/keys",
			"JWT_ISSUER": "*", "JWT_AUDIENCE": "*", "JWT_UNSCOPED": unscoped}
		cfg, err := loadConfig(func(name string) string { return vars[name] }, false)
		if err != nil || cfg.denyUnscoped != want {
			t.Errorf("JWT_UNSCOPED=%s: %t, %v; want %t", unscoped, cfg.denyUnscoped, err, want)
		}
	}
}
