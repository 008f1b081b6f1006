package archives_test

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
	"github.com/tidewaiter/tidewaiter/verify/source/archives"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

func TestSource(t *testing.T) {
	t.Parallel()
	for name, tagged := range map[string]bool{"entries of index.json": false, "referrers tag": true} {
		for _, form := range forms {
			t.Run(name+form, func(t *testing.T) {
				t.Parallel()
				sourcetest.Run(t, func(t *testing.T, c sourcetest.Content) verify.Source {
					dir := t.TempDir()
					at := filepath.Join(below(dir), "one"+form)
					sourcetest.Layout(t, at, c, tagged)
					if form != "" {
						pack(t, at)
					}
					return start(t, dir, archives.Options{})
				})
			})
		}
	}
}

func TestArchive(t *testing.T) {
	t.Parallel()
	for _, form := range forms {
		t.Run(form, func(t *testing.T) {
			t.Parallel()
			testArchive(t, form)
		})
	}
}

func testArchive(t *testing.T, form string) {
	dir := t.TempDir()
	var first, second, other site
	one, ev := first.image("one")
	two, ev2 := second.image("two")
	three, ev3 := other.image("three")
	var changed atomic.Int32
	r := start(t, dir, archives.Options{Changed: func() { changed.Add(1) }})
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
	if err := os.RemoveAll(filepath.Join(below(dir), "a"+form)); err != nil {
		t.Fatal(err)
	}
	r.finds(two)
	r.finds(three, ev3)
	if got := r.troubles(); !slices.Equal(got, []string{"b" + form}) {
		t.Errorf("evidence archives %q", got)
	}
	// Half written ones are not looked at.
	if err := os.Rename(filepath.Join(below(dir), "b"+form), filepath.Join(below(dir), ".b"+form)); err != nil {
		t.Fatal(err)
	}
	r.finds(three)
	if got := r.troubles(); len(got) != 0 {
		t.Errorf("evidence archives %q", got)
	}
	if strings.Contains(r.log.String(), "WARN") {
		t.Error(r.log.String())
	}
}

// A directory that something writes in place is read again.
func TestArchiveInPlace(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var c site
	one, ev := c.image("one")
	at := filepath.Join(below(dir), "synced")
	sourcetest.Layout(t, at, site{}.Content, false)
	r := start(t, dir, archives.Options{})
	r.has(one)
	sourcetest.Layout(t, at, c.Content, false)
	r.Rescan()
	r.finds(one, ev)
}

