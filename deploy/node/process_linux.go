package node

import (
	"fmt"
	"io/fs"
	"net"
	"os"
	"syscall"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/control"
)

// listener is the process at the other end of c; 0: one that has no number here.
func listener(c *net.UnixConn) (pid int, err error) {
	uid, pid, err := control.Peer(c)
	if err != nil {
		return 0, err
	}
	// Its program is run, and it is stopped and continued: it must belong to a user who may
	// do as much.
	if pid != 0 && uid != 0 && uid != os.Geteuid() {
		return 0, fmt.Errorf("the process that listens is that of user %d", uid)
	}
	return pid, nil
}

// changed is when a file became what it is, also by being moved there.
func changed(info fs.FileInfo) time.Time {
	t := info.ModTime()
	if s, ok := info.Sys().(*syscall.Stat_t); ok {
		if c := time.Unix(s.Ctim.Unix()); c.After(t) {
			t = c
		}
	}
	return t
}
