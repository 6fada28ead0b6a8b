// SPDX-License-Identifier: MIT OR Apache-2.0
//! Groups of processes that are late, hang, die and are replaced, beside supervisors that end: second by second.

use super::super::jitter::QuotaRng;
use super::{Ledger, SETTLED, SILENT};
use control::{GroupRate, Limits, RateShare, ShareUsage};
use std::time::Duration;

const TICK: Duration = Duration::from_millis(10);
/// Bytes that the group may do in a second.
const ALL: u64 = 64 << 20;

/// Bytes that a disk's guest asks for in a second.
const NOTHING: u64 = 0;
const MUCH: u64 = u64::MAX;

/// A question that is on its way, or the answer.
struct Post {
    number: u64,
    share: RateShare,
    arrives: Duration,
    /// Nothing if it has not arrived.
    answer: Option<(ShareUsage, Duration)>,
}

/// A disk, and its process.
struct LedgerDisk {
    minor: u32,
    pid: u32,
    asks: u64,
    believes: Option<RateShare>,
    used: ShareUsage,
    hangs: bool,
    /// When it hung last.
    hung: Duration,
    post: Option<Post>,
    looks: Duration,
    /// When the supervisor sees that a process has ended.
    ended: Vec<(u32, Duration)>,
}

impl LedgerDisk {
    /// Bytes that its process may do in a second now.
    fn pace(&self, now: Duration) -> u64 {
        let pace = |share: RateShare| share.pace_at(now).bytes.expect("a pace");
        match self.hangs {
            true => 0,
            false => self.believes.map_or(0, pace),
        }
    }

    fn hear(&mut self, share: RateShare) {
        if self.believes.is_none_or(|known| known.until <= share.until) {
            self.believes = Some(share);
        }
    }

    fn work(&mut self, now: Duration) {
        let may = self.pace(now) / 100;
        let does = may.min(self.asks / 100);
        self.used.bytes += does;
        self.used.came += u64::from(self.asks > 0 && !self.hangs);
        self.used.lacks_bytes |= self.asks / 100 > may && !self.hangs;
    }
}

/// A host.
struct LedgerHost {
    ledger: Ledger,
    disks: Vec<LedgerDisk>,
    now: Duration,
    /// The supervisor says nothing before that.
    begins: Duration,
    chance: QuotaRng,
    /// Longest delay of a message.
    late: u64,
    pids: u32,
}

impl LedgerHost {
    fn new(count: u32, late: u64, seed: u64) -> LedgerHost {
        let limits = Limits {
            bytes: ALL,
            ..Limits::default()
        };
        let mut host = LedgerHost {
            ledger: Ledger::new(limits),
            disks: Vec::new(),
            now: Duration::from_secs(100),
            begins: Duration::ZERO,
            chance: QuotaRng(seed),
            late,
            pids: 0,
        };
        for minor in 0..count {
            host.add(minor);
        }
        host
    }

    fn add(&mut self, minor: u32) {
        self.disks.push(LedgerDisk {
            minor,
            pid: 0,
            asks: NOTHING,
            believes: None,
            used: ShareUsage::default(),
            hangs: false,
            hung: Duration::ZERO,
            post: None,
            looks: self.now,
            ended: Vec::new(),
        });
        let index = self.disks.len() - 1;
        self.start(index);
    }

    fn members(&self) -> Vec<(u32, Limits)> {
        let member = |disk: &LedgerDisk| (disk.minor, Limits::default());
        self.disks.iter().map(member).collect()
    }

    /// Sends a process its share when it opens its image, which may take long.
    fn start(&mut self, index: usize) {
        let members = self.members();
        self.ledger.keep(&members);
        self.pids += 1;
        let arrives = self.now + self.chance.ms(self.late * 5 + 1);
        let disk = &mut self.disks[index];
        (disk.pid, disk.believes, disk.used) = (self.pids, None, ShareUsage::default());
        disk.hangs = false;
        let (number, share) = self.ledger.share(disk.minor, disk.pid, self.now);
        disk.post = Some(Post {
            number,
            share,
            arrives,
            answer: None,
        });
    }

    fn kill(&mut self, index: usize) {
        let seen = self.now + self.chance.ms(100);
        let disk = &mut self.disks[index];
        disk.ended.push((disk.pid, seen));
        disk.post = None;
        self.start(index);
    }

    /// The supervisor is started anew. Messages of the one before still arrive.
    fn restart(&mut self) {
        self.ledger = Ledger::new(self.ledger.limits());
        let members = self.members();
        self.ledger.keep(&members);
        self.begins = self.now + SETTLED;
        for disk in &mut self.disks {
            if let Some(post) = disk.post.take().filter(|post| post.answer.is_none()) {
                disk.hear(post.share);
            }
            self.ledger.adopt(disk.minor, disk.pid, self.begins);
            disk.looks = self.begins;
        }
    }