// One archive that is bad costs only itself, and is said once.
func TestBadArchive(t *testing.T) {
	t.Parallel()
	at := func(dir string, parts ...string) string {
		return filepath.Join(append([]string{below(dir), "bad"}, parts...)...)
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
			if err := errors.Join(os.MkdirAll(below(dir), 0o700), f(dir)); err != nil {
				t.Fatal(err)
			}
		}
	}
	manifest := evil.Referrers[victim.Digest][0].Digest
	// Of these it is known that they have no signature, and of the others it is not.
	none := map[string]bool{"empty directory": true, "link to a directory": true, "link to nothing": true, "FIFO": true, "FIFO named as a tar": true,
		"other file": true, "tar of something else": true, "a manifest is huge": true, "an index of too many manifests": true}
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
		"huge index.json":      {tagged(func(t *testing.T, dir string) { os.Truncate(at(dir, "index.json"), 1<<30) }), "more than 4194304 bytes"},
		"index.json is a FIFO": {tagged(func(t *testing.T, dir string) {
			os.Remove(at(dir, "index.json"))
			syscall.Mkfifo(at(dir, "index.json"), 0o600)
		}), "not a regular file"},
		"index.json lies out": {tagged(func(t *testing.T, dir string) {
			os.Remove(at(dir, "index.json"))
			os.Symlink("/etc/passwd", at(dir, "index.json"))
		}), "index.json"},
		"a manifest is damaged": {file("{}", "blobs", "sha256", manifest.Encoded()), "damaged"},
		"a manifest is not there": {tagged(func(t *testing.T, dir string) {
			os.Remove(at(dir, "blobs", "sha256", manifest.Encoded()))
		}), "lists " + manifest.String() + ", which is not there"},
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
		}), "more than 4194304 bytes"},
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
			for i := range 33 {
				var entries strings.Builder
				for j := range 2047 {
					fmt.Fprintf(&entries, `{"digest":%q},`, digest.FromString(fmt.Sprint(i, " ", j)))
				}
				c.Images = append(c.Images, c.Add(ocispec.MediaTypeImageIndex, fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"manifests":[%s{"digest":%q}]}`, ocispec.MediaTypeImageIndex, entries.String(), digest.FromString("one"))))
			}
			put(t, dir, "bad", c)
		}, "list more than"},
		"an index of too many manifests": {func(t *testing.T, dir string) {
			var c site
			c.Images = append(c.Images, c.Add(ocispec.MediaTypeImageIndex, fmt.Appendf(nil, `{"manifests":[%s{}]}`, strings.Repeat("{},", 2048))))
			put(t, dir, "bad", c)
		}, "2049 manifests, limit 2048"},
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
			r := start(t, dir, archives.Options{})
			for range 3 {
				r.Rescan()
				for subject, want := range map[*ocispec.Descriptor]verify.Evidence{&one: ev, &two: kept} {
					got, err := sourcetest.Find(t.Context(), r, *subject, verify.Limits{})
					sourcetest.Check(t, got, []verify.Evidence{want}, 0)
					if known := none[name]; (err == nil) != known || err != nil && !strings.Contains(err.Error(), `evidence archive "bad`) {
						t.Errorf("error %v, and the evidence archive has nothing else: %v", err, known)
					}
				}
			}
			got := r.troubles()
			if len(got) != 3 || got[0] != "a" || got[2] != "z" || !strings.HasPrefix(got[1], "bad") || !strings.Contains(got[1], tt.says) {
				t.Errorf("evidence archives %q", got)
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
	r := start(t, dir, archives.Options{})
	r.has(one, ev, bad)
	name := filepath.Join(below(dir), "a/blobs/sha256", digest.FromBytes(bad.Blob).Encoded())
	if err := os.WriteFile(name, []byte("Another"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		got, err := sourcetest.Find(t.Context(), r, one, verify.Limits{})
		if !errors.Is(err, verify.ErrUnreachable) {
			t.Error(err)
		}
		sourcetest.Check(t, got, []verify.Evidence{ev}, 1)
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	if b, err := os.ReadFile(filepath.Join(below(dir), "a/blobs/sha256", digest.FromBytes(ev.Blob).Encoded())); err != nil || string(b) != string(ev.Blob) {
		t.Error("the evidence archive was changed:", err)
	}
}

func TestManyArchives(t *testing.T) {
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
	r := start(t, dir, archives.Options{})
	r.has(last.Images[0])
	got := r.troubles()
	if len(got) != 65 || !strings.Contains(got[64], "70 entries") {
		t.Errorf("%d: %q", len(got), got)
	}
	for i := range 10 {
		if err := os.RemoveAll(filepath.Join(below(dir), fmt.Sprintf("%03d", i))); err != nil {
			t.Fatal(err)
		}
	}
	r.eventually("the last is found", func() bool {
		list, _ := sourcetest.Find(t.Context(), r, last.Images[0], verify.Limits{})
		return len(list) == 1
	})
}

// The directory itself may be no directory, go away, and come back.
func TestArchivesDirectory(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := syscall.Mkfifo(below(dir), 0o600); err != nil {
		t.Fatal(err)
	}
	r := start(t, dir, archives.Options{})
	if got := r.troubles(); len(got) != 1 || !strings.Contains(got[0], "not a directory") {
		t.Errorf("%q", got)
	}
	if err := os.Remove(below(dir)); err != nil {
		t.Fatal(err)
	}
	var c site
	one, ev := c.image("one")
	put(t, dir, "a", c)
	r.Rescan()
	r.finds(one, ev)
	if err := os.RemoveAll(below(dir)); err != nil {
		t.Fatal(err)
	}
	r.Rescan()
	r.finds(one)
}

// An archive that has more signatures and manifests of an image than anybody looks at
// hides none of another archive, whatever their names are.
func TestArchiveOfJunk(t *testing.T) {
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
	r := start(t, dir, archives.Options{})
	got, _ := sourcetest.Find(t.Context(), r, app, verify.Limits{})
	if !slices.ContainsFunc(got, func(ev verify.Evidence) bool { return ev.Manifest.Digest == want.Manifest.Digest }) {
		t.Error("the signature is not found")
	}
	// The engine takes six.
	n, found := 0, false
	r.Parents(t.Context(), c.configIn(app), verify.NewBudget(sourcetest.Kind, verify.Limits{}), func(d digest.Digest, _ []byte) bool {
		n++
		found = found || d == app.Digest
		return n < 6
	})
	if !found {
		t.Error("the manifest is not found")
	}
}

// FuzzArchive has any bytes in what is read of an archive.
func FuzzArchive(f *testing.F) {
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
		if err := os.WriteFile(filepath.Join(below(dir), "index/index.json"), raw, 0o600); err != nil {
			t.Fatal(err)
		}
		d := digest.FromBytes(raw)
		list := fmt.Appendf(nil, `{"manifests":[{"mediaType":%q,"digest":%q,"size":%d},{"mediaType":%q,"digest":%q,"size":%d}]}`,
			ocispec.MediaTypeImageIndex, d, len(raw), ocispec.MediaTypeImageManifest, d, len(raw))
		if err := errors.Join(os.WriteFile(filepath.Join(below(dir), "document/index.json"), list, 0o600),
			os.WriteFile(filepath.Join(below(dir), "document/blobs/sha256", d.Encoded()), raw, 0o600)); err != nil {
			t.Fatal(err)
		}
		r := start(t, dir, archives.Options{})
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
			t.Errorf("evidence archives %q", got)
		}
		r.stop()
	})
}

