package policy

import (
	"bytes"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// A Listed is one line of a digest allowlist: content that always runs in some
// namespaces, with or without a signature. What a node cannot do without is
// listed: its network plugin, the gate itself.
type Listed struct {
	Digest     digest.Digest // of an index, a manifest or an image config
	Namespaces []string      // never empty
	File       string        // that lists it, as the configuration names it
	Line       int           // from 1
}

// DefaultNamespace is where a line counts that names no namespace.
const DefaultNamespace = "kube-system"

// Bounds of a digest allowlist, in lines, bytes a line and namespaces a line.
const (
	maxListed              = 10_000
	maxAllowlistLine       = 1024
	maxAllowlistNamespaces = 16
)

// namespace is a DNS label (RFC 1123), as Kubernetes' namespaces are.
var namespace = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// ParseAllowlist reads a digest allowlist. A line is a digest, then perhaps namespaces with
// commas between them, then perhaps a comment after #; empty lines count for
// nothing. An error is an *Error with the line.
//
//	sha256:7c38f24774e3cbd906d2d33c38354ccf787635581c122965132c9bd309754d4a  kube-system,monitoring  # pause
func ParseAllowlist(file string, raw []byte) ([]Listed, error) {
	var list []Listed
	line := 0
	for full := range bytes.Lines(raw) {
		line++
		bad := func(format string, args ...any) ([]Listed, error) {
			return nil, &Error{Line: line, Text: fmt.Sprintf(format, args...)}
		}
		if len(full) > maxAllowlistLine {
			return bad("is longer than %d bytes", maxAllowlistLine)
		}
		s, _, _ := strings.Cut(string(full), "#")
		fields := strings.Fields(s)
		if len(fields) == 0 {
			continue
		}
		l := Listed{Digest: digest.Digest(fields[0]), Namespaces: []string{DefaultNamespace}, File: file, Line: line}
		if err := l.Digest.Validate(); err != nil {
			return bad("%s is not a digest such as sha256:7c38…: tags and names have no place here, since they move", text.Quote(fields[0], 80))
		}
		if len(fields) > 2 {
			return bad("has more than a digest and namespaces; a comment starts with #, and commas without spaces stand between namespaces")
		}
		if len(fields) == 2 {
			l.Namespaces = strings.Split(fields[1], ",")
			if len(l.Namespaces) > maxAllowlistNamespaces {
				return bad("names more than %d namespaces", maxAllowlistNamespaces)
			}
			for _, n := range l.Namespaces {
				if !namespace.MatchString(n) {
					return bad("%s is not the name of a namespace; each is named, there is no pattern", text.Quote(n, 80))
				}
			}
		}
		if list = append(list, l); len(list) > maxListed {
			return bad("is one too many: a allowlist has at most %d digests", maxListed)
		}
	}
	return list, nil
}

// A allowlist finds what is listed. Its zero value lists nothing.
type allowlist map[digest.Digest][]listedRule

type listedRule struct {
	namespaces []string
	rule       *verify.Rule
}

// WithAllowlist returns a Policy in which what list names is allowed by its digest,
// before all statements, in the namespaces that it names.
func (p *Policy) WithAllowlist(list []Listed) *Policy {
	with := *p
	with.allowlist = allowlist{}
	for _, l := range list {
		with.allowlist[l.Digest] = append(with.allowlist[l.Digest], listedRule{l.Namespaces, &verify.Rule{
			Name: l.File, Fixed: verify.AllowedByDigest, Digest: l.Digest,
			Detail: fmt.Sprintf("line %d of %s lists %s", l.Line, l.File, l.Digest),
		}})
	}
	return &with
}

// of returns the rule that lists img, or nil.
func (f allowlist) of(img verify.Image) *verify.Rule {
	if len(f) == 0 {
		return nil
	}
	digests := []digest.Digest{img.Target.Digest, img.Manifest.Digest}
	if img.LayersVerified {
		digests = append(digests, img.Config)
	}
	for _, d := range digests {
		for _, l := range f[d] {
			if slices.Contains(l.namespaces, img.Pod.Namespace) {
				return l.rule
			}
		}
	}
	return nil
}
