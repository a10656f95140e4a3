package main

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"net/mail"
	"strconv"
	"strings"
	"sync"
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

// timeFormat is RFC 3339 in UTC with all six digits that PostgreSQL keeps.
const timeFormat = "2006-01-02T15:04:05.000000Z"

// appendJSON appends the user as JSON. By hand, since this is what nearly
// every answer consists of.
func (u *user) appendJSON(b []byte) []byte {
	b = append(b, `{"id":"`...)
	b = append(b, u.ID...)
	b = append(b, `","email":`...)
	b = appendJSONString(b, u.Email)
	b = append(b, `,"name":`...)
	b = appendJSONString(b, u.Name)
	b = append(b, `,"created_at":"`...)
	b = spellable(u.CreatedAt).AppendFormat(b, timeFormat)
	b = append(b, `","updated_at":"`...)
	b = spellable(u.UpdatedAt).AppendFormat(b, timeFormat)
	return append(b, `"}`...)
}

// The first and the last microsecond of the years that timeFormat can spell.
var (
	firstTime = time.Date(1, 1, 1, 0, 0, 0, 0, time.UTC)
	lastTime  = time.Date(9999, 12, 31, 23, 59, 59, 999_999_000, time.UTC)
)

// spellable returns t in UTC, or, outside of the years that RFC 3339 can spell
// (section 5.6), the nearest time within: PostgreSQL stores infinity and years from
// 4714 BC to 294276.
func spellable(t time.Time) time.Time {
	switch {
	case t.Before(firstTime):
		return firstTime
	case t.After(lastTime):
		return lastTime
	}
	return t.UTC()
}

// version is what changes with every update of the user: its updated_at in
// microseconds since 1970.
func (u *user) version() string { return strconv.FormatInt(spellable(u.UpdatedAt).UnixMicro(), 10) }

// etag is the version as a strong entity tag (RFC 9110, section 8.8.3).
func (u *user) etag() string { return `"` + u.version() + `"` }

// A userInput is the body of a create or an update; nil is an absent field.
type userInput struct {
	email, name *string
}

// readUserInput reads the body of r. Members other than email and name are
// ignored, so that a client may send back the user that it got.
func readUserInput(w http.ResponseWriter, r *http.Request) (in userInput, err error) {
	body, err := readJSON(w, r)
	if err != nil {
		return in, err
	}
	var emailSeen, nameSeen bool
	err = walkObject(body, func(member string, value []byte) error {
		switch member {
		case "email":
			return setString(&in.email, &emailSeen, member, value)
		case "name":
			return setString(&in.name, &nameSeen, member, value)
		}
		return nil
	})
	var syntax *jsonError
	switch {
	case errors.As(err, &syntax):
		return in, &failure{kind: kindMalformed, message: syntax.Error()}
	case err == errNotObject:
		return in, &failure{kind: kindShape, message: "The body must be a JSON object"}
	}
	return in, err
}

// setString sets field to the string in value, or to nil for null.
func setString(field **string, seen *bool, name string, value []byte) error {
	if *seen {
		return &failure{kind: kindShape, message: name + " is given twice"}
	}
	*seen = true
	if string(value) == "null" {
		return nil
	}
	s, ok := jsonString(value)
	if !ok {
		return &failure{kind: kindShape, message: name + " must be a string"}
	}
	*field = &s
	return nil
}

// validate checks the fields that are there. The error is a failure that names
// the first bad one.
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
type users struct {
	store *store
	pages sharer[page]  // by query
	deep  chan struct{} // a semaphore of deepPage
}

const usersPath = "/api/v1/users"

func (h *users) create(w http.ResponseWriter, r *http.Request) error {
	in, err := readUserInput(w, r)
	if err != nil {
		return err
	}
	switch {
	case in.email == nil:
		return &failure{kind: kindShape, message: "Missing field: email"}
	case in.name == nil:
		return &failure{kind: kindShape, message: "Missing field: name"}
	}
	if err := in.validate(); err != nil {
		return err
	}
	key, err := parseIdempotencyKey(r.Header["Idempotency-Key"])
	if err != nil {
		return err
	}
	id := ""
	if key == "" {
		id = newUUID()
	} else {
		id = keyedUUID(exchangeOf(w).caller, key, *in.email, *in.name)
	}
	u, err := h.store.create(r.Context(), id, *in.email, *in.name)
	if err != nil {
		return err
	}
	w.Header().Set("Location", usersPath+"/"+u.ID)
	return writeUser(w, &u)
}

