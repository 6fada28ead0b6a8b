// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command line.

use crate::image_spec::ImageSpec;
use crate::part::DiskRanges;
use crate::replay::Point;
use crate::serve::ServedTarget;
use clap::{Args, Parser, Subcommand};
use manual::Generated;
use std::path::PathBuf;
use std::str::FromStr;

/// Make, convert, check, compare, resize, rebase, commit and serve the images of tap disks, and replay what was done to
/// them.
///
/// An image is named KIND:PATH, as in the configuration of a guest. The kind is what you say, never what the
/// file looks like: a guest writes what is in it.
#[derive(Debug, Parser)]
#[command(name = "tapimg", version, after_long_help = HELP)]
pub(crate) struct Cli {
    /// Print JSON, for programs
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Kind of a parent whose child does not name it: qcow images never do, old qcow2 images may not
    #[arg(long, alias = "parents", global = true, value_name = "KIND")]
    pub(crate) parent_kind: Option<ParentKind>,
    /// File that is the parent of an image and not where that says, or folder with such files; may be repeated
    #[arg(long, global = true, value_name = "FILE|FOLDER")]
    pub(crate) parent_at: Vec<PathBuf>,
    /// As root, also open files that an image names and that its owner could not open
    #[arg(long, global = true)]
    pub(crate) follow: bool,
    /// Die with this process, which started this one
    #[arg(long, global = true, hide = true, value_name = "PID")]
    pub(crate) die_with: Option<u32>,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

const HELP: &str = "\
Kinds of images:
  aio     a raw file or block device: the disk, byte for byte (also: raw, sync)
  qcow2   versions 2 and 3
  qcow    the first version
  vhd     fixed, dynamic, differencing (also: vpc)
  vhdx    fixed, dynamic, differencing; only read
  vmdk    sparse or flat; made with one sparse file
  ova     a disk in an OVA, to convert, compare and map: ova:/srv/a.ova, or ova:/srv/a.ova/disk2.vmdk of several
  luks    raw, encrypted. The file with its key stands in front, as for an encrypted qcow2 image:
          key=/etc/xentap/a.key,luks:/srv/a.img. It must be yours, and others may not read it (chmod 600)

Examples:
  tapimg info --chain qcow2:/srv/a.qcow2            # the image, and all below it
  tapimg create qcow2:/srv/a.qcow2 10G              # an empty disk
  tapimg create qcow2:/srv/b.qcow2 --parent aio:/srv/base.img
                                                    # over base.img, which must not change any more
  tapimg convert vhd:/srv/a.vhd qcow2:/srv/a.qcow2  # the same disk in another format
  tapimg convert qcow2:/srv/a.qcow2 aio:/dev/vg/a --force
                                                    # onto a volume, whose content is lost
  tapimg convert key=/etc/xentap/a.key,luks:/srv/a.img qcow2:/srv/a.qcow2
                                                    # the copy is not encrypted
  tapimg convert qcow2:/srv/a.qcow2 key=/etc/xentap/a.key,qcow2:/srv/b.qcow2
                                                    # the copy is encrypted
  tapimg convert aio:/srv/a.img qcow2:/srv/a.qcow2 --compress
                                                    # to keep or to send: it takes less space
  tapimg compare vhd:/srv/a.vhd qcow2:/srv/a.qcow2  # do guests see the same?
  tapimg check --repair qcow2:/srv/a.qcow2
  tapimg map qcow2:/srv/a.qcow2                     # where there is data
  tapimg resize qcow2:/srv/a.qcow2 20G              # the guest sees it when it is served again
  tapimg snapshot qcow2:/srv/a.qcow2 qcow2:/srv/c.qcow2
                                                    # c.qcow2 has a.qcow2 as its backing image
  tapimg commit qcow2:/srv/c.qcow2                  # c.qcow2 is merged into a.qcow2, which is the disk then
  tapimg rebase qcow2:/srv/c.qcow2 --no-parent      # c.qcow2 gets all content, and has no backing image
  tapimg serve qcow2:/srv/a.qcow2 /run/a.sock       # to nbdinfo, qemu-img, nbdcopy and fio, until ctrl-C
  tapimg replay guest.trace aio:/srv/copy.img --until 120
                                                    # a guest's requests (tap-ctl trace), up to number 120

An image is locked while it is used, as tapdisk does: no other program may use an image that is changed, and
none may change an image that is read. To work on the image of a guest that runs: tap-ctl pause, and afterwards
tap-ctl unpause. A file that was replaced (--force) is another one: name it again with unpause -a.

An image names its backing image and data files. Root opens such a file only if the owner of the image could, or if
it is beside the image and not writable (chmod a-w), as blktapctrl serves it; --follow opens all of them. An image that
belongs to root may name any file.

Under the names vhd-util, qcow-create, img2qcow and qcow2raw, as links, this program takes the options of
blktap's: see vhd-util --help.

A new image has the name PATH.unfinished until it is whole and durable. If the work ends earlier,
there is no part of an image under its own name, and a file that was to be replaced (--force) is as it was.

Exit status, with the numbers of tap-ctl(8): 0 if it was done and nothing is wrong, 1 if images differ
(compare), an image is damaged (check) or cannot be served as it is (info), 2 for a wrong command line, 3 if the image is
in use, 4 if there is no such image, 6 if it failed for another reason.";

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Show size, parent, snapshots and dirty bitmaps of an image, and the problems of its files that keep it from being served
    Info(Info),
    /// Make an image
    Create(CreateImage),
    /// Make an image of the content of another one, in any format
    Convert(Convert),
    /// Look for damage
    Check(Check),
    /// Say whether two images hold the same disk
    Compare(Compare),
    /// Say where there is data
    Map(Map),
    /// Make a disk larger, or smaller
    Resize(Resize),
    /// Put an image over another one, or over none, with the same content
    Rebase(Rebase),
    /// Commit an image: copy its allocated blocks into its backing image, which then holds the disk
    Commit(Commit),
    /// Make an image over a backing image, or list the snapshots in one
    Snapshot(Snapshot),
    /// Replay a guest's requests on a copy of its disk, up to any moment; or list them
    Replay(Replay),
    /// Serve a disk to NBD clients, such as nbdinfo, qemu-img, nbdcopy and fio, without Xen
    Serve(Serve),
    /// The process of serve that serves
    #[command(hide = true)]
    ServeConfined {
        /// User to become
        #[arg(long)]
        user: Option<String>,
    },
    /// Print a completion script or the manual page
    #[command(hide = true)]
    Generate {
        /// Kind of the output
        what: Generated,
    },
}

