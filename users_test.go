package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"net/http"
	"net/url"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// The API as its callers see it, on a real PostgreSQL.

// The original's two integration tests.

func TestOriginalHealthCheck(t *testing.T) {
	t.Parallel()
	s := newService(t)
	resp, err := http.Get(s.url + "/health")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	if resp.StatusCode != http.StatusOK || string(body) != "OK" {
		t.Errorf("GET /health: %d %q, want 200 OK", resp.StatusCode, body)
	}
}

func TestOriginalCreateUser(t *testing.T) {
	t.Parallel()
	s := newService(t)
	resp, err := http.Post(s.url+"/api/v1/users", "application/json",
		strings.NewReader(`{"email":"test@example.com","name":"Test User"}`))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("POST: %d, want 200", resp.StatusCode)
	}
	var created struct{ Email, Name string }
	if err := json.NewDecoder(resp.Body).Decode(&created); err != nil {
		t.Fatal(err)
	}
	if created.Email != "test@example.com" || created.Name != "Test User" {
		t.Errorf("created %+v", created)
	}
}

const noSuchID = "00000000-0000-4000-8000-000000000000"

// errorBody is the one form of an error.
func errorBody(status int, message string) string {
	return fmt.Sprintf(`{"error":{"message":%s,"code":%d}}`, appendJSONString(nil, message), status)
}

func wantError(t *testing.T, a answer, status int, message string) {
	t.Helper()
	if want := errorBody(status, message); a.status != status || a.body != want {
		t.Errorf("got %d %s\nwant %d %s", a.status, a.body, status, want)
	}
	if got := a.header.Get("Content-Type"); got != "application/json" {
		t.Errorf("Content-Type of an error: %q", got)
	}
}

// createUser creates a user and returns its answer.
func createUser(s *service, email string) answer {
	s.t.Helper()
	a := s.call("POST", usersPath, fmt.Sprintf(`{"email":%q,"name":"Test"}`, email))
	if a.status != 200 {
		s.t.Fatalf("create %s: %d %s", email, a.status, a.body)
	}
	return a
}

var userForm = regexp.MustCompile(`^\{"id":"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",` +
	`"email":"[^"]*","name":".*","created_at":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z","updated_at":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"\}$`)

func TestCreate(t *testing.T) {
	t.Parallel()
	s := newService(t)
	a := s.call("POST", usersPath, `{"email":"Ada@Example.com","name":" Ada <b>&\"\u00e9\n","admin":true}`)
	u := a.user(t)
	if !userForm.MatchString(a.body) {
		t.Errorf("form of a user: %s", a.body)
	}
	if u["email"] != "Ada@Example.com" || u["name"] != " Ada <b>&\"é\n" {
		t.Errorf("not stored as given: %s", a.body)
	}
	if !strings.Contains(a.body, `<b>&`) {
		t.Errorf("<, > and & are escaped: %s", a.body)
	}
	if u["created_at"] != u["updated_at"] {
		t.Errorf("a new user was updated: %s", a.body)
	}
	if got := a.header.Get("Location"); got != usersPath+"/"+u["id"] {
		t.Errorf("Location: %q", got)
	}
	got := s.call("GET", a.header.Get("Location"), "")
	if got.body != a.body || got.header.Get("ETag") != a.header.Get("ETag") || got.header.Get("ETag") == "" {
		t.Errorf("GET answers %s %s\nPOST answered %s %s", got.header.Get("ETag"), got.body, a.header.Get("ETag"), a.body)
	}
}

// badBodies are what create and update refuse alike.
var badBodies = []struct {
	name, body string
	fields     []string
	status     int
	message    string
}{
	{"no body", "", nil, 415, "Content-Type must be application/json"},
	{"form", "email=a", []string{"Content-Type: application/x-www-form-urlencoded"}, 415, "Content-Type must be application/json"},
	{"no type", `{}`, []string{"Content-Type:"}, 415, "Content-Type must be application/json"},
	{"coded", `{}`, []string{"Content-Encoding: gzip"}, 415, "Content-Encoding is not supported"},
	{"empty", "", []string{"Content-Type: application/json"}, 400, "The body is empty: a JSON object is expected"},
	{"syntax", `{"email":}`, nil, 400, "Malformed JSON at byte 10: invalid character '}' looking for beginning of value"},
	{"trailing data", `{} {}`, nil, 400, "Malformed JSON at byte 4: invalid character '{' after top-level value"},
	{"not UTF-8", "{\"name\":\"\xff\"}", nil, 400, "Malformed JSON at byte 10: the text is not UTF-8"},
	{"lone surrogate", `{"name":"\ud800"}`, nil, 400, "Malformed JSON at byte 10: a surrogate without its other half"},
	{"too deep", `{"x":` + strings.Repeat("[", 20000) + strings.Repeat("]", 20000) + `}`, nil, 400, "Malformed JSON at byte 10005: invalid character '[' exceeded max depth"},
	{"null", "null", nil, 422, "A JSON object is expected"},
	{"array", "[]", nil, 422, "A JSON object is expected"},
	{"string", `"x"`, nil, 422, "A JSON object is expected"},
	{"email of another type", `{"email":1,"name":"x"}`, nil, 422, "email must be a string"},
	{"name of another type", `{"email":"a@example.com","name":["x"]}`, nil, 422, "name must be a string"},
	{"email twice", `{"email":"a@example.com","name":"x","email":"b@example.com"}`, nil, 422, "email is given twice"},
	{"name twice, escaped", `{"email":"a@example.com","name":"x","n\u0061me":null}`, nil, 422, "name is given twice"},
	{"email empty", `{"email":"","name":"x"}`, nil, 400, "Validation error: Invalid email address"},
	{"email no address", `{"email":"nobody","name":"x"}`, nil, 400, "Validation error: Invalid email address"},
	{"email with display name", `{"email":"A <a@example.com>","name":"x"}`, nil, 400, "Validation error: Invalid email address"},
	{"email with spaces", `{"email":" a@example.com","name":"x"}`, nil, 400, "Validation error: Invalid email address"},
	{"email with NUL", `{"email":"a\u0000@example.com","name":"x"}`, nil, 400, "Validation error: Invalid email address"},
	{"email of 255 bytes", `{"email":"` + strings.Repeat("a", 243) + `@example.com","name":"x"}`, nil, 400, "Validation error: Invalid email address"},
	{"name blank", `{"email":"a@example.com","name":" \t\u00a0"}`, nil, 400, "Validation error: Name cannot be empty"},
	{"name of 256 characters", `{"email":"a@example.com","name":"` + strings.Repeat("é", 256) + `"}`, nil, 400, "Validation error: Name cannot be longer than 255 characters"},
	{"name with NUL", `{"email":"a@example.com","name":"a\u0000"}`, nil, 400, "Validation error: Name cannot contain a NUL character"},
	{"too large", `{"x":"` + strings.Repeat("x", 1<<16) + `"}`, nil, 413, "The body is larger than 65536 bytes"},
}

