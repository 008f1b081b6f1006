package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.yaml.in/yaml/v3"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

// Sign signs the target of an image with a good JWS signature by s and attaches
// it, as `notation sign` does.
func (r *Registry) Sign(ctx context.Context, img *Image, s *notarytest.Signer) (notarytest.Artifact, error) {
	envelope, err := notarytest.Sign(s, img.Target, notarytest.SignOptions{})
	if err != nil {
		return notarytest.Artifact{}, fmt.Errorf("signing %s: %w", img.Name, err)
	}
	a := notarytest.Manifest(envelope, notary.MediaTypeJWS, img.Target, notarytest.ConfigType)
	return a, r.Attach(ctx, img, a, AttachOptions{})
}

// AttachOptions say how Attach makes a signature known.
type AttachOptions struct {
	// Tag adds it to the index under the tag of the referrers tag schema
	// (distribution-spec, "Referrers Tag Schema"), besides the Referrers API. A
	// registry without the API always gets it.
	Tag bool
}

// Attach pushes the envelope and manifest of a signature into the repository of
// an image, made by notarytest.Manifest for any subject.
func (r *Registry) Attach(ctx context.Context, img *Image, a notarytest.Artifact, o AttachOptions) error {
	repo := r.repository(img)
	for _, b := range []notarytest.Blob{a.Config, a.Envelope} {
		if err := r.PutBlob(ctx, repo, b.Descriptor.Digest, b.Content); err != nil {
			return err
		}
	}
	m := a.Manifest.Descriptor
	if err := r.PutManifest(ctx, repo, m.Digest.String(), m.MediaType, a.Manifest.Content); err != nil {
		return err
	}
	if !o.Tag && !r.noReferrers {
		return nil
	}
	var parsed ocispec.Manifest
	if err := json.Unmarshal(a.Manifest.Content, &parsed); err != nil {
		return fmt.Errorf("signature manifest: %w", err)
	}
	if parsed.Subject == nil {
		return errors.New("signature manifest: no subject to make a tag of")
	}
	return r.appendTag(ctx, repo, parsed.Subject.Digest, m)
}

// appendTag appends a referrer to the index of the referrers tag schema.
func (r *Registry) appendTag(ctx context.Context, repo string, subject digest.Digest, referrer ocispec.Descriptor) error {
	tag := strings.Replace(subject.String(), ":", "-", 1)
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	status, body, err := r.do(ctx, http.MethodGet, "/v2/"+repo+"/manifests/"+tag, "", nil)
	if err != nil {
		return err
	}
	if status == http.StatusOK {
		if err := json.Unmarshal(body, &index); err != nil {
			return fmt.Errorf("%s:%s: %w", repo, tag, err)
		}
	}
	for _, d := range index.Manifests {
		if d.Digest == referrer.Digest {
			return nil
		}
	}
	index.Manifests = append(index.Manifests, referrer)
	b, err := json.Marshal(index)
	if err != nil {
		return err
	}
	return r.PutManifest(ctx, repo, tag, index.MediaType, b)
}

// repository is that of an image without the host.
func (r *Registry) repository(img *Image) string {
	return strings.TrimPrefix(img.Repository(), r.Host+"/")
}

// PutManifest pushes any bytes as a manifest under a tag or their digest.
// Repository is without the host: "app".
func (r *Registry) PutManifest(ctx context.Context, repository, reference, mediaType string, content []byte) error {
	return r.put(ctx, http.MethodPut, "/v2/"+repository+"/manifests/"+reference, mediaType, content)
}

// PutBlob pushes a blob.
func (r *Registry) PutBlob(ctx context.Context, repository string, d digest.Digest, content []byte) error {
	post := "/v2/" + repository + "/blobs/uploads/?digest=" + url.QueryEscape(d.String())
	if !r.twoRequests {
		return r.put(ctx, http.MethodPost, post, "application/octet-stream", content)
	}
	res, err := client.Post(r.URL()+post, "", nil)
	if err != nil {
		return err
	}
	res.Body.Close()
	to, err := res.Location()
	if err != nil {
		return fmt.Errorf("POST %s%s: status %d: %w", r.Addr, post, res.StatusCode, err)
	}
	q := to.Query()
	q.Set("digest", d.String())
	return r.put(ctx, http.MethodPut, to.Path+"?"+q.Encode(), "application/octet-stream", content)
}

func (r *Registry) put(ctx context.Context, method, path, mediaType string, content []byte) error {
	status, body, err := r.do(ctx, method, path, mediaType, content)
	if err == nil && status != http.StatusCreated {
		err = fmt.Errorf("status %d: %s", status, body)
	}
	if err != nil {
		return fmt.Errorf("%s %s%s: %w", method, r.Addr, path, err)
	}
	return nil
}

func (r *Registry) do(ctx context.Context, method, path, mediaType string, content []byte) (int, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, r.URL()+path, bytes.NewReader(content))
	if err != nil {
		return 0, nil, err
	}
	if mediaType != "" {
		req.Header.Set("Content-Type", mediaType)
	}
	res, err := client.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return res.StatusCode, b, err
}

// Config is a configuration of Tidewaiter.
type Config struct {
	Mode       string            // "enforce" or "audit"; required
	Mirrors    []Mirror          // config.yaml: sources.mirrors
	Stores     notarytest.Stores // truststore: {"ca/acme/root.crt": ca.PEM()}
	Statements []verify.Statement
	More       map[string]any // more keys of config.yaml, at its top
}

// A Mirror is where Tidewaiter finds signatures for images of a host.
type Mirror struct {
	Host string `yaml:"host"`
	URL  string `yaml:"url"`
	CA   string `yaml:"ca,omitempty"` // path of a PEM file
	Cert string `yaml:"cert,omitempty"`
	Key  string `yaml:"key,omitempty"`
	NS   bool   `yaml:"ns,omitempty"`
}

// Mirror returns the registry as a mirror of its host.
func (r *Registry) Mirror() Mirror { return Mirror{Host: r.Host, URL: r.URL()} }

// WriteConfig writes config.yaml, trustpolicy.json and truststore into dir, which
// it makes. What was there is overwritten, files of a trust store that are not in
// c stay. config.yaml is replaced in one step, after the others.
func WriteConfig(dir string, c Config) error {
	if c.Mode == "" {
		return errors.New("configuration: no mode")
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := notarytest.WriteConfig(dir, c.Stores, c.Statements...); err != nil {
		return err
	}
	doc := map[string]any{"version": 1, "mode": c.Mode}
	if len(c.Mirrors) > 0 {
		doc["sources"] = map[string]any{"mirrors": c.Mirrors}
	}
	for k, v := range c.More {
		doc[k] = v
	}
	b, err := yaml.Marshal(doc)
	if err != nil {
		return fmt.Errorf("config.yaml: %w", err)
	}
	path := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(path+".next", b, 0o644); err != nil {
		return err
	}
	return os.Rename(path+".next", path)
}
