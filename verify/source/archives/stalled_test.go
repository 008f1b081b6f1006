package archives_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/archives"
	"github.com/tidewaiter/tidewaiter/verify/source/layout"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

// A dead disk does not answer until it is mended.
type deadDisk struct {
	mended chan struct{}
	mend   func()

	mu    sync.Mutex
	asked map[string]int
	dead  map[string]bool
}

func newDeadDisk(dead ...string) *deadDisk {
	d := &deadDisk{mended: make(chan struct{}), asked: map[string]int{}, dead: map[string]bool{}}
	d.mend = sync.OnceFunc(func() { close(d.mended) })
	for _, name := range dead {
		d.dead[name] = true
	}
	return d
}

func (d *deadDisk) touch(name string) {
	d.mu.Lock()
	d.asked[name]++
	dead := d.dead[name]
	d.mu.Unlock()
	if dead {
		<-d.mended
	}
}

func (d *deadDisk) set(name string, dead bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dead[name] = dead
}

func (d *deadDisk) times(name string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.asked[name]
}

// An archive whose first reading does not end costs only itself: those beside it are
// read, and those that come, are replaced or go later. It holds a bounded number of
// goroutines, is seen, and counts when its disk answers.
func TestLateArchive(t *testing.T) {
	t.Parallel()
	clock := newClock()
	dir := t.TempDir()
	var a, b, z, z2, later site
	one, ev := a.image("one")
	two, ev2 := b.image("two")
	three, ev3 := z.image("three")
	four, ev4 := z2.image("four")
	five, ev5 := later.image("five")
	put(t, dir, "a", a)
	put(t, dir, "b", b)
	put(t, dir, "z", z)
	disk := newDeadDisk("b")
	defer disk.mend()
	r := start(t, dir, archives.Options{Now: clock.now}, func(a *archives.Archives) { a.Slowly(disk.touch, 20*time.Millisecond) })
	finds := func(subject ocispec.Descriptor, want ...verify.Evidence) {
		t.Helper()
		var err error
		r.eventually("the signatures are found, and that one evidence archive is not known", func() bool {
			var got []verify.Evidence
			got, err = sourcetest.Find(t.Context(), r, subject, verify.Limits{})
			return len(got) == len(want) && (len(want) == 0 || string(got[0].Blob) == string(want[0].Blob)) &&
				errors.Is(err, verify.ErrUnreachable) && strings.Contains(err.Error(), `evidence archive "b"`)
		})
	}
	finds(one, ev)
	finds(three, ev3)
	finds(two)
	put(t, dir, "later", later)
	put(t, dir, "z", z2)
	finds(five, ev5)
	finds(four, ev4)
	finds(three)
	if err := os.RemoveAll(filepath.Join(below(dir), "z")); err != nil {
		t.Fatal(err)
	}
	finds(four)
	r.eventually("it is said of the one alone", func() bool {
		got := r.troubles()
		return len(got) == 3 && got[0] == "a" && strings.HasPrefix(got[1], "b: ") && strings.Contains(got[1], "does not answer") && got[2] == "later"
	})
	// It is tried again, and not without end.
	for range 40 {
		clock.pass(2 * time.Hour)
		before := disk.times("a")
		r.Rescan()
		r.eventually("the others are looked at", func() bool { return disk.times("a") > before })
	}
	if n := disk.times("b"); n < 2 || n > 8 {
		t.Errorf("%d readings of it are under way", n)
	}
	disk.mend()
	r.finds(two, ev2)
	r.finds(one, ev)
	r.eventually("nothing is wrong", func() bool { return slices.Equal(r.troubles(), []string{"a", "b", "later"}) })
	r.stop()
	// Not once a look; a machine that stood still may make it late once more.
	if n := strings.Count(r.log.String(), `meanwhile" archive=b `); n < 1 || n > 3 {
		t.Errorf("said %d times:\n%s", n, r.log.String())
	}
}

