package main

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// The examples of the RFCs, byte for byte.
const (
	// RFC 7515, appendices A.1 to A.3: the same claims under three algorithms.
	rfcPayload = "eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ"
	rfcExpiry  = 1300819380

	rfcSecret     = "AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow"
	rfcTokenHS256 = "eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9." + rfcPayload +
		".dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"

	rfcKeyRSA = `{"kty":"RSA","e":"AQAB","n":"ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddx` +
		`HmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4QlL-yRT-SFd2lZS-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-` +
		`bSf63kpaSHSXndS5z5rexMdbBYUsLA9e-KXBdQOS-UTo7WTBEMa2R2CapHg665xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7` +
		`aGhyxXFvUK-DWNmoudF8NAco9_h9iaGNj8q2ethFkMLs91kzk2PAcDTW9gb54h4FRWyuXpoQ"}`
	rfcTokenRS256 = "eyJhbGciOiJSUzI1NiJ9." + rfcPayload +
		".cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujGbds9uJd" +
		"bF9CUAr7t1dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K0GarZRmB_eSN938" +
		"3LcOLn6_dO--xi12jzDwusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkW" +
		"ywlVmtVrBp0igcN_IoypGlUPQGe77Rw"

	rfcKeyP256 = `{"kty":"EC","crv":"P-256","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",` +
		`"y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}`
	rfcTokenES256 = "eyJhbGciOiJFUzI1NiJ9." + rfcPayload +
		".DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q"

	// RFC 7515, appendix A.4: signs the text "Payload".
	rfcKeyP521 = `{"kty":"EC","crv":"P-521","x":"AekpBQ8ST8a8VcfVOTNl353vSrDCLLJXmPk06wTjxrrjcBpXp5EOnYG_NjFZ6OvLFV1` +
		`jSfS9tsz4qUxcWceqwQGk","y":"ADSmRA43Z1DSNx_RvcLI87cdL07l6jQyyBXMoxVg_l2Th-x3S1WDhjDly79ajL4Kkd0AZMaZmh9ub` +
		`mf63e3kyMj2"}`
	rfcTokenES512 = "eyJhbGciOiJFUzUxMiJ9.UGF5bG9hZA.AdwMgeerwtHoh-l192l60hp9wAHZFVJbLfD_UxMi70cwnZOYaRI1bKPWROc-mZZ" +
		"qwqT2SI-KGDKB34XO0aw_7XdtAG8GaSwFKdCAPZgoXD2YBJZCPEX3xKpRwcdOO8KpEHwJjyqOgzDO7iKvU8vcnwNrmxYbSW9ERBXukOXo" +
		"lLzeO_Jn"

	// RFC 8037, appendix A: signs the text "Example of Ed25519 signing".
	rfcKeyEd25519 = `{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}`
	rfcTokenEdDSA = "eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc" +
		".hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg"
)

// What a client may read about its token.
const (
	errTokenLong      = tokenError("The token is longer than 8192 bytes")
	errTokenForm      = tokenError("This is not one token: three parts of unpadded base64url, with dots between them")
	errTokenHeader    = tokenError("The header of the token is not a JSON object of unique names whose alg, and kid if any, are strings")
	errTokenCrit      = tokenError("The token has a crit, and no extension is understood here")
	errTokenKey       = tokenError("No known key fits the alg and the kid of the token")
	errTokenSignature = tokenError("The signature of the token is wrong")
	errTokenClaims    = tokenError("The claims of the token are not a JSON object in which each name is given once")
	errTokenDate      = tokenError("The token has no exp, or its exp, nbf or iat is not a number")
	errTokenSub       = tokenError("The sub of the token is not a string")
	errTokenExpired   = tokenError("The token has expired")
	errTokenEarly     = tokenError("The token is not valid yet: its nbf or iat is in the future")
	errTokenIssuer    = tokenError("The token is from another issuer")
	errTokenAudience  = tokenError("The token is for another audience")
)

// tokenNow is the time on the clock of the verifiers under test.
var tokenNow = time.Unix(1_700_000_000, 0)

var tokenSecret = []byte("a secret of 32 bytes and no less")

// tokenSigners are a private key of each sort. RSA takes long to make, so all
// tests share them.
var tokenSigners = sync.OnceValue(func() map[string]crypto.Signer {
	signers := make(map[string]crypto.Signer)
	for name, curve := range curves {
		private, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			panic(err)
		}
		signers[name] = private
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		panic(err)
	}
	signers["RSA"], signers["Ed25519"] = rsaKey, edKey
	return signers
})

// signToken returns a token of header and payload as they are, signed by a
// secret or a private key with the algorithm, whatever the header says.
func signToken(t testing.TB, signer any, algorithm, header, payload string) string {
	t.Helper()
	signed := encode64(header) + "." + encode64(payload)
	hash := hashes[algorithm[2:]] // none for EdDSA
	var signature []byte
	var err error
	switch signer := signer.(type) {
	case []byte:
		signature = sum(hmac.New(hash.New, signer), []byte(signed))
	case ed25519.PrivateKey:
		signature = ed25519.Sign(signer, []byte(signed))
	case *rsa.PrivateKey:
		var options crypto.SignerOpts = hash
		if strings.HasPrefix(algorithm, "PS") {
			options = &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: hash}
		}
		signature, err = signer.Sign(rand.Reader, sum(hash.New(), []byte(signed)), options)
	case *ecdsa.PrivateKey:
		var r, s *big.Int
		r, s, err = ecdsa.Sign(rand.Reader, signer, sum(hash.New(), []byte(signed)))
		size := (signer.Params().BitSize + 7) / 8
		signature = make([]byte, 2*size)
		r.FillBytes(signature[:size])
		s.FillBytes(signature[size:])
	default:
		t.Fatalf("no signer: %T", signer)
	}
	if err != nil {
		t.Fatal(err)
	}
	return signed + "." + base64.RawURLEncoding.EncodeToString(signature)
}

func encode64(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }

// rulesOf returns rules with the scopes that are the default.
func rulesOf(issuer, audience string, keys ...key) tokenRules {
	return tokenRules{keys: keys, issuer: issuer, audience: audience, readScope: "users:read", writeScope: "users:write"}
}

// fixedVerifier is a verifier on whose clock it is always tokenNow.
func fixedVerifier(issuer, audience string, keys ...key) *verifier {
	v := newVerifier(rulesOf(issuer, audience, keys...), nil)
	v.now = func() time.Time { return tokenNow }
	return v
}

