package notation_test

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

// scope is the repository of the images in layouts.
const scope = "registry.example/team/app"

// Checks of the specification (trust-store-trust-policy.md, "Signature
// Verification details"), as overrides name them. What signs something else is
// refused at every level, as is what cannot be parsed.
const (
	integrity    = "integrity"
	authenticity = "authenticity"
	timestamp    = "authenticTimestamp"
	expiry       = "expiry"
	revocation   = "revocation"
)

// A setting is a configuration directory.
type setting struct {
	name       string
	level      string
	override   map[string]string
	when       string // verifyTimestamp
	tsa        bool   // a tsa trust store is listed
	identities []string
	ca         bool                            // the CA is in a trust store of type ca alone
	exact      bool                            // the scopes are those of the images and not "*"
	ask        string                          // name to ask for instead of scope
	more       []verify.Statement              // further statements
	scopes     []string                        // instead of those of the images
	stores     []string                        // further trust stores
	meets      []string                        // the exhibits that one of directories meets; none: the good one
	edit       func(dir string) error          // of the directory once it is written
	document   func(trustpolicy string) string // edit of trustpolicy.json
	refused    bool                            // no signature can meet it
}

func override(kv ...string) map[string]string {
	m := map[string]string{}
	for i := 0; i < len(kv); i += 2 {
		m[kv[i]] = kv[i+1]
	}
	return m
}

// settings are what every exhibit meets.
var settings = []setting{
	{name: "strict"},
	{name: "permissive", level: "permissive"},
	{name: "audit", level: "audit"},
	{name: "skip", level: "skip", exact: true},
	{name: "authenticity-logged", override: override(authenticity, "log")},
	{name: "timestamp-logged", override: override(timestamp, "log")},
	{name: "expiry-logged", override: override(expiry, "log")},
	{name: "revocation-logged", override: override(revocation, "log")},
	{name: "revocation-skipped", override: override(revocation, "skip")},
	{name: "permissive-timestamp", level: "permissive", override: override(timestamp, "enforce")},
	{name: "permissive-expiry", level: "permissive", override: override(expiry, "enforce")},
	{name: "permissive-revocation", level: "permissive", override: override(revocation, "enforce")},
	{name: "identity", identities: []string{"x509.subject: C=US, ST=WA, O=acme"}},
	{name: "ca-store-alone", ca: true},
	{name: "tsa", tsa: true},
	{name: "tsa-after-expiry", tsa: true, when: "afterCertExpiry"},
	{name: "tsa-permissive", tsa: true, level: "permissive"},
	{name: "tsa-revocation-skipped", tsa: true, override: override(revocation, "skip")},
	{name: "tsa-after-expiry-revocation-logged", tsa: true, when: "afterCertExpiry", override: override(revocation, "log")},
	{name: "tsa-permissive-revocation", tsa: true, level: "permissive", override: override(revocation, "enforce")},
}

