package verify

import (
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify/oci"
)

// A Name is an image name in canonical form.
type Name = oci.Name

// A Use says what an image is for. The zero Use is denied.
type Use uint8

const (
	_            Use = iota
	UseContainer     // a container is about to be created from it
	UseVolume        // it is mounted into a container as an image volume (KEP-4639)
	UsePrefetch      // the node has it or runs it already; nobody waits and nothing starts
	UseQuestion      // somebody asks (the CLI); nothing starts
)

// runs reports whether something is about to start with the image.
func (u Use) runs() bool { return u == UseContainer || u == UseVolume }

// A Binding says how Target and Config were tied to what runs. The zero Binding
// is denied with IMAGE_UNRESOLVED.
type Binding uint8

const (
	_             Binding = iota
	BoundRuntime          // the runtime handed over target and config digest
	BoundSnapshot         // the chain ID equals the Parent of the container's snapshot
	BoundDigest           // the asker named the digest; only with UseQuestion
	BoundRecord           // an image record of this node leads to it; only with UsePrefetch
)

// String names the binding as reports show it.
func (b Binding) String() string {
	switch b {
	case BoundRuntime:
		return "runtime"
	case BoundSnapshot:
		return "snapshot"
	case BoundDigest:
		return "digest"
	case BoundRecord:
		return "record"
	}
	return "none"
}

// MarshalText writes String.
func (b Binding) MarshalText() ([]byte, error) { return []byte(b.String()), nil }

// MaxRelated bounds Image.Related, and MaxNames Image.Names: any pod author can add
// image records.
const (
	MaxRelated = 8
	MaxNames   = 64
)

// An Image is what a runtime is about to run, as the runtime itself told it, and
// bound to content. Nothing in it was resolved at a registry. The zero Image is
// denied. An image volume has no name that the runtime tells: it has those of all
// image records that lead to its content, and one that is allowed is enough, as a
// pod's author could have asked for that one. Where the image could not be bound, Fault says why and nothing else
// but Name, Asked and Pod is meaningful.
type Image struct {
	Name  Name   // selects the rule and the mirrors; never leads to content
	Asked string // the pod's own string, for messages where Name is empty
	Names []Name // with UseVolume, at most MaxNames further names of the same content

	Target   ocispec.Descriptor   // what the image record points to: an index or a manifest
	Manifest ocispec.Descriptor   // the manifest selected from Target; Target itself if that is one
	Config   digest.Digest        // digest of the image config that runs: the CRI image ID
	Related  []ocispec.Descriptor // at most MaxRelated further targets that lead to Config

	// LayersVerified says that what runs has the layers that Config lists, whichever Target
	// lists: containerd checked them when it unpacked. Only then does a signature of
	// another target of the same config count, or that Config itself is listed.
	LayersVerified bool

	Use      Use
	Binding  Binding
	Revision Revision // of the configuration under which it was bound; not with UseQuestion
	Pod      Pod
	Fault    *Fault

	links []ocispec.Descriptor // that lead to Config; set by the Engine, which has seen that they do
}

// maxName bounds host and path of a name together; longer ones cannot be pulled
// (distribution/reference allows 255 bytes of path, DNS 253 of host). maxPart
// bounds digests and media types (RFC 6838 allows 255 bytes).
const (
	maxName = 600
	maxPart = 255
)

// validate says why no container may run from i whatever signatures there are, or
// returns nil where they decide.
func (i Image) validate() *Fault {
	bound := false
	switch i.Use {
	case UseContainer:
		bound = i.Config != "" && (i.Binding == BoundRuntime || i.Binding == BoundSnapshot)
	case UseVolume:
		bound = i.Config != "" && i.Binding == BoundSnapshot
	case UsePrefetch:
		bound = i.Config != "" && (i.Binding == BoundRuntime || i.Binding == BoundSnapshot || i.Binding == BoundRecord)
	case UseQuestion:
		bound = i.Binding == BoundDigest
	}
	switch {
	case i.Fault != nil:
		return i.Fault
	case !bound || i.Target.Digest == "" || i.Manifest.Digest == "":
		return &Fault{ImageUnresolved, "the image is not bound to what runs"}
	case len(i.Name.Host)+len(i.Name.Path) > maxName ||
		max(len(i.Config), len(i.Target.Digest), len(i.Manifest.Digest), len(i.Target.MediaType), len(i.Manifest.MediaType)) > maxPart:
		return &Fault{ImageUnresolved, "the name, a digest or a media type of the image is too long"}
	}
	return nil
}

// subjects lists the descriptors that a signature of the image may be over, in
// the order in which they are asked for.
func (i Image) subjects() []ocispec.Descriptor {
	list := []ocispec.Descriptor{i.Target}
	if i.Manifest.Digest != i.Target.Digest {
		list = append(list, i.Manifest)
	}
	for _, link := range i.links {
		if link.Digest != i.Target.Digest && link.Digest != i.Manifest.Digest {
			list = append(list, link)
		}
	}
	return append(list, i.Related[:min(len(i.Related), MaxRelated)]...)
}

// A Pod says for whom an image starts. It identifies and does not authorise:
// its author chose everything in it.
type Pod struct {
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
	UID       string `json:"uid,omitempty"`
	Container string `json:"container,omitempty"`
}

// A Fault says why an image could not be bound to what runs. It is an error so
// that the code that binds can return it.
type Fault struct {
	Reason Reason
	Detail string // one clause for a person; no argv, no environment
}

// Error implements error.
func (f *Fault) Error() string { return f.Reason.String() + ": " + f.Detail }
