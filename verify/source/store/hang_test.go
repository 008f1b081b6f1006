package store_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
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
	for _, bundle := range []string{"", "usb"} {
		t.Run(bundle, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			var c, own site
			one, ev := c.image("one")
			two, kept := own.image("two")
			put(t, dir, "usb", c)
			r := start(t, dir, store.Options{})
			r.keep(two, two, kept)
			r.settled()
			victim, want, other, fine := one, ev, two, kept
			if bundle == "" {
				victim, want, other, fine = two, kept, one, ev
			}
			free, hung := r.Hang(bundle)
			free = sync.OnceFunc(free)
			defer free()
			var wg sync.WaitGroup
			for range 20 {
				wg.Go(func() {
					got, err := sourcetest.Find(t.Context(), r, victim, verify.Limits{})
					for _, ev := range got {
						if ev.Err == nil {
							t.Error("a signature was read")
						}
					}
					if !errors.Is(err, verify.ErrUnreachable) {
						t.Errorf("error %v", err)
					}
					r.parents(victim.Digest)
				})
			}
			wg.Wait()
			if n := hung(); n < 1 || n > 4 {
				t.Errorf("%d reads under way", n)
			}
			// What lies elsewhere is found; that there is no more is not known.
			got, err := sourcetest.Find(t.Context(), r, other, verify.Limits{})
			sourcetest.Check(t, got, []verify.Evidence{fine}, 0)
			if !errors.Is(err, verify.ErrUnreachable) {
				t.Errorf("error %v", err)
			}
			if bundle != "" {
				if !strings.Contains(err.Error(), `bundle "usb"`) {
					t.Errorf("error %v", err)
				}
				if got := r.troubles(); len(got) != 1 || !strings.Contains(got[0], "does not answer") {
					t.Errorf("bundles %q", got)
				}
			}
			// Also what is kept meanwhile.
			var c2 site
			three, more := c2.image("three")
			r.keep(three, three, more)
			r.settled()
			free()
			r.finds(victim, want)
			r.has(three, more)
			r.eventually("no read is under way", func() bool { return hung() == 0 })
		})
	}
}

// Who has no time left does not wait for the disk.
func TestHangUntilDeadline(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var c site
	one, ev := c.image("one")
	put(t, dir, "usb", c)
	r := start(t, dir, store.Options{})
	free, _ := r.Hang("usb")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, err := sourcetest.Find(ctx, r, one, verify.Limits{})
		done <- err
	}()
	cancel()
	if err := <-done; !errors.Is(err, verify.ErrUnreachable) {
		t.Errorf("error %v", err)
	}
	free()
	r.finds(one, ev)
}

// A bundle that is replaced while it is read is closed when that has ended.
func TestReplacedWhileRead(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var c site
	one, ev := c.image("one")
	for i := range 20 {
		c.image(fmt.Sprint("image ", i))
	}
	for _, form := range forms {
		put(t, dir, "a"+form, c)
	}
	r := start(t, dir, store.Options{})
	var wg sync.WaitGroup
	end := make(chan struct{})
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-end:
					return
				default:
				}
				got, err := sourcetest.Find(t.Context(), r, one, verify.Limits{})
				if err != nil && !errors.Is(err, verify.ErrUnreachable) {
					t.Error(err)
				}
				for _, x := range got {
					if x.Err == nil && string(x.Blob) != string(ev.Blob) {
						t.Error("something else was read")
					}
				}
			}
		})
	}
	for range 10 {
		for _, form := range forms {
			put(t, dir, "a"+form, c)
		}
		r.Look()
	}
	close(end)
	wg.Wait()
	r.finds(one, ev)
	if got := r.troubles(); len(got) != 2 {
		t.Errorf("bundles %q", got)
	}
}
