package containerd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/oci"
)

// reasonOf is the reason of a fault, "" of nil, and else the error's text.
func reasonOf(err error) verify.Reason {
	var f *verify.Fault
	switch {
	case err == nil:
		return ""
	case errors.As(err, &f):
		return f.Reason
	}
	return verify.Reason(err.Error())
}

// TestUnambiguous: containerd checks some of this itself. Here it holds whatever
// containerd's code does.
func TestUnambiguous(t *testing.T) {
	const manifest, index = ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex
	for _, tt := range []struct {
		raw, mediaType, says string // says "": unambiguous
	}{
		{`{"config":{},"layers":[]}`, manifest, ""},
		{`{"config":{}}`, manifest, ""},
		{`{"layers":[]}`, manifest, ""},
		{`{"layers":[]}`, images.MediaTypeDockerSchema2Manifest, ""},
		{`{"manifests":[]}`, index, ""},
		{`{"manifests":[]}`, images.MediaTypeDockerSchema2ManifestList, ""},
		{`{"manifests":[],"mediaType":"` + index + `"}`, index, ""},
		{`{"layers":[],"mediaType":"` + manifest + `"} ` + "\n", manifest, ""},

		{`{"fsLayers":[],"layers":[]}`, manifest, "schema 1"},
		{``, manifest, "not JSON"},
		{`x`, manifest, "not JSON"},
		{`{"layers":[],"mediaType":7}`, manifest, "mediaType is no string"},
		{`[]`, index, "no object"},
		{`{"layers":[]} {"manifests":[]}`, manifest, "not JSON"},
		{`{"layers":[]} x`, manifest, "not JSON"},
		{`{"layers":[],"mediaType":"` + index + `"}`, manifest, "says it is"},
		{`{"layers":[],"mediaType":"` + images.MediaTypeDockerSchema2Manifest + `"}`, manifest, "says it is"},
		{`{"manifests":[],"layers":[]}`, index, "at once"},
		{`{"manifests":[],"config":{}}`, index, "at once"},
		{`{"manifests":[],"fsLayers":[]}`, index, "at once"},
		{`{"manifests":[],"config":{},"layers":[]}`, manifest, "at once"},
		{`{"MANIFESTS":[],"layers":[]}`, manifest, `called "MANIFESTS"`}, // decoders that fold case
		{`{"manifests":null,"layers":[]}`, manifest, "at once"},
		{`{"layers":[]}`, index, "lists no manifests"},
		{`{}`, index, "lists no manifests"},
		{`{"manifests":[]}`, manifest, "neither config nor layers"},
		{`{}`, manifest, "neither config nor layers"},
		{`null`, manifest, "null"},
	} {
		_, err := (&provider{}).document([]byte(tt.raw), tt.mediaType)
		if (err == nil) != (tt.says == "") || err != nil && !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s as %s: %v, want %q", tt.raw, tt.mediaType, err, tt.says)
		}
	}
}

