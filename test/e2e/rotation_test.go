package e2e

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

// TestRotation replaces the root of trust of a node while there is a mirror, once
// with tidewaiter refresh and once with nothing but the configuration, and then takes
// mirror and power away: what was signed again starts, and nothing else.
func TestRotation(t *testing.T) {
	eachOwn(t, func(*testing.T, string) node.Options { return node.Options{} }, func(s *scene) {
		state := filepath.Join(s.TempDir(), "state")
		begin := func() {
			s.Helper()
			var err error
			s.gate, err = s.StartGate(s.ctx, node.GateOptions{ConfigDir: s.dir, StateDir: state, NodeName: "edge-1", Binary: program})
			s.must(err)
			s.wait(0, node.Registered)
		}
		// Both roots are in the store of the same name, so that the statement stays.
		trust := func(refresh string, cas map[string]*notarytest.CA) node.Config {
			c := s.policy()
			c.Stores = notarytest.Stores{}
			for name, ca := range cas {
				c.Stores["ca/acme/"+name+".crt"] = ca.PEM()
			}
			sources := map[string]any{"mirrors": c.Mirrors, "refreshInterval": refresh}
			if refresh == "" {
				sources = map[string]any{"network": "never"}
			}
			c.Mirrors, c.More = nil, map[string]any{"sources": sources}
			return c
		}
		old, both, renewed := map[string]*notarytest.CA{"old": acme}, map[string]*notarytest.CA{"old": acme, "new": rival}, map[string]*notarytest.CA{"new": rival}
		local := node.ContainerOptions{Pull: node.PullNever}

		s.configure(trust("24h", old))
		begin()
		first := s.signed("app:first", "first")
		second := s.push(s.reg, "app:second", node.ImageOptions{Word: "second", Index: true, Decoys: decoys})
		_, err := s.reg.Sign(s.ctx, second, release)
		s.must(err)
		left := s.signed("app:left", "left")
		bare := s.push(s.reg, "app:bare", node.ImageOptions{Word: "bare"})
		for _, img := range []*node.Image{first, second, left} {
			s.allowed(img.Name, img.Name[strings.LastIndex(img.Name, ":")+1:], node.ContainerOptions{})
		}
		s.denied(bare.Name, verify.SignatureMissing, node.ContainerOptions{})
		s.kept(state, 3)

		// The new root, and one of them signed again. Nothing but the command comes so soon.
		s.configure(trust("24h", both))
		_, err = s.reg.Sign(s.ctx, first, stranger)
		s.must(err)
		text := s.refresh(0, first.Name)
		if want := first.Name + "@" + first.Target.Digest.String() + ": 1 new signature; mirror " + s.reg.URL() + ": [VERIFIED] of 2 signatures\n1 image, 1 new signature, 0 failed\n"; text != want {
			s.Errorf("refresh says %q, want %q", text, want)
		}
		s.kept(state, 4)
		text = s.refresh(0)
		for _, want := range []string{"app:first@", "app:second@", "app:left@", ": 0 new signatures; mirror ", "bare@" + bare.Target.Digest.String() + ": 0 new signatures", "pause.example", "not asked about [POLICY_NO_MATCH]", ", 0 new signatures, 0 failed\n"} {
			if !strings.Contains(text, want) {
				s.Errorf("no %q in\n%s", want, text)
			}
		}
		if !strings.Contains(s.refresh(2, "registry.example/app:never"), "no image of the node has this name: registry.example/app:never") {
			s.Error("nothing is said of an image that is not there")
		}
		// A denied image that is signed now: the next question finds it.
		_, err = s.reg.Sign(s.ctx, bare, stranger)
		s.must(err)
		s.refresh(0, bare.Name)
		s.kept(state, 5)

		// A mirror that is away costs nothing, and says so.
		s.must(s.reg.Stop())
		if text := s.refresh(1, second.Name); !strings.Contains(text, ": FAILED, 0 new signatures; mirror ") || !strings.Contains(text, "[SOURCE_UNREACHABLE]") {
			s.Errorf("without the mirror refresh says %s", text)
		}
		s.kept(state, 5)
		s.status(0, "warning        signatures of 1 image cannot be looked for again: mirror "+s.reg.URL())
		if m := s.metrics(); m.value(s, "refresh_failing") != 1 || m.value(s, "refresh_failed_total") < 1 || m.value(s, "refresh_new_total") != 2 {
			s.Error("the metrics say something else")
		}
		s.allowed(second.Name, "second", local)
		s.must(s.reg.Start())

		// With a period of ten minutes, a configuration has its turn within seconds.
		s.must(os.Remove(filepath.Join(s.dir, "truststore/x509/ca/acme/new.crt")))
		s.configure(trust("10m", old))
		_, err = s.reg.Sign(s.ctx, second, stranger)
		s.must(err)
		mark := s.gate.Mark()
		s.configure(trust("10m", both))
		s.wait(mark, func(l node.Line) bool {
			return l.Msg == "signatures were added to those that are kept" && l.Fields["target"] == second.Target.Digest.String() && l.Fields["new"] == 1.0
		})
		s.kept(state, 6)

		// The old root goes, the network and the power too.
		s.must(os.Remove(filepath.Join(s.dir, "truststore/x509/ca/acme/old.crt")))
		s.configure(trust("24h", renewed))
		s.denied(left.Name, verify.SignerUntrusted, local)
		s.must(s.reg.Stop())
		defer func() { s.must(s.reg.Start()) }()
		s.gate.Kill()
		begin()
		s.allowed(first.Name, "first", local)
		s.allowed(second.Name, "second", local)
		s.allowed(bare.Name, "bare", local)
		s.denied(left.Name, verify.SourceUnreachable, local) // the mirror may have what the store has not
		s.configure(trust("", renewed))
		s.denied(left.Name, verify.SignerUntrusted, local)
		s.allowed(first.Name, "first", local)
		s.allowed(second.Name, "second", local)
		if text := s.refresh(0, first.Name); !strings.Contains(text, "not asked about [SOURCE_UNREACHABLE] no source of signatures is configured") {
			s.Errorf("without a network refresh says %s", text)
		}
	})
}

// refresh runs tidewaiter refresh, checks its exit status, and returns what it says.
func (s *scene) refresh(want int, images ...string) string {
	s.Helper()
	out, err := exec.CommandContext(s.ctx, program, append([]string{"refresh", "--run-dir", s.RunDir()}, images...)...).CombinedOutput()
	var exit *exec.ExitError
	got := 0
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		s.must(err)
	}
	if got != want {
		s.Errorf("refresh ended with %d, want %d:\n%s", got, want, out)
	}
	return string(out)
}
