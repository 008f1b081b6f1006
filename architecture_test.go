// Package tidewaiter_test holds the walls of the program up: who may import whom,
// who may let an image run, and who may look at the clock. It reads the sources
// of the whole module, also those that do not compile and those for other
// machines, and asks the go command for what the binary is linked from.
package tidewaiter_test

import (
	"bufio"
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
)

const module = "github.com/tidewaiter/tidewaiter"

// A file is one Go file of this module.
type file struct {
	path  string // from the root, with slashes
	src   []byte
	ast   *ast.File
	fset  *token.FileSet
	tests bool // a _test file
}

func (f *file) dir() string { return path.Dir(f.path) }

// support reports whether f belongs to a package that only tests use.
func (f *file) support() bool { return supports(f.dir()) }

// supports reports whether the package in dir is test support. The self-test of a node
// is a part of the product.
func supports(dir string) bool {
	return strings.HasSuffix(dir, "test") && path.Base(dir) != "selftest"
}

// shipped reports whether f can end up in the binary.
func (f *file) shipped() bool { return !f.tests && !f.support() }

func (f *file) under(dir string) bool { return f.dir() == dir || strings.HasPrefix(f.path, dir+"/") }

func (f *file) at(n ast.Node) string {
	return fmt.Sprintf("%s:%d", f.path, f.fset.Position(n.Pos()).Line)
}

// imports are the paths that f imports.
func (f *file) imports() (list []string) {
	for _, i := range f.ast.Imports {
		p, _ := strconv.Unquote(i.Path.Value)
		list = append(list, p)
	}
	return list
}

// files returns the Go files of this module, and of no module inside it.
var files = sync.OnceValues(func() ([]*file, error) {
	var list []*file
	err := filepath.WalkDir(".", func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if e.IsDir() {
			_, err := os.Stat(filepath.Join(p, "go.mod"))
			if p != "." && (err == nil || strings.HasPrefix(e.Name(), ".") || e.Name() == "testdata") {
				return fs.SkipDir
			}
			return nil
		}
		if filepath.Ext(p) != ".go" {
			return nil
		}
		src, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		f, err := parse(filepath.ToSlash(p), string(src))
		list = append(list, f)
		return err
	})
	return list, err
})

func parse(name, src string) (*file, error) {
	f := &file{path: name, src: []byte(src), fset: token.NewFileSet(), tests: strings.HasSuffix(name, "_test.go")}
	var err error
	f.ast, err = parser.ParseFile(f.fset, name, src, parser.ParseComments|parser.SkipObjectResolution)
	return f, err
}

// look hands each file that is wanted to check and reports what that finds. It
// fails where there is nothing to look at.
func look(t *testing.T, want func(*file) bool, check func(*file) []string) {
	t.Helper()
	all, err := files()
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, f := range all {
		if want(f) {
			n++
			for _, problem := range check(f) {
				t.Error(problem)
			}
		}
	}
	if n == 0 {
		t.Error("there is no file to look at")
	}
}

// refuses fails unless check finds something in src, so that no check here can
// pass because it sees nothing.
func refuses(t *testing.T, check func(*file) []string, name, src string) {
	t.Helper()
	f, err := parse(name, src)
	if err != nil {
		t.Fatal(err)
	}
	if len(check(f)) == 0 {
		t.Errorf("nothing is wrong with %s:\n%s", name, src)
	}
}

// accepts is the opposite of refuses.
func accepts(t *testing.T, check func(*file) []string, name, src string) {
	t.Helper()
	f, err := parse(name, src)
	if err != nil {
		t.Fatal(err)
	}
	for _, problem := range check(f) {
		t.Errorf("%s:\n%s", problem, src)
	}
}

