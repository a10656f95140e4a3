package main

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// version is the updated_at of the user in microseconds since 1970: it changes with
// every update.
func (u *user) version() string {
	return strconv.FormatInt(clampTime(u.UpdatedAt).UnixMicro(), 10)
}

// etag is the version as a strong entity tag (RFC 9110, section 8.8.3).
func (u *user) etag() string { return `"` + u.version() + `"` }

// versionSQL is the SQL counterpart of [user.version].
const versionSQL = "(extract(epoch FROM LEAST(GREATEST(updated_at, timestamptz '0001-01-01 00:00:00Z'), " + lastUpdate + ")) * 1000000)::bigint::text"

// newUpdate is the updated_at of an update. It is the version, so it moves on even
// if the clock does not; where there is no later version, it comes back to the clock.
const (
	newUpdate  = "GREATEST(now(), CASE WHEN updated_at < " + lastUpdate + " THEN updated_at + interval '1 microsecond' END)"
	lastUpdate = "timestamptz '9999-12-31 23:59:59.999999Z'"
)

// preconditions are the If-Match and If-None-Match of a request (RFC 9110,
// section 13.1): comma-separated versions, nil where the field is absent.
type preconditions struct {
	match, noneMatch *string
}

// matched reports whether If-Match, if given, allows the version of the user.
func (p preconditions) matched(u *user) bool { return p.match == nil || u.isIn(*p.match) }

// noneMatched reports whether If-None-Match, if given, allows the version of the user.
func (p preconditions) noneMatched(u *user) bool { return p.noneMatch == nil || !u.isIn(*p.noneMatch) }

// isIn reports whether a list of comma-separated versions, or "*", has that of the user.
func (u *user) isIn(list string) bool {
	return list == "*" || slices.Contains(strings.Split(list, ","), u.version())
}

// check returns [errPrecondition] if the preconditions of a write exclude the version of
// the user.
func (p preconditions) check(u *user) error {
	if p.matched(u) && p.noneMatched(u) {
		return nil
	}
	return errPrecondition
}

// conditionsHold is true, in SQL, of a user in a version that [preconditions]
// allow, whose fields are the values of the two placeholders.
func conditionsHold(match, noneMatch string) string {
	return fmt.Sprintf("(%[2]s::text IS NULL OR %[1]s = ANY (string_to_array(%[2]s, ','))) AND "+
		"(%[3]s::text IS NULL OR %[3]s <> '*' AND %[1]s <> ALL (string_to_array(%[3]s, ',')))", versionSQL, match, noneMatch)
}

// parsePreconditions reads the two fields. If-None-Match compares weakly, so W/
// doesn't count there; for If-Match a weak tag never matches (section 8.8.3.2).
func parsePreconditions(h http.Header) preconditions {
	p := preconditions{parseTags(h["If-Match"], false), parseTags(h["If-None-Match"], true)}
	if p.match != nil && *p.match == "*" { // which every user matches
		p.match = nil
	}
	return p
}

// The grammar of a list of entity tags (RFC 9110, sections 5.6.1, 8.8.3 and 13.1.1),
// which may have empty elements, and that of a tag of ours.
const anyTag = `(?:(?:W/)?"[^\x00-\x20"\x7f]*"[ \t]*)?`

var (
	tagList    = regexp.MustCompile(`^` + anyTag + `(?:,[ \t]*` + anyTag + `)*$`)
	versionTag = regexp.MustCompile(`(W/)?"(-?\d+)"`)
)

// parseTags returns the versions in a list of entity tags, "*" for a field that is just
// that, and nil for none. A tag that can't be ours matches nothing, and so does what is no
// list of tags: a broken If-Match fails rather than overwrite what it meant to protect.
// Several lines are one list (section 5.3).
func parseTags(fields []string, weak bool) *string {
	if len(fields) == 0 {
		return nil
	}
	list := strings.Trim(strings.Join(fields, ", "), " \t")
	if list == "*" {
		return &list
	}
	if !tagList.MatchString(list) {
		list = ""
	}
	var versions []string
	for _, tag := range versionTag.FindAllStringSubmatch(list, -1) {
		if weak || tag[1] == "" {
			versions = append(versions, tag[2])
		}
	}
	list = strings.Join(versions, ",")
	return &list
}

// missError returns the error of a write that has changed no user.
func (s *pgStore) missError(ctx context.Context, id string, when preconditions) error {
	u, err := s.get(ctx, id)
	if err != nil {
		return err
	}
	return cmp.Or(when.check(&u), error(errSkipped))
}
