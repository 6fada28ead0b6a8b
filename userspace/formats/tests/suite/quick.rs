// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reads and writes that are one operation of the file: which are, whether they do what the others do, and that an image
//! keeps their place until they have ended.

use crate::common::tools::{content, file, folder, has_qemu, text, tool};
use crate::common::SeededRng;
use diskio::{op_result, Bytes, Data, File, ResultMailbox, Runtime};
use drivers::{Attributes, Disk, PlaceHold, QueuedIo, Raw};
use formats::qcow2::{self, BackingImage, Qcow2, Qcow2Create};
use formats::vhd::{self, ParentOf, Vhd, VhdCreate, VhdKind};
use formats::{ImageParts, Options};
use std::cell::Cell;
use std::fs;
use std::future::Future;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::rc::Rc;

/// Bytes of a disk, and of a cluster of a usual qcow2 image.
const SIZE: u64 = 1 << 20;
const CLUSTER: u64 = 64 << 10;

struct QuickBed {
    runtime: Runtime,
    folder: tempfile::TempDir,
    ended: ResultMailbox,
}

impl QuickBed {
    fn new() -> Self {
        Self {
            runtime: Runtime::new(),
            folder: folder(),
            ended: ResultMailbox::default(),
        }
    }

    fn run<T: 'static>(&self, work: impl Future<Output = T> + 'static) -> T {
        self.runtime.block_on(work).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn file(&self, name: &str) -> File {
        file(&self.runtime.io, &self.path(name), true)
    }

    /// Makes a qcow2 image.
    fn make(&self, name: &str, plan: Qcow2Create) {
        let file = self.file(name);
        self.run(async move { qcow2::create(&file, &plan).await })
            .unwrap();
    }

    /// Makes a VHD.
    fn make_vhd(&self, name: &str, kind: VhdKind, parent: Option<ParentOf>) {
        let plan = VhdCreate {
            kind,
            size: SIZE,
            id: [7; 16],
            parent,
            reserve: 0,
        };
        let file = self.file(name);
        self.run(async move { vhd::create(&file, &plan).await })
            .unwrap();
    }

    fn active(&self, disk: Disk) -> Disk {
        let its = disk.clone();
        self.run(async move { its.activate().await }).unwrap();
        disk
    }

    fn qcow2(&self, name: &str, parent: Option<Disk>, options: Options) -> Disk {
        let parts = ImageParts {
            parent,
            ..ImageParts::default()
        };
        self.active(Disk::new(Qcow2::new(self.file(name), parts, options)))
    }

    fn vhd(&self, name: &str, parent: Option<Disk>) -> Disk {
        let parts = ImageParts {
            parent,
            ..ImageParts::default()
        };
        let vhd = Vhd::new(self.file(name), parts, Options::new(name));
        self.active(Disk::new(vhd))
    }

    fn pause(&self, disk: &Disk) {
        let disk = disk.clone();
        self.run(async move { disk.inactivate().await }).unwrap();
    }

    fn flush(&self, disk: &Disk) {
        let disk = disk.clone();
        self.run(async move { disk.flush().await }).unwrap();
    }

    /// Reads the long way.
    fn read(&self, disk: &Disk, offset: u64, len: usize) -> Vec<u8> {
        let (disk, data) = (disk.clone(), Data::zeroed(len).unwrap());
        let into = data.clone();
        self.run(async move { disk.read(offset, into).await })
            .unwrap();
        data.to_vec()
    }

    /// Writes the long way.
    fn write(&self, disk: &Disk, offset: u64, bytes: &[u8]) {
        let (disk, bytes) = (disk.clone(), Bytes::copied(bytes).unwrap());
        self.run(async move { disk.write(offset, bytes, Attributes::default()).await })
            .unwrap();
    }

    /// Waits until an operation has ended, which must have done `len` bytes, and returns what keeps its place.
    fn ended(&self, io: QueuedIo, len: usize) -> PlaceHold {
        let hold = io.deliver_to(&self.ended, 5);
        while self.ended.is_empty() {
            self.runtime.io.enter(true).unwrap();
        }
        let mut results = Vec::new();
        self.ended.take(&mut results);
        let [(5, result)] = results[..] else {
            panic!("{results:?}");
        };
        assert_eq!(op_result(result), Ok(len as u32));
        hold
    }

    /// Reads the short way; `None` if that is not possible.
    fn quick_read(&self, disk: &Disk, offset: u64, len: usize) -> Option<Vec<u8>> {
        let data = Data::zeroed(len).unwrap();
        drop(self.ended(disk.begin_read(offset, &data)?, len));
        Some(data.to_vec())
    }

    /// Writes the short way, and returns false if that is not possible.
    fn quick_write(&self, disk: &Disk, offset: u64, bytes: &[u8]) -> bool {
        let Some(io) = disk.begin_write(offset, &Bytes::copied(bytes).unwrap()) else {
            return false;
        };
        drop(self.ended(io, bytes.len()));
        true
    }

    /// Reads and writes by chance, the short way where that is possible. Returns how many took it: reads, and writes.
    fn stir(&self, disk: &Disk, model: &mut [u8], seed: u64) -> (u32, u32) {
        let mut chance = SeededRng(seed);
        let (mut reads, mut writes) = (0, 0);
        for number in 0..600 {
            let at = chance.below(SIZE / 512);
            let len = (1 + chance.below(16)).min(SIZE / 512 - at);
            let (offset, len) = (at * 512, len as usize * 512);
            let range = offset as usize..offset as usize + len;
            let bytes = vec![number as u8 | 1; len];
            match chance.below(8) {
                0 => {
                    let its = disk.clone();
                    let how = Attributes::default();
                    self.run(async move { its.write_zeroes(offset, len as u64, how).await })
                        .unwrap();
                    model[range].fill(0);
                }
                1 => self.flush(disk),
                2..5 => {
                    match self.quick_write(disk, offset, &bytes) {
                        true => writes += 1,
                        false => self.write(disk, offset, &bytes),
                    }
                    model[range].copy_from_slice(&bytes);
                }
                _ => {
                    let quick = self.quick_read(disk, offset, len);
                    reads += u32::from(quick.is_some());
                    let found = quick.unwrap_or_else(|| self.read(disk, offset, len));
                    assert!(found == model[range], "{offset} {len} seed {seed}");
                }
            }
        }
        (reads, writes)
    }
}

