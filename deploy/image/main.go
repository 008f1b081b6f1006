// Command image packs the program into a container image, without Docker: an OCI
// image layout and a tar of the same, with one image for each binary that it is
// given and a list of the software in it (SPDX 2.3) attached to each.
//
//	go run ./deploy/image -name NAME:TAG -o DIR BINARY...
//
// An image holds /tidewaiter, the certificate authorities that Mozilla trusts, and
// nothing else. Platform, commit and modules are read from each binary itself. The
// same binaries make the same bytes: the only time in them is that of the commit, or
// SOURCE_DATE_EPOCH where that is set.
package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/crypto/x509roots/fallback/bundle"
)

const (
	source   = "https://github.com/tidewaiter/tidewaiter"
	spdxType = "application/spdx+json"
)

func main() {
	name := flag.String("name", "", "`NAME:TAG` of the image")
	out := flag.String("o", "dist", "`DIR` to write to")
	flag.Parse()
	if err := run(*name, *out, flag.Args(), os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

// run writes, into the directory out, image/ (the layout), tidewaiter.tar, and the lists
// of software.
func run(name, out string, binaries []string, said io.Writer) error {
	_, tag, ok := strings.Cut(name[strings.LastIndex(name, "/")+1:], ":")
	if !ok || tag == "" {
		return fmt.Errorf("-name %q is not NAME:TAG", name)
	}
	if len(binaries) == 0 {
		return errors.New("no binary is given")
	}
	dir := filepath.Join(out, "image")
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	l := &layout{dir: dir}
	index := v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex}
	var lists []v1.Descriptor
	for _, path := range binaries {
		b, err := read(path)
		if err != nil {
			return err
		}
		b.version = tag
		manifest, err := l.image(b)
		if err != nil {
			return err
		}
		list, text, err := l.list(b, manifest)
		if err != nil {
			return err
		}
		index.Manifests, lists = append(index.Manifests, manifest), append(lists, list)
		index.Annotations = b.labels()
		if err := os.WriteFile(filepath.Join(out, "tidewaiter-"+b.arch()+".spdx.json"), text, 0o644); err != nil {
			return err
		}
	}
	top, err := l.document(index, v1.MediaTypeImageIndex)
	if err != nil {
		return err
	}
	fmt.Fprintf(said, "%s %s\n", name, top.Digest)
	// containerd takes the name from its own annotation, other tools from that of OCI.
	top.Annotations = map[string]string{"io.containerd.image.name": name, v1.AnnotationRefName: tag}
	entry := v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex, Manifests: append([]v1.Descriptor{top}, lists...)}
	if err := l.file("index.json", entry); err != nil {
		return err
	}
	if err := l.file(v1.ImageLayoutFile, v1.ImageLayout{Version: v1.ImageLayoutVersion}); err != nil {
		return err
	}
	return pack(dir, filepath.Join(out, "tidewaiter.tar"))
}

// A binary is the program for one platform.
type binary struct {
	raw     []byte
	info    *buildinfo.BuildInfo
	created time.Time // of its commit
	version string
}

// read reads a binary and refuses one that does not run from an empty image.
func read(path string) (*binary, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	info, err := buildinfo.Read(bytes.NewReader(raw))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	b := &binary{raw: raw, info: info, created: time.Unix(0, 0).UTC()}
	if b.setting("GOOS") != "linux" || b.setting("CGO_ENABLED") != "0" {
		return nil, fmt.Errorf("%s: is not built with GOOS=linux and CGO_ENABLED=0", path)
	}
	when := b.setting("vcs.time")
	if epoch := os.Getenv("SOURCE_DATE_EPOCH"); epoch != "" {
		seconds, err := strconv.ParseInt(epoch, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("SOURCE_DATE_EPOCH: %w", err)
		}
		b.created = time.Unix(seconds, 0).UTC()
	} else if when != "" {
		if b.created, err = time.Parse(time.RFC3339, when); err != nil {
			return nil, fmt.Errorf("%s: vcs.time: %w", path, err)
		}
	}
	return b, nil
}

func (b *binary) setting(key string) string {
	for _, s := range b.info.Settings {
		if s.Key == key {
			return s.Value
		}
	}
	return ""
}

// platform is where the binary runs.
func (b *binary) platform() v1.Platform {
	p := v1.Platform{OS: "linux", Architecture: b.setting("GOARCH")}
	if arm, _, _ := strings.Cut(b.setting("GOARM"), ","); arm != "" {
		p.Variant = "v" + arm
	}
	return p
}

// arch is the platform in names of files.
func (b *binary) arch() string {
	p := b.platform()
	return strings.TrimSuffix(p.OS+"-"+p.Architecture+"-"+p.Variant, "-")
}

func (b *binary) labels() map[string]string {
	l := map[string]string{
		v1.AnnotationTitle:         "tidewaiter",
		v1.AnnotationDescription:   "Lets no container start on a node unless its image is signed as the node's policy asks",
		v1.AnnotationSource:        source,
		v1.AnnotationDocumentation: source + "/blob/main/docs/install.md",
		v1.AnnotationLicenses:      "Apache-2.0",
		v1.AnnotationVersion:       b.version,
		v1.AnnotationCreated:       b.created.Format(time.RFC3339),
	}
	if commit := b.setting("vcs.revision"); commit != "" {
		l[v1.AnnotationRevision] = commit
	}
	return l
}

// A layout is an OCI image layout that is being written.
type layout struct{ dir string }

