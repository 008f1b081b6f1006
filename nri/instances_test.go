package nri

import (
	"os"
	"path/filepath"
	"testing"
)

func live(t *testing.T, i *Instance, want int) {
	t.Helper()
	if n, err := i.Live(); err != nil || n != want {
		t.Errorf("%d live, %v; want %d", n, err, want)
	}
}

func TestInstances(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "instances")
	join := func() *Instance {
		i, err := Join(dir)
		if err != nil {
			t.Fatal(err)
		}
		return i
	}
	a := join()
	live(t, a, 1)
	b := join()
	live(t, a, 2)
	live(t, b, 2)
	// A process that is killed loses its lock and leaves its file.
	b.file.Close()
	live(t, a, 1)
	if _, err := os.Stat(filepath.Join(dir, b.name)); !os.IsNotExist(err) {
		t.Errorf("the file of an ended instance stays: %v", err)
	}
	// What is not ours counts for nothing and stays.
	if err := os.Mkdir(filepath.Join(dir, "folder"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/dev/null", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	live(t, a, 1)
	for _, name := range []string{"folder", "link"} {
		if _, err := os.Lstat(filepath.Join(dir, name)); err != nil {
			t.Error(err)
		}
	}
	c := join()
	if err := a.Leave(); err != nil {
		t.Error(err)
	}
	live(t, c, 1)
	if err := c.Leave(); err != nil {
		t.Error(err)
	}
	if s, err := os.Stat(dir); err != nil || s.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", s.Mode(), err)
	}
}

// Who counts may meet a file that is made but not locked yet. Nobody loses by it.
func TestInstancesJoinWhileCounted(t *testing.T) {
	dir := t.TempDir()
	first, err := Join(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Leave()
	stop := make(chan struct{})
	counted := make(chan error, 1)
	go func() {
		for {
			select {
			case <-stop:
				counted <- nil
				return
			default:
				if _, err := first.Live(); err != nil {
					counted <- err
					return
				}
			}
		}
	}()
	for range 200 {
		i, err := Join(dir)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := i.Live(); err != nil || n != 2 {
			t.Fatalf("%d live, %v", n, err)
		}
		if err := i.Leave(); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	if err := <-counted; err != nil {
		t.Error(err)
	}
}

func TestInstancesUnwritable(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if i, err := Join(filepath.Join(file, "instances")); err == nil || i != nil {
		t.Errorf("joined %v in a file", i)
	}
}
