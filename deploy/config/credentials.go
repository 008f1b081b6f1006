package config

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"

	"github.com/tidewaiter/tidewaiter/verify/policy"
	"github.com/tidewaiter/tidewaiter/verify/source/registry"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// Limits of a file of credentials and of what a helper says.
const (
	maxLogins       = 1000     // entries, and helpers
	maxUser         = 1 << 10  // bytes of a user's name
	maxSecret       = 16 << 10 // bytes of a password or token
	maxHelperOutput = 64 << 10 // bytes

	maxAsked = 128 // helpers and hosts whose last answer is kept

	helperTime  = 5 * time.Second
	helperGrace = time.Second      // until the pipes of a helper are closed that left children behind
	helperKeep  = time.Minute      // what a helper said is used that long,
	helperSulk  = 10 * time.Second // and what went wrong with it
)

var helperName = regexp.MustCompile(`^[a-z0-9-]{1,64}$`)

// credentials are those of a docker config.json, each for one endpoint. They do
// not change. (oras-go's package credentials is not used: it takes entries of any
// scheme and path for a host, in no order, runs helpers of any name with the whole
// environment and no bound on what they print, and puts what they print, and auths
// that do not parse, into errors.)
type credentials struct {
	logins map[endpoint]login
	helper map[endpoint]login // credHelpers
	store  string             // credsStore: the helper for everybody else; may be empty
	dir    string             // where helpers are; empty: in PATH
	asked  *lru.Cache[question, credentialFunc]
}

// A question is what a helper is asked.
type question struct{ helper, key string }

type credentialFunc = func(context.Context) (registry.Credential, error)

// An endpoint is where credentials may go. Without a scheme it is either, so that
// the scheme of the mirror's URL decides.
type endpoint struct {
	scheme string
	host   string // canonical, with the port unless that is 443
}

type login struct {
	key        string // as written; what a helper is asked for
	credential registry.Credential
	helper     string
}

// A configFile is the part of docker's config.json that is about credentials.
// Other keys are the docker command's and ignored.
type configFile struct {
	Auths map[string]struct {
		Auth          string `json:"auth"`
		Username      string `json:"username"`
		Password      string `json:"password"`
		IdentityToken string `json:"identitytoken"`
	} `json:"auths"`
	CredHelpers map[string]string `json:"credHelpers"`
	CredsStore  string            `json:"credsStore"`
}

