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
	"io"
	"math"
	"math/big"
	"os"
	"slices"
	"strings"
)

// What may sign a token
//
// The secret, a PEM file and a JSON Web Key Set all become a list of keys. A
// key knows by itself which algorithms it takes, so nothing that a token says
// about its own algorithm makes a key do what it was not made for (RFC 8725,
// section 3.1). Below are the key, the files, and the JSON Web Key, in turn.

const (
	minSecretBytes  = 32      // RFC 7518, section 3.2: as long as the output of HS256
	minModulusBits  = 2048    // RFC 7518, section 3.3
	maxModulusBits  = 16384   // past this, checking one signature takes too long
	maxKeyFileBytes = 1 << 20 // a real key set holds a few kilobytes
)

// curves are those of ECDSA. RFC 7518, section 3.4: each algorithm has its own.
var curves = map[string]struct {
	curve     elliptic.Curve
	algorithm string
}{
	"P-256": {elliptic.P256(), "ES256"},
	"P-384": {elliptic.P384(), "ES384"},
	"P-521": {elliptic.P521(), "ES512"},
}

// A key is one key that a token may be signed with. [newKey] has checked it.
type key struct {
	id         string   // the kid of a JWK, else empty
	material   any      // hmacSecret, *rsa.PublicKey, *ecdsa.PublicKey or ed25519.PublicKey
	algorithms []string // the values of alg that it takes
}

// An hmacSecret has a type of its own, so that no public key can be taken for
// one: not even an [ed25519.PublicKey], which is a []byte underneath as well.
type hmacSecret []byte

// secretKey returns the key of tokens that are signed with a shared secret. One that
// ends with a line break was read from a file with it: whoever else signs or checks
// with this secret hardly does that.
func secretKey(secret []byte) (key, error) {
	if bytes.HasSuffix(secret, []byte("\n")) || bytes.HasSuffix(secret, []byte("\r")) {
		return key{}, errors.New("the secret ends with a line break; it takes one without")
	}
	if len(secret) < minSecretBytes {
		return key{}, fmt.Errorf("the secret has %d bytes, it takes at least %d", len(secret), minSecretBytes)
	}
	return newKey(hmacSecret(secret))
}

// newKey returns the key that takes every algorithm that material is fit for.
// The error says what is wrong with material.
func newKey(material any) (key, error) {
	k := key{material: material}
	switch m := material.(type) {
	case hmacSecret:
		k.algorithms = []string{"HS256", "HS384", "HS512"}
	case *rsa.PublicKey:
		switch bits := m.N.BitLen(); {
		case bits < minModulusBits || bits > maxModulusBits:
			return key{}, fmt.Errorf("the RSA modulus has %d bits, it takes %d to %d", bits, minModulusBits, maxModulusBits)
		case m.N.Bit(0) == 0:
			return key{}, errors.New("the RSA modulus is even")
		case m.E < 3 || m.E > math.MaxInt32 || m.E%2 == 0:
			return key{}, errors.New("the RSA exponent is not an odd number from 3 to 2147483647")
		}
		k.algorithms = []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}
	case *ecdsa.PublicKey:
		name := m.Params().Name
		if _, ok := curves[name]; !ok {
			return key{}, fmt.Errorf("the curve %s is none of P-256, P-384 and P-521", name)
		}
		k.algorithms = []string{curves[name].algorithm}
	case ed25519.PublicKey:
		k.algorithms = []string{"EdDSA", "Ed25519"} // RFC 8037, and the exact name by RFC 9864
	default:
		return key{}, errors.New("the key is none of RSA, P-256, P-384, P-521 and Ed25519")
	}
	return k, nil
}

// takes reports whether k may check signatures of that algorithm.
func (k key) takes(algorithm string) bool { return slices.Contains(k.algorithms, algorithm) }

