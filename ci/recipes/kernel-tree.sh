#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only OR MIT
# Runs in the build root, with the artefact at /mnt/a. Debian's headers package lacks the Rust
# metadata that a Rust module is compiled against: this makes it again from the source package,
# with the stock configuration and the compiler that built the stock kernel.
set -eu
release=$(cat /kernel-release)
tarball=$(ls /usr/src/linux-source-*.tar.xz)
mkdir -p /mnt/a/source /mnt/a/build
tar -C /mnt/a/source --strip-components=1 -xf "$tarball"
cp "/usr/src/linux-headers-$release/.config" /mnt/a/build/.config
cat >/mnt/a/kmake <<EOF
#!/bin/sh
# make, as the stock kernel was made.
exec make -C /mnt/a/source O=/mnt/a/build ARCH=x86 CROSS_COMPILE=x86_64-linux-gnu- \\
	CC=x86_64-linux-gnu-gcc-14 HOSTCC=gcc-14 KERNELRELEASE=$release -j$(nproc) "\$@"
EOF
chmod +x /mnt/a/kmake
/mnt/a/kmake olddefconfig
/mnt/a/kmake modules_prepare
cp "/usr/src/linux-headers-$release/Module.symvers" /mnt/a/build/
# What the gates compare.
rustc --version >/mnt/a/rustc-version
bindgen --version >/mnt/a/bindgen-version
nm --defined-only /mnt/a/build/rust/*.o >/mnt/a/rust-symbols