// parseCredentials reads a docker config.json. Errors and warnings hold nothing of
// it but the names of hosts and helpers.
func parseCredentials(raw []byte, dir string) (*credentials, []string, error) {
	var f configFile
	if err := json.Unmarshal(raw, &f); err != nil {
		// The error may quote a value.
		at := int64(-1)
		if e := (*json.SyntaxError)(nil); errors.As(err, &e) {
			at = e.Offset
		}
		if e := (*json.UnmarshalTypeError)(nil); errors.As(err, &e) {
			at = e.Offset
		}
		if at < 0 || at > int64(len(raw)) {
			return nil, nil, errors.New("not a docker config.json")
		}
		return nil, nil, fmt.Errorf("not a docker config.json: line %d", 1+bytes.Count(raw[:at], []byte("\n")))
	}
	if len(f.Auths) > maxLogins || len(f.CredHelpers) > maxLogins {
		return nil, nil, fmt.Errorf("more than %d entries", maxLogins)
	}
	c := &credentials{logins: map[endpoint]login{}, helper: map[endpoint]login{}, store: f.CredsStore, dir: dir}
	if len(f.Auths)+len(f.CredHelpers) == 0 && f.CredsStore == "" {
		return c, []string{"no login in it: " + unrecognised(raw)}, nil
	}
	c.asked, _ = lru.New[question, credentialFunc](maxAsked) // it fails only without a size
	if c.store != "" && !helperName.MatchString(c.store) {
		return nil, nil, errors.New("credsStore: a helper's name has only a-z, 0-9 and -")
	}
	// An entry that is broken costs its own registry its login, and no other.
	var warnings []string
	unused := func(section, key string, why any) {
		warnings = append(warnings, fmt.Sprintf("%s: %s is not used: %v", section, printKey(key), why))
	}
	add := func(to map[endpoint]login, section, key string, l login) error {
		e, err := parseEndpoint(key)
		if err != nil {
			unused(section, key, err)
			return nil
		}
		if other, twice := to[e]; twice && (other.credential != l.credential || other.helper != l.helper) {
			return fmt.Errorf("%s: %s and %s are for the same host, and differ", section, printKey(other.key), printKey(key))
		}
		l.key = key
		to[e] = l
		return nil
	}
	for _, key := range slices.Sorted(maps.Keys(f.Auths)) {
		a := f.Auths[key]
		cred := registry.Credential{Username: a.Username, Password: a.Password, IdentityToken: a.IdentityToken}
		if a.Auth != "" {
			plain, err := base64.StdEncoding.DecodeString(a.Auth)
			user, password, found := strings.Cut(string(plain), ":")
			if err != nil || !found {
				unused("auths", key, "auth is not user:password in base64")
				continue
			}
			// Docker has padded it with NUL.
			cred.Username, cred.Password = user, strings.Trim(password, "\x00")
		}
		if err := checkCredential(&cred); err != nil {
			unused("auths", key, err)
			continue
		}
		if err := add(c.logins, "auths", key, login{credential: cred}); err != nil {
			return nil, nil, err
		}
	}
	for _, key := range slices.Sorted(maps.Keys(f.CredHelpers)) {
		name := f.CredHelpers[key]
		if !helperName.MatchString(name) {
			unused("credHelpers", key, "a helper's name has only a-z, 0-9 and -")
			continue
		}
		if err := add(c.helper, "credHelpers", key, login{helper: name}); err != nil {
			return nil, nil, err
		}
	}
	return c, append(warnings, c.missing()...), nil
}

// unrecognised says what a file without logins looks like. It repeats nothing of it.
func unrecognised(raw []byte) string {
	const form = `{"auths": {"HOST": {"auth": "..."}}}`
	var top map[string]json.RawMessage
	if json.Unmarshal(raw, &top) != nil || len(top) == 0 {
		return "logins stand under auths, credHelpers or credsStore, as " + form
	}
	var kind string
	if json.Unmarshal(top["kind"], &kind) == nil && kind == "Secret" || top[".dockerconfigjson"] != nil {
		return "it is a Kubernetes Secret: write what its .dockerconfigjson holds, decoded from base64"
	}
	for _, key := range []string{"auths", "credHelpers"} {
		if top[key] != nil {
			return key + " is empty"
		}
	}
	for key, value := range top {
		var entry struct {
			Auth, Username *string
		}
		if json.Unmarshal(value, &entry) == nil && (entry.Auth != nil || entry.Username != nil) {
			return "the entry " + printKey(key) + " must stand under auths, as " + form + "; without it the file has the form of docker's older .dockercfg"
		}
	}
	return "logins stand under auths, credHelpers or credsStore, as " + form + "; other keys are ignored"
}

// missing names the helpers that cannot be run as they are now.
func (c *credentials) missing() []string {
	names := map[string]bool{}
	if c.store != "" {
		names[c.store] = true
	}
	for _, l := range c.helper {
		names[l.helper] = true
	}
	var list []string
	for _, name := range slices.Sorted(maps.Keys(names)) {
		if _, err := c.program(name); err != nil {
			list = append(list, err.Error()+": every registry that it is asked for and that wants a login is SOURCE_UNAUTHORIZED, for images that anybody may pull too")
		}
	}
	return list
}

