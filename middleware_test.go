package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unicode"
)

// A wireConn is a connection on which a test may say what no client would.
type wireConn struct {
	t testing.TB
	net.Conn
	reader *bufio.Reader
}

// dialRaw connects to the service until the test ends.
func dialRaw(t testing.TB, s *service) *wireConn {
	t.Helper()
	checkLeaks(t)
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &wireConn{t: t, Conn: conn}
}

func (c *wireConn) send(text string) {
	c.t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		c.t.Fatal(err)
	}
}

// answer reads an answer, be it one of the 1xx. It waits for less time than
// the service has patience with a body, so that no answer comes by giving up.
func (c *wireConn) answer() answer {
	c.t.Helper()
	if c.reader == nil {
		c.reader = bufio.NewReader(c)
	}
	c.SetReadDeadline(time.Now().Add(4 * time.Second))
	resp, err := http.ReadResponse(c.reader, nil)
	if err != nil {
		c.t.Fatal("no answer:", err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatal("half an answer:", err)
	}
	return answer{resp.StatusCode, resp.Header, string(body)}
}

// answerTo sends a request as it is and reads the answer.
func (c *wireConn) answerTo(request string) answer {
	c.t.Helper()
	c.send(request)
	return c.answer()
}

// sendRaw sends a request as it is, on a connection of its own, and reads the answer.
func sendRaw(t testing.TB, s *service, request string) answer {
	t.Helper()
	return dialRaw(t, s).answerTo(request)
}

// findLine waits for the line of the access log that is wanted.
func findLine(t testing.TB, s *service, wanted func(line map[string]any) bool) (found map[string]any) {
	t.Helper()
	waitFor(t, "a line of the access log", func() bool {
		for _, line := range s.logged() {
			if line["msg"] == "request" && wanted(line) {
				found = line
				return true
			}
		}
		return false
	})
	return found
}

// withID is what findLine wants: the request of that id.
func withID(id string) func(map[string]any) bool {
	return func(line map[string]any) bool { return line["request_id"] == id }
}

// newOffline returns the whole service, as newHandler makes it, without a database
// to talk to, and without a store: any look into the table panics.
func newOffline(t testing.TB, env ...string) (*service, *health) {
	t.Helper()
	vars := testEnv("host=127.0.0.1 port=1 user=nobody dbname=none sslmode=disable", env...)
	cfg, err := loadConfig(func(name string) string { return vars[name] }, false)
	if err != nil {
		t.Fatal(err)
	}
	buffer := new(syncBuffer)
	log := newLogger(cfg, buffer)
	h := newHealth(func(context.Context) error { return errors.New("there is no database") }, nil, new(atomic.Bool))
	checkLeaks(t)
	server := httptest.NewServer(newHandler(cfg, nil, nil, h, nil, log))
	t.Cleanup(server.Close)
	return &service{t: t, url: server.URL, log: buffer}, h
}

const middlewareSecret = "a secret for middleware_test, of 32 bytes or more"

var withAuth = []string{"AUTH=jwt", "JWT_SECRET=" + middlewareSecret}

// bearer returns the header field with a token of that subject.
func bearer(subject string) string {
	return "Authorization: Bearer " + mintToken([]byte(middlewareSecret), grant{subject: subject, ttl: time.Hour}, time.Now())
}

const exposedFields = "ETag, Link, Location, RateLimit, RateLimit-Policy, Retry-After, WWW-Authenticate, X-Request-Id"

// The order of the layers, told from outside by who answers first.

func TestOrderPreflightNeedsNoToken(t *testing.T) {
	t.Parallel()
	s, _ := newOffline(t, withAuth...) // not even started
	for _, path := range []string{"/api/v1/users", "/api/v1/users/1", "/api/nothing", "/health", "/nothing"} {
		a := s.call("OPTIONS", path, "", "Origin: https://app.example", "Access-Control-Request-Method: PUT",
			"Access-Control-Request-Headers: authorization,baggage,content-type,sentry-trace,tracestate,x-requested-with")
		if a.status != 204 || a.body != "" || a.header.Get("Access-Control-Allow-Origin") != "*" || a.header.Get("Access-Control-Allow-Headers") != "*, Authorization" {
			t.Errorf("%s: %d %s, header %v", path, a.status, a.body, a.header)
		}
		line := findLine(t, s, withID(a.header.Get("X-Request-Id")))
		if line["status"] != 204.0 || line["path"] != path {
			t.Errorf("%s: logged %v", path, line)
		}
	}
}

// Whatever the answer, observe and cors have had their say.
func TestOrderOutermostLayers(t *testing.T) {
	t.Parallel()
	s := newService(t, append(withAuth, "MAX_BODY_BYTES=10")...)
	alice := bearer("alice")
	tests := []struct {
		name   string
		method string
		path   string
		body   string
		fields []string
		want   int
		level  string
	}{
		{"success", "GET", "/api/v1/users", "", []string{alice}, 200, "INFO"},
		{"health", "GET", "/health", "", nil, 200, "INFO"},
		{"OPTIONS, no preflight", "OPTIONS", "/api/v1/users", "", []string{alice}, 204, "INFO"},
		{"bad query", "GET", "/api/v1/users?limit=x", "", []string{alice}, 400, "WARN"},
		{"no token", "GET", "/api/v1/users", "", nil, 401, "WARN"},
		{"unknown route without a token", "GET", "/api/nothing", "", nil, 401, "WARN"},
		{"wrong method without a token", "TRACE", "/api/v1/users", "", nil, 401, "WARN"},
		{"unknown route", "GET", "/api/nothing", "", []string{alice}, 404, "WARN"},
		{"unknown route outside the API", "GET", "/nothing", "", nil, 404, "WARN"},
		{"a path that is not clean", "GET", "//health", "", nil, 404, "WARN"},
		{"wrong method", "TRACE", "/api/v1/users", "", []string{alice}, 405, "WARN"},
		{"wrong method outside the API", "POST", "/health", "", nil, 405, "WARN"},
		{"too large", "POST", "/api/v1/users", "01234567890", []string{alice}, 413, "WARN"},
		{"too large, without a token", "POST", "/api/v1/users", "01234567890", nil, 401, "WARN"},
		{"no JSON", "POST", "/api/v1/users", "a=b", []string{alice, "Content-Type: text/plain"}, 415, "WARN"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			id := "order-" + strings.ReplaceAll(tt.name, " ", "-")
			id = strings.ReplaceAll(id, ",", "")
			a := s.call(tt.method, tt.path, tt.body, append(tt.fields, "Origin: https://app.example", "X-Request-Id: "+id)...)
			if a.status != tt.want {
				t.Fatalf("%d %s; want %d", a.status, a.body, tt.want)
			}
			for name, want := range map[string]string{
				"X-Request-Id":                  id,
				"X-Content-Type-Options":        "nosniff",
				"Access-Control-Allow-Origin":   "*",
				"Access-Control-Expose-Headers": exposedFields,
				"Cache-Control":                 "no-store",
			} {
				if got := a.header.Values(name); len(got) != 1 || got[0] != want {
					t.Errorf("%s %q; want %q once", name, got, want)
				}
			}
			line := findLine(t, s, withID(id))
			if line["status"] != float64(tt.want) || line["level"] != tt.level || line["bytes"] != float64(len(a.body)) {
				t.Errorf("logged %v; want status %d, level %s, %d bytes", line, tt.want, tt.level, len(a.body))
			}
			if tt.want >= 400 && !strings.HasSuffix(a.body, fmt.Sprintf(`,"code":%d}}`, tt.want)) {
				t.Errorf("the error is not in its form: %s", a.body)
			}
		})
	}
}

