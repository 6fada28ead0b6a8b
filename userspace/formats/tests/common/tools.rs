// SPDX-License-Identifier: MIT OR Apache-2.0
//! QEMU's tools as a second opinion, parents, and images that are wrong.

use super::history::stamp;
use super::{SeededRng, SparseContent, World, SECTOR};
use control::Failure;
use diskio::{Bytes, Data, Errno, File, Io, Runtime};
use drivers::{Attributes, Content as Held, Disk, DiskInfo, Driver, DriverLimits, Extent, Fence};
use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;

pub(crate) use super::qemu::has_qemu;

/// Seconds that one call of a tool may take on a disk that others keep busy.
const LIMIT: &str = "300";

/// A tool, which is ended if it takes too long.
pub(crate) fn command(name: &str, args: &[&str]) -> Command {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=10", LIMIT, name]);
    if name == "qemu-io" {
        // Nothing need survive a loss of power here, and QEMU flushes at every cluster of qcow and at every
        // table of qcow2: with small clusters, thousands of times.
        command.arg("--cache=unsafe");
    }
    command.args(args);
    command
}

/// Runs a tool, which must succeed, and returns its output.
pub(crate) fn tool(name: &str, args: &[&str]) -> String {
    said(name, args, &mut command(name, args))
}

/// Runs a tool in the folder of its files; it must succeed.
pub(crate) fn tool_in(name: &str, args: &[&str], folder: &Path) -> String {
    said(name, args, command(name, args).current_dir(folder))
}

