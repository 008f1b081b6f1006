package inspect

import (
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/tidewaiter/tidewaiter/cmd/internal/cli"
	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/policy"
)

// TestDigestLines reads the lines as the gate does: what counts, where, and what the
// exit status says of the rest.
func TestDigestLines(t *testing.T) {
	a, b := digest.FromString("a").String(), digest.FromString("b").String()
	row := func(target string, r verify.Reason, runs ...string) control.Image {
		return control.Image{Image: "registry.test/app:" + strings.ToLower(r.String()), Target: target, Reason: r.String(), Allowed: r == verify.Verified,
			Detail: "no notary signature found at mirror http://m.test", Runs: runs}
	}
	many := []string{"n1", "n2", "n3", "n4", "n5", "n6", "n7", "n8", "n9", "n10", "n11", "n12", "n13", "n14", "n15", "n16", "n17"}
	listed := row(a, verify.SignatureMissing, "default")
	listed.Namespaces = []string{"default"}
	for _, c := range []struct {
		name       string
		images     []control.Image
		namespaces []string
		want       map[string]string // namespaces by digest
		status     int
		text       string
	}{
		{name: "allowed", images: []control.Image{row(a, verify.Verified)}},
		{name: "unsigned, runs nowhere", images: []control.Image{row(a, verify.SignatureMissing)}, want: map[string]string{a: "kube-system"}, text: "; does not run now"},
		{name: "unsigned, runs", images: []control.Image{row(a, verify.SignatureMissing, "default", "tidewaiter-system")}, want: map[string]string{a: "default,tidewaiter-system"}, text: ": SIGNATURE_MISSING, no notary signature found at mirror http://m.test"},
		{name: "runs outside Kubernetes too", images: []control.Image{row(a, verify.SignatureMissing, "", "default")}, want: map[string]string{a: "default"}},
		{name: "namespaces of the command line", images: []control.Image{row(a, verify.PolicyNoMatch, "default")}, namespaces: []string{"shop"}, want: map[string]string{a: "shop"}, text: "; runs in default too"},
		{name: "more namespaces than a line may name", images: []control.Image{row(a, verify.SignerUntrusted, many...)}, want: map[string]string{a: strings.Join(many, ",")}},
		{name: "listed already", images: []control.Image{listed}, want: map[string]string{a: "default"}},
		{name: "forged", images: []control.Image{row(a, verify.SignatureInvalid, "default")}, status: cli.ExitNo, text: "# " + a + "  default  # registry.test/app:signature_invalid: SIGNATURE_INVALID"},
		{name: "another image than its name says", images: []control.Image{row(a, verify.ImageMismatch)}, status: cli.ExitNo},
		{name: "source away", images: []control.Image{row(a, verify.SourceUnreachable), row(b, verify.SignatureMissing)}, status: cli.ExitInconclusive, want: map[string]string{b: "kube-system"}, text: "# no line: registry.test/app:source_unreachable@" + a},
		{name: "too much at the source", images: []control.Image{row(a, verify.LimitExceeded)}, status: cli.ExitInconclusive},
		{name: "pending, overloaded", images: []control.Image{row(a, verify.Pending), row(b, verify.Overloaded)}, status: cli.ExitInconclusive},
		{name: "forged under another name", images: []control.Image{row(a, verify.SignatureMissing), row(a, verify.SignatureInvalid)}, status: cli.ExitNo},
		{name: "source of another name away", images: []control.Image{row(a, verify.SourceUnreachable), row(a, verify.SignatureMissing)}, status: cli.ExitInconclusive},
		{name: "unknown and forged", images: []control.Image{row(a, verify.SourceUnreachable), row(b, verify.SignatureInvalid)}, status: cli.ExitInconclusive},
		{name: "signed under another name", images: []control.Image{row(a, verify.Verified), row(a, verify.PolicyNoMatch)}, want: map[string]string{a: "kube-system"}},
		{name: "a signature that was imported", images: []control.Image{{Image: "registry.test/app@" + a, Target: a, Reason: verify.NotAnImage.String(), NotImage: true}}},
		{name: "no digest", images: []control.Image{row("", verify.ImageUnresolved)}, status: cli.ExitInconclusive, text: "# no line: registry.test/app:image_unresolved: IMAGE_UNRESOLVED"},
		{name: "words that are too long", images: []control.Image{{Image: strings.Repeat("x", 900) + "\n" + b, Target: a, Reason: "SIGNATURE_MISSING", Detail: strings.Repeat("y\n", 900), Runs: many}}, want: map[string]string{a: strings.Join(many, ",")}},
	} {
		text, status, err := DigestLines(control.Images{List: c.images}, c.namespaces)
		if err != nil || status != c.status || !strings.Contains(text, c.text) {
			t.Errorf("%s: status %d, %v: %s", c.name, status, err, text)
		}
		read, err := policy.ParseAllowlist("allowlist", []byte(text))
		if err != nil {
			t.Errorf("%s: %v: %s", c.name, err, text)
		}
		got := map[string]string{}
		for _, l := range read {
			d := l.Digest.String()
			got[d] = strings.TrimPrefix(got[d]+","+strings.Join(l.Namespaces, ","), ",")
		}
		if len(got) != len(c.want) || got[a] != c.want[a] || got[b] != c.want[b] {
			t.Errorf("%s: %v: %s", c.name, got, text)
		}
	}
	// Lines for the wrong namespaces are worse than none.
	half := control.Images{Unseen: "not every container could be looked at", List: []control.Image{row(a, verify.SignatureMissing)}}
	if text, _, err := DigestLines(half, nil); err == nil || text != "" {
		t.Errorf("%q, %v", text, err)
	}
	if _, _, err := DigestLines(half, []string{"shop"}); err != nil {
		t.Error(err)
	}
}