func TestOrderPanicIsALogged500(t *testing.T) {
	t.Parallel()
	s, h := newOffline(t)
	close(h.started)
	a := s.call("GET", "/api/v1/users", "", "Origin: https://app.example", "X-Request-Id: panic-1")
	if want := `{"error":{"message":"Internal error","code":500}}`; a.status != 500 || a.body != want {
		t.Errorf("%d %s; want 500 %s", a.status, a.body, want)
	}
	if a.header.Get("X-Request-Id") != "panic-1" || a.header.Get("Access-Control-Allow-Origin") != "*" {
		t.Errorf("the outer layers are missing: %v", a.header)
	}
	line := findLine(t, s, withID("panic-1"))
	if line["status"] != 500.0 || line["level"] != "ERROR" || !strings.HasPrefix(line["error"].(string), "panic: ") {
		t.Errorf("logged %v", line)
	}
	panicked := s.waitLog("panic")
	if panicked["request_id"] != "panic-1" || !strings.Contains(panicked["stack"].(string), "(*users).list") {
		t.Errorf("logged %v; want the request id and the stack", panicked)
	}
}

func TestOrderNotStarted(t *testing.T) {
	t.Parallel()
	s, h := newOffline(t, withAuth...)
	const starting, stopping = "The service is starting", "The service is stopping"
	expect := func(path string, status int, message string, fields ...string) {
		t.Helper()
		a := s.call("GET", path, "", fields...)
		if a.status != status || !strings.Contains(a.body, message) {
			t.Errorf("%s: %d %s; want %d %s", path, a.status, a.body, status, message)
		}
		if retry := a.header.Get("Retry-After"); (retry != "") != (status == 503) {
			t.Errorf("%s: Retry-After %q with a %d", path, retry, status)
		}
	}
	expect("/health", 200, "OK")
	expect("/health/ready", 503, starting)
	expect("/api/v1/users", 401, "Missing bearer token") // a stranger learns nothing
	expect("/api/v1/users", 503, starting, bearer("alice"))
	expect("/api/nothing", 503, starting, bearer("alice"))
	expect("/nothing", 404, "Resource not found")

	close(h.started)
	expect("/health", 200, "OK")
	expect("/health/ready", 503, "PostgreSQL does not answer")
	expect("/api/v1/users", 401, "Missing bearer token")

	h.draining.Store(true)
	expect("/health", 200, "OK")
	expect("/health/ready", 503, stopping)
	expect("/api/v1/users", 401, "Missing bearer token") // what still comes is still served
}

