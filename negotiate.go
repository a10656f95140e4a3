package main

import (
	"regexp"
	"strconv"
	"strings"
)

// What the client prefers: content negotiation by the Accept fields (RFC 9110,
// section 12).

// weightForm matches 0 to 1 with up to three digits behind the point.
var weightForm = regexp.MustCompile(`^(0(\.\d{0,3})?|1(\.0{0,3})?)$`)

// quality returns the weight that a list of the form of Accept or
// Accept-Encoding gives to name: its "q" from 0 to 1 (RFC 9110, section
// 12.4.2), or -1 if no member names it. Parameters other than q are ignored; a
// member with a broken weight counts as refused.
func quality(fields []string, name string) float64 {
	q := -1.0
	for _, field := range fields {
		for member := range strings.SplitSeq(field, ",") {
			token, params, _ := strings.Cut(member, ";")
			if !strings.EqualFold(strings.TrimSpace(token), name) {
				continue
			}
			weight := 1.0
			for param := range strings.SplitSeq(params, ";") {
				key, value, _ := strings.Cut(strings.TrimSpace(param), "=")
				if strings.EqualFold(key, "q") {
					weight = 0
					if weightForm.MatchString(value) {
						weight, _ = strconv.ParseFloat(value, 64)
					}
				}
			}
			q = max(q, weight)
		}
	}
	return q
}

// prefersProblem reports whether an Accept field asks for errors as
// application/problem+json: by that name, and not less than for plain JSON.
func prefersProblem(accept []string) bool {
	q := quality(accept, "application/problem+json")
	return q > 0 && q >= quality(accept, "application/json")
}
