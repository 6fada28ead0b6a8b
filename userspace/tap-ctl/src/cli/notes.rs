// SPDX-License-Identifier: MIT OR Apache-2.0
//! Text behind the options in `--help`, and in the notes of the manual page.

pub(super) const HELP: &str = "\
A target is DRIVER:IMAGE, DRIVER:SIZE or the address of an NBD export:
  aio:/srv/a.img      a raw file or block device, past the page cache
  sync:/srv/a.img     a raw file through the page cache, on file systems without direct I/O
  qcow2:/srv/a.qcow2  an image of that format; so are qcow:, vhd: and vmdk:, and vhdx:, which is only read
  luks:/srv/a.img     a raw image that is encrypted; key=/etc/xentap/a.key, in front names the file with its key, as for
                      an encrypted qcow2 image: key=/etc/xentap/a.key,qcow2:/srv/a.qcow2
  nbd://host/disk     an export of an NBD server; nbd+unix:///disk?socket=/run/a.sock is one of this host;
                      tls-ca=/etc/xentap/ca.pem, in front has it encrypted or not used, see tapdisk(8)
  cow:qcow2:/srv/a.qcow2
                      an image that stays as it is; writes are in memory until the disk is destroyed, at most 1G
                      or the number of room= in front: room=4G,cow:qcow2:/srv/a.qcow2
  ram:64M             memory of dom0; the content is there until the disk is destroyed; name=scratch, in front: that of
                      all disks of this host with that name, until the last one is destroyed
  null:64M            zeroes; writes are forgotten
At most 32M of the tables of an image are kept in memory; cache=128M, in front sets another number.
Backing images are read past dom0's page cache; below=cached, in front reads them through it, so that all images with
the same backing image share the cached data: below=cached,qcow2:/srv/a.qcow2
An image that several hosts reach has lease=record, in front, which lets one host at a time write it; so does
lease=record:/PATH, with the record at a path that all hosts have. The default is lease=lock, the lock of the image
itself, which other hosts see only on NFSv4 and cluster file systems. For a whole SCSI disk, an NVMe namespace or a map
of dm-multipath, lease=reservation, makes the storage itself refuse the writes of all others. Where sanlock orders the
storage, lease=sanlock:LOCKSPACE:RESOURCE:/PATH:OFFSET, takes a resource of it, which is made once with sanlock direct
init -r:
  lease=record,aio:/srv/a.img
  lease=sanlock:vms:a:/dev/vg/leases:1048576,aio:/dev/vg/a
  lease=reservation,aio:/dev/disk/by-id/wwn-0x5000c500a1b2c3d4
Where xl makes the disk, the options of create and set for errors stand in front by their names, too: on-no-space=,
on-error=, fail-after=, hung-after= and hung=. For that disk they override /etc/default/xentap:
  on-error=stop,fail-after=60,hung=kill,aio:/srv/a.img
A raw image or named memory that several guests write at once has shared=yes, in front where xl makes the disk, because
xl has no mode w!:
  shared=yes,name=scratch,ram:64M
The kernel itself serves an image of aio: where it can, beside its process (passthrough), which is faster and continues
while the process is replaced; direct=no, in front leaves it to the process, and direct=yes, enables it for another
format:
  direct=no,aio:/srv/a.img
  direct=yes,qcow2:/srv/a.qcow2

A disk is named as its owner does, by its guest and its name there: GUEST [VDEV], as in web xvda. GUEST is the guest's
name or number (xl list), VDEV the name of the configuration, such as xvda, or its number; it may be left out if the guest
has one tap disk. The node's number (-m MINOR) and the directory in xenstore (--vbd PATH) name it as well. A word that a
verb takes beside that, such as the target of mirror, is the last one.

Examples:
  tap-ctl list                          # what there is
  tap-ctl pause web xvda                # the guest waits, the image is closed
  tap-ctl unpause web xvda -a aio:/srv/b.img
  tap-ctl status                        # state of every disk, its cause, and the remedy
  tap-ctl top                           # the work of all disks, again and again
  tap-ctl set web xvda --bps 20M --iops 500 # no more than that in a second
  tap-ctl group set customer-7 --bps 100M # no more than that for all disks that are in it:
  tap-ctl set web xvda --group customer-7 # or group=customer-7, before the driver of a target
  tap-ctl events                        # what happens
  tap-ctl resize web xvda --size 20G    # makes it larger
  tap-ctl snapshot web xvda /srv/b.qcow2   # new writes go there; the present image is frozen
  tap-ctl snapshot web xvda /srv/b.qcow2 web xvdb /srv/d.qcow2   # both at one instant
  tap-ctl stream web xvda --wait        # copies the frozen image into the new one
  tap-ctl commit web xvda aio:/srv/a.img --wait   # or merges the new one into the frozen one
  tap-ctl mirror web xvda aio:/dev/vg/b --wait   # copies the disk there, and serves it from there
  tap-ctl migrate-out web beta          # the guest and its disks, to another host
  tap-ctl trace web xvda --output /dev/shm/web   # writes down what the guest asks for
  tap-ctl handoff web xvda              # a new process for the disk
  tap-ctl handoff --all                 # after an upgrade: new processes for all disks
  tap-ctl create -a aio:/srv/a.img      # a disk without a guest; prints its minor, its process and its size
  tap-ctl stats -m 0                    # such a disk by its minor
  tap-ctl destroy -m 0
  tap-ctl lease show /srv/a.img         # which host has it
  tap-ctl lease break /srv/a.img --holder-is-dead 7
  tap-ctl lease break /dev/mapper/lun7 --holder-is-dead 0x3fa2c00107abcdef
  tap-ctl lease break id=xen,rbd:vms/web --holder-is-dead 4123

