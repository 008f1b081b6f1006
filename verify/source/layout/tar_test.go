package layout_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/layout"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

// packed is the layout dir as a tar file.
func packed(t *testing.T, dir string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "layout.tar")
	sourcetest.Tar(t, dir, file)
	return file
}

// A member is a file of a tar file.
type member struct {
	tar.Header
	body string
}

// members are the files of the layout dir.
func members(t testing.TB, dir string) (list []member) {
	t.Helper()
	err := filepath.WalkDir(dir, func(name string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		raw, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, name)
		list = append(list, member{tar.Header{Name: rel, Mode: 0o644, Typeflag: tar.TypeReg, Size: int64(len(raw))}, string(raw)})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func pack(t testing.TB, w io.Writer, list []member) {
	t.Helper()
	tw := tar.NewWriter(w)
	for _, m := range list {
		if err := tw.WriteHeader(&m.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(tw, m.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
}

func tarFile(t testing.TB, list []member) string {
	t.Helper()
	var b bytes.Buffer
	pack(t, &b, list)
	file := filepath.Join(t.TempDir(), "layout.tar")
	if err := os.WriteFile(file, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

// What other programs write into a tar file besides, or call files, hides nothing.
func TestTarOfOthers(t *testing.T) {
	t.Parallel()
	for name, edit := range map[string]func([]member) []member{
		"names with ./": func(list []member) []member {
			for i := range list {
				list[i].Name = "./" + list[i].Name
			}
			return list
		},
		"pax headers": func(list []member) []member {
			for i := range list {
				list[i].PAXRecords = map[string]string{"SCHILY.xattr.user.x": strings.Repeat("x", 1000)}
			}
			return list
		},
		"a global header": func(list []member) []member {
			return append([]member{{tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "x"}}, ""}}, list...)
		},
		"directories twice": func(list []member) []member {
			for range 2 {
				for _, d := range []string{"blobs/", "blobs/sha256/"} {
					list = append([]member{{tar.Header{Name: d, Mode: 0o755, Typeflag: tar.TypeDir}, ""}}, list...)
				}
			}
			return list
		},
		"what docker save adds": func(list []member) []member {
			return append(list,
				member{tar.Header{Name: "manifest.json", Typeflag: tar.TypeReg, Size: 2}, "[]"},
				member{tar.Header{Name: "repositories", Typeflag: tar.TypeReg, Size: 2}, "{}"},
				member{tar.Header{Name: "abc/layer.tar", Typeflag: tar.TypeSymlink, Linkname: "../def/layer.tar"}, ""})
		},
		"names of long ago": func(list []member) []member {
			for i := range list {
				list[i].Format = tar.FormatGNU
				list[i].Name = strings.Repeat("./", 60) + list[i].Name
			}
			return list
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, subject, want := site(t)
			got, err := sourcetest.Find(t.Context(), layout.New(tarFile(t, edit(members(t, dir)))), subject, verify.Limits{})
			if err != nil {
				t.Error(err)
			}
			sourcetest.Check(t, got, want, 0)
		})
	}
}

// A tar file that cannot be read, or not in one way only, is not one without signatures.
func TestUnreadableTar(t *testing.T) {
	t.Parallel()
	change := func(edit func([]byte) []byte) func(t *testing.T, file string, list []member) {
		return func(t *testing.T, file string, _ []member) {
			raw, err := os.ReadFile(file)
			if err == nil {
				err = os.WriteFile(file, edit(raw), 0o644)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	with := func(edit func([]member) []member) func(t *testing.T, file string, list []member) {
		return func(t *testing.T, file string, list []member) {
			if err := os.Rename(tarFile(t, edit(list)), file); err != nil {
				t.Fatal(err)
			}
		}
	}
	of := func(list []member, name string) *member {
		for i := range list {
			if strings.HasPrefix(list[i].Name, name) {
				return &list[i]
			}
		}
		panic(name)
	}
	for name, tt := range map[string]struct {
		harm  func(t *testing.T, file string, list []member)
		err   error
		names string
	}{
		"empty":               {change(func([]byte) []byte { return nil }), verify.ErrUnreachable, "no end"},
		"no tar file":         {change(func([]byte) []byte { return bytes.Repeat([]byte("x"), 4096) }), verify.ErrUnreachable, "nor a tar file"},
		"gzip":                {change(func([]byte) []byte { return []byte("\x1f\x8b\x08\x00\x00\x00\x00\x00") }), verify.ErrUnreachable, "compressed with gzip"},
		"zstd":                {change(func([]byte) []byte { return []byte("\x28\xb5\x2f\xfd\x00\x00\x00\x00") }), verify.ErrUnreachable, "compressed with zstd"},
		"xz":                  {change(func([]byte) []byte { return []byte("\xfd7zXZ\x00\x00\x00") }), verify.ErrUnreachable, "compressed with xz"},
		"bzip2":               {change(func([]byte) []byte { return []byte("BZh91AY") }), verify.ErrUnreachable, "compressed with bzip2"},
		"no end":              {change(func(raw []byte) []byte { return raw[:len(raw)-1024] }), verify.ErrUnreachable, "no end"},
		"half an end":         {change(func(raw []byte) []byte { return raw[:len(raw)-512] }), verify.ErrUnreachable, "no end"},
		"cut off in a file":   {change(func(raw []byte) []byte { return raw[:len(raw)-1024-512-1] }), verify.ErrUnreachable, ""},
		"cut off in a header": {change(func(raw []byte) []byte { return raw[:100] }), verify.ErrUnreachable, "nor a tar file"},
		"a bad checksum":      {change(func(raw []byte) []byte { raw[0] ^= 1; return raw }), verify.ErrUnreachable, "nor a tar file"},
		"only zeros":          {change(func(raw []byte) []byte { return make([]byte, 4096) }), verify.ErrUnreachable, "oci-layout"},
		"no oci-layout": {with(func(list []member) []member {
			of(list, "oci-layout").Name = "other"
			return list
		}), verify.ErrUnreachable, "oci-layout"},
		"a docker archive": {with(func([]member) []member {
			return []member{{tar.Header{Name: "./manifest.json", Typeflag: tar.TypeReg, Size: 2}, "[]"}, {tar.Header{Name: "abc.json", Typeflag: tar.TypeReg, Size: 2}, "{}"}}
		}), verify.ErrUnreachable, "docker archive"},
		"no index.json": {with(func(list []member) []member {
			of(list, "index.json").Name = "index.json/index.json"
			return list
		}), verify.ErrUnreachable, "index.json"},
		"index.json twice": {with(func(list []member) []member { return append(list, *of(list, "index.json")) }), verify.ErrUnreachable, "index.json is in the tar file twice"},
		"a blob twice":     {with(func(list []member) []member { return append(list, *of(list, "blobs/")) }), verify.ErrUnreachable, "twice"},
		"index.json is a link": {with(func(list []member) []member {
			m := of(list, "index.json")
			m.Header, m.body = tar.Header{Name: "index.json", Typeflag: tar.TypeSymlink, Linkname: "/etc/passwd"}, ""
			return list
		}), verify.ErrUnreachable, "not a regular file"},
		"index.json is hard": {with(func(list []member) []member {
			m := of(list, "index.json")
			m.Header, m.body = tar.Header{Name: "index.json", Typeflag: tar.TypeLink, Linkname: "oci-layout"}, ""
			return list
		}), verify.ErrUnreachable, "not a regular file"},
		"index.json is a pipe": {with(func(list []member) []member {
			m := of(list, "index.json")
			m.Header, m.body = tar.Header{Name: "index.json", Typeflag: tar.TypeFifo}, ""
			return list
		}), verify.ErrUnreachable, "not a regular file"},
		"index.json is too big": {with(func(list []member) []member {
			m := of(list, "index.json")
			m.body += strings.Repeat(" ", 9<<20)
			m.Size = int64(len(m.body))
			return list
		}), verify.ErrBudget, "index.json"},
		"more files than are looked at": {with(func(list []member) []member {
			for i := range 1<<15 + 1 {
				list = append(list, member{tar.Header{Name: fmt.Sprint("f", i), Typeflag: tar.TypeReg}, ""})
			}
			return list
		}), verify.ErrBudget, "32768 files"},
		"headers without end": {func(t *testing.T, file string, _ []member) {
			f, err := os.Create(file)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			name := append(bytes.Repeat([]byte("n"), 1<<20-1), 0)
			for range 80 { // names for a file that never comes
				if _, err := f.Write(rawHeader("L", int64(len(name)))); err != nil {
					t.Fatal(err)
				}
				if _, err := f.Write(name); err != nil {
					t.Fatal(err)
				}
			}
		}, verify.ErrBudget, "headers"},
		"a file beyond the end": {func(t *testing.T, file string, _ []member) {
			raw := rawHeader("0", 1<<40)
			copy(raw, "index.json\x00")
			if err := os.WriteFile(file, checksum(raw), 0o644); err != nil {
				t.Fatal(err)
			}
		}, verify.ErrUnreachable, "beyond the end"},
		"an old sparse file": {func(t *testing.T, file string, _ []member) {
			raw := rawHeader("S", 512)
			copy(raw, "index.json\x00")
			copy(raw[257:], "ustar  \x00")
			copy(raw[386:], "00000000000\x0000000001000\x00")
			copy(raw[483:], "00000001000\x00")
			if err := os.WriteFile(file, append(checksum(raw), make([]byte, 512+1024)...), 0o644); err != nil {
				t.Fatal(err)
			}
		}, verify.ErrUnreachable, "sparse"},
		"a new sparse file": {func(t *testing.T, file string, _ []member) {
			// Go's Writer refuses to write one, so that the name of the record is changed after.
			var b bytes.Buffer
			pack(t, &b, []member{{tar.Header{Name: "index.json", Typeflag: tar.TypeReg, Size: 512, PAXRecords: map[string]string{
				"GNU_sparse.major": "0", "GNU_sparse.minor": "1", "GNU_sparse.map": "0,512", "GNU_sparse.size": "512", "GNU_sparse.numblocks": "1",
			}}, strings.Repeat("x", 512)}})
			raw := bytes.ReplaceAll(b.Bytes(), []byte("GNU_sparse"), []byte("GNU.sparse"))
			if err := os.WriteFile(file, raw, 0o644); err != nil {
				t.Fatal(err)
			}
		}, verify.ErrUnreachable, "sparse"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, subject, _ := site(t)
			file := packed(t, dir)
			tt.harm(t, file, members(t, dir))
			got, err := sourcetest.Find(t.Context(), layout.New(file), subject, verify.Limits{})
			if !errors.Is(err, tt.err) || !strings.Contains(fmt.Sprint(err), tt.names) {
				t.Errorf("error %v", err)
			}
			sourcetest.Check(t, got, nil, 0)
		})
	}
}

// rawHeader is the block of a file called "x".
func rawHeader(kind string, size int64) []byte {
	b := make([]byte, 512)
	copy(b, "x")
	copy(b[100:], "0000644\x000000000\x000000000\x00")
	copy(b[124:], fmt.Sprintf("%011o\x00", size&(1<<33-1)))
	if size >= 1<<33 {
		copy(b[124:], []byte{0x80, 0, 0, 0, byte(size >> 56), byte(size >> 48), byte(size >> 40), byte(size >> 32), byte(size >> 24), byte(size >> 16), byte(size >> 8), byte(size)})
	}
	copy(b[136:], "00000000000\x00")
	copy(b[156:], kind)
	copy(b[257:], "ustar  \x00")
	return checksum(b)
}

func checksum(b []byte) []byte {
	copy(b[148:], "        ")
	n := 0
	for _, c := range b[:512] {
		n += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", n))
	return b
}

// A blob that is no regular file may be the signature, and nobody may say that there
// is none.
func TestTarOfLinks(t *testing.T) {
	t.Parallel()
	dir, subject, want := site(t)
	list := members(t, dir)
	for i := range list {
		if filepath.Base(list[i].Name) == want[0].Manifest.Digest.Encoded() {
			list[i] = member{tar.Header{Name: list[i].Name, Typeflag: tar.TypeLink, Linkname: "elsewhere"}, ""}
		}
	}
	got, err := sourcetest.Find(t.Context(), layout.New(tarFile(t, list)), subject, verify.Limits{})
	if !errors.Is(err, verify.ErrUnreachable) || !strings.Contains(fmt.Sprint(err), want[0].Manifest.Digest.Encoded()) {
		t.Errorf("error %v", err)
	}
	sourcetest.Check(t, got, nil, 0)
}

func TestPipe(t *testing.T) {
	t.Parallel()
	name := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(name, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := sourcetest.Find(t.Context(), layout.New(name), ocispec.Descriptor{Digest: digest.FromString("x")}, verify.Limits{})
	if !errors.Is(err, verify.ErrUnreachable) || !strings.Contains(fmt.Sprint(err), "neither a directory nor a regular file") {
		t.Errorf("error %v", err)
	}
}

// Another file under the same name, or a directory, is read anew; so is the same file
// with something else in it.
func TestTarThatChanges(t *testing.T) {
	t.Parallel()
	var c sourcetest.Content
	dir, file, subject := t.TempDir(), filepath.Join(t.TempDir(), "layout.tar"), c.Image("app")
	src := layout.New(file)
	check := func(want ...verify.Evidence) {
		t.Helper()
		got, err := sourcetest.Find(t.Context(), src, subject, verify.Limits{})
		if err != nil {
			t.Error(err)
		}
		sourcetest.Check(t, got, want, 0)
	}
	if _, err := sourcetest.Find(t.Context(), src, subject, verify.Limits{}); !errors.Is(err, verify.ErrUnreachable) {
		t.Errorf("error %v", err)
	}
	sourcetest.Layout(t, dir, c, false)
	sourcetest.Tar(t, dir, file)
	check()
	one := c.Sign(subject, sourcetest.MediaTypeA, "one")
	sourcetest.Layout(t, dir, c, false)
	sourcetest.Tar(t, dir, file) // truncates it
	check(one)
	// In place, by one that is as long.
	var other sourcetest.Content
	other.Image("app")
	uno, again := other.Sign(subject, sourcetest.MediaTypeA, "uno"), t.TempDir()
	sourcetest.Layout(t, again, other, false)
	was, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	sourcetest.Tar(t, again, file)
	if now, err := os.Stat(file); err != nil || now.Size() != was.Size() || !os.SameFile(now, was) {
		t.Fatalf("another file, or not as long: %v", err)
	}
	if err := os.Chtimes(file, time.Time{}, was.ModTime().Add(time.Second)); err != nil {
		t.Fatal(err)
	}
	check(uno)
	two := c.Sign(subject, sourcetest.MediaTypeA, "two")
	sourcetest.Layout(t, dir, c, false)
	if err := os.Rename(packed(t, dir), file); err != nil {
		t.Fatal(err)
	}
	check(one, two)
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(dir, file); err != nil {
		t.Fatal(err)
	}
	check(one, two)
}

// The headers of a tar file are read once, and of a big one never what the layers hold.
func TestTarIsScannedOnce(t *testing.T) {
	t.Parallel()
	dir, subject, want := site(t)
	file := packed(t, dir)
	first, err := layout.Open(t.Context(), file, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	second, err := layout.Open(t.Context(), file, first.Tar())
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if first.Tar() == nil || first.Tar() != second.Tar() {
		t.Error("it was scanned again")
	}
	// It is not even opened to read: a context that has ended is no matter.
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	third, err := layout.Open(ended, file, first.Tar())
	if err != nil {
		t.Fatal(err)
	}
	third.Close()
	if _, err := layout.Open(ended, file, nil); !errors.Is(err, verify.ErrUnreachable) {
		t.Errorf("error %v", err)
	}

	// 3 GiB of a layer that the file system does not hold.
	big := filepath.Join(t.TempDir(), "big.tar")
	f, err := os.Create(big)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	raw := rawHeader("0", 3<<30)
	copy(raw, "blobs/sha256/"+digest.FromString("layer").Encoded())
	var rest bytes.Buffer
	pack(t, &rest, members(t, dir))
	if _, err = f.Write(checksum(raw)); err == nil {
		_, err = f.WriteAt(rest.Bytes(), 512+3<<30)
	}
	if err != nil {
		t.Fatal(err)
	}
	src := layout.New(big)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			got, err := sourcetest.Find(t.Context(), src, subject, verify.Limits{})
			if err != nil {
				t.Error(err)
			}
			sourcetest.Check(t, got, want, 0)
		})
	}
	wg.Wait()
	if _, _, err := src.Manifest(t.Context(), digest.FromString("layer")); !errors.Is(err, verify.ErrBudget) {
		t.Errorf("a layer was read: %v", err)
	}
}

func FuzzTar(f *testing.F) {
	dir, subject, want := site(f)
	var b bytes.Buffer
	pack(f, &b, members(f, dir))
	f.Add(b.Bytes())
	f.Add(b.Bytes()[:len(b.Bytes())/2])
	f.Add(append(rawHeader("S", 512), make([]byte, 2048)...))
	f.Add(append(rawHeader("L", 100), b.Bytes()...))
	f.Add(append(rawHeader("x", 1<<40), b.Bytes()...))
	f.Fuzz(func(t *testing.T, raw []byte) {
		file := filepath.Join(t.TempDir(), "layout.tar")
		if err := os.WriteFile(file, raw, 0o644); err != nil {
			t.Fatal(err)
		}
		got, err := sourcetest.Find(t.Context(), layout.New(file), subject, verify.Limits{})
		for _, ev := range got {
			if ev.Err == nil && !bytes.Contains(raw, ev.Blob) {
				t.Errorf("%d bytes that are not in the file", len(ev.Blob))
			}
			if ev.Err == nil && ev.Manifest.Digest == want[0].Manifest.Digest && !bytes.Equal(ev.Blob, want[0].Blob) {
				t.Errorf("envelope %q", ev.Blob)
			}
		}
		if err != nil && !errors.Is(err, verify.ErrUnreachable) && !errors.Is(err, verify.ErrBudget) {
			t.Errorf("error %v", err)
		}
	})
}
