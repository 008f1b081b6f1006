package registry

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// What follows is the client's part of Docker's token protocol (distribution,
// docs/content/spec/auth/token.md and oauth.md). oras-go has it too, in package
// registry/remote/auth, and that is not used: its client hands the credentials to
// whatever public host a challenge names, refuses the private one that a site has
// for that, looks up names that the registry chose, and asks for the scopes that
// the challenge wants besides its own (v2.6.4, validateRealm and Client.Do). None of
// these can be switched off.

// A Credential is what a registry knows somebody by. The zero Credential is nobody.
// It prints as nothing but the fact that it is one.
type Credential struct {
	Username, Password string
	IdentityToken      string // OAuth2 refresh token; goes before the password
}

// Format implements [fmt.Formatter], so that no verb shows a secret.
func (Credential) Format(f fmt.State, _ rune) { io.WriteString(f, "(credential)") }

// MarshalText implements [encoding.TextMarshaler], so that no encoder shows a secret.
func (Credential) MarshalText() ([]byte, error) { return []byte("(credential)"), nil }

// basic is c as a header sends it, or empty.
func (c Credential) basic() string {
	if c.Username == "" {
		return ""
	}
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(c.Username+":"+c.Password))
}

// secrets are what of c nobody may read.
func (c Credential) secrets() []string {
	return []string{c.Password, c.IdentityToken, strings.TrimPrefix(c.basic(), "Basic ")}
}

// Limits of what a registry and its token server say.
const (
	maxTokenAnswer = 128 << 10 // bytes, as other clients
	maxTokens      = 128       // kept, with at most 16 KiB each
	maxChallenges  = 128       // registries whose challenge is remembered
	maxChallenge   = 4 << 10   // bytes of one WWW-Authenticate header
	maxRealm       = 1 << 10   // bytes of a realm's URL

	tokenLife    = time.Minute // of a token that does not say (token.md)
	maxTokenLife = time.Hour
	tokenMargin  = 10 * time.Second // a token is not used this shortly before its end
)

// Tokens keeps what token servers handed out, and how registries asked for it, in
// memory and for each registry and repository apart. At most 128 tokens are kept.
// It is safe for concurrent use; all mirrors of a program can share one.
type Tokens struct {
	now    func() time.Time
	tokens *lru.Cache[string, token]     // by origin and repository
	wants  *lru.Cache[string, challenge] // by origin
}

type token struct {
	value string
	named bool // for somebody
	until time.Time
}

// NewTokens returns an empty store. now is the clock that tokens end by.
func NewTokens(now func() time.Time) *Tokens {
	t := &Tokens{now: now}
	t.tokens, _ = lru.New[string, token](maxTokens) // it fails only without a size
	t.wants, _ = lru.New[string, challenge](maxChallenges)
	return t
}

// get returns the token for key, or the zero token.
func (t *Tokens) get(key string) token {
	if t == nil {
		return token{}
	}
	k, ok := t.tokens.Get(key)
	if !ok || !t.now().Before(k.until) {
		return token{}
	}
	return k
}

func (t *Tokens) put(key string, k token, life time.Duration) {
	if t != nil && life > tokenMargin {
		k.until = t.now().Add(life - tokenMargin)
		t.tokens.Add(key, k)
	}
}

func (t *Tokens) wanted(origin string) (c challenge) {
	if t != nil {
		c, _ = t.wants.Get(origin)
	}
	return c
}

func (t *Tokens) want(origin string, c challenge) {
	if t != nil {
		t.wants.Add(origin, c)
	}
}

// forget drops what is known of a repository: it was refused.
func (t *Tokens) forget(origin, repository string) {
	if t != nil {
		t.tokens.Remove(origin + " " + repository)
		t.wants.Remove(origin)
	}
}

// A challenge is one of those in WWW-Authenticate. The zero challenge is none.
type challenge struct {
	scheme         string // "basic" or "bearer"
	realm, service string // of bearer
}

