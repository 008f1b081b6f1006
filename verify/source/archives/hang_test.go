package archives_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/archives"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

// A disk that hangs ends no question later than its time, holds a bounded number of
// goroutines, and is read again when it answers.
func TestHang(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var c, own site
	one, ev := c.image("one")
	two, fine := own.image("two")
	put(t, dir, "usb", c)
	put(t, dir, "zero", own)
	r := start(t, dir, archives.Options{})
	free, hung := r.Hang("usb")
	free = sync.OnceFunc(free)
	defer free()
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			got, err := sourcetest.Find(t.Context(), r, one, verify.Limits{})
			for _, ev := range got {
				if ev.Err == nil {
					t.Error("a signature was read")
				}
			}
			if !errors.Is(err, verify.ErrUnreachable) {
				t.Errorf("error %v", err)
			}
			r.parents(one.Digest)
		})
	}
	wg.Wait()
	if n := hung(); n < 1 || n > 4 {
		t.Errorf("%d reads under way", n)
	}
	// What lies elsewhere is found; that there is no more is not known.
	got, err := sourcetest.Find(t.Context(), r, two, verify.Limits{})
	sourcetest.Check(t, got, []verify.Evidence{fine}, 0)
	if !errors.Is(err, verify.ErrUnreachable) || !strings.Contains(err.Error(), `evidence archive "usb"`) {
		t.Errorf("error %v", err)
	}
	if got := r.troubles(); len(got) != 2 || !strings.Contains(got[0], "does not answer") {
		t.Errorf("evidence archives %q", got)
	}
	free()
	r.finds(one, ev)
	r.eventually("no read is under way", func() bool { return hung() == 0 })
}

// Who has no time left does not wait for the disk.
func TestHangUntilDeadline(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var c site
	one, ev := c.image("one")
	put(t, dir, "usb", c)
	r := start(t, dir, archives.Options{})
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

// An archive that is replaced while it is read is closed when that has ended.
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
	r := start(t, dir, archives.Options{})
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
		r.Rescan()
	}
	close(end)
	wg.Wait()
	r.finds(one, ev)
	if got := r.troubles(); len(got) != 2 {
		t.Errorf("evidence archives %q", got)
	}
}
