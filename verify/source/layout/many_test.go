package layout_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/layout"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

// age has the files that tell the version of a layout be an hour old.
func age(t testing.TB, name string) {
	t.Helper()
	then := time.Now().Add(-time.Hour)
	for _, f := range []string{name, filepath.Join(name, "index.json"), filepath.Join(name, "blobs/sha256")} {
		if err := os.Chtimes(f, then, then); err != nil && f == name {
			t.Fatal(err)
		}
	}
}

// TestTenThousand: a layout of 10,000 images answers for each of them, whatever of it is
// signed, and reads it once.
func TestTenThousand(t *testing.T) {
	t.Parallel()
	const images = 10_000
	var c sourcetest.Content
	type image struct {
		index, manifest ocispec.Descriptor
		ofIndex         bool
		want            []verify.Evidence
	}
	ask := map[int]image{}
	for i := range images {
		manifest := c.Add(ocispec.MediaTypeImageManifest, fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"digest":%q,"size":2},"layers":[],"annotations":{"n":"%d"}}`,
			ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig, digest.FromString("{}"), i))
		index := c.Add(ocispec.MediaTypeImageIndex, fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"manifests":[{"mediaType":%q,"digest":%q,"size":%d}]}`,
			ocispec.MediaTypeImageIndex, manifest.MediaType, manifest.Digest, manifest.Size))
		c.Images = append(c.Images, index)
		im := image{index: index, manifest: manifest}
		switch i % 3 {
		case 0:
			im.ofIndex, im.want = true, []verify.Evidence{c.Sign(index, sourcetest.MediaTypeA, "envelope")}
		case 1:
			im.want = []verify.Evidence{c.Sign(manifest, sourcetest.MediaTypeA, "envelope")}
		}
		if i < 3 || i >= images-3 || i/3 == images/6 {
			ask[i] = im
		}
	}
	dir := t.TempDir()
	sourcetest.Layout(t, dir, c, false)
	for form, name := range map[string]string{"directory": dir, "tar file": packed(t, dir)} {
		t.Run(form, func(t *testing.T) {
			age(t, name)
			src := (&layout.Room{Now: time.Now}).New(name)
			reads := src.Reads()
			var before int64
			for i, im := range ask {
				for _, subject := range []ocispec.Descriptor{im.index, im.manifest} {
					got, err := sourcetest.Find(t.Context(), src, subject, verify.Limits{})
					if err != nil {
						t.Errorf("image %d: %v", i, err)
					}
					want := im.want
					if im.ofIndex != (subject.Digest == im.index.Digest) {
						want = nil
					}
					sourcetest.Check(t, got, want, 0)
					n := reads.Load()
					if n -= before; before > 0 && n > 3 || n > 3*images {
						t.Errorf("image %d: %d reads", i, n)
					}
					before = reads.Load()
				}
			}
			if src.Remembers() == 0 || src.Remembers() > 16<<20 {
				t.Errorf("it remembers some %d bytes", src.Remembers())
			}
		})
	}
}

// TestManyAsk: those who ask while somebody reads the layout get the same answers.
func TestManyAsk(t *testing.T) {
	t.Parallel()
	var c sourcetest.Content
	var subjects []ocispec.Descriptor
	var want []verify.Evidence
	for i := range 300 {
		subjects = append(subjects, c.Image(fmt.Sprint("app ", i)))
		want = append(want, c.Sign(subjects[i], sourcetest.MediaTypeA, fmt.Sprint("envelope ", i), func(m *ocispec.Manifest) {
			if i%2 == 0 {
				sourcetest.OldStyle(m)
			}
		}))
	}
	dir := t.TempDir()
	sourcetest.Layout(t, dir, c, false)
	for name, old := range map[string]bool{"has just changed": false, "is old": true} {
		t.Run(name, func(t *testing.T) {
			if old {
				age(t, dir)
			}
			src := (&layout.Room{Now: time.Now}).New(dir)
			var wg sync.WaitGroup
			for i := range 16 {
				wg.Go(func() {
					got, err := sourcetest.Find(t.Context(), src, subjects[i*17], verify.Limits{})
					if err != nil {
						t.Error(err)
					}
					sourcetest.Check(t, got, want[i*17:i*17+1], 0)
				})
			}
			wg.Wait()
		})
	}
}