func TestCreateErrors(t *testing.T) {
	t.Parallel()
	s := newService(t)
	createUser(s, "taken@example.com")
	for _, test := range badBodies {
		t.Run(test.name, func(t *testing.T) {
			wantError(t, s.call("POST", usersPath, test.body, test.fields...), test.status, test.message)
		})
	}
	for _, test := range []struct {
		name, body string
		status     int
		message    string
	}{
		{"email missing", `{"name":"x"}`, 422, "Missing field: email"},
		{"name missing", `{"email":"a@example.com"}`, 422, "Missing field: name"},
		{"email null", `{"email":null,"name":"x"}`, 422, "Missing field: email"},
		{"names are exact", `{"EMAIL":"a@example.com","name":"x"}`, 422, "Missing field: email"},
		{"email taken", `{"email":"taken@example.com","name":"x"}`, 409, "Email already in use"},
		{"email taken, letter case ignored", `{"email":"TAKEN@example.COM","name":"x"}`, 409, "Email already in use"},
	} {
		t.Run(test.name, func(t *testing.T) {
			wantError(t, s.call("POST", usersPath, test.body), test.status, test.message)
		})
	}
	if n := len(s.call("GET", usersPath, "").users(t)); n != 1 {
		t.Errorf("%d users after only refused creates, want the 1 from before", n)
	}
}

func TestCreateBorders(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for _, test := range []struct{ name, body, contentType string }{
		{"email of 254 bytes", `{"email":"` + strings.Repeat("a", 242) + `@example.com","name":"x"}`, "application/json"},
		{"name of 255 characters", `{"email":"b@example.com","name":"` + strings.Repeat("😀", 255) + `"}`, "application/json; charset=utf-8"},
		{"surrogate pair", `{"email":"c@example.com","name":"\ud83d\ude00"}`, "application/merge-patch+json"},
		{"white space", " \n{ \"email\" : \"d@example.com\" , \"name\" : \"x\" }\t", "Application/JSON"},
		{"unknown twice", `{"x":1,"email":"e@example.com","x":{"email":0},"name":"x"}`, "application/json"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s.call("POST", usersPath, test.body, "Content-Type: "+test.contentType).user(t)
		})
	}
}

func TestGet(t *testing.T) {
	t.Parallel()
	s := newService(t)
	a := createUser(s, "a@example.com")
	path, tag := a.header.Get("Location"), a.header.Get("ETag")
	if got := s.call("GET", usersPath+"/"+strings.ToUpper(path[len(usersPath)+1:]), ""); got.body != a.body {
		t.Errorf("id in upper case: %d %s", got.status, got.body)
	}
	head := s.call("HEAD", path, "")
	if head.status != 200 || head.body != "" || head.header.Get("ETag") != tag || head.header.Get("Content-Length") != fmt.Sprint(len(a.body)) {
		t.Errorf("HEAD: %d %q %v", head.status, head.body, head.header)
	}
	for _, test := range []struct {
		name, field string
		status      int
	}{
		{"the version that it is", "If-None-Match: " + tag, 304},
		{"weak comparison", "If-None-Match: W/" + tag, 304},
		{"one of several", `If-None-Match: "x", ` + tag, 304},
		{"any", "If-None-Match: *", 304},
		{"another", `If-None-Match: "1"`, 200},
		{"a star within a tag", `If-None-Match: "a,*,b"`, 200},
		{"a star within a weak tag", `If-None-Match: W/"a,*,b"`, 200},
		{"a star as a tag", `If-None-Match: "*"`, 200},
		{"a star in a list", `If-None-Match: "x",*`, 200},
		{"a tag beside what is none", "If-None-Match: " + tag + ", 1", 200},
		{"a tag behind one with a comma", `If-None-Match: "a,b", W/` + tag, 304},
		{"not a tag", "If-None-Match: " + strings.Trim(tag, `"`), 200},
		{"If-Match, the version that it is", "If-Match: " + tag, 200},
		{"If-Match, another", `If-Match: "1"`, 412},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := s.call("GET", path, "", test.field)
			if got.status != test.status {
				t.Errorf("got %d %s, want %d", got.status, got.body, test.status)
			}
			if got.status == 304 && (got.body != "" || got.header.Get("ETag") != tag) {
				t.Errorf("304 with %q and ETag %q", got.body, got.header.Get("ETag"))
			}
		})
	}
	wantError(t, s.call("GET", usersPath+"/"+noSuchID, ""), 404, "Resource not found")
	wantError(t, s.call("GET", usersPath+"/"+noSuchID, "", "If-None-Match: *"), 404, "Resource not found")
	bare := path[len(usersPath)+1:]
	for _, id := range []string{strings.ReplaceAll(bare, "-", ""), "{" + bare + "}", "urn:uuid:" + bare} { // as the original
		if got := s.call("GET", usersPath+"/"+id, ""); got.body != a.body {
			t.Errorf("id %s: %d %s", id, got.status, got.body)
		}
	}
	for _, id := range []string{"1", noSuchID + "0", noSuchID[:35], noSuchID[:34] + "-0", "{" + noSuchID, strings.Replace(noSuchID, "0", "g", 1), strings.Replace(noSuchID, "-", "0", 1), "%00"} {
		wantError(t, s.call("GET", usersPath+"/"+id, ""), 400, "Validation error: id must be a UUID")
	}
}

func TestUpdate(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for _, method := range []string{"PUT", "PATCH"} {
		t.Run(method, func(t *testing.T) {
			before := createUser(s, strings.ToLower(method)+"@example.com")
			path := before.header.Get("Location")
			for _, test := range []struct{ name, body, email, userName string }{
				{"name", `{"name":"New"}`, before.user(t)["email"], "New"},
				{"email", `{"email":"new-` + before.user(t)["email"] + `"}`, "new-" + before.user(t)["email"], "New"},
				{"letter case of the own address", `{"email":"NEW-` + before.user(t)["email"] + `"}`, "NEW-" + before.user(t)["email"], "New"},
				{"null leaves as it is", `{"email":null,"name":"Newer"}`, "NEW-" + before.user(t)["email"], "Newer"},
				{"nothing", `{}`, "NEW-" + before.user(t)["email"], "Newer"},
			} {
				t.Run(test.name, func(t *testing.T) {
					old := s.call("GET", path, "")
					a := s.call(method, path, test.body)
					u, was := a.user(t), old.user(t)
					if u["email"] != test.email || u["name"] != test.userName {
						t.Errorf("got %s", a.body)
					}
					if u["id"] != was["id"] || u["created_at"] != was["created_at"] || u["updated_at"] <= was["updated_at"] {
						t.Errorf("before %s\nafter  %s", old.body, a.body)
					}
					if a.header.Get("ETag") == old.header.Get("ETag") {
						t.Errorf("ETag stays %s", a.header.Get("ETag"))
					}
					if got := s.call("GET", path, ""); got.body != a.body || got.header.Get("ETag") != a.header.Get("ETag") {
						t.Errorf("GET answers %s", got.body)
					}
				})
			}
			back := s.call(method, path, before.body) // a client may PUT back what it got
			if u, was := back.user(t), before.user(t); u["email"] != was["email"] || u["name"] != was["name"] || u["id"] != was["id"] {
				t.Errorf("put back %s\ngot %s", before.body, back.body)
			}
		})
	}
}

