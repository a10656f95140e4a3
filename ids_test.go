package main

import (
	"fmt"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// Creates that are repeated, as their callers see them, and the keys' syntax.

const adaBody = `{"email":"ada@example.com","name":"Ada"}`

// withKey is the header field of a key that needs no escapes.
func withKey(key string) string { return `Idempotency-Key: "` + key + `"` }

const keyReused = "The Idempotency-Key was used before, with another body"

// wantRows checks how many users there are.
func wantRows(t *testing.T, s *service, want int) {
	t.Helper()
	if n := len(s.call("GET", usersPath+"?limit=1000", "").users(t)); n != want {
		t.Errorf("%d users, want %d", n, want)
	}
}

// wantSame checks that two creates have had the same answer.
func wantSame(t *testing.T, first, again answer) {
	t.Helper()
	if again.status != 200 || again.body != first.body ||
		again.header.Get("Location") != first.header.Get("Location") || again.header.Get("ETag") != first.header.Get("ETag") {
		t.Errorf("first %d %s %s %s\nagain %d %s %s %s",
			first.status, first.body, first.header.Get("Location"), first.header.Get("ETag"),
			again.status, again.body, again.header.Get("Location"), again.header.Get("ETag"))
	}
}

var keyedForm = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)

func TestRepeatedCreate(t *testing.T) {
	t.Parallel()
	s := newService(t)
	first := s.call("POST", usersPath, adaBody, withKey("k"))
	id := first.user(t)["id"]
	if !keyedForm.MatchString(id) || first.header.Get("Location") != usersPath+"/"+id || first.header.Get("ETag") == "" {
		t.Errorf("created %s %v", first.body, first.header)
	}
	if got := s.call("GET", first.header.Get("Location"), ""); got.body != first.body {
		t.Errorf("GET: %s\nwant %s", got.body, first.body)
	}

	for _, test := range []struct{ name, body, field string }{
		{"the same again", adaBody, withKey("k")},
		{"key without quotes", adaBody, "Idempotency-Key: k"},
		{"white space in the body", "\n{ \"email\" : \"ada@example.com\",\t\"name\":\"Ada\" } ", withKey("k")},
		{"other order of members", `{"name":"Ada","email":"ada@example.com"}`, withKey("k")},
		{"escapes in the body", `{"email":"ada\u0040example.com","n\u0061me":"\u0041da"}`, withKey("k")},
		{"a member that is ignored", `{"email":"ada@example.com","name":"Ada","admin":true}`, withKey("k")},
	} {
		t.Run(test.name, func(t *testing.T) { wantSame(t, first, s.call("POST", usersPath, test.body, test.field)) })
	}
	wantRows(t, s, 1)

	for _, test := range []struct{ name, body string }{
		{"another name", `{"email":"ada@example.com","name":"Ada King"}`},
		{"another address", `{"email":"king@example.com","name":"Ada"}`},
		{"address in other letters", `{"email":"Ada@example.com","name":"Ada"}`},
		{"all in the address", `{"email":"ada@example.comA","name":"da"}`},
	} {
		t.Run(test.name, func(t *testing.T) {
			wantError(t, s.call("POST", usersPath, test.body, withKey("k")), 422, keyReused)
		})
	}
	wantRows(t, s, 1)

	// Other keys, and none, are as ever.
	wantError(t, s.call("POST", usersPath, adaBody, withKey("K")), 409, "Email already in use")
	wantError(t, s.call("POST", usersPath, adaBody), 409, "Email already in use")
	other := s.call("POST", usersPath, `{"email":"king@example.com","name":"Ada"}`, withKey("K")).user(t)
	if other["id"] == id || !strings.HasPrefix(createUser(s, "none@example.com").user(t)["id"][14:], "7") {
		t.Errorf("with another key: %v", other)
	}
}

