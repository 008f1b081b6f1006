package notation_test

import (
	"archive/tar"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

// A carrier runs the programs that evidence goes through.
type carrier struct {
	t                          *testing.T
	env                        []string
	dir                        string
	oras, notation, tidewaiter string
}

// try runs a program in the directory and returns its standard output and status.
func (c *carrier) try(program string, args ...string) (string, int) {
	c.t.Helper()
	stdout, stderr, status := run(c.t.Context(), c.env, program, args...)
	c.t.Logf("%s %s: %d\n%s%s", filepath.Base(program), strings.Join(args, " "), status, stdout, stderr)
	return stdout, status
}

// do wants status 0, and on standard output each of these.
func (c *carrier) do(wants []string, program string, args ...string) {
	c.t.Helper()
	stdout, status := c.try(program, args...)
	if status != 0 {
		c.t.Fatalf("%s %s: exit status %d", filepath.Base(program), strings.Join(args, " "), status)
	}
	for _, w := range wants {
		if !strings.Contains(stdout, w) {
			c.t.Errorf("%s %s does not say %q", filepath.Base(program), strings.Join(args, " "), w)
		}
	}
}

func (c *carrier) path(name string) string { return filepath.Join(c.dir, name) }

// TestArchives has evidence signed by notation and carried by oras, notation and
// tidewaiter, from registry to layout to node and back.
func TestArchives(t *testing.T) {
	t.Parallel()
	c := &carrier{t: t, dir: t.TempDir()}
	var err error
	if c.notation, err = node.FindNotation(t.Context(), os.Stderr); err != nil {
		t.Fatal(err)
	}
	if c.oras, err = node.FindOras(t.Context(), os.Stderr); err != nil {
		t.Fatal(err)
	}
	if c.tidewaiter, err = node.BuildTidewaiter(t.Context()); err != nil {
		t.Fatal(err)
	}
	etc, state := c.path("etc"), c.path("state")
	c.env = []string{
		"HOME=" + c.path("home"), "NOTATION_EXPERIMENTAL=1", "NOTATION_CONFIG=" + etc, "NOTATION_LIBEXEC=" + c.path("libexec"),
		"PATH=" + os.Getenv("PATH"), "TIDEWAITER_CONFIG_DIR=" + etc, "TIDEWAITER_STATE_DIR=" + state, "TMPDIR=" + t.TempDir(),
	}
	// notation's own key and certificate; its trust store is ours.
	c.do(nil, c.notation, "cert", "generate-test", "--default", "acme")
	if err := os.WriteFile(filepath.Join(etc, "trustpolicy.json"), notarytest.TrustPolicy(notarytest.Statement("prod")), 0o644); err != nil {
		t.Fatal(err)
	}

	// Two registries have the image, one of them its signature and an SBOM.
	image, err := random.Image(64, 2)
	if err != nil {
		t.Fatal(err)
	}
	image = mutate.ConfigMediaType(mutate.MediaType(image, types.OCIManifestSchema1), types.OCIConfigJSON)
	d, err := image.Digest()
	if err != nil {
		t.Fatal(err)
	}
	at := map[string]string{}
	for _, which := range []string{"first", "second"} {
		r, err := node.NewRegistry("registry.example", node.RegistryOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer r.Stop()
		at[which] = r.Addr
		ref, err := name.NewTag(r.Addr+"/team/app:v1", name.Insecure)
		if err != nil {
			t.Fatal(err)
		}
		if err := remote.Write(ref, image, remote.WithContext(t.Context())); err != nil {
			t.Fatal(err)
		}
	}
	digest := "@" + d.String()
	first, second := at["first"]+"/team/app", at["second"]+"/team/app"
	mirror := func(which string) string { return "--mirror=registry.example=http://" + at[which] }
	c.do(nil, c.notation, "sign", "--insecure-registry", first+digest)
	sbom := c.path("sbom.json")
	if err := os.WriteFile(sbom, []byte(`{"spdxVersion":"SPDX-2.3"}`), 0o644); err != nil {
		t.Fatal(err)
	}
	c.do(nil, c.oras, "attach", "--plain-http", "--disable-path-validation", "--artifact-type", "application/spdx+json", first+digest, sbom+":application/spdx+json")
	if _, status := c.try(c.tidewaiter, "verify", mirror("second"), scope+digest); status != 1 {
		t.Fatalf("the image without signature: exit status %d", status)
	}

	// Our archive, as directory and tar file, read by oras and notation.
	site, tarred := c.path("site"), c.path("site.tar")
	c.do([]string{"signatures 1, other referrers 1"}, c.tidewaiter, "evidence", "export", mirror("first"), "--referrers", "all", "-o", site, scope+":v1")
	c.do(nil, c.tidewaiter, "evidence", "export", mirror("first"), "--referrers", "all", "-o", tarred, scope+":v1")
	for _, form := range []string{site, tarred} {
		c.do([]string{"application/vnd.cncf.notary.signature", "application/spdx+json"}, c.oras, "discover", "--oci-layout", form+digest)
		c.do([]string{"signatures 1 of which 1 verify", scope, `of type "application/spdx+json"`}, c.tidewaiter, "evidence", "inspect", form)
	}
	c.do([]string{"Successfully verified"}, c.notation, "verify", "--oci-layout", site+digest, "--scope", scope)

	// oras carries what is in it to a registry that has the image.
	c.do(nil, c.oras, "cp", "-r", "--from-oci-layout", site+digest, "--to-plain-http", second+":v1")
	c.do([]string{"VERIFIED"}, c.tidewaiter, "verify", mirror("second"), scope+digest)
	c.do([]string{"Successfully verified"}, c.notation, "verify", "--insecure-registry", second+digest)
	// This registry lists the config's type of such a manifest and not its artifactType.
	c.do([]string{"application/vnd.oci.empty.v1+json"}, c.oras, "discover", "--plain-http", second+digest)

	// What oras carries, image and all, is taken over without the image.
	carried := c.path("carried")
	c.do(nil, c.oras, "cp", "-r", "--from-plain-http", first+":v1", "--to-oci-layout", carried+":v1")
	c.do([]string{"signatures 1 of which 1 verify", "other referrers 1"}, c.tidewaiter, "evidence", "inspect", carried)
	c.do([]string{"imported to " + state + "/archives/carried.tar"}, c.tidewaiter, "evidence", "import", carried)
	c.do([]string{"VERIFIED"}, c.tidewaiter, "verify", "--layout", state+"/archives/carried.tar", scope+digest)
	if _, err := os.Stat(filepath.Join(carried, "blobs/sha256")); err != nil {
		t.Fatal(err)
	}
	manifest, err := image.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(state + "/archives/carried.tar")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range manifest.Layers {
		if strings.Contains(string(raw), "blobs/sha256/"+l.Digest.Hex) {
			t.Errorf("the layer %s was imported", l.Digest)
		}
	}
	c.do([]string{"application/vnd.cncf.notary.signature", "application/spdx+json"}, c.oras, "discover", "--oci-layout", state+"/archives/carried.tar"+digest)

	// What notation signs in a layout.
	signed := c.path("signed")
	c.do(nil, c.oras, "cp", "--from-plain-http", first+":v1", "--to-oci-layout", signed+":v1")
	if _, status := c.try(c.tidewaiter, "evidence", "import", signed); status != 1 {
		t.Errorf("a layout without signature: exit status %d", status)
	}
	c.do(nil, c.notation, "sign", "--oci-layout", signed+digest)
	c.do([]string{"signatures 1 of which 1 verify"}, c.tidewaiter, "evidence", "inspect", signed)
	c.do([]string{"imported to "}, c.tidewaiter, "evidence", "import", signed)
	c.do([]string{"VERIFIED"}, c.tidewaiter, "verify", "--layout", state+"/archives/signed.tar", scope+digest)

	// Trust comes along, and notation has it where it is put.
	c.do(nil, c.tidewaiter, "evidence", "export", mirror("first"), "--trust", "-o", c.path("trust.tar"), scope+":v1")
	c.do([]string{"has the trust of the evidence archive now"}, c.tidewaiter, "evidence", "import", "--config-dir", c.path("fresh"), "--trust", "--accept", trustIn(t, c.path("trust.tar")), c.path("trust.tar"))
	c.env = append(c.env, "NOTATION_CONFIG="+c.path("fresh"))
	c.do([]string{"Successfully verified"}, c.notation, "verify", "--insecure-registry", second+digest)
}

// trustIn is the digest of the trust in an archive.
func trustIn(t *testing.T, file string) string {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r := tar.NewReader(f)
	for {
		h, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		if h.Name != ocispec.ImageIndexFile {
			continue
		}
		var index ocispec.Index
		if err := json.NewDecoder(r).Decode(&index); err != nil {
			t.Fatal(err)
		}
		for _, d := range index.Manifests {
			if d.ArtifactType == "application/vnd.tidewaiter.trust.v1" {
				return d.Digest.String()
			}
		}
	}
}
