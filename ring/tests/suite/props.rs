// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Properties of requests and responses, by generated examples that shrink.

use proptest::array::uniform8;
use proptest::collection::vec;
use proptest::prelude::*;
use ring::abi::{self, Protocol};
use ring::request::{Ordering, RawRequest, RequestLimits, RingRequest};
use ring::response::{Response, ResponseStatus};

use crate::encode::{discard, indirect, other, rw, Seg};
use crate::oracle::{self, VerdictKind};

fn protocols() -> impl Strategy<Value = Protocol> {
    prop_oneof![Just(Protocol::Abi64), Just(Protocol::Abi32)]
}

fn limits() -> impl Strategy<Value = RequestLimits> {
    let sectors = prop_oneof![
        0..100u64,
        any::<u64>(),
        (0..10u64).prop_map(|n| u64::MAX - n)
    ];
    let flags = proptest::array::uniform5(any::<bool>());
    (sectors, 0..5u32, flags, any::<u16>()).prop_map(|(sectors, shift, flags, most)| {
        let [read_only, flush, barrier, discard, secure_discard] = flags;
        RequestLimits {
            sectors,
            block_sectors: 1 << shift,
            read_only,
            max_indirect_segments: most,
            flush,
            barrier,
            discard,
            secure_discard,
        }
    })
}

/// Mostly segments that lie inside a page.
fn segs() -> impl Strategy<Value = Seg> {
    let good =
        (any::<u32>(), 0..8u8, 0..8u8).prop_map(|(gref, a, b)| Seg::new(gref, a.min(b), a.max(b)));
    let any_seg = (any::<u32>(), any::<u8>(), any::<u8>()).prop_map(|(g, a, b)| Seg::new(g, a, b));
    prop_oneof![20 => good, 10 => any::<u32>().prop_map(Seg::page), 1 => any_seg]
}

/// A slot of any bytes or an encoded request of any kind.
fn slots() -> impl Strategy<Value = RawRequest> {
    let bytes =
        (protocols(), vec(any::<u8>(), abi::MAX_SLOT_SIZE)).prop_map(|(protocol, bytes)| {
            let bytes = bytes.try_into().expect("the size of a slot");
            RawRequest { bytes, protocol }
        });
    let sector = || {
        prop_oneof![
            0..100u64,
            any::<u64>(),
            (0..20u64).prop_map(|n| u64::MAX - n)
        ]
    };
    let rws = (
        protocols(),
        0..4u8,
        any::<u64>(),
        sector(),
        0..13u8,
        vec(segs(), 11),
    )
        .prop_map(|(p, op, id, sector, count, segs)| rw(p, op, id, sector, count, &segs));
    let discards = (protocols(), any::<u8>(), any::<u64>(), sector(), sector())
        .prop_map(|(p, flag, id, sector, sectors)| discard(p, flag, id, sector, sectors));
    let indirects = (
        protocols(),
        0..3u8,
        any::<u64>(),
        sector(),
        0..5000u16,
        uniform8(any::<u32>()),
    )
        .prop_map(|(p, op, id, sector, count, grefs)| indirect(p, op, id, sector, count, grefs));
    prop_oneof![bytes, rws, discards, indirects]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_slot_is_judged_as_the_oracle_judges_it(raw in slots(), limits in limits()) {
        // The oracle panics where it disagrees.
        let (kind, outcome) = oracle::check(&raw, &limits);
        prop_assert_eq!(outcome.is_err(), matches!(kind, VerdictKind::Error | VerdictKind::NotSupported));
    }

    #[test]
    fn accepted_transfers_stay_inside_the_disk(raw in slots(), limits in limits()) {
        if let Ok(RingRequest::Direct(d)) = raw.check(&limits) {
            let sum: u64 = d.segments().map(|s| u64::from(s.sectors())).sum();
            let end = u128::from(d.sector) + u128::from(sum);
            prop_assert!(sum == 0 || end <= u128::from(limits.sectors));
            prop_assert_eq!(sum % u64::from(limits.block_sectors), 0);
        }
    }

    #[test]
    fn plain_request_is_what_the_full_check_makes_of_it(raw in slots(), limits in limits()) {
        let plain = raw.plain(&limits);
        let checked = match raw.check(&limits) {
            Ok(RingRequest::Direct(direct)) if direct.ordering == Ordering::Plain => Some(direct),
            _ => None,
        };
        prop_assert_eq!(plain.is_some(), checked.is_some());
        if let Some((plain, direct)) = plain.zip(checked) {
            prop_assert_eq!(
                (plain.id, plain.operation, plain.direction, plain.sector, plain.count()),
                (direct.id, direct.operation, direct.direction, direct.sector, direct.count())
            );
            prop_assert!(plain.segments().eq(direct.segments()));
            let sectors: u64 = direct.segments().map(|segment| u64::from(segment.sectors())).sum();
            prop_assert_eq!(plain.sectors, sectors);
        }
    }

    #[test]
    fn words_that_a_request_does_not_use_change_nothing(raw in slots(), limits in limits()) {
        let first = raw.bytes.first_chunk().map_or(0, |first| u64::from_le_bytes(*first));
        let mut other = raw;
        if raw.protocol == Protocol::Abi64 {
            let unused = other.bytes.iter_mut().skip(abi::used_words(first).saturating_mul(8));
            unused.for_each(|byte| *byte = !*byte);
        }
        let judged = |raw: &RawRequest| match raw.check(&limits) {
            Ok(RingRequest::Direct(d)) => {
                let segments: Vec<_> = d.segments().collect();
                format!("{:?} {segments:?}", (d.id, d.operation, d.direction, d.ordering, d.sector))
            }
            other => format!("{other:?}"),
        };
        prop_assert_eq!(judged(&raw), judged(&other));
        prop_assert_eq!(raw.plain(&limits).is_some(), other.plain(&limits).is_some());
    }

    #[test]
    fn descriptors_are_judged_as_the_oracle_judges_them(
        p in protocols(), op in 0..2u8, sector in 0..64u64,
        segs in vec(segs(), 1..40), short in 0..3u16, limits in limits(),
    ) {
        let raw = indirect(p, op, 1, sector, segs.len() as u16 + short / 2, [1; 8]);
        let open = RequestLimits { max_indirect_segments: 4096, read_only: false, ..limits };
        if let Ok(RingRequest::Indirect(request)) = raw.check(&open) {
            let bytes: Vec<[u8; 8]> = segs.iter().map(Seg::bytes).collect();
            // Checked again with the first limits: a disk may turn read-only in between.
            oracle::check_segments(&request, &bytes, &open);
            oracle::check_segments(&request, &bytes, &limits);
        } else {
            prop_assert!(false, "refused a request that every disk accepts");
        }
    }
}

