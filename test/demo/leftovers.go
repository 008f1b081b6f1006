//go:build linux

package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// leftovers returns every process, mount, cgroup and socket of the node that was
// in dir, and dir itself where it exists. It looks by other means than those by
// which package node cleans up: for the name of dir, which no other node has.
func leftovers(dir string) ([]string, error) {
	var left []string
	if _, err := os.Lstat(dir); err == nil {
		left = append(left, "directory "+dir)
	}
	name := []byte(filepath.Base(dir))
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	for _, p := range procs {
		// Processes come and go while this looks: what cannot be read has gone.
		cmdline, err := os.ReadFile(filepath.Join(p, "cmdline"))
		if err != nil {
			continue
		}
		cgroup, _ := os.ReadFile(filepath.Join(p, "cgroup"))
		// A dead process that its parent has not waited for has an empty command line.
		if len(cmdline) > 0 && (bytes.Contains(cmdline, name) || bytes.Contains(cgroup, name)) {
			left = append(left, fmt.Sprintf("process %s: %s", filepath.Base(p), bytes.ReplaceAll(cmdline, []byte{0}, []byte{' '})))
		}
	}
	for what, table := range map[string]string{"mount": "/proc/self/mountinfo", "socket": "/proc/net/unix"} {
		b, err := os.ReadFile(table)
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(string(b)) {
			if strings.Contains(line, string(name)) {
				left = append(left, what+" "+strings.TrimSpace(line))
			}
		}
	}
	for _, pattern := range []string{"/sys/fs/cgroup/%s", "/sys/fs/cgroup/*/%s"} {
		dirs, err := filepath.Glob(fmt.Sprintf(pattern, name))
		if err != nil {
			return nil, err
		}
		for _, d := range dirs {
			left = append(left, "cgroup "+d)
		}
	}
	return left, nil
}