// verifies reports whether signature is that of k over input. It is false for
// every algorithm that k does not take.
func (k key) verifies(algorithm string, input, signature []byte) bool {
	if !k.takes(algorithm) {
		return false
	}
	hash := hashOf(algorithm)
	switch m := k.material.(type) {
	case hmacSecret:
		return hmac.Equal(signature, hmacSum(hash, m, input))
	case *rsa.PublicKey:
		if strings.HasPrefix(algorithm, "RS") {
			return rsa.VerifyPKCS1v15(m, hash, digest(hash, input), signature) == nil
		}
		// RFC 7518, section 3.5: the salt is as long as the hash.
		salted := &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}
		return rsa.VerifyPSS(m, hash, digest(hash, input), signature, salted) == nil
	case *ecdsa.PublicKey:
		// RFC 7518, section 3.4: r and s side by side, each as long as a
		// coordinate, without the ASN.1 that other formats put around them.
		size := coordinateBytes(m.Curve)
		if len(signature) != 2*size {
			return false
		}
		r, s := new(big.Int).SetBytes(signature[:size]), new(big.Int).SetBytes(signature[size:])
		return ecdsa.Verify(m, digest(hash, input), r, s)
	case ed25519.PublicKey:
		return ed25519.Verify(m, input, signature) // hashes by itself
	}
	return false
}

// hashOf returns the hash that the digits at the end of the algorithm name.
func hashOf(algorithm string) crypto.Hash {
	switch {
	case strings.HasSuffix(algorithm, "256"):
		return crypto.SHA256
	case strings.HasSuffix(algorithm, "384"):
		return crypto.SHA384
	default:
		return crypto.SHA512
	}
}

func digest(hash crypto.Hash, input []byte) []byte {
	h := hash.New()
	h.Write(input)
	return h.Sum(nil)
}

func hmacSum(hash crypto.Hash, secret, input []byte) []byte {
	h := hmac.New(hash.New, secret)
	h.Write(input)
	return h.Sum(nil)
}

func coordinateBytes(curve elliptic.Curve) int { return (curve.Params().BitSize + 7) / 8 }

// readKeyFile reads the public keys of a PEM file or a JSON Web Key Set. One
// broken key refuses the file: whoever starts the service can mend it, and a
// key that was quietly left out would show only later, as a 401.
func readKeyFile(path string) (keySet, error) {
	f, err := os.Open(path)
	if err != nil {
		return keySet{}, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxKeyFileBytes+1))
	if err != nil {
		return keySet{}, err
	}
	return parseKeyFile(data)
}

// parseKeyFile is [readKeyFile] for a file that has been read.
func parseKeyFile(data []byte) (set keySet, err error) {
	if len(data) > maxKeyFileBytes {
		return keySet{}, fmt.Errorf("the file is larger than %d bytes", maxKeyFileBytes)
	}
	if !bytes.HasPrefix(bytes.TrimSpace(data), []byte("{")) {
		set.keys, err = parsePEM(data)
		return set, err
	}
	set, err = parseJWKS(data)
	switch {
	case err != nil:
		return keySet{}, err
	case len(set.broken) > 0:
		return keySet{}, joinLine(set.broken)
	case len(set.keys) == 0:
		return keySet{}, fmt.Errorf("no key in it can check a signature: %w", joinLine(set.ignored))
	}
	return set, nil
}

// joinLine is [errors.Join] in one line, as a mistake in the configuration is reported.
func joinLine(errs []error) error {
	if len(errs) == 0 {
		return errors.New("it is empty")
	}
	joined := errs[0]
	for _, err := range errs[1:] {
		joined = fmt.Errorf("%w; %w", joined, err)
	}
	return joined
}

// parsePEM reads the public keys of PEM blocks (RFC 7468). Of a certificate only
// the key counts, neither its dates nor who issued it.
func parsePEM(data []byte) ([]key, error) {
	var keys []key
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		k, err := parseBlock(block)
		if err != nil {
			return nil, fmt.Errorf("PEM block %d (%.64q): %w", len(keys)+1, block.Type, err)
		}
		keys = append(keys, k)
	}
	// pem.Decode passes over a damaged block as if it were not there.
	switch begun := bytes.Count(data, []byte("-----BEGIN ")); {
	case begun == 0:
		return nil, errors.New("the file holds neither a PEM block nor a JSON object")
	case begun != len(keys):
		return nil, fmt.Errorf("%d of %d PEM blocks are damaged", begun-len(keys), begun)
	}
	return keys, nil
}

