package stage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

// A child is this program again, killed at a step.
const childStep, childWork = "STAGE_TEST_STEP", "STAGE_TEST_WORK"

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
		err = works[os.Getenv(childWork)](os.Args[1], os.Args[2])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// works are what a child does.
var works = map[string]func(from, to string) error{
	"trust": func(from, to string) error {
		files, err := config.Trust(from)
		if err != nil {
			return err
		}
		s, err := Trust(to, files)
		if err != nil {
			return err
		}
		if _, err = s.Load(); err == nil {
			_, err = s.Swap(time.Unix(1e9, 0))
		}
		return err
	},
}

// killed runs the work in a child that is killed at the step, and reports whether it
// came so far.
func killed(t *testing.T, step int, work, from, to string) bool {
	t.Helper()
	cmd := exec.Command(os.Args[0], from, to)
	cmd.Env = append(os.Environ(), childStep+"="+strconv.Itoa(step), childWork+"="+work)
	out, err := cmd.CombinedOutput()
	if err == nil {
		return false
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("step %d: %v\n%s", step, err, out)
	}
	return true
}

func trustConfig(t *testing.T, dir, identity string) verify.Revision {
	t.Helper()
	ca := notarytest.NewCA(notarytest.CAOptions{})
	if err := notarytest.WriteConfig(dir, notarytest.Stores{"ca/acme/root.crt": ca.PEM()}, notarytest.Statement("prod", identity)); err != nil {
		t.Fatal(err)
	}
	c, err := config.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	return c.Revision
}

// Trust is put in force: whenever it ends, the configuration is the old one or the new
// one, valid and whole.
func TestTrustIsKilledAtEachStep(t *testing.T) {
	t.Parallel()
	from := t.TempDir()
	trustConfig(t, from, "x509.subject: C=US, ST=WA, O=new")
	for name, there := range map[string]bool{"over another": true, "on a new node": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var seen []verify.Revision
			var before verify.Revision
			for step := 1; ; step++ {
				dir := filepath.Join(t.TempDir(), "etc")
				if there {
					if before = trustConfig(t, dir, "x509.subject: C=US, ST=WA, O=old"); before == (verify.Revision{}) {
						t.Fatal("no revision")
					}
					if err := os.WriteFile(filepath.Join(dir, "credentials.json"), []byte("{}"), 0o600); err != nil {
						t.Fatal(err)
					}
				}
				done := !killed(t, step, "trust", from, dir)
				c, err := config.Load(dir)
				var revision verify.Revision
				switch {
				case err == nil:
					revision = c.Revision
				case there || !errors.Is(err, config.ErrNone):
					t.Fatalf("step %d: %v", step, err)
				}
				if revision == before {
					revision = verify.Revision{}
				}
				seen = append(seen, revision)
				if there {
					if info, err := os.Stat(filepath.Join(dir, "credentials.json")); err != nil || info.Mode().Perm() != 0o600 {
						t.Errorf("step %d: %v, error %v", step, info, err)
					}
				}
				if done {
					if revision == (verify.Revision{}) {
						t.Error("it ended and the old one is there")
					}
					backups, _ := filepath.Glob(dir + ".before-20010909T014640Z")
					if there != (len(backups) == 1) {
						t.Errorf("backups %q", backups)
					}
					break
				}
			}
			for i, e := range seen {
				if e != (verify.Revision{}) && e != seen[len(seen)-1] || i > 0 && seen[i-1] != (verify.Revision{}) && e != seen[i-1] {
					t.Errorf("step %d: neither the old nor the new one, or the old after the new", i+1)
				}
			}
			if len(seen) < 3 || seen[0] != (verify.Revision{}) {
				t.Errorf("%d steps", len(seen))
			}
		})
	}
}

// Who watches the configuration notices that all of it is another one.
func TestWatchersNoticeTrust(t *testing.T) {
	t.Parallel()
	from, dir := t.TempDir(), filepath.Join(t.TempDir(), "etc")
	trustConfig(t, from, "x509.subject: C=US, ST=WA, O=new")
	trustConfig(t, dir, "x509.subject: C=US, ST=WA, O=old")
	current, err := config.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	files, err := config.Trust(from)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	seen, ended := make(chan verify.Revision, 10), make(chan error)
	hup := make(chan os.Signal)
	go func() {
		ended <- config.Watch(ctx, dir, current, hup, func(c *config.Config, err error) {
			if err != nil {
				t.Errorf("invalid meanwhile: %v", err)
				return
			}
			seen <- c.Revision
		})
	}()
	defer func() {
		cancel()
		<-ended
	}()
	hup <- syscall.SIGHUP // taken once it watches
	for range 2 {
		s, err := Trust(dir, files)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Swap(time.Unix(1e9, 0)); err != nil {
			t.Fatal(err)
		}
		now, err := config.Load(dir)
		if err != nil {
			t.Fatal(err)
		}
		select {
		case revision := <-seen:
			if revision != now.Revision {
				t.Error("another configuration was noticed")
			}
		case <-time.After(50 * time.Second): // it looks each minute by itself
			t.Fatal("nothing was noticed")
		}
		// And once more, with what was before.
		if files, err = config.Trust(dir + ".before-20010909T014640Z"); err != nil {
			t.Fatal(err)
		}
	}
}