    fn deliver(&mut self, index: usize) {
        let late = self.chance.ms(self.late + 1);
        let disk = &mut self.disks[index];
        for (pid, seen) in std::mem::take(&mut disk.ended) {
            match seen <= self.now {
                true => self.ledger.gone(pid),
                false => disk.ended.push((pid, seen)),
            }
        }
        let Some(mut post) = disk.post.take() else {
            return;
        };
        match post.answer {
            None if post.arrives <= self.now && !disk.hangs => {
                disk.hear(post.share);
                post.answer = Some((disk.used, self.now + late));
                disk.used.lacks_bytes = false;
            }
            Some((used, when)) if when <= self.now => {
                self.ledger
                    .answered(disk.minor, disk.pid, post.number, used, self.now);
                disk.looks = self.now + self.ledger.pause(disk.minor, self.now);
                return;
            }
            _ => {}
        }
        disk.post = Some(post);
    }

    fn tell(&mut self, index: usize) {
        let late = self.chance.ms(self.late + 1);
        let disk = &mut self.disks[index];
        if disk.post.is_some() || disk.looks > self.now || self.begins > self.now {
            return;
        }
        let (number, share) = self.ledger.share(disk.minor, disk.pid, self.now);
        disk.post = Some(Post {
            number,
            share,
            arrives: self.now + late,
            answer: None,
        });
    }

    /// A hundredth of a second.
    fn tick(&mut self) {
        self.now += TICK;
        for index in 0..self.disks.len() {
            self.deliver(index);
            self.tell(index);
        }
        // A disk that has just resumed has the pace that it has without a supervisor.
        let counts = |disk: &&LedgerDisk| disk.hung + SECOND < self.now;
        let paces = self
            .disks
            .iter()
            .filter(counts)
            .map(|disk| disk.pace(self.now));
        let sum: u64 = paces.sum();
        assert!(sum <= ALL, "{sum} at {:?}", self.now);
        for disk in &mut self.disks {
            disk.work(self.now);
            if disk.hangs {
                disk.hung = self.now;
            }
        }
    }

    /// All have heard how many they are, in the last second: what they have without a supervisor is as much as there is,
    /// and they have it at the same time.
    fn is_agreed(&self) -> bool {
        let equal = ALL / self.disks.len() as u64;
        let agrees = |disk: &LedgerDisk| {
            let is_known = |share: RateShare| {
                share.after.bytes == Some(equal) && self.now + SECOND < share.until
            };
            disk.hung + SECOND * 5 < self.now && disk.believes.is_some_and(is_known)
        };
        self.disks.iter().all(agrees)
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.tick();
        }
    }

    /// Returns the bytes that each disk does in a time.
    fn does(&mut self, time: Duration) -> Vec<u64> {
        let before: Vec<u64> = self.disks.iter().map(|disk| disk.used.bytes).collect();
        self.run(time);
        let after = self.disks.iter().map(|disk| disk.used.bytes);
        after
            .zip(before)
            .map(|(after, before)| after - before)
            .collect()
    }
}

const SECOND: Duration = Duration::from_secs(1);

/// Tests that in sum no more than the limit is ever given, whatever is late, hangs, dies or restarts.
#[test]
fn disks_never_have_more_than_their_group() {
    for seed in 0..60 {
        let count = 1 + u32::try_from(seed % 7).expect("small");
        let mut host = LedgerHost::new(count, [0, 50, 300][seed as usize % 3], seed);
        for _ in 0..4000 {
            host.tick();
            let index = usize::try_from(host.chance.below(host.disks.len() as u64)).expect("small");
            match host.chance.below(300) {
                0 | 1 => host.disks[index].asks = MUCH,
                2 | 3 => host.disks[index].asks = NOTHING,
                4 => host.disks[index].asks = host.chance.below(ALL),
                5 => host.disks[index].hangs = true,
                6 => host.disks[index].hangs = false,
                7 => host.kill(index),
                8 if host.is_agreed() => host.restart(),
                _ => {}
            }
        }
    }
}

#[test]
fn what_some_do_not_want_others_have_within_a_second() {
    let mut host = LedgerHost::new(10, 10, 1);
    host.run(SECOND * 5);
    host.disks[3].asks = MUCH;
    host.run(SECOND);
    let does = host.does(SECOND)[3];
    assert!(does >= ALL / 100 * 96, "{does}");
    // Another one begins, and has as much after a second.
    host.disks[7].asks = MUCH;
    host.run(SECOND);
    let does = host.does(SECOND);
    assert!(does[7] >= ALL / 100 * 46, "{does:?}");
    assert!(does[3] >= ALL / 100 * 46, "{does:?}");
    // A third one wants little, and has that.
    host.disks[0].asks = ALL / 10;
    host.run(SECOND * 2);
    let does = host.does(SECOND);
    assert!(does[0] >= ALL / 100 * 9, "{does:?}");
    assert!(does.iter().sum::<u64>() >= ALL / 100 * 93, "{does:?}");
    // One ends, and the others have its part within a second and a half: what it did in the last one says what it wants.
    host.disks[3].asks = NOTHING;
    host.run(SECOND * 3 / 2);
    let does = host.does(SECOND);
    assert!(does[7] >= ALL / 100 * 83, "{does:?}");
}

