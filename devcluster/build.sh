#!/usr/bin/env bash
# Makes sure of the node's image and prints its name, landfall.local/devcluster:HASH (talk goes to stderr).
# HASH is of all that this folder holds: an image that is there is never built again.
# The Go programs are kept in the cache folder; DEBIAN_IMAGE overrides the base image.
set -euo pipefail
. "$(dirname "$0")/../dev/lib.sh"

readonly kubernetes=1.34.4 # the others by go.mod
readonly here=$repo/devcluster

main() {
    local image
    image=landfall.local/devcluster:$(hash_of_inputs)
    if ! has_image "$image"; then
        mkdir -p "$cache"
        exec 8> "$cache/build.lock"
        flock 8 # demo and test may be started side by side
        if ! has_image "$image"; then
            build_programs
            build_image "$image"
        fi
    fi
    echo "$image"
}

hash_of_inputs() {
    (cd "$here" && find . -type f ! -name '*.md' | LC_ALL=C sort | xargs sha256sum) | sha256sum | cut -c1-12
}

build_programs() {
    have go || fail "Go is missing: the embedded cluster is built from source" "install Go 1.25 or later from https://go.dev/dl/ and put its bin folder on PATH"
    # A compiler that seldom collects its garbage is done an eighth sooner, for half a gigabyte more.
    export CGO_ENABLED=0 GOWORK=off GOFLAGS=-buildvcs=false GOGC=400
    local version=k8s.io/component-base/version
    local flags="-s -w -X $version.gitVersion=v$kubernetes -X $version.gitMajor=1 -X $version.gitMinor=$(cut -d. -f2 <<< $kubernetes)"
    cd "$here"
    build kubeall "kubernetes $kubernetes $(cat go.mod go.sum main.go | sha256sum)" build -trimpath -o "$cache/kubeall" -ldflags "$flags" .
    build kubectl "kubernetes $kubernetes $(cat go.mod go.sum kubectl/main.go | sha256sum)" build -trimpath -o "$cache/kubectl" -ldflags "$flags" ./kubectl
    build pause "$(sha256sum < pause/main.go)" build -trimpath -o "$cache/pause" -ldflags '-s -w' ./pause
}

# build NAME VERSION GO_ARGUMENTS...: unless NAME of that version is in the cache.
build() {
    local name=$1 version=$2 began=$SECONDS log=$cache/$1.log
    shift 2
    [ -x "$cache/$name" ] && [ "$(cat "$cache/$name.version" 2> /dev/null)" = "$version" ] && return
    rm -f "$cache/$name.version"
    say "Building $name (minutes the first time, seconds from Go's cache)"
    nice -n 5 go "$@" > "$log" 2>&1 &
    local pid=$!
    while kill -0 $pid 2> /dev/null; do
        sleep 1
        (((SECONDS - began) % 30)) || say "  $name: $((SECONDS - began)) s"
    done
    wait $pid || fail_with_log "cannot build $name" "$log"
    echo "$version" > "$cache/$name.version"
    say "Built $name in $((SECONDS - began)) s"
}

build_image() {
    local began=$SECONDS log=$cache/image.log context=$cache/context base=${DEBIAN_IMAGE:-} program
    say "Building the node's image $1"
    [ -n "$base" ] || base=$("$repo/dev/setup" base-images debian | sed -n 's/^DEBIAN_IMAGE=//p')
    rm -rf "$context"
    mkdir -p "$context"
    cp "$here"/{Dockerfile,*.yaml,*.yml,*.toml,*.conflist,Corefile,entry.sh} "$context"
    for program in kubeall kubectl pause; do
        ln "$cache/$program" "$context/$program"
    done
    {
        tar -C "$context" -c Dockerfile pause | docker build --target pause -t landfall.local/pause:dev - &&
            docker save landfall.local/pause:dev > "$context/pause.tar" &&
            docker build --target node ${base:+--build-arg "DEBIAN_IMAGE=$base"} -t "$1" "$context"
    } > "$log" 2>&1 || fail_with_log "cannot build the node's image" "$log"
    rm -rf "$context"
    say "Built the node's image in $((SECONDS - began)) s"
}

main
