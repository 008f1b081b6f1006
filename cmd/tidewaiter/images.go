package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/tidewaiter/tidewaiter/cmd/internal/cli"
	"github.com/tidewaiter/tidewaiter/cmd/internal/inspect"
	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/policy"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

type imagesOptions struct {
	configDir  string
	runDir     string
	stateDir   string // with file
	file       string
	before     time.Duration
	allowlist  bool
	namespaces []string
	output     string
	only       []string // starts of names
}

func imagesCommand(stdout io.Writer) *cobra.Command {
	var o imagesOptions
	cmd := &cobra.Command{
		Use:   "images [NAME...]",
		Short: "List the images of this node with the answer to each, and when it ends",
		Long: `Ask the gate what enforce would answer to each image of this node now, also in audit,
and when an image that is allowed will not be any more. With names, list those of them: a repository, or a host and path that repositories are below.

With --expires-within only images are listed whose answer ends within that time, and the exit
status is 1 where there are any.

With --allowlist it prints lines of a digest allowlist (allowDigests: in config.yaml) for the images
that no signature allows: these digests then run without one, each in the namespaces
in which it runs now (kube-system if it does not run), or in those of --namespace.
Name the images that are meant; what is listed is trusted for good. Lines of images
that are denied for another reason than that nobody whom a rule names has signed them
are commented out. Exit status: 0 each image is allowed or has a line; 1 a line is
commented out; 2 the answer to an image could not be found out, so that it has none.

With --from-file it judges a list of images before they are on the node, such as that of
the next k3s release: with the configuration directory, its sources and what this node
keeps in its state directory, and with no gate. A tag is looked up at the mirrors, which is only a look ahead: the node itself
never asks a registry what a tag means. With --allowlist a tag is an error, since a
mirror could answer any digest. Exit status 1 if one would be denied.`,
		Example: `  tidewaiter images --expires-within 720h
  tidewaiter images --allowlist docker.io/rancher >/etc/tidewaiter/allow/k3s
  tidewaiter images --from-file k3s-images.txt`,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.only = args
			if err := o.check(cmd.Flags().Changed); err != nil {
				return err
			}
			l, err := o.list(cmd.Context())
			if err != nil {
				return err
			}
			return o.print(stdout, l)
		},
	}
	cli.ConfigDir(cmd, &o.configDir)
	cli.RunDir(cmd, &o.runDir)
	cli.StateDir(cmd, &o.stateDir)
	cli.Output(cmd, &o.output)
	cmd.Flags().StringVar(&o.file, "from-file", "", "judge the images that `FILE` lists, one a line, instead of those of this node; - is standard input")
	cmd.Flags().DurationVar(&o.before, "expires-within", 0, "list only what is allowed and will not be any more within `DURATION`, such as 720h")
	cmd.Flags().BoolVar(&o.allowlist, "allowlist", false, "print lines of a digest allowlist for what no signature allows")
	cmd.Flags().StringSliceVar(&o.namespaces, "namespace", nil, "`NAMES` of the namespaces in lines of a digest allowlist, instead of those in which the images run")
	return cmd
}

func (o *imagesOptions) check(changed func(string) bool) error {
	const help = "run tidewaiter images --help"
	if err := cli.CheckOutput(o.output); err != nil {
		return err
	}
	switch {
	case changed("expires-within") && o.before <= 0:
		return cli.Inconclusive(errors.New("--expires-within: is not a time ahead"), "for example --expires-within 720h, which is 30 days")
	case o.before > 0 && o.allowlist:
		return cli.Inconclusive(errors.New("--expires-within and --allowlist: one of them"), help)
	case o.allowlist && o.output == "json":
		return cli.Inconclusive(errors.New("--allowlist prints lines of a digest allowlist and no JSON"), help)
	case changed("namespace") && !o.allowlist:
		return cli.Inconclusive(errors.New("--namespace is for --allowlist"), help)
	}
	for _, n := range o.namespaces {
		if !inspect.IsNamespace(n) {
			return cli.Inconclusive(fmt.Errorf("--namespace: %s is not the name of a namespace", text.Quote(n, 80)), help)
		}
	}
	return nil
}

