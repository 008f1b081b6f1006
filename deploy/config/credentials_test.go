package config

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/source/registry"
)

func auth(user, password string) string {
	return `{"auth": "` + base64.StdEncoding.EncodeToString([]byte(user+":"+password)) + `"}`
}

// who is as whom the registry at u is asked: user:password, or the token.
func who(t testing.TB, c *credentials, u string) string {
	t.Helper()
	at, err := url.Parse(u)
	must(t, err)
	f := c.of(at, true)
	if f == nil {
		return ""
	}
	got, err := f(t.Context())
	if err != nil {
		return "error: " + err.Error()
	}
	if got.IdentityToken != "" {
		return got.Username + "!" + got.IdentityToken
	}
	return got.Username + ":" + got.Password
}

// Each entry is for its own host, port and, where it says one, scheme.
func TestCredentialsAreBound(t *testing.T) {
	for name, tt := range map[string]struct {
		file string
		want map[string]string
	}{
		"host": {`{"auths": {"a.b": ` + auth("u", "p:q") + `}, "HttpHeaders": {"X": "y"}, "psFormat": "x"}`, map[string]string{
			"https://a.b": "u:p:q", "https://a.b:443": "u:p:q", "https://A.B/path": "u:p:q", "https://a.b.": "u:p:q",
			"https://a.b:444": "", "http://a.b": "", "http://a.b:80": "", "https://x.a.b": "", "https://b": "", "https://a.bc": "", "https://a.b.evil.com": "",
		}},
		"port": {`{"auths": {"a.b:5000": ` + auth("u", "p") + `}}`, map[string]string{
			"https://a.b:5000": "u:p", "http://a.b:5000": "u:p", "https://a.b": "", "http://a.b": "", "https://a.b:5001": "",
		}},
		"scheme": {`{"auths": {"https://a.b:5000/v2/": ` + auth("u", "p") + `, "http://c.d": ` + auth("v", "q") + `}}`, map[string]string{
			"https://a.b:5000": "u:p", "http://a.b:5000": "", "http://c.d": "v:q", "http://c.d:80": "v:q", "https://c.d": "", "https://c.d:80": "",
		}},
		"scheme goes before none": {`{"auths": {"a.b": ` + auth("u", "p") + `, "https://a.b": ` + auth("v", "q") + `}}`, map[string]string{
			"https://a.b": "v:q", "http://a.b:443": "u:p",
		}},
		"Docker Hub": {`{"auths": {"https://index.docker.io/v1/": ` + auth("u", "p") + `}}`, map[string]string{
			"https://registry-1.docker.io": "u:p", "https://docker.io": "", "https://index.docker.io": "", "https://auth.docker.io": "", "http://registry-1.docker.io": "",
			"https://registry-1.docker.io:444": "",
		}},
		"Docker Hub's other name": {`{"auths": {"docker.io": ` + auth("u", "p") + `}}`, map[string]string{"https://registry-1.docker.io": "u:p"}},
		"Docker Hub at a port":    {`{"auths": {"http://docker.io": ` + auth("u", "p") + `}}`, map[string]string{"http://index.docker.io": "", "http://docker.io": ""}},
		"address":                 {`{"auths": {"[2001:DB8:0::1]:5000": ` + auth("u", "p") + `, "localhost": ` + auth("v", "q") + `}}`, map[string]string{"https://[2001:db8::1]:5000": "u:p", "https://localhost": "v:q", "https://127.0.0.1": ""}},
		"one word":                {`{"auths": {"mirror": ` + auth("u", "p") + `}}`, map[string]string{"https://mirror": "u:p", "https://mirror:443": "u:p", "http://mirror": ""}},
		"fields":                  {`{"auths": {"a.b": {"username": "u", "password": "p"}}}`, map[string]string{"https://a.b": "u:p"}},
		"auth goes before fields": {`{"auths": {"a.b": {"username": "x", "password": "y", "auth": "dTpw"}}}`, map[string]string{"https://a.b": "u:p"}},
		"padded":                  {`{"auths": {"a.b": ` + auth("u", "p\x00\x00") + `}}`, map[string]string{"https://a.b": "u:p"}},
		"identity token":          {`{"auths": {"a.b": {"auth": "dTo=", "identitytoken": "t"}}}`, map[string]string{"https://a.b": "u!t"}},
		"token as password":       {`{"auths": {"a.b": ` + auth("<token>", "t") + `}}`, map[string]string{"https://a.b": "!t"}},
		"empty":                   {`{"auths": {"a.b": {}}}`, map[string]string{"https://a.b": ""}},
	} {
		c, warnings, err := parseCredentials([]byte(tt.file), "")
		if err != nil || len(warnings) > 0 {
			t.Errorf("%s: %v, %v", name, err, warnings)
			continue
		}
		for u, want := range tt.want {
			if got := who(t, c, u); got != want {
				t.Errorf("%s: %s is told %q, want %q", name, u, got, want)
			}
		}
	}
}

