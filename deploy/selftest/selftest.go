// Package selftest is tidewaiter selftest. It proves on the real runtime that the gate of
// this node refuses: it has containerd create containers, which are never started, as a
// kubelet does.
//
// The gate knows nothing of it. The image is made here and put on the node without a
// network, under a name that the rule speaks of, with a tag that nobody else has; that
// nobody signed it is certain, since its content is new. That the gate was asked is
// read from the gate's own decisions. All of it is removed afterwards.
package selftest

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// Schema is that of a Report. Fields are added and never change.
const Schema = "tidewaiter.dev/selftest/v1"

// A Result is what it comes to.
type Result string

// Results.
const (
	Enforced    Result = "enforced"     // everything was as it must be
	NotEnforced Result = "not-enforced" // something was not
	Audits      Result = "audit"        // nothing is refused: it was recorded
	Unknown     Result = "unknown"      // something could not be tried
)

// Kinds of trials.
const (
	Unsigned = "unsigned" // an unsigned image, under the name of a rule
	Signed   = "signed"   // one of the node, which the gate allows
	Absent   = "absent"   // the first again, without the gate
)

// A Trial is one container that was to be created.
type Trial struct {
	Kind     string `json:"kind"`
	Rule     string `json:"rule,omitempty"` // name of the statement
	Image    string `json:"image,omitempty"`
	Outcome  string `json:"outcome"` // refused, created, failed (neither), or none: it was not tried
	Expected bool   `json:"expected"`
	Reason   string `json:"reason,omitempty"` // that the gate gave, or in audit would have
	Logged   bool   `json:"logged"`           // the gate's own decisions have it
	Text     string `json:"text"`
}

// Outcomes of a Trial.
const (
	Refused = "refused"
	Created = "created"
	Failed  = "failed"
	None    = "none"
)

// A Report is all of them.
type Report struct {
	Schema string  `json:"schema"`
	Result Result  `json:"result"`
	Mode   string  `json:"mode"`
	Nonce  string  `json:"nonce"` // that is in the tags of its images
	Trials []Trial `json:"trials"`
	Left   string  `json:"left,omitempty"` // why not everything was removed
}

// Options say where things are. Socket, RunDir, Policy and Now are required.
type Options struct {
	Socket string // containerd's
	RunDir string // of the gate
	Absent bool   // stop the gate for a moment

	// Policy says what is in force, or where there is no gate what would be.
	Policy func(context.Context) (config.Summary, error)
	Now    func() time.Time

	// Guard makes the process that continues the gate if this one is killed. Nil: Self.
	Guard func(ctx context.Context, pid int) *exec.Cmd
}

const (
	maxRules   = 64
	wholeTime  = 5 * time.Minute
	createTime = time.Minute // of one creation; containerd's lock may be busy
	settleTime = 30 * time.Second
	loggedTime = 10 * time.Second
	cleanTime  = time.Minute
	heldTime   = 15 * time.Second // less than the watchdog of the gate's service has
)

// A test is one Run under way.
type test struct {
	Options
	*client
	nonce  string
	pod    *pod
	report *Report
	began  time.Time
	seq    int    // of containers
	gone   []*pod // that a kubelet took away, as far as it did
}

