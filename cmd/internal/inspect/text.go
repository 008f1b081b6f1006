package inspect

import (
	"fmt"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/cmd/internal/cli"
	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// Reason is what enforce answers, or what it answered where nothing is there to
// ask about any more.
func (a About) Reason() verify.Reason {
	if a.Now != nil {
		return a.Now.enforced()
	}
	if a.Then != nil {
		if s, err := a.Then.Said(); err == nil {
			return verify.Reason(s.Enforced())
		}
	}
	return verify.ImageUnresolved
}

// Text is e for a person. What the gate has from elsewhere is cleaned.
func (e Explanation) Text() string {
	var b strings.Builder
	for i, a := range e.About {
		if i > 0 {
			b.WriteByte('\n')
		}
		explainAbout(&b, a)
	}
	return b.String()
}

func explainAbout(b *strings.Builder, a About) {
	line := func(name, format string, args ...any) {
		fmt.Fprintf(b, "  %-10s %s\n", name, text.Clean(fmt.Sprintf(format, args...), 1200))
	}
	var then control.Said
	if a.Then != nil {
		then, _ = a.Then.Said()
	}
	r := a.Now
	title := then.Image
	if r != nil {
		title = r.Image
		if r.Target != "" && !strings.Contains(title, "@") {
			title += "@" + r.Target
		}
	}
	if title == "" {
		title = "an image without a name"
	}
	fmt.Fprintln(b, text.Clean(title, 600))
	if c := a.Container; c != nil {
		state := "is not there or does not run"
		if c.Running {
			state = "runs"
		}
		line("container", "%s, %s, %s", c.ID, podName(c.Pod), state)
	}
	if a.Then != nil {
		line("answered", "%s, at %s: %s", answerText(then.Allowed, verify.Reason(then.Reason), verify.Reason(then.Would)), a.Then.At.UTC().Format(time.RFC3339), then.Detail)
		if a.Then.Repeats > 0 {
			line("", "and %d times before", a.Then.Repeats)
		}
	}
	if a.Missing != "" {
		line("now", "%s", a.Missing)
	}
	if r != nil {
		explainNow(line, a, *r)
	}
	if len(a.Listed) > 0 {
		line("listed", "in %s: there a digest allowlist lets it start all the same", strings.Join(a.Listed, ", "))
	}
	for _, s := range a.Signatures {
		explainSignature(b, line, s)
	}
	if a.Next != "" {
		line("next", "%s", a.Next)
	}
}

func explainNow(line func(name, format string, args ...any), a About, r Answer) {
	from := "remembered, found out at " + r.Made.UTC().Format(time.RFC3339)
	if a.Fresh {
		from = "found out just now"
	}
	line("now", "%s (%s)", answerText(r.Allowed, r.Reason, r.Would), from)
	if r.Detail != "" {
		line("because", "%s", r.Detail)
	}
	line("decision", "%s, mode %s, assurance %s, bound by %s", r.ID, a.Mode, a.Assurance, bindingText[r.Binding])
	switch rule := a.Rule; {
	case rule == nil:
	case rule.Statement != nil:
		s := rule.Statement
		line("rule", "statement %q: level %s, trust stores %s, identities %s", s.Name, s.Level, cli.List(s.TrustStores, "none"), cli.List(s.TrustedIdentities, "none"))
	case rule.Name != "":
		line("rule", "%s", rule.Name)
	default:
		line("rule", "none")
	}
	for _, s := range r.Signers {
		if s.Anchor != "" {
			line("signer", "%s, trusted through %s", s.Subject, s.Anchor)
		} else {
			line("signer", "%s, whom no trust store of the rule vouches for", s.Subject)
		}
	}
	if r.Signed != "" && r.Source != "" {
		line("signed", "%s, as %s has it", r.Signed, r.Source)
	} else if r.Signed != "" {
		line("signed", "%s", r.Signed)
	}
	for _, w := range r.Warnings {
		line("warning", "%s, which the statement only logs", w)
	}
	for _, t := range r.Tried {
		detail := ""
		if t.Detail != "" {
			detail = ": " + t.Detail
		}
		line("source", "%s: %s, signatures seen: %d%s", t.Source, t.Reason, t.Seen, detail)
	}
	if r.Until != nil {
		line("ends", "%s", endText(*r.Until, r.Ends))
	}
}

// bindingText says what a binding is (verify.Binding).
var bindingText = map[string]string{
	"runtime": "what the runtime handed over", "snapshot": "the container's own snapshot", "digest": "the digest that was named",
	"record": "an image record of this node", "none": "nothing",
}

// endText says when an answer ends, and what it is that does.
func endText(until time.Time, ends string) string {
	at := until.UTC().Format(time.RFC3339)
	switch ends {
	case notary.EndsSignature:
		return at + ", when the signature expires: sign again before"
	case notary.EndsCertificate:
		return at + ", when a certificate of the signer ends: sign with a new one before, or with a timestamp"
	case notary.EndsNothing:
		return "not by itself; it is looked at again at " + at
	}
	return at
}

func explainSignature(b *strings.Builder, line func(name, format string, args ...any), s Signature) {
	line("signature", "%s at %s: %s", s.Manifest, s.Source, s.Reason)
	if s.Detail != "" {
		line("", "%s", s.Detail)
	}
	for i, c := range s.Chain {
		branch := ""
		if i > 0 {
			branch = strings.Repeat("   ", i-1) + "└─ "
		}
		trust := ""
		if c.Anchor != "" {
			trust = ", trusted: " + c.Anchor
		}
		// Not through line, whose cleaning is for one text of one source.
		fmt.Fprintf(b, "  %-10s %s%s\n", "", branch, text.Clean(c.Subject+trust, 400))
		fmt.Fprintf(b, "  %-10s %s%s to %s, SHA-256 %s\n", "", strings.Repeat("   ", i), cli.Date(c.NotBefore), cli.Date(c.NotAfter), text.Clean(c.Thumbprint, 64))
	}
}

func (r *Answer) enforced() verify.Reason {
	if r.Reason == verify.AuditOnly {
		return r.Would
	}
	return r.Reason
}

func podName(p verify.Pod) string {
	if p == (verify.Pod{}) {
		return "no pod"
	}
	return p.Namespace + "/" + p.Name + " " + p.Container
}

// answerText is an answer in words.
func answerText(allowed bool, reason, would verify.Reason) string {
	switch {
	case reason == verify.AuditOnly:
		return "allowed by audit; enforce denies [" + would.String() + "]"
	case allowed:
		return "allowed [" + reason.String() + "]"
	}
	return "denied [" + reason.String() + "]"
}
