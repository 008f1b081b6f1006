package node

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// A Clock is the wall clock of a gate that [BuildJumping] built. It runs as the
// machine's does, off by what Jump says. Like a real clock that is set, it moves
// what time.Now calls the wall clock and leaves the monotonic one alone, so that
// timers go on.
type Clock struct{ file *os.File }

// clockVariable names the file whose first eight bytes are the clock's offset in
// seconds, in the machine's byte order.
const clockVariable = "TIDEWAITER_TEST_CLOCK"

// NewClock makes a clock that is right. path is its file, which is made.
func NewClock(path string) (*Clock, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	c := &Clock{f}
	return c, c.Jump(0)
}

// Env is for GateOptions.Env.
func (c *Clock) Env() string { return clockVariable + "=" + c.file.Name() }

// Jump sets the clock to the machine's time plus by, in whole seconds, at once.
func (c *Clock) Jump(by time.Duration) error {
	_, err := c.file.WriteAt(binary.NativeEndian.AppendUint64(nil, uint64(by/time.Second)), 0)
	return err
}

// Close ends the clock; gates that have it keep the offset.
func (c *Clock) Close() error { return c.file.Close() }

// What BuildJumping puts into Go's package time: its Now, the one place where Go
// reads the wall clock for a program, adds the offset.
const (
	timeNow    = "	sec, nsec, mono := runtimeNow()\n	if mono == 0 {\n"
	timeJump   = "	sec, nsec, mono := runtimeNow()\n	sec += *jump\n	if mono == 0 {\n"
	timeOffset = `package time

import (
	"syscall"
	"unsafe"
)

var jump = func() *int64 {
	path, ok := syscall.Getenv("` + clockVariable + `")
	if !ok {
		return new(int64)
	}
	fd, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		panic("` + clockVariable + `: " + err.Error())
	}
	b, err := syscall.Mmap(fd, 0, 8, syscall.PROT_READ, syscall.MAP_SHARED)
	if err != nil {
		panic("` + clockVariable + `: " + err.Error())
	}
	syscall.Close(fd)
	return (*int64)(unsafe.Pointer(&b[0]))
}()
`
)

// BuildJumping builds the program under test, as BuildTidewaiter does, on a
// standard library whose wall clock a [Clock] moves. Nothing of the program is
// changed, and every library in it sees the clock that it does. All packages are
// compiled for it, for which Go needs a minute the first time.
func BuildJumping(ctx context.Context) (string, error) {
	goroot, err := goEnv(ctx, "GOROOT")
	if err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp("", "tidewaiter-build-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	now := filepath.Join(goroot, "src", "time", "time.go")
	source, err := os.ReadFile(now)
	if err != nil {
		return "", err
	}
	if bytes.Count(source, []byte(timeNow)) != 1 {
		return "", errors.New(now + ": Now does not read the clock in the way that this package knows")
	}
	replace := map[string]string{}
	for path, content := range map[string][]byte{
		now: bytes.Replace(source, []byte(timeNow), []byte(timeJump), 1),
		filepath.Join(goroot, "src", "time", "tidewaiter_jump.go"): []byte(timeOffset),
	} {
		replace[path] = filepath.Join(dir, filepath.Base(path))
		if err := os.WriteFile(replace[path], content, 0o644); err != nil {
			return "", err
		}
	}
	b, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return "", err
	}
	overlay := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(overlay, b, 0o644); err != nil {
		return "", err
	}
	bin, err := buildTidewaiter(ctx, "tidewaiter-jumping-", "-overlay", overlay)
	if err != nil {
		return "", fmt.Errorf("on a clock that jumps: %w", err)
	}
	return bin, nil
}
