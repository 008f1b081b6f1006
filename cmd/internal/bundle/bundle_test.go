package bundle

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

	"github.com/tidewaiter/tidewaiter/cmd/internal/config"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/notary/notarytest"
	"github.com/tidewaiter/tidewaiter/verify/source/layout"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
	"github.com/tidewaiter/tidewaiter/verify/source/store"
)

// A child is this program again, killed at a step.
const childStep, childWork = "BUNDLE_TEST_STEP", "BUNDLE_TEST_WORK"

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
	"trust": func(from, to string) error {
		files, err := config.Trust(from)
		if err != nil {
			return err
		}
		s, err := Stage(to, files)
		if err != nil {
			return err
		}
		_, err = s.Commit(time.Unix(1e9, 0))
		return err
	},
}

// save imports the layout at from into the state directory to.
func save(from, to, name string) error {
	ctx := context.Background()
	s, err := OpenShelf(ctx, to)
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

// A bundle of the name is there before, and the new one comes: whenever it ends, the
// old or the new is there whole, and nothing else that anybody would read.
func TestImportIsKilledAtEachStep(t *testing.T) {
	t.Parallel()
	var before, after sourcetest.Content
	subject := before.Image("app")
	after.Image("app")
	old := before.Sign(subject, verify.MediaTypeJWS, "old")
	fresh := after.Sign(subject, verify.MediaTypeJWS, "new")
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
		entries, err := os.ReadDir(filepath.Join(state, "bundles"))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if !strings.HasPrefix(e.Name(), ".") && e.Name() != "site.tar" {
				t.Errorf("step %d leaves %s", step, e.Name())
			}
		}
		got, err := sourcetest.Find(t.Context(), layout.New(filepath.Join(state, "bundles/site.tar")), subject, verify.Limits{})
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
	entries, err := os.ReadDir(filepath.Join(state, "bundles"))
	if err != nil || len(entries) != 2 { // with the lock
		t.Errorf("left: %v, error %v", entries, err)
	}
}

func trustConfig(t *testing.T, dir, identity string) verify.Epoch {
	t.Helper()
	ca := notarytest.NewCA(notarytest.CAOptions{})
	if err := notarytest.WriteConfig(dir, notarytest.Stores{"ca/acme/root.crt": ca.PEM()}, notarytest.Statement("prod", identity)); err != nil {
		t.Fatal(err)
	}
	c, err := config.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	return c.Epoch
}

