package install

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/deploy/node"
	"github.com/tidewaiter/tidewaiter/deploy/node/nodetest"
)

// unstartable are states of containerd's files in which the daemon does not come back, and
// of which its own `config dump` says nothing.
var unstartable = map[string]struct {
	files nodetest.Tree
	links map[string]string // from to
	want  string
	next  string
}{
	"an import of a file that is gone": {
		files: nodetest.Tree{"/etc/containerd/config.toml": "version = 3\nimports = ['/etc/containerd/conf.d/*.toml', '/etc/site.toml']\n" + nodetest.Generated},
		want:  "containerd would not start: /etc/site.toml, imported by /etc/containerd/config.toml, is missing",
		next:  "put it back or take it out of imports, and do not restart before",
	},
	"an import of an import": {
		files: nodetest.Tree{"/etc/containerd/conf.d/10.toml": "version = 3\nimports = ['site/a.toml']\n"},
		want:  "/etc/containerd/conf.d/site/a.toml, imported by /etc/containerd/conf.d/10.toml, is missing",
		next:  "do not restart before",
	},
	"a name with a question mark": {
		files: nodetest.Tree{"/etc/containerd/config.toml": "version = 3\nimports = ['/etc/containerd/conf.d/*.toml', '/etc/containerd/conf.d/1?.toml']\n" + nodetest.Generated, "/etc/containerd/conf.d/10.toml": "version = 3\n"},
		want:  "1?.toml, imported by /etc/containerd/config.toml, is missing: containerd takes a name without * as it is",
		next:  "write a pattern with *",
	},
	"a link that leads nowhere": {
		files: nodetest.Tree{"/etc/containerd/conf.d/": ""},
		links: map[string]string{"/etc/containerd/conf.d/50.toml": "/run/site.toml"},
		want:  "/etc/containerd/conf.d/50.toml, imported by /etc/containerd/config.toml, is a link that leads nowhere",
		next:  "remove the link",
	},
	"a file with an error behind one that is gone": {
		files: nodetest.Tree{"/etc/containerd/config.toml": "version = 3\nimports = ['/etc/site.toml', '/etc/containerd/conf.d/*.toml']\n" + nodetest.Generated, "/etc/containerd/conf.d/10.toml": "version = \"3\"\n"},
		want:  "/etc/containerd/conf.d/10.toml, imported by /etc/containerd/config.toml, cannot be read: /etc/containerd/conf.d/10.toml:1: ",
		next:  "put it back",
	},
	"a directory that matches": {
		files: nodetest.Tree{"/etc/containerd/conf.d/10.toml/": ""},
		want:  "/etc/containerd/conf.d/10.toml, imported by /etc/containerd/config.toml, cannot be read: it is not a regular file",
	},
	"a required plugin that is switched off": {
		files: nodetest.Tree{"/etc/containerd/conf.d/10.toml": "version = 3\nrequired_plugins = ['io.containerd.image-verifier.v1.bindir']\ndisabled_plugins = ['io.containerd.image-verifier.v1.bindir']\n"},
		want:  "requires the plugin io.containerd.image-verifier.v1.bindir, and disabled_plugins switches it off",
	},
	"mirrors and a config_path": {
		files: nodetest.Tree{"/etc/containerd/conf.d/10.toml": "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\n  config_path = '/etc/containerd/certs.d'\n[plugins.'io.containerd.cri.v1.images'.registry.mirrors.'docker.io']\n  endpoint = ['https://mirror.example']\n"},
		want:  "containerd would start without CRI: its configuration has registry.mirrors and a config_path",
	},
	"a default runtime that is not there": {
		files: nodetest.Tree{"/etc/containerd/conf.d/10.toml": "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.containerd]\n  default_runtime_name = 'runsc'\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]\n  runtime_type = 'io.containerd.runc.v2'\n"},
		want:  `default_runtime_name is "runsc", and there is no such runtime`,
	},
	"a duration that is none": {
		files: nodetest.Tree{"/etc/containerd/conf.d/10.toml": "version = 3\n[plugins.'io.containerd.cri.v1.images']\n  image_pull_progress_timeout = '5'\n"},
		want:  "image_pull_progress_timeout is no duration",
	},
}

