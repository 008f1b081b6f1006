package durable

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A child is this program again, killed at a step.
const childStep, childChange = "DURABLE_TEST_STEP", "DURABLE_TEST_CHANGE"

func TestMain(m *testing.M) {
	if os.Getenv(childStep) == "" {
		os.Exit(m.Run())
	}
	left, err := strconv.Atoi(os.Getenv(childStep))
	crossed = func() {
		if left--; left == 0 {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	if err == nil {
		err = changes[os.Getenv(childChange)](os.Args[1])
	}
	if err != nil {
		println(err.Error())
		os.Exit(1)
	}
	os.Exit(0)
}

const (
	before = "before"
	after  = "what comes after"
)

// changes turn the file "name" below a directory from before to after.
var changes = map[string]func(dir string) error{
	"replace": func(dir string) error { return Replace(filepath.Join(dir, "name"), Bytes([]byte(after), 0o640)) },
	"replace without syncing": func(dir string) error {
		return ReplaceVolatile(filepath.Join(dir, "name"), Bytes([]byte(after), 0o640))
	},
	"below a root": func(dir string) error {
		root, err := os.OpenRoot(dir)
		if err != nil {
			return err
		}
		d := NewDir(root)
		return errors.Join(d.Put("name", []byte(after)), d.Sync())
	},
	"create and rename": func(dir string) error {
		next := filepath.Join(dir, Unfinished+"next")
		if err := Create(next, 0o600, Bytes([]byte(after), 0o600)); err != nil {
			return err
		}
		return Rename(next, filepath.Join(dir, "name"))
	},
	"create and exchange": func(dir string) error {
		next := filepath.Join(dir, Unfinished+"next")
		if err := Create(next, 0o600, Bytes([]byte(after), 0o600)); err != nil {
			return err
		}
		return errors.Join(Exchange(next, filepath.Join(dir, "name")), SyncTree(dir))
	},
}

// Whenever a change is cut short, the file is the old or the new one, never the old after
// the new, and what is left besides has a name that says so.
func TestKilledAtEachStep(t *testing.T) {
	t.Parallel()
	for name := range changes {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			olds, news := 0, 0
			for step := 1; ; step++ {
				dir := t.TempDir()
				file := filepath.Join(dir, "name")
				if err := os.WriteFile(file, []byte(before), 0o644); err != nil {
					t.Fatal(err)
				}
				cmd := exec.Command(os.Args[0], dir)
				cmd.Env = append(os.Environ(), childStep+"="+strconv.Itoa(step), childChange+"="+name)
				out, err := cmd.CombinedOutput()
				var exit *exec.ExitError
				if killed := errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL; err != nil && !killed {
					t.Fatalf("step %d: %v\n%s", step, err, out)
				}
				got, readErr := os.ReadFile(file)
				switch {
				case readErr == nil && string(got) == before && news == 0:
					olds++
				case readErr == nil && string(got) == after:
					news++
				default:
					t.Fatalf("step %d leaves %q, error %v", step, got, readErr)
				}
				entries, _ := os.ReadDir(dir)
				for _, e := range entries {
					if e.Name() != "name" && !strings.HasPrefix(e.Name(), Unfinished) {
						t.Errorf("step %d leaves %s", step, e.Name())
					}
				}
				if err == nil {
					break
				}
			}
			if olds < 2 || news < 2 {
				t.Errorf("%d times the old one, %d times the new one", olds, news)
			}
		})
	}
}

func TestReplace(t *testing.T) {
	t.Parallel()
	failed := errors.New("no more")
	for _, c := range []struct {
		name    string
		there   func(name string) error // makes what is there before
		write   func(*os.File) error
		want    string
		mode    fs.FileMode
		wantErr error
	}{
		{name: "nothing is there", write: Bytes([]byte("x"), 0o640), want: "x", mode: 0o640},
		{
			name: "a file is there", write: Bytes([]byte("x"), 0o600), want: "x", mode: 0o600,
			there: func(name string) error { return os.WriteFile(name, []byte("old"), 0o644) },
		},
		{
			name: "a link is there", write: Bytes([]byte("x"), 0o600), want: "x", mode: 0o600,
			there: func(name string) error { return os.Symlink("elsewhere", name) },
		},
		{
			name: "it fails midway", want: "old", mode: 0o644, wantErr: failed,
			write: func(f *os.File) error {
				_, err := f.WriteString("half")
				return errors.Join(err, failed)
			},
			there: func(name string) error { return os.WriteFile(name, []byte("old"), 0o644) },
		},
	} {
		for _, replace := range []func(string, func(*os.File) error) error{Replace, ReplaceVolatile} {
			t.Run(c.name, func(t *testing.T) {
				dir := t.TempDir()
				name := filepath.Join(dir, "name")
				if c.there != nil {
					if err := c.there(name); err != nil {
						t.Fatal(err)
					}
				}
				if err := replace(name, c.write); !errors.Is(err, c.wantErr) {
					t.Errorf("error %v, want %v", err, c.wantErr)
				}
				got, err := os.ReadFile(name)
				if err != nil || string(got) != c.want {
					t.Errorf("got %q, error %v, want %q", got, err, c.want)
				}
				if info, err := os.Lstat(name); err != nil || info.Mode() != c.mode {
					t.Errorf("got %v, error %v, want mode %v", info, err, c.mode)
				}
				if entries, _ := os.ReadDir(dir); len(entries) != 1 {
					t.Errorf("left: %v", entries)
				}
			})
		}
	}
	if err := Replace(filepath.Join(t.TempDir(), "none", "name"), Bytes(nil, 0o600)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("in no directory: %v", err)
	}
}

