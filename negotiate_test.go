package main

import (
	"compress/gzip"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"testing"
)

func TestQuality(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		fields []string
		want   float64 // of gzip
	}{
		{"no field", nil, -1},
		{"empty", []string{""}, -1},
		{"alone", []string{"gzip"}, 1},
		{"in capitals", []string{"GZip"}, 1},
		{"another", []string{"br"}, -1},
		{"another that begins like it", []string{"gzip2, gzi"}, -1},
		{"everything is not it", []string{"*"}, -1},
		{"among others", []string{"br, gzip, zstd"}, 1},
		{"without spaces", []string{"br,gzip,zstd"}, 1},
		{"with more spaces, tabs and empty members", []string{" ,\t br ,, gzip\t, "}, 1},
		{"in the second field", []string{"br", "gzip;q=0.4"}, 0.4},
		{"named twice, the higher counts", []string{"gzip;q=0.2, gzip;q=0.6", "gzip;q=0.4"}, 0.6},
		{"in a parameter of another", []string{"br;x=gzip"}, -1},

		{"a weight", []string{"gzip;q=0.5"}, 0.5},
		{"the weight of another", []string{"br;q=0.1, gzip, zstd;q=0.2"}, 1},
		{"a weight with spaces", []string{"gzip ; q=0.5"}, 0.5},
		{"a weight in capitals", []string{"gzip;Q=0.5"}, 0.5},
		{"a weight behind a parameter", []string{"gzip;level=9;q=0.5"}, 0.5},
		{"a parameter that is no weight", []string{"gzip;quality=0.5"}, 1},
		{"an empty parameter", []string{"gzip;"}, 1},
		{"zero", []string{"gzip;q=0"}, 0},
		{"zero with a point", []string{"gzip;q=0."}, 0},
		{"zero with three digits", []string{"gzip;q=0.000"}, 0},
		{"next to nothing", []string{"gzip;q=0.001"}, 0.001},
		{"almost one", []string{"gzip;q=0.999"}, 0.999},
		{"one", []string{"gzip;q=1"}, 1},
		{"one with a point", []string{"gzip;q=1."}, 1},
		{"one with three digits", []string{"gzip;q=1.000"}, 1},

		{"broken: nothing", []string{"gzip;q="}, 0},
		{"broken: no equals sign", []string{"gzip;q"}, 0},
		{"broken: more than one", []string{"gzip;q=1.001"}, 0},
		{"broken: two", []string{"gzip;q=2"}, 0},
		{"broken: four digits", []string{"gzip;q=0.1234"}, 0},
		{"broken: no digit before the point", []string{"gzip;q=.5"}, 0},
		{"broken: two points", []string{"gzip;q=0..1"}, 0},
		{"broken: a leading zero", []string{"gzip;q=01"}, 0},
		{"broken: a leading zero and a fraction", []string{"gzip;q=00.5"}, 0},
		{"broken: negative", []string{"gzip;q=-1"}, 0},
		{"broken: a plus sign", []string{"gzip;q=+1"}, 0},
		{"broken: an exponent", []string{"gzip;q=1e0"}, 0},
		{"broken: hexadecimal", []string{"gzip;q=0x1"}, 0},
		{"broken: an underscore", []string{"gzip;q=0_1"}, 0},
		{"broken: no number", []string{"gzip;q=NaN"}, 0},
		{"broken: quoted", []string{`gzip;q="1"`}, 0},
		{"broken: other digits", []string{"gzip;q=０.５"}, 0},
		{"broken in one, whole in the other", []string{"gzip;q=x, gzip;q=0.5"}, 0.5},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if got := quality(tt.fields, "gzip"); got != tt.want {
				t.Errorf("%q: %v; want %v", tt.fields, got, tt.want)
			}
		})
	}
}

