package cluster_test

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/test/cluster"
	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
)

// kustomization is that of docs/install.md for a gate that enforces from its pod.
const kustomization = `
resources: [../deploy/kubeadm]
components: [../deploy/enforce]
namespace: tidewaiter-system
configMapGenerator:
  - name: tidewaiter
    files: [config.yaml, trustpolicy.json, allow.txt]
  - name: tidewaiter-truststore
    files: [ca.crt]
generatorOptions:
  disableNameSuffixHash: true
images:
  - name: ghcr.io/tidewaiter/tidewaiter
    newTag: `

// TestUpgrade enforces from the pod, and replaces the gate while pods are created all
// the time: none of an unsigned image may be created, ever.
func TestUpgrade(t *testing.T) {
	each(t, cluster.Start, node.Options{}, func(s *scene) {
		s.watch()
		good, bare := s.push("good", release), s.push("bare", nil)
		first, second := s.release("v1"), s.release("v2")
		s.manifests()
		s.site("audit", first, second)
		s.deploy("v1")
		s.site("enforce", first, second)
		s.deploy("v1")
		s.gateLog(`"configuration in force"`, `"enforce"`)
		toml, err := os.ReadFile(s.Path("/tmp/deploy/enforce/99-tidewaiter.toml"))
		s.must(err)
		s.must(s.DropIn(node.RequiredFile, string(toml)))
		s.must(s.Restart(s.ctx))
		s.watch()
		s.apply(pod("bare", bare))
		s.refused(named("bare"), verify.SignatureMissing)

		load := s.load(good, bare)
		s.deploy("v2")
		s.gateLog(`"version":"v2"`)
		s.Logf("during the upgrade %d containers of a signed image were asked for, and %d refused", load.good.Load(), load.refused.Load())
		load.more(20)
		// A release that does not come up does not take the place of one that does.
		s.kubectl("--namespace", namespace, "patch", "daemonset", "tidewaiter", "--type=json",
			"--patch", `[{"op":"replace","path":"/spec/template/spec/containers/0/args","value":["run","--no-such-flag"]}]`)
		s.eventually(func() error {
			out, err := s.Kubectl(s.ctx, "", "--namespace", namespace, "get", "pods")
			if err == nil && (!strings.Contains(out, "CrashLoopBackOff") && !strings.Contains(out, "Error") || !strings.Contains(out, "1/1")) {
				err = fmt.Errorf("want one pod that crashes beside one that is ready:\n%s", out)
			}
			return err
		})
		load.more(20)
		s.kubectl("--namespace", namespace, "rollout", "undo", "daemonset/tidewaiter")
		s.rollout("daemonset/tidewaiter", "--namespace", namespace)
		load.more(20)
		// One that crashes is away for a while: then containerd refuses.
		s.end("tidewaiter-")
		load.more(50)
		s.ready(true)
		load.more(20)
		// Without the API server too.
		s.StopControlPlane()
		s.end("tidewaiter-")
		load.more(50)
		s.runs("tidewaiter-", 1)
		load.more(20)
		s.must(s.StartControlPlane(s.ctx))
		load.stop()
		s.noEscape(good, bare)

		// Nobody else gets the annotation with which the gate's own container starts.
		annotated := strings.Replace(pod("annotated", bare), `"metadata":{`, `"metadata":{"annotations":{"without-gate.tidewaiter.dev":"true"},`, 1)
		if out, err := s.Kubectl(s.ctx, annotated, "apply", "-f", "-"); err == nil || !strings.Contains(err.Error(), "is for the gate in tidewaiter-system alone") {
			s.Errorf("a pod with the annotation: %s %v", out, err)
		}

		// The way back without a new container.
		s.refused(named("bare"), verify.SignatureMissing)
		s.site("audit", first, second)
		s.kubectl("apply", "-k", "/tmp/site")
		s.runs("bare", 0)
	})
}

// site writes /tmp/site: the kustomization for a site with its configuration, with
// the gate's own images in a digest allowlist.
func (s *scene) site(mode string, images ...string) {
	s.Helper()
	c := s.policy(mode)
	c.Stores = map[string][]byte{"ca/node/ca.crt": acme.PEM()}
	c.Statements[0].TrustStores = []string{"ca:node"}
	c.More = map[string]any{"allowDigests": []string{"allow.txt"}}
	dir := s.TempDir()
	s.must(node.WriteConfig(dir, c))
	var list strings.Builder
	for _, image := range images {
		out, err := s.Ctr(s.ctx, "images", "list", "name=="+image)
		s.must(err)
		for _, f := range strings.Fields(out) {
			if strings.HasPrefix(f, "sha256:") {
				fmt.Fprintln(&list, f, namespace)
			}
		}
	}
	for _, name := range []string{"config.yaml", "trustpolicy.json"} {
		b, err := os.ReadFile(dir + "/" + name)
		s.must(err)
		s.must(s.WriteFile("/tmp/site/"+name, string(b)))
	}
	s.must(s.WriteFile("/tmp/site/allow.txt", list.String()))
	s.must(s.WriteFile("/tmp/site/ca.crt", string(acme.PEM())))
}