func TestOrderInFlight(t *testing.T) {
	t.Parallel()
	s := newService(t, append(withAuth, "MAX_IN_FLIGHT=1")...)
	tx := begin(t, s.db, "LOCK TABLE users IN SHARE MODE") // which lets others read
	const body = `{"email":"ada@example.com","name":"Ada"}`
	slow := dialRaw(t, s)
	slow.send(fmt.Sprintf("POST /api/v1/users HTTP/1.1\r\nHost: rollcall\r\n%s\r\n"+
		"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", bearer("ada"), len(body), body))

	waitFor(t, "the only place to be taken", func() bool { // not by a request that asks for it: that could take it
		return count(t, s.db, "SELECT count(*) FROM pg_locks WHERE relation = 'users'::regclass AND NOT granted") > 0
	})
	refused := s.call("GET", "/api/v1/users", "", bearer("ada"))
	if a := s.call("GET", "/api/v1/users", ""); a.status != 401 { // a stranger takes no place
		t.Errorf("without a token: %d %s; want 401", a.status, a.body)
	}
	if want := `{"error":{"message":"Too many requests are being served","code":503}}`; refused.status != 503 || refused.body != want {
		t.Errorf("%d %s; want 503 %s", refused.status, refused.body, want)
	}
	if refused.header.Get("Retry-After") == "" {
		t.Error("no Retry-After")
	}
	for _, path := range []string{"/health", "/health/ready"} {
		if a := s.call("GET", path, ""); a.status != 200 {
			t.Errorf("%s: %d %s; want 200", path, a.status, a.body)
		}
	}
	if a := s.call("OPTIONS", "/api/v1/users", "", "Origin: https://app.example", "Access-Control-Request-Method: GET"); a.status != 204 {
		t.Errorf("a preflight: %d %s; want 204", a.status, a.body)
	}

	tx.Rollback()
	if a := slow.answer(); a.status != 200 {
		t.Errorf("the one in flight: %d %s; want 200", a.status, a.body)
	}
	waitFor(t, "the place to be free again", func() bool {
		return s.call("GET", "/api/v1/users", "", bearer("ada")).status == 200
	})
}

// A stranger can't send a body: the token is asked for before "100 Continue".
func TestOrderTokenBeforeBody(t *testing.T) {
	t.Parallel()
	s := newService(t, withAuth...)
	const body = `{"email":"ada@example.com","name":"Ada"}`
	request := func(method, contentType, authorization string) string {
		return fmt.Sprintf("%s /api/v1/users HTTP/1.1\r\nHost: rollcall\r\n%s\r\nContent-Type: %s\r\n"+
			"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n", method, authorization, contentType, len(body))
	}
	tests := []struct {
		name    string
		request string
		want    int
	}{
		{"no token", request("POST", "application/json", "X-Nothing: x"), 401},
		{"a bad token", request("POST", "application/json", "Authorization: Bearer x.y.z"), 401},
		{"an unknown method", request("BREW", "application/json", bearer("ada")), 405},
		{"a type that is not taken", request("POST", "text/plain", bearer("ada")), 415},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if a := sendRaw(t, s, tt.request); a.status != tt.want {
				t.Errorf("%d %s; want %d at once", a.status, a.body, tt.want)
			}
		})
	}
	t.Run("a good token", func(t *testing.T) {
		t.Parallel()
		conn := dialRaw(t, s)
		if a := conn.answerTo(request("POST", "application/json", bearer("ada"))); a.status != 100 {
			t.Fatalf("%d %s; want 100", a.status, a.body)
		}
		if a := conn.answerTo(body); a.status != 200 {
			t.Errorf("%d %s; want 200", a.status, a.body)
		}
	})
}

// No spelling of a path gets past the token, or is redirected to where it would.
func TestPathTricks(t *testing.T) {
	t.Parallel()
	s := newService(t, withAuth...)
	tests := []struct {
		target             string
		stranger, lettered int // the status without a token, and with one
	}{
		{"/health", 200, 200},
		{"/api/v1/users", 401, 200},
		{"http://elsewhere/api/v1/users", 401, 200},

		{"//health", 404, 404},
		{"/health/", 404, 404},
		{"/./health", 404, 404},
		{"/health/.", 404, 404},
		{"/health//ready", 404, 404},
		{"/nothing/../health", 404, 404},
		{"/%2e/health", 404, 404},
		{"/health%2Fready", 404, 404},
		{"/health%00", 404, 404},
		{"/HEALTH", 404, 404},
		{"/../../etc/passwd", 404, 404},
		{"/", 404, 404},
		{"//", 404, 404},
		{"/..", 404, 404},

		{"/api/../health", 401, 404},
		{"/api/%2e%2e/health", 401, 404},
		{"/api/..%2fhealth", 401, 404},
		{"/api/", 401, 404},
		{"/api//v1/users", 401, 404},
		{"/api/v1//users", 401, 404},
		{"/api/v1/users/", 401, 404},
		{"/api/v1/users//", 401, 404},
		{"/api/v1/./users", 401, 404},
		{"/api/v1/%2e/users", 401, 404},
		{"/api/v1/users/..", 401, 404},
		{"/api/v1/users/%2e%2e", 401, 404},
		{"/api/v1/users/x/../../users", 401, 404},
		{"/api/v1/users%2F", 401, 404},
		{"/api/v1%2Fusers", 401, 404},
		{"/api%2Fv1/users", 401, 404},
		{"/api%2F%2Fv1/users", 401, 404},
		{"/%61pi/v1/users", 401, 200},
		{"/api/v1/%75sers", 401, 200},
		{"/api/v1/users?/../../../health", 401, 200},
		{"/api/v1/users/%00", 401, 400},
		{"/api/v1/users/x%2Fy", 401, 400},
		{"/api/v1/users/%252e%252e", 401, 400},

		{"/health/../api/v1/users", 404, 404},
		{"/health/%2e%2e/api/v1/users", 404, 404},
		{"/health%2F..%2Fapi/v1/users", 404, 404},
		{"//api/v1/users", 404, 404},
		{"///api/v1/users", 404, 404},
		{"/./api/v1/users", 404, 404},
		{"/%2e/api/v1/users", 404, 404},
		{"/%2Fapi/v1/users", 404, 404},
		{"/%2e%2e/api/v1/users", 404, 404},
		{"/API/v1/users", 404, 404},
		{"/Api/v1/users", 404, 404},
		{"/api", 404, 404},
		{"/api;/v1/users", 404, 404},
		{"/api%5Cv1/users", 404, 404},
		{"/api%00/v1/users", 404, 404},
		{"http://elsewhere//api/v1/users", 404, 404},
		{"http://elsewhere", 404, 404},
	}
	for _, tt := range tests {
		for authorization, want := range map[string]int{"X-Nothing: x": tt.stranger, bearer("alice"): tt.lettered} {
			a := sendRaw(t, s, "GET "+tt.target+" HTTP/1.1\r\nHost: rollcall\r\nConnection: close\r\n"+authorization+"\r\n\r\n")
			if a.status != want || a.header.Get("Location") != "" {
				t.Errorf("%s with %.20s: %d %s, Location %q; want %d and none", tt.target, authorization, a.status, a.body, a.header.Get("Location"), want)
			}
		}
	}
}

