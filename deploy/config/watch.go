package config

import (
	"context"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
)

// Watch reads the configuration in dir again whenever something in it changes,
// when hup receives, and once when Watch starts, until ctx ends; then it returns
// nil. Every change is noticed within a minute, and at once where the kernel
// tells of it.
//
// on is called from Watch's own goroutine: with a configuration whose Revision is
// not that of the last good one, which at first is current (nil if there is
// none); with an error where the directory became invalid, once for each error
// and again after hup; and with the last good configuration where an invalid
// directory became again what it was.
func Watch(ctx context.Context, dir string, current *Config, hup <-chan os.Signal, on func(*Config, error)) error {
	w := &watcher{dir: dir, last: current, on: on, every: time.Minute, settle: 200 * time.Millisecond}
	return w.run(ctx, hup)
}

type watcher struct {
	dir    string
	last   *Config // good
	failed string  // the error that on was told, empty if none
	on     func(*Config, error)

	every  time.Duration // between readings that nothing asked for
	settle time.Duration // how long after a change nothing else must change; at most ten times that

	notify *fsnotify.Watcher // nil where the kernel has none left
	deaf   bool              // that has been logged
}

func (w *watcher) run(ctx context.Context, hup <-chan os.Signal) error {
	dir, err := filepath.Abs(w.dir)
	if err != nil {
		return err
	}
	w.dir = dir
	tick := time.NewTicker(w.every)
	defer tick.Stop()
	defer w.unwatch()
	w.reload()
	var due <-chan time.Time // when what changed is read
	var latest time.Time     // when it is read even if it still changes
	for {
		var events <-chan fsnotify.Event
		var lost <-chan error
		if w.notify != nil {
			events, lost = w.notify.Events, w.notify.Errors
		}
		select {
		case <-ctx.Done():
			return nil
		case <-hup:
			w.failed = ""
		case <-tick.C:
		case <-due:
		case e, open := <-events:
			if !open {
				w.unwatch()
			} else if w.concerns(e.Name) {
				if due == nil {
					latest = time.Now().Add(10 * w.settle)
				}
				due = time.After(min(w.settle, time.Until(latest)))
			}
			continue
		case _, open := <-lost: // events were lost
			if !open {
				w.unwatch()
				continue
			}
		}
		due = nil
		w.reload()
	}
}

// reload reads the directory and tells of what is new.
func (w *watcher) reload() {
	w.watch() // first, so that nothing changes unnoticed after it was read
	c, err := Load(w.dir)
	switch {
	case err != nil:
		if text := err.Error(); text != w.failed {
			w.failed = text
			w.on(nil, err)
		}
		return
	case w.last == nil || c.Revision != w.last.Revision:
		w.last = c
	case w.failed == "":
		return
	}
	w.failed = ""
	w.on(w.last, nil)
}

// concerns reports whether a change of that file can change the configuration:
// it is the directory itself, what that lies in, what is below, or beside a file
// that was read elsewhere.
func (w *watcher) concerns(name string) bool {
	return name == w.dir || strings.HasPrefix(w.dir, strings.TrimSuffix(name, "/")+"/") || strings.HasPrefix(name, w.dir+"/") ||
		w.last != nil && (slices.Contains(w.last.outside, name) ||
			slices.ContainsFunc(w.last.trees, func(tree string) bool { return name == tree || strings.HasPrefix(name, tree+"/") }))
}

// unwatch drops the kernel's watches.
func (w *watcher) unwatch() {
	if w.notify != nil {
		w.notify.Close()
		w.notify = nil
	}
}

// watch puts kernel watches where a change may happen. They are all made anew
// each time: a directory of the same name may be another one now, and removing
// single watches from the goroutine that reads events can block for ever.
func (w *watcher) watch() {
	w.unwatch()
	notify, err := fsnotify.NewWatcher()
	if err != nil {
		if !w.deaf {
			slog.Warn("changes of the configuration are noticed late", "error", err.Error(), "within", w.every.String())
		}
		w.deaf = true
		return
	}
	w.notify, w.deaf = notify, false
	dirs := map[string]bool{w.dir: true}
	below(w.dir, "truststore", 1, dirs)
	if w.last != nil {
		for _, file := range w.last.outside {
			dirs[filepath.Dir(file)] = true
		}
		for _, tree := range w.last.trees {
			below(filepath.Dir(tree), filepath.Base(tree), trustDepth-1, dirs) // with what is in it, no deeper
			if _, err := os.Stat(filepath.Dir(tree)); err == nil {
				dirs[filepath.Dir(tree)] = true // where it would appear
			}
		}
	}
	// Where the directory, or the one that it will be in, would appear.
	parent := filepath.Dir(w.dir)
	for parent != filepath.Dir(parent) {
		if _, err := os.Stat(parent); err == nil {
			break
		}
		parent = filepath.Dir(parent)
	}
	dirs[parent] = true
	for _, dir := range slices.Sorted(maps.Keys(dirs)) {
		w.notify.Add(dir) // what cannot be watched, the ticker finds
	}
}

// below adds the directory dir/name and those in it that the trust store may be
// read from.
func below(dir, name string, depth int, dirs map[string]bool) {
	dir = filepath.Join(dir, name)
	entries, err := os.ReadDir(dir)
	if err != nil || depth > trustDepth || len(dirs) > maxTrustFiles {
		return
	}
	dirs[dir] = true
	for _, e := range entries {
		if e.Type().IsRegular() || strings.HasPrefix(e.Name(), "..") {
			continue
		}
		below(dir, e.Name(), depth+1, dirs)
	}
}
