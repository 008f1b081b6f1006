package e2e

import (
	"fmt"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
)

// TestOlder has versions of containerd without a hook that stays closed, where
// TIDEWAITER_TEST_CONTAINERD names some. A gate that is to enforce says that it
// cannot, again and again, and never that it is registered; containerd goes on
// without it. To audit it registers.
func TestOlder(t *testing.T) {
	if notRoot != "" {
		t.Skip(notRoot)
	}
	for _, v := range node.Older() {
		t.Run(v, func(t *testing.T) {
			w, err := newWorld(t.Context(), node.Options{ContainerdVersion: v, Log: t.Output()})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := w.stop(); err != nil {
					t.Error(err)
				}
			})
			s := newScene(t, w)
			good, evil := s.signed("app:older", "older"), s.push(s.reg, "app:older-evil", node.ImageOptions{Word: "evil"})
			enforce := s.policy()
			audit := s.policy()
			audit.Mode = "audit"
			refused := func(l node.Line) bool { return l.Msg == "not registered with the runtime" }

			s.configure(enforce)
			s.gate, err = s.StartGate(s.ctx, node.GateOptions{ConfigDir: s.dir, NodeName: "edge-1", Binary: program, Args: []string{"--log-level", "debug"}})
			s.must(err)
			mark := 0
			for range 3 {
				l := s.wait(mark, refused)
				if text := fmt.Sprint(l.Fields["error"]); !strings.Contains(text, "containerd "+v) || !strings.Contains(text, "2.2 or later") || !strings.Contains(text, "mode: audit") {
					s.Errorf("the error does not say what to do: %s", text)
				}
				s.allowed(evil.Name, "evil", node.ContainerOptions{})
				mark = s.gate.Mark()
			}
			registered := func(since int) {
				s.Helper()
				for _, l := range s.gate.Lines()[since:] {
					if node.Registered(l) {
						s.Errorf("it cannot enforce here, and says: %s", l.Raw)
					}
				}
			}
			registered(0)

			mark = s.gate.Mark()
			s.configure(audit)
			s.wait(mark, node.Registered)
			would := func(mark int, msg string, code verify.Reason) {
				s.Helper()
				s.wait(mark, func(l node.Line) bool {
					d := decision(l)
					return l.Msg == msg && (d["enforceReason"] == string(code) || msg == "verification" && d["reason"] == string(code))
				})
			}
			// It may have been verified ahead of time, before the gate was registered.
			s.allowed(evil.Name, "evil", node.ContainerOptions{})
			would(mark, "verification", verify.SignatureMissing)
			mark = s.gate.Mark()
			s.allowed(evil.Name, "evil", node.ContainerOptions{})
			would(mark, "decision", verify.SignatureMissing)
			s.allowed(good.Name, "older", node.ContainerOptions{})
			would(mark, "verification", verify.Verified)
			outside := s.push(s.reg, "other:older", node.ImageOptions{Word: "outside"})
			s.allowed(outside.Name, "outside", node.ContainerOptions{})
			would(mark, "decision", verify.PolicyNoMatch)

			// Back to enforce: it does not go on as if it did.
			s.configure(enforce)
			mark = s.gate.Mark()
			s.wait(mark, refused)
			mark = s.gate.Mark()
			s.wait(mark, refused)
			registered(mark)
			s.allowed(evil.Name, "evil", node.ContainerOptions{})
		})
	}
}
