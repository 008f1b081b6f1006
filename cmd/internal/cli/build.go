package cli

import (
	"fmt"
	"runtime"
	"runtime/debug"
)

// A Build says what this binary is.
type Build struct {
	Version string `json:"version"`
	Commit  string `json:"commit,omitempty"`
	Go      string `json:"go"`
	OS      string `json:"os"`
	Arch    string `json:"arch"`
}

// ThisBuild is that of the process; version is what the linker was told.
func ThisBuild(version string) Build {
	b := Build{Version: version, Go: runtime.Version(), OS: runtime.GOOS, Arch: runtime.GOARCH}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				b.Commit = s.Value
			}
		}
	}
	return b
}

func (b Build) String() string {
	s := fmt.Sprintf("tidewaiter %s %s/%s %s", b.Version, b.OS, b.Arch, b.Go)
	if b.Commit != "" {
		s += fmt.Sprintf(" %.12s", b.Commit)
	}
	return s
}