func TestExchange(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	if err := errors.Join(os.Mkdir(a, 0o700), os.WriteFile(filepath.Join(a, "one"), nil, 0o600), os.Mkdir(b, 0o700)); err != nil {
		t.Fatal(err)
	}
	err := Exchange(a, b)
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skip(err)
	}
	_, moved := os.Stat(filepath.Join(b, "one"))
	if _, left := os.Stat(filepath.Join(a, "one")); err != nil || moved != nil || !errors.Is(left, fs.ErrNotExist) {
		t.Errorf("error %v, in b %v, in a %v", err, moved, left)
	}
	if err := Exchange(a, filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("with nothing: %v", err)
	}
}

func open(t *testing.T, name string) *os.File {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestLock(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	one, other := open(t, dir), open(t, dir)
	if err := TryLock(one); err != nil {
		t.Fatal(err)
	}
	if err := TryLock(other); !errors.Is(err, ErrLocked) {
		t.Errorf("a second lock: %v", err)
	}
	if err := TryShared(other); !errors.Is(err, ErrLocked) {
		t.Errorf("is it held? %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := Lock(ctx, other); !errors.Is(err, ErrLocked) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("waiting in vain: %v", err)
	}
	got := make(chan error, 1)
	go func() { got <- Lock(t.Context(), other) }()
	one.Close()
	if err := <-got; err != nil {
		t.Errorf("after the other has ended: %v", err)
	}
	other.Close()
	if err := TryLock(other); err == nil || errors.Is(err, ErrLocked) {
		t.Errorf("of a closed file: %v", err)
	}
	if err := errors.Join(TryShared(open(t, dir)), TryShared(open(t, dir))); err != nil {
		t.Errorf("two that ask: %v", err)
	}
}

func TestCreateLocked(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	beside, name := filepath.Join(dir, ".beside"), filepath.Join(dir, "name")
	f, err := CreateLocked(beside, name, os.O_WRONLY, []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if got, err := os.ReadFile(name); err != nil || string(got) != "x" {
		t.Errorf("%q, error %v", got, err)
	}
	if err := TryShared(open(t, name)); !errors.Is(err, ErrLocked) {
		t.Errorf("it is not locked: %v", err)
	}
	if f, err := CreateLocked(beside, filepath.Join(dir, "none", "name"), os.O_WRONLY, nil); err == nil || f != nil {
		t.Errorf("where it cannot be renamed: %v", err)
	}
	if _, err := os.Lstat(beside); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("left: %v", err)
	}
}

func TestDir(t *testing.T) {
	t.Parallel()
	root, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	d := NewDir(root)
	// What an earlier process left under the name of the first unfinished file.
	if err := root.WriteFile(Unfinished+"1", []byte("cut"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, raw := range []string{"one", "two"} {
		if err := errors.Join(d.Put("name", []byte(raw)), d.Put("in/name", []byte(raw)), d.Sync()); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"name", "in/name"} {
			if got, err := root.ReadFile(name); err != nil || string(got) != raw {
				t.Errorf("%s: %q, error %v, want %q", name, got, err, raw)
			}
		}
	}
	if len(d.renamed) > 0 {
		t.Errorf("not synced: %v", d.renamed)
	}
	if err := d.Put("none/in/name", nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("two levels at once: %v", err)
	}
	if err := root.Mkdir("taken", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := d.Put("taken", nil); err == nil {
		t.Error("a file replaced a directory")
	}
	if left, _ := fs.Glob(root.FS(), Unfinished+"*"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
