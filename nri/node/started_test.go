package node

import (
	"context"
	"testing"

	"github.com/tidewaiter/tidewaiter/verify"
)

// Audit creates containers whose image could not be bound. That the name moved
// while it was created must not be said of them.
func TestStartedKnowsNothingOfUnboundImages(t *testing.T) {
	rec := newRecords()
	img := rec.image("good", "a")
	rec.configs[ctrID] = img.config.Digest
	r := NewResolver(rec, testOptions())
	r.Connected(true)
	r.Decided(ctrID, []verify.Image{{Config: img.config.Digest, Fault: &verify.Fault{Reason: verify.ImageUnresolved}, Use: verify.UseContainer}})
	if f := r.Started(context.Background(), ctrID); f == nil || f.Reason != verify.ImageUnresolved {
		t.Fatalf("a container whose image was not bound: %v", f)
	}
	r.Decided(ctrID, []verify.Image{{Use: verify.UseContainer, Config: img.config.Digest}})
	if f := r.Started(context.Background(), ctrID); f != nil {
		t.Fatalf("a container whose image was bound: %v", f)
	}
}