// TestChecked: bytes are what their descriptor says, or a fault.
func TestChecked(t *testing.T) {
	raw := []byte("some bytes")
	d := ocispec.Descriptor{Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	with := func(change func(*ocispec.Descriptor)) ocispec.Descriptor { c := d; change(&c); return c }
	for _, tt := range []struct {
		d    ocispec.Descriptor
		want verify.Reason
	}{
		{d, ""},
		{with(func(d *ocispec.Descriptor) { d.Digest = digest.SHA512.FromBytes(raw) }), ""},
		{with(func(d *ocispec.Descriptor) { d.Digest = "" }), verify.ImageAmbiguous},
		{with(func(d *ocispec.Descriptor) { d.Digest = "md5:" + digest.Digest(strings.Repeat("0", 32)) }), verify.ImageAmbiguous},
		{with(func(d *ocispec.Descriptor) { d.Digest = d.Digest[:40] }), verify.ImageAmbiguous},
		{with(func(d *ocispec.Descriptor) { d.Size++ }), verify.ImageMismatch},
		{with(func(d *ocispec.Descriptor) { d.Size-- }), verify.ImageMismatch},
		{with(func(d *ocispec.Descriptor) { d.Digest = digest.FromString("some bytez") }), verify.ImageMismatch},
	} {
		got, err := checked(raw, tt.d)
		if reasonOf(err) != tt.want || (got != nil) != (tt.want == "") {
			t.Errorf("%s of %d bytes: %v, want %s", tt.d.Digest, tt.d.Size, err, tt.want)
		}
	}
}

// TestRootFS: an image has layers, each with a digest.
func TestRootFS(t *testing.T) {
	a, b := digest.FromString("a"), digest.FromString("b")
	for raw, want := range map[string]verify.Reason{
		fmt.Sprintf(`{"rootfs":{"type":"layers","diff_ids":[%q,%q]}}`, a, b):  "",
		fmt.Sprintf(`{"rootfs":{"type":"layers","diff_ids":[%q]},"os":7}`, a): verify.NotAnImage, // decoded, and an error all the same
		fmt.Sprintf(`{"rootfs":{"type":"other","diff_ids":[%q]}}`, a):         verify.NotAnImage,
		fmt.Sprintf(`{"rootfs":{"diff_ids":[%q]}}`, a):                        verify.NotAnImage,
		fmt.Sprintf(`{"rootfs":{"type":"layers","diff_ids":[%q,"x"]}}`, a):    verify.NotAnImage,
		`{"rootfs":{"type":"layers","diff_ids":[""]}}`:                        verify.NotAnImage,
		`{"rootfs":{"type":"layers","diff_ids":[]}}`:                          verify.NotAnImage,
		`{}`:  verify.NotAnImage,
		``:    verify.NotAnImage,
		`[1]`: verify.NotAnImage,
		`{"rootfs":{"type":"layers","diff_ids":["` + a.String() + `"]},"x":[0` + strings.Repeat(",0", 1<<16+1) + `]}`: "", // takes no memory
		`{"rootfs":{"type":"layers","diff_ids":[""` + strings.Repeat(`,""`, oci.MaxList) + `]}}`:                      verify.ImageAmbiguous,
	} {
		list, err := rootfs([]byte(raw))
		if reasonOf(err) != want || (len(list) > 0) != (want == "") {
			t.Errorf("%.60s: %v, %v; want %s", raw, list, err, want)
		}
	}
	if list, _ := rootfs([]byte(fmt.Sprintf(`{"rootfs":{"type":"layers","diff_ids":[%q,%q]}}`, a, b))); len(list) != 2 || list[0] != a || list[1] != b {
		t.Errorf("diff IDs %v", list)
	}
}

// TestProvider: what one selection reads is bounded in number and in bytes, each
// document is looked at, and a manifest is what was read last.
func TestProvider(t *testing.T) {
	body := func(n int) []byte {
		return []byte(`{"layers":[],"a":"` + strings.Repeat("x", n-len(`{"layers":[],"a":""}`)) + `"}`)
	}
	desc := func(mediaType string, raw []byte, size int64) ocispec.Descriptor {
		return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: size}
	}
	const manifest = ocispec.MediaTypeImageManifest
	read := func(raw []byte) *provider {
		return &provider{read: func(context.Context, ocispec.Descriptor) ([]byte, error) { return raw, nil }}
	}
	whole := body(MaxBlob)
	p := read(whole)
	if _, err := p.get(t.Context(), desc(manifest, whole, MaxBlob)); err != nil {
		t.Errorf("as much as may be read: %v", err)
	}
	if _, err := p.get(t.Context(), desc(manifest, whole, 1)); reasonOf(err) != verify.ImageAmbiguous || !strings.Contains(err.Error(), "together") {
		t.Errorf("a byte more: %v", err)
	}
	small := body(100)
	for _, size := range []int64{-1, -1 << 62, MaxBlob + 1, 1 << 62} {
		if _, err := read(small).get(t.Context(), desc(manifest, small, size)); reasonOf(err) != verify.ImageAmbiguous {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
	p = read(small)
	for n := range maxBlobs {
		if _, err := p.get(t.Context(), desc(manifest, small, 100)); err != nil {
			t.Fatalf("blob %d: %v", n+1, err)
		}
	}
	if _, err := p.get(t.Context(), desc(manifest, small, 100)); reasonOf(err) != verify.ImageAmbiguous || !strings.Contains(err.Error(), "too many others") {
		t.Errorf("one blob more: %v", err)
	}
	if p.last.Digest != digest.FromBytes(small) {
		t.Errorf("the last manifest is %+v", p.last)
	}
	// Documents that are two things, and those that are neither and not looked at.
	both := []byte(`{"layers":[],"manifests":[]}`)
	for mediaType, want := range map[string]verify.Reason{
		manifest: verify.ImageAmbiguous, images.MediaTypeDockerSchema2Manifest: verify.ImageAmbiguous,
		ocispec.MediaTypeImageIndex: verify.ImageAmbiguous, images.MediaTypeDockerSchema2ManifestList: verify.ImageAmbiguous,
		ocispec.MediaTypeImageConfig: "",
	} {
		p := read(both)
		if _, err := p.get(t.Context(), desc(mediaType, both, int64(len(both)))); reasonOf(err) != want {
			t.Errorf("%s: %v, want %s", mediaType, err, want)
		}
		if p.last.Digest != "" {
			t.Errorf("%s counts as the manifest", mediaType)
		}
	}
	many := []byte(`{"layers":[{}` + strings.Repeat(",{}", oci.MaxList) + `]}`)
	if _, err := read(many).get(t.Context(), desc(manifest, many, int64(len(many)))); reasonOf(err) != verify.ImageAmbiguous {
		t.Errorf("many layers: %v", err)
	}
	p = read([]byte(`{"manifests":[{}` + strings.Repeat(",{}", oci.MaxList-1) + `]}`))
	for n, want := range []verify.Reason{"", "", verify.ImageAmbiguous} {
		if _, err := p.get(t.Context(), desc(ocispec.MediaTypeImageIndex, small, 100)); reasonOf(err) != want {
			t.Errorf("entries of %d indexes together: %v", n+1, err)
		}
	}
}

// TestSelectKeepsTheClass: what the content is to blame for is a fault, and what
// could not be read is none, since it may be read a moment later.
func TestSelectKeepsTheClass(t *testing.T) {
	rec := newRecords()
	i, o := rec.image("good", "a"), rec.image("other", "b")
	foreign := rec.index(on(o.manifest, elsewhere))
	notImage := rec.put(ocispec.MediaTypeImageManifest, ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest,
		Config: rec.put("application/vnd.example", map[string]any{}), Layers: []ocispec.Descriptor{}})
	broken := func(err error) Reader {
		return func(context.Context, ocispec.Descriptor) ([]byte, error) { return nil, err }
	}
	fault := &verify.Fault{Reason: verify.ImageMismatch, Detail: "other bytes"}
	for label, tt := range map[string]struct {
		read   Reader
		target ocispec.Descriptor
		want   verify.Reason
	}{
		"a manifest":           {rec.Blob, i.manifest, ""},
		"no answer":            {broken(errors.New("no answer")), i.manifest, "no answer"},
		"not there":            {broken(ErrNotFound), i.manifest, verify.Reason(ErrNotFound.Error())},
		"not there, of index":  {broken(ErrNotFound), foreign, verify.Reason(ErrNotFound.Error())},
		"other bytes":          {broken(fault), i.manifest, verify.ImageMismatch},
		"no such platform":     {rec.Blob, foreign, verify.ImageUnresolved},
		"neither":              {rec.Blob, ocispec.Descriptor{MediaType: "text/plain", Digest: i.manifest.Digest, Size: i.manifest.Size}, verify.ImageAmbiguous},
		"a config of no image": {rec.Blob, notImage, verify.NotAnImage},
	} {
		d, _, err := Select(t.Context(), tt.read, tt.target)
		if reasonOf(err) != tt.want || (d.Digest != "") != (tt.want == "") {
			t.Errorf("%s: %s, %v; want %s", label, d.Digest, err, tt.want)
		}
	}
}

// TestEmbeddedManifest: containerd takes a manifest that an index brings in itself
// without reading it. Here it is read by its digest as any other, and never paired with
// another that was read meanwhile.
func TestEmbeddedManifest(t *testing.T) {
	rec := newRecords()
	good, evil := rec.image("good", "a"), rec.image("evil", "b")
	embedded := evil.manifest
	embedded.Data = rec.blobs[evil.manifest.Digest]
	for label, target := range map[string]ocispec.Descriptor{
		"alone":                      rec.index(on(embedded, here)),
		"before one that is read":    rec.index(on(embedded, here), good.manifest),
		"after one that is read":     rec.index(good.manifest, on(embedded, here)),
		"around one that is read":    rec.index(on(embedded, here), good.manifest, on(embedded, here)),
		"in an index, and one after": rec.index(rec.index(on(embedded, here)), good.manifest),
		"of no platform":             rec.index(embedded, good.manifest),
	} {
		d, m, err := Select(t.Context(), rec.Blob, target)
		pair := d.Digest == good.manifest.Digest && m.Config.Digest == good.config.Digest || d.Digest == evil.manifest.Digest && m.Config.Digest == evil.config.Digest
		if err == nil && !pair {
			t.Errorf("%s: selected %s with the config %s", label, d.Digest, m.Config.Digest)
		}
		if err != nil && reasonOf(err) != verify.ImageAmbiguous {
			t.Errorf("%s: %v", label, err)
		}
	}
}

func FuzzSelect(f *testing.F) {
	seed := newRecords()
	i := seed.image("good", "a")
	f.Add(seed.blobs[i.manifest.Digest], true)
	x := seed.index(on(i.manifest, here))
	f.Add(seed.blobs[x.Digest], false)
	f.Add([]byte(`{"manifests":[],"layers":[]}`), false)
	f.Add([]byte("null"), true)
	f.Fuzz(func(t *testing.T, raw []byte, manifest bool) {
		rec := newRecords()
		i := rec.image("good", "a")
		mediaType := ocispec.MediaTypeImageIndex
		if manifest {
			mediaType = ocispec.MediaTypeImageManifest
		}
		target := rec.put(mediaType, raw)
		d, m, err := Select(context.Background(), rec.Blob, target)
		if err != nil {
			return
		}
		// Whatever was selected is a manifest that is really there, and is not an
		// index too.
		var doc map[string]json.RawMessage
		if json.Unmarshal(rec.blobs[d.Digest], &doc) != nil || d.Digest != target.Digest && d.Digest != i.manifest.Digest {
			t.Fatalf("selected %s of %s", d.Digest, raw)
		}
		if _, ok := doc["manifests"]; ok && string(doc["manifests"]) != "null" {
			t.Fatalf("selected an index: %s", raw)
		}
		if err := m.Config.Digest.Validate(); err == nil {
			_, _ = rootfs(rec.blobs[m.Config.Digest])
		}
	})
}
