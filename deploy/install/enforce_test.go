package install

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/deploy/node"
	"github.com/tidewaiter/tidewaiter/deploy/node/nodetest"
)

func TestEnforceIsRefused(t *testing.T) {
	for name, tt := range map[string]struct {
		files nodetest.Tree
		set   func(*scene)
		want  string
	}{
		"what runs by an unknown reason": {nodetest.Kubeadm, func(s *scene) { s.gate.Running.Reasons = map[string]int{"VERIFIED": 3, "ALLOWED_BY_POLICY": 1} }, "1 of what runs here would be refused"},
		"what runs":                      {nodetest.Kubeadm, func(s *scene) { s.gate.Running.Reasons = map[string]int{"VERIFIED": 3, "SIGNATURE_MISSING": 2} }, "2 of what runs here would be refused"},
		"no image":                       {nodetest.Kubeadm, func(s *scene) { s.gate.Running.ImageMissing = 1 }, "1 of what runs"},
		"the pause image": {nodetest.Kubeadm, func(s *scene) {
			s.gate.Running.Pauses = []control.Pause{{Image: nodetest.Pause, Reason: "SIGNATURE_MISSING"}}
		}, "1 of what runs"},
		"not looked":           {nodetest.Kubeadm, func(s *scene) { s.gate.Running.At = nil }, "not looked at everything"},
		"not seen all":         {nodetest.Kubeadm, func(s *scene) { s.gate.Running.Error = "timeout" }, "timeout"},
		"no gate":              {nodetest.Kubeadm, func(s *scene) { s.away = true }, "no gate runs here"},
		"no configuration":     {nodetest.Kubeadm, func(s *scene) { s.gate.Configuration.Revision = "" }, "would refuse everything"},
		"rejected":             {nodetest.Kubeadm, func(s *scene) { s.gate.Configuration.Rejected = &control.Rejected{Current: true, Error: "line 3"} }, "line 3"},
		"NRI off":              {nodetest.Kubeadm.With(nodetest.Tree{"/etc/containerd/conf.d/10.toml": "version = 3\n[plugins.'io.containerd.nri.v1.nri']\n  disable = true\n"}), func(*scene) {}, "NRI is switched off"},
		"CRI off":              {nodetest.Kubeadm.With(nodetest.Tree{"/etc/containerd/conf.d/10.toml": "version = 3\ndisabled_plugins = ['io.containerd.grpc.v1.cri']\n"}), func(*scene) {}, "CRI is switched off"},
		"imports no directory": {nodetest.Kubeadm.With(nodetest.Tree{"/etc/containerd/config.toml": "version = 3\nimports = ['/etc/containerd/other.toml']\n", "/etc/containerd/other.toml": "version = 3\n"}), func(*scene) {}, "no directory for a file of ours"},
	} {
		t.Run(name, func(t *testing.T) {
			s := auditing(t, tt.files)
			tt.set(s)
			was := snapshot(t, s.root)
			refused(t, "enforce", tt.want)(s.Install(t.Context()))
			same(t, "refused", was, snapshot(t, s.root))
			if name == "what runs" {
				s.Force = true
				must(t, "force", Enforces)(s.Install(t.Context()))
			}
		})
	}
}

// TestTakenBack has each step go wrong: the node is as it was.
func TestTakenBack(t *testing.T) {
	zz := "version = 3\n[plugins.'io.containerd.nri.v1.nri'.default_validator]\n  enable = false\n"
	for name, tt := range map[string]struct {
		set       func(*testing.T, *scene)
		want      string
		restarted int
	}{
		"containerd refuses it": {func(t *testing.T, s *scene) {
			load := s.Ask
			n := 0
			s.Ask = func(ctx context.Context) (*control.Status, error) { // from the second question on
				n++
				s.bad = n > 1
				return load(ctx)
			}
		}, "containerd does not accept its new configuration", 0},
		"a later file": {func(t *testing.T, s *scene) { s.write(t, "/etc/containerd/conf.d/zz.toml", zz) }, "another file overrides ours", 0},
		"no connections": {func(t *testing.T, s *scene) {
			s.write(t, "/etc/containerd/conf.d/50.toml", "version = 3\n[plugins.'io.containerd.nri.v1.nri']\n  disable_connections = true\n")
		}, "takes no connections", 0},
		"more than that": {func(t *testing.T, s *scene) { s.loses = "oom_score" }, "would be another one in oom_score, too", 0},
		"another pause image": {func(t *testing.T, s *scene) {
			s.write(t, "/etc/containerd/conf.d/99-zz.toml", "version = 3\n[plugins.'io.containerd.cri.v1.images'.pinned_images]\n  sandbox = '"+nodetest.Pause+"'\n")
		}, "would use the pause image", 0},
		"the gate does not enforce":        {func(t *testing.T, s *scene) { s.gate.Runtime.Registered = false }, "not registered to enforce: after 1m0s", 0},
		"not registered after the restart": {func(t *testing.T, s *scene) { s.stuck = true }, "not registered after the restart of containerd: after 1m0s", 2},
		"a DaemonSet's gate":               {func(t *testing.T, s *scene) { s.others = 1 }, "2 gates run on this node", 0},
		"no such line": {func(t *testing.T, s *scene) {
			s.write(t, "/etc/tidewaiter/config.yaml", "version: 1\nmode:   audit\nmode: audit\n")
		}, "not there in a form", 0},
	} {
		t.Run(name, func(t *testing.T) {
			s := auditing(t, nodetest.Kubeadm)
			tt.set(t, s)
			was := snapshot(t, s.root)
			delete(was, "/var/lib/tidewaiter/install.json")
			refused(t, "enforce", tt.want)(s.Install(t.Context()))
			is := snapshot(t, s.root)
			delete(is, "/var/lib/tidewaiter/install.json")
			same(t, "taken back", was, is)
			n := 0
			for _, c := range s.commands {
				if c == "systemctl restart containerd.service" {
					n++
				}
			}
			if n != tt.restarted {
				t.Errorf("containerd was restarted %d times", n)
			}
		})
	}
}