func TestAcceptsGzip(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		fields []string
		want   bool
	}{
		{"no field", nil, false},
		{"empty: the bare content alone", []string{""}, false},
		{"gzip", []string{"gzip"}, true},
		{"by its old name", []string{"x-gzip"}, true},
		{"in capitals", []string{"GZIP"}, true},
		{"what browsers send", []string{"gzip, deflate, br, zstd"}, true},
		{"what curl sends", []string{"deflate, gzip"}, true},
		{"in a second field", []string{"br", "gzip"}, true},
		{"others alone", []string{"br, zstd"}, false},
		{"identity alone", []string{"identity"}, false},
		{"everything", []string{"*"}, true},

		{"refused", []string{"gzip;q=0"}, false},
		{"refused with digits", []string{"gzip;q=0.000"}, false},
		{"refused, and all else allowed", []string{"gzip;q=0, *"}, false},
		{"refused, and identity too", []string{"gzip;q=0, identity;q=0"}, false},
		{"everything refused", []string{"*;q=0"}, false},
		{"everything else refused", []string{"gzip, *;q=0"}, true},
		{"broken weight", []string{"gzip;q=high"}, false},
		{"broken weight of everything", []string{"*;q=high"}, false},

		{"the bare content refused", []string{"gzip, identity;q=0"}, true},
		{"the bare content refused, gzip hardly liked", []string{"gzip;q=0.001, identity;q=0"}, true},
		{"the bare content refused, gzip not named", []string{"identity;q=0"}, false},
		{"the bare content refused, everything else allowed", []string{"identity;q=0, *"}, true},
		{"both alike", []string{"identity, gzip"}, true},
		{"both alike, with weights", []string{"identity;q=0.5, gzip;q=0.5"}, true},
		{"gzip preferred", []string{"identity;q=0.5, gzip"}, true},
		{"the bare content preferred", []string{"identity, gzip;q=0.9"}, false},
		{"the bare content preferred to everything", []string{"identity;q=0.8, *;q=0.5"}, false},
		{"another coding preferred, which is not to be had", []string{"br, gzip;q=0.1"}, true},

		// RFC 9110, section 12.5.3, the five examples.
		{"example 1", []string{"compress, gzip"}, true},
		{"example 2", []string{""}, false},
		{"example 3", []string{"*"}, true},
		{"example 4", []string{"compress;q=0.5, gzip;q=1.0"}, true},
		{"example 5", []string{"gzip;q=1.0, identity; q=0.5, *;q=0"}, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if got := acceptsGzip(tt.fields); got != tt.want {
				t.Errorf("%q: %t; want %t", tt.fields, got, tt.want)
			}
		})
	}
}

func TestPrefersProblem(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		fields []string
		want   bool
	}{
		{"no field", nil, false},
		{"anything", []string{"*/*"}, false},
		{"any application", []string{"application/*"}, false},
		{"JSON", []string{"application/json"}, false},
		{"problem", []string{"application/problem+json"}, true},
		{"problem, in capitals", []string{"Application/Problem+JSON"}, true},
		{"problem, with a parameter", []string{"application/problem+json; charset=utf-8"}, true},
		{"problem in XML", []string{"application/problem+xml"}, false},
		{"problem refused", []string{"application/problem+json;q=0"}, false},
		{"both alike", []string{"application/json, application/problem+json"}, true},
		{"in two fields", []string{"application/json", "application/problem+json"}, true},
		{"JSON preferred", []string{"application/json, application/problem+json;q=0.9"}, false},
		{"problem preferred", []string{"application/json;q=0.5, application/problem+json"}, true},
		{"problem, then anything", []string{"application/problem+json, */*;q=0.1"}, true},
		{"problem, and JSON refused", []string{"application/problem+json;q=0.1, application/json;q=0"}, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if got := prefersProblem(tt.fields); got != tt.want {
				t.Errorf("%q: %t; want %t", tt.fields, got, tt.want)
			}
		})
	}
}

