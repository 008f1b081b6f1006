package containerd

import (
	"context"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
)

// slow counts how many blobs are read at once, and waits while gate is not nil.
type slow struct {
	*records
	gate    chan struct{}
	entered chan struct{}
	now     atomic.Int32
	most    atomic.Int32
	reads   atomic.Int32
}

func (s *slow) Blob(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	s.reads.Add(1)
	if n := s.now.Add(1); n > s.most.Load() {
		s.most.Store(n)
	}
	defer s.now.Add(-1)
	select {
	case s.entered <- struct{}{}:
	default:
	}
	if s.gate != nil {
		select {
		case <-s.gate:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return s.records.Blob(ctx, d)
}

// TestOneImageAtATime: the documents of one image are in memory at a time, and those of
// one target are read once, however many ask.
func TestOneImageAtATime(t *testing.T) {
	rec := newRecords()
	a, b := rec.image("a", "a"), rec.image("b", "b")
	s := &slow{records: rec, gate: make(chan struct{}), entered: make(chan struct{}, 1)}
	r := NewResolver(s, testOptions())
	var wg sync.WaitGroup
	for range 4 {
		for _, target := range []ocispec.Descriptor{a.manifest, b.manifest} {
			wg.Go(func() {
				if l, err := r.follow(t.Context(), target); err != nil || l.manifest.Digest != target.Digest {
					t.Errorf("%v, error %v", l.manifest.Digest, err)
				}
			})
		}
	}
	<-s.entered
	close(s.gate)
	wg.Wait()
	if most, reads := s.most.Load(), s.reads.Load(); most != 1 || reads != 4 { // a manifest and a config each
		t.Errorf("%d blobs were read, %d at once, want 4, and 1", reads, most)
	}
}

// TestTurnIsAwaitedWithinBounds: one that waits in vain is PENDING, which is not
// remembered.
func TestTurnIsAwaitedWithinBounds(t *testing.T) {
	rec := newRecords()
	a, b := rec.image("a", "a"), rec.image("b", "b")
	s := &slow{records: rec, gate: make(chan struct{}), entered: make(chan struct{}, 1)}
	r := NewResolver(s, testOptions())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = r.follow(t.Context(), a.manifest)
	}()
	<-s.entered
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	_, err := r.follow(ctx, b.manifest)
	if reasonOf(err) != verify.Pending || !strings.Contains(err.Error(), "another image") {
		t.Errorf("while another is read: %v, want %s", err, verify.Pending)
	}
	close(s.gate)
	<-done
	if l, err := r.follow(t.Context(), b.manifest); err != nil || l.manifest.Digest != b.manifest.Digest {
		t.Errorf("then: %v, error %v", l.manifest.Digest, err)
	}
}

// noted are Marks in memory.
type noted struct {
	mu   sync.Mutex
	hand []digest.Digest
	skip digest.Digest
}

func (n *noted) Skips(d digest.Digest) bool { return n.skip == d }

func (n *noted) Hold(d digest.Digest) (release func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.hand = append(n.hand, d)
	return func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		i := slices.Index(n.hand, d)
		n.hand = slices.Delete(n.hand, i, i+1)
	}
}

func (n *noted) list() []digest.Digest {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.hand)
}

// TestTurnIsAwaitedUnmarked: an image is marked while it is read, and not while it waits
// for its turn: the image that is read then may end the process.
func TestTurnIsAwaitedUnmarked(t *testing.T) {
	rec := newRecords()
	a, b := rec.image("a", "a"), rec.image("b", "b")
	s := &slow{records: rec, gate: make(chan struct{}), entered: make(chan struct{}, 1)}
	r := NewResolver(s, testOptions())
	marks := &noted{}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = r.learn(t.Context(), a.manifest, marks)
	}()
	<-s.entered
	ctx, cancel := context.WithCancel(t.Context())
	waits := make(chan struct{})
	go func() {
		defer close(waits)
		_, _ = r.learn(ctx, b.manifest, marks)
	}()
	cancel()
	<-waits
	if got := marks.list(); !slices.Equal(got, []digest.Digest{a.manifest.Digest}) {
		t.Errorf("%q are marked, want %s", got, a.manifest.Digest)
	}
	close(s.gate)
	<-done
	if got := marks.list(); len(got) > 0 {
		t.Errorf("afterwards %q are marked", got)
	}
}
