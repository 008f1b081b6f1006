package main

import (
	"fmt"
	"io"
	"log/slog"
	"os"

	containerdlog "github.com/containerd/log"
	"github.com/spf13/cobra"

	"github.com/tidewaiter/tidewaiter/cmd/internal/cli"
	"github.com/tidewaiter/tidewaiter/cmd/internal/daemon"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

func runCommand(stderr io.Writer) *cobra.Command {
	var o daemon.Options
	var logLevel string
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run the gate on this node",
		Long: `Register with containerd through NRI, and decide on every container that is to be
created. The gate runs until SIGTERM or SIGINT, stays up without containerd and
without a configuration (then everything is denied), and reads the configuration
again when it changes or on SIGHUP. It logs JSON lines to standard error, and says
how things stand through a socket in the run directory (tidewaiter status).`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var level slog.Level
			if err := level.UnmarshalText([]byte(logLevel)); err != nil {
				return cli.Inconclusive(fmt.Errorf("--log-level: %s is not debug, info, warn or error", text.Quote(logLevel, 40)), "run tidewaiter run --help")
			}
			log := slog.New(slog.NewJSONHandler(daemon.ToJournal(stderr), &slog.HandlerOptions{Level: level}))
			slog.SetDefault(log)    // what libraries log is JSON lines too
			containerdlog.UseSlog() // such as ttrpc, below NRI
			daemon.SmallShare()
			o.Build = thisBuild()
			return daemon.Run(cmd.Context(), o, log)
		},
	}
	cli.ConfigDir(cmd, &o.ConfigDir)
	cli.RunDir(cmd, &o.RunDir)
	cli.StateDir(cmd, &o.StateDir)
	host, _ := os.Hostname()
	cmd.Flags().StringVar(&o.Containerd, "containerd-socket", cli.Env("TIDEWAITER_CONTAINERD_SOCKET", "/run/containerd/containerd.sock"), "containerd's `SOCKET` (TIDEWAITER_CONTAINERD_SOCKET)")
	cmd.Flags().StringVar(&o.NRI, "nri-socket", cli.Env("TIDEWAITER_NRI_SOCKET", "/var/run/nri/nri.sock"), "containerd's NRI `SOCKET` (TIDEWAITER_NRI_SOCKET)")
	cmd.Flags().StringVar(&o.Node, "node", cli.Env("TIDEWAITER_NODE", host), "`NAME` of this node in messages (TIDEWAITER_NODE)")
	cmd.Flags().BoolVar(&o.AwaitConfig, "await-config", false, "do not register with containerd before there is a valid configuration, instead of denying everything until then; for nodes where nothing depends on the gate")
	cmd.Flags().StringVar(&logLevel, "log-level", "info", "`LEVEL` of the log: debug, info, warn or error")
	return cmd
}
