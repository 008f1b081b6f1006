package notary

import (
	"net"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

// TestNoNetwork: whatever the level, and whoever made the chain, nobody is asked
// about revocation. It also has one Checker used by many at once.
func TestNoNetwork(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var dialled atomic.Int32
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			dialled.Add(1)
			c.Close()
		}
	}()
	url := "http://" + l.Addr().String()
	asks := notarytest.CertOptions{CRL: []string{url + "/crl"}, OCSP: []string{url}}
	stamps := tsaCA.TSA(asks)
	store := stampStore(t)
	var statements []verify.Statement
	for _, level := range []string{"strict", "permissive", "audit"} {
		s := stampedStatement("always")
		s.Name, s.Level = level, level
		statements = append(statements, s)
		s.Name, s.TrustStores = level+" without timestamps", s.TrustStores[:1]
		statements = append(statements, s)
	}
	c := newChecker(t, store, noon, statements...)
	var wg sync.WaitGroup
	for _, ca := range []*notarytest.CA{acme, notarytest.NewCA(notarytest.CAOptions{Intermediates: 1, Intermediate: asks})} {
		s := ca.Leaf(asks)
		for _, m := range formats {
			blob := notarytest.Timestamp(notarytest.MustSign(s, image, notarytest.SignOptions{MediaType: m}), m, func(sig []byte) []byte {
				return notarytest.Token(stamps, sig, notarytest.TokenOptions{})
			})
			for _, st := range statements {
				want := verify.Verified
				if ca != acme {
					want = verify.SignerUntrusted
				} else if st.Level == "strict" {
					want = verify.RevocationUnknown
				}
				for range 3 {
					wg.Go(func() {
						if f := c.Check(t.Context(), verify.Evidence{MediaType: m, Blob: blob}, image, st.Name); f.Reason != want {
							t.Errorf("%s %s: %s (%s), want %s", st.Name, m, f.Reason, f.Detail, want)
						}
					})
				}
			}
		}
	}
	wg.Wait()
	l.Close()
	<-done
	if n := dialled.Load(); n > 0 {
		t.Errorf("%d connections were opened", n)
	}
}
