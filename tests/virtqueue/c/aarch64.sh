#!/bin/sh
# Run the ring tests on the aarch64 build of the C engine, under qemu-user.
#
#   tests/virtqueue/c/aarch64.sh [CACHE]        as root, on Debian
#
# Needs debootstrap, qemu-user-static and the ziglang wheel (PYTHON says which interpreter has it).
# The foreign Python is unpacked once, into CACHE (default: .cache/aarch64), and runs in place, so
# that neither binfmt_misc nor a chroot is needed. Emulation on x86 shows that the code does the
# right thing on the other machine, not that its barriers suffice there: the emulator's memory is
# as strongly ordered as the host's.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
repository=$(cd "$here/../../.." && pwd)
cache=$(realpath -m "${1:-$repository/.cache/aarch64}")
python=${PYTHON:-python3}
root=$cache/root

if [ ! -e "$cache/ready" ]; then
    mkdir -p "$cache"
    rm -rf "$root"
    debootstrap --foreign --arch=arm64 --variant=minbase --include=python3 bookworm "$root" \
        >"$cache/debootstrap.log"
    for archive in "$root"/var/cache/apt/archives/*.deb; do
        dpkg-deb -x "$archive" "$root"
    done
    "$python" -m pip install --quiet --target "$cache/python" --python-version 3.11 \
        --only-binary=:all: --platform manylinux_2_17_aarch64 --platform manylinux_2_28_aarch64 \
        pytest pytest-timeout hypothesis
    touch "$cache/ready"
fi

work=$cache/work
rm -rf "$work"
mkdir -p "$work/packages" "$work/tests"
for package in guest-memory virtqueue; do
    mkdir -p "$work/packages/$package"
    cp -r "$repository/packages/$package/src" "$work/packages/$package/"
done
cp -r "$repository/tests/virtqueue" "$work/tests/"
cp "$repository/pyproject.toml" "$work/"
# The emulator keeps notes on every page, also of what is only reserved: a small window here.
sed -i 's/^_USUAL_SIZE = 1 << 36$/_USUAL_SIZE = 1 << 26/' \
    "$work/packages/guest-memory/src/guest_memory/window.py"
"$python" "$repository/packages/virtqueue/hatch_build.py" --compiler zig --target aarch64 \
    --output "$work/packages/virtqueue/src/virtqueue/_engine/libvirtqueue.so"

tests=$work/tests/virtqueue
ulimit -d 4000000 # kilobytes: should the notes grow all the same, this fails and not the machine
exec env -i PATH=/usr/bin:/bin HOME="$cache" VIRTQUEUE_ENGINE=c PYTHONHOME="$root/usr" \
    PYTHONPATH="$cache/python:$work/packages/guest-memory/src:$work/packages/virtqueue/src" \
    PYTHONDONTWRITEBYTECODE=1 qemu-aarch64-static -L "$root" "$root/usr/bin/python3.11" \
    -m pytest -q -p no:cacheprovider --rootdir "$work" --timeout 300 "$tests/test_ring.py" \
    "$tests/test_hostile.py" "$tests/test_notification.py" "$tests/test_state.py"
