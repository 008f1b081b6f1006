package containerd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
)

func resolveOne(t *testing.T, r *Resolver, c *api.Container) verify.Image {
	t.Helper()
	pod := &api.PodSandbox{Id: "pod", Name: "p", Namespace: "ns", Uid: "u"}
	calls := r.records.(*records).calls
	known, ok := r.Known(pod, c)
	if n := r.records.(*records).calls - calls; n != 0 {
		t.Fatalf("%d calls for what is known", n)
	}
	images := r.Resolve(context.Background(), pod, c)
	if ok && !reflect.DeepEqual(known, images) {
		t.Fatalf("known is %+v, and resolved %+v", known, images)
	}
	if len(images) != 1 {
		t.Fatalf("%d images, want 1", len(images))
	}
	if images[0].Fault == nil && images[0].Binding == 0 {
		t.Fatal("an image without a fault is not bound")
	}
	return images[0]
}

func TestBinding(t *testing.T) {
	const name = "registry.example/app:1"
	tests := map[string]struct {
		setup func(r *records) (target ocispec.Descriptor, run image, told digest.Digest) // record, what runs, NRI digest
		want  verify.Reason                                                               // "": bound
	}{
		"single manifest": {func(r *records) (ocispec.Descriptor, image, digest.Digest) {
			i := r.image("good", "a")
			return i.manifest, i, i.manifest.Digest
		}, ""},
		"index": {func(r *records) (ocispec.Descriptor, image, digest.Digest) {
			i, o := r.image("good", "a"), r.image("other", "b")
			x := r.index(on(o.manifest, elsewhere), on(i.manifest, here))
			return x, i, x.Digest
		}, ""},
		"nested index": {func(r *records) (ocispec.Descriptor, image, digest.Digest) {
			i := r.image("good", "a")
			x := r.index(r.index(on(i.manifest, here)))
			return x, i, x.Digest
		}, ""},
		"tag moved to another image": {func(r *records) (ocispec.Descriptor, image, digest.Digest) {
			i, evil := r.image("good", "a"), r.image("evil", "b")
			return i.manifest, evil, evil.manifest.Digest
		}, verify.ImageMismatch},
		"evil image with one more layer": {func(r *records) (ocispec.Descriptor, image, digest.Digest) {
			i, evil := r.image("good", "a"), r.image("evil", "a", "b")
			return i.manifest, evil, evil.manifest.Digest
		}, verify.ImageMismatch},
		"index with the signed manifest as a decoy": {func(r *records) (ocispec.Descriptor, image, digest.Digest) {
			i, evil := r.image("good", "a"), r.image("evil", "b")
			x := r.index(on(evil.manifest, here), on(i.manifest, elsewhere))
			return x, i, x.Digest // the runtime claims the good config with the evil index
		}, verify.ImageMismatch},
		"another record of the same config": {func(r *records) (ocispec.Descriptor, image, digest.Digest) {
			i := r.image("good", "a")
			return i.manifest, i, r.index(on(i.manifest, here)).Digest
		}, ""},
		"no manifest for this platform": {func(r *records) (ocispec.Descriptor, image, digest.Digest) {
			i := r.image("good", "a")
			x := r.index(on(i.manifest, elsewhere))
			return x, i, x.Digest
		}, verify.ImageUnresolved},
		"index and manifest at once": {func(r *records) (ocispec.Descriptor, image, digest.Digest) {
			i := r.image("good", "a")
			x := r.put(ocispec.MediaTypeImageIndex, map[string]any{"schemaVersion": 2,
				"manifests": []any{on(i.manifest, here)}, "config": i.config, "layers": []any{}})
			return x, i, x.Digest
		}, verify.ImageAmbiguous},
		"manifest that calls itself an index": {func(r *records) (ocispec.Descriptor, image, digest.Digest) {
			i := r.image("good", "a")
			x := r.put(ocispec.MediaTypeImageManifest, map[string]any{"mediaType": ocispec.MediaTypeImageIndex, "config": i.config})
			return x, i, x.Digest
		}, verify.ImageAmbiguous},
		"index that embeds its manifest": {func(r *records) (ocispec.Descriptor, image, digest.Digest) {
			i := r.image("good", "a")
			d := on(i.manifest, here)
			d.Data = r.blobs[d.Digest]
			x := r.index(d)
			return x, i, x.Digest
		}, ""},
		"artifact that is no image": {func(r *records) (ocispec.Descriptor, image, digest.Digest) {
			i := r.image("good", "a")
			x := r.put(ocispec.MediaTypeImageManifest, ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: r.put("application/vnd.example", map[string]any{})})
			return x, i, x.Digest
		}, verify.NotAnImage},
		"config without a root filesystem": {func(r *records) (ocispec.Descriptor, image, digest.Digest) {
			i := r.image("good")
			return i.manifest, i, i.manifest.Digest
		}, verify.NotAnImage},
		"config of 500 MB": {func(r *records) (ocispec.Descriptor, image, digest.Digest) {
			i := r.image("good", "a")
			c := i.config
			c.Size = 500 << 20
			x := r.put(ocispec.MediaTypeImageManifest, ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: c})
			return x, i, x.Digest
		}, verify.ImageAmbiguous},
		"bytes changed on the disk": {func(r *records) (ocispec.Descriptor, image, digest.Digest) {
			i := r.image("good", "a")
			raw := append([]byte{}, r.blobs[i.manifest.Digest]...)
			raw[len(raw)/2] ^= 1
			r.blobs[i.manifest.Digest] = raw
			return i.manifest, i, i.manifest.Digest
		}, verify.ImageMismatch},
	}
	for label, tt := range tests {
		for _, runtime := range []string{"2.4", "2.2"} {
			t.Run(label+"/"+runtime, func(t *testing.T) {
				rec := newRecords()
				target, run, told := tt.setup(rec)
				rec.images[name] = target
				rec.snapshots["overlayfs"][ctrID] = Snapshot{Parent: run.chain}
				r := NewResolver(rec, testOptions())
				ctr, binding := container(name, told, run.config.Digest), verify.BoundRuntime
				if runtime == "2.2" {
					ctr.Image, binding = nil, verify.BoundSnapshot
					r.Connected(true)
				}
				img := resolveOne(t, r, ctr)
				if tt.want != "" {
					if img.Fault == nil || img.Fault.Reason != tt.want {
						t.Fatalf("fault %v, want %s", img.Fault, tt.want)
					}
					return
				}
				if img.Fault != nil {
					t.Fatal(img.Fault)
				}
				if img.Binding != binding || img.Config != run.config.Digest || img.Target.Digest != target.Digest || img.Manifest.Digest != run.manifest.Digest {
					t.Fatalf("bound to %+v", img)
				}
			})
		}
	}
}

