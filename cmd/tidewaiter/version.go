package main

import (
	"encoding/json"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/tidewaiter/tidewaiter/cmd/internal/cli"
)

// version is set by the build: -ldflags "-X main.version=v0.1.0".
var version = "devel"

func thisBuild() cli.Build { return cli.ThisBuild(version) }

func versionCommand(stdout io.Writer) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if err := cli.CheckOutput(output); err != nil {
				return err
			}
			b := thisBuild()
			if output == "json" {
				return json.NewEncoder(stdout).Encode(b)
			}
			_, err := fmt.Fprintln(stdout, b)
			return err
		},
	}
	cli.Output(cmd, &output)
	return cmd
}