func TestCredentialErrors(t *testing.T) {
	for name, tt := range map[string]struct{ file, want string }{
		"empty":        {``, "not a docker config.json: line 1"},
		"not JSON":     {"{\n\"auths\": {\"a.b\": {\"auth\": geheim}}}", "not a docker config.json: line 2"},
		"list":         {"[]", "not a docker config.json: line 1"},
		"number":       {"{\"auths\":\n{\"a.b\": {\"password\": 1234567}}}", "not a docker config.json: line 2"},
		"twice":        {`{"auths": {"a.b": ` + auth("u", "geheim") + `, "a.b:443": ` + auth("u", "other") + `}}`, `"a.b" and "a.b:443" are for the same host, and differ`},
		"store's path": {`{"credsStore": "/tmp/x"}`, "credsStore: a helper's name"},
		"many": {`{"auths": {` + func() string {
			var b strings.Builder
			for i := range 1001 {
				fmt.Fprintf(&b, `"a%d.b": {},`, i)
			}
			return b.String()
		}() + `"x.b": {}}}`, "more than 1000 entries"},
	} {
		c, _, err := parseCredentials([]byte(tt.file), "")
		if err == nil || c != nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: error %v, want %s", name, err, tt.want)
		}
		for _, secret := range []string{"geheim", "Z2Vo", "1234567"} {
			if strings.Contains(fmt.Sprint(err), secret) {
				t.Errorf("%s: shows a secret: %v", name, err)
			}
		}
	}
	// An entry that is broken costs its own registry its login, and no other.
	for name, tt := range map[string]struct{ file, want string }{
		"base64":           {`{"auths": {"a.b": {"auth": "geheim!"}}}`, `auths: "a.b" is not used: auth is not user:password in base64`},
		"no colon":         {`{"auths": {"a.b": {"auth": "Z2VoZWlt"}}}`, `auths: "a.b" is not used: auth is not user:password in base64`},
		"no user":          {`{"auths": {"a.b": {"password": "geheim"}}}`, `auths: "a.b" is not used: a password without`},
		"header in a user": {`{"auths": {"a.b": {"username": "geheim\r\nX: y", "password": "p"}}}`, "control character"},
		"colon in a user":  {`{"auths": {"a.b": {"username": "geheim:x", "password": "p"}}}`, "colon"},
		"long":             {`{"auths": {"a.b": {"username": "u", "password": "` + strings.Repeat("geheim", 4000) + `"}}}`, "too long"},
		"helper's path":    {`{"credHelpers": {"a.b": "../../tmp/x"}}`, "credHelpers: \"a.b\" is not used: a helper's name has only a-z, 0-9 and -"},
		"helper's flag":    {`{"credHelpers": {"a.b": "x y"}}`, "a helper's name"},
		"empty helper":     {`{"credHelpers": {"a.b": ""}}`, "a helper's name"},
		"password in key":  {`{"credHelpers": {"https://geheim:geheim@a.b": "X"}}`, `"...@a.b"`},
	} {
		file := tt.file[:len(tt.file)-2] + `, "c.d": ` + auth("u", "p") + `}}`
		at := "https://c.d"
		if strings.HasPrefix(file, `{"credHelpers"`) {
			file = tt.file[:len(tt.file)-1] + `, "auths": {"c.d": ` + auth("u", "p") + `}}`
		}
		c, warnings, err := parseCredentials([]byte(file), "")
		if err != nil || len(warnings) != 1 || !strings.Contains(warnings[0], tt.want) || !strings.Contains(warnings[0], "is not used") || who(t, c, at) != "u:p" || who(t, c, "https://a.b") != "" {
			t.Errorf("%s: %v, warnings %q, want %s", name, err, warnings, tt.want)
		}
		for _, secret := range []string{"geheim", "Z2Vo"} {
			if strings.Contains(fmt.Sprint(warnings), secret) {
				t.Errorf("%s: shows a secret: %q", name, warnings)
			}
		}
	}
	// A file in which nothing is recognised is not in order.
	for name, tt := range map[string]struct{ file, want string }{
		"nothing":           {`{}`, "logins stand under auths"},
		"null":              {`null`, "logins stand under auths"},
		"no entry":          {`{"auths": {}}`, "auths is empty"},
		"other keys":        {`{"HttpHeaders": {"X": "geheim"}}`, "other keys are ignored"},
		".dockercfg":        {`{"a.b": ` + auth("u", "geheim") + `}`, `the entry "a.b" must stand under auths`},
		".dockercfg's user": {`{"https://geheim@a.b": {"username": "geheim"}}`, `the entry "...@a.b" must stand under auths`},
		"Secret":            {`{"kind": "Secret", "data": {".dockerconfigjson": "geheim"}}`, "it is a Kubernetes Secret"},
		"data of a Secret":  {`{".dockerconfigjson": "geheim"}`, "it is a Kubernetes Secret"},
		"misspelled":        {`{"auth": {"a.b": ` + auth("u", "geheim") + `}}`, "logins stand under auths"},
	} {
		c, warnings, err := parseCredentials([]byte(tt.file), "")
		if err != nil || len(warnings) != 1 || !strings.HasPrefix(warnings[0], "no login in it: ") || !strings.Contains(warnings[0], tt.want) || strings.Contains(warnings[0], "geheim") || who(t, c, "https://a.b") != "" {
			t.Errorf("%s: %v, %q", name, err, warnings)
		}
	}
	// What other programs write is named and not used.
	for _, key := range []string{"quay.io/org", "*.azurecr.io", "https://index.docker.io/v1/access-token", "https://u:geheim@a.b", ""} {
		c, warnings, err := parseCredentials([]byte(`{"auths": {`+strconv.Quote(key)+`: `+auth("u", "geheim")+`}}`), "")
		if err != nil || len(warnings) != 1 || len(c.logins) != 0 || strings.Contains(warnings[0], "geheim") || !strings.Contains(warnings[0], "is not used") {
			t.Errorf("%q: %v, %v", key, warnings, err)
		}
	}
}

