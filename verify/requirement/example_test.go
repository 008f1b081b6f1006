package requirement_test

import (
	"crypto/sha256"
	"fmt"
	"time"

	"github.com/tidewaiter/tidewaiter/verify/requirement"
)

// The builder, and one of two others: whoever signs twice counts once.
func ExampleRequirement_Choose() {
	by := func(authority string) requirement.Term {
		return requirement.SignedBy(requirement.Leaf{Kind: "notary", Authority: authority, Hash: sha256.Sum256([]byte(authority))})
	}
	r, err := requirement.Require(requirement.All(by("builder"), requirement.AtLeast(1, by("qa"), by("security"))))
	if err != nil {
		fmt.Println(err)
		return
	}
	end := time.Date(2075, 1, 1, 0, 0, 0, 0, time.UTC)
	builder := requirement.Claim{Leaf: 0, Key: [32]byte{1}, Identity: "CN=builder", Until: end}
	same := requirement.Claim{Leaf: 1, Key: [32]byte{2}, Identity: "CN=builder", Until: end} // trusted as qa, too
	security := requirement.Claim{Leaf: 2, Key: [32]byte{3}, Identity: "CN=security", Until: end}
	for _, claims := range [][]requirement.Claim{{builder}, {builder, same}, {builder, same, security}} {
		best, _ := r.Choose(claims)
		fmt.Println(len(best) > 0, best)
	}
	// Output:
	// false []
	// false []
	// true [0 2]
}
