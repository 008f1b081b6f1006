package node

import (
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The versions that the suites run on. Any other 2.x release of containerd can
// be asked for in [Options].
const (
	Containerd24 = "2.4.2" // hands the image to NRI
	Containerd23 = "2.3.7" // does not
	Containerd22 = "2.2.9" // the oldest that asks a plugin in a hook that stays closed
	Containerd21 = "2.1.9" // has no such hook

	runcVersion = "1.5.2"
	cniVersion  = "1.9.1"

	notationVersion     = "1.3.2"
	orasVersion         = "1.3.1"
	distributionVersion = "3.1.2"

	helmVersion = "3.19.0"
)

// Versions returns the versions of containerd that the environment variable
// TIDEWAITER_TEST_CONTAINERD names, with spaces between, and without it these.
// What is older than 2.2 is left out: see Older.
func Versions(these ...string) []string {
	if named := strings.Fields(os.Getenv(versionsVariable)); len(named) > 0 {
		these = named
	}
	return slices.DeleteFunc(slices.Clone(these), older)
}

// Older returns the versions that TIDEWAITER_TEST_CONTAINERD names which have no
// hook that stays closed.
func Older() []string {
	return slices.DeleteFunc(strings.Fields(os.Getenv(versionsVariable)), func(v string) bool { return !older(v) })
}

const versionsVariable = "TIDEWAITER_TEST_CONTAINERD"

func older(version string) bool {
	return strings.HasPrefix(version, "2.0.") || strings.HasPrefix(version, "2.1.")
}

// Tools are the programs that a node runs.
type Tools struct {
	Containerd string // path; the shim and ctr lie beside it
	Shim       string
	Ctr        string
	Runc       string
	CNIDir     string // holds the loopback plugin
}

// FindTools returns the tools for a version of containerd such as "2.4.2" and
// builds what the cache does not hold, each with `go install package@version`:
// about two minutes for a version of containerd, once. The cache is
// $TIDEWAITER_TEST_CACHE, else tidewaiter-test in the user's cache directory.
//
// A tool is built in a directory of its own that is renamed when it is complete,
// under a lock of the cache, so that an interrupted build leaves nothing behind
// that a later one believes, and two processes build it once. progress gets a
// line for each build; what a build prints is seen only in the error of one that
// fails. runc needs a C compiler, pkg-config and libseccomp's headers: where they
// are missing and this is root they are installed with apt-get.
func FindTools(ctx context.Context, containerd string, progress io.Writer) (*Tools, error) {
	const c = "github.com/containerd/containerd/v2/cmd/"
	t := tool{
		name: "containerd", version: containerd, takes: "2 minutes",
		packages: []string{c + "containerd", c + "containerd-shim-runc-v2", c + "ctr"},
	}
	if older(containerd) {
		// Its go.mod has exclude directives, which package@version does not allow.
		t.module = "github.com/containerd/containerd/v2"
	}
	ctrd, err := install(ctx, progress, t)
	if err != nil {
		return nil, err
	}
	runc, err := install(ctx, progress, tool{
		name: "runc", version: runcVersion, takes: "20 seconds",
		packages: []string{"github.com/opencontainers/runc"}, tags: "seccomp", cgo: true, before: needSeccomp,
	})
	if err != nil {
		return nil, err
	}
	cni, err := install(ctx, progress, tool{
		name: "cni-plugins", version: cniVersion, takes: "20 seconds",
		packages: []string{"github.com/containernetworking/plugins/plugins/main/loopback"},
	})
	if err != nil {
		return nil, err
	}
	return &Tools{
		Containerd: filepath.Join(ctrd, "containerd"),
		Shim:       filepath.Join(ctrd, "containerd-shim-runc-v2"),
		Ctr:        filepath.Join(ctrd, "ctr"),
		Runc:       filepath.Join(runc, "runc"),
		CNIDir:     cni,
	}, nil
}

// FindNotation returns the path of the notation CLI, which it builds as FindTools
// builds its tools where the cache does not hold it.
func FindNotation(ctx context.Context, progress io.Writer) (string, error) {
	dir, err := install(ctx, progress, tool{
		name: "notation", version: notationVersion, takes: "half a minute",
		module: "github.com/notaryproject/notation", packages: []string{"github.com/notaryproject/notation/cmd/notation"},
	})
	return filepath.Join(dir, "notation"), err
}

// FindPromtool returns the path of Prometheus' promtool: of the machine's own, else of
// Debian's package prometheus, which is taken apart in the cache and not installed.
func FindPromtool(ctx context.Context, progress io.Writer) (string, error) {
	const promtool, inside = "promtool", "usr/bin/promtool"
	if path, err := exec.LookPath(promtool); err == nil {
		return path, nil
	}
	dir, err := cached("prometheus-debian")
	if err != nil {
		return "", err
	}
	unlock, err := lock(ctx, dir)
	if err != nil {
		return "", err
	}
	defer unlock()
	if _, err := os.Stat(dir); err == nil {
		return filepath.Join(dir, inside), nil
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return "", errors.New("there is no promtool, and no apt-get to have Debian's package of prometheus from")
	}
	fmt.Fprintln(progress, "fetching promtool from Debian's package of prometheus")
	tmp, err := building(dir)
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	fetch := func() error {
		cmd := aptGet(ctx, "download", "prometheus")
		cmd.Dir = tmp
		return run(cmd)
	}
	if fetch() != nil { // on a new machine apt knows no packages yet
		if os.Geteuid() == 0 {
			if err := run(aptGet(ctx, "update")); err != nil {
				return "", err
			}
		}
		if err := fetch(); err != nil {
			return "", err
		}
	}
	packages, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(packages) != 1 {
		return "", fmt.Errorf("apt-get fetched %q, not one package", packages)
	}
	if err := run(exec.CommandContext(ctx, "dpkg-deb", "-x", packages[0], tmp)); err != nil {
		return "", err
	}
	if err := os.Remove(packages[0]); err != nil {
		return "", err
	}
	return filepath.Join(dir, inside), os.Rename(tmp, dir)
}

// FindHelm returns the path of helm, which it builds as FindTools builds its tools
// where the cache does not hold it.
func FindHelm(ctx context.Context, progress io.Writer) (string, error) {
	dir, err := install(ctx, progress, tool{
		name: "helm", version: helmVersion, takes: "4 minutes",
		packages: []string{"helm.sh/helm/v3/cmd/helm"},
	})
	return filepath.Join(dir, "helm"), err
}

// FindDistribution returns the path of the CNCF's registry, which it builds as
// FindTools builds its tools where the cache does not hold it.
func FindDistribution(ctx context.Context, progress io.Writer) (string, error) {
	dir, err := install(ctx, progress, tool{
		name: "distribution", version: distributionVersion, takes: "2 minutes",
		packages: []string{"github.com/distribution/distribution/v3/cmd/registry"},
	})
	return filepath.Join(dir, "registry"), err
}

// Programs are built from a module of their own below these tests, whose go.mod and
// go.sum pin everything.
type Programs struct {
	Name     string   // of the directory in the cache, which ends with the sum of go.mod and go.sum
	Dir      string   // of the module
	Packages []string // main packages
	LDFlags  string   // for all of them
	Takes    string   // about how long the first time: "10 minutes"
}

// FindPrograms returns the directory that holds the programs, each under the name
// that `go install` gives it, and builds them as FindTools does.
func FindPrograms(ctx context.Context, progress io.Writer, p Programs) (string, error) {
	sum := sha256.New()
	for _, name := range []string{"go.mod", "go.sum"} {
		b, err := os.ReadFile(filepath.Join(p.Dir, name))
		if err != nil {
			return "", err
		}
		sum.Write(b)
	}
	return install(ctx, progress, tool{
		name: p.Name, version: hex.EncodeToString(sum.Sum(nil)[:6]), packages: p.Packages,
		in: p.Dir, ldflags: p.LDFlags, takes: p.Takes,
	})
}

// FindOras returns the path of the oras CLI, which it builds as FindTools builds its
// tools where the cache does not hold it.
func FindOras(ctx context.Context, progress io.Writer) (string, error) {
	dir, err := install(ctx, progress, tool{
		name: "oras", version: orasVersion, takes: "half a minute",
		module: "oras.land/oras", packages: []string{"oras.land/oras/cmd/oras"},
	})
	return filepath.Join(dir, "oras"), err
}

// Tags are the build tags with which the Makefile builds the program.
const Tags = "grpcnotrace"

// BuildTidewaiter builds the program under test from the tree that this module
// stands in and returns its path. It builds each time: Go's own cache knows what
// changed. The working directory must be inside this module, as it is in a test.
func BuildTidewaiter(ctx context.Context) (string, error) {
	return buildTidewaiter(ctx, "tidewaiter-")
}

// buildTidewaiter builds the program with flags of go build. Its name in the cache
// starts with prefix.
func buildTidewaiter(ctx context.Context, prefix string, flags ...string) (string, error) {
	var out, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "github.com/tidewaiter/tidewaiter")
	cmd.Stdout, cmd.Stderr = &out, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("finding the module tidewaiter: %w\n%s", err, stderr.Bytes())
	}
	root := strings.TrimSpace(out.String())
	// One path a checkout, so that two of them do not run each other's program.
	sum := sha256.Sum256([]byte(root))
	bin, err := cached(prefix + hex.EncodeToString(sum[:6]))
	if err != nil {
		return "", err
	}
	unlock, err := lock(ctx, bin)
	if err != nil {
		return "", err
	}
	defer unlock()
	// go build writes in place and a gate may be running the old program: build
	// beside it and rename.
	next := bin + ".next"
	args := append([]string{"build", "-trimpath", "-tags", Tags, "-ldflags", "-s -w", "-o", next}, flags...)
	if err := goTool(ctx, root, nil, append(args, "./cmd/tidewaiter")...); err != nil {
		return "", fmt.Errorf("building tidewaiter: %w", err)
	}
	return bin, os.Rename(next, bin)
}

