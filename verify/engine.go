package verify

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// An Engine is the Judge that does the work: it asks sources for signatures and
// has each checked until one meets the rule. It does not change and is safe for
// concurrent use. All fields but Store are required.
type Engine struct {
	Store   Keeper              // asked first, and given what the others found; may be nil
	Sources func(Name) []Source // where signatures of an image of that name may be, in the order to ask
	Checker Checker
	Limits  Limits // for each source; zero fields mean DefaultLimits
	Now     func() time.Time
}

var _ Judge = (*Engine)(nil)

// Judge implements [Judge]. It works until ctx ends or the limits are reached.
func (e *Engine) Judge(ctx context.Context, q Question) (d Decision) {
	defer func() {
		if p := recover(); p != nil {
			d = Deny(Internal, fmt.Sprintf("panic while verifying: %v", p))
		}
		if q.Rule != nil {
			d.Rule = q.Rule.Name
		}
		d.Key, d.Binding = q.Key(), q.Image.Binding
	}()
	if f := q.Unfit(); f != nil {
		return Deny(f.Reason, f.Detail)
	}
	var seen []Finding
	var tried []Attempt
	sources := e.Sources(q.Image.Name)
	if e.Store != nil {
		sources = append([]Source{e.Store}, sources...)
		q.Image.links = e.links(ctx, q.Image)
	}
	for i, src := range sources {
		a, found, won := e.ask(ctx, src, q, nil)
		stored := e.Store != nil && i == 0
		if stored && a.Seen == 0 && a.Reason == SignatureMissing && len(sources) > 1 {
			continue // that nothing was kept yet is no news
		}
		seen, tried = append(seen, found...), append(tried, a)
		if won != nil {
			d := allow(q, found[len(found)-1], e.Now())
			d.Source, d.Tried = clip(cmp.Or(won.evidence.From, a.Source)), tried
			if d.allowed && e.Store != nil && !stored {
				e.keep(q.Image, won)
			}
			return d
		}
	}
	return refuse(seen, tried, e.Now())
}

// Refresh asks every source but the store for all signatures of the image, and gives
// the store those that meet the rule: new ones join the old, so that keys can be
// exchanged. It returns how many it gave and what each source said. It decides nothing.
func (e *Engine) Refresh(ctx context.Context, q Question) (given int, tried []Attempt) {
	defer func() { _ = recover() }() // ask has its own: this is for Sources
	if e.Store == nil || q.Unfit() != nil {
		return 0, nil
	}
	q.Image.links = e.links(ctx, q.Image)
	for _, src := range e.Sources(q.Image.Name) {
		a, _, _ := e.ask(ctx, src, q, func(p *proof) {
			e.keep(q.Image, p)
			given++
		})
		tried = append(tried, a)
	}
	return given, tried
}

// maxLinks bounds how many documents of the store are asked for signatures of. There
// are more only where an image was built again and again with one part unchanged.
const maxLinks = 6

// links returns the documents in the store that lead to what runs: indexes that list
// the manifest, manifests with the same config, and indexes that list those. The
// image may run by its manifest alone, or from an archive, of which the runtime has
// made a manifest that nobody signed. None where only what was resolved counts.
func (e *Engine) links(ctx context.Context, img Image) (list []ocispec.Descriptor) {
	defer func() { _ = recover() }() // one source less
	if !img.Vouched {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, e.Limits.Or(DefaultLimits).Wall)
	defer cancel()
	b := NewBudget(e.Limits)
	climb := func(child ocispec.Descriptor, most int) { // so that each step leaves some to the next
		e.Store.Parents(ctx, child.Digest, b, func(d digest.Digest, raw []byte) bool {
			p, ok := naming(d, raw, child)
			if ok && !slices.ContainsFunc(list, func(x ocispec.Descriptor) bool { return x.Digest == d }) {
				list = append(list, p)
			}
			return len(list) < most
		})
	}
	climb(img.Manifest, maxLinks-4)
	climb(ocispec.Descriptor{Digest: img.Config}, maxLinks-2)
	for _, d := range list[:len(list):len(list)] {
		climb(d, maxLinks)
	}
	return list
}

// keep hands over what met the rule. Whatever becomes of it, the answer stands.
func (e *Engine) keep(img Image, p *proof) {
	defer func() { _ = recover() }()
	e.Store.Keep(img, p.subject, p.evidence)
}

// A proof is evidence that met the rule, and what it is a signature of.
type proof struct {
	subject  ocispec.Descriptor
	evidence Evidence
}

