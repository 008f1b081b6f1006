package store

import (
	"cmp"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/tidewaiter/tidewaiter/verify/oci"
	"github.com/tidewaiter/tidewaiter/verify/source/catalog"
)

// The room of the store is shared among trust anchors. Evidence is charged to the
// certificate that the configuration trusts and that its chain leads to: nobody who
// signs can have more of these. If there is no room for new evidence, other evidence
// gives way if its image has left the node, or if its anchor has more of the room than
// that of the new evidence would have with it. So an anchor loses nothing while others
// have more than it has, and no two push each other out in turn.
//
// A signature that is damaged counts like any other. It is what keeps its image from
// being taken for one that was never signed, and it becomes whole again when a mirror
// has it. It goes first among the signatures of one anchor over one subject, and for new
// evidence of its own anchor.

// A share is a part of the room.
type share struct {
	bytes int64
	files int
	links int // what indexes list and manifests name
}

func (s *share) add(o share) {
	s.bytes, s.files, s.links = s.bytes+o.bytes, s.files+o.files, s.links+o.links
}

func (s *share) subtract(o share) {
	s.bytes, s.files, s.links = s.bytes-o.bytes, s.files-o.files, s.links-o.links
}

// portion is s in millionths of the bytes, the files or the links, whichever is most.
func (w *writer) portion(s share) int64 {
	return max(s.bytes*1_000_000/max(w.o.Size, 1), int64(s.files)*1_000_000/int64(max(w.limit(), 1)), int64(s.links)*1_000_000/maxListed)
}

// anchorOf is the anchor that a chain is charged to: the first certificate that the
// configuration trusts, else the last, which was trusted once.
func anchorOf(trusts map[string]string, c catalog.Chain) string {
	for _, h := range c {
		if _, ok := trusts[h.Value()]; ok {
			return h.Value()
		}
	}
	if len(c) == 0 {
		return ""
	}
	return c[len(c)-1].Value()
}

// key is the anchor that a chain is charged to.
func (w *writer) key(c catalog.Chain) string {
	w.mu.Lock()
	trusts := w.trusts
	w.mu.Unlock()
	return anchorOf(trusts, c)
}

// keyOf is the anchor that a signature is charged to. What its manifest claims is not
// asked: a signer could make up any number of anchors there.
func (w *writer) keyOf(b *catalog.Blob) string {
	if e := w.catalog.Blobs[b.Envelope]; e != nil {
		return w.key(e.Chain)
	}
	return ""
}

// A ledger has the shares of all anchors. It is made once for all that goes to make room
// for one signature, and kept up to date meanwhile.
type ledger struct {
	*writer
	trusts   map[string]string
	subjects map[digest.Digest]map[string]share // by subject and anchor
	anchors  map[string]share                   // sums of these
	departed []*catalog.Blob                    // signatures whose image has left, the oldest first
}

// ledger counts what the store has.
func (w *writer) ledger() *ledger {
	w.mu.Lock()
	l := &ledger{writer: w, trusts: w.trusts, subjects: map[digest.Digest]map[string]share{}, anchors: map[string]share{}}
	w.mu.Unlock()
	now := w.o.Now()
	for subject, list := range w.catalog.Signed {
		l.count(subject)
		for _, b := range list {
			if w.departed(b, now) {
				l.departed = append(l.departed, b)
			}
		}
	}
	slices.SortFunc(l.departed, older)
	return l
}

// older orders signatures by the time at which their images were last known to be here.
func older(x, y *catalog.Blob) int {
	return cmp.Or(x.Seen.Compare(y.Seen), cmp.Compare(x.Digest, y.Digest))
}

// sooner reports whether x goes before y of the same anchor and subject.
func sooner(x, y *catalog.Blob) bool {
	if x.Lost != y.Lost {
		return x.Lost
	}
	return older(x, y) < 0
}

// keyOf is that of the writer, with the anchors that were trusted when the ledger was
// made.
func (l *ledger) keyOf(b *catalog.Blob) string {
	if e := l.catalog.Blobs[b.Envelope]; e != nil {
		return anchorOf(l.trusts, e.Chain)
	}
	return ""
}

// count counts one subject anew.
func (l *ledger) count(subject digest.Digest) {
	for k, its := range l.subjects[subject] {
		a := l.anchors[k]
		a.subtract(its)
		if l.anchors[k] = a; a == (share{}) {
			delete(l.anchors, k)
		}
	}
	delete(l.subjects, subject)
	list := l.catalog.Signed[subject]
	if len(list) == 0 {
		return
	}
	documents := l.sizes(subject)
	if b := l.catalog.Blobs[subject]; b != nil && oci.IsIndex(b.MediaType) {
		for _, name := range b.Names {
			documents.add(l.sizes(name))
		}
	}
	each := map[string]share{}
	for _, b := range list {
		k := l.keyOf(b)
		its, charged := each[k]
		if !charged {
			its = documents
		}
		its.add(l.sizes(b.Digest))
		its.add(l.sizes(b.Envelope))
		each[k] = its
	}
	for k, its := range each {
		a := l.anchors[k]
		a.add(its)
		l.anchors[k] = a
	}
	l.subjects[subject] = each
}

// sizes is the share that one file has.
func (w *writer) sizes(d digest.Digest) share {
	if b := w.catalog.Blobs[d]; b != nil {
		return share{b.Size, 1, len(b.Names)}
	}
	return share{}
}

// largest is the anchor that has most.
func (l *ledger) largest() (anchor string) {
	most, first := int64(0), true
	for k, a := range l.anchors {
		if x := l.portion(a); first || x > most || x == most && k < anchor {
			anchor, most, first = k, x, false
		}
	}
	return anchor
}

// subject is the subject that has most of an anchor's share.
func (l *ledger) subject(anchor string) (subject digest.Digest) {
	most, first := int64(0), true
	for d, each := range l.subjects {
		its, charged := each[anchor]
		if x := l.portion(its); charged && (first || x > most || x == most && d < subject) {
			subject, most, first = d, x, false
		}
	}
	return subject
}

// victim is the signature that goes next to make room for need of the anchor key, and
// whether its image is on the node, or may be.
func (l *ledger) victim(key string, need share) (victim *catalog.Blob, living bool) {
	with := l.anchors[key]
	with.add(need)
	yields := func(k string) bool { return k == key || l.portion(l.anchors[k]) > l.portion(with) }
	l.departed = slices.DeleteFunc(l.departed, func(b *catalog.Blob) bool { return l.catalog.Blobs[b.Digest] != b })
	for _, b := range l.departed {
		if yields(l.keyOf(b)) {
			return b, false
		}
	}
	k := l.largest()
	if k == key {
		for _, list := range l.catalog.Signed {
			for _, b := range list {
				if b.Lost && l.keyOf(b) == k && (victim == nil || older(b, victim) < 0) {
					victim = b
				}
			}
		}
		return victim, false
	}
	if !yields(k) {
		return nil, false
	}
	for _, b := range l.catalog.Signed[l.subject(k)] {
		if l.keyOf(b) == k && (victim == nil || sooner(b, victim)) {
			victim = b
		}
	}
	return victim, true
}
