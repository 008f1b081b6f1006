package archive

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/oci"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// Schema names the JSON form of a Report. Fields may be added under the same name.
const Schema = "tidewaiter.dev/evidence/v1"

// A Report says what is in an archive. What is quoted in it is the archive's and was not
// verified, except where it says so.
type Report struct {
	Schema     string       `json:"schema"`
	Archive    string       `json:"archive"`
	Policy     string       `json:"policy,omitempty"` // directory of the configuration that signatures were verified under
	Signatures int          `json:"signatures"`
	Verified   int          `json:"verified"` // how many of them verify under a statement
	Referrers  int          `json:"otherReferrers"`
	Images     []*Image     `json:"images"`
	Trust      *TrustReport `json:"trust,omitempty"`
	Problems   []string     `json:"problems"`          // what is damaged or not there and should be
	LeftOut    []string     `json:"leftOut"`           // referrers that an import does not take along
	Trouble    string       `json:"trouble,omitempty"` // why a gate would not read all that an import writes
	Outcome    *Outcome     `json:"import,omitempty"`

	usable []*document // referrers whose parts are all there, and that an import takes along
	read   map[*document]*Signature
	sums   map[digest.Digest]int64 // parts that are what their digests say
}

// An Outcome is what became of an import.
type Outcome struct {
	Refused  string    `json:"refused,omitempty"` // why not; empty: it was imported
	Replaces *Replaced `json:"replaces,omitempty"`
	File     string    `json:"file,omitempty"`   // that has the evidence now
	Trust    string    `json:"trust,omitempty"`  // directory whose trust is the archive's now
	Backup   string    `json:"backup,omitempty"` // directory with what was there before
}

func (o *Outcome) text(b *strings.Builder) {
	if o.Replaces != nil {
		o.Replaces.text(b)
	}
	if o.Refused != "" {
		fmt.Fprintf(b, "not imported: %s\n", o.Refused)
		return
	}
	if o.File != "" {
		fmt.Fprintf(b, "imported to %s\n", o.File)
	}
	if o.Trust != "" {
		fmt.Fprintf(b, "%s has the trust of the evidence archive now", o.Trust)
		if o.Backup != "" {
			fmt.Fprintf(b, "; what it was is in %s", o.Backup)
		}
		b.WriteString("\n")
	}
}

// An Image is an index or manifest in an archive.
type Image struct {
	Name      string      `json:"name,omitempty"` // as the archive says
	Digest    string      `json:"digest"`
	MediaType string      `json:"mediaType,omitempty"`
	Platform  string      `json:"platform,omitempty"`
	Missing   bool        `json:"missing,omitempty"` // the archive does not have it
	Tag       bool        `json:"tag,omitempty"`     // the name is a tag, or has no host, and no rule is for it
	Answer    string      `json:"answer,omitempty"`  // what a gate answers with this archive alone, by the policy's rule for that name
	Detail    string      `json:"detail,omitempty"`  // why it is refused
	Rule      string      `json:"rule,omitempty"`
	Referrers []*Referrer `json:"referrers,omitempty"`
	Manifests []*Image    `json:"manifests,omitempty"`

	VerifiedFor  []string `json:"verifiedFor,omitempty"`  // platforms of an index that are allowed
	NotInArchive []string `json:"notInArchive,omitempty"` // and those of which the archive has neither manifest nor a signature that counts

	good bool // Answer allows it
}

// A Referrer is what refers to an image, or to another referrer.
type Referrer struct {
	Digest       string      `json:"digest"`
	ArtifactType string      `json:"artifactType"`
	Size         int64       `json:"size"` // bytes of all its parts
	Signature    *Signature  `json:"signature,omitempty"`
	Referrers    []*Referrer `json:"referrers,omitempty"`
}

