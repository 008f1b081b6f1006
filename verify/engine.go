package verify

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify/evidence"
	"github.com/tidewaiter/tidewaiter/verify/oci"
	"github.com/tidewaiter/tidewaiter/verify/requirement"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// An Engine is the Evaluator that does the work: it asks sources for evidence of each kind
// that the requirement names, has each piece checked for every leaf of its kind, and stops
// once the tree is met. What it saw is the trace, of which allow gets the findings and
// looks at the whole tree again. It never stops because the tree could not be met any more,
// while a source is left: only evidence for an image counts, and that may come last. It
// does not change and is safe for concurrent use. Store and Closed are optional.
type Engine struct {
	Store    WritableSource      // asked first, and given what the others found; may be nil
	Closed   bool                // no source is meant to be asked but Store: what it lacks is missing
	Sources  func(Name) []Source // where evidence of an image of that name may be, in the order to ask
	Checkers []Checker           // one for each kind
	Limits   Limits              // for each source, kind, subject and leaf; zero fields mean DefaultLimits
	Now      func() time.Time
}

var _ Evaluator = (*Engine)(nil)

// A Step is one entry of a trace: what checking one piece of evidence for one leaf came to.
type Step struct {
	Source   string             // or the part of it that has the evidence
	Subject  ocispec.Descriptor // that it was found for
	Leaf     Leaf
	Evidence Evidence // the reader must not change it
	Finding  Finding

	spent bool // the evidence is in the store, or there was no room for it in the trace
}

// Evaluate implements [Evaluator], and gives the store what the answer rests on.
func (e *Engine) Evaluate(ctx context.Context, q Question) Decision {
	return e.run(ctx, q, nil, true)
}

// Trace is Evaluate, except that it hands each step to see and gives the store nothing.
func (e *Engine) Trace(ctx context.Context, q Question, see func(Step)) Decision {
	return e.run(ctx, q, see, false)
}

func (e *Engine) run(ctx context.Context, q Question, see func(Step), keep bool) (d Decision) {
	defer func() {
		if p := recover(); p != nil {
			d = Deny(Internal, fmt.Sprintf("panic while verifying: %v", p))
		}
		q.name(&d)
	}()
	if f := q.Validate(); f != nil {
		return Deny(f.Reason, f.Detail)
	}
	t := &trace{require: q.Rule.Require, see: see}
	t.add(q.found...)
	kinds, err := e.kinds(t.require)
	if err != nil {
		return Deny(PolicyInvalid, err.Error())
	}
	tried, sources := slices.Clip(q.Tried), e.Sources(q.Image.Name)
	var cut error // why the store may have more that leads to the image
	if e.Store != nil {
		sources = append([]Source{e.Store}, sources...)
		q.Image.links, cut = e.links(ctx, q)
	}
	for i, src := range sources {
		for _, k := range kinds {
			t.stored = e.Store != nil && i == 0
			a := e.ask(ctx, src, q, k, t, false)
			if t.stored && t.chosen == nil {
				a.blame(cut)
			}
			if t.stored && a.Seen == 0 && a.Reason == SignatureMissing && !(e.Closed && len(sources) == 1) {
				continue // a store that kept nothing yet was not asked whether there is a signature
			}
			tried = append(tried, a)
			if t.chosen == nil {
				continue
			}
			d := allow(q, slices.Concat(t.found[:]...), e.Now())
			d.Tried = tried
			for _, p := range t.chosen {
				if p.step == nil {
					continue
				}
				if d.Source = p.step.Source; d.allowed && keep && e.Store != nil && !p.step.spent {
					e.keep(q.Image, p.step)
				}
			}
			return d
		}
	}
	return t.refuse(tried, e.Now())
}

func (e *Engine) kinds(r *Requirement) (list []Checker, err error) {
	for _, l := range r.Leaves() {
		c, err := e.checker(l.Kind)
		if err != nil {
			return nil, err
		}
		if !slices.ContainsFunc(list, func(o Checker) bool { return o.Kind().Name() == l.Kind }) {
			list = append(list, c)
		}
	}
	return list, nil
}