// The same failure in both forms, from outside.
func TestProblemForm(t *testing.T) {
	t.Parallel()
	h := handlerFunc(func(http.ResponseWriter, *http.Request) error { return invalid(`"quoted" & <marked>`) })
	tests := []struct {
		accept      string
		contentType string
		body        string
	}{
		{"*/*", "application/json", `{"error":{"message":"Validation error: \"quoted\" & <marked>","code":400}}`},
		{"application/problem+json", "application/problem+json",
			`{"type":"about:blank","title":"Bad Request","status":400,"detail":"Validation error: \"quoted\" & <marked>"}`},
	}
	for _, tt := range tests {
		r := httptest.NewRequest("GET", "/", nil)
		r.Header.Set("Accept", tt.accept)
		w := httptest.NewRecorder()
		underObserve(h).ServeHTTP(w, r)
		if w.Code != 400 || w.Header().Get("Content-Type") != tt.contentType || w.Body.String() != tt.body {
			t.Errorf("%s: %d %s %s; want 400 %s %s", tt.accept, w.Code, w.Header().Get("Content-Type"), w.Body, tt.contentType, tt.body)
		}
		if vary := w.Header().Values("Vary"); !slices.Contains(vary, "Accept") {
			t.Errorf("%s: Vary %q; want Accept among it", tt.accept, vary)
		}
	}
}

// FuzzAcceptEncoding holds the rules that are true of any field whatever.
func FuzzAcceptEncoding(f *testing.F) {
	for _, seed := range []string{
		"", "gzip", "x-gzip;q=0.5", "*", "*;q=0", "gzip;q=0", "gzip;q=1.0, identity; q=0.5, *;q=0", "identity;q=0",
		"br, gzip;q=x", "gzip;q=0.1234;q=1", ";q=1,,gzip ; x=y", "GZIP;Q=0.2\t,identity", "gzip;q=01",
	} {
		f.Add(seed)
	}
	one := func(field string) []string { return []string{field} }
	f.Fuzz(func(t *testing.T, field string) {
		for _, name := range []string{"gzip", "x-gzip", "identity", "*"} {
			q := quality(one(field), name)
			if !(q == -1 || q >= 0 && q <= 1) {
				t.Errorf("the weight of %s is %v", name, q)
			}
			if named := strings.Contains(strings.ToLower(field), name); q != -1 && !named {
				t.Errorf("%s has the weight %v without being named", name, q)
			}
			for what, same := range map[string][]string{
				"as several fields": strings.Split(field, ","),
				"with more spaces":  one(strings.NewReplacer(",", " ,\t", ";", "\t; ").Replace(field)),
				"in capitals":       one(capitals(field)),
				"with empty ones":   one("," + strings.ReplaceAll(field, ",", ",,") + ","),
			} {
				if again := quality(same, name); again != q {
					t.Errorf("the weight of %s is %v, but %v %s", name, q, again, what)
				}
			}
		}
		accepted := acceptsGzip(one(field))
		named := quality(one(field), "gzip") >= 0 || quality(one(field), "x-gzip") >= 0
		switch lower := strings.ToLower(field); {
		case accepted && !strings.Contains(lower, "gzip") && !strings.Contains(lower, "*"):
			t.Error("accepted, though neither gzip nor everything is named")
		case !acceptsGzip(one(field + ",gzip")):
			t.Error("not accepted even with gzip at the end")
		case acceptsGzip(one(field+",gzip;q=0")) != (accepted && named):
			t.Error("refusing gzip counts where it is not named before, and only there")
		case accepted && !acceptsGzip(one(field+",identity;q=0")):
			t.Error("refusing the bare content makes gzip unacceptable")
		case !accepted && acceptsGzip(one(field+",identity")):
			t.Error("asking for the bare content makes gzip acceptable")
		case acceptsGzip(one(field+",br")) != accepted:
			t.Error("another coding matters")
		}
	})
}

// capitals is strings.ToUpper for ASCII alone.
func capitals(s string) string {
	b := []byte(s)
	for i, c := range b {
		if 'a' <= c && c <= 'z' {
			b[i] = c - 'a' + 'A'
		}
	}
	return string(b)
}

// pattern returns n bytes that are not all alike.
func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = "0123456789abcdef"[i*i%31%16]
	}
	return b
}

