package notary

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/notaryproject/notation-core-go/signature"
	"github.com/notaryproject/notation-go"
	"github.com/notaryproject/notation-go/verifier/trustpolicy"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// Options of a Checker.
type Options struct {
	Limits verify.Limits    // EnvelopeBytes and Certificates are used; zero means verify.DefaultLimits
	Now    func() time.Time // required
}

// A Checker checks envelopes under the statements that it was made with. It
// implements [verify.Checker], never uses a network, and keeps nothing.
type Checker struct {
	statements map[string]*statement
	limits     verify.Limits
	now        func() time.Time
}

var _ verify.Checker = (*Checker)(nil)

// New makes a Checker for statements that trust what store holds. It refuses,
// naming the statement, what it could not judge in full: an unknown level,
// override or kind of identity. Where a trust store is missing or empty (see
// Store.Holds), as in notation none of its type counts in the statement. A
// statement of level skip is accepted, since policies hold such statements, and
// verifies nothing.
func New(statements []verify.Statement, store *Store, o Options) (*Checker, error) {
	if store == nil || o.Now == nil {
		return nil, errors.New("notary: a trust store and a clock are required")
	}
	c := &Checker{statements: map[string]*statement{}, limits: o.Limits.Or(verify.DefaultLimits), now: o.Now}
	for _, s := range statements {
		if s.Name == "" {
			return nil, errors.New("trust policy: a statement has no name")
		}
		if c.statements[s.Name] != nil {
			return nil, fmt.Errorf("trust policy: two statements are called %q", s.Name)
		}
		st, err := newStatement(s, store)
		if err != nil {
			return nil, fmt.Errorf("trust policy: statement %q: %w", s.Name, err)
		}
		c.statements[s.Name] = st
	}
	return c, nil
}

// Kind implements [verify.Checker].
func (c *Checker) Kind() verify.Kind { return Kind }

// Requirement is a hash of the statement of that name and of the certificates
// in its trust stores. It changes when either does and is the same for statements
// that differ only in name and scopes. It is zero where the statement verifies
// nothing: it is unknown or its level is skip.
func (c *Checker) Requirement(name string) [32]byte {
	if st := c.statements[name]; st != nil {
		return st.requirement
	}
	return [32]byte{}
}

// Require is the requirement of one signature under the statement of that name.
func (c *Checker) Require(statement string) (*verify.Requirement, error) {
	return verify.SignedBy(verify.Leaf{Kind: Name, Authority: statement, Hash: c.Requirement(statement)})
}

// Check implements [verify.Checker]. The reasons are, in the order in which
// they are looked for:
//
//	POLICY_INVALID      the statement is unknown or of level skip
//	PENDING             ctx ended
//	LIMIT_EXCEEDED      the envelope or its chain is longer than the limits
//	SIGNATURE_INVALID   the bytes are not what the media type says, or ambiguous
//	SIGNER_UNTRUSTED    no certificate of the chain is in a trust store of the statement
//	SIGNATURE_INVALID   signature or chain are broken, or it signs something else
//	PLUGIN_UNSUPPORTED  the envelope asks for a verification plugin
//	IDENTITY_MISMATCH   the leaf is not one of the trusted identities
//	CRITICAL_ATTRIBUTE  a signed attribute, or an extension of a certificate in
//	                    the chain, is marked critical and not understood
//	SIGNATURE_EXPIRED   the signature's own expiry is past
//	CERTIFICATE_EXPIRED a certificate of the chain is not valid now, or not yet
//	TIMESTAMP_INVALID   the statement asks for a timestamp, and it is missing,
//	                    broken, not trusted, or not from the life of the chain
//	REVOCATION_UNKNOWN  a certificate names a place to ask, and nobody is asked
//
// The last four are warnings where the statement logs them.
func (c *Checker) Check(ctx context.Context, ev verify.Evidence, want ocispec.Descriptor, name string) (f verify.Finding) {
	defer func() {
		if p := recover(); p != nil {
			f = no(verify.SignatureInvalid, fmt.Sprintf("panic while checking a signature: %v", p))
		}
	}()
	st := c.statements[name]
	switch {
	case st == nil:
		return no(verify.PolicyInvalid, "the trust policy has no such statement")
	case st.library == nil:
		return no(verify.PolicyInvalid, `the statement verifies nothing: its level is "skip"`)
	case want.Digest.Validate() != nil || want.MediaType == "":
		return no(verify.Internal, "no descriptor to check a signature against")
	case ctx.Err() != nil:
		return no(verify.Pending, "the check ran out of time")
	case ev.Err != nil:
		return no(verify.SignatureInvalid, ev.Err.Error())
	}
	e, err := open(ev.MediaType, ev.Blob, c.limits)
	if errors.Is(err, verify.ErrBudget) {
		return no(verify.LimitExceeded, err.Error())
	}
	if err != nil {
		return no(verify.SignatureInvalid, err.Error())
	}
	signer := verify.Signer{Subject: text.Clean(e.chain[0].Subject.String(), 512), Thumbprint: thumbprint(e.chain[0])}
	trusted := false
	for _, anchors := range st.anchors {
		trusted = trusted || anchors.of(e.chain) != ""
	}
	if !trusted {
		f = no(verify.SignerUntrusted, fmt.Sprintf("no trust store of the statement has a certificate of the chain of %s; it expects a signer of %s", text.Quote(signer.Subject, 128), st.expects()))
		f.Signer = signer
		return f
	}
	return st.check(ctx, ev, e, signer, want, c.now(), c.limits.Certificates)
}

