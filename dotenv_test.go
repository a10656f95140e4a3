package main

import (
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestDotenvTakes(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, file string
		want       map[string]string
	}{
		{"nothing", "", nil},
		{"only comments and blank lines", "# A=1\n\n  \t\n  # B=2", nil},
		{"a value", "A=1", map[string]string{"A": "1"}},
		{"several", "A=1\nB=2\n\nC=3\n", map[string]string{"A": "1", "B": "2", "C": "3"}},
		{"Windows line ends", "A=1\r\nB='x\r\ny'\r\n", map[string]string{"A": "1", "B": "x\ny"}},
		{"a byte order mark", "\ufeffA=1", map[string]string{"A": "1"}},
		{"export", "export A=1\nexport\t B=2\n  export C=3", map[string]string{"A": "1", "B": "2", "C": "3"}},
		{"a variable named export", "export=1\nexported=2", map[string]string{"export": "1", "exported": "2"}},
		{"every kind of name", "_a9=1\nPATH=2", map[string]string{"_a9": "1", "PATH": "2"}},
		{"spaces around the =", "A = b c  \n", map[string]string{"A": "b c"}},
		{"an empty value", "A=\nB=''\nC=\"\"\nD= # none", map[string]string{"A": "", "B": "", "C": "", "D": ""}},
		{"a comment after a value", "A=b # c\nB=b\t#c", map[string]string{"A": "b", "B": "b"}},
		{"a # that begins no comment", "A=b#c\nB=#c", map[string]string{"A": "b#c", "B": "#c"}},
		{"a second =", "A=b=c", map[string]string{"A": "b=c"}},
		{"quotes inside a value", `A=it's "so"`, map[string]string{"A": `it's "so"`}},
		{"backslashes without quotes", `A=C:\new`, map[string]string{"A": `C:\new`}},
		{"single quotes", `A='a\n "$b" # c '`, map[string]string{"A": `a\n "$b" # c `}},
		{"single quotes over lines", "A='a\n\nB=b'\nC=c", map[string]string{"A": "a\n\nB=b", "C": "c"}},
		{"double quotes", `A=" it's # no comment "`, map[string]string{"A": " it's # no comment "}},
		{"double quotes over lines", "A=\"a\nB=b\" # c\nC=c", map[string]string{"A": "a\nB=b", "C": "c"}},
		{"escapes", `A="\n\r\t\"\\\$"`, map[string]string{"A": "\n\r\t\"\\$"}},
		{"no expansion", "A=$B\nB=${A}\nC=\"$(A)\"", map[string]string{"A": "$B", "B": "${A}", "C": "$(A)"}},
		{"a comment close to a quote", `A='b'#c`, map[string]string{"A": "b"}},
		{"beyond ASCII", "A=grüße\u00a0", map[string]string{"A": "grüße\u00a0"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			got, err := parseDotenv([]byte(test.file))
			if err != nil || !maps.Equal(got, test.want) {
				t.Errorf("got %q, %v, want %q", got, err, test.want)
			}
		})
	}
}

