package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
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
	"unicode/utf8"
)

// A rawConn is a connection on which a test may say what no client would.
type rawConn struct {
	t testing.TB
	net.Conn
	reader *bufio.Reader
}

// dialRaw connects to the service until the test ends.
func dialRaw(t testing.TB, s *service) *rawConn {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &rawConn{t: t, Conn: conn}
}

func (c *rawConn) send(text string) {
	c.t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		c.t.Fatal(err)
	}
}

// answer reads an answer, be it one of the 1xx. It waits for less time than
// the service has patience with a body, so that no answer comes by giving up.
func (c *rawConn) answer() answer {
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
func (c *rawConn) answerTo(request string) answer {
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

// newOffline returns the whole service, as newHandler makes it, without a
// database to talk to. What its log says is in the second result.
func newOffline(t testing.TB, env ...string) (*service, *store, *health) {
	t.Helper()
	vars := testEnv("host=127.0.0.1 port=1 user=nobody dbname=none sslmode=disable", env...)
	cfg, err := loadConfig(func(name string) string { return vars[name] }, false)
	if err != nil {
		t.Fatal(err)
	}
	buffer := new(syncBuffer)
	log := newLogger(cfg, buffer)
	s := openStore(cfg, log)
	h := &health{store: s}
	server := httptest.NewServer(newHandler(cfg, s, h, log))
	t.Cleanup(func() {
		server.Close()
		s.close()
	})
	return &service{t: t, url: server.URL, log: buffer}, s, h
}

const middlewareSecret = "a secret for middleware_test, of 32 bytes or more"

var withAuth = []string{"AUTH=jwt", "JWT_SECRET=" + middlewareSecret}

// bearer returns the header field with a token of that subject.
func bearer(subject string) string {
	return "Authorization: Bearer " + mintToken([]byte(middlewareSecret), grant{subject: subject, ttl: time.Hour}, time.Now())
}

// The order of the layers, told from outside by who answers first.

func TestOrderPreflightNeedsNoToken(t *testing.T) {
	t.Parallel()
	s, _, _ := newOffline(t, withAuth...) // not even started
	for _, path := range []string{"/api/v1/users", "/api/v1/users/1", "/api/nothing", "/health", "/nothing"} {
		a := s.call("OPTIONS", path, "", "Origin: https://app.example", "Access-Control-Request-Method: PUT",
			"Access-Control-Request-Headers: authorization,content-type")
		if a.status != 204 || a.body != "" || a.header.Get("Access-Control-Allow-Origin") != "*" {
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
				"Access-Control-Expose-Headers": "ETag, Link, Location, Retry-After, X-Request-Id",
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
	s, store, _ := newOffline(t)
	store.started.Store(true) // without a statement prepared: any look into the table panics
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
	s, store, h := newOffline(t, withAuth...)
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

	store.started.Store(true)
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
	tx, err := s.db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	if _, err := tx.Exec("LOCK TABLE users IN SHARE MODE"); err != nil { // which lets others read
		t.Fatal(err)
	}
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

// observed serves one request through observe and returns the answer, the line
// of the access log, and all of the log.
func observed(t testing.TB, r *http.Request, h http.HandlerFunc) (w *httptest.ResponseRecorder, line map[string]any, all string) {
	t.Helper()
	log := new(syncBuffer)
	w = httptest.NewRecorder()
	observe(slog.New(slog.NewJSONHandler(log, nil)), h).ServeHTTP(w, r)
	all = log.String()
	if err := json.Unmarshal([]byte(all), &line); err != nil {
		t.Fatalf("the log is not one line: %v\n%s", err, all)
	}
	return w, line, all
}

func TestRequestID(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name  string
		given []string
		kept  bool
	}{
		{"none", nil, false},
		{"empty", []string{""}, false},
		{"one character", []string{"x"}, true},
		{"128 characters", []string{strings.Repeat("x", 128)}, true},
		{"129 characters", []string{strings.Repeat("x", 129)}, false},
		{"every character that is allowed", []string{"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._~+/=:-"}, true},
		{"a UUID", []string{"0190d3c5-7c3e-7b5a-8b1e-2f6a9d4c1e70"}, true},
		{"base64", []string{"a+b/c=="}, true},
		{"two", []string{"a", "b"}, false},
		{"two of one value", []string{"a", "a"}, false},
		{"a space", []string{"a b"}, false},
		{"a tab", []string{"a\tb"}, false},
		{"a line break", []string{"a\nb"}, false},
		{"a carriage return", []string{"a\rb"}, false},
		{"NUL", []string{"a\x00"}, false},
		{"DEL", []string{"a\x7f"}, false},
		{"a quote", []string{`a"b`}, false},
		{"a comma", []string{"a,b"}, false},
		{"a semicolon", []string{"a;b"}, false},
		{"an at sign", []string{"ada@example.com"}, false},
		{"a percent sign", []string{"%40"}, false},
		{"markup", []string{"<b>"}, false},
		{"a letter beyond ASCII", []string{"é"}, false},
		{"a full-width digit", []string{"１"}, false},
		{"the Kelvin sign", []string{"\u212A"}, false},
		{"not UTF-8", []string{"a\xff"}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := httptest.NewRequest("GET", "/", nil)
			r.Header["X-Request-Id"] = tt.given
			var within string
			w, line, _ := observed(t, r, func(w http.ResponseWriter, r *http.Request) { within = exchangeOf(w).id })
			id := w.Header().Get("X-Request-Id")
			if len(w.Header().Values("X-Request-Id")) != 1 || line["request_id"] != id || within != id {
				t.Errorf("the answer says %q, the log %q, the request %q", id, line["request_id"], within)
			}
			if kept := len(tt.given) > 0 && id == tt.given[0]; kept != tt.kept {
				t.Errorf("%q became %q", tt.given, id)
			}
			if !tt.kept && (len(id) != 32 || strings.Trim(id, "0123456789abcdef") != "") {
				t.Errorf("the new one is %q; want 32 hex digits", id)
			}
		})
	}
}

func TestRequestIDsDiffer(t *testing.T) {
	t.Parallel()
	seen := make(map[string]bool)
	for range 10_000 {
		seen[requestID(nil)] = true
	}
	if len(seen) != 10_000 {
		t.Errorf("%d different ids of 10000", len(seen))
	}
}

func TestTraceID(t *testing.T) {
	t.Parallel()
	const id, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
	const whole = "00-" + id + "-" + parent + "-01"
	tests := []struct {
		name  string
		given []string
		want  string
	}{
		// W3C Trace Context, sections 3.2.3 and 3.3.1.2
		{"example, sampled", []string{whole}, id},
		{"example, not sampled", []string{"00-" + id + "-" + parent + "-00"}, id},
		{"example of tracestate", []string{"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}, "0af7651916cd43dd8448eb211c80319c"},
		{"unknown flags", []string{"00-" + id + "-" + parent + "-ff"}, id},
		{"a later version", []string{"01-" + id + "-" + parent + "-01"}, id},
		{"a later version with more", []string{"cc-" + id + "-" + parent + "-01-what-the-future-will-be-like"}, id},
		{"a later version with a dash", []string{"01-" + id + "-" + parent + "-01-"}, id},
		{"a later version with more but no dash", []string{"cc-" + id + "-" + parent + "-01.what-the-future-will-not-be-like"}, ""},
		{"this version with more", []string{whole + "-what-the-future-will-be-like"}, ""},
		{"version ff", []string{"ff-" + id + "-" + parent + "-01"}, ""},

		{"none", nil, ""},
		{"empty", []string{""}, ""},
		{"two", []string{whole, whole}, ""},
		{"upper case", []string{strings.ToUpper(whole)}, ""},
		{"one letter in upper case", []string{strings.Replace(whole, "b", "B", 1)}, ""},
		{"a trace id of zeros", []string{"00-" + strings.Repeat("0", 32) + "-" + parent + "-01"}, ""},
		{"a parent id of zeros", []string{"00-" + id + "-" + strings.Repeat("0", 16) + "-01"}, ""},
		{"a version that is not hexadecimal", []string{"0g-" + id + "-" + parent + "-01"}, ""},
		{"a trace id that is not hexadecimal", []string{strings.Replace(whole, "f", "g", 1)}, ""},
		{"a parent id that is not hexadecimal", []string{strings.Replace(whole, "aa0b", "aa.b", 1)}, ""},
		{"flags that are not hexadecimal", []string{"00-" + id + "-" + parent + "-0x"}, ""},
		{"cut off", []string{whole[:54]}, ""},
		{"a trace id too short", []string{"00-" + id[1:] + "-" + parent + "-01"}, ""},
		{"a trace id too long", []string{"00-0" + id + "-" + parent[1:] + "-01"}, ""},
		{"the dashes elsewhere", []string{"00" + id + "--" + parent + "-01"}, ""},
		{"no dash behind the version", []string{"00_" + id + "-" + parent + "-01"}, ""},
		{"no dash behind the trace id", []string{"00-" + id + "_" + parent + "-01"}, ""},
		{"no dash behind the parent id", []string{"00-" + id + "-" + parent + "_01"}, ""},
		{"a space around", []string{" " + whole}, ""},
		{"letters beyond ASCII", []string{"00-" + strings.Repeat("é", 16) + "-" + parent + "-01"}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := httptest.NewRequest("GET", "/", nil)
			r.Header["Traceparent"] = tt.given
			_, line, _ := observed(t, r, func(http.ResponseWriter, *http.Request) {})
			got, there := line["trace_id"]
			if there != (tt.want != "") || there && got != tt.want {
				t.Errorf("%q: trace_id %v; want %q", tt.given, got, tt.want)
			}
		})
	}
}

func TestAccessLogFields(t *testing.T) {
	t.Parallel()
	r := httptest.NewRequest("POST", "/api/v1/users?email=ada@example.com&token=hunter2", strings.NewReader(`{"secret":"hunter2"}`))
	r.RemoteAddr = "192.0.2.7:4711"
	r.Header.Set("Authorization", "Bearer hunter2")
	r.Header.Set("Cookie", "session=hunter2")
	r.Header.Set("X-Request-Id", "id-1")
	r.Header.Set("Traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
	_, line, all := observed(t, r, func(w http.ResponseWriter, r *http.Request) {
		x := exchangeOf(w)
		x.subject, x.cause = "alice", errors.New("the disk is full")
		w.WriteHeader(507)
		w.WriteHeader(200) // comes too late
		io.WriteString(w, "0123")
		io.WriteString(w, "456")
	})
	want := map[string]any{
		"level": "ERROR", "msg": "request", "method": "POST", "path": "/api/v1/users", "status": 507.0, "bytes": 7.0,
		"request_id": "id-1", "remote": "192.0.2.7:4711", "sub": "alice", "trace_id": "0af7651916cd43dd8448eb211c80319c",
		"error": "the disk is full",
	}
	for name, value := range want {
		if line[name] != value {
			t.Errorf("%s is %v; want %v", name, line[name], value)
		}
	}
	if ms, ok := line["duration_ms"].(float64); !ok || ms < 0 || ms > 60_000 {
		t.Errorf("duration_ms is %v", line["duration_ms"])
	}
	if len(line) != len(want)+2 { // duration_ms and time
		t.Errorf("there are other fields: %v", line)
	}
	for _, secret := range []string{"hunter2", "ada@", "email=", "?"} {
		if strings.Contains(all, secret) {
			t.Errorf("the log has %q in it: %s", secret, all)
		}
	}
}

func TestAccessLogOfNothing(t *testing.T) {
	t.Parallel()
	_, line, _ := observed(t, httptest.NewRequest("GET", "/", nil), func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "OK") // no WriteHeader: 200 goes without saying
	})
	if line["status"] != 200.0 || line["bytes"] != 2.0 {
		t.Errorf("%v; want status 200, bytes 2", line)
	}
	for _, name := range []string{"sub", "trace_id", "error"} {
		if value, there := line[name]; there {
			t.Errorf("%s is %v; want none", name, value)
		}
	}
}

func TestAccessLogLevel(t *testing.T) {
	t.Parallel()
	tests := []struct {
		status int
		want   string
	}{
		{200, "INFO"}, {204, "INFO"}, {304, "INFO"}, {399, "INFO"},
		{400, "WARN"}, {401, "WARN"}, {404, "WARN"}, {499, "WARN"},
		{500, "ERROR"}, {503, "ERROR"}, {599, "ERROR"},
	}
	for _, tt := range tests {
		_, line, _ := observed(t, httptest.NewRequest("GET", "/", nil), func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(tt.status)
		})
		if line["level"] != tt.want || line["status"] != float64(tt.status) {
			t.Errorf("%d: logged %v; want level %s", tt.status, line, tt.want)
		}
	}
}

// What LOG_LEVEL leaves out is not written.
func TestAccessLogFollowsTheLevel(t *testing.T) {
	t.Parallel()
	log := new(syncBuffer)
	h := observe(slog.New(slog.NewJSONHandler(log, &slog.HandlerOptions{Level: slog.LevelWarn})),
		http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/bad" {
				w.WriteHeader(404)
			}
			io.WriteString(w, "OK")
		}))
	for _, path := range []string{"/good", "/bad"} {
		h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", path, nil))
	}
	if got := log.String(); strings.Contains(got, "/good") || !strings.Contains(got, "/bad") {
		t.Errorf("at LOG_LEVEL=warn it says %s", got)
	}
}