// TestRegisters waits a moment for containerd to ask a new gate, and no longer.
func TestRegisters(t *testing.T) {
	for _, late := range []int{1, 8, 1000} {
		s := newScene(t, nodetest.Kubeadm)
		s.away, s.gate.Runtime.Registered = true, false
		ask, n := s.Ask, 0
		s.Ask = func(ctx context.Context) (*control.Status, error) {
			if !s.away {
				n++
			}
			s.gate.Runtime.Registered = n >= late
			return ask(ctx)
		}
		must(t, "install", Installed)(s.Install(t.Context()))
		warned := slices.ContainsFunc(s.said, func(line string) bool { return strings.Contains(line, "containerd does not ask it yet") })
		if n < min(late, 8) || n > 30 || warned != (late == 1000) {
			t.Errorf("registered at question %d: asked %d times, said %q", late, n, s.said)
		}
	}
}

// TestRequiredBefore keeps what another file requires.
func TestRequiredBefore(t *testing.T) {
	s := auditing(t, nodetest.Kubeadm.With(nodetest.Tree{"/etc/containerd/conf.d/10.toml": "version = 3\n[plugins.'io.containerd.nri.v1.nri'.default_validator]\n  enable = true\n  required_plugins = ['x\"y']\n  tolerate_missing_plugins_annotation = 'skip.example'\n"}))
	must(t, "enforce", Enforces)(s.Install(t.Context()))
	if text := s.text(t, "/etc/containerd/conf.d/99-tidewaiter.toml"); !strings.Contains(text, `required_plugins = ["x\"y", "tidewaiter"]`) {
		t.Error(text)
	}
	s.heard(t, "warn: containerd lets every pod with the annotation skip.example do without")
	must(t, "again", Nothing)(s.Install(t.Context()))
}

// TestListThatDidNotCount stays what it was, and NRI that is switched off by name is
// seen.
func TestListThatDidNotCount(t *testing.T) {
	s := auditing(t, nodetest.Kubeadm.With(nodetest.Tree{"/etc/containerd/conf.d/10.toml": "version = 3\n[plugins.'io.containerd.nri.v1.nri'.default_validator]\n  enable = false\n  required_plugins = ['gone']\n"}))
	must(t, "enforce", Enforces)(s.Install(t.Context()))
	if text := s.text(t, "/etc/containerd/conf.d/99-tidewaiter.toml"); !strings.Contains(text, `required_plugins = ["tidewaiter"]`) {
		t.Error(text)
	}
	s = auditing(t, nodetest.Kubeadm.With(nodetest.Tree{"/etc/containerd/conf.d/10.toml": "version = 3\ndisabled_plugins = ['io.containerd.nri.v1.nri']\n"}))
	was := snapshot(t, s.root)
	refused(t, "enforce", "NRI is switched off")(s.Install(t.Context()))
	same(t, "refused", was, snapshot(t, s.root))
}

