package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"mime"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"
)

// Each response that a service sends in any of the tests is held against openapi.json.

// described is openapi.json, and what the tests have seen of it.
var described = struct {
	once  sync.Once
	doc   map[string]any
	hosts sync.Map // of the services that run
	mu    sync.Mutex
	seen  map[string]bool // "POST /api/v1/users 200"
	wrong []string        // responses that it does not describe
}{seen: make(map[string]bool)}

func description() map[string]any {
	described.once.Do(func() {
		if err := json.Unmarshal(openAPI, &described.doc); err != nil {
			panic(err)
		}
	})
	return described.doc
}

// A describedTransport holds the responses of services against their description.
type describedTransport struct{ *http.Transport }

func (t describedTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := t.Transport.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	if _, ours := described.hosts.Load(req.URL.Host); !ours {
		return resp, nil
	}
	body, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	resp.Body = io.NopCloser(bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	operation, wrong := checkResponse(req, resp, body)
	described.mu.Lock()
	defer described.mu.Unlock()
	described.seen[operation] = true
	if wrong != nil {
		described.wrong = append(described.wrong, fmt.Sprintf("%s %s: %d: %v", req.Method, req.URL.Path, resp.StatusCode, wrong))
	}
	return resp, nil
}

// reportUndescribed prints what openapi.json lacks, and returns whether there is any.
func reportUndescribed() bool {
	described.mu.Lock()
	defer described.mu.Unlock()
	for _, wrong := range slices.Compact(slices.Sorted(slices.Values(described.wrong))) {
		fmt.Println("openapi.json:", wrong)
	}
	return len(described.wrong) > 0
}

// checkResponse returns the operation and the status of a response, and how it differs from
// what is described.
func checkResponse(req *http.Request, resp *http.Response, body []byte) (operation string, wrong error) {
	path, members := findPath(req.URL.Path)
	method := strings.ToLower(req.Method)
	if method == "head" {
		method = "get"
	}
	operation = fmt.Sprintf("%s %s %d", strings.ToUpper(method), path, resp.StatusCode)
	op, _ := members[method].(map[string]any)
	switch {
	case resp.StatusCode == 204 && req.Method == "OPTIONS", op == nil && slices.Contains([]int{401, 403, 404, 405, 429, 503}, resp.StatusCode):
		return operation, nil // of each path, and of none
	case op == nil:
		return operation, fmt.Errorf("there is no such operation")
	}
	response := deref(at(op, "responses", fmt.Sprint(resp.StatusCode)))
	if response == nil {
		return operation, fmt.Errorf("the status is not there")
	}
	headers, _ := response["headers"].(map[string]any)
	for name, h := range headers {
		header := deref(h)
		values := resp.Header.Values(name)
		if name == "Accept" && len(values) == 0 && resp.Header.Get("Accept-Encoding") != "" {
			continue
		}
		if required, _ := header["required"].(bool); required && len(values) != 1 || len(values) > 1 {
			return operation, fmt.Errorf("%d fields %s", len(values), name)
		}
		if len(values) == 1 {
			if err := checkSchema(header["schema"], values[0]); err != nil {
				return operation, fmt.Errorf("%s: %w", name, err)
			}
		}
	}
	content, _ := response["content"].(map[string]any)
	if content == nil || req.Method == "HEAD" || resp.Header.Get("Content-Encoding") != "" {
		if len(body) > 0 && content == nil {
			return operation, fmt.Errorf("there is a body: %.100s", body)
		}
		return operation, nil
	}
	media := deref(content[resp.Header.Get("Content-Type")])
	if media == nil {
		return operation, fmt.Errorf("the type %q is not there", resp.Header.Get("Content-Type"))
	}
	var value any = string(body)
	if name, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type")); strings.HasSuffix(name, "json") {
		if err := json.Unmarshal(body, &value); err != nil {
			return operation, err
		}
	}
	return operation, checkSchema(media["schema"], value)
}

// findPath returns the described path that a path matches, and what is there.
func findPath(path string) (string, map[string]any) {
	paths := description()["paths"].(map[string]any)
	for template, members := range paths {
		form := "^" + regexp.MustCompile(`\\\{\w+\\\}`).ReplaceAllString(regexp.QuoteMeta(template), `[^/]+`) + "$"
		if regexp.MustCompile(form).MatchString(path) {
			return template, members.(map[string]any)
		}
	}
	return path, nil
}

