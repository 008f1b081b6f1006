package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/tidewaiter/tidewaiter/cmd/internal/cli"
	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/deploy/node"
	"github.com/tidewaiter/tidewaiter/deploy/selftest"
)

func selftestCommand(stdout io.Writer) *cobra.Command {
	var o selftest.Options
	var h node.Options
	var dir, output string
	var guard int
	cmd := &cobra.Command{
		Use:   "selftest",
		Short: "Prove that the runtime of this node refuses unsigned images",
		Long: `Make an unsigned image and have containerd create a container of it under the name of each rule, as a kubelet would: each must be refused, and the
gate's own decisions must have it. An image that the gate allows must be created. No
container is started, no network is used, and everything is removed again.

With --absent it also stops the gate for some seconds, in which every new container
of this node is refused, and tries once more: containerd must refuse by itself.

Exit status: 0 all was as it must be; 1 it was not, and what was let through is said,
or the node audits, where nothing is refused; 2 it could not be tried.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if guard > 0 {
				if err := selftest.Guard(guard, os.Stdin, stdout); err != nil {
					return cli.Inconclusive(fmt.Errorf("continue process %d: %w", guard, err), "kill -CONT the gate's process")
				}
				return nil
			}
			if err := cli.CheckOutput(output); err != nil {
				return err
			}
			if o.Socket = cmp.Or(h.Socket, os.Getenv("TIDEWAITER_CONTAINERD_SOCKET")); o.Socket == "" {
				found, err := node.Detect(h)
				if err != nil {
					return explained(err)
				}
				o.Socket = found.Socket
			}
			o.Now = time.Now
			o.Policy = func(ctx context.Context) (config.Summary, error) { return inForce(ctx, o.RunDir, dir) }
			r, err := selftest.Run(cmd.Context(), o)
			if err != nil {
				if errors.Is(err, context.Canceled) {
					err = errors.New("interrupted; everything that was made is removed")
				}
				return cli.Inconclusive(err, "tidewaiter doctor")
			}
			if output == "json" {
				e := json.NewEncoder(stdout)
				e.SetEscapeHTML(false)
				err = e.Encode(r)
			} else {
				_, err = io.WriteString(stdout, trials(r))
			}
			switch {
			case err != nil:
				return cli.Inconclusive(err, "")
			case r.Result == selftest.Enforced:
				return nil
			case r.Result == selftest.Unknown:
				return cli.Exit(cli.ExitInconclusive)
			}
			return cli.Exit(cli.ExitNo)
		},
	}
	cli.ConfigDir(cmd, &dir)
	cli.RunDir(cmd, &o.RunDir)
	cli.Output(cmd, &output)
	cmd.Flags().StringVar(&h.Runtime, "runtime", "", "`NAME` of what runs pods here: k3s, rke2, microk8s, containerd (as with kubeadm)")
	cmd.Flags().StringVar(&h.Socket, "containerd-socket", "", "containerd's `SOCKET`; otherwise it is found (TIDEWAITER_CONTAINERD_SOCKET)")
	cmd.Flags().BoolVar(&o.Absent, "absent", false, "stop the gate for some seconds too, and see that nothing is created without it")
	cmd.Flags().IntVar(&guard, "guard", 0, "continue the process `PID` when standard input ends")
	_ = cmd.Flags().MarkHidden("guard")
	return cmd
}

// inForce is what the gate has in force, or where no gate can be asked what the
// directory holds.
func inForce(ctx context.Context, run, dir string) (config.Summary, error) {
	var s config.Summary
	err := control.Get(ctx, run, control.Question{Path: config.SummaryPath, Schema: config.SummarySchema, Bytes: 16 << 20}, &s)
	if err == nil {
		return s, nil
	}
	c, failed := config.Load(dir)
	if failed != nil {
		return s, fmt.Errorf("there is nothing in force (%w), and what the directory holds is not valid: %w", err, failed)
	}
	return c.Summary(), nil
}

// conclusions are the last lines.
var conclusions = map[selftest.Result]string{
	selftest.Enforced:    "enforced: everything was as it must be",
	selftest.NotEnforced: "NOT as it must be: tidewaiter doctor looks for the cause",
	selftest.Audits:      "audit: nothing is enforced on this node",
	selftest.Unknown:     "not everything could be tried: tidewaiter doctor looks for the cause",
}

// trials is r for a person.
func trials(r *selftest.Report) string {
	var b strings.Builder
	for _, t := range r.Trials {
		mark := "ok"
		switch {
		case !t.Expected:
			mark = "FAIL"
		case t.Outcome == selftest.None:
			mark = "-"
		}
		fmt.Fprintf(&b, "%-4s  %-8s  ", mark, t.Kind)
		if t.Rule != "" {
			fmt.Fprintf(&b, "rule %q, ", t.Rule)
		}
		if t.Image != "" {
			fmt.Fprintf(&b, "%s: ", t.Image)
		}
		fmt.Fprintln(&b, t.Text)
	}
	if r.Left != "" {
		fmt.Fprintf(&b, "warning: not everything was removed: %s\n", r.Left)
	}
	fmt.Fprintln(&b, conclusions[r.Result])
	return b.String()
}
