package store_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/leaktest"
	"github.com/tidewaiter/tidewaiter/verify/source/archives"
	"github.com/tidewaiter/tidewaiter/verify/source/catalog"
	"github.com/tidewaiter/tidewaiter/verify/source/layout"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
	"github.com/tidewaiter/tidewaiter/verify/source/store"
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

// A run is a store that runs, with the archives beside it.
type run struct {
	*store.Store
	archives *archives.Archives
	t        testing.TB
	log      logged
	stop     func()
}

// start runs the store below dir until stop, which writes what waits.
func start(t testing.TB, dir string, o store.Options, edit ...func(*store.Store)) *run {
	t.Helper()
	r := begin(t, dir, o, edit...)
	<-r.Read()
	r.eventually("the archives were read", func() bool {
		_, err := r.archives.Documents(t.Context(), catalog.Signatures, "", nil)
		return err == nil || !strings.Contains(err.Error(), "still being read")
	})
	return r
}

// begin is start for who does not wait until everything was read.
func begin(t testing.TB, dir string, o store.Options, edit ...func(*store.Store)) *run {
	t.Helper()
	r := &run{t: t}
	o.Log = slog.New(slog.NewTextHandler(&r.log, nil))
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Kinds == nil {
		o.Kinds = sourcetest.Kinds
	}
	r.archives = archives.New(dir, archives.Options{Log: o.Log, Now: o.Now, Kinds: o.Kinds})
	o.Archives = r.archives
	r.Store = store.New(dir, o)
	for _, e := range edit {
		e(r.Store)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	for _, run := range []func(context.Context) error{r.Run, r.archives.Run} {
		done.Go(func() {
			if err := run(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	r.stop = sync.OnceFunc(func() { cancel(); done.Wait() })
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

func (r *run) settled() {
	r.t.Helper()
	r.eventually("everything is written", func() bool { return r.Waiting() == 0 })
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

// read is what the node's runtime has.
func (s *site) read(_ context.Context, d ocispec.Descriptor) ([]byte, error) {
	raw, ok := s.Blobs[d.Digest]
	if !ok {
		return nil, fs.ErrNotExist
	}
	return raw, nil
}

// empties has a listing without any of the images, and an hour pass.
func (r *run) empties(c *clock) {
	r.Retain(map[digest.Digest]bool{digest.FromString("another image"): true})
	r.eventually("the listing was looked at", r.Retained)
	c.pass(time.Hour)
}

// keep has evidence kept of an image whose target was signed.
func (r *run) keep(target, manifest ocispec.Descriptor, ev verify.Evidence) {
	r.Keep(verify.Image{Target: target, Manifest: manifest}, target, ev)
}

func inside(dir string) string { return filepath.Join(dir, "store") }

func blob(dir string, d digest.Digest) string {
	return filepath.Join(inside(dir), "blobs", d.Algorithm().String(), d.Encoded())
}

// files returns every file below dir with its content.
func files(t testing.TB, dir string) map[string]string {
	t.Helper()
	m := map[string]string{}
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(p)
		m[strings.TrimPrefix(p, dir+"/")] = string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func write(t testing.TB, dir string, m map[string]string) {
	t.Helper()
	for name, content := range m {
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestSource(t *testing.T) {
	t.Parallel()
	sourcetest.Run(t, func(t *testing.T, c sourcetest.Content) verify.Source {
		// A list that says what is not so the store has not got: it reads the files, and
		// not index.json.
		for _, list := range c.Referrers {
			for _, d := range list {
				if d.MediaType != ocispec.MediaTypeImageManifest {
					delete(c.Blobs, d.Digest)
				}
			}
		}
		dir := t.TempDir()
		sourcetest.Layout(t, inside(dir), c, false)
		return start(t, dir, store.Options{})
	})
}

func TestKeep(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var c site
	one, first := c.image("one")
	two, second := c.image("two")
	list := c.index(one, two)
	third := c.evidence(list, "of the index")

	r := start(t, dir, store.Options{Image: c.read})
	r.has(one)
	r.keep(one, one, first)
	r.settled()
	r.has(one, first)
	r.has(two)
	r.keep(two, two, second)
	r.keep(list, two, third)
	r.settled()
	r.stop()
	was := files(t, dir)
	for _, d := range []digest.Digest{one.Digest, two.Digest, list.Digest, first.Manifest.Digest, ocispec.DescriptorEmptyJSON.Digest} {
		if _, ok := was["store/blobs/sha256/"+d.Encoded()]; !ok {
			t.Errorf("%s is not in the store", d)
		}
	}

	// It is a layout like any other.
	for subject, want := range map[*ocispec.Descriptor]verify.Evidence{&one: first, &two: second, &list: third} {
		got, err := sourcetest.Find(t.Context(), layout.New(inside(dir)), *subject, verify.Limits{})
		if err != nil {
			t.Error(err)
		}
		sourcetest.Check(t, got, []verify.Evidence{want}, 0)
	}
	if d, _, err := layout.New(inside(dir)).Manifest(t.Context(), list.Digest); err != nil || d.MediaType != list.MediaType {
		t.Error(d, err)
	}

	// What it has is not written again, by this process or the next.
	var stats []syscall.Stat_t
	stat := func() (list []syscall.Stat_t) {
		for name := range was {
			var s syscall.Stat_t
			if err := syscall.Stat(filepath.Join(dir, name), &s); err != nil {
				t.Fatal(err)
			}
			s.Atim = syscall.Timespec{}
			list = append(list, s)
		}
		slices.SortFunc(list, func(a, b syscall.Stat_t) int { return int(a.Ino) - int(b.Ino) })
		return list
	}
	stats = stat()
	r = start(t, dir, store.Options{Image: c.read})
	r.has(one, first)
	r.has(list, third)
	r.keep(one, one, first)
	r.keep(list, two, third)
	r.Retain(map[digest.Digest]bool{one.Digest: true})
	r.settled()
	r.stop()
	if !maps.Equal(was, files(t, dir)) || !slices.Equal(stats, stat()) {
		t.Error("the directory has changed")
	}
	if n := strings.Count(r.log.String(), "\n"); n > 0 {
		t.Errorf("it said:\n%s", r.log.String())
	}
}

func TestIndexes(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var c site
	arm, amd := c.Image("arm"), c.Image("amd")
	index := c.index(arm, amd)
	r := start(t, dir, store.Options{Image: c.read})
	r.keep(index, amd, c.evidence(index, "index"))
	r.settled()
	for range 2 {
		for _, m := range []ocispec.Descriptor{arm, amd} {
			n := 0
			r.Parents(t.Context(), m.Digest, verify.NewBudget(sourcetest.Kind, verify.Limits{}), func(d digest.Digest, raw []byte) bool {
				n++
				if d != index.Digest || digest.FromBytes(raw) != d {
					t.Error(d, string(raw))
				}
				return true
			})
			if n != 1 {
				t.Errorf("%d indexes list it", n)
			}
		}
		r.Parents(t.Context(), index.Digest, verify.NewBudget(sourcetest.Kind, verify.Limits{}), func(d digest.Digest, _ []byte) bool {
			t.Error("the index is listed by", d)
			return true
		})
		r.Parents(t.Context(), arm.Digest, &verify.Budget{}, func(digest.Digest, []byte) bool {
			t.Error("without a budget")
			return true
		})
		r.stop()
		r = start(t, dir, store.Options{})
	}
}

// complete is a store with two signatures, one of which is of an index.
func complete(t *testing.T) (was map[string]string, subjects []ocispec.Descriptor, want []verify.Evidence, order []string) {
	dir := t.TempDir()
	var c site
	one, first := c.image("one")
	other := c.Image("two")
	two := c.index(other)
	second := c.evidence(two, "envelope of two")
	r := start(t, dir, store.Options{Image: c.read})
	r.keep(one, one, first)
	r.keep(two, other, second)
	r.settled()
	r.stop()
	name := func(d digest.Digest) string { return "store/blobs/sha256/" + d.Encoded() }
	order = []string{name(digest.FromBytes(second.Blob)), name(two.Digest), name(other.Digest), name(second.Manifest.Digest), "store/index.json"}
	return files(t, dir), []ocispec.Descriptor{one, two}, []verify.Evidence{first, second}, order
}

// points are where a file of n bytes is cut: at each byte near the ends, and at some
// between.
func points(n int) (list []int) {
	for i := range n + 1 {
		if i < 4 || i > n-4 || i%61 == 0 {
			list = append(list, i)
		}
	}
	return list
}

// The power goes while each file is written.
func TestPowerCut(t *testing.T) {
	t.Parallel()
	was, subjects, want, order := complete(t)
	before := maps.Clone(was)
	for _, name := range order {
		if _, ok := before[name]; !ok {
			t.Fatalf("%s was not written", name)
		}
		delete(before, name)
	}
	cuts := 0
	for i, name := range order {
		for _, n := range points(len(was[name])) {
			cuts++
			dir := t.TempDir()
			write(t, dir, before)
			left := filepath.Dir(name) + "/.unfinished-7"
			write(t, dir, map[string]string{left: was[name][:n]})
			r := start(t, dir, store.Options{})
			r.has(subjects[0], want[0])
			if i > 3 { // the manifest is there
				r.has(subjects[1], want[1])
			} else {
				r.has(subjects[1])
			}
			r.stop()
			if _, err := os.Stat(filepath.Join(dir, left)); !errors.Is(err, fs.ErrNotExist) && filepath.Dir(name) != "store" {
				t.Errorf("%s is still there: %v", left, err)
			}
			for d := range files(t, filepath.Join(inside(dir), "blobs/sha256")) {
				if _, ok := was["store/blobs/sha256/"+d]; !ok {
					t.Errorf("cut at byte %d of %s: %s is left", n, name, d)
				}
			}
			if got, err := sourcetest.Find(t.Context(), layout.New(inside(dir)), subjects[0], verify.Limits{}); err != nil {
				t.Error("as a layout:", err)
			} else {
				sourcetest.Check(t, got, want[:1], 0)
			}
			if t.Failed() {
				t.Fatalf("cut at byte %d of %s", n, name)
			}
		}
		before[name] = was[name]
	}
	t.Logf("%d cuts", cuts)
}

// A file system that does not keep its word, or flash that wears out, leaves files
// that are short or wrong under their name.
func TestDamaged(t *testing.T) {
	t.Parallel()
	was, subjects, want, order := complete(t)
	for i, name := range slices.Concat(order, []string{"store/oci-layout"}) {
		for _, n := range points(len(was[name])) {
			harm := was[name][:n]
			if n == len(was[name]) { // or of the same length
				harm = "X" + harm[1:]
			}
			dir := t.TempDir()
			m := maps.Clone(was)
			m[name] = harm
			write(t, dir, m)
			r := start(t, dir, store.Options{})
			got, err := sourcetest.Find(t.Context(), r, subjects[0], verify.Limits{})
			sourcetest.Check(t, got, want[:1], 0)
			if strange := i == 3; (err != nil) != strange {
				t.Errorf("of the other: %v", err)
			}
			got, err = sourcetest.Find(t.Context(), r, subjects[1], verify.Limits{})
			if needed := i == 0 || i == 3; errors.Is(err, verify.ErrUnreachable) != needed {
				t.Error(err)
			}
			if needed := i == 0 || i == 3; needed {
				sourcetest.Check(t, got, nil, 0)
				// It is kept anew when it is found again, and the file is then whole.
				r.eventually("the damaged signature goes", func() bool {
					n, _ := r.Signatures()
					return n == 1
				})
				r.Keep(verify.Image{Target: subjects[1], Manifest: subjects[1]}, subjects[1], evidence(want[1], was))
				r.settled()
				got, _ = sourcetest.Find(t.Context(), r, subjects[1], verify.Limits{})
				sourcetest.Check(t, got, want[1:], 0)
			} else {
				sourcetest.Check(t, got, want[1:], 0)
			}
			r.stop()
			if t.Failed() {
				t.Fatalf("%s with %d of %d bytes", name, n, len(was[name]))
			}
		}
	}
}

func evidence(ev verify.Evidence, m map[string]string) verify.Evidence {
	ev.Document = []byte(m["store/blobs/sha256/"+ev.Manifest.Digest.Encoded()])
	return ev
}

func TestForeignFiles(t *testing.T) {
	t.Parallel()
	was, subjects, want, _ := complete(t)
	out := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(out, []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	sum := func(s string) string { return digest.FromString(s).Encoded() }
	for name, harm := range map[string]func(at string) error{
		"link":      func(at string) error { return os.Symlink(out, filepath.Join(at, sum("{}x"))) },
		"FIFO":      func(at string) error { return syscall.Mkfifo(filepath.Join(at, sum("fifo")), 0o600) },
		"directory": func(at string) error { return os.Mkdir(filepath.Join(at, sum("directory")), 0o700) },
		"name":      func(at string) error { return os.WriteFile(filepath.Join(at, "README"), nil, 0o600) },
		"huge": func(at string) error {
			name := filepath.Join(at, sum("huge"))
			if err := os.WriteFile(name, nil, 0o600); err != nil {
				return err
			}
			return os.Truncate(name, 1<<40)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			write(t, dir, was)
			at := filepath.Join(inside(dir), "blobs/sha256")
			if err := harm(at); err != nil {
				t.Fatal(err)
			}
			r := start(t, dir, store.Options{})
			r.has(subjects[0], want[0])
			r.has(subjects[1], want[1])
			var c site
			d, ev := c.image("three")
			r.keep(d, d, ev)
			r.settled()
			r.has(d, ev)
			r.stop()
			if s := r.log.String(); !strings.Contains(s, "are no part of it") {
				t.Errorf("it said:\n%s", s)
			}
			if b, err := os.ReadFile(out); err != nil || string(b) != "{}" {
				t.Error("the file outside:", string(b), err)
			}
		})
	}
}

// Nothing is followed out of the state directory, and none of it keeps the gate
// from its work.
func TestNoDirectory(t *testing.T) {
	t.Parallel()
	for name, harm := range map[string]func(t *testing.T, dir string) error{
		"store is a link out": func(t *testing.T, dir string) error { return os.Symlink(t.TempDir(), inside(dir)) },
		"store is a file":     func(t *testing.T, dir string) error { return os.WriteFile(inside(dir), nil, 0o600) },
		"store is a FIFO":     func(t *testing.T, dir string) error { return syscall.Mkfifo(inside(dir), 0o600) },
		"the lock is a FIFO":  func(t *testing.T, dir string) error { return syscall.Mkfifo(filepath.Join(dir, "store.lock"), 0o600) },
		"the lock is a link": func(t *testing.T, dir string) error {
			return os.Symlink("/etc/passwd", filepath.Join(dir, "store.lock"))
		},
		"blobs is a file": func(t *testing.T, dir string) error {
			return errors.Join(os.Mkdir(inside(dir), 0o700), os.WriteFile(inside(dir)+"/blobs", nil, 0o600))
		},
		"blobs is a link out": func(t *testing.T, dir string) error {
			return errors.Join(os.Mkdir(inside(dir), 0o700), os.Symlink(t.TempDir(), inside(dir)+"/blobs"))
		},
		"state is a file": func(t *testing.T, dir string) error {
			return errors.Join(os.Remove(dir), os.WriteFile(dir, nil, 0o600))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "state")
			if err := errors.Join(os.Mkdir(dir, 0o700), harm(t, dir)); err != nil {
				t.Fatal(err)
			}
			r := start(t, dir, store.Options{})
			var c site
			d, ev := c.image("one")
			r.keep(d, d, ev)
			r.eventually("it says so", func() bool { return r.Trouble() != "" })
			r.has(d)
			r.stop()
			if n := strings.Count(r.log.String(), "are not kept on disk"); n != 1 {
				t.Errorf("said %d times:\n%s", n, r.log.String())
			}
		})
	}
}

func TestTwoProcesses(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var c site
	one, first := c.image("one")
	two, second := c.image("two")
	old := start(t, dir, store.Options{})
	old.keep(one, one, first)
	old.settled()
	young := start(t, dir, store.Options{})
	young.has(one, first)
	if s := young.Trouble(); s != "another process of this node writes to it" {
		t.Errorf("trouble %q", s)
	}
	young.keep(two, two, second)
	young.has(two)
	old.has(two)
	old.stop()
	young.keep(one, one, first) // rings
	var more verify.Evidence
	three, more := c.image("three")
	young.keep(three, three, more)
	young.settled()
	young.has(one, first)
	young.has(two, second)
	young.has(three, more)
	if s := young.Trouble(); s != "" {
		t.Errorf("trouble %q", s)
	}
}

// mount gives the test a small file system, as a flash partition.
func mount(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "LEFT OUT:", t.Name(), "mounts a file system, which needs root")
		t.Skip("needs root")
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=48k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestDiskFull(t *testing.T) {
	dir := mount(t)
	var c site
	one, first := c.image("one")
	big := c.Image("big")
	ev := c.evidence(big, strings.Repeat("x", 100<<10))
	r := start(t, dir, store.Options{})
	r.keep(one, one, first)
	r.settled()
	r.keep(big, big, ev)
	r.eventually("it says so", func() bool { return strings.Contains(r.Trouble(), "no space left") })
	r.has(one, first)
	r.has(big)
	if left, _ := filepath.Glob(filepath.Join(inside(dir), "blobs/sha256/.unfinished*")); len(left) > 0 {
		t.Errorf("left are %q", left)
	}
	// With room again, it is kept.
	if err := syscall.Mount("", dir, "", syscall.MS_REMOUNT, "size=1m"); err != nil {
		t.Fatal(err)
	}
	two, second := c.image("two")
	r.keep(two, two, second)
	r.settled()
	r.eventually("it is over", func() bool { return r.Trouble() == "" })
	r.has(big, ev)
	r.has(two, second)
}

func TestReadOnly(t *testing.T) {
	dir := mount(t)
	was, subjects, want, _ := complete(t)
	write(t, dir, was)
	if err := syscall.Mount("", dir, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	r := start(t, dir, store.Options{})
	r.has(subjects[0], want[0])
	r.has(subjects[1], want[1])
	if s := r.Trouble(); !strings.Contains(s, "read-only file system") {
		t.Errorf("trouble %q", s)
	}
}

// Others can write to the directory: that is said, and no more comes of it.
func TestForeignOwner(t *testing.T) {
	t.Parallel()
	was, subjects, want, _ := complete(t)
	dir := t.TempDir()
	write(t, dir, was)
	if err := os.Chmod(inside(dir), 0o777); err != nil {
		t.Fatal(err)
	}
	r := start(t, dir, store.Options{})
	r.has(subjects[0], want[0])
	if s := r.log.String(); !strings.Contains(s, "others than the gate can write") {
		t.Errorf("it said:\n%s", s)
	}
}

// The directory goes while the store runs.
func TestRemoved(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "state")
	var c site
	one, first := c.image("one")
	two, second := c.image("two")
	r := start(t, dir, store.Options{})
	r.keep(one, one, first)
	r.settled()
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	r.keep(two, two, second)
	r.eventually("it says so", func() bool { return r.Trouble() != "" })
	three, more := c.image("three")
	r.keep(three, three, more)
	r.settled()
	r.has(two, second)
	r.has(three, more)
}

func TestSize(t *testing.T) {
	t.Parallel()
	clock := newClock()
	var c site
	size := int64(20 << 10)
	dir := t.TempDir()
	r := start(t, dir, store.Options{Now: clock.now, Size: size})
	var all []ocispec.Descriptor
	var evs []verify.Evidence
	for i := range 12 {
		d := c.Image(fmt.Sprint("image ", i))
		ev := c.evidence(d, strings.Repeat(string(rune('a'+i)), 2000))
		all, evs = append(all, d), append(evs, ev)
		r.keep(d, d, ev)
		r.settled()
		r.empties(clock)
		if _, n := r.Signatures(); n > size {
			t.Errorf("%d bytes", n)
		}
	}
	n, _ := r.Signatures()
	if n < 4 || n > 8 {
		t.Errorf("%d signatures in %d bytes", n, size)
	}
	for i, d := range all { // the oldest went
		if i < len(all)-n {
			r.has(d)
		} else {
			r.has(d, evs[i])
		}
	}
	onDisk := 0
	for name, content := range files(t, inside(dir)) {
		if strings.HasPrefix(name, "blobs/") {
			onDisk += len(content)
		}
	}
	if int64(onDisk) > size {
		t.Errorf("%d bytes on disk", onDisk)
	}

	// What is on the node does not go for something new.
	live := map[digest.Digest]bool{}
	for _, d := range all {
		live[d.Digest] = true
	}
	r.Retain(live)
	d := c.Image("new")
	r.keep(d, d, c.evidence(d, strings.Repeat("z", 5000)))
	r.settled()
	r.has(d)
	r.has(all[11], evs[11])
	r.eventually("it says so", func() bool { return strings.Contains(r.Trouble(), "full") })
}

// A bound on the files that is below what the next start reads.
func TestFiles(t *testing.T) {
	t.Parallel()
	clock := newClock()
	var c site
	dir := t.TempDir()
	r := start(t, dir, store.Options{Now: clock.now})
	r.Most(10)
	var all []ocispec.Descriptor
	for i := range 9 {
		d, ev := c.image(fmt.Sprint("image ", i))
		all = append(all, d)
		r.keep(d, d, ev)
		r.settled()
		r.empties(clock)
		r.has(d, ev)
	}
	n := 0
	for name := range files(t, inside(dir)) {
		if strings.HasPrefix(name, "blobs/") {
			n++
		}
	}
	if n > 10 || n < 7 {
		t.Errorf("%d files", n)
	}
	r.has(all[0])
}

// Before the first listing of the images nobody knows what may go to make room.
func TestFullAtStart(t *testing.T) {
	t.Parallel()
	clock := newClock()
	var c site
	dir := t.TempDir()
	r := start(t, dir, store.Options{Now: clock.now, Size: 8 << 10})
	image := func(name string) (ocispec.Descriptor, verify.Evidence) {
		d := c.Image(name)
		return d, c.evidence(d, strings.Repeat(name[:1], 3000))
	}
	one, first := image("1")
	two, second := image("2")
	r.keep(one, one, first)
	r.keep(two, two, second)
	r.settled()
	r.stop()

	clock.pass(365 * 24 * time.Hour) // off
	r = start(t, dir, store.Options{Now: clock.now, Size: 8 << 10})
	three, third := image("3")
	r.keep(three, three, third)
	r.eventually("it says so", func() bool { return strings.Contains(r.Trouble(), "full") })
	r.has(one, first)
	r.has(two, second)
	r.has(three)
	r.Retain(map[digest.Digest]bool{one.Digest: true, three.Digest: true})
	r.settled()
	r.has(one, first)
	r.has(two)
	r.has(three, third)
	r.eventually("that is over", func() bool { return r.Trouble() == "" })
}

// A listing that lacks images for a moment makes no room of them.
func TestRoomAfterAnHour(t *testing.T) {
	t.Parallel()
	clock := newClock()
	var c site
	r := start(t, t.TempDir(), store.Options{Now: clock.now, Size: 5 << 10})
	one := c.Image("one")
	first := c.evidence(one, strings.Repeat("1", 3000))
	two := c.Image("two")
	second := c.evidence(two, strings.Repeat("2", 3000))
	r.keep(one, one, first)
	r.settled()
	live := map[digest.Digest]bool{one.Digest: true}
	other := map[digest.Digest]bool{two.Digest: true}
	listed := func(m map[digest.Digest]bool) {
		r.Retain(m)
		r.eventually("the listing was looked at", r.Retained)
	}
	listed(live)
	listed(other)
	clock.pass(59 * time.Minute)
	r.keep(two, two, second)
	r.settled()
	r.has(one, first)
	r.has(two)
	listed(live)
	clock.pass(59 * time.Minute)
	listed(other)
	clock.pass(2 * time.Minute)
	r.keep(two, two, second)
	r.settled()
	r.has(one, first)
	clock.pass(time.Hour)
	r.keep(two, two, second)
	r.settled()
	r.has(one)
	r.has(two, second)
}

// What a signature lacks of its image, since the runtime was away, comes later.
func TestCompleted(t *testing.T) {
	t.Parallel()
	clock := newClock()
	var c site
	arm, amd := c.Image("arm"), c.Image("amd")
	index := c.index(arm, amd)
	ev := c.evidence(index, "index")
	bare, second := c.image("bare")
	var up atomic.Bool
	asked := atomic.Int32{}
	dir := t.TempDir()
	o := store.Options{Now: clock.now, Image: func(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
		asked.Add(1)
		if !up.Load() || d.Digest == arm.Digest { // which is not on the node
			return nil, errors.New("away")
		}
		return c.read(ctx, d)
	}}
	r := start(t, dir, o)
	r.keep(index, amd, ev)
	r.keep(bare, bare, second)
	r.settled()
	if got := r.parents(amd.Digest); len(got) != 0 {
		t.Fatalf("parents %v", got)
	}
	live := map[digest.Digest]bool{index.Digest: true, amd.Digest: true, bare.Digest: true}
	listed := func() {
		mark, ev := c.image(fmt.Sprint("mark ", clock.now())) // before: the store reads c from then on
		r.Retain(live)
		r.keep(mark, mark, ev) // what is written after it says that it was looked at
		r.settled()
	}
	listed()
	up.Store(true)
	listed() // too soon
	if got := r.parents(amd.Digest); len(got) != 0 {
		t.Fatalf("parents %v", got)
	}
	clock.pass(10 * time.Minute)
	listed()
	for range 2 {
		if got := r.parents(amd.Digest); !slices.Equal(got, []digest.Digest{index.Digest}) {
			t.Errorf("parents of the manifest %v", got)
		}
		if got := r.parents(c.configIn(amd)); !slices.Equal(got, []digest.Digest{amd.Digest}) {
			t.Errorf("parents of its config %v", got)
		}
		if got := r.parents(c.configIn(bare)); !slices.Equal(got, []digest.Digest{bare.Digest}) {
			t.Errorf("parents of the other config %v", got)
		}
		r.has(index, ev)
		r.stop()
		r = start(t, dir, o)
	}
	n := asked.Load()
	clock.pass(time.Hour)
	r.Retain(live)
	r.eventually("the listing was looked at", r.Retained)
	r.stop()
	if asked.Load() != n {
		t.Error("what is whole is asked for again")
	}
}

// A document of a signature that a mirror had may lie in an archive alone.
func TestCompletedFromArchive(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var c, archive site
	m := archive.Image("app")
	c.Content = sourcetest.Content{Blobs: maps.Clone(archive.Blobs)}
	put(t, dir, "a", archive)
	ev := c.evidence(m, "envelope")
	r := start(t, dir, store.Options{})
	r.keep(m, m, ev)
	r.settled()
	if err := os.RemoveAll(filepath.Join(below(dir), "a")); err != nil {
		t.Fatal(err)
	}
	r.archives.Rescan()
	r.eventually("the evidence archive is gone", func() bool { return len(r.troubles()) == 0 })
	if got := r.parents(c.configIn(m)); !slices.Equal(got, []digest.Digest{m.Digest}) {
		t.Errorf("parents of the config %v", got)
	}
	r.has(m, ev)
}

// An image that was imported has the config of what was signed, and no more.
func TestRetainConfig(t *testing.T) {
	t.Parallel()
	clock := newClock()
	var c site
	arm := c.Image("arm")
	index := c.index(arm)
	ev := c.evidence(index, "index")
	r := start(t, t.TempDir(), store.Options{Now: clock.now, Image: c.read})
	r.keep(index, arm, ev)
	r.settled()
	for range 100 {
		r.Retain(map[digest.Digest]bool{c.configIn(arm): true, digest.FromString("imported"): true})
		r.eventually("the listing was looked at", r.Retained)
		clock.pass(24 * time.Hour)
	}
	r.has(index, ev)
}

// Indexes that list a great many manifests do not fill the memory.
func TestManyListed(t *testing.T) {
	t.Parallel()
	var c site
	dir := t.TempDir()
	const most = 33 // indexes, more than may list so many together
	for i := range most {
		var entries strings.Builder
		for j := range 2047 {
			fmt.Fprintf(&entries, `{"digest":%q},`, digest.FromString(fmt.Sprint(i, " ", j)))
		}
		raw := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"manifests":[%s{"digest":%q}]}`, ocispec.MediaTypeImageIndex, entries.String(), digest.FromString(fmt.Sprint(i)))
		c.evidence(c.Add(ocispec.MediaTypeImageIndex, []byte(raw)), fmt.Sprint("index ", i))
	}
	m := map[string]string{}
	for d, raw := range c.Blobs {
		m["store/blobs/sha256/"+d.Encoded()] = string(raw)
	}
	write(t, dir, m)
	r := start(t, dir, store.Options{})
	shown := 0
	for i := range most {
		r.Parents(t.Context(), digest.FromString(fmt.Sprint(i)), verify.NewBudget(sourcetest.Kind, verify.Limits{}), func(digest.Digest, []byte) bool { shown++; return true })
	}
	if shown != most-1 {
		t.Errorf("%d indexes, want %d of %d", shown, most-1, most)
	}
	if n, _ := r.Signatures(); n != most {
		t.Errorf("%d signatures", n)
	}
}

// What makes room does not take with it what the new signature shares with it.
func TestRoomShared(t *testing.T) {
	t.Parallel()
	clock := newClock()
	var c site
	arm := c.Image("arm")
	index := c.index(arm)
	r := start(t, t.TempDir(), store.Options{Now: clock.now, Image: c.read, Size: 8 << 10})
	r.keep(index, arm, c.evidence(index, strings.Repeat("a", 4000))) // has expired, say
	r.settled()
	r.empties(clock)
	renewed := c.evidence(index, strings.Repeat("b", 4000))
	r.keep(index, arm, renewed)
	r.settled()
	r.has(index, renewed)
	var got []digest.Digest
	r.Parents(t.Context(), arm.Digest, verify.NewBudget(sourcetest.Kind, verify.Limits{}), func(d digest.Digest, _ []byte) bool {
		got = append(got, d)
		return true
	})
	if len(got) != 1 || got[0] != index.Digest {
		t.Errorf("indexes %v, want %s", got, index.Digest)
	}
}

// A file that cannot be read for once does not cost what it needs.
func TestPartial(t *testing.T) {
	t.Parallel()
	clock := newClock()
	var c site
	size := int64(12 << 10)
	dir := t.TempDir()
	r := start(t, dir, store.Options{Now: clock.now, Size: size})
	hidden, one := c.image("hidden")
	other, two := c.image("other")
	r.keep(hidden, hidden, one)
	r.keep(other, other, two)
	r.settled()
	r.stop()

	manifest := blob(dir, one.Manifest.Digest)
	raw, err := os.ReadFile(manifest)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(manifest, make([]byte, 2*size+1), 0o600); err != nil { // is not read
		t.Fatal(err)
	}
	r = start(t, dir, store.Options{Now: clock.now, Size: size})
	r.has(hidden)
	r.empties(clock)
	big := c.Image("big")
	three := c.evidence(big, strings.Repeat("z", 11<<10))
	r.keep(big, big, three)
	r.settled()
	r.has(big, three)
	r.has(other) // made room
	if _, err := os.Stat(blob(dir, digest.FromBytes(two.Blob))); !errors.Is(err, fs.ErrNotExist) {
		t.Error("its envelope is left:", err)
	}
	r.stop()

	if err := os.WriteFile(manifest, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	r = start(t, dir, store.Options{Now: clock.now})
	r.has(hidden, one)
}

func TestRetain(t *testing.T) {
	t.Parallel()
	clock := newClock()
	dir := t.TempDir()
	var c site
	stays, one := c.image("stays")
	goes, two := c.image("goes")
	arm := c.Image("arm")
	index := c.index(arm)
	three := c.evidence(index, "of the index")
	r := start(t, dir, store.Options{Now: clock.now, Image: c.read})
	r.keep(stays, stays, one)
	r.keep(goes, goes, two)
	r.keep(index, arm, three)
	r.settled()
	marks := 0
	listing := func(live ...ocispec.Descriptor) {
		t.Helper()
		m := map[digest.Digest]bool{}
		for _, d := range live {
			m[d.Digest] = true
		}
		// Something that is written after it says that it was looked at.
		marks++
		mark, ev := c.image(fmt.Sprint("mark ", marks))
		r.Retain(m)
		r.keep(mark, mark, ev)
		r.settled()
	}
	all := func() {
		t.Helper()
		r.has(stays, one)
		r.has(goes, two)
		r.has(index, three)
	}
	listing(stays, goes, arm)
	clock.pass(365 * 24 * time.Hour) // nothing was listed meanwhile
	listing()
	all()
	listing(stays) // halved, once
	all()
	clock.pass(time.Minute)
	listing(stays, goes, arm)
	all()
	clock.pass(29 * 24 * time.Hour)
	listing(stays, arm)
	all()
	for range 10 {
		clock.pass(2 * 24 * time.Hour)
		listing(stays, arm) // the index's manifest is there by itself
	}
	r.has(stays, one)
	r.has(index, three)
	r.has(goes)
	if _, err := os.Stat(blob(dir, digest.FromBytes(two.Blob))); !errors.Is(err, fs.ErrNotExist) {
		t.Error("its envelope is left:", err)
	}
	// When the image was here last, the next process knows.
	r.stop()
	r = start(t, dir, store.Options{Now: clock.now})
	r.Configure(24 * time.Hour)
	listing(goes)
	clock.pass(23 * time.Hour)
	listing(goes)
	r.has(stays, one)
	clock.pass(3 * time.Hour)
	listing(goes)
	r.has(stays)
}

// A board without a clock begins in 1970 until it is told the time. What left the node
// before is kept as long as it would have been without.
func TestClockOfNone(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var c site
	other := digest.FromString("another image")
	goes, ev := c.image("goes")
	right, early := newClock(), &clock{at: time.Unix(0, 0)}
	r := start(t, dir, store.Options{Now: right.now})
	listing := func(live ...digest.Digest) {
		t.Helper()
		m := map[digest.Digest]bool{other: true}
		for _, d := range live {
			m[d] = true
		}
		r.Retain(m)
		r.eventually("the listing was looked at", r.Retained)
	}
	days := func(clock *clock, n int) {
		t.Helper()
		for range n {
			listing()
			clock.pass(24 * time.Hour)
		}
	}
	r.keep(goes, goes, ev)
	r.settled()
	listing(goes.Digest)
	days(right, 10)
	r.has(goes, ev)
	r.stop()
	r = start(t, dir, store.Options{Now: early.now})
	days(early, 5)
	r.has(goes, ev)
	r.stop()
	r = start(t, dir, store.Options{Now: right.now})
	days(right, 18)
	r.has(goes, ev)
	days(right, 5)
	r.has(goes)
}

// A clock that is years wrong, as of a board without one before it is told the time,
// deletes nothing of an image that is on the node, nor of one that left it that day; and
// what it left behind does not keep the rest for years.
func TestClockJumps(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var c site
	stays, one := c.image("stays")
	goes, two := c.image("goes")
	at := func(clock *clock, run func(r *run, listing func(live ...ocispec.Descriptor))) {
		t.Helper()
		r := start(t, dir, store.Options{Now: clock.now, Image: c.read})
		defer r.stop()
		run(r, func(live ...ocispec.Descriptor) {
			t.Helper()
			m := map[digest.Digest]bool{}
			for _, d := range live {
				m[d.Digest] = true
			}
			r.Retain(m)
			r.eventually("the listing was looked at", r.Retained)
		})
	}
	now := time.Now()
	at(&clock{at: now}, func(r *run, listing func(live ...ocispec.Descriptor)) {
		r.keep(stays, stays, one)
		r.keep(goes, goes, two)
		r.settled()
		listing(stays, goes)
	})
	at(&clock{at: now.AddDate(9, 0, 0)}, func(r *run, listing func(live ...ocispec.Descriptor)) {
		listing(stays) // before it was listed
		listing(stays, goes)
		r.has(goes, two)
	})
	early := &clock{at: time.Unix(0, 0)}
	at(early, func(r *run, listing func(live ...ocispec.Descriptor)) {
		for range 10 {
			listing(stays, goes)
			early.pass(12 * time.Hour)
		}
		r.has(stays, one)
		r.has(goes, two)
	})
	late := &clock{at: now.AddDate(9, 0, 0)}
	at(late, func(r *run, listing func(live ...ocispec.Descriptor)) {
		listing(stays, goes) // their time is now that of a year to come
		listing(stays)
		late.pass(23 * time.Hour)
		listing(stays)
		r.has(goes, two)
	})
	right := &clock{at: now}
	at(right, func(r *run, listing func(live ...ocispec.Descriptor)) {
		for range 20 {
			listing(stays)
			right.pass(24 * time.Hour)
		}
		r.has(goes, two)
		for range 20 {
			listing(stays)
			right.pass(24 * time.Hour)
		}
		r.has(stays, one)
		r.has(goes)
	})
}

// Somebody has filled the directory with what is no part of the store and looks as if it
// were. What is in it is found as far as it is read, nothing is removed of which nobody
// knows whether it is needed, and it is said what is in the way.
func TestStuffed(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var c site
	for i := range 50 {
		raw := fmt.Sprint("junk ", i)
		write(t, inside(dir), map[string]string{"blobs/sha256/" + digest.FromString(raw).Encoded(): raw})
	}
	// One more cannot be read for its size.
	write(t, inside(dir), map[string]string{"blobs/sha256/" + digest.FromString("x").Encoded(): strings.Repeat("x", 200<<10)})
	r := start(t, dir, store.Options{Size: 64 << 10}, func(s *store.Store) { s.Most(40) })
	r.Retain(map[digest.Digest]bool{digest.FromString("another image"): true})
	one, ev := c.image("one")
	r.keep(one, one, ev)
	r.eventually("it says what is in the way", func() bool { return strings.Contains(r.Trouble(), "remove the directory") })
	if list, err := os.ReadDir(filepath.Join(inside(dir), "blobs/sha256")); err != nil || len(list) != 51 {
		t.Errorf("%d files, error %v", len(list), err)
	}
	r.stop()
	if err := os.RemoveAll(inside(dir)); err != nil {
		t.Fatal(err)
	}
	r = start(t, dir, store.Options{Image: c.read})
	r.keep(one, one, ev)
	r.settled()
	r.has(one, ev)
	if s := r.Trouble(); s != "" {
		t.Error(s)
	}
}

func TestManyAtOnce(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	r := start(t, dir, store.Options{})
	var c site
	var all []ocispec.Descriptor
	var evs []verify.Evidence
	for i := range 40 {
		d, ev := c.image(fmt.Sprint("image ", i))
		all, evs = append(all, d), append(evs, ev)
	}
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i, d := range all {
				if i%4 == w {
					r.keep(d, d, evs[i])
				}
				got, err := sourcetest.Find(t.Context(), r, d, verify.Limits{})
				if err != nil {
					t.Error(err)
				}
				for _, ev := range got {
					if ev.Err != nil || !bytes.Equal(ev.Blob, evs[i].Blob) {
						t.Error(ev.Err)
					}
				}
			}
		})
	}
	wg.Wait()
	r.settled()
	for i, d := range all {
		r.has(d, evs[i])
	}
}

// What does not belong together is not kept.
func TestUnfit(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var c site
	one, first := c.image("one")
	two, second := c.image("two")
	// A manifest has room for any annotations, and the store has not.
	padded := c.Sign(one, sourcetest.MediaTypeA, "padded", func(m *ocispec.Manifest) { m.Annotations["x"] = strings.Repeat("x", 64<<10) })
	padded.Document = c.Blobs[padded.Manifest.Digest]
	r := start(t, dir, store.Options{})
	for _, ev := range []verify.Evidence{
		{}, padded,
		{Manifest: first.Manifest, Document: first.Document, Blob: second.Blob, MediaType: first.MediaType},
		{Manifest: first.Manifest, Document: second.Document, Blob: second.Blob, MediaType: first.MediaType},
		{Manifest: ocispec.Descriptor{Digest: "sha256:../../x"}, Document: first.Document, Blob: first.Blob},
		second,
	} {
		r.keep(one, one, ev)
		r.settled()
	}
	r.has(one)
	r.has(two)
	if n, _ := r.Signatures(); n != 0 {
		t.Errorf("%d signatures", n)
	}
	r.keep(one, one, first)
	r.settled()
	r.has(one, first)
}

// FuzzOpen has any bytes in the files that are read at the start.
func FuzzOpen(f *testing.F) {
	var c site
	one, first := c.image("one")
	index := c.index(one)
	f.Add(first.Document)
	f.Add(c.Blobs[index.Digest])
	f.Add(c.Blobs[one.Digest])
	f.Add([]byte(`{"manifests":[{"digest":"sha256:"}],"subject":{"digest":"` + one.Digest + `"}}`))
	f.Add([]byte(`{"artifactType":"` + sourcetest.ArtifactType + `","config":{},"layers":[{"digest":7}],"subject":{"digest":"` + one.Digest + `"}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		dir := t.TempDir()
		d := digest.FromBytes(raw)
		write(t, dir, map[string]string{
			"store/blobs/sha256/" + d.Encoded():                                   string(raw),
			"store/blobs/sha256/" + first.Manifest.Digest.Encoded():               string(first.Document),
			"store/blobs/sha256/" + digest.FromBytes(first.Blob).Encoded():        string(first.Blob),
			"store/blobs/sha256/" + digest.FromString("something else").Encoded(): string(raw),
		})
		r := start(t, dir, store.Options{})
		got, err := sourcetest.Find(t.Context(), r, one, verify.Limits{})
		if err != nil && !errors.Is(err, verify.ErrBudget) && !errors.Is(err, verify.ErrUnreachable) { // there is a damaged file
			t.Error(err)
		}
		found := false
		for _, ev := range got {
			found = found || ev.Err == nil && bytes.Equal(ev.Blob, first.Blob)
			if ev.Err == nil && digest.FromBytes(ev.Document) != ev.Manifest.Digest {
				t.Errorf("%s is handed over as %q", ev.Manifest.Digest, ev.Document)
			}
		}
		if !found {
			t.Error("the good signature is hidden")
		}
		r.Parents(t.Context(), one.Digest, verify.NewBudget(sourcetest.Kind, verify.Limits{}), func(d digest.Digest, raw []byte) bool {
			if digest.FromBytes(raw) != d {
				t.Error("an index is not what its digest says")
			}
			return true
		})
		r.stop()
	})
}

// BenchmarkOpen reads a store of 500 signatures, as at the start of a node.
func BenchmarkOpen(b *testing.B) {
	dir := b.TempDir()
	var c site
	r := start(b, dir, store.Options{Image: c.read})
	for i := range 500 {
		m := c.Image(fmt.Sprint("image ", i))
		d := c.index(m)
		r.keep(d, m, c.evidence(d, fmt.Sprint(i, strings.Repeat("x", 4000))))
		r.settled()
	}
	r.stop()
	for b.Loop() {
		r := start(b, dir, store.Options{})
		if n, _ := r.Signatures(); n != 500 {
			b.Fatalf("%d signatures", n)
		}
		b.StopTimer()
		r.stop()
		b.StartTimer()
	}
}
