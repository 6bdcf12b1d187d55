# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run the examples; they check themselves.

    test_examples.py LAZY_RESTORE COMPACTING_HEAP
"""
import os
import subprocess
import sys
import tempfile


def run(*command, fails=False):
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    if (done.returncode != 0) != fails:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}")
    return done.stdout


def main():
    lazy_restore, compacting_heap = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="memferry-example-") as room:
        snapshot = os.path.join(room, "snapshot")
        run(lazy_restore, "save", snapshot, "12")
        if "every page is right" not in run(lazy_restore, "run", snapshot):
            sys.exit("lazy-restore run did not say that every page is right")
        # It must notice a page that is not: a word of the table, then one of the heap.
        for at in (4096 + (12 << 20) + 8 * 4096, 4096 + 5 * 4096 + 16):
            with open(snapshot, "r+b") as f:
                f.seek(at)
                was = f.read(1)
                f.seek(at)
                f.write(bytes([was[0] ^ 1]))
            run(lazy_restore, "run", snapshot, fails=True)
            with open(snapshot, "r+b") as f:
                f.seek(at)
                f.write(was)
        run(lazy_restore, "run", snapshot)
        run(lazy_restore, "run", "/dev/null", fails=True)
    if "roots are right" not in run(compacting_heap, "12", "4"):
        sys.exit("compacting-heap did not say that its roots are right")
    run(compacting_heap, "3", "1")


main()
