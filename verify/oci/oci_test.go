package oci

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"runtime"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const d1 = "sha256:1111111111111111111111111111111111111111111111111111111111111111"

// entry is a sound descriptor with more members.
func entry(more string) string {
	return `{"mediaType":"` + ocispec.MediaTypeImageManifest + `","digest":"` + d1 + `","size":7` + more + `}`
}

func TestRead(t *testing.T) {
	long := strings.Repeat("x", maxWord)
	for _, tt := range []struct {
		name, raw string
		says      string // part of the error; empty: none
		limit     bool   // the error wraps ErrLimit
	}{
		{name: "index", raw: `{"manifests":[` + entry("") + `]}`},
		{name: "manifest", raw: ` {"config":` + entry("") + `,"layers":[` + entry("") + `, ` + entry("") + "]}\n"},
		{name: "empty lists", raw: `{"manifests":[],"layers":null}`},
		{name: "an unknown member twice", raw: `{"x":1,"x":2,"layers":[]}`},
		{name: "long annotations", raw: `{"manifests":[` + entry(`,"annotations":{"a":"`+strings.Repeat(",", 1<<20)+`"}`) + `]}`},
		{name: "a deep member that nobody asks for", raw: `{"layers":[],"x":` + strings.Repeat("[", 9000) + strings.Repeat("]", 9000) + `}`},
		{name: "brackets in strings", raw: `{"x":"]}\"]}\\","layers":[]}`},

		{name: "nothing", raw: ``, says: "not JSON"},
		{name: "two documents", raw: `{} {}`, says: "not JSON"},
		{name: "cut", raw: `{"layers":[`, says: "not JSON"},
		{name: "deep", raw: strings.Repeat("[", 200_000), says: "not JSON"},
		{name: "null", raw: ` null`, says: "null"},
		{name: "list", raw: `[]`, says: "no object"},
		{name: "twice", raw: `{"manifests":[],"manifests":[]}`, says: "manifests is there twice"},
		{name: "twice, escaped", raw: `{"manifests":[],"\u006danifests":[]}`, says: "manifests is there twice"},
		{name: "letter case", raw: `{"Manifests":[]}`, says: `called "Manifests"`},
		{name: "letter case of another alphabet", raw: "{\"layer\u017f\":[]}", says: "not layers"},
		{name: "digest twice", raw: `{"manifests":[` + entry(`,"digest":"`+d1+`"`) + `]}`, says: "digest is there twice"},
		{name: "platform twice", raw: `{"manifests":[` + entry(`,"platform":{"os":"a","os":"b"}`) + `]}`, says: "os is there twice"},
		{name: "manifests is no list", raw: `{"manifests":{}}`, says: "no list"},
		{name: "layer is no object", raw: `{"layers":[7]}`, says: "no object"},
		{name: "size", raw: `{"layers":[{"size":1.5}]}`, says: "size"},
		{name: "huge size", raw: `{"layers":[{"size":99999999999999999999}]}`, says: "size"},
		{name: "digest is no string", raw: `{"layers":[{"digest":7}]}`, says: "digest is no string"},
		{name: "annotations", raw: `{"layers":[],"annotations":7}`, says: "annotations"},
		{name: "a value of annotations", raw: `{"layers":[],"annotations":{"a":7}}`, says: "annotations"},
		{name: "long type", raw: `{"layers":[{"mediaType":"` + long + `"}]}`, says: "limit 257", limit: true},
		{name: "many features", raw: `{"manifests":[{"platform":{"os.features":[` + strings.Repeat(`"",`, maxFeatures) + `""]}}]}`, says: "features", limit: true},
		{name: "many layers", raw: `{"layers":[` + strings.Repeat("{},", MaxList) + `{}]}`, says: "2049 layers", limit: true},
		{name: "many manifests", raw: `{"manifests":[` + strings.Repeat("{},", MaxList) + `{}]}`, says: "2049 manifests", limit: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d, err := Read([]byte(tt.raw))
			if (err == nil) != (tt.says == "") || err != nil && !strings.Contains(err.Error(), tt.says) || errors.Is(err, ErrLimit) != tt.limit {
				t.Errorf("error %v, want one about %q, a limit: %v", err, tt.says, tt.limit)
			}
			if err != nil && !reflect.DeepEqual(d, Document{}) {
				t.Errorf("a document comes with an error: %+v", d)
			}
		})
	}
}

