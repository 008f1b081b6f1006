package policy

import (
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/go-ldap/ldap/v3"

	"github.com/tidewaiter/tidewaiter/verify"
)

const maxStatementName = 256 // bytes

// overridable are the checks that an override may name; integrity is not one.
var overridable = []string{"authenticity", "authenticTimestamp", "expiry", "revocation"}

// storeName is what notation allows for a named store; "." and ".." are refused
// apart.
var storeName = regexp.MustCompile(`^[a-zA-Z0-9_.-]+$`)

// maxStoreName is not in the expression, where each repetition would be compiled.
const maxStoreName = 255

// validate checks statements as the specification and notation-go's
// trustpolicy.Document.Validate do. It returns the first error, without a line.
func validate(list []verify.Statement) *Error {
	if len(list) == 0 {
		return &Error{Field: "trustPolicies", Text: "has no statement"}
	}
	if len(list) > maxStatements {
		return &Error{Field: "trustPolicies", Text: fmt.Sprintf("has more than %d statements", maxStatements)}
	}
	names := map[string]bool{}
	owner := map[string]int{} // canonical scope to statement
	for i, s := range list {
		fail := func(field, text string) *Error {
			return &Error{Field: join(statementPath(i), field), Text: text}
		}
		switch {
		case s.Name == "":
			return fail("name", "is required")
		case len(s.Name) > maxStatementName || verify.Clean(s.Name, maxStatementName) != s.Name:
			return fail("name", fmt.Sprintf("must be printable text of at most %d bytes", maxStatementName))
		case names[s.Name]:
			return fail("name", fmt.Sprintf("another statement is named %q too", s.Name))
		}
		names[s.Name] = true
		if field, err := checkVerification(s); err != nil {
			return fail("signatureVerification."+field, err.Error())
		}
		if len(s.Scopes) == 0 {
			return fail("registryScopes", `must list repositories, or "*"`)
		}
		if len(s.Scopes) > maxScopes {
			return fail("registryScopes", fmt.Sprintf("lists more than %d repositories", maxScopes))
		}
		written := map[string]bool{}
		for j, scope := range s.Scopes {
			field := index("registryScopes", j)
			c, err := ParseScope(scope)
			if err != nil {
				return fail(field, err.Error())
			}
			if c == "*" && len(s.Scopes) > 1 {
				return fail(field, `"*" must stand alone`)
			}
			if c == "*" && s.Level == "skip" {
				return fail("signatureVerification.level", `skip must not be used with scope "*"`)
			}
			if o, taken := owner[c]; taken && o != i {
				return fail(field, fmt.Sprintf("%q is a scope of statement %q too", c, list[o].Name))
			}
			if written[scope] {
				return fail(field, fmt.Sprintf("%q is listed twice", scope))
			}
			owner[c], written[scope] = i, true
		}
		if field, err := checkTrust(s); err != nil {
			return fail(field, err.Error())
		}
	}
	return nil
}

// checkVerification checks a statement's level, override and verifyTimestamp.
func checkVerification(s verify.Statement) (field string, err error) {
	switch s.Level {
	case "strict", "permissive", "audit", "skip":
	case "":
		return "level", errors.New("is required: strict, permissive, audit or skip")
	default:
		return "level", fmt.Errorf("%s is not strict, permissive, audit or skip", verify.Quote(s.Level, 64))
	}
	if s.Level == "skip" && len(s.Override) > 0 {
		return "override", errors.New("level skip cannot be overridden")
	}
	for _, check := range slices.Sorted(maps.Keys(s.Override)) {
		field := join("override", verify.Clean(check, 64))
		action := s.Override[check]
		switch {
		case check == "integrity":
			return field, errors.New("integrity cannot be overridden")
		case !slices.Contains(overridable, check):
			return field, errors.New("is not one of " + strings.Join(overridable, ", "))
		case action == "skip" && check != "revocation":
			return field, errors.New("only revocation can be skipped")
		case action != "enforce" && action != "log" && action != "skip":
			return field, fmt.Errorf("%s is not enforce, log or (revocation only) skip", verify.Quote(action, 64))
		}
	}
	switch s.VerifyTimestamp {
	case "", "always", "afterCertExpiry":
		return "", nil
	}
	return "verifyTimestamp", fmt.Errorf("%s is not always or afterCertExpiry", verify.Quote(s.VerifyTimestamp, 64))
}

