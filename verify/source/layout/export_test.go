package layout

import "context"

// Hang has all that opens the layout hang until free is called.
func (s *Source) Hang() (free func()) {
	end := make(chan struct{})
	s.do = func(ctx context.Context, name string, seen *Tar) (*Dir, error) {
		<-end
		return Open(ctx, name, seen)
	}
	return func() { close(end) }
}

// Hung is how many reads nobody waits for any more.
func (s *Source) Hung() int { return int(s.hung.Load()) }
