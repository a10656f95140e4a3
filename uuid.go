package main

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"strings"
	"time"
)

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
	s := hex.EncodeToString(b[:])
	return s[:8] + "-" + s[8:12] + "-" + s[12:16] + "-" + s[16:20] + "-" + s[20:]
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
	b, err := hex.DecodeString(digits)
	if err != nil || len(b) != 16 {
		return "", invalid("id must be a UUID")
	}
	return formatUUID([16]byte(b)), nil
}