func TestOptionsOfTheServer(t *testing.T) {
	t.Parallel()
	s := newService(t, withAuth...)
	a := sendRaw(t, s, "OPTIONS * HTTP/1.1\r\nHost: rollcall\r\n\r\n")
	if allow := a.header.Get("Allow"); a.status != 204 || allow != "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS" {
		t.Errorf("%d %s, Allow %q", a.status, a.body, allow)
	}
	if a.header.Get("X-Request-Id") == "" {
		t.Error("no X-Request-Id")
	}
	if a := sendRaw(t, s, "GET * HTTP/1.1\r\nHost: rollcall\r\n\r\n"); a.status != 404 && a.status != 400 {
		t.Errorf("GET *: %d %s; want 404 or 400", a.status, a.body)
	}
}

// What follows looks at one layer at a time.

func TestCORS(t *testing.T) {
	t.Parallel()
	const (
		ours   = "https://app.example"
		also   = "http://localhost:5173"
		theirs = "https://evil.example"
	)
	list := []string{ours, also}
	const preflight, plain = "Access-Control-Request-Method", ""
	tests := []struct {
		name    string
		allowed []string // CORS_ORIGINS; nil is *
		method  string
		origin  []string
		asks    string // a header field that makes it a preflight
		// the answer:
		allow   string // Access-Control-Allow-Origin
		methods bool   // Access-Control-Allow-Methods, -Headers and -Max-Age
		exposed bool   // Access-Control-Expose-Headers
		vary    bool   // Vary: Origin
		passes  bool   // to the next layer; else it is a 204
	}{
		{"*: a script", nil, "GET", []string{ours}, plain, "*", false, true, false, true},
		{"*: no script", nil, "GET", nil, plain, "*", false, true, false, true},
		{"*: preflight", nil, "OPTIONS", []string{theirs}, preflight, "*", true, false, false, false},
		{"*: OPTIONS without a question", nil, "OPTIONS", []string{ours}, plain, "*", false, true, false, true},
		{"*: OPTIONS without an origin", nil, "OPTIONS", nil, preflight, "*", false, true, false, true},
		{"*: not OPTIONS", nil, "POST", []string{ours}, preflight, "*", false, true, false, true},

		{"list: allowed", list, "GET", []string{ours}, plain, ours, false, true, true, true},
		{"list: allowed, the second", list, "DELETE", []string{also}, plain, also, false, true, true, true},
		{"list: no origin", list, "GET", nil, plain, "", false, false, true, true},
		{"list: not allowed", list, "GET", []string{theirs}, plain, "", false, false, true, true},
		{"list: null", list, "GET", []string{"null"}, plain, "", false, false, true, true},
		{"list: empty", list, "GET", []string{""}, plain, "", false, false, true, true},
		{"list: two origins", list, "GET", []string{ours, ours}, plain, "", false, false, true, true},
		{"list: two in one field", list, "GET", []string{ours + " " + also}, plain, "", false, false, true, true},
		{"list: another scheme", list, "GET", []string{"http://app.example"}, plain, "", false, false, true, true},
		{"list: another port", list, "GET", []string{ours + ":8443"}, plain, "", false, false, true, true},
		{"list: a longer host", list, "GET", []string{ours + ".evil.example"}, plain, "", false, false, true, true},
		{"list: preflight, allowed", list, "OPTIONS", []string{ours}, preflight, ours, true, false, true, false},
		{"list: preflight, not allowed", list, "OPTIONS", []string{theirs}, preflight, "", false, false, true, false},
		{"list: OPTIONS without a question", list, "OPTIONS", []string{ours}, plain, ours, false, true, true, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			passed := false
			h := cors(tt.allowed, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { passed = true }))
			r := httptest.NewRequest(tt.method, "/api/v1/users", nil)
			r.Header["Origin"] = tt.origin
			if tt.asks != "" {
				r.Header.Set(tt.asks, "PATCH")
			}
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)

			expect := func(name, want string) {
				t.Helper()
				if got := strings.Join(w.Header().Values(name), "|"); got != want {
					t.Errorf("%s %q; want %q", name, got, want)
				}
			}
			only := func(condition bool, value string) string {
				if condition {
					return value
				}
				return ""
			}
			if passed != tt.passes || !passed && w.Code != 204 {
				t.Errorf("passes: %t, %d; want %t", passed, w.Code, tt.passes)
			}
			expect("Access-Control-Allow-Origin", tt.allow)
			expect("Access-Control-Allow-Methods", only(tt.methods, "GET, HEAD, POST, PUT, PATCH, DELETE"))
			expect("Access-Control-Allow-Headers", only(tt.methods, "*, Authorization"))
			expect("Access-Control-Max-Age", only(tt.methods, "7200"))
			expect("Access-Control-Expose-Headers", only(tt.exposed, exposedFields))
			expect("Access-Control-Allow-Credentials", "")
			expect("Vary", only(tt.vary, "Origin"))
		})
	}
}