// gunzip returns what content holds, or why it holds nothing.
func gunzip(content string) string {
	z, err := gzip.NewReader(strings.NewReader(content))
	if err != nil {
		return err.Error()
	}
	plain, err := io.ReadAll(z)
	if err != nil {
		return err.Error()
	}
	return string(plain)
}

func TestCompress(t *testing.T) {
	t.Parallel()
	const varies, same = true, false
	tests := []struct {
		name     string
		accept   string
		size     int
		header   string // of the answer, "Name: value"
		encoding string
		vary     bool
	}{
		{"over 1 KiB", "gzip", 1025, "", "gzip", varies},
		{"far over 1 KiB", "gzip", 1 << 20, "", "gzip", varies},
		{"at 1 KiB", "gzip", 1024, "", "", same},
		{"small", "gzip", 2, "", "", same},
		{"empty", "gzip", 0, "", "", same},
		{"not accepted", "", 1025, "", "", varies},
		{"refused", "gzip;q=0", 1025, "", "", varies},
		{"with an ETag", "gzip", 1025, `ETag: "1"`, "", same},
		{"with an ETag, the bare content refused", "gzip, identity;q=0", 1025, `ETag: "1"`, "", same},
		{"encoded already", "gzip", 1025, "Content-Encoding: br", "br", same},
	}
	for _, tt := range tests {
		for _, method := range []string{"GET", "HEAD"} {
			t.Run(method+" "+tt.name, func(t *testing.T) {
				t.Parallel()
				content := pattern(tt.size)
				checkLeaks(t)
				server := httptest.NewServer(underObserve(compress(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if name, value, ok := strings.Cut(tt.header, ": "); ok {
						w.Header().Set(name, value)
					}
					w.Header().Set("Vary", "Origin")
					writeBody(w, http.StatusOK, []string{"text/plain"}, content)
				}))))
				defer server.Close()
				s := &service{t: t, url: server.URL}
				a := s.call(method, "/", "", "Accept-Encoding: "+tt.accept)

				if got := a.header.Get("Content-Encoding"); got != tt.encoding {
					t.Errorf("Content-Encoding %q; want %q", got, tt.encoding)
				}
				vary := a.header.Values("Vary")
				if slices.Contains(vary, "Accept-Encoding") != tt.vary || !slices.Contains(vary, "Origin") {
					t.Errorf("Vary %q; want Origin, and Accept-Encoding: %t", vary, tt.vary)
				}
				length := a.header.Get("Content-Length")
				switch {
				case method == "HEAD" && a.body != "":
					t.Errorf("an answer to HEAD has a body of %d bytes", len(a.body))
				case method == "HEAD" && tt.encoding == "gzip" && length == strconv.Itoa(tt.size):
					t.Errorf("Content-Length %s is that of the bare content", length)
				case method == "HEAD":
				case tt.encoding == "gzip":
					if len(a.body) >= tt.size || gunzip(a.body) != string(content) {
						t.Errorf("%d bytes became %d, and not the same again", tt.size, len(a.body))
					}
				case a.body != string(content) || length != strconv.Itoa(tt.size):
					t.Errorf("%d bytes, Content-Length %s; want the %d bytes as they are", len(a.body), length, tt.size)
				}
			})
		}
	}
}

// Writers are used again. What one answer was must not be seen in the next.
func TestCompressManyAtOnce(t *testing.T) {
	t.Parallel()
	checkLeaks(t)
	server := httptest.NewServer(underObserve(compress(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		size, _ := strconv.Atoi(r.URL.Query().Get("size"))
		content := pattern(size)
		w.Header().Set("Content-Length", strconv.Itoa(size))
		w.Write(content[:size/2]) // no WriteHeader: 200 goes without saying
		w.Write(content[size/2:])
	}))))
	defer server.Close()
	s := &service{t: t, url: server.URL}
	const callers = 16
	wrong := make(chan error, callers)
	for caller := range callers {
		go func() {
			for i := range 20 {
				size := 1025 + 977*caller + i
				a, err := s.try("GET", fmt.Sprintf("/?size=%d", size), "", "Accept-Encoding: gzip")
				if err != nil || a.header.Get("Content-Encoding") != "gzip" || gunzip(a.body) != string(pattern(size)) ||
					a.header.Get("Content-Length") != strconv.Itoa(len(a.body)) {
					wrong <- fmt.Errorf("%d bytes are not what was sent: %v", size, err)
					return
				}
			}
			wrong <- nil
		}()
	}
	for range callers {
		if err := <-wrong; err != nil {
			t.Error(err)
		}
	}
}

