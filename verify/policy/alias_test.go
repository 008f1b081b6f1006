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

func TestLintAliases(t *testing.T) {
	for _, tt := range []struct {
		name    string
		aliases []string
		scope   string
		want    string // what images of the scope are called; empty: no warning
	}{
		{"none", nil, "r.test/app", ""},
		{"its target", []string{"r.test/hub docker.io"}, "docker.io/library/nginx", ""},
		{"its source", []string{"r.test/hub docker.io"}, "r.test/hub/nginx", "docker.io/library/nginx"},
		{"beside its source", []string{"r.test/hub docker.io"}, "r.test/hubble", ""},
		{"a whole host", []string{"r.test docker.io"}, "r.test:443/library/nginx", "docker.io/library/nginx"},
		{"target of another", []string{"a.test b.test", "b.test c.test"}, "b.test/app", ""},
		{"everything", []string{"r.test docker.io"}, "*", ""},
	} {
		var list []policy.Alias
		for _, a := range tt.aliases {
			from, to, _ := strings.Cut(a, " ")
			alias, err := policy.ParseAlias(from, to)
			if err != nil {
				t.Fatal(err)
			}
			list = append(list, alias)
		}
		w := policy.LintAliases([]verify.Statement{{Name: "prod", Scopes: []string{tt.scope}}}, list)
		if len(w) > 0 != (tt.want != "") || len(w) > 0 && (!strings.Contains(w[0].Text, " to "+tt.want+" before") || w[0].Field != "trustPolicies[0].registryScopes[0]") {
			t.Errorf("%s: %v", tt.name, w)
		}
	}
}

func TestIdentifies(t *testing.T) {
	const subject = "CN=release,OU=dev,O=Acme\\, Inc.,ST=WA,C=US"
	for identity, want := range map[string]bool{
		"x509.subject: C=US, ST=WA, O=Acme\\, Inc.":             true,
		"x509.subject: C=US, ST=WA, O=Acme\\, Inc., CN=release": true,
		"x509.subject: C=US, ST=WA, O=Acme\\, Inc., CN=other":   false,
		"x509.subject: C=US, ST=WA, O=acme":                     false,
		"x509.subject: junk":                                    false,
		"subject: C=US, ST=WA, O=Acme\\, Inc.":                  false,
		"*":                                                     false,
	} {
		if got := policy.Identifies(identity, subject); got != want {
			t.Errorf("%s: %v", identity, got)
		}
	}
	if policy.Identifies("x509.subject: C=US, ST=WA, O=a", "CN=a,O=a,C=US") {
		t.Error("a certificate without ST is named")
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
