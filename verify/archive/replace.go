package archive

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/tidewaiter/tidewaiter/verify/text"
)

// A Replaced is what an import would take away: the archive that has its name now.
type Replaced struct {
	File       string `json:"file"`
	Signatures int    `json:"signatures"`
	Gone       int    `json:"gone"`              // of these, that the new one does not have
	Unread     string `json:"unread,omitempty"`  // why it is not known what it has
	Needed     string `json:"needed,omitempty"`  // an image on the node that one of them belongs to
	Unknown    string `json:"unknown,omitempty"` // why it is not known which images are on the node

	of map[digest.Digest]bool // manifests, indexes and configs that those are over, or lead to or from
}

// Replaces compares what has the name on the node with what an import of c would put in
// its place. It returns nil if nothing has the name.
func (s *Importer) Replaces(ctx context.Context, c *Contents, r *Report, name string) (*Replaced, error) {
	file := name + suffix
	if _, err := os.Lstat(filepath.Join(s.dir, file)); errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Lstat(filepath.Join(s.dir, name)); errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		file = name
	}
	p := &Replaced{File: file, of: map[digest.Digest]bool{}}
	old, err := Open(ctx, filepath.Join(s.dir, file), nil, s.dir)
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if err != nil {
		p.Unread = text.Clean(err.Error(), 300)
		return p, nil
	}
	defer old.Close()
	if len(old.problems) > 0 {
		p.Unread = old.problems[0]
	}
	kept := map[digest.Digest]bool{}
	for _, d := range r.usable {
		kept[d.Digest] = true
	}
	for _, d := range old.documents {
		if d.subject == nil || !d.isSignature() {
			continue
		}
		if p.Signatures++; !kept[d.Digest] {
			p.Gone++
			p.of[d.subject.Digest] = true
		}
	}
	// An image runs from its index, by a manifest of it alone, or by what has its config,
	// and a signature of each of these may be what lets it.
	for _, in := range []*Contents{c, old} {
		for range 2 { // from an index to its manifests, and from these to their configs
			for _, d := range in.documents {
				for _, m := range d.manifests {
					if p.of[d.Digest] {
						p.of[m.Digest] = true
					}
				}
				if p.of[d.Digest] && d.config.Digest != "" && d.subject == nil {
					p.of[d.config.Digest] = true
				}
			}
		}
	}
	return p, nil
}

// Concerns reports whether an image with one of the digests, that of its manifest, index
// or config, may need a signature that would go.
func (p *Replaced) Concerns(digests ...string) bool {
	for _, d := range digests {
		if p.of[digest.Digest(d)] {
			return true
		}
	}
	return false
}

// Refused is why it is not replaced unasked; empty: nothing that is known to be needed goes.
func (p *Replaced) Refused() string {
	switch {
	case p.Unread != "":
		return "it is not known what would go with " + p.File + ", which cannot be read whole"
	case p.Gone == 0:
		return ""
	case p.Needed != "":
		return fmt.Sprintf("%d of the %d signatures of %s would go, and %s on this node may need one", p.Gone, p.Signatures, p.File, p.Needed)
	case p.Unknown != "":
		return fmt.Sprintf("%d of the %d signatures of %s would go, and the gate does not say which images are on this node: %s", p.Gone, p.Signatures, p.File, p.Unknown)
	}
	return ""
}

func (p *Replaced) text(b *strings.Builder) {
	switch {
	case p.Unread != "":
		fmt.Fprintf(b, "replaces %s, which cannot be read whole: %s\n", p.File, p.Unread)
	case p.Gone == 0:
		fmt.Fprintf(b, "replaces %s: all its %d signatures are in the new one\n", p.File, p.Signatures)
	default:
		fmt.Fprintf(b, "replaces %s: %d of its %d signatures are not in the new one\n", p.File, p.Gone, p.Signatures)
	}
}
