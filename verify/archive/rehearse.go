package archive

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/oci"
	"github.com/tidewaiter/tidewaiter/verify/policy"
	"github.com/tidewaiter/tidewaiter/verify/source/archives"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// maxPlatforms bounds the manifests of one index that are judged, and maxJudged the
// questions about one archive.
const (
	maxPlatforms = 64
	maxJudged    = 4096
)

// rehearse gives images the answers of a gate that has nothing but what an import would
// write of c: the same store reads it, within the same bounds, and the same engine judges.
// It writes below scratch, or where that is empty into the system's directory for
// temporary files.
func (c *Contents) rehearse(ctx context.Context, r *Report, e *Evaluator, named []*Image, scratch string) error {
	dir, err := os.MkdirTemp(scratch, unfinished+"try-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.Mkdir(filepath.Join(dir, "archives"), 0o700); err != nil {
		return err
	}
	if err := c.evidenceOf(r).Write(filepath.Join(dir, "archives", "this"+suffix)); err != nil {
		return err
	}
	reader := archives.Open(ctx, dir, e.Now, kind)
	defer reader.Close()
	list, _ := reader.Status()
	for _, b := range list {
		r.Trouble = text.Clean(b.Trouble, 300)
	}
	engine := *e.Engine
	engine.Store, engine.Closed, engine.Sources = reader, true, func(verify.Name) []verify.Source { return nil }
	setup := *e.Setup
	setup.Mode, setup.Evaluator = verify.Enforce, &engine // audit would hide what is asked
	t := &rehearsal{Contents: c, own: e.Platform}
	t.decider.Swap(&setup)
	for _, i := range named {
		if err := ctx.Err(); err != nil {
			return err
		}
		t.answer(ctx, i)
	}
	return nil
}

type rehearsal struct {
	*Contents
	decider verify.Decider
	own     func(ocispec.Platform) bool
	asked   int
}

// isName reports whether name is that of an image. Others, such as the "1.2" that
// oras writes, are tags and belong to no repository.
func isName(name string) (verify.Name, bool) {
	first, _, found := strings.Cut(name, "/")
	if !found || !strings.ContainsAny(first, ".:") && first != "localhost" {
		return verify.Name{}, false
	}
	n, err := policy.ParseName(name)
	return n, err == nil && n.Host != ""
}

// answer notes what a gate answers to the image.
func (t *rehearsal) answer(ctx context.Context, i *Image) {
	name, ok := isName(i.Name)
	d := digest.Digest(i.Digest)
	doc := t.documents[d]
	if !ok || doc == nil {
		return
	}
	name.Digest = d
	target := ocispec.Descriptor{MediaType: doc.MediaType, Digest: d, Size: doc.Size}
	judge := func(manifest ocispec.Descriptor, config digest.Digest) verify.Decision {
		if t.asked++; t.asked > maxJudged {
			return verify.Deny(verify.LimitExceeded, fmt.Sprintf("the evidence archive has more than %d images: look at several smaller ones", maxJudged))
		}
		return t.decider.Verify(ctx, verify.Image{
			Name: name, Asked: i.Name, Use: verify.UseQuestion, LayersVerified: true, Binding: verify.BoundDigest,
			Target: target, Manifest: manifest, Config: config,
		})
	}
	var runs []ocispec.Descriptor
	if t.platforms(doc, 0, &runs, map[digest.Digest]bool{}); len(runs) == 0 {
		d := judge(target, doc.config.Digest)
		i.answered(d, "")
		return
	}
	var verified, missing []string
	var denied verify.Decision
	var where string
	worst := 0 // how much the denial says: of a missing manifest, of one that is there, of this node's
	for n, m := range runs {
		platform := platformOf(m.Platform)
		if platform == "" {
			platform = m.Digest.String()
		}
		var d verify.Decision
		there := t.documents[m.Digest]
		switch {
		case n == maxPlatforms:
			d = verify.Deny(verify.LimitExceeded, fmt.Sprintf("the index lists more than %d manifests", maxPlatforms))
		case there != nil:
			d = judge(ocispec.Descriptor{MediaType: there.MediaType, Digest: m.Digest, Size: there.Size}, there.config.Digest)
		default:
			d = judge(ocispec.Descriptor{MediaType: m.MediaType, Digest: m.Digest, Size: m.Size}, "")
		}
		i.Rule = d.Rule
		if d.Allowed() {
			verified = append(verified, platform)
			continue
		}
		weight := 2
		if there == nil && n < maxPlatforms {
			missing = append(missing, platform)
			weight = 1
		}
		if m.Platform != nil && t.own(*m.Platform) {
			weight = 3
		}
		if weight > worst {
			worst, denied, where = weight, d, platform
		}
	}
	i.VerifiedFor, i.NotInArchive = verified, missing
	if worst > 1 || len(verified) == 0 {
		i.answered(denied, where)
		return
	}
	i.Answer, i.good = verify.Verified.String(), true
}

