package install

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/node"
	"github.com/tidewaiter/tidewaiter/verify/durable"
)

// ErrBusy is wrapped where somebody else changes the host.
var ErrBusy = errors.New("another install or uninstall is at work on this host")

// Directories that are locked, on the host's /run, which a pod that has the host mounted
// shares. Only root can open them: whatever anybody can open anybody can lock, for ever.
const (
	lockHost  = "tidewaiter-install.lock" // by a process that changes the host
	lockWatch = "tidewaiter-watch.lock"   // by the one that watches
)

// lock keeps others from changing the host until release is called or this process ends.
func (i *Installation) lock(ctx context.Context) (release func(), err error) {
	if i.DryRun {
		return func() {}, nil
	}
	patience := i.Patience
	if patience == 0 {
		patience = time.Minute
	}
	return i.flock(ctx, lockHost, patience, func(after time.Duration, dir string) error {
		return node.Hintf("try again when it is done, or end it: fuser -v "+dir, "after %s: %w", after, ErrBusy)
	})
}

// flock takes the lock of a directory of the name in the host's /run, and where there is
// none, and so nothing runs, in its root. It is made for that, for its owner alone, and
// goes with the lock; the kernel drops the lock when this process ends. busy is the error
// of having waited for patience.
func (i *Installation) flock(ctx context.Context, name string, patience time.Duration, busy func(after time.Duration, dir string) error) (release func(), err error) {
	dir := filepath.Join(i.Target("/run"), name)
	if _, err := os.Stat(filepath.Dir(dir)); errors.Is(err, fs.ErrNotExist) {
		dir = filepath.Join(i.Path("/"), name)
	}
	for end := i.Now().Add(patience); ; {
		release, err := tryLock(dir)
		switch {
		case err == nil:
			return release, nil
		case !errors.Is(err, durable.ErrLocked):
			return nil, fmt.Errorf("lock the host: %w", err)
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case !i.Now().Before(end):
			return nil, busy(patience, dir)
		}
		i.Sleep(ctx, 250*time.Millisecond)
	}
}

// tryLock makes a directory and locks it. The error is durable.ErrLocked if another
// has it, or had it a moment ago.
func tryLock(dir string) (release func(), err error) {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	d, err := os.OpenFile(dir, os.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, durable.ErrLocked
	}
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			d.Close()
		}
	}()
	info, err := d.Stat()
	if err != nil {
		return nil, err
	}
	if s, ok := info.Sys().(*syscall.Stat_t); !ok || int(s.Uid) != os.Geteuid() || info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s is not a directory of this user alone: remove it", dir)
	}
	if err := durable.TryLock(d); err != nil {
		return nil, err
	}
	// The process that had it before removed the directory, and perhaps another one is there by now.
	if now, err := os.Lstat(dir); err != nil || !os.SameFile(info, now) {
		return nil, durable.ErrLocked
	}
	return sync.OnceFunc(func() {
		os.Remove(dir)
		d.Close()
	}), nil
}

// newer reports whether Self is to take the place of old, which is the program on the
// host. Where versions cannot be compared it is unless it was there before and another
// took its place: so each of two pods gets its turn once, and neither flips back.
func (i *Installation) newer(ctx context.Context, old []byte) bool {
	if now, ok := parseVersion(i.Release); ok {
		if was, ok := i.versionOf(ctx, i.Program); ok {
			return slices.Compare(now, was) > 0
		}
	}
	return !slices.Contains(i.remembered().Replaced, sum(i.Self))
}

// versionOf asks a program of the host for its version.
func (i *Installation) versionOf(ctx context.Context, program string) ([]int, bool) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	out, err := i.Run(ctx, program, "version", "--output", "json")
	if err != nil {
		return nil, false
	}
	var said struct{ Version string }
	if err := json.Unmarshal([]byte(out), &said); err != nil {
		return nil, false
	}
	return parseVersion(said.Version)
}

// described is a version as `git describe --tags` has it: v1.2.3, v1.2.3-rc.4, and with
// commits since then v1.2.3-5-gabcdef.
var described = regexp.MustCompile(`^v?(\d{1,8})\.(\d{1,8})\.(\d{1,8})(?:-rc\.?(\d{1,8}))?(?:-(\d{1,8})-g[0-9a-f]{4,64})?$`)

// parseVersion makes a version comparable. One with changes that are in no commit, or
// of a build without tags, is not.
func parseVersion(s string) ([]int, bool) {
	m := described.FindStringSubmatch(s)
	if m == nil {
		return nil, false
	}
	var v []int
	for k, part := range m[1:] {
		n, _ := strconv.Atoi(part) // 8 digits at most; none is 0
		if k == 3 && part == "" {
			n = math.MaxInt // after every candidate
		}
		v = append(v, n)
	}
	return v, true
}

// replaced remembers which program others took the place of.
func (i *Installation) replaced(changes []node.Change) error {
	const most = 32
	for _, c := range changes {
		if c.Path != i.Program || c.Old == nil || c.New == nil || bytes.Equal(c.Old, c.New) {
			continue
		}
		r := i.remembered()
		old := sum(c.Old)
		r.Replaced = slices.DeleteFunc(r.Replaced, func(d string) bool { return d == old || d == sum(c.New) })
		r.Replaced = append(r.Replaced, old)
		r.Replaced = r.Replaced[max(0, len(r.Replaced)-most):]
		return i.remember(r)
	}
	return nil
}

func sum(raw []byte) string {
	s := sha256.Sum256(raw)
	return hex.EncodeToString(s[:])
}
