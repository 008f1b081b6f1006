package config

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

// authority makes a self-signed CA certificate in PEM.
func authority(name string) []byte {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{Country: []string{"US"}, Organization: []string{"acme"}, CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// root is the CA that most tests share.
var root = sync.OnceValue(func() []byte { return authority("root") })

func trustPolicy(scope string) string {
	return `{
  "version": "1.0",
  "trustPolicies": [{
    "name": "prod",
    "registryScopes": ["` + scope + `"],
    "signatureVerification": {"level": "strict"},
    "trustStores": ["ca:acme"],
    "trustedIdentities": ["x509.subject: C=US, ST=WA, O=acme"]
  }]
}`
}

const minimal = "version: 1\nmode: audit\n"

// notation is a directory as notation keeps it.
func notation() map[string]string {
	return map[string]string{
		"trustpolicy.json":                 trustPolicy("docker.io/library/nginx"),
		"truststore/x509/ca/acme/root.crt": string(root()),
	}
}

func with(m map[string]string, more ...string) map[string]string {
	for i := 0; i < len(more); i += 2 {
		if m[more[i]] = more[i+1]; more[i+1] == "" {
			delete(m, more[i])
		}
	}
	return m
}

// write makes a directory of files.
func write(t testing.TB, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	fill(t, dir, files)
	return dir
}

func fill(t testing.TB, dir string, files map[string]string) {
	t.Helper()
	for name, text := range files {
		file := filepath.Join(dir, name)
		must(t, os.MkdirAll(filepath.Dir(file), 0o755))
		must(t, os.WriteFile(file, []byte(text), 0o644))
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func load1(t testing.TB, dir string) *Config {
	t.Helper()
	c, err := Load(dir)
	must(t, err)
	return c
}

func judgeItself(e *verify.Engine) verify.Evaluator { return e }

func TestNotationDirectoryEnforces(t *testing.T) {
	for _, name := range []string{"trustpolicy.json", "trustpolicy.oci.json"} {
		files := notation()
		text := files["trustpolicy.json"]
		delete(files, "trustpolicy.json")
		dir := write(t, with(files, name, text, "signingkeys.json", "{", "plugins/x", "y"))
		c := load1(t, dir)
		if c.Mode != verify.Enforce || c.Gate.Wait != DefaultWait || c.Limits != (verify.Limits{}) || len(c.Warnings) != 0 || c.Dir != dir {
			t.Errorf("%s: got %+v", name, c)
		}
		if len(c.Statements) != 1 || c.Statements[0].Name != "prod" || c.Revision == (verify.Revision{}) {
			t.Errorf("%s: got %+v", name, c)
		}
	}
}

func TestNoConfiguration(t *testing.T) {
	for name, dir := range map[string]string{
		"empty":   t.TempDir(),
		"missing": filepath.Join(t.TempDir(), "a", "b"),
		"store":   write(t, with(notation(), "trustpolicy.json", "")),
	} {
		if c, err := Load(dir); !errors.Is(err, ErrNone) || c != nil || !strings.Contains(err.Error(), dir) {
			t.Errorf("%s: got %v, %v", name, c, err)
		}
	}
	if _, err := Load(""); err == nil {
		t.Error("a directory without a name was read")
	}
}

// The example in the documentation loads, and every key of it has a row.
func TestDocumentation(t *testing.T) {
	doc, err := os.ReadFile("../../docs/configuration.md")
	must(t, err)
	_, rest, _ := strings.Cut(string(doc), "```yaml\n")
	example, _, found := strings.Cut(rest, "```\n")
	if !found {
		t.Fatal("no example")
	}
	cert, key := pairOf(t, "node")
	dir := write(t, with(notation(), "trustpolicy.json", trustPolicy("*"), "config.yaml", example, "mirror-ca.crt", string(root()), "node.crt", cert, "node.key", key, "auth.json", `{"auths": {"mirror.site.internal:5000": `+auth("u", "p")+`}}`, "allow/k3s.txt", digest.FromString("pause").String()+"\n"))
	c := load1(t, dir)
	if c.Mode != verify.Enforce || len(c.Mirrors) != 3 || len(c.Layouts) != 1 ||
		c.Limits != (verify.Limits{Referrers: 100, Wall: 5 * time.Second}) ||
		!reflect.DeepEqual(c.Gate, Gate{Wait: 20 * time.Millisecond, Snapshotters: []string{"stargz"}, Runtimes: []string{"io.containerd.kata.v2"}}) {
		t.Errorf("got %+v", c)
	}
	if m := c.Mirrors[0]; m.Host != "docker.io" || m.URL.String() != "https://mirror.site.internal:5000" || m.CA != filepath.Join(dir, "mirror-ca.crt") || m.roots == nil ||
		m.Cert != filepath.Join(dir, "node.crt") || m.Key != filepath.Join(dir, "node.key") || m.pair == nil || m.Realm.String() != "https://auth.site.internal" || m.NS {
		t.Errorf("got %+v", m)
	}
	if c.Network != NetworkMirrors || len(c.Aliases) != 1 || len(c.Mirrors[0].Rewrite) != 1 || c.Mirrors[0].Rewrite[0].To != "platform/rancher/$1" {
		t.Errorf("got %+v", c)
	}
	if len(c.AllowDigests) != 1 || c.AllowDigests[0].File != "allow/k3s.txt" || c.AllowDigests[0].Digest != digest.FromString("pause") {
		t.Errorf("allowDigests %+v", c.AllowDigests)
	}
	if !c.Mirrors[2].NS || c.Credentials != filepath.Join(dir, "auth.json") || c.Helpers != "/usr/local/lib/tidewaiter" {
		t.Errorf("got %+v", c)
	}
	if c.Metrics != (Metrics{Listen: "127.0.0.1:9464", File: "/var/lib/node_exporter/textfile/tidewaiter.prom"}) {
		t.Errorf("metrics %+v", c.Metrics)
	}
	if len(c.Warnings) != 1 || c.Warnings[0].Field != "sources.mirrors[1].url" {
		t.Errorf("warnings %v", c.Warnings)
	}
	for _, key := range []string{
		"version", "mode", "sources.mirrors", "….host", "….url", "….ca", "….cert`, `….key", "….realm", "….ns", "….rewrite", "….blobHosts", "sources.blobHosts", "sources.network", "sources.certsDir", "aliases", "sources.credentials", "sources.helpers", "sources.layouts", "sources.retention` | 720h |", "sources.refreshInterval` | 24h |",
		"limits.pages` | 24 |", "limits.referrers` | 200 |", "limits.signatures` | 100 |", "limits.certificates` | 10 |",
		"limits.manifestBytes` | 4194304 |", "limits.envelopeBytes` | 262144 |", "limits.totalBytes` | 16777216 |", "limits.timeout` | 10s |",
		"gate.wait` | 50ms |", "gate.snapshotters", "gate.runtimes", "allowDigests", "runningContainers", "metrics.listen", "metrics.file",
	} {
		if !strings.Contains(string(doc), "| `"+key) {
			t.Errorf("no row for %s", key)
		}
	}
	if d := (verify.Limits{Pages: 24, Referrers: 200, Signatures: 100, Certificates: 10, ManifestBytes: 4194304, EnvelopeBytes: 262144, TotalBytes: 16777216, Wall: 10 * time.Second}); d != verify.DefaultLimits {
		t.Errorf("the documented limits are not %+v", verify.DefaultLimits)
	}
}

// What runs is only reported, unless the file says otherwise.
func TestRunning(t *testing.T) {
	for text, want := range map[string]bool{"": false, "runningContainers: report\n": false, "runningContainers: stop\n": true} {
		c := load1(t, write(t, with(notation(), "config.yaml", "version: 1\nmode: enforce\n"+text)))
		if c.StopRunning != want || len(c.Warnings) > 0 != want { // there is nothing to stop yet
			t.Errorf("%q: stops %v, warnings %v", text, c.StopRunning, c.Warnings)
		}
	}
	c := load1(t, write(t, with(notation(), "config.yaml", minimal+"runningContainers: stop\n")))
	if len(c.Warnings) != 1 || c.Warnings[0].Field != "runningContainers" {
		t.Errorf("in audit: warnings %v", c.Warnings)
	}
}

// How often signatures are looked for again has a default, and can be never.
func TestRefresh(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"": 24 * time.Hour, "never": 0, "10m": 10 * time.Minute, "168h": 168 * time.Hour, "8784h": 8784 * time.Hour,
	} {
		yaml := minimal
		if text != "" {
			yaml += "sources: {refreshInterval: " + text + "}\n"
		}
		if c := load1(t, write(t, with(notation(), "config.yaml", yaml))); c.Refresh != want {
			t.Errorf("%q: every %v", text, c.Refresh)
		}
	}
}

// Whether metrics can be offered is not looked at: it must not cost the policy.
func TestMetrics(t *testing.T) {
	c := load1(t, write(t, with(notation(), "config.yaml", minimal+"metrics: {listen: '192.0.2.1:1', file: /none/./such/x.prom}\n")))
	if c.Metrics != (Metrics{Listen: "192.0.2.1:1", File: "/none/such/x.prom"}) || len(c.Warnings) != 1 || c.Warnings[0].Field != "metrics.listen" {
		t.Errorf("got %+v, warnings %v", c.Metrics, c.Warnings)
	}
	c = load1(t, write(t, with(notation(), "config.yaml", minimal+"metrics: {listen: '[::1]:9464'}\n")))
	if c.Metrics != (Metrics{Listen: "[::1]:9464"}) || len(c.Warnings) != 0 {
		t.Errorf("got %+v, warnings %v", c.Metrics, c.Warnings)
	}
	dir := write(t, notation())
	must(t, os.WriteFile(filepath.Join(dir, "config.yaml"), []byte(minimal+"metrics: {file: "+dir+"/x.prom}\n"), 0o644))
	if _, err := Load(dir); err == nil || !strings.Contains(err.Error(), ":3: metrics.file: must not lie in the configuration directory") {
		t.Errorf("got %v", err)
	}
}

// Each error of config.yaml names the file, the line and the field.
func TestConfigErrors(t *testing.T) {
	mirror := func(rest string) string { return minimal + "sources:\n  mirrors:\n    - " + rest }
	for name, c := range map[string]struct{ yaml, want string }{
		"empty":               {"# nothing\n", ": is empty"},
		"null":                {"---\n", ":2: the file must be a mapping of version, mode"},
		"list":                {"- a\n", ":1: the file must be a mapping"},
		"syntax":              {"version: 1\nmode: [enforce\n", ": not YAML: "},
		"syntax in line 1":    {"}\n", ":1: not YAML: "},
		"tab":                 {"version: 1\nsources:\n\tmirrors: []\n", ":3: not YAML: found character that cannot start any token"},
		"two documents":       {minimal + "---\nversion: 1\n", ":3: has more than one document"},
		"control character":   {minimal + "\x01", ":1: not YAML: control characters"},
		"not UTF-8":           {"version: 1\nmode: \"\xff\"\n", "not YAML: "},
		"too long":            {minimal + strings.Repeat("#", 1<<20), ": larger than 1048576 bytes"},
		"nested":              {strings.Repeat("[", 1<<19), ": not YAML: exceeded max depth"},
		"anchor":              {"version: &v 1\nmode: audit\n", ":1: anchors and aliases are not supported"},
		"bomb":                {"a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c]\n", ":1: anchors"},
		"merge":               {minimal + "<<: {gate: {wait: 1ms}}\n", ":3: <<: unknown key"},
		"unknown":             {minimal + "rules: []\n", ":3: rules: unknown key; known are version, mode, sources, limits, gate, allowDigests"},
		"upper-case":          {"Version: 1\n", ":1: Version: unknown key"},
		"key twice":           {minimal + "mode: audit\n", ":3: mode: given twice"},
		"quoted key twice":    {minimal + "\"mode\": audit\n", ":3: mode: given twice"},
		"number as key":       {minimal + "1: 2\n", ":3: 1: unknown key"},
		"list as key":         {minimal + "[a]: 2\n", "unknown key"},
		"no version":          {"mode: audit\n", ":1: version: is required"},
		"version 2":           {"mode: audit\nversion: 2\n", ":2: version: must be 1"},
		"version 1.0":         {"version: 1.0\n", ":1: version: must be a whole number"},
		"version as text":     {"version: \"1\"\n", ":1: version: must be a whole number"},
		"metrics":             {minimal + "metrics: true\n", ":3: metrics: must be a mapping of listen, file"},
		"metrics unknown":     {minimal + "metrics: {port: 1}\n", ":3: metrics.port: unknown key"},
		"metrics name":        {minimal + "metrics:\n  listen: localhost:9464\n", ":4: metrics.listen: must be an IP address and a port"},
		"metrics no port":     {minimal + "metrics: {listen: 127.0.0.1}\n", ":3: metrics.listen: must be an IP address and a port"},
		"metrics port 0":      {minimal + "metrics: {listen: '127.0.0.1:0'}\n", ":3: metrics.listen: must be an IP address and a port"},
		"metrics zone":        {minimal + "metrics: {listen: '[fe80::1%eth0]:9464'}\n", ":3: metrics.listen: must be an IP address and a port"},
		"metrics relative":    {minimal + "metrics: {file: x.prom}\n", ":3: metrics.file: must be the absolute path"},
		"metrics other file":  {minimal + "metrics: {file: /etc/passwd}\n", ":3: metrics.file: must be the absolute path of a file whose name ends in .prom"},
		"running":             {minimal + "runningContainers: restart\n", ":3: runningContainers: \"restart\" is not report or stop"},
		"running number":      {minimal + "runningContainers: 1\n", ":3: runningContainers: must be text"},
		"no mode":             {"version: 1\n", ":1: mode: is required: enforce or audit"},
		"bad mode":            {"version: 1\nmode: Enforce\n", `:2: mode: "Enforce" is not enforce or audit`},
		"mode null":           {"version: 1\nmode:\n", ":2: mode: must be text"},
		"mode with tag":       {"version: 1\nmode: !x audit\n", ":2: mode: must be text"},
		"sources null":        {minimal + "sources:\n", ":3: sources: must be a mapping of network, certsDir, acceptPlainHTTP, mirrors, layouts"},
		"allowlist text":      {minimal + "allowDigests: a.txt\n", ":3: allowDigests: must be a list"},
		"allowlist empty":     {minimal + "allowDigests: []\n", ":3: allowDigests: is empty"},
		"allowlist not there": {minimal + "allowDigests: [allow/none.txt]\n", ":3: allowDigests[0]: "},
		"allowlist number":    {minimal + "allowDigests: [1]\n", ":3: allowDigests[0]: must be text"},
		"sources list":        {minimal + "sources: []\n", ":3: sources: must be a mapping"},
		"network":             {minimal + "sources:\n  network: auto\n", ":4: sources.network: \"auto\" is not never, mirrors or origin"},
		"network list":        {minimal + "sources:\n  network: [never]\n", ":4: sources.network: must be text"},
		"hosts":               {minimal + "sources:\n  certsDir: certs.d\n", ":4: sources.certsDir: must be auto, none or absolute paths"},
		"rewrite":             {minimal + "sources:\n  mirrors: [{host: a.b, url: 'http://a.b', rewrite: {'(': x}}]\n", `:4: sources.mirrors[0].rewrite: "(" is no regular expression`},
		"rewrite list":        {minimal + "sources:\n  mirrors: [{host: a.b, url: 'http://a.b', rewrite: [x]}]\n", ":4: sources.mirrors[0].rewrite: must be a mapping"},
		"rewrite twice":       {minimal + "sources:\n  mirrors: [{host: a.b, url: 'http://a.b', rewrite: {x: y, x: z}}]\n", `:4: sources.mirrors[0].rewrite: "x" is given twice`},
		"alias":               {minimal + "aliases: [{from: a.b}]\n", ":3: aliases[0].to: is required"},
		"alias host":          {minimal + "aliases: [{from: '*', to: a.b}]\n", ":3: aliases[0]: scope"},
		"alias path":          {minimal + "aliases: [{from: a.b/C, to: a.b}]\n", ":3: aliases[0]: scope"},
		"alias itself":        {minimal + "aliases: [{from: docker.io, to: index.docker.io/}]\n", ":3: aliases[0]: scope"},
		"aliases":             {minimal + "aliases: [" + strings.Repeat("a,", 101) + "]\n", ":3: aliases: has more than 100"},
		"mirrors mapping":     {minimal + "sources:\n  mirrors: {host: a}\n", ":4: sources.mirrors: must be a list"},
		"mirrors empty":       {minimal + "sources:\n  mirrors: []\n", ":4: sources.mirrors: is empty"},
		"many mirrors":        {minimal + "sources:\n  mirrors: [" + strings.Repeat("a,", 101) + "]\n", ":4: sources.mirrors: has more than 100"},
		"mirror text":         {mirror("a"), ":5: sources.mirrors[0]: must be a mapping"},
		"no host":             {mirror("url: https://a.b"), ":5: sources.mirrors[0].host: is required"},
		"no url":              {mirror("host: a.b"), ":5: sources.mirrors[0].url: is required"},
		"host with path":      {mirror("host: a.b/c\n      url: https://a.b"), ":5: sources.mirrors[0].host: \"a.b/c\" is not a registry's host"},
		"host with scheme":    {mirror("host: https://a.b\n      url: https://a.b"), ":5: sources.mirrors[0].host: "},
		"host empty":          {mirror("host: \"\"\n      url: https://a.b"), ":5: sources.mirrors[0].host: "},
		"host null":           {mirror("host:\n      url: https://a.b"), ":5: sources.mirrors[0].host: must be text"},
		"url scheme":          {mirror("host: a.b\n      url: ftp://a.b"), ":6: sources.mirrors[0].url: must start with http"},
		"url bare":            {mirror("host: a.b\n      url: a.b:5000"), ":6: sources.mirrors[0].url: is not a URL"},
		"url host":            {mirror("host: a.b\n      url: https:///x"), ":6: sources.mirrors[0].url: "},
		"url port":            {mirror("host: a.b\n      url: https://a.b:70000"), ":6: sources.mirrors[0].url: \"70000\" is not a port"},
		"url password":        {mirror("host: a.b\n      url: https://u:geheim@a.b"), ":6: sources.mirrors[0].url: must not hold a user"},
		"url password, bad":   {mirror("host: a.b\n      url: https://u:geheim@a.b:x"), ":6: sources.mirrors[0].url: is not a URL"},
		"url query":           {mirror("host: a.b\n      url: https://a.b?ns=x"), ":6: sources.mirrors[0].url: must not have a query"},
		"url empty query":     {mirror("host: a.b\n      url: https://a.b?"), ":6: sources.mirrors[0].url: must not have a query"},
		"url fragment":        {mirror("host: a.b\n      url: \"https://a.b#x\""), ":6: sources.mirrors[0].url: must not have a query or fragment"},
		"url path":            {mirror("host: a.b\n      url: https://a.b/../x"), ":6: sources.mirrors[0].url: has a path"},
		"url escaped path":    {mirror("host: a.b\n      url: https://a.b/a%2fb"), ":6: sources.mirrors[0].url: has a path"},
		"mirror twice":        {mirror("{host: docker.io, url: https://a.b}\n    - {host: Docker.io, url: https://a.b/}"), ":6: sources.mirrors[1]: host docker.io is listed with this URL before"},
		"ca missing":          {mirror("{host: a.b, url: https://a.b,\n       ca: none.crt}"), ":6: sources.mirrors[0].ca: \"none.crt\": "},
		"ca missing outside":  {mirror("{host: a.b, url: https://a.b,\n       ca: /nonexistent/ca.crt}"), ":6: sources.mirrors[0].ca: \"/nonexistent/ca.crt\": open /nonexistent/ca.crt: no such file"},
		"ca directory":        {mirror("{host: a.b, url: https://a.b,\n       ca: truststore}"), "truststore: not a regular file"},
		"ca no PEM":           {mirror("{host: a.b, url: https://a.b,\n       ca: config.yaml}"), "holds no certificate in PEM"},
		"ca empty":            {mirror("{host: a.b, url: https://a.b,\n       ca: \"\"}"), ":6: sources.mirrors[0].ca: must be a file"},
		"ca with http":        {mirror("{host: a.b, url: http://a.b,\n       ca: config.yaml}"), ":6: sources.mirrors[0].ca: has no use without https"},
		"redirects text":      {mirror("{host: a.b, url: https://a.b,\n       blobHosts: c.d}"), ":6: sources.mirrors[0].blobHosts: must be a list"},
		"redirects empty":     {mirror("{host: a.b, url: https://a.b,\n       blobHosts: []}"), ":6: sources.mirrors[0].blobHosts: is empty: leave it out"},
		"redirects URL":       {mirror("{host: a.b, url: https://a.b,\n       blobHosts: [c.d, \"https://c.d\"]}"), ":6: sources.mirrors[0].blobHosts[1]: has no port from 1 to 65535"},
		"redirects path":      {mirror("{host: a.b, url: https://a.b,\n       blobHosts: [c.d/x]}"), ":6: sources.mirrors[0].blobHosts[0]: must be a host"},
		"redirects wide":      {mirror("{host: a.b, url: https://a.b,\n       blobHosts: [\"*.com\"]}"), `:6: sources.mirrors[0].blobHosts[0]: must have a domain behind "*.", with a dot in it`},
		"redirects twice":     {mirror("{host: a.b, url: https://a.b,\n       blobHosts: [C.d, \"c.d:443\"]}"), ":6: sources.mirrors[0].blobHosts[1]: is listed twice"},
		"redirects by http":   {mirror("{host: a.b, url: http://a.b,\n       blobHosts: [c.d]}"), ":6: sources.mirrors[0].blobHosts: has no use without https"},
		"redirects number":    {minimal + "sources:\n  blobHosts: [1]\n", ":4: sources.blobHosts[0]: must be text"},
		"redirects of never":  {minimal + "sources:\n  network: never\n  blobHosts: [c.d]\n", ":5: sources.blobHosts: has no use with network: never"},
		"mirror's user":       {mirror("{host: a.b, url: https://a.b,\n       user: x}"), ":6: sources.mirrors[0].user: unknown key"},
		"layouts text":        {minimal + "sources:\n  layouts: /a\n", ":4: sources.layouts: must be a list"},
		"layout relative":     {minimal + "sources:\n  layouts: [a]\n", ":4: sources.layouts[0]: must be the absolute path"},
		"layout number":       {minimal + "sources:\n  layouts: [1]\n", ":4: sources.layouts[0]: must be text"},
		"keep too short":      {minimal + "sources:\n  retention: 59m\n", ":4: sources.retention: must be from 1h0m0s to "},
		"refresh too often":   {minimal + "sources:\n  refreshInterval: 599s\n", ":4: sources.refreshInterval: must be never, or from 10m0s to 8784h0m0s: each image of the node is asked about as often"},
		"refresh too seldom":  {minimal + "sources:\n  refreshInterval: 8785h\n", ":4: sources.refreshInterval: must be never, or from "},
		"refresh negative":    {minimal + "sources:\n  refreshInterval: -24h\n", ":4: sources.refreshInterval: must be never, or from "},
		"refresh in days":     {minimal + "sources:\n  refreshInterval: 1d\n", ":4: sources.refreshInterval: must be never, or a duration with its unit, for example 24h"},
		"refresh no unit":     {minimal + "sources:\n  refreshInterval: 24\n", ":4: sources.refreshInterval: must be never, or a duration with its unit"},
		"refresh list":        {minimal + "sources:\n  refreshInterval: [24h]\n", ":4: sources.refreshInterval: must be never, or a duration with its unit"},
		"refresh null":        {minimal + "sources:\n  refreshInterval: \n", ":4: sources.refreshInterval: must be never, or a duration with its unit"},
		"keep in days":        {minimal + "sources:\n  retention: 30d\n", ":4: sources.retention: must be a duration"},
		"layout twice":        {minimal + "sources:\n  layouts: [/a, /b/../a/]\n", ":4: sources.layouts[1]: is listed twice"},
		"limits unknown":      {minimal + "limits:\n  referers: 1\n", ":4: limits.referers: unknown key; known are pages, referrers"},
		"limits zero":         {minimal + "limits: {pages: 0}\n", ":3: limits.pages: must be from 1 to 100"},
		"limits negative":     {minimal + "limits: {signatures: -1}\n", ":3: limits.signatures: must be from 1 to 1000"},
		"limits large":        {minimal + "limits: {certificates: 51}\n", ":3: limits.certificates: must be from 1 to 50"},
		"limits overflow":     {minimal + "limits: {referrers: 99999999999999999999}\n", ":3: limits.referrers: must be a whole number"},
		"limits text":         {minimal + "limits: {totalBytes: 16MiB}\n", ":3: limits.totalBytes: must be a whole number"},
		"limits bytes":        {minimal + "limits: {envelopeBytes: 16383}\n", ":3: limits.envelopeBytes: must be from 16384 to 4194304"},
		"limits manifest":     {minimal + "limits: {manifestBytes: 16777217}\n", ":3: limits.manifestBytes: must be from 16384 to 16777216"},
		"limits total":        {minimal + "limits: {totalBytes: 1024, envelopeBytes: 16384, certificates: 1}\n", ":3: limits.totalBytes: must be from 32768 to"},
		"limits contradict":   {minimal + "limits: {totalBytes: 40000, envelopeBytes: 65536}\n", ":3: limits.envelopeBytes: is 65536, and no more than 40000 are read of everything"},
		"limits signatures":   {minimal + "limits:\n  signatures: 1000\n", ":4: limits.signatures: is 1000, and no more than 200 referrers are listed"},
		"refresh zero":        {minimal + "sources: {refreshInterval: 0}\n", ":3: sources.refreshInterval: must be never, if"},
		"refresh zero time":   {minimal + "sources: {refreshInterval: 0s}\n", ":3: sources.refreshInterval: must be never, if"},
		"limits wall":         {minimal + "limits: {timeout: 61s}\n", ":3: limits.timeout: must be from 100ms to 1m0s"},
		"wall without unit":   {minimal + "limits: {timeout: 10}\n", ":3: limits.timeout: must be a duration with its unit"},
		"gate unknown":        {minimal + "gate: {maxWaitPercent: 5}\n", ":3: gate.maxWaitPercent: unknown key"},
		"wait too long":       {minimal + "gate: {wait: 1001ms}\n", ":3: gate.wait: must be from 0s to 1s"},
		"wait negative":       {minimal + "gate: {wait: -1ms}\n", ":3: gate.wait: must be from 0s to 1s"},
		"wait list":           {minimal + "gate: {wait: [1ms]}\n", ":3: gate.wait: must be a duration"},
		"snapshotter":         {minimal + "gate: {snapshotters: [a/b]}\n", `:3: gate.snapshotters[0]: "a/b" is not a snapshotter`},
		"snapshotter twice":   {minimal + "gate:\n  snapshotters:\n    - a\n    - a\n", ":6: gate.snapshotters[1]: is listed twice"},
		"runtime":             {minimal + "gate: {runtimes: [\"a b\"]}\n", `:3: gate.runtimes[0]: "a b" is not a runtime type`},
		"runtimes empty":      {minimal + "gate: {runtimes: []}\n", ":3: gate.runtimes: is empty"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := write(t, with(notation(), "config.yaml", c.yaml))
			got, err := Load(dir)
			if err == nil || got != nil {
				t.Fatalf("got %+v, %v; want an error", got, err)
			}
			file := filepath.Join(dir, "config.yaml")
			if !strings.HasPrefix(err.Error(), file+":") || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "geheim") {
				t.Errorf("got  %v\nwant %s…%s", err, file, c.want)
			}
		})
	}
}

// Each error of the other files names the file.
func TestDirectoryErrors(t *testing.T) {
	for name, c := range map[string]struct {
		files map[string]string
		do    func(t *testing.T, dir string)
		want  string // after the directory
	}{
		"config alone":   {with(notation(), "trustpolicy.json", "", "config.yaml", minimal), nil, "/trustpolicy.json: there must be a trust policy beside config.yaml"},
		"config.yml":     {with(notation(), "config.yml", minimal), nil, "/config.yml: the name of this file must be config.yaml"},
		"two policies":   {with(notation(), "trustpolicy.oci.json", "{}"), nil, "/trustpolicy.oci.json: there is trustpolicy.json too"},
		"policy field":   {with(notation(), "trustpolicy.json", "{\n\"version\": \"1.0\",\n\"trustPolicys\": []}"), nil, "/trustpolicy.json:3: trustPolicys: unknown field"},
		"policy cut":     {with(notation(), "trustpolicy.json", trustPolicy("*")[:100]), nil, "/trustpolicy.json:6: not JSON: unexpected end"},
		"policy empty":   {notation(), func(t *testing.T, dir string) { must(t, os.Truncate(dir+"/trustpolicy.json", 0)) }, "/trustpolicy.json:1: not JSON"},
		"policy large":   {with(notation(), "trustpolicy.json", strings.Repeat(" ", 1<<20+1)), nil, "/trustpolicy.json: larger than 1048576 bytes"},
		"certificate":    {with(notation(), "truststore/x509/ca/acme/root.crt", "x"), nil, "/truststore: "},
		"other file":     {with(notation(), "truststore/x509/ca/acme/README", "x"), nil, "/truststore: "},
		"deep":           {with(notation(), "truststore/x509/ca/acme/old/a.crt", "x"), nil, "/truststore/x509/ca/acme/old: a directory this deep"},
		"large file":     {with(notation(), "truststore/x509/ca/acme/a.crt", strings.Repeat(" ", 1<<20+1)), nil, "/truststore/x509/ca/acme/a.crt: larger than"},
		"store is file":  {with(notation(), "truststore/x509/ca/acme/root.crt", "", "truststore", "x"), nil, "/truststore: not a directory"},
		"file is dir":    {notation(), func(t *testing.T, dir string) { must(t, os.Mkdir(dir+"/config.yaml", 0o755)) }, "/config.yaml: not a regular file"},
		"pipe":           {notation(), func(t *testing.T, dir string) { must(t, syscall.Mkfifo(dir+"/config.yaml", 0o644)) }, "/config.yaml: not a regular file"},
		"link out":       {notation(), func(t *testing.T, dir string) { must(t, os.Symlink("/etc/hostname", dir+"/config.yaml")) }, "/config.yaml: a link that leads nowhere or out of"},
		"link up":        {notation(), func(t *testing.T, dir string) { must(t, os.Symlink("../../etc/hostname", dir+"/config.yaml")) }, "/config.yaml: a link that leads nowhere or out of"},
		"link nowhere":   {notation(), func(t *testing.T, dir string) { must(t, os.Symlink("none", dir+"/config.yaml")) }, "/config.yaml: a link that leads nowhere or out of"},
		"link loop":      {notation(), func(t *testing.T, dir string) { must(t, os.Symlink("config.yaml", dir+"/config.yaml")) }, "/config.yaml: a link that leads nowhere"},
		"store out":      {notation(), func(t *testing.T, dir string) { must(t, os.Symlink("/etc", dir+"/truststore/x509/tsa")) }, "/truststore/x509/tsa: a link that leads nowhere or out of"},
		"store loop":     {notation(), func(t *testing.T, dir string) { must(t, os.Symlink("../..", dir+"/truststore/x509/ca/all")) }, "/truststore/x509/ca/all/"},
		"writable file":  {notation(), func(t *testing.T, dir string) { must(t, os.Chmod(dir+"/trustpolicy.json", 0o646)) }, "/trustpolicy.json: everybody can write this file"},
		"writable cert":  {notation(), func(t *testing.T, dir string) { must(t, os.Chmod(dir+"/truststore/x509/ca/acme/root.crt", 0o666)) }, "/truststore/x509/ca/acme/root.crt: everybody can write"},
		"writable store": {notation(), func(t *testing.T, dir string) { must(t, os.Chmod(dir+"/truststore/x509/ca/acme", 0o777)) }, "/truststore/x509/ca/acme: everybody can write this directory"},
		"writable":       {notation(), func(t *testing.T, dir string) { must(t, os.Chmod(dir, 0o1777)) }, ": everybody can write this directory"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := write(t, c.files)
			if c.do != nil {
				c.do(t, dir)
			}
			got, err := Load(dir)
			if err == nil || got != nil {
				t.Fatalf("got %+v, %v; want an error", got, err)
			}
			if !strings.HasPrefix(err.Error(), dir+c.want) {
				t.Errorf("got  %v\nwant %s%s", err, dir, c.want)
			}
		})
	}
}

