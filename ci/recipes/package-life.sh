#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only OR MIT
# The life of the packages of binaries in /mnt/a on a Debian tree that is not kept: installed, decided for, changed by an
# administrator, installed again, removed, purged. $1 is the kernel's release.
set -eu
release=$1
modules=/usr/lib/modules/$release
# As the packages of the kernel and of Xen's tools leave them.
mkdir -p "$modules/kernel" /etc/xen/scripts
echo "Xen's" >/etc/xen/scripts/block

fail() {
	echo "$1" >&2
	exit 1
}
# What dpkg and its tools keep for themselves does not count.
files() {
	find / -xdev \( -path /proc -o -path /sys -o -path /dev -o -path /mnt -o -path /tmp -o -path /run \
		-o -path /var -o -path /etc/passwd\* -o -path /etc/shadow\* -o -path /etc/group\* -o -path /etc/gshadow\* \
		-o -path "$modules/modules.*" -o -path /etc/.pwd.lock \) -prune -o -print | sort
}
# There is no image of a kernel here, and no systemd.
install() {
	dpkg --force-depends -i /mnt/a/xen-blkback-rs_*.deb "/mnt/a/xen-blkback-rs-modules-$release"_*.deb >/tmp/log 2>&1 ||
		fail "the packages cannot be installed: $(grep -v WARNING /tmp/log | tail -n9)"
}

files >/tmp/before
install
modinfo -k "$release" xen-blkback-rs >/tmp/modinfo || fail "the module is not in the kernel's index"
grep -q ^xentap: /etc/passwd || fail "the user of the disks' processes is missing"
[ ! -e /etc/modprobe.d/xen-blkback-rs.conf ] || fail "installing has decided which driver serves"
[ "$(cat /etc/xen/scripts/block)" = "Xen's" ] || fail "installing has changed Xen's script"
daemons=/usr/libexec/xen-blkback-rs
for program in tap-ctl tapimg $daemons/blktapctrl $daemons/tapdisk xen-blkback-takeover; do
	"$program" --version >/dev/null || fail "$program does not run"
	program=${program##*/}
	man=$(find /usr/share/man -name "$program.8.gz")
	zcat "$man" | mandoc -T lint -W error || fail "the manual page of $program has errors"
done

xen-blkback-rs enable >/tmp/enable || fail "enable has failed"
xen-blkback-rs status | grep -qx 'decided: xen-blkback-rs' || fail "it is not decided for"
modprobe -S "$release" --showconfig | grep -q '^install xen_blkback .*modprobe -q xen-blkback-rs' ||
	fail "the module loader does not read what was decided"
# A kernel that is locked down, and what modinfo says of a module without a signature and of one with it.
locked=/tmp/locked
mkdir $locked
echo 'none [integrity] confidentiality' >$locked/lockdown
echo '#!/bin/sh
case "$*" in *sig_id*) cat /tmp/locked/signature 2>/dev/null ;; esac; true' >$locked/modinfo
chmod 755 $locked/modinfo
on_locked() {
	PATH=$locked:$PATH XEN_BLKBACK_RS_SECURITY_DIR=$locked xen-blkback-rs "$1"
}
for verb in enable status; do
	rm -f $locked/signature
	on_locked $verb | grep -q 'not signed' || fail "$verb: it is not said that the module will be refused"
	echo 'PKCS#7' >$locked/signature
	! on_locked $verb | grep -q 'not signed' || fail "$verb: a module that is signed is said to be refused"
done

xentap-block enable
[ "$(readlink /etc/xen/scripts/block)" = block-or-tap ] || fail "our script is not in place"
echo 'CREATE_OPTIONS="--kill-hung"' >/etc/default/xentap

install
grep -q kill-hung /etc/default/xentap || fail "an upgrade has thrown an administrator's settings away"
xen-blkback-rs status | grep -qx 'decided: xen-blkback-rs' || fail "an upgrade has changed the decision"

# A disk is there: the class of the nodes, as the kernel shows it.
disk=/sys/class/xentap
if mount -t tmpfs none /sys/class 2>/dev/null && mkdir -p "$disk/xentap!0" "$disk/xentap!control"; then
	! dpkg -r xen-blkback-rs >/tmp/log 2>&1 || fail "the package was removed below a disk"
	rmdir "$disk/xentap!0"
else
	fail "no disk can be shown to the package"
fi

dpkg -r xen-blkback-rs "xen-blkback-rs-modules-$release" >/tmp/log 2>&1 ||
	fail "the packages cannot be removed: $(grep -v WARNING /tmp/log | tail -n9)"
# systemd's own links go when a package is purged.
left=$(find /etc -path /etc/systemd -prune -o -xtype l -newer /tmp/before -print)
[ -z "$left" ] || fail "links are left behind: $left"
[ "$(cat /etc/xen/scripts/block)" = "Xen's" ] || fail "Xen's script is not back"
! modinfo -k "$release" xen-blkback-rs >/dev/null 2>&1 || fail "the module is still in the index"
dpkg -P xen-blkback-rs "xen-blkback-rs-modules-$release" >/tmp/log 2>&1 || fail "the packages cannot be purged"
files >/tmp/after
diff /tmp/before /tmp/after || fail "something is left behind or gone"
