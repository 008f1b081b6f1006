package install

import (
	"maps"

	"github.com/tidewaiter/tidewaiter/deploy/node"
)

// sayOthers says what becomes of plugins of others that our list requires.
func (i *Installation) sayOthers(o node.OtherPlugins) {
	r := i.remembered()
	for _, name := range o.Returned {
		i.Say("warn", "the plugin %s is no longer required: %s, which required it, does not say so any more", name, r.Required[name])
	}
	for _, name := range o.Orphans {
		i.Say("warn", "only the file of install requires the plugin %s, and there is no record of whose it was: it stays; take it out by hand if nothing needs it", name)
	}
}

// noteOwners remembers whose the plugins in our list are, if there is such a list.
func (i *Installation) noteOwners(o node.OtherPlugins) {
	r := i.remembered()
	if len(r.DropIns)+len(r.Configs) == 0 {
		return // the phase that writes one remembers
	}
	if all := r.with(o.Owners); !maps.Equal(all, r.Required) {
		r.Required = all
		if err := i.remember(r); err != nil {
			i.Say("warn", "%v", err)
		}
	}
}

// with is what the record has of whose requirements our list took over, and more.
func (r record) with(whose map[string]string) map[string]string {
	all := map[string]string{}
	maps.Copy(all, r.Required)
	for name, at := range whose {
		if name != node.GateName {
			all[name] = at
		}
	}
	return all
}