// helper writes docker-credential-NAME, a shell script, and returns its directory.
func helper(t testing.TB, name, script string) string {
	t.Helper()
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "docker-credential-"+name), []byte("#!/bin/sh\n"+script), 0o755))
	return dir
}

func TestHelper(t *testing.T) {
	big := "head -c 10000000 /dev/zero | tr '\\0' g; echo geheim"
	for name, tt := range map[string]struct{ script, want string }{
		"good":        {`read -r key; test "$1" = get && echo "{\"ServerURL\": \"$key\", \"Username\": \"$key\", \"Secret\": \"p\"}"`, "a.b/v2/:p"},
		"token":       {`echo '{"Username": "<token>", "Secret": "t"}'`, "!t"},
		"environment": {`test -z "$TIDEWAITER_TEST$LANG$http_proxy" && test -n "$PATH" && echo "{\"Username\": \"$(env | cut -d= -f1 | grep -v '^_$\|^PWD$\|^SHLVL$\|^OLDPWD$' | sort | tr '\n' ' ')\", \"Secret\": \"p\"}"`, "HOME PATH :p"},
		"none":        {`echo credentials not found in native keychain; exit 1`, ":"},
		"fails":       {`echo geheim; echo geheim >&2; exit 3`, "error: docker-credential-x failed: exit status 3"},
		"killed":      {`kill -9 $$`, "error: docker-credential-x failed: signal: killed"},
		"garbage":     {`echo geheim`, "error: docker-credential-x printed no credentials"},
		"nothing":     {``, "error: docker-credential-x printed no credentials"},
		"huge":        {big, "error: docker-credential-x printed more than 65536 bytes"},
		"endless":     {`yes geheim`, "error: docker-credential-x printed more than 65536 bytes"},
		"header":      {`printf '{"Username": "geheim\\r\\nX: y", "Secret": "p"}'`, "error: docker-credential-x printed credentials that cannot be used: "},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("TIDEWAITER_TEST", "geheim")
			dir := helper(t, "x", tt.script)
			c, _, err := parseCredentials([]byte(`{"credHelpers": {"a.b/v2/": "x"}}`), dir)
			must(t, err)
			got := who(t, c, "https://a.b")
			if !strings.HasPrefix(got, tt.want) || strings.Contains(got, "geheim") {
				t.Errorf("got %q, want %q", got, tt.want)
			}
			if again := who(t, c, "https://a.b"); again != got {
				t.Errorf("again: %q", again)
			}
			if other := who(t, c, "https://a.b:444"); other != "" {
				t.Errorf("another port: %q", other)
			}
		})
	}
}

