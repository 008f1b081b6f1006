package install

import (
	"cmp"
	"context"
	"errors"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/deploy/node"
	"github.com/tidewaiter/tidewaiter/deploy/node/nodetest"
)

// TestLife installs, enforces, opens and removes on each distribution.
func TestLife(t *testing.T) {
	for name, tt := range map[string]struct {
		files    nodetest.Tree
		restart  string
		required string // file that requires the gate
		pinned   bool
	}{
		"kubeadm":             {nodetest.Kubeadm, "systemctl restart containerd.service", "/etc/containerd/conf.d/99-tidewaiter.toml", true},
		"without imports":     {nodetest.Bare, "systemctl restart containerd.service", "/etc/containerd/conf.d/99-tidewaiter.toml", true},
		"without config.toml": {nodetest.None, "systemctl restart containerd.service", "/etc/containerd/conf.d/99-tidewaiter.toml", false},
		"k3s":                 {nodetest.K3s, "systemctl restart k3s-agent.service", nodetest.K3sDir + "config-v3.toml.d/99-tidewaiter.toml", true},
		"older k3s":           {nodetest.OldK3s, "systemctl restart k3s-agent.service", nodetest.K3sDir + "config-v3.toml.tmpl", false},
		"k3s with a template": {nodetest.OwnK3s, "systemctl restart k3s-agent.service", nodetest.K3sDir + "config-v3.toml.tmpl", false},
		"k3s, version 2":      {nodetest.K3s.With(nodetest.Tree{nodetest.K3sDir + "config.toml": "version = 2\n", nodetest.K3sDir + "config.toml.tmpl": "version = 2\n"}), "systemctl restart k3s-agent.service", nodetest.K3sDir + "config.toml.tmpl", false},
		"k3s on Alpine":       {alpineTree(), "rc-service k3s restart", nodetest.K3sDir + "config-v3.toml.d/99-tidewaiter.toml", true},
		"RKE2":                {nodetest.Rke2, "systemctl restart rke2-server.service", nodetest.Rke2Dir + "config-v3.toml.d/99-tidewaiter.toml", true},
		"MicroK8s":            {nodetest.Microk8s, "systemctl restart snap.microk8s.daemon-containerd.service", nodetest.SnapDir + "containerd.d/99-tidewaiter.toml", true},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := t.Context()
			s := newScene(t, tt.files)
			if s.Name == "containerd" && tt.required == "" {
				t.Fatal("no file")
			}
			clean := snapshot(t, s.root)
			s.away = true
			s.DryRun = true
			must(t, "print", Planned)(s.Install(ctx))
			same(t, "print", clean, snapshot(t, s.root))
			s.DryRun = false
			must(t, "install", Installed)(s.Install(ctx))
			audit := snapshot(t, s.root)
			for p := range audit {
				if clean[p] != audit[p] && strings.Contains(p, "containerd") {
					t.Errorf("install touched %s", p)
				}
			}
			must(t, "again", Nothing)(s.Install(ctx))

			s.Enforce = true
			s.DryRun = true
			must(t, "print enforce", Planned)(s.Install(ctx))
			same(t, "print enforce", audit, snapshot(t, s.root))
			s.heard(t, "would: change /etc/tidewaiter/config.yaml")
			s.DryRun = false
			must(t, "enforce", Installed)(s.Install(ctx))
			s.heard(t, "next: "+tt.restart)
			if slices.Contains(s.commands, tt.restart) {
				t.Fatal("containerd was restarted unasked")
			}
			if name == "MicroK8s" && !strings.Contains(s.text(t, tt.required), "\nversion = 2\n") {
				t.Error(s.text(t, tt.required))
			}
			if text := s.text(t, tt.required); !strings.Contains(text, `required_plugins = ["tidewaiter"]`) {
				t.Errorf("%s:\n%s", tt.required, text)
			}
			_, err := os.Stat(filepath.Join(s.root, path.Dir(tt.required), node.PauseFile))
			if (err == nil) != tt.pinned {
				t.Errorf("pause image pinned: %v", err)
			}
			if text := s.text(t, "/etc/tidewaiter/config.yaml"); !strings.Contains(text, "\nmode: enforce\n") {
				t.Error(text)
			}
			enforced := snapshot(t, s.root)
			must(t, "enforce again", Nothing)(s.Install(ctx))
			same(t, "enforce again", enforced, snapshot(t, s.root))
			s.Restart = true
			must(t, "restart", Enforces)(s.Install(ctx))
			if !slices.Contains(s.commands, tt.restart) {
				t.Errorf("no %s in %v", tt.restart, s.commands)
			}
			restarted := snapshot(t, s.root)
			delete(enforced, "/var/lib/tidewaiter/install.json")
			delete(restarted, "/var/lib/tidewaiter/install.json")
			same(t, "restart", enforced, restarted)
			// What enforces already is not restarted again, nor asked what it would refuse.
			s.gate.Running.Reasons = map[string]int{"REVOKED": 1}
			n := len(s.commands)
			must(t, "restart again", Nothing)(s.Install(ctx))
			if len(s.commands) != n {
				t.Errorf("ran %v", s.commands[n:])
			}
			s.gate.Running.Reasons = nil

			s.Restart = false
			s.clock = s.clock.Add(time.Second)
			must(t, "uninstall", Opened)(s.Uninstall(ctx))
			s.heard(t, "log: uninstall: containerd's configuration does not require the gate any more")
			if s.away {
				t.Fatal("the gate was ended while containerd still requires it")
			}
			must(t, "uninstall too early", Opened)(s.Uninstall(ctx))
			s.Restart, s.Purge = true, true
			s.clock = s.clock.Add(time.Second)
			must(t, "uninstall", Removed)(s.Uninstall(ctx))
			if !s.away {
				t.Error("the gate still runs")
			}
			same(t, "uninstall", clean, snapshot(t, s.root))
		})
	}
}

