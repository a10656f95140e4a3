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
	"unicode/utf8"
)

// JSON comes in by readJSON and walkObject, and goes out by appendJSONString.
//
// encoding/json alone is too kind for a service that must not guess: it takes
// the last of two members of one name, matches names in any letter case, and
// turns broken UTF-8 and lone surrogates into U+FFFD. So the standard library
// judges the syntax here, and the walk over what it found valid is ours.

// errNotObject is what [walkObject] says of valid JSON that is no object.
var errNotObject = errors.New("a JSON object is expected")

// A jsonError is text that is not JSON (RFC 8259). Its message is meant for
// whoever sent the text.
type jsonError struct {
	offset int64 // the byte at which it became clear, from 1
	reason string
}

func (e *jsonError) Error() string {
	return fmt.Sprintf("Malformed JSON at byte %d: %s", e.offset, e.reason)
}

// walkObject calls member for each member of the JSON object that data holds,
// in its order, with the unescaped name and the raw value without surrounding
// white space. It stops at the first error of member and returns it.
//
// Before the first call, all of data has been found to be one valid JSON value
// in UTF-8, without lone surrogates; if not, the error is a [*jsonError]. For
// a value that is not an object it is [errNotObject].
func walkObject(data []byte, member func(name string, value []byte) error) error {
	if err := checkJSON(data); err != nil {
		return err
	}
	i := skipSpace(data, 0)
	if data[i] != '{' {
		return errNotObject
	}
	for i = skipSpace(data, i+1); data[i] != '}'; i = skipSpace(data, i) {
		if data[i] == ',' {
			i = skipSpace(data, i+1)
		}
		end := skipValue(data, i)
		name, _ := jsonString(data[i:end])
		i = skipSpace(data, end)
		i = skipSpace(data, i+1) // past the colon
		end = skipValue(data, i)
		if err := member(name, data[i:end]); err != nil {
			return err
		}
		i = end
	}
	return nil
}

// walkUniqueObject is [walkObject] for objects in which a name given twice is
// an attack on whoever reads the other one: RFC 7515, section 4, and RFC 7519,
// section 4, let a receiver refuse those.
func walkUniqueObject(data []byte, member func(name string, value []byte) error) error {
	seen := make(map[string]bool, 8)
	return walkObject(data, func(name string, value []byte) error {
		if seen[name] {
			return errors.New("a member is given twice")
		}
		seen[name] = true
		return member(name, value)
	})
}

// jsonString returns the string that a valid JSON value holds, and reports
// whether it is a string at all.
func jsonString(value []byte) (s string, ok bool) {
	if len(value) < 2 || value[0] != '"' {
		return "", false
	}
	if bytes.IndexByte(value, '\\') < 0 {
		return string(value[1 : len(value)-1]), true
	}
	err := json.Unmarshal(value, &s)
	return s, err == nil
}

// checkJSON reports with a [*jsonError] what keeps data from being one JSON value.
func checkJSON(data []byte) error {
	if !utf8.Valid(data) {
		i := 0
		for r, n := utf8.DecodeRune(data); r != utf8.RuneError || n > 1; r, n = utf8.DecodeRune(data[i:]) {
			i += n
		}
		return &jsonError{int64(i + 1), "the text is not UTF-8"}
	}
	if !json.Valid(data) {
		var syntax *json.SyntaxError
		if err := json.Unmarshal(data, new(json.RawMessage)); errors.As(err, &syntax) {
			return &jsonError{syntax.Offset, syntax.Error()}
		}
		return &jsonError{0, "the text is not JSON"}
	}
	for i := bytes.IndexByte(data, '\\'); i >= 0 && i < len(data); i++ {
		if data[i] != '\\' {
			continue
		}
		i++ // in valid JSON, a backslash stands in a string and something follows it
		if data[i] != 'u' {
			continue
		}
		switch unit := hex4(data[i+1:]); {
		case unit < 0xD800 || unit > 0xDFFF:
			i += 4
		case unit < 0xDC00 && data[i+5] == '\\' && data[i+6] == 'u' && hex4(data[i+7:])&0xFC00 == 0xDC00:
			i += 10
		default: // RFC 8259, section 8.2: what a receiver makes of these is unpredictable
			return &jsonError{int64(i), "a surrogate without its other half"}
		}
	}
	return nil
}

