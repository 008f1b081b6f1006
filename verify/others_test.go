package verify

import (
	"context"
	"fmt"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// signedByOthers is a Holder that has a signature of another tool.
type signedByOthers struct{ holds }

func (signedByOthers) Holds(_ context.Context, _ Name, image ocispec.Descriptor, _ bool, b *Budget) error {
	b.Others.AddTag(image.Digest)
	return nil
}

// TestOthersAreSaid: a denial for want of a signature says what other tools signed.
func TestOthersAreSaid(t *testing.T) {
	const have = "a cosign tag is there, which no rule reads"
	for _, tt := range []struct {
		name    string
		sources []Source
		want    Reason
		detail  string
	}{
		{name: "it lists none", sources: []Source{on("a"), signedByOthers{on("b")}}, want: SignatureMissing,
			detail: "no test signature found at a, b; at b " + have},
		{name: "it cannot list", sources: []Source{signedByOthers{failing("b", fmt.Errorf("no tag: %w", ErrNoReferrers))}}, want: SourceNoReferrers,
			detail: "b: no tag: source cannot serve referrers; " + have},
		{name: "it has one that is not trusted", sources: []Source{signedByOthers{on("b", "SIGNER_UNTRUSTED")}}, want: SignerUntrusted,
			detail: "b: found SIGNER_UNTRUSTED"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := engine(tt.sources...).Evaluate(bg, bound())
			denied(t, d, tt.want)
			if d.Detail != tt.detail {
				t.Errorf("%q, want %q", d.Detail, tt.detail)
			}
			if a := d.Tried[len(d.Tried)-1]; tt.want != SignerUntrusted && a.Detail == "" {
				t.Errorf("the attempt does not say it: %+v", a)
			}
		})
	}
}