//go:embed testdata/program/main.go
var programSource []byte

// buildProgram builds the program that images hold and returns its bytes.
func buildProgram(ctx context.Context) ([]byte, error) {
	sum := sha256.Sum256(programSource)
	bin, err := cached("program-" + hex.EncodeToString(sum[:6]))
	if err != nil {
		return nil, err
	}
	unlock, err := lock(ctx, bin)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if b, err := os.ReadFile(bin); err == nil {
		return b, nil
	}
	dir, err := building(bin)
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	if err := os.WriteFile(filepath.Join(dir, "main.go"), programSource, 0o644); err != nil {
		return nil, err
	}
	out := filepath.Join(dir, "program")
	if err := goTool(ctx, dir, []string{"CGO_ENABLED=0"}, "build", "-trimpath", "-ldflags", "-s -w -buildid=", "-o", out, "main.go"); err != nil {
		return nil, fmt.Errorf("building the program of the images: %w", err)
	}
	b, err := os.ReadFile(out)
	if err != nil {
		return nil, err
	}
	return b, os.Rename(out, bin)
}

// A tool is what one `go install` builds.
type tool struct {
	name, version string
	packages      []string
	module        string // built in a module that requires this one, instead of as package@version
	in            string // or built in the module of this directory
	tags, ldflags string
	cgo           bool
	takes         string // about how long the first time, for the progress line
	before        func(context.Context, io.Writer) error
}

