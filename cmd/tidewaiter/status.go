package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/tidewaiter/tidewaiter/cmd/internal/cli"
	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

func statusCommand(stdout io.Writer) *cobra.Command {
	var dir, output string
	var ready bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the gate's health",
		Long: `Ask the gate that runs on this node, through the socket in its run directory, and
read nothing else. Exit status 0: it is healthy; 1: what is wrong
is said, with what to do next; 2: no gate answers. With --ready, exit status 0 means
that the runtime asks the gate and a configuration is in force: for probes.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := cli.CheckOutput(output); err != nil {
				return err
			}
			s, err := control.Ask(cmd.Context(), dir)
			if err != nil {
				return cli.Inconclusive(err, cli.GateHint(dir))
			}
			yes, value, text := s.Healthy, any(s), screen
			if ready {
				yes, value, text = s.Ready, s.Readiness(), readiness
			}
			if output == "json" {
				err = json.NewEncoder(stdout).Encode(value)
			} else {
				_, err = io.WriteString(stdout, text(s))
			}
			if err != nil {
				return cli.Inconclusive(err, "")
			}
			if !yes {
				return cli.Exit(cli.ExitNo)
			}
			return nil
		},
	}
	cli.RunDir(cmd, &dir)
	cli.Output(cmd, &output)
	cmd.Flags().BoolVar(&ready, "ready", false, "say only whether it is ready")
	return cmd
}

// readiness is the line of --ready.
func readiness(s *control.Status) string {
	r := s.Readiness()
	if r.Ready {
		return "ready\n"
	}
	return fmt.Sprintf("not ready: [%s] %s\n", text.Clean(r.Reason, 64), text.Clean(r.Detail, 1000))
}

// screen is s for a person. What the gate has from elsewhere is cleaned.
func screen(s *control.Status) string {
	var b strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "  %-14s %s\n", name, text.Clean(fmt.Sprintf(format, args...), 1000))
	}
	health := "healthy"
	if !s.Healthy {
		health = "NOT healthy"
	}
	fmt.Fprintf(&b, "tidewaiter %s on %s: %s\n", text.Clean(s.Version, 64), text.Clean(s.Node, 64), health)
	for _, p := range s.Problems {
		line("problem", "[%s] %s", p.Code, p.Text)
		line("next", "%s", p.Next)
	}
	c, r := s.Configuration, s.Runtime
	if c.Revision != "" {
		line("mode", "%s, assurance %s", s.Mode, s.Assurance)
		line("configuration", "%s, revision %s, since %s", c.Dir, c.Revision, when(c.Since))
	}
	if r.Registered {
		line("runtime", "%s %s asks since %s in %s", r.Name, r.Version, when(r.Since), strings.Join(r.Hooks, ", "))
	}
	for _, mode := range slices.Sorted(maps.Keys(s.Decisions)) {
		var counts []string
		for _, reason := range slices.Sorted(maps.Keys(s.Decisions[mode])) {
			counts = append(counts, fmt.Sprintf("%s %d", reason, s.Decisions[mode][reason]))
		}
		line("decisions", "in %s: %s", mode, strings.Join(counts, ", "))
	}
	line("cache", "%d allowed and %d denied images, %d verifications, %d wait", s.Cache.Allowed, s.Cache.Denied, s.Cache.Running, s.Cache.Waiting+s.Cache.Prefetching)
	if n := s.Running; n.At != nil {
		denied, unknown := refused(n)
		line("running", "%d containers, %d would be denied, %d could not be judged, %d are ungated, %d without an image; looked at %s", n.Containers, denied, unknown, n.Ungated, n.ImageMissing, when(n.At))
		if n.Error != "" {
			line("warning", "not all that runs was looked at: %s", n.Error)
		}
		for i, f := range n.Found {
			if i == shown {
				line("", "and %d more: --output json", len(n.Found)-shown)
				break
			}
			what := f.Reason
			if f.ImageMissing {
				what = "no image"
			}
			if f.Ungated {
				what += ", ungated"
			}
			line("", "%s/%s %s %s: %s", f.Namespace, f.Pod, f.Container, f.Image, what)
		}
		for _, p := range n.Pauses {
			if p.Reason != string(verify.Verified) && p.Reason != string(verify.AllowedByDigest) || !p.Pinned {
				line("warning", "the pause image %s: pinned %t, %s %s", p.Image, p.Pinned, p.Reason, p.Detail)
			}
		}
	}
	if k := s.Store; k != nil {
		line("store", "%s in %d KiB below %s", cli.Count(k.Signatures, "signature"), (k.Bytes+1023)/1024, k.Dir)
		if k.Error != "" {
			line("warning", "signatures are not kept: %s", k.Error)
		}
		for i, b := range k.Archives {
			if i == shown {
				line("", "and %d more: --output json", len(k.Archives)-shown)
				break
			}
			line("archive", "%s: %s", b.Name, cli.Count(b.Signatures, "signature"))
		}
		for _, b := range k.Archives {
			if b.Error != "" {
				line("warning", "evidence archive %s cannot be read, or not all of it: %s", b.Name, b.Error)
			}
		}
		if k.Unread != "" {
			line("warning", "not all evidence archives are read: %s", k.Unread)
		}
	}
	if n := s.Refresh; n.Every != "" {
		text := fmt.Sprintf("signatures of %s, every %s", cli.Count(n.Images, "image"), n.Every)
		if n.Every == "0s" {
			text = fmt.Sprintf("signatures of %s, only on demand", cli.Count(n.Images, "image"))
		}
		if n.Last != nil {
			text += ", last " + when(n.Last)
		}
		if n.Next != nil {
			text += ", next " + when(n.Next)
		}
		line("refresh", "%s; %d new", text, n.New)
		if n.Failing > 0 {
			line("warning", "signatures of %s cannot be looked for again: %s", cli.Count(n.Failing, "image"), n.Error)
		}
	}
	if s.Log.Dropped > 0 {
		line("warning", "%d answers are not in the log, which was too slow", s.Log.Dropped)
	}
	if r.Slow > 0 {
		line("warning", "%d answers took longer than the gate allows itself: the node is short of CPU, or stopped it", r.Slow)
	}
	for _, w := range slices.Concat(s.Warnings, c.Warnings) {
		line("warning", "%s", w)
	}
	return b.String()
}

// shown is how many containers the screen names.
const shown = 5

// refused counts what runs and enforce would not let in, as images counts images: those
// that it would deny, and those of which it could not be found out.
func refused(r control.Running) (denied, unknown int) {
	for reason, n := range r.Reasons {
		switch r := verify.Reason(reason); {
		case r == verify.Verified || r == verify.AllowedByDigest:
		case r.Inconclusive():
			unknown += n
		default:
			denied += n
		}
	}
	return denied, unknown
}

func when(t *time.Time) string {
	if t == nil {
		return "a time that is not known"
	}
	return t.UTC().Format(time.RFC3339)
}
