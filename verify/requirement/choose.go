package requirement

import (
	"cmp"
	"math/bits"
	"slices"
	"time"
)

// maxSteps bounds the search among the claims for one set of leaves. It is reached only if
// several leaves have many identities in common.
const maxSteps = 1 << 12

// A Claim is a finding that meets a leaf.
type Claim struct {
	Leaf     int // from 0
	Key      [32]byte
	Identity string
	Until    time.Time // when it ends; zero, which is not kept: before all others
	Tie      string    // orders those that are otherwise equal
}

// distinct reports whether the claims are of two identities: they have neither key nor
// identity in common. What is not known is not known to differ.
func (c Claim) distinct(o Claim) bool {
	return c.Key != [32]byte{} && o.Key != [32]byte{} && c.Key != o.Key && c.Identity != "" && o.Identity != "" && c.Identity != o.Identity
}

// compare orders those that end last first. It does not depend on the order in which
// they were found.
func compare(x, y Claim) int {
	return cmp.Or(y.Until.Compare(x.Until), cmp.Compare(x.Identity, y.Identity), slices.Compare(x.Key[:], y.Key[:]), cmp.Compare(x.Tie, y.Tie))
}

// Choose returns the places in claims of one for each leaf of a set that meets the tree, in
// the order of the leaves, all of them distinct: of all such choices the one whose first
// end comes last. nil: there is none. unsure: the search was given up before that was
// known.
func (r *Requirement) Choose(claims []Claim) (best []int, unsure bool) {
	if r == nil || len(r.leaves) == 0 {
		return nil, false
	}
	leaves, met := len(r.leaves), r.root.met
	per, have := make([][]int, leaves), uint(0)
	for i, c := range claims {
		if c.Leaf >= 0 && c.Leaf < leaves {
			per[c.Leaf], have = append(per[c.Leaf], i), have|1<<c.Leaf
		}
	}
	if have == 0 || !met(have) {
		return nil, false
	}
	for _, list := range per {
		slices.SortStableFunc(list, func(x, y int) int { return compare(claims[x], claims[y]) })
	}
	m := match{claims: claims}
	var tried []uint
	for n := 1; n <= leaves; n++ { // small sets first: a larger one is met by the same choice
		for set := uint(1); set <= have; set++ {
			if bits.OnesCount(set) != n || set&^have != 0 || !met(set) || slices.ContainsFunc(tried, func(t uint) bool { return t&set == t }) {
				continue
			}
			tried, m.lists, m.steps = append(tried, set), nil, maxSteps
			for i := range per {
				if set&(1<<i) != 0 {
					m.lists = append(m.lists, per[i])
				}
			}
			slices.SortStableFunc(m.lists, func(x, y []int) int { return cmp.Compare(len(x), len(y)) })
			m.run(nil)
			unsure = unsure || m.steps <= 0
		}
	}
	slices.SortFunc(m.best, func(x, y int) int { return cmp.Compare(claims[x].Leaf, claims[y].Leaf) })
	return m.best, unsure && m.best == nil
}

// Met reports whether the claims, all of which are used, meet the tree: there is one for
// each of some leaves, and no two are of one identity. It searches nothing.
func (r *Requirement) Met(claims []Claim) bool {
	set := uint(0)
	for i, c := range claims {
		if r == nil || c.Leaf < 0 || c.Leaf >= len(r.leaves) || set&(1<<c.Leaf) != 0 ||
			slices.ContainsFunc(claims[:i], func(o Claim) bool { return !c.distinct(o) }) {
			return false
		}
		set |= 1 << c.Leaf
	}
	return r != nil && r.root.met(set)
}

// A match searches one claim of each list, all of them distinct, such that the first to
// end does so after the first of best.
type match struct {
	claims []Claim
	lists  [][]int
	best   []int
	steps  int
}

func (m *match) run(chosen []int) {
	if len(chosen) == len(m.lists) {
		m.best = slices.Clone(chosen)
		return
	}
	for _, i := range m.lists[len(chosen)] {
		c := m.claims[i]
		if m.steps--; m.steps <= 0 || m.best != nil && !c.Until.After(m.ends()) {
			return // those that follow end no later
		}
		if !slices.ContainsFunc(chosen, func(o int) bool { return !c.distinct(m.claims[o]) }) {
			m.run(append(chosen, i))
		}
	}
}

// ends is when the first of best does.
func (m *match) ends() (t time.Time) {
	for n, i := range m.best {
		if end := m.claims[i].Until; n == 0 || end.Before(t) {
			t = end
		}
	}
	return t
}

// Thin returns the places in claims, all of one leaf, of those that are enough: each other
// one can be replaced in every choice by one of these that ends no earlier. The claims for
// other leaves in a choice have fewer than MaxLeaves keys, and as many identities. So of
// each key and of each identity MaxLeaves are enough, and of all 2*MaxLeaves*MaxLeaves,
// among which there are more that share neither key nor identity than the others can take.
func Thin(claims []Claim) (kept []int) {
	order := make([]int, len(claims))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(x, y int) int { return compare(claims[x], claims[y]) })
	keys, identities := map[[32]byte]int{}, map[string]int{}
	for _, i := range order {
		c := claims[i]
		if keys[c.Key] < MaxLeaves && identities[c.Identity] < MaxLeaves && len(kept) < 2*MaxLeaves*MaxLeaves {
			keys[c.Key], identities[c.Identity] = keys[c.Key]+1, identities[c.Identity]+1
			kept = append(kept, i)
		}
	}
	return kept
}
