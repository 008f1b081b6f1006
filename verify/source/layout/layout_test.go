package layout_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/leaktest"
	"github.com/tidewaiter/tidewaiter/verify/oci"
	"github.com/tidewaiter/tidewaiter/verify/source/layout"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

func TestSource(t *testing.T) {
	t.Parallel()
	for name, tagged := range map[string]bool{"entries of index.json": false, "referrers tag": true} {
		for form, pack := range map[string]func(*testing.T, string) string{
			"directory": func(_ *testing.T, dir string) string { return dir },
			"tar file":  packed,
		} {
			t.Run(name+" of a "+form, func(t *testing.T) {
				t.Parallel()
				sourcetest.Run(t, func(t *testing.T, c sourcetest.Content) verify.Source {
					dir := t.TempDir()
					sourcetest.Layout(t, dir, c, tagged)
					return layout.New(pack(t, dir))
				})
			})
		}
	}
}

func TestTagged(t *testing.T) {
	sourcetest.RunTagged(t, func(t *testing.T, c sourcetest.Content) verify.Source {
		dir := t.TempDir()
		sourcetest.Layout(t, dir, c, false)
		return layout.New(dir)
	})
}

// A disk that hangs ends no question later than its time, and from then on each at once.
func TestHang(t *testing.T) {
	t.Parallel()
	dir, subject, want := site(t)
	src := layout.New(dir)
	free := src.Hang()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := sourcetest.Find(ctx, src, subject, verify.Limits{}); !errors.Is(err, verify.ErrUnreachable) {
		t.Errorf("error %v", err)
	}
	eventually := func(hung int) {
		for end := time.Now().Add(2 * time.Minute); src.Hung() != hung; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%d reads hang, not %d", src.Hung(), hung)
			}
		}
	}
	eventually(1)
	if _, err := sourcetest.Find(t.Context(), src, subject, verify.Limits{}); !errors.Is(err, verify.ErrUnreachable) {
		t.Errorf("error %v", err)
	}
	free()
	eventually(0)
	got, err := sourcetest.Find(t.Context(), src, subject, verify.Limits{})
	if err != nil {
		t.Error(err)
	}
	sourcetest.Check(t, got, want, 0)
}

// Who asks may panic, and nothing stays behind.
func TestPanic(t *testing.T) {
	t.Parallel()
	dir, subject, _ := site(t)
	defer func() {
		if p := recover(); p != "mine" {
			t.Errorf("panic %v", p)
		}
	}()
	_ = layout.New(dir).Find(t.Context(), verify.Name{}, subject, verify.NewBudget(sourcetest.Kind, verify.Limits{}), func(verify.Evidence) bool { panic("mine") })
}

// site is a layout with one signed image.
func site(t testing.TB) (dir string, subject ocispec.Descriptor, want []verify.Evidence) {
	var c sourcetest.Content
	dir, subject = t.TempDir(), c.Image("app")
	want = append(want, c.Sign(subject, sourcetest.MediaTypeA, "envelope"))
	sourcetest.Layout(t, dir, c, false)
	return dir, subject, want
}

