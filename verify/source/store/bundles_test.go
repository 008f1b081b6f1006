package store_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
	"github.com/tidewaiter/tidewaiter/verify/source/store"
)

func bundles(dir string) string { return filepath.Join(dir, "bundles") }

// put puts a bundle of c where the store looks, by rename, in place of what has the
// name already.
func put(t testing.TB, dir, name string, c site) {
	t.Helper()
	at := filepath.Join(bundles(dir), name)
	temp := filepath.Join(bundles(dir), ".new-"+name)
	if err := os.MkdirAll(bundles(dir), 0o700); err != nil {
		t.Fatal(err)
	}
	sourcetest.Layout(t, temp, c.Content, false)
	if filepath.Ext(name) == ".tar" {
		pack(t, temp)
	}
	// Between the two there is none, as there is none for rename(1).
	if err := errors.Join(os.RemoveAll(at), os.Rename(temp, at)); err != nil {
		t.Fatal(err)
	}
}

// pack makes a tar file of a directory, in its place. A layer lies in it too.
func pack(t testing.TB, dir string) {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	layer := strings.Repeat("layer", 1<<16)
	err := errors.Join(w.AddFS(os.DirFS(dir)),
		w.WriteHeader(&tar.Header{Name: "blobs/sha256/" + digest.FromString(layer).Encoded(), Typeflag: tar.TypeReg, Mode: 0o600, Size: int64(len(layer))}))
	_, e := w.Write([]byte(layer))
	if err := errors.Join(err, e, w.Close(), os.RemoveAll(dir), os.WriteFile(dir, b.Bytes(), 0o600)); err != nil {
		t.Fatal(err)
	}
}

// finds waits until the signatures of subject are those wanted.
func (r *run) finds(subject ocispec.Descriptor, want ...verify.Evidence) {
	r.t.Helper()
	var got []verify.Evidence
	r.eventually("the signatures are found", func() bool {
		var err error
		got, err = sourcetest.Find(r.t.Context(), r, subject, verify.Limits{})
		return err == nil && len(got) == len(want)
	})
	sourcetest.Check(r.t, got, want, 0)
}

// troubles is what is said of bundles, "NAME: TROUBLE" or "NAME" each.
func (r *run) troubles() (list []string) {
	all, trouble := r.Bundles()
	for _, b := range all {
		if b.Trouble != "" {
			b.Name += ": " + b.Trouble
		}
		list = append(list, b.Name)
	}
	if trouble != "" {
		list = append(list, trouble)
	}
	return list
}

func TestBundleSource(t *testing.T) {
	t.Parallel()
	for name, tagged := range map[string]bool{"entries of index.json": false, "referrers tag": true} {
		for _, form := range forms {
			t.Run(name+form, func(t *testing.T) {
				t.Parallel()
				sourcetest.Run(t, func(t *testing.T, c sourcetest.Content) verify.Source {
					dir := t.TempDir()
					at := filepath.Join(bundles(dir), "one"+form)
					sourcetest.Layout(t, at, c, tagged)
					if form != "" {
						pack(t, at)
					}
					return start(t, dir, store.Options{})
				})
			})
		}
	}
}

// forms are the ends of the names of a directory and of a tar file.
var forms = []string{"", ".tar"}

func TestBundle(t *testing.T) {
	t.Parallel()
	for _, form := range forms {
		t.Run(form, func(t *testing.T) {
			t.Parallel()
			testBundle(t, form)
		})
	}
}

func testBundle(t *testing.T, form string) {
	dir := t.TempDir()
	var first, second, other site
	one, ev := first.image("one")
	two, ev2 := second.image("two")
	three, ev3 := other.image("three")
	var changed atomic.Int32
	r := start(t, dir, store.Options{Changed: func() { changed.Add(1) }})
	put(t, dir, "b"+form, other)
	r.finds(three, ev3)
	put(t, dir, "a"+form, first)
	r.finds(one, ev)
	r.has(two)
	if n := changed.Load(); n < 2 {
		t.Errorf("said %d times that there is more", n)
	}
	put(t, dir, "a"+form, second)
	r.finds(two, ev2)
	r.has(one)
	if err := os.RemoveAll(filepath.Join(bundles(dir), "a"+form)); err != nil {
		t.Fatal(err)
	}
	r.finds(two)
	r.finds(three, ev3)
	if n, _ := r.Signatures(); n != 0 || len(files(t, filepath.Join(inside(dir), "blobs"))) != 0 {
		t.Errorf("%d signatures were taken into the store", n)
	}
	if got := r.troubles(); !slices.Equal(got, []string{"b" + form}) {
		t.Errorf("bundles %q", got)
	}
	// Half written ones are not looked at.
	if err := os.Rename(filepath.Join(bundles(dir), "b"+form), filepath.Join(bundles(dir), ".b"+form)); err != nil {
		t.Fatal(err)
	}
	r.finds(three)
	if got := r.troubles(); len(got) != 0 {
		t.Errorf("bundles %q", got)
	}
	if strings.Contains(r.log.String(), "WARN") {
		t.Error(r.log.String())
	}
}