// challenges reads the first few headers of an answer (RFC 9110, section 11.6.1).
// Of one that is broken, or gives a parameter twice, nothing counts from there on.
func challenges(headers []string) (list []challenge) {
	for _, h := range headers[:min(len(headers), 4)] {
		if len(h) > maxChallenge {
			continue
		}
		var open *challenge // its parameters are being read
		params := map[string]bool{}
		done := func() {
			if open != nil && (open.scheme == "basic" || open.scheme == "bearer" && open.realm != "") {
				list = append(list, *open)
			}
			open = nil
		}
		for {
			h = strings.TrimLeft(h, " \t,")
			word := authToken.FindString(h)
			if word == "" {
				break
			}
			rest := strings.TrimLeft(h[len(word):], " \t")
			if !strings.HasPrefix(rest, "=") {
				done()
				open, params = &challenge{scheme: strings.ToLower(word)}, map[string]bool{}
				h = rest
				continue
			}
			value, rest, ok := authValue(strings.TrimLeft(rest[1:], " \t"))
			name := strings.ToLower(word)
			if !ok || open == nil || params[name] {
				open, h = nil, ""
				break
			}
			params[name] = true
			switch name {
			case "realm":
				open.realm = value
			case "service":
				open.service = value
			}
			h = rest
		}
		if h == "" {
			done()
		}
	}
	return list
}

var authToken = regexp.MustCompile("^[!#$%&'*+.^_`|~0-9A-Za-z-]+")

// authValue reads a token or a quoted string from the start of s.
func authValue(s string) (value, rest string, ok bool) {
	if !strings.HasPrefix(s, `"`) {
		value = authToken.FindString(s)
		return value, s[len(value):], value != ""
	}
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch {
		case s[i] == '"':
			return b.String(), s[i+1:], true
		case s[i] == '\\' && i+1 < len(s):
			i++
		}
		b.WriteByte(s[i])
	}
	return "", "", false
}

// origin is scheme, host and port of u, in one form.
func origin(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	return u.Scheme + "://" + strings.ToLower(u.Hostname()) + " " + port
}

// An exchange is what one question says to one repository of a mirror, and what of
// it must not be repeated.
type exchange struct {
	*Source
	repository string // at the mirror
	ahead      bool   // asked ahead of time: nobody waits for it
	connected  bool   // a request was put to the mirror
	header     string // Authorization that is in use
	challenged bool   // a challenge was answered: there is no second time
	named      bool   // as somebody, not as nobody
	secrets    []string
}

// keep notes what nobody may read.
func (e *exchange) keep(secrets ...string) {
	for _, s := range secrets {
		if s != "" {
			e.secrets = append(e.secrets, s)
		}
	}
}

// unwelcome says as whom the mirror was asked in vain, where it was told anything.
func (e *exchange) unwelcome(status int) string {
	if status != http.StatusUnauthorized && status != http.StatusForbidden || !e.challenged && e.header == "" {
		return ""
	}
	return e.asWhom()
}

func (e *exchange) asWhom() string {
	if e.named {
		return "asked with the credentials from sources.credentials"
	}
	return "asked without credentials: sources.credentials has none for " + e.base.Registry
}

// key is where the token for the repository is kept. Schemes and ports are apart.
func (e *exchange) key() string { return e.origin + " " + e.repository }

// credential is what the mirror, and nobody else but its realm, may be told.
func (e *exchange) credential(ctx context.Context) (Credential, error) {
	if e.credentials == nil {
		return Credential{}, nil
	}
	c, err := e.credentials(ctx)
	if err != nil {
		class := verify.ErrUnauthorized
		if ctx.Err() != nil {
			class = verify.ErrUnreachable
		}
		return Credential{}, &failure{class: class, text: "credentials: " + short(err)}
	}
	e.keep(c.secrets()...)
	e.named = c != Credential{}
	return c, nil
}

