package main

import (
	"bytes"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
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
		{"backslashes that begin no escape", `A="\d \/ C:\X\` + "\n\"", map[string]string{"A": `\d \/ C:\X\` + "\n"}},
		{"no expansion", "A=$B\nB=${A}\nC=\"$(A)\"", map[string]string{"A": "$B", "B": "${A}", "C": "$(A)"}},
		{"a comment close to a quote", `A='b'#c`, map[string]string{"A": "b"}},
		{"beyond ASCII", "A=grüße\u00a0", map[string]string{"A": "grüße\u00a0"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			got, skipped, err := parseDotenv([]byte(test.file))
			if err != nil || !maps.Equal(got, test.want) || skipped != nil {
				t.Errorf("got %q, %q, %v, want %q", got, skipped, err, test.want)
			}
		})
	}
}

// What is wrong in a line of one of our variables is an error; with FOREIGN
// instead of PORT, it is passed over, and the line after it is taken.
func TestDotenvMistakes(t *testing.T) {
	t.Parallel()
	const form = `: expected NAME=value, NAME='value' or NAME="value", in UTF-8, and nothing but a comment behind it`
	for _, test := range []struct{ file, want string }{
		{"PORT", "line 1" + form},
		{"PORT hunter2", "line 1" + form},
		{"PORT: hunter2", "line 1" + form},
		{"PORT hunter2=3000", "line 1" + form},
		{"export PORT", "line 1" + form},
		{"A=1\n# c\n\nPORT", "line 4" + form},
		{"A='\n\n'\nPORT", "line 4" + form},
		{"PORT=1\nB=2\nPORT=hunter2", "line 3: expected another name, PORT is set above already"},
		{"A=1\nPORT='hunter2\n\n", "line 2" + form},
		{"A=1\nPORT=\"hunter2\n\n", "line 2" + form},
		{`PORT="hunter2\`, "line 1" + form},
		{`PORT="hunter2\"`, "line 1" + form},
		{"PORT='a' hunter2", "line 1" + form},
		{"PORT='a\n'hunter2", "line 1" + form},
		{"PORT='it''hunter2'", "line 1" + form},
		{"A=1\nPORT=hunter2\x00", "line 2" + form},
		{"A=1\nPORT=hunter2\xff", "line 2" + form},
	} {
		t.Run(test.want, func(t *testing.T) {
			t.Parallel()
			_, _, err := parseDotenv([]byte(test.file))
			if got := errorText(err); got != test.want {
				t.Errorf("%.80q: got %q, want %q", test.file, got, test.want)
			}
			foreign := strings.ReplaceAll(test.file, "PORT", "FOREIGN") + "\nHOST=found"
			values, skipped, err := parseDotenv([]byte(foreign))
			want := strings.ReplaceAll(test.want, "PORT", "FOREIGN")
			if err != nil || values["HOST"] != "found" || len(skipped) == 0 || skipped[0] != want {
				t.Errorf("%.80q: got %q, %q, %v, want %q", foreign, values, skipped, err, want)
			}
		})
	}
	if _, _, err := parseDotenv([]byte("\xff\xfeA\x00=\x001\x00")); errorText(err) != "expected UTF-8 text, not UTF-16" {
		t.Errorf("UTF-16: got %v", err)
	}
}

// What another program's lines may look like.
func TestDotenvOfOthers(t *testing.T) {
	t.Parallel()
	for _, other := range []string{
		"hunter2", "=hunter2", "1A=hunter2", "A B=hunter2", "ä=hunter2", "MY-KEY=hunter2", "my.key=hunter2", "PORT.x=hunter2",
		"DATABASE-URL=hunter2", "PORT2", "export FOO", "export A B", "- hunter2", "[PORT]", "include other.env",
		"my.key='hunter2\nPORT=1\n'", "A=1\nA=2", "A='it's'", "A=\"hunter2", "A=\xe4", "MY-KEY=hunter2\x00",
	} {
		values, skipped, err := parseDotenv([]byte("\n" + other + "\nHOST=found"))
		if err != nil || values["HOST"] != "found" || values["PORT"] != "" || len(skipped) != 1 ||
			!strings.HasPrefix(skipped[0], "line ") || strings.Contains(skipped[0], "hunter2") {
			t.Errorf("%q: got %q, %q, %v", other, values, skipped, err)
		}
	}
	values, skipped, err := parseDotenv([]byte(strings.Repeat("{\n", 10_000) + "PORT=1"))
	if err != nil || values["PORT"] != "1" || len(skipped) != 10_000 {
		t.Errorf("a file that is no .env: got %q, %d mistakes, %v", values, len(skipped), err)
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

	read := func(path string) (func(string) string, string, error) {
		stderr := new(syncBuffer)
		merged, err := withDotenv(getenv, path, stderr)
		return merged, stderr.String(), err
	}

	merged, warning, err := read(write("BOTH=file\nEMPTY=file\nFILE=file"))
	if err != nil || warning != "" {
		t.Fatal(err, warning)
	}
	for name, want := range map[string]string{"BOTH": "environment", "EMPTY": "file", "FILE": "file", "NEITHER": ""} {
		if got := merged(name); got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}

	none, _, err := read(filepath.Join(t.TempDir(), ".env"))
	if err != nil || none("BOTH") != "environment" {
		t.Errorf("a missing file: %v", err)
	}
	folder := t.TempDir()
	if none, warning, err := read(folder); err != nil || none("BOTH") != "environment" ||
		!strings.Contains(warning, "found a directory") || !strings.Contains(warning, folder) {
		t.Errorf("a directory: %v, %s", err, warning)
	}
	if _, _, err := read(os.DevNull); errorText(err) != os.DevNull+": expected a regular file of at most 1048576 bytes" {
		t.Errorf("a device: %v", err)
	}
	if _, warning, err := read(write(strings.Repeat("{\n", 100))); err != nil || strings.Count(warning, "line ") != 10 {
		t.Errorf("a file that is no .env: %v, %s", err, warning)
	}
	broken := write("A=1\nPORT\n")
	if _, _, err := read(broken); !strings.HasPrefix(errorText(err), broken+": line 2: expected NAME=value") {
		t.Errorf("a broken file: %v", err)
	}
	if _, _, err := read(write(strings.Repeat("#", maxSmallFile+1))); !strings.HasSuffix(errorText(err), "of at most 1048576 bytes") {
		t.Errorf("a large file: %v", err)
	}
	if os.Getuid() > 0 { // root may read everything
		locked := write("A=1")
		if err := os.Chmod(locked, 0); err != nil {
			t.Fatal(err)
		}
		if _, _, err := read(locked); !errors.Is(err, fs.ErrPermission) {
			t.Errorf("a file of somebody else: %v", err)
		}
	}
}

// FuzzDotenv checks that no file makes the parser panic or is refused over what
// is none of ours, that lines of others leave ours alone, and that a quoted value
// comes back as it was.
func FuzzDotenv(f *testing.F) {
	for _, seed := range []string{"", "A=1 # c\r\nexport B='x\ny'\n", `A="\n\$\\"`, "A='", "\ufeff=", `it's "$so"\`, "\r", "#", `A="\d\/`, "a-b=1", "PORT"} {
		f.Add([]byte(seed), seed)
	}
	doubled := strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\r", `\r`, "$", `\$`)
	f.Fuzz(func(t *testing.T, file []byte, value string) {
		values, skipped, err := parseDotenv(file)
		if (err == nil) != (values != nil) {
			t.Errorf("got %v and %v", values, err)
		}
		for name := range values {
			if m := dotenvName.FindStringSubmatch(name); m[1] != name || name == "" {
				t.Errorf("took the name %q", name)
			}
		}
		ours := slices.ContainsFunc(new(config).variables(), func(v variable) bool { return bytes.Contains(file, []byte(v.name)) })
		if utf16 := bytes.HasPrefix(file, []byte("\xff\xfe")) || bytes.HasPrefix(file, []byte("\xfe\xff")); err != nil && !ours && !utf16 {
			t.Errorf("refused over what is none of ours: %v", err)
		}
		if err == nil && !bytes.ContainsAny(file, `'"`) { // which may span lines
			if got, _, err := parseDotenv(append(bytes.Clone(file), "\nSOUND=1"...)); err != nil || got["SOUND"] != "1" && values["SOUND"] == "" {
				t.Errorf("after it, a sound line is lost: %v, %q", err, skipped)
			}
		}

		if !utf8.ValidString(value) || strings.Contains(value, "\x00") {
			return
		}
		want := map[string]string{"A": value, "B": "b"}
		double := `A="` + doubled.Replace(value) + "\" # c\nB=b\n"
		if got, _, err := parseDotenv([]byte(double)); err != nil || !maps.Equal(got, want) {
			t.Errorf("%q: got %q, %v", double, got, err)
		}
		if strings.ContainsAny(value, "'\r") {
			return
		}
		single := "export A='" + value + "'\nB=b"
		if got, _, err := parseDotenv([]byte(single)); err != nil || !maps.Equal(got, want) {
			t.Errorf("%q: got %q, %v", single, got, err)
		}
	})
}