// An image whose layers are the good one's and whose config is not has the same
// chain ID: before containerd 2.4 only StartContainer can tell them apart.
func TestStartedComparesConfigs(t *testing.T) {
	rec := newRecords()
	good, evil := rec.image("good", "a"), rec.image("evil", "a")
	rec.images["r.example/app:1"] = good.manifest
	rec.snapshots["overlayfs"][ctrID] = Snapshot{Parent: evil.chain}
	r := NewResolver(rec, testOptions())
	ctr := container("r.example/app:1", "", "")
	if img := resolveOne(t, r, ctr); img.Fault == nil || img.Fault.Reason != verify.ImageUnresolved {
		t.Fatalf("a runtime that tells nothing and asks nothing at StartContainer: %v", img.Fault)
	}
	r.Connected(true)
	img := resolveOne(t, r, ctr)
	if img.Fault != nil {
		t.Fatal(img.Fault)
	}
	if f := started(r, container("r.example/app:1", "", "")); f == nil || f.Reason != verify.ImageUnresolved {
		t.Fatalf("a container that was never decided: %v", f)
	}
	r.Decided(ctrID, []verify.Image{img})
	if f := started(r, container("r.example/app:1", "", "")); f == nil || f.Reason != verify.ImageUnresolved {
		t.Fatalf("a container without a record: %v", f)
	}
	rec.configs[ctrID] = evil.config.Digest
	if f := started(r, container("r.example/app:1", "", "")); f == nil || f.Reason != verify.ImageMismatch {
		t.Fatalf("the evil config: %v", f)
	}
	rec.configs[ctrID] = good.config.Digest
	if f := started(r, container("r.example/app:1", "", "")); f != nil {
		t.Fatalf("the good config: %v", f)
	}
}

