package containerd

import (
	"context"
	"strings"
	"testing"

	"github.com/containerd/nri/pkg/api"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
)

// together are records of which the image's is found only once the snapshot was
// asked for too.
type together struct {
	*records
	asked  chan struct{}
	panics bool
}

func (r *together) Image(ctx context.Context, name string) (ocispec.Descriptor, error) {
	select {
	case <-r.asked:
	case <-ctx.Done():
		return ocispec.Descriptor{}, ctx.Err()
	}
	return r.records.Image(ctx, name)
}

func (r *together) Snapshot(ctx context.Context, snapshotter, key string) (Snapshot, error) {
	if r.panics {
		panic("as told")
	}
	if snapshotter == "overlayfs" && ctx.Err() == nil {
		select {
		case r.asked <- struct{}{}:
		case <-ctx.Done():
		}
	}
	return r.records.Snapshot(ctx, snapshotter, key)
}

// Where the runtime does not tell the image, record and snapshot are asked for at
// the same time, and each is judged as if it had been asked for alone.
func TestRecordAndSnapshotAtOnce(t *testing.T) {
	const name = "registry.example/app:1"
	rec := newRecords()
	good, evil := rec.image("good", "a"), rec.image("evil", "b")
	rec.images[name] = good.manifest
	rec.snapshots["overlayfs"][ctrID] = Snapshot{Parent: good.chain}
	first := NewResolver(rec, testOptions())
	first.Connected(true)
	if img := resolveOne(t, first, container(name, "", "")); img.Fault != nil { // overlayfs is used
		t.Fatal(img.Fault)
	}
	both := &together{records: rec, asked: make(chan struct{})}
	first.records = both
	ask := func() *verify.Fault {
		t.Helper()
		return first.Resolve(t.Context(), &api.PodSandbox{Id: "pod"}, container(name, "", ""))[0].Fault
	}
	rec.calls = 0
	if f := ask(); f != nil || rec.calls != 2 {
		t.Fatalf("%v, %d calls", f, rec.calls)
	}
	rec.snapshots["overlayfs"][ctrID] = Snapshot{Parent: evil.chain}
	if f := ask(); f == nil || f.Reason != verify.ImageMismatch {
		t.Fatalf("the snapshot of another image: %v", f)
	}
	delete(rec.snapshots["overlayfs"], ctrID)
	if f := ask(); f == nil || f.Reason != verify.ImageUnresolved {
		t.Fatalf("no snapshot: %v", f)
	}
	rec.snapshots["native"][ctrID] = Snapshot{Parent: good.chain}
	if f := ask(); f != nil {
		t.Fatalf("the snapshot of another snapshotter: %v", f)
	}
	first.used.Add("", "overlayfs")
	delete(rec.images, name)
	if f := ask(); f == nil || f.Reason != verify.ImageUnresolved {
		t.Fatalf("no record: %v", f)
	}
	rec.images[name] = good.manifest
	first.records = &together{records: rec, asked: closed(), panics: true}
	if f := ask(); f == nil || f.Reason != verify.ImageUnresolved || !strings.Contains(f.Detail, "panic") {
		t.Fatalf("a panic: %v", f)
	}
}

func closed() chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}