/// A size of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        control::typed_size(text).map(Size)
    }
}

/// Parses the bytes of a logical sector.
fn sector_size(text: &str) -> Result<u32, String> {
    match text {
        "512" => Ok(512),
        "4096" | "4K" | "4k" => Ok(4096),
        _ => Err("a guest's sectors have 512 or 4096 bytes".into()),
    }
}

/// A kind of image.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ParentKind(pub(crate) formats::Below);

impl FromStr for ParentKind {
    type Err = control::Failure;

    fn from_str(text: &str) -> Result<Self, control::Failure> {
        crate::image_spec::parse_kind(text).map(ParentKind)
    }
}

/// Image to look at.
#[derive(Debug, Args)]
#[command(after_help = "\
Problems are missing, damaged or unsupported files, in the image or below it. A note says if blktapctrl would refuse a
backing image: it serves one in the same folder only after chmod a-w, and others only if --files names them.
Exit status: 0 if there is no problem, 1 if there is one.")]
pub(crate) struct Info {
    /// The image, KIND:PATH
    pub(crate) image: ImageSpec,
    /// All images below it, too
    #[arg(long)]
    pub(crate) chain: bool,
    /// Look even if it is in use: the output may be outdated by then
    #[arg(short = 'U', long)]
    pub(crate) unlocked: bool,
}

/// How a new image is laid out.
#[derive(Debug, Default, Args)]
pub(crate) struct Layout {
    /// Backing image, KIND:PATH, which must not change any more
    #[arg(long, value_name = "IMAGE")]
    pub(crate) parent: Option<ImageSpec>,
    /// qcow2: bytes of a cluster, 512 to 2M; 64K if not said
    #[arg(long, value_name = "SIZE")]
    pub(crate) cluster_size: Option<Size>,
    /// qcow2: clusters have 32 parts, so that small writes to a child copy less; for clusters of 16K and more
    #[arg(long)]
    pub(crate) subclusters: bool,
    /// vhd: a fixed one, as large as the disk
    #[arg(long)]
    pub(crate) fixed: bool,
    /// vhd: the disk can become as large as this while it is served
    #[arg(long, value_name = "SIZE", conflicts_with = "fixed")]
    pub(crate) reserve: Option<Size>,
    /// Bytes of a logical sector that a guest sees, 512 or 4096: those of the copied disk or of the parent if not said
    #[arg(long, value_name = "BYTES", value_parser = sector_size)]
    pub(crate) sector_size: Option<u32>,
    /// With key=: milliseconds that a processor of this host takes to try a key; 2000 if not said
    #[arg(long, value_name = "MILLISECONDS", value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub(crate) iter_time: Option<u64>,
}

