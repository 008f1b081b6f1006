package reconcile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/nri/containerd"
	"github.com/tidewaiter/tidewaiter/verify"
)

// A ledger is a Verifier that answers what a test says and keeps what it was
// asked. It is safe for concurrent use.
type ledger struct {
	mu     sync.Mutex
	asked  []verify.Image
	at     []time.Time
	answer func(verify.Image) verify.Decision // nil: SIGNATURE_MISSING
	during func()                             // called while a question is answered
}

func (l *ledger) Verify(_ context.Context, img verify.Image) verify.Decision {
	l.mu.Lock()
	l.asked = append(l.asked, img)
	l.at = append(l.at, time.Now())
	answer, during := l.answer, l.during
	l.mu.Unlock()
	if during != nil {
		during()
	}
	d := verify.Deny(verify.SignatureMissing, "scripted")
	if answer != nil {
		d = answer(img)
	}
	d.Revision = img.Revision
	return d
}

// names returns what was asked about since the last call.
func (l *ledger) names() (list []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, i := range l.asked {
		list = append(list, i.Name.Path)
	}
	l.asked = nil
	return list
}

// inventory is a node's containers, and its events as a test makes them.
type inventory struct {
	mu      sync.Mutex
	running []containerd.Container
	changed func()
	watched int
	lost    chan struct{} // ends a Watch
}

func (i *inventory) Watch(ctx context.Context, changed func()) error {
	i.mu.Lock()
	i.changed = changed
	i.watched++
	lost := i.lost
	i.mu.Unlock()
	changed()
	select {
	case <-ctx.Done():
	case <-lost:
	}
	return errors.New("the stream ended")
}

func (i *inventory) event() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.changed()
}

func (i *inventory) Running(_ context.Context, yield func(containerd.Container) bool) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, c := range i.running {
		if !yield(c) {
			break
		}
	}
	return nil
}

// A fetched is a Prefetch under synctest, with containerd's state and its events.
type fetched struct {
	*Prefetch
	t        *testing.T
	resolver *containerd.Resolver
	rec      *records
	inv      *inventory
	asks     *ledger
	end      func()
	scans    int
}

// prefetch makes one that does not run yet. It must be called in a bubble.
func prefetch(t *testing.T) *fetched {
	rec := newRecords()
	s := &fetched{t: t, rec: rec, resolver: containerd.NewResolver(rec, options(1)), inv: &inventory{lost: make(chan struct{})}, asks: &ledger{}}
	s.Prefetch = &Prefetch{Images: s.resolver, Node: s.inv, Verifier: s.asks, Log: slog.New(slog.DiscardHandler), Scanned: func() { s.scans++ }}
	return s
}

// start runs it until stop, or the test's end.
func (s *fetched) start() {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = s.Run(ctx) })
	s.end = func() { cancel(); wg.Wait() }
	s.settle()
}

func (s *fetched) settle() { time.Sleep(20 * time.Second); synctest.Wait() }

func (s *fetched) want(what string, names ...string) {
	s.t.Helper()
	if got := s.asks.names(); !slices.Equal(got, names) {
		s.t.Errorf("%s: asked about %q, want %q", what, got, names)
	}
}

func (s *fetched) image(name string) image {
	s.rec.mu.Lock()
	defer s.rec.mu.Unlock()
	i := s.rec.image(name, name)
	s.rec.images["r.example/"+name] = i.manifest
	return i
}

func (s *fetched) calls() int {
	s.rec.mu.Lock()
	defer s.rec.mu.Unlock()
	return s.rec.calls
}

// Images are asked about once, those of containers first, and then as they come.
func TestPrefetchOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := prefetch(t)
		for _, n := range []string{"a", "b", "c", "d"} {
			s.image(n)
		}
		s.rec.images["sha256:0123"] = s.rec.images["r.example/a"] // the record of an image ID
		s.inv.running = []containerd.Container{{Image: "r.example/c"}, {Image: "sha256:0123"}}
		s.resolver.Connected(false)
		s.start()
		defer s.end()
		s.want("at first", "c", "a", "b", "d")
		if s.scans != 1 {
			t.Errorf("told %d times that the images were looked at, want once", s.scans)
		}
		calls := s.calls()
		time.Sleep(1000 * time.Hour)
		synctest.Wait()
		if s.want("idle"); s.calls() != calls {
			t.Errorf("%d calls to containerd while nothing happens", s.calls()-calls)
		}
		s.image("e")
		for range 1000 {
			s.inv.event()
		}
		calls = s.calls()
		s.settle()
		s.want("after events", "e")
		if n := s.rec.calls - calls; n > 6 {
			t.Errorf("%d calls to containerd for one image", n)
		}
		// A record that moves is another image; one that goes is none.
		s.rec.mu.Lock()
		s.rec.images["r.example/a"] = s.rec.image("moved", "m").manifest
		delete(s.rec.images, "r.example/b")
		s.rec.mu.Unlock()
		s.inv.event()
		s.settle()
		s.want("after a move", "a")
		s.inv.event()
		s.settle()
		s.want("after nothing")

		// Another connection changes nothing, another configuration everything.
		s.resolver.Connected(false)
		s.settle()
		if s.want("connected again"); s.scans != 2 {
			t.Errorf("told %d times, want twice", s.scans)
		}
		s.resolver.Configure(options(2))
		s.settle()
		if s.want("another configuration", "c", "a", "d", "e"); s.scans != 3 {
			t.Errorf("told %d times, want three times", s.scans)
		}
	})
}

