package install

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/deploy/node"
	"github.com/tidewaiter/tidewaiter/deploy/node/nodetest"
)

const (
	plainConfig = "mode: audit # plain\n"
	newKey      = "mode: audit\nneeds: two\n" // which the program two takes
	oldKey      = "mode: audit\nneeds: one\n"
)

// rollout is a scene in which one runs with a configuration that was brought, and two is
// offered with another one.
func rollout(t *testing.T, was, is string) *scene {
	t.Helper()
	s, offer := watched(t, was)
	must(t, "install", Installed)(s.Install(t.Context()))
	s.Self, s.said, s.commands = []byte("\x00two"), nil, nil
	offer(is)
	return s
}

// pair fails unless the program and the configuration on the host are these, and the gate
// runs with both.
func (s *scene) pair(t *testing.T, program, config string) {
	t.Helper()
	if got := s.text(t, node.GateBinary); got != program {
		t.Errorf("the program is %q, want %q", got, program)
	}
	if got := s.text(t, "/etc/tidewaiter/config.yaml"); got != config {
		t.Errorf("the configuration is %q, want %q", got, config)
	}
	g, err := s.Ask(t.Context())
	if err != nil || s.running != program || g.Configuration.Revision == "" || g.Configuration.Rejected != nil {
		t.Errorf("the gate of %q: %+v, %v", s.running, g, err)
	}
	if s.Exists("/etc/tidewaiter.next") || s.remembered().Trial != nil {
		t.Errorf("something is left: %+v", s.remembered().Trial)
	}
}

// TestTogether: a program and its configuration come together, or neither does.
func TestTogether(t *testing.T) {
	for name, tt := range map[string]struct {
		was, is string
		broken  bool
		fails   string
	}{
		"both take both":                   {was: plainConfig, is: "mode: audit # other\n"},
		"both take both, broken":           {was: plainConfig, is: "mode: audit # other\n", broken: true, fails: "the gate before runs again"},
		"a key that comes":                 {was: plainConfig, is: newKey},
		"a key that comes, broken":         {was: plainConfig, is: newKey, broken: true, fails: "the gate before runs again"},
		"a key that goes":                  {was: oldKey, is: plainConfig},
		"a key that goes, broken":          {was: oldKey, is: plainConfig, broken: true, fails: "the gate before runs again"},
		"one that goes and one that comes": {was: oldKey, is: newKey, fails: "bring a configuration first"},
	} {
		t.Run(name, func(t *testing.T) {
			s := rollout(t, tt.was, tt.is)
			s.broken = tt.broken
			// At no time the gate has nothing that it takes.
			ask := s.Ask
			s.Ask = func(ctx context.Context) (*control.Status, error) {
				g, err := ask(ctx)
				if err == nil && g.Configuration.Revision == "" {
					t.Error("the gate has no configuration")
				}
				return g, err
			}
			_, err := s.Install(t.Context())
			h := (*node.Hint)(nil)
			switch {
			case tt.fails == "" && err != nil:
				t.Fatal(err)
			case tt.fails != "" && (!errors.As(err, &h) || !h.Refused || !strings.Contains(err.Error()+h.Next, tt.fails)):
				t.Fatalf("%v", err)
			}
			if tt.fails == "" {
				s.pair(t, "\x00two", tt.is)
			} else {
				s.pair(t, "\x00one", tt.was)
			}
		})
	}
}

// TestTogetherForHours: a rollout that fails for hours leaves the host as it was all the
// time, and comes about when its cause is gone.
func TestTogetherForHours(t *testing.T) {
	s := rollout(t, plainConfig, newKey)
	s.broken = true
	at := map[time.Duration]func(){}
	for h := range 5 {
		at[time.Duration(h+1)*30*time.Minute] = func() { s.pair(t, "\x00one", plainConfig) }
	}
	said := s.bring(t, 3*time.Hour, at)
	if len(said) == 0 || !strings.Contains(said[0], "taken back: the gate before runs again") {
		t.Errorf("%q", said)
	}
	s.broken = false
	s.bring(t, 3*time.Hour, nil)
	s.pair(t, "\x00two", newKey)
}

// TestBackIsLookedAt: that the gate before runs again is said only where it does.
func TestBackIsLookedAt(t *testing.T) {
	s := rollout(t, plainConfig, plainConfig)
	s.broken = true
	run := s.Run
	s.Run = func(ctx context.Context, program string, args ...string) (string, error) {
		out, err := run(ctx, program, args...)
		s.away = s.away || s.text(t, node.GateBinary) == "\x00one" && len(s.commands) > 0
		return out, err
	}
	_, err := s.Install(t.Context())
	h := (*node.Hint)(nil)
	if !errors.Is(err, ErrTakenBack) || !errors.As(err, &h) || h.Refused || !strings.Contains(err.Error(), "the gate before does not work again") {
		t.Errorf("%v", err)
	}
	s.heard(t, "log: install: the gate before does not run again")
}

