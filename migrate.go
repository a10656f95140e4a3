package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"database/sql"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

//go:embed schema.sql
var schemaSQL string

// A migration is one numbered step of schema.sql.
type migration struct {
	version  int // 1, 2, 3 and so on
	title    string
	text     string
	checksum string // SHA-256 of text, in hexadecimal; see recordedAs
}

// recordedAs has the checksum of its released text for a text that has replaced it:
// one that makes the same of all databases that the released one took, and only takes
// more. So programs with either text start on each other's databases.
var recordedAs = map[string]string{
	// Migration 1 once refused columns that fill themselves by GENERATED AS IDENTITY
	// or by the default of a domain.
	"4b3c0c507c2d956be26350279fb1d79b186da3e856d2b1dc6d66092ada1464b3": "506b90beddca30ddada373c838719c58166c6f1d7d7b13ebfd78dc886ddfa556",
}

// A schemaError is a database that this program must not touch: waiting
// doesn't help, so it ends the start.
type schemaError struct{ message string }

func (e *schemaError) Error() string { return e.message }

var migrationLine = regexp.MustCompile(`(?m)^-- migration (\d+): (.+)\n`)

// parseMigrations splits the text of schema.sql at its "-- migration N: title"
// lines, which must number from 1 without a gap.
func parseMigrations(schema string) (migrations []migration, err error) {
	lines := migrationLine.FindAllStringSubmatch(schema, -1)
	if len(lines) == 0 {
		return nil, errors.New("schema.sql: no line \"-- migration 1: title\"")
	}
	for i, text := range migrationLine.Split(schema, -1)[1:] {
		number, title := lines[i][1], lines[i][2]
		if number != strconv.Itoa(i+1) {
			return nil, fmt.Errorf("schema.sql: migration %s stands where %d is expected", number, i+1)
		}
		text = strings.TrimSpace(text)
		checksum := fmt.Sprintf("%x", sha256.Sum256([]byte(text)))
		migrations = append(migrations, migration{i + 1, title, text, cmp.Or(recordedAs[checksum], checksum)})
	}
	return migrations, nil
}

// migrate brings the database to the last of migrations, in one transaction:
// it ends up with all of them or with none. It is safe to run in any number of
// processes at once, and needs no more than the right to read where nothing is
// left to do. A database that a newer program has migrated further is left as
// it is, with a warning.
//
// The error is a [*schemaError] where the database is not what the migrations
// know it to be: a changed migration, somebody else's table, addresses that
// collide, an encoding other than UTF8.
func migrate(ctx context.Context, db *sql.DB, migrations []migration, log *slog.Logger) error {
	tx, err := db.BeginTx(ctx, nil)
	if pgErr := pq.As(err, pqerror.FeatureNotSupported); pgErr != nil {
		// A standby, which can't BEGIN READ WRITE: not for ever, so it is no [*pq.Error]
		// that would end the start.
		return errors.New(describe(pgErr))
	}
	if err != nil {
		return err
	}
	defer tx.Rollback() // without effect after Commit
	applied, err := lockMigrations(ctx, tx, log)
	if err != nil {
		return err
	}
	for _, m := range migrations {
		checksum, ok := applied[m.version]
		switch {
		case !ok:
			err = m.apply(ctx, tx, log)
		case checksum != m.checksum:
			err = &schemaError{fmt.Sprintf("migration %d (%s) was applied to this database with another text than this program has: "+
				"run the program that belongs to the database, or restore schema.sql and add the change as a new migration", m.version, m.title)}
		}
		if err != nil {
			return err
		}
	}
	var digits int // of a second, that updated_at keeps; -1: all six
	err = tx.QueryRowContext(ctx, "SELECT atttypmod FROM pg_attribute WHERE attrelid = 'users'::regclass AND attname = 'updated_at'").Scan(&digits)
	if err != nil {
		return err
	}
	if digits >= 0 && digits < 6 {
		log.Warn("the column updated_at keeps too few digits of a second for If-Match to tell quick updates apart", "digits", digits)
	}
	for version := range applied {
		if version > len(migrations) {
			log.Warn("the database is newer than this program: a newer rollcall has migrated it",
				"database_version", version, "program_version", len(migrations))
		}
	}
	if err := tx.Commit(); err != nil {
		return err
	}
	if n := len(migrations) - len(applied); n > 0 {
		log.Info("schema migrated", "applied", n, "version", len(migrations))
	}
	return nil
}