// install returns the directory that holds the binaries of t.
func install(ctx context.Context, progress io.Writer, t tool) (string, error) {
	version := strings.TrimPrefix(t.version, "v")
	if version == "" || strings.ContainsAny(version, "/ ") {
		return "", fmt.Errorf("%q is not a version of %s", t.version, t.name)
	}
	dir, err := cached(t.name + "-" + version)
	if err != nil {
		return "", err
	}
	unlock, err := lock(ctx, dir)
	if err != nil {
		return "", err
	}
	defer unlock()
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	if t.before != nil {
		if err := t.before(ctx, progress); err != nil {
			return "", fmt.Errorf("building %s %s: %w", t.name, version, err)
		}
	}
	fmt.Fprintf(progress, "building %s %s (about %s the first time)\n", t.name, version, t.takes)
	start := time.Now()
	tmp, err := building(dir)
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	cgo := "CGO_ENABLED=0"
	if t.cgo {
		cgo = "CGO_ENABLED=1"
	}
	args := []string{"install"}
	if t.tags != "" {
		args = append(args, "-tags", t.tags)
	}
	in := tmp
	switch {
	case t.in != "":
		in, args = t.in, append(append(args, "-trimpath", "-ldflags", t.ldflags), t.packages...)
	case t.module == "":
		for _, p := range t.packages {
			args = append(args, p+"@v"+version)
		}
	default:
		// What go.mod leaves out is what the tool's own go.mod requires.
		args = append(append(args, "-mod=mod", "-trimpath"), t.packages...)
		if in, err = os.MkdirTemp("", "tidewaiter-build-"); err != nil {
			return "", err
		}
		defer os.RemoveAll(in)
		mod := fmt.Sprintf("module tool\n\nrequire %s v%s\n", t.module, version)
		if err := os.WriteFile(filepath.Join(in, "go.mod"), []byte(mod), 0o644); err != nil {
			return "", err
		}
	}
	// A network may fail once: what was fetched by then is not fetched again.
	for left := 2; ; left-- {
		err := goTool(ctx, in, []string{cgo, "GOBIN=" + tmp}, args...)
		if err == nil {
			break
		}
		if left == 0 || pause(ctx, 2*time.Second) != nil {
			return "", fmt.Errorf("building %s %s: %w", t.name, version, err)
		}
	}
	if err := os.Rename(tmp, dir); err != nil {
		return "", err
	}
	fmt.Fprintf(progress, "built %s %s in %s\n", t.name, version, time.Since(start).Round(time.Second))
	return dir, nil
}

