package cluster_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/test/cluster"
	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

// In the manifests.
const (
	namespace = "tidewaiter-system"
	manifest  = "/tmp/deploy/kubeadm/tidewaiter.yaml"
)

// TestAudit is the first day: the manifest as it is on a node that knows nothing of
// the gate, a configuration for it, and off again.
func TestAudit(t *testing.T) {
	each(t, cluster.Start, node.Options{}, func(s *scene) {
		s.watch()
		good, bare := s.push("good", release), s.push("bare", nil)
		s.manifests()
		s.release("devel")
		before := s.leftovers()

		// A pod that was there before is looked at too.
		s.apply(pod("bare", bare))
		s.runs("bare", 0)
		s.kubectl("apply", "-f", manifest)
		s.rollout("daemonset/tidewaiter", "--namespace", namespace)
		s.logged(bare, "SIGNATURE_MISSING")

		// The API server takes in everything that there is.
		s.kubectl("apply", "--dry-run=server", "-k", "/tmp/deploy/kubeadm")
		for _, kind := range []string{"k3s", "rke2", "microk8s"} {
			s.kubectl("apply", "--dry-run=server", "-k", "/tmp/deploy/"+kind)
		}

		// Nobody is trusted yet, so the signed image would be refused as well. With a
		// configuration it would not, and the pod of the gate is not started anew for it.
		s.apply(pod("good", good))
		s.runs("good", 0)
		s.logged(good, "POLICY_INVALID", "SIGNER_UNTRUSTED")
		gate := s.runs("tidewaiter-", 0)
		s.configMaps("audit")
		s.logged(good, "VERIFIED")
		if now := s.runs("tidewaiter-", 0); now != gate {
			s.Error("the configuration came with another container")
		}
		if out := s.kubectl("--namespace", namespace, "exec", "daemonset/tidewaiter", "--", "/tidewaiter", "status"); !strings.Contains(out, " on "+cluster.NodeName+": healthy") {
			s.Errorf("status in the pod: %s", out)
		}

		// The probe means that containerd asks: when it cannot, the pod is not ready.
		socket := s.Path("/run/nri/nri.sock")
		s.must(os.Rename(socket, socket+".away"))
		s.end("tidewaiter-")
		s.ready(false)
		s.must(os.Rename(socket+".away", socket))
		s.ready(true)

		s.kubectl("delete", "-f", manifest, "--timeout=120s")
		// What docs/install.md says that stays, and nothing else.
		if left := slices.DeleteFunc(s.leftovers(), func(p string) bool {
			return slices.Contains(before, p) || p == "/run/tidewaiter" || strings.HasPrefix(p, "/var/lib/tidewaiter/")
		}); len(left) > 0 {
			s.Errorf("left after kubectl delete: %v", left)
		}
		if out, err := s.Kubectl(s.ctx, "", "get", "namespace", namespace); err == nil {
			s.Errorf("left after kubectl delete: %s", out)
		}
		s.apply(pod("after", bare))
		s.runs("after", 0)
	})
}

// configMaps gives the gate in the pod a configuration and a trust store.
func (s *scene) configMaps(mode string) {
	s.Helper()
	dir := s.TempDir()
	c := s.policy(mode)
	c.Stores = notarytest.Stores{"ca/node/ca.crt": acme.PEM()}
	c.Statements[0].TrustStores = []string{"ca:node"}
	s.must(node.WriteConfig(dir, c))
	read := func(name string) string {
		b, err := os.ReadFile(filepath.Join(dir, name))
		s.must(err)
		return string(b)
	}
	for name, data := range map[string]map[string]string{
		"tidewaiter-truststore": {"ca.crt": string(acme.PEM())},
		"tidewaiter":            {"config.yaml": read("config.yaml"), "trustpolicy.json": read("trustpolicy.json")},
	} {
		b, err := json.Marshal(map[string]any{
			"apiVersion": "v1", "kind": "ConfigMap",
			"metadata": map[string]any{"name": name, "namespace": namespace},
			"data":     data,
		})
		s.must(err)
		s.apply(string(b))
	}
}

// logged waits until the log of the gate in the pod has a line about an image with
// one of the codes, as the answer or as what the answer would have been.
func (s *scene) logged(img *node.Image, codes ...string) {
	s.Helper()
	s.eventually(func() error {
		out, err := s.Kubectl(s.ctx, "", "--namespace", namespace, "logs", "daemonset/tidewaiter")
		if err != nil {
			return err
		}
		for line := range strings.Lines(out) {
			if strings.Contains(line, img.Target.Digest.String()) && slices.ContainsFunc(codes, func(c string) bool { return strings.Contains(line, `"`+c+`"`) }) {
				return nil
			}
		}
		return fmt.Errorf("no line about %s with %v:\n%s", img.Name, codes, tail(out))
	})
}

// ready waits until the pod of the gate is ready, or is not.
func (s *scene) ready(want bool) {
	s.Helper()
	s.eventually(func() error {
		out, err := s.Kubectl(s.ctx, "", "--namespace", namespace, "get", "pods", "-o", `jsonpath={.items[*].status.conditions[?(@.type=="Ready")].status}`)
		if err == nil && out != map[bool]string{true: "True", false: "False"}[want] {
			err = fmt.Errorf("the gate's pod is ready: %s, want %v", out, want)
		}
		return err
	})
}

// leftovers is what is on the machine: files that differ from those of this host,
// and what is in /run.
func (s *scene) leftovers() []string {
	s.Helper()
	found, err := s.Changes()
	s.must(err)
	entries, err := os.ReadDir(s.Path("/run"))
	s.must(err)
	for _, e := range entries {
		found = append(found, "/run/"+e.Name())
	}
	return found
}
