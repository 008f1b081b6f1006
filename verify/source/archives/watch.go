package archives

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/tidewaiter/tidewaiter/verify/source/catalog"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// Run reads the archives, and again when they change and now and then, until ctx ends.
// It is called once. A medium that hangs does not keep it from its end; it returns nil.
func (a *Archives) Run(ctx context.Context) error {
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		a.watch(ctx)
	}()
	<-ctx.Done()
	select {
	case <-watched:
	case <-time.After(endWait):
	}
	return nil
}

func (a *Archives) watcher() *watcher {
	return &watcher{Archives: a, entries: map[string]*entry{}}
}

// asks notes that the directory of archives is asked something from now on, or has
// answered. Nobody can interrupt that either, and where it lies on a disk that died it
// may never end: no archive comes or goes any more, and that is said.
func (a *Archives) asks(now time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.asked = now
}

// watch looks at the archives when they change, and now and then, until ctx ends.
func (a *Archives) watch(ctx context.Context) {
	a.asks(a.o.Now())
	a.touch("")
	_ = os.MkdirAll(a.dir, 0o700) // where it cannot be made there is no archive
	var events chan fsnotify.Event
	var lost chan error
	notify, err := fsnotify.NewWatcher()
	if err != nil {
		a.o.Log.Warn("evidence archives are noticed late", "error", err.Error(), "within", rescanInterval.String())
	} else {
		defer notify.Close()
		events, lost = notify.Events, notify.Errors
	}
	h := a.watcher()
	defer h.close()
	for first := true; ; first = false {
		a.asks(a.o.Now())
		if notify != nil {
			_ = notify.Add(a.dir) // it may be another one now; what cannot be watched, the timer finds
		}
		news := h.scan(ctx)
		if first {
			a.start.Done()
		} else if news && a.o.Changed != nil {
			a.o.Changed()
		}
		every, rest := time.NewTimer(rescanInterval), time.NewTimer(0)
		rest.Stop()
		changes := 0
	wait:
		for {
			select {
			case <-ctx.Done():
				every.Stop()
				rest.Stop()
				return
			case e, open := <-events:
				if !open {
					events = nil
				} else if e.Op&(fsnotify.Create|fsnotify.Rename|fsnotify.Remove) != 0 { // who writes in place renames at the end, or the timer finds it
					if changes++; changes <= 10 {
						rest.Reset(settleTime)
					}
				}
			case _, open := <-lost:
				if !open {
					lost = nil
					continue
				}
				break wait
			case <-a.rescan:
				break wait
			case <-rest.C:
				break wait
			case <-every.C:
				break wait
			}
		}
		every.Stop()
		rest.Stop()
	}
}

// A watcher is the directory of archives as watch sees it.
//
// Each entry is read by a goroutine of its own. Nobody can interrupt a read, and that of
// a disk that dies may never end. Then the entry is late: it costs the others one wait,
// counts when the read ends after all, and is tried again from time to time, since it
// may lie on another disk by then.
type watcher struct {
	*Archives

	lock    sync.Mutex
	over    bool              // nobody takes a result any more
	entries map[string]*entry // that are read, or were
	readers int               // goroutines under way
}

// An entry is a name in the directory. Its fields are guarded by watcher.lock.
type entry struct {
	readers int
	stalled bool // nobody waits for them
	tries   int  // in a row that were late
	due     time.Time
	serial  int // of the reader that was started last
	latest  int // of the one that ended last
	result  *result
}

// A result is what a reader found.
type result struct {
	archive *archive // nil: the entry has gone
}

func (h *watcher) close() {
	h.lock.Lock()
	h.over = true
	for _, e := range h.entries {
		e.drop()
	}
	h.lock.Unlock()
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, b := range h.list {
		b.reader.Close()
	}
	h.list = nil
}

// drop forgets a result that nobody has taken.
func (e *entry) drop() {
	if e.result != nil {
		e.result.archive.close()
	}
	e.result = nil
}

// close closes b, which may be nil.
func (b *archive) close() {
	if b != nil {
		b.reader.Close()
	}
}

// start begins to read an entry, and returns what is closed at the end. before is what
// was read of it last, or nil, and is the result where nothing has changed.
func (h *watcher) start(ctx context.Context, e *entry, name string, before *archive, left limits) <-chan struct{} {
	h.readers++
	e.readers++
	e.serial++
	serial, now, touch, bounds, done := e.serial, h.o.Now(), h.touch, h.bounds, make(chan struct{})
	go func() {
		defer close(done)
		at := filepath.Join(h.dir, name)
		touch(name)
		stamps := stampsOf(at)
		var b *archive
		switch {
		case stamps[0] == stamp{}:
		case before != nil && before.at == stamps && before.suits(left) && (before.trouble == "" || now.Before(before.due)):
			b = before
		default:
			b = readArchive(ctx, at, left, bounds, h.o.Kinds)
			b.name, b.at = name, stamps
		}
		h.lock.Lock()
		defer h.lock.Unlock()
		h.readers--
		e.readers--
		if h.over || serial < e.latest {
			if b != before {
				b.close()
			}
			return
		}
		e.drop()
		e.latest, e.result = serial, &result{b}
		if e.stalled {
			h.Rescan()
		}
	}()
	return done
}

