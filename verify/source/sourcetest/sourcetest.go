package sourcetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
)

// Find asks src for the signatures of subject under limits and returns all of them.
func Find(ctx context.Context, src verify.Source, subject ocispec.Descriptor, limits verify.Limits) ([]verify.Evidence, error) {
	return FindKind(ctx, Kind, src, subject, limits)
}

// FindKind is Find for evidence of kind k.
func FindKind(ctx context.Context, k verify.Kind, src verify.Source, subject ocispec.Descriptor, limits verify.Limits) ([]verify.Evidence, error) {
	var list []verify.Evidence
	err := src.Find(ctx, Name, subject, verify.NewBudget(k, limits), func(ev verify.Evidence) bool {
		list = append(list, ev)
		return true
	})
	return list, err
}

// Check compares what a source handed over with want, in any order. Evidence with
// Err set is counted: at least broken of it, and none with a Blob.
func Check(t testing.TB, got, want []verify.Evidence, broken int) {
	t.Helper()
	left := append([]verify.Evidence{}, want...)
next:
	for _, ev := range got {
		if ev.Err != nil {
			broken--
			if ev.Blob != nil {
				t.Errorf("evidence with error %q has a blob", ev.Err)
			}
			continue
		}
		for i, w := range left {
			if ev.Manifest.Digest == w.Manifest.Digest && ev.Manifest.Size == w.Manifest.Size &&
				ev.Manifest.MediaType == w.Manifest.MediaType && ev.MediaType == w.MediaType && bytes.Equal(ev.Blob, w.Blob) {
				if ev.Manifest.Digest.Algorithm().FromBytes(ev.Document) != ev.Manifest.Digest {
					t.Errorf("signature manifest %s is handed over as %.40q", ev.Manifest.Digest, ev.Document)
				}
				left = append(left[:i], left[i+1:]...)
				continue next
			}
		}
		t.Errorf("not wanted: manifest %v, envelope %s %.40q", ev.Manifest, ev.MediaType, ev.Blob)
	}
	for _, w := range left {
		t.Errorf("not found: manifest %s, envelope %s %.40q", w.Manifest.Digest, w.MediaType, w.Blob)
	}
	if broken > 0 {
		t.Errorf("%d broken signatures were not handed over", broken)
	}
}

// A case is one Content with what a source has to say of it.
type testCase struct {
	content Content
	subject ocispec.Descriptor
	want    []verify.Evidence
	broken  int // at least so many with Err set; -1: none
	limits  verify.Limits
	err     error // nil: the answer is conclusive
	damaged bool  // a source that keeps files may say that it is not
}

