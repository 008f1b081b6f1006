package store_test

import (
	"errors"
	"sync"
	"testing"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
	"github.com/tidewaiter/tidewaiter/verify/source/store"
)

// A disk that hangs ends no question later than its time, holds a bounded number of
// goroutines, and is read again when it answers.
func TestHang(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var c, own site
	one, ev := c.image("one")
	two, kept := own.image("two")
	put(t, dir, "usb", c)
	r := start(t, dir, store.Options{})
	r.keep(two, two, kept)
	r.settled()
	free, hung := r.Hang()
	free = sync.OnceFunc(free)
	defer free()
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			got, err := sourcetest.Find(t.Context(), r, two, verify.Limits{})
			for _, ev := range got {
				if ev.Err == nil {
					t.Error("a signature was read")
				}
			}
			if !errors.Is(err, verify.ErrUnreachable) {
				t.Errorf("error %v", err)
			}
			r.parents(two.Digest)
		})
	}
	wg.Wait()
	if n := hung(); n < 1 || n > 4 {
		t.Errorf("%d reads under way", n)
	}
	// What lies elsewhere is found; that there is no more is not known.
	got, err := sourcetest.Find(t.Context(), r, one, verify.Limits{})
	sourcetest.Check(t, got, []verify.Evidence{ev}, 0)
	if !errors.Is(err, verify.ErrUnreachable) {
		t.Errorf("error %v", err)
	}
	// Also what is kept meanwhile.
	var c2 site
	three, more := c2.image("three")
	r.keep(three, three, more)
	r.settled()
	free()
	r.finds(two, kept)
	r.has(three, more)
	r.eventually("no read is under way", func() bool { return hung() == 0 })
}
