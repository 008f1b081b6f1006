package notarytest

import (
	"encoding/json"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing/fstest"

	"github.com/tidewaiter/tidewaiter/verify"
)

// Statement is a statement of level strict for every image, that trusts the
// identities (default: any) of the trust store ca:acme.
func Statement(name string, identities ...string) verify.Statement {
	if len(identities) == 0 {
		identities = []string{"*"}
	}
	return verify.Statement{
		Name: name, Scopes: []string{"*"}, Level: "strict",
		TrustStores: []string{"ca:acme"}, TrustedIdentities: identities,
	}
}

// Stores are the files of a trust store: a path below it, such as
// "ca/acme/root.crt", and what is in the file. CA.PEM makes such contents.
type Stores map[string][]byte

// FS is the directory truststore.
func (s Stores) FS() fs.FS {
	m := fstest.MapFS{}
	for path, content := range s {
		m["x509/"+path] = &fstest.MapFile{Data: content, Mode: 0o644}
	}
	return m
}

// TrustPolicy is the trustpolicy.json of statements.
func TrustPolicy(statements ...verify.Statement) []byte {
	list := []any{}
	for _, s := range statements {
		v := map[string]any{"level": s.Level}
		if len(s.Override) > 0 {
			v["override"] = s.Override
		}
		if s.VerifyTimestamp != "" {
			v["verifyTimestamp"] = s.VerifyTimestamp
		}
		m := map[string]any{"name": s.Name, "registryScopes": s.Scopes, "signatureVerification": v}
		if len(s.TrustStores) > 0 {
			m["trustStores"] = s.TrustStores
		}
		if len(s.TrustedIdentities) > 0 {
			m["trustedIdentities"] = s.TrustedIdentities
		}
		list = append(list, m)
	}
	return must(json.MarshalIndent(map[string]any{"version": "1.0", "trustPolicies": list}, "", "  "))
}

// WriteConfig writes a notation configuration below dir: trustpolicy.json and
// the truststore.
func WriteConfig(dir string, stores Stores, statements ...verify.Statement) error {
	files := map[string][]byte{"trustpolicy.json": TrustPolicy(statements...)}
	for path, content := range stores {
		files["truststore/x509/"+strings.TrimPrefix(path, "/")] = content
	}
	for path, content := range files {
		path = filepath.Join(dir, filepath.FromSlash(path))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, content, 0o644); err != nil {
			return err
		}
	}
	return nil
}
