package layout

import (
	"context"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Blob returns the blob of the layout that d describes, after take, told its size, has
// agreed. It need not be named in index.json. Errors are those of [Dir.Blob].
func (s *Source) Blob(ctx context.Context, d ocispec.Descriptor, take func(int64) error) ([]byte, error) {
	dir, err := s.dir(ctx)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return dir.Blob(d, take)
}
