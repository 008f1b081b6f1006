package explain

import "github.com/tidewaiter/tidewaiter/verify"

// next says what to do about each reason that denies. docs/reasons.md has the same
// text, which a test compares.
var next = map[verify.Reason]string{
	verify.SignatureMissing:      "sign the image, or copy its signatures to the mirror: most copy tools leave referrers behind (`oras cp -r` takes them along). An image that was imported needs a bundle (`tidewaiter bundle import`)",
	verify.SignatureInvalid:      `sign the image again; if the bytes changed at the mirror, find out who changed them`,
	verify.SignerUntrusted:       `add the signer's root to the trust store if you trust it`,
	verify.IdentityMismatch:      "compare the subject in the detail with `trustedIdentities`",
	verify.SignatureExpired:      `sign again`,
	verify.CertificateExpired:    `sign again with a valid certificate; check the node's clock`,
	verify.TimestampInvalid:      `sign with a timestamp of a trusted authority`,
	verify.Revoked:               `do not run the image`,
	verify.CriticalAttribute:     `sign without it`,
	verify.PluginUnsupported:     `sign without a plugin`,
	verify.SignedObject:          `run an image`,
	verify.BudgetExceeded:        `look at what is attached to the image at that mirror; raise the limit if it is legitimate`,
	verify.PolicyNoMatch:         "add the repository to a statement's `registryScopes`, or use an image that is named there",
	verify.ImageMismatch:         `pull the image again and create the container anew`,
	verify.ImageAmbiguous:        `build the image anew`,
	verify.ImageVolumeUnverified: `pull the image by its name; the detail says what was missing`,
	verify.SnapshotterUnverified: "list it under `gate.snapshotters` if you trust it",
	verify.RuntimeUnverified:     "list it under `gate.runtimes` if it does",
	verify.PodTooLarge:           "put what is long into a file: a ConfigMap or Secret as a volume. Where it is the addresses of all services of the namespace, set `enableServiceLinks: false` in the pod",
	verify.SourceUnreachable:     `look at the mirror; the next try asks again. Where the detail says that the blob is at another host, add that host where it says, if it is the registry's`,
	verify.SourceUnauthorized:    "the detail says which: add the mirror's host and port to the file that `sources.credentials` names, give that user the right to pull, or set `realm` of the mirror to the host in the detail if that is where its tokens should come from",
	verify.SourceNoReferrers:     "sign the image: `notation sign` and `oras cp -r` leave a tag there that says where signatures are (`--force-referrers-tag=false` of notation does not); or use a mirror with a Referrers API",
	verify.RevocationUnknown:     "sign with certificates that name none, or set `\"override\": {\"revocation\": \"log\"}` in the statement; that does not excuse a timestamping authority, whose certificates must name none",
	verify.Pending:               `wait; if it stays, look at the mirror`,
	verify.Overloaded:            `wait`,
	verify.PolicyInvalid:         `see the log; correct the file that it names`,
	verify.ImageUnresolved:       "name the image by repository and tag or digest, and pull it by that name; give `verify` a layout or mirror that holds it",
	verify.Internal:              `report it, with the log line`,
}

// Next returns what to do where enforce answers with r, or nothing.
func Next(r verify.Reason) string { return next[r] }
