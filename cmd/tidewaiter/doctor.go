package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/tidewaiter/tidewaiter/cmd/internal/cli"
	"github.com/tidewaiter/tidewaiter/deploy/doctor"
)

func doctorCommand(stdout io.Writer) *cobra.Command {
	var o doctor.Options
	var output string
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Check whether the gate of this node is in place, and what to do if it is not",
		Long: `Look at everything that the gate needs, and change nothing: what containerd
is configured with by its own account, whether the containerd that runs has read
that, the gate, its configuration, the sources of signatures, the disk and the clock.
Each line is ok, warn or fail, with what to do next where it is not ok. What only
enforce needs is no fail in audit.

Exit status: 0 there is no fail; 1 there is one; 2 what failed could only not be
found out. tidewaiter selftest tries what doctor concludes.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := cli.CheckOutput(output); err != nil {
				return err
			}
			o.Now, o.Built = time.Now, builtAt()
			o.Host.Socket = cmp.Or(o.Host.Socket, os.Getenv("TIDEWAITER_CONTAINERD_SOCKET"))
			if err := absolute(&o); err != nil {
				return cli.Inconclusive(err, "")
			}
			f, err := doctor.Gather(cmd.Context(), o)
			if err != nil {
				return explained(err)
			}
			r := doctor.Examine(f)
			if output == "json" {
				e := json.NewEncoder(stdout)
				e.SetEscapeHTML(false)
				err = e.Encode(r)
			} else {
				_, err = io.WriteString(stdout, diagnosis(r))
			}
			if err != nil {
				return cli.Inconclusive(err, "")
			}
			switch r.Result {
			case "ok":
				return nil
			case "fail":
				return cli.Exit(cli.ExitNo)
			}
			return cli.Exit(cli.ExitInconclusive)
		},
	}
	cli.ConfigDir(cmd, &o.ConfigDir)
	cli.StateDir(cmd, &o.StateDir)
	cli.RunDir(cmd, &o.RunDir)
	cli.Output(cmd, &output)
	runtimeFlags(cmd, &o.Host)
	cmd.Flags().BoolVar(&o.Offline, "offline", false, "ask no mirror and no registry")
	return cmd
}

// absolute makes paths that are meant from here those of the host, unless that is
// mounted elsewhere.
func absolute(o *doctor.Options) (err error) {
	if filepath.Clean(o.Host.Root) != "/" {
		return nil
	}
	for _, p := range []*string{&o.ConfigDir, &o.StateDir, &o.RunDir, &o.Host.Config, &o.Host.Binary, &o.Host.Socket} {
		if *p != "" && err == nil {
			*p, err = filepath.Abs(*p)
		}
	}
	return err
}

// diagnosis is r for a person.
func diagnosis(r *doctor.Report) string {
	var b strings.Builder
	for _, f := range r.Findings {
		fmt.Fprintf(&b, "%-4s  %-13s  %s\n", f.Level, f.Check, f.Text)
		if f.Next != "" {
			fmt.Fprintf(&b, "      %-13s  %s\n", "next", f.Next)
		}
	}
	fmt.Fprintf(&b, "%d ok, %d warn, %d fail\n", r.Count(doctor.OK), r.Count(doctor.Warn), r.Count(doctor.Fail))
	return b.String()
}

// builtAt is when the source of this program was committed: it cannot be earlier now.
func builtAt() time.Time {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.time" {
				t, _ := time.Parse(time.RFC3339, s.Value)
				return t
			}
		}
	}
	return time.Time{}
}
