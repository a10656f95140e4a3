package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
)

// How an error becomes a response
//
// Whatever goes wrong returns an error up the stack, and writeError alone writes
// responses that are no success. An error is either an *apiError, which says what
// the client may know, or anything else, which is a 500 and stays in the log. An
// *apiError has three readers: the kind is for the program, the message for the
// person, the cause for the log.

// A kind is a class of errors that share a status (RFC 9110, section 15).
type kind struct {
	status  int
	message string // of errors that bring none of their own
}

var (
	kindInternal      = kind{http.StatusInternalServerError, "Internal error"}
	kindDatabase      = kind{http.StatusInternalServerError, "Database error"}
	kindMalformed     = kind{http.StatusBadRequest, "Malformed request"}
	kindInvalid       = kind{http.StatusBadRequest, "Validation error"}
	kindUnauthorized  = kind{http.StatusUnauthorized, "Missing bearer token"}
	kindForbidden     = kind{http.StatusForbidden, "Missing scope"}
	kindNotFound      = kind{http.StatusNotFound, "Resource not found"}
	kindMethod        = kind{http.StatusMethodNotAllowed, "Method not allowed"}
	kindConflict      = kind{http.StatusConflict, "Email already in use"}
	kindPrecondition  = kind{http.StatusPreconditionFailed, "The user is not in the version that the precondition asks for"}
	kindTooLarge      = kind{http.StatusRequestEntityTooLarge, "Request body too large"}
	kindMediaType     = kind{http.StatusUnsupportedMediaType, "Content-Type must be application/json"}
	kindUnprocessable = kind{http.StatusUnprocessableEntity, "Unexpected JSON"}
	kindTooMany       = kind{http.StatusTooManyRequests, "Too many requests of this caller"}
	kindClientGone    = kind{499, "Client closed the request"} // nginx's number, for the log: nobody reads this response
	kindUnavailable   = kind{http.StatusServiceUnavailable, "Service unavailable"}
	kindTimeout       = kind{http.StatusServiceUnavailable, "The request took too long"}
)

// An apiError is an error that knows its response.
type apiError struct {
	kind    kind
	message string      // for the client; empty takes the kind's own
	header  http.Header // further fields of the response; may be nil
	cause   error       // for the log; may be nil
}

// The errors that say all there is to say.
var (
	errNotFound     = &apiError{kind: kindNotFound}
	errEmailTaken   = &apiError{kind: kindConflict}
	errPrecondition = &apiError{kind: kindPrecondition}
	errKeyReused    = &apiError{kind: kindUnprocessable, message: "The Idempotency-Key was used before, with another body"}
	errSkipped      = &apiError{kind: kindUnprocessable, message: "The database did not make this change",
		cause: errors.New("a trigger on the table has skipped the row")}
)

// errAmbiguous matches the errors of a write that may have been made all the same:
// its response from PostgreSQL was lost, or was not waited for.
var errAmbiguous = errors.New("the statement may have been executed")

// invalid returns the error of a value that breaks a rule: what names the field
// and the rule.
func invalid(what string) *apiError {
	return &apiError{kind: kindInvalid, message: "Validation error: " + what}
}

func (e *apiError) Error() string {
	text := e.text()
	if e.cause != nil {
		text += ": " + e.cause.Error()
	}
	return text
}

// text returns the message for the client.
func (e *apiError) text() string {
	text := cmp.Or(e.message, e.kind.message)
	if errors.Is(e.cause, errAmbiguous) {
		text += "; the change may have been made all the same"
	}
	return text
}

func (e *apiError) Unwrap() error { return e.cause }

// asAPIError returns the *apiError that err is or wraps, and makes one of the
// errors that have a meaning of their own. All others are internal errors.
func asAPIError(err error) *apiError {
	var e *apiError
	switch {
	case errors.As(err, &e):
		return e
	case errors.Is(err, context.DeadlineExceeded):
		return &apiError{kind: kindTimeout, cause: err}
	case errors.Is(err, context.Canceled): // a request is cancelled only when its client has gone
		return &apiError{kind: kindClientGone, cause: err}
	default:
		return &apiError{kind: kindInternal, cause: err}
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

// writeError responds to r with err and leaves to the access log what the client
// may not see. Clients that ask for application/problem+json get the same facts
// in the form of RFC 9457.
func writeError(w http.ResponseWriter, r *http.Request, err error) {
	e := asAPIError(err)
	status := cmp.Or(e.kind.status, http.StatusInternalServerError)
	infoFrom(r.Context()).failure = e

	h := w.Header()
	for name, values := range e.header {
		h[name] = values
	}
	if status == http.StatusServiceUnavailable || status == http.StatusTooManyRequests {
		h.Set("Retry-After", "1") // seconds; RFC 9110, section 10.2.3
	}
	for _, name := range []string{"ETag", "Location", "Link"} { // of a success that did not come about
		h.Del(name)
	}
	h.Add("Vary", "Accept")

	message := appendJSONString(nil, e.text())
	contentType, body := jsonType, fmt.Appendf(nil, `{"error":{"message":%s,"code":%d}}`, message, status)
	if prefersProblem(r.Header["Accept"]) {
		title := cmp.Or(http.StatusText(status), e.kind.message)
		contentType = []string{"application/problem+json"}
		body = fmt.Appendf(nil, `{"type":"about:blank","title":%q,"status":%d,"detail":%s}`, title, status, message)
	}
	writeBody(w, status, contentType, body)
}