fn read_only(name: &str) -> Options {
    Options {
        writable: false,
        ..Options::new(name)
    }
}

#[test]
fn a_read_of_known_clusters_is_one_operation() {
    let bed = QuickBed::new();
    bed.make("a", Qcow2Create::new(SIZE));
    let disk = bed.qcow2("a", None, Options::new("a"));
    assert_eq!(bed.quick_read(&disk, 0, 512), None, "nothing has a place");
    bed.write(&disk, 0, &[1; CLUSTER as usize]);
    bed.write(&disk, CLUSTER, &[2; 4096]);
    assert_eq!(bed.quick_read(&disk, 512, 4096), Some(vec![1; 4096]));
    // Both clusters are in a row in the file.
    let both = bed.quick_read(&disk, CLUSTER - 512, 1024).unwrap();
    assert_eq!(both, [[1; 512], [2; 512]].concat());
    let rest = 2 * CLUSTER - 512;
    assert_eq!(bed.quick_read(&disk, rest, 1024), None, "a part is nowhere");
    let its = disk.clone();
    let how = Attributes::default();
    bed.run(async move { its.write_zeroes(0, CLUSTER, how).await })
        .unwrap();
    assert_eq!(bed.quick_read(&disk, 0, 512), None, "it is marked as zero");
    bed.pause(&disk);
    assert_eq!(bed.quick_read(&disk, CLUSTER, 512), None, "it is paused");
    let disk = bed.active(disk);
    assert_eq!(
        bed.quick_read(&disk, CLUSTER, 512),
        None,
        "no table is read"
    );
    assert_eq!(bed.read(&disk, CLUSTER, 512), [2; 512]);
    assert_eq!(bed.quick_read(&disk, CLUSTER, 512), Some(vec![2; 512]));
}

#[test]
fn a_write_over_what_one_disk_has_is_one_operation() {
    let bed = QuickBed::new();
    bed.make("a", Qcow2Create::new(SIZE));
    let disk = bed.qcow2("a", None, Options::new("a"));
    assert!(!bed.quick_write(&disk, 0, &[1; 512]), "it has no place");
    bed.write(&disk, 0, &[1; 4096]);
    assert!(bed.quick_write(&disk, 512, &[2; 512]));
    assert_eq!(bed.read(&disk, 0, 1024), [[1; 512], [2; 512]].concat());
    bed.pause(&disk);
    let disk = bed.qcow2("a", None, read_only("a"));
    assert_eq!(bed.read(&disk, 0, 512), [1; 512]);
    assert!(!bed.quick_write(&disk, 0, &[3; 512]), "it is read-only");
}

