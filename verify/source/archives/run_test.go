package archives_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/leaktest"
	"github.com/tidewaiter/tidewaiter/verify/source/archives"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

// A clock that tests set.
type clock struct {
	mu sync.Mutex
	at time.Time
}

func newClock() *clock { return &clock{at: time.Now()} }

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

func (c *clock) pass(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = c.at.Add(d)
}

// logged collects what is logged.
type logged struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logged) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// A run is archives that are watched.
type run struct {
	*archives.Archives
	t    testing.TB
	log  logged
	stop func()
}

// start watches the archives below dir until stop.
func start(t testing.TB, dir string, o archives.Options, edit ...func(*archives.Archives)) *run {
	t.Helper()
	r := begin(t, dir, o, edit...)
	<-r.Read()
	return r
}

// begin is start for who does not wait until everything was read.
func begin(t testing.TB, dir string, o archives.Options, edit ...func(*archives.Archives)) *run {
	t.Helper()
	r := &run{t: t}
	o.Log = slog.New(slog.NewTextHandler(&r.log, nil))
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Kinds == nil {
		o.Kinds = sourcetest.Kinds
	}
	r.Archives = archives.New(dir, o)
	r.Slowly(func(string) {}, time.Hour) // a machine under load is no disk that hangs
	for _, e := range edit {
		e(r.Archives)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := r.Run(ctx); err != nil {
			t.Error(err)
		}
	}()
	r.stop = sync.OnceFunc(func() { cancel(); <-done })
	t.Cleanup(r.stop)
	return r
}

// eventually waits for what another goroutine does.
func (r *run) eventually(what string, ok func() bool) {
	r.t.Helper()
	for end := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			r.t.Fatalf("%s: it did not come about; the log:\n%s", what, r.log.String())
		}
	}
}

// has checks which signatures of subject are found.
func (r *run) has(subject ocispec.Descriptor, want ...verify.Evidence) {
	r.t.Helper()
	got, err := sourcetest.Find(r.t.Context(), r, subject, verify.Limits{})
	if err != nil {
		r.t.Error(err)
	}
	sourcetest.Check(r.t, got, want, 0)
}

// A site is images with signatures, as a registry has them.
type site struct {
	sourcetest.Content
}

// image adds an image with one signature.
func (s *site) image(name string) (ocispec.Descriptor, verify.Evidence) {
	d := s.Image(name)
	return d, s.evidence(d, "envelope of "+name)
}

func (s *site) evidence(subject ocispec.Descriptor, envelope string) verify.Evidence {
	ev := s.Sign(subject, sourcetest.MediaTypeA, envelope)
	ev.Document = s.Blobs[ev.Manifest.Digest]
	return ev
}

// index adds an index of manifests.
func (s *site) index(manifests ...ocispec.Descriptor) ocispec.Descriptor {
	raw, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: manifests})
	if err != nil {
		panic(err)
	}
	return s.Add(ocispec.MediaTypeImageIndex, raw)
}

func decode(raw []byte, v any) {
	if err := json.Unmarshal(raw, v); err != nil {
		panic(err)
	}
}

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
	all, trouble := r.Status()
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

// forms are the ends of the names of a directory and of a tar file.
var forms = []string{"", ".tar"}
