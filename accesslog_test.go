package main

import (
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"unicode/utf8"
)

// observed serves one request through observe and returns the answer, the line
// of the access log, and all of the log.
func observed(t testing.TB, r *http.Request, h http.HandlerFunc) (w *httptest.ResponseRecorder, line map[string]any, all string) {
	t.Helper()
	log := new(syncBuffer)
	w = httptest.NewRecorder()
	observe(slog.New(slog.NewJSONHandler(log, nil)), new(atomic.Bool), patience, h).ServeHTTP(w, r)
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
			w, line, _ := observed(t, r, func(w http.ResponseWriter, r *http.Request) { within = infoFrom(r.Context()).id })
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
		info := infoFrom(r.Context())
		info.subject, info.failure = "alice", &apiError{cause: errors.New("the disk is full")}
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
	h := observe(slog.New(slog.NewJSONHandler(log, &slog.HandlerOptions{Level: slog.LevelWarn})), new(atomic.Bool), patience,
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
	h := observe(slog.New(slog.NewJSONHandler(log, nil)), new(atomic.Bool), patience, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		panic(http.ErrAbortHandler)
	}))
	v := panicOf(func() { h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/aborted", nil)) })
	if v != http.ErrAbortHandler {
		t.Errorf("panics with %v; want %v", v, http.ErrAbortHandler)
	}
	if got := log.String(); !strings.Contains(got, `"path":"/aborted","status":0`) || !strings.Contains(got, `"level":"WARN"`) {
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
			_, line, _ := observed(t, r, func(w http.ResponseWriter, r *http.Request) { infoFrom(r.Context()).subject = tt.subject })
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

// Whose request it is must not be guessed: outside of observe nobody knows.
func TestInfoOfNothing(t *testing.T) {
	t.Parallel()
	if v := panicOf(func() { infoFrom(t.Context()) }); v == nil {
		t.Error("a context without a requestInfo does not panic")
	}
}
