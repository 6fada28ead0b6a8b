#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only OR MIT
# Runs in the build root: initramfs.sh DOM0-ROOT OUT INIT MODULES PROGRAMS
# Lays out an initramfs tree from dom0's programs and the stock kernel's modules (in load order,
# with what they depend on), and packs it into OUT. Not compressed: unpacking costs more under
# emulation than reading.
set -eu
dom0=$1 out=$2 init=$3 modules=$4 programs=$5
release=$(cat /kernel-release)
tree=$(mktemp -d)
cd "$tree"
mkdir -p bin dev lib64 mnt mod proc sys tmp usr/bin usr/sbin
cp "$dom0/usr/bin/busybox" bin/
i=100
for module in $modules; do
	modprobe -S "$release" --show-depends "$module" | sed -n 's/^insmod \([^ ]*\).*/\1/p'
done | awk '!seen[$0]++' | while read -r file; do
	name=$(basename "$file" .xz)
	case $file in
	*.xz) xz -dc "$file" >"mod/$i-$name" ;;
	*) cp "$file" "mod/$i-$name" ;;
	esac
	i=$((i + 1))
done
for program in $programs; do
	cp -L "$dom0$program" "./$program"
	chroot "$dom0" ldd "$program" | grep -o '/[^ ]*' | while read -r lib; do
		mkdir -p ".$(dirname "$lib")"
		[ -e ".$lib" ] || cp -L "$dom0$lib" ".$lib"
	done
done
cp "$init" init
chmod +x init
find . | LC_ALL=C sort | cpio -o -H newc -R 0:0 --quiet >"$out"
cd /
rm -r "$tree"
