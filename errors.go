package main

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"strconv"
)

// How an error becomes an answer
//
// Whatever goes wrong returns an error up the stack: nobody but writeError
// writes an answer that is not a success. On its way an error is either a
// *failure, which says what the caller may know, or anything else, which is a
// 500 and stays in the log. A *failure has three readers: the kind is for the
// program, the message for the person, the cause for the log alone.

// A kind is a class of errors that share a status.
type kind int

const (
	kindInternal kind = iota // the zero value: what nobody foresaw
	kindDatabase
	kindMalformed
	kindInvalid
	kindUnauthorized
	kindForbidden
	kindNotFound
	kindMethod
	kindConflict
	kindPrecondition
	kindTooLarge
	kindMediaType
	kindShape
	kindKeyReused
	kindCallerGone
	kindUnavailable
	kindTimeout
)

// answers is the table from kind to status (RFC 9110, section 15), each with
// the message for failures that bring none of their own.
var answers = [...]struct {
	status  int
	message string
}{
	kindInternal:     {http.StatusInternalServerError, "Internal error"},
	kindDatabase:     {http.StatusInternalServerError, "Database error"},
	kindMalformed:    {http.StatusBadRequest, "Malformed request"},
	kindInvalid:      {http.StatusBadRequest, "Validation error"},
	kindUnauthorized: {http.StatusUnauthorized, "Missing bearer token"},
	kindForbidden:    {http.StatusForbidden, "Missing scope"},
	kindNotFound:     {http.StatusNotFound, "Resource not found"},
	kindMethod:       {http.StatusMethodNotAllowed, "Method not allowed"},
	kindConflict:     {http.StatusConflict, "Email already in use"},
	kindPrecondition: {http.StatusPreconditionFailed, "The user is not in the version that the precondition asks for"},
	kindTooLarge:     {http.StatusRequestEntityTooLarge, "Request body too large"},
	kindMediaType:    {http.StatusUnsupportedMediaType, "Content-Type must be application/json"},
	kindShape:        {http.StatusUnprocessableEntity, "Unexpected JSON"},
	kindKeyReused:    {http.StatusUnprocessableEntity, "The Idempotency-Key was used before, with another body"},
	kindCallerGone:   {499, "Client closed the request"}, // nginx's number, for the log: nobody reads this answer
	kindUnavailable:  {http.StatusServiceUnavailable, "Service unavailable"},
	kindTimeout:      {http.StatusServiceUnavailable, "The request took too long"},
}

// A failure is an error that knows its answer.
type failure struct {
	kind    kind
	message string      // for the caller; empty takes the kind's own
	header  http.Header // further fields of the answer; may be nil
	cause   error       // for the log; may be nil
}

// The failures that say all there is to say.
var (
	errNotFound     = &failure{kind: kindNotFound}
	errEmailTaken   = &failure{kind: kindConflict}
	errPrecondition = &failure{kind: kindPrecondition}
	errKeyReused    = &failure{kind: kindKeyReused}
	errSkipped      = &failure{kind: kindShape, message: "The database did not make this change",
		cause: errors.New("a trigger on the table has skipped the row")}
)

// invalid returns the failure of a value that breaks a rule: what names the
// field and the rule.
func invalid(what string) *failure {
	return &failure{kind: kindInvalid, message: "Validation error: " + what}
}

func (f *failure) Error() string {
	text := cmp.Or(f.message, answers[f.kind].message)
	if f.cause != nil {
		text += ": " + f.cause.Error()
	}
	return text
}

func (f *failure) Unwrap() error { return f.cause }

// asFailure returns the failure that err is or wraps, and makes one of the
// errors that have a meaning of their own. All others are internal errors.
func asFailure(err error) *failure {
	var f *failure
	switch {
	case errors.As(err, &f):
		return f
	case errors.Is(err, context.DeadlineExceeded):
		return &failure{kind: kindTimeout, cause: err}
	case errors.Is(err, context.Canceled): // only the caller's going away cancels a request
		return &failure{kind: kindCallerGone, cause: err}
	default:
		return &failure{kind: kindInternal, cause: err}
	}
}

// handlerFunc is a handler that returns its error instead of writing it, so
// that no return after an error can be forgotten.
type handlerFunc func(w http.ResponseWriter, r *http.Request) error

func (h handlerFunc) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if err := h(w, r); err != nil {
		writeError(w, r, err)
	}
}

// writeError answers r with err and leaves what the caller may not see to the
// access log. Those who ask for application/problem+json get the same facts in
// the form of RFC 9457. It must be called before the status has been written.
func writeError(w http.ResponseWriter, r *http.Request, err error) {
	f := asFailure(err)
	status, message := answers[f.kind].status, cmp.Or(f.message, answers[f.kind].message)
	x := exchangeOf(w)
	x.cause = f.cause

	h := w.Header()
	for name, values := range f.header {
		h[name] = values
	}
	if status == http.StatusServiceUnavailable {
		h.Set("Retry-After", "1") // seconds; RFC 9110, section 10.2.3
	}
	if r.ContentLength != 0 && !x.bodyRead && r.ProtoMajor == 1 {
		// Else net/http would wait for the rest of a body that nobody wants, before
		// it sends the answer.
		h.Set("Connection", "close")
	}
	h.Del("ETag") // those of a success that did not come about
	h.Del("Location")

	var body []byte
	contentType := jsonType
	if prefersProblem(r.Header["Accept"]) {
		contentType = []string{"application/problem+json"}
		body = append(body, `{"type":"about:blank","title":`...)
		body = appendJSONString(body, cmp.Or(http.StatusText(status), "Client Closed Request"))
		body = append(body, `,"status":`...)
		body = strconv.AppendInt(body, int64(status), 10)
		body = append(body, `,"detail":`...)
		body = appendJSONString(body, message)
		body = append(body, '}')
	} else {
		body = append(body, `{"error":{"message":`...)
		body = appendJSONString(body, message)
		body = append(body, `,"code":`...)
		body = strconv.AppendInt(body, int64(status), 10)
		body = append(body, `}}`...)
	}
	h.Add("Vary", "Accept")
	writeBody(w, status, contentType, body)
}

// writeBody sends a whole answer. The body has been made before the status is
// committed, so whatever fails in making it can still become an error.
func writeBody(w http.ResponseWriter, status int, contentType []string, body []byte) {
	h := w.Header()
	h["Content-Type"] = contentType
	h["Content-Length"] = []string{strconv.Itoa(len(body))}
	w.WriteHeader(status)
	w.Write(body) // an error here means that the caller is gone: nobody is left to tell
}