// Everything of a configuration directory comes along, as it was.
func TestStageKeeps(t *testing.T) {
	t.Parallel()
	from, dir := t.TempDir(), filepath.Join(t.TempDir(), "etc")
	trustConfig(t, from, "x509.subject: C=US, ST=WA, O=new")
	trustConfig(t, dir, "x509.subject: C=US, ST=WA, O=old")
	if err := errors.Join(
		os.WriteFile(filepath.Join(dir, "secret"), []byte("s"), 0o600),
		os.Symlink("secret", filepath.Join(dir, "link")),
		os.Mkdir(filepath.Join(dir, "extra"), 0o750),
		os.WriteFile(filepath.Join(dir, "extra/a"), []byte("a"), 0o640),
	); err != nil {
		t.Fatal(err)
	}
	files, err := config.Trust(from)
	if err != nil {
		t.Fatal(err)
	}
	s, err := Trust(dir, files)
	if err != nil {
		t.Fatal(err)
	}
	backup, err := s.Swap(time.Unix(1e9, 0))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"secret", "link", "extra", "extra/a"} {
		was, err1 := os.Lstat(filepath.Join(backup, name))
		is, err2 := os.Lstat(filepath.Join(dir, name))
		if err := errors.Join(err1, err2); err != nil || was.Mode() != is.Mode() || !was.IsDir() && was.Size() != is.Size() {
			t.Errorf("%s: %v, %v, error %v", name, was, is, err)
		}
	}
	now, err := config.Trust(dir)
	if err != nil || len(now) != len(files) || !bytes.Equal(now["trustpolicy.json"], files["trustpolicy.json"]) {
		t.Errorf("%d files, error %v", len(now), err)
	}
	// A pipe is nothing that can be copied.
	if err := syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Trust(dir, files); err == nil {
		t.Error("a pipe was copied")
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(dir), ".*next*")); len(left) > 0 {
		t.Errorf("left %q", left)
	}
}

// An error that comes when the trust is in force says where what was before is.
func TestStageHalf(t *testing.T) {
	t.Parallel()
	from := t.TempDir()
	trustConfig(t, from, "x509.subject: C=US, ST=WA, O=new")
	files, err := config.Trust(from)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), strings.Repeat("e", 232)) // with .before-… it is too long for a name
	trustConfig(t, dir, "x509.subject: C=US, ST=WA, O=old")
	was, err := config.Trust(dir)
	if err != nil {
		t.Fatal(err)
	}
	s, err := Trust(dir, files)
	if err != nil {
		t.Fatal(err)
	}
	backup, err := s.Swap(time.Unix(1e9, 0))
	if !errors.Is(err, syscall.ENAMETOOLONG) || backup == "" || !strings.Contains(err.Error(), "what was before is in "+backup) {
		t.Fatalf("error %v, backup in %q", err, backup)
	}
	s.Discard()
	for at, want := range map[string]map[string][]byte{dir: files, backup: was} {
		if got, err := config.Trust(at); err != nil || !bytes.Equal(got["trustpolicy.json"], want["trustpolicy.json"]) {
			t.Errorf("%s: %s, error %v", at, got["trustpolicy.json"], err)
		}
	}
}