// publish puts files into dir as the kubelet mounts a ConfigMap: a fresh directory,
// a link to it that is replaced in one step, and links through that.
func publish(t testing.TB, dir, version string, files map[string]string) {
	t.Helper()
	fill(t, filepath.Join(dir, "..v"+version), files)
	tmp := filepath.Join(dir, "..data_tmp")
	must(t, os.Symlink("..v"+version, tmp))
	must(t, os.Rename(tmp, filepath.Join(dir, "..data")))
	for name := range files {
		top, _, _ := strings.Cut(name, "/")
		if err := os.Symlink("..data/"+top, filepath.Join(dir, top)); err != nil && !os.IsExist(err) {
			t.Fatal(err)
		}
	}
}

func TestConfigMap(t *testing.T) {
	dir := t.TempDir()
	publish(t, dir, "1", with(notation(), "config.yaml", minimal))
	c := load1(t, dir)
	if c.Mode != verify.Audit {
		t.Errorf("got %+v", c)
	}
	// The same files are the same configuration, links or not.
	if flat := load1(t, write(t, with(notation(), "config.yaml", minimal))); flat.Revision != c.Revision {
		t.Errorf("revisions %s and %s", flat.Revision, c.Revision)
	}
	// A trust store that is a ConfigMap of its own.
	dir = write(t, with(notation(), "truststore/x509/ca/acme/root.crt", ""))
	must(t, os.MkdirAll(dir+"/truststore/x509/ca/acme", 0o755))
	publish(t, dir+"/truststore/x509/ca/acme", "1", map[string]string{"root.crt": string(root())})
	load1(t, dir)
}

