package doctor

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/tidewaiter/tidewaiter/deploy/node"
)

// required is whether containerd refuses containers while the gate is away.
func (x *examination) required() {
	e := x.Effective
	const check = "required"
	var asks, stray []node.Setting
	for _, s := range x.settings() {
		list := len(s.Key) > 0 && s.Key[len(s.Key)-1] == "required_plugins" && slices.ContainsFunc(s.Values, ours)
		named := slices.ContainsFunc(s.Key, func(k string) bool { return strings.Contains(k, "default_validator") })
		switch {
		case len(s.Key) == len(validator)+1 && slices.Equal(s.Key[:len(validator)], validator):
			if list {
				asks = append(asks, s)
			}
		case list || named:
			if !slices.ContainsFunc(stray, func(o node.Setting) bool {
				return o.File == s.File && slices.Equal(o.Key[:len(o.Key)-1], s.Key[:len(s.Key)-1])
			}) {
				stray = append(stray, s)
			}
		}
	}
	place := `[plugins."io.containerd.nri.v1.nri".default_validator]`
	misplaced := func(s node.Setting) string {
		return fmt.Sprintf("%s sets %s in the table %s, which containerd does not look at", s.At(), s.Key[len(s.Key)-1], tableName(s.Key[:len(s.Key)-1]))
	}
	last, enable := x.last(validator, "required_plugins"), x.last(validator, "enable")
	requires := e.Requires(plugin) || e.Requires(index+"-"+plugin)
	switch {
	case requires && last == nil:
		x.ok(check, "containerd refuses containers while the gate is away")
	case requires && len(x.also(last)) > 0:
		x.ok(check, "containerd refuses containers while the gate is away: %s, which wins over %s", last.At(), strings.Join(x.also(last), ", "))
	case requires:
		x.ok(check, "containerd refuses containers while the gate is away: %s", last.At())
	case !e.Knows && !e.NRIDisabled:
		x.strict(Fail, check, "upgrade containerd to 2.2 or later, or audit", "this containerd cannot require a plugin: without the gate, containers start unasked")
	case len(asks) > 0 && last != nil && !slices.ContainsFunc(last.Values, ours):
		x.strict(Fail, check, "correct "+last.File+", then "+x.Restart, "containerd does not require the gate: %s does, and %s, which is read later, says %q instead", asks[len(asks)-1].At(), last.At(), last.Values)
	case len(asks) > 0 && enable != nil && !slices.Equal(enable.Values, []string{"true"}):
		x.strict(Fail, check, "correct "+enable.File+", then "+x.Restart, "containerd does not require the gate: %s does, and %s, which is read later, switches the validator off", asks[len(asks)-1].At(), enable.At())
	case len(asks) > 0 && e.NRIDisabled:
		x.strict(Fail, check, "switch NRI on", "containerd does not require the gate: %s does, and NRI is switched off", last.At())
	case len(asks) > 0 && enable == nil:
		x.strict(Fail, check, "add enable = true below "+place+" in "+last.File+", then "+x.Restart, "containerd does not require the gate: %s does, and the validator is not enabled", last.At())
	case len(stray) > 0:
		x.strict(Fail, check, "move it to "+place+", then "+x.Restart, "containerd does not require the gate: %s", misplaced(stray[0]))
		return
	case x.NotImported != "":
		x.strict(Fail, check, x.Enforces+"; or by hand: "+x.imports()+", then "+x.Restart, "containerd does not require the gate: %s is there, and no file imports it, whatever config dump shows as imports", x.NotImported)
	default:
		x.strict(Fail, check, x.Enforces, "containerd does not require the gate: no file of its configuration says so, and without the gate containers start unasked")
	}
	for _, s := range x.settings() {
		if requires && is(s, validator, "required_plugins") && s.At() != last.At() {
			for _, name := range s.Values {
				if !slices.Contains(e.Required, name) {
					x.strict(Warn, check, "name it in "+last.File+" too, then "+x.Restart, "the plugin %s is not required, though %s says so: %s, which is read later, replaces the list", name, s.At(), last.At())
				}
			}
		}
	}
	if requires && last != nil && last.Ours {
		x.orphans(last)
	}
	for i, s := range stray {
		if i == shown {
			break
		}
		x.strict(Warn, check, "remove it", "%s", misplaced(s))
	}
}

// orphans are plugins of others that our list alone requires: the file that they were
// copied from is gone. A plugin that was asked about the last container is at work.
func (x *examination) orphans(list *node.Setting) {
	for _, name := range list.Values {
		if ours(name) || slices.ContainsFunc(x.settings(), func(s node.Setting) bool {
			return !s.Ours && is(s, validator, "required_plugins") && slices.Contains(s.Values, name)
		}) {
			continue
		}
		seen := ""
		if x.Gate != nil && len(x.Gate.Runtime.Plugins) > 0 {
			if slices.ContainsFunc(x.Gate.Runtime.Plugins, func(p string) bool {
				_, bare, _ := strings.Cut(p, "-")
				return p == name || bare == name
			}) {
				continue
			}
			seen = ", and containerd did not ask it about the last container"
		}
		x.strict(Warn, "required", "start it; or have it required no longer: tidewaiter install --enforce, or take it out of "+list.File+", then "+x.Restart,
			"only %s requires the plugin %s%s: without it containerd refuses every container", list.At(), name, seen)
	}
}

// imports is how the directory of drop-ins comes to be read.
func (x *examination) imports() string {
	file := x.Host.Config
	if x.Host.Source != "" {
		file = x.Host.Source
	}
	return fmt.Sprintf("imports = [%q] at the top of %s", path.Join(x.Host.DropIns, "*.toml"), file)
}

// unread are files of others that an operator may think are in force. That of ours the
// requirement's finding names.
func (x *examination) unread() {
	others := slices.DeleteFunc(slices.Clone(x.Unread), func(name string) bool { return name == x.NotImported })
	if len(others) > 0 {
		x.add(Warn, "imports", x.imports()+", then "+x.Restart+"; or remove them", "containerd does not read %s: no file imports it, whatever config dump shows as imports", strings.Join(others, ", "))
	}
}

// shown bounds findings of one kind.
const shown = 5

func ours(name string) bool { return name == plugin || name == index+"-"+plugin }

// also are the other places that set what s does.
func (x *examination) also(s *node.Setting) (list []string) {
	for _, o := range x.settings() {
		if slices.Equal(o.Key, s.Key) && o.At() != s.At() {
			list = append(list, o.At())
		}
	}
	return list
}
