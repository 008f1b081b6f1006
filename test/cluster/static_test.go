package cluster_test

import (
	"fmt"
	"strings"
	"syscall"
	"testing"

	"github.com/tidewaiter/tidewaiter/test/cluster"
	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
)

// TestStaticPods is a node that knows no API server, as an edge node that has lost
// it: the kubelet runs what is in a directory, and the gate is all that there is
// before it.
func TestStaticPods(t *testing.T) {
	each(t, cluster.Standalone, node.Options{Required: true}, func(s *scene) {
		s.must(node.WriteConfig(s.Path(configDir), s.policy("enforce")))
		good, bare, foreign := s.push("good", release), s.push("bare", nil), s.push("foreign", stranger)

		s.watch()

		// Before the gate is there nothing starts, and it need not be there first.
		s.static("good", good)
		s.eventually(func() error {
			st, err := s.status(named("good"))
			if err == nil && (st.State.Waiting == nil || !strings.Contains(st.State.Waiting.Message, `required plugin "tidewaiter" not present`)) {
				err = fmt.Errorf("without the gate: %+v", st)
			}
			return err
		})
		s.startGate()
		s.runs("good", 0)

		s.static("bare", bare)
		s.static("foreign", foreign)
		line := s.refused(named("bare"), verify.SignatureMissing)
		if !strings.Contains(line, "; on node "+cluster.NodeName+": tidewaiter explain ") {
			s.Errorf("no node, or no next command: %s", line)
		}
		s.refused(named("foreign"), verify.SignerUntrusted)
		// What the event of a pod would say is in the log of a kubelet without an API server.
		if log := s.KubeletLog(); !strings.Contains(log, "tidewaiter: denied [SIGNATURE_MISSING] ") {
			s.Error("the kubelet's log does not say why")
		}

		// Without the mirror the kubelet is restarted: what runs goes on, and what ends is
		// started again.
		s.must(s.reg.Stop())
		before := s.runs("good", 0)
		s.StopKubelet(syscall.SIGTERM)
		s.must(s.StartKubelet(s.ctx))
		if after := s.runs("good", 0); after != before {
			s.Error("the restart of the kubelet restarted a pod")
		}
		s.end("good")
		s.runs("good", 1)
		s.refused(named("bare"), verify.SignatureMissing)

		// The power fails. The kubelet and containerd are there before the gate.
		s.must(s.PowerCut(s.ctx))
		s.must(s.StartContainerd(s.ctx))
		s.watch()
		s.must(s.StartKubelet(s.ctx))
		s.startGate()
		s.runs("good", 2)
		// Nobody can say any more whether somebody signed them.
		s.refused(named("bare"), verify.SourceUnreachable)
		s.refused(named("foreign"), verify.SourceUnreachable)

		s.noEscape(good, bare, foreign)

		// The mirror is back, and so is a signature.
		s.must(s.reg.Start())
		_, err := s.reg.Sign(s.ctx, bare, release)
		s.must(err)
		s.runs("bare", 0)
		s.refused(named("foreign"), verify.SignerUntrusted)
		s.noEscape(bare, foreign)
	})
}