// The revision changes with every file that is read and with nothing else; the
// requirement of a statement with its trust stores.
func TestEpoch(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "ca.crt")
	must(t, os.WriteFile(outside, root(), 0o644))
	base := with(notation(), "config.yaml", minimal+"sources: {mirrors: [{host: a.b, url: https://a.b, ca: "+outside+"}]}\n")
	dir := write(t, base)
	first := load1(t, dir)
	requirement := func(c *Config) [32]byte {
		s, err := c.Snapshot(judgeItself, time.Now)
		must(t, err)
		if s.Revision != c.Revision || s.Mode != c.Mode || s.Wait != c.Gate.Wait || s.Evaluator == nil {
			t.Fatalf("setup %+v of %+v", s, c)
		}
		return s.Policy.Select(verify.Image{Name: verify.Name{Host: "docker.io", Path: "library/nginx"}}).Require.Hash()
	}
	if requirement(first) == [32]byte{} {
		t.Fatal("no requirement")
	}
	seen := map[verify.Revision]string{first.Revision: "first"}
	step := func(what string, changed, stricter bool, do func()) {
		t.Helper()
		before := load1(t, dir)
		do()
		c := load1(t, dir)
		if changed == (c.Revision == before.Revision) {
			t.Errorf("%s: revision %s, before %s", what, c.Revision, before.Revision)
		}
		if other, dup := seen[c.Revision]; changed && dup {
			t.Errorf("%s: the revision is that of %s", what, other)
		}
		seen[c.Revision] = what
		if (requirement(c) != requirement(before)) != stricter {
			t.Errorf("%s: requirement changed: %v", what, !stricter)
		}
	}
	file := func(name, text string) func() { return func() { fill(t, dir, map[string]string{name: text}) } }
	step("nothing", false, false, func() {})
	step("touch", false, false, func() { must(t, os.Chtimes(dir+"/config.yaml", time.Now(), time.Now().Add(time.Hour))) })
	step("other file", false, false, file("notes.txt", "x"))
	step("kubernetes' file", false, false, file("truststore/x509/ca/acme/..x/y.crt", "x"))
	step("comment", true, false, file("config.yaml", base["config.yaml"]+"# x\n"))
	step("trust policy", true, false, file("trustpolicy.json", trustPolicy("docker.io/library/nginx")+"\n"))
	step("certificate added", true, true, file("truststore/x509/ca/acme/two.crt", string(authority("two"))))
	step("certificate replaced", true, true, file("truststore/x509/ca/acme/two.crt", string(authority("three"))))
	step("certificate renamed", true, true, func() {
		must(t, os.Rename(dir+"/truststore/x509/ca/acme/two.crt", dir+"/truststore/x509/ca/acme/a.crt"))
	})
	step("certificate removed", true, true, func() { must(t, os.Remove(dir+"/truststore/x509/ca/acme/root.crt")) })
	step("other store", true, false, file("truststore/x509/ca/other/root.crt", string(root())))
	step("mirror's CA", true, false, func() { must(t, os.WriteFile(outside, authority("mirror"), 0o644)) })
}