#[test]
fn nobody_starves_whatever_others_ask_for() {
    let mut host = LedgerHost::new(20, 50, 2);
    for disk in &mut host.disks {
        disk.asks = MUCH;
    }
    host.run(SECOND * 2);
    for does in host.does(SECOND * 4) {
        assert!(does >= ALL / 20 * 4 / 100 * 90, "{does}");
    }
}

#[test]
fn who_hangs_leaves_what_it_had_to_others() {
    let mut host = LedgerHost::new(2, 10, 3);
    for disk in &mut host.disks {
        disk.asks = MUCH;
    }
    host.run(SECOND * 5);
    host.disks[0].hangs = true;
    // At first the ledger does not know that it hangs, and then it counts with an equal part for a while.
    host.run(SETTLED + SILENT + SECOND);
    let does = host.does(SECOND);
    assert!(does[1] >= ALL / 100 * 96, "{does:?}");
    // The disk resumes, and hears its present part before it does anything.
    host.disks[0].hangs = false;
    host.run(SECOND * 2);
    let does = host.does(SECOND);
    assert!(does[0] >= ALL / 100 * 46, "{does:?}");
}

#[test]
fn a_process_that_died_has_no_part() {
    let mut host = LedgerHost::new(2, 10, 4);
    for disk in &mut host.disks {
        disk.asks = MUCH;
    }
    host.run(SECOND * 3);
    host.kill(0);
    host.run(SECOND);
    let does = host.does(SECOND);
    assert!(
        does[0] >= ALL / 100 * 40 && does[1] >= ALL / 100 * 40,
        "{does:?}"
    );
}

/// Without a supervisor all have an equal part, and the next one continues from there.
#[test]
fn without_a_supervisor_all_have_an_equal_part() {
    let mut host = LedgerHost::new(4, 10, 5);
    host.disks[0].asks = MUCH;
    host.run(SECOND * 3);
    assert!(host.disks[0].pace(host.now) > ALL / 100 * 96);
    host.begins = host.now + SECOND * 100;
    for disk in &mut host.disks {
        disk.post = None;
    }
    host.run(SETTLED);
    for disk in &host.disks {
        assert_eq!(disk.pace(host.now), ALL / 4);
    }
    host.restart();
    host.run(SETTLED + SECOND);
    let does = host.does(SECOND);
    assert!(does[0] >= ALL / 100 * 96, "{does:?}");
}

#[test]
fn group_in_which_nobody_does_anything_is_left_alone() {
    let mut host = LedgerHost::new(3, 10, 6);
    host.disks[0].asks = MUCH;
    host.run(SECOND * 3);
    assert!(!host.ledger.is_quiet(host.now));
    host.disks[0].asks = NOTHING;
    host.run(SECOND * 4);
    assert!(host.ledger.is_quiet(host.now));
    // One more, and the parts are smaller: all disks hear that before the ledger is quiet.
    host.add(3);
    assert!(!host.ledger.is_quiet(host.now));
    host.run(SECOND * 4);
    assert!(host.ledger.is_quiet(host.now));
}

#[test]
fn a_disk_has_no_more_than_its_own_limit() {
    let limits = |bytes| Limits {
        bytes,
        ..Limits::default()
    };
    let mut ledger = Ledger::new(limits(ALL));
    assert!(ledger.keep(&[(0, limits(1 << 20)), (1, Limits::default())]));
    assert!(!ledger.keep(&[(0, limits(1 << 20)), (1, Limits::default())]));
    let now = Duration::from_secs(7);
    let lacks = ShareUsage {
        lacks_bytes: true,
        ..ShareUsage::default()
    };
    for minor in [0, 1] {
        let (number, _) = ledger.share(minor, minor + 10, now);
        ledger.answered(minor, minor + 10, number, lacks, now);
    }
    let (_, share) = ledger.share(0, 10, now);
    let pace = |bytes| GroupRate {
        bytes: Some(bytes),
        milli_requests: None,
    };
    assert_eq!((share.pace, share.after), (pace(ALL / 64), pace(ALL / 2)));
    assert!(ledger.keep(&[(1, Limits::default())]));
    assert_eq!(ledger.share(1, 11, now).1.pace, pace(ALL));
}