// Each signature says which bundle it is from, whatever that is called; those in the
// store say nothing.
func TestFrom(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var a, b, own site
	one, _ := a.image("one")
	two, _ := b.image("two")
	three, kept := own.image("three")
	long := strings.Repeat("x", 200)
	put(t, dir, "site 1\n.tar", a)
	put(t, dir, long, b)
	r := start(t, dir, store.Options{})
	r.keep(three, three, kept)
	r.settled()
	for subject, want := range map[digest.Digest]string{one.Digest: "bundle site 1 .tar", two.Digest: "bundle " + long[:77] + "...", three.Digest: ""} {
		n := 0
		for _, d := range []ocispec.Descriptor{one, two, three} {
			if d.Digest != subject {
				continue
			}
			if err := r.Find(t.Context(), verify.Name{}, d, verify.NewBudget(verify.Limits{}), func(ev verify.Evidence) bool {
				if n++; ev.From != want || ev.Err != nil {
					t.Errorf("from %q, want %q, error %v", ev.From, want, ev.Err)
				}
				return true
			}); err != nil {
				t.Error(err)
			}
		}
		if n != 1 {
			t.Errorf("%d signatures", n)
		}
	}
}

// A directory that something writes in place is read again.
func TestBundleInPlace(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var c site
	one, ev := c.image("one")
	at := filepath.Join(bundles(dir), "synced")
	sourcetest.Layout(t, at, site{}.Content, false)
	r := start(t, dir, store.Options{})
	r.has(one)
	sourcetest.Layout(t, at, c.Content, false)
	r.Look()
	r.finds(one, ev)
}

