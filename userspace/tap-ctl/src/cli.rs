// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command line.

mod backup;
mod disk;
mod migrate;

use crate::events::Events;
use crate::group::GroupVerb;
use crate::status::verdict::{HUNG_S, SLOW_MS};
pub(crate) use backup::{Backup, BackupCompression, BackupVerb, Restore};
use clap::{Args, Parser, Subcommand, ValueEnum};
use control::supervisor::{HungAction, Mode};
use control::tapdisk::{Engine, OnError};
use control::{Driver, GroupName, InGroup, MarkName, NewSize, Target};
pub(crate) use disk::{Handoff, Mirror, Snapshot, Trace, Which};
use manual::Generated;
pub(crate) use migrate::MigrateOut;
use std::path::PathBuf;

/// Heading of the options that each verb has, so that they are not among its own.
const EVERY: &str = crate::help::OPTIONS;

/// Make, watch and take away disks that a process serves to Xen guests.
///
/// `create` and `destroy` do all that a disk needs; xl's script block-tap-rs uses them. `allocate`, `spawn`, `attach`,
/// `open`, `close`, `detach` and `free` are the single steps, with the names that blktap2's tap-ctl gave them.
/// The output is this program's own: XCP-ng's storage manager cannot read that of `list`.
#[derive(Debug, Parser)]
#[command(name = "tap-ctl", version, after_long_help = HELP)]
pub(crate) struct Cli {
    /// Print JSON, for programs
    #[arg(long, global = true, help_heading = EVERY)]
    pub(crate) json: bool,
    /// Socket of the supervisor blktapctrl
    #[arg(
        long,
        global = true,
        help_heading = EVERY,
        value_name = "PATH",
        default_value = "/run/xentap/control.sock"
    )]
    pub(crate) socket: PathBuf,
    /// Wait for so many seconds for blktapctrl, should it be starting anew
    #[arg(long, global = true, help_heading = EVERY, value_name = "SECONDS", default_value_t = 30)]
    pub(crate) patience: u32,
    /// A folder that stands for / where files of the kernel and the system are read
    #[arg(
        long,
        global = true,
        hide = true,
        value_name = "DIR",
        default_value = "/"
    )]
    pub(crate) root: PathBuf,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

const HELP: &str = "\
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

Exit status, as of all programs (docs/reference/exit-codes.md): 0 if all was done, 1 if a check found something or some
disks were left out, 2 for a wrong command line, 3 if the image or the disk is in use, 4 if there is no such disk or
image, 5 if blktapctrl does not answer, 6 if it failed for another reason, 7 if status or doctor found that a guest
waits or disks cannot be served. To destroy a disk that does not exist is 0.

blktapctrl may be started anew at any time: a command waits for it (--patience), and asks again if
that changes nothing. A pause, unpause or close that failed because storage did not answer in time
has begun all the same (`doing=` in the list): the same command again waits for its end.

