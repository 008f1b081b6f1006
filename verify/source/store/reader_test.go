package store_test

import (
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/archives"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
	"github.com/tidewaiter/tidewaiter/verify/source/store"
)

// tree is every name below dir with its mode, size, time and bytes.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(name string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		all[name] = info.Mode().String() + info.ModTime().String()
		if info.Mode().IsRegular() {
			raw, err := os.ReadFile(name)
			all[name] += string(raw)
			return err
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// TestReader: another program reads what the gate keeps, also while a gate runs, and
// changes nothing.
func TestReader(t *testing.T) {
	var kept, brought sourcetest.Content
	here, there := kept.Image("kept"), brought.Image("brought")
	kept.Sign(here, sourcetest.MediaTypeA, "of the store")
	brought.Sign(there, sourcetest.MediaTypeA, "of an evidence archive")
	dir := t.TempDir()
	sourcetest.Layout(t, filepath.Join(dir, "store"), kept, false)
	if err := os.WriteFile(filepath.Join(dir, "store", "blobs", "sha256", ".unfinished-1"), []byte("cut"), 0o600); err != nil {
		t.Fatal(err)
	}
	sourcetest.Layout(t, filepath.Join(dir, "archives", "site"), brought, true)
	look := func() {
		t.Helper()
		before := tree(t, dir)
		brought := archives.Open(t.Context(), dir, time.Now, sourcetest.Kinds...)
		defer brought.Close()
		r := store.Open(t.Context(), dir, store.Options{Kinds: sourcetest.Kinds, Now: time.Now, Archives: brought})
		defer r.Close()
		for want, image := range map[string]ocispec.Descriptor{"of the store": here, "of an evidence archive": there} {
			var got []string
			err := r.Find(t.Context(), sourcetest.Name, image, verify.NewBudget(sourcetest.Kind, verify.Limits{}), func(ev verify.Evidence) bool {
				got = append(got, string(ev.Blob))
				r.Keep(verify.Image{}, image, ev)
				return true
			})
			if err != nil || len(got) != 1 || got[0] != want {
				t.Errorf("signatures %q, error %v, want that %s", got, err, want)
			}
			d, raw, err := r.Manifest(t.Context(), image.Digest)
			if err != nil || d.Digest != image.Digest || d.MediaType != image.MediaType || d.Size != image.Size || digest.FromBytes(raw) != image.Digest {
				t.Errorf("manifest %+v, %v", d, err)
			}
		}
		if _, _, err := r.Manifest(t.Context(), digest.FromString("nothing")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("what is not there: %v", err)
		}
		if after := tree(t, dir); !maps.Equal(before, after) {
			t.Errorf("reading changed the directory from %q to %q", before, after)
		}
	}
	look()
	run := start(t, dir, store.Options{})
	look()
	run.stop()

	// Where there is nothing, nothing is read.
	if a := archives.Open(t.Context(), t.TempDir(), time.Now); a != nil {
		t.Error("archives in an empty directory")
	}
	if r := store.Open(t.Context(), t.TempDir(), store.Options{Kinds: sourcetest.Kinds, Now: time.Now}); r != nil {
		t.Error("a store in an empty directory")
	}
	if r := store.Open(t.Context(), filepath.Join(t.TempDir(), "gone"), store.Options{Kinds: sourcetest.Kinds, Now: time.Now}); r != nil {
		t.Error("a store in a directory that is not there")
	}
	// What is there and cannot be read is said.
	odd := t.TempDir()
	if err := os.WriteFile(filepath.Join(odd, "store"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r := store.Open(t.Context(), odd, store.Options{Kinds: sourcetest.Kinds, Now: time.Now})
	defer r.Close()
	if err := r.Find(t.Context(), sourcetest.Name, here, verify.NewBudget(sourcetest.Kind, verify.Limits{}), func(verify.Evidence) bool { return true }); !errors.Is(err, verify.ErrUnreachable) {
		t.Errorf("a store that is no directory: %v", err)
	}
}