func TestFaults(t *testing.T) {
	const name = "registry.example/app:1"
	volume := func(source string) func(*records, *api.Container) {
		return func(_ *records, c *api.Container) {
			c.Mounts = []*api.Mount{{Source: "/etc", Destination: "/a"}, {Source: source, Destination: "/data"}}
		}
	}
	hex := strings.Repeat("0123456789abcdef", 4)
	tests := map[string]struct {
		change func(*records, *api.Container)
		want   verify.Reason
	}{
		"nothing":          {func(*records, *api.Container) {}, ""},
		"no name":          {func(_ *records, c *api.Container) { c.Annotations = nil }, verify.ImageUnresolved},
		"image ID as name": {func(_ *records, c *api.Container) { c.Annotations[annotationImage] = "sha256:" + hex }, verify.ImageUnresolved},
		"image ID that is a record's name": {func(r *records, c *api.Container) {
			c.Annotations[annotationImage] = "sha256:" + hex
			r.images["sha256:"+hex] = r.images[name]
		}, verify.ImageUnresolved},
		"name without a record": {func(_ *records, c *api.Container) { c.Annotations[annotationImage] = "registry.example/copy:1" }, verify.ImageUnresolved},
		"digest that is not there": {func(r *records, c *api.Container) {
			n := "registry.example/app@sha256:" + hex
			r.images[n] = r.images[name]
			c.Annotations[annotationImage] = n
		}, verify.ImageMismatch},
		"restored from a checkpoint": {func(_ *records, c *api.Container) { c.Annotations[annotationRestored] = "true" }, verify.ImageUnresolved},
		"host path of a like name":   {volume("/srv/image-volumes/mine"), ""},
		"wasm runtime":               {func(r *records, _ *api.Container) { r.runtimes["pod"] = "io.containerd.wasmtime.v1" }, verify.RuntimeUnverified},
		"unknown sandbox":            {func(r *records, _ *api.Container) { delete(r.runtimes, "pod") }, verify.RuntimeUnverified},
		"stargz": {func(r *records, _ *api.Container) {
			r.snapshotters = append(r.snapshotters, "stargz")
			r.snapshots["stargz"] = r.snapshots["overlayfs"]
			r.snapshots["overlayfs"] = nil
		}, verify.SnapshotterUnverified},
		"stargz loaded, not used":    {func(r *records, _ *api.Container) { r.snapshotters = append([]string{"stargz"}, r.snapshotters...) }, ""},
		"no root filesystem":         {func(r *records, c *api.Container) { c.Image = nil; r.snapshots["overlayfs"] = nil }, verify.ImageUnresolved},
		"containerd does not answer": {func(r *records, _ *api.Container) { r.err = errors.New("no answer") }, verify.ImageUnresolved},
		"another config than told":   {func(_ *records, c *api.Container) { c.Image.ConfigDigest = "sha256:" + hex }, verify.ImageMismatch},
		"config told, target not":    {func(_ *records, c *api.Container) { c.Image.Digest = "" }, ""},
		"told another target, snapshot of another": {func(r *records, c *api.Container) {
			c.Image.Digest = "sha256:" + hex
			r.snapshots["overlayfs"][ctrID] = Snapshot{Parent: "sha256:" + hex}
		}, verify.ImageMismatch},
	}
	for label, tt := range tests {
		t.Run(label, func(t *testing.T) {
			rec := newRecords()
			i := rec.image("good", "a")
			rec.images[name] = i.manifest
			rec.snapshots["overlayfs"][ctrID] = Snapshot{Parent: i.chain}
			ctr := container(name, i.manifest.Digest, i.config.Digest)
			tt.change(rec, ctr)
			r := NewResolver(rec, testOptions())
			r.Connected(true)
			img := resolveOne(t, r, ctr)
			switch {
			case tt.want == "" && img.Fault != nil:
				t.Fatal(img.Fault)
			case tt.want != "" && (img.Fault == nil || img.Fault.Reason != tt.want):
				t.Fatalf("fault %v, want %s", img.Fault, tt.want)
			}
		})
	}
	t.Run("listed snapshotter and runtime", func(t *testing.T) {
		rec := newRecords()
		i := rec.image("good", "a")
		rec.images[name] = i.manifest
		rec.snapshotters = []string{"stargz"}
		rec.snapshots["stargz"] = map[string]Snapshot{ctrID: {Parent: i.chain}}
		rec.runtimes["pod"] = "io.containerd.kata.v2"
		o := testOptions()
		o.Snapshotters, o.Runtimes = []string{"stargz"}, []string{"io.containerd.kata.v2"}
		if img := resolveOne(t, NewResolver(rec, o), container(name, i.manifest.Digest, i.config.Digest)); img.Fault != nil {
			t.Fatal(img.Fault)
		}
	})
}