// What is in the store goes first, and what is in both is handed over once.
func TestBundleBeside(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var c, more site
	one, ev := c.image("one")
	more.Content = sourcetest.Content{Blobs: c.Blobs, Images: c.Images, Referrers: c.Referrers}
	put(t, dir, "a", c)
	renewed := more.evidence(one, "another")
	put(t, dir, "b", more)
	r := start(t, dir, store.Options{})
	r.has(one, ev, renewed)
	r.keep(one, one, ev)
	r.settled()
	r.has(one, ev, renewed)
	// Damaged in the store, it is found in the bundle.
	if err := os.WriteFile(blob(dir, digest.FromBytes(ev.Blob)), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := sourcetest.Find(t.Context(), r, one, verify.Limits{})
	if err != nil {
		t.Error(err)
	}
	sourcetest.Check(t, got, []verify.Evidence{ev, renewed}, 1)
	r.eventually("the damaged one goes", func() bool { n, _ := r.Signatures(); return n == 0 })
	r.has(one, ev, renewed)
}

// What is in a bundle does not go with its image, nor for want of room.
func TestBundleStays(t *testing.T) {
	t.Parallel()
	clock := newClock()
	dir := t.TempDir()
	var c site
	one, ev := c.image("one")
	put(t, dir, "a", c)
	r := start(t, dir, store.Options{Now: clock.now, Size: 8 << 10})
	other := map[digest.Digest]bool{digest.FromString("other"): true}
	for i := range 5 {
		r.Retain(other)
		d, kept := c.image(fmt.Sprint("image ", i))
		r.keep(d, d, kept)
		r.settled()
		clock.pass(60 * 24 * time.Hour)
	}
	r.has(one, ev)
}

// parents returns the documents that name d.
func (r *run) parents(d digest.Digest) (list []digest.Digest) {
	r.t.Helper()
	r.Parents(r.t.Context(), d, verify.NewBudget(verify.Limits{}), func(p digest.Digest, raw []byte) bool {
		if p.Algorithm().FromBytes(raw) != p {
			r.t.Errorf("%s is handed over as %.40q", p, raw)
		}
		list = append(list, p)
		return true
	})
	slices.Sort(list)
	return list
}

// configIn is the config of an image.
func (s *site) configIn(m ocispec.Descriptor) digest.Digest {
	var doc ocispec.Manifest
	decode(s.Blobs[m.Digest], &doc)
	return doc.Config.Digest
}

func TestParents(t *testing.T) {
	t.Parallel()
	for name, open := range map[string]func(t *testing.T, c site, index, m ocispec.Descriptor) *run{
		"store": func(t *testing.T, c site, index, m ocispec.Descriptor) *run {
			dir := t.TempDir()
			r := start(t, dir, store.Options{Image: c.read})
			r.keep(index, m, c.evidence(index, "index"))
			r.settled()
			r.stop()
			return start(t, dir, store.Options{})
		},
		"bundle": func(t *testing.T, c site, index, m ocispec.Descriptor) *run {
			dir := t.TempDir()
			put(t, dir, "a", c)
			return start(t, dir, store.Options{})
		},
		"both": func(t *testing.T, c site, index, m ocispec.Descriptor) *run {
			dir := t.TempDir()
			put(t, dir, "a", c)
			r := start(t, dir, store.Options{Image: c.read})
			r.keep(index, m, c.evidence(index, "index"))
			r.settled()
			return r
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var c site
			m := c.Image("app")
			index := c.index(m)
			c.Images = append(c.Images, index)
			r := open(t, c, index, m)
			if got := r.parents(m.Digest); !slices.Equal(got, []digest.Digest{index.Digest}) {
				t.Errorf("the manifest is named by %v", got)
			}
			if got := r.parents(c.configIn(m)); !slices.Equal(got, []digest.Digest{m.Digest}) {
				t.Errorf("the config is named by %v", got)
			}
			for _, d := range []digest.Digest{index.Digest, ocispec.DescriptorEmptyJSON.Digest, "", "x"} {
				if got := r.parents(d); len(got) > 0 {
					t.Errorf("%q is named by %v", d, got)
				}
			}
		})
	}
}