// list is what the gate says, or what is in the file.
func (o *imagesOptions) list(ctx context.Context) (control.Images, error) {
	var l control.Images
	var err error
	if o.file != "" {
		l, err = o.ahead(ctx)
	} else {
		l, err = control.AskImages(ctx, o.runDir)
		if errors.Is(err, control.ErrRefused) {
			return l, cli.Inconclusive(err, "run tidewaiter status")
		}
		if err != nil {
			return l, cli.Inconclusive(err, cli.GateHint(o.runDir)+"; tidewaiter images --from-file and tidewaiter verify need no gate")
		}
	}
	if err != nil {
		return l, err
	}
	if len(o.only) > 0 {
		l.List = slices.DeleteFunc(l.List, func(i control.Image) bool {
			return !slices.ContainsFunc(o.only, func(name string) bool { return below(i.Image, name) || below(i.Image, canonical(name)) })
		})
	}
	if o.before > 0 {
		end := time.Now().Add(o.before)
		l.List = slices.DeleteFunc(l.List, func(i control.Image) bool {
			return !i.Allowed || i.Until == nil || i.Ends == "nothing" || !i.Until.Before(end)
		})
	}
	return l, nil
}

// canonical is a name as it is listed: "nginx" is docker.io/library/nginx. What is the
// start of a name and none itself stays as it is.
func canonical(s string) string {
	n, err := policy.ParseName(s)
	if err != nil {
		return s
	}
	if n.Digest == "" && !strings.Contains(s[strings.LastIndex(s, "/")+1:], ":") {
		return n.Repository()
	}
	return n.String()
}

// below reports whether name is prefix, or in the repository or path prefix.
func below(name, prefix string) bool {
	rest, found := strings.CutPrefix(name, strings.TrimSuffix(prefix, "/"))
	return found && (rest == "" || strings.ContainsRune("/:@", rune(rest[0])))
}

func (o *imagesOptions) print(w io.Writer, l control.Images) error {
	var err error
	status := cli.ExitYes
	switch {
	case o.allowlist:
		if o.file != "" && len(o.namespaces) == 0 {
			o.namespaces = []string{policy.DefaultNamespace}
		}
		var lines string
		if lines, status, err = inspect.DigestLines(l, o.namespaces); err != nil {
			return err
		}
		_, err = io.WriteString(w, lines)
	case o.output == "json":
		err = cli.JSON(w, l)
	default:
		_, err = io.WriteString(w, o.table(l))
	}
	if err != nil {
		return cli.Written(err)
	}
	switch {
	case o.before > 0:
		if len(l.List) > 0 {
			return cli.Exit(cli.ExitNo)
		}
	case o.file != "" && !o.allowlist:
		has := func(answers ...string) bool {
			return slices.ContainsFunc(l.List, func(i control.Image) bool { return slices.Contains(answers, i.Answer()) })
		}
		switch {
		case has(control.Denied, control.NotImage):
			status = cli.ExitNo
		case has(control.Inconclusive):
			status = cli.ExitInconclusive
		}
	}
	if status != cli.ExitYes {
		return cli.Exit(status)
	}
	return nil
}