// program finds a helper.
func (c *credentials) program(name string) (string, error) {
	name = "docker-credential-" + name
	if c.dir == "" {
		file, err := exec.LookPath(name)
		if err != nil {
			return "", errors.New(name + " is not in PATH")
		}
		return file, nil
	}
	file, err := exec.LookPath(filepath.Join(c.dir, name))
	if err != nil {
		return "", fmt.Errorf("%s is not in %s, or cannot be run", name, text.Quote(c.dir, 256))
	}
	return file, nil
}

// checkCredential refuses what no header can hold, and reads docker's name for a
// token.
func checkCredential(c *registry.Credential) error {
	switch {
	case len(c.Username) > maxUser || len(c.Password) > maxSecret || len(c.IdentityToken) > maxSecret:
		return errors.New("a name or secret is too long")
	case strings.ContainsFunc(c.Username, func(r rune) bool { return r < ' ' || r == 0x7f || r == ':' }):
		return errors.New("the user's name has a colon or control character")
	case c.Username == "" && c.Password != "":
		return errors.New("a password without a user's name")
	case c.Username == "<token>":
		*c = registry.Credential{IdentityToken: cmp.Or(c.IdentityToken, c.Password)}
	}
	return nil
}

// parseEndpoint reads the key of an entry: a host, with http:// or https:// before
// it, or docker's /v1/ or /v2/ behind it, or both. Other paths and patterns, which
// some programs have, would be for a part of a host and for many.
func parseEndpoint(key string) (endpoint, error) {
	var e endpoint
	for _, scheme := range []string{"http", "https"} {
		if rest, found := strings.CutPrefix(key, scheme+"://"); found {
			e.scheme, key = scheme, rest
		}
	}
	host, path, _ := strings.Cut(key, "/")
	switch strings.TrimSuffix(path, "/") {
	case "", "v1", "v2":
	default:
		return e, errors.New("entries for a path are not supported")
	}
	var err error
	e.host, err = endpointHost(cmp.Or(e.scheme, "https"), host)
	return e, err
}

// endpointHost is the canonical form of a URL's host, in which no port means 443.
func endpointHost(scheme, host string) (string, error) {
	if scheme == "http" && (&url.URL{Host: host}).Port() == "" {
		host += ":80"
	}
	h, err := policy.ParseHost(host)
	if err != nil {
		return "", errors.New("it names no host")
	}
	return h, nil
}

// printKey is a key for a person, without what may be a password in it.
func printKey(key string) string {
	if i := strings.LastIndexByte(key, '@'); i >= 0 {
		key = "..." + key[i:]
	}
	return text.Quote(key, 80)
}

// dockerHub is how docker calls Docker Hub in its files.
const dockerHub = "https://index.docker.io/v1/"

// of returns what the registry at u may be told, and nil if that is nothing: what
// the helper for exactly its host and port says, else the entry for it, else what
// the helper for everybody says. An entry with a scheme is for that scheme alone.
// The helper for everybody is asked only about a registry that is named, by this node's
// files or by the entry: others are named by whoever writes a pod, and would get what
// the helper has for a pattern.
func (c *credentials) of(u *url.URL, named bool) credentialFunc {
	if c == nil || u == nil {
		return nil
	}
	host, err := endpointHost(u.Scheme, u.Host)
	if err != nil {
		return nil
	}
	key := host
	if host == "docker.io" || strings.HasPrefix(host, "docker.io:") {
		// Other names of Docker Hub are canonically the same, and other hosts.
		if strings.ToLower(u.Hostname()) != "registry-1.docker.io" {
			return nil
		}
		key = dockerHub
	}
	find := func(m map[endpoint]login) (login, bool) {
		l, found := m[endpoint{u.Scheme, host}]
		if !found {
			l, found = m[endpoint{"", host}]
		}
		return l, found
	}
	if l, found := find(c.helper); found {
		return c.from(l.helper, l.key)
	}
	l, found := find(c.logins)
	switch {
	case found && l.credential != registry.Credential{}:
		return func(context.Context) (registry.Credential, error) { return l.credential, nil }
	case c.store != "" && (named || found):
		// Docker leaves an empty entry for what the store holds, and the store has it
		// under that key.
		if found {
			key = l.key
		}
		return c.from(c.store, key)
	}
	return nil
}

