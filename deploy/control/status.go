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
	Store         *Store                       `json:"store"`                 // null: nothing is kept, and no archives are read
	Images        string                       `json:"imagesError,omitempty"` // why the images of the node cannot be listed
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
	RuntimeBusy           = "RUNTIME_BUSY"
	Registering           = "REGISTERING"
	NotRequired           = "NOT_REQUIRED"
	DuplicatePlugin       = "DUPLICATE_PLUGIN"
	ConfigurationRejected = "CONFIGURATION_REJECTED"
	RuntimeHangs          = "RUNTIME_HANGS"
	TooManyImages         = "TOO_MANY_IMAGES"
)

// Codes are the codes of all problems that there may be.
var Codes = []string{Stopping, NoConfiguration, NotRegistered, RuntimeBusy, Registering, NotRequired, DuplicatePlugin, ConfigurationRejected, RuntimeHangs, TooManyImages}

// A Configuration is what is in force, and what is not.
type Configuration struct {
	Dir              string     `json:"dir"`
	Revision         string     `json:"revision"` // digest of its files; empty: none is in force
	Since            *time.Time `json:"since"`
	Warnings         []string   `json:"warnings"`
	Rejected         *Rejected  `json:"rejected"`         // the last one that was; null: none was
	WaitingForConfig bool       `json:"waitingForConfig"` // without one the gate does not register (run --await-config)
	Lowered          *time.Time `json:"lowered"`          // since when it audits, after one that enforced; null: none did
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
	Registered       bool       `json:"registered"`
	Since            *time.Time `json:"since"` // when that became so
	Name             string     `json:"name"`  // of the runtime that configured the gate last
	Version          string     `json:"version"`
	Hooks            []string   `json:"hooks"` // in which it asks
	Registrations    uint64     `json:"registrations"`
	Error            string     `json:"error,omitempty"` // of the last connection that ended
	ErrorAt          *time.Time `json:"errorAt"`
	Plugins          []string   `json:"plugins"`          // that the runtime listed in its last question to enforce
	DuplicatePlugins int        `json:"duplicatePlugins"` // of our name, and no gate of this node
	Slow             uint64     `json:"slow"`             // answers beyond the gate's own time
	Hung             int        `json:"hung"`             // questions to containerd that have no end
	Socket           string     `json:"socket"`

	Audit bool `json:"audit"` // it was registered to audit

	AwaitingSync *time.Time `json:"awaitingSync"`        // since when the runtime has the registration and holds it up (RUNTIME_BUSY); null: it does not
	Held         string     `json:"held,omitempty"`      // why the gate stays registered to audit although the mode is enforce
	Uncounted    *time.Time `json:"uncounted,omitempty"` // since when the gate cannot find out which pods and containers there are
}

// A Cache is what the gate remembers and what it is finding out.
type Cache struct {
	Allowed     int    `json:"allowed"` // answers that are kept
	Denied      int    `json:"denied"`
	Hits        uint64 `json:"hits"`
	Misses      uint64 `json:"misses"`
	Running     int    `json:"running"` // verifications
	Waiting     int    `json:"waiting"`
	Prefetching int    `json:"prefetching"` // that wait, and that nobody waits for
	Overloaded  uint64 `json:"overloaded"`
}

// Running is what ran when the gate last looked.
type Running struct {
	At           *time.Time     `json:"at"`              // null: it has not looked yet
	Error        string         `json:"error,omitempty"` // why it did not see everything
	Containers   int            `json:"containers"`
	Reasons      map[string]int `json:"reasons"`      // what enforce would answer to them now
	ImageMissing int            `json:"imageMissing"` // of which the node has no image any more
	Ungated      int            `json:"ungated"`      // about which no gate was asked
	Stopped      uint64         `json:"stopped"`      // since the start
	Found        []Found        `json:"found"`        // at most 100 of those that would be denied, have no image or are ungated
	Pauses       []Pause        `json:"pauses"`       // images of pods' sandboxes, which start unasked
}

// A Found is a container that runs.
type Found struct {
	ID           string `json:"id"`
	Image        string `json:"image"`
	Namespace    string `json:"namespace"`
	Pod          string `json:"pod"`
	Container    string `json:"container"`
	Reason       string `json:"reason"` // what enforce would answer; empty with imageMissing
	Detail       string `json:"detail,omitempty"`
	ImageMissing bool   `json:"imageMissing"`
	Ungated      bool   `json:"ungated"`
}

