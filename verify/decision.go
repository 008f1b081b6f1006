package verify

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify/text"
)

// A Decision is the answer. The zero Decision denies with INTERNAL.
//
// Only allow and audit, below, set allowed. A Decision can be written as JSON
// (Report) and cannot be read back: nothing on a disk or on a wire can be an
// allow.
type Decision struct {
	allowed bool
	proof   []proof // one for each leaf of the requirement that is met by it

	Reason   Reason
	Would    Reason        // with AUDIT_ONLY: what enforce would have answered
	Rule     string        // name of the rule or statement; empty where none matched
	Revision Revision      // of the configuration that it was made under
	Key      Key           // of the question; zero where the image was not bound
	Binding  Binding       // how the image was tied to what runs
	Signers  []Signer      // who met the rule; for a denial, who was seen
	Signed   digest.Digest // what they signed: target, manifest or another target of the same config
	Source   string        // where the deciding evidence came from
	Tried    []Attempt     // each source that was asked and what it said
	Warnings []Reason      // checks that failed and that the statement only logs

	// Metadata are the annotations that the signer signed with the image (by
	// sign --user-metadata, say): at most 32, keys up to 128 bytes and values up to 512;
	// what is longer is left out. Only with VERIFIED.
	Metadata map[string]string

	Detail string // one clause for a person
	Made   time.Time
	Until  time.Time // when the answer ends; zero: good for this once
	Ends   string    // what it is that ends then, see Finding.Ends
}

// An Attempt is what one source said.
type Attempt struct {
	Source string `json:"source"`
	Reason Reason `json:"reason"`
	Seen   int    `json:"signatures"` // how many signatures it handed over
	Detail string `json:"detail,omitempty"`
	kind   string // of evidence that was asked for
	holds  bool   // the image, as far as is known
	lacks  bool   // the image, as it says
}

// Allowed reports whether the image may run.
func (d Decision) Allowed() bool { return d.allowed }

// EnforceReason is the Reason of what enforce answers, also where the node audits.
func (d Decision) EnforceReason() Reason {
	if d.Reason == AuditOnly {
		return d.Would
	}
	return Reason(d.Reason.String())
}

// Deny makes a denial. A reason that allows is no reason to deny: it becomes
// INTERNAL. The detail is cut, since denials are kept and it may be a registry's.
func Deny(r Reason, detail string) Decision {
	return Decision{Reason: r.denial(), Detail: clip(detail)}
}

// allow makes the Decision that lets an image run: the only place in the program
// that does. It looks again at everything that an allow rests on, so that a
// mistake of a caller ends as a denial. There are two things that it may rest on:
// findings over the image's subjects, by distinct identities, that meet the whole
// requirement, and a digest of the image that a file of the node lists.
func allow(q Question, found []proof, now time.Time) Decision {
	fault, listed := q.Validate(), q.listed()
	if listed {
		fault = q.Image.validate()
	}
	if fault != nil {
		return Deny(fault.Reason, fault.Detail)
	}
	var chosen, usable []proof
	var ended time.Time
	for _, p := range found {
		over := slices.ContainsFunc(q.Image.subjects(), func(s ocispec.Descriptor) bool { return s.Digest != "" && s.Digest == p.finding.Signed })
		switch until := p.finding.Until; {
		case listed && p.finding.Reason == AllowedByDigest && p.finding.Signed == q.Rule.Digest:
			chosen = []proof{p}
		case listed || p.finding.Reason != Verified || !over:
		case !until.IsZero() && !now.Before(until):
			ended = until
		default:
			usable = append(usable, p)
		}
	}
	if !listed {
		chosen, _ = pick(usable, q.Rule.Require.Choose)
	}
	switch {
	case len(chosen) == 0 && !ended.IsZero():
		return Deny(SignatureExpired, "what the answer rests on ended at "+ended.UTC().Format(time.RFC3339))
	case len(chosen) == 0, !listed && !q.Rule.Require.Met(claims(chosen)):
		return Deny(Internal, "the finding does not support an allow")
	}
	first := chosen[0].finding
	d := Decision{
		allowed: true, Reason: first.Reason, Signed: first.Signed, Metadata: first.Metadata,
		Detail: first.Detail, Made: now, Until: first.Until, Ends: first.Ends,
	}
	for _, p := range chosen {
		f := p.finding
		if f.Until.Before(d.Until) {
			d.Until, d.Ends = f.Until, f.Ends
		}
		if f.Signer != (Signer{}) {
			d.Signers = append(d.Signers, f.Signer)
		}
		d.Warnings = append(d.Warnings, f.Warnings...)
		d.proof = append(d.proof, proof{leaf: p.leaf, finding: f})
	}
	d.Warnings = d.Warnings[:min(len(d.Warnings), MaxRelated)]
	return d
}

// After is q for an Evaluator that goes on where another one ended with d.
func (q Question) After(d Decision) Question {
	q.Tried, q.found = d.Tried, d.proof
	return q
}

// Final is d without what only After needs.
func (d Decision) Final() Decision {
	if !d.allowed {
		d.proof = nil
	}
	return d
}

// Renew answers q by what the answer was to a question with the same Key rests on: all
// of it is looked at once more under the rule and the clock that hold now.
func Renew(q Question, was Decision, now time.Time) Decision {
	d := Deny(Internal, "the answer is to another question")
	if was.allowed && was.Key == q.Key() {
		d = allow(q, was.proof, now)
	}
	if d.allowed {
		d.Source, d.Tried, d.Made = was.Source, was.Tried, was.Made
	}
	q.name(&d)
	return d
}

