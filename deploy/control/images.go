package control

import (
	"context"
	"slices"
	"time"

	"github.com/tidewaiter/tidewaiter/verify"
)

// ImagesPath is where the socket answers with Images.
const ImagesPath = "/v1/images"

// ImagesTime is how long the gate may take for Images.
const ImagesTime = time.Minute

// ImagesSchema is that of Images. Fields are added and never change.
const ImagesSchema = "tidewaiter.dev/images/v1"

// Images are all images of the node that a pod can name, in the order of names. One
// that was pulled by a tag is listed under that, and not by its digest once more.
type Images struct {
	Schema   string  `json:"schema"`
	Node     string  `json:"node"`
	Mode     string  `json:"mode"`
	Revision string  `json:"revision"`
	More     bool    `json:"more"`             // the node has more than are listed
	Unseen   string  `json:"unseen,omitempty"` // why it is not known, of some containers, which images they run
	List     []Image `json:"images"`

	// TooLong are containers that run and would be refused, whatever their image is, as
	// POD_TOO_LARGE. At most 100.
	TooLong []string `json:"tooLong,omitempty"`
}

// An Image is one of them with what enforce would answer to it now.
type Image struct {
	Image      string     `json:"image"`
	Target     string     `json:"target"`             // digest of what the record points to
	Manifest   string     `json:"manifest,omitempty"` // and of the manifest and config that run here
	Config     string     `json:"config,omitempty"`
	Allowed    bool       `json:"allowed"`
	Reason     string     `json:"reason"`
	ID         string     `json:"id"`
	Rule       string     `json:"rule,omitempty"`
	Detail     string     `json:"detail,omitempty"`
	Signer     string     `json:"signer,omitempty"` // who met the rule
	Source     string     `json:"source,omitempty"`
	Until      *time.Time `json:"expiresAt,omitempty"`      // when an allow ends
	Ends       string     `json:"expiresBecause,omitempty"` // what it is that ends: signature, certificate, or nothing, and it is only looked at again
	Resolved   string     `json:"resolved,omitempty"`       // of a list that is judged ahead: the mirror that said which image a tag leads to
	Namespaces []string   `json:"namespaces,omitempty"`     // where a digest allowlist lets it run whatever the reason says
	Runs       []string   `json:"runs,omitempty"`           // namespaces of the pods that run it; "" is outside Kubernetes
	NotImage   bool       `json:"notImage,omitempty"`       // the record is of something else, such as a signature that was imported
}

// Answers of an image.
const (
	Allowed      = "allowed"
	Listed       = "listed" // by its digest, wherever it runs
	Denied       = "denied"
	Inconclusive = "inconclusive" // it could not be found out
	NotImage     = "other"        // no image at all
)

// Answer is what enforce answers to the image where it runs. A digest that is listed
// for other namespaces than those in which it runs is denied there.
func (i Image) Answer() string {
	listed := len(i.Namespaces) > 0 && !slices.ContainsFunc(i.Runs, func(n string) bool { return !slices.Contains(i.Namespaces, n) })
	switch {
	case i.Allowed:
		return Allowed
	case listed:
		return Listed
	case i.NotImage:
		return NotImage
	case verify.Reason(i.Reason).Inconclusive():
		return Inconclusive
	}
	return Denied
}

// AskImages asks the gate whose run directory is dir for its Images.
func AskImages(ctx context.Context, dir string) (l Images, err error) {
	err = Get(ctx, dir, Question{Path: ImagesPath, Schema: ImagesSchema, Longest: ImagesTime + 5*time.Second, Bytes: 8 << 20}, &l)
	return l, err
}
