# What there is to do with rollcall. Go, make and git are all that it needs: what
# else a target needs (PostgreSQL, for -race a C compiler), it installs, or says
# what to install.

.PHONY: help run test check build bench chaos client fuzz clean postgres compiler attackers chromium prometheus systemd
# What make installs comes from one package manager, which two can't use at once: so
# make -j, too, does one thing after the other.
.NOTPARALLEL:

# The tools of make check, pinned, so that a new release breaks no old commit.
STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2
OAPI_CODEGEN = github.com/oapi-codegen/oapi-codegen/v2/cmd/oapi-codegen@v2.8.2
GOVULNCHECK = golang.org/x/vuln/cmd/govulncheck@v1.9.0
# How many inputs make fuzz tries on each target, some seconds long. (Of a time, as in
# 5s, go test at times makes a failure when it is over: "context deadline exceeded".)
FUZZTIME = 20000x
# What make bench compares the ordinary build with: flags of go build. "-C FOLDER" is
# the source in another folder, such as this one with a piece taken away.
AGAINST = -tags plain
# How many bursts of a second each program gets in each scenario, and from how many
# clients at the same time.
ROUNDS = 10
CLIENTS = 64

help: ## show this list (the default)
	@sed -n 's/^\([a-z]*\):[^#]*## /  make \1	/p' Makefile

run: postgres build ## start the service with a private PostgreSQL; Ctrl-C stops both
	exec ./rollcall -dev

# The commit goes into the program where git can tell it: it may be absent, or
# distrust the folder because it belongs to somebody else. Without cgo the program
# is static: it needs no file of the system that it runs on.
build: ## make ./rollcall, static and stripped
	@vcs=false; if git rev-parse HEAD >/dev/null 2>&1; then vcs=true; fi; \
	set -x; CGO_ENABLED=0 go build -buildvcs=$$vcs -buildmode=exe -trimpath -ldflags='-s -w' -o rollcall .

test: postgres ## run the tests, with the race detector where there is a C compiler
	@if $(CAN_RACE); then set -x; CGO_ENABLED=1 go test -race -shuffle=on -timeout 30m ./...; \
	else echo 'without the race detector, which needs a C compiler (make check installs one)'; \
	set -x; go test -shuffle=on -timeout 30m ./...; fi

# The race detector needs cgo, a C compiler and the headers of the C library.
# Whether all is there shows best by trying.
CAN_RACE = CGO_ENABLED=1 go build -race runtime/cgo 2>/dev/null

# Quick checks first. "go vet" for macOS sees the files that Linux leaves out. In the
# plain build, staticcheck finds what the core has for a mechanism alone (U1000, unused);
# not in the tests, as the tests of the mechanisms share their helpers with the others.
check: postgres compiler ## everything that has to hold before a commit; this is what CI runs
	@unformatted=$$(gofmt -l .); if [ -n "$$unformatted" ]; then echo "not as gofmt wants it: $$unformatted"; exit 1; fi
	go vet ./...
	go vet -tags plain ./...
	GOOS=darwin go vet ./...
	go mod tidy -diff
	@direct=$$(go list -m -f '{{if not .Main}}{{.Path}}{{end}}' all); \
	if [ "$$direct" != github.com/lib/pq ]; then echo "go.mod may require github.com/lib/pq alone, not: $$direct"; exit 1; fi
	go run $(STATICCHECK) ./...
	go run $(STATICCHECK) -tags plain -tests=false ./...
	go build -tags plain -o /dev/null .
	CGO_ENABLED=1 go test -race -shuffle=on -timeout 30m ./...
	CGO_ENABLED=1 go test -tags plain -race -shuffle=on -timeout 30m ./...
	@$(MAKE) --no-print-directory fuzz build
	@facts=$$(go version -m rollcall); for want in CGO_ENABLED=0 -buildmode=exe; do case $$facts in \
	*"$$want"*) ;; *) echo "rollcall is not static: no $$want in its build information"; exit 1;; esac; done
	@echo 'rollcall is static'
	@$(VULNERABILITIES)
	@echo 'all checks passed'

# Its data is on the network. That this is out of reach is no fault of the code; a
# vulnerability is, and govulncheck then ends with 3.
define VULNERABILITIES
echo 'govulncheck ./...'; out=$$(go run $(GOVULNCHECK) ./... 2>&1) && echo "$$out" || \
case $$out in \
*'exit status 3'*) echo "$$out"; exit 1;; \
*) echo 'skipped, as it could not do its work:'; echo "$$out" | grep -v '^go: downloading\|^exit status';; \
esac
endef

bench: postgres ## compare the ordinary build with the plain one, over HTTP; see bench_test.go
	go test -run '^$$' -bench '^Benchmark$$' . -rounds $(ROUNDS) -clients $(CLIENTS) -against='$(AGAINST)'

