package main

import (
	"bufio"
	"cmp"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestPageResponse(t *testing.T) {
	t.Parallel()
	s := newService(t, withAuth...)
	for accept, want := range map[string]int{
		"text/html,application/xhtml+xml,*/*;q=0.8": 200, "text/html;q=0.5, application/json;q=0.5": 200,
		"": 404, "*/*": 404, "application/json": 404, "text/html;q=0": 404, "text/html;q=0.4, application/json;q=0.5": 404,
	} {
		a := s.call("GET", "/", "", "Accept: "+accept)
		if a.status != want || a.header.Get("Vary") == "" || want == 404 && a.header.Get("Content-Type") != "application/json" {
			t.Errorf("Accept %q: %d, %v", accept, a.status, a.header)
		}
	}
	const html = "Accept: text/html"
	a := s.call("GET", "/", "", html)
	policy := a.header.Get("Content-Security-Policy")
	if a.body != string(pageHTML) || !strings.HasPrefix(policy, "default-src 'none'; connect-src 'self'; ") || strings.Contains(policy, "unsafe") {
		t.Errorf("%d bytes, policy %q", len(a.body), policy)
	}
	if a := s.call("HEAD", "/", "", html); a.status != 200 || a.body != "" {
		t.Errorf("HEAD: %d", a.status)
	}
	if a := s.call("POST", "/", "{}", html); a.status != 405 || a.header.Get("Allow") != "GET, HEAD, OPTIONS" {
		t.Errorf("POST: %d", a.status)
	}
	if len(pageHTML) > 30_000 || strings.Contains(strings.ReplaceAll(a.body, "rel=\"next\"", ""), "http://") || strings.Contains(a.body, "https://") {
		t.Errorf("the page has %d bytes, or an address in it", len(pageHTML))
	}
	if a := newService(t, "PAGE=off").call("GET", "/", "", html); a.status != 404 {
		t.Errorf("PAGE=off: %d", a.status)
	}
}

// A tab is one of a headless Chromium, which is told what to do by the DevTools Protocol: JSON
// between zero bytes, on the descriptors 3 and 4 of the browser.
type tab struct {
	t       *testing.T
	in      *os.File
	out     *bufio.Reader
	session string
	id      int
}

func newTab(t *testing.T) *tab {
	t.Helper()
	program, err := exec.LookPath("chromium")
	if err != nil {
		notInstalled(t, "chromium", "chromium")
	}
	commandsOut, commands, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	events, eventsIn, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	browser := exec.Command(program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
		"--lang=en-US", "--remote-debugging-pipe", "--user-data-dir="+t.TempDir(), "about:blank")
	browser.ExtraFiles = []*os.File{commandsOut, eventsIn}
	browser.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // to end all of its processes
	if err := browser.Start(); err != nil {
		t.Fatal(err)
	}
	commandsOut.Close()
	eventsIn.Close()
	t.Cleanup(func() {
		syscall.Kill(-browser.Process.Pid, syscall.SIGKILL)
		browser.Wait()
		commands.Close()
		events.Close()
	})
	events.SetReadDeadline(time.Now().Add(2 * patience))
	b := &tab{t: t, in: commands, out: bufio.NewReader(events)}
	target := b.do("Target.createTarget", map[string]any{"url": "about:blank"})["targetId"]
	b.session = b.do("Target.attachToTarget", map[string]any{"targetId": target, "flatten": true})["sessionId"].(string)
	b.do("Page.enable", nil)
	return b
}

// do sends a command, and returns its result.
func (b *tab) do(method string, params map[string]any) map[string]any {
	b.t.Helper()
	b.id++
	command, err := json.Marshal(map[string]any{"id": b.id, "method": method, "params": params, "sessionId": b.session})
	if b.session == "" {
		command, err = json.Marshal(map[string]any{"id": b.id, "method": method, "params": params})
	}
	if err == nil {
		_, err = b.in.Write(append(command, 0))
	}
	for err == nil {
		var message []byte
		if message, err = b.out.ReadBytes(0); err != nil {
			break
		}
		var reply struct {
			ID     int
			Result map[string]any
			Error  any
		}
		if err = json.Unmarshal(message[:len(message)-1], &reply); err == nil && reply.ID == b.id {
			if reply.Error != nil {
				b.t.Fatalf("%s: %v", method, reply.Error)
			}
			return reply.Result
		}
	}
	b.t.Fatalf("%s: %v", method, err)
	return nil
}

// js evaluates an expression in the page.
func (b *tab) js(expression string) any {
	b.t.Helper()
	result := b.do("Runtime.evaluate", map[string]any{"expression": expression, "awaitPromise": true, "returnByValue": true, "userGesture": true})
	if result["exceptionDetails"] != nil {
		b.t.Fatalf("%s: %v", expression, result["exceptionDetails"])
	}
	return result["result"].(map[string]any)["value"]
}

// wait waits until an expression is true in the page.
func (b *tab) wait(expression string) {
	b.t.Helper()
	waitFor(b.t, expression+"; it says "+fmt.Sprint(b.js(`document.getElementById("said")?.textContent`)), func() bool { return b.js(expression) == true })
}

func (b *tab) open(url string) {
	b.t.Helper()
	b.do("Page.navigate", map[string]any{"url": "about:blank"}) // else a new # is no new page
	b.wait(`location.href == "about:blank" && document.readyState == "complete"`)
	b.do("Page.navigate", map[string]any{"url": url})
	b.wait(`document.readyState == "complete" && location.protocol == "http:"`)
}

// key presses a key; text is what it types.
func (b *tab) key(name, text string) {
	b.t.Helper()
	code := map[string]int{"Tab": 9, "Enter": 13, "Escape": 27}[name]
	for _, kind := range []string{"keyDown", "keyUp"} {
		params := map[string]any{"type": kind, "key": name, "code": name, "windowsVirtualKeyCode": code}
		if kind == "keyDown" && text != "" {
			params["text"] = text
		}
		b.do("Input.dispatchKeyEvent", params)
	}
}

// write types text into what has the focus.
func (b *tab) write(text string) {
	b.do("Input.insertText", map[string]any{"text": text})
}

// tabTo presses Tab until the expression is true of the element that has the focus, here e.
func (b *tab) tabTo(expression string) {
	b.t.Helper()
	for range 60 {
		if b.js("(e => "+expression+")(document.activeElement)") == true {
			return
		}
		b.key("Tab", "")
	}
	b.t.Fatalf("Tab never reaches %s", expression)
}

// picture takes screenshots of what is shown, in two sizes and two colours, into the folder
// of ROLLCALL_SCREENSHOTS. It checks that nothing is wider than the page.
func (b *tab) picture(name string) {
	b.t.Helper()
	folder := cmp.Or(os.Getenv("ROLLCALL_SCREENSHOTS"), b.t.TempDir())
	for _, colour := range []string{"light", "dark"} {
		b.do("Emulation.setEmulatedMedia", map[string]any{"features": []any{map[string]any{"name": "prefers-color-scheme", "value": colour}}})
		for _, width := range []int{360, 1280} {
			b.do("Emulation.setDeviceMetricsOverride", map[string]any{"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": false})
			if wide := b.js("document.documentElement.scrollWidth"); wide.(float64) > float64(width) {
				b.t.Errorf("%s: %v pixels wide on a screen of %d", name, wide, width)
			}
			png, err := base64.StdEncoding.DecodeString(b.do("Page.captureScreenshot", nil)["data"].(string))
			if err == nil {
				err = os.WriteFile(filepath.Join(folder, fmt.Sprintf("%s-%d-%s.png", name, width, colour)), png, 0o644)
			}
			if err != nil {
				b.t.Error(err)
			}
		}
	}
}

const rowsShown = `document.querySelectorAll("#rows tr").length`

func said(text string) string {
	return fmt.Sprintf(`document.getElementById("said").textContent.includes(%q)`, text)
}

// The page, driven through all that it can do.
func TestPage(t *testing.T) {
	t.Parallel()
	b := newTab(t)
	s := newService(t, append(withAuth, "REQUEST_TIMEOUT=2s")...)
	ada := bearer("ada")
	token := strings.TrimPrefix(ada, "Authorization: Bearer ")
	for i := range 24 {
		s.call("POST", usersPath, fmt.Sprintf(`{"email":"user%d@example.com","name":"User %d"}`, i, i), ada)
	}

	// Without a token, it asks for one, and says what is wrong with another.
	b.open(s.url)
	b.wait(said("Missing bearer token"))
	b.wait(`document.activeElement.name == "token"`)
	b.picture("1-token")
	b.write("garbage")
	b.key("Enter", "\r")
	b.wait(said("not one token"))
	b.write(mintToken([]byte(middlewareSecret), grant{subject: "ada", ttl: time.Hour}, time.Now().Add(-24*time.Hour)))
	b.key("Enter", "\r")
	b.wait(said("The token has expired"))

	// With a token behind the #, it goes on, and forgets where it had it from.
	b.open(s.url + "/#token=" + token)
	b.wait(rowsShown + " == 20")
	if b.js(`location.href`) != s.url+"/" || b.js(`sessionStorage.getItem("token")`) != token {
		t.Errorf("it is at %v", b.js(`location.href`))
	}
	if got := b.js(`document.querySelector("#rows td").textContent`); got != "user23@example.com" {
		t.Errorf("the first is %v, want the newest", got)
	}
	b.picture("2-users")

	// Pages, by the keyboard alone.
	b.tabTo(`e.id == "next"`)
	b.key("Enter", "\r")
	b.wait(rowsShown + ` == 4 && document.getElementById("next").disabled`)
	b.tabTo(`e.id == "first"`)
	b.key("Enter", "\r")
	b.wait(rowsShown + " == 20")

	// A create, by the keyboard; the name is text, whatever it looks like.
	const hostile = `<img src=x onerror=alert(1)></script>'"\ $(id) é 👩‍🚀`
	b.tabTo(`e.name == "email" && e.form.id == "create"`)
	b.write("nobody")
	b.tabTo(`e.name == "name"`)
	b.write(hostile)
	b.key("Enter", "\r")
	b.wait(said("Validation error: Invalid email address"))
	b.picture("3-error")
	b.js(`document.querySelector("#create [name=email]").value = ""; document.querySelector("#create [name=email]").focus()`)
	b.write("o'brien@example.com")
	b.key("Enter", "\r")
	b.wait(said("Created: o'brien@example.com"))
	if got := b.js(`document.querySelectorAll("#rows td")[1].textContent`); got != hostile || b.js("document.images.length") != 0.0 {
		t.Errorf("the name is shown as %v", got)
	}
	created := s.call("GET", usersPath+"?email=o'brien@example.com", "", ada).users(t)
	if len(created) != 1 || created[0]["name"] != hostile {
		t.Fatalf("created %v", created)
	}
	b.picture("4-created")
	path := usersPath + "/" + created[0]["id"]

	// Each call is there as a line to paste.
	for _, find := range []string{"O'BRIEN@example.com", "nobody@example.com"} {
		b.js(fmt.Sprintf(`document.querySelector("#find [name=email]").value = %q; document.querySelector("#find button").click()`, find))
		b.wait(rowsShown + map[bool]string{true: " == 1", false: " == 0"}[strings.HasPrefix(find, "O")])
		paste := exec.Command("sh", "-c", b.js(`document.getElementById("curl").textContent`).(string))
		paste.Env = append(os.Environ(), "TOKEN="+token)
		out, err := paste.Output()
		if err != nil || strings.Contains(string(out), hostile[:4]) != strings.HasPrefix(find, "O") {
			t.Errorf("%v: %s (%v)", paste.Args, out, err)
		}
	}
	b.js(`document.getElementById("all").click()`)
	b.wait(rowsShown + " == 20")

	// A change, which meets that of somebody else.
	edit := `document.querySelector("#rows button").click()`
	fields := `[...document.querySelectorAll("#rows form input")]`
	b.js(edit)
	b.wait(fields + ".length == 2")
	b.picture("5-edit")
	b.js(fields + `[1].value = "Miles"; ` + fields + `[1].form.requestSubmit()`)
	b.wait(said("Saved"))
	if got := s.call("GET", path, "", ada).user(t)["name"]; got != "Miles" {
		t.Errorf("the name is %q", got)
	}
	for choice, want := range map[string]string{"yours": "Yours", "theirs": "Theirs"} {
		b.js(edit)
		b.wait(fields + ".length == 2")
		s.call("PUT", path, `{"name":"Theirs"}`, ada)
		b.js(fields + `[1].value = "Yours"; ` + fields + `[1].form.requestSubmit()`)
		b.wait(`document.getElementById("conflict").open`)
		if got := b.js(`document.getElementById("conflict").innerText`).(string); !strings.Contains(got, "Yours") || !strings.Contains(got, "Theirs") {
			t.Errorf("it shows %s", got)
		}
		b.picture("6-conflict")
		b.js(fmt.Sprintf(`document.querySelector("#conflict [value=%s]").click()`, choice))
		b.wait(fmt.Sprintf(`document.querySelectorAll("#rows td")[1].textContent == %q`, want))
		if got := s.call("GET", path, "", ada).user(t)["name"]; got != want {
			t.Errorf("%s: the name is %q", choice, got)
		}
	}

	// A delete waits for ten seconds, in which it can be undone; here, the test is the clock.
	b.js(`window.late = []; window.setTimeout = (work, ms) => late.push([work, ms])`)
	remove := `document.querySelectorAll("#rows tr")[0].querySelectorAll("button")[1].click()`
	b.js(remove)
	b.wait(said("Deletes o'brien@example.com in ten seconds"))
	b.wait(`document.activeElement.textContent == "Undo" && late[0][1] == 10000`)
	b.picture("7-undo")
	b.key("Enter", "\r")
	b.wait(said("Not deleted"))
	if a := s.call("GET", path, "", ada); a.status != 200 {
		t.Errorf("it was deleted at once: %d", a.status)
	}
	b.js(remove)
	b.wait(`late.length == 2`)
	b.js(`document.querySelectorAll("#rows tr")[1].querySelector("button").click()`)
	b.wait(fields + ".length == 2") // an edit meanwhile stays as it is
	b.js(`late[1][0]()`)
	b.wait(said("Deleted: o'brien@example.com") + " && " + fields + ".length == 2 && " + rowsShown + " == 19")
	if a := s.call("GET", path, "", ada); a.status != 404 {
		t.Errorf("it is there still: %d", a.status)
	}

	// What goes wrong is said in the service's words, and the page goes on.
	tx := begin(t, s.db, "LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
	b.js(`document.getElementById("all").click()`)
	b.wait(said("The request took too long"))
	tx.Rollback()
	b.js(`document.getElementById("all").click()`)
	b.wait(said("20 users"))

	// Everything has a label, and nobody else was asked.
	for what, expression := range map[string]string{
		"a field without a label": `[...document.querySelectorAll("input")].some(i => !i.labels.length)`,
		"a button without a name": `[...document.querySelectorAll("button")].some(b => !b.textContent)`,
		"a call of somebody else": `performance.getEntriesByType("resource").some(e => !e.name.startsWith(location.origin))`,
		"no live region":          `!document.querySelector("[role=status][aria-live=polite]")`,
	} {
		if b.js(expression) != false {
			t.Error(what)
		}
	}

	// What the token may not do is not offered.
	b.open(s.url + "/#token=" + secretToken()) // which may read
	b.wait(rowsShown + ` == 20 && document.getElementById("new").hidden && !document.querySelector("#rows button")`)
	b.picture("8-reader")
	b.open(s.url + "/#token=" + mintToken([]byte(middlewareSecret), grant{subject: "x", scope: "users:write", ttl: time.Hour}, time.Now()))
	writer := `document.getElementById("list-section").hidden && !document.getElementById("new").hidden && document.getElementById("enter").hidden`
	b.wait(writer)
	b.js(`document.getElementById("leave").click()`) // and the same by the form
	b.write(mintToken([]byte(middlewareSecret), grant{subject: "x", scope: "users:write", ttl: time.Hour}, time.Now()))
	b.key("Enter", "\r")
	b.wait(`!document.getElementById("main").hidden && ` + writer)

	// With AUTH=off, nothing is asked for.
	b.open(newService(t).url)
	b.wait(`!document.getElementById("main").hidden && document.getElementById("enter").hidden`)
	b.wait(said("There are no such users"))
}