// What an earlier container has shown saves questions and gives nothing away.
func TestFaultsAfterAGoodOne(t *testing.T) {
	const name = "registry.example/app:1"
	for label, tt := range map[string]struct {
		change  func(r *records, c *api.Container, evil image)
		want    verify.Reason // "": bound
		binding verify.Binding
	}{
		"the same again":    {func(*records, *api.Container, image) {}, "", verify.BoundRuntime},
		"no snapshot of it": {func(r *records, _ *api.Container, _ image) { delete(r.snapshots["overlayfs"], ctrID) }, "", verify.BoundRuntime}, // the runtime told all
		"told another target, and the good config": {func(r *records, c *api.Container, evil image) {
			c.Image.Digest = evil.manifest.Digest.String()
			r.snapshots["overlayfs"][ctrID] = Snapshot{Parent: evil.chain}
		}, verify.ImageMismatch, 0},
		"another target of the same content": {func(r *records, c *api.Container, _ image) {
			c.Image.Digest = digest.FromString("another").String()
		}, "", verify.BoundRuntime},
		"another config":             {func(_ *records, c *api.Container, evil image) { c.Image.ConfigDigest = evil.config.Digest.String() }, verify.ImageMismatch, 0},
		"target told and config not": {func(_ *records, c *api.Container, _ image) { c.Image.ConfigDigest = "" }, "", verify.BoundSnapshot},
		"target told and config not, other layers": {func(r *records, c *api.Container, evil image) {
			c.Image.ConfigDigest = ""
			r.snapshots["overlayfs"][ctrID] = Snapshot{Parent: evil.chain}
		}, verify.ImageMismatch, 0},
		"config told and target not": {func(_ *records, c *api.Container, _ image) { c.Image.Digest = "" }, "", verify.BoundSnapshot},
		"config told and target not, other layers": {func(r *records, c *api.Container, evil image) {
			c.Image.Digest = ""
			r.snapshots["overlayfs"][ctrID] = Snapshot{Parent: evil.chain}
		}, verify.ImageMismatch, 0},
		"nothing told, other layers": {func(r *records, c *api.Container, evil image) {
			c.Image = nil
			r.snapshots["overlayfs"][ctrID] = Snapshot{Parent: evil.chain}
		}, verify.ImageMismatch, 0},
		"restored": {func(_ *records, c *api.Container, _ image) { c.Annotations[annotationRestored] = "false" }, verify.ImageUnresolved, 0},
	} {
		t.Run(label, func(t *testing.T) {
			rec := newRecords()
			good, evil := rec.image("good", "a"), rec.image("evil", "b")
			rec.images[name] = good.manifest
			rec.snapshots["overlayfs"][ctrID] = Snapshot{Parent: good.chain}
			o := testOptions()
			o.Revision = verify.Revision{7}
			r := NewResolver(rec, o)
			r.Connected(true)
			ctr := container(name, good.manifest.Digest, good.config.Digest)
			if img := resolveOne(t, r, ctr); img.Fault != nil {
				t.Fatal(img.Fault)
			}
			tt.change(rec, ctr, evil)
			img := resolveOne(t, r, ctr)
			if img.Revision != o.Revision {
				t.Errorf("bound under revision %s", img.Revision)
			}
			switch {
			case tt.want != "" && (img.Fault == nil || img.Fault.Reason != tt.want):
				t.Errorf("fault %v, want %s", img.Fault, tt.want)
			case tt.want == "" && (img.Fault != nil || img.Binding != tt.binding || img.Config != good.config.Digest):
				t.Errorf("fault %v, bound %s to %s", img.Fault, img.Binding, img.Config)
			}
		})
	}
}

// TestDigestOfName: a digest that the pod names is that of the record's target or of
// the manifest that runs.
func TestDigestOfName(t *testing.T) {
	rec := newRecords()
	i, o := rec.image("good", "a"), rec.image("other", "b")
	x := rec.index(on(i.manifest, here), on(o.manifest, elsewhere))
	rec.snapshots["overlayfs"][ctrID] = Snapshot{Parent: i.chain}
	r := NewResolver(rec, testOptions())
	r.Connected(true)
	for d, want := range map[digest.Digest]verify.Reason{
		x.Digest: "", i.manifest.Digest: "", i.config.Digest: verify.ImageMismatch, o.manifest.Digest: verify.ImageMismatch,
	} {
		name := "registry.example/app@" + d.String()
		rec.images[name] = x
		img := resolveOne(t, r, container(name, x.Digest, i.config.Digest))
		if want == "" && img.Fault != nil || want != "" && (img.Fault == nil || img.Fault.Reason != want) {
			t.Errorf("%s: fault %v, want %s", name, img.Fault, want)
		}
	}
}

// TestNamesThatAreNone: what one of the two parsers refuses is not looked up.
func TestNamesThatAreNone(t *testing.T) {
	const name = "registry.example/app:1"
	rec := newRecords()
	i := rec.image("good", "a")
	rec.images[name], rec.images[""] = i.manifest, i.manifest
	rec.snapshots["overlayfs"][ctrID] = Snapshot{Parent: i.chain}
	o := testOptions()
	o.ParseRecord = func(string) (string, error) { return "", errors.New("no record can have the name") }
	r := NewResolver(rec, o)
	r.Connected(true)
	for range 2 {
		img := resolveOne(t, r, container(name, i.manifest.Digest, i.config.Digest))
		if img.Fault == nil || img.Fault.Reason != verify.ImageUnresolved || img.Fault.Detail != "no record can have the name" {
			t.Errorf("fault %v", img.Fault)
		}
	}
	delete(rec.images, name)
	img := resolveOne(t, NewResolver(rec, testOptions()), container(name, i.manifest.Digest, i.config.Digest))
	if img.Fault == nil || !strings.Contains(img.Fault.Detail, "no image record on this node has the name") {
		t.Errorf("fault %v", img.Fault)
	}
}

