package containerd

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/nri/pkg/api"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
)

// place is where the CRI plugin mounts target for a pod.
func place(target digest.Digest) string {
	return "/run/containerd/io.containerd.grpc.v1.cri/image-volumes/" + strings.Repeat("0123456789abcdef", 4) + "/" + target.Encoded()
}

// A mounted image is bound through the parent of the snapshot whose key is the
// directory; neither the digest in the path nor a name proves anything.
func TestVolumes(t *testing.T) {
	const main = "registry.example/main:1"
	type world struct {
		*records
		data, evil image
		at         string // snapshot key, and source of the mount
		snapshot   Snapshot
		source     string // of the mount where it is another
	}
	tests := map[string]struct {
		change func(*world)
		want   verify.Reason // "": bound to data
		name   string
		names  int
		others int
	}{
		"one name": {func(w *world) { w.images["registry.example/data:1"] = w.data.manifest }, "", "registry.example/data", 0, 0},
		"a part of it": {func(w *world) {
			w.images["registry.example/data:1"], w.source = w.data.manifest, w.at+"/sub/image-volumes/"+strings.Repeat("a", 64)+"/"+strings.Repeat("b", 64)
		}, "", "registry.example/data", 0, 0},
		"several names, and tags of them": {func(w *world) {
			for _, n := range []string{"b.example/data:1", "a.example/data:1", "a.example/data:2", "c.example/data@" + w.data.manifest.Digest.String(), "sha256:" + w.data.config.Digest.Encoded()} {
				w.images[n] = w.data.manifest
			}
		}, "", "a.example/data", 2, 0},
		"more names than are tried": {func(w *world) {
			for i := range 2 * verify.MaxNames {
				w.images[fmt.Sprintf("a.example/data%03d:1", i)] = w.data.manifest
			}
		}, "", "a.example/data000", verify.MaxNames, 0},
		"the same with an index around it": {func(w *world) {
			w.images["a.example/data:1"] = w.index(on(w.data.manifest, here))
			w.images["b.example/data:1"] = w.data.manifest
		}, "", "b.example/data", 1, 1},
		"only known by an ID": {func(w *world) {
			w.images["sha256:"+w.data.config.Digest.Encoded()] = w.data.manifest
		}, verify.ImageVolumeUnverified, "", 0, 0},
		"no record": {func(*world) {}, verify.ImageVolumeUnverified, "", 0, 0},
		"the path names the good image, evil is mounted": {func(w *world) {
			w.images["registry.example/data:1"], w.snapshot = w.data.manifest, Snapshot{Parent: w.evil.chain}
		}, "", "evil.example/evil", 0, 0},
		"evil is mounted and nobody knows it": {func(w *world) {
			w.images["registry.example/data:1"], w.snapshot = w.data.manifest, Snapshot{Parent: w.evil.chain}
			delete(w.images, "evil.example/evil:1")
		}, verify.ImageVolumeUnverified, "", 0, 0},
		"no such snapshot": {func(w *world) {
			w.images["registry.example/data:1"] = w.data.manifest
			w.source = place(w.evil.manifest.Digest)
		}, verify.ImageVolumeUnverified, "", 0, 0},
		"a snapshot of nothing": {func(w *world) {
			w.images["registry.example/data:1"], w.snapshot = w.data.manifest, Snapshot{}
		}, verify.ImageVolumeUnverified, "", 0, 0},
		"in the place and none": {func(w *world) {
			w.images["registry.example/data:1"], w.source = w.data.manifest, "/run/image-volumes/"+strings.Repeat("a", 64)+"/x"
		}, verify.ImageVolumeUnverified, "", 0, 0},
		"with user namespace": {func(w *world) {
			labels := map[string]string{"containerd.io/snapshot/uidmapping": "0:65536:65536", "containerd.io/snapshot/gidmapping": "0:65536:65536"}
			w.images["registry.example/data:1"], w.snapshot = w.data.manifest, Snapshot{Parent: remapped(w.data.chain, labels), Labels: labels}
		}, "", "registry.example/data", 0, 0},
		"on stargz": {func(w *world) {
			w.images["registry.example/data:1"] = w.data.manifest
			w.snapshotters = append(w.snapshotters, "stargz")
			w.records.snapshots["stargz"] = map[string]Snapshot{w.at: {Parent: w.data.chain}}
			delete(w.records.snapshots["overlayfs"], w.at)
			w.snapshot.Parent = "stargz"
		}, verify.SnapshotterUnverified, "", 0, 0},
		"broken manifest": {func(w *world) {
			w.images["registry.example/data:1"] = w.data.manifest
			w.blobs[w.data.manifest.Digest] = []byte("{}")
		}, verify.ImageMismatch, "", 0, 0},
	}
	for label, tt := range tests {
		for _, told := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/told=%t", label, told), func(t *testing.T) {
				w := &world{records: newRecords()}
				i := w.image("main", "m")
				w.data, w.evil = w.image("data", "a"), w.image("evil", "b")
				w.images[main] = i.manifest
				w.images["evil.example/evil:1"] = w.evil.manifest
				w.records.snapshots["overlayfs"][ctrID] = Snapshot{Parent: i.chain}
				w.at = place(w.data.manifest.Digest)
				w.snapshot = Snapshot{Parent: w.data.chain}
				w.source = w.at
				tt.change(w)
				if w.snapshot.Parent != "stargz" {
					w.records.snapshots["overlayfs"][w.at] = w.snapshot
				}
				o := testOptions()
				whole := o.ParseName
				o.ParseName = func(s string) (verify.Name, error) {
					n, err := whole(s)
					n.Path, n.Tag, _ = strings.Cut(n.Path, ":")
					return n, err
				}
				r := NewResolver(w.records, o)
				r.Connected(!told)
				for _, rec := range mustImages(t, w.records) { // as Survey does
					_, _ = r.learn(context.Background(), rec.Target, unmarked{})
				}
				ctr := container(main, i.manifest.Digest, i.config.Digest)
				if !told {
					ctr.Image = nil
				}
				ctr.Mounts = []*api.Mount{{Source: "/etc", Destination: "/a"}, {Source: w.source, Destination: "/data"}, {Source: w.source, Destination: "/again"}}
				images := r.Resolve(context.Background(), &api.PodSandbox{Id: "pod", Name: "p", Namespace: "ns", Uid: "u"}, ctr)
				if len(images) < 2 || len(images) > 2 && tt.want == "" || images[0].Use != verify.UseContainer || images[0].Fault != nil {
					t.Fatalf("images %+v", images)
				}
				v := images[1]
				if v.Use != verify.UseVolume || v.Pod != images[0].Pod {
					t.Fatalf("volume %+v", v)
				}
				if tt.want != "" {
					if v.Fault == nil || v.Fault.Reason != tt.want {
						t.Fatalf("fault %v, want %s", v.Fault, tt.want)
					}
					return
				}
				if v.Fault != nil {
					t.Fatal(v.Fault)
				}
				is := w.data
				if tt.name == "evil.example/evil" {
					is = w.evil
				}
				if v.Binding != verify.BoundSnapshot || v.Config != is.config.Digest || v.Target.Digest != is.manifest.Digest || v.Manifest.Digest != is.manifest.Digest {
					t.Errorf("bound to %+v", v)
				}
				if v.Name.Repository() != tt.name || len(v.Names) != tt.names || len(v.Related) != tt.others {
					t.Errorf("name %s, names %v, others %v", v.Name.Repository(), v.Names, v.Related)
				}
				// What a volume holds is no config that the container may run.
				if r.Decided(ctrID, images); !told {
					w.configs[ctrID] = is.config.Digest
					if f := started(r, container("r.example/app:1", "", "")); f == nil || f.Reason != verify.ImageMismatch {
						t.Errorf("a container with the volume's config: %v", f)
					}
				}
			})
		}
	}
}