// A Signature is what an envelope says of itself, and what the policy says of it.
type Signature struct {
	Format          string     `json:"format"` // media type of the envelope
	Signer          string     `json:"signer,omitempty"`
	Thumbprint      string     `json:"thumbprint,omitempty"`
	Signed          *time.Time `json:"signed,omitempty"`
	Expires         *time.Time `json:"expires,omitempty"`
	CertificateEnds *time.Time `json:"certificateEnds,omitempty"`
	Timestamp       *time.Time `json:"timestamp,omitempty"`
	Statements      []string   `json:"statements,omitempty"` // under which it verifies
	Reason          string     `json:"reason,omitempty"`     // VERIFIED, or why it verifies under none
	Detail          string     `json:"detail,omitempty"`
}

// Inspect reads all that c holds, and says what it is. e may be nil: then nothing is
// verified. trust is the trust of the node, by names in its configuration directory.
func (c *Contents) Inspect(ctx context.Context, name string, e *Evaluator, trust map[string][]byte) (*Report, error) {
	r := &Report{read: map[*document]*Signature{}, Schema: Schema, Archive: name, Images: []*Image{}, Problems: append([]string{}, c.problems...), LeftOut: []string{}, sums: map[digest.Digest]int64{}}
	if e != nil {
		r.Policy = e.Name
	}
	v := &visit{Contents: c, Report: r, ctx: ctx, evaluator: e, seen: map[digest.Digest]bool{}}
	for _, e := range c.images() {
		i := v.image(e, 0)
		i.Name = text.Clean(nameOf(e), 512)
		_, named := isName(i.Name)
		i.Tag = i.Name != "" && !named
		r.Images = append(r.Images, i)
		if v.images > maxLinks {
			return nil, fmt.Errorf("%w: indexes that list indexes again and again, and so more than %d images", verify.ErrBudget, maxLinks)
		}
	}
	// What refers to something that is not there: an archive may hold signatures alone.
	var loose []*Image
	for subject, list := range c.referrers {
		if v.seen[list[0].Digest] || c.documents[subject] != nil && c.documents[subject].subject != nil {
			continue
		}
		i := &Image{Digest: subject.String(), Missing: c.documents[subject] == nil}
		i.Referrers = v.referrers(subject, 0)
		loose = append(loose, i)
	}
	slices.SortFunc(loose, func(x, y *Image) int { return cmp.Compare(x.Digest, y.Digest) })
	named := r.Images
	r.Images = append(r.Images, loose...)
	if e != nil {
		v.choose()
	}
	slices.Sort(r.LeftOut)
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if e != nil {
		if err := c.rehearse(ctx, r, e, named, c.below); err != nil {
			return nil, fmt.Errorf("try what a gate would answer: %w", err)
		}
	}
	files, sum, err := c.Trust()
	if err != nil {
		r.Problems = append(r.Problems, err.Error())
	} else if files != nil {
		r.Trust = compare(files, trust)
		r.Trust.Digest = sum.String()
	}
	return r, nil
}

// A visit walks through contents.
type visit struct {
	*Contents
	*Report
	ctx       context.Context
	evaluator *Evaluator
	seen      map[digest.Digest]bool // referrers
	images    int                    // visited, each time that something lists them
}

func (v *visit) image(e ocispec.Descriptor, depth int) *Image {
	i := &Image{Digest: e.Digest.String(), MediaType: text.Clean(e.MediaType, 128), Platform: platformOf(e.Platform)}
	d := v.documents[e.Digest]
	if d == nil {
		i.Missing = true
	} else if depth < maxDepth {
		for _, m := range d.manifests {
			// Of few documents that list each other often there are more paths than memory.
			if v.images++; v.images > maxLinks || v.ctx.Err() != nil {
				break
			}
			if isDocument(m.MediaType) && m.Digest.Validate() == nil {
				i.Manifests = append(i.Manifests, v.image(m, depth+1))
			}
		}
	}
	i.Referrers = v.referrers(e.Digest, 0)
	return i
}

func platformOf(p *ocispec.Platform) string {
	if p == nil {
		return ""
	}
	s := p.OS + "/" + p.Architecture
	if p.Variant != "" {
		s += "/" + p.Variant
	}
	return text.Clean(s, 64)
}

