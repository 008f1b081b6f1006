package e2e

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	containerd "github.com/tidewaiter/tidewaiter/nri/containerd"
	"github.com/tidewaiter/tidewaiter/nri/reconcile"
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

// TestLarge has pods and containers that are longer than the gate allows, by themselves
// or together in a pod. Who may create pods must not keep the gate from registering.
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
			s.pod = s.runPod(node.PodOptions{Labels: labels(270 << 10)})
			pods = append(pods, s.pod)
			_, err := create(270 << 10)
			s.must(err)
		}
		// A container too many of one pod is refused, and none of the others.
		var refused error
		for n := 0; refused == nil && n < 16; n++ {
			_, refused = create(250 << 10)
		}
		if refused == nil {
			s.Error("one pod has sixteen that are long")
		} else {
			s.line(refused, verify.PodTooLarge)
		}
		s.pod = pods[0]
		_, err := create(270 << 10)
		s.must(err)
		s.must(s.gate.Stop())
		s.start()
		s.allowed(good.Name, "large", node.ContainerOptions{})
		for _, p := range pods {
			s.must(p.Remove(s.ctx))
		}

		// A pod that is too long and came while there was no gate is taken away, unless it
		// has a container.
		s.must(s.gate.Stop())
		looking := s.policy()
		looking.Mode = "audit"
		s.must(node.WriteConfig(s.dir, looking))
		s.start()
		s.pod = s.runPod(node.PodOptions{Name: "full", Labels: labels(400 << 10)})
		_, err = create(100)
		s.must(err)
		full := s.pod
		s.must(s.gate.Stop())
		empty := s.runPod(node.PodOptions{Name: "empty", Labels: labels(400 << 10)})
		short := s.runPod(node.PodOptions{Name: "short"})
		c, err := containerd.Dial(s.Socket)
		s.must(err)
		defer c.Close()
		n, err := (&reconcile.Clearer{Sandboxes: c, May: func() bool { return true }, Log: slog.New(slog.DiscardHandler)}).Clear(s.ctx)
		if s.must(err); n < 1 { // a pod that was refused above may still be there, too
			s.Errorf("took %d pods, of full %s, empty %s and short %s", n, full.ID, empty.ID, short.ID)
		}
		list, err := s.Runtime.ListPodSandbox(s.ctx, &runtimeapi.ListPodSandboxRequest{})
		s.must(err)
		left := map[string]bool{}
		for _, p := range list.Items {
			left[p.Id] = true
		}
		if left[empty.ID] || !left[full.ID] || !left[short.ID] {
			s.Errorf("left are %v", left)
		}
		s.must(full.Remove(s.ctx))
		s.must(node.WriteConfig(s.dir, s.policy()))
		s.start()
		s.pod = s.runPod(node.PodOptions{})
		s.allowed(good.Name, "large", node.ContainerOptions{})
	})
}
