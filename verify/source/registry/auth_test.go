package registry_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/registry"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

// What nobody may read, in no error, Attempt or name.
const (
	password = "s3cret-pass-word"
	identity = "s3cret-identity-token-of-somebody"
)

var basicAuth = "Basic " + base64.StdEncoding.EncodeToString([]byte("robot:"+password))

func as(c registry.Credential) func(context.Context) (registry.Credential, error) {
	return func(context.Context) (registry.Credential, error) { return c, nil }
}

var robot = as(registry.Credential{Username: "robot", Password: password})

// silent fails the test if text holds a part of a secret.
func silent(t testing.TB, text string) {
	t.Helper()
	for _, s := range []string{"s3cret", "cret-", basicAuth[6:14], basicAuth[len(basicAuth)-8:], "T0K3N"} {
		if strings.Contains(text, s) {
			t.Errorf("shows a secret: %s", text)
		}
	}
}

// find asks src and checks that nothing it says holds a secret.
func find(t testing.TB, src *registry.Source, subject ocispec.Descriptor) ([]verify.Evidence, error) {
	t.Helper()
	got, err := sourcetest.Find(t.Context(), src, subject, verify.Limits{})
	silent(t, fmt.Sprint(src.Name(), " ", err))
	for _, ev := range got {
		silent(t, fmt.Sprint(ev.Err))
	}
	_, _, merr := src.Manifest(t.Context(), sourcetest.Name, subject.Digest)
	silent(t, fmt.Sprint(merr))
	return got, err
}

// A gate lets into a registry only who has a token that it issued, or with basic
// the password itself. Its token server can be at the registry or be served alone.
type gate struct {
	*sourcetest.Registry
	basic   bool
	realm   string        // empty: the registry itself, /token
	service string        // what the challenge says; tokens are for whatever is asked
	user    string        // the Authorization that the token server wants; empty: anybody
	life    string        // expires_in as JSON; empty: none
	scope   string        // more of the challenge
	reply   func() string // instead of a token
	status  int           // of the token server; 0: 200
	seen    func(*http.Request)

	mu      sync.Mutex
	n       int // tokens issued
	revoked int // these and those before are worth nothing
	tokens  []*http.Request
	asked   []string // Authorization of each request to the registry
}

const tokenPrefix = "T0K3N."

func (g *gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/token" {
		g.token(w, r)
		return
	}
	if g.seen != nil {
		g.seen(r)
	}
	got := r.Header.Get("Authorization")
	g.mu.Lock()
	g.asked = append(g.asked, got)
	ok := got == basicAuth
	want := `Basic realm="x"`
	if !g.basic {
		var n int
		fmt.Sscanf(strings.TrimPrefix(got, "Bearer "+tokenPrefix), "%d", &n)
		ok = strings.HasPrefix(got, "Bearer ") && n > g.revoked && n <= g.n
		realm := g.realm
		if realm == "" {
			realm = "http://" + r.Host + "/token"
		}
		want = fmt.Sprintf(`Bearer realm="%s",service="%s"%s`, realm, g.service, g.scope)
	}
	g.mu.Unlock()
	if !ok {
		w.Header().Set("WWW-Authenticate", want)
		w.WriteHeader(401)
		io.WriteString(w, got) // what a registry could do
		return
	}
	g.Registry.ServeHTTP(w, r)
}

func (g *gate) token(w http.ResponseWriter, r *http.Request) {
	r.ParseForm()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.tokens = append(g.tokens, r)
	switch {
	case g.status != 0:
		w.Header().Set("Location", "http://169.254.169.254/latest/")
		w.WriteHeader(g.status)
		io.WriteString(w, r.Header.Get("Authorization")+r.Form.Get("refresh_token"))
		return
	case g.reply != nil:
		io.WriteString(w, g.reply())
		return
	case g.user != "" && r.Header.Get("Authorization") != g.user && r.Form.Get("refresh_token") != g.user:
		w.WriteHeader(401)
		return
	}
	g.n++
	doc := map[string]any{"access_token": fmt.Sprintf("%s%d", tokenPrefix, g.n)}
	if g.life != "" {
		doc["expires_in"] = json.RawMessage(g.life)
	}
	json.NewEncoder(w).Encode(doc)
}

