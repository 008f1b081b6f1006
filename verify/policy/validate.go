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
	"github.com/tidewaiter/tidewaiter/verify/text"
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
		case len(s.Name) > maxStatementName || text.Clean(s.Name, maxStatementName) != s.Name:
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
		return "level", fmt.Errorf("%s is not strict, permissive, audit or skip", text.Quote(s.Level, 64))
	}
	if s.Level == "skip" && len(s.Override) > 0 {
		return "override", errors.New("level skip cannot be overridden")
	}
	for _, check := range slices.Sorted(maps.Keys(s.Override)) {
		field := join("override", text.Clean(check, 64))
		action := s.Override[check]
		switch {
		case check == "integrity":
			return field, errors.New("integrity cannot be overridden")
		case !slices.Contains(overridable, check):
			return field, errors.New("is not one of " + strings.Join(overridable, ", "))
		case action == "skip" && check != "revocation":
			return field, errors.New("only revocation can be skipped")
		case action != "enforce" && action != "log" && action != "skip":
			return field, fmt.Errorf("%s is not enforce, log or (revocation only) skip", text.Quote(action, 64))
		}
	}
	switch s.VerifyTimestamp {
	case "", "always", "afterCertExpiry":
		return "", nil
	}
	return "verifyTimestamp", fmt.Errorf("%s is not always or afterCertExpiry", text.Quote(s.VerifyTimestamp, 64))
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
			return index("trustStores", i), fmt.Errorf("%s is not ca:NAME, signingAuthority:NAME or tsa:NAME", text.Quote(ts, 80))
		case len(name) > maxStoreName, !storeName.MatchString(name), name == ".", name == "..":
			return index("trustStores", i), fmt.Errorf("%s: a store's name has only letters, digits, _, . and -", text.Quote(ts, 80))
		}
	}
	if !slices.ContainsFunc(s.TrustStores, func(ts string) bool { return !strings.HasPrefix(ts, "tsa:") }) {
		return "trustStores", errors.New("trusts timestamps and no signer: add a store of type ca")
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
			return field, fmt.Errorf(`%s is not "x509.subject: ..." or "*"`, text.Quote(id, 80))
		}
		switch {
		case kind == "arn":
			return field, errors.New("an ARN names no certificate: signatures of AWS Signer ask for a plugin, and none is ever run")
		case kind != subject:
			return field, fmt.Errorf(`%s is a kind of identity that cannot be judged: write "x509.subject: C=US, ST=WA, O=acme"`, text.Quote(kind, 64))
		}
		dn, err := parseDN(strings.TrimSpace(value))
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
	if strings.HasPrefix(strings.TrimSpace(s), "/") {
		return nil, fmt.Errorf("%s has slashes, as older openssl prints a subject: write C=US, ST=WA, O=acme (openssl x509 -noout -subject -nameopt RFC2253)", text.Quote(s, 160))
	}
	dn, err := ldap.ParseDN(s)
	if err != nil {
		return nil, fmt.Errorf("%s is not a distinguished name: %s", text.Quote(s, 160), dnFault(s))
	}
	attributes := map[string]string{}
	for _, rdn := range dn.RDNs {
		if len(rdn.Attributes) > 1 {
			return nil, fmt.Errorf(`%s joins attributes with "+", which never matches`, text.Quote(s, 160))
		}
		a := rdn.Attributes[0]
		if a.Type == "S" {
			a.Type = "ST"
		}
		if _, twice := attributes[a.Type]; twice {
			return nil, fmt.Errorf("%s has %s twice, which never matches", text.Quote(s, 160), text.Clean(a.Type, 32))
		}
		attributes[a.Type] = a.Value
	}
	for _, must := range []string{"C", "ST", "O"} {
		if attributes[must] == "" {
			return nil, fmt.Errorf("%s must have C, ST and O; %s is missing%s", text.Quote(s, 160), must, missing(must, attributes))
		}
	}
	return attributes, nil
}

// dnFault says what is wrong with a distinguished name that does not parse.
func dnFault(s string) string {
	const comma = `a comma inside a value is written \, (in JSON \\,)`
	at := 0
	for i := 0; i <= len(s); i++ {
		switch {
		case i < len(s) && s[i] == '\\':
			i++
		case i == len(s) || s[i] == ',' || s[i] == ';':
			if part := strings.TrimSpace(s[at:i]); !strings.Contains(part, "=") {
				if strings.Contains(s, `"`) {
					return text.Quote(part, 64) + " is no NAME=value; quotes do not hold a value together, and " + comma
				}
				return text.Quote(part, 64) + " is no NAME=value; " + comma
			}
			at = i + 1
		}
	}
	return `a part of it is no NAME=value; , + " \ < > ; and spaces at the ends of a value are written with \ before them (in JSON \\)`
}

// missing is a hint about an attribute that a distinguished name must have.
func missing(must string, attributes map[string]string) string {
	for name := range attributes {
		if strings.EqualFold(name, must) {
			return ": capital letters count, write " + must
		}
	}
	if must == "ST" {
		return `; a certificate whose subject has none can be trusted only with "*" and a trust store of its own`
	}
	return ""
}

// Identifies reports whether a trusted identity other than "*" names the subject of a
// certificate, as pkix prints it. It is what notation compares (internal/pkix).
func Identifies(identity, certificate string) bool {
	kind, value, _ := strings.Cut(identity, ":")
	want, err := parseDN(value)
	if kind != subject || err != nil {
		return false
	}
	have, err := parseDN(certificate)
	return err == nil && subset(want, have)
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
