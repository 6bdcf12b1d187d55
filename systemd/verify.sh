#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# Does systemd accept what we install? The unit is checked with PROGRAM in the place
# of memferryd, since systemd-analyze looks whether that is installed.
# usage: verify.sh UNIT PROGRAM SYSUSERS TMPFILES
set -eu
if ! command -v systemd-analyze >/dev/null; then
    echo "skipped: systemd-analyze is not installed (package systemd)"
    exit 77
fi
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
sed "s|^ExecStart=[^ ]*|ExecStart=$2|" "$1" >"$directory/memferryd.service"
# It exits with 0 on some complaints: what it says counts too, where it is about our unit.
output=$(systemd-analyze verify --man=no "$directory/memferryd.service" 2>&1) || {
    echo "$output"
    exit 1
}
if printf '%s\n' "$output" | grep memferryd; then
    exit 1
fi
root=$directory/root
mkdir -p "$root/usr/lib/sysusers.d" "$root/usr/lib/tmpfiles.d" "$root/etc" "$root/run"
cp "$3" "$root/usr/lib/sysusers.d/"
cp "$4" "$root/usr/lib/tmpfiles.d/"
echo root:x:0:0::/root:/bin/sh >"$root/etc/passwd"
echo root:x:0: >"$root/etc/group"
systemd-sysusers --root="$root"
grep -q '^memferry:' "$root/etc/passwd"
systemd-tmpfiles --create --root="$root"
test -d "$root/run/memferry"