// TestOperatorsFiles are never overwritten.
func TestOperatorsFiles(t *testing.T) {
	unit := "[Service]\nExecStart=/usr/local/bin/tidewaiter run --node x\n"
	s := newScene(t, nodetest.K3s.With(nodetest.Tree{
		"/etc/systemd/system/tidewaiter.service": unit, node.Defaults: "TIDEWAITER_NODE=x\n",
		"/etc/tidewaiter/config.yaml": "version: 1\nmode: audit # for now\n", "/etc/tidewaiter/trustpolicy.json": "{}",
	}))
	must(t, "install", Installed)(s.Install(t.Context()))
	if s.text(t, "/etc/systemd/system/tidewaiter.service") != unit || s.text(t, node.Defaults) != "TIDEWAITER_NODE=x\n" {
		t.Error("overwritten")
	}
	s.heard(t, "warn: /etc/systemd/system/tidewaiter.service is not ours")
	s.heard(t, "TIDEWAITER_CONTAINERD_SOCKET=/run/k3s/containerd/containerd.sock")
	s.Enforce = true
	must(t, "enforce", Installed)(s.Install(t.Context()))
	if text := s.text(t, "/etc/tidewaiter/config.yaml"); text != "version: 1\nmode: enforce # for now\n" {
		t.Errorf("%q", text)
	}
	s.Enforce = false
	must(t, "install over enforce", Nothing)(s.Install(t.Context()))

	s = newScene(t, nodetest.Kubeadm.With(nodetest.Tree{"/etc/tidewaiter/config.yaml": "version: 1\nmode: enforce\n"}))
	s.away = true
	refused(t, "install", "the configuration enforces")(s.Install(t.Context()))

	// What the hints of both say leads out: neither only names the other.
	s.Enforce = true
	refused(t, "enforce without a gate", "no gate runs here")(s.Install(t.Context()))
	s.write(t, "/etc/tidewaiter/config.yaml", "version: 1\nmode: audit\n")
	s.Enforce, s.away = false, false
	must(t, "install", Installed)(s.Install(t.Context()))
	s.Enforce = true
	must(t, "enforce", Installed)(s.Install(t.Context()))
}

// TestPlaces are what may be removed with all that it holds, and named in a unit.
func TestPlaces(t *testing.T) {
	for _, bad := range []string{"", "/", "/.", "etc", "/etc", "/etc/..", "/etc/x/..", ".", "/etc/a b", "/etc/a%n", "/etc/a\nExecStart=x"} {
		for _, set := range []func(*Installation){
			func(i *Installation) { i.ConfigDir = bad }, func(i *Installation) { i.StateDir = bad },
			func(i *Installation) { i.RunDir = bad }, func(i *Installation) { i.Program = cmp.Or(bad, "x") },
		} {
			s := newScene(t, nodetest.Kubeadm.With(nodetest.Tree{"/etc/passwd": "root"}))
			was := snapshot(t, s.root)
			set(s.Installation)
			s.Purge, s.Force = true, true
			if _, err := s.Uninstall(t.Context()); err == nil {
				t.Errorf("%q: uninstall --purge", bad)
			}
			if _, err := s.Install(t.Context()); err == nil {
				t.Errorf("%q: install", bad)
			}
			same(t, bad, was, snapshot(t, s.root))
		}
	}
}

