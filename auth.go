package main

import (
	"crypto"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// How a token is checked
//
// A client sends "Authorization: Bearer <token>" (RFC 6750, section 2.1). The token is a
// JSON Web Token: header, claims and signature, each in base64url, with dots between them
// (RFC 7515, section 3.1; RFC 7519). verify finds a key that made the signature, and only
// then believes a claim; requireAuth holds the scope against the method.

const (
	maxTokenBytes = 8 << 10
	maxRemembered = 2048 // tokens
	leeway        = 30   // seconds by which the clocks of others may differ
)

// A tokenError tells the client what is wrong with a token, without a word of the token.
// It fits between the quotes of a challenge.
type tokenError string

func (e tokenError) Error() string { return string(e) }

// The errors of sound tokens.
const (
	errExpired  = tokenError("The token has expired")
	errNotYet   = tokenError("The token is not valid yet: its nbf or iat is in the future")
	errIssuer   = tokenError("The token is from another issuer")
	errAudience = tokenError("The token is for another audience")
)

// claims are what a verified token says of its bearer.
type claims struct {
	caller
	mayRead, mayWrite           bool
	expiry, notBefore, issuedAt float64 // in seconds since 1970; 0 when missing
}

// tokenRules are what a token must have.
type tokenRules struct {
	keys                  []key  // it is signed with one of them
	issuer                string // its iss; empty means any
	audience              string // in its aud; empty means any
	readScope, writeScope string // to read, and to change
	denyUnscoped          bool   // a claim of scopes; else a token without one may do everything
}

// A verifier checks tokens. It is safe for concurrent use.
type verifier struct {
	tokenRules
	own    *keyring // the keys of the configuration
	keySet *keySet  // of an identity provider; nil when none is configured
	now    func() time.Time
}

// A keyring is the keys of one moment, and what is known of the tokens that they signed.
// Keys that change make a new keyring, so that the old one's tokens are forgotten with it.
type keyring struct {
	keys []key

	// remembered are the claims of opened tokens, by the hash of the token. A client sends
	// the same one for hours, and to open it takes a tenth of a GET. The rules never change.
	remembered sync.Map
	opened     atomic.Int64 // tokens; remembered is cleared at each maxRemembered
}

// newVerifier returns a verifier of these rules, which takes the keys of the set, too, unless
// it is nil. It panics without any key.
func newVerifier(rules tokenRules, set *keySet) *verifier {
	if len(rules.keys) == 0 && set == nil {
		panic("newVerifier: no keys")
	}
	return &verifier{tokenRules: rules, own: &keyring{keys: rules.keys}, keySet: set, now: time.Now}
}

// keyring returns the keys of now.
func (v *verifier) keyring() *keyring {
	if v.keySet != nil {
		return v.keySet.keyring.Load()
	}
	return v.own
}

// verify returns the claims of a token that is valid now. Its error is always a
// [tokenError].
func (v *verifier) verify(token string) (claims, error) {
	if len(token) > maxTokenBytes {
		return claims{}, tokenError("The token is longer than 8192 bytes")
	}
	ring, hash := v.keyring(), sha256.Sum256([]byte(token))
	known, ok := ring.remembered.Load(hash)
	if !ok {
		c, err := v.open(ring.keys, token)
		if err != nil {
			return claims{}, err
		}
		if ring.opened.Add(1)%maxRemembered == 0 {
			ring.remembered.Clear()
		}
		ring.remembered.Store(hash, c)
		known = c
	}
	c := known.(claims)
	return c, v.checkTime(c)
}

// checkTime returns the error of claims that are not valid now.
func (v *verifier) checkTime(c claims) error {
	now := float64(v.now().UnixMicro()) / 1e6
	switch {
	case now >= c.expiry+leeway:
		return errExpired
	case now < c.notBefore-leeway || now < c.issuedAt-leeway:
		return errNotYet
	}
	return nil
}

// open returns the claims of a token that one of the keys signed, whatever the time.
func (v *verifier) open(keys []key, token string) (_ claims, err error) {
	parts := strings.SplitN(token, ".", 4) // a fourth is one too many
	decoded := make([][]byte, len(parts))
	for i, part := range parts {
		if decoded[i], err = decodeBase64(part); err != nil || len(parts) != 3 {
			return claims{}, tokenError("This is not one token: three parts of unpadded base64url, with dots between them")
		}
	}
	if err := checkSignature(keys, decoded[0], []byte(parts[0]+"."+parts[1]), decoded[2]); err != nil {
		return claims{}, err
	}
	return v.readClaims(decoded[1])
}

// decodeBase64 decodes base64url without padding (RFC 7515, section 2). So that one token
// has one spelling, line breaks, which encoding/base64 passes over, are an error, and so
// are bits behind the last byte that are not zero.
func decodeBase64(s string) ([]byte, error) {
	if i := strings.IndexAny(s, "\r\n"); i >= 0 {
		return nil, base64.CorruptInputError(i)
	}
	return base64.RawURLEncoding.Strict().DecodeString(s)
}

// The errors of a token that none of the keys signed; another key may have.
const (
	errNoKey     = tokenError("No known key fits the alg and the kid of the token")
	errSignature = tokenError("The signature of the token is wrong")
)

// checkSignature looks for a key that made the signature of the input. The header (RFC
// 7515, section 4.1) only narrows the search: no key has a check for "none", no public one
// for HS256 (RFC 8725, section 2.1), and none comes from a token (jwk, jku, x5c, x5u).
func checkSignature(keys []key, header, input, signature []byte) error {
	members, err := uniqueMembers(header)
	algorithm, isText := jsonString(members["alg"])
	kid, kidIsText := jsonString(members["kid"])
	switch {
	case err != nil || !isText || members["kid"] != nil && !kidIsText:
		return tokenError("The header of the token is not a JSON object of unique names whose alg, and kid if any, are strings")
	case members["crit"] != nil: // in any form: section 4.1.11 has an empty one refused too
		return tokenError("The token has a crit, and no extension is understood here")
	}
	err = errNoKey
	for _, k := range keys {
		check := k.checks[algorithm]
		if check == nil || kid != "" && k.id != "" && kid != k.id {
			continue
		}
		if check(input, signature) {
			return nil
		}
		err = errSignature
	}
	return err
}

// readClaims returns the claims (RFC 7519, section 4.1) of a token whose signature
// is right. Claims that it does not know are ignored, as section 4 asks for.
func (v *verifier) readClaims(payload []byte) (c claims, err error) {
	members, err := uniqueMembers(payload)
	if err != nil {
		return claims{}, tokenError("The claims of the token are not a JSON object in which each name is given once")
	}
	for name, date := range map[string]*float64{"exp": &c.expiry, "nbf": &c.notBefore, "iat": &c.issuedAt} {
		if members[name] == nil && name != "exp" {
			continue
		}
		// Of all values in JSON, only a number is a float; 1e999 is none.
		if *date, err = strconv.ParseFloat(string(members[name]), 64); err != nil {
			return claims{}, tokenError("The token has no exp, or its exp, nbf or iat is not a number")
		}
	}
	subject, isText := jsonString(members["sub"])
	issuer, _ := jsonString(members["iss"])
	audience, _ := jsonString(members["aud"]) // one string, or an array of them
	switch {
	case members["sub"] != nil && !isText:
		return claims{}, tokenError("The sub of the token is not a string")
	case v.issuer != "" && issuer != v.issuer:
		return claims{}, errIssuer
	case v.audience != "" && audience != v.audience && !slices.Contains(arrayStrings(members["aud"]), v.audience):
		return claims{}, errAudience
	}
	c.caller = caller{issuer: issuer, subject: subject}

	var scopes []string
	unscoped := true
	for _, name := range scopeClaims {
		list, _ := jsonString(members[name])
		scopes = slices.Concat(scopes, strings.Split(list, " "), arrayStrings(members[name]))
		unscoped = unscoped && members[name] == nil
	}
	may := func(scope string) bool { return unscoped && !v.denyUnscoped || slices.Contains(scopes, scope) }
	c.mayRead, c.mayWrite = may(v.readScope), may(v.writeScope)
	return c, nil
}

// scopeClaims are where identity providers put scopes: Keycloak and Cognito in scope (RFC
// 8693, section 4.2), Okta and Entra in scp, Auth0 in permissions, Entra for applications in
// roles. Each is a string with spaces or an array of strings; any other value holds no scope.
var scopeClaims = []string{"scope", "scp", "permissions", "roles"}

// arrayStrings returns the elements of a JSON array of nothing but strings; there are none in
// any other value.
func arrayStrings(value []byte) (all []string) {
	var list []*string // nil for null
	if json.Unmarshal(value, &list) != nil || slices.Contains(list, nil) {
		return nil
	}
	for _, s := range list {
		all = append(all, *s)
	}
	return all
}

// scopeForm matches one scope (RFC 6749, section 3.3): it fits between the quotes of a challenge.
var scopeForm = regexp.MustCompile(`^[!#-\[\]-~]{1,255}$`)

func parseScope(value string) (string, error) {
	if !scopeForm.MatchString(value) {
		return "", errors.New(`is not one scope: 1 to 255 characters of ASCII, without spaces, " and \`)
	}
	return value, nil
}

// valueOrAny returns the value, or nothing for "*".
func valueOrAny(value string) (string, error) {
	if value == "*" {
		return "", nil
	}
	return value, nil
}

// mintToken returns a token for the service of this configuration, which has a secret. Without
// a scope, it may do everything.
func (c config) mintToken(g grant) string {
	if g.scope == "" && c.denyUnscoped {
		g.scope = c.readScope + " " + c.writeScope
	}
	g.issuer, g.audience = c.issuer, c.audience
	return mintToken(c.jwtSecret, g, time.Now())
}

// A grant says what goes into a token that [mintToken] makes. What is empty is
// left out; without a scope, the token may do everything.
type grant struct {
	subject, scope, issuer, audience string
	ttl                              time.Duration
}

// mintToken returns a token for the grant, issued now and signed with HS256.
func mintToken(secret []byte, g grant, now time.Time) string {
	payload, _ := json.Marshal(struct { // without an error: they are strings and integers
		Issuer   string `json:"iss,omitempty"`
		Subject  string `json:"sub,omitempty"`
		Audience string `json:"aud,omitempty"`
		Scope    string `json:"scope,omitempty"`
		IssuedAt int64  `json:"iat"`
		Expiry   int64  `json:"exp"`
	}{g.issuer, g.subject, g.audience, g.scope, now.Unix(), now.Add(g.ttl).Unix()})
	encode := base64.RawURLEncoding.EncodeToString
	signed := encode([]byte(`{"alg":"HS256","typ":"JWT"}`)) + "." + encode(payload)
	return signed + "." + encode(sum(hmac.New(crypto.SHA256.New, secret), []byte(signed)))
}

// requireAuth lets a request pass to next only with a token that allows its method.
// It stands before the routes: without a token, an unknown one looks like a known one.
func requireAuth(v *verifier, next http.Handler) http.Handler {
	return handlerFunc(func(w http.ResponseWriter, r *http.Request) error {
		token := bearerToken(r)
		if token == "" { // RFC 6750, section 3.1: no error code where no token was sent
			return refusal(kindUnauthorized, "Missing bearer token", "")
		}
		c, err := v.verifyWaiting(r.Context(), token)
		if _, ok := err.(tokenError); ok {
			return refusal(kindUnauthorized, err.Error(), fmt.Sprintf(`, error="invalid_token", error_description="%v"`, err))
		} else if err != nil {
			return err
		}
		infoFrom(r.Context()).caller = c.caller
		scope, allowed := v.writeScope, c.mayWrite
		if r.Method == http.MethodGet || r.Method == http.MethodHead {
			scope, allowed = v.readScope, c.mayRead
		}
		if !allowed {
			message := "The token lacks the scope " + scope
			parameters := fmt.Sprintf(`, error="insufficient_scope", error_description="%s", scope="%s"`, message, scope)
			return refusal(kindForbidden, message, parameters)
		}
		next.ServeHTTP(w, r)
		return nil
	})
}

// bearerToken returns the token of the Authorization header, empty if there is none.
// Two headers are one with a comma (RFC 9110, section 5.3), and no token has a comma.
func bearerToken(r *http.Request) string {
	scheme, token, _ := strings.Cut(strings.Join(r.Header["Authorization"], ", "), " ")
	if !strings.EqualFold(scheme, "Bearer") { // RFC 9110, section 11.1
		return ""
	}
	return strings.Trim(token, " ")
}

// refusal returns an error with the challenge of RFC 6750, section 3.
func refusal(k kind, message, parameters string) *apiError {
	challenge := `Bearer realm="rollcall"` + parameters
	return &apiError{kind: k, message: message, header: http.Header{"Www-Authenticate": {challenge}}}
}

// printToken is the token command: it prints a token signed with JWT_SECRET. Its
// error is a [usageError], unless stdout fails.
func printToken(args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("rollcall token", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // errors are returned, not printed here
	var g grant
	flags.StringVar(&g.subject, "sub", "", "")
	flags.DurationVar(&g.ttl, "ttl", time.Hour, "")
	flags.StringVar(&g.scope, "scope", "", "")
	err := flags.Parse(args)
	scopeIsSet := false
	flags.Visit(func(f *flag.Flag) { scopeIsSet = scopeIsSet || f.Name == "scope" })
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(stdout, usage)
		return nil
	case err != nil:
		return usageError("token: " + err.Error())
	case flags.NArg() > 0:
		return usageError(fmt.Sprintf("token: %q is no flag", flags.Arg(0)))
	case g.subject == "":
		return usageError("token: -sub is missing: whose token is it?")
	case scopeIsSet && g.scope == "":
		return usageError("token: -scope is empty: leave it out for a token that may do everything")
	case g.ttl < time.Second:
		return usageError("token: -ttl must be a second or more")
	}
	if getenv, err = withDotenv(getenv, dotenvFile, stderr); err != nil {
		return usageError(err.Error())
	}
	cfg, err := loadSome(getenv, "JWT_SECRET", "JWT_SECRET_FILE", "JWT_JWKS_URL", "JWT_ISSUER", "JWT_AUDIENCE",
		"JWT_READ_SCOPE", "JWT_WRITE_SCOPE", "JWT_UNSCOPED")
	switch {
	case err != nil:
		return usageError(err.Error())
	case cfg.jwtSecret == nil:
		return usageError("token: neither JWT_SECRET nor JWT_SECRET_FILE is set (that of rollcall -dev is in " + devDir + "/jwt_secret)")
	}
	_, err = fmt.Fprintln(stdout, cfg.mintToken(g))
	return err
}