/// Image to make.
#[derive(Debug, Args)]
#[command(after_help = "\
An existing image is replaced with --force only, and never while it is in use.
With key=FILE in front it is encrypted with LUKS, version 1 (AES-256-XTS, SHA-256); each byte of FILE counts, a line's
end too. A luks image reads as anything where it was not written yet.
A parent in the same folder is named without the folder, so both can be moved together.")]
pub(crate) struct CreateImage {
    /// The image, KIND:PATH
    pub(crate) image: ImageSpec,
    /// Size of the disk, such as 10G or 1.5GiB; with --parent that of the parent if not said, or +1G for 1 GiB more
    #[arg(value_name = "SIZE|+MORE")]
    pub(crate) size: Option<control::NewSize>,
    #[command(flatten)]
    pub(crate) layout: Layout,
    /// Replace an existing file
    #[arg(long)]
    pub(crate) force: bool,
}

/// Compression of a new image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum CompressionMethod {
    /// Deflate, which all programs read.
    Zlib,
    /// Zstandard, which QEMU reads since 5.1.
    Zstd,
}

/// A part of the work.
#[derive(Debug, Default, Args)]
pub(crate) struct Part {
    /// Read these ranges of the disk only: a file with an offset and a length in bytes on each line, as tap-ctl dirty
    /// --since prints them. A copy has the rest from its parent (--parent)
    #[arg(long, value_name = "FILE")]
    pub(crate) changed: Option<PathBuf>,
    /// Most MiB in a second, or another amount with its suffix, such as 1.5G; as fast as possible if not said
    #[arg(long, value_name = "MIB", value_parser = some_mib)]
    pub(crate) rate: Option<u32>,
}

impl Part {
    /// Reads the ranges.
    pub(crate) fn ranges(&self) -> Result<Option<DiskRanges>, control::Failure> {
        self.changed.as_deref().map(DiskRanges::read).transpose()
    }
}

/// Parses MiB, at least one.
fn some_mib(text: &str) -> Result<u32, String> {
    match control::typed_mib(text)? {
        0 => Err("write at least 1 MiB".into()),
        mib => Ok(mib),
    }
}

/// Images to copy.
#[derive(Debug, Args)]
#[command(after_help = "\
A guest's partition table counts in logical sectors, so the new image keeps their size: a qcow2 image stores it, and a
device has its own. Other images show 512 bytes, and a disk of other sectors is copied to them with --sector-size 512
only; sector-size=4096, in front of such an image in the guest's configuration gives the guest its own.
Holes stay holes, and zeroes become holes, but in a luks image, which has none: it takes all its space.
With --compress a VMDK becomes streamOptimized, as appliances (OVA) have it, which is only read. A guest can
write to a compressed qcow2 image, and its new data there is not compressed.
With --parent only the parts that differ from the parent are copied, so the parent need not be FROM's backing image;
with --changed, too, all else is taken to be as the parent has it, and is not read.")]
pub(crate) struct Convert {
    /// The image to read, KIND:PATH, with all that lies below it
    pub(crate) from: ImageSpec,
    /// The image to make, KIND:PATH
    pub(crate) to: ImageSpec,
    #[command(flatten)]
    pub(crate) layout: Layout,
    /// qcow2, vmdk: compress the copy, which takes less space and longer; by zlib, or for qcow2 zstd
    #[arg(long, value_name = "METHOD", num_args = 0..=1, require_equals = true, default_missing_value = "zlib")]
    pub(crate) compress: Option<CompressionMethod>,
    /// qcow2: read this snapshot, by its id or name
    #[arg(long, value_name = "SNAPSHOT")]
    pub(crate) snapshot: Option<String>,
    /// Copy what there is of an image that is damaged: what cannot be read becomes zeroes, and is listed
    #[arg(long)]
    pub(crate) damaged: bool,
    #[command(flatten)]
    pub(crate) part: Part,
    /// Replace what is there
    #[arg(long)]
    pub(crate) force: bool,
    /// Tell on stderr how far it is, even if that is no terminal
    #[arg(long)]
    pub(crate) progress: bool,
}

/// Image to check.
#[derive(Debug, Args)]
#[command(after_help = "\
qcow2: all tables and refcounts. --repair makes refcounts right and takes lost clusters back; an image
whose header says that it is corrupt needs qemu-img check -r all.
Others: headers, and all tables, which must lead into the file; there is nothing to repair in them.
Exit status: 0 if nothing is wrong (lost clusters do no harm), or no longer is; 1 if there is damage.")]
pub(crate) struct Check {
    /// The image, KIND:PATH
    pub(crate) image: ImageSpec,
    /// Make right what can be made right
    #[arg(long)]
    pub(crate) repair: bool,
    /// Read all data, too
    #[arg(long)]
    pub(crate) data: bool,
}