// file writes a file of the layout as JSON.
func (l *layout) file(name string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(l.dir, name), raw, 0o644)
}

func (l *layout) blob(raw []byte, mediaType string) (v1.Descriptor, error) {
	d := v1.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	dir := filepath.Join(l.dir, v1.ImageBlobsDir, d.Digest.Algorithm().String())
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return d, err
	}
	return d, os.WriteFile(filepath.Join(dir, d.Digest.Encoded()), raw, 0o644)
}

func (l *layout) document(v any, mediaType string) (v1.Descriptor, error) {
	raw, err := json.Marshal(v)
	if err != nil {
		return v1.Descriptor{}, err
	}
	return l.blob(raw, mediaType)
}

// image writes the image of one platform.
func (l *layout) image(b *binary) (v1.Descriptor, error) {
	var plain bytes.Buffer
	w := tar.NewWriter(&plain)
	for _, f := range []struct {
		name string
		mode int64
		raw  []byte
	}{
		{"etc/", 0o755, nil}, {"etc/ssl/", 0o755, nil}, {"etc/ssl/certs/", 0o755, nil},
		{"etc/ssl/certs/ca-certificates.crt", 0o644, authorities()},
		{"tidewaiter", 0o755, b.raw},
	} {
		h := &tar.Header{Name: f.name, Mode: f.mode, Size: int64(len(f.raw)), ModTime: b.created, Typeflag: tar.TypeReg}
		if strings.HasSuffix(f.name, "/") {
			h.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			return v1.Descriptor{}, err
		}
		if _, err := w.Write(f.raw); err != nil {
			return v1.Descriptor{}, err
		}
	}
	if err := w.Close(); err != nil {
		return v1.Descriptor{}, err
	}
	var packed bytes.Buffer
	z, err := gzip.NewWriterLevel(&packed, gzip.BestCompression)
	if err != nil {
		return v1.Descriptor{}, err
	}
	if _, err := z.Write(plain.Bytes()); err != nil {
		return v1.Descriptor{}, err
	}
	if err := z.Close(); err != nil {
		return v1.Descriptor{}, err
	}
	layer, err := l.blob(packed.Bytes(), v1.MediaTypeImageLayerGzip)
	if err != nil {
		return v1.Descriptor{}, err
	}
	config, err := l.document(v1.Image{
		Created:  &b.created,
		Platform: b.platform(),
		Config: v1.ImageConfig{
			User:       "0:0", // the runtime's sockets are root's
			Entrypoint: []string{"/tidewaiter"},
			Labels:     b.labels(),
		},
		RootFS:  v1.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromBytes(plain.Bytes())}},
		History: []v1.History{{Created: &b.created, CreatedBy: "make image"}},
	}, v1.MediaTypeImageConfig)
	if err != nil {
		return v1.Descriptor{}, err
	}
	manifest, err := l.document(v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest,
		Config: config, Layers: []v1.Descriptor{layer}, Annotations: b.labels(),
	}, v1.MediaTypeImageManifest)
	p := b.platform()
	manifest.Platform = &p
	return manifest, err
}

// authorities are the certificate authorities that Mozilla trusts without a
// condition, as a PEM file. What a site has beside them, config.yaml names.
func authorities() []byte {
	var b bytes.Buffer
	for root := range bundle.Roots() {
		if root.Constraint == nil { // a file cannot say the others
			_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: root.Certificate}) // no write fails here
		}
	}
	return b.Bytes()
}

// list writes what software is in b, as an artifact that refers to its image, and
// returns that and the list.
func (l *layout) list(b *binary, subject v1.Descriptor) (v1.Descriptor, []byte, error) {
	text, err := json.MarshalIndent(b.spdx(), "", "  ")
	if err != nil {
		return v1.Descriptor{}, nil, err
	}
	text = append(text, '\n')
	layer, err := l.blob(text, spdxType)
	if err != nil {
		return v1.Descriptor{}, nil, err
	}
	empty, err := l.blob([]byte("{}"), v1.MediaTypeEmptyJSON)
	if err != nil {
		return v1.Descriptor{}, nil, err
	}
	d, err := l.document(v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest, ArtifactType: spdxType,
		Config: empty, Layers: []v1.Descriptor{layer},
		Subject:     &v1.Descriptor{MediaType: subject.MediaType, Digest: subject.Digest, Size: subject.Size},
		Annotations: map[string]string{v1.AnnotationCreated: b.created.Format(time.RFC3339)},
	}, v1.MediaTypeImageManifest)
	d.ArtifactType = spdxType
	return d, text, err
}

// pack writes the files of a directory into a tar, in the order of their names.
func pack(dir, to string) error {
	f, err := os.Create(to)
	if err != nil {
		return err
	}
	defer f.Close()
	w := tar.NewWriter(f)
	var names []string
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			names = append(names, path)
		}
		return err
	})
	if err != nil {
		return err
	}
	slices.Sort(names)
	for _, path := range names {
		raw, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		if err := w.WriteHeader(&tar.Header{Name: filepath.ToSlash(name), Mode: 0o644, Size: int64(len(raw)), ModTime: time.Unix(0, 0)}); err != nil {
			return err
		}
		if _, err := w.Write(raw); err != nil {
			return err
		}
	}
	return errors.Join(w.Close(), f.Close())
}

// sum is the SHA-256 of raw in hex.
func sum(raw []byte) string { return fmt.Sprintf("%x", sha256.Sum256(raw)) }
