package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// members returns what walkObject finds in text, as name=value each.
func members(text string) (found []string, err error) {
	err = walkObject([]byte(text), func(name string, value []byte) error {
		found = append(found, name+"="+string(value))
		return nil
	})
	return found, err
}

func TestWalkObject(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		text string
		want []string // name=value
	}{
		{"empty", `{}`, nil},
		{"empty, with spaces", " \t\r\n{ \t\r\n} \t\r\n", nil},
		{"one member", `{"a":1}`, []string{`a=1`}},
		{"order is kept", `{"b":1,"a":2,"c":3}`, []string{`b=1`, `a=2`, `c=3`}},
		{"a name twice", `{"a":1,"a":2}`, []string{`a=1`, `a=2`}},
		{"names differ in letter case", `{"a":1,"A":2}`, []string{`a=1`, `A=2`}},
		{"empty name", `{"":1}`, []string{`=1`}},
		{"escaped name", `{"\u0065mail":1,"n\/a\"\\":2}`, []string{`email=1`, `n/a"\=2`}},
		{"name outside the BMP", `{"\ud83d\ude00":1,"😀":2}`, []string{`😀=1`, `😀=2`}},
		{"white space everywhere", "\n{ \"a\" :\t1\r,\n\"b\" : [ 1 , 2 ] , \"c\":null }\n", []string{`a=1`, `b=[ 1 , 2 ]`, `c=null`}},
		{"numbers", `{"a":-0,"b":1.5e+3,"c":0}`, []string{`a=-0`, `b=1.5e+3`, `c=0`}},
		{"a number beyond any type", `{"a":1e999999}`, []string{`a=1e999999`}},
		{"literals", `{"a":true,"b":false,"c":null}`, []string{`a=true`, `b=false`, `c=null`}},
		{"a string stays as it is written", `{"a":"\u0041\n"}`, []string{`a="\u0041\n"`}},
		{"brackets and commas in a string", `{"a":"}],{:","b":"\"}"}`, []string{`a="}],{:"`, `b="\"}"`}},
		{"a backslash at the end of a string", `{"a":"\\","b":1}`, []string{`a="\\"`, `b=1`}},
		{"nested", `{"a":{"b":[{"c":"}"}]},"d":[[],{}]}`, []string{`a={"b":[{"c":"}"}]}`, `d=[[],{}]`}},
		{"members of members are not members", `{"a":{"email":1}}`, []string{`a={"email":1}`}},
		{"a pair of surrogates next to one", `{"a":"\ud83d\ude00\ud83d\ude00"}`, []string{`a="\ud83d\ude00\ud83d\ude00"`}},
		{"no surrogate, but an escaped backslash", `{"a":"\\ud800"}`, []string{`a="\\ud800"`}},
		{"the neighbours of the surrogates", `{"a":"\ud7ff\ue000"}`, []string{`a="\ud7ff\ue000"`}},
		{"the last and first pairs", `{"a":"\uD800\uDC00\udbff\udfff"}`, []string{`a="\uD800\uDC00\udbff\udfff"`}},
		{"U+FFFD itself", `{"a":"�\ufffd"}`, []string{`a="�\ufffd"`}},
		{"NUL, escaped", `{"a":"\u0000"}`, []string{`a="\u0000"`}},
		{"as deep as can be", `{"a":` + nested(9_999) + `}`, []string{`a=` + nested(9_999)}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got, err := members(tt.text)
			if err != nil || !slices.Equal(got, tt.want) {
				t.Errorf("%.80q, %v; want %.80q", got, err, tt.want)
			}
		})
	}
}

// nested returns arrays in arrays.
func nested(depth int) string { return strings.Repeat("[", depth) + strings.Repeat("]", depth) }

func TestWalkObjectStopsAtAnError(t *testing.T) {
	t.Parallel()
	want := errors.New("enough")
	calls := 0
	err := walkObject([]byte(`{"a":1,"b":2,"c":3}`), func(name string, _ []byte) error {
		if calls++; name == "b" {
			return want
		}
		return nil
	})
	if err != want || calls != 2 {
		t.Errorf("%v after %d members; want %v after 2", err, calls, want)
	}
}

