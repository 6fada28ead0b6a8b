// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every engine does the same to a file as a vector of bytes in memory does to itself. Files are on
//! the real file system, opened for direct I/O.

use diskio::{Align, Data, Engine, Errno, File, Io, Op, Opened, Region, Runtime};
use proptest::prelude::*;
use std::cell::{Cell, RefCell};
use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

const ENGINES: [Engine; 3] = [Engine::Uring, Engine::Aio, Engine::Sync];
/// Number on every architecture.
const SYS_CACHESTAT: libc::c_long = 451;
const O_DIRECT: i32 = libc::O_DIRECT;

/// A folder on the file system of the build, which can do direct I/O; /tmp may not.
fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
}

fn runtime(engine: Engine) -> Runtime {
    let runtime = Runtime::new();
    runtime.io.select(engine).expect("the engine works here");
    assert_eq!(runtime.io.engine(), engine);
    runtime
}

fn open(content: &[u8], flags: i32) -> OwnedFd {
    let mut file = tempfile::NamedTempFile::new_in(folder()).unwrap();
    file.write_all(content).unwrap();
    file.flush().unwrap();
    fs::File::options()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(file.path())
        .expect("the file system of the build can do direct I/O")
        .into()
}

/// Data in pieces of a region that are not in order.
fn scattered(region: &Rc<Region>, sizes: &[usize]) -> Data {
    let mut end = region.len();
    let pieces = sizes.iter().map(|size| {
        end -= size;
        (end, *size)
    });
    Data::new(region, pieces.collect::<Vec<_>>()).unwrap()
}

#[derive(Clone, Debug)]
enum EngineStep {
    Read(u64, usize),
    Write(u64, usize, u8),
    Zero(u64, u64),
    Discard(u64, u64),
    Flush,
}

const SECTORS: u64 = 96;

fn step() -> impl Strategy<Value = EngineStep> {
    let range =
        || (0..SECTORS, 1..=32_u64).prop_map(|(at, n)| (at * 512, n.min(SECTORS - at) * 512));
    prop_oneof![
        4 => range().prop_map(|(at, len)| EngineStep::Read(at, len as usize)),
        4 => (range(), 1_u8..).prop_map(|((at, len), byte)| EngineStep::Write(at, len as usize, byte)),
        1 => range().prop_map(|(at, len)| EngineStep::Zero(at, len)),
        1 => range().prop_map(|(at, len)| EngineStep::Discard(at, len)),
        1 => Just(EngineStep::Flush),
    ]
}

/// Executes the steps on a file and on a vector, which must agree after each read and at the end.
fn compare(
    engine: Engine,
    align: Option<Align>,
    direct: bool,
    register: bool,
    steps: &[EngineStep],
) {
    let size = (SECTORS * 512) as usize;
    let mut model: Vec<u8> = (0..size).map(|at| (at / 512) as u8).collect();
    let runtime = runtime(engine);
    let fd = open(&model, if direct { O_DIRECT } else { 0 });
    let mut file = File::new(&runtime.io, fd).unwrap();
    assert_eq!(file.is_direct().unwrap(), direct);
    if let Some(align) = align {
        file = file.with_align(align);
    }
    let arena = Rc::new(Region::anonymous(1 << 20).unwrap());
    if register {
        let done = runtime.io.register(Some(&arena)).unwrap();
        assert_eq!(done, engine == Engine::Uring);
    }
    for step in steps.iter().cloned() {
        let file = file.clone();
        match step {
            EngineStep::Read(at, len) => {
                let data = scattered(&arena, &vec![512; len / 512]);
                let target = data.clone();
                runtime
                    .block_on(async move { file.read(at, target).await })
                    .unwrap()
                    .unwrap();
                assert_eq!(data.to_vec(), model[at as usize..][..len]);
            }
            EngineStep::Write(at, len, byte) => {
                let data = scattered(&arena, &[len]);
                let bytes: Vec<u8> = (0..len).map(|n| byte ^ (n / 512) as u8).collect();
                data.write(0, &bytes);
                runtime
                    .block_on(async move {
                        match byte % 4 {
                            0 => {
                                file.write_durable(at, data, async || file.flush().await)
                                    .await
                            }
                            _ => file.write(at, data).await,
                        }
                    })
                    .unwrap()
                    .unwrap();
                model[at as usize..][..len].copy_from_slice(&bytes);
            }
            EngineStep::Zero(at, len) => {
                runtime
                    .block_on(async move { file.write_zeroes(at, len).await })
                    .unwrap()
                    .unwrap();
                model[at as usize..][..len as usize].fill(0);
            }
            EngineStep::Discard(at, len) => {
                runtime
                    .block_on(async move { file.discard(at, len).await })
                    .unwrap()
                    .unwrap();
                // A hole of a file reads as zeroes.
                model[at as usize..][..len as usize].fill(0);
            }
            EngineStep::Flush => runtime
                .block_on(async move { file.flush().await })
                .unwrap()
                .unwrap(),
        }
    }
    let whole = Data::zeroed(size).unwrap();
    let target = whole.clone();
    let reader = file.clone();
    runtime
        .block_on(async move { reader.read(0, target).await })
        .unwrap()
        .unwrap();
    assert_eq!(whole.to_vec(), model);
    assert_eq!(runtime.io.transfers(), 0);
    assert_eq!(file.size().unwrap(), size as u64);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn engines_agree_with_memory(steps in prop::collection::vec(step(), 1..24)) {
        for engine in ENGINES {
            compare(engine, None, true, true, &steps);
        }
        compare(Engine::Uring, None, true, false, &steps);
        compare(Engine::Sync, None, false, false, &steps);
    }

    /// A disk with blocks of 4096 bytes, which the guest does not know.
    #[test]
    fn parts_of_blocks_agree_with_memory(steps in prop::collection::vec(step(), 1..24)) {
        let align = Align { memory: 4096, offset: 4096 };
        for engine in ENGINES {
            compare(engine, Some(align), true, true, &steps);
        }
    }
}

