package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"
)

// health answers those who decide whether this process gets traffic, or lives on.
type health struct {
	store    *store
	draining atomic.Bool // set once the service is to stop
}

// live answers GET /health: the process is up. It touches nothing else, since
// whoever asks restarts a process that does not answer, and a restart heals no
// database.
func (h *health) live(w http.ResponseWriter, r *http.Request) error {
	writeBody(w, http.StatusOK, []string{"text/plain; charset=utf-8"}, []byte("OK"))
	return nil
}

// readyTimeout is how long PostgreSQL may take to answer when readiness is asked for.
const readyTimeout = 2 * time.Second

// ready answers GET /health/ready: send me requests, or rather not.
func (h *health) ready(w http.ResponseWriter, r *http.Request) error {
	unready := func(message string, cause error) error {
		return &failure{kind: kindUnavailable, message: message, cause: cause}
	}
	switch {
	case h.draining.Load():
		return unready("The service is stopping", nil)
	case !h.store.started.Load():
		return unready("The service is starting", nil)
	}
	ctx, cancel := context.WithTimeout(r.Context(), readyTimeout)
	defer cancel()
	if err := h.store.ping(ctx); err != nil {
		return unready("PostgreSQL does not answer", err)
	}
	writeBody(w, http.StatusOK, jsonType, []byte(`{"status":"ready"}`))
	return nil
}

// healthConfig reads what checkHealth needs, so that it can be run with less
// than the whole configuration.
func healthConfig(getenv func(string) string) (cfg config, err error) {
	for _, v := range cfg.variables() {
		switch v.name {
		case "HOST", "PORT", "TLS_CERT_FILE":
			if value := cmp.Or(getenv(v.name), v.byDefault); value != "" {
				if err := v.parse(value); err != nil {
					return cfg, usageError(fmt.Sprintf("%s: %q %v", v.name, value, err))
				}
			}
		}
	}
	return cfg, nil
}

// checkHealth asks the service of this configuration, on this host, whether it
// is ready. It is the healthcheck command, for containers without curl.
func checkHealth(ctx context.Context, cfg config) error {
	if cfg.port == 0 {
		return usageError("healthcheck: with PORT=0 the service takes any free port; set PORT to the one that it logs")
	}
	host, scheme := cfg.host, "http"
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() { // 0.0.0.0 and :: listen everywhere
		host = "127.0.0.1"
		if ip.To4() == nil {
			host = "::1"
		}
	}
	if cfg.tlsCertFile != "" {
		scheme = "https"
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return askHere(ctx, scheme+"://"+net.JoinHostPort(host, strconv.Itoa(cfg.port))+"/health/ready", nil)
}

// report tells the manager's watchdog that the service lives, as long as it answers
// GET /health over its own socket: the accepting, a connection, the whole chain.
// PostgreSQL is not asked, see [health.live]. It ends with ctx: a manager that was
// told STOPPING=1 expects nothing more, and SHUTDOWN_TIMEOUT ends what is stuck.
func (h *health) report(ctx context.Context, m manager, addr net.Addr, secure bool, log *slog.Logger) {
	url := "http://rollcall/health"
	if secure {
		url = "https://rollcall/health"
	}
	check := func(ctx context.Context) error {
		return askHere(ctx, url, func(ctx context.Context, _, _ string) (net.Conn, error) { return dialSelf(ctx, addr) })
	}
	watch(ctx, m.watchdog, check, func(err error) {
		if err != nil {
			log.Error("the service does not answer itself; its watchdog is not told that it lives", "error", err.Error())
			return
		}
		m.tell(log, "WATCHDOG=1")
	})
}

// askHere fails unless a URL of this host is answered with 200. A dial that is not
// nil makes the connection, whatever host the URL names.
func askHere(ctx context.Context, url string, dial func(ctx context.Context, network, addr string) (net.Conn, error)) error {
	client := http.Client{
		Transport: &http.Transport{
			Proxy:             nil, // the service is on this host
			DialContext:       dial,
			DisableKeepAlives: true,
			// The certificate names the service, not the loopback address. Nothing
			// secret is sent, and who could answer in its place has this host already.
			TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
		},
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answers %s", url, resp.Status)
	}
	return nil
}
