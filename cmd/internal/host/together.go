package host

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
	"regexp"
	"slices"
	"strconv"
	"syscall"
	"time"
)

// ErrBusy is wrapped where somebody else changes the host.
var ErrBusy = errors.New("another install or uninstall is at work on this host")

// lock keeps others from changing the host until release is called or this process
// ends: the kernel drops it then. Its directory is the host's /run, which a pod that has
// the host mounted shares, and which leaves no file behind; where there is none nothing
// runs, and the root itself serves.
func (i *Installation) lock(ctx context.Context) (release func(), err error) {
	if i.Print {
		return func() {}, nil
	}
	dir := i.target("/run")
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		dir = i.Path("/")
	}
	patience := i.Patience
	if patience == 0 {
		patience = time.Minute
	}
	return i.flock(ctx, dir, patience, func(after time.Duration) error {
		return hint("try again when it is done, or end it: fuser -v "+dir, "after %s: %w", after, ErrBusy)
	})
}

// flock takes the lock of a directory, which leaves no file behind and which the kernel
// drops when this process ends. busy is the error of having waited for patience.
func (i *Installation) flock(ctx context.Context, dir string, patience time.Duration, busy func(time.Duration) error) (release func(), err error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("lock the host: %w", err)
	}
	for end := i.Now().Add(patience); ; {
		err := syscall.Flock(int(d.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		switch {
		case err == nil:
			return func() { d.Close() }, nil
		case errors.Is(err, syscall.EINTR):
			continue
		case !errors.Is(err, syscall.EWOULDBLOCK):
			err = fmt.Errorf("lock the host: %w", err)
		case ctx.Err() != nil:
			err = ctx.Err()
		case !i.Now().Before(end):
			err = busy(patience)
		default:
			i.Sleep(ctx, 250*time.Millisecond)
			continue
		}
		d.Close()
		return nil, err
	}
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
func (i *Installation) replaced(changes []Change) error {
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
