package archive

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/source/archives"
	"github.com/tidewaiter/tidewaiter/verify/source/layout"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

// A child is this program again, killed at a step.
const childStep, childWork = "ARCHIVE_TEST_STEP", "ARCHIVE_TEST_WORK"

func TestMain(m *testing.M) {
	if os.Getenv(childStep) == "" {
		os.Exit(m.Run())
	}
	left, err := strconv.Atoi(os.Getenv(childStep))
	crossed = func() {
		if left--; left == 0 {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	if err == nil {
		err = works[os.Getenv(childWork)](os.Args[1], os.Args[2])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// works are what a child does.
var works = map[string]func(from, to string) error{
	"import": func(from, to string) error { return save(from, to, "site") },
}

// save imports the layout at from into the state directory to.
func save(from, to, name string) error {
	ctx := context.Background()
	s, err := OpenImporter(ctx, to)
	if err != nil {
		return err
	}
	defer s.Close()
	c, err := Open(ctx, from, nil, s.Dir())
	if err != nil {
		return err
	}
	defer c.Close()
	r, err := c.Inspect(ctx, from, nil, nil)
	if err == nil && len(r.Problems) > 0 {
		err = errors.New(r.Problems[0])
	}
	if err == nil {
		_, err = s.Save(ctx, c, r, name)
	}
	return err
}

// killed runs the work in a child that is killed at the step, and reports whether it
// came so far.
func killed(t *testing.T, step int, work, from, to string) bool {
	t.Helper()
	cmd := exec.Command(os.Args[0], from, to)
	cmd.Env = append(os.Environ(), childStep+"="+strconv.Itoa(step), childWork+"="+work)
	out, err := cmd.CombinedOutput()
	if err == nil {
		return false
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("step %d: %v\n%s", step, err, out)
	}
	return true
}

// An archive of the name is there before, and the new one comes: whenever it ends, the
// old or the new is there whole, and nothing else that anybody would read.
func TestImportIsKilledAtEachStep(t *testing.T) {
	t.Parallel()
	before, after := sourcetest.Content{Kind: notary.Kind}, sourcetest.Content{Kind: notary.Kind}
	subject := before.Image("app")
	after.Image("app")
	old := before.Sign(subject, notary.MediaTypeJWS, "old")
	fresh := after.Sign(subject, notary.MediaTypeJWS, "new")
	oldDir, newDir := t.TempDir(), t.TempDir()
	sourcetest.Layout(t, oldDir, before, false)
	sourcetest.Layout(t, newDir, after, false)
	olds, news := 0, 0
	state := t.TempDir()
	for step := 1; ; step++ {
		if err := save(oldDir, state, "site"); err != nil { // also removes what the last one left
			t.Fatal(err)
		}
		done := !killed(t, step, "import", newDir, state)
		entries, err := os.ReadDir(filepath.Join(state, "archives"))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if !strings.HasPrefix(e.Name(), ".") && e.Name() != "site.tar" {
				t.Errorf("step %d leaves %s", step, e.Name())
			}
		}
		got, err := sourcetest.FindKind(t.Context(), notary.Kind, layout.New(filepath.Join(state, "archives/site.tar")), subject, verify.Limits{})
		if err != nil || len(got) != 1 || got[0].Err != nil {
			t.Fatalf("step %d: %d signatures, error %v", step, len(got), err)
		}
		switch string(got[0].Blob) {
		case string(old.Blob):
			olds++
			if done {
				t.Errorf("it ended and the old one is there")
			}
		case string(fresh.Blob):
			news++
		default:
			t.Errorf("step %d: %q", step, got[0].Blob)
		}
		if done {
			break
		}
	}
	if olds < 5 || news < 2 {
		t.Errorf("%d times the old one, %d times the new one", olds, news)
	}
	entries, err := os.ReadDir(filepath.Join(state, "archives"))
	if err != nil || len(entries) != 2 { // with the lock
		t.Errorf("left: %v, error %v", entries, err)
	}
}

// A gate that runs reads what an import puts there, and no longer what it replaces or
// what is removed.
func TestGateReadsImports(t *testing.T) {
	t.Parallel()
	state := t.TempDir()
	dir, subject, want := site(t)
	if err := save(dir, state, "site"); err != nil {
		t.Fatal(err)
	}
	gate := archives.New(state, archives.Options{Log: slog.New(slog.NewTextHandler(t.Output(), nil)), Now: time.Now, Kinds: []verify.Kind{notary.Kind}})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- gate.Run(ctx) }()
	defer func() {
		cancel()
		<-ended
	}()
	finds := func(want ...verify.Evidence) {
		t.Helper()
		for end := time.Now().Add(25 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			// What is half there, or was just replaced, is an error until it is read anew.
			got, err := sourcetest.FindKind(t.Context(), notary.Kind, gate, subject, verify.Limits{})
			if err == nil && len(got) == len(want) && (len(got) == 0 || string(got[0].Blob) == string(want[0].Blob)) {
				sourcetest.Check(t, got, want, 0)
				break
			}
			if time.Now().After(end) {
				t.Fatalf("%d signatures, %v", len(got), err)
			}
		}
		if list, trouble := gate.Status(); trouble != "" || len(want) > 0 && (len(list) != 1 || list[0].Trouble != "") {
			t.Errorf("%+v %s", list, trouble)
		}
	}
	finds(want)
	c := sourcetest.Content{Kind: notary.Kind}
	c.Image("app")
	other := c.Sign(subject, notary.MediaTypeJWS, "other")
	next := t.TempDir()
	sourcetest.Layout(t, next, c, false)
	if err := save(next, state, "site"); err != nil {
		t.Fatal(err)
	}
	finds(other)

	// A directory of that name is replaced too.
	if err := os.Rename(filepath.Join(state, "archives/site.tar"), filepath.Join(t.TempDir(), "gone")); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(filepath.Join(state, "archives/site"), os.DirFS(next)); err != nil {
		t.Fatal(err)
	}
	if err := save(dir, state, "site"); err != nil {
		t.Fatal(err)
	}
	finds(want)
	s, err := OpenImporter(t.Context(), state)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Remove("site"); err != nil {
		t.Fatal(err)
	}
	finds()
}

// site is a layout with one signed image, and what is signed.
func site(t testing.TB) (dir string, subject ocispec.Descriptor, want verify.Evidence) {
	c := sourcetest.Content{Kind: notary.Kind}
	dir, subject = t.TempDir(), c.Image("app")
	want = c.Sign(subject, notary.MediaTypeJWS, "envelope")
	sourcetest.Layout(t, dir, c, false)
	return dir, subject, want
}

// packed is the layout dir in each form that it may come in.
func packed(t testing.TB, dir string) map[string][]byte {
	t.Helper()
	file := filepath.Join(t.TempDir(), "x.tar")
	sourcetest.Tar(t, dir, file)
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var gz, zst bytes.Buffer
	g := gzip.NewWriter(&gz)
	z, err := zstd.NewWriter(&zst)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range []io.WriteCloser{g, z} {
		if _, err := w.Write(raw); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return map[string][]byte{"x.tar": raw, "x.tar.gz": gz.Bytes(), "x.tgz": gz.Bytes(), "x.tar.zst": zst.Bytes()}
}

func TestForms(t *testing.T) {
	t.Parallel()
	dir, subject, want := site(t)
	// A layer as docker save has it, which is not unpacked.
	layer := append([]byte("\x1f\x8b"), bytes.Repeat([]byte("layer "), 1<<18)...)
	name := filepath.Join(dir, "blobs/sha256", digest.FromBytes(layer).Encoded())
	if err := os.WriteFile(name, layer, 0o644); err != nil {
		t.Fatal(err)
	}
	for form, raw := range packed(t, dir) {
		for _, stream := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s stream=%t", form, stream), func(t *testing.T) {
				t.Parallel()
				state := t.TempDir()
				file, stdin := "-", io.Reader(bytes.NewReader(raw))
				if !stream {
					file, stdin = filepath.Join(t.TempDir(), form), nil
					if err := os.WriteFile(file, raw, 0o644); err != nil {
						t.Fatal(err)
					}
					if got, err := NameOf(file); err != nil || got != "x" {
						t.Errorf("name %q, error %v", got, err)
					}
				}
				s, err := OpenImporter(t.Context(), state)
				if err != nil {
					t.Fatal(err)
				}
				defer s.Close()
				c, err := Open(t.Context(), file, stdin, s.Dir())
				if err != nil {
					t.Fatal(err)
				}
				if c.scratch != "" {
					if _, err := os.Stat(filepath.Join(c.scratch, "blobs/sha256", filepath.Base(name))); err == nil {
						t.Error("a layer was unpacked")
					}
				}
				r, err := c.Inspect(t.Context(), file, nil, nil)
				if err != nil || r.Signatures != 1 || len(r.Problems) > 0 {
					t.Fatalf("%+v, error %v", r, err)
				}
				at, err := s.Save(t.Context(), c, r, "x")
				if err != nil {
					t.Fatal(err)
				}
				c.Close()
				got, err := sourcetest.FindKind(t.Context(), notary.Kind, layout.New(at), subject, verify.Limits{})
				if err != nil {
					t.Error(err)
				}
				sourcetest.Check(t, got, []verify.Evidence{want}, 0)
				left, err := filepath.Glob(filepath.Join(s.Dir(), ".unfinished-*"))
				if err != nil || len(left) > 0 {
					t.Errorf("left %q, error %v", left, err)
				}
			})
		}
	}
}

