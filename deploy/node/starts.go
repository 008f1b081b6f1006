package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"
)

// A Halt is a reason for which containerd would not come back from a restart, or would
// come back without CRI.
type Halt struct {
	Text string // "containerd would not start: FILE, imported by FILE2, is missing"
	Next string // how to mend it
}

// Halts reads containerd's files as containerd does when it starts (LoadConfig in
// cmd/containerd/server/config of 2.2.9 and 2.4.2), and returns what would stop it. A file
// that Halts cannot judge, such as one above the bound, is no Halt.
//
// `config dump` is no such look: it exits 0 if a file is missing, and leaves out that file
// and everything behind it.
//
// p is the containerd that runs, and e what its program says of the same files; either may
// be nil, and then Halts looks at less.
func (h *Host) Halts(p *Process, e *Effective) []Halt {
	return h.halts(h.Config, p != nil && h.Source == "" && p.Config == h.Config, e)
}

// halts is Halts with another main file. named says that containerd gets its name as an
// argument: otherwise it starts without the file, too.
func (h *Host) halts(config string, named bool, e *Effective) (all []Halt) {
	stop := func(next, format string, a ...any) {
		all = append(all, Halt{"containerd would not start: " + fmt.Sprintf(format, a...), next + ", and do not restart before"})
	}
	if named && !h.Exists(config) {
		stop("put it back", "%s, which it is started with, is missing", config)
	}
	files, _, _ := h.filesOf(config)
	for _, f := range files {
		name := f.Path
		if f.By != "" {
			name += ", imported by " + f.By + ","
		}
		switch link, err := os.Lstat(h.Path(f.Path)); {
		case f.Err == nil || errors.Is(f.Err, fs.ErrPermission) || errors.Is(f.Err, errTooLong):
		case errors.Is(f.Err, fs.ErrNotExist) && err == nil && link.Mode()&fs.ModeSymlink != 0:
			stop("put back what it leads to, or remove the link", "%s is a link that leads nowhere", name)
		case errors.Is(f.Err, fs.ErrNotExist) && strings.ContainsAny(f.Path, "?["):
			stop("take it out of imports, or write a pattern with *", "%s is missing: containerd takes a name without * as it is", name)
		case errors.Is(f.Err, fs.ErrNotExist):
			stop("put it back or take it out of imports", "%s is missing", name)
		default:
			stop("correct it", "%s cannot be read: %v", name, f.Err)
		}
	}
	if e == nil {
		return all
	}
	for _, plugin := range e.plugins {
		if slices.Contains(e.disabled, plugin) {
			stop("take it out of one of the two", "required_plugins requires the plugin %s, and disabled_plugins switches it off", plugin)
		}
	}
	if e.NoCRI {
		return all
	}
	lost := func(next, format string, a ...any) {
		all = append(all, Halt{"containerd would start without CRI: " + fmt.Sprintf(format, a...), next + ", and do not restart before"})
	}
	if e.CertsD != "" && len(e.Mirrors) > 0 {
		lost("write the mirrors as hosts.toml files below "+e.CertsD+", and remove the tables registry.mirrors", "its configuration has registry.mirrors and a config_path, and it takes only one of them")
	}
	if _, there := e.Runtimes[e.Handler]; !there && len(e.Runtimes) > 0 && e.Handler != "" {
		lost("name one that is there", "default_runtime_name is %q, and there is no such runtime", e.Handler)
	}
	for _, key := range slices.Sorted(slices.Values(e.durations)) {
		lost("write one such as 1m, or remove it", "%s is no duration", key)
	}
	return all
}

// CheckStart refuses a restart from which containerd would not come back.
func (h *Host) CheckStart(config string, named bool, e *Effective) error {
	all := h.halts(config, named, e)
	if len(all) == 0 {
		return nil
	}
	texts := make([]string, 0, len(all))
	for _, one := range all[:min(len(all), maxHalts)] {
		texts = append(texts, one.Text)
	}
	if n := len(all) - maxHalts; n > 0 {
		texts = append(texts, fmt.Sprintf("and %d more", n))
	}
	return Refusef(all[0].Next, "%s", strings.Join(texts, "; "))
}

// emptied is what takes the place of a drop-in that a file of containerd's imports by its
// name: containerd would not start without the file.
func emptied(old []byte) []byte {
	head, _ := parseHead("", old)
	return fmt.Appendf(nil, "# tidewaiter uninstall emptied this file. containerd imports it by its name and does not start without it.\nversion = %d\n", max(head.Version, 2))
}

// maxHalts bounds those of one message.
const maxHalts = 5

// errTooLong is of a file that is not read here, and that containerd may well read.
var errTooLong = errors.New("it is longer than what is read here")

// null reports whether info is that of /dev/null, with which a drop-in is masked:
// containerd reads it as an empty file.
func null(info fs.FileInfo) bool {
	s, ok := info.Sys().(*syscall.Stat_t)
	return ok && info.Mode()&fs.ModeCharDevice != 0 && s.Rdev == 1<<8|3
}

// isOurs reports whether a file of containerd's configuration is one that install writes.
func isOurs(name string) bool { return path.Base(name) == DropInFile || path.Base(name) == PauseFile }
