package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/tidewaiter/tidewaiter/cmd/internal/cli"
	"github.com/tidewaiter/tidewaiter/cmd/internal/inspect"
	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/policy"
	"github.com/tidewaiter/tidewaiter/verify/source/registry"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

const nameHint = "name the image as repository@sha256:..."

type verifyOptions struct {
	configDir string
	stateDir  string // of the node; empty: its store is not read
	layouts   []string
	mirrors   []string
	redirects []string
	namespace string
	output    string
}

func verifyCommand(stdout io.Writer) *cobra.Command {
	var o verifyOptions
	cmd := &cobra.Command{
		Use:   "verify REPOSITORY@DIGEST",
		Short: "Judge one image, with the node's configuration and no daemon",
		Long: `Judge one image as the gate in enforce would, also where the configuration
says audit. It needs no daemon and no containerd. The digest may be that of an
index or of a manifest; tags are not resolved. As the gate it reads what this node
keeps, its store and evidence archives, and changes nothing there; --state-dir "" leaves that
out. With --layout or --mirror only those are asked, not what the configuration names,
and what the node keeps only if --state-dir is given too. They hold the image's
manifest with its signatures, or its signatures alone. A registry is told what the
configuration's file of credentials has for the host and port of its URL.

The answer goes to standard output, what kept Verify from one to standard error.
Exit status: 0 allowed, 1 denied, 2 it could not be found out.`,
		Example: `  tidewaiter verify --layout /media/usb registry.example/app@sha256:...
  tidewaiter verify --mirror registry.example=http://127.0.0.1:5000 --output json registry.example/app@sha256:...`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return cli.Inconclusive(fmt.Errorf("%d images are named, not one", len(args)), nameHint)
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := cli.CheckOutput(o.output); err != nil {
				return err
			}
			if len(o.layouts)+len(o.mirrors) > 0 && !cmd.Flags().Changed("state-dir") {
				o.stateDir = ""
			}
			return verifyImage(cmd.Context(), stdout, o, args[0])
		},
	}
	cli.ConfigDir(cmd, &o.configDir)
	cli.StateDir(cmd, &o.stateDir)
	sourceFlags(cmd, &o, none)
	cmd.Flags().StringVar(&o.namespace, "namespace", "", "`NAME` of the pod's namespace, for digest allowlists and the report")
	cli.Output(cmd, &o.output)
	return cmd
}

// none is the value of --redirect that adds nothing to what the configuration says.
const none = "none"

// sourceFlags adds the flags that name sources instead of those of the configuration.
// redirects is the default of --redirect.
func sourceFlags(cmd *cobra.Command, o *verifyOptions, redirects string) {
	cmd.Flags().StringArrayVar(&o.layouts, "layout", nil, "OCI image layout `PATH`, directory or tar file, with signatures; may be given several times")
	cmd.Flags().StringArrayVar(&o.mirrors, "mirror", nil, "`HOST=URL` of a registry with the signatures of HOST's images; HOST * serves every host without a mirror of its own; may be given several times")
	cmd.Flags().StringArrayVar(&o.redirects, "redirect", []string{redirects}, "`HOST` that signatures may come from where a registry redirects there, besides those of the configuration; *.DOMAIN are the public hosts below a domain, * all public hosts, none no others; may be given several times")
}

func verifyImage(ctx context.Context, stdout io.Writer, o verifyOptions, ref string) error {
	ctx, cancel := context.WithTimeout(ctx, inspect.Longest)
	defer cancel()
	name, err := policy.ParseName(ref)
	if err != nil {
		return cli.Inconclusive(err, nameHint)
	}
	if name.Digest == "" {
		return cli.Inconclusive(fmt.Errorf("%s has no digest", text.Quote(ref, 160)),
			"name the image as "+name.Repository()+"@sha256:...: a tag may be moved, so that a verdict about one says nothing")
	}
	c, err := cli.LoadConfig(o.configDir)
	if err != nil {
		return err
	}
	if err := o.listed(c); err != nil {
		return err
	}
	j, err := inspect.NewOffline(ctx, c, o.stateDir)
	if err != nil {
		return cli.Inconclusive(err, "")
	}
	defer j.Close()
	d, img := j.Judge(ctx, name, ref, o.namespace)
	if !d.Allowed() && errors.Is(ctx.Err(), context.Canceled) {
		return cli.Inconclusive(errors.New("interrupted before there was an answer"), "")
	}
	if err := printDecision(stdout, o.output, d, img); err != nil {
		return cli.Inconclusive(fmt.Errorf("write the answer: %w", err), "")
	}
	switch {
	case d.Allowed():
		return nil
	case d.Reason.Inconclusive():
		return cli.Exit(cli.ExitInconclusive)
	}
	return cli.Exit(cli.ExitNo)
}

