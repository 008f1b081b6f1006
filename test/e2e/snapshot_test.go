package e2e

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	snapshots "github.com/containerd/containerd/api/services/snapshots/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
)

// snapshotter is a drop-in that makes another snapshotter the one of CRI.
func snapshotter(name string) string {
	return fmt.Sprintf(`version = 3
[plugins.'io.containerd.cri.v1.images']
  snapshotter = %q
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = %q
  snapshotter = %[1]q
`, name, runtime.GOOS+"/"+runtime.GOARCH)
}

// TestUserNamespaces has pods with user namespaces of their own. The overlay
// snapshotter maps IDs by mounting; native has a copy of the root filesystem made
// for each mapping, and the container's snapshot lies on that copy instead of on
// the image's own: nri/containerd computes what the copy must be called.
func TestUserNamespaces(t *testing.T) {
	for _, name := range []string{"overlayfs", "native"} {
		t.Run(name, func(t *testing.T) {
			eachOwn(t, func(*testing.T, string) node.Options {
				return node.Options{DropIns: map[string]string{"50-snapshotter.toml": snapshotter(name)}}
			}, func(s *scene) {
				s.configure(s.policy())
				s.start()
				good := s.signed("app:users", "users")
				evil := s.push(s.reg, "app:evil", node.ImageOptions{Word: "evil"})
				// As many layers as a remapped copy of the good image has snapshots.
				more := s.push(s.reg, "app:more", node.ImageOptions{Word: "users", Files: map[string]string{"/etc/more": "evil"}})
				s.allowed(good.Name, "users", node.ContainerOptions{})

				const first = 300000
				s.pod = s.runPod(node.PodOptions{UserNamespace: first})
				c := s.allowed(good.Name, "users", node.ContainerOptions{})
				s.usersFrom(c, first)
				parent := s.parent(name, c)
				if own := parent == chainID(good); own != (name == "overlayfs") {
					s.Errorf("the container's snapshot lies on %s; chain ID %s", parent, chainID(good))
				}
				s.allowed(good.Name, "users", node.ContainerOptions{}) // the copy exists
				s.denied(evil.Name, verify.SignatureMissing, node.ContainerOptions{})
				s.denied(more.Name, verify.SignatureMissing, node.ContainerOptions{})
				s.pull(evil.Name)
				s.pull(more.Name)
				s.denied(good.Name, verify.ImageMismatch, node.ContainerOptions{ImageID: evil.Config.Digest.String()})
				_, created := s.refused(good.Name, verify.ImageMismatch, node.ContainerOptions{ImageID: more.Config.Digest.String()})
				if created {
					s.Error("an image with one more layer was created as the good one")
				}

				// The same content by a name that sorts before: on 2.4 too the snapshot decides.
				s.pull(s.push(s.reg, "aaa:users", node.ImageOptions{Word: "users", Index: true, Decoys: decoys}).Name)
				s.pod = s.runPod(node.PodOptions{UserNamespace: 400000})
				s.usersFrom(s.allowed(good.Name, "users", node.ContainerOptions{}), 400000)
				s.pod = s.runPod(node.PodOptions{})
				s.allowed(good.Name, "users", node.ContainerOptions{})
			})
		})
	}
}

// usersFrom checks that a container's process has the IDs of the host from first on.
func (s *scene) usersFrom(c *node.Container, first int) {
	s.Helper()
	out, err := s.Ctr(s.ctx, "task", "ls")
	s.must(err)
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) > 1 && f[0] == c.ID {
			m, err := os.ReadFile(filepath.Join("/proc", f[1], "uid_map"))
			s.must(err)
			if got := strings.Fields(string(m)); strings.Join(got, " ") != fmt.Sprintf("0 %d 65536", first) {
				s.Errorf("the container's user IDs: %s", m)
			}
			return
		}
	}
	s.Errorf("container %s has no task:\n%s", c.ID, out)
}

// parent is what the container's snapshot lies on.
func (s *scene) parent(snapshotter string, c *node.Container) string {
	s.Helper()
	out, err := s.Ctr(s.ctx, "snapshot", "--snapshotter", snapshotter, "ls")
	s.must(err)
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == c.ID {
			return f[1]
		}
	}
	s.Fatalf("container %s has no snapshot:\n%s", c.ID, out)
	return ""
}

// chainID is that of an image of one layer.
func chainID(img *node.Image) string { return img.DiffIDs[0].String() }

// TestStrangeSnapshotter has a snapshotter of which nobody knows whether it checks
// what it mounts, as a lazy one does not.
func TestStrangeSnapshotter(t *testing.T) {
	eachOwn(t, func(t *testing.T, _ string) node.Options {
		return node.Options{DropIns: map[string]string{"50-snapshotter.toml": snapshotter("strange") +
			fmt.Sprintf("[proxy_plugins.strange]\n  type = 'snapshot'\n  address = %q\n", strange(t))}}
	}, func(s *scene) {
		c := s.policy()
		s.configure(c)
		s.start()
		good := s.signed("app:strange", "strange")
		line := s.denied(good.Name, verify.SnapshotterUnverified, node.ContainerOptions{})
		if !strings.Contains(line, `"strange"`) || !strings.Contains(line, "gate.snapshotters") {
			s.Error(line)
		}
		c.More = map[string]any{"gate": map[string]any{"snapshotters": []string{"strange"}}}
		s.configure(c)
		s.allowed(good.Name, "strange", node.ContainerOptions{})
		evil := s.push(s.reg, "app:evil", node.ImageOptions{Word: "evil", Files: map[string]string{"/evil": "evil"}})
		s.denied(evil.Name, verify.SignatureMissing, node.ContainerOptions{})
		s.denied(good.Name, verify.ImageMismatch, node.ContainerOptions{ImageID: evil.Config.Digest.String()})
		s.configure(s.policy())
		s.denied(good.Name, verify.SnapshotterUnverified, node.ContainerOptions{})
	})
}