// hex4 returns the number that the first four bytes, hexadecimal digits, spell.
func hex4(b []byte) uint64 {
	n, _ := strconv.ParseUint(string(b[:4]), 16, 32)
	return n
}

// skipSpace returns the index of the first byte from i on that is not white space.
func skipSpace(data []byte, i int) int {
	for i < len(data) && (data[i] == ' ' || data[i] == '\n' || data[i] == '\t' || data[i] == '\r') {
		i++
	}
	return i
}

// skipValue returns the index behind the value that begins at i of valid JSON.
func skipValue(data []byte, i int) int {
	for depth := 0; i < len(data); i++ {
		switch data[i] {
		case '"':
			for i++; data[i] != '"'; i++ {
				if data[i] == '\\' {
					i++
				}
			}
			if depth == 0 {
				return i + 1
			}
		case '{', '[':
			depth++
		case '}', ']':
			if depth--; depth == 0 {
				return i + 1
			}
			if depth < 0 { // the end of what holds a number, true, false or null
				return i
			}
		case ',', ':', ' ', '\n', '\t', '\r':
			if depth == 0 {
				return i
			}
		}
	}
	return i
}

// readJSON returns the body of r, which must announce itself as JSON. The
// failures are those of the media type, the length, and of a body that does
// not arrive by the deadline of the request. With the body read, the request
// takes its place in flight, or fails: see limitInFlight.
func readJSON(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	if !isJSON(r.Header["Content-Type"]) {
		return nil, &failure{kind: kindMediaType, header: http.Header{"Accept": {"application/json"}}}
	}
	for _, coding := range r.Header["Content-Encoding"] {
		if coding != "" && !strings.EqualFold(coding, "identity") {
			return nil, &failure{kind: kindMediaType, message: "Content-Encoding is not supported",
				header: http.Header{"Accept-Encoding": {"identity"}}}
		}
	}
	// The deadline of a context does not reach a Read that waits for a slow
	// sender. It is lifted when all is there: by TLS, net/http goes on reading, to
	// notice a caller who goes away, and takes a deadline that passes for just that.
	control := http.NewResponseController(w)
	if deadline, ok := r.Context().Deadline(); ok {
		control.SetReadDeadline(deadline)
	}
	body, err := io.ReadAll(r.Body)
	if err == nil {
		control.SetReadDeadline(time.Time{})
		exchangeOf(w).bodyRead = true
	}
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return nil, bodyTooLarge(tooLarge.Limit)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, &failure{kind: kindTimeout, message: "The body did not arrive in time", cause: err}
	case err != nil && r.Context().Err() != nil:
		return nil, r.Context().Err()
	case err != nil: // cut off, or framed wrongly
		return nil, &failure{kind: kindMalformed, message: "The body could not be read", cause: err}
	case len(body) == 0:
		return nil, &failure{kind: kindMalformed, message: "The body is empty: a JSON object is expected"}
	}
	return body, exchangeOf(w).enter()
}

// isJSON reports whether a Content-Type field is application/json or a type
// with the suffix +json (RFC 6839). Parameters don't matter, not even broken ones.
func isJSON(field []string) bool {
	if len(field) != 1 {
		return false
	}
	if field[0] == "application/json" {
		return true
	}
	name, _, _ := strings.Cut(field[0], ";")
	mediaType, _, err := mime.ParseMediaType(name)
	return err == nil && (mediaType == "application/json" || strings.Contains(mediaType, "/") && strings.HasSuffix(mediaType, "+json"))
}

// appendJSONString appends s, which is UTF-8, as a JSON string: only what RFC
// 8259, section 7, demands is escaped, so <, > and & stay readable.
func appendJSONString(b []byte, s string) []byte {
	const hex = "0123456789abcdef"
	b = append(b, '"')
	from := 0
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c >= ' ' && c != '"' && c != '\\' {
			continue
		}
		b = append(b, s[from:i]...)
		from = i + 1
		switch c {
		case '"', '\\':
			b = append(b, '\\', c)
		case '\n':
			b = append(b, '\\', 'n')
		case '\r':
			b = append(b, '\\', 'r')
		case '\t':
			b = append(b, '\\', 't')
		default:
			b = append(b, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
		}
	}
	b = append(b, s[from:]...)
	return append(b, '"')
}
