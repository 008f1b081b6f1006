package verify

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// holds is a Source that holds evidence by subject. Its Blob says what the
// checker below makes of it.
type holds struct {
	name     string
	evidence map[digest.Digest][]string
	err      error                    // returned for the subject errAt, or for each where that is empty
	errAt    digest.Digest            //
	before   func(ocispec.Descriptor) // called first in Find
	asked    *[]string
	deaf     bool // goes on after yield returned false
}

func (h holds) Name() string { return h.name }

func (h holds) Find(ctx context.Context, in Name, subject ocispec.Descriptor, b *Budget, yield func(Evidence) bool) error {
	if h.asked != nil {
		*h.asked = append(*h.asked, fmt.Sprintf("%s %s %.12s", h.name, in.Repository(), subject.Digest.Encoded()))
	}
	if h.before != nil {
		h.before(subject)
	}
	for _, e := range h.evidence[subject.Digest] {
		ev := Evidence{Blob: []byte(e)}
		if e == "unreadable" {
			ev = Evidence{Err: errors.New("blob is cut short")}
		}
		if !yield(ev) && !h.deaf {
			return nil
		}
	}
	if h.errAt == "" || h.errAt == subject.Digest {
		return h.err
	}
	return nil
}

// checks is a Checker: "good" is a signature of what is asked about, any Reason
// is a finding of that reason, and some more below.
type checks struct {
	statement string
	anchors   func(string) []string
}

func (checks) Kind() Kind { return kind{} }

func (c checks) Anchors(authority string) []string {
	if c.anchors == nil {
		return nil
	}
	return c.anchors(authority)
}

func (c checks) Check(_ context.Context, ev Evidence, want ocispec.Descriptor, statement string) Finding {
	if c.statement != "" && statement != c.statement {
		panic("asked about statement " + statement)
	}
	s := string(ev.Blob)
	who := Signer{Subject: "CN=" + s}
	switch s {
	case "good":
		return Finding{Reason: Verified, Signed: want.Digest, Signer: who, Until: start.Add(time.Hour), Warnings: []Reason{RevocationUnknown}, Detail: "fine"}
	case "metadata":
		m := map[string]string{"env": "prod", strings.Repeat("k", 200): "v", "long": strings.Repeat("v", 600),
			strings.Repeat("l", 128): "at the bound", strings.Repeat("l", 128+1): "beyond", "at": strings.Repeat("v", 512)}
		for i := range 100 {
			m[fmt.Sprintf("m%03d", i)] = "x"
		}
		return Finding{Reason: Verified, Signed: want.Digest, Signer: who, Metadata: m}
	case "ended":
		return Finding{Reason: Verified, Signed: want.Digest, Signer: who, Until: start.Add(-time.Second)}
	case "lie":
		return Finding{Reason: Verified, Signed: of("something else"), Signer: who}
	case "lie about nothing":
		return Finding{Reason: Verified}
	case "panic":
		panic("a parser")
	case "zero":
		return Finding{}
	case "huge":
		long := strings.Repeat("x\n", 1<<19)
		return Finding{Reason: SignerUntrusted, Detail: long, Signer: Signer{long, long, long}, Warnings: make([]Reason, 1000)}
	case "huge and good":
		long := strings.Repeat("x\n", 1<<19)
		return Finding{Reason: Verified, Signed: want.Digest, Detail: long, Signer: Signer{long, long, long}, Warnings: slices.Repeat([]Reason{RevocationUnknown}, 1000)}
	}
	return Finding{Reason: Reason(s), Signer: who, Detail: "found " + s}
}

func engine(sources ...Source) *Engine {
	return &Engine{Sources: func(Name) []Source { return sources }, Checkers: []Checker{checks{}}, Now: now}
}

// on makes a source that holds evidence of the target.
func on(name string, evidence ...string) holds {
	return holds{name: name, evidence: map[digest.Digest][]string{of("index"): evidence}}
}

func failing(name string, err error, evidence ...string) holds {
	h := on(name, evidence...)
	h.err = err
	return h
}

var bg = context.Background()

// A place is a source that says where in it evidence was found.
type place struct {
	holds
	from string
}