// Trust is put in force: whenever it ends, the configuration is the old one or the new
// one, valid and whole.
func TestTrustIsKilledAtEachStep(t *testing.T) {
	t.Parallel()
	from := t.TempDir()
	trustConfig(t, from, "x509.subject: C=US, ST=WA, O=new")
	for name, there := range map[string]bool{"over another": true, "on a new node": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var seen []verify.Epoch
			var before verify.Epoch
			for step := 1; ; step++ {
				dir := filepath.Join(t.TempDir(), "etc")
				if there {
					if before = trustConfig(t, dir, "x509.subject: C=US, ST=WA, O=old"); before == (verify.Epoch{}) {
						t.Fatal("no epoch")
					}
					if err := os.WriteFile(filepath.Join(dir, "credentials.json"), []byte("{}"), 0o600); err != nil {
						t.Fatal(err)
					}
				}
				done := !killed(t, step, "trust", from, dir)
				c, err := config.Load(dir)
				var epoch verify.Epoch
				switch {
				case err == nil:
					epoch = c.Epoch
				case there || !errors.Is(err, config.ErrNone):
					t.Fatalf("step %d: %v", step, err)
				}
				if epoch == before {
					epoch = verify.Epoch{}
				}
				seen = append(seen, epoch)
				if there {
					if info, err := os.Stat(filepath.Join(dir, "credentials.json")); err != nil || info.Mode().Perm() != 0o600 {
						t.Errorf("step %d: %v, error %v", step, info, err)
					}
				}
				if done {
					if epoch == (verify.Epoch{}) {
						t.Error("it ended and the old one is there")
					}
					backups, _ := filepath.Glob(dir + ".before-20010909T014640Z")
					if there != (len(backups) == 1) {
						t.Errorf("backups %q", backups)
					}
					break
				}
			}
			for i, e := range seen {
				if e != (verify.Epoch{}) && e != seen[len(seen)-1] || i > 0 && seen[i-1] != (verify.Epoch{}) && e != seen[i-1] {
					t.Errorf("step %d: neither the old nor the new one, or the old after the new", i+1)
				}
			}
			if len(seen) < 3 || seen[0] != (verify.Epoch{}) {
				t.Errorf("%d steps", len(seen))
			}
		})
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
	gate := store.New(state, store.Options{Log: slog.New(slog.NewTextHandler(t.Output(), nil)), Now: time.Now})
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
			got, err := sourcetest.Find(t.Context(), gate, subject, verify.Limits{})
			if err == nil && len(got) == len(want) && (len(got) == 0 || string(got[0].Blob) == string(want[0].Blob)) {
				sourcetest.Check(t, got, want, 0)
				break
			}
			if time.Now().After(end) {
				t.Fatalf("%d signatures, %v", len(got), err)
			}
		}
		if list, trouble := gate.Bundles(); trouble != "" || len(want) > 0 && (len(list) != 1 || list[0].Trouble != "") {
			t.Errorf("%+v %s", list, trouble)
		}
	}
	finds(want)
	var c sourcetest.Content
	c.Image("app")
	other := c.Sign(subject, verify.MediaTypeJWS, "other")
	next := t.TempDir()
	sourcetest.Layout(t, next, c, false)
	if err := save(next, state, "site"); err != nil {
		t.Fatal(err)
	}
	finds(other)

	// A directory of that name is replaced too.
	if err := os.Rename(filepath.Join(state, "bundles/site.tar"), filepath.Join(t.TempDir(), "gone")); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(filepath.Join(state, "bundles/site"), os.DirFS(next)); err != nil {
		t.Fatal(err)
	}
	if err := save(dir, state, "site"); err != nil {
		t.Fatal(err)
	}
	finds(want)
	s, err := OpenShelf(t.Context(), state)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Remove("site"); err != nil {
		t.Fatal(err)
	}
	finds()
}

// Who watches the configuration notices that all of it is another one.
func TestWatchersNoticeTrust(t *testing.T) {
	t.Parallel()
	from, dir := t.TempDir(), filepath.Join(t.TempDir(), "etc")
	trustConfig(t, from, "x509.subject: C=US, ST=WA, O=new")
	trustConfig(t, dir, "x509.subject: C=US, ST=WA, O=old")
	current, err := config.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	files, err := config.Trust(from)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	seen, ended := make(chan verify.Epoch, 10), make(chan error)
	hup := make(chan os.Signal)
	go func() {
		ended <- config.Watch(ctx, dir, current, hup, func(c *config.Config, err error) {
			if err != nil {
				t.Errorf("invalid meanwhile: %v", err)
				return
			}
			seen <- c.Epoch
		})
	}()
	defer func() {
		cancel()
		<-ended
	}()
	hup <- syscall.SIGHUP // taken once it watches
	for range 2 {
		s, err := Stage(dir, files)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Commit(time.Unix(1e9, 0)); err != nil {
			t.Fatal(err)
		}
		now, err := config.Load(dir)
		if err != nil {
			t.Fatal(err)
		}
		select {
		case epoch := <-seen:
			if epoch != now.Epoch {
				t.Error("another configuration was noticed")
			}
		case <-time.After(50 * time.Second): // it looks each minute by itself
			t.Fatal("nothing was noticed")
		}
		// And once more, with what was before.
		if files, err = config.Trust(dir + ".before-20010909T014640Z"); err != nil {
			t.Fatal(err)
		}
	}
}

