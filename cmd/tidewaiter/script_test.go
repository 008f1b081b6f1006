package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/tidewaiter/tidewaiter/cmd/internal/cli"
	"github.com/tidewaiter/tidewaiter/cmd/internal/imagetest"
	"github.com/tidewaiter/tidewaiter/verify"
)

// TestMain lets scripts start this binary as tidewaiter.
func TestMain(m *testing.M) { testscript.Main(m, map[string]func(){"tidewaiter": main}) }

// TestScripts runs testdata/*.txtar. Beside the commands of testscript they have
//
//	exits STATUS PROGRAM ARGS...   runs tidewaiter and checks the status and the form of all it prints
//	report PATH=VALUE...           checks fields of the JSON on standard output; PATH~REGEXP too
//	fixture config|layout|mirror   makes what a script works on, see fixture_test.go
//	eventually FILE REGEXP         waits until a line of the file matches
//	listens SOCKET                 waits until somebody listens there
//	signal HUP|INT|TERM            sends it to what runs in the background
//	within DURATION                wants the last exits, or what came after the last signal, to be that fast
//	jsonlines FILE                 wants a JSON object of the log on each line
//
// and for each image of fixture_test.go a variable with its digest: $signed,
// $unsigned and so on, and $huge is a long word. Times are those of the machine.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(env *testscript.Env) error {
			for name, img := range imagetest.World().Images {
				env.Setenv(name, img.Target.Digest.String())
			}
			env.Setenv("GORACE", "atexit_sleep_ms=0")                         // with -race every process would end a second late
			env.Setenv("TIDEWAITER_RUN_DIR", filepath.Join(env.WorkDir, "r")) // not the machine's
			env.Setenv("TIDEWAITER_STATE_DIR", filepath.Join(env.WorkDir, "state"))
			env.Setenv("huge", strings.Repeat("a", 100_000))
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits": exits, "report": report, "fixture": fixture, "eventually": eventually, "listens": listens, "signal": sendSignal, "within": within, "jsonlines": jsonLines,
		},
		RequireExplicitExec: true,
	})
}

func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits STATUS PROGRAM ARGS...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	begin(ts)
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			ts.Fatalf("%v", err)
		}
		got = exit.ExitCode()
	}
	if got != want {
		ts.Fatalf("exit status %d, want %d", got, want)
	}
	stdout, stderr := ts.ReadFile("stdout"), ts.ReadFile("stderr")
	if stdout != "" && stderr != "" {
		ts.Fatalf("both an answer and a complaint")
	}
	if stdout == "" && stderr == "" {
		ts.Fatalf("neither an answer nor a complaint")
	}
	if stderr != "" {
		if want != cli.ExitInconclusive {
			ts.Fatalf("a complaint with status %d", want)
		}
		for i, line := range strings.Split(strings.TrimSuffix(stderr, "\n"), "\n") {
			if problem := complaint(line, i); problem != "" {
				ts.Fatalf("%q %s", line, problem)
			}
		}
	}
}

// complaint says what is wrong with the form of line i on standard error.
func complaint(line string, i int) string {
	text, is := strings.CutPrefix(line, []string{"tidewaiter: ", "hint: "}[min(i, 1)])
	switch {
	case i > 1:
		return "is a third line"
	case !is || text == "":
		return "is not a message, or a hint after it"
	case unicode.IsUpper([]rune(text)[0]):
		return "starts with a capital letter"
	case strings.HasSuffix(text, ".") && !strings.HasSuffix(text, "..."):
		return "ends with a period"
	case len(line) > 1000:
		return "is too long"
	}
	return ""
}