// count returns how many requests went to the registry and how many to its token
// server since the last time.
func (g *gate) count() [2]int {
	g.mu.Lock()
	defer g.mu.Unlock()
	n := [2]int{len(g.asked), len(g.tokens)}
	g.asked, g.tokens = nil, nil
	return n
}

// A clock is one that a test sets.
type clock struct {
	mu sync.Mutex
	t  time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.t
}

func (c *clock) step(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t = c.t.Add(d)
}

func newClock() *clock { return &clock{t: time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)} }

func ask(t testing.TB, src *registry.Source, subject ocispec.Descriptor) []verify.Evidence {
	t.Helper()
	got, err := sourcetest.Find(t.Context(), src, subject, verify.Limits{})
	if err != nil {
		t.Error(err)
	}
	return got
}

// A token costs one request and is used until it ends; of a registry that was
// asked before it is known that it wants one.
func TestToken(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		cred func(context.Context) (registry.Credential, error)
		user string
		post bool
	}{
		"nobody":         {nil, "", false},
		"password":       {robot, basicAuth, false},
		"identity token": {as(registry.Credential{Username: "ignored", Password: "ignored", IdentityToken: identity}), identity, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, subject, want := signed(1)
			g := &gate{Registry: serve(c), service: "reg", user: tt.user, scope: `,scope="repository:victim/all:pull,push registry:catalog:*"`}
			at := newClock()
			u := start(t, g)
			tokens := registry.NewTokens(at.now)
			open := func() *registry.Source {
				return registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: u, Client: client(t, nil), Credentials: tt.cred, Tokens: tokens})
			}
			sourcetest.Check(t, ask(t, open(), subject), want, 0)
			g.mu.Lock()
			r := g.tokens[0]
			g.mu.Unlock()
			if s := r.Form["scope"]; len(s) != 1 || s[0] != "repository:team/app:pull" || r.Form.Get("service") != "reg" {
				t.Errorf("asked for %v", r.Form)
			}
			if (r.Method == http.MethodPost) != tt.post || tt.post && (r.URL.RawQuery != "" || r.Header.Get("Authorization") != "") {
				t.Errorf("%s %s", r.Method, r.URL.Path)
			}
			if tt.cred == nil && r.Header.Get("Authorization") != "" {
				t.Error("nobody has credentials")
			}
			if n := g.count(); n != [2]int{4, 1} {
				t.Errorf("first question: %v requests", n)
			}
			ask(t, open(), subject)
			if n := g.count(); n != [2]int{3, 0} {
				t.Errorf("known token: %v requests", n)
			}
			at.step(51 * time.Second) // of 60, where it does not say, less a margin
			ask(t, open(), subject)
			if n := g.count(); n != [2]int{3, 1} {
				t.Errorf("token at its end: %v requests", n)
			}
			g.mu.Lock()
			g.revoked = g.n
			g.mu.Unlock()
			ask(t, open(), subject)
			if n := g.count(); n != [2]int{4, 1} {
				t.Errorf("token refused: %v requests", n)
			}
		})
	}
}

// How long a token is used.
func TestTokenLife(t *testing.T) {
	t.Parallel()
	for life, want := range map[string]time.Duration{
		"": 50 * time.Second, "300": 290 * time.Second, "99999999": time.Hour - 10*time.Second, "-1": 50 * time.Second,
		`"300"`: 50 * time.Second, "1e3": 50 * time.Second, "5": 0, "{}": 50 * time.Second,
	} {
		c, subject, _ := signed(0)
		g := &gate{Registry: serve(c), life: life}
		at := newClock()
		src := registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: start(t, g), Client: client(t, nil), Tokens: registry.NewTokens(at.now)})
		ask(t, src, subject)
		g.count()
		if want > 0 {
			at.step(want - 1)
			ask(t, src, subject)
			if n := g.count(); n != [2]int{1, 0} {
				t.Errorf("%s: %v requests before its end", life, n)
			}
			at.step(1)
		}
		ask(t, src, subject)
		if n := g.count(); n != [2]int{1, 1} {
			t.Errorf("%s: %v requests at its end", life, n)
		}
	}
}

