package containerd

import (
	"context"
	"strings"
	"testing"

	"github.com/containerd/nri/pkg/api"

	"github.com/tidewaiter/tidewaiter/verify"
)

// started is what is in the way of the start of ctr, or nil.
func started(r *Resolver, ctr *api.Container) *verify.Fault {
	for _, i := range r.Started(context.Background(), &api.PodSandbox{Id: "pod"}, ctr) {
		if i.Fault != nil {
			return i.Fault
		}
	}
	return nil
}

// Audit creates containers whose image could not be bound. That the name moved
// while it was created must not be said of them.
func TestStartedKnowsNothingOfUnboundImages(t *testing.T) {
	rec := newRecords()
	img := rec.image("good", "a")
	rec.configs[ctrID] = img.config.Digest
	r := NewResolver(rec, testOptions())
	r.Connected(true)
	r.Decided(ctrID, []verify.Image{{Config: img.config.Digest, Fault: &verify.Fault{Reason: verify.ImageUnresolved}, Use: verify.UseContainer}})
	if f := started(r, container("r.example/app:1", "", "")); f == nil || f.Reason != verify.ImageUnresolved {
		t.Fatalf("a container whose image was not bound: %v", f)
	}
	r.Decided(ctrID, []verify.Image{{Use: verify.UseContainer, Config: img.config.Digest}})
	if f := started(r, container("r.example/app:1", "", "")); f != nil {
		t.Fatalf("a container whose image was bound: %v", f)
	}
}

// A container that another run of the gate allowed is bound anew when it starts,
// and all that it runs is handed over to be judged.
func TestStartedBindsWhatAnotherRunAllowed(t *testing.T) {
	const name = "r.example/app:1"
	rec := newRecords()
	good, evil := rec.image("good", "a"), rec.image("evil", "a")
	rec.images[name] = good.manifest
	rec.snapshots["overlayfs"][ctrID] = Snapshot{Parent: good.chain}
	r := NewResolver(rec, testOptions())
	r.Connected(true)
	ctr := container(name, "", "")
	restored := container(name, "", "")
	restored.Annotations[annotationRestored] = "true"
	volume := container(name, "", "")
	volume.Mounts = []*api.Mount{{Source: "/run/image-volumes/" + strings.Repeat("a", 64) + "/" + evil.manifest.Digest.Encoded()}}
	for _, tt := range []struct {
		name   string
		config *image
		ctr    *api.Container
		want   verify.Reason
	}{
		{"no record of the container", nil, ctr, verify.ImageUnresolved},
		{"equal layers, another config", &evil, ctr, verify.ImageMismatch},
		{"restored", &good, restored, verify.ImageUnresolved},
		{"a volume that cannot be bound", &good, volume, verify.ImageVolumeUnverified},
		{"another name", &good, container("r.example/other:1", "", ""), verify.ImageUnresolved},
		{"the config that its name leads to", &good, ctr, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			delete(rec.configs, ctrID)
			if tt.config != nil {
				rec.configs[ctrID] = tt.config.config.Digest
			}
			f := started(r, tt.ctr)
			if tt.want == "" {
				l := r.Started(t.Context(), &api.PodSandbox{Id: "pod"}, tt.ctr)
				if f != nil || len(l) != 1 || l[0].Config != good.config.Digest || l[0].Binding != verify.BoundSnapshot {
					t.Fatalf("fault %v, images %+v", f, l)
				}
			} else if f == nil || f.Reason != tt.want {
				t.Fatalf("got %v, want %s", f, tt.want)
			}
		})
	}
	// What was decided here is compared only.
	rec.configs[ctrID] = good.config.Digest
	r.Decided(ctrID, []verify.Image{{Use: verify.UseContainer, Config: good.config.Digest}})
	if l := r.Started(t.Context(), &api.PodSandbox{Id: "pod"}, ctr); l != nil {
		t.Errorf("handed over again: %+v", l)
	}
}
