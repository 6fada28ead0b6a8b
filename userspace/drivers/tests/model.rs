// SPDX-License-Identifier: MIT OR Apache-2.0
//! Each driver has the same effect on its image as the steps have on a vector of bytes in memory, also when requests
//! run at the same time, and when each is executed twice.

#[path = "model/example.rs"]
mod example;

use control::tapdisk::Open;
use control::{Code, Driver as Name};
use diskio::{Data, Engine, Errno, File, Runtime};
use drivers::{activate, create, open, Attributes, Content, Disk, DiskInfo, Extent};
use proptest::prelude::*;
use std::cell::RefCell;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::rc::Rc;

const SECTORS: u64 = 320;
const SIZE: u64 = SECTORS * 512;

/// Neither durable nor a replay.
const PLAIN: Attributes = Attributes {
    fua: false,
    replay: false,
    sequence: None,
};

/// Engines that the drivers are tried with.
const ENGINES: [Engine; 3] = [Engine::Uring, Engine::Aio, Engine::Sync];

/// A driver that the model judges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum JudgedDriver {
    /// One of the table.
    Named(Name),
    /// The example of the page about drivers.
    Example,
}

impl JudgedDriver {
    /// All drivers of this crate that keep writes, and the example.
    fn all() -> Vec<Self> {
        // `formats` has a model of its own, `tests/nbd` judges exports, and `null` forgets everything.
        let is_elsewhere =
            |name: &Name| name.has_format() || matches!(name, Name::Cow | Name::Nbd | Name::Null);
        let names = Name::ALL.iter().copied().filter(|name| !is_elsewhere(name));
        names.map(Self::Named).chain([Self::Example]).collect()
    }

    /// Makes a new disk of `SIZE` bytes.
    fn disk(self, runtime: &Runtime) -> (Disk, DiskInfo, tempfile::NamedTempFile) {
        let name = match self {
            Self::Named(name) => name,
            // Its image is used as one of these.
            Self::Example => Name::Aio,
        };
        let file = image(name, 0);
        let io = runtime.io.clone();
        let (fd, what) = (descriptor(name, &file), request(name, &file));
        let image = File::new(&io, fd).unwrap();
        let opened = runtime.block_on(async move {
            match self {
                Self::Named(name) => create(name, &image, SIZE).await.unwrap(),
                Self::Example => example::create(&image, SIZE).await.unwrap(),
            }
            match self {
                Self::Named(_) => drivers::open_on(&what, Some(image)).await,
                Self::Example => activate(example::open(&what, Some(image))?, &what).await,
            }
        });
        let (disk, shape) = opened.unwrap().unwrap();
        (disk, shape, file)
    }

    /// The image is the disk, byte for byte.
    fn is_verbatim(self) -> bool {
        matches!(self, Self::Named(Name::Aio | Name::Sync))
    }
}

/// A folder on the file system of the build, which can do direct I/O.
fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
}

/// A file that is `size` bytes long.
fn image(name: Name, size: u64) -> tempfile::NamedTempFile {
    let prefix = format!("{name}-");
    let file = tempfile::Builder::new()
        .prefix(&prefix)
        .tempfile_in(folder())
        .unwrap();
    file.as_file().set_len(size).unwrap();
    file
}

fn descriptor(name: Name, file: &tempfile::NamedTempFile) -> OwnedFd {
    let flags = if name.is_direct() { libc::O_DIRECT } else { 0 };
    let mut options = fs::File::options();
    options.read(true).write(true).custom_flags(flags);
    let file = options.open(file.path());
    file.expect("the file system of the build can do direct I/O")
        .into()
}

fn request(name: Name, file: &tempfile::NamedTempFile) -> Open {
    let target = match name.has_image() {
        true => format!("{name}:{}", file.path().display()),
        false => format!("{name}:{SIZE}"),
    };
    Open::new(target.parse().unwrap())
}

fn try_open(
    runtime: &Runtime,
    name: Name,
    file: &tempfile::NamedTempFile,
    what: Open,
) -> Result<(Disk, DiskInfo), control::Failure> {
    let io = runtime.io.clone();
    let image = Some(descriptor(name, file));
    runtime
        .block_on(async move { open(&io, &what, image).await })
        .unwrap()
}

#[derive(Clone, Debug)]
enum ModelStep {
    Read(u64, u64),
    Write(u64, u64, u8),
    Zeroes(u64, u64),
    Discard(u64, u64),
    Flush,
}

