package verify

import (
	"errors"
	"fmt"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestName(t *testing.T) {
	for _, tt := range []struct {
		name             Name
		repository, text string
	}{
		{Name{}, "", ""},
		{Name{Path: "app"}, "app", "app"},
		{Name{Host: "docker.io", Path: "library/nginx"}, "docker.io/library/nginx", "docker.io/library/nginx"},
		{Name{Host: "h:5000", Path: "a/b", Tag: "1"}, "h:5000/a/b", "h:5000/a/b:1"},
		{Name{Host: "[2001:db8::1]:5000", Path: "a", Tag: "1", Digest: "sha256:ab"}, "[2001:db8::1]:5000/a", "[2001:db8::1]:5000/a:1@sha256:ab"},
		{Name{Host: "h", Path: "a", Digest: "sha256:ab"}, "h/a", "h/a@sha256:ab"},
	} {
		if got := tt.name.Repository(); got != tt.repository {
			t.Errorf("Repository of %+v is %q, want %q", tt.name, got, tt.repository)
		}
		if got := tt.name.String(); got != tt.text {
			t.Errorf("String of %+v is %q, want %q", tt.name, got, tt.text)
		}
	}
}

func TestBinding(t *testing.T) {
	for b, want := range map[Binding]string{0: "none", BoundRuntime: "runtime", BoundSnapshot: "snapshot", BoundDigest: "digest", 99: "none"} {
		text, err := b.MarshalText()
		if b.String() != want || string(text) != want || err != nil {
			t.Errorf("binding %d is %q and %q (%v), want %q", b, b, text, err, want)
		}
	}
}

func TestSubjects(t *testing.T) {
	list := func(i Image) (names []digest.Digest) {
		for _, d := range i.subjects() {
			names = append(names, d.Digest)
		}
		return names
	}
	i := bound().Image
	if got, want := list(i), []digest.Digest{of("index"), of("manifest")}; fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("subjects are %v, want %v", got, want)
	}
	i.Target = i.Manifest
	if got, want := list(i), []digest.Digest{of("manifest")}; fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("subjects are %v, want %v", got, want)
	}
	want := list(i)
	for n := range 3 * MaxRelated {
		i.Related = append(i.Related, desc(fmt.Sprint(n)))
		if n < MaxRelated {
			want = append(want, of(fmt.Sprint(n)))
		}
	}
	if got := list(i); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("subjects are %v, want %v", got, want)
	}
	// What the store leads to comes before other records, and nothing twice.
	i = bound().Image
	i.Related, i.links = []ocispec.Descriptor{desc("other")}, []ocispec.Descriptor{desc("above"), i.Target, i.Manifest, desc("same config")}
	if got, want := list(i), []digest.Digest{of("index"), of("manifest"), of("above"), of("same config"), of("other")}; fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("subjects are %v, want %v", got, want)
	}
	i = bound().Image
	// The list is the caller's: what is appended does not end up in Others.
	room := make([]ocispec.Descriptor, 1, 10)
	i.Related = room
	_ = append(i.subjects(), desc("more"))
	if room[:2][1].Digest != "" {
		t.Error("subjects shares memory with Others")
	}
}

func TestFaultIsAnError(t *testing.T) {
	err := fmt.Errorf("binding: %w", &Fault{ImageAmbiguous, "two records"})
	var f *Fault
	if !errors.As(err, &f) || f.Reason != ImageAmbiguous || err.Error() != "binding: IMAGE_AMBIGUOUS: two records" {
		t.Errorf("fault is %v", err)
	}
}