func (p place) Find(ctx context.Context, in Name, subject ocispec.Descriptor, b *Budget, yield func(Evidence) bool) error {
	return p.holds.Find(ctx, in, subject, b, func(ev Evidence) bool {
		ev.From = p.from
		return yield(ev)
	})
}

// The part of a source that had the evidence is named in its place, clean and cut, and
// what was asked is what it was.
func TestJudgeNamesThePart(t *testing.T) {
	for from, want := range map[string]string{"": "a", "evidence archive site.tar": "evidence archive site.tar", "x\ny": "x y", strings.Repeat("x", 1<<20): strings.Repeat("x", MaxMessage-3) + "..."} {
		d := engine(place{on("a", "SIGNER_UNTRUSTED", "good"), from}).Evaluate(bg, bound())
		allowed(t, d, Verified)
		if d.Source != want || len(d.Tried) != 1 || d.Tried[0].Source != "a" {
			t.Errorf("source %.80q, tried %+v", d.Source, d.Tried)
		}
	}
}

func TestJudgeAllows(t *testing.T) {
	var asked []string
	a, b, c := on("a", "SIGNER_UNTRUSTED", "unreadable", "panic"), on("b", "good", "good"), on("c", "good")
	a.asked, b.asked, c.asked = &asked, &asked, &asked
	e := engine(a, b, c)
	e.Checkers = []Checker{checks{statement: "acme"}}
	q := bound()
	d := e.Evaluate(bg, q)
	allowed(t, d, Verified)
	want := Decision{
		allowed: true, Reason: Verified, Rule: "prod", Key: q.Key(), Binding: BoundRuntime,
		Signers: []Signer{{Subject: "CN=good"}}, Signed: of("index"), Source: "b",
		Tried: []Attempt{
			{Source: "a", Reason: SignerUntrusted, Seen: 3, Detail: "found SIGNER_UNTRUSTED", kind: "test"},
			{Source: "b", Reason: Verified, Seen: 1, kind: "test"},
		},
		Warnings: []Reason{RevocationUnknown}, Detail: "fine", Made: start, Until: start.Add(time.Hour),
	}
	if len(d.proof) != 1 || d.proof[0].finding.Reason != Verified || d.proof[0].step != nil {
		t.Errorf("the proof is %+v", d.proof)
	}
	if d.proof = nil; !reflect.DeepEqual(d, want) {
		t.Errorf("decision is\n%+v, want\n%+v", d, want)
	}
	short := func(s string) string { return of(s).Encoded()[:12] }
	wantAsked := []string{"a registry.local/app " + short("index"), "a registry.local/app " + short("manifest"), "b registry.local/app " + short("index")}
	if !slices.Equal(asked, wantAsked) {
		t.Errorf("asked %q, want %q", asked, wantAsked)
	}
}

func TestJudgeAsksAboutEverySubject(t *testing.T) {
	q := with(func(q *Question) { q.Image.Related = []ocispec.Descriptor{{}, desc("other")} })
	for _, s := range []string{"index", "manifest", "other"} {
		d := engine(holds{name: "a", evidence: map[digest.Digest][]string{of(s): {"good"}}}).Evaluate(bg, q)
		allowed(t, d, Verified)
		if d.Signed != of(s) {
			t.Errorf("signed is %v, want %s", d.Signed, s)
		}
	}
	// The empty descriptor is no subject: nothing is asked about it.
	denied(t, engine(holds{name: "a", evidence: map[digest.Digest][]string{"": {"good"}}}).Evaluate(bg, q), SignatureMissing)
	// What is not one of the image's is not asked about either.
	denied(t, engine(holds{name: "a", evidence: map[digest.Digest][]string{of("config"): {"good"}}}).Evaluate(bg, q), SignatureMissing)
}