func TestUpdateErrors(t *testing.T) {
	t.Parallel()
	s := newService(t)
	createUser(s, "taken@example.com")
	before := createUser(s, "mine@example.com")
	path := before.header.Get("Location")
	for _, test := range badBodies {
		t.Run(test.name, func(t *testing.T) {
			wantError(t, s.call("PUT", path, test.body, test.fields...), test.status, test.message)
		})
	}
	wantError(t, s.call("PUT", path, `{"email":"Taken@Example.com"}`), 409, "Email already in use")
	wantError(t, s.call("PATCH", usersPath+"/"+noSuchID, `{"name":"x"}`), 404, "Resource not found")
	wantError(t, s.call("PATCH", usersPath+"/"+noSuchID, `{"name":"x"}`, "If-Match: *"), 404, "Resource not found")
	wantError(t, s.call("PUT", usersPath+"/x", `{"name":"x"}`), 400, "Validation error: id must be a UUID")
	if got := s.call("GET", path, ""); got.body != before.body {
		t.Errorf("changed by refused updates:\nbefore %s\nafter  %s", before.body, got.body)
	}
}

func TestConditionalWrites(t *testing.T) {
	t.Parallel()
	s := newService(t)
	const stale = "The user is not in the version that the precondition asks for"
	for i, test := range []struct {
		name   string
		fields []string // %s: the tag of the user
		ok     bool
	}{
		{"no condition", nil, true},
		{"the version that it is", []string{"If-Match: %s"}, true},
		{"one of several", []string{`If-Match: "1", "a,b", %s`}, true},
		{"in a second field", []string{`If-Match: "1"`, "If-Match: %s"}, true},
		{"any", []string{"If-Match: *"}, true},
		{"another version", []string{`If-Match: "1"`}, false},
		{"a weak tag", []string{"If-Match: W/%s"}, false},
		{"not a tag", []string{"If-Match: 1"}, false},
		{"an empty tag", []string{`If-Match: ""`}, false},
		{"an empty field", []string{"If-Match: ,"}, false},
		{"empty elements", []string{"If-Match: ,\t%s ,,"}, true},
		{"behind a tag with a comma and a star", []string{`If-Match: "a,*,b",%s`}, true},
		{"beyond ASCII", []string{`If-Match: "é" , %s`}, true},
		{"a star within a tag", []string{`If-Match: "a,*,b"`}, false},
		{"a star within a weak tag", []string{`If-Match: W/"a,*,b"`}, false},
		{"a star as a tag", []string{`If-Match: "*"`}, false},
		{"a star in a list", []string{`If-Match: "x",*`}, false},
		{"a star in a field of two", []string{"If-Match: *", `If-Match: "x"`}, false},
		{"two stars", []string{"If-Match: *", "If-Match: *"}, false},
		{"a tag beside what is none", []string{"If-Match: %s, 1"}, false},
		{"a tag beside a tag with a space", []string{`If-Match: "a b", %s`}, false},
		{"two tags without a comma", []string{"If-Match: %s %s"}, false},
		{"a tag that does not end", []string{`If-Match: %s, "1`}, false},
		{"a tag over two fields", []string{`If-Match: "a`, `If-Match: b", %s`}, false},
		{"w/ in lower case", []string{"If-Match: w/%s, %s"}, false},
		{"If-None-Match, a star within a tag", []string{`If-None-Match: "a,*,b"`}, true},
		{"If-None-Match, a star in a list", []string{`If-None-Match: "x",*`}, true},
		{"If-None-Match, a star in a field of two", []string{"If-None-Match: *", `If-None-Match: "x"`}, true},
		{"If-None-Match, any", []string{"If-None-Match: *"}, false},
		{"If-None-Match, the version that it is", []string{"If-None-Match: W/%s"}, false},
		{"If-None-Match, another", []string{`If-None-Match: "1"`}, true},
	} {
		for _, method := range []string{"PUT", "PATCH", "DELETE"} {
			t.Run(method+" "+test.name, func(t *testing.T) {
				before := createUser(s, fmt.Sprintf("%d-%s@example.com", i, method))
				path := before.header.Get("Location")
				var fields []string
				for _, f := range test.fields {
					fields = append(fields, strings.ReplaceAll(f, "%s", before.header.Get("ETag")))
				}
				body := `{"name":"x"}`
				if method == "DELETE" {
					body = ""
				}
				a := s.call(method, path, body, fields...)
				after := s.call("GET", path, "")
				switch {
				case !test.ok:
					wantError(t, a, 412, stale)
					if after.body != before.body {
						t.Errorf("refused, and yet now %s", after.body)
					}
				case a.status != 200:
					t.Errorf("got %d %s", a.status, a.body)
				case method == "DELETE" && (a.body != "" || after.status != 404):
					t.Errorf("answered %q, and now %d", a.body, after.status)
				}
			})
		}
	}
}

func TestDelete(t *testing.T) {
	t.Parallel()
	s := newService(t)
	a := createUser(s, "a@example.com")
	path := a.header.Get("Location")
	if got := s.call("DELETE", path, ""); got.status != 200 || got.body != "" || got.header.Get("Content-Length") != "0" {
		t.Errorf("DELETE: %d %q", got.status, got.body)
	}
	wantError(t, s.call("DELETE", path, ""), 404, "Resource not found")
	wantError(t, s.call("DELETE", path, "", "If-Match: *"), 404, "Resource not found")
	wantError(t, s.call("GET", path, ""), 404, "Resource not found")
	wantError(t, s.call("DELETE", usersPath+"/x", ""), 400, "Validation error: id must be a UUID")
	createUser(s, "A@example.com") // the address is free again
}

