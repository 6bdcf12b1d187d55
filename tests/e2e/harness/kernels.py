# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Guests that run programs on another kernel: Debian's cloud kernels of other releases, from their
packages, under QEMU without KVM. The programs run in an initramfs with the libraries they are linked with.
"""
import glob
import lzma
import os
import re
import shutil
import subprocess
import tempfile
import uuid

from .artifacts import _CacheLock, archive_address, cache_directory, guest_program
from .sandbox import HarnessError, Skip, run, wait_until

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
# What a test may need, with what these depend on: persistent memory.
MODULES = ("nd_pmem", "nfit")
# QEMU 7.2 emulates cmpxchg16b so that the allocator of Linux 6.12 breaks down with two processors.
CPU = "max,-cx16"


class GuestKernel:
    """A kernel in the cache: its image, and the modules of MODULES in the order of loading."""

    def __init__(self, directory):
        self.image = os.path.join(directory, "vmlinuz")
        self.modules = sorted(glob.glob(os.path.join(directory, "modules", "*.ko")))
        with open(os.path.join(directory, "release"), encoding="ascii") as file:
            self.release = file.read().strip()

    def version(self):
        """(major, minor)"""
        return tuple(int(part) for part in re.match(r"(\d+)\.(\d+)", self.release).groups())


class _OtherRelease:
    """apt's view of another Debian release, in a directory of its own; nothing of the host's is touched."""

    def __init__(self, codename, work):
        self.work = work
        if not os.path.exists(KEYRING):
            raise Skip(f"no kernel of {codename}: the package debian-archive-keyring is not installed")
        for part in ("lists/partial", "state", "cache/archives/partial", "got"):
            os.makedirs(os.path.join(work, part))
        with open(os.path.join(work, "sources.list"), "w", encoding="ascii") as sources:
            sources.write(f"deb [signed-by={KEYRING}] {archive_address()} {codename} main\n")
        self.options = ["-o", "APT::Sandbox::User=root", "-o", "APT::Architecture=amd64",
                        "-o", "Acquire::Languages=none"]
        for key, name in (("Dir::Etc::SourceList", "sources.list"), ("Dir::State", "state"),
                          ("Dir::State::Lists", "lists"), ("Dir::Cache", "cache")):
            self.options += ["-o", f"{key}={os.path.join(work, name)}"]
        for key in ("Dir::Etc::SourceParts", "Dir::State::Status"):
            self.options += ["-o", f"{key}=/dev/null"]
        self._apt("apt-get", "update")

    def _apt(self, program, *arguments, **options):
        done = run(program, *self.options, *arguments, check=False, timeout=300, **options)
        if done.returncode:
            raise Skip(f"no guest kernel: `{program} {' '.join(arguments)}` failed (no network?): "
                       f"{done.stderr.strip().splitlines()[-1:]}")
        return done.stdout

    def depends(self, package):
        """Names of the packages that it depends on."""
        return re.findall(r"Depends: ([^\s<|]+)", self._apt("apt-cache", "depends", package))

    def unpack(self, *packages):
        """Download packages and unpack them into one tree; returns it."""
        got, root = os.path.join(self.work, "got"), os.path.join(self.work, "root")
        self._apt("apt-get", "download", *packages, cwd=got)
        for package in glob.glob(os.path.join(got, "*.deb")):
            run("dpkg-deb", "-x", package, root, timeout=120)
        return root


def kernel_of_release(codename):
    """The cloud kernel of a Debian release (bookworm, trixie, sid), fetched if it is not there yet."""
    directory = os.path.join(cache_directory(), f"kernel-{codename}")
    with _CacheLock():
        if not os.path.isdir(directory):
            with tempfile.TemporaryDirectory(dir=cache_directory()) as work:
                release = _OtherRelease(codename, work)
                image = next((name for name in release.depends("linux-image-cloud-amd64")
                              if name.startswith("linux-image-")), None)
                if not image:
                    raise Skip(f"no guest kernel: {codename} has no linux-image-cloud-amd64")
                # Newer releases have the image and the modules in packages of their own.
                parts = [name for name in release.depends(image)
                         if re.match(r"linux-(binary|modules)-\d", name)]
                _keep(release.unpack(image, *parts), directory + ".partial")
                os.rename(directory + ".partial", directory)
    return GuestKernel(directory)


def _keep(root, directory):
    """Out of an unpacked kernel: the image and the modules that are needed, not packed any more."""
    shutil.rmtree(directory, ignore_errors=True)
    images = glob.glob(os.path.join(root, "boot", "vmlinuz-*")) + glob.glob(
        os.path.join(root, "usr", "lib", "modules", "*", "vmlinuz"))
    trees = [path for path in glob.glob(os.path.join(root, "lib", "modules", "*")) + glob.glob(
        os.path.join(root, "usr", "lib", "modules", "*")) if os.path.isdir(os.path.join(path, "kernel"))]
    if not images or not trees:
        raise Skip("the kernel's package is not laid out as expected: it has no vmlinuz or no modules")
    files = {}
    for path, _, names in os.walk(trees[0]):
        files.update({name.partition(".ko")[0].replace("-", "_"): os.path.join(path, name)
                      for name in names if ".ko" in name})
    order = []

    def add(name):
        if name in [known for known, _ in order] or name not in files:
            return  # or it is built in
        with open(files[name], "rb") as file:
            content = file.read()
        if files[name].endswith(".xz"):
            content = lzma.decompress(content)
        needed = re.search(rb"\0depends=([^\0]*)", content)
        for other in needed[1].decode("ascii").split(",") if needed and needed[1] else ():
            add(other.replace("-", "_"))
        order.append((name, content))

    for name in MODULES:
        add(name)
    os.makedirs(os.path.join(directory, "modules"))
    for index, (name, content) in enumerate(order):
        with open(os.path.join(directory, "modules", f"{index:02}-{name}.ko"), "wb") as out:
            out.write(content)
    shutil.copy(images[0], os.path.join(directory, "vmlinuz"))
    with open(os.path.join(directory, "release"), "w", encoding="ascii") as out:
        out.write(os.path.basename(trees[0]) + "\n")


def libraries_of(program):
    """Paths of the shared libraries that a program needs, its loader included."""
    said = run("ldd", program, check=False).stdout
    if "not found" in said:
        raise HarnessError(f"{program} lacks a library: {said}")
    return re.findall(r"(/\S+) \(0x", said)


class ProgramGuest:
    """
    Builds an initramfs of programs and commands, boots it and collects what the programs said.

    boot() returns {name: (exit code, [lines])} in the order of the commands.
    """

    def __init__(self, sandbox, kernel):
        self.sandbox = sandbox
        self.kernel = kernel
        self.root = os.path.join(sandbox.path, "initramfs.d")
        self.commands = []
        self.extra = []
        for name in ("bin", "dev", "modules", "proc", "sys", "tmp"):
            os.makedirs(os.path.join(self.root, name))
        os.mknod(os.path.join(self.root, "dev", "console"), 0o600 | 0o020000, os.makedev(5, 1))
        shutil.copy(guest_program("guest-run"), os.path.join(self.root, "init"))

    def add_program(self, path):
        """Returns its path in the guest."""
        for library in libraries_of(path):
            inside = self.root + library
            os.makedirs(os.path.dirname(inside), exist_ok=True)
            if not os.path.exists(inside):
                shutil.copy(library, inside)
        shutil.copy(path, os.path.join(self.root, "bin"))
        return f"/bin/{os.path.basename(path)}"

    def add_shell(self):
        """/bin/sh and what a script needs, users with names."""
        for path in ("/bin/dash", "/bin/sleep", "/bin/cat", "/bin/mkdir"):
            self.add_program(path)
        os.symlink("dash", os.path.join(self.root, "bin", "sh"))
        os.makedirs(os.path.join(self.root, "etc"))
        self.add_file("etc/passwd", "root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")
        self.add_file("etc/group", "root:x:0:\nnogroup:x:65534:\n")

    def add_file(self, path, text):
        with open(os.path.join(self.root, path), "w", encoding="ascii") as out:
            out.write(text)

    def mount(self, source, directory, kind, options="-"):
        self.commands.append(f"mount {source} {directory} {kind} {options}")

    def run(self, name, *command):
        """Have a program run; one of its name gives its results."""
        self.commands.append(" ".join(["run", name, *map(str, command)]))

    def write(self, path, text):
        self.commands.append(f"write {path} {text}")

    def mount_dax(self, directory, size_mib=128):
        """A new ext4, mounted for direct access, on an emulated NVDIMM of that size."""
        tools = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
        if not shutil.which("mkfs.ext4", path=tools):
            raise Skip("no file system for the NVDIMM: mkfs.ext4 is not installed (package e2fsprogs)")
        if not self.kernel.modules:
            raise Skip(f"Linux {self.kernel.release} has no modules for persistent memory")
        for index, path in enumerate(self.kernel.modules):
            shutil.copy(path, os.path.join(self.root, "modules", f"{index}.ko"))
        image = os.path.join(self.sandbox.path, "nvdimm")
        with open(image, "wb") as file:
            file.truncate(size_mib << 20)
        # The kernel keeps the first 2 MiB of a device in mode fsdax for what describes it.
        run("env", f"PATH={tools}", "mkfs.ext4", "-q", "-F", "-b", 4096, "-E", f"offset={2 << 20}", image,
            f"{size_mib - 2}m")
        self.extra += ["-object", f"memory-backend-file,id=pmem,share=on,mem-path={image},size={size_mib}M",
                       "-device", "nvdimm,id=nvdimm,memdev=pmem"]
        # What ndctl create-namespace --mode=fsdax --map=mem does.
        device = "/sys/bus/nd/devices/pfn0.0"
        self.write("/sys/bus/nd/drivers/nd_pmem/unbind", "namespace0.0")
        for name, value in (("uuid", uuid.uuid4()), ("mode", "ram"), ("namespace", "namespace0.0")):
            self.write(f"{device}/{name}", value)
        self.write("/sys/bus/nd/drivers/nd_pmem/bind", "pfn0.0")
        self.mount("/dev/pmem0", directory, "ext4", "dax")

    def _initramfs(self):
        with open(os.path.join(self.root, "commands"), "w", encoding="ascii") as out:
            out.write("\n".join(self.commands) + "\n")
        path = os.path.join(self.sandbox.path, "initramfs")
        names = run("find", ".", cwd=self.root).stdout
        with open(path, "wb") as out:
            subprocess.run(["cpio", "--quiet", "-o", "-H", "newc"], cwd=self.root, check=True, stdout=out,
                           input=names.encode())
        shutil.rmtree(self.root)
        return path

    def boot(self, limit_s, memory_mib=1536):
        initramfs = self._initramfs()
        for attempt in range(3):
            text = self._boot(initramfs, limit_s, memory_mib)
            # Under emulation a kernel breaks down now and then while it starts.
            if "Kernel panic" not in text or "[BEGIN " in text or attempt == 2:
                return self._results(text)
            print(f"Linux {self.kernel.release} has broken down while starting, so once more")
        return None

    def _boot(self, initramfs, limit_s, memory_mib):
        console = os.path.join(self.sandbox.path, "guest.log")
        machine = "pc,nvdimm=on" if self.extra else "pc"
        memory = f"{memory_mib}M" + (",slots=1,maxmem=4G" if self.extra else "")
        process = self.sandbox.spawn(
            ["qemu-system-x86_64", "-machine", machine, "-accel", "tcg,thread=multi", "-cpu", CPU,
             "-smp", "2", "-m", memory, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
             "-kernel", self.kernel.image, "-initrd", initramfs, "-serial", f"file:{console}",
             "-append", "console=ttyS0 rootfstype=ramfs quiet loglevel=4 panic=-1", *self.extra],
            os.path.join(self.sandbox.path, "qemu.log"))
        wait_until(lambda: process.poll() is not None, limit_s,
                   f"the guest with Linux {self.kernel.release} is through", interval=0.1)
        with open(console, encoding="utf-8", errors="replace") as file:
            return file.read().replace("\r", "")

    def _results(self, text):
        if "[DONE]" not in text:
            raise HarnessError(f"the guest with Linux {self.kernel.release} has not come to its end: "
                               f"{text.strip()[-600:]}")
        found = {}
        for match in re.finditer(r"\[BEGIN (\S+)\]\n(.*?)\[END \1 (\d+)\]", text, re.S):
            found[match[1]] = (int(match[3]), match[2].splitlines())
        return found