func TestJudgeDenies(t *testing.T) {
	for _, tt := range []struct {
		name    string
		sources []Source
		want    Reason
		detail  string // all of it
		source  string
	}{
		{"no source", nil, SourceUnreachable, "no source of signatures is configured for this image", ""},
		{"nothing anywhere", []Source{on("a"), on("b"), on("c")}, SignatureMissing, "no test signature found at a, b, c", ""},
		{"one did not answer", []Source{on("a"), failing("b", ErrUnreachable), on("c")}, SourceUnreachable, "b: source did not answer", "b"},
		{"one refused", []Source{failing("a", ErrUnauthorized), on("b")}, SourceUnauthorized, "a: source refused the credentials", "a"},
		{"one cannot", []Source{failing("a", fmt.Errorf("http: %w", ErrNoReferrers))}, SourceNoReferrers, "a: http: source cannot serve referrers", "a"},
		{"one sent too much", []Source{failing("a", ErrBudget, "SIGNATURE_INVALID")}, LimitExceeded, "a: source sent more than the limits allow", "a"},
		{"some other error", []Source{failing("a", errors.New("disk"))}, SourceUnreachable, "a: disk", "a"},
		{"the first of two that did not answer", []Source{failing("a", ErrUnreachable), failing("b", ErrUnreachable)}, SourceUnreachable, "a: source did not answer", "a"},
		{"unreachable before unauthorized", []Source{failing("a", ErrUnauthorized), failing("b", ErrUnreachable)}, SourceUnreachable, "b: source did not answer", "b"},
		{"a source before an envelope", []Source{on("a", "REVOKED"), failing("b", ErrNoReferrers)}, SourceNoReferrers, "b: source cannot serve referrers", "b"},
		{"the envelope that came furthest", []Source{on("a", "SIGNATURE_INVALID", "IDENTITY_MISMATCH", "SIGNER_UNTRUSTED")}, IdentityMismatch, "a: found IDENTITY_MISMATCH", "a"},
		{"wherever it is", []Source{on("a", "SIGNATURE_INVALID"), on("b", "SIGNATURE_EXPIRED"), on("c")}, SignatureExpired, "b: found SIGNATURE_EXPIRED", "b"},
		{"revoked first", []Source{on("a", "CERTIFICATE_EXPIRED", "REVOKED")}, Revoked, "a: found REVOKED", "a"},
		{"unreadable", []Source{on("a", "unreadable")}, SignatureInvalid, "a: blob is cut short", "a"},
		{"a parser panics", []Source{on("a", "panic")}, SignatureInvalid, "a: panic while checking a signature: a parser", "a"},
		{"zero finding", []Source{on("a", "zero", "SIGNER_UNTRUSTED")}, Internal, "a", "a"},
		{"a checker lies", []Source{on("a", "lie")}, Internal, "a: the checker accepted a signature of something else", "a"},
		{"a checker lies about nothing", []Source{on("a", "lie about nothing")}, Internal, "a: the checker accepted a signature of something else", "a"},
		{"a checker says what only audit may", []Source{on("a", "AUDIT_ONLY")}, Internal, "a: found AUDIT_ONLY", "a"},
		{"a reason nobody knows", []Source{on("a", "NEW", "REVOKED")}, "NEW", "a: found NEW", "a"},
		{"ended", []Source{on("a", "ended")}, SignatureExpired, "a: what the answer rests on ended at 2026-03-01T11:59:59Z", "a"},
		{"nil source", []Source{nil}, Internal, "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			q := bound()
			d := engine(tt.sources...).Evaluate(bg, q)
			denied(t, d, tt.want)
			if tt.detail == "a" {
				tt.detail = "a: "
			}
			if tt.detail != "" && d.Detail != tt.detail || d.Source != tt.source {
				t.Errorf("detail is %q from %q, want %q from %q", d.Detail, d.Source, tt.detail, tt.source)
			}
			if len(d.Tried) != len(tt.sources) || d.Rule != "prod" || d.Key != q.Key() || d.Binding != BoundRuntime || !d.Made.Equal(start) && tt.name != "ended" {
				t.Errorf("decision is %+v", d)
			}
		})
	}
}

// TestBadHidesNoGood: whatever else a source holds or other sources do, what
// meets the rule is found.
func TestBadHidesNoGood(t *testing.T) {
	bad := []string{"SIGNATURE_INVALID", "REVOKED", "unreadable", "panic", "zero", "lie", "AUDIT_ONLY", "huge", "VERIFIED"}
	breaks := on("breaks")
	breaks.before = func(ocispec.Descriptor) { panic("a client") }
	for name, sources := range map[string][]Source{
		"in the same source":       {on("a", append(bad, "good")...)},
		"in another":               {on("a", bad...), on("b", "good")},
		"after an error":           {failing("a", ErrBudget, bad...), on("b", "good")},
		"with an error after it":   {failing("a", ErrUnreachable, "good")},
		"after a panic":            {breaks, on("b", "good")},
		"after nil":                {nil, on("b", "good")},
		"the source does not stop": {holds{name: "a", deaf: true, evidence: map[digest.Digest][]string{of("index"): append([]string{"good"}, bad...)}}},
		"of another subject":       {holds{name: "a", evidence: map[digest.Digest][]string{of("index"): bad, of("manifest"): {"good"}}}},
	} {
		t.Run(name, func(t *testing.T) { allowed(t, engine(sources...).Evaluate(bg, bound()), Verified) })
	}
}