func TestEpochIsUnambiguous(t *testing.T) {
	of := func(c ...content) verify.Revision { return (&directory{read: c}).revision() }
	a, b := of(content{"a", []byte("bc")}), of(content{"ab", []byte("c")})
	both := of(content{"a", nil}, content{"b", []byte("c")})
	if a == b || a == both || b == both || both != of(content{"b", []byte("c")}, content{"a", nil}) {
		t.Error(a, b, both)
	}
}

// A mirror of the image's host is asked, else that of "*", else the host itself;
// layouts always, and first.
func TestSources(t *testing.T) {
	c := load1(t, write(t, with(notation(), "config.yaml", minimal+`sources:
  mirrors:
    - {host: Index.Docker.io, url: "https://one.site:5000"}
    - {host: docker.io, url: "http://10.0.0.5:5000/hub/"}
    - {host: "[2001:DB8:0::1]:5000", url: "https://[2001:db8::2]"}
    - {host: "*", url: "https://rest.site"}
  layouts: [/media/usb]
  retention: 48h
`)))
	if c.Keep != 48*time.Hour {
		t.Errorf("keep is %v", c.Keep)
	}
	names := func(c *Config, host string) string {
		var list []string
		for _, s := range c.Sources()(verify.Name{Host: host, Path: "a"}) {
			list = append(list, s.Name())
		}
		return strings.Join(list, ", ")
	}
	for host, want := range map[string]string{
		"docker.io":            "layout /media/usb, mirror https://one.site:5000, mirror http://10.0.0.5:5000/hub",
		"[2001:db8::1]:5000":   "layout /media/usb, mirror https://[2001:db8::2]",
		"registry.acme.io:444": "layout /media/usb, mirror https://rest.site",
		"*":                    "layout /media/usb, mirror https://rest.site",
	} {
		if got := names(c, host); got != want {
			t.Errorf("%s: %s, want %s", host, got, want)
		}
	}
	c = load1(t, write(t, notation()))
	for host, want := range map[string]string{
		"docker.io":        "mirror https://registry-1.docker.io",
		"localhost:5000":   "mirror https://localhost:5000",
		"[2001:db8::1]:80": "mirror https://[2001:db8::1]:80",
	} {
		if got := names(c, host); got != want {
			t.Errorf("%s: %s, want %s", host, got, want)
		}
	}
	if list := c.Sources()(verify.Name{}); len(list) != 1 || list[0].Find(context.Background(), verify.Name{}, ocispec.Descriptor{Digest: digest.FromString("x")}, verify.NewBudget(notary.Kind, verify.Limits{}), nil) == nil {
		t.Errorf("the nameless image is looked for at %v", list)
	}
}

