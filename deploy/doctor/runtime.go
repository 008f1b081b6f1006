package doctor

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/deploy/node"
	"github.com/tidewaiter/tidewaiter/nri/containerd"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/policy"
)

// plugin is how the gate registers.
const (
	plugin = "tidewaiter"
	index  = "99"
)

// Keys of containerd's configuration.
var (
	nriTable  = []string{"plugins", "io.containerd.nri.v1.nri"}
	validator = append(slices.Clone(nriTable), "default_validator")
	pauseKey  = []string{"plugins", "io.containerd.cri.v1.images", "pinned_images", "sandbox"}
)

// guarded is the annotation for which we ship an admission policy
// (deploy/enforce/admission.yaml).
const guarded = "without-gate.tidewaiter.dev"

// runtime looks at containerd: what runs, and what it is configured with.
func (x *examination) runtime() {
	if x.Inside {
		const text = "this is the gate's container: containerd and its configuration cannot be seen from here"
		if x.enforce {
			x.unknown("runtime", "on the node itself: tidewaiter doctor", "%s, nor whether containerd requires the gate", text)
		} else {
			x.ok("runtime", "%s; on the node itself tidewaiter doctor looks at them (not required in audit)", text)
		}
		return
	}
	status := x.Host.Manager.Look(cmp.Or(x.Host.Service, "containerd"))
	switch p := x.Process; {
	case x.ProcessErr != nil && errors.Is(x.ProcessErr, fs.ErrPermission):
		x.unknown("runtime", "run it as root", "containerd at %s: %v", x.Host.Socket, x.ProcessErr)
	case x.ProcessErr != nil:
		x.add(Fail, "runtime", status, "containerd does not answer at %s: %v", x.Host.Socket, x.ProcessErr)
	case p.Replaced:
		x.add(Warn, "runtime", x.Restart, "containerd (process %d) runs since %s and its program was replaced since; what follows is what the new one makes of its configuration", p.PID, when(p.Started))
	default:
		x.ok("runtime", "containerd runs since %s: process %d, at %s, configured by %s", when(p.Started), p.PID, x.Host.Socket, cmp.Or(x.Host.Config, "nothing"))
	}
	for i, h := range x.Halts {
		if i == shown {
			x.add(Fail, "restart", h.Next, "and %d more", len(x.Halts)-shown)
			break
		}
		x.add(Fail, "restart", h.Next, "%s", h.Text)
	}
	switch major, minor := x.Version[0], x.Version[1]; {
	case x.EffectiveErr != nil:
		next := x.Host.Binary + " --config " + x.Host.Config + " config dump"
		if h := (*node.Hint)(nil); errors.As(x.EffectiveErr, &h) && h.Next != "" {
			next = h.Next
		}
		x.unknown("nri", next, "containerd does not say what its configuration comes to: %v", x.EffectiveErr)
		return
	case x.VersionErr == nil && (major < 2 || major == 2 && minor < 2):
		x.strict(Fail, "version", "upgrade containerd to 2.2 or later, or audit", "this is containerd %d.%d, which goes on without a plugin that fails", major, minor)
	case x.VersionErr == nil && (major == 2 && minor < 4):
		x.ok("version", "containerd %d.%d: what was verified is what runs; the image's config is compared when the container starts", major, minor)
	case x.VersionErr == nil:
		x.ok("version", "containerd %d.%d: what was verified is what runs", major, minor)
	}
	x.plugins()
	x.required()
	x.unread()
	x.age()
	x.toleration()
	x.timeouts()
	x.handlers()
	x.pause()
}

func (x *examination) plugins() {
	e := x.Effective
	switch {
	case e.NoCRI:
		who := ""
		if s := x.last(nil, "disabled_plugins"); s != nil {
			who = ", by " + s.At()
		}
		x.add(Fail, "nri", "remove cri from that list, then "+x.Restart+"; or name the containerd that runs pods: --runtime, --containerd-config", "CRI is switched off%s: no kubelet uses this containerd, and nothing that it starts is asked about", who)
	case e.NRIDisabled:
		who := ""
		for _, s := range x.settings() {
			if is(s, nriTable, "disable") && s.Values[0] == "true" || is(s, nil, "disabled_plugins") && slices.Contains(s.Values, nriTable[1]) {
				who = ", by " + s.At()
			}
		}
		x.add(Fail, "nri", "remove that setting, then "+x.Restart, "NRI is switched off%s: containerd asks no plugin", who)
	case e.ConnectionsDisabled:
		who := ""
		if s := x.last(nriTable, "disable_connections"); s != nil {
			who = ", by " + s.At()
		}
		x.add(Fail, "nri", "remove that setting, then "+x.Restart, "containerd takes no connections of plugins%s", who)
	case x.NRISocket != nil:
		x.add(Fail, "nri", x.Restart, "NRI is on, and nothing can connect to %s: %v", e.NRISocket, x.NRISocket)
	default:
		x.ok("nri", "NRI is on, and takes connections at %s", e.NRISocket)
	}
}

