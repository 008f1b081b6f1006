package deploy

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/content/oci"
	"oras.land/oras-go/v2/registry"
)

const version = "v0.0.0-test"

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// command runs a program in a directory and returns what it prints.
func command(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOFLAGS=", "GOWORK=off", "MAKEFLAGS=", "SOURCE_DATE_EPOCH=",
		"GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_SYSTEM=/dev/null", "GIT_AUTHOR_DATE=2026-01-02T03:04:05Z", "GIT_COMMITTER_DATE=2026-01-02T03:04:05Z",
		"GIT_AUTHOR_NAME=test", "GIT_AUTHOR_EMAIL=test@example.invalid", "GIT_COMMITTER_NAME=test", "GIT_COMMITTER_EMAIL=test@example.invalid")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
	}
	return out, nil
}

// built is the directory dist of this tree as `make image` leaves it. The tree is
// copied and committed anew, so that what is tested is what lies here and its commit
// is the same each time.
var built = sync.OnceValues(func() (string, error) { return makeImage("one") })

var scratch string // of all tests, removed by TestMain

func makeImage(name string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 25*time.Minute)
	defer cancel()
	dir := filepath.Join(scratch, name, "tidewaiter")
	list, err := command(ctx, "../..", "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
	if err != nil {
		return "", err
	}
	for path := range strings.SplitSeq(strings.Trim(string(list), "\x00"), "\x00") {
		raw, err := os.ReadFile(filepath.Join("../..", path))
		if os.IsNotExist(err) {
			continue // it is deleted and that is not committed
		}
		if err == nil {
			err = os.MkdirAll(filepath.Dir(filepath.Join(dir, path)), 0o755)
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, path), raw, 0o644)
		}
		if err != nil {
			return "", err
		}
	}
	for _, args := range [][]string{
		{"git", "init", "-q"}, {"git", "add", "-A"}, {"git", "commit", "-q", "-m", "test"}, {"make", "image", "VERSION=" + version},
	} {
		if _, err := command(ctx, dir, args[0], args[1:]...); err != nil {
			return "", err
		}
	}
	return filepath.Join(dir, "dist"), nil
}

// sums are the digests of all files below a directory.
func sums(t *testing.T, dir string) map[string]string {
	t.Helper()
	m := map[string]string{}
	must(t, filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		raw, err := os.ReadFile(path)
		rel, _ := filepath.Rel(dir, path)
		m[rel] = fmt.Sprintf("%x", sha256.Sum256(raw))
		return err
	}))
	return m
}

// The same commit makes the same bytes, wherever it lies.
func TestReproducible(t *testing.T) {
	one, err := built()
	must(t, err)
	other, err := makeImage("another/one/elsewhere")
	must(t, err)
	a, b := sums(t, one), sums(t, other)
	if !maps.Equal(a, b) {
		t.Errorf("%v\nand\n%v", a, b)
	}
	if a["tidewaiter.tar"] == "" || a["linux-arm-v7/tidewaiter"] == "" || len(a) < 20 {
		t.Errorf("made %v", slices.Sorted(maps.Keys(a)))
	}
}

// The image has the platforms, labels and files that it should, and no others.
func TestImage(t *testing.T) {
	dist, err := built()
	must(t, err)
	ctx := t.Context()
	store, err := oci.NewFromFS(ctx, os.DirFS(filepath.Join(dist, "image")))
	must(t, err)
	tarred, err := oci.NewFromTar(ctx, filepath.Join(dist, "tidewaiter.tar"))
	must(t, err)
	top, err := store.Resolve(ctx, version)
	must(t, err)
	again, err := tarred.Resolve(ctx, version)
	must(t, err)
	if top.Digest != again.Digest || top.Annotations["io.containerd.image.name"] != "ghcr.io/tidewaiter/tidewaiter:"+version {
		t.Errorf("%v is not %v", top, again)
	}
	read := func(d ocispec.Descriptor, v any) {
		t.Helper()
		raw, err := content.FetchAll(ctx, store, d)
		must(t, err)
		if v != nil {
			must(t, json.Unmarshal(raw, v))
		}
	}
	var index ocispec.Index
	read(top, &index)
	var platforms []string
	for _, d := range index.Manifests {
		p := d.Platform
		name := strings.TrimSuffix(strings.Join([]string{p.OS, p.Architecture, p.Variant}, "-"), "-")
		platforms = append(platforms, name)
		var manifest ocispec.Manifest
		read(d, &manifest)
		var config ocispec.Image
		read(manifest.Config, &config)
		if config.Platform.Architecture != p.Architecture || config.Platform.Variant != p.Variant || config.Config.User != "0:0" ||
			!slices.Equal(config.Config.Entrypoint, []string{"/tidewaiter"}) || len(config.Config.Cmd)+len(config.Config.Env) > 0 {
			t.Errorf("%s: config %+v", name, config)
		}
		for key, want := range map[string]string{
			ocispec.AnnotationVersion: version, ocispec.AnnotationLicenses: "Apache-2.0", ocispec.AnnotationCreated: "2026-01-02T03:04:05Z",
			ocispec.AnnotationSource: "https://github.com/tidewaiter/tidewaiter", ocispec.AnnotationRevision: commit(t, dist),
		} {
			if config.Config.Labels[key] != want || manifest.Annotations[key] != want || index.Annotations[key] != want {
				t.Errorf("%s: %s is %q, %q and %q, want %q", name, key, config.Config.Labels[key], manifest.Annotations[key], index.Annotations[key], want)
			}
		}
		if len(manifest.Layers) != 1 {
			t.Fatalf("%d layers", len(manifest.Layers))
		}
		raw, err := content.FetchAll(ctx, store, manifest.Layers[0])
		must(t, err)
		binary, err := os.ReadFile(filepath.Join(dist, name, "tidewaiter"))
		must(t, err)
		files := layer(t, raw)
		if !bytes.Equal(files["tidewaiter"], binary) || bytes.Count(files["etc/ssl/certs/ca-certificates.crt"], []byte("BEGIN CERTIFICATE")) < 100 || len(files) != 2 {
			t.Errorf("%s has the files %v", name, slices.Sorted(maps.Keys(files)))
		}

		// The list of software is that of this very binary, and is found from the image.
		referrers, err := registry.Referrers(ctx, store, d, "application/spdx+json")
		must(t, err)
		if len(referrers) != 1 {
			t.Fatalf("%s: referrers %v", name, referrers)
		}
		var artifact ocispec.Manifest
		read(referrers[0], &artifact)
		text, err := content.FetchAll(ctx, store, artifact.Layers[0])
		must(t, err)
		file, err := os.ReadFile(filepath.Join(dist, "tidewaiter-"+name+".spdx.json"))
		must(t, err)
		if !bytes.Equal(text, file) {
			t.Error("the file is not what is attached")
		}
		software(t, text, binary)
	}
	if want := []string{"linux-amd64", "linux-arm-v7", "linux-arm64"}; !slices.Equal(platforms, want) {
		t.Errorf("platforms %v, want %v", platforms, want)
	}
	manifest, err := os.ReadFile(filepath.Join(dist, "deploy/kubeadm/tidewaiter.yaml"))
	must(t, err)
	if !strings.Contains(string(manifest), "image: ghcr.io/tidewaiter/tidewaiter:"+version+"\n") {
		t.Error("the manifest names another image")
	}
}