// checkTrust checks a statement's trust stores and identities.
func checkTrust(s verify.Statement) (field string, err error) {
	if s.Level == "skip" {
		switch {
		case len(s.TrustStores) > 0:
			return "trustStores", errors.New("level skip uses none: remove them")
		case len(s.TrustedIdentities) > 0:
			return "trustedIdentities", errors.New("level skip uses none: remove them")
		}
		return "", nil
	}
	if len(s.TrustStores) == 0 {
		return "trustStores", errors.New(`must list trust stores, for example "ca:acme"`)
	}
	if len(s.TrustStores) > maxTrust {
		return "trustStores", fmt.Errorf("lists more than %d trust stores", maxTrust)
	}
	for i, ts := range s.TrustStores {
		kind, name, found := strings.Cut(ts, ":")
		switch {
		case !found, kind != "ca" && kind != "signingAuthority" && kind != "tsa":
			return index("trustStores", i), fmt.Errorf("%s is not ca:NAME, signingAuthority:NAME or tsa:NAME", verify.Quote(ts, 80))
		case len(name) > maxStoreName, !storeName.MatchString(name), name == ".", name == "..":
			return index("trustStores", i), fmt.Errorf("%s: a store's name has only letters, digits, _, . and -", verify.Quote(ts, 80))
		}
	}
	if len(s.TrustedIdentities) == 0 {
		return "trustedIdentities", errors.New(`must list identities, for example "x509.subject: C=US, ST=WA, O=acme", or "*"`)
	}
	if len(s.TrustedIdentities) > maxTrust {
		return "trustedIdentities", fmt.Errorf("lists more than %d identities", maxTrust)
	}
	var known []map[string]string
	var where []int
	for i, id := range s.TrustedIdentities {
		field := index("trustedIdentities", i)
		if id == "*" {
			if len(s.TrustedIdentities) > 1 {
				return field, errors.New(`"*" must stand alone`)
			}
			continue
		}
		kind, value, found := strings.Cut(id, ":")
		if !found || kind == "" {
			return field, fmt.Errorf(`%s is not "x509.subject: ..." or "*"`, verify.Quote(id, 80))
		}
		if kind != subject {
			continue // lint speaks of it
		}
		dn, err := parseDN(value)
		if err != nil {
			return field, err
		}
		for j, other := range known {
			if subset(dn, other) || subset(other, dn) {
				return field, fmt.Errorf("overlaps with trustedIdentities[%d]: one certificate could match both", where[j])
			}
		}
		known, where = append(known, dn), append(where, i)
	}
	return "", nil
}

// subject is the one kind of identity that notation knows.
const subject = "x509.subject"

// parseDN reads a distinguished name with the parser and the rules that
// notation-go judges certificates by (internal/pkix): C, ST and O are required,
// S means ST, no attribute occurs twice, no value is in hex.
func parseDN(s string) (map[string]string, error) {
	if strings.Contains(s, "=#") {
		// A certificate with an e-mail address in its subject prints so.
		return nil, errors.New(`"=#" in a distinguished name never matches; a certificate with an e-mail address in its subject cannot be named`)
	}
	dn, err := ldap.ParseDN(s)
	if err != nil {
		return nil, fmt.Errorf("%s is not a distinguished name: %s", verify.Quote(s, 160), verify.Clean(err.Error(), 120))
	}
	attributes := map[string]string{}
	for _, rdn := range dn.RDNs {
		if len(rdn.Attributes) > 1 {
			return nil, fmt.Errorf(`%s joins attributes with "+", which never matches`, verify.Quote(s, 160))
		}
		a := rdn.Attributes[0]
		if a.Type == "S" {
			a.Type = "ST"
		}
		if _, twice := attributes[a.Type]; twice {
			return nil, fmt.Errorf("%s has %s twice, which never matches", verify.Quote(s, 160), verify.Clean(a.Type, 32))
		}
		attributes[a.Type] = a.Value
	}
	for _, must := range []string{"C", "ST", "O"} {
		if attributes[must] == "" {
			return nil, fmt.Errorf("%s must have C, ST and O; %s is missing", verify.Quote(s, 160), must)
		}
	}
	return attributes, nil
}

// subset reports whether every attribute of a has the same value in b, as
// notation matches a certificate: an attribute with an empty value matches where
// it is missing.
func subset(a, b map[string]string) bool {
	for k, v := range a {
		if b[k] != v {
			return false
		}
	}
	return true
}
