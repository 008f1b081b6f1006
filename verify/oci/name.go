package oci

import (
	"github.com/opencontainers/go-digest"

	"github.com/tidewaiter/tidewaiter/verify/text"
)

// A Name is an image name in canonical form, split where policy matches it:
// host and path are compared apart, never as one string. The zero Name matches
// no rule.
type Name struct {
	Host   string        // "docker.io", "registry.acme.internal:5000", "[2001:db8::1]:5000"
	Path   string        // "library/nginx"
	Tag    string        // for messages only: never matched, never resolved
	Digest digest.Digest // what the pod pinned, or empty
}

// Repository is the part of the name that policies speak of: host and path.
func (n Name) Repository() string {
	if n.Host == "" {
		return n.Path
	}
	return n.Host + "/" + n.Path
}

// String is for messages.
func (n Name) String() string {
	s := n.Repository()
	if n.Tag != "" {
		s += ":" + n.Tag
	}
	if n.Digest != "" {
		s += "@" + n.Digest.String()
	}
	return s
}

// Describe names an image for people: canonical name and target digest, or if there is no
// name, what the pod asked for.
func (n Name) Describe(asked string, target digest.Digest) string {
	if n.Path == "" {
		if asked == "" {
			return "an image without a name"
		}
		return text.Quote(asked, 160)
	}
	if target != "" {
		n.Digest = target
	}
	s := n.String()
	if n.Digest == "" {
		return text.Clean(s, 256)
	}
	// A long name is cut, the digest is not.
	d := "@" + text.Clean(n.Digest.String(), 144) // sha512
	n.Digest = ""
	return text.Clean(n.String(), 160) + d
}