func (e *Engine) checker(kind string) (Checker, error) {
	for _, c := range e.Checkers {
		if c.Kind().Name() == kind {
			return c, nil
		}
	}
	return nil, fmt.Errorf("the rule asks for evidence of kind %s, which is not known", text.Quote(kind, 64))
}

// Ask asks one source to the end, and hands each step to see. It decides and keeps nothing.
func (e *Engine) Ask(ctx context.Context, src Source, q Question, see func(Step)) (tried []Attempt) {
	if q.Validate() != nil {
		return nil
	}
	kinds, _ := e.kinds(q.Rule.Require)
	if e.Store != nil {
		q.Image.links, _ = e.links(ctx, q)
	}
	for _, k := range kinds {
		tried = append(tried, e.ask(ctx, src, q, k, &trace{require: q.Rule.Require, see: see}, true))
	}
	return tried
}

// maxLinks bounds how many documents of the store are asked for signatures of.
const maxLinks = 8

// links returns the documents in the store that lead to what runs: indexes that list
// the manifest, manifests with the same config, and indexes that list those. The
// image may run by its manifest alone, or from an archive, of which the runtime has
// made a manifest that nobody signed. The error says why there may be more.
func (e *Engine) links(ctx context.Context, q Question) (list []ocispec.Descriptor, err error) {
	defer func() { _ = recover() }()
	if !q.Image.LayersVerified {
		return nil, nil // only what was resolved counts
	}
	ctx, cancel := context.WithTimeout(ctx, e.Limits.Or(DefaultLimits).Wall)
	defer cancel()
	b := e.budget(q, e.Checkers[0], q.Rule.Require.Leaves()...)
	err = ErrUnreachable // until the end: the store may panic
	var cut error
	climb := func(child ocispec.Descriptor, most int) { // so that each step leaves some to the next
		more := e.Store.Parents(ctx, child.Digest, b, func(d digest.Digest, raw []byte) bool {
			if p, ok := oci.Parent(d, raw, child); ok && !slices.ContainsFunc(list, func(x ocispec.Descriptor) bool { return x.Digest == d }) {
				list = append(list, p)
			}
			return len(list) <= most
		})
		if len(list) > most {
			list, more = list[:most], fmt.Errorf("%w: more documents lead to the image than are looked at", ErrBudget)
		}
		cut = cmp.Or(cut, more)
	}
	climb(q.Image.Manifest, maxLinks-4)
	climb(ocispec.Descriptor{Digest: q.Image.Config}, maxLinks-2)
	for _, d := range list[:len(list):len(list)] {
		climb(d, maxLinks)
	}
	return list, cut
}

func (e *Engine) budget(q Question, k Checker, leaves ...Leaf) *Budget {
	b := NewBudget(k.Kind(), e.Limits)
	b.Prefetch = q.Image.Use == UsePrefetch
	for _, l := range leaves {
		if c, err := e.checker(l.Kind); err == nil {
			b.Anchors = append(b.Anchors, c.Anchors(l.Authority)...)
		}
	}
	return b
}

// keep hands over what met a leaf. Whatever becomes of it, the answer stands.
func (e *Engine) keep(img Image, s *Step) {
	defer func() { _ = recover() }()
	e.Store.Keep(img, s.Subject, s.Evidence)
}

const maxHeld = 2 << 20 // bytes of evidence that a trace holds for the store

// A proof is a finding for one leaf, with the step that it comes from.
type proof struct {
	leaf    int
	finding Finding
	step    *Step // nil in a Decision that is kept
}

// pick returns those of list that choose names, of their claims.
func pick(list []proof, choose func([]requirement.Claim) ([]int, bool)) (picked []proof, unsure bool) {
	places, unsure := choose(claims(list))
	for _, i := range places {
		picked = append(picked, list[i])
	}
	return picked, unsure
}

