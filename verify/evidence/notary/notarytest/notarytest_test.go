package notarytest

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/notaryproject/notation-core-go/signature"
	"github.com/notaryproject/notation-go/dir"
	"github.com/notaryproject/notation-go/verifier/trustpolicy"
	"github.com/notaryproject/notation-go/verifier/truststore"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify/oci"
)

var image = NewBlob(ocispec.MediaTypeImageIndex, []byte(`{"schemaVersion":2}`)).Descriptor

// TestSign has notation-core-go read what the kit writes.
func TestSign(t *testing.T) {
	for _, key := range []KeyType{P256, P384, RSA2048, RSA3072} {
		ca := NewCA(CAOptions{Intermediates: 1})
		s := ca.Leaf(CertOptions{Key: key})
		protected, err := json.Marshal(JWSHeader(s))
		if err != nil {
			t.Fatal(err)
		}
		for name, env := range map[string]struct {
			mediaType string
			bytes     []byte
		}{
			"JWS":      {mediaTypeJWS, MustSign(s, image, SignOptions{})},
			"COSE":     {mediaTypeCOSE, MustSign(s, image, SignOptions{MediaType: mediaTypeCOSE})},
			"raw JWS":  {mediaTypeJWS, RawJWS(s, protected, Payload(image, nil))},
			"raw COSE": {mediaTypeCOSE, RawCOSE(s, COSEHeader(s), Payload(image, nil), nil)},
		} {
			e, err := signature.ParseEnvelope(env.mediaType, env.bytes)
			if err != nil {
				t.Fatalf("%s %s: %v", key, name, err)
			}
			c, err := e.Verify()
			if err != nil {
				t.Fatalf("%s %s: %v", key, name, err)
			}
			var p struct{ TargetArtifact ocispec.Descriptor }
			if err := json.Unmarshal(c.Payload.Content, &p); err != nil {
				t.Fatal(err)
			}
			if got := p.TargetArtifact; c.Payload.ContentType != PayloadType ||
				got.Digest != image.Digest || got.MediaType != image.MediaType || got.Size != image.Size {
				t.Errorf("%s %s: payload %s of type %s", key, name, c.Payload.Content, c.Payload.ContentType)
			}
			if got := c.SignerInfo.SignedAttributes.SigningTime; !got.Equal(SigningTime) {
				t.Errorf("%s %s: signed at %v", key, name, got)
			}
			if n := len(c.SignerInfo.CertificateChain); n != 3 {
				t.Errorf("%s %s: chain of %d", key, name, n)
			}
		}
	}
}

// TestSeed: fuzz workers are processes of their own and must trust the same CA.
func TestSeed(t *testing.T) {
	leaf := func(seed string) string {
		return NewCA(CAOptions{CertOptions: CertOptions{Seed: "root"}}).Leaf(CertOptions{Seed: seed}).Thumbprint()
	}
	if a := leaf("a"); a != leaf("a") || a == leaf("b") {
		t.Error("a seed does not make the certificate")
	}
}

func TestManifest(t *testing.T) {
	s := NewCA(CAOptions{}).Leaf(CertOptions{})
	for _, style := range []Style{ArtifactType, ConfigType} {
		a := Manifest(MustSign(s, image, SignOptions{}), mediaTypeJWS, image, style)
		got, err := opened(a.Manifest.Content, image)
		if err != nil || got.Digest != a.Envelope.Descriptor.Digest || got.MediaType != mediaTypeJWS {
			t.Errorf("style %d: envelope %v, %v", style, got, err)
		}
		if !strings.HasPrefix(a.Manifest.Descriptor.Annotations[Thumbprints], `["`+s.Thumbprint()+`"`) {
			t.Errorf("style %d: annotations %v", style, a.Manifest.Descriptor.Annotations)
		}
	}
	a := Manifest([]byte("junk"), mediaTypeJWS, image, ArtifactType)
	if _, ok := a.Manifest.Descriptor.Annotations[Thumbprints]; ok {
		t.Error("junk has thumbprints")
	}
}

// TestWriteConfig has notation-go read the configuration.
func TestWriteConfig(t *testing.T) {
	root, ca := t.TempDir(), NewCA(CAOptions{})
	s := Statement("prod", "x509.subject: C=US, ST=WA, O=acme")
	s.Override, s.VerifyTimestamp = map[string]string{"revocation": "skip"}, "always"
	if err := WriteConfig(root, Stores{"ca/acme/root.crt": ca.PEM()}, s); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(filepath.Join(root, "trustpolicy.json"))
	if err != nil {
		t.Fatal(err)
	}
	var doc trustpolicy.Document
	if err := json.Unmarshal(raw, &doc); err != nil {
		t.Fatal(err)
	}
	if err := doc.Validate(); err != nil {
		t.Error(err)
	}
	certs, err := truststore.NewX509TrustStore(dir.NewSysFS(root)).GetCertificates(context.Background(), truststore.TypeCA, "acme")
	if err != nil || len(certs) != 1 || !certs[0].Equal(ca.Root()) {
		t.Errorf("certificates %v, %v", certs, err)
	}
}

func opened(raw []byte, subject ocispec.Descriptor) (ocispec.Descriptor, error) {
	m, err := oci.Read(raw)
	if err != nil || len(m.Layers) != 1 || m.Subject == nil || m.Subject.Digest != subject.Digest {
		return ocispec.Descriptor{}, fmt.Errorf("no signature of %s: %v", subject.Digest, err)
	}
	return m.Layers[0], nil
}
