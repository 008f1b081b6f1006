package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/verify"
)

// gate is what the gate says of itself.
func (x *examination) gate() {
	s := x.Gate
	if s == nil {
		next := "start it: " + x.Host.Manager.Begin() + "; where it is not installed: tidewaiter install"
		if errors.Is(x.GateErr, fs.ErrPermission) {
			x.unknown("gate", "run it as root", "the gate cannot be asked: %v", x.GateErr)
			return
		}
		then := ""
		if e := x.Effective; e != nil && e.Requires(plugin) {
			then = "; containerd refuses every container until one does"
		}
		x.add(Fail, "gate", next, "no gate runs here, or it cannot be asked: %v%s", x.GateErr, then)
		return
	}
	x.ok("gate", "tidewaiter %s runs since %s: process %d", s.Version, when(s.Started), s.PID)
	registered := s.Runtime.Registered
	for _, p := range s.Problems {
		switch p.Code {
		case control.ConfigurationRejected, control.NoConfiguration:
			continue // which the directory says, with file and line
		case control.NotRegistered, control.RuntimeBusy, control.Registering:
			registered = false
		case control.NotRequired:
			x.strict(Fail, "registered", p.Next, "%s", p.Text)
			continue
		}
		x.add(Fail, "registered", p.Next, "%s", p.Text)
	}
	r := s.Runtime
	if registered {
		x.ok("registered", "%s %s asks this gate in %s since %s", r.Name, r.Version, strings.Join(r.Hooks, " and "), stamp(r.Since))
	}
	if e := x.Effective; e != nil && !same(e.NRISocket, r.Socket) {
		x.add(Fail, "registered", "start the gate with --nri-socket "+e.NRISocket, "the gate connects to %s, and containerd listens at %s", r.Socket, e.NRISocket)
	}
	switch {
	case s.Mode == "":
	case s.Mode == "audit":
		x.ok("mode", "audit: nothing is refused")
	case s.Assurance == control.None:
		x.add(Fail, "mode", "tidewaiter status", "enforce, and nothing is refused by this gate: see above")
	default:
		x.ok("mode", "enforce, assurance %s", s.Assurance)
	}
	if r.Uncounted != nil {
		x.add(Warn, "registered", "tidewaiter status, and containerd's log", "since %s the gate cannot find out which pods and containers there are: those that ended count too, and if it has to register again it may not be able to", r.Uncounted.UTC().Format(time.RFC3339))
	}
	namesakes := 0
	for _, name := range r.Plugins {
		if _, name, _ := strings.Cut(name, "-"); name == plugin {
			namesakes++
		}
	}
	if namesakes > 1 && r.DuplicatePlugins == 0 {
		x.strict(Fail, "plugins", "end the others, such as the DaemonSet's: kubectl label node NAME tidewaiter.dev/gate=host. During an upgrade, and until a container was created after it, there are two",
			"%d gates were asked about the last container, and containerd takes each for the one that it requires: one that audits is enough for it", namesakes)
	}
	for _, name := range r.Plugins {
		if i, other, _ := strings.Cut(name, "-"); i == index && other != plugin {
			x.strict(Warn, "plugins", "give it a lower index", "the plugin %s has the gate's index: it may work after the gate was counted as present", name)
		}
	}
}

// configuration compares what is on the disk with what is in force.
func (x *examination) configuration() {
	const check = "configuration"
	s := x.Gate
	if x.Apart {
		x.apart()
		return
	}
	if s != nil && s.Configuration.Dir != "" && s.Configuration.Dir != x.ConfigDir {
		x.add(Warn, check, "tidewaiter doctor --config-dir "+s.Configuration.Dir, "the gate reads %s, and this is about %s", s.Configuration.Dir, x.ConfigDir)
	}
	for i, l := range x.Loose {
		if i == shown {
			x.add(Warn, check, "chown -R root: "+x.ConfigDir+"; chmod -R go-w "+x.ConfigDir, "and %d more", len(x.Loose)-shown)
			break
		}
		x.add(Warn, check, "chown -R root: "+x.ConfigDir+"; chmod -R go-w "+x.ConfigDir, "%s: users who can write there decide what starts on this node", l)
	}
	if err := x.ConfigErr; err != nil {
		next := "tidewaiter policy check --config-dir " + x.ConfigDir
		then := ""
		switch {
		case errors.Is(err, fs.ErrPermission):
			x.unknown(check, "run it as root", "the configuration cannot be read: %v", err)
			return
		case s == nil:
		case s.Configuration.Revision == "":
			then = "; none is in force: every container is refused"
		default:
			then = "; the last good one stays in force"
		}
		if errors.Is(err, config.ErrNone) {
			next = "write config.yaml and trustpolicy.json into " + x.ConfigDir
		}
		x.add(Fail, check, next, "the configuration is not valid: %v%s", err, then)
		return
	}
	c := x.Config
	switch {
	case s == nil:
		x.ok(check, "%s is valid, mode %s", c.Dir, c.Mode)
	case s.Configuration.Revision != c.Revision.String():
		x.add(Fail, check, fmt.Sprintf("kill -HUP %d, and read its log", s.PID), "what %s holds (revision %s, mode %s) is not what is in force (revision %s, mode %s)", c.Dir, c.Revision, c.Mode, s.Configuration.Revision, s.Mode)
	default:
		x.ok(check, "%s is valid and in force: mode %s, revision %s", c.Dir, c.Mode, c.Revision)
	}
	for i, w := range c.Warnings {
		if i == shown {
			x.add(Warn, check, "tidewaiter policy check", "and %d more", len(c.Warnings)-shown)
			break
		}
		x.add(Warn, check, "tidewaiter policy check", "%s", w.String())
	}
}