// One layer's Vary does not push out another's.
func TestVaryOfAllLayers(t *testing.T) {
	t.Parallel()
	s := newService(t, "CORS_ORIGINS=https://app.example, http://localhost:5173")
	a := s.call("GET", "/api/v1/users/nobody", "", "Origin: http://localhost:5173")
	if vary := a.header.Values("Vary"); a.status != 400 || !slices.Equal(slices.Sorted(slices.Values(vary)), []string{"Accept", "Origin"}) {
		t.Errorf("%d, Vary %q; want 400 with Accept and Origin", a.status, vary)
	}
	if allow := a.header.Get("Access-Control-Allow-Origin"); allow != "http://localhost:5173" {
		t.Errorf("Access-Control-Allow-Origin %q", allow)
	}
}

func TestRecoverPanics(t *testing.T) {
	t.Parallel()
	part := func(w http.ResponseWriter) { io.WriteString(w, "a part") }
	tests := []struct {
		name    string
		before  func(w http.ResponseWriter)
		value   any
		again   bool // it goes on as http.ErrAbortHandler
		status  int
		logged  bool
		lasting string // what the caller got
	}{
		{"an error", nil, errors.New("boom"), false, 500, true, `{"error":{"message":"Internal error","code":500}}`},
		{"a text", nil, "boom", false, 500, true, `{"error":{"message":"Internal error","code":500}}`},
		{"what can't be compared", nil, []string{"boom"}, false, 500, true, `{"error":{"message":"Internal error","code":500}}`},
		{"a failure", nil, errNotFound, false, 500, true, `{"error":{"message":"Internal error","code":500}}`},
		{"an abort", nil, http.ErrAbortHandler, true, 0, false, ""},
		{"behind a part of the response", part, "boom", false, 500, true, `{"error":{"message":"Internal error","code":500}}`},
		{"behind the status", func(w http.ResponseWriter) { w.WriteHeader(204) }, "boom", false, 500, true, `{"error":{"message":"Internal error","code":500}}`},
		{"an abort behind a part", part, http.ErrAbortHandler, true, 200, false, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			buffer := new(syncBuffer)
			log := slog.New(slog.NewJSONHandler(buffer, nil))
			h := observe(log, new(atomic.Bool), patience, recoverPanics(log, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("ETag", `"1"`)
				w.Header().Set("Location", "/here")
				if tt.before != nil {
					tt.before(w)
				}
				panic(tt.value)
			})))
			r := httptest.NewRequest("GET", "/", nil)
			r.Header.Set("X-Request-Id", "panic-2")
			w := httptest.NewRecorder()
			v := panicOf(func() { h.ServeHTTP(w, r) })
			if (v == http.ErrAbortHandler) != tt.again || (v != nil) != tt.again {
				t.Errorf("goes on as %v; want the abort: %t", v, tt.again)
			}
			s := &service{t: t, log: buffer}
			line, level, cause := findLine(t, s, withID("panic-2")), "ERROR", "panic: "
			if tt.again { // nothing is sent, whatever it was to be
				level, cause = "WARN", http.ErrAbortHandler.Error()
			}
			if line["status"] != float64(tt.status) || line["level"] != level || !strings.HasPrefix(fmt.Sprint(line["error"]), cause) {
				t.Errorf("logged %v; want status %d at %s, and %s", line, tt.status, level, cause)
			}
			if !tt.again && w.Code != tt.status || w.Body.String() != tt.lasting {
				t.Errorf("%d %q; want %d %q", w.Code, w.Body, tt.status, tt.lasting)
			}
			if tt.status == 500 && (w.Header().Get("ETag") != "" || w.Header().Get("Location") != "") {
				t.Errorf("the header of a success is left: %v", w.Header())
			}
			logged := slices.ContainsFunc(s.logged(), func(line map[string]any) bool {
				return line["msg"] == "panic" && line["request_id"] == "panic-2" && strings.Contains(line["stack"].(string), "TestRecoverPanics")
			})
			if logged != tt.logged {
				t.Errorf("the panic is logged: %t; want %t\n%s", logged, tt.logged, buffer)
			}
			if strings.Contains(w.Body.String(), "boom") {
				t.Errorf("the caller sees %s", w.Body)
			}
		})
	}
}

