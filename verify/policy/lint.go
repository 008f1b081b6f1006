package policy

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// A Warning is something in a valid trust policy that its author may not mean.
type Warning struct {
	Statement string // name of the statement; empty where it is about no statement
	Field     string // "trustPolicies[2].registryScopes[0]"
	Text      string // one clause
}

// String is the warning in one line.
func (w Warning) String() string {
	if w.Statement == "" {
		return w.Field + ": " + w.Text
	}
	return fmt.Sprintf("%s (statement %s): %s", w.Field, text.Quote(w.Statement, 64), w.Text)
}

// certificateAttributes are the attribute types that Go prints by name in a
// certificate's subject (crypto/x509/pkix). It prints others as OID=#hex, and
// notation-go refuses a subject that holds such.
var certificateAttributes = []string{"C", "ST", "L", "O", "OU", "CN", "STREET", "POSTALCODE", "SERIALNUMBER"}

// Lint returns what is doubtful in statements that Parse accepted, on a node that
// runs in mode. The order is that of the statements.
func Lint(statements []verify.Statement, mode verify.Mode) []Warning {
	var all []Warning
	for i, s := range statements {
		warn := func(field, format string, args ...any) {
			all = append(all, Warning{s.Name, join(statementPath(i), field), fmt.Sprintf(format, args...)})
		}
		lintLevel(s, mode, warn)
		lintScopes(s, warn)
		lintTrust(s, warn)
	}
	return all
}

func lintLevel(s verify.Statement, mode verify.Mode, warn func(field, format string, args ...any)) {
	const level = "signatureVerification.level"
	if why := weakness(s); why != "" {
		field, effect := level, "every image that it matches is refused"
		if s.Override["authenticity"] == "log" {
			field = "signatureVerification.override.authenticity"
		}
		if mode == verify.Audit {
			effect = "every image that it matches is recorded as one that enforce would refuse"
		}
		warn(field, "%s; %s", why, effect)
	}
	if s.Level == "permissive" {
		warn(level, "an expired signature, an expired certificate, a bad timestamp and unknown revocation are only logged unless an override enforces them")
	}
	for _, check := range slices.Sorted(maps.Keys(s.Override)) {
		if action := s.Override[check]; action != "enforce" && check != "authenticity" {
			warn("signatureVerification.override."+check, "a failed check of %s does not refuse an image (%s)", check, action)
		}
	}
}

func lintScopes(s verify.Statement, warn func(field, format string, args ...any)) {
	seen := map[string]string{}
	for j, scope := range s.Scopes {
		field := index("registryScopes", j)
		c, err := ParseScope(scope)
		if err != nil || c == "*" {
			continue
		}
		first, _, _ := strings.Cut(scope, "/")
		switch other, alias := seen[c]; {
		case alias:
			warn(field, "%q is the same repository as %q", scope, other)
		case !qualified(first) && !strings.Contains(first, ":") && strings.ToLower(first) == first:
			warn(field, "%q names no host and never matches a pod's %q, which means %q", scope, scope, hub+"/"+scope)
		case c != scope:
			warn(field, "%q is read as %q; notation itself compares letter by letter", scope, c)
		}
		seen[c] = scope
	}
}

func lintTrust(s verify.Statement, warn func(field, format string, args ...any)) {
	if s.Level == "skip" {
		return
	}
	tsa := false
	for j, ts := range s.TrustStores {
		tsa = tsa || strings.HasPrefix(ts, "tsa:")
		if slices.Contains(s.TrustStores[:j], ts) {
			warn(index("trustStores", j), "%q is listed twice", ts)
		}
	}
	if s.VerifyTimestamp != "" && !tsa {
		warn("signatureVerification.verifyTimestamp", "has no effect without a tsa trust store")
	}
	for j, id := range s.TrustedIdentities {
		field := index("trustedIdentities", j)
		if id == "*" {
			warn(field, `"*" trusts every certificate that the trust stores' CAs issue`)
			continue
		}
		_, value, _ := strings.Cut(id, ":")
		dn, err := parseDN(value)
		if err != nil {
			continue
		}
		for _, a := range slices.Sorted(maps.Keys(dn)) {
			if !slices.Contains(certificateAttributes, a) {
				warn(field, "attribute %s never matches; use %s", text.Quote(a, 32), strings.Join(certificateAttributes, ", "))
			}
		}
	}
}

// LintAliases returns the scopes of statements that match nothing, since an alias
// changes the names of their images before a statement is looked for.
func LintAliases(statements []verify.Statement, aliases []Alias) []Warning {
	var all []Warning
	for i, s := range statements {
		for j, scope := range s.Scopes {
			r, err := split(scope)
			if err != nil || r.host == "*" {
				continue
			}
			from := verify.Name{Host: r.host, Path: r.path}
			to := Unalias(aliases, from)
			// Another alias may lead to it: each name is changed once.
			if to == from || slices.ContainsFunc(aliases, func(a Alias) bool { return a.to.holds(r) }) {
				continue
			}
			all = append(all, Warning{s.Name, join(statementPath(i), index("registryScopes", j)),
				fmt.Sprintf("an alias changes the names of its images to %s before a statement is looked for: it matches nothing", text.Clean(to.Repository(), 256))})
		}
	}
	return all
}
