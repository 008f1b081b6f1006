package notary

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"

	"github.com/notaryproject/notation-go/verifier/truststore"

	"github.com/tidewaiter/tidewaiter/verify/text"
)

// Limits of a trust store. A file holds one CA or a bundle of some; the bundle of
// all public roots is a quarter of the file limit.
const (
	maxStoreFile  = 1 << 20 // bytes
	maxStoreFiles = 1000    // in all stores together
	maxStoreCerts = 5000    // in all stores together
)

// A Store is a Notary Project trust store in memory
// (trust-store-trust-policy.md, "Trust Store"). It does not change and is safe
// for concurrent use. The zero Store is empty.
type Store struct {
	anchors map[string][]anchor // by type and name, "ca:acme"
}

// An anchor is one certificate of a trust store.
type anchor struct {
	cert *x509.Certificate
	name string // "ca:acme/root.crt"
}

// LoadStore reads fsys, which is rooted at the directory truststore, once:
// x509/{ca,signingAuthority,tsa}/NAME/*.{crt,pem,cer}. No directory x509 means
// an empty Store. Any other file or directory below x509, a link, a file that is
// too large, that does not parse whole or that notation would refuse is an error
// that names it: what was meant to be trusted, or not to be, must not be guessed.
//
// As in notation (truststore.ValidateCertificates), a certificate must be a CA
// or self-signed, and in tsa a self-signed root.
func LoadStore(fsys fs.FS) (*Store, error) {
	s := &Store{anchors: map[string][]anchor{}}
	types, err := fs.ReadDir(fsys, "x509")
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return nil, fmt.Errorf("trust store: %w", err)
	}
	var files, certs int
	for _, t := range types {
		typeDir := path.Join("x509", t.Name())
		switch truststore.Type(t.Name()) {
		case truststore.TypeCA, truststore.TypeSigningAuthority, truststore.TypeTSA:
		default:
			return nil, fmt.Errorf("trust store: %s: no such type of trust store; there are ca, signingAuthority and tsa", typeDir)
		}
		names, err := readDir(fsys, typeDir, t)
		if err != nil {
			return nil, err
		}
		for _, n := range names {
			dir := path.Join(typeDir, n.Name())
			entries, err := readDir(fsys, dir, n)
			if err != nil {
				return nil, err
			}
			store := t.Name() + ":" + n.Name()
			s.anchors[store] = nil
			for _, e := range entries {
				file := path.Join(dir, e.Name())
				if files++; files > maxStoreFiles {
					return nil, fmt.Errorf("trust store: %s: more than %d files", file, maxStoreFiles)
				}
				list, err := readCertificates(fsys, file, e)
				if err == nil {
					err = admissible(truststore.Type(t.Name()), list)
				}
				if err != nil {
					return nil, fmt.Errorf("trust store: %s: %w", file, err)
				}
				if certs += len(list); certs > maxStoreCerts {
					return nil, fmt.Errorf("trust store: %s: more than %d certificates", file, maxStoreCerts)
				}
				for _, c := range list {
					s.anchors[store] = append(s.anchors[store], anchor{c, store + "/" + e.Name()})
				}
			}
		}
	}
	return s, nil
}

// readDir reads a directory that must be one and not a link.
func readDir(fsys fs.FS, dir string, e fs.DirEntry) ([]fs.DirEntry, error) {
	if !e.IsDir() {
		return nil, fmt.Errorf("trust store: %s: not a directory; links are not followed", dir)
	}
	list, err := fs.ReadDir(fsys, dir)
	if err != nil {
		return nil, fmt.Errorf("trust store: %w", err)
	}
	return list, nil
}

func readCertificates(fsys fs.FS, file string, e fs.DirEntry) ([]*x509.Certificate, error) {
	switch strings.ToLower(path.Ext(file)) {
	case ".crt", ".pem", ".cer":
	default:
		return nil, errors.New("not a certificate file: its name must end in .crt, .pem or .cer")
	}
	if !e.Type().IsRegular() {
		return nil, errors.New("not a regular file; links are not followed")
	}
	f, err := fsys.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxStoreFile+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxStoreFile {
		return nil, fmt.Errorf("larger than %d bytes", maxStoreFile)
	}
	return parseCertificates(data)
}

