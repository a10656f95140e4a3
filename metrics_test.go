package main

import (
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// admin returns the service behind ADMIN_ADDR, as a service to call.
func (s *service) admin() *service {
	s.t.Helper()
	line := s.waitLog("listening for metrics and profiles")
	return &service{t: s.t, url: "http://" + line["address"].(string)}
}

// scrape returns the samples of a service by their names with labels. It checks the format:
// each sample stands behind HELP and TYPE of its family, and histograms add up.
func scrape(t testing.TB, admin *service) map[string]float64 {
	t.Helper()
	a := admin.call("GET", "/metrics", "")
	if a.status != 200 || a.header.Get("Content-Type") != "text/plain; version=0.0.4; charset=utf-8" {
		t.Fatalf("%d, %v", a.status, a.header)
	}
	sampleForm := regexp.MustCompile(`^([a-z_]+)(\{(?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)+\})? (\S+)$`)
	samples, kinds, family := make(map[string]float64), make(map[string]string), ""
	bucket := 0.0
	for line := range strings.Lines(a.body) {
		line = strings.TrimSuffix(line, "\n")
		if name, ok := strings.CutPrefix(line, "# HELP "); ok {
			family, _, _ = strings.Cut(name, " ")
			continue
		}
		if name, ok := strings.CutPrefix(line, "# TYPE "+family+" "); ok {
			if kinds[family] != "" {
				t.Errorf("%s is there twice", family)
			}
			kinds[family] = name
			continue
		}
		m := sampleForm.FindStringSubmatch(line)
		if m == nil {
			t.Fatalf("no sample: %q", line)
		}
		value, err := strconv.ParseFloat(m[3], 64)
		part := strings.TrimPrefix(m[1], family)
		parts := map[string][]string{"counter": {""}, "gauge": {""}, "histogram": {"_bucket", "_sum", "_count"}, "summary": {"", "_sum", "_count"}}
		if err != nil || !slices.Contains(parts[kinds[family]], part) {
			t.Errorf("%q in %s, which is a %q", line, family, kinds[family])
		}
		switch {
		case part == "_bucket" && value < bucket, part == "_count" && value != bucket && kinds[family] == "histogram":
			t.Errorf("%s: behind %v", line, bucket)
		case part == "_bucket":
			bucket = value
		case part == "_count":
			bucket = 0
		}
		samples[m[1]+m[2]] = value
	}
	return samples
}

// What is counted is what was sent, exactly, while it is scraped; and clients can't make labels.
func TestMetricsCount(t *testing.T) {
	t.Parallel()
	s := newService(t, append(withAuth, "ADMIN_ADDR=127.0.0.1:0", "RATE_LIMIT=100000")...)
	admin := s.admin()
	path := s.call("POST", usersPath, `{"email":"ada@example.com","name":"Ada"}`, bearer("ada")).header.Get("Location")
	const rounds = 50
	var clients sync.WaitGroup
	for range 4 {
		clients.Go(func() {
			for i := range rounds {
				s.try("GET", path, "", bearer("ada"))
				s.try("GET", "/api/v1/users/"+noSuchID, "", bearer("ada"))
				s.try("PUT", path, `{"name":"Ada King"}`, bearer("ada"))
				s.try("GET", usersPath, "")
				s.try("BREW", fmt.Sprintf("/api/%d", i), "", bearer("ada"))
				s.try("GET", fmt.Sprintf("/%d", i), "")
				s.try("POST", usersPath, `{}`, "Authorization: Bearer x")
			}
		})
	}
	clients.Go(func() {
		for range rounds {
			scrape(t, admin)
		}
	})
	clients.Wait()

	got := scrape(t, admin)
	const all = 4 * rounds
	for name, want := range map[string]float64{
		`rollcall_http_requests_total{method="POST",route="/api/v1/users",code="200"}`:          1,
		`rollcall_http_requests_total{method="GET",route="/api/v1/users/{id}",code="200"}`:      all,
		`rollcall_http_requests_total{method="GET",route="/api/v1/users/{id}",code="404"}`:      all,
		`rollcall_http_requests_total{method="PUT",route="/api/v1/users/{id}",code="200"}`:      all,
		`rollcall_http_requests_total{method="GET",route="/api/v1/users",code="401"}`:           all,
		`rollcall_http_requests_total{method="other",route="other",code="404"}`:                 all,
		`rollcall_http_requests_total{method="GET",route="other",code="404"}`:                   all,
		`rollcall_http_requests_total{method="POST",route="/api/v1/users",code="401"}`:          all,
		`rollcall_http_request_duration_seconds_count{method="GET",route="other"}`:              all,
		`rollcall_http_request_duration_seconds_count{method="GET",route="/api/v1/users/{id}"}`: 2 * all,
		`rollcall_auth_refused_total{reason="missing"}`:                                         all,
		`rollcall_auth_refused_total{reason="malformed"}`:                                       all,
		`rollcall_http_requests_in_flight`:                                                      0,
		`rollcall_ready`:                                                                        1,
	} {
		if value, ok := got[name]; !ok || value != want {
			t.Errorf("%s is %v, want %v", name, value, want)
		}
	}
	total := 0.0
	for name, value := range got {
		if strings.HasPrefix(name, "rollcall_http_requests_total") {
			total += value
		}
	}
	if total != 7*all+1 {
		t.Errorf("%v requests in all, want %d", total, 7*all+1)
	}
	if got["rollcall_statement_duration_seconds_count"] == 0 || got["process_cpu_seconds_total"] == 0 || got["go_goroutines"] == 0 {
		t.Errorf("nothing of statements, the process or its goroutines: %v", got)
	}
}

// Each reason for which a request is refused has its name.
func TestMetricsReasons(t *testing.T) {
	t.Parallel()
	s := newService(t, append(withAuth, "ADMIN_ADDR=127.0.0.1:0", "RATE_LIMIT=1", "JWT_AUDIENCE=users")...)
	admin := s.admin()
	token := func(g grant, at time.Time) string {
		return "Authorization: Bearer " + mintToken([]byte(middlewareSecret), g, at)
	}
	ours := grant{subject: "ada", ttl: time.Hour, audience: "users"}
	theirs, reader := ours, ours
	theirs.audience, reader.scope = "others", "users:read"
	now := time.Now()
	for _, call := range []struct{ method, field, reason string }{
		{"GET", "X-None: x", "missing"},
		{"GET", "Authorization: Bearer x.y.z", "malformed"},
		{"GET", token(ours, now.Add(-24*time.Hour)), "expired"},
		{"GET", token(ours, now.Add(24*time.Hour)), "not_yet_valid"},
		{"GET", token(theirs, now), "audience"},
		{"GET", token(ours, now) + "AAAA", "signature"},
		{"DELETE", token(reader, now), "scope"},
	} {
		name := fmt.Sprintf("rollcall_auth_refused_total{reason=%q}", call.reason)
		before := scrape(t, admin)[name]
		a := s.call(call.method, "/api/v1/users/"+noSuchID, "", call.field)
		if after := scrape(t, admin)[name]; after != before+1 {
			t.Errorf("%s: %v after %d %s; want %v", name, after, a.status, a.body, before+1)
		}
	}
	waitFor(t, "the rate limit", func() bool { return s.call("GET", usersPath, "", token(ours, now)).status == 429 })
	if got := scrape(t, admin); got[`rollcall_http_shed_total{reason="rate_limit"}`] != 1 {
		t.Errorf("shed: %v", got)
	}

	p := newProvider(t)
	p.answerWith(func(w http.ResponseWriter, r *http.Request) { http.Error(w, "away", http.StatusBadGateway) })
	s = newService(t, p.env("ADMIN_ADDR=127.0.0.1:0", "REQUEST_TIMEOUT=1s", "JWT_SECRET="+middlewareSecret)...)
	s.waitLog("JWT_JWKS_URL: the key set can't be fetched")
	s.call("GET", usersPath, "", "Authorization: Bearer "+namedToken(t, "P-256", "a"))
	slow := dialRaw(t, s)
	if a := slow.answerTo(fmt.Sprintf("POST %s HTTP/1.1\r\nHost: x\r\n%s\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{",
		usersPath, "Authorization: Bearer "+mintToken([]byte(middlewareSecret), grant{subject: "x", scope: "users:write", ttl: time.Hour}, now))); a.status != 503 {
		t.Errorf("a body that does not arrive: %d %s", a.status, a.body)
	}
	got := scrape(t, s.admin())
	for name, ok := range map[string]bool{
		"shed for the keys":       got[`rollcall_http_shed_total{reason="keys"}`] == 1,
		"shed for a slow body":    got[`rollcall_http_shed_total{reason="timeout"}`] == 1,
		"nothing of the database": got[`rollcall_http_shed_total{reason="database"}`] == 0,
		"no keys":                 got["rollcall_jwks_keys"] == 0,
		"never fetched":           got["rollcall_jwks_last_success_timestamp_seconds"] == 0,
		"failures":                got["rollcall_jwks_failures_total"] > 0,
	} {
		if !ok {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// Nothing of ADMIN_ADDR is where the API is, and the other way round.
func TestAdminRoutes(t *testing.T) {
	t.Parallel()
	s := newService(t, "ADMIN_ADDR=127.0.0.1:0")
	admin := s.admin()
	for _, path := range []string{"/metrics", "/debug/pprof/", "/debug/pprof/cmdline", "/debug/vars"} {
		if a := s.call("GET", path, ""); a.status != 404 {
			t.Errorf("%s of the API: %d", path, a.status)
		}
	}
	for path, want := range map[string]int{
		"/metrics": 200, "/health": 200, "/health/ready": 200, "/debug/pprof/": 200, "/debug/pprof/heap?debug=1": 200,
		"/debug/pprof/cmdline": 200, "/debug/pprof/symbol": 200, "/debug/pprof/profile?seconds=1": 200,
		"/debug/pprof/trace?seconds=0.1": 200, usersPath: 404, "/": 404,
	} {
		if a := admin.call("GET", path, ""); a.status != want {
			t.Errorf("%s of ADMIN_ADDR: %d %.100s", path, a.status, a.body)
		}
	}
	if a := admin.call("DELETE", "/metrics", ""); a.status != 405 || a.header.Get("Allow") != "GET, HEAD" {
		t.Errorf("%d, Allow %q", a.status, a.header.Get("Allow"))
	}
}

// A stop can be watched to its end.
func TestAdminStopsLast(t *testing.T) {
	t.Parallel()
	s := newService(t, "ADMIN_ADDR=127.0.0.1:0")
	admin := s.admin()
	tx := begin(t, s.db, "LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
	var slow pendingCalls
	slow.goCall(s, "GET", usersPath, "")
	waitFor(t, "the request to be served", func() bool { return scrape(t, admin)["rollcall_http_requests_in_flight"] == 1 })
	s.stop()
	waitFor(t, "the API to listen no more", func() bool {
		_, err := s.try("GET", "/health", "")
		return err != nil
	})
	if got := scrape(t, admin); got["rollcall_ready"] != 0 || got["rollcall_http_requests_in_flight"] != 1 {
		t.Errorf("while it stops: ready %v, in flight %v", got["rollcall_ready"], got["rollcall_http_requests_in_flight"])
	}
	tx.Rollback()
	for _, a := range slow.wait() {
		a.users(t)
	}
	if err := <-s.done; err != nil {
		t.Error(err)
	}
	s.done <- nil
	if _, err := admin.try("GET", "/metrics", ""); err == nil {
		t.Error("it listens still")
	}
}

func TestServerTiming(t *testing.T) {
	t.Parallel()
	form := regexp.MustCompile(`^db;dur=(\d+\.\d{3}), wait;dur=\d+\.\d{3}$`)
	s := newService(t, "LOG_LEVEL=debug")
	path := createUser(s, "ada@example.com").header.Get("Location")
	var clients sync.WaitGroup
	for range 8 { // alone, and in batches
		clients.Go(func() {
			for range 10 {
				a, err := s.try("GET", path, "")
				if m := form.FindStringSubmatch(a.header.Get("Server-Timing")); err != nil || m == nil || m[1] == "0.000" {
					t.Errorf("Server-Timing %q, %v", a.header.Get("Server-Timing"), err)
				}
			}
		})
	}
	clients.Wait()
	if got := newService(t).call("GET", usersPath, "").header.Get("Server-Timing"); got != "" {
		t.Errorf("without LOG_LEVEL=debug: %q", got)
	}
}

// Prometheus' own tool has nothing to say.
func TestPromtool(t *testing.T) {
	t.Parallel()
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		notInstalled(t, "promtool", "prometheus")
	}
	p := newProvider(t)
	p.publish(namedKey(t, "P-256", "a"))
	s := p.serve("ADMIN_ADDR=127.0.0.1:0")
	s.call("GET", usersPath, "")
	check := exec.Command(promtool, "check", "metrics")
	check.Stdin = strings.NewReader(s.admin().call("GET", "/metrics", "").body)
	if out, err := check.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("check metrics: %v\n%s", err, out)
	}
	if out, err := exec.Command(promtool, "check", "rules", "deploy/alerts.yml").CombinedOutput(); err != nil {
		t.Errorf("check rules: %v\n%s", err, out)
	}
}

// BenchmarkCount measures what counting adds to a request.
func BenchmarkCount(b *testing.B) {
	routes := http.NewServeMux()
	routes.Handle("GET /api/v1/users/{id}", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(200) }))
	for name, m := range map[string]*metrics{"without": nil, "with": new(metrics)} {
		h := observe(slog.New(slog.DiscardHandler), new(atomic.Bool), time.Minute, m.count(routes, routes))
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			r := httptest.NewRequest("GET", "/api/v1/users/"+noSuchID, nil)
			for b.Loop() {
				h.ServeHTTP(httptest.NewRecorder(), r)
			}
		})
	}
}
