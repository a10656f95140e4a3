package main

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"hash"
	"math/big"
	"os"
	"regexp"
	"slices"
	"strconv"
)

// What may sign a token
//
// The secret, a PEM file and a JSON Web Key Set all become a list of keys. A key brings a
// check for each algorithm that it is fit for, so nothing that a token says about its own
// algorithm makes a key do what it was not made for (RFC 8725, section 3.1).

// A key is one key that a token may be signed with.
type key struct {
	id     string                    // the kid of a JWK, else empty
	checks map[string]signatureCheck // by the value of alg
}

// A signatureCheck reports whether the signature is that of a key over the input.
type signatureCheck func(input, signature []byte) bool

// hashes are those of the algorithms, by the digits in their names.
var hashes = map[string]crypto.Hash{"256": crypto.SHA256, "384": crypto.SHA384, "512": crypto.SHA512}

// curves are those of ECDSA.
var curves = map[string]elliptic.Curve{"P-256": elliptic.P256(), "P-384": elliptic.P384(), "P-521": elliptic.P521()}

// sum returns the hash of input, or its authentication code when h is an HMAC.
func sum(h hash.Hash, input []byte) []byte {
	h.Write(input)
	return h.Sum(nil)
}

const minSecretBytes = 32 // RFC 7518, section 3.2: as long as the output of HS256

// secretKey returns the key of tokens that are signed with a shared secret. A line break
// at the end is refused: it comes from a file, and others hardly sign with it.
func secretKey(secret []byte) (key, error) {
	if len(secret) < minSecretBytes || bytes.HasSuffix(secret, []byte("\n")) || bytes.HasSuffix(secret, []byte("\r")) {
		return key{}, fmt.Errorf("the secret has fewer than %d bytes, or it ends with a line break", minSecretBytes)
	}
	k := key{checks: make(map[string]signatureCheck)}
	for bits, hash := range hashes {
		k.checks["HS"+bits] = func(input, signature []byte) bool {
			return hmac.Equal(signature, sum(hmac.New(hash.New, secret), input))
		}
	}
	return k, nil
}

// setSecret sets JWT_SECRET.
func (c *config) setSecret(value string) error {
	k, err := secretKey([]byte(value))
	c.jwtSecret, c.keys = []byte(value), append(c.keys, k)
	return err
}

// errUnsound is the error of a key that no token may be signed with.
var errUnsound = errors.New("the key is none of RSA (odd modulus of 2048 to 16384 bits, odd exponent from 3 to 2147483647), " +
	"P-256, P-384, P-521 (a point on the curve) and Ed25519 (32 bytes)")

// publicKey returns the key of tokens that are signed with the other half of public.
// It takes the results of a parser: the error is the parser's or [errUnsound].
func publicKey(public any, err error) (key, error) {
	if err != nil {
		return key{}, err
	}
	k := key{checks: make(map[string]signatureCheck)}
	switch public := public.(type) {
	case *rsa.PublicKey:
		// RFC 7518, section 3.3, has the lower bound; past the upper one, a check takes too long.
		size, e := public.N.BitLen(), public.E
		if size < 2048 || size > 16384 || public.N.Bit(0) == 0 || e < 3 || e > 1<<31-1 || e%2 == 0 {
			return key{}, errUnsound
		}
		salted := &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash} // RFC 7518, section 3.5
		for bits, hash := range hashes {
			k.checks["RS"+bits] = func(input, signature []byte) bool {
				return rsa.VerifyPKCS1v15(public, hash, sum(hash.New(), input), signature) == nil
			}
			k.checks["PS"+bits] = func(input, signature []byte) bool {
				return rsa.VerifyPSS(public, hash, sum(hash.New(), input), signature, salted) == nil
			}
		}
	case *ecdsa.PublicKey:
		size := public.Params().BitSize
		if curves[public.Params().Name] == nil {
			return key{}, errUnsound
		}
		// RFC 7518, section 3.4: the hash is as long as a coordinate, for P-521 nearly. The
		// signature is r and s side by side, each as long as a coordinate, without ASN.1.
		bits, half := strconv.Itoa(min(size, 512)), (size+7)/8
		k.checks["ES"+bits] = func(input, signature []byte) bool {
			if len(signature) != 2*half {
				return false
			}
			r, s := new(big.Int).SetBytes(signature[:half]), new(big.Int).SetBytes(signature[half:])
			return ecdsa.Verify(public, sum(hashes[bits].New(), input), r, s)
		}
	case ed25519.PublicKey:
		check := func(input, signature []byte) bool { return ed25519.Verify(public, input, signature) }
		k.checks["EdDSA"], k.checks["Ed25519"] = check, check // RFC 8037, and the exact name by RFC 9864
	default:
		return key{}, errUnsound
	}
	return k, nil
}

