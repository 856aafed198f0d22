# Shared by the scripts of this directory (source it): versions, where things are kept, and `step`.
. "$(dirname "${BASH_SOURCE[0]}")/../../scripts/lib.sh"  # strict mode; now in the checkout's top directory
HERE=$PWD/e2e/airgap

K8S_VERSION=v1.34.4       # the last minor whose kubelet takes cgroup v1 without being told to
ETCD_VERSION=v3.6.5       # this and the next: what kubeadm of that version asks for
COREDNS_VERSION=v1.12.1
CONTAINERD_VERSION=v2.1.5
CNI_VERSION=v1.8.0
LOCALPATH_VERSION=v0.0.30
DEBIAN_SUITE=bookworm
NODE_IMAGE=bkpool/node:$K8S_VERSION
BUILDKIT_IMAGE=bkpool/buildkit:1-rootless

PATH=$PATH:/usr/sbin:/sbin
command -v go >/dev/null || PATH=$PATH:/usr/local/go/bin
export GOFLAGS=-buildvcs=false

[ -x .venv/bin/bkpool ] || use_environment requirements-dev.lock
python() { .venv/bin/python "$@"; }
KIND_VERSION=v$(python -c 'from bkpool.toolchain.table import Tool, release_of; print(release_of(Tool.KIND).version)')
CACHE=$(python -c 'from bkpool.toolchain import default_cache; print(default_cache() / "airgap")')
BIN=$CACHE/bin            # programs
SRC=$CACHE/src            # writable copies of modules' sources
STAMP=$CACHE/stamp        # a file for each step that is done; its name has the version
IMG=$CACHE/img            # image archives
LOG=$CACHE/log
RUN=$CACHE/run            # pid and log of an engine that we started
BASE=$CACHE/rootfs-base-$DEBIAN_SUITE      # the Debian tree that node and BuildKit images start from
PYTHON_TREE=$CACHE/rootfs-python-$DEBIAN_SUITE
mkdir -p "$BIN" "$SRC" "$STAMP" "$IMG" "$LOG" "$RUN"

# step NAME FUNCTION...: runs it once, in a process of its own (a caller's `||` would switch set -e off inside it)
step() {
  local name=$1 since=$SECONDS
  shift
  if [ -e "$STAMP/$name" ]; then return; fi
  if ! "$BASH" "$HERE/$(basename "$0")" --run "$@" >"$LOG/$name.log" 2>&1; then
    tail -n 25 "$LOG/$name.log" >&2
    die "$name failed after $((SECONDS - since)) s" "All of its output: $LOG/$name.log"
  fi
  say "$name: $((SECONDS - since)) s"
  : >"$STAMP/$name"
}

# module_source MODULE VERSION: a writable copy of a Go module's tree; prints its directory
module_source() {
  local directory copy=$SRC/${1//\//_}@$2
  if [ ! -d "$copy" ]; then
    directory=$(cd "$SRC" && GOFLAGS=-mod=mod go mod download -json "$1@$2" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p')
    [ -n "$directory" ] || die "there is no Go module $1@$2" "See go env GOPROXY."
    rm -rf "$copy.new"
    cp -r "$directory" "$copy.new"
    chmod -R u+w "$copy.new"
    rm -rf "$copy.new/vendor" "$copy.new"/go.work*
    mv "$copy.new" "$copy"
  fi
  echo "$copy"
}

# pick DESTINATION PROGRAM...: programs of the base tree, with the libraries that they load
pick() {
  local destination=$1 program file
  shift
  for program in "$@"; do
    for file in "$program" $(chroot "$BASE" ldd "$program" 2>/dev/null | sed -n 's/.*=> \(\/[^ ]*\).*/\1/p; s/^\t\(\/[^ ]*\) (.*/\1/p'); do
      mkdir -p "$destination$(dirname "$file")"
      [ -e "$destination$file" ] || cp -L "$BASE$file" "$destination$file"
    done
  done
}

# skeleton DIRECTORY: an empty tree with a merged /usr and sh
skeleton() {
  local name
  mkdir -p "$1"/usr/{bin,sbin,lib,lib64}
  for name in bin sbin lib lib64; do ln -s "usr/$name" "$1/$name"; done
  pick "$1" /usr/bin/dash
  ln -s dash "$1/usr/bin/sh"
}

image() { python "$HERE/image.py" "$@"; }

if [ "${1:-}" = --run ]; then RUN_ONLY=1; shift; else RUN_ONLY=; fi