// Where a create was refused, its key is as unused as before.
func TestKeyOfARefusedCreate(t *testing.T) {
	t.Parallel()
	s := newService(t)
	createUser(s, "taken@example.com")
	taken := `{"email":"Taken@example.com","name":"x"}`
	wantError(t, s.call("POST", usersPath, taken, withKey("k")), 409, "Email already in use")
	wantError(t, s.call("POST", usersPath, taken, withKey("k")), 409, "Email already in use")
	wantError(t, s.call("POST", usersPath, `{"email":"free","name":"x"}`, withKey("k")), 400, "Validation error: Invalid email address")
	s.call("POST", usersPath, `{"email":"free@example.com","name":"x"}`, withKey("k")).user(t)
	wantError(t, s.call("POST", usersPath, taken, withKey("k")), 422, keyReused)
}

// A key lives as long as its user, and brings the user as it is now.
func TestKeyThroughItsUsersLife(t *testing.T) {
	t.Parallel()
	s := newService(t)
	first := s.call("POST", usersPath, adaBody, withKey("k"))
	path := first.header.Get("Location")
	changed := s.call("PUT", path, `{"email":"king@example.com","name":"Ada King"}`)
	changed.user(t)
	createUser(s, "ada@example.com") // who takes the address over does not matter
	again := s.call("POST", usersPath, adaBody, withKey("k"))
	if again.status != 200 || again.body != changed.body || again.header.Get("Location") != path ||
		again.header.Get("ETag") != changed.header.Get("ETag") {
		t.Errorf("after an update: %d %s %v\nwant %s", again.status, again.body, again.header, changed.body)
	}
	wantError(t, s.call("POST", usersPath, `{"email":"king@example.com","name":"Ada King"}`, withKey("k")), 422, keyReused)

	if gone := s.call("DELETE", path, ""); gone.status != 200 {
		t.Fatalf("DELETE: %d %s", gone.status, gone.body)
	}
	wantError(t, s.call("POST", usersPath, adaBody, withKey("k")), 409, "Email already in use")
	other := s.call("POST", usersPath, `{"email":"eve@example.com","name":"Eve"}`, withKey("k")).user(t)
	if other["id"] == first.user(t)["id"] {
		t.Errorf("another body has made the id of the first: %v", other)
	}
	wantRows(t, s, 2)
}

// keyedAtOnce sends creates with one key from all sides at once and counts the
// answers by status. The 200s must all be of the user that it returns.
func keyedAtOnce(t *testing.T, bodies []string, sides ...*service) (statuses map[int]int, id string) {
	t.Helper()
	answers := make([]answer, len(bodies))
	begin := make(chan struct{})
	var wg sync.WaitGroup
	for i, body := range bodies {
		wg.Go(func() {
			<-begin
			var err error
			if answers[i], err = sides[i%len(sides)].try("POST", usersPath, body, withKey("k")); err != nil {
				t.Error(err)
			}
		})
	}
	close(begin)
	wg.Wait()
	statuses = make(map[int]int)
	for _, a := range answers {
		statuses[a.status]++
		if a.status != 200 {
			wantError(t, a, 422, keyReused)
			continue
		}
		got := a.user(t)["id"]
		if id == "" {
			id = got
		}
		if got != id {
			t.Errorf("users %s and %s for one key", id, got)
		}
	}
	return statuses, id
}

// A service and a second one on the same database.
func twoReplicas(t *testing.T) (a, b *service) {
	t.Helper()
	databaseURL, _ := newSchema(t)
	a, b = startService(t, testEnv(databaseURL)), startService(t, testEnv(databaseURL))
	a.waitReady()
	b.waitReady()
	return a, b
}

func TestConcurrentRepeats(t *testing.T) {
	t.Parallel()
	a, b := twoReplicas(t)
	for round := range 10 {
		body := fmt.Sprintf(`{"email":"%d@example.com","name":"x"}`, round)
		var bodies []string
		for range 20 {
			bodies = append(bodies, body)
		}
		statuses, id := keyedAtOnce(t, bodies, a, b)
		if statuses[200] != 20 {
			t.Errorf("statuses %v, want 200 alone", statuses)
		}
		wantRows(t, a, 1)
		a.call("DELETE", usersPath+"/"+id, "")
	}
}

