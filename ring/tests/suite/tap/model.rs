// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The shadow compared with its model: random histories, and all short ones.

use proptest::prelude::*;
use ring::response::ResponseStatus;
use ring::tap::checked::{Fence, RequestOutcome};
use ring::tap::extent::{ExtentAccess, Sectors};
use ring::tap::shadow::{Op, PostedRequest};

use crate::tap_pair::{Pair, ShadowStep, OVER, QUEUES, ZEROES};

fn requests() -> impl Strategy<Value = PostedRequest> {
    let op = prop_oneof![
        4 => Just(Op::Read),
        5 => Just(Op::Write),
        1 => Just(Op::Flush),
        1 => Just(Op::Discard),
        1 => Just(Op::WriteZeroes),
        1 => Just(Op::SecureDiscard),
    ];
    // Sizes around those of the granules of the index, at places where these meet.
    let size = prop_oneof![0..4u64, 60..70u64, 4090..4100u64, Just(1 << 21)];
    let place = prop_oneof![0..8u64, 58..70u64, 4085..4105u64, 8185..8195u64];
    (op, place, size, any::<bool>(), any::<bool>()).prop_map(
        |(op, sector, sectors, preflush, fua)| PostedRequest {
            op,
            preflush: preflush && op == Op::Write,
            fua,
            sector,
            sectors,
            segments: 1,
        },
    )
}

fn steps(tags: u16) -> impl Strategy<Value = ShadowStep> {
    let tag = 0..tags;
    let outcome = prop_oneof![
        4 => Just(RequestOutcome::Finished(ResponseStatus::Okay)),
        1 => Just(RequestOutcome::Finished(ResponseStatus::Error)),
        1 => Just(RequestOutcome::Returned),
    ];
    // Mostly the right generation, and sometimes a wrong one.
    let beside = prop_oneof![9 => Just(0u32), 1 => Just(1), 1 => Just(u32::MAX)];
    let ago = prop_oneof![12 => Just(0u64), 1 => Just(1)];
    let queue = 0..QUEUES;
    prop_oneof![
        12 => (0..tags + 1, prop_oneof![20 => 0..QUEUES, 1 => Just(63u16), 1 => Just(64)], requests())
            .prop_map(|(tag, queue, request)| ShadowStep::Post(tag, queue, request)),
        6 => (prop_oneof![Just(1usize), Just(2), Just(usize::MAX)], ago.clone())
            .prop_map(|(max, ago)| ShadowStep::Deliver(max, ago)),
        1 => Just(ShadowStep::Look),
        12 => (tag, outcome, beside, ago.clone())
            .prop_map(|(tag, outcome, beside, ago)| ShadowStep::Commit(tag, outcome, beside, ago)),
        4 => (queue.clone(), prop_oneof![Just(1usize), Just(usize::MAX)])
            .prop_map(|(queue, max)| ShadowStep::Reap(queue, max)),
        3 => Just(ShadowStep::Open),
        3 => ago.clone().prop_map(ShadowStep::Start),
        1 => Just(ShadowStep::Close),
        2 => Just(ShadowStep::Quiet),
        2 => (0..80u32).prop_map(ShadowStep::Pass),
        2 => (fences(), ago.clone()).prop_map(|(fence, ago)| ShadowStep::Claim(fence, ago)),
        1 => queue.clone().prop_map(ShadowStep::Withdraw),
        1 => queue.prop_map(ShadowStep::Orphan),
        1 => prop_oneof![Just(1usize), Just(usize::MAX)].prop_map(ShadowStep::Fail),
        1 => Just(0u64).prop_map(ShadowStep::Excuse),
    ]
}

fn fences() -> impl Strategy<Value = Fence> {
    prop_oneof![
        2 => Just(Fence::Local),
        2 => (1..60u32).prop_map(|settle_ms| Fence::Session { settle_ms }),
        1 => Just(Fence::None),
    ]
}

/// A death after which another process starts, perhaps one that knows its reason.
fn deaths() -> impl Strategy<Value = Vec<ShadowStep>> {
    (any::<bool>(), fences()).prop_map(|(excused, fence)| {
        let excuse = excused.then_some(ShadowStep::Excuse(0));
        let over = [ShadowStep::Close].into_iter().chain(OVER);
        let open = [ShadowStep::Open, ShadowStep::Claim(fence, 0)];
        over.chain(open)
            .chain(excuse)
            .chain([ShadowStep::Start(0)])
            .collect()
    })
}

