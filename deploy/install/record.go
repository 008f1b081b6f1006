package install

import (
	"encoding/json"
	"path"
	"slices"
	"time"
)

// A record is what uninstall needs to know and cannot see. Without it everything is
// removed all the same, except for directories that are then empty.
type record struct {
	Directories []string  `json:"directories"` // that were made, outer ones first
	DropIns     []string  `json:"dropIns"`     // directories
	Configs     []string  `json:"configs"`     // files of containerd's configuration
	Pending     bool      `json:"pending"`     // what containerd reads was changed, and it was not restarted by us
	Opened      time.Time `json:"opened,omitzero"`
	Brought     bool      `json:"brought,omitzero"` // the configuration is a copy of i.From
	// Required are the places that required other plugins, by name: our list names them, too.
	Required  map[string]string `json:"required,omitempty"`
	Replaced  []string          `json:"replaced,omitempty"` // digests of programs that another took the place of, the last ones
	Restart   []string          `json:"restart,omitempty"`  // the command that restarts containerd, as the operator named it
	GateAgain []string          `json:"gate,omitempty"`     // the same for the gate
	Trial     *trial            `json:"trial,omitempty"`    // what was put in place and is not known to work
}

// recordName is the name of the file of the record, in the state directory.
const recordName = "install.json"

func (i *Installation) recordFile() string { return path.Join(i.StateDir, recordName) }

func (i *Installation) remembered() record {
	var r record
	if raw, err := i.Read(i.recordFile()); err == nil {
		_ = json.Unmarshal(raw, &r) // nothing in it is needed
	}
	return r
}

func (i *Installation) remember(r record) error {
	raw, err := json.Marshal(r)
	if err != nil {
		return err
	}
	c, err := i.Change(i.recordFile(), 0o600, append(raw, '\n'), "")
	if err != nil {
		return err
	}
	_, made, err := i.Apply(c)
	if err == nil && len(made) > 0 { // the directory of the record itself
		r.Directories = append(r.Directories, made...)
		return i.remember(r)
	}
	return err
}

// commands takes what the operator named once for what was not named this time.
func (i *Installation) commands() {
	r := i.remembered()
	if i.Manager.ContainerdCommand == nil {
		i.Manager.ContainerdCommand = r.Restart
	}
	if i.Manager.GateCommand == nil {
		i.Manager.GateCommand = r.GateAgain
	}
}

// noteCommands remembers them.
func (i *Installation) noteCommands() {
	r := i.remembered()
	if slices.Equal(r.Restart, i.Manager.ContainerdCommand) && slices.Equal(r.GateAgain, i.Manager.GateCommand) {
		return
	}
	r.Restart, r.GateAgain = i.Manager.ContainerdCommand, i.Manager.GateCommand
	if err := i.remember(r); err != nil {
		i.Say("warn", "--restart-command and --gate-command are not remembered: %v", err)
	}
}

func add(list []string, s string) []string {
	if slices.Contains(list, s) {
		return list
	}
	return append(list, s)
}
