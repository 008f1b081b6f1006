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
	"github.com/spf13/pflag"

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
		Args:          verbs,
		RunE: func(*cobra.Command, []string) error {
			if version {
				_, err := fmt.Fprintln(stdout, thisBuild())
				return err
			}
			return cli.Inconclusive(errors.New("no verb given"), "run tidewaiter --help")
		},
	}
	root.SetOut(stdout)
	root.SetErr(stderr)
	// Not cobra's Version: to print it in another form takes a template, and with
	// text/template in the binary the linker keeps every method of every type, which
	// is a quarter of it (TestBinary).
	root.Flags().BoolVar(&version, "version", false, "print what this binary is")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return cli.Inconclusive(err, nearest(flags(cmd), unknownFlag(err), "--", cmd))
	})
	root.SetHelpCommand(&cobra.Command{
		Use:   "help [VERB]",
		Short: "Show what a verb does",
		RunE: func(_ *cobra.Command, args []string) error {
			cmd, rest, err := root.Find(args)
			if err != nil || len(rest) > 0 {
				return cli.Inconclusive(fmt.Errorf("no verb %s", text.Quote(strings.Join(args, " "), 80)), "run tidewaiter --help")
			}
			cmd.InitDefaultHelpFlag()
			return cmd.Help()
		},
	})
	for _, g := range []struct {
		title string
		verbs []*cobra.Command
	}{
		{"Verify", []*cobra.Command{verifyCommand(stdout), imagesCommand(stdout), policyCommand(stdout), selftestCommand(stdout)}},
		{"Inspect", []*cobra.Command{statusCommand(stdout), explainCommand(stdout), decisionsCommand(stdout), doctorCommand(stdout)}},
		{"Operate", []*cobra.Command{installCommand(stdout), runCommand(stderr), refreshCommand(stdout), uninstallCommand(stdout)}},
		{"Offline", []*cobra.Command{evidenceCommand(os.Stdin, stdout, stderr)}},
	} {
		root.AddGroup(&cobra.Group{ID: g.title, Title: g.title + ":"})
		for _, verb := range g.verbs {
			verb.GroupID = g.title
			root.AddCommand(verb)
		}
	}
	root.AddCommand(versionCommand(stdout))
	return root
}

// verbs refuses what is no verb of cmd, and names the one that was meant.
func verbs(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	return cli.Inconclusive(fmt.Errorf("unknown verb %s", text.Quote(args[0], 80)), nearest(cmd, args[0], "", cmd))
}

// nearest is the hint for a word that is none of the commands of from: those that are
// spelt alike, behind prefix, or else the help of cmd.
func nearest(from *cobra.Command, word, prefix string, cmd *cobra.Command) string {
	from.SuggestionsMinimumDistance = 2
	if list := from.SuggestionsFor(word); word != "" && len(list) > 0 && len(word) <= 80 {
		return "did you mean " + prefix + strings.Join(list, " or "+prefix) + "? See " + cmd.CommandPath() + " --help"
	}
	return "run " + cmd.CommandPath() + " --help"
}

// flags are those of cmd, as commands: cobra knows which of these are spelt alike, and not
// which flags are.
func flags(cmd *cobra.Command) *cobra.Command {
	c := &cobra.Command{}
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		c.AddCommand(&cobra.Command{Use: f.Name, Run: func(*cobra.Command, []string) {}})
	})
	return c
}

// unknownFlag is the name of the flag that err says there is not, or nothing.
func unknownFlag(err error) string {
	var none *pflag.NotExistError
	if errors.As(err, &none) {
		return none.GetSpecifiedName()
	}
	return ""
}
