#!/bin/busybox sh
# SPDX-License-Identifier: GPL-2.0-only OR MIT
# The init of dom0's initramfs: finds the root file system and goes there.
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for m in /mod/*; do
	insmod "$m"
done
i=0
while [ ! -b /dev/vda ] && [ $i -lt 600 ]; do
	sleep 0.1
	i=$((i + 1))
done
mount -t ext4 /dev/vda /mnt || poweroff -f
mount --move /dev /mnt/dev
mount --move /proc /mnt/proc
mount --move /sys /mnt/sys
exec switch_root /mnt /usr/sbin/init