// A helper that hangs is ended with what it started, and holds nobody longer than
// their own deadline.
func TestHelperHangs(t *testing.T) {
	pid := filepath.Join(t.TempDir(), "pid")
	dir := helper(t, "x", "sleep 1000 &\necho $! >"+pid+".new; mv "+pid+".new "+pid+"\nwait\n")
	c, _, err := parseCredentials([]byte(`{"credsStore": "x"}`), dir)
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	var ended time.Time
	go func() { // as soon as it hangs
		defer close(done)
		for i := 0; i < 4000; i++ {
			if _, err := os.Stat(pid); err == nil {
				break
			}
			time.Sleep(time.Millisecond)
		}
		ended = time.Now()
		cancel()
	}()
	_, err = c.of(&url.URL{Scheme: "https", Host: "a.b"}, true)(ctx)
	<-done
	if err == nil || !strings.Contains(err.Error(), "did not answer in time") || time.Since(ended) > helperTime {
		t.Errorf("%v %v after the end", err, time.Since(ended))
	}
	gone(t, pid)
}

// gone waits until the process whose id is in file has ended.
func gone(t *testing.T, file string) {
	t.Helper()
	raw, err := os.ReadFile(file)
	must(t, err)
	child, err := strconv.Atoi(strings.TrimSpace(string(raw)))
	must(t, err)
	for i := 0; ; i++ { // init reaps it
		state, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", child))
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) || strings.Contains(string(state), ") Z ") {
			return
		}
		if i > 30_000 {
			syscall.Kill(child, syscall.SIGKILL)
			t.Fatalf("the helper's child still ran: %s", state)
		}
		time.Sleep(time.Millisecond)
	}
}

// One that ends and leaves something behind that could still answer is no better.
func TestHelperLeavesAChild(t *testing.T) {
	pid := filepath.Join(t.TempDir(), "pid")
	dir := helper(t, "x", "sleep 1000 &\necho $! >"+pid+"\necho '{\"Username\": \"u\", \"Secret\": \"geheim\"}'\n")
	c, _, err := parseCredentials([]byte(`{"credsStore": "x"}`), dir)
	must(t, err)
	if got := who(t, c, "https://a.b"); got != "error: docker-credential-x left something running" {
		t.Error(got)
	}
	gone(t, pid)
}

