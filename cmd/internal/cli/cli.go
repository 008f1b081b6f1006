// Package cli is what the verbs have in common: how they end, what they print and the
// flags that several of them have. A verb's answer goes to standard output; everything
// else goes to standard error in the form of Report.
package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"
)

// Exit statuses of every verb.
const (
	ExitYes          = 0 // yes, or healthy
	ExitNo           = 1 // denied, or unhealthy
	ExitInconclusive = 2 // it could not be found out
)

// A Failure ends the program with a status, and with a message and a hint if they are
// set.
type Failure struct {
	Status int
	Err    error // nil: everything was said
	Hint   string
}

func (f *Failure) Error() string {
	if f.Err == nil {
		return fmt.Sprintf("exit status %d", f.Status)
	}
	return f.Err.Error()
}

func (f *Failure) Unwrap() error { return f.Err }

// Inconclusive is the failure to find out.
func Inconclusive(err error, hint string) error {
	if errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0 {
		hint = "run it as root"
	}
	return &Failure{ExitInconclusive, err, hint}
}

// Exit ends the program with status and without a message; nil for ExitYes.
func Exit(status int) error {
	if status == ExitYes {
		return nil
	}
	return &Failure{Status: status}
}

// Written is the failure to write an answer; nil if err is nil.
func Written(err error) error {
	if err != nil {
		return Inconclusive(fmt.Errorf("write the answer: %w", err), "")
	}
	return nil
}

// Report writes the message and hint of err, which a verb returned, to stderr, and
// returns the exit status.
func Report(stderr io.Writer, err error) int {
	if err == nil {
		return ExitYes
	}
	f := &Failure{ExitInconclusive, err, "run tidewaiter --help"}
	errors.As(err, &f)
	if f.Err != nil {
		fmt.Fprintf(stderr, "tidewaiter: %v\n", f.Err)
		if f.Hint != "" {
			fmt.Fprintf(stderr, "hint: %s\n", f.Hint)
		}
	}
	return f.Status
}

// JSON writes v on one line, with < and > as they are.
func JSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// Count is n of thing: "1 image", "2 images".
func Count(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

// Date is the day of t, in UTC.
func Date(t time.Time) string { return t.UTC().Format("2006-01-02") }

// List is a list in a sentence, or otherwise where it is empty.
func List(list []string, otherwise string) string {
	if len(list) == 0 {
		return otherwise
	}
	return strings.Join(list, ", ")
}