// check asks the library about an envelope whose chain holds an anchor, and
// judges what it says. It says who signed only once that is proven.
func (st *statement) check(ctx context.Context, ev verify.Evidence, e *envelope, signer verify.Signer, want ocispec.Descriptor, now time.Time, maxCertificates int) (f verify.Finding) {
	out, err := st.library.Verify(ctx, want, ev.Blob, notation.VerifierVerifyOptions{
		ArtifactReference: reference, SignatureMediaType: ev.MediaType,
	})
	if out == nil {
		return no(verify.Internal, fmt.Sprintf("the library has no result: %v", err))
	}
	if problem := enforced(out, trustpolicy.TypeIntegrity); errors.Is(problem, errNotEnforced) {
		return no(verify.Internal, problem.Error())
	} else if problem != nil {
		return no(verify.SignatureInvalid, "the envelope is broken: "+problem.Error())
	}
	if out.EnvelopeContent == nil {
		return no(verify.Internal, "the library has no content for an intact envelope")
	}
	info := &out.EnvelopeContent.SignerInfo
	// What was opened here and what the library verified must be the same.
	if !slices.EqualFunc(info.CertificateChain, e.chain, (*x509.Certificate).Equal) ||
		string(out.EnvelopeContent.Payload.Content) != string(e.payload) {
		return no(verify.SignatureInvalid, "the envelope can be read in two ways")
	}
	defer func() { f.Signer = signer }()
	scheme := info.SignedAttributes.SigningScheme
	if signer.Anchor = st.anchors[scheme].of(e.chain); signer.Anchor == "" {
		return no(verify.SignerUntrusted, fmt.Sprintf("the signature is of scheme %s, and no trust store of the statement for that scheme has a certificate of the chain", scheme))
	}
	if detail := mismatch(e.payload, want); detail != "" {
		return no(verify.SignatureInvalid, detail)
	}
	if plugin := pluginOf(info); plugin != "" { // the library stops at these (verifier.go:268)
		return no(verify.PluginUnsupported, "the envelope asks for a verification plugin ("+plugin+"); none are run here")
	}
	if problem := enforced(out, trustpolicy.TypeAuthenticity); errors.Is(problem, errNotEnforced) {
		return no(verify.Internal, problem.Error())
	} else if problem != nil {
		if _, untrusted := problem.(*signature.SignatureAuthenticityError); untrusted {
			return no(verify.SignerUntrusted, problem.Error())
		}
		detail := "the signer " + text.Quote(signer.Subject, 160) + " is not a trusted identity of the statement"
		if strings.HasPrefix(problem.Error(), "error while parsing the certificate subject") {
			detail += ", and its subject is of a form that no x509.subject can name"
		}
		return no(verify.IdentityMismatch, detail)
	}
	if twice := repeated(info.CertificateChain[0]); twice != "" && !st.anyIdentity {
		return no(verify.IdentityMismatch, "the subject of the signing certificate has "+twice+" more than once")
	}
	if err != nil || out.Error != nil {
		return no(verify.SignatureInvalid, fmt.Sprintf("the library refused the signature: %v", errors.Join(err, out.Error)))
	}
	f = st.judge(info, now, maxCertificates)
	if f.Reason == verify.Verified {
		f.Identity, f.Key = identityOf(e.chain), sha256.Sum256(e.chain[0].RawSubjectPublicKeyInfo)
		f.Signed, f.Metadata = want.Digest, metadata(e.payload)
	}
	return f
}