// A page is a part of the list, ready to be sent to all who asked for it.
type page struct {
	body []byte
	next string // the Link to the page behind it; empty for the last one
}

// list answers with a page of users, newest first.
func (h *users) list(w http.ResponseWriter, r *http.Request) error {
	q, err := parseListQuery(r.URL.RawQuery)
	if err != nil {
		return err
	}
	var p page
	switch {
	case q.email != nil: // who wants the same waits together in the store
		p, err = h.page(r.Context(), q)
	case q.offset >= deepOffset && q.limit > 0:
		p, err = h.deepPage(r.Context(), exchangeOf(w), q)
	default:
		p, err = h.pages.do(r.Context(), r.URL.RawQuery, func(ctx context.Context) (page, error) { return h.page(ctx, q) })
	}
	if err != nil {
		return err
	}
	if p.next != "" {
		w.Header().Set("Link", p.next)
	}
	writeBody(w, http.StatusOK, jsonType, p.body)
	return nil
}

// deepPage is page for a deep list. They are read one at a time, and after each, none is
// for as long as it took: so all of them take half of one processor, and one connection.
// A request that waits for that is not in flight.
func (h *users) deepPage(ctx context.Context, x *exchange, q listQuery) (p page, err error) {
	x.leave()
	select {
	case h.deep <- struct{}{}:
	case <-ctx.Done():
		return p, ctx.Err()
	}
	start := time.Now()
	defer func() { time.AfterFunc(time.Since(start), func() { <-h.deep }) }()
	if err := x.enter(); err != nil {
		return p, err
	}
	return h.page(ctx, q)
}

// page returns the page that q asks for.
func (h *users) page(ctx context.Context, q listQuery) (p page, err error) {
	list, err := h.read(ctx, q)
	if err != nil {
		return p, err
	}
	if q.limit > 0 && int64(len(list)) > q.limit { // the one more that was asked for
		list = list[:q.limit]
		last := list[q.limit-1]
		p.next = fmt.Sprintf(`<%s?limit=%d&cursor=%s>; rel="next"`, usersPath, q.limit, position{last.CreatedAt, last.ID}.cursor())
	}
	p.body = append(make([]byte, 0, 256*(len(list)+1)), '[')
	for i := range list {
		if i > 0 {
			p.body = append(p.body, ',')
		}
		p.body = list[i].appendJSON(p.body)
	}
	p.body = append(p.body, ']')
	return p, nil
}

// read returns the users that q asks for, and one more if there is one.
func (h *users) read(ctx context.Context, q listQuery) ([]user, error) {
	if q.email == nil {
		if q.limit == 0 {
			return nil, nil
		}
		return h.store.list(ctx, q.limit+1, q.offset, q.after)
	}
	u, err := h.store.find(ctx, *q.email)
	switch {
	case err == errNotFound:
		return nil, nil
	case err != nil || q.limit == 0 || q.offset > 0:
		return nil, err
	}
	return []user{u}, nil
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
	in, err := readUserInput(w, r)
	if err != nil {
		return err
	}
	if err := in.validate(); err != nil {
		return err
	}
	u, err := h.store.update(r.Context(), id, in.email, in.name, parsePreconditions(r.Header))
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
	w.Header().Set("Content-Length", "0")
	w.WriteHeader(http.StatusOK)
	return nil
}

// bodies are buffers for one user each. A user has a few hundred bytes, and
// never more than some thousand.
var bodies = sync.Pool{New: func() any { return new([]byte) }}

func writeUser(w http.ResponseWriter, u *user) error {
	w.Header()["Etag"] = []string{u.etag()}
	body := bodies.Get().(*[]byte)
	*body = u.appendJSON((*body)[:0])
	writeBody(w, http.StatusOK, jsonType, *body)
	bodies.Put(body) // net/http has copied it, or sent it
	return nil
}

// preconditions are the If-Match and If-None-Match of a request (RFC 9110,
// section 13.1): comma-separated versions, nil where the field is absent.
type preconditions struct {
	match, noneMatch *string
}

// matched reports whether If-Match, if given, allows the version of the user.
func (p preconditions) matched(u *user) bool {
	return p.match == nil || holds(*p.match, u.version())
}

// noneMatched reports whether If-None-Match, if given, allows the version of the user.
func (p preconditions) noneMatched(u *user) bool {
	return p.noneMatch == nil || !holds(*p.noneMatch, u.version())
}

