package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/tidewaiter/tidewaiter/deploy"
)

// Names of the files that make containerd require the gate, and name the pause image
// by digest. They are the last that are imported, as far as names go.
const (
	DropInFile = "99-tidewaiter.toml"
	PauseFile  = "99-tidewaiter-pause.toml"
)

// checkFile is written beside a generated configuration for as long as containerd's
// program reads it.
const checkFile = ".tidewaiter-check.toml"

// olderTemplate is where k3s and RKE2 have the template of a configuration of version 2.
const olderTemplate = "config.toml.tmpl"

// A Requirement is what makes containerd require the gate.
type Requirement struct {
	Changes   []Change
	candidate []byte // what Config will be after the restart, where that is generated; nil: what it is
	pause     string // named by digest in the end; empty: as it was
	Pinned    bool   // by one of the changes, or before
	before    *Effective
	Others    OtherPlugins
}

// Require finds out what is to be changed. before is the configuration as it is, pause
// that name of its pause image which has a digest (empty: there is none), and whose the
// record of whose requirements our list took over.
func (h *Host) Require(before *Effective, pause string, whose map[string]string) (*Requirement, error) {
	raw, err := h.Read(h.Config)
	if err != nil {
		return nil, err
	}
	own := strip(raw)
	c, err := parseHead(h.Config, own)
	if err != nil {
		return nil, err
	}
	source := h.Config
	if h.Source != "" {
		source = h.Source
	}
	// The templates of k3s and RKE2 are another file in the older form, and creating the
	// newer one would hide it.
	if h.Extends && c.Version == 2 {
		source = path.Join(path.Dir(h.Source), olderTemplate)
	}
	r := &Requirement{pause: pause, before: before, Others: h.Others(before, whose)}
	dir := h.imported(c, DropInFile)
	const why = "containerd reads the files that are put there"
	imports := fmt.Sprintf("imports = [%q] # %s\n", path.Join(h.DropIns, "*.toml"), Marker)
	var edited []byte // nil: source stays, or becomes, as it was without us
	switch {
	case dir != "":
		// MicroK8s and k3s show in Config only what Source was at the last start.
	case len(c.Imports) > 0:
		return nil, Refusef(fmt.Sprintf("add %q to imports in %s", path.Join(h.DropIns, "*.toml"), source),
			"%s imports %s, which is no directory for a file of ours", h.Config, strings.Join(c.Imports, ", "))
	case raw == nil && h.Source != "":
		return nil, Refusef("start "+h.Name+" once, or name its configuration with --containerd-config", "%s has not started here yet: there is no %s", h.Name, h.Config)
	case len(own) == 0 && h.Source == "": // containerd runs with what it has built in
		edited = fmt.Appendf(nil, "version = 3 # %s\n%s", Marker, imports)
		dir = h.DropIns
	case h.Extends:
		tables := h.tables(r.Others)
		template, err := h.Read(source)
		if err != nil {
			return nil, err
		}
		if template = strip(template); len(template) == 0 {
			template = []byte("{{ template \"base\" . }} {{/* " + Marker + " */}}\n")
		}
		edited = slices.Concat(line(template), tables)
		r.candidate = slices.Concat(line(own), tables)
	default:
		text, err := h.Read(source)
		if err != nil {
			return nil, err
		}
		edited = slices.Concat([]byte(imports), strip(text))
		if h.Source != "" {
			r.candidate = slices.Concat([]byte(imports), own)
		}
		dir = h.DropIns
	}
	if edited != nil {
		if r.Changes, err = h.Change(source, 0o644, edited, why); err != nil {
			return nil, err
		}
	}
	if dir == "" { // the template has the tables
		r.pause, r.Pinned = "", strings.Contains(before.Pause, "@")
		return r, nil
	}
	text := strings.Replace(deploy.DropIn, `required_plugins = ["tidewaiter"]`, "required_plugins = "+r.Others.List(), 1)
	pinning := strings.ReplaceAll(deploy.Pause, "$PAUSE", pause)
	if c.Version == 2 {
		// containerd 2.2 reads a file of version 2 as one of version 3, and so without its
		// CRI, if another of version 3 is merged into it. MicroK8s has version 2.
		text = strings.Replace(text, "version = 3", "version = 2", 1)
		pinning = strings.NewReplacer("version = 3", "version = 2", `"io.containerd.cri.v1.images".pinned_images]`, `"io.containerd.grpc.v1.cri"]`, "  sandbox =", "  sandbox_image =").Replace(pinning)
	}
	more, err := h.Change(path.Join(dir, DropInFile), 0o644, []byte(text), "containerd refuses containers while the gate is away")
	if err != nil {
		return nil, err
	}
	r.Changes = append(r.Changes, more...)
	r.Pinned = strings.Contains(before.Pause, "@")
	if pause != "" && !r.Pinned {
		more, err := h.Change(path.Join(dir, PauseFile), 0o644, []byte(pinning), "the pause image is named by digest")
		if err != nil {
			return nil, err
		}
		r.Changes, r.Pinned = append(r.Changes, more...), true
	} else {
		r.pause = ""
	}
	return r, nil
}

