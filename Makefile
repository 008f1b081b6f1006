# Everything that a build or test needs beyond Go, gcc and root is installed by
# these targets: modules through the module proxy, libseccomp through apt-get.

CONTAINERD ?= 2.4.2
FUZZTIME   ?= 10s
STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2
# grpcnotrace leaves out golang.org/x/net/trace and html/template: half a megabyte
# that nobody looks at. test/node builds with the same.
TAGS        = grpcnotrace
VERSION    ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
LDFLAGS     = -s -w -X main.version=$(VERSION)
IMAGE      ?= ghcr.io/tidewaiter/tidewaiter
IMAGEBUILD  = CGO_ENABLED=0 go build -trimpath -buildvcs=auto -tags $(TAGS) -ldflags '$(LDFLAGS)'

.PHONY: build image demo bench flood matrix test lint unit core386 cross fuzz e2e e2e-all e2e-k8s cluster e2e-offline clean

build: ## the static binary, in bin/
	CGO_ENABLED=0 go build -trimpath -tags $(TAGS) -ldflags '$(LDFLAGS)' -o bin/tidewaiter ./cmd/tidewaiter

image: ## in dist/: the container image of all platforms, without Docker, what is in it, and manifests that name it
	rm -rf dist
	GOOS=linux GOARCH=amd64 $(IMAGEBUILD) -o dist/linux-amd64/tidewaiter ./cmd/tidewaiter
	GOOS=linux GOARCH=arm64 $(IMAGEBUILD) -o dist/linux-arm64/tidewaiter ./cmd/tidewaiter
	GOOS=linux GOARCH=arm GOARM=7 $(IMAGEBUILD) -o dist/linux-arm-v7/tidewaiter ./cmd/tidewaiter
	go run ./deploy/image -name $(IMAGE):$(VERSION) -o dist dist/linux-*/tidewaiter
	mkdir dist/deploy
	cp -r deploy/kubeadm deploy/k3s deploy/rke2 deploy/microk8s deploy/enforce deploy/host deploy/host-enforce deploy/helm deploy/alerts.yaml dist/deploy
	sed -i 's|ghcr.io/tidewaiter/tidewaiter:devel|$(IMAGE):$(VERSION)|' dist/deploy/kubeadm/tidewaiter.yaml dist/deploy/host/tidewaiter-host.yaml
	sed -i 's|^image: .*|image: $(IMAGE):$(VERSION)|' dist/deploy/helm/values.yaml
	sed -i 's|^appVersion: .*|appVersion: "$(VERSION)"|' dist/deploy/helm/Chart.yaml

demo: ## a throwaway containerd node where signed images start and others do not
	cd test && go run ./demo -containerd $(CONTAINERD)

bench: ## the tables of docs/performance.md; needs root on Linux, a quiet machine and 25 minutes
	cd test && go run ./bench

flood: ## 10,000 creations on containerd 2.4.2, 2.3.7 and 2.2.9 each while the mirror fails; needs root on Linux and 15 minutes
	cd test && go run ./flood

matrix: ## every failure of the gate against NRI 0.11.0, 0.12.0, 0.12.3 and 0.12.5; needs root on Linux and 6 minutes
	cd test/matrix && TIDEWAITER_MATRIX=full go test -race -count=1 -timeout 30m

test: lint unit core386 cross fuzz e2e ## everything that CI runs

lint:
	@test -z "$$(gofmt -l .)" || { echo 'gofmt would change:'; gofmt -l .; exit 1; }
	go vet ./...
	cd test && go vet ./...
	go run $(STATICCHECK) ./...
	cd test && go run $(STATICCHECK) ./...

unit:
	go test -race -timeout 30m ./...

core386: ## the core on a 32-bit machine; compiled only where the kernel runs no 32-bit programs
	@if GOARCH=386 go test -count=1 -run '^$$' ./verify/leaktest >/dev/null 2>&1; then \
	  echo 'GOARCH=386 go test ./verify/... ./cache/...'; \
	  GOARCH=386 go test ./verify/... ./cache/...; \
	else \
	  echo '****************************************************************'; \
	  echo '** NOT RUN: the tests of the core on 32 bits. This kernel     **'; \
	  echo '** runs no 386 programs (IA-32 emulation is off), and Go does **'; \
	  echo '** not run under qemu-i386. They are compiled and vetted.     **'; \
	  echo '****************************************************************'; \
	  GOARCH=386 go vet ./verify/... ./cache/...; \
	fi

cross: ## the other machines of the edge, and one to verify at
	GOARCH=arm64 CGO_ENABLED=0 go build -tags $(TAGS) -o /dev/null ./cmd/tidewaiter
	GOARCH=arm GOARM=7 CGO_ENABLED=0 go build -tags $(TAGS) -o /dev/null ./cmd/tidewaiter
	GOOS=darwin GOARCH=arm64 CGO_ENABLED=0 go build -tags $(TAGS) -o /dev/null ./cmd/tidewaiter

fuzz: ## every parser of outside bytes, $(FUZZTIME) each
	./test/fuzz.sh $(FUZZTIME)

e2e: ## on real containerd, 2.4.2 and 2.3.7, which is the LTS line; needs root on Linux
	@if [ "$$(id -u)" != 0 ] || [ "$$(uname -s)" != Linux ]; then \
	  echo '****************************************************************'; \
	  echo '** NOT RUN: the end-to-end tests on containerd need root on   **'; \
	  echo '** Linux. What they hold was not tested.                      **'; \
	  echo '****************************************************************'; \
	fi
	cd test && go test -race -count=1 -p 1 -timeout 30m ./...

cluster: ## a throwaway Kubernetes of one node, to try on it what the documents say; needs root on Linux
	cd test && go run ./cluster/up -containerd $(CONTAINERD)

e2e-k8s: ## on a real Kubernetes 1.36 of one node, containerd 2.4.2 and 2.3.7; needs root on Linux
	cd test && TIDEWAITER_TEST_KUBERNETES=1 go test -count=1 -p 1 -timeout 60m -v ./cluster ./deploy

e2e-all: ## the same on three versions and one older, and every failure 1,000 creations long; needs root and an hour
	cd test && TIDEWAITER_TEST_CONTAINERD='2.4.2 2.3.7 2.2.9 2.1.9' go test -race -count=1 -p 1 -timeout 60m ./node ./e2e
	cd test && TIDEWAITER_TEST_CONTAINERD='2.4.2 2.3.7 2.2.9' TIDEWAITER_TEST_CREATIONS=1000 go test -count=1 -v -timeout 90m ./failure

e2e-offline: ## 50 power cuts and every way to feed a node, on three versions; needs root and 40 minutes
	cd test && TIDEWAITER_TEST_CUTS=50 TIDEWAITER_TEST_CONTAINERD='2.4.2 2.3.7 2.2.9' go test -count=1 -v -timeout 90m ./offline

clean:
	rm -rf bin dist