A disk is listed with unknown= if blktapctrl does not understand its record, as after a downgrade.
Its process continues to serve it, and blktapctrl ignores it until tap-ctl adopt takes it over.";

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// List disks, and processes without one: a table on a terminal, else words name=value
    List(List),
    /// Make a node, and print its minor number
    Allocate(Allocate),
    /// Take a node away that has no process, also one that blktapctrl does not know
    Free {
        /// The node
        #[arg(short, long)]
        minor: u32,
    },
    /// Start a process without a disk, and print its number
    Spawn,
    /// Give a node to a process without one
    Attach(ProcessNode),
    /// Take the node from a process whose image is closed; the process ends
    Detach(Which),
    /// Open an image
    Open(Open),
    /// Close the image; requests of the guest wait
    Close(Close),
    /// Finish what is running, and close the image until unpause; requests of the guest wait
    Pause(Pause),
    /// Resume a disk, perhaps with another image
    Unpause(Unpause),
    /// Replace the process of a disk by a new one, such as one of a newer program, while the guest works
    ///
    /// The new process is started and looks at the image while the old one serves. Then the old one finishes what it
    /// has, the new one takes the disk, and the old one ends when that serves. The guest waits in between, and sees no
    /// error. If the new process fails at anything, the old one continues to serve the disk.
    #[command(after_help = HANDOFF)]
    Handoff(Handoff),
    /// Switch a disk to a new image over the present one, which keeps the content of that moment
    ///
    /// The guest's writes until then are made durable in the present image, which becomes the read-only parent of the
    /// new one; later writes are in the new one only. The guest waits meanwhile, and sees no error. If the new image
    /// cannot be made or served, the disk is served from the old one as before, and nothing of the new one is left.
    ///
    /// THE CONFIGURATION OF THE DISK STILL NAMES THE OLD IMAGE: it must name the new one before the guest reboots, also
    /// in the copy that xl keeps (xl config-update GUEST FILE), or the guest ends there. The old image is marked as
    /// read-only, and blktapctrl refuses to serve it for writing: a file by chmod a-w, a block device by a record in
    /// /var/lib/xentap/frozen. Other programs, and phy disks, do not heed that. With that mark, and in the same folder, the
    /// process of each disk that has the new image may open it; otherwise name it with --files, as any device.
    ///
    /// If several disks are named, such as those of a guest, all switch at one instant: none is served from its new
    /// image before all have released their old ones, and if one cannot, all are served as before.
    ///
    /// Not for disks with the mode r, r! or w!, or with a lease.
    #[command(override_usage = SNAPSHOT_USAGE, after_help = SNAPSHOT)]
    Snapshot(Snapshot),
    /// Make a disk larger, or read its image's size again, while its guest works
    Resize(Resize),
    /// Change the rate limits and the error policy of a disk, while the guest works
    ///
    /// A guest that asks for more than it may waits; nothing fails by that. With a limit every request goes through the
    /// disk's process: the kernel, which could execute many without the process, knows no limits. The settings stay
    /// until the disk is destroyed. A disk of a guest's configuration has them there, before the driver:
    /// target=bps=20M,iops=500,on-error=stop,aio:/srv/a.img
    ///
    /// With --group a disk shares limits with others, beside its own: `tap-ctl group`.
    ///
    /// Prints what holds then. `tap-ctl stats` says how many requests waited for their limit, and how long.
    Set(Set),
    /// Limits that several disks share, such as all disks of a guest or of a customer
    ///
    /// A disk is in a group from the beginning if its target has the name before the driver,
    /// target=group=NAME,aio:/srv/a.img; tap-ctl set --group moves it into one or out of it while its guest works.
    /// blktapctrl divides the limits of the group among its disks several times in a second: a disk with few requests
    /// gets what it needs, and the others equal parts of the rest. A disk that begins to work has its part within a
    /// second. A burst is divided in the same way. While blktapctrl is not running each disk has an equal part.
    ///
    /// A group is there until it is taken away or the host boots again: make it before its guests are started.
    Group {
        /// Action
        #[command(subcommand)]
        verb: GroupVerb,
    },
    /// Read all data of a disk in the background, to find unreadable parts
    ///
    /// Events report them, and stats show the progress.
    Scrub(Scrub),
    /// Copy the backing images of a disk, such as those of snapshots, into its image while its guest works, so that it
    /// needs them no more
    ///
    /// All that shows through of the images below (`qemu-img info --backing-chain`, `tapimg info`) is copied into the
    /// disk's image: then they may be removed, if they are no other image's backing images. The copy continues when the
    /// disk's process or blktapctrl is replaced. Whenever it ends, the disk is the same: what was copied stays, and the
    /// next stream finds the rest. For qcow2 without internal snapshots.
    Stream(Stream),
    /// Copy a disk to another image, of any format and on any storage, while its guest works, and then serve it from
    /// that
    ///
    /// The image must be there, and as large as the disk at least: make it with tapimg create, or lvcreate. It may be
    /// an export of a server, as in nbd://HOST/NAME; if that is away for 30 s, the copy is given up. Its contents are
    /// lost. The guest's writes go to both images, in the part that has been copied. When both are equal, the disk
    /// switches to the new one; the old one keeps the disk's content of that moment, and is marked as read-only (chmod
    /// a-w). Then the disk's configuration must name the new one. If something goes wrong, the disk stays with the
    /// image that it has, and its guest does not notice. When the disk's process is replaced, copying begins anew.
    #[command(
        override_usage = "tap-ctl mirror [OPTIONS] GUEST [VDEV] TARGET\n       tap-ctl mirror [OPTIONS] -m MINOR TARGET",
        after_help = MIRROR
    )]
    Mirror(Mirror),
    /// Copy the blocks of a disk's image into its backing image while its guest works, and then serve it from that one
    ///
    /// This ends a snapshot that is no longer needed: the chain is one image shorter, and only the writes since the
    /// snapshot are copied. No other disk may have the image below, and it may be no other image's backing image: its
    /// content changes from the first byte on. Then the disk's configuration must name the image below; the one above
    /// is marked as read-only (chmod a-w), and can be removed. If something goes wrong, the disk stays with the image
    /// that it has, and its guest does not notice; what is below keeps its mark as read-only then, and is of use only
    /// below it. When the disk's process is replaced, it begins anew. For VHD, and for qcow2 without internal
    /// snapshots, over an image of any format that is as large and has no larger clusters.
    #[command(
        override_usage = "tap-ctl commit [OPTIONS] GUEST [VDEV] TARGET\n       tap-ctl commit [OPTIONS] -m MINOR TARGET",
        after_help = COMMIT
    )]
    Commit(Mirror),
    /// Track which blocks a guest writes from a moment on, and list the changed ones, for incremental backups
    ///
    /// A copy that misses nothing, and after which the next one is as short:
    ///
    /// First set a mark, such as --mark monday. Then take a snapshot (tap-ctl snapshot): the image that the disk had
    /// does not change any more. From that copy all that --since says of the mark of the copy before, or, the first
    /// time, all of it. Then forget the mark before. The guest's writes between the mark and the snapshot are in this
    /// copy and in the next one.
    ///
    /// --since prints a line for each part that may be different: its offset and its length, in bytes. It says rather
    /// too much than too little, and a part that it does not name is the same as it was at the mark. Marks outlive the
    /// disk's process and blktapctrl, snapshots, and a move to another image (mirror, commit). They are gone with the
    /// disk, with the host, when tap-ctl unpause resumes the disk, because any program may have changed its image
    /// before that, and when it becomes smaller: events report that. Without its mark a copy takes all. With marks
    /// every request goes through the disk's process, and none is executed by the kernel alone.
    ///
    /// Programs that speak NBD find each mark as qemu:dirty-bitmap:NAME at the socket of a disk that has one, such as
    /// nbdinfo --map and qemu-img map with x-dirty-bitmap.
    ///
    /// Without --mark, --since or --forget it lists the marks of the disk. For disks with the mode w.
    Dirty(Dirty),
    /// Back up disks of a guest while it works: all the first time, and the changes from then on
    ///
    /// The copy is of one instant, as after a power cut: a snapshot freezes the disks while tapimg copies them, and is
    /// merged afterwards, so that the guest's configuration and its chain of images stay as they are. Each backup is a
    /// qcow2 image over that of the backup before, with a manifest beside it that has its checksum. Both have their
    /// names only when the copy was compared with the disk.
    ///
    /// A backup that is killed leaves the ones before as they are, and the next one undoes or finishes it first. If the
    /// changes are not known, because the guest was started again, say, a full backup is taken. While a disk has
    /// backups, a dirty bitmap tracks its changes, and every request goes through the disk's process.
    ///
    /// A terminal shows how far the copy is, except with --json.
    ///
    /// Not for disks with the mode r, r! or w!, with a lease, or that are encrypted.
    Backup(Box<Backup>),
    /// Move a guest to another host with its tap disks, which no storage shares, while it works
    ///
    /// Each disk is copied to an image of HOST, to which it then switches, and `xl migrate` moves the guest. HOST serves
    /// the image until this host has released it.
    ///
    /// Not for disks that are encrypted, that have a lease, or that several guests write. Disks of the kernel (phy)
    /// must be on storage that both hosts reach.
    MigrateOut(MigrateOut),
    /// Make an image of a backup, after a check of all backups that it needs
    ///
    /// An image that a disk uses is refused: shut the guest down first, or make a new image.
    Restore(Restore),
    /// Write down what the guest of a disk asks for, to see how what is on the disk came to be there
    ///
    /// The file is a ring: it keeps its size, and the oldest requests are lost. Each request is there with its number,
    /// the time since the trace began, what it asks for and where, and what became of it; with --data also what it
    /// writes. tapimg replay lists them, and does them again on a copy of the disk: any part, up to any request.
    ///
    /// A trace begins when no request is under way, outlives the disk's process and blktapctrl, and continues over
    /// hand-offs, pauses, snapshots, and moves to another image (mirror, commit). It ends with --end, with the disk,
    /// and when its file cannot be extended or is gone: events report that, and the disk continues. The file stays, and
    /// is root's. It has the room that it needs from the beginning, where its file system can do that. It need not
    /// survive a crash of the host.
    ///
    /// With a trace every request goes through the disk's process, none is executed by the kernel alone, and each costs
    /// one more call of the system, and with --data two more copies of the data of a write. Requests wait for the
    /// storage of the file only if the host has no room for dirty pages: use storage that is as fast as the disk, or
    /// memory (/dev/shm), and not the storage of the disk.
    ///
    /// Without --output and --end it says what is on.
    #[command(after_help = TRACE)]
    Trace(Trace),
    /// Show the counters of a disk since it was made, or since its process and blktapctrl ended at once
    Stats(Which),
    /// Make a disk and serve it
    Create(Create),
    /// Take a disk away, with its process and its node
    Destroy(Destroy),
    /// Say whether an image can be found and may be used; change nothing
    ///
    /// Its backing images are found and checked only when a disk is made: tapimg info --chain names those that would be
    /// refused.
    #[command(alias = "check")]
    Probe(Probe),
    /// Have all disks let go of the kernel's module, so that it can be exchanged: xen-blkback-rs exchange does that
    ///
    /// No guest may be attached to one. Their processes end in order, and their nodes go; their images, their memory
    /// and their numbers stay theirs. If one cannot, all are served as before. Disks that are to be made wait a while.
    Park {
        /// Seconds that a disk gets
        #[arg(long, default_value_t = 5)]
        timeout: u32,
    },
    /// Resume all parked disks, with the module that is loaded now
    Unpark,
    /// Take over a disk that is listed as unknown: blktapctrl makes its record anew
    Adopt {
        /// The node
        #[arg(short, long)]
        minor: u32,
    },
    /// Remove the record of a disk that is listed as unknown; its process and its node stay. Or end the wait for the
    /// lease of a disk that is being destroyed, which stays held
    Forget {
        /// The node
        #[arg(short, long)]
        minor: u32,
    },
    /// Show or break the lease that decides which host may write an image
    Lease {
        /// Action
        #[command(subcommand)]
        verb: LeaseVerb,
    },
    /// Say how every disk of the host is, those of the kernel (phy) too: why one is slow, and what to do
    Status(Status),
    /// Say whether this host has what serving disks needs, and what to do if not
    ///
    /// The exit status is 0 if all is well, 1 if an administrator should look at a finding, 7 if disks cannot be
    /// served.
    ///
    /// The initramfs of the running kernel is looked into with lsinitramfs or lsinitrd, where there is one: for a
    /// driver that it loads early, an earlier copy of the module, and settings that it lacks.
    Doctor,
    /// Print the facts that are needed to find a fault of this host
    ///
    /// These are the output of doctor and status, all disks with their counters and records, the driver's parameters,
    /// Xen's view, and the kernel's and blktapctrl's messages. It names disks, images, guests and this host, and holds
    /// nothing of what is on the disks. Nothing is changed. The report waits at most 20 seconds for a program that
    /// hangs.
    Report(Report),
    /// Print what all disks have counted for Prometheus, those of the kernel (phy) too
    ///
    /// xentap-metrics.timer writes it for the textfile collector of node_exporter: nothing listens for it. Alerts and a
    /// dashboard of Grafana are in /usr/share/xen-blkback-rs.
    Metrics(Metrics),
    /// Show what all disks are doing, those of the kernel (phy) too, again and again: the busiest first, with
    /// the figures since the last picture
    ///
    /// On a terminal keys are heard: arrows, j, k, PgUp and PgDn select a disk, Enter or d shows all figures of it and
    /// what status says of it, / chooses disks of a guest, by its number or a part of its name, or with a text in their
    /// target, < and > or the letter of a column sort by another one, r turns the order round, + and - change the
    /// interval, space keeps the picture, ? tells all keys, and q, Esc or Ctrl-C quit. Columns that do not fit into a
    /// line are left out. A picture that is older than it should be says so: blktapctrl, or the kernel because of
    /// storage, has not answered. Through a pipe, with -n and with --json, and where TERM is dumb, pictures are printed
    /// one after the other, with all columns.
    ///
    /// RDms, WRms and FLms are the mean times of the guest's reads, writes and flushes, from when the driver gave them
    /// to the storage or the process until their end; the wait for pages is not in them. DISKms is that of requests on
    /// the block device of a phy disk, whoever they are from; of a tap disk 99 of 100 requests took less than 99%us.
    /// WAIT is what waits for its process, BUSY what that or, of a phy disk, the driver has.
    Top(Top),
    /// Print what happens, from now on
    Events(Events),
    /// Freeze a guest's file systems, and thaw them when the standard input ends, for backup
    #[command(hide = true)]
    FreezeGuard {
        /// Guest and means, as JSON
        means: String,
        /// Longest time
        seconds: u64,
    },
    /// Print the guests and disks that may follow, for completion
    #[command(hide = true)]
    Complete {
        /// Words after the verb
        #[arg(allow_hyphen_values = true, trailing_var_arg = true)]
        words: Vec<String>,
    },
    /// Print a completion script or the manual page
    #[command(hide = true)]
    Generate {
        /// Kind of the output
        what: Generated,
    },
}