// readKeyFile reads a file of public keys. One broken key refuses it: left out quietly, it
// would show only later, as a 401. The ignored are the errors of keys for another purpose,
// which RFC 7517, section 5, has passed over.
func readKeyFile(path string) (keys []key, ignored []error, err error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, nil, err
	}
	return parseKeys(data)
}

// setKeyFile sets JWT_PUBLIC_KEY_FILE.
func (c *config) setKeyFile(path string) error {
	keys, ignored, err := readKeyFile(path)
	if err != nil {
		return fmt.Errorf("is no file of public keys: %w", err)
	}
	c.keys = append(c.keys, keys...)
	for _, err := range ignored {
		c.warnings = append(c.warnings, "JWT_PUBLIC_KEY_FILE: a key is passed over: "+err.Error())
	}
	return nil
}

// parseKeys parses a JSON Web Key Set or PEM blocks (RFC 7468). Of a certificate only
// the key counts, neither its dates nor its issuer.
func parseKeys(data []byte) (keys []key, ignored []error, err error) {
	if bytes.HasPrefix(bytes.TrimSpace(data), []byte("{")) {
		return parseJWKS(data, false)
	}
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		var k key
		switch block.Type {
		case "PUBLIC KEY":
			k, err = publicKey(x509.ParsePKIXPublicKey(block.Bytes))
		case "RSA PUBLIC KEY":
			k, err = publicKey(x509.ParsePKCS1PublicKey(block.Bytes))
		case "CERTIFICATE":
			var certificate *x509.Certificate
			if certificate, err = x509.ParseCertificate(block.Bytes); err == nil {
				k, err = publicKey(certificate.PublicKey, nil)
			}
		default:
			err = errors.New("this is neither a public key nor a certificate")
		}
		if err != nil {
			return nil, nil, fmt.Errorf("PEM block %d (%.64q): %w", len(keys)+1, block.Type, err)
		}
		keys = append(keys, k)
	}
	// pem.Decode passes over a damaged block as if it were not there.
	if begun := bytes.Count(data, []byte("-----BEGIN ")); begun == 0 || begun != len(keys) {
		return nil, nil, fmt.Errorf("the file is no JSON object, and %d of the %d PEM blocks in it are sound", len(keys), begun)
	}
	return keys, nil, nil
}

// errForeignKey is the error of a JWK that is sound, and not for this service.
var errForeignKey = errors.New("not a key for signatures that this service knows")