// at returns what is at a path of names below a value, or nil.
func at(value any, names ...string) any {
	for _, name := range names {
		value = deref(value)[name]
	}
	return value
}

// deref returns an object, or the one that it refers to.
func deref(value any) map[string]any {
	object, _ := value.(map[string]any)
	if pointer, ok := object["$ref"].(string); ok {
		return deref(at(description(), strings.Split(strings.TrimPrefix(pointer, "#/"), "/")...))
	}
	return object
}

// checkSchema checks a value by the keywords of JSON Schema that openapi.json has. It fails
// at those that it does not know.
func checkSchema(s, value any) error {
	schema := deref(s)
	if schema == nil {
		return fmt.Errorf("there is no schema")
	}
	number, _ := value.(float64)
	text, _ := value.(string)
	list, _ := value.([]any)
	object, _ := value.(map[string]any)
	for keyword, want := range schema {
		limit, _ := want.(float64)
		ok := true
		switch keyword {
		case "description", "default", "example":
		case "type":
			_, isNumber := value.(float64)
			_, isText := value.(string)
			ok = map[any]bool{"integer": isNumber && number == float64(int64(number)), "string": isText,
				"array": list != nil, "object": object != nil}[want]
		case "enum":
			ok = slices.Contains(want.([]any), value)
		case "minimum":
			ok = number >= limit
		case "maximum":
			ok = number <= limit
		case "minLength":
			ok = utf8.RuneCountInString(text) >= int(limit)
		case "maxLength":
			ok = utf8.RuneCountInString(text) <= int(limit)
		case "minItems":
			ok = len(list) >= int(limit)
		case "maxItems":
			ok = len(list) <= int(limit)
		case "pattern":
			ok = regexp.MustCompile(want.(string)).MatchString(text)
		case "format":
			form := map[any]string{"uuid": `^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`, "date-time": `^\d{4}-.*Z$`, "int64": ""}[want]
			ok = form == "" || regexp.MustCompile(form).MatchString(text)
		case "items":
			for _, item := range list {
				if err := checkSchema(want, item); err != nil {
					return err
				}
			}
		case "required":
			for _, name := range want.([]any) {
				_, there := object[name.(string)]
				ok = ok && there
			}
		case "properties":
			for name, property := range want.(map[string]any) {
				if member, there := object[name]; there {
					if err := checkSchema(property, member); err != nil {
						return fmt.Errorf("%s: %w", name, err)
					}
				}
			}
		case "additionalProperties":
			for name := range object {
				_, there := schema["properties"].(map[string]any)[name]
				ok = ok && there
			}
		default:
			return fmt.Errorf("unknown keyword %s", keyword)
		}
		if !ok {
			return fmt.Errorf("%.100v is against %s: %v", value, keyword, want)
		}
	}
	return nil
}

// The description is served as it is, with the version; and its examples are true to it.
func TestOpenAPI(t *testing.T) {
	t.Parallel()
	s := newService(t, withAuth...)
	var served map[string]any
	a := s.call("GET", "/openapi.json", "")
	if err := json.Unmarshal([]byte(a.body), &served); err != nil || a.status != 200 || at(served, "info", "version") != buildVersion() {
		t.Fatalf("%d, %v, version %v", a.status, err, at(served, "info", "version"))
	}
	if a := s.call("HEAD", "/openapi.json", ""); a.status != 200 || a.body != "" {
		t.Errorf("HEAD: %d", a.status)
	}
	if a := s.call("POST", "/openapi.json", "{}"); a.status != 405 || a.header.Get("Allow") != "GET, HEAD, OPTIONS" {
		t.Errorf("POST: %d", a.status)
	}
	examples := 0
	var walk func(where string, value any)
	walk = func(where string, value any) {
		object, _ := value.(map[string]any)
		if example, ok := object["example"]; ok && object["schema"] != nil {
			examples++
			if err := checkSchema(object["schema"], example); err != nil {
				t.Errorf("the example at %s: %v", where, err)
			}
		}
		if pointer, ok := object["$ref"]; ok && deref(value) == nil {
			t.Errorf("%s refers to %v, which is not there", where, pointer)
		}
		for name, member := range object {
			walk(where+"/"+name, member)
		}
		if list, ok := value.([]any); ok {
			for i, item := range list {
				walk(fmt.Sprint(where, "/", i), item)
			}
		}
	}
	walk("", description())
	if examples < 20 {
		t.Errorf("only %d examples", examples)
	}
}