// TestRestartedByOthers: a restart that is outstanding is over when containerd was
// started since, whoever did it: nobody is to ask for one more each time it is started.
func TestRestartedByOthers(t *testing.T) {
	const restart = "systemctl restart containerd.service"
	for name, tt := range map[string]struct {
		late time.Duration // of the node's clock
		deaf bool          // the gate is not registered
		want int
	}{
		"it was":             {time.Hour, false, 0},
		"it was not":         {0, false, 1},
		"it does not ask":    {time.Hour, true, 0},
		"an unknown process": {-1, false, 1},
	} {
		t.Run(name, func(t *testing.T) {
			s := auditing(t, nodetest.Kubeadm)
			s.Restart = false
			must(t, "enforce", Installed)(s.Install(t.Context()))
			if !s.remembered().Pending {
				t.Fatal("no restart is outstanding")
			}
			s.Restart = true
			if tt.late >= 0 { // this process is the containerd
				if err := os.Remove(s.Path(s.Socket)); err != nil {
					t.Fatal(err)
				}
				// The kernel's clock of files may be one tick behind, and two files of a tick
				// are not told apart.
				for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
					l, err := net.Listen("unix", s.Path(s.Socket))
					if err != nil {
						t.Fatal(err)
					}
					at, err := s.Changed(s.Socket)
					if err != nil {
						t.Fatal(err)
					}
					wrote, err := s.Changed("/etc/containerd/conf.d/" + node.PauseFile)
					if err != nil {
						t.Fatal(err)
					}
					if at.After(wrote) || time.Now().After(end) {
						t.Cleanup(func() { l.Close() })
						break
					}
					l.Close()
				}
				s.clock = time.Now().Add(tt.late)
			}
			s.gate.Runtime.Registered = !tt.deaf
			result, err := s.Install(t.Context())
			switch {
			case tt.deaf && err == nil:
				t.Errorf("%s without a gate that is registered", result)
			case !tt.deaf && err != nil:
				t.Error(err)
			}
			if n := s.count(restart); n != tt.want {
				t.Errorf("%d restarts, want %d: %q", n, tt.want, s.said)
			}
			if s.remembered().Pending != tt.deaf {
				t.Error("what is outstanding is not what it should be")
			}
			if !tt.deaf {
				must(t, "again", Nothing)(s.Install(t.Context()))
				if n := s.count(restart); n != tt.want {
					t.Errorf("%d restarts after another installation", n)
				}
			}
		})
	}
}

// TestSecondRestart: a containerd that would not come back is not restarted once more, also
// if the command that restarted it failed.
func TestSecondRestart(t *testing.T) {
	for name, fails := range map[string]bool{"the command fails": true, "the gate does not register": false} {
		for broken, want := range map[bool]int{true: 1, false: 2} {
			t.Run(fmt.Sprintf("%s, files broken %t", name, broken), func(t *testing.T) {
				s := auditing(t, nodetest.Kubeadm)
				s.stuck = true
				run, restarts := s.Run, 0
				s.Run = func(ctx context.Context, program string, args ...string) (string, error) {
					if strings.Join(args, " ") != "restart containerd.service" {
						return run(ctx, program, args...)
					}
					if restarts++; restarts > 1 {
						return run(ctx, program, args...)
					}
					var err error
					if fails {
						err = errors.New("exit status 1")
					} else {
						_, err = run(ctx, program, args...)
					}
					if broken { // by somebody else, meanwhile
						nodetest.Link(t, s.root, map[string]string{"/etc/containerd/conf.d/50.toml": "/run/site.toml"})
					}
					return "", err
				}
				_, err := s.Install(t.Context())
				if err == nil || broken != strings.Contains(err.Error(), "containerd was not restarted once more: containerd would not start") {
					t.Error(err)
				}
				if restarts != want {
					t.Errorf("containerd was restarted %d times, want %d", restarts, want)
				}
				if s.Exists("/etc/containerd/conf.d/99-tidewaiter.toml") {
					t.Error("containerd still requires the gate")
				}
			})
		}
	}
}

// TestTooLargeRuns: a container that runs and is too large for the gate is counted like any
// other that would be refused, and the advice is to shorten the pod: no signature helps it.
func TestTooLargeRuns(t *testing.T) {
	s := auditing(t, nodetest.Kubeadm)
	s.gate.Running.Reasons = map[string]int{"VERIFIED": 3, "POD_TOO_LARGE": 1}
	s.gate.Running.Found = []control.Found{{Namespace: "shop", Pod: "web-0", Container: "app", Image: "registry.test/app:1", Reason: "POD_TOO_LARGE"}}
	was := snapshot(t, s.root)
	_, err := s.Install(t.Context())
	h := (*node.Hint)(nil)
	if !errors.As(err, &h) || !h.Refused || !strings.Contains(err.Error(), "1 of what runs here would be refused") || !strings.Contains(h.Next, "shorten the pods that are POD_TOO_LARGE") {
		t.Errorf("%v", err)
	}
	s.heard(t, "would be refused: shop/web-0 app registry.test/app:1: POD_TOO_LARGE")
	same(t, "refused", was, snapshot(t, s.root))
	s.Force = true
	must(t, "with --force", Enforces)(s.Install(t.Context()))
}
