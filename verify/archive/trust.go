package archive

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/policy"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// Bounds of trust in an archive: those of a configuration directory.
const (
	maxTrustFiles = 1000
	maxTrustFile  = 1 << 20
	maxTrust      = 16 << 20
)

// A TrustReport compares the trust in an archive with that of the node.
type TrustReport struct {
	Digest  string      `json:"digest"`  // of all that the archive has of it, names and bytes; what --accept wants
	Changed bool        `json:"changed"` // whether putting it in force would change anything
	Files   []TrustFile `json:"files"`
	Rules   []TrustRule `json:"statements"`

	// Of an import: warnings of the configuration with this trust that it does not have
	// today, and images of this node to which the gate would give another answer.
	Warnings []string `json:"warnings,omitempty"`
	Answers  []Change `json:"answers,omitempty"`
	Unknown  string   `json:"unknown,omitempty"` // why it is not known of all images what the answer would be
}

// A Change is an image of the node that is answered otherwise under other trust.
type Change struct {
	Image  string        `json:"image"`
	Target string        `json:"target"`
	Now    verify.Reason `json:"now"`
	Then   verify.Reason `json:"then"`
	Detail string        `json:"detail,omitempty"` // of the answer then
}

// Lost reports whether the image is allowed now and would not be.
func (c Change) Lost() bool { return c.Now == verify.Verified && c.Then != verify.Verified }

// maxShown bounds the images that are shown in text, of each kind.
const maxShown = 10

// Costs returns why putting the trust in force may refuse images of the node that are
// allowed now; empty if it does not.
func (r *TrustReport) Costs() string {
	lost, first := 0, ""
	for _, c := range r.Answers {
		if c.Lost() {
			if lost++; first == "" {
				first = c.Image
			}
		}
	}
	switch {
	case lost > 0:
		return fmt.Sprintf("%d of this node's images that are allowed now would not be, such as %s", lost, first)
	case r.Unknown != "":
		return "it is not known which of this node's images would be refused: " + r.Unknown
	}
	return ""
}

func (r *TrustReport) answers(b *strings.Builder) {
	for _, lost := range []bool{true, false} {
		n := 0
		for _, c := range r.Answers {
			if c.Lost() != lost {
				continue
			}
			if n++; n <= maxShown {
				fmt.Fprintf(b, "  answer  %s@%s: %s now, then %s", text.Clean(c.Image, 300), text.Clean(c.Target, 144), c.Now, c.Then)
				if c.Detail != "" {
					fmt.Fprintf(b, ": %s", text.Clean(c.Detail, 300))
				}
				b.WriteString("\n")
			}
		}
		if n > maxShown {
			fmt.Fprintf(b, "  answer  %d more like these: --output json\n", n-maxShown)
		}
	}
	if r.Unknown != "" {
		fmt.Fprintf(b, "  answer  not known of all images: %s\n", text.Clean(r.Unknown, 300))
	}
}

// Warn notes those of next, of the configuration with this trust, that are not among now,
// of the one in force.
func (r *TrustReport) Warn(next, now []string) {
	for _, w := range next {
		if !slices.Contains(now, w) {
			r.Warnings = append(r.Warnings, text.Clean(w, 600))
		}
	}
}

// A TrustFile is a file of one of the two.
type TrustFile struct {
	Name         string        `json:"name"`             // in the configuration directory
	Change       string        `json:"change"`           // added, removed, changed or same
	SHA256       string        `json:"sha256,omitempty"` // of the file in the archive; empty if removed
	Certificates []Certificate `json:"certificates,omitempty"`
	Problem      string        `json:"problem,omitempty"`
}

// A Certificate is one of a trust store.
type Certificate struct {
	Subject     string `json:"subject"`
	Fingerprint string `json:"fingerprint"` // SHA-256, hex
	NotAfter    string `json:"notAfter"`
}

// A TrustRule is a statement of one of the two policies, in one line.
type TrustRule struct {
	Name   string `json:"name"`
	Change string `json:"change"`
	Text   string `json:"text"`          // in the archive; of a removed one, on the node
	Was    string `json:"was,omitempty"` // of a changed one, on the node
}

