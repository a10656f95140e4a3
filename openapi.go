package main

import (
	"bytes"
	_ "embed"
	"net/http"
)

// The description of the API: OpenAPI 3.1, written by hand. The tests hold each of their
// answers against it.
//
//go:embed openapi.json
var openAPI []byte

// describeAPI answers GET /openapi.json.
func describeAPI(w http.ResponseWriter, r *http.Request) error {
	writeBody(w, http.StatusOK, jsonType, bytes.Replace(openAPI, []byte("VERSION"), []byte(buildVersion()), 1))
	return nil
}
