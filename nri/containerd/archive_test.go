package containerd

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
)

type verifierFunc func(verify.Image) verify.Decision

func (f verifierFunc) Verify(_ context.Context, img verify.Image) verify.Decision { return f(img) }

// The refusal of an image from an archive says why its signature is not found, and the
// refusal of one that was pulled does not claim that it was imported.
func TestExplain(t *testing.T) {
	rec := newRecords()
	r := NewResolver(rec, testOptions())
	base := rec.image("app", "app")
	manifest := func(mediaType, config string, layers ...string) ocispec.Manifest {
		m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: mediaType, Config: ocispec.Descriptor{MediaType: config, Digest: base.config.Digest, Size: base.config.Size}}
		for _, l := range layers {
			m.Layers = append(m.Layers, ocispec.Descriptor{MediaType: l, Digest: digest.FromString(l), Size: 3})
		}
		return m
	}
	docker := func(layers ...string) ocispec.Manifest {
		return manifest(images.MediaTypeDockerSchema2Manifest, images.MediaTypeDockerSchema2Config, layers...)
	}
	oci := func(layers ...string) ocispec.Manifest {
		return manifest(ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig, layers...)
	}
	// As containerd makes it of an archive whose layers are compressed, and as docker
	// push wrote the same.
	same := docker(images.MediaTypeDockerSchema2LayerGzip)
	compact, err := json.Marshal(same)
	if err != nil {
		t.Fatal(err)
	}
	pushed, err := json.MarshalIndent(same, "", "   ")
	if err != nil {
		t.Fatal(err)
	}
	annotated := same
	annotated.Annotations = map[string]string{"a": "b"}
	fromArchive := map[string]ocispec.Descriptor{
		"containerd's":                         rec.put(images.MediaTypeDockerSchema2Manifest, docker(images.MediaTypeDockerSchema2Layer)),
		"containerd's with compressed layers":  rec.put(images.MediaTypeDockerSchema2Manifest, compact),
		"containerd's with layers of the node": rec.put(images.MediaTypeDockerSchema2Manifest, docker(images.MediaTypeDockerSchema2LayerGzip, images.MediaTypeDockerSchema2Layer)),
		"Docker 25's":                          rec.put(ocispec.MediaTypeImageManifest, oci(ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayer)),
	}
	notFrom := map[string]ocispec.Descriptor{
		"docker push's":        rec.put(images.MediaTypeDockerSchema2Manifest, pushed),
		"with annotations":     rec.put(images.MediaTypeDockerSchema2Manifest, annotated),
		"an OCI registry's":    rec.put(ocispec.MediaTypeImageManifest, oci(ocispec.MediaTypeImageLayerGzip)),
		"one layer of several": rec.put(ocispec.MediaTypeImageManifest, oci(ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayer)),
		"without layers":       base.manifest,
	}
	imported := fromArchive["containerd's"]
	fromRegistry := rec.put(ocispec.MediaTypeImageManifest, oci(ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayer))
	rec.pulled = map[digest.Digest]bool{fromRegistry.Digest: true}
	notFrom["of an archive's form, and pulled from a registry"] = fromRegistry
	answer := verify.Deny(verify.SignatureMissing, "nothing found")
	v := r.Explain(verifierFunc(func(verify.Image) verify.Decision { return answer }))
	ask := func(target ocispec.Descriptor) string {
		t.Helper()
		img := r.Bind(t.Context(), verify.Name{Host: "r.example", Path: "app"}, Record{"r.example/app", target})
		if img.Fault != nil {
			t.Fatal(img.Fault)
		}
		d := v.Verify(t.Context(), img)
		if d.Allowed() || d.Reason != answer.Reason {
			t.Errorf("the answer was changed: %v %s", d.Allowed(), d.Reason)
		}
		return d.Detail
	}
	for name, d := range fromArchive {
		if s := ask(d); !strings.Contains(s, "tidewaiter evidence export") || !strings.HasPrefix(s, "nothing found; ") {
			t.Errorf("%s: %s", name, s)
		}
	}
	for name, d := range notFrom {
		if s := ask(d); s != "nothing found" {
			t.Errorf("%s: %s", name, s)
		}
	}
	rec.pulledErr = errors.New("containerd is away")
	if s := ask(imported); s != "nothing found" {
		t.Errorf("containerd does not answer: %s", s)
	}
	// Who waits for nothing, as the hook where the answer is known, hears it too, and has
	// nobody asked.
	atOnce, cancel := context.WithCancel(t.Context())
	cancel()
	for name, target := range map[string]ocispec.Descriptor{importHint: imported, "": fromRegistry} {
		d := v.Verify(atOnce, r.Bind(t.Context(), verify.Name{Host: "r.example", Path: "app"}, Record{"r.example/app", target}))
		if d.Detail != "nothing found"+name {
			t.Errorf("at once: %s, want %q more", d.Detail, name)
		}
	}
	rec.pulledErr = nil
	if d := v.Verify(t.Context(), verify.Image{}); d.Detail != "nothing found" {
		t.Errorf("an image that is not known: %s", d.Detail)
	}
	answer = verify.Deny(verify.SignerUntrusted, "another")
	if s := ask(imported); s != "another" {
		t.Errorf("another reason: %s", s)
	}
}