// TestSnapshotterListedNoMore: what the configuration in force does not list is not
// trusted, whatever was seen before.
func TestSnapshotterListedNoMore(t *testing.T) {
	const name = "registry.example/app:1"
	rec := newRecords()
	i := rec.image("good", "a")
	rec.images[name] = i.manifest
	rec.snapshotters = []string{"stargz"}
	rec.snapshots["stargz"] = map[string]Snapshot{ctrID: {Parent: i.chain}}
	o := testOptions()
	o.Snapshotters = []string{"stargz"}
	r := NewResolver(rec, o)
	r.Connected(true)
	told, silent := container(name, i.manifest.Digest, i.config.Digest), container(name, "", "")
	for _, c := range []*api.Container{told, silent} {
		if img := resolveOne(t, r, c); img.Fault != nil || img.LayersVerified {
			t.Fatalf("%v, vouched %t", img.Fault, img.LayersVerified)
		}
	}
	r.Configure(testOptions())
	for _, c := range []*api.Container{told, silent} {
		if img := resolveOne(t, r, c); img.Fault == nil || img.Fault.Reason != verify.SnapshotterUnverified {
			t.Errorf("fault %v", img.Fault)
		}
	}
}

// TestDiskIsReadAgain: what a target led to is not believed of another run of
// containerd, between which and the last the disk may have been changed.
func TestDiskIsReadAgain(t *testing.T) {
	const name = "registry.example/app:1"
	rec := newRecords()
	i := rec.image("good", "a")
	rec.images[name] = i.manifest
	rec.snapshots["overlayfs"][ctrID] = Snapshot{Parent: i.chain}
	r := NewResolver(rec, testOptions())
	r.Connected(true)
	ctr := container(name, i.manifest.Digest, i.config.Digest)
	if img := resolveOne(t, r, ctr); img.Fault != nil {
		t.Fatal(img.Fault)
	}
	rec.blobs[i.config.Digest] = append(rec.blobs[i.config.Digest][1:], ' ')
	r.Connected(true)
	if img := resolveOne(t, r, ctr); img.Fault == nil || img.Fault.Reason != verify.ImageMismatch {
		t.Errorf("fault %v", img.Fault)
	}
}

// With user namespaces on a snapshotter that cannot remap, the parent is a copy
// under a name that containerd computes from the chain ID and the ID maps: the
// digest of this JSON (client/snapshotter_opts_unix.go of 2.2.9 and 2.4.2).
func TestUserNamespace(t *testing.T) {
	labels := map[string]string{
		"containerd.io/snapshot/uidmapping": "0:65536:65536",
		"containerd.io/snapshot/gidmapping": "0:65536:65536",
	}
	chain := digest.FromString("chain").String()
	raw := fmt.Sprintf(`{"Parent":%q,"IDMap":{"UidMap":[{"containerID":0,"hostID":65536,"size":65536}],"GidMap":[{"containerID":0,"hostID":65536,"size":65536}]}}`, chain)
	if got, want := remapped(chain, labels), digest.FromString(raw).String(); got != want {
		t.Fatalf("remapped %s, want %s", got, want)
	}
	for _, bad := range []map[string]string{nil, {"containerd.io/snapshot/uidmapping": "0:1:2"},
		{"containerd.io/snapshot/uidmapping": "x", "containerd.io/snapshot/gidmapping": "0:1:2"},
		{"containerd.io/snapshot/uidmapping": "0:1:2" + strings.Repeat(",0:1:2", maxMappings), "containerd.io/snapshot/gidmapping": "0:1:2"}} {
		if got := remapped(chain, bad); got != "" {
			t.Fatalf("labels %v give %s", bad, got)
		}
	}
	most := map[string]string{"containerd.io/snapshot/uidmapping": "0:1:2" + strings.Repeat(",0:1:2", maxMappings-1), "containerd.io/snapshot/gidmapping": "0:1:2"}
	if remapped(chain, most) == "" {
		t.Error("as many maps as the kernel takes are refused")
	}
	// The maps are sorted before they are hashed.
	for _, uids := range []string{"0:65536:10,10:200000:20", "10:200000:20,0:65536:10"} {
		raw := fmt.Sprintf(`{"Parent":%q,"IDMap":{"UidMap":[{"containerID":0,"hostID":65536,"size":10},{"containerID":10,"hostID":200000,"size":20}],"GidMap":[{"containerID":0,"hostID":65536,"size":65536}]}}`, chain)
		if got, want := remapped(chain, map[string]string{"containerd.io/snapshot/uidmapping": uids, "containerd.io/snapshot/gidmapping": "0:65536:65536"}), digest.FromString(raw).String(); got != want {
			t.Errorf("maps %s: remapped %s, want %s", uids, got, want)
		}
	}

	const name = "registry.example/app:1"
	rec := newRecords()
	good, evil := rec.image("good", "a"), rec.image("evil", "a", "b")
	rec.images[name] = good.manifest
	r := NewResolver(rec, testOptions())
	r.Connected(true)
	rec.snapshots["native"][ctrID] = Snapshot{Parent: remapped(good.chain, labels), Labels: labels}
	if img := resolveOne(t, r, container(name, "", "")); img.Fault != nil {
		t.Fatal(img.Fault)
	}
	// The evil image's own chain has the good one's as its parent, like a remapped copy.
	rec.snapshots["native"][ctrID] = Snapshot{Parent: evil.chain, Labels: labels}
	rec.snapshots["native"][evil.chain] = Snapshot{Parent: good.chain}
	if img := resolveOne(t, r, container(name, "", "")); img.Fault == nil || img.Fault.Reason != verify.ImageMismatch {
		t.Fatalf("an image with one more layer: %v", img.Fault)
	}
}

