package notary

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/notaryproject/notation-core-go/revocation"
	"github.com/notaryproject/notation-core-go/revocation/result"
	"github.com/notaryproject/notation-core-go/signature"
	"github.com/notaryproject/notation-go"
	"github.com/notaryproject/notation-go/verifier"
	"github.com/notaryproject/notation-go/verifier/trustpolicy"
	"github.com/notaryproject/notation-go/verifier/truststore"

	"github.com/tidewaiter/tidewaiter/verify"
)

// An action says what becomes of a check that fails. The zero action enforces.
type action uint8

const (
	enforce action = iota
	warn
	skip
)

// Actions is what a statement says of the checks that are judged here. Integrity
// and authenticity are not among them: they are always enforced.
type actions struct{ timestamp, expiry, revocation action }

// actionsOf reads the level and the overrides of a statement
// (trust-store-trust-policy.md, "Signature Verification details"). The table in
// the library is not used: anybody can change it.
func actionsOf(s verify.Statement) (a actions, err error) {
	switch s.Level {
	case "strict":
	case "permissive", "audit":
		a = actions{warn, warn, warn}
	case "skip":
		if len(s.Override) > 0 {
			return a, errors.New(`level "skip" cannot be overridden`)
		}
		return actions{skip, skip, skip}, nil
	default:
		return a, fmt.Errorf("no verification level %q", s.Level)
	}
	for _, check := range slices.Sorted(maps.Keys(s.Override)) {
		var act action
		switch v := s.Override[check]; v {
		case "enforce":
		case "log":
			act = warn
		case "skip":
			act = skip
		default:
			return a, fmt.Errorf("override of %q: no action %q", check, v)
		}
		if act == skip && check != "revocation" {
			return a, fmt.Errorf("override of %q: it cannot be skipped", check)
		}
		switch check {
		case "authenticity": // stays enforced here whatever the statement says
		case "authenticTimestamp":
			a.timestamp = act
		case "expiry":
			a.expiry = act
		case "revocation":
			a.revocation = act
		default:
			return a, fmt.Errorf("override of %q: no such check, or it cannot be overridden", check)
		}
	}
	return a, nil
}

// A statement is a statement of the trust policy, ready to judge. A statement
// without a library judges nothing: its level is skip.
type statement struct {
	library     notation.Verifier
	anchors     map[signature.SigningScheme]names
	tsa         *x509.CertPool // roots for timestamps; nil where the statement asks for none
	afterExpiry bool           // timestamps count only once a certificate has expired
	actions     actions
	anyIdentity bool
	requirement [32]byte
	thumbprints []string // of the anchors of signers
}

// names has the name of each trusted certificate, "ca:acme/root.crt", by its DER.
type names map[string]string

// of returns the name of the first certificate of chain that has one.
func (n names) of(chain []*x509.Certificate) string {
	for _, c := range chain {
		if name := n[string(c.Raw)]; name != "" {
			return name
		}
	}
	return ""
}

// reference is the artifact that the library is asked about. It only selects
// the statement, of which there is one, for every scope; what a signature must be
// over is the descriptor (verifier.go:193-251).
const reference = "image.invalid/any@"