For trace, handoff and snapshot a number alone is still that of a node, as before; the next release takes it for a guest.

A guest's disk is made by xl, not by hand:
  disk = [ 'script=block-tap-rs,vdev=xvda,target=aio:/srv/a.img' ]

Exit status, with the same numbers in all programs: 0 if all was done, 1 if a check found something or some disks were
left out, 2 for a wrong command line, 3 if the image or the disk is in use, 4 if there is no such disk or
image, 5 if blktapctrl does not answer, 6 if it failed for another reason, 7 if status or doctor found that a guest
waits or disks cannot be served. To destroy a disk that does not exist is 0.

blktapctrl may be started anew at any time: a command waits for it (--patience), and asks again if
that changes nothing. A pause, unpause or close that failed because storage did not answer in time
has begun all the same (`doing=` in the list): the same command again waits for its end.

A disk is listed with unknown= if blktapctrl does not understand its record, as after a downgrade.
Its process continues to serve it, and blktapctrl ignores it until tap-ctl adopt takes it over.";

pub(super) const SNAPSHOT_USAGE: &str = "\
tap-ctl snapshot [OPTIONS] GUEST [VDEV] NEW [GUEST [VDEV] NEW]...
       tap-ctl snapshot [OPTIONS] -m MINOR [-m MINOR]... NEW...";

pub(super) const SNAPSHOT: &str = "\
A number alone before NEW is still that of a node, as before; the next release takes it for a guest.

Examples:
  tap-ctl snapshot web xvda /srv/b.qcow2
  tap-ctl snapshot web xvda /srv/b.qcow2 web xvdb /srv/d.qcow2
  tap-ctl snapshot -m 0 -m 1 /srv/b.qcow2 /srv/d.qcow2";

pub(super) const MIRROR: &str = "\
Examples:
  tap-ctl mirror web xvda aio:/dev/vg/b --wait
  tap-ctl mirror web qcow2:/srv/b.qcow2
  tap-ctl mirror -m 0 aio:/dev/vg/b
  tap-ctl mirror web xvda --cancel";

pub(super) const COMMIT: &str = "\
Examples:
  tap-ctl commit web xvda aio:/srv/a.img --wait
  tap-ctl commit -m 0 aio:/srv/a.img
  tap-ctl commit web xvda --show";

pub(super) const TRACE: &str = "\
A number alone is still that of a node, as before; the next release takes it for a guest.

Examples:
  tap-ctl trace web xvda --output /dev/shm/web --data
  tap-ctl trace web xvda --end";

pub(super) const HANDOFF: &str = "\
A number alone is still that of a node, as before; the next release takes it for a guest.

Examples:
  tap-ctl handoff web xvda
  tap-ctl handoff --all";

pub(super) const STATUS: &str = "\
The worst disks come first. The exit status is that of all disks, or of those that GUEST and VDEV name, also with --sick;
it is 4 if there is no such guest or disk:
  tap-ctl status web                    # the disks of a guest
  tap-ctl status web xvda -x            # one disk, with its figures
  tap-ctl status --sick                 # what needs attention

Verdicts, with the exit status of the worst one:
  0  ok, not-connected (the guest does not use it yet, or any more), closed, inactive
  1  slow, failing, paused, unknown; or a file could not be read, or blktapctrl does not answer where this driver serves or
     is to
  7  hung, dead-process, fencing, held, no-driver

Causes are shown where there are counters:
  storage        requests take long, or an old one is not answered; the lowest device that has the time is named; or an
                 error of the image has stopped the disk
  process        the tapdisk hangs, has died, or uses a whole processor
  page-pool      requests wait for the driver's memory, or are done in pieces; the limit that is reached is named
  ring           the guest's rings were full most of the time; the disk is ok for all that is known here
  host-cpu       the thread that serves the disk, or all of this domain, waits for a processor
  guest          the guest's requests are malformed
  administrator  the administrator has paused it
There is no count of the time for which requests wait in the ring, or in the guest for room there, so no disk is called
slow for that; -x shows how full the rings were. A disk of the C driver, which counts no times, is judged by its
block device, which others may use as well.";
