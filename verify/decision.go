package verify

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"maps"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/opencontainers/go-digest"
)

// A Decision is the answer. The zero Decision denies with INTERNAL.
//
// Only allow and audit, below, set allowed. A Decision can be written as JSON
// (Report) and cannot be read back: nothing on a disk or on a wire can be an
// allow.
type Decision struct {
	allowed bool

	Reason   Reason
	Would    Reason        // with AUDIT_ONLY: what enforce would have answered
	Rule     string        // name of the rule or statement; empty where none matched
	Epoch    Epoch         // of the configuration that it was made under
	Key      Key           // of the question; zero where the image was not bound
	Binding  Binding       // how the image was tied to what runs
	Signers  []Signer      // who met the rule; for a denial, who was seen
	Signed   digest.Digest // what they signed: target, manifest or another target of the same config
	Source   string        // where the deciding evidence came from
	Tried    []Attempt     // each source that was asked and what it said
	Warnings []Reason      // checks that failed and that the statement only logs

	// Metadata are the annotations that the signer signed with the image (notation
	// sign --user-metadata): at most 32, keys up to 128 bytes and values up to 512;
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
}

// Allowed reports whether the image may run.
func (d Decision) Allowed() bool { return d.allowed }

// Deny makes a denial. A reason that allows is no reason to deny: it becomes
// INTERNAL. The detail is cut, since denials are kept and it may be a registry's.
func Deny(r Reason, detail string) Decision {
	return Decision{Reason: r.denial(), Detail: clip(detail)}
}

// allow makes the Decision that lets an image run: the only place in the program
// that does. It looks again at everything that an allow rests on, so that a
// mistake of a caller ends as a denial. There are two things that it may rest on:
// a signature over one of the image's subjects, and a digest of the image that a
// file of the node lists.
func allow(q Question, f Finding, now time.Time) Decision {
	supported, unfit := false, q.Unfit()
	if q.listed() {
		supported, unfit = f.Reason == AllowedByDigest && f.Signed == q.Rule.Digest, q.Image.unfit()
	} else if f.Reason == Verified {
		for _, s := range q.Image.subjects() {
			supported = supported || s.Digest != "" && s.Digest == f.Signed
		}
	}
	switch {
	case unfit != nil:
		return Deny(unfit.Reason, unfit.Detail)
	case !supported:
		return Deny(Internal, "the finding does not support an allow")
	case !f.Until.IsZero() && !now.Before(f.Until):
		return Deny(SignatureExpired, "what the answer rests on ended at "+f.Until.UTC().Format(time.RFC3339))
	}
	d := Decision{
		allowed: true, Reason: f.Reason, Signed: f.Signed, Metadata: f.Metadata,
		Warnings: f.Warnings, Detail: f.Detail, Made: now, Until: f.Until, Ends: f.Ends,
	}
	if f.Signer != (Signer{}) {
		d.Signers = []Signer{f.Signer}
	}
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
	r := d.Reason
	switch {
	case !d.allowed:
		b.WriteString("denied")
	case r == AuditOnly:
		b.WriteString("allowed [AUDIT_ONLY], enforce would deny")
		r = d.Would
	default:
		b.WriteString("allowed")
	}
	b.WriteString(" [" + Clean(r.String(), 32) + "] " + describe(img))
	tail := ""
	if d.Rule != "" {
		tail += "; rule " + Quote(d.Rule, 64)
	}
	if node != "" {
		tail += "; on node " + Clean(node, 64) + ": tidewaiter explain " + d.ID()
	}
	if room := MaxMessage - b.Len() - len(tail) - len(": "); d.Detail != "" && room > 0 {
		b.WriteString(": " + Clean(d.Detail, room))
	}
	b.WriteString(tail)
	return b.String()
}

// describe names an image: canonical name and target digest, or what the pod said.
func describe(img Image) string {
	if img.Name.Path == "" {
		if img.Asked == "" {
			return "an image without a name"
		}
		return Quote(img.Asked, 160)
	}
	n := img.Name
	if img.Target.Digest != "" {
		n.Digest = img.Target.Digest
	}
	s := n.String()
	if n.Digest == "" {
		return Clean(s, 256)
	}
	// A long name is cut, the digest is not.
	d := "@" + Clean(n.Digest.String(), 144) // sha512
	n.Digest = ""
	return Clean(n.String(), 160) + d
}

// Clean makes text that is not ours fit for one line: control characters and
// what is not printable become spaces, and it is cut to at most limit bytes at a
// character boundary.
func Clean(s string, limit int) string {
	limit = max(limit, 0)
	if len(s) > 4*limit {
		s = s[:4*limit]
	}
	if strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' }) { // nearly nothing does
		s = strings.Map(func(r rune) rune {
			if r == utf8.RuneError || !unicode.IsPrint(r) {
				return ' '
			}
			return r
		}, s)
	}
	if len(s) <= limit {
		return s
	}
	more := "..."[:min(3, limit)]
	limit -= len(more)
	for limit > 0 && !utf8.RuneStart(s[limit]) {
		limit--
	}
	return s[:limit] + more
}

// Quote is Clean in double quotes; quotes inside become single ones.
func Quote(s string, limit int) string {
	return `"` + strings.ReplaceAll(Clean(s, limit), `"`, `'`) + `"`
}

// ID is short, stable and the same on every node: a hash of the question and the
// reason. Where the image could not be bound there is no question; then it is one
// of the detail, which says what was in the way.
func (d Decision) ID() string {
	r := d.Reason
	if r == AuditOnly {
		r = d.Would
	}
	h := sha256.New()
	h.Write(d.Key.bytes())
	h.Write([]byte(r.String()))
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
	Would    Reason            `json:"would,omitempty"`
	Message  string            `json:"message"`
	Image    string            `json:"image"`
	Target   string            `json:"target,omitempty"`
	Manifest string            `json:"manifest,omitempty"`
	Config   string            `json:"config,omitempty"`
	Binding  Binding           `json:"binding"`
	Pod      *Pod              `json:"pod,omitempty"`
	Rule     string            `json:"rule,omitempty"`
	Epoch    string            `json:"epoch"`
	Signers  []Signer          `json:"signers"`
	Signed   string            `json:"signed,omitempty"`
	Source   string            `json:"source,omitempty"`
	Metadata map[string]string `json:"metadata,omitempty"`
	Tried    []Attempt         `json:"tried"`
	Warnings []Reason          `json:"warnings,omitempty"`
	Detail   string            `json:"detail,omitempty"`
	Made     time.Time         `json:"made"`
	Until    *time.Time        `json:"until,omitempty"`
	Ends     string            `json:"ends,omitempty"` // what it is that ends then
}

// Report makes the report of d about img on node.
func (d Decision) Report(img Image, node string) Report {
	r := Report{
		Schema: Schema, ID: d.ID(), Allowed: d.allowed, Reason: d.Reason, Would: d.Would,
		Message: d.Message(img, node), Image: Clean(img.Name.String(), 512),
		Target: img.Target.Digest.String(), Manifest: img.Manifest.Digest.String(), Config: img.Config.String(),
		Binding: d.Binding, Rule: d.Rule, Epoch: d.Epoch.String(),
		Signers: append([]Signer{}, d.Signers...), Signed: d.Signed.String(), Source: d.Source, Metadata: maps.Clone(d.Metadata),
		Tried: append([]Attempt{}, d.Tried...), Warnings: d.Warnings, Detail: Clean(d.Detail, MaxMessage), Made: d.Made.UTC(),
	}
	if img.Name.Path == "" {
		r.Image = Clean(img.Asked, 512)
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
