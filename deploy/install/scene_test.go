package install

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/node"

	"github.com/pelletier/go-toml/v2"

	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/deploy/node/nodetest"
)

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

// A scene is a host with a containerd and a gate that behave, or do not.
type scene struct {
	*Installation
	root     string
	commands []string
	said     []string
	clock    time.Time

	gate    control.Status // Mode and Revision follow the configuration, unless the latter is empty
	running string         // the program of the gate; empty: one that takes everything
	force   Configured     // what the gate read last and took

	away   bool   // the gate does not answer until it is started
	stuck  bool   // it does not register with a containerd that requires it
	broken bool   // the program that was installed last does not come up
	bad    bool   // containerd's program refuses its configuration
	loses  string // key that is gone with our drop-in
	others int    // gates besides
	digest string // of the pause image; empty: it has no such name
}

func newScene(t *testing.T, files nodetest.Tree) *scene {
	t.Helper()
	s := &scene{root: files.Make(t), clock: time.Unix(1e9, 0), digest: "registry.k8s.io/pause@sha256:abc"}
	h, err := node.Detect(node.Options{Root: s.root})
	if err != nil {
		t.Fatal(err)
	}
	h.Run = s.run
	s.gate = control.Status{PID: 1, Configuration: control.Configuration{Revision: "e", WaitingForConfig: true}, Runtime: control.Runtime{Registered: true, Registrations: 1}}
	s.gate.Running.At = &s.clock
	s.Installation = &Installation{
		Host: h, Gate: Gate{ConfigDir: "/etc/tidewaiter", StateDir: "/var/lib/tidewaiter", RunDir: "/run/tidewaiter"}, Self: []byte("\x00one"), World: World{
			Ask: func(context.Context) (*control.Status, error) {
				if s.away {
					return nil, errors.New("no gate answers")
				}
				g := s.gate
				if c, err := s.configured(s.running, s.ConfigDir); err == nil {
					s.force = c
				} else {
					g.Configuration.Rejected = &control.Rejected{Current: true, Error: err.Error()}
				}
				if g.Mode = s.force.Mode; g.Configuration.Revision != "" {
					g.Configuration.Revision = s.force.Revision
				}
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
			Pause: func(_ context.Context, _, name string) (string, error) {
				if s.digest == "" || name != nodetest.Pause {
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
		}}
	s.Load = func(_ context.Context, dir string) (Configured, error) { return s.configured(string(s.Self), dir) }
	s.LoadOld = s.CheckInstalled
	return s
}

// configured is what a configuration directory means to a program. A config.yaml may say
// which programs take it: those whose content has what it needs.
func (s *scene) configured(program, dir string) (Configured, error) {
	raw, err := os.ReadFile(filepath.Join(s.root, dir, "config.yaml"))
	if errors.Is(err, fs.ErrNotExist) && s.Exists(path.Join(dir, "trustpolicy.json")) {
		return Configured{"enforce", s.fingerprintOf(dir)}, nil
	}
	if err != nil {
		return Configured{}, err
	}
	m := regexp.MustCompile(`(?m)^mode: (\w+)`).FindSubmatch(raw)
	if m == nil {
		return Configured{}, errors.New("no mode")
	}
	if n := regexp.MustCompile(`(?m)^needs: (\w+)`).FindSubmatch(raw); n != nil && program != "" && !strings.Contains(program, string(n[1])) {
		return Configured{}, fmt.Errorf("line 2: %s: unknown key", n[1])
	}
	return Configured{string(m[1]), s.fingerprintOf(dir)}, nil
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
	case strings.Contains(line, " policy check "):
		raw, _ := os.ReadFile(filepath.Join(s.root, program))
		c, err := s.configured(string(raw), args[3])
		return fmt.Sprintf(`{"mode":%q,"revision":%q}`, c.Mode, c.Revision), err
	case strings.HasSuffix(line, " config dump"):
		if s.bad {
			return "", errors.New("exit status 1: containerd: invalid disabled plugin URI")
		}
		return s.dump(args[1])
	}
	s.commands = append(s.commands, line)
	switch {
	case strings.Contains(line, "restart tidewaiter"), strings.Contains(line, "tidewaiter restart"):
		raw, _ := os.ReadFile(filepath.Join(s.root, node.GateBinary))
		s.away = s.broken && string(raw) == string(s.Self)
		s.gate.PID++
		s.gate.Started, s.running, s.force = s.clock.Add(1), string(raw), Configured{}
	case strings.Contains(line, "disable --now tidewaiter"), strings.Contains(line, "tidewaiter stop"):
		s.away = true
	case strings.Contains(line, "restart"): // containerd
		s.gate.Runtime.Registrations++
		required := false
		if e, err := s.Effective(context.Background()); err == nil {
			required = e.RequiresGate()
		}
		s.gate.Runtime.Registered = !s.stuck || !required
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
		if errors.Is(err, fs.ErrNotExist) {
			break // as containerd's program does, with exit status 0
		}
		if err != nil {
			return "", err
		}
		var one map[string]any
		if err := toml.Unmarshal(raw, &one); err != nil {
			return "", fmt.Errorf("failed to unmarshal TOML: %w", err)
		}
		for _, pattern := range list(one, "imports") {
			if !path.IsAbs(pattern) {
				pattern = path.Join(path.Dir(pending[0]), pattern)
			}
			if !strings.Contains(pattern, "*") {
				pending = append(pending, pattern)
				continue
			}
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
		if s.loses != "" && path.Base(pending[0]) != node.DropInFile {
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
		h := (*node.Hint)(nil)
		if err == nil || !errors.As(err, &h) || !h.Refused || !strings.Contains(err.Error(), want) {
			t.Fatalf("%s: %s, %v (want a refusal with %q)", what, got, err, want)
		}
	}
}

func alpineTree() nodetest.Tree {
	files := nodetest.Tree{"/sbin/openrc-run": "#", "/etc/init.d/k3s": "#"}
	for _, name := range []string{"/var/lib/rancher/k3s/data/current/bin/containerd", nodetest.K3sDir + "config.toml", "/run/k3s/containerd/containerd.sock"} {
		files[name] = nodetest.K3s[name]
	}
	return files
}

// enforcing is a scene in which the gate audits.
func auditing(t *testing.T, files nodetest.Tree) *scene {
	t.Helper()
	s := newScene(t, files)
	s.away = true
	must(t, "install", Installed)(s.Install(t.Context()))
	s.Enforce, s.Restart = true, true
	return s
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

func list(m map[string]any, key string) (all []string) {
	values, _ := m[key].([]any)
	for _, v := range values {
		if s, ok := v.(string); ok {
			all = append(all, s)
		}
	}
	return all
}

func table(m map[string]any, key string) map[string]any {
	t, _ := m[key].(map[string]any)
	return t
}