// site is a layout with one signed image, and what is signed.
func site(t testing.TB) (dir string, subject ocispec.Descriptor, want verify.Evidence) {
	var c sourcetest.Content
	dir, subject = t.TempDir(), c.Image("app")
	want = c.Sign(subject, verify.MediaTypeJWS, "envelope")
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
				s, err := OpenShelf(t.Context(), state)
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
				got, err := sourcetest.Find(t.Context(), layout.New(at), subject, verify.Limits{})
				if err != nil {
					t.Error(err)
				}
				sourcetest.Check(t, got, []verify.Evidence{want}, 0)
				left, err := filepath.Glob(filepath.Join(s.Dir(), ".tmp-*"))
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

// What a hostile bundle says of itself is quoted, and what it holds is bounded.
func TestHostileContents(t *testing.T) {
	t.Parallel()
	const esc = "\x1b[31m\nimported to /etc\u202e"
	var c sourcetest.Content
	subject := c.Image("app")
	c.Sign(subject, verify.MediaTypeJWS, "no envelope"+esc)
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
	var deep sourcetest.Content
	d := deep.Image("app")
	for range maxDepth + 1 {
		raw, err := json.Marshal(ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{d}})
		if err != nil {
			t.Fatal(err)
		}
		d = deep.Add(ocispec.MediaTypeImageIndex, raw)
	}
	deep.Images = []ocispec.Descriptor{d}
	var wide sourcetest.Content
	for i := range 3 {
		raw, err := json.Marshal(ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Layers: make([]ocispec.Descriptor, 20_000), Annotations: map[string]string{"n": fmt.Sprint(i)}})
		if err != nil {
			t.Fatal(err)
		}
		raw = bytes.ReplaceAll(raw, []byte(`{"mediaType":"","digest":"","size":0}`), []byte(`{}`))
		list := bytes.Repeat([]byte(`{},`), 45_000)
		raw = bytes.Replace(raw, []byte(`"layers":[`), append([]byte(`"layers":[`), list...), 1)
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
	var often sourcetest.Content
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
	var c sourcetest.Content
	subject := c.Image("app")
	want := c.Sign(subject, verify.MediaTypeJWS, "good")
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
	got, err := sourcetest.Find(t.Context(), layout.New(filepath.Join(state, "bundles/x.tar")), subject, verify.Limits{})
	if err != nil {
		t.Error(err)
	}
	sourcetest.Check(t, got, []verify.Evidence{want}, 0)
	if r := inspect(t, filepath.Join(state, "bundles/x.tar")); r.Referrers != 0 || len(r.Images) != 1 {
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
			var c sourcetest.Content
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

// Everything of a configuration directory comes along, as it was.
func TestStageKeeps(t *testing.T) {
	t.Parallel()
	from, dir := t.TempDir(), filepath.Join(t.TempDir(), "etc")
	trustConfig(t, from, "x509.subject: C=US, ST=WA, O=new")
	trustConfig(t, dir, "x509.subject: C=US, ST=WA, O=old")
	if err := errors.Join(
		os.WriteFile(filepath.Join(dir, "secret"), []byte("s"), 0o600),
		os.Symlink("secret", filepath.Join(dir, "link")),
		os.Mkdir(filepath.Join(dir, "extra"), 0o750),
		os.WriteFile(filepath.Join(dir, "extra/a"), []byte("a"), 0o640),
	); err != nil {
		t.Fatal(err)
	}
	files, err := config.Trust(from)
	if err != nil {
		t.Fatal(err)
	}
	s, err := Stage(dir, files)
	if err != nil {
		t.Fatal(err)
	}
	backup, err := s.Commit(time.Unix(1e9, 0))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"secret", "link", "extra", "extra/a"} {
		was, err1 := os.Lstat(filepath.Join(backup, name))
		is, err2 := os.Lstat(filepath.Join(dir, name))
		if err := errors.Join(err1, err2); err != nil || was.Mode() != is.Mode() || !was.IsDir() && was.Size() != is.Size() {
			t.Errorf("%s: %v, %v, error %v", name, was, is, err)
		}
	}
	now, err := config.Trust(dir)
	if err != nil || len(now) != len(files) || !bytes.Equal(now["trustpolicy.json"], files["trustpolicy.json"]) {
		t.Errorf("%d files, error %v", len(now), err)
	}
	// A pipe is nothing that can be copied.
	if err := syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Stage(dir, files); err == nil {
		t.Error("a pipe was copied")
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(dir), ".*next*")); len(left) > 0 {
		t.Errorf("left %q", left)
	}
}

