#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only OR MIT
# What becomes of the package of the module's source, in /mnt/a, on a Debian tree that is not kept and has the headers
# of the kernel $1: installed, built, loaded in place of the prebuilt module, removed.
set -eu
release=$1
modules=/usr/lib/modules/$release
prebuilt=$modules/updates/xen-blkback-rs.ko

fail() {
	echo "$1" >&2
	tail -n 30 /var/lib/dkms/xen-blkback-rs/*/build/make.log /tmp/log >&2 || true
	exit 1
}
# The one that modprobe would load.
loaded() {
	readlink -f "$(modinfo -k "$release" -n xen-blkback-rs)"
}
install() {
	dpkg --force-depends -i "$@" >/tmp/log 2>&1
}

# The compiler is another one: nothing is built, and it is said why.
config=/usr/src/linux-headers-$release/.config
cp "$config" /tmp/config
sed -i 's/^CONFIG_RUSTC_VERSION_TEXT=.*/CONFIG_RUSTC_VERSION_TEXT="rustc 1.0"/' "$config"
! install /mnt/a/xen-blkback-rs-dkms_*.deb || fail "a module was built with another compiler than the kernel"
grep -q 'built with "rustc 1.0", but rustc is' /var/lib/dkms/xen-blkback-rs/*/build/make.log ||
	fail "it is not said why nothing is built"
cp /tmp/config "$config"

# With the right one the package has dkms build and install it.
dpkg --configure --force-depends xen-blkback-rs-dkms >/tmp/log 2>&1 || fail "the module cannot be built"
dkms status -k "$release" >/tmp/status
grep -q '^xen-blkback-rs/.*: installed' /tmp/status || fail "the module is not installed: $(cat /tmp/status)"
module=$(find "$modules/updates/dkms" -name 'xen-blkback-rs.ko*')
[ "${module%.xz}" = "$modules/updates/dkms/xen-blkback-rs.ko" ] || fail "the module is not where it belongs: $module"

# It is what the packages of binaries have.
install "/mnt/a/xen-blkback-rs-modules-$release"_*.deb || fail "the prebuilt module cannot be installed"
for field in name license description vermagic alias parm depends; do
	of_built=$(modinfo -F $field "$module")
	of_prebuilt=$(modinfo -F $field "$prebuilt")
	[ "$of_built" = "$of_prebuilt" ] || fail "the $field of the module is \"$of_built\", not \"$of_prebuilt\""
done
[ "$(loaded)" = "$module" ] || fail "the prebuilt module wins over the one of this host"
dpkg --verify "xen-blkback-rs-modules-$release" >/tmp/verified && [ ! -s /tmp/verified ] ||
	fail "the prebuilt module was changed: $(cat /tmp/verified)"

dpkg -P xen-blkback-rs-dkms >/tmp/log 2>&1 || fail "the package cannot be purged"
left=$(find "$modules/updates/dkms" /usr/src/xen-blkback-rs-* /var/lib/dkms/xen-blkback-rs 2>/dev/null || true)
[ -z "$left" ] || fail "it is left behind: $left"
[ "$(loaded)" = "$prebuilt" ] || fail "the prebuilt module is not used again"
