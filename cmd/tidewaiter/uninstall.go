package main

import (
	"io"

	"github.com/spf13/cobra"

	"github.com/tidewaiter/tidewaiter/deploy/install"
)

func uninstallCommand(stdout io.Writer) *cobra.Command {
	var o hostOptions
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Stop requiring the gate and uninstall it",
		Long: `Take out of containerd's configuration what makes it refuse containers without the
gate, and then the service and the program. It needs neither a gate that
answers nor a network, and leaves a line in the node's log. The containerd that runs
has read its old configuration: restart it, or have it restarted with --restart. Until
that is done the gate stays; run uninstall again afterwards, or with --force at once.

If no service runs the gate, uninstall ends its process. It does so only if that is
certain to be this installation's gate; otherwise it names the process, exits with 2,
and leaves the gate's files.

Configuration and state stay, unless --purge is given. State is not deleted while
another gate runs here, such as a pod's. A containerd that nothing makes require the
gate is not restarted.

Exit status: 0 done, or there was nothing to do; 2 it could not be done.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Optional = true
			return onHost(cmd, stdout, o, (*install.Installation).Uninstall)
		},
	}
	hostFlags(cmd, &o)
	cmd.Flags().BoolVar(&o.restart, "restart", false, "restart containerd, if it may require the gate")
	cmd.Flags().BoolVar(&o.purge, "purge", false, "delete the configuration, the state and the run directory too")
	cmd.Flags().BoolVar(&o.force, "force", false, "do not wait for a restart of containerd; delete what another gate uses")
	return cmd
}
