package install

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/deploy/node"
	"github.com/tidewaiter/tidewaiter/deploy/node/nodetest"
)

// lowered is whether it was said and logged that the node enforces no more.
func (s *scene) lowered() bool {
	warned := slices.ContainsFunc(s.said, func(l string) bool { return strings.HasPrefix(l, "warn: this node enforced, and audits from now on") })
	logged := slices.ContainsFunc(s.said, func(l string) bool { return strings.HasPrefix(l, "log: install: the node enforced, and audits") })
	return warned && logged
}

// TestNeverLowers: no install has a node audit that enforces, unless it is told to.
func TestNeverLowers(t *testing.T) {
	forms := map[string]nodetest.Tree{
		"notation directory alone": {"trustpolicy.json": "{}", "truststore/x509/ca/acme/ca.crt": "x"},
		"with config.yaml":         {"config.yaml": "version: 1\nmode: enforce\n", "trustpolicy.json": "{}"},
	}
	for form, files := range forms {
		for _, kind := range []string{"first install", "upgrade", "watched", "watched from the first"} {
			for gate, away := range map[string]bool{"gate answers": false, "gate down": true} {
				for _, audit := range []bool{false, true} {
					name := form + ", " + kind + ", " + gate
					if audit {
						name += ", --audit"
					}
					t.Run(name, func(t *testing.T) {
						lowers(t, files, kind, away, audit)
					})
				}
			}
		}
	}
}

func lowers(t *testing.T, files nodetest.Tree, kind string, away, audit bool) {
	here := nodetest.Tree{}
	for name, text := range files {
		here["/etc/tidewaiter/"+name] = text
	}
	s := newScene(t, nodetest.Kubeadm.With(here))
	if strings.HasPrefix(kind, "watched") {
		s.Watching, s.From = true, files.Make(t)
	}
	if kind != "first install" && kind != "watched from the first" {
		s.away, s.Enforce, s.Force = true, true, true
		must(t, "install", Installed)(s.Install(t.Context()))
		s.Enforce, s.Force, s.Self, s.said = false, false, []byte("\x00two"), nil
	}
	s.away, s.Audit = away, audit
	result, err := s.Install(t.Context())

	fresh := away && (kind == "first install" || kind == "watched from the first")
	want := "enforce"
	if audit {
		want = "audit"
	}
	if fresh && !audit { // nobody looked at what it would refuse
		refused(t, "install", "the configuration enforces")(result, err)
		if s.Exists(node.GateBinary) {
			t.Error("the program was installed")
		}
	} else {
		must(t, "install", Installed)(result, err)
		g, err := s.Ask(t.Context())
		if err != nil || g.Mode != want || g.PID == 1 {
			t.Errorf("gate %d audits or is not new: %s, %v", g.PID, g.Mode, err)
		}
	}
	if c, err := s.configured("", "/etc/tidewaiter"); err != nil || c.Mode != want {
		t.Errorf("the configuration means %v, %v", c, err)
	}
	if _, has := files["config.yaml"]; !has && !audit && s.Exists("/etc/tidewaiter/config.yaml") {
		t.Error("a config.yaml was written")
	}
	if s.lowered() != (audit && !fresh) {
		t.Errorf("not said and logged, or for nothing: %q", s.said)
	}
	if err == nil {
		n := len(s.commands)
		must(t, "again", Nothing)(s.Install(t.Context()))
		if len(s.commands) != n {
			t.Errorf("ran %q", s.commands[n:])
		}
	}
}

// TestAuditByName: --audit on a node that enforces changes one line, restarts nothing, and
// says that it lowers; on one that audits there is nothing to do.
func TestAuditByName(t *testing.T) {
	s := auditing(t, nodetest.Kubeadm)
	must(t, "enforce", Enforces)(s.Install(t.Context()))
	s.Enforce, s.Restart, s.Audit, s.said, s.commands = false, false, true, nil, nil
	was := snapshot(t, s.root)
	s.DryRun = true
	must(t, "print", Planned)(s.Install(t.Context()))
	same(t, "print", was, snapshot(t, s.root))
	s.heard(t, "warn: this node enforces, and would audit")
	s.DryRun = false
	must(t, "audit", Installed)(s.Install(t.Context()))
	if !s.lowered() || len(s.commands) > 0 {
		t.Errorf("said %q, ran %q", s.said, s.commands)
	}
	s.heard(t, "containerd still refuses everything")
	if text := s.text(t, "/etc/tidewaiter/config.yaml"); !strings.Contains(text, "\nmode: audit\n") {
		t.Error(text)
	}
	s.said = nil
	must(t, "again", Nothing)(s.Install(t.Context()))
	if s.lowered() {
		t.Error("it lowers a node that audits")
	}
	s.Enforce = true
	if _, err := s.Install(t.Context()); err == nil {
		t.Error("--audit and --enforce at once")
	}
}

