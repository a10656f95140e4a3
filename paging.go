package main

import (
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash/crc32"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// Which part of the list a request asks for, and how the next one finds its place.

// A listQuery is what a request for the list asks for.
type listQuery struct {
	limit, offset int64
	after         *position // where the page before ended
	email         *string
}

// parseListQuery reads the query of a request for the list. Parameters that it
// does not know are ignored, well formed or not; the failure names the one that
// is wrong.
func parseListQuery(query string) (q listQuery, err error) {
	q.limit = 20
	names := []string{"limit", "offset", "cursor", "email"}
	values := make(url.Values)
	for parameter := range strings.SplitSeq(query, "&") {
		name, _, _ := strings.Cut(parameter, "=")
		if name, err = url.QueryUnescape(name); err != nil || !slices.Contains(names, name) {
			continue
		}
		one, err := url.ParseQuery(parameter)
		if err != nil { // a stray % or ;
			return q, invalid(name + " is not well formed")
		}
		values[name] = append(values[name], one.Get(name))
	}
	for _, name := range names {
		given, ok := values[name]
		if !ok {
			continue
		}
		switch name {
		case "limit":
			q.limit, err = parseCount(name, given[0], 1000)
		case "offset":
			q.offset, err = parseCount(name, given[0], 1<<62) // so that sums with it fit
		case "cursor":
			q.after, err = parseCursor(given[0])
		case "email":
			if s := given[0]; s == "" || len(s) > 4*255 || !utf8.ValidString(s) || strings.Contains(s, "\x00") {
				err = invalid("email must be an address to look for")
			}
			q.email = &given[0]
		}
		if err == nil && len(given) > 1 {
			err = invalid(name + " is given twice")
		}
		if err != nil {
			return q, err
		}
	}
	if q.after != nil && (values.Has("offset") || q.email != nil) {
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

// A position is a place in the list: right behind the user with these values.
type position struct {
	createdAt time.Time
	id        string
}

// cursor returns the position in the form that clients carry around: 8 bytes
// of microseconds since 1970, modulo 2^64, 16 of id, 4 of checksum. The checksum
// catches a mangled cursor; forging one gains nothing that an offset would not give.
func (p position) cursor() string {
	micros := p.createdAt.Unix()*1e6 + int64(p.createdAt.Nanosecond()/1e3) // wraps around in the year 294247
	b := binary.BigEndian.AppendUint64(make([]byte, 0, 28), uint64(micros))
	id, _ := hex.DecodeString(strings.ReplaceAll(p.id, "-", ""))
	b = append(b, id...)
	b = binary.BigEndian.AppendUint32(b, crc32.ChecksumIEEE(b))
	return base64.RawURLEncoding.EncodeToString(b)
}

// parseCursor is the inverse of [position.cursor].
func parseCursor(s string) (*position, error) {
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	if err != nil || len(s) != 38 || len(b) != 28 || binary.BigEndian.Uint32(b[24:]) != crc32.ChecksumIEEE(b[:24]) {
		return nil, invalid("cursor is damaged: follow the Link of the page before as it is")
	}
	// From 2000 on, PostgreSQL's epoch, all its times are within the range of an int64.
	const epoch = 946684800 // seconds since 1970
	micros := int64(binary.BigEndian.Uint64(b) - epoch*1e6)
	return &position{time.Unix(epoch+micros/1e6, micros%1e6*1e3), formatUUID([16]byte(b[8:24]))}, nil
}