func commit(t *testing.T, dist string) string {
	t.Helper()
	out, err := command(t.Context(), dist, "git", "rev-parse", "HEAD")
	must(t, err)
	return strings.TrimSpace(string(out))
}

// layer returns the files of a layer, which must all be root's and not writable by
// others.
func layer(t *testing.T, raw []byte) map[string][]byte {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(raw))
	must(t, err)
	files := map[string][]byte{}
	r := tar.NewReader(z)
	for {
		h, err := r.Next()
		if err == io.EOF {
			return files
		}
		must(t, err)
		if h.Uid != 0 || h.Gid != 0 || h.Mode&0o7022 != 0 {
			t.Errorf("%s has mode %o and belongs to %d:%d", h.Name, h.Mode, h.Uid, h.Gid)
		}
		if h.Typeflag == tar.TypeReg {
			files[h.Name], err = io.ReadAll(r)
			must(t, err)
		} else if h.Typeflag != tar.TypeDir {
			t.Errorf("%s is of type %c", h.Name, h.Typeflag)
		}
	}
}

// software holds a list against the binary that it is about.
func software(t *testing.T, text, binary []byte) {
	t.Helper()
	var doc struct {
		SPDXVersion, SPDXID, DataLicense, Name, DocumentNamespace string

		CreationInfo struct {
			Created  string
			Creators []string
		}
		Packages []struct {
			SPDXID, Name, VersionInfo, DownloadLocation string

			Checksums    []struct{ Algorithm, ChecksumValue string }
			ExternalRefs []struct{ ReferenceLocator string }
		}
		Relationships []struct{ SPDXElementID, RelationshipType, RelatedSPDXElement string }
	}
	must(t, json.Unmarshal(text, &doc))
	sum := fmt.Sprintf("%x", sha256.Sum256(binary))
	if doc.SPDXVersion != "SPDX-2.3" || doc.SPDXID != "SPDXRef-DOCUMENT" || doc.DataLicense != "CC0-1.0" || !strings.HasSuffix(doc.DocumentNamespace, sum) ||
		doc.CreationInfo.Created != "2026-01-02T03:04:05Z" || len(doc.CreationInfo.Creators) == 0 {
		t.Errorf("document %s %s %s %s %v", doc.SPDXVersion, doc.SPDXID, doc.DataLicense, doc.DocumentNamespace, doc.CreationInfo)
	}
	if p := doc.Packages[0]; p.Checksums[0].ChecksumValue != sum || p.VersionInfo != version || !strings.HasPrefix(p.DownloadLocation, "git+https://") {
		t.Errorf("the first package is %+v", p)
	}
	ids := map[string]bool{doc.SPDXID: true}
	listed := map[string]string{}
	for _, p := range doc.Packages {
		if ids[p.SPDXID] || p.DownloadLocation == "" || len(p.ExternalRefs) != 1 || !strings.HasPrefix(p.ExternalRefs[0].ReferenceLocator, "pkg:golang/"+p.Name+"@") {
			t.Errorf("package %+v", p)
		}
		ids[p.SPDXID] = true
		listed[p.Name] = p.VersionInfo
	}
	for _, r := range doc.Relationships {
		if !ids[r.SPDXElementID] || !ids[r.RelatedSPDXElement] || r.RelationshipType != "DESCRIBES" && r.RelationshipType != "DEPENDS_ON" {
			t.Errorf("relationship %+v", r)
		}
	}
	info, err := buildinfo.Read(bytes.NewReader(binary))
	must(t, err)
	want := map[string]string{info.Main.Path: version, "stdlib": strings.TrimPrefix(info.GoVersion, "go")}
	for _, m := range info.Deps {
		want[m.Path] = m.Version
	}
	if !maps.Equal(listed, want) || len(doc.Relationships) != len(doc.Packages) || len(want) < 20 {
		t.Errorf("listed are %v\nlinked are %v", listed, want)
	}
}
