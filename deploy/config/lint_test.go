package config

import (
	"crypto/x509/pkix"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf16"

	"github.com/opencontainers/go-digest"

	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

// TestLint has configurations that are valid and cannot work, or not as they were meant.
// Each warning says where and what will happen.
func TestLint(t *testing.T) {
	ca := func(o notarytest.CertOptions) string {
		return string(notarytest.NewCA(notarytest.CAOptions{CertOptions: o}).PEM())
	}
	past := notarytest.CertOptions{NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(-time.Hour)}
	mirrors := func(list string) string {
		return minimal + "sources:\n  network: mirrors\n  certsDir: none\n  mirrors:\n" + list
	}
	const hub = "    - {host: docker.io, url: 'https://10.0.0.5:5000'}\n"
	helpers := helper(t, "there", "")
	stamped := strings.Replace(trustPolicy("docker.io/library/nginx"), `["ca:acme"]`, `["ca:acme", "tsa:t"]`, 1)
	for name, c := range map[string]struct {
		files []string
		want  []string // "field: text", in any order
	}{
		"as it should be":        {nil, nil},
		"root ended":             {[]string{"truststore/x509/ca/acme/root.crt", ca(past)}, []string{"trustPolicies[0].trustStores[0]: ca:acme/root.crt", "every signature under it is CERTIFICATE_EXPIRED", "trustPolicies[0].trustStores: no certificate in them can vouch"}},
		"leaf of another":        {[]string{"truststore/x509/ca/acme/root.crt", string(notarytest.PEM(notarytest.SelfSigned(notarytest.CertOptions{Subject: pkix.Name{Country: []string{"US"}, Province: []string{"WA"}, Organization: []string{"other"}}}).Chain[0]))}, []string{"vouches for itself alone", "trustPolicies[0].trustStores: no certificate"}},
		"root of a TSA ended":    {[]string{"trustpolicy.json", stamped, "truststore/x509/tsa/t/t.crt", ca(past)}, []string{"trustPolicies[0].trustStores[1]: tsa:t/t.crt", "timestamps that are made now do not count"}},
		"scope behind an alias":  {[]string{"config.yaml", minimal + "aliases:\n  - {from: docker.io/library, to: r.test/hub}\n"}, []string{"trustPolicies[0].registryScopes[0]: an alias changes the names of its images to r.test/hub/nginx"}},
		"one certificate":        {[]string{"config.yaml", minimal + "limits: {certificates: 1}\n"}, []string{"limits.certificates: a CA and what it issued are two"}},
		"helper away":            {[]string{"config.yaml", minimal + "sources: {credentials: a.json, helpers: " + helpers + "}\n", "a.json", `{"credsStore": "away"}`}, []string{"sources.credentials: docker-credential-away is not in"}},
		"helper there":           {[]string{"config.yaml", minimal + "sources: {credentials: a.json, helpers: " + helpers + "}\n", "a.json", `{"credsStore": "there"}`}, nil},
		"credentials, no port":   {[]string{"config.yaml", mirrors(hub) + "  credentials: a.json\n", "a.json", `{"auths": {"10.0.0.5": ` + auth("u", "geheim") + `}}`}, []string{`sources.credentials: auths: "10.0.0.5" is not for https://10.0.0.5:5000`}},
		"credentials, scheme":    {[]string{"config.yaml", mirrors(hub) + "  credentials: a.json\n", "a.json", `{"auths": {"http://10.0.0.5:5000": ` + auth("u", "geheim") + `}}`}, []string{"is not for https://10.0.0.5:5000"}},
		"credentials, elsewhere": {[]string{"config.yaml", mirrors(hub) + "  credentials: a.json\n", "a.json", `{"auths": {"other.test": ` + auth("u", "geheim") + `}}`}, []string{`auths: "other.test" is sent nowhere`}},
		"credentials, right":     {[]string{"config.yaml", mirrors(hub) + "  credentials: a.json\n", "a.json", `{"auths": {"10.0.0.5:5000": ` + auth("u", "geheim") + `}}`}, nil},
		"credentials, itself":    {[]string{"config.yaml", minimal + "sources: {certsDir: none, credentials: a.json}\n", "a.json", `{"auths": {"docker.io": ` + auth("u", "geheim") + `}}`}, nil},
		"credentials, anybody":   {[]string{"trustpolicy.json", trustPolicy("*"), "config.yaml", minimal + "sources: {certsDir: none, credentials: a.json}\n", "a.json", `{"auths": {"other.test": ` + auth("u", "geheim") + `}}`}, nil},
		"mirror, misspelt":       {[]string{"config.yaml", mirrors("    - {host: dokcer.io, url: 'https://10.0.0.5:5000'}\n")}, []string{"sources.mirrors[0].host: no statement names an image of dokcer.io", "sources.network: mirrors, and there is none for docker.io"}},
		"mirror of all":          {[]string{"config.yaml", mirrors("    - {host: '*', url: 'https://10.0.0.5:5000'}\n")}, nil},
		"mirror at /x/v2":        {[]string{"config.yaml", mirrors("    - {host: docker.io, url: 'https://10.0.0.5:5000/proxy/v2'}\n")}, []string{"sources.mirrors[0].url: is asked for /v2/proxy/v2/REPOSITORY"}},
		"crl":                    {[]string{"crl/ca.crl", "x"}, []string{"/crl: nothing reads it: revocation lists have no effect yet"}},
		"misspelt files":         {[]string{"trust-store/x509/ca/acme/root.crt", string(root()), "trustpolicy.yaml", "x"}, []string{"/trust-store: nothing reads it", "/trustpolicy.yaml: nothing reads it"}},
		"files of others":        {[]string{"allow/k3s.txt", digest.FromString("x").String(), "config.yaml", minimal + "allowDigests: [allow/k3s.txt]\n", ".git/x", "x", "localkeys/x", "x", "signingkeys.json", "{}"}, nil},
	} {
		dir := write(t, with(notation(), c.files...))
		got := load1(t, dir)
		var texts []string
		for _, w := range got.Warnings {
			texts = append(texts, w.Field+": "+w.Text)
		}
		all := strings.Join(texts, "\n")
		for _, want := range c.want {
			if !strings.Contains(all, want) {
				t.Errorf("%s: no %q in\n%s", name, want, all)
			}
		}
		if c.want == nil && all != "" || len(texts) > len(c.want) || strings.Contains(all, "geheim") {
			t.Errorf("%s: got\n%s", name, all)
		}
	}
}

// TestMirrorURL: a URL as the neighbouring files write it is asked for something else.
func TestMirrorURL(t *testing.T) {
	for url, want := range map[string]string{
		"http://h.test/v2": "write http://h.test", "https://h.test/v2/": "write https://h.test", "http://h.test:5000/v2/proxy": "write http://h.test:5000/proxy",
		"http://h.test/v2x": "", "http://h.test/proxy": "", "http://h.test/proxy/v2": "", "http://h.test": "",
	} {
		_, err := ParseURL(url)
		if (err == nil) != (want == "") || err != nil && !strings.HasSuffix(err.Error(), want) {
			t.Errorf("%s: %v", url, err)
		}
	}
}

// TestEncodings writes each kind of file as Windows' editors and PowerShell do.
func TestEncodings(t *testing.T) {
	certs := t.TempDir()
	files := map[string]string{
		"config.yaml": minimal + "allowDigests: [f.txt]\nsources:\n  credentials: a.json\n  certsDir: " + certs + "\n  mirrors:\n    - {host: docker.io, url: 'https://m.test', ca: ca.pem}\n",
		"f.txt":       digest.FromString("x").String() + "\n", "a.json": `{"auths": {"m.test": ` + auth("u", "p") + `}}`, "ca.pem": string(root()),
		"trustpolicy.json": trustPolicy("docker.io/library/nginx"), "truststore/x509/ca/acme/root.crt": string(root()), "hosts.toml": "server = \"https://registry.example\"\n",
	}
	utf16le := func(s string, mark bool) string {
		var b []byte
		for _, u := range utf16.Encode([]rune(s)) {
			b = append(b, byte(u), byte(u>>8))
		}
		if mark {
			b = slices.Concat([]byte{0xff, 0xfe}, b)
		}
		return string(b)
	}
	for name := range files {
		for encoding, encode := range map[string]func(string) string{
			"mark":             func(s string) string { return "\ufeff" + s },
			"UTF-16":           func(s string) string { return utf16le(s, true) },
			"UTF-16, unmarked": func(s string) string { return utf16le(s, false) },
		} {
			changed := map[string]string{}
			for n, text := range files {
				if changed[n] = text; n == name {
					changed[n] = encode(text)
				}
			}
			fill(t, certs, map[string]string{"registry.example/hosts.toml": changed["hosts.toml"]})
			delete(changed, "hosts.toml")
			c, err := Load(write(t, changed))
			if encoding == "mark" {
				if err != nil || len(c.AllowDigests) != 1 || len(c.Mirrors) != 1 || c.credentials == nil || len(c.Warnings) != 0 {
					t.Errorf("%s, %s: %+v, %v", name, encoding, c, err)
				}
			} else if err == nil || !strings.Contains(err.Error(), "is UTF-16: save it as UTF-8") || !strings.Contains(err.Error(), filepath.Base(name)) {
				t.Errorf("%s, %s: %v", name, encoding, err)
			}
		}
	}
	// What is no text is left alone.
	der := notarytest.NewCA(notarytest.CAOptions{}).Root().Raw
	for _, raw := range [][]byte{der, {}, {0x30}, {0xff}, []byte("x")} {
		if got, err := Text(raw); err != nil || string(got) != string(raw) {
			t.Errorf("% x: % x, %v", raw[:min(len(raw), 4)], got[:min(len(got), 4)], err)
		}
	}
}
