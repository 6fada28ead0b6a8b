// SPDX-License-Identifier: MIT OR Apache-2.0
//! Each side of the kernel's interface with the other one of the time before there were claims.

use ring::response::ResponseStatus;
use ring::tap::abi::{self, Claims, Completion, Desc, MapOp};
use ring::tap::shadow::Op;
use rustix::io::Errno;
use std::io::ErrorKind;
use tapdev::fake::{FakeNode, FakeTap};
use tapdev::{Fence, Kind, Node, Params, Tap};
use zerocopy::FromBytes;

/// The description of a disk of 1 MiB that can be discarded, in the bytes of that version.
fn description() -> Vec<u8> {
    let words: [u32; 14] = [
        1, 24, 2048, 0, 512, 4096, 2, 0, // size, blocks, a volatile cache
        2, 16, 4096, 0, 0, 0, // discards
    ];
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// A process of then: it asks, describes, starts, and reads of a descriptor what there was.
struct Before(FakeNode);

impl Before {
    fn start(fake: &FakeTap) -> Self {
        let node = fake.open().unwrap();
        node.set_params(&description()).unwrap();
        node.start().unwrap();
        Self(node)
    }

    /// Fetches one request: its operation, sectors, and the completion that says that it is done.
    fn fetch(&self) -> (u8, u64, u64, Completion) {
        let info = self.0.info().unwrap();
        assert_eq!(info.version, 1);
        let mut tags = [0];
        assert_eq!(self.0.exchange(&[], &mut tags).unwrap(), 1);
        let (descriptors, _) = self.0.map(&info).unwrap();
        let mut bytes = [0; 64];
        descriptors.read(usize::from(tags[0]) * 64, &mut bytes);
        let number = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap());
        let generation = u32::from_ne_bytes(bytes[4..8].try_into().unwrap());
        let mut answer = [0; 16];
        answer[..2].copy_from_slice(&tags[0].to_ne_bytes());
        answer[4..8].copy_from_slice(&generation.to_ne_bytes());
        let completion = Completion::read_from_bytes(&answer).unwrap();
        (bytes[0], number(8), number(16), completion)
    }
}

#[test]
fn a_process_of_before_is_served() {
    let fake = FakeTap::new(4).unwrap();
    let process = Before::start(&fake);
    for (op, number) in [
        (Op::Discard, 3),
        (Op::WriteZeroes, 5),
        (Op::SecureDiscard, 6),
    ] {
        let tag = fake.send_range(op, 16, 8).unwrap();
        let (op, sector, sectors, done) = process.fetch();
        assert_eq!((op, sector, sectors), (number, 16, 8));
        assert_eq!(process.0.exchange(&[done], &mut []).unwrap(), 0);
        assert_eq!(fake.answer(tag, 0).unwrap().0, ResponseStatus::Okay);
    }
    // The old process dies with a request, and a new one continues; then the other way around.
    let tag = fake.send(Op::Write, 0, &[7; 512], false).unwrap();
    let _ = process.fetch();
    drop(process);
    fake.fence();
    let tap = now(&fake);
    let mut tags = [0; 4];
    assert_eq!(tap.exchange(&[], &mut tags).unwrap(), 1);
    assert!(tap.request(tags[0]).unwrap().replay);
    drop(tap);
    fake.fence();
    let process = Before::start(&fake);
    let (op, _, _, done) = process.fetch();
    assert_eq!(op, 1);
    assert_eq!(process.0.exchange(&[done], &mut []).unwrap(), 0);
    assert_eq!(fake.answer(tag, 0).unwrap().0, ResponseStatus::Okay);
    assert_eq!((fake.malformed(), fake.info().refused), (0, 0));
}

fn now(fake: &FakeTap) -> Tap {
    let tap = Tap::open(fake.open().unwrap()).unwrap();
    let params = Params::parse(&description()).unwrap();
    tap.describe(&params).unwrap();
    tap.start(Fence::Local).unwrap();
    tap
}

#[test]
fn a_process_of_now_serves_under_a_kernel_of_before() {
    let fake = FakeTap::before_claims(4).unwrap();
    let refused = fake.open().unwrap().claim(&Claims::default()).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(Errno::NOTTY.raw_os_error()));
    fake.fence();
    let tap = now(&fake);
    let tag = fake.send_range(Op::Discard, 16, 8).unwrap();
    let mut tags = [0; 4];
    assert_eq!(tap.exchange(&[], &mut tags).unwrap(), 1);
    let request = tap.request(tags[0]).unwrap();
    assert_eq!(request.kind, Kind::Discard { secure: false });
    assert_eq!(tap.exchange(&[request.done(Ok(()))], &mut []).unwrap(), 0);
    assert_eq!(fake.answer(tag, 0).unwrap().0, ResponseStatus::Okay);
}

#[test]
fn what_the_process_does_not_understand_is_named() {
    let fake = FakeTap::new(4).unwrap();
    // The disk of a later process, which took something that is not known here.
    fake.offer(1 << abi::OP_READ | 1 << 40 | 1 << 41);
    let tap = Tap::open(fake.open().unwrap()).unwrap();
    tap.describe(&Params::parse(&description()).unwrap())
        .unwrap();
    let refused = tap.start(Fence::Local).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::Unsupported);
    let text = refused.to_string();
    assert!(text.contains("operation 40, operation 41"), "{text}");
    drop(tap);
    fake.fence();
    fake.offer(abi::OPERATIONS);
    now(&fake);
}