const SNAPSHOT_USAGE: &str = "\
tap-ctl snapshot [OPTIONS] GUEST [VDEV] NEW [GUEST [VDEV] NEW]...
       tap-ctl snapshot [OPTIONS] -m MINOR [-m MINOR]... NEW...";

const SNAPSHOT: &str = "\
A number alone before NEW is still that of a node, as before; the next release takes it for a guest.

Examples:
  tap-ctl snapshot web xvda /srv/b.qcow2
  tap-ctl snapshot web xvda /srv/b.qcow2 web xvdb /srv/d.qcow2
  tap-ctl snapshot -m 0 -m 1 /srv/b.qcow2 /srv/d.qcow2";

const MIRROR: &str = "\
Examples:
  tap-ctl mirror web xvda aio:/dev/vg/b --wait
  tap-ctl mirror web qcow2:/srv/b.qcow2
  tap-ctl mirror -m 0 aio:/dev/vg/b
  tap-ctl mirror web xvda --cancel";

const COMMIT: &str = "\
Examples:
  tap-ctl commit web xvda aio:/srv/a.img --wait
  tap-ctl commit -m 0 aio:/srv/a.img
  tap-ctl commit web xvda --show";

const TRACE: &str = "\
A number alone is still that of a node, as before; the next release takes it for a guest.

