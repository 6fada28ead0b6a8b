// SPDX-License-Identifier: MIT OR Apache-2.0
//! A node from the process' side: the data that it gets, and that mistakes of the kernel are found.

use diskio::{Errno, MappingAccess, Region};
use proptest::prelude::*;
use ring::response::ResponseStatus;
use ring::tap::abi::{self, Claims, Completion, Desc, Info, TapSegment};
use ring::tap::shadow::Op;
use rustix::fs::{ftruncate, memfd_create, MemfdFlags};
use rustix::io::pwrite;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use tapdev::fake::{FakeTap, SLOT};
use tapdev::{Kind, Mapper, Node, Params, Tap};
use zerocopy::IntoBytes;

const PARAMS: Params = Params {
    sectors: 2048,
    logical_block: 512,
    physical_block: 512,
    read_only: false,
    write_cache: true,
    discard: None,
    may_shrink: false,
};

fn started(fake: &FakeTap) -> Tap {
    let tap = Tap::open(fake.open().unwrap()).unwrap();
    tap.describe(&PARAMS).unwrap();
    tap.start(tapdev::Fence::Local).unwrap();
    tap
}

fn fetch(tap: &Tap, commits: &[Completion]) -> Vec<u16> {
    let mut tags = [0; 64];
    let count = tap.exchange(commits, &mut tags).unwrap();
    tags[..count].to_vec()
}

#[test]
fn requests_come_with_their_data_and_are_answered() {
    let fake = FakeTap::new(4).unwrap();
    let tap = started(&fake);
    let bytes: Vec<u8> = (0..SLOT).map(|at| (at >> 8) as u8).collect();
    let write = fake.send(Op::Write, 8, &bytes, true).unwrap();
    let read = fake.send(Op::Read, 512, &[0; 1024], false).unwrap();
    let flush = fake.send(Op::Flush, 0, &[], false).unwrap();
    let discard = fake.send_range(Op::Discard, 1000, 8).unwrap();
    let tags = fetch(&tap, &[]);
    assert_eq!(tags, [write, read, flush, discard]);
    let requests: Vec<_> = tags.iter().map(|tag| tap.request(*tag).unwrap()).collect();
    assert_eq!(
        requests
            .iter()
            .map(|r| (r.kind, r.offset, r.len))
            .collect::<Vec<_>>(),
        [
            (Kind::Write, 8 * 512, SLOT as u64),
            (Kind::Read, 512 * 512, 1024),
            (Kind::Flush, 0, 0),
            (Kind::Discard { secure: false }, 1000 * 512, 8 * 512),
        ]
    );
    assert!(requests[0].fua && !requests[0].replay);
    assert_eq!(requests[0].data.as_ref().unwrap().to_vec(), bytes);
    requests[1]
        .data
        .as_ref()
        .unwrap()
        .write(0, &bytes[1024..2048]);
    let results = [Ok(()), Ok(()), Err(Errno::IO), Err(Errno::OPNOTSUPP)];
    let commits: Vec<_> = requests
        .iter()
        .zip(results)
        .map(|(r, result)| r.done(result))
        .collect();
    assert!(fetch(&tap, &commits).is_empty());
    assert_eq!(fake.answer(write, 0).unwrap().0, ResponseStatus::Okay);
    assert_eq!(
        fake.answer(read, 1024).unwrap(),
        (ResponseStatus::Okay, bytes[1024..2048].to_vec())
    );
    assert_eq!(fake.answer(flush, 0).unwrap().0, ResponseStatus::Error);
    assert_eq!(
        fake.answer(discard, 0).unwrap().0,
        ResponseStatus::NotSupported
    );
    assert_eq!(fake.malformed(), 0);
}

#[test]
fn request_of_a_dead_process_comes_again() {
    let fake = FakeTap::new(2).unwrap();
    let tap = started(&fake);
    let tag = fake.send(Op::Write, 0, &[5; 512], false).unwrap();
    fetch(&tap, &[]);
    let stale = tap.request(tag).unwrap().done(Ok(()));
    drop(tap);
    assert!(fake.open().is_err(), "it is not fenced");
    fake.fence();
    let tap = started(&fake);
    assert_eq!(fetch(&tap, &[stale]), [tag]);
    assert_eq!(fake.info().refused, 1);
    let request = tap.request(tag).unwrap();
    assert!(request.replay);
    assert_eq!(request.data.as_ref().unwrap().to_vec(), [5; 512]);
    assert_eq!(fetch(&tap, &[request.returned()]), [tag]);
    let request = tap.request(tag).unwrap();
    fetch(&tap, &[request.done(Ok(()))]);
    assert_eq!(fake.answer(tag, 0).unwrap().0, ResponseStatus::Okay);
}

#[test]
fn size_may_change_and_what_guests_were_told_stays() {
    let fake = FakeTap::new(2).unwrap();
    let tap = started(&fake);
    let larger = Params {
        sectors: 4096,
        ..PARAMS
    };
    tap.describe(&larger).unwrap();
    let error = |params: Params| tap.describe(&params).unwrap_err().raw_os_error();
    let other = Params {
        logical_block: 4096,
        physical_block: 4096,
        ..larger
    };
    assert_eq!(error(other), Some(22), "EINVAL");
    assert_eq!(error(PARAMS), Some(34), "ERANGE: it is smaller");
    let hints = Params {
        physical_block: 8192,
        may_shrink: true,
        ..PARAMS
    };
    tap.describe(&hints).unwrap();
    let told = fake.wait_for_params();
    assert_eq!(told.sectors, PARAMS.sectors);
    assert_eq!(told.physical_block, PARAMS.physical_block);
}