// An archive that was read, and whose disk does not say any more whether it is another
// one, stays what it was. What lies there instead later is found although the disk
// never answers.
func TestLateReplaced(t *testing.T) {
	t.Parallel()
	clock := newClock()
	dir := t.TempDir()
	var first, second site
	one, ev := first.image("one")
	two, ev2 := second.image("two")
	put(t, dir, "usb", first)
	disk := newDeadDisk()
	r := start(t, dir, archives.Options{Now: clock.now}, func(a *archives.Archives) { a.Slowly(disk.touch, 20*time.Millisecond) })
	defer disk.mend() // only then may the store end
	r.finds(one, ev)
	disk.set("usb", true)
	r.Rescan()
	r.eventually("it is late", func() bool { return strings.Contains(fmt.Sprint(r.troubles()), "does not answer") })
	got, err := sourcetest.Find(t.Context(), r, one, verify.Limits{})
	sourcetest.Check(t, got, []verify.Evidence{ev}, 0)
	if !errors.Is(err, verify.ErrUnreachable) {
		t.Errorf("error %v", err)
	}
	put(t, dir, "usb", second)
	disk.set("usb", false) // and that of before hangs on
	r.eventually("the other one is found", func() bool {
		clock.pass(time.Minute)
		r.Rescan()
		got, err := sourcetest.Find(t.Context(), r, two, verify.Limits{})
		return err == nil && len(got) == 1
	})
	r.finds(two, ev2)
	r.finds(one)
	// What the one of before says when it answers after all does not count.
	disk.mend()
	for range 3 {
		r.Rescan()
		r.finds(two, ev2)
	}
}

// An archive that is late keeps what it took before another came that goes before it, and
// both together may be more than there is for all. What comes after them gets none of it.
func TestLateRoom(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var a, m, z site
	for i := range 10 { // with its signature, each is two documents
		a.image(fmt.Sprint("a", i))
		m.image(fmt.Sprint("m", i))
		z.image(fmt.Sprint("z", i))
	}
	put(t, dir, "m", m)
	disk := newDeadDisk()
	r := start(t, dir, archives.Options{}, func(a *archives.Archives) {
		a.Slowly(disk.touch, 20*time.Millisecond)
		a.Narrow(30, 20, 1<<20)
	})
	defer disk.mend()
	signatures := func(want ...string) func() bool {
		return func() bool {
			list, _ := r.Status()
			var got []string
			for _, b := range list {
				got = append(got, fmt.Sprint(b.Name, " ", b.Signatures))
			}
			return slices.Equal(got, want)
		}
	}
	r.eventually("the one is there", signatures("m 10"))
	disk.set("m", true)
	put(t, dir, "a", a)
	r.eventually("both are there", signatures("a 5", "m 10"))
	put(t, dir, "z", z)
	r.eventually("there is no room for the last", func() bool {
		return signatures("a 0", "m 10", "z 0")() && strings.Count(fmt.Sprint(r.troubles()), "more than its part of the 30 manifests and indexes of all evidence archives") == 2
	})
	if got, err := sourcetest.Find(t.Context(), r, z.Images[0], verify.Limits{}); len(got) != 0 || !layout.Inconclusive(err) {
		t.Errorf("%d signatures are found, error %v", len(got), err)
	}
}

// The file system of an archive that was taken away does not answer when it is closed:
// nobody waits for that.
func TestLateClosing(t *testing.T) {
	t.Parallel()
	for _, form := range forms {
		t.Run(form, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			var a, b site
			one, ev := a.image("one")
			two, ev2 := b.image("two")
			put(t, dir, "a"+form, a)
			r := start(t, dir, archives.Options{})
			r.finds(one, ev)
			free, closing := r.HangClosing("a" + form)
			defer free()
			if err := os.RemoveAll(filepath.Join(below(dir), "a"+form)); err != nil {
				t.Fatal(err)
			}
			r.Rescan()
			<-closing
			put(t, dir, "b"+form, b)
			r.finds(two, ev2)
			r.finds(one)
			if got := r.troubles(); !slices.Equal(got, []string{"b" + form}) {
				t.Errorf("evidence archives %q", got)
			}
			r.stop()
		})
	}
}

