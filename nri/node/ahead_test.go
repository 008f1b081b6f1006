package node

import (
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
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

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
	d.Epoch = img.Epoch
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
	running []Container
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

func (i *inventory) Running(_ context.Context, yield func(Container) bool) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, c := range i.running {
		if !yield(c) {
			break
		}
	}
	return nil
}

// guarded are records that a test may change meanwhile.
type guarded struct {
	*records
	mu *sync.Mutex
}

func (g guarded) Images(ctx context.Context) ([]Record, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.records.Images(ctx)
}

func (g guarded) Blob(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.records.Blob(ctx, d)
}

// A surveyed is a Survey under synctest, with containerd's state and its events.
type surveyed struct {
	*Survey
	t     *testing.T
	mu    sync.Mutex // of rec
	rec   *records
	inv   *inventory
	asks  *ledger
	end   func()
	looks int
}

func surveyOptions(epoch byte) Options {
	o := testOptions()
	o.Now = time.Now
	o.Epoch = verify.Epoch{epoch}
	return o
}

// survey makes one that does not run yet. It must be called in a bubble.
func survey(t *testing.T) *surveyed {
	rec := newRecords()
	s := &surveyed{t: t, rec: rec, inv: &inventory{lost: make(chan struct{})}, asks: &ledger{}}
	s.Survey = &Survey{Resolver: NewResolver(guarded{rec, &s.mu}, surveyOptions(1)), Node: s.inv, Verifier: s.asks, Log: slog.New(slog.DiscardHandler), Looked: func() { s.looks++ }}
	return s
}

// start runs it until stop, or the test's end.
func (s *surveyed) start() {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = s.Run(ctx) })
	s.end = func() { cancel(); wg.Wait() }
	s.settle()
}

func (s *surveyed) settle() { time.Sleep(20 * time.Second); synctest.Wait() }

func (s *surveyed) want(what string, names ...string) {
	s.t.Helper()
	if got := s.asks.names(); !slices.Equal(got, names) {
		s.t.Errorf("%s: asked about %q, want %q", what, got, names)
	}
}

func (s *surveyed) image(name string) image {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := s.rec.image(name, name)
	s.rec.images["r.example/"+name] = i.manifest
	return i
}

func (s *surveyed) calls() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rec.calls
}

// Images are asked about once, those of containers first, and then as they come.
func TestSurveyOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := survey(t)
		for _, n := range []string{"a", "b", "c", "d"} {
			s.image(n)
		}
		s.rec.images["sha256:0123"] = s.rec.images["r.example/a"] // the record of an image ID
		s.inv.running = []Container{{Image: "r.example/c"}, {Image: "sha256:0123"}}
		s.Resolver.Connected(false)
		s.start()
		defer s.end()
		s.want("at first", "c", "a", "b", "d")
		if s.looks != 1 {
			t.Errorf("told %d times that the images were looked at, want once", s.looks)
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
		s.mu.Lock()
		s.rec.images["r.example/a"] = s.rec.image("moved", "m").manifest
		delete(s.rec.images, "r.example/b")
		s.mu.Unlock()
		s.inv.event()
		s.settle()
		s.want("after a move", "a")
		s.inv.event()
		s.settle()
		s.want("after nothing")

		// Another connection changes nothing, another configuration everything.
		s.Resolver.Connected(false)
		s.settle()
		if s.want("connected again"); s.looks != 2 {
			t.Errorf("told %d times, want twice", s.looks)
		}
		s.Resolver.Configure(surveyOptions(2))
		s.settle()
		if s.want("another configuration", "c", "a", "d", "e"); s.looks != 3 {
			t.Errorf("told %d times, want three times", s.looks)
		}
	})
}