// read reads the entry name, of which before was read last. It returns nil where the
// entry has gone, and where it is not known in time how it is, before, late.
func (h *watcher) read(ctx context.Context, name string, before *archive, left limits, up <-chan struct{}) (b *archive, stalled bool) {
	h.lock.Lock()
	e := h.entries[name]
	if e == nil {
		e = &entry{}
		h.entries[name] = e
	}
	if e.result != nil { // of one that was late: it may have changed since
		before, e.result = e.result.archive, nil
	}
	now := h.o.Now()
	var done <-chan struct{}
	if e.readers == 0 || e.readers < maxHung && h.readers < maxHungAll && !now.Before(e.due) {
		e.stalled = false
		done = h.start(ctx, e, name, before, left)
	}
	h.lock.Unlock()
	if done != nil {
		grace := time.NewTimer(ownWait)
		select {
		case <-done:
		case <-ctx.Done():
		case <-grace.C:
			select {
			case <-done:
			case <-ctx.Done():
			case <-up:
			}
		}
		grace.Stop()
	}
	h.lock.Lock()
	defer h.lock.Unlock()
	if r := e.result; r != nil {
		if e.result = nil; before != r.archive && !slices.Contains(h.list, before) {
			before.close()
		}
		e.tries = 0
		return r.archive, false
	}
	e.stalled = true
	if done != nil {
		e.due = now.Add(min(firstRetry<<min(e.tries, 10), lastRetry))
		e.tries++
	}
	return before, true
}

// scan brings the archives up to date with the directory, and reports whether
// something may be found that was not before.
func (h *watcher) scan(ctx context.Context) (news bool) {
	h.touch("")
	names, unreadable := entries(h.dir)
	h.asks(time.Time{})
	h.mu.Lock()
	old, wasStalled, was, wait := h.list, h.stalled, h.unreadable, h.wait
	h.mu.Unlock()
	if unreadable != "" && unreadable != was {
		h.o.Log.Warn("not all evidence archives are read", "directory", h.dir, "error", unreadable)
	}
	up := make(chan struct{})
	timer := time.AfterFunc(wait, func() { close(up) })
	defer timer.Stop()
	next, stalled, left := make([]*archive, 0, len(names)), map[string]bool{}, h.bounds.all
	known := func(name string) *archive {
		if i, found := slices.BinarySearchFunc(old, name, func(b *archive, name string) int { return strings.Compare(b.name, name) }); found {
			return old[i]
		}
		return nil
	}
	share := h.bounds.all.share(len(names))
	for i, name := range names {
		before := known(name)
		free := left
		for _, other := range names[i+1:] {
			free = free.less(known(other).reserve(share))
		}
		b, isStalled := h.read(ctx, name, before, free, up)
		if ctx.Err() != nil {
			for _, b := range append(next, b) {
				if !slices.Contains(old, b) {
					b.close()
				}
			}
			return false
		}
		if isStalled {
			stalled[name] = true
			if b == nil {
				b = &archive{name: name, catalog: catalog.New(), trouble: catalog.ErrUnread.Error()}
			}
			if !wasStalled[name] {
				h.o.Log.Warn("an evidence archive is still being read, or its disk does not answer; others are read meanwhile", "archive", text.Clean(name, 128), "directory", h.dir)
			}
		}
		if b == nil {
			continue // it went meanwhile
		}
		left = left.less(b.takes)
		if next = append(next, b); b == before || isStalled {
			continue
		}
		h.report(before, b)
		news = news || b.reader != nil && (before == nil || before.at != b.at || before.trouble != b.trouble)
	}
	h.mu.Lock()
	h.list, h.stalled, h.unreadable = next, stalled, unreadable
	h.mu.Unlock()
	if h.more(next, len(names)) {
		h.Rescan() // others need less than was kept for them
	}
	for _, b := range old {
		if slices.Contains(next, b) {
			continue
		}
		b.close()
		if !slices.ContainsFunc(next, func(n *archive) bool { return n.name == b.name }) {
			h.o.Log.Info("an evidence archive is gone", "archive", text.Clean(b.name, 128))
		}
	}
	h.lock.Lock()
	defer h.lock.Unlock()
	for name, e := range h.entries {
		if !slices.ContainsFunc(next, func(b *archive) bool { return b.name == name }) {
			if e.drop(); e.readers == 0 {
				delete(h.entries, name)
			}
		}
	}
	return news
}

// more reports whether an archive that was cut would be given more now.
func (h *watcher) more(list []*archive, names int) bool {
	share, left := h.bounds.all.share(names), h.bounds.all
	for i, b := range list {
		free := left
		for _, other := range list[i+1:] {
			free = free.less(other.reserve(share))
		}
		if b.cut && !free.within(b.given) {
			return true
		}
		left = left.less(b.takes)
	}
	return false
}

// report logs what was read, and notes when what could not be is read again.
func (h *watcher) report(before, b *archive) {
	name := text.Clean(b.name, 128)
	if b.trouble == "" {
		h.o.Log.Info("an evidence archive was read", "archive", name, "signatures", b.catalog.Signatures())
		return
	}
	if before == nil || before.trouble != b.trouble {
		h.o.Log.Warn("an evidence archive cannot be read, or not all of it", "archive", name, "directory", h.dir, "error", b.trouble, "signatures", b.catalog.Signatures())
	}
	if before != nil && before.at == b.at {
		b.tries = before.tries + 1
	}
	b.due = h.o.Now().Add(min(firstRetry<<min(b.tries, 10), lastRetry))
}