impl ModelStep {
    fn range(&self) -> Option<(u64, u64)> {
        match *self {
            Self::Read(at, n)
            | Self::Write(at, n, _)
            | Self::Zeroes(at, n)
            | Self::Discard(at, n) => Some((at, n)),
            Self::Flush => None,
        }
    }
}

fn step() -> impl Strategy<Value = ModelStep> {
    let range = || (0..SECTORS, 1..=160_u64).prop_map(|(at, n)| (at, n.min(SECTORS - at)));
    prop_oneof![
        4 => range().prop_map(|(at, n)| ModelStep::Read(at, n)),
        4 => (range(), 1_u8..).prop_map(|((at, n), byte)| ModelStep::Write(at, n, byte)),
        1 => range().prop_map(|(at, n)| ModelStep::Zeroes(at, n)),
        1 => range().prop_map(|(at, n)| ModelStep::Discard(at, n)),
        1 => Just(ModelStep::Flush),
    ]
}

fn bytes(sectors: u64, byte: u8) -> Vec<u8> {
    (0..sectors * 512)
        .map(|at| byte ^ (at / 512) as u8)
        .collect()
}

/// Applies a step to a vector; `read` is called for those that read.
fn apply(model: &mut [u8], step: &ModelStep) {
    let Some((at, n)) = step.range() else { return };
    let range = &mut model[(at * 512) as usize..][..(n * 512) as usize];
    match step {
        ModelStep::Write(_, n, byte) => range.copy_from_slice(&bytes(*n, *byte)),
        ModelStep::Zeroes(..) | ModelStep::Discard(..) => range.fill(0),
        _ => {}
    }
}

async fn execute(disk: &Disk, step: &ModelStep) -> Result<Option<Vec<u8>>, Errno> {
    // Some of them, always the same, are to be durable.
    let how = Attributes {
        fua: step.range().is_some_and(|(at, n)| (at + n) % 3 == 0),
        ..PLAIN
    };
    match *step {
        ModelStep::Read(at, n) => {
            let data = Data::zeroed((n * 512) as usize)?;
            disk.read(at * 512, data.clone()).await?;
            return Ok(Some(data.to_vec()));
        }
        ModelStep::Write(at, n, byte) => {
            let data = Data::copied(&bytes(n, byte))?;
            disk.write(at * 512, data, how).await?;
        }
        ModelStep::Zeroes(at, n) => disk.write_zeroes(at * 512, n * 512, how).await?,
        ModelStep::Discard(at, n) => disk.discard(at * 512, n * 512, how).await?,
        ModelStep::Flush => disk.flush().await?,
    }
    Ok(None)
}

/// Returns groups of steps that do not overlap.
fn groups(steps: Vec<ModelStep>) -> Vec<Vec<ModelStep>> {
    let mut groups: Vec<Vec<ModelStep>> = vec![Vec::new()];
    for step in steps {
        let last = groups.last().unwrap();
        let meets = |other: &ModelStep| match (step.range(), other.range()) {
            (Some((a, n)), Some((b, m))) => a < b + m && b < a + n,
            _ => false,
        };
        if last.iter().any(meets) {
            groups.push(Vec::new());
        }
        groups.last_mut().unwrap().push(step);
    }
    groups
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn drivers_agree_with_memory(steps in prop::collection::vec(step(), 1..40), twice: bool) {
        let groups = groups(steps);
        for (judged, engine) in JudgedDriver::all().into_iter().flat_map(|judged| ENGINES.map(|engine| (judged, engine))) {
            let runtime = Runtime::new();
            runtime.io.select(engine).unwrap();
            let (disk, shape, file) = judged.disk(&runtime);
            prop_assert_eq!(shape.size, SIZE);
            // Without the ability nothing becomes of a discard.
            let is_possible = |step: &ModelStep| shape.discard.is_some() || !matches!(step, ModelStep::Discard(..));
            let mut model = vec![0; SIZE as usize];
            for group in &groups {
                let group: Vec<_> = group.iter().filter(|step| is_possible(step)).cloned().collect();
                for step in &group {
                    apply(&mut model, step);
                }
                let wrong = Rc::new(RefCell::new(None));
                for step in group {
                    let (disk, wrong) = (disk.clone(), wrong.clone());
                    let expected = step.range().map(|(at, n)| model[(at * 512) as usize..][..(n * 512) as usize].to_vec());
                    runtime.tasks.spawn(async move {
                        for _ in 0..1 + u32::from(twice) {
                            let got = execute(&disk, &step).await;
                            if !matches!(&got, Ok(None)) && got != Ok(expected.clone()) {
                                *wrong.borrow_mut() = Some(step.clone());
                            }
                        }
                    });
                }
                runtime.finish().unwrap();
                prop_assert!(wrong.borrow().is_none(), "{:?} with {:?}: {:?}", judged, engine, wrong.borrow());
            }
            let all = Data::zeroed(SIZE as usize).unwrap();
            let (reader, target) = (disk.clone(), all.clone());
            runtime.block_on(async move { reader.read(0, target).await }).unwrap().unwrap();
            prop_assert!(all.to_vec() == model, "{:?} with {:?}", judged, engine);
            if judged.is_verbatim() {
                prop_assert!(fs::read(file.path()).unwrap() == model, "{:?} with {:?}", judged, engine);
            }
        }
    }
}

