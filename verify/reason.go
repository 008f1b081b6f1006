package verify

import "slices"

// A Reason is a stable code that says why a Decision came out as it did. The
// zero Reason prints as INTERNAL. docs/reasons.md says what to do about each.
type Reason string

// Reasons of denials. Their names never change; a new situation gets a new one.
const (
	SignatureMissing      Reason = "SIGNATURE_MISSING"
	SignatureInvalid      Reason = "SIGNATURE_INVALID"
	SignerUntrusted       Reason = "SIGNER_UNTRUSTED"
	IdentityMismatch      Reason = "IDENTITY_MISMATCH"
	SignatureExpired      Reason = "SIGNATURE_EXPIRED"
	CertificateExpired    Reason = "CERTIFICATE_EXPIRED"
	TimestampInvalid      Reason = "TIMESTAMP_INVALID"
	Revoked               Reason = "REVOKED"
	RevocationUnknown     Reason = "REVOCATION_UNKNOWN"
	CriticalAttribute     Reason = "CRITICAL_ATTRIBUTE"
	PluginUnsupported     Reason = "PLUGIN_UNSUPPORTED"
	ThresholdNotMet       Reason = "THRESHOLD_NOT_MET"
	NotAnImage            Reason = "NOT_AN_IMAGE"
	SourceUnreachable     Reason = "SOURCE_UNREACHABLE"
	SourceUnauthorized    Reason = "SOURCE_UNAUTHORIZED"
	SourceNoReferrers     Reason = "SOURCE_NO_REFERRERS"
	Pending               Reason = "PENDING"
	Overloaded            Reason = "OVERLOADED"
	LimitExceeded         Reason = "LIMIT_EXCEEDED"
	PolicyNoMatch         Reason = "POLICY_NO_MATCH"
	PolicyInvalid         Reason = "POLICY_INVALID"
	ImageUnresolved       Reason = "IMAGE_UNRESOLVED"
	ImageMismatch         Reason = "IMAGE_MISMATCH"
	ImageAmbiguous        Reason = "IMAGE_AMBIGUOUS"
	ImageVolumeUnverified Reason = "IMAGE_VOLUME_UNVERIFIED"
	SnapshotterUnverified Reason = "SNAPSHOTTER_UNVERIFIED"
	RuntimeUnverified     Reason = "RUNTIME_UNVERIFIED"
	PodTooLarge           Reason = "POD_TOO_LARGE"
	Internal              Reason = "INTERNAL"
)

// Reasons of decisions that allow.
const (
	Verified        Reason = "VERIFIED"
	AllowedByDigest Reason = "ALLOWED_BY_DIGEST" // a file of the node lists the digest
	AuditOnly       Reason = "AUDIT_ONLY"        // Decision.Would says what enforce would have answered
)

// String returns the code; the zero Reason is INTERNAL.
func (r Reason) String() string {
	if r == "" {
		return string(Internal)
	}
	return string(r)
}

// MarshalText writes the code as String does, so that no JSON holds an empty one.
func (r Reason) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// Allows reports whether enforce lets an image run with r.
func (r Reason) Allows() bool { return r == Verified || r == AllowedByDigest }

// denial is r where r can be the reason of a denial, and else INTERNAL.
func (r Reason) denial() Reason {
	if r == "" || r.Allows() || r == AuditOnly {
		return Internal
	}
	return r
}

// Inconclusive reports whether r says that the answer could not be found out,
// rather than that it is no, and may be different a moment later although nothing on the
// node changed: what a cache must not hold. The CLI ends with exit status 2 for these.
func (r Reason) Inconclusive() bool {
	return slices.Contains([]Reason{
		SourceUnreachable, SourceUnauthorized, SourceNoReferrers, LimitExceeded, Pending, Overloaded,
		PolicyInvalid, Internal, "", ImageUnresolved, RevocationUnknown,
	}, r)
}

// rank orders reasons from the one that says most (0) to the one that says
// least: first sources that were not conclusively asked, then the envelope that
// came furthest, and SIGNATURE_MISSING last, which is only true when nothing
// else is. A reason that is not listed is as bad as INTERNAL and goes first.
func (r Reason) rank() int {
	return max(0, slices.Index([]Reason{
		Internal,
		SourceUnreachable, SourceUnauthorized, SourceNoReferrers, LimitExceeded, Pending,
		Revoked, RevocationUnknown, CertificateExpired, TimestampInvalid, SignatureExpired,
		NotAnImage, IdentityMismatch, CriticalAttribute, PluginUnsupported, ThresholdNotMet,
		SignerUntrusted, SignatureInvalid, SignatureMissing,
	}, r))
}
