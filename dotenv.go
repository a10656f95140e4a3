package main

import (
	"cmp"
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

// dotenvFile is read by serving and by "rollcall token", and by no other command. The tests change it.
var dotenvFile = ".env"

// withDotenv returns a getenv that falls back on the file at path, which may be missing. The environment wins, so that one
// run can differ from the file. Lines that are no settings are an error where they name one of our variables; the others,
// which other programs may have put there, are passed over with a warning on stderr.
func withDotenv(getenv func(string) string, path string, stderr io.Writer) (func(string) string, error) {
	values, skipped, err := readDotenv(path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	for _, name := range managerVariables {
		delete(values, name)
	}
	for _, name := range secrets { // in either form: one in the environment and the other in the file would be a mistake
		if isSet(getenv, name) {
			delete(values, name)
			delete(values, name+"_FILE")
		}
	}
	merged := func(name string) string { return cmp.Or(getenv(name), values[name]) }
	if len(skipped) > 0 {
		// Before the configuration is read: what was passed over may explain what it lacks. Ten lines are enough to do so.
		lines := strings.Join(skipped[:min(len(skipped), 10)], "; ")
		log := newLogger(config{logFormat: strings.ToLower(merged("LOG_FORMAT"))}, stderr)
		log.Warn("passed over what concerns no variable of rollcall", "file", path, "lines", lines)
	}
	return merged, nil
}

func readDotenv(path string) (values map[string]string, skipped []string, err error) {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil, nil
	case err != nil:
		return nil, nil, err
	case info.IsDir(): // such as a virtual environment of Python
		return nil, []string{"expected a file, found a directory"}, nil
	}
	data, err := readSmallFile(path)
	if err != nil {
		return nil, nil, err
	}
	return parseDotenv(data)
}

// parseDotenv reads the lines of a .env file:
//
//	# a comment, which may also follow a value and a space
//	NAME=value                  taken as it is, without the blanks around it
//	export NAME='as it is'      may span lines
//	NAME="one\ntwo"             may span lines; \n \r \t \" \\ \$ are escapes
//
// Nothing is expanded: a $ stays a $. A name given twice is a mistake: whichever line won, someone would edit the other one
// and wonder. A mistake is an error in a line of one of our variables, and skipped in others. Both name the line and what
// belongs there, never what was found: it may be a secret.
func parseDotenv(data []byte) (values map[string]string, skipped []string, err error) {
	text := strings.ReplaceAll(string(data), "\r\n", "\n")
	if strings.HasPrefix(text, "\xff\xfe") || strings.HasPrefix(text, "\xfe\xff") {
		return nil, nil, errors.New("expected UTF-8 text, not UTF-16") // as some editors and shells on Windows write it
	}
	text = strings.TrimPrefix(text, "\ufeff") // a mark of such editors, too
	values = make(map[string]string)
	variables := new(config).variables()
	for line := 1; text != ""; {
		name, value, rest, mistake := readStatement(strings.TrimLeft(text, blanks))
		if _, taken := values[name]; taken && mistake == "" {
			mistake = "expected another name, " + name + " is set above already"
		}
		switch isOurs := slices.ContainsFunc(variables, func(v variable) bool { return v.name == name }); {
		case mistake != "" && isOurs:
			return nil, nil, fmt.Errorf("line %d: %s", line, mistake)
		case mistake != "":
			skipped = append(skipped, fmt.Sprintf("line %d: %s", line, mistake))
		case name != "":
			values[name] = value
		}
		line += strings.Count(text[:len(text)-len(rest)], "\n")
		text = rest
	}
	return values, skipped, nil
}

// blanks are what may surround names and values. A lone \r counts: it is what a careless conversion of line ends leaves.
const blanks = " \t\r"

var (
	// dotenvName matches the name at the start of a line, and the = behind it, if there is one; else nothing.
	dotenvName = regexp.MustCompile(`^(?:(?:export[ \t\r]+)?([A-Za-z_]\w*)(?:[ \t\r]*(=)|[ \t\r:]|$))?`)
	// dotenvQuoted matches a value in quotes, which may span lines, and the rest of its last line.
	dotenvQuoted  = regexp.MustCompile(`^[ \t\r]*(?:'([^']*)'|"((?:[^"\\]|\\(?s:.))*)")[ \t\r]*(?:#.*)?(?:\n|$)`)
	dotenvEscapes = strings.NewReplacer(`\n`, "\n", `\r`, "\r", `\t`, "\t", `\"`, `"`, `\\`, `\`, `\$`, "$")
	dotenvComment = regexp.MustCompile(`[ \t\r]#.*`)
)

// readStatement returns the name and the value at the start of text, no name for a comment, and the rest of text. Behind
// a quote that is not closed, this is the next line: the quote may be the mistake.
func readStatement(text string) (name, value, rest, mistake string) {
	line, rest, _ := strings.Cut(text, "\n")
	if line == "" || line[0] == '#' {
		return "", "", rest, ""
	}
	m := dotenvName.FindStringSubmatch(line)
	_, tail, _ := strings.Cut(line, "=")
	value = strings.Trim(dotenvComment.ReplaceAllString(tail, ""), blanks)
	closed := !strings.HasPrefix(value, "'") && !strings.HasPrefix(value, `"`)
	after := text[len(line)-len(tail):]
	if q := dotenvQuoted.FindStringSubmatch(after); q != nil {
		value, rest, closed = q[1]+dotenvEscapes.Replace(q[2]), after[len(q[0]):], true
	}
	if m[2] == "" || !closed || !utf8.ValidString(value) || strings.Contains(value, "\x00") {
		return m[1], "", rest, `expected NAME=value, NAME='value' or NAME="value", in UTF-8, and nothing but a comment behind it`
	}
	return m[1], value, rest, ""
}

var lineBreak = regexp.MustCompile(`\r?\n\z`)

// fromFile returns a function that takes the path of a file for what the file holds, without one line break at its end:
// editors and echo leave one there.
func fromFile(set func(value string) error) func(path string) error {
	return func(path string) error {
		data, err := readSmallFile(path)
		if err != nil {
			return fmt.Errorf("can't be read: %w", err)
		}
		value := lineBreak.ReplaceAllString(string(data), "")
		if value == "" {
			return errors.New("is an empty file")
		}
		if err := set(value); err != nil {
			return fmt.Errorf("is a file with a bad value: %w", err)
		}
		return nil
	}
}

const maxSmallFile = 1 << 20 // bytes: a page of text has less, and what is larger got its name by mistake

// readSmallFile reads a regular file of at most maxSmallFile bytes. Opening a pipe would wait for its writer, perhaps for
// ever.
func readSmallFile(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err == nil && (!info.Mode().IsRegular() || info.Size() > maxSmallFile) {
		err = fmt.Errorf("expected a regular file of at most %d bytes", maxSmallFile)
	}
	if err != nil {
		return nil, err
	}
	return os.ReadFile(path)
}
