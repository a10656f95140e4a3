package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"regexp"
	"strings"
	"time"
)

// The id of a user is a UUID (RFC 9562): of version 7, made from time and chance, or
// with an Idempotency-Key of version 8, made from the request.

// newUUID returns a new UUID of version 7 (section 5.7): the time in milliseconds, so
// that ids made one after the other stand side by side in the index, then 74 random bits.
func newUUID() string {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:], uint64(time.Now().UnixMilli())<<16)
	rand.Read(b[6:]) // never fails: crypto/rand ends the program instead
	return formatUUID(withVersion(b, 7))
}

// withVersion returns b as a UUID of that version, and of the variant of RFC 9562.
func withVersion(b [16]byte, version byte) [16]byte {
	b[6] = b[6]&0x0f | version<<4
	b[8] = b[8]&0x3f | 0x80
	return b
}

func formatUUID(b [16]byte) string {
	s := hex.EncodeToString(b[:])
	return s[:8] + "-" + s[8:12] + "-" + s[12:16] + "-" + s[16:20] + "-" + s[20:]
}

// parseUUID returns the UUID that s spells, of any version, in lower case with
// hyphens. Besides that form of section 4, in any letter case, it takes the others
// that the original did: without hyphens, in braces, as a URN.
func parseUUID(s string) (string, error) {
	digits := strings.TrimPrefix(s, "urn:uuid:")
	if len(s) == 38 && s[0] == '{' && s[37] == '}' {
		digits = s[1:37]
	}
	b, err := hex.DecodeString(strings.ReplaceAll(digits, "-", ""))
	if err != nil || len(b) != 16 {
		return "", invalid("id must be a UUID")
	}
	id := formatUUID([16]byte(b))
	if len(digits) != 32 && !strings.EqualFold(digits, id) { // a hyphen in the wrong place
		return "", invalid("id must be a UUID")
	}
	return id, nil
}

// How a create is repeated
//
// A client whose create got no response may send it again with the same Idempotency-Key
// (draft-ietf-httpapi-idempotency-key-header), and gets the user that was made the first
// time; the same key with another body is refused. Nothing is stored for that but the
// user: its id is made from the request, as a UUID of version 8 (section 5.8).
//
//	kkkkkkkk-kkkk-8kkk-vkkk-bbbbbbbbbbbb
//
// k stands for the caller and the key, b for the body, and v for the variant and two more
// bits of k. PostgreSQL lets no two users share the first half (migration 4 in schema.sql,
// which calls this file idempotency.go), nor the whole. By chance, two keys out of 2^74
// possible ones, or two bodies of one key out of 2^48, would look the same.

// A caller owns its Idempotency-Keys. Both fields are those of its token, empty where
// that doesn't say or where there is none.
type caller struct {
	issuer  string // a token's subject is unique to its issuer alone (RFC 7519, section 4.1.2)
	subject string
}

// keyedUUID returns the id of the user that the owner of the key creates with it.
func keyedUUID(owner caller, key string, body userInput) string {
	keySum := sumOf("rollcall: the caller and its Idempotency-Key", owner.issuer, owner.subject, key)
	// With the key in it as well, the second half tells nobody who reads an id
	// somewhere whether a guessed address is right.
	parts := []string{"rollcall: the body of its create", string(keySum[:])}
	for _, field := range body.fields() {
		if *field.value != nil {
			parts = append(parts, **field.value)
		}
	}
	bodySum := sumOf(parts...)
	var b [16]byte
	copy(b[:10], keySum[:])
	copy(b[10:], bodySum[:])
	return formatUUID(withVersion(b, 8))
}

// sumOf returns the SHA-256 of the parts, each behind its length, so that no two lists
// of parts are the same text. The first one keeps apart sums for different purposes.
func sumOf(parts ...string) [sha256.Size]byte {
	var text []byte
	for _, part := range parts {
		text = binary.BigEndian.AppendUint64(text, uint64(len(part)))
		text = append(text, part...)
	}
	return sha256.Sum256(text)
}

// isKeyed reports whether the id, of a user to be created, is from [keyedUUID].
func isKeyed(id string) bool { return id[14] == '8' }

// selectKeyed is for the ids of one caller and key.
const selectKeyed = "SELECT " + columns + " FROM users WHERE id BETWEEN $1 AND $2"

// createdBefore returns the user that was created with this id, as it is now. It is
// called when PostgreSQL has refused a create with an Idempotency-Key: the error is
// [errKeyReused] if the key is there already, with another body, and createErr if it
// is not.
func (s *pgStore) createdBefore(ctx context.Context, id string, createErr error) (user, error) {
	half := id[:len("kkkkkkkk-kkkk-8kkk-vkkk-")]
	u, err := s.one(ctx, selectKeyed, half+"000000000000", half+"ffffffffffff")
	switch {
	case errors.Is(err, errNotFound):
		err = createErr
	case err == nil && u.ID != id:
		err = errKeyReused
	}
	return u, err
}

// keyField matches the field of a key: between quotes (its first group), or bare.
var keyField = regexp.MustCompile(`^ *(?:"((?:[ !#-\[\]-~]|\\["\\])*)"|([!#-+\--:<-\[\]-~]*)) *$`)

// parseIdempotencyKey returns the key of a request's Idempotency-Key fields, empty if
// there is none. The draft wants a string of RFC 9651, section 3.3.3:
//
//	Idempotency-Key: "8e03978e-40d5-43dd-bc93-6894a57f9324"
//
// Most clients leave out the quotes, so visible ASCII without them is the same key. Only
// what would be ambiguous has to be quoted: a quote, a backslash, and the comma and
// semicolon, which end a value in a structured field. The draft has no parameters.
func parseIdempotencyKey(fields []string) (key string, err error) {
	if len(fields) == 0 {
		return "", nil
	}
	if match := keyField.FindStringSubmatch(fields[0]); match != nil && len(fields) == 1 {
		key = strings.NewReplacer(`\"`, `"`, `\\`, `\`).Replace(match[1]) + match[2]
	}
	if key == "" || len(key) > 255 {
		return "", invalid("Idempotency-Key must be given once, as 1 to 255 printable ASCII characters in quotes, " +
			"or without quotes if none is a space, quote, backslash, comma or semicolon")
	}
	return key, nil
}