// imported says what is wrong with the imports of f (DESIGN.md, "Rooms"):
// verify imports nothing of ours but the reader of documents (verify/oci) and the cleaning
// of strings (verify/text), since both import nothing of ours; every room may use these
// two. The children of verify, and cache, import verify alone, nri imports verify and
// not its children, deploy stands beside cmd and imports nothing of it, and cmd assembles. Nothing that ships
// imports a package of test support.
func imported(f *file) (problems []string) {
	for _, p := range f.imports() {
		ours, is := strings.CutPrefix(p, module+"/")
		var ok bool
		switch {
		case is && (ours == f.dir() && f.tests || supports(ours) && !f.shipped()):
			ok = true // a test of a package from outside; test support
		case is && supports(ours):
		case f.under("cmd"):
			ok = true
		case is && strings.HasPrefix(ours, "cmd/"):
		case f.under("deploy"):
			ok = !is || !above(f, ours) // the go command keeps cmd/internal from it
		case f.under("verify/text"):
			ok = standard(p) // every room imports it, the reader of documents too
		case ours == "verify/text":
			ok = true
		case f.dir() == "verify" && (ours == "verify/oci" || ours == "verify/evidence" || ours == "verify/requirement"):
			ok = true // what is found, and what is asked of it, are rooms of their own
		case f.dir() == "verify/evidence" && ours == "verify/oci":
			ok = true // how evidence lies in documents; its kinds have rooms below
		case f.dir() == "verify" || f.under("verify/oci") || f.under("verify/requirement") || f.dir() == "verify/evidence":
			ok = !is && (standard(p) || p == "github.com/opencontainers/go-digest" ||
				strings.HasPrefix(p, "github.com/opencontainers/image-spec/"))
		case f.under("verify/durable"):
			// Files and locks only: every room that keeps something on the disk uses it.
			ok = !is && (standard(p) || p == "golang.org/x/sys/unix")
		case ours == "verify/durable" && (f.under("verify/source") || f.under("nri")):
			ok = true
		case (f.under("verify/source/store") || f.under("verify/source/archives") || f.under("verify/source/catalog")) && ours == "verify/source/layout":
			ok = true // the store and the archives are layouts, too: they are read by the same functions
		case (f.under("verify/source/store") || f.under("verify/source/archives")) && ours == "verify/source/catalog":
			ok = true // the store hands over what archives have among its own, by one order
		case f.under("verify/source/store") && f.tests && ours == "verify/source/archives":
			ok = true // the store knows them by an interface; tests have both
		case f.under("verify/archive"):
			// It exports, inspects and imports what the sources read and the kinds check; its
			// tests make evaluators from configuration directories. Configuration, platforms
			// and control socket are handed in by the verbs.
			ok = !is && !strings.HasPrefix(p, "github.com/containerd/") || ours == "verify" || strings.HasPrefix(ours, "verify/") || f.tests && ours == "deploy/config"
		case f.under("verify"):
			ok = !is && !strings.HasPrefix(p, "github.com/containerd/") || ours == "verify" || ours == "verify/oci" || ours == "verify/evidence"
		case f.under("cache"):
			ok = ours == "verify" || !is && (standard(p) || f.tests || strings.HasPrefix(p, "github.com/hashicorp/golang-lru/v2") ||
				p == "github.com/opencontainers/image-spec/specs-go/v1") // of which the methods of verify's interfaces speak
		case f.under("nri/tally"):
			// A count and a model of what NRI does: whoever reads lengths hands them in.
			ok = ours == "verify" || !is && standard(p)
		case f.under("nri/containerd"):
			// What containerd has and what containers run. It knows neither the hook, which
			// asks it through an interface of its own, nor the work in the background.
			ok = ours == "verify" || ours == "verify/oci" || ours == "nri/tally" || ours == "nri/containerd/certsd" || !is
		case f.under("nri/reconcile"):
			// Work in the background, which no hook waits for and which asks containerd
			// through package containerd alone.
			ok = ours == "verify" || ours == "nri/containerd" || ours == "nri/tally" || !is && !strings.HasPrefix(p, "github.com/containerd/nri") &&
				(f.tests || !strings.HasPrefix(p, "github.com/containerd/"))
		case f.under("nri"):
			// NRI alone: the resolver is handed in.
			ok = ours == "verify" || ours == "nri/tally" || !is && !strings.HasPrefix(p, "github.com/containerd/containerd")
		default:
			ok = !is
		}
		if !ok {
			problems = append(problems, fmt.Sprintf("%s must not import %s", f.path, p))
		}
	}
	return problems
}

// above reports whether a room of deploy stands above the one that f is in. The machine
// (node) knows nothing of install, and neither knows doctor and selftest, which look at the
// result, so that each can be read without the next. The files that
// are read (config) and the questions that are asked (control) know none of them.
func above(f *file, ours string) bool {
	for _, floor := range []struct {
		rooms, above []string
	}{
		{[]string{"deploy/config", "deploy/control"}, []string{"deploy/node", "deploy/install", "deploy/doctor", "deploy/selftest"}},
		{[]string{"deploy/node"}, []string{"deploy/config", "deploy/install", "deploy/doctor", "deploy/selftest"}},
		{[]string{"deploy/install"}, []string{"deploy/doctor", "deploy/selftest"}},
	} {
		if slices.ContainsFunc(floor.rooms, f.under) && slices.ContainsFunc(floor.above, func(room string) bool { return ours == room || strings.HasPrefix(ours, room+"/") }) {
			return true
		}
	}
	return false
}

// standard reports whether p is of the standard library.
func standard(p string) bool { return !strings.Contains(strings.Split(p, "/")[0], ".") && p != "C" }

