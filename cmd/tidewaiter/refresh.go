package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/tidewaiter/tidewaiter/cmd/internal/cli"
	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

func refreshCommand(stdout io.Writer) *cobra.Command {
	var dir, output string
	cmd := &cobra.Command{
		Use:   "refresh [IMAGE...]",
		Short: "Look for new signatures of the node's images now",
		Long: `Have the gate that runs on this node ask its sources for all signatures of
these images, or without any of all images of the node, and keep those that meet the
policy in force and that it did not have. Of signatures by one signer over one image
that differ in their time alone, the one that can count longest and the newest are kept;
one that counts less than both gives way to them. The end is waited for, which takes a
while where there are many images: mirrors are asked at a moderate pace.

An IMAGE is a name as pods say it; the node must have the image. Exit status 0: all
sources answered, whether there was something new or not; 1: a source failed; 2: the
gate could not be asked, or there is no such image.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := cli.CheckOutput(output); err != nil {
				return err
			}
			list := []control.Refreshed{}
			var printed error
			sum, err := control.AskRefresh(cmd.Context(), dir, args, func(one control.Refreshed) {
				if output == "json" {
					list = append(list, one)
				} else if printed == nil {
					_, printed = io.WriteString(stdout, refreshed(one))
				}
			})
			if err != nil {
				return cli.Inconclusive(err, "is tidewaiter run running, with --run-dir "+dir+"? tidewaiter status says how it is; only root may ask")
			}
			if output == "json" {
				printed = json.NewEncoder(stdout).Encode(struct {
					Schema string              `json:"schema"`
					Images []control.Refreshed `json:"images"`
					New    int                 `json:"new"`
					Failed int                 `json:"failed"`
				}{control.RefreshSchema, list, sum.New, sum.Failed})
			} else if printed == nil {
				_, printed = fmt.Fprintf(stdout, "%s, %s, %d failed\n", cli.Count(sum.Images, "image"), cli.Count(sum.New, "new signature"), sum.Failed)
			}
			if printed != nil {
				return cli.Inconclusive(printed, "")
			}
			if sum.Failed > 0 {
				return cli.Exit(cli.ExitNo)
			}
			return nil
		},
	}
	cli.RunDir(cmd, &dir)
	cli.Output(cmd, &output)
	return cmd
}

// refreshed is one line for a person.
func refreshed(one control.Refreshed) string {
	var b strings.Builder
	b.WriteString(text.Clean(one.Image, 512) + ": ")
	switch {
	case one.Skipped != "":
		fmt.Fprintf(&b, "not asked about [%s] %s", text.Clean(one.Skipped, 32), text.Clean(one.Detail, 300))
	case one.Failed:
		fmt.Fprintf(&b, "FAILED, %s", cli.Count(one.New, "new signature"))
	default:
		b.WriteString(cli.Count(one.New, "new signature"))
	}
	if one.Spare > 0 {
		fmt.Fprintf(&b, ", %d more not kept: those that are kept count as long", one.Spare)
	}
	if one.Unkept > 0 {
		fmt.Fprintf(&b, ", %d NOT KEPT: see tidewaiter status", one.Unkept)
	}
	for _, a := range one.Tried {
		fmt.Fprintf(&b, "; %s: [%s] of %s", text.Clean(a.Source, 300), text.Clean(a.Reason.String(), 32), cli.Count(a.Seen, "signature"))
		if a.Reason != verify.Verified && a.Detail != "" {
			b.WriteString(": " + text.Clean(a.Detail, 300))
		}
	}
	return b.String() + "\n"
}
