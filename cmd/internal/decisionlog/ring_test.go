package decisionlog

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/verify"
)

var start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// entry is a refused container of pod.
func entry(at time.Time, pod, image string) Entry {
	img := verify.Image{Asked: image, Pod: verify.Pod{Namespace: "default", Name: pod, UID: pod, Container: "app"}}
	return Entry{At: at, Kind: control.AnswerLine, Hook: "ValidateContainerAdjustment", Container: "c-" + pod, Mode: "enforce",
		Decision: verify.Deny(verify.SignatureMissing, "none at "+image).Report(img, "edge-1")}
}

func read(t *testing.T, r *Ring, after uint64) (list []control.Line) {
	t.Helper()
	if err := r.Read(after, func(l control.Line) bool { list = append(list, l); return true }); err != nil {
		t.Fatal(err)
	}
	return list
}

func pods(t *testing.T, lines []control.Line) (names []string) {
	t.Helper()
	for _, l := range lines {
		s, err := l.Said()
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, s.Pod.Name)
	}
	return names
}

// TestKept asks for what was written, by this run of the gate and by the one before.
func TestKept(t *testing.T) {
	dir := t.TempDir()
	r := Open(dir, quiet())
	for i, p := range []string{"a", "b", "c"} {
		r.Add(entry(start.Add(time.Duration(i)*time.Second), p, "app"))
	}
	lines := read(t, r, 0)
	if got := pods(t, lines); !slices.Equal(got, []string{"a", "b", "c"}) {
		t.Fatalf("read %q", got)
	}
	s, err := lines[1].Said()
	if l := lines[1]; err != nil || l.Container != "c-b" || !l.At.Equal(start.Add(time.Second)) || l.Mode != "enforce" ||
		s.Reason != "SIGNATURE_MISSING" || !s.Denied() || s.Allowed || s.Image != "app" || len(s.ID) != 12 {
		t.Errorf("%+v, %+v", l, s)
	}
	if got := pods(t, read(t, r, lines[0].Seq)); !slices.Equal(got, []string{"b", "c"}) {
		t.Errorf("after the first came %q", got)
	}
	if got := read(t, r, lines[2].Seq); got != nil {
		t.Errorf("after the last came %v", got)
	}
	r.Close()

	// The clock went back meanwhile: lines still come after those before.
	r = Open(dir, quiet())
	defer r.Close()
	r.Add(entry(start.Add(-time.Hour), "d", "app"))
	if got := pods(t, read(t, r, lines[2].Seq)); !slices.Equal(got, []string{"d"}) {
		t.Errorf("after a restart came %q", got)
	}
	for name, want := range map[string]os.FileMode{Dir: 0o700 | os.ModeDir, filepath.Join(Dir, newer): 0o600} {
		if i, err := os.Stat(filepath.Join(dir, name)); err != nil || i.Mode() != want {
			t.Errorf("%s: %v %v", name, i.Mode(), err)
		}
	}
}

// TestRepeats has the kubelet try again and again, over a restart of the gate too.
func TestRepeats(t *testing.T) {
	dir := t.TempDir()
	r := Open(dir, quiet())
	for i := range 10 {
		r.Add(entry(start.Add(time.Duration(i)*time.Second), "a", "app"))
	}
	r.Add(entry(start, "b", "app"))
	if got := pods(t, read(t, r, 0)); !slices.Equal(got, []string{"a", "b"}) {
		t.Fatalf("read %q", got)
	}
	r.Add(entry(start.Add(time.Minute), "a", "app"))
	lines := read(t, r, 0)
	if len(lines) != 3 || lines[2].Repeats != 9 || lines[0].Repeats != 0 {
		t.Errorf("%d lines, repeats %d", len(lines), lines[len(lines)-1].Repeats)
	}
	r.Close()
	r = Open(dir, quiet())
	defer r.Close()
	r.Add(entry(start.Add(90*time.Second), "a", "app")) // 30 seconds after its last line
	if got := read(t, r, lines[2].Seq); got != nil {
		t.Errorf("a restart made %v news", got)
	}
	other := entry(start.Add(91*time.Second), "a", "app")
	other.Decision.Revision = strings.Repeat("1", 32)
	r.Add(other)
	if got := read(t, r, lines[2].Seq); len(got) != 1 {
		t.Errorf("under another configuration came %v", got)
	}
	// A clock that was set back makes news of what is none, and loses nothing.
	r.Add(entry(start.Add(-time.Hour), "a", "app"))
	if got := read(t, r, lines[2].Seq); len(got) != 2 {
		t.Errorf("after the clock went back came %v", got)
	}

	v := entry(start, "", "app")
	v.Kind, v.Decision.Pod = control.VerificationLine, nil
	for i := range 3 {
		v.At = start.Add(time.Duration(i) * 30 * time.Minute)
		r.Add(v)
	}
	n := 0
	for _, l := range read(t, r, 0) {
		if l.Kind == control.VerificationLine {
			n++
		}
	}
	if n != 2 {
		t.Errorf("%d lines of verifications within an hour", n)
	}
}

