package policy_test

import (
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/policy"
)

func TestUnalias(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ aliases, name, want string }{
		{"127.0.0.1:31999/ docker.io/", "127.0.0.1:31999/library/nginx:1-zarf-1", "docker.io/library/nginx:1-zarf-1"},
		{"127.0.0.1:31999 docker.io", "127.0.0.1:31999/nginx", "docker.io/library/nginx:latest"},
		{"127.0.0.1:31999 docker.io", "127.0.0.1:3199/nginx", "127.0.0.1:3199/nginx:latest"},
		{"127.0.0.1:31999 docker.io", "x.test/127.0.0.1/nginx", "x.test/127.0.0.1/nginx:latest"},
		{"r.test/hub docker.io", "r.test/hub/library/nginx", "docker.io/library/nginx:latest"},
		{"r.test/hub docker.io", "r.test/hubble/nginx", "r.test/hubble/nginx:latest"},
		{"r.test/hub docker.io", "r.test/a/hub/nginx", "r.test/a/hub/nginx:latest"},
		{"r.test/hub docker.io", "r.test/hub", ""}, // nothing is left
		{"r.test/hub docker.io/a", "r.test/hub", "docker.io/library/a:latest"},
		{"R.test:443/hub/ Index.Docker.io/x/", "r.test/hub/y", "docker.io/x/y:latest"},
		{"r.test quay.io/mirror", "r.test/a/b", "quay.io/mirror/a/b:latest"},
		// The first that matches, once.
		{"r.test/a s.test, r.test t.test, s.test u.test", "r.test/a/b", "s.test/b:latest"},
		{"r.test/a s.test, r.test t.test, s.test u.test", "r.test/b", "t.test/b:latest"},
		{"a.test b.test, b.test a.test", "a.test/x", "b.test/x:latest"},
		{"r.test s.test/" + strings.Repeat("a", 250), "r.test/" + strings.Repeat("b", 10), ""},
	} {
		var list []policy.Alias
		for _, s := range strings.Split(tt.aliases, ", ") {
			from, to, _ := strings.Cut(s, " ")
			a, err := policy.ParseAlias(from, to)
			if err != nil {
				t.Fatal(err)
			}
			list = append(list, a)
		}
		n, err := policy.ParseName(tt.name)
		if err != nil {
			t.Fatal(err)
		}
		got := policy.Unalias(list, n)
		if got.String() != tt.want {
			t.Errorf("%s: %s is %s, want %s", tt.aliases, tt.name, got, tt.want)
		}
		if tt.want == "" && got != (verify.Name{}) {
			t.Errorf("%s: %+v is a name", tt.name, got)
		}
	}
}

func FuzzUnalias(f *testing.F) {
	f.Add("127.0.0.1:31999/", "docker.io/", "127.0.0.1:31999/library/nginx:1")
	f.Add("r.test/hub", "docker.io", "r.test/hub/nginx@sha256:"+strings.Repeat("a", 64))
	f.Fuzz(func(t *testing.T, from, to, name string) {
		a, err := policy.ParseAlias(from, to)
		if err != nil {
			return
		}
		n, err := policy.ParseName(name)
		if err != nil {
			return
		}
		got := policy.Unalias([]policy.Alias{a}, n)
		if got == (verify.Name{}) {
			return
		}
		if again, err := policy.ParseName(got.String()); err != nil || again != got {
			t.Errorf("%s to %s: %s is %s, which is not canonical: %v", from, to, n, got, err)
		}
	})
}