func TestListQuery(t *testing.T) {
	t.Parallel()
	s := newService(t)
	var newest []string
	for i := range 30 {
		newest = append([]string{createUser(s, fmt.Sprintf("u%02d@example.com", i)).user(t)["id"]}, newest...)
	}
	cursor := regexp.MustCompile(`cursor=([^>&]*)`).FindStringSubmatch(s.call("GET", usersPath+"?limit=10", "").header.Get("Link"))[1]
	for _, test := range []struct {
		query string
		want  []string
		next  bool
	}{
		{"", newest[:20], true},
		{"?limit=30", newest, false},
		{"?limit=29", newest[:29], true},
		{"?limit=1000", newest, false},
		{"?limit=0", nil, false},
		{"?offset=25", newest[25:], false},
		{"?limit=5&offset=20", newest[20:25], true},
		{"?limit=5&offset=25", newest[25:], false},
		{"?offset=30", nil, false},
		{"?offset=4611686018427387904", nil, false},
		{"?cursor=" + cursor, newest[10:], false},
		{"?limit=3&cursor=" + cursor, newest[10:13], true},
		{"?email=u07@example.com", newest[22:23], false},
		{"?email=U07%40EXAMPLE.com&limit=5&offset=0", newest[22:23], false},
		{"?email=u07@example.com&limit=0", nil, false},
		{"?email=u07@example.com&offset=1", nil, false},
		{"?email=nobody@example.com", nil, false},
		{"?email=%25", nil, false},
		{"?unknown=1&unknown=2", newest[:20], true},
		{"?q=100%&limit=1", newest[:1], true},
		{"?q=a;b&%=x&limit=1&utm;limit=7", newest[:1], true},
		{"?&=&;&limi%zz=9&li%6Dit=1", newest[:1], true},
	} {
		t.Run(test.query, func(t *testing.T) {
			a := s.call("GET", usersPath+test.query, "")
			var got []string
			for _, u := range a.users(t) {
				got = append(got, u["id"])
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("got %d users, want %d:\n%v\n%v", len(got), len(test.want), got, test.want)
			}
			if next := strings.HasSuffix(a.header.Get("Link"), `>; rel="next"`); next != test.next {
				t.Errorf("Link: %q", a.header.Get("Link"))
			}
		})
	}
	damaged := "A" + cursor[1:]
	if damaged == cursor {
		damaged = "B" + cursor[1:]
	}
	for _, test := range []struct{ query, message string }{
		{"limit=", "limit must be a number from 0 to 1000"},
		{"limit=-1", "limit must be a number from 0 to 1000"},
		{"limit=%2B1", "limit must be a number from 0 to 1000"},
		{"limit=1001", "limit must be a number from 0 to 1000"},
		{"limit=99999999999999999999", "limit must be a number from 0 to 1000"},
		{"limit=ten", "limit must be a number from 0 to 1000"},
		{"limit=1&limit=2", "limit is given twice"},
		{"offset=", "offset must be a number from 0 to 4611686018427387904"},
		{"offset=-1", "offset must be a number from 0 to 4611686018427387904"},
		{"offset=9223372036854775808", "offset must be a number from 0 to 4611686018427387904"},
		{"email=", "email must be an address to look for"},
		{"email=%00", "email must be an address to look for"},
		{"email=%ff", "email must be an address to look for"},
		{"email=" + strings.Repeat("a", 1021), "email must be an address to look for"},
		{"email=a&email=b", "email is given twice"},
		{"cursor=", "cursor is damaged: follow the Link of the page before as it is"},
		{"cursor=x", "cursor is damaged: follow the Link of the page before as it is"},
		{"cursor=" + damaged, "cursor is damaged: follow the Link of the page before as it is"},
		{"cursor=" + cursor + "&offset=0", "cursor goes with neither offset nor email"},
		{"cursor=" + cursor + "&email=a", "cursor goes with neither offset nor email"},
		{"limit=%zz", "limit must be a number from 0 to 1000"},
		{"li%6dit=%zz", "limit must be a number from 0 to 1000"},
		{"limit=1;offset=1", "limit must be a number from 0 to 1000"},
		{"email=a%", "email must be an address to look for"},
		{"limit=1&limit=%", "limit must be a number from 0 to 1000"},
	} {
		t.Run(test.query, func(t *testing.T) {
			wantError(t, s.call("GET", usersPath+"?"+test.query, ""), 400, "Validation error: "+test.message)
		})
	}
	if head := s.call("HEAD", usersPath+"?limit=1", ""); head.status != 200 || head.body != "" || head.header.Get("Link") == "" {
		t.Errorf("HEAD: %d %q %v", head.status, head.body, head.header)
	}
	empty := newService(t)
	if a := empty.call("GET", usersPath, ""); a.body != "[]" || a.status != 200 {
		t.Errorf("no users: %d %s", a.status, a.body)
	}
}

// Users by their ids: in the order asked, each once.
func TestListByIDs(t *testing.T) {
	t.Parallel()
	s := newService(t, withAuth...)
	alice := bearer("alice")
	mustExec(t, s.db, `INSERT INTO users (id, email, name) SELECT gen_random_uuid(), 'u' || i || '@example.com', 'x' FROM generate_series(1, 1000) i`)
	all := s.call("GET", usersPath+"?limit=1000", "", alice).users(t)
	if len(all) != 1000 {
		t.Fatalf("%d users", len(all))
	}
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	ids := make([]string, len(all))
	for i, u := range all {
		ids[i] = u["id"]
	}
	bare := strings.ReplaceAll(ids[2], "-", "")
	for _, test := range []struct {
		name, query string
		want        []map[string]string
	}{
		{"one", "id=" + ids[0], all[:1]},
		{"in the order asked", "id=" + ids[2] + "&id=" + ids[0] + "&id=" + ids[1], []map[string]string{all[2], all[0], all[1]}},
		{"nobody", "id=" + noSuchID, nil},
		{"nobody among others", "id=" + ids[1] + "&id=" + noSuchID + "&id=" + ids[0], []map[string]string{all[1], all[0]}},
		{"twice: at its first place", "id=" + ids[1] + "&id=" + ids[0] + "&id=" + strings.ToUpper(ids[1]), []map[string]string{all[1], all[0]}},
		{"other forms of a UUID", "id=" + bare + "&%69d=%7B" + ids[0] + "%7D&id=urn:uuid:" + strings.ToUpper(ids[1]), []map[string]string{all[2], all[0], all[1]}},
		{"beside what is none of ours", "utm=%zz&id=" + ids[0] + "&;&page=2", all[:1]},
		{"a thousand", "id=" + strings.Join(ids, "&id="), all},
		{"a thousand times one", strings.Repeat("id="+ids[3]+"&", 1000), all[3:4]},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			a := s.call("GET", usersPath+"?"+test.query, "", alice)
			if got := a.users(t); !slices.EqualFunc(got, test.want, maps.Equal) {
				t.Errorf("got %d users, want %d: %.500s", len(got), len(test.want), a.body)
			}
			if link := a.header["Link"]; link != nil {
				t.Errorf("Link: %q", link)
			}
			head := s.call("HEAD", usersPath+"?"+test.query, "", alice)
			if head.status != 200 || head.body != "" || head.header.Get("Content-Length") != fmt.Sprint(len(a.body)) || head.header["Link"] != nil {
				t.Errorf("HEAD: %d %q %v", head.status, head.body, head.header)
			}
		})
	}
	for _, test := range []struct{ name, query, message string }{
		{"empty", "id=", "id must be a UUID"},
		{"no value", "id", "id must be a UUID"},
		{"no UUID", "id=" + ids[0] + "&id=1", "id must be a UUID"},
		{"a list in one", "id=" + ids[0] + "," + ids[1], "id must be a UUID"},
		{"malformed", "id=%zz", "id must be a UUID"},
		{"with a semicolon", "id=" + ids[0] + ";id=" + ids[1], "id must be a UUID"},
		{"with limit", "id=" + ids[0] + "&limit=1", "id goes with no other parameter"},
		{"with offset", "offset=0&id=" + ids[0], "id goes with no other parameter"},
		{"with email", "id=" + ids[0] + "&email=a@example.com&id=" + ids[1], "id goes with no other parameter"},
		{"with cursor", "id=" + ids[0] + "&cursor=" + position{time.Now(), ids[0]}.cursor(), "id goes with no other parameter"},
		{"more than a thousand", "id=" + bare + strings.Repeat("&id="+bare, 1000), "id may be given 1000 times at most"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			wantError(t, s.call("GET", usersPath+"?"+test.query, "", alice), 400, "Validation error: "+test.message)
		})
	}
	// On a new connection net/http counts the whole head, with a token that is as long as may be.
	filler := "X-Filler: " + strings.Repeat("x", maxTokenBytes)
	a := sendRaw(t, s, "GET "+usersPath+"?id="+strings.Join(ids, "&id=")+" HTTP/1.1\r\nHost: x\r\n"+alice+"\r\n"+filler+"\r\n\r\n")
	if n := len(a.users(t)); n != 1000 {
		t.Errorf("on a new connection: %d users", n)
	}
}