#[test]
fn who_claims_too_little_is_not_started() {
    let fake = FakeTap::new(4).unwrap();
    let node = fake.open().unwrap();
    node.set_params(&description()).unwrap();
    let claim = |operations, features| {
        let claims = Claims {
            operations,
            features,
            fence: abi::FENCE_LOCAL,
            ..Claims::default()
        };
        node.claim(&claims).map_err(|error| error.raw_os_error())
    };
    let unknown = Some(Errno::OPNOTSUPP.raw_os_error());
    assert_eq!(claim(1 << 63, 0), Err(unknown));
    assert_eq!(claim(0, 1 << 63), Err(unknown));
    let discard = 1 << abi::OP_DISCARD;
    claim(abi::OPERATIONS & !discard, 0).unwrap();
    let refused = node.start().unwrap_err();
    assert_eq!(refused.raw_os_error(), unknown);
    assert_eq!(fake.info().lacking, discard);
    assert_eq!(fake.info().state, abi::STATE_OPEN);
    // The guest waits, and nothing is delivered.
    fake.send_range(Op::Discard, 16, 8).unwrap();
    assert_eq!(node.exchange(&[], &mut [0]).unwrap(), 0);
    claim(abi::OPERATIONS, 0).unwrap();
    node.start().unwrap();
    assert_eq!(node.exchange(&[], &mut [0]).unwrap(), 1);
}

#[test]
fn under_a_kernel_of_before_what_goes_over_a_network_waits() {
    let fake = FakeTap::before_claims(4).unwrap();
    let tap = Tap::open(fake.open().unwrap()).unwrap();
    tap.describe(&Params::parse(&description()).unwrap())
        .unwrap();
    let refused = tap.start(Fence::None).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
    let minutes = Fence::Session { settle_ms: 600_000 };
    // There was no process before.
    assert!(tap.settles(minutes).is_zero());
    tap.start(minutes).unwrap();
    let tag = fake.send(Op::Write, 0, &[7; 512], false).unwrap();
    let mut tags = [0; 4];
    assert_eq!(tap.exchange(&[], &mut tags).unwrap(), 1);
    drop(tap);
    fake.fence();
    let tap = Tap::open(fake.open().unwrap()).unwrap();
    let refused = tap.start(minutes).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ResourceBusy, "{refused}");
    assert!(refused.to_string().contains("over a network"), "{refused}");
    let soon = Fence::Session { settle_ms: 50 };
    while !tap.settles(soon).is_zero() {
        std::thread::sleep(tap.settles(soon));
    }
    tap.start(soon).unwrap();
    assert_eq!(tap.exchange(&[], &mut tags).unwrap(), 1);
    assert_eq!(tags[0], tag);
}

#[test]
fn what_cannot_be_fenced_fails() {
    let fake = FakeTap::new(4).unwrap();
    let tap = Tap::open(fake.open().unwrap()).unwrap();
    tap.describe(&Params::parse(&description()).unwrap())
        .unwrap();
    tap.start(Fence::None).unwrap();
    let tag = fake.send(Op::Write, 0, &[7; 512], false).unwrap();
    let mut tags = [0; 4];
    assert_eq!(tap.exchange(&[], &mut tags).unwrap(), 1);
    assert_eq!(tap.request(tags[0]).unwrap().deliveries, 1);
    drop(tap);
    fake.fence();
    assert_eq!(fake.answer(tag, 0).unwrap().0, ResponseStatus::Error);
}

/// A mapping of the first half of the disk.
fn mapping(generation: u32) -> MapOp {
    MapOp {
        op: abi::MAP_SET,
        flags: abi::MAP_READ | abi::MAP_WRITE,
        generation,
        sectors: 1024,
        ..MapOp::default()
    }
}

const EVERYTHING: MapOp = MapOp {
    op: abi::MAP_RECALL,
    flags: 0,
    backing: 0,
    generation: 0,
    sector: 0,
    sectors: u64::MAX,
    offset: 0,
    reserved: [0; 2],
};

#[test]
fn mappings_are_for_who_claims_them() {
    let fake = FakeTap::new(4).unwrap();
    fake.back(1);
    let invalid = Some(Errno::INVAL.raw_os_error());
    let process = Before::start(&fake);
    let refused = process.0.maps(&[]).unwrap_err();
    assert_eq!(refused.raw_os_error(), invalid);
    drop(process);
    fake.fence();
    let tap = Tap::open(fake.open().unwrap()).unwrap();
    let mapper = tap.mapper().unwrap().expect("the kernel has them");
    let early = mapper.maps(&[mapping(0)]).unwrap_err();
    assert_eq!(early.raw_os_error(), invalid, "before the start");
    tap.describe(&Params::parse(&description()).unwrap())
        .unwrap();
    tap.start(Fence::Local).unwrap();
    let now = mapper.maps(&[]).unwrap();
    assert_eq!((now.generation, now.backings, now.refused), (0, 1, 0));
    let recalled = mapper.maps(&[mapping(0), EVERYTHING]).unwrap();
    assert_eq!((recalled.generation, recalled.refused), (1, 0));
    // It does not know of the recall.
    assert_eq!(mapper.maps(&[mapping(0)]).unwrap().refused, 1);
    assert_eq!(
        fake.map_ops(),
        [mapping(0), EVERYTHING, mapping(0)],
        "what was refused is remembered, too"
    );
}

#[test]
fn a_kernel_of_before_has_no_mappings() {
    let fake = FakeTap::before_claims(4).unwrap();
    let tap = now(&fake);
    assert!(tap.mapper().unwrap().is_none());
}

/// The process of before reads this, whatever is added: a `Desc` of then.
#[test]
fn descriptors_are_where_they_were() {
    assert_eq!(size_of::<Desc>(), 64);
    assert_eq!(std::mem::offset_of!(Desc, generation), 4);
    assert_eq!(std::mem::offset_of!(Desc, sectors), 16);
}
