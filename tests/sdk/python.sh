#!/usr/bin/env bash
# Runs Python with the published SDKs: python.sh CACHE_DIR [python arguments…]
# The wrenn package needs Python 3.13. One that is on this machine serves; where there is none, Debian trixie's is put
# into a directory of the cache and run there by chroot (the network is the host's, and this checkout is mounted in).
set -euo pipefail
cache=${1:?usage: python.sh CACHE_DIR [python arguments…]}; shift
here=$(cd "$(dirname "$0")" && pwd)
key=$(sha256sum <"$here/requirements.txt" | cut -c1-12)
mkdir -p "$cache"

find_python() {
  local candidate
  for candidate in "$(command -v python3.13 || true)" "$HOME"/.pyenv/versions/3.13*/bin/python3.13; do
    if [ -x "$candidate" ] && "$candidate" -c 'import ensurepip, ssl, sqlite3' 2>/dev/null; then echo "$candidate"; return; fi
  done
}

python=$([ -n "${NO_HOST_PYTHON:-}" ] || find_python)
if [ -n "$python" ]; then
  venv=$cache/sdk-$key
  if [ ! -e "$venv/ready" ]; then
    rm -rf "$venv"; "$python" -m venv "$venv"
    "$venv/bin/pip" install -q -r "$here/requirements.txt" >&2
    touch "$venv/ready"
  fi
  exec "$venv/bin/python" "$@"
fi

root=$cache/trixie-$key
if [ ! -e "$root/ready" ]; then
  command -v mmdebstrap >/dev/null || { apt-get update -q >&2; apt-get install -qy --no-install-recommends mmdebstrap >&2; }
  rm -rf "$root"
  mmdebstrap --quiet --mode=root --variant=minbase --include=python3,python3-venv,ca-certificates trixie "$root" http://deb.debian.org/debian >&2
  python3=/opt/sdk/bin/python3
  chroot "$root" python3 -m venv /opt/sdk
  cp "$here/requirements.txt" "$root/tmp/"
  # Whom the host trusts, its registries need (a company's proxy has a certificate of its own).
  cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
  chroot "$root" "$python3" -m pip install -q -r /tmp/requirements.txt >&2
  touch "$root/ready"
fi
# A mount namespace of its own: the mounts go with the process.
exec unshare --mount --propagation private bash -c '
  root=$1 here=$2; shift 2
  mount --bind /proc "$root/proc"; mount --bind /dev "$root/dev"; mkdir -p "$root$here"; mount --bind "$here" "$root$here"
  cp /etc/resolv.conf /etc/hosts "$root/etc/"
  exec chroot "$root" /opt/sdk/bin/python3 "$@"' bash "$root" "$here" "$@"