// lockMigrations keeps other processes from migrating until tx ends, and returns the
// checksums of the recorded migrations by version.
func lockMigrations(ctx context.Context, tx *sql.Tx, log *slog.Logger) (applied map[int]string, err error) {
	defer logSlow(log, "waiting for another rollcall, which migrates").Stop()
	// A role's limits are meant for requests: to index a large table, or to wait for
	// another replica that does, takes longer. PostgreSQL 17 has the last of them. The
	// lock is the transaction's, not the session's, so that it also holds behind a pooler
	// that changes the session with every transaction.
	_, err = tx.ExecContext(ctx, `SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = 0;
		SELECT set_config(name, '0', true) FROM pg_settings WHERE name = 'transaction_timeout';
		SELECT pg_advisory_xact_lock(x'726f6c6c63616c6c'::bigint)`) // "rollcall" in ASCII
	if err != nil {
		return nil, err
	}
	var encoding, grant string
	var exists bool
	err = tx.QueryRowContext(ctx, `SELECT current_setting('server_encoding'), to_regclass('rollcall_migrations') IS NOT NULL,
		format('GRANT CREATE ON SCHEMA %I TO %I', COALESCE(current_schema(), 'public'), current_user)`).Scan(&encoding, &exists, &grant)
	if err != nil {
		return nil, err
	}
	if encoding != "UTF8" {
		return nil, &schemaError{fmt.Sprintf("the database is encoded in %s, which can't hold every name: "+
			"make another one with CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0, and move the users there", encoding)}
	}
	if !exists { // even with IF NOT EXISTS, it would take the right to create
		_, err := tx.ExecContext(ctx, `CREATE TABLE rollcall_migrations (version integer PRIMARY KEY,
			title text NOT NULL, checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())`)
		if pgErr := pq.As(err, pqerror.InsufficientPrivilege); pgErr != nil {
			return nil, &schemaError{pgErr.Message + ": as the owner of the schema, run " + grant}
		}
		return nil, err
	}
	var recorded []byte
	err = tx.QueryRowContext(ctx, "SELECT COALESCE(json_object_agg(version, checksum), '{}') FROM rollcall_migrations").Scan(&recorded)
	if err != nil {
		return nil, err
	}
	err = json.Unmarshal(recorded, &applied)
	return applied, err
}

// apply takes the step and records it.
func (m migration) apply(ctx context.Context, tx *sql.Tx, log *slog.Logger) error {
	defer logSlow(log, fmt.Sprintf("migration %d: %s", m.version, m.title)).Stop()
	// Without arguments the text goes out as it is, many statements at once.
	_, err := tx.ExecContext(ctx, m.text)
	if pgErr := pq.As(err); pgErr != nil && !isUnavailable(err) { // for a person to solve
		return &schemaError{fmt.Sprintf("migration %d (%s): %s", m.version, m.title, describe(pgErr))}
	}
	if err == nil {
		_, err = tx.ExecContext(ctx, "INSERT INTO rollcall_migrations (version, title, checksum) VALUES ($1, $2, $3)",
			m.version, m.title, m.checksum)
	}
	return err
}

// logSlow has the log say what is being done, if it is not stopped within 5 s.
func logSlow(log *slog.Logger, what string) *time.Timer {
	return time.AfterFunc(5*time.Second, func() { log.Info("still preparing the database", "step", what) })
}

// describe returns all that PostgreSQL said, a line each: the message, the detail, the hint.
func describe(pgErr *pq.Error) string {
	said := []string{pgErr.Message, pgErr.Detail, pgErr.Hint}
	return strings.Join(slices.DeleteFunc(said, func(s string) bool { return s == "" }), "\n")
}

// start connects, migrates and prepares. While PostgreSQL is not there, or does
// not let us in, it waits, and says so in the log, until ctx ends. What waiting
// does not cure is a [*schemaError], or a [usageError] where it is the connection.
func (s *pgStore) start(ctx context.Context) error {
	migrations, err := parseMigrations(schemaSQL)
	if err != nil {
		return err
	}
	for pause := 100 * time.Millisecond; ; pause = min(2*pause, 5*time.Second) {
		err := migrate(ctx, s.migrateDB, migrations, s.log)
		if err == nil {
			err = s.db.PingContext(ctx)
		}
		if err == nil || ctx.Err() != nil {
			return cmp.Or(ctx.Err(), err)
		}
		if _, ok := errors.AsType[*schemaError](err); ok {
			return err
		}
		if pgErr := pq.As(err); pgErr != nil && !isUnavailable(err) && pgErr.Code.Class() != "28" && // not let in
			pgErr.Code != pqerror.InvalidCatalogName { // no such database
			switch pgErr.Code.Class() {
			case "22", "42", "55": // it is asked for something that is not there, or not so
				if pgErr.Fatal() { // by the connection
					return usageError("DATABASE_URL: PostgreSQL refuses the connection: " + strings.ReplaceAll(describe(pgErr), "\n", "; "))
				}
			}
			return &schemaError{"PostgreSQL refuses: " + describe(pgErr)}
		}
		s.log.Warn("waiting for PostgreSQL", "error", err.Error(), "next_try", pause.String())
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
