package main

import (
	"archive/tar"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

// An image that scripts use, with everything that belongs to it.
type image struct {
	target  ocispec.Descriptor
	content map[digest.Digest][]byte // manifests and configs, by digest
	inner   []ocispec.Descriptor     // manifests below target
	signed  []signature
}

type signature struct {
	subject ocispec.Descriptor
	notarytest.Artifact
}

func (i *image) put(mediaType string, raw []byte, alg digest.Algorithm) ocispec.Descriptor {
	d := ocispec.Descriptor{MediaType: mediaType, Digest: alg.FromBytes(raw), Size: int64(len(raw))}
	if i.content == nil {
		i.content = map[digest.Digest][]byte{}
	}
	i.content[d.Digest] = raw
	return d
}

func encode(v any) []byte {
	raw, err := json.Marshal(v)
	if err != nil {
		panic(err) // of our own structs
	}
	return raw
}

// manifest adds an image manifest that differs from others by name.
func (i *image) manifest(name string, alg digest.Algorithm) ocispec.Descriptor {
	config := i.put(ocispec.MediaTypeImageConfig, fmt.Appendf(nil, `{"architecture":%q,"os":%q,"author":%q,"rootfs":{"type":"layers","diff_ids":[]}}`, runtime.GOARCH, runtime.GOOS, name), digest.SHA256)
	return i.put(ocispec.MediaTypeImageManifest, encode(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: config, Layers: []ocispec.Descriptor{},
	}), alg)
}

func (i *image) index(manifests ...ocispec.Descriptor) ocispec.Descriptor {
	for _, m := range manifests {
		m.Platform = nil
		i.inner = append(i.inner, m)
	}
	return i.put(ocispec.MediaTypeImageIndex, encode(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: manifests,
	}), digest.SHA256)
}

// sign attaches a signature by s over payload to subject.
func (i *image) sign(s *notarytest.Signer, subject, payload ocispec.Descriptor, o notarytest.SignOptions) {
	i.signed = append(i.signed, signature{subject, notarytest.Manifest(notarytest.MustSign(s, payload, o), notary.MediaTypeJWS, subject, notarytest.ArtifactType)})
}

// attach attaches an artifact of one layer to subject.
func (i *image) attach(subject ocispec.Descriptor, artifactType, content string) {
	blob := func(mediaType, s string) notarytest.Blob {
		return notarytest.Blob{Descriptor: ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromString(s), Size: int64(len(s))}, Content: []byte(s)}
	}
	config, layer := blob(ocispec.MediaTypeEmptyJSON, "{}"), blob(artifactType, content)
	manifest := blob(ocispec.MediaTypeImageManifest, string(encode(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: artifactType,
		Config: config.Descriptor, Layers: []ocispec.Descriptor{layer.Descriptor}, Subject: &subject,
	})))
	manifest.Descriptor.ArtifactType = artifactType
	i.signed = append(i.signed, signature{subject, notarytest.Artifact{Manifest: manifest, Config: config, Envelope: layer}})
}

type fixtures struct {
	root   []byte             // of the CA that configurations trust
	signer *notarytest.Signer // whom they trust
	images map[string]*image
}

// identity is whom the configurations of scripts trust, at the CA acme.
const identity = "x509.subject: C=US, ST=WA, O=acme"

