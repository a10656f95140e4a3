-- The table of users, as numbered migrations.
--
-- rollcall applies this file at every start, in one transaction under an
-- advisory lock (see migrate.go). A line "-- migration N: title" begins a
-- migration; each is applied once and recorded with the checksum of its text.
-- So a migration that has been released is never edited, comments included:
-- a change is a new migration at the end. (The one exception is in migrate.go.)

-- migration 1: the table of users

-- As the original made it (001_create_users.sql): a database that has it
-- already is taken over as it is. Ids are made by the service (UUIDv7).
CREATE TABLE IF NOT EXISTS users (
    id         uuid         PRIMARY KEY,
    email      varchar(255) NOT NULL,
    name       varchar(255) NOT NULL,
    created_at timestamptz  NOT NULL DEFAULT now(),
    updated_at timestamptz  NOT NULL DEFAULT now()
);

-- Any other table of this name belongs to somebody else.
DO $$
DECLARE
    wrong text;
BEGIN
    SELECT string_agg(format('%s %s', want.name, want.kind), ', ' ORDER BY want.name) INTO wrong
    FROM (VALUES ('id', 'uuid'), ('email', 'character varying'), ('name', 'character varying'),
                 ('created_at', 'timestamp with time zone'), ('updated_at', 'timestamp with time zone')
         ) AS want (name, kind)
    LEFT JOIN pg_attribute a
        ON a.attrelid = 'users'::regclass AND a.attname = want.name AND NOT a.attisdropped
    WHERE a.atttypid IS DISTINCT FROM want.kind::regtype;
    wrong := 'lacks ' || wrong;
    IF wrong IS NULL THEN
        SELECT 'demands ' || string_agg(attname, ', ' ORDER BY attname) INTO wrong
        FROM pg_attribute
        WHERE attrelid = 'users'::regclass AND attnum > 0 AND attnotnull AND NOT atthasdef AND NOT attisdropped
            AND attidentity = '' AND atttypid NOT IN (SELECT oid FROM pg_type WHERE typdefault IS NOT NULL)
            AND attname NOT IN ('id', 'email', 'name', 'created_at', 'updated_at');
    END IF;
    IF wrong IS NULL AND NOT EXISTS (
        SELECT FROM pg_constraint c JOIN pg_attribute a ON a.attrelid = c.conrelid AND c.conkey = ARRAY[a.attnum]
        WHERE c.conrelid = 'users'::regclass AND c.contype = 'p' AND a.attname = 'id')
    THEN
        wrong := 'has no PRIMARY KEY (id)';
    END IF;
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION 'the table "users" of this database is not one of ours: it %', wrong
            USING HINT = 'Give rollcall a database (or, with search_path, a schema) of its own.';
    END IF;
END $$;

-- migration 2: an address belongs to one user, letter case ignored

-- Where rows of the original collide now, a person has to decide which stay.
DO $$
DECLARE
    total  bigint;
    listed text;
BEGIN
    SELECT max(groups), string_agg(addresses, '; ' ORDER BY addresses) INTO total, listed
    FROM (SELECT string_agg(email, ', ' ORDER BY created_at, id) AS addresses, count(*) OVER () AS groups
          FROM users GROUP BY lower(email) HAVING count(*) > 1
          ORDER BY 1 LIMIT 50) AS collisions;
    IF total > 0 THEN
        RAISE EXCEPTION 'addresses that differ in letter case alone: %', listed
            USING DETAIL = format('There are %s such groups of users (at most 50 are listed), oldest user first.', total),
                  HINT = 'Change or delete all but one user of each group, then start again. Nothing has been changed.';
    END IF;
END $$;

-- lower() folds as the database's own locale says, here and in every look-up.
CREATE UNIQUE INDEX IF NOT EXISTS users_email_lower_key ON users (lower(email));

-- What the original had for the same purpose: its UNIQUE constraint, whatever
-- its name, and an index that repeated the constraint's own.
DO $$
DECLARE
    obsolete text;
BEGIN
    FOR obsolete IN
        SELECT c.conname FROM pg_constraint c
        JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attname = 'email'
        WHERE c.conrelid = 'users'::regclass AND c.contype = 'u' AND c.conkey = ARRAY[a.attnum]
    LOOP
        EXECUTE format('ALTER TABLE users DROP CONSTRAINT %I', obsolete);
    END LOOP;
END $$;
DROP INDEX IF EXISTS idx_users_email;

-- migration 3: pages in the order of the list

-- Serves ORDER BY created_at DESC, id DESC from any row on, so that page
-- 500,000 costs what the first does; the original's index has only its first half.
CREATE INDEX IF NOT EXISTS users_created_at_id_idx ON users (created_at DESC, id DESC);
DROP INDEX IF EXISTS idx_users_created_at;

-- updated_at serves as the version of a user, created_at as its place in the
-- list: neither may be missing.
ALTER TABLE users
    ALTER COLUMN created_at SET DEFAULT now(), ALTER COLUMN created_at SET NOT NULL,
    ALTER COLUMN updated_at SET DEFAULT now(), ALTER COLUMN updated_at SET NOT NULL;

-- migration 4: an Idempotency-Key makes one user

-- Who is created with an Idempotency-Key gets an id that is made of it: a UUID
-- of version 8 (RFC 9562, section 5.8) whose first ten bytes stand for the
-- caller and the key, the last six for the body (see idempotency.go). The index
-- lets only one body of a key become a user, whoever asks at the same moment.
-- Users with ids of other versions are not in it.
--
-- A table that is taken over may hold ids of version 8 that somebody else made
-- in a way of his own, several of them with the same first ten bytes. They stay,
-- and the index is for those who are created later.
DO $$
DECLARE
    keyed  text := 'get_byte(uuid_send(id), 6) >> 4 = 8 AND get_byte(uuid_send(id), 8) >> 6 = 2'; -- version, variant
    newest timestamptz;
BEGIN
    EXECUTE format('SELECT max(newest) FROM (SELECT max(created_at) AS newest FROM users WHERE %s
                    GROUP BY substring(uuid_send(id) FOR 10) HAVING count(*) > 1) AS alike', keyed) INTO newest;
    IF newest IS NOT NULL THEN
        keyed := format('%s AND created_at > %L::timestamptz', keyed, newest);
    END IF;
    EXECUTE format('CREATE UNIQUE INDEX users_idempotency_key ON users (substring(uuid_send(id) FOR 10)) WHERE %s', keyed);
END $$;