// An archive that is bad is read again after a while, and later and later, and counts
// when it has been mended without a trace.
func TestBadArchiveAgain(t *testing.T) {
	t.Parallel()
	clock := newClock()
	dir := t.TempDir()
	var c site
	one, ev := c.image("one")
	put(t, dir, "a", c)
	name := filepath.Join(below(dir), "a/blobs/sha256", ev.Manifest.Digest.Encoded())
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
	r := start(t, dir, archives.Options{Now: clock.now, Changed: func() { changed.Add(1) }})
	if got, err := sourcetest.Find(t.Context(), r, one, verify.Limits{}); len(got) != 0 || !errors.Is(err, verify.ErrUnreachable) {
		t.Errorf("%d signatures, error %v", len(got), err)
	}
	clock.pass(time.Minute)
	r.Rescan()
	overwrite(ev.Document)
	r.eventually("it is read again", func() bool {
		clock.pass(time.Minute)
		r.Rescan()
		return len(r.troubles()) == 1 && r.troubles()[0] == "a"
	})
	r.has(one, ev)
	r.eventually("that is told", func() bool { return changed.Load() == 1 })
	r.stop()
	if n := strings.Count(r.log.String(), "WARN"); n != 1 {
		t.Errorf("%d warnings:\n%s", n, r.log.String())
	}
}

// An archive that is cut says so to whoever asks for what it may have, and a big one with
// an early name leaves the others their part.
func TestArchiveCut(t *testing.T) {
	t.Parallel()
	narrow := func(a *archives.Archives) { a.Narrow(16, 20, 1<<20) }
	dir := t.TempDir()
	var vendor, site site
	for i := range 20 {
		vendor.image(fmt.Sprint("vendor ", i))
	}
	app, ev := site.image("app")
	put(t, dir, "a-vendor", vendor)
	put(t, dir, "site", site)
	r := start(t, dir, archives.Options{}, narrow)
	r.eventually("what the small one does not need, the big one has", func() bool {
		list, _ := r.Status()
		return len(list) == 2 && list[1].Trouble == "" && strings.Contains(list[0].Trouble, "more than its part of the 16")
	})
	got, err := sourcetest.Find(t.Context(), r, app, verify.Limits{})
	sourcetest.Check(t, got, []verify.Evidence{ev}, 0)
	if !errors.Is(err, verify.ErrBudget) || !strings.Contains(err.Error(), `evidence archive "a-vendor"`) {
		t.Errorf("error %v", err)
	}
	r.eventually("the big one has the rest", func() bool {
		n := 0
		for _, d := range vendor.Images {
			n += len(r.parents(vendor.configIn(d)))
		}
		return n > 10
	})
	for _, d := range vendor.Images {
		if got, err := sourcetest.Find(t.Context(), r, d, verify.Limits{}); len(got) == 0 && !errors.Is(err, verify.ErrBudget) {
			t.Errorf("of an image of the evidence archive that was cut: %v", err)
		}
	}
	if err := r.Parents(t.Context(), digest.FromString("any"), verify.NewBudget(sourcetest.Kind, verify.Limits{}), func(digest.Digest, []byte) bool { return true }); !errors.Is(err, verify.ErrBudget) {
		t.Errorf("what may lead to an image: %v", err)
	}
	if err := os.RemoveAll(filepath.Join(below(dir), "a-vendor")); err != nil {
		t.Fatal(err)
	}
	r.finds(app, ev)
	r.has(vendor.Images[0])
}
