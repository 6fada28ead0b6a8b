#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only OR MIT
# What becomes of Xen's script `block` when its package is upgraded or removed and ours is there, on a Debian tree that
# is not kept. The packages are in /mnt/a; $1 is the kernel's release.
set -eu
release=$1
scripts=/etc/xen/scripts
script=$scripts/block

fail() {
	echo "$1" >&2
	ls -l $scripts >&2
	exit 1
}

# Xen's package, of which only the script counts: a configuration file, as Debian has it.
xen() {
	tree=/tmp/xen-$1
	mkdir -p "$tree/DEBIAN" "$tree$scripts"
	cat >"$tree/DEBIAN/control" <<TEXT
Package: xen-scripts
Version: $1
Architecture: all
Maintainer: Nobody <nobody@example.org>
Description: Xen's script
TEXT
	echo "$script" >"$tree/DEBIAN/conffiles"
	echo "Xen's, version $1" >"$tree$script"
	dpkg-deb --root-owner-group --build "$tree" "/tmp/xen-$1.deb" >/dev/null
}

# As an unattended upgrade does it: nobody answers a question, and what was changed by hand stays.
unattended() {
	DEBIAN_FRONTEND=noninteractive dpkg --force-confdef --force-confold "$@" </dev/null >/tmp/log 2>&1 ||
		fail "dpkg $* has failed: $(tail -n9 /tmp/log)"
}

# There is no image of a kernel here, and no systemd.
install_ours() {
	unattended --force-depends -i /mnt/a/xen-blkback-rs_*.deb "/mnt/a/xen-blkback-rs-modules-$release"_*.deb
}

upgrade() {
	unattended -i "/tmp/xen-$1.deb"
}

# Our script is in place, and Xen's of this version beside it.
ours_over() {
	[ "$(readlink $script)" = block-or-tap ] || fail "$2: our script is not in place"
	head -n2 $scripts/block-or-tap | grep -q SPDX || fail "$2: our script is another one"
	[ "$(cat $script.xen)" = "Xen's, version $1" ] || fail "$2: block.xen is not of version $1"
	nothing_beside "$2"
}

# Xen's script of this version is in place, and nothing of ours.
xens() {
	{ [ ! -L $script ] && [ "$(cat $script)" = "Xen's, version $1" ]; } || fail "$2: Xen's script is not back in version $1"
	[ ! -e $script.xen ] || fail "$2: block.xen is left behind"
	[ -z "$(dpkg-divert --list $script)" ] || fail "$2: dpkg still diverts the script"
	nothing_beside "$2"
}

# No version that nobody uses.
nothing_beside() {
	beside=$(find $scripts -name 'block.dpkg-*' -o -name 'block.xen.dpkg-*' -o -name block.new)
	[ -z "$beside" ] || fail "$1: there is $beside"
}

for version in 1 2 3 4 5 6; do
	xen $version
done
upgrade 1
install_ours
xens 1 "installing"

xentap-block enable
ours_over 1 "enable"
upgrade 2
ours_over 2 "an upgrade of Xen"
xentap-block enable
ours_over 2 "enable once more"
xentap-block disable
xens 2 "disable"
xentap-block disable
xens 2 "disable once more"
upgrade 3
xens 3 "an upgrade of Xen when ours is not in place"

# Interrupted before our script was in place, and then Xen was upgraded.
interrupted() {
	ln $script $script.xen
	dpkg-divert --quiet --package xen-blkback-rs --divert $script.xen --no-rename --add $script
	upgrade "$1"
}
interrupted 4
xentap-block enable
ours_over 4 "enable after one that was interrupted"
xentap-block disable
interrupted 5
xentap-block disable
xens 5 "disable after an enable that was interrupted"

# What an administrator has changed in Xen's script is his in either place.
xentap-block enable
echo "changed" >>$script.xen
upgrade 6
grep -qx changed $script.xen || fail "an upgrade has thrown away what was changed in Xen's script"
[ "$(cat $script.xen.dpkg-dist)" = "Xen's, version 6" ] || fail "the new script is not beside the one that was changed"
mv $script.xen.dpkg-dist $script.xen
ours_over 6 "the new script was taken"

# Ours goes.
unattended -r xen-blkback-rs "xen-blkback-rs-modules-$release"
xens 6 "removing our package"
unattended -P xen-blkback-rs "xen-blkback-rs-modules-$release"
xens 6 "purging our package"

# Xen goes first: its script is of no use, but nothing may lead to where nothing is.
install_ours
xentap-block enable
unattended -P xen-scripts
unattended -P xen-blkback-rs "xen-blkback-rs-modules-$release"
[ ! -L $script ] || fail "a link is left behind when Xen's package was purged before ours"
[ -z "$(dpkg-divert --list $script)" ] || fail "dpkg still diverts the script of a package that was purged"
