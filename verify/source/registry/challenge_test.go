package registry

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"reflect"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

func TestChallenges(t *testing.T) {
	bearer := func(realm, service string) challenge { return challenge{"bearer", realm, service} }
	basic := challenge{scheme: "basic"}
	for name, tt := range map[string]struct {
		headers []string
		want    []challenge
	}{
		"Docker Hub":     {[]string{`Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/nginx:pull"`}, []challenge{bearer("https://auth.docker.io/token", "registry.docker.io")}},
		"words":          {[]string{"bearer Realm=r, SERVICE=s"}, []challenge{bearer("r", "s")}},
		"spaces":         {[]string{"Bearer  realm = \"r\" ,\tservice\t=s , "}, []challenge{bearer("r", "s")}},
		"escape":         {[]string{`Bearer realm="a\"b\\c"`}, []challenge{bearer(`a"b\c`, "")}},
		"comma inside":   {[]string{`Bearer realm="r",scope="a,b",service="s"`}, []challenge{bearer("r", "s")}},
		"two":            {[]string{`Basic realm="x", Bearer realm="r"`}, []challenge{{"basic", "x", ""}, bearer("r", "")}},
		"two headers":    {[]string{`Basic realm="x"`, `Bearer realm="r"`}, []challenge{{"basic", "x", ""}, bearer("r", "")}},
		"basic alone":    {[]string{"Basic"}, []challenge{basic}},
		"others":         {[]string{`Digest realm="x", Negotiate`}, nil},
		"token68":        {[]string{`Basic realm="x", Negotiate YWI=`}, []challenge{{"basic", "x", ""}}},
		"no realm":       {[]string{"Bearer service=s"}, nil},
		"realm twice":    {[]string{`Bearer realm="a",realm="b"`}, nil},
		"realm twice, 2": {[]string{`Bearer realm="a",Realm="b"`}, nil},
		"no end":         {[]string{`Bearer realm="r`}, nil},
		"no scheme":      {[]string{`realm="r"`}, nil},
		"junk":           {[]string{`Bearer realm="r", "`}, nil},
		"empty":          {[]string{"", ",,", " "}, nil},
		"long":           {[]string{"Bearer realm=" + strings.Repeat("r", 5000)}, nil},
		"many":           {[]string{"x", "x", "x", "x", "Bearer realm=r"}, nil},
	} {
		if got := challenges(tt.headers); !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: %q, want %q", name, got, tt.want)
		}
	}
}

func FuzzChallenges(f *testing.F) {
	for _, s := range []string{`Bearer realm="https://auth.docker.io/token",service="x",scope="y"`, `Basic realm="x", Bearer realm="r"`, `Negotiate YWI=`, `Bearer realm="a\`, ",,,", "a=b"} {
		f.Add(s, s)
	}
	f.Fuzz(func(t *testing.T, one, two string) {
		for _, c := range challenges([]string{one, two}) {
			if c.scheme != "basic" && (c.scheme != "bearer" || c.realm == "") || len(c.realm)+len(c.service) > maxChallenge {
				t.Errorf("%q", c)
			}
		}
	})
}

// Docker Hub's tokens come from one other host, and that of Docker Hub alone.
func TestDockerRealm(t *testing.T) {
	for at, want := range map[string]string{
		"https://registry-1.docker.io":     "https://auth.docker.io/token",
		"https://registry-1.docker.io:443": "https://auth.docker.io/token",
		"http://registry-1.docker.io":      "",
		"https://registry-1.docker.io:444": "",
		"https://mirror.internal":          "",
	} {
		for realm := range map[string]bool{"https://auth.docker.io/token": true, "http://auth.docker.io/token": false, "https://auth.docker.io:444/token": false, "https://auth.docker.io.evil.com/token": false} {
			asked := ""
			c := &http.Client{Transport: roundTripper(func(r *http.Request) (*http.Response, error) {
				resp := &http.Response{StatusCode: 401, Header: http.Header{"Www-Authenticate": {`Bearer realm="` + realm + `"`}}, Body: http.NoBody, Request: r, ProtoMajor: 1}
				if r.URL.Path == "/token" {
					asked = r.URL.Scheme + "://" + r.URL.Host + r.URL.Path
				}
				return resp, nil
			})}
			u, err := url.Parse(at)
			if err != nil {
				t.Fatal(err)
			}
			s := New(Mirror{Host: "docker.io", URL: u, Client: c, RealmClient: c})
			err = s.Find(context.Background(), verify.Name{Host: "docker.io", Path: "library/nginx"},
				ocispec.Descriptor{Digest: digest.FromString("x")}, verify.NewBudget(sourcetest.Kind, verify.Limits{}), func(verify.Evidence) bool { return true })
			if !errors.Is(err, verify.ErrUnauthorized) {
				t.Errorf("%s, %s: %v", at, realm, err)
			}
			if realm != "https://auth.docker.io/token" && asked != "" || realm == "https://auth.docker.io/token" && asked != want {
				t.Errorf("%s, %s: asked %q", at, realm, asked)
			}
		}
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// The store keeps a bounded number of tokens.
func TestTokensAreBounded(t *testing.T) {
	tokens := NewTokens(nil)
	for i := range 1000 {
		tokens.wants.Add(string(rune(i)), challenge{})
		tokens.tokens.Add(string(rune(i)), token{})
	}
	if tokens.tokens.Len() != maxTokens || tokens.wants.Len() != maxChallenges {
		t.Error(tokens.tokens.Len(), tokens.wants.Len())
	}
}
