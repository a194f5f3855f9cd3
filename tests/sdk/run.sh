#!/usr/bin/env bash
# Runs Python or Node with the published SDKs: run.sh CACHE_DIR python|node [arguments…]
# The wrenn package needs Python 3.13 and the e2b package Node 20.18 or later. Python that is on this machine serves; where
# there is none, Debian trixie's is put into a directory of the cache and run there by chroot (the network is the host's,
# and this checkout is mounted in). Node comes as a Python package, in the same place.
set -euo pipefail
# Which would be left in /tmp.
export NODE_DISABLE_COMPILE_CACHE=1
cache=${1:?usage: run.sh CACHE_DIR python|node [arguments…]}; program=${2:?python or node}; shift 2
here=$(cd "$(dirname "$0")" && pwd)
key=$(cat "$here/requirements.txt" "$here/package.json" "$here/package-lock.json" | sha256sum | cut -c1-12)
mkdir -p "$cache"
# Tests that start at once would install twice.
exec 9>"$cache/.lock"; flock 9

find_python() {
  local candidate
  for candidate in "$(command -v python3.13 || true)" "$HOME"/.pyenv/versions/3.13*/bin/python3.13; do
    if [ -x "$candidate" ] && "$candidate" -c 'import ensurepip, ssl, sqlite3' 2>/dev/null; then echo "$candidate"; return; fi
  done
}

python=$([ -n "${NO_HOST_PYTHON:-}" ] || find_python)
if [ -n "$python" ]; then
  sdk=$cache/sdk-$key
  if [ ! -e "$sdk/ready" ]; then
    rm -rf "$sdk"; "$python" -m venv "$sdk"
    "$sdk/bin/pip" install -q -r "$here/requirements.txt" >&2
    cp "$here"/package*.json "$sdk/"
    PATH=$sdk/bin:$PATH "$sdk/bin/npm" ci --prefix "$sdk" --ignore-scripts --no-audit --no-fund --silent >&2
    touch "$sdk/ready"
  fi
  flock -u 9
  NODE_PATH=$sdk/node_modules exec "$sdk/bin/$program" "$@" 9>&-
fi

root=$cache/trixie-$key
sdk=/opt/sdk
if [ ! -e "$root/ready" ]; then
  command -v mmdebstrap >/dev/null || { apt-get update -q >&2; apt-get install -qy --no-install-recommends mmdebstrap >&2; }
  rm -rf "$root"
  mmdebstrap --quiet --mode=root --variant=minbase --include=python3,python3-venv,ca-certificates trixie "$root" http://deb.debian.org/debian >&2
  chroot "$root" python3 -m venv "$sdk"
  cp "$here/requirements.txt" "$here"/package*.json "$root$sdk/"
  # Whom the host trusts, its registries need (a company's proxy has a certificate of its own).
  cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
  cp /etc/resolv.conf /etc/hosts "$root/etc/"
  chroot "$root" "$sdk/bin/pip" install -q -r "$sdk/requirements.txt" >&2
  PATH=$sdk/bin:$PATH NODE_EXTRA_CA_CERTS=/etc/ssl/certs/ca-certificates.crt \
    chroot "$root" "$sdk/bin/npm" ci --prefix "$sdk" --ignore-scripts --no-audit --no-fund --silent >&2
  touch "$root/ready"
fi
flock -u 9
# A mount namespace of its own: the mounts go with the process.
NODE_PATH=$sdk/node_modules exec unshare --mount --propagation private bash -c '
  root=$1 here=$2; shift 2
  mount --bind /proc "$root/proc"; mount --bind /dev "$root/dev"; mkdir -p "$root$here"; mount --bind "$here" "$root$here"
  cp /etc/resolv.conf /etc/hosts "$root/etc/"
  exec chroot "$root" "$@"' bash "$root" "$here" "$sdk/bin/$program" "$@" 9>&-
