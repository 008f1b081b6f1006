// Package inspect says of images and containers of this node what the gate would
// answer to them now, and why: tidewaiter images and tidewaiter explain.
//
// It asks the Decider that the gate asks, and so has the same answer from the same
// memory; nothing starts by asking. For the signatures themselves it has the same
// Engine look once more and writes down what each check said: what is remembered of
// an answer is who signed, and not with which chain. Nothing here decides.
package inspect

import (
	"context"
	"errors"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/tidewaiter/tidewaiter/cmd/internal/decisionlog"
	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/nri/containerd"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/policy"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// Images are those of the node. [node.Resolver] implements it.
type Images interface {
	Listed(ctx context.Context, yield func(verify.Image) bool) error
	Read(ctx context.Context, img verify.Image) verify.Image
	Running(ctx context.Context, c containerd.Container) ([]verify.Image, error)
}

// Containers are those that run. [node.Containerd] implements it.
type Containers interface {
	Running(ctx context.Context, yield func(containerd.Container) bool) error
}

// An Active is the configuration in force with the Engine that judges by it.
type Active struct {
	Config *config.Config // nil: none is in force
	Engine *verify.Engine
}

// An Explainer answers the control socket. All fields are required. It is safe for
// concurrent use.
type Explainer struct {
	Images     Images
	Containers Containers
	Decider    *verify.Decider
	Active     func() Active
	Assurance  func() string
	Ring       *decisionlog.Ring
	Node       string
	Now        func() time.Time
}

// Schema is that of an Explanation. Fields are added and never change.
const Schema = "tidewaiter.dev/explain/v1"

// Path is where the control socket answers with an Explanation.
const Path = "/v1/explain"

const (
	longest    = time.Minute // that an answer may take
	listing    = 20 * time.Second
	maxAbout   = 8    // images and containers that one question is answered with
	maxImages  = 4096 // that are listed
	maxSigned  = 32   // signatures that are shown of one image
	maxAnswer  = 8 << 20
	maxQuoted  = 300 // bytes of what was asked, in an error
	shortestID = 6   // digits of a container's ID
)

// An Explanation is what is known about what was asked for.
type Explanation struct {
	Schema string  `json:"schema"`
	Asked  string  `json:"asked"`
	About  []About `json:"about"` // at least one, at most 8
}

// An About is one image, as a container runs it or as it is on the node.
type About struct {
	Container  *Container    `json:"container,omitempty"`
	Then       *control.Line `json:"previous,omitempty"` // what was last answered, as far as that is remembered
	Now        *Answer       `json:"now,omitempty"`      // what would be answered now; none where the image is not on the node any more
	Missing    string        `json:"missing,omitempty"`
	Mode       string        `json:"mode"`
	Fresh      bool          `json:"fresh"`     // Now was found out for this question, and not remembered
	Assurance  string        `json:"assurance"` // see tidewaiter status
	Rule       *Rule         `json:"rule,omitempty"`
	Listed     []string      `json:"listed,omitempty"` // of an image without a pod: namespaces where a digest allowlist lets it run whatever Now says
	Signatures []Signature   `json:"signatures"`       // that the sources hand over now, until one meets the rule
	Next       string        `json:"next,omitempty"`
}

// An Answer is a verify.Report as it is read back: fields of the same names.
type Answer struct {
	ID       string            `json:"id"`
	Allowed  bool              `json:"allowed"`
	Reason   verify.Reason     `json:"reason"`
	Would    verify.Reason     `json:"enforceReason,omitempty"`
	Message  string            `json:"message"`
	Image    string            `json:"image"`
	Target   string            `json:"target,omitempty"`
	Manifest string            `json:"manifest,omitempty"`
	Config   string            `json:"config,omitempty"`
	Binding  string            `json:"binding"`
	Rule     string            `json:"rule,omitempty"`
	Revision string            `json:"revision"`
	Signers  []verify.Signer   `json:"signers"`
	Signed   string            `json:"signed,omitempty"`
	Source   string            `json:"source,omitempty"`
	Metadata map[string]string `json:"metadata,omitempty"`
	Tried    []verify.Attempt  `json:"attempts"`
	Warnings []verify.Reason   `json:"warnings,omitempty"`
	Detail   string            `json:"detail,omitempty"`
	Made     time.Time         `json:"decidedAt"`
	Until    *time.Time        `json:"expiresAt,omitempty"`
	Ends     string            `json:"expiresBecause,omitempty"`
}

func answer(r verify.Report) *Answer {
	return &Answer{
		ID: r.ID, Allowed: r.Allowed, Reason: r.Reason, Would: r.Would, Message: r.Message, Image: r.Image, Target: r.Target, Manifest: r.Manifest,
		Config: r.Config, Binding: r.Binding.String(), Rule: text.Clean(r.Rule, 256), Revision: r.Revision, Signers: r.Signers, Signed: r.Signed, Source: r.Source,
		Metadata: r.Metadata, Tried: r.Tried, Warnings: r.Warnings, Detail: r.Detail, Made: r.Made, Until: r.Until, Ends: r.Ends,
	}
}

// A Container is one that runs, or one that was refused.
type Container struct {
	ID      string     `json:"id"`
	Running bool       `json:"running"`
	Pod     verify.Pod `json:"pod"`
}

// A Rule is what speaks of the image.
type Rule struct {
	Name      string            `json:"name"`
	Settled   string            `json:"settled,omitempty"` // the answer of a rule that asks for no signature
	Detail    string            `json:"detail,omitempty"`
	Statement *config.Statement `json:"statement,omitempty"`
}

// Endpoints are what the control socket answers with.
func (x *Explainer) Endpoints() []control.Endpoint {
	return []control.Endpoint{
		{Path: Path, Longest: longest, Answer: func(ctx context.Context, q url.Values) (any, error) { return x.Explain(ctx, q.Get("what")) }},
		{Path: control.ImagesPath, Longest: control.ImagesTime, Answer: func(ctx context.Context, _ url.Values) (any, error) { return x.List(ctx) }},
	}
}

// Ask asks the gate whose run directory is run to explain what.
func Ask(ctx context.Context, run, what string) (e Explanation, err error) {
	err = control.Get(ctx, run, control.Question{Path: Path, Query: url.Values{"what": {what}}, Schema: Schema, Longest: longest + 5*time.Second, Bytes: maxAnswer}, &e)
	return e, err
}

var (
	isID     = regexp.MustCompile(`^[0-9a-f]{12}$`)
	isPrefix = regexp.MustCompile(`^[0-9a-f]+$`)
)

// Explain says what is known about what: the ID of a decision, the ID of a container
// or the start of it, a digest, or the name of an image of this node.
func (x *Explainer) Explain(ctx context.Context, what string) (*Explanation, error) {
	e := &Explanation{Schema: Schema, Asked: text.Clean(what, maxQuoted)}
	var err error
	if isID.MatchString(what) {
		if err = x.decision(ctx, what, e); err != nil {
			return nil, err
		}
	}
	if len(e.About) == 0 && len(what) >= shortestID && len(what) <= 64 && isPrefix.MatchString(what) {
		if err = x.container(ctx, what, e); err != nil {
			return nil, err
		}
	}
	if len(e.About) == 0 {
		if err = x.image(ctx, what, e); err != nil {
			return nil, err
		}
	}
	if len(e.About) == 0 {
		return nil, errors.New("nothing on this node is called " + text.Quote(what, maxQuoted) + ": no decision that is remembered, no container that runs or was refused lately, and no image")
	}
	return e, nil
}

// decision explains the decision with that ID: what was answered, and what would be.
func (x *Explainer) decision(ctx context.Context, id string, e *Explanation) error {
	line, err := x.last(func(_ control.Line, s control.Said) bool { return s.ID == id })
	if err != nil {
		return err
	}
	if line != nil {
		return x.then(ctx, line, e)
	}
	// What was allowed from memory is not remembered one by one, and a restart of the
	// node forgets the rest. The ID is one of the question and the reason, so that it
	// can be found without asking.
	s := x.Decider.Snapshot()
	if s == nil {
		return nil
	}
	err = x.listed(ctx, func(img verify.Image) bool {
		if img.Fault != nil {
			return false
		}
		img.Name = s.Known(img.Name)
		key := verify.Question{Image: img, Rule: s.Policy.Select(img)}.Key()
		for _, r := range reasons {
			if (verify.Decision{Key: key, Reason: r}).ID() == id {
				return true
			}
		}
		return false
	}, e)
	if errors.Is(err, errRuntime) {
		return nil // it may be the ID of a container that was refused
	}
	return err
}

// reasons are all that an ID can be of.
var reasons = append(control.Denials(), verify.Verified, verify.AllowedByDigest)

// then explains a line: the image that it names, if it still is on the node.
func (x *Explainer) then(ctx context.Context, l *control.Line, e *Explanation) error {
	s, err := l.Said()
	if err != nil {
		return err
	}
	at := len(e.About)
	found := false
	err = x.listed(ctx, func(img verify.Image) bool {
		if found || s.Image != "" && img.Name.String() != s.Image && (s.Target == "" || img.Target.Digest.String() != s.Target || repository(img.Name) != withoutTag(s.Image)) {
			return false
		}
		found = s.Image != ""
		return found
	}, e, s.Pod)
	if err != nil && !errors.Is(err, errRuntime) {
		return err
	}
	if len(e.About) == at {
		a := x.about()
		a.Missing = "the node has no image record of that name any more, so that only what was answered is known"
		if err != nil {
			a.Missing = err.Error()
		}
		a.Next = control.Next(verify.Reason(s.Enforced()))
		e.About = append(e.About, a)
	}
	for i := range e.About[at:] {
		a := &e.About[at+i]
		a.Then = l
		if l.Container != "" {
			a.Container = &Container{ID: l.Container}
			if s.Pod != nil {
				a.Container.Pod = *s.Pod
			}
		}
	}
	return nil
}

func repository(n verify.Name) string { return text.Clean(n.Repository(), 512) }

// withoutTag is the repository of a name that Report made.
func withoutTag(s string) string {
	s, _, _ = strings.Cut(s, "@")
	if i := strings.LastIndex(s, ":"); i > strings.LastIndex(s, "/") {
		s = s[:i]
	}
	return s
}

// last returns the line that was written last of those that match.
func (x *Explainer) last(match func(control.Line, control.Said) bool) (found *control.Line, err error) {
	err = x.Ring.Read(0, func(l control.Line) bool {
		if s, err := l.Said(); err == nil && match(l, s) {
			found = &l
		}
		return true
	})
	return found, err
}

// container explains the containers whose ID begins with id.
func (x *Explainer) container(ctx context.Context, id string, e *Explanation) error {
	var running []containerd.Container
	list, cancel := context.WithTimeout(ctx, listing)
	defer cancel()
	err := x.Containers.Running(list, func(c containerd.Container) bool {
		if strings.HasPrefix(c.ID, id) {
			running = append(running, c)
		}
		return len(running) < maxAbout
	})
	for _, c := range running {
		images, err := x.Images.Running(ctx, c)
		then, _ := x.last(func(l control.Line, _ control.Said) bool { return l.Container == c.ID })
		for _, img := range images {
			if len(e.About) == maxAbout {
				return nil
			}
			a := x.about()
			if errors.Is(err, containerd.ErrGone) {
				a.Missing = err.Error()
			} else {
				x.judge(ctx, img, &a)
			}
			a.Container = &Container{ID: c.ID, Running: true, Pod: clean(c.Pod)}
			a.Then = then
			e.About = append(e.About, a)
		}
	}
	if len(e.About) > 0 {
		return nil
	}
	line, ringErr := x.last(func(l control.Line, _ control.Said) bool { return strings.HasPrefix(l.Container, id) })
	if ringErr != nil {
		return ringErr
	}
	if line != nil {
		return x.then(ctx, line, e)
	}
	if err != nil {
		return runtimeError(err)
	}
	return nil
}

func clean(p verify.Pod) verify.Pod {
	const name = 253 // bytes of a name in Kubernetes
	return verify.Pod{Namespace: text.Clean(p.Namespace, name), Name: text.Clean(p.Name, name), UID: text.Clean(p.UID, name), Container: text.Clean(p.Container, name)}
}

// image explains the images of a name or digest.
func (x *Explainer) image(ctx context.Context, what string, e *Explanation) error {
	if d := digest.Digest(what); d.Validate() == nil {
		return x.listed(ctx, func(img verify.Image) bool {
			return d == img.Target.Digest || d == img.Manifest.Digest || d == img.Config
		}, e)
	}
	name, err := policy.ParseName(what)
	if err != nil {
		return errors.New("neither the ID of a decision or of a container nor the name of an image: " + text.Clean(err.Error(), maxQuoted))
	}
	// As for docker and CRI a name without tag and digest has the tag latest. Where that
	// is not there, all of the repository are meant.
	bare := name.Digest == "" && !strings.Contains(what[strings.LastIndex(what, "/")+1:], ":")
	exact := func(img verify.Image) bool {
		n := img.Name
		if name.Digest != "" {
			return n.Repository() == name.Repository() && (name.Digest == img.Target.Digest || name.Digest == img.Manifest.Digest || name.Digest == n.Digest)
		}
		return n == name
	}
	if err := x.listed(ctx, exact, e); err != nil || len(e.About) > 0 || !bare {
		return err
	}
	return x.listed(ctx, func(img verify.Image) bool { return img.Name.Repository() == name.Repository() }, e)
}

// errRuntime is wrapped where containerd did not answer.
var errRuntime = errors.New("containerd does not say what is on the node")

func runtimeError(err error) error {
	return errors.Join(errRuntime, errors.New(text.Clean(err.Error(), maxQuoted)))
}

// listed explains the images of the node that match, for a pod if there is one.
func (x *Explainer) listed(ctx context.Context, match func(verify.Image) bool, e *Explanation, pod ...*verify.Pod) error {
	var images []verify.Image
	list, cancel := context.WithTimeout(ctx, listing)
	defer cancel()
	n := 0
	err := x.Images.Listed(list, func(img verify.Image) bool {
		if match(img) {
			images = append(images, img)
		}
		n++
		return n < maxImages && len(e.About)+len(images) < maxAbout
	})
	if err != nil {
		return runtimeError(err)
	}
	for _, img := range images {
		if img.Fault != nil && img.Fault.Reason == verify.Pending {
			img = x.Images.Read(ctx, img) // somebody wants to know of this one
		}
		if len(pod) > 0 && pod[0] != nil {
			img.Pod = *pod[0]
		}
		a := x.about()
		x.judge(ctx, img, &a)
		if c := x.Active().Config; c != nil && img.Pod.Namespace == "" {
			a.Listed = AllowlistOf(c).in(img)
		}
		e.About = append(e.About, a)
	}
	return nil
}

// about is what is said whatever the image is.
func (x *Explainer) about() About {
	a := About{Assurance: x.Assurance(), Signatures: []Signature{}}
	if s := x.Decider.Snapshot(); s != nil {
		a.Mode = s.Mode.String()
	}
	return a
}

// judge asks what the gate would answer, and looks at what that rests on. The names of
// an image volume are asked one after the other, as the sweep does.
func (x *Explainer) judge(ctx context.Context, img verify.Image, a *About) {
	began := x.Now()
	names := img.Names[:min(len(img.Names), maxAbout)]
	img.Use, img.Names = verify.UsePrefetch, nil
	d := x.Decider.Verify(ctx, img)
	for first := img.Name; !d.EnforceReason().Allows() && len(names) > 0; names = names[1:] {
		other := img
		other.Name = names[0]
		if o := x.Decider.Verify(ctx, other); o.EnforceReason().Allows() {
			img, d = other, o
		} else {
			img.Name = first
		}
	}
	a.Fresh = !d.Made.Before(began)
	if d.Made.IsZero() { // it asks for no signature: it is made each time
		d.Made, a.Fresh = began, true
	}
	r := d.Report(img, "")
	a.Now, a.Next = answer(r), control.Next(d.EnforceReason())
	s, f := x.Decider.Snapshot(), x.Active()
	if s == nil || f.Config == nil || f.Engine == nil || f.Config.Revision != s.Revision {
		return // none is in force, or another is being put in force
	}
	img.Name = s.Known(img.Name)
	if img.Fault != nil {
		return
	}
	rule := s.Policy.Select(img)
	if rule == nil {
		return
	}
	a.Rule = &Rule{Name: text.Clean(rule.Name, 256), Detail: rule.Detail}
	if i := slices.IndexFunc(f.Config.Statements, func(st verify.Statement) bool { return st.Name == rule.Name }); i >= 0 {
		st := config.Describe(f.Config.Statements[i])
		a.Rule.Statement = &st
	}
	if rule.Fixed != "" {
		a.Rule.Settled = rule.Fixed.String()
		return
	}
	a.Signatures = signatures(ctx, f, verify.Question{Image: img, Rule: rule})
}

// A looking is one look at what the sources hand over.
type looking struct {
	limits verify.Limits
	trust  []config.Anchor
	found  []Signature
}
