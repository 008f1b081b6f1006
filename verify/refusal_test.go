package verify

import (
	"io"
	"log/slog"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// BenchmarkRefusal is what is done for each refusal: the message and a line of log.
func BenchmarkRefusal(b *testing.B) {
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex, Digest: digest.FromString("target"), Size: 856}
	img := Image{
		Name: Name{Host: "registry.example", Path: "team/app", Tag: "1"}, Asked: "registry.example/team/app:1", Target: d, Manifest: d, Config: d.Digest,
		Use: UseContainer, Binding: BoundRuntime, Pod: Pod{"ns", "pod", "uid", "main"},
	}
	no := (&trace{require: by("x")}).refuse([]Attempt{{Source: "http://127.0.0.1:5000", Reason: SignatureMissing}}, time.Unix(1e9, 0))
	no.Rule, no.Binding = "all", BoundRuntime
	no.Key = Question{Image: img, Rule: &Rule{Name: "all", Require: by("x")}}.Key()
	b.Run("Message", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_ = no.Message(img, "edge-1")
		}
	})
	b.Run("Report", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_ = no.Report(img, "edge-1")
		}
	})
	log := slog.New(slog.NewJSONHandler(io.Discard, nil))
	b.Run("line", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			log.Info("decision", "hook", "ValidateContainerAdjustment", "decision", no.Report(img, "edge-1"))
		}
	})
	b.Run("ID", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_ = no.ID()
		}
	})
}
