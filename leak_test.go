package main

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"runtime"
	"runtime/pprof"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Nothing that a test starts outlives it. A goroutine inherits the labels of
// the one that starts it (they are meant for profiles), so with a label for
// each test, even tests that run side by side are told apart.

// watched are the names of the tests that checkLeaks watches.
var watched sync.Map

// checkLeaks has t fail if a goroutine that it starts from now on is still
// there when all its other clean-ups are done. What starts something that runs
// calls it first, so that no test has to.
func checkLeaks(t testing.TB) {
	name := t.Name()
	if _, again := watched.LoadOrStore(name, true); again {
		return
	}
	pprof.SetGoroutineLabels(pprof.WithLabels(context.Background(), pprof.Labels("test", name)))
	t.Cleanup(func() {
		watched.Delete(name)
		if left := waitGone(fmt.Sprintf("# labels: {%q:%q}\n", "test", name)); left != "" && !t.Failed() {
			t.Errorf("the test leaves goroutines behind:\n%s", left)
		}
	})
}

// inBackground returns f as a function whose goroutines belong to no test.
func inBackground(f func()) func() {
	return func() {
		done := make(chan struct{})
		go func() {
			defer close(done)
			pprof.SetGoroutineLabels(context.Background())
			f()
		}()
		<-done
	}
}

// waitGone waits until no goroutine but our own has a description with text in
// it, and returns those of the ones that stay.
func waitGone(text string) (left string) {
	deadline := time.Now().Add(patience)
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) { // between two looks, of which each is dear
		left = ""
		var profile bytes.Buffer
		pprof.Lookup("goroutine").WriteTo(&profile, 1)
		_, stacks, _ := strings.Cut(profile.String(), "\n")
		for stack := range strings.SplitSeq(stacks, "\n\n") {
			if strings.Contains(stack, text) && !strings.Contains(stack, "waitGone") &&
				!strings.Contains(stack, "os/signal.loop") { // the program's only one that never ends
				left += stack + "\n\n"
			}
		}
		if left == "" || time.Now().After(deadline) {
			return left
		}
		client.CloseIdleConnections() // which wait for a next request, each with two goroutines
		time.Sleep(pause)
	}
}

// openFiles returns what the process has open, by descriptor: files, pipes and
// sockets. It is nil where there is no /proc.
func openFiles() map[string]string {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil
	}
	files := make(map[string]string)
	for _, e := range entries {
		target, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err == nil && !strings.HasPrefix(target, "anon_inode:") { // such as the runtime's own epoll
			files[e.Name()] = target
		}
	}
	return files
}

// runTests runs the tests, and then checks that nothing is left of them, and of
// what they have shared. It returns the exit code.
func runTests(m *testing.M) int {
	// The first to ask for a signal starts the goroutine that waits for all of
	// them; better here than with the label of a test.
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGUSR2)
	signal.Stop(c)

	before := openFiles()
	code := m.Run()
	printChaosTable(os.Stdout)
	if postgres.started != nil {
		postgres.started.stop()
	}
	os.RemoveAll(postgres.dir)
	os.RemoveAll(cluster.dir)
	if reportUndescribed() {
		code = 1
	}
	if code != 0 {
		return code
	}
	if left := waitGone(" @ "); left != "" { // which all descriptions have
		fmt.Fprintf(os.Stderr, "FAIL: the tests leave goroutines behind:\n%s", left)
		code = 1
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(2 * time.Millisecond) { // between two looks
		after := openFiles()
		maps.DeleteFunc(after, func(fd, target string) bool { return before[fd] == target })
		if len(after) == 0 {
			break
		}
		if time.Now().After(deadline) {
			fmt.Fprintf(os.Stderr, "FAIL: the tests leave files open: %v\n", after)
			code = 1
			break
		}
		runtime.GC() // io.Copy keeps pipes in a pool, of which the collector is the janitor
	}
	return code
}