// A helper is run once for many questions at a time, by the name under which
// docker keeps a registry.
func TestHelperIsAskedOnce(t *testing.T) {
	list := filepath.Join(t.TempDir(), "list")
	dir := helper(t, "x", `read -r key; echo "$key" >>`+list+`; echo '{"Username": "u", "Secret": "p"}'`)
	c, _, err := parseCredentials([]byte(`{"credsStore": "x", "auths": {"https://own.b/v1/": {}, "plain.b": `+auth("v", "q")+`}}`), dir)
	must(t, err)
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			for _, u := range []string{"https://registry-1.docker.io", "https://a.b:5000", "https://own.b", "https://plain.b"} {
				want := "u:p"
				if u == "https://plain.b" {
					want = "v:q"
				}
				if got := who(t, c, u); got != want {
					t.Errorf("%s: %q", u, got)
				}
			}
		})
	}
	all.Wait()
	raw, err := os.ReadFile(list)
	must(t, err)
	for _, want := range []string{"https://index.docker.io/v1/\n", "a.b:5000\n", "https://own.b/v1/\n"} {
		if strings.Count(string(raw), want) != 1 {
			t.Errorf("asked for:\n%s", raw)
		}
	}
	for i := range 1000 {
		c.of(&url.URL{Scheme: "https", Host: fmt.Sprintf("h%d.b", i)}, true)
	}
	if c.asked.Len() != maxAsked {
		t.Errorf("%d answers are kept", c.asked.Len())
	}
}

// Without a directory helpers are in PATH, and nowhere else.
func TestHelperInPath(t *testing.T) {
	c, _, err := parseCredentials([]byte(`{"credsStore": "x"}`), "")
	must(t, err)
	dir := helper(t, "x", `echo '{"Username": "u", "Secret": "p"}'`)
	t.Chdir(dir)
	t.Setenv("PATH", "/nonexistent:.:")
	if got := who(t, c, "https://a.b"); got != "error: docker-credential-x is not in PATH" {
		t.Error(got)
	}
	t.Setenv("PATH", dir+":"+"/usr/bin:/bin")
	if got := who(t, c, "https://c.d"); got != "u:p" {
		t.Error(got)
	}
}

// The keys of a mirror that concern who may come in.
func TestAccessErrors(t *testing.T) {
	cert, key := pairOf(t, "node")
	mirror := func(rest string) string {
		return minimal + "sources:\n  mirrors:\n    - {host: a.b, url: https://a.b,\n       " + rest + "}\n"
	}
	for name, c := range map[string]struct{ yaml, want string }{
		"cert alone":        {mirror("cert: c.crt"), ":6: sources.mirrors[0].cert: has no use without key"},
		"key alone":         {mirror("key: c.key"), ":6: sources.mirrors[0].key: has no use without cert"},
		"no such key":       {mirror("cert: c.crt, key: none"), ":6: sources.mirrors[0].key: \"none\": "},
		"key of another":    {mirror("cert: c.crt, key: d.key"), ":6: sources.mirrors[0].cert: \"c.crt\" and \"d.key\" are not a certificate and its key"},
		"cert with http":    {minimal + "sources:\n  mirrors:\n    - {host: a.b, url: http://a.b, cert: c.crt, key: c.key}\n", ":5: sources.mirrors[0].cert: has no use without https"},
		"realm with path":   {mirror("realm: https://c.d/token"), ":6: sources.mirrors[0].realm: must be scheme, host and port alone"},
		"realm with user":   {mirror("realm: https://geheim@c.d"), ":6: sources.mirrors[0].realm: must not hold a user"},
		"realm, bare":       {mirror("realm: c.d"), ":6: sources.mirrors[0].realm: "},
		"realm over http":   {mirror("realm: http://c.d"), ":6: sources.mirrors[0].realm: must start with https://"},
		"ns text":           {mirror("ns: docker.io"), ":6: sources.mirrors[0].ns: must be true or false"},
		"ns quoted":         {mirror("ns: \"true\""), ":6: sources.mirrors[0].ns: must be true or false"},
		"skip_verify":       {mirror("skip_verify: true"), ":6: sources.mirrors[0].skip_verify: unknown key"},
		"credentials list":  {minimal + "sources:\n  credentials: [a]\n", ":4: sources.credentials: must be text"},
		"credentials empty": {minimal + "sources:\n  credentials: \"\"\n", ":4: sources.credentials: must be a file"},
		"no credentials":    {minimal + "sources:\n  credentials: none.json\n", ":4: sources.credentials: \"none.json\": "},
		"bad credentials":   {minimal + "sources:\n  credentials: bad.json\n", ":4: sources.credentials: \"bad.json\": credsStore: a helper's name"},
		"helpers relative":  {minimal + "sources:\n  credentials: bad.json\n  helpers: bin\n", ":5: sources.helpers: must be the absolute path"},
		"helpers alone":     {minimal + "sources:\n  helpers: /bin\n", ":4: sources.helpers: has no use without sources.credentials"},
	} {
		dir := write(t, with(notation(), "config.yaml", c.yaml, "c.crt", cert, "c.key", key, "d.key", otherKey(t), "bad.json", `{"auths": {"a.b": {"auth": "geheim"}}, "credsStore": "/geheim"}`))
		got, err := Load(dir)
		if err == nil || got != nil {
			t.Errorf("%s: got %+v", name, got)
			continue
		}
		if !strings.HasPrefix(err.Error(), filepath.Join(dir, "config.yaml")+c.want) || strings.Contains(err.Error(), "geheim") {
			t.Errorf("%s: got  %v\nwant …%s", name, err, c.want)
		}
	}
}