// age is whether the containerd that runs has read the files as they are.
func (x *examination) age() {
	const check = "restart"
	if x.Process == nil {
		return // which the runtime's finding says
	}
	unseen := ""
	if x.FilesErr != nil {
		unseen = x.FilesErr.Error()
	}
	after, maybe := "", ""
	see := func(name string, changed time.Time) {
		switch x.read(changed) {
		case no:
			after = fmt.Sprintf("%s, which changed at %s", name, when(changed))
		case unclear:
			maybe = fmt.Sprintf("%s, which changed at %s", name, when(changed))
		}
	}
	for _, f := range x.Files {
		see(f.Path, f.Changed)
		if f.Err != nil {
			unseen = fmt.Sprintf("%s: %v", f.Path, f.Err)
		}
	}
	for _, d := range x.Dirs {
		see(d.Path, d.Changed)
	}
	switch {
	case after != "":
		x.strict(Fail, check, x.Restart, "containerd runs since %s and has not read %s: what it does is not what its files say", when(x.Process.Started), after)
	case maybe != "":
		x.strict(Fail, check, "tidewaiter selftest --absent tries it; "+x.Restart+" settles it", "the clock of this node is not right, or was set since containerd was started (by its clock of now, %s), so that nobody can tell whether it has read %s", when(x.Process.Started), maybe)
		x.found[len(x.found)-1].Unknown = x.enforce
	case unseen != "":
		x.strict(Fail, check, x.Restart, "not all of containerd's configuration could be looked at, so that the containerd that runs may not have read it: %s", unseen)
		x.found[len(x.found)-1].Unknown = x.enforce
	default:
		x.ok(check, "containerd was started after its configuration changed last")
	}
}

// Answers of read.
const (
	yes = iota
	no
	unclear
)

// read says whether the containerd that runs has read what changed at a time, by the
// clock as it was then. A board without a clock that keeps running boots in the past and
// is set later, once: what changed since containerd was started, d ago at most, did so
// either before that, at Listens+d, or after it, at Started+d. What changed at no such
// time is older than the process, whatever its clock said.
func (x *examination) read(changed time.Time) int {
	p := x.Process
	age := x.Now.Sub(p.Started)
	set := !p.Listens.IsZero() && p.Listens.Sub(p.Started).Abs() > starts
	switch {
	case changed.After(x.Now.Add(slack)):
		return unclear // by no clock that this node has had since, or by more than one
	case changed.After(p.Started.Add(grain)):
		if !set && x.Now.Before(x.Built.Add(-slack)) {
			return unclear // it is earlier than when this program was made: no boot of this node begins where the one before ended
		}
		return no
	case set && changed.After(p.Listens.Add(-starts)) && changed.Before(p.Listens.Add(age+slack)):
		return unclear
	}
	return yes
}

// starts is how long containerd takes at most from its start to its socket.
const starts = 2 * time.Minute

// grain is how exactly times of files and of processes can be compared.
const grain = 50 * time.Millisecond

func (x *examination) toleration() {
	key := x.Effective.Toleration
	at := ""
	if s := x.last(validator, "tolerate_missing_plugins_annotation"); s != nil {
		at = ": " + s.At()
	}
	switch {
	case key == "":
		x.ok("toleration", "no annotation lets a pod do without the gate")
	case key == guarded:
		x.strict(Warn, "toleration", "kubectl get validatingadmissionpolicybinding", "pods with the annotation %s do without the gate while it is away (tolerate_missing_plugins_annotation%s): only an admission policy keeps them from it", key, at)
	default:
		x.strict(Fail, "toleration", "remove the setting, then "+x.Restart, "every pod with the annotation %s does without the gate while it is away (tolerate_missing_plugins_annotation%s)", key, at)
	}
}

// timeouts compares how long containerd waits with how long the gate may wait.
func (x *examination) timeouts() {
	e := x.Effective
	wait := config.DefaultWait
	if x.Config != nil {
		wait = x.Config.Gate.Wait
	}
	request, err := time.ParseDuration(cmp.Or(e.RequestTimeout, "2s"))
	register, err2 := time.ParseDuration(cmp.Or(e.RegistrationTimeout, "5s"))
	const next = "remove plugin_request_timeout and plugin_registration_timeout, or raise them"
	switch {
	case err != nil || err2 != nil || request <= 0 || register <= 0:
		x.add(Warn, "timeouts", next, "containerd's timeouts of plugins are %q and %q", e.RequestTimeout, e.RegistrationTimeout)
	case request <= 2*wait:
		x.add(Fail, "timeouts", next+"; or lower gate.wait", "containerd drops a plugin after %v, and gate.wait is %v", request, wait)
	case request < time.Second || register < time.Second:
		x.add(Warn, "timeouts", next, "containerd drops a plugin after %v, and one that registers after %v: a busy node takes longer", request, register)
	default:
		x.ok("timeouts", "containerd waits %v for an answer, and the gate at most %v for a signature", request, wait)
	}
}