// known returns the header to send before anybody asks for it, or an empty one.
// That is old if it was there before this request, so that another may help.
func (e *exchange) known(ctx context.Context) (header string, old bool, err error) {
	if e.header != "" {
		return e.header, true, nil
	}
	if t := e.tokens.get(e.key()); t.value != "" {
		e.keep(t.value)
		e.named = t.named
		return "Bearer " + t.value, true, nil
	}
	c := e.tokens.wanted(e.origin)
	if c.scheme == "" {
		return "", true, nil
	}
	if header, err = e.answer(ctx, []challenge{c}); err != nil {
		e.tokens.forget(e.origin, e.repository) // the registry may want something else by now
	}
	return header, false, err
}

// answer returns the header that meets one of list: the first for which there is
// what it takes.
func (e *exchange) answer(ctx context.Context, list []challenge) (string, error) {
	var first error
	for _, c := range list {
		var header string
		var err error
		if c.scheme == "bearer" {
			header, err = e.bearer(ctx, c)
		} else {
			header, err = e.basic(ctx)
		}
		if err == nil {
			e.tokens.want(e.origin, c)
			return header, nil
		}
		if first == nil {
			first = err
		}
		// Who was told no by a token server does not show the password elsewhere.
		if !errors.Is(err, errCannot) {
			return "", err
		}
	}
	return "", first
}

// errCannot is wrapped where nothing was sent: another challenge may do.
var errCannot = errors.New("the challenge cannot be met")

func cannot(format string, args ...any) error {
	return &failure{class: verify.ErrUnauthorized, text: fmt.Sprintf(format, args...), cause: errCannot}
}

func (e *exchange) basic(ctx context.Context) (string, error) {
	c, err := e.credential(ctx)
	if err != nil {
		return "", err
	}
	if c.basic() == "" {
		return "", cannot("it wants a user and password, and sources.credentials has none for %s", e.base.Registry)
	}
	return c.basic(), nil
}

// realmOf is the URL of the token server that c names, and the client to ask it
// with, if it is the mirror itself or the one host that is configured.
func (e *exchange) realmOf(c challenge) (*url.URL, *http.Client, error) {
	u, err := url.Parse(c.realm)
	if err != nil || len(c.realm) > maxRealm || u.Opaque != "" || u.User != nil || u.Hostname() == "" ||
		u.Scheme != "http" && u.Scheme != "https" {
		return nil, nil, cannot("it names no token server that can be asked")
	}
	u.Fragment, u.RawFragment = "", ""
	switch o := origin(u); {
	case o == e.origin:
		return u, e.client, nil
	case e.realm != nil && o == origin(e.realm):
		return u, e.realmClient, nil
	case u.Scheme == "http" && !e.plain:
		return nil, nil, cannot("tokens would come over http, from %s, which is never done for a mirror with https", text.Quote(u.Host, 80))
	}
	if e.plain { // nothing to copy: it need not even be the registry that wrote this
		return nil, nil, cannot("tokens would come from another host, %s, which the registry, or anybody on the way to it, chose: its operator knows the right one, for sources.mirrors[].realm",
			text.Quote(u.Host, 80))
	}
	at := (&url.URL{Scheme: u.Scheme, Host: u.Host}).String()
	return nil, nil, cannot("tokens would come from another host, %s, which the registry chose: if its operator names that too, set sources.mirrors[].realm: %s",
		text.Quote(u.Host, 80), text.Clean(at, 80))
}