var errPrivateKey = errors.New("this is a private key, where only the public one belongs")

func parseBlock(block *pem.Block) (key, error) {
	var public any
	var err error
	switch {
	case block.Type == "PUBLIC KEY":
		public, err = x509.ParsePKIXPublicKey(block.Bytes)
	case block.Type == "RSA PUBLIC KEY":
		public, err = x509.ParsePKCS1PublicKey(block.Bytes)
	case block.Type == "CERTIFICATE":
		var certificate *x509.Certificate
		if certificate, err = x509.ParseCertificate(block.Bytes); err == nil {
			public = certificate.PublicKey
		}
	case strings.HasSuffix(block.Type, "PRIVATE KEY"):
		err = errPrivateKey
	default:
		err = errors.New("this kind of block holds no public key")
	}
	if err != nil {
		return key{}, err
	}
	return newKey(public)
}

// A keySet is what [parseJWKS] found in one. The errors name a key by its place
// and its kid.
type keySet struct {
	keys    []key
	broken  []error // those to be told about
	ignored []error // those for another purpose, or null: RFC 7517, section 5, has them passed over
}

// parseJWKS reads a JSON Web Key Set, or one JSON Web Key by itself (RFC 7517).
// It fails when data is neither; what a broken key means, the caller decides. A
// member that is null counts as absent: some libraries write all that they know of.
func parseJWKS(data []byte) (set keySet, err error) {
	var members []json.RawMessage
	isSet, isKey := false, false
	err = walkUniqueObject(data, func(name string, value []byte) error {
		if string(value) == "null" {
			return nil
		}
		isKey = isKey || name == "kty"
		if name == "keys" {
			isSet = true
			if value[0] != '[' {
				return errors.New("keys is not an array")
			}
			return json.Unmarshal(value, &members)
		}
		return nil
	})
	if err == nil && !isSet && !isKey {
		err = errors.New("it has neither keys nor kty")
	}
	if err != nil {
		return keySet{}, fmt.Errorf("not a JSON Web Key Set: %w", err)
	}
	if !isSet {
		members = []json.RawMessage{data}
	}
	for i, member := range members {
		if string(member) == "null" {
			set.ignored = append(set.ignored, fmt.Errorf("key %d is null", i+1))
			continue
		}
		k, err := parseJWK(member)
		if err != nil {
			err = fmt.Errorf("key %d (kid %.64q): %w", i+1, k.id, err)
		}
		switch {
		case errors.Is(err, errForeignKey):
			set.ignored = append(set.ignored, err)
		case err != nil:
			set.broken = append(set.broken, err)
		default:
			set.keys = append(set.keys, k)
		}
	}
	return set, nil
}

// errForeignKey is what a JWK gets that is sound, and none of our business.
var errForeignKey = errors.New("not a key for signatures that this service knows")

// parseJWK reads one JSON Web Key. What it returns beside an error has the kid.
func parseJWK(data []byte) (key, error) {
	j := &jwk{members: make(map[string][]byte)}
	j.err = walkUniqueObject(data, func(name string, value []byte) error {
		if string(value) != "null" {
			j.members[name] = value
		}
		return nil
	})
	var id string
	if j.has("kid") {
		id = j.text("kid")
	}
	j.checkPurpose()
	material := j.material()
	if j.err != nil {
		return key{id: id}, j.err
	}
	k, err := newKey(material)
	k.id = id
	if err == nil && j.has("alg") {
		algorithm := j.text("alg")
		if !signatureAlgorithm[algorithm] {
			j.fail(errForeignKey)
		} else if !k.takes(algorithm) {
			j.fail(fmt.Errorf("alg is %.64q, and the key takes %s", algorithm, strings.Join(k.algorithms, ", ")))
		}
		k.algorithms, err = []string{algorithm}, j.err
	}
	return k, err
}