func TestImports(t *testing.T) {
	look(t, func(f *file) bool { return f.path != "architecture_test.go" }, imported)
	edges := map[string]bool{}
	look(t, (*file).shipped, func(f *file) []string {
		for _, p := range f.imports() {
			edges[strings.Split(f.path, "/")[0]+" "+strings.TrimPrefix(p, module+"/")] = true
		}
		return nil
	})
	if !edges["cache verify"] || !edges["verify github.com/opencontainers/go-digest"] {
		t.Error("the imports that must be there are not seen")
	}

	imports := func(p string) string { return "package p\nimport _ \"" + p + "\"\n" }
	for _, tt := range [][2]string{
		{"verify/x.go", module + "/cache"},
		{"verify/x.go", module + "/verify/policy"},
		{"verify/x_test.go", module + "/cache"},
		{"verify/oci/x.go", module + "/verify"},
		{"verify/text/x.go", module + "/verify"},
		{"verify/text/x.go", module + "/verify/oci"},
		{"verify/text/x.go", "golang.org/x/text/width"},
		{"verify/x.go", "golang.org/x/sync/errgroup"},
		{"verify/durable/x.go", module + "/verify"},
		{"verify/x.go", module + "/verify/durable"},
		{"cache/x.go", module + "/verify/durable"},
		{"verify/evidence/notary/x.go", module + "/verify/policy"},
		{"verify/evidence/notary/x.go", module + "/verify/evidence/notary/notarytest"},
		{"verify/evidence/notary/x.go", module + "/nri"},
		{"verify/evidence/notary/x.go", "github.com/containerd/errdefs"},
		{"verify/evidence/notary/x_test.go", module + "/verify/policy"},
		{"verify/source/registry/x.go", module + "/verify/source/layout"},
		{"verify/source/registry/x.go", module + "/verify/evidence/notary"},
		{"verify/evidence/x.go", module + "/verify"},
		{"verify/requirement/x.go", module + "/verify"},
		{"verify/source/layout/x.go", module + "/verify/source/store"},
		{"verify/source/store/x.go", module + "/verify/source/registry"},
		{"verify/source/store/x.go", module + "/verify/source/archives"},
		{"verify/source/archives/x.go", module + "/verify/source/store"},
		{"verify/archive/x.go", module + "/deploy/config"},
		{"verify/archive/x.go", module + "/deploy/control"},
		{"verify/archive/x.go", "github.com/containerd/platforms"},
		{"cache/x.go", module + "/nri"},
		{"cache/x.go", module + "/verify/evidence/notary"},
		{"cache/x.go", "golang.org/x/sync/singleflight"},
		{"nri/x.go", module + "/nri/containerd"},
		{"nri/x.go", module + "/nri/reconcile"},
		{"nri/containerd/x.go", module + "/nri"},
		{"nri/containerd/x.go", module + "/nri/reconcile"},
		{"nri/reconcile/x.go", module + "/nri"},
		{"nri/reconcile/x.go", "github.com/containerd/containerd/api/services/containers/v1"},
		{"nri/tally/x.go", module + "/nri/containerd"},
		{"nri/x.go", module + "/verify/policy"},
		{"nri/containerd/x.go", module + "/cache"},
		{"nri/x.go", module + "/deploy/config"},
		{"nri/x.go", module + "/deploy/control"},
		{"deploy/node/x.go", module + "/cmd/internal/inspect"},
		{"deploy/node/x.go", module + "/deploy/install"},
		{"deploy/node/x.go", module + "/deploy/config/stage"},
		{"deploy/install/x.go", module + "/deploy/doctor"},
		{"deploy/control/x.go", module + "/deploy/node"},
		{"cmd/tidewaiter/x.go", module + "/verify/source/sourcetest"},
		{"x.go", module + "/verify"},
	} {
		refuses(t, imported, tt[0], imports(tt[1]))
	}
	for _, tt := range [][2]string{
		{"verify/x.go", "context"},
		{"verify/x.go", "github.com/opencontainers/image-spec/specs-go/v1"},
		{"verify/evidence/notary/x.go", module + "/verify"},
		{"verify/x.go", module + "/verify/oci"},
		{"verify/x.go", module + "/verify/text"},
		{"verify/oci/x.go", module + "/verify/text"},
		{"cache/x.go", module + "/verify/text"},
		{"nri/reconcile/x.go", module + "/verify/text"},
		{"verify/source/registry/x.go", module + "/verify/oci"},
		{"nri/containerd/x.go", module + "/verify/oci"},
		{"verify/evidence/notary/x_test.go", module + "/verify/evidence/notary/notarytest"},
		{"verify/evidence/notary/x_test.go", module + "/verify/evidence/notary"},
		{"verify/source/sourcetest/x.go", module + "/verify"},
		{"cache/x.go", module + "/verify"},
		{"nri/x.go", module + "/nri/tally"},
		{"nri/reconcile/x.go", module + "/nri/containerd"},
		{"verify/source/store/x.go", module + "/verify/source/layout"},
		{"verify/source/store/x.go", module + "/verify/durable"},
		{"nri/x.go", module + "/verify/durable"},
		{"verify/source/store/x.go", module + "/verify/source/catalog"},
		{"verify/archive/x.go", module + "/verify/source/archives"},
		{"verify/source/store/x_test.go", module + "/verify/source/archives"},
		{"nri/x.go", "github.com/containerd/nri/pkg/api"},
		{"cmd/tidewaiter/x.go", module + "/verify/policy"},
		{"deploy/install/x.go", module + "/deploy/node"},
		{"deploy/doctor/x.go", module + "/deploy/install"},
	} {
		accepts(t, imported, tt[0], imports(tt[1]))
	}
}

