package install

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/node"
	"github.com/tidewaiter/tidewaiter/deploy/node/nodetest"
)

// TestPowerCut before the record of a drop-in in a directory of the operator's choice
// would leave one that uninstall does not find.
func TestPowerCut(t *testing.T) {
	s := auditing(t, nodetest.Kubeadm.With(nodetest.Tree{"/etc/containerd/config.toml": "version = 3\nimports = ['/opt/x/*.toml']\n"}))
	s.Restart = false
	s.Run = func(ctx context.Context, program string, args ...string) (string, error) {
		if slices.Contains(args, "dump") && s.Exists("/opt/x/"+node.DropInFile) {
			panic("power cut")
		}
		return s.run(ctx, program, args...)
	}
	func() {
		defer func() {
			if recover() == nil {
				t.Error("nothing was cut")
			}
		}()
		_, _ = s.Install(t.Context())
	}()
	if !s.Exists("/opt/x/" + node.DropInFile) {
		t.Fatal("cut too early")
	}
	if r := s.remembered(); !slices.Contains(r.DropIns, "/opt/x") {
		t.Errorf("%+v", r)
	}
	s.Run = s.run
	s.Restart = true
	must(t, "uninstall", Removed)(s.Uninstall(t.Context()))
	if s.Exists("/opt/x/" + node.DropInFile) {
		t.Error("containerd still requires a gate that is gone")
	}
}

// TestInterrupted: who ends an installation gets the node as it was, services too.
func TestInterrupted(t *testing.T) {
	s := auditing(t, nodetest.Kubeadm)
	was := snapshot(t, s.root)
	ctx, cancel := context.WithCancel(t.Context())
	s.stuck = true
	sleep := s.Sleep
	s.Sleep = func(c context.Context, d time.Duration) { cancel(); sleep(c, d) }
	s.Run = func(ctx context.Context, program string, args ...string) (string, error) {
		if err := ctx.Err(); err != nil {
			return "", err
		}
		return s.run(ctx, program, args...)
	}
	refused(t, "enforce", "context canceled: taken back")(s.Install(ctx))
	is := snapshot(t, s.root)
	delete(was, "/var/lib/tidewaiter/install.json")
	delete(is, "/var/lib/tidewaiter/install.json")
	same(t, "interrupted", was, is)
	if n := strings.Count(strings.Join(s.commands, "\n"), "systemctl restart containerd.service"); n != 2 {
		t.Errorf("containerd was restarted %d times, want there and back", n)
	}
}

// TestUnfinished reads the record as the gate and doctor do.
func TestUnfinished(t *testing.T) {
	s := newScene(t, nodetest.Kubeadm)
	s.away = true
	dir := s.Path(s.StateDir)
	if since, is := Unfinished(dir); is {
		t.Errorf("before anything is installed: since %s", since)
	}
	during := false
	run := s.Run
	s.Run = func(ctx context.Context, program string, args ...string) (string, error) {
		if since, is := Unfinished(dir); is && since.Equal(s.clock) {
			during = true
		}
		return run(ctx, program, args...)
	}
	must(t, "install", Installed)(s.Install(t.Context()))
	if since, is := Unfinished(dir); is || !during {
		t.Errorf("during the installation: %t; after it: %t, since %s", during, is, since)
	}
}