/// The answer to a write must not come before the image has the entry that leads to its cluster: the process may die.
#[test]
fn a_write_under_an_entry_that_is_on_its_way_is_not() {
    let bed = QuickBed::new();
    bed.make("a", Qcow2Create::new(SIZE));
    let disk = bed.qcow2("a", None, Options::new("a"));
    let done = Rc::new(Cell::new(false));
    let (its, is_done) = (disk.clone(), done.clone());
    bed.runtime.tasks.spawn(async move {
        let bytes = Bytes::copied(&[1; 512]).unwrap();
        its.write(0, bytes, Attributes::default()).await.unwrap();
        is_done.set(true);
    });
    let mut seen = 0;
    loop {
        while bed.runtime.tasks.run() {}
        if done.get() {
            break;
        }
        let reads = disk.begin_read(0, &Data::zeroed(512).unwrap()).is_some();
        let writes = disk.begin_write(0, &Bytes::copied(&[2; 512]).unwrap());
        assert!(writes.is_none());
        seen += u32::from(reads);
        bed.runtime.io.enter(true).unwrap();
    }
    assert!(seen > 0, "the entry was never on its way");
    assert!(bed.quick_write(&disk, 0, &[2; 512]));
}

/// By its entry the cluster has one user, and by its refcount two: a write there would change what the other one has.
#[test]
fn a_write_to_a_cluster_with_two_users_is_not() {
    let bed = QuickBed::new();
    bed.make("a", Qcow2Create::new(SIZE));
    let disk = bed.qcow2("a", None, Options::new("a"));
    bed.write(&disk, 0, &[1; 4096]);
    bed.pause(&disk);
    let image = fs::File::options()
        .read(true)
        .write(true)
        .open(bed.path("a"))
        .unwrap();
    let number = |at: u64| {
        let mut bytes = [0; 8];
        image.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    let place = |entry: u64| entry & 0x00ff_ffff_ffff_fe00;
    let data = place(number(place(number(number(40)))));
    let count = place(number(number(48))) + data / CLUSTER * 2;
    image.write_all_at(&[0, 2], count).unwrap();
    let disk = bed.active(disk);
    assert_eq!(bed.read(&disk, 0, 512), [1; 512]);
    // A write of another cluster reads the refcounts.
    bed.write(&disk, CLUSTER, &[1; 512]);
    bed.write(&disk, CLUSTER, &[2; 512]);
    assert!(bed.quick_write(&disk, CLUSTER, &[3; 512]));
    assert!(!bed.quick_write(&disk, 0, &[3; 512]));
    assert_eq!(bed.quick_read(&disk, 0, 512), Some(vec![1; 512]));
}

#[test]
fn an_image_keeps_the_place_until_the_operation_has_ended() {
    let bed = QuickBed::new();
    bed.make("a", Qcow2Create::new(SIZE));
    let disk = bed.qcow2("a", None, Options::new("a"));
    for writes in [false, true] {
        bed.write(&disk, 0, &[1; CLUSTER as usize]);
        let freed = || disk.stats()["clusters_freed"];
        let before = freed();
        let io = match writes {
            false => disk.begin_read(0, &Data::zeroed(512).unwrap()),
            true => disk.begin_write(0, &Bytes::copied(&[2; 512]).unwrap()),
        };
        let hold = bed.ended(io.unwrap(), 512);
        let (its, how) = (disk.clone(), Attributes::default());
        bed.run(async move { its.discard(0, CLUSTER, how).await })
            .unwrap();
        bed.flush(&disk);
        assert_eq!(freed(), before, "the operation may be under way");
        drop(hold);
        bed.flush(&disk);
        assert_eq!(freed(), before + 1);
    }
}

#[test]
fn a_read_of_what_a_backing_image_has_is_one_operation_there() {
    let bed = QuickBed::new();
    fs::write(bed.path("raw"), vec![1; SIZE as usize / 2]).unwrap();
    let over = |name: &str| Qcow2Create {
        backing: Some(BackingImage {
            name: name.into(),
            format: None,
        }),
        ..Qcow2Create::new(SIZE)
    };
    bed.make("middle", over("raw"));
    bed.make("top", over("middle"));
    let raw = Disk::new(Raw::new(bed.file("raw"), false));
    let middle = bed.qcow2("middle", Some(raw), Options::new("middle"));
    bed.write(&middle, CLUSTER, &[2; CLUSTER as usize]);
    bed.pause(&middle);
    let top = bed.qcow2("top", Some(middle), Options::new("top"));
    bed.write(&top, 2 * CLUSTER, &[3; CLUSTER as usize]);
    let clusters = [(0, 1), (1, 2), (2, 3)];
    for (cluster, byte) in clusters {
        let at = cluster * CLUSTER + 4096;
        assert_eq!(bed.read(&top, at, 512), [byte; 512]);
        assert_eq!(bed.quick_read(&top, at, 512), Some(vec![byte; 512]));
    }
    assert!(!bed.quick_write(&top, CLUSTER, &[4; 512]), "it is below");
    let end = SIZE / 2 - 512;
    assert_eq!(bed.quick_read(&top, end, 512), Some(vec![1; 512]));
    assert_eq!(bed.quick_read(&top, end, 1024), None, "zeroes follow");
}

#[test]
fn vhds_have_it_too() {
    let bed = QuickBed::new();
    bed.make_vhd("fixed", VhdKind::Fixed, None);
    let fixed = bed.vhd("fixed", None);
    assert!(bed.quick_write(&fixed, SIZE - 512, &[1; 512]));
    assert!(
        !bed.quick_write(&fixed, SIZE - 512, &[2; 1024]),
        "the footer"
    );
    assert_eq!(bed.quick_read(&fixed, SIZE - 512, 512), Some(vec![1; 512]));
    bed.pause(&fixed);

    bed.make_vhd("dynamic", VhdKind::Dynamic, None);
    let dynamic = bed.vhd("dynamic", None);
    assert!(!bed.quick_write(&dynamic, 0, &[1; 512]), "no block");
    assert_eq!(bed.quick_read(&dynamic, 0, 512), None);
    bed.write(&dynamic, 0, &[1; 512]);
    assert!(bed.quick_write(&dynamic, 512, &[2; 512]), "zeroes");
    let both = [[1; 512], [2; 512]].concat();
    assert_eq!(bed.quick_read(&dynamic, 0, 1024), Some(both));
    bed.pause(&dynamic);

    let parent = ParentOf {
        path: "dynamic".into(),
        id: [7; 16],
    };
    bed.make_vhd("top", VhdKind::Differencing, Some(parent));
    let top = bed.vhd("top", Some(bed.vhd("dynamic", None)));
    assert_eq!(bed.read(&top, 0, 512), [1; 512]);
    assert_eq!(bed.quick_read(&top, 0, 512), Some(vec![1; 512]));
    bed.write(&top, 512, &[3; 512]);
    assert_eq!(bed.quick_read(&top, 0, 512), Some(vec![1; 512]));
    assert_eq!(bed.quick_read(&top, 512, 512), Some(vec![3; 512]));
    assert_eq!(
        bed.quick_read(&top, 0, 1024),
        None,
        "a part is the parent's"
    );
    assert!(!bed.quick_write(&top, 0, &[4; 512]), "it is the parent's");
    assert!(bed.quick_write(&top, 512, &[4; 512]));
    let all = [[1; 512], [4; 512]].concat();
    assert_eq!(bed.read(&top, 0, 1024), all);
}

#[test]
fn both_ways_do_as_one_does() {
    if !has_qemu("quick.both_ways_do_as_one_does") {
        return;
    }
    let bed = QuickBed::new();
    for (name, cluster, extended, bits) in [
        ("large", 64 << 10, false, 16),
        ("small", 4 << 10, false, 1),
        ("parts", 16 << 10, true, 16),
    ] {
        let plan = Qcow2Create {
            cluster,
            extended,
            refcount_bits: bits,
            ..Qcow2Create::new(SIZE)
        };
        bed.make(name, plan);
        let disk = bed.qcow2(name, None, Options::new(name));
        let mut model = vec![0; SIZE as usize];
        let (mut reads, mut writes) = (0, 0);
        for seed in 0..4 {
            let more = bed.stir(&disk, &mut model, seed);
            (reads, writes) = (reads + more.0, writes + more.1);
        }
        assert!(reads > 100 && writes > 100, "{name}: {reads} {writes}");
        bed.pause(&disk);
        let path = bed.path(name);
        assert!(content("qcow2", &path, bed.folder.path()) == model);
        tool("qemu-img", &["check", "-q", "-f", "qcow2", text(&path)]);
    }
    bed.make_vhd("vhd", VhdKind::Dynamic, None);
    let disk = bed.vhd("vhd", None);
    let mut model = vec![0; SIZE as usize];
    let (reads, writes) = bed.stir(&disk, &mut model, 9);
    assert!(reads > 100 && writes > 100, "{reads} {writes}");
    bed.pause(&disk);
    assert!(content("vpc", &bed.path("vhd"), bed.folder.path())[..SIZE as usize] == model);
}
