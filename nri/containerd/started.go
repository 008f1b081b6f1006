package containerd

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	"github.com/containerd/nri/pkg/api"
	"github.com/opencontainers/go-digest"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// Decided remembers for which configs a container's creation was allowed, so
// that Started can compare. Nothing else is remembered of a container. Images that
// could not be bound, which audit allows all the same, are none to compare with.
func (r *Resolver) Decided(id string, images []verify.Image) {
	if !r.compares.Load() {
		return // nobody will ask
	}
	configs := make([]digest.Digest, 0, len(images))
	for _, i := range images {
		if i.Fault == nil && i.Use == verify.UseContainer { // a volume's config does not run
			configs = append(configs, i.Config)
		}
	}
	r.decided.Add(id, configs)
}

// Started compares the config with which a container was created with those that
// were allowed for it, on runtimes that do not tell the config before: images
// with equal layers may differ in entrypoint and environment. None returned means
// that they agree.
//
// A container that another run of the gate allowed, or that was created without
// one, is bound as one to be created is, and must have the very config that its
// name leads to: then all images returned must be allowed.
func (r *Resolver) Started(ctx context.Context, pod *api.PodSandbox, ctr *api.Container) []verify.Image {
	var images []verify.Image
	allowed, decided := r.decided.Get(ctr.GetId())
	if decided {
		images = []verify.Image{imageOf(pod, ctr)}
	} else {
		images = r.Resolve(ctx, pod, ctr)
		allowed = []digest.Digest{images[0].Config}
	}
	if images[0].Fault == nil {
		images[0].Fault = r.compare(ctx, ctr.GetId(), allowed)
	}
	if decided && images[0].Fault == nil {
		return nil
	}
	return images
}

// compare says why a container was not created with one of the allowed configs.
func (r *Resolver) compare(ctx context.Context, id string, allowed []digest.Digest) *verify.Fault {
	if len(allowed) == 0 {
		return &verify.Fault{Reason: verify.ImageUnresolved, Detail: "which image the container may run was not established when it was created"}
	}
	config, err := r.records.ContainerConfig(ctx, id)
	if err != nil {
		return &verify.Fault{Reason: verify.ImageUnresolved, Detail: err.Error()}
	}
	if !slices.Contains(allowed, config) {
		return &verify.Fault{Reason: verify.ImageMismatch, Detail: fmt.Sprintf("the container was created from image ID %s and allowed as %s: the name moved while it was created", text.Clean(config.String(), 96), allowed[0])}
	}
	return nil
}

// imageRef reads the image ID out of the CRI plugin's own record of a container.
func imageRef(raw []byte) (digest.Digest, error) {
	var m struct {
		Metadata struct {
			ImageRef string
		}
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return "", fmt.Errorf("the CRI plugin's record of the container: %w", err)
	}
	d := digest.Digest(m.Metadata.ImageRef)
	if err := d.Validate(); err != nil {
		return "", fmt.Errorf("the CRI plugin's record of the container: image ref: %w", err)
	}
	return d, nil
}