// As whom a registry was asked is said of a token that is known, too.
func TestForbidden(t *testing.T) {
	t.Parallel()
	c, subject, _ := signed(0)
	for _, tt := range []struct {
		cred func(context.Context) (registry.Credential, error)
		text string
	}{
		{robot, ": asked with the credentials from sources.credentials"},
		{nil, ": asked without credentials: sources.credentials has none for 127.0.0.1:"},
	} {
		g := &gate{Registry: serve(c)}
		g.Intercept = func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(403); return true }
		src := registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: start(t, g), Client: client(t, nil), Credentials: tt.cred, Tokens: registry.NewTokens(newClock().now)})
		for _, want := range [][2]int{{2, 1}, {1, 0}} {
			_, err := sourcetest.Find(t.Context(), src, subject, verify.Limits{})
			if n := g.count(); n != want {
				t.Errorf("%v requests", n)
			}
			silent(t, fmt.Sprint(err))
			if !errors.Is(err, verify.ErrUnauthorized) || !strings.Contains(fmt.Sprint(err), "403 Forbidden"+tt.text) {
				t.Errorf("error %v", err)
			}
		}
	}
}

// Without a store a question still needs one token only.
func TestTokenOfOneQuestion(t *testing.T) {
	t.Parallel()
	c, subject, want := signed(3)
	g := &gate{Registry: serve(c), life: "1"}
	src := registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: start(t, g), Client: client(t, nil)})
	sourcetest.Check(t, ask(t, src, subject), want, 0)
	if n := g.count(); n != [2]int{8, 1} {
		t.Errorf("%v requests", n)
	}
}

func TestBasic(t *testing.T) {
	t.Parallel()
	c, subject, want := signed(1)
	g := &gate{Registry: serve(c), basic: true}
	src := registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: start(t, g), Client: client(t, nil), Credentials: robot, Tokens: registry.NewTokens(newClock().now)})
	sourcetest.Check(t, ask(t, src, subject), want, 0)
	if n := g.count(); n != [2]int{4, 0} {
		t.Errorf("%v requests", n)
	}
	ask(t, src, subject)
	if n := g.count(); n != [2]int{3, 0} {
		t.Errorf("%v requests", n)
	}
}

