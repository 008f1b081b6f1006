package e2e

import (
	"context"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
)

// labels returns some of n bytes together; each is one that Kubernetes takes.
func labels(n int) map[string]string {
	m := map[string]string{}
	for size := 0; size < n; {
		key := fmt.Sprintf("%s.%s/k%d", strings.Repeat("a", 63), strings.Repeat("b", 63), len(m))
		m[key] = strings.Repeat("v", 63)
		size += len(key) + 63
	}
	return m
}

// environment returns one of n bytes together. The kernel takes 128 KiB of each.
func environment(n int) map[string]string {
	m := map[string]string{}
	for ; n > 0; n -= 64 << 10 {
		m[fmt.Sprintf("LONG_%d", n)] = strings.Repeat("<", min(n, 64<<10)) // six bytes each in JSON
	}
	return m
}

// TestLarge has pods and containers that are too long for containerd to tell a gate
// of: it would drop the gate for it, or crash. Who may create pods must not get there,
// whatever their images are.
func TestLarge(t *testing.T) {
	eachOwn(t, func(*testing.T, string) node.Options { return node.Options{} }, func(s *scene) {
		ctx, cancel := context.WithTimeout(s.T.Context(), 8*time.Minute)
		defer cancel()
		s.ctx = ctx
		good := s.signed("app:large", "large")
		s.pull(good.Name)
		s.configure(s.policy())
		s.start()
		// What is longer is refused, a pod and a container.
		if p, err := s.RunPod(s.ctx, node.PodOptions{Labels: labels(320 << 10)}); err == nil {
			s.Errorf("pod %s runs", p.ID)
		} else {
			s.line(err, verify.PodTooLarge)
		}
		create := func(n int) (*node.Container, error) {
			o := node.ContainerOptions{Image: good.Name}
			s.prepare(&o)
			o.Env = environment(n)
			return s.pod.Create(s.ctx, o)
		}
		if c, err := create(320 << 10); err == nil {
			s.Errorf("container %s was created", c.ID)
		} else {
			s.line(err, verify.PodTooLarge)
		}

		// As many as do not fit into one message of NRI, each nearly as long as it may be,
		// keep no gate away.
		var pods []*node.Pod
		for range 8 {
			pods = append(pods, s.runPod(node.PodOptions{Labels: labels(270 << 10)}))
			_, err := create(270 << 10)
			s.must(err)
		}
		s.must(s.gate.Stop())
		s.start()
		s.allowed(good.Name, "large", node.ContainerOptions{})
		for _, p := range append(pods, s.pod) {
			s.must(p.Remove(s.ctx))
		}

		// Those that came while there was no gate: it does not bring containerd down, says
		// which they are, and is back when they are gone. To look on, too.
		s.must(s.gate.Stop())
		pods = nil
		for i := range 10 {
			pods = append(pods, s.runPod(node.PodOptions{Name: fmt.Sprintf("long-%d", i), Labels: labels(1 << 20)}))
		}
		s.pod = s.runPod(node.PodOptions{})
		waits := func(policy node.Config) {
			s.Helper()
			s.must(node.WriteConfig(s.dir, policy))
			var err error
			s.gate, err = s.StartGate(s.ctx, node.GateOptions{ConfigDir: s.dir, NodeName: "edge-1", Binary: program})
			s.must(err)
			l := s.wait(0, func(l node.Line) bool { return l.Msg == "not registered with the runtime" })
			if why := fmt.Sprint(l.Fields["error"]); !strings.Contains(why, "does not register") || !strings.Contains(why, "pod default/long-") || len(why) > 1000 {
				s.Errorf("it says: %s", why)
			}
			s.absent(good.Name) // and containerd is there to say so
		}
		waits(s.policy())
		s.must(s.gate.Stop())
		s.must(s.StopContainerd(syscall.SIGTERM))
		s.must(s.StartContainerd(s.ctx))
		waits(s.policy())
		s.must(s.gate.Stop())
		looking := s.policy()
		looking.Mode = "audit"
		waits(looking)
		for _, p := range pods {
			s.must(p.Remove(s.ctx))
		}
		s.wait(0, node.Registered)
		s.configure(s.policy())
		s.allowed(good.Name, "large", node.ContainerOptions{})
	})
}