// Run tests. The error says that nothing could be tried; what is in the Report was.
// Whatever ends it, what it made is removed first.
func Run(ctx context.Context, o Options) (_ *Report, err error) {
	ctx, cancel := context.WithTimeout(ctx, wholeTime)
	defer cancel()
	raw := make([]byte, 8)
	rand.Read(raw)
	t := &test{Options: o, nonce: hex.EncodeToString(raw), began: o.Now()}
	t.report = &Report{Schema: Schema, Nonce: t.nonce, Trials: []Trial{}}
	status, gateErr := control.Ask(ctx, o.RunDir)
	s, err := o.Policy(ctx)
	if err != nil {
		return nil, err
	}
	rules, more := rulesOf(s, tag+t.nonce, t.known(ctx, s, gateErr))
	if len(rules) == 0 {
		return nil, errors.New("the configuration has no rule under whose name an image could be")
	}
	t.report.Mode = s.Mode
	if t.client, err = dial(o.Socket); err != nil {
		return nil, err
	}
	defer t.conn.Close()
	if err := t.stale(ctx, t.began); err != nil {
		return nil, fmt.Errorf("containerd at %s: %w", o.Socket, err)
	}
	blobs, err := build(t.nonce)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, r := range rules {
		names = append(names, r.image)
	}
	id := blobs[1].Digest.String() // as CRI calls it, be it there yet or not
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanTime)
		defer cancel()
		var left error
		for _, p := range append(t.gone, t.pod) {
			if p != nil {
				left = errors.Join(left, t.removePod(clean, p.id))
			}
		}
		if left = errors.Join(left, t.forget(clean, t.nonce, id, names)); left != nil {
			t.report.Left = text.Clean(left.Error(), 600)
		}
		removeCgroups()
	}()
	if _, err := t.importImage(ctx, t.nonce, blobs, names, t.began); err != nil {
		return nil, err
	}
	if t.pod, err = t.runPod(ctx, t.nonce, uid(raw)); err != nil {
		return nil, fmt.Errorf("containerd does not run a pod: %w", err)
	}

	for _, r := range rules {
		t.unsigned(ctx, r, gateErr)
	}
	if more > 0 {
		t.add(Trial{Kind: Unsigned, Outcome: None, Expected: true, Text: fmt.Sprintf("%d more rules were not tried", more)})
	}
	t.signed(ctx, gateErr)
	switch {
	case s.Mode == verify.Audit.String():
		t.add(Trial{Kind: Absent, Outcome: None, Expected: true, Text: "not tried: in audit containers start without the gate"})
	case !o.Absent:
		t.add(Trial{Kind: Absent, Outcome: None, Expected: true, Text: "not tried: --absent stops the gate for some seconds"})
	default:
		t.absent(ctx, rules[0], status)
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	t.report.Result = Enforced
	if s.Mode == verify.Audit.String() {
		t.report.Result = Audits
	}
	for _, one := range t.report.Trials {
		switch {
		case one.Expected:
		case one.Outcome == Failed:
			if t.report.Result != NotEnforced {
				t.report.Result = Unknown
			}
		default:
			t.report.Result = NotEnforced
		}
	}
	return t.report, nil
}

func (t *test) add(one Trial) {
	one.Text = text.Clean(one.Text, 800)
	t.report.Trials = append(t.report.Trials, one)
}

// reasons that an unsigned image may be refused with: there is no signature, or nobody
// can say so now, or the rule asks for none and so may not allow.
var reasons = []verify.Reason{
	verify.SignatureMissing, verify.SourceUnreachable, verify.SourceUnauthorized, verify.SourceNoReferrers, verify.Pending, verify.PolicyInvalid,
}

var denial = regexp.MustCompile(`tidewaiter: denied \[([A-Z_]{1,40})\]`)

// absentLine is how containerd's default validator refuses (default-validator.go of
// NRI 0.11 to 0.12.5).
var absentLine = regexp.MustCompile(`required plugin "?(\d\d-)?tidewaiter"? not present`)

// otherLine is the same of any plugin.
var otherLine = regexp.MustCompile(`required plugin "?[^" ]{1,64}"? not present`)

// try has a container created, and removes it. The error says which plugin refused it.
func (t *test) try(ctx context.Context, image string) error {
	t.seq++
	ctx, cancel := context.WithTimeout(ctx, createTime)
	defer cancel()
	id, err := t.create(ctx, t.pod, fmt.Sprintf("selftest-%d", t.seq), image)
	if err != nil && podGone.MatchString(err.Error()) {
		if err = t.renewPod(ctx); err == nil {
			id, err = t.create(ctx, t.pod, fmt.Sprintf("selftest-%d", t.seq), image)
		}
	}
	if err != nil {
		return err
	}
	if err := t.removeContainer(ctx, id); err != nil {
		return &notRemoved{err} // its pod is removed later
	}
	return nil
}

// notRemoved is of a container that was created.
type notRemoved struct{ error }

func created(err error) bool {
	var n *notRemoved
	return err == nil || errors.As(err, &n)
}

// try is repeated while the gate has no answer yet.
func (t *test) settled(ctx context.Context, image string) (reason string, err error) {
	for end := t.Now().Add(settleTime); ; {
		reason = ""
		if err = t.try(ctx, image); err != nil {
			if m := denial.FindStringSubmatch(err.Error()); m != nil {
				reason = m[1]
			}
		}
		if reason != string(verify.Pending) && reason != string(verify.Overloaded) || t.Now().After(end) || sleep(ctx, 300*time.Millisecond) != nil {
			return reason, err
		}
	}
}

