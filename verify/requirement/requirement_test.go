package requirement

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

func leaf(name string) Term {
	var h [32]byte
	copy(h[:], name+"'s hash")
	return SignedBy(Leaf{Kind: "test", Authority: name, Hash: h})
}

func must(t *testing.T, term Term) *Requirement {
	t.Helper()
	r, err := Require(term)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestRequire(t *testing.T) {
	var many []Term
	for i := range MaxLeaves + 1 {
		many = append(many, leaf(fmt.Sprint(i)))
	}
	twin := leaf("a")
	twin.leaf.Authority = "b"
	other := leaf("a")
	other.leaf.Kind = "another"
	zero := leaf("a")
	zero.leaf.Hash = [32]byte{}
	for _, tt := range []struct {
		name string
		term Term
		want string // part of the error; empty: none
	}{
		{"one", leaf("a"), ""},
		{"all", All(leaf("a"), leaf("b")), ""},
		{"two of three", AtLeast(2, leaf("a"), leaf("b"), leaf("c")), ""},
		{"three levels", All(leaf("a"), AtLeast(1, leaf("b"), leaf("c"))), ""},
		{"as many as may be", AtLeast(3, many[:MaxLeaves]...), ""},
		{"the same name of another kind", All(leaf("a"), other), ""},
		{"four levels", All(leaf("a"), AtLeast(1, leaf("b"), All(leaf("c")))), "more than 3 levels"},
		{"too many", AtLeast(3, many...), "more than 12 authorities"},
		{"the zero term", Term{}, "a list of nothing"},
		{"all of nothing", All(), "a list of nothing"},
		{"none of two", AtLeast(0, leaf("a"), leaf("b")), "0 of 2"},
		{"less than none", AtLeast(-1, leaf("a")), "-1 of 1"},
		{"three of two", AtLeast(3, leaf("a"), leaf("b")), "3 of 2"},
		{"below, none of one", All(leaf("a"), AtLeast(0, leaf("b"))), "0 of 1"},
		{"an authority twice", All(leaf("a"), leaf("a")), "one identity could meet both"},
		{"an authority twice, far apart", All(leaf("a"), AtLeast(1, leaf("b"), leaf("a"))), "one identity could meet both"},
		{"two names for the same", All(leaf("a"), twin), "one identity could meet both"},
		{"no hash", zero, "without"},
		{"no name", SignedBy(Leaf{Kind: "test", Hash: [32]byte{1}}), "without"},
		{"no kind", SignedBy(Leaf{Authority: "a", Hash: [32]byte{1}}), "without"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, err := Require(tt.term)
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) || err != nil && r != nil {
				t.Errorf("requirement %v, error %v, want %q", r, err, tt.want)
			}
			if err == nil && r.Hash() == [32]byte{} {
				t.Error("the hash is zero")
			}
		})
	}
	// A hash names the tree: what is asked for otherwise has another one.
	hashes := map[[32]byte]string{}
	for name, term := range map[string]Term{
		"a": leaf("a"), "b": leaf("b"), "all a b": All(leaf("a"), leaf("b")), "all b a": All(leaf("b"), leaf("a")), "any a b": AtLeast(1, leaf("a"), leaf("b")), "all a": All(leaf("a")),
		"all a, any b c": All(leaf("a"), AtLeast(1, leaf("b"), leaf("c"))), "any a, all b c": AtLeast(1, leaf("a"), All(leaf("b"), leaf("c"))), "all a b c": All(leaf("a"), leaf("b"), leaf("c")),
	} {
		h := must(t, term).Hash()
		if was, twice := hashes[h]; twice {
			t.Errorf("%q and %q have the same hash", was, name)
		}
		hashes[h] = name
	}
	if l := leaf("a"); must(t, leaf("a")).Hash() != l.leaf.Hash {
		t.Error("the hash of one leaf is not its own")
	}
	// Nothing meets what was not built.
	full := []Claim{{Leaf: 0, Key: [32]byte{1}, Identity: "a", Until: time.Unix(1, 0)}}
	for _, r := range []*Requirement{nil, {}} {
		if got, _ := r.Choose(full); got != nil || r.Met(full) || r.Met(nil) || r.Hash() != [32]byte{} || r.Leaves() != nil {
			t.Errorf("%v is met", r)
		}
	}
}

// claim is one of the leaf, by a key and an identity that a digit names; 0 is not known.
func claim(leaf, key, identity, until int) Claim {
	c := Claim{Leaf: leaf, Key: [32]byte{byte(key)}}
	if identity > 0 {
		c.Identity = fmt.Sprint(identity)
	}
	if until > 0 {
		c.Until = time.Unix(int64(until), 0)
	}
	return c
}

