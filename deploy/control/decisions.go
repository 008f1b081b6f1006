package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"time"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// DecisionsSchema is that of Decisions. Fields are added and never change.
const DecisionsSchema = "tidewaiter.dev/decisions/v1"

// DecisionsPath is where the socket answers with Decisions.
const DecisionsPath = "/v1/decisions"

// MaxDecisions bounds the lines of one answer, in bytes of their decisions.
const MaxDecisions = 512 << 10

// Kinds of a Line.
const (
	AnswerLine       = "answer"       // what the runtime was told
	VerificationLine = "verification" // what came of looking for signatures
)

// Decisions are the lines that one request is answered with.
type Decisions struct {
	Schema string `json:"schema"`
	Last   uint64 `json:"last"` // what to ask After for what comes next
	More   bool   `json:"more"` // there is more already
	Lines  []Line `json:"decisions"`
}

// A Filter says which lines are wanted. The zero Filter wants all.
type Filter struct {
	After  uint64    // only those with a higher Seq
	Since  time.Time // only those that are not older
	Denied bool      // only those that enforce denies or would deny, without PENDING
	Reason string    // only those of which enforce has that reason
	ID     string    // only those with that ID
}

// Wants reports whether f wants l.
func (f Filter) Wants(l Line) bool {
	if l.At.Before(f.Since) {
		return false
	}
	if !f.Denied && f.Reason == "" && f.ID == "" {
		return true
	}
	s, err := l.Said()
	return err == nil && (!f.Denied || s.Denied()) && (f.Reason == "" || f.Reason == s.Enforced()) && (f.ID == "" || f.ID == s.ID)
}

func (f Filter) query() url.Values {
	q := url.Values{"after": {strconv.FormatUint(f.After, 10)}}
	if !f.Since.IsZero() {
		q.Set("since", f.Since.UTC().Format(time.RFC3339Nano))
	}
	if f.Denied {
		q.Set("denied", "true")
	}
	if f.Reason != "" {
		q.Set("reason", f.Reason)
	}
	if f.ID != "" {
		q.Set("id", f.ID)
	}
	return q
}

// ParseFilter reads what the query of a request asks for.
func ParseFilter(q url.Values) (f Filter, err error) {
	for k := range q {
		v := q.Get(k)
		switch k {
		case "after":
			f.After, err = strconv.ParseUint(v, 10, 64)
		case "since":
			f.Since, err = time.Parse(time.RFC3339Nano, v)
		case "denied":
			f.Denied, err = strconv.ParseBool(v)
		case "reason":
			f.Reason = v
		case "id":
			f.ID = v
		default:
			err = errors.New("there is after, since, denied, reason and id")
		}
		if err != nil {
			return f, fmt.Errorf("%s: %w", text.Quote(k, 32), err)
		}
	}
	return f, nil
}

// A Line is one line of the log of decisions (cmd/internal/decisionlog) as it is read
// back. What was written is a record and no decision, so that it is not read back as one.
type Line struct {
	Seq       uint64          `json:"seq"`
	At        time.Time       `json:"at"`
	Kind      string          `json:"kind"`
	Hook      string          `json:"hook,omitempty"`
	Container string          `json:"container,omitempty"`
	Mode      string          `json:"mode"`
	Took      string          `json:"took,omitempty"`
	Repeats   uint64          `json:"repeats,omitempty"`
	Decision  json.RawMessage `json:"decision"`
}

// Said is what a Line says of its decision, as far as text needs it.
type Said struct {
	ID       string      `json:"id"`
	Allowed  bool        `json:"allowed"`
	Reason   string      `json:"reason"`
	Would    string      `json:"enforceReason"`
	Message  string      `json:"message"`
	Image    string      `json:"image"`
	Target   string      `json:"target"`
	Revision string      `json:"revision"`
	Pod      *verify.Pod `json:"pod"`
	Detail   string      `json:"detail"`
}

// Said reads the decision of l.
func (l Line) Said() (s Said, err error) {
	err = json.Unmarshal(l.Decision, &s)
	return s, err
}

// Enforced is the reason that enforce has.
func (s Said) Enforced() string {
	if s.Would != "" {
		return s.Would
	}
	return s.Reason
}

// Denied reports whether enforce denies, for good: PENDING is settled by the next try,
// and what comes of it has a line of its own. In audit, where nobody waits, it is what
// most images begin with.
func (s Said) Denied() bool {
	r := verify.Reason(s.Enforced())
	return r != verify.Verified && r != verify.AllowedByDigest && r != verify.Pending
}

// AskDecisions asks the gate whose run directory is dir for what it decided lately.
func AskDecisions(ctx context.Context, dir string, f Filter) (d Decisions, err error) {
	err = Get(ctx, dir, Question{Path: DecisionsPath, Query: f.query(), Schema: DecisionsSchema, Bytes: 2 * MaxDecisions}, &d)
	return d, err
}
