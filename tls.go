package main

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"os"
	"sync"
)

// A certificate is a pair of files, reread when they change, so that a renewal needs
// no restart. It is safe for concurrent use.
type certificate struct {
	certFile, keyFile string
	log               *slog.Logger

	mu     sync.Mutex
	loaded *tls.Certificate
	stamp  string // of the files when they were read last, loaded or not
}

// newTLSConfig returns nil where no certificate is configured.
func newTLSConfig(cfg config, log *slog.Logger) (*tls.Config, error) {
	if cfg.tlsCertFile == "" {
		return nil, nil
	}
	c := &certificate{certFile: cfg.tlsCertFile, keyFile: cfg.tlsKeyFile, log: log}
	return &tls.Config{GetCertificate: c.get}, c.refresh()
}

// get is the GetCertificate of a [tls.Config]. While a renewal is half done, or
// broken, the pair before it stays in use.
func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.refresh(); err != nil {
		c.log.Warn("the changed TLS certificate can't be used, the one before stays", "error", err.Error())
	}
	return c.loaded, nil
}

// refresh loads the pair, unless the files are as they were the last time.
func (c *certificate) refresh() error {
	stamp := ""
	for _, name := range []string{c.certFile, c.keyFile} {
		if info, err := os.Stat(name); err == nil {
			stamp += fmt.Sprint(info.ModTime(), info.Size())
		}
		stamp += "\n"
	}
	if stamp == c.stamp {
		return nil
	}
	c.stamp = stamp
	pair, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	if err != nil {
		return err
	}
	c.loaded = &pair
	c.log.Info("TLS certificate read")
	return nil
}