// from returns a function that asks a helper for the credentials of key, and does
// so again only when its last answer is old. It is safe for concurrent use.
func (c *credentials) from(helper, key string) credentialFunc {
	f := keep(func(ctx context.Context) (registry.Credential, error) { return c.ask(ctx, helper, key) })
	if before, there, _ := c.asked.PeekOrAdd(question{helper, key}, f); there {
		return before
	}
	return f
}

// keep is get, with its last answer kept for a while, and asked by one at a time.
func keep(get credentialFunc) credentialFunc {
	var cred registry.Credential
	var failed error
	var until time.Time
	turn := make(chan struct{}, 1)
	return func(ctx context.Context) (registry.Credential, error) {
		select {
		case turn <- struct{}{}:
			defer func() { <-turn }()
		case <-ctx.Done():
			return registry.Credential{}, ctx.Err()
		}
		if time.Now().Before(until) {
			return cred, failed
		}
		cred, failed = get(ctx)
		until = time.Now().Add(helperKeep)
		if failed != nil {
			until = time.Now().Add(helperSulk)
		}
		if ctx.Err() != nil {
			until = time.Time{} // that says nothing of the helper
		}
		return cred, failed
	}
}

// ask runs docker-credential-NAME, a program that keeps credentials or gets them
// from elsewhere (docker-credential-helpers, "Development"). It has five seconds,
// its output a bound, and its environment PATH and HOME alone. Nothing of what it
// prints is repeated.
func (c *credentials) ask(ctx context.Context, name, key string) (registry.Credential, error) {
	var none registry.Credential
	fail := func(text string) (registry.Credential, error) {
		return none, fmt.Errorf("docker-credential-%s %s", name, text)
	}
	file, err := c.program(name)
	if err != nil {
		return none, err
	}
	ctx, cancel := context.WithTimeout(ctx, helperTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, file, "get")
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + cmp.Or(os.Getenv("HOME"), "/")}
	cmd.Stdin = strings.NewReader(key)
	out := &bounded{left: maxHelperOutput, full: cancel}
	cmd.Stdout = out
	// A group of its own, so that what it starts ends with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = helperGrace
	err = cmd.Run()
	exit := (*exec.ExitError)(nil)
	switch {
	case out.left < 0:
		return fail(fmt.Sprintf("printed more than %d bytes", maxHelperOutput))
	case ctx.Err() != nil:
		return fail("did not answer in time")
	case errors.As(err, &exit) && string(bytes.TrimSpace(out.raw)) == "credentials not found in native keychain":
		return none, nil
	case errors.As(err, &exit):
		return fail("failed: " + exit.ProcessState.String())
	case errors.Is(err, exec.ErrWaitDelay):
		cmd.Cancel() // the group is there as long as somebody is in it
		return fail("left something running")
	case err != nil:
		return fail("could not be run")
	}
	var said struct{ Username, Secret string }
	if json.Unmarshal(out.raw, &said) != nil {
		return fail("printed no credentials")
	}
	cred := registry.Credential{Username: said.Username, Password: said.Secret}
	if err := checkCredential(&cred); err != nil {
		return fail("printed credentials that cannot be used: " + err.Error())
	}
	return cred, nil
}

// bounded keeps what is written to it, up to a limit, and then calls full.
type bounded struct {
	raw  []byte
	left int // negative: there was more
	full func()
}

func (b *bounded) Write(p []byte) (int, error) {
	if b.left -= len(p); b.left < 0 {
		b.full()
		return 0, io.ErrShortWrite
	}
	b.raw = append(b.raw, p...)
	return len(p), nil
}
