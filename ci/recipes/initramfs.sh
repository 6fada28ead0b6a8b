#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only OR MIT
# Runs in the build root: initramfs.sh DOM0-ROOT OUT INIT MODULES PROGRAMS SHELLS
# Lays out an initramfs tree from dom0's programs and the stock kernel's modules (in load order,
# with what they depend on), and packs it into OUT. Not compressed: unpacking costs more under
# emulation than reading.
set -eu
dom0=$1 out=$2 init=$3 modules=$4 programs=$5 shells=$6
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
# fio is linked with whole storage clusters of which no test makes use: half of the archive, which
# each guest would unpack. These libraries become shells with the symbols that fio asks for.
mkdir -p usr/lib/x86_64-linux-gnu
libs=usr/lib/x86_64-linux-gnu
symbols() {
	nm -D "$@" | awk '{ sub(/@.*/, "", $NF); print $NF }' | LC_ALL=C sort -u
}
for program in $programs; do
	cp -L "$dom0$program" "./$program"
	for lib in $shells; do
		symbols --undefined-only "$dom0$program" >/tmp/wanted
		symbols --defined-only "$dom0/$libs/$lib" >/tmp/there
		LC_ALL=C comm -12 /tmp/wanted /tmp/there | sed 's/.*/.globl &\n.type &, @function\n&: ud2/' >/tmp/shell.s
		[ -s /tmp/shell.s ] || continue
		gcc-14 -shared -nostdlib -Wl,-soname,"$lib" -o "$libs/$lib" /tmp/shell.s
	done
	/lib64/ld-linux-x86-64.so.2 --library-path "$tree/$libs:$dom0/$libs" --list "./$program" |
		sed -n 's|.* => \(/[^ ]*\).*|\1|p' >/tmp/list
	while read -r lib; do
		[ -e "$libs/$(basename "$lib")" ] || cp -L "$lib" "$libs/"
	done </tmp/list
	cp -L "$dom0/lib64/ld-linux-x86-64.so.2" lib64/
	# Proves that nothing is missing.
	case $program in
	*/fio) chroot "$tree" "$program" --version ;;
	*/bonnie++) chroot "$tree" "$program" -h 2>&1 | grep '^Version' ;;
	*) chroot "$tree" "$program" -V ;;
	esac
done
cp "$init" init
chmod +x init
find . | LC_ALL=C sort | cpio -o -H newc -R 0:0 --quiet >"$out"
cd /
rm -r "$tree"
