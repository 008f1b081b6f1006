package reconcile

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// A gate is Gated that runs, as of one process.
type gate struct {
	*Gated
	end func()
}

func newGate(t *testing.T, dir string, uptime *time.Duration) *gate {
	w := NewGated(dir, slog.New(slog.DiscardHandler), func() time.Duration { return *uptime })
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { w.Run(ctx) })
	g := &gate{w, sync.OnceFunc(func() { cancel(); wg.Wait() })}
	t.Cleanup(g.end)
	return g
}

// files are what lies in dir.
func files(t *testing.T, dir string) (list []string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(dir, gatedDir))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		list = append(list, filepath.Join(dir, gatedDir, e.Name()))
	}
	return list
}

func all(ids ...int) map[string]bool {
	m := map[string]bool{}
	for _, n := range ids {
		m[cid(n)] = true
	}
	return m
}

func (g *gate) want(t *testing.T, what string, has, hasNot int) {
	t.Helper()
	if !g.Has(cid(has)) || g.Has(cid(hasNot)) {
		t.Errorf("%s: has %d: %v, %d: %v", what, has, g.Has(cid(has)), hasNot, g.Has(cid(hasNot)))
	}
}

// What one process saw the next one knows, also while both run.
func TestGatedOutlivesProcesses(t *testing.T) {
	dir, uptime := t.TempDir(), time.Duration(0)
	a := newGate(t, dir, &uptime)
	a.Saw(cid(1))
	a.Saw(cid(1))
	a.Saw("not an ID of CRI")
	a.end()
	a.want(t, "itself", 1, 2)

	b := newGate(t, dir, &uptime)
	b.want(t, "the next one", 1, 2)
	c := newGate(t, dir, &uptime) // an upgrade: both run
	c.want(t, "a third", 1, 2)
	b.Saw(cid(2))
	for end := time.Now().Add(time.Minute); !c.Has(cid(2)); time.Sleep(time.Millisecond) {
		if c.settle(); time.Now().After(end) {
			t.Fatal("what another instance sees is not known here")
		}
	}
	c.Saw(cid(3))
	b.end()
	c.settle()
	c.end()
	if l := files(t, dir); len(l) != 1 {
		t.Errorf("three processes leave %q", l)
	}
	d := newGate(t, dir, &uptime)
	for n := 1; n <= 3; n++ {
		d.want(t, "the last one", n, 4)
	}
}

// While one process makes its file, others read: none takes it for an ended one's.
func TestGatedIsNotRemovedUnderItsOwner(t *testing.T) {
	dir, uptime := t.TempDir(), time.Duration(0)
	a := newGate(t, dir, &uptime)
	a.Saw(cid(1))
	b := newGate(t, dir, &uptime)
	for n := range 300 {
		f, path, err := a.create([]byte(cid(n) + "\n"))
		if err != nil {
			t.Fatal(err)
		}
		b.settle()
		if _, err := os.Lstat(path); err != nil || !b.Has(cid(n)) {
			t.Fatalf("%v, and what it holds is known: %t", err, b.Has(cid(n)))
		}
		f.Close()
		os.Remove(path)
	}
	// One that is being made is neither read nor removed.
	half := filepath.Join(dir, gatedDir, ".1-half")
	if err := os.WriteFile(half, []byte(cid(999)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	b.settle()
	if _, err := os.Lstat(half); err != nil || b.Has(cid(999)) {
		t.Errorf("a file that is being made: %v, read: %t", err, b.Has(cid(999)))
	}
}

// What does not run any more is forgotten, in memory and in the file; what was not
// started yet is not.
func TestGatedForgets(t *testing.T) {
	dir, uptime := t.TempDir(), time.Duration(0)
	a := newGate(t, dir, &uptime)
	for n := range 4 {
		a.Saw(cid(n))
	}
	a.compact(all(1, 2))
	a.want(t, "created and not started", 0, 9)
	a.compact(all(2))
	a.want(t, "one ended", 2, 1)
	a.want(t, "created and not started", 3, 1)
	uptime = forgetAfter + 1
	a.compact(all(2))
	a.want(t, "never started", 2, 3)
	a.end()
	l := files(t, dir)
	if len(l) != 1 {
		t.Fatalf("files %q", l)
	}
	if raw, err := os.ReadFile(l[0]); err != nil || string(raw) != cid(2)+"\n" {
		t.Errorf("the file holds %q, %v", raw, err)
	}
}

// Neither memory nor the file grows without end, and what runs goes last.
func TestGatedIsBounded(t *testing.T) {
	dir, uptime := t.TempDir(), time.Duration(0)
	a := newGate(t, dir, &uptime)
	a.Saw(cid(0))
	a.compact(all(0))
	for n := range 5 * maxGated {
		a.Saw(cid(n + 1))
		if n%(maxGated/2) == 0 {
			a.compact(all(0))
		}
	}
	a.end()
	a.want(t, "what runs", 0, 1)
	l := files(t, dir)
	if len(l) != 1 || a.seen.Len() > maxGated {
		t.Fatalf("files %q, %d in memory", l, a.seen.Len())
	}
	if s, err := os.Stat(l[0]); err != nil || s.Size() > int64(maxLines*lineLen) {
		t.Errorf("the file has %d bytes, %v", s.Size(), err)
	}
}

// Junk is not read, what cannot be read is left alone, and without a directory
// memory is enough.
func TestGatedWithBrokenFiles(t *testing.T) {
	dir, uptime := t.TempDir(), time.Duration(0)
	if err := os.MkdirAll(filepath.Join(dir, gatedDir, "directory"), 0o700); err != nil {
		t.Fatal(err)
	}
	put := func(name, content string) {
		if err := os.WriteFile(filepath.Join(dir, gatedDir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	put("a", "junk\n"+cid(1)+"\n"+cid(2)[:40])
	put("b", strings.Repeat("x", 10*maxLines*lineLen))
	a := newGate(t, dir, &uptime)
	a.want(t, "beside junk", 1, 2)
	a.Saw(cid(5))
	a.end()
	if b := newGate(t, dir, &uptime); !b.Has(cid(5)) || !b.Has(cid(1)) {
		t.Error("what stood beside junk is lost")
	}

	none := newGate(t, "", &uptime)
	none.Saw(cid(1))
	none.settle()
	none.compact(all(1))
	none.want(t, "in memory", 1, 2)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	stuck := newGate(t, file, &uptime)
	stuck.Saw(cid(1))
	stuck.compact(all(1))
	stuck.want(t, "without a place for files", 1, 2)
}

func TestLock(t *testing.T) {
	dir := t.TempDir()
	a, b := NewLock(dir), NewLock(dir)
	if !a.Held() || b.Held() {
		t.Error("two hold one lock, or nobody does")
	}
	if !a.Held() {
		t.Error("a lock that is held is not held when asked again")
	}
	a.Release()
	if !b.Held() || a.Held() {
		t.Error("a lock that was given up is not to be had")
	}
	b.Release()
	if NewLock(filepath.Join(dir, "none")).Held() {
		t.Error("a lock without a file is held")
	}
}