// TestBounds writes more than there is room for, on a disk and in memory.
func TestBounds(t *testing.T) {
	for _, where := range []string{t.TempDir(), ""} {
		r := Open(where, quiet())
		limit, n := 2*maxFile, 3000
		if where == "" {
			limit = 2 * maxMemory
		}
		for i := range n {
			e := entry(start.Add(time.Duration(i)*time.Second), fmt.Sprint("pod-", i), strings.Repeat("x", 500))
			r.Add(e)
		}
		lines := read(t, r, 0)
		if got := pods(t, lines); got[len(got)-1] != fmt.Sprint("pod-", n-1) || len(got) < limit/8000 || len(got) == n {
			t.Errorf("%q: %d lines are left, the last is %s", where, len(got), got[len(got)-1])
		}
		for i, l := range lines[1:] {
			if l.Seq <= lines[i].Seq {
				t.Fatalf("%q: line %d goes back", where, i)
			}
		}
		if where != "" {
			total := int64(0)
			for _, name := range []string{older, newer} {
				i, err := os.Stat(filepath.Join(where, Dir, name))
				if err != nil {
					t.Fatal(err)
				}
				total += i.Size()
			}
			if total > int64(limit) {
				t.Errorf("%d bytes on the disk", total)
			}
		} else if m := len(r.memory[0]) + len(r.memory[1]); m > limit {
			t.Errorf("%d bytes in memory", m)
		}
		r.Close()
	}

	// A line that a registry made long loses what made it long.
	r := Open("", quiet())
	e := entry(start, "a", "app")
	for range 20 {
		e.Decision.Tried = append(e.Decision.Tried, verify.Attempt{Source: strings.Repeat("s", 640), Detail: strings.Repeat("d", 640)})
	}
	e.Decision.Metadata = map[string]string{"k": strings.Repeat("v", maxLine)}
	r.Add(e)
	long := entry(start, strings.Repeat("p", maxLine), "app") // so long a name of a pod as there is none
	long.Container = "c"
	r.Add(long)
	e.Container = strings.Repeat("c", maxLine)
	e.Decision.ID = "other"
	r.Add(e) // not kept: it would hide what comes after
	if lines := read(t, r, 0); len(lines) != 2 || lines[1].Kind != control.AnswerLine || strings.Contains(string(lines[1].Decision), "ppp") || len(lines[0].Decision) > maxLine {
		t.Errorf("%d lines", len(lines))
	}
}

// TestBroken finds what a crash, a full disk or somebody else left.
func TestBroken(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, Dir, newer)
	r := Open(dir, quiet())
	r.Add(entry(start, "a", "app"))
	r.Close()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	raw = append(raw, []byte("junk\n{\"seq\":99999999999999999,\"decision\":\n[]\n"+string(raw[:len(raw)/2]))...)
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	r = Open(dir, quiet())
	r.Add(entry(start.Add(time.Second), "b", "app"))
	if got := pods(t, read(t, r, 0)); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("read %q", got)
	}
	r.Close()

	// What is no file, and no directory, is not used, and that is said.
	for _, spoil := range []func(string) error{
		func(d string) error { return os.WriteFile(filepath.Join(d, Dir), nil, 0o600) },
		func(d string) error { return os.MkdirAll(filepath.Join(d, Dir, newer), 0o700) },
		func(d string) error {
			if err := os.Mkdir(filepath.Join(d, Dir), 0o700); err != nil {
				return err
			}
			return os.Symlink("/dev/null", filepath.Join(d, Dir, newer))
		},
	} {
		dir := t.TempDir()
		if err := spoil(dir); err != nil {
			t.Fatal(err)
		}
		var log bytes.Buffer
		r := Open(dir, slog.New(slog.NewTextHandler(&log, nil)))
		r.Add(entry(start, "a", "app"))
		if got := pods(t, read(t, r, 0)); !slices.Equal(got, []string{"a"}) {
			t.Errorf("read %q", got)
		}
		if !strings.Contains(log.String(), "in memory only") {
			t.Errorf("logged %q", log.String())
		}
		r.Close()
	}
}

// TestTwo has two gates write to one directory, as during an upgrade: no line is cut,
// and both see what the other writes.
func TestTwo(t *testing.T) {
	dir := t.TempDir()
	one, two := Open(dir, quiet()), Open(dir, quiet())
	var wg sync.WaitGroup
	const n = 2000
	for k, r := range []*Ring{one, two} {
		wg.Go(func() {
			for i := range n {
				r.Add(entry(start.Add(time.Duration(i)*time.Second), fmt.Sprint(k, "-", i), strings.Repeat("x", 300)))
			}
		})
	}
	wg.Wait()
	for _, r := range []*Ring{one, two} {
		raw := 0
		for _, name := range []string{older, newer} {
			b, err := os.ReadFile(filepath.Join(dir, Dir, name))
			if err != nil {
				t.Fatal(err)
			}
			for line := range bytes.Lines(b) {
				if string(line) == "\n" {
					continue // open took the other's half-seen line for one that a crash cut, and ended it
				}
				raw++
				if !bytes.HasPrefix(line, []byte(`{"seq":`)) || !bytes.HasSuffix(line, []byte("}}\n")) {
					t.Fatalf("a cut line: %s", line)
				}
			}
		}
		if got := len(read(t, r, 0)); got == 0 || got > raw {
			t.Errorf("%d of %d lines are seen", got, raw)
		}
		r.Close()
	}
}