/// Writes of neighbouring sectors of one block, all at once: none may undo another.
#[test]
fn parts_of_one_block_do_not_undo_each_other() {
    for engine in ENGINES {
        let runtime = runtime(engine);
        let fd = open(&[0; 8192], O_DIRECT);
        let align = Align {
            memory: 4096,
            offset: 4096,
        };
        let file = File::new(&runtime.io, fd).unwrap().with_align(align);
        for sector in 0..16_u64 {
            let file = file.clone();
            runtime.tasks.spawn(async move {
                let data = Data::copied(&[sector as u8 + 1; 512]).unwrap();
                file.write(sector * 512, data).await.unwrap();
            });
        }
        runtime.finish().unwrap();
        let data = Data::zeroed(8192).unwrap();
        let target = data.clone();
        runtime
            .block_on(async move { file.read(0, target).await })
            .unwrap()
            .unwrap();
        for (sector, bytes) in data.to_vec().chunks(512).enumerate() {
            assert_eq!(bytes, [sector as u8 + 1; 512], "{engine:?}");
        }
    }
}

/// More operations than the engines take at once.
#[test]
fn many_operations_at_once() {
    for engine in ENGINES {
        let runtime = runtime(engine);
        let content: Vec<u8> = (0..1 << 20).map(|at| (at >> 9) as u8).collect();
        let file = File::new(&runtime.io, open(&content, O_DIRECT)).unwrap();
        let done = Rc::new(Cell::new(0));
        for at in 0..2048_u64 {
            let (file, done) = (file.clone(), done.clone());
            runtime.tasks.spawn(async move {
                let data = Data::zeroed(512).unwrap();
                file.read(at * 512, data.clone()).await.unwrap();
                assert_eq!(data.to_vec(), [at as u8; 512]);
                done.set(done.get() + 1);
            });
        }
        runtime.finish().unwrap();
        assert_eq!(done.get(), 2048, "{engine:?}");
    }
}

#[test]
fn end_of_the_file_is_an_error() {
    for engine in ENGINES {
        let runtime = runtime(engine);
        let file = File::new(&runtime.io, open(&[1; 1024], O_DIRECT)).unwrap();
        let data = Data::zeroed(4096).unwrap();
        let result = runtime
            .block_on(async move { file.read(0, data).await })
            .unwrap();
        assert_eq!(result, Err(Errno::IO), "{engine:?}");
    }
}

#[test]
fn error_of_the_system_is_told() {
    for engine in ENGINES {
        let runtime = runtime(engine);
        let path = tempfile::NamedTempFile::new_in(folder()).unwrap();
        path.as_file().set_len(4096).unwrap();
        let fd = fs::File::open(path.path()).unwrap().into();
        let file = File::new(&runtime.io, fd).unwrap();
        assert!(!file.is_writable().unwrap());
        let data = Data::zeroed(4096).unwrap();
        let result = runtime
            .block_on(async move { file.write(0, data).await })
            .unwrap();
        assert_eq!(result, Err(Errno::BADF), "{engine:?}");
    }
}

