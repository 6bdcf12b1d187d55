#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run one end-to-end test by name (as meson does), or list them."""
import sys

import test_daemon  # noqa: F401 (importing a module registers its tests)
import test_faults  # noqa: F401
import test_kernels  # noqa: F401
import test_loop  # noqa: F401
import test_memory  # noqa: F401
import test_migrate  # noqa: F401
import test_monitor  # noqa: F401
import test_pins  # noqa: F401
import test_precopy  # noqa: F401
import test_preflight  # noqa: F401
import test_private  # noqa: F401
import test_process  # noqa: F401
import test_systemd  # noqa: F401
from harness.testing import run_one, tests

def main():
    if len(sys.argv) != 2 or sys.argv[1] not in [*tests, "--list"]:
        sys.exit(f"usage: run_test.py --list | NAME, one of: {' '.join(tests)}")
    if sys.argv[1] == "--list":
        for name, function in tests.items():
            print(f"{name:40} {(function.__doc__ or '').strip().partition(chr(10))[0]}")
        return 0
    return run_one(sys.argv[1])


if __name__ == "__main__":
    sys.exit(main())
