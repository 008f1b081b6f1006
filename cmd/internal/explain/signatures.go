package explain

import (
	"cmp"
	"context"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/cmd/internal/config"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/notary"
)

// A Signature is one that a source handed over, and what came of checking it.
type Signature struct {
	Source    string     `json:"source"`
	Manifest  string     `json:"manifest"` // digest of the signature's own manifest
	Subject   string     `json:"subject"`  // digest of what it is attached to
	MediaType string     `json:"mediaType,omitempty"`
	Reason    string     `json:"reason"`
	Detail    string     `json:"detail,omitempty"`
	Anchor    string     `json:"anchor,omitempty"` // file of the trust store that the chain reaches
	Until     *time.Time `json:"until,omitempty"`
	Ends      string     `json:"ends,omitempty"`
	Warnings  []string   `json:"warnings,omitempty"`
	Chain     []Link     `json:"chain"` // as the envelope claims it, the leaf first
}

// A Link is one certificate of a chain.
type Link struct {
	Subject    string    `json:"subject"`
	Thumbprint string    `json:"thumbprint"` // SHA-256, hex
	NotBefore  time.Time `json:"notBefore"`
	NotAfter   time.Time `json:"notAfter"`
	Anchor     string    `json:"anchor,omitempty"` // file of the trust store that holds this very certificate, and vouched for the chain
}

// signatures has the engine look for signatures once more, with everything that it
// has, and returns what each check said. What was found is not kept.
func signatures(ctx context.Context, f Force, q verify.Question) []Signature {
	l := &looking{limits: f.Config.Limits, trust: f.Config.Anchors(), found: []Signature{}}
	e := *f.Engine
	e.Checker = watched{e.Checker, l}
	sources := e.Sources
	e.Sources = func(n verify.Name) (list []verify.Source) {
		for _, s := range sources(n) {
			list = append(list, named{s, l})
		}
		return list
	}
	if e.Store != nil {
		e.Store = reader{e.Store, l}
	}
	_ = e.Judge(ctx, q) // what it says is no answer: that was given
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.found
}

// A named source says that it is being asked.
type named struct {
	verify.Source
	look *looking
}

func (n named) Find(ctx context.Context, in verify.Name, subject ocispec.Descriptor, b *verify.Budget, yield func(verify.Evidence) bool) error {
	n.look.at(n.Name())
	return n.Source.Find(ctx, in, subject, b, yield)
}

// A reader is the store, which keeps nothing of what is found here.
type reader struct {
	verify.Keeper
	look *looking
}

func (r reader) Find(ctx context.Context, in verify.Name, subject ocispec.Descriptor, b *verify.Budget, yield func(verify.Evidence) bool) error {
	r.look.at(r.Name())
	return r.Keeper.Find(ctx, in, subject, b, yield)
}

func (reader) Keep(verify.Image, ocispec.Descriptor, verify.Evidence) {}

// A watched checker has what it says written down.
type watched struct {
	verify.Checker
	look *looking
}

func (w watched) Check(ctx context.Context, ev verify.Evidence, want ocispec.Descriptor, statement string) verify.Finding {
	f := w.Checker.Check(ctx, ev, want, statement)
	w.look.add(ev, want, f)
	return f
}

func (l *looking) at(source string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.source = verify.Clean(source, 256)
}

func (l *looking) add(ev verify.Evidence, want ocispec.Descriptor, f verify.Finding) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.found) == maxSigned {
		l.found = l.found[:maxSigned-1] // the last one may be the one that met the rule
	}
	s := Signature{
		Source: cmp.Or(verify.Clean(ev.From, 256), l.source), Manifest: verify.Clean(ev.Manifest.Digest.String(), 144), Subject: verify.Clean(want.Digest.String(), 144),
		MediaType: verify.Clean(ev.MediaType, 80), Reason: f.Reason.String(), Detail: verify.Clean(f.Detail, 400),
		Anchor: verify.Clean(f.Signer.Anchor, 256), Ends: f.Ends, Chain: []Link{},
	}
	if !f.Until.IsZero() {
		s.Until = new(f.Until.UTC())
	}
	for _, w := range f.Warnings {
		s.Warnings = append(s.Warnings, w.String())
	}
	chain, err := notary.Chain(ev.MediaType, ev.Blob, l.limits)
	if err != nil {
		chain = nil // the finding says why
	}
	for _, c := range chain {
		a := config.Certificate("", c)
		link := Link{Subject: a.Subject, Thumbprint: a.Thumbprint, NotBefore: a.NotBefore, NotAfter: a.NotAfter}
		for _, t := range l.trust {
			if t.File == f.Signer.Anchor && t.Thumbprint == a.Thumbprint {
				link.Anchor = s.Anchor
			}
		}
		s.Chain = append(s.Chain, link)
	}
	l.found = append(l.found, s)
}