// TestConfigurationAlone: one that the gate does not take goes, though it was checked.
func TestConfigurationAlone(t *testing.T) {
	s := rollout(t, plainConfig, newKey)
	s.Self = []byte("\x00one two") // checks it, and is not what runs
	s.Keep, s.LoadOld = true, nil
	refused(t, "install", "the gate did not take the configuration")(s.Install(t.Context()))
	s.pair(t, "\x00one", plainConfig)
	if len(s.commands) > 0 {
		t.Errorf("ran %q", s.commands)
	}
}

// TestEnforceTakesCopyBack: what is taken back after the configuration was copied takes
// that with it, and it is not tried again with each round.
func TestEnforceTakesCopyBack(t *testing.T) {
	s := rollout(t, plainConfig, "mode: enforce\n")
	s.Self, s.Enforce, s.Restart, s.stuck = []byte("\x00one"), true, true, true
	said := s.bring(t, time.Hour, map[time.Duration]func(){
		3 * time.Minute: func() { s.pair(t, "\x00one", plainConfig) },
	})
	if slices.ContainsFunc(s.said, func(l string) bool { return strings.Contains(l, "says mode: audit") }) {
		t.Errorf("it says that what enforces audits: %q", s.said)
	}
	if n := s.count("restart containerd.service"); n > 12 {
		t.Errorf("%d restarts of containerd: %q", n, said)
	}
	s.pair(t, "\x00one", plainConfig)
	s.stuck = false
	s.bring(t, 2*time.Hour, nil)
	s.pair(t, "\x00one", "mode: enforce\n")
	if !s.Exists("/etc/containerd/conf.d/" + node.DropInFile) {
		t.Error("containerd does not require the gate")
	}
}

// TestInterruptedUpgrade: whoever ends a rollout gets the node as it was.
func TestInterruptedUpgrade(t *testing.T) {
	s := rollout(t, plainConfig, "mode: audit # other\n")
	s.broken = true
	ctx, cancel := context.WithCancel(t.Context())
	sleep := s.Sleep
	s.Sleep = func(c context.Context, d time.Duration) { cancel(); sleep(c, d) }
	refused(t, "install", "context canceled: taken back: the gate before runs again")(s.Install(ctx))
	s.pair(t, "\x00one", plainConfig)
}

// TestPowerCutInUpgrade: after a cut at any step the program on the host takes the
// configuration there, the one before is still there, and who installs next ends it.
func TestPowerCutInUpgrade(t *testing.T) {
	for name, is := range map[string]string{"both take both": "mode: audit # other\n", "a key that comes": newKey} {
		for broken, end := range map[bool]string{false: "works", true: "broken"} {
			t.Run(name+", "+end, func(t *testing.T) {
				for step := 1; cutAt(t, is, step, broken); step++ {
				}
			})
		}
	}
}

// cutAt cuts the power at the step-th thing that an installation does. It reports whether
// it did that many.
func cutAt(t *testing.T, is string, step int, broken bool) (cut bool) {
	t.Helper()
	s := rollout(t, plainConfig, is)
	s.broken, s.Patience = broken, 500*time.Millisecond
	n, done := 0, false
	tick := func(what string) {
		if n++; n == step && !done {
			done = true
			panic("power cut at " + what)
		}
	}
	run, ask := s.Run, s.Ask
	s.Run = func(ctx context.Context, program string, args ...string) (string, error) {
		tick(program)
		return run(ctx, program, args...)
	}
	s.Ask = func(ctx context.Context) (*control.Status, error) { tick("ask"); return ask(ctx) }
	s.BeforeWrite = func(name string) { tick("before " + name) }
	at := ""
	func() {
		defer func() {
			if p := recover(); p != nil {
				cut, at = true, fmt.Sprint(p)
			}
		}()
		_, _ = s.Install(t.Context())
	}()
	if n > 400 {
		t.Fatal("it does not end")
	}
	s.Run, s.Ask, s.BeforeWrite = run, ask, nil
	if !cut {
		return false
	}
	// The node comes up again, with what is there.
	program := s.text(t, node.GateBinary)
	s.away, s.running, s.force = broken && program == "\x00two", program, Configured{}
	s.gate.PID++
	if _, err := s.configured(program, "/etc/tidewaiter"); err != nil {
		t.Errorf("step %d, %s: the program %q finds a configuration that it denies everything with: %v", step, at, program, err)
	}
	config := func(dir string) string {
		raw, _ := os.ReadFile(s.Path(dir + "/config.yaml"))
		return string(raw)
	}
	proven := s.remembered().Trial == nil
	if config("/etc/tidewaiter") != plainConfig && config("/etc/tidewaiter.next") != plainConfig && !proven {
		t.Errorf("step %d, %s: the configuration before is nowhere", step, at)
	}
	// Who installs next ends it.
	s.clock = s.clock.Add(time.Second)
	_, err := s.Install(t.Context())
	if broken {
		s.pair(t, "\x00one", plainConfig)
	} else {
		s.pair(t, "\x00two", is)
	}
	if (err != nil) != broken {
		t.Errorf("step %d, %s: %v", step, at, err)
	}
	if t.Failed() {
		t.Fatalf("step %d, %s", step, at)
	}
	return true
}