// listed makes the layouts and mirrors of the command line, if there are any, the
// only sources, and lets these redirect as it says.
func (o verifyOptions) listed(c *config.Config) error {
	if err := o.only(c); err != nil {
		return err
	}
	var list []registry.Pattern
	for _, s := range o.redirects {
		if s == none {
			continue
		}
		p, err := registry.ParsePattern(s)
		if err != nil {
			return cli.Inconclusive(fmt.Errorf("--redirect: %w", err), "for example --redirect '*.cdn.example'")
		}
		list = append(list, p)
	}
	c.Redirect(list)
	return nil
}

func (o verifyOptions) only(c *config.Config) error {
	if len(o.layouts)+len(o.mirrors) == 0 {
		return nil
	}
	var layouts []string
	var mirrors []config.Mirror
	for _, l := range o.layouts {
		if l == "" {
			return cli.Inconclusive(errors.New("--layout: no directory or file is named"), "")
		}
		dir, err := filepath.Abs(l)
		if err != nil {
			return cli.Inconclusive(fmt.Errorf("--layout: %w", err), "")
		}
		if err := isLayout(dir); err != nil {
			return cli.Inconclusive(fmt.Errorf("--layout: %w", err), "an image layout is a directory with oci-layout and index.json, as skopeo, oras and tidewaiter evidence export make it, or a tar file of one")
		}
		layouts = append(layouts, dir)
	}
	for _, m := range o.mirrors {
		// Nothing of m is repeated: it may hold a password.
		host, raw, found := strings.Cut(m, "=")
		if !found {
			return cli.Inconclusive(errors.New("--mirror: not HOST=URL"), mirrorHint)
		}
		u, err := config.ParseURL(raw)
		if err != nil {
			return cli.Inconclusive(fmt.Errorf("--mirror: URL: %w", err), mirrorHint)
		}
		if host != "*" {
			if host, err = policy.ParseHost(host); err != nil {
				return cli.Inconclusive(fmt.Errorf("--mirror: %w", err), mirrorHint)
			}
		}
		mirrors = append(mirrors, config.Mirror{Host: host, URL: u})
	}
	c.Only(layouts, mirrors)
	return nil
}

// isLayout returns what keeps dir from being a layout or a file, which a typing error is
// most often; what is in it the source says.
func isLayout(dir string) error {
	info, err := os.Stat(dir)
	if err != nil || !info.IsDir() {
		return err
	}
	_, err = os.Stat(filepath.Join(dir, ocispec.ImageLayoutFile))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s is a directory and no image layout: it has no %s", text.Clean(dir, 300), ocispec.ImageLayoutFile)
	}
	return nil
}

const mirrorHint = "for example --mirror registry.example=http://127.0.0.1:5000"

// printDecision writes the answer. In text the first line is the one that a pod's
// event would show; what each source said follows.
func printDecision(w io.Writer, output string, d verify.Decision, img verify.Image) error {
	if output == "json" {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		e.SetEscapeHTML(false)
		return e.Encode(d.Report(img, ""))
	}
	if _, err := fmt.Fprintln(w, d.Message(img, "")); err != nil {
		return err
	}
	for _, s := range d.Signers {
		trust := "whom no trust store of the rule vouches for"
		if s.Anchor != "" {
			trust = "trusted through " + text.Clean(s.Anchor, 120)
		}
		if _, err := fmt.Fprintf(w, "  signed by %s, %s\n", text.Quote(s.Subject, 200), trust); err != nil {
			return err
		}
	}
	for _, a := range d.Tried {
		line := fmt.Sprintf("  %s: %s, signatures seen: %d", text.Clean(a.Source, 200), a.Reason, a.Seen)
		if a.Detail != "" {
			line += ": " + text.Clean(a.Detail, 300)
		}
		if _, err := fmt.Fprintln(w, line); err != nil {
			return err
		}
	}
	return nil
}
