package node

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"maps"
	"net/http"
	"path"
	"runtime"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ImageOptions say what image to make. Images with equal options are equal to
// the bit. The zero value is a single OCI manifest whose container prints an
// empty line and sleeps.
type ImageOptions struct {
	// Word is what its container prints before it sleeps until SIGTERM. It is in the
	// configuration, so that images which differ in it alone have one root
	// filesystem (one chain ID) and two configurations. "@/path" prints a file.
	Word string

	// Files are in a second layer: absolute path to content.
	Files map[string]string

	// Env and Labels are in the configuration.
	Env    []string
	Labels map[string]string

	// Entrypoint replaces the program that the first layer holds at Program.
	Entrypoint []string

	// Docker asks for Docker's media types instead of OCI's.
	Docker bool

	// Index wraps the manifest into an index, after one entry each of Decoys.
	Index  bool
	Decoys []Decoy
}

// Program is the path of the program in images.
const Program = "/program"

// A Decoy is an entry of an index that this node must not run.
type Decoy struct {
	Platform ocispec.Platform // its os and architecture say that it is for another machine
	// Image is the image of the entry. Nil means one with no program that says the
	// platform's name.
	Image *Image
}

// An Image is one that a registry holds.
type Image struct {
	Name string // as pods name it, with the tag: "registry.example/app:1"

	Target   ocispec.Descriptor // what the tag names: the index if there is one, else Manifest
	Manifest ocispec.Descriptor // for this machine
	Config   ocispec.Descriptor
	DiffIDs  []digest.Digest

	registry *Registry
	image    v1.Image
}

// Repository returns the name without the tag.
func (i *Image) Repository() string { return i.Name[:strings.LastIndex(i.Name, ":")] }

// Pinned returns the name with the digest of Target.
func (i *Image) Pinned() string { return i.Repository() + "@" + i.Target.Digest.String() }

// Push makes an image and pushes it under a name with a tag, without the host:
// "app:1". A tag that exists is moved.
func (r *Registry) Push(ctx context.Context, name string, o ImageOptions) (*Image, error) {
	img, err := makeImage(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("making the image %s: %w", name, err)
	}
	return r.push(ctx, name, img, o)
}

// Copy pushes an image of another registry, or of another name, bit by bit.
func (r *Registry) Copy(ctx context.Context, name string, from *Image) (*Image, error) {
	src, err := from.registry.reference(from.Pinned())
	if err != nil {
		return nil, err
	}
	dst, err := r.reference(name)
	if err != nil {
		return nil, err
	}
	desc, err := remote.Get(src, remote.WithContext(ctx), transport)
	if err != nil {
		return nil, err
	}
	if desc.MediaType.IsIndex() {
		var index v1.ImageIndex
		if index, err = desc.ImageIndex(); err == nil {
			err = remote.WriteIndex(dst, index, remote.WithContext(ctx), transport)
		}
	} else {
		var img v1.Image
		if img, err = desc.Image(); err == nil {
			err = remote.Write(dst, img, remote.WithContext(ctx), transport)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("copying %s to %s: %w", from.Name, dst, err)
	}
	img := *from
	img.Name, img.registry = r.Host+"/"+name, r
	return &img, nil
}

func (r *Registry) push(ctx context.Context, name string, img v1.Image, o ImageOptions) (*Image, error) {
	ref, err := r.reference(name)
	if err != nil {
		return nil, err
	}
	if !strings.Contains(path.Base(name), ":") {
		return nil, fmt.Errorf("image %q: no tag", name)
	}
	res := &Image{Name: r.Host + "/" + name, registry: r, image: img}
	if res.Manifest, err = descriptor(img); err != nil {
		return nil, err
	}
	m, err := img.Manifest()
	if err != nil {
		return nil, err
	}
	res.Config = ocispec.Descriptor{MediaType: string(m.Config.MediaType), Digest: digest.Digest(m.Config.Digest.String()), Size: m.Config.Size}
	config, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	for _, d := range config.RootFS.DiffIDs {
		res.DiffIDs = append(res.DiffIDs, digest.Digest(d.String()))
	}
	if !o.Index {
		res.Target = res.Manifest
		if err := remote.Write(ref, img, remote.WithContext(ctx), transport); err != nil {
			return nil, fmt.Errorf("pushing %s: %w", ref, err)
		}
		return res, nil
	}
	var adds []mutate.IndexAddendum
	for _, d := range o.Decoys {
		var decoy v1.Image
		if d.Image != nil {
			decoy = d.Image.image
		} else if decoy, err = makeDecoy(d.Platform, o.Docker); err != nil {
			return nil, err
		}
		adds = append(adds, addendum(decoy, d.Platform))
	}
	adds = append(adds, addendum(img, ocispec.Platform{OS: runtime.GOOS, Architecture: runtime.GOARCH}))
	kind := types.OCIImageIndex
	if o.Docker {
		kind = types.DockerManifestList
	}
	index := mutate.AppendManifests(mutate.IndexMediaType(empty.Index, kind), adds...)
	if res.Target, err = descriptor(index); err != nil {
		return nil, err
	}
	if err := remote.WriteIndex(ref, index, remote.WithContext(ctx), transport); err != nil {
		return nil, fmt.Errorf("pushing %s: %w", ref, err)
	}
	return res, nil
}

func addendum(img v1.Image, p ocispec.Platform) mutate.IndexAddendum {
	return mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{
		Platform: &v1.Platform{OS: p.OS, Architecture: p.Architecture, Variant: p.Variant, OSVersion: p.OSVersion},
	}}
}