// TestRemembersCommands: what the operator named once need not be named again.
func TestRemembersCommands(t *testing.T) {
	files := nodetest.Kubeadm.With(nodetest.Tree{"/run/systemd/system/": "-", "/usr/lib/systemd/system/containerd.service": "-"})
	s := newScene(t, maps.Clone(files))
	s.Manager.ContainerdCommand, s.Manager.GateCommand = []string{"sv", "restart", "containerd"}, []string{"sv", "restart", "tidewaiter"}
	must(t, "install", Installed)(s.Install(t.Context()))
	if r := s.remembered(); !slices.Equal(r.Restart, s.Manager.ContainerdCommand) || !slices.Equal(r.GateAgain, s.Manager.GateCommand) {
		t.Errorf("%+v", r)
	}
	s.Manager.ContainerdCommand, s.Manager.GateCommand = nil, nil
	s.Enforce, s.Restart = true, true
	must(t, "enforce", Enforces)(s.Install(t.Context()))
	if s.count("sv restart containerd") != 1 {
		t.Errorf("%q", s.commands)
	}
	s.Manager.ContainerdCommand, s.Manager.GateCommand = nil, nil
	must(t, "uninstall", Removed)(s.Uninstall(t.Context()))
	if s.count("sv restart containerd") != 2 {
		t.Errorf("%q", s.commands)
	}
}

// TestNothingRestarts: where it is not known what restarts containerd, that is asked before
// anything is changed.
func TestNothingRestarts(t *testing.T) {
	s := newScene(t, nodetest.Kubeadm.With(nodetest.Tree{"/run/systemd/system/": "-", "/usr/lib/systemd/system/containerd.service": "-"}))
	must(t, "install", Installed)(s.Install(t.Context()))
	s.Enforce, s.Restart, s.said = true, true, nil
	was := snapshot(t, s.root)
	_, err := s.Install(t.Context())
	h := (*node.Hint)(nil)
	if !errors.As(err, &h) || h.Refused || !strings.Contains(h.Next, "--restart-command") || !strings.Contains(err.Error(), "nothing was changed") {
		t.Errorf("%v", err)
	}
	same(t, "not known", was, snapshot(t, s.root))
	s.DryRun = true
	must(t, "print", Planned)(s.Install(t.Context()))
	s.heard(t, "warn: it would not be done: it is not known what restarts containerd")
	s.heard(t, "next: restart containerd, which is not a service that is known here (--restart-command)")
	// Without --restart it is done, and the restart is left to the operator.
	s.DryRun, s.Restart = false, false
	must(t, "enforce", Installed)(s.Install(t.Context()))
}

// TestPrintByHand: what install says afterwards on a host without services, --dry-run says.
func TestPrintByHand(t *testing.T) {
	s := newScene(t, nodetest.Kubeadm.With(nodetest.Tree{"/run/systemd/system/": "-", "/usr/lib/systemd/system/containerd.service": "-"}))
	s.away = true
	for _, s.DryRun = range []bool{true, false} {
		s.said = nil
		if _, err := s.Install(t.Context()); err != nil {
			t.Fatal(err)
		}
		s.heard(t, "next: start /usr/local/bin/tidewaiter run, and again whenever it ends")
	}
}

// TestHeldUp: a registration that the runtime holds up is looked at before the gate is
// started anew, and is no program that does not come up.
func TestHeldUp(t *testing.T) {
	s := auditing(t, nodetest.Kubeadm)
	must(t, "enforce", Enforces)(s.Install(t.Context()))
	s.Enforce, s.Restart, s.Self, s.commands = false, false, []byte("\x00two"), nil
	s.gate.Runtime.AwaitingSync = new(s.clock)
	was := snapshot(t, s.root)
	_, err := s.Install(t.Context())
	h := (*node.Hint)(nil)
	if !errors.As(err, &h) || h.Refused || !strings.Contains(err.Error(), "nothing was changed") || !strings.Contains(h.Next, "docs/lockout.md") {
		t.Errorf("%v", err)
	}
	same(t, "held up", was, snapshot(t, s.root))
	if len(s.commands) > 0 {
		t.Errorf("ran %q", s.commands)
	}
	// It begins after the look.
	s.gate.Runtime.AwaitingSync = nil
	run := s.Run
	s.Run = func(ctx context.Context, program string, args ...string) (string, error) {
		if slices.Contains(args, "restart") {
			s.gate.Runtime.Registered, s.gate.Runtime.AwaitingSync = false, new(s.clock)
		}
		return run(ctx, program, args...)
	}
	must(t, "upgrade", Installed)(s.Install(t.Context()))
	if got := s.text(t, node.GateBinary); got != "\x00two" {
		t.Errorf("the program is %q", got)
	}
	s.heard(t, "warn: the gate runs, and containerd does not ask it yet")
}