// TestDependencies asks the go command what packages are linked from: the walls
// hold for what is imported by what we import, too.
func TestDependencies(t *testing.T) {
	deps := func(patterns ...string) []string {
		t.Helper()
		cmd := exec.Command("go", append([]string{"list", "-e", "-deps", "--"}, patterns...)...)
		cmd.Env = append(os.Environ(), "GOOS=linux", "GOARCH=amd64", "CGO_ENABLED=0", "GOFLAGS=-mod=readonly")
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("go list %v: %v\n%s", patterns, err, &stderr)
		}
		return strings.Fields(string(out))
	}
	exists := func(dir string) bool { _, err := os.Stat(dir); return err == nil }
	forbid := func(what string, list []string, bad func(string) bool) {
		t.Helper()
		for _, p := range list {
			if bad(p) {
				t.Errorf("%s depends on %s", what, p)
			}
		}
	}

	core := deps("./verify")
	if !slices.Contains(core, module+"/verify") || !slices.Contains(core, "crypto/sha256") {
		t.Fatalf("go list knows %d dependencies of verify", len(core))
	}
	forbid("verify", core, func(p string) bool {
		return !standard(p) && !strings.HasPrefix(p, "vendor/") && p != module+"/verify" && p != module+"/verify/oci" && p != module+"/verify/text" && p != module+"/verify/evidence" && p != module+"/verify/requirement" &&
			!strings.HasPrefix(p, "github.com/opencontainers/go-digest") && !strings.HasPrefix(p, "github.com/opencontainers/image-spec/") ||
			p == "net/http" || p == "os/exec"
	})
	forbid("verify/...", deps("./verify/..."), func(p string) bool { return strings.HasPrefix(p, "github.com/containerd/") })
	forbid("cache", deps("./cache"), func(p string) bool {
		return strings.HasPrefix(p, module+"/") && p != module+"/verify" && p != module+"/verify/oci" && p != module+"/verify/text" && p != module+"/verify/evidence" && p != module+"/verify/requirement" && p != module+"/cache" || p == "net/http"
	})
	if exists("cmd/tidewaiter") {
		forbid("the binary", deps("./cmd/tidewaiter"), unwanted)
	}

	for _, p := range []string{
		"github.com/aws/aws-sdk-go-v2/service/ecr", "github.com/Azure/azure-sdk-for-go/sdk/azcore", "cloud.google.com/go/storage",
		"google.golang.org/api/option", "k8s.io/client-go/rest", "k8s.io/kubernetes/pkg/kubelet", "testing", module + "/nri/gatetest",
		"github.com/containerd/containerd/v2/client",
	} {
		if !unwanted(p) {
			t.Errorf("%s may be linked into the binary", p)
		}
	}
	if unwanted("github.com/Azure/go-ntlmssp") || unwanted("k8s.io/cri-api/pkg/apis/runtime/v1") || unwanted("os/exec") {
		t.Error("what is needed counts as unwanted")
	}
}

// unwanted reports whether package p has no place in the binary: SDKs of clouds,
// what talks to an API server, whole runtimes, and tests.
func unwanted(p string) bool {
	if p == "github.com/Azure/go-ntlmssp" { // by go-ldap, by notation-go: distinguished names; no SDK
		return false
	}
	for _, prefix := range []string{
		"github.com/aws/", "github.com/Azure/", "cloud.google.com/", "google.golang.org/api/", "github.com/GoogleCloudPlatform/",
		"github.com/aliyun/", "github.com/tencentcloud/", "github.com/oracle/", "github.com/IBM/",
		"k8s.io/client-go/", "k8s.io/kubernetes/", "k8s.io/apimachinery/", "k8s.io/api/", "sigs.k8s.io/",
		"github.com/docker/", "github.com/sigstore/",
		"github.com/containerd/containerd/v2/client/", // two MB more than the service stubs
		"go.uber.org/goleak/", "net/http/pprof/",
	} {
		if strings.HasPrefix(p+"/", prefix) {
			return true
		}
	}
	return p == "testing" || strings.HasPrefix(p, module+"/") && supports(p)
}