Examples:
  tap-ctl trace web xvda --output /dev/shm/web --data
  tap-ctl trace web xvda --end";

const HANDOFF: &str = "\
A number alone is still that of a node, as before; the next release takes it for a guest.

Examples:
  tap-ctl handoff web xvda
  tap-ctl handoff --all";

/// The lease of an image: `lease=record`, `lease=reservation` or `lease=sanlock` of a target. This asks the storage or
/// sanlock, not blktapctrl.
#[derive(Debug, Subcommand)]
pub(crate) enum LeaseVerb {
    /// Say who has it: of a reservation its key, the host if it is this one, else a part of its number; of a lease of
    /// sanlock's the host's number in the lockspace, and whether it lives; of an image of Ceph its clients, a line for
    /// each, which may be programs as well as hosts
    Show {
        /// A target, or the absolute path of an image
        image: String,
    },
    /// Take it away from a holder whose host is dead, which no program can know, and leave it free
    ///
    /// A record is watched for 13 seconds: its holder must be silent. Of a reservation the storage first ends what its
    /// holder has under way, and refuses from then on what it writes: should it live, its disk stops. A lease of
    /// sanlock's is not broken: sanlock gives it to the next host once a watchdog has reset the dead one. A client of an
    /// image of Ceph is put on the cluster's blocklist for 30 days: should it live, all its disks stop.
    Break {
        /// A target, or the absolute path of an image
        image: String,
        /// You say that the holder of this generation, of this key, or the client with this number (see show), is dead:
        /// its host was powered off, and nothing of its I/O can reach the storage any more
        #[arg(long, value_name = "GENERATION|KEY|CLIENT", value_parser = number)]
        holder_is_dead: u64,
    },
}

