package stage

import (
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/tidewaiter/tidewaiter/deploy"
)

// An Initial is what a first configuration is made from.
type Initial struct {
	Name     string // of the statement and of its trust store
	Scopes   []string
	CA       []byte // PEM: the certificates that the trust store holds
	Signer   []byte // PEM: the signing certificate, whose subject is trusted; empty: Identity, or CA's if it certifies nobody else
	Identity string // as in trustpolicy.json; empty: the subject of Signer
}

// ErrNoIdentity says that it is not known which of a CA's signers are to be trusted.
var ErrNoIdentity = errors.New("it is not known which of the signers that this CA certifies are to be trusted")

// Files are those of a configuration directory that audits, by their names in it. What they
// mean is not looked at: Load does that.
func (o Initial) Files() (map[string][]byte, error) {
	anchors, err := certificates("the CA", o.CA)
	if err != nil {
		return nil, err
	}
	identity := o.Identity
	if identity == "" {
		signer := anchors[0]
		if len(o.Signer) > 0 {
			all, err := certificates("the signing certificate", o.Signer)
			if err != nil {
				return nil, err
			}
			signer = all[0]
		} else if signer.IsCA {
			return nil, ErrNoIdentity
		}
		identity = "x509.subject: " + signer.Subject.String()
	}
	type verification struct {
		Level string `json:"level"`
	}
	type statement struct {
		Name       string       `json:"name"`
		Scopes     []string     `json:"registryScopes"`
		Verify     verification `json:"signatureVerification"`
		Stores     []string     `json:"trustStores"`
		Identities []string     `json:"trustedIdentities"`
	}
	policy, err := json.MarshalIndent(struct {
		Version    string      `json:"version"`
		Statements []statement `json:"trustPolicies"`
	}{"1.0", []statement{{o.Name, o.Scopes, verification{"strict"}, []string{"ca:" + o.Name}, []string{identity}}}}, "", "  ")
	if err != nil {
		return nil, err
	}
	return map[string][]byte{
		"config.yaml":      []byte(deploy.AuditConfig),
		"trustpolicy.json": append(policy, '\n'),
		"truststore/x509/ca/" + o.Name + "/ca.pem": o.CA,
	}, nil
}

// certificates reads PEM.
func certificates(what string, raw []byte) (all []*x509.Certificate, err error) {
	for len(raw) > 0 {
		var b *pem.Block
		if b, raw = pem.Decode(raw); b == nil {
			break
		}
		if b.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%s: expected a CERTIFICATE in PEM, got %q", what, b.Type)
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", what, err)
		}
		all = append(all, c)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%s: expected certificates in PEM, got none", what)
	}
	return all, nil
}