func mustSecret(t testing.TB, secret []byte) key {
	t.Helper()
	k, err := secretKey(secret)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// verifies reports whether the signature is that of k, which may not take the
// algorithm at all.
func verifies(k key, algorithm string, input, signature []byte) bool {
	check := k.checks[algorithm]
	return check != nil && check(input, signature)
}

// algorithmsOf returns what k takes, in the order of the letters.
func algorithmsOf(k key) string { return strings.Join(slices.Sorted(maps.Keys(k.checks)), " ") }

func mustKey(t testing.TB, public any) key {
	t.Helper()
	k, err := publicKey(public, nil)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// mustJWK reads a file that holds one JWK.
func mustJWK(t testing.TB, text string) key {
	t.Helper()
	keys, _, err := parseKeys([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return keys[0]
}

func mustDecode64(t testing.TB, s string) []byte {
	t.Helper()
	b, err := decodeBase64(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func pemOf(t testing.TB, public any) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
}

func TestRFCExamples(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name, algorithm, token string
		key                    key
		claims                 bool // the payload holds claims, so that all of the token can be verified
	}{
		{"RFC 7515 A.1", "HS256", rfcTokenHS256, mustSecret(t, mustDecode64(t, rfcSecret)), true},
		{"RFC 7515 A.2", "RS256", rfcTokenRS256, mustJWK(t, rfcKeyRSA), true},
		{"RFC 7515 A.3", "ES256", rfcTokenES256, mustJWK(t, rfcKeyP256), true},
		{"RFC 7515 A.4", "ES512", rfcTokenES512, mustJWK(t, rfcKeyP521), false},
		{"RFC 8037 A.4", "EdDSA", rfcTokenEdDSA, mustJWK(t, rfcKeyEd25519), false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dot := strings.LastIndexByte(tt.token, '.')
			input, signature := []byte(tt.token[:dot]), mustDecode64(t, tt.token[dot+1:])
			if !verifies(tt.key, tt.algorithm, input, signature) {
				t.Error("the signature of the RFC is refused")
			}
			for i := range signature {
				signature[i] ^= 1
				if verifies(tt.key, tt.algorithm, input, signature) {
					t.Errorf("accepted with byte %d of the signature changed", i)
				}
				signature[i] ^= 1
			}
			v := newVerifier(rulesOf("", "", tt.key), nil)
			v.now = func() time.Time { return time.Unix(rfcExpiry-1, 0) }
			want := error(nil)
			if !tt.claims {
				want = errTokenClaims
			}
			if _, err := v.verify(tt.token); err != want {
				t.Errorf("verify: %v, want %v", err, want)
			}
		})
	}
}

// TestAlgorithms signs with every algorithm and tries every key with every
// algorithm: only the pair that made the signature may take it.
func TestAlgorithms(t *testing.T) {
	t.Parallel()
	signers := tokenSigners()
	keys := map[string]key{"secret": mustSecret(t, tokenSecret)}
	for name, signer := range signers {
		keys[name] = mustJWK(t, jwkText(t, signer.Public()))
	}
	algorithms := []struct{ name, key string }{
		{"HS256", "secret"}, {"HS384", "secret"}, {"HS512", "secret"},
		{"RS256", "RSA"}, {"RS384", "RSA"}, {"RS512", "RSA"},
		{"PS256", "RSA"}, {"PS384", "RSA"}, {"PS512", "RSA"},
		{"ES256", "P-256"}, {"ES384", "P-384"}, {"ES512", "P-521"},
		{"EdDSA", "Ed25519"}, {"Ed25519", "Ed25519"},
	}
	for _, signedWith := range algorithms {
		t.Run(signedWith.name, func(t *testing.T) {
			t.Parallel()
			var signer any = tokenSecret
			if signedWith.key != "secret" {
				signer = signers[signedWith.key]
			}
			token := signToken(t, signer, signedWith.name, `{"alg":"`+signedWith.name+`"}`, `{"exp":1700000001}`)
			if _, err := fixedVerifier("", "", keys[signedWith.key]).verify(token); err != nil {
				t.Errorf("verify: %v", err)
			}
			dot := strings.LastIndexByte(token, '.')
			input, signature := []byte(token[:dot]), mustDecode64(t, token[dot+1:])
			for _, tried := range append(algorithms, struct{ name, key string }{"none", ""}) {
				for name, k := range keys {
					// Ed25519 is another name of EdDSA: RFC 9864, section 2.2.
					want := name == signedWith.key && (tried.name == signedWith.name || name == "Ed25519" && tried.key == name)
					if got := verifies(k, tried.name, input, signature); got != want {
						t.Errorf("key %s as %s: %v, want %v", name, tried.name, got, want)
					}
				}
			}
		})
	}
}

// jwkText returns the JWK of a public key.
func jwkText(t testing.TB, public crypto.PublicKey) string {
	t.Helper()
	switch k := public.(type) {
	case *rsa.PublicKey:
		return fmt.Sprintf(`{"kty":"RSA","n":%q,"e":%q}`, base64.RawURLEncoding.EncodeToString(k.N.Bytes()),
			base64.RawURLEncoding.EncodeToString(big.NewInt(int64(k.E)).Bytes()))
	case *ecdsa.PublicKey:
		point, err := k.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		x, y := point[1:1+len(point)/2], point[1+len(point)/2:]
		return fmt.Sprintf(`{"kty":"EC","crv":%q,"x":%q,"y":%q}`, k.Params().Name,
			base64.RawURLEncoding.EncodeToString(x), base64.RawURLEncoding.EncodeToString(y))
	case ed25519.PublicKey:
		return fmt.Sprintf(`{"kty":"OKP","crv":"Ed25519","x":%q}`, base64.RawURLEncoding.EncodeToString(k))
	}
	t.Fatalf("no JWK for a %T", public)
	return ""
}

// jwkWith returns the JWK with further members.
func jwkWith(jwk, members string) string { return strings.TrimSuffix(jwk, "}") + "," + members + "}" }

func TestForgedTokens(t *testing.T) {
	t.Parallel()
	const good = `{"exp":1700000001}`
	signers := tokenSigners()
	rsaPEM := pemOf(t, signers["RSA"].Public())
	rsaDER, _ := pem.Decode(rsaPEM)
	rsaKey := mustKey(t, signers["RSA"].Public())
	p256, p384 := mustKey(t, signers["P-256"].Public()), mustKey(t, signers["P-384"].Public())
	edKey := mustKey(t, signers["Ed25519"].Public())
	onlyPS256 := mustJWK(t, jwkWith(jwkText(t, signers["RSA"].Public()), `"alg":"PS256"`))
	es256 := signToken(t, signers["P-256"], "ES256", `{"alg":"ES256"}`, good)
	signed := es256[:strings.LastIndexByte(es256, '.')]
	es256Signature := string(mustDecode64(t, es256[len(signed)+1:]))
	shortSalt, err := signers["RSA"].Sign(rand.Reader, sum(crypto.SHA256.New(), []byte(encode64(`{"alg":"PS256"}`)+"."+encode64(good))),
		&rsa.PSSOptions{SaltLength: 20, Hash: crypto.SHA256})
	if err != nil {
		t.Fatal(err)
	}

	tests := []struct {
		name  string
		key   key
		token string
		want  error
	}{
		{"none, no signature", rsaKey, encode64(`{"alg":"none"}`) + "." + encode64(good) + ".", errTokenKey},
		{"None", rsaKey, encode64(`{"alg":"None"}`) + "." + encode64(good) + ".", errTokenKey},
		{"empty alg", rsaKey, encode64(`{"alg":""}`) + "." + encode64(good) + ".", errTokenKey},
		{"none against the secret", mustSecret(t, tokenSecret), encode64(`{"alg":"none"}`) + "." + encode64(good) + ".", errTokenKey},
		{"no signature", rsaKey, encode64(`{"alg":"RS256"}`) + "." + encode64(good) + ".", errTokenSignature},
		{"HS256 with the PEM as the secret", rsaKey, signToken(t, rsaPEM, "HS256", `{"alg":"HS256"}`, good), errTokenKey},
		{"HS256 with the DER as the secret", rsaKey, signToken(t, rsaDER.Bytes, "HS256", `{"alg":"HS256"}`, good), errTokenKey},
		{"HS256 with an Ed25519 key as the secret", edKey,
			signToken(t, []byte(signers["Ed25519"].Public().(ed25519.PublicKey)), "HS256", `{"alg":"HS256"}`, good), errTokenKey},
		{"alg in lower case", rsaKey, signToken(t, signers["RSA"], "RS256", `{"alg":"rs256"}`, good), errTokenKey},
		{"RS256 that says PS256", rsaKey, signToken(t, signers["RSA"], "RS256", `{"alg":"PS256"}`, good), errTokenSignature},
		{"RS256 for a key that its JWK binds to PS256", onlyPS256, signToken(t, signers["RSA"], "RS256", `{"alg":"RS256"}`, good), errTokenKey},
		{"PS256 for a key that its JWK binds to PS256", onlyPS256, signToken(t, signers["RSA"], "PS256", `{"alg":"PS256"}`, good), nil},
		{"PS256 with a salt shorter than the hash", rsaKey, encode64(`{"alg":"PS256"}`) + "." + encode64(good) + "." + encode64(string(shortSalt)), errTokenSignature},
		{"ES256 for a key on P-384", p384, es256, errTokenKey},
		{"ES256 that says ES384", p384, signToken(t, signers["P-256"], "ES256", `{"alg":"ES384"}`, good), errTokenSignature},
		{"ES256 with r and s of zero", p256, signed + "." + encode64(strings.Repeat("\x00", 64)), errTokenSignature},
		{"ES256 with a zero byte before s", p256, signed + "." + encode64(es256Signature[:32]+"\x00"+es256Signature[32:]), errTokenSignature},
		{"ES256 in ASN.1", p256, asn1Token(t, signers["P-256"], signed), errTokenSignature},
		{"another secret", mustSecret(t, tokenSecret), signToken(t, bytes.ToUpper(tokenSecret), "HS256", `{"alg":"HS256"}`, good), errTokenSignature},
		{"a public key of its own in the header", p256, signToken(t, signers["P-384"], "ES384",
			`{"alg":"ES384","jwk":`+jwkText(t, signers["P-384"].Public())+`}`, good), errTokenKey},
		{"other claims under the signature", p256, encode64(`{"alg":"ES256"}`) + "." + encode64(`{"exp":1700000002}`) + es256[len(signed):], errTokenSignature},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if _, err := fixedVerifier("", "", tt.key).verify(tt.token); err != tt.want {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
}

// asn1Token signs with ECDSA in the form that RFC 7518 does not take.
func asn1Token(t testing.TB, signer crypto.Signer, signed string) string {
	t.Helper()
	signature, err := signer.Sign(rand.Reader, sum(crypto.SHA256.New(), []byte(signed)), crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	return signed + "." + base64.RawURLEncoding.EncodeToString(signature)
}

func TestTokenForm(t *testing.T) {
	t.Parallel()
	hs256 := func(header, payload string) string { return signToken(t, tokenSecret, "HS256", header, payload) }
	const header, good = `{"alg":"HS256"}`, `{"exp":1700000001}`
	token := hs256(header, good)
	// The 43rd character of 32 bytes has two bits to spare, which must be zero.
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	last := len(token) - 1
	spareBit := token[:last] + string(alphabet[strings.IndexByte(alphabet, token[last])|1])
	parts := strings.Split(token, ".")

	tests := []struct {
		name, token string
		want        error
	}{
		{"as it should be", token, nil},
		{"empty", "", errTokenForm},
		{"two parts", parts[0] + "." + parts[1], errTokenForm},
		{"four parts", token + ".", errTokenForm},
		{"five parts, an encrypted token", token + "..", errTokenForm},
		{"padded", token + "=", errTokenForm},
		{"line break at the end", token + "\n", errTokenForm},
		{"line break inside", parts[0] + "\r\n." + parts[1] + "." + parts[2], errTokenForm},
		{"bits behind the last byte", spareBit, errTokenForm},
		{"standard base64", parts[0] + "." + parts[1] + "." + base64.RawStdEncoding.EncodeToString(bytes.Repeat([]byte{0xfb}, 32)), errTokenForm},
		{"8192 bytes", longToken(t, 8192), nil},
		{"more than 8192 bytes", longToken(t, 8193), errTokenLong},

		{"header is no JSON", hs256(`{"alg":"HS256"`, good), errTokenHeader},
		{"header is an array", hs256(`["HS256"]`, good), errTokenHeader},
		{"header is null", hs256(`null`, good), errTokenHeader},
		{"header has trailing data", hs256(header+"{}", good), errTokenHeader},
		{"header is not UTF-8", hs256("{\"alg\":\"HS256\",\"x\":\"\xff\"}", good), errTokenHeader},
		{"alg twice", hs256(`{"alg":"HS256","alg":"HS256"}`, good), errTokenHeader},
		{"alg twice, once escaped", hs256(`{"alg":"HS256","\u0061lg":"HS256"}`, good), errTokenHeader},
		{"an unknown member twice", hs256(`{"alg":"HS256","x":1,"x":2}`, good), errTokenHeader},
		{"alg escaped", hs256(`{"\u0061lg":"HS\u003256"}`, good), nil},
		{"no alg", hs256(`{"typ":"JWT"}`, good), errTokenHeader},
		{"ALG", hs256(`{"ALG":"HS256"}`, good), errTokenHeader},
		{"alg is null", hs256(`{"alg":null}`, good), errTokenHeader},
		{"alg is an array", hs256(`{"alg":["HS256"]}`, good), errTokenHeader},
		{"kid is a number", hs256(`{"alg":"HS256","kid":1}`, good), errTokenHeader},
		{"kid is null", hs256(`{"alg":"HS256","kid":null}`, good), errTokenHeader},
		{"crit", hs256(`{"alg":"HS256","crit":["exp"],"exp":1}`, good), errTokenCrit},
		{"crit is empty", hs256(`{"alg":"HS256","crit":[]}`, good), errTokenCrit},
		{"crit is null", hs256(`{"alg":"HS256","crit":null}`, good), errTokenCrit},
		{"crit before a second crit", hs256(`{"alg":"HS256","crit":null,"crit":null}`, good), errTokenHeader},
		{"members that mean nothing here", hs256(`{"alg":"HS256","typ":"at+jwt","jku":"https://example.com/"}`, good), nil},

		{"claims are no JSON", hs256(header, "Payload"), errTokenClaims},
		{"claims are an array", hs256(header, "["+good+"]"), errTokenClaims},
		{"claims are a string", hs256(header, `"exp"`), errTokenClaims},
		{"claims are null", hs256(header, `null`), errTokenClaims},
		{"claims are empty", hs256(header, ``), errTokenClaims},
		{"claims have trailing data", hs256(header, good+good), errTokenClaims},
		{"claims are not UTF-8", hs256(header, "{\"exp\":1700000001,\"sub\":\"\xc3\x28\"}"), errTokenClaims},
		{"claims hold half a surrogate", hs256(header, `{"exp":1700000001,"sub":"\ud800"}`), errTokenClaims},
		{"a claim twice", hs256(header, `{"exp":1700000001,"sub":"alice","sub":"alice"}`), errTokenClaims},
		{"a claim twice, once escaped", hs256(header, `{"exp":1700000001,"sub":"alice","s\u0075b":"root"}`), errTokenClaims},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			v := fixedVerifier("", "", mustSecret(t, tokenSecret))
			if _, err := v.verify(tt.token); err != tt.want {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
}

// longToken returns a valid token of that many bytes.
func longToken(t testing.TB, size int) string {
	t.Helper()
	for filler := size * 3 / 4; ; filler-- {
		for _, space := range []string{"", " ", "  "} { // base64 has no text for some lengths
			token := signToken(t, tokenSecret, "HS256", `{"alg":"HS256"`+space+`}`,
				`{"exp":1700000001,"x":"`+strings.Repeat("x", filler)+`"}`)
			if len(token) == size {
				return token
			}
		}
	}
}

func TestClaims(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name, payload string
		want          error
	}{
		{"exp ahead", `{"exp":1700000001}`, nil},
		{"no exp", `{"sub":"alice"}`, errTokenDate},
		{"EXP", `{"EXP":1700000001}`, errTokenDate},
		{"exp 29.5 s ago", `{"exp":1699999970.5}`, nil},
		{"exp 30 s ago", `{"exp":1699999970}`, errTokenExpired},
		{"exp long ago", `{"exp":0}`, errTokenExpired},
		{"exp negative", `{"exp":-1700000001}`, errTokenExpired},
		{"exp in milliseconds", `{"exp":1700000001000}`, nil},
		{"exp with an exponent", `{"exp":1.700000001e9}`, nil},
		{"exp enormous", `{"exp":1e308}`, nil},
		{"exp beyond an int64", `{"exp":9223372036854775808}`, nil},
		{"exp enormous and negative", `{"exp":-1e308}`, errTokenExpired},
		{"exp infinite", `{"exp":1e999}`, errTokenDate},
		{"exp a string", `{"exp":"1700000001"}`, errTokenDate},
		{"exp null", `{"exp":null}`, errTokenDate},
		{"exp true", `{"exp":true}`, errTokenDate},
		{"exp an array", `{"exp":[1700000001]}`, errTokenDate},

		{"nbf past", `{"exp":1700000001,"nbf":1699999999}`, nil},
		{"nbf in 30 s", `{"exp":1700000100,"nbf":1700000030}`, nil},
		{"nbf in 30.5 s", `{"exp":1700000100,"nbf":1700000030.5}`, errTokenEarly},
		{"nbf enormous", `{"exp":1e300,"nbf":1e300}`, errTokenEarly},
		{"nbf infinite", `{"exp":1700000001,"nbf":-1e999}`, errTokenDate},
		{"nbf null", `{"exp":1700000001,"nbf":null}`, errTokenDate},
		{"nbf a string", `{"exp":1700000001,"nbf":""}`, errTokenDate},

		{"iat past", `{"exp":1700000001,"iat":1600000000}`, nil},
		{"iat in 30 s", `{"exp":1700000100,"iat":1700000030}`, nil},
		{"iat in 31 s", `{"exp":1700000100,"iat":1700000031}`, errTokenEarly},
		{"iat null", `{"exp":1700000001,"iat":null}`, errTokenDate},
		{"iat an object", `{"exp":1700000001,"iat":{}}`, errTokenDate},

		{"sub a string", `{"exp":1700000001,"sub":"alice"}`, nil},
		{"sub a number", `{"exp":1700000001,"sub":1}`, errTokenSub},
		{"sub null", `{"exp":1700000001,"sub":null}`, errTokenSub},
		{"unknown claims", `{"exp":1700000001,"jti":7,"roles":["admin"]}`, nil},
		{"iss and aud of any type, unchecked", `{"exp":1700000001,"iss":1,"aud":{}}`, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			v := fixedVerifier("", "", mustSecret(t, tokenSecret))
			token := signToken(t, tokenSecret, "HS256", `{"alg":"HS256"}`, tt.payload)
			if _, err := v.verify(token); err != tt.want {
				t.Errorf("%s: got %v, want %v", tt.payload, err, tt.want)
			}
		})
	}
}

// TestRememberedToken takes its verifier the keys away: what it still lets in, it
// remembers.
func TestRememberedToken(t *testing.T) {
	t.Parallel()
	v := fixedVerifier("", "", mustSecret(t, tokenSecret))
	token := func(payload string) string { return signToken(t, tokenSecret, "HS256", `{"alg":"HS256"}`, payload) }
	dated := token(`{"exp":1700000100,"nbf":1699999900,"sub":"alice","scope":"users:read"}`)
	issued := token(`{"exp":1700000100,"iat":1699999900,"sub":"bob"}`)
	early := token(`{"exp":1700000200,"nbf":1700000100}`)
	for text, want := range map[string]error{dated: nil, issued: nil, early: errTokenEarly} {
		if _, err := v.verify(text); err != want {
			t.Fatalf("%s: %v, want %v", text, err, want)
		}
	}
	v.own.keys = nil

	at := func(seconds int64, text string, want error) {
		t.Helper()
		v.now = func() time.Time { return time.Unix(seconds, 0) }
		if _, err := v.verify(text); err != want {
			t.Errorf("at %d: %v, want %v", seconds, err, want)
		}
	}
	at(1700000129, dated, nil)
	at(1700000130, dated, errTokenExpired)
	at(1699999870, dated, nil) // the clock was set back
	at(1699999869, dated, errTokenEarly)
	at(1699999869, issued, errTokenEarly)
	at(1700000069, early, errTokenEarly)
	at(1700000070, early, nil)
	at(1700000000, token(`{"exp":1700000100,"sub":"carol"}`), errTokenKey)
	for i := range dated {
		other := []byte(dated)
		other[i] ^= 1
		if _, err := v.verify(string(other)); err == nil {
			t.Errorf("let in with byte %d changed: %s", i, other)
		}
	}
	switch c, err := v.verify(dated); {
	case err != nil:
		t.Error(err)
	case c.subject != "alice" || !c.mayRead || c.mayWrite:
		t.Errorf("got %+v", c)
	}
}

// TestManyTokens has clients send more tokens than are remembered.
func TestManyTokens(t *testing.T) {
	t.Parallel()
	v := fixedVerifier("", "", mustSecret(t, tokenSecret))
	var clients sync.WaitGroup
	for i := range 8 {
		clients.Go(func() {
			for j := range maxRemembered/8 + 10 {
				want := fmt.Sprintf("%d of %d", j, i)
				token := signToken(t, tokenSecret, "HS256", `{"alg":"HS256"}`, `{"exp":1700000001,"sub":"`+want+`"}`)
				for range 2 {
					if c, err := v.verify(token); err != nil || c.subject != want {
						t.Errorf("%s: got %+v, %v", want, c, err)
						return
					}
				}
			}
		})
	}
	clients.Wait()
	n := 0
	v.own.remembered.Range(func(_, _ any) bool { n++; return true })
	if n == 0 || n > 100 { // of 80 too many, and those that others were about to add
		t.Errorf("%d tokens are remembered", n)
	}
}

func TestIssuerAndAudience(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name, issuer, audience string // what the service is configured for
		claims                 string
		want                   error
	}{
		{"issuer fits", "https://id.example", "", `"iss":"https://id.example"`, nil},
		{"issuer missing", "https://id.example", "", `"sub":"alice"`, errTokenIssuer},
		{"issuer with a slash more", "https://id.example", "", `"iss":"https://id.example/"`, errTokenIssuer},
		{"issuer in an array", "https://id.example", "", `"iss":["https://id.example"]`, errTokenIssuer},
		{"issuer null", "https://id.example", "", `"iss":null`, errTokenIssuer},
		{"audience fits", "", "users", `"aud":"users"`, nil},
		{"audience among others", "", "users", `"aud":["orders","users"]`, nil},
		{"audience missing", "", "users", `"sub":"alice"`, errTokenAudience},
		{"another audience", "", "users", `"aud":"orders"`, errTokenAudience},
		{"audience in another case", "", "users", `"aud":"Users"`, errTokenAudience},
		{"audience as a part of a string", "", "users", `"aud":"users orders"`, errTokenAudience},
		{"no audience at all", "", "users", `"aud":[]`, errTokenAudience},
		{"audience beside a number", "", "users", `"aud":["users",1]`, errTokenAudience},
		{"audience null", "", "users", `"aud":null`, errTokenAudience},
		{"audience an object", "", "users", `"aud":{"users":"users"}`, errTokenAudience},
		{"both fit", "https://id.example", "users", `"iss":"https://id.example","aud":"users"`, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			v := fixedVerifier(tt.issuer, tt.audience, mustSecret(t, tokenSecret))
			token := signToken(t, tokenSecret, "HS256", `{"alg":"HS256"}`, `{"exp":1700000001,`+tt.claims+`}`)
			if _, err := v.verify(token); err != tt.want {
				t.Errorf("%s: got %v, want %v", tt.claims, err, tt.want)
			}
		})
	}
}

func TestScopes(t *testing.T) {
	t.Parallel()
	tests := []struct {
		claims      string
		read, write bool
	}{
		{`"sub":"alice"`, true, true},
		{`"scope":"users:read"`, true, false},
		{`"scope":"users:write"`, false, true},
		{`"scope":"users:read users:write"`, true, true},
		{`"scope":"openid  users:read "`, true, false},
		{`"scope":"USERS:READ users:writer users"`, false, false},
		{`"scope":"users:read\tusers:write"`, false, false},
		{`"scope":""`, false, false},
		{`"scope":null`, false, false},
		{`"scope":["users:read"]`, true, false},
		{`"scope":["users:read",{}]`, false, false},
		{`"scope":{"users:read":true}`, false, false},
		{`"scp":"users:read users:write"`, true, true},
		{`"scp":["users:read"]`, true, false},
		{`"scp":["users:read","users:write"]`, true, true},
		{`"scp":["users:read users:write"]`, false, false},
		{`"scp":["users:read",1]`, false, false},
		{`"scp":[]`, false, false},
		{`"scp":null`, false, false},
		{`"scp":true`, false, false},
		{`"scope":"users:read","scp":["users:write"]`, true, true},
		{`"scope":"users:read","scp":null`, true, false},
		{`"SCOPE":"users:read"`, true, true}, // an unknown claim
		{`"permissions":["users:read"]`, true, false},
		{`"permissions":"users:write"`, false, true},
		{`"permissions":[]`, false, false},
		{`"permissions":[["users:read"]]`, false, false},
		{`"roles":["users:read","users:write"]`, true, true},
		{`"roles":"admin"`, false, false},
		{`"roles":["users:read",null]`, false, false},
		{`"roles":1,"permissions":{},"scp":["users:read"],"scope":"users:write"`, true, true},
		{`"scope":"openid profile email","permissions":["users:read"],"roles":["users:write"]`, true, true},
		{`"realm_access":{"roles":["users:read"]}`, true, true}, // Keycloak's own, which is none of the four
	}
	for _, tt := range tests {
		t.Run(tt.claims, func(t *testing.T) {
			t.Parallel()
			v := fixedVerifier("", "", mustSecret(t, tokenSecret))
			c, err := v.verify(signToken(t, tokenSecret, "HS256", `{"alg":"HS256"}`, `{"exp":1700000001,`+tt.claims+`}`))
			if err != nil {
				t.Fatal(err)
			}
			if read, write := c.mayRead, c.mayWrite; read != tt.read || write != tt.write {
				t.Errorf("read %v, write %v; want %v, %v", read, write, tt.read, tt.write)
			}
		})
	}
}

// What identity providers put into an access token, each for a service that asks for
// scopes in the provider's way.
func TestScopesOfIdentityProviders(t *testing.T) {
	t.Parallel()
	const resource = "https://api.example.com/"
	tests := []struct {
		name, readScope, writeScope string
		claims                      string
		read, write                 bool
	}{
		{"Keycloak, client scopes not assigned", "users:read", "users:write", `"scope":"openid email profile"`, false, false},
		{"Keycloak", "users:read", "users:write", `"scope":"openid email users:read profile"`, true, false},
		{"Auth0", "read:users", "write:users", `"scope":"openid profile","permissions":["read:users","write:users"]`, true, true},
		{"Auth0, no permissions", "read:users", "write:users", `"scope":"openid profile","permissions":[]`, false, false},
		{"Entra, for a user", "Users.Read", "Users.ReadWrite", `"scp":"User.Read Users.Read","roles":["Staff"]`, true, false},
		{"Entra, for an application", "Users.Read.All", "Users.ReadWrite.All", `"roles":["Users.ReadWrite.All"]`, false, true},
		{"Cognito", resource + "users.read", resource + "users.write", `"scope":"` + resource + `users.read openid"`, true, false},
		{"Cognito, slashes escaped", resource + "users.read", resource + "users.write", `"scope":"https:\/\/api.example.com\/users.write"`, false, true},
		{"Cognito, another resource server", resource + "users.read", resource + "users.write", `"scope":"https://other.example.com/users.read"`, false, false},
		{"Okta", "rollcall.read", "rollcall.write", `"scp":["openid","rollcall.read","rollcall.write"]`, true, true},
		{"one scope for both", "rollcall", "rollcall", `"scope":"rollcall"`, true, true},
	}
	for name, claims := range map[string]string{ // of providers without scopes, for which JWT_UNSCOPED decides
		"Google":   `"azp":"c.apps.googleusercontent.com","email":"a@example.com"`,
		"Supabase": `"role":"authenticated","app_metadata":{"provider":"email"}`,
	} {
		for _, deny := range []bool{false, true} {
			v := fixedVerifier("", "", mustSecret(t, tokenSecret))
			v.denyUnscoped = deny
			c, err := v.verify(signToken(t, tokenSecret, "HS256", `{"alg":"HS256"}`, `{"exp":1700000001,`+claims+`}`))
			if err != nil || c.mayRead == deny || c.mayWrite == deny {
				t.Errorf("%s, unscoped denied %t: read %v, write %v, %v", name, deny, c.mayRead, c.mayWrite, err)
			}
		}
	}
	for _, tt := range tests {
		for _, deny := range []bool{false, true} { // which has a say only where there are no scopes
			t.Run(fmt.Sprintf("%s, unscoped denied %t", tt.name, deny), func(t *testing.T) {
				t.Parallel()
				v := fixedVerifier("", "", mustSecret(t, tokenSecret))
				v.readScope, v.writeScope, v.denyUnscoped = tt.readScope, tt.writeScope, deny
				c, err := v.verify(signToken(t, tokenSecret, "HS256", `{"alg":"HS256"}`, `{"exp":1700000001,`+tt.claims+`}`))
				if err != nil || c.mayRead != tt.read || c.mayWrite != tt.write {
					t.Errorf("%s: read %v, write %v, %v; want %v, %v", tt.claims, c.mayRead, c.mayWrite, err, tt.read, tt.write)
				}
			})
		}
	}
}

// The service asks for the scopes that it is configured for, and its token command knows them.
func TestServiceWithScopes(t *testing.T) {
	t.Parallel()
	env := append(withAuth, "JWT_READ_SCOPE=Users.Read", "JWT_WRITE_SCOPE=https://api.example.com/users.write")
	allow, deny := newService(t, env...), newService(t, append(env, "JWT_UNSCOPED=Deny")...)
	signed := func(claims string) string {
		payload := fmt.Sprintf(`{"exp":%d,"sub":"alice"%s}`, time.Now().Add(time.Hour).Unix(), claims)
		return "Authorization: Bearer " + signToken(t, []byte(middlewareSecret), "HS256", `{"alg":"HS256"}`, payload)
	}
	command := func(unscoped string, flags ...string) string { // what "rollcall token" prints
		vars := testEnv("dbname=x", append(env, "JWT_UNSCOPED="+unscoped)...)
		var out strings.Builder
		args := append([]string{"token", "-sub", "alice"}, flags...)
		if err := run(t.Context(), args, func(name string) string { return vars[name] }, &out, io.Discard); err != nil {
			t.Fatal(err)
		}
		return "Authorization: Bearer " + strings.TrimSpace(out.String())
	}
	const write = "https://api.example.com/users.write"
	for _, tt := range []struct {
		name, token                   string
		read, create                  int // statuses where unscoped tokens may do all
		readWhereDenied, createDenied int // statuses where they may not
	}{
		{"no claim of scopes", signed(""), 200, 200, 403, 403},
		{"other claims", signed(`,"groups":["admin"]`), 200, 200, 403, 403},
		{"the default scopes", signed(`,"scope":"users:read users:write"`), 403, 403, 403, 403},
		{"an empty claim", signed(`,"permissions":[]`), 403, 403, 403, 403},
		{"reads", signed(`,"scp":["Users.Read"]`), 200, 403, 200, 403},
		{"writes", signed(`,"roles":["` + write + `"]`), 403, 200, 403, 200},
		{"does both", signed(`,"scope":"Users.Read","permissions":["` + write + `"]`), 200, 200, 200, 200},
		{"token, without -scope", command("allow"), 200, 200, 403, 403},
		{"token, without -scope, where unscoped ones are denied", command("deny"), 200, 200, 200, 200},
		{"token -scope", command("deny", "-scope", "Users.Read"), 200, 403, 200, 403},
	} {
		for _, s := range []struct {
			*service
			read, create int
		}{{allow, tt.read, tt.create}, {deny, tt.readWhereDenied, tt.createDenied}} {
			read := s.call("GET", usersPath, "", tt.token)
			create := s.call("POST", usersPath, fmt.Sprintf(`{"email":"%s@example.com","name":"x"}`, strings.NewReplacer(" ", "-", ",", "").Replace(tt.name)), tt.token)
			if read.status != s.read || create.status != s.create {
				t.Errorf("%s: GET %d, POST %d; want %d, %d", tt.name, read.status, create.status, s.read, s.create)
			}
			if want := `Bearer realm="rollcall", error="insufficient_scope", error_description="The token lacks the scope ` + write + `", scope="` + write + `"`; create.status == 403 && create.header.Get("WWW-Authenticate") != want {
				t.Errorf("%s: challenge %s", tt.name, create.header.Get("WWW-Authenticate"))
			}
		}
	}
}

func TestKid(t *testing.T) {
	t.Parallel()
	signers := tokenSigners()
	named := mustJWK(t, jwkWith(jwkText(t, signers["P-256"].Public()), `"kid":"a"`))
	other := mustJWK(t, jwkWith(rfcKeyP256, `"kid":"b"`))
	nameless := mustKey(t, signers["P-256"].Public())
	tests := []struct {
		name, header string
		keys         []key
		want         error
	}{
		{"the key of that kid", `{"alg":"ES256","kid":"a"}`, []key{other, named}, nil},
		{"another key has that kid", `{"alg":"ES256","kid":"b"}`, []key{other, named}, errTokenSignature},
		{"two keys of one kid", `{"alg":"ES256","kid":"b"}`, []key{other, {"b", named.checks}}, nil},
		{"no key of that kid", `{"alg":"ES256","kid":"c"}`, []key{other, named}, errTokenKey},
		{"a key without a kid fits any", `{"alg":"ES256","kid":"c"}`, []key{other, nameless}, nil},
		{"no kid: each key is tried", `{"alg":"ES256"}`, []key{other, named}, nil},
		{"the kid of a key with another algorithm", `{"alg":"ES384","kid":"a"}`, []key{other, named}, errTokenKey},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			token := signToken(t, signers["P-256"], "ES256", tt.header, `{"exp":1700000001}`)
			if _, err := fixedVerifier("", "", tt.keys...).verify(token); err != tt.want {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
}

func TestMintToken(t *testing.T) {
	t.Parallel()
	token := mintToken(tokenSecret, grant{subject: "Alice <a&b>", scope: "users:read", issuer: "me", audience: "users", ttl: time.Hour}, tokenNow)
	v := fixedVerifier("me", "users", mustSecret(t, tokenSecret))
	c, err := v.verify(token)
	if err != nil || c.subject != "Alice <a&b>" || !c.mayRead || c.mayWrite {
		t.Errorf("verify: %+v, %v", c, err)
	}
	v.now = func() time.Time { return tokenNow.Add(time.Hour + leeway*time.Second) }
	if _, err := v.verify(token); err != errTokenExpired {
		t.Errorf("after its time: %v", err)
	}
	bare := strings.Split(mintToken(tokenSecret, grant{ttl: time.Minute}, tokenNow), ".")
	if got, want := string(mustDecode64(t, bare[1])), `{"iat":1700000000,"exp":1700000060}`; got != want {
		t.Errorf("a grant of nothing: %s, want %s", got, want)
	}
}

func TestRequireAuth(t *testing.T) {
	t.Parallel()
	bearer := func(payload string) string {
		return "Bearer " + signToken(t, tokenSecret, "HS256", `{"alg":"HS256"}`, payload)
	}
	all := bearer(`{"exp":1700000001,"sub":"alice"}`)
	read := bearer(`{"exp":1700000001,"sub":"alice","scope":"users:read"}`)
	write := bearer(`{"exp":1700000001,"sub":"alice","scope":"users:write"}`)
	expired := bearer(`{"exp":1600000000,"sub":"alice"}`)
	const (
		missing = `Bearer realm="rollcall"`
		invalid = `Bearer realm="rollcall", error="invalid_token", error_description="`
		lacks   = `Bearer realm="rollcall", error="insufficient_scope", error_description="The token lacks the scope `
	)
	tests := []struct {
		name, method, target string
		authorization        []string
		status               int
		message, challenge   string
	}{
		{"valid token", "GET", "/api/v1/users", []string{all}, 200, "", ""},
		{"scheme in lower case", "GET", "/api/v1/users", []string{"bearer" + all[6:]}, 200, "", ""},
		{"two spaces", "GET", "/api/v1/users", []string{"Bearer " + all[6:]}, 200, "", ""},
		{"no header", "GET", "/api/v1/users", nil, 401, "Missing bearer token", missing},
		{"empty header", "GET", "/api/v1/users", []string{""}, 401, "Missing bearer token", missing},
		{"scheme alone", "GET", "/api/v1/users", []string{"Bearer"}, 401, "Missing bearer token", missing},
		{"scheme and a space", "GET", "/api/v1/users", []string{"Bearer "}, 401, "Missing bearer token", missing},
		{"another scheme", "GET", "/api/v1/users", []string{"Basic YTpi"}, 401, "Missing bearer token", missing},
		{"no scheme", "GET", "/api/v1/users", []string{all[7:]}, 401, "Missing bearer token", missing},
		{"no space", "GET", "/api/v1/users", []string{"Bearer" + all[7:]}, 401, "Missing bearer token", missing},
		{"token in the query", "GET", "/api/v1/users?access_token=" + all[7:], nil, 401, "Missing bearer token", missing},
		{"two headers", "GET", "/api/v1/users", []string{all, all}, 401, string(errTokenForm), invalid + string(errTokenForm) + `"`},
		{"two headers, one of them empty", "GET", "/api/v1/users", []string{all, ""}, 401, string(errTokenForm), invalid + string(errTokenForm) + `"`},
		{"two headers, the first of another scheme", "GET", "/api/v1/users", []string{"Basic YTpi", all}, 401, "Missing bearer token", missing},
		{"two tokens in one header", "GET", "/api/v1/users", []string{all + ", " + all}, 401, string(errTokenForm), invalid + string(errTokenForm) + `"`},
		{"two words", "GET", "/api/v1/users", []string{all + " x"}, 401, string(errTokenForm), invalid + string(errTokenForm) + `"`},
		{"expired", "GET", "/api/v1/users", []string{expired}, 401, "The token has expired", invalid + `The token has expired"`},

		{"unknown route", "GET", "/api/nothing", nil, 401, "Missing bearer token", missing},
		{"escaped path", "GET", "/%61pi/v1/users", nil, 401, "Missing bearer token", missing},
		{"escaped slash", "GET", "/api%2Fv1/users", nil, 401, "Missing bearer token", missing},

		{"read with users:read", "GET", "/api/v1/users", []string{read}, 200, "", ""},
		{"HEAD with users:read", "HEAD", "/api/v1/users", []string{read}, 200, "", ""},
		{"write with users:write", "POST", "/api/v1/users", []string{write}, 200, "", ""},
		{"POST with users:read", "POST", "/api/v1/users", []string{read}, 403, "The token lacks the scope users:write", lacks + `users:write", scope="users:write"`},
		{"DELETE with users:read", "DELETE", "/api/v1/users/1", []string{read}, 403, "The token lacks the scope users:write", lacks + `users:write", scope="users:write"`},
		{"OPTIONS with users:read", "OPTIONS", "/api/v1/users", []string{read}, 403, "The token lacks the scope users:write", lacks + `users:write", scope="users:write"`},
		{"GET with users:write", "GET", "/api/v1/users", []string{write}, 403, "The token lacks the scope users:read", lacks + `users:read", scope="users:read"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			reached := false
			h := requireAuth(fixedVerifier("", "", mustSecret(t, tokenSecret)),
				http.HandlerFunc(func(http.ResponseWriter, *http.Request) { reached = true }))
			r := httptest.NewRequest(tt.method, tt.target, nil)
			r.Header["Authorization"] = tt.authorization
			var info *requestInfo
			w := httptest.NewRecorder()
			underObserve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				info = infoFrom(r.Context())
				h.ServeHTTP(w, r)
			})).ServeHTTP(w, r)
			if w.Code != tt.status || reached != (tt.status == 200) {
				t.Errorf("status %d, reached the handler: %v; want %d", w.Code, reached, tt.status)
			}
			if got := w.Header().Get("WWW-Authenticate"); got != tt.challenge {
				t.Errorf("challenge\n got %s\nwant %s", got, tt.challenge)
			}
			// Who lacks a scope is known all the same; who sent a bad token is not.
			subject := ""
			if tt.status != 401 && strings.HasPrefix(tt.target, "/api/") {
				subject = "alice"
			}
			if info.subject != subject {
				t.Errorf("subject %q, want %q", info.subject, subject)
			}
			var body struct{ Error struct{ Message string } }
			if tt.status != 200 {
				if err := json.Unmarshal(w.Body.Bytes(), &body); err != nil {
					t.Error(err)
				}
			}
			if body.Error.Message != tt.message {
				t.Errorf("message %q, want %q", body.Error.Message, tt.message)
			}
		})
	}
}

func TestSecretKey(t *testing.T) {
	t.Parallel()
	if _, err := secretKey(make([]byte, 31)); err == nil || err.Error() != "the secret has fewer than 32 bytes, or it ends with a line break" {
		t.Errorf("31 bytes: %v", err)
	}
	if k, err := secretKey(make([]byte, 32)); err != nil || algorithmsOf(k) != "HS256 HS384 HS512" {
		t.Errorf("32 bytes: %v, %v", algorithmsOf(k), err)
	}
}

func TestNewVerifierNeedsAKey(t *testing.T) {
	t.Parallel()
	defer func() {
		if recover() == nil {
			t.Error("a verifier without keys")
		}
	}()
	newVerifier(rulesOf("", ""), nil)
}

// keyFileTests are what a key file may hold; FuzzKeyFile starts from them.
func keyFileTests(t testing.TB) []keyFileTest {
	t.Helper()
	signers := tokenSigners()
	certificate, err := x509.CreateCertificate(rand.Reader, new(x509.Certificate), new(x509.Certificate), signers["P-256"].Public(), signers["P-256"])
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(signers["P-256"])
	if err != nil {
		t.Fatal(err)
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsaKey := signers["RSA"].Public().(*rsa.PublicKey)
	block := func(kind string, der []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	pemText := func(public any) string { return string(pemOf(t, public)) }
	modulus := func(bits int) *big.Int { return new(big.Int).SetBit(big.NewInt(1), bits-1, 1) }
	rsaText := func(n *big.Int, e string) string {
		return fmt.Sprintf(`{"kty":"RSA","n":%q,"e":%q}`, base64.RawURLEncoding.EncodeToString(n.Bytes()), e)
	}
	set := func(keys ...string) string { return `{"keys":[` + strings.Join(keys, ",") + `]}` }
	unsound := errUnsound.Error()
	const anyRSA = "PS256 PS384 PS512 RS256 RS384 RS512"

	return []keyFileTest{
		{"PEM: RSA", pemText(rsaKey), anyRSA, ""},
		{"PEM: RSA in PKCS #1", block("RSA PUBLIC KEY", x509.MarshalPKCS1PublicKey(rsaKey)), anyRSA, ""},
		{"PEM: P-256", pemText(signers["P-256"].Public()), "ES256", ""},
		{"PEM: P-384", pemText(signers["P-384"].Public()), "ES384", ""},
		{"PEM: P-521", pemText(signers["P-521"].Public()), "ES512", ""},
		{"PEM: Ed25519", pemText(signers["Ed25519"].Public()), "Ed25519 EdDSA", ""},
		{"PEM: certificate", block("CERTIFICATE", certificate), "ES256", ""},
		{"PEM: two keys with text around", "old\n" + pemText(signers["P-256"].Public()) + "new\n" + pemText(signers["P-384"].Public()) + "\n\n", "ES256, ES384", ""},
		{"PEM: private key", block("PRIVATE KEY", private), "", `PEM block 1 ("PRIVATE KEY"): this is neither a public key nor a certificate`},
		{"PEM: private key behind a public one", pemText(rsaKey) + block("EC PRIVATE KEY", nil), "", `PEM block 2 ("EC PRIVATE KEY"): this is neither a public key nor a certificate`},
		{"PEM: encrypted private key", block("ENCRYPTED PRIVATE KEY", nil), "", "this is neither a public key nor a certificate"},
		{"PEM: no key", block("CERTIFICATE REQUEST", nil), "", "this is neither a public key nor a certificate"},
		{"PEM: damaged DER", block("PUBLIC KEY", []byte{1, 2, 3}), "", `PEM block 1 ("PUBLIC KEY"): asn1`},
		{"PEM: damaged block", pemText(rsaKey) + strings.Replace(pemText(rsaKey), "-----END", "----END", 1), "", "1 of the 2 PEM blocks in it are sound"},
		{"PEM: RSA of 1024 bits", pemText(&rsa.PublicKey{N: modulus(1024), E: 65537}), "", unsound},
		{"PEM: P-224", pemText(p224.Public()), "", unsound},
		{"empty file", "", "", "the file is no JSON object, and 0 of the 0 PEM blocks in it are sound"},
		{"another file", "JWT_SECRET=abc\n", "", "the file is no JSON object, and 0 of the 0 PEM blocks in it are sound"},
		{"white space", strings.Repeat(" ", 1<<20), "", "the file is no JSON object"},

		{"JWK by itself", "\n " + rfcKeyRSA + "\n", anyRSA, ""},
		{"set of one", set(rfcKeyP256), "ES256", ""},
		{"set of many", set(rfcKeyRSA, rfcKeyP256, rfcKeyP521, rfcKeyEd25519), anyRSA + ", ES256, ES512, Ed25519 EdDSA", ""},
		{"alg binds", set(jwkWith(rfcKeyRSA, `"alg":"PS512"`), jwkWith(rfcKeyEd25519, `"alg":"EdDSA"`)), "PS512, EdDSA", ""},
		{"use and key_ops for signatures", jwkWith(rfcKeyP256, `"use":"sig","key_ops":["verify"]`), "ES256", ""},
		{"unknown members", jwkWith(rfcKeyP256, `"x5c":[],"ext":true`), "ES256", ""},
		{"kty unknown, passed over", set(`{"kty":"AKP","pub":""}`, rfcKeyP256), "ES256", ""},
		{"curve unknown, passed over", set(`{"kty":"EC","crv":"secp256k1"}`, `{"kty":"OKP","crv":"X25519"}`, rfcKeyP256), "ES256", ""},
		{"alg for encryption, passed over", set(jwkWith(rfcKeyRSA, `"alg":"RSA-OAEP"`), rfcKeyP256), "ES256", ""},
		{"use for encryption, passed over", set(jwkWith(rfcKeyRSA, `"use":"enc","alg":"RSA-OAEP"`), rfcKeyP256), "ES256", ""},
		{"key_ops without verify, passed over", set(jwkWith(rfcKeyRSA, `"key_ops":["encrypt"]`), rfcKeyP256), "ES256", ""},

		{"nothing but foreign keys", set(`{"kty":"AKP","kid":"k"}`), "", "none of the 1 keys in it can check a signature"},
		{"set of none", set(), "", "none of the 0 keys in it can check a signature"},
		{"no JSON", `{"keys":[}`, "", "not a JSON Web Key Set: Malformed JSON"},
		{"trailing data", set(rfcKeyP256) + "{}", "", "not a JSON Web Key Set: Malformed JSON"},
		{"neither set nor key", `{"jwks":[]}`, "", "key 1: kty or crv is missing"},
		{"keys twice", `{"keys":[],"keys":[` + rfcKeyP256 + `]}`, "", "not a JSON Web Key Set: a member is given twice"},
		{"keys an object", `{"keys":{}}`, "", "not a JSON Web Key Set: keys: json: cannot unmarshal object"},
		{"keys null", `{"keys":null}`, "", "key 1: kty or crv is missing"},
		{"keys null beside a key", jwkWith(rfcKeyP256, `"keys":null`), "ES256", ""},
		{"a key that is no object", set(`1`), "", "key 1: A JSON object is expected"},
		{"a null, passed over", set(`null`, rfcKeyP256, ` null `), "ES256", ""},
		{"nothing but a null", set(`null`), "", "none of the 1 keys in it can check a signature"},
		{"a broken key among others", set(rfcKeyP256, `{"kty":"RSA","kid":"a"}`, `{"kty":"EC","kid":"c"}`), "", "key 2: " + unsound},
		{"crv missing", set(rfcKeyP256, `{"kty":"EC","kid":"c"}`), "", "key 2: kty or crv is missing"},
		{"kty missing", set(`{"kid":"a"}`), "", "key 1: kty or crv is missing"},
		{"kty a number", set(`{"kty":1}`), "", "kty: json: cannot unmarshal number"},
		{"kid a number", jwkWith(rfcKeyP256, `"kid":1`), "", "kid: json: cannot unmarshal number"},
		{"a member twice", set(jwkWith(rfcKeyP256, `"kty":"EC"`)), "", "a member is given twice"},
		{"a secret", set(`{"kty":"oct","k":"` + rfcSecret + `"}`), "", "this is a secret or a private key"},
		{"private RSA key", jwkWith(rfcKeyRSA, `"d":"AQAB"`), "", "this is a secret or a private key"},
		{"private EC key", jwkWith(rfcKeyP256, `"d":"AQAB"`), "", "this is a secret or a private key"},
		{"private Ed25519 key for encryption", jwkWith(rfcKeyEd25519, `"d":"AQAB","use":"enc"`), "", "this is a secret or a private key"},
		{"alg of another kty", jwkWith(rfcKeyRSA, `"alg":"ES256"`), "", `alg is "ES256", which a key of this kind does not take`},
		{"alg of another curve", jwkWith(rfcKeyP256, `"alg":"ES384"`), "", `alg is "ES384", which a key of this kind does not take`},
		{"alg of a secret", jwkWith(rfcKeyRSA, `"alg":"HS256"`), "", `alg is "HS256"`},
		{"alg none", jwkWith(rfcKeyRSA, `"alg":"none"`), "", `alg is "none"`},
		{"null is absent", jwkWith(rfcKeyRSA, `"d":null,"alg":null,"use":null,"key_ops":null,"kid":null`), anyRSA, ""},
		{"kty null", set(`{"kty":null}`), "", "kty or crv is missing"},
		{"e null", `{"kty":"RSA","n":"AQAB","e":null}`, "", unsound},
		{"null and a private key", jwkWith(rfcKeyRSA, `"d":null,"d":"AQAB"`), "", "a member is given twice"},
		{"key_ops a string", jwkWith(rfcKeyRSA, `"key_ops":"verify"`), "", "key_ops: json: cannot unmarshal string"},
		{"n padded", strings.Replace(rfcKeyRSA, `poQ"`, `poQ=="`, 1), "", "n: illegal base64 data"},
		{"n of 2047 bits", rsaText(modulus(2047), "AQAB"), "", unsound},
		{"n of 16385 bits", rsaText(modulus(16385), "AQAB"), "", unsound},
		{"n even", rsaText(new(big.Int).Lsh(big.NewInt(1), 2047), "AQAB"), "", unsound},
		{"e of 3", rsaText(modulus(2048), "Aw"), anyRSA, ""},
		{"e of 1", rsaText(modulus(2048), "AQ"), "", unsound},
		{"e even", rsaText(modulus(2048), "AQAC"), "", unsound},
		{"e of 2^31+1", rsaText(modulus(2048), "gAAAAQ"), "", unsound},
		{"e of 2^64+3", rsaText(modulus(2048), "AQAAAAAAAAAD"), "", unsound},
		{"e empty", rsaText(modulus(2048), ""), "", unsound},
		{"point not on the curve", strings.Replace(rfcKeyP256, "f83O", "f83P", 1), "", "point not on"},
		{"point of zeros", `{"kty":"EC","crv":"P-256","x":"` + encode64(strings.Repeat("\x00", 32)) + `","y":"` + encode64(strings.Repeat("\x00", 32)) + `"}`, "", "point not on"},
		{"point of another curve", strings.Replace(rfcKeyP521, "P-521", "P-384", 1), "", "point"},
		{"y missing", `{"kty":"EC","crv":"P-256","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU"}`, "", unsound},
		{"Ed25519 key too short", `{"kty":"OKP","crv":"Ed25519","x":"AQAB"}`, "", unsound},
	}
}

type keyFileTest struct {
	name, text string
	want       string // the algorithms of each key
	err        string // a part of the error
}

func TestKeyFile(t *testing.T) {
	t.Parallel()
	for _, tt := range keyFileTests(t) {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "keys")
			if err := os.WriteFile(path, []byte(tt.text), 0o600); err != nil {
				t.Fatal(err)
			}
			keys, _, err := readKeyFile(path)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("error %v, want %s", err, tt.err)
				}
				if strings.ContainsRune(err.Error(), '\n') {
					t.Errorf("an error of more than one line: %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, k := range keys {
				got = append(got, algorithmsOf(k))
			}
			if joined := strings.Join(got, ", "); joined != tt.want {
				t.Errorf("got %s, want %s", joined, tt.want)
			}
		})
	}
}

func TestKeyFileMissing(t *testing.T) {
	t.Parallel()
	if _, _, err := readKeyFile(filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}

// A key set as libraries write it, with null for what is not there, lets its tokens
// in; a null among the keys is told of, and no more.
func TestServiceWithNullInItsKeys(t *testing.T) {
	t.Parallel()
	signer := tokenSigners()["P-256"]
	path := filepath.Join(t.TempDir(), "keys.json")
	text := `{"keys":[null,` + jwkWith(jwkText(t, signer.Public()), `"d":null,"alg":null,"use":null,"kid":null`) + `]}`
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	s := newService(t, "AUTH=jwt", "JWT_PUBLIC_KEY_FILE="+path)
	token := signToken(t, signer, "ES256", `{"alg":"ES256"}`, fmt.Sprintf(`{"exp":%d}`, time.Now().Add(time.Hour).Unix()))
	if a := s.call("GET", usersPath, "", "Authorization: Bearer "+token); a.status != 200 {
		t.Errorf("%d %s", a.status, a.body)
	}
	if line := s.waitLog("JWT_PUBLIC_KEY_FILE: a key is passed over: key 1: not a key for signatures that this service knows"); line["level"] != "WARN" {
		t.Errorf("logged %v", line)
	}
}

// FuzzToken holds that whatever verifies is one of the tokens that were signed:
// without the private keys, nothing can be made of them.
func FuzzToken(f *testing.F) {
	secret := mustDecode64(f, rfcSecret)
	now := time.Unix(rfcExpiry-1, 0)
	signed := []string{
		rfcTokenHS256, rfcTokenRS256, rfcTokenES256,
		mintToken(secret, grant{subject: "alice", scope: "users:read", ttl: time.Hour}, now),
		signToken(f, secret, "HS512", `{"kid":"a","alg":"HS512"}`, `{"exp":1e99,"nbf":0.5,"iat":1,"aud":["x"],"scp":["users:read"]}`),
	}
	for _, token := range signed {
		f.Add(token)
	}
	f.Add(rfcTokenES512)
	f.Add(rfcTokenEdDSA)
	f.Add(encode64(`{"alg":"none"}`) + "." + rfcPayload + ".")
	f.Add(`{"alg":"HS256","kid":"a","crit":[]}`)
	f.Add(`{"exp":1e999,"nbf":null,"iat":-1,"iss":"me","aud":["users",1],"sub":"a\u0062","scope":"a b","scp":["a"],"permissions":"c","roles":["d",1]}`)
	keys := []key{mustSecret(f, secret), mustJWK(f, rfcKeyRSA), mustJWK(f, rfcKeyP256), mustJWK(f, rfcKeyP521), mustJWK(f, rfcKeyEd25519)}
	v := newVerifier(rulesOf("", "", keys...), nil)
	v.now = func() time.Time { return now }
	strict := newVerifier(rulesOf("me", "users", keys...), nil)
	strict.now = v.now

	f.Fuzz(func(t *testing.T, text string) {
		_, err := v.verify(text)
		if err == nil && !slices.Contains(signed, text) {
			t.Errorf("forged: %s", text)
		}
		if _, again := v.verify(text); again != err {
			t.Errorf("%v the first time, %v the second", err, again)
		}
		// A header comes from anybody, and claims from all who hold a key.
		headerErr := checkSignature(keys, []byte(text), nil, nil)
		_, claimsErr := strict.readClaims([]byte(text))
		for _, err := range []error{err, headerErr, claimsErr} {
			if _, ok := err.(tokenError); err != nil && !ok {
				t.Errorf("not an error for the caller: %v", err)
			}
		}
	})
}

// FuzzScopes holds that a claim of scopes is read as encoding/json reads it.
func FuzzScopes(f *testing.F) {
	for _, seed := range []string{`"users:read"`, `"openid users:read"`, `["a","users:read"]`, `["users:read",null]`, `["users:read",1]`,
		`[["users:read"]]`, `{"users:read":1}`, `null`, `"users:read "`, `"users\u003aread"`, `["users:read" ]`, `[]`} {
		f.Add(seed)
	}
	v := newVerifier(rulesOf("", "", mustSecret(f, tokenSecret)), nil)
	f.Fuzz(func(t *testing.T, value string) {
		var decoded any
		if json.Unmarshal([]byte(value), &decoded) != nil {
			return
		}
		want := false
		switch d := decoded.(type) {
		case string:
			want = slices.Contains(strings.Split(d, " "), "users:read")
		case []any:
			noString := func(element any) bool { _, ok := element.(string); return !ok }
			want = slices.Contains(d, any("users:read")) && !slices.ContainsFunc(d, noString)
		}
		for _, claim := range scopeClaims {
			c, err := v.readClaims([]byte(`{"exp":1,"` + claim + `":` + value + `}`))
			if err == nil && c.mayRead != want {
				t.Errorf("%s of %s: may read: %t, want %t", claim, value, c.mayRead, want)
			}
		}
	})
}

// FuzzKeyFile holds that a file gives either an error or keys that can be used.
func FuzzKeyFile(f *testing.F) {
	for _, tt := range keyFileTests(f) {
		if len(tt.text) <= 4096 {
			f.Add([]byte(tt.text))
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		keys, _, err := parseKeys(data)
		if (err == nil) != (len(keys) > 0) {
			t.Fatalf("%d keys and the error %v", len(keys), err)
		}
		for _, k := range keys {
			if len(k.checks) == 0 {
				t.Error("a key that takes no algorithm")
			}
			if k.checks["none"] != nil || k.checks["HS256"] != nil {
				t.Error("a public key that takes no signature, or that of a secret")
			}
			for algorithm, check := range k.checks {
				if check(data, make([]byte, 64)) {
					t.Errorf("%s: a signature of zeros", algorithm)
				}
			}
		}
	})
}

// TestTokenErrors keeps what callers read within what RFC 6750, section 3, lets
// stand in an error_description.
func TestTokenErrors(t *testing.T) {
	t.Parallel()
	for _, err := range []tokenError{errTokenLong, errTokenForm, errTokenHeader, errTokenCrit, errTokenKey, errTokenSignature, errTokenClaims,
		errTokenDate, errTokenSub, errTokenExpired, errTokenEarly, errTokenIssuer, errTokenAudience} {
		for _, c := range string(err) {
			if c < ' ' || c > '~' || c == '"' || c == '\\' {
				t.Errorf("%q in %q", c, err)
			}
		}
	}
}
