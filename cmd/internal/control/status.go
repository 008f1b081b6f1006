package control

import (
	"fmt"
	"slices"
	"time"
)

// Schemas of what the socket answers. Fields are added and never change; a change
// that breaks readers gets a new schema.
const (
	StatusSchema = "tidewaiter.dev/status/v1"
	ReadySchema  = "tidewaiter.dev/ready/v1"
)

// A Status is how things stand with a gate. Times that are not known are null.
type Status struct {
	Schema   string    `json:"schema"`
	Healthy  bool      `json:"healthy"`  // there are no problems
	Ready    bool      `json:"ready"`    // the runtime asks this gate, in the hook of the mode in force
	Problems []Problem `json:"problems"` // the most important first; see Judge
	Warnings []string  `json:"warnings"` // what does not make it unhealthy

	Node    string    `json:"node"`
	Version string    `json:"version"`
	Commit  string    `json:"commit,omitempty"`
	PID     int       `json:"pid"`
	Started time.Time `json:"started"`

	Mode      string `json:"mode"`      // enforce or audit; empty where no configuration is in force
	Assurance string `json:"assurance"` // full, bound or none; see Judge

	Configuration Configuration                `json:"configuration"`
	Runtime       Runtime                      `json:"runtime"`
	Decisions     map[string]map[string]uint64 `json:"decisions"` // since the start, by mode and reason
	Cache         Cache                        `json:"cache"`     // since the configuration is in force
	Running       Running                      `json:"running"`   // found by the last sweep
	Refresh       Refreshing                   `json:"refresh"`
	Store         *Store                       `json:"store"` // null: nothing is kept, and no bundles are read
	Log           Log                          `json:"log"`

	Stopping bool `json:"stopping"` // the gate was told to end
}

// A Problem is what is wrong and what to do next.
type Problem struct {
	Code string `json:"code"` // stable
	Text string `json:"text"`
	Next string `json:"next"` // a command where there is one
}

// Codes of problems, the most important first.
const (
	Stopping              = "STOPPING"
	NoConfiguration       = "NO_CONFIGURATION"
	NotRegistered         = "NOT_REGISTERED"
	Registering           = "REGISTERING"
	NotRequired           = "NOT_REQUIRED"
	Stranger              = "STRANGER"
	ConfigurationRejected = "CONFIGURATION_REJECTED"
	RuntimeHangs          = "RUNTIME_HANGS"
)

// Codes are the codes of all problems that there may be.
var Codes = []string{Stopping, NoConfiguration, NotRegistered, Registering, NotRequired, Stranger, ConfigurationRejected, RuntimeHangs}

// A Configuration is what is in force, and what is not.
type Configuration struct {
	Dir      string     `json:"dir"`
	Epoch    string     `json:"epoch"` // digest of its files; empty: none is in force
	Since    *time.Time `json:"since"`
	Warnings []string   `json:"warnings"`
	Rejected *Rejected  `json:"rejected"` // the last one that was; null: none was
	Awaited  bool       `json:"awaited"`  // without one the gate does not register (run --await-config)
}

// A Rejected is a configuration that was not put in force.
type Rejected struct {
	At      time.Time `json:"at"`
	Error   string    `json:"error"`
	Current bool      `json:"current"` // it still is what the directory holds
	Count   uint64    `json:"count"`   // how many were, since the start
}

// A Runtime is the gate's connection to it.
type Runtime struct {
	Registered    bool       `json:"registered"`
	Since         *time.Time `json:"since"` // when that became so
	Name          string     `json:"name"`  // of the runtime that configured the gate last
	Version       string     `json:"version"`
	Hooks         []string   `json:"hooks"` // in which it asks
	Registrations uint64     `json:"registrations"`
	Error         string     `json:"error,omitempty"` // of the last connection that ended
	ErrorAt       *time.Time `json:"errorAt"`
	Plugins       []string   `json:"plugins"`   // that the runtime listed in its last question to enforce
	Strangers     int        `json:"strangers"` // of our name, and no gate of this node
	Late          uint64     `json:"late"`      // answers beyond the gate's own time
	Stuck         int        `json:"stuck"`     // questions to containerd that have no end
	Socket        string     `json:"socket"`

	Audit bool `json:"audit"` // it was registered to audit
}

// A Cache is what the gate remembers and what it is finding out.
type Cache struct {
	Allowed    int    `json:"allowed"` // answers that are kept
	Denied     int    `json:"denied"`
	Hits       uint64 `json:"hits"`
	Misses     uint64 `json:"misses"`
	Running    int    `json:"running"` // verifications
	Waiting    int    `json:"waiting"`
	Ahead      int    `json:"ahead"` // that wait, and that nobody waits for
	Overloaded uint64 `json:"overloaded"`
}

// Running is what ran when the gate last looked.
type Running struct {
	At          *time.Time     `json:"at"`              // null: it has not looked yet
	Error       string         `json:"error,omitempty"` // why it did not see everything
	Containers  int            `json:"containers"`
	Reasons     map[string]int `json:"reasons"`     // what enforce would answer to them now
	Gone        int            `json:"gone"`        // of which the node has no image any more
	Unwitnessed int            `json:"unwitnessed"` // about which no gate was asked
	Stopped     uint64         `json:"stopped"`     // since the start
	Found       []Found        `json:"found"`       // at most 100 of those that would be denied, are gone or unwitnessed
	Pauses      []Pause        `json:"pauses"`      // images of pods' sandboxes, which start unasked
}

// A Found is a container that runs.
type Found struct {
	ID          string `json:"id"`
	Image       string `json:"image"`
	Namespace   string `json:"namespace"`
	Pod         string `json:"pod"`
	Container   string `json:"container"`
	Reason      string `json:"reason"` // what enforce would answer; empty with gone
	Detail      string `json:"detail,omitempty"`
	Gone        bool   `json:"gone"`
	Unwitnessed bool   `json:"unwitnessed"`
}

