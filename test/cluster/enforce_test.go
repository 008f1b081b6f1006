package cluster_test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/test/cluster"
	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
)

// TestEnforce is a cluster whose node has the gate as a process: what users see with
// kubectl, and what holds without the API server.
func TestEnforce(t *testing.T) {
	each(t, cluster.Start, node.Options{Required: true}, func(s *scene) {
		s.must(node.WriteConfig(s.Path(configDir), s.policy("enforce")))
		s.startGate()
		s.watch()
		good, bare, late := s.push("good", release), s.push("bare", nil), s.push("late", nil)
		next, bad := s.push("next", release), s.push("bad", stranger)

		s.apply(pod("good", good))
		s.apply(pod("bare", bare))
		s.runs("good", 0)
		line := s.refused(named("bare"), verify.SignatureMissing)

		// What somebody sees who asks why.
		s.eventually(func() error {
			out, err := s.Kubectl(s.ctx, "", "describe", "pod", "bare")
			if err == nil && !strings.Contains(out, line) {
				err = fmt.Errorf("want %q:\n%s", line, out)
			}
			return err
		})

		// A mirror that is slow: the kubelet hears PENDING, and its next try the answer.
		answer := s.hang()
		slow := s.push("slow", release)
		s.apply(pod("slow", slow))
		s.refused(named("slow"), verify.Pending)
		answer()
		s.runs("slow", 0)

		// A Deployment rolls out what is signed, and keeps what it had when the next
		// release is not.
		s.apply(deployment(good))
		s.rollout("deployment/web")
		s.apply(deployment(next))
		s.rollout("deployment/web")
		s.apply(deployment(bad))
		s.refused(of(bad), verify.SignerUntrusted)
		out, err := s.Kubectl(s.ctx, "", "get", "deployment", "web", "-o", "jsonpath={.status.availableReplicas}")
		if err != nil || out != "2" {
			s.Errorf("available after a bad release: %q, %v", out, err)
		}
		s.kubectl("rollout", "undo", "deployment/web")
		s.rollout("deployment/web")

		// The API server is gone. What ends starts again, and what a node can still be told
		// to run is verified as ever.
		s.static("static", next)
		s.runs("static", 0)
		s.StopControlPlane()
		s.end("good")
		s.runs("good", 1)
		s.static("late", late)
		s.refused(named("late"), verify.SignatureMissing)

		// The machine is switched on again, with no API server and no mirror. The kubelet
		// knows its static pods, and no others before it has seen the API server.
		s.must(s.reg.Stop())
		s.must(s.PowerCut(s.ctx))
		s.must(s.StartContainerd(s.ctx))
		s.watch()
		s.must(s.StartKubelet(s.ctx))
		s.startGate()
		s.runs("static", 1)
		s.refused(named("late"), verify.SourceUnreachable)

		// It is back, and the mirror is not.
		s.must(s.StartControlPlane(s.ctx))
		s.runs("good", 2)
		s.rollout("deployment/web")
		s.refused(named("bare"), verify.SourceUnreachable)
		s.must(s.reg.Start())
		s.refused(named("bare"), verify.SignatureMissing)
		s.noEscape(good, bare, bad, late)
	})
}

// hang makes the registry say nothing about signatures until what it returns is
// called.
func (s *scene) hang() (answer func()) {
	wait := make(chan struct{})
	s.reg.Fault(func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if strings.Contains(r.URL.Path, "/referrers/") {
				select {
				case <-wait:
				case <-r.Context().Done():
				}
			}
			h.ServeHTTP(w, r)
		})
	})
	return func() { close(wait); s.reg.Fault(nil) }
}

func (s *scene) kubectl(args ...string) string {
	s.Helper()
	out, err := s.Kubectl(s.ctx, "", args...)
	s.must(err)
	return out
}

func (s *scene) apply(object string) {
	s.Helper()
	if out, err := s.Kubectl(s.ctx, object, "apply", "-f", "-"); err != nil {
		s.Fatal(out, err)
	}
}

// rollout waits until a rollout is complete.
func (s *scene) rollout(what ...string) {
	s.Helper()
	s.kubectl(append([]string{"rollout", "status", "--timeout=150s"}, what...)...)
}