// Where the directory of archives itself lies on a disk that does not answer, from the
// start or later, it is said; and over when it answers.
func TestLateDirectory(t *testing.T) {
	t.Parallel()
	for name, first := range map[string]bool{"first look": true, "later": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			var a, b site
			one, ev := a.image("one")
			two, ev2 := b.image("two")
			put(t, dir, "a", a)
			disk := newDeadDisk()
			slowly := func(a *archives.Archives) { a.Slowly(disk.touch, 20*time.Millisecond) }
			var r *run
			if first {
				disk.set("", true)
				r = begin(t, dir, archives.Options{}, slowly)
			} else {
				r = start(t, dir, archives.Options{}, slowly)
				r.finds(one, ev)
				disk.set("", true)
				r.Rescan()
			}
			defer disk.mend()
			r.eventually("it is said", func() bool {
				_, trouble := r.Status()
				return strings.Contains(trouble, "directory of evidence archives does not answer")
			})
			got, err := sourcetest.Find(t.Context(), r, one, verify.Limits{})
			if first && (len(got) != 0 || !errors.Is(err, verify.ErrUnreachable)) || !first && (len(got) != 1 || err != nil) {
				t.Errorf("%d signatures, error %v", len(got), err)
			}
			put(t, dir, "b", b)
			disk.mend()
			r.finds(one, ev)
			r.finds(two, ev2)
			r.eventually("nothing is wrong", func() bool { return slices.Equal(r.troubles(), []string{"a", "b"}) })
		})
	}
}

// The gate ends while a reading does not.
func TestLateAtTheEnd(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var c site
	one, _ := c.image("one")
	put(t, dir, "a", c)
	put(t, dir, "b.tar", c)
	disk := newDeadDisk("a", "b.tar")
	defer disk.mend()
	r := start(t, dir, archives.Options{}, func(a *archives.Archives) { a.Slowly(disk.touch, time.Millisecond) })
	if _, err := sourcetest.Find(t.Context(), r, one, verify.Limits{}); !errors.Is(err, verify.ErrUnreachable) {
		t.Errorf("error %v", err)
	}
	r.stop()
}

func leftOut(t *testing.T, why string) {
	t.Helper()
	fmt.Fprintf(os.Stderr, "LEFT OUT: %s: %s\n", t.Name(), why)
	t.Skip(why)
}

// A file system that does not answer, as the kernel has it: of a FUSE mount whose
// server is silent nobody can even say what it is.
func TestSilentMount(t *testing.T) {
	if os.Geteuid() != 0 {
		leftOut(t, "mounting needs root")
	}
	fuse, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		leftOut(t, "no FUSE here: "+err.Error())
	}
	dir := t.TempDir()
	var c, later site
	one, ev := c.image("one")
	two, ev2 := later.image("two")
	put(t, dir, "a", c)
	put(t, dir, "z", c)
	at := filepath.Join(below(dir), "nfs")
	if err := os.Mkdir(at, 0o700); err != nil {
		t.Fatal(err)
	}
	o := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fuse.Fd())
	if err := syscall.Mount("silent", at, "fuse", 0, o); err != nil {
		fuse.Close()
		leftOut(t, "FUSE cannot be mounted here: "+err.Error())
	}
	answer := sync.OnceFunc(func() {
		fuse.Close() // which ends what waits for it
		if err := syscall.Unmount(at, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	defer answer()
	r := start(t, dir, archives.Options{}, func(a *archives.Archives) { a.Slowly(func(string) {}, 200*time.Millisecond) })
	known := func(subject ocispec.Descriptor, want ...verify.Evidence) {
		t.Helper()
		r.eventually("the signatures are found", func() bool {
			got, err := sourcetest.Find(t.Context(), r, subject, verify.Limits{})
			return len(got) == len(want) && errors.Is(err, verify.ErrUnreachable) && strings.Contains(err.Error(), `evidence archive "nfs"`)
		})
	}
	known(one, ev)
	put(t, dir, "later", later)
	known(two, ev2)
	if got := r.troubles(); len(got) != 4 || !strings.HasPrefix(got[2], "nfs: ") {
		t.Errorf("evidence archives %q", got)
	}
	answer()
	put(t, dir, "nfs", c)
	r.Rescan()
	r.eventually("nothing is wrong", func() bool { return slices.Equal(r.troubles(), []string{"a", "later", "nfs", "z"}) })
	r.finds(one, ev)
}

// What somebody put beside an image, hides nothing of another image in the same
// archive, wherever index.json has it and however much it is.
func TestArchiveOfManyHands(t *testing.T) {
	t.Parallel()
	for name, junk := range map[string]struct {
		add  func(c *site, evil ocispec.Descriptor)
		says string
	}{
		"signatures": {func(c *site, evil ocispec.Descriptor) {
			for i := range 60 {
				c.evidence(evil, fmt.Sprint("junk ", i))
			}
		}, "more than 20 signatures of"},
		"long manifests": {func(c *site, evil ocispec.Descriptor) {
			for i := range 60 {
				c.Images = append(c.Images, c.Add(ocispec.MediaTypeImageManifest, fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"artifactType":"text/junk","config":{},"annotations":{"a":"%d%s"}}`,
					ocispec.MediaTypeImageManifest, i, strings.Repeat("x", 8<<10))))
			}
		}, "left for it"},
		"indexes of indexes": {func(c *site, evil ocispec.Descriptor) {
			for i := range 60 {
				inner := c.index(c.Add(ocispec.MediaTypeImageManifest, fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"digest":%q},"annotations":{"a":"%d"}}`,
					ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig, digest.FromString("config"), i)))
				c.Images = append([]ocispec.Descriptor{c.index(inner)}, c.Images...)
			}
		}, "manifests and indexes of all evidence archives"},
	} {
		for _, form := range forms {
			t.Run(name+form, func(t *testing.T) {
				t.Parallel()
				var c site
				evil, _ := c.image("evil")
				junk.add(&c, evil)
				good, ev := c.image("good")
				index := c.index(good)
				c.Images = append(c.Images, index)
				signed := c.evidence(index, "index")
				dir := t.TempDir()
				put(t, dir, "a"+form, c)
				r := start(t, dir, archives.Options{}, func(a *archives.Archives) { a.Narrow(100, 20, 256<<10) })
				for subject, want := range map[*ocispec.Descriptor]verify.Evidence{&good: ev, &index: signed} {
					got, err := sourcetest.Find(t.Context(), r, *subject, verify.Limits{})
					sourcetest.Check(t, got, []verify.Evidence{want}, 0)
					if cut := name != "signatures"; errors.Is(err, verify.ErrBudget) != cut {
						t.Errorf("the evidence archive was cut: %v, error %v", cut, err)
					}
				}
				if got := r.parents(good.Digest); !slices.Equal(got, []digest.Digest{index.Digest}) {
					t.Errorf("the manifest is named by %v", got)
				}
				if got := fmt.Sprint(r.troubles()); !strings.Contains(got, junk.says) {
					t.Errorf("evidence archives %q", got)
				}
			})
		}
	}
}