// TestReadsOn: a question that ends early leaves what it read to the next one.
func TestReadsOn(t *testing.T) {
	t.Parallel()
	var c sourcetest.Content
	for i := range 500 {
		c.Image(fmt.Sprint("other ", i))
	}
	subject := c.Image("app")
	want := c.Sign(subject, sourcetest.MediaTypeA, "envelope")
	dir := t.TempDir()
	sourcetest.Layout(t, dir, c, false)
	age(t, dir)
	src := (&layout.Room{Now: time.Now}).New(dir)
	reads := src.Reads()
	// What is said to be a signature goes first, and is handed over at once.
	err := src.Find(t.Context(), verify.Name{}, subject, verify.NewBudget(sourcetest.Kind, verify.Limits{}), func(ev verify.Evidence) bool { return false })
	if n := reads.Load(); err != nil || n > 6 {
		t.Errorf("%d reads, error %v", n, err)
	}
	got, err := sourcetest.Find(t.Context(), src, subject, verify.Limits{})
	if n := reads.Load(); err != nil || n < 500 || n > 520 {
		t.Errorf("%d reads, error %v", n, err)
	}
	sourcetest.Check(t, got, []verify.Evidence{want}, 0)
}

// TestChanges: what somebody writes, repairs or takes away later counts at once, of a
// layout that was read long ago, too.
func TestChanges(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		before, after func(t *testing.T, manifest string, raw []byte)
		err           error // before
	}{
		"the manifest comes later": {
			func(t *testing.T, manifest string, _ []byte) { remove(t, manifest) },
			func(t *testing.T, manifest string, raw []byte) { write(t, "", manifest, string(raw)) },
			verify.ErrUnreachable,
		},
		"the manifest is not yet whole": {
			func(t *testing.T, manifest string, raw []byte) { write(t, "", manifest, string(raw[:20])) },
			func(t *testing.T, manifest string, raw []byte) { write(t, "", manifest, string(raw)) },
			verify.ErrUnreachable,
		},
		"what it links to comes later": {
			func(t *testing.T, manifest string, _ []byte) {
				remove(t, manifest)
				if err := os.Symlink("../../later", manifest); err != nil {
					t.Fatal(err)
				}
			},
			func(t *testing.T, manifest string, raw []byte) { write(t, "", manifest, string(raw)) },
			verify.ErrUnreachable,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, subject, want := site(t)
			manifest := blob(dir, want[0].Manifest.Digest)
			raw, err := os.ReadFile(manifest)
			if err != nil {
				t.Fatal(err)
			}
			tt.before(t, manifest, raw)
			age(t, dir)
			src := (&layout.Room{Now: time.Now}).New(dir)
			for range 2 {
				got, err := sourcetest.Find(t.Context(), src, subject, verify.Limits{})
				if !errors.Is(err, tt.err) {
					t.Error(err)
				}
				sourcetest.Check(t, got, nil, 0)
			}
			tt.after(t, manifest, raw)
			got, err := sourcetest.Find(t.Context(), src, subject, verify.Limits{})
			if err != nil {
				t.Error(err)
			}
			sourcetest.Check(t, got, want, 0)
			remove(t, manifest)
			got, err = sourcetest.Find(t.Context(), src, subject, verify.Limits{})
			if !errors.Is(err, verify.ErrUnreachable) {
				t.Error(err)
			}
			sourcetest.Check(t, got, nil, 0)
		})
	}
}

func remove(t *testing.T, name string) {
	t.Helper()
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
}

// TestCatalogWithoutRoom: a catalog that lacks something is not one without signatures,
// and what it has still counts. Layouts share the room.
func TestCatalogWithoutRoom(t *testing.T) {
	t.Parallel()
	var c sourcetest.Content
	subject := c.Image("app")
	want := c.Sign(subject, sourcetest.MediaTypeA, "envelope")
	for i := range 100 {
		c.Image(fmt.Sprint("other ", i))
	}
	other := c.Image("unsigned")
	c.Images[0], c.Images[1] = c.Images[1], c.Images[0]
	dir := t.TempDir()
	sourcetest.Layout(t, dir, c, true) // the tag is the last entry
	age(t, dir)
	var clock atomic.Int64
	room := layout.Room{Now: func() time.Time { return time.Now().Add(time.Duration(clock.Load())) }}
	free := room.Fill(50 * 192)
	src, second := room.New(dir), room.New(dir)
	for _, src := range []*layout.Source{src, second} {
		if got, err := sourcetest.Find(t.Context(), src, other, verify.Limits{}); !errors.Is(err, verify.ErrBudget) || len(got) != 0 {
			t.Errorf("%d signatures, error %v", len(got), err)
		}
	}
	free()
	clock.Store(int64(2 * time.Minute))
	if _, err := sourcetest.Find(t.Context(), src, other, verify.Limits{}); err != nil {
		t.Errorf("with room: %v", err)
	}
	got, err := sourcetest.Find(t.Context(), src, subject, verify.Limits{})
	if err != nil {
		t.Error(err)
	}
	sourcetest.Check(t, got, []verify.Evidence{want}, 0)
}