// setters says where a file of package verify lets an image run elsewhere than in
// allow and audit, or could do so behind the compiler's back.
func setters(f *file) (problems []string) {
	for _, p := range f.imports() {
		if p == "reflect" || p == "C" {
			problems = append(problems, fmt.Sprintf("%s must not import %s", f.path, p))
		}
	}
	for _, d := range f.ast.Decls {
		if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && (fn.Name.Name == "allow" || fn.Name.Name == "audit") {
			continue
		}
		for _, n := range sets(d) {
			problems = append(problems, f.at(n)+": only allow and audit let an image run")
		}
	}
	return problems
}

// sets returns what sets the field allowed, or takes its address, or could set it
// without naming it.
func sets(root ast.Node) (found []ast.Node) {
	field := func(e ast.Expr) bool {
		for {
			p, ok := e.(*ast.ParenExpr)
			if !ok {
				break
			}
			e = p.X
		}
		s, ok := e.(*ast.SelectorExpr)
		return ok && s.Sel.Name == "allowed"
	}
	ast.Inspect(root, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.AssignStmt:
			if slices.ContainsFunc(n.Lhs, field) {
				found = append(found, n)
			}
		case *ast.RangeStmt:
			if n.Key != nil && field(n.Key) || n.Value != nil && field(n.Value) {
				found = append(found, n)
			}
		case *ast.UnaryExpr:
			if n.Op == token.AND && field(n.X) {
				found = append(found, n)
			}
		case *ast.KeyValueExpr:
			if k, ok := n.Key.(*ast.Ident); ok && k.Name == "allowed" {
				found = append(found, n)
			}
		case *ast.CompositeLit:
			// A Decision written without field names would set it by position.
			if len(n.Elts) == 0 {
				break
			}
			if _, keyed := n.Elts[0].(*ast.KeyValueExpr); !keyed && named(n.Type, "Decision") {
				found = append(found, n)
			}
		case *ast.StructType:
			// Of another type with such a field a Decision could be converted.
			for _, l := range n.Fields.List {
				for _, name := range l.Names {
					if name.Name == "allowed" {
						found = append(found, n)
					}
				}
			}
		}
		return true
	})
	return found
}

func named(e ast.Expr, name string) bool {
	id, ok := e.(*ast.Ident)
	return ok && id.Name == name
}

// mentions counts where f names the function name besides declaring it, and how
// many of these are calls.
func mentions(f *file, name string) (all, calls int) {
	ast.Inspect(f.ast, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.Ident:
			if n.Name == name {
				all++
			}
		case *ast.CallExpr:
			if named(n.Fun, name) {
				calls++
			}
		case *ast.FuncDecl:
			if n.Name.Name == name {
				all--
			}
		case *ast.SelectorExpr:
			if n.Sel.Name == name {
				all-- // a field or method of that name is another thing
			}
		}
		return true
	})
	return all, calls
}