// handlers looks at what creates and starts containers.
func (x *examination) handlers() {
	e := x.Effective
	snapshotters, types := slices.Clone(containerd.Snapshotters), slices.Clone(containerd.Runtimes)
	var listed []string
	if x.Config != nil {
		snapshotters, types = append(snapshotters, x.Config.Gate.Snapshotters...), append(types, x.Config.Gate.Runtimes...)
		listed = append(slices.Clone(x.Config.Gate.Snapshotters), x.Config.Gate.Runtimes...)
	}
	const list = "list it under gate.%s in config.yaml if you trust it to run what containerd was asked for"
	look := func(check, field, what string, of map[string]string, main string, trusted []string) {
		bad := false
		for _, handler := range slices.Sorted(maps.Keys(of)) {
			v := of[handler]
			switch level := Warn; {
			case v == "" || slices.Contains(trusted, v):
			case handler == main:
				if level = Fail; x.Apart {
					level = Warn // its configuration, which is not seen from here, may list it
				}
				fallthrough
			default:
				bad = true
				x.strict(level, check, fmt.Sprintf(list, field), "%s %s of handler %s: all of its containers are refused", what, v, handler)
			}
		}
		if !bad {
			used := slices.Sorted(maps.Values(of))
			used = slices.DeleteFunc(slices.Compact(used), func(s string) bool { return s == "" })
			text := strings.Join(used, ", ")
			if slices.ContainsFunc(used, func(s string) bool { return slices.Contains(listed, s) }) {
				text += ", trusted because config.yaml says so"
			}
			x.ok(check, "%s: %s", what, text)
		}
	}
	by := map[string]string{}
	for handler := range e.Runtimes {
		by[handler] = cmp.Or(e.Snapshotters[handler], e.Snapshotter)
	}
	if len(by) == 0 {
		by[e.Handler] = e.Snapshotter
	}
	look("snapshotter", "snapshotters", "snapshotter", by, e.Handler, snapshotters)
	look("shim", "runtimes", "runtime type", e.Runtimes, e.Handler, types)
}

// pause looks at the image that runs before any plugin is asked.
func (x *examination) pause() {
	image := x.Effective.Pause
	if image == "" {
		x.add(Warn, "pause", "", "containerd does not say which image pods are made of")
		return
	}
	at, file := "", x.Host.Config
	if s := x.last(pauseKey[:3], pauseKey[3]); s != nil {
		at, file = " ("+s.At()+")", s.File
	}
	if !strings.Contains(image, "@") {
		next := "name it by digest in " + file + ", then " + x.Restart
		if x.Host.Extends {
			next = "write pause-image with a digest into /etc/rancher/" + x.Host.Name + "/config.yaml, then " + x.Restart
		}
		x.strict(Fail, "pause", next, "the pause image %s%s is named by a tag and not by digest, and runs before any gate is asked", image, at)
		return
	}
	if x.Images != nil {
		for _, i := range x.Images.List {
			if i.Image != image || verify.Reason(i.Reason).Inconclusive() {
				continue
			}
			if i.Allowed {
				x.ok("pause", "the pause image %s%s is named by digest, and %s", image, at, i.Reason)
				return
			}
			if slices.Contains(i.Namespaces, policy.DefaultNamespace) {
				x.ok("pause", "the pause image %s%s is named by digest, which a digest allowlist lists", image, at)
				return
			}
			x.strict(Warn, "pause", "sign it, or list its digest in a digest allowlist, for kube-system: tidewaiter explain "+image, "the pause image %s%s is named by digest, and would be refused if it were asked about: %s", image, at, i.Reason)
			return
		}
	}
	x.ok("pause", "the pause image %s%s is named by digest; whether it is verified is not known", image, at)
}

// settings are those of all files, in the order of containerd.
func (x *examination) settings() (all []node.Setting) {
	for _, f := range x.Files {
		all = append(all, f.Settings...)
	}
	return all
}

// last is the setting of a key that counts; nil: none sets it.
func (x *examination) last(table []string, key string) *node.Setting {
	var found *node.Setting
	for _, s := range x.settings() {
		if is(s, table, key) {
			found = &s
		}
	}
	return found
}

func is(s node.Setting, table []string, key string) bool {
	return len(s.Key) == len(table)+1 && s.Key[len(table)] == key && slices.Equal(s.Key[:len(table)], table)
}

// tableName is a key as TOML writes the table.
func tableName(key []string) string {
	var b strings.Builder
	for i, k := range key {
		if i > 0 {
			b.WriteByte('.')
		}
		if strings.ContainsFunc(k, func(r rune) bool {
			return !(r == '_' || r == '-' || r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z')
		}) {
			k = `"` + k + `"`
		}
		b.WriteString(k)
	}
	if len(key) == 0 {
		return "at the top"
	}
	return "[" + b.String() + "]"
}

func when(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// stamp is when for a time that may not be known.
func stamp(t *time.Time) string {
	if t == nil {
		return "a time that is not known"
	}
	return when(*t)
}