// What is read where not everything has room does not depend on which came first.
func TestArchiveOrder(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var a, z site
	for i := range 10 {
		a.image(fmt.Sprint("a", i))
		z.image(fmt.Sprint("z", i))
	}
	narrow := func(a *archives.Archives) { a.Narrow(30, 20, 1<<20) }
	found := func(r *run) (list []int) {
		for _, d := range slices.Concat(a.Images, z.Images) {
			got, err := sourcetest.Find(t.Context(), r, d, verify.Limits{})
			if err != nil && !errors.Is(err, verify.ErrBudget) { // it is being replaced
				return nil
			}
			list = append(list, len(got))
		}
		return list
	}
	all := strings.Repeat("1 ", 10)
	r := start(t, dir, archives.Options{}, narrow)
	put(t, dir, "z", z)
	r.eventually("the one is there", func() bool { return strings.HasSuffix(fmt.Sprint(found(r)), " "+strings.TrimSpace(all)+"]") })
	put(t, dir, "a", a)
	r.eventually("the other has its part", func() bool {
		return strings.Contains(fmt.Sprint(r.troubles()), "a: ") && strings.Contains(fmt.Sprint(r.troubles()), "z: ")
	})
	want := found(r)
	if !slices.Contains(want[:10], 1) || !slices.Contains(want[10:], 1) {
		t.Errorf("found %v", want)
	}
	r.stop()
	r = start(t, dir, archives.Options{}, narrow)
	if got := found(r); !slices.Equal(got, want) {
		t.Errorf("after a restart %v, before %v", got, want)
	}
	if err := os.RemoveAll(filepath.Join(below(dir), "a")); err != nil {
		t.Fatal(err)
	}
	r.eventually("the one has all again", func() bool { return strings.HasSuffix(fmt.Sprint(found(r)), " "+strings.TrimSpace(all)+"]") })
	if got := r.troubles(); !slices.Equal(got, []string{"z"}) {
		t.Errorf("evidence archives %q", got)
	}
}