// signatureAlgorithm is true of the algorithms of signatures (RFC 7518, section
// 3.1). All others are for encryption, and not for us.
var signatureAlgorithm = map[string]bool{
	"HS256": true, "HS384": true, "HS512": true, "RS256": true, "RS384": true, "RS512": true,
	"PS256": true, "PS384": true, "PS512": true, "ES256": true, "ES384": true, "ES512": true,
	"EdDSA": true, "Ed25519": true, "none": true,
}

// A jwk is a JSON Web Key that is being read. The first error sticks, so that
// its members can be read in a row: only the last one has to be asked for it.
type jwk struct {
	members map[string][]byte
	err     error
}

// checkPurpose fails for a secret key, which must not be here, and with
// [errForeignKey] for one that is not meant to check signatures: RFC 7517,
// sections 4.1 to 4.3.
func (j *jwk) checkPurpose() {
	switch kty := j.text("kty"); {
	case kty == "oct":
		j.fail(errors.New("this is a shared secret (kty is oct): JWT_SECRET is the place for it"))
	case kty != "RSA" && kty != "EC" && kty != "OKP":
		j.fail(errForeignKey)
	case j.has("d"): // RFC 7518, sections 6.2.2 and 6.3.2; RFC 8037, section 2
		j.fail(errPrivateKey)
	}
	if j.has("use") && j.text("use") != "sig" {
		j.fail(errForeignKey)
	}
	if j.has("key_ops") {
		operations, ok := jsonStrings(j.members["key_ops"])
		if !ok {
			j.fail(errors.New("key_ops is not an array of strings"))
		} else if !slices.Contains(operations, "verify") {
			j.fail(errForeignKey)
		}
	}
}

// material returns the public key that the members make up: RFC 7518, sections
// 6.2.1 and 6.3.1, and RFC 8037, section 2. A curve that is not among [curves]
// makes the key foreign, like an unknown kty.
func (j *jwk) material() any {
	switch j.text("kty") {
	case "RSA":
		n, e := new(big.Int).SetBytes(j.octets("n")), new(big.Int).SetBytes(j.octets("e"))
		if e.BitLen() > 31 {
			e.SetInt64(0) // newKey refuses it, like all that do not fit into 31 bits
		}
		return &rsa.PublicKey{N: n, E: int(e.Int64())}
	case "EC":
		c, ok := curves[j.text("crv")]
		if !ok {
			j.fail(errForeignKey)
			return nil
		}
		x, y := j.octets("x"), j.octets("y")
		if size := coordinateBytes(c.curve); len(x) != size || len(y) != size {
			j.fail(fmt.Errorf("x and y have %d and %d bytes, each takes %d", len(x), len(y), size))
			return nil
		}
		point := slices.Concat([]byte{4}, x, y) // SEC 1, section 2.3.3: 4 stands for "uncompressed"
		public, err := ecdsa.ParseUncompressedPublicKey(c.curve, point)
		if err != nil {
			j.fail(errors.New("x and y are no point on the curve"))
		}
		return public
	case "OKP":
		if j.text("crv") != "Ed25519" {
			j.fail(errForeignKey)
			return nil
		}
		x := j.octets("x")
		if len(x) != ed25519.PublicKeySize {
			j.fail(fmt.Errorf("x has %d bytes, it takes %d", len(x), ed25519.PublicKeySize))
		}
		return ed25519.PublicKey(x)
	}
	return nil
}

// fail keeps err if it is the first one.
func (j *jwk) fail(err error) {
	if j.err == nil {
		j.err = err
	}
}

func (j *jwk) has(name string) bool { return j.members[name] != nil }

// text returns the string that a required member holds.
func (j *jwk) text(name string) string {
	s, ok := jsonString(j.members[name])
	if !j.has(name) {
		j.fail(fmt.Errorf("%s is missing", name))
	} else if !ok {
		j.fail(fmt.Errorf("%s is not a string", name))
	}
	return s
}

// octets returns the bytes that a required member holds in base64url.
func (j *jwk) octets(name string) []byte {
	b, err := decodeBase64(j.text(name))
	if err != nil {
		j.fail(fmt.Errorf("%s is not unpadded base64url", name))
	}
	return b
}