// What follows from content is remembered, what containerd could not say is not.
func TestRemembers(t *testing.T) {
	const name = "registry.example/app:1"
	rec := newRecords()
	i := rec.image("good", "a")
	rec.images[name] = i.manifest
	rec.snapshots["overlayfs"][ctrID] = Snapshot{Parent: i.chain}
	ctr := container(name, i.manifest.Digest, i.config.Digest)
	r := NewResolver(rec, testOptions())
	config := rec.blobs[i.config.Digest]
	delete(rec.blobs, i.config.Digest)
	if img := resolveOne(t, r, ctr); img.Fault == nil {
		t.Fatal("bound without its config")
	}
	rec.blobs[i.config.Digest] = config
	if img := resolveOne(t, r, ctr); img.Fault != nil {
		t.Fatal(img.Fault)
	}
	rec.calls = 0
	if img := resolveOne(t, r, ctr); img.Fault != nil || rec.calls != 0 {
		t.Fatalf("fault %v, %d calls where everything is known", img.Fault, rec.calls)
	}
}

// What was bound once is known, as long as the runtime tells the image; what cannot
// be bound never is.
func TestKnown(t *testing.T) {
	const name = "registry.example/app:1"
	rec := newRecords()
	i := rec.image("good", "a")
	rec.images[name] = i.manifest
	rec.snapshots["overlayfs"][ctrID] = Snapshot{Parent: i.chain}
	r := NewResolver(rec, testOptions())
	r.Connected(true)
	pod := &api.PodSandbox{Id: "pod"}
	told := container(name, i.manifest.Digest, i.config.Digest)
	if _, ok := r.Known(pod, told); ok {
		t.Fatal("known before it was resolved")
	}
	if img := resolveOne(t, r, told); img.Fault != nil {
		t.Fatal(img.Fault)
	}
	if images, ok := r.Known(pod, told); !ok || len(images) != 1 || images[0].Config != i.config.Digest || images[0].Binding != verify.BoundRuntime {
		t.Fatalf("known: %+v, %t", images, ok)
	}
	if _, ok := r.Known(pod, container(name, "", "")); ok {
		t.Error("known although the runtime does not tell the image")
	}
	if _, ok := r.Known(pod, container(name, i.manifest.Digest, digest.FromString("another"))); ok {
		t.Error("known although another config runs")
	}
	if _, ok := r.Known(&api.PodSandbox{Id: "other"}, told); ok {
		t.Error("known although the pod was never looked at")
	}
	mounts := container(name, i.manifest.Digest, i.config.Digest)
	mounts.Mounts = []*api.Mount{{Source: "/run/image-volumes/" + strings.Repeat("0", 64) + "/" + strings.Repeat("1", 64)}}
	if _, ok := r.Known(pod, mounts); ok {
		t.Error("known although an image is mounted that was never looked at")
	}
	r.Connected(true)
	if _, ok := r.Known(pod, told); ok {
		t.Error("known from an earlier connection")
	}
}

// A name that was proven a moment ago is not asked for again, unless the runtime
// resolved something else, or does not say.
func TestProofOfName(t *testing.T) {
	const name = "registry.example/app:1"
	rec := newRecords()
	old, moved := rec.image("old", "a"), rec.image("new", "b")
	rec.images[name] = old.manifest
	rec.snapshots["overlayfs"][ctrID] = Snapshot{Parent: old.chain}
	now := time.Unix(1e9, 0)
	o := testOptions()
	o.Now = func() time.Time { return now }
	r := NewResolver(rec, o)
	r.Connected(true)
	was, is := container(name, old.manifest.Digest, old.config.Digest), container(name, moved.manifest.Digest, moved.config.Digest)
	if img := resolveOne(t, r, was); img.Fault != nil {
		t.Fatal(img.Fault)
	}
	rec.images[name] = moved.manifest
	if img := resolveOne(t, r, was); img.Fault != nil || img.Target.Digest != old.manifest.Digest {
		t.Fatalf("what the name led to a moment ago: %+v", img)
	}
	if img := resolveOne(t, r, is); img.Fault != nil || img.Target.Digest != moved.manifest.Digest {
		t.Fatalf("what the name leads to now: %+v", img)
	}
	if img := resolveOne(t, r, was); img.Fault == nil || img.Fault.Reason != verify.ImageMismatch {
		t.Fatalf("after the move was seen: %+v", img)
	}
	// A proof ends, also when the clock goes back, and with the connection.
	rec.images[name] = old.manifest
	for _, end := range []func(){
		func() { now = now.Add(proofFor) }, func() { now = now.Add(-time.Hour) }, func() { r.Connected(true) },
	} {
		if img := resolveOne(t, r, was); img.Fault != nil {
			t.Fatal(img.Fault)
		}
		end()
		delete(rec.images, name)
		if img := resolveOne(t, r, was); img.Fault == nil || img.Fault.Reason != verify.ImageUnresolved {
			t.Fatalf("a proof that ended: %+v", img)
		}
		rec.images[name] = old.manifest
	}
	// Without the runtime's word the record is asked for each time.
	silent := container(name, "", "")
	if img := resolveOne(t, r, silent); img.Fault != nil {
		t.Fatal(img.Fault)
	}
	rec.images[name] = moved.manifest
	if img := resolveOne(t, r, silent); img.Fault == nil {
		t.Fatal("a moved record was not looked up")
	}
}