// inItsPod is where the rest is to be asked of a gate that runs in a container.
const inItsPod = "kubectl -n tidewaiter-system exec POD -- /tidewaiter doctor"

// apart is what a gate in a container says of its configuration, which is there alone.
func (x *examination) apart() {
	const check = "configuration"
	if x.Gate == nil {
		return // which the gate's finding says
	}
	switch c := x.Gate.Configuration; {
	case c.Rejected != nil && c.Rejected.Current && c.Revision == "":
		x.add(Fail, check, "correct it in its ConfigMaps", "the gate runs in a container and rejected its configuration: %s; none is in force: every container is refused", c.Rejected.Error)
	case c.Rejected != nil && c.Rejected.Current:
		x.add(Fail, check, "correct it in its ConfigMaps", "the gate runs in a container and rejected its configuration: %s; the last good one stays in force", c.Rejected.Error)
	case c.Revision == "":
		x.add(Fail, check, "tidewaiter status", "the gate runs in a container, and has no configuration: every container is refused")
	default:
		x.ok(check, "the gate runs in a container, and has its configuration from there: mode %s, revision %s", x.Gate.Mode, c.Revision)
		for i, w := range c.Warnings {
			if i == shown {
				x.add(Warn, check, inItsPod, "and %d more", len(c.Warnings)-shown)
				break
			}
			x.add(Warn, check, inItsPod, "%s", w)
		}
	}
	x.ok("sources", "are not asked from here: %s does", inItsPod)
}

// same reports whether two paths are those of one socket: /var/run is a link to /run.
func same(a, b string) bool {
	short := func(s string) string { return strings.TrimPrefix(s, "/var") }
	return a == "" || b == "" || short(a) == short(b)
}

// state is what the gate keeps.
func (x *examination) state() {
	const check = "state"
	switch s := x.State; {
	case x.StateDir == "":
		x.add(Warn, check, "", "nothing is kept: without a mirror no image is allowed after a restart")
	case s == nil:
	case errors.Is(s.Err, fs.ErrPermission):
		x.unknown(check, "run it as root", "%s: %v", x.StateDir, s.Err)
	case s.Err != nil:
		x.add(Fail, check, "make it writable for the gate", "%s: %v", x.StateDir, s.Err)
	case s.Free < full:
		x.add(Fail, check, "make room", "%s: %d of %d MiB are free: signatures are not kept", x.StateDir, s.Free>>20, s.Size>>20)
	case s.Free < tight:
		x.add(Warn, check, "make room", "%s: only %d of %d MiB are free", x.StateDir, s.Free>>20, s.Size>>20)
	default:
		x.ok(check, "%s can be written to, and %d MiB are free", x.StateDir, s.Free>>20)
	}
	if x.Gate == nil || x.Gate.Store == nil {
		return
	}
	k := x.Gate.Store
	if k.Error != "" {
		x.add(Fail, check, "look at "+k.Dir, "signatures are not kept: %s", k.Error)
	}
	bad := 0
	for _, b := range k.Archives {
		if b.Error == "" {
			continue
		}
		if bad++; bad <= shown {
			x.add(Warn, "archives", "tidewaiter evidence inspect "+b.Name+", in archives of the state directory", "evidence archive %s cannot be read, or not all of it: %s", b.Name, b.Error)
		}
	}
	if k.Unread != "" {
		x.add(Warn, "archives", "take some away, or mend the disk that they are on", "not all evidence archives are read: %s", k.Unread)
	}
	if bad == 0 && k.Unread == "" {
		x.ok("archives", "%d signatures are kept, and %d evidence archives can be read", k.Signatures, len(k.Archives))
	}
}

// Bounds of the state directory, in bytes. A signature takes some kilobytes.
const (
	full  = 1 << 20
	tight = 32 << 20
)

// clock looks for signs that it is wrong. Certificates are judged by it.
func (x *examination) clock() {
	after, what := x.Built, "this program was built"
	if c := x.Gate; c != nil && c.Started.After(after) {
		after, what = c.Started, "the gate was started"
	}
	for _, f := range x.Files {
		if f.Changed.After(after) {
			after, what = f.Changed, f.Path+" changed"
		}
	}
	switch {
	case x.Now.Before(after.Add(-slack)):
		x.add(Fail, "clock", "set the clock: timedatectl", "it is %s, and %s at %s", when(x.Now), what, when(after))
	case x.Synchronised != nil && !*x.Synchronised:
		x.add(Warn, "clock", "timedatectl, or chronyc tracking", "it is %s, and nothing keeps the clock right: the kernel calls it unsynchronised", when(x.Now))
	default:
		x.ok("clock", "it is %s", when(x.Now))
	}
}

// slack is what clocks of file servers may differ.
const slack = 2 * time.Minute

func (x *examination) sources() {
	const check = "sources"
	if x.Config == nil || x.Offline {
		return
	}
	if c := x.Config; len(x.Sources) == 0 && c.Mode == verify.Enforce && c.Network == config.NetworkMirrors && len(c.Summary().Mirrors) == 0 {
		x.add(Warn, check, "write sources.mirrors or sources.certsDir; or network: never, if that is meant", "nobody is asked for signatures: images that the node has none of are refused")
		return
	}
	if len(x.Sources) == 0 {
		x.ok(check, "nobody is asked for signatures: the node has what it has")
		return
	}
	slices.SortStableFunc(x.Sources, func(a, b Source) int { return strings.Compare(a.Name, b.Name) })
	for _, s := range x.Sources {
		s.finding(x)
	}
}
