package main

import (
	"encoding/hex"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"
)

// Fuzz targets of the small parsers of what anybody may send: ids, header
// fields, paths. Those of the larger ones stand beside their tests.

var uuidForm = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

func FuzzUUID(f *testing.F) {
	for _, seed := range []string{noSuchID, "{" + noSuchID + "}", "urn:uuid:" + noSuchID, strings.ReplaceAll(noSuchID, "-", ""),
		"urn:uuid:{" + noSuchID + "}", "", "{}", noSuchID + "-", "0-0"} {
		f.Add(seed, []byte("0123456789abcdef"))
	}
	f.Fuzz(func(t *testing.T, s string, id []byte) {
		if got, err := parseUUID(s); err == nil {
			bare := strings.NewReplacer("-", "", "{", "", "}", "").Replace(strings.TrimPrefix(s, "urn:uuid:"))
			if !uuidForm.MatchString(got) || strings.ToLower(bare) != strings.ReplaceAll(got, "-", "") {
				t.Errorf("%q became %q", s, got)
			}
		}
		if len(id) != 16 {
			return
		}
		want := formatUUID([16]byte(id))
		for _, form := range []string{want, strings.ToUpper(want), hex.EncodeToString(id), "{" + want + "}", "urn:uuid:" + want} {
			if got, err := parseUUID(form); err != nil || got != want {
				t.Errorf("%q became %q, %v", form, got, err)
			}
		}
	})
}

var (
	requestIDForm = regexp.MustCompile(`^[A-Za-z0-9._~+/=:-]{1,128}$`)
	// W3C Trace Context, section 3.2, and 4.3 on versions to come.
	traceparentForm = regexp.MustCompile(`^([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(?s:(-.*)?)$`)
)

func FuzzRequestID(f *testing.F) {
	for _, seed := range []string{"", "a", "a b", "é", "a\n", strings.Repeat("a", 129), "A.b_c~d+e/f=g:h-i"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, given string) {
		got := requestID([]string{given})
		if ok := requestIDForm.MatchString(given) && !strings.HasSuffix(given, "\n"); !requestIDForm.MatchString(got) || (got == given) != ok {
			t.Errorf("%q became %q", given, got)
		}
	})
}

func FuzzTraceparent(f *testing.F) {
	const id = "0af7651916cd43dd8448eb211c80319c"
	for _, seed := range []string{"", "00-" + id + "-b7ad6b7169203331-01", "cc-" + id + "-b7ad6b7169203331-01-x", "ff-" + id + "-b7ad6b7169203331-01",
		"00-" + id + "-0000000000000000-01", "00-00000000000000000000000000000000-b7ad6b7169203331-01", "00-" + id + "-b7ad6b7169203331-01-"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, field string) {
		want := ""
		if m := traceparentForm.FindStringSubmatch(field); m != nil && m[1] != "ff" && strings.Trim(m[2], "0") != "" &&
			strings.Trim(m[3], "0") != "" && (m[1] != "00" || m[4] == "") {
			want = m[2]
		}
		if got := traceID([]string{field}); got != want {
			t.Errorf("%q has the id %q, want %q", field, got, want)
		}
	})
}

func FuzzContentType(f *testing.F) {
	for _, seed := range []string{"", "application/json", "Application/JSON; charset=utf-8", "application/problem+json", "+json", "a/+json",
		"application/json;", "application/json; a=b; a=c", "text/plain", "application/json, text/html", `a/b+json; x="`} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, field string) {
		got := isJSON([]string{field})
		name, _, _ := strings.Cut(field, ";")
		name = strings.ToLower(strings.TrimSpace(name))
		if got && name != "application/json" && !(strings.Contains(name, "/") && strings.HasSuffix(name, "+json")) {
			t.Errorf("%q is taken for JSON", field)
		}
		if again := isJSON([]string{capitals(field)}); again != got {
			t.Errorf("%q is JSON: %t, but %t in capitals", field, got, again)
		}
		for _, parameters := range []string{"; charset=utf-8", ";", `;a="b;c`} {
			if isJSON([]string{field + parameters}) != got || isJSON([]string{name + parameters}) != got {
				t.Errorf("%q is JSON: %t, but not so with the parameters %q", field, got, parameters)
			}
		}
	})
}