func write(t testing.TB, dir, name, content string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func blob(dir string, d digest.Digest) string {
	return filepath.Join(dir, "blobs", d.Algorithm().String(), d.Encoded())
}

// A layout that cannot be read is not one without signatures.
func TestUnreadableLayout(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		harm  func(t *testing.T, dir string)
		err   error
		names string
	}{
		"no directory": {func(t *testing.T, dir string) {
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
		}, verify.ErrUnreachable, "no such file"},
		"empty directory": {func(t *testing.T, dir string) {
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}, verify.ErrUnreachable, "oci-layout"},
		"no index.json": {func(t *testing.T, dir string) {
			if err := os.Remove(filepath.Join(dir, "index.json")); err != nil {
				t.Fatal(err)
			}
		}, verify.ErrUnreachable, "index.json"},
		"half an index.json":     {func(t *testing.T, dir string) { write(t, dir, "index.json", `{"manifests":[`) }, verify.ErrUnreachable, "index.json"},
		"deep index.json":        {func(t *testing.T, dir string) { write(t, dir, "index.json", strings.Repeat("[", 200_000)) }, verify.ErrUnreachable, "index.json"},
		"index.json of a list":   {func(t *testing.T, dir string) { write(t, dir, "index.json", `{"manifests":7}`) }, verify.ErrUnreachable, "index.json"},
		"other version":          {func(t *testing.T, dir string) { write(t, dir, "oci-layout", `{"imageLayoutVersion":"2.0.0"}`) }, verify.ErrUnreachable, `"2.0.0"`},
		"no version":             {func(t *testing.T, dir string) { write(t, dir, "oci-layout", `{}`) }, verify.ErrUnreachable, "oci-layout"},
		"oci-layout is not JSON": {func(t *testing.T, dir string) { write(t, dir, "oci-layout", `1.0.0`) }, verify.ErrUnreachable, "oci-layout"},
		"huge index.json": {func(t *testing.T, dir string) {
			if err := os.Truncate(filepath.Join(dir, "index.json"), 1<<30); err != nil {
				t.Fatal(err)
			}
		}, verify.ErrBudget, "index.json"},
		"index.json of a million entries": {func(t *testing.T, dir string) {
			write(t, dir, "index.json", `{"manifests":[`+strings.Repeat("{},", 1_000_000)+`{}]}`)
		}, verify.ErrBudget, "index.json"},
		"index.json is a FIFO": {func(t *testing.T, dir string) {
			if err := os.Remove(filepath.Join(dir, "index.json")); err != nil {
				t.Fatal(err)
			}
			if err := syscall.Mkfifo(filepath.Join(dir, "index.json"), 0o644); err != nil {
				t.Fatal(err)
			}
		}, verify.ErrUnreachable, "index.json"},
		"index.json is a directory": {func(t *testing.T, dir string) {
			if err := os.Remove(filepath.Join(dir, "index.json")); err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(filepath.Join(dir, "index.json"), 0o755); err != nil {
				t.Fatal(err)
			}
		}, verify.ErrUnreachable, "index.json"},
		"index.json lies outside": {func(t *testing.T, dir string) {
			out := filepath.Join(t.TempDir(), "index.json")
			if err := os.Rename(filepath.Join(dir, "index.json"), out); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(out, filepath.Join(dir, "index.json")); err != nil {
				t.Fatal(err)
			}
		}, verify.ErrUnreachable, "index.json"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, subject, _ := site(t)
			tt.harm(t, dir)
			got, err := sourcetest.Find(t.Context(), layout.New(dir), subject, verify.Limits{})
			if !errors.Is(err, tt.err) || !strings.Contains(fmt.Sprint(err), tt.names) {
				t.Errorf("error %v", err)
			}
			sourcetest.Check(t, got, nil, 0)
		})
	}
}

// A file that may be a signature and cannot be read hides nothing, and nobody may
// say that there is no signature.
func TestUnreadableBlob(t *testing.T) {
	t.Parallel()
	for name, harm := range map[string]func(t *testing.T, name string){
		"FIFO": func(t *testing.T, name string) {
			if err := syscall.Mkfifo(name, 0o644); err != nil {
				t.Fatal(err)
			}
		},
		"directory": func(t *testing.T, name string) {
			if err := os.Mkdir(name, 0o755); err != nil {
				t.Fatal(err)
			}
		},
		"link to /dev/zero": func(t *testing.T, name string) {
			if err := os.Symlink("/dev/zero", name); err != nil {
				t.Fatal(err)
			}
		},
		"link to itself": func(t *testing.T, name string) {
			if err := os.Symlink(filepath.Base(name), name); err != nil {
				t.Fatal(err)
			}
		},
	} {
		for part, tagged := range map[string]bool{"manifest": false, "tagged manifest": true} {
			t.Run(part+" is "+name, func(t *testing.T) {
				t.Parallel()
				var c sourcetest.Content
				dir, subject := t.TempDir(), c.Image("app")
				bad := c.Sign(subject, sourcetest.MediaTypeA, "bad")
				good := c.Sign(subject, sourcetest.MediaTypeA, "good")
				sourcetest.Layout(t, dir, c, tagged)
				if err := os.Remove(blob(dir, bad.Manifest.Digest)); err != nil {
					t.Fatal(err)
				}
				harm(t, blob(dir, bad.Manifest.Digest))
				got, err := sourcetest.Find(t.Context(), layout.New(dir), subject, verify.Limits{})
				if !errors.Is(err, verify.ErrUnreachable) || !strings.Contains(fmt.Sprint(err), bad.Manifest.Digest.Encoded()) {
					t.Errorf("error %v", err)
				}
				sourcetest.Check(t, got, []verify.Evidence{good}, 0)
			})
		}
	}
}

