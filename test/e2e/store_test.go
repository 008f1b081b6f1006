package e2e

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
)

// TestPowerCut verifies images, and then there is no mirror and no power. What
// started before starts after, and nothing else.
func TestPowerCut(t *testing.T) {
	each(t, func(s *scene) {
		state := filepath.Join(t.TempDir(), "state")
		begin := func() {
			s.Helper()
			var err error
			s.gate, err = s.StartGate(s.ctx, node.GateOptions{ConfigDir: s.dir, StateDir: state, NodeName: "edge-1", Binary: program})
			s.must(err)
			s.wait(0, node.Registered)
		}
		s.configure(s.policy())
		begin()
		plain := s.signed("app:cut", "cut")
		index := s.push(s.reg, "app:cut-index", node.ImageOptions{Word: "cut-index", Index: true, Decoys: decoys})
		_, err := s.reg.Sign(s.ctx, index, release)
		s.must(err)
		bare := s.push(s.reg, "app:cut-bare", node.ImageOptions{Word: "cut-bare"})
		foreign := s.push(s.reg, "app:cut-foreign", node.ImageOptions{Word: "cut-foreign"})
		_, err = s.reg.Sign(s.ctx, foreign, stranger)
		s.must(err)
		s.allowed(plain.Name, "cut", node.ContainerOptions{})
		s.allowed(index.Name, "cut-index", node.ContainerOptions{})
		s.denied(bare.Name, verify.SignatureMissing, node.ContainerOptions{})
		s.denied(foreign.Name, verify.SignerUntrusted, node.ContainerOptions{})
		// Evidence is written after the answer, and shortly.
		s.kept(state, 2)

		// The index is signed; its manifest is on the node under its own digest too.
		byManifest := index.Repository() + "@" + index.Manifest.Digest.String()
		s.pull(byManifest)
		// Signed, and on the node, but nobody had a chance to verify it.
		s.gate.Kill()
		late := s.signed("app:cut-late", "cut-late")
		s.pull(late.Name)

		s.must(s.reg.Stop())
		defer func() { s.must(s.reg.Start()) }()
		for range 2 {
			s.gate.Kill()
			s.must(s.StopContainerd(syscall.SIGKILL))
			s.must(s.StartContainerd(s.ctx))
			began := time.Now()
			begin()
			s.allowed(plain.Name, "cut", node.ContainerOptions{Pull: node.PullNever})
			s.Logf("the first container was allowed %v after the gate was started", time.Since(began))
			s.allowed(index.Name, "cut-index", node.ContainerOptions{Pull: node.PullNever})
			s.allowed(byManifest, "cut-index", node.ContainerOptions{Pull: node.PullNever})
			for _, img := range []*node.Image{bare, foreign, late} {
				s.denied(img.Name, verify.SourceUnreachable, node.ContainerOptions{Pull: node.PullNever})
			}
		}

		// Without what was kept, nothing starts.
		s.gate.Kill()
		state = filepath.Join(t.TempDir(), "another")
		begin()
		s.denied(plain.Name, verify.SourceUnreachable, node.ContainerOptions{Pull: node.PullNever})
	})
}

// kept waits until the store has n envelopes.
func (s *scene) kept(state string, n int) {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.ctx, 2*time.Minute)
	defer cancel()
	for {
		raw, _ := os.ReadFile(filepath.Join(state, "store/index.json"))
		if strings.Count(string(raw), notary.ArtifactType) >= n {
			return
		}
		select {
		case <-ctx.Done():
			s.Fatalf("the store has not got %d signatures:\n%s\n%s", n, raw, s.gate.Log())
		case <-time.After(50 * time.Millisecond):
		}
	}
}