func TestWalkObjectNeedsAnObject(t *testing.T) {
	t.Parallel()
	for _, text := range []string{`null`, `true`, `1`, ` "{}" `, `[]`, `[{}]`, "\n-1.5e3\n"} {
		if got, err := members(text); err != errNotObject || got != nil {
			t.Errorf("%s: %q, %v; want %v", text, got, err, errNotObject)
		}
	}
}

func TestUniqueMembers(t *testing.T) {
	t.Parallel()
	tests := []struct {
		text string
		ok   bool
	}{
		{`{}`, true},
		{`{"a":1,"b":1}`, true},
		{`{"a":1,"A":1}`, true},
		{`{"a":{"b":1},"b":1}`, true},
		{`{"a":{"b":1,"b":1}}`, true}, // whoever reads "a" walks it in turn
		{`{"a":1,"a":1}`, false},
		{`{"a":1,"b":1,"\u0061":2}`, false},
	}
	for _, tt := range tests {
		_, err := uniqueMembers([]byte(tt.text))
		if (err == nil) != tt.ok {
			t.Errorf("%s: error %v; want one: %t", tt.text, err, !tt.ok)
		}
	}
}

func TestMalformedJSON(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		text   string
		offset int64
		reason string // a part of it
	}{
		{"empty", ``, 0, "unexpected end"},
		{"spaces alone", "  \n", 3, "unexpected end"},
		{"cut off in the object", `{"a":1`, 6, "unexpected end"},
		{"cut off in a string", `{"a":"b`, 7, "unexpected end"},
		{"cut off in an escape", `{"a":"\u00`, 10, `in \u hexadecimal character escape`},
		{"cut off in a literal", `{"a":tru`, 8, "in literal true"},
		{"trailing data", `{} {}`, 4, "after top-level value"},
		{"a closing brace too many", `{}}`, 3, "after top-level value"},
		{"a comma too many", `{"a":1,}`, 8, "looking for beginning of object key"},
		{"a comma too few", `{"a":1 "b":2}`, 8, "after object key:value pair"},
		{"a comma at first", `{,"a":1}`, 2, "looking for beginning of object key"},
		{"no colon", `{"a" 1}`, 6, "after object key"},
		{"no value", `{"a":}`, 6, "looking for beginning of value"},
		{"the wrong bracket", `{"a":[1}`, 8, "after array element"},
		{"a name without quotes", `{a:1}`, 2, "looking for beginning of object key"},
		{"a name that is no string", `{1:1}`, 2, "looking for beginning of object key"},
		{"single quotes", `{'a':1}`, 2, "looking for beginning of object key"},
		{"a comment", `{/**/}`, 2, "looking for beginning of object key"},
		{"NaN", `{"a":NaN}`, 6, "looking for beginning of value"},
		{"a literal in capitals", `{"a":True}`, 6, "looking for beginning of value"},
		{"a plus sign", `{"a":+1}`, 6, "looking for beginning of value"},
		{"a leading zero", `{"a":01}`, 7, "after object key:value pair"},
		{"a number that ends in a point", `{"a":1.}`, 8, "after decimal point"},
		{"a number that begins with a point", `{"a":.1}`, 6, "looking for beginning of value"},
		{"a minus alone", `{"a":-}`, 7, "in numeric literal"},
		{"hexadecimal", `{"a":0x1}`, 7, "after object key:value pair"},
		{"an unknown escape", `{"a":"\x41"}`, 8, "in string escape code"},
		{"a \\u with too few digits", `{"a":"\u12"}`, 11, `in \u hexadecimal character escape`},
		{"a line break in a string", "{\"a\":\"\n\"}", 7, "in string literal"},
		{"a tab in a name", "{\"\t\":1}", 3, "in string literal"},
		{"NUL in a string", "{\"a\":\"\x00\"}", 7, "in string literal"},
		{"NUL at the end", "{}\x00", 3, "after top-level value"},
		{"a byte order mark", "\uFEFF{}", 1, "looking for beginning of value"},
		{"a no-break space", "{\u00a0}", 2, "looking for beginning of object key"},
		{"nested too deep", `{"a":` + nested(10_000) + `}`, 10_005, "exceeded max depth"},
		{"nested much too deep, never closed", strings.Repeat(`[`, 1_000_000), 10_001, "exceeded max depth"},
		{"objects nested too deep", strings.Repeat(`{"a":`, 10_001), 50_001, "exceeded max depth"},

		{"a byte that UTF-8 never has", "{\"a\":\"\xff\"}", 7, "not UTF-8"},
		{"Latin-1", "{\"a\":\"\xe9t\xe9\"}", 7, "not UTF-8"},
		{"in a name", "{\"\xff\":1}", 3, "not UTF-8"},
		{"between the members", "{\xff}", 2, "not UTF-8"},
		{"behind the value", "{}\xff", 3, "not UTF-8"},
		{"at first", "\xff{}", 1, "not UTF-8"},
		{"a character cut off", "{\"a\":\"\xe2\x82\"}", 7, "not UTF-8"},
		{"a continuation alone", "{\"a\":\"é\xa9\"}", 9, "not UTF-8"},
		{"a longer form than need be", "{\"a\":\"\xc0\xaf\"}", 7, "not UTF-8"},
		{"a surrogate in UTF-8", "{\"a\":\"\xed\xa0\x80\"}", 7, "not UTF-8"},
		{"beyond U+10FFFF", "{\"a\":\"\xf4\x90\x80\x80\"}", 7, "not UTF-8"},
		{"UTF-16", "\xff\xfe{\x00}\x00", 1, "not UTF-8"},
		{"behind U+FFFD itself", "{\"a\":\"�\xff\"}", 10, "not UTF-8"},
		{"in an unknown member", "{\"x\":[{\"y\":\"\xff\"}]}", 13, "not UTF-8"},

		{"a high surrogate alone", `{"a":"\ud800"}`, 7, "a surrogate without its other half"},
		{"a low surrogate alone", `{"a":"\udc00"}`, 7, "a surrogate without its other half"},
		{"the last of each", `{"a":"\uDBFF","b":"\uDFFF"}`, 7, "a surrogate without its other half"},
		{"the wrong way round", `{"a":"\udc00\ud800"}`, 7, "a surrogate without its other half"},
		{"two high ones", `{"a":"\ud800\ud800"}`, 7, "a surrogate without its other half"},
		{"two low ones", `{"a":"\udc00\udc00"}`, 7, "a surrogate without its other half"},
		{"high, then a pair", `{"a":"\ud800\ud83d\ude00"}`, 7, "a surrogate without its other half"},
		{"a pair, then low", `{"a":"\ud83d\ude00\ude00"}`, 19, "a surrogate without its other half"},
		{"high, then a letter", `{"a":"\ud800x\udc00"}`, 7, "a surrogate without its other half"},
		{"high, then another escape", `{"a":"\ud800\n\udc00"}`, 7, "a surrogate without its other half"},
		{"high, then an escaped backslash", `{"a":"\ud800\\udc00"}`, 7, "a surrogate without its other half"},
		{"high, then the end of the string", `{"a":"\ud800","\udc00":1}`, 7, "a surrogate without its other half"},
		{"behind an escaped backslash", `{"a":"\\\ud800"}`, 9, "a surrogate without its other half"},
		{"in a name", `{"\ud800":1}`, 3, "a surrogate without its other half"},
		{"in an unknown member", `{"x":[{"y":"\ud800"}]}`, 13, "a surrogate without its other half"},
		{"in the name of an unknown member", `{"x":[{"\udc00":1}]}`, 9, "a surrogate without its other half"},
		{"in what is no object", `"\ud800"`, 2, "a surrogate without its other half"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got, err := members(tt.text)
			want := fmt.Sprintf("Malformed JSON at byte %d: ", tt.offset)
			if err == nil || !strings.HasPrefix(err.Error(), want) || !strings.Contains(err.Error(), tt.reason) {
				t.Fatalf("%.80q, error %v; want %s%s", got, err, want, tt.reason)
			}
			if got != nil {
				t.Errorf("members %q were found before the error", got)
			}
			if again := checkJSON([]byte(tt.text)); again == nil || again.Error() != err.Error() {
				t.Errorf("checkJSON says %v, walkObject %v", again, err)
			}
		})
	}
}