// referrers reads what refers to subject, the first time that it is asked.
func (v *visit) referrers(subject digest.Digest, depth int) (list []*Referrer) {
	for _, d := range v.Contents.referrers[subject] {
		if v.seen[d.Digest] || depth > maxDepth || v.ctx.Err() != nil {
			continue
		}
		v.seen[d.Digest] = true
		r := &Referrer{Digest: d.Digest.String(), ArtifactType: text.Clean(d.ArtifactType, 128), Size: d.Size}
		usable := true
		for _, p := range d.parts() {
			r.Size += max(p.Size, 0)
			usable = v.part(d, p) && usable
		}
		if d.isSignature() {
			v.Signatures++
			r.Signature = v.signature(d)
			v.read[d] = r.Signature
		} else {
			v.Report.Referrers++
		}
		if usable {
			v.usable = append(v.usable, d)
		}
		r.Referrers = v.referrers(d.Digest, depth+1)
		list = append(list, r)
	}
	return list
}

// part looks whether a blob of a referrer is what its digest says. It reports whether
// the referrer can be taken.
func (v *visit) part(d *document, p ocispec.Descriptor) bool {
	if n, known := v.sums[p.Digest]; known && n == p.Size {
		return true
	}
	if p.Size > maxBlob {
		if len(v.LeftOut) < maxProblems {
			v.LeftOut = append(v.LeftOut, fmt.Sprintf("%s, of type %s: a part of %d bytes, limit %d", d.Digest, text.Quote(d.ArtifactType, 80), p.Size, maxBlob))
		}
		return false
	}
	if _, err := v.blob(p, maxBlob); err != nil {
		if len(v.Problems) < maxProblems {
			v.Problems = append(v.Problems, text.Clean(fmt.Sprintf("referrer %s: %v", d.Digest, err), 300))
		}
		return false
	}
	v.sums[p.Digest] = p.Size
	return true
}

// signature reads and verifies a signature.
func (v *visit) signature(d *document) *Signature {
	s := &Signature{}
	ev, err := v.evidence(d, verify.DefaultLimits.EnvelopeBytes)
	s.Format = text.Clean(ev.MediaType, 64)
	if err == nil {
		var said notary.Description
		said, err = notary.Describe(ev, verify.Limits{})
		s.Signer, s.Thumbprint = said.Subject, said.Thumbprint
		s.Signed, s.Expires, s.CertificateEnds, s.Timestamp = known(said.Signed), known(said.Expiry), known(said.NotAfter), known(said.Timestamp)
	}
	if err != nil {
		s.Reason, s.Detail = verify.SignatureInvalid.String(), text.Clean(err.Error(), 300)
		return s
	}
	if v.evaluator == nil {
		return s
	}
	var reason verify.Reason
	s.Statements, reason, s.Detail = v.evaluator.signature(v.ctx, ev, *d.subject)
	if s.Reason = string(reason); reason == verify.Verified {
		v.Verified++
	}
	s.Detail = text.Clean(s.Detail, 300)
	return s
}

func known(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return new(t.UTC())
}

// Refused reports whether a gate with this archive alone would refuse an image that the
// archive names, or would not read all of it.
func (r *Report) Refused() bool {
	return r.Trouble != "" || slices.ContainsFunc(r.Images, func(i *Image) bool { return i.Answer != "" && !i.good })
}

// list joins names of platforms.
func list(platforms []string) string { return text.Clean(strings.Join(platforms, ", "), 600) }

// JSON writes r for programs.
func (r *Report) JSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(r)
}

