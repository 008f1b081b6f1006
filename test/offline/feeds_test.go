package offline

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

// TestFeeds gives nodes signatures in every way that there is, and then takes
// network and power away.
func TestFeeds(t *testing.T) {
	onEach(t, func(s *site) {
		for name, feed := range map[string]func(s *site){
			"registry without Referrers API":         distribution,
			"mirror that needs ns":                   manyHosts,
			"private CA":                             privateCA,
			"hosts.toml of k3s":                      k3s,
			"collected and imported again":           collected,
			"tar files and a layout":                 stick,
			"tar files and evidence archives":        archives,
			"docker archive and an evidence archive": carried,
		} {
			s.T.Run(name, func(t *testing.T) {
				whole := s.T
				s.T, s.config = t, filepath.Join(t.TempDir(), "config")
				defer func() { s.T = whole }()
				feed(s)
				if s.gate != nil {
					s.gate.Kill()
				}
				s.must(s.RemovePods(s.ctx))
				s.pod = nil
				s.network(true)
			})
		}
	})
}

// refusals are the answers for images that are not signed by whom the policy
// trusts: which one depends on who could be asked.
var refusals = []verify.Reason{verify.SignatureMissing, verify.SignerUntrusted, verify.SourceUnreachable, verify.SourceNoReferrers}

// survives starts the gate with a configuration, has images run, and again after a
// power cut and without any network.
func (s *site) survives(c node.Config, good, bad []*node.Image) {
	s.Helper()
	s.must(node.WriteConfig(s.config, c))
	s.registered(node.GateOptions{})
	for _, img := range good {
		s.allowed(img, node.PullIfNotPresent)
	}
	for _, img := range bad {
		s.denied(img.Name, node.PullIfNotPresent, refusals...)
	}
	s.offline(good, bad)
}

// offline takes network and power away, and has images run.
func (s *site) offline(good, bad []*node.Image) {
	s.Helper()
	s.settled(good...)
	s.cut()
	s.network(false)
	took := s.boot(good[0], node.GateOptions{})
	s.Logf("the first container ran %v after the gate's start", took.Round(time.Millisecond))
	for _, img := range good {
		s.allowed(img, node.PullNever)
	}
	for _, img := range bad {
		s.denied(img.Name, node.PullNever, refusals...)
	}
	s.sound()
}

// settled waits until the store has written index.json, which it does when all that
// it had to write is safe, and names a signature of each of these images there.
func (s *site) settled(images ...*node.Image) {
	s.Helper()
	ctx, cancel := s.within()
	defer cancel()
	name := filepath.Join(s.disk.Dir, "store/index.json")
	for {
		info, err := os.Stat(name)
		newest := time.Time{}
		_ = filepath.WalkDir(filepath.Join(s.disk.Dir, "store/blobs"), func(_ string, e fs.DirEntry, err error) error {
			if err != nil || e.IsDir() {
				return err
			}
			if i, err := e.Info(); err == nil && i.ModTime().After(newest) {
				newest = i.ModTime()
			}
			return nil
		})
		signed := s.subjects(name)
		missing := slices.DeleteFunc(slices.Clone(images), func(i *node.Image) bool { return signed[i.Target.Digest] || signed[i.Manifest.Digest] })
		if err == nil && info.ModTime().After(newest) && len(missing) == 0 {
			return
		}
		select {
		case <-ctx.Done():
			s.Fatalf("index.json is not written, or names no signature of %d images: %v\n%s", len(missing), err, s.gate.Log())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// subjects are what the signatures that are named in the store's index.json are of.
func (s *site) subjects(name string) map[digest.Digest]bool {
	s.Helper()
	list := map[digest.Digest]bool{}
	var index ocispec.Index
	raw, err := os.ReadFile(name)
	if err != nil || json.Unmarshal(raw, &index) != nil {
		return list
	}
	for _, d := range index.Manifests {
		var m ocispec.Manifest
		raw, err := os.ReadFile(filepath.Join(filepath.Dir(name), "blobs/sha256", d.Digest.Encoded()))
		if err == nil && json.Unmarshal(raw, &m) == nil && m.Subject != nil {
			list[m.Subject.Digest] = true
		}
	}
	return list
}

// trio pushes a good image with a signed index, one without signature and one that a
// stranger signed.
func (s *site) trio(r *node.Registry, prefix string) (good, bad []*node.Image) {
	s.Helper()
	o := node.ImageOptions{Index: true, Decoys: decoy}
	a, _ := s.push(r, prefix+":good", o, signing{by: stranger}, signing{by: release})
	b, _ := s.push(r, prefix+":bare", node.ImageOptions{})
	c, _ := s.push(r, prefix+":foreign", o, signing{by: stranger})
	return []*node.Image{a}, []*node.Image{b, c}
}

// distribution: the CNCF's registry has no Referrers API.
func distribution(s *site) {
	r, err := s.NewDistribution(s.ctx, "distribution.example")
	s.must(err)
	s.registries = append(s.registries, r)
	s.must(s.Use(r))
	good, bad := s.trio(r, "app")
	s.survives(policy(mirrors(r.Mirror())), good, bad)
	asked := false
	for _, q := range r.Requests() {
		if strings.Contains(q.Path, "/referrers/") {
			asked = true
			if q.Status == http.StatusOK {
				s.Errorf("the registry has a Referrers API: %v", q)
			}
		}
	}
	if !asked {
		s.Error("nobody asked for the Referrers API")
	}
}

// wants has a registry answer 404 to whoever does not say that he means host.
func wants(r *node.Registry, host string) {
	r.Fault(func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if req.URL.Path != "/v2/" && req.URL.Query().Get("ns") != host {
				http.NotFound(w, req)
				return
			}
			h.ServeHTTP(w, req)
		})
	})
}