func mustImages(t *testing.T, r *records) []Record {
	t.Helper()
	list, err := r.Images(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(list, func(a, b Record) int { return strings.Compare(a.Name, b.Name) })
	return list
}

// TestManyVolumes: their number is bounded.
func TestManyVolumes(t *testing.T) {
	w := newRecords()
	i := w.image("main", "m")
	w.images["registry.example/main:1"] = i.manifest
	ctr := container("registry.example/main:1", i.manifest.Digest, i.config.Digest)
	w.snapshots["overlayfs"][ctrID] = Snapshot{Parent: i.chain}
	for n := range 1000 {
		v := w.image("data", fmt.Sprint(n))
		w.images[fmt.Sprintf("registry.example/data%d:1", n)] = v.manifest
		w.snapshots["overlayfs"][place(v.manifest.Digest)] = Snapshot{Parent: v.chain}
		ctr.Mounts = append(ctr.Mounts, &api.Mount{Source: place(v.manifest.Digest), Destination: "/data"})
	}
	images := NewResolver(w, testOptions()).Resolve(context.Background(), &api.PodSandbox{Id: "pod"}, ctr)
	if len(images) != 2+maxVolumes {
		t.Fatalf("%d images", len(images))
	}
	for n, img := range images {
		if refused := img.Fault != nil; refused != (n == 1+maxVolumes) {
			t.Errorf("image %d: %v", n, img.Fault)
		}
	}
}

// TestVolumeNamesAreOfItsContent: a name counts for a volume where its record leads to
// the very content, under the digest that it says.
func TestVolumeNamesAreOfItsContent(t *testing.T) {
	w := newRecords()
	main, data, twin := w.image("main", "m"), w.image("data", "a"), w.image("twin", "a") // twin: the same layers
	index := w.index(on(data.manifest, here), on(twin.manifest, elsewhere))
	at := place(index.Digest)
	w.images["registry.example/main:1"] = main.manifest
	w.snapshots["overlayfs"][ctrID], w.snapshots["overlayfs"][at] = Snapshot{Parent: main.chain}, Snapshot{Parent: data.chain}
	for name, target := range map[string]digest.Digest{
		"a.example/data@" + index.Digest.String():                 index.Digest,
		"b.example/data@" + data.manifest.Digest.String():         index.Digest,
		"c.example/data@" + data.config.Digest.String():           index.Digest,
		"d.example/data@" + digest.FromString("another").String(): index.Digest,
		"e.example/data@" + data.manifest.Digest.String():         data.manifest.Digest,
		"f.example/data@" + index.Digest.String():                 data.manifest.Digest,
		"g.example/twin@" + twin.manifest.Digest.String():         twin.manifest.Digest,
	} {
		for _, d := range []ocispec.Descriptor{index, data.manifest, twin.manifest} {
			if d.Digest == target {
				w.images[name] = d
			}
		}
	}
	o := testOptions()
	o.Revision = verify.Revision{7}
	r := NewResolver(w, o)
	r.Connected(true)
	for _, rec := range mustImages(t, w) {
		_, _ = r.learn(t.Context(), rec.Target, unmarked{})
	}
	ctr := container("registry.example/main:1", main.manifest.Digest, main.config.Digest)
	ctr.Mounts = []*api.Mount{{Source: at, Destination: "/data"}}
	images := r.Resolve(t.Context(), &api.PodSandbox{Id: "pod"}, ctr)
	if len(images) != 2 || images[1].Fault != nil {
		t.Fatalf("images %+v", images)
	}
	v := images[1]
	if v.Config != data.config.Digest || v.Target.Digest != index.Digest || v.Manifest.Digest != data.manifest.Digest || v.Revision != o.Revision {
		t.Errorf("bound to %+v", v)
	}
	var hosts []string
	for _, n := range append([]verify.Name{v.Name}, v.Names...) {
		hosts = append(hosts, n.Host)
	}
	if got := fmt.Sprint(hosts); got != "[a.example b.example e.example]" {
		t.Errorf("names at %s", got)
	}
}

// TestVolumeOfListedSnapshotter: where a snapshotter is trusted only because the
// configuration says so, nobody vouches for the layers, and other targets do not count.
func TestVolumeOfListedSnapshotter(t *testing.T) {
	w := newRecords()
	main, data := w.image("main", "m"), w.image("data", "a")
	at := place(data.manifest.Digest)
	w.images["registry.example/main:1"], w.images["b.example/data:1"] = main.manifest, data.manifest
	w.images["c.example/data:1"] = w.index(on(data.manifest, here))
	w.snapshotters = append(w.snapshotters, "stargz")
	w.snapshots["overlayfs"][ctrID] = Snapshot{Parent: main.chain}
	for snapshotter, vouched := range map[string]bool{"overlayfs": true, "stargz": false} {
		delete(w.snapshots["overlayfs"], at)
		w.snapshots["stargz"] = map[string]Snapshot{}
		w.snapshots[snapshotter][at] = Snapshot{Parent: data.chain}
		o := testOptions()
		o.Snapshotters = []string{"stargz"}
		r := NewResolver(w, o)
		r.Connected(true)
		for _, rec := range mustImages(t, w) {
			_, _ = r.learn(t.Context(), rec.Target, unmarked{})
		}
		ctr := container("registry.example/main:1", main.manifest.Digest, main.config.Digest)
		ctr.Mounts = []*api.Mount{{Source: at, Destination: "/data"}}
		images := r.Resolve(t.Context(), &api.PodSandbox{Id: "pod"}, ctr)
		if len(images) != 2 || images[1].Fault != nil || images[1].Config != data.config.Digest {
			t.Fatalf("on %s: images %+v", snapshotter, images)
		}
		if v := images[1]; v.LayersVerified != vouched || (len(v.Related) > 0) != vouched {
			t.Errorf("on %s: vouched %t, others %v", snapshotter, v.LayersVerified, v.Related)
		}
	}
}