func TestJSONString(t *testing.T) {
	t.Parallel()
	tests := []struct {
		value string
		want  string
		ok    bool
	}{
		{`""`, "", true},
		{`"a"`, "a", true},
		{`"null"`, "null", true},
		{`"é€😀"`, "é€😀", true},
		{`"\"\\\/\b\f\n\r\t"`, "\"\\/\b\f\n\r\t", true},
		{`"\u0041\u00e9\u20AC\ud83d\ude00"`, "Aé€😀", true},
		{`"\u0000"`, "\x00", true},
		{`"\ufffd"`, "\uFFFD", true},
		{`"<>&\u003c"`, "<>&<", true},
		{`null`, "", false},
		{`true`, "", false},
		{`1`, "", false},
		{`-1.5e3`, "", false},
		{`[]`, "", false},
		{`["a"]`, "", false},
		{`{"a":"b"}`, "", false},
	}
	for _, tt := range tests {
		if got, ok := jsonString([]byte(tt.value)); got != tt.want || ok != tt.ok {
			t.Errorf("%s: %q, %t; want %q, %t", tt.value, got, ok, tt.want, tt.ok)
		}
	}
}

func TestAppendJSONString(t *testing.T) {
	t.Parallel()
	tests := []struct{ s, want string }{
		{"", `""`},
		{"Ada Lovelace", `"Ada Lovelace"`},
		{`"`, `"\""`},
		{`\`, `"\\"`},
		{`a"b\c`, `"a\"b\\c"`},
		{"\n\r\t", `"\n\r\t"`},
		{"\x00\x01\x1f", `"\u0000\u0001\u001f"`},
		{"\b\f", `"\u0008\u000c"`},
		{"\x7f\u0080\u009f", "\"\x7f\u0080\u009f\""}, // controls, but not to RFC 8259
		{"<>&'/", `"<>&'/"`},
		{"\u2028\u2029", "\"\u2028\u2029\""},
		{"\uFEFF\uFFFD\uFFFE\uFFFF", "\"\uFEFF\uFFFD\uFFFE\uFFFF\""},
		{"\uD7FF\uE000", "\"\uD7FF\uE000\""}, // on both sides of the surrogates
		{"\U00010000😀\U0010FFFF", "\"\U00010000😀\U0010FFFF\""},
	}
	for _, tt := range tests {
		if got := string(appendJSONString([]byte("before"), tt.s)); got != "before"+tt.want {
			t.Errorf("%q: %s; want %s behind what was there", tt.s, got, tt.want)
		}
	}
}

// Every character there is comes back from encoding/json as it went in.
func TestAppendJSONStringOfEveryCharacter(t *testing.T) {
	t.Parallel()
	for first := rune(0); first <= utf8.MaxRune; first += 64 {
		var text strings.Builder
		for r := first; r < first+64; r++ {
			if utf8.ValidRune(r) {
				text.WriteString("a" + string(r) + "b")
			}
		}
		s := text.String()
		var back string
		if err := json.Unmarshal(appendJSONString(nil, s), &back); err != nil || back != s {
			t.Fatalf("%U to %U come back as %q, error %v", first, first+63, back, err)
		}
	}
}

// bodyHandler answers with the length of the body.
func bodyHandler(w http.ResponseWriter, r *http.Request) error {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return err
	}
	fmt.Fprint(w, len(body))
	return nil
}

func TestBodyMediaType(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name        string
		contentType []string
		want        int
	}{
		{"JSON", []string{"application/json"}, 200},
		{"in capitals", []string{"Application/JSON"}, 200},
		{"with a charset", []string{"application/json; charset=utf-8"}, 200},
		{"with a charset, spaces left out", []string{"application/json;charset=UTF-8"}, 200},
		{"with a charset that JSON does not have", []string{"application/json; charset=utf-16"}, 200},
		{"with a semicolon and nothing", []string{"application/json;"}, 200},
		{"with a broken parameter", []string{"application/json; charset"}, 200},
		{"with a parameter given twice", []string{"application/json; charset=utf-8; charset=UTF-8"}, 200},
		{"with a parameter that holds another type", []string{`application/json; profile="text/plain;`}, 200},
		{"with spaces around", []string{" application/json "}, 200},
		{"of the suffix +json", []string{"application/merge-patch+json"}, 200},
		{"of the suffix, with a parameter", []string{"application/vnd.api+json; v=1"}, 200},
		{"of the suffix, in capitals", []string{"APPLICATION/LD+JSON"}, 200},
		{"missing", nil, 415},
		{"empty", []string{""}, 415},
		{"twice", []string{"application/json", "application/json"}, 415},
		{"two in one field", []string{"application/json, application/json"}, 415},
		{"text", []string{"text/plain"}, 415},
		{"a form, as curl -d says", []string{"application/x-www-form-urlencoded"}, 415},
		{"several parts", []string{"multipart/form-data; boundary=x"}, 415},
		{"JSON in a parameter", []string{"text/plain; a=application/json"}, 415},
		{"the suffix in a parameter", []string{"text/plain; a=b+json"}, 415},
		{"the older text/json", []string{"text/json"}, 415},
		{"a sequence of JSON", []string{"application/json-seq"}, 415},
		{"a sequence with a suffix", []string{"application/geo+json-seq"}, 415},
		{"lines of JSON", []string{"application/x-ndjson"}, 415},
		{"no type, just a subtype", []string{"json"}, 415},
		{"no type, just a suffix", []string{"+json"}, 415},
		{"no subtype", []string{"application/"}, 415},
		{"a space within", []string{"application/ json"}, 415},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := httptest.NewRequest("POST", "/", strings.NewReader("{}"))
			r.Header["Content-Type"] = tt.contentType
			w := httptest.NewRecorder()
			underObserve(readBody(64, handlerFunc(bodyHandler))).ServeHTTP(w, r)
			if w.Code != tt.want {
				t.Fatalf("%d %s; want %d", w.Code, w.Body, tt.want)
			}
			if accept := w.Header().Get("Accept"); tt.want == 415 && accept != "application/json" {
				t.Errorf("Accept %q; want application/json", accept)
			}
		})
	}
}