func TestChoose(t *testing.T) {
	a, b, c := leaf("a"), leaf("b"), leaf("c")
	for _, tt := range []struct {
		name   string
		term   Term
		claims []Claim
		want   []int // nil: not met
	}{
		{"one of one", a, []Claim{claim(0, 1, 1, 9)}, []int{0}},
		{"one, of whom nothing is known", a, []Claim{claim(0, 0, 0, 9)}, []int{0}},
		{"nothing", a, nil, nil},
		{"of no leaf", a, []Claim{claim(1, 1, 1, 9), claim(-1, 1, 1, 9)}, nil},
		{"the one that ends last", a, []Claim{claim(0, 1, 1, 5), claim(0, 2, 2, 9), claim(0, 3, 3, 7)}, []int{1}},
		{"no end that is known goes last", a, []Claim{claim(0, 1, 1, 0), claim(0, 2, 2, 1)}, []int{1}},
		{"two", All(a, b), []Claim{claim(0, 1, 1, 9), claim(1, 2, 2, 9)}, []int{0, 1}},
		{"one of two", All(a, b), []Claim{claim(0, 1, 1, 9)}, nil},
		{"one key twice", All(a, b), []Claim{claim(0, 1, 1, 9), claim(1, 1, 2, 9)}, nil},
		{"one identity twice, with a renewed key", All(a, b), []Claim{claim(0, 1, 1, 9), claim(1, 2, 1, 9)}, nil},
		{"a key that is not known", All(a, b), []Claim{claim(0, 0, 1, 9), claim(1, 2, 2, 9)}, nil},
		{"an identity that is not known", All(a, b), []Claim{claim(0, 1, 0, 9), claim(1, 2, 2, 9)}, nil},
		{"one signature cannot be two", AtLeast(2, a, b, c), []Claim{claim(0, 1, 1, 9), claim(1, 1, 1, 9), claim(2, 1, 1, 9)}, nil},
		{"a matching, not a count", All(a, b), []Claim{claim(0, 1, 1, 9), claim(1, 1, 1, 9), claim(1, 2, 2, 3)}, []int{0, 2}},
		{"who meets two is used where only they count", All(a, b), []Claim{claim(0, 1, 1, 9), claim(0, 2, 2, 3), claim(1, 1, 1, 9)}, []int{1, 2}},
		{"a third with something of each joins nobody", All(a, b), []Claim{claim(0, 1, 1, 9), claim(1, 2, 2, 9), claim(0, 1, 2, 9), claim(1, 1, 2, 9)}, []int{0, 1}},
		{"the choice that ends last", AtLeast(1, a, All(b, c)), []Claim{claim(0, 1, 1, 5), claim(1, 2, 2, 9), claim(2, 3, 3, 8)}, []int{1, 2}},
		{"whatever else ends soon", All(a, b), []Claim{claim(0, 1, 1, 9), claim(1, 2, 2, 9), claim(1, 3, 3, 1)}, []int{0, 1}},
		{"two of three", AtLeast(2, a, b, c), []Claim{claim(0, 1, 1, 9), claim(2, 2, 2, 9)}, []int{0, 1}},
		{"across levels", All(a, AtLeast(1, b, c)), []Claim{claim(0, 1, 1, 9), claim(1, 1, 2, 9), claim(2, 3, 1, 9)}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := must(t, tt.term)
			got, unsure := r.Choose(tt.claims)
			if !slices.Equal(got, tt.want) || unsure {
				t.Errorf("chosen %v, want %v; unsure %t", got, tt.want, unsure)
			}
		})
	}
}