func pairOf(t testing.TB, name string) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(2), DNSNames: []string{name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
	must(t, err)
	raw, err := x509.MarshalPKCS8PrivateKey(k)
	must(t, err)
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw}))
}

func otherKey(t testing.TB) string {
	_, key := pairOf(t, "other")
	return key
}

// Everything together: a mirror that wants a client certificate and a token from
// another host, which gets the credentials and no client certificate. All the
// files count in the revision, and no message holds a secret.
func TestAccess(t *testing.T) {
	var mu sync.Mutex
	var scopes, ns []string
	authServer := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		if len(r.TLS.PeerCertificates) > 0 {
			t.Error("the client certificate was shown to the token server")
		}
		if user, password, _ := r.BasicAuth(); user != "robot" || password != "geheim-geheim" {
			w.WriteHeader(401)
			return
		}
		scopes = append(scopes, r.URL.Query().Get("scope"))
		io.WriteString(w, `{"token": "geheim.token.of.robot"}`)
	}))
	registry := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		if len(r.TLS.PeerCertificates) != 1 || r.TLS.PeerCertificates[0].DNSNames[0] != "node" {
			t.Error("no client certificate")
		}
		ns = append(ns, r.URL.Query().Get("ns"))
		if r.Header.Get("Authorization") != "Bearer geheim.token.of.robot" {
			w.Header().Set("WWW-Authenticate", `Bearer realm="`+authServer.URL+`/token",service="x"`)
			w.WriteHeader(401)
			return
		}
		w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
		io.WriteString(w, `{"schemaVersion": 2, "mediaType": "`+ocispec.MediaTypeImageIndex+`", "manifests": []}`)
	}))
	for _, s := range []*httptest.Server{authServer, registry} {
		s.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
		s.Config.ErrorLog = log.New(io.Discard, "", 0)
		s.StartTLS()
		defer s.Close()
		defer s.CloseClientConnections()
	}
	at, err := url.Parse(registry.URL)
	must(t, err)
	realm, err := url.Parse(authServer.URL)
	must(t, err)
	outside := t.TempDir()
	cert, key := pairOf(t, "node")
	must(t, os.WriteFile(filepath.Join(outside, "node.key"), []byte(key), 0o600))
	login := `{"auths": {"` + at.Host + `": ` + auth("robot", "geheim-geheim") + `}}`
	must(t, os.WriteFile(filepath.Join(outside, "auth.json"), []byte(login), 0o600))
	config := minimal + `sources:
  credentials: ` + outside + `/auth.json
  mirrors:
    - host: "*"
      url: ` + registry.URL + `
      ca: ca.crt
      cert: node.crt
      key: ` + outside + `/node.key
      realm: ` + authServer.URL + `
      ns: true
`
	// Both servers of httptest have the same certificate.
	ca := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: registry.Certificate().Raw}))
	dir := write(t, with(notation(), "config.yaml", config, "node.crt", cert, "ca.crt", ca))
	c := load1(t, dir)
	if m := c.Mirrors[0]; m.Cert != filepath.Join(dir, "node.crt") || m.Key != outside+"/node.key" || m.Realm.Host != realm.Host || !m.NS || c.Credentials != outside+"/auth.json" {
		t.Errorf("got %+v", m)
	}
	find := func(c *Config, host, path string) error {
		n := verify.Name{Host: host, Path: path}
		s := c.Sources()(n)[0]
		err := s.Find(t.Context(), n, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("x"), Size: 1},
			verify.NewBudget(notary.Kind, verify.Limits{}), func(verify.Evidence) bool { return true })
		if text := fmt.Sprintf("%v %s %s %+v %#v", err, s.Name(), c.Revision, c, *c); strings.Contains(text, "geheim") {
			t.Errorf("a secret is shown: %s", text)
		}
		return err
	}
	must(t, find(c, "docker.io", "library/nginx"))
	must(t, find(c, "quay.io", "a/b"))
	mu.Lock()
	if strings.Join(scopes, " ") != "repository:library/nginx:pull repository:a/b:pull" || strings.Join(ns, " ") != "docker.io docker.io quay.io quay.io" {
		t.Errorf("scopes %q, ns %q", scopes, ns)
	}
	mu.Unlock()

	// One source answers for many questions.
	sources := c.Sources()
	for range 3 {
		n := verify.Name{Host: "docker.io", Path: "library/nginx"}
		must(t, sources(n)[0].Find(t.Context(), n, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("x"), Size: 1}, verify.NewBudget(notary.Kind, verify.Limits{}), func(verify.Evidence) bool { return true }))
	}
	mu.Lock()
	if len(scopes) != 3 || len(ns) != 4+4 {
		t.Errorf("%d tokens, %d requests", len(scopes), len(ns))
	}
	mu.Unlock()

	revisions := map[verify.Revision]bool{c.Revision: true}
	for name, text := range map[string]string{
		outside + "/auth.json": strings.Replace(login, "robot", "robot", 1) + "\n",
		outside + "/node.key":  key + "\n",
		dir + "/node.crt":      cert + "\n",
	} {
		must(t, os.WriteFile(name, []byte(text), 0o600))
		if e := load1(t, dir).Revision; revisions[e] {
			t.Errorf("%s does not count in the revision", name)
		} else {
			revisions[e] = true
		}
	}
	// Without the entry, and without the realm.
	must(t, os.WriteFile(outside+"/auth.json", []byte(strings.Replace(login, at.Host, "127.0.0.1:1", 1)), 0o600))
	if err := find(load1(t, dir), "docker.io", "library/nginx"); !errors.Is(err, verify.ErrUnauthorized) || !strings.Contains(err.Error(), "token server "+realm.Host+": 401") {
		t.Errorf("credentials for another port: %v", err)
	}
	must(t, os.WriteFile(outside+"/auth.json", []byte(login), 0o600))
	fill(t, dir, map[string]string{"config.yaml": strings.Replace(config, "      realm: "+authServer.URL+"\n", "", 1)})
	before := len(scopes)
	if err := find(load1(t, dir), "docker.io", "library/nginx"); !errors.Is(err, verify.ErrUnauthorized) || !strings.Contains(err.Error(), "set sources.mirrors[].realm: "+authServer.URL) || len(scopes) != before {
		t.Errorf("no realm: %v", err)
	}
}

