package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/tidewaiter/tidewaiter/cmd/internal/cli"
	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/policy"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

func policyCommand(stdout io.Writer) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "policy",
		Short: "Check, show and try the configuration",
		Args:  verbs,
		RunE: func(*cobra.Command, []string) error {
			return cli.Inconclusive(errors.New("policy: no verb given"), "there is policy check, policy init, policy show and policy test")
		},
	}
	cmd.AddCommand(policyCheckCommand(stdout), policyInitCommand(stdout), policyShowCommand(stdout), policyTestCommand(stdout))
	return cmd
}

func policyCheckCommand(stdout io.Writer) *cobra.Command {
	var dir, output string
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Check whether a configuration directory would be put in force",
		Long: `Read the configuration directory exactly as tidewaiter run does, and print
what its author may not mean. Exit status: 0 it would be put in force; 2 it would not,
and what is wrong is said with its file and line.`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if err := cli.CheckOutput(output); err != nil {
				return err
			}
			c, err := cli.LoadConfig(dir)
			if err != nil {
				return err
			}
			c.Proxied(os.Environ())
			s := c.Summary()
			if output == "json" {
				return cli.Written(cli.JSON(stdout, struct {
					Schema   string   `json:"schema"`
					Valid    bool     `json:"valid"`
					Dir      string   `json:"dir"`
					Revision string   `json:"revision"`
					Mode     string   `json:"mode"`
					Warnings []string `json:"warnings"`
				}{"tidewaiter.dev/policy-check/v1", true, s.Dir, s.Revision, s.Mode, s.Warnings}))
			}
			var b strings.Builder
			fmt.Fprintf(&b, "%s is valid: mode %s, revision %s, %d statements, %d certificates, %d warnings\n",
				text.Clean(s.Dir, 300), s.Mode, s.Revision, len(s.Statements), len(s.Stores), len(s.Warnings))
			for _, w := range s.Warnings {
				fmt.Fprintf(&b, "  warning  %s\n", text.Clean(w, 600))
			}
			_, err = io.WriteString(stdout, b.String())
			return cli.Written(err)
		},
	}
	cli.ConfigDir(cmd, &dir)
	cli.Output(cmd, &output)
	return cmd
}

func policyShowCommand(stdout io.Writer) *cobra.Command {
	var dir, run, output string
	cmd := &cobra.Command{
		Use:   "show",
		Short: "Show what is in force, or what a directory says",
		Long: `Ask the gate for the configuration that is in force: statements with their
scopes, certificates of the trust stores, mirrors (those of containerd's hosts.toml
too), aliases, and digests that are listed. With --config-dir read that directory
instead and ask nobody. Secrets are not shown.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := cli.CheckOutput(output); err != nil {
				return err
			}
			var s config.Summary
			if cmd.Flags().Changed("config-dir") {
				c, err := cli.LoadConfig(dir)
				if err != nil {
					return err
				}
				s = c.Summary()
			} else {
				err := control.Get(cmd.Context(), run, control.Question{Path: config.SummaryPath, Schema: config.SummarySchema, Bytes: 16 << 20}, &s)
				if errors.Is(err, control.ErrRefused) {
					return cli.Inconclusive(err, "run tidewaiter status")
				}
				if err != nil {
					return cli.Inconclusive(err, cli.GateHint(run)+"; --config-dir shows a directory")
				}
			}
			if output == "json" {
				return cli.Written(cli.JSON(stdout, s))
			}
			_, err := io.WriteString(stdout, summary(s))
			return cli.Written(err)
		},
	}
	cli.ConfigDir(cmd, &dir)
	cli.RunDir(cmd, &run)
	cli.Output(cmd, &output)
	return cmd
}

// summary is s for a person.
func summary(s config.Summary) string {
	var b strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "  %-13s %s\n", name, text.Clean(fmt.Sprintf(format, args...), 1000))
	}
	fmt.Fprintf(&b, "%s: mode %s, revision %s\n", text.Clean(s.Dir, 300), s.Mode, s.Revision)
	for _, st := range s.Statements {
		printStatement(line, st)
	}
	for _, a := range s.Stores {
		line("certificate", "%s: %s, %s to %s, SHA-256 %s", a.File, a.Subject, cli.Date(a.NotBefore), cli.Date(a.NotAfter), a.Thumbprint)
	}
	for _, l := range s.Layouts {
		line("layout", "%s", l)
	}
	for _, m := range s.Mirrors {
		line("mirror", "of %s: %s (%s)", m.Host, m.URL, m.File)
		for _, r := range m.Redirects {
			line("redirect", "from %s to %s", m.URL, r)
		}
	}
	line("network", "%s", s.Network)
	for _, r := range s.Redirects {
		line("redirect", "from registries that are not listed in config.yaml to %s", r)
	}
	for _, a := range s.Aliases {
		line("alias", "%s", a)
	}
	for _, f := range s.AllowDigests {
		line("allowlist", "%s in %s (%s:%d)", f.Digest, strings.Join(f.Namespaces, ","), f.File, f.Line)
	}
	for _, w := range s.Warnings {
		line("warning", "%s", w)
	}
	return b.String()
}

func printStatement(line func(name, format string, args ...any), st config.Statement) {
	level := st.Level
	for _, check := range slices.Sorted(maps.Keys(st.Override)) {
		level += ", " + check + " " + st.Override[check]
	}
	line("statement", "%q: level %s", st.Name, level)
	line("  scopes", "%s", cli.List(st.Scopes, "none"))
	line("  stores", "%s", cli.List(st.TrustStores, "none"))
	line("  identities", "%s", cli.List(st.TrustedIdentities, "none"))
	if st.VerifyTimestamp != "" {
		line("  timestamp", "%s", st.VerifyTimestamp)
	}
}

func policyTestCommand(stdout io.Writer) *cobra.Command {
	var dir, namespace, output string
	cmd := &cobra.Command{
		Use:   "test IMAGE",
		Short: "Show which rule speaks of an image name, and who would be asked",
		Long: `Read the configuration directory and say which statement of the trust policy
speaks of an image of that name, and which sources would be asked for its signatures.
It asks none of them: tidewaiter verify does. Exit status: 0 a statement asks for
signatures, or a digest allowlist lists the digest; 1 the answer is no whatever signatures
there are; 2 it could not be found out.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return cli.Inconclusive(fmt.Errorf("%d images are named, not one", len(args)), "name an image as a pod does")
			}
			return nil
		},
		RunE: func(_ *cobra.Command, args []string) error {
			if err := cli.CheckOutput(output); err != nil {
				return err
			}
			return testPolicy(stdout, dir, namespace, output, args[0])
		},
	}
	cli.ConfigDir(cmd, &dir)
	cmd.Flags().StringVar(&namespace, "namespace", "", "`NAME` of the pod's namespace, for digest allowlists")
	cli.Output(cmd, &output)
	return cmd
}