// platforms adds the manifests below an index that something may run from.
func (t *rehearsal) platforms(doc *document, depth int, list *[]ocispec.Descriptor, seen map[digest.Digest]bool) {
	for _, m := range doc.manifests {
		if len(*list) > maxPlatforms || seen[m.Digest] || !isDocument(m.MediaType) || m.Digest.Validate() != nil {
			continue
		}
		seen[m.Digest] = true
		if oci.IsIndex(m.MediaType) {
			if inner := t.documents[m.Digest]; inner != nil && depth < maxDepth {
				t.platforms(inner, depth+1, list, seen)
			}
			continue
		}
		if !isAttestation(m) {
			*list = append(*list, m)
		}
	}
}

// isAttestation reports whether m is what BuildKit says of how it built another manifest.
func isAttestation(m ocispec.Descriptor) bool {
	return m.Annotations["vnd.docker.reference.type"] == "attestation-manifest"
}

// answered notes the answer d, for one platform of an index.
func (i *Image) answered(d verify.Decision, platform string) {
	i.Answer, i.Rule, i.good = d.Reason.String(), d.Rule, d.Allowed()
	if i.good {
		return
	}
	if i.Detail = text.Clean(d.Detail, 300); platform != "" {
		i.Detail = text.Clean("for "+platform+": "+d.Detail, 300)
	}
}

// maxOthers is how many signatures of one image an import takes along that verify under
// no statement: a statement that comes later may trust one.
const maxOthers = 16

// choose leaves out of what is taken along the signatures of an image that verify under no
// statement, but for a few that came furthest: the gate reads a bounded number of each
// image, and who may push to a repository can add any number.
func (v *visit) choose() {
	others := map[digest.Digest][]*document{}
	for _, d := range v.usable {
		if s := v.read[d]; s != nil && len(s.Statements) == 0 {
			others[d.subject.Digest] = append(others[d.subject.Digest], d)
		}
	}
	out := map[*document]bool{}
	for _, list := range others {
		if len(list) <= maxOthers {
			continue
		}
		slices.SortFunc(list, func(x, y *document) int {
			if n := progress(verify.Reason(v.read[y].Reason)) - progress(verify.Reason(v.read[x].Reason)); n != 0 {
				return n
			}
			return strings.Compare(string(x.Digest), string(y.Digest))
		})
		for _, d := range list[maxOthers:] {
			out[d] = true
		}
		if len(v.LeftOut) < maxProblems {
			v.LeftOut = append(v.LeftOut, fmt.Sprintf("%d of %d signatures of %s that verify under no statement", len(list)-maxOthers, len(list), list[0].subject.Digest))
		}
	}
	v.usable = slices.DeleteFunc(v.usable, func(d *document) bool { return out[d] })
}

// Fits reports what the gate would not read any more, or not whole, with the evidence of c
// on the node under that name, and an error where that cannot be found out.
func (s *Importer) Fits(ctx context.Context, c *Contents, r *Report, name string, now func() time.Time) (trouble []string, err error) {
	state, err := os.MkdirTemp(s.dir, unfinished+"try-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(state)
	at := filepath.Join(state, "archives")
	if err := os.Mkdir(at, 0o700); err != nil {
		return nil, err
	}
	list, err := List(filepath.Dir(s.dir))
	if err != nil {
		return nil, err
	}
	files := 4 * maxDocuments
	for _, b := range list {
		if b.Name == name || b.Name == name+suffix || b.Form == "other" {
			continue
		}
		if err := link(filepath.Join(s.dir, b.Name), filepath.Join(at, b.Name), &files); err != nil {
			return nil, err
		}
	}
	before := troubles(ctx, state, now)
	if err := c.evidenceOf(r).Write(filepath.Join(at, name+suffix)); err != nil {
		return nil, err
	}
	after := troubles(ctx, state, now)
	for _, b := range slices.Sorted(maps.Keys(after)) {
		if after[b] != "" && before[b] == "" {
			trouble = append(trouble, fmt.Sprintf("%s: %s", text.Quote(b, 110), after[b]))
		}
	}
	return trouble, nil
}

// link makes names for a file, or for the files of a directory.
func link(from, to string, left *int) error {
	info, err := os.Lstat(from)
	if err != nil {
		return err
	}
	if *left--; *left < 0 {
		return errors.New("too many files in evidence archives that are directories")
	}
	switch {
	case info.Mode().IsRegular():
		return os.Link(from, to)
	case !info.IsDir():
		return nil
	}
	if err := os.Mkdir(to, 0o700); err != nil {
		return err
	}
	entries, err := os.ReadDir(from)
	for _, e := range entries {
		if err == nil {
			err = link(filepath.Join(from, e.Name()), filepath.Join(to, e.Name()), left)
		}
	}
	return err
}

// troubles are what a gate would say of the archives below state, by name; under the empty
// name of their directory.
func troubles(ctx context.Context, state string, now func() time.Time) map[string]string {
	reader := archives.Open(ctx, state, now, kind)
	defer reader.Close()
	list, all := reader.Status()
	m := map[string]string{"": text.Clean(all, 300)}
	for _, b := range list {
		m[b.Name] = text.Clean(b.Trouble, 300)
	}
	return m
}