func FuzzLoggedPath(f *testing.F) {
	for _, seed := range []string{"", "/", "/api/v1/users/a@example.com/x", "/a%40b", strings.Repeat("é", 200), "/" + strings.Repeat("x@y/", 200), "\xff"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, path string) {
		got := loggedPath(path)
		if len(got) > 256 || strings.Contains(got, "@") || strings.Contains(got, "%40") {
			t.Errorf("%q is logged as %q", path, got)
		}
		if utf8.ValidString(path) && !utf8.ValidString(got) {
			t.Errorf("%q is logged as %q: a part of a character", path, got)
		}
		if len(path) <= 256 && !strings.Contains(path, "@") && !strings.Contains(path, "%40") && got != path {
			t.Errorf("%q is logged as %q", path, got)
		}
	})
}

// FuzzScopeName holds that a configured scope can stand in a challenge, between quotes (RFC 9110, section 5.6.4).
func FuzzScopeName(f *testing.F) {
	for _, seed := range []string{"users:read", "https://api.example.com/users.read", "Users.Read.All", "a b", `a"b`, `a\b`, "é", "a\n", ""} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, value string) {
		scope, err := parseScope(value)
		if err == nil && (scope != value || scope == "" || strings.ContainsAny(scope, `"\ `) || strings.IndexFunc(scope, notASCII) >= 0) {
			t.Errorf("%q is taken as the scope %q", value, scope)
		}
	})
}

func notASCII(r rune) bool { return r <= ' ' || r > '~' }

func FuzzOrigins(f *testing.F) {
	for _, seed := range []string{"*", "https://a.example", "http://localhost:5173, https://b.example", "https://a.example/", "HTTPS://A.example:443",
		"null", "https://a.example,,", "https://[::1]:80", "https://u@a.example", "https://a.example?x", "https://é.example"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, v string) {
		origins, err := parseOrigins(v)
		if err != nil {
			return
		}
		for _, o := range origins {
			// A browser sends a scheme and a host in lower case, and nothing else
			// (RFC 6454, section 6.2): what is kept in another form matches nothing.
			u, err := url.Parse(o)
			if err != nil || u.Host == "" || u.Scheme+"://"+u.Host != o || strings.ToLower(o) != o {
				t.Errorf("%q: the origin %q", v, o)
			}
			if again, err := parseOrigins(o); err != nil || len(again) != 1 || again[0] != o {
				t.Errorf("%q: the origin %q becomes %q, %v", v, o, again, err)
			}
		}
	})
}

func FuzzBearerToken(f *testing.F) {
	for _, seed := range []string{"Bearer a.b.c", "bearer  a ", "Bearer", "Basic YTpi", "", " Bearer a", "Bearer\ta", "BEARER a b"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, field string) {
		r := &http.Request{Header: http.Header{"Authorization": {field}}}
		token := bearerToken(r)
		want := ""
		if len(field) > 7 && strings.EqualFold(field[:7], "Bearer ") {
			want = strings.Trim(field[7:], " ")
		}
		if token != want {
			t.Errorf("%q: %q; want %q", field, token, want)
		}
		r.Header.Add("Authorization", field)
		if token := bearerToken(r); token != "" && !strings.Contains(token, ",") {
			t.Errorf("%q twice: %q, which may be a token", field, token)
		}
	})
}

func FuzzHost(f *testing.F) {
	for _, seed := range []string{"", "0.0.0.0", "::", "[::1]", "localhost", "a:1", "fe80::1%eth0", " ", "a/b", "[::1]:80"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		host, err := parseHost(s)
		if err != nil {
			return
		}
		// What is joined with a port comes apart again.
		got, port, err := net.SplitHostPort(net.JoinHostPort(host, "80"))
		if err != nil || got != host || port != "80" {
			t.Errorf("%q became %q, which as an address is %q %q, %v", s, host, got, port, err)
		}
	})
}
