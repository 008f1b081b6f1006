package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/tidewaiter/tidewaiter/cmd/internal/config"
	"github.com/tidewaiter/tidewaiter/nri/node"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/policy"
	"github.com/tidewaiter/tidewaiter/verify/source/layout"
	"github.com/tidewaiter/tidewaiter/verify/source/mirror"
)

// verifyTimeout bounds one run of the verb: the limits bound each source.
const verifyTimeout = 2 * time.Minute

type verifyOptions struct {
	configDir string
	layouts   []string
	mirrors   []string
	namespace string
	output    string
}

func verifyCommand(stdout io.Writer) *cobra.Command {
	var o verifyOptions
	cmd := &cobra.Command{
		Use:   "verify REPOSITORY@DIGEST",
		Short: "Judge one image, with the node's configuration and no daemon",
		Long: `Verify judges one image as the gate in enforce would. It needs no daemon and no
containerd. The digest may be that of an index or of a manifest; tags are not
resolved. With --layout or --mirror only those are asked for signatures, and not
what the configuration names.

Exit status: 0 allowed, 1 denied, 2 it could not be found out.`,
		Example: `  tidewaiter verify --layout /media/usb registry.example/app@sha256:...
  tidewaiter verify --mirror registry.example=http://127.0.0.1:5000 --output json registry.example/app@sha256:...`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkOutput(o.output); err != nil {
				return err
			}
			return verifyImage(cmd.Context(), stdout, o, args[0])
		},
	}
	configDir(cmd, &o.configDir)
	cmd.Flags().StringArrayVar(&o.layouts, "layout", nil, "OCI image layout directory with signatures; may be given several times")
	cmd.Flags().StringArrayVar(&o.mirrors, "mirror", nil, "HOST=URL of a registry with the signatures of HOST's images; may be given several times")
	cmd.Flags().StringVar(&o.namespace, "namespace", "", "namespace of the pod, for the report")
	outputFlag(cmd, &o.output)
	return cmd
}

func verifyImage(ctx context.Context, stdout io.Writer, o verifyOptions, ref string) error {
	ctx, cancel := context.WithTimeout(ctx, verifyTimeout)
	defer cancel()
	name, err := policy.ParseName(ref)
	if err != nil {
		return unknown(err, "name the image as repository@sha256:...")
	}
	if name.Digest == "" {
		return unknown(fmt.Errorf("%s has no digest", ref), "name the image as "+name.Repository()+"@sha256:...: a tag may be moved, so that a verdict about one says nothing")
	}
	c, err := config.Load(o.configDir)
	if err != nil {
		return unknown(err, "--config-dir names another directory")
	}
	if len(o.layouts)+len(o.mirrors) > 0 {
		if err := o.listed(c); err != nil {
			return err
		}
	}
	setup, err := c.Setup(func(e *verify.Engine) verify.Judge { return e }, time.Now)
	if err != nil {
		return unknown(err, "")
	}
	setup.Mode = verify.Enforce // audit would hide what is asked
	var enforcer verify.Enforcer
	enforcer.Swap(setup)

	img := verify.Image{Name: name, Asked: ref, Use: verify.UseQuestion, Pod: verify.Pod{Namespace: o.namespace}}
	// A rule that denies, or none, is the answer without asking anybody.
	img.Target = ocispec.Descriptor{Digest: name.Digest}
	if rule := setup.Policy.Select(img); rule.Settled != "" {
		img.Manifest, img.Binding = img.Target, verify.BoundDigest
	} else {
		bindDigest(ctx, c.Sources()(name), &img)
	}
	d := enforcer.Verify(ctx, img)
	if err := printDecision(stdout, o.output, d, img); err != nil {
		return unknown(err, "")
	}
	switch {
	case d.Allowed():
		return nil
	case d.Reason.Unsettled():
		return &failure{status: exitUnknown}
	}
	return &failure{status: exitNo}
}