// What cannot be had, with the reason, and without showing anybody a secret.
func TestUnauthorized(t *testing.T) {
	t.Parallel()
	_, subject, _ := signed(0)
	// No credentials may come here: it stands for every other host.
	var mu sync.Mutex
	strangers := 0
	stranger := start(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		strangers++
		mu.Unlock()
		io.WriteString(w, `{"token":"T0K3N.1"}`)
	}))
	challenge := func(c ...string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if a := r.Header.Get("Authorization"); a != "" && a != basicAuth {
				t.Errorf("%s was told %s", r.URL, a)
			}
			for _, c := range c {
				w.Header().Add("WWW-Authenticate", strings.ReplaceAll(c, "HOST", r.Host))
			}
			w.WriteHeader(401)
			io.WriteString(w, r.Header.Get("Authorization"))
		})
	}
	tokens := func(answer func(http.ResponseWriter, *http.Request)) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/token" {
				answer(w, r)
				return
			}
			w.Header().Set("WWW-Authenticate", `Bearer realm="http://`+r.Host+`/token"`)
			w.WriteHeader(401)
		})
	}
	write := func(s string) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, s) }
	}
	say := func(code int) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", stranger.String()+"/token")
			w.Header().Set("Retry-After", "30")
			w.WriteHeader(code)
			io.WriteString(w, r.Header.Get("Authorization"))
		}
	}
	for name, tt := range map[string]struct {
		h    http.Handler
		cred func(context.Context) (registry.Credential, error)
		err  error
		text string
	}{
		"realm elsewhere": {challenge(`Bearer realm="` + stranger.String() + `/token?s3cret=s3cret",service="x"`), robot, verify.ErrUnauthorized,
			`401 Unauthorized: tokens would come from another host, "` + stranger.Host + `", which the registry, or anybody on the way to it, chose: its operator knows the right one, for sources.mirrors[].realm`},
		"realm at the metadata service": {challenge(`Bearer realm="http://169.254.169.254/latest/"`), robot, verify.ErrUnauthorized, `another host, "169.254.169.254"`},
		"realm at another port":         {challenge(`Bearer realm="http://127.0.0.1:1/token"`), robot, verify.ErrUnauthorized, `another host, "127.0.0.1:1"`},
		"realm with another scheme":     {challenge(`Bearer realm="https://HOST/token"`), robot, verify.ErrUnauthorized, "another host"},
		"realm with a password":         {challenge(`Bearer realm="http://a:s3cret@HOST/token"`), robot, verify.ErrUnauthorized, "names no token server"},
		"realm of another kind":         {challenge(`Bearer realm="file:///etc/shadow"`), robot, verify.ErrUnauthorized, "names no token server"},
		"realm without host":            {challenge(`Bearer realm="/token"`), robot, verify.ErrUnauthorized, "names no token server"},
		"realm that is long":            {challenge(`Bearer realm="http://HOST/` + strings.Repeat("x", 2000) + `"`), robot, verify.ErrUnauthorized, "names no token server"},
		"no realm":                      {challenge(`Bearer service="x"`), robot, verify.ErrUnauthorized, "401 Unauthorized"},
		"two realms":                    {challenge(`Bearer realm="` + stranger.String() + `",realm="http://HOST/token"`), robot, verify.ErrUnauthorized, "401 Unauthorized"},
		"no challenge":                  {challenge(), robot, verify.ErrUnauthorized, "401 Unauthorized"},
		"another scheme":                {challenge("Negotiate YWJj==", "Digest realm=x"), robot, verify.ErrUnauthorized, "401 Unauthorized"},
		"basic, refused":                {challenge("Basic realm=x"), robot, verify.ErrUnauthorized, "401 Unauthorized: asked with the credentials from sources.credentials"},
		"basic for nobody":              {challenge("Basic realm=x"), nil, verify.ErrUnauthorized, "wants a user and password, and sources.credentials has none for 127.0.0.1:"},
		"basic for a token":             {challenge("Basic realm=x"), as(registry.Credential{IdentityToken: identity}), verify.ErrUnauthorized, "wants a user and password"},
		"credentials that fail": {challenge("Basic realm=x"), func(context.Context) (registry.Credential, error) {
			return registry.Credential{}, errors.New("helper is gone")
		},
			verify.ErrUnauthorized, "/referrers/...: credentials: helper is gone"},
		"token, refused":          {tokens(write(`{"token":"T0K3N.1"}`)), robot, verify.ErrUnauthorized, "401 Unauthorized: asked with the credentials from sources.credentials"},
		"token of nobody":         {tokens(write(`{"token":"T0K3N.1"}`)), nil, verify.ErrUnauthorized, "401 Unauthorized: asked without credentials: sources.credentials has none for 127.0.0.1:"},
		"token server, 400":       {tokens(say(400)), robot, verify.ErrUnauthorized, "token server 127.0.0.1:"},
		"token server, 401":       {tokens(say(401)), robot, verify.ErrUnauthorized, ": 401 Unauthorized"},
		"token server, 403":       {tokens(say(403)), nil, verify.ErrUnauthorized, ": 403 Forbidden: asked without credentials: sources.credentials has none for 127.0.0.1:"},
		"token server, 404":       {tokens(say(404)), robot, verify.ErrUnreachable, ": 404 Not Found"},
		"token server, 429":       {tokens(say(429)), robot, verify.ErrUnreachable, ": 429 Too Many Requests, asks to wait 30 s"},
		"token server, 500":       {tokens(say(500)), robot, verify.ErrUnreachable, ": 500 Internal Server Error"},
		"token server, redirects": {tokens(say(302)), robot, verify.ErrUnreachable, ": 302 Found"},
		"token server, 307 with a body": {tokens(say(307)), as(registry.Credential{IdentityToken: identity}),
			verify.ErrUnreachable, ": 307 Temporary Redirect"},
		"token of 10 MB":         {tokens(write(`{"token":"` + strings.Repeat("T0K3N", 2<<20) + `"}`)), robot, verify.ErrUnreachable, "longer than 131072 bytes"},
		"token of 20 KB":         {tokens(write(`{"token":"` + strings.Repeat("T0K3N", 4<<10) + `"}`)), robot, verify.ErrUnreachable, "holds no token"},
		"token that is a header": {tokens(write(`{"token":"T0K3N\r\nX-Evil: 1"}`)), robot, verify.ErrUnreachable, "holds no token"},
		"token that is a number": {tokens(write(`{"token":5}`)), robot, verify.ErrUnreachable, "holds no token"},
		"empty token":            {tokens(write(`{"token":""}`)), robot, verify.ErrUnreachable, "holds no token"},
		"no token":               {tokens(write(`{}`)), robot, verify.ErrUnreachable, "holds no token"},
		"not JSON":               {tokens(write(`T0K3N`)), robot, verify.ErrUnreachable, "holds no token"},
		"nothing":                {tokens(write(``)), robot, verify.ErrUnreachable, "holds no token"},
		"deep":                   {tokens(write(strings.Repeat("[", 100_000))), robot, verify.ErrUnreachable, "holds no token"},
		"token server closes":    {tokens(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }), robot, verify.ErrUnreachable, "token server 127.0.0.1:"},
		"token server without end": {tokens(func(w http.ResponseWriter, _ *http.Request) {
			for {
				if _, err := w.Write(make([]byte, 64<<10)); err != nil {
					return
				}
			}
		}), robot, verify.ErrUnreachable, "longer than 131072 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			requests := 0
			u := start(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				mu.Lock()
				requests++
				mu.Unlock()
				tt.h.ServeHTTP(w, r)
			}))
			src := registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: u, Client: client(t, nil), Credentials: tt.cred, Tokens: registry.NewTokens(newClock().now)})
			got, err := sourcetest.Find(t.Context(), src, subject, verify.Limits{})
			if !errors.Is(err, tt.err) || !strings.Contains(fmt.Sprint(err), tt.text) || len(fmt.Sprint(err)) > 500 {
				t.Errorf("error %v\nwant  %v: …%s", err, tt.err, tt.text)
			}
			silent(t, fmt.Sprint(err))
			sourcetest.Check(t, got, nil, 0)
			mu.Lock()
			if requests > 3 {
				t.Errorf("%d requests", requests)
			}
			mu.Unlock()
			if _, _, err := src.Manifest(t.Context(), sourcetest.Name, subject.Digest); !errors.Is(err, tt.err) {
				t.Errorf("Manifest: %v", err)
			} else {
				silent(t, err.Error())
			}
		})
	}
	t.Cleanup(func() {
		if strangers > 0 {
			t.Errorf("another host was asked %d times", strangers)
		}
	})
}