// manyHosts: a mirror of many hosts wants to be told of which.
func manyHosts(s *site) {
	r := s.registry("ns.example", node.RegistryOptions{})
	good, bad := s.trio(r, "app")
	wants(r, r.Host)
	without := r.Mirror()
	s.must(node.WriteConfig(s.config, policy(mirrors(without))))
	s.registered(node.GateOptions{})
	s.denied(good[0].Name, node.PullIfNotPresent, verify.SignatureMissing, verify.SourceNoReferrers)
	s.stop()
	with := without
	with.NS = true
	s.survives(policy(mirrors(with)), good, bad)
}

// A pki is a private CA with certificates, as files.
type pki struct {
	ca, server, serverKey, client, clientKey string
	tls                                      *tls.Config // of a server that wants the client's
}

func newPKI(s *site) pki {
	s.Helper()
	dir := s.TempDir()
	caKey, ca := issue(s, nil, nil, &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	serverKey, server := issue(s, ca, caKey, &x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	clientKey, client := issue(s, ca, caKey, &x509.Certificate{ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	file := func(name, kind string, der []byte) string {
		name = filepath.Join(dir, name)
		s.must(os.WriteFile(name, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
		return name
	}
	key := func(k *ecdsa.PrivateKey) []byte {
		der, err := x509.MarshalPKCS8PrivateKey(k)
		s.must(err)
		return der
	}
	pool := x509.NewCertPool()
	pool.AddCert(ca)
	return pki{
		ca: file("ca.crt", "CERTIFICATE", ca.Raw), server: file("server.crt", "CERTIFICATE", server.Raw), serverKey: file("server.key", "PRIVATE KEY", key(serverKey)),
		client: file("client.crt", "CERTIFICATE", client.Raw), clientKey: file("client.key", "PRIVATE KEY", key(clientKey)),
		tls: &tls.Config{
			Certificates: []tls.Certificate{{Certificate: [][]byte{server.Raw}, PrivateKey: serverKey}},
			ClientAuth:   tls.RequireAndVerifyClientCert, ClientCAs: pool,
		},
	}
}

func issue(s *site, parent *x509.Certificate, by *ecdsa.PrivateKey, c *x509.Certificate) (*ecdsa.PrivateKey, *x509.Certificate) {
	s.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	s.must(err)
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	s.must(err)
	c.SerialNumber, c.NotBefore, c.NotAfter = serial, time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
	if parent == nil {
		parent, by = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), by)
	s.must(err)
	c, err = x509.ParseCertificate(der)
	s.must(err)
	return key, c
}

// privateCA: a mirror with a certificate that no system knows, which lets in only
// whom it knows.
func privateCA(s *site) {
	p := newPKI(s)
	r := s.registry("tls.example", node.RegistryOptions{})
	good, bad := s.trio(r, "app")
	addr, err := r.Secure(p.tls)
	s.must(err)
	s.must(s.Hosts(r.Host, fmt.Sprintf("server = 'https://%s'\nca = '%s'\nclient = [['%s', '%s']]\n", addr, p.ca, p.client, p.clientKey)))
	m := node.Mirror{Host: r.Host, URL: "https://" + addr, CA: p.ca}
	s.must(node.WriteConfig(s.config, policy(mirrors(m))))
	s.registered(node.GateOptions{})
	s.denied(good[0].Name, node.PullIfNotPresent, verify.SourceUnreachable)
	s.stop()
	m.Cert, m.Key = p.client, p.clientKey
	s.survives(policy(mirrors(m)), good, bad)
}

// k3s: the directory that k3s 1.36 writes, but for the addresses and the paths of
// certificates (nri/containerd/certsd/testdata/README.md). Its embedded registry is first
// of every host's mirrors, has images and no signatures, and wants ns= and a client
// certificate. Rewrites, TLS and the other mirrors are in the same files.
func k3s(s *site) {
	embedded, external := newPKI(s), newPKI(s)
	const repository = "library/k3s"
	spegel := s.registry("docker.io", node.RegistryOptions{})
	good, bad := s.trio(spegel, repository)

	// mirror.example.com is quay.io's; 10.0.0.5:5000 everybody else's.
	mirror, err := node.NewRegistry("quay.io", node.RegistryOptions{})
	s.must(err)
	other, err := node.NewRegistry("other.example", node.RegistryOptions{})
	s.must(err)
	// registry.example.com:5000 has docker.io's images under other names.
	rewritten, err := node.NewRegistry("docker.io", node.RegistryOptions{})
	s.must(err)
	s.registries = append(s.registries, mirror, other, rewritten)
	sign := func(r *node.Registry, name string, img *node.Image, by *notarytest.Signer) *node.Image {
		c, err := r.Copy(s.ctx, name, img)
		s.must(err)
		s.sign(r, c, signing{by: by})
		return c
	}
	sign(rewritten, "hub/k3s:good", good[0], release)
	sign(rewritten, "hub/k3s:foreign", bad[1], stranger)
	for _, r := range []*node.Registry{mirror, other} {
		o := node.ImageOptions{}
		img, _ := s.push(r, "team/"+r.Host+":good", o, signing{by: release})
		good = append(good, img)
		_, err := spegel.Copy(s.ctx, "team/"+r.Host+":good", img)
		s.must(err)
	}

	secure := func(r *node.Registry, c *tls.Config) string {
		addr, err := r.Secure(c)
		s.must(err)
		return addr
	}
	open := external.tls.Clone()
	open.ClientAuth = tls.NoClientCert
	nowhere := secure(other, open) // with a certificate that the system does not know
	replace := strings.NewReplacer(
		"127.0.0.1:6443", secure(spegel, embedded.tls),
		"registry.example.com:5000", secure(rewritten, external.tls),
		"mirror.example.com", secure(mirror, open),
		"harbor.example.com", nowhere,
		"10.0.0.5:5000", other.Addr,
		"/var/lib/rancher/k3s/agent/server-ca.crt", embedded.ca,
		"/var/lib/rancher/k3s/agent/client-k3s-controller.crt", embedded.client,
		"/var/lib/rancher/k3s/agent/client-k3s-controller.key", embedded.clientKey,
		"/etc/rancher/k3s/mirror-ca.crt", external.ca,
		"/etc/rancher/k3s/node.crt", external.client,
		"/etc/rancher/k3s/node.key", external.clientKey,
	)
	const from = "../../nri/containerd/certsd/testdata/k3s"
	s.must(os.RemoveAll(s.CertsDir)) // k3s's alone; every feed writes its own there
	s.must(filepath.WalkDir(from, func(name string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		raw, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, name)
		if err != nil {
			return err
		}
		dir := filepath.Join(s.CertsDir, filepath.Dir(rel))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(dir, filepath.Base(rel)), []byte(replace.Replace(string(raw))), 0o600)
	}))
	spegel.Fault(func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			signature := strings.Contains(r.URL.Path, "/referrers/") || strings.Contains(r.URL.Path, "/manifests/sha256-")
			if r.URL.Path != "/v2/" && (r.URL.Query().Get("ns") == "" || signature) {
				http.NotFound(w, r)
				return
			}
			h.ServeHTTP(w, r)
		})
	})
	rewritten.Forget()
	s.survives(policy(map[string]any{"certsDir": s.CertsDir, "network": "mirrors"}), good, bad)
	asked := 0
	for _, q := range rewritten.Requests() {
		if !strings.HasPrefix(q.UserAgent, "tidewaiter") {
			continue
		}
		if asked++; !strings.HasPrefix(q.Path, "/v2/hub/k3s/") || !strings.Contains(q.Query, "ns=docker.io") {
			s.Errorf("a rewritten path was not asked for: %v", q)
		}
	}
	if asked == 0 {
		s.Error("the mirror with rewrites was not asked")
	}
}

