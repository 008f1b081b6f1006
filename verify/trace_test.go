package verify

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify/requirement"
)

// spoken is a Checker whose evidence says what it finds: "a b/3/7" verifies for the
// authorities a and b, by key and identity 3, and ends after 7 hours. Else it is untrusted.
type spoken struct{}

func (spoken) Kind() Kind                        { return kind{} }
func (spoken) Anchors(authority string) []string { return []string{authority} }

func (spoken) Check(_ context.Context, ev Evidence, want ocispec.Descriptor, authority string) Finding {
	part := strings.Split(string(ev.Blob), "/")
	if !slices.Contains(strings.Fields(part[0]), authority) {
		return Finding{Reason: SignerUntrusted, Signer: Signer{Subject: "CN=" + part[1]}}
	}
	var key, hours int
	fmt.Sscan(part[1], &key)
	fmt.Sscan(part[2], &hours)
	return Finding{Reason: Verified, Signed: want.Digest, Signer: Signer{Subject: "CN=" + part[1]}, Identity: Identity(part[1]), Key: [32]byte{byte(key)}, Until: start.Add(time.Duration(hours) * time.Hour)}
}

func tree(t testing.TB, term requirement.Term) Question {
	t.Helper()
	r, err := requirement.Require(term)
	if err != nil {
		t.Fatal(err)
	}
	return with(func(q *Question) { q.Rule.Require = r })
}

func signed(authority string) requirement.Term { return requirement.SignedBy(leaf(authority)) }

func spokenEngine(sources ...Source) *Engine {
	e := engine(sources...)
	e.Checkers = []Checker{spoken{}}
	return e
}

func TestTrees(t *testing.T) {
	all, two := requirement.All(signed("a"), signed("b")), requirement.AtLeast(2, signed("a"), signed("b"), signed("c"))
	for _, tt := range []struct {
		name    string
		term    requirement.Term
		sources []Source
		want    Reason
		detail  string
		until   int // hours
	}{
		{name: "both at one source", term: all, sources: []Source{on("x", "a/1/9", "b/2/5")}, want: Verified, until: 5},
		{name: "one at each source", term: all, sources: []Source{on("x", "a/1/9"), on("y", "b/2/5")}, want: Verified, until: 5},
		{name: "one is missing", term: all, sources: []Source{on("x", "a/1/9")}, want: ThresholdNotMet, detail: "nothing that counts by b [SIGNER_UNTRUSTED]"},
		{name: "none", term: all, sources: []Source{on("x")}, want: SignatureMissing, detail: "no test signature found at x"},
		{name: "one that counts for both", term: all, sources: []Source{on("x", "a b/1/9")}, want: ThresholdNotMet, detail: "one signer counts once"},
		{name: "one signer twice", term: two, sources: []Source{on("x", "a/1/9", "b/1/9", "c/1/9")}, want: ThresholdNotMet, detail: "one signer counts once"},
		{name: "two of three", term: two, sources: []Source{on("x", "c/1/9"), on("y", "a/2/9")}, want: Verified, until: 9},
		{name: "one is missing and a source is silent", term: all, sources: []Source{on("x", "a/1/9"), failing("y", ErrUnreachable)}, want: SourceUnreachable},
		{name: "one is missing and a list was cut", term: all, sources: []Source{failing("x", ErrBudget, "a/1/9")}, want: LimitExceeded},
		{name: "met, and a source is silent", term: all, sources: []Source{failing("x", ErrUnreachable, "a/1/9"), on("y", "b/2/9")}, want: Verified, until: 9},
		{name: "the choice that ends last", term: requirement.AtLeast(1, requirement.All(signed("a"), signed("b")), signed("c")), sources: []Source{on("x", "a/1/9", "a/3/5", "b/2/5", "c/4/1")}, want: Verified, until: 5},
	} {
		t.Run(tt.name, func(t *testing.T) {
			q := tree(t, tt.term)
			d := spokenEngine(tt.sources...).Evaluate(bg, q)
			if d.Reason != tt.want || d.Allowed() != (tt.want == Verified) || tt.detail != "" && d.Detail != tt.detail {
				t.Fatalf("%s %q, want %s %q", d.Reason, d.Detail, tt.want, tt.detail)
			}
			if d.Allowed() && (!d.Until.Equal(start.Add(time.Duration(tt.until)*time.Hour)) || len(d.Signers) < 1 || len(d.proof) != len(d.Signers)) {
				t.Errorf("ends %s, signers %v", d.Until, d.Signers)
			}
			// What was kept is looked at again as a whole.
			if d.Allowed() {
				allowed(t, Renew(q, d, start), Verified)
				denied(t, Renew(q, d, d.Until), SignatureExpired)
				denied(t, Renew(tree(t, signed("z")), d, start), Internal)
				if len(d.proof) > 1 {
					d.proof = d.proof[1:]
					denied(t, Renew(q, d, start), Internal)
				}
			}
		})
	}
	// What one engine found counts for the next.
	q := tree(t, all)
	near := spokenEngine(on("x", "a/1/9")).Evaluate(bg, q)
	allowed(t, spokenEngine(on("y", "b/2/9")).Evaluate(bg, q.After(near)), Verified)
	denied(t, spokenEngine(on("y", "b/2/9")).Evaluate(bg, q.After(near.Final())), ThresholdNotMet)
	// A source that panics is believed nothing.
	denied(t, spokenEngine(panicsAfter{on("x", "a/1/9")}, on("y", "b/2/9")).Evaluate(bg, q), Internal)
	// A kind that is not known is no yes.
	e := spokenEngine(on("x", "a/1/9"))
	unknown, err := SignedBy(Leaf{Kind: "another", Authority: "a", Hash: [32]byte{1}})
	if err != nil {
		t.Fatal(err)
	}
	q.Rule.Require = unknown
	denied(t, e.Evaluate(bg, q), PolicyInvalid)
}