func TestTwoFunctionsAllow(t *testing.T) {
	core := func(f *file) bool { return f.dir() == "verify" && f.shipped() }
	// The type itself is the one struct with such a field.
	types := 0
	look(t, core, func(f *file) (problems []string) {
		for _, d := range f.ast.Decls {
			if g, ok := d.(*ast.GenDecl); ok && len(g.Specs) == 1 {
				if s, ok := g.Specs[0].(*ast.TypeSpec); ok && s.Name.Name == "Decision" {
					types++
					f = without(f, d)
				}
			}
		}
		return setters(f)
	})
	if types != 1 {
		t.Errorf("type Decision is declared %d times", types)
	}
	// Each sets it once. allow is called where a signature meets the rule and where
	// a file of the node lists the digest, audit where a Decision leaves.
	for name, callers := range map[string][]string{"allow": {"Renew", "ask", "run"}, "audit": {"seal"}} {
		var from []string
		declared, set, all, calls := 0, 0, 0, 0
		look(t, core, func(f *file) []string {
			for _, d := range f.ast.Decls {
				if fn, ok := d.(*ast.FuncDecl); ok && fn.Name.Name == name {
					declared++
					set += len(sets(fn))
				} else if ok {
					_, c := mentions(only(f, d), name)
					from = append(from, slices.Repeat([]string{fn.Name.Name}, c)...)
				}
			}
			a, c := mentions(f, name)
			all, calls = all+a, calls+c
			return nil
		})
		slices.Sort(from)
		if declared != 1 || set != 1 || all != len(callers) || calls != len(callers) || !slices.Equal(from, callers) {
			t.Errorf("%s is declared %d times, sets the field %d times, is mentioned %d times and called %d times, by %q; want once, once, and by %q",
				name, declared, set, all, calls, from, callers)
		}
	}

	for _, body := range []string{
		"func f(d *Decision) { d.allowed = true }",
		"func f(d *Decision) { (d.allowed) = true }",
		"func f(d *Decision) { d.Reason, d.allowed = Verified, true }",
		"func f(d *Decision) { d.allowed, x = g() }",
		"func f(d *Decision) *bool { return &d.allowed }",
		"func f() Decision { return Decision{allowed: true} }",
		"func f() *Decision { return &Decision{true, Verified} }",
		"func f(d *Decision) { for _, d.allowed = range list {} }",
		"func (t *T) allow(d *Decision) { d.allowed = true }",
		"type twin struct { allowed bool; Reason Reason }",
		"var d = Decision{allowed: true}",
	} {
		refuses(t, setters, "verify/x.go", "package verify\n"+body)
	}
	refuses(t, setters, "verify/x.go", "package verify\nimport \"reflect\"\nvar _ = reflect.TypeOf")
	accepts(t, setters, "verify/x.go", "package verify\nfunc f(d Decision) bool { allowed := d.allowed; return allowed && d == Decision{} }")
	for body, want := range map[string][2]int{
		"func allow() {}\nfunc f() { allow() }":               {1, 1},
		"var f = allow":                                       {1, 0},
		"func f() { allow(); g(allow) }":                      {2, 1},
		"func f() { x.allow(); _ = x.allow }":                 {0, 0},
		"func allow() {}":                                     {0, 0},
		"func f() { defer allow(); go func() { allow() }() }": {2, 2},
	} {
		f, err := parse("verify/x.go", "package verify\n"+body)
		if err != nil {
			t.Fatal(err)
		}
		if all, calls := mentions(f, "allow"); all != want[0] || calls != want[1] {
			t.Errorf("%d mentions and %d calls, want %v, in\n%s", all, calls, want, body)
		}
	}
}

// only is f with the declaration d alone.
func only(f *file, d ast.Decl) *file {
	c, a := *f, *f.ast
	a.Decls = []ast.Decl{d}
	c.ast = &a
	return &c
}

// without is f without the declaration d.
func without(f *file, d ast.Decl) *file {
	c, a := *f, *f.ast
	a.Decls = slices.DeleteFunc(slices.Clone(a.Decls), func(x ast.Decl) bool { return x == d })
	c.ast = &a
	return &c
}

// behind says where f goes behind the compiler's back, with which any package
// could set a field that is not its own.
func behind(f *file) (problems []string) {
	for _, p := range f.imports() {
		if p == "unsafe" || p == "C" {
			problems = append(problems, fmt.Sprintf("%s must not import %s", f.path, p))
		}
	}
	for _, g := range f.ast.Comments {
		for _, c := range g.List {
			if strings.HasPrefix(c.Text, "//go:linkname") {
				problems = append(problems, f.at(c)+": go:linkname")
			}
		}
	}
	return problems
}

func TestNothingUnsafe(t *testing.T) {
	look(t, (*file).shipped, behind)
	refuses(t, behind, "nri/x.go", "package nri\nimport \"unsafe\"\nvar _ unsafe.Pointer")
	refuses(t, behind, "nri/x.go", "package nri\nimport \"C\"")
	refuses(t, behind, "nri/x.go", "package nri\n//go:linkname allow "+module+"/verify.allow\nfunc allow()")
	accepts(t, behind, "nri/x.go", "package nri\n// it says go:linkname\nfunc f() {}")
}