// directories are about the files and the scopes. They meet the good exhibit, if
// they name no others.
var directories = []setting{
	{name: "exact-scope", exact: true},
	{name: "other-scope", scopes: []string{"registry.example/other"}, refused: true},
	{name: "scope-of-a-prefix", scopes: []string{"registry.example/team"}, refused: true},
	{name: "exact-before-any", exact: true, more: []verify.Statement{{Name: "rest", Scopes: []string{"*"}, Level: "strict", TrustStores: []string{"ca:other"}, TrustedIdentities: []string{"*"}}}},
	{name: "any-after-exact", scopes: []string{"*"}, more: []verify.Statement{{Name: "exact", Scopes: []string{scope}, Level: "strict", TrustStores: []string{"ca:other"}, TrustedIdentities: []string{"*"}}}, refused: true},
	{name: "missing-store", identities: []string{"*"}, edit: remove("truststore/x509/ca/acme"), refused: true},
	{name: "second-store-missing", stores: []string{"ca:nowhere"}, refused: true},
	{name: "second-store-empty", stores: []string{"ca:nowhere"}, edit: func(dir string) error { return os.Mkdir(filepath.Join(dir, "truststore/x509/ca/nowhere"), 0o755) }, refused: true},
	{name: "second-authority-store-missing", stores: []string{"signingAuthority:nowhere"}},
	{name: "tsa-store-missing", meets: []string{"good-with-timestamp"}, tsa: true, edit: remove("truststore/x509/tsa"), refused: true},
	{name: "second-tsa-store-missing", meets: []string{"good-with-timestamp"}, tsa: true, stores: []string{"tsa:nowhere"}, refused: true},
	{name: "second-tsa-store-missing-without-need", tsa: true, when: "afterCertExpiry", stores: []string{"tsa:nowhere"}},
	{name: "intermediate-in-tsa-store", meets: []string{"good-with-timestamp"}, tsa: true, edit: func(dir string) error {
		return os.WriteFile(filepath.Join(dir, "truststore/x509/tsa/acme/more.crt"), notarytest.PEM(world.ca.Chain[0]), 0o644)
	}, refused: true},
	{name: "other-files-of-notation", edit: func(dir string) error {
		return errors.Join(write("config.json", `{"insecureRegistries":["registry.example"]}`)(dir), write("signingkeys.json", `{"keys":[]}`)(dir))
	}},
	{name: "limits-raised", meets: []string{"good", "long-chain", "large-envelope", "60-strangers-and-good", "stranger"},
		edit: write("config.yaml", "version: 1\nmode: enforce\nlimits: {certificates: 50, envelopeBytes: 4194304, referrers: 1000, signatures: 1000}\n")},
	{name: "mode-audit", meets: []string{"good", "stranger"}, edit: write("config.yaml", "version: 1\nmode: audit\n")},
	{name: "two-anys", more: []verify.Statement{{Name: "rest", Scopes: []string{"*"}, Level: "strict", TrustStores: []string{"ca:acme"}, TrustedIdentities: []string{"*"}}}, refused: true},
	{name: "identity-without-country", identities: []string{"x509.subject: ST=WA, O=acme"}, refused: true},
	{name: "identities-overlap", identities: []string{"x509.subject: C=US, ST=WA, O=acme", "x509.subject: C=US, ST=WA, O=acme, CN=signer"}, refused: true},
	{name: "integrity-logged", override: override(integrity, "log"), refused: true},
	{name: "expiry-skipped", override: override(expiry, "skip"), refused: true},
	{name: "version-2", document: replace(`"1.0"`, `"2.0"`), refused: true},
	{name: "root-as-der", edit: func(dir string) error {
		return os.WriteFile(filepath.Join(dir, "truststore/x509/ca/acme/root.crt"), world.ca.Root().Raw, 0o644)
	}},
	{name: "leaf-in-store", edit: func(dir string) error {
		return os.WriteFile(filepath.Join(dir, "truststore/x509/ca/acme/root.crt"), notarytest.PEM(world.signer.Chain[0]), 0o644)
	}, refused: true},
	{name: "text-before-pem", edit: func(dir string) error {
		return os.WriteFile(filepath.Join(dir, "truststore/x509/ca/acme/root.crt"), append([]byte("the root\n"), world.ca.PEM()...), 0o644)
	}},
	{name: "key-after-certificate", edit: func(dir string) error {
		const key = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"
		return os.WriteFile(filepath.Join(dir, "truststore/x509/ca/acme/root.crt"), append(world.ca.PEM(), key...), 0o644)
	}, refused: true},
	{name: "store-of-another-statement-missing", more: []verify.Statement{{Name: "else", Scopes: []string{"registry.example/else"}, Level: "strict", TrustStores: []string{"ca:nowhere"}, TrustedIdentities: []string{"*"}}}},
	{name: "identity-is-lower-case", identities: []string{"x509.subject: C=us, ST=WA, O=acme"}, refused: true},

	// Where notation and Tidewaiter differ: see differences.
	{name: "skip-everything", level: "skip"},
	{name: "alias-of-scope", exact: true, ask: "Registry.Example:443/team/app"},
	{name: "scope-is-an-alias", scopes: []string{"Registry.Example/team/app"}},
	{name: "lax-for-alias", ask: "Registry.Example/team/app", more: []verify.Statement{{Name: "exact", Scopes: []string{scope}, Level: "strict", TrustStores: []string{"ca:other"}, TrustedIdentities: []string{"*"}}}},
	{name: "unknown-field", document: replace(`"registryScopes"`, `"comment": "x", "registryScopes"`)},
	{name: "misspelt-override", document: replace(`"level": "strict"`, `"level": "strict", "overide": {"expiry": "enforce"}`)},
	{name: "key-in-another-case", document: replace(`"trustStores"`, `"TrustStores"`)},
	{name: "key-twice", document: replace(`"level": "strict"`, `"level": "audit", "level": "strict"`)},
	{name: "text-after-policy", document: func(s string) string { return s + "\n{}" }},
	{name: "scope-twice-by-alias", scopes: []string{scope}, more: []verify.Statement{{Name: "alias", Scopes: []string{"Registry.Example/team/app"}, Level: "strict", TrustStores: []string{"ca:acme"}, TrustedIdentities: []string{"*"}}}},
	{name: "named-trustpolicy.oci.json", edit: func(dir string) error {
		return os.Rename(filepath.Join(dir, "trustpolicy.json"), filepath.Join(dir, "trustpolicy.oci.json"))
	}},
	{name: "both-names", edit: func(dir string) error {
		return os.Link(filepath.Join(dir, "trustpolicy.json"), filepath.Join(dir, "trustpolicy.oci.json"))
	}},
	{name: "policy-is-a-link", edit: link("trustpolicy.json")},
	{name: "store-is-a-link", edit: link("truststore/x509/ca/acme")},
	{name: "certificate-is-a-link", edit: link("truststore/x509/ca/acme/root.crt")},
	{name: "everybody-writes", edit: func(dir string) error { return os.Chmod(filepath.Join(dir, "trustpolicy.json"), 0o666) }},
	{name: "readme-in-unused-store", edit: write("truststore/x509/ca/other/README", "hello")},
	{name: "certificate-named-txt", edit: func(dir string) error {
		dir = filepath.Join(dir, "truststore/x509/ca/acme")
		return os.Rename(filepath.Join(dir, "root.crt"), filepath.Join(dir, "root.txt"))
	}},
	{name: "identity-of-another-kind", identities: []string{"x509.subject: C=US, ST=WA, O=acme", "x509.san: acme.example"}},
}

