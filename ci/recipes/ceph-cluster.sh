#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only OR MIT
# Makes a new Ceph cluster on this machine, with the disk $2 below its storage: a monitor, a manager and three OSDs,
# which listen on the address $1. Each object is there three times, and two copies are enough to go on.
# The daemons are started by hand: tools such as ceph-volume want systemd, LVM and a disk for each OSD.
set -eu
address=$1 disk=$2
store=/var/lib/ceph
mkfs.ext4 -q "$disk"
mkdir -p $store /etc/ceph /run/ceph /var/log/ceph
mount "$disk" $store
mkdir $store/mon $store/mgr

# Memory: an OSD takes what it finds for its cache, down to 900 MB. These caches are small and of a fixed size.
# Idle daemons use much of an emulated processor, so they look after their caches less often than 20 times in a second.
# The modules of the manager do not start in Debian 13, and none is needed: without a pool of its own it counts only.
fsid=$(cat /proc/sys/kernel/random/uuid)
cat >/etc/ceph/ceph.conf <<TEXT
[global]
fsid = $fsid
mon host = [v2:$address:3300,v1:$address:6789]
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
TEXT
cat >/etc/ceph/daemons.conf <<TEXT
$(cat /etc/ceph/ceph.conf)
public addr = $address
osd pool default size = 3
osd pool default min size = 2
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mgr pool = false
pid file = /run/ceph/\$name.pid
[mon]
mon data = $store/mon
auth allow insecure global id reclaim = false
[mgr]
mgr data = $store/mgr
mgr stats period = 2
[osd]
osd data = $store/\$name
bluestore block size = 2147483648
bluestore cache autotune = false
bluestore cache size = 67108864
bluestore cache trim interval = 2
TEXT
# Debian's daemons look for their plugins, such as the operations on images, below their folder, which systemd makes /.
daemon() {
	(cd / && exec "$@" --conf /etc/ceph/daemons.conf)
}
admin=/etc/ceph/ceph.client.admin.keyring
ceph-authtool --create-keyring $store/mon.keyring --gen-key -n mon. --cap mon 'allow *'
ceph-authtool --create-keyring $admin --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
ceph-authtool $store/mon.keyring --import-keyring $admin
monmaptool --create --fsid "$fsid" --addv a "[v2:$address:3300,v1:$address:6789]" $store/monmap
daemon ceph-mon --mkfs -i a --monmap $store/monmap --keyring $store/mon.keyring
daemon ceph-mon -i a
ceph auth get-or-create mgr.x mon 'allow profile mgr' osd 'allow *' mds 'allow *' -o $store/mgr/keyring
daemon ceph-mgr -i x
# Registers an OSD, and gives it its key.
add_osd() {
	local id=$1 uuid secret
	uuid=$(cat /proc/sys/kernel/random/uuid)
	secret=$(ceph-authtool --gen-print-key)
	mkdir "$store/osd.$id"
	echo "$uuid" >"$store/osd.$id/uuid"
	echo "{\"cephx_secret\": \"$secret\"}" | ceph osd new "$uuid" "$id" -i -
	ceph-authtool --create-keyring "$store/osd.$id/keyring" -n "osd.$id" --add-key "$secret"
}
# Formats an OSD, and starts it. Returns when it is up, most of which it waits.
start_osd() {
	daemon ceph-osd -i "$1" --mkfs --osd-uuid "$(cat "$store/osd.$1/uuid")"
	daemon ceph-osd -i "$1"
}
starting=()
for id in 0 1 2; do
	add_osd $id
	start_osd $id &
	starting+=($!)
done
for process in "${starting[@]}"; do
	wait "$process"
done

# The pool of disks, and a user with no more than the right to use images.
ceph osd pool create vms 8
ceph osd pool application enable vms rbd
ceph auth get-or-create client.xen mon 'profile rbd' osd 'profile rbd' -o /etc/ceph/ceph.client.xen.keyring
