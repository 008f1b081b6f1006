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

// watched is a scene whose host gets its configuration from a directory.
func watched(t *testing.T, config string) (s *scene, offer func(string)) {
	t.Helper()
	s = newScene(t, nodetest.Kubeadm)
	s.away, s.Watching = true, true
	s.From = t.TempDir()
	offer = func(config string) {
		t.Helper()
		for name, text := range map[string]string{"config.yaml": config, "trustpolicy.json": "{}"} {
			if err := os.WriteFile(filepath.Join(s.From, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	offer(config)
	return s, offer
}

// bring brings for a time of the scene's clock, in which it does things. It returns what
// was told.
func (s *scene) bring(t *testing.T, long time.Duration, at map[time.Duration]func()) (said []string) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	start := s.clock
	s.Sleep = func(_ context.Context, d time.Duration) {
		s.clock = s.clock.Add(d)
		since := s.clock.Sub(start)
		for when, do := range at {
			if since >= when {
				do()
				delete(at, when)
			}
		}
		if since >= long {
			cancel()
		}
	}
	if err := s.Watch(ctx, func(r Result, err error) {
		if err != nil {
			said = append(said, err.Error())
		} else if r != Nothing {
			said = append(said, string(r))
		}
	}); err != nil {
		t.Errorf("it ended with %v", err)
	}
	return said
}

// count is how often a command was run.
func (s *scene) count(command string) (n int) {
	for _, c := range s.commands {
		if strings.Contains(c, command) {
			n++
		}
	}
	return n
}

// TestBringGoesOn: what fails is tried again less and less often, and comes about by
// itself when its cause is gone.
func TestBringGoesOn(t *testing.T) {
	const restarted = "systemctl restart tidewaiter.service"
	t.Run("a program that does not come up", func(t *testing.T) {
		s, offer := watched(t, "mode: audit # one\n")
		if said := s.bring(t, time.Minute, nil); !slices.Equal(said, []string{"installed"}) {
			t.Fatalf("%q", said)
		}
		s.Self, s.broken = []byte("\x00two"), true
		s.commands = nil
		said := s.bring(t, 24*time.Hour, map[time.Duration]func(){
			// What is brought meanwhile counts at once, and does not try the program again.
			12 * time.Minute: func() { offer("mode: audit # two\n") },
			13 * time.Minute: func() {
				if got := s.text(t, "/etc/tidewaiter/config.yaml"); got != "mode: audit # two\n" {
					t.Errorf("the host has %q", got)
				}
			},
		})
		// Each attempt restarts the gate, and once more to take it back: after 5 minutes,
		// 10, 20, 40 and so on nine of them fit into a day.
		if n := s.count(restarted); n < 10 || n > 18 {
			t.Errorf("%d restarts of the gate in a day: %q", n, said)
		}
		if got := s.text(t, node.GateBinary); got != "\x00one" {
			t.Errorf("the host has %q", got)
		}
		s.commands = nil
		said = s.bring(t, 2*time.Hour, map[time.Duration]func(){time.Hour: func() { s.broken = false }})
		if got := s.text(t, node.GateBinary); got != "\x00two" || said[len(said)-1] != "installed" {
			t.Errorf("the host has %q: %q", got, said)
		}
	})
	t.Run("what would be refused", func(t *testing.T) {
		s, _ := watched(t, "mode: audit\n")
		s.bring(t, time.Minute, nil)
		s.Enforce, s.Restart = true, true
		s.gate.Running.Reasons = map[string]int{"SIGNATURE_MISSING": 1}
		looks, look := 0, s.Look
		if err := os.WriteFile(filepath.Join(s.From, "config.yaml"), []byte("mode: enforce\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		was, seen := snapshot(t, s.root), false
		s.Look = func(ctx context.Context) (st *control.Status, err error) {
			looks++
			if s.gate.Running.Reasons != nil {
				if got := s.text(t, "/etc/tidewaiter/config.yaml"); got != "mode: audit\n" {
					t.Errorf("while the gate is asked it has %q", got)
				}
			}
			return look(ctx)
		}
		said := s.bring(t, 3*time.Hour, map[time.Duration]func(){
			time.Hour: func() {
				is := snapshot(t, s.root)
				delete(is, "/run/"+lockWatch)
				same(t, "refused", was, is)
				seen = true
			},
			2 * time.Hour: func() { s.gate.Running.Reasons = nil },
		})
		if !seen {
			t.Error("the host was not looked at")
		}
		if said[len(said)-1] != string(Enforces) || looks > 16 {
			t.Errorf("%d looks: %q", looks, said)
		}
	})
	t.Run("a containerd that does not ask", func(t *testing.T) {
		s, _ := watched(t, "mode: enforce\n")
		s.Enforce, s.Restart, s.Force, s.stuck = true, true, true, true
		containerd := "systemctl restart containerd.service"
		s.bring(t, 24*time.Hour, nil)
		if n := s.count(containerd); n < 2 || n > 20 {
			t.Errorf("%d restarts of containerd in a day", n)
		}
	})
	t.Run("a configuration that is not valid", func(t *testing.T) {
		s, offer := watched(t, "mode: audit\n")
		s.bring(t, time.Minute, nil)
		offer("nonsense\n")
		loads, load := 0, s.Load
		s.Load = func(ctx context.Context, dir string) (Configured, error) {
			if strings.HasSuffix(dir, ".next") {
				loads++
			}
			return load(ctx, dir)
		}
		fixed := 0
		said := s.bring(t, 24*time.Hour, map[time.Duration]func(){
			23 * time.Hour:               func() { offer("mode: audit # right\n") },
			23*time.Hour + 1*time.Minute: func() { fixed = strings.Count(s.text(t, "/etc/tidewaiter/config.yaml"), "right") },
		})
		if loads > 110 || fixed != 1 {
			t.Errorf("it was looked at %d times, and brought when it was right: %d\n%q", loads, fixed, said)
		}
	})
}

// TestBringAlone: of two that would undo each other's configuration one waits, says so,
// and gives up; when the first one ends in time it goes on.
func TestBringAlone(t *testing.T) {
	s, _ := watched(t, "mode: audit\n")
	other := *s.Installation
	release, err := other.exclusive(t.Context(), func(Result, error) { t.Error("the first one waits") })
	if err != nil {
		t.Fatal(err)
	}
	was := snapshot(t, s.root)
	var said []error
	err = s.Watch(t.Context(), func(_ Result, err error) { said = append(said, err) })
	if h := (*node.Hint)(nil); !errors.Is(err, ErrWatched) || !errors.As(err, &h) || !strings.Contains(h.Next, "DaemonSet") {
		t.Errorf("%v", err)
	}
	if len(said) != 1 || !errors.Is(said[0], ErrWatched) {
		t.Errorf("said %v", said)
	}
	same(t, "the second one", was, snapshot(t, s.root))
	// By hand the host can be changed all the same.
	by := *s.Installation
	by.From, by.Watching = "", false
	must(t, "by hand", Installed)(by.Install(t.Context()))
	if got := s.bring(t, time.Hour, map[time.Duration]func(){time.Minute: release}); len(got) != 2 || got[1] != string(Installed) {
		t.Errorf("%q", got)
	}
}

// TestBringEnforcesAtOnce: a node that joins gets a gate though nobody can say yet what it
// would refuse. It audits until that is known.
func TestBringEnforcesAtOnce(t *testing.T) {
	const config, quiet = "version: 1\nmode: enforce # all\n", "version: 1\nmode: audit # all\n"
	for name, tt := range map[string]struct {
		files nodetest.Tree
		bad   bool
	}{
		"nothing there":         {nodetest.Kubeadm, false},
		"a gate that audited":   {nodetest.Kubeadm.With(nodetest.Tree{"/etc/tidewaiter/config.yaml": "mode: audit\n"}), false},
		"what would be refused": {nodetest.Kubeadm, true},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, tt.files)
			s.away, s.Watching, s.Enforce, s.Restart = true, true, true, true
			s.From = t.TempDir()
			for name, text := range map[string]string{"config.yaml": config, "trustpolicy.json": "{}"} {
				if err := os.WriteFile(filepath.Join(s.From, name), []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if tt.bad {
				s.gate.Running.Reasons = map[string]int{"SIGNATURE_MISSING": 1}
			}
			had := ""
			look := s.Look
			s.Look = func(ctx context.Context) (*control.Status, error) {
				if had == "" {
					had = s.text(t, "/etc/tidewaiter/config.yaml")
				}
				return look(ctx)
			}
			said := s.bring(t, 5*time.Minute, nil)
			if s.away || had != quiet {
				t.Errorf("the gate is away: %v; when it was asked it had %q", s.away, had)
			}
			want, end := config, string(Enforces)
			if tt.bad {
				want, end = quiet, "1 of what runs here would be refused"
			}
			if got := s.text(t, "/etc/tidewaiter/config.yaml"); got != want || len(said) < 2 || said[0] != string(Installed) || said[len(said)-1] != end {
				t.Errorf("%q: %q", got, said)
			}
			if required := s.Exists("/etc/containerd/conf.d/" + node.DropInFile); required == tt.bad || !s.Enforce {
				t.Errorf("containerd requires it: %v", required)
			}
		})
	}
	// A gate that enforced and does not answer is not made to audit.
	s := newScene(t, nodetest.Kubeadm.With(nodetest.Tree{"/etc/tidewaiter/config.yaml": config}))
	s.away, s.Watching, s.Enforce, s.Restart = true, true, true, true
	s.From = t.TempDir()
	for name, text := range map[string]string{"config.yaml": config, "trustpolicy.json": "{}"} {
		if err := os.WriteFile(filepath.Join(s.From, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	_, _ = s.Install(t.Context())
	if got := s.text(t, "/etc/tidewaiter/config.yaml"); got != config {
		t.Errorf("%q", got)
	}
}

// TestBringLeavesOpen: what uninstall opened is not closed by a watcher, only by hand.
func TestBringLeavesOpen(t *testing.T) {
	s, _ := watched(t, "mode: audit\n")
	s.bring(t, time.Minute, nil)
	if err := os.WriteFile(filepath.Join(s.From, "config.yaml"), []byte("mode: enforce\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	s.Enforce, s.Restart = true, true
	s.bring(t, time.Minute, nil)
	const required = "/etc/containerd/conf.d/" + node.DropInFile
	if !s.Exists(required) {
		t.Fatalf("containerd does not require the gate: %q", s.said)
	}
	out := *s.Installation
	out.Watching, out.From, out.Restart = false, "", false
	must(t, "uninstall", Opened)(out.Uninstall(t.Context()))
	s.said = nil
	s.bring(t, time.Hour, nil)
	if s.Exists(required) {
		t.Error("it was closed")
	}
	s.heard(t, "warn: uninstall opened containerd at 20")
	must(t, "by hand", Installed)(out.Install(t.Context()))
	s.bring(t, time.Minute, nil)
	if !s.Exists(required) || !s.remembered().Opened.IsZero() || s.remembered().Pending {
		t.Errorf("%+v", s.remembered())
	}
}