// TestEach: a bad entry costs itself alone.
func TestEach(t *testing.T) {
	const want = "org.example.want"
	bad := []string{
		`7`, `[]`, `{"size":""}`, `{"digest":"` + d1 + `","digest":"` + d1 + `"}`, `{"Digest":"` + d1 + `"}`,
		entry(`,"annotations":[]`), entry(`,"artifactType":"` + strings.Repeat("x", 1<<20) + `"`),
	}
	good := []string{
		entry(""), entry(`,"annotations":{"a":"` + strings.Repeat(",{", 1<<19) + `","` + want + `":"kept"}`),
		entry(`,"data":"` + strings.Repeat("A", 1<<20) + `"`), entry(`,"annotations":{"` + want + `":"` + strings.Repeat("x", maxValue) + `"}`),
	}
	raw := []byte(`{"manifests":[` + strings.Join(append(append(good[:2:2], bad...), good[2:]...), ",") + `]}`)
	var kept, passed int
	err := Each(raw, []string{want}, func(e Entry) bool {
		if e.Err != nil {
			if passed++; !strings.Contains(e.Err.Error(), fmt.Sprintf("entry %d of the list is passed over", kept+passed)) {
				t.Errorf("it is not named: %v", e.Err)
			}
			return true
		}
		kept++
		if e.Digest != d1 || e.Size != 7 || e.Data != nil || len(e.Annotations) != map[int]int{2: 1}[kept] {
			t.Errorf("entry %d: %+v", kept, e)
		}
		return true
	})
	if err != nil || kept != len(good) || passed != len(bad) {
		t.Errorf("%d kept, %d passed over, error %v", kept, passed, err)
	}
	n := 0
	if err := Each(raw, nil, func(Entry) bool { n++; return false }); n != 1 || err != nil {
		t.Errorf("it went on to entry %d, error %v", n, err)
	}
	n = 0
	many := []byte(`{"manifests":[` + strings.Repeat("{},", MaxEntries) + `{}]}`)
	if err := Each(many, nil, func(Entry) bool { n++; return true }); n != MaxEntries || !errors.Is(err, ErrLimit) {
		t.Errorf("of too many entries %d were handed over, error %v", n, err)
	}
	for _, raw := range []string{``, `7`, `{"manifests":7}`, `{"manifests":[]`, `{"manifests":[],"manifests":[]}`} {
		if err := Each([]byte(raw), nil, func(Entry) bool { return true }); err == nil {
			t.Errorf("%s is a list", raw)
		}
	}
}

// TestNothingIsTaken: memory follows what is asked for, not the document.
func TestNothingIsTaken(t *testing.T) {
	const size = 4 << 20
	fill := func(head, one, tail string) []byte {
		return []byte(head + strings.Repeat(one, (size-len(head)-len(tail))/len(one)) + tail)
	}
	for name, raw := range map[string][]byte{
		"small objects":    fill(`{"manifests":[`+entry("")+`],"x":[`, `{},`, `0]}`),
		"empty entries":    fill(`{"manifests":[`, `{},`, `{}]}`),
		"nested entries":   fill(`{"manifests":[`, `{"platform":{"x":{"y":{}}}},`, `{}]}`),
		"many annotations": fill(`{"manifests":[{"annotations":{`, `"a":"",`, `"b":""}}]}`),
		"many layers":      fill(`{"layers":[`, `{"digest":"x"},`, `{}]}`),
		"features":         fill(`{"manifests":[{"platform":{"os.features":[`, `"",`, `""]}}]}`),
		"long strings":     fill(`{"mediaType":"`, `\u0020`, `"}`),
		"deep":             fill(`{"x":"`, `[`, `"}`),
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, _ = Read(raw)
		_, _ = ReadHead(raw, "a")
		_ = Each(raw, []string{"a"}, func(Entry) bool { return true })
		_, _ = ReadConfig(raw)
		runtime.ReadMemStats(&after)
		t.Logf("%s: %d KiB allocated", name, (after.TotalAlloc-before.TotalAlloc)>>10)
		if n := after.TotalAlloc - before.TotalAlloc; n > 24<<20 { // garbage included; decoding it took ten times that and kept it
			t.Errorf("%s: %d KiB allocated", name, n>>10)
		}
	}
}

func TestReadConfig(t *testing.T) {
	for _, tt := range []struct {
		raw, says string
		ids       int
	}{
		{`{"rootfs":{"type":"layers","diff_ids":["` + d1 + `","x"]}}`, "", 2},
		{`{"rootfs":null}`, "", 0},
		{`{"rootfs":{"diff_ids":[7]}}`, "no string", 0},
		{`{"rootfs":{},"rootfs":{}}`, "twice", 0},
		{`{"rootfs":{"diff_ids":[],"Diff_IDs":[]}}`, "called", 0},
		{`{"os":7}`, "os", 0},
		{`{"rootfs":{"diff_ids":[` + strings.Repeat(`"",`, MaxList) + `""]}}`, "more than 2048 layers", 0},
		{`null`, "null", 0},
	} {
		c, err := ReadConfig([]byte(tt.raw))
		if len(c.RootFS.DiffIDs) != tt.ids || (err == nil) != (tt.says == "") || err != nil && !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%.60s: %d, %v", tt.raw, len(c.RootFS.DiffIDs), err)
		}
	}
}