// A list by ids sees what was changed before it, though it may share its statement.
func TestListByIDsSeesWrites(t *testing.T) {
	t.Parallel()
	s := newService(t)
	var clients sync.WaitGroup
	for i := range 8 {
		clients.Go(func() {
			path := ""
			for j := range 20 {
				method, target, body := "POST", usersPath, fmt.Sprintf(`{"email":"a%d@example.com","name":"0"}`, i)
				if j > 0 {
					method, target, body = "PATCH", path, fmt.Sprintf(`{"name":"%d"}`, j)
				}
				a, err := s.try(method, target, body)
				if err != nil || a.status != 200 {
					t.Errorf("%s: %v %v", method, a, err)
					return
				}
				id := a.user(t)["id"]
				path = usersPath + "/" + id
				got, err := s.try("GET", usersPath+"?id="+noSuchID+"&id="+id, "")
				if want := "[" + a.body + "]"; err != nil || got.body != want {
					t.Errorf("got %s, %v\nwant %s", got.body, err, want)
				}
			}
		})
	}
	clients.Wait()
}

// While others insert, a walk by Link sees each user of its beginning once.
func TestPagingWhileInserting(t *testing.T) {
	t.Parallel()
	s := newService(t)
	const rows = 1000
	// Many share their created_at, so that the id has to decide.
	mustExec(t, s.db, `INSERT INTO users (id, email, name, created_at)
		SELECT gen_random_uuid(), 'u' || i || '@example.com', 'x', timestamptz '2024-01-01Z' + i / 50 * interval '1 microsecond'
		FROM generate_series(1, $1) i`, rows)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for worker := range 4 {
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				if a, err := s.try("POST", usersPath, fmt.Sprintf(`{"email":"new-%d-%d@example.com","name":"x"}`, worker, i)); err != nil || a.status != 200 {
					t.Errorf("create: %v %v", a, err)
					return
				}
			}
		})
	}
	seen := make(map[string]int)
	path := usersPath + "?limit=17"
	for pages := 0; path != ""; pages++ {
		if pages > rows {
			t.Fatal("no end")
		}
		a := s.call("GET", path, "")
		for _, u := range a.users(t) {
			seen[u["email"]]++
		}
		path, _, _ = strings.Cut(strings.TrimPrefix(a.header.Get("Link"), "<"), ">")
	}
	close(stop)
	wg.Wait()
	for i := range rows {
		if n := seen[fmt.Sprintf("u%d@example.com", i+1)]; n != 1 {
			t.Fatalf("u%d was seen %d times", i+1, n)
		}
	}
	for email, n := range seen {
		if n != 1 {
			t.Errorf("%s was seen %d times", email, n)
		}
	}
}

// Of all who create one address at once, one wins.
func TestConcurrentCreates(t *testing.T) {
	t.Parallel()
	s := newService(t)
	statuses := make([]int, 100)
	var wg sync.WaitGroup
	for i := range statuses {
		wg.Go(func() {
			email := []byte("same@example.com")
			if i%2 == 0 {
				email = bytes.ToUpper(email)
			}
			a, err := s.try("POST", usersPath, fmt.Sprintf(`{"email":"%s","name":"x"}`, email))
			if err != nil {
				t.Error(err)
			}
			statuses[i] = a.status
		})
	}
	wg.Wait()
	slices.Sort(statuses)
	if statuses[0] != 200 || statuses[1] != 409 || statuses[99] != 409 {
		t.Errorf("statuses: %v", statuses)
	}
	if n := len(s.call("GET", usersPath, "").users(t)); n != 1 {
		t.Errorf("%d users", n)
	}
}

// With If-Match, none of 50 concurrent read-change-write rounds is lost.
func TestConcurrentConditionalUpdates(t *testing.T) {
	t.Parallel()
	s := newService(t)
	a := s.call("POST", usersPath, `{"email":"counter@example.com","name":"0"}`)
	path := a.header.Get("Location")
	tags := sync.Map{}
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			for {
				got, err := s.try("GET", path, "")
				if err != nil || got.status != 200 {
					t.Errorf("GET: %v %v", got, err)
					return
				}
				var n int
				fmt.Sscan(got.user(t)["name"], &n)
				put, err := s.try("PUT", path, fmt.Sprintf(`{"name":"%d"}`, n+1), "If-Match: "+got.header.Get("ETag"))
				if err != nil {
					t.Error(err)
					return
				}
				switch put.status {
				case 200:
					if _, twice := tags.LoadOrStore(put.header.Get("ETag"), true); twice {
						t.Errorf("ETag %s for two versions", put.header.Get("ETag"))
					}
					return
				case 412:
				default:
					t.Errorf("PUT: %d %s", put.status, put.body)
					return
				}
			}
		})
	}
	wg.Wait()
	if name := s.call("GET", path, "").user(t)["name"]; name != "50" {
		t.Errorf("50 updates, and the name is %q", name)
	}
}

// updated_at moves on even from a time that the clock has not reached.
func TestVersionMovesForward(t *testing.T) {
	t.Parallel()
	s := newService(t)
	path := createUser(s, "a@example.com").header.Get("Location")
	mustExec(t, s.db, "UPDATE users SET updated_at = now() + interval '1 hour'")
	last := s.call("GET", path, "").user(t)["updated_at"]
	for range 3 {
		next := s.call("PUT", path, `{"name":"x"}`).user(t)["updated_at"]
		if next <= last {
			t.Errorf("%s comes after %s", next, last)
		}
		last = next
	}
}