// An answer that was cut off is in the log too.
func TestAccessLogOfAnAbort(t *testing.T) {
	t.Parallel()
	log := new(syncBuffer)
	h := observe(slog.New(slog.NewJSONHandler(log, nil)), http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		panic(http.ErrAbortHandler)
	}))
	v := panicOf(func() { h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/aborted", nil)) })
	if v != http.ErrAbortHandler {
		t.Errorf("panics with %v; want %v", v, http.ErrAbortHandler)
	}
	if got := log.String(); !strings.Contains(got, `"path":"/aborted","status":0`) || !strings.Contains(got, `"level":"ERROR"`) {
		t.Errorf("logged %s", got)
	}
}

func panicOf(f func()) (v any) {
	defer func() { v = recover() }()
	f()
	return nil
}

func TestAccessLogOfHEAD(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.call("POST", "/api/v1/users", `{"email":"ada@example.com","name":"Ada"}`)
	for _, path := range []string{"/api/v1/users", "/health", "/nothing"} {
		a := s.call("HEAD", path, "")
		line := findLine(t, s, withID(a.header.Get("X-Request-Id")))
		if line["bytes"] != 0.0 || a.body != "" || a.header.Get("Content-Length") == "0" {
			t.Errorf("HEAD %s: logged %v, body %q, Content-Length %s", path, line, a.body, a.header.Get("Content-Length"))
		}
	}
}

func TestLoggedPath(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 255)
	tests := []struct {
		name   string
		target string // as it stands in the request
		want   string
	}{
		{"a user", "/api/v1/users/0190d3c5-7c3e-7b5a-8b1e-2f6a9d4c1e70", "/api/v1/users/0190d3c5-7c3e-7b5a-8b1e-2f6a9d4c1e70"},
		{"root", "/", "/"},
		{"no query", "/a?b=c", "/a"},
		{"no query, though empty", "/a?", "/a"},
		{"an address", "/api/v1/users/ada@example.com", "/api/v1/users/***"},
		{"an address in the middle", "/a/ada@example.com/b", "/a/***/b"},
		{"two addresses", "/ada@example.com/bob@example.com", "/***/***"},
		{"an at sign alone", "/@", "/***"},
		{"encoded", "/api/v1/users/ada%40example.com", "/api/v1/users/***"},
		{"encoded twice", "/api/v1/users/ada%2540example.com", "/api/v1/users/***"},
		{"with an encoded slash before", "/x%2Fada@example.com", "/x/***"},
		{"another character that is encoded", "/a%20b/%25/c", "/a b/%/c"},
		{"an address beyond where it is cut", "/" + long + "/ada@example.com", "/" + long},
		{"an address across where it is cut", "/" + long[:250] + "ada@example.com", "/***"},
		{"256 bytes", "/" + long, "/" + long},
		{"257 bytes", "/" + long + "y", "/" + long},
		{"half a character of two bytes", "/" + long[:254] + "%C3%A9", "/" + long[:254]},
		{"half a character of four bytes", "/" + long[:252] + "%F0%9F%98%80", "/" + long[:252]},
		{"a character that just fits", "/" + long[:253] + "%C3%A9", "/" + long[:253] + "é"},
		{"not UTF-8", "/a%FFb", "/a\uFFFDb"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			_, line, all := observed(t, httptest.NewRequest("GET", tt.target, nil), func(http.ResponseWriter, *http.Request) {})
			if line["path"] != tt.want {
				t.Errorf("%s is logged as %s; want %s", tt.target, line["path"], tt.want)
			}
			if strings.Contains(all, "example.com") || !utf8.ValidString(all) {
				t.Errorf("logged %s", all)
			}
		})
	}
}