// A tried is what policy test says.
type tried struct {
	Schema    string            `json:"schema"`
	Image     string            `json:"image"`   // in canonical form
	Known     string            `json:"known"`   // what rules call it: another where an alias says so
	Rule      string            `json:"rule"`    // empty: none
	Settled   string            `json:"settled"` // the answer, where no signature is asked for
	Detail    string            `json:"detail"`
	Statement *config.Statement `json:"statement"`
	Sources   []string          `json:"sources"` // in the order in which they are asked
}

func testPolicy(stdout io.Writer, dir, namespace, output, ref string) error {
	name, err := policy.ParseName(ref)
	if err != nil {
		return cli.Inconclusive(err, "name an image as a pod does")
	}
	c, err := cli.LoadConfig(dir)
	if err != nil {
		return err
	}
	setup, err := c.Snapshot(func(e *verify.Engine) verify.Evaluator { return e }, time.Now)
	if err != nil {
		return cli.Inconclusive(err, "")
	}
	img := verify.Image{Name: setup.Known(name), Pod: verify.Pod{Namespace: namespace}}
	img.Target.Digest, img.Manifest.Digest = name.Digest, name.Digest
	rule := setup.Policy.Select(img)
	t := tried{Schema: "tidewaiter.dev/policy-test/v1", Image: name.String(), Known: img.Name.Repository(), Rule: rule.Name, Detail: rule.Detail, Sources: []string{}}
	if rule.Fixed != "" {
		t.Settled = rule.Fixed.String()
	}
	for _, s := range c.Statements {
		if s.Name == rule.Name && rule.Fixed != verify.AllowedByDigest {
			st := config.Describe(s)
			t.Statement = &st
		}
	}
	if rule.Fixed == "" {
		for _, s := range c.Sources()(img.Name) {
			t.Sources = append(t.Sources, s.Name())
		}
	}
	if output == "json" {
		err = cli.JSON(stdout, t)
	} else {
		_, err = io.WriteString(stdout, testText(t))
	}
	if err != nil {
		return cli.Written(err)
	}
	if rule.Fixed != "" && rule.Fixed != verify.AllowedByDigest {
		return cli.Exit(cli.ExitNo)
	}
	return nil
}

func testText(t tried) string {
	var b strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "  %-13s %s\n", name, text.Clean(fmt.Sprintf(format, args...), 1000))
	}
	fmt.Fprintln(&b, text.Clean(t.Image, 600))
	if !strings.HasPrefix(t.Image, t.Known) {
		line("known as", "%s", t.Known)
	}
	if t.Settled != "" {
		line("answer", "[%s] %s", t.Settled, t.Detail)
	}
	if t.Statement != nil {
		printStatement(line, *t.Statement)
	}
	for _, s := range t.Sources {
		line("source", "%s", s)
	}
	if t.Settled == "" && len(t.Sources) == 0 {
		line("source", "none: nobody is asked, and only signatures count that the node has already")
	}
	return b.String()
}
