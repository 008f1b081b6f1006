package node

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A keeper is a process of its own that removes what is left of a node when its
// standard input ends. Stop ends it, and so does the death of the process that
// started the node, however that happens: a panic, os.Exit, ctrl-C, a test's
// timeout, SIGKILL. There is one way to clean up, and every Stop goes it.
//
// It is this same program, started again with an environment variable that the
// init function below sees before main and tests run.
type keeper struct {
	cmd   *exec.Cmd
	stdin io.Closer
	said  bytes.Buffer
}

const keeperVariable = "TIDEWAITER_TEST_KEEPER"

func init() {
	dir := os.Getenv(keeperVariable)
	if dir == "" {
		return
	}
	// Whatever ends the tests must not end the keeper before it is done.
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE, syscall.SIGQUIT)
	io.Copy(io.Discard, os.Stdin)
	if err := remove(dir); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	os.Exit(0)
}

// keep starts a keeper for dir.
func keep(dir string) (*keeper, error) {
	k := &keeper{cmd: exec.Command("/proc/self/exe")}
	k.cmd.Env = append(os.Environ(), keeperVariable+"="+dir)
	k.cmd.Dir = "/"
	k.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	k.cmd.Stdout = &k.said
	stdin, err := k.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	k.stdin = stdin
	if err := k.cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting the process that cleans up: %w", err)
	}
	return k, nil
}

// clean lets the keeper do its work and waits for it.
func (k *keeper) clean() error {
	k.stdin.Close()
	if err := k.cmd.Wait(); err != nil {
		return fmt.Errorf("cleaning up: %w: %s", err, bytes.TrimSpace(k.said.Bytes()))
	}
	return nil
}