// No cache keeps anything of a response but what has an ETag, and that only to ask
// for it again.
func TestCacheControl(t *testing.T) {
	t.Parallel()
	s := newService(t, withAuth...)
	alice := bearer("alice")
	made := s.call("POST", usersPath, `{"email":"ada@example.com","name":"Ada"}`, alice)
	path, tag := made.header.Get("Location"), made.header.Get("ETag")
	mustExec(t, s.db, "INSERT INTO users (id, email, name) SELECT gen_random_uuid(), i || '@example.com', 'x' FROM generate_series(1, 20) i")
	if got := made.header.Values("Cache-Control"); len(got) != 1 || got[0] != "private, no-cache" {
		t.Errorf("create: %q", got)
	}
	for _, test := range []struct {
		method, path, body string
		fields             []string
		status             int
	}{
		{"GET", path, "", []string{alice}, 200},
		{"HEAD", path, "", []string{alice}, 200},
		{"GET", path, "", []string{alice, "If-None-Match: " + tag}, 304},
		{"GET", path, "", []string{alice, `If-Match: "1"`}, 412},
		{"GET", path, "", nil, 401},
		{"PUT", path, `{"name":"Countess"}`, []string{alice}, 200},
		{"PUT", path, `{"name":""}`, []string{alice}, 400},
		{"PUT", path, `{"name":"x"}`, []string{alice, `If-Match: "1"`}, 412},
		{"POST", usersPath, `{"email":"ada@example.com","name":"Ada"}`, []string{alice}, 409},
		{"GET", usersPath, "", []string{alice}, 200},
		{"GET", usersPath, "", []string{alice, "Accept-Encoding: gzip"}, 200},
		{"OPTIONS", usersPath, "", []string{alice}, 204},
		{"OPTIONS", usersPath, "", []string{"Origin: https://app.example", "Access-Control-Request-Method: GET"}, 204},
		{"TRACE", usersPath, "", []string{alice}, 405},
		{"GET", "/health", "", nil, 200},
		{"GET", "/health/ready", "", nil, 200},
		{"GET", "/nothing", "", nil, 404},
		{"DELETE", path, "", []string{alice}, 200},
		{"GET", path, "", []string{alice}, 404},
	} {
		a := s.call(test.method, test.path, test.body, test.fields...)
		want := "no-store"
		if a.header.Get("ETag") != "" {
			want = "private, no-cache"
		}
		if got := a.header.Values("Cache-Control"); a.status != test.status || len(got) != 1 || got[0] != want ||
			(want == "no-store") != (test.method == "DELETE" || test.path != path || test.status >= 400) {
			t.Errorf("%s %s: %d, Cache-Control %q; want %d, %q", test.method, test.path, a.status, got, test.status, want)
		}
	}
}

// What turns letters around, breaks lines or moves a terminal's cursor is escaped
// in the log, whichever field it comes in by.
func TestLogIsPrintable(t *testing.T) {
	t.Parallel()
	s := newService(t, withAuth...)
	var odd strings.Builder
	for _, r := range []rune{0x7f, 0x80, 0x85, 0x9b, 0x9f, 0xad, 0x61c, 0x200b, 0x200e, 0x200f, 0x2028, 0x2029, 0x202a, 0x202e, 0x2066, 0x2069, 0xfeff, 0xe0041} {
		odd.WriteRune(r)
	}
	s.call("GET", usersPath+"/é"+url.PathEscape(odd.String()), "", bearer("😀"+odd.String()))
	line := findLine(t, s, func(line map[string]any) bool { return line["path"] == usersPath+"/é"+odd.String() })
	if line["sub"] != "😀"+odd.String() {
		t.Errorf("the subject is logged as %q", line["sub"])
	}
	for _, r := range s.log.String() {
		if r != '\n' && !unicode.IsPrint(r) {
			t.Errorf("%U is in the log as it is", r)
		}
	}
	if !strings.Contains(s.log.String(), "/é") || !strings.Contains(s.log.String(), "😀") {
		t.Errorf("what is printable is escaped: %s", s.log)
	}
}