// descriptor describes an image or index.
func descriptor(m interface {
	MediaType() (types.MediaType, error)
	Digest() (v1.Hash, error)
	Size() (int64, error)
}) (ocispec.Descriptor, error) {
	kind, err := m.MediaType()
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	sum, err := m.Digest()
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	size, err := m.Size()
	return ocispec.Descriptor{MediaType: string(kind), Digest: digest.Digest(sum.String()), Size: size}, err
}

func makeImage(ctx context.Context, o ImageOptions) (v1.Image, error) {
	program, err := buildProgram(ctx)
	if err != nil {
		return nil, err
	}
	entry := o.Entrypoint
	if entry == nil {
		entry = []string{Program}
	}
	var cmd []string
	if o.Word != "" {
		cmd = []string{o.Word}
	}
	layers := []map[string]file{{Program: {0o755, program}}}
	if len(o.Files) > 0 {
		l := map[string]file{}
		for name, content := range o.Files {
			l[name] = file{0o644, []byte(content)}
		}
		layers = append(layers, l)
	}
	return assemble(layers, ocispec.Platform{OS: runtime.GOOS, Architecture: runtime.GOARCH},
		v1.Config{Entrypoint: entry, Cmd: cmd, Env: o.Env, Labels: o.Labels}, o.Docker)
}

func makeDecoy(p ocispec.Platform, docker bool) (v1.Image, error) {
	text := path.Join(p.OS, p.Architecture, p.Variant)
	return assemble([]map[string]file{{"/decoy": {0o644, []byte(text)}}}, p, v1.Config{Entrypoint: []string{"/decoy"}}, docker)
}

type file struct {
	mode    int64
	content []byte
}

func assemble(layers []map[string]file, p ocispec.Platform, config v1.Config, docker bool) (v1.Image, error) {
	kind, configKind, layerKind := types.OCIManifestSchema1, types.OCIConfigJSON, types.OCIUncompressedLayer
	if docker {
		kind, configKind, layerKind = types.DockerManifestSchema2, types.DockerConfigJSON, types.DockerUncompressedLayer
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, kind), configKind)
	for _, files := range layers {
		b, err := tarball(files)
		if err != nil {
			return nil, err
		}
		if img, err = mutate.AppendLayers(img, static.NewLayer(b, layerKind)); err != nil {
			return nil, err
		}
	}
	file, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	file = file.DeepCopy()
	file.OS, file.Architecture, file.Variant, file.OSVersion = p.OS, p.Architecture, p.Variant, p.OSVersion
	file.Created = v1.Time{Time: time.Unix(0, 0).UTC()}
	file.Config = config
	return mutate.ConfigFile(img, file)
}

// tarball is a layer with files, in the order of their names.
func tarball(files map[string]file) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		f := files[name]
		h := &tar.Header{Name: strings.TrimPrefix(path.Clean("/"+name), "/"), Mode: f.mode, Size: int64(len(f.content)), Format: tar.FormatPAX}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := w.Write(f.content); err != nil {
			return nil, err
		}
	}
	return b.Bytes(), w.Close()
}

// client talks to the registries of this process: to loopback, without a proxy,
// and without idle connections that outlive a test.
var (
	client    = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	transport = remote.WithTransport(client.Transport)
)
