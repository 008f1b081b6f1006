package cluster_test

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/test/cluster"
	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
)

// fromPod is the kustomization of docs/install.md for a gate of the host that a pod
// brings, for a machine without systemd.
const fromPod = `
resources: [../deploy/kubeadm]
components: [%s]
namespace: tidewaiter-system
configMapGenerator:
  - name: tidewaiter
    files: [config.yaml, trustpolicy.json, allow.txt]
  - name: tidewaiter-truststore
    files: [ca.crt]
generatorOptions:
  disableNameSuffixHash: true
patches:
  - target: {kind: DaemonSet, name: tidewaiter-host}
    patch: |
      - {op: add, path: /spec/template/spec/containers/0/args/-, value: --gate-command}
      - {op: add, path: /spec/template/spec/containers/0/args/-, value: sv restart tidewaiter}
      - {op: add, path: /spec/template/spec/containers/0/args/-, value: --restart-command}
      - {op: add, path: /spec/template/spec/containers/0/args/-, value: sv restart containerd}
images:
  - name: ghcr.io/tidewaiter/tidewaiter
    newTag: %s
`

// TestInstaller has a pod bring the host its gate, in audit, then enforcing, then a
// newer one, and leave it there when the pod goes.
func TestInstaller(t *testing.T) {
	each(t, cluster.Start, node.Options{}, func(s *scene) {
		good, bare := s.push("good", release), s.push("bare", nil)
		pause, err := s.reg.Push(s.ctx, "app:pause", node.ImageOptions{Word: "pause"})
		s.must(err)
		_, err = s.reg.Sign(s.ctx, pause, release)
		s.must(err)
		s.must(s.DropIn("10-pause.toml", "version = 3\n[plugins.'io.containerd.cri.v1.images'.pinned_images]\n  sandbox = '"+pause.Name+"'\n"))
		s.must(s.Restart(s.ctx))
		_, err = s.PullImage(s.ctx, pause.Name)
		s.must(err)
		s.supervise()
		first, second := s.release("v1.0.0"), s.release("v1.1.0")
		s.manifests()
		roll := func(components, version string) {
			s.Helper()
			s.must(s.WriteFile("/tmp/site/kustomization.yaml", fmt.Sprintf(fromPod, components, version)))
			s.kubectl("apply", "-k", "/tmp/site")
		}
		host := func(want string) {
			s.Helper()
			s.eventually(func() error {
				out, err := s.Command(s.ctx, "/usr/local/bin/tidewaiter", "status").CombinedOutput()
				if !strings.Contains(string(out), want) {
					return fmt.Errorf("want %s: %s %w\n%s", want, out, err, s.podLog("tidewaiter-host"))
				}
				return nil
			})
		}

		// The gate itself has no pod on a node with the label.
		s.kubectl("label", "node", cluster.NodeName, "tidewaiter.dev/gate=host")
		s.site("audit", first, second)
		roll("../deploy/host", "v1.0.0")
		s.rollout("daemonset/tidewaiter-host", "--namespace", namespace)
		host("mode           audit")
		if out := s.kubectl("--namespace", namespace, "get", "pods", "--no-headers"); strings.Count(out, "\n") != 1 {
			s.Errorf("more than the pod of the host's gate:\n%s", out)
		}
		s.apply(pod("bare", bare))
		s.runs("bare", 0)
		s.kubectl("delete", "pod", "bare", "--wait")

		s.site("enforce", first, second)
		roll("../deploy/host, ../deploy/host-enforce", "v1.0.0")
		host("mode           enforce")
		s.eventually(func() error {
			_, err := os.Stat(s.Path("/etc/containerd/conf.d/99-tidewaiter.toml"))
			return err
		})
		s.rollout("daemonset/tidewaiter-host", "--namespace", namespace)
		s.apply(pod("bare", bare))
		s.refused(named("bare"), verify.SignatureMissing)
		s.apply(pod("good", good))
		s.runs("good", 0)

		roll("../deploy/host, ../deploy/host-enforce", "v1.1.0")
		s.eventually(func() error {
			out, err := s.Node.Output(s.ctx, "/usr/local/bin/tidewaiter", "version")
			if err == nil && !strings.Contains(out, "v1.1.0") {
				err = fmt.Errorf("the host has %s", out)
			}
			return err
		})
		s.rollout("daemonset/tidewaiter-host", "--namespace", namespace)

		// The host's gate does not need the pod.
		s.kubectl("--namespace", namespace, "delete", "daemonset", "tidewaiter-host", "--wait")
		host("mode           enforce")
		s.refused(named("bare"), verify.SignatureMissing)
	})
}

// podLog is what the pods of a DaemonSet wrote last.
func (s *scene) podLog(name string) string {
	out, err := s.Kubectl(s.ctx, "", "--namespace", namespace, "logs", "daemonset/"+name, "--tail=20")
	if err != nil {
		return err.Error()
	}
	return out
}
