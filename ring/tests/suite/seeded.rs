// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The bodies of the fuzz targets with random input. `SEED=n` repeats a run.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::oracle::VerdictKind;
use crate::tap_case::{self, Ran};
use crate::tap_pair::TapEvents;
use crate::{map_case, request_case, ring_case};

/// SplitMix64: enough randomness for inputs, in five lines.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend(self.next().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}

/// The seed of this run, printed so that a failure can be repeated.
fn seed() -> u64 {
    let seed = match std::env::var("SEED") {
        Ok(text) => text
            .parse()
            .expect("SEED is not a number: give the one that was printed"),
        Err(_) => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            now.expect("a clock after 1970").as_nanos() as u64
        }
    };
    println!("SEED={seed}");
    seed
}

#[test]
fn random_requests_agree_with_the_oracle() {
    let mut random = Random(seed());
    let mut kinds: BTreeMap<VerdictKind, u32> = BTreeMap::new();
    let (mut good, mut bad) = (0, 0);
    for _ in 0..60_000 {
        let len = request_case::PREFIX + 112 + (random.next() % 256) as usize;
        let input = random.bytes(len);
        let (kind, segments) = request_case::run(&input).expect("long enough");
        *kinds.entry(kind).or_default() += 1;
        match segments {
            Some(true) => good += 1,
            Some(false) => bad += 1,
            None => {}
        }
    }
    println!("{kinds:?}, descriptors: {good} accepted, {bad} refused");
    assert_eq!(kinds.len(), 6, "a kind of verdict never came up");
    assert!(
        kinds.values().all(|n| *n > 100),
        "a kind of verdict is rare"
    );
    assert!(
        good > 100 && bad > 100,
        "indirect descriptors are one-sided"
    );
}

#[test]
fn random_ring_traffic_agrees_with_the_model() {
    let mut random = Random(seed());
    let (mut refused, mut broke) = (0, 0);
    let (mut taken, mut answered, mut events) = (0, 0, 0);
    for _ in 0..20_000 {
        let len = 6 + (random.next() % 400) as usize;
        let input = random.bytes(len);
        let Some(seen) = ring_case::run(&input) else {
            refused += 1;
            continue;
        };
        broke += u32::from(seen.broke);
        taken += seen.taken;
        answered += seen.answered;
        events += seen.events;
    }
    println!(
        "{refused} refused, {broke} broke, {taken} taken, {answered} answered, {events} events"
    );
    assert!(refused > 100 && broke > 100, "hostile runs are rare");
    assert!(
        taken > 50_000 && answered > 20_000 && events > 1_000,
        "runs are vacuous"
    );
}

#[test]
fn random_processes_of_a_tap_disk_agree_with_the_model() {
    let mut random = Random(seed());
    let mut all = Vec::new();
    let mut arguments = [[0; 2]; tap_case::ARGUMENTS];
    for _ in 0..30_000 {
        let len = 80 + (random.next() % 600) as usize;
        let input = random.bytes(len);
        match tap_case::run(&input).expect("long enough") {
            Ran::History(seen) => all.push(seen),
            Ran::Argument(kind, accepted) => arguments[kind][usize::from(accepted)] += 1,
        }
    }
    let sum = |what: fn(&TapEvents) -> u64| all.iter().map(what).sum::<u64>();
    let often = [
        ("posted", sum(|seen| seen.posted)),
        ("delivered", sum(|seen| seen.delivered)),
        ("committed", sum(|seen| seen.committed)),
        ("refused", sum(|seen| seen.refused)),
    ];
    let at_times = [
        ("replayed", sum(|seen| seen.replayed)),
        ("blocked", sum(|seen| seen.blocked)),
        ("returned", sum(|seen| seen.returned)),
        ("released", sum(|seen| seen.released)),
        ("malformed", sum(|seen| seen.malformed)),
        ("deaths", sum(|seen| seen.deaths)),
        ("failed", sum(|seen| seen.failed)),
        ("unsettled", sum(|seen| seen.unsettled)),
        ("lost", sum(|seen| seen.lost)),
        ("claimed again", sum(|seen| seen.claimed_again)),
        ("widened", sum(|seen| seen.widened)),
        ("begun", sum(|seen| seen.begun)),
        ("resumed", sum(|seen| seen.resumed)),
        ("executed", sum(|seen| seen.executed)),
        ("redone", sum(|seen| seen.redone)),
    ];
    println!("{often:?}, {at_times:?}; refused and accepted: {arguments:?}");
    let in_parts = sum(|seen| seen.begun_in_parts);
    assert!(in_parts > 50, "{in_parts} requests in several parts");
    let beside = sum(|seen| seen.begun_beside);
    // Fewer than others: with a bound of 50 a sound run failed once.
    assert!(
        beside > 20,
        "{beside} requests that overlap others that are executed"
    );
    let with_zeroes = sum(|seen| seen.begun_with_zeroes);
    assert!(with_zeroes > 50, "{with_zeroes} requests that read zeroes");
    let enough = |counts: &[(&str, u64)], least| counts.iter().all(|(_, count)| *count > least);
    assert!(enough(&often, 20_000), "histories are vacuous");
    assert!(enough(&at_times, 1_000), "something is rare");
    assert!(
        arguments.iter().flatten().all(|count| *count > 50),
        "a check is one-sided"
    );
}

#[test]
fn random_processes_map_as_the_model_does() {
    let mut random = Random(seed());
    let mut seen: BTreeMap<String, u64> = BTreeMap::new();
    for _ in 0..2_000 {
        let len = 40 + (random.next() % 400) as usize;
        for (what, count) in map_case::run(&random.bytes(len)).expect("long enough") {
            *seen.entry(what).or_default() += count;
        }
    }
    println!("{seen:?}");
    let kinds = 9 + 5 + 2 + 2;
    assert_eq!(seen.len(), kinds, "something never came up");
    assert!(seen.values().all(|count| *count > 10), "something is rare");
}