// The CA of a mirror is the only one that its certificate may come from.
func TestMirrorCA(t *testing.T) {
	asked := 0
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked++
		w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
		w.Write([]byte(`{"schemaVersion": 2, "mediaType": "` + ocispec.MediaTypeImageIndex + `", "manifests": []}`))
	}))
	srv.Config.ErrorLog = log.New(io.Discard, "", 0) // the refused handshake
	srv.StartTLS()
	defer srv.Close()
	right := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	find := func(ca []byte) error {
		c := load1(t, write(t, with(notation(), "ca.crt", "text around\n"+string(ca), "config.yaml",
			minimal+"sources: {mirrors: [{host: \"*\", url: \""+srv.URL+"\", ca: ca.crt}]}\n")))
		n := verify.Name{Host: "docker.io", Path: "library/nginx"}
		s := c.Sources()(n)[0]
		subject := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("x"), Size: 1}
		return s.Find(t.Context(), n, subject, verify.NewBudget(notary.Kind, verify.Limits{}), func(verify.Evidence) bool { return true })
	}
	if err := find(root()); !errors.Is(err, verify.ErrUnreachable) || asked != 0 {
		t.Errorf("another CA: %v after %d requests", err, asked)
	}
	if err := find(bytes.Join([][]byte{root(), right}, nil)); err != nil || asked != 1 {
		t.Errorf("its CA: %v after %d requests", err, asked)
	}
	srv.CloseClientConnections()
}

