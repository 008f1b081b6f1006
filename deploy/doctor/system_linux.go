package doctor

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Bounds of what is looked at of a configuration, which has a file for each
// certificate at most.
const (
	maxLoose = 2000 // files and directories
	maxDepth = 8    // directories in each other
)

// loose is what of a directory of configuration somebody besides root may change: it is
// another's, or its group or everybody may write to it. A mount that is read-only, as in
// a pod, nobody can write to.
func loose(dir string) (found []string) {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil || fs.Flags&unix.ST_RDONLY != 0 {
		return nil
	}
	left := maxLoose
	var look func(name string, depth int)
	look = func(name string, depth int) {
		var s unix.Stat_t
		if left--; left < 0 || unix.Stat(name, &s) != nil {
			return // what cannot be read is said elsewhere
		}
		switch {
		case s.Uid != 0:
			found = append(found, fmt.Sprintf("%s belongs to uid %d", name, s.Uid))
		case s.Mode&0o022 != 0:
			found = append(found, fmt.Sprintf("%s (%04o) can be written to by others than its owner", name, s.Mode&0o7777))
		}
		if s.Mode&unix.S_IFMT != unix.S_IFDIR || depth == maxDepth {
			return
		}
		d, err := os.Open(name)
		if err != nil {
			return
		}
		defer d.Close()
		names, _ := d.Readdirnames(maxLoose)
		for _, n := range names {
			look(filepath.Join(name, n), depth+1)
		}
	}
	look(dir, 0)
	return found
}

// synchronised is what the kernel knows of its clock (adjtimex(2), which changes
// nothing with no mode): whether something like NTP keeps it right.
func synchronised() *bool {
	state, err := unix.Adjtimex(&unix.Timex{})
	if err != nil {
		return nil
	}
	return new(state != unix.TIME_ERROR)
}

// space looks at a directory without writing to it. One that is not there yet is
// looked at where it would be made.
func space(dir string) *Space {
	var s unix.Statfs_t
	err := unix.Statfs(dir, &s)
	if err == unix.ENOENT {
		return nil // the gate makes it, and says if it cannot
	}
	if err == nil {
		err = unix.Access(dir, unix.W_OK)
	}
	if err != nil {
		return &Space{Err: err}
	}
	return &Space{Free: s.Bavail * uint64(s.Bsize), Size: s.Blocks * uint64(s.Bsize)}
}
