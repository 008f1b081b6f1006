package host

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/cmd/internal/control"
	"github.com/tidewaiter/tidewaiter/deploy"
)

// A Gate is where the program and its directories are, on the host.
type Gate struct {
	Program   string // empty: GateBinary
	ConfigDir string
	StateDir  string
	RunDir    string
}

// An Installation installs the gate, or takes it away. Its functions are what it
// needs of the world beside files and programs.
type Installation struct {
	*Host
	Gate
	Self []byte // the program that is installed

	// From is a directory of this process whose configuration the host is to have;
	// empty: the host has its own.
	From string
	Keep bool // the program on the host, whichever it is; Install sets it for as long as it runs
	// Follow replaces a program on the host only with a newer one: several pods may
	// follow at once. Release is the version of Self.
	Follow  bool
	Release string

	Enforce bool
	Force   bool
	Print   bool // only say what would be done
	Restart bool // of containerd
	Purge   bool // configuration and state too

	Ask   func(context.Context) (*control.Status, error)                 // the gate
	Look  func(context.Context) (*control.Status, error)                 // the gate, which looks at what runs first
	Gates func() (int, error)                                            // that run on this node
	Load  func(ctx context.Context, dir string) (mode string, err error) // reads a configuration directory as the gate would
	Pause func(ctx context.Context, socket, name string) (string, error) // that name of an image on the node which has its digest
	Say   func(kind, format string, args ...any)                         // kind: "did", "would", "warn" or "next"
	Log   func(message string)                                           // to the node's log
	Now   func() time.Time
	Sleep func(context.Context, time.Duration)

	// Patience is how long the gate is waited for. Zero: a minute.
	Patience time.Duration

	held bool // something was taken back: leave the program and containerd as they are
}

// A record is what uninstall needs to know and cannot see. Without it everything is
// removed all the same, except for directories that are then empty.
type record struct {
	Directories []string  `json:"directories"` // that were made, outer ones first
	DropIns     []string  `json:"dropIns"`     // directories
	Configs     []string  `json:"configs"`     // files of containerd's configuration
	Pending     bool      `json:"pending"`     // what containerd reads was changed, and it was not restarted by us
	Opened      time.Time `json:"opened,omitzero"`
	Brought     bool      `json:"brought,omitzero"`   // the configuration is a copy of i.From
	Replaced    []string  `json:"replaced,omitempty"` // digests of programs that another took the place of, the last ones
}

func (i *Installation) recordFile() string { return path.Join(i.StateDir, "install.json") }

func (i *Installation) remembered() record {
	var r record
	if raw, err := i.read(i.recordFile()); err == nil {
		_ = json.Unmarshal(raw, &r) // nothing in it is needed
	}
	return r
}

