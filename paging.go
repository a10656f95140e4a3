package main

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash/crc32"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/lib/pq"
)

// A listQuery is the part of the list that a request asks for.
type listQuery struct {
	limit, offset int64
	after         position // where the page before ended; the zero position is the start of the list
	email         string   // empty: everybody
	ids           string   // with commas between them, not a slice, so that queries can be compared; empty: everybody
}

const maxIDs = 1000 // in one query

// parseListQuery reads the query of a request for the list. Unknown parameters are
// ignored, well formed or not; the error names the parameter that is wrong.
func parseListQuery(query string) (listQuery, error) {
	q, given := listQuery{limit: 20}, make(map[string]bool)
	var ids []string
	for parameter := range strings.SplitSeq(query, "&") {
		name, value, _ := strings.Cut(parameter, "=")
		name, _ = url.QueryUnescape(name)
		value, err := url.QueryUnescape(value)
		if err != nil || strings.Contains(parameter, ";") {
			value = "" // which no parameter takes
		}
		switch name {
		case "limit":
			q.limit, err = parseCount(name, value, 1000)
		case "offset":
			q.offset, err = parseCount(name, value, 1<<62) // so that sums with it fit
		case "cursor":
			q.after, err = parseCursor(value)
		case "email":
			if q.email = value; value == "" || len(value) > 4*255 || !utf8.ValidString(value) || strings.Contains(value, "\x00") {
				err = invalid("email must be an address to look for")
			}
		case "id":
			value, err = parseUUID(value)
			ids = append(ids, value)
		default:
			continue
		}
		if err != nil {
			return q, err
		}
		if given[name] && name != "id" {
			return q, invalid(name + " is given twice")
		}
		given[name] = true
	}
	switch {
	case len(ids) > 0 && len(given) > 1:
		return q, invalid("id goes with no other parameter")
	case len(ids) > maxIDs:
		return q, invalid(fmt.Sprintf("id may be given %d times at most", maxIDs))
	case len(ids) > 0:
		q.limit, q.ids = maxIDs, strings.Join(ids, ",")
	}
	if given["cursor"] && (given["offset"] || given["email"]) {
		return q, invalid("cursor goes with neither offset nor email")
	}
	return q, nil
}

// parseCount reads a query parameter of decimal digits, from 0 to most.
func parseCount(name, s string, most int64) (int64, error) {
	n, err := strconv.ParseUint(s, 10, 63)
	if err != nil || int64(n) > most {
		return 0, invalid(fmt.Sprintf("%s must be a number from 0 to %d", name, most))
	}
	return int64(n), nil
}

// A position is the place in the list right behind the user with these values.
type position struct {
	createdAt time.Time
	id        string
}

// cursor returns the position as clients see it: 8 bytes of microseconds since 1970,
// modulo 2^64, 16 of id, 4 of checksum. The checksum catches a mangled cursor; forging
// one gains nothing that an offset would not give.
func (p position) cursor() string {
	micros := p.createdAt.Unix()*1e6 + int64(p.createdAt.Nanosecond()/1e3) // wraps around in the year 294247
	b := binary.BigEndian.AppendUint64(make([]byte, 0, 28), uint64(micros))
	id, _ := hex.DecodeString(strings.ReplaceAll(p.id, "-", ""))
	b = append(b, id...)
	b = binary.BigEndian.AppendUint32(b, crc32.ChecksumIEEE(b))
	return base64.RawURLEncoding.EncodeToString(b)
}

// parseCursor is the inverse of [position.cursor].
func parseCursor(s string) (position, error) {
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	if err != nil || len(s) != 38 || len(b) != 28 || binary.BigEndian.Uint32(b[24:]) != crc32.ChecksumIEEE(b[:24]) {
		return position{}, invalid("cursor is damaged: follow the Link of the page before as it is")
	}
	// From 2000 on, PostgreSQL's epoch, all its times are within the range of an int64.
	const epoch = 946684800 // seconds since 1970
	micros := int64(binary.BigEndian.Uint64(b) - epoch*1e6)
	return position{time.Unix(epoch+micros/1e6, micros%1e6*1e3), formatUUID([16]byte(b[8:24]))}, nil
}

// What -infinity and infinity are in Go: right outside of the times that PostgreSQL can
// store (its manual, table 8.9).
var (
	minusInfinity = time.Date(-4713, time.November, 24, 0, 0, 0, -1000, time.UTC) // 4714 BC
	plusInfinity  = time.Date(294277, time.January, 1, 0, 0, 0, 0, time.UTC)
)

func init() { pq.EnableInfinityTs(minusInfinity, plusInfinity) }

// timestamp returns t as PostgreSQL reads it. lib/pq's own way moves the leap days
// before year 1 by a day.
func timestamp(t time.Time) string {
	switch t = t.UTC(); {
	case !t.After(minusInfinity):
		return "-infinity"
	case !t.Before(plusInfinity):
		return "infinity"
	case t.Year() < 1: // year 0 is 1 BC
		return fmt.Sprintf("%04d-%sZ BC", 1-t.Year(), t.Format("01-02 15:04:05.000000"))
	}
	return t.Format(timeFormat)
}

// A page is a part of the list. Requests for the same part may share one.
type page struct {
	users []user
	more  bool          // there are users behind the last one
	json  func() []byte // the users as a JSON array, encoded once
}

// newPage returns the page of the first limit users.
func newPage(users []user, limit int64) *page {
	p := &page{users: users}
	if int64(len(users)) > limit {
		p.users, p.more = users[:limit], true
	}
	p.json = sync.OnceValue(func() []byte {
		b := append(make([]byte, 0, 256*(len(p.users)+1)), '[')
		for i := range p.users {
			if i > 0 {
				b = append(b, ',')
			}
			b = p.users[i].appendJSON(b)
		}
		return append(b, ']')
	})
	return p
}

// sortByIDs sorts users in the order of ids. Of an id that is there twice, the first counts.
func sortByIDs(users []user, ids []string) {
	place := make(map[string]int, len(ids))
	for i, id := range slices.Backward(ids) {
		place[id] = i
	}
	slices.SortFunc(users, func(a, b user) int { return cmp.Compare(place[a.ID], place[b.ID]) })
}

// deepOffset is from which offset on a list is deep: PostgreSQL takes 0.1 ms or more to
// find its begin, row by row.
const deepOffset = 1000

var errDeepLists = &apiError{kind: kindUnavailable,
	message: "Too many lists with a large offset are being read: follow the Link of the page before"}

// deepList reads the users of a deep list. They are read one at a time, and after each
// none is for as long as it took: so all of them together take half of one processor,
// and one connection.
func (s *pgStore) deepList(ctx context.Context, q listQuery) ([]user, error) {
	select {
	case s.deepQueue <- struct{}{}:
		defer func() { <-s.deepQueue }()
	default:
		return nil, errDeepLists
	}
	select {
	case s.deep <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	start := time.Now()
	defer func() { time.AfterFunc(time.Since(start), func() { <-s.deep }) }()
	return s.query(ctx, firstUsers, q.limit+1, q.offset)
}
