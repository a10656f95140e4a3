package main

import (
	"context"
	"database/sql"
	"errors"
	"slices"
)

// The statements for many calls at a time, which [coalescer] brings together.
// They tell the calls apart by their ids. What a statement can't do at once it
// leaves out, and its caller does it alone, to get the same answer or the same
// error as ever: a row that is locked, so that it delays only its own callers, or
// a precondition that does not hold. What they have locked they reach by its
// place, ctid; and by its id too, since in a table that inherits from users
// another row may have the same place.
var (
	insertUsers     = insertNew + " RETURNING " + columns
	insertUsersOnce = insertNew + " ON CONFLICT DO NOTHING RETURNING " + columns
	selectUsers     = "SELECT " + columns + " FROM users WHERE id = ANY ($1::uuid[])"
	findUsers       = "SELECT " + columns + ", wanted FROM unnest($1::text[]) AS wanted JOIN users ON lower(email) = lower(wanted)"
	updateUsers     = "WITH free AS MATERIALIZED (SELECT users.ctid AS place, user_id, new_email, new_name " +
		"FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[]) AS change (user_id, new_email, new_name, match, none_match) " +
		"JOIN users ON id = user_id AND " + conditionsHold("match", "none_match") + " FOR NO KEY UPDATE OF users SKIP LOCKED) " +
		"UPDATE users SET email = COALESCE(new_email, email), name = COALESCE(new_name, name), " +
		"updated_at = " + newUpdate + " FROM free WHERE users.ctid = place AND id = user_id RETURNING " + columns
	deleteUsers = "WITH free AS MATERIALIZED (SELECT users.ctid AS place, user_id " +
		"FROM unnest($1::uuid[], $2::text[], $3::text[]) AS gone (user_id, match, none_match) " +
		"JOIN users ON id = user_id AND " + conditionsHold("match", "none_match") + " FOR UPDATE OF users SKIP LOCKED) " +
		"DELETE FROM users USING free WHERE users.ctid = place AND id = user_id RETURNING " + columns
)

// insertNew leaves out who asks for an address that is taken. ON CONFLICT would
// do that too, but inserts each row on trial first, which is a record more in the
// write-ahead log for each: it is for those of whom two want the same at once.
const insertNew = "INSERT INTO users (id, email, name) SELECT new.* FROM unnest($1::uuid[], $2::text[], $3::text[]) AS new (id, email, name) " +
	"WHERE NOT EXISTS (SELECT FROM ONLY users AS old WHERE lower(old.email) = lower(new.email))"

// errAlone is the answer to a call that its statement has left out, or that
// was in one with a call that failed: run the statement for this call alone.
// errAloneAgain is the same of a statement that was repeated, so that an earlier
// try may have done what this one found nothing to do for.
var (
	errAlone      = errors.New("run it alone")
	errAloneAgain = errors.New("run it alone; it may have been done")
)

// rerun returns the answer to the calls of a statement that have to be run
// alone; for repeated see [store.run].
func rerun(repeated bool) error {
	if repeated {
		return errAloneAgain
	}
	return errAlone
}

// What calls ask for. The key is what tells a call's user from the others'.
type (
	lookUp     string // an id, or an address
	draft      struct{ id, email, name string }
	userChange struct {
		id          string
		email, name *string
		when        preconditions
	}
)

func (k lookUp) key() string     { return string(k) }
func (n draft) key() string      { return n.id }
func (c userChange) key() string { return c.id }

// batches are the queues of a store, one for each kind of statement.
type batches struct {
	creates *coalescer[draft, user]
	gets    *coalescer[lookUp, user] // by id
	finds   *coalescer[lookUp, user] // by address
	updates *coalescer[userChange, user]
	deletes *coalescer[userChange, user]
	pings   *coalescer[struct{}, struct{}]
	reads   lane // of gets and finds, and of pages
}

// newBatches returns the queues of a store with so many connections, of which full
// statements may use half, or two if there are fewer.
func newBatches(s *store, conns int) batches {
	reads, fullReads := newLane(), make(lane, max(1, conns/4))
	writes, fullWrites := newLane(), make(lane, max(1, conns/4))
	return batches{
		creates: newCoalescer(writes, fullWrites, s.createMany),
		gets:    newCoalescer(reads, fullReads, s.getMany),
		finds:   newCoalescer(reads, fullReads, s.findMany),
		updates: newCoalescer(writes, fullWrites, s.updateMany),
		deletes: newCoalescer(writes, fullWrites, s.deleteMany),
		pings:   newCoalescer(newLane(), nil, s.pingMany),
		reads:   reads,
	}
}

func (s *store) createMany(ctx context.Context, calls []*call[draft, user]) {
	if len(calls) == 1 {
		calls[0].answer, calls[0].err = s.createAlone(ctx, calls[0].ask, false)
		return
	}
	var ids, emails, names []byte
	for _, c := range calls {
		ids = appendElement(ids, &c.ask.id)
		emails = appendElement(emails, &c.ask.email)
		names = appendElement(names, &c.ask.name)
	}
	args := []any{array(ids), array(emails), array(names)}
	made, repeated, err := s.query(ctx, insertUsers, args...)
	if isRefused(err) { // by another statement's row meanwhile, or one of this one
		var again bool
		made, again, err = s.query(ctx, insertUsersOnce, args...)
		repeated = repeated || again
	}
	deal(calls, byID(made), err, rerun(repeated), rerun(repeated))
	// Most of those left out want an address that is taken: one statement tells of
	// which that is true. (But who may be the owner, by an earlier try of this
	// statement or of the request, finds out alone.)
	var left []*call[draft, user]
	var taken []*call[lookUp, user]
	for _, c := range calls {
		if err == nil && c.err == errAlone && !isKeyed(c.ask.id) {
			left, taken = append(left, c), append(taken, &call[lookUp, user]{ask: lookUp(c.ask.email)})
		}
	}
	if len(left) > 0 {
		s.findMany(ctx, taken)
	}
	for i, c := range left {
		if taken[i].err == nil {
			c.err = errEmailTaken
		}
	}
}