// Nothing is asked without a configuration, and what is asked names record,
// content and kin.
func TestPrefetchAsks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := prefetch(t)
		i := s.image("app")
		other := s.rec.index(i.manifest)
		s.rec.images["r.example/copy"] = other
		huge := s.rec.put(ocispec.MediaTypeImageManifest, ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest,
			Config: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: i.config.Digest, Size: 500 << 20}})
		s.rec.images["r.example/huge"] = huge
		o := options(0)
		s.resolver.Configure(o)
		s.resolver.Connected(false)
		s.start()
		defer s.end()
		s.want("without a configuration")
		s.resolver.Configure(options(1))
		s.settle()
		s.asks.mu.Lock()
		defer s.asks.mu.Unlock()
		if len(s.asks.asked) != 3 {
			t.Fatalf("asked %d times, want 3", len(s.asks.asked))
		}
		got := s.asks.asked[0]
		if got.Fault != nil || got.Use != verify.UsePrefetch || got.Binding != verify.BoundRecord || got.Revision != (verify.Revision{1}) ||
			got.Target.Digest != i.manifest.Digest || got.Config != i.config.Digest || !got.LayersVerified || len(got.Related) != 1 || got.Related[0].Digest != other.Digest {
			t.Errorf("asked %+v", got)
		}
		if f := s.asks.asked[2].Fault; f == nil || f.Reason != verify.ImageAmbiguous {
			t.Errorf("a config of 500 MB: %v", f)
		}
	})
}

// Where a snapshotter that proves nothing may be used, kin does not count.
func TestPrefetchWithListedSnapshotter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := prefetch(t)
		i := s.image("app")
		s.rec.images["r.example/copy"] = s.rec.index(i.manifest)
		o := options(1)
		o.Snapshotters = []string{"stargz"}
		s.resolver.Configure(o)
		s.start()
		defer s.end()
		for _, img := range s.asks.asked {
			if len(img.Related) != 0 || img.LayersVerified || img.Fault != nil {
				t.Errorf("asked with others %v, fault %v", img.Related, img.Fault)
			}
		}
		s.want("both", "app", "copy")
	})
}

// What settles nothing is asked again, later and later; an answer that ends, then;
// a denial is left to the container that asks.
func TestPrefetchRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := prefetch(t)
		s.image("denied")
		s.image("down")
		s.asks.answer = func(img verify.Image) verify.Decision {
			if img.Name.Path == "down" {
				return verify.Deny(verify.SourceUnreachable, "scripted")
			}
			return verify.Deny(verify.SignatureMissing, "scripted")
		}
		s.start()
		defer s.end()
		time.Sleep(24 * time.Hour)
		synctest.Wait()
		var at []time.Time
		for n, img := range s.asks.asked {
			if img.Name.Path == "down" {
				at = append(at, s.asks.at[n])
			}
		}
		if len(at) < 20 || len(at) > 50 || len(s.asks.asked) != len(at)+1 {
			t.Errorf("asked %d times in a day about what is down, %d in all", len(at), len(s.asks.asked))
		}
		for n := 1; n < len(at); n++ {
			d, base := at[n].Sub(at[n-1]), min(minRetry<<min(n-1, 10), maxRetry)
			if d < base*3/4 || d > base*5/4+imagePause*10 {
				t.Errorf("pause %d was %v", n, d)
			}
		}
	})
}