// audit turns a denial into an allow where the configuration only audits, and
// keeps what enforce would have said. It is the last thing that happens to a
// Decision, and the only function besides allow that can let an image run.
func audit(d Decision, m Mode) Decision {
	if m == Audit && !d.allowed {
		d.Would, d.Reason, d.allowed = Reason(d.Reason.String()), AuditOnly, true
	}
	return d
}

// MaxMessage is the length of a Message in bytes. It leaves room for what NRI,
// containerd and the kubelet put in front of it below the 1,024 bytes of an Event.
const MaxMessage = 640

// Message is the one line that a person reads, at most MaxMessage bytes, code
// first since user interfaces cut it. It names img, since one Decision answers
// for many names, and the node where that command has the whole story. Everything
// that is not ours is quoted and cut.
func (d Decision) Message(img Image, node string) string {
	var b strings.Builder
	b.WriteString("tidewaiter: ")
	r := d.EnforceReason()
	switch {
	case !d.allowed:
		b.WriteString("denied")
		r = d.Reason
	case d.Reason == AuditOnly:
		b.WriteString("allowed [AUDIT_ONLY], enforce would deny")
	default:
		b.WriteString("allowed")
	}
	b.WriteString(" [" + text.Clean(r.String(), 32) + "] " + img.Name.Describe(img.Asked, img.Target.Digest))
	tail := ""
	if d.Rule != "" {
		tail += "; rule " + text.Quote(d.Rule, 64)
	}
	if node != "" {
		tail += "; on node " + text.Clean(node, 64) + ": tidewaiter explain " + d.ID()
	}
	if room := MaxMessage - b.Len() - len(tail) - len(": "); d.Detail != "" && room > 0 {
		b.WriteString(": " + text.Clean(d.Detail, room))
	}
	b.WriteString(tail)
	return b.String()
}

// ID is short, stable and the same on every node: a hash of the question and the
// reason. Where the image could not be bound there is no question; then it is one
// of the detail, which says what was in the way.
func (d Decision) ID() string {
	h := sha256.New()
	h.Write(d.Key.bytes())
	h.Write([]byte(d.EnforceReason().String()))
	if d.Key == (Key{}) {
		h.Write([]byte(d.Detail))
	}
	return hex.EncodeToString(h.Sum(nil)[:6])
}

// Schema names the JSON form of a Report. Fields may be added under the same
// name; none is removed or changes its meaning.
const Schema = "tidewaiter.dev/decision/v1"

// A Report is a Decision about one image as scripts and logs read it. It is
// output only.
type Report struct {
	Schema   string            `json:"schema"`
	ID       string            `json:"id"`
	Allowed  bool              `json:"allowed"`
	Reason   Reason            `json:"reason"`
	Would    Reason            `json:"enforceReason,omitempty"`
	Message  string            `json:"message"`
	Image    string            `json:"image"`
	Target   string            `json:"target,omitempty"`
	Manifest string            `json:"manifest,omitempty"`
	Config   string            `json:"config,omitempty"`
	Binding  Binding           `json:"binding"`
	Pod      *Pod              `json:"pod,omitempty"`
	Rule     string            `json:"rule,omitempty"`
	Revision string            `json:"revision"`
	Signers  []Signer          `json:"signers"`
	Signed   string            `json:"signed,omitempty"`
	Source   string            `json:"source,omitempty"`
	Metadata map[string]string `json:"metadata,omitempty"`
	Tried    []Attempt         `json:"attempts"`
	Warnings []Reason          `json:"warnings,omitempty"`
	Detail   string            `json:"detail,omitempty"`
	Made     time.Time         `json:"decidedAt"`
	Until    *time.Time        `json:"expiresAt,omitempty"`
	Ends     string            `json:"expiresBecause,omitempty"` // what it is that ends then
}

// Report makes the report of d about img on node.
func (d Decision) Report(img Image, node string) Report {
	r := Report{
		Schema: Schema, ID: d.ID(), Allowed: d.allowed, Reason: d.Reason, Would: d.Would,
		Message: d.Message(img, node), Image: text.Clean(img.Name.String(), 512),
		Target: img.Target.Digest.String(), Manifest: img.Manifest.Digest.String(), Config: img.Config.String(),
		Binding: d.Binding, Rule: d.Rule, Revision: d.Revision.String(),
		Signers: append([]Signer{}, d.Signers...), Signed: d.Signed.String(), Source: d.Source, Metadata: maps.Clone(d.Metadata),
		Tried: append([]Attempt{}, d.Tried...), Warnings: d.Warnings, Detail: text.Clean(d.Detail, MaxMessage), Made: d.Made.UTC(),
	}
	if img.Name.Path == "" {
		r.Image = text.Clean(img.Asked, 512)
	}
	if img.Pod != (Pod{}) {
		r.Pod = new(img.Pod)
	}
	if !d.Until.IsZero() {
		r.Until, r.Ends = new(d.Until.UTC()), d.Ends
	}
	return r
}

// MarshalJSON writes the decision's own part of a Report.
func (d Decision) MarshalJSON() ([]byte, error) { return json.Marshal(d.Report(Image{}, "")) }

// UnmarshalJSON always fails: a Decision is made, never read.
func (*Decision) UnmarshalJSON([]byte) error {
	return errors.New("a decision cannot be read from JSON")
}
