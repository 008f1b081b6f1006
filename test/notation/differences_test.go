package notation_test

import (
	"slices"
	"strings"
)

// A difference is one that is known and meant: the specification would have yes,
// and one of the two says no. docs/notation.md explains each under its name.
type difference struct {
	name string
	keys []string // patterns of questions
	// reasons are what Tidewaiter says to refuse: "no answer" of a configuration that
	// it does not load. Where there are none it is notation that says no.
	reasons []string
	// witness names, where notation says no, a question about the same kind of
	// signature and the same policy to which notation says yes.
	witness func(key string) string
}

func (d difference) is(key string) bool {
	return slices.ContainsFunc(d.patterns(), func(p string) bool { return matches(p, key) })
}

// patterns are the keys with a pattern for each of the alternatives "a|b" in them.
func (d difference) patterns() []string {
	list := slices.Clone(d.keys)
	for i := 0; i < len(list); i++ {
		parts := strings.Split(list[i], "/")
		for j, part := range parts {
			if first, rest, found := strings.Cut(part, "|"); found {
				parts[j] = rest
				list = append(list, strings.Join(parts, "/"))
				parts[j] = first
				list[i] = strings.Join(parts, "/")
			}
		}
	}
	return list
}

// instead makes a witness that has one part of the question's name replaced.
func instead(part int, by string) func(string) string {
	return func(key string) string {
		parts := strings.Split(key, "/")
		parts[part] = by
		return strings.Join(parts, "/")
	}
}

// differences are all that there are.
var differences = []difference{
	// Where Tidewaiter says no.
	{
		name:    "Levels that accept strangers",
		keys:    []string{"*/*/*/audit|skip|authenticity-logged/*"},
		reasons: []string{"POLICY_INVALID"},
	},
	{
		name:    "Unknown critical attributes",
		keys:    []string{"critical-attribute|critical-attribute-with-a-number/*/*/*/*"},
		reasons: []string{"CRITICAL_ATTRIBUTE"},
	},
	{
		name:    "Critical certificate extensions",
		keys:    []string{"critical-extension-of-leaf|critical-extension-of-root|name-constraints/*/*/*/*"},
		reasons: []string{"CRITICAL_ATTRIBUTE"},
	},
	{
		name:    "Verification plugins",
		keys:    []string{"installed-plugin|critical-plugin-version-alone/*/*/*/*"},
		reasons: []string{"PLUGIN_UNSUPPORTED"},
	},
	{
		name:    "Envelopes that can be read in two ways",
		keys:    []string{"payload-twice/*/*/*/*"},
		reasons: []string{"SIGNATURE_INVALID"},
	},
	{
		name: "Revocation",
		keys: []string{
			"good-crl/*/*/strict|identity|ca-store-alone|timestamp-logged|expiry-logged|permissive-revocation|tsa-after-expiry|tsa-permissive-revocation/*",
			"good-crl/*/authority/tsa/*",
			"timestamp-of-tsa-with-good-crl/*/x509/tsa|tsa-revocation-skipped/*",
		},
		reasons: []string{"REVOCATION_UNKNOWN"},
	},
	{
		name:    "Timestamps with more in them",
		keys:    []string{"timestamp-with-two-signatures|timestamp-with-critical-extension/*/*/tsa/*"},
		reasons: []string{"TIMESTAMP_INVALID"},
	},
	{
		name:    "Long chains, large envelopes",
		keys:    []string{"long-chain|large-envelope/*/*/strict|permissive/*"},
		reasons: []string{"LIMIT_EXCEEDED"},
	},
	{
		name:    "Signature manifests with another subject or none",
		keys:    []string{"manifest-of-another-subject|manifest-without-subject/*/*/*/*"},
		reasons: []string{"SIGNATURE_INVALID"},
	},
	{
		name:    "Artifact manifests",
		keys:    []string{"artifact-manifest/*/*/*/*"},
		reasons: []string{"SIGNATURE_INVALID"},
	},
	{
		name: "Policies read strictly",
		keys: []string{"good/*/*/skip-everything|unknown-field|misspelt-override|key-in-another-case|key-twice|text-after-policy|" +
			"scope-twice-by-alias|both-names|identity-of-another-kind/*"},
		reasons: []string{"no answer"},
	},
	{
		name:    "Files that others can write, and files that are no certificates",
		keys:    []string{"good/*/*/everybody-writes|readme-in-unused-store|certificate-named-txt/*"},
		reasons: []string{"no answer"},
	},
	{
		name:    "Names in canonical form",
		keys:    []string{"good/*/*/lax-for-alias/*"},
		reasons: []string{"SIGNER_UNTRUSTED"},
	},

	// Where notation says no.
	{
		name:    "Names in canonical form",
		keys:    []string{"good/*/*/alias-of-scope|scope-is-an-alias/*"},
		witness: instead(3, "exact-scope"),
	},
	{
		name:    "New-style signatures in layouts",
		keys:    []string{"*/*/*/*/layout-new"},
		witness: instead(4, "layout"),
	},
	{
		name:    "One bad referrer",
		keys:    []string{"broken-referrer-and-good|manifest-of-two-layers-and-good/*/*/*/*"},
		witness: instead(0, "good"),
	},
	{
		name:    "More than 100 signatures",
		keys:    []string{"110-strangers-and-good/*/*/*/*"},
		witness: instead(0, "good"),
	},
	{
		name:    "An index of which the manifest is signed",
		keys:    []string{"manifest-signed-index-asked/*/*/*/*"},
		witness: instead(0, "manifest-signed"),
	},
	{
		name:    "Signatures without the image",
		keys:    []string{"without-image/*/*/*/*"},
		witness: instead(0, "good"),
	},
	{
		name:    "trustpolicy.oci.json",
		keys:    []string{"good/*/*/named-trustpolicy.oci.json/*"},
		witness: instead(3, "strict"),
	},
	{
		name:    "Links",
		keys:    []string{"good/*/*/policy-is-a-link|store-is-a-link|certificate-is-a-link/*"},
		witness: instead(3, "strict"),
	},
}