// A stream that is broken, endless or hostile ends with an error, and leaves nothing.
func TestHostileStreams(t *testing.T) {
	t.Parallel()
	dir, _, _ := site(t)
	forms := packed(t, dir)
	member := func(h tar.Header, body string) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		h.Size = int64(len(body))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, body); err != nil {
			t.Fatal(err)
		}
		return append(b.Bytes(), bytes.Repeat([]byte{0}, (512-len(body)%512)%512)...)
	}
	cut := func(raw []byte, n int) []byte { return raw[:len(raw)-n] }
	bad := bytes.Clone(forms["x.tgz"])
	bad[len(bad)-6] ^= 1
	for name, raw := range map[string][]byte{
		"empty":           nil,
		"noise":           bytes.Repeat([]byte("noise"), 1000),
		"half a gzip":     cut(forms["x.tgz"], 100),
		"a gzip checksum": bad,
		"half a zstd":     cut(forms["x.tar.zst"], 100),
		"a zstd of noise": append(bytes.Clone(magicZstd), bytes.Repeat([]byte{0xff}, 100)...),
		"index.json twice": append(member(tar.Header{Name: "index.json", Typeflag: tar.TypeReg}, "{}"),
			member(tar.Header{Name: "./index.json", Typeflag: tar.TypeReg}, "{}")...),
		"names that lead out": append(member(tar.Header{Name: "../index.json", Typeflag: tar.TypeReg}, "{}"),
			member(tar.Header{Name: "blobs/sha256/../../../x", Typeflag: tar.TypeReg}, "{}")...),
		"a link": member(tar.Header{Name: "oci-layout", Typeflag: tar.TypeSymlink, Linkname: "/etc/passwd"}, ""),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			scratch := t.TempDir()
			c, err := Open(t.Context(), "-", bytes.NewReader(raw), scratch)
			if err == nil {
				c.Close()
				t.Error("no error")
			}
			if left, _ := os.ReadDir(scratch); len(left) > 0 {
				t.Errorf("left %v", left)
			}
		})
	}
}

