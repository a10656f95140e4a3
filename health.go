package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"sync/atomic"
	"time"
)

// health answers whether this process is to live on, and to get requests.
type health struct {
	ping     func(context.Context) error // PostgreSQL
	keySet   *keySet                     // nil when none is configured
	started  chan struct{}               // closed when requests can be served
	draining *atomic.Bool                // the service stops
}

func newHealth(ping func(context.Context) error, set *keySet, draining *atomic.Bool) *health {
	return &health{ping: ping, keySet: set, started: make(chan struct{}), draining: draining}
}

var errStarting = &apiError{kind: kindUnavailable, message: "The service is starting"}

// isStarted reports whether requests can be served.
func (h *health) isStarted() bool {
	select {
	case <-h.started:
		return true
	default:
		return false
	}
}

// requireReady refuses requests until the service has started.
func requireReady(h *health, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !h.isStarted() {
			writeError(w, r, errStarting)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// live answers GET /health: the process is up. It touches nothing else, since a process
// that does not answer is restarted, and a restart heals no database.
func (h *health) live(w http.ResponseWriter, r *http.Request) error {
	writeBody(w, http.StatusOK, []string{"text/plain; charset=utf-8"}, []byte("OK"))
	return nil
}

// readyTimeout is how long PostgreSQL may take to answer when readiness is asked for.
const readyTimeout = 2 * time.Second

// ready answers GET /health/ready.
func (h *health) ready(w http.ResponseWriter, r *http.Request) error {
	if err := h.check(r.Context()); err != nil {
		return err
	}
	writeBody(w, http.StatusOK, jsonType, []byte(`{"status":"ready"}`))
	return nil
}

// check returns why requests can't be served.
func (h *health) check(ctx context.Context) error {
	switch {
	case h.draining.Load():
		return &apiError{kind: kindUnavailable, message: "The service is stopping"}
	case !h.isStarted():
		return errStarting
	}
	if err := h.keySet.missing(); err != nil {
		return &apiError{kind: kindUnavailable, message: "The key set of the identity provider (JWT_JWKS_URL) is not available", cause: err}
	}
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	if err := h.ping(ctx); err != nil {
		return &apiError{kind: kindUnavailable, message: "PostgreSQL does not answer", cause: err}
	}
	return nil
}

// checkHealth is the healthcheck command: it asks the service on this host whether it is
// ready. All that it needs of the configuration is where the service listens.
func checkHealth(ctx context.Context, getenv func(string) string) error {
	cfg, err := loadSome(getenv, "HOST", "PORT", "TLS_CERT_FILE")
	if err != nil {
		return usageError(err.Error())
	}
	if cfg.port == 0 {
		return usageError("healthcheck: with PORT=0 the service takes any free port; set PORT to the one that it logs")
	}
	addr, err := net.ResolveTCPAddr("tcp", cfg.listenAddr())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return askHere(ctx, addr, cfg.tlsCertFile != "", "/health/ready")
}

// askHere sends a GET to the service that listens on addr, on this host. The error is
// that of a response other than 200, too.
func askHere(ctx context.Context, addr net.Addr, secure bool, path string) error {
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			conn, err := d.DialContext(ctx, addr.Network(), addr.String()) // 0.0.0.0 and :: are this host
			if tcp, ok := addr.(*net.TCPAddr); err != nil && ok && tcp.IP.Equal(net.IPv6unspecified) {
				// What listens on [::] mostly takes IPv4 too, and the host may have no other.
				return d.DialContext(ctx, "tcp4", fmt.Sprintf(":%d", tcp.Port))
			}
			return conn, err
		},
		DisableKeepAlives: true,
		// The certificate names the service, not the loopback address. Nothing secret is
		// sent, and whatever could answer in its place is on this host already.
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
	}
	scheme := "http"
	if secure {
		scheme = "https"
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, scheme+"://rollcall"+path, nil)
	if err != nil {
		return err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answers %s", path, resp.Status)
	}
	return nil
}
