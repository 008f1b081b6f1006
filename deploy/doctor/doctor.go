// Package doctor says whether the gate of this node is in place: what containerd is
// configured with by its own account, what the gate says of itself, what the
// configuration directory holds, and where signatures come from.
//
// Gather looks, and Examine concludes; the second touches nothing. Nothing is changed
// by either. What a file or a registry says ends in the text of a Finding, cleaned.
package doctor

import (
	"fmt"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/deploy/install"
	"github.com/tidewaiter/tidewaiter/deploy/node"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// Schema is that of a Report. Fields are added and never change.
const Schema = "tidewaiter.dev/doctor/v1"

// A Level is how one check came out.
type Level string

// Levels.
const (
	OK   Level = "ok"
	Warn Level = "warn" // containers are judged all the same, or it may be meant so
	Fail Level = "fail"
)

// A Finding is one line.
type Finding struct {
	Check   string `json:"check"` // stable, see docs/doctor.md; several findings may have the same
	Level   Level  `json:"level"`
	Unknown bool   `json:"unknown,omitempty"` // it could not be found out, which is a fail
	Text    string `json:"text"`
	Next    string `json:"next,omitempty"` // what to do; a command where there is one
}

// A Report is all of them.
type Report struct {
	Schema   string    `json:"schema"`
	Result   string    `json:"result"` // ok, fail or unknown: what failed could only not be found out
	Mode     string    `json:"mode"`   // enforce or audit; empty: not known
	Findings []Finding `json:"findings"`
}

// Count is how many findings have a level.
func (r *Report) Count(l Level) (n int) {
	for _, f := range r.Findings {
		if f.Level == l {
			n++
		}
	}
	return n
}

// Facts are what was seen. What could not be has an error beside it.
type Facts struct {
	Now          time.Time
	Built        time.Time // when the program that runs was; zero: not known
	Synchronised *bool     // whether the kernel's clock is; nil: not known

	ConfigDir string // as the gate calls it
	RunDir    string
	StateDir  string // empty: nothing is kept

	Host     *node.Host
	Restart  string // what restarts containerd
	Enforces string // what makes containerd require the gate

	Process    *node.Process // the containerd that runs
	ProcessErr error
	Version    [2]int // of containerd's program
	VersionErr error

	Effective    *node.Effective
	EffectiveErr error
	Halts        []node.Halt // why containerd would not come back from a restart
	Files        []node.File
	Dirs         []Dir // that files are imported from
	FilesErr     error
	NotImported  string   // a drop-in of ours that no file imports
	Unread       []string // all files in its directory that none imports
	NRISocket    error    // why nothing can connect to it

	// Inside says that this runs in the gate's container, and not on the host, and Apart that
	// the gate runs in a container, and this on the host. Each sees what the other cannot.
	Inside, Apart bool

	Gate    *control.Status
	GateErr error
	Images  *control.Images // nil: the gate did not say

	Config    *config.Config
	ConfigErr error
	Loose     []string // of the configuration: what others than root may change, and how

	Proxies []node.Proxy

	Offline bool // no source was asked
	Sources []Source
	State   *Space // nil: there is none

	Unfinished time.Time // since when an installation is; zero: none is
}

// A Dir is a directory that files are imported from.
type Dir struct {
	Path    string
	Changed time.Time
}

// A Source is where signatures come from.
type Source struct {
	Name  string
	Host  string // whose images it was asked about
	Asked int    // images
	Err   error  // of the last; nil: it answered
}

// A Space is the file system of the state directory.
type Space struct {
	Free, Size uint64 // bytes
	Err        error  // it cannot be written to, or looked at
}

// An examination is one Examine under way.
type examination struct {
	*Facts
	enforce bool
	found   []Finding
}

func (x *examination) add(level Level, check, next, format string, a ...any) {
	if level == OK {
		next = ""
	}
	x.found = append(x.found, Finding{Check: check, Level: level, Text: text.Clean(fmt.Sprintf(format, a...), 1000), Next: text.Clean(next, 500)})
}

func (x *examination) ok(check, format string, a ...any) { x.add(OK, check, "", format, a...) }

// unknown is a fail, since it is not known that all is well.
func (x *examination) unknown(check, next, format string, a ...any) {
	x.add(Fail, check, next, format, a...)
	x.found[len(x.found)-1].Unknown = true
}

// strict is of what matters only to enforce.
func (x *examination) strict(level Level, check, next, format string, a ...any) {
	if !x.enforce {
		level, format = OK, format+" (not required in audit)"
	}
	x.add(level, check, next, format, a...)
}

// Examine says what f means. The most basic is first.
func Examine(f *Facts) *Report {
	x := &examination{Facts: f, enforce: true}
	r := &Report{Schema: Schema, Result: "ok"}
	switch {
	case f.Gate != nil && f.Gate.Mode != "":
		r.Mode = f.Gate.Mode
	case f.Config != nil:
		r.Mode = f.Config.Mode.String()
	}
	x.enforce = r.Mode != "audit"
	restart := f.Restart
	defer func() { f.Restart = restart }()
	if len(f.Halts) > 0 { // no line may advise a restart
		f.Restart = "mend what keeps containerd from starting (restart)"
	}

	x.runtime()
	x.gate()
	if !x.Unfinished.IsZero() {
		x.add(Warn, "install", "tidewaiter install", "%s", install.UnfinishedText(x.Unfinished))
	}
	x.configuration()
	x.mirrors()
	x.proxies()
	x.sources()
	x.state()
	x.clock()

	r.Findings = x.found
	for _, one := range x.found {
		switch {
		case one.Level == Fail && !one.Unknown:
			r.Result = "fail"
		case one.Level == Fail && r.Result == "ok":
			r.Result = "unknown"
		}
	}
	return r
}
