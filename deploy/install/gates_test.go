package install

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/node"
	"github.com/tidewaiter/tidewaiter/deploy/node/nodetest"
)

// unsupervised is a scene without a service manager, on which a gate is installed that
// containerd requires, and Sleep takes some real time.
func unsupervised(t *testing.T) *scene {
	t.Helper()
	s := newScene(t, nodetest.Kubeadm.With(nodetest.Tree{"/run/systemd/system/": "-", "/usr/lib/systemd/system/containerd.service": "-"}))
	sleeper, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	if s.Self, err = os.ReadFile(sleeper); err != nil {
		t.Fatal(err)
	}
	s.Manager.ContainerdCommand = []string{"sv", "restart", "containerd"}
	must(t, "install", Installed)(s.Install(t.Context()))
	s.Enforce, s.Restart = true, true
	must(t, "enforce", Enforces)(s.Install(t.Context()))
	s.Manager.ContainerdCommand, s.Enforce, s.said = nil, false, nil
	sleep := s.Sleep
	s.Sleep = func(ctx context.Context, d time.Duration) { time.Sleep(10 * time.Millisecond); sleep(ctx, d) }
	return s
}

// gateRuns starts a program that keeps a gate's place in the run directory.
func (s *scene) gateRuns(t *testing.T, command ...string) *exec.Cmd {
	t.Helper()
	s.write(t, "/run/tidewaiter/instances/7-a", "")
	place, err := os.Open(s.Path("/run/tidewaiter/instances/7-a"))
	if err != nil {
		t.Fatal(err)
	}
	defer place.Close()
	cmd := exec.Command(command[0], command[1:]...)
	cmd.ExtraFiles = []*os.File{place}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	t.Cleanup(func() { _ = cmd.Process.Kill(); <-ended })
	s.Gates = func() (int, error) {
		all, err := s.gates()
		return len(all) + s.others, err
	}
	// sh is another program until it is not.
	for end := time.Now().Add(time.Minute); len(command) > 2 && time.Now().Before(end); time.Sleep(time.Millisecond) {
		if all, err := s.gates(); err == nil && len(all) == 1 && all[0].ours {
			break
		}
	}
	return cmd
}

// TestEndsTheGate: what nothing supervises that is known here is ended by uninstall, where
// it is certain that it is this installation's gate.
func TestEndsTheGate(t *testing.T) {
	for name, purge := range map[string]bool{"uninstall": false, "purge": true} {
		t.Run(name, func(t *testing.T) {
			s := unsupervised(t)
			cmd := s.gateRuns(t, s.Path(node.GateBinary), "600")
			s.Purge = purge
			must(t, "uninstall", Removed)(s.Uninstall(t.Context()))
			s.heard(t, fmt.Sprintf("did: ended the gate: process %d", cmd.Process.Pid))
			if all, err := s.gates(); err != nil || len(all) > 0 {
				t.Errorf("%+v, %v", all, err)
			}
			if s.count("sv restart containerd") != 2 {
				t.Errorf("the command that was named once was not run: %q", s.commands)
			}
			if s.Exists("/etc/tidewaiter") == purge {
				t.Error("the configuration is not what it should be")
			}
			s.Purge = false
			must(t, "again", Nothing)(s.Uninstall(t.Context()))
		})
	}
	// Its files are gone by hand, and it runs on.
	s := unsupervised(t)
	s.gateRuns(t, s.Path(node.GateBinary), "600")
	for _, name := range []string{node.GateBinary, "/var/lib/tidewaiter/install.json"} {
		if err := os.Remove(s.Path(name)); err != nil {
			t.Fatal(err)
		}
	}
	s.Manager.ContainerdCommand = []string{"sv", "restart", "containerd"}
	must(t, "uninstall", Removed)(s.Uninstall(t.Context()))
	s.heard(t, "did: ended the gate")
}

// TestGateRunsOn: where that is not certain, or it does not end, uninstall says so, with
// its process, each time, and has removed nothing that it needs.
func TestGateRunsOn(t *testing.T) {
	t.Run("another program", func(t *testing.T) {
		for _, purge := range []bool{false, true} {
			s := unsupervised(t)
			other := filepath.Join(t.TempDir(), "other")
			if err := os.WriteFile(other, s.Self, 0o755); err != nil {
				t.Fatal(err)
			}
			cmd := s.gateRuns(t, other, "600")
			s.Purge = purge
			for _, what := range []string{"once", "twice"} {
				_, err := s.Uninstall(t.Context())
				h := (*node.Hint)(nil)
				if !errors.As(err, &h) || h.Refused || !strings.Contains(err.Error(), fmt.Sprintf("the gate runs on, as process %d, and refuses", cmd.Process.Pid)) ||
					!strings.Contains(h.Next, fmt.Sprintf("kill %d", cmd.Process.Pid)) {
					t.Errorf("%s: %v", what, err)
				}
				if !s.Exists(node.GateBinary) || !s.Exists("/etc/tidewaiter/config.yaml") || !s.Exists("/var/lib/tidewaiter/install.json") {
					t.Errorf("%s: something was removed", what)
				}
			}
			if s.Exists("/etc/containerd/conf.d/" + node.DropInFile) {
				t.Error("containerd still requires it")
			}
			s.Force = true
			must(t, "uninstall --force", Removed)(s.Uninstall(t.Context()))
			if all, err := s.gates(); err != nil || len(all) != 0 && all[0].pid != cmd.Process.Pid || !purge && len(all) == 0 {
				t.Errorf("it was ended: %+v, %v", all, err)
			}
		}
	})
	t.Run("it cannot be seen", func(t *testing.T) {
		s := unsupervised(t)
		s.write(t, "/run/tidewaiter/instances/7-a", "")
		s.others, s.away = 1, true
		_, err := s.Uninstall(t.Context())
		if h := (*node.Hint)(nil); !errors.As(err, &h) || !strings.Contains(err.Error(), "its process cannot be seen from here") || !s.Exists(node.GateBinary) {
			t.Errorf("%v", err)
		}
	})
	t.Run("it does not end", func(t *testing.T) {
		s := unsupervised(t)
		s.Patience, s.Purge = time.Second, true
		cmd := s.gateRuns(t, "sh", "-c", `trap "" TERM; exec "$0" 600`, s.Path(node.GateBinary))
		_, err := s.Uninstall(t.Context())
		h := (*node.Hint)(nil)
		if !errors.As(err, &h) || h.Refused || h.Next != fmt.Sprintf("kill -9 %d", cmd.Process.Pid) || !s.Exists("/etc/tidewaiter/config.yaml") {
			t.Errorf("%v", err)
		}
		if slices.Contains(s.said, "did: removed /etc/tidewaiter") {
			t.Error("the configuration is gone")
		}
	})
}
