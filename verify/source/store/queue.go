package store

import (
	"cmp"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
)

// Evidence waits in memory until it is written, for at most maxWaiting bytes. When that
// is full, anchors share it as they share the room of the store, and subjects share what
// an anchor has: new evidence takes the place of what came last for the anchor, or else
// for the subject, that has more of it than that of the new evidence would have with it.

// evidence waits to be written.
type evidence struct {
	subject  ocispec.Descriptor
	manifest ocispec.Descriptor // that the node selected from subject, if that is an index
	found    verify.Evidence
	anchor   string // that it is charged to
}

func (e *evidence) size() int64 { return int64(len(e.found.Document) + len(e.found.Blob)) }

// A queue is evidence that waits. It is not safe for concurrent use.
type queue struct {
	list    []evidence // the first may be in hand and stays
	bytes   int64
	dropped int // evidence that there was no room for
}

// has reports whether the signature with that manifest waits.
func (q *queue) has(manifest digest.Digest) bool {
	return slices.ContainsFunc(q.list, func(e evidence) bool { return e.found.Manifest.Digest == manifest })
}

// add takes e in, if there is room for it or other evidence has to give way.
func (q *queue) add(e evidence) {
	gone, ok := q.yield(&e)
	if !ok {
		q.dropped++
		return
	}
	q.dropped += len(gone)
	for _, i := range gone {
		q.delete(i)
	}
	q.list, q.bytes = append(q.list, e), q.bytes+e.size()
}

// next removes the first.
func (q *queue) next() { q.delete(0) }

func (q *queue) delete(i int) {
	q.bytes -= q.list[i].size()
	q.list = slices.Delete(q.list, i, i+1)
}

// yield returns the places of what gives way to e, the highest first. Nothing does
// unless that makes enough room.
func (q *queue) yield(e *evidence) (gone []int, ok bool) {
	if q.bytes+e.size() <= maxWaiting {
		return nil, true
	}
	type part struct {
		anchor  string
		subject digest.Digest
	}
	anchors, parts := map[string]int64{}, map[part]int64{}
	for i := range q.list {
		w := &q.list[i]
		anchors[w.anchor] += w.size()
		if i > 0 {
			parts[part{w.anchor, w.subject.Digest}] += w.size()
		}
	}
	mine := part{e.anchor, e.subject.Digest}
	for bytes := q.bytes; bytes+e.size() > maxWaiting; {
		var from part
		for p, n := range parts {
			if c := cmp.Or(cmp.Compare(anchors[p.anchor], anchors[from.anchor]), cmp.Compare(p.anchor, from.anchor), cmp.Compare(n, parts[from]), cmp.Compare(p.subject, from.subject)); c > 0 {
				from = p
			}
		}
		if from.anchor != e.anchor && anchors[from.anchor] <= anchors[e.anchor]+e.size() ||
			from.anchor == e.anchor && parts[from] <= parts[mine]+e.size() {
			return nil, false
		}
		last := -1
		for i := len(q.list) - 1; i > 0 && last < 0; i-- {
			if w := &q.list[i]; w.anchor == from.anchor && w.subject.Digest == from.subject && !slices.Contains(gone, i) {
				last = i
			}
		}
		if last < 0 {
			return nil, false
		}
		n := q.list[last].size()
		gone, bytes = append(gone, last), bytes-n
		anchors[from.anchor] -= n
		parts[from] -= n
	}
	slices.SortFunc(gone, func(x, y int) int { return cmp.Compare(y, x) })
	return gone, true
}

// Keep implements [verify.WritableSource].
func (s *Store) Keep(img verify.Image, subject ocispec.Descriptor, ev verify.Evidence) {
	if ev.Document == nil || ev.Err != nil || len(ev.More) > 0 || len(ev.Document) > maxManifest {
		return
	}
	s.mu.Lock()
	known := s.known(subject, ev)
	s.mu.Unlock()
	if known {
		return
	}
	e := evidence{subject: subject, found: ev}
	if img.Manifest.Digest != subject.Digest {
		e.manifest = ocispec.Descriptor{MediaType: img.Manifest.MediaType, Digest: img.Manifest.Digest, Size: img.Manifest.Size}
	}
	chain := s.chain(ev.Blob)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.known(subject, ev) { // it came twice at the same time
		return
	}
	e.anchor = anchorOf(s.trusts, chain)
	s.waiting.add(e)
	s.ring()
}

// known reports whether the store has that evidence, or is about to. The caller holds the
// lock.
func (s *Store) known(subject ocispec.Descriptor, ev verify.Evidence) bool {
	if x := s.catalog.Blobs[ev.Manifest.Digest]; x != nil && x.Subject == subject.Digest && !x.Lost {
		return true
	}
	return s.waiting.has(ev.Manifest.Digest)
}