/// Images to compare.
#[derive(Debug, Args)]
#[command(after_help = "\
A disk that is longer by nothing but zeroes is the same, but with --strict.
Exit status: 0 if they are the same, 1 if they differ.")]
pub(crate) struct Compare {
    /// An image, KIND:PATH
    pub(crate) one: ImageSpec,
    /// Another one
    pub(crate) other: ImageSpec,
    /// Sizes must be the same, too
    #[arg(long)]
    pub(crate) strict: bool,
    #[command(flatten)]
    pub(crate) part: Part,
    /// Tell on stderr how far it is, even if that is no terminal
    #[arg(long)]
    pub(crate) progress: bool,
}

/// Image to draw.
#[derive(Debug, Args)]
pub(crate) struct Map {
    /// The image, KIND:PATH
    pub(crate) image: ImageSpec,
    /// Show the parts that this image has allocated, and those where the one below shows through
    #[arg(long)]
    pub(crate) layer: bool,
}

/// Image to make larger or smaller.
#[derive(Debug, Args)]
#[command(after_help = "\
Raw files, qcow2 and VHD become larger, by zeroes. A luks image becomes larger, too, by a part that reads as anything
until the guest fills it. Raw files, qcow2 and luks images become smaller with --shrink: only zeroes, and parts for
which a luks image has no space, are cut off, but with --lose-data. A qcow2 image with snapshots inside keeps its size.
A disk with a backing image shows nothing of that behind its old end.")]
pub(crate) struct Resize {
    /// The image, KIND:PATH
    pub(crate) image: ImageSpec,
    /// Size of the disk from now on, such as 10G, or +1G for 1 GiB more than it has
    #[arg(value_name = "SIZE|+MORE")]
    pub(crate) size: control::NewSize,
    /// Lets the disk become smaller
    #[arg(long)]
    pub(crate) shrink: bool,
    /// With --shrink: cut off data, too
    #[arg(long, requires = "shrink")]
    pub(crate) lose_data: bool,
}

/// Image and its new backing image.
#[derive(Debug, Args)]
#[command(after_help = "\
Data of the old backing chain that the new one does not have is copied into the image first. If that ends early, the
image is as it was, but for space, and keeps its old backing image.
With --moved only the name in the header changes: the backing image is the same in another place, and need not be found
at the old one. A VHD and a VMDK know their backing image and refuse another one; of a qcow2 or qcow image you must know.
With --unsafe it changes also to an image that was converted or replaced. If that holds something else, so does the disk.
The backing image of a VHD is a VHD or a raw image, and the VHD must already have one.")]
pub(crate) struct Rebase {
    /// The image, qcow2:PATH or vhd:PATH, and with --moved or --unsafe also qcow:PATH or vmdk:PATH
    pub(crate) image: ImageSpec,
    /// New backing image, KIND:PATH, which must not change any more
    #[arg(long, value_name = "IMAGE", required_unless_present = "no_parent")]
    pub(crate) parent: Option<ImageSpec>,
    /// Remove the backing image: the image gets all content
    #[arg(long, conflicts_with = "parent")]
    pub(crate) no_parent: bool,
    /// Change the name only: the backing image was moved
    #[arg(long, conflicts_with_all = ["no_parent", "name_only"])]
    pub(crate) moved: bool,
    /// Change the name only, and compare nothing
    #[arg(long = "unsafe")]
    pub(crate) name_only: bool,
    /// Tell on stderr how far it is, even if that is no terminal
    #[arg(long)]
    pub(crate) progress: bool,
}

/// Image to commit.
#[derive(Debug, Args)]
#[command(after_help = "\
The image below becomes the disk; the image is only read, and can be removed then. Both must be unused.
Other images over the image below have other content afterwards: rebase them first.
If it ends early, the image is still the disk, but the one below alone is not what it was: begin again.")]
pub(crate) struct Commit {
    /// The image, qcow2:PATH, qcow:PATH or vhd:PATH
    pub(crate) image: ImageSpec,
    /// Tell on stderr how far it is, even if that is no terminal
    #[arg(long)]
    pub(crate) progress: bool,
}