// remove ends every process of the node in dir, unmounts what lies below dir and
// deletes it. It finds processes by what only this node's can have: the
// node's cgroup, the paths of its own sockets and configuration as arguments, and
// nodeVariable in the environment.
func remove(dir string) error {
	if base := filepath.Base(dir); !filepath.IsAbs(dir) || !strings.HasPrefix(base, dirPrefix) {
		return fmt.Errorf("%s is not the directory of a node", dir)
	}
	for _, pid := range withArgument([2]string{"serve", filepath.Join(dir, distributionFile)}) {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	var err error
	for range attempts {
		pids := kill(dir)
		if err = unmount(dir); err == nil && len(pids) == 0 {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if err != nil {
		return err
	}
	if pids := kill(dir); len(pids) > 0 {
		return fmt.Errorf("processes %v of %s do not end", pids, dir)
	}
	for _, socket := range shimSockets(dir) {
		if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	for _, top := range cgroups(dir) {
		if err := removeCgroup(top); err != nil {
			return err
		}
	}
	return os.RemoveAll(dir)
}

// kill kills every process of the node in dir that it finds, and returns which. New
// ones can appear until containerd is gone: it is called until it finds none.
func kill(dir string) []int {
	pids := slices.Concat(daemonPIDs(dir), containerPIDs(dir))
	for _, pid := range pids {
		// What ended in the meantime is what we want.
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	return pids
}

// attempts are how often kill is called, 20 ms apart.
const attempts = 3000

// daemonPIDs finds the node's containerd, shims, gates, daemons and runcs at work, dead
// ones that nobody has waited for left out.
func daemonPIDs(dir string) []int {
	return processes(func(args, env []string) bool {
		return slices.Contains(env, nodeVariable+"="+dir) || follow(args,
			[2]string{"--config", filepath.Join(dir, configFile)},            // containerd
			[2]string{"-address", filepath.Join(dir, socketFile)},            // a shim
			[2]string{"--containerd-socket", filepath.Join(dir, socketFile)}, // a gate
			[2]string{"--root", filepath.Join(dir, runcDir, "k8s.io")},
		)
	})
}

// withArgument finds processes that have a pair of arguments.
func withArgument(pair [2]string) []int {
	return processes(func(args, _ []string) bool { return follow(args, pair) })
}

// follow reports whether one of these pairs is in args.
func follow(args []string, pairs ...[2]string) bool {
	for i := 1; i < len(args); i++ {
		if slices.Contains(pairs, [2]string{args[i-1], args[i]}) {
			return true
		}
	}
	return false
}

// processes finds those of which match says so.
func processes(match func(args, env []string) bool) []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		b, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline")) // empty for a zombie
		if err != nil {
			continue
		}
		env, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "environ"))
		if match(strings.Split(string(b), "\x00"), strings.Split(string(env), "\x00")) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// cgroupParent is the cgroup that all pods of the node in dir are under.
func cgroupParent(dir string) string { return "/" + filepath.Base(dir) }

// cgroups returns the node's cgroup in each hierarchy where it exists: many with
// version 1, one with version 2.
func cgroups(dir string) []string {
	var found []string
	for _, m := range mounts() {
		if m.kind != "cgroup" && m.kind != "cgroup2" {
			continue
		}
		path := filepath.Join(m.point, cgroupParent(dir))
		if _, err := os.Stat(path); err == nil {
			found = append(found, path)
		}
	}
	return found
}

// memoryCgroup makes a cgroup that limits memory below the node's, with which it is
// removed, and returns the file that takes processes into it.
func memoryCgroup(dir string, limit int64) (procs string, err error) {
	for _, m := range mounts() {
		file := "memory.limit_in_bytes"
		if m.kind == "cgroup2" {
			file = "memory.max"
			b, _ := os.ReadFile(filepath.Join(m.point, "cgroup.controllers"))
			if !slices.Contains(strings.Fields(string(b)), "memory") {
				continue // a hierarchy of version 1 has it
			}
		} else if m.kind != "cgroup" || !slices.Contains(strings.Split(m.options, ","), "memory") {
			continue
		}
		parent := filepath.Join(m.point, cgroupParent(dir))
		gate := filepath.Join(parent, "gate")
		if err := os.MkdirAll(gate, 0o755); err != nil {
			return "", err
		}
		if m.kind == "cgroup2" {
			for _, d := range []string{m.point, parent} {
				if err := os.WriteFile(filepath.Join(d, "cgroup.subtree_control"), []byte("+memory"), 0); err != nil {
					return "", err
				}
			}
		}
		if err := os.WriteFile(filepath.Join(gate, file), []byte(strconv.FormatInt(limit, 10)), 0); err != nil {
			return "", err
		}
		return filepath.Join(gate, "cgroup.procs"), nil
	}
	return "", errors.New("no cgroups that limit memory")
}

// containerPIDs finds the processes in the node's cgroups.
func containerPIDs(dir string) []int {
	var pids []int
	for _, top := range cgroups(dir) {
		// A cgroup may vanish while it is walked; what is left is found next time.
		_ = filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.IsDir() {
				return nil
			}
			b, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
			if err != nil {
				return nil
			}
			for _, f := range strings.Fields(string(b)) {
				if pid, err := strconv.Atoi(f); err == nil && pid > 0 && !slices.Contains(pids, pid) {
					pids = append(pids, pid)
				}
			}
			return nil
		})
	}
	return pids
}

// removeCgroup removes a cgroup and those below it, the innermost first.
func removeCgroup(top string) error {
	var dirs []string
	_ = filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	slices.Reverse(dirs)
	for _, d := range dirs {
		var err error
		for range 2000 {
			// A cgroup stays busy for a moment after its last process.
			if err = unix.Rmdir(d); err == nil || errors.Is(err, unix.ENOENT) {
				err = nil
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		if err != nil {
			return fmt.Errorf("removing cgroup %s: %w", d, err)
		}
	}
	return nil
}

// shimSockets returns the sockets of shims that did not remove them themselves.
// containerd before 2.4 keeps them in a directory of the host, under a name that
// is the hash of containerd's socket, the namespace and the sandbox.
func shimSockets(dir string) []string {
	var found []string
	tasks, _ := filepath.Glob(filepath.Join(dir, "state", "io.containerd.runtime.v2.task", "*", "*"))
	for _, task := range tasks {
		ns := filepath.Base(filepath.Dir(task))
		path := filepath.Join(dir, socketFile, ns, filepath.Base(task))
		found = append(found, fmt.Sprintf("/run/containerd/s/%x", sha256.Sum256([]byte(path))))
	}
	return found
}

type mount struct{ point, kind, options string } // options of the file system

// mounts returns what this process sees mounted, in the order of mounting.
func mounts() []mount {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	var all []mount
	for line := range strings.Lines(string(b)) {
		// 36 35 98:0 /root /point options - kind source options
		fields := strings.Fields(line)
		dash := slices.Index(fields, "-")
		if len(fields) < 5 || dash < 0 || dash+1 >= len(fields) {
			continue
		}
		all = append(all, mount{unescape.Replace(fields[4]), fields[dash+1], fields[len(fields)-1]})
	}
	return all
}

// unmount unmounts everything below dir, the newest first.
func unmount(dir string) error {
	all := mounts()
	slices.Reverse(all)
	for _, m := range all {
		if !strings.HasPrefix(m.point, dir+"/") {
			continue
		}
		if err := unix.Unmount(m.point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("unmounting %s: %w", m.point, err)
		}
	}
	return nil
}
