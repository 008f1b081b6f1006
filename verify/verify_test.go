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

// kind is that of the evidence here.
type kind struct {
	Kind
	suffixes []string
}

func (kind) Name() string            { return "test" }
func (k kind) TagSuffixes() []string { return k.suffixes }

// by is the requirement of one authority.
func by(authority string) *Requirement {
	r, err := SignedBy(leaf(authority))
	if err != nil {
		panic(err)
	}
	return r
}

func leaf(authority string) Leaf {
	return Leaf{Kind: "test", Authority: authority, Hash: sha256.Sum256([]byte(authority))}
}

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
			Use: UseContainer, Binding: BoundRuntime, Revision: Revision{7},
			Pod: Pod{Namespace: "shop", Name: "web-0", UID: "u-1", Container: "web"},
		},
		Rule: &Rule{Name: "prod", Require: by("acme")},
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
	{"ahead, bound by what somebody asked", func(q *Question) { q.Image.Use, q.Image.Binding = UsePrefetch, BoundDigest }, ImageUnresolved},
	{"ahead, without config", func(q *Question) {
		q.Image.Use, q.Image.Binding, q.Image.Config = UsePrefetch, BoundRecord, ""
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
	{"no requirement", func(q *Question) { q.Rule.Require = nil }, PolicyInvalid},
	{"zero requirement", func(q *Question) { q.Rule.Require = new(Requirement) }, PolicyInvalid},
	{"settled as well", func(q *Question) { q.Rule.Fixed = PolicyInvalid }, PolicyInvalid},
	{"a digest that is not listed", func(q *Question) { q.Rule.Fixed, q.Rule.Digest = AllowedByDigest, of("another") }, PolicyInvalid},
	{"no digest listed", func(q *Question) { q.Rule.Fixed = AllowedByDigest }, PolicyInvalid},
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
	denied(t, new(Decider).Verify(ctx, bound().Image), PolicyInvalid)
	denied(t, new(Engine).Evaluate(ctx, bound()), PolicyInvalid)
	denied(t, new(Engine).Evaluate(ctx, Question{}), ImageUnresolved)
	denied(t, allow(Question{}, nil, time.Time{}), ImageUnresolved)
	denied(t, allow(bound(), []proof{{}}, start), Internal)
	denied(t, (&trace{require: by("acme")}).refuse(nil, start), SourceUnreachable)
	denied(t, audit(Decision{}, 0), Internal)
	var e Decider
	e.Swap(&Snapshot{})
	under := bound().Image
	under.Revision = Revision{}
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
			f := with(tt.weaken).Validate()
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
		with(func(q *Question) { q.Image.Use = UsePrefetch }),
		with(func(q *Question) { q.Image.Use, q.Image.Binding = UsePrefetch, BoundSnapshot }),
		with(func(q *Question) { q.Image.Use, q.Image.Binding = UsePrefetch, BoundRecord }),
		with(func(q *Question) { q.Image.Name.Path = strings.Repeat("a", maxName-len(q.Image.Name.Host)) }),
		with(func(q *Question) { q.Image.Target.MediaType = strings.Repeat("a", maxPart) }),
	} {
		if f := q.Validate(); f != nil {
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
		{"Image.Related", false, func(q *Question) { q.Image.Related = []ocispec.Descriptor{desc("other")} }},
		{"Image.LayersVerified", false, func(q *Question) { q.Image.LayersVerified = !q.Image.LayersVerified }},
		{"Image.Use", false, func(q *Question) { q.Image.Use = UseQuestion }},
		{"Image.Binding", false, func(q *Question) { q.Image.Binding = BoundSnapshot }},
		{"Image.Revision", false, func(q *Question) { q.Image.Revision = Revision{9} }},
		{"Image.Pod", false, func(q *Question) { q.Image.Pod = Pod{"a", "b", "c", "d"} }},
		{"Image.Fault", false, func(q *Question) { q.Image.Fault = &Fault{} }},
		{"Rule.Name", false, func(q *Question) { q.Rule.Name = "other" }},
		{"Rule.Fixed", false, func(q *Question) { q.Rule.Fixed = PolicyInvalid }},
		{"Rule.Digest", false, func(q *Question) { q.Rule.Digest = of("other") }},
		{"Rule.Detail", false, func(q *Question) { q.Rule.Detail = "other" }},
		{"Rule.Require", true, func(q *Question) { q.Rule.Require = by("other") }},
	} {
		k := with(tt.change).Key()
		if (k != base) != tt.in {
			t.Errorf("%s: in the key %t, want %t", tt.field, k != base, tt.in)
		}
		if (string(k.bytes()) != string(base.bytes())) != tt.in {
			t.Errorf("%s: in the key's bytes otherwise than in the key", tt.field)
		}
	}
	if n, m := reflect.TypeFor[Image]().NumField(), reflect.TypeFor[Rule]().NumField(); n != 14 || m != 5 { // links follow from Manifest, Config and the store
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
	for i := range MaxRelated + 3 {
		d := desc(fmt.Sprint("other", i))
		junk(&d)
		q.Image.Related = append(q.Image.Related, d)
	}
	b := q.Minimal()
	want := bound()
	want.Image.Name.Tag, want.Image.Asked, want.Image.Pod, want.Image.Revision = "", "", Pod{}, Revision{}
	for i := range MaxRelated {
		want.Image.Related = append(want.Image.Related, desc(fmt.Sprint("other", i)))
	}
	if !reflect.DeepEqual(b, want) {
		t.Errorf("Bare is\n%+v, want\n%+v", b, want)
	}
	if b.Key() != q.Key() || b.Validate() != nil {
		t.Error("Bare is another question")
	}
	q.Rule.Name, q.Image.Related[0].Size = "changed", 99
	if !reflect.DeepEqual(b, want) {
		t.Error("Bare shares memory with the question")
	}
}

func TestEpoch(t *testing.T) {
	if got := (Revision{}).String(); got != strings.Repeat("0", 32) {
		t.Errorf("zero revision is %s", got)
	}
	if got := RevisionOf([]byte("abc")).String(); got != "ba7816bf8f01cfea414140de5dae2223" { // FIPS 180-4, example for SHA-256
		t.Errorf("revision of abc is %s", got)
	}
}

func TestMode(t *testing.T) {
	for m, want := range map[Mode]string{*new(Mode): "enforce", Audit: "audit", 2: "enforce"} {
		if m.String() != want {
			t.Errorf("mode %d is %s, want %s", m, m, want)
		}
	}
}
