// Package oci reads OCI documents that others wrote: manifests, indexes, lists of
// referrers, index.json of a layout.
//
// A document is read in place. Memory is taken for the descriptors that are asked for
// and for nothing else: not for annotations that no caller names, embedded data, or
// members that the package does not know. What a document says counts only if every
// reader understands the same by it: a member that is there twice, or in other letter
// case, is an error, since decoders disagree about those.
//
// The package checks no digest. Callers hash the same bytes that they hand over.
// Functions keep nothing between calls and are safe for concurrent use.
package oci

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Bounds. Real documents stay far below: registries hold no image with more than some
// hundred layers or manifests, and a signature manifest has about 1,000 bytes.
const (
	MaxSignature = 64 << 10 // bytes of a signature manifest
	MaxList      = 2048     // manifests of an index, and layers of a manifest, that Read takes
	MaxEntries   = 1 << 16  // entries of a list that Each looks at
	maxWord      = 257      // bytes of a media type, a digest, a platform's words, quoted
	maxFeatures  = 8        // features of a platform
	maxValue     = 8 << 10  // bytes of an annotation that a caller names
)

// ErrLimit is wrapped if a document goes beyond a bound.
var ErrLimit = errors.New("source sent more than the limits allow")

// A Document is a manifest or an index. Its descriptors have the media type, artifact
// type, digest, size, platform and those annotations that were asked for.
type Document struct {
	Head
	Manifests []ocispec.Descriptor
	Layers    []ocispec.Descriptor
}

// A Head is what a document says of itself, without its lists.
type Head struct {
	MediaType    string
	ArtifactType string
	Config       ocispec.Descriptor
	Subject      *ocispec.Descriptor
	Annotations  map[string]string // those that were asked for

	// Whether the document has such a member, be it null.
	HasManifests, HasConfig, HasLayers, HasFSLayers bool
}

// Read reads a manifest or index, and keeps the annotations with the given names of
// manifests and layers. All of it must be sound; a list of more than MaxList entries is
// an error that wraps ErrLimit.
func Read(raw []byte, annotations ...string) (Document, error) {
	var d Document
	head, lists, err := read(raw, nil)
	if err != nil {
		return Document{}, err
	}
	d.Head = head
	if d.Manifests, err = descriptors("manifests", lists.manifests, annotations); err != nil {
		return Document{}, err
	}
	if d.Layers, err = descriptors("layers", lists.layers, annotations); err != nil {
		return Document{}, err
	}
	return d, nil
}

// ReadHead reads what a document says of itself and not what it lists, and keeps the
// annotations with the given names.
func ReadHead(raw []byte, annotations ...string) (Head, error) {
	h, _, err := read(raw, annotations)
	return h, err
}

// An Entry is one of a list. If it is no descriptor Err says which and why, and the rest
// is empty: such an entry costs nothing but itself. The digest may be none.
type Entry struct {
	ocispec.Descriptor // with the annotations that were asked for
	Err                error

	raw []byte
}

// Annotated returns the entry with the annotations that have the given names, for
// callers that ask for them only of some. It is for use in yield.
func (e Entry) Annotated(names ...string) ocispec.Descriptor {
	d := ocispec.Descriptor{}
	if e.Err == nil && descriptor(e.raw, names, &d) != nil { // it was read before
		return ocispec.Descriptor{}
	}
	return d
}

// Each hands the entries of the list of manifests in raw to yield until that returns
// false, one at a time and with the annotations that have the given names. An entry may
// be of any length. The error is about the document as a whole; beyond MaxEntries it
// wraps ErrLimit, after the entries within the bound were handed over.
func Each(raw []byte, annotations []string, yield func(Entry) bool) error {
	_, lists, err := read(raw, nil)
	if err != nil || lists.manifests == nil {
		return err
	}
	n := 0
	var e Entry
	return array("manifests", lists.manifests, func(v []byte) error {
		if n++; n > MaxEntries {
			return fmt.Errorf("%w: a list of more than %d entries", ErrLimit, MaxEntries)
		}
		e = Entry{raw: v}
		e.Err = descriptor(v, annotations, &e.Descriptor)
		if e.Err != nil {
			e = Entry{Err: fmt.Errorf("entry %d of the list is passed over: %w", n, e.Err)}
		}
		if !yield(e) {
			return errStop
		}
		return nil
	})
}