// TestDamagedBlob: what the medium spoilt may have been a signature. An entry that tells
// another size than its file has costs itself.
func TestDamagedBlob(t *testing.T) {
	for name, harm := range map[string]func([]byte) []byte{
		"flipped": func(raw []byte) []byte { raw[len(raw)/2] ^= 1; return raw },
		"zeros":   func(raw []byte) []byte { return make([]byte, len(raw)) },
		"cut":     func(raw []byte) []byte { return raw[:len(raw)/2] },
		"empty":   func([]byte) []byte { return nil },
	} {
		for part, of := range map[string]func(verify.Evidence) digest.Digest{
			"manifest": func(ev verify.Evidence) digest.Digest { return ev.Manifest.Digest },
			"envelope": func(ev verify.Evidence) digest.Digest { return digest.FromBytes(ev.Blob) },
		} {
			for _, tagged := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s %s tagged %t", name, part, tagged), func(t *testing.T) {
					var c sourcetest.Content
					dir, subject := t.TempDir(), c.Image("app")
					bad := c.Sign(subject, sourcetest.MediaTypeA, "bad")
					good := c.Sign(subject, sourcetest.MediaTypeA, "good")
					sourcetest.Layout(t, dir, c, tagged)
					at := blob(dir, of(bad))
					raw, err := os.ReadFile(at)
					if err == nil {
						err = os.WriteFile(at, harm(raw), 0o644)
					}
					if err != nil {
						t.Fatal(err)
					}
					found := false
					err = layout.New(dir).Find(t.Context(), sourcetest.Name, subject, verify.NewBudget(sourcetest.Kind, verify.Limits{}), func(ev verify.Evidence) bool {
						found = found || ev.Err == nil && ev.Manifest.Digest == good.Manifest.Digest
						return true
					})
					if !found || !errors.Is(err, verify.ErrUnreachable) {
						t.Errorf("the good one was found: %v, error %v", found, err)
					}
				})
			}
		}
	}
	var c sourcetest.Content
	dir, subject := t.TempDir(), c.Image("app")
	c.Sign(subject, sourcetest.MediaTypeA, "envelope")
	c.Referrers[subject.Digest][0].Size++
	sourcetest.Layout(t, dir, c, true)
	err := layout.New(dir).Find(t.Context(), sourcetest.Name, subject, verify.NewBudget(sourcetest.Kind, verify.Limits{}), func(verify.Evidence) bool { return true })
	if err != nil {
		t.Errorf("an entry with another size: %v", err)
	}
}

// Links within the directory are followed, others are not, whatever lies there.
func TestLinks(t *testing.T) {
	t.Parallel()
	dir, subject, want := site(t)
	name := blob(dir, want[0].Manifest.Digest)
	if err := os.Rename(name, filepath.Join(dir, "elsewhere")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../../elsewhere", name); err != nil {
		t.Fatal(err)
	}
	got, err := sourcetest.Find(t.Context(), layout.New(dir), subject, verify.Limits{})
	if err != nil {
		t.Error(err)
	}
	sourcetest.Check(t, got, want, 0)

	out := filepath.Join(t.TempDir(), "out")
	if err := os.Rename(filepath.Join(dir, "elsewhere"), out); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(out, filepath.Join(dir, "elsewhere")); err != nil {
		t.Fatal(err)
	}
	got, err = sourcetest.Find(t.Context(), layout.New(dir), subject, verify.Limits{})
	if !errors.Is(err, verify.ErrUnreachable) {
		t.Errorf("error %v", err)
	}
	sourcetest.Check(t, got, nil, 0)
}

// The layout of a site: one directory, asked before and after somebody adds to it.
func TestNewSignaturesCount(t *testing.T) {
	t.Parallel()
	var c sourcetest.Content
	dir, subject := t.TempDir(), c.Image("app")
	sourcetest.Layout(t, dir, c, false)
	src := layout.New(dir)
	if got, err := sourcetest.Find(t.Context(), src, subject, verify.Limits{}); err != nil || len(got) > 0 {
		t.Fatalf("%d signatures, error %v", len(got), err)
	}
	want := c.Sign(subject, sourcetest.MediaTypeA, "envelope")
	sourcetest.Layout(t, dir, c, false)
	got, err := sourcetest.Find(t.Context(), src, subject, verify.Limits{})
	if err != nil {
		t.Error(err)
	}
	sourcetest.Check(t, got, []verify.Evidence{want}, 0)
}