// The snapshotter of a runtime handler is looked at once a connection, and a
// strange one is refused each time.
func TestSnapshotterOfHandler(t *testing.T) {
	const name = "registry.example/app:1"
	rec := newRecords()
	rec.snapshotters = append(rec.snapshotters, "erofs")
	rec.snapshots["erofs"] = map[string]Snapshot{}
	i := rec.image("good", "a")
	rec.images[name] = i.manifest
	r := NewResolver(rec, testOptions())
	ask := func(handler string) verify.Reason {
		t.Helper()
		images := r.Resolve(t.Context(), &api.PodSandbox{Id: "pod", RuntimeHandler: handler}, container(name, i.manifest.Digest, i.config.Digest))
		if f := images[0].Fault; f != nil {
			return f.Reason
		}
		return ""
	}
	rec.snapshots["overlayfs"][ctrID] = Snapshot{Parent: i.chain}
	if got := ask("runc"); got != "" {
		t.Fatal(got)
	}
	delete(rec.snapshots["overlayfs"], ctrID)
	rec.snapshots["erofs"][ctrID] = Snapshot{Parent: i.chain}
	if got := ask("runc"); got != "" {
		t.Errorf("the same handler: %s", got)
	}
	for range 2 {
		if got := ask("lazy"); got != verify.SnapshotterUnverified {
			t.Errorf("another handler: %s", got)
		}
	}
	// The annotation of a pod's author leads to a handler of its own.
	pod := &api.PodSandbox{Id: "pod", Annotations: map[string]string{annotationUntrusted: "true"}}
	_ = ask("")
	r.used.Add("", "overlayfs") // as a pod without a handler has it
	if f := r.Resolve(t.Context(), pod, container(name, i.manifest.Digest, i.config.Digest))[0].Fault; f == nil || f.Reason != verify.SnapshotterUnverified {
		t.Errorf("a pod that asks for the handler of untrusted workloads: %v", f)
	}
	r.Connected(false)
	if got := ask("runc"); got != verify.SnapshotterUnverified {
		t.Errorf("after a new connection: %s", got)
	}
}

// An image that was copied, or pushed again with another index around it, brings
// the targets under which it may have been signed.
func TestOthers(t *testing.T) {
	const name = "registry.example/copy:1"
	rec := newRecords()
	i, evil := rec.image("good", "a"), rec.image("evil", "a")
	copied := rec.index(on(i.manifest, here))
	signed := rec.index(on(i.manifest, here), on(evil.manifest, elsewhere))
	decoy := rec.index(on(evil.manifest, here), on(i.manifest, elsewhere)) // leads to the evil one here
	rec.images[name] = copied
	rec.images["registry.example/app:1"] = signed
	rec.images["registry.example/evil:1"] = decoy
	rec.images["registry.example/broken:1"] = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex, Digest: digest.FromString("gone"), Size: 4}
	rec.snapshots["overlayfs"][ctrID] = Snapshot{Parent: i.chain}
	r := NewResolver(rec, testOptions())
	r.Connected(true)
	for _, target := range rec.images {
		r.Learn(t.Context(), target)
	}
	img := resolveOne(t, r, container(name, copied.Digest, i.config.Digest))
	if img.Fault != nil || !img.LayersVerified || len(img.Related) != 1 || img.Related[0].Digest != signed.Digest || img.Related[0].Size != signed.Size {
		t.Fatalf("others of %s: %v", img.Target.Digest, img.Related)
	}
	// Not where a snapshotter is trusted only because the configuration says so.
	o := testOptions()
	o.Snapshotters = []string{"stargz"}
	r.Configure(o)
	r.Connected(true)
	rec.snapshotters = []string{"stargz"}
	rec.snapshots["stargz"] = rec.snapshots["overlayfs"]
	if img := resolveOne(t, r, container(name, copied.Digest, i.config.Digest)); img.Fault != nil || img.LayersVerified || img.Related != nil {
		t.Fatalf("on a listed snapshotter: %v, others %v", img.Fault, img.Related)
	}
	// Nothing is kept of what was forgotten, and those that were first stay.
	r.resolutions.Purge()
	if n := len(r.related.from); n != 0 {
		t.Errorf("%d configs are remembered after their targets are not", n)
	}
	for n := range 3 * maxRelated {
		r.related.add("sha256:c", verify.Target{Size: int64(n), Digest: digest.FromString(fmt.Sprint(n))})
	}
	if l := r.related.of("sha256:c"); len(l) != verify.MaxRelated || l[0].Size != 0 || len(r.related.from["sha256:c"]) != maxRelated {
		t.Errorf("others %v", l)
	}
}

