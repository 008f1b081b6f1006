package store_test

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
	"github.com/tidewaiter/tidewaiter/verify/source/store"
)

// chainOf is the chain of an envelope that begins with the name of its anchor and a colon.
func chainOf(envelope []byte) []string {
	anchor, _, found := strings.Cut(string(envelope), ":")
	if !found {
		return nil
	}
	return []string{"leaf of " + anchor, anchor}
}

// A signature that is damaged, of an image on the node, does not go first when the store
// is full: then its image would be one that was never signed, and not one of which the
// answer is not known.
func TestDamagedKeepsItsRoom(t *testing.T) {
	t.Parallel()
	var c site
	clock := newClock()
	dir := t.TempDir()
	r := start(t, dir, store.Options{Now: clock.now, Kinds: []verify.Kind{chained{sourcetest.Kind}}, Size: 64 << 10})
	live := map[digest.Digest]bool{}
	image := func(name string, n int) (ocispec.Descriptor, verify.Evidence) {
		d := c.Image(name)
		live[d.Digest] = true
		return d, c.evidence(d, name+strings.Repeat("x", n))
	}
	hurt, ev := image("a: hurt", 100)
	r.keep(hurt, hurt, ev)
	r.settled()
	if err := os.WriteFile(blob(dir, digest.FromBytes(ev.Blob)), []byte("other"), 0o600); err != nil {
		t.Fatal(err)
	}
	type one struct {
		image ocispec.Descriptor
		ev    verify.Evidence
	}
	var theirs, others []one
	for i := range 20 {
		d, ev := image(fmt.Sprint("b: ", i), 4000)
		theirs = append(theirs, one{d, ev})
		d, ev = image(fmt.Sprint("c: ", i), 4000)
		others = append(others, one{d, ev})
	}
	r.Retain(live)
	r.eventually("the listing was looked at", r.Retained)
	for _, x := range theirs {
		r.keep(x.image, x.image, x.ev)
		clock.pass(time.Second)
	}
	r.settled()
	find := func() error {
		_, err := sourcetest.Find(t.Context(), r, hurt, verify.Limits{})
		return err
	}
	if err := find(); !errors.Is(err, verify.ErrUnreachable) {
		t.Fatalf("damaged: %v", err)
	}
	for _, x := range others {
		r.keep(x.image, x.image, x.ev)
	}
	r.settled()
	if err := find(); !errors.Is(err, verify.ErrUnreachable) {
		t.Errorf("the store was full: %v", err)
	}
	r.keep(hurt, hurt, ev) // a mirror has it again
	r.settled()
	r.has(hurt, ev)
}

// BenchmarkRoom has the evidence of one image make room by pushing out some two hundred
// signatures of another anchor, which has filled the store.
func BenchmarkRoom(b *testing.B) {
	const images, each = 1000, 4
	var c site
	live := map[digest.Digest]bool{}
	type one struct {
		image ocispec.Descriptor
		ev    verify.Evidence
	}
	var all []one
	for i := range images {
		d := c.Image(fmt.Sprint("image ", i))
		live[d.Digest] = true
		for k := range each {
			all = append(all, one{d, c.evidence(d, fmt.Sprint("a: ", i, " ", k, strings.Repeat("x", 2000)))})
		}
	}
	big := c.Image("big")
	live[big.Digest] = true
	ev := c.evidence(big, "b: "+strings.Repeat("y", 600<<10))
	for b.Loop() {
		b.StopTimer()
		r := start(b, b.TempDir(), store.Options{Kinds: []verify.Kind{chained{sourcetest.Kind}}, Size: 9 << 20})
		r.Retain(live)
		r.eventually("the listing was looked at", r.Retained)
		for i, x := range all {
			if r.keep(x.image, x.image, x.ev); i%400 == 399 {
				r.settled()
			}
		}
		before, _ := r.Signatures()
		b.StartTimer()
		r.keep(big, big, ev)
		r.settled()
		b.StopTimer()
		if !r.Has(ev.Manifest.Digest) {
			b.Fatal(r.Trouble())
		}
		after, _ := r.Signatures()
		b.ReportMetric(float64(before), "signatures")
		b.ReportMetric(float64(before+1-after), "evicted")
		r.stop()
		b.StartTimer()
	}
}

// chained is a kind whose blobs say who signed.
type chained struct{ verify.Kind }

func (chained) Chain(blob []byte) []string { return chainOf(blob) }