// errStop ends a walk.
var errStop = errors.New("enough")

// A Config is what an image config says of its platform and its layers.
type Config struct {
	ocispec.Platform
	RootFS ocispec.RootFS
}

// ReadConfig reads an image config. More than MaxList layers are an error that wraps
// ErrLimit.
func ReadConfig(raw []byte) (Config, error) {
	if err := whole(raw); err != nil {
		return Config{}, err
	}
	var c Config
	if err := platform(raw, &c.Platform); err != nil {
		return Config{}, err
	}
	seen := 0
	err := members("the config", raw, func(name string, v []byte) error {
		if i, err := known(name, &seen, "rootfs"); i < 0 {
			return err
		}
		seen := 0
		return members(name, v, func(name string, v []byte) error {
			i, err := known(name, &seen, "type", "diff_ids")
			if err != nil {
				return err
			}
			switch i {
			case 0:
				return word(name, v, &c.RootFS.Type)
			case 1:
				return array(name, v, func(v []byte) error {
					if len(c.RootFS.DiffIDs) == MaxList {
						return fmt.Errorf("%w: more than %d layers", ErrLimit, MaxList)
					}
					var s string
					err := word(name, v, &s)
					c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, digest.Digest(s))
					return err
				})
			}
			return nil
		})
	})
	if err != nil {
		return Config{}, err
	}
	return c, nil
}

// lists are those of a document, not yet read; nil: there is none.
type lists struct{ manifests, layers []byte }

// whole says why raw is not one JSON document, or null.
func whole(raw []byte) error {
	if !json.Valid(raw) {
		var v json.RawMessage
		err := json.Unmarshal(raw, &v) // says where, and takes no memory for it
		if err == nil {
			err = errors.New("no JSON")
		}
		return fmt.Errorf("the document is not JSON: %w", err)
	}
	if null(raw[space(raw, 0):]) {
		return errors.New("the document is null")
	}
	return nil
}

