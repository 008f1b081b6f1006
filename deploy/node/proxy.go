package node

import (
	"bytes"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// A Proxy is where a proxy is set. Its value may hold a password and is not kept.
type Proxy struct {
	Of        string   // "containerd (process 12)"
	Variables []string // "HTTPS_PROXY"
}

// proxyVariable is an assignment, in an environment, a file of systemd or one of a shell.
var proxyVariable = regexp.MustCompile(`(?i)(?:^|[\s"'=])((?:https?|all)_proxy)=["']?[^\s"']`)

// Proxies are those that the environments of containerd and of the gate name (pid 0: it is
// not known), and if containerd's cannot be seen, the files of its service.
func (h *Host) Proxies(containerd, gate int) (all []Proxy) {
	add := func(of string, raw []byte) bool {
		p := Proxy{Of: of}
		for line := range bytes.Lines(raw) {
			if line = bytes.TrimSpace(line); len(line) == 0 || line[0] == '#' || line[0] == ';' {
				continue
			}
			for _, m := range proxyVariable.FindAllSubmatch(line, -1) {
				p.Variables = append(p.Variables, string(m[1]))
			}
		}
		slices.Sort(p.Variables)
		if p.Variables = slices.Compact(p.Variables); len(p.Variables) > 0 {
			all = append(all, p)
		}
		return len(p.Variables) > 0
	}
	environ := func(of string, pid int) bool {
		if pid <= 0 {
			return false
		}
		raw, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "environ"))
		add(of+" (process "+strconv.Itoa(pid)+")", bytes.ReplaceAll(raw, []byte{0}, []byte{'\n'}))
		return err == nil
	}
	environ("the gate", gate)
	if environ("containerd", containerd) {
		return all
	}
	for _, service := range h.Services {
		unit := "/etc/systemd/system/" + service + ".service"
		files := []string{unit, unit + ".env", "/etc/default/" + service, "/etc/conf.d/" + service}
		names, _ := os.ReadDir(h.Path(unit + ".d"))
		for _, n := range names[:min(len(names), maxImported)] {
			if strings.HasSuffix(n.Name(), ".conf") {
				files = append(files, path.Join(unit+".d", n.Name()))
			}
		}
		for _, file := range files {
			if raw, err := h.Read(file); err == nil {
				add("containerd by "+file, raw)
			}
		}
	}
	return all
}