// Times that RFC 3339 can't spell are in the database and go out as the nearest that
// it can. They hide no other row, in pages of no size, and can be changed.
func TestOddTimes(t *testing.T) {
	t.Parallel()
	const first, last = "0001-01-01T00:00:00.000000Z", "9999-12-31T23:59:59.999999Z"
	odd := []struct{ stored, want string }{
		{"infinity", last},
		{"294276-12-31 23:59:59.999999Z", last},
		{"294247-01-10 04:00:54.775808Z", last}, // 2^63 microseconds after 1970
		{"10000-01-01 00:00:00Z", last},
		{"9999-12-31 23:59:59.999999Z", last},
		{"9999-12-31 23:59:59.999998Z", "9999-12-31T23:59:59.999998Z"},
		{"2024-02-29 12:00:00.000001Z", "2024-02-29T12:00:00.000001Z"},
		{"0001-01-01 00:00:00Z", first},
		{"0001-12-31 23:59:59.999999Z BC", first},
		{"0001-02-29 12:00:00Z BC", first},
		{"0005-02-29 12:00:00.000001Z BC", first},
		{"4714-11-24 00:00:00Z BC", first},
		{"-infinity", first},
	}
	for _, settings := range []string{"", " TimeZone=America/New_York", " TimeZone=Asia/Tokyo binary_parameters=yes"} {
		t.Run(settings, func(t *testing.T) {
			t.Parallel()
			databaseURL, db := newSchema(t)
			s := startService(t, testEnv(databaseURL+settings))
			s.waitReady()
			var want []string
			for i, o := range odd {
				for j := range 3 { // newest first
					id := fmt.Sprintf("00000000-0000-4000-8000-0000000000%02x", 255-3*i-j)
					mustExec(t, db, "INSERT INTO users (id, email, name, created_at, updated_at) VALUES ($1, $2, 'x', $3, $3)", id, id+"@example.com", o.stored)
					want = append(want, id+" "+o.want+" "+o.want)
				}
			}
			for _, limit := range []int{1, 2, 4, 7, 1000} {
				var got []string
				for path := fmt.Sprintf("%s?limit=%d", usersPath, limit); path != "" && len(got) <= len(want); {
					a := s.call("GET", path, "")
					for _, u := range a.users(t) {
						got = append(got, u["id"]+" "+u["created_at"]+" "+u["updated_at"])
					}
					path, _, _ = strings.Cut(strings.TrimPrefix(a.header.Get("Link"), "<"), ">")
				}
				if !slices.Equal(got, want) {
					t.Errorf("limit=%d: got\n%s\nwant\n%s", limit, strings.Join(got, "\n"), strings.Join(want, "\n"))
				}
			}
			var wg sync.WaitGroup // so that some of the writes are one statement
			for _, row := range want {
				wg.Go(func() {
					path := usersPath + "/" + row[:36]
					read := s.call("GET", path, "")
					tags := []string{read.header.Get("ETag")}
					if again := s.call("GET", path, "", "If-None-Match: "+tags[0]); again.status != 304 {
						t.Errorf("%s: If-None-Match: %d", row, again.status)
					}
					wantError(t, s.call("PUT", path, `{"name":"y"}`, `If-Match: "1"`), 412, kindPrecondition.message)
					for i := range 3 {
						name := fmt.Sprintf("name %d", i)
						put := s.call("PUT", path, `{"name":"`+name+`"}`, "If-Match: "+tags[0])
						if put.user(t)["name"] != name || slices.Contains(tags, put.header.Get("ETag")) {
							t.Errorf("%s: PUT: %s with ETag %s after %v", row, put.body, put.header.Get("ETag"), tags)
						}
						if got := s.call("GET", path, ""); got.body != put.body || got.header.Get("ETag") != put.header.Get("ETag") {
							t.Errorf("%s: PUT %s\nGET %s", row, put.body, got.body)
						}
						wantError(t, s.call("DELETE", path, "", "If-Match: "+tags[0]), 412, kindPrecondition.message)
						tags = append([]string{put.header.Get("ETag")}, tags...)
					}
					if gone := s.call("DELETE", path, "", "If-Match: "+tags[0]); gone.status != 200 {
						t.Errorf("%s: DELETE: %d %s", row, gone.status, gone.body)
					}
				})
			}
			wg.Wait()
		})
	}
}

// A row without a name, or without an address, hides no others: a table that was
// taken over may allow it.
func TestRowsWithNull(t *testing.T) {
	t.Parallel()
	databaseURL, db := newSchema(t)
	mustExec(t, db, "CREATE TABLE users (id uuid PRIMARY KEY, email varchar(255), name varchar(255), created_at timestamptz, updated_at timestamptz)")
	mustExec(t, db, "INSERT INTO users VALUES ($1, NULL, NULL, now(), now())", noSuchID)
	s := startService(t, testEnv(databaseURL))
	s.waitReady()
	createUser(s, "a@example.com")
	if list := s.call("GET", usersPath, "").users(t); len(list) != 2 || list[1]["name"] != "" || list[1]["email"] != "" {
		t.Errorf("list: %v", list)
	}
	if u := s.call("PUT", usersPath+"/"+noSuchID, `{"name":"A"}`).user(t); u["name"] != "A" || u["email"] != "" {
		t.Errorf("PUT: %v", u)
	}
	mustExec(t, db, "ALTER TABLE users ALTER created_at DROP NOT NULL, ALTER updated_at DROP NOT NULL; UPDATE users SET created_at = NULL, updated_at = NULL")
	list := s.call("GET", usersPath, "").users(t)
	if len(list) != 2 {
		t.Errorf("without times: %v", list)
	}
	for _, u := range list {
		path := usersPath + "/" + u["id"]
		tag := s.call("GET", path, "").header.Get("ETag")
		put := s.call("PUT", path, `{"name":"B"}`, "If-Match: "+tag)
		if put.user(t)["name"] != "B" || put.header.Get("ETag") == tag {
			t.Errorf("PUT: %s", put.body)
		}
		if gone := s.call("DELETE", path, "", "If-Match: "+put.header.Get("ETag")); gone.status != 200 {
			t.Errorf("DELETE: %d %s", gone.status, gone.body)
		}
	}
}

func TestMethods(t *testing.T) {
	t.Parallel()
	s := newService(t)
	one := usersPath + "/" + noSuchID
	for _, test := range []struct{ path, allow string }{
		{"/health", "GET, HEAD, OPTIONS"},
		{"/health/ready", "GET, HEAD, OPTIONS"},
		{usersPath, "GET, HEAD, POST, OPTIONS"},
		{one, "GET, HEAD, PUT, PATCH, DELETE, OPTIONS"},
	} {
		for _, method := range []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"} {
			t.Run(method+" "+test.path, func(t *testing.T) {
				a := s.call(method, test.path, "")
				known := slices.Contains(strings.Split(test.allow, ", "), method)
				switch {
				case method == "OPTIONS" && (a.status != 204 || a.header.Get("Allow") != test.allow):
					t.Errorf("got %d, Allow %q", a.status, a.header.Get("Allow"))
				case known && a.status == 405:
					t.Error("got 405")
				case !known:
					if a.header.Get("Allow") != test.allow {
						t.Errorf("Allow: %q", a.header.Get("Allow"))
					}
					wantError(t, a, 405, "Method not allowed")
				}
			})
		}
	}
	for _, path := range []string{"/", "/healthz", "/health/", "/api", "/api/", "/api/v1", "/api/v1/users/", "/api/v2/users", one + "/x", "/favicon.ico"} {
		wantError(t, s.call("GET", path, ""), 404, "Resource not found")
	}
}

