package cluster_test

import (
	"path/filepath"
	"testing"

	"github.com/tidewaiter/tidewaiter/test/cluster"
	"github.com/tidewaiter/tidewaiter/test/node"
)

// trees are where distributions have containerd's sockets and its configuration. k3s
// (pkg/agent/templates), RKE2 and MicroK8s write config_path as it is here.
var trees = []struct{ kind, run, etc string }{
	{"k3s", "/run/k3s/containerd", "/var/lib/rancher/k3s/agent/etc/containerd"},
	{"rke2", "/run/k3s/containerd", "/var/lib/rancher/rke2/agent/etc/containerd"},
	{"microk8s", "/var/snap/microk8s/common/run", "/var/snap/microk8s/current/args"},
}

// TestTrees applies the manifests for other distributions on a node whose containerd
// has its sockets and its certs.d where those have them. It is no k3s: the tree is
// shaped like one.
func TestTrees(t *testing.T) {
	each(t, cluster.Start, node.Options{}, func(s *scene) {
		bare := s.push("bare", nil)
		s.manifests()
		s.release("devel")
		s.apply(pod("bare", bare))
		s.runs("bare", 0)
		s.must(s.Hosts("registry.example", "")) // only the distribution's own leads there
		for _, tree := range trees {
			_, err := s.Node.Output(s.ctx, "sh", "-ec", `mkdir -p "$1" "$2/certs.d/registry.example"; mount --bind /run/containerd "$1"`, "sh", tree.run, tree.etc)
			s.must(err)
			s.must(s.WriteFile(filepath.Join(tree.etc, "certs.d/registry.example/hosts.toml"),
				"server = \""+s.reg.URL()+"\"\n[host.\""+s.reg.URL()+"\"]\n  capabilities = [\"pull\", \"resolve\"]\n"))
			s.must(s.DropIn("20-registry.toml", "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\n  config_path = '"+tree.etc+"/certs.d'\n"))
			s.must(s.Restart(s.ctx))
			s.kubectl("apply", "-k", "/tmp/deploy/"+tree.kind)
			s.rollout("daemonset/tidewaiter", "--namespace", namespace)
			// It asked the mirror, or it could not know that there is no signature.
			s.logged(bare, "SIGNATURE_MISSING")
			s.kubectl("delete", "-k", "/tmp/deploy/"+tree.kind, "--timeout=120s")
			_, err = s.Node.Output(s.ctx, "umount", tree.run)
			s.must(err)
			_, err = s.Node.Output(s.ctx, "rm", "-rf", "/var/lib/tidewaiter", "/run/tidewaiter")
			s.must(err)
		}
	})
}