// A realm on another host is asked where the configuration names exactly it, with
// the credentials of the mirror; and the token goes to the mirror alone.
func TestRealm(t *testing.T) {
	t.Parallel()
	c, subject, want := signed(1)
	auth := &gate{user: basicAuth}
	at := start(t, auth)
	u := &url.URL{Scheme: at.Scheme, Host: at.Host}
	g := &gate{Registry: serve(c), realm: at.String() + "/token?account=x&scope=repository:victim:push&service=other", service: "reg"}
	// The tokens that the server issues are good at the registry.
	g.n = 1 << 20
	here := start(t, g)
	open := func(realm *url.URL) *registry.Source {
		return registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: here, Client: client(t, nil), RealmClient: client(t, nil), Realm: realm, Credentials: robot})
	}
	got, err := find(t, open(u), subject)
	if err != nil {
		t.Error(err)
	}
	sourcetest.Check(t, got, want, 0)
	q := auth.tokens[0].URL.Query()
	if len(q["scope"]) != 1 || q.Get("scope") != "repository:team/app:pull" || len(q["service"]) != 1 || q.Get("service") != "reg" || q.Get("account") != "x" {
		t.Errorf("asked for %v", q)
	}
	for _, a := range g.asked {
		if a != "" && !strings.HasPrefix(a, "Bearer "+tokenPrefix) {
			t.Errorf("the mirror was told %q", a)
		}
	}
	auth.count()
	for _, other := range []string{"https://" + at.Host, "http://" + at.Host + "0", "http://localhost:" + at.Port(), "http://127.0.0.1"} {
		o, err := url.Parse(other)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := find(t, open(o), subject); !errors.Is(err, verify.ErrUnauthorized) || !strings.Contains(err.Error(), "another host, ") {
			t.Errorf("realm %s: %v", other, err)
		}
	}
	if n := auth.count(); n[1] != 0 {
		t.Errorf("another realm than the configured was asked %d times", n[1])
	}
}