/// The page shows the driver that the model judges.
#[test]
fn the_page_shows_the_example() {
    let page = include_str!("../../../docs/contributing/write-a-driver.md");
    let file = include_str!("model/example.rs");
    assert!(
        page.contains(file),
        "copy tests/model/example.rs into the page"
    );
}

/// The maker of an image may write anything into its header.
#[test]
fn the_example_refuses_headers_that_cannot_be() {
    for (at, bytes) in [
        (0, &b"ELPMAXE1"[..]),
        (8, &0_u64.to_le_bytes()[..]),
        (8, &513_u64.to_le_bytes()[..]),
        (8, &(SIZE + 512).to_le_bytes()[..]),
        (8, &(u64::MAX - 511).to_le_bytes()[..]),
    ] {
        let runtime = Runtime::new();
        let (disk, _, file) = JudgedDriver::Example.disk(&runtime);
        drop(disk);
        file.as_file().write_all_at(bytes, at).unwrap();
        let what = request(Name::Aio, &file);
        let image = File::new(&runtime.io, descriptor(Name::Aio, &file)).unwrap();
        let opened = runtime
            .block_on(async move { activate(example::open(&what, Some(image))?, &what).await });
        assert_eq!(
            opened.unwrap().unwrap_err().code,
            Code::Image,
            "{at} {bytes:?}"
        );
    }
}

#[test]
fn shape_of_a_raw_image() {
    let runtime = Runtime::new();
    let file = image(Name::Aio, 10 * 4096 + 512);
    let (disk, shape) = try_open(&runtime, Name::Aio, &file, request(Name::Aio, &file)).unwrap();
    assert_eq!(shape.size, 10 * 4096 + 512);
    assert_eq!(shape.logical_block, 512);
    assert!(
        shape.write_cache
            && shape
                .discard
                .is_some_and(|unit| unit % shape.logical_block == 0)
    );
    file.as_file().set_len(1 << 20).unwrap();
    let size = runtime
        .block_on(async move { disk.resize().await })
        .unwrap();
    assert_eq!(size, Ok(1 << 20));
}

#[test]
fn extents_are_what_was_written() {
    let page = 4096;
    for name in [Name::Aio, Name::Ram] {
        let runtime = Runtime::new();
        let file = image(name, SIZE);
        let (disk, _) = try_open(&runtime, name, &file, request(name, &file)).unwrap();
        let found = runtime.block_on(async move {
            let data = Data::copied(&[1; 8192])?;
            disk.write(4 * page, data, PLAIN).await?;
            let mut found = Vec::new();
            let mut at = page;
            // The range ends before the image does, in the middle of a hole.
            while at < 16 * page {
                for extent in disk.extents(at, 16 * page - at).await? {
                    at += extent.len;
                    found.push(extent);
                }
            }
            Ok::<_, Errno>(found)
        });
        let extent = |pages, content| Extent {
            len: pages * page,
            content,
        };
        let expected = [
            extent(3, Content::Hole),
            extent(2, Content::Data),
            extent(10, Content::Hole),
        ];
        assert_eq!(found.unwrap().unwrap(), expected, "{name}");
    }
}

