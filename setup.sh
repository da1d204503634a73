#!/bin/bash
# Brings what raysandbox needs from the system: a compiler and libseccomp to build
# and run, QEMU with a second kernel, tcpdump and a container engine to test.
#
#   ./setup.sh             install what is missing (Debian, as root), fetch the kernel
#   ./setup.sh --check     only say what is missing
#
# Exit status: 0, or 1 if something is missing that building or running needs.
# What only tests need is reported, and those tests skip with the reason.
set -euo pipefail
cd "$(dirname "$0")"

kernel_dir=build/qemu
kernel_modules=(
    drivers/virtio/virtio_ring drivers/virtio/virtio
    drivers/virtio/virtio_pci_legacy_dev drivers/virtio/virtio_pci_modern_dev
    drivers/virtio/virtio_pci
    net/9p/9pnet net/9p/9pnet_virtio fs/netfs/netfs fs/fscache/fscache fs/9p/9p
    fs/overlayfs/overlay
)

# need GROUP PACKAGE WHY TEST...: is it there, by what TEST says?
required=() wanted=()
need() {
    local group=$1 package=$2 why=$3
    shift 3
    if ! "$@" >/dev/null 2>&1; then
        echo "setup: missing $package: $why"
        if [ "$group" = build ]; then required+=("$package"); else wanted+=("$package"); fi
    fi
}
have() { PATH=$PATH:/usr/sbin:/sbin command -v "$1"; }
library() { PATH=$PATH:/usr/sbin:/sbin ldconfig -p | grep -q "$1"; }
venv_works() { "${PYTHON:-python3}" -c 'import ensurepip, venv'; }
static_libc() { [ -e "$(cc -print-file-name=rcrt1.o)" ] && [ -e "$(cc -print-file-name=libc.a)" ]; }

look() {
    required=() wanted=()
    need build gcc "compiles the launcher" have cc
    need build libc6-dev "the launcher is linked statically" static_libc
    need test musl-tools "figures: linked with musl the launcher starts 0.5 ms faster" have musl-gcc
    need build make "builds the launcher" have make
    need build libseccomp2 "compiles the system-call policy" library libseccomp.so.2
    need build python3-venv "makes .venv" venv_works
    need test iproute2 "tests: networks of test machines" have ip
    need test tcpdump "tests: watches them" have tcpdump
    need test util-linux "tests: unshare and nsenter" have nsenter
    need test docker.io "tests: the container image" have dockerd
    need test debootstrap "tests: its base" have debootstrap
    if [ "$(uname -m)" = x86_64 ]; then
        need test qemu-system-x86 "tests: the second kernel" have qemu-system-x86_64
        need test cpio "tests: the second kernel" have cpio
    fi
}

install() {
    local packages=("$@") policy=/usr/sbin/policy-rc.d made=
    echo "setup: apt-get install ${packages[*]}"
    # Packages that bring a service (docker.io) must not start it.
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
        made=$policy
    fi
    local apt=(apt-get -qq -o DPkg::Lock::Timeout=600 -o Dpkg::Use-Pty=0)
    local status=0
    "${apt[@]}" update || status=$?
    DEBIAN_FRONTEND=noninteractive "${apt[@]}" install -y --no-install-recommends \
        "${packages[@]}" >build/setup.log 2>&1 || status=$?
    if [ -n "$made" ]; then rm -f "$made"; fi
    if [ "$status" -ne 0 ]; then tail -20 build/setup.log; fi
    return "$status"
}

# Debian's kernel and ten of its modules, for QEMU.  Nothing is installed.
fetch_kernel() {
    local work package file release module
    package=$(apt-cache depends linux-image-amd64 2>/dev/null |
        sed -n 's/^ *Depends: \(linux-image-[^ ]*\)$/\1/p' | head -n 1)
    if [ -z "$package" ]; then
        echo "setup: apt knows no linux-image-amd64; tests on the second kernel skip"
        return 1
    fi
    echo "setup: fetching $package into $kernel_dir"
    work=$(mktemp -d "$kernel_dir/fetch.XXXXXX")
    (cd "$work" && apt-get -qq -o Dpkg::Use-Pty=0 download "$package" 2>&1) |
        grep -v unsandboxed || true
    if ! ls "$work"/*.deb >/dev/null 2>&1; then
        rm -rf "$work"
        return 1
    fi
    file=$(echo "$work"/*.deb)
    release=${package#linux-image-}
    local members=("./boot/vmlinuz-$release")
    for module in "${kernel_modules[@]}"; do
        members+=("./lib/modules/$release/kernel/$module.ko")
    done
    dpkg-deb --fsys-tarfile "$file" | tar -x -C "$work" "${members[@]}"
    mkdir -p "$kernel_dir/modules"
    for module in "${kernel_modules[@]}"; do
        mv "$work/lib/modules/$release/kernel/$module.ko" "$kernel_dir/modules/"
    done
    printf '%s\n' "${kernel_modules[@]##*/}" >"$kernel_dir/modules/order"
    echo "$release" >"$kernel_dir/release"
    # Last: its presence says that all the rest is there.
    mv "$work/boot/vmlinuz-$release" "$kernel_dir/vmlinuz"
    rm -rf "$work"
}

mkdir -p "$kernel_dir"
look
missing=("${required[@]}" "${wanted[@]}")
if [ ${#missing[@]} -gt 0 ] && [ "${1:-}" != --check ]; then
    if ! have apt-get >/dev/null; then
        echo "setup: no apt-get here: install what these Debian packages hold: ${missing[*]}"
    elif [ "$(id -u)" -ne 0 ]; then
        echo "setup: not root; run: sudo apt-get install --no-install-recommends ${missing[*]}"
    else
        install "${missing[@]}"
        look
    fi
fi
if [ ! -e "$kernel_dir/vmlinuz" ]; then
    if [ "${1:-}" = --check ] || [ "$(uname -m)" != x86_64 ]; then
        echo "setup: no second kernel in $kernel_dir"
    elif ! have apt-get >/dev/null || ! have dpkg-deb >/dev/null; then
        echo "setup: the second kernel comes from Debian's packages; its tests skip"
    else
        fetch_kernel || true
    fi
fi
if [ ${#required[@]} -gt 0 ]; then
    echo "setup: still missing, and needed: ${required[*]}"
    exit 1
fi
if [ ${#wanted[@]} -gt 0 ]; then
    echo "setup: tests that need ${wanted[*]} skip"
elif [ "${1:-}" = --check ]; then
    echo "setup: everything is there"
fi