/// Image to take a snapshot of.
#[derive(Debug, Args)]
#[command(after_help = "\
The image must not change any more as long as it is a backing image. For the disk of a guest that
runs: tap-ctl pause, then this, then tap-ctl unpause -a with the new image.
Snapshots inside of a qcow2 image are listed here and read by tapimg convert --snapshot; qemu-img snapshot makes
and deletes them.")]
pub(crate) struct Snapshot {
    /// The image, KIND:PATH
    pub(crate) image: ImageSpec,
    /// New image over it, KIND:PATH; without it the snapshots in IMAGE are listed
    pub(crate) overlay: Option<ImageSpec>,
}

/// Requests to replay.
#[derive(Debug, Args)]
#[command(after_help = "\
The trace is a file of tap-ctl trace, which may still grow. IMAGE is a copy of the disk as it was when the trace began,
or at --from; one from later is right, too, as long as it was made before the end of the window. It must be unused.
Requests are replayed in the order in which they took effect. Failed ones are left out; those without a result, because a
process died with them, are replayed. Discarded parts read as zeroes.
The disk after a crash at a flush, for any of them (--list --json names them):
  cp before.img try.img && tapimg replay guest.trace aio:try.img --until 1042
Continue from there with --from 1043 --until another one. If a window is not complete, the image does not change.")]
pub(crate) struct Replay {
    /// The file
    pub(crate) trace: PathBuf,
    /// The image to do it on, KIND:PATH
    #[arg(required_unless_present = "list", conflicts_with = "list")]
    pub(crate) image: Option<ImageSpec>,
    /// The first request, by its number or by the time since the trace began, such as 1500ms
    #[arg(long, value_name = "NUMBER|TIME")]
    pub(crate) from: Option<Point>,
    /// The last request, in the same way
    #[arg(long, alias = "to", value_name = "NUMBER|TIME")]
    pub(crate) until: Option<Point>,
    /// Print the requests instead: number, seconds since the trace began, operation, and result
    #[arg(long)]
    pub(crate) list: bool,
}

/// Disk to serve.
#[derive(Debug, Args)]
#[command(after_help = "\
Clients connect to nbd+unix:///?socket=SOCKET, the address that is printed when they can. Ctrl-C or SIGTERM ends it:
it makes all writes durable first, and removes SOCKET. A second signal ends it at once.

The disk is only read unless --write is there. These take writes in any case, because they end with the program:
  ram:SIZE              memory
  cow:KIND:PATH         an image that stays as it is, with all writes in memory
  null:SIZE             zeroes, for measurements

The program that reads the image is in a sandbox, as for a guest: it opens no file. Backing images are read if they are in
the folder of the image, or if --allow names them or a folder above them.

Up to 16 clients are served at once; further ones are turned away. Each has one request of at most 2 MiB under way at a
time, so programs that want more open several connections (nbdcopy does, fio has numjobs=). Requests that overlap take
effect in the order in which they come.

Examples:
  tapimg serve qcow2:/srv/a.qcow2 /run/a.sock
  tapimg serve --write vhd:/srv/a.vhd /run/a.sock
  tapimg serve cow:qcow2:/srv/a.qcow2 /run/a.sock
  tapimg serve ram:1G /run/a.sock
  tapimg serve --allow /srv/golden qcow2:/srv/web/a.qcow2 /run/a.sock
and then, in another terminal:
  nbdinfo --map 'nbd+unix:///?socket=/run/a.sock'
  qemu-img compare -f raw 'nbd+unix:///?socket=/run/a.sock' /srv/copy.img
  nbdcopy 'nbd+unix:///?socket=/run/a.sock' /srv/copy.img
  fio --name=try --ioengine=nbd --uri='nbd+unix:///?socket=/run/a.sock' \\
      --rw=randread --bs=4k --size=100M

Exit status: 0 after a signal, if all writes are durable; 2 for a wrong command line, 3 if the image or SOCKET is
in use, 4 if there is no such image, 6 if it failed for another reason.")]
pub(crate) struct Serve {
    /// The disk: KIND:PATH, or any target that a tap disk has
    #[arg(value_name = "KIND:PATH")]
    pub(crate) image: ServedTarget,
    /// Unix socket to make, for this user only
    pub(crate) socket: PathBuf,
    /// Clients may write, and the image is changed
    #[arg(short, long)]
    pub(crate) write: bool,
    /// File or folder outside of the image's own that it may name, as a backing image; may be repeated
    #[arg(long, value_name = "PATH")]
    pub(crate) allow: Vec<PathBuf>,
    /// Name of the export; clients that name none get it, too
    #[arg(
        long,
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    pub(crate) export: String,
    /// User that the program which reads the image becomes, if root starts it: a name, or UID:GID
    #[arg(long, value_name = "USER")]
    pub(crate) user: Option<String>,
}
