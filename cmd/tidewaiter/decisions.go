package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/tidewaiter/tidewaiter/cmd/internal/decisions"
	"github.com/tidewaiter/tidewaiter/verify"
)

type decisionsOptions struct {
	runDir string
	follow bool
	since  time.Duration
	filter decisions.Filter
	output string
}

func decisionsCommand(stdout io.Writer) *cobra.Command {
	var o decisionsOptions
	cmd := &cobra.Command{
		Use:   "decisions",
		Short: "List what the gate answered lately",
		Long: `Decisions asks the gate for what it answered since the node started, as far as
there is room: 2 MiB in the run directory, the oldest goes first. There is a line for
each container that was refused or, in audit, would have been, and for each that runs
since its digest is listed; and for each verification and what came of it. Of what is
repeated there is one line a minute (of a verification one an hour), with how often.
Containers that were allowed from memory have none. The last word before the image is
what tidewaiter explain takes.

With --output json each line is a JSON object. Exit status: 0, also where there is
nothing to list; 2 where no gate answers.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(o.output); err != nil {
				return err
			}
			if o.since < 0 {
				return unknown(errors.New("--since: is in the future"), "for example --since 1h")
			}
			if o.since > 0 {
				o.filter.Since = time.Now().Add(-o.since)
			}
			return listDecisions(cmd.Context(), stdout, o)
		},
	}
	runDir(cmd, &o.runDir)
	outputFlag(cmd, &o.output)
	cmd.Flags().BoolVarP(&o.follow, "follow", "f", false, "go on with what comes, until interrupted")
	cmd.Flags().BoolVar(&o.filter.Denied, "denied", false, "only what enforce refuses or would refuse, without PENDING, which the next try settles")
	cmd.Flags().DurationVar(&o.since, "since", 0, "only what is not older than `DURATION`, such as 1h")
	cmd.Flags().StringVar(&o.filter.Reason, "reason", "", "only answers with `CODE`; of audit, what enforce would have said")
	return cmd
}

const (
	followEvery = time.Second
	followLost  = time.Minute // how long a gate that does not answer any more is waited for: it may be updated
)

func listDecisions(ctx context.Context, stdout io.Writer, o decisionsOptions) error {
	var answered time.Time
	for {
		p, err := decisions.Ask(ctx, o.runDir, o.filter)
		switch {
		case ctx.Err() != nil && o.follow:
			return nil
		case err != nil && (answered.IsZero() || time.Since(answered) > followLost):
			return unknown(err, gateHint(o.runDir))
		case err == nil:
			answered = time.Now()
		}
		for _, l := range p.Decisions {
			if err := printLine(stdout, o.output, l); err != nil {
				return unknown(err, "")
			}
		}
		if err == nil {
			o.filter.After = p.Last
		}
		if p.More {
			continue
		}
		if !o.follow {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(followEvery):
		}
	}
}

// gateHint is what to do where no gate answers.
func gateHint(dir string) string {
	return "is tidewaiter run running, with --run-dir " + dir + "? Its log says why it cannot be asked; only root may ask"
}

// printLine writes one line. All that is not ours is cleaned.
func printLine(w io.Writer, output string, l decisions.Line) error {
	if output == "json" {
		return plainJSON(w, l)
	}
	s, err := l.Said()
	if err != nil {
		return nil // of another version; JSON has it
	}
	what := map[string]string{"StartContainer": "start", "RunPodSandbox": "pod", "": "verify"}[l.Hook]
	if what == "" {
		what = "create"
	}
	answer := "denied"
	switch {
	case s.Would != "":
		answer = "audit"
	case s.Allowed:
		answer = "allowed"
	}
	pod := "-"
	if s.Pod != nil {
		pod = verify.Clean(s.Pod.Namespace+"/"+s.Pod.Name, 120) + " " + verify.Clean(s.Pod.Container, 63)
	}
	again := ""
	if l.Repeats > 0 {
		again = fmt.Sprintf(" (and %d times before)", l.Repeats)
	}
	_, err = fmt.Fprintf(w, "%s  %-6s  %-7s  %-23s  %s  %s  %s%s\n", l.At.UTC().Format(time.RFC3339), what, answer,
		verify.Clean(s.Enforced(), 32), verify.Clean(s.ID, 12), verify.Clean(s.Image, 256), pod, again)
	return err
}

// plainJSON writes v on one line, with < and > as they are.
func plainJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	return e.Encode(v)
}