// table is l for a person. What the gate has from elsewhere is cleaned.
func (o *imagesOptions) table(l control.Images) string {
	var b strings.Builder
	count := map[string]int{}
	const row = "%-12s  %-23s  %-22s  %s"
	if len(l.List)+len(l.TooLong) > 0 {
		fmt.Fprintf(&b, row+"\n", "ANSWER", "REASON", "ENDS", "IMAGE")
	}
	for _, i := range l.List {
		answer := i.Answer()
		count[answer]++
		ends := "-"
		if i.Allowed && i.Until != nil && i.Ends != "nothing" {
			ends = cli.Date(*i.Until) + " " + i.Ends
		}
		fmt.Fprintf(&b, row, answer, text.Clean(i.Reason, 32), text.Clean(ends, 32), text.Clean(i.Image, 400))
		if o.file != "" && i.Target != "" && !strings.Contains(i.Image, "@") {
			fmt.Fprintf(&b, "@%s", text.Clean(i.Target, 144))
		}
		if len(i.Namespaces) > 0 {
			fmt.Fprintf(&b, "  listed in %s", text.Clean(strings.Join(i.Namespaces, ","), 200))
			if answer == control.Denied || answer == control.Inconclusive {
				fmt.Fprintf(&b, ", runs in %s", places(i.Runs))
			}
		}
		if i.Resolved != "" {
			fmt.Fprintf(&b, "  by %s", text.Clean(i.Resolved, 200))
		}
		b.WriteByte('\n')
		if o.file != "" && !i.Allowed && i.Detail != "" {
			fmt.Fprintf(&b, "%14s%s\n", "", text.Clean(i.Detail, 300))
		}
	}
	if o.before > 0 {
		fmt.Fprintf(&b, "%d images that are allowed now will not be within %s\n", len(l.List), o.before)
		return b.String()
	}
	others := count[control.NotImage]
	fmt.Fprintf(&b, "%d images: %d allowed, %d denied, %d inconclusive", len(l.List)-others, count[control.Allowed]+count[control.Listed], count[control.Denied], count[control.Inconclusive])
	if l.Mode == verify.Audit.String() {
		b.WriteString(" if the node enforced")
	}
	if l.More {
		b.WriteString("; there are more, which are not listed")
	}
	b.WriteByte('\n')
	if others > 0 {
		fmt.Fprintf(&b, "%d of the records are of no image, such as signatures that were imported; nothing runs from them\n", others)
	}
	for i, long := range l.TooLong {
		if i == shown {
			fmt.Fprintf(&b, "and %d more that are too long: --output json\n", len(l.TooLong)-shown)
			break
		}
		fmt.Fprintf(&b, "%-12s  %-23s  %s\n", control.Denied, verify.PodTooLarge, text.Clean(long, 400))
	}
	if l.Unseen != "" {
		fmt.Fprintf(&b, "it is not known of all containers which images they run: %s\n", text.Clean(l.Unseen, 300))
	}
	if slices.ContainsFunc(l.List, func(i control.Image) bool { return i.Resolved != "" }) {
		b.WriteString("tags were looked up at the mirrors now; when the images are pulled, they may lead elsewhere\n")
	}
	return b.String()
}

// Bounds of a list of images.
const (
	maxListed    = 1000 // images
	aheadTimeout = 30 * time.Minute
)

// ahead judges the images of a file, with no gate.
func (o *imagesOptions) ahead(ctx context.Context) (l control.Images, err error) {
	refs, err := o.read()
	if err != nil {
		return l, err
	}
	c, err := cli.LoadConfig(o.configDir)
	if err != nil {
		return l, err
	}
	j, err := inspect.NewOffline(ctx, c, o.stateDir)
	if err != nil {
		return l, cli.Inconclusive(err, "")
	}
	defer j.Close()
	ctx, cancel := context.WithTimeout(ctx, aheadTimeout)
	defer cancel()
	l = control.Images{Schema: control.ImagesSchema, Mode: c.Mode.String(), Revision: c.Revision.String(), List: []control.Image{}}
	allowlist := inspect.AllowlistOf(c)
	for _, ref := range refs {
		l.List = append(l.List, j.Row(ctx, ref, allowlist))
		if errors.Is(ctx.Err(), context.Canceled) {
			return l, cli.Inconclusive(errors.New("interrupted before there was an answer"), "")
		}
	}
	return l, nil
}

// read reads the list.
func (o *imagesOptions) read() (refs []string, err error) {
	list, err := inspect.ReadList(o.file)
	switch {
	case err != nil:
		return nil, cli.Inconclusive(fmt.Errorf("--from-file: %w", err), "a line is the name of an image, as in k3s-images.txt")
	case len(list) == 0:
		return nil, cli.Inconclusive(fmt.Errorf("--from-file: %s names no image", o.file), "")
	case len(list) > maxListed:
		return nil, cli.Inconclusive(fmt.Errorf("--from-file: %s:%d: more than %d images", o.file, list[maxListed].Line, maxListed), "")
	}
	for _, l := range list {
		if o.allowlist && l.Name.Digest == "" {
			return nil, cli.Inconclusive(fmt.Errorf("--allowlist: %s:%d: %s is a tag, for which a mirror could answer any digest", o.file, l.Line, text.Quote(l.Text, 160)),
				"take the digest from who publishes the image and write NAME@sha256:..., or import the release's archive on a node and run tidewaiter images --allowlist there")
		}
		refs = append(refs, l.Text)
	}
	return refs, nil
}

// places are namespaces for a person.
func places(namespaces []string) string {
	list := slices.Clone(namespaces)
	for i, n := range list {
		list[i] = text.Clean(cmp.Or(n, "no namespace"), 63)
	}
	const shown = 8
	if len(list) > shown {
		list = append(list[:shown:shown], fmt.Sprintf("%d more", len(namespaces)-shown))
	}
	return strings.Join(list, ",")
}
