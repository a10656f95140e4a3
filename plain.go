//go:build plain

package main

import (
	"database/sql"
	"database/sql/driver"
	"net"
	"net/http"
)

// What stands in for the mechanisms in the plain build: nothing.

// coalesce: see coalesce.go.
func coalesce(next userStore, _ *pgStore, _ int) userStore { return next }

// exactlyOnce: see exactlyonce.go.
type exactlyOnce struct{}

func (*exactlyOnce) connector(c *connector) driver.Connector   { return c }
func (*exactlyOnce) store(next userStore, _ *sql.DB) userStore { return next }

// The clients' connections: see clientconn.go.
func watchedListener(l net.Listener) net.Listener { return l }
func watchClient(next http.Handler) http.Handler  { return next }
