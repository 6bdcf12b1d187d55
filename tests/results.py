#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""results.py BUILD TESTLOG.JSON RESULTS: a line for each test of a `meson test`, its verdict into RESULTS."""
import json
import sys

VERDICTS = {"OK": "PASS", "EXPECTEDFAIL": "PASS", "SKIP": "SKIP"}


def main():
    build, log, results = sys.argv[1:4]
    with open(log, encoding="utf-8") as tests, open(results, "a", encoding="ascii") as out:
        for test in map(json.loads, tests):
            verdict = VERDICTS.get(test["result"], "FAIL")
            output = (test.get("stdout", "").strip() or test.get("stderr", "").strip()).splitlines()
            last = output[-1] if output else ""
            print(f"{verdict}  {build}: {test['name'].rpartition(':')[2].strip()} ({test['duration']:.1f} s)"
                  + (f": {last}" if verdict == "SKIP" else ""))
            if verdict == "FAIL":
                for line in output[-15:] + test.get("stderr", "").strip().splitlines()[-25:]:
                    print(f"      {line}")
            out.write(verdict + "\n")


if __name__ == "__main__":
    main()