func claims(list []proof) []requirement.Claim {
	all := make([]requirement.Claim, len(list))
	for i, p := range list {
		f := p.finding
		all[i] = requirement.Claim{Leaf: p.leaf, Key: f.Key, Identity: string(f.Identity), Until: f.Until, Tie: string(f.Signed)}
	}
	return all
}

// A trace is what was found so far.
type trace struct {
	require *Requirement
	found   [requirement.MaxLeaves][]proof // of each leaf, those that count
	chosen  []proof                        // nil: the tree is not met
	unsure  bool
	signers []Signer // who was seen
	see     func(Step)
	stored  bool // the source is the store
	held    int
}

func (t *trace) lacks(leaf int) bool { return len(t.found[leaf]) == 0 }

// add takes findings that count in, and looks whether the tree is met now.
func (t *trace) add(list ...proof) {
	for _, p := range list {
		l := &t.found[p.leaf]
		if *l = append(slices.Clip(*l), p); len(*l) > 4*requirement.MaxLeaves*requirement.MaxLeaves {
			*l, _ = pick(*l, func(c []requirement.Claim) ([]int, bool) { return requirement.Thin(c), false })
		}
	}
	t.chosen, t.unsure = pick(slices.Concat(t.found[:]...), t.require.Choose)
}

// step notes a step.
func (t *trace) step(s Step) {
	if t.see != nil {
		t.see(s)
	}
	if g := s.Finding.Signer; g != (Signer{}) && len(t.signers) < MaxRelated && !slices.Contains(t.signers, g) {
		t.signers = append(t.signers, g)
	}
}