// collected: the kubelet removes an image while the gate runs, and later somebody
// imports it from a tar file, with no mirror there.
func collected(s *site) {
	r := s.registry("gc.example", node.RegistryOptions{})
	img, _ := s.push(r, "app:good", node.ImageOptions{Index: true}, signing{by: release})
	bare, _ := s.push(r, "app:bare", node.ImageOptions{})
	good, bad := []*node.Image{img}, []*node.Image{bare}
	s.must(node.WriteConfig(s.config, policy(mirrors(r.Mirror()))))
	s.registered(node.GateOptions{})
	s.allowed(img, node.PullIfNotPresent)
	s.denied(bare.Name, node.PullIfNotPresent, refusals...)
	s.settled(img)

	dir := s.TempDir()
	for _, i := range []*node.Image{img, bare} {
		_, err := s.Ctr(s.ctx, "images", "export", filepath.Join(dir, filepath.Base(i.Name)), i.Name)
		s.must(err)
		s.must(s.RemoveImage(s.ctx, i.Name))
	}
	ctx, cancel := s.within()
	defer cancel()
	for {
		_, err := s.Ctr(ctx, "content", "prune", "references")
		s.must(err)
		list, err := s.Ctr(ctx, "content", "ls", "-q")
		s.must(err)
		if !strings.Contains(list, img.Target.Digest.String()) && !strings.Contains(list, img.Manifest.Digest.String()) {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	s.network(false)
	// Once with the gate that saw it go, once with one that never saw it.
	for range 2 {
		for _, i := range []*node.Image{img, bare} {
			s.imported(filepath.Join(dir, filepath.Base(i.Name)), i)
		}
		s.allowed(img, node.PullNever)
		s.denied(bare.Name, node.PullNever, refusals...) // the first gate remembers what the mirror said
		s.must(s.RemoveImage(s.ctx, img.Name))
		s.must(s.RemoveImage(s.ctx, bare.Name))
		s.stop()
		s.registered(node.GateOptions{})
	}
	for _, i := range []*node.Image{img, bare} {
		s.imported(filepath.Join(dir, filepath.Base(i.Name)), i)
	}
	s.offline(good, bad)
}

// imported imports a tar file and waits until the kubelet would see the image.
func (s *site) imported(file string, img *node.Image) {
	s.Helper()
	ctx, cancel := s.within()
	defer cancel()
	out, err := s.Ctr(ctx, "images", "import", file)
	s.must(err)
	for {
		id, err := s.ImageID(ctx, img.Name)
		if err == nil && id != "" {
			return
		}
		if ctx.Err() != nil {
			s.Fatalf("%s is not on the node after import: %v\n%s", img.Name, err, out)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// fromTar makes images of a registry that no node knows, and imports them.
func (s *site) fromTar(host string) (good, bad []*node.Image) {
	s.Helper()
	r, err := node.NewRegistry(host, node.RegistryOptions{})
	s.must(err)
	defer r.Stop()
	dir := s.TempDir()
	make := func(name string, o node.ImageOptions) *node.Image {
		img, _ := s.push(r, name, o)
		file := filepath.Join(dir, filepath.Base(img.Name))
		s.must(img.Save(s.ctx, file))
		s.imported(file, img)
		return img
	}
	good = []*node.Image{
		make("app:index", node.ImageOptions{Index: true, Decoys: decoy}),
		make("app:manifest", node.ImageOptions{}),
		make("app:manifest-in-index", node.ImageOptions{Index: true, Decoys: decoy}),
	}
	bad = []*node.Image{make("app:bare", node.ImageOptions{}), make("app:foreign", node.ImageOptions{})}
	return good, bad
}

// evidence is a layout with signatures of images.
func (s *site) evidence(dir string, good, bad []*node.Image) {
	s.Helper()
	for i, img := range good {
		s.store(dir, artifact(img, signing{by: release, cose: i == 1, manifest: strings.HasSuffix(img.Name, "manifest-in-index")}))
	}
	s.store(dir, artifact(bad[1], signing{by: stranger}))
}

// stick: images from tar files, signatures from an OCI image layout.
func stick(s *site) {
	good, bad := s.fromTar("stick.example")
	dir := filepath.Join(s.TempDir(), "layout")
	s.evidence(dir, good, bad)
	s.survives(policy(map[string]any{"network": "never", "layouts": []string{dir}}), good, bad)

	// Without the stick, what was verified is in the store.
	s.stop()
	s.must(os.RemoveAll(dir))
	s.offlineAgain(good, bad)
}

// offlineAgain is offline for a gate that was stopped.
func (s *site) offlineAgain(good, bad []*node.Image) {
	s.Helper()
	s.registered(node.GateOptions{})
	s.offline(good, bad)
}

// archives: images from tar files, signatures from files in archives/ of the state
// directory, and never a network. One archive is a directory and one a tar file; they
// are there from before the gate's start, and put there while it runs.
func archives(s *site) {
	good, bad := s.fromTar("archive.example")
	dir := filepath.Join(s.disk.Dir, "archives")
	s.must(os.MkdirAll(dir, 0o755))
	c := policy(map[string]any{"network": "never"})
	s.must(node.WriteConfig(s.config, c))
	s.registered(node.GateOptions{})
	for _, img := range good {
		s.denied(img.Name, node.PullNever, verify.SignatureMissing)
	}
	made := filepath.Join(s.TempDir(), "layout")
	s.evidence(made, good[:1], bad)
	s.must(node.Tar(filepath.Join(dir, ".first"), made))
	s.must(os.Rename(filepath.Join(dir, ".first"), filepath.Join(dir, "first.tar")))
	s.evidence(filepath.Join(dir, ".second"), good[1:], bad)
	s.must(os.Rename(filepath.Join(dir, ".second"), filepath.Join(dir, "second")))
	synced(s, dir)
	began := time.Now()
	s.awaits(good)
	s.Logf("the last image ran %v after the evidence archives came", time.Since(began).Round(time.Millisecond))
	for _, img := range bad {
		s.denied(img.Name, node.PullNever, refusals...)
	}
	s.cut()
	s.boot(good[0], node.GateOptions{})
	for _, img := range good {
		s.allowed(img, node.PullNever)
	}
	for _, img := range bad {
		s.denied(img.Name, node.PullNever, refusals...)
	}
	s.sound()
}

// carried: images from an archive as `docker save` writes it, in which there is no signed
// manifest, and from the tar file of a layout; signatures from an archive. The power goes
// as soon as the verb that imports it is done.
func carried(s *site) {
	r, err := node.NewRegistry("carried.example", node.RegistryOptions{})
	s.must(err)
	defer r.Stop()
	archived, _ := s.push(r, "app:archived", node.ImageOptions{}, signing{by: release})
	inIndex, _ := s.push(r, "app:archived-of-index", node.ImageOptions{Index: true, Decoys: decoy}, signing{by: stranger}, signing{by: release, cose: true})
	layout, _ := s.push(r, "app:layout", node.ImageOptions{Index: true, Decoys: decoy}, signing{by: release})
	bare, _ := s.push(r, "app:archived-bare", node.ImageOptions{})
	good, bad := []*node.Image{archived, inIndex, layout}, []*node.Image{bare}

	s.must(node.WriteConfig(s.config, policy(map[string]any{"network": "never"})))
	dir := s.TempDir()
	archive := filepath.Join(dir, "site.tar")
	s.tidewaiter("evidence", "export", "--mirror", r.Host+"="+r.URL(), "--config-dir", s.config, "-o", archive, archived.Name, inIndex.Name, layout.Name)
	for _, img := range []*node.Image{archived, inIndex, layout, bare} {
		file := filepath.Join(dir, filepath.Base(img.Name))
		if img == layout {
			s.must(img.Save(s.ctx, file))
		} else {
			s.must(img.SaveDocker(file))
		}
		s.imported(file, img)
	}
	s.must(r.Stop())
	s.registered(node.GateOptions{})
	for _, img := range append(bad, good...) {
		s.denied(img.Name, node.PullNever, verify.SignatureMissing)
	}
	s.tidewaiter("evidence", "import", "--config-dir", s.config, "--state-dir", s.disk.Dir, archive)
	for range 2 {
		s.cut()
		s.boot(good[0], node.GateOptions{})
		for _, img := range good {
			s.allowed(img, node.PullNever)
		}
		for _, img := range bad {
			s.denied(img.Name, node.PullNever, verify.SignatureMissing)
		}
		s.sound()
	}
}

// tidewaiter runs a verb.
func (s *site) tidewaiter(args ...string) {
	s.Helper()
	out, err := s.Output(s.ctx, program, args...)
	if err != nil {
		s.Fatalf("%v\n%s", err, out)
	}
}

// awaits waits until images start that are refused before.
func (s *site) awaits(images []*node.Image) {
	s.Helper()
	ctx, cancel := s.within()
	defer cancel()
	for _, img := range images {
		for {
			err := s.try(img.Name, node.PullNever)
			if err == nil {
				break
			}
			if ctx.Err() != nil {
				s.Fatalf("%s is still refused: %v\n%s", img.Name, err, s.gate.Log())
			}
			time.Sleep(100 * time.Millisecond)
		}
	}
}

// synced makes what a tool has put on a disk last, as an importer does.
func synced(s *site, dir string) {
	s.Helper()
	s.must(filepath.WalkDir(dir, func(name string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		return f.Sync()
	}))
}

// store adds a signature to an OCI image layout.
func (s *site) store(dir string, a notarytest.Artifact) {
	s.Helper()
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	if b, err := os.ReadFile(filepath.Join(dir, "index.json")); err == nil {
		s.must(json.Unmarshal(b, &index))
	}
	index.Manifests = append(index.Manifests, a.Manifest.Descriptor)
	b, err := json.Marshal(index)
	s.must(err)
	files := map[string][]byte{"index.json": b, "oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`)}
	for _, blob := range []notarytest.Blob{a.Manifest, a.Config, a.Envelope} {
		files[filepath.Join("blobs/sha256", blob.Descriptor.Digest.Encoded())] = blob.Content
	}
	for name, content := range files {
		s.must(os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755))
		s.must(os.WriteFile(filepath.Join(dir, name), content, 0o644))
	}
}

// TestNever runs the gate where every packet to anywhere is counted, and none goes
// out: all that it has comes from the disk. The same gate with a mirror sends some.
func TestNever(t *testing.T) {
	onEach(t, func(s *site) {
		// A network of its own, in which every address there is is this machine.
		const alone = `exec unshare --net sh -c 'ip link set lo up && ip route add default dev lo && ip -6 route add default dev lo && exec "$0" "$@"' "$@"`
		good, bad := s.fromTar("never.example")
		// An image that says where to ask: an address.
		at, _ := s.fromTar("10.9.9.9:5000")
		dir := filepath.Join(s.TempDir(), "layout")
		s.evidence(dir, good, bad)
		sources := map[string]any{"network": "never", "layouts": []string{dir}}
		s.must(node.WriteConfig(s.config, policy(sources)))
		s.registered(node.GateOptions{Shell: alone})
		for _, img := range good {
			s.allowed(img, node.PullNever)
		}
		for _, img := range append(bad, at...) {
			s.denied(img.Name, node.PullNever, refusals...)
		}
		if n := packets(s); n != 0 {
			s.Errorf("network: never, and %d packets were sent", n)
		}
		s.offlineIn(alone, good, append(bad, at...))
		if n := packets(s); n != 0 {
			s.Errorf("network: never, and %d packets were sent after the power cut", n)
		}
		s.stop()

		sources["network"] = "origin"
		s.must(node.WriteConfig(s.config, policy(sources)))
		s.registered(node.GateOptions{Shell: alone})
		s.denied(at[0].Name, node.PullNever, verify.SourceUnreachable)
		if packets(s) == 0 {
			s.Error("network: origin, and no packets were sent: packets are not counted")
		}
	})
}

// offlineIn is offline with a gate in another network.
func (s *site) offlineIn(shell string, good, bad []*node.Image) {
	s.Helper()
	s.settled(good...)
	s.cut()
	s.boot(good[0], node.GateOptions{Shell: shell})
	for _, img := range good {
		s.allowed(img, node.PullNever)
	}
	for _, img := range bad {
		s.denied(img.Name, node.PullNever, refusals...)
	}
}

// packets is how many the gate's network has seen.
func packets(s *site) (n int) {
	s.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/dev", s.gate.PID))
	s.must(err)
	lines := 0
	for line := range bytes.Lines(b) {
		name, counters, found := strings.Cut(string(line), ":")
		if !found {
			continue
		}
		lines++
		f := strings.Fields(counters) // received: bytes, packets, …; sent: bytes, packets, …
		if len(f) < 10 || strings.TrimSpace(name) != "lo" {
			s.Fatalf("the gate has a network device: %s", line)
		}
		var sent int
		if _, err := fmt.Sscan(f[9], &sent); err != nil {
			s.Fatalf("%s: %v", line, err)
		}
		n += sent
	}
	if lines != 1 {
		s.Fatalf("the gate has not one network device:\n%s", b)
	}
	return n
}