// world is made once. The images are
//
//	signed      signed by a trusted signer
//	unsigned    has no signature
//	foreign     signed by somebody of an unknown authority
//	misnamed    signed by somebody else of the trusted authority
//	swapped     has the signature of another image attached
//	expired     its signature has expired
//	index       for two platforms, the index is signed
//	inner       for two platforms, the manifest of this platform is signed
//	elsewhere   a signed index without a manifest for this platform
//	missized    a signed index that is wrong about the size of its manifest
//	unlabelled  a signed index that does not say the platforms of its manifests
//	twofold     signed, and both a manifest and an index
//	long        signed, with a sha512 digest
//	attested    signed, and with an SBOM
//	lied        signed; in front is a signature manifest that lies about its size
var world = sync.OnceValue(func() fixtures {
	acme, stranger := notarytest.NewCA(notarytest.CAOptions{}), notarytest.NewCA(notarytest.CAOptions{})
	ours, theirs := acme.Leaf(notarytest.CertOptions{}), stranger.Leaf(notarytest.CertOptions{})
	other := notarytest.Name("intern")
	other.Organization = []string{"acme interns"}
	intern := acme.Leaf(notarytest.CertOptions{Subject: other})

	w := fixtures{root: acme.PEM(), signer: ours, images: map[string]*image{}}
	single := func(name string) (*image, ocispec.Descriptor) {
		i := &image{}
		i.target = i.manifest(name, digest.SHA256)
		w.images[name] = i
		return i, i.target
	}
	plain := notarytest.SignOptions{}
	signed, t := single("signed")
	signed.sign(ours, t, t, plain)
	single("unsigned")
	foreign, t := single("foreign")
	foreign.sign(theirs, t, t, plain)
	misnamed, t := single("misnamed")
	misnamed.sign(intern, t, t, plain)
	swapped, t := single("swapped")
	swapped.sign(ours, t, signed.target, plain)
	expired, t := single("expired")
	expired.sign(ours, t, t, notarytest.SignOptions{Expiry: notarytest.SigningTime.Add(time.Hour)})
	lied, t := single("lied")
	lie := t
	lie.Size++
	lied.sign(theirs, lie, lie, plain)
	lied.sign(ours, t, t, plain)

	attested, t := single("attested")
	attested.sign(ours, t, t, plain)
	attested.attach(t, "application/spdx+json", `{"spdxVersion":"SPDX-2.3"}`)

	here := &ocispec.Platform{OS: runtime.GOOS, Architecture: runtime.GOARCH}
	there := &ocispec.Platform{OS: "plan9", Architecture: "mips"}
	multi := func(name string, platforms ...*ocispec.Platform) *image {
		i := &image{}
		var list []ocispec.Descriptor
		for k, p := range platforms {
			m := i.manifest(fmt.Sprint(name, k), digest.SHA256)
			m.Platform = p
			list = append(list, m)
		}
		i.target = i.index(list...)
		w.images[name] = i
		return i
	}
	index := multi("index", here, there)
	index.sign(ours, index.target, index.target, plain)
	inner := multi("inner", here, there)
	inner.sign(ours, inner.inner[0], inner.inner[0], plain)
	elsewhere := multi("elsewhere", there)
	elsewhere.sign(ours, elsewhere.target, elsewhere.target, plain)
	missized := &image{}
	wrong := missized.manifest("missized", digest.SHA256)
	wrong.Size, wrong.Platform = wrong.Size+1, here
	missized.target = missized.index(wrong)
	missized.sign(ours, missized.target, missized.target, plain)
	w.images["missized"] = missized
	unlabelled := multi("unlabelled", nil)
	unlabelled.sign(ours, unlabelled.target, unlabelled.target, plain)
	multi("unlabelledUnsigned", nil)

	built := &image{} // with BuildKit
	mine, said := built.manifest("built", digest.SHA256), built.manifest("provenance", digest.SHA256)
	mine.Platform, said.Platform = here, &ocispec.Platform{OS: "unknown", Architecture: "unknown"}
	said.Annotations = map[string]string{"vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": mine.Digest.String()}
	built.target = built.index(mine, said)
	built.sign(ours, built.target, built.target, plain)
	w.images["built"] = built

	twofold := &image{}
	m := twofold.manifest("twofold", digest.SHA256)
	twofold.target = twofold.put(ocispec.MediaTypeImageManifest, encode(map[string]any{
		"schemaVersion": 2, "mediaType": ocispec.MediaTypeImageManifest, "config": m, "layers": []any{}, "manifests": []any{m},
	}), digest.SHA256)
	twofold.sign(ours, twofold.target, twofold.target, plain)
	w.images["twofold"] = twofold

	long := &image{}
	long.target = long.manifest("long", digest.SHA512)
	long.sign(ours, long.target, long.target, plain)
	w.images["long"] = long
	return w
})

// fixture is the command that makes what scripts work on:
//
//	fixture config DIR [mode=audit] [wall=300ms] [level=skip] [scope=host/path] [mirror=HOST=URL] [layout=DIR]
//	fixture layout DIR IMAGE... [without=images|signatures|manifests]
//	fixture tar FILE DIR
//	fixture break DIR DIGEST other|pipe|link|huge
//	fixture mirror VAR IMAGE... [without=...] [as=team/app] [does=tags|notags|refuses|hangs|floods|drips|redirects]
//
// A layout or mirror holds the images as team/app, a mirror under their names as tags
// too. A mirror stores its URL in
// VAR, and ends with the script; what it was asked, "fixture requests VAR FILE"
// writes down; "fixture started VAR" waits until it was asked. A configuration trusts signatures of identity for every image.
func fixture(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: fixture config|layout|tar|mirror|requests NAME ...")
	}
	option := map[string]string{}
	var names []string
	for _, a := range args[2:] {
		if k, v, found := strings.Cut(a, "="); found {
			option[k] = v
		} else {
			names = append(names, a)
		}
	}
	switch args[0] {
	case "config":
		fixtureConfig(ts, ts.MkAbs(args[1]), option)
	case "layout":
		c, err := content(names, option["without"])
		ts.Check(err)
		ts.Check(writeLayout(ts.MkAbs(args[1]), c))
	case "tar":
		f, err := os.Create(ts.MkAbs(args[1]))
		ts.Check(err)
		w := tar.NewWriter(f)
		ts.Check(w.AddFS(os.DirFS(ts.MkAbs(names[0]))))
		ts.Check(w.Close())
		ts.Check(f.Close())
	case "mirror":
		c, err := content(names, option["without"])
		ts.Check(err)
		fixtureMirror(ts, args[1], c, option)
	case "requests":
		g := registries.of(ts.Getenv(args[1]))
		ts.Check(os.WriteFile(ts.MkAbs(names[0]), []byte(strings.Join(g.Requests(), "\n")), 0o644))
	case "break":
		breakBlob(ts, ts.MkAbs(args[1]), digest.Digest(names[0]), names[1])
	case "started":
		for g := registries.of(ts.Getenv(args[1])); len(g.Requests()) == 0; {
			time.Sleep(10 * time.Millisecond)
		}
	default:
		ts.Fatalf("no fixture %s", args[0])
	}
}