// Run tests that the sources which open makes do what [verify.Source] says. open
// is called often, also in parallel, with what the source shall hold; the source
// is asked for images of that Name. What a source refuses to hold to begin with,
// such as a broken manifest, it may leave out.
func Run(t *testing.T, open func(t *testing.T, content Content) verify.Source) {
	for name, build := range cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var c testCase
			build(&c)
			src := open(t, c.content)
			got, err := Find(t.Context(), src, c.subject, c.limits)
			if !errors.Is(err, c.err) && !(c.damaged && errors.Is(err, verify.ErrUnreachable)) {
				t.Errorf("error %v, want %v", err, c.err)
			}
			Check(t, got, c.want, c.broken)
			if c.broken < 0 && len(got) != len(c.want) {
				t.Errorf("%d handed over that are no signatures of the subject", len(got)-len(c.want))
			}
			if src.Name() == "" || strings.ContainsAny(src.Name(), "\n\x00") {
				t.Errorf("name %q", src.Name())
			}
		})
	}

	three := func(t *testing.T) (verify.Source, ocispec.Descriptor, []verify.Evidence) {
		var c Content
		subject := c.Image("app")
		var want []verify.Evidence
		for i := range 3 {
			want = append(want, c.Sign(subject, MediaTypeA, fmt.Sprint("envelope ", i)))
		}
		return open(t, c), subject, want
	}
	t.Run("another kind, of two blobs", func(t *testing.T) {
		t.Parallel()
		var c Content
		subject, other := c.Image("app"), c.Image("other")
		want := []verify.Evidence{c.SignToy(subject, "one", false), c.SignToy(subject, "two", false)}
		plain := []verify.Evidence{c.Sign(subject, MediaTypeA, "of the usual kind")}
		c.SignToy(other, "of another image", false)
		src := open(t, c)
		for _, x := range []struct {
			kind verify.Kind
			want []verify.Evidence
		}{{Toy, want}, {Kind, plain}} {
			got, err := FindKind(t.Context(), x.kind, src, subject, verify.Limits{})
			if err != nil {
				t.Error(err)
			}
			Check(t, got, x.want, -1)
			checkMore(t, got, x.want)
		}
		// Each blob is counted, and one that is too big costs its signature alone.
		got, err := FindKind(t.Context(), Toy, src, subject, verify.Limits{EnvelopeBytes: 7})
		if !errors.Is(err, verify.ErrBudget) || len(got) != 2 || got[0].Err == nil || got[0].Blob != nil || got[0].More != nil {
			t.Errorf("blobs beyond the limit: %v, error %v", got, err)
		}
		if got, err := FindKind(t.Context(), nil, src, subject, verify.Limits{}); !errors.Is(err, verify.ErrBudget) || len(got) > 0 {
			t.Errorf("of no kind: %d found, error %v", len(got), err)
		}
	})
	t.Run("the budget for signatures ends it", func(t *testing.T) {
		t.Parallel()
		src, subject, _ := three(t)
		got, err := Find(t.Context(), src, subject, verify.Limits{Signatures: 2})
		if !errors.Is(err, verify.ErrBudget) || len(got) > 2 {
			t.Errorf("%d signatures, error %v", len(got), err)
		}
	})
	t.Run("the zero budget allows nothing", func(t *testing.T) {
		t.Parallel()
		src, subject, _ := three(t)
		err := src.Find(t.Context(), Name, subject, &verify.Budget{}, func(ev verify.Evidence) bool {
			if ev.Err == nil {
				t.Error("a signature was handed over")
			}
			return true
		})
		if !errors.Is(err, verify.ErrBudget) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("bytes in all are bounded", func(t *testing.T) {
		t.Parallel()
		src, subject, want := three(t)
		all := verify.Limits{TotalBytes: 1 << 20}
		if got, err := Find(t.Context(), src, subject, all); err != nil || len(got) != len(want) {
			t.Fatalf("%d signatures, error %v", len(got), err)
		}
		// However few bytes there are, whoever saw not everything says so.
		for n := int64(1); n < 8<<10; n = n*5/4 + 1 {
			got, err := Find(t.Context(), src, subject, verify.Limits{TotalBytes: n})
			good, held := 0, int64(0)
			for _, ev := range got {
				if ev.Err == nil {
					good++
					held += ev.Manifest.Size + int64(len(ev.Blob))
				}
			}
			if held > n {
				t.Errorf("%d bytes handed over of %d", held, n)
			}
			if good < len(want) && !errors.Is(err, verify.ErrBudget) || good == len(want) && err != nil {
				t.Errorf("with %d bytes: %d signatures, error %v", n, good, err)
			}
		}
	})
	t.Run("yield ends it", func(t *testing.T) {
		t.Parallel()
		src, subject, _ := three(t)
		calls := 0
		err := src.Find(t.Context(), Name, subject, verify.NewBudget(Kind, verify.Limits{}), func(verify.Evidence) bool {
			calls++
			return false
		})
		if calls != 1 || err != nil {
			t.Errorf("%d calls, error %v", calls, err)
		}
	})
	t.Run("yield ends it after one that was too big", func(t *testing.T) {
		t.Parallel()
		var c Content
		subject := c.Image("app")
		c.Sign(subject, MediaTypeA, strings.Repeat("x", 101))
		c.Sign(subject, MediaTypeA, "good")
		src := open(t, c)
		last := verify.Evidence{Err: errors.New("none")}
		err := src.Find(t.Context(), Name, subject, verify.NewBudget(Kind, verify.Limits{EnvelopeBytes: 100}), func(ev verify.Evidence) bool {
			last = ev
			return ev.Err != nil
		})
		if last.Err != nil || err != nil {
			t.Errorf("last %v, error %v", last.Err, err)
		}
	})
	t.Run("the context ends it before", func(t *testing.T) {
		t.Parallel()
		src, subject, _ := three(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		got, err := Find(ctx, src, subject, verify.Limits{})
		if !errors.Is(err, verify.ErrUnreachable) || len(got) > 0 {
			t.Errorf("%d signatures, error %v", len(got), err)
		}
	})
	t.Run("the context ends it between", func(t *testing.T) {
		t.Parallel()
		src, subject, _ := three(t)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		err := src.Find(ctx, Name, subject, verify.NewBudget(Kind, verify.Limits{}), func(verify.Evidence) bool {
			cancel()
			return true
		})
		if !errors.Is(err, verify.ErrUnreachable) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("many at once", func(t *testing.T) {
		t.Parallel()
		src, subject, want := three(t)
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				got, err := Find(t.Context(), src, subject, verify.Limits{})
				if err != nil {
					t.Error(err)
				}
				Check(t, got, want, 0)
			})
		}
		wg.Wait()
	})
	t.Run("what it hands over is the caller's", func(t *testing.T) {
		t.Parallel()
		src, subject, want := three(t)
		for range 2 {
			got, err := Find(t.Context(), src, subject, verify.Limits{})
			if err != nil {
				t.Error(err)
			}
			Check(t, got, want, 0)
			for _, ev := range got {
				clear(ev.Blob)
			}
		}
	})
}

// checkMore compares the further blobs, and what Check does not look at.
func checkMore(t testing.TB, got, want []verify.Evidence) {
	t.Helper()
	for _, w := range want {
		i := slices.IndexFunc(got, func(ev verify.Evidence) bool { return ev.Manifest.Digest == w.Manifest.Digest })
		if i < 0 || len(got[i].More) != len(w.More) {
			t.Errorf("not found whole: %s", w.Manifest.Digest)
			continue
		}
		for n, b := range w.More {
			if g := got[i].More[n]; g.Digest != b.Digest || g.MediaType != b.MediaType || !bytes.Equal(g.Raw, b.Raw) {
				t.Errorf("blob %d of %s is %s %.40q", n+1, w.Manifest.Digest, g.Digest, g.Raw)
			}
		}
	}
}

// RunTagged tests sources that have tags: evidence that refers to nothing lies at the tag
// that says what it is of.
func RunTagged(t *testing.T, open func(t *testing.T, content Content) verify.Source) {
	t.Parallel()
	var c Content
	subject, other := c.Image("app"), c.Image("other")
	want := []verify.Evidence{c.SignToy(subject, "at a tag", true), c.SignToy(subject, "beside it", false)}
	c.SignToy(other, "of another image", true)
	bare := c.Image("bare")
	src := open(t, c)
	for _, x := range []struct {
		subject ocispec.Descriptor
		want    []verify.Evidence
	}{{subject, want}, {bare, nil}} {
		got, err := FindKind(t.Context(), Toy, src, x.subject, verify.Limits{})
		if err != nil {
			t.Error(err)
		}
		Check(t, got, x.want, -1)
		checkMore(t, got, x.want)
	}
	if got, err := FindKind(t.Context(), Kind, src, subject, verify.Limits{}); err != nil || len(got) != 0 {
		t.Errorf("of a kind without tags: %d, error %v", len(got), err)
	}
}

// good signs subject twice around bad, so that neither order hides a signature.
func good(c *testCase, name string, bad func()) {
	c.subject = c.content.Image(name)
	c.want = append(c.want, c.content.Sign(c.subject, MediaTypeA, "before"))
	bad()
	c.want = append(c.want, c.content.Sign(c.subject, MediaTypeB, "after"))
}

// last is the descriptor that was listed last for the subject.
func (c *testCase) last() *ocispec.Descriptor {
	list := c.content.Referrers[c.subject.Digest]
	return &list[len(list)-1]
}

// bad signs the subject with an envelope that is then given away to change.
func (c *testCase) bad(edits ...func(*ocispec.Manifest)) verify.Evidence {
	return c.content.Sign(c.subject, MediaTypeA, "bad envelope", edits...)
}

var cases = map[string]func(c *testCase){
	"no signature": func(c *testCase) {
		c.subject = c.content.Image("app")
		c.content.Sign(c.content.Image("other"), MediaTypeA, "of another image")
	},
	"one": func(c *testCase) {
		c.subject = c.content.Image("app")
		c.want = append(c.want, c.content.Sign(c.subject, MediaTypeA, "envelope"))
	},
	"all kinds": func(c *testCase) {
		c.subject = c.content.Image("app")
		for _, mediaType := range []string{MediaTypeA, MediaTypeB} {
			c.want = append(c.want, c.content.Sign(c.subject, mediaType, "new "+mediaType),
				c.content.Sign(c.subject, mediaType, "old "+mediaType, OldStyle))
		}
	},
	"every byte": func(c *testCase) {
		c.subject = c.content.Image("app")
		all := make([]byte, 70_000)
		for i := range all {
			all[i] = byte(i * i >> 3)
		}
		c.want = append(c.want, c.content.Sign(c.subject, MediaTypeB, string(all)),
			c.content.Sign(c.subject, MediaTypeB, ""))
	},
	"sha512 subject": func(c *testCase) {
		c.subject = c.content.ImageBy(digest.SHA512, "app")
		c.want = append(c.want, c.content.Sign(c.subject, MediaTypeA, "envelope"))
	},
	"other referrers": func(c *testCase) {
		good(c, "app", func() {
			c.content.Sign(c.subject, "application/spdx+json", "an SBOM", func(m *ocispec.Manifest) {
				m.ArtifactType = "application/spdx+json"
			})
		})
		c.broken = -1
	},
	"listed twice": func(c *testCase) {
		good(c, "app", func() { c.content.List(c.subject, *c.last()) })
	},
	"listed first with another size": func(c *testCase) {
		c.subject = c.content.Image("app")
		c.want = append(c.want, c.content.Sign(c.subject, MediaTypeA, "envelope"))
		list := c.content.Referrers[c.subject.Digest]
		lie := list[0]
		lie.Size++
		c.content.Referrers[c.subject.Digest] = append([]ocispec.Descriptor{lie}, list...)
	},
	"of another subject": func(c *testCase) {
		good(c, "app", func() {
			other := c.content.Image("other")
			c.content.Sign(other, MediaTypeA, "of another image")
			c.content.List(c.subject, c.content.Referrers[other.Digest]...)
		})
	},
	"of the subject with another size": func(c *testCase) {
		good(c, "app", func() { c.bad(func(m *ocispec.Manifest) { m.Subject.Size++ }) })
		c.broken = 1
	},
	"of the subject with another media type": func(c *testCase) {
		good(c, "app", func() { c.bad(func(m *ocispec.Manifest) { m.Subject.MediaType = ocispec.MediaTypeImageIndex }) })
		c.broken = 1
	},
	"without subject": func(c *testCase) {
		good(c, "app", func() { c.bad(func(m *ocispec.Manifest) { m.Subject = nil }) })
	},
	"no layer": func(c *testCase) {
		good(c, "app", func() { c.bad(func(m *ocispec.Manifest) { m.Layers = nil }) })
		c.broken = 1
	},
	"two layers": func(c *testCase) {
		good(c, "app", func() { c.bad(func(m *ocispec.Manifest) { m.Layers = append(m.Layers, m.Layers[0]) }) })
		c.broken = 1
	},
	"envelope with a bad digest": func(c *testCase) {
		good(c, "app", func() { c.bad(func(m *ocispec.Manifest) { m.Layers[0].Digest = "sha256:../../../etc/passwd" }) })
		c.broken = 1
	},
	"envelope with a negative size": func(c *testCase) {
		good(c, "app", func() { c.bad(func(m *ocispec.Manifest) { m.Layers[0].Size = -1 }) })
		c.broken = 1
	},
	"envelope missing": func(c *testCase) {
		c.damaged = true
		good(c, "app", func() { delete(c.content.Blobs, digest.FromBytes(c.bad().Blob)) })
		c.broken = 1
	},
	"envelope changed": func(c *testCase) {
		c.damaged = true
		good(c, "app", func() { c.content.Blobs[digest.FromBytes(c.bad().Blob)] = []byte("bad Envelope") })
		c.broken = 1
	},
	"envelope longer": func(c *testCase) {
		c.damaged = true
		good(c, "app", func() { c.content.Blobs[digest.FromBytes(c.bad().Blob)] = []byte("bad envelope and more") })
		c.broken = 1
	},
	"envelope shorter": func(c *testCase) {
		c.damaged = true
		good(c, "app", func() { c.content.Blobs[digest.FromBytes(c.bad().Blob)] = []byte("bad") })
		c.broken = 1
	},
	"manifest missing": func(c *testCase) {
		c.damaged = true
		good(c, "app", func() { delete(c.content.Blobs, c.bad().Manifest.Digest) })
	},
	"manifest changed": func(c *testCase) {
		c.damaged = true
		good(c, "app", func() {
			d := c.bad().Manifest.Digest
			c.content.Blobs[d] = bytes.Replace(c.content.Blobs[d], []byte("jose"), []byte("joke"), 1)
		})
	},
	"manifest longer": func(c *testCase) {
		c.damaged = true
		good(c, "app", func() {
			d := c.bad().Manifest.Digest
			c.content.Blobs[d] = append(c.content.Blobs[d], ' ')
		})
	},
	"manifest shorter": func(c *testCase) {
		c.damaged = true
		good(c, "app", func() {
			d := c.bad().Manifest.Digest
			c.content.Blobs[d] = c.content.Blobs[d][1:]
		})
	},
	"manifest of another media type": func(c *testCase) {
		good(c, "app", func() {
			c.bad()
			c.last().MediaType = "application/vnd.oci.artifact.manifest.v1+json"
		})
	},
	"manifests that are none": func(c *testCase) {
		good(c, "app", func() {
			for _, raw := range []string{"", "{", "null", "[]", "7", `"x"`, strings.Repeat("[", 200_000), `{"layers":{},"subject":[]}`} {
				d := c.content.Add(ocispec.MediaTypeImageManifest, []byte(raw))
				d.ArtifactType = ArtifactType
				c.content.List(c.subject, d)
			}
		})
	},
	"entries that are none": func(c *testCase) {
		good(c, "app", func() {
			for _, d := range []digest.Digest{"", "sha256", "sha256:", "sha256:../../../../etc/passwd", "md5:d41d8cd98f00b204e9800998ecf8427e", "sha512:00"} {
				c.content.List(c.subject, ocispec.Descriptor{
					MediaType: ocispec.MediaTypeImageManifest, ArtifactType: ArtifactType, Digest: d, Size: 2,
				})
			}
		})
	},
	"envelope too big": func(c *testCase) {
		good(c, "app", func() { c.content.Sign(c.subject, MediaTypeA, strings.Repeat("x", 101)) })
		c.limits, c.broken, c.err = verify.Limits{EnvelopeBytes: 100}, 1, verify.ErrBudget
	},
	"manifest with 70,000 layers": func(c *testCase) {
		good(c, "app", func() {
			c.bad(func(m *ocispec.Manifest) { m.Layers = make([]ocispec.Descriptor, 70_000) })
		})
	},
	"manifest of more than 64 KiB": func(c *testCase) {
		good(c, "app", func() {
			c.bad(func(m *ocispec.Manifest) { m.Annotations = map[string]string{"a": strings.Repeat("x", 64<<10)} })
		})
	},
	"one referrer with long annotations": func(c *testCase) {
		good(c, "app", func() {
			raw := fmt.Sprintf(`{"mediaType":%q,"subject":{"digest":%q},"layers":[]}`, ocispec.MediaTypeImageManifest, c.subject.Digest)
			for _, artifactType := range []string{"application/vnd.example", ArtifactType} {
				d := c.content.Add(ocispec.MediaTypeImageManifest, []byte(raw+strings.Repeat(" ", len(artifactType))))
				d.ArtifactType, d.Annotations = artifactType, map[string]string{"a": strings.Repeat(",{", 35_000)}
				c.content.List(c.subject, d)
			}
		})
	},
}