func TestConcurrentBodiesOfOneKey(t *testing.T) {
	t.Parallel()
	a, b := twoReplicas(t)
	for range 10 {
		var bodies []string
		for i := range 20 {
			bodies = append(bodies, fmt.Sprintf(`{"email":"%d@example.com","name":"x"}`, i))
		}
		statuses, id := keyedAtOnce(t, bodies, a, b)
		if statuses[200] != 1 || statuses[422] != 19 {
			t.Errorf("statuses %v, want one 200 and nineteen 422", statuses)
		}
		wantRows(t, b, 1)
		a.call("DELETE", usersPath+"/"+id, "")
	}
}

// Without prepared statements, for a pooler that shares sessions, all is the same.
func TestKeyWithBinaryParameters(t *testing.T) {
	t.Parallel()
	databaseURL, _ := newSchema(t)
	s := startService(t, testEnv(databaseURL+" binary_parameters=yes"))
	s.waitReady()
	first := s.call("POST", usersPath, adaBody, withKey("k"))
	first.user(t)
	wantSame(t, first, s.call("POST", usersPath, adaBody, withKey("k")))
	wantError(t, s.call("POST", usersPath, `{"email":"b@example.com","name":"x"}`, withKey("k")), 422, keyReused)
}

func TestKeysOfOtherCallers(t *testing.T) {
	t.Parallel()
	s := newService(t, withAuth...)
	token := func(issuer, subject string) string {
		return "Authorization: Bearer " + mintToken([]byte(middlewareSecret), grant{issuer: issuer, subject: subject, ttl: time.Hour}, time.Now())
	}
	ids := make(map[string]string)
	for i, token := range []string{token("", "alice"), token("", "bob"), token("idp", "alice"), token("a", "lice"), token("al", "ice"), token("", "")} {
		body := fmt.Sprintf(`{"email":"%d@example.com","name":"x"}`, i)
		first := s.call("POST", usersPath, body, token, withKey("k"))
		id := first.user(t)["id"]
		if other, ok := ids[id[:23]]; ok {
			t.Errorf("callers %d and %s share a key", i, other)
		}
		ids[id[:23]] = fmt.Sprint(i)
		wantSame(t, first, s.call("POST", usersPath, body, token, withKey("k")))
	}
	if n := len(s.call("GET", usersPath, "", token("", "alice")).users(t)); n != 6 {
		t.Errorf("%d users", n)
	}
	// It is the subject that counts, not the token.
	longer := "Authorization: Bearer " + mintToken([]byte(middlewareSecret), grant{subject: "alice", scope: "users:write", ttl: 2 * time.Hour}, time.Now())
	wantError(t, s.call("POST", usersPath, adaBody, longer, withKey("k")), 422, keyReused)
}

