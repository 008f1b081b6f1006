package control

import (
	"maps"
	"slices"

	"github.com/tidewaiter/tidewaiter/verify"
)

// next says what to do about each reason that denies. docs/reasons.md has the same
// text, which a test compares.
var next = map[verify.Reason]string{
	verify.SignatureMissing:      "sign the image, or copy its signatures to the mirror: most copy tools leave referrers behind (`oras cp -r` takes them along). An image that was imported needs an evidence archive (`tidewaiter evidence import`)",
	verify.SignatureInvalid:      `sign the image again; if the bytes changed at the mirror, find out who changed them`,
	verify.SignerUntrusted:       "have the image signed by a signer of the trust stores in the detail; anybody can put a signature beside an image, so that the one seen is no reason to trust its signer",
	verify.IdentityMismatch:      "compare the subject in the detail with `trustedIdentities`",
	verify.SignatureExpired:      `sign again`,
	verify.CertificateExpired:    `sign again with a valid certificate; check the node's clock`,
	verify.TimestampInvalid:      `sign with a timestamp of a trusted authority`,
	verify.Revoked:               `do not run the image`,
	verify.CriticalAttribute:     "sign without it; if it is an extension of a certificate, take a CA whose certificates have none that is critical (`policy check` names roots)",
	verify.PluginUnsupported:     `sign without a plugin`,
	verify.ThresholdNotMet:       `have the image signed by those whom the detail names; several signatures of one signer count once`,
	verify.NotAnImage:            `run an image`,
	verify.LimitExceeded:         `look at what is attached to the image at that mirror; raise the limit if it is legitimate`,
	verify.PolicyNoMatch:         "add the repository to a statement's `registryScopes`, or use an image that is named there",
	verify.ImageMismatch:         `pull the image again and create the container anew`,
	verify.ImageAmbiguous:        `build the image anew`,
	verify.ImageVolumeUnverified: `pull the image by its name; the detail says what was missing`,
	verify.SnapshotterUnverified: "list it under `gate.snapshotters` if you trust it",
	verify.RuntimeUnverified:     "list it under `gate.runtimes` if it does",
	verify.PodTooLarge:           "put what is long into a file: a ConfigMap or Secret as a volume. Where it is the addresses of all services of the namespace, set `enableServiceLinks: false` in the pod",
	verify.SourceUnreachable:     "look at the mirror; the next try asks again. If the detail says that the registry chose another host for the blob, ask its operator whether that host is its own before you add it",
	verify.SourceUnauthorized:    "the detail says which: add the mirror's host and port to the file that `sources.credentials` names, give that user the right to pull, or set `realm` of the mirror to where its operator says that its tokens come from; the host in the detail is what the registry said, or anybody on the way to an http mirror, and would get the credentials",
	verify.SourceNoReferrers:     "copy the image to that mirror with its signatures (`oras cp -r`), or sign it there: `notation sign` and `oras cp -r` leave a tag that says where signatures are; or name a mirror that has the image, or one with a Referrers API",
	verify.RevocationUnknown:     "sign with certificates that name no CRL and no OCSP responder, or take a timestamping authority whose certificates name none, if the detail is about one. If neither can be, `\"override\": {\"revocation\": \"log\"}` in the statement turns the check off: a revoked certificate passes then, and it does not excuse a timestamping authority",
	verify.Pending:               `wait; if it stays, look at the mirror`,
	verify.Overloaded:            `wait`,
	verify.PolicyInvalid:         `see the log; correct the file that it names`,
	verify.ImageUnresolved:       "name the image by repository and tag or digest, and pull it by that name; give `verify` a layout or mirror that holds it",
	verify.Internal:              `report it, with the log line`,
}

// Denials returns the reasons with which enforce denies, in no order.
func Denials() []verify.Reason { return slices.Collect(maps.Keys(next)) }

// Next returns what to do if enforce answers with r, or nothing.
func Next(r verify.Reason) string { return next[r] }
