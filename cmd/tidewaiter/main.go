// Tidewaiter lets no container start on this node unless the image that it
// really runs carries the signatures that the node's own policy asks for.
//
// Exit status of every verb: 0 yes or healthy; 1 denied or unhealthy; 2 it could
// not be found out. Answers go to standard output. Everything else goes to
// standard error with a "tidewaiter:" prefix, without a capital letter at the
// start or a period at the end, and a "hint:" line where there is a next step.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/tidewaiter/tidewaiter/cmd/internal/cli"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

func main() { os.Exit(Main(os.Args[1:], os.Stdout, os.Stderr)) }

// Main is the program with its surroundings handed in; it returns the exit status.
func Main(args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the program at once
	if calledByPull(args) {
		fmt.Fprintln(stdout, "tidewaiter: refused, since tidewaiter does not judge pulls: take the program out of containerd's image verifier directory (bin_dir); its gate judges each container when it is created")
		return cli.ExitNo
	}
	root := command(stdout, stderr)
	root.SetArgs(args)
	return cli.Report(stderr, root.ExecuteContext(ctx))
}

// calledByPull reports whether containerd started the program as an image verifier: it
// starts each program in bin_dir with these flags, and shows what the program writes to
// standard output as the reason of a refusal (containerd's docs/image-verification.md).
func calledByPull(args []string) bool {
	return len(args) == 6 && args[0] == "-name" && args[2] == "-digest" && args[4] == "-stdin-media-type"
}

func command(stdout, stderr io.Writer) *cobra.Command {
	var version bool
	root := &cobra.Command{
		Use:           "tidewaiter",
		Short:         "Verify image signatures on the node, before a container starts",
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if version {
				_, err := fmt.Fprintln(stdout, thisBuild())
				return err
			}
			return cli.Inconclusive(errors.New("no verb given"), "run tidewaiter --help")
		},
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
	}
	root.SetOut(stdout)
	root.SetErr(stderr)
	// Not cobra's Version: to print it in another form takes a template, and with
	// text/template in the binary the linker keeps every method of every type, which
	// is a quarter of it (TestBinary).
	root.Flags().BoolVar(&version, "version", false, "print what this binary is")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return cli.Inconclusive(err, "run "+cmd.CommandPath()+" --help")
	})
	root.SetHelpCommand(&cobra.Command{
		Use:   "help [VERB]",
		Short: "Print what a verb does",
		RunE: func(_ *cobra.Command, args []string) error {
			cmd, rest, err := root.Find(args)
			if err != nil || len(rest) > 0 {
				return cli.Inconclusive(fmt.Errorf("no verb %s", text.Quote(strings.Join(args, " "), 80)), "run tidewaiter --help")
			}
			cmd.InitDefaultHelpFlag()
			return cmd.Help()
		},
	})
	root.AddCommand(evidenceCommand(os.Stdin, stdout, stderr), decisionsCommand(stdout), doctorCommand(stdout), explainCommand(stdout), imagesCommand(stdout), policyCommand(stdout))
	root.AddCommand(refreshCommand(stdout), runCommand(stderr), selftestCommand(stdout), statusCommand(stdout), verifyCommand(stdout), versionCommand(stdout))
	root.AddCommand(installCommand(stdout), uninstallCommand(stdout))
	return root
}