/// A device that is always full; it does not know AIO.
#[test]
fn no_space_is_told() {
    for engine in [Engine::Uring, Engine::Sync] {
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        assert_eq!(write_at(engine, full.into(), 0), Err(Errno::NOSPC));
    }
}

#[test]
fn write_beyond_what_files_can_have_is_told() {
    for engine in ENGINES {
        let fd = open(&[0; 512], O_DIRECT);
        let result = write_at(engine, fd, (1 << 62) - 512);
        assert_eq!(result, Err(Errno::FBIG), "{engine:?}");
    }
}

#[test]
fn nothing_is_written_behind_the_room_of_a_file() {
    for engine in ENGINES {
        let runtime = runtime(engine);
        let fd = open(&[1; 4096], O_DIRECT);
        let file = File::new(&runtime.io, fd).unwrap().with_room(8192);
        let (done, file) = runtime
            .block_on(async move {
                let data = || Data::zeroed(4096).unwrap();
                let done = [
                    file.write(4096, data()).await,
                    file.write(4608, data()).await,
                    file.write_durable(8192, data(), async || file.flush().await)
                        .await,
                    file.write_zeroes(4096, 8192).await,
                    file.write_zeroes(0, 8192).await,
                    file.write(u64::MAX, data()).await,
                ];
                (done, file)
            })
            .unwrap();
        let full = Err(Errno::NOSPC);
        let expected = [Ok(()), full, full, full, Ok(()), Err(Errno::INVAL)];
        assert_eq!(done, expected, "{engine:?}");
        assert_eq!(file.size().unwrap(), 8192);
    }
}

fn write_at(engine: Engine, fd: OwnedFd, offset: u64) -> Result<u32, Errno> {
    let runtime = runtime(engine);
    let op = Op::Write {
        file: Rc::new(fd.into()),
        offset,
        data: Data::zeroed(512).unwrap().into(),
        durable: false,
    };
    let io = runtime.io.clone();
    runtime
        .block_on(async move { io.submit(op).await })
        .unwrap()
}

/// A write of a part of a block brings the rest of the block along, also where the file has ended.
#[test]
fn what_earlier_transfers_left_in_memory_is_not_written() {
    let runtime = runtime(Engine::Sync);
    let align = Align {
        memory: 512,
        offset: 4096,
    };
    let file = |content: &[u8]| {
        let fd = open(content, 0);
        let copy = fs::File::from(fd.try_clone().unwrap());
        (File::new(&runtime.io, fd).unwrap().with_align(align), copy)
    };
    let (first, _) = file(&[0xff; 8192]);
    let (second, its) = file(&[1; 512]);
    let done = runtime.block_on(async move {
        first.read(512, Data::zeroed(512)?).await?;
        second.write(512, Data::copied(&[2; 512])?).await
    });
    done.unwrap().unwrap();
    let mut bytes = [9; 4096];
    its.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(
        bytes,
        [[1; 512], [2; 512], [0; 512], [0; 512], [0; 512], [0; 512], [0; 512], [0; 512]].concat()[..]
    );
}

/// Pages of a file that are not written back (`struct cachestat` of the kernel).
fn dirty_pages(fd: &OwnedFd) -> u64 {
    let range = [0_u64; 2];
    let mut stat = [0_u64; 5];
    // SAFETY: the call reads two numbers and writes five.
    let result = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            fd.as_raw_fd(),
            range.as_ptr(),
            stat.as_mut_ptr(),
            0,
        )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    stat[1]
}

#[test]
fn durable_write_is_written_back_before_it_is_over() {
    for engine in ENGINES {
        let runtime = runtime(engine);
        let fd = open(&[0; 16384], 0);
        let file = File::new(&runtime.io, fd.try_clone().unwrap()).unwrap();
        let write = |durable: bool| {
            let (file, data) = (file.clone(), Data::copied(&[5; 16384]).unwrap());
            let write = async move {
                match durable {
                    true => {
                        file.write_durable(0, data, async || file.flush().await)
                            .await
                    }
                    false => file.write(0, data).await,
                }
            };
            runtime.block_on(write).unwrap().unwrap();
            dirty_pages(&fd)
        };
        assert_eq!((write(false), write(true)), (4, 0), "{engine:?}");
    }
}