func TestProblemDetails(t *testing.T) {
	t.Parallel()
	s := newService(t)
	a := s.call("GET", usersPath+"/"+noSuchID, "", "Accept: application/problem+json, application/json;q=0.5")
	want := `{"type":"about:blank","title":"Not Found","status":404,"detail":"Resource not found"}`
	if a.status != 404 || a.body != want || a.header.Get("Content-Type") != "application/problem+json" || a.header.Get("Vary") != "Accept" {
		t.Errorf("got %d %s %v\nwant %s", a.status, a.body, a.header, want)
	}
	a = s.call("GET", usersPath+"/"+noSuchID, "", "Accept: */*, application/problem+json;q=0")
	wantError(t, a, 404, "Resource not found")
}

func TestGzipOfLists(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for range 20 {
		createUser(s, fmt.Sprintf("%d@example.com", rand.Uint64()))
	}
	plain := s.call("GET", usersPath, "")
	packed := s.call("GET", usersPath, "", "Accept-Encoding: gzip")
	if plain.header.Get("Content-Encoding") != "" || packed.header.Get("Content-Encoding") != "gzip" {
		t.Errorf("Content-Encoding: %q and %q", plain.header.Get("Content-Encoding"), packed.header.Get("Content-Encoding"))
	}
	if plain.header.Get("Vary") != "Accept-Encoding" || packed.header.Get("Vary") != "Accept-Encoding" {
		t.Errorf("Vary: %q and %q", plain.header.Get("Vary"), packed.header.Get("Vary"))
	}
	if len(packed.body) >= len(plain.body) {
		t.Errorf("%d bytes packed, %d plain", len(packed.body), len(plain.body))
	}
}

func TestAuthOfTheAPI(t *testing.T) {
	t.Parallel()
	const secret = "0123456789abcdef0123456789abcdef"
	s := newService(t, "AUTH=jwt", "JWT_SECRET="+secret, "JWT_AUDIENCE=rollcall")
	bearer := func(scope string) string {
		return "Authorization: Bearer " + mintToken([]byte(secret), grant{subject: "alice", scope: scope, audience: "rollcall", ttl: time.Minute}, time.Now())
	}
	for _, test := range []struct {
		name, method, path, body, token string
		status                          int
	}{
		{"no token", "GET", usersPath, "", "X: y", 401},
		{"no token, unknown route", "GET", "/api/x", "", "X: y", 401},
		{"no token, other method", "BREW", usersPath, "", "X: y", 401},
		{"token in the query", "GET", usersPath + "?access_token=x", "", "X: y", 401},
		{"read", "GET", usersPath, "", bearer("users:read"), 200},
		{"read, HEAD", "HEAD", usersPath, "", bearer("users:read"), 200},
		{"read, unknown route", "GET", "/api/x", "", bearer("users:read"), 404},
		{"read does not include write", "POST", usersPath, `{}`, bearer("users:read"), 403},
		{"write does not include read", "GET", usersPath, "", bearer("users:write"), 403},
		{"write", "POST", usersPath, `{"email":"a@example.com","name":"A"}`, bearer("users:write"), 200},
		{"no scope at all", "GET", usersPath, "", bearer(""), 200},
		{"health needs none", "GET", "/health", "", "X: y", 200},
		{"readiness needs none", "GET", "/health/ready", "", "X: y", 200},
	} {
		t.Run(test.name, func(t *testing.T) {
			a := s.call(test.method, test.path, test.body, test.token)
			if a.status != test.status {
				t.Errorf("got %d %s, want %d", a.status, a.body, test.status)
			}
			if challenge := a.header.Get("WWW-Authenticate"); (challenge != "") != (a.status == 401 || a.status == 403) {
				t.Errorf("WWW-Authenticate: %q", challenge)
			}
		})
	}
}

func FuzzCursor(f *testing.F) {
	p := position{time.UnixMicro(1700000000123456), noSuchID}
	f.Add(p.cursor())
	for _, at := range []time.Time{time.UnixMicro(-1), time.UnixMicro(math.MinInt64), time.UnixMicro(math.MaxInt64), minusInfinity, plusInfinity} {
		f.Add(position{at, noSuchID}.cursor())
	}
	f.Add("")
	f.Fuzz(func(t *testing.T, s string) {
		p, err := parseCursor(s)
		if err != nil {
			return
		}
		if back := p.cursor(); back != s {
			t.Errorf("%q and %q are the same position", s, back)
		}
		if at := timestamp(p.createdAt); !regexp.MustCompile(`^(-?infinity|\d{4,6}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}Z BC)$`).MatchString(at) {
			t.Errorf("%q is at %s", s, at)
		}
	})
}

// idListForm matches ids as they are put into an array of PostgreSQL.
var idListForm = regexp.MustCompile(`^([0-9a-f-]{36},)*[0-9a-f-]{36}$`)

func FuzzListQuery(f *testing.F) {
	f.Add("limit=10&offset=5")
	f.Add("email=a%40b&cursor=x")
	f.Add("limit=5&q=100%")
	f.Add("%;=a&li%6dit=1;&&=")
	f.Add("id=" + noSuchID + "&i%64=%7B" + noSuchID + "%7D&x=1")
	f.Add("id=" + noSuchID + "&limit=5&id=1")
	f.Fuzz(func(t *testing.T, query string) {
		q, err := parseListQuery(query)
		// net/url drops what is malformed, and reads the rest in the same way.
		values, malformed := url.ParseQuery(query)
		if again, err2 := parseListQuery(values.Encode()); err == nil && (err2 != nil || !reflect.DeepEqual(q, again)) {
			t.Errorf("%q: %+v, but as %q: %+v, %v", query, q, values.Encode(), again, err2)
		} else if err != nil && malformed == nil && err2 == nil {
			t.Errorf("%q: %v, but as %q it is %+v", query, err, values.Encode(), again)
		}
		if err == nil && q.ids != "" && (q != listQuery{limit: 1000, ids: q.ids} || !idListForm.MatchString(q.ids)) {
			t.Errorf("%q: %+v", query, q)
		}
		if err == nil && (q.limit < 0 || q.limit > 1000 || q.offset < 0 || q.after != (position{}) && q.offset != 0) {
			t.Errorf("%q: %+v", query, q)
		}
	})
}

