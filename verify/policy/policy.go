// Package policy reads a node's trust policy, says what is doubtful about it, and
// selects the statement that speaks of an image.
//
// [Parse] reads trustpolicy.json, [New] makes the [Policy] that a Decider asks,
// and [ParseName] gives image names the canonical form in which both sides are
// compared: the aliases of one repository reach the same statement, so that no
// spelling leads past a strict statement to a lax one.
//
// Nothing here reads a clock, a file or a network. Selecting is a lookup.
package policy

import (
	"fmt"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// A Policy selects the statement of a trust policy by its registryScopes
// (trust-store-trust-policy.md, "Selecting a trust policy based on artifact URI"):
// the statement that lists the repository, else the one with scope "*", else none.
// It does not change and is safe for concurrent use. The zero Policy matches
// nothing, which denies everything.
type Policy struct {
	exact     map[repository]*verify.Rule
	any       *verify.Rule // of scope "*"; nil without one
	allowlist allowlist    // goes before all statements
}

var _ verify.Policy = (*Policy)(nil)

type repository struct{ host, path string }

func (r repository) String() string { return verify.Name{Host: r.host, Path: r.path}.Repository() }

// New makes a Policy of statements, which it checks as Parse does. requirement
// returns the hash of a statement with its trust stores; it is not asked for a
// statement that can allow nothing, and zero is an error.
//
// A statement of level skip or audit, or with authenticity only logged, cannot
// say yes, since a stranger's signature or none meets it. It loads, with a
// Warning, and images that it matches are POLICY_INVALID: denied in enforce, and
// in audit recorded as what enforce would have refused, never as VERIFIED.
//
// The warnings are what Lint says of the statements under mode.
func New(statements []verify.Statement, mode verify.Mode, requirement func(statement string) (*verify.Requirement, error)) (*Policy, []Warning, error) {
	if err := validate(statements); err != nil {
		return nil, nil, err
	}
	p := &Policy{exact: map[repository]*verify.Rule{}}
	for i, s := range statements {
		rule := &verify.Rule{Name: s.Name}
		if why := weakness(s); why != "" {
			rule.Fixed = verify.PolicyInvalid
			rule.Detail = "its statement has " + why + ": give it level strict or permissive, without an override of authenticity"
		} else {
			var err error
			if rule.Require, err = requirement(s.Name); err != nil {
				return nil, nil, &Error{Field: statementPath(i), Text: fmt.Sprintf("statement %q: %v", s.Name, err)}
			}
		}
		for _, scope := range s.Scopes {
			r, err := split(scope)
			if err != nil {
				return nil, nil, err
			}
			if r.host == "*" {
				p.any = rule
			} else {
				p.exact[r] = rule
			}
		}
	}
	return p, Lint(statements, mode), nil
}

// Select implements [verify.Policy]. Callers must not change the rule.
func (p *Policy) Select(img verify.Image) *verify.Rule {
	if r := p.allowlist.of(img); r != nil {
		return r
	}
	n := img.Name
	if n.Host == "" || n.Path == "" {
		return &verify.Rule{Fixed: verify.PolicyNoMatch, Detail: "the image has no name that a statement could name"}
	}
	if r := p.exact[repository{n.Host, n.Path}]; r != nil {
		return r
	}
	if p.any != nil {
		return p.any
	}
	return &verify.Rule{
		Fixed:  verify.PolicyNoMatch,
		Detail: "no trust policy statement names " + text.Clean(n.Repository(), 256) + `: add it to the registryScopes of one, or a statement with scope "*"`,
	}
}

// weakness says why a signature of a stranger would meet s, or "".
func weakness(s verify.Statement) string {
	switch {
	case s.Level == "skip":
		return "level skip, which asks for no signature"
	case s.Level == "audit":
		return "level audit, which is for looking on only"
	case s.Override["authenticity"] == "log":
		return "authenticity: log, which takes anybody's signature"
	}
	return ""
}