// bearer asks the token server for a token with which the repository can be read,
// and for nothing else, whatever scope the challenge wants. The service is what the
// registry says: a registry could so ask for a token for another one that its token
// server serves. It would be for the same user and path, and for reading.
func (e *exchange) bearer(ctx context.Context, c challenge) (string, error) {
	u, client, err := e.realmOf(c)
	if err != nil {
		return "", err
	}
	cred, err := e.credential(ctx)
	if err != nil {
		return "", err
	}
	ask := url.Values{"scope": {"repository:" + e.repository + ":pull"}}
	if c.service != "" {
		ask.Set("service", c.service)
	}
	var req *http.Request
	if cred.IdentityToken != "" {
		ask.Set("grant_type", "refresh_token")
		ask.Set("client_id", "tidewaiter")
		ask.Set("refresh_token", cred.IdentityToken)
		req, err = http.NewRequestWithContext(ctx, http.MethodPost, u.String(), strings.NewReader(ask.Encode()))
	} else {
		q := u.Query()
		for k, v := range ask {
			q[k] = v
		}
		u.RawQuery = q.Encode()
		req, err = http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	}
	if err != nil {
		return "", cannot("it names no token server that can be asked")
	}
	if client == e.client { // the mirror itself
		for k, values := range e.Source.header {
			req.Header[http.CanonicalHeaderKey(k)] = values
		}
		req.Header.Del("Authorization")
	}
	if cred.IdentityToken != "" {
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	} else if cred.Username != "" {
		req.Header.Set("Authorization", cred.basic())
	}
	value, life, err := e.fetch(client, req)
	if err != nil {
		return "", err
	}
	e.keep(value)
	e.tokens.put(e.key(), token{value: value, named: e.named}, life)
	return "Bearer " + value, nil
}

// bearerToken is what a header can hold (RFC 6750, section 2.1).
var bearerToken = regexp.MustCompile(`^[A-Za-z0-9._~+/-]+=*$`)

const maxToken = 16 << 10 // bytes

// fetch sends a request for a token. No redirect is followed.
func (e *exchange) fetch(client *http.Client, req *http.Request) (value string, life time.Duration, err error) {
	at := "token server " + text.Clean(req.URL.Host, 80) + ": "
	fail := func(class error, text string, cause error) (string, time.Duration, error) {
		return "", 0, &failure{class: class, text: at + text, cause: cause}
	}
	req.Header.Set("Accept-Encoding", "identity")
	req.Header.Set("User-Agent", "tidewaiter")
	if err := e.pace(req.Context()); err != nil {
		return fail(verify.ErrUnreachable, cause(err), err)
	}
	resp, err := client.Do(req)
	if err != nil {
		return fail(verify.ErrUnreachable, cause(err), err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		class, text := verify.ErrUnreachable, strings.TrimSpace(fmt.Sprintf("%d %s", resp.StatusCode, http.StatusText(resp.StatusCode)))
		switch resp.StatusCode {
		case http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden:
			class = verify.ErrUnauthorized // OAuth2 says 400 of a refresh token that it does not know
			text += ": " + e.asWhom()
		}
		asks, _, _ := wait(resp)
		return fail(class, text+asks, nil)
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxTokenAnswer+1))
	if err != nil {
		return fail(verify.ErrUnreachable, cause(err), err)
	}
	if len(raw) > maxTokenAnswer {
		return fail(verify.ErrUnreachable, fmt.Sprintf("the answer is longer than %d bytes", maxTokenAnswer), nil)
	}
	var doc struct {
		Token       string          `json:"token"`
		AccessToken string          `json:"access_token"`
		ExpiresIn   json.RawMessage `json:"expires_in"`
	}
	// What is wrong with it is not repeated: it is about a secret.
	if json.Unmarshal(raw, &doc) != nil {
		return fail(verify.ErrUnreachable, "the answer holds no token", nil)
	}
	if value = doc.Token; value == "" {
		value = doc.AccessToken
	}
	if len(value) > maxToken || !bearerToken.MatchString(value) {
		return fail(verify.ErrUnreachable, "the answer holds no token", nil)
	}
	life = tokenLife
	if s, err := strconv.ParseInt(string(doc.ExpiresIn), 10, 32); err == nil && s > 0 {
		life = min(time.Duration(s)*time.Second, maxTokenLife)
	}
	return value, life, nil
}
