package main

import (
	"crypto"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// How a token travels
//
// A caller sends "Authorization: Bearer <token>" (RFC 6750, section 2.1). The
// token is a JSON Web Token: header, claims and signature, each in base64url,
// with dots between them (RFC 7515, section 3.1; RFC 7519). requireAuth takes
// it from the request; verify takes it apart, finds a key that made the
// signature and only then believes a claim; allows says whether the scope is
// enough for the method. Who called goes into the access log.
//
// A caller sends the same token with each request, for minutes or hours. So what
// a valid one says is remembered, and only its dates are looked at again: the
// keys, the issuer and the audience stay the same as long as the service runs.
//
// A header may say where to fetch the key it was signed with (jwk, jku, x5c,
// x5u). Nobody looks there: keys come from the configuration alone.

const (
	maxTokenBytes = 8 << 10
	leeway        = 30 // seconds by which the clocks of others may differ
	// rememberedBytes bounds the length of all remembered tokens together. What is
	// kept of one takes a few times as much, at most.
	rememberedBytes = 2 << 20
)

// A tokenError tells the caller what is wrong with a token, in a sentence that
// has nothing of the token in it. It fits between the quotes of a challenge.
type tokenError string

func (e tokenError) Error() string { return string(e) }

const (
	errTokenCount     = tokenError("There is more than one Authorization header")
	errTokenLong      = tokenError("The token is longer than 8192 bytes")
	errTokenParts     = tokenError("The token does not have three parts")
	errTokenBase64    = tokenError("A part of the token is not unpadded base64url")
	errTokenHeader    = tokenError("The header of the token is not a JSON object in which each name is given once")
	errTokenAlg       = tokenError("The alg of the token is not a string")
	errTokenKid       = tokenError("The kid of the token is not a string")
	errTokenCrit      = tokenError("The token has a crit, and no extension is understood here")
	errTokenKey       = tokenError("No known key fits the alg and the kid of the token")
	errTokenSignature = tokenError("The signature of the token is wrong")
	errTokenClaims    = tokenError("The claims of the token are not a JSON object in which each name is given once")
	errTokenNoExp     = tokenError("The token has no exp")
	errTokenDate      = tokenError("The exp, nbf or iat of the token is not a number")
	errTokenSub       = tokenError("The sub of the token is not a string")
	errTokenExpired   = tokenError("The token has expired")
	errTokenEarly     = tokenError("The token is not valid yet")
	errTokenFuture    = tokenError("The token was issued in the future")
	errTokenIssuer    = tokenError("The token is from another issuer")
	errTokenAudience  = tokenError("The token is for another audience")
)

// claims are what a verified token says of its bearer.
type claims struct {
	caller
	scoped bool // the token has a scope or scp claim: it may do what that says and no more
	scopes []string
	// exp, nbf and iat, in seconds since 1970; 0 where one is missing, which for
	// the latter two is as good as none.
	expiry, notBefore, issuedAt float64
}

// allows reports whether the bearer may do what takes the scope.
func (c claims) allows(scope string) bool { return !c.scoped || slices.Contains(c.scopes, scope) }

// checkDates returns what is wrong with the time now for the claims.
func (c claims) checkDates(now time.Time) error {
	switch t := float64(now.UnixMicro()) / 1e6; {
	case t >= c.expiry+leeway:
		return errTokenExpired
	case t < c.notBefore-leeway:
		return errTokenEarly
	case t < c.issuedAt-leeway:
		return errTokenFuture
	}
	return nil
}

// A verifier checks tokens. It is safe for concurrent use.
type verifier struct {
	keys             []key
	issuer, audience string // not checked when empty
	now              func() time.Time

	mu sync.Mutex
	// remembered are the claims of valid tokens, each under the hash of the whole of
	// it: how long it takes to find one tells nothing of the others, and none is kept.
	remembered map[[sha256.Size]byte]claims
	bytes      int // of the remembered tokens
}

// newVerifier returns a verifier for tokens signed with one of the keys. It
// panics without a key, since it could let nobody in.
func newVerifier(keys []key, issuer, audience string) *verifier {
	if len(keys) == 0 {
		panic("newVerifier: no keys")
	}
	return &verifier{keys: keys, issuer: issuer, audience: audience, now: time.Now, remembered: make(map[[sha256.Size]byte]claims)}
}

// verify returns the claims of a token that is valid now. Its error is always a
// [tokenError].
func (v *verifier) verify(token string) (c claims, err error) {
	if len(token) > maxTokenBytes {
		return claims{}, errTokenLong
	}
	hash := sha256.Sum256([]byte(token))
	v.mu.Lock()
	c, known := v.remembered[hash]
	v.mu.Unlock()
	if !known {
		if c, err = v.open(token); err != nil {
			return claims{}, err
		}
	}
	if err := c.checkDates(v.now()); err != nil {
		return claims{}, err
	}
	if !known {
		v.remember(hash, c, len(token))
	}
	return c, nil
}

// remember keeps the claims of a token of so many bytes. Where there is no room,
// all others are forgotten: they are verified once more.
func (v *verifier) remember(hash [sha256.Size]byte, c claims, bytes int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.bytes += bytes; v.bytes > rememberedBytes {
		clear(v.remembered)
		v.bytes = bytes
	}
	v.remembered[hash] = c
}

// open returns the claims of a token whose signature is right, whatever the time.
func (v *verifier) open(token string) (claims, error) {
	parts := strings.SplitN(token, ".", 4) // a fourth is one too many
	if len(parts) != 3 {
		return claims{}, errTokenParts
	}
	header, err1 := decodeBase64(parts[0])
	payload, err2 := decodeBase64(parts[1])
	signature, err3 := decodeBase64(parts[2])
	if err1 != nil || err2 != nil || err3 != nil {
		return claims{}, errTokenBase64
	}
	algorithm, kid, err := parseTokenHeader(header)
	if err != nil {
		return claims{}, err
	}
	signed := token[:len(parts[0])+len(".")+len(parts[1])]
	if err := v.checkSignature(algorithm, kid, []byte(signed), signature); err != nil {
		return claims{}, err
	}
	return v.readClaims(payload)
}

// base64URL refuses padding, and bits behind the last byte that are not zero:
// one token has one spelling (RFC 7515, section 2; RFC 4648, section 3.5).
var base64URL = base64.RawURLEncoding.Strict()

// decodeBase64 decodes unpadded base64url. Line breaks, which encoding/base64
// passes over, are an error.
func decodeBase64(s string) ([]byte, error) {
	if strings.ContainsAny(s, "\r\n") {
		return nil, errors.New("line break in base64url")
	}
	return base64URL.DecodeString(s)
}

// parseTokenHeader returns the members of a header (RFC 7515, section 4.1) that
// help to find the key. The kid is empty when there is none.
func parseTokenHeader(header []byte) (algorithm, kid string, err error) {
	algorithmFits, kidFits := false, true // only kid may be absent
	err = walkUniqueObject(header, func(name string, value []byte) error {
		switch name {
		case "alg":
			algorithm, algorithmFits = jsonString(value)
		case "kid":
			kid, kidFits = jsonString(value)
		case "crit": // in any form: section 4.1.11 has an empty one refused too
			return errTokenCrit
		}
		return nil
	})
	switch {
	case errors.Is(err, errTokenCrit):
		return "", "", err
	case err != nil:
		return "", "", errTokenHeader
	case !algorithmFits:
		return "", "", errTokenAlg
	case !kidFits:
		return "", "", errTokenKid
	}
	return algorithm, kid, nil
}

// checkSignature looks for a key that made the signature. It goes by what the
// keys take: "none" is taken by none, and HS256 by no public key (RFC 8725,
// section 2.1). A kid narrows the search among the keys that have one.
func (v *verifier) checkSignature(algorithm, kid string, input, signature []byte) error {
	err := errTokenKey
	for _, k := range v.keys {
		if !k.takes(algorithm) || kid != "" && k.id != "" && kid != k.id {
			continue
		}
		if k.verifies(algorithm, input, signature) {
			return nil
		}
		err = errTokenSignature
	}
	return err
}

// readClaims returns the claims (RFC 7519, section 4.1) of a token whose signature
// is right. Claims that it does not know are ignored, as section 4 asks for.
func (v *verifier) readClaims(payload []byte) (claims, error) {
	var c claims
	hasExpiry, issuerFits, audienceFits := false, v.issuer == "", v.audience == ""
	err := walkUniqueObject(payload, func(name string, value []byte) error {
		switch name {
		case "exp", "nbf", "iat":
			t, ok := numericDate(value)
			if !ok {
				return errTokenDate
			}
			switch name {
			case "exp":
				c.expiry, hasExpiry = t, true
			case "nbf":
				c.notBefore = t
			case "iat":
				c.issuedAt = t
			}
		case "iss":
			var ok bool
			c.issuer, ok = jsonString(value)
			issuerFits = issuerFits || ok && c.issuer == v.issuer
		case "aud": // one string, or an array of them
			audience, ok := jsonString(value)
			audiences, _ := jsonStrings(value)
			audienceFits = audienceFits || ok && audience == v.audience || slices.Contains(audiences, v.audience)
		case "sub":
			var ok bool
			if c.subject, ok = jsonString(value); !ok {
				return errTokenSub
			}
		case "scope", "scp":
			c.scoped = true
			c.scopes = append(c.scopes, parseScopes(name, value)...)
		}
		return nil
	})
	known, isTokenError := errors.AsType[tokenError](err)
	switch {
	case isTokenError:
		return claims{}, known
	case err != nil:
		return claims{}, errTokenClaims
	case !hasExpiry:
		return claims{}, errTokenNoExp
	case !issuerFits:
		return claims{}, errTokenIssuer
	case !audienceFits:
		return claims{}, errTokenAudience
	}
	return c, nil
}

// numericDate returns the seconds since 1970 that a claim holds (RFC 7519,
// section 2). A float64 takes fractions, and a number of any size that is not
// infinite: 1e999 is an error.
func numericDate(value []byte) (seconds float64, ok bool) {
	if value[0] != '-' && (value[0] < '0' || value[0] > '9') {
		return 0, false
	}
	seconds, err := strconv.ParseFloat(string(value), 64)
	return seconds, err == nil
}

// parseScopes returns the scopes of a scope claim, a string with spaces between
// them (RFC 8693, section 4.2), or of an scp claim, which is an array at some
// identity providers. A claim of any other type grants nothing.
func parseScopes(name string, value []byte) []string {
	if s, ok := jsonString(value); ok {
		return strings.Split(s, " ")
	}
	if name == "scp" {
		list, _ := jsonStrings(value)
		return list
	}
	return nil
}

// jsonStrings returns the strings of a JSON array, and reports whether it is an
// array of nothing but strings.
func jsonStrings(value []byte) (list []string, ok bool) {
	if value[0] != '[' {
		return nil, false
	}
	var elements []json.RawMessage
	if err := json.Unmarshal(value, &elements); err != nil {
		return nil, false
	}
	for _, element := range elements {
		s, ok := jsonString(element)
		if !ok {
			return nil, false
		}
		list = append(list, s)
	}
	return list, true
}

// A grant says what goes into a token that [mintToken] makes. What is empty is
// left out; without a scope, the token may do everything.
type grant struct {
	subject, scope, issuer, audience string
	ttl                              time.Duration
}

// mintToken returns a token for the grant, issued now and signed with HS256.
func mintToken(secret []byte, g grant, now time.Time) string {
	payload, err := json.Marshal(struct {
		Issuer   string `json:"iss,omitempty"`
		Subject  string `json:"sub,omitempty"`
		Audience string `json:"aud,omitempty"`
		Scope    string `json:"scope,omitempty"`
		IssuedAt int64  `json:"iat"`
		Expiry   int64  `json:"exp"`
	}{g.issuer, g.subject, g.audience, g.scope, now.Unix(), now.Add(g.ttl).Unix()})
	if err != nil {
		panic(err) // strings and integers can always be encoded
	}
	signed := base64URL.EncodeToString([]byte(`{"alg":"HS256","typ":"JWT"}`)) + "." + base64URL.EncodeToString(payload)
	return signed + "." + base64URL.EncodeToString(hmacSum(crypto.SHA256, secret, []byte(signed)))
}

// requireAuth lets a request pass to next only with a token that allows its
// method. It stands before the routes, so that without a token an unknown route
// looks like a known one.
func requireAuth(v *verifier, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := authorize(v, w, r); err != nil {
			writeError(w, r, err)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// authorize returns the failure that keeps r from the API, or nil.
func authorize(v *verifier, w http.ResponseWriter, r *http.Request) error {
	token, err := bearerToken(r)
	if token == "" && err == nil {
		// RFC 6750, section 3.1: no error code where no token was sent.
		return refusal(kindUnauthorized, "Missing bearer token", "")
	}
	var c claims
	if err == nil {
		c, err = v.verify(token)
	}
	if err != nil {
		return refusal(kindUnauthorized, err.Error(), `, error="invalid_token", error_description="`+err.Error()+`"`)
	}
	exchangeOf(w).caller = c.caller

	scope := "users:write"
	if r.Method == http.MethodGet || r.Method == http.MethodHead {
		scope = "users:read"
	}
	if !c.allows(scope) {
		message := "The token lacks the scope " + scope
		return refusal(kindForbidden, message,
			`, error="insufficient_scope", error_description="`+message+`", scope="`+scope+`"`)
	}
	return nil
}

// bearerToken returns the token of the Authorization header, empty if there is
// none. Two headers are an error: which one a proxy has checked, nobody knows.
func bearerToken(r *http.Request) (string, error) {
	fields := r.Header["Authorization"]
	switch len(fields) {
	case 0:
		return "", nil
	case 1:
		scheme, token, _ := strings.Cut(fields[0], " ")
		if !strings.EqualFold(scheme, "Bearer") { // RFC 9110, section 11.1
			return "", nil
		}
		return strings.Trim(token, " "), nil
	default:
		return "", errTokenCount
	}
}

// refusal returns the failure with the challenge that RFC 6750, section 3, adds
// to it.
func refusal(k kind, message, parameters string) *failure {
	challenge := `Bearer realm="rollcall"` + parameters
	return &failure{kind: k, message: message, header: http.Header{"Www-Authenticate": {challenge}}}
}