// A mirror with https is never made to send something over http, and shows its
// client certificate to nobody else.
func TestDowngrade(t *testing.T) {
	t.Parallel()
	_, subject, _ := signed(0)
	plain := start(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { t.Errorf("asked over http: %v", r.Header) }))
	for name, h := range map[string]http.HandlerFunc{
		"realm": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("WWW-Authenticate", `Bearer realm="`+plain.String()+`/token"`)
			w.WriteHeader(401)
		},
		"redirect": func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Authorization") == "" {
				w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
				w.WriteHeader(401)
				return
			}
			http.Redirect(w, r, plain.String()+r.URL.Path, http.StatusTemporaryRedirect)
		},
	} {
		srv := httptest.NewUnstartedServer(h)
		srv.Config.ErrorLog = log.New(io.Discard, "", 0)
		srv.StartTLS()
		t.Cleanup(srv.Close)
		u, err := url.Parse(srv.URL)
		if err != nil {
			t.Fatal(err)
		}
		trusting := srv.Client().Transport.(*http.Transport).TLSClientConfig
		src := registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: u, Client: client(t, trusting), Credentials: robot})
		if _, err := find(t, src, subject); err == nil || !strings.Contains(err.Error(), map[string]string{"realm": "tokens would come over http, from", "redirect": "is another host or scheme"}[name]) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Two mirrors on one host, by port, have each their own credentials and tokens,
// and share one store.
func TestTwoMirrorsOnOneHost(t *testing.T) {
	t.Parallel()
	c, subject, _ := signed(1)
	tokens := registry.NewTokens(newClock().now)
	var gates []*gate
	for _, user := range []string{"one", "two"} {
		header := "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
		g := &gate{Registry: serve(c), user: header}
		if user == "two" {
			g.n = 500 // its tokens are others
			g.revoked = 500
		}
		gates = append(gates, g)
		src := registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: start(t, g), Client: client(t, nil), Credentials: as(registry.Credential{Username: user, Password: password}), Tokens: tokens})
		for range 2 {
			ask(t, src, subject)
		}
		for _, r := range g.tokens {
			if r.Header.Get("Authorization") != header {
				t.Error("credentials of another mirror")
			}
		}
	}
	for i, g := range gates {
		for _, a := range g.asked {
			var n int
			fmt.Sscanf(strings.TrimPrefix(a, "Bearer "+tokenPrefix), "%d", &n)
			if a != "" && (n > 500) != (i == 1) {
				t.Errorf("mirror %d was told the other's token", i)
			}
		}
		if n := g.count(); n != [2]int{7, 1} {
			t.Errorf("mirror %d: %v requests", i, n)
		}
	}
}