/// A kernel that says whatever a test wants.
#[derive(Debug)]
struct Wrong {
    info: Info,
    descriptors: OwnedFd,
    arena: OwnedFd,
    fd: Rc<OwnedFd>,
}

impl Wrong {
    fn new(info: Info) -> Self {
        let memory = |len: u64| {
            let fd = memfd_create("area", MemfdFlags::CLOEXEC).unwrap();
            ftruncate(&fd, len.min(1 << 20)).unwrap();
            fd
        };
        let (descriptors, arena) = (memory(info.descriptors_len), memory(info.arena_len));
        Self {
            info,
            fd: Rc::new(memory(0)),
            descriptors,
            arena,
        }
    }
}

impl Node for Wrong {
    fn info(&self) -> io::Result<Info> {
        Ok(self.info)
    }
    fn map(&self, info: &Info) -> io::Result<(Region, Region)> {
        Ok((
            Region::map(
                self.descriptors.as_fd(),
                0,
                info.descriptors_len as usize,
                MappingAccess::Read,
            )?,
            Region::map(
                self.arena.as_fd(),
                0,
                info.arena_len as usize,
                MappingAccess::Write,
            )?,
        ))
    }
    fn set_params(&self, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
    fn claim(&self, _: &Claims) -> io::Result<()> {
        Ok(())
    }
    fn start(&self) -> io::Result<()> {
        Ok(())
    }
    fn exchange(&self, _: &[Completion], tags: &mut [u16]) -> io::Result<usize> {
        Ok(tags.len() + 1)
    }
    fn mapper(&self) -> io::Result<Arc<dyn Mapper>> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn fd(&self) -> &Rc<OwnedFd> {
        &self.fd
    }
}

const INFO: Info = Info {
    version: abi::VERSION,
    tags: 8,
    max_segments: 4,
    descriptors_len: 4096,
    segments_offset: 512,
    arena_len: 65536,
    minor: 0,
    features: 0,
    epoch: 0,
    state: 0,
    pid: 0,
    waiting: 0,
    delivered: 0,
    committed: 0,
    replayed: 0,
    refused: 0,
    oldest_ns: 0,
    domain: 0,
    device: 0,
    sectors: 0,
    poison_sector: 0,
    poison_sectors: 0,
    poison_op: 0,
    poisoned: 0,
    isolated: 0,
    memory_kib: 0,
    lacking: 0,
    direct: 0,
    backings: 0,
    executing: 0,
    failed_flushes: 0,
    reserved: 0,
};

#[test]
fn areas_that_do_not_fit_are_refused() {
    assert!(Tap::open(Wrong::new(INFO)).is_ok());
    for wrong in [
        Info { version: 2, ..INFO },
        Info { tags: 0, ..INFO },
        Info { tags: 65, ..INFO },
        Info {
            tags: abi::MAX_TAGS + 1,
            descriptors_len: 1 << 20,
            ..INFO
        },
        Info {
            max_segments: 0,
            ..INFO
        },
        Info {
            max_segments: 513,
            descriptors_len: 1 << 20,
            ..INFO
        },
        Info {
            segments_offset: 4096 - 255,
            ..INFO
        },
        Info {
            segments_offset: u64::MAX,
            ..INFO
        },
        Info {
            arena_len: 0,
            ..INFO
        },
        Info {
            arena_len: 1 << 40,
            ..INFO
        },
    ] {
        let refused = Tap::open(Wrong::new(wrong)).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidData, "{wrong:?}");
    }
}

#[test]
fn number_of_tags_is_bounded() {
    let tap = Tap::open(Wrong::new(INFO)).unwrap();
    let mut tags = [0; 4];
    assert_eq!(tap.exchange(&[], &mut tags).unwrap(), 4);
}

proptest! {
    /// With any content of the descriptor area, a request is refused, or its data is in the arena and as long as its
    /// descriptor has it.
    #[test]
    fn any_descriptor_is_survived(
        op in 0_u8..8,
        segments in 0_u16..6,
        sector in prop_oneof![0_u64..100, any::<u64>()],
        sectors in prop_oneof![0_u64..20, any::<u64>()],
        tag in 0_u16..10,
        said in 0_u16..10,
        pieces in prop::collection::vec(
            (prop_oneof![(0_u32..130).prop_map(|n| n * 512), any::<u32>()],
             prop_oneof![(0_u32..5).prop_map(|n| n * 512), any::<u32>()]), 4),
    ) {
        let node = Wrong::new(INFO);
        let desc = Desc { op, segments, sector, sectors, tag: said, generation: 9, ..Desc::default() };
        if tag < 8 {
            pwrite(&node.descriptors, desc.as_bytes(), u64::from(tag) * 64).unwrap();
            let pieces: Vec<TapSegment> =
                pieces.iter().map(|(offset, len)| TapSegment { offset: *offset, len: *len }).collect();
            pwrite(&node.descriptors, pieces.as_bytes(), 512 + u64::from(tag) * 32).unwrap();
        }
        let tap = Tap::open(node).unwrap();
        match tap.request(tag) {
            Ok(request) => {
                prop_assert!(tag == said);
                if let Some(data) = &request.data {
                    prop_assert_eq!(data.len() as u64, request.len);
                    prop_assert_eq!(data.to_vec().len() as u64, request.len);
                }
                prop_assert!(request.offset.checked_add(request.len).is_some());
                prop_assert_eq!(request.done(Ok(())).generation, if tag < 8 { 9 } else { 0 });
            }
            Err(malformed) => prop_assert_eq!(malformed.completion.tag, tag),
        }
    }
}