// rareStatuses are described, and come about in other ways than by a request of the tests'
// client: of a service that is overloaded, without its database, or beyond RATE_LIMIT.
var rareStatuses = []string{"429", "500", "503"}

// Each operation, and each of its statuses, is one that the service has. This test drives
// them all; what others do with the API is checked as well.
func TestOpenAPIOperations(t *testing.T) {
	t.Parallel()
	s := newService(t, withAuth...)
	ada, reader := bearer("ada"), "Authorization: Bearer "+secretToken() // which may read
	nobody := "Authorization: Bearer " + mintToken([]byte(middlewareSecret), grant{subject: "x", scope: "none", ttl: time.Hour}, time.Now())
	user := s.call("POST", usersPath, `{"email":"ada@example.com","name":"Ada"}`, ada)
	path, etag := user.header.Get("Location"), user.header.Get("ETag")
	s.call("POST", usersPath, `{"email":"grace@example.com","name":"Grace"}`, ada)
	mustExec(t, s.db, `CREATE TABLE orders (buyer uuid REFERENCES users)`)
	mustExec(t, s.db, `INSERT INTO orders VALUES ($1)`, strings.TrimPrefix(path, usersPath+"/"))
	mustExec(t, s.db, `ALTER TABLE users ADD CHECK (name <> 'bad')`)
	mustExec(t, s.db, `CREATE FUNCTION skip() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN IF OLD.name = ''kept'' THEN RETURN NULL; END IF; RETURN OLD; END'`)
	mustExec(t, s.db, `CREATE TRIGGER skip BEFORE DELETE ON users FOR EACH ROW EXECUTE FUNCTION skip()`)
	kept := s.call("POST", usersPath, `{"email":"kept@example.com","name":"kept"}`, ada).header.Get("Location")
	gone := "/api/v1/users/" + noSuchID
	large := fmt.Sprintf(`{"name":"%s"}`, strings.Repeat("x", 70000))
	for _, call := range []struct {
		method, path, body string
		fields             []string
	}{
		{"GET", "/", "", []string{"Accept: text/html"}}, {"GET", "/", "", nil},
		{"GET", "/health", "", nil}, {"GET", "/health/ready", "", nil}, {"GET", "/openapi.json", "", nil},
		{"POST", usersPath, "{", []string{ada}}, {"POST", usersPath, "{}", nil}, {"POST", usersPath, "{}", []string{reader}},
		{"POST", usersPath, `{"email":"ada@example.com","name":"Ada"}`, []string{ada}}, {"POST", usersPath, large, []string{ada}},
		{"POST", usersPath, "{}", []string{ada, "Content-Type: text/plain"}}, {"POST", usersPath, "{}", []string{ada}},
		{"GET", usersPath + "?limit=1", "", []string{ada}}, {"GET", usersPath + "?limit=x", "", []string{ada}},
		{"GET", usersPath, "", nil}, {"GET", usersPath, "", []string{nobody}},
		{"GET", path, "", []string{ada}}, {"GET", path, "", []string{ada, "If-None-Match: " + etag}}, {"GET", "/api/v1/users/x", "", []string{ada}},
		{"GET", path, "", nil}, {"GET", path, "", []string{nobody}}, {"GET", gone, "", []string{ada}}, {"GET", path, "", []string{ada, `If-Match: "1"`}},
		{"DELETE", "/api/v1/users/x", "", []string{ada}}, {"DELETE", path, "", nil}, {"DELETE", path, "", []string{reader}},
		{"DELETE", gone, "", []string{ada}}, {"DELETE", path, "", []string{ada}}, {"DELETE", path, "", []string{ada, `If-Match: "1"`}},
		{"DELETE", kept, "", []string{ada}},
	} {
		s.call(call.method, call.path, call.body, call.fields...)
		s.call(call.method, call.path, call.body, append(call.fields, "Accept: application/problem+json")...)
	}
	for _, method := range []string{"PUT", "PATCH"} {
		s.call(method, path, `{"name":"Ada King"}`, ada)
		s.call(method, "/api/v1/users/x", `{}`, ada)
		s.call(method, path, `{}`)
		s.call(method, path, `{}`, reader)
		s.call(method, gone, `{}`, ada)
		s.call(method, path, `{"email":"grace@example.com"}`, ada)
		s.call(method, path, `{}`, ada, `If-Match: "1"`)
		s.call(method, path, large, ada)
		s.call(method, path, `{}`, ada, "Content-Type: text/plain")
		s.call(method, path, `{"name":"bad"}`, ada)
	}
	mustExec(t, s.db, `DROP TABLE orders`)
	s.call("DELETE", path, "", ada)

	described.mu.Lock()
	defer described.mu.Unlock()
	for path, members := range description()["paths"].(map[string]any) {
		for method, op := range members.(map[string]any) {
			for status := range maps.Keys(deref(at(op, "responses"))) {
				operation := fmt.Sprintf("%s %s %s", strings.ToUpper(method), path, status)
				if !described.seen[operation] && !slices.Contains(rareStatuses, status) {
					t.Errorf("openapi.json has %s, and no response was that", operation)
				}
			}
		}
	}
}