func TestBodyContentEncoding(t *testing.T) {
	t.Parallel()
	tests := []struct {
		coding []string
		want   int
	}{
		{nil, 200},
		{[]string{""}, 200},
		{[]string{"identity"}, 200},
		{[]string{"Identity"}, 200},
		{[]string{"gzip"}, 415},
		{[]string{"GZIP"}, 415},
		{[]string{"br"}, 415},
		{[]string{"identity, gzip"}, 415},
		{[]string{"identity", "gzip"}, 415},
		{[]string{"", "gzip"}, 415},
	}
	for _, tt := range tests {
		t.Run(strings.Join(tt.coding, "+"), func(t *testing.T) {
			t.Parallel()
			r := httptest.NewRequest("POST", "/", strings.NewReader("{}"))
			r.Header.Set("Content-Type", "application/json")
			r.Header["Content-Encoding"] = tt.coding
			w := httptest.NewRecorder()
			underObserve(readBody(64, handlerFunc(bodyHandler))).ServeHTTP(w, r)
			if w.Code != tt.want {
				t.Fatalf("%d %s; want %d", w.Code, w.Body, tt.want)
			}
			// RFC 9110, section 12.5.3: Accept-Encoding tells a 415 for the coding from one for the type.
			if accept := w.Header().Get("Accept-Encoding"); tt.want == 415 && accept != "identity" {
				t.Errorf("Accept-Encoding %q; want identity", accept)
			}
		})
	}
}