func newStatement(s verify.Statement, store *Store) (*statement, error) {
	a, err := actionsOf(s)
	if err != nil {
		return nil, err
	}
	st := &statement{
		actions: a, anyIdentity: slices.Contains(s.TrustedIdentities, "*"),
		anchors:     map[signature.SigningScheme]names{signature.SigningSchemeX509: {}, signature.SigningSchemeX509SigningAuthority: {}},
		afterExpiry: s.VerifyTimestamp == string(trustpolicy.OptionAfterCertExpiry),
	}
	if s.Level == "skip" {
		if len(s.TrustStores)+len(s.TrustedIdentities) > 0 {
			return nil, errors.New(`level "skip" has no use for trust stores and identities; remove them or verify`)
		}
		return st, nil
	}
	switch s.VerifyTimestamp {
	case "", string(trustpolicy.OptionAlways), string(trustpolicy.OptionAfterCertExpiry):
	default:
		return nil, fmt.Errorf("verifyTimestamp must be always or afterCertExpiry, not %q", s.VerifyTimestamp)
	}
	for _, id := range s.TrustedIdentities {
		if id != "*" && !strings.HasPrefix(id, "x509.subject:") {
			return nil, fmt.Errorf("trusted identity %q is of a kind that cannot be judged; use x509.subject", id)
		}
	}
	var signers []string        // the trust stores for signing chains
	var empty []truststore.Type // types of which a trust store holds no certificate
	for _, name := range s.TrustStores {
		t, _, _ := strings.Cut(name, ":")
		var into names
		switch truststore.Type(t) {
		case truststore.TypeCA:
			into = st.anchors[signature.SigningSchemeX509]
		case truststore.TypeSigningAuthority:
			into = st.anchors[signature.SigningSchemeX509SigningAuthority]
		case truststore.TypeTSA:
			if st.tsa == nil {
				st.tsa = x509.NewCertPool()
			}
		default:
			return nil, fmt.Errorf("trust store %q: no type of trust store %q", name, t)
		}
		if !store.Holds(name) {
			empty = append(empty, truststore.Type(t))
		}
		for _, an := range store.anchors[name] {
			if t == string(truststore.TypeTSA) {
				st.tsa.AddCert(an.cert)
			} else if der := string(an.cert.Raw); into[der] == "" {
				into[der] = an.name
			}
		}
		if t != string(truststore.TypeTSA) {
			signers = append(signers, name)
		}
	}
	// As in the library, a trust store without a certificate takes the others of its
	// type with it (helpers.go, loadX509TrustStoresWithType). It is no error: taking
	// the last root away must not leave an older configuration in force.
	for _, t := range empty {
		switch t {
		case truststore.TypeCA:
			clear(st.anchors[signature.SigningSchemeX509])
		case truststore.TypeSigningAuthority:
			clear(st.anchors[signature.SigningSchemeX509SigningAuthority])
		case truststore.TypeTSA:
			st.tsa = x509.NewCertPool()
		}
	}
	if len(s.TrustStores) > 0 && len(signers) == 0 {
		return nil, errors.New("it trusts timestamps and no signer; add a trust store of type ca")
	}
	// Expiry and validity are logged, timestamps are left out and revocation is
	// skipped, since the library asks a clock and a network of its own; see judge.go.
	st.library, err = verifier.NewWithOptions(&trustpolicy.Document{
		Version: "1.0",
		TrustPolicies: []trustpolicy.TrustPolicy{{
			Name:           s.Name,
			RegistryScopes: []string{"*"},
			SignatureVerification: trustpolicy.SignatureVerification{
				VerificationLevel: "strict",
				Override: map[trustpolicy.ValidationType]trustpolicy.ValidationAction{
					trustpolicy.TypeAuthenticTimestamp: trustpolicy.ActionLog,
					trustpolicy.TypeExpiry:             trustpolicy.ActionLog,
					trustpolicy.TypeRevocation:         trustpolicy.ActionSkip,
				},
			},
			TrustStores:       signers,
			TrustedIdentities: slices.Clone(s.TrustedIdentities),
		}},
	}, store, nil, verifier.VerifierOptions{
		RevocationCodeSigningValidator:  nobody{},
		RevocationTimestampingValidator: nobody{},
	})
	if err != nil {
		return nil, errors.New(strings.TrimPrefix(err.Error(), fmt.Sprintf("trust policy statement %q ", s.Name)))
	}
	st.requirement = requirementOf(s, store)
	for _, anchors := range st.anchors {
		for der := range anchors {
			st.thumbprints = append(st.thumbprints, thumbprintOf([]byte(der)))
		}
	}
	slices.Sort(st.thumbprints)
	st.thumbprints = slices.Compact(st.thumbprints)
	return st, nil
}

// nobody stands where the library would put validators that use a network.
type nobody struct{}

func (nobody) ValidateContext(context.Context, revocation.ValidateContextOptions) ([]*result.CertRevocationResult, error) {
	return nil, errors.New("revocation is not judged by the library")
}

// requirementOf hashes all that an answer under s depends on: the statement
// without its name and scopes, which no answer depends on, and each certificate of
// its trust stores with the name that findings give it.
func requirementOf(s verify.Statement, store *Store) [32]byte {
	h := sha256.New()
	write := func(list ...string) {
		h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(list))))
		for _, v := range list {
			h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(v))))
			h.Write([]byte(v))
		}
	}
	write("tidewaiter notary requirement 1", s.Level, s.VerifyTimestamp)
	for _, check := range slices.Sorted(maps.Keys(s.Override)) {
		write(check, s.Override[check])
	}
	write(s.TrustedIdentities...)
	write(s.TrustStores...)
	for _, name := range s.TrustStores {
		for _, a := range store.anchors[name] {
			write(a.name, string(a.cert.Raw))
		}
	}
	return [32]byte(h.Sum(nil))
}
