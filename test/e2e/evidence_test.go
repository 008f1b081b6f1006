package e2e

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

// feedOnly starts the gate with no mirror, no network and a state directory.
func (s *scene) feedOnly() (state string) {
	s.Helper()
	c := s.policy()
	c.Mirrors, c.More = nil, map[string]any{"sources": map[string]any{"network": "never"}}
	s.configure(c)
	state = filepath.Join(s.TempDir(), "state")
	s.restart(state)
	return state
}

// restart starts the gate anew with a state directory.
func (s *scene) restart(state string) {
	s.Helper()
	if s.gate != nil {
		s.gate.Kill()
	}
	var err error
	s.gate, err = s.StartGate(s.ctx, node.GateOptions{ConfigDir: s.dir, StateDir: state, NodeName: "edge-1", Binary: program})
	s.must(err)
	s.wait(0, node.Registered)
}

// blob fetches what the registry has.
func (s *scene) blob(kind string, d digest.Digest) []byte {
	s.Helper()
	req, err := http.NewRequestWithContext(s.ctx, http.MethodGet, s.reg.URL()+"/v2/app/"+kind+"/"+d.String(), nil)
	s.must(err)
	r, err := http.DefaultClient.Do(req)
	s.must(err)
	raw, err := io.ReadAll(r.Body)
	s.must(errors.Join(err, r.Body.Close()))
	http.DefaultClient.CloseIdleConnections()
	if digest.FromBytes(raw) != d {
		s.Fatalf("%s %s: status %d", kind, d, r.StatusCode)
	}
	return raw
}

// An archive is a layout with signatures, and with the manifests and indexes that they
// are over.
type archive struct {
	blobs   map[digest.Digest][]byte
	entries []ocispec.Descriptor
}

func (b *archive) add(d ocispec.Descriptor, raw []byte) {
	if b.blobs == nil {
		b.blobs = map[digest.Digest][]byte{}
	}
	b.blobs[d.Digest] = raw
	if d.MediaType != "" {
		b.entries = append(b.entries, d)
	}
}

// archived adds a signed image.
func (s *scene) archived(b *archive, img *node.Image, a notarytest.Artifact) {
	s.Helper()
	b.add(img.Target, s.blob("manifests", img.Target.Digest))
	if img.Manifest.Digest != img.Target.Digest {
		b.blobs[img.Manifest.Digest] = s.blob("manifests", img.Manifest.Digest)
	}
	b.add(a.Manifest.Descriptor, a.Manifest.Content)
	for _, x := range []notarytest.Blob{a.Envelope, a.Config} {
		b.blobs[x.Descriptor.Digest] = x.Content
	}
}

// files are the files of the layout.
func (s *scene) files(b archive) map[string][]byte {
	s.Helper()
	index, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: b.entries})
	s.must(err)
	m := map[string][]byte{"oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`), "index.json": index}
	for d, raw := range b.blobs {
		m["blobs/"+d.Algorithm().String()+"/"+d.Encoded()] = raw
	}
	return m
}

// archive makes a tar file.
func (s *scene) archive(name string, files map[string][]byte) string {
	s.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, raw := range files {
		s.must(w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(raw))}))
		_, err := w.Write(raw)
		s.must(err)
	}
	s.must(errors.Join(w.Close(), os.WriteFile(name, b.Bytes(), 0o600)))
	return name
}

// put renames an archive into the state directory, as a directory or as a tar file.
func (s *scene) put(state, name string, b archive) {
	s.Helper()
	temp := filepath.Join(s.TempDir(), name)
	if filepath.Ext(name) == ".tar" {
		s.archive(temp, s.files(b))
	} else {
		for name, raw := range s.files(b) {
			s.must(os.MkdirAll(filepath.Dir(filepath.Join(temp, name)), 0o755))
			s.must(os.WriteFile(filepath.Join(temp, name), raw, 0o600))
		}
	}
	mark := s.gate.Mark()
	s.must(os.Rename(temp, filepath.Join(state, "archives", name)))
	s.wait(mark, func(l node.Line) bool { return l.Msg == "an evidence archive was read" })
}

// dockerArchive imports an image as `docker save` wrote it before version 25: there is
// no manifest in it, and containerd makes one.
func (s *scene) dockerArchive(img *node.Image, name string) {
	s.Helper()
	var m ocispec.Manifest
	s.must(json.Unmarshal(s.blob("manifests", img.Manifest.Digest), &m))
	config := m.Config.Digest.Encoded() + ".json"
	files := map[string][]byte{config: s.blob("blobs", m.Config.Digest)}
	var layers []string
	for _, l := range m.Layers {
		name := l.Digest.Encoded() + "/layer.tar"
		layers = append(layers, name)
		files[name] = s.blob("blobs", l.Digest)
	}
	list, err := json.Marshal([]map[string]any{{"Config": config, "RepoTags": []string{name}, "Layers": layers}})
	s.must(err)
	files["manifest.json"] = list
	_, err = s.Ctr(s.ctx, "images", "import", s.archive(filepath.Join(s.TempDir(), "archive.tar"), files))
	s.must(err)
}