func (t *test) unsigned(ctx context.Context, r rule, gate error) {
	reason, err := t.settled(ctx, r.image)
	one := Trial{Kind: Unsigned, Rule: r.statement, Image: r.image, Reason: reason}
	audit := t.report.Mode == verify.Audit.String()
	said, logged := control.Said{}, false
	if gate == nil {
		said, logged = t.logged(ctx, r.image)
	}
	one.Logged = logged
	switch {
	case audit && created(err):
		one.Outcome, one.Reason, one.Expected = Created, said.Enforced(), logged && said.Reason == string(verify.AuditOnly)
		one.Text = "created, which the gate recorded: AUDIT_ONLY, and enforce would say " + one.Reason
		if !one.Expected {
			one.Text = "created, and the gate did not record it"
		}
	case created(err):
		one.Outcome, one.Text = Created, "LET THROUGH: containerd created it, and the gate was not asked"
		if logged {
			one.Text = "LET THROUGH: containerd created it, and the gate said " + said.Reason
		}
		if gate != nil {
			one.Text += fmt.Sprintf("; no gate can be asked here: %v", gate)
		}
	case reason != "" && !logged:
		one.Outcome, one.Text = Refused, "refused with "+reason+", and the gate's decisions do not have it: somebody else said so, or tidewaiter decisions does not answer"
	case reason != "" && slices.Contains(reasons, verify.Reason(reason)):
		one.Outcome, one.Expected, one.Text = Refused, true, "refused: "+reason+", and the gate's own decisions have it"
	case reason != "":
		one.Outcome, one.Text = Refused, fmt.Sprintf("refused with %s, where %s was expected: %v", reason, verify.SignatureMissing, err)
	case absentLine.MatchString(err.Error()):
		one.Outcome, one.Text = Refused, "refused by containerd, since no gate is connected: not a single container starts"
	case otherLine.MatchString(err.Error()):
		one.Outcome, one.Text = Refused, "refused by containerd, and not by the gate: "+otherLine.FindString(err.Error())
	default:
		one.Outcome, one.Text = Failed, "neither created nor refused by the gate: "+err.Error()
	}
	t.add(one)
}

// logged finds the last answer to a container of the image in the gate's decisions.
func (t *test) logged(ctx context.Context, image string) (said control.Said, found bool) {
	ctx, cancel := context.WithTimeout(ctx, loggedTime)
	defer cancel()
	f := control.Filter{Since: t.began.Add(-time.Second)}
	for {
		p, err := control.AskDecisions(ctx, t.RunDir, f)
		if err != nil {
			return said, found
		}
		for _, l := range p.Lines {
			if s, err := l.Said(); err == nil && l.Kind == control.AnswerLine && strings.HasPrefix(s.Image, image) {
				said, found = s, true
			}
		}
		f.After = p.Last
		if p.More {
			continue
		}
		if found || sleep(ctx, 100*time.Millisecond) != nil {
			return said, found
		}
	}
}

// signed creates a container of an image that the gate allows, so that what is refused
// is not refused for nothing.
func (t *test) signed(ctx context.Context, gate error) {
	one := Trial{Kind: Signed, Outcome: None, Expected: true, Text: "not tried: the gate allows no image of this node today"}
	if gate != nil {
		one.Text = "not tried: no gate says which image it allows"
		t.add(one)
		return
	}
	l, err := t.images(ctx)
	if err != nil {
		one.Text = "not tried: the gate does not say which images it allows: " + err.Error()
		t.add(one)
		return
	}
	tried := 0
	for _, i := range l.List {
		if !i.Allowed || tried == maxSigned || strings.Contains(i.Image, tag) {
			continue
		}
		tried++
		reason, err := t.settled(ctx, i.Image)
		one = Trial{Kind: Signed, Image: i.Image, Reason: reason}
		switch {
		case created(err):
			one.Outcome, one.Expected, one.Text = Created, true, "created, and removed without being started"
			t.add(one)
			return
		case reason != "":
			one.Outcome, one.Text = Refused, "refused with "+reason+", though the gate says that it allows it"
		case otherLine.MatchString(err.Error()):
			one.Outcome, one.Text = Refused, "refused by containerd: "+otherLine.FindString(err.Error())
		default:
			one.Outcome, one.Text = Failed, "not created, for another reason: "+err.Error() // such as a user that it does not have
			continue
		}
		break
	}
	t.add(one)
}

// Bounds: how many of the images that the gate allows are tried, and how many pods are
// run in place of others.
const (
	maxSigned = 5
	maxPods   = 40
)
