package install

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/deploy/node"
	"github.com/tidewaiter/tidewaiter/deploy/node/nodetest"
)

// TestOpenWithoutAnything opens a node on which nothing is recognised and no record
// was left, and one of whose files cannot be read.
func TestOpenWithoutAnything(t *testing.T) {
	root := nodetest.Tree{
		nodetest.K3sDir + "config-v3.toml.d/99-tidewaiter.toml": "x",
		nodetest.SnapDir + "containerd-template.toml":           "imports = ['x'] # " + node.Marker + "\nversion = 2\n",
		"/etc/containerd/config.toml":                           "version = 3 # " + node.Marker + "\nimports = [] # " + node.Marker + "\n",
	}.Make(t)
	if err := os.Symlink("/nowhere", filepath.Join(root, "/etc/containerd/conf.d")); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(root, nodetest.Rke2Dir, "config.toml"), 0o755); err != nil {
		t.Fatal(err)
	}
	h, err := node.Detect(node.Options{Root: root, Optional: true})
	if err != nil {
		t.Fatal(err)
	}
	i := &Installation{Host: h, Gate: Gate{ConfigDir: "/etc/tidewaiter", StateDir: "/var/lib/tidewaiter", RunDir: "/run/tidewaiter"}, World: World{Say: func(string, string, ...any) {}, Log: func(string) {}, Now: time.Now,
		Ask: func(context.Context) (*control.Status, error) { return nil, errors.New("dead") }}}
	if _, err := i.Uninstall(t.Context()); err == nil || !strings.Contains(err.Error(), nodetest.Rke2Dir+"config.toml is not a regular file") {
		t.Errorf("got %v", err)
	}
	for name, want := range map[string]string{nodetest.K3sDir + "config-v3.toml.d/99-tidewaiter.toml": "", nodetest.SnapDir + "containerd-template.toml": "version = 2\n", "/etc/containerd/config.toml": ""} {
		raw, _ := os.ReadFile(filepath.Join(root, name))
		if string(raw) != want {
			t.Errorf("%s: %q", name, raw)
		}
	}
}

// TestRequiredByOthers: the gate does not go where an operator's own file requires it.
func TestRequiredByOthers(t *testing.T) {
	s := auditing(t, nodetest.Kubeadm)
	must(t, "enforce", Enforces)(s.Install(t.Context()))
	s.write(t, "/etc/containerd/conf.d/50-own.toml", "version = 3\n[plugins.'io.containerd.nri.v1.nri'.default_validator]\n  enable = true\n  required_plugins = ['99-tidewaiter']\n")
	s.Restart = true
	if _, err := s.Uninstall(t.Context()); err == nil || !strings.Contains(err.Error(), "/etc/containerd/conf.d/50-own.toml:4 requires it") {
		t.Errorf("got %v", err)
	}
	if !s.Exists(node.GateBinary) || s.away {
		t.Error("the gate is gone")
	}
	s.Force = true
	must(t, "uninstall --force", Removed)(s.Uninstall(t.Context()))
}

// TestUninstallOfAudit restarts nothing, since nothing required the gate; where it cannot
// be told, or was required once, it does.
func TestUninstallOfAudit(t *testing.T) {
	const restart = "systemctl restart containerd.service"
	for name, tt := range map[string]struct {
		set  func(*scene)
		want bool
	}{
		"audit":             {func(*scene) {}, false},
		"no answer":         {func(s *scene) { s.bad = true }, true},
		"an earlier record": {func(s *scene) { s.write(t, "/var/lib/tidewaiter/install.json", `{"opened":"2026-01-01T00:00:00Z"}`) }, true},
		"by hand": {func(s *scene) {
			s.Force = true
			s.write(t, "/etc/containerd/conf.d/own.toml", "version = 3\n[plugins.'io.containerd.nri.v1.nri'.default_validator]\n  enable = true\n  required_plugins = ['tidewaiter']\n")
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, nodetest.Kubeadm)
			must(t, "install", Installed)(s.Install(t.Context()))
			tt.set(s)
			s.Restart = true
			must(t, "uninstall", Removed)(s.Uninstall(t.Context()))
			if got := slices.Contains(s.commands, restart); got != tt.want {
				t.Errorf("restarted: %v", got)
			}
			if !s.away || s.Exists(node.GateBinary) {
				t.Error("the gate is still there")
			}
		})
	}
}

// TestPurgeBesideAnotherGate leaves what that one uses.
func TestPurgeBesideAnotherGate(t *testing.T) {
	s := auditing(t, nodetest.Kubeadm)
	s.write(t, "/var/lib/tidewaiter/store", "")
	s.write(t, "/run/tidewaiter/control.sock", "")
	s.others, s.Purge = 1, true
	if _, err := s.Uninstall(t.Context()); err == nil || !strings.Contains(err.Error(), "another gate still runs here: /var/lib/tidewaiter and /run/tidewaiter stay") {
		t.Errorf("%v", err)
	}
	if s.Exists("/etc/tidewaiter") || s.Exists(node.GateBinary) || !s.Exists("/var/lib/tidewaiter/store") || !s.Exists("/run/tidewaiter/control.sock") {
		t.Error("not what is the host's is gone, and what both use there")
	}
	s.Gates = func() (int, error) { return 0, errors.New("no leave") }
	if _, err := s.Uninstall(t.Context()); err == nil || !strings.Contains(err.Error(), "cannot be found out") {
		t.Errorf("%v", err)
	}
	s.Force = true
	must(t, "uninstall --purge --force", Removed)(s.Uninstall(t.Context()))
	if s.Exists("/var/lib/tidewaiter") || s.Exists("/run/tidewaiter") {
		t.Error("something is left")
	}
}

// TestPurgeOfShared leaves what may hold other things than the gate's.
func TestPurgeOfShared(t *testing.T) {
	for state, goes := range map[string]bool{
		"/var/lib": false, "/var/lib/other": false, "/data/gate": true, "/data/tidewaiter-1": true, "/var/lib/tidewaiter": true, "/var/tidewaiter": true,
	} {
		s := newScene(t, nodetest.Kubeadm.With(nodetest.Tree{state + "/precious": "x"}))
		if state == "/data/gate" {
			s.write(t, state+"/store/x", "")
		}
		s.StateDir = state
		s.Purge, s.away = true, true
		must(t, "uninstall", Removed)(s.Uninstall(t.Context()))
		if s.Exists(state+"/precious") == goes {
			t.Errorf("%s: gone: %v", state, !goes)
		}
		if !goes {
			s.heard(t, "warn: "+state+" stays")
		}
	}
	s := newScene(t, nodetest.Kubeadm.With(nodetest.Tree{"/var/lib/precious": "x"}))
	s.StateDir = "/var/lib"
	must(t, "install", Installed)(s.Install(t.Context()))
	s.Purge = true
	must(t, "uninstall", Removed)(s.Uninstall(t.Context()))
	if !s.Exists("/var/lib/precious") || s.Exists("/var/lib/install.json") || s.Exists("/etc/tidewaiter") {
		t.Error("not what is the gate's is gone, and the rest there")
	}
}

// TestLogs names logs that there are.
func TestLogs(t *testing.T) {
	for name, want := range map[string]string{"systemd": "journalctl", "openrc": "/var/log/tidewaiter.log", "none": "/opt/gate run"} {
		if got := (node.Manager{Name: name}).Logs("/opt/gate"); !strings.Contains(got, want) || name != "systemd" && strings.Contains(got, "journalctl") {
			t.Errorf("%s: %s", name, got)
		}
	}
}