// isPolicy reports whether name is that of a trust policy.
func isPolicy(name string) bool { return name == "trustpolicy.json" || name == "trustpolicy.oci.json" }

// isTrust reports whether name is that of a file of a trust policy or trust store.
func isTrust(name string) bool {
	parts := strings.Split(name, "/")
	if isPolicy(name) {
		return true
	}
	if len(parts) != 5 || parts[0] != "truststore" || parts[1] != "x509" || len(name) > 512 {
		return false
	}
	for _, p := range parts {
		if p == "" || strings.HasPrefix(p, ".") || strings.ContainsFunc(p, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\\' }) {
			return false
		}
	}
	return true
}

// Trust returns the files of trust policy and trust store in the archive, by names in a
// configuration directory, and the digest of all of them: it is that of the artifact,
// which has their names and digests. Nil if there are none.
func (c *Contents) Trust() (map[string][]byte, digest.Digest, error) {
	var artifact *document
	for _, e := range c.entries {
		d := c.documents[e.Digest]
		if d.ArtifactType != ArtifactTypeTrust || d == artifact {
			continue
		}
		if artifact != nil {
			return nil, "", fmt.Errorf("%w: it holds more than one trust", ErrRefused)
		}
		artifact = d
	}
	if artifact == nil {
		return nil, "", nil
	}
	files, policies, left := map[string][]byte{}, 0, int64(maxTrust)
	if len(artifact.layers) > maxTrustFiles {
		return nil, "", fmt.Errorf("%w: its trust has more than %d files", ErrRefused, maxTrustFiles)
	}
	for _, l := range artifact.layers {
		name := l.Annotations[ocispec.AnnotationTitle]
		if !isTrust(name) || files[name] != nil {
			return nil, "", fmt.Errorf("%w: a file of its trust is called %s", ErrRefused, text.Quote(name, 100))
		}
		raw, err := c.dir.Blob(l, func(n int64) error {
			if left -= n; n > maxTrustFile || left < 0 {
				return verify.ErrBudget
			}
			return nil
		})
		if err != nil {
			return nil, "", fmt.Errorf("trust: %s: %w", text.Quote(name, 100), err)
		}
		if isPolicy(name) {
			policies++
		}
		files[name] = raw
	}
	if policies != 1 {
		return nil, "", fmt.Errorf("%w: its trust has %d trust policies, not one", ErrRefused, policies)
	}
	return files, artifact.Digest, nil
}

// compare says what would change if the node's files became those of the archive.
func compare(archive, node map[string][]byte) *TrustReport {
	r := &TrustReport{Files: []TrustFile{}, Rules: []TrustRule{}}
	names := map[string]bool{}
	for _, files := range []map[string][]byte{archive, node} {
		for name := range files {
			names[name] = true
		}
	}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		there, here := archive[name], node[name]
		f := TrustFile{Name: text.Clean(name, 300), Change: change(there != nil, here != nil, bytes.Equal(there, here))}
		raw := there
		if there == nil {
			raw = here
		} else {
			sum := sha256.Sum256(there)
			f.SHA256 = hex.EncodeToString(sum[:])
		}
		if !isPolicy(name) {
			var err error
			if f.Certificates, err = certificates(raw); err != nil {
				f.Problem = text.Clean(err.Error(), 200)
			}
		}
		r.Changed = r.Changed || f.Change != "same"
		r.Files = append(r.Files, f)
	}
	there, here := statements(archive), statements(node)
	clear(names)
	for _, list := range []map[string]string{there, here} {
		for name := range list {
			names[name] = true
		}
	}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		x, inArchive := there[name]
		y, onNode := here[name]
		s := TrustRule{Name: text.Clean(name, 100), Change: change(inArchive, onNode, x == y), Text: x}
		switch s.Change {
		case "removed":
			s.Text = y
		case "changed":
			s.Was = y
		}
		r.Rules = append(r.Rules, s)
	}
	return r
}

