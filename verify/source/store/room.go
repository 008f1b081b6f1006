package store

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify/source/catalog"
	"github.com/tidewaiter/tidewaiter/verify/source/layout"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// room makes room for those of list that are not there yet, and returns them. They are
// charged to the anchor key. What goes may take with it what list was to share.
func (w *writer) room(list []file, key string) (missing []file, ok bool) {
	var evicted int
	var from string
	var all *ledger // counted when something has to go
	defer func() {
		if evicted > 0 {
			w.o.Log.Warn("the store is full, and signatures of images on the node made room for another trust anchor, which has less of it", "store", w.Name(),
				"signatures", evicted, "anchor", w.anchor(from))
		}
	}()
	for {
		missing = nil
		var need share
		for _, f := range list {
			if b := w.catalog.Blobs[f.Digest]; b == nil || b.Lost {
				missing = append(missing, f)
				need.add(share{f.Size, 1, len(f.Names)})
			}
		}
		holds := need.bytes <= w.o.Size-w.catalog.Used && need.files <= w.limit()-len(w.catalog.Blobs)
		if holds && need.links <= maxListed-w.catalog.Links {
			return missing, true
		}
		if need.bytes > w.o.Size || w.listing == nil {
			return nil, false
		}
		if all == nil {
			all = w.ledger()
		}
		victim, living := all.victim(key, need)
		if victim == nil && holds {
			return missing, true // what they name is not remembered, see catalog.add
		}
		if victim == nil {
			return nil, false
		}
		if living {
			evicted++
			from = all.keyOf(victim)
		}
		if w.remove(victim) != nil {
			return nil, false
		}
		w.tidy(victim)
		all.count(victim.Subject)
	}
}

// limit is how many files there may be.
func (w *writer) limit() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.most
}

// anchor names an anchor for people.
func (w *writer) anchor(key string) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	if name := w.trusts[key]; name != "" {
		return text.Clean(name, 80)
	}
	if key == "" {
		return "an unknown trust anchor"
	}
	return "the certificate " + text.Clean(key, 16)
}

// fullness is what is in the way of what has no room.
func (w *writer) fullness() error {
	if w.partial {
		return errStuffed
	}
	all := w.ledger()
	if len(all.anchors) == 0 {
		return errFull
	}
	k := all.largest()
	return fmt.Errorf("%w: %d%% of it are charged to %s, most of that for %s", errFull, w.portion(all.anchors[k])/10_000, w.anchor(k), all.subject(k))
}

// departed reports whether the image of b is not on the node: no listing has had it
// for an hour, or this process's have not and for days it was not seen before.
func (w *writer) departed(b *catalog.Blob, now time.Time) bool {
	return !b.Gone.IsZero() && !w.alive(b.Subject) && (now.Sub(b.Gone) >= roomAfter || now.Round(0).Sub(b.Seen) > 2*freshEvery)
}

// remove removes a file, and what is known of it.
func (w *writer) remove(b *catalog.Blob) error {
	if err := w.dir.Root.Remove(layout.BlobPath(b.Digest)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.catalog.Forget(b)
	w.dirty = true
	return nil
}

// tidy removes what no signature needs, of what the signatures gone needed, or of all if
// none is given: its envelope, the document that it is over, and if that is an index, the
// manifests that it lists. If not every file could be read, what those need is not known,
// and only what belonged to gone is removed.
func (w *writer) tidy(gone ...*catalog.Blob) {
	useless := map[digest.Digest]bool{}
	for _, b := range gone {
		useless[b.Envelope], useless[b.Subject] = true, true
		for _, part := range b.Parts {
			useless[part] = true
		}
		if x := w.catalog.Blobs[b.Subject]; x != nil {
			for _, d := range x.Names {
				useless[d] = true
			}
		}
	}
	if len(gone) == 0 && !w.partial {
		for d := range w.catalog.Blobs {
			useless[d] = true
		}
	}
	delete(useless, ocispec.DescriptorEmptyJSON.Digest)
	for subject, list := range w.catalog.Signed {
		delete(useless, subject)
		for _, b := range list {
			delete(useless, b.Digest)
			delete(useless, b.Envelope)
			for _, part := range b.Parts {
				delete(useless, part)
			}
		}
	}
	for d := range useless {
		b := w.catalog.Blobs[d]
		if b == nil || slices.ContainsFunc(w.catalog.Named[d], func(x *catalog.Blob) bool { return len(w.catalog.Signed[x.Digest]) > 0 }) {
			delete(useless, d)
		}
	}
	for d := range useless {
		_ = w.remove(w.catalog.Blobs[d])
	}
}
