package install

import (
	"bytes"
	"fmt"
	"os"
	"strings"

	"github.com/tidewaiter/tidewaiter/deploy/node"
)

// header begins files that are ours to change.
const header = "# Written by tidewaiter install"

// service are the changes for the program and its service.
func (r *facts) service() ([]node.Change, error) {
	i := r.Installation
	var all []node.Change
	add := func(name string, mode os.FileMode, now []byte, why string) error {
		c, err := i.Own(name, mode, now, why)
		all = append(all, c...)
		return err
	}
	if r.old != nil && !bytes.Equal(r.old, r.self) {
		if err := add(i.Program+".previous", 0o755, r.old, "the program as it was, for the way back"); err != nil {
			return nil, err
		}
	}
	if err := add(i.Program, 0o755, r.self, "the program"); err != nil {
		return nil, err
	}
	file, content, mode := i.Manager.File()
	if file == "" || r.keep && i.Exists(file) { // the service belongs to the program
		return all, nil
	}
	if i.Program != node.GateBinary {
		content = strings.ReplaceAll(content, node.GateBinary, i.Program)
	}
	if i.Manager.Name == "systemd" {
		content = i.writable(content)
	}
	if err := i.ours(&all, file, mode, content, "`tidewaiter install` writes this file", "the service, which is started again whenever it ends"); err != nil {
		return nil, err
	}
	if vars := i.variables(r.before); vars != "" {
		if err := i.ours(&all, node.Defaults, 0o644, header+".\n"+vars, header, "where the sockets and directories of this node are"); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// ours adds a file that is changed only if it bears sign: otherwise it is an operator's.
func (i *Installation) ours(all *[]node.Change, file string, mode os.FileMode, content, sign, why string) error {
	c, err := i.Own(file, mode, []byte(content), why)
	if err != nil {
		return err
	}
	if len(c) > 0 && c[0].Old != nil && !bytes.Contains(c[0].Old, []byte(sign)) {
		i.Say("warn", "%s is not ours and stays as it is; it should say:\n%s", file, content)
		return nil
	}
	*all = append(*all, c...)
	return nil
}

// writable is the unit with the directories that the gate has here, and no others, to
// write to. One that is not there, such as on a disk that is not, stops nothing.
func (i *Installation) writable(unit string) string {
	if name, below := strings.CutPrefix(i.RunDir, "/run/"); below {
		unit = strings.Replace(unit, "RuntimeDirectory=tidewaiter\n", "RuntimeDirectory="+name+"\n", 1)
	} else { // install makes it
		unit = strings.Replace(unit, "StateDirectory=", "ReadWritePaths=-"+i.RunDir+"\nStateDirectory=", 1)
	}
	if i.StateDir != "/var/lib/tidewaiter" { // install makes it, for its record
		unit = strings.Replace(unit, "StateDirectory=tidewaiter\nStateDirectoryMode=0700\n", "ReadWritePaths=-"+i.StateDir+"\n", 1)
	}
	return unit
}

// variables are those that the gate needs where something is not in its usual place.
func (i *Installation) variables(before *node.Effective) string {
	socket, nri := i.Sockets(before)
	var b strings.Builder
	for _, v := range [][3]string{
		{"TIDEWAITER_CONTAINERD_SOCKET", socket, "/run/containerd/containerd.sock"},
		{"TIDEWAITER_NRI_SOCKET", nri, "/var/run/nri/nri.sock"},
		{"TIDEWAITER_CONFIG_DIR", i.ConfigDir, "/etc/tidewaiter"},
		{"TIDEWAITER_STATE_DIR", i.StateDir, "/var/lib/tidewaiter"},
		{"TIDEWAITER_RUN_DIR", i.RunDir, "/run/tidewaiter"},
	} {
		if v[1] != v[2] {
			fmt.Fprintf(&b, "%s=%s\n", v[0], v[1])
		}
	}
	return b.String()
}