// ask asks one source for signatures of each subject and checks what it hands
// over. Where won is not nil the last finding meets the rule; with all, which is given
// each proof, the source is asked to the end. A panic costs only that source.
func (e *Engine) ask(ctx context.Context, src Source, q Question, all func(*proof)) (a Attempt, found []Finding, won *proof) {
	defer func() {
		if p := recover(); p != nil {
			a.Reason, a.Detail, won = Internal, clip(fmt.Sprintf("panic while asking a source: %v", p)), nil
		}
	}()
	limits := e.Limits.Or(DefaultLimits)
	ctx, cancel := context.WithTimeout(ctx, limits.Wall)
	defer cancel()
	budget := NewBudget(limits)
	budget.Ahead = q.Image.Use == UseAhead
	a = Attempt{Source: clip(src.Name()), Reason: SignatureMissing}
	for _, subject := range q.Image.subjects() {
		if subject.Digest == "" {
			continue
		}
		err := src.Find(ctx, q.Image.Name, subject, budget, func(ev Evidence) bool {
			if won != nil {
				return false // the source was told to stop
			}
			f := e.check(ctx, ev, subject, q.Rule.Statement)
			if f.Reason == Verified && all != nil {
				all(&proof{subject, ev})
			} else if f.Reason == Verified {
				won = &proof{subject, ev}
			}
			found = append(found, f)
			return won == nil
		})
		a.Seen = len(found)
		if won != nil {
			a.Reason = Verified
			return a, found, won
		}
		if err == nil {
			err = ctx.Err() // who was cut short has not answered, whatever it says
		}
		if err != nil {
			if r := reasonOf(err); r.rank() < a.Reason.rank() {
				a.Reason, a.Detail = r, clip(err.Error())
			}
			// What went wrong with one subject says nothing of the next: a mirror with
			// referrers tags has none for an index of which only the manifest is signed,
			// and a broken referrer of the index must not hide those of the manifest.
			if ctx.Err() != nil {
				return a, found, nil
			}
		}
	}
	// A source that served signatures of one subject by tag can serve them: that it
	// has no tag for another means that there are none.
	if len(found) > 0 && (a.Reason == SignatureMissing || a.Reason == SourceNoReferrers) {
		f := slices.MinFunc(found, func(x, y Finding) int { return x.Reason.rank() - y.Reason.rank() })
		a.Reason, a.Detail = f.Reason, f.Detail
	}
	return a, found, nil
}

// check has one piece of evidence checked; a panic in a parser costs only that
// piece. A yes about something else is none, and text is cut, since Decisions are
// kept and much of it is an attacker's.
func (e *Engine) check(ctx context.Context, ev Evidence, subject ocispec.Descriptor, statement string) (f Finding) {
	defer func() {
		if p := recover(); p != nil {
			f = Finding{Reason: SignatureInvalid, Detail: clip(fmt.Sprintf("panic while checking a signature: %v", p))}
		}
	}()
	if ev.Err != nil {
		return Finding{Reason: SignatureInvalid, Detail: clip(ev.Err.Error())}
	}
	f = e.Checker.Check(ctx, ev, subject, statement)
	if f.Reason != Verified {
		f.Reason = f.Reason.denial()
	} else if f.Signed != subject.Digest {
		f.Reason, f.Detail = Internal, "the checker accepted a signature of something else"
	}
	f.Signer = Signer{clip(f.Signer.Subject), clip(f.Signer.Thumbprint), clip(f.Signer.Anchor)}
	f.Metadata = whole(f.Metadata)
	f.Warnings = f.Warnings[:min(len(f.Warnings), MaxOthers)]
	f.Detail = clip(f.Detail)
	return f
}

// Bounds of signed metadata, as OCI registries have them for annotations in
// practice: what is longer is left out whole, since half a value is another value.
const (
	maxMetadata      = 32
	maxMetadataKey   = 128
	maxMetadataValue = 512
)

// whole returns what of m is within bounds, in the order of the keys.
func whole(m map[string]string) map[string]string {
	kept := map[string]string{}
	for _, k := range slices.Sorted(maps.Keys(m)) {
		if v := m[k]; len(k) <= maxMetadataKey && len(v) <= maxMetadataValue && len(kept) < maxMetadata {
			kept[strings.Clone(k)] = strings.Clone(v)
		}
	}
	if len(kept) == 0 {
		return nil
	}
	return kept
}

// clip bounds a text that ends up in a Decision.
func clip(s string) string { return Clean(s, MaxMessage) }

// refuse makes the denial that says most: a source that was not conclusively
// asked, else the envelope that came furthest, else that there is no signature.
func refuse(seen []Finding, tried []Attempt, now time.Time) Decision {
	d := Deny(SignatureMissing, "no Notary Project signature found")
	if len(tried) == 0 {
		d = Deny(SourceUnreachable, "no source of signatures is configured for this image")
	}
	for _, a := range tried {
		if a.Reason.rank() < d.Reason.rank() {
			d.Reason, d.Detail, d.Source = a.Reason, a.Detail, a.Source
		}
	}
	if d.Reason == SignatureMissing {
		for i, a := range tried {
			d.Detail += [...]string{" at ", ", "}[min(i, 1)] + a.Source
		}
	} else if d.Source != "" {
		d.Detail = d.Source + ": " + d.Detail
	}
	for _, f := range seen {
		if f.Signer != (Signer{}) && len(d.Signers) < MaxOthers && !slices.Contains(d.Signers, f.Signer) {
			d.Signers = append(d.Signers, f.Signer)
		}
	}
	d.Tried, d.Made = tried, now
	return d
}