// content is the images as a source holds them, without the images themselves,
// without their signatures, or without the manifests below an index.
func content(names []string, without string) (c sourcetest.Content, err error) {
	c.Blobs = map[digest.Digest][]byte{}
	for _, name := range names {
		img := world().images[name]
		if img == nil {
			return c, fmt.Errorf("no image %s", name)
		}
		if without != "images" {
			c.Images = append(c.Images, img.target)
			c.List(img.target)
			for d, raw := range img.content {
				inner := slices.ContainsFunc(img.inner, func(m ocispec.Descriptor) bool { return m.Digest == d })
				if !inner || without != "manifests" {
					c.Blobs[d] = raw
				}
			}
		}
		if without != "signatures" {
			for _, s := range img.signed {
				c.List(s.subject, s.Manifest.Descriptor)
				for _, b := range []notarytest.Blob{s.Manifest, s.Config, s.Envelope} {
					c.Blobs[b.Descriptor.Digest] = b.Content
				}
			}
		}
	}
	return c, nil
}

func fixtureConfig(ts *testscript.TestScript, dir string, option map[string]string) {
	s := notarytest.Statement("prod", identity)
	if scope := option["scope"]; scope != "" {
		s.Scopes = []string{scope}
	}
	if level := option["level"]; level != "" {
		s.Level = level
	}
	if s.Level == "skip" {
		s.TrustStores, s.TrustedIdentities = nil, nil
		s.Scopes = []string{"registry.test/team/app"}
	}
	ts.Check(notarytest.WriteConfig(dir, notarytest.Stores{"ca/acme/root.crt": world().root}, s))
	mode, wall := "enforce", "10s"
	if m := option["mode"]; m != "" {
		mode = m
	}
	if w := option["wall"]; w != "" {
		wall = w
	}
	y := fmt.Sprintf("version: 1\nmode: %s\nlimits:\n  wall: %s\n", mode, wall)
	if option["mirror"] != "" || option["layout"] != "" {
		y += "sources:\n"
	}
	if m := option["mirror"]; m != "" {
		host, url, _ := strings.Cut(m, "=")
		y += fmt.Sprintf("  mirrors:\n    - host: %q\n      url: %s\n", host, url)
	}
	if l := option["layout"]; l != "" {
		y += fmt.Sprintf("  layouts:\n    - %s\n", ts.MkAbs(l))
	}
	ts.Check(os.WriteFile(filepath.Join(dir, "config.yaml"), []byte(y), 0o644))
}