// TestUnstartable: containerd is restarted by none of our commands, and nothing is written,
// where it would not come back. Its own program says yes to each of them.
func TestUnstartable(t *testing.T) {
	for name, tt := range unstartable {
		t.Run(name, func(t *testing.T) {
			s := auditing(t, nodetest.Kubeadm)
			for name, content := range tt.files {
				if dir, found := strings.CutSuffix(name, "/"); found {
					if err := os.MkdirAll(filepath.Join(s.root, dir), 0o755); err != nil {
						t.Fatal(err)
					}
					continue
				}
				s.write(t, name, content)
			}
			nodetest.Link(t, s.root, tt.links)
			s.said, s.commands = nil, nil
			was := snapshot(t, s.root)
			for _, force := range []bool{false, true} {
				s.Force = force
				_, err := s.Install(t.Context())
				h := (*node.Hint)(nil)
				if !errors.As(err, &h) || !h.Refused || !strings.Contains(err.Error(), tt.want) || !strings.Contains(h.Next, tt.next) || !strings.Contains(h.Next, "do not restart before") {
					t.Errorf("force %t: %v, next %v", force, err, h)
				}
			}
			same(t, "refused", was, snapshot(t, s.root))
			if len(s.commands) > 0 {
				t.Errorf("ran %q", s.commands)
			}
			if _, err := s.Effective(t.Context()); err != nil {
				return // its own program says so, too
			}
			s.DryRun = true
			if _, err := s.Install(t.Context()); err != nil {
				t.Errorf("--dry-run: %v", err)
			}
			s.heard(t, "warn: it would not be done: containerd would")

			// One that does not enforce restarts nothing, and says it.
			s.DryRun, s.Enforce, s.Restart, s.Self = false, false, false, []byte("\x00two")
			must(t, "upgrade", Installed)(s.Install(t.Context()))
			s.heard(t, "warn: do not restart containerd: containerd would")
		})
	}
}

// TestUninstallOfUnstartable takes the drop-in away all the same, and restarts nothing.
func TestUninstallOfUnstartable(t *testing.T) {
	for name, restart := range map[string]bool{"with --restart": true, "without": false} {
		t.Run(name, func(t *testing.T) {
			s := auditing(t, nodetest.Kubeadm)
			must(t, "enforce", Enforces)(s.Install(t.Context()))
			nodetest.Link(t, s.root, map[string]string{"/etc/containerd/conf.d/50.toml": "/run/site.toml"})
			s.commands, s.Restart = nil, restart
			got, err := s.Uninstall(t.Context())
			const want = "/etc/containerd/conf.d/50.toml, imported by /etc/containerd/config.toml, is a link that leads nowhere"
			if h := (*node.Hint)(nil); got != Opened || restart != errors.As(err, &h) || restart && (!strings.Contains(err.Error(), want) || !strings.Contains(h.Next, "do not restart before")) {
				t.Errorf("%s, %v", got, err)
			}
			if !restart {
				s.heard(t, "warn: containerd was opened, and must not be restarted yet: containerd would not start: "+want)
				if all := strings.Join(s.said, "\n"); strings.Contains(all, "next: systemctl restart") {
					t.Error(all)
				}
			}
			if s.Exists("/etc/containerd/conf.d/99-tidewaiter.toml") || !s.Exists(node.GateBinary) || len(s.commands) > 0 {
				t.Errorf("drop-in there %t, gate there %t, ran %q", s.Exists("/etc/containerd/conf.d/99-tidewaiter.toml"), s.Exists(node.GateBinary), s.commands)
			}
			must(t, "mended", "")(Result(""), os.Remove(filepath.Join(s.root, "/etc/containerd/conf.d/50.toml")))
			s.Restart = true
			must(t, "uninstall", Removed)(s.Uninstall(t.Context()))
		})
	}
}

// TestUninstallOfImportedByName: without the drop-in containerd would not start, so that an
// empty one stays.
func TestUninstallOfImportedByName(t *testing.T) {
	s := auditing(t, nodetest.Kubeadm)
	must(t, "enforce", Enforces)(s.Install(t.Context()))
	s.write(t, "/etc/containerd/config.toml", "version = 3\nimports = ['/etc/containerd/conf.d/99-tidewaiter.toml']\n"+nodetest.Generated)
	s.Restart = true
	must(t, "uninstall", Removed)(s.Uninstall(t.Context()))
	if text := s.text(t, "/etc/containerd/conf.d/99-tidewaiter.toml"); strings.Contains(text, "required_plugins") || !strings.Contains(text, "version = 3") {
		t.Error(text)
	}
	if all := s.Halts(nil, nil); len(all) > 0 {
		t.Errorf("%+v", all)
	}
}