// With new signatures on the node, what was denied is asked again, and nothing else.
func TestPrefetchAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := prefetch(t)
		s.image("denied")
		good := s.image("good")
		s.asks.answer = func(img verify.Image) verify.Decision {
			if img.Target.Digest == good.manifest.Digest {
				return verify.Decision{Reason: verify.Verified}
			}
			return verify.Deny(verify.SignatureMissing, "scripted")
		}
		s.start()
		defer s.end()
		s.want("at first", "denied", "good")
		s.Wake()
		s.settle()
		s.want("for nothing")
		s.Again()
		s.settle()
		s.want("with new signatures", "denied")
		s.Wake()
		s.settle()
		s.want("for nothing after that")
	})
}

// A revision that the Verifier does not have yet is a moment's matter.
func TestPrefetchWhileConfigured(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := prefetch(t)
		s.image("app")
		asked := 0
		s.Verifier = verifierFunc(func(img verify.Image) verify.Decision {
			if asked++; asked < 4 {
				return verify.Deny(verify.Pending, "another revision")
			}
			d := verify.Deny(verify.SignatureMissing, "scripted")
			d.Revision = img.Revision
			return d
		})
		s.start()
		defer s.end()
		time.Sleep(time.Hour)
		synctest.Wait()
		if asked != 4 {
			t.Errorf("asked %d times, want 4", asked)
		}
	})
}

type verifierFunc func(verify.Image) verify.Decision

func (f verifierFunc) Verify(_ context.Context, img verify.Image) verify.Decision { return f(img) }

// A containerd that does not answer is asked once in a while, and a lost stream of
// events is taken up again, with a look at the list.
func TestPrefetchOfBrokenContainerd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := prefetch(t)
		s.image("app")
		s.rec.fails.Store(true)
		s.start()
		defer s.end()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if n := s.rec.lists.Load(); n > 60 {
			t.Errorf("%d calls in ten minutes to a containerd that does not answer", n)
		}
		s.rec.fails.Store(false)
		s.settle()
		s.want("after it answers", "app")
		for n := range 5 {
			s.image(fmt.Sprint("new", n))
			close(s.inv.lost)
			s.inv.mu.Lock()
			s.inv.lost = make(chan struct{})
			s.inv.mu.Unlock()
			time.Sleep(time.Minute)
			synctest.Wait()
			s.want("after the stream was lost", fmt.Sprint("new", n))
		}
		if s.inv.watched != 6 {
			t.Errorf("%d subscriptions, want 6", s.inv.watched)
		}
	})
}

// Five hundred images are one question at a time.
func TestPrefetchOfManyImages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := prefetch(t)
		for n := range 500 {
			s.image(fmt.Sprintf("i%03d", n))
		}
		var now, most int
		s.asks.during = func() {
			now++
			most = max(most, now)
			time.Sleep(50 * time.Millisecond)
			now--
		}
		s.start()
		defer s.end()
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		if n := len(s.asks.asked); n != 500 || most != 1 {
			t.Errorf("asked %d times, %d at once, want 500 times one at a time", n, most)
		}
	})
}

// An image is marked while it is read, and while it is checked as the Verifier says, but
// not while it waits for its turn; several may be in hand at once.
func TestPrefetchMarks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		path := filepath.Join(dir, marksFile)
		noted := func() string {
			raw, err := os.ReadFile(path)
			if err != nil {
				t.Error(err)
			}
			return string(raw)
		}
		s := prefetch(t)
		s.Marks = OpenMarks(dir, s.Log)
		a := s.image("a")
		line := a.manifest.Digest.String() + "\n"
		reads := 0
		s.rec.reads = func(d digest.Digest) {
			if reads++; noted() != line {
				t.Errorf("while %s is read the note is %q", d, noted())
			}
		}
		checked := 0
		s.asks.during = func() {
			if noted() != "" {
				t.Errorf("while it waits the note is %q", noted())
			}
			other := digest.FromString("another")
			first, second, third := s.Marks.Hold(a.manifest.Digest), s.Marks.Hold(other), s.Marks.Hold(other)
			if got := noted(); got != line+other.String()+"\n" {
				t.Errorf("while two are checked the note is %q", got)
			}
			second()
			if got := noted(); got != line+other.String()+"\n" {
				t.Errorf("while one is held by another yet the note is %q", got)
			}
			first()
			third()
			checked++
		}
		s.start()
		s.end()
		if reads == 0 || checked != 1 || noted() != "" {
			t.Errorf("%d reads, %d checks, and at last %q", reads, checked, noted())
		}
	})
}