fn said(name: &str, args: &[&str], command: &mut Command) -> String {
    let output = command.output();
    let output = output.unwrap_or_else(|error| panic!("timeout {name}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    let status = output.status;
    // timeout ends with these codes if its limit has passed.
    let late = match status.code() {
        Some(124 | 137) => format!(" did not end within {LIMIT} s"),
        _ => String::new(),
    };
    assert!(
        status.success(),
        "{name} {args:?}{late}: {status}: {text}{errors}"
    );
    // qemu-io succeeds when a pattern is not found.
    assert!(
        !text.contains("verification failed"),
        "{name} {args:?}: {text}"
    );
    text + &errors
}

/// A folder that is gone afterwards, on the file system of the build.
pub(crate) fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Opens a file.
pub(crate) fn file(io: &Io, path: &Path, write: bool) -> File {
    let file = fs::File::options()
        .read(true)
        .write(write)
        .create(write)
        .truncate(false)
        .open(path);
    File::new(io, file.unwrap().into()).unwrap()
}

/// Returns the content that `qemu-img` reads from an image.
pub(crate) fn content(format: &str, image: &Path, folder: &Path) -> Vec<u8> {
    let raw: PathBuf = folder.join("content.raw");
    let args = [
        "convert",
        // The copy need not survive a power cut.
        "-t",
        "unsafe",
        "-f",
        format,
        "-O",
        "raw",
        text(image),
        text(&raw),
    ];
    tool("qemu-img", &args);
    fs::read(raw).unwrap()
}

/// Makes an image of `format` with qemu-img and the options `words`, and lets qemu-io (with the commands `writes`,
/// first) and the driver change it in turns. `open` opens it for the driver, and `each` checks the image after each
/// turn.
pub(crate) fn goes_on_with_qemu(
    format: &'static str,
    path: &Path,
    words: &[&str],
    writes: &[&str],
    open: impl AsyncFn(Io, PathBuf) -> Disk + Clone + 'static,
    each: impl Fn(),
) {
    let folder = path.parent().unwrap();
    let create = [&["create", "-q", "-f", format], words, &[text(path), "9M"]];
    tool("qemu-img", &create.concat());
    let written = |writes: &[&str]| {
        let writes: Vec<&str> = writes.iter().flat_map(|write| ["-c", *write]).collect();
        let args = [&["-f", format], &writes[..], &[text(path)]];
        tool("qemu-io", &args.concat());
        content(format, path, folder)
    };
    let mut model = written(writes);
    for seed in 0..3 {
        let runtime = Runtime::new();
        let (io, path_of_it, open) = (runtime.io.clone(), path.to_path_buf(), open.clone());
        let before = model;
        let turn = async move {
            let disk = open(io, path_of_it).await;
            let shape = disk.activate().await.unwrap();
            assert_eq!(shape.size as usize, before.len());
            assert!(whole(&disk, shape.size).await.unwrap() == before);
            let mut model = before;
            scribble(&disk, &mut model, seed, 12).await.unwrap();
            match seed % 2 {
                0 => disk.inactivate().await.unwrap(),
                _ => disk.close().await.unwrap(),
            }
            model
        };
        model = runtime.block_on(turn).unwrap();
        assert!(content(format, path, folder) == model, "{words:?}");
        let write = format!("write -P {} {}k 70k", 20 + seed, 1000 * seed + 3);
        model = written(&[&write]);
        each();
    }
}

/// All of a disk, in pieces of an odd size.
pub(crate) async fn whole(disk: &Disk, size: u64) -> Result<Vec<u8>, Errno> {
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < size {
        let at = bytes.len() as u64;
        let data = Data::zeroed((size - at).min(777 * 512) as usize)?;
        disk.read(at, data.clone()).await?;
        bytes.extend(data.to_vec());
    }
    Ok(bytes)
}

/// Writes by chance, to the disk and to `model`.
pub(crate) async fn scribble(
    disk: &Disk,
    model: &mut [u8],
    seed: u64,
    count: usize,
) -> Result<(), Errno> {
    let mut chance = SeededRng(seed);
    let sectors = (model.len() / SECTOR) as u64;
    for _ in 0..count {
        let at = chance.below(sectors);
        let len = (1 + chance.below(300)).min(sectors - at);
        let range = (at as usize * SECTOR)..((at + len) as usize * SECTOR);
        let offset = range.start as u64;
        match chance.below(6) {
            0 => {
                disk.write_zeroes(offset, len * 512, Attributes::default())
                    .await?;
                model[range].fill(0);
            }
            _ => {
                let bytes: Vec<u8> = (0..len * 512)
                    .map(|at| (chance.0 >> 8) as u8 ^ (at / 512) as u8 | 1)
                    .collect();
                disk.write(offset, Bytes::copied(&bytes)?, Attributes::default())
                    .await?;
                model[range].copy_from_slice(&bytes);
            }
        }
    }
    disk.flush().await
}

/// A disk with a number in each sector, for parents.
#[derive(Debug)]
pub(crate) struct Pattern {
    pub(crate) size: u64,
    pub(crate) number: fn(u64) -> u32,
    /// The bytes of a sector with a number in it.
    pub(crate) sector: fn(u32, u64) -> Vec<u8>,
}

impl Driver for Pattern {
    async fn activate(&self) -> Result<DiskInfo, Failure> {
        Ok(DiskInfo {
            size: self.size,
            logical_block: 512,
            physical_block: 512,
            discard: None,
            write_cache: false,
            fua: true,
            limits: DriverLimits::default(),
        })
    }

    fn fence(&self) -> Fence {
        Fence::Local
    }

    fn is_verbatim(&self) -> bool {
        true
    }

    async fn read(&self, offset: u64, data: Data) -> Result<(), Errno> {
        let first = offset / SECTOR as u64;
        assert!(
            offset + data.len() as u64 <= self.size,
            "behind the end of a parent"
        );
        for at in 0..data.len() / SECTOR {
            let sector = first + at as u64;
            data.write(at * SECTOR, &(self.sector)((self.number)(sector), sector));
        }
        Ok(())
    }

    async fn write(&self, _: u64, _: Bytes, _: Attributes) -> Result<(), Errno> {
        panic!("a parent is only read");
    }

    async fn flush(&self) -> Result<(), Errno> {
        Ok(())
    }

    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        let first = offset / SECTOR as u64;
        let is_zero = |sector| (self.number)(sector) == 0;
        let same = (0..len / SECTOR as u64).take_while(|at| is_zero(first + at) == is_zero(first));
        let content = match is_zero(first) {
            true => Held::Hole,
            false => Held::Data,
        };
        Ok(vec![Extent {
            len: same.count() as u64 * SECTOR as u64,
            content,
        }])
    }
}

/// The parent of tests: a part of it is a hole, and it ends early.
pub(crate) const PARENT_SIZE: u64 = (5 << 20) + 512 * 3;

pub(crate) fn parent_number(sector: u64) -> u32 {
    match sector {
        ..1000 | 2000..PARENT_SECTORS => 0x0100_0000 + sector as u32,
        _ => 0,
    }
}

const PARENT_SECTORS: u64 = PARENT_SIZE / 512;

pub(crate) fn parent() -> Disk {
    let parent = Disk::new(Pattern {
        size: PARENT_SIZE,
        number: parent_number,
        sector: stamp,
    });
    parent.set_backing(Some(PARENT_BACKING));
    parent
}

/// The number by which the kernel has the parent.
pub(crate) const PARENT_BACKING: u16 = 3;

/// Opens an image with wrong bytes, and if that succeeds reads and writes it. Nothing may panic or take long; returns
/// whether the image was opened.
pub(crate) fn try_wrong(
    files: Vec<SparseContent>,
    open: &dyn Fn(&World) -> Disk,
    seed: u64,
) -> bool {
    let world = World::new(files);
    let disk = open(&world);
    let mut chance = SeededRng(seed);
    let work = async move {
        let Ok(shape) = disk.activate().await else {
            return false;
        };
        let sectors = shape.size / SECTOR as u64;
        for _ in 0..12 {
            let at = chance.below(sectors);
            let len = (1 + chance.below(64)).min(sectors - at);
            let (offset, len) = (at * SECTOR as u64, len * SECTOR as u64);
            let data = Data::zeroed(len as usize).unwrap();
            // It may fail with any error.
            let how = Attributes::default();
            let _ = disk.read(offset, data.clone()).await;
            let _ = disk.extents(offset, len).await;
            let _ = match chance.below(4) {
                0 => disk.write(offset, data, how).await,
                1 => disk.write_zeroes(offset, len, how).await,
                2 => disk.discard(offset, len, how).await,
                _ => disk.flush().await,
            };
        }
        let _ = disk.resize().await;
        let _ = disk.inactivate().await;
        true
    };
    Runtime::new().block_on(work).unwrap()
}

/// A failed write must not take effect later: for disks without a parent, whose clusters have `unit` bytes. Several are
/// under way at once, so that they share changes of a table.
pub(crate) fn failed_writes_stay_undone(
    files: &[SparseContent],
    open: &dyn Fn(&World) -> Disk,
    unit: u64,
) {
    let mut failed = 0;
    for (after, seed) in (0..14).flat_map(|after| (0..6).map(move |seed| (after, seed))) {
        let world = World::new(files.to_vec());
        let disk = open(&world);
        let results = Rc::new(RefCell::new(Vec::new()));
        let runtime = Runtime::new();
        let its = disk.clone();
        let first = async move {
            its.activate().await.unwrap();
            put(&its, 0, 1).await.unwrap();
        };
        runtime.block_on(first).unwrap();
        world.shuffle(seed);
        world.fail_once(after, Errno::IO);
        let runtime = Runtime::new();
        for number in 1..2 + seed % 3 {
            let (its, results) = (disk.clone(), results.clone());
            runtime.tasks.spawn(async move {
                let result = put(&its, number * unit, 2).await;
                results.borrow_mut().push((number, result));
            });
        }
        runtime.finish().unwrap();
        let results = results.take();
        if !world.has_failed() {
            continue;
        }
        failed += results.iter().filter(|(_, result)| result.is_err()).count();
        let (its, lost) = (disk.clone(), results.clone());
        let rest = async move {
            for (number, _) in lost.iter().filter(|(_, result)| result.is_err()) {
                let how = Attributes::default();
                its.write_zeroes(number * unit, unit, how).await.unwrap();
            }
            put(&its, 4 * unit, 3).await.unwrap();
            its.flush().await.unwrap();
        };
        Runtime::new().block_on(rest).unwrap();
        for disk in [disk, open(&World::new(world.files()))] {
            let results = results.clone();
            let look = async move {
                disk.activate().await.unwrap();
                let results = results.into_iter();
                let mine = results.map(|(number, result)| (number, u32::from(result.is_ok()) * 2));
                for (number, wanted) in mine.chain([(0, 1), (4, 3)]) {
                    let data = Data::zeroed(SECTOR).unwrap();
                    disk.read(number * unit, data.clone()).await.unwrap();
                    let found = super::history::number(&data.to_vec(), 0);
                    assert_eq!(found, Some(wanted), "{number} after {after} seed {seed}");
                }
            };
            Runtime::new().block_on(look).unwrap();
        }
    }
    assert!(failed > 20, "{failed}");
}

async fn put(disk: &Disk, offset: u64, number: u32) -> Result<(), Errno> {
    let bytes = Bytes::copied(&stamp(number, 0))?;
    disk.write(offset, bytes, Attributes::default()).await
}

/// A pause makes everything durable first. A failure after that flush, such as on a full file system, loses nothing.
pub(crate) fn pause_fails_only_if_something_is_lost(
    files: &[SparseContent],
    open: &dyn Fn(&World) -> Disk,
) {
    let mut failed = 0;
    for after in 0..8 {
        let world = World::new(files.to_vec());
        let (disk, its) = (open(&world), world.clone());
        let work = async move {
            disk.activate().await.unwrap();
            put(&disk, 0, 1).await.unwrap();
            let begin = its.changes();
            its.fail_once(after, Errno::NOSPC);
            (disk.inactivate().await, begin)
        };
        let (paused, begin) = Runtime::new().block_on(work).unwrap();
        failed += usize::from(world.has_failed());
        // The flushes of all files come first.
        let is_flush = |what: &super::What| matches!(what, super::What::Flush);
        let rest: Vec<_> = world.log().split_off(begin);
        let flushes = rest.iter().take_while(|(_, what)| is_flush(what)).count();
        assert_eq!(paused.is_ok(), after >= files.len(), "{after}: {rest:?}");
        assert!(
            paused.is_err() || flushes >= files.len(),
            "{after}: {rest:?}"
        );
        let disk = open(&World::new(world.files()));
        let look = async move {
            disk.activate().await.unwrap();
            let data = Data::zeroed(SECTOR).unwrap();
            disk.read(0, data.clone()).await.unwrap();
            assert_eq!(
                super::history::number(&data.to_vec(), 0),
                Some(1),
                "{after}"
            );
        };
        Runtime::new().block_on(look).unwrap();
    }
    assert!((2..8).contains(&failed), "{failed}");
}

/// The first entry of a new table leads to a place inside of the image, also after a power cut before the first flush.
pub(crate) fn first_write_survives_a_cut(first: &[SparseContent], open: &dyn Fn(&World) -> Disk) {
    let world = World::new(first.to_vec());
    let disk = open(&world);
    super::run(async move {
        disk.activate().await.unwrap();
        let bytes = Bytes::copied(&stamp(5, 0)).unwrap();
        disk.write(0, bytes, Attributes::default()).await.unwrap();
    });
    super::history::every_cut(first, &world.log(), 0, |files, when| {
        let disk = open(&World::new(files));
        super::run(async move {
            disk.activate().await.unwrap();
            let data = Data::zeroed(SECTOR).unwrap();
            let read = disk.read(0, data.clone()).await;
            assert!(read.is_ok(), "{read:?} {when}");
            let found = super::history::number(&data.to_vec(), 0);
            assert!(matches!(found, Some(0 | 5)), "{found:?} {when}");
        });
    });
}

/// After a power cut a range holds the content of the parent or the new one, and nothing else: the test changes `len`
/// bytes twice, in places that are not contiguous.
pub(crate) fn parent_or_new_after_a_cut(
    files: &[SparseContent],
    open: &dyn Fn(&World) -> Disk,
    len: u64,
) {
    let world = World::new(files.to_vec());
    let disk = open(&world);
    let places = [0, 2 * len];
    let work = async move {
        disk.activate().await.unwrap();
        for at in places {
            let first = at / SECTOR as u64;
            let sectors = first..first + len / SECTOR as u64;
            let bytes: Vec<u8> = sectors.flat_map(|sector| stamp(5, sector)).collect();
            let bytes = Bytes::copied(&bytes).unwrap();
            disk.write(at, bytes, Attributes::default()).await.unwrap();
        }
    };
    Runtime::new().block_on(work).unwrap();
    super::history::every_cut(files, &world.log(), 0, |files, when| {
        let disk = open(&World::new(files));
        let look = async move {
            disk.activate().await.unwrap();
            for at in places {
                let sector = at / SECTOR as u64;
                let data = Data::zeroed(SECTOR).unwrap();
                disk.read(at, data.clone()).await.unwrap();
                let found = super::history::number(&data.to_vec(), sector);
                let may = [Some(parent_number(sector)), Some(5)];
                assert!(may.contains(&found), "{found:?} at {at} {when}");
            }
        };
        Runtime::new().block_on(look).unwrap();
    });
}
