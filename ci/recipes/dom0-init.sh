#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only OR MIT
# The init of the test machine's dom0: what Xen's init scripts do, then /t/run, then power off. A machine without Xen
# has it as well.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb
for l in "fd fd" "stdin fd/0" "stdout fd/1" "stderr fd/2"; do
	set -- $l
	ln -sfn "/proc/self/$2" "/dev/$1"
done
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir -p /run/lock /run/xen
mount -t debugfs debugfs /sys/kernel/debug
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /var/log
mkdir -p /var/log/xen /var/lib/xen /var/lib/xenstored
ip link set lo up

# As systemd does at the first boot. A lease tells hosts apart by it.
tr -d - </proc/sys/kernel/random/uuid >/etc/machine-id

# What a package would have installed is laid over the root before any driver is loaded.
mkdir -p /t
tar -xf /dev/vdb -C /t
if [ -d /t/overlay ]; then
	cp -a /t/overlay/. /
fi

/usr/lib/systemd/systemd-udevd --daemon
modprobe virtio_console
udevadm trigger --action=add --subsystem-match=virtio-ports --subsystem-match=block
udevadm wait --timeout=60 /dev/virtio-ports/report || busybox poweroff -f
export REPORT=/dev/virtio-ports/report
start_xen() {
	mount -t xenfs xenfs /proc/xen
	for m in xen-evtchn xen-gntdev xen-gntalloc xen-privcmd; do
		modprobe "$m" 2>/dev/null
	done
	grep -q noblkback /proc/cmdline || modprobe xen-blkback
	bin=$(echo /usr/lib/xen-4*/bin)
	store=oxenstored
	grep -q xenstored=c /proc/cmdline && store=xenstored
	"$bin/$store" --pid-file=/run/xenstored.pid
	i=0
	while ! xenstore-ls / >/dev/null 2>&1 && [ $i -lt 600 ]; do
		sleep 0.1
		i=$((i + 1))
	done
	# It must be the first to write local/domain/0/domid.
	"$bin/xen-init-dom0" >/dev/null
	"$bin/xenconsoled" --pid-file=/run/xenconsoled.pid --log=all --log-dir=/var/log/xen
	# What systemd would do with what a package has installed, and what an init script does without it.
	supervisor=/usr/libexec/xen-blkback-rs/blktapctrl
	if [ -x $supervisor ]; then
		systemd-sysusers /usr/lib/sysusers.d/xentap.conf
		$supervisor --foreground >>/var/log/blktapctrl.log 2>&1 &
	fi
}
# A machine beside the Xen hosts has a kernel and no Xen.
grep -q noxen /proc/cmdline || start_xen
echo "dom0 is up after $(cut -d' ' -f1 /proc/uptime) s"
cd /root
/t/run
echo "dom0: /t/run ended with $?"
sync
exec busybox poweroff -f
