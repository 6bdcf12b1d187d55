#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""check_facts.py SOURCE_ROOT: doc/kernel.md and the tests in tests/kernel name the same facts."""
import glob
import os
import re
import sys


def tested(root):
    """The name of each test, and whether it is a fact, which has to have a row."""
    found = {}
    for path in glob.glob(os.path.join(root, "tests", "kernel", "*.c")):
        with open(path, encoding="utf-8") as source:
            text = source.read()
        for name in re.findall(r"\bcmocka_unit_test\w*\(\s*(\w+)", text):
            found.setdefault(name, False)
        for name in re.findall(r"\bFACT\w*\(\s*(\w+)", text):
            found[name] = True
    return found


def written(root):
    """The names in the tables, each of which has to have a test."""
    names = []
    with open(os.path.join(root, "doc", "kernel.md"), encoding="utf-8") as page:
        for line in page:
            cell = re.search(r"\| `([a-z]\w*_\w*)`(?: \(`\w+\.c`\))? \|$", line.strip())
            if cell:
                names.append(cell[1])
    return names


def main():
    tests, rows = tested(sys.argv[1]), written(sys.argv[1])
    wrong = [f"doc/kernel.md: no test is named {name}" for name in rows if name not in tests]
    wrong += [f"doc/kernel.md: has no row of the test {name}"
              for name, fact in sorted(tests.items()) if fact and name not in rows]
    wrong += [f"doc/kernel.md: has more than one row of {name}"
              for name in sorted(set(rows)) if rows.count(name) > 1]
    if not rows or not any(tests.values()):
        wrong.append("doc/kernel.md: the tables or the tests are not where they were")
    print("\n".join(wrong) or f"{len(rows)} facts, each with its test")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