// A validator that passes everything would be none.
func TestOpenAPIFindsMistakes(t *testing.T) {
	t.Parallel()
	user := `{"id":"0199f3a2-5c1e-7b60-9d3c-2f1a4b5c6d7e","email":"a@b.c","name":"A","created_at":"2026-11-26T08:00:00.000000Z","updated_at":"2026-11-26T08:00:00.000000Z"}`
	check := func(method, path string, status int, contentType, body string, fields ...string) error {
		resp := &http.Response{StatusCode: status, Header: http.Header{"Content-Type": {contentType}, "X-Request-Id": {"x"}}}
		for _, field := range fields {
			name, value, _ := strings.Cut(field, ": ")
			resp.Header.Set(name, value)
		}
		req, _ := http.NewRequest(method, "http://x"+path, nil)
		_, wrong := checkResponse(req, resp, []byte(body))
		return wrong
	}
	const one, js = usersPath + "/" + noSuchID, "application/json"
	if err := check("GET", one, 200, js, user, `ETag: "1"`); err != nil {
		t.Errorf("a sound response: %v", err)
	}
	for name, err := range map[string]error{
		"a status":    check("GET", one, 201, js, user, `ETag: "1"`),
		"a path":      check("GET", "/api/v2", 200, js, user),
		"a method":    check("BREW", one, 200, js, user),
		"a type":      check("GET", one, 200, "text/html", user, `ETag: "1"`),
		"no header":   check("GET", one, 200, js, user),
		"a header":    check("GET", one, 200, js, user, "ETag: 1"),
		"a member":    check("GET", one, 200, js, strings.Replace(user, "{", `{"x":1,`, 1), `ETag: "1"`),
		"no member":   check("GET", one, 200, js, strings.Replace(user, `"name":"A",`, "", 1), `ETag: "1"`),
		"a number":    check("GET", one, 200, js, strings.Replace(user, `"A"`, "1", 1), `ETag: "1"`),
		"a time":      check("GET", one, 200, js, strings.Replace(user, ".000000Z", "Z", 1), `ETag: "1"`),
		"an id":       check("GET", one, 200, js, strings.Replace(user, "0199", "019", 1), `ETag: "1"`),
		"a list":      check("GET", usersPath, 200, js, user),
		"an item":     check("GET", usersPath, 200, js, "[1]"),
		"no error":    check("GET", one, 404, js, "{}"),
		"a body":      check("GET", one, 304, "", "x", `ETag: "1"`),
		"not ready":   check("GET", "/health/ready", 200, js, `{"status":"x"}`),
		"no JSON":     check("GET", one, 200, js, "{", `ETag: "1"`),
		"no enum":     check("GET", "/health", 200, "text/plain; charset=utf-8", "NO"),
		"no Location": check("POST", usersPath, 200, js, user, `ETag: "1"`),
	} {
		if err == nil {
			t.Errorf("%s that is not described passes", name)
		}
	}
}
