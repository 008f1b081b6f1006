package containerd

import (
	"context"
	"errors"
	"slices"
	"testing"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/tidewaiter/tidewaiter/nri/tally"
	"github.com/tidewaiter/tidewaiter/verify"
)

// A container that runs is judged by what it was made from, whatever its name
// leads to now.
func TestRunning(t *testing.T) {
	const name = "r.example/app:1"
	tests := map[string]struct {
		change func(*records, *Resolver, *Container, image, image) // good, evil
		want   verify.Reason                                       // "": bound to good
		gone   bool
	}{
		"as it was": {change: func(*records, *Resolver, *Container, image, image) {}},
		"the name moved on": {change: func(r *records, _ *Resolver, _ *Container, _, evil image) {
			r.images["r.example/kept:1"] = r.images[name]
			r.images[name] = evil.manifest
		}},
		"the name is gone": {change: func(r *records, _ *Resolver, _ *Container, _, _ image) {
			r.images["r.example/kept:1"] = r.images[name]
			delete(r.images, name)
		}},
		"all records are gone": {gone: true, change: func(r *records, _ *Resolver, _ *Container, _, evil image) {
			r.images[name] = evil.manifest
		}},
		"another root filesystem": {want: verify.ImageMismatch, change: func(r *records, _ *Resolver, _ *Container, _, evil image) {
			r.snapshots["overlayfs"][ctrID] = Snapshot{Parent: evil.chain}
		}},
		"a root filesystem of nothing": {want: verify.ImageMismatch, change: func(r *records, _ *Resolver, _ *Container, _, _ image) {
			r.snapshots["overlayfs"][ctrID] = Snapshot{}
		}},
		"no root filesystem": {want: verify.ImageUnresolved, change: func(r *records, _ *Resolver, _ *Container, _, _ image) {
			delete(r.snapshots["overlayfs"], ctrID)
		}},
		"allowed as another config": {want: verify.ImageMismatch, change: func(_ *records, n *Resolver, _ *Container, _, evil image) {
			n.decided.Add(ctrID, []digest.Digest{evil.config.Digest})
		}},
		"allowed as this": {change: func(_ *records, n *Resolver, _ *Container, good, _ image) {
			n.decided.Add(ctrID, []digest.Digest{good.config.Digest})
		}},
		"wasm": {want: verify.RuntimeUnverified, change: func(_ *records, _ *Resolver, c *Container, _, _ image) { c.Runtime = "io.containerd.wasmtime.v1" }},
		"stargz": {want: verify.SnapshotterUnverified, change: func(r *records, _ *Resolver, c *Container, _, _ image) {
			c.Snapshotter = "stargz"
			r.snapshots["stargz"] = r.snapshots["overlayfs"]
		}},
		"an image ID as its name": {want: verify.ImageUnresolved, change: func(_ *records, _ *Resolver, c *Container, _, _ image) { c.Image = "sha256:01" }},
		"a record that cannot be read": {want: verify.ImageUnresolved, change: func(_ *records, _ *Resolver, c *Container, _, _ image) {
			c.Err = errors.New("it is not JSON")
		}},
		"a sandbox": {change: func(_ *records, _ *Resolver, c *Container, _, _ image) { c.Kind, c.Config = KindSandbox, "" }},
		"a sandbox whose name moved on": {gone: true, change: func(r *records, _ *Resolver, c *Container, _, evil image) {
			c.Kind, c.Config = KindSandbox, ""
			r.images[name] = evil.manifest
		}},
		"containerd does not answer": {want: verify.ImageUnresolved, change: func(r *records, _ *Resolver, _ *Container, _, _ image) { r.err = errors.New("no answer") }},
	}
	for label, tt := range tests {
		t.Run(label, func(t *testing.T) {
			rec := newRecords()
			good, evil := rec.image("good", "a"), rec.image("evil", "b")
			rec.images[name] = good.manifest
			rec.snapshots["overlayfs"][ctrID] = Snapshot{Parent: good.chain}
			r := NewResolver(rec, testOptions())
			c := Container{ID: ctrID, Kind: KindContainer, Image: name, Config: good.config.Digest, Runtime: Runtimes[0], Snapshotter: "overlayfs"}
			tt.change(rec, r, &c, good, evil)
			for _, d := range rec.images { // what the survey does
				_, _ = r.learn(t.Context(), d, unmarked{})
			}
			images, err := r.Running(t.Context(), c)
			if errors.Is(err, ErrGone) != tt.gone || err != nil && !tt.gone || len(images) != 1 {
				t.Fatalf("%d images, %v", len(images), err)
			}
			img := images[0]
			switch {
			case tt.gone:
				if img.Target.Digest != "" || img.Binding != 0 {
					t.Errorf("bound to %+v", img)
				}
			case tt.want != "":
				if img.Fault == nil || img.Fault.Reason != tt.want {
					t.Errorf("fault %v, want %s", img.Fault, tt.want)
				}
			case img.Fault != nil || img.Binding != verify.BoundSnapshot || img.Use != verify.UsePrefetch || img.Config != good.config.Digest ||
				img.Target.Digest != good.manifest.Digest || img.Asked != name || img.Name.Path != "app:1":
				t.Errorf("bound to %+v, fault %v", img, img.Fault)
			}
		})
	}
}

