package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/tidewaiter/tidewaiter/cmd/internal/cli"
	"github.com/tidewaiter/tidewaiter/cmd/internal/inspect"
	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

func explainCommand(stdout io.Writer) *cobra.Command {
	var dir, output string
	cmd := &cobra.Command{
		Use:   "explain DECISION|CONTAINER|IMAGE",
		Short: "Say why an image may run on this node or not, and what to do",
		Long: `Explain asks the gate what it would answer to an image now, and why: which rule
speaks of it, each signature that there is with its certificates, what failed, which
source was asked and what it said, until when the answer holds, and what to do next.

It takes the id that a refusal ends in, the ID of a container (or how it begins) that
runs or was refused lately, the name of an image on this node, or a digest. Nothing
starts, and no answer changes. For an image that is not on this node there is
tidewaiter verify.

Exit status: 0 it is allowed, 1 denied, 2 it could not be found out; of several, the
worst. In audit it is what enforce would answer.`,
		Example: `  tidewaiter explain 3f2a9c41b07d
  tidewaiter explain registry.example/app:1.2`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return cli.Inconclusive(fmt.Errorf("%d things are named, not one", len(args)), "tidewaiter decisions and tidewaiter images list what can be explained")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := cli.CheckOutput(output); err != nil {
				return err
			}
			return explainOne(cmd.Context(), stdout, dir, output, args[0])
		},
	}
	cli.RunDir(cmd, &dir)
	cli.Output(cmd, &output)
	return cmd
}

func explainOne(ctx context.Context, stdout io.Writer, dir, output, what string) error {
	e, err := inspect.Ask(ctx, dir, what)
	if errors.Is(err, control.ErrRefused) {
		return cli.Inconclusive(err, "tidewaiter decisions and tidewaiter images list what can be explained")
	}
	if err != nil {
		return cli.Inconclusive(err, cli.GateHint(dir))
	}
	if output == "json" {
		err = cli.JSON(stdout, e)
	} else {
		_, err = io.WriteString(stdout, explanation(e))
	}
	if err != nil {
		return cli.Inconclusive(err, "")
	}
	status := cli.ExitYes
	for _, a := range e.About {
		switch r := aboutReason(a); {
		case inspect.Allows(r):
		case r.Inconclusive():
			status = max(status, cli.ExitInconclusive)
		default:
			status = max(status, cli.ExitNo)
		}
	}
	if status != cli.ExitYes {
		return cli.Exit(status)
	}
	return nil
}

// aboutReason is what enforce answers, or what it answered where nothing is there to
// ask about any more.
func aboutReason(a inspect.About) verify.Reason {
	if a.Now != nil {
		return enforced(a.Now.Reason, a.Now.Would)
	}
	if a.Then != nil {
		if s, err := a.Then.Said(); err == nil {
			return verify.Reason(s.Enforced())
		}
	}
	return verify.ImageUnresolved
}

func enforced(reason, would verify.Reason) verify.Reason {
	if reason == verify.AuditOnly {
		return would
	}
	return reason
}

// explanation is e for a person. What the gate has from elsewhere is cleaned.
func explanation(e inspect.Explanation) string {
	var b strings.Builder
	for i, a := range e.About {
		if i > 0 {
			b.WriteByte('\n')
		}
		explainAbout(&b, a)
	}
	return b.String()
}

func explainAbout(b *strings.Builder, a inspect.About) {
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
		line("listed", "in %s: there a floor file lets it start all the same", strings.Join(a.Listed, ", "))
	}
	for _, s := range a.Signatures {
		explainSignature(b, line, s)
	}
	if a.Next != "" {
		line("next", "%s", a.Next)
	}
}

func explainNow(line func(name, format string, args ...any), a inspect.About, r inspect.Answer) {
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
		line("rule", "statement %q: level %s, trust stores %s, identities %s", s.Name, s.Level, listOr(s.TrustStores, "none"), listOr(s.TrustedIdentities, "none"))
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

func explainSignature(b *strings.Builder, line func(name, format string, args ...any), s inspect.Signature) {
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
		fmt.Fprintf(b, "  %-10s %s%s to %s, SHA-256 %s\n", "", strings.Repeat("   ", i), date(c.NotBefore), date(c.NotAfter), text.Clean(c.Thumbprint, 64))
	}
}

func date(t time.Time) string { return t.UTC().Format("2006-01-02") }

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

func listOr(list []string, otherwise string) string {
	if len(list) == 0 {
		return otherwise
	}
	return strings.Join(list, ", ")
}