// grammarOfTags is the grammar of RFC 9110, section 13.1.1, with the empty elements of
// section 5.6.1.2; RFC 9110 counts bytes and Go runes, which here is the same.
var grammarOfTags = regexp.MustCompile(strings.ReplaceAll(`^[ \t]*(TAG)?([ \t]*,[ \t]*(TAG)?)*[ \t]*$`, "TAG", `(W/)?"[^\x00-\x20"\x7f]*"`))

func FuzzPreconditions(f *testing.F) {
	for _, seed := range []string{`"1", W/"2"`, "*", `"a,*,b"`, `"x",*`, `W/"17" , "17"`, `,"17",,`, `"17" "17"`, `"17`, `W/17`, " * ", "\"\x80\",\"17\""} {
		f.Add(seed, "")
		f.Add(seed, seed)
	}
	u := &user{UpdatedAt: time.UnixMicro(17)}
	f.Fuzz(func(t *testing.T, field, second string) {
		fields := []string{field}
		if second != "" {
			fields = append(fields, second)
		}
		list := strings.Join(fields, ", ")
		star, weak, strong := strings.Trim(list, " \t") == "*", false, false
		if grammarOfTags.MatchString(list) {
			for i, part := range strings.Split(list, `"`) { // each second part is what a tag holds
				if i%2 == 1 && part == "17" {
					weak = true
					strong = strong || !strings.HasSuffix(strings.Split(list, `"`)[i-1], "W/")
				}
			}
		}
		if got := parsePreconditions(http.Header{"If-Match": fields}).matched(u); got != (star || strong) {
			t.Errorf("If-Match: %q matches version 17: %t", fields, got)
		}
		if got := !parsePreconditions(http.Header{"If-None-Match": fields}).noneMatched(u); got != (star || weak) {
			t.Errorf("If-None-Match: %q matches version 17: %t", fields, got)
		}
	})
}

func TestUUIDv7(t *testing.T) {
	t.Parallel()
	before := time.Now().UnixMilli()
	id := newUUID()
	after := time.Now().UnixMilli()
	var ms int64
	fmt.Sscanf(strings.ReplaceAll(id, "-", "")[:12], "%x", &ms)
	if ms < before || ms > after || id[14] != '7' || !strings.ContainsRune("89ab", rune(id[19])) {
		t.Errorf("%s was made between %x and %x", id, before, after)
	}
}

// Under a mixed load with contested addresses, every answer is true, and the
// table is in the end what the answers said.
func TestMixedLoad(t *testing.T) {
	t.Parallel()
	s := newService(t)
	const workers, rounds = 16, 15
	var mu sync.Mutex
	owner := make(map[string]string) // of an address: the id that an answer gave it to
	var wg sync.WaitGroup
	for worker := range workers {
		wg.Go(func() {
			for round := range rounds {
				contested := fmt.Sprintf("%d-%d@example.com", round, worker%4)
				a, err := s.try("POST", usersPath, fmt.Sprintf(`{"email":%q,"name":"%d"}`, contested, worker))
				if err != nil || a.status != 200 && a.status != 409 {
					t.Errorf("create: %v %v", a, err)
					return
				}
				if a.status == 409 {
					continue
				}
				id := a.user(t)["id"]
				mu.Lock()
				if other, ok := owner[contested]; ok {
					t.Errorf("%s was given to %s and to %s", contested, other, id)
				}
				owner[contested] = id
				mu.Unlock()
				path, tag := usersPath+"/"+id, a.header.Get("ETag")
				for _, step := range []struct {
					method, path, body, condition string
					status                        int
					name                          string // in the answer
				}{
					{"GET", path, "", "", 200, fmt.Sprint(worker)},
					{"PUT", path, `{"name":"one"}`, "If-Match: " + tag, 200, "one"},
					{"PUT", path, `{"name":"two"}`, "If-Match: " + tag, 412, ""},
					{"GET", path, "", "", 200, "one"}, // a read sees what was acknowledged
					{"GET", usersPath + "?email=" + strings.ToUpper(contested), "", "", 200, "one"},
					{"PATCH", path, `{"name":"three"}`, "", 200, "three"},
					{"GET", path, "", "If-None-Match: " + tag, 200, "three"},
					{"DELETE", path, "", "If-Match: " + tag, 412, ""},
				} {
					a, err := s.try(step.method, step.path, step.body, step.condition)
					if err != nil || a.status != step.status || !strings.Contains(a.body, `"name":"`+step.name) && step.name != "" {
						t.Errorf("%+v: %v %v", step, a, err)
					}
				}
				if round%3 == 0 {
					mu.Lock()
					delete(owner, contested) // from now on, another may get it
					mu.Unlock()
					if a, err := s.try("DELETE", path, ""); err != nil || a.status != 200 {
						t.Errorf("delete: %v %v", a, err)
					}
					if a, err := s.try("GET", path, ""); err != nil || a.status != 404 {
						t.Errorf("after delete: %v %v", a, err)
					}
				}
			}
		})
	}
	wg.Wait()
	stored := make(map[string]string)
	for _, u := range s.call("GET", usersPath+"?limit=1000", "").users(t) {
		stored[u["email"]] = u["id"]
		if u["name"] != "three" {
			t.Errorf("left behind: %v", u)
		}
	}
	if fmt.Sprint(stored) != fmt.Sprint(owner) {
		t.Errorf("the table has %d users, the answers said %d", len(stored), len(owner))
	}
}

// A stop while many wait behind a locked table: all are answered.
func TestStopWithAFullQueue(t *testing.T) {
	t.Parallel()
	s := newService(t)
	tx := begin(t, s.db, "LOCK TABLE users IN EXCLUSIVE MODE")
	const many = 150
	answers := make(chan answerOrError, many)
	for i := range many {
		go func() {
			a, err := s.try("POST", usersPath, fmt.Sprintf(`{"email":"%d@example.com","name":"x"}`, i%100))
			answers <- answerOrError{a, err}
		}()
	}
	waitFor(t, "a statement to wait for the lock", func() bool {
		var waiting int
		err := s.db.QueryRow("SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'users'::regclass").Scan(&waiting)
		return err == nil && waiting > 0
	})
	s.stop()
	s.waitLog("stopping")
	tx.Rollback()
	statuses := make(map[int]int)
	for range many {
		switch a := <-answers; {
		case a.err == nil:
			statuses[a.status]++
		default: // it had not been accepted when the listener closed
			statuses[0]++
		}
	}
	if statuses[http.StatusOK]+statuses[http.StatusConflict]+statuses[0] != many || statuses[http.StatusOK] == 0 {
		t.Errorf("statuses: %v", statuses)
	}
	if err := <-s.done; err != nil {
		t.Errorf("run returned %v", err)
	}
	s.done <- nil
	var stored int
	if err := s.db.QueryRow("SELECT count(*) FROM users").Scan(&stored); err != nil || stored < statuses[http.StatusOK] {
		t.Errorf("%d creates were acknowledged, %d users are stored: %v", statuses[http.StatusOK], stored, err)
	}
}