// whyNot returns why a write has left out a user who is there.
func (p preconditions) whyNot(u *user) error {
	if p.matched(u) && p.noneMatched(u) {
		return errSkipped
	}
	return errPrecondition
}

// holds reports whether a list of comma-separated versions, or "*", has version.
func holds(list, version string) bool {
	if list == "*" {
		return true
	}
	for v := range strings.SplitSeq(list, ",") {
		if v == version {
			return true
		}
	}
	return false
}

// parsePreconditions reads the two fields. A tag that can't be one of ours
// matches nothing, and so does anything that is no list of tags: a request with a
// broken If-Match fails rather than overwrite what it meant to protect.
func parsePreconditions(h http.Header) (p preconditions) {
	if fields := h["If-Match"]; len(fields) > 0 {
		if list := strings.Join(parseTags(fields, false), ","); list != "*" { // which every user matches
			p.match = &list
		}
	}
	if fields := h["If-None-Match"]; len(fields) > 0 {
		list := strings.Join(parseTags(fields, true), ",")
		p.noneMatch = &list
	}
	return p
}

// parseTags returns the versions in a list of entity tags, "*" alone for a field
// that is just that, and none for what is no such list (RFC 9110, sections 5.6.1,
// 8.8.3 and 13.1.1; several lines are one list by section 5.3). If-None-Match
// compares weakly, so W/ doesn't count there; for If-Match a weak tag never
// matches (section 8.8.3.2).
func parseTags(fields []string, weak bool) (versions []string) {
	const space = " \t"
	rest := strings.Trim(strings.Join(fields, ", "), space)
	if rest == "*" {
		return []string{rest}
	}
	for {
		if tag, isWeak := strings.CutPrefix(rest, "W/"); isWeak || strings.HasPrefix(rest, `"`) { // else it is an empty element
			tag, opened := strings.CutPrefix(tag, `"`)
			tag, after, closed := strings.Cut(tag, `"`)
			if !opened || !closed || strings.ContainsFunc(tag, func(c rune) bool { return c <= ' ' || c == 0x7f }) {
				return nil
			}
			if _, err := strconv.ParseInt(tag, 10, 64); err == nil && (weak || !isWeak) { // no other can be one of ours
				versions = append(versions, tag)
			}
			rest = strings.TrimLeft(after, space)
		}
		if rest == "" {
			return versions
		}
		after, ok := strings.CutPrefix(rest, ",")
		if !ok {
			return nil
		}
		rest = strings.TrimLeft(after, space)
	}
}

// newUUID returns a new UUID of version 7 (RFC 9562, section 5.7): the time in
// milliseconds, so that ids made one after the other stand side by side in the
// index, then 74 random bits.
func newUUID() string {
	var b [16]byte
	rand.Read(b[6:]) // never fails: crypto/rand ends the program instead
	ms := time.Now().UnixMilli()
	binary.BigEndian.PutUint32(b[:], uint32(ms>>16))
	binary.BigEndian.PutUint16(b[4:], uint16(ms))
	b[6] = b[6]&0x0f | 0x70 // version
	b[8] = b[8]&0x3f | 0x80 // variant
	return formatUUID(b)
}

func formatUUID(b [16]byte) string {
	s := make([]byte, 0, 36)
	for i, part := range [][]byte{b[:4], b[4:6], b[6:8], b[8:10], b[10:]} {
		if i > 0 {
			s = append(s, '-')
		}
		s = hex.AppendEncode(s, part)
	}
	return string(s)
}

// parseUUID returns the UUID that s spells, of any version, in lower case with
// hyphens. Besides that form of RFC 9562, section 4, in any letter case, it
// takes the others that the original did: without hyphens, in braces, as a URN.
func parseUUID(s string) (string, error) {
	digits := strings.TrimPrefix(s, "urn:uuid:")
	if len(s) == 38 && s[0] == '{' && s[37] == '}' {
		digits = s[1:37]
	}
	if len(digits) == 36 && digits[8] == '-' && digits[13] == '-' && digits[18] == '-' && digits[23] == '-' {
		digits = digits[:8] + digits[9:13] + digits[14:18] + digits[19:23] + digits[24:]
	}
	var b [16]byte
	if len(digits) != 32 {
		return "", invalid("id must be a UUID")
	}
	if _, err := hex.Decode(b[:], []byte(digits)); err != nil {
		return "", invalid("id must be a UUID")
	}
	return formatUUID(b), nil
}
