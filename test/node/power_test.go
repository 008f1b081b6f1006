package node_test

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/tidewaiter/tidewaiter/test/node"
)

// TestPowerCut has containers run and files written when the power goes: what was
// synced is there after, what was not is not, and images are.
func TestPowerCut(t *testing.T) {
	each(t, func(t *testing.T, ctx context.Context, version string) {
		n := start(t, ctx, node.Options{ContainerdVersion: version})
		reg := newRegistry(t, "registry.example", node.RegistryOptions{})
		if err := n.Use(reg); err != nil {
			t.Fatal(err)
		}
		img := push(t, ctx, reg, "app:1", node.ImageOptions{Word: "before"})
		run(t, ctx, n, img.Name, node.RunOptions{})
		d, err := n.NewDisk(ctx, 16)
		if err != nil {
			t.Fatal(err)
		}
		w, err := node.NewWatch(d.Dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"synced", "written", "renamed"} {
			f, err := os.Create(filepath.Join(d.Dir, name))
			if err != nil {
				t.Fatal(err)
			}
			_, err = f.WriteString(name)
			if err == nil && name != "written" {
				err = f.Sync()
			}
			f.Close()
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Rename(filepath.Join(d.Dir, "renamed"), filepath.Join(d.Dir, "moved")); err != nil {
			t.Fatal(err)
		}
		if err := w.Next(ctx, "moved"); err != nil {
			t.Fatal(err)
		}
		w.Close()

		if err := n.PowerCut(ctx); err != nil {
			t.Fatal(err)
		}
		if err := reg.Stop(); err != nil {
			t.Fatal(err)
		}
		if err := n.StartContainerd(ctx); err != nil {
			t.Fatal(err)
		}
		// The second sync has committed that there is a file "written", not what is in it.
		for name, want := range map[string]string{"synced": "synced", "written": "", "renamed": "renamed", "moved": "none"} {
			got := "none"
			if b, err := os.ReadFile(filepath.Join(d.Dir, name)); err == nil {
				got = string(b)
			}
			if got != want {
				t.Errorf("%s: %q, want %q", name, got, want)
			}
		}
		if _, out := run(t, ctx, n, img.Name, node.RunOptions{Container: node.ContainerOptions{Pull: node.PullNever}}); out != "before" {
			t.Errorf("printed %q", out)
		}
	})
}