/// Steps on a disk with backings.
fn mapped_steps(tags: u16) -> impl Strategy<Value = ShadowStep> {
    let tag = || 0..tags;
    let queue = || 0..QUEUES;
    let status = prop_oneof![5 => Just(ResponseStatus::Okay), 1 => Just(ResponseStatus::Error)];
    let range = || {
        let some = (0..8200u64, prop_oneof![1..32u64, Just(1 << 13)]);
        let some = some.prop_map(|(start, count)| Sectors::new(start, count).expect("not empty"));
        prop_oneof![3 => some, 1 => Just(Sectors::ALL)]
    };
    let whole = (0..1u64, 14..22u32)
        .prop_map(|(start, bits)| Sectors::new(start, 1 << bits).expect("not empty"));
    let access = prop_oneof![1 => Just(ExtentAccess::Read), 3 => Just(ExtentAccess::ReadWrite)];
    let beside = prop_oneof![6 => Just(0u32), 1 => Just(1)];
    let set = (prop_oneof![range(), whole], access, 0..=ZEROES, beside);
    prop_oneof![
        12 => steps(tags),
        12 => (tag(), queue(), requests()).prop_map(|(tag, queue, r)| ShadowStep::Begin(tag, queue, r)),
        8 => (tag(), status).prop_map(|(tag, status)| ShadowStep::End(tag, status)),
        4 => (queue(), prop_oneof![Just(1usize), Just(usize::MAX)])
            .prop_map(|(queue, max)| ShadowStep::Resume(queue, max)),
        5 => set.prop_map(|(range, access, backing, ago)| ShadowStep::Set(range, access, backing, ago)),
        1 => Just(ShadowStep::SetFlush),
        1 => range().prop_map(ShadowStep::Recall),
        1 => (0..2u16).prop_map(ShadowStep::Remove),
        2 => (0..2u16).prop_map(ShadowStep::Add),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn the_shadow_of_a_mapped_disk_does_what_the_model_does(
        tags in prop_oneof![Just(2u16), Just(3), Just(8), Just(40)],
        limit in prop_oneof![3 => Just(0u8), 1 => 1..4u8],
        backings in 1..3u16,
        steps in prop::collection::vec(
            prop_oneof![20 => mapped_steps(41).prop_map(|step| vec![step]), 1 => deaths()],
            0..120,
        ),
    ) {
        let all = ShadowStep::Set(Sectors::new(0, 1 << 14).expect("not empty"), ExtentAccess::ReadWrite, 0, 0);
        let start = [ShadowStep::Limit(limit), ShadowStep::Open, ShadowStep::Start(0), all, ShadowStep::SetFlush];
        let mut pair = Pair::mapped(tags, 16, backings).after(&start);
        for step in steps.into_iter().flatten() {
            pair.apply(fit(step, tags));
        }
        pair.drain();
    }

    #[test]
    fn the_shadow_does_what_the_model_does(
        tags in prop_oneof![Just(1u16), Just(2), Just(3), Just(16), Just(40)],
        limit in prop_oneof![2 => Just(0u8), 1 => 1..4u8],
        steps in prop::collection::vec(
            prop_oneof![12 => steps(41).prop_map(|step| vec![step]), 1 => deaths()],
            0..120,
        ),
    ) {
        let mut pair = Pair::with(tags, &[ShadowStep::Limit(limit), ShadowStep::Open, ShadowStep::Start(0)]);
        for step in steps.into_iter().flatten() {
            pair.apply(fit(step, tags));
        }
        pair.drain();
    }
}

/// Makes most steps name an existing tag.
fn fit(step: ShadowStep, tags: u16) -> ShadowStep {
    let fit = |tag: u16| if tag > 40 { tag } else { tag % tags };
    match step {
        ShadowStep::Post(tag, queue, request) => ShadowStep::Post(fit(tag), queue, request),
        ShadowStep::Begin(tag, queue, request) => ShadowStep::Begin(fit(tag), queue, request),
        ShadowStep::End(tag, status) => ShadowStep::End(fit(tag), status),
        ShadowStep::Commit(tag, outcome, beside, ago) => {
            ShadowStep::Commit(fit(tag), outcome, beside, ago)
        }
        other => other,
    }
}

/// Every order of steps on three tags, from several starts.
#[test]
fn every_short_history_does_what_the_model_does() {
    let request = super::shadow::request;
    let write = request(Op::Write, 0, 8);
    let read = request(Op::Read, 4, 8);
    let flush = request(Op::Flush, 0, 0);
    let finished = RequestOutcome::Finished(ResponseStatus::Okay);
    let mut steps = vec![
        ShadowStep::Deliver(1, 0),
        ShadowStep::Deliver(8, 0),
        ShadowStep::Commit(0, RequestOutcome::Returned, 0, 0),
        ShadowStep::Reap(0, 1),
        ShadowStep::Close,
        ShadowStep::Quiet,
        ShadowStep::Open,
        ShadowStep::Start(0),
        ShadowStep::Orphan(0),
        ShadowStep::Fail(8),
    ];
    for tag in 0..3 {
        steps.push(ShadowStep::Commit(tag, finished, 0, 0));
    }
    steps.push(ShadowStep::Post(0, 0, write));
    steps.push(ShadowStep::Post(2, 1, read));
    let three = [
        ShadowStep::Post(1, 0, write),
        ShadowStep::Post(0, 1, read),
        ShadowStep::Post(2, 0, flush),
    ];
    let dead = [
        ShadowStep::Deliver(8, 0),
        ShadowStep::Close,
        ShadowStep::Quiet,
    ];
    let starts: [&[ShadowStep]; 4] = [
        &[],
        &[ShadowStep::Open, ShadowStep::Start(0)],
        &[&[ShadowStep::Open, ShadowStep::Start(0)], &three[..]].concat(),
        &[
            &[ShadowStep::Open, ShadowStep::Start(0)],
            &three[..],
            &dead[..],
            &[ShadowStep::Open, ShadowStep::Start(0)],
        ]
        .concat(),
    ];
    let mut count = 0;
    for start in starts {
        explore(&Pair::with(3, start), &steps, 4, &mut count);
    }
    assert!(count > 200_000, "{count}");
}

/// Every end of a process whose I/O outlives it, and every way to declare it over.
#[test]
fn every_short_end_of_a_process_does_what_the_model_does() {
    let write = super::shadow::request(Op::Write, 0, 8);
    let session = |settle_ms| ShadowStep::Claim(Fence::Session { settle_ms }, 0);
    let steps = [
        ShadowStep::Deliver(8, 0),
        ShadowStep::Commit(0, RequestOutcome::Finished(ResponseStatus::Okay), 0, 0),
        ShadowStep::Claim(Fence::Local, 0),
        ShadowStep::Claim(Fence::None, 0),
        session(3),
        session(5),
        ShadowStep::Start(0),
        ShadowStep::Close,
        ShadowStep::Quiet,
        ShadowStep::Pass(3),
        ShadowStep::Pass(2),
        ShadowStep::Open,
    ];
    let mut count = 0;
    for limit in [0, 2] {
        let start = [
            ShadowStep::Limit(limit),
            ShadowStep::Open,
            session(3),
            ShadowStep::Start(0),
            ShadowStep::Post(0, 0, write),
            ShadowStep::Post(1, 1, write),
            ShadowStep::Deliver(1, 0),
        ];
        let again = [
            ShadowStep::Close,
            ShadowStep::Quiet,
            ShadowStep::Pass(3),
            ShadowStep::Quiet,
            ShadowStep::Open,
        ];
        let served = [
            session(5),
            ShadowStep::Start(0),
            ShadowStep::Post(2, 0, write),
            ShadowStep::Look,
        ];
        let gone = [ShadowStep::Close, ShadowStep::Quiet];
        let starts = [
            start.to_vec(),
            [&start[..], &again, &served].concat(),
            [&start[..], &gone].concat(),
        ];
        for start in starts {
            explore(&Pair::with(3, &start), &steps, 4, &mut count);
        }
    }
    assert!(count > 120_000, "{count}");
}

/// Every order of steps on three tags of a disk with mappings, from several starts.
#[test]
fn every_short_history_of_a_mapped_disk_does_what_the_model_does() {
    let request = super::shadow::request;
    let write = request(Op::Write, 0, 8);
    let read = request(Op::Read, 4, 8);
    let discard = request(Op::Discard, 0, 16);
    let range = Sectors::new(0, 64).expect("not empty");
    let set = |access| ShadowStep::Set(range, access, 0, 0);
    let writable = set(ExtentAccess::ReadWrite);
    let mut steps = vec![
        writable,
        set(ExtentAccess::Read),
        ShadowStep::Set(range, ExtentAccess::ReadWrite, 0, 1),
        ShadowStep::Recall(Sectors::new(8, 8).expect("not empty")),
        ShadowStep::Deliver(8, 0),
        ShadowStep::Resume(0, 1),
        ShadowStep::Resume(1, 8),
        ShadowStep::Close,
        ShadowStep::Quiet,
        ShadowStep::Fail(8),
        ShadowStep::Orphan(1),
        ShadowStep::End(0, ResponseStatus::Error),
        ShadowStep::Commit(0, RequestOutcome::Returned, 0, 0),
        ShadowStep::Begin(0, 0, write),
        ShadowStep::Begin(1, 1, read),
        ShadowStep::Post(2, 0, discard),
    ];
    for tag in 0..3 {
        steps.push(ShadowStep::End(tag, ResponseStatus::Okay));
        steps.push(ShadowStep::Commit(
            tag,
            RequestOutcome::Finished(ResponseStatus::Okay),
            0,
            0,
        ));
    }
    let live = [ShadowStep::Open, ShadowStep::Start(0), writable];
    let three = [
        ShadowStep::Begin(0, 0, write),
        ShadowStep::Post(1, 1, read),
        ShadowStep::Post(2, 1, write),
    ];
    let again = [
        ShadowStep::Close,
        ShadowStep::Quiet,
        ShadowStep::Open,
        ShadowStep::Start(0),
    ];
    let starts: [&[ShadowStep]; 4] = [
        &live,
        &[&live[..], &three[..]].concat(),
        &[&live[..], &three[..], &again[..1]].concat(),
        &[&live[..], &three[..], &again[..], &[writable]].concat(),
    ];
    let mut count = 0;
    for start in starts {
        explore(&Pair::mapped(3, 2, 1).after(start), &steps, 3, &mut count);
    }
    assert!(count > 40_000, "{count}");
}

fn explore(pair: &Pair, steps: &[ShadowStep], depth: u32, count: &mut u64) {
    *count += 1;
    if depth == 0 {
        pair.clone().drain();
        return;
    }
    for step in steps {
        let mut next = pair.clone();
        next.apply(*step);
        explore(&next, steps, depth - 1, count);
    }
}