func remove(path string) func(string) error {
	return func(dir string) error { return os.RemoveAll(filepath.Join(dir, path)) }
}

func write(path, content string) func(string) error {
	return func(dir string) error { return os.WriteFile(filepath.Join(dir, path), []byte(content), 0o644) }
}

func replace(old, by string) func(string) string {
	return func(s string) string { return strings.Replace(s, old, by, 1) }
}

// link moves path elsewhere in the directory and makes it a link to there.
func link(path string) func(string) error {
	return func(dir string) error {
		to := filepath.Join(dir, "..data")
		if err := os.Mkdir(to, 0o755); err != nil {
			return err
		}
		path, to = filepath.Join(dir, path), filepath.Join(to, filepath.Base(path))
		if err := os.Rename(path, to); err != nil {
			return err
		}
		rel, err := filepath.Rel(filepath.Dir(path), to)
		if err != nil {
			return err
		}
		return os.Symlink(rel, path)
	}
}

// enforces says what the table of levels in the specification and the overrides
// make of a check that fails.
func (s setting) enforces(check string) bool {
	if s.level == "skip" {
		return false
	}
	if a := s.override[check]; a != "" {
		return a == "enforce"
	}
	switch s.level {
	case "permissive":
		return check == integrity || check == authenticity
	case "audit":
		return check == integrity
	}
	return true
}

// write makes the directory; repositories are the scopes of an exact setting.
func (s setting) write(dir string, repositories []string) error {
	st := verify.Statement{
		Name: "prod", Scopes: []string{"*"}, Level: s.level, Override: s.override, VerifyTimestamp: s.when,
		TrustStores: []string{"ca:acme"}, TrustedIdentities: s.identities,
	}
	if !s.ca {
		st.TrustStores = append(st.TrustStores, "signingAuthority:acme")
	}
	if s.tsa {
		st.TrustStores = append(st.TrustStores, "tsa:acme")
	}
	st.TrustStores = append(st.TrustStores, s.stores...)
	if s.level == "" {
		st.Level = "strict"
	}
	if len(s.identities) == 0 {
		st.TrustedIdentities = []string{"*"}
	}
	if s.exact {
		st.Scopes = repositories
	}
	if len(s.scopes) > 0 {
		st.Scopes = s.scopes
	}
	if s.level == "skip" {
		st.TrustStores, st.TrustedIdentities = nil, nil
	}
	stores := notarytest.Stores{
		"ca/acme/root.crt":               world.ca.PEM(),
		"signingAuthority/acme/root.crt": notarytest.PEM(slices.Collect(maps.Values(world.authorities))...),
		"tsa/acme/root.crt":              world.tsaCA.PEM(),
		"ca/other/root.crt":              world.otherCA.PEM(),
	}
	// The CAs that are made for one exhibit are trusted too.
	for name, c := range world.authorities {
		stores["ca/acme/"+name+".crt"] = notarytest.PEM(c)
	}
	if err := notarytest.WriteConfig(dir, stores, append([]verify.Statement{st}, s.more...)...); err != nil {
		return err
	}
	if s.document != nil {
		path := filepath.Join(dir, "trustpolicy.json")
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(s.document(string(b))), 0o644); err != nil {
			return err
		}
	}
	if s.edit != nil {
		return s.edit(dir)
	}
	return nil
}