func TestReadOnlyMedium(t *testing.T) {
	t.Parallel()
	dir, subject, want := site(t)
	var before []string
	walk := func() (list []string) {
		err := filepath.Walk(dir, func(name string, info fs.FileInfo, err error) error {
			list = append(list, fmt.Sprint(name, info.Mode(), info.ModTime(), info.Size()))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return list
	}
	before = walk()
	got, err := sourcetest.Find(t.Context(), layout.New(dir), subject, verify.Limits{})
	if err != nil {
		t.Error(err)
	}
	sourcetest.Check(t, got, want, 0)
	if after := walk(); strings.Join(before, "\n") != strings.Join(after, "\n") {
		t.Error("the directory changed")
	}
}

// An archive of many images answers within the default limits, and a signature may
// lie some indexes deep, but not without end.
func TestArchive(t *testing.T) {
	t.Parallel()
	var c sourcetest.Content
	dir := t.TempDir()
	var subject ocispec.Descriptor
	var want []verify.Evidence
	for i := range 500 {
		subject = c.Image(fmt.Sprint("app ", i))
		want = []verify.Evidence{c.Sign(subject, sourcetest.MediaTypeA, fmt.Sprint("envelope ", i))}
	}
	sourcetest.Layout(t, dir, c, false)
	got, err := sourcetest.Find(t.Context(), layout.New(dir), subject, verify.Limits{})
	if err != nil {
		t.Error(err)
	}
	sourcetest.Check(t, got, want, 0)
}

func TestNestedIndexes(t *testing.T) {
	t.Parallel()
	for depth, found := range map[int]bool{1: true, 4: true, 5: false} {
		t.Run(fmt.Sprint(depth), func(t *testing.T) {
			t.Parallel()
			dir, subject, want := site(t)
			raw, err := os.ReadFile(filepath.Join(dir, "index.json"))
			if err != nil {
				t.Fatal(err)
			}
			for range depth {
				d := digest.FromBytes(raw)
				if err := os.WriteFile(blob(dir, d), raw, 0o644); err != nil {
					t.Fatal(err)
				}
				raw, err = json.Marshal(ocispec.Index{Manifests: []ocispec.Descriptor{
					{MediaType: ocispec.MediaTypeImageIndex, Digest: d, Size: int64(len(raw))},
				}})
				if err != nil {
					t.Fatal(err)
				}
			}
			write(t, dir, "index.json", string(raw))
			if !found {
				want = nil
			}
			got, err := sourcetest.Find(t.Context(), layout.New(dir), subject, verify.Limits{})
			if err != nil && found || !errors.Is(err, verify.ErrBudget) && !found {
				t.Error(err)
			}
			sourcetest.Check(t, got, want, 0)
		})
	}
}

// One entry that is no descriptor costs only itself.
func TestEntriesOfOtherTypes(t *testing.T) {
	t.Parallel()
	dir, subject, want := site(t)
	raw, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if err != nil {
		t.Fatal(err)
	}
	write(t, dir, "index.json", strings.Replace(string(raw), `"manifests":[`,
		`"manifests":[null,7,"x",[],{"digest":{}},{"size":"big","digest":"`+string(want[0].Manifest.Digest)+`"},`, 1))
	got, err := sourcetest.Find(t.Context(), layout.New(dir), subject, verify.Limits{})
	if err != nil {
		t.Error(err)
	}
	sourcetest.Check(t, got, want, 0)
}

func TestManifest(t *testing.T) {
	t.Parallel()
	dir, subject, _ := site(t)
	src := layout.New(dir)
	add := func(raw string) digest.Digest {
		d := digest.FromString(raw)
		if err := os.WriteFile(blob(dir, d), []byte(raw), 0o644); err != nil {
			t.Fatal(err)
		}
		return d
	}

	got, raw, err := src.Manifest(t.Context(), subject.Digest)
	if err != nil || got.MediaType != subject.MediaType || got.Digest != subject.Digest || got.Size != subject.Size ||
		digest.FromBytes(raw) != subject.Digest {
		t.Errorf("%v, error %v", got, err)
	}
	// An index that nothing lists, without a media type of its own.
	d := add(`{"manifests":[]}`)
	got, _, err = src.Manifest(t.Context(), d)
	if err != nil || got.MediaType != ocispec.MediaTypeImageIndex || got.Size != 16 {
		t.Errorf("%v, error %v", got, err)
	}

	if _, _, err = src.Manifest(t.Context(), add(`{"manifests":[],"layers":[]}`)); !errors.Is(err, oci.ErrAmbiguous) {
		t.Errorf("ambiguous: %v", err)
	}
	if _, _, err = src.Manifest(t.Context(), digest.FromString("nothing")); !errors.Is(err, fs.ErrNotExist) || errors.Is(err, verify.ErrUnreachable) {
		t.Errorf("missing: %v", err)
	}
	if _, _, err = src.Manifest(t.Context(), "sha256:../../index.json"); err == nil {
		t.Error("a digest that is a path")
	}
	changed := add(`{"manifests":[ ]}`)
	write(t, dir, filepath.Join("blobs/sha256", changed.Encoded()), `{"manifests":[0]}`)
	if _, _, err = src.Manifest(t.Context(), changed); !errors.Is(err, verify.ErrUnreachable) {
		t.Errorf("changed: %v", err)
	}
	big := add(`{"manifests":[]}` + strings.Repeat(" ", 4<<20))
	if _, _, err = src.Manifest(t.Context(), big); !errors.Is(err, verify.ErrBudget) {
		t.Errorf("big: %v", err)
	}
	if _, _, err = layout.New(filepath.Join(dir, "gone")).Manifest(t.Context(), d); !errors.Is(err, verify.ErrUnreachable) {
		t.Errorf("no layout: %v", err)
	}
}

// The entry that lists the document says something else about it.
func TestManifestListedAsAnother(t *testing.T) {
	t.Parallel()
	var c sourcetest.Content
	dir, subject := t.TempDir(), c.Image("app")
	c.Images[0].MediaType = ocispec.MediaTypeImageIndex
	sourcetest.Layout(t, dir, c, false)
	if _, _, err := layout.New(dir).Manifest(t.Context(), subject.Digest); !errors.Is(err, oci.ErrAmbiguous) {
		t.Errorf("error %v", err)
	}
}

func FuzzFind(f *testing.F) {
	_, subject, want := site(f)
	manifest, err := json.Marshal(ocispec.Manifest{
		MediaType: ocispec.MediaTypeImageManifest, ArtifactType: sourcetest.ArtifactType, Subject: &subject,
		Layers: []ocispec.Descriptor{{MediaType: sourcetest.MediaTypeA, Digest: digest.FromBytes(want[0].Blob), Size: int64(len(want[0].Blob))}},
	})
	if err != nil {
		f.Fatal(err)
	}
	entry := fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, ocispec.MediaTypeImageManifest, digest.FromBytes(manifest), len(manifest))
	f.Add([]byte(`{"manifests":[`+entry+`]}`), manifest, true)
	f.Add([]byte(`{"manifests":[`+strings.Replace(entry, "manifest.v1", "index.v1", 1)+`]}`), []byte(`{"manifests":[{}]}`), false)
	f.Add([]byte(`{"manifests":[null,`+entry+`,`+entry+`]}`), []byte(`{}`), true)
	f.Fuzz(func(t *testing.T, index, manifest []byte, tagged bool) {
		dir := t.TempDir()
		if err := os.MkdirAll(filepath.Join(dir, "blobs/sha256"), 0o755); err != nil {
			t.Fatal(err)
		}
		put := func(raw []byte) { write(t, dir, "blobs/sha256/"+digest.FromBytes(raw).Encoded(), string(raw)) }
		put(manifest)
		put(want[0].Blob)
		write(t, dir, "oci-layout", `{"imageLayoutVersion":"1.0.0"}`)
		if tagged {
			put(index)
			index = fmt.Appendf(nil, `{"manifests":[{"mediaType":%q,"digest":%q,"size":%d,"annotations":{%q:"sha256-%s"}}]}`,
				ocispec.MediaTypeImageIndex, digest.FromBytes(index), len(index), ocispec.AnnotationRefName, subject.Digest.Encoded())
		}
		write(t, dir, "index.json", string(index))
		src := layout.New(dir)
		got, err := sourcetest.Find(t.Context(), src, subject, verify.Limits{})
		for _, ev := range got {
			if ev.Err == nil && string(ev.Blob) != string(want[0].Blob) && string(ev.Blob) != string(manifest) && string(ev.Blob) != string(index) {
				t.Errorf("%d bytes that were not in the layout", len(ev.Blob))
			}
		}
		if err != nil && !errors.Is(err, verify.ErrUnreachable) && !errors.Is(err, verify.ErrBudget) {
			t.Errorf("error %v", err)
		}
		if d, raw, err := src.Manifest(t.Context(), digest.FromBytes(manifest)); err == nil && (string(raw) != string(manifest) || d.MediaType == "") {
			t.Errorf("manifest %v", d)
		}
	})
}