func read(raw []byte, annotations []string) (h Head, l lists, err error) {
	if err := whole(raw); err != nil {
		return Head{}, l, err
	}
	seen := 0
	err = members("the document", raw, func(name string, v []byte) error {
		i, err := known(name, &seen, "mediaType", "artifactType", "config", "subject", "manifests", "layers", "fsLayers", "annotations")
		if err != nil {
			return err
		}
		switch i {
		case 0:
			return word(name, v, &h.MediaType)
		case 1:
			return word(name, v, &h.ArtifactType)
		case 2:
			h.HasConfig = true
			err = descriptor(v, nil, &h.Config)
		case 3:
			if !null(v) {
				h.Subject = &ocispec.Descriptor{}
				err = descriptor(v, nil, h.Subject)
			}
		case 4:
			h.HasManifests, l.manifests = true, v
		case 5:
			h.HasLayers, l.layers = true, v
		case 6:
			h.HasFSLayers = true
		case 7:
			h.Annotations, err = values(v, annotations)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		return nil
	})
	if err != nil {
		return Head{}, lists{}, err
	}
	return h, l, nil
}

// descriptors reads a list of them.
func descriptors(what string, raw []byte, annotations []string) (list []ocispec.Descriptor, err error) {
	if raw == nil {
		return nil, nil
	}
	n := 0
	// Counted first, so that no memory is taken for a list that is refused.
	if err := array(what, raw, func([]byte) error { n++; return nil }); err != nil {
		return nil, err
	}
	if n > MaxList {
		return nil, fmt.Errorf("%w: %d %s, limit %d", ErrLimit, n, what, MaxList)
	}
	list = make([]ocispec.Descriptor, n)
	n = 0
	err = array(what, raw, func(v []byte) error {
		n++
		if err := descriptor(v, annotations, &list[n-1]); err != nil {
			return fmt.Errorf("%s: entry %d: %w", what, n, err)
		}
		return nil
	})
	return list, err
}

// descriptor reads one into d, which is empty.
func descriptor(v []byte, annotations []string, d *ocispec.Descriptor) error {
	seen := 0
	return members("a descriptor", v, func(name string, v []byte) (err error) {
		i, err := known(name, &seen, "mediaType", "digest", "size", "artifactType", "platform", "annotations")
		if err != nil {
			return err
		}
		switch i {
		case 0:
			return word(name, v, &d.MediaType)
		case 1:
			return word(name, v, (*string)(&d.Digest))
		case 2:
			if json.Unmarshal(v, &d.Size) != nil {
				return fmt.Errorf("size is not a whole number of 64 bits")
			}
		case 3:
			return word(name, v, &d.ArtifactType)
		case 4:
			if !null(v) {
				d.Platform = &ocispec.Platform{}
				return platform(v, d.Platform)
			}
		case 5:
			d.Annotations, err = values(v, annotations)
		}
		return err
	})
}

func platform(v []byte, p *ocispec.Platform) error {
	seen := 0
	return members("a platform", v, func(name string, v []byte) error {
		i, err := known(name, &seen, "architecture", "os", "os.version", "os.features", "variant")
		if err != nil {
			return err
		}
		switch i {
		case 0:
			return word(name, v, &p.Architecture)
		case 1:
			return word(name, v, &p.OS)
		case 2:
			return word(name, v, &p.OSVersion)
		case 3:
			return array(name, v, func(v []byte) error {
				if len(p.OSFeatures) == maxFeatures {
					return fmt.Errorf("%w: a platform of more than %d features", ErrLimit, maxFeatures)
				}
				var s string
				err := word(name, v, &s)
				p.OSFeatures = append(p.OSFeatures, s)
				return err
			})
		case 4:
			return word(name, v, &p.Variant)
		}
		return nil
	})
}

// values returns the wanted annotations; nil if there is none. Of one that is there
// twice the last counts, as for all decoders. One that is too long is left out.
func values(v []byte, wanted []string) (kept map[string]string, err error) {
	err = members("annotations", v, func(name string, v []byte) error {
		if v[0] != '"' && !null(v) {
			return errors.New("annotations: a value is no string")
		}
		for _, w := range wanted {
			if name != w {
				continue
			}
			delete(kept, w)
			if len(v) > maxValue {
				break
			}
			if kept == nil {
				kept = map[string]string{}
			}
			if kept[w] = ""; !null(v) {
				kept[w] = unquote(v)
			}
		}
		return nil
	})
	if err != nil || len(kept) == 0 {
		return nil, err
	}
	return kept, nil
}

// known returns the place of name in names, or -1. It notes in seen which were there.
func known(name string, seen *int, names ...string) (int, error) {
	for i, n := range names {
		switch {
		case name == n:
			if *seen&(1<<i) != 0 {
				return -1, fmt.Errorf("%s is there twice", n)
			}
			*seen |= 1 << i
			return i, nil
		case len(name) >= len(n) && len(name) <= 3*len(n) && strings.EqualFold(name, n):
			return -1, fmt.Errorf("a member is called %q, not %s", name, n)
		}
	}
	return -1, nil
}

// word reads a short string, or null, into s.
func word(what string, v []byte, s *string) error {
	switch {
	case null(v):
		return nil
	case v[0] != '"':
		return fmt.Errorf("%s is no string", what)
	case len(v) > maxWord:
		return fmt.Errorf("%w: %s of %d bytes, limit %d", ErrLimit, what, len(v), maxWord)
	}
	*s = unquote(v)
	return nil
}

// unquote returns the string that the JSON string v stands for.
func unquote(v []byte) string {
	inner := v[1 : len(v)-1]
	if bytes.IndexByte(inner, '\\') < 0 && utf8.Valid(inner) {
		for _, s := range frequent {
			if string(inner) == s {
				return s
			}
		}
		return string(inner)
	}
	var s string
	_ = json.Unmarshal(v, &s) // it is valid
	return s
}

// frequent are strings that a long list has in each entry.
var frequent = [...]string{
	ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex, ocispec.MediaTypeImageConfig, ocispec.MediaTypeImageLayerGzip,
	DockerManifest, DockerList,
	"application/vnd.cncf.notary.signature", "linux", "amd64", "arm64",
}

func null(v []byte) bool { return v[0] == 'n' }

// MayBe reports whether a manifest that a list says to be of type listed may be of type
// want: it is listed as that, as nothing, or as what a config is in manifests of any
// type. Registries, copy tools and cosign 2 put the media type of the config there.
func MayBe(listed, want string) bool {
	switch listed {
	case want, "", ocispec.MediaTypeEmptyJSON, ocispec.MediaTypeImageConfig, "application/vnd.unknown.config.v1+json":
		return true
	}
	return false
}