// A snapshot of nothing is no image's.
func TestSnapshotWithoutParent(t *testing.T) {
	const name = "registry.example/app:1"
	rec := newRecords()
	i := rec.image("good", "a")
	rec.images[name] = i.manifest
	rec.snapshots["overlayfs"][ctrID] = Snapshot{}
	r := NewResolver(rec, testOptions())
	r.Connected(true)
	if img := resolveOne(t, r, container(name, "", "")); img.Fault == nil || img.Fault.Reason != verify.ImageMismatch {
		t.Fatalf("bound to a snapshot without a parent: %v", img.Fault)
	}
}

func TestImageRef(t *testing.T) {
	d := digest.FromString("x")
	got, err := imageRef([]byte(`{"Version":"v1","Metadata":{"ID":"c","ImageRef":"` + d.String() + `"}}`))
	if err != nil || got != d {
		t.Fatal(got, err)
	}
	for _, bad := range []string{"", "{}", "null", `{"Metadata":{"ImageRef":"latest"}}`, `[]`} {
		if got, err := imageRef([]byte(bad)); err == nil {
			t.Errorf("%s gives %s", bad, got)
		}
	}
}

func FuzzImageRef(f *testing.F) {
	f.Add([]byte(`{"Metadata":{"ImageRef":"` + digest.FromString("x").String() + `"}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if d, err := imageRef(raw); err == nil && d.Validate() != nil {
			t.Fatalf("%q is no digest", d)
		}
	})
}

// TestHugeDocuments: anybody whose image the node pulls writes indexes, manifests
// and configs of up to MaxBlob, and each is read at every try of the kubelet.
func TestHugeDocuments(t *testing.T) {
	const name = "registry.example/app:1"
	many := func(before string) []byte { return []byte(before + strings.Repeat("{},", 1<<20) + "{}]}") }
	for what, put := range map[string]func(r *records) ocispec.Descriptor{
		"index": func(r *records) ocispec.Descriptor {
			return r.put(ocispec.MediaTypeImageIndex, many(`{"schemaVersion":2,"manifests":[`))
		},
		"manifest": func(r *records) ocispec.Descriptor {
			return r.put(ocispec.MediaTypeImageManifest, many(`{"schemaVersion":2,"config":{},"layers":[`))
		},
		"config": func(r *records) ocispec.Descriptor {
			c := r.put(ocispec.MediaTypeImageConfig, many(`{"rootfs":{"type":"layers","diff_ids":["`+digest.FromString("a").String()+`"]},"history":[`))
			return r.put(ocispec.MediaTypeImageManifest, ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: c, Layers: []ocispec.Descriptor{}})
		},
	} {
		r := newRecords()
		r.images[name] = put(r)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		img := resolveOne(t, NewResolver(r, testOptions()), container(name, "", ""))
		runtime.ReadMemStats(&after)
		want := verify.ImageAmbiguous
		if what == "config" {
			want = verify.ImageUnresolved // its history is not looked at; there is no container
		}
		if img.Fault == nil || img.Fault.Reason != want {
			t.Errorf("%s: %v", what, img.Fault)
		}
		if n := after.TotalAlloc - before.TotalAlloc; n > 8*MaxBlob {
			t.Errorf("%s: %d MiB allocated for a document of %d MiB", what, n>>20, MaxBlob>>20)
		}
	}

	// Each is small enough, and all of them together take seconds.
	chain := newRecords()
	d := chain.image("good", "a").manifest
	for range 12 {
		x, _ := json.Marshal(d)
		d = chain.put(ocispec.MediaTypeImageIndex, []byte(`{"schemaVersion":2,"annotations":{"a":"`+strings.Repeat("x", MaxBlob/8)+`"},"manifests":[`+string(x)+`]}`))
	}
	chain.images[name] = d
	img := resolveOne(t, NewResolver(chain, testOptions()), container(name, "", ""))
	if img.Fault == nil || img.Fault.Reason != verify.ImageAmbiguous || !strings.Contains(img.Fault.Detail, "together") {
		t.Errorf("twelve indexes of %d bytes: %v", MaxBlob/8, img.Fault)
	}

	// What a decoder says of a document may repeat most of it, and faults are kept.
	r := newRecords()
	r.images[name] = r.put(ocispec.MediaTypeImageManifest, []byte(`{"schemaVersion":2,"layers":[],"config":{"size":`+strings.Repeat("9", MaxBlob/2)+`}}`))
	if img := resolveOne(t, NewResolver(r, testOptions()), container(name, "", "")); img.Fault == nil || len(img.Fault.Detail) > verify.MaxMessage {
		t.Errorf("a fault of %d bytes", len(fmt.Sprint(img.Fault)))
	}
}
