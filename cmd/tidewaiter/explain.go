package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/tidewaiter/tidewaiter/cmd/internal/cli"
	"github.com/tidewaiter/tidewaiter/cmd/internal/inspect"
	"github.com/tidewaiter/tidewaiter/deploy/control"
)

func explainCommand(stdout io.Writer) *cobra.Command {
	var dir, output string
	cmd := &cobra.Command{
		Use:   "explain DECISION|CONTAINER|IMAGE",
		Short: "Show why an image may run on this node or not, and what to do",
		Long: `Ask the gate what it would answer to an image now, and why: which rule
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
		_, err = io.WriteString(stdout, e.Text())
	}
	if err != nil {
		return cli.Inconclusive(err, "")
	}
	status := cli.ExitYes
	for _, a := range e.About {
		switch r := a.Reason(); {
		case r.Allows():
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
