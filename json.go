package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode/utf16"
	"unicode/utf8"
)

// JSON comes in by readAll and walkObject, and goes out by appendJSONString and
// clampTime.
//
// encoding/json alone is too kind for a service that must not guess: it takes the last
// of two members of one name, matches names in any letter case, and turns broken UTF-8
// and lone surrogates into U+FFFD. So it judges the syntax here, and no more.

// errNotObject is the error of [walkObject] for valid JSON that is no object.
var errNotObject = unprocessable("A JSON object is expected")

// walkObject calls member for each member of the JSON object that data holds, in its
// order, with the unescaped name and the raw value without surrounding white space. It
// stops at the first error of member and returns it. Before the first call, all of data
// has passed [checkJSON].
func walkObject(data []byte, member func(name string, value []byte) error) error {
	if err := checkJSON(data); err != nil {
		return err
	}
	data = bytes.TrimSpace(data)
	if data[0] != '{' {
		return errNotObject
	}
	depth, begin, colon := 0, 1, 0 // colon is 0 until there is one in the member from begin on
	for i := 0; i < len(data); i++ {
		switch c := data[i]; {
		case c == '"': // to the end of the string, since nothing in it counts
			for i++; data[i] != '"'; i++ {
				if data[i] == '\\' {
					i++
				}
			}
		case c == '{' || c == '[':
			depth++
		case c == ':' && depth == 1:
			colon = i
		case (c == ',' || c == '}') && depth == 1 && colon > 0:
			name, _ := jsonString(bytes.TrimSpace(data[begin:colon]))
			if err := member(name, bytes.TrimSpace(data[colon+1:i])); err != nil {
				return err
			}
			begin, colon = i+1, 0
		case c == '}' || c == ']':
			depth--
		}
	}
	return nil
}

// uniqueMembers returns the values of a JSON object by the exact names. A name given
// twice is an error: in a token or a key it is an attack on a reader that takes the other
// one. RFC 7515, section 4, and RFC 7519, section 4, let a receiver refuse it.
func uniqueMembers(data []byte) (map[string][]byte, error) {
	members := make(map[string][]byte)
	err := walkObject(data, func(name string, value []byte) error {
		if members[name] != nil {
			return errors.New("a member is given twice")
		}
		members[name] = value
		return nil
	})
	return members, err
}

// jsonString returns the string that a valid JSON value is, and whether it is one.
func jsonString(value []byte) (s string, ok bool) {
	if len(value) == 0 || value[0] != '"' {
		return "", false
	}
	if bytes.IndexByte(value, '\\') < 0 { // nearly always, and much faster
		return string(value[1 : len(value)-1]), true
	}
	err := json.Unmarshal(value, &s)
	return s, err == nil
}

// checkJSON returns an error unless data is one JSON value (RFC 8259), in UTF-8 and
// without lone surrogates.
func checkJSON(data []byte) error {
	if !utf8.Valid(data) {
		i := bytes.IndexByte(bytes.ToValidUTF8(data, []byte{0xff}), 0xff) // which UTF-8 never has
		return malformedJSON(int64(i+1), "the text is not UTF-8")
	}
	if !json.Valid(data) {
		syntax := json.Unmarshal(data, new(any)).(*json.SyntaxError) // which comes before any other error
		return malformedJSON(syntax.Offset, syntax.Error())
	}
	for i := bytes.IndexByte(data, '\\'); i >= 0 && i < len(data); i++ {
		switch unit := escapedUnit(data[i:]); {
		case data[i] != '\\':
		case !utf16.IsSurrogate(unit):
			i++ // past what the backslash escapes: it may be another one
		case utf16.DecodeRune(unit, escapedUnit(data[i+6:])) == utf8.RuneError:
			// RFC 8259, section 8.2: what a receiver makes of these is unpredictable
			return malformedJSON(int64(i+1), "a surrogate without its other half")
		default:
			i += 11
		}
	}
	return nil
}

// unprocessable returns the error of JSON in the wrong shape.
func unprocessable(message string) *apiError {
	return &apiError{kind: kindUnprocessable, message: message}
}

// malformedJSON returns the error of what is wrong at a byte, counted from 1.
func malformedJSON(offset int64, reason string) error {
	return &apiError{kind: kindMalformed, message: fmt.Sprintf("Malformed JSON at byte %d: %s", offset, reason)}
}

