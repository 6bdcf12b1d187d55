# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What the tests run: memferry's programs and the test guests of the build directory, a Linux kernel and
other releases' QEMUs. The latter come from Debian's archive once and are kept in a cache directory
($MEMFERRY_TEST_CACHE, default $XDG_CACHE_HOME/memferry-tests), nothing is installed on the host.
"""
import fcntl
import glob
import os
import re
import shutil
import subprocess
import tempfile

from .sandbox import HarnessError, Skip, run

SOURCE_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(
    os.path.abspath(__file__)))))


def build_root():
    """The meson build directory: $MEMFERRY_BUILD (set by meson test), else build/gcc, tests/run's own."""
    root = os.environ.get("MEMFERRY_BUILD", os.path.join(SOURCE_ROOT, "build", "gcc"))
    if not os.path.isdir(root):
        raise HarnessError(f"there is no build directory {root}: run `meson setup build/gcc && "
                           "ninja -C build/gcc`, or name another in MEMFERRY_BUILD")
    return root


def program(name):
    """Path of memferryd, memferry-mover or memferry in the build directory."""
    directory = {"memferryd": "memferryd", "memferry-mover": "mover", "memferry": "memferry"}[name]
    path = os.path.join(build_root(), "daemon", directory, name)
    if not os.path.exists(path):
        raise HarnessError(f"{path} has not been built: run `ninja -C {build_root()}`")
    return path


def guest_program(name):
    """Path of guest-linux or guest-bare.bin in the build directory."""
    path = os.path.join(build_root(), "tests", "guest", name)
    if not os.path.exists(path):
        raise HarnessError(f"{path} has not been built: run `ninja -C {build_root()}`")
    return path


def test_program(name):
    """Path of a program of tests/e2e in the build directory."""
    path = os.path.join(build_root(), "tests", "e2e", name)
    if not os.path.exists(path):
        raise HarnessError(f"{path} has not been built: run `ninja -C {build_root()}`")
    return path


def cache_directory():
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    path = os.environ.get("MEMFERRY_TEST_CACHE") or os.path.join(base, "memferry-tests")
    os.makedirs(path, exist_ok=True)
    return path


class _CacheLock:
    """One run fetches, the others wait for it."""

    def __init__(self):
        self.file = None

    def __enter__(self):
        self.file = open(os.path.join(cache_directory(), "lock"), "w", encoding="ascii")
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_):
        self.file.close()


def guest_kernel():
    """Path of a Linux kernel image that boots under QEMU: Debian's cloud kernel, from its package."""
    with _CacheLock():
        found = sorted(glob.glob(os.path.join(cache_directory(), "vmlinuz-*-cloud-amd64")))
        if found:
            return found[-1]
        installed = sorted(glob.glob("/boot/vmlinuz-*-cloud-amd64"))
        if installed:
            return installed[-1]
        return _fetch_kernel()


# What a balloon takes, in the order of loading.
BALLOON_MODULES = ("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci",
                   "virtio_balloon")


def balloon_modules():
    """Paths of the guest kernel's modules that make a balloon, in the order of loading."""
    release = os.path.basename(guest_kernel()).partition("-")[2]
    kept = os.path.join(cache_directory(), f"modules-{release}")
    with _CacheLock():
        installed = f"/lib/modules/{release}/kernel/drivers/virtio"
        for directory in (kept, installed):
            paths = [os.path.join(directory, f"{name}.ko") for name in BALLOON_MODULES]
            if all(map(os.path.exists, paths)):
                return paths
        with tempfile.TemporaryDirectory(dir=cache_directory()) as work:
            _unpack_kernel(f"linux-image-{release}", work)
            found = glob.glob(os.path.join(work, "root", "**", "kernel", "drivers", "virtio"), recursive=True)
            if not found or not all(os.path.exists(os.path.join(found[0], f"{name}.ko"))
                                    for name in BALLOON_MODULES):
                raise Skip(f"the package linux-image-{release} has no virtio_balloon.ko")
            shutil.move(found[0], kept)
    return [os.path.join(kept, f"{name}.ko") for name in BALLOON_MODULES]


