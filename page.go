package main

import (
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"net/http"
	"regexp"
)

//go:embed page.html
var pageHTML []byte

// pagePolicy lets the page do nothing but run its own script and style, which it names by
// their hashes, and ask the service that it came from (Content Security Policy, level 3).
var pagePolicy = "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; " +
	"script-src " + hashOf("script") + "; style-src " + hashOf("style")

// hashOf returns the hash of what an element of the page contains.
func hashOf(element string) string {
	content := regexp.MustCompile(`(?s)<` + element + `>(.*)</` + element + `>`).FindSubmatch(pageHTML)[1]
	sum := sha256.Sum256(content)
	return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}

// showPage answers GET / with a page, for clients that prefer HTML: browsers.
func showPage(w http.ResponseWriter, r *http.Request) error {
	accept := r.Header["Accept"]
	if q := quality(accept, "text/html"); q <= 0 || q < quality(accept, "application/json") {
		return errNotFound
	}
	h := w.Header()
	h.Add("Vary", "Accept")
	h.Set("Content-Security-Policy", pagePolicy)
	h.Set("Referrer-Policy", "no-referrer")
	writeBody(w, http.StatusOK, []string{"text/html; charset=utf-8"}, pageHTML)
	return nil
}
