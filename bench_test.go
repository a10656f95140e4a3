package main

import (
	"bufio"
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
)

// make bench: rollcall beside the service that most would write, one prepared
// statement a request on a pool of as many connections, in one run over real
// HTTP and on one real PostgreSQL that keeps its defaults, fsync included; with the
// same settings of its sessions, and GOGC as the program has it.

const (
	benchRows  = 100_000
	benchConns = 64
)

// benchID returns the id of row i of those that the benchmarks start with.
func benchID(i int) string { return fmt.Sprintf("%08x-0000-7000-8000-000000000000", i) }

func benchCreate(n int64) string {
	body := fmt.Sprintf(`{"email":"new-%d@example.com","name":"Load Test"}`, n)
	return fmt.Sprintf("POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", usersPath, len(body), body)
}

func benchGet() string {
	return "GET " + usersPath + "/" + benchID(rand.IntN(benchRows)) + " HTTP/1.1\r\nHost: x\r\n\r\n"
}

func benchList() string { return "GET " + usersPath + "?limit=20 HTTP/1.1\r\nHost: x\r\n\r\n" }

func benchUpdate(n int64) string {
	body := fmt.Sprintf(`{"name":"Renamed %d"}`, n)
	return fmt.Sprintf("PUT %s/%s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
		usersPath, benchID(rand.IntN(benchRows)), len(body), body)
}

// Benchmark has a sub-benchmark for each kind of request and each service. To
// compare, divide the ns/op of one service by those of the other.
func Benchmark(b *testing.B) {
	dev, err := startPostgres(context.Background(), b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { dev.stop() })
	env := testEnv(dev.url(), "LOG_LEVEL=error")
	cfg, err := loadConfig(func(name string) string { return env[name] }, false)
	if err != nil {
		b.Fatal(err)
	}
	log := newLogger(cfg, io.Discard)
	store := openStore(cfg, log)
	b.Cleanup(func() { store.close() })
	if err := store.start(b.Context()); err != nil {
		b.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	server := newServer(cfg, newHandler(cfg, store, &health{store: store}, log), log)
	b.Cleanup(func() { server.Close() })
	go listen(server, listener, newConnections(maxConnections, log))
	db, err := sql.Open("postgres", dev.url())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { db.Close() })
	mustExec(b, db, `INSERT INTO users (id, email, name, created_at)
		SELECT (lpad(to_hex(i), 8, '0') || '-0000-7000-8000-000000000000')::uuid, 'user' || i || '@example.com', 'User Number ' || i,
		timestamptz '2024-01-01Z' + i * interval '1 second' FROM generate_series(0, $1 - 1) i`, benchRows)
	mustExec(b, db, "VACUUM ANALYZE users")
	// Both have the same settings: what a session of the store begins with, each of the other service gets from its role.
	mustExec(b, store.db, strings.ReplaceAll(store.pool.session, "SET ", "ALTER ROLE rollcall SET "))
	db.SetMaxIdleConns(-1) // closes the one that was made before that
	single := httptest.NewServer(singleRow(b, db))
	b.Cleanup(single.Close)

	var n atomic.Int64
	for _, load := range []struct {
		name    string
		request func() string
	}{
		{"Get", benchGet},
		{"List", benchList},
		{"Create", func() string { return benchCreate(n.Add(1)) }},
		{"Update", func() string { return benchUpdate(n.Add(1)) }},
		{"Mixed", func() string {
			switch x := rand.IntN(100); {
			case x < 70:
				return benchGet()
			case x < 90:
				return benchList()
			case x < 95:
				return benchCreate(n.Add(1))
			default:
				return benchUpdate(n.Add(1))
			}
		}},
	} {
		for _, service := range []struct{ name, address string }{{"rollcall", listener.Addr().String()}, {"single", single.Listener.Addr().String()}} {
			b.Run(load.name+"/"+service.name, func(b *testing.B) {
				b.SetParallelism(benchConns / 2) // times GOMAXPROCS: 64 on two cores
				b.RunParallel(func(pb *testing.PB) {
					c, err := net.Dial("tcp", service.address)
					if err != nil {
						b.Error(err)
						return
					}
					defer c.Close()
					r := bufio.NewReader(c)
					for pb.Next() {
						if err := exchangeOnce(c, r, load.request()); err != nil {
							b.Error(err)
							return
						}
					}
				})
			})
		}
	}
}

// exchangeOnce sends a request and reads its answer, with as little work as
// that can be done: the client shares the machine with what is measured.
func exchangeOnce(w io.Writer, r *bufio.Reader, request string) error {
	if _, err := io.WriteString(w, request); err != nil {
		return err
	}
	length, status := 0, ""
	for {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return err
		}
		if status == "" {
			status = string(line)
		}
		if value, ok := bytes.CutPrefix(line, []byte("Content-Length: ")); ok {
			if length, err = strconv.Atoi(string(bytes.TrimSpace(value))); err != nil {
				return err
			}
		}
		if len(line) == 2 {
			break
		}
	}
	if _, err := r.Discard(length); err != nil {
		return err
	}
	if !strings.HasPrefix(status, "HTTP/1.1 200 ") {
		return errors.New(status)
	}
	return nil
}

// singleRow is the service that rollcall is compared with: the same routes and
// statements, without any of the rest.
func singleRow(b *testing.B, db *sql.DB) http.Handler {
	db.SetMaxOpenConns(10)
	db.SetMaxIdleConns(10)
	prepare := func(text string) *sql.Stmt {
		stmt, err := db.Prepare(text)
		if err != nil {
			b.Fatal(err)
		}
		return stmt
	}
	get, list, insert, update := prepare(selectUser), prepare(firstUsers), prepare(insertUser), prepare(updateUser)
	type record struct{ ID, Email, Name, CreatedAt, UpdatedAt string }
	answer := func(w http.ResponseWriter, stmt *sql.Stmt, r *http.Request, args ...any) {
		rows, err := stmt.QueryContext(r.Context(), args...)
		if err != nil {
			http.Error(w, err.Error(), 500)
			return
		}
		defer rows.Close()
		var records []record
		for rows.Next() {
			var u record
			if err := rows.Scan(&u.ID, &u.Email, &u.Name, &u.CreatedAt, &u.UpdatedAt); err != nil {
				http.Error(w, err.Error(), 500)
				return
			}
			records = append(records, u)
		}
		body, err := json.Marshal(records)
		if err != nil {
			http.Error(w, err.Error(), 500)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		w.Write(body)
	}
	input := func(r *http.Request) (in struct{ Email, Name *string }) {
		json.NewDecoder(r.Body).Decode(&in)
		return in
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /api/v1/users/{id}", func(w http.ResponseWriter, r *http.Request) { answer(w, get, r, r.PathValue("id")) })
	mux.HandleFunc("GET /api/v1/users", func(w http.ResponseWriter, r *http.Request) { answer(w, list, r, 20, 0) })
	mux.HandleFunc("POST /api/v1/users", func(w http.ResponseWriter, r *http.Request) {
		in := input(r)
		answer(w, insert, r, newUUID(), in.Email, in.Name)
	})
	mux.HandleFunc("PUT /api/v1/users/{id}", func(w http.ResponseWriter, r *http.Request) {
		in := input(r)
		answer(w, update, r, r.PathValue("id"), in.Email, in.Name, nil, nil)
	})
	return mux
}