func change(archive, node, same bool) string {
	switch {
	case !node:
		return "added"
	case !archive:
		return "removed"
	case same:
		return "same"
	}
	return "changed"
}

// statements are those of the trust policy among files, in one line each; none of one
// that cannot be read.
func statements(files map[string][]byte) map[string]string {
	lines := map[string]string{}
	for name, raw := range files {
		if !isPolicy(name) {
			continue
		}
		list, _ := policy.Parse(raw) // what is wrong with it, the loader says
		for _, s := range list {
			var b strings.Builder
			fmt.Fprintf(&b, "level %s", text.Quote(s.Level, 32))
			for _, check := range slices.Sorted(maps.Keys(s.Override)) {
				fmt.Fprintf(&b, ", %s %s", text.Quote(check, 32), text.Quote(s.Override[check], 32))
			}
			if s.VerifyTimestamp != "" {
				fmt.Fprintf(&b, ", timestamps %s", text.Quote(s.VerifyTimestamp, 32))
			}
			fmt.Fprintf(&b, "; scopes %s; trust stores %s; identities %s", quoted(s.Scopes), quoted(s.TrustStores), quoted(s.TrustedIdentities))
			lines[s.Name] = b.String()
		}
	}
	return lines
}

func quoted(list []string) string {
	var all []string
	for _, s := range list {
		all = append(all, text.Quote(s, 200))
	}
	return strings.Join(all, " ")
}

// certificates reads a file of a trust store, PEM or DER.
func certificates(raw []byte) (list []Certificate, err error) {
	add := func(der []byte) error {
		certs, err := x509.ParseCertificates(der)
		for _, c := range certs {
			sum := sha256.Sum256(c.Raw)
			list = append(list, Certificate{text.Clean(c.Subject.String(), 300), hex.EncodeToString(sum[:]), c.NotAfter.UTC().Format("2006-01-02")})
		}
		return err
	}
	block, rest := pem.Decode(raw)
	if block == nil {
		return list, add(raw)
	}
	for ; block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			return list, errors.New("holds PEM that is no certificate")
		}
		if err := add(block.Bytes); err != nil {
			return list, err
		}
	}
	return list, nil
}

func (r *TrustReport) text(b *strings.Builder) {
	fmt.Fprintf(b, "trust policy and trust store %s, against those of this node:\n", r.Digest)
	for _, s := range r.Rules {
		fmt.Fprintf(b, "  %-7s statement %s: %s\n", s.Change, text.Quote(s.Name, 100), s.Text)
		if s.Was != "" {
			fmt.Fprintf(b, "          it was: %s\n", s.Was)
		}
	}
	for _, f := range r.Files {
		fmt.Fprintf(b, "  %-7s %s", f.Change, text.Quote(f.Name, 300))
		if f.SHA256 != "" && isPolicy(f.Name) {
			fmt.Fprintf(b, " sha256:%s", f.SHA256)
		}
		b.WriteString("\n")
		for _, c := range f.Certificates {
			fmt.Fprintf(b, "          certificate sha256:%s %s until %s\n", c.Fingerprint, text.Quote(c.Subject, 200), c.NotAfter)
		}
		if f.Problem != "" {
			fmt.Fprintf(b, "          %s\n", f.Problem)
		}
	}
	for _, w := range r.Warnings {
		fmt.Fprintf(b, "  warning %s\n", w)
	}
	r.answers(b)
}

// mediaTypeOfTrust is that of a file of trust.
func mediaTypeOfTrust(name string) string {
	if isPolicy(name) {
		return MediaTypePolicy
	}
	return MediaTypeAnchors
}

// packTrust puts files into l.
func (l *Layout) packTrust(files map[string][]byte) error {
	var layers []ocispec.Descriptor
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if !isTrust(name) {
			return fmt.Errorf("%s is no file of a trust policy or trust store", path.Clean(name))
		}
		d := l.add(mediaTypeOfTrust(name), files[name])
		d.Annotations = map[string]string{ocispec.AnnotationTitle: name}
		layers = append(layers, d)
	}
	return l.artifact(ArtifactTypeTrust, TrustName, layers)
}