// A whole denial from a configuration: nothing signed is anywhere.
func TestSetupDenies(t *testing.T) {
	c := load1(t, write(t, with(notation(), "config.yaml", "version: 1\nmode: enforce\nsources: {layouts: [/nonexistent], mirrors: [{host: \"*\", url: \"http://127.0.0.1:1\"}]}\n")))
	s, err := c.Snapshot(judgeItself, time.Now)
	must(t, err)
	var e verify.Decider
	e.Swap(s)
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("x"), Size: 1}
	img := verify.Image{
		Name: verify.Name{Host: "docker.io", Path: "library/nginx"}, Target: d, Manifest: d,
		Config: digest.FromString("c"), Use: verify.UseQuestion, Binding: verify.BoundDigest,
	}
	if got := e.Verify(t.Context(), img); got.Allowed() || got.Reason != verify.SourceUnreachable || got.Rule != "prod" || len(got.Tried) != 2 || got.Revision != c.Revision {
		t.Errorf("got %+v", got)
	}
	img.Name.Path = "library/other"
	if got := e.Verify(t.Context(), img); got.Allowed() || got.Reason != verify.PolicyNoMatch || len(got.Tried) != 0 {
		t.Errorf("got %+v", got)
	}
}

func TestWarnings(t *testing.T) {
	c := load1(t, write(t, with(notation(), "trustpolicy.json", strings.Replace(trustPolicy("*"), "strict", "audit", 1))))
	if len(c.Warnings) != 1 || c.Warnings[0].Statement != "prod" {
		t.Errorf("got %v", c.Warnings)
	}
	s, err := c.Snapshot(judgeItself, time.Now)
	must(t, err)
	if r := s.Policy.Select(verify.Image{Name: verify.Name{Host: "a.b", Path: "c"}}); r.Fixed != verify.PolicyInvalid {
		t.Errorf("got %+v", r)
	}
}

