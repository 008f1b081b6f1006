package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/tidewaiter/tidewaiter/cmd/internal/cli"
	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

type decisionsOptions struct {
	runDir string
	follow bool
	since  time.Duration
	filter control.Filter
	output string
}

func decisionsCommand(stdout io.Writer) *cobra.Command {
	var o decisionsOptions
	cmd := &cobra.Command{
		Use:   "decisions",
		Short: "List what the gate answered lately",
		Long: `Ask the gate for what it answered since the node started, as far as there is room:
2 MiB in the run directory, the oldest goes first. There is a line for
each container that was refused or, in audit, would have been, and for each that runs
since its digest is listed; and for each verification and what came of it. Of what is
repeated there is one line a minute (of a verification one an hour), with how often.
Containers that were allowed from memory have none. The last word before the image is
what tidewaiter explain takes.

With --output json each line is a JSON object. Exit status: 0, also where there is
nothing to list; 2 where no gate answers.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := cli.CheckOutput(o.output); err != nil {
				return err
			}
			if o.since < 0 {
				return cli.Inconclusive(errors.New("--since: is in the future"), "for example --since 1h")
			}
			if o.since > 0 {
				o.filter.Since = time.Now().Add(-o.since)
			}
			return listDecisions(cmd.Context(), stdout, o)
		},
	}
	cli.RunDir(cmd, &o.runDir)
	cli.Output(cmd, &o.output)
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
	headed := o.output == "json"
	for {
		p, err := control.AskDecisions(ctx, o.runDir, o.filter)
		switch {
		case ctx.Err() != nil && o.follow:
			return nil
		case err != nil && (answered.IsZero() || time.Since(answered) > followLost):
			return cli.Inconclusive(err, cli.GateHint(o.runDir))
		case err == nil:
			answered = time.Now()
		}
		if !headed && len(p.Lines) > 0 {
			headed = true
			if _, err := fmt.Fprintf(stdout, "%-20s  %-6s  %-7s  %-23s  %-12s  IMAGE  POD\n", "TIME", "WHAT", "ANSWER", "REASON", "ID"); err != nil {
				return cli.Inconclusive(err, "")
			}
		}
		for _, l := range p.Lines {
			if err := printLine(stdout, o.output, l); err != nil {
				return cli.Inconclusive(err, "")
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

// printLine writes one line. All that is not ours is cleaned.
func printLine(w io.Writer, output string, l control.Line) error {
	if output == "json" {
		return cli.JSON(w, l)
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
		pod = text.Clean(s.Pod.Namespace+"/"+s.Pod.Name, 120) + " " + text.Clean(s.Pod.Container, 63)
	}
	again := ""
	if l.Repeats > 0 {
		again = fmt.Sprintf(" (and %d times before)", l.Repeats)
	}
	_, err = fmt.Fprintf(w, "%s  %-6s  %-7s  %-23s  %s  %s  %s%s\n", l.At.UTC().Format(time.RFC3339), what, answer,
		text.Clean(s.Enforced(), 32), text.Clean(s.ID, 12), text.Clean(s.Image, 256), pod, again)
	return err
}