#[test]
fn descriptor_becomes_ready_beside_transfers() {
    for engine in ENGINES {
        let runtime = runtime(engine);
        let (mut a, b) = UnixStream::pair().unwrap();
        let b = Rc::new(OwnedFd::from(b));
        let order = Rc::new(RefCell::new(Vec::new()));
        let file = File::new(&runtime.io, open(&[0; 4096], O_DIRECT)).unwrap();
        let (io, seen) = (runtime.io.clone(), order.clone());
        runtime.tasks.spawn(async move {
            io.readable(&b).await.unwrap();
            seen.borrow_mut().push("ready");
        });
        let seen = order.clone();
        runtime.tasks.spawn(async move {
            let data = Data::zeroed(4096).unwrap();
            file.read(0, data).await.unwrap();
            seen.borrow_mut().push("read");
            a.write_all(b"x").unwrap();
        });
        runtime.finish().unwrap();
        assert_eq!(*order.borrow(), ["read", "ready"], "{engine:?}");
    }
}

/// A wait for a descriptor continues when the engine changes, in either direction.
#[test]
fn engine_can_change_while_something_waits() {
    for from in ENGINES {
        for to in ENGINES {
            let runtime = runtime(from);
            let (mut a, b) = UnixStream::pair().unwrap();
            let b = Rc::new(OwnedFd::from(b));
            let io = runtime.io.clone();
            runtime
                .tasks
                .spawn(async move { io.readable(&b).await.unwrap() });
            runtime.turn(false).unwrap();
            runtime.io.select(to).unwrap();
            runtime.turn(false).unwrap();
            assert_eq!(runtime.tasks.tasks(), 1);
            a.write_all(b"x").unwrap();
            runtime.finish().unwrap();
        }
    }
}

/// The ring goes, and what waits for a descriptor does not.
#[test]
fn ring_can_be_closed_while_something_waits() {
    let runtime = runtime(Engine::Uring);
    let (mut a, b) = UnixStream::pair().unwrap();
    let b = Rc::new(OwnedFd::from(b));
    let io = runtime.io.clone();
    runtime
        .tasks
        .spawn(async move { io.readable(&b).await.unwrap() });
    runtime.turn(false).unwrap();
    let file = Rc::new(open(&[0; 4096], O_DIRECT).into());
    let read = runtime.io.submit(Op::Read {
        file,
        offset: 0,
        data: Data::zeroed(4096).unwrap(),
    });
    let busy = runtime.io.close_uring().unwrap_err();
    assert_eq!(busy.kind(), std::io::ErrorKind::ResourceBusy);
    assert_eq!(runtime.block_on(read).unwrap(), Ok(4096));
    runtime.io.close_uring().unwrap();
    assert_eq!(runtime.io.engine(), Engine::Sync);
    assert_eq!(runtime.tasks.tasks(), 1);
    a.write_all(b"x").unwrap();
    runtime.finish().unwrap();
}

#[test]
fn cancelled_and_dropped_operations_end() {
    for engine in ENGINES {
        let runtime = runtime(engine);
        let (_a, b) = UnixStream::pair().unwrap();
        let b = Rc::new(OwnedFd::from(b));
        let wait = |fd: &Rc<OwnedFd>| {
            runtime.io.submit(Op::Ready {
                fd: fd.clone(),
                write: false,
            })
        };
        drop(wait(&b));
        let pending = Rc::new(wait(&b));
        runtime.turn(false).unwrap();
        pending.cancel();
        // The end of the wait is an event, so the thread does not sleep.
        runtime.io.enter(true).unwrap();
        let pending = Rc::into_inner(pending).unwrap();
        let result = runtime.block_on(pending).unwrap();
        assert_eq!(result, Err(Errno::CANCELED), "{engine:?}");
        let dropped = wait(&b);
        runtime.turn(false).unwrap();
        drop(dropped);
        // The engine drops its reference to the descriptor with the operation.
        while Rc::strong_count(&b) > 1 {
            runtime.io.enter(true).unwrap();
        }
        let idle = runtime.io.enter(true).unwrap_err();
        assert_eq!(idle.kind(), std::io::ErrorKind::Deadlock);
    }
}

