package archive

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

// judged is a judge of a configuration, and whom it trusts.
func judged(t *testing.T) (*Evaluator, *notarytest.Signer) {
	t.Helper()
	ca, dir := notarytest.NewCA(notarytest.CAOptions{}), t.TempDir()
	if err := notarytest.WriteConfig(dir, notarytest.Stores{"ca/acme/root.crt": ca.PEM()}, notarytest.Statement("prod", "*")); err != nil {
		t.Fatal(err)
	}
	c, err := config.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	e := &Evaluator{Name: dir, Statements: []string{"prod"}, Now: time.Now, Platform: func(p ocispec.Platform) bool { return p.OS == "linux" && p.Architecture == runtime.GOARCH }}
	if e.Setup, err = c.Snapshot(func(engine *verify.Engine) verify.Evaluator {
		e.Engine = engine
		return engine
	}, time.Now); err != nil {
		t.Fatal(err)
	}
	return e, ca.Leaf(notarytest.CertOptions{})
}

// open opens the layout of c, and inspects it with the judge.
func open(t *testing.T, c sourcetest.Content, e *Evaluator) (*Contents, *Report) {
	t.Helper()
	dir := t.TempDir()
	sourcetest.Layout(t, dir, c, false)
	opened, err := Open(t.Context(), dir, nil, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(opened.Close)
	r, err := opened.Inspect(t.Context(), dir, e, nil)
	if err != nil {
		t.Fatal(err)
	}
	return opened, r
}

func sign(t *testing.T, c *sourcetest.Content, s *notarytest.Signer, d ocispec.Descriptor) verify.Evidence {
	t.Helper()
	return c.Sign(d, notary.MediaTypeJWS, string(notarytest.MustSign(s, d, notarytest.SignOptions{})))
}

func marshal(t *testing.T, v any) []byte {
	t.Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// An index is verified for the platforms of which a signature is there, and never for
// one that is missing.
func TestAnswers(t *testing.T) {
	t.Parallel()
	j, signer := judged(t)
	own, other := "linux/"+runtime.GOARCH, "linux/s390x"
	type platform struct {
		name          string
		there, signed bool
	}
	for name, test := range map[string]struct {
		called      string // by index.json; default: a name of a repository
		indexSigned bool
		platforms   []platform
		want        string
		text        string // of the report
	}{
		"all missing":           {platforms: []platform{{name: own}, {name: other}}, want: "SIGNATURE_MISSING", text: "(not in the evidence archive: " + own + ", " + other + ")"},
		"all there":             {platforms: []platform{{own, true, true}, {other, true, true}}, want: "VERIFIED", text: "policy: VERIFIED, rule"},
		"another missing":       {platforms: []platform{{own, true, true}, {name: other}}, want: "VERIFIED", text: "policy: VERIFIED for " + own + "; not in the evidence archive: " + other},
		"this node's missing":   {platforms: []platform{{name: own}, {other, true, true}}, want: "SIGNATURE_MISSING", text: ": for " + own + ": "},
		"another not signed":    {platforms: []platform{{own, true, true}, {other, true, false}}, want: "SIGNATURE_MISSING", text: ": for " + other + ": "},
		"no platform of a node": {platforms: []platform{{other, true, true}}, want: "VERIFIED", text: "policy: VERIFIED, rule"},
		"a signed index":        {indexSigned: true, platforms: []platform{{name: own}, {name: other}}, want: "VERIFIED", text: "policy: VERIFIED, rule"},
		"a tag":                 {called: "1.2", platforms: []platform{{own, true, true}}, text: "its name is a tag"},
		"a name without a host": {called: "team/app:1", platforms: []platform{{own, true, true}}, text: "its name is a tag"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := sourcetest.Content{Kind: notary.Kind}
			var listed []ocispec.Descriptor
			for _, p := range test.platforms {
				os, arch, _ := strings.Cut(p.name, "/")
				d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString(p.name), Size: 7}
				if p.there {
					d = c.Image(p.name)
				}
				if p.signed {
					sign(t, &c, signer, ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size})
				}
				d.Platform = &ocispec.Platform{OS: os, Architecture: arch}
				listed = append(listed, d)
			}
			index := c.Add(ocispec.MediaTypeImageIndex, marshal(t, ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: listed}))
			if test.indexSigned {
				sign(t, &c, signer, index)
			}
			if test.called == "" {
				test.called = "registry.test/app:1.2"
			}
			index.Annotations = map[string]string{ocispec.AnnotationRefName: test.called}
			c.Images = []ocispec.Descriptor{index}
			_, r := open(t, c, j)
			var b bytes.Buffer
			if err := r.Text(&b); err != nil {
				t.Fatal(err)
			}
			if got := r.Images[0].Answer; got != test.want || !strings.Contains(b.String(), test.text) {
				t.Errorf("answer %q, want %q and %q in\n%s", got, test.want, test.text, b.String())
			}
			if bad := test.want != "" && test.want != "VERIFIED"; r.Refused() != bad {
				t.Errorf("refused %t", r.Refused())
			}
		})
	}
}