// A registry that is its own mirror is told what the file has for it, and so is
// one of the command line.
func TestCredentialsOfOrigins(t *testing.T) {
	told := make(chan string, 10)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		told <- r.Header.Get("Authorization")
		w.Header().Set("WWW-Authenticate", "Basic realm=x")
		w.WriteHeader(401)
	}))
	defer srv.Close()
	defer http.DefaultClient.CloseIdleConnections()
	u, err := url.Parse(srv.URL)
	must(t, err)
	c := load1(t, write(t, with(notation(), "config.yaml", minimal+"sources: {credentials: auth.json}\n", "auth.json", `{"auths": {"`+u.Host+`": `+auth("u", "p")+`}}`)))
	c.Only(nil, []Mirror{{Host: "docker.io", URL: u}})
	n := verify.Name{Host: "docker.io", Path: "library/nginx"}
	err = c.Sources()(n)[0].Find(t.Context(), n, ocispec.Descriptor{Digest: digest.FromString("x")}, verify.NewBudget(notary.Kind, verify.Limits{}), nil)
	if !errors.Is(err, verify.ErrUnauthorized) || <-told != "" || <-told != "Basic dTpw" {
		t.Errorf("error %v", err)
	}
	var m registry.Mirror
	if m.Credentials = c.credentials.of(origin(u.Host), false); m.Credentials == nil {
		t.Error("an origin is told nothing")
	}
	srv.CloseClientConnections()
}