// parseCertificates reads one or more certificates, PEM or DER. Text between PEM
// blocks is allowed; a block that does not decode, or is no certificate, is not.
func parseCertificates(data []byte) ([]*x509.Certificate, error) {
	if bytes.Contains(data, begin) {
		return ParsePEM(data)
	}
	certs, err := x509.ParseCertificates(data)
	if err == nil && len(certs) == 0 {
		err = errors.New("no certificate")
	}
	return certs, err
}

var begin = []byte("-----BEGIN")

// ParsePEM reads the certificates of a file, of which there is at least one. Text
// between the blocks is allowed. A block that does not decode, or is no certificate,
// is an error: whom it was meant to have trusted must not be guessed. The label X509
// CERTIFICATE, which older tools write, means the same as CERTIFICATE.
func ParsePEM(data []byte) ([]*x509.Certificate, error) {
	blocks := bytes.Count(data, begin)
	if blocks == 0 {
		return nil, errors.New("holds no certificate in PEM")
	}
	// Files that end without a newline, put together, lose certificates silently elsewhere.
	if n := glued(data); n > 0 {
		return nil, fmt.Errorf("PEM block %d of %d does not decode: a newline is missing before its -----BEGIN", n, blocks)
	}
	var certs []*x509.Certificate
	for range blocks {
		var b *pem.Block
		if b, data = pem.Decode(data); b == nil {
			return nil, fmt.Errorf("PEM block %d of %d does not decode", len(certs)+1, blocks)
		}
		switch b.Type {
		case "CERTIFICATE", "X509 CERTIFICATE":
		case "TRUSTED CERTIFICATE":
			return nil, fmt.Errorf("PEM block %d is a TRUSTED CERTIFICATE, openssl's form with settings of its own: openssl x509 -in FILE writes a plain one", len(certs)+1)
		default:
			return nil, fmt.Errorf("PEM block %d is no certificate but %s", len(certs)+1, text.Quote(b.Type, 32))
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, fmt.Errorf("PEM block %d: %w", len(certs)+1, err)
		}
		certs = append(certs, c)
	}
	return certs, nil
}

// glued returns which block of data does not begin on a line of its own, or 0.
func glued(data []byte) int {
	for n, at := 1, 0; ; n++ {
		i := bytes.Index(data[at:], begin)
		if i < 0 {
			return 0
		}
		if at += i; at > 0 && data[at-1] != '\n' {
			return n
		}
		at += len(begin)
	}
}

// admissible applies the rules of notation for certificates in trust stores.
func admissible(t truststore.Type, certs []*x509.Certificate) error {
	if err := truststore.ValidateCertificates(certs); err != nil {
		return err
	}
	for _, c := range certs {
		if t != truststore.TypeTSA {
			break
		}
		if err := c.CheckSignatureFrom(c); err != nil || !bytes.Equal(c.RawSubject, c.RawIssuer) {
			return fmt.Errorf("certificate with subject %q is not a self-signed root, as a tsa trust store needs", c.Subject)
		}
	}
	return nil
}

// Holds reports whether the trust store with that name, "ca:acme", has a
// certificate.
func (s *Store) Holds(name string) bool { return len(s.anchors[name]) > 0 }

// GetCertificates implements notation's truststore.X509TrustStore.
func (s *Store) GetCertificates(_ context.Context, t truststore.Type, name string) ([]*x509.Certificate, error) {
	list := s.anchors[string(t)+":"+name]
	certs := make([]*x509.Certificate, 0, len(list))
	for _, a := range list {
		certs = append(certs, a.cert)
	}
	return certs, nil
}

// All hands over every certificate with the name of its file, "ca:acme/root.crt", in
// no order of the stores.
func (s *Store) All(yield func(file string, c *x509.Certificate) bool) {
	for _, list := range s.anchors {
		for _, a := range list {
			if !yield(a.name, a.cert) {
				return
			}
		}
	}
}