// Any number of signatures that verify under no statement stands beside one that does: an
// import takes a few along, and the gate finds the good one.
func TestJunkBesideOne(t *testing.T) {
	t.Parallel()
	j, signer := judged(t)
	c := sourcetest.Content{Kind: notary.Kind}
	subject := c.Image("app")
	for i := range 1100 {
		c.Sign(subject, notary.MediaTypeJWS, fmt.Sprint("junk ", i))
	}
	stranger := notarytest.NewCA(notarytest.CAOptions{}).Leaf(notarytest.CertOptions{})
	foreign := sign(t, &c, stranger, subject)
	good := sign(t, &c, signer, subject)
	c.Images[0].Annotations = map[string]string{ocispec.AnnotationRefName: "registry.test/app:1"}
	_, all := open(t, c, nil)
	opened, r := open(t, c, j)
	if i := r.Images[0]; i.Answer != "VERIFIED" || r.Refused() || r.Signatures != 1102 || r.Verified != 1 {
		t.Errorf("answer %s %s, signatures %d, verified %d, %s", i.Answer, i.Detail, r.Signatures, r.Verified, r.Trouble)
	}
	if len(r.LeftOut) != 1 || !strings.HasPrefix(r.LeftOut[0], "1085 of 1101 signatures of ") {
		t.Errorf("left out %q", r.LeftOut)
	}
	kept := map[digest.Digest]bool{}
	for _, d := range r.usable {
		kept[d.Digest] = true
	}
	if len(kept) != maxOthers+1 || !kept[good.Manifest.Digest] || !kept[foreign.Manifest.Digest] {
		t.Errorf("%d are kept", len(kept))
	}

	// Where nobody chose, import says that the gate would not read all of it.
	s, err := OpenImporter(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if trouble, err := s.Fits(t.Context(), opened, r, "x", time.Now); err != nil || len(trouble) > 0 {
		t.Errorf("%q, error %v", trouble, err)
	}
	if trouble, err := s.Fits(t.Context(), opened, all, "x", time.Now); err == nil && len(trouble) == 0 {
		t.Error("all of it fits")
	}
}

// What an import would push out of what the gate reads is said.
func TestFits(t *testing.T) {
	t.Parallel()
	j, signer := judged(t)
	c := sourcetest.Content{Kind: notary.Kind}
	sign(t, &c, signer, c.Image("app"))
	opened, r := open(t, c, j)
	state := t.TempDir()
	s, err := OpenImporter(t.Context(), state)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for i := range 64 {
		name := fmt.Sprintf("b%02d", i)
		if trouble, err := s.Fits(t.Context(), opened, r, name, time.Now); i%16 == 0 && (err != nil || len(trouble) > 0) {
			t.Fatalf("%d: %q, error %v", i, trouble, err)
		}
		if _, err := s.Save(t.Context(), opened, r, name); err != nil {
			t.Fatal(err)
		}
	}
	if trouble, err := s.Fits(t.Context(), opened, r, "b00", time.Now); err != nil || len(trouble) > 0 {
		t.Errorf("in the place of one: %q, error %v", trouble, err)
	}
	if trouble, err := s.Fits(t.Context(), opened, r, "a", time.Now); err != nil || len(trouble) != 1 || !strings.Contains(trouble[0], "65 entries") {
		t.Errorf("one more: %q, error %v", trouble, err)
	}
	if left, _ := filepath.Glob(filepath.Join(s.Dir(), ".unfinished-*")); len(left) > 0 {
		t.Errorf("left %q", left)
	}
}

func TestReplaces(t *testing.T) {
	t.Parallel()
	j, signer := judged(t)
	old, next := sourcetest.Content{Kind: notary.Kind}, sourcetest.Content{Kind: notary.Kind}
	a, b := old.Image("a"), old.Image("b")
	sign(t, &old, signer, a)
	sign(t, &old, signer, b)
	next.Image("b")
	next.Blobs[a.Digest] = old.Blobs[a.Digest]
	for d, raw := range old.Blobs { // the same signature of b, and none of a
		next.Blobs[d] = raw
	}
	next.Referrers = map[digest.Digest][]ocispec.Descriptor{b.Digest: old.Referrers[b.Digest]}
	state := t.TempDir()
	s, err := OpenImporter(t.Context(), state)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	oldOpened, oldReport := open(t, old, j)
	nextOpened, nextReport := open(t, next, j)
	if p, err := s.Replaces(t.Context(), nextOpened, nextReport, "site"); err != nil || p != nil {
		t.Errorf("%+v, error %v", p, err)
	}
	if _, err := s.Save(t.Context(), oldOpened, oldReport, "site"); err != nil {
		t.Fatal(err)
	}
	if p, err := s.Replaces(t.Context(), oldOpened, oldReport, "site"); err != nil || p.Signatures != 2 || p.Gone != 0 || p.Refused() != "" {
		t.Errorf("the same: %+v, error %v", p, err)
	}
	p, err := s.Replaces(t.Context(), nextOpened, nextReport, "site")
	if err != nil || p.File != "site.tar" || p.Signatures != 2 || p.Gone != 1 || p.Refused() != "" {
		t.Fatalf("%+v, error %v", p, err)
	}
	config := func(d ocispec.Descriptor) string { return oldOpened.documents[d.Digest].config.Digest.String() }
	if !p.Concerns(a.Digest.String()) || !p.Concerns("sha256:x", config(a)) || p.Concerns(b.Digest.String(), config(b), "") {
		t.Errorf("concerns %v", p.of)
	}
	if p.Unknown = "no gate answers"; !strings.Contains(p.Refused(), "1 of the 2 signatures of site.tar would go") {
		t.Error(p.Refused())
	}
	if p.Needed = "registry.test/a"; !strings.Contains(p.Refused(), "registry.test/a on this node may need one") {
		t.Error(p.Refused())
	}
	if err := os.WriteFile(filepath.Join(state, "archives/site.tar"), []byte("no tar file"), 0o600); err != nil {
		t.Fatal(err)
	}
	if p, err := s.Replaces(t.Context(), nextOpened, nextReport, "site"); err != nil || p.Unread == "" || p.Refused() == "" {
		t.Errorf("damaged: %+v, error %v", p, err)
	}
}

// An archive that people or tools made in another way is told what was expected.
func TestArchivesMadeByHand(t *testing.T) {
	t.Parallel()
	dir, _, _ := site(t)
	above := t.TempDir()
	if err := os.CopyFS(filepath.Join(above, "app"), os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "top.tar")
	if out, err := exec.Command("tar", "-C", above, "-cf", file, "app").CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		file  string
		stdin []byte
		want  string
	}{
		"the directory above":              {file: above, want: "no oci-layout at its top; one is in app/ there"},
		"a tar file of it":                 {file: file, want: "no oci-layout at its top; one is in app/ there"},
		"a stream of that":                 {stdin: raw, want: "no oci-layout at its top; one is in app/ there"},
		"a directory of a layout":          {file: filepath.Join(dir, "blobs"), want: "no oci-layout at its top"},
		"a stream that bzip2 has packed":   {stdin: []byte("BZh91AY&SY"), want: "compressed with bzip2, which is not read: unpack it, or pack it with gzip or zstd"},
		"a stream that xz has packed":      {stdin: []byte("\xfd7zXZ\x00\x00"), want: "compressed with xz, which is not read"},
		"a stream that lz4 has packed":     {stdin: []byte("\x04\x22\x4d\x18xxxx"), want: "compressed with lz4, which is not read"},
		"a stream that lz4 packed earlier": {stdin: []byte("\x02\x21\x4c\x18xxxx"), want: "compressed with lz4, which is not read"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tests := map[string][]byte{test.file: nil}
			if test.stdin != nil {
				at := filepath.Join(t.TempDir(), "x.tar")
				if err := os.WriteFile(at, test.stdin, 0o600); err != nil {
					t.Fatal(err)
				}
				tests = map[string][]byte{"-": test.stdin, at: nil}
			}
			for name, stdin := range tests {
				if _, err := Open(t.Context(), name, bytes.NewReader(stdin), t.TempDir()); err == nil || !strings.Contains(err.Error(), test.want) {
					t.Errorf("%s: error %v, want %q", name, err, test.want)
				}
			}
		})
	}
}