// A part of a response must not look like the whole of it, packed or not: nothing of it
// is out when the handler panics.
func TestCompressPanic(t *testing.T) {
	t.Parallel()
	for _, accept := range []string{"gzip", ""} {
		t.Run("Accept-Encoding "+accept, func(t *testing.T) {
			t.Parallel()
			checkLeaks(t)
			server := httptest.NewServer(underObserve(recoverPanics(slog.New(slog.DiscardHandler), compress(http.HandlerFunc(
				func(w http.ResponseWriter, r *http.Request) {
					w.Header().Set("Content-Length", "100000")
					w.Write(pattern(50_000))
					panic("midway")
				})))))
			defer server.Close()
			a := (&service{t: t, url: server.URL}).call("GET", "/", "", "Accept-Encoding: "+accept)
			wantError(t, a, 500, kindInternal.message)
			if a.header.Get("Content-Encoding") != "" {
				t.Errorf("Content-Encoding %q", a.header.Get("Content-Encoding"))
			}
		})
	}
}

// The list is what gets long in this service; a user has an ETag.
func TestCompressTheAPI(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for i := range 10 {
		a := s.call("POST", "/api/v1/users", fmt.Sprintf(`{"email":"user%d@example.com","name":"%s"}`, i, strings.Repeat("é", 255)))
		if a.status != 200 {
			t.Fatalf("%d %s", a.status, a.body)
		}
	}
	plain := s.call("GET", "/api/v1/users", "")
	if plain.header.Get("Content-Encoding") != "" || !slices.Contains(plain.header.Values("Vary"), "Accept-Encoding") {
		t.Errorf("the bare list: Content-Encoding %q, Vary %q", plain.header.Get("Content-Encoding"), plain.header.Values("Vary"))
	}
	id := plain.users(t)[0]["id"]
	small := s.call("GET", "/api/v1/users?limit=1", "", "Accept-Encoding: gzip")
	if small.header.Get("Content-Encoding") != "" || len(small.users(t)) != 1 {
		t.Errorf("a list of one user: Content-Encoding %q, %s", small.header.Get("Content-Encoding"), small.body)
	}

	packed := s.call("GET", "/api/v1/users", "", "Accept-Encoding: gzip")
	if packed.header.Get("Content-Encoding") != "gzip" || gunzip(packed.body) != plain.body {
		t.Errorf("the list: Content-Encoding %q, %d bytes", packed.header.Get("Content-Encoding"), len(packed.body))
	}
	if packed.header.Get("Content-Type") != "application/json" || packed.header.Get("X-Content-Type-Options") != "nosniff" {
		t.Errorf("the list lost its header: %v", packed.header)
	}
	head := s.call("HEAD", "/api/v1/users", "", "Accept-Encoding: gzip")
	if head.header.Get("Content-Encoding") != "gzip" || head.body != "" {
		t.Errorf("HEAD of the list: Content-Encoding %q, body %q", head.header.Get("Content-Encoding"), head.body)
	}
	logged := findLine(t, s, func(line map[string]any) bool {
		return line["request_id"] == packed.header.Get("X-Request-Id")
	})
	if logged["bytes"] != float64(len(packed.body)) {
		t.Errorf("the log counts %v bytes; want the %d that were sent", logged["bytes"], len(packed.body))
	}

	one := s.call("GET", "/api/v1/users/"+id, "", "Accept-Encoding: gzip")
	if one.header.Get("Content-Encoding") != "" || one.header.Get("ETag") == "" || one.user(t)["id"] != id {
		t.Errorf("one user: Content-Encoding %q, ETag %q", one.header.Get("Content-Encoding"), one.header.Get("ETag"))
	}
}