func TestBadKeys(t *testing.T) {
	t.Parallel()
	const badKey = "Validation error: Idempotency-Key must be given once, as 1 to 255 printable ASCII characters in quotes, or without quotes " +
		"if none is a space, quote, backslash, comma or semicolon"
	s := newService(t)
	for _, test := range []struct{ name, field string }{
		{"empty string", `Idempotency-Key: ""`},
		{"256 characters", "Idempotency-Key: " + strings.Repeat("k", 256)},
		{"256 characters in quotes", withKey(strings.Repeat("k", 256))},
		{"no closing quote", `Idempotency-Key: "k`},
		{"a lone quote", `Idempotency-Key: "`},
		{"escaped closing quote", `Idempotency-Key: "k\"`},
		{"parameter", `Idempotency-Key: "k";a=1`},
		{"list", `Idempotency-Key: "k", "l"`},
		{"escape of another letter", `Idempotency-Key: "\n"`},
		{"backslash at the end", `Idempotency-Key: "k\`},
		{"tab in a string", "Idempotency-Key: \"a\tb\""},
		{"letters beyond ASCII", `Idempotency-Key: "ké"`},
		{"bare, beyond ASCII", "Idempotency-Key: ké"},
		{"bare, two words", "Idempotency-Key: a b"},
		{"bare, parameter", "Idempotency-Key: k;a=1"},
		{"bare, list", "Idempotency-Key: a,b"},
		{"bare, quote inside", `Idempotency-Key: a"b"`},
	} {
		t.Run(test.name, func(t *testing.T) {
			wantError(t, s.call("POST", usersPath, adaBody, test.field), 400, badKey)
		})
	}
	wantError(t, s.call("POST", usersPath, adaBody, withKey("k"), withKey("k")), 400, badKey)
	empty := sendRaw(t, s, "POST "+usersPath+" HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nIdempotency-Key:\r\n"+
		fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(adaBody), adaBody))
	wantError(t, empty, 400, badKey)
	wantRows(t, s, 0)

	// What is not a create has no use for a key, whatever it is.
	path := createUser(s, "a@example.com").header.Get("Location")
	for _, method := range []string{"GET", "PUT", "PATCH", "DELETE"} {
		body := ""
		if method[0] == 'P' {
			body = `{"name":"x"}`
		}
		if a := s.call(method, path, body, `Idempotency-Key: "`); a.status != 200 {
			t.Errorf("%s: %d %s", method, a.status, a.body)
		}
	}
}

func TestParseIdempotencyKey(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ field, want string }{
		{`"8e03978e-40d5-43dd-bc93-6894a57f9324"`, "8e03978e-40d5-43dd-bc93-6894a57f9324"},
		{"8e03978e-40d5-43dd-bc93-6894a57f9324", "8e03978e-40d5-43dd-bc93-6894a57f9324"},
		{`"two words; \"quoted\", \\"`, `two words; "quoted", \`},
		{`" "`, " "},
		{"a+/=:@'(){}[]<>?!#$%&*|~^_`.-", "a+/=:@'(){}[]<>?!#$%&*|~^_`.-"},
		{`  "k" `, "k"},
		{strings.Repeat("k", 255), strings.Repeat("k", 255)},
		{`"` + strings.Repeat(`\"`, 255) + `"`, strings.Repeat(`"`, 255)},
	} {
		if got, err := parseIdempotencyKey([]string{test.field}); got != test.want || err != nil {
			t.Errorf("%s: %q, %v; want %q", test.field, got, err, test.want)
		}
	}
	if got, err := parseIdempotencyKey(nil); got != "" || err != nil {
		t.Errorf("no field: %q, %v", got, err)
	}
}