// A registry that repeats what it was told does not get it into an error.
func TestEcho(t *testing.T) {
	t.Parallel()
	c, subject, _ := signed(1)
	for name, echo := range map[string]func(w http.ResponseWriter, told string){
		"encoding": func(w http.ResponseWriter, told string) {
			w.Header().Set("Content-Encoding", told)
			io.WriteString(w, "x")
		},
		"malformed answer": func(w http.ResponseWriter, told string) {
			conn, _, err := w.(http.Hijacker).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			io.WriteString(conn, told+"\r\n\r\n")
			conn.Close()
		},
		"media type": func(w http.ResponseWriter, told string) {
			w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
			fmt.Fprintf(w, `{"manifests":[{"mediaType":%q,"digest":%q,"size":1,"artifactType":%q}]}`, told, digest.FromString("x"), sourcetest.ArtifactType)
		},
		"digest": func(w http.ResponseWriter, told string) {
			w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
			fmt.Fprintf(w, `{"manifests":[{"mediaType":%q,"digest":%q,"size":1,"artifactType":%q}]}`, ocispec.MediaTypeImageManifest, told, sourcetest.ArtifactType)
		},
		"link": func(w http.ResponseWriter, told string) {
			w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
			w.Header().Set("Link", "<http://"+strings.ReplaceAll(told, " ", "-")+`.x/>; rel="next"`)
			io.WriteString(w, `{"manifests":[]}`)
		},
		"type of a manifest": func(w http.ResponseWriter, told string) {
			w.Header().Set("Content-Type", told)
			io.WriteString(w, `{"layers":[]}`)
		},
	} {
		for _, basic := range []bool{true, false} {
			t.Run(fmt.Sprint(name, basic), func(t *testing.T) {
				t.Parallel()
				g := &gate{Registry: serve(c), basic: basic}
				said := false
				g.Intercept = func(w http.ResponseWriter, r *http.Request) bool {
					told := r.Header.Get("Authorization")
					said = said || told != ""
					if basic && name != "link" {
						told = password + " " + told
					}
					echo(w, told)
					return true
				}
				src := registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: start(t, g), Client: client(t, nil), Credentials: robot})
				got, err := find(t, src, subject)
				if err == nil && len(got) == 0 || len(got) > 0 && got[0].Err == nil {
					t.Errorf("%v, error %v", got, err)
				}
				if !said {
					t.Error("nothing was repeated")
				}
			})
		}
	}
}

// What a credential prints as.
func TestCredentialIsSilent(t *testing.T) {
	t.Parallel()
	c := registry.Credential{Username: "robot", Password: password, IdentityToken: identity}
	raw, err := json.Marshal(map[string]any{"c": c, "p": &c})
	if err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf("%v %+v %#v %s %q %x %d %v %s", c, c, c, c, c, c, c, &c, []registry.Credential{c}) + string(raw)
	silent(t, text)
	if !strings.Contains(text, "(credential)") {
		t.Error(text)
	}
}

// A token server that hangs holds a question no longer than its context.
func TestHangingTokenServer(t *testing.T) {
	t.Parallel()
	_, subject, _ := signed(0)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	u := start(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/token" {
			cancel()
			<-r.Context().Done()
			return
		}
		w.Header().Set("WWW-Authenticate", `Bearer realm="http://`+r.Host+`/token"`)
		w.WriteHeader(401)
	}))
	src := registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: u, Client: client(t, nil), Credentials: robot})
	_, err := sourcetest.Find(ctx, src, subject, verify.Limits{})
	if !errors.Is(err, verify.ErrUnreachable) || !strings.Contains(err.Error(), ": given up") {
		t.Errorf("error %v", err)
	}
}

