# SPDX-License-Identifier: LGPL-2.1-or-later
"""A test is a function marked with @e2e; run_one() gives it a sandbox, a time limit and an exit code."""
import os
import shutil
import signal
import sys
import traceback

from .sandbox import HarnessError, Sandbox, Skip

PASSED, FAILED, SKIPPED = 0, 1, 77

tests = {}


def e2e(limit_s=90):
    """Mark a test; it must be over in limit_s seconds."""
    def mark(function):
        function.limit_s = limit_s
        tests[function.__name__] = function
        return function
    return mark


class _Interrupted(BaseException):
    """A signal asks for the end; not an Exception, so that no test swallows it."""


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM)


def _raise_interrupted(number, _frame):
    # Once: what follows is the clean-up.
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise _Interrupted(signal.Signals(number).name)


def _keep_logs(sandbox, name):
    """After a failure: the daemons' and QEMU's last words, to stderr and where MEMFERRY_TEST_LOGS says."""
    directory = os.environ.get("MEMFERRY_TEST_LOGS")
    for root, _, files in os.walk(sandbox.path):
        for file in sorted(files):
            if not file.endswith(".log"):
                continue
            path = os.path.join(root, file)
            with open(path, encoding="utf-8", errors="replace") as log:
                text = log.read()
            if text.strip():
                print(f"---- {os.path.relpath(path, sandbox.path)}\n{text[-4000:]}", file=sys.stderr)
            if directory:
                os.makedirs(os.path.join(directory, name), exist_ok=True)
                shutil.copy(path, os.path.join(
                    directory, name, os.path.relpath(path, sandbox.path).replace("/", "-")))


def run_one(name):
    """Run a test by name. Return: the exit code for meson (0 passed, 1 failed, 77 skipped)."""
    function = tests[name]
    for number in SIGNALS:
        signal.signal(number, _raise_interrupted)
    signal.alarm(function.limit_s)
    try:
        with Sandbox() as sandbox:
            try:
                function(sandbox)
            except Skip:
                raise
            except BaseException:
                signal.alarm(0)
                traceback.print_exc()
                _keep_logs(sandbox, name)
                raise
            finally:
                signal.alarm(0)
        print(f"{name}: passed")
        return PASSED
    except Skip as reason:
        print(f"{name}: skipped: {reason}")
        return SKIPPED
    except _Interrupted as reason:
        limit = f"not over within {function.limit_s} s" if str(reason) == "SIGALRM" else f"ended by {reason}"
        print(f"{name}: failed: {limit}")
    except HarnessError as reason:
        print(f"{name}: failed: {reason}")
    except Exception as reason:  # noqa: whatever it is, the test failed
        print(f"{name}: failed: {type(reason).__name__}: {reason}")
    return FAILED
