#!/bin/bash
# The compiled part built with the compiler's sanitizers, and tests through it: `make sanitize`. Takes ten times as long.
# Arguments: the tests; without, those of the compiled part and of mounts that are hard on it.
set -u
cd "$(dirname "$0")/.."
python=.venv/bin/python
reports=$(mktemp -d -t tierfs-sanitize-XXXXXX)
chmod 1777 "$reports" # servers of users write theirs
# Without the sanitizers' libraries in front it would end any program that loads it.
trap '$python setup.py -q build_ext --inplace' EXIT
export CFLAGS="-fsanitize=address,undefined -fno-omit-frame-pointer -g"
$python setup.py -q build_ext --inplace || exit 1
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export PYTHONMALLOC=malloc # so that each object has its own place, and is missed when it is gone
# Python leaves much to the end of the process, which is no leak of ours.
export ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=1:quarantine_size_mb=16:log_path=$reports/address"
export UBSAN_OPTIONS="print_stacktrace=1:log_path=$reports/undefined"
[ $# -gt 0 ] || set -- tests/unit/test_hot*.py tests/unit/test_watching.py tests/mount/test_{storm,takeover}*.py \
    tests/mount/test_{kernel_session,restart,behind}.py
.venv/bin/pytest -q -m 'not soak' -n 2 --dist loadfile --timeout 900 "$@"
status=$?
unset CFLAGS LD_PRELOAD
if [ -n "$(ls "$reports")" ]; then
    cat "$reports"/*
    status=1
else
    echo "the sanitizers have nothing to report"
fi
rm -rf "$reports"
exit $status