// Nothing is asked without a configuration, and what is asked names record,
// content and kin.
func TestSurveyAsks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := survey(t)
		i := s.image("app")
		other := s.rec.index(on(i.manifest, here))
		s.rec.images["r.example/copy"] = other
		huge := s.rec.put(ocispec.MediaTypeImageManifest, ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest,
			Config: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: i.config.Digest, Size: 500 << 20}})
		s.rec.images["r.example/huge"] = huge
		o := surveyOptions(0)
		s.Resolver.Configure(o)
		s.Resolver.Connected(false)
		s.start()
		defer s.end()
		s.want("without a configuration")
		s.Resolver.Configure(surveyOptions(1))
		s.settle()
		s.asks.mu.Lock()
		defer s.asks.mu.Unlock()
		if len(s.asks.asked) != 3 {
			t.Fatalf("asked %d times, want 3", len(s.asks.asked))
		}
		got := s.asks.asked[0]
		if got.Fault != nil || got.Use != verify.UseAhead || got.Binding != verify.BoundRecord || got.Epoch != (verify.Epoch{1}) ||
			got.Target.Digest != i.manifest.Digest || got.Config != i.config.Digest || !got.Vouched || len(got.Others) != 1 || got.Others[0].Digest != other.Digest {
			t.Errorf("asked %+v", got)
		}
		if f := s.asks.asked[2].Fault; f == nil || f.Reason != verify.ImageAmbiguous {
			t.Errorf("a config of 500 MB: %v", f)
		}
	})
}

// Where a snapshotter that proves nothing may be used, kin does not count.
func TestSurveyWithListedSnapshotter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := survey(t)
		i := s.image("app")
		s.rec.images["r.example/copy"] = s.rec.index(on(i.manifest, here))
		o := surveyOptions(1)
		o.Snapshotters = []string{"stargz"}
		s.Resolver.Configure(o)
		s.start()
		defer s.end()
		for _, img := range s.asks.asked {
			if len(img.Others) != 0 || img.Vouched || img.Fault != nil {
				t.Errorf("asked with others %v, fault %v", img.Others, img.Fault)
			}
		}
		s.want("both", "app", "copy")
	})
}

// What settles nothing is asked again, later and later; an answer that ends, then;
// a denial is left to the container that asks.
func TestSurveyRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := survey(t)
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
			d, base := at[n].Sub(at[n-1]), min(retryFirst<<min(n-1, 10), retryLast)
			if d < base*3/4 || d > base*5/4+surveyPause*10 {
				t.Errorf("pause %d was %v", n, d)
			}
		}
	})
}

// With new signatures on the node, what was denied is asked again, and nothing else.
func TestSurveyAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := survey(t)
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
		s.Resolver.look()
		s.settle()
		s.want("for nothing")
		s.Again()
		s.settle()
		s.want("with new signatures", "denied")
		s.Resolver.look()
		s.settle()
		s.want("for nothing after that")
	})
}