func TestPanicsBecomeDenials(t *testing.T) {
	breaks := on("a")
	breaks.before = func(ocispec.Descriptor) { panic(strings.Repeat("x\n", 1<<20)) }
	d := engine(breaks, on("b")).Evaluate(bg, bound())
	denied(t, d, Internal)
	if d.Source != "a" || !strings.HasPrefix(d.Detail, "a: panic while asking a source: x x ") || len(d.Tried) != 2 {
		t.Errorf("decision is %+v", d)
	}
	// A source that panics after it handed over something good is not trusted with it.
	late := failing("a", nil, "good")
	late.deaf = true
	e := engine(panicsAfter{late})
	denied(t, e.Evaluate(bg, bound()), Internal)

	e = engine(on("a", "good"))
	e.Now = nil
	denied(t, e.Evaluate(bg, bound()), Internal)
	e = engine(on("a", "good"))
	e.Sources = func(Name) []Source { panic("sources") }
	d = e.Evaluate(bg, bound())
	denied(t, d, Internal)
	if d.Detail != "panic while verifying: sources" || d.Rule != "prod" || d.Key != bound().Key() {
		t.Errorf("decision is %+v", d)
	}
	e = engine(on("a", "good"))
	e.Checkers = nil
	denied(t, e.Evaluate(bg, bound()), PolicyInvalid)
}

type panicsAfter struct{ holds }

func (p panicsAfter) Find(ctx context.Context, in Name, subject ocispec.Descriptor, b *Budget, yield func(Evidence) bool) error {
	_ = p.holds.Find(ctx, in, subject, b, yield)
	panic("late")
}

func TestJudgeRefusesUnfit(t *testing.T) {
	for _, tt := range weakened {
		t.Run(tt.name, func(t *testing.T) {
			var asked []string
			q := with(tt.weaken)
			s := holds{name: "a", asked: &asked, evidence: map[digest.Digest][]string{
				of("index"): {"good"}, of("manifest"): {"good"}, "": {"good"},
			}}
			denied(t, engine(s).Evaluate(bg, q), tt.want)
			if len(asked) > 0 {
				t.Errorf("a source was asked: %q", asked)
			}
		})
	}
}

// TestCutShortIsNoAnswer: a source that returns nil because time is over has not
// said that there is no signature.
func TestCutShortIsNoAnswer(t *testing.T) {
	ctx, cancel := context.WithCancel(bg)
	s := on("a")
	s.before = func(ocispec.Descriptor) { cancel() }
	var asked []string
	s.asked = &asked
	denied(t, engine(s).Evaluate(ctx, bound()), SourceUnreachable)
	if len(asked) != 1 {
		t.Errorf("asked %q when time was over", asked)
	}

	e := engine(waits{})
	e.Limits.Wall = time.Nanosecond
	d := e.Evaluate(bg, bound())
	denied(t, d, SourceUnreachable)
	if !strings.Contains(d.Detail, context.DeadlineExceeded.Error()) {
		t.Errorf("detail is %q", d.Detail)
	}
}

// waits is a Source that answers nil once its time is over.
type waits struct{}

func (waits) Name() string { return "waits" }
func (waits) Find(ctx context.Context, _ Name, _ ocispec.Descriptor, _ *Budget, _ func(Evidence) bool) error {
	<-ctx.Done()
	return nil
}

// TestBudgetIsPerSubject: each look at a source for one subject gets the limits.
func TestBudgetIsPerSubject(t *testing.T) {
	s := counts{seen: &[]int{}}
	e := engine(s, s)
	e.Limits.Pages = 1
	d := e.Evaluate(bg, bound())
	denied(t, d, LimitExceeded)
	if want := []int{1, 1, 1, 1}; !slices.Equal(*s.seen, want) {
		t.Errorf("pages taken: %v, want %v", *s.seen, want)
	}
}