// Text writes r for a person.
func (r *Report) Text(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: images %d, signatures %d", text.Clean(r.Archive, 300), len(r.Images), r.Signatures)
	if r.Policy != "" {
		fmt.Fprintf(&b, " of which %d verify under %s", r.Verified, text.Clean(r.Policy, 300))
	}
	fmt.Fprintf(&b, ", other referrers %d\n", r.Referrers)
	for _, i := range r.Images {
		i.text(&b, "")
	}
	if r.Trust != nil {
		r.Trust.text(&b)
	}
	for _, p := range r.Problems {
		fmt.Fprintf(&b, "problem: %s\n", p)
	}
	if r.Trouble != "" {
		fmt.Fprintf(&b, "a gate would not read all of it: %s\n", r.Trouble)
	}
	for _, p := range r.LeftOut {
		fmt.Fprintf(&b, "left out: %s\n", p)
	}
	if r.Outcome != nil {
		r.Outcome.text(&b)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (i *Image) text(b *strings.Builder, indent string) {
	kind := "manifest"
	if oci.IsIndex(i.MediaType) {
		kind = "index"
	}
	switch {
	case i.Missing && i.Name == "" && i.Platform == "" && i.MediaType == "":
		kind = "image that is not in the evidence archive"
	case i.Missing:
		kind += ", not in the evidence archive"
	}
	fmt.Fprintf(b, "%s%s %s", indent, kind, i.Digest)
	if i.Name != "" {
		fmt.Fprintf(b, " %s", text.Quote(i.Name, 300))
	}
	if i.Platform != "" {
		fmt.Fprintf(b, " %s", text.Quote(i.Platform, 64))
	}
	b.WriteString("\n")
	if i.Tag {
		fmt.Fprintf(b, "%s  its name is a tag, or has no host: no rule is for it\n", indent)
	}
	if i.Answer != "" {
		fmt.Fprintf(b, "%s  policy: %s", indent, i.Answer)
		if i.good && len(i.NotInArchive) > 0 {
			fmt.Fprintf(b, " for %s; not in the evidence archive: %s", list(i.VerifiedFor), list(i.NotInArchive))
		}
		if i.Rule != "" {
			fmt.Fprintf(b, ", rule %s", text.Quote(i.Rule, 64))
		}
		if i.Detail != "" {
			fmt.Fprintf(b, ": %s", i.Detail)
		}
		if !i.good && len(i.NotInArchive) > 0 {
			fmt.Fprintf(b, " (not in the evidence archive: %s)", list(i.NotInArchive))
		}
		b.WriteString("\n")
	}
	for _, r := range i.Referrers {
		r.text(b, indent+"  ")
	}
	for _, m := range i.Manifests {
		m.text(b, indent+"  ")
	}
}

func (r *Referrer) text(b *strings.Builder, indent string) {
	if s := r.Signature; s == nil {
		fmt.Fprintf(b, "%sreferrer %s of type %s, %d bytes\n", indent, r.Digest, text.Quote(r.ArtifactType, 100), r.Size)
	} else {
		fmt.Fprintf(b, "%ssignature %s", indent, r.Digest)
		if s.Signer != "" {
			fmt.Fprintf(b, " by %s", text.Quote(s.Signer, 200))
		}
		b.WriteString("\n")
		if s.Thumbprint != "" {
			fmt.Fprintf(b, "%s  certificate sha256:%s, valid until %s\n", indent, s.Thumbprint, date(s.CertificateEnds, "?"))
			fmt.Fprintf(b, "%s  signed %s, expires %s, timestamp %s\n", indent, date(s.Signed, "at a time that it does not say"), date(s.Expires, "never"), date(s.Timestamp, "none"))
		}
		switch {
		case len(s.Statements) > 0:
			quoted := []string{}
			for _, name := range s.Statements {
				quoted = append(quoted, text.Quote(name, 64))
			}
			fmt.Fprintf(b, "%s  verifies under %s\n", indent, strings.Join(quoted, ", "))
		case s.Reason != "":
			fmt.Fprintf(b, "%s  does not verify: [%s] %s\n", indent, s.Reason, s.Detail)
		}
	}
	for _, x := range r.Referrers {
		x.text(b, indent+"  ")
	}
}

func date(t *time.Time, otherwise string) string {
	if t == nil {
		return otherwise
	}
	return t.UTC().Format(time.RFC3339)
}