// TestTreesInEveryOrder: neither the order of evidence and sources nor evidence that is
// added takes an allow away, and none is given without the findings that it takes.
func TestTreesInEveryOrder(t *testing.T) {
	terms := []requirement.Term{
		signed("a"), requirement.All(signed("a"), signed("b")), requirement.AtLeast(2, signed("a"), signed("b"), signed("c")),
		requirement.All(signed("a"), requirement.AtLeast(1, signed("b"), signed("c"))),
	}
	names := []string{"a", "b", "c", "a b", "b c", "x"}
	for seed := range uint64(600) {
		rng := rand.New(rand.NewPCG(seed, 3))
		q := tree(t, terms[rng.IntN(len(terms))])
		var evidence []string
		for range rng.IntN(6) {
			evidence = append(evidence, fmt.Sprintf("%s/%d/%d", names[rng.IntN(len(names))], 1+rng.IntN(3), 1+rng.IntN(5)))
		}
		first := spokenEngine(on("x", evidence...)).Evaluate(bg, q)
		var claims []requirement.Claim
		for _, ev := range evidence {
			for i, l := range q.Rule.Require.Leaves() {
				if f := (spoken{}).Check(bg, Evidence{Blob: []byte(ev)}, q.Image.Target, l.Authority); f.Reason == Verified {
					claims = append(claims, requirement.Claim{Leaf: i, Key: f.Key, Identity: string(f.Identity), Until: f.Until})
				}
			}
		}
		if want, _ := q.Rule.Require.Choose(claims); (want != nil) != first.Allowed() {
			t.Fatalf("seed %d: %s of %q", seed, first.Reason, evidence)
		}
		rng.Shuffle(len(evidence), func(i, j int) { evidence[i], evidence[j] = evidence[j], evidence[i] })
		cut := rng.IntN(len(evidence) + 1)
		if again := spokenEngine(on("x", evidence[:cut]...), on("y", evidence[cut:]...)).Evaluate(bg, q); again.Allowed() != first.Allowed() {
			t.Fatalf("seed %d: %s of %q in another order, %s before", seed, again.Reason, evidence, first.Reason)
		}
		more := append(slices.Clone(evidence), fmt.Sprintf("%s/%d/%d", names[rng.IntN(len(names))], 1+rng.IntN(3), 1+rng.IntN(5)))
		if again := spokenEngine(on("x", more...)).Evaluate(bg, q); first.Allowed() && !again.Allowed() {
			t.Fatalf("seed %d: one more took the allow away: %s of %q", seed, again.Reason, more)
		}
	}
}

