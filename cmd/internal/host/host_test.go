package host

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/tidewaiter/tidewaiter/cmd/internal/control"
)

// A tree is a host in a directory: content by path. A name that ends in / is a
// directory.
type tree map[string]string

func (files tree) make(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		file := filepath.Join(root, name)
		if strings.HasSuffix(name, "/") {
			file = filepath.Join(file, "x")
		}
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(name, "/") {
			if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	return root
}

// with is files and more; a file "-" is taken away.
func (files tree) with(more tree) tree {
	all := maps.Clone(files)
	for name, content := range more {
		if all[name] = content; content == "-" {
			delete(all, name)
		}
	}
	return all
}

// snapshot is everything below root: modes and digests.
func snapshot(t *testing.T, root string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		i, err := e.Info()
		if err != nil {
			return err
		}
		s := i.Mode().String()
		if i.Mode().IsRegular() {
			raw, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			s += fmt.Sprintf(" %x", sha256.Sum256(raw))
		}
		all[strings.TrimPrefix(p, root)] = s
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func same(t *testing.T, what string, was, is map[string]string) {
	t.Helper()
	for _, p := range slices.Sorted(maps.Keys(was)) {
		if is[p] != was[p] {
			t.Errorf("%s: %s was %q and is %q", what, p, was[p], is[p])
		}
	}
	for _, p := range slices.Sorted(maps.Keys(is)) {
		if _, there := was[p]; !there {
			t.Errorf("%s: %s is left", what, p)
		}
	}
}

const (
	k3sDir  = "/var/lib/rancher/k3s/agent/etc/containerd/"
	rke2Dir = "/var/lib/rancher/rke2/agent/etc/containerd/"
	snapDir = "/var/snap/microk8s/current/args/"

	pause = "registry.k8s.io/pause:3.10"
)

const generated = `
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "` + pause + `"
`

// What the distributions look like after their first start.
var (
	kubeadm = tree{
		"/usr/bin/containerd":                        "",
		"/etc/containerd/config.toml":                "version = 3\nimports = ['/etc/containerd/conf.d/*.toml']\n" + generated,
		"/usr/lib/systemd/system/containerd.service": "",
		"/run/systemd/system/":                       "",
		"/etc/systemd/system/":                       "",
		"/run/containerd/containerd.sock":            "",
	}
	bare = kubeadm.with(tree{"/etc/containerd/config.toml": "version = 3\n" + generated}) // as many guides have it
	none = kubeadm.with(tree{"/etc/containerd/config.toml": "-"})                         // as Docker's package has it

	k3s = tree{
		"/var/lib/rancher/k3s/data/current/bin/containerd": "",
		k3sDir + "config.toml":                             "version = 3\nimports = [\"" + k3sDir + "config-v3.toml.d/*.toml\"]\n" + generated,
		"/etc/systemd/system/k3s-agent.service":            "",
		"/run/systemd/system/":                             "",
		"/run/k3s/containerd/containerd.sock":              "",
	}
	oldK3s = k3s.with(tree{k3sDir + "config.toml": "version = 3\n" + generated})
	ownK3s = oldK3s.with(tree{k3sDir + "config-v3.toml.tmpl": "{{ template \"base\" . }}\n[debug]\n  level = 'debug'\n"})
	rke2   = tree{
		"/var/lib/rancher/rke2/bin/containerd":              "",
		rke2Dir + "config.toml":                             "version = 3\nimports = [\"" + rke2Dir + "config-v3.toml.d/*.toml\"]\n" + generated,
		"/usr/local/lib/systemd/system/rke2-server.service": "",
		"/run/systemd/system/":                              "",
		"/etc/systemd/system/":                              "",
		"/run/k3s/containerd/containerd.sock":               "",
	}
	microk8s = tree{
		"/snap/microk8s/current/bin/containerd":                       "",
		snapDir + "containerd-template.toml":                          "# Use config version 2\nversion = 2\noom_score = 0\n",
		snapDir + "containerd.toml":                                   "# Use config version 2\nversion = 2\noom_score = 0\n" + generated,
		"/etc/systemd/system/snap.microk8s.daemon-containerd.service": "",
		"/run/systemd/system/":                                        "",
		"/var/snap/microk8s/common/run/containerd.sock":               "",
	}
)

func TestDetect(t *testing.T) {
	both := k3s.with(kubeadm).with(tree{"/run/containerd/containerd.sock": "-"})
	for name, tt := range map[string]struct {
		files                         tree
		o                             Options
		want, service, manager, fails string
	}{
		"kubeadm":           {files: kubeadm, want: "containerd", service: "containerd", manager: "systemd"},
		"no config.toml":    {files: none, want: "containerd", service: "containerd", manager: "systemd"},
		"k3s":               {files: k3s, want: "k3s", service: "k3s-agent", manager: "systemd"},
		"k3s on Alpine":     {files: tree{"/sbin/openrc-run": "#", "/etc/init.d/k3s": "#", k3sDir + "config.toml": "#"}, want: "k3s", service: "k3s", manager: "openrc"},
		"RKE2":              {files: rke2, want: "rke2", service: "rke2-server", manager: "systemd"},
		"MicroK8s":          {files: microk8s, want: "microk8s", service: "snap.microk8s.daemon-containerd", manager: "systemd"},
		"idle Docker":       {files: both, want: "k3s", service: "k3s-agent", manager: "systemd"},
		"Docker runs":       {files: k3s.with(kubeadm).with(tree{"/run/containerd/containerd.sock": "x"}), fails: "k3s and containerd are installed here"},
		"chosen":            {files: k3s.with(kubeadm), o: Options{Runtime: "containerd"}, want: "containerd", service: "containerd", manager: "systemd"},
		"nothing":           {files: tree{"/etc/hosts": "x"}, fails: "neither k3s nor rke2 nor microk8s nor containerd is installed"},
		"nothing, to open":  {files: tree{"/etc/hosts": "x"}, o: Options{Optional: true}, manager: "none"},
		"named":             {files: tree{"/etc/hosts": "x"}, o: Options{Runtime: "k3s"}, want: "k3s", manager: "none"},
		"unknown":           {files: kubeadm, o: Options{Runtime: "docker"}, fails: `--runtime: "docker" is not known`},
		"unknown, to open":  {files: kubeadm, o: Options{Runtime: "docker", Optional: true}, fails: `--runtime: "docker" is not known`},
		"unknown service":   {files: kubeadm, o: Options{Service: "runit"}, fails: `--service: "runit" is not known`},
		"own configuration": {files: k3s, o: Options{Config: "/opt/c/config.toml"}, want: "containerd", manager: "systemd"},
	} {
		t.Run(name, func(t *testing.T) {
			tt.o.Root = tt.files.make(t)
			h, err := Detect(tt.o)
			if tt.fails != "" {
				hint := (*Hint)(nil)
				if err == nil || !strings.Contains(err.Error(), tt.fails) || !errors.As(err, &hint) || hint.Next == "" {
					t.Fatalf("want %q with a hint, got %v", tt.fails, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if h.Name != tt.want || h.Service != tt.service || h.Manager.Name != tt.manager {
				t.Errorf("got %s, service %q, %s", h.Name, h.Service, h.Manager.Name)
			}
		})
	}
}

// A scene is a host with a containerd and a gate that behave, or do not.
type scene struct {
	*Installation
	root     string
	commands []string
	said     []string
	clock    time.Time

	gate   control.Status // Mode follows config.yaml
	away   bool           // the gate does not answer until it is started
	stuck  bool           // it never registers after containerd was restarted
	broken bool           // the program that was installed last does not come up
	bad    bool           // containerd's program refuses its configuration
	loses  string         // key that is gone with our drop-in
	others int            // gates besides
	digest string         // of the pause image; empty: it has no such name
}

func stage(t *testing.T, files tree) *scene {
	t.Helper()
	s := &scene{root: files.make(t), clock: time.Unix(1e9, 0), digest: "registry.k8s.io/pause@sha256:abc"}
	h, err := Detect(Options{Root: s.root})
	if err != nil {
		t.Fatal(err)
	}
	h.Run = s.run
	s.gate = control.Status{PID: 1, Configuration: control.Configuration{Epoch: "e"}, Runtime: control.Runtime{Registered: true, Registrations: 1}}
	s.gate.Running.At = &s.clock
	s.Installation = &Installation{
		Host: h, Gate: Gate{ConfigDir: "/etc/tidewaiter", StateDir: "/var/lib/tidewaiter", RunDir: "/run/tidewaiter"}, Self: []byte("\x00one"),
		Ask: func(context.Context) (*control.Status, error) {
			if s.away {
				return nil, errors.New("no gate answers")
			}
			g := s.gate
			g.Mode, _ = s.Load(context.Background(), "/etc/tidewaiter")
			g.Judge()
			g.Ready = g.Runtime.Registered
			return &g, nil
		},
		Look: func(ctx context.Context) (*control.Status, error) {
			if s.away {
				return nil, errors.New("no gate answers")
			}
			g := s.gate
			return &g, nil
		},
		Gates: func() (int, error) {
			if s.away {
				return s.others, nil
			}
			return 1 + s.others, nil
		},
		Load: func(_ context.Context, dir string) (string, error) {
			raw, err := os.ReadFile(filepath.Join(s.root, dir, "config.yaml"))
			if err != nil {
				return "", err
			}
			m := regexp.MustCompile(`(?m)^mode: (\w+)`).FindSubmatch(raw)
			if m == nil {
				return "", errors.New("no mode")
			}
			return string(m[1]), nil
		},
		Pause: func(_ context.Context, _, name string) (string, error) {
			if s.digest == "" || name != pause {
				return "", errors.New("no such record")
			}
			return s.digest, nil
		},
		Say: func(kind, format string, args ...any) {
			s.said = append(s.said, kind+": "+fmt.Sprintf(format, args...))
		},
		Log:   func(m string) { s.said = append(s.said, "log: "+m) },
		Now:   func() time.Time { return s.clock },
		Sleep: func(_ context.Context, d time.Duration) { s.clock = s.clock.Add(d) },
	}
	return s
}

// run plays containerd's program and the services.
func (s *scene) run(_ context.Context, program string, args ...string) (string, error) {
	line := strings.Join(append([]string{program}, args...), " ")
	switch {
	case strings.HasSuffix(line, " --version"):
		return "containerd github.com/containerd/containerd/v2 v2.2.9-k3s1 deadbeef\n", nil
	case strings.HasSuffix(line, " version --output json"): // of a gate that is \x00 and its version
		raw, _ := os.ReadFile(filepath.Join(s.root, program))
		if len(raw) == 0 || !strings.HasPrefix(string(raw[1:]), "v") {
			return "", errors.New("exec format error")
		}
		return `{"version":"` + string(raw[1:]) + `"}`, nil
	case strings.HasSuffix(line, " config dump"):
		if s.bad {
			return "", errors.New("exit status 1: containerd: invalid disabled plugin URI")
		}
		return s.dump(args[1])
	}
	s.commands = append(s.commands, line)
	switch {
	case strings.Contains(line, "restart tidewaiter"), strings.Contains(line, "tidewaiter restart"):
		raw, _ := os.ReadFile(filepath.Join(s.root, GateBinary))
		s.away = s.broken && string(raw) == string(s.Self)
		s.gate.PID++
	case strings.Contains(line, "disable --now tidewaiter"), strings.Contains(line, "tidewaiter stop"):
		s.away = true
	case strings.Contains(line, "restart"): // containerd
		s.gate.Runtime.Registrations++
		s.gate.Runtime.Registered = !s.stuck
		s.gate.Runtime.Since = new(s.clock)
	}
	return "", nil
}

// dump merges files as containerd 2.x does: tables deeply, lists replaced, later files
// winning; imports only of what names them.
func (s *scene) dump(config string) (string, error) {
	merged := map[string]any{"version": 3, "plugins": map[string]any{"io.containerd.nri.v1.nri": map[string]any{
		"disable": false, "socket_path": "/var/run/nri/nri.sock", "default_validator": map[string]any{"enable": false},
	}}}
	var merge func(into, from map[string]any)
	merge = func(into, from map[string]any) {
		for k, v := range from {
			if t, ok := v.(map[string]any); ok {
				if have, ok := into[k].(map[string]any); ok {
					merge(have, t)
					continue
				}
			}
			into[k] = v
		}
	}
	for pending := []string{config}; len(pending) > 0; pending = pending[1:] {
		raw, err := os.ReadFile(filepath.Join(s.root, pending[0]))
		if err != nil && len(pending) == 1 && pending[0] == config {
			break
		}
		if err != nil {
			return "", err
		}
		var one map[string]any
		if err := toml.Unmarshal(raw, &one); err != nil {
			return "", fmt.Errorf("failed to unmarshal TOML: %w", err)
		}
		for _, pattern := range list(one, "imports") {
			files, _ := filepath.Glob(filepath.Join(s.root, pattern))
			for _, f := range files {
				pending = append(pending, strings.TrimPrefix(f, s.root))
			}
		}
		delete(one, "version")
		// Version 2 as containerd migrates it.
		if cri := table(table(one, "plugins"), "io.containerd.grpc.v1.cri"); cri != nil {
			delete(table(one, "plugins"), "io.containerd.grpc.v1.cri")
			table(one, "plugins")["io.containerd.cri.v1.images"] = map[string]any{"pinned_images": map[string]any{"sandbox": cri["sandbox_image"]}}
		}
		merge(merged, one)
		if s.loses != "" && path.Base(pending[0]) != dropIn {
			merged[s.loses] = 1
		} else if s.loses != "" {
			delete(merged, s.loses)
		}
	}
	out, err := toml.Marshal(merged)
	return string(out), err
}

func (s *scene) text(t *testing.T, name string) string {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(s.root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

func (s *scene) heard(t *testing.T, want string) {
	t.Helper()
	if !strings.Contains(strings.Join(s.said, "\n"), want) {
		t.Errorf("%q was not said:\n%s", want, strings.Join(s.said, "\n"))
	}
}

func must(t *testing.T, what string, want Result) func(Result, error) {
	return func(got Result, err error) {
		t.Helper()
		if err != nil || got != want {
			t.Fatalf("%s: %s, %v (want %s)", what, got, err, want)
		}
	}
}

func refused(t *testing.T, what, want string) func(Result, error) {
	return func(got Result, err error) {
		t.Helper()
		h := (*Hint)(nil)
		if err == nil || !errors.As(err, &h) || !h.No || !strings.Contains(err.Error(), want) {
			t.Fatalf("%s: %s, %v (want a refusal with %q)", what, got, err, want)
		}
	}
}

// TestLife installs, enforces, opens and removes on each distribution.
func TestLife(t *testing.T) {
	for name, tt := range map[string]struct {
		files    tree
		restart  string
		required string // file that requires the gate
		pinned   bool
	}{
		"kubeadm":             {kubeadm, "systemctl restart containerd.service", "/etc/containerd/conf.d/99-tidewaiter.toml", true},
		"without imports":     {bare, "systemctl restart containerd.service", "/etc/containerd/conf.d/99-tidewaiter.toml", true},
		"without config.toml": {none, "systemctl restart containerd.service", "/etc/containerd/conf.d/99-tidewaiter.toml", false},
		"k3s":                 {k3s, "systemctl restart k3s-agent.service", k3sDir + "config-v3.toml.d/99-tidewaiter.toml", true},
		"older k3s":           {oldK3s, "systemctl restart k3s-agent.service", k3sDir + "config-v3.toml.tmpl", false},
		"k3s with a template": {ownK3s, "systemctl restart k3s-agent.service", k3sDir + "config-v3.toml.tmpl", false},
		"k3s, version 2":      {k3s.with(tree{k3sDir + "config.toml": "version = 2\n", k3sDir + "config.toml.tmpl": "version = 2\n"}), "systemctl restart k3s-agent.service", k3sDir + "config.toml.tmpl", false},
		"k3s on Alpine":       {alpineTree(), "rc-service k3s restart", k3sDir + "config-v3.toml.d/99-tidewaiter.toml", true},
		"RKE2":                {rke2, "systemctl restart rke2-server.service", rke2Dir + "config-v3.toml.d/99-tidewaiter.toml", true},
		"MicroK8s":            {microk8s, "systemctl restart snap.microk8s.daemon-containerd.service", snapDir + "containerd.d/99-tidewaiter.toml", true},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := t.Context()
			s := stage(t, tt.files)
			if s.Name == "containerd" && tt.required == "" {
				t.Fatal("no file")
			}
			clean := snapshot(t, s.root)
			s.away = true
			s.Print = true
			must(t, "print", Printed)(s.Install(ctx))
			same(t, "print", clean, snapshot(t, s.root))
			s.Print = false
			must(t, "install", Installed)(s.Install(ctx))
			audit := snapshot(t, s.root)
			for p := range audit {
				if clean[p] != audit[p] && strings.Contains(p, "containerd") {
					t.Errorf("install touched %s", p)
				}
			}
			must(t, "again", Nothing)(s.Install(ctx))

			s.Enforce = true
			s.Print = true
			must(t, "print enforce", Printed)(s.Install(ctx))
			same(t, "print enforce", audit, snapshot(t, s.root))
			s.heard(t, "would: change /etc/tidewaiter/config.yaml")
			s.Print = false
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
			_, err := os.Stat(filepath.Join(s.root, path.Dir(tt.required), dropInPause))
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

func alpineTree() tree {
	files := tree{"/sbin/openrc-run": "#", "/etc/init.d/k3s": "#"}
	for _, name := range []string{"/var/lib/rancher/k3s/data/current/bin/containerd", k3sDir + "config.toml", "/run/k3s/containerd/containerd.sock"} {
		files[name] = k3s[name]
	}
	return files
}

// enforcing is a scene in which the gate audits.
func auditing(t *testing.T, files tree) *scene {
	t.Helper()
	s := stage(t, files)
	s.away = true
	must(t, "install", Installed)(s.Install(t.Context()))
	s.Enforce, s.Restart = true, true
	return s
}

func TestEnforceIsRefused(t *testing.T) {
	for name, tt := range map[string]struct {
		files tree
		set   func(*scene)
		want  string
	}{
		"what runs":            {kubeadm, func(s *scene) { s.gate.Running.Reasons = map[string]int{"VERIFIED": 3, "SIGNATURE_MISSING": 2} }, "2 of what runs here would be refused"},
		"no image":             {kubeadm, func(s *scene) { s.gate.Running.Gone = 1 }, "1 of what runs"},
		"the pause image":      {kubeadm, func(s *scene) { s.gate.Running.Pauses = []control.Pause{{Image: pause, Reason: "SIGNATURE_MISSING"}} }, "1 of what runs"},
		"not looked":           {kubeadm, func(s *scene) { s.gate.Running.At = nil }, "not looked at everything"},
		"not seen all":         {kubeadm, func(s *scene) { s.gate.Running.Error = "timeout" }, "timeout"},
		"no gate":              {kubeadm, func(s *scene) { s.away = true }, "no gate runs here"},
		"no configuration":     {kubeadm, func(s *scene) { s.gate.Configuration.Epoch = "" }, "would refuse everything"},
		"rejected":             {kubeadm, func(s *scene) { s.gate.Configuration.Rejected = &control.Rejected{Current: true, Error: "line 3"} }, "line 3"},
		"NRI off":              {kubeadm.with(tree{"/etc/containerd/conf.d/10.toml": "version = 3\n[plugins.'io.containerd.nri.v1.nri']\n  disable = true\n"}), func(*scene) {}, "NRI is switched off"},
		"CRI off":              {kubeadm.with(tree{"/etc/containerd/conf.d/10.toml": "version = 3\ndisabled_plugins = ['io.containerd.grpc.v1.cri']\n"}), func(*scene) {}, "CRI is switched off"},
		"imports no directory": {kubeadm.with(tree{"/etc/containerd/config.toml": "version = 3\nimports = ['/etc/containerd/other.toml']\n", "/etc/containerd/other.toml": "version = 3\n"}), func(*scene) {}, "no directory for a file of ours"},
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
			s.write(t, "/etc/containerd/conf.d/99-zz.toml", "version = 3\n[plugins.'io.containerd.cri.v1.images'.pinned_images]\n  sandbox = '"+pause+"'\n")
		}, "would use the pause image", 0},
		"the gate does not enforce":        {func(t *testing.T, s *scene) { s.gate.Runtime.Registered = false }, "not registered to enforce: after 1m0s", 0},
		"not registered after the restart": {func(t *testing.T, s *scene) { s.stuck = true }, "not registered after the restart of containerd: after 1m0s", 2},
		"a DaemonSet's gate":               {func(t *testing.T, s *scene) { s.others = 1 }, "2 gates run on this node", 0},
		"no such line": {func(t *testing.T, s *scene) {
			s.write(t, "/etc/tidewaiter/config.yaml", "version: 1\nmode:   audit\nmode: audit\n")
		}, "not there in a form", 0},
	} {
		t.Run(name, func(t *testing.T) {
			s := auditing(t, kubeadm)
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

func (s *scene) write(t *testing.T, name, content string) {
	t.Helper()
	file := filepath.Join(s.root, name)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestUpgrade keeps the previous program, and goes back to it.
func TestUpgrade(t *testing.T) {
	s := auditing(t, k3s)
	must(t, "enforce", Enforces)(s.Install(t.Context()))
	s.Enforce, s.Restart = false, false
	s.Self = []byte("\x00two")
	must(t, "upgrade", Installed)(s.Install(t.Context()))
	if s.text(t, GateBinary) != "\x00two" || s.text(t, GateBinary+".previous") != "\x00one" {
		t.Error("not the new program, or not the old one beside it")
	}
	was := snapshot(t, s.root)
	s.Self, s.broken = []byte("\x00three"), true
	refused(t, "a broken one", "the gate did not come up: after 1m0s")(s.Install(t.Context()))
	same(t, "taken back", was, snapshot(t, s.root))
	if s.away {
		t.Error("the previous program was not started")
	}
	s.heard(t, "log: install: the gate did not come up")
}

// TestFirstStartFails leaves nothing of a program that never ran here.
func TestFirstStartFails(t *testing.T) {
	s := stage(t, kubeadm)
	clean := snapshot(t, s.root)
	s.away, s.broken = true, true
	refused(t, "install", "did not come up")(s.Install(t.Context()))
	is := snapshot(t, s.root)
	for _, left := range []string{"/var/lib/tidewaiter/install.json", "/var/lib/tidewaiter", "/var/lib", "/var"} {
		delete(is, left) // what it needs to take away what it could not
	}
	same(t, "taken back", clean, is)
	if last := s.commands[len(s.commands)-1]; last != "systemctl daemon-reload" {
		t.Errorf("last was %s", last)
	}
}

// TestOperatorsFiles are never overwritten.
func TestOperatorsFiles(t *testing.T) {
	unit := "[Service]\nExecStart=/usr/local/bin/tidewaiter run --node x\n"
	s := stage(t, k3s.with(tree{
		"/etc/systemd/system/tidewaiter.service": unit, Defaults: "TIDEWAITER_NODE=x\n",
		"/etc/tidewaiter/config.yaml": "version: 1\nmode: audit # for now\n", "/etc/tidewaiter/trustpolicy.json": "{}",
	}))
	must(t, "install", Installed)(s.Install(t.Context()))
	if s.text(t, "/etc/systemd/system/tidewaiter.service") != unit || s.text(t, Defaults) != "TIDEWAITER_NODE=x\n" {
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

	s = stage(t, kubeadm.with(tree{"/etc/tidewaiter/config.yaml": "version: 1\nmode: enforce\n"}))
	s.away = true
	refused(t, "install", "the configuration says mode: enforce")(s.Install(t.Context()))

	// What the hints of both say leads out: neither only names the other.
	s.Enforce = true
	refused(t, "enforce without a gate", "no gate runs here")(s.Install(t.Context()))
	s.write(t, "/etc/tidewaiter/config.yaml", "version: 1\nmode: audit\n")
	s.Enforce, s.away = false, false
	must(t, "install", Installed)(s.Install(t.Context()))
	s.Enforce = true
	must(t, "enforce", Installed)(s.Install(t.Context()))
}

// TestRegisters waits a moment for containerd to ask a new gate, and no longer.
func TestRegisters(t *testing.T) {
	for _, late := range []int{1, 8, 1000} {
		s := stage(t, kubeadm)
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
	s := auditing(t, kubeadm.with(tree{"/etc/containerd/conf.d/10.toml": "version = 3\n[plugins.'io.containerd.nri.v1.nri'.default_validator]\n  enable = true\n  required_plugins = ['x\"y']\n  tolerate_missing_plugins_annotation = 'skip.example'\n"}))
	must(t, "enforce", Enforces)(s.Install(t.Context()))
	if text := s.text(t, "/etc/containerd/conf.d/99-tidewaiter.toml"); !strings.Contains(text, `required_plugins = ["x\"y", "tidewaiter"]`) {
		t.Error(text)
	}
	s.heard(t, "warn: containerd lets every pod with the annotation skip.example do without")
	must(t, "again", Nothing)(s.Install(t.Context()))
}

// TestOpenWithoutAnything opens a node on which nothing is recognised and no record
// was left, and one of whose files cannot be read.
func TestOpenWithoutAnything(t *testing.T) {
	root := tree{
		k3sDir + "config-v3.toml.d/99-tidewaiter.toml": "x",
		snapDir + "containerd-template.toml":           "imports = ['x'] # " + marker + "\nversion = 2\n",
		"/etc/containerd/config.toml":                  "version = 3 # " + marker + "\nimports = [] # " + marker + "\n",
	}.make(t)
	if err := os.Symlink("/nowhere", filepath.Join(root, "/etc/containerd/conf.d")); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(root, rke2Dir, "config.toml"), 0o755); err != nil {
		t.Fatal(err)
	}
	h, err := Detect(Options{Root: root, Optional: true})
	if err != nil {
		t.Fatal(err)
	}
	i := &Installation{Host: h, Gate: Gate{ConfigDir: "/etc/tidewaiter", StateDir: "/var/lib/tidewaiter", RunDir: "/run/tidewaiter"}, Say: func(string, string, ...any) {}, Log: func(string) {}, Now: time.Now,
		Ask: func(context.Context) (*control.Status, error) { return nil, errors.New("dead") }}
	if _, err := i.Uninstall(t.Context()); err == nil || !strings.Contains(err.Error(), rke2Dir+"config.toml is not a regular file") {
		t.Errorf("got %v", err)
	}
	for name, want := range map[string]string{k3sDir + "config-v3.toml.d/99-tidewaiter.toml": "", snapDir + "containerd-template.toml": "version = 2\n", "/etc/containerd/config.toml": ""} {
		raw, _ := os.ReadFile(filepath.Join(root, name))
		if string(raw) != want {
			t.Errorf("%s: %q", name, raw)
		}
	}
}

// TestPlaces are what may be removed with all that it holds, and named in a unit.
func TestPlaces(t *testing.T) {
	for _, bad := range []string{"", "/", "/.", "etc", "/etc", "/etc/..", "/etc/x/..", ".", "/etc/a b", "/etc/a%n", "/etc/a\nExecStart=x"} {
		for _, set := range []func(*Installation){
			func(i *Installation) { i.ConfigDir = bad }, func(i *Installation) { i.StateDir = bad },
			func(i *Installation) { i.RunDir = bad }, func(i *Installation) { i.Program = cmp.Or(bad, "x") },
		} {
			s := stage(t, kubeadm.with(tree{"/etc/passwd": "root"}))
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
		s := stage(t, kubeadm)
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
		if !s.exists(tt.state) || !strings.HasPrefix(tt.run, "/run/") && !s.exists(tt.run) {
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
	s := stage(t, kubeadm)
	must(t, "install", Installed)(s.Install(t.Context()))
	for _, self := range []string{"\x00one", "\x00two"} {
		s.Self = []byte(self)
		for _, name := range []string{GateBinary, unit} {
			if err := os.Chown(s.Path(name), 1000, 1000); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(s.Path(name), 0o777); err != nil {
				t.Fatal(err)
			}
		}
		must(t, self, Installed)(s.Install(t.Context()))
		for name, mode := range map[string]os.FileMode{GateBinary: 0o755, unit: 0o644} {
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
	root := tree{
		"/data/rancher/k3s/data/abc/bin/containerd":                         "#!",
		"/data/rancher/k3s/agent/etc/containerd/config-v3.toml.d/" + dropIn: "x",
		"/data/rancher/k3s/agent/etc/containerd/config.toml":                "version = 3\n",
		"/usr/local/bin/": "",
	}.make(t)
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
	h, err := Detect(Options{Root: root})
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
	if !h.exists("/etc/alternatives/c") || h.exists("/loop") || h.exists("/loop/x") {
		t.Error("what is there")
	}
	i := &Installation{Host: h, Gate: Gate{ConfigDir: "/etc/tidewaiter", StateDir: "/var/lib/tidewaiter", RunDir: "/run/tidewaiter"}, Say: func(string, string, ...any) {}, Log: func(string) {}, Now: time.Now,
		Ask: func(context.Context) (*control.Status, error) { return nil, errors.New("dead") }}
	h.Run = func(context.Context, string, ...string) (string, error) { return "", errors.New("no program") }
	if _, err := i.Uninstall(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(root, "/data/rancher/k3s/agent/etc/containerd/config-v3.toml.d", dropIn)); err == nil {
		t.Error("k3s still requires the gate")
	}
}

// TestPowerCut before the record of a drop-in in a directory of the operator's choice
// would leave one that uninstall does not find.
func TestPowerCut(t *testing.T) {
	s := auditing(t, kubeadm.with(tree{"/etc/containerd/config.toml": "version = 3\nimports = ['/opt/x/*.toml']\n"}))
	s.Restart = false
	s.Run = func(ctx context.Context, program string, args ...string) (string, error) {
		if slices.Contains(args, "dump") && s.exists("/opt/x/"+dropIn) {
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
	if !s.exists("/opt/x/" + dropIn) {
		t.Fatal("cut too early")
	}
	if r := s.remembered(); !slices.Contains(r.DropIns, "/opt/x") {
		t.Errorf("%+v", r)
	}
	s.Run = s.run
	s.Restart = true
	must(t, "uninstall", Removed)(s.Uninstall(t.Context()))
	if s.exists("/opt/x/" + dropIn) {
		t.Error("containerd still requires a gate that is gone")
	}
}

// TestRequiredByOthers: the gate does not go where an operator's own file requires it.
func TestRequiredByOthers(t *testing.T) {
	s := auditing(t, kubeadm)
	must(t, "enforce", Enforces)(s.Install(t.Context()))
	s.write(t, "/etc/containerd/conf.d/50-own.toml", "version = 3\n[plugins.'io.containerd.nri.v1.nri'.default_validator]\n  enable = true\n  required_plugins = ['99-tidewaiter']\n")
	s.Restart = true
	if _, err := s.Uninstall(t.Context()); err == nil || !strings.Contains(err.Error(), "/etc/containerd/conf.d/50-own.toml:4 requires it") {
		t.Errorf("got %v", err)
	}
	if !s.exists(GateBinary) || s.away {
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
			s := stage(t, kubeadm)
			must(t, "install", Installed)(s.Install(t.Context()))
			tt.set(s)
			s.Restart = true
			must(t, "uninstall", Removed)(s.Uninstall(t.Context()))
			if got := slices.Contains(s.commands, restart); got != tt.want {
				t.Errorf("restarted: %v", got)
			}
			if !s.away || s.exists(GateBinary) {
				t.Error("the gate is still there")
			}
		})
	}
}

// TestPurgeBesideAnotherGate leaves what that one uses.
func TestPurgeBesideAnotherGate(t *testing.T) {
	s := auditing(t, kubeadm)
	s.write(t, "/var/lib/tidewaiter/store", "")
	s.write(t, "/run/tidewaiter/control.sock", "")
	s.others, s.Purge = 1, true
	if _, err := s.Uninstall(t.Context()); err == nil || !strings.Contains(err.Error(), "another gate still runs here: /var/lib/tidewaiter and /run/tidewaiter stay") {
		t.Errorf("%v", err)
	}
	if s.exists("/etc/tidewaiter") || s.exists(GateBinary) || !s.exists("/var/lib/tidewaiter/store") || !s.exists("/run/tidewaiter/control.sock") {
		t.Error("not what is the host's is gone, and what both use there")
	}
	s.Gates = func() (int, error) { return 0, errors.New("no leave") }
	if _, err := s.Uninstall(t.Context()); err == nil || !strings.Contains(err.Error(), "cannot be found out") {
		t.Errorf("%v", err)
	}
	s.Force = true
	must(t, "uninstall --purge --force", Removed)(s.Uninstall(t.Context()))
	if s.exists("/var/lib/tidewaiter") || s.exists("/run/tidewaiter") {
		t.Error("something is left")
	}
}

// TestPurgeOfShared leaves what may hold other things than the gate's.
func TestPurgeOfShared(t *testing.T) {
	for state, goes := range map[string]bool{
		"/var/lib": false, "/var/lib/other": false, "/data/gate": true, "/data/tidewaiter-1": true, "/var/lib/tidewaiter": true, "/var/tidewaiter": true,
	} {
		s := stage(t, kubeadm.with(tree{state + "/precious": "x"}))
		if state == "/data/gate" {
			s.write(t, state+"/store/x", "")
		}
		s.StateDir = state
		s.Purge, s.away = true, true
		must(t, "uninstall", Removed)(s.Uninstall(t.Context()))
		if s.exists(state+"/precious") == goes {
			t.Errorf("%s: gone: %v", state, !goes)
		}
		if !goes {
			s.heard(t, "warn: "+state+" stays")
		}
	}
	s := stage(t, kubeadm.with(tree{"/var/lib/precious": "x"}))
	s.StateDir = "/var/lib"
	must(t, "install", Installed)(s.Install(t.Context()))
	s.Purge = true
	must(t, "uninstall", Removed)(s.Uninstall(t.Context()))
	if !s.exists("/var/lib/precious") || s.exists("/var/lib/install.json") || s.exists("/etc/tidewaiter") {
		t.Error("not what is the gate's is gone, and the rest there")
	}
}

// TestLogs names logs that there are.
func TestLogs(t *testing.T) {
	for name, want := range map[string]string{"systemd": "journalctl", "openrc": "/var/log/tidewaiter.log", "none": "/opt/gate run"} {
		if got := (Manager{Name: name}).logs("/opt/gate"); !strings.Contains(got, want) || name != "systemd" && strings.Contains(got, "journalctl") {
			t.Errorf("%s: %s", name, got)
		}
	}
}

// TestListThatDidNotCount stays what it was, and NRI that is switched off by name is
// seen.
func TestListThatDidNotCount(t *testing.T) {
	s := auditing(t, kubeadm.with(tree{"/etc/containerd/conf.d/10.toml": "version = 3\n[plugins.'io.containerd.nri.v1.nri'.default_validator]\n  enable = false\n  required_plugins = ['gone']\n"}))
	must(t, "enforce", Enforces)(s.Install(t.Context()))
	if text := s.text(t, "/etc/containerd/conf.d/99-tidewaiter.toml"); !strings.Contains(text, `required_plugins = ["tidewaiter"]`) {
		t.Error(text)
	}
	s = auditing(t, kubeadm.with(tree{"/etc/containerd/conf.d/10.toml": "version = 3\ndisabled_plugins = ['io.containerd.nri.v1.nri']\n"}))
	was := snapshot(t, s.root)
	refused(t, "enforce", "NRI is switched off")(s.Install(t.Context()))
	same(t, "refused", was, snapshot(t, s.root))
}

// TestInterrupted: who ends an installation gets the node as it was, services too.
func TestInterrupted(t *testing.T) {
	s := auditing(t, kubeadm)
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

func TestParseDump(t *testing.T) {
	for _, version := range []string{"2.4.2", "2.2.9", "2.1.9"} {
		raw, err := os.ReadFile("testdata/dump-" + version + ".toml") // printed by that containerd, with a drop-in that requires the gate
		if err != nil {
			t.Fatal(err)
		}
		e, err := parseDump(raw)
		if err != nil {
			t.Fatal(err)
		}
		knows := version != "2.1.9"
		if e.Knows != knows || e.Requires("tidewaiter") != knows || e.Requires("other") || e.NRIDisabled || e.ConnectionsDisabled {
			t.Errorf("%s: %+v", version, e)
		}
		if e.NoCRI || e.Socket != "/run/containerd/containerd.sock" || e.NRISocket != "/var/run/nri/nri.sock" || e.RequestTimeout != "2s" || e.RegistrationTimeout != "5s" ||
			e.Pause != pause || e.Snapshotter != "overlayfs" || e.Runtimes["runc"] != "io.containerd.runc.v2" || e.Toleration != "" {
			t.Errorf("%s: %+v", version, e)
		}
	}
	for raw, want := range map[string]string{
		"version = 2\n":     "older than containerd 2.0",
		"":                  "older than containerd 2.0",
		"version = 3\n[x\n": "containerd's config dump",
	} {
		if _, err := parseDump([]byte(raw)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", raw, err)
		}
	}
	e, err := parseDump([]byte("version = 3\nplugins = 5\nimports = [1]\n"))
	if err != nil || !e.NRIDisabled || e.Requires("tidewaiter") {
		t.Errorf("%+v, %v", e, err)
	}
}

func TestVersion(t *testing.T) {
	for said, want := range map[string]string{
		"containerd github.com/containerd/containerd/v2 v2.4.2 1e2b3c\n":    "2.4",
		"containerd github.com/containerd/containerd/v2 2.2.9+unknown \n":   "2.2",
		"containerd github.com/k3s-io/containerd/v2 v2.3.4-k3s1\n":          "2.3",
		"containerd containerd.io 1.7.35\n":                                 "1.7",
		"containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24~ds1": "1.7",
		"nonsense": "",
	} {
		h := &Host{Binary: "c", Run: func(context.Context, string, ...string) (string, error) { return said, nil }}
		major, minor, err := h.Version(t.Context())
		if got := fmt.Sprintf("%d.%d", major, minor); err == nil && got != want || (err != nil) != (want == "") {
			t.Errorf("%q: %s, %v", said, got, err)
		}
	}
}

func TestExec(t *testing.T) {
	run := Exec("/")
	if out, err := run(t.Context(), "sh", "-c", "echo $PATH; env | wc -l"); err != nil || !strings.HasPrefix(out, "/usr/local/sbin:") {
		t.Errorf("%q, %v", out, err)
	}
	if _, err := run(t.Context(), "sh", "-c", `echo first >&2; printf 'it is\033[2J broken\n' >&2; exit 3`); err == nil || strings.Contains(err.Error(), "\x1b") || !strings.Contains(err.Error(), "broken") {
		t.Errorf("%v", err)
	}
	if _, err := run(t.Context(), "sh", "-c", "head -c 9000000 /dev/zero"); err == nil || !strings.Contains(err.Error(), "too much") {
		t.Errorf("%v", err)
	}
	if out, err := run(t.Context(), "sh", "-c", "cut -d' ' -f5 /proc/$$/stat; echo $$"); err != nil || len(strings.Fields(out)) != 2 || strings.Fields(out)[0] != strings.Fields(out)[1] {
		t.Errorf("not a process group of its own: %q, %v", out, err)
	}
	if _, err := run(t.Context(), "no-such-program"); err == nil || !strings.Contains(err.Error(), "there is no no-such-program on this host") {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := run(ctx, "sleep", "60"); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

// TestFollow has a mounted ConfigMap be the configuration of the host.
func TestFollow(t *testing.T) {
	s := stage(t, k3s)
	s.away = true
	from := t.TempDir()
	write := func(version, config string) {
		t.Helper()
		dir := filepath.Join(from, ".."+version)
		if err := os.MkdirAll(filepath.Join(dir, "truststore"), 0o755); err != nil {
			t.Fatal(err)
		}
		for name, text := range map[string]string{"config.yaml": config, "trustpolicy.json": "{}", "truststore/ca.crt": version} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		os.Remove(filepath.Join(from, "..data"))
		if err := os.Symlink(".."+version, filepath.Join(from, "..data")); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"config.yaml", "trustpolicy.json", "truststore"} {
			_ = os.Symlink("..data/"+name, filepath.Join(from, name))
		}
	}
	write("one", "mode: audit\n")
	s.From = from
	// What an operator wrote stays beside it.
	s.write(t, "/etc/tidewaiter/config.yaml", "mode: audit # mine\n")
	s.write(t, "/etc/tidewaiter/node.key", "secret")
	must(t, "install", Installed)(s.Install(t.Context()))
	if s.exists("/etc/tidewaiter/node.key") || s.text(t, "/etc/tidewaiter.before/node.key") != "secret" || s.text(t, "/etc/tidewaiter.before/config.yaml") != "mode: audit # mine\n" {
		t.Error("the operator's configuration is gone, or not replaced")
	}
	if info, err := os.Stat(s.Path("/etc/tidewaiter.before")); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", info, err)
	}
	if got := s.text(t, "/etc/tidewaiter/truststore/ca.crt"); got != "one" {
		t.Errorf("%q", got)
	}
	must(t, "again", Nothing)(s.Install(t.Context()))
	write("two", "mode: audit\n")
	must(t, "a change", Installed)(s.Install(t.Context()))
	if s.exists("/etc/tidewaiter.before/truststore") {
		t.Error("a copy was kept as if it were the operator's")
	}
	if got := s.text(t, "/etc/tidewaiter/truststore/ca.crt"); got != "two" {
		t.Errorf("%q", got)
	}
	was := snapshot(t, s.root)
	write("three", "broken\n")
	if _, err := s.Install(t.Context()); err == nil || !strings.Contains(err.Error(), "is not valid on the host") {
		t.Errorf("%v", err)
	}
	same(t, "a broken one", was, snapshot(t, s.root))
	write("four", "mode: audit\n")
	s.Enforce, s.Restart = true, true
	refused(t, "enforce", "says mode: audit")(s.Install(t.Context()))
	write("five", "mode: enforce\n")
	must(t, "enforce", Enforces)(s.Install(t.Context()))
	s.Restart = false
	// A program that does not come up is tried once.
	s.Self, s.broken = []byte("\x00two"), true
	refused(t, "a broken program", "did not come up")(s.Install(t.Context()))
	s.Keep = true
	must(t, "after that", Nothing)(s.Install(t.Context()))
	// The way back by ConfigMap.
	write("six", "mode: audit\n")
	s.Enforce = false
	must(t, "back to audit", Installed)(s.Install(t.Context()))
	if got := s.text(t, "/etc/tidewaiter/config.yaml"); got != "mode: audit\n" {
		t.Errorf("%q", got)
	}
}

// TestFollowsForward: of several pods that follow, the one with the newest program wins,
// and each is quiet after that. What cannot be compared is put there once.
func TestFollowsForward(t *testing.T) {
	for name, tt := range map[string]struct{ pods, hosts []string }{
		"a newer one":        {[]string{"v1.2.0", "v1.2.1"}, []string{"v1.2.0", "v1.2.1"}},
		"an older one":       {[]string{"v1.10.0", "v1.9.3"}, []string{"v1.10.0", "v1.10.0"}},
		"commits after it":   {[]string{"v1.2.0", "v1.2.0-4-gdeadbee", "v1.2.0"}, []string{"v1.2.0", "v1.2.0-4-gdeadbee", "v1.2.0-4-gdeadbee"}},
		"a candidate":        {[]string{"v1.2.0-rc.9", "v1.2.0-rc.10", "v1.2.0", "v1.2.0-rc.10"}, []string{"v1.2.0-rc.9", "v1.2.0-rc.10", "v1.2.0", "v1.2.0"}},
		"beside each other":  {[]string{"v1.0.0", "v1.1.0", "v1.0.0", "v1.1.0"}, []string{"v1.0.0", "v1.1.0", "v1.1.0", "v1.1.0"}},
		"not to be compared": {[]string{"one", "two", "one", "two", "three", "one"}, []string{"one", "two", "two", "two", "three", "three"}},
		"with local changes": {[]string{"v1.1.0-dirty", "v1.0.0", "v1.1.0-dirty"}, []string{"v1.1.0-dirty", "v1.0.0", "v1.0.0"}},
		"a hash of git":      {[]string{"v0", "v1.0.0", "v0"}, []string{"v0", "v1.0.0", "v1.0.0"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := stage(t, kubeadm)
			s.away, s.Follow = true, true
			for k, v := range tt.pods {
				s.Self, s.Release = []byte("\x00"+v), v
				was := ""
				if k > 0 {
					was = tt.hosts[k-1]
				}
				want := Installed
				if tt.hosts[k] == was {
					want = Nothing
				}
				must(t, "pod of "+v, want)(s.Install(t.Context()))
				if got := s.text(t, GateBinary)[1:]; got != tt.hosts[k] {
					t.Fatalf("after the pod of %s the host has %s, want %s", v, got, tt.hosts[k])
				}
				if string(s.Self[1:]) != v || s.Keep {
					t.Errorf("the pod of %s forgot its program", v)
				}
				n := len(s.commands)
				must(t, "again", Nothing)(s.Install(t.Context()))
				if len(s.commands) != n {
					t.Errorf("ran %v", s.commands[n:])
				}
			}
			// By hand any program is put there, and stays where it cannot be compared.
			s.Follow = false
			s.Self = []byte("\x00" + tt.pods[0])
			if _, err := s.Install(t.Context()); err != nil || s.text(t, GateBinary)[1:] != tt.pods[0] {
				t.Errorf("by hand: %v", err)
			}
		})
	}
}

// TestKeptService: an older pod leaves the service to the newer program, too.
func TestKeptService(t *testing.T) {
	s := stage(t, kubeadm)
	s.away, s.Follow = true, true
	s.Self, s.Release = []byte("\x00v2.0.0"), "v2.0.0"
	must(t, "install", Installed)(s.Install(t.Context()))
	const unit = "/etc/systemd/system/tidewaiter.service"
	s.write(t, unit, s.text(t, unit)+"# newer\n")
	s.Self, s.Release = []byte("\x00v1.0.0"), "v1.0.0"
	must(t, "an older pod", Nothing)(s.Install(t.Context()))
	s.Self, s.Release = []byte("\x00v3.0.0"), "v3.0.0"
	must(t, "a newer pod", Installed)(s.Install(t.Context()))
	if strings.Contains(s.text(t, unit), "# newer") {
		t.Error("a newer program left the service of an older one")
	}
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
			s := auditing(t, kubeadm)
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
					wrote, err := s.Changed("/etc/containerd/conf.d/" + dropInPause)
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

// TestLock: two that change a host do so one after the other, and one that only prints
// waits for nobody.
func TestLock(t *testing.T) {
	for name, files := range map[string]tree{"host": kubeadm, "nothing runs": {"/etc/containerd/config.toml": "version = 3\n"}} {
		t.Run(name, func(t *testing.T) {
			s := stage(t, files)
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
			s.Print = true
			must(t, "print", Printed)(s.Install(t.Context()))
			s.Print = false
			same(t, "busy", was, snapshot(t, s.root))
			// It goes on as soon as the other is done.
			sleep := s.Sleep
			s.Sleep = func(ctx context.Context, d time.Duration) { release(); sleep(ctx, d) }
			must(t, "install", Installed)(s.Install(t.Context()))
			if left, _ := filepath.Glob(filepath.Join(s.root, "*.lock")); len(left) > 0 || s.exists("/run/"+lockHost) {
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
				d, err := os.Open(s.target(dir))
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
			s := auditing(t, kubeadm)
			must(t, "enforce", Enforces)(s.Install(t.Context()))
			set(t, s)
			if name == "somebody holds what all can read" {
				release, err := s.alone(t.Context(), func(_ Result, err error) { t.Error(err) })
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
	s := auditing(t, kubeadm)
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
				if errors.Is(err, syscall.EWOULDBLOCK) {
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
