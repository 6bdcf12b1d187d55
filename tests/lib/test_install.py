# SPDX-License-Identifier: LGPL-2.1-or-later
"""Install the tree somewhere and build a program of somebody else's against it, as C and as C++.

    test_install.py BUILD CONSUMER.c VERSION
"""
import os
import shutil
import subprocess
import sys
import tempfile


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def main():
    build, consumer, version = sys.argv[1:]
    for tool in ("pkg-config", "cc"):
        if not shutil.which(tool):
            print(f"skipped: there is no {tool}")
            sys.exit(77)
    with tempfile.TemporaryDirectory(prefix="memferry-install-") as root:
        run("meson", "install", "-C", build, "--no-rebuild", "--destdir", root)
        found = [d for d, _, files in os.walk(root) if "libmemferry.pc" in files]
        if len(found) != 1:
            sys.exit(f"libmemferry.pc was installed {len(found)} times")
        environment = dict(os.environ, PKG_CONFIG_PATH=found[0], PKG_CONFIG_SYSROOT_DIR=root,
                           PKG_CONFIG_ALLOW_SYSTEM_CFLAGS="1", PKG_CONFIG_ALLOW_SYSTEM_LIBS="1")
        said = run("pkg-config", "--modversion", "libmemferry", env=environment).strip()
        if said != version:
            sys.exit(f"libmemferry.pc says version {said}, not {version}")
        private = run("pkg-config", "--print-requires-private", "libmemferry", env=environment).split()
        if private:
            sys.exit(f"libmemferry.pc wants {private} installed, which a user of the library does not need")
        flags = run("pkg-config", "--cflags", "--libs", "libmemferry", env=environment).split()
        libraries = os.path.dirname(found[0])
        for compiler, language in (("cc", "-std=c11"), ("c++", "-xc++")):
            if not shutil.which(compiler):
                continue
            program = os.path.join(root, "consumer-" + compiler)
            # C++ has no designators out of order and no implicit conversions: the header alone must do.
            source = consumer
            if compiler == "c++":
                source = os.path.join(root, "header.cc")
                with open(source, "w", encoding="ascii") as f:
                    f.write("#include <memferry.h>\nint main() { return *memferry_why() != 0; }\n")
            run(compiler, language, "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-o", program, source, *flags,
                env=environment)
            told = run(program, env=dict(os.environ, LD_LIBRARY_PATH=libraries)).strip()
            if compiler == "cc" and told != version:
                sys.exit(f"the library says version {told}, not {version}")


main()