// A client that is gone when its response is written has got none: the log does
// not call that a success, be the response short, long, or sent by TLS.
func TestBrokenResponseIsLogged(t *testing.T) {
	t.Parallel()
	for _, secure := range []bool{false, true} {
		var env []string
		if secure {
			certFile, keyFile := writeCertificate(t, t.TempDir(), "rollcall.test")
			env = []string{"TLS_CERT_FILE=" + certFile, "TLS_KEY_FILE=" + keyFile}
		}
		s := newService(t, env...)
		mustExec(t, s.db, "INSERT INTO users (id, email, name) SELECT gen_random_uuid(), i || '@example.com', 'x' FROM generate_series(1, 1000) i")
		for _, query := range []string{"?email=1@example.com", "?limit=20", "?limit=1000"} {
			t.Run(fmt.Sprintf("TLS %t %s", secure, query), func(t *testing.T) {
				tx := begin(t, s.db, "LOCK TABLE users")
				tcp, err := net.Dial("tcp", s.url[strings.Index(s.url, "//")+2:])
				if err != nil {
					t.Fatal(err)
				}
				conn := net.Conn(tcp)
				if secure {
					conn = tls.Client(tcp, &tls.Config{InsecureSkipVerify: true})
				}
				fmt.Fprintf(conn, "GET /api/v1/users%s HTTP/1.1\r\nHost: rollcall\r\n\r\n", query)
				waitFor(t, "the request to wait for the lock", func() bool {
					return count(t, s.db, "SELECT count(*) FROM pg_locks WHERE relation = 'users'::regclass AND NOT granted") > 0
				})
				tcp.(*net.TCPConn).SetLinger(0) // a reset: nothing gets through any more
				tcp.Close()
				tx.Rollback()
				line := findLine(t, s, func(line map[string]any) bool { return line["remote"] == tcp.LocalAddr().String() })
				if line["level"] != "WARN" || line["error"] == nil {
					t.Errorf("logged %v; want WARN, and the reason", line)
				}
			})
		}
	}
}

// http.ResponseController reaches the server's own writer through all layers.
func TestLayersUnwrap(t *testing.T) {
	t.Parallel()
	log := slog.New(slog.DiscardHandler)
	failed := make(chan error, 1)
	h := underObserve(recoverPanics(log, cors(nil, readBody(1, limitInFlight(make(chan struct{}, 1), compress(http.HandlerFunc(
		func(w http.ResponseWriter, r *http.Request) {
			control := http.NewResponseController(w)
			failed <- errors.Join(control.SetReadDeadline(time.Time{}), control.SetWriteDeadline(time.Time{}))
		})))))))
	checkLeaks(t)
	server := httptest.NewServer(h)
	defer server.Close()
	(&service{t: t, url: server.URL}).call("POST", "/", "1")
	if err := <-failed; err != nil {
		t.Error(err)
	}
}

func TestExactPath(t *testing.T) {
	t.Parallel()
	tests := []struct {
		path string
		want int
	}{
		{"/", 200}, {"/a", 200}, {"/a/b", 200}, {"/a.b/..c", 200}, {"/a/...", 200}, {"/é", 200},
		{"", 404}, {"//", 404}, {"/a/", 404}, {"/a//b", 404}, {"/.", 404}, {"/a/.", 404}, {"/..", 404}, {"/a/../b", 404}, {"/./a", 404},
	}
	for _, tt := range tests {
		r := httptest.NewRequest("GET", "/", nil)
		r.URL.Path = tt.path
		w := httptest.NewRecorder()
		underObserve(exactPath(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))).ServeHTTP(w, r)
		if w.Code != tt.want {
			t.Errorf("%q: %d; want %d", tt.path, w.Code, tt.want)
		}
	}
}

// All places are free again afterwards, even after a panic.
func TestLimitInFlight(t *testing.T) {
	t.Parallel()
	const most = 3
	entered, leave := make(chan struct{}), make(chan struct{})
	h := underObserve(limitInFlight(make(chan struct{}, most), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/wait":
			entered <- struct{}{}
			<-leave
		case "/panic":
			panic("boom")
		}
	})))
	status := func(path string) int {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest("GET", path, nil))
		return w.Code
	}
	for range most + 1 {
		if v := panicOf(func() { status("/panic") }); v != "boom" {
			t.Fatalf("panics with %v", v)
		}
	}
	waiting := make(chan int, most)
	for range most {
		go func() { waiting <- status("/wait") }()
		<-entered
	}
	if got := status("/"); got != 503 {
		t.Errorf("with all places taken: %d; want 503", got)
	}
	leave <- struct{}{}
	if got := <-waiting; got != 200 {
		t.Errorf("one that waited: %d; want 200", got)
	}
	if got := status("/"); got != 200 {
		t.Errorf("with a place free: %d; want 200", got)
	}
	close(leave)
	for range most - 1 {
		<-waiting
	}
}

func TestDeadline(t *testing.T) {
	t.Parallel()
	before := time.Now()
	var until time.Time
	var ended context.Context
	h := observe(slog.New(slog.DiscardHandler), new(atomic.Bool), time.Minute, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		until, _ = r.Context().Deadline()
		ended = r.Context()
	}))
	h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil))
	if until.Before(before.Add(time.Minute)) || until.After(time.Now().Add(time.Minute)) {
		t.Errorf("the deadline is in %v; want a minute", until.Sub(before))
	}
	if ended.Err() != context.Canceled {
		t.Errorf("afterwards the context says %v; want %v", ended.Err(), context.Canceled)
	}
}

