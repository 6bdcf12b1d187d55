# SPDX-License-Identifier: LGPL-2.1-or-later
# Sourced by tests/run and contrib/demo: the checks and the packages that both need. `source_root` must be
# set, and `me` be the name for messages.

die() {
    echo "$me: $*" >&2
    exit 1
}

# Root on Debian, with all of contrib/packages; no network is needed once they are installed.
prepare_host() {
    [ "$(id -u)" = 0 ] || die "must run as root, since it makes network namespaces and traces QEMU"
    command -v dpkg-query >/dev/null && command -v apt-get >/dev/null ||
        die "runs on Debian 12 or newer, and this is not a Debian system"
    local package missing=()
    while read -r package; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
            missing+=("$package")
    done < <(grep -v '^#' "$source_root/contrib/packages")
    [ ${#missing[@]} = 0 ] && return
    echo "$me: installing ${missing[*]}" >&2
    export DEBIAN_FRONTEND=noninteractive
    local log
    log=$(mktemp)
    if ! { apt-get -q update && apt-get -q -y --no-install-recommends install "${missing[@]}"; } \
        >"$log" 2>&1 </dev/null; then
        tail -n 5 "$log" >&2
        rm -f "$log"
        die "can't install ${missing[*]} (is there a network?)"
    fi
    rm -f "$log"
}
