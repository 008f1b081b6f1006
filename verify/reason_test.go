package verify

import (
	"encoding/json"
	"slices"
	"testing"
)

// denials are all reasons of denials, in the order of DESIGN.md, "Reasons rank":
// those of policy and image first (they are all alike), then each before the next.
var unranked = []Reason{
	"", Internal, PolicyNoMatch, PolicyInvalid, ImageUnresolved, ImageMismatch, ImageAmbiguous,
	ImageVolumeUnverified, SnapshotterUnverified, RuntimeUnverified, PodTooLarge, Overloaded, "NOT_A_REASON",
}

var ranked = []Reason{
	SourceUnreachable, SourceUnauthorized, SourceNoReferrers, LimitExceeded, Pending,
	Revoked, RevocationUnknown, CertificateExpired, TimestampInvalid, SignatureExpired,
	NotAnImage, IdentityMismatch, CriticalAttribute, PluginUnsupported, ThresholdNotMet,
	SignerUntrusted, SignatureInvalid, SignatureMissing,
}

func TestRank(t *testing.T) {
	for _, r := range unranked {
		if r.rank() != 0 {
			t.Errorf("%q ranks %d, want first", string(r), r.rank())
		}
	}
	for i, r := range ranked {
		if r.rank() != i+1 {
			t.Errorf("%v ranks %d, want %d", r, r.rank(), i+1)
		}
	}
}

func TestReasons(t *testing.T) {
	unsettled := []Reason{ // exit status 2, DESIGN.md "Files and contract"
		"", SourceUnreachable, SourceUnauthorized, SourceNoReferrers, LimitExceeded, Pending, Overloaded,
		PolicyInvalid, Internal, ImageUnresolved, RevocationUnknown,
	}
	for _, r := range append(slices.Concat(unranked, ranked), Verified, AllowedByDigest, AuditOnly) {
		if got, want := r.Inconclusive(), slices.Contains(unsettled, r); got != want {
			t.Errorf("%q: unsettled %t, want %t", string(r), got, want)
		}
		if got, want := r.Allows(), r == Verified || r == AllowedByDigest; got != want {
			t.Errorf("%q: allows %t, want %t", string(r), got, want)
		}
		if got := audit(Decision{Reason: r}, Audit).EnforceReason(); got != Reason(r.String()) {
			t.Errorf("audit of %q: enforce says %q", string(r), got)
		}
		if got, want := (Decision{Reason: r}).EnforceReason(), Reason(r.String()); r != AuditOnly && got != want {
			t.Errorf("%q: enforce says %q", string(r), got)
		}
		want := r
		if r == "" || r == Verified || r == AllowedByDigest || r == AuditOnly {
			want = Internal
		}
		if d := Deny(r, "x"); d.Allowed() || d.Reason != want || d.Detail != "x" {
			t.Errorf("Deny(%q) is %+v", string(r), d)
		}
	}
}

func TestZeroReasonIsInternal(t *testing.T) {
	raw, err := json.Marshal(map[string]any{"a": Reason(""), "b": []Reason{"", Pending}})
	if got, want := string(raw), `{"a":"INTERNAL","b":["INTERNAL","PENDING"]}`; got != want || err != nil {
		t.Errorf("JSON is %s (%v), want %s", got, err, want)
	}
	if Reason("").String() != "INTERNAL" || Verified.String() != "VERIFIED" {
		t.Error("String is not the code")
	}
}
