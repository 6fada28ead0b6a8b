#!/bin/busybox sh
# SPDX-License-Identifier: GPL-2.0-only OR MIT
# The init of the guests (PV and PVH): becomes /agent when there is one, which then is the first
# process and loads the drivers of /mod as it likes. Else loads them and gives a shell.
[ -x /agent ] && exec /agent
/bin/busybox --install -s /bin
export PATH=/bin:/usr/bin:/usr/sbin HOME=/ TERM=dumb
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts
mount -t devpts devpts /dev/pts
mount -t xenfs xenfs /proc/xen
for m in /mod/*; do
	insmod "$m"
done
exec setsid cttyhack sh
