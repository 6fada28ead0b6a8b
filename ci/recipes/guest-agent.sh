#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only OR MIT
# Runs in the build root: packs the program of QEMU's guest agent, with its libraries, from the tree of its packages in
# /mnt/a/tree into /mnt/a/qemu-ga.cpio.gz, which is unpacked over a guest's initramfs.
set -eu
from=/mnt/a/tree libs=usr/lib/x86_64-linux-gnu
tree=$(mktemp -d)
cd "$tree"
mkdir -p lib64 usr/sbin "$libs"
cp "$from/usr/sbin/qemu-ga" usr/sbin/
/lib64/ld-linux-x86-64.so.2 --library-path "$from/$libs" --list usr/sbin/qemu-ga |
	sed -n 's|.* => \(/[^ ]*\).*|\1|p' >/tmp/list
while read -r lib; do
	cp -L "$lib" "$libs/"
done </tmp/list
cp -L "$from/$libs/ld-linux-x86-64.so.2" lib64/
# Proves that nothing is missing.
chroot "$tree" /usr/sbin/qemu-ga --version
find . | LC_ALL=C sort | cpio -o -H newc -R 0:0 --quiet | gzip -1 >/mnt/a/qemu-ga.cpio.gz
cd /
rm -r "$tree" "$from"