func report(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: report PATH=VALUE|PATH~REGEXP...")
	}
	dec := json.NewDecoder(strings.NewReader(ts.ReadFile("stdout")))
	var doc map[string]any
	ts.Check(dec.Decode(&doc))
	if _, err := dec.Token(); err != io.EOF {
		ts.Fatalf("standard output holds more than one document")
	}
	for _, always := range []string{
		"schema=" + verify.Schema, "id~^[0-9a-f]{12}$", `message~^tidewaiter: (allowed|denied) \[`, "revision~^[0-9a-f]{32}$",
		"decidedAt~^20[0-9T:.-]+Z$", "allowed~^(true|false)$", "reason~^[A-Z_]+$", "image~.", "binding~.", "attempts~^\\[", "signers~^\\[",
	} {
		field(ts, doc, always)
	}
	if (doc["reason"] == "VERIFIED") != (doc["allowed"] == true) {
		ts.Fatalf("allowed is %v and the reason %v", doc["allowed"], doc["reason"])
	}
	for _, a := range args {
		field(ts, doc, a)
	}
}

// field checks one field, such as "attempts.0.reason=VERIFIED". What is not there is
// the empty text.
func field(ts *testscript.TestScript, doc any, want string) {
	i := strings.IndexAny(want, "=~")
	if i < 0 {
		ts.Fatalf("%q is neither PATH=VALUE nor PATH~REGEXP", want)
	}
	v := doc
	for key := range strings.SplitSeq(want[:i], ".") {
		switch at := v.(type) {
		case map[string]any:
			v = at[key]
		case []any:
			n, err := strconv.Atoi(key)
			if err != nil || n >= len(at) {
				ts.Fatalf("%s: there are %d", want, len(at))
			}
			v = at[n]
		default:
			v = nil
		}
	}
	got := ""
	if v != nil {
		got = fmt.Sprint(v)
	}
	if want[i] == '=' && got != want[i+1:] || want[i] == '~' && !regexp.MustCompile(want[i+1:]).MatchString(got) {
		ts.Fatalf("want %s, got %q", want, got)
	}
}

func eventually(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: eventually FILE REGEXP")
	}
	want := regexp.MustCompile("(?m)" + args[1])
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		raw, err := os.ReadFile(ts.MkAbs(args[0]))
		if err == nil && want.Match(raw) {
			return
		}
		if time.Now().After(end) {
			ts.Fatalf("no line matches %s in\n%s", args[1], raw)
		}
	}
}

func listens(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: listens SOCKET")
	}
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		c, err := net.Dial("unix", ts.MkAbs(args[0]))
		if err == nil {
			ts.Check(c.Close())
			return
		}
		if time.Now().After(end) {
			ts.Fatalf("nobody listens: %v", err)
		}
	}
}

func sendSignal(ts *testscript.TestScript, neg bool, args []string) {
	signals := map[string]syscall.Signal{"HUP": syscall.SIGHUP, "INT": syscall.SIGINT, "TERM": syscall.SIGTERM}
	if neg || len(args) != 1 || signals[args[0]] == 0 || len(ts.BackgroundCmds()) == 0 {
		ts.Fatalf("usage: signal HUP|INT|TERM, with something in the background")
	}
	begin(ts)
	for _, c := range ts.BackgroundCmds() {
		ts.Check(c.Process.Signal(signals[args[0]]))
	}
}

// begin is what within measures from.
func begin(ts *testscript.TestScript) { ts.Setenv("began", time.Now().Format(time.RFC3339Nano)) }

func within(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: within DURATION")
	}
	limit, err := time.ParseDuration(args[0])
	ts.Check(err)
	began, err := time.Parse(time.RFC3339Nano, ts.Getenv("began"))
	ts.Check(err)
	if took := time.Since(began); took > limit {
		ts.Fatalf("took %v", took)
	}
}

func jsonLines(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: jsonlines FILE")
	}
	text := []byte(ts.ReadFile(args[0]))
	if len(text) == 0 {
		ts.Fatalf("%s is empty", args[0])
	}
	for line := range bytes.Lines(text) {
		var entry struct {
			Time  time.Time `json:"time"`
			Level string    `json:"level"`
			Msg   string    `json:"msg"`
		}
		if err := json.Unmarshal(line, &entry); err != nil || entry.Time.IsZero() || entry.Level == "" || entry.Msg == "" {
			ts.Fatalf("%s is no line of the log: %v", line, err)
		}
	}
}
