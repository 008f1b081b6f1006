package inspect

import (
	"cmp"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/tidewaiter/tidewaiter/cmd/internal/cli"
	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/policy"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

var namespace = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// IsNamespace reports whether s can be the name of a namespace.
func IsNamespace(s string) bool { return namespace.MatchString(s) }

// perLine is how many namespaces a line names, so that it is never too long.
const perLine = 8

// listable are the reasons for which a digest may be listed: nobody whom a rule names
// has signed the image. Other reasons say that something is wrong with it.
var listable = []verify.Reason{verify.SignatureMissing, verify.PolicyNoMatch, verify.SignerUntrusted}

// DigestLines returns lines of a digest allowlist (policy.ParseAllowlist) for what no signature
// allows, and the exit status. A digest that has several names is worth what the worst
// answer to one of them is: a line lets it run under each. namespaces are those of the
// command line, and empty for those in which each image runs.
func DigestLines(l control.Images, namespaces []string) (string, int, error) {
	if l.Unseen != "" && len(namespaces) == 0 {
		return "", 0, cli.Inconclusive(fmt.Errorf("it is not known of all containers which images they run: %s", text.Clean(l.Unseen, 300)), "name the namespaces with --namespace")
	}
	if l.More {
		return "", 0, cli.Inconclusive(errors.New("there are more images than can be listed"), "tidewaiter images --from-file judges those of a list")
	}
	grades := map[string]int{}
	for _, i := range l.List {
		grades[i.Target] = max(grades[i.Target], grade(i))
	}
	var b strings.Builder
	status := cli.ExitYes
	seen := map[string]bool{}
	for _, i := range l.List {
		g := grade(i)
		if i.Answer() == control.NotImage || g == cli.ExitYes && verify.Reason(i.Reason) == verify.Verified || seen[i.Target] {
			continue
		}
		if g < grades[i.Target] {
			continue // another name says more
		}
		seen[i.Target] = digest.Digest(i.Target).Validate() == nil
		name, _, _ := strings.Cut(i.Image, "@")
		name = text.Clean(name, 200)
		if g == cli.ExitInconclusive || !seen[i.Target] {
			if _, pinned, found := strings.Cut(i.Image, "@"); found || i.Target != "" {
				name += "@" + text.Clean(cmp.Or(i.Target, pinned), 144)
			}
			fmt.Fprintf(&b, "# no line: %s: %s%s\n", name, text.Clean(i.Reason, 32), from(i))
			status = cli.ExitInconclusive
			continue
		}
		in, note := lineNamespaces(i, namespaces)
		if g == cli.ExitNo {
			status = max(status, cli.ExitNo)
		}
		// A line that names more, or is too long, would not be read.
		for some := range slices.Chunk(in, perLine) {
			if g == cli.ExitNo {
				b.WriteString("# ")
			}
			fmt.Fprintf(&b, "%s  %s  # %s: %s%s%s\n", i.Target, strings.Join(some, ","), name, text.Clean(i.Reason, 32), from(i), note)
		}
	}
	return b.String(), status, nil
}

// grade is the exit status that one image alone would end with.
func grade(i control.Image) int {
	switch r := verify.Reason(i.Reason); {
	case i.Allowed, i.NotImage, slices.Contains(listable, r):
		return cli.ExitYes
	case r.Inconclusive():
		return cli.ExitInconclusive
	}
	return cli.ExitNo
}

// from names who said so.
func from(i control.Image) string {
	switch {
	case i.Source != "":
		return ", " + text.Clean(i.Source, 120)
	case i.Detail != "":
		return ", " + text.Clean(i.Detail, 120)
	}
	return ""
}

// lineNamespaces are those of the line of an image, and a note on them.
func lineNamespaces(i control.Image, asked []string) (in []string, note string) {
	var runs []string
	for _, n := range i.Runs {
		if IsNamespace(n) {
			runs = append(runs, n)
		}
	}
	switch {
	case len(asked) == 0 && len(runs) == 0:
		return []string{policy.DefaultNamespace}, "; does not run now"
	case len(asked) == 0:
		return runs, ""
	}
	for _, n := range runs {
		if !slices.Contains(asked, n) {
			return asked, "; runs in " + n + " too"
		}
	}
	return asked, ""
}