// ask asks one source for evidence of one kind about each subject, and has it checked for
// all leaves of the kind, until the tree is met, or with all to the end. A panic costs only
// what the source said.
//
// Each look for one subject has a budget of its own, in which what the first leaf trusts
// comes first. If it was cut, the leaves that still lack something have one look each, in
// which it is their turn: no one who is trusted for one leaf hides what another one needs.
func (e *Engine) ask(ctx context.Context, src Source, q Question, k Checker, t *trace, all bool) (a Attempt) {
	before := *t
	defer func() {
		if p := recover(); p != nil {
			*t = before
			a.Reason, a.Detail = Internal, clip(fmt.Sprintf("panic while asking a source: %v", p))
		}
	}()
	ctx, cancel := context.WithTimeout(ctx, e.Limits.Or(DefaultLimits).Wall)
	defer cancel()
	a = Attempt{Source: clip(src.Name()), Reason: SignatureMissing, kind: k.Kind().Name()}
	var leaves []int // of the kind
	near := map[int]Finding{}
	for i, l := range t.require.Leaves() {
		if l.Kind == a.kind {
			leaves = append(leaves, i)
		}
	}
	slices.SortStableFunc(leaves, func(x, y int) int { return cmp.Compare(len(t.found[x]), len(t.found[y])) })
	left := 4 * e.Limits.Or(DefaultLimits).TotalBytes // of all looks together
	var others oci.Others
	var mutable error
	if len(k.Kind().TagSuffixes()) > 0 {
		mutable = fmt.Errorf("%w: who may push can take away what lies at tags", ErrUnreachable)
	}
	listed := false // the referrers of some subject were
	for _, subject := range q.Image.subjects() {
		if subject.Digest == "" {
			continue
		}
		seen := map[digest.Digest]bool{}
		var err error
		for turn, leaf := range leaves {
			if turn > 0 && (!errors.Is(err, ErrBudget) || !t.lacks(leaf) || ctx.Err() != nil) {
				continue
			}
			b := e.budget(q, k, t.require.Leaves()[leaf])
			b.Cap(left)
			b.Others = others
			err = src.Find(ctx, q.Image.Name, subject, b, func(ev Evidence) bool {
				if t.chosen != nil && !all {
					return false // the source was told to stop
				}
				if d := ev.Manifest.Digest; d != "" && ev.Err == nil {
					if seen[d] {
						return true
					}
					seen[d] = true
				}
				a.Seen++
				for _, i := range leaves {
					s := &Step{Source: clip(cmp.Or(ev.From, a.Source)), Subject: subject, Leaf: t.require.Leaves()[i], Evidence: ev, spent: t.stored}
					s.Finding = e.check(ctx, k, ev, subject, s.Leaf.Authority)
					t.step(*s)
					if f := s.Finding; f.Reason != Verified {
						if n, ok := near[i]; !ok || f.Reason.rank() < n.Reason.rank() {
							near[i] = f
						}
						continue
					}
					if n := len(ev.Document) + len(ev.Blob); t.held+n > maxHeld || len(ev.More) > 0 {
						s.Evidence, s.spent = Evidence{}, true
					} else {
						t.held += n
					}
					t.add(proof{i, s.Finding, s})
				}
				return t.chosen == nil || all
			})
			left, others = left-b.Spent(), b.Others
			if t.chosen != nil && !all {
				a.Reason = Verified
				return a
			}
		}
		if err == nil {
			listed, err = true, cmp.Or(ctx.Err(), mutable) // who was cut short has not answered, whatever it says
		}
		// What went wrong with one subject says nothing of the next: there is no tag for
		// an index if only its manifest is signed, and a bad referrer hides no others.
		if a.blame(err); ctx.Err() != nil {
			return a
		}
	}
	// A source that lists one subject's by tag has no tag for another that has none.
	if (listed || a.Seen > 0) && a.Reason == SourceNoReferrers {
		a.Reason, a.Detail = SignatureMissing, ""
	}
	holder, ok := src.(Holder)
	switch none := a.Reason == SignatureMissing; {
	case none && a.Seen > 0:
		a.nearest(near, leaves, t)
		a.holds = ok
	case ok && (none || a.Reason == SourceNoReferrers):
		b := e.budget(q, k)
		b.Others = others
		err := holder.Holds(ctx, q.Image.Name, q.Image.Target, none, b)
		others = b.Others
		if a.holds, a.lacks = none && err == nil, errors.Is(err, ErrAbsent); a.lacks || none && err != nil {
			a.Reason, a.Detail = reasonOf(err), clip(err.Error())
		}
	}
	if have := others.String(); have != "" && (a.Reason == SignatureMissing || a.Reason == SourceNoReferrers) {
		a.Detail = clip(strings.TrimPrefix(a.Detail+"; "+have+", which no rule reads", "; "))
	}
	return a
}

// nearest is the finding that came furthest of those for leaves that lack something.
func (a *Attempt) nearest(near map[int]Finding, leaves []int, t *trace) {
	a.Reason = Verified
	for _, i := range leaves {
		if f, ok := near[i]; t.lacks(i) && ok && (a.Reason == Verified || f.Reason.rank() < a.Reason.rank()) {
			a.Reason, a.Detail = f.Reason, f.Detail
		} else if t.lacks(i) && !ok && a.Reason == Verified {
			a.Reason = SignatureMissing
		}
	}
}

// blame notes why a source has not answered, if nothing says more.
func (a *Attempt) blame(err error) {
	if r := reasonOf(err); err != nil && r.rank() < a.Reason.rank() {
		a.Reason, a.Detail = r, clip(err.Error())
	}
}

// Check has one piece of evidence checked for a leaf.
func (e *Engine) Check(ctx context.Context, ev Evidence, subject ocispec.Descriptor, l Leaf) Finding {
	k, err := e.checker(l.Kind)
	if err != nil {
		return Finding{Reason: PolicyInvalid, Detail: err.Error()}
	}
	return e.check(ctx, k, ev, subject, l.Authority)
}