// TestOtherDirectories can be written to by a gate that is confined.
func TestOtherDirectories(t *testing.T) {
	for _, tt := range []struct {
		state, run string
		want, not  []string
	}{
		{"/var/lib/tidewaiter", "/run/tidewaiter", []string{"\nStateDirectory=tidewaiter\n", "\nRuntimeDirectory=tidewaiter\n"}, []string{"\nReadWritePaths="}},
		{"/data/tidewaiter/", "/run/gate/a", []string{"\nReadWritePaths=-/data/tidewaiter\n", "\nRuntimeDirectory=gate/a\n"}, []string{"\nStateDirectory"}},
		{"/var/lib/tidewaiter", "/data/run", []string{"\nReadWritePaths=-/data/run\n", "\nStateDirectory=tidewaiter\n"}, nil},
	} {
		s := newScene(t, nodetest.Kubeadm)
		s.StateDir, s.RunDir = tt.state, tt.run
		must(t, "install", Installed)(s.Install(t.Context()))
		unit := s.text(t, "/etc/systemd/system/tidewaiter.service")
		for _, want := range tt.want {
			if !strings.Contains(unit, want) {
				t.Errorf("%v: no %q in\n%s", tt, want, unit)
			}
		}
		for _, not := range tt.not {
			if strings.Contains(unit, not) {
				t.Errorf("%v: %q in\n%s", tt, not, unit)
			}
		}
		if !s.Exists(tt.state) || !strings.HasPrefix(tt.run, "/run/") && !s.Exists(tt.run) {
			t.Errorf("%v: a directory is missing", tt)
		}
		must(t, "again", Nothing)(s.Install(t.Context()))
	}
}

// TestOwners: what runs as root nobody else owns or may write to, whoever copied it.
func TestOwners(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("run as root: owners are changed")
	}
	const unit = "/etc/systemd/system/tidewaiter.service"
	s := newScene(t, nodetest.Kubeadm)
	must(t, "install", Installed)(s.Install(t.Context()))
	for _, self := range []string{"\x00one", "\x00two"} {
		s.Self = []byte(self)
		for _, name := range []string{node.GateBinary, unit} {
			if err := os.Chown(s.Path(name), 1000, 1000); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(s.Path(name), 0o777); err != nil {
				t.Fatal(err)
			}
		}
		must(t, self, Installed)(s.Install(t.Context()))
		for name, mode := range map[string]os.FileMode{node.GateBinary: 0o755, unit: 0o644} {
			info, err := os.Stat(s.Path(name))
			if err != nil {
				t.Fatal(err)
			}
			if u := info.Sys().(*syscall.Stat_t).Uid; u != 0 || info.Mode().Perm() != mode {
				t.Errorf("%s: owner %d, mode %04o", name, u, info.Mode().Perm())
			}
		}
		must(t, "again", Nothing)(s.Install(t.Context()))
	}
}

// TestLinksOfTheHost lead below the root where the host is mounted.
func TestLinksOfTheHost(t *testing.T) {
	root := nodetest.Tree{
		"/data/rancher/k3s/data/abc/bin/containerd":                                  "#!",
		"/data/rancher/k3s/agent/etc/containerd/config-v3.toml.d/" + node.DropInFile: "x",
		"/data/rancher/k3s/agent/etc/containerd/config.toml":                         "version = 3\n",
		"/usr/local/bin/": "",
	}.Make(t)
	for link, to := range map[string]string{
		"/var/lib/rancher":                  "/data/rancher",
		"/data/rancher/k3s/data/current":    "/var/lib/rancher/k3s/data/abc",
		"/usr/local/sbin":                   "../../../../../../../../usr/local/bin",
		"/loop":                             "/loop",
		"/etc/alternatives/c":               "/data/rancher/k3s/data/abc/bin/containerd",
		"/data/rancher/k3s/agent/file.toml": "/etc/passwd",
	} {
		if err := os.MkdirAll(filepath.Join(root, path.Dir(link)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(to, filepath.Join(root, link)); err != nil {
			t.Fatal(err)
		}
	}
	h, err := node.Detect(node.Options{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	if h.Name != "k3s" || h.Binary != "/var/lib/rancher/k3s/data/current/bin/containerd" {
		t.Errorf("%s, %q", h.Name, h.Binary)
	}
	for name, want := range map[string]string{
		"/usr/local/sbin/x":                    "/usr/local/bin/x",
		"/usr/../../../etc/x":                  "/etc/x",
		"/var/lib/rancher/k3s/agent/file.toml": "/data/rancher/k3s/agent/file.toml",
		"/var/lib/rancher":                     "/var/lib/rancher",
		"/loop/x":                              "/loop/x",
		"":                                     "",
	} {
		if got := h.Path(name); got != root+want {
			t.Errorf("%q: %s", name, got)
		}
	}
	if !h.Exists("/etc/alternatives/c") || h.Exists("/loop") || h.Exists("/loop/x") {
		t.Error("what is there")
	}
	i := &Installation{Host: h, Gate: Gate{ConfigDir: "/etc/tidewaiter", StateDir: "/var/lib/tidewaiter", RunDir: "/run/tidewaiter"}, World: World{Say: func(string, string, ...any) {}, Log: func(string) {}, Now: time.Now,
		Ask: func(context.Context) (*control.Status, error) { return nil, errors.New("dead") }}}
	h.Run = func(context.Context, string, ...string) (string, error) { return "", errors.New("no program") }
	if _, err := i.Uninstall(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(root, "/data/rancher/k3s/agent/etc/containerd/config-v3.toml.d", node.DropInFile)); err == nil {
		t.Error("k3s still requires the gate")
	}
}
