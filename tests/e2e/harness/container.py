# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A host whose process 1 is systemd: memferry, installed as its packages would install it, in a container of
systemd-nspawn. The container's system comes from Debian's archive once and is kept in the cache
directory; a test works on an overlay over it, which goes away with the test.
"""
import fcntl
import glob
import os
import shutil
import subprocess

from .artifacts import archive_address, build_root, cache_directory
from .host import Host, Verb
from .net import enter_namespace
from .sandbox import PREFIX, HarnessError, Skip, alive, children_of, run, wait_until

VM_USER = "vmrunner"
# What memferry's programs are linked with, QEMU, and a D-Bus for systemd-run.
PACKAGES = ("systemd", "systemd-sysv", "dbus", "qemu-system-x86", "libcap2", "libevent-2.1-7",
            "libinih1", "libjansson4", "libprotobuf-c1", "libseccomp2", "libsystemd0", "liburing2")
CGROUPS = "/sys/fs/cgroup"


def system_tree():
    """A directory with a Debian of this host's release, since the programs were built with its libraries."""
    with open("/etc/os-release", encoding="utf-8") as release:
        fields = dict(line.rstrip("\n").split("=", 1) for line in release if "=" in line)
    codename = fields.get("VERSION_CODENAME", "").strip('"')
    if not codename or not shutil.which("debootstrap"):
        raise Skip("no system for the container: that takes Debian's debootstrap")
    tree = os.path.join(cache_directory(), f"system-{codename}")
    with open(tree + ".lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.isdir(tree):
            return tree
        partial = tree + ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        made = run("debootstrap", "--variant=minbase", "--include=" + ",".join(PACKAGES), codename,
                   partial, archive_address(), check=False, timeout=900)
        if made.returncode:
            shutil.rmtree(partial, ignore_errors=True)
            raise Skip(f"no system for the container: debootstrap failed (no network?): "
                       f"{made.stdout.strip().splitlines()[-1:]}")
        for log in glob.glob(os.path.join(partial, "var/log/*.log")) + glob.glob(
                os.path.join(partial, "var/log/apt/*")):
            os.unlink(log)  # after a failure they would be shown for the test's
        os.rename(partial, tree)
    return tree


class Container:
    """Boots; sandbox.path and sandbox.ram are seen inside under their own names."""

    def __init__(self, sandbox):
        if not shutil.which("systemd-nspawn"):
            raise Skip("no container: systemd-nspawn is not installed (package systemd-container)")
        self.sandbox = sandbox
        self.root = os.path.join(sandbox.path, "root")
        self.log = os.path.join(sandbox.path, "container.log")
        self._before = _cgroups()
        self._mount()
        self._install()
        sandbox.on_exit(self.stop)
        self.process = self._spawn()
        self.init = 0
        self.init = wait_until(self._find_init, 20, f"the container starts: {self.said()}")
        wait_until(self._is_up, 60, "systemd in the container is up")
        # As the package's scripts do.
        self.run("systemd-sysusers")
        self.run("systemd-tmpfiles", "--create")
        # Under a name, so that Vm finds it.
        self.network_name = f"{PREFIX}{sandbox.id}c"
        sandbox.on_exit(lambda: run("ip", "netns", "delete", self.network_name, check=False))
        run("ip", "netns", "attach", self.network_name, self.init)

    def _mount(self):
        tree = system_tree()
        written = os.path.join(self.sandbox.path, "written")
        os.makedirs(self.root)
        os.makedirs(written)
        # A tmpfs: the sandbox may itself lie on an overlay, which can't be the upper layer of another.
        run("mount", "-t", "tmpfs", "none", written)
        for part in ("upper", "work"):
            os.mkdir(os.path.join(written, part))
        done = run("mount", "-t", "overlay", "overlay", "-o",
                   f"lowerdir={tree},upperdir={written}/upper,workdir={written}/work", self.root,
                   check=False)
        if done.returncode:
            raise Skip(f"no container: this kernel mounts no overlay: {done.stderr.strip()}")

    def _install(self):
        run("meson", "install", "-C", build_root(), "--no-rebuild",
            env={**os.environ, "DESTDIR": self.root})
        with open(os.path.join(self.root, "usr/lib/sysusers.d/vmrunner.conf"), "w",
                  encoding="ascii") as conf:
            conf.write(f"u {VM_USER} - \"runs QEMU\" -\n")

    def _spawn(self):
        command = ["systemd-nspawn", "--boot", "--directory", self.root, "--register=no",
                   "--private-network", "--console=passive", "--link-journal=no", "--machine=memferry-test",
                   # Only memferryd's own unit is to restrict it, as on a host.
                   "--capability=all", f"--bind={self.sandbox.path}", f"--bind={self.sandbox.ram}"]
        if not os.path.isdir("/run/systemd/system"):
            command.append("--keep-unit")  # nobody is there to make a scope
        environment = {**os.environ, "SYSTEMD_SECCOMP": "0", "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}
        return self.sandbox.spawn(command, self.log, env=environment)

    def said(self):
        try:
            with open(self.log, encoding="utf-8", errors="replace") as log:
                return log.read().strip()[-1000:]
        except FileNotFoundError:
            return ""

    def _find_init(self):
        if self.process.poll() is not None:
            if "Operation not permitted" in self.said():
                raise Skip(f"systemd-nspawn may not make a container here: {self.said()}")
            raise HarnessError(f"systemd-nspawn did not start: {self.said()}")
        # Its first child only sets things up, and ends.
        return next((pid for pid in children_of(self.process.pid) if _inner_pid(pid) == 1), None)

    def _is_up(self):
        return self.run("systemctl", "is-system-running", check=False).stdout.strip() in (
            "running", "degraded")

    def enter(self):
        """Command prefix: as root in the container."""
        return ["nsenter", "--all", "--target", str(self.init), "env", "-i", "HOME=/root", "LANG=C.UTF-8",
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]

    def run(self, *command, **options):
        return run(*self.enter(), *command, **options)

    def network(self, *command):
        """Run a command of this host's in the container's network."""
        return run(*enter_namespace(self.network_name), *command)

    def properties(self, unit, *names):
        """What `systemctl show` says of a unit, as a dictionary."""
        text = self.run("systemctl", "show", unit, "--property", ",".join(names)).stdout
        return dict(line.split("=", 1) for line in text.splitlines())

    def outer_pid(self, inner):
        """The process id here of a process id in the container."""
        for path in glob.glob("/proc/[0-9]*/status"):
            pid = int(path.split("/")[2])
            if _inner_pid(pid) == int(inner) and self._inside(pid):
                return pid
        raise HarnessError(f"the container has no process {inner}")

    def _inside(self, pid):
        try:
            return os.readlink(f"/proc/{pid}/ns/pid") == os.readlink(f"/proc/{self.init}/ns/pid")
        except FileNotFoundError:
            return False

    def stop(self):
        """Everything in it ends with its process 1."""
        if self.process.poll() is None:
            if self.init and alive(self.init):
                os.kill(self.init, 9)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for path in sorted(_cgroups() - self._before, reverse=True):
            try:
                os.rmdir(path)
            except OSError:  # not the container's, since somebody is in it
                continue


def _inner_pid(pid):
    """A process's id in its own namespace, None if that is ours."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
            pids = next((line for line in status if line.startswith("NSpid:")), "").split()[1:]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(pids[-1]) if len(pids) > 1 else None


def _cgroups():
    """The cgroups there are: those of a container stay behind where no systemd runs outside."""
    if os.path.isdir("/run/systemd/system"):
        return set()
    return {path for path, _, _ in os.walk(CGROUPS) if path.count("/") > 4}


class _Service:
    """The main process of a unit, in the place of a child's."""

    def __init__(self, pid):
        self.pid = pid


class UnitHost(Host):
    """Host a or b: a memferryd.service of the container's, which is restarted by systemd alone."""

    def __init__(self, container, side, unit, runtime, address):
        self.sandbox = container.sandbox
        self.container = container
        self.side = side
        self.namespace = container.network_name
        self.unit = unit
        self.inner_runtime = runtime
        self.runtime = f"/proc/{container.init}/root{runtime}"
        self.address = address
        self.log = container.log
        self.process = None

    def systemctl(self, verb, **options):
        return self.container.run("systemctl", verb, self.unit, **options)

    def start(self):
        self.systemctl("start")
        self.process = _Service(self.container.outer_pid(self.show("MainPID")))

    def stop(self, seconds=10):
        self.systemctl("stop", timeout=seconds)

    def show(self, name):
        return self.container.properties(self.unit, name)[name]

    def begin(self, *verb):
        return Verb(self.sandbox, [*self.container.enter(), "memferry", "--runtime-dir",
                                   self.inner_runtime, *map(str, verb)])

    def journal(self, *options):
        """Lines of the unit's journal, as `journalctl -o cat` prints them."""
        self.container.run("journalctl", "--sync", check=False)
        return self.container.run("journalctl", "--unit", self.unit, "--output=cat", "--no-pager",
                                  *options).stdout.splitlines()

    def said(self):
        return "\n".join(self.journal())[-4000:]
