package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/mail"
	"strings"
	"time"
	"unicode/utf8"
)

// A user as it is stored and sent.
type user struct {
	ID        string    // a UUID, in lower case with hyphens
	Email     string    // at most 254 bytes; unique, letter case ignored
	Name      string    // 1 to 255 characters
	CreatedAt time.Time // to the microsecond, as PostgreSQL keeps it
	UpdatedAt time.Time // moves forward with every update
}

// appendJSON appends the user as JSON. By hand, since this is what nearly every
// response consists of.
func (u *user) appendJSON(b []byte) []byte {
	b = append(b, `{"id":"`...)
	b = append(b, u.ID...)
	b = append(b, `","email":`...)
	b = appendJSONString(b, u.Email)
	b = append(b, `,"name":`...)
	b = appendJSONString(b, u.Name)
	b = append(b, `,"created_at":"`...)
	b = clampTime(u.CreatedAt).AppendFormat(b, timeFormat)
	b = append(b, `","updated_at":"`...)
	b = clampTime(u.UpdatedAt).AppendFormat(b, timeFormat)
	return append(b, `"}`...)
}

// A userStore keeps users. It is safe for concurrent use. Besides the errors that
// its methods name, it returns an *[apiError] that says what is the matter with the
// database, or what ctx ended with. An error of a write that matches
// [errAmbiguous] leaves open whether the write was made.
type userStore interface {
	// create stores a new user. The error is [errEmailTaken] if another user has the
	// address. With an id of an Idempotency-Key (see ids.go) it returns the
	// user that was created with this id before, if there is one, and the error is
	// [errKeyReused] if the key was used with another body.
	create(ctx context.Context, u newUser) (user, error)
	// get returns the user of that id, or [errNotFound].
	get(ctx context.Context, id string) (user, error)
	// find returns the user of that address, letter case ignored, or [errNotFound].
	find(ctx context.Context, email string) (user, error)
	// list returns a page of the list, newest first, or the users of q.ids, in their order.
	list(ctx context.Context, q listQuery) (*page, error)
	// update changes the fields that are not nil. The error is [errNotFound],
	// [errEmailTaken], or [errPrecondition] in a version that p.when excludes.
	update(ctx context.Context, p userPatch) (user, error)
	// delete removes the user of that id. The error is [errNotFound], or
	// [errPrecondition] in a version that when excludes.
	delete(ctx context.Context, id string, when preconditions) error
}

// A userInput is what clients write of a user; nil is a field that is not given.
type userInput struct{ email, name *string }

// An inputField is a field of a [userInput].
type inputField struct {
	name  string // of the JSON member, and of the column
	value **string
}

func (in *userInput) fields() []inputField {
	return []inputField{{"email", &in.email}, {"name", &in.name}}
}

// A newUser is what create stores. All fields are given.
type newUser struct {
	id string
	userInput
}

// A userPatch is what update changes.
type userPatch struct {
	id string
	userInput
	when preconditions
}

// readUserInput reads the body of r. Members other than email and name are
// ignored, so that a client may send back the user that it got.
func readUserInput(r *http.Request) (in userInput, err error) {
	body, err := io.ReadAll(r.Body) // which readBody has read and checked
	if err != nil {
		return in, err
	}
	seen := make(map[string]bool)
	err = walkObject(body, func(member string, value []byte) error {
		for _, field := range in.fields() {
			if field.name != member {
				continue
			}
			text, isText := jsonString(value)
			switch {
			case seen[member]:
				return unprocessable(member + " is given twice")
			case isText:
				*field.value = &text
			case string(value) != "null":
				return unprocessable(member + " must be a string")
			}
			seen[member] = true
		}
		return nil
	})
	if err != nil {
		return in, err
	}
	return in, in.validate()
}

// validate checks the fields that are there, and names the first bad one.
func (in userInput) validate() error {
	if in.email != nil && !validEmail(*in.email) {
		return invalid("Invalid email address")
	}
	if in.name != nil {
		switch name := *in.name; {
		case strings.TrimSpace(name) == "":
			return invalid("Name cannot be empty")
		case utf8.RuneCountInString(name) > 255:
			return invalid("Name cannot be longer than 255 characters")
		case strings.Contains(name, "\x00"): // which PostgreSQL can't store
			return invalid("Name cannot contain a NUL character")
		}
	}
	return nil
}

