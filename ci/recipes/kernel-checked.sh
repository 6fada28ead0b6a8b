#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only OR MIT
# Makes a kernel with the kernel's own checks from the source of the stock kernel $1, in the folder $2, which has the
# file `config`. It has the release of the stock kernel, so that it and its modules can take their places.
set -eu
release=$1
tree=$2
tarball=/usr/src/linux-source-$(echo "$release" | cut -d. -f1,2).tar.xz
mkdir -p "$tree/source" "$tree/build"
tar -C "$tree/source" --strip-components=1 -xf "$tarball"
# gntdev writes to its caller's memory under a lock that mmap takes: lockdep says so when the first guest gets a console,
# and then never says anything again.
gntdev=$tree/source/drivers/xen/gntdev.c
sed -i 's/^\tmutex_init(&priv->lock);$/&\n\tlockdep_set_novalidate_class(\&priv->lock);/' "$gntdev"
grep -q lockdep_set_novalidate_class "$gntdev"
cat >"$tree/kmake" <<TEXT
#!/bin/sh
# make, as this kernel was made.
exec make -C $tree/source O=$tree/build ARCH=x86 CROSS_COMPILE=x86_64-linux-gnu- \\
	CC=x86_64-linux-gnu-gcc-14 HOSTCC=gcc-14 KERNELRELEASE=$release -j$(nproc) "\$@"
TEXT
chmod +x "$tree/kmake"
"$tree/kmake" -s x86_64_defconfig xen.config
cat "$tree/config" >>"$tree/build/.config"
"$tree/kmake" -s olddefconfig
wanted=$(grep -e '^CONFIG' -e '^# CONFIG' "$tree/config" | sort)
missing=$(echo "$wanted" | while read -r line; do
	case $line in
	'# '*) name=${line#\# } name=${name%% *}
		grep -q "^$name=" "$tree/build/.config" && echo "$line" ;;
	*) grep -qxF "$line" "$tree/build/.config" || echo "$line" ;;
	esac
	:
done)
if [ -n "$missing" ]; then
	echo "This kernel cannot be configured so:"
	echo "$missing"
	exit 1
fi
"$tree/kmake" -s bzImage modules
"$tree/kmake" -s INSTALL_MOD_PATH="$tree/installed" modules_install
cp "$tree/build/arch/x86/boot/bzImage" "$tree/vmlinuz"
# What only the kernel itself was made of.
find "$tree/build" -name '*.o' -not -path '*/scripts/*' -not -path '*/tools/*' -not -path '*/rust/*' -delete