// listed makes the layouts and mirrors of the command line the only sources.
func (o verifyOptions) listed(c *config.Config) error {
	c.Listed, c.Layouts, c.Mirrors = true, nil, nil
	for _, l := range o.layouts {
		dir, err := filepath.Abs(l)
		if err != nil {
			return unknown(fmt.Errorf("--layout: %w", err), "")
		}
		c.Layouts = append(c.Layouts, dir)
	}
	for _, m := range o.mirrors {
		host, raw, _ := strings.Cut(m, "=")
		u, err := url.Parse(raw)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
			return unknown(errors.New("--mirror: not HOST=URL with an http or https URL"), "for example --mirror registry.example=http://127.0.0.1:5000")
		}
		if host != "*" {
			if host, err = policy.ParseHost(host); err != nil {
				return unknown(fmt.Errorf("--mirror: %w", err), "")
			}
		}
		c.Mirrors = append(c.Mirrors, config.Mirror{Host: host, URL: u})
	}
	return nil
}

// bindDigest completes img from the sources: media type and size of what the
// digest names, which signatures cover too, and the manifest that this platform
// would run. Where no source has it, img gets a fault.
func bindDigest(ctx context.Context, sources []verify.Source, img *verify.Image) {
	target, err := describe(ctx, sources, img.Name, img.Name.Digest)
	if err != nil {
		reason := verify.ImageUnresolved
		for sentinel, r := range map[error]verify.Reason{
			verify.ErrUnreachable: verify.SourceUnreachable, verify.ErrUnauthorized: verify.SourceUnauthorized,
		} {
			if errors.Is(err, sentinel) {
				reason = r
			}
		}
		img.Target = ocispec.Descriptor{}
		img.Fault = &verify.Fault{Reason: reason, Detail: err.Error()}
		return
	}
	img.Target, img.Manifest, img.Binding = target, target, verify.BoundDigest
	manifest, m, err := node.Select(ctx, func(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
		return blob(ctx, sources, img.Name, d)
	}, target)
	var fault *verify.Fault
	switch {
	case err == nil:
		img.Manifest, img.Config = manifest, m.Config.Digest
	case errors.As(err, &fault) && fault.Reason != verify.ImageMismatch:
		img.Fault = fault
	default:
		// The index is here and its manifest is not: a signature of the index counts.
	}
}

// A holder returns manifests and indexes that it has.
type holder func(context.Context, verify.Name, digest.Digest) (ocispec.Descriptor, []byte, error)

func holders(sources []verify.Source) []holder {
	var list []holder
	for _, s := range sources {
		switch s := s.(type) {
		case *layout.Source:
			list = append(list, func(ctx context.Context, _ verify.Name, d digest.Digest) (ocispec.Descriptor, []byte, error) {
				return s.Manifest(ctx, d)
			})
		case *mirror.Source:
			list = append(list, s.Manifest)
		}
	}
	return list
}

// describe returns the descriptor of the manifest or index d from the first
// source that has it. Its error is that of the first source that did not answer,
// else that nobody has it.
func describe(ctx context.Context, sources []verify.Source, in verify.Name, d digest.Digest) (ocispec.Descriptor, error) {
	desc, _, err := fetch(ctx, sources, in, d)
	return desc, err
}

func blob(ctx context.Context, sources []verify.Source, in verify.Name, d ocispec.Descriptor) ([]byte, error) {
	_, raw, err := fetch(ctx, sources, in, d.Digest)
	return raw, err
}

func fetch(ctx context.Context, sources []verify.Source, in verify.Name, d digest.Digest) (ocispec.Descriptor, []byte, error) {
	var first error
	for _, h := range holders(sources) {
		desc, raw, err := h(ctx, in, d)
		if err == nil {
			return desc, raw, nil
		}
		if first == nil || errors.Is(err, verify.ErrUnreachable) || errors.Is(err, verify.ErrUnauthorized) {
			first = err
		}
	}
	if first == nil {
		first = errors.New("no layout and no mirror is given for the image's host")
	}
	return ocispec.Descriptor{}, nil, first
}

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
		fmt.Fprintf(w, "  signed by %s, trusted through %s\n", verify.Quote(s.Subject, 200), verify.Clean(s.Anchor, 120))
	}
	for _, a := range d.Tried {
		line := fmt.Sprintf("  %s: %s, %d signature(s) seen", verify.Clean(a.Source, 200), a.Reason, a.Seen)
		if a.Detail != "" {
			line += ": " + verify.Clean(a.Detail, 300)
		}
		if _, err := fmt.Fprintln(w, line); err != nil {
			return err
		}
	}
	return nil
}
