package store

import (
	"context"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify/oci"
	"github.com/tidewaiter/tidewaiter/verify/source/catalog"
	"github.com/tidewaiter/tidewaiter/verify/source/layout"
)

// A step is how far a document leads.
type step struct {
	digest.Digest
	depth int
}

// alive reports whether the last listing had an image that subject leads to: itself,
// what it lists, down to the config. It finds that out once for each listing.
func (w *writer) alive(subject digest.Digest) bool { return w.leads(step{subject, 2}) }

func (w *writer) leads(to step) bool {
	if w.listing[to.Digest] {
		return true
	}
	yes, known := w.lives[to]
	if known {
		return yes
	}
	if to.depth == 2 {
		w.judges(to.Digest)
	}
	if x := w.catalog.Blobs[to.Digest]; x != nil && to.depth > 0 {
		yes = slices.ContainsFunc(x.Names, func(d digest.Digest) bool { return w.leads(step{d, to.depth - 1}) })
	}
	if to.depth > 0 { // the others are quickly found out, and there are many
		w.lives[to] = yes
	}
	return yes
}

// retain looks at a listing of the node's images, each subject once, while questions
// are answered.
func (w *writer) retain(ctx context.Context) {
	now := w.o.Now()
	w.mu.Lock()
	serial, live, keep := w.listed, w.live, w.keep
	news := serial != w.done
	w.mu.Unlock()
	if !news {
		return
	}
	w.listing, w.lives = live, map[step]bool{}
	var fresh, over []*catalog.Blob
	var lacks []digest.Digest
	for subject, list := range w.catalog.Signed {
		alive := w.alive(subject)
		if alive && w.without(subject) && !now.Before(w.lacking[subject]) {
			lacks = append(lacks, subject)
		}
		for _, b := range list {
			age := now.Round(0).Sub(b.Seen)
			ahead := age < -freshEvery && !now.Before(earliest) // the clock was wrong then, and is not known to be now
			switch {
			case alive:
				b.Gone = time.Time{}
				if age > min(freshEvery, keep/4) || ahead {
					fresh = append(fresh, b)
				}
			case b.Gone.IsZero():
				b.Gone = now
			case now.Sub(b.Gone) < min(goneFor, keep):
			case age > keep:
				over = append(over, b)
			case ahead: // keep begins; not before a wrong clock had its day to be set
				fresh = append(fresh, b)
			}
		}
	}
	for _, b := range fresh {
		if w.dir.Root.Chtimes(layout.BlobPath(b.Digest), now, now) == nil {
			w.mu.Lock()
			b.Seen = now.Round(0)
			w.mu.Unlock()
		}
	}
	for _, subject := range lacks {
		w.finish(ctx, subject, now)
	}
	for _, b := range over {
		_ = w.remove(b)
		delete(w.lacking, b.Subject)
	}
	if len(over) > 0 {
		w.o.Log.Info("signatures of images that have left the node are removed from the store", "store", w.Name(), "signatures", len(over))
		w.tidy(over...)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.done = serial
}

// without reports whether a document that leads from subject to what is on the node is
// not in the store.
func (w *writer) without(subject digest.Digest) bool {
	x := w.catalog.Blobs[subject]
	if x == nil {
		return true
	}
	return oci.IsIndex(x.MediaType) && slices.ContainsFunc(x.Names, func(d digest.Digest) bool { return w.catalog.Blobs[d] == nil && w.wanted(d) })
}

// wanted reports whether the manifest d, which an index lists, is to be in the store.
func (w *writer) wanted(d digest.Digest) bool { return w.listing[d] || w.broken[d] }

// finish gets what subject is without, or notes when that is tried again.
func (w *writer) finish(ctx context.Context, subject digest.Digest, now time.Time) {
	if w.complete(ctx, subject) {
		delete(w.lacking, subject)
	} else {
		w.lacking[subject] = now.Add(wholeEvery)
	}
}

// complete gets what subject is without: the runtime was away when its signature was
// kept, the image's manifest came later, or a file was damaged.
func (w *writer) complete(ctx context.Context, subject digest.Digest) bool {
	var from *catalog.Blob
	var d ocispec.Descriptor
	for _, b := range w.catalog.Signed[subject] {
		raw, err := w.dir.Blob(b.Descriptor(), func(int64) error { return nil })
		if err != nil {
			continue
		}
		if m, err := oci.ReadHead(raw); err == nil && m.Subject != nil && m.Subject.Digest == subject {
			from, d = b, *m.Subject
			break
		}
	}
	if from == nil {
		return false // they have their turn when they are asked for
	}
	f, ok := w.document(ctx, d)
	if !ok {
		return false
	}
	list := []file{f}
	if oci.IsIndex(f.MediaType) {
		entries, _ := layout.EntriesOf(f.raw)
		for _, d := range entries {
			if !w.wanted(d.Digest) {
				continue
			}
			g, got := w.document(ctx, d)
			if ok = ok && got; got {
				list = append(list, g)
			}
		}
	}
	missing, room := w.room(list, w.keyOf(from))
	if !room {
		return false
	}
	return len(missing) == 0 || w.lay(missing) == nil && ok
}

// mend looks at what could not be read, and removes what is not what its digest says. A
// signature that is damaged stays known, so that nobody takes it for one that never
// was, until it is kept anew or its image has left. A document is had again from the
// node's images or from an archive.
func (w *writer) mend(ctx context.Context) {
	w.mu.Lock()
	list := w.suspect
	w.suspect = nil
	w.mu.Unlock()
	for _, d := range list {
		b := w.catalog.Blobs[d]
		if b == nil || b.Lost {
			continue
		}
		envelope := b.Subject != "" && b.Envelope != ""
		if !w.spoilt(d) && (!envelope || !w.spoilt(b.Envelope)) {
			continue
		}
		if b.Subject != "" {
			w.o.Log.Warn("a signature in the store is damaged; it counts again when a mirror has it", "store", w.Name(), "signature", d.String())
			if e := w.catalog.Blobs[b.Envelope]; e != nil && w.spoilt(b.Envelope) {
				_ = w.remove(e)
			}
			w.mu.Lock()
			b.Lost = true
			w.dirty = true
			w.mu.Unlock()
			continue
		}
		w.o.Log.Warn("a manifest or index in the store is damaged; it is looked for in the node's images and in evidence archives", "store", w.Name(), "digest", d.String())
		w.mu.Lock()
		w.catalog.Forget(b)
		if len(w.catalog.Named[d]) > 0 {
			w.broken[d] = true // the file stays, so that the next process knows it as well
		}
		w.dirty = true
		w.mu.Unlock()
		clear(w.lives)
		w.heal(ctx, d)
	}
}

// heal gets the document d again, which was damaged.
func (w *writer) heal(ctx context.Context, d digest.Digest) {
	now := w.o.Now()
	if w.catalog.Lacks[d] {
		w.finish(ctx, d, now)
	}
	for _, x := range slices.Clone(w.catalog.Named[d]) {
		if len(w.catalog.Signed[x.Digest]) > 0 {
			w.finish(ctx, x.Digest, now)
		}
	}
}

// writeOff removes damaged files of which it was not found out what they were.
func (w *writer) writeOff() {
	if len(w.losses) == 0 || w.o.Now().Before(w.until) {
		return
	}
	for d := range w.losses {
		_ = w.dir.Root.Remove(layout.BlobPath(d))
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.losses = nil
}

// spoilt reports whether the file with that digest is another one, or none.
func (w *writer) spoilt(d digest.Digest) bool {
	raw, err := w.dir.Read(layout.BlobPath(d), func(n int64) error {
		if n > maxDocument {
			return layout.ErrDamaged
		}
		return nil
	})
	if layout.Inconclusive(err) {
		return false
	}
	return err != nil || d.Algorithm().FromBytes(raw) != d
}
