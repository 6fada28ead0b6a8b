#!/bin/busybox sh
# SPDX-License-Identifier: GPL-2.0-only OR MIT
# The init of the guests (PV and PVH): becomes /agent when there is one, which then is the first
# process and loads the drivers of /mod as it likes. Else loads them and gives a shell.
# A guest whose command line names a root goes there, where the init of that system has /agent as a service.
/bin/busybox mount -t proc proc /proc
root=$(/bin/busybox sed -n 's/.*\broot=\([^ ]*\).*/\1/p' /proc/cmdline)
[ -z "$root" ] && [ -x /agent ] && exec /agent
/bin/busybox --install -s /bin
export PATH=/bin:/usr/bin:/usr/sbin HOME=/ TERM=dumb
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev

# Its files stay as they are: the agent is in /run, and so is its unit.
add_agent() {
	mkdir /run
	mount -t tmpfs -o mode=755 tmpfs /run
	cp /agent /run/agent
	units=/run/systemd/system
	mkdir -p $units/multi-user.target.wants
	cat >$units/guest-agent.service <<-TEXT
		[Unit]
		Description=The agent of the tests
		[Service]
		Type=exec
		ExecStart=/run/agent agent --in-system
	TEXT
	ln -s ../guest-agent.service $units/multi-user.target.wants/
}

if [ -n "$root" ]; then
	# The drivers of its disk and of its file system. All others that system has to load by itself.
	for m in /mod/*; do
		case $m in
		*xen-evtchn* | *xen-gnt* | *xen-privcmd* | *xenfs*) ;;
		*) insmod "$m" ;;
		esac
	done
	i=0
	while [ ! -b "$root" ] && [ $i -lt 600 ]; do
		sleep 0.1
		i=$((i + 1))
	done
	mount -t ext4 "$root" /mnt || exec poweroff -f
	add_agent
	for folder in dev proc sys run; do
		mount --move /$folder /mnt/$folder
	done
	exec switch_root /mnt /usr/sbin/init
fi

mkdir -p /dev/pts
mount -t devpts devpts /dev/pts
mount -t xenfs xenfs /proc/xen
for m in /mod/*; do
	insmod "$m"
done
exec setsid cttyhack sh
