package policy_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/policy"
)

func TestParseAllowlist(t *testing.T) {
	a, b := digest.FromString("a").String(), digest.SHA512.FromString("b").String()
	raw := "# what the node cannot do without\n\n" + a + "\n  " + b + " kube-system,cni-system # network \r\n" + a + " x#y"
	list, err := policy.ParseAllowlist("allow/k3s.txt", []byte(raw))
	if err != nil {
		t.Fatal(err)
	}
	want := []policy.Listed{
		{Digest: digest.Digest(a), Namespaces: []string{"kube-system"}, File: "allow/k3s.txt", Line: 3},
		{Digest: digest.Digest(b), Namespaces: []string{"kube-system", "cni-system"}, File: "allow/k3s.txt", Line: 4},
		{Digest: digest.Digest(a), Namespaces: []string{"x"}, File: "allow/k3s.txt", Line: 5},
	}
	if !slices.EqualFunc(list, want, func(x, y policy.Listed) bool { return fmt.Sprint(x) == fmt.Sprint(y) }) {
		t.Errorf("%+v, want\n%+v", list, want)
	}
	if list, err := policy.ParseAllowlist("f", nil); err != nil || len(list) != 0 {
		t.Errorf("an empty file: %v, %v", list, err)
	}
	for text, want := range map[string]string{
		"registry.local/app:1":               "is not a digest",
		"sha256:abc":                         "is not a digest",
		strings.ToUpper(a):                   "is not a digest",
		"md5:d41d8cd98f00b204e9800998ecf8":   "is not a digest",
		a + " *":                             "is not the name of a namespace",
		a + " a,,b":                          "is not the name of a namespace",
		a + " kube-*":                        "is not the name of a namespace",
		a + " a, b":                          "has more than",
		a + " " + strings.Repeat("a", 1100):  "is longer than",
		a + " " + strings.Repeat("a,", 20):   "more than 16 namespaces",
		strings.Repeat(a+"\n", 10_001) + "#": "at most 10000",
	} {
		_, err := policy.ParseAllowlist("f", []byte("\n"+text))
		e := (*policy.Error)(nil)
		if !errors.As(err, &e) || e.Line < 2 || !strings.Contains(e.Text, want) {
			t.Errorf("%.80q: error %v, want one with a line that %s", text, err, want)
		}
	}
}

func FuzzParseAllowlist(f *testing.F) {
	f.Add([]byte(digest.FromString("a").String() + " kube-system,x # comment\n"))
	f.Add([]byte("sha256:\x00\n#\n\r\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		list, err := policy.ParseAllowlist("f", raw)
		if err != nil && list != nil {
			t.Error("a list with an error")
		}
		for _, l := range list {
			if l.Digest.Validate() != nil || len(l.Namespaces) == 0 || l.Line < 1 {
				t.Errorf("%+v", l)
			}
		}
	})
}

// TestAllowlistSelects: a digest counts where it is that of what runs, and in its
// namespaces; it goes before every statement.
func TestAllowlistSelects(t *testing.T) {
	const listed = "listed"
	d := func(s string) ocispec.Descriptor {
		return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString(s)}
	}
	base, _, err := policy.New([]verify.Statement{statement("any", "*")}, verify.Enforce, requirement)
	if err != nil {
		t.Fatal(err)
	}
	p := base.WithAllowlist([]policy.Listed{
		{Digest: digest.FromString(listed), Namespaces: []string{"other"}, File: "allow/a", Line: 1},
		{Digest: digest.FromString(listed), Namespaces: []string{"kube-system"}, File: "allow/b", Line: 7},
	})
	for label, tt := range map[string]struct {
		change func(*verify.Image)
		want   string // name of the rule
	}{
		"target":             {func(i *verify.Image) { i.Target = d(listed) }, "allow/b"},
		"manifest":           {func(i *verify.Image) { i.Manifest = d(listed) }, "allow/b"},
		"config":             {func(i *verify.Image) { i.Config, i.LayersVerified = digest.FromString(listed), true }, "allow/b"},
		"config alone":       {func(i *verify.Image) { i.Config = digest.FromString(listed) }, "any"},
		"of another file":    {func(i *verify.Image) { i.Target, i.Pod.Namespace = d(listed), "other" }, "allow/a"},
		"another namespace":  {func(i *verify.Image) { i.Target, i.Pod.Namespace = d(listed), "default" }, "any"},
		"no namespace":       {func(i *verify.Image) { i.Target, i.Pod.Namespace = d(listed), "" }, "any"},
		"only what pod says": {func(i *verify.Image) { i.Name.Digest = digest.FromString(listed) }, "any"},
		"another target":     {func(i *verify.Image) { i.Related = []ocispec.Descriptor{d(listed)} }, "any"},
		"nothing":            {func(*verify.Image) {}, "any"},
	} {
		t.Run(label, func(t *testing.T) {
			img := image(t, "registry.local/app:1")
			img.Target, img.Manifest, img.Config = d("target"), d("manifest"), digest.FromString("config")
			img.Pod.Namespace = "kube-system"
			tt.change(&img)
			r := p.Select(img)
			if r.Name != tt.want || (r.Fixed == verify.AllowedByDigest) != (tt.want != "any") {
				t.Errorf("rule %+v, want %s", r, tt.want)
			}
			if tt.want != "any" && (r.Digest != digest.FromString(listed) || !strings.Contains(r.Detail, "line ")) {
				t.Errorf("rule %+v", r)
			}
		})
	}
	img := image(t, "registry.local/app:1")
	img.Target, img.Pod.Namespace = d(listed), "kube-system"
	if r := base.Select(img); r.Name != "any" {
		t.Errorf("the policy without allowlist has changed: %+v", r)
	}
}
