package node_test

import (
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/tidewaiter/tidewaiter/test/node"
)

// TestMachine has containerd where a host has it, cuts the power, and looks at what
// has changed on the disk.
func TestMachine(t *testing.T) {
	if notRoot != "" {
		t.Skip(notRoot)
	}
	ctx := t.Context()
	reg := newRegistry(t, "registry.example", node.RegistryOptions{})
	img := push(t, ctx, reg, "app:1", node.ImageOptions{Word: "hello"})
	n := start(t, ctx, node.Options{Machine: true})
	if err := n.Use(reg); err != nil {
		t.Fatal(err)
	}
	if _, word := run(t, ctx, n, img.Name, node.RunOptions{}); word != "hello" {
		t.Errorf("printed %q", word)
	}
	if out, err := n.Output(ctx, "ls", "/run/containerd/containerd.sock", "/run/nri/nri.sock", "/etc/containerd/config.toml"); err != nil {
		t.Error(out, err)
	}
	if err := os.WriteFile(n.Path("/etc/tidewaiter-was-here"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(n.Path("/run/gone"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := n.StartDaemon("sleeper", "sleep", "1000")
	if err != nil {
		t.Fatal(err)
	}
	if err := n.PowerCut(ctx); err != nil {
		t.Fatal(err)
	}
	<-d.Done()
	if left := traces(t, n.Dir); slices.ContainsFunc(left, func(s string) bool { return strings.Contains(s, "shim") || strings.Contains(s, "sleep 1000") }) {
		t.Errorf("left after a power cut: %v", left)
	}
	if _, err := os.Stat(n.Path("/run/gone")); err == nil {
		t.Error("/run is as it was")
	}
	if err := n.StartContainerd(ctx); err != nil {
		t.Fatal(err)
	}
	if err := reg.Stop(); err != nil {
		t.Fatal(err)
	}
	if _, word := run(t, ctx, n, img.Name, node.RunOptions{Container: node.ContainerOptions{Pull: node.PullNever}}); word != "hello" {
		t.Errorf("printed %q after the power cut", word)
	}
	changed, err := n.Changes()
	if err != nil || !slices.Contains(changed, "/etc/tidewaiter-was-here") || !slices.Contains(changed, "/etc/containerd/config.toml") {
		t.Errorf("changed %v, %v", changed, err)
	}
	if _, err := os.Stat("/etc/tidewaiter-was-here"); err == nil {
		t.Error("the machine changed the host")
	}
	if err := n.StopContainerd(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	dir := n.Dir
	if err := n.Stop(); err != nil {
		t.Fatal(err)
	}
	if left := traces(t, dir); len(left) > 0 {
		t.Errorf("left after Stop: %v", left)
	}
}