/// A number as `lease show` shows it: a generation, or a key.
fn number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| {
        "write what `tap-ctl lease show TARGET` says: a number, or a key with its 0x".into()
    })
}

/// Filter for the list: disks must match every given option.
#[derive(Debug, Args)]
pub(crate) struct List {
    /// Of this guest: its name or its number, as in xl list
    #[arg(value_name = "GUEST")]
    pub(crate) guest: Option<String>,
    /// With this name in the guest, such as xvda, or this number
    #[arg(value_name = "VDEV", requires = "guest")]
    pub(crate) vdev: Option<String>,
    /// Of this process
    #[arg(short, long)]
    pub(crate) pid: Option<u32>,
    /// With this node
    #[arg(short, long)]
    pub(crate) minor: Option<u32>,
    /// Of this driver
    #[arg(short = 't', long = "type")]
    pub(crate) driver: Option<Driver>,
    /// Of this image
    #[arg(short, long)]
    pub(crate) file: Option<PathBuf>,
}

/// Behaviour of a disk on errors.
#[derive(Debug, Args)]
pub(crate) struct Policy {
    /// Fail requests after so many seconds without a process; 0 holds them for ever
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub(crate) fail_after: u32,
    /// Fail a request when so many processes have died of it, and nothing else; 0 tries it for ever
    #[arg(long, value_name = "NUMBER", default_value_t = 3, value_parser = clap::value_parser!(u32).range(..=255))]
    pub(crate) max_deaths: u32,
    /// Call a process hung that answers nothing for so many seconds; 0 for never
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub(crate) hung_after: u32,
    /// Kill a process that is hung, so that it is replaced; else only an event tells
    #[arg(long)]
    pub(crate) kill_hung: bool,
    /// Action when the image has no room for a write
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = ErrorName::Stop)]
    pub(crate) on_no_space: ErrorName,
    /// Action when I/O on the image fails for another reason
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = ErrorName::Report)]
    pub(crate) on_error: ErrorName,
    /// Let the guest read and write no more bytes than this in a second, such as 20M; 0 for as many as there are
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = control::typed_rate)]
    pub(crate) bps: u64,
    /// Execute no more of its requests than this in a second, such as 500 or 20k; 0 for as many as there are
    #[arg(long, value_name = "NUMBER", default_value = "0", value_parser = control::typed_requests)]
    pub(crate) iops: u32,
    /// After a rest, let it do at once what it may do in so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 1)]
    pub(crate) burst: u32,
    /// Let it share the limits of a group, too (tap-ctl group)
    #[arg(long, value_name = "NAME")]
    pub(crate) group: Option<GroupName>,
}