func TestDotenvRefuses(t *testing.T) {
	t.Parallel()
	const name = ": expected NAME=value, where a name is letters, digits and _ and starts with no digit"
	for _, test := range []struct{ file, want string }{
		{"hunter2", "line 1" + name},
		{"A=1\n# c\n\nhunter2", "line 4" + name},
		{"A='\n\n'\nhunter2", "line 4" + name},
		{"=hunter2", "line 1" + name},
		{"1A=hunter2", "line 1" + name},
		{"A-B=hunter2", "line 1" + name},
		{"A B=hunter2", "line 1" + name},
		{"ä=hunter2", "line 1" + name},
		{"export A", "line 1" + name},
		{"A: hunter2", "line 1" + name},
		{"A=1\nB=2\nA=hunter2", "line 3: expected another name, A is set on line 1 already"},
		{"A=1\nB='hunter2\n\n", "line 2: expected a closing ' for the one that opens here"},
		{"A=1\nB=\"hunter2\n\n", `line 2: expected a closing " for the one that opens here`},
		{`A="hunter2\`, `line 1: expected a closing " for the one that opens here`},
		{`A="hunter2\"`, `line 1: expected a closing " for the one that opens here`},
		{"A=\"a\nhunter2\\d\"", `line 2: expected \n, \r, \t, \", \\ or \$ where the backslash is`},
		{"A=\"a\\\nhunter2\"", `line 1: expected \n, \r, \t, \", \\ or \$ where the backslash is`},
		{"A='a' hunter2", "line 1: expected nothing but a comment after the closing quote"},
		{"A='a\n'hunter2", "line 2: expected nothing but a comment after the closing quote"},
		{"A='it''hunter2'", "line 1: expected nothing but a comment after the closing quote"},
		{"A=1\nB=hunter2\x00", "line 2: expected UTF-8 text without NUL"},
		{"A=1\nB=hunter2\xff", "line 2: expected UTF-8 text without NUL"},
		{"\xff\xfeA\x00=\x001\x00", "line 1: expected UTF-8 text without NUL"},
		{"A=" + strings.Repeat("a", maxDotenv), "expected at most 1048576 bytes"},
	} {
		t.Run(test.want, func(t *testing.T) {
			t.Parallel()
			_, err := parseDotenv([]byte(test.file))
			if got := errorText(err); got != test.want {
				t.Errorf("%.80q: got %q, want %q", test.file, got, test.want)
			}
		})
	}
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func TestWithDotenv(t *testing.T) {
	t.Parallel()
	write := func(content string) string {
		path := filepath.Join(t.TempDir(), ".env")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	environment := map[string]string{"BOTH": "environment", "EMPTY": ""}
	getenv := func(name string) string { return environment[name] }

	merged, err := withDotenv(getenv, write("BOTH=file\nEMPTY=file\nFILE=file"))
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"BOTH": "environment", "EMPTY": "file", "FILE": "file", "NEITHER": ""} {
		if got := merged(name); got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}

	none, err := withDotenv(getenv, filepath.Join(t.TempDir(), ".env"))
	if err != nil || none("BOTH") != "environment" {
		t.Errorf("a missing file: %v", err)
	}
	folder := t.TempDir()
	if _, err := withDotenv(getenv, folder); errorText(err) != folder+": expected a file, found a directory" {
		t.Errorf("a directory: %v", err)
	}
	if _, err := withDotenv(getenv, os.DevNull); errorText(err) != os.DevNull+": expected a regular file" {
		t.Errorf("a device: %v", err)
	}
	broken := write("A=1\nhunter2\n")
	if _, err := withDotenv(getenv, broken); !strings.HasPrefix(errorText(err), broken+": line 2: expected NAME=value") {
		t.Errorf("a broken file: %v", err)
	}
	if _, err := withDotenv(getenv, write(strings.Repeat("#", maxDotenv+1))); !strings.HasSuffix(errorText(err), "expected at most 1048576 bytes") {
		t.Errorf("a large file: %v", err)
	}
	if os.Getuid() > 0 { // root may read everything
		locked := write("A=1")
		if err := os.Chmod(locked, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := withDotenv(getenv, locked); !os.IsPermission(err) {
			t.Errorf("a file of somebody else: %v", err)
		}
	}
}

// FuzzDotenv checks that no file makes the parser panic, and that a quoted
// value comes back as it was.
func FuzzDotenv(f *testing.F) {
	for _, seed := range []string{"", "A=1 # c\r\nexport B='x\ny'\n", `A="\n\$\\"`, "A='", "\ufeff=", `it's "$so"\`, "\r", "#"} {
		f.Add([]byte(seed), seed)
	}
	doubled := strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\r", `\r`, "$", `\$`)
	f.Fuzz(func(t *testing.T, file []byte, value string) {
		values, err := parseDotenv(file)
		if (err == nil) != (values != nil) {
			t.Errorf("got %v and %v", values, err)
		}
		for name := range values {
			if !dotenvName.MatchString(name) {
				t.Errorf("took the name %q", name)
			}
		}

		if !utf8.ValidString(value) || strings.Contains(value, "\x00") {
			return
		}
		want := map[string]string{"A": value, "B": "b"}
		double := `A="` + doubled.Replace(value) + "\" # c\nB=b\n"
		if got, err := parseDotenv([]byte(double)); err != nil || !maps.Equal(got, want) {
			t.Errorf("%q: got %q, %v", double, got, err)
		}
		if strings.ContainsAny(value, "'\r") {
			return
		}
		single := "export A='" + value + "'\nB=b"
		if got, err := parseDotenv([]byte(single)); err != nil || !maps.Equal(got, want) {
			t.Errorf("%q: got %q, %v", single, got, err)
		}
	})
}