// One bundle that is bad costs only itself, and is said once.
func TestBadBundle(t *testing.T) {
	t.Parallel()
	at := func(dir string, parts ...string) string {
		return filepath.Join(append([]string{bundles(dir), "bad"}, parts...)...)
	}
	var evil site
	victim, _ := evil.image("victim")
	tagged := func(edit func(*testing.T, string)) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			put(t, dir, "bad", evil)
			edit(t, dir)
		}
	}
	file := func(content string, parts ...string) func(*testing.T, string) {
		return tagged(func(t *testing.T, dir string) {
			if err := os.WriteFile(at(dir, parts...), []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		})
	}
	must := func(f func(dir string) error) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			if err := errors.Join(os.MkdirAll(bundles(dir), 0o700), f(dir)); err != nil {
				t.Fatal(err)
			}
		}
	}
	manifest := evil.Referrers[victim.Digest][0].Digest
	for name, tt := range map[string]struct {
		make func(*testing.T, string)
		says string
	}{
		"empty directory":      {must(func(dir string) error { return os.Mkdir(at(dir), 0o700) }), "oci-layout"},
		"link to a directory":  {must(func(dir string) error { return os.Symlink(t.TempDir(), at(dir)) }), "neither a directory nor"},
		"link to nothing":      {must(func(dir string) error { return os.Symlink("/nowhere", at(dir)) }), "neither a directory nor"},
		"FIFO":                 {must(func(dir string) error { return syscall.Mkfifo(at(dir), 0o600) }), "neither a directory nor"},
		"FIFO named as a tar":  {must(func(dir string) error { return syscall.Mkfifo(at(dir)+".tar", 0o600) }), "neither a directory nor"},
		"other file":           {must(func(dir string) error { return os.WriteFile(at(dir), []byte("hello"), 0o600) }), "neither a directory nor"},
		"no index.json":        {tagged(func(t *testing.T, dir string) { os.Remove(at(dir, "index.json")) }), "index.json"},
		"half an index.json":   {file(`{"manifests":[`, "index.json"), "index.json"},
		"index.json of a list": {file(`{"manifests":7}`, "index.json"), "index.json"},
		"other version":        {file(`{"imageLayoutVersion":"2.0.0"}`, "oci-layout"), "version"},
		"a million entries":    {file(`{"manifests":[`+strings.Repeat("{},", 1<<20)+`{}]}`, "index.json"), "limit"},
		"huge index.json":      {tagged(func(t *testing.T, dir string) { os.Truncate(at(dir, "index.json"), 1<<30) }), "left for it"},
		"index.json is a FIFO": {tagged(func(t *testing.T, dir string) {
			os.Remove(at(dir, "index.json"))
			syscall.Mkfifo(at(dir, "index.json"), 0o600)
		}), "not a regular file"},
		"index.json lies out": {tagged(func(t *testing.T, dir string) {
			os.Remove(at(dir, "index.json"))
			os.Symlink("/etc/passwd", at(dir, "index.json"))
		}), "index.json"},
		"a manifest is damaged": {file("{}", "blobs", "sha256", manifest.Encoded()), "damaged"},
		"a manifest lies out": {tagged(func(t *testing.T, dir string) {
			os.Remove(at(dir, "blobs", "sha256", manifest.Encoded()))
			os.Symlink("/etc/passwd", at(dir, "blobs", "sha256", manifest.Encoded()))
		}), "escapes"},
		"blobs lies out": {tagged(func(t *testing.T, dir string) {
			os.RemoveAll(at(dir, "blobs"))
			os.Symlink("/etc", at(dir, "blobs"))
		}), "escapes"},
		"a manifest is huge": {tagged(func(t *testing.T, dir string) {
			evil := fmt.Sprintf(`{"manifests":[{"mediaType":%q,"digest":%q,"size":%d}]}`, ocispec.MediaTypeImageManifest, manifest, 1<<30)
			os.WriteFile(at(dir, "index.json"), []byte(evil), 0o600)
			os.Truncate(at(dir, "blobs", "sha256", manifest.Encoded()), 1<<30)
		}), "left for it"},
		"tar that is cut off": {func(t *testing.T, dir string) {
			put(t, dir, "bad.tar", evil)
			if err := os.Truncate(at(dir)+".tar", 20000); err != nil {
				t.Fatal(err)
			}
		}, "tar file"},
		"compressed tar":        {must(func(dir string) error { return os.WriteFile(at(dir)+".tar", []byte("\x1f\x8b\x08hello"), 0o600) }), "compressed"},
		"tar of something else": {must(func(dir string) error { return os.WriteFile(at(dir)+".tar", make([]byte, 4096), 0o600) }), "oci-layout"},
		"tar with a link for a manifest": {func(t *testing.T, dir string) {
			put(t, dir, "bad.tar", evil)
			name := "blobs/sha256/" + manifest.Encoded()
			raw, err := os.ReadFile(at(dir) + ".tar")
			if err != nil {
				t.Fatal(err)
			}
			var b bytes.Buffer
			w := tar.NewWriter(&b)
			r := tar.NewReader(bytes.NewReader(raw))
			for h, err := r.Next(); err == nil; h, err = r.Next() {
				if h.Name == name {
					h.Typeflag, h.Linkname, h.Size = tar.TypeLink, "/etc/passwd", 0
				}
				content, _ := io.ReadAll(r)
				err := w.WriteHeader(h)
				if h.Typeflag == tar.TypeReg {
					_, err = w.Write(content)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			if err := errors.Join(w.Close(), os.WriteFile(at(dir)+".tar", b.Bytes(), 0o600)); err != nil {
				t.Fatal(err)
			}
		}, "not a regular file"},
		"indexes without end": {func(t *testing.T, dir string) {
			var c site
			d := c.Image("app")
			for range 8 {
				d = c.index(d)
			}
			c.Images = []ocispec.Descriptor{d}
			put(t, dir, "bad", c)
		}, "indexes more than"},
		"more manifests than are counted": {func(t *testing.T, dir string) {
			var c site
			for i := range 2 {
				entries := strings.Repeat(fmt.Sprintf(`{"digest":%q},`, digest.FromString(fmt.Sprint(i))), 40000)
				c.Images = append(c.Images, c.Add(ocispec.MediaTypeImageIndex, fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"manifests":[%s{}]}`, ocispec.MediaTypeImageIndex, entries)))
			}
			put(t, dir, "bad", c)
		}, "list more than"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			var c site
			one, ev := c.image("one")
			two, kept := c.image("two")
			put(t, dir, "a", c)
			put(t, dir, "z", c)
			tt.make(t, dir)
			r := start(t, dir, store.Options{})
			r.keep(two, two, kept)
			r.settled()
			for range 3 {
				r.Look()
				r.has(one, ev)
				r.has(two, kept)
			}
			got := r.troubles()
			if len(got) != 3 || got[0] != "a" || got[2] != "z" || !strings.HasPrefix(got[1], "bad") || !strings.Contains(got[1], tt.says) {
				t.Errorf("bundles %q", got)
			}
			r.stop()
			if n := strings.Count(r.log.String(), "WARN"); n != 1 {
				t.Errorf("%d warnings:\n%s", n, r.log.String())
			}
		})
	}
}

// An envelope that is damaged, or is not there, does not hide another.
func TestBadEnvelope(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var c site
	one, ev := c.image("one")
	bad := c.evidence(one, "another")
	put(t, dir, "a", c)
	r := start(t, dir, store.Options{})
	r.has(one, ev, bad)
	name := filepath.Join(bundles(dir), "a/blobs/sha256", digest.FromBytes(bad.Blob).Encoded())
	if err := os.WriteFile(name, []byte("Another"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		got, err := sourcetest.Find(t.Context(), r, one, verify.Limits{})
		if err != nil {
			t.Error(err)
		}
		sourcetest.Check(t, got, []verify.Evidence{ev}, 1)
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	if b, err := os.ReadFile(filepath.Join(bundles(dir), "a/blobs/sha256", digest.FromBytes(ev.Blob).Encoded())); err != nil || string(b) != string(ev.Blob) {
		t.Error("the bundle was changed:", err)
	}
}

func TestManyBundles(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var last site
	for i := range 70 {
		var c site
		d, ev := c.image(fmt.Sprint("image ", i))
		_, _ = d, ev
		put(t, dir, fmt.Sprintf("%03d", i), c)
		last = c
	}
	r := start(t, dir, store.Options{})
	r.has(last.Images[0])
	got := r.troubles()
	if len(got) != 65 || !strings.Contains(got[64], "70 entries") {
		t.Errorf("%d: %q", len(got), got)
	}
	for i := range 10 {
		if err := os.RemoveAll(filepath.Join(bundles(dir), fmt.Sprintf("%03d", i))); err != nil {
			t.Fatal(err)
		}
	}
	r.eventually("the last is found", func() bool {
		list, _ := sourcetest.Find(t.Context(), r, last.Images[0], verify.Limits{})
		return len(list) == 1
	})
}

// The directory itself may be no directory, go away, and come back.
func TestBundlesDirectory(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := syscall.Mkfifo(bundles(dir), 0o600); err != nil {
		t.Fatal(err)
	}
	r := start(t, dir, store.Options{})
	if got := r.troubles(); len(got) != 1 || !strings.Contains(got[0], "not a directory") {
		t.Errorf("%q", got)
	}
	if err := os.Remove(bundles(dir)); err != nil {
		t.Fatal(err)
	}
	var c site
	one, ev := c.image("one")
	put(t, dir, "a", c)
	r.Look()
	r.finds(one, ev)
	if err := os.RemoveAll(bundles(dir)); err != nil {
		t.Fatal(err)
	}
	r.Look()
	r.finds(one)
}

// A bundle that has more signatures and manifests of an image than anybody looks at
// hides none of another bundle, whatever their names are.
func TestBundleOfJunk(t *testing.T) {
	t.Parallel()
	var c, junk site
	app, want := c.image("app")
	for i := range verify.DefaultLimits.Signatures {
		junk.evidence(app, fmt.Sprint("junk ", i))
		var m ocispec.Manifest
		decode(c.Blobs[app.Digest], &m)
		m.Annotations = map[string]string{"junk": fmt.Sprint(i)}
		raw, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		junk.Images = append(junk.Images, junk.Add(m.MediaType, raw))
	}
	dir := t.TempDir()
	put(t, dir, "a", junk)
	put(t, dir, "b", c)
	r := start(t, dir, store.Options{})
	got, _ := sourcetest.Find(t.Context(), r, app, verify.Limits{})
	if !slices.ContainsFunc(got, func(ev verify.Evidence) bool { return ev.Manifest.Digest == want.Manifest.Digest }) {
		t.Error("the signature is not found")
	}
	// The engine takes six.
	n, found := 0, false
	r.Parents(t.Context(), c.configIn(app), verify.NewBudget(verify.Limits{}), func(d digest.Digest, _ []byte) bool {
		n++
		found = found || d == app.Digest
		return n < 6
	})
	if !found {
		t.Error("the manifest is not found")
	}
}

// FuzzBundle has any bytes in what is read of a bundle.
func FuzzBundle(f *testing.F) {
	var c site
	one, ev := c.image("one")
	index := c.index(one)
	raw, err := json.Marshal(ocispec.Index{Manifests: append(c.Referrers[one.Digest], one, index)})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Add(c.Blobs[index.Digest])
	f.Add(ev.Document)
	f.Add([]byte(`{"manifests":[{"mediaType":"` + ocispec.MediaTypeImageIndex + `","digest":"` + index.Digest.String() + `","size":-1},{"digest":7},null,[]]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		dir := t.TempDir()
		put(t, dir, "good", c)
		put(t, dir, "index", c)
		put(t, dir, "document", c)
		if err := os.WriteFile(filepath.Join(bundles(dir), "index/index.json"), raw, 0o600); err != nil {
			t.Fatal(err)
		}
		d := digest.FromBytes(raw)
		list := fmt.Appendf(nil, `{"manifests":[{"mediaType":%q,"digest":%q,"size":%d},{"mediaType":%q,"digest":%q,"size":%d}]}`,
			ocispec.MediaTypeImageIndex, d, len(raw), ocispec.MediaTypeImageManifest, d, len(raw))
		if err := errors.Join(os.WriteFile(filepath.Join(bundles(dir), "document/index.json"), list, 0o600),
			os.WriteFile(filepath.Join(bundles(dir), "document/blobs/sha256", d.Encoded()), raw, 0o600)); err != nil {
			t.Fatal(err)
		}
		r := start(t, dir, store.Options{})
		found, _ := sourcetest.Find(t.Context(), r, one, verify.Limits{})
		if !slices.ContainsFunc(found, func(x verify.Evidence) bool { return x.Err == nil && bytes.Equal(x.Blob, ev.Blob) }) {
			t.Error("the good signature is hidden")
		}
		for _, x := range found {
			if x.Err == nil && digest.FromBytes(x.Document) != x.Manifest.Digest {
				t.Errorf("%s is handed over as %q", x.Manifest.Digest, x.Document)
			}
		}
		if got := r.parents(c.configIn(one)); !slices.Contains(got, one.Digest) {
			t.Errorf("the config is named by %v", got)
		}
		if got := r.troubles(); len(got) != 3 || got[1] != "good" {
			t.Errorf("bundles %q", got)
		}
		r.stop()
	})
}

// A bundle that is bad is read again after a while, and later and later, and counts
// when it has been mended without a trace.
func TestBadBundleAgain(t *testing.T) {
	t.Parallel()
	clock := newClock()
	dir := t.TempDir()
	var c site
	one, ev := c.image("one")
	put(t, dir, "a", c)
	name := filepath.Join(bundles(dir), "a/blobs/sha256", ev.Manifest.Digest.Encoded())
	overwrite := func(raw []byte) { // in place, which no directory shows
		f, err := os.OpenFile(name, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.Write(raw)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	bad := bytes.Repeat([]byte("x"), len(ev.Document))
	overwrite(bad)
	var changed atomic.Int32
	r := start(t, dir, store.Options{Now: clock.now, Changed: func() { changed.Add(1) }})
	r.has(one)
	clock.pass(time.Minute)
	r.Look()
	overwrite(ev.Document)
	r.eventually("it is read again", func() bool {
		clock.pass(time.Minute)
		r.Look()
		return len(r.troubles()) == 1 && r.troubles()[0] == "a"
	})
	r.has(one, ev)
	r.eventually("that is told", func() bool { return changed.Load() == 1 })
	r.stop()
	if n := strings.Count(r.log.String(), "WARN"); n != 1 {
		t.Errorf("%d warnings:\n%s", n, r.log.String())
	}
}
