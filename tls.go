package main

import (
	"crypto/tls"
	"log/slog"
	"os"
	"sync"
	"time"
)

// A certificate is a pair of files, reread when they change, so that a renewal
// needs no restart. It is safe for concurrent use.
type certificate struct {
	certFile, keyFile string
	log               *slog.Logger

	mu     sync.Mutex
	loaded *tls.Certificate
	stamp  [2]fileStamp // of the files that were read last, loaded or not
}

// A fileStamp changes when a file does.
type fileStamp struct {
	modified time.Time
	size     int64
}

// loadCertificate reads the pair for the first time.
func loadCertificate(certFile, keyFile string, log *slog.Logger) (*certificate, error) {
	c := &certificate{certFile: certFile, keyFile: keyFile, log: log}
	c.stamp, _ = c.stamps()
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	c.loaded = &pair
	return c, err
}

func (c *certificate) stamps() (stamp [2]fileStamp, err error) {
	for i, name := range []string{c.certFile, c.keyFile} {
		info, err := os.Stat(name)
		if err != nil {
			return stamp, err
		}
		stamp[i] = fileStamp{info.ModTime(), info.Size()}
	}
	return stamp, nil
}

// get is the GetCertificate of a [tls.Config]. While a renewal is half done,
// or broken, the pair before it stays in use.
func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	stamp, err := c.stamps()
	if err != nil || stamp == c.stamp {
		return c.loaded, nil
	}
	c.stamp = stamp
	pair, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	if err != nil {
		c.log.Warn("the changed TLS certificate can't be used, the one before stays", "error", err.Error())
		return c.loaded, nil
	}
	c.log.Info("TLS certificate reread")
	c.loaded = &pair
	return c.loaded, nil
}
