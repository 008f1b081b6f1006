package node

import (
	"maps"
	"slices"
	"strconv"
	"strings"
)

// OtherPlugins are plugins of others that containerd requires. A later file's list replaces an
// earlier one's, so that the gate's has to name them, too, for as long as the files that
// they are from do.
type OtherPlugins struct {
	names    []string          // in the order in which they are written
	Owners   map[string]string // the place that requires each of them besides our list
	Returned []string          // that our list gives back: the place that required them does not any more
	Orphans  []string          // that our list alone requires, without a record of their owner
}

// Others finds out which there are: before is what containerd's own program says with our
// files in it, and whose what the record has of plugins that our list took over. A list
// that did not count, since the validator was off, must not begin to: the plugins in it
// may be long gone.
func (h *Host) Others(before *Effective, whose map[string]string) (o OtherPlugins) {
	elsewhere, ours, known := h.requiredElsewhere()
	o.Owners = elsewhere
	if before.Validates {
		for _, name := range before.Required {
			_, is := elsewhere[name]
			_, was := whose[name]
			switch {
			case name == GateName:
				continue
			case is || !known || !ours:
			case was:
				o.Returned = append(o.Returned, name)
				continue
			default:
				o.Orphans = append(o.Orphans, name)
			}
			o.names = append(o.names, name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(elsewhere)) {
		if name != GateName && !slices.Contains(o.names, name) {
			o.names = append(o.names, name)
		}
	}
	return o
}

// List is the whole list as TOML writes it, the gate last.
func (o OtherPlugins) List() string {
	var all []string
	for _, name := range append(slices.Clone(o.names), GateName) {
		all = append(all, strconv.Quote(name))
	}
	return "[" + strings.Join(all, ", ") + "]"
}

// requiredElsewhere is what containerd would require without the files and lines of
// install, and where each is said. ours says that one of these requires something. What
// cannot be read makes nothing known.
func (h *Host) requiredElsewhere() (all map[string]string, ours, known bool) {
	files, _, err := h.Files()
	if err != nil {
		return nil, false, false
	}
	all = map[string]string{}
	enabled := false
	validator := []string{"plugins", "io.containerd.nri.v1.nri", "default_validator"}
	for _, f := range files {
		if f.Err != nil {
			return nil, false, false
		}
		for _, s := range f.Settings {
			if len(s.Key) != 4 || !slices.Equal(s.Key[:3], validator) {
				continue
			}
			switch key := s.Key[3]; {
			case s.Ours:
				ours = ours || key == "required_plugins"
			case key == "enable":
				enabled = slices.Equal(s.Values, []string{"true"})
			case key == "required_plugins":
				clear(all) // of an earlier file
				for _, name := range s.Values {
					all[name] = s.At()
				}
			}
		}
	}
	if !enabled {
		clear(all)
	}
	return all, ours, true
}