// escapedUnit returns the UTF-16 code unit of the \u escape that begins valid JSON,
// and 0 where none does.
func escapedUnit(text []byte) rune {
	if !bytes.HasPrefix(text, []byte(`\u`)) {
		return 0
	}
	unit, _ := strconv.ParseUint(string(text[2:6]), 16, 16)
	return rune(unit)
}

// readAll returns the body of r. The errors are those of [checkBodyType], and of a body
// that is longer than max bytes, late by the deadline of the request, cut off, or empty.
func readAll(w http.ResponseWriter, r *http.Request, max int64) ([]byte, error) {
	tooLarge := &apiError{kind: kindTooLarge, message: fmt.Sprintf("The body is larger than %d bytes", max)}
	// These two come before a client that waits for a 100 sends it.
	if err := checkBodyType(r.Header); err != nil {
		return nil, err
	}
	if r.ContentLength > max {
		return nil, tooLarge
	}
	// The deadline of a context does not end a Read that waits for a slow client. net/http
	// lifts this one at the end of the body.
	deadline, _ := r.Context().Deadline() // zero if there is none
	http.NewResponseController(w).SetReadDeadline(deadline)
	body, err := io.ReadAll(io.LimitReader(r.Body, max+1))
	switch {
	case int64(len(body)) > max:
		return nil, tooLarge
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, &apiError{kind: kindTimeout, message: "The body did not arrive in time", cause: err}
	case err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && r.Context().Err() != nil:
		return nil, r.Context().Err()
	case err != nil:
		return nil, &apiError{kind: kindMalformed, message: "The body could not be read", cause: err}
	}
	infoFrom(r.Context()).bodyRead = true
	if len(body) == 0 {
		return nil, &apiError{kind: kindMalformed, message: "The body is empty: a JSON object is expected"}
	}
	return body, nil
}

// checkBodyType returns the error of a body that does not announce itself as JSON.
func checkBodyType(h http.Header) error {
	if !isJSON(h["Content-Type"]) {
		return &apiError{kind: kindMediaType, header: http.Header{"Accept": {"application/json"}}}
	}
	if coding := strings.Join(h["Content-Encoding"], ","); coding != "" && !strings.EqualFold(coding, "identity") {
		return &apiError{kind: kindMediaType, message: "Content-Encoding is not supported", header: http.Header{"Accept-Encoding": {"identity"}}}
	}
	return nil
}

// isJSON reports whether a Content-Type field is application/json or a type with the
// suffix +json (RFC 6839), whatever its parameters.
func isJSON(field []string) bool {
	if len(field) != 1 {
		return false
	}
	name, _, _ := strings.Cut(field[0], ";")
	mediaType, _, err := mime.ParseMediaType(name)
	return err == nil && (mediaType == "application/json" || strings.Contains(mediaType, "/") && strings.HasSuffix(mediaType, "+json"))
}

// appendJSONString appends s, which is UTF-8, as a JSON string: only what RFC
// 8259, section 7, demands is escaped, so <, > and & stay readable.
func appendJSONString(b []byte, s string) []byte {
	b = append(b, '"')
	from := 0
	for i := range len(s) {
		c := s[i]
		if c >= ' ' && c != '"' && c != '\\' {
			continue
		}
		b = append(b, s[from:i]...)
		from = i + 1
		if short, ok := shortEscapes[c]; ok {
			b = append(b, '\\', short)
		} else {
			b = fmt.Appendf(b, `\u%04x`, c)
		}
	}
	b = append(b, s[from:]...)
	return append(b, '"')
}

var shortEscapes = map[byte]byte{'"': '"', '\\': '\\', '\n': 'n', '\r': 'r', '\t': 't'}

// timeFormat is RFC 3339 in UTC with all six digits that PostgreSQL keeps.
const timeFormat = "2006-01-02T15:04:05.000000Z"

// The first and the last microsecond that timeFormat can spell.
var (
	firstTime = time.Date(1, 1, 1, 0, 0, 0, 0, time.UTC)
	lastTime  = time.Date(9999, 12, 31, 23, 59, 59, 999_999_000, time.UTC)
)

// clampTime returns t in UTC, or the nearest time that timeFormat can spell. A row that
// was made by somebody else may have infinity or a distant year, and must not hide the others.
func clampTime(t time.Time) time.Time {
	switch {
	case t.Before(firstTime):
		return firstTime
	case t.After(lastTime):
		return lastTime
	}
	return t.UTC()
}