/// Changes of a disk's policy. Other settings stay.
#[derive(Debug, Args)]
pub(crate) struct Set {
    #[command(flatten)]
    pub(crate) which: Which,
    #[command(flatten)]
    pub(crate) what: Changed,
}

/// The changed settings, at least one.
#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub(crate) struct Changed {
    /// Let the guest read and write no more bytes than this in a second, such as 20M; 0 for as many as there are
    #[arg(long, value_name = "BYTES", value_parser = control::typed_rate)]
    pub(crate) bps: Option<u64>,
    /// Execute no more of its requests than this in a second, such as 500 or 20k; 0 for as many as there are
    #[arg(long, value_name = "NUMBER", value_parser = control::typed_requests)]
    pub(crate) iops: Option<u32>,
    /// After a rest, let it do at once what it may do in so many seconds
    #[arg(long, value_name = "SECONDS")]
    pub(crate) burst: Option<u32>,
    /// Let it share the limits of a group, too (tap-ctl group), or take it out of its group with none
    #[arg(long, value_name = "NAME|none")]
    pub(crate) group: Option<InGroup>,
    /// Action when the image has no room for a write
    #[arg(long, value_enum, value_name = "WHAT")]
    pub(crate) on_no_space: Option<ErrorName>,
    /// Action when I/O on the image fails for another reason
    #[arg(long, value_enum, value_name = "WHAT")]
    pub(crate) on_error: Option<ErrorName>,
    /// Call a process hung that answers nothing for so many seconds; 0 for never
    #[arg(long, value_name = "SECONDS")]
    pub(crate) hung_after: Option<u32>,
    /// Kill a process that is hung, so that it is replaced, or only tell of it
    #[arg(long, value_enum, value_name = "WHAT")]
    pub(crate) hung: Option<HungName>,
}

/// Action on a process that is hung.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum HungName {
    /// An event tells
    Report,
    /// blktapctrl kills the process, and the next one executes its requests
    Kill,
}

impl From<HungName> for HungAction {
    fn from(name: HungName) -> HungAction {
        match name {
            HungName::Report => HungAction::Report,
            HungName::Kill => HungAction::Kill,
        }
    }
}

/// Action when I/O on an image fails. An event reports the failure in any case.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum ErrorName {
    /// The guest sees the error
    Report,
    /// The guest waits: the disk is paused with the request, which is tried again when it is unpaused
    Stop,
}

impl From<ErrorName> for OnError {
    fn from(name: ErrorName) -> OnError {
        match name {
            ErrorName::Report => OnError::Report,
            ErrorName::Stop => OnError::Stop,
        }
    }
}

/// A node.
#[derive(Debug, Args)]
pub(crate) struct Allocate {
    /// Number of the disk; the lowest free one if absent
    #[arg(short, long)]
    pub(crate) minor: Option<u32>,
    /// MiB of memory shared with the process, at most 64; 0 for the default
    #[arg(long, value_name = "MIB", default_value_t = 0, value_parser = arena_mib)]
    pub(crate) arena: u32,
    #[command(flatten)]
    pub(crate) policy: Policy,
}

/// Making a disk larger.
#[derive(Debug, Args)]
pub(crate) struct Resize {
    #[command(flatten)]
    pub(crate) which: Which,
    /// Make the image so large first, such as 20G, or +5G for 5 GiB more than it has: a raw file, LUKS, whose new part
    /// reads as anything, or qcow2. Without it the image has grown by other means, such as lvresize
    #[arg(long, value_name = "SIZE|+MORE")]
    pub(crate) size: Option<NewSize>,
}

/// Parses MiB, at least one.
fn some_mib(text: &str) -> Result<u32, String> {
    match control::typed_mib(text)? {
        0 => Err("write at least 1 MiB".into()),
        mib => Ok(mib),
    }
}

/// Parses MiB of memory, at most 64.
fn arena_mib(text: &str) -> Result<u32, String> {
    match control::typed_mib(text)? {
        mib @ 0..=64 => Ok(mib),
        mib => Err(format!("{mib} MiB are too many: write at most 64")),
    }
}

/// Reading all of a disk.
#[derive(Debug, Args)]
pub(crate) struct Scrub {
    #[command(flatten)]
    pub(crate) which: Which,
    /// Most MiB in a second, or another amount with its suffix, such as 1.5G; 0 ends one that runs, another
    /// number changes its rate
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = control::typed_mib)]
    pub(crate) rate: u32,
}