// goEnv returns a variable of the go command.
func goEnv(ctx context.Context, name string) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "env", name).Output()
	if err != nil {
		return "", fmt.Errorf("go env %s: %w", name, err)
	}
	return strings.TrimSpace(string(out)), nil
}

// goTool runs the go command in dir without the flags and the workspace of
// whoever runs the tests.
func goTool(ctx context.Context, dir string, env []string, args ...string) error {
	// The go command leaves its work directory behind when it is interrupted.
	work, err := os.MkdirTemp("", "tidewaiter-build-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), append([]string{"GOFLAGS=", "GOWORK=off", "GOOS=", "GOARCH=", "GOTMPDIR=" + work}, env...)...)
	return run(cmd)
}

// run runs cmd and puts what it printed into the error.
func run(cmd *exec.Cmd) error {
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, out.Bytes())
	}
	return nil
}

// needSeccomp makes sure that runc can be built with seccomp: without it runc
// refuses every pod that a kubelet makes.
func needSeccomp(ctx context.Context, progress io.Writer) error {
	_, gcc := exec.LookPath("gcc")
	if gcc == nil && exec.CommandContext(ctx, "pkg-config", "--exists", "libseccomp").Run() == nil {
		return nil
	}
	const wants = "runc needs gcc, pkg-config and libseccomp-dev"
	if os.Geteuid() != 0 {
		return errors.New(wants + ": install them, or run this as root once")
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return errors.New(wants + ", and there is no apt-get to install them with")
	}
	fmt.Fprintln(progress, "installing gcc, pkg-config and libseccomp-dev")
	if err := run(aptGet(ctx, "update")); err != nil {
		return fmt.Errorf("%s: %w", wants, err)
	}
	if err := run(aptGet(ctx, "install", "-y", "--no-install-recommends", "gcc", "libc6-dev", "pkg-config", "libseccomp-dev")); err != nil {
		return fmt.Errorf("%s: %w", wants, err)
	}
	return nil
}

func aptGet(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "apt-get", append([]string{"-o", "Acquire::Retries=5"}, args...)...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
	return cmd
}

// cached returns the path of name in the cache, whose directory it makes.
func cached(name string) (string, error) {
	dir := os.Getenv("TIDEWAITER_TEST_CACHE")
	if dir == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			return "", fmt.Errorf("no cache directory, set TIDEWAITER_TEST_CACHE: %w", err)
		}
		dir = filepath.Join(user, "tidewaiter-test")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, name), os.MkdirAll(dir, 0o755)
}

// building makes the directory where a path in the cache is built, empty also
// after a build that was killed. The caller holds the lock of path.
func building(path string) (string, error) {
	dir := path + ".building"
	if err := os.RemoveAll(dir); err != nil {
		return "", err
	}
	return dir, os.Mkdir(dir, 0o755)
}

// lock takes the lock of a path in the cache, also against other processes, and
// waits for it until ctx ends. The lock of a process that died is free.
func lock(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path+".lock", os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, fmt.Errorf("locking %s: %w", f.Name(), err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("waiting for the lock %s: %w", f.Name(), ctx.Err())
		case <-time.After(200 * time.Millisecond):
		}
	}
}