// validEmail reports whether s is an address and nothing else: no display
// name, no comment. 254 bytes is what a path of RFC 5321 has room for.
func validEmail(s string) bool {
	if len(s) > 254 {
		return false
	}
	addr, err := mail.ParseAddress(s)
	return err == nil && addr.Address == s
}

// users are the handlers of /api/v1/users.
type users struct{ store userStore }

const usersPath = "/api/v1/users"

func (h *users) create(w http.ResponseWriter, r *http.Request) error {
	in, err := readUserInput(r)
	switch {
	case err != nil:
		return err
	case in.email == nil:
		return unprocessable("Missing field: email")
	case in.name == nil:
		return unprocessable("Missing field: name")
	}
	key, err := parseIdempotencyKey(r.Header["Idempotency-Key"])
	if err != nil {
		return err
	}
	id := newUUID()
	if key != "" {
		id = keyedUUID(infoFrom(r.Context()).caller, key, in)
	}
	u, err := h.store.create(r.Context(), newUser{id, in})
	if err != nil {
		return err
	}
	w.Header().Set("Location", usersPath+"/"+u.ID)
	return writeUser(w, &u)
}

// list responds with a page of users, newest first, or with those whose ids are given.
func (h *users) list(w http.ResponseWriter, r *http.Request) error {
	q, err := parseListQuery(r.URL.RawQuery)
	if err != nil {
		return err
	}
	p, err := h.page(r.Context(), q)
	if err != nil {
		return err
	}
	if p.more {
		last := p.users[len(p.users)-1]
		w.Header().Set("Link", fmt.Sprintf(`<%s?limit=%d&cursor=%s>; rel="next"`, usersPath, q.limit, position{last.CreatedAt, last.ID}.cursor()))
	}
	writeBody(w, http.StatusOK, jsonType, p.json())
	return nil
}

// page returns the page that q asks for.
func (h *users) page(ctx context.Context, q listQuery) (*page, error) {
	switch {
	case q.email != "":
		u, err := h.store.find(ctx, q.email)
		if err == errNotFound || err == nil && (q.limit == 0 || q.offset > 0) {
			return newPage(nil, 0), nil
		}
		return newPage([]user{u}, 1), err
	case q.limit == 0:
		return newPage(nil, 0), nil
	default:
		return h.store.list(ctx, q)
	}
}

func (h *users) get(w http.ResponseWriter, r *http.Request) error {
	id, err := parseUUID(r.PathValue("id"))
	if err != nil {
		return err
	}
	u, err := h.store.get(r.Context(), id)
	if err != nil {
		return err
	}
	when := parsePreconditions(r.Header)
	switch {
	case !when.matched(&u):
		return errPrecondition
	case !when.noneMatched(&u):
		w.Header().Set("ETag", u.etag())
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	return writeUser(w, &u)
}

// update serves PUT and PATCH alike: both change the fields that are given.
func (h *users) update(w http.ResponseWriter, r *http.Request) error {
	id, err := parseUUID(r.PathValue("id"))
	if err != nil {
		return err
	}
	in, err := readUserInput(r)
	if err != nil {
		return err
	}
	u, err := h.store.update(r.Context(), userPatch{id, in, parsePreconditions(r.Header)})
	if err != nil {
		return err
	}
	return writeUser(w, &u)
}

func (h *users) delete(w http.ResponseWriter, r *http.Request) error {
	id, err := parseUUID(r.PathValue("id"))
	if err != nil {
		return err
	}
	if err := h.store.delete(r.Context(), id, parsePreconditions(r.Header)); err != nil {
		return err
	}
	w.WriteHeader(http.StatusOK)
	return nil
}

func writeUser(w http.ResponseWriter, u *user) error {
	w.Header()["Etag"] = []string{u.etag()}
	writeBody(w, http.StatusOK, jsonType, u.appendJSON(make([]byte, 0, 320)))
	return nil
}