// TestBudgetAhead: a source is told where nobody waits for it, and only there.
func TestBudgetAhead(t *testing.T) {
	for _, tt := range []struct {
		use     Use
		binding Binding
	}{{UseContainer, BoundRuntime}, {UseVolume, BoundSnapshot}, {UsePrefetch, BoundRecord}, {UseQuestion, BoundDigest}} {
		var ahead []bool
		q := with(func(q *Question) { q.Image.Use, q.Image.Binding = tt.use, tt.binding })
		denied(t, engine(patient{seen: &ahead}).Evaluate(bg, q), SignatureMissing)
		if want := tt.use == UsePrefetch; !slices.Equal(ahead, []bool{want, want}) {
			t.Errorf("use %d: ahead of time %v", tt.use, ahead)
		}
	}
}

// patient is a Source that notes whether it has time.
type patient struct{ seen *[]bool }

func (patient) Name() string { return "patient" }
func (p patient) Find(_ context.Context, _ Name, _ ocispec.Descriptor, b *Budget, _ func(Evidence) bool) error {
	*p.seen = append(*p.seen, b.Prefetch)
	return nil
}

// counts is a Source that takes two pages a subject.
type counts struct{ seen *[]int }

func (counts) Name() string { return "counts" }
func (c counts) Find(_ context.Context, _ Name, _ ocispec.Descriptor, b *Budget, _ func(Evidence) bool) error {
	n := 0
	defer func() { *c.seen = append(*c.seen, n) }()
	for range 2 {
		if err := b.Page(); err != nil {
			return err
		}
		n++
	}
	return nil
}

func TestSignersAreBounded(t *testing.T) {
	var many []string
	for i := range 5 * MaxRelated {
		many = append(many, fmt.Sprintf("R%d", i/2))
	}
	d := engine(on("a", many...)).Evaluate(bg, bound())
	if len(d.Signers) != MaxRelated || d.Signers[1].Subject != "CN=R1" {
		t.Errorf("signers are %v", d.Signers)
	}
	d = engine(on("a", "unreadable", "zero")).Evaluate(bg, bound())
	if d.Signers != nil && !slices.Equal(d.Signers, []Signer{}) {
		t.Errorf("nobody signed, and signers are %v", d.Signers)
	}
}

// TestTextIsBounded: Decisions are kept, so that no attacker's text in them is long.
func TestTextIsBounded(t *testing.T) {
	long := strings.Repeat("y\n", 1<<19)
	for _, d := range []Decision{
		engine(on("a", "huge")).Evaluate(bg, bound()),
		engine(failing("b", errors.New(long))).Evaluate(bg, bound()),
		engine(on(long, "huge")).Evaluate(bg, bound()),
		engine(on("c", "huge", "good")).Evaluate(bg, bound()),
		engine(on("d", "huge and good")).Evaluate(bg, bound()),
	} {
		n := len(d.Detail) + len(d.Source) + 30*len(d.Warnings)
		for _, a := range d.Tried {
			n += len(a.Source) + len(a.Detail)
		}
		for _, s := range d.Signers {
			n += len(s.Subject) + len(s.Thumbprint) + len(s.Anchor)
		}
		if n == 0 || n > 10*MaxMessage || len(d.Warnings) > MaxRelated {
			t.Errorf("a decision holds %d bytes of text", n)
		}
	}
}

// TestMetadataIsWhole: signed metadata is bounded, and no value of it is cut, since
// half a value is another one.
func TestMetadataIsWhole(t *testing.T) {
	d := engine(on("a", "metadata")).Evaluate(bg, bound())
	if _, long := d.Metadata["long"]; !d.Allowed() || long || len(d.Metadata) != 32 || d.Metadata["env"] != "prod" || d.Metadata["m000"] != "x" {
		t.Errorf("metadata is %v", d.Metadata)
	}
	for k, v := range d.Metadata {
		if len(k) > 128 || len(v) > 512 {
			t.Errorf("a key of %d bytes and a value of %d", len(k), len(v))
		}
	}
	if d.Metadata[strings.Repeat("l", 128)] != "at the bound" || len(d.Metadata["at"]) != 512 {
		t.Error("what is within the bounds is left out")
	}
	if d := engine(on("a", "good")).Evaluate(bg, bound()); d.Metadata != nil {
		t.Errorf("metadata is %v", d.Metadata)
	}
}

