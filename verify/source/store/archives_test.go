package store_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
	"github.com/tidewaiter/tidewaiter/verify/source/store"
)

func below(dir string) string { return filepath.Join(dir, "archives") }

// put puts an archive of c where the store looks, by rename, in place of what has the
// name already.
func put(t testing.TB, dir, name string, c site) {
	t.Helper()
	at := filepath.Join(below(dir), name)
	temp := filepath.Join(below(dir), ".new-"+name)
	if err := os.MkdirAll(below(dir), 0o700); err != nil {
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

// troubles is what is said of archives, "NAME: TROUBLE" or "NAME" each.
func (r *run) troubles() (list []string) {
	all, trouble := r.archives.Status()
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

// Each signature says which archive it is from, whatever that is called; those in the
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
	for subject, want := range map[digest.Digest]string{one.Digest: "evidence archive site 1 .tar", two.Digest: "evidence archive " + long[:77] + "...", three.Digest: ""} {
		n := 0
		for _, d := range []ocispec.Descriptor{one, two, three} {
			if d.Digest != subject {
				continue
			}
			if err := r.Find(t.Context(), verify.Name{}, d, verify.NewBudget(sourcetest.Kind, verify.Limits{}), func(ev verify.Evidence) bool {
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

// What is in the store goes first, and what is in both is handed over once.
func TestArchiveBeside(t *testing.T) {
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
	// Damaged in the store, it is found in the archive.
	if err := os.WriteFile(blob(dir, digest.FromBytes(ev.Blob)), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := sourcetest.Find(t.Context(), r, one, verify.Limits{})
	if err != nil { // the archive has it whole
		t.Error(err)
	}
	sourcetest.Check(t, got, []verify.Evidence{ev, renewed}, 1)
	r.eventually("the damaged one goes", func() bool { n, _ := r.Signatures(); return n == 0 })
	r.has(one, ev, renewed)
}

// What is in an archive does not go with its image, nor for want of room.
func TestArchiveStays(t *testing.T) {
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
	r.Parents(r.t.Context(), d, verify.NewBudget(sourcetest.Kind, verify.Limits{}), func(p digest.Digest, raw []byte) bool {
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
		"archive": func(t *testing.T, c site, index, m ocispec.Descriptor) *run {
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