func add(f *testing.F) {
	for _, s := range []string{
		`{"manifests":[` + entry(`,"platform":{"os":"linux","architecture":"arm","variant":"v7","os.version":"1","os.features":["a"]},"annotations":{"a":"b","a":"c"},"artifactType":"x"`) + `]}`,
		`{"schemaVersion":2,"mediaType":"a","artifactType":"b","config":` + entry("") + `,"subject":` + entry("") + `,"layers":[` + entry("") + `],"annotations":{"a":null}}`,
		`{"layers":[{"digest":"\ud800\u0041","size":-0}],"subject":null,"config":null}`, `{"layer\u0073":[]}`, "{\"x\":\"\xff\"}", `null`, ` [ ] `,
		`{"rootfs":{"type":"layers","diff_ids":["a"]},"os":"linux"}`,
	} {
		f.Add([]byte(s))
	}
}

// FuzzRead: a document that Read takes is what encoding/json makes of it.
func FuzzRead(f *testing.F) {
	add(f)
	f.Fuzz(func(t *testing.T, raw []byte) {
		got, err := Read(raw)
		if err != nil {
			return
		}
		var m ocispec.Manifest
		var i ocispec.Index
		if json.Unmarshal(raw, &m) != nil || json.Unmarshal(raw, &i) != nil {
			return // of members that Read does not look at
		}
		if got.MediaType != m.MediaType || got.ArtifactType != m.ArtifactType || !same(got.Config, m.Config) ||
			(got.Subject == nil) != (m.Subject == nil) || got.Subject != nil && !same(*got.Subject, *m.Subject) ||
			len(got.Layers) != len(m.Layers) || len(got.Manifests) != len(i.Manifests) {
			t.Fatalf("%s\n%+v\n%+v", raw, got, m)
		}
		for k, l := range m.Layers {
			if !same(got.Layers[k], l) {
				t.Errorf("layer %d: %+v, not %+v", k, got.Layers[k], l)
			}
		}
		for k, l := range i.Manifests {
			if !same(got.Manifests[k], l) {
				t.Errorf("manifest %d: %+v, not %+v", k, got.Manifests[k], l)
			}
		}
	})
}

func same(x, y ocispec.Descriptor) bool {
	p, q := x.Platform, y.Platform
	if (p == nil) != (q == nil) || p != nil && (p.OS != q.OS || p.Architecture != q.Architecture || p.Variant != q.Variant || p.OSVersion != q.OSVersion ||
		strings.Join(p.OSFeatures, "\x00") != strings.Join(q.OSFeatures, "\x00")) {
		return false
	}
	return x.MediaType == y.MediaType && x.ArtifactType == y.ArtifactType && x.Digest == y.Digest && x.Size == y.Size
}

// FuzzEach: entries are those of encoding/json, annotations too.
func FuzzEach(f *testing.F) {
	add(f)
	f.Fuzz(func(t *testing.T, raw []byte) {
		var i struct {
			Manifests []json.RawMessage `json:"manifests"`
		}
		decodes := json.Unmarshal(raw, &i) == nil
		n := 0
		err := Each(raw, []string{"a"}, func(e Entry) bool {
			n++
			var d ocispec.Descriptor
			if e.Err != nil || !decodes || json.Unmarshal(i.Manifests[n-1], &d) != nil {
				return true
			}
			if !same(e.Descriptor, d) || e.Annotations["a"] != d.Annotations["a"] && len(d.Annotations["a"]) < maxValue/6 {
				t.Errorf("entry %d is %+v, not %+v", n, e, d)
			}
			return true
		})
		if err == nil && decodes && n != len(i.Manifests) {
			t.Errorf("%d entries, not %d", n, len(i.Manifests))
		}
	})
}

// FuzzReadConfig: a config that is taken is what encoding/json makes of it.
func FuzzReadConfig(f *testing.F) {
	add(f)
	f.Fuzz(func(t *testing.T, raw []byte) {
		got, err := ReadConfig(raw)
		var c ocispec.Image
		if err != nil || json.Unmarshal(raw, &c) != nil {
			return
		}
		if len(got.RootFS.DiffIDs) == 0 {
			got.RootFS.DiffIDs = c.RootFS.DiffIDs[:0] // nil and empty are one
		}
		if !reflect.DeepEqual(got.RootFS, c.RootFS) || !same(ocispec.Descriptor{Platform: &got.Platform}, ocispec.Descriptor{Platform: &c.Platform}) {
			t.Fatalf("%+v, not %+v", got, c)
		}
	})
}