// world is what the sources hold, for TestMonotone.
type world struct {
	q       Question
	sources []holds
}

func (w world) judge() Decision {
	var list []Source
	for _, s := range w.sources {
		list = append(list, s)
	}
	return engine(list...).Evaluate(bg, w.q)
}

// clone copies w, so that a change to the copy is none to w.
func (w world) clone() world {
	c := world{q: bound()}
	c.q.Image.Related = slices.Clone(w.q.Image.Related)
	for _, s := range w.sources {
		m := map[digest.Digest][]string{}
		for k, v := range s.evidence {
			m[k] = slices.Clone(v)
		}
		s.evidence = m
		c.sources = append(c.sources, s)
	}
	return c
}

// should says independently of the Engine whether w allows: some source holds a
// good signature of a subject.
func (w world) should() bool {
	subjects := []digest.Digest{of("index"), of("manifest")}
	for _, o := range w.q.Image.Related[:min(8, len(w.q.Image.Related))] {
		subjects = append(subjects, o.Digest)
	}
	for _, s := range w.sources {
		for _, subject := range subjects {
			if slices.Contains(s.evidence[subject], "good") {
				return true
			}
		}
	}
	return false
}

// TestMonotone makes worlds at random and changes each a little. Only a good
// signature can make an allow of a denial. What an attacker may add (bad
// signatures, sources that fail, more records) makes no denial of an allow
// either: it can cost a budget, which is a source's, and nothing else.
func TestMonotone(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	pick := func(l []string) string { return l[r.IntN(len(l))] }
	bad := []string{"SIGNATURE_INVALID", "SIGNER_UNTRUSTED", "REVOKED", "SIGNATURE_EXPIRED", "unreadable", "panic", "zero", "lie", "lie about nothing", "AUDIT_ONLY", "VERIFIED"}
	names := []string{"index", "manifest", "o0", "o1", "o7", "o8", "config", "evil"}
	errs := []error{nil, nil, nil, ErrUnreachable, ErrUnauthorized, ErrNoReferrers, ErrBudget, errors.New("x")}
	source := func(i int, goodToo bool) holds {
		h := holds{name: fmt.Sprint("s", i), evidence: map[digest.Digest][]string{}, err: errs[r.IntN(len(errs))], deaf: r.IntN(4) == 0}
		if r.IntN(2) == 0 {
			h.errAt = of(pick(names))
		}
		for range r.IntN(5) {
			e := pick(bad)
			if goodToo && r.IntN(6) == 0 {
				e = "good"
			}
			k := of(pick(names))
			h.evidence[k] = append(h.evidence[k], e)
		}
		return h
	}
	var yes, no int
	for range 2000 {
		w := world{q: bound()}
		for i := range r.IntN(10) {
			w.q.Image.Related = append(w.q.Image.Related, desc(fmt.Sprint("o", i)))
		}
		for i := range r.IntN(4) {
			w.sources = append(w.sources, source(i, true))
		}
		d := w.judge()
		if d.Allowed() != w.should() {
			t.Fatalf("allowed=%t %v, should be %t: %+v", d.Allowed(), d.Reason, w.should(), w)
		}
		if d.Allowed() {
			yes++
		} else {
			no++
		}
		if d.Allowed() == (d.Reason != Verified) || d.Reason == AuditOnly {
			t.Fatalf("allowed=%t with reason %v", d.Allowed(), d.Reason)
		}
		if d.Reason == SignatureMissing {
			for _, a := range d.Tried {
				if a.Reason != SignatureMissing || a.Seen != 0 {
					t.Fatalf("SIGNATURE_MISSING although %+v", a)
				}
			}
		}

		// Additions of an attacker change nothing about the verdict.
		c := w.clone()
		switch r.IntN(4) {
		case 0: // a bad signature anywhere, before or after others
			if len(c.sources) == 0 {
				continue
			}
			s := c.sources[r.IntN(len(c.sources))]
			k := of(pick(names))
			s.evidence[k] = slices.Insert(s.evidence[k], r.IntN(len(s.evidence[k])+1), pick(bad))
		case 1: // a source without anything good, anywhere
			c.sources = slices.Insert(c.sources, r.IntN(len(c.sources)+1), source(9, false))
		case 2: // a record of something nobody signed
			c.q.Image.Related = append(c.q.Image.Related, desc("unsigned"))
		case 3: // other orders of what one source holds
			for _, s := range c.sources {
				for _, l := range s.evidence {
					r.Shuffle(len(l), func(i, j int) { l[i], l[j] = l[j], l[i] })
				}
			}
		}
		if after := c.judge(); after.Allowed() != d.Allowed() {
			t.Fatalf("allowed=%t became %t (%v):\n%+v\n%+v", d.Allowed(), after.Allowed(), after.Reason, w, c)
		}

		// Losses make no allow of a denial.
		c = w.clone()
		for i, s := range c.sources {
			if r.IntN(2) == 0 {
				c.sources[i].err, c.sources[i].errAt = ErrUnreachable, of(pick(names))
			}
			for k, l := range s.evidence {
				if r.IntN(2) == 0 && len(l) > 0 {
					s.evidence[k] = l[1:]
				}
			}
		}
		c.q.Image.Related = c.q.Image.Related[:r.IntN(len(c.q.Image.Related)+1)]
		if after := c.judge(); after.Allowed() && !d.Allowed() {
			t.Fatalf("less evidence allows:\n%+v\n%+v", w, c)
		}

		// A weaker question is denied whatever there is.
		q := w.q
		weakened[r.IntN(len(weakened))].weaken(func() *Question { rule := *q.Rule; q.Rule = &rule; return &q }())
		c.q = q
		if after := c.judge(); after.Allowed() {
			t.Fatalf("a weak question is allowed: %+v", c)
		}
	}
	if yes < 200 || no < 200 {
		t.Errorf("%d worlds allow and %d deny: too few of one kind to say something", yes, no)
	}
}

