package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"unicode/utf8"
)

// dotenvFile is read by serving and by "rollcall token", and by no other command.
var dotenvFile = ".env" // not by the tests, which would find what the developer has

// maxDotenv bounds the file: a .env is a page of text, and whatever is larger
// got its name by mistake.
const maxDotenv = 1 << 20

// withDotenv returns a getenv that falls back on the file at path. The
// environment wins, so that one run can differ from the file; an empty variable
// there counts as unset. What a service manager tells one process is never taken
// from the file. A missing file is fine, one that can't be read is an error, and
// so is a mistake in a line of one of [variables]. Other programs may share the
// file: what concerns none of ours is passed over, with a warning on stderr.
func withDotenv(getenv func(string) string, path string, stderr io.Writer) (func(string) string, error) {
	data, err := readDotenv(path)
	if errors.Is(err, fs.ErrNotExist) {
		return getenv, nil
	}
	folder := errors.Is(err, syscall.EISDIR) // such as a virtual environment of Python
	if err != nil && !folder {
		return nil, err
	}
	values, skipped, err := parseDotenv(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if folder {
		skipped = []string{"expected a file, found a directory"}
	}
	merged := func(name string) string {
		if v := getenv(name); v != "" || slices.Contains(managerVariables, name) {
			return v
		}
		return values[name]
	}
	if len(skipped) > 0 {
		// Before the configuration is read: what was passed over may explain what it lacks.
		log := newLogger(config{logFormat: strings.ToLower(merged("LOG_FORMAT"))}, stderr)
		log.Warn("passed over what concerns no variable of rollcall", "file", path, "lines", strings.Join(skipped, "; "))
	}
	return merged, nil
}

func readDotenv(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() && !info.Mode().IsRegular() { // opening a pipe would wait for its writer, perhaps for ever
		return nil, fmt.Errorf("%s: expected a regular file", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxDotenv+1)) // the one byte more tells parseDotenv that it is too large
}

// blanks are what may surround names and values. A lone \r counts: it is what a
// careless conversion of line ends leaves.
const blanks = " \t\r"

var dotenvName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// maxSkipped bounds the warning about a file that is no .env at all.
const maxSkipped = 10

var errDotenvName = errors.New("expected NAME=value, where a name is letters, digits and _ and starts with no digit")

// parseDotenv reads the lines of a .env file:
//
//	# a comment, which may also follow a value and a space
//	NAME=value                  taken as it is, without the blanks around it
//	export NAME='as it is'      may span lines
//	NAME="one\ntwo"             may span lines; \n \r \t \" \\ \$ are escapes
//
// A $ stays a $: nothing is expanded. A backslash that begins no escape stays as
// it is, too. A name given twice is a mistake: whichever line won, someone would
// edit the other one and wonder. A mistake is an error where it concerns one of
// [variables], and is skipped otherwise: the first [maxSkipped] are returned. Both
// name the line and what belongs there, never what was found: it may be a secret.
func parseDotenv(data []byte) (values map[string]string, skipped []string, err error) {
	if len(data) > maxDotenv {
		return nil, nil, fmt.Errorf("expected at most %d bytes", maxDotenv)
	}
	if bytes.HasPrefix(data, []byte("\xff\xfe")) || bytes.HasPrefix(data, []byte("\xfe\xff")) {
		return nil, nil, errors.New("expected UTF-8 text, not UTF-16") // as some editors and shells on Windows write it
	}
	// Some editors on Windows begin a file with this mark.
	text := string(bytes.TrimPrefix(data, []byte("\ufeff")))
	text = strings.ReplaceAll(text, "\r\n", "\n")

	values, setOn := make(map[string]string), make(map[string]int)
	for line := 1; text != ""; {
		statement, rest, _ := strings.Cut(text, "\n")
		next := line + 1
		if s := strings.Trim(statement, blanks); s == "" || s[0] == '#' {
			text, line = rest, next
			continue
		}
		head, _, found := strings.Cut(statement, "=")
		name := strings.Trim(head, blanks)
		if n, ok := strings.CutPrefix(name, "export"); ok && strings.TrimLeft(n, blanks) != n {
			name = strings.TrimLeft(n, blanks)
		}
		value, at, mistake := "", line, errDotenvName
		if found {
			after := text[len(head)+1:] // all that follows the =, for the value may span lines
			var tail string
			value, tail, mistake = readValue(after)
			end := line + strings.Count(after[:len(after)-len(tail)], "\n")
			if mistake != nil {
				at = end // and only this line is passed over: it may be the quote that is the mistake
			} else {
				rest, next = tail, end
			}
		}
		switch taken := text[:len(text)-len(rest)]; {
		case mistake != nil:
		case !dotenvName.MatchString(name):
			mistake = errDotenvName
		case !utf8.ValidString(taken) || strings.Contains(taken, "\x00"):
			mistake = errors.New("expected UTF-8 text without NUL")
		case setOn[name] > 0:
			mistake = fmt.Errorf("expected another name, %s is set on line %d already", name, setOn[name])
		}
		switch {
		case mistake == nil:
			values[name], setOn[name] = value, line
		case concernsUs(name):
			return nil, nil, fmt.Errorf("line %d: %w", at, mistake)
		case len(skipped) < maxSkipped:
			skipped = append(skipped, fmt.Sprintf("line %d: %v", at, mistake))
		case len(skipped) == maxSkipped:
			skipped = append(skipped, "and more")
		}
		text, line = rest, next
	}
	return values, skipped, nil
}

// concernsUs reports whether name, or the first word of what stands in its place,
// is one of [variables].
func concernsUs(name string) bool {
	if i := strings.IndexAny(name, blanks+":"); i >= 0 {
		name = name[:i]
	}
	return slices.ContainsFunc(variables, func(v variable) bool { return v.name == name })
}

// readValue returns the value at the start of s and the lines after it, or an
// error and what follows the place at fault.
func readValue(s string) (value, rest string, err error) {
	switch body := strings.TrimLeft(s, blanks); {
	case strings.HasPrefix(body, "'"):
		var closed bool
		if value, rest, closed = strings.Cut(body[1:], "'"); !closed {
			return "", s, errors.New("expected a closing ' for the one that opens here")
		}
	case strings.HasPrefix(body, `"`):
		var closed bool
		if value, rest, closed = readEscaped(body[1:]); !closed {
			return "", s, errors.New(`expected a closing " for the one that opens here`)
		}
	default:
		line, rest, _ := strings.Cut(s, "\n")
		for i := 1; i < len(line); i++ {
			if line[i] == '#' && strings.IndexByte(blanks, line[i-1]) >= 0 {
				line = line[:i]
			}
		}
		return strings.Trim(line, blanks), rest, nil
	}
	tail, next, _ := strings.Cut(rest, "\n")
	if tail = strings.Trim(tail, blanks); tail != "" && tail[0] != '#' {
		return "", rest, errors.New("expected nothing but a comment after the closing quote")
	}
	return value, next, nil
}

// dotenvEscapes are the characters after a backslash between double quotes, and
// what they stand for.
var dotenvEscapes = map[byte]byte{'n': '\n', 'r': '\r', 't': '\t', '"': '"', '\\': '\\', '$': '$'}

// readEscaped reads up to the closing double quote, if there is one.
func readEscaped(s string) (value, rest string, closed bool) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '"':
			return b.String(), s[i+1:], true
		case c == '\\' && i+1 < len(s):
			i++
			if meant, ok := dotenvEscapes[s[i]]; ok {
				b.WriteByte(meant)
			} else {
				b.WriteString(s[i-1 : i+1])
			}
		default:
			b.WriteByte(c)
		}
	}
	return "", "", false
}