// A Pause is an image of sandboxes.
type Pause struct {
	Image  string `json:"image"`
	Pinned bool   `json:"pinned"` // by a digest
	Reason string `json:"reason"`
	Detail string `json:"detail,omitempty"`
	Gone   bool   `json:"gone"`
}

// A Store is the evidence that is on the node.
type Store struct {
	Dir        string   `json:"dir"`        // the state directory
	Signatures int      `json:"signatures"` // that are kept, without those in bundles
	Bytes      int64    `json:"bytes"`
	Error      string   `json:"error,omitempty"` // why signatures are not kept
	Bundles    []Bundle `json:"bundles"`
	Unread     string   `json:"unread,omitempty"` // why not all bundles are read
}

// A Bundle is an entry of the directory of bundles.
type Bundle struct {
	Name       string `json:"name"`
	Signatures int    `json:"signatures"`
	Error      string `json:"error,omitempty"` // why not all of it is read
}

// Refreshing is how signatures of the node's images are looked for again.
type Refreshing struct {
	Every   string     `json:"every"`   // period, 0s: only on demand
	Images  int        `json:"images"`  // that are asked about
	Failing int        `json:"failing"` // of these, those for which a source failed at the last try
	Last    *time.Time `json:"last"`    // when one was last asked about
	Next    *time.Time `json:"next"`    // when the next will be; null: not planned
	Asked   uint64     `json:"asked"`   // images, since the start, each time that they were asked about
	Failed  uint64     `json:"failed"`  // of these, those times that a source failed
	New     uint64     `json:"new"`     // signatures that came so, since the start
	Error   string     `json:"error,omitempty"`
}

// A Log is the gate's log.
type Log struct {
	Dropped uint64 `json:"dropped"` // lines that it was too slow for, since the start
}

// A Readiness is what a probe needs to know.
type Readiness struct {
	Schema string `json:"schema"`
	Ready  bool   `json:"ready"`
	Reason string `json:"reason,omitempty"` // code of a Problem; empty when ready
	Detail string `json:"detail,omitempty"`
}

// Readiness is s for a probe.
func (s *Status) Readiness() Readiness {
	r := Readiness{Schema: ReadySchema, Ready: s.Ready}
	if !r.Ready && len(s.Problems) > 0 {
		r.Reason, r.Detail = s.Problems[0].Code, s.Problems[0].Text
	}
	return r
}

// How sure a denial is.
const (
	Full  = "full"  // what was verified is what runs, compared when the container is created
	Bound = "bound" // the same; the image's config is compared only when it starts
	None  = "none"  // nothing is refused, or nobody asks
)

// Assurances are all that there are.
var Assurances = []string{Full, Bound, None}

// Judge says from all other fields whether s is ready and healthy, what is wrong,
// and how sure a denial is.
func (s *Status) Judge() {
	s.Schema, s.Problems = StatusSchema, []Problem{}
	found := func(code, next, format string, args ...any) {
		s.Problems = append(s.Problems, Problem{code, fmt.Sprintf(format, args...), next})
	}
	c, r := &s.Configuration, &s.Runtime
	current := c.Rejected != nil && c.Rejected.Current

	if s.Stopping {
		found(Stopping, "wait for the next one to start", "the gate was told to end")
	}
	if c.Epoch == "" {
		why := "it was not read yet"
		if current {
			why = c.Rejected.Error
		}
		meanwhile := "every container is denied"
		if c.Awaited {
			meanwhile = "the gate does not register before there is one"
		}
		found(NoConfiguration, "put a configuration into "+c.Dir+"; it is read at once", "no configuration is in force and %s: %s", meanwhile, why)
	}
	switch {
	case c.Epoch == "" && c.Awaited: // that is why
	case !r.Registered:
		why := "not yet"
		if r.Error != "" {
			why = r.Error
		}
		found(NotRegistered, "tidewaiter doctor; ls -l "+r.Socket, "the runtime does not ask this gate: %s", why)
	case c.Epoch != "" && r.Audit != (s.Mode == "audit"):
		found(Registering, "wait a moment", "the mode changed to %s, and the gate registers anew", s.Mode)
	}
	s.Ready = len(s.Problems) == 0

	if s.Ready && s.Mode == "enforce" && len(r.Plugins) > 0 && !slices.Contains(r.Plugins, validator) {
		found(NotRequired, "tidewaiter install --enforce --restart",
			"containerd does not require the gate: when the gate is away containers start without being asked about")
	}
	if r.Strangers > 0 {
		found(Stranger, "find what else connects to "+r.Socket+": ss -xp | grep nri",
			"%d plugins that are not gates of this node are registered under the gate's name: containerd takes them for it when it is away", r.Strangers)
	}
	if c.Epoch != "" && current {
		found(ConfigurationRejected, "correct what it names; the directory is read again at once",
			"the configuration was rejected and the last good one is in force: %s", c.Rejected.Error)
	}
	if r.Stuck > 0 {
		found(RuntimeHangs, "look at containerd and its log: tidewaiter doctor", "containerd does not answer %d questions of the gate, for which containers are refused", r.Stuck)
	}
	s.Healthy = len(s.Problems) == 0

	switch {
	case !s.Ready || s.Mode != "enforce":
		s.Assurance = None
	case slices.Contains(r.Hooks, compares):
		s.Assurance = Bound
	default:
		s.Assurance = Full
	}
}

const (
	// validator is what containerd lists where it requires plugins at all.
	validator = "00-default-validator"
	// compares is the hook that the gate asks for where the runtime does not say
	// before which image's config it runs (containerd before 2.4).
	compares = "StartContainer"
)
