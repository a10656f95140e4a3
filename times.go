package main

import (
	"fmt"
	"time"

	"github.com/lib/pq"
)

// Times that PostgreSQL stores and RFC 3339 can't spell: infinity, and years before
// 1 and after 9999. A row that was made by somebody else may have one, and must not
// hide the others.

// timeFormat is RFC 3339 in UTC with all six digits that PostgreSQL keeps.
const timeFormat = "2006-01-02T15:04:05.000000Z"

// The first and the last microsecond that timeFormat can spell.
var (
	firstTime = time.Date(1, 1, 1, 0, 0, 0, 0, time.UTC)
	lastTime  = time.Date(9999, 12, 31, 23, 59, 59, 999_999_000, time.UTC)
)

// clampTime returns t in UTC, or the nearest time that timeFormat can spell.
func clampTime(t time.Time) time.Time {
	switch {
	case t.Before(firstTime):
		return firstTime
	case t.After(lastTime):
		return lastTime
	}
	return t.UTC()
}

// What -infinity and infinity are in Go: right outside of the times that
// PostgreSQL can store (its manual, table 8.9).
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