// FuzzCredentials: no panic, and nothing that a header cannot hold.
func FuzzCredentials(f *testing.F) {
	f.Add([]byte(`{"auths": {"a.b": {"auth": "dTpw"}}, "credHelpers": {"c.d": "x"}, "credsStore": "y"}`))
	f.Add([]byte(`{"auths": {"https://index.docker.io/v1/": {"identitytoken": "t"}}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		c, _, err := parseCredentials(raw, "")
		if err != nil {
			return
		}
		for e, l := range c.logins {
			if e.host == "" || strings.ContainsAny(l.credential.Username, ":\r\n") {
				t.Errorf("%q: %q", e, l.key)
			}
		}
		for _, l := range c.helper {
			if strings.ContainsAny(l.helper, "/. ") {
				t.Errorf("helper %q", l.helper)
			}
		}
	})
}

// A helper for everybody is asked about the hosts that this node's files name. Others
// are named by whoever writes a pod: its answer would be sent there.
func TestHelperIsAskedAboutNamedHosts(t *testing.T) {
	dir := helper(t, "x", `read -r key; echo "{\"Username\": \"u\", \"Secret\": \"$key\"}"`)
	certs := t.TempDir()
	fill(t, certs, map[string]string{"certs.example/hosts.toml": "", "_default/hosts.toml": "server = \"https://fallback.example\"\n"})
	scopes := trustPolicy(`scoped.example/app", "docker.io/library/nginx`)
	for _, network := range []string{"", "  network: origin\n"} {
		c := load1(t, write(t, with(notation(), "trustpolicy.json", scopes, "auth.json", `{"auths": {"entry.example": {}, "login.example": `+auth("v", "q")+`}, "credHelpers": {"own.example": "x"}, "credsStore": "x"}`,
			"config.yaml", minimal+"sources:\n"+network+"  credentials: auth.json\n  helpers: "+dir+"\n  certsDir: "+certs+"\n  mirrors:\n    - {host: mirrored.example, url: 'https://mirror.example'}\n")))
		h := c.hostSources(func(m registry.Mirror, named bool) registry.Mirror {
			m.Credentials = c.credentials.of(m.URL, named)
			return m
		})
		for host, want := range map[string]string{
			"pod.example": "", "10.1.2.3:8443": "", "scoped.example:444": "", "app.scoped.example": "",
			"scoped.example": "scoped.example", "docker.io": dockerHub, "certs.example": "certs.example", "mirrored.example": "mirrored.example",
			"entry.example": "entry.example", "own.example": "own.example", "login.example": "q",
		} {
			m := h.itself(host)
			got := ""
			if m.Credentials != nil {
				cred, err := m.Credentials(t.Context())
				must(t, err)
				got = cred.Password
			}
			if got != want {
				t.Errorf("%s: told %q, want %q", host, got, want)
			}
		}
		for _, m := range h.of("pod.example", nil) {
			if m.URL.Host == "fallback.example" && m.Credentials == nil || m.URL.Host == "pod.example" && m.Credentials != nil {
				t.Errorf("%s", m.URL)
			}
		}
	}
}