# Nearly each of these tests has a short form in make test. The table comes last.
chaos: postgres attackers ## break what can break, in full, under load; prints what became of the requests
	ROLLCALL_CHAOS=1 go test -v -count=1 -timeout 60m -run '^TestChaos' .

# The generator and its library are on the network.
client: postgres build ## generate a client from openapi.json, and use it
	@dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; cp openapi.json testdata/client/main.go "$$dir"; program=$$PWD/rollcall; cd "$$dir"; \
	go mod init client 2>/dev/null; \
	if ! out=$$(go run $(OAPI_CODEGEN) -version 2>&1); then echo 'make client: skipped, as the generator can not be had:'; echo "$$out"; exit 0; fi; \
	set -e; go run $(OAPI_CODEGEN) -generate types,client -package main -o api.go openapi.json; \
	go mod tidy 2>/dev/null; go build -o client .; ./client "$$program"

fuzz: postgres ## fuzz each target, FUZZTIME=10m for ten minutes each
	@targets=$$(go test -list '^Fuzz' .) || { echo "$$targets"; exit 1; }; \
	for f in $$(echo "$$targets" | grep '^Fuzz'); do \
	(set -x; go test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) .) || exit 1; done

clean: ## remove what was built; the data of make run, in .dev, stays
	rm -f rollcall

# Where rollcall -dev looks too: see usualFolders in postgres.go.
INITDB = $$(command -v initdb) /usr/lib/postgresql/*/bin/initdb /usr/pgsql-*/bin/initdb \
	/opt/homebrew/opt/postgresql*/bin/initdb /usr/local/opt/postgresql*/bin/initdb

HAVE_POSTGRES = for p in $(INITDB); do if [ -x "$$p" ]; then exit 0; fi; done

# The subshell ends with the first PostgreSQL found.
postgres: # the programs of the PostgreSQL server
	@($(HAVE_POSTGRES); exit 1) || { $(call INSTALL,PostgreSQL,postgresql,postgresql-server,postgresql); }

compiler: # for the race detector
	@$(CAN_RACE) || { $(call INSTALL,a C compiler,gcc libc6-dev,gcc glibc-devel,gcc); }

ATTACKERS = haproxy pgbouncer slowhttptest
# Not all of /usr/sbin is on every user's PATH. (The tests look there too.)
attackers: # what make chaos breaks and attacks with; make test skips what it lacks
	@(PATH=$$PATH:/usr/sbin; command -v haproxy && command -v pgbouncer && command -v slowhttptest) >/dev/null || \
	{ $(call INSTALL,HAProxy and PgBouncer and slowhttptest,$(ATTACKERS),$(ATTACKERS),$(ATTACKERS)); }

chromium: # to try the page in; make test skips that without it
	@command -v chromium >/dev/null || { $(call INSTALL,Chromium,chromium,chromium,chromium); }

prometheus: # to check the metrics and deploy/alerts.yml; make test skips that without it
	@command -v promtool >/dev/null || { $(call INSTALL,Prometheus,prometheus,golang-github-prometheus,prometheus); }

systemd: # to check the units of deploy/; make test skips that without it
	@command -v systemd-analyze >/dev/null || { $(call INSTALL,systemd,systemd,systemd,systemd); }

# Debian's package would create a cluster, and start it on port 5432. What says that
# it should not is there only while it is installed.
NO_CLUSTER = /etc/postgresql-common/createcluster.d/rollcall.conf

# $(call INSTALL,what,its packages for apt,for dnf,for brew): what the package manager
# prints is shown only if it fails.
define INSTALL
echo 'installing $(1)'; \
sudo=; if [ "$$(id -u)" != 0 ]; then sudo=sudo; fi; \
out=$$({ if command -v brew >/dev/null; then brew install $(4); \
elif [ "$$sudo" ] && ! command -v sudo >/dev/null; then false; \
elif command -v apt-get >/dev/null; then $$sudo sh -c 'trap "rm -f $(NO_CLUSTER); rmdir -p $(dir $(NO_CLUSTER)) 2>/dev/null" 0 1 2 15; \
	mkdir -p $(dir $(NO_CLUSTER)) && echo "create_main_cluster = false" >$(NO_CLUSTER) && apt-get update -qq && \
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(2)'; \
elif command -v dnf >/dev/null; then $$sudo dnf install -q -y $(3); \
else false; fi; } 2>&1) || { echo "$$out" >&2; \
echo '$(1) is missing and could not be installed; install it yourself: $(2) on Debian and Ubuntu, $(3) on Fedora, $(4) with Homebrew' >&2; exit 1; }
endef
