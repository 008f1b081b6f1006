// Package nodetest has hosts in directories, as the distributions leave them, for tests.
package nodetest

import (
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A Tree is a host in a directory: content by path. A name that ends in / is a
// directory.
type Tree map[string]string

// Make writes files below a new directory.
func (files Tree) Make(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		file := filepath.Join(root, name)
		if strings.HasSuffix(name, "/") {
			file = filepath.Join(file, "x")
		}
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(name, "/") {
			if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	return root
}

// With is files and more; a file "-" is taken away.
func (files Tree) With(more Tree) Tree {
	all := maps.Clone(files)
	for name, content := range more {
		if all[name] = content; content == "-" {
			delete(all, name)
		}
	}
	return all
}

// Directories of distributions, and the pause image of all of them.
const (
	K3sDir  = "/var/lib/rancher/k3s/agent/etc/containerd/"
	Rke2Dir = "/var/lib/rancher/rke2/agent/etc/containerd/"
	SnapDir = "/var/snap/microk8s/current/args/"

	Pause = "registry.k8s.io/pause:3.10"
)

// Generated is what each containerd.toml ends with.
const Generated = `
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "` + Pause + `"
`

// What the distributions look like after their first start.
var (
	Kubeadm = Tree{
		"/usr/bin/containerd":                        "",
		"/etc/containerd/config.toml":                "version = 3\nimports = ['/etc/containerd/conf.d/*.toml']\n" + Generated,
		"/usr/lib/systemd/system/containerd.service": "",
		"/run/systemd/system/":                       "",
		"/etc/systemd/system/":                       "",
		"/run/containerd/containerd.sock":            "",
	}
	Bare = Kubeadm.With(Tree{"/etc/containerd/config.toml": "version = 3\n" + Generated}) // as many guides have it
	None = Kubeadm.With(Tree{"/etc/containerd/config.toml": "-"})                         // as Docker's package has it

	K3s = Tree{
		"/var/lib/rancher/k3s/data/current/bin/containerd": "",
		K3sDir + "config.toml":                             "version = 3\nimports = [\"" + K3sDir + "config-v3.toml.d/*.toml\"]\n" + Generated,
		"/etc/systemd/system/k3s-agent.service":            "",
		"/run/systemd/system/":                             "",
		"/run/k3s/containerd/containerd.sock":              "",
	}
	OldK3s = K3s.With(Tree{K3sDir + "config.toml": "version = 3\n" + Generated})
	OwnK3s = OldK3s.With(Tree{K3sDir + "config-v3.toml.tmpl": "{{ template \"base\" . }}\n[debug]\n  level = 'debug'\n"})
	Rke2   = Tree{
		"/var/lib/rancher/rke2/bin/containerd":              "",
		Rke2Dir + "config.toml":                             "version = 3\nimports = [\"" + Rke2Dir + "config-v3.toml.d/*.toml\"]\n" + Generated,
		"/usr/local/lib/systemd/system/rke2-server.service": "",
		"/run/systemd/system/":                              "",
		"/etc/systemd/system/":                              "",
		"/run/k3s/containerd/containerd.sock":               "",
	}
	Microk8s = Tree{
		"/snap/microk8s/current/bin/containerd":                       "",
		SnapDir + "containerd-template.toml":                          "# Use config version 2\nversion = 2\noom_score = 0\n",
		SnapDir + "containerd.toml":                                   "# Use config version 2\nversion = 2\noom_score = 0\n" + Generated,
		"/etc/systemd/system/snap.microk8s.daemon-containerd.service": "",
		"/run/systemd/system/":                                        "",
		"/var/snap/microk8s/common/run/containerd.sock":               "",
	}
)

// Link makes links below root.
func Link(t *testing.T, root string, links map[string]string) {
	t.Helper()
	for from, to := range links {
		if err := os.Symlink(to, filepath.Join(root, from)); err != nil {
			t.Fatal(err)
		}
	}
}