// An address as a token's subject, or a line break, is the log's to defuse.
func TestLoggedSubjectAndMethod(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name, subject, want string
	}{
		{"a name", "alice", "alice"},
		{"an address", "alice@example.com", "***"},
		{"an address, encoded", "alice%40example.com", "***"},
		{"a long one", strings.Repeat("x", 300), strings.Repeat("x", 256)},
		{"a line break", "a\n{\"level\":\"ERROR\"}", "a\n{\"level\":\"ERROR\"}"}, // observed finds one line still
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := httptest.NewRequest(strings.Repeat("M", 33), "/", nil)
			_, line, _ := observed(t, r, func(w http.ResponseWriter, r *http.Request) { exchangeOf(w).subject = tt.subject })
			if line["sub"] != tt.want || line["method"] != strings.Repeat("M", 32) {
				t.Errorf("logged %v; want sub %s and 32 letters of the method", line, tt.want)
			}
		})
	}
}

// The subject of a token and nothing else of it gets into the log.
func TestAccessLogOfToken(t *testing.T) {
	t.Parallel()
	s := newService(t, withAuth...)
	field := bearer("alice")
	_, token, _ := strings.Cut(field, "Bearer ")
	good := s.call("GET", "/api/v1/users?access_token="+token, "", field)
	bad := s.call("GET", "/api/v1/users", "", field+"x")
	if good.status != 200 || bad.status != 401 {
		t.Fatalf("%d %s, %d %s; want 200 and 401", good.status, good.body, bad.status, bad.body)
	}
	if line := findLine(t, s, withID(good.header.Get("X-Request-Id"))); line["sub"] != "alice" {
		t.Errorf("logged %v; want the subject", line)
	}
	if line := findLine(t, s, withID(bad.header.Get("X-Request-Id"))); line["sub"] != nil {
		t.Errorf("logged %v; want no subject: who sent it is not known", line)
	}
	for part := range strings.SplitSeq(token, ".") {
		if strings.Contains(s.log.String(), part) || strings.Contains(bad.body, part) {
			t.Errorf("%s of the token got out", part)
		}
	}
}

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
			expect("Access-Control-Allow-Headers", only(tt.methods,
				"Authorization, Content-Type, Idempotency-Key, If-Match, If-None-Match, X-Request-Id, Traceparent"))
			expect("Access-Control-Max-Age", only(tt.methods, "7200"))
			expect("Access-Control-Expose-Headers", only(tt.exposed, "ETag, Link, Location, Retry-After, X-Request-Id"))
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
		{"with a part of the answer out", part, "boom", true, 200, true, "a part"},
		{"with the status out", func(w http.ResponseWriter) { w.WriteHeader(204) }, "boom", true, 204, true, ""},
		{"an abort with a part out", part, http.ErrAbortHandler, true, 200, false, "a part"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			buffer := new(syncBuffer)
			log := slog.New(slog.NewJSONHandler(buffer, nil))
			h := observe(log, recoverPanics(log, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
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
			if line := findLine(t, s, withID("panic-2")); line["status"] != float64(tt.status) {
				t.Errorf("logged %v; want status %d", line, tt.status)
			}
			if tt.status != 0 && w.Code != tt.status || w.Body.String() != tt.lasting {
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

// The 1xx are no answer yet: an error after them can still be told.
func TestPanicAfterEarlyHints(t *testing.T) {
	t.Parallel()
	buffer := new(syncBuffer)
	log := slog.New(slog.NewJSONHandler(buffer, nil))
	server := httptest.NewServer(observe(log, recoverPanics(log, compress(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusEarlyHints)
		panic("boom")
	})))))
	defer server.Close()
	s := &service{t: t, url: server.URL, log: buffer}
	conn := dialRaw(t, s)
	if a := conn.answerTo("GET / HTTP/1.1\r\nHost: rollcall\r\nX-Request-Id: hints-1\r\n\r\n"); a.status != 103 {
		t.Fatalf("%d %s; want 103", a.status, a.body)
	}
	a := conn.answer()
	if want := `{"error":{"message":"Internal error","code":500}}`; a.status != 500 || a.body != want {
		t.Errorf("%d %s; want 500 %s", a.status, a.body, want)
	}
	if line := findLine(t, s, withID("hints-1")); line["status"] != 500.0 || line["bytes"] != float64(len(a.body)) {
		t.Errorf("logged %v; want status 500, %d bytes", line, len(a.body))
	}
}

// http.ResponseController reaches the server's own writer through all layers.
func TestLayersUnwrap(t *testing.T) {
	t.Parallel()
	log := slog.New(slog.DiscardHandler)
	failed := make(chan error, 1)
	h := observe(log, recoverPanics(log, cors(nil, limitInFlight(1, deadline(patience, limitBody(1, compress(http.HandlerFunc(
		func(w http.ResponseWriter, r *http.Request) {
			control := http.NewResponseController(w)
			failed <- errors.Join(control.SetReadDeadline(time.Time{}), control.SetWriteDeadline(time.Time{}), control.Flush())
		}))))))))
	server := httptest.NewServer(h)
	defer server.Close()
	(&service{t: t, url: server.URL}).call("GET", "/", "")
	if err := <-failed; err != nil {
		t.Error(err)
	}
}

// Outside of observe there is no exchange. What is noted there is lost, and
// nothing worse happens.
func TestExchangeOfNothing(t *testing.T) {
	t.Parallel()
	first := exchangeOf(httptest.NewRecorder())
	first.subject = "alice"
	if second := exchangeOf(httptest.NewRecorder()); second == first || second.subject != "" {
		t.Error("two requests share an exchange")
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
		exactPath(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})).ServeHTTP(w, r)
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
	h := limitInFlight(most, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/wait":
			entered <- struct{}{}
			<-leave
		case "/panic":
			panic("boom")
		}
	}))
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
	h := deadline(time.Minute, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
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

// The deadline reaches the SQL: a statement that waits for a lock is given up,
// and its caller is told that nobody knows what became of it.
func TestDeadlineReachesTheSQL(t *testing.T) {
	t.Parallel()
	s := newService(t, "REQUEST_TIMEOUT=200ms")
	tx, err := s.db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	if _, err := tx.Exec("LOCK TABLE users IN ACCESS EXCLUSIVE MODE"); err != nil {
		t.Fatal(err)
	}
	read := s.call("GET", "/api/v1/users", "")
	write := s.call("POST", "/api/v1/users", `{"email":"ada@example.com","name":"Ada"}`)
	for _, a := range []answer{read, write} {
		if a.status != 503 || a.header.Get("Retry-After") == "" || !strings.Contains(a.body, "The request took too long") {
			t.Errorf("%d %s, Retry-After %q", a.status, a.body, a.header.Get("Retry-After"))
		}
	}
	if !strings.Contains(write.body, "may have been made") || strings.Contains(read.body, "may have been made") {
		t.Errorf("only the write is unsure: %s, %s", read.body, write.body)
	}
	waitFor(t, "the statements to end", func() bool {
		var running int
		err := s.db.QueryRow("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() " +
			"AND wait_event_type = 'Lock' AND query LIKE '%users%' AND pid <> pg_backend_pid() " +
			"AND pid IN (SELECT pid FROM pg_locks WHERE NOT granted AND relation = 'users'::regclass)").Scan(&running)
		return err == nil && running == 0
	})
}

// A refusal does not wait for a body that nobody will read.
func TestRefusalsDoNotWaitForTheBody(t *testing.T) {
	t.Parallel()
	s := newService(t, append(withAuth, "REQUEST_TIMEOUT=1h")...)
	for _, tt := range []struct{ name, request, want string }{
		{"no token", "POST /api/v1/users HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n", "401"},
		{"no route", "POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n", "404"},
		{"no method", "PUT /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", "405"},
		{"no type", "POST /api/v1/users HTTP/1.1\r\nHost: x\r\n" + bearer("a") + "\r\nContent-Length: 10\r\n\r\n", "415"},
		{"too large, and asking first", "POST /api/v1/users HTTP/1.1\r\nHost: x\r\n" + bearer("a") + "\r\nContent-Type: application/json\r\n" +
			"Expect: 100-continue\r\nContent-Length: 99999999999\r\n\r\n", "413"},
		{"not a path", "GET * HTTP/1.1\r\nHost: x\r\n\r\n", "404"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(patience))
			if _, err := io.WriteString(c, tt.request); err != nil {
				t.Fatal(err)
			}
			resp, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(resp.Body)
			if !strings.HasPrefix(resp.Status, tt.want) || !strings.HasPrefix(string(body), `{"error":`) {
				t.Errorf("%s %s; want %s", resp.Status, body, tt.want)
			}
		})
	}
}
