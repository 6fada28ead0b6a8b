#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only OR MIT
# Reads the signed repository in /mnt/a on a Debian tree that is not kept, as a host's apt does: with its key, without
# it, and with an index that was changed after the signature.
set -eu

fail() {
	echo "$1" >&2
	exit 1
}
update() {
	apt-get -q update >/tmp/log 2>&1
}

rm -f /etc/apt/sources.list /etc/apt/sources.list.d/*
rm -rf /var/lib/apt/lists/*
cp -a /mnt/a /srv/repository
mkdir -p /etc/apt/keyrings
cp /mnt/a/xen-blkback-rs.sources /etc/apt/sources.list.d/

! update || fail "a host without the key reads the repository"
cp /mnt/a/xen-blkback-rs.asc /etc/apt/keyrings/
update || fail "apt does not read the repository: $(cat /tmp/log)"
for package in xen-blkback-rs "xen-blkback-rs-modules-$1" xen-blkback-rs-dkms; do
	apt-cache show "$package" >/dev/null || fail "the repository has no package $package"
	(cd /tmp && apt-get -q download "$package" >/tmp/log 2>&1) || fail "$package does not come: $(cat /tmp/log)"
done

# A package that is not the one of the index.
echo changed >>"$(ls /srv/repository/xen-blkback-rs_*.deb)"
! (cd /tmp && rm -f ./*.deb && apt-get -q download xen-blkback-rs >/tmp/log 2>&1) ||
	fail "apt takes a package that was changed after the signature"
# An index that is not the one of the signature.
rm -rf /var/lib/apt/lists/* /srv/repository/by-hash
for file in Packages Packages.xz; do
	echo changed >>/srv/repository/$file
done
! update || fail "apt takes an index that was changed after the signature"
