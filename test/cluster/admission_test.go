package cluster_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/test/cluster"
	"github.com/tidewaiter/tidewaiter/test/node"
)

// TestAdmission has an API server take in deploy/enforce, as docs/install.md has it
// written for each kind of node, and holds the annotation with which a pod starts
// without the gate to the gate's own namespace.
func TestAdmission(t *testing.T) {
	each(t, cluster.Start, node.Options{}, func(s *scene) {
		site := s.Path("/tmp/site")
		s.must(os.CopyFS(filepath.Join(site, "deploy"), os.DirFS("../../deploy")))
		for name, text := range map[string]string{"config.yaml": "version: 1\nmode: enforce\n", "trustpolicy.json": "{}\n", "ca.crt": "none\n"} {
			s.must(os.WriteFile(filepath.Join(site, name), []byte(text), 0o600))
		}
		// The gate's pod leaves a node whose gate is a service of the host.
		s.kubectl("apply", "-f", "/tmp/site/deploy/kubeadm/tidewaiter.yaml")
		pods := func(want string) {
			s.eventually(func() error {
				out, err := s.Kubectl(s.ctx, "", "--namespace", "tidewaiter-system", "get", "pods", "--output", "name")
				if got := fmt.Sprint(strings.Count(out, "pod/tidewaiter-")); err == nil && got != want {
					err = fmt.Errorf("%s pods, want %s: %s", got, want, out)
				}
				return err
			})
		}
		pods("1")
		s.kubectl("label", "node", cluster.NodeName, "tidewaiter.dev/gate=host")
		pods("0")
		s.kubectl("delete", "configmap,daemonset", "--all", "--namespace", "tidewaiter-system")
		for _, kind := range []string{"kubeadm", "k3s", "rke2", "microk8s"} {
			s.must(os.WriteFile(filepath.Join(site, "kustomization.yaml"), []byte(`
resources: [deploy/`+kind+`]
components: [deploy/enforce]
namespace: tidewaiter-system
configMapGenerator:
  - name: tidewaiter
    files: [config.yaml, trustpolicy.json]
  - name: tidewaiter-truststore
    files: [ca.crt]
generatorOptions:
  disableNameSuffixHash: true
`), 0o600))
			out := s.kubectl("apply", "--dry-run=server", "-k", "/tmp/site")
			for _, want := range []string{"configmap/tidewaiter ", "configmap/tidewaiter-truststore ", "daemonset.apps/tidewaiter ", "tidewaiter-without-gate "} {
				if !strings.Contains(out, want) {
					s.Errorf("%s: no %q in\n%s", kind, want, out)
				}
			}
			if strings.Contains(out, "tidewaiter-audit") {
				s.Errorf("%s: what audits is there too:\n%s", kind, out)
			}
		}

		s.kubectl("apply", "-f", "/tmp/site/deploy/enforce/admission.yaml")
		const key = "without-gate.tidewaiter.dev"
		ask := func(namespace, annotation string) error {
			_, err := s.Kubectl(s.ctx, fmt.Sprintf(`{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": %q, "annotations": {%q: "true"}},
				"spec": {"containers": [{"name": "app", "image": "registry.example/app:1"}]}}`, namespace, annotation), "create", "--dry-run=server", "-f", "-")
			return err
		}
		refused := func(err error) error {
			if err == nil || !strings.Contains(err.Error(), "is for the gate in tidewaiter-system alone") {
				return fmt.Errorf("not refused: %v", err)
			}
			return nil
		}
		s.eventually(func() error { return refused(ask("default", key)) }) // the API server reads policies after a while
		for _, annotation := range []string{key + "/pod", key + "/container.app"} {
			s.must(refused(ask("default", annotation)))
		}
		s.must(ask("default", "gate.tidewaiter.dev"))
		s.must(ask("tidewaiter-system", key+"/container.tidewaiter"))

		// Neither can a pod get it later, however that is written.
		s.apply(`{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "later", "namespace": "default"},
			"spec": {"schedulerName": "nobody", "containers": [{"name": "app", "image": "registry.example/app:1"}]}}`)
		patch := `{"metadata": {"annotations": {"` + key + `": "true"}}}`
		for _, args := range [][]string{
			{"annotate", "pod", "later", key + "=true"},
			{"patch", "pod", "later", "--subresource=status", "-p", patch},
			{"create", "--raw", "/api/v1/namespaces/default/pods/later/binding", "-f", "-"},
			{"create", "--raw", "/api/v1/namespaces/default/bindings", "-f", "-"},
		} {
			_, err := s.Kubectl(s.ctx, `{"apiVersion": "v1", "kind": "Binding", "metadata": {"name": "later", "namespace": "default", "annotations": {"`+key+`": "true"}},
				"target": {"apiVersion": "v1", "kind": "Node", "name": "`+cluster.NodeName+`"}}`, args...)
			if err := refused(err); err != nil {
				s.Errorf("%v: %v", args, err)
			}
		}
	})
}