// An epoch that the Verifier does not have yet is a moment's matter.
func TestSurveyWhileConfigured(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := survey(t)
		s.image("app")
		asked := 0
		s.Verifier = verifierFunc(func(img verify.Image) verify.Decision {
			if asked++; asked < 4 {
				return verify.Deny(verify.Pending, "another epoch")
			}
			d := verify.Deny(verify.SignatureMissing, "scripted")
			d.Epoch = img.Epoch
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

// failing are records that cannot be listed.
type failing struct {
	guarded
	err   atomic.Bool
	lists atomic.Int64
}

func (f *failing) Images(ctx context.Context) ([]Record, error) {
	if f.lists.Add(1); f.err.Load() {
		return nil, errors.New("no answer")
	}
	return f.guarded.Images(ctx)
}

// A containerd that does not answer is asked once in a while, and a lost stream of
// events is taken up again, with a look at the list.
func TestSurveyOfBrokenContainerd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := survey(t)
		s.image("app")
		failing := &failing{guarded: guarded{s.rec, &s.mu}}
		failing.err.Store(true)
		s.Resolver.records = failing
		s.start()
		defer s.end()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if n := failing.lists.Load(); n > 60 {
			t.Errorf("%d calls in ten minutes to a containerd that does not answer", n)
		}
		failing.err.Store(false)
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
func TestSurveyOfManyImages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := survey(t)
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

// The image in hand when a process dies is skipped by the next ones, a broken note
// by nobody.
func TestSurveySkipsWhatWasInHand(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, inflightFile)
	var bad image
	run := func(t *testing.T, die bool) (asked []string) {
		synctest.Test(t, func(t *testing.T) {
			s := survey(t)
			s.Dir = dir
			s.image("a")
			bad = s.image("bad")
			s.image("c")
			s.asks.during = func() {
				if die && s.asks.asked[len(s.asks.asked)-1].Name.Path == "bad" {
					raw, err := os.ReadFile(path)
					if err != nil {
						t.Error(err)
					}
					// What a process that dies now leaves.
					if err := os.WriteFile(path+".left", raw, 0o600); err != nil {
						t.Error(err)
					}
				}
			}
			s.start()
			s.end()
			asked = s.asks.names()
		})
		return asked
	}
	if got := run(t, true); !slices.Equal(got, []string{"a", "bad", "c"}) {
		t.Fatalf("asked about %q", got)
	}
	if raw, err := os.ReadFile(path); err != nil || len(raw) != 0 {
		t.Fatalf("after an orderly end the note is %q, %v", raw, err)
	}
	if err := os.Rename(path+".left", path); err != nil {
		t.Fatal(err)
	}
	for range 3 { // not only once: the next start would die of it
		if got := run(t, false); !slices.Equal(got, []string{"a", "c"}) {
			t.Fatalf("asked about %q after a process died of %s", got, bad.manifest.Digest)
		}
	}
	for _, broken := range []string{"junk", bad.manifest.Digest.String(), bad.manifest.Digest.String() + "\njunk\n", strings.Repeat("x", maxInflight+1)} {
		if err := os.WriteFile(path, []byte(broken), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := run(t, false); len(got) != 3 {
			t.Errorf("a broken note %.20q: asked about %q", broken, got)
		}
	}
}

// What is on the node is told each time that the list is whole, and not where it
// cannot be had.
func TestSurveyListed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := survey(t)
		var told []map[digest.Digest]bool
		s.Listed = func(live map[digest.Digest]bool) { told = append(told, live) }
		a := s.image("a")
		failing := &failing{guarded: guarded{s.rec, &s.mu}}
		failing.err.Store(true)
		s.Resolver.records = failing
		s.start()
		defer s.end()
		if len(told) != 0 {
			t.Errorf("told %v of a list that could not be had", told)
		}
		failing.err.Store(false)
		s.settle()
		if len(told) == 0 || len(told[0]) != 2 || !told[0][a.manifest.Digest] || !told[0][a.config.Digest] {
			t.Fatalf("told %v, want %s", told, a.manifest.Digest)
		}
		b := s.image("b")
		s.Resolver.look()
		s.settle()
		last := told[len(told)-1]
		if len(last) != 4 || !last[a.manifest.Digest] || !last[b.manifest.Digest] {
			t.Errorf("told %v at last", last)
		}
	})
}

// A node with more images than are looked at ahead of time is told of whole too, once
// all of them were read, and never with a part of them missing.
func TestSurveyListsAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := survey(t)
		s.Verifier = nil
		var log strings.Builder
		s.Log = slog.New(slog.NewTextHandler(&log, nil))
		var told []map[digest.Digest]bool
		s.Listed = func(live map[digest.Digest]bool) { told = append(told, live) }
		want := map[digest.Digest]bool{}
		var list []image
		for i := range maxLeads + 3*surveyFar {
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
		s.mu.Lock()
		gone := list[len(list)-1]
		maps.DeleteFunc(s.rec.images, func(_ string, d ocispec.Descriptor) bool { return d.Digest == gone.manifest.Digest })
		s.mu.Unlock()
		come := s.image("come")
		delete(want, gone.manifest.Digest)
		delete(want, gone.config.Digest)
		want[come.manifest.Digest], want[come.config.Digest] = true, true
		s.Resolver.look()
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
