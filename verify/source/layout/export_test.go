package layout

import (
	"context"
	"sync/atomic"
)

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

// Reads counts the files that are opened from now on.
func (s *Source) Reads() *atomic.Int64 {
	var n atomic.Int64
	s.do = func(ctx context.Context, name string, seen *Tar) (*Dir, error) {
		dir, err := Open(ctx, name, seen)
		if err == nil {
			dir.opened = func(string) { n.Add(1) }
		}
		return dir, err
	}
	return &n
}

// Remembers is how much room the layout and those of its room take.
func (s *Source) Remembers() int64 { return s.room.used.Load() }

// Fill leaves a room with n bytes, until free is called.
func (r *Room) Fill(n int64) (free func()) {
	r.take(roomBytes - n)
	return func() { r.give(roomBytes - n) }
}
