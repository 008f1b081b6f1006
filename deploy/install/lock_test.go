package install

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/node/nodetest"
	"github.com/tidewaiter/tidewaiter/verify/durable"
)

// TestLock: two that change a host do so one after the other, and one that only prints
// waits for nobody.
func TestLock(t *testing.T) {
	for name, files := range map[string]nodetest.Tree{"host": nodetest.Kubeadm, "nothing runs": {"/etc/containerd/config.toml": "version = 3\n"}} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, files)
			release, err := s.lock(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			was := snapshot(t, s.root)
			for what, do := range map[string]func(context.Context) (Result, error){"install": s.Install, "uninstall": s.Uninstall} {
				if _, err := do(t.Context()); !errors.Is(err, ErrBusy) {
					t.Errorf("%s: %v", what, err)
				}
			}
			s.DryRun = true
			must(t, "print", Planned)(s.Install(t.Context()))
			s.DryRun = false
			same(t, "busy", was, snapshot(t, s.root))
			// It goes on as soon as the other is done.
			sleep := s.Sleep
			s.Sleep = func(ctx context.Context, d time.Duration) { release(); sleep(ctx, d) }
			must(t, "install", Installed)(s.Install(t.Context()))
			if left, _ := filepath.Glob(filepath.Join(s.root, "*.lock")); len(left) > 0 || s.Exists("/run/"+lockHost) {
				t.Errorf("a lock is left: %q", left)
			}
		})
	}
}

// TestLockOfRoot: who may not change a host cannot keep others from it, and a node can be
// opened all the same.
func TestLockOfRoot(t *testing.T) {
	const restart = "systemctl restart containerd.service"
	for name, set := range map[string]func(*testing.T, *scene){
		"somebody holds what all can read": func(t *testing.T, s *scene) {
			for _, dir := range []string{"/run", "/etc", "/"} {
				d, err := os.Open(s.Target(dir))
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { d.Close() })
				if err := syscall.Flock(int(d.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
					t.Fatal(err)
				}
			}
		},
		"it can be read by others": func(t *testing.T, s *scene) {
			if err := os.Mkdir(s.Path("/run/"+lockHost), 0o755); err != nil {
				t.Fatal(err)
			}
		},
		"it is somebody else's": func(t *testing.T, s *scene) {
			if err := os.Mkdir(s.Path("/run/"+lockHost), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.Chown(s.Path("/run/"+lockHost), 1000, 1000); err != nil {
				t.Fatal(err)
			}
		},
		"it is a link": func(t *testing.T, s *scene) {
			if err := os.Symlink(t.TempDir(), s.Path("/run/"+lockHost)); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := auditing(t, nodetest.Kubeadm)
			must(t, "enforce", Enforces)(s.Install(t.Context()))
			set(t, s)
			if name == "somebody holds what all can read" {
				release, err := s.exclusive(t.Context(), func(_ Result, err error) { t.Error(err) })
				if err != nil {
					t.Fatal(err)
				}
				defer release()
				must(t, "uninstall", Removed)(s.Uninstall(t.Context()))
				return
			}
			n := s.count(restart)
			if r, err := s.Uninstall(t.Context()); err == nil || !strings.Contains(err.Error(), "lock the host") || s.count(restart) != n {
				t.Errorf("%s, %v", r, err)
			}
			s.Force = true
			must(t, "uninstall --force", Removed)(s.Uninstall(t.Context()))
			s.heard(t, "warn: lock the host: ")
		})
	}
	// Nor does one that is at work and does not end.
	s := auditing(t, nodetest.Kubeadm)
	release, err := s.lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	s.Force = true
	must(t, "uninstall --force", Removed)(s.Uninstall(t.Context()))
	s.heard(t, ErrBusy.Error())
	if info, err := os.Stat(s.Path("/run/" + lockHost)); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", info, err)
	}
}

// TestLockIsOne: of many that want it one has it, also while it comes and goes.
func TestLockIsOne(t *testing.T) {
	dir := filepath.Join(t.TempDir(), lockHost)
	var held atomic.Int32
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for taken := 0; taken < 50; {
				release, err := tryLock(dir)
				if errors.Is(err, durable.ErrLocked) {
					runtime.Gosched()
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				if held.Add(1) != 1 {
					t.Error("two have it")
				}
				runtime.Gosched()
				held.Add(-1)
				release()
				taken++
			}
		})
	}
	all.Wait()
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it is left: %v", err)
	}
}
