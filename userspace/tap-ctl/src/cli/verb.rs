// SPDX-License-Identifier: MIT OR Apache-2.0
//! The verbs.

use super::notes::{COMMIT, HANDOFF, MIRROR, SNAPSHOT, SNAPSHOT_USAGE, TRACE};
use super::{
    Allocate, Backup, Close, Create, Destroy, Dirty, Handoff, LeaseVerb, List, Metrics, MigrateOut,
    Mirror, Open, Pause, Probe, ProcessNode, Report, Resize, Restore, Scrub, Set, Snapshot, Status,
    Stream, Top, Trace, Unpause, Which,
};
use crate::events::Events;
use crate::group::GroupVerb;
use clap::Subcommand;
use manual::Generated;

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
        #[arg(long, value_name = "SECONDS", default_value_t = 5)]
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
