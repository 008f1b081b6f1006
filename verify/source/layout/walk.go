package layout

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
)

// A walk looks for the signatures of one subject in one layout.
type walk struct {
	*layout
	subject ocispec.Descriptor
	yield   func(verify.Evidence) bool
	seen    map[verify.Target]bool // descriptors that were looked at; not digests, since an entry may lie about the size
	done    bool                   // yield wants no more, or may not have more
	failed  error                  // the first that left open whether there is a signature
}

// run walks from the entries of index.json. Referrers tags of the subject come
// first: they lead straight to its signatures in a layout of any size.
func (w *walk) run(ctx context.Context, entries []ocispec.Descriptor) {
	tag := referrersTag(w.subject.Digest)
	for _, e := range entries {
		if w.over(ctx) {
			return
		}
		if e.MediaType == ocispec.MediaTypeImageIndex && e.Annotations[ocispec.AnnotationRefName] == tag && w.fresh(e) {
			w.referrers(ctx, e)
		}
	}
	w.scan(ctx, entries, 0)
}

// scan looks at the manifests among entries, then at the indexes among them. The
// bytes of an index count against the budget, but not as a page of referrers: a
// bundle of a thousand images has a thousand indexes.
func (w *walk) scan(ctx context.Context, entries []ocispec.Descriptor, depth int) {
	for _, e := range entries {
		if w.over(ctx) {
			return
		}
		if e.MediaType == ocispec.MediaTypeImageManifest {
			w.candidate(e)
		}
	}
	for _, e := range entries {
		if w.over(ctx) {
			return
		}
		if e.MediaType != ocispec.MediaTypeImageIndex || !w.fresh(e) {
			continue
		}
		if depth == maxDepth {
			w.fail(fmt.Errorf("%w: indexes more than %d deep", verify.ErrBudget, maxDepth))
		} else {
			w.scan(ctx, w.index(e), depth+1)
		}
	}
}

// over reports whether the walk ends here.
func (w *walk) over(ctx context.Context) bool {
	if err := ctx.Err(); err != nil {
		w.fail(fmt.Errorf("%w: %w", verify.ErrUnreachable, err))
		return true
	}
	return w.done
}

// fail remembers err if it left open whether there is a signature.
func (w *walk) fail(err error) {
	if w.failed == nil && Inconclusive(err) {
		w.failed = err
	}
}

// fresh reports whether d was not looked at before.
func (w *walk) fresh(d ocispec.Descriptor) bool {
	t := verify.Target{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}
	if w.seen[t] {
		return false
	}
	w.seen[t] = true
	return true
}

// referrersTag is the tag of the index of d's referrers, as distribution-spec
// v1.1 cuts it ("Referrers Tag Schema").
func referrersTag(d digest.Digest) string {
	alg, ref := d.Algorithm().String(), d.Encoded()
	return alg[:min(len(alg), 32)] + "-" + ref[:min(len(ref), 64)]
}

// referrers reads the index that a referrers tag of the subject points to.
func (w *walk) referrers(ctx context.Context, index ocispec.Descriptor) {
	if err := w.b.Page(); err != nil {
		w.fail(err)
		return
	}
	for _, e := range w.index(index) {
		if w.over(ctx) {
			return
		}
		if e.ArtifactType != "" && e.ArtifactType != verify.ArtifactTypeNotation {
			continue
		}
		if err := w.b.Referrer(); err != nil {
			w.fail(err)
			return
		}
		if e.ArtifactType == "" {
			w.candidate(e)
		} else if w.fresh(e) {
			raw, err := w.dir.Blob(e, w.b.Manifest)
			w.signature(e, raw, err)
		}
	}
}

// index returns the entries of the index d, none if it cannot be read.
func (w *walk) index(d ocispec.Descriptor) []ocispec.Descriptor {
	raw, err := w.dir.Blob(d, w.b.Manifest)
	if err != nil {
		w.fail(err)
		return nil
	}
	entries, err := EntriesOf(raw)
	if err != nil {
		w.fail(err)
	}
	return entries
}

// candidate looks whether the manifest d, which nobody says to be a signature of
// the subject, is one.
func (w *walk) candidate(d ocispec.Descriptor) {
	if d.ArtifactType != "" && d.ArtifactType != verify.ArtifactTypeNotation || !w.fresh(d) {
		return
	}
	raw, err := w.dir.Blob(d, w.b.Manifest)
	if err != nil {
		w.fail(err)
		return
	}
	var m struct {
		ArtifactType string `json:"artifactType"`
		Config       struct {
			MediaType string `json:"mediaType"`
		} `json:"config"`
		Subject struct {
			Digest digest.Digest `json:"digest"`
		} `json:"subject"`
	}
	if json.Unmarshal(raw, &m) != nil || m.Subject.Digest != w.subject.Digest {
		return
	}
	if m.ArtifactType == verify.ArtifactTypeNotation || m.ArtifactType == "" && m.Config.MediaType == verify.ArtifactTypeNotation {
		w.signature(d, raw, nil)
	}
}

// signature hands over the signature whose manifest is raw, or why it could not
// be read.
func (w *walk) signature(d ocispec.Descriptor, raw []byte, err error) {
	if err := w.b.Signature(); err != nil {
		w.fail(err)
		w.done = true
		return
	}
	ev := verify.Evidence{Manifest: ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}}
	if err == nil && d.MediaType != ocispec.MediaTypeImageManifest {
		err = fmt.Errorf("media type %s is not that of a manifest", verify.Quote(d.MediaType, 80))
	}
	if err == nil {
		err = w.dir.Signature(&ev, raw, w.subject, w.b)
	}
	if err != nil {
		w.fail(err)
		ev.Err = fmt.Errorf("signature %s: %w", d.Digest, err)
	}
	if !w.yield(ev) {
		w.done, w.failed = true, nil
	}
}
