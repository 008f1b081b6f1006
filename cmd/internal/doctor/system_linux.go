package doctor

import "golang.org/x/sys/unix"

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
