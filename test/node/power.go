package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A Disk is a file system of the node's own that loses in a power cut what was not
// synced: ext4 on a loop device, with what makes it kind to careless programs
// turned off (it would sync a file that is renamed over another, and commit every
// five seconds).
type Disk struct {
	Dir string // where it is mounted

	image string
}

const (
	diskOptions = "loop,noatime,noauto_da_alloc,data=writeback,commit=300"

	// EXT4_IOC_SHUTDOWN and EXT4_GOING_FLAGS_NOLOGFLUSH of fs/ext4/ext4.h: from now
	// on nothing reaches the disk, also not what the journal holds in memory.
	ext4Shutdown = 0x8004587d
	noLogFlush   = 2
)

// NewDisk makes a disk of some MiB and mounts it. It is gone after Stop. It needs
// a loop device, and installs mkfs.ext4 where that is missing.
func (n *Node) NewDisk(ctx context.Context, mib int64) (*Disk, error) {
	dir, err := os.MkdirTemp(n.Dir, "disk-")
	if err != nil {
		return nil, err
	}
	d := &Disk{Dir: dir, image: dir + ".img"}
	f, err := os.OpenFile(d.image, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	err = errors.Join(f.Truncate(mib<<20), f.Close())
	if err == nil {
		err = needMkfs(ctx)
	}
	if err == nil {
		err = run(exec.CommandContext(ctx, "mkfs.ext4", "-q", "-F", "-N", "16384", d.image))
	}
	if err == nil {
		err = d.mount(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("a disk: %w", err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.disks = append(n.disks, d)
	return d, nil
}

// needMkfs makes sure that there is mkfs.ext4.
func needMkfs(ctx context.Context) error {
	if _, err := exec.LookPath("mkfs.ext4"); err == nil {
		return nil
	}
	if err := run(aptGet(ctx, "update")); err != nil {
		return err
	}
	return run(aptGet(ctx, "install", "-y", "--no-install-recommends", "e2fsprogs"))
}

func (d *Disk) mount(ctx context.Context) error {
	// The kernel may not be done with the file system that was there before.
	for end := time.Now().Add(time.Minute); d.attached(); {
		if time.Now().After(end) {
			return fmt.Errorf("%s is still in use", d.image)
		}
		if err := pause(ctx, 5*time.Millisecond); err != nil {
			return err
		}
	}
	return run(exec.CommandContext(ctx, "mount", "-t", "ext4", "-o", diskOptions, d.image, d.Dir))
}

// attached reports whether a loop device has the disk.
func (d *Disk) attached() bool {
	names, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	return slices.ContainsFunc(names, func(name string) bool {
		b, err := os.ReadFile(name)
		return err == nil && strings.TrimSpace(string(b)) == d.image
	})
}

// cut makes the disk forget what was not synced.
func (d *Disk) cut() error {
	f, err := os.Open(d.Dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.IoctlSetPointerInt(int(f.Fd()), ext4Shutdown, noLogFlush)
}

// PowerCut ends everything that runs on the node at once, gates and containers
// included, as when the power goes, and boots it again: disks of NewDisk have lost
// what was not synced, and what is in memory on a real node is gone: what was
// mounted, /run of a machine, on other nodes containerd's state directory, RunDir and
// sockets. The rest of the node's directory is as it was. Nothing runs then: see
// StartContainerd. Registries are not the node's and go on.
func (n *Node) PowerCut(ctx context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.stopped {
		return errors.New("power cut: the node is stopped")
	}
	if err := n.powerCut(ctx); err != nil {
		return fmt.Errorf("power cut: %w", err)
	}
	return nil
}

func (n *Node) powerCut(ctx context.Context) error {
	var err error
	for _, d := range n.disks { // first: what is killed must not have a chance to write
		err = errors.Join(err, d.cut())
	}
	for _, g := range n.gates {
		_ = g.Signal(syscall.SIGKILL)
	}
	if n.containerd != nil {
		_ = n.containerd.cmd.Process.Kill()
	}
	if err != nil {
		return err
	}
	sockets := shimSockets(n.Dir)
	for left := attempts; len(kill(n.Dir)) > 0; left-- {
		if left == 0 {
			return errors.New("processes do not end")
		}
		time.Sleep(20 * time.Millisecond)
	}
	for _, d := range n.daemons {
		<-d.process.done
	}
	for _, g := range n.gates {
		<-g.process.done
		<-g.read
	}
	for _, p := range []*process{n.containerd, n.machine} {
		if p != nil {
			<-p.done
		}
	}
	n.daemons, n.containerd = nil, nil
	for _, top := range cgroups(n.Dir) {
		if err := removeCgroup(top); err != nil {
			return err
		}
	}
	if n.machine != nil { // the rest was gone with its namespace
		for _, d := range n.disks {
			if err := unix.Unmount(d.Dir, 0); err != nil {
				return fmt.Errorf("unmounting %s: %w", d.Dir, err)
			}
		}
		err = n.boot(ctx)
	} else {
		err = n.forget(sockets)
	}
	for _, d := range n.disks {
		if err == nil {
			err = d.mount(ctx)
		}
	}
	return err
}

// forget removes what a node that is no machine has in memory.
func (n *Node) forget(sockets []string) error {
	if err := unmount(n.Dir); err != nil {
		return err
	}
	for _, name := range append(sockets, filepath.Join(n.Dir, "state"), n.RunDir(), n.Socket, n.Socket+".ttrpc", n.NRISocket, filepath.Join(n.Dir, "s")) {
		if err := os.RemoveAll(name); err != nil {
			return err
		}
	}
	return os.Mkdir(filepath.Join(n.Dir, "s"), 0o700)
}

// A Watch sees names appear in directories: files made there or moved there.
type Watch struct {
	fd int
}

// NewWatch watches directories, those below them not.
func NewWatch(dirs ...string) (*Watch, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("inotify: %w", err)
	}
	for _, dir := range dirs {
		if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_CREATE|unix.IN_MOVED_TO); err != nil {
			unix.Close(fd)
			return nil, fmt.Errorf("inotify: %w", &fs.PathError{Op: "watch", Path: dir, Err: err})
		}
	}
	return &Watch{fd}, nil
}

// Next waits until a name appeared that has part in it, or every name with "".
func (w *Watch) Next(ctx context.Context, part string) error {
	b := make([]byte, 4096)
	for {
		n, err := unix.Read(w.fd, b)
		if n > 0 && strings.Contains(string(b[:n]), part) {
			return nil
		}
		if n > 0 || err == unix.EINTR {
			continue
		}
		if err != nil && err != unix.EAGAIN {
			return fmt.Errorf("inotify: %w", err)
		}
		// Some milliseconds would be what is to be hit.
		poll := []unix.PollFd{{Fd: int32(w.fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(poll, 100); err != nil && err != unix.EINTR {
			return fmt.Errorf("inotify: %w", err)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

// Close ends the watch. Nobody may be in Next.
func (w *Watch) Close() error { return unix.Close(w.fd) }