/// Taking over what is below.
#[derive(Debug, Args)]
pub(crate) struct Stream {
    #[command(flatten)]
    pub(crate) which: Which,
    /// Most MiB in a second, or another amount with its suffix, such as 1.5G; another number changes the rate
    /// of one that runs
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = some_mib)]
    pub(crate) rate: u32,
    /// Begin it, and wait until it is over: the exit status says whether it was done
    #[arg(long)]
    pub(crate) wait: bool,
    /// End the one that runs
    #[arg(long, conflicts_with_all = ["wait", "rate"])]
    pub(crate) cancel: bool,
    /// Say how far it is, or how the last one has ended, and change nothing
    #[arg(long, conflicts_with_all = ["wait", "rate", "cancel"])]
    pub(crate) show: bool,
}

/// Marks, and changes since one.
#[derive(Debug, Args)]
pub(crate) struct Dirty {
    #[command(flatten)]
    pub(crate) which: Which,
    /// Start a dirty bitmap with this name: 1 to 64 letters, digits, dots, dashes and underscores. A disk has eight at
    /// most
    #[arg(long, value_name = "NAME", conflicts_with_all = ["since", "forget"])]
    pub(crate) mark: Option<MarkName>,
    /// Print the ranges that the guest has written since this dirty bitmap was started
    #[arg(long, value_name = "NAME", conflicts_with = "forget")]
    pub(crate) since: Option<MarkName>,
    /// Remove a dirty bitmap. Removing the last one ends the tracking
    #[arg(long, value_name = "NAME")]
    pub(crate) forget: Option<MarkName>,
}

/// A process and a node.
#[derive(Debug, Args)]
pub(crate) struct ProcessNode {
    /// The process
    #[arg(short, long)]
    pub(crate) pid: u32,
    /// The node
    #[arg(short, long)]
    pub(crate) minor: u32,
}

/// How an image is opened.
#[derive(Debug, Args)]
pub(crate) struct Image {
    /// Target to serve: DRIVER:IMAGE or DRIVER:SIZE
    #[arg(short = 'a', long = "args", value_name = "TARGET")]
    pub(crate) target: String,
    /// Guests may not write
    #[arg(short = 'R', long, conflicts_with = "mode")]
    pub(crate) readonly: bool,
    /// Sharing mode of the image: r (beside readers), w (exclusive), r! and w! (beside any other user)
    #[arg(long, value_name = "MODE")]
    pub(crate) mode: Option<Mode>,
    /// How I/O is done
    #[arg(long, value_enum, default_value_t)]
    pub(crate) engine: EngineName,
    /// Guests may not discard, so that the image stays as large as it is
    #[arg(long)]
    pub(crate) no_discard: bool,
    /// A file that the disk may have beside its image, such as a parent or a server's socket, or a folder
    /// of them; may be given more than once
    #[arg(long, value_name = "PATH")]
    pub(crate) files: Vec<PathBuf>,
    /// The driver of a parent whose child does not say it, which qcow: never does: aio for a raw one
    #[arg(long, alias = "parents", value_name = "DRIVER")]
    pub(crate) parent_kind: Option<Driver>,
}

/// The names of engines.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub(crate) enum EngineName {
    /// io_uring, and Linux AIO where that is not allowed
    #[default]
    Auto,
    /// io_uring
    Uring,
    /// Linux AIO
    Aio,
    /// One system call after the other
    Sync,
}

impl From<EngineName> for Engine {
    fn from(name: EngineName) -> Engine {
        match name {
            EngineName::Auto => Engine::Auto,
            EngineName::Uring => Engine::Uring,
            EngineName::Aio => Engine::Aio,
            EngineName::Sync => Engine::Sync,
        }
    }
}

/// Arguments of `open`: a disk that exists, and the image to serve as it.
#[derive(Debug, Args)]
pub(crate) struct Open {
    #[command(flatten)]
    pub(crate) which: Which,
    #[command(flatten)]
    pub(crate) image: Image,
}

/// A disk to close.
#[derive(Debug, Args)]
pub(crate) struct Close {
    #[command(flatten)]
    pub(crate) which: Which,
    /// Kill the process if it does not finish in time
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Seconds to wait
    #[arg(short, long, default_value_t = 120)]
    pub(crate) timeout: u32,
}

/// A disk to pause.
#[derive(Debug, Args)]
pub(crate) struct Pause {
    #[command(flatten)]
    pub(crate) which: Which,
    /// Seconds to wait
    #[arg(short, long, default_value_t = 120)]
    pub(crate) timeout: u32,
}