// crowded is a Source that hands over what fits the budget's anchors first, and whose list
// is cut after so many.
type crowded struct{ evidence []string }

func (crowded) Name() string { return "crowded" }
func (c crowded) Find(_ context.Context, _ Name, subject ocispec.Descriptor, b *Budget, yield func(Evidence) bool) error {
	list := slices.Clone(c.evidence)
	slices.SortStableFunc(list, func(x, y string) int {
		fits := func(s string) int {
			if slices.Contains(b.Anchors, strings.Split(s, "/")[0]) {
				return 0
			}
			return 1
		}
		return fits(x) - fits(y)
	})
	for _, s := range list {
		if err := b.Signature(); err != nil {
			return err
		}
		if !yield(Evidence{Manifest: ocispec.Descriptor{Digest: digest.FromString(s)}, Blob: []byte(s)}) {
			return nil
		}
	}
	return nil
}

// TestLeavesTakeTurns: who signs very often for one leaf does not hide what another needs.
func TestLeavesTakeTurns(t *testing.T) {
	var many []string
	for i := range 500 {
		many = append(many, fmt.Sprintf("a/1/%d", i+1))
	}
	many = append(many, "b/2/9")
	e := spokenEngine(crowded{many})
	allowed(t, e.Evaluate(bg, tree(t, requirement.All(signed("a"), signed("b")))), Verified)
	d := e.Evaluate(bg, tree(t, requirement.All(signed("a"), signed("c"))))
	denied(t, d, LimitExceeded)
}

// TestTraceIsShown: each check of each leaf is a step, and only an answer keeps anything.
func TestTraceIsShown(t *testing.T) {
	k := keeps{holds: on("store")}
	e, kept := stored(k, on("x", "a/1/9", "x/2/9", "b/3/9"))
	e.Checkers = []Checker{spoken{}}
	q := tree(t, requirement.All(signed("a"), signed("b")))
	var steps []string
	d := e.Trace(bg, q, func(s Step) {
		steps = append(steps, fmt.Sprintf("%s %s %s %s", s.Source, s.Leaf.Authority, s.Evidence.Blob, s.Finding.Reason))
	})
	allowed(t, d, Verified)
	want := []string{"x a a/1/9 VERIFIED", "x b a/1/9 SIGNER_UNTRUSTED", "x a x/2/9 SIGNER_UNTRUSTED", "x b x/2/9 SIGNER_UNTRUSTED", "x a b/3/9 SIGNER_UNTRUSTED", "x b b/3/9 VERIFIED"}
	slices.Sort(steps)
	slices.Sort(want)
	if !slices.Equal(steps, want) || len(*kept) != 0 {
		t.Errorf("steps %q, kept %q", steps, *kept)
	}
	// The store is given what each leaf rests on, and nothing else.
	allowed(t, e.Evaluate(bg, q), Verified)
	if len(*kept) != 2 {
		t.Errorf("kept %q", *kept)
	}
}

// tagged is spoken for a kind that lies at tags too.
type tagged struct{ spoken }

func (tagged) Kind() Kind { return kind{suffixes: []string{".toy"}} }

// TestMutableTags: what may lie at a tag is never said to be missing.
func TestMutableTags(t *testing.T) {
	e := spokenEngine(on("x", "x/1/9"), on("y"))
	denied(t, e.Evaluate(bg, tree(t, signed("a"))), SignerUntrusted)
	e.Checkers = []Checker{tagged{}}
	denied(t, e.Evaluate(bg, tree(t, signed("a"))), SourceUnreachable)
	allowed(t, e.Evaluate(bg, tree(t, signed("x"))), Verified)
}
