package main

import (
	"bufio"
	"bytes"
	"database/sql"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// make bench: the ordinary build measured against another, over real HTTP. Each is a
// program with a database of its own, on one PostgreSQL that keeps its defaults, fsync
// included. A round is a burst of requests to the one, then a burst to the other.

var (
	benchAgainst = flag.String("against", "-tags plain", "what go build makes the other program with")
	benchClients = flag.Int("clients", 64, "how many clients send requests at the same time")
	benchRounds  = flag.Int("rounds", 10, "how many bursts of a second each program gets in each scenario")
)

const benchRows = 100_000 // users that are there from the start

// benchScenarios have the kinds of requests that they choose from, each as likely as the
// others.
var benchScenarios = []struct {
	name  string
	kinds []string
}{
	{"Get", []string{"get"}},
	{"List", []string{"list"}},
	{"Create", []string{"create"}},
	{"Update", []string{"update"}},
	{"Mixed", append(strings.Fields(strings.Repeat("get ", 14)+strings.Repeat("list ", 4)), "create", "update")},
}

func benchRequest(kind string) string {
	method, path, body := "GET", fmt.Sprintf("/%08x-0000-7000-8000-000000000000", rand.IntN(benchRows)), ""
	switch kind {
	case "list":
		path = "?limit=20"
	case "create":
		method, path, body = "POST", "", fmt.Sprintf(`{"email":"new-%d@example.com","name":"Load Test"}`, rand.Int())
	case "update":
		method, body = "PUT", fmt.Sprintf(`{"name":"Renamed %d"}`, rand.Int())
	}
	return fmt.Sprintf("%s %s%s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
		method, usersPath, path, len(body), body)
}

// Benchmark prints a line for each scenario: the requests per second and the server's
// processor time per request (user and system), first of the ordinary program, then of
// the other, and the ratio of the two. Each figure is the median of the rounds.
func Benchmark(b *testing.B) {
	private, err := startPostgres(b.Context(), b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { private.stop() })
	programs := [2]*process{startBenchProgram(b, private, "ordinary", ""), startBenchProgram(b, private, "other", *benchAgainst)}
	fmt.Printf("%d rounds with %d clients; the other program: go build %s\n", *benchRounds, *benchClients, *benchAgainst)
	const line = "%-8s%10v%10v  %-20v%10v%10v  %v\n"
	fmt.Printf(line, "", "requests/s", "other", "ratio", "CPU µs", "other", "ratio")
	for _, scenario := range benchScenarios {
		var speed, cost [2][]float64
		for round := range *benchRounds + 1 {
			for i, p := range programs {
				perSecond, perRequest := p.burst(b, scenario.kinds)
				if round > 0 { // the first one opens connections
					speed[i], cost[i] = append(speed[i], perSecond), append(cost[i], perRequest)
				}
			}
		}
		fmt.Printf(line, scenario.name, median(speed[0]), median(speed[1]), ratios(speed), median(cost[0]), median(cost[1]), ratios(cost))
	}
}

func median(values []float64) int {
	return int(slices.Sorted(slices.Values(values))[len(values)/2])
}

// ratios returns the median of the ratios, and in brackets the smallest and the largest.
func ratios(of [2][]float64) string {
	var all []float64
	for i := range of[0] {
		all = append(all, of[0][i]/of[1][i])
	}
	slices.Sort(all)
	return fmt.Sprintf("%.2f (%.2f to %.2f)", all[len(all)/2], all[0], all[len(all)-1])
}

// startBenchProgram builds the program, and runs it on a schema of its own with the
// first users in it.
func startBenchProgram(b *testing.B, private *privatePostgres, name, flags string) *process {
	program := filepath.Join(b.TempDir(), name)
	args := slices.Concat([]string{"build"}, strings.Fields(flags),
		[]string{"-buildvcs=false", "-trimpath", "-ldflags=-s -w", "-o", program, "."})
	build := exec.Command("go", args...)
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // as make build does
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	databaseURL, port := private.url()+" search_path="+name, freePort(b)
	db, err := sql.Open("postgres", databaseURL)
	if err != nil {
		b.Fatal(err)
	}
	defer db.Close()
	mustExec(b, db, "CREATE SCHEMA "+name)
	p := newProcess(b, b.TempDir(), testEnv(databaseURL, "LOG_LEVEL=error", "PORT="+port))
	p.cmd.Path, p.url = program, "127.0.0.1:"+port
	p.start()
	waitFor(b, name+" to be ready", func() bool {
		response, err := http.Get("http://" + p.url + "/health/ready")
		return err == nil && response.Body.Close() == nil && response.StatusCode == 200
	})
	mustExec(b, db, `INSERT INTO users (id, email, name, created_at)
		SELECT (lpad(to_hex(i), 8, '0') || '-0000-7000-8000-000000000000')::uuid, 'user' || i || '@example.com', 'User Number ' || i,
		timestamptz '2024-01-01Z' + i * interval '1 second' FROM generate_series(0, $1 - 1) i`, benchRows)
	mustExec(b, db, "VACUUM ANALYZE users")
	return p
}

// burst has the clients send requests to p for a second. It returns the requests per
// second, and the microseconds of processor time that p needed for each.
func (p *process) burst(b *testing.B, kinds []string) (perSecond, perRequest float64) {
	var requests atomic.Int64
	var clients sync.WaitGroup
	before, start := p.cpuTime(), time.Now()
	for range *benchClients {
		clients.Go(func() {
			conn, err := net.Dial("tcp", p.url)
			if err != nil {
				b.Error(err)
				return
			}
			defer conn.Close()
			for r := bufio.NewReader(conn); time.Since(start) < time.Second; requests.Add(1) {
				if err := sendRequest(conn, r, benchRequest(kinds[rand.IntN(len(kinds))])); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	clients.Wait()
	n := float64(requests.Load())
	return n / time.Since(start).Seconds(), float64((p.cpuTime() - before).Microseconds()) / n
}

// cpuTime returns the processor time of the process so far: fields 14 and 15 of
// /proc/pid/stat (proc(5)), in hundredths of a second. It is 0 where there is no /proc.
func (p *process) cpuTime() time.Duration {
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	var user, system int64
	if fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:]); len(fields) > 12 {
		user, _ = strconv.ParseInt(string(fields[11]), 10, 64)
		system, _ = strconv.ParseInt(string(fields[12]), 10, 64)
	}
	return time.Duration(user+system) * 10 * time.Millisecond
}

// sendRequest sends a request and reads the response, with as little work as that takes:
// the client shares the machine with what is measured.
func sendRequest(w io.Writer, r *bufio.Reader, request string) error {
	if _, err := io.WriteString(w, request); err != nil {
		return err
	}
	status, err := r.ReadString('\n')
	for length := 0; err == nil; {
		var line []byte
		if line, err = r.ReadSlice('\n'); len(line) == 2 {
			_, err = r.Discard(length)
			break
		}
		if value, ok := bytes.CutPrefix(line, []byte("Content-Length: ")); ok {
			length, err = strconv.Atoi(string(bytes.TrimSpace(value)))
		}
	}
	if err == nil && !strings.HasPrefix(status, "HTTP/1.1 200 ") {
		err = errors.New(status)
	}
	return err
}