// TestChooseIsExact compares with trying everything: whether there is a choice, when the
// best one ends, that the order of the claims changes neither, and that more claims take
// no choice away.
func TestChooseIsExact(t *testing.T) {
	trees := []Term{
		leaf("a"), All(leaf("a"), leaf("b")), AtLeast(2, leaf("a"), leaf("b"), leaf("c")), AtLeast(1, leaf("a"), All(leaf("b"), leaf("c"))),
		All(leaf("a"), AtLeast(2, leaf("b"), leaf("c"), leaf("d"))), AtLeast(2, All(leaf("a"), leaf("b")), leaf("c"), AtLeast(1, leaf("d"), leaf("e"))),
	}
	for seed := range uint64(4000) {
		rng := rand.New(rand.NewPCG(seed, 1))
		r := must(t, trees[rng.IntN(len(trees))])
		claims := make([]Claim, rng.IntN(8))
		for i := range claims {
			claims[i] = claim(rng.IntN(len(r.leaves)), rng.IntN(5), rng.IntN(5), rng.IntN(6))
		}
		want, end := everything(r, claims)
		got, unsure := r.Choose(claims)
		if unsure || (got != nil) != want || got != nil && (!r.Met(pickOf(claims, got)) || !first(pickOf(claims, got)).Equal(end)) {
			t.Fatalf("seed %d: %v of %v, unsure %t, want a choice %t that ends at %v", seed, got, claims, unsure, want, end)
		}
		order := rng.Perm(len(claims))
		mixed := pickOf(claims, order)
		if again, _ := r.Choose(mixed); (again != nil) != want || again != nil && !first(pickOf(mixed, again)).Equal(end) {
			t.Fatalf("seed %d: another answer in another order", seed)
		}
		if want {
			more := append(slices.Clone(claims), claim(rng.IntN(len(r.leaves)), rng.IntN(5), rng.IntN(5), rng.IntN(6)))
			if again, _ := r.Choose(more); again == nil {
				t.Fatalf("seed %d: one more claim took the choice away", seed)
			}
		}
	}
}

func pickOf(claims []Claim, places []int) (list []Claim) {
	for _, i := range places {
		list = append(list, claims[i])
	}
	return list
}

// first is when the first of list ends.
func first(list []Claim) (t time.Time) {
	for i, c := range list {
		if i == 0 || c.Until.Before(t) {
			t = c.Until
		}
	}
	return t
}

// everything tries each subset of claims.
func everything(r *Requirement, claims []Claim) (found bool, best time.Time) {
	for set := range 1 << len(claims) {
		var list []Claim
		for i, c := range claims {
			if set&(1<<i) != 0 {
				list = append(list, c)
			}
		}
		if len(list) == 0 || !r.Met(list) {
			continue
		}
		if end := first(list); !found || end.After(best) {
			found, best = true, end
		}
	}
	return found, best
}

// TestThin: what is left out changes neither whether there is a choice nor its end.
func TestThin(t *testing.T) {
	r := must(t, All(leaf("a"), leaf("b"), leaf("c")))
	for seed := range uint64(60) {
		rng := rand.New(rand.NewPCG(seed, 2))
		var a, others []Claim
		for range 900 { // few keys, many identities; or the other way round
			few, many := 1+rng.IntN(3), 1+rng.IntN(200)
			if seed%2 == 0 {
				few, many = many, few
			}
			a = append(a, claim(0, few, many, 1+rng.IntN(50)))
		}
		for i := range 8 {
			others = append(others, claim(1+i%2, 1+rng.IntN(6), 1+rng.IntN(6), 1+rng.IntN(50)))
		}
		kept := Thin(a)
		if len(kept) > 2*MaxLeaves*MaxLeaves {
			t.Fatalf("%d kept", len(kept))
		}
		all, few := append(slices.Clone(a), others...), append(pickOf(a, kept), others...)
		x, _ := r.Choose(all)
		y, _ := r.Choose(few)
		if (x == nil) != (y == nil) || !first(pickOf(all, x)).Equal(first(pickOf(few, y))) {
			t.Errorf("seed %d: %v of all, %v of those that are kept", seed, pickOf(all, x), pickOf(few, y))
		}
	}
}

// TestChooseGivesUp: where very many could be one and the same, it is not known whether
// there is a choice, and that is no yes.
func TestChooseGivesUp(t *testing.T) {
	var terms []Term
	var claims []Claim
	for i := range MaxLeaves {
		terms = append(terms, leaf(fmt.Sprint(i)))
		for k := range MaxLeaves - 1 { // one key fewer than there are leaves
			claims = append(claims, claim(i, k+1, 1+i*MaxLeaves+k, 9))
		}
	}
	got, unsure := must(t, All(terms...)).Choose(claims)
	if got != nil || !unsure {
		t.Errorf("chosen %v, unsure %t", got, unsure)
	}
	// What else meets the tree is found all the same.
	claims = append(claims, claim(MaxLeaves-1, 200, 200, 9))
	if got, unsure := must(t, AtLeast(1, All(terms[:MaxLeaves-1]...), terms[MaxLeaves-1])).Choose(claims); len(got) == 0 || unsure {
		t.Errorf("chosen %v, unsure %t", got, unsure)
	}
}