/// The future that waits for a transfer goes away; the memory may not, until it is over.
#[test]
fn memory_stays_until_the_transfer_is_over() {
    for engine in ENGINES {
        let runtime = runtime(engine);
        let fd = Rc::new(Opened::from(open(&[7; 1 << 20], O_DIRECT)));
        for _ in 0..32 {
            let region = Rc::new(Region::anonymous(1 << 20).unwrap());
            let data = Data::new(&region, [(0, 1 << 20)]).unwrap();
            drop(runtime.io.submit(Op::Read {
                file: fd.clone(),
                offset: 0,
                data,
            }));
            assert_eq!(Rc::strong_count(&region), 2);
            while Rc::strong_count(&region) > 1 {
                runtime.io.enter(true).unwrap();
            }
            let mut last = [0];
            region.read((1 << 20) - 1, &mut last);
            assert_eq!(last, [7]);
        }
        // Dropped with an operation under way: it is waited for.
        drop(runtime.io.submit(Op::Read {
            file: fd.clone(),
            offset: 0,
            data: Data::zeroed(1 << 20).unwrap(),
        }));
        runtime.io.enter(false).unwrap();
    }
}

#[test]
fn command_to_what_knows_none_is_refused() {
    for engine in ENGINES {
        let runtime = runtime(engine);
        let op = Op::Command {
            fd: Rc::new(open(&[0; 512], 0)),
            number: 1,
            argument: [0; 16],
            keep: Rc::new(Region::anonymous(1).unwrap()),
            quick: true,
        };
        let io = runtime.io.clone();
        let result = runtime
            .block_on(async move { io.submit(op).await })
            .unwrap();
        assert_eq!(result, Err(Errno::OPNOTSUPP), "{engine:?}");
    }
}

/// A task that sleeps long does not make others sleep longer.
#[test]
fn time_passes_while_others_work() {
    for engine in ENGINES {
        let runtime = runtime(engine);
        let io = runtime.io.clone();
        runtime.tasks.spawn(async move {
            let _ended = io.sleep(Duration::from_secs(3600)).await;
        });
        for time in [Duration::ZERO, Duration::from_millis(30)] {
            let (io, start) = (runtime.io.clone(), Instant::now());
            let slept = runtime.block_on(async move { io.sleep(time).await });
            slept.unwrap().unwrap();
            assert!(start.elapsed() >= time, "{engine:?}");
        }
    }
}

#[test]
fn inherited_descriptor_is_copied() {
    let (mut a, b) = UnixStream::pair().unwrap();
    let copy = diskio::inherited(b.as_raw_fd()).unwrap();
    drop(b);
    a.write_all(b"x").unwrap();
    let mut byte = [0];
    UnixStream::from(copy).read_exact(&mut byte).unwrap();
    assert!(diskio::inherited(-1).is_err());
    assert!(diskio::inherited(1 << 30).is_err());
}

#[test]
fn what_is_no_image_is_refused() {
    let runtime = runtime(Engine::Sync);
    let null: OwnedFd = fs::File::open("/dev/null").unwrap().into();
    assert!(File::new(&runtime.io, null).is_err());
}

#[test]
fn pieces_outside_of_the_region_are_refused() {
    let region = Rc::new(Region::anonymous(4096).unwrap());
    for pieces in [
        vec![],
        vec![(0, 0)],
        vec![(0, 4097)],
        vec![(4096, 1)],
        vec![(0, 512), (usize::MAX, 512)],
    ] {
        assert!(Data::new(&region, pieces.clone()).is_none(), "{pieces:?}");
    }
    let data = Data::new(&region, [(1024, 512), (1536, 512), (0, 512)]).unwrap();
    region.write(1024, &[1; 1024]);
    region.write(0, &[2; 512]);
    assert_eq!(data.len(), 1536);
    assert_eq!(
        data.part(1000, 100).to_vec(),
        [[1; 24].as_slice(), &[2; 76]].concat()
    );
}

#[test]
fn what_takes_too_long_is_given_up() {
    let runtime = Runtime::new();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let (io, ours) = (runtime.io.clone(), Rc::new(OwnedFd::from(ours)));
    let wait = |io: Io, ours: Rc<OwnedFd>, limit| async move {
        io.within(limit, io.readable(&ours)).await
    };
    let soon = wait(io.clone(), ours.clone(), Duration::from_millis(10));
    assert_eq!(runtime.block_on(soon).unwrap(), Err(Errno::TIMEDOUT));
    theirs.write_all(b"x").unwrap();
    let late = wait(io, ours, Duration::from_secs(60));
    assert_eq!(runtime.block_on(late).unwrap(), Ok(()));
}