// clocks says where f looks at the clock: by the functions of package time that
// return it, or by handing package x509 no time, which then takes the clock's.
// Timers, tickers and contexts are allowed: they measure how long something takes
// and say nothing about when a certificate ends. What a timer's channel delivers
// is a time too, and nobody is to use it: that is left to review.
func clocks(f *file) (problems []string) {
	names := map[string]string{} // by which f knows package time and x509
	for _, i := range f.ast.Imports {
		p, _ := strconv.Unquote(i.Path.Value)
		if p != "time" && p != "crypto/x509" {
			continue
		}
		name := path.Base(p)
		if i.Name != nil {
			name = i.Name.Name
		}
		if name == "." {
			problems = append(problems, f.at(i)+": a dot import hides the clock")
		}
		names[name] = p
	}
	from := func(e ast.Expr, pkg string) string {
		s, ok := e.(*ast.SelectorExpr)
		if !ok {
			return ""
		}
		id, ok := s.X.(*ast.Ident)
		if !ok || names[id.Name] != pkg {
			return ""
		}
		return s.Sel.Name
	}
	ast.Inspect(f.ast, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.SelectorExpr:
			if name := from(n, "time"); name == "Now" || name == "Since" || name == "Until" {
				problems = append(problems, fmt.Sprintf("%s: time.%s outside cmd: hand the clock in", f.at(n), name))
			}
		case *ast.CompositeLit:
			timed := slices.ContainsFunc(n.Elts, func(e ast.Expr) bool {
				kv, ok := e.(*ast.KeyValueExpr)
				return ok && named(kv.Key, "CurrentTime")
			})
			if from(n.Type, "crypto/x509") == "VerifyOptions" && !timed {
				problems = append(problems, f.at(n)+": x509.VerifyOptions without CurrentTime looks at the clock")
			}
		}
		return true
	})
	return problems
}

func TestClock(t *testing.T) {
	look(t, func(f *file) bool { return f.shipped() && !f.under("cmd") && !f.under("deploy") }, clocks)
	for _, src := range []string{
		"import \"time\"\nvar t = time.Now()",
		"import \"time\"\nvar now = time.Now",
		"import \"time\"\nfunc f(t time.Time) time.Duration { return time.Since(t) }",
		"import \"time\"\nfunc f(t time.Time) time.Duration { return time.Until(t) }",
		"import clock \"time\"\nvar now = clock.Now",
		"import . \"time\"\nvar now = Now",
		"import \"crypto/x509\"\nvar o = x509.VerifyOptions{}",
		"import \"crypto/x509\"\nvar o = &x509.VerifyOptions{Roots: nil}",
	} {
		refuses(t, clocks, "nri/x.go", "package nri\n"+src)
	}
	accepts(t, clocks, "nri/x.go", "package nri\nimport \"time\"\nfunc f(c C) { c.Now(); now := c.Until; _ = time.NewTimer(time.Second); now() }")
	accepts(t, clocks, "nri/x.go", "package nri\nimport \"crypto/x509\"\nvar o = x509.VerifyOptions{CurrentTime: now}")
}

// TestKindsByNameAlone: the core and the sources know evidence by its kind, and none of
// the kinds. The archives' export knows the one that it exports.
func TestKindsByNameAlone(t *testing.T) {
	says := func(f *file) (problems []string) {
		for i, l := range strings.Split(string(f.src), "\n") {
			if l := strings.ReplaceAll(strings.ToLower(l), "annotation", ""); strings.Contains(l, "notary") || strings.Contains(l, "notation") {
				problems = append(problems, fmt.Sprintf("%s:%d names a kind of evidence", f.path, i+1))
			}
		}
		return problems
	}
	look(t, func(f *file) bool {
		return f.shipped() && (f.dir() == "verify" || f.dir() == "verify/evidence" || f.under("verify/source") || f.under("verify/requirement"))
	}, says)
	refuses(t, says, "verify/x.go", "package verify\n\n// For Notary Project signatures.")
	refuses(t, says, "verify/x.go", "package verify\n\nconst x = \"notation\"")
	accepts(t, says, "verify/x.go", "package verify\n\n// An annotation.")
}

// TestCoreIsShort: the core is what an auditor reads in an afternoon.
func TestCoreIsShort(t *testing.T) {
	const limit = 1500
	lines := 0
	look(t, func(f *file) bool { return f.dir() == "verify" && !f.tests }, func(f *file) []string {
		for s := bufio.NewScanner(bytes.NewReader(f.src)); s.Scan(); {
			lines++
		}
		return nil
	})
	if lines >= limit || lines < 100 {
		t.Errorf("package verify has %d lines without tests, want fewer than %d", lines, limit)
	}
}

// TestSizes: what does not fit on a few screens is more than one thing, and so is a room
// that takes a day to read.
func TestSizes(t *testing.T) {
	const most, room = 500, 3000
	lines := map[string]int{}
	look(t, (*file).shipped, func(f *file) (problems []string) {
		n := bytes.Count(f.src, []byte{'\n'})
		if lines[f.dir()] += n; n > most {
			problems = append(problems, fmt.Sprintf("%s has %d lines, want at most %d: split it by what it knows", f.path, n, most))
		}
		return problems
	})
	for dir, n := range lines {
		if n > room {
			t.Errorf("%s has %d lines without tests, want at most %d", dir, n, room)
		}
	}
	if len(lines) < 20 {
		t.Errorf("only %d packages were looked at", len(lines))
	}
}

