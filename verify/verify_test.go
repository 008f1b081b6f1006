package verify

import (
	"context"
	"crypto/sha256"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

var start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func now() time.Time { return start }

func of(s string) digest.Digest { return digest.FromString(s) }

func desc(s string) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: of(s), Size: int64(len(s))}
}

// bound is a question as the gate asks it, about an index with a manifest.
func bound() Question {
	index := desc("index")
	index.MediaType = ocispec.MediaTypeImageIndex
	return Question{
		Image: Image{
			Name:   Name{Host: "registry.local", Path: "app", Tag: "1.2"},
			Asked:  "registry.local/app:1.2",
			Target: index, Manifest: desc("manifest"), Config: of("config"),
			Use: UseContainer, Binding: BoundRuntime, Epoch: Epoch{7},
			Pod: Pod{Namespace: "shop", Name: "web-0", UID: "u-1", Container: "web"},
		},
		Rule: &Rule{Name: "prod", Statement: "acme", Requirement: sha256.Sum256([]byte("acme"))},
	}
}

func with(change func(*Question)) Question {
	q := bound()
	change(&q)
	return q
}

// good is a finding that supports an allow of q.
func good(q Question) Finding {
	return Finding{Reason: Verified, Signed: q.Image.Target.Digest, Until: start.Add(time.Hour), Signer: Signer{Subject: "CN=acme"}}
}

// weakened are questions that nothing may be allowed to, each by one step away
// from one that may, with the reason.
var weakened = []struct {
	name   string
	weaken func(*Question)
	want   Reason
}{
	{"zero question", func(q *Question) { *q = Question{} }, ImageUnresolved},
	{"zero image", func(q *Question) { q.Image = Image{} }, ImageUnresolved},
	{"no use", func(q *Question) { q.Image.Use = 0 }, ImageUnresolved},
	{"unknown use", func(q *Question) { q.Image.Use = 9 }, ImageUnresolved},
	{"no binding", func(q *Question) { q.Image.Binding = 0 }, ImageUnresolved},
	{"unknown binding", func(q *Question) { q.Image.Binding = 9 }, ImageUnresolved},
	{"a container bound by a record", func(q *Question) { q.Image.Binding = BoundRecord }, ImageUnresolved},
	{"a volume bound by the runtime", func(q *Question) { q.Image.Use = UseVolume }, ImageUnresolved},
	{"a volume without config", func(q *Question) {
		q.Image.Use, q.Image.Binding, q.Image.Config = UseVolume, BoundSnapshot, ""
	}, ImageUnresolved},
	{"ahead, bound by what somebody asked", func(q *Question) { q.Image.Use, q.Image.Binding = UseAhead, BoundDigest }, ImageUnresolved},
	{"ahead, without config", func(q *Question) {
		q.Image.Use, q.Image.Binding, q.Image.Config = UseAhead, BoundRecord, ""
	}, ImageUnresolved},
	{"a container bound by what somebody asked", func(q *Question) { q.Image.Binding = BoundDigest }, ImageUnresolved},
	{"a question bound by the runtime", func(q *Question) { q.Image.Use = UseQuestion }, ImageUnresolved},
	{"no target", func(q *Question) { q.Image.Target = ocispec.Descriptor{} }, ImageUnresolved},
	{"no manifest", func(q *Question) { q.Image.Manifest = ocispec.Descriptor{} }, ImageUnresolved},
	{"a container without config", func(q *Question) { q.Image.Config = "" }, ImageUnresolved},
	{"fault", func(q *Question) { q.Image.Fault = &Fault{ImageMismatch, "another config"} }, ImageMismatch},
	{"zero fault", func(q *Question) { q.Image.Fault = &Fault{} }, Internal},
	{"fault that claims to allow", func(q *Question) { q.Image.Fault = &Fault{Reason: Verified} }, Internal},
	{"name beyond the bound", func(q *Question) { q.Image.Name.Path = strings.Repeat("a", maxName+1-len(q.Image.Name.Host)) }, ImageUnresolved},
	{"media type beyond the bound", func(q *Question) { q.Image.Manifest.MediaType = strings.Repeat("a", maxPart+1) }, ImageUnresolved},
	{"long name", func(q *Question) { q.Image.Name.Path = strings.Repeat("a", 1000) }, ImageUnresolved},
	{"long media type", func(q *Question) { q.Image.Target.MediaType = strings.Repeat("a", 1000) }, ImageUnresolved},
	{"long digest", func(q *Question) { q.Image.Config = digest.Digest(strings.Repeat("a", 1000)) }, ImageUnresolved},
	{"no rule", func(q *Question) { q.Rule = nil }, PolicyInvalid},
	{"zero rule", func(q *Question) { q.Rule = &Rule{} }, PolicyInvalid},
	{"no statement", func(q *Question) { q.Rule.Statement = "" }, PolicyInvalid},
	{"no requirement", func(q *Question) { q.Rule.Requirement = [32]byte{} }, PolicyInvalid},
	{"settled as well", func(q *Question) { q.Rule.Settled = PolicyInvalid }, PolicyInvalid},
	{"a digest that is not listed", func(q *Question) { q.Rule.Settled, q.Rule.Digest = AllowedByDigest, of("another") }, PolicyInvalid},
	{"no digest listed", func(q *Question) { q.Rule.Settled = AllowedByDigest }, PolicyInvalid},
}