// strange serves the native snapshotter of another containerd under another name
// and returns the socket.
func strange(t *testing.T) string {
	t.Helper()
	n, err := node.Start(t.Context(), node.Options{})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient("unix://"+n.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	snapshots.RegisterSnapshotsServer(server, &forward{to: snapshots.NewSnapshotsClient(conn)})
	socket := filepath.Join(n.Dir, "strange.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { _ = server.Serve(l) })
	t.Cleanup(func() {
		server.Stop()
		wg.Wait()
		conn.Close()
		if err := n.Stop(); err != nil {
			t.Error(err)
		}
	})
	return socket
}

// forward passes calls on to the snapshotter native of another containerd, where
// nothing but a label keeps the snapshots.
type forward struct {
	snapshots.UnimplementedSnapshotsServer
	to snapshots.SnapshotsClient
}

const there = "native"

var keep = map[string]string{"containerd.io/gc.root": "strange"}

func out(ctx context.Context) context.Context {
	md, _ := metadata.FromIncomingContext(ctx)
	return metadata.NewOutgoingContext(ctx, metadata.MD{"containerd-namespace": md["containerd-namespace"]})
}

func (f *forward) Prepare(ctx context.Context, r *snapshots.PrepareSnapshotRequest) (*snapshots.PrepareSnapshotResponse, error) {
	r.Snapshotter, r.Labels = there, keep
	return f.to.Prepare(out(ctx), r)
}

func (f *forward) View(ctx context.Context, r *snapshots.ViewSnapshotRequest) (*snapshots.ViewSnapshotResponse, error) {
	r.Snapshotter, r.Labels = there, keep
	return f.to.View(out(ctx), r)
}

func (f *forward) Commit(ctx context.Context, r *snapshots.CommitSnapshotRequest) (*emptypb.Empty, error) {
	r.Snapshotter, r.Labels = there, keep
	return f.to.Commit(out(ctx), r)
}

func (f *forward) Mounts(ctx context.Context, r *snapshots.MountsRequest) (*snapshots.MountsResponse, error) {
	r.Snapshotter = there
	return f.to.Mounts(out(ctx), r)
}

func (f *forward) Remove(ctx context.Context, r *snapshots.RemoveSnapshotRequest) (*emptypb.Empty, error) {
	r.Snapshotter = there
	return f.to.Remove(out(ctx), r)
}

func (f *forward) Stat(ctx context.Context, r *snapshots.StatSnapshotRequest) (*snapshots.StatSnapshotResponse, error) {
	r.Snapshotter = there
	return f.to.Stat(out(ctx), r)
}

func (f *forward) Usage(ctx context.Context, r *snapshots.UsageRequest) (*snapshots.UsageResponse, error) {
	r.Snapshotter = there
	return f.to.Usage(out(ctx), r)
}

func (f *forward) Update(ctx context.Context, r *snapshots.UpdateSnapshotRequest) (*snapshots.UpdateSnapshotResponse, error) {
	st, err := f.to.Stat(out(ctx), &snapshots.StatSnapshotRequest{Snapshotter: there, Key: r.GetInfo().GetName()})
	return &snapshots.UpdateSnapshotResponse{Info: st.GetInfo()}, err
}

// TestRuntimes has a runtime of a type that nobody knows. It is runc's shim.
func TestRuntimes(t *testing.T) {
	eachOwn(t, func(t *testing.T, version string) node.Options {
		tools, err := node.FindTools(t.Context(), version, t.Output())
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		for name, script := range map[string]string{
			// A runtime of a type of its own has no options: runc is found in PATH, and its
			// root has to be moved off the host's.
			"containerd-shim-strange-v2": fmt.Sprintf("#!/bin/sh\nPATH=%q:$PATH exec %q \"$@\"\n", dir, tools.Shim),
			"runc": fmt.Sprintf("#!/bin/sh\nfor a; do shift; [ \"$a\" = /run/containerd/runc/k8s.io ] && a=%q; set -- \"$@\" \"$a\"; done\nexec %q \"$@\"\n",
				filepath.Join(dir, "root"), tools.Runc),
		} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		return node.Options{DropIns: map[string]string{"50-runtime.toml": fmt.Sprintf(`version = 3
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.strange]
  runtime_type = 'io.containerd.strange.v2'
  runtime_path = %q
`, filepath.Join(dir, "containerd-shim-strange-v2"))}}
	}, func(s *scene) {
		c := s.policy()
		s.configure(c)
		s.start()
		good, evil := s.signed("app:runtime", "runtime"), s.push(s.reg, "app:evil", node.ImageOptions{Word: "evil"})
		s.allowed(good.Name, "runtime", node.ContainerOptions{})
		s.pod = s.runPod(node.PodOptions{RuntimeHandler: "strange"})
		line := s.denied(good.Name, verify.RuntimeUnverified, node.ContainerOptions{})
		if !strings.Contains(line, `"io.containerd.strange.v2"`) || !strings.Contains(line, "gate.runtimes") {
			s.Error(line)
		}
		c.More = map[string]any{"gate": map[string]any{"runtimes": []string{"io.containerd.strange.v2"}}}
		s.configure(c)
		s.allowed(good.Name, "runtime", node.ContainerOptions{})
		s.denied(evil.Name, verify.SignatureMissing, node.ContainerOptions{})
		s.configure(s.policy())
		s.denied(good.Name, verify.RuntimeUnverified, node.ContainerOptions{})
	})
}
