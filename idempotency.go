package main

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"regexp"
	"strings"
)

// How a create is repeated
//
// A client whose create got no answer can't know whether there is a user now.
// With an Idempotency-Key (draft-ietf-httpapi-idempotency-key-header) it may
// just ask again: the same key and body bring the user that was made the first
// time, the same key with another body is refused.
//
// Nothing is kept for that but the user itself, whose id is made from the
// request instead of from time and chance. So every replica agrees, at any time
// later, and a key lives as long as its user. The id is a UUID of version 8
// (RFC 9562, section 5.8):
//
//	kkkkkkkk-kkkk-8kkk-vkkk-bbbbbbbbbbbb
//
// k stands for the caller and the key, b for the body, and v for the variant and
// two more bits of k. PostgreSQL lets no two users share the first half
// (schema.sql, migration 4), nor the whole. By chance, two keys out of 2^74
// possible ones, or two bodies of one key out of 2^48, would look the same.

// A caller is who an Idempotency-Key belongs to. Both fields are those of its
// token, empty where that doesn't say or where there is none.
type caller struct {
	issuer  string // a token's subject is unique to its issuer alone (RFC 7519, section 4.1.2)
	subject string
}

// keyedUUID returns the id of the user that the caller makes with the key.
func keyedUUID(who caller, key, email, name string) string {
	keySum := sumOf("rollcall: the caller and its Idempotency-Key", who.issuer, who.subject, key)
	// With the key in it as well, the second half tells nobody who reads an id
	// somewhere whether a guessed address is right.
	bodySum := sumOf("rollcall: the body of its create", string(keySum[:]), email, name)
	var b [16]byte
	copy(b[:10], keySum[:])
	copy(b[10:], bodySum[:])
	b[6] = b[6]&0x0f | 0x80 // version
	b[8] = b[8]&0x3f | 0x80 // variant
	return formatUUID(b)
}

// sumOf returns the SHA-256 of the parts, each behind its length, so that no
// two lists of parts are the same text. The first one keeps apart what is made
// for different purposes.
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
// asked when PostgreSQL has refused a create with an Idempotency-Key: the error is
// [errKeyReused] if the key is there already, with another body, and refused if it
// is not.
func (s *pgStore) createdBefore(ctx context.Context, id string, refused error) (user, error) {
	half := id[:len("kkkkkkkk-kkkk-8kkk-vkkk-")]
	u, err := s.one(ctx, selectKeyed, half+"000000000000", half+"ffffffffffff")
	switch {
	case errors.Is(err, errNotFound):
		err = refused
	case err == nil && u.ID != id:
		err = errKeyReused
	}
	return u, err
}

// keyField matches the field of a key: between quotes (its first group), or bare.
var keyField = regexp.MustCompile(`^ *(?:"((?:[ !#-\[\]-~]|\\["\\])*)"|([!#-+\--:<-\[\]-~]*)) *$`)

var errBadKey = invalid("Idempotency-Key must be given once, as 1 to 255 printable ASCII characters in quotes, or without quotes " +
	"if none is a space, quote, backslash, comma or semicolon")

// parseIdempotencyKey returns the key of a request's Idempotency-Key fields,
// empty if there is none. The draft wants a string of RFC 9651, section 3.3.3:
//
//	Idempotency-Key: "8e03978e-40d5-43dd-bc93-6894a57f9324"
//
// Most clients leave out the quotes, so visible ASCII without them is taken as
// well, and is the same key. What would then be ambiguous has to be quoted: a
// quote or a backslash, and the comma and semicolon, which in a structured field
// end a value. Parameters, which the draft has none of, are refused in both.
func parseIdempotencyKey(fields []string) (string, error) {
	if len(fields) == 0 {
		return "", nil
	}
	match := keyField.FindStringSubmatch(fields[0])
	if match == nil || len(fields) > 1 {
		return "", errBadKey
	}
	key := strings.NewReplacer(`\"`, `"`, `\\`, `\`).Replace(match[1]) + match[2]
	if key == "" || len(key) > 255 {
		return "", errBadKey
	}
	return key, nil
}