// check has one piece of evidence checked; a panic in a parser costs only that. A yes
// about something else, or that has ended, is none, and an attacker's text is cut, since
// Decisions are kept.
func (e *Engine) check(ctx context.Context, k Checker, ev Evidence, subject ocispec.Descriptor, authority string) (f Finding) {
	defer func() {
		if p := recover(); p != nil {
			f = Finding{Reason: SignatureInvalid, Detail: clip(fmt.Sprintf("panic while checking a signature: %v", p))}
		}
	}()
	if ev.Err != nil {
		return Finding{Reason: SignatureInvalid, Detail: clip(ev.Err.Error())}
	}
	f = k.Check(ctx, ev, subject, authority)
	switch now := e.Now(); {
	case f.Reason != Verified:
		f.Reason = f.Reason.denial()
	case f.Signed != subject.Digest:
		f.Reason, f.Detail = Internal, "the checker accepted a signature of something else"
	case !f.Until.IsZero() && !now.Before(f.Until):
		f.Reason, f.Detail = SignatureExpired, "what the answer rests on ended at "+f.Until.UTC().Format(time.RFC3339)
	}
	f.Signer = Signer{clip(f.Signer.Subject), clip(f.Signer.Thumbprint), clip(f.Signer.Anchor)}
	if f.Identity != "" { // of two kinds none is the same, and none is cut: half of one is another
		sum := sha256.Sum256([]byte(k.Kind().Name() + "\x00" + string(f.Identity)))
		f.Identity = Identity(sum[:])
	}
	f.Metadata, f.Detail, f.Warnings = evidence.Metadata(f.Metadata), clip(f.Detail), f.Warnings[:min(len(f.Warnings), MaxRelated)]
	return f
}

func clip(s string) string { return text.Clean(s, MaxMessage) }

// refuse makes the denial that says most: a source that was not conclusively
// asked, else the envelope that came furthest, else that there is no signature. A source
// that was cut could have met each leaf of the kind, and none of another.
func (t *trace) refuse(tried []Attempt, now time.Time) Decision {
	var names []string
	open, some, lacking := map[string]bool{}, false, []string(nil)
	for i, l := range t.require.Leaves() {
		if !slices.Contains(names, l.Kind) {
			names = append(names, l.Kind)
		}
		some = some || !t.lacks(i)
		if t.lacks(i) {
			open[l.Kind], lacking = true, append(lacking, l.Authority)
		}
	}
	d := Deny(SignatureMissing, "no "+strings.Join(names, " or ")+" signature found")
	if len(tried) == 0 {
		d = Deny(SourceUnreachable, "no source of signatures is configured for this image")
	}
	told := slices.DeleteFunc(slices.Clone(tried), func(a Attempt) bool { // one that lacks what another has says nothing
		return a.Reason == Verified || a.kind != "" && len(open) > 0 && !open[a.kind] ||
			a.lacks && slices.ContainsFunc(tried, func(b Attempt) bool { return b.holds })
	})
	for _, a := range told {
		if a.Reason.rank() < d.Reason.rank() {
			d.Reason, d.Detail, d.Source = a.Reason, a.Detail, a.Source
		}
	}
	switch why := d.Reason.String(); {
	case t.unsure:
		d = Deny(LimitExceeded, "too many signers are trusted by several authorities of the rule to tell them apart")
	case some && !d.Reason.Inconclusive():
		d = Deny(ThresholdNotMet, "one signer counts once")
		if len(lacking) > 0 {
			d.Detail = "nothing that counts by " + strings.Join(lacking, ", ") + " [" + why + "]"
		}
	case d.Reason == SignatureMissing:
		for i, a := range told {
			d.Detail += [...]string{" at ", ", "}[min(i, 1)] + a.Source
		}
		if i := slices.IndexFunc(told, func(a Attempt) bool { return a.Detail != "" }); i >= 0 {
			d.Detail += "; at " + told[i].Source + " " + told[i].Detail
		}
	case d.Source != "":
		d.Detail = d.Source + ": " + d.Detail
	}
	d.Detail = clip(d.Detail)
	d.Signers, d.Tried, d.Made, d.proof = t.signers, tried, now, slices.Concat(t.found[:]...)
	for i := range d.proof {
		d.proof[i].step = nil
	}
	return d
}