// TestArchiveOnly has a node that no registry feeds with signatures, ever.
func TestArchiveOnly(t *testing.T) {
	each(t, func(s *scene) {
		var b archive
		good := s.push(s.reg, "app:carried", node.ImageOptions{Word: "carried"})
		a, err := s.reg.Sign(s.ctx, good, release)
		s.must(err)
		s.archived(&b, good, a)
		index := s.push(s.reg, "app:carried-index", node.ImageOptions{Word: "carried-index", Index: true, Decoys: decoys})
		a, err = s.reg.Sign(s.ctx, index, release)
		s.must(err)
		var other archive
		s.archived(&other, index, a)
		bare := s.push(s.reg, "app:carried-bare", node.ImageOptions{Word: "carried-bare"})
		for _, img := range []*node.Image{good, index, bare} {
			s.pull(img.Name)
		}
		never := node.ContainerOptions{Pull: node.PullNever}
		s.reg.Forget()
		state := s.feedOnly()
		for _, img := range []*node.Image{good, index, bare} {
			s.denied(img.Name, verify.SignatureMissing, never)
		}
		s.put(state, "images", b)
		s.allowed(good.Name, "carried", never)
		s.denied(index.Name, verify.SignatureMissing, never)
		s.put(state, "more.tar", other)
		s.allowed(index.Name, "carried-index", never)
		s.denied(bare.Name, verify.SignatureMissing, never)
		text := s.status(0, "on edge-1: healthy\n")
		for _, want := range []string{"  archive        images: 1 signature\n", "  archive        more.tar: 1 signature\n"} {
			if !strings.Contains(text, want) {
				s.Errorf("no %q in\n%s", want, text)
			}
		}
		// The same after a restart.
		s.restart(state)
		s.allowed(good.Name, "carried", never)
		s.allowed(index.Name, "carried-index", never)
		s.denied(bare.Name, verify.SignatureMissing, never)
		if r := s.reg.Requests(); len(r) > 0 {
			s.Errorf("with network: never %d requests were made: %v", len(r), r[0])
		}
		// An archive that goes takes with it what only it had.
		s.must(os.RemoveAll(filepath.Join(state, "archives", "images")))
		s.wait(0, func(l node.Line) bool { return l.Msg == "an evidence archive is gone" })
		s.restart(state)
		s.denied(good.Name, verify.SignatureMissing, never)
		s.allowed(index.Name, "carried-index", never)
	})
}

// TestDockerArchive imports images for which containerd makes the manifests. What is
// signed leads to them by the config.
func TestDockerArchive(t *testing.T) {
	each(t, func(s *scene) {
		never := node.ContainerOptions{Pull: node.PullNever}
		var images []*node.Image
		for i, o := range []node.ImageOptions{{}, {Index: true, Decoys: decoys}} {
			o.Word = fmt.Sprint("archive", i)
			img := s.push(s.reg, "app:"+o.Word, o)
			_, err := s.reg.Sign(s.ctx, img, release)
			s.must(err)
			s.dockerArchive(img, img.Name)
			images = append(images, img)
		}
		bare := s.push(s.reg, "app:archive-bare", node.ImageOptions{Word: "archive-bare"})
		s.dockerArchive(bare, bare.Name)
		out, err := s.Ctr(s.ctx, "images", "ls")
		s.must(err)
		for _, img := range images {
			if strings.Contains(out, img.Target.Digest.String()) {
				s.Fatalf("%s was imported as it was signed, which shows nothing:\n%s", img.Name, out)
			}
		}

		// Without the evidence the refusal says what to do.
		s.reg.Forget()
		state := s.feedOnly()
		for _, img := range append(images, bare) {
			line := s.denied(img.Name, verify.SignatureMissing, never)
			if !strings.Contains(line, "tidewaiter evidence export") {
				s.Errorf("it does not say what to do: %s", line)
			}
		}
		// What it says helps.
		file := filepath.Join(s.TempDir(), "images.tar")
		s.tidewaiter("evidence", "export", "-o", file, "--mirror", s.reg.Host+"="+s.reg.URL(), images[0].Name, images[1].Name)
		mark := s.gate.Mark()
		s.tidewaiter("evidence", "import", "--config-dir", s.dir, "--state-dir", state, file)
		s.wait(mark, func(l node.Line) bool { return l.Msg == "an evidence archive was read" })
		for i, img := range images {
			s.allowed(img.Name, fmt.Sprint("archive", i), never)
		}
		s.denied(bare.Name, verify.SignatureMissing, never)

		// What the store kept of images that were pulled and verified leads to them too.
		s.gate.Kill()
		state = filepath.Join(s.TempDir(), "another")
		s.must(node.WriteConfig(s.dir, s.policy()))
		s.restart(state)
		for i, img := range images {
			s.must(s.RemoveImage(s.ctx, img.Name))
			s.allowed(img.Name, fmt.Sprint("archive", i), node.ContainerOptions{})
		}
		s.kept(state, len(images))
		s.must(s.RemovePods(s.ctx))
		s.pod = s.runPod(node.PodOptions{})
		for _, img := range images {
			s.must(s.RemoveImage(s.ctx, img.Name))
			s.dockerArchive(img, img.Name)
		}
		s.gate.Kill()
		c := s.policy()
		c.Mirrors, c.More = nil, map[string]any{"sources": map[string]any{"network": "never"}}
		s.must(node.WriteConfig(s.dir, c))
		s.restart(state)
		for i, img := range images {
			s.allowed(img.Name, fmt.Sprint("archive", i), never)
		}
		s.denied(bare.Name, verify.SignatureMissing, never)
	})
}

// tidewaiter runs a command that has to succeed.
func (s *scene) tidewaiter(args ...string) {
	s.Helper()
	out, err := exec.CommandContext(s.ctx, program, args...).CombinedOutput()
	if err != nil {
		s.Fatalf("tidewaiter %q: %v\n%s", args, err, out)
	}
}
