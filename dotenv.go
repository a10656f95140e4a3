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
	"unicode/utf8"
)

// maxDotenv bounds the file: a .env is a page of text, and whatever is larger
// got its name by mistake.
const maxDotenv = 1 << 20

// withDotenv returns a getenv that falls back on the file at path. The
// environment wins, so that one run can differ from the file; an empty variable
// there counts as unset. What a service manager tells one process is never taken
// from the file. A missing file is fine, one that can't be used is an error.
func withDotenv(getenv func(string) string, path string) (func(string) string, error) {
	data, err := readDotenv(path)
	if errors.Is(err, fs.ErrNotExist) {
		return getenv, nil
	}
	if err != nil {
		return nil, err
	}
	values, err := parseDotenv(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return func(name string) string {
		if v := getenv(name); v != "" || slices.Contains(managerVariables, name) {
			return v
		}
		return values[name]
	}, nil
}

func readDotenv(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.IsDir() {
		return nil, fmt.Errorf("%s: expected a file, found a directory", path)
	}
	if !info.Mode().IsRegular() { // opening a pipe would wait for its writer, perhaps for ever
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

// parseDotenv reads the lines of a .env file:
//
//	# a comment, which may also follow a value and a space
//	NAME=value                  taken as it is, without the blanks around it
//	export NAME='as it is'      may span lines
//	NAME="one\ntwo"             may span lines; \n \r \t \" \\ \$ are escapes
//
// A $ stays a $: nothing is expanded. A name given twice is an error: whichever
// line won, someone would edit the other one and wonder. Errors name the line
// and what belongs there, never what was found: it may be a secret.
func parseDotenv(data []byte) (map[string]string, error) {
	if len(data) > maxDotenv {
		return nil, fmt.Errorf("expected at most %d bytes", maxDotenv)
	}
	// Some editors on Windows begin a file with this mark.
	text := string(bytes.TrimPrefix(data, []byte("\ufeff")))
	text = strings.ReplaceAll(text, "\r\n", "\n")
	line := 0
	for l := range strings.Lines(text) {
		line++
		if !utf8.ValidString(l) || strings.Contains(l, "\x00") {
			return nil, fmt.Errorf("line %d: expected UTF-8 text without NUL", line)
		}
	}

	values, setOn := make(map[string]string), make(map[string]int)
	line = 1
	for text != "" {
		statement, rest, _ := strings.Cut(text, "\n")
		if s := strings.Trim(statement, blanks); s == "" || s[0] == '#' {
			text = rest
			line++
			continue
		}
		name, _, found := strings.Cut(statement, "=")
		after := text[min(len(name)+1, len(text)):] // all that follows the =, for the value may span lines
		name = strings.Trim(name, blanks)
		if n, ok := strings.CutPrefix(name, "export"); ok && strings.TrimLeft(n, blanks) != n {
			name = strings.TrimLeft(n, blanks)
		}
		if !found || !dotenvName.MatchString(name) {
			return nil, fmt.Errorf("line %d: expected NAME=value, "+
				"where a name is letters, digits and _ and starts with no digit", line)
		}
		if setOn[name] > 0 {
			return nil, fmt.Errorf("line %d: expected another name, %s is set on line %d already",
				line, name, setOn[name])
		}
		value, rest, err := readValue(after)
		next := line + strings.Count(after[:len(after)-len(rest)], "\n")
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", next, err)
		}
		values[name], setOn[name] = value, line
		text, line = rest, next
	}
	return values, nil
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
		if value, rest, err = readEscaped(body[1:]); err == io.ErrUnexpectedEOF {
			return "", s, errors.New(`expected a closing " for the one that opens here`)
		} else if err != nil {
			return "", rest, err
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

// readEscaped reads up to the closing double quote. It returns
// io.ErrUnexpectedEOF when there is none.
func readEscaped(s string) (value, rest string, err error) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch c := s[i]; c {
		case '"':
			return b.String(), s[i+1:], nil
		case '\\':
			i++
			if i == len(s) {
				return "", "", io.ErrUnexpectedEOF
			}
			meant, ok := dotenvEscapes[s[i]]
			if !ok {
				return "", s[i:], errors.New(`expected \n, \r, \t, \", \\ or \$ where the backslash is`)
			}
			b.WriteByte(meant)
		default:
			b.WriteByte(c)
		}
	}
	return "", "", io.ErrUnexpectedEOF
}
