package selftest

import (
	"encoding/hex"
	"os"
	"path/filepath"
)

// uid is one of a pod.
func uid(raw []byte) string {
	h := hex.EncodeToString(raw)
	return h[:8] + "-" + h[8:12] + "-4" + h[13:16] + "-8" + h[:3] + "-" + h[4:16]
}

// removeCgroups removes the one that pods of tests are below, if nothing is in it.
func removeCgroups() {
	for _, pattern := range []string{"/sys/fs/cgroup/" + namespace, "/sys/fs/cgroup/*/" + namespace} {
		dirs, _ := filepath.Glob(pattern)
		for _, d := range dirs {
			_ = os.Remove(d)
		}
	}
}
