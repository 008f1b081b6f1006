package store

// Read is closed when the directory was read.
func (s *Store) Read() <-chan struct{} { return s.read }

// Looked is closed when the bundles were read.
func (s *Store) Looked() <-chan struct{} { return s.looked }

// Waiting returns how much evidence waits to be written.
func (s *Store) Waiting() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.waiting)
}

// Most sets how many files there may be.
func (s *Store) Most(files int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.most = files
}