// tables is the drop-in for the end of a template that imports nothing.
func (h *Host) tables(o OtherPlugins) []byte {
	var b bytes.Buffer
	for _, l := range []string{
		`[plugins."io.containerd.nri.v1.nri".default_validator]`, `  enable = true`, `  required_plugins = ` + o.List(),
	} {
		fmt.Fprintf(&b, "%s # %s\n", l, Marker)
	}
	return b.Bytes()
}

// line is raw with a line's end.
func line(raw []byte) []byte {
	if len(raw) > 0 && raw[len(raw)-1] != '\n' {
		return append(slices.Clone(raw), '\n')
	}
	return raw
}

// CheckRequirement has containerd's program read the configuration as it will be, and says what
// is wrong with it. The changes are made.
func (h *Host) CheckRequirement(ctx context.Context, r *Requirement) error {
	config := h.Config
	if r.candidate != nil {
		config = path.Join(path.Dir(h.Config), checkFile)
		if err := os.WriteFile(h.Path(config), r.candidate, 0o600); err != nil {
			return err
		}
		defer os.Remove(h.Path(config))
	}
	e, err := h.EffectiveFrom(ctx, config)
	switch {
	case err != nil:
		return fmt.Errorf("containerd does not accept its new configuration: %w", err)
	case !e.Knows:
		return Refusef("containerd 2.2 or later is needed", "this containerd cannot require a plugin")
	case e.ConnectionsDisabled:
		return Refusef("remove disable_connections = true of the plugin io.containerd.nri.v1.nri", "containerd takes no connections of plugins")
	case !e.Requires(GateName):
		return Refusef("look for a later file that sets default_validator: containerd --config "+h.Config+" config dump",
			"containerd would not require the gate with its new configuration: another file overrides ours")
	case e.differs(r.before) != "":
		return Refusef("compare containerd --config "+h.Config+" config dump with and without "+DropInFile,
			"with the new files containerd's configuration would be another one in %s, too", e.differs(r.before))
	case r.pause != "" && e.Pause != r.pause:
		return Refusef("look for a later file that sets pinned_images", "containerd would use the pause image %s: another file overrides ours", e.Pause)
	}
	return h.CheckStart(config, false, e)
}

// Open returns what takes everything out of containerd's configuration that install
// put there, of whatever distribution, so that it does not depend on what is
// recognised or answers. extra are directories of drop-ins that the table does not
// have, and configs files.
func (h *Host) Open(extra, configs []string) ([]Change, error) {
	var all []Change
	var failed error
	const why = "containerd does without the gate"
	seen, byName := map[string]bool{}, map[string]bool{}
	for _, l := range append(Distros(), h.Distro) {
		files, _, _ := h.filesOf(l.Config)
		for _, f := range files {
			byName[f.Path] = byName[f.Path] || f.Plain
		}
	}
	for _, l := range append(Distros(), h.Distro) {
		older := ""
		if l.Extends {
			older = path.Join(path.Dir(l.Source), olderTemplate)
			extra = append(extra, path.Join(path.Dir(l.Source), "config.toml.d"))
		}
		for _, dir := range append([]string{l.DropIns}, extra...) {
			for _, name := range []string{DropInFile, PauseFile} {
				file := path.Join(dir, name)
				if dir == "" || seen[file] {
					continue
				}
				seen[file] = true
				c, err := h.Change(file, 0, nil, why)
				if len(c) > 0 && byName[file] {
					c, err = h.Change(file, 0o644, emptied(c[0].Old), why)
				}
				all, failed = append(all, c...), errors.Join(failed, err)
			}
		}
		for _, file := range append([]string{l.Config, l.Source, older}, configs...) {
			if file == "" || seen[file] {
				continue
			}
			seen[file] = true
			raw, err := h.Read(file)
			if err != nil {
				failed = errors.Join(failed, err)
				continue
			}
			left := strip(raw)
			if bytes.Equal(left, raw) {
				continue
			}
			if len(left) == 0 {
				left = nil
			}
			mode := os.FileMode(0o644)
			if i, err := os.Stat(h.Path(file)); err == nil {
				mode = i.Mode().Perm()
			}
			c, err := h.Change(file, mode, left, why)
			all, failed = append(all, c...), errors.Join(failed, err)
		}
	}
	return all, failed
}
