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
	"io/fs"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/tidewaiter/tidewaiter/verify"
)

func main() { os.Exit(Main(os.Args[1:], os.Stdout, os.Stderr)) }

// Exit statuses.
const (
	exitYes     = 0
	exitNo      = 1
	exitUnknown = 2
)

// A failure ends the program with a status, and with a message and a hint where
// they are set.
type failure struct {
	status int
	err    error // nil: everything was said
	hint   string
}

func (f *failure) Error() string {
	if f.err == nil {
		return fmt.Sprintf("exit status %d", f.status)
	}
	return f.err.Error()
}

func (f *failure) Unwrap() error { return f.err }

// unknown is a failure to find out.
func unknown(err error, hint string) error {
	if errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0 {
		hint = "run it as root"
	}
	return &failure{exitUnknown, err, hint}
}

// Main is the program with its surroundings handed in; it returns the exit status.
func Main(args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the program at once
	root := command(stdout, stderr)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitYes
	}
	f := &failure{exitUnknown, err, "run tidewaiter --help"}
	errors.As(err, &f)
	if f.err != nil {
		fmt.Fprintf(stderr, "tidewaiter: %v\n", f.err)
		if f.hint != "" {
			fmt.Fprintf(stderr, "hint: %s\n", f.hint)
		}
	}
	return f.status
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
			return unknown(errors.New("no verb given"), "run tidewaiter --help")
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
		return unknown(err, "run "+cmd.CommandPath()+" --help")
	})
	root.SetHelpCommand(&cobra.Command{
		Use:   "help [VERB]",
		Short: "Print what a verb does",
		RunE: func(_ *cobra.Command, args []string) error {
			cmd, rest, err := root.Find(args)
			if err != nil || len(rest) > 0 {
				return unknown(fmt.Errorf("no verb %s", verify.Quote(strings.Join(args, " "), 80)), "run tidewaiter --help")
			}
			cmd.InitDefaultHelpFlag()
			return cmd.Help()
		},
	})
	root.AddCommand(bundleCommand(os.Stdin, stdout, stderr), decisionsCommand(stdout), doctorCommand(stdout), explainCommand(stdout), imagesCommand(stdout), policyCommand(stdout))
	root.AddCommand(refreshCommand(stdout), runCommand(stderr), selftestCommand(stdout), statusCommand(stdout), verifyCommand(stdout), versionCommand(stdout))
	root.AddCommand(installCommand(stdout), uninstallCommand(stdout))
	return root
}

// env is the environment variable's value, or otherwise.
func env(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}

// configDir adds the flag that every verb has that reads the configuration.
func configDir(cmd *cobra.Command, dir *string) {
	cmd.Flags().StringVar(dir, "config-dir", env("TIDEWAITER_CONFIG_DIR", "/etc/tidewaiter"),
		"`DIR` of config.yaml, trustpolicy.json and truststore (TIDEWAITER_CONFIG_DIR)")
}

// runDir adds the flag that every verb has that a running gate is asked by.
func runDir(cmd *cobra.Command, dir *string) {
	cmd.Flags().StringVar(dir, "run-dir", env("TIDEWAITER_RUN_DIR", "/run/tidewaiter"), "`DIR` of the control socket (TIDEWAITER_RUN_DIR)")
}

// stateDir adds the flag that every verb has that reads or writes what the gate keeps.
func stateDir(cmd *cobra.Command, dir *string) {
	cmd.Flags().StringVar(dir, "state-dir", env("TIDEWAITER_STATE_DIR", "/var/lib/tidewaiter"), "`DIR` of what is kept over a restart; empty: nothing is (TIDEWAITER_STATE_DIR)")
}

// outputFlag adds the flag that every verb has that prints.
func outputFlag(cmd *cobra.Command, o *string) {
	cmd.Flags().StringVarP(o, "output", "o", "text", "`FORM` of the answer: text or json")
}

// checkOutput refuses an unknown form before any work is done.
func checkOutput(o string) error {
	if o != "text" && o != "json" {
		return unknown(fmt.Errorf("--output: %q is neither text nor json", o), "")
	}
	return nil
}
