package node_test

import (
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/notaryproject/notation-go/verifier/trustpolicy"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.yaml.in/yaml/v3"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

func TestAttach(t *testing.T) {
	ctx := t.Context()
	signer := notarytest.NewCA(notarytest.CAOptions{}).Leaf(notarytest.CertOptions{})
	for name, o := range map[string]node.RegistryOptions{"referrers": {}, "no referrers": {NoReferrers: true}} {
		t.Run(name, func(t *testing.T) {
			r := newRegistry(t, "registry.example", o)
			img := push(t, ctx, r, "app:1", node.ImageOptions{Index: true})
			var want []string
			for range 2 {
				a, err := r.Sign(ctx, img, signer)
				if err != nil {
					t.Fatal(err)
				}
				want = append(want, a.Manifest.Descriptor.Digest.String())
			}
			envelope := notarytest.MustSign(signer, img.Target, notarytest.SignOptions{})
			style := notarytest.Manifest(envelope, notary.MediaTypeJWS, img.Target, notarytest.ArtifactType)
			if err := r.Attach(ctx, img, style, node.AttachOptions{}); err != nil {
				t.Fatal(err)
			}
			want = append(want, style.Manifest.Descriptor.Digest.String())
			api := r.URL() + "/v2/app/referrers/" + img.Target.Digest.String()
			tag := r.URL() + "/v2/app/manifests/" + strings.Replace(img.Target.Digest.String(), ":", "-", 1)
			found, missing := api, tag
			if o.NoReferrers {
				found, missing = tag, api
			}
			if status, _ := get(t, missing); status != http.StatusNotFound {
				t.Errorf("%s: status %d", missing, status)
			}
			status, body := get(t, found)
			var index ocispec.Index
			if err := json.Unmarshal([]byte(body), &index); err != nil || status != http.StatusOK {
				t.Fatalf("%s: status %d: %v: %s", found, status, err, body)
			}
			if len(index.Manifests) != 3 {
				t.Fatalf("referrers: %s", body)
			}
			for _, d := range index.Manifests {
				if !o.NoReferrers && d.Digest == style.Manifest.Descriptor.Digest && d.ArtifactType == ocispec.MediaTypeEmptyJSON {
					d.ArtifactType = notary.ArtifactType // as this registry has it
				}
				if d.ArtifactType != notary.ArtifactType || !strings.Contains(strings.Join(want, " "), d.Digest.String()) {
					t.Errorf("referrer %+v", d)
				}
				if status, body := get(t, r.URL()+"/v2/app/manifests/"+d.Digest.String()); status != http.StatusOK || !strings.Contains(body, img.Target.Digest.String()) {
					t.Errorf("signature manifest: %d %s", status, body)
				}
			}
		})
	}
}

func TestRegistry(t *testing.T) {
	ctx := t.Context()
	a := newRegistry(t, "registry.example", node.RegistryOptions{})
	img := push(t, ctx, a, "app:1", node.ImageOptions{Word: "hello", Index: true})
	again := push(t, ctx, a, "app:2", node.ImageOptions{Word: "hello", Index: true})
	if img.Target.Digest != again.Target.Digest {
		t.Error("images with equal options differ")
	}
	b := newRegistry(t, "mirror.example", node.RegistryOptions{})
	if c, err := b.Copy(ctx, "copy/app:1", img); err != nil || c.Target.Digest != img.Target.Digest || c.Name != "mirror.example/copy/app:1" {
		t.Errorf("copy: %+v, %v", c, err)
	}
	if status, _ := get(t, b.URL()+"/v2/copy/app/manifests/"+img.Manifest.Digest.String()); status != http.StatusOK {
		t.Errorf("manifest in the copied index: status %d", status)
	}

	a.Fault(func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if strings.Contains(r.URL.Path, "/manifests/") {
				w.WriteHeader(http.StatusTeapot)
				return
			}
			h.ServeHTTP(w, r)
		})
	})
	a.Forget()
	url := a.URL() + "/v2/app/manifests/1"
	if status, _ := get(t, url); status != http.StatusTeapot {
		t.Errorf("with a fault: status %d", status)
	}
	a.Fault(nil)
	if status, _ := get(t, url); status != http.StatusOK {
		t.Errorf("after the fault: status %d", status)
	}
	var seen []int
	for _, r := range a.Requests() {
		seen = append(seen, r.Status)
	}
	if len(seen) != 2 || seen[0] != http.StatusTeapot || seen[1] != http.StatusOK {
		t.Errorf("requests: %+v", a.Requests())
	}
	addr := a.Addr
	if err := a.Stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := http.Get(url); err == nil {
		t.Error("a stopped registry answers")
	}
	if err := a.Start(); err != nil || a.Addr != addr {
		t.Errorf("started again on %s, was %s: %v", a.Addr, addr, err)
	}
	if status, _ := get(t, url); status != http.StatusOK {
		t.Errorf("started again: status %d", status)
	}
}

func TestWriteConfig(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "config")
	ca := notarytest.NewCA(notarytest.CAOptions{})
	c := node.Config{
		Mode:       "enforce",
		Mirrors:    []node.Mirror{{Host: "registry.example", URL: "http://127.0.0.1:5000"}},
		Stores:     notarytest.Stores{"ca/acme/root.crt": ca.PEM()},
		Statements: []verify.Statement{notarytest.Statement("acme")},
		More:       map[string]any{"gate": map[string]any{"wait": "50ms"}},
	}
	if err := node.WriteConfig(dir, c); err != nil {
		t.Fatal(err)
	}
	var policy trustpolicy.Document
	b, err := os.ReadFile(filepath.Join(dir, "trustpolicy.json"))
	if err == nil {
		err = json.Unmarshal(b, &policy)
	}
	if err == nil {
		err = policy.Validate()
	}
	if err != nil {
		t.Errorf("trustpolicy.json: %v\n%s", err, b)
	}
	if pem, err := os.ReadFile(filepath.Join(dir, "truststore/x509/ca/acme/root.crt")); err != nil || string(pem) != string(ca.PEM()) {
		t.Errorf("trust store: %v", err)
	}
	var doc struct {
		Version int
		Mode    string
		Sources struct{ Mirrors []node.Mirror }
		Gate    struct{ Wait string }
	}
	b, err = os.ReadFile(filepath.Join(dir, "config.yaml"))
	if err == nil {
		err = yaml.Unmarshal(b, &doc)
	}
	if err != nil || doc.Version != 1 || doc.Mode != "enforce" || len(doc.Sources.Mirrors) != 1 || doc.Sources.Mirrors[0] != c.Mirrors[0] || doc.Gate.Wait != "50ms" {
		t.Errorf("config.yaml: %+v, %v\n%s", doc, err, b)
	}
	if err := node.WriteConfig(dir, node.Config{}); err == nil {
		t.Error("wrote a configuration without a mode")
	}
}