func denied(t *testing.T, d Decision, want Reason) {
	t.Helper()
	if d.Allowed() || d.Reason.String() != want.String() {
		t.Errorf("answer is allowed=%t %v (%s), want a denial %v", d.Allowed(), d.Reason, d.Detail, want)
	}
}

func allowed(t *testing.T, d Decision, want Reason) {
	t.Helper()
	if !d.Allowed() || d.Reason != want {
		t.Errorf("answer is allowed=%t %v (%s), want an allow %v", d.Allowed(), d.Reason, d.Detail, want)
	}
}

// TestZeroValuesDeny: what nobody filled in does not allow.
func TestZeroValuesDeny(t *testing.T) {
	ctx := context.Background()
	denied(t, Decision{}, Internal)
	denied(t, *new(Decision), Internal)
	denied(t, Deny("", ""), Internal)
	denied(t, new(Enforcer).Verify(ctx, bound().Image), PolicyInvalid)
	denied(t, new(Engine).Judge(ctx, bound()), Internal)
	denied(t, new(Engine).Judge(ctx, Question{}), ImageUnresolved)
	denied(t, allow(Question{}, Finding{}, time.Time{}), ImageUnresolved)
	denied(t, allow(bound(), Finding{}, start), Internal)
	denied(t, refuse(nil, nil, start), SourceUnreachable)
	denied(t, audit(Decision{}, 0), Internal)
	var e Enforcer
	e.Swap(&Setup{})
	under := bound().Image
	under.Epoch = Epoch{}
	denied(t, e.Verify(ctx, under), Internal) // a nil Policy panics
	denied(t, e.Verify(ctx, Image{}), ImageUnresolved)
	if (&Budget{}).Page() == nil || (&Budget{}).Referrer() == nil || (&Budget{}).Signature() == nil ||
		(&Budget{}).Manifest(1) == nil || (&Budget{}).Envelope(1) == nil {
		t.Error("the zero Budget allows something")
	}
}

func TestUnfit(t *testing.T) {
	for _, tt := range weakened {
		t.Run(tt.name, func(t *testing.T) {
			f := with(tt.weaken).Unfit()
			if f == nil {
				t.Fatal("the question counts as fit")
			}
			denied(t, Deny(f.Reason, f.Detail), tt.want)
		})
	}
	for _, q := range []Question{
		bound(),
		with(func(q *Question) { q.Image.Binding = BoundSnapshot }),
		with(func(q *Question) { q.Image.Use, q.Image.Binding = UseQuestion, BoundDigest }),
		with(func(q *Question) { q.Image.Use, q.Image.Binding, q.Image.Config = UseQuestion, BoundDigest, "" }),
		with(func(q *Question) { q.Image.Target.Digest = digest.SHA512.FromString("index") }),
		with(func(q *Question) { q.Image.Use, q.Image.Binding = UseVolume, BoundSnapshot }),
		with(func(q *Question) { q.Image.Use = UseAhead }),
		with(func(q *Question) { q.Image.Use, q.Image.Binding = UseAhead, BoundSnapshot }),
		with(func(q *Question) { q.Image.Use, q.Image.Binding = UseAhead, BoundRecord }),
		with(func(q *Question) { q.Image.Name.Path = strings.Repeat("a", maxName-len(q.Image.Name.Host)) }),
		with(func(q *Question) { q.Image.Target.MediaType = strings.Repeat("a", maxPart) }),
	} {
		if f := q.Unfit(); f != nil {
			t.Errorf("%v %v: %v", q.Image.Use, q.Image.Binding, f)
		}
	}
}