func (i *Installation) remember(r record) error {
	raw, err := json.Marshal(r)
	if err != nil {
		return err
	}
	c, err := i.change(i.recordFile(), 0o600, append(raw, '\n'), "")
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

// Result says how an installation ended.
type Result string

// Results.
const (
	Printed   Result = "printed"   // what would be done
	Nothing   Result = "nothing"   // was to be done
	Installed Result = "installed" // the gate runs; containerd does not require it, or its restart is outstanding
	Enforces  Result = "enforces"  // and containerd was restarted and requires it
	Opened    Result = "opened"    // containerd's configuration does not require the gate any more; the gate still runs
	Removed   Result = "removed"
)

// A place is a path in full with two names or more. What is removed with all that it
// holds is named so, and what gets into a unit as it is.
var place = regexp.MustCompile(`^(/[A-Za-z0-9._@+-]+){2,}$`)

// places refuses others.
func (i *Installation) places() error {
	if i.Program == "" {
		i.Program = GateBinary
	}
	for _, p := range []struct {
		flag string
		name *string
	}{{"--config-dir", &i.ConfigDir}, {"--state-dir", &i.StateDir}, {"--run-dir", &i.RunDir}, {"--program", &i.Program}} {
		if *p.name != "" {
			*p.name = path.Clean(*p.name)
		}
		if !place.MatchString(*p.name) {
			return hint("name one of the gate's own in full, such as /var/lib/tidewaiter", "%s: %q cannot be a place of the gate", p.flag, *p.name)
		}
	}
	return nil
}

// Install installs the gate. An error that is a Hint with No means that it was refused,
// or did not work and was taken back; then the node is as it was.
func (i *Installation) Install(ctx context.Context) (Result, error) {
	if err := i.places(); err != nil {
		return "", err
	}
	release, err := i.lock(ctx)
	if err != nil {
		return "", err
	}
	defer release()
	defer func(self []byte, keep, enforce bool) { i.Self, i.Keep, i.Enforce = self, keep, enforce }(i.Self, i.Keep, i.Enforce)
	old, err := i.program()
	switch {
	case err != nil:
		i.Keep = false // there is none to keep
	case i.Keep || i.held || i.Follow && !bytes.Equal(old, i.Self) && !i.newer(ctx, old):
		i.Self, i.Keep = old, true
	}
	status, askErr := i.Ask(ctx)
	was := ""
	if askErr == nil {
		was = status.Mode
	}
	before, beforeErr := i.Effective(ctx)
	if beforeErr != nil && i.Enforce {
		return "", beforeErr
	}
	if i.Enforce {
		if err := i.canEnforce(ctx, before); err != nil {
			return "", err
		}
	}
	base, err := i.service(before)
	if err != nil {
		return "", err
	}
	changed, undoCopy := false, func() error { return nil }
	if i.From != "" && !i.Print {
		if changed, undoCopy, err = i.follow(ctx, status); err != nil {
			return "", err
		}
		defer os.RemoveAll(i.Path(i.ConfigDir + ".next")) // the one before
	}
	start, err := i.configuration()
	if err != nil {
		return "", err
	}
	if len(start) == 0 {
		mode, err := i.Load(ctx, i.ConfigDir)
		if err != nil {
			return "", hint("correct it, or delete it and start with one that audits", "the configuration is not valid, and the gate would refuse everything with it: %w", err)
		}
		if mode == "enforce" && !i.Enforce && was != "enforce" {
			if err := undoCopy(); err != nil {
				return "", err
			}
			return "", i.audits()
		}
	}
	switch {
	case beforeErr != nil:
		i.Say("warn", "it is not known whether this containerd can ask a gate: %v", beforeErr)
	case before.NoCRI || before.NRIDisabled:
		i.Say("warn", "this containerd asks no gate about anything: CRI or NRI is switched off in its configuration, see tidewaiter doctor")
	}
	base = append(base, start...)
	var mode []Change
	var need *requirement
	if i.Enforce {
		if mode, err = i.mode(ctx); err != nil {
			return "", err
		}
		if at := i.remembered().Opened; i.Follow && !at.IsZero() {
			i.Say("warn", "uninstall opened containerd at %s, and it stays so: tidewaiter install --enforce on the host has it require the gate again", at.UTC().Format(time.RFC3339))
		} else if need, err = i.requirement(ctx, before); err != nil {
			return "", err
		}
	}

	outstanding := i.Restart && i.remembered().Pending
	if outstanding && !i.Print && need != nil && len(need.changes) == 0 && askErr == nil && status.Ready && i.restarted() {
		outstanding = false
	}
	due := need != nil && !i.held && (len(mode)+len(need.changes) > 0 || outstanding)
	idle := len(base) == 0 && !due
	if i.Print {
		if idle {
			return Nothing, nil
		}
		if due {
			if err := i.mayEnforce(ctx); err != nil {
				i.Say("warn", "it would not be done: %v", err)
			}
		}
		i.print(base, mode, need)
		return Printed, nil
	}
	if due {
		if err := i.mayEnforce(ctx); err != nil {
			if changed { // what follow asked about was the policy before
				err = errors.Join(err, undoCopy())
			}
			return "", err
		}
	}
	switch {
	case len(base) > 0 || askErr != nil && i.Manager.start() != nil:
		if err := i.begin(ctx, base, status, askErr); err != nil {
			return "", err
		}
	case askErr != nil:
		i.byHand()
	}
	switch {
	case due:
		return i.enforce(ctx, mode, need)
	case idle && !changed && (askErr == nil || i.Manager.start() == nil):
		return Nothing, nil
	}
	return Installed, nil
}

// audits is the refusal of a configuration that enforces, by an install that does not.
func (i *Installation) audits() error {
	return refuse("write mode: audit into "+path.Join(i.ConfigDir, "config.yaml")+", then tidewaiter install, then tidewaiter install --enforce; --enforce --force enforces at once", "the configuration says mode: enforce")
}

// program is that on the host.
func (i *Installation) program() ([]byte, error) { return os.ReadFile(i.Path(i.Program)) }

// canEnforce refuses where containerd cannot be made to refuse.
func (i *Installation) canEnforce(ctx context.Context, before *Effective) error {
	if before.NoCRI {
		return refuse("remove cri from disabled_plugins in "+i.Config+", or name the containerd that runs pods: --runtime, --containerd-config",
			"CRI is switched off in containerd's configuration, as in that of Docker's packages: no kubelet uses this containerd, and what Docker starts no plugin is asked about")
	}
	if before.NRIDisabled {
		return refuse("remove disable = true of the plugin io.containerd.nri.v1.nri, or its name from disabled_plugins, restart containerd, and look at tidewaiter status",
			"NRI is switched off in containerd's configuration, so that no gate can be asked")
	}
	major, minor, err := i.Version(ctx)
	if err != nil {
		return err
	}
	if major < 2 || major == 2 && minor < 2 {
		return refuse("containerd 2.2 or later is needed to enforce", "this is containerd %d.%d, which goes on without a plugin that fails", major, minor)
	}
	return nil
}

// mayEnforce refuses where what runs would be refused, or nobody can say.
func (i *Installation) mayEnforce(ctx context.Context) error {
	if i.Force {
		return nil
	}
	where := i.ConfigDir
	if i.From != "" {
		where = i.From
	}
	first := "with mode: audit in " + path.Join(where, "config.yaml") + ": tidewaiter install, then tidewaiter status; --force enforces all the same"
	asked := i.Now()
	s, err := i.Look(ctx)
	if err != nil {
		return refuse(first, "no gate runs here that could say what would be refused: %w", err)
	}
	c, r := s.Configuration, s.Running
	switch {
	case c.Epoch == "":
		return refuse(first, "the gate has no configuration and would refuse everything")
	case c.Rejected != nil && c.Rejected.Current:
		return refuse("correct it; --force enforces with the one before", "the gate rejected its configuration: %s", c.Rejected.Error)
	case r.At == nil || r.At.Before(asked):
		return refuse("try again in a minute, or see tidewaiter status; --force does not wait", "the gate has not looked at everything that runs yet")
	case r.Error != "":
		return refuse("tidewaiter status; --force enforces all the same", "the gate could not look at everything that runs: %s", r.Error)
	}
	var bad []string
	for _, f := range r.Found {
		if f.Gone || !allowed(f.Reason) {
			bad = append(bad, fmt.Sprintf("%s/%s %s %s: %s", f.Namespace, f.Pod, f.Container, f.Image, gone(f.Gone, f.Reason)))
		}
	}
	n := r.Gone
	for reason, m := range r.Reasons {
		if !allowed(reason) {
			n += m
		}
	}
	for _, p := range r.Pauses {
		if p.Gone || !allowed(p.Reason) {
			n++
			bad = append(bad, fmt.Sprintf("the pause image %s: %s", p.Image, gone(p.Gone, p.Reason)))
		}
	}
	if n == 0 {
		return nil
	}
	for k, b := range bad {
		if k == 10 {
			i.Say("warn", "and %d more: tidewaiter status", len(bad)-k)
			break
		}
		i.Say("warn", "would be refused: %s", b)
	}
	return refuse("sign them, or list their digests in a floor file; --force enforces all the same", "%d of what runs here would be refused", n)
}

func allowed(reason string) bool {
	return reason == "VERIFIED" || reason == "ALLOWED_BY_DIGEST" || reason == "ALLOWED_BY_POLICY"
}

func gone(is bool, reason string) string {
	if is {
		return "its image is not on the node any more"
	}
	return reason
}

// header begins files that are ours to change.
const header = "# Written by tidewaiter install"

// service are the changes for the program and its service.
func (i *Installation) service(before *Effective) ([]Change, error) {
	var all []Change
	add := func(name string, mode os.FileMode, now []byte, why string) error {
		c, err := i.own(name, mode, now, why)
		all = append(all, c...)
		return err
	}
	old, err := i.program()
	if err == nil && !bytes.Equal(old, i.Self) {
		if err := add(i.Program+".previous", 0o755, old, "the program as it was, for the way back"); err != nil {
			return nil, err
		}
	}
	if err := add(i.Program, 0o755, i.Self, "the program"); err != nil {
		return nil, err
	}
	file, content, mode := i.Manager.file()
	if file == "" || i.Keep && i.exists(file) { // the service belongs to the program
		return all, nil
	}
	if i.Program != GateBinary {
		content = strings.ReplaceAll(content, GateBinary, i.Program)
	}
	if i.Manager.Name == "systemd" {
		content = i.writable(content)
	}
	if err := i.ours(&all, file, mode, content, "`tidewaiter install` writes this file", "the service, which is started again whenever it ends"); err != nil {
		return nil, err
	}
	if vars := i.variables(before); vars != "" {
		if err := i.ours(&all, Defaults, 0o644, header+".\n"+vars, header, "where the sockets and directories of this node are"); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// ours adds a file that is changed only if it bears sign: otherwise it is an operator's.
func (i *Installation) ours(all *[]Change, file string, mode os.FileMode, content, sign, why string) error {
	c, err := i.own(file, mode, []byte(content), why)
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
func (i *Installation) variables(before *Effective) string {
	socket, nri := i.Socket, i.NRI
	if before != nil {
		if i.Name == "containerd" && before.Socket != "" && socket == layouts[len(layouts)-1].Socket {
			socket = before.Socket
		}
		if before.NRISocket != "" && nri == layouts[len(layouts)-1].NRI {
			nri = before.NRISocket
		}
	}
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

// configuration are the files that a node starts with which has none. What is there
// is not touched.
func (i *Installation) configuration() ([]Change, error) {
	there := func(name string) bool { return i.exists(path.Join(i.ConfigDir, name)) }
	policy := there("trustpolicy.json") || there("trustpolicy.oci.json")
	if there("config.yaml") || there("config.yml") || policy && i.Enforce {
		return nil, nil // if something is missing Load says so
	}
	if i.Enforce {
		return nil, refuse("tidewaiter install, which audits, and then write a trust policy", "there is no configuration in %s", i.ConfigDir)
	}
	all, err := i.change(path.Join(i.ConfigDir, "config.yaml"), 0o644, []byte(deploy.AuditConfig), "audit: everything starts, and what enforce would refuse is recorded")
	if err != nil || policy {
		return all, err
	}
	c, err := i.change(path.Join(i.ConfigDir, "trustpolicy.json"), 0o644, []byte(deploy.AuditPolicy), "it trusts nobody yet: write your own")
	return append(all, c...), err
}

// mode are the changes that make the gate enforce.
func (i *Installation) mode(ctx context.Context) ([]Change, error) {
	if mode, err := i.Load(ctx, i.ConfigDir); err != nil || mode == "enforce" {
		return nil, err
	}
	if i.From != "" {
		return nil, refuse("write mode: enforce there", "the configuration that is copied from %s says mode: audit", i.From)
	}
	return i.enforced(path.Join(i.ConfigDir, "config.yaml"))
}

func (i *Installation) requirement(ctx context.Context, before *Effective) (*requirement, error) {
	pinned := ""
	if before.Pause != "" && !strings.Contains(before.Pause, "@") {
		socket := i.Socket
		if i.Name == "containerd" && before.Socket != "" && i.Socket == layouts[len(layouts)-1].Socket {
			socket = before.Socket
		}
		var err error
		if pinned, err = i.Pause(ctx, i.Path(socket), before.Pause); err != nil {
			i.Say("warn", "the pause image %s stays named by its tag: %v", before.Pause, err)
		}
	}
	need, err := i.require(before, pinned)
	if err != nil {
		return nil, err
	}
	if pinned != "" && !need.pinned {
		i.Say("warn", "the pause image stays named by its tag: write pause-image: %s into /etc/rancher/%s/config.yaml", pinned, i.Name)
	}
	if before.Toleration != "" {
		i.Say("warn", "containerd lets every pod with the annotation %s do without the gate (tolerate_missing_plugins_annotation)", before.Toleration)
	}
	return need, nil
}

// print says what would be done, to the last byte.
func (i *Installation) print(base, mode []Change, need *requirement) {
	show := func(changes []Change) {
		for _, c := range changes {
			i.Say("would", "%s", c.Show())
		}
	}
	commands := func(list [][]string) {
		for _, c := range list {
			i.Say("would", "run %s\n", strings.Join(c, " "))
		}
	}
	show(base)
	if len(base) > 0 {
		commands(i.Manager.start())
	}
	if need == nil {
		return
	}
	show(mode)
	show(need.changes)
	if len(need.changes) == 0 {
		return
	}
	i.Say("would", "run %s --config %s config dump\n", i.Host.Binary, i.Config)
	if i.Restart {
		commands([][]string{i.Manager.Restart()})
	} else {
		i.Say("next", "%s", i.restartLine())
	}
}

func (i *Installation) restartLine() string {
	if c := i.Manager.Restart(); c != nil {
		return strings.Join(c, " ")
	}
	return "restart " + i.Name + ", which is not a service that is known here (--restart-command)"
}

// begin writes the program and its service and starts it. A program that does not
// come up goes, and the one before comes back.
func (i *Installation) begin(ctx context.Context, changes []Change, before *control.Status, askErr error) error {
	undo, made, err := i.Apply(changes)
	if err != nil {
		return err
	}
	i.told(changes)
	back := func(why error) error {
		ctx := context.WithoutCancel(ctx) // whoever ends this wants the node as it was
		err := undo()
		hadOne := slices.ContainsFunc(changes, func(c Change) bool { return c.Path == i.Program+".previous" })
		if hadOne || askErr == nil {
			err = errors.Join(err, i.Manager.run(ctx, i.Manager.start()))
		} else {
			stop, after := i.Manager.stop()
			_ = i.Manager.run(ctx, stop) // perhaps it never was there
			err = errors.Join(err, i.Manager.run(ctx, after))
		}
		if err != nil {
			return fmt.Errorf("%w; and it could not be taken back: %w", why, err)
		}
		i.Log("install: " + why.Error() + ": taken back")
		return refuse(i.Manager.logs(i.Program), "%w: %w: everything is as it was", why, ErrTakenBack)
	}
	r := i.remembered()
	r.Directories = append(r.Directories, made...)
	if !strings.HasPrefix(i.RunDir, "/run/") { // where nothing makes it at boot
		dirs, err := i.mkdir(i.RunDir)
		if err != nil {
			return back(err)
		}
		r.Directories = append(r.Directories, dirs...)
	}
	if err := i.remember(r); err != nil {
		return back(err)
	}
	start := i.Manager.start()
	if start == nil {
		i.byHand()
		return i.replaced(changes)
	}
	if err := i.Manager.run(ctx, start); err != nil {
		return back(fmt.Errorf("the gate did not come up: %w", err))
	}
	registered := before != nil && before.Runtime.Registered
	if err := i.await(ctx, func(s *control.Status) bool {
		return (before == nil || s.PID != before.PID) && s.Configuration.Epoch != "" && (!registered || s.Ready)
	}); err != nil {
		return back(fmt.Errorf("the gate did not come up: %w", err))
	}
	i.Say("did", "started the gate")
	if err := i.replaced(changes); err != nil {
		i.Say("warn", "%v", err)
	}
	if !registered {
		// Who looks at status next is not to be told of what is over in a second.
		soon := *i
		soon.Patience = 5 * time.Second
		if err := soon.await(ctx, func(s *control.Status) bool { return s.Ready }); err != nil && ctx.Err() == nil {
			i.Say("warn", "containerd does not ask it yet, see tidewaiter status: %v", err)
		}
	}
	return nil
}

func (i *Installation) byHand() {
	i.Say("next", "start %s run, and again whenever it ends: there is neither systemd nor OpenRC here", i.Program)
}

func (i *Installation) told(changes []Change) {
	for _, c := range changes {
		what := "wrote "
		if c.New == nil {
			what = "removed "
		}
		i.Say("did", "%s", what+c.Path)
	}
}

// enforce makes the gate enforce, and then containerd require it: never the other way
// round, so that what containerd requires is what enforces.
func (i *Installation) enforce(ctx context.Context, mode []Change, need *requirement) (Result, error) {
	undoMode, madeMode, err := i.Apply(mode)
	if err != nil {
		return "", err
	}
	i.told(mode)
	back := func(why error, undo ...func() error) error {
		var all error
		for _, u := range undo {
			all = errors.Join(all, u())
		}
		if all != nil {
			return fmt.Errorf("%w; and it could not be taken back: %w", why, all)
		}
		next := ""
		if h := (*Hint)(nil); errors.As(why, &h) {
			next = h.Next
		}
		i.Log("install --enforce: " + why.Error() + ": taken back")
		return refuse(next, "%w: %w", why, ErrTakenBack)
	}
	if err := i.await(ctx, func(s *control.Status) bool { return s.Ready && s.Mode == "enforce" }); err != nil {
		return "", back(fmt.Errorf("the gate is not registered to enforce: %w", err), undoMode)
	}
	// Whatever connects under the gate's name is present for containerd, also a second
	// one that only audits.
	if n, err := i.Gates(); err != nil || n > 1 {
		if err == nil {
			err = refuse("take the DaemonSet's gate off this node: kubectl label node NAME tidewaiter.dev/gate=host",
				"%d gates run on this node, and containerd would take any of them for the one that it requires", n)
		}
		return "", back(err, undoMode)
	}
	// Where the files go is written down before they are there: after a power cut
	// uninstall must find them.
	r := i.remembered()
	r.Directories = append(r.Directories, madeMode...)
	r.Opened = time.Time{}
	r.Pending = r.Pending || len(need.changes) > 0
	for _, c := range need.changes {
		if path.Base(c.Path) == dropIn || path.Base(c.Path) == dropInPause {
			r.DropIns = add(r.DropIns, path.Dir(c.Path))
		} else {
			r.Configs = add(r.Configs, c.Path)
		}
	}
	if err := i.remember(r); err != nil {
		return "", back(err, undoMode)
	}
	undoNeed, made, err := i.Apply(need.changes)
	if err != nil {
		return "", back(err, undoMode)
	}
	if len(made) > 0 {
		r = i.remembered()
		r.Directories = append(r.Directories, made...)
		if err := i.remember(r); err != nil {
			return "", back(err, undoNeed, undoMode)
		}
	}
	if err := i.check(ctx, need); err != nil {
		return "", back(err, undoNeed, undoMode)
	}
	i.told(need.changes)
	if !i.Restart {
		if len(need.changes) > 0 {
			i.Say("next", "%s", i.restartLine())
		}
		return Installed, nil
	}
	if len(need.changes) == 0 && i.restarted() {
		return Enforces, nil
	}
	command := i.Manager.Restart()
	if command == nil {
		return Installed, hint("name the command with --restart-command", "it is not known what restarts %s", i.Name)
	}
	s, err := i.Ask(ctx)
	if err != nil {
		return "", back(err, undoNeed, undoMode)
	}
	restart := [][]string{command}
	again := func() error { return i.Manager.run(context.WithoutCancel(ctx), restart) }
	if err := i.Manager.run(ctx, restart); err != nil {
		return "", back(err, undoNeed, undoMode, again)
	}
	i.Say("did", "restarted %s: %s", i.Name, strings.Join(command, " "))
	if err := i.await(ctx, func(n *control.Status) bool {
		return n.Ready && n.Mode == "enforce" && (n.PID != s.PID || n.Runtime.Registrations > s.Runtime.Registrations)
	}); err != nil {
		return "", back(fmt.Errorf("the gate is not registered after the restart of %s: %w", i.Name, err), undoNeed, undoMode, again)
	}
	r.Pending = false
	if err := i.remember(r); err != nil {
		i.Say("warn", "%v", err)
	}
	return Enforces, nil
}

// restarted reports whether the containerd that runs was started after everything was
// written that has it require the gate, whoever did that, and remembers it then: without
// that, whoever is ended by the restart that it asked for would ask for one more each
// time. It is for a gate that is registered. What is not known is a no.
func (i *Installation) restarted() bool {
	r := i.remembered()
	p, err := i.Running(i.Now())
	if err != nil || p.Listens.IsZero() {
		return false
	}
	files := slices.Clone(r.Configs)
	for _, dir := range r.DropIns {
		files = append(files, path.Join(dir, dropIn), path.Join(dir, dropInPause))
	}
	seen := false
	for _, name := range files {
		t, err := i.Changed(name)
		if errors.Is(err, fs.ErrNotExist) && path.Base(name) == dropInPause {
			continue
		}
		// By both clocks: one of them is wrong where the node's was set since.
		if err != nil || !t.Before(p.Started) || !t.Before(p.Listens) {
			return false
		}
		seen = true
	}
	if !seen {
		return false
	}
	r.Pending = false
	if err := i.remember(r); err != nil {
		i.Say("warn", "%v", err)
		return false
	}
	i.Say("did", "did not restart %s: it was started after its configuration was written", i.Name)
	return true
}

func add(list []string, s string) []string {
	if slices.Contains(list, s) {
		return list
	}
	return append(list, s)
}

// await waits until the gate is as wanted.
func (i *Installation) await(ctx context.Context, is func(*control.Status) bool) error {
	patience := i.Patience
	if patience == 0 {
		patience = time.Minute
	}
	var last error
	for end := i.Now().Add(patience); ; {
		s, err := i.Ask(ctx)
		switch {
		case err == nil && is(s):
			return nil
		case err != nil:
			last = err
		case len(s.Problems) > 0:
			last = errors.New(s.Problems[0].Text)
		default:
			last = fmt.Errorf("it is in mode %s, and not the one that was waited for", s.Mode)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if !i.Now().Before(end) {
			return fmt.Errorf("after %s: %w", patience, last)
		}
		i.Sleep(ctx, 250*time.Millisecond)
	}
}

// Uninstall opens containerd and takes the gate away. It needs neither the gate nor a
// network.
func (i *Installation) Uninstall(ctx context.Context) (Result, error) {
	if err := i.places(); err != nil {
		return "", err
	}
	release, err := i.lock(ctx)
	switch {
	case err != nil && (!i.Force || ctx.Err() != nil):
		return "", err
	case err != nil: // nothing keeps a node from being opened
		i.Say("warn", "%v: --force goes on all the same", err)
		release = func() {}
	}
	defer release()
	r := i.remembered()
	opening, openErr := i.open(r.DropIns, r.Configs)
	var gateFiles []Change
	var files []string
	if f, _, _ := i.Manager.file(); f != "" {
		files = append(files, f, Defaults)
	}
	files = append(files, i.Program, i.Program+".previous", i.recordFile())
	for _, f := range files {
		c, err := i.change(f, 0, nil, "the gate")
		if err != nil {
			return "", err
		}
		if len(c) > 0 && f == Defaults && !bytes.Contains(c[0].Old, []byte(header)) {
			continue // the operator's
		}
		gateFiles = append(gateFiles, c...)
	}
	before, after := i.Manager.stop()
	if f, _, _ := i.Manager.file(); f == "" || !i.exists(f) {
		before, after = nil, nil
	}

	if i.Print {
		for _, c := range append(slices.Clone(opening), gateFiles...) {
			i.Say("would", "%s", c.Show())
		}
		for _, c := range slices.Concat(before, after) {
			i.Say("would", "run %s\n", strings.Join(c, " "))
		}
		if len(opening)+len(gateFiles) == 0 {
			return Nothing, openErr
		}
		return Printed, openErr
	}
	again := i.Restart && (len(opening) > 0 || i.mayRequire(ctx, r))
	// First of all containerd, file by file: what cannot be read must not keep what
	// can from being opened.
	for _, c := range opening {
		if err := i.put(c); err != nil {
			openErr = errors.Join(openErr, err)
			continue
		}
		i.told([]Change{c})
	}
	if openErr == nil && !i.Force {
		openErr = i.requiredByOthers(ctx)
	}
	if openErr != nil {
		return "", hint("remove what is left by hand: docs/lockout.md", "containerd may still require the gate: %w", openErr)
	}
	if len(opening) > 0 {
		i.Log("uninstall: containerd's configuration does not require the gate any more")
		r.Opened = i.Now()
		if err := i.remember(r); err != nil {
			i.Say("warn", "%v", err)
		}
	}
	if i.Restart && !again {
		i.Say("did", "did not restart containerd: nothing makes it require the gate")
	} else if i.Restart {
		command := i.Manager.Restart()
		if command == nil {
			return Opened, hint("restart it, or name the command with --restart-command", "it is not known what restarts containerd")
		}
		if err := i.Manager.run(ctx, [][]string{command}); err != nil {
			return Opened, err
		}
		i.Say("did", "restarted %s: %s", i.Name, strings.Join(command, " "))
	} else if !i.Force && (len(opening) > 0 || i.stillAsks(ctx, r)) {
		// The containerd that runs has read the old files.
		i.Say("next", "%s", i.restartLine())
		i.Say("next", "tidewaiter uninstall, again: until then the gate goes on, without which containerd would refuse everything")
		return Opened, nil
	}
	if len(gateFiles) == 0 && len(opening) == 0 && !i.Purge {
		return Nothing, nil
	}
	var purged []string
	for _, dir := range []string{i.ConfigDir, i.StateDir, i.RunDir} {
		if i.Purge && !i.owns(dir, r) {
			i.Say("warn", "%s stays: it may hold what is not the gate's; remove by hand what is", dir)
		} else if i.Purge {
			purged = append(purged, dir)
		}
	}
	if err := i.Manager.run(ctx, before); err != nil {
		i.Say("warn", "%v", err)
	}
	for _, c := range gateFiles {
		if err := i.put(c); err != nil {
			return "", err
		}
		i.told([]Change{c})
	}
	if err := i.Manager.run(ctx, after); err != nil {
		i.Say("warn", "%v", err)
	}
	var shared error
	if i.Purge {
		if shared = i.shared(); shared != nil {
			purged = slices.DeleteFunc(purged, func(dir string) bool { return dir != i.ConfigDir })
		}
		for _, dir := range purged {
			if err := os.RemoveAll(i.Path(dir)); err != nil {
				return "", err
			}
			i.Say("did", "removed %s", dir)
		}
	}
	for _, dir := range slices.Backward(r.Directories) {
		os.Remove(i.Path(filepath.Clean(dir))) // what holds something stays
	}
	if shared != nil {
		return "", shared
	}
	return Removed, nil
}

// owns reports whether a directory can be told to be the gate's, and not one that others
// have things in, too: nothing that install did not make is deleted for its flag alone.
func (i *Installation) owns(dir string, r record) bool {
	if slices.ContainsFunc(strings.Split(dir, "/"), func(name string) bool { return strings.HasPrefix(name, gate) }) {
		return true
	}
	if above := path.Dir(dir); above == "/var" || above == "/usr" { // whatever a gate left there
		return false
	}
	if !i.exists(dir) || slices.Contains(r.Directories, dir) {
		return true
	}
	return slices.ContainsFunc([]string{"install.json", "config.yaml", "store", control.SocketName}, func(name string) bool { return i.exists(path.Join(dir, name)) })
}

// shared fails where a gate lives here after the service has ended, such as a pod's: its
// state and its sockets are in the same directories.
func (i *Installation) shared() error {
	if i.Force {
		return nil
	}
	n, err := i.Gates()
	if err == nil && n == 0 {
		return nil
	}
	what := "another gate still runs here"
	if err != nil {
		what = fmt.Sprintf("it cannot be found out whether another gate runs here (%v)", err)
	}
	return hint("end it, then tidewaiter uninstall --purge again; --force deletes them under it", "%s: %s and %s stay", what, i.StateDir, i.RunDir)
}

// mayRequire reports whether the containerd that runs may require the gate though none of
// our files is in its configuration. Only what is known not to is not restarted.
func (i *Installation) mayRequire(ctx context.Context, r record) bool {
	if r.Pending || !r.Opened.IsZero() || len(r.DropIns)+len(r.Configs) > 0 {
		return true // it did once, and nobody says that it was restarted since
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	e, err := i.Effective(ctx)
	if err != nil || requires(e) {
		return true
	}
	p, err := i.Running(i.Now())
	if err != nil {
		return false // none runs, or it cannot be seen from here
	}
	files, dirs, err := i.Files()
	if err != nil {
		return true
	}
	for _, f := range files {
		dirs = append(dirs, f.Path)
	}
	return slices.ContainsFunc(dirs, func(name string) bool {
		t, err := i.Changed(name)
		return err == nil && t.After(p.Started) // and it may have read another configuration
	})
}

// requires reports whether containerd requires the gate by one of its names.
func requires(e *Effective) bool { return e.Requires(gate) || e.Requires("99-"+gate) }

// requiredByOthers fails where containerd's own program says that the gate is required
// still: it says so somewhere where install did not write it, and without the gate
// nothing would start. What cannot be found out is no reason to leave the gate.
func (i *Installation) requiredByOthers(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	e, err := i.Effective(ctx)
	if err != nil || !requires(e) {
		return nil
	}
	where := i.Config
	files, _, _ := i.Files()
	for _, f := range files {
		for _, s := range f.Settings {
			if s.Key[len(s.Key)-1] == "required_plugins" && (slices.Contains(s.Values, gate) || slices.Contains(s.Values, "99-"+gate)) {
				where = s.At()
			}
		}
	}
	return fmt.Errorf("%s requires it, which install did not write (--force removes the gate all the same)", where)
}

// stillAsks reports whether the containerd that runs was started before its
// configuration was opened, as far as a gate that runs knows.
func (i *Installation) stillAsks(ctx context.Context, r record) bool {
	s, err := i.Ask(ctx)
	return err == nil && !r.Opened.IsZero() && s.Runtime.Registered && s.Runtime.Since != nil && s.Runtime.Since.Before(r.Opened)
}