func (s *store) getMany(ctx context.Context, calls []*call[lookUp, user]) {
	if len(calls) == 1 {
		calls[0].answer, _, calls[0].err = s.one(ctx, selectUser, string(calls[0].ask))
		return
	}
	var ids []byte
	for _, c := range calls {
		ids = appendElement(ids, (*string)(&c.ask))
	}
	found, _, err := s.query(ctx, selectUsers, array(ids))
	deal(calls, byID(found), err, errNotFound, errAlone)
}

func (s *store) findMany(ctx context.Context, calls []*call[lookUp, user]) {
	if len(calls) == 1 {
		calls[0].answer, _, calls[0].err = s.one(ctx, findUser, string(calls[0].ask))
		return
	}
	var emails []byte
	for _, c := range calls {
		emails = appendElement(emails, (*string)(&c.ask))
	}
	var found map[string]user // by what was asked for: only PostgreSQL knows how it folds letters
	_, err := s.run(ctx, findUsers, []any{array(emails)}, func(rows *sql.Rows) error {
		found = make(map[string]user, len(calls))
		for rows.Next() {
			var u user
			var wanted string
			if err := rows.Scan(append(u.fields(), &wanted)...); err != nil {
				return err
			}
			found[wanted] = u
		}
		return nil
	})
	deal(calls, found, err, errNotFound, errAlone)
}

func (s *store) updateMany(ctx context.Context, calls []*call[userChange, user]) {
	if len(calls) == 1 {
		calls[0].answer, calls[0].err = s.updateAlone(ctx, calls[0].ask, false)
		return
	}
	calls = withoutRepeats(calls)
	var ids, emails, names, matches, noneMatches []byte
	for _, c := range calls {
		ids = appendElement(ids, &c.ask.id)
		emails = appendElement(emails, c.ask.email)
		names = appendElement(names, c.ask.name)
		matches = appendElement(matches, c.ask.when.match)
		noneMatches = appendElement(noneMatches, c.ask.when.noneMatch)
	}
	changed, repeated, err := s.query(ctx, updateUsers, array(ids), array(emails), array(names), array(matches), array(noneMatches))
	deal(calls, byID(changed), err, rerun(repeated), rerun(repeated))
}

func (s *store) deleteMany(ctx context.Context, calls []*call[userChange, user]) {
	if len(calls) == 1 {
		calls[0].answer, calls[0].err = s.deleteAlone(ctx, calls[0].ask, false)
		return
	}
	calls = withoutRepeats(calls)
	var ids, matches, noneMatches []byte
	for _, c := range calls {
		ids = appendElement(ids, &c.ask.id)
		matches = appendElement(matches, c.ask.when.match)
		noneMatches = appendElement(noneMatches, c.ask.when.noneMatch)
	}
	gone, repeated, err := s.query(ctx, deleteUsers, array(ids), array(matches), array(noneMatches))
	deal(calls, byID(gone), err, rerun(repeated), rerun(repeated))
}

// withoutRepeats returns the first call for each user: two writes to one user
// never are in one statement, where the first could not see the second.
func withoutRepeats(calls []*call[userChange, user]) []*call[userChange, user] {
	seen := make(map[string]bool, len(calls))
	return slices.DeleteFunc(slices.Clone(calls), func(c *call[userChange, user]) bool {
		if seen[c.ask.id] {
			c.err = errAlone
			return true
		}
		seen[c.ask.id] = true
		return false
	})
}

func byID(users []user) map[string]user {
	m := make(map[string]user, len(users))
	for _, u := range users {
		m[u.ID] = u
	}
	return m
}

// deal gives each call the user that it asked for, or missing. If the
// statement has failed, it is the database's failure for all of them, or that
// of one: then all get failed, and find out alone.
func deal[Q interface{ key() string }](calls []*call[Q, user], users map[string]user, err, missing, failed error) {
	var f *failure
	if err != nil && !(errors.As(err, &f) && (f.kind == kindUnavailable || f.kind == kindTimeout)) {
		err = failed
	}
	for _, c := range calls {
		u, ok := users[c.ask.key()]
		switch c.answer = u; {
		case err != nil:
			c.err = err
		case !ok:
			c.err = missing
		}
	}
}

// appendElement appends an element to the text of a PostgreSQL array (its
// manual, section 8.15.6); nil is NULL.
func appendElement(b []byte, s *string) []byte {
	if b == nil {
		b = append(b, '{')
	} else {
		b = append(b, ',')
	}
	if s == nil {
		return append(b, "NULL"...)
	}
	b = append(b, '"')
	for i := 0; i < len(*s); i++ {
		if c := (*s)[i]; c == '"' || c == '\\' {
			b = append(b, '\\')
		}
		b = append(b, (*s)[i])
	}
	return append(b, '"')
}

// array completes the text that [appendElement] has begun.
func array(elements []byte) string { return string(append(elements, '}')) }