// What somebody else has changed since the copy was made is not undone.
func TestStageMeanwhile(t *testing.T) {
	t.Parallel()
	from := t.TempDir()
	trustConfig(t, from, "x509.subject: C=US, ST=WA, O=new")
	files, err := config.Trust(from)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(dir string) error{
		"a file that is written": func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "config.yaml"), []byte("version: 1\nmode: audit\n"), 0o600)
		},
		"a mode":        func(dir string) error { return os.Chmod(filepath.Join(dir, "config.yaml"), 0o640) },
		"a file more":   func(dir string) error { return os.WriteFile(filepath.Join(dir, "more"), nil, 0o600) },
		"its trust":     func(dir string) error { return os.WriteFile(filepath.Join(dir, "trustpolicy.json"), nil, 0o600) },
		"the file gone": func(dir string) error { return os.Remove(filepath.Join(dir, "config.yaml")) },
		"all of it":     os.RemoveAll,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "etc")
			trustConfig(t, dir, "x509.subject: C=US, ST=WA, O=old")
			if err := os.WriteFile(filepath.Join(dir, "config.yaml"), []byte("version: 1\nmode: enforce\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			s, err := Trust(dir, files)
			if err != nil {
				t.Fatal(err)
			}
			if err := change(dir); err != nil {
				t.Fatal(err)
			}
			was, _ := sumOf(dir)
			if backup, err := s.Swap(time.Unix(1e9, 0)); err == nil || backup != "" {
				t.Errorf("it is in force, and what was before in %q", backup)
			}
			s.Discard()
			if is, _ := sumOf(dir); is != was {
				t.Error("something was changed")
			}
			if left, _ := filepath.Glob(filepath.Join(filepath.Dir(dir), ".*")); len(left) > 0 {
				t.Errorf("left %q", left)
			}
		})
	}
}

// Where the last step fails, what was before is not removed with what was prepared.
func TestStageBackupStays(t *testing.T) {
	t.Parallel()
	from, dir := t.TempDir(), filepath.Join(t.TempDir(), "etc")
	trustConfig(t, from, "x509.subject: C=US, ST=WA, O=new")
	trustConfig(t, dir, "x509.subject: C=US, ST=WA, O=old")
	files, err := config.Trust(from)
	if err != nil {
		t.Fatal(err)
	}
	was, err := config.Trust(dir)
	if err != nil {
		t.Fatal(err)
	}
	s, err := Trust(dir, files)
	if err != nil {
		t.Fatal(err)
	}
	// A file has the name, and then the other one that it would have.
	backup := dir + ".before-20010909T014640Z"
	if err := errors.Join(os.WriteFile(backup, nil, 0o600),
		os.WriteFile(backup+"-"+strings.TrimPrefix(filepath.Base(s.next), ".etc-next-"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	backup, err = s.Swap(time.Unix(1e9, 0))
	if err == nil || !strings.Contains(err.Error(), "is the new one now") {
		t.Errorf("error %v", err)
	}
	s.Discard()
	now, err := config.Trust(dir)
	if err != nil || !bytes.Equal(now["trustpolicy.json"], files["trustpolicy.json"]) {
		t.Errorf("the trust is not in force: %v", err)
	}
	before, err := config.Trust(backup)
	if err != nil || !bytes.Equal(before["trustpolicy.json"], was["trustpolicy.json"]) {
		t.Errorf("what was before is not there: %v", err)
	}
}

// Undo puts back what was before, whether there was something or nothing.
func TestUndo(t *testing.T) {
	t.Parallel()
	from := t.TempDir()
	trustConfig(t, from, "x509.subject: C=US, ST=WA, O=new")
	files, err := config.Trust(from)
	if err != nil {
		t.Fatal(err)
	}
	for name, there := range map[string]bool{"over another": true, "on a new node": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "etc")
			if there {
				trustConfig(t, dir, "x509.subject: C=US, ST=WA, O=old")
			}
			was, _ := sumOf(dir)
			s, err := Trust(dir, files)
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Undo(); err != nil {
				t.Errorf("before it was in force: %v", err)
			}
			if _, err := s.Swap(time.Unix(1e9, 0)); err != nil {
				t.Fatal(err)
			}
			if err := s.Undo(); err != nil {
				t.Fatal(err)
			}
			if is, _ := sumOf(dir); is != was {
				t.Error("it is not what was before")
			}
			if left, _ := os.ReadDir(filepath.Dir(dir)); len(left) != map[bool]int{true: 1, false: 0}[there] {
				t.Errorf("left %v", left)
			}
		})
	}
}

// Only the error of the check tells what is wrong, and it names the directory in force.
func TestCheck(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "etc")
	s, err := New(dir, func(string) bool { return false }, map[string][]byte{"config.yaml": []byte("version: 9\n")})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Discard()
	if _, err := s.Load(); err == nil || !strings.Contains(err.Error(), dir) || strings.Contains(err.Error(), "-next-") {
		t.Errorf("error %v", err)
	}
	if _, err := New(dir, func(string) bool { return false }, map[string][]byte{"../x": nil}); err == nil {
		t.Error("a file was written beside it")
	}
}