// An error that comes when the trust is in force says where what was before is.
func TestStageHalf(t *testing.T) {
	t.Parallel()
	from := t.TempDir()
	trustConfig(t, from, "x509.subject: C=US, ST=WA, O=new")
	files, err := config.Trust(from)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), strings.Repeat("e", 232)) // with .before-… it is too long for a name
	trustConfig(t, dir, "x509.subject: C=US, ST=WA, O=old")
	was, err := config.Trust(dir)
	if err != nil {
		t.Fatal(err)
	}
	s, err := Stage(dir, files)
	if err != nil {
		t.Fatal(err)
	}
	backup, err := s.Commit(time.Unix(1e9, 0))
	if !errors.Is(err, syscall.ENAMETOOLONG) || backup == "" || !strings.Contains(err.Error(), "what was before is in "+backup) {
		t.Fatalf("error %v, backup in %q", err, backup)
	}
	s.Discard()
	for at, want := range map[string]map[string][]byte{dir: files, backup: was} {
		if got, err := config.Trust(at); err != nil || !bytes.Equal(got["trustpolicy.json"], want["trustpolicy.json"]) {
			t.Errorf("%s: %s, error %v", at, got["trustpolicy.json"], err)
		}
	}
}

// What somebody else has changed since the copy was made is not undone.
func TestStageMeanwhile(t *testing.T) {
	t.Parallel()
	from := t.TempDir()
	trustConfig(t, from, "x509.subject: C=US, ST=WA, O=new")
	files, err := config.Trust(from)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(dir string) error{
		"a file that is written": func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "config.yaml"), []byte("version: 1\nmode: audit\n"), 0o600)
		},
		"a mode":        func(dir string) error { return os.Chmod(filepath.Join(dir, "config.yaml"), 0o640) },
		"a file more":   func(dir string) error { return os.WriteFile(filepath.Join(dir, "more"), nil, 0o600) },
		"its trust":     func(dir string) error { return os.WriteFile(filepath.Join(dir, "trustpolicy.json"), nil, 0o600) },
		"the file gone": func(dir string) error { return os.Remove(filepath.Join(dir, "config.yaml")) },
		"all of it":     os.RemoveAll,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "etc")
			trustConfig(t, dir, "x509.subject: C=US, ST=WA, O=old")
			if err := os.WriteFile(filepath.Join(dir, "config.yaml"), []byte("version: 1\nmode: enforce\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			s, err := Stage(dir, files)
			if err != nil {
				t.Fatal(err)
			}
			if err := change(dir); err != nil {
				t.Fatal(err)
			}
			was, _ := sumOf(dir)
			if backup, err := s.Commit(time.Unix(1e9, 0)); err == nil || backup != "" {
				t.Errorf("it is in force, and what was before in %q", backup)
			}
			s.Discard()
			if is, _ := sumOf(dir); is != was {
				t.Error("something was changed")
			}
			if left, _ := filepath.Glob(filepath.Join(filepath.Dir(dir), ".*")); len(left) > 0 {
				t.Errorf("left %q", left)
			}
		})
	}
}

// Where the last step fails, what was before is not removed with what was prepared.
func TestStageBackupStays(t *testing.T) {
	t.Parallel()
	from, dir := t.TempDir(), filepath.Join(t.TempDir(), "etc")
	trustConfig(t, from, "x509.subject: C=US, ST=WA, O=new")
	trustConfig(t, dir, "x509.subject: C=US, ST=WA, O=old")
	files, err := config.Trust(from)
	if err != nil {
		t.Fatal(err)
	}
	was, err := config.Trust(dir)
	if err != nil {
		t.Fatal(err)
	}
	s, err := Stage(dir, files)
	if err != nil {
		t.Fatal(err)
	}
	// A file has the name, and then the other one that it would have.
	backup := dir + ".before-20010909T014640Z"
	if err := errors.Join(os.WriteFile(backup, nil, 0o600),
		os.WriteFile(backup+"-"+strings.TrimPrefix(filepath.Base(s.next), ".etc-next-"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	backup, err = s.Commit(time.Unix(1e9, 0))
	if err == nil || !strings.Contains(err.Error(), "has the trust of the bundle now") {
		t.Errorf("error %v", err)
	}
	s.Discard()
	now, err := config.Trust(dir)
	if err != nil || !bytes.Equal(now["trustpolicy.json"], files["trustpolicy.json"]) {
		t.Errorf("the trust is not in force: %v", err)
	}
	before, err := config.Trust(backup)
	if err != nil || !bytes.Equal(before["trustpolicy.json"], was["trustpolicy.json"]) {
		t.Errorf("what was before is not there: %v", err)
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