/// A disk that resumes.
#[derive(Debug, Args)]
pub(crate) struct Unpause {
    #[command(flatten)]
    pub(crate) which: Which,
    /// Another image, which the guest can use as the first one
    #[arg(short = 'a', long = "args", value_name = "TARGET")]
    pub(crate) target: Option<Target>,
    /// The image may be smaller than the disk that the guest knows, which loses what it has there
    #[arg(long)]
    pub(crate) shrink: bool,
    /// Files that the disk may have beside its image, instead of those named before; may be given more than once
    #[arg(long, value_name = "PATH")]
    pub(crate) files: Vec<PathBuf>,
}

/// Formats that can have a backing image while that is served.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub(crate) enum OverlayFormat {
    /// qcow2, over any image
    #[default]
    Qcow2,
    /// VHD
    Vhd,
}

impl std::fmt::Display for OverlayFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            OverlayFormat::Qcow2 => "qcow2",
            OverlayFormat::Vhd => "vhd",
        })
    }
}

/// A disk to take away.
#[derive(Debug, Args)]
pub(crate) struct Destroy {
    #[command(flatten)]
    pub(crate) which: Which,
    /// Seconds to wait; the disk goes all the same when nothing holds it any more
    #[arg(short, long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) timeout: u32,
}

/// A disk to make.
#[derive(Debug, Args)]
pub(crate) struct Create {
    #[command(flatten)]
    pub(crate) image: Image,
    #[command(flatten)]
    pub(crate) node: Allocate,
    /// The backend's directory in xenstore for which it is: the disk goes when that goes. The target
    /// may then also be what libxl makes of one, such as a path alone
    #[arg(long, value_name = "PATH")]
    pub(crate) vbd: Option<String>,
    /// Serve NBD clients too, at /run/xentap/nbd/MINOR.sock
    #[arg(long)]
    pub(crate) nbd: bool,
    /// Print the minor number and nothing else
    #[arg(long)]
    pub(crate) minor_only: bool,
    /// Return as soon as the image is this disk's. Repeat the command without this to wait until the disk is served
    #[arg(long, requires = "vbd")]
    pub(crate) no_wait: bool,
}

/// An image to look at.
#[derive(Debug, Args)]
pub(crate) struct Probe {
    /// Target that would be served
    #[arg(short = 'a', long = "args", value_name = "TARGET")]
    pub(crate) target: String,
    /// Sharing mode that it would have
    #[arg(long, value_name = "MODE", default_value_t)]
    pub(crate) mode: Mode,
    /// The backend's directory in xenstore for which it would be
    #[arg(long, value_name = "PATH")]
    pub(crate) vbd: Option<String>,
}

/// How every disk is.
#[derive(Debug, Args)]
#[command(after_help = STATUS)]
pub(crate) struct Status {
    /// Only the disks of this guest: its name or its number, as in xl list
    #[arg(value_name = "GUEST")]
    pub(crate) guest: Option<String>,
    /// Only the disk with this name in the guest, such as xvda, or this number
    #[arg(value_name = "VDEV", requires = "guest")]
    pub(crate) vdev: Option<String>,
    /// Only disks that are not well: those whose verdict has an exit status other than 0
    #[arg(long)]
    pub(crate) sick: bool,
    /// Show the figures behind each verdict, and what no counter tells
    #[arg(short = 'x', long)]
    pub(crate) extended: bool,
    #[command(flatten)]
    pub(crate) watch: Watch,
}

/// Report about this host.
#[derive(Debug, Args)]
pub(crate) struct Report {
    /// Write to this new file instead, which only you may read
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) watch: Watch,
}

/// Counters of all disks, with the verdicts of status.
#[derive(Debug, Args)]
pub(crate) struct Metrics {
    /// Write to this file instead, which is exchanged as a whole
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) watch: Watch,
}

/// How long disks are watched, and limits for a verdict.
#[derive(Debug, Args)]
pub(crate) struct Watch {
    /// Seconds between the two looks at all disks
    #[arg(short, long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) interval: u32,
    /// Call a disk slow whose requests take so many milliseconds
    #[arg(long, value_name = "MS", default_value_t = SLOW_MS, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) slow: u32,
    /// Call a disk hung whose oldest request waits for so many seconds; a disk without such a count is watched so long
    #[arg(
        long,
        alias = "hung",
        value_name = "SECONDS",
        default_value_t = HUNG_S,
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    pub(crate) hung_after: u32,
}

const STATUS: &str = "\
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

/// A display.
#[derive(Debug, Args)]
pub(crate) struct Top {
    /// Seconds between two pictures
    #[arg(short, long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) delay: u32,
    /// Print so many pictures, then end
    #[arg(short = 'n', long)]
    pub(crate) iterations: Option<u32>,
}