// TestNothingThere: where a node enforces that lost its configuration, install does not
// write one with which everything starts.
func TestNothingThere(t *testing.T) {
	for name, set := range map[string]func(*scene){
		"the gate denies everything": func(s *scene) { s.gate.Configuration = control.Configuration{} },
		"containerd requires it":     func(s *scene) { s.away = true },
	} {
		t.Run(name, func(t *testing.T) {
			s := auditing(t, nodetest.Kubeadm)
			must(t, "enforce", Enforces)(s.Install(t.Context()))
			if err := os.RemoveAll(s.Path("/etc/tidewaiter")); err != nil {
				t.Fatal(err)
			}
			s.Enforce, s.Restart = false, false
			set(s)
			was := snapshot(t, s.root)
			refused(t, "install", "does not write one that audits unless it is told to")(s.Install(t.Context()))
			same(t, "refused", was, snapshot(t, s.root))
			s.Audit, s.gate.Configuration.Revision = true, "e"
			must(t, "audit", Installed)(s.Install(t.Context()))
			if !s.lowered() {
				t.Errorf("%q", s.said)
			}
		})
	}
}

// TestGateThatAudits: a gate that comes up and audits, for whatever reason, does not take
// the place of one that enforces.
func TestGateThatAudits(t *testing.T) {
	s := auditing(t, nodetest.Kubeadm)
	must(t, "enforce", Enforces)(s.Install(t.Context()))
	s.Enforce, s.Restart, s.Self = false, false, []byte("\x00two")
	was, ask := snapshot(t, s.root), s.Ask
	s.Ask = func(ctx context.Context) (*control.Status, error) {
		g, err := ask(ctx)
		if s.running == "\x00two" {
			g.Mode = "audit" // such as with another directory in its environment
		}
		return g, err
	}
	refused(t, "upgrade", "the gate before runs again")(s.Install(t.Context()))
	same(t, "taken back", was, snapshot(t, s.root))
	if g, err := s.Ask(t.Context()); err != nil || g.Mode != "enforce" {
		t.Errorf("%v, %v", g, err)
	}
}

// TestWatchedAudit: mode: audit in what is watched lowers the node, which is asked for by
// that line, and is said once.
func TestWatchedAudit(t *testing.T) {
	s, offer := watched(t, "mode: audit\n")
	must(t, "install", Installed)(s.Install(t.Context()))
	s.Enforce, s.Restart = true, true
	offer("mode: enforce\n")
	must(t, "enforce", Enforces)(s.Install(t.Context()))
	s.said = nil
	offer("mode: audit # on purpose\n")
	must(t, "audit", Installed)(s.Install(t.Context()))
	if !s.lowered() {
		t.Errorf("%q", s.said)
	}
	s.said = nil
	must(t, "again", Nothing)(s.Install(t.Context()))
	if s.lowered() || s.text(t, "/etc/tidewaiter/config.yaml") != "mode: audit # on purpose\n" {
		t.Errorf("%q", s.said)
	}
	s.heard(t, "so that this node audits")
	// Without --watch it was asked to enforce, and gets an answer before anything changes.
	offer("mode: audit # once more\n")
	s.Watching = false
	was := snapshot(t, s.root)
	refused(t, "enforce", "says mode: audit")(s.Install(t.Context()))
	same(t, "refused", was, snapshot(t, s.root))
	if _, err := os.Stat(filepath.Join(s.root, "/etc/tidewaiter.next")); err == nil {
		t.Error("a copy is left")
	}
}