// The deadline reaches the SQL: a statement that waits for a lock is given up.
func TestDeadlineReachesTheSQL(t *testing.T) {
	t.Parallel()
	s := newService(t, "REQUEST_TIMEOUT=200ms")
	begin(t, s.db, "LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
	read := s.call("GET", "/api/v1/users", "")
	write := s.call("POST", "/api/v1/users", `{"email":"ada@example.com","name":"Ada"}`)
	for _, a := range []answer{read, write} {
		if a.status != 503 || a.header.Get("Retry-After") == "" || !strings.Contains(a.body, "The request took too long") {
			t.Errorf("%d %s, Retry-After %q", a.status, a.body, a.header.Get("Retry-After"))
		}
	}
	waitFor(t, "the statements to end", func() bool {
		var running int
		err := s.db.QueryRow("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() " +
			"AND wait_event_type = 'Lock' AND query LIKE '%users%' AND pid <> pg_backend_pid() " +
			"AND pid IN (SELECT pid FROM pg_locks WHERE NOT granted AND relation = 'users'::regclass)").Scan(&running)
		return err == nil && running == 0
	})
}

// No response waits for a body that nobody reads, and its connection ends with it.
func TestUnreadBodies(t *testing.T) {
	t.Parallel()
	forEachTransport(t, func(t *testing.T, s *service, dial func(*testing.T) net.Conn) {
		token := bearer("a")
		for _, tt := range []struct{ method, path, fields, want string }{
			{"GET", usersPath, token, "200"},
			{"HEAD", usersPath, token, "200"},
			{"DELETE", usersPath + "/" + noSuchID, token, "404"},
			{"OPTIONS", usersPath, token, "204"},
			{"OPTIONS", usersPath, "Origin: http://x\r\nAccess-Control-Request-Method: GET", "204"},
			{"GET", "/health", "X: x", "200"},
			{"HEAD", "/health", "X: x", "200"},
			{"GET", "/health/ready", "X: x", "200"},
			{"OPTIONS", "*", "X: x", "204"},
			{"GET", "/nothing", "X: x", "404"},
			{"POST", "/nothing", "X: x", "404"},
			{"PUT", "/health", "X: x", "405"},
			{"POST", usersPath, "Content-Type: application/json", "401"},
			{"POST", usersPath, token, "415"},
			{"POST", "/api/nothing", token, "404"},
			{"PUT", usersPath, token, "405"},
			{"POST", usersPath + "/" + noSuchID, token, "405"},
			{"BREW", usersPath, token, "405"},
		} {
			for _, framing := range []string{"1.1\r\nContent-Length: 10", "1.0\r\nContent-Length: 10", "1.1\r\nTransfer-Encoding: chunked",
				"1.1\r\nContent-Length: 10\r\nExpect: 100-continue", "1.1\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue"} {
				conn := dial(t)
				conn.SetDeadline(time.Now().Add(patience))
				request := fmt.Sprintf("%s %s HTTP/%s\r\nHost: x\r\n%s\r\n\r\n", tt.method, tt.path, framing, tt.fields)
				io.WriteString(conn, request)
				resp, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: tt.method})
				if err != nil || !strings.HasPrefix(resp.Status, tt.want) || !resp.Close {
					t.Errorf("%q: %v, %v; want %s, and the connection to end", request, resp, err, tt.want)
				}
				conn.Close()
			}
		}
	})
}

// A client that sends its whole body before it reads gets the response, though
// nobody wants the body.
func TestUnreadBodyIsStillComing(t *testing.T) {
	t.Parallel()
	forEachTransport(t, func(t *testing.T, s *service, dial func(*testing.T) net.Conn) {
		for i, tt := range []struct{ request, fields, want string }{
			{"POST " + usersPath, "Content-Type: application/json", "401"},
			{"POST /api/nothing", bearer("a"), "404"},
			{"PUT " + usersPath, bearer("a"), "405"},
			{"POST " + usersPath, "Content-Type: application/json\r\n" + bearer("a"), "413"},
			{"POST " + usersPath, bearer("a"), "415"},
			{"GET " + usersPath, bearer("a"), "200"},
			{"HEAD /health", "X: x", "200"},
		} {
			for _, framing := range []string{"1.0\r\n", "1.1\r\n", "1.1\r\nConnection: close\r\n", "1.1\r\nExpect: 100-continue\r\n"} {
				conn := dial(t)
				id := fmt.Sprint(i, framing[:3], len(framing))
				request := fmt.Sprintf("%s HTTP/%sHost: x\r\nX-Request-Id: %s\r\n%s\r\nContent-Length: 300000\r\n\r\n", tt.request, framing, id, tt.fields)
				io.WriteString(conn, request)
				findLine(t, s, withID(id)) // the response is out
				if _, err := conn.Write(make([]byte, 300_000)); err != nil {
					t.Errorf("%q: %v", request, err)
				}
				if got := readToEnd(t, conn); len(got) < 12 || got[9:12] != tt.want {
					t.Errorf("%q: %q; want %s", request, got, tt.want)
				}
			}
		}
	})
}

// forEachTransport runs a test against a service with tokens, without and with TLS.
func forEachTransport(t *testing.T, test func(t *testing.T, s *service, dial func(*testing.T) net.Conn)) {
	for _, protocol := range []string{"plain", "TLS"} {
		t.Run(protocol, func(t *testing.T) {
			env := append(withAuth, "REQUEST_TIMEOUT=1h")
			if protocol == "plain" {
				s := newNamedService(t, env...)
				test(t, s, func(t *testing.T) net.Conn { return dialRaw(t, s) })
				return
			}
			certFile, keyFile := writeCertificate(t, t.TempDir(), "rollcall.test")
			s := newNamedService(t, append(env, "TLS_CERT_FILE="+certFile, "TLS_KEY_FILE="+keyFile)...)
			test(t, s, func(t *testing.T) net.Conn { return dialTLS(t, s, "http/1.1") })
		})
	}
}