// A Pause is an image of sandboxes.
type Pause struct {
	Image        string `json:"image"`
	Pinned       bool   `json:"pinned"` // by a digest
	Reason       string `json:"reason"`
	Detail       string `json:"detail,omitempty"`
	ImageMissing bool   `json:"imageMissing"`
}

// A Store is the evidence that is on the node.
type Store struct {
	Dir        string    `json:"dir"`        // the state directory
	Signatures int       `json:"signatures"` // that are kept, without those in archives
	Bytes      int64     `json:"bytes"`
	Error      string    `json:"error,omitempty"` // why signatures are not kept
	Archives   []Archive `json:"archives"`
	Unread     string    `json:"unread,omitempty"` // why not all archives are read
}

// A Archive is an entry of the directory of archives.
type Archive struct {
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
	AtCreate = "atCreate" // what was verified is what runs, compared when the container is created
	AtStart  = "atStart"  // the same; the image's config is compared only when it starts
	None     = "none"     // nothing is refused, or nobody asks
)

// Assurances are all that there are.
var Assurances = []string{AtCreate, AtStart, None}

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
	if c.Revision == "" {
		why := "it was not read yet"
		if current {
			why = c.Rejected.Error
		}
		meanwhile := "every container is denied"
		if c.WaitingForConfig {
			meanwhile = "the gate does not register before there is one"
		}
		found(NoConfiguration, "put a configuration into "+c.Dir+"; it is read at once", "no configuration is in force and %s: %s", meanwhile, why)
	}
	switch {
	case c.Revision == "" && c.WaitingForConfig: // that is why
	case r.AwaitingSync != nil:
		found(RuntimeBusy, "it goes on by itself when that has ended; to end it: docs/lockout.md, \"The runtime holds up the registration\"",
			"containerd has the gate's registration since %s and does not go on with it: it waits for container operations that are under way to end, such as the stop of a container with a long grace period, and later ones wait behind it",
			r.AwaitingSync.UTC().Format(time.RFC3339))
	case !r.Registered:
		why := "not yet"
		if r.Error != "" {
			why = r.Error
		}
		found(NotRegistered, "tidewaiter doctor; ls -l "+r.Socket, "the runtime does not ask this gate: %s", why)
	case c.Revision != "" && r.Audit && s.Mode != "audit" && r.Held != "":
		found(Registering, "delete the pods that it names", "the mode changed to %s, and the gate stays registered to audit, where containers start if it gives no answer, since it could not register again: %s", s.Mode, r.Held)
	case c.Revision != "" && r.Audit && s.Mode != "audit":
		found(Registering, "wait a moment", "the mode changed to %s, and the gate registers anew", s.Mode)
	}
	s.Ready = len(s.Problems) == 0

	if s.Ready && s.Mode == "enforce" && len(r.Plugins) > 0 && !slices.Contains(r.Plugins, validator) {
		found(NotRequired, "tidewaiter install --enforce --restart",
			"containerd does not require the gate: when the gate is away containers start without being asked about")
	}
	if r.DuplicatePlugins > 0 {
		found(DuplicatePlugin, "find what else connects to "+r.Socket+": ss -xp | grep nri",
			"%d plugins that are not gates of this node are registered under the gate's name: containerd takes them for it when it is away", r.DuplicatePlugins)
	}
	if c.Revision != "" && current {
		found(ConfigurationRejected, "correct what it names; the directory is read again at once",
			"the configuration was rejected and the last good one is in force: %s", c.Rejected.Error)
	}
	if r.Hung > 0 {
		found(RuntimeHangs, "look at containerd and its log: tidewaiter doctor", "containerd does not answer %d questions of the gate, for which containers are refused", r.Hung)
	}
	if s.Images != "" {
		found(TooManyImages, "remove images that nothing uses: crictl rmi --prune",
			"the images of the node cannot be listed, so that none is verified ahead of time and image volumes are refused: %s", s.Images)
	}
	s.Healthy = len(s.Problems) == 0

	switch {
	case !s.Ready || s.Mode != "enforce":
		s.Assurance = None
	case slices.Contains(r.Hooks, compares):
		s.Assurance = AtStart
	default:
		s.Assurance = AtCreate
	}
}

const (
	// validator is what containerd lists where it requires plugins at all.
	validator = "00-default-validator"
	// compares is the hook that the gate asks for where the runtime does not say
	// before which image's config it runs (containerd before 2.4).
	compares = "StartContainer"
)