// quoteKey serializes a string (RFC 9651, section 4.1.6).
func quoteKey(key string) string {
	return `"` + strings.NewReplacer(`"`, `\"`, `\`, `\\`).Replace(key) + `"`
}

// Whatever is taken for a key, its serialization is the same key; every key can
// be said with quotes; and nothing but a quoted string has two spellings.
func FuzzIdempotencyKey(f *testing.F) {
	for _, field := range []string{`"k"`, "k", `"a\"b\\c"`, `"`, `""`, `"k";p`, "a,b", "ké", `"a b"`, ` "k" `, `"\n"`, "\x7f", "\"\x80\""} {
		f.Add(field)
	}
	f.Fuzz(func(t *testing.T, field string) {
		if key, err := parseIdempotencyKey([]string{field}); err == nil {
			if key == "" || len(key) > 255 || strings.ContainsFunc(key, func(c rune) bool { return c < ' ' || c > '~' }) {
				t.Errorf("%q is the key %q", field, key)
			}
			if trimmed := strings.Trim(field, " "); trimmed != key && trimmed != quoteKey(key) {
				t.Errorf("%q is another spelling of the key %q", field, key)
			}
		}
		printable := !strings.ContainsFunc(field, func(c rune) bool { return c < ' ' || c > '~' })
		back, err := parseIdempotencyKey([]string{quoteKey(field)})
		if valid := printable && field != "" && len(field) <= 255; valid != (err == nil) || valid && back != field {
			t.Errorf("%q, quoted, is the key %q, %v", field, back, err)
		}
	})
}

// The ids of released programs: to change how they are made makes every key a
// new one.
func TestKeyedUUID(t *testing.T) {
	t.Parallel()
	base := keyedUUID(caller{"issuer", "subject"}, "key", testUser("", "email", "name").userInput)
	if want := "e572a48c-bd9b-818c-aae4-b5bc42392010"; base != want {
		t.Errorf("got %s, want %s", base, want)
	}
	if id := keyedUUID(caller{}, "8e03978e-40d5-43dd-bc93-6894a57f9325", testUser("", "grace@example.com", "Grace Hopper").userInput); id != "924993db-f780-84de-89b5-a9cbbc66bb90" {
		t.Errorf("README.md shows another id than %s", id)
	}
	const half = 23 // the characters that stand for the caller and the key
	for _, test := range []struct {
		name string
		id   string
		same bool // half of the id
	}{
		{"issuer", keyedUUID(caller{"issue", "rsubject"}, "key", testUser("", "email", "name").userInput), false},
		{"subject", keyedUUID(caller{"issuer", "subjec"}, "tkey", testUser("", "email", "name").userInput), false},
		{"key", keyedUUID(caller{"issuer", "subject"}, "Key", testUser("", "email", "name").userInput), false},
		{"email", keyedUUID(caller{"issuer", "subject"}, "key", testUser("", "Email", "name").userInput), true},
		{"between email and name", keyedUUID(caller{"issuer", "subject"}, "key", testUser("", "emailn", "ame").userInput), true},
	} {
		if !keyedForm.MatchString(test.id) || test.id[half:] == base[half:] || (test.id[:half] == base[:half]) != test.same {
			t.Errorf("with another %s: %s\n%s", test.name, test.id, base)
		}
	}
}

// Ids of version 8 that were there before are left alone, also where two begin
// alike, and the keys hold beside them.
func TestAdoptForeignVersion8(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name string
		ids  []string
	}{
		{"alike", []string{
			"11111111-1111-8111-8111-000000000001", "11111111-1111-8111-8111-000000000002",
			"22222222-2222-8222-8222-000000000001", "22222222-2222-8222-8222-000000000002", "22222222-2222-8222-8222-000000000003"}},
		{"not alike", []string{"11111111-1111-8111-8111-000000000001", "22222222-2222-8222-8222-000000000001"}},
		{"alike, of another version", []string{"11111111-1111-4111-8111-000000000001", "11111111-1111-4111-8111-000000000002"}},
		{"alike, of a variant without versions", []string{"11111111-1111-8111-c111-000000000001", "11111111-1111-8111-c111-000000000002"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			databaseURL, db := newSchema(t)
			mustExec(t, db, originalSchema)
			const insert = "INSERT INTO users (id, email, name) VALUES ($1, $2, 'x')"
			for _, id := range test.ids {
				mustExec(t, db, insert, id, id+"@example.com")
			}
			s := startService(t, testEnv(databaseURL))
			s.waitReady()
			if got := indexes(t, db); got != ourIndexes {
				t.Errorf("indexes: %s", got)
			}
			wantRows(t, s, len(test.ids))
			first := s.call("POST", usersPath, adaBody, withKey("k"))
			wantSame(t, first, s.call("POST", usersPath, adaBody, withKey("k")))
			wantError(t, s.call("POST", usersPath, `{"email":"b@example.com","name":"x"}`, withKey("k")), 422, keyReused)
			half := first.user(t)["id"][:24]
			_, err := db.Exec(insert, half+"000000000000", "c@example.com")
			if refused := pq.As(err, pqerror.UniqueViolation); refused == nil || refused.Constraint != "users_idempotency_key" {
				t.Errorf("another body of the key: %v", err)
			}
		})
	}
}
