package main

import (
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/deploy/config"
)

// FuzzClaim feeds manifests of signatures that anybody may have written. What is
// taken from one is about the digest that was asked for, and an image.
func FuzzClaim(f *testing.F) {
	asked := digest.FromString("image")
	f.Add([]byte(`{"subject":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"` + asked.String() + `","size":7}}`))
	f.Add([]byte(`{"subject":{"mediaType":"application/vnd.docker.distribution.manifest.list.v2+json","digest":"` + asked.String() + `","size":7},"Subject":{"size":-1}}`))
	f.Add([]byte(`{"subject":{"mediaType":"application/pdf","digest":"` + asked.String() + `","size":7}}`))
	f.Add([]byte(`{"subject":null}`))
	for _, img := range world().images {
		for _, s := range img.signed {
			f.Add(s.Manifest.Content)
		}
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		d, ok := claim(raw, asked)
		if !ok && d.Digest != "" {
			t.Errorf("a descriptor without a yes: %v", d)
		}
		if ok && (d.Digest != asked || d.Size < 0 || !strings.Contains(d.MediaType, "manifest") && !strings.Contains(d.MediaType, "index")) {
			t.Errorf("took %v", d)
		}
	})
}

func TestClaim(t *testing.T) {
	s := world().images["signed"].signed[0]
	if d, ok := claim(s.Manifest.Content, s.subject.Digest); !ok || d.MediaType != s.subject.MediaType || d.Size != s.subject.Size {
		t.Errorf("a true one: %v, %v", d, ok)
	}
	for name, raw := range map[string]string{
		"another digest":   `{"subject":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:00","size":7}}`,
		"no image":         `{"subject":{"mediaType":"application/pdf","digest":"` + s.subject.Digest.String() + `","size":7}}`,
		"a negative size":  `{"subject":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"` + s.subject.Digest.String() + `","size":-1}}`,
		"a fraction":       `{"subject":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"` + s.subject.Digest.String() + `","size":1.5}}`,
		"no subject":       `{}`,
		"something else":   `[]`,
		"nothing whatever": ``,
	} {
		if d, ok := claim([]byte(raw), s.subject.Digest); ok {
			t.Errorf("%s: took %v", name, d)
		}
	}
}

func TestUnique(t *testing.T) {
	a := ocispec.Descriptor{MediaType: "a", Digest: "sha256:a", Size: 1}
	b := a
	b.Size = 2
	if u := unique([]ocispec.Descriptor{a, b, a, b, b}); len(u) != 2 || u[0].Size != 1 || u[1].Size != 2 {
		t.Errorf("unique: %v", u)
	}
}

// FuzzMirrorFlag feeds the one flag that has a syntax of its own. Nothing of it is
// repeated beyond a host.
func FuzzMirrorFlag(f *testing.F) {
	for _, s := range []string{
		"registry.test=http://127.0.0.1:5000", "*=https://[::1]/hub/", "docker.io:443=https://x.test", "=", "a=b=c",
		"registry.test=http://me:hunter2@x.test", "registry.test=http://x.test/?hunter2", "http://me:hunter2@x.test",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var c config.Config
		err := verifyOptions{mirrors: []string{s}}.listed(&c)
		if err != nil {
			if len(c.Mirrors) != 0 {
				t.Errorf("%q: an error and a mirror", s)
			}
			if len(err.Error()) > 400 || strings.ContainsAny(err.Error(), "\n\x1b\x00") {
				t.Errorf("%q: error %q", s, err)
			}
			return
		}
		m := c.Mirrors[0]
		if c.Network != config.NetworkMirrors || m.Host == "" || m.URL.Host == "" || m.URL.User != nil || m.URL.RawQuery != "" || m.URL.Fragment != "" ||
			m.URL.Scheme != "http" && m.URL.Scheme != "https" {
			t.Errorf("%q: took %+v, %v", s, m, m.URL)
		}
	})
}
