# SPDX-License-Identifier: LGPL-2.1-or-later
"""What libmemferry.so exports, against the list of what it has promised, and against its header.

    test_symbols.py LIBRARY HEADER LIST
"""
import re
import subprocess
import sys


def main():
    library, header, listed = sys.argv[1:]
    nm = subprocess.run(["nm", "-D", "--defined-only", "--with-symbol-versions", library], capture_output=True,
                        text=True, check=True).stdout
    exported = {line.split()[2] for line in nm.splitlines() if line.split()[1] != "A"}
    with open(listed, encoding="utf-8") as f:
        promised = {line.strip() for line in f if line.strip() and not line.startswith("#")}
    with open(header, encoding="utf-8") as f:
        text = re.sub(r"/\*.*?\*/", "", f.read(), flags=re.S)
    declared = set(re.findall(r"^[a-z].*?\b(memferry_\w+)\(", text, flags=re.M))
    names = {symbol.split("@")[0] for symbol in promised}
    trouble = [f"no longer exported: {s}" for s in sorted(promised - exported)]
    trouble += [f"exported but not promised: {s}" for s in sorted(exported - promised)]
    trouble += [f"in the header but not promised: {s}" for s in sorted(declared - names)]
    trouble += [f"promised but not in the header: {s}" for s in sorted(names - declared)]
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    if "[libmemferry.so.0]" not in dynamic:
        trouble.append("its SONAME is not libmemferry.so.0")
    if trouble:
        sys.exit("\n".join(trouble))


main()