// writeLayout is sourcetest.Layout for a script.
func writeLayout(dir string, c sourcetest.Content) error {
	entries := append([]ocispec.Descriptor{}, c.Images...)
	for _, list := range c.Referrers {
		entries = append(entries, list...)
	}
	files := map[string][]byte{
		ocispec.ImageIndexFile:  encode(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: entries}),
		ocispec.ImageLayoutFile: []byte(`{"imageLayoutVersion":"1.0.0"}`),
	}
	for d, raw := range c.Blobs {
		files[filepath.Join("blobs", d.Algorithm().String(), d.Encoded())] = raw
	}
	for name, raw := range files {
		name = filepath.Join(dir, name)
		if err := os.RemoveAll(name); err != nil {
			return err
		}
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(name, raw, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// breakBlob puts something else where the layout in dir has the blob d.
func breakBlob(ts *testscript.TestScript, dir string, d digest.Digest, how string) {
	blob := filepath.Join(dir, "blobs", d.Algorithm().String(), d.Encoded())
	raw, err := os.ReadFile(blob)
	ts.Check(err)
	ts.Check(os.Remove(blob))
	switch how {
	case "other":
		ts.Check(os.WriteFile(blob, append([]byte(" "), raw[:len(raw)-1]...), 0o644))
	case "pipe":
		ts.Check(syscall.Mkfifo(blob, 0o644))
	case "link":
		outside := filepath.Join(filepath.Dir(dir), "outside")
		ts.Check(os.WriteFile(outside, raw, 0o644))
		ts.Check(os.Symlink(outside, blob))
	case "huge":
		ts.Check(os.WriteFile(blob, nil, 0o644))
		ts.Check(os.Truncate(blob, 1<<40))
	default:
		ts.Fatalf("nobody knows how to break with %s", how)
	}
}

// registries are the mirrors of all scripts, by URL.
var registries registryList

type registryList struct {
	mu  sync.Mutex
	all map[string]*sourcetest.Registry
}

func (l *registryList) add(url string, g *sourcetest.Registry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.all == nil {
		l.all = map[string]*sourcetest.Registry{}
	}
	l.all[url] = g
}

func (l *registryList) of(url string) *sourcetest.Registry {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all[url]
}

// fixtureRedirects serves g with https and its blobs at another port, as public
// registries do, the host and port of which is in VAR_cdn. GitHub's has no Referrers
// API either, and leads who asks for it to its web pages.
func fixtureRedirects(ts *testscript.TestScript, variable string, g *sourcetest.Registry) {
	cdn := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Write(g.Content.Blobs[digest.Digest("sha256:"+path.Base(r.URL.Path))])
	}))
	ts.Defer(cdn.Close)
	g.Intercept = func(w http.ResponseWriter, r *http.Request) bool {
		switch {
		case strings.Contains(r.URL.Path, "/blobs/"):
			_, hex, _ := strings.Cut(path.Base(r.URL.Path), ":")
			http.Redirect(w, r, cdn.URL+"/secret-path/"+hex+"?sig=s3cret", http.StatusTemporaryRedirect)
		case strings.Contains(r.URL.Path, "/referrers/"):
			http.Redirect(w, r, "https://web.test/-/v2/packages?sig=s3cret", http.StatusSeeOther)
		default:
			return false
		}
		return true
	}
	srv := httptest.NewTLSServer(g)
	ts.Defer(srv.Close)
	file := ts.MkAbs("ca.crt") // of both
	ts.Check(os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o644))
	ts.Setenv("SSL_CERT_FILE", file)
	ts.Setenv(variable, srv.URL)
	ts.Setenv(variable+"_cdn", strings.TrimPrefix(cdn.URL, "https://"))
}

func fixtureMirror(ts *testscript.TestScript, variable string, c sourcetest.Content, option map[string]string) {
	g := &sourcetest.Registry{Content: c, Repository: sourcetest.Name.Path, Tags: map[string]digest.Digest{}}
	for name, img := range world().images {
		if _, held := c.Blobs[img.target.Digest]; held {
			g.Tags[name] = img.target.Digest
		}
	}
	if as := option["as"]; as != "" {
		g.Repository = as
	}
	g.Tags = map[string]digest.Digest{}
	for name, img := range world().images {
		g.Tags[name] = img.target.Digest
	}
	end := make(chan struct{}) // closed when the script ends
	wait := func(r *http.Request) {
		select {
		case <-end:
		case <-r.Context().Done():
		}
	}
	switch does := option["does"]; does {
	case "":
	case "tags":
		g.NoAPI = true
	case "notags":
		g.NoAPI, g.NoTags = true, true
	case "refuses":
		g.Intercept = func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("WWW-Authenticate", `Bearer realm="https://auth.test/token?secret=hunter2"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
	case "redirects":
		fixtureRedirects(ts, variable, g)
		return
	case "hangs":
		g.Intercept = func(_ http.ResponseWriter, r *http.Request) bool {
			wait(r)
			return true
		}
	case "floods":
		g.Intercept = func(w http.ResponseWriter, r *http.Request) bool {
			for r.Context().Err() == nil {
				if _, err := w.Write(make([]byte, 1<<16)); err != nil {
					break
				}
			}
			return true
		}
	case "drips":
		g.Intercept = func(w http.ResponseWriter, r *http.Request) bool {
			for r.Context().Err() == nil {
				w.Write([]byte(" "))
				w.(http.Flusher).Flush()
				select {
				case <-time.After(20 * time.Millisecond):
				case <-end:
					return true
				}
			}
			return true
		}
	default:
		ts.Fatalf("a mirror does not know how to %s", does)
	}
	srv := httptest.NewServer(g)
	ts.Defer(srv.Close)
	ts.Defer(func() { close(end) })
	registries.add(srv.URL, g)
	ts.Setenv(variable, srv.URL)
}
