package e2e

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
)

// A saved image is what an archive is made of.
type saved struct {
	name   string
	config []byte
	layers [][]byte // not compressed
}

func (s *scene) saved(img *node.Image) saved {
	s.Helper()
	var m ocispec.Manifest
	s.must(json.Unmarshal(s.blob("manifests", img.Manifest.Digest), &m))
	out := saved{name: img.Name, config: s.blob("blobs", m.Config.Digest)}
	for _, l := range m.Layers {
		raw := s.blob("blobs", l.Digest)
		if bytes.HasPrefix(raw, []byte{0x1f, 0x8b}) {
			r, err := gzip.NewReader(bytes.NewReader(raw))
			s.must(err)
			raw, err = io.ReadAll(r)
			s.must(err)
		}
		out.layers = append(out.layers, raw)
	}
	return out
}

func (s *scene) gzipped(raw []byte) []byte {
	s.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, err := w.Write(raw)
	s.must(errors.Join(err, w.Close()))
	return b.Bytes()
}

func (s *scene) json(v any) []byte {
	s.Helper()
	raw, err := json.Marshal(v)
	s.must(err)
	return raw
}

func blobPath(raw []byte) string { return "blobs/sha256/" + digest.FromBytes(raw).Encoded() }

// A listed image is an entry of manifest.json.
type listed struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// docker25 is what docker save of Docker 25 and later writes where containerd does not
// keep its images: a layout with a manifest that it makes (moby, daemon/internal/image/tarexport/save.go).
func docker25(s *scene, i saved) map[string][]byte {
	files, one := map[string][]byte{blobPath(i.config): i.config}, listed{Config: blobPath(i.config), RepoTags: []string{i.name}}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(i.config), Size: int64(len(i.config))}}
	for _, l := range i.layers {
		files[blobPath(l)] = l
		one.Layers = append(one.Layers, blobPath(l))
		m.Layers = append(m.Layers, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(l), Size: int64(len(l))})
	}
	raw := s.json(m)
	files[blobPath(raw)] = raw
	repository, tag, _ := strings.Cut(i.name, ":")
	files["index.json"] = s.json(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{{
		MediaType: m.MediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw)),
		Annotations: map[string]string{"io.containerd.image.name": i.name, ocispec.AnnotationRefName: tag},
	}}})
	files["oci-layout"] = []byte(`{"imageLayoutVersion": "1.0.0"}`)
	files["manifest.json"] = s.json([]listed{one})
	files["repositories"] = s.json(map[string]map[string]string{repository: {tag: digest.FromBytes(i.layers[len(i.layers)-1]).Encoded()}})
	return files
}

// crane is what crane save, kaniko and ko write: a docker archive of compressed layers
// (go-containerregistry, pkg/v1/tarball/write.go).
func crane(s *scene, i saved) map[string][]byte {
	config := digest.FromBytes(i.config).String()
	files, one := map[string][]byte{config: i.config}, listed{Config: config, RepoTags: []string{i.name}}
	for _, l := range i.layers {
		packed := s.gzipped(l)
		name := digest.FromBytes(packed).Encoded() + ".tar.gz"
		files[name], one.Layers = packed, append(one.Layers, name)
	}
	files["manifest.json"] = s.json([]listed{one})
	return files
}

// podman is what podman save and skopeo copy write as docker-archive, with the files of
// old (containers/image, docker/internal/tarfile/writer.go).
func podman(s *scene, i saved) map[string][]byte {
	config := digest.FromBytes(i.config).Encoded() + ".json"
	files, one := map[string][]byte{config: i.config}, listed{Config: config, RepoTags: []string{i.name}}
	for _, l := range i.layers {
		id := digest.FromBytes(l).Encoded()
		files[id+".tar"], one.Layers = l, append(one.Layers, id+".tar")
		files[id+"/VERSION"], files[id+"/json"] = []byte("1.0"), s.json(map[string]string{"id": id})
	}
	files["manifest.json"] = s.json([]listed{one})
	return files
}

// refusal is the status of importing such an archive as an archive: what is no layout
// cannot be read as one.
func refusal(kind string) int {
	if kind == "docker25" {
		return 1
	}
	return 2
}

// TestArchives imports what programs write of an image without its signed manifest. The
// refusal says what to do, and that helps.
func TestArchives(t *testing.T) {
	each(t, func(s *scene) {
		never := node.ContainerOptions{Pull: node.PullNever}
		state := s.feedOnly()
		for kind, shape := range map[string]func(*scene, saved) map[string][]byte{"docker25": docker25, "crane": crane, "podman": podman} {
			word := "saved-by-" + kind
			img := s.push(s.reg, "app:"+word, node.ImageOptions{Word: word, Index: true, Decoys: decoys})
			_, err := s.reg.Sign(s.ctx, img, release)
			s.must(err)
			file := s.archive(filepath.Join(s.TempDir(), kind+".tar"), shape(s, s.saved(img)))
			if kind == "podman" { // packed, as k3s's agent/images are
				raw, err := os.ReadFile(file)
				s.must(err)
				file += ".gz"
				s.must(os.WriteFile(file, s.gzipped(raw), 0o600))
			}
			_, err = s.Ctr(s.ctx, "images", "import", file)
			s.must(err)
			out, err := s.Ctr(s.ctx, "images", "ls")
			s.must(err)
			if strings.Contains(out, img.Target.Digest.String()) || strings.Contains(out, img.Manifest.Digest.String()) {
				s.Fatalf("%s was imported as it was signed, which shows nothing:\n%s", img.Name, out)
			}
			if line := s.denied(img.Name, verify.SignatureMissing, never); !strings.Contains(line, "tidewaiter evidence export") {
				s.Errorf("%s: it does not say what to do: %s", kind, line)
			}
			// Of the archive itself nothing can be made.
			if out := s.run(refusal(kind), "evidence", "import", "--config-dir", s.dir, "--state-dir", state, file); !strings.Contains(out, "docker archive") && !strings.Contains(out, "no signature in it verifies") {
				s.Errorf("%s: %s", kind, out)
			}
			site := filepath.Join(s.TempDir(), kind+"-site.tar")
			s.tidewaiter("evidence", "export", "-o", site, "--mirror", s.reg.Host+"="+s.reg.URL(), img.Name)
			mark := s.gate.Mark()
			s.tidewaiter("evidence", "import", "--config-dir", s.dir, "--state-dir", state, site)
			s.wait(mark, func(l node.Line) bool { return l.Msg == "an evidence archive was read" })
			s.allowed(img.Name, word, never)
			if text := s.run(0, "explain", img.Name); !strings.Contains(text, "evidence archive "+kind+"-site.tar") {
				s.Errorf("%s: it does not say which evidence archive:\n%s", kind, text)
			}
		}
	})
}