// Of an archive that is no layout it is said what it is, and what to do, however it is
// packed: k3s's are compressed docker archives.
func TestDockerArchive(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for name, body := range map[string]string{"manifest.json": "[]", "0123.json": "{}", "0123/layer.tar": "layer"} {
		name = filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o700), os.WriteFile(name, []byte(body), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	for name, raw := range packed(t, dir) {
		file := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(file, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		for from, in := range map[string]io.Reader{file: nil, "-": bytes.NewReader(raw)} {
			if _, err := Open(t.Context(), from, in, t.TempDir()); err == nil || !strings.Contains(err.Error(), layout.ErrDocker.Error()) {
				t.Errorf("%s as %s: error %v", name, from, err)
			}
		}
	}
}

// What a hostile archive says of itself is quoted, and what it holds is bounded.
func TestHostileContents(t *testing.T) {
	t.Parallel()
	const esc = "\x1b[31m\nimported to /etc\u202e"
	c := sourcetest.Content{Kind: notary.Kind}
	subject := c.Image("app")
	c.Sign(subject, notary.MediaTypeJWS, "no envelope"+esc)
	c.Sign(subject, "application/x"+esc, "x", func(m *ocispec.Manifest) { m.ArtifactType = "application/x" + esc })
	c.Images[0].Annotations = map[string]string{ocispec.AnnotationRefName: "app" + esc}
	index, err := json.Marshal(ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{
		{MediaType: ocispec.MediaTypeImageManifest, Digest: subject.Digest, Size: subject.Size, Platform: &ocispec.Platform{OS: "linux" + esc, Architecture: "x"}},
		{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("gone"), Size: 7, Platform: &ocispec.Platform{OS: "linux", Architecture: "arm64"}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	c.Images = append(c.Images, c.Add(ocispec.MediaTypeImageIndex, index))
	dir := t.TempDir()
	sourcetest.Layout(t, dir, c, true)
	r := inspect(t, dir)
	var b strings.Builder
	if err := r.Text(&b); err != nil {
		t.Fatal(err)
	}
	if i := strings.IndexFunc(b.String(), func(r rune) bool { return r != '\n' && !unicode.IsPrint(r) }); i >= 0 {
		t.Errorf("not printable: %q", b.String()[i:])
	}
	if strings.Contains(b.String(), "\nimported to") {
		t.Errorf("a line of its own:\n%s", b.String())
	}
	if r.Signatures != 1 || r.Referrers != 1 || len(r.Images) != 2 || len(r.Problems) != 0 {
		t.Errorf("%+v", r)
	}
	if m := r.Images[1].Manifests; len(m) != 2 || m[0].Missing || !m[1].Missing {
		t.Errorf("%+v", r.Images[1])
	}
}

func inspect(t testing.TB, dir string) *Report {
	t.Helper()
	c, err := Open(t.Context(), dir, nil, "")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	r, err := c.Inspect(t.Context(), dir, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestBounds(t *testing.T) {
	t.Parallel()
	deep := sourcetest.Content{Kind: notary.Kind}
	d := deep.Image("app")
	for range maxDepth + 1 {
		raw, err := json.Marshal(ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{d}})
		if err != nil {
			t.Fatal(err)
		}
		d = deep.Add(ocispec.MediaTypeImageIndex, raw)
	}
	deep.Images = []ocispec.Descriptor{d}
	wide := sourcetest.Content{Kind: notary.Kind}
	for i := range 65 {
		raw := fmt.Appendf(nil, `{"mediaType":%q,"layers":[%s{}],"annotations":{"n":"%d"}}`, ocispec.MediaTypeImageManifest, strings.Repeat("{},", 2047), i)
		wide.Images = append(wide.Images, wide.Add(ocispec.MediaTypeImageManifest, raw))
	}
	for name, c := range map[string]sourcetest.Content{"deep": deep, "wide": wide} {
		dir := t.TempDir()
		sourcetest.Layout(t, dir, c, false)
		if c, err := Open(t.Context(), dir, nil, ""); !errors.Is(err, verify.ErrBudget) {
			t.Errorf("%s: error %v", name, err)
			if err == nil {
				c.Close()
			}
		}
	}

	// Small indexes of which each lists the next forty times.
	often := sourcetest.Content{Kind: notary.Kind}
	d = often.Image("app")
	for range maxDepth {
		raw, err := json.Marshal(ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: slices.Repeat([]ocispec.Descriptor{d}, 40)})
		if err != nil {
			t.Fatal(err)
		}
		d = often.Add(ocispec.MediaTypeImageIndex, raw)
	}
	often.Images = []ocispec.Descriptor{d}
	at := t.TempDir()
	sourcetest.Layout(t, at, often, false)
	opened, err := Open(t.Context(), at, nil, "")
	if err != nil {
		t.Fatal(err)
	}
	defer opened.Close()
	if _, err := opened.Inspect(t.Context(), at, nil, nil); !errors.Is(err, verify.ErrBudget) {
		t.Errorf("often: error %v", err)
	}

	// A referrer that is too big is left out, and not the rest.
	c := sourcetest.Content{Kind: notary.Kind}
	subject := c.Image("app")
	want := c.Sign(subject, notary.MediaTypeJWS, "good")
	c.Sign(subject, "application/x", "x", func(m *ocispec.Manifest) {
		m.ArtifactType, m.Layers[0].Size = "application/x", maxBlob+1
	})
	dir, state := t.TempDir(), t.TempDir()
	sourcetest.Layout(t, dir, c, false)
	if r := inspect(t, dir); len(r.LeftOut) != 1 || len(r.Problems) != 0 || r.Signatures != 1 {
		t.Errorf("%+v", r)
	}
	if err := save(dir, state, "x"); err != nil {
		t.Fatal(err)
	}
	got, err := sourcetest.FindKind(t.Context(), notary.Kind, layout.New(filepath.Join(state, "archives/x.tar")), subject, verify.Limits{})
	if err != nil {
		t.Error(err)
	}
	sourcetest.Check(t, got, []verify.Evidence{want}, 0)
	if r := inspect(t, filepath.Join(state, "archives/x.tar")); r.Referrers != 0 || len(r.Images) != 1 {
		t.Errorf("%+v", r)
	}
}

// Trust that is no trust is a problem and never files.
func TestHostileTrust(t *testing.T) {
	t.Parallel()
	type file struct{ name, body string }
	policy := file{"trustpolicy.json", "{}"}
	for name, artifacts := range map[string][][]file{
		"no policy":          {{{"truststore/x509/ca/acme/root.crt", "x"}}},
		"two policies":       {{policy, {"trustpolicy.oci.json", "{}"}}},
		"one policy twice":   {{policy, policy}},
		"two artifacts":      {{policy}, {policy, {"truststore/x509/ca/acme/root.crt", "x"}}},
		"a way out":          {{policy, {"truststore/x509/ca/../root.crt", "x"}}},
		"an absolute way":    {{policy, {"/etc/passwd", "x"}}},
		"another file":       {{policy, {"config.yaml", "mode: audit"}}},
		"a hidden directory": {{policy, {"truststore/x509/..data/acme/root.crt", "x"}}},
		"too deep":           {{policy, {"truststore/x509/ca/acme/x/root.crt", "x"}}},
		"no name":            {{policy, {"", "x"}}},
		"too big":            {{policy, {"truststore/x509/ca/acme/root.crt", strings.Repeat("x", maxTrustFile+1)}}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := sourcetest.Content{Kind: notary.Kind}
			for _, files := range artifacts {
				var layers []ocispec.Descriptor
				for _, f := range files {
					d := c.Add(MediaTypeAnchors, []byte(f.body))
					d.Annotations = map[string]string{ocispec.AnnotationTitle: f.name}
					layers = append(layers, d)
				}
				config := c.Add(ocispec.MediaTypeEmptyJSON, []byte("{}"))
				raw, err := json.Marshal(ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: ArtifactTypeTrust, Config: config, Layers: layers})
				if err != nil {
					t.Fatal(err)
				}
				c.Images = append(c.Images, c.Add(ocispec.MediaTypeImageManifest, raw))
			}
			dir := t.TempDir()
			sourcetest.Layout(t, dir, c, false)
			if r := inspect(t, dir); r.Trust != nil || len(r.Problems) != 1 {
				t.Errorf("%+v", r)
			}
		})
	}
}

func FuzzOpen(f *testing.F) {
	dir, _, _ := site(f)
	for _, raw := range packed(f, dir) {
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		c, err := Open(t.Context(), "-", bytes.NewReader(raw), t.TempDir())
		if err != nil {
			return
		}
		defer c.Close()
		r, err := c.Inspect(t.Context(), "-", nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		if err := errors.Join(r.Text(&b), r.JSON(io.Discard)); err != nil {
			t.Fatal(err)
		}
		if i := bytes.IndexFunc(b.Bytes(), func(r rune) bool { return r != '\n' && !unicode.IsPrint(r) }); i >= 0 {
			t.Errorf("not printable: %q", b.Bytes()[i:])
		}
		if len(r.Problems) > 0 {
			return
		}
		file := filepath.Join(t.TempDir(), "x.tar")
		if err := c.evidenceOf(r).Write(file); err != nil {
			t.Fatal(err)
		}
		again, err := Open(t.Context(), file, nil, "")
		if err != nil {
			t.Fatal(err)
		}
		defer again.Close()
		if second, err := again.Inspect(t.Context(), "-", nil, nil); err != nil || second.Signatures != r.Signatures && len(r.LeftOut) == 0 || len(second.Problems) > 0 {
			t.Errorf("%+v, error %v", second, err)
		}
	})
}

// TestNoMoreThanIsRead: create writes nothing that no reader takes.
func TestNoMoreThanIsRead(t *testing.T) {
	t.Parallel()
	var l Layout
	for i := range layout.MaxFiles - 2 {
		l.add("text/plain", fmt.Append(nil, i))
	}
	if err := l.Tar(io.Discard); err != nil {
		t.Errorf("as many files as are read: %v", err)
	}
	l.add("text/plain", []byte("one more"))
	if err := l.Tar(io.Discard); !errors.Is(err, verify.ErrBudget) || !strings.Contains(err.Error(), "make several evidence archives") {
		t.Errorf("a file more: %v", err)
	}
}