// A mirror that wants something else with each answer is asked a bounded number
// of times.
func TestWantsWithoutEnd(t *testing.T) {
	t.Parallel()
	c, subject, _ := signed(5)
	var mu sync.Mutex
	n, tokens := 0, 0
	g := serve(c)
	u := start(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		if r.URL.Path == "/token" {
			tokens++
			fmt.Fprintf(w, `{"token":"x%d"}`, tokens)
			return
		}
		n++
		if n%2 == 1 {
			w.Header().Set("WWW-Authenticate", `Bearer realm="http://`+r.Host+`/token",service="`+fmt.Sprint(n)+`"`)
			w.WriteHeader(401)
			return
		}
		g.ServeHTTP(w, r)
	}))
	src := registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: u, Client: client(t, nil), Tokens: registry.NewTokens(newClock().now)})
	_, err := sourcetest.Find(t.Context(), src, subject, verify.Limits{})
	if !errors.Is(err, verify.ErrUnauthorized) || tokens > 6 || n > 12 {
		t.Errorf("%d requests, %d tokens, error %v", n, tokens, err)
	}
}

// ns names the image's host, in every request to the registry.
func TestNS(t *testing.T) {
	t.Parallel()
	c, subject, want := signed(5)
	g := &gate{Registry: serve(c)}
	g.PageSize = 2
	n := 0
	g.seen = func(r *http.Request) {
		if q := r.URL.Query()["ns"]; len(q) != 1 || q[0] != sourcetest.Name.Host {
			t.Errorf("%s: ns %q", r.URL, q)
		}
		n++
	}
	src := registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: start(t, g), Client: client(t, nil), NS: true})
	sourcetest.Check(t, ask(t, src, subject), want, 0)
	if n != 1+3+10 {
		t.Errorf("%d requests", n)
	}
	for _, r := range g.tokens {
		if r.Form.Has("ns") {
			t.Error("the token server was told")
		}
	}
}

// A busy registry is not asked twice, and says how long it wants to be left alone.
func TestBusy(t *testing.T) {
	t.Parallel()
	_, subject, _ := signed(0)
	for after, want := range map[string]string{
		"1": ", asks to wait 1 s", "0": ", asks to wait 0 s", "": "", "soon": "", "-1": "", "99999999999": "",
		"Sat, 21 Nov 2026 12:00:00 GMT": ", asks to wait until 2026-11-21T12:00:00Z",
	} {
		for _, code := range []int{429, 503} {
			requests := 0
			u := start(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				requests++
				w.Header().Set("Retry-After", after)
				w.WriteHeader(code)
			}))
			src := registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: u, Client: client(t, nil)})
			_, err := sourcetest.Find(t.Context(), src, subject, verify.Limits{})
			if !errors.Is(err, verify.ErrUnreachable) || !strings.HasSuffix(fmt.Sprint(err), http.StatusText(code)+want) || requests != 1 {
				t.Errorf("%q: %d requests, error %v", after, requests, err)
			}
		}
	}
}

// A registry that breaks on the second page, or takes its time for each.
func TestHalfBroken(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		second func(http.ResponseWriter, *http.Request, context.CancelFunc)
		text   string
	}{
		"500": {func(w http.ResponseWriter, _ *http.Request, _ context.CancelFunc) { w.WriteHeader(500) }, "500 Internal Server Error"},
		"429": {func(w http.ResponseWriter, _ *http.Request, _ context.CancelFunc) { w.WriteHeader(429) }, "429 Too Many Requests"},
		"slow": {func(w http.ResponseWriter, r *http.Request, cancel context.CancelFunc) {
			for range 20 { // a byte at a time
				if _, err := io.WriteString(w, " "); err != nil {
					return
				}
				w.(http.Flusher).Flush()
				time.Sleep(time.Millisecond)
			}
			cancel() // the deadline comes first
			<-r.Context().Done()
		}, "given up"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			c, subject, want := signed(4)
			g := serve(c)
			g.PageSize = 2
			g.Intercept = func(w http.ResponseWriter, r *http.Request) bool {
				if !r.URL.Query().Has("page") {
					return false
				}
				w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
				tt.second(w, r, cancel)
				return true
			}
			got, err := sourcetest.Find(ctx, open(t, g), subject, verify.Limits{})
			if !errors.Is(err, verify.ErrUnreachable) || !strings.Contains(fmt.Sprint(err), tt.text) {
				t.Errorf("error %v", err)
			}
			sourcetest.Check(t, got, want[:2], 0)
		})
	}
}
