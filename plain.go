//go:build plain

package main

import (
	"net"
	"net/http"
)

// What stands in for the mechanisms in the plain build: nothing.

// Many requests, one statement: see coalesce.go.
func coalesce(next userStore, _ *pgStore, _ int) userStore { return next }

// Exactly-once writes: see exactlyonce.go.
func exactlyOnce(next userStore, _ *pgStore) userStore { return next }

// The clients' connections: see clientconn.go.
func watchedListener(l net.Listener) net.Listener { return l }
func watchClient(next http.Handler) http.Handler  { return next }
