#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only OR MIT
# Makes the tree for the kernel $1 in the folder $2. Debian's headers package lacks the Rust metadata that a Rust
# module is compiled against: this makes it again from the source package, with the stock configuration and the
# compiler that built the stock kernel.
set -eu
release=$1
tree=$2
case $release in
*-arm64) arch=arm64 triple=aarch64-linux-gnu ;;
*) arch=x86 triple=x86_64-linux-gnu ;;
esac
tarball=/usr/src/linux-source-$(echo "$release" | cut -d. -f1,2).tar.xz
mkdir -p "$tree/source" "$tree/build"
tar -C "$tree/source" --strip-components=1 -xf "$tarball"
cp "/usr/src/linux-headers-$release/.config" "$tree/build/.config"
cat >"$tree/kmake" <<TEXT
#!/bin/sh
# make, as the stock kernel was made.
exec make -C $tree/source O=$tree/build ARCH=$arch CROSS_COMPILE=$triple- \\
	CC=$triple-gcc-14 HOSTCC=gcc-14 KERNELRELEASE=$release -j$(nproc) "\$@"
TEXT
chmod +x "$tree/kmake"
"$tree/kmake" olddefconfig
"$tree/kmake" modules_prepare
cp "/usr/src/linux-headers-$release/Module.symvers" "$tree/build/"
# What tells whether the tree is that of the stock kernel.
rustc --version >"$tree/rustc-version"
bindgen --version >"$tree/bindgen-version"
nm --defined-only "$tree"/build/rust/*.o >"$tree/rust-symbols"
