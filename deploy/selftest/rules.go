package selftest

import (
	"cmp"

	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/verify/policy"
)

// A rule is one scope of a statement, with the name of an image in it.
type rule struct {
	statement string
	image     string
}

// rulesOf are those of a configuration, at most maxRules, and how many more there are.
// known is a repository that no statement names; empty: one is made up.
func rulesOf(s config.Summary, tag, known string) (rules []rule, more int) {
	for _, st := range s.Statements {
		for _, scope := range st.Scopes {
			if scope == "*" {
				scope = cmp.Or(known, elsewhere(s))
			}
			name, err := policy.ParseName(scope + ":" + tag)
			if err != nil {
				continue // such as a scope that is longer than a name may be
			}
			if len(rules) == maxRules {
				more++
				continue
			}
			rules = append(rules, rule{st.Name, name.String()})
		}
	}
	return rules, more
}

// elsewhere is a repository that no statement names: of a host whose mirror can say
// that it has no signature, or else of one that does not exist.
func elsewhere(s config.Summary) string {
	for _, m := range s.Mirrors {
		if m.Host != "*" {
			return m.Host + "/tidewaiter-selftest"
		}
	}
	return "tidewaiter-selftest.invalid/tidewaiter-selftest"
}