// parseJWKS reads a JSON Web Key Set, or one JSON Web Key by itself (RFC 7517). Its
// error is that of the first broken key, unless broken ones are to be ignored.
func parseJWKS(data []byte, ignoreBroken bool) (keys []key, ignored []error, err error) {
	var elements []json.RawMessage
	if err := readFields(data, map[string]any{"keys": &elements}); err != nil {
		return nil, nil, fmt.Errorf("not a JSON Web Key Set: %w", err)
	}
	if elements == nil {
		elements = []json.RawMessage{data}
	}
	for i, element := range elements {
		k, err := parseJWK(element)
		switch {
		case err == nil:
			keys = append(keys, k)
		case ignoreBroken || errors.Is(err, errForeignKey):
			ignored = append(ignored, fmt.Errorf("key %d: %w", i+1, err))
		default:
			return nil, nil, fmt.Errorf("key %d: %w", i+1, err)
		}
	}
	if len(keys) == 0 {
		return nil, nil, fmt.Errorf("none of the %d keys in it can check a signature", len(elements))
	}
	return keys, ignored, nil
}

// parseJWK reads one JSON Web Key: RFC 7517, section 4; RFC 7518, section 6; RFC 8037,
// section 2. For a key with another purpose, and for null, the error is [errForeignKey].
func parseJWK(data []byte) (k key, err error) {
	var kty, crv, kid string
	var n, e, x, y octets
	var d any
	var alg *string
	use, operations := "sig", []string{"verify"}
	err = readFields(data, map[string]any{"kty": &kty, "crv": &crv, "kid": &kid, "alg": &alg, "use": &use,
		"key_ops": &operations, "n": &n, "e": &e, "x": &x, "y": &y, "d": &d})
	switch {
	case string(data) == "null":
		return key{}, errForeignKey
	case err != nil:
		return key{}, err
	case kty == "" || crv == "" && (kty == "EC" || kty == "OKP"):
		return key{}, errors.New("kty or crv is missing")
	case kty == "oct" || d != nil:
		return key{}, errors.New("this is a secret or a private key; only public ones belong here, and a secret in JWT_SECRET")
	case use != "sig" || !slices.Contains(operations, "verify") || alg != nil && !signatureAlgorithm.MatchString(*alg):
		return key{}, errForeignKey
	}
	switch curve := curves[crv]; {
	case kty == "RSA" && len(e) <= 4:
		k, err = publicKey(&rsa.PublicKey{N: new(big.Int).SetBytes(n), E: int(new(big.Int).SetBytes(e).Int64())}, nil)
	case kty == "EC" && curve != nil && len(x) == len(y):
		point := slices.Concat([]byte{4}, x, y) // SEC 1, section 2.3.3: 4 stands for "uncompressed"
		k, err = publicKey(ecdsa.ParseUncompressedPublicKey(curve, point))
	case kty == "OKP" && crv == "Ed25519" && len(x) == ed25519.PublicKeySize:
		k, err = publicKey(ed25519.PublicKey(x), nil)
	case kty == "RSA" || kty == "EC" && curve != nil || kty == "OKP" && crv == "Ed25519":
		return key{}, errUnsound
	default:
		return key{}, errForeignKey
	}
	if err == nil && alg != nil {
		if k.checks[*alg] == nil {
			return key{}, fmt.Errorf("alg is %.64q, which a key of this kind does not take", *alg)
		}
		k.checks = map[string]signatureCheck{*alg: k.checks[*alg]}
	}
	k.id = kid
	return k, err
}

// signatureAlgorithm matches the values of alg that are for signatures (RFC 7518,
// section 3.1; RFC 8037; RFC 9864). All others are for encryption.
var signatureAlgorithm = regexp.MustCompile(`^([HRPE]S\d{3}|EdDSA|Ed25519|none)$`)

// octets are bytes that JSON has as base64url.
type octets []byte

func (o *octets) UnmarshalText(text []byte) (err error) {
	*o, err = decodeBase64(string(text))
	return err
}

// readFields reads the members of a JSON object into the fields of their names, which
// are exact. One that is null counts as absent: some libraries write all they know of.
func readFields(data []byte, fields map[string]any) error {
	members, err := uniqueMembers(data)
	if err != nil {
		return err
	}
	for name, value := range members {
		if fields[name] == nil || string(value) == "null" {
			continue
		}
		if err := json.Unmarshal(value, fields[name]); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}