/// A disk that offers everything and is large.
const ALL: RequestLimits = RequestLimits {
    sectors: u64::MAX,
    block_sectors: 1,
    read_only: false,
    max_indirect_segments: 4096,
    flush: true,
    barrier: true,
    discard: true,
    secure_discard: true,
};

proptest! {
    #![proptest_config(ProptestConfig { cases: 1024, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn direct_requests_survive_the_wire(
        p in protocols(), op in 0..4u8, id in any::<u64>(), sector in 0..u64::MAX / 2,
        segs in vec((any::<u32>(), 0..8u8, 0..8u8), 1..=11),
    ) {
        let segs: Vec<Seg> = segs.iter().map(|&(g, a, b)| Seg::new(g, a.min(b), a.max(b))).collect();
        let Ok(RingRequest::Direct(d)) = rw(p, op, id, sector, segs.len() as u8, &segs).check(&ALL) else {
            return Err(TestCaseError::fail("refused"));
        };
        prop_assert_eq!((d.id, d.operation, d.sector), (id, op, sector));
        let back: Vec<Seg> = d.segments().map(|s| {
            let first = s.offset() / 512;
            Seg::new(s.gref(), first as u8, (first + s.sectors() - 1) as u8)
        }).collect();
        prop_assert_eq!(back, segs);
    }

    #[test]
    fn discards_survive_the_wire(
        p in protocols(), secure in any::<bool>(), id in any::<u64>(),
        sector in 0..u64::MAX / 2, sectors in 0..u64::MAX / 2,
    ) {
        let Ok(RingRequest::Discard(d)) = discard(p, u8::from(secure), id, sector, sectors).check(&ALL) else {
            return Err(TestCaseError::fail("refused"));
        };
        prop_assert_eq!((d.id, d.sector, d.sectors, d.secure), (id, sector, sectors, secure));
    }

    #[test]
    fn indirect_requests_survive_the_wire(
        p in protocols(), op in 0..2u8, id in any::<u64>(), sector in any::<u64>(),
        count in 1..=4096u16, grefs in uniform8(any::<u32>()),
    ) {
        let Ok(RingRequest::Indirect(i)) = indirect(p, op, id, sector, count, grefs).check(&ALL) else {
            return Err(TestCaseError::fail("refused"));
        };
        prop_assert_eq!((i.id, i.operation, i.sector, i.count()), (id, op, sector, count));
        let named: Vec<u32> = i.descriptors().map(|d| d.0).collect();
        prop_assert_eq!(&named[..], &grefs[..i.pages()]);
    }

    #[test]
    fn other_requests_echo_their_identifier(p in protocols(), op in 7..=255u8, id in any::<u64>()) {
        let reject = other(p, op, id).check(&ALL).expect_err("accepted an unknown operation");
        prop_assert_eq!((reject.response.id, reject.response.operation), (id, op));
    }

    #[test]
    fn response_words_are_the_bytes_of_the_wire(
        id in any::<u64>(), operation in any::<u8>(),
        status in prop_oneof![Just(ResponseStatus::Okay), Just(ResponseStatus::Error), Just(ResponseStatus::NotSupported)],
    ) {
        let words = Response { id, operation, status }.words();
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let mut want = [0; 16];
        want[..8].copy_from_slice(&id.to_le_bytes());
        want[8] = operation;
        let wire: i16 = match status { ResponseStatus::Okay => 0, ResponseStatus::Error => -1, ResponseStatus::NotSupported => -2 };
        want[10..12].copy_from_slice(&wire.to_le_bytes());
        prop_assert_eq!(&bytes[..], &want[..], "padding must be zero");
    }
}