// TestMap: docs/architecture.md has one line for each package that ships, and none for what
// there is not.
func TestMap(t *testing.T) {
	raw, err := os.ReadFile("docs/architecture.md")
	if err != nil {
		t.Fatal(err)
	}
	told := map[string]int{}
	_, rows, found := strings.Cut(string(raw), "| package | what it knows | imports of ours |\n")
	if !found {
		t.Fatal("docs/architecture.md has no map")
	}
	for line := range strings.Lines(rows) {
		if !strings.HasPrefix(line, "|") {
			break
		}
		if _, name, is := strings.Cut(line, "| `"); is {
			name, _, _ = strings.Cut(name, "`")
			told[name]++
		}
	}
	there := map[string]bool{}
	look(t, (*file).shipped, func(f *file) []string { there[f.dir()] = true; return nil })
	for dir := range there {
		if told[dir] != 1 {
			t.Errorf("%s has %d lines in the map of docs/architecture.md", dir, told[dir])
		}
		delete(told, dir)
	}
	for name := range told {
		t.Errorf("the map of docs/architecture.md has %s, which is no package that ships", name)
	}
}

// names says whether f is of a package whose name says what it is made of and not
// what it knows.
func names(f *file) (problems []string) {
	for _, name := range []string{f.ast.Name.Name, path.Base(f.dir())} {
		switch strings.TrimSuffix(name, "_test") {
		case "util", "utils", "common", "helper", "helpers", "types", "manager", "managers", "misc", "shared", "base", "lib", "pkg":
			problems = append(problems, fmt.Sprintf("%s: a package %q says nothing", f.path, name))
		}
	}
	return problems
}

func TestNames(t *testing.T) {
	look(t, func(*file) bool { return true }, names)
	refuses(t, names, "nri/x.go", "package util")
	refuses(t, names, "nri/types/x.go", "package nodetypes")
	refuses(t, names, "nri/x_test.go", "package helpers_test")
}

// TestTopLevel: the rooms are those of DESIGN.md.
func TestTopLevel(t *testing.T) {
	list, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	rooms := []string{"cmd", "nri", "verify", "cache", "deploy", "test", "docs", "findings", ".ci", ".github"}
	notOurs := []string{".git", "bin", "dist"} // git's, and what .gitignore names
	seen := 0
	for _, e := range list {
		switch {
		case e.IsDir() && slices.Contains(rooms, e.Name()):
			seen++
		case e.IsDir() && !slices.Contains(notOurs, e.Name()):
			t.Errorf("%s is no room of this house", e.Name())
		case !e.IsDir() && strings.HasSuffix(e.Name(), ".go") && !strings.HasSuffix(e.Name(), "_test.go"):
			t.Errorf("%s: there is no package at the root", e.Name())
		}
	}
	if seen < 2 {
		t.Error("there is no room to look at")
	}
}

// TestNothingBuilt: what is in the tree was written by somebody, but for what .gitignore
// names. A program that was built at the root was committed once.
func TestNothingBuilt(t *testing.T) {
	const most = 1 << 20
	ignored := []string{".git", "bin", "dist", "tidewaiter"}
	if err := filepath.WalkDir(".", func(p string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case slices.Contains(ignored, p) && e.IsDir():
			return fs.SkipDir
		case slices.Contains(ignored, p), !e.Type().IsRegular(), strings.HasSuffix(p, ".test"), strings.HasSuffix(p, ".out"):
			return nil
		}
		info, err := e.Info()
		if err == nil && info.Size() > most {
			t.Errorf("%s has %d bytes", p, info.Size())
		}
		return nil // what is gone meanwhile is not there
	}); err != nil {
		t.Error(err)
	}
}

// TestBinary: nothing in the program makes the linker keep every method of every
// type, as calling text/template does, and with that the binary stays small
// (DESIGN.md, "Targets": 20 MB).
func TestBinary(t *testing.T) {
	const limit = 19 << 20
	binary := filepath.Join(t.TempDir(), "tidewaiter")
	build := exec.Command("go", "build", "-trimpath", "-tags", "grpcnotrace", "-ldflags", "-s -w", "-o", binary, "./cmd/tidewaiter")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	raw, err := os.ReadFile(binary)
	if err != nil {
		t.Fatal(err)
	}
	if len(raw) > limit {
		t.Errorf("the stripped binary has %d bytes, more than %d", len(raw), limit)
	}
	// The names of functions stay in a stripped binary, for panics.
	if !bytes.Contains(raw, []byte("main.runCommand")) {
		t.Error("the binary holds no names to look for")
	}
	if bytes.Contains(raw, []byte("text/template.(*Template).Execute")) {
		t.Error("text/template can be called, and so can every method of every type")
	}
}
