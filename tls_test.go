package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A pairFiles is a certificate and its key on disk.
type pairFiles struct {
	t         *testing.T
	cert, key string
	clock     time.Time // moves with each write, so that no file system is too coarse for two of them
}

func newPairFiles(t *testing.T) *pairFiles {
	dir := t.TempDir()
	return &pairFiles{t, filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key"), time.Now().Add(-time.Hour)}
}

func (f *pairFiles) write(name string, content []byte) {
	f.t.Helper()
	if err := os.WriteFile(name, content, 0o600); err != nil {
		f.t.Fatal(err)
	}
	f.clock = f.clock.Add(time.Second)
	if err := os.Chtimes(name, f.clock, f.clock); err != nil {
		f.t.Fatal(err)
	}
}

func (f *pairFiles) writePair(serial int64) {
	f.t.Helper()
	cert, key := newPair(f.t, serial)
	f.write(f.cert, cert)
	f.write(f.key, key)
}

func (f *pairFiles) remove(name string) {
	f.t.Helper()
	if err := os.Remove(name); err != nil {
		f.t.Fatal(err)
	}
}

// newPair returns a self-signed certificate of that serial number and its key, in PEM.
func newPair(t testing.TB, serial int64) (cert, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serial),
		Subject:      pkix.Name{CommonName: "rollcall"},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	certDER, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certDER}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
}

// served returns the serial number of the certificate that the next handshake gets.
func served(t testing.TB, c *tls.Config) int64 {
	t.Helper()
	pair, err := c.GetCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(pair.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	return leaf.SerialNumber.Int64()
}

func TestCertificate(t *testing.T) {
	t.Parallel()
	files := newPairFiles(t)
	files.writePair(1)
	log := new(syncBuffer)
	c, err := newTLSConfig(config{tlsCertFile: files.cert, tlsKeyFile: files.key}, slog.New(slog.NewJSONHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	cert2, key2 := newPair(t, 2)
	cert4, key4 := newPair(t, 4)
	steps := []struct {
		name   string
		change func()
		want   int64 // the serial number that is served from then on
		logged string
	}{
		{"nothing has changed", func() {}, 1, ""},
		{"a new certificate, its key not yet", func() { files.write(files.cert, cert2) }, 1, "the one before stays"},
		{"the same, asked again, is not logged again", func() {}, 1, ""},
		{"half of its key", func() { files.write(files.key, key2[:len(key2)/2]) }, 1, "the one before stays"},
		{"the whole key", func() { files.write(files.key, key2) }, 2, "certificate read"},
		{"another pair", func() { files.writePair(3) }, 3, "certificate read"},
		{"the key deleted", func() { files.remove(files.key) }, 3, "the one before stays"},
		{"the same, asked again", func() {}, 3, ""},
		{"both deleted", func() { files.remove(files.cert) }, 3, "the one before stays"},
		{"the certificate back, half of it", func() { files.write(files.cert, cert4[:100]) }, 3, "the one before stays"},
		{"the key back", func() { files.write(files.key, key4) }, 3, "the one before stays"},
		{"the certificate whole", func() { files.write(files.cert, cert4) }, 4, "certificate read"},
		{"emptied", func() { files.write(files.cert, nil) }, 4, "the one before stays"},
		{"no certificate at all", func() { files.write(files.cert, []byte("renew me")) }, 4, "the one before stays"},
		{"the one before, put back", func() { files.write(files.cert, cert4) }, 4, "certificate read"},
		{"the key of another", func() { files.write(files.key, key2) }, 4, "the one before stays"},
	}
	for _, step := range steps { // each goes on from the one before
		step.change()
		before := len(log.String())
		if got := served(t, c); got != step.want {
			t.Fatalf("%s: certificate %d; want %d", step.name, got, step.want)
		}
		switch logged := log.String()[before:]; {
		case step.logged == "" && logged != "" || !strings.Contains(logged, step.logged):
			t.Errorf("%s: logged %q; want %q", step.name, logged, step.logged)
		case strings.Contains(logged, "PRIVATE"):
			t.Errorf("%s: the log has a key in it: %s", step.name, logged)
		}
	}
}

func TestCertificateFails(t *testing.T) {
	t.Parallel()
	files := newPairFiles(t)
	log := slog.New(slog.DiscardHandler)
	cert, key := newPair(t, 1)
	_, other := newPair(t, 2)
	steps := []struct {
		name   string
		change func()
		ok     bool
	}{
		{"no files", func() {}, false},
		{"no key", func() { files.write(files.cert, cert) }, false},
		{"the key of another", func() { files.write(files.key, other) }, false},
		{"half a key", func() { files.write(files.key, key[:len(key)/2]) }, false},
		{"a pair", func() { files.write(files.key, key) }, true},
	}
	for _, step := range steps {
		step.change()
		if _, err := newTLSConfig(config{tlsCertFile: files.cert, tlsKeyFile: files.key}, log); (err == nil) != step.ok {
			t.Errorf("%s: error %v; want one: %t", step.name, err, !step.ok)
		}
	}
}

// Renewing the files is enough for the running program: new connections get
// the new certificate, those that are open stay open.
func TestServiceRereadsCertificate(t *testing.T) {
	t.Parallel()
	files := newPairFiles(t)
	files.writePair(1)
	databaseURL, _ := newSchema(t)
	s := startService(t, testEnv(databaseURL, "TLS_CERT_FILE="+files.cert, "TLS_KEY_FILE="+files.key))

	serial := func(conn *tls.Conn) int64 { return conn.ConnectionState().PeerCertificates[0].SerialNumber.Int64() }
	first := dialTLS(t, s)
	if got := serial(first); got != 1 {
		t.Fatalf("certificate %d; want 1", got)
	}
	cert, key := newPair(t, 2)
	files.write(files.cert, cert)
	if got := serial(dialTLS(t, s)); got != 1 {
		t.Errorf("half renewed: certificate %d; want 1", got)
	}
	files.write(files.key, key)
	if got := serial(dialTLS(t, s)); got != 2 {
		t.Errorf("renewed: certificate %d; want 2", got)
	}
	files.remove(files.cert)
	files.remove(files.key)
	if got := serial(dialTLS(t, s)); got != 2 {
		t.Errorf("deleted: certificate %d; want 2", got)
	}
	old := &wireConn{t: t, Conn: first}
	if a := old.answerTo("GET /health HTTP/1.1\r\nHost: rollcall\r\n\r\n"); a.status != 200 || a.body != "OK" {
		t.Errorf("on the connection from before: %d %s", a.status, a.body)
	}
}

// dialTLS shakes hands with the service, whatever its certificate says, to speak one
// of these protocols of ALPN, if there are any.
func dialTLS(t *testing.T, s *service, protocols ...string) *tls.Conn {
	t.Helper()
	dialer := &net.Dialer{Timeout: patience}
	conn, err := tls.DialWithDialer(dialer, "tcp", strings.TrimPrefix(s.url, "https://"), &tls.Config{InsecureSkipVerify: true, NextProtos: protocols})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.NetConn().Close() }) // without a good-bye, for which the service may have no ear
	return conn
}