def _unpack_kernel(package, work):
    """Download a package and unpack it into work/root."""
    got = run("apt-get", "-o", "APT::Sandbox::User=root", "download", package, cwd=work, check=False,
              timeout=300)
    packages = glob.glob(os.path.join(work, "*.deb"))
    if got.returncode or not packages:
        raise Skip(f"no guest kernel: the package {package} can't be downloaded (no network?)")
    run("dpkg-deb", "-x", packages[0], os.path.join(work, "root"), timeout=120)


def _fetch_kernel():
    depends = run("apt-cache", "depends", "linux-image-cloud-amd64", check=False).stdout
    match = re.search(r"Depends: (linux-image-\S+)", depends)
    if not match:
        raise Skip("no guest kernel: apt knows no linux-image-cloud-amd64 (run apt-get update)")
    with tempfile.TemporaryDirectory(dir=cache_directory()) as work:
        _unpack_kernel(match[1], work)
        image = glob.glob(os.path.join(work, "root", "boot", "vmlinuz-*"))[0]
        path = os.path.join(cache_directory(), os.path.basename(image))
        shutil.move(image, path)
    return path


def initramfs(directory, modules=()):
    """An initramfs with the Linux test guest as /init and the kernel modules it loads; returns its path."""
    path = os.path.join(directory, "initramfs" + ("-modules" if modules else ""))
    if not os.path.exists(path):
        root = path + ".d"
        os.makedirs(os.path.join(root, "dev"))
        os.mkdir(os.path.join(root, "modules"))
        for index, module in enumerate(modules):
            shutil.copy(module, os.path.join(root, "modules", f"{index}.ko"))
        shutil.copy(guest_program("guest-linux"), os.path.join(root, "init"))
        os.mknod(os.path.join(root, "dev", "console"), 0o600 | 0o020000, os.makedev(5, 1))
        with open(path, "wb") as out:
            subprocess.run(["cpio", "--quiet", "-o", "-H", "newc"], cwd=root, check=True, stdout=out,
                           input="\n".join([".", "dev", "dev/console", "init", "modules"] + [
                               f"modules/{index}.ko" for index in range(len(modules))]).encode() + b"\n")
    return path


class QemuBuild:
    """A QEMU to run: the host's, or one in another release's tree, run through that tree's own loader."""

    def __init__(self, tree=None):
        self.tree = tree

    def command(self):
        if not self.tree:
            return ["qemu-system-x86_64"]
        return [f"{self.tree}/lib64/ld-linux-x86-64.so.2", "--library-path",
                f"{self.tree}/usr/lib/x86_64-linux-gnu", f"{self.tree}/usr/bin/qemu-system-x86_64",
                "-L", f"{self.tree}/usr/share/qemu", "-L", f"{self.tree}/usr/share/seabios"]

    def version(self):
        """(major, minor)"""
        text = run(*self.command(), "-version").stdout
        match = re.search(r"version (\d+)\.(\d+)", text)
        return int(match[1]), int(match[2])


def archive_address():
    """Where apt gets Debian from, so that other releases come from the same place."""
    targets = run("apt-get", "indextargets", "--format", "$(REPO_URI) $(ORIGIN) $(LABEL)").stdout
    for line in targets.splitlines():
        address, _, names = line.partition(" ")
        if names == "Debian Debian":
            return address
    raise Skip("apt's configuration names no Debian archive (run apt-get update)")


def qemu_of_release(release):
    """QEMU of another Debian release (trixie, sid), fetched by debootstrap if it is not there yet."""
    tree = os.path.join(cache_directory(), f"qemu-{release}")
    with _CacheLock():
        if not os.path.isdir(tree):
            if not shutil.which("debootstrap"):
                raise Skip(f"no QEMU of {release}: debootstrap is not installed")
            partial = tree + ".partial"
            shutil.rmtree(partial, ignore_errors=True)
            made = run("debootstrap", "--variant=minbase", "--include=qemu-system-x86", release,
                       partial, archive_address(), check=False, timeout=900)
            if made.returncode:
                shutil.rmtree(partial, ignore_errors=True)
                raise Skip(f"no QEMU of {release}: debootstrap failed (no network?): "
                           f"{made.stdout.strip().splitlines()[-1:]}")
            os.rename(partial, tree)
    return QemuBuild(tree)