// A mirror that serves signatures by tag has no tag for an index of which only
// the manifest is signed; a broken referrer of the index is no different.
func TestErrorOfOneSubjectHidesNoOther(t *testing.T) {
	for _, err := range []error{ErrNoReferrers, ErrBudget, ErrUnreachable, ErrUnauthorized} {
		s := holds{name: "mirror", evidence: map[digest.Digest][]string{of("manifest"): {"good"}}, err: err, errAt: of("index")}
		if d := engine(s).Evaluate(bg, bound()); !d.Allowed() {
			t.Errorf("%v at the index: %s: %s", err, d.Reason, d.Detail)
		}
		s.evidence = map[digest.Digest][]string{of("manifest"): {string(SignerUntrusted)}}
		want := reasonOf(err)
		if err == ErrNoReferrers {
			want = SignerUntrusted // it does serve signatures
		}
		if d := engine(s).Evaluate(bg, bound()); d.Allowed() || d.Reason != want {
			t.Errorf("%v at the index: %s, want %s", err, d.Reason, want)
		}
	}
}

// Of what a source could not do about several subjects the worst is said, and of
// two that are alike the first.
func TestWorstErrorIsSaid(t *testing.T) {
	for _, tt := range []struct {
		index, manifest error
		want            Reason
		detail          string
	}{
		{ErrUnreachable, ErrNoReferrers, SourceUnreachable, "a: index: source did not answer"},
		{ErrNoReferrers, ErrUnreachable, SourceUnreachable, "a: manifest: source did not answer"},
		{ErrBudget, ErrBudget, LimitExceeded, "a: index: source sent more than the limits allow"},
		{nil, ErrUnauthorized, SourceUnauthorized, "a: manifest: source refused the credentials"},
	} {
		errs := map[digest.Digest]error{}
		if tt.index != nil {
			errs[of("index")] = fmt.Errorf("index: %w", tt.index)
		}
		if tt.manifest != nil {
			errs[of("manifest")] = fmt.Errorf("manifest: %w", tt.manifest)
		}
		d := engine(fails(errs)).Evaluate(bg, bound())
		denied(t, d, tt.want)
		if d.Detail != tt.detail {
			t.Errorf("detail is %q, want %q", d.Detail, tt.detail)
		}
	}
}

// registry is a Holder.
type registry struct {
	holds
	image  error // what Holds says
	looked *[]bool
}