#[test]
fn part_of_a_sector_is_refused() {
    let runtime = Runtime::new();
    let file = image(Name::Aio, 4096 + 100);
    let what = request(Name::Aio, &file);
    let failure = try_open(&runtime, Name::Aio, &file, what.clone()).unwrap_err();
    assert_eq!(failure.code, Code::Image);
    assert!(failure.message.contains("4196") && failure.message.contains("truncate"));
    // The connected disk keeps its size.
    file.as_file().set_len(8192).unwrap();
    let (disk, _) = try_open(&runtime, Name::Aio, &file, what).unwrap();
    file.as_file().set_len(10_000).unwrap();
    let size = runtime.block_on(async move { disk.resize().await });
    assert_eq!(size.unwrap().unwrap_err().code, Code::Image);
}

#[test]
fn what_may_not_be_written_or_discarded() {
    let runtime = Runtime::new();
    let file = image(Name::Aio, 8192);
    let what = Open {
        discard: false,
        ..request(Name::Aio, &file)
    };
    let (disk, shape) = try_open(&runtime, Name::Aio, &file, what).unwrap();
    assert_eq!(shape.discard, None);
    let result = runtime.block_on(async move { disk.discard(0, 4096, PLAIN).await });
    assert_eq!(result.unwrap(), Err(Errno::OPNOTSUPP));
}

#[test]
fn image_that_cannot_be_served_is_refused() {
    let runtime = Runtime::new();
    let empty = image(Name::Aio, 0);
    let failure = try_open(&runtime, Name::Aio, &empty, request(Name::Aio, &empty)).unwrap_err();
    assert_eq!(failure.code, Code::Image);
    let io = runtime.io.clone();
    let what = request(Name::Aio, &empty);
    let failure = runtime
        .block_on(async move { open(&io, &what, None).await })
        .unwrap()
        .unwrap_err();
    assert_eq!(failure.code, Code::Invalid);
    let file = image(Name::Aio, 4096);
    let read_only = fs::File::open(file.path()).unwrap().into();
    let (io, what) = (runtime.io.clone(), request(Name::Aio, &file));
    let failure = runtime
        .block_on(async move { open(&io, &what, Some(read_only)).await })
        .unwrap()
        .unwrap_err();
    assert_eq!(failure.code, Code::Invalid);
}

#[test]
fn image_has_one_writer_or_many_readers() {
    let runtime = Runtime::new();
    let file = image(Name::Aio, 4096);
    let reading = Open {
        read_only: true,
        ..request(Name::Aio, &file)
    };
    let sharing = Open {
        shared: true,
        ..request(Name::Aio, &file)
    };
    let first = try_open(&runtime, Name::Aio, &file, reading.clone()).unwrap();
    let second = try_open(&runtime, Name::Aio, &file, reading).unwrap();
    let _ = try_open(&runtime, Name::Aio, &file, sharing).unwrap();
    drop(first);
    // The writer waits until the last reader is gone.
    let readers = Rc::new(RefCell::new(Some(second)));
    let (gone, io) = (readers.clone(), runtime.io.clone());
    runtime.tasks.spawn(async move {
        io.sleep(std::time::Duration::from_millis(20))
            .await
            .unwrap();
        gone.borrow_mut().take();
    });
    try_open(&runtime, Name::Aio, &file, request(Name::Aio, &file)).unwrap();
    assert!(readers.borrow().is_none());
}

#[test]
fn memory_of_a_ram_disk_is_what_was_written() {
    let runtime = Runtime::new();
    let what = Open::new("ram:1T".parse().unwrap());
    let memory = tempfile::tempfile().unwrap();
    let (io, its) = (runtime.io.clone(), memory.try_clone().unwrap().into());
    let small = runtime.block_on({
        let (io, what) = (io.clone(), what.clone());
        async move { open(&io, &what, Some(its)).await }
    });
    assert_eq!(small.unwrap().unwrap_err().code, Code::Image);
    memory.set_len(1 << 40).unwrap();
    let used = runtime
        .block_on(async move {
            let (disk, shape) = open(&io, &what, Some(memory.into())).await.unwrap();
            assert_eq!(shape.size, 1 << 40);
            disk.write((1 << 40) - 512, Data::copied(&[1; 512]).unwrap(), PLAIN)
                .await
                .unwrap();
            let written = disk.stats()["memory_bytes"];
            disk.discard(0, 1 << 20, PLAIN).await.unwrap();
            disk.write_zeroes((1 << 40) - (64 << 10), 64 << 10, PLAIN)
                .await
                .unwrap();
            (written, disk.stats()["memory_bytes"])
        })
        .unwrap();
    assert!((512..=64 << 10).contains(&used.0), "{used:?}");
    assert_eq!(used.1, 0);
}