// identityOf is who a verified chain says signed: the key of its root, and the subject of
// its leaf. Not the anchor that a statement trusts in it, which may be the root in one and
// an authority below it in another: a signer with a renewed key would be two then.
func identityOf(chain []*x509.Certificate) verify.Identity {
	root := sha256.Sum256(chain[len(chain)-1].RawSubjectPublicKeyInfo)
	return verify.Identity(hex.EncodeToString(root[:]) + " " + chain[0].Subject.String())
}

// expects names the trust stores of the statement, "ca:acme", for a person.
func (st *statement) expects() string {
	var list []string
	for _, anchors := range st.anchors {
		for _, name := range anchors {
			store, _, _ := strings.Cut(name, "/")
			list = append(list, store)
		}
	}
	slices.Sort(list)
	if list = slices.Compact(list); len(list) == 0 {
		return "no trust store, since all of them are empty"
	}
	const most = 4
	if n := len(list) - most; n > 0 {
		list = append(list[:most:most], fmt.Sprintf("%d more", n))
	}
	return text.Clean(strings.Join(list, ", "), 160)
}

// no makes a finding that is none. Much of detail comes out of the envelope.
func no(r verify.Reason, detail string) verify.Finding {
	return verify.Finding{Reason: r, Detail: text.Clean(detail, 400)}
}

// errNotEnforced says that the library did not do as it was told.
var errNotEnforced = errors.New("the library did not enforce a check exactly once")

// enforced returns nil only if the library made this check exactly once,
// enforced it, and it passed. Of authenticity there is one result for the chain
// and the identity (verifier.go:319-352).
func enforced(out *notation.VerificationOutcome, check trustpolicy.ValidationType) error {
	var found []*notation.ValidationResult
	for _, r := range out.VerificationResults {
		if r.Type == check {
			found = append(found, r)
		}
	}
	if len(found) != 1 || found[0].Action != trustpolicy.ActionEnforce {
		return fmt.Errorf("%w: %s", errNotEnforced, check)
	}
	return found[0].Error
}

// mismatch says how the payload (signature-specification.md, "Payload") is not
// about want, or returns nothing.
func mismatch(payload []byte, want ocispec.Descriptor) string {
	var p struct {
		TargetArtifact ocispec.Descriptor `json:"targetArtifact"`
	}
	if err := json.Unmarshal(payload, &p); err != nil {
		return "payload: " + err.Error()
	}
	got := p.TargetArtifact
	switch {
	case got.Digest != want.Digest:
		return "the signature is for another image: " + text.Quote(got.Digest.String(), 96)
	case got.MediaType != want.MediaType:
		return "the signature is for the digest with another media type: " + text.Quote(got.MediaType, 96)
	case got.Size != want.Size:
		return fmt.Sprintf("the signature is for the digest with another size: %d", got.Size)
	}
	return ""
}

// metadata returns the annotations of the descriptor that was signed: what
// "notation sign --user-metadata" adds. What cannot be read is none.
func metadata(payload []byte) map[string]string {
	var p struct {
		TargetArtifact struct {
			Annotations map[string]string `json:"annotations"`
		} `json:"targetArtifact"`
	}
	if json.Unmarshal(payload, &p) != nil {
		return nil
	}
	return p.TargetArtifact.Annotations
}

// pluginOf returns the header that asks for a verification plugin, whatever its
// value is and whether or not it is critical.
func pluginOf(info *signature.SignerInfo) string {
	for _, a := range info.SignedAttributes.ExtendedAttributes {
		if k, ok := a.Key.(string); ok && strings.HasPrefix(k, "io.cncf.notary.verificationPlugin") {
			return text.Clean(k, 64)
		}
	}
	return ""
}

// repeated returns the OID of an attribute that the subject has twice. Go keeps
// one common name of several, and with it the library compares.
func repeated(leaf *x509.Certificate) string {
	seen := map[string]bool{}
	for _, a := range leaf.Subject.Names {
		oid := a.Type.String()
		if seen[oid] {
			return oid
		}
		seen[oid] = true
	}
	return ""
}

func thumbprint(c *x509.Certificate) string { return thumbprintOf(c.Raw) }

func thumbprintOf(der []byte) string {
	h := sha256.Sum256(der)
	return hex.EncodeToString(h[:])
}