// brokenBody fails to be read.
type brokenBody struct{ err error }

func (b brokenBody) Read([]byte) (int, error) { return 0, b.err }

func TestReadBody(t *testing.T) {
	t.Parallel()
	secret := errors.New("read tcp 10.0.0.1: connection reset")
	tests := []struct {
		name    string
		body    io.Reader
		want    int
		message string
	}{
		{"whole", strings.NewReader(`{"a":1}`), 200, ""},
		{"as large as may be", strings.NewReader(strings.Repeat(" ", 64)), 200, ""},
		{"a byte too large", strings.NewReader(strings.Repeat(" ", 65)), 413, "The body is larger than 64 bytes"},
		{"empty", strings.NewReader(""), 400, "The body is empty: a JSON object is expected"},
		{"none", nil, 400, "The body is empty: a JSON object is expected"},
		{"cut off", brokenBody{io.ErrUnexpectedEOF}, 400, "The body could not be read"},
		{"broken", brokenBody{secret}, 400, "The body could not be read"},
		{"late", brokenBody{os.ErrDeadlineExceeded}, 503, "The body did not arrive in time"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := httptest.NewRequest("POST", "/", tt.body)
			r.Header.Set("Content-Type", "application/json")
			w := httptest.NewRecorder()
			underObserve(readBody(64, handlerFunc(bodyHandler))).ServeHTTP(w, r)
			if w.Code != tt.want {
				t.Fatalf("%d %s; want %d", w.Code, w.Body, tt.want)
			}
			if tt.want == 200 {
				return
			}
			if want := fmt.Sprintf(`{"error":{"message":%q,"code":%d}}`, tt.message, tt.want); w.Body.String() != want {
				t.Errorf("%s; want %s", w.Body, want)
			}
			if retry := w.Header().Get("Retry-After"); (retry != "") != (tt.want == 503) {
				t.Errorf("Retry-After %q with a %d", retry, tt.want)
			}
			connection, unread := w.Header().Get("Connection"), tt.want != 200 && tt.name != "empty" && tt.name != "none"
			if (connection == "close") != unread {
				t.Errorf("Connection %q with a %d", connection, tt.want)
			}
		})
	}
}

