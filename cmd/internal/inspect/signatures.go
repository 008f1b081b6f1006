package inspect

import (
	"context"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/text"
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
	Until     *time.Time `json:"expiresAt,omitempty"`
	Ends      string     `json:"expiresBecause,omitempty"`
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
func signatures(ctx context.Context, f Active, q verify.Question) []Signature {
	l := &looking{limits: f.Config.Limits, trust: f.Config.Anchors(), found: []Signature{}}
	_ = f.Engine.Trace(ctx, q, l.add) // what it says is no answer: that was given
	return l.found
}

func (l *looking) add(step verify.Step) {
	ev, f := step.Evidence, step.Finding
	if len(l.found) == maxSigned {
		l.found = l.found[:maxSigned-1] // the last one may be the one that met the rule
	}
	s := Signature{
		Source: text.Clean(step.Source, 256), Manifest: text.Clean(ev.Manifest.Digest.String(), 144), Subject: text.Clean(step.Subject.Digest.String(), 144),
		MediaType: text.Clean(ev.MediaType, 80), Reason: f.Reason.String(), Detail: text.Clean(f.Detail, 400),
		Anchor: text.Clean(f.Signer.Anchor, 256), Ends: f.Ends, Chain: []Link{},
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