// FuzzConfig: no panic, no hang, and what is accepted is inside its bounds and
// runs.
func FuzzConfig(f *testing.F) {
	for _, s := range []string{
		minimal, minimal + "gate: {wait: 0s, snapshotters: [a]}\n", minimal + "limits: {pages: 0x10, timeout: 1m}\n",
		minimal + "sources:\n  mirrors: [{host: \"*\", url: \"http://[::1]:5000/a\"}]\n  layouts: [/a]\n",
		minimal + "sources:\n  mirrors: [{host: \"*\", url: \"https://a.b\", blobHosts: [\"*.c.d:8443\", \"[::1]\"]}]\n  blobHosts: [\"*\"]\n",
		"version: &a 1\nmode: *a\n", "a: &a [*a]", "{", "? [a]\n: b", "%YAML 1.1\n---\nversion: 1\n...\n", "\xff\xfev\x00", "version: !!int \"1\"\nmode: |-\n  audit\n",
	} {
		f.Add([]byte(s))
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, raw []byte) {
		d := &directory{dir: dir}
		var err error
		d.root, err = os.OpenRoot(dir)
		must(t, err)
		defer d.Close()
		var c Config
		if _, err := decode(d, raw, &c); err != nil {
			e := (*Error)(nil)
			if !errors.As(err, &e) || e.File == "" || e.Text == "" {
				t.Fatalf("error %#v", err)
			}
			return
		}
		if c.Gate.Wait < 0 || c.Gate.Wait > time.Second || c.Limits.Wall < 0 || c.Limits.Pages < 0 || c.Limits.TotalBytes > 256<<20 {
			t.Fatalf("out of bounds: %+v", c)
		}
		for _, m := range c.Mirrors {
			if m.Host == "" || m.URL.User != nil || m.URL.RawQuery != "" || m.URL.Host == "" || m.URL.Scheme != "http" && m.URL.Scheme != "https" {
				t.Fatalf("mirror %+v", m)
			}
			// What was accepted, the source accepts too.
			host := strings.Replace(m.Host, "*", "docker.io", 1)
			for _, s := range c.Sources()(verify.Name{Host: host, Path: "a"}) {
				ctx, cancel := context.WithCancel(t.Context())
				cancel()
				if strings.HasPrefix(s.Name(), "layout") {
					continue
				}
				n := verify.Name{Host: host, Path: "a"}
				subject := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("x"), Size: 1}
				if err := s.Find(ctx, n, subject, verify.NewBudget(notary.Kind, verify.Limits{}), nil); err == nil || !strings.Contains(err.Error(), ": GET /v2/") {
					t.Fatalf("mirror %+v of %q: %v", m, raw, err)
				}
			}
		}
	})
}

// A ConfigMap is mounted read-only, and its directory has mode 0777.
func TestWritableDirectoryMountedReadOnly(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "mode=0777"); err != nil {
		t.Skipf("NOT TESTED without root: mount: %v", err)
	}
	defer syscall.Unmount(dir, syscall.MNT_DETACH)
	publish(t, dir, "1", notation())
	if _, err := Load(dir); err == nil || !strings.Contains(err.Error(), "everybody can write this directory") {
		t.Errorf("writable: %v", err)
	}
	must(t, syscall.Mount("", dir, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""))
	load1(t, dir)
}
