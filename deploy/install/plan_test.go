package install

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/deploy/node/nodetest"
)

var update = flag.Bool("update", false, "write testdata/plans.txt")

// distributions are those for which plans are listed.
var distributions = map[string]nodetest.Tree{
	"kubeadm": nodetest.Kubeadm, "containerd without imports": nodetest.Bare, "containerd without a file": nodetest.None,
	"k3s": nodetest.K3s, "k3s of 2025": nodetest.OldK3s, "k3s with a template": nodetest.OwnK3s,
	"rke2": nodetest.Rke2, "microk8s": nodetest.Microk8s, "alpine": alpineTree(),
}

// planned is the plan of the scene as it is.
func planned(t *testing.T, s *scene) *plan {
	t.Helper()
	if err := s.checkPaths(); err != nil {
		t.Fatal(err)
	}
	f := s.look(t.Context(), limits{})
	p, err := f.plan(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestPlans lists the steps of install, and of install --enforce after it, for each
// distribution, and looks that computing them changes nothing.
func TestPlans(t *testing.T) {
	const golden = "testdata/plans.txt"
	from := regexp.MustCompile(`configuration in \S+`) // a directory of the test
	type upgrade struct {
		name string
		plan *plan
	}
	var upgrades []upgrade
	var b strings.Builder
	list := func(what string, p *plan) {
		fmt.Fprintf(&b, "%s\n", what)
		for _, l := range p.lines() {
			fmt.Fprintf(&b, "  %s\n", from.ReplaceAllString(l, "configuration in DIR"))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(distributions)) {
		s := newScene(t, maps.Clone(distributions[name]))
		s.gate.Configuration.WaitingForConfig, s.away = false, true
		was := snapshot(t, s.root)
		list(name+": install", planned(t, s))
		same(t, name+": the plan of install", was, snapshot(t, s.root))
		must(t, name, Installed)(s.Install(t.Context()))
		s.Enforce, s.Restart = true, true
		was = snapshot(t, s.root)
		list(name+": install --enforce --restart", planned(t, s))
		same(t, name+": the plan of install --enforce", was, snapshot(t, s.root))
	}
	for what, is := range map[string]string{"both programs take the configuration": plainConfig + "# two\n", "only the new program takes the configuration": newKey} {
		s := rollout(t, plainConfig, is)
		upgrades = append(upgrades, upgrade{"kubeadm: a watched upgrade, " + what, planned(t, s)})
	}
	slices.SortFunc(upgrades, func(a, b upgrade) int { return strings.Compare(a.name, b.name) })
	for _, u := range upgrades {
		list(u.name, u.plan)
	}
	if *update {
		if err := os.WriteFile(golden, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got := b.String(); got != string(want) {
		t.Errorf("the plans are not those of %s (go test -run TestPlans -update writes them):\n%s", golden, got)
	}
}

// TestUndo has each step of an enforcement fail on each distribution: what the steps before
// it changed is as it was, whatever the last thing was that worked.
func TestUndo(t *testing.T) {
	for name, files := range distributions {
		t.Run(name, func(t *testing.T) {
			for n := 1; ; n++ {
				s := newScene(t, maps.Clone(files))
				s.gate.Configuration.WaitingForConfig, s.away = false, true
				must(t, "install", Installed)(s.Install(t.Context()))
				s.Enforce, s.Restart = true, true
				was := snapshot(t, s.root)
				p := planned(t, s)
				steps := p.phases[len(p.phases)-1].steps
				if n == len(steps) {
					break
				}
				steps[n].do = func(context.Context) error { return errors.New("this step fails") }
				err := s.apply(t.Context(), p.phases[len(p.phases)-1])
				if !errors.Is(err, ErrTakenBack) || !strings.Contains(err.Error(), "this step fails") {
					t.Errorf("step %d: %v", n, err)
				}
				is := snapshot(t, s.root)
				for _, record := range []string{"/var/lib/tidewaiter/install.json"} {
					delete(was, record)
					delete(is, record)
				}
				same(t, fmt.Sprintf("step %d, %s", n, steps[n].text), was, is)
			}
		})
	}
}

// TestApply looks at the order in which steps are undone, and at what is said of each.
func TestApply(t *testing.T) {
	var did []string
	act := func(name string, err error) func(context.Context) error {
		return func(context.Context) error { did = append(did, name); return err }
	}
	s := newScene(t, nodetest.Kubeadm)
	var restored error
	p := &phase{
		steps: []step{
			{text: "one", do: act("one", nil), undo: act("not one", nil)},
			{do: act("note", nil)},
			{text: "two", do: act("two", nil), undo: act("not two", errors.New("the disk is full"))},
			{text: "three", do: act("three", nil), undo: act("not three", nil)},
			{text: "four", do: act("four", errors.New("it is not there")), undo: act("not four", nil)},
			{text: "five", do: act("five", nil)},
		},
		restore: func(_ context.Context, why, failed error) error {
			restored = failed
			return fmt.Errorf("restored: %w", why)
		},
	}
	err := s.apply(t.Context(), p)
	if want := "one, note, two, three, four, not three, not two, not one"; strings.Join(did, ", ") != want {
		t.Errorf("got %s, want %s", strings.Join(did, ", "), want)
	}
	if err == nil || err.Error() != "restored: it is not there" || restored == nil || restored.Error() != "the disk is full" {
		t.Errorf("%v; not undone: %v", err, restored)
	}
	if got, want := strings.Join(s.said, "\n"), "did: took back: three\nwarn: not taken back: two: the disk is full\ndid: took back: one"; got != want {
		t.Errorf("said:\n%s\nwant:\n%s", got, want)
	}
}