// A body that is too large is refused whether its length is announced or not,
// and the rest of it is not read.
func TestBodyTooLarge(t *testing.T) {
	t.Parallel()
	s := newService(t, "MAX_BODY_BYTES=100")
	tests := []struct {
		name string
		head string
		body string
	}{
		{"announced, and not sent at all", "Content-Length: 1000000000\r\n", strings.Repeat(" ", 101)},
		{"announced by a single byte too much", "Content-Length: 101\r\n", strings.Repeat(" ", 101)},
		{"chunked, and without an end", "Transfer-Encoding: chunked\r\n", "64\r\n" + strings.Repeat(" ", 100) + "\r\n1\r\n \r\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			a := sendRaw(t, s, "POST /api/v1/users HTTP/1.1\r\nHost: rollcall\r\nContent-Type: application/json\r\n"+tt.head+"\r\n"+tt.body)
			if want := `{"error":{"message":"The body is larger than 100 bytes","code":413}}`; a.status != 413 || a.body != want {
				t.Errorf("%d %s; want 413 %s", a.status, a.body, want)
			}
		})
	}
	t.Run("chunked, of just the size", func(t *testing.T) {
		t.Parallel()
		user := fmt.Sprintf("%-100s", `{"email":"ada@example.com","name":"Ada"}`)
		a := sendRaw(t, s, "POST /api/v1/users HTTP/1.1\r\nHost: rollcall\r\nContent-Type: application/json\r\n"+
			"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n64\r\n"+user+"\r\n0\r\n\r\n")
		if a.status != 200 {
			t.Errorf("%d %s; want 200", a.status, a.body)
		}
	})
}

// A body that does not arrive is answered when the time of the request is up,
// while its sender still waits with the rest of it.
func TestBodyTooSlow(t *testing.T) {
	t.Parallel()
	s := newService(t, "REQUEST_TIMEOUT=100ms")
	tests := []struct {
		name string
		sent string
	}{
		{"nothing of it", "Content-Length: 100\r\n\r\n"},
		{"a part of it", "Content-Length: 100\r\n\r\n{\"email\":"},
		{"a part of a chunk", "Transfer-Encoding: chunked\r\n\r\n64\r\n{\"email\":"},
		{"no last chunk", "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			a := sendRaw(t, s, "POST /api/v1/users HTTP/1.1\r\nHost: rollcall\r\nContent-Type: application/json\r\n"+tt.sent)
			if want := `{"error":{"message":"The body did not arrive in time","code":503}}`; a.status != 503 || a.body != want {
				t.Errorf("%d %s; want 503 %s", a.status, a.body, want)
			}
			if a.header.Get("Retry-After") == "" {
				t.Error("no Retry-After")
			}
		})
	}
}

// The deadline of a body ends with it: to net/http, which goes on reading while
// the handler works, a deadline that passes is a caller who went away.
func TestBodyDeadlineEndsWithTheBody(t *testing.T) {
	t.Parallel()
	const limit = 50 * time.Millisecond
	checkLeaks(t)
	server := httptest.NewServer(underObserve(handlerFunc(func(w http.ResponseWriter, r *http.Request) error {
		ctx, cancel := context.WithTimeout(r.Context(), limit)
		defer cancel()
		if _, err := readAll(w, r.WithContext(ctx), 2); err != nil {
			return err
		}
		<-ctx.Done()
		select {
		case <-r.Context().Done(): // the server's own, which has no deadline
			return r.Context().Err()
		case <-time.After(limit): // as long again, in which nothing may happen
			w.WriteHeader(http.StatusOK)
			return nil
		}
	})))
	defer server.Close()
	s := &service{t: t, url: server.URL}
	if a := s.call("POST", "/", "{}"); a.status != 200 {
		t.Errorf("%d %s; want 200", a.status, a.body)
	}
}