// deploy rolls a version of the gate out, with /tmp/site.
func (s *scene) deploy(version string) {
	s.Helper()
	s.must(s.WriteFile("/tmp/site/kustomization.yaml", kustomization+version+"\n"))
	s.kubectl("apply", "-k", "/tmp/site")
	s.rollout("daemonset/tidewaiter", "--namespace", namespace)
}

// gateLog waits until the log of the gate in the pod has a line with all of these.
func (s *scene) gateLog(parts ...string) {
	s.Helper()
	s.eventually(func() error {
		out, err := s.Kubectl(s.ctx, "", "--namespace", namespace, "logs", "daemonset/tidewaiter")
		if err != nil {
			return err
		}
	lines:
		for line := range strings.Lines(out) {
			for _, p := range parts {
				if !strings.Contains(line, p) {
					continue lines
				}
			}
			return nil
		}
		return fmt.Errorf("no line with %q in the gate's log:\n%s", parts, tail(out))
	})
}

// A load creates containers all the time, as a kubelet that has much to do.
type load struct {
	s    *scene
	end  chan struct{}
	done sync.WaitGroup

	bare    atomic.Int64 // of an unsigned image: all refused
	good    atomic.Int64 // of a signed one
	refused atomic.Int64 // of those, refused
	away    atomic.Int64 // refused by containerd, since the gate was away
}

// load starts it.
func (s *scene) load(good, bare *node.Image) *load {
	s.Helper()
	l := &load{s: s, end: make(chan struct{})}
	for range 2 {
		l.done.Go(func() {
			var p *node.Pod
			for i := uint32(0); ; i++ {
				select {
				case <-l.end:
					return
				case <-time.After(20 * time.Millisecond):
				}
				var err error
				if p == nil {
					if p, err = s.RunPod(s.ctx, node.PodOptions{}); err != nil {
						s.Error(err)
						return
					}
				}
				if !l.try(p, good, bare, i) {
					p = nil
				}
			}
		})
	}
	return l
}

// try asks for a container of each image in a pod. It reports false when the kubelet
// has removed the pod, of which no API server ever told it.
func (l *load) try(p *node.Pod, good, bare *node.Image, attempt uint32) bool {
	s := l.s
	gone := func(err error) bool {
		return strings.Contains(node.Text(err), "failed to find sandbox") || strings.Contains(node.Text(err), "is not running")
	}
	c, err := p.Create(s.ctx, node.ContainerOptions{Image: bare.Name, Name: "bare", Attempt: attempt})
	switch {
	case err == nil:
		s.Errorf("escaped: container %s of %s was created", c.ID, bare.Name)
	case gone(err):
		return false
	case !strings.Contains(node.Text(err), "tidewaiter"):
		s.Errorf("refused by somebody else: %v", err)
	case strings.Contains(node.Text(err), "not present"):
		l.away.Add(1)
	}
	l.bare.Add(1)
	c, err = p.Create(s.ctx, node.ContainerOptions{Image: good.Name, Name: "good", Attempt: attempt})
	if gone(err) {
		return false
	}
	l.good.Add(1)
	if err != nil {
		l.refused.Add(1)
		return true
	}
	if err := c.Remove(s.ctx); err != nil && !strings.Contains(node.Text(err), "not found") {
		s.Error(err)
	}
	return true
}

// more waits until an unsigned image was tried so many more times.
func (l *load) more(n int64) {
	l.s.Helper()
	n += l.bare.Load()
	l.s.eventually(func() error {
		if got := l.bare.Load(); got < n {
			return fmt.Errorf("%d containers were asked for, want %d", got, n)
		}
		return nil
	})
}

// stop ends it and says what it did.
func (l *load) stop() {
	l.s.Helper()
	close(l.end)
	l.done.Wait()
	if l.away.Load() == 0 || l.good.Load() == l.refused.Load() {
		l.s.Error("the gate was never away, or no signed image was created: this tested nothing")
	}
	l.s.Logf("%d containers of an unsigned image were refused, %d of them while the gate was away; of %d of a signed one %d were refused",
		l.bare.Load(), l.away.Load(), l.good.Load(), l.refused.Load())
}
