#!/bin/bash
# A walk through TierFS in a minute: everything happens in a directory of its own, which is removed at the end.
set -euo pipefail
cd "$(dirname "$0")/.."
tierfs="$PWD/.venv/bin/tierfs"
work="$(mktemp -d /tmp/tierfs-demo-XXXXXX)"
mnt="$work/files"
home="$work/home"
state="$work/state"
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
fail() { echo "demo: $*" >&2; exit 1; }
finish() {
    status=$?
    for place in "$mnt" "$home"; do
        if mountpoint -q "$place" 2>/dev/null; then "$tierfs" umount "$place" || true; fi
        if mountpoint -q "$place" 2>/dev/null; then umount -l "$place" 2>/dev/null || fusermount3 -uz "$place" || true; fi
    done
    rm -rf --one-file-system "$work"
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM
chmod 755 "$work"
mkdir "$mnt" "$work/plain"

say "Mount: no account, no configuration"
time "$tierfs" mount --state "$state" "$mnt"

say "Work in it: a source tree, a C program, a git repository, an SQLite database, a big file"
python_lib="$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
for place in "$mnt" "$work/plain"; do
    cp -a "$python_lib/json" "$python_lib/email" "$python_lib/asyncio" "$place/"
    find "$place" -name __pycache__ -prune -exec rm -rf {} +
    printf '#include <stdio.h>\nint main(void) { puts("hello from a stub"); }\n' > "$place/hello.c"
    head -c 100M < <(yes "$(seq -s ' ' 1000)") > "$place/big.txt"
done
( cd "$mnt" && gcc -o hello hello.c && ./hello && cp -a hello "$work/plain/" )
( cd "$mnt" && git init -q . && git add -A && git -c user.name=demo -c user.email=demo@localhost commit -qm demo )
sqlite3 "$mnt/notes.db" 'pragma journal_mode=wal; create table notes(text); insert into notes values("kept");' > /dev/null
"$tierfs" pin "$mnt/hello.c"

say "Demote everything that may go"
"$tierfs" demote --wait "$mnt" || true
"$tierfs" ls "$mnt"
echo "on the local disk: $(du -sh "$state/tree" | cut -f1); seen through the mount: $(du -sh --apparent-size "$mnt" | cut -f1)"
[ "$("$tierfs" status --json "$mnt/big.txt" | python3 -c 'import json, sys; print(json.load(sys.stdin)["tier"])')" = stub ] ||
    fail "big.txt was not demoted"

say "git sees no difference, and reads nothing back"
( cd "$mnt" && git status --short | grep -v notes.db || true )

say "Reading brings it back"
time head -c 4096 "$mnt/big.txt" > /dev/null
"$mnt/hello"
[ "$(sqlite3 "$mnt/notes.db" 'select text from notes')" = kept ] || fail "the database is damaged"
for name in json email asyncio hello hello.c big.txt; do
    diff -r --no-dereference -x __pycache__ "$work/plain/$name" "$mnt/$name" || fail "$name differs"
done
echo "every byte is the same"
"$tierfs" status "$mnt"

say "Unmount, mount again: all is there"
"$tierfs" umount --wait "$mnt"
"$tierfs" mount --state "$state" "$mnt"
cmp "$mnt/big.txt" "$work/plain/big.txt"
"$tierfs" umount "$mnt"

say "Adopt a directory by one rename, and give it back"
cp -a "$work/plain" "$home"
"$tierfs" adopt "$home"
"$tierfs" demote --wait "$home/big.txt"
"$tierfs" ls "$home"
"$tierfs" leave "$home"
mountpoint -q "$home" && fail "still mounted"
diff -r --no-dereference "$work/plain" "$home" || fail "the directory came back different"
echo "a plain directory again"
say "Done"
