package store_test

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
	"github.com/tidewaiter/tidewaiter/verify/source/store"
)

// While a listing is looked at, questions are answered, and each subject is looked at
// once, however many signatures it has; the same while room is made.
func TestAnswersWhileRetaining(t *testing.T) {
	t.Parallel()
	var c site
	one, ev := c.image("one")
	var entries strings.Builder
	for i := range 20000 {
		fmt.Fprintf(&entries, `{"mediaType":%q,"digest":%q,"size":2},`, ocispec.MediaTypeImageManifest, digest.FromString(fmt.Sprint(i)))
	}
	wide := c.Add(ocispec.MediaTypeImageIndex, fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"manifests":[%s{}]}`, ocispec.MediaTypeImageIndex, entries.String()))
	var many []verify.Evidence // made before the store reads c
	for i := range 50 {
		many = append(many, c.evidence(wide, fmt.Sprint("signature ", i)))
	}
	var mu sync.Mutex
	looked := map[digest.Digest]int{}
	held := make(chan chan struct{})
	clock := newClock()
	holding := false
	r := start(t, t.TempDir(), store.Options{Image: c.read, Now: clock.now}, func(s *store.Store) {
		s.Judging(func(subject digest.Digest) {
			mu.Lock()
			looked[subject]++
			hold := holding
			mu.Unlock()
			if hold {
				free := make(chan struct{})
				held <- free
				<-free
			}
		})
	})
	r.keep(one, one, ev)
	for _, of := range many {
		r.keep(wide, wide, of)
	}
	r.settled()
	mu.Lock()
	clear(looked)
	holding = true
	mu.Unlock()
	r.Retain(map[digest.Digest]bool{digest.FromString("another image"): true})
	for range 2 { // the two subjects
		free := <-held
		r.has(one, ev)
		if n, _ := r.Signatures(); n != 51 {
			t.Errorf("%d signatures", n)
		}
		if err := r.Parents(t.Context(), one.Digest, verify.NewBudget(sourcetest.Kind, verify.Limits{}), func(digest.Digest, []byte) bool { return true }); err != nil {
			t.Error(err)
		}
		close(free)
	}
	mu.Lock()
	holding = false
	mu.Unlock()
	r.eventually("the listing was looked at", r.Retained)
	mu.Lock()
	defer mu.Unlock()
	if len(looked) != 2 || looked[wide.Digest] != 1 || looked[one.Digest] != 1 {
		t.Errorf("looked at %v", looked)
	}
	clock.pass(time.Hour)
}
