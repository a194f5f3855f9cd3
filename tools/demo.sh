#!/usr/bin/env bash
# Shows what Wrenn does, step by step, and cleans up after itself: demo.sh WRENN
set -euo pipefail
wrenn=${1:?usage: demo.sh WRENN}
if [ -t 1 ]; then bold=$'\e[1m' dim=$'\e[2m' off=$'\e[0m'; else bold='' dim='' off=''; fi
say() { printf '\n%s%s%s\n' "$bold" "$*" "$off"; }
run() { printf '%s$ %s%s\n' "$dim" "$*" "$off"; "$@"; }
now() { date +%s%N; }
since() { awk -v from="$1" -v to="$(now)" 'BEGIN { printf "%.1f s", (to - from) / 1e9 }'; }

dir=$(mktemp -d /tmp/wrenn-demo.XXXXXX)
cleanup() {
  if [ -n "${up:-}" ] && kill -0 "$up" 2>/dev/null; then kill -INT "$up"; wait "$up" || true; fi
  rm -rf "$dir"
}
trap cleanup EXIT

say "1. One command starts everything on this machine: API, database, networks, disks."
echo "   (The first time it also builds the guest kernel and the default template: about ten minutes on two cores.)"
began=$(now)
mkfifo "$dir/ready"
"$wrenn" up --json --dir "$dir/data" --listen 127.0.0.1:0 >"$dir/ready" &
up=$!
read -r ready <"$dir/ready" || { echo "wrenn up did not start" >&2; exit 1; }
WRENN_BASE_URL=$(jq -r .url <<<"$ready"); WRENN_API_KEY=$(jq -r .api_key <<<"$ready")
export WRENN_BASE_URL WRENN_API_KEY
echo "   ready after $(since "$began") at $WRENN_BASE_URL, with an API key of its own"

say "2. A capsule is a microVM: its own kernel, disk and network. This one boots now."
began=$(now)
id=$("$wrenn" capsule create --json | jq -r .id)
echo "   $id runs after $(since "$began")"

say "3. Code that nobody has reviewed runs inside, not here."
run "$wrenn" capsule exec "$id" -- python3 -c 'import platform, math; print("Python", platform.python_version(), "says", math.factorial(20))'
echo "   The kernel it sees:  $("$wrenn" capsule exec "$id" -- uname -r)"
echo "   The kernel out here: $(uname -r)"

say "4. A web page from inside, under a host name of its own."
"$wrenn" capsule exec "$id" -- /bin/sh -c 'mkdir /srv/site; echo "<h1>Hello from $(uname -r)</h1>" >/srv/site/index.html'
"$wrenn" capsule exec --background "$id" -- python3 -m http.server --directory /srv/site 8000 >"$dir/server"
url=$("$wrenn" capsule url "$id" 8000)
host=${url#http://}
echo "   $url"
run curl -s --retry 20 --retry-all-errors --retry-delay 1 --resolve "$host:127.0.0.1" --fail "$url/"

say "5. It is put on disk with its memory, and goes on where it was."
# A program that counts, with a secret that is nowhere but in its memory.
"$wrenn" capsule exec --background "$id" -- python3 -c '
import itertools, secrets, time
secret = secrets.token_hex(4)
for n in itertools.count():
    open("/tmp/said", "w").write(f"{secret}, counted to {n}")
    time.sleep(0.1)' >/dev/null
said() { "$wrenn" capsule exec "$1" -- python3 -c 'import time; time.sleep(0.5); print(open("/tmp/said").read())'; }
echo "   its secret:       $(said "$id")"
began=$(now)
"$wrenn" capsule pause "$id" >/dev/null
echo "   paused after $(since "$began"): no process of it is left on this machine"
began=$(now)
"$wrenn" capsule resume "$id" >/dev/null
echo "   resumed after $(since "$began")"
echo "   its secret:       $(said "$id")"
echo "   the page again:   $(curl -sS --resolve "$host:127.0.0.1" --fail "$url/")"

say "6. Two more begin from this very moment, processes and all, and go their own ways."
began=$(now)
mapfile -t forks < <("$wrenn" capsule fork --count 2 --json "$id" | jq -r '.[].id')
echo "   forked after $(since "$began")"
for fork in "${forks[@]}"; do
  echo "   $fork: $(said "$fork"); random: $("$wrenn" capsule exec "$fork" -- head -c 4 /dev/urandom | od -An -tx1)"
done

say "7. It may break everything: it is root there, and only there."
run "$wrenn" capsule exec "$id" -- /bin/sh -c 'rm -rf /usr/share /etc/passwd; echo "removed half of the system as $(whoami 2>/dev/null || id -u)"'
echo "   /etc/passwd out here still has $(wc -l </etc/passwd) lines."

say "8. The next capsule knows nothing of it. It begins where the boot of one ended that nobody ever used."
began=$(now)
second=$("$wrenn" capsule create --json | jq -r .id)
echo "   $second runs after $(since "$began"); its /etc/passwd has $("$wrenn" capsule exec "$second" -- wc -l /etc/passwd | cut -d' ' -f1) lines"

say "9. Gone without a trace."
run "$wrenn" capsule rm "$id" "$second" "${forks[@]}"
began=$(now)
kill -INT "$up"; wait "$up"
echo "   stopped after $(since "$began")"
if ip netns list | grep -q wrenn-ns; then echo "   (other capsules are still on this machine)"; else echo "   no namespace, process or mount is left"; fi

say "Your turn:"
echo "   sudo $wrenn up                       # then, from any language or shell:"
echo "   pip install wrenn && python -c 'from wrenn import Capsule; print(Capsule().commands.run(\"uname -a\").stdout)'"