// The hook says that an image was judged, and waits for no log.
func TestJudgedWritesNothing(t *testing.T) {
	dir := t.TempDir()
	target := digest.FromString("in hand")
	if err := os.WriteFile(filepath.Join(dir, marksFile), []byte(target.String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	marks := OpenMarks(dir, slog.New(slog.DiscardHandler))
	var log bytes.Buffer
	s := &Prefetch{Images: containerd.NewResolver(newRecords(), options(1)), Marks: marks, Log: slog.New(slog.NewTextHandler(&log, nil))}
	s.Judged(target)
	if marks.Skips(target) || log.Len() > 0 {
		t.Errorf("it is skipped: %t, and the log says %s", marks.Skips(target), &log)
	}
	select {
	case <-s.wakes():
	default:
		t.Error("it is not looked at again")
	}
}

// The images in hand when a process dies are skipped by the next ones until they were
// judged, a broken note by none.
func TestPrefetchSkipsWhatWasInHand(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, marksFile)
	var bad, worse image
	run := func(t *testing.T, judged bool) (asked []string) {
		synctest.Test(t, func(t *testing.T) {
			s := prefetch(t)
			s.Marks = OpenMarks(dir, s.Log)
			s.image("a")
			bad, worse = s.image("bad"), s.image("worse")
			s.image("c")
			s.start()
			s.settle()
			if judged {
				s.Judged(digest.FromString("another"))
				s.Judged(bad.manifest.Digest)
				s.settle()
			}
			s.end()
			asked = s.asks.names()
		})
		return asked
	}
	note := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if got := run(t, false); !slices.Equal(got, []string{"a", "bad", "c", "worse"}) {
		t.Fatalf("asked about %q", got)
	}
	note(bad.manifest.Digest.String() + "\n" + worse.manifest.Digest.String() + "\n")
	for range 3 { // not only once: the next start would die of it
		if got := run(t, false); !slices.Equal(got, []string{"a", "c"}) {
			t.Fatalf("asked about %q after a process died of %s", got, bad.manifest.Digest)
		}
	}
	if got := run(t, true); !slices.Equal(got, []string{"a", "c", "bad"}) {
		t.Errorf("asked about %q once one was judged", got)
	}
	if got := run(t, false); !slices.Equal(got, []string{"a", "bad", "c"}) {
		t.Errorf("asked about %q at the next start", got)
	}
	for _, broken := range []string{"junk", bad.manifest.Digest.String(), bad.manifest.Digest.String() + "\njunk\n", strings.Repeat("x", maxMarksBytes+1)} {
		note(broken)
		if got := run(t, false); len(got) != 4 {
			t.Errorf("a broken note %.20q: asked about %q", broken, got)
		}
	}
	var none *Marks
	none.Hold(bad.manifest.Digest)()
	if none.Skips(bad.manifest.Digest) || none.Judged(bad.manifest.Digest) {
		t.Error("no marks skip something")
	}
}

// Of more images than are looked at, those that run and those that the configuration
// names are not left out for others whose names sort first; and they go first.
func TestPrefetchNearest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := prefetch(t)
		for i := range containerd.MaxImages + 10 {
			s.image(fmt.Sprintf("a-%05d", i))
		}
		for _, n := range []string{"zz/runs", "zz/named", "zz/host"} {
			s.image(n)
		}
		s.inv.running = []containerd.Container{{Image: "r.example/zz/runs"}}
		o := options(1)
		o.Named = func(n verify.Name) (host, repository bool) {
			return strings.HasPrefix(n.Path, "zz/"), n.Path == "zz/named"
		}
		s.resolver.Configure(o)
		s.start()
		defer s.end()
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		got := s.asks.names()
		if len(got) != containerd.MaxImages || !slices.Equal(got[:4], []string{"zz/named", "zz/host", "zz/runs", "a-00000"}) && !slices.Equal(got[:4], []string{"zz/runs", "zz/named", "zz/host", "a-00000"}) {
			t.Errorf("asked about %d images, first %q", len(got), got[:4])
		}
	})
}

// Images whose verification hangs wait for others, whatever they are called.
func TestPrefetchSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := prefetch(t)
		for i := range 100 {
			s.image(fmt.Sprintf("a/hangs%d", i))
		}
		for i := range 30 {
			s.image(fmt.Sprintf("good/app%d", i))
		}
		o := options(1)
		o.Named = func(verify.Name) (host, repository bool) { return true, false }
		s.resolver.Configure(o)
		hangs := func(n verify.Name) bool { return strings.HasPrefix(n.Path, "a/") }
		s.asks.during = func() {
			s.asks.mu.Lock()
			last := s.asks.asked[len(s.asks.asked)-1].Name
			s.asks.mu.Unlock()
			if hangs(last) {
				time.Sleep(10 * time.Second)
			}
		}
		s.asks.answer = func(img verify.Image) verify.Decision {
			if hangs(img.Name) {
				return verify.Deny(verify.SourceUnreachable, "")
			}
			return verify.Deny(verify.SignatureMissing, "")
		}
		s.start()
		time.Sleep(40 * time.Second)
		good := 0
		for _, n := range s.asks.names() {
			if strings.HasPrefix(n, "good/") {
				good++
			}
		}
		s.end()
		if good != 30 {
			t.Errorf("in a minute %d of 30 images were asked about", good)
		}
	})
}