func (r registry) Holds(_ context.Context, _ Name, image ocispec.Descriptor, listed bool, _ *Budget) error {
	if image.Digest != of("index") {
		panic("asked for " + image.Digest)
	}
	if r.looked != nil {
		*r.looked = append(*r.looked, listed)
	}
	return r.image
}

// The answer is that of the source that has the image. Only one that says that it has
// not is passed over, and only beside one that has.
func TestWhoHasTheImageAnswers(t *testing.T) {
	gone := fmt.Errorf("%w: 404", ErrAbsent)
	cannot := fmt.Errorf("no tag: %w", ErrNoReferrers)
	has := registry{holds: on("has")}
	absent := registry{holds: failing("absent", cannot), image: gone}
	for _, tt := range []struct {
		name    string
		sources []Source
		want    Reason
		detail  string
	}{
		{"the second has it", []Source{absent, has}, SignatureMissing, "no test signature found at has"},
		{"the first has it", []Source{has, absent}, SignatureMissing, "no test signature found at has"},
		{"none has it", []Source{absent}, SourceNoReferrers, "absent: source does not have the image: 404"},
		{"an empty list, and none has it", []Source{registry{holds: on("a"), image: gone}}, SourceNoReferrers, "a: source does not have the image: 404"},
		{"an empty list of whom none can tell", []Source{registry{holds: on("a"), image: ErrUnreachable}}, SourceUnreachable, "a: source did not answer"},
		{"a layout beside it tells nothing of the registry", []Source{on("layout"), absent}, SourceNoReferrers, "absent: source does not have the image: 404"},
		{"the first has it and cannot list", []Source{registry{holds: failing("a", cannot)}, has}, SourceNoReferrers, "a: no tag: source cannot serve referrers"},
		{"the first cannot list, and cannot tell", []Source{registry{holds: failing("a", cannot), image: ErrUnreachable}, has}, SourceNoReferrers, "a: no tag: source cannot serve referrers"},
		{"the first did not answer", []Source{registry{holds: failing("a", ErrUnreachable), image: gone}, has}, SourceUnreachable, "a: source did not answer"},
		{"the first was cut short", []Source{registry{holds: failing("a", ErrBudget), image: gone}, has}, LimitExceeded, "a: source sent more than the limits allow"},
		{"the second has a bad one", []Source{absent, registry{holds: on("b", "SIGNER_UNTRUSTED")}}, SignerUntrusted, "b: found SIGNER_UNTRUSTED"},
	} {
		d := engine(tt.sources...).Evaluate(bg, bound())
		denied(t, d, tt.want)
		if d.Detail != tt.detail || len(d.Tried) != len(tt.sources) {
			t.Errorf("%s: %q, want %q; tried %v", tt.name, d.Detail, tt.detail, d.Tried)
		}
	}
	var looked []bool
	allowed(t, engine(registry{holds: on("a", "good"), looked: &looked}).Evaluate(bg, bound()), Verified)
	denied(t, engine(registry{holds: on("a", "REVOKED"), looked: &looked}).Evaluate(bg, bound()), Revoked)
	if len(looked) != 0 {
		t.Error("asked for the image although there are signatures")
	}
	engine(registry{holds: on("a"), looked: &looked}, registry{holds: failing("b", ErrNoReferrers), looked: &looked}).Evaluate(bg, bound())
	if !slices.Equal(looked, []bool{true, false}) {
		t.Errorf("listed: %v", looked)
	}
}

// A source that listed what refers to the index, and had no signature in it, is not
// one that cannot list: it has no tag for the manifest since nothing refers to that.
func TestOthersAtOneSubject(t *testing.T) {
	for _, at := range []string{"index", "manifest"} {
		s := holds{name: "a", err: fmt.Errorf("no tag: %w", ErrNoReferrers), errAt: of(at)}
		d := engine(s).Evaluate(bg, bound())
		denied(t, d, SignatureMissing)
		if d.Detail != "no test signature found at a" {
			t.Errorf("no tag for the %s: %s", at, d.Detail)
		}
	}
}

// fails is a Source with an error for each subject.
type fails map[digest.Digest]error

func (fails) Name() string { return "a" }
func (f fails) Find(_ context.Context, _ Name, subject ocispec.Descriptor, _ *Budget, _ func(Evidence) bool) error {
	return f[subject.Digest]
}
