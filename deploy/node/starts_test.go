package node

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/tidewaiter/tidewaiter/deploy/node/nodetest"
)

// TestStartable are files that look wrong and stop nothing.
func TestStartable(t *testing.T) {
	root := nodetest.Kubeadm.With(nodetest.Tree{
		"/etc/containerd/config.toml":     "version = 3\nimports = ['conf.d/*.toml', '/nowhere/*.toml', '/etc/containerd/config.toml']\n",
		"/etc/containerd/conf.d/big.toml": "# " + strings.Repeat("x", maxConfig),
	}).Make(t)
	nodetest.Link(t, root, map[string]string{"/etc/containerd/conf.d/masked.toml": "/dev/null"})
	if os.Geteuid() == 0 {
		if err := os.MkdirAll(filepath.Join(root, "dev"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Mknod(filepath.Join(root, "dev/null"), syscall.S_IFCHR|0o666, 1<<8|3); err != nil {
			t.Fatalf("NOT RUN: a masked drop-in needs mknod, which is not allowed here: %v", err)
		}
	} else {
		os.Remove(filepath.Join(root, "/etc/containerd/conf.d/masked.toml"))
	}
	h, err := Detect(Options{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	if all := h.Halts(nil, nil); len(all) > 0 {
		t.Errorf("%+v", all)
	}
	// Started by name, it needs the file.
	if err := os.Remove(filepath.Join(root, h.Config)); err != nil {
		t.Fatal(err)
	}
	if all := h.Halts(nil, nil); len(all) > 0 {
		t.Errorf("%+v", all)
	}
	if all := h.Halts(&Process{Config: h.Config}, nil); len(all) != 1 || !strings.Contains(all[0].Text, "which it is started with, is missing") {
		t.Errorf("%+v", all)
	}
}
