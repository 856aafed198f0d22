# Shared by scripts/up and scripts/test: a virtual environment in the checkout, made from a lock file with hashes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
say() { if [ -t 2 ]; then printf '\033[1m==>\033[0m %s\n' "$*" >&2; else printf '==> %s\n' "$*" >&2; fi; }
die() { printf 'error: %s\nhint: %s\n' "$1" "$2" >&2; exit 1; }

# The first Python on PATH that is new enough; BKPOOL_PYTHON names another.
find_python() {
  local candidate
  for candidate in ${BKPOOL_PYTHON:-} python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  die "no Python 3.11 or later with venv was found" "Install one (Debian: apt-get install python3 python3-venv) or set BKPOOL_PYTHON."
}

# use_environment LOCK: makes .venv with what LOCK pins, and bkpool from this checkout. If it is made already, this is fast.
use_environment() {
  local lock=$1 wanted
  wanted=$(cat "$lock" pyproject.toml scripts/lib.sh | sha256sum | cut -d' ' -f1)
  if [ "$(cat ".venv/.made-from-$lock" 2>/dev/null)" = "$wanted" ]; then return; fi
  say "Python environment: .venv from $lock"
  local python; python=$(find_python)
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r "$lock"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
  echo "$wanted" >".venv/.made-from-$lock"
}

# Installs Debian packages that are missing, if this user may. Elsewhere `bkpool doctor` names what is missing.
# usage: system_packages FILE_OF_THE_PACKAGE:PACKAGE...
system_packages() {
  local pair need=()
  for pair in "$@"; do [ -e "${pair%%:*}" ] || need+=("${pair#*:}"); done
  [ ${#need[@]} -gt 0 ] || return 0
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then return 0; fi
  say "Debian packages: ${need[*]}"
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${need[@]}" >/dev/null
}

# What is needed to build runc, if neither PATH nor a release has it.
runc_needs() {
  system_packages /usr/include/seccomp.h:libseccomp-dev /usr/bin/pkg-config:pkg-config /usr/bin/gcc:gcc /usr/include/stdlib.h:libc6-dev
}

# What gives each worker process a network of its own.
network_needs() {
  system_packages /usr/bin/pasta:passt /usr/sbin/nft:nftables
}

# The proxies that `nox -s bench` compares the gateway with. Debian's packages start them as services; this stops them.
bench_peers() {
  local peer new=()
  for peer in nginx haproxy; do [ -e "/usr/sbin/$peer" ] || new+=("$peer"); done
  system_packages /usr/sbin/nginx:nginx /usr/lib/nginx/modules/ngx_stream_module.so:libnginx-mod-stream /usr/sbin/haproxy:haproxy
  if [ "$(id -u)" = 0 ] && [ -d /run/systemd/system ] && [ ${#new[@]} -gt 0 ]; then systemctl disable --quiet --now "${new[@]}"; fi
}

# promtool checks docs/observability. On Debian it is in the package of a daemon: only this program is unpacked, and the
# package is not installed. Elsewhere promtool is taken from PATH.
promtool_alone() {
  local target draft
  target=$(.venv/bin/python -c 'from bkpool.toolchain import default_cache; print(default_cache() / "e2e" / "promtool")')
  if [ -x "$target" ] || command -v promtool >/dev/null || ! command -v apt-get >/dev/null; then return 0; fi
  say "promtool, from Debian's package prometheus"
  draft=$(mktemp -d)
  [ "$(id -u)" != 0 ] || apt-get update -qq
  (cd "$draft" && apt-get -o APT::Sandbox::User=root -qq download prometheus && dpkg-deb -x prometheus_*.deb .) &&
    install -D "$draft/usr/bin/promtool" "$target" || say "promtool could not be downloaded"
  rm -rf "$draft"
}
