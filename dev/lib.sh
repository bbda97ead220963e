# shellcheck shell=bash disable=SC2034
# What the scripts in dev/ share: where things are kept, how to talk, how to fail, free ports.
# Sourced, never run. Talk goes to stderr: stdout belongs to what a script answers.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${CARGO_TARGET_DIR:-$repo/target}/devcluster # what takes minutes to make
state=${LANDFALL_STATE:-$repo/.landfall}           # what belongs to this checkout

say() { echo "$*" >&2; }

# fail WHAT [NEXT]: what happened, what to do about it, exit 1.
fail() {
    say "$(basename "$0"): $1"
    [ $# -lt 2 ] || say "  next: $2"
    exit 1
}

# fail_with_log WHAT FILE [NEXT]: as fail, with the end of the log that explains it.
fail_with_log() {
    say "--- the end of $2"
    tail -n 15 "$2" >&2 || true
    say "---"
    fail "$1" "${3:-the whole log is $2}"
}

have() { command -v "$1" > /dev/null; }
is_root() { [ "$(id -u)" = 0 ]; }
has_image() { docker image inspect "$1" > /dev/null 2>&1; }
docker_answers() { timeout 10 docker version --format '{{.Server.Version}}' 2> /dev/null; }

# install PACKAGE...: by apt where we are root, else says what to install. No server among them is started, but for Docker's:
# tests start their own, on 127.0.0.1.
install() {
    is_root && have apt-get || fail "missing: $*" "install it ($*) and run this again"
    say "Installing $* ..."
    local log=$cache/apt.log
    mkdir -p "$cache"
    (apt_get "$@") > "$log" 2>&1 || fail_with_log "apt-get cannot install $*" "$log"
}

# In a shell of its own, whose end, also by Ctrl-C, takes Debian's way of forbidding starts away again.
apt_get() {
    policy=/usr/sbin/policy-rc.d
    if [ "$*" != docker.io ] && [ ! -e "$policy" ]; then
        trap 'rm -f "$policy"' EXIT
        trap 'exit 130' INT TERM
        printf '#!/bin/sh\nexit 101\n' > "$policy" && chmod +x "$policy"
    fi
    apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"
}

readonly rust_version_min=1.94 go_version_min=1.25

# What listens on this machine is asked without the proxy.
no_proxy=${no_proxy:-${NO_PROXY:-}}
no_proxy=127.0.0.1,localhost${no_proxy:+,$no_proxy}
export no_proxy NO_PROXY=$no_proxy

# Otherwise a program that ends well at Ctrl-C would let its script go on.
trap 'exit 130' INT

# The compilers, and what they need besides; a fresh machine has the former.
need_compilers() {
    have cargo || fail "Rust is missing" "install Rust $rust_version_min or later from https://rustup.rs"
    local version
    version=$(rustc --version | cut -d' ' -f2)
    printf '%s\n%s\n' "$rust_version_min" "$version" | sort -V -C || fail "Rust $version is too old" "rustup update, or install Rust $rust_version_min or later"
    have go || fail "Go is missing" "install Go $go_version_min or later from https://go.dev/dl/ and put its bin folder on PATH"
    version=$(go env GOVERSION)
    printf '%s\n%s\n' "$go_version_min" "${version#go}" | sort -V -C || fail "Go ${version#go} is too old" "install Go $go_version_min or later from https://go.dev/dl/"
    have cc || install build-essential
    have pkg-config || install pkg-config
    pkg-config --exists openssl || install libssl-dev
}

# need_free_port PORT VARIABLE: fails where something listens on 127.0.0.1:PORT, and names the variable that moves it.
need_free_port() {
    if (exec 3<> "/dev/tcp/127.0.0.1/$1") 2> /dev/null; then
        fail "port $1 on 127.0.0.1 is in use" "end what listens there, or move ours: $2=<another port>"
    fi
}

# Microseconds since 1970.
now() { echo "${EPOCHREALTIME/[.,]/}"; }

# serve WORK PORT: starts `$bin/landfall serve` on WORK/agent.yaml and waits until it is ready; its process is then $agent, and in $pids.
serve() {
    RUST_LOG=warn "$bin/landfall" serve --config "$1/agent.yaml" >> "$1/agent.log" 2>&1 < /dev/null &
    agent=$!
    pids+=("$agent")
    until curl -fs -o /dev/null "http://127.0.0.1:$2/readyz"; do kill -0 "$agent"; done
}

declare -gA begun=() # name → pid

# begin NAME COMMAND...: runs it beside what follows, for what computes while others wait for the network; `finish NAME` waits
# for it, says that it goes on, and shows the end of its log where it failed.
begin() {
    local name=$1
    shift
    mkdir -p "$cache"
    # A process group of its own: what it has started ends with it, also at Ctrl-C.
    set -m
    "$@" > "$cache/$name.log" 2>&1 < /dev/null &
    begun[$name]=$!
    set +m
    trap 'for pid in "${begun[@]}"; do kill -- "-$pid" 2> /dev/null || true; done' EXIT
}

finish() {
    local name=$1 pid=${begun[$1]} began=$SECONDS
    while kill -0 "$pid" 2> /dev/null; do
        sleep 0.5
        if ((SECONDS - began >= 30)); then
            say "  $name: $(tail -n 1 "$cache/$name.log")"
            began=$SECONDS
        fi
    done
    wait "$pid" || fail_with_log "$name failed" "$cache/$name.log"
    unset "begun[$name]"
}
