package stage

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

// TestInitial: the files of a first configuration are one that audits, with one signer.
func TestInitial(t *testing.T) {
	ca := notarytest.NewCA(notarytest.CAOptions{})
	leaf := ca.Leaf(notarytest.CertOptions{}).Chain[0]
	alone := notarytest.SelfSigned(notarytest.CertOptions{}).Chain[0]
	for _, tt := range []struct {
		name    string
		initial Initial
		want    string // the identity; empty: an error
		err     string
	}{
		{name: "a CA and a signer", initial: Initial{CA: ca.PEM(), Signer: notarytest.PEM(leaf)}, want: "x509.subject: " + leaf.Subject.String()},
		{name: "a signer with its chain", initial: Initial{CA: ca.PEM(), Signer: notarytest.PEM(leaf, ca.Root())}, want: "x509.subject: " + leaf.Subject.String()},
		{name: "a certificate that signs itself", initial: Initial{CA: notarytest.PEM(alone)}, want: "x509.subject: " + alone.Subject.String()},
		{name: "an identity", initial: Initial{CA: ca.PEM(), Identity: "x509.subject: C=US, ST=WA, O=acme"}, want: "x509.subject: C=US, ST=WA, O=acme"},
		{name: "a CA alone", initial: Initial{CA: ca.PEM()}, err: ErrNoIdentity.Error()},
		{name: "no certificate", initial: Initial{CA: []byte("hello")}, err: "the CA: expected certificates in PEM, got none"},
		{name: "no signing certificate", initial: Initial{CA: ca.PEM(), Signer: []byte("-----BEGIN X-----\nAAAA\n-----END X-----\n")}, err: `the signing certificate: expected a CERTIFICATE in PEM, got "X"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.initial.Name, tt.initial.Scopes = "acme", []string{"registry.test/app"}
			files, err := tt.initial.Files()
			if tt.err != "" {
				if err == nil || err.Error() != tt.err || (tt.err == ErrNoIdentity.Error()) != errors.Is(err, ErrNoIdentity) {
					t.Fatalf("%v, want %s", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			for name, raw := range files {
				if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(dir, name), raw, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			c, err := config.Load(dir)
			if err != nil {
				t.Fatal(err)
			}
			if c.Mode != verify.Audit || len(c.Statements) != 1 || strings.Join(c.Statements[0].TrustedIdentities, "|") != tt.want || strings.Join(c.Statements[0].Scopes, "|") != "registry.test/app" || len(c.Anchors()) == 0 || !strings.HasPrefix(c.Anchors()[0].File, "ca:acme/") {
				t.Errorf("%s: %+v", c.Mode, c.Statements)
			}
		})
	}
}