// TestKey walks over every field of a question and says whether the key is about
// it. A field added to Image or Rule fails here until somebody has thought.
func TestKey(t *testing.T) {
	base := bound().Key()
	for _, tt := range []struct {
		field  string
		in     bool
		change func(*Question)
	}{
		{"Image.Name", false, func(q *Question) {
			q.Image.Name = Name{Host: "other", Path: "other", Tag: "other", Digest: of("other")}
		}},
		{"Image.Asked", false, func(q *Question) { q.Image.Asked = "other" }},
		{"Image.Names", false, func(q *Question) { q.Image.Names = []Name{{Host: "other"}} }},
		{"Image.Target.MediaType", true, func(q *Question) { q.Image.Target.MediaType = "other" }},
		{"Image.Target.Digest", true, func(q *Question) { q.Image.Target.Digest = of("other") }},
		{"Image.Target.Size", true, func(q *Question) { q.Image.Target.Size++ }},
		{"Image.Manifest", true, func(q *Question) { q.Image.Manifest.Digest = of("other") }},
		{"Image.Config", true, func(q *Question) { q.Image.Config = of("other") }},
		{"Image.Others", false, func(q *Question) { q.Image.Others = []ocispec.Descriptor{desc("other")} }},
		{"Image.Vouched", false, func(q *Question) { q.Image.Vouched = !q.Image.Vouched }},
		{"Image.Use", false, func(q *Question) { q.Image.Use = UseQuestion }},
		{"Image.Binding", false, func(q *Question) { q.Image.Binding = BoundSnapshot }},
		{"Image.Epoch", false, func(q *Question) { q.Image.Epoch = Epoch{9} }},
		{"Image.Pod", false, func(q *Question) { q.Image.Pod = Pod{"a", "b", "c", "d"} }},
		{"Image.Fault", false, func(q *Question) { q.Image.Fault = &Fault{} }},
		{"Rule.Name", false, func(q *Question) { q.Rule.Name = "other" }},
		{"Rule.Settled", false, func(q *Question) { q.Rule.Settled = PolicyInvalid }},
		{"Rule.Digest", false, func(q *Question) { q.Rule.Digest = of("other") }},
		{"Rule.Detail", false, func(q *Question) { q.Rule.Detail = "other" }},
		{"Rule.Statement", false, func(q *Question) { q.Rule.Statement = "other" }},
		{"Rule.Requirement", true, func(q *Question) { q.Rule.Requirement[31]++ }},
	} {
		k := with(tt.change).Key()
		if (k != base) != tt.in {
			t.Errorf("%s: in the key %t, want %t", tt.field, k != base, tt.in)
		}
		if (string(k.bytes()) != string(base.bytes())) != tt.in {
			t.Errorf("%s: in the key's bytes otherwise than in the key", tt.field)
		}
	}
	if n, m := reflect.TypeFor[Image]().NumField(), reflect.TypeFor[Rule]().NumField(); n != 14 || m != 6 { // links follow from Manifest, Config and the store
		t.Errorf("Image has %d fields and Rule %d: extend the table above", n, m)
	}
	if (Question{}).Key() != (Key{}) {
		t.Error("the zero question has a key")
	}
	// Bytes are unambiguous: moving a character from one part to the next shows.
	x, y := Key{Target: Target{MediaType: "ab", Digest: "c"}}, Key{Target: Target{MediaType: "a", Digest: "bc"}}
	if string(x.bytes()) == string(y.bytes()) {
		t.Error("two keys have the same bytes")
	}
}

// TestBare: a copy has the same key and the same answer, and holds nothing of
// the pod's.
func TestBare(t *testing.T) {
	q := bound()
	junk := func(d *ocispec.Descriptor) {
		d.Annotations, d.Data, d.URLs = map[string]string{"a": "b"}, []byte("x"), []string{"u"}
		d.Platform, d.ArtifactType = &ocispec.Platform{OS: "linux"}, "x"
	}
	junk(&q.Image.Target)
	junk(&q.Image.Manifest)
	for i := range MaxOthers + 3 {
		d := desc(fmt.Sprint("other", i))
		junk(&d)
		q.Image.Others = append(q.Image.Others, d)
	}
	b := q.Bare()
	want := bound()
	want.Image.Name.Tag, want.Image.Asked, want.Image.Pod, want.Image.Epoch = "", "", Pod{}, Epoch{}
	for i := range MaxOthers {
		want.Image.Others = append(want.Image.Others, desc(fmt.Sprint("other", i)))
	}
	if !reflect.DeepEqual(b, want) {
		t.Errorf("Bare is\n%+v, want\n%+v", b, want)
	}
	if b.Key() != q.Key() || b.Unfit() != nil {
		t.Error("Bare is another question")
	}
	q.Rule.Statement, q.Image.Others[0].Size = "changed", 99
	if !reflect.DeepEqual(b, want) {
		t.Error("Bare shares memory with the question")
	}
}

func TestEpoch(t *testing.T) {
	if got := (Epoch{}).String(); got != strings.Repeat("0", 32) {
		t.Errorf("zero epoch is %s", got)
	}
	if got := EpochOf([]byte("abc")).String(); got != "ba7816bf8f01cfea414140de5dae2223" { // FIPS 180-4, example for SHA-256
		t.Errorf("epoch of abc is %s", got)
	}
}

func TestMode(t *testing.T) {
	for m, want := range map[Mode]string{*new(Mode): "enforce", Audit: "audit", 2: "enforce"} {
		if m.String() != want {
			t.Errorf("mode %d is %s, want %s", m, m, want)
		}
	}
}
