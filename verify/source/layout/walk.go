package layout

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence"
	"github.com/tidewaiter/tidewaiter/verify/oci"
	"github.com/tidewaiter/tidewaiter/verify/text"
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

// run walks over what the catalog knows. Referrers tags of the subject come first.
func (w *walk) run(ctx context.Context, look func(have int, first bool) (found, error)) {
	for have, first := 0, true; !w.over(ctx); first = false {
		f, err := look(have, first)
		if err != nil {
			w.fail(err)
			return
		}
		for _, d := range f.tags {
			if e := d.descriptor(); !w.over(ctx) && w.fresh(e) {
				w.referrers(ctx, e)
			}
		}
		for _, d := range f.signed {
			if w.over(ctx) {
				return
			}
			w.candidate(d.descriptor(), d.tagged)
		}
		if have = len(f.signed); f.complete {
			if !w.done && f.err != nil {
				w.fail(f.err)
			}
			return
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

// missing makes err, that a file is not there which the layout names, one of those that
// verify.Source speaks of: the layout was cut, or is still being written.
func missing(err error) error {
	return fmt.Errorf("%w: the layout names a file that it lacks: %w", verify.ErrUnreachable, err)
}

// spoilt is fail for a file that could not be read. One that is not there was cut off. One that is not what its digest says
// may have been anything; one of which an entry told another size costs that entry alone.
func (w *walk) spoilt(err error) {
	var damage *damage
	if errors.Is(err, fs.ErrNotExist) {
		err = missing(err)
	}
	if !errors.As(err, &damage) || w.failed != nil {
		w.fail(err)
		return
	}
	if !damage.sized || w.dir.broken(damage.digest, w.b.Manifest) {
		w.failed = fmt.Errorf("%w: %w", verify.ErrUnreachable, err)
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

// tagged returns what the evidence is of that lies at tag, which ends with one of suffixes;
// empty: at no such tag.
func tagged(tag string, suffixes []string) digest.Digest {
	for _, s := range suffixes {
		if name, ok := strings.CutSuffix(tag, s); ok && s != "" {
			alg, encoded, _ := strings.Cut(name, "-")
			if d := digest.NewDigestFromEncoded(digest.Algorithm(alg), encoded); d.Validate() == nil {
				return d
			}
		}
	}
	return ""
}

// isTag reports whether tag may be one that referrersTag returns.
func isTag(tag string) bool {
	alg, encoded, _ := strings.Cut(tag, "-")
	return (alg == digest.SHA256.String() || alg == digest.SHA384.String() || alg == digest.SHA512.String()) && len(encoded) == 64
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
		w.b.Others.Add(e)
		if !oci.MayBe(e.ArtifactType, w.b.Kind.ArtifactType()) {
			continue
		}
		if err := w.b.Referrer(); err != nil {
			w.fail(err)
			return
		}
		if e.ArtifactType != w.b.Kind.ArtifactType() {
			w.candidate(e, false)
		} else if w.fresh(e) {
			var raw []byte
			err := evidence.SignatureSize(e.Size)
			if err == nil {
				raw, err = w.dir.Blob(e, w.b.Manifest)
			}
			w.signature(e, raw, err)
		}
	}
}

// index returns the entries of the index d, none if it cannot be read.
func (w *walk) index(d ocispec.Descriptor) []ocispec.Descriptor {
	raw, err := w.dir.Blob(d, w.b.Manifest)
	if err != nil {
		w.spoilt(err)
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
func (w *walk) candidate(d ocispec.Descriptor, tagged bool) {
	if !oci.MayBe(d.ArtifactType, w.b.Kind.ArtifactType()) || !w.fresh(d) {
		return
	}
	if evidence.SignatureSize(d.Size) != nil {
		return // longer than any signature's
	}
	raw, err := w.dir.Blob(d, w.b.Manifest)
	if err != nil {
		w.spoilt(err)
		return
	}
	if tagged {
		w.signature(d, raw, nil)
		return
	}
	m, err := oci.ReadHead(raw)
	if err != nil || m.Subject == nil || m.Subject.Digest != w.subject.Digest {
		return
	}
	if evidence.Is(w.b.Kind, m) {
		w.signature(d, raw, nil)
	} else {
		w.b.Others.Add(ocispec.Descriptor{ArtifactType: m.ArtifactType, Digest: d.Digest})
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
		err = fmt.Errorf("media type %s is not that of a manifest", text.Quote(d.MediaType, 80))
	}
	if err == nil {
		err = w.dir.Signature(&ev, raw, w.subject, w.b)
	}
	if err != nil {
		w.spoilt(err)
		ev.Err = fmt.Errorf("signature %s: %w", d.Digest, err)
	}
	if !w.yield(ev) {
		w.done, w.failed = true, nil
	}
}