// What containerd's record of a container says, and nothing of its environment.
func TestContainerRecord(t *testing.T) {
	config := digest.FromString("config")
	spec := `{"process":{"env":["A=s3cr3t"]},"annotations":{"io.kubernetes.cri.image-name":"r.example/app:1","io.kubernetes.cri.podsandbox.image-name":"pause:1",
		"io.kubernetes.cri.sandbox-namespace":"ns","io.kubernetes.cri.sandbox-name":"pod","io.kubernetes.cri.sandbox-uid":"u","io.kubernetes.cri.container-name":"c"},
		"mounts":[{"source":"/etc"},{"source":"/run/x/image-volumes/` + digest.FromString("s").Encoded() + `/` + digest.FromString("t").Encoded() + `"}]}`
	metadata := `{"Version":"v1","Metadata":{"ImageRef":"` + config.String() + `"}}`
	record := func(kind, spec, metadata string) *containersapi.Container {
		return &containersapi.Container{ID: "id", Image: "record", Labels: map[string]string{labelKind: kind}, Snapshotter: "overlayfs",
			Runtime: &containersapi.Container_Runtime{Name: "shim"}, Spec: &anypb.Any{Value: []byte(spec)},
			Extensions: map[string]*anypb.Any{criMetadata: {Value: []byte(metadata)}}}
	}
	pod := verify.Pod{Namespace: "ns", Name: "pod", UID: "u", Container: "c"}
	c, err := running(record("container", spec, metadata))
	if err != nil || c.Kind != KindContainer || c.Image != "r.example/app:1" || c.Config != config || c.Pod != pod || len(c.Mounts) != 1 || c.Runtime != "shim" || c.Snapshotter != "overlayfs" {
		t.Errorf("container %+v, %v", c, err)
	}
	if c, err = running(record("sandbox", spec, "")); err != nil || c.Kind != KindSandbox || c.Image != "pause:1" || c.Config != "" {
		t.Errorf("sandbox %+v, %v", c, err)
	}
	if c, err = running(record("sandbox", "{}", "")); err != nil || c.Image != "record" {
		t.Errorf("sandbox of an old containerd %+v, %v", c, err)
	}
	if c, err = running(record("", "{}", "")); err != nil || c.Kind != KindForeign || c.Image != "record" {
		t.Errorf("foreign %+v, %v", c, err)
	}
	for _, bad := range []*containersapi.Container{record("container", "{", metadata), record("container", spec, "{"), record("container", spec, "{}")} {
		if c, err := running(bad); err == nil || c.ID != "id" {
			t.Errorf("a broken record: %+v, %v", c, err)
		}
	}
}

// TestRunningReadsNoSuspect: what was in hand when a process died is not read for the
// running check, until a container made it known.
func TestRunningReadsNoSuspect(t *testing.T) {
	const name = "r.example/app:1"
	rec := newRecords()
	good := rec.image("good", "a")
	rec.images[name] = good.manifest
	rec.snapshots["overlayfs"][ctrID] = Snapshot{Parent: good.chain}
	r := NewResolver(rec, testOptions())
	marks := &noted{skip: good.manifest.Digest}
	r.Mark(marks)
	c := Container{ID: ctrID, Kind: KindContainer, Image: name, Config: good.config.Digest, Runtime: Runtimes[0], Snapshotter: "overlayfs"}
	images, err := r.Running(t.Context(), c)
	if err != nil && !errors.Is(err, ErrGone) || len(images) != 1 || err == nil && images[0].Fault == nil {
		t.Errorf("%+v, %v", images, err)
	}
	if n := r.resolutions.Len(); n != 0 {
		t.Errorf("%d images were read", n)
	}
	if _, err := r.learn(t.Context(), good.manifest, unmarked{}); err != nil { // as a container does
		t.Fatal(err)
	}
	if images, err := r.Running(t.Context(), c); err != nil || images[0].Fault != nil {
		t.Errorf("%+v, %v", images, err)
	}
	// What is read for it is marked.
	marks.skip = ""
	r.resolutions.Purge()
	reads := 0
	r.records = reading{rec, func() {
		if reads++; !slices.Equal(marks.list(), []digest.Digest{good.manifest.Digest}) {
			t.Errorf("while it is read %q are marked", marks.list())
		}
	}}
	if images, err := r.Running(t.Context(), c); err != nil || images[0].Fault != nil || reads == 0 {
		t.Errorf("%+v, %v, %d reads", images, err, reads)
	}
	if got := marks.list(); len(got) != 0 {
		t.Errorf("after it %q are marked", got)
	}
}

// reading are records that call a function before they read a blob.
type reading struct {
	*records
	before func()
}

func (r reading) Blob(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	r.before()
	return r.records.Blob(ctx, d)
}

// TestLong: the running check finds what the gate would refuse as too long.
func TestLong(t *testing.T) {
	for n, want := range map[int]bool{100: false, 200 << 10: false, tally.MaxTold + 1: true} {
		for _, kind := range []Kind{KindContainer, KindSandbox, KindForeign} {
			ctr, _ := long(t, "p", n, kind == KindSandbox)
			ctr.Labels[labelKind] = string(kind)
			c, _ := running(ctr)
			if got := c.Long != ""; got != (want && kind != KindForeign) {
				t.Errorf("%q of %d bytes: %q", kind, n, c.Long)
			}
		}
	}
}