// That there are more images than can be listed is said, once in the log, until they can be.
func TestPrefetchTooMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := prefetch(t)
		var log strings.Builder
		s.Log = slog.New(slog.NewTextHandler(&log, nil))
		s.image("a")
		s.rec.full.Store(true)
		s.start()
		time.Sleep(30 * time.Minute)
		if got := s.Trouble(); !strings.Contains(got, containerd.ErrTooMany.Error()) {
			t.Errorf("the trouble is %q", got)
		}
		if n := strings.Count(log.String(), "cannot be listed"); n != 1 {
			t.Errorf("said %d times:\n%s", n, log.String())
		}
		s.end()
		s.rec.full.Store(false)
		s.start()
		s.settle()
		s.want("when they can be listed", "a")
		if got := s.Trouble(); got != "" {
			t.Errorf("the trouble is %q", got)
		}
		s.end()
	})
}

// What is on the node is told each time that the list is whole, and not where it
// cannot be had.
func TestPrefetchListed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := prefetch(t)
		var told []map[digest.Digest]bool
		s.Listed = func(live map[digest.Digest]bool) { told = append(told, live) }
		a := s.image("a")
		s.rec.fails.Store(true)
		s.start()
		defer s.end()
		if len(told) != 0 {
			t.Errorf("told %v of a list that could not be had", told)
		}
		s.rec.fails.Store(false)
		s.settle()
		if len(told) == 0 || len(told[0]) != 2 || !told[0][a.manifest.Digest] || !told[0][a.config.Digest] {
			t.Fatalf("told %v, want %s", told, a.manifest.Digest)
		}
		b := s.image("b")
		s.Wake()
		s.settle()
		last := told[len(told)-1]
		if len(last) != 4 || !last[a.manifest.Digest] || !last[b.manifest.Digest] {
			t.Errorf("told %v at last", last)
		}
	})
}

// A node with more images than are looked at ahead of time is told of whole too, once
// all of them were read, and never with a part of them missing.
func TestPrefetchListsAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := prefetch(t)
		s.Verifier = nil
		var log strings.Builder
		s.Log = slog.New(slog.NewTextHandler(&log, nil))
		var told []map[digest.Digest]bool
		s.Listed = func(live map[digest.Digest]bool) { told = append(told, live) }
		want := map[digest.Digest]bool{}
		var list []image
		for i := range containerd.MaxImages + 3*overflowBatch {
			img := s.image(fmt.Sprintf("image-%05d", i))
			// As the CRI plugin has it, three records for one image.
			s.rec.images["r.example/image@"+img.manifest.Digest.String()] = img.manifest
			s.rec.images[img.config.Digest.String()] = img.manifest
			want[img.manifest.Digest], want[img.config.Digest] = true, true
			list = append(list, img)
		}
		// Of one there is nothing but the record.
		lost := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("lost"), Size: 100}
		s.rec.images["r.example/lost"] = lost
		want[lost.Digest] = true
		s.start()
		defer s.end()
		for range 30 {
			s.settle()
		}
		if len(told) == 0 {
			t.Fatal("nothing was told")
		}
		for _, live := range told {
			if !maps.Equal(live, want) {
				t.Fatalf("told of %d digests, want %d", len(live), len(want))
			}
		}
		if n := strings.Count(log.String(), "more images than"); n != 1 {
			t.Errorf("said %d times:\n%s", n, log.String())
		}
		// One goes, and one comes.
		calls := s.calls()
		s.rec.mu.Lock()
		gone := list[len(list)-1]
		maps.DeleteFunc(s.rec.images, func(_ string, d ocispec.Descriptor) bool { return d.Digest == gone.manifest.Digest })
		s.rec.mu.Unlock()
		come := s.image("come")
		delete(want, gone.manifest.Digest)
		delete(want, gone.config.Digest)
		want[come.manifest.Digest], want[come.config.Digest] = true, true
		s.Wake()
		for range 10 {
			s.settle()
		}
		if last := told[len(told)-1]; !maps.Equal(last, want) {
			t.Errorf("told of %d digests at last, want %d", len(last), len(want))
		}
		if n := s.calls() - calls; n > 100 {
			t.Errorf("%d calls to containerd for one image more", n)
		}
	})
}
