package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"database/sql"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
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
func parseMigrations(schema string) ([]migration, error) {
	lines := migrationLine.FindAllStringSubmatchIndex(schema, -1)
	if len(lines) == 0 {
		return nil, errors.New("schema.sql: no line \"-- migration 1: title\"")
	}
	var migrations []migration
	for i, at := range lines {
		end := len(schema)
		if i+1 < len(lines) {
			end = lines[i+1][0]
		}
		version, err := strconv.Atoi(schema[at[2]:at[3]])
		if err != nil || version != i+1 {
			return nil, fmt.Errorf("schema.sql: migration %d stands where %d is expected", version, i+1)
		}
		text := strings.TrimSpace(schema[at[1]:end])
		sum := sha256.Sum256([]byte(text))
		checksum := hex.EncodeToString(sum[:])
		migrations = append(migrations, migration{version, schema[at[4]:at[5]], text, cmp.Or(recordedAs[checksum], checksum)})
	}
	return migrations, nil
}

// migrationLock is the key of the advisory lock under which replicas that
// start together migrate one after the other: "rollcall" in ASCII.
const migrationLock = 0x726f6c6c63616c6c

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
	if refused := pq.As(err, pqerror.FeatureNotSupported); refused != nil {
		// A standby, which can't BEGIN READ WRITE: not for ever, so it is no [*pq.Error]
		// that would end the start.
		return errors.New(describe(refused))
	}
	if err != nil {
		return err
	}
	defer tx.Rollback() // without effect after Commit

	// A role's limits are meant for requests: to index a large table, or to wait for
	// another replica that does, takes longer. PostgreSQL 17 has the last of them.
	_, err = tx.ExecContext(ctx, `SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = 0;
		SELECT set_config(name, '0', true) FROM pg_settings WHERE name = 'transaction_timeout'`)
	if err != nil {
		return err
	}
	var encoding, grant string
	err = tx.QueryRowContext(ctx, `SELECT current_setting('server_encoding'),
		format('GRANT CREATE ON SCHEMA %I TO %I', COALESCE(current_schema(), 'public'), current_user)`).Scan(&encoding, &grant)
	if err != nil {
		return err
	}
	if encoding != "UTF8" {
		return &schemaError{fmt.Sprintf("the database is encoded in %s, which can't hold every name: "+
			"make another one with CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0, and move the users there", encoding)}
	}
	// The lock is the transaction's, not the session's, so that it also holds
	// behind a pooler that changes the session with every transaction.
	waiting := logSlow(log, "waiting for another rollcall, which migrates")
	_, err = tx.ExecContext(ctx, "SELECT pg_advisory_xact_lock($1)", int64(migrationLock))
	waiting.Stop()
	if err != nil {
		return err
	}
	applied, err := appliedMigrations(ctx, tx)
	if err != nil {
		return err
	}
	changes := 0
	for _, m := range migrations {
		switch checksum, ok := applied[m.version]; {
		case ok && checksum != m.checksum:
			return &schemaError{fmt.Sprintf("migration %d (%s) was applied to this database with another text than this program has: "+
				"run the program that belongs to the database, or restore schema.sql and add the change as a new migration", m.version, m.title)}
		case ok:
			continue
		}
		if changes == 0 && len(applied) == 0 {
			_, err := tx.ExecContext(ctx, `CREATE TABLE IF NOT EXISTS rollcall_migrations (
				version integer PRIMARY KEY, title text NOT NULL, checksum text NOT NULL,
				applied_at timestamptz NOT NULL DEFAULT now())`)
			if refused := pq.As(err, pqerror.InsufficientPrivilege); refused != nil {
				return &schemaError{refused.Message + ": as the owner of the schema, run " + grant}
			}
			if err != nil {
				return err
			}
		}
		// Without arguments the text goes out as it is, many statements at once.
		migrating := logSlow(log, fmt.Sprintf("migration %d: %s", m.version, m.title))
		_, err := tx.ExecContext(ctx, m.text)
		migrating.Stop()
		if err != nil {
			return migrationFailure(m, err)
		}
		if _, err := tx.ExecContext(ctx, "INSERT INTO rollcall_migrations (version, title, checksum) VALUES ($1, $2, $3)",
			m.version, m.title, m.checksum); err != nil {
			return err
		}
		changes++
	}
	var digits int // of a second, that updated_at keeps; -1: all six
	err = tx.QueryRowContext(ctx, "SELECT atttypmod FROM pg_attribute WHERE attrelid = 'users'::regclass AND attname = 'updated_at'").Scan(&digits)
	if err != nil {
		return err
	}
	if digits >= 0 && digits < 6 {
		log.Warn("the column updated_at keeps too few digits of a second for If-Match to tell quick updates apart", "digits", digits)
	}
	if err := tx.Commit(); err != nil {
		return err
	}
	if changes > 0 {
		log.Info("schema migrated", "applied", changes, "version", len(migrations))
	}
	for version := range applied {
		if version > len(migrations) {
			log.Warn("the database is newer than this program: a newer rollcall has migrated it",
				"database_version", version, "program_version", len(migrations))
		}
	}
	return nil
}

// logSlow has the log say what is being done, if it is not stopped within 5 s.
func logSlow(log *slog.Logger, what string) *time.Timer {
	return time.AfterFunc(5*time.Second, func() { log.Info("still preparing the database", "step", what) })
}

// appliedMigrations returns the checksums of the recorded migrations by version.
func appliedMigrations(ctx context.Context, tx *sql.Tx) (map[int]string, error) {
	var exists bool
	err := tx.QueryRowContext(ctx, "SELECT to_regclass('rollcall_migrations') IS NOT NULL").Scan(&exists)
	if err != nil || !exists {
		return nil, err
	}
	rows, err := tx.QueryContext(ctx, "SELECT version, checksum FROM rollcall_migrations")
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	applied := make(map[int]string)
	for rows.Next() {
		var version int
		var checksum string
		if err := rows.Scan(&version, &checksum); err != nil {
			return nil, err
		}
		applied[version] = checksum
	}
	return applied, rows.Err()
}

// migrationFailure tells a migration that the database refuses, which is for a
// person to solve, from a database that is not up to it right now.
func migrationFailure(m migration, err error) error {
	refused := pq.As(err)
	if refused == nil || isUnavailable(err) {
		return err
	}
	return &schemaError{fmt.Sprintf("migration %d (%s): %s", m.version, m.title, describe(refused))}
}

// describe returns all that PostgreSQL said: the message, and on lines of their
// own the detail and the hint.
func describe(refused *pq.Error) string {
	text := refused.Message
	for _, more := range []string{refused.Detail, refused.Hint} {
		if more != "" {
			text += "\n" + more
		}
	}
	return text
}