// escapes matches the escapes of a JSON string, a pair of surrogates as one.
var escapes = regexp.MustCompile(`\\(u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|.)`)

// hasLoneSurrogate tells by other means than checkJSON.
func hasLoneSurrogate(text []byte) bool {
	return slices.ContainsFunc(escapes.FindAll(text, -1), func(escape []byte) bool {
		return len(escape) == 6 && bytes.IndexByte([]byte("dD"), escape[2]) >= 0 && escape[3] > '7'
	})
}

// FuzzJSONBody compares walkObject with encoding/json: it takes the same texts,
// but for broken characters, and finds the same members.
func FuzzJSONBody(f *testing.F) {
	for _, seed := range []string{
		``, `{}`, ` { } `, `null`, `[{}]`, `{"a":1}`, `{"a":1,"a":[2, 3]}`, `{"email":"ada@example.com","name":"Ada","x":{"y":[]}}`,
		`{"\u0065mail" : "\ud83d\ude00" , "b" : -1.5e3}`, `{"a":"\ud800"}`, `{"a":"\\ud800"}`, `{"a":"\ud800\udc00\udc00"}`,
		"{\"a\":\"\xff\"}", `{"a":"}","b":"\""}`, `{"a":tru}`, "{\"a\":\"\u2028\"}", `{"":{"":{"":""}}}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		type pair struct{ name, value string }
		var got []pair
		err := walkObject(text, func(name string, value []byte) error {
			got = append(got, pair{name, string(value)})
			return nil
		})
		valid := json.Valid(text) && utf8.Valid(text) && !hasLoneSurrogate(text)
		if err != nil && err != errNotObject {
			var offset int
			var reason string
			if n, _ := fmt.Sscanf(err.Error(), "Malformed JSON at byte %d: %s", &offset, &reason); n < 2 || offset < 0 || offset > len(text) {
				t.Fatalf("a strange error: %v", err)
			}
			if valid || got != nil {
				t.Fatalf("%v; but it is valid: %t, and had %q", err, valid, got)
			}
			return
		}
		if !valid {
			t.Fatalf("taken for valid: %v, %q", err, got)
		}
		decoder := json.NewDecoder(bytes.NewReader(text))
		token, _ := decoder.Token()
		if isObject := token == json.Delim('{'); isObject != (err == nil) {
			t.Fatalf("an object: %t, but the error is %v", isObject, err)
		}
		if err != nil {
			return
		}
		var want []pair
		for decoder.More() {
			name, err := decoder.Token()
			if err != nil {
				t.Fatal(err)
			}
			var value json.RawMessage
			if err := decoder.Decode(&value); err != nil {
				t.Fatal(err)
			}
			want = append(want, pair{name.(string), string(value)})

			var decoded any
			isString := json.Unmarshal(value, &decoded) == nil && value[0] == '"'
			if s, ok := jsonString(value); ok != isString || ok && s != decoded {
				t.Fatalf("the string in %s: %q, %t; want %q, %t", value, s, ok, decoded, isString)
			}
		}
		if !slices.Equal(got, want) {
			t.Fatalf("%q; want %q", got, want)
		}
	})
}

// FuzzAppendJSONString has encoding/json read what was written.
func FuzzAppendJSONString(f *testing.F) {
	for _, seed := range []string{"", "Ada", `"\/`, "\x00\b\f\n\r\t\x1f\x7f", "<>&\u2028\u2029", "é€😀\uFFFD\U0010FFFF"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if !utf8.ValidString(s) {
			return
		}
		text := appendJSONString(nil, s)
		if err := checkJSON(text); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		var back string
		if err := json.Unmarshal(text, &back); err != nil || back != s {
			t.Fatalf("%s comes back as %q, error %v; want %q", text, back, err, s)
		}
		if again, ok := jsonString(text); !ok || again != s {
			t.Fatalf("jsonString of %s is %q, %t", text, again, ok)
		}
	})
}
