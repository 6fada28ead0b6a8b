// SPDX-License-Identifier: MIT OR Apache-2.0
//! Limits the log of each disk: it may write a burst of lines at once and then a few in a minute, counted separately
//! for warnings, for output of its process and for other lines, so that none takes room from a more important one.
//! Suppressed lines are counted, and reported later.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Layer};

/// Lines of one kind about a disk at once.
const BURST: u32 = 50;
/// Time until there may be one more.
const EACH: Duration = Duration::from_secs(6);

/// Remaining lines of each disk, and of all lines without a disk together.
#[derive(Debug, Default)]
pub struct LineLimit {
    shares: Mutex<BTreeMap<(Option<u32>, LineClass), LineShare>>,
    suppressed: AtomicU64,
}

/// Class of a line, with a share of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum LineClass {
    /// Expected events.
    Usual,
    /// Warnings and errors.
    Trouble,
    /// Output of a process, which a guest may have provoked.
    Said,
}

impl LineClass {
    const ALL: [LineClass; 3] = [LineClass::Usual, LineClass::Trouble, LineClass::Said];

    fn of(line: &Metadata<'_>) -> LineClass {
        match (line.fields().field("said"), *line.level() <= Level::WARN) {
            (Some(_), _) => LineClass::Said,
            (None, true) => LineClass::Trouble,
            (None, false) => LineClass::Usual,
        }
    }
}

#[derive(Debug)]
struct LineShare {
    /// Lines that may be printed at `since`.
    left: u32,
    since: Instant,
    /// Lines that were left out and not told of.
    suppressed: u64,
}

impl LineShare {
    fn new(now: Instant) -> LineShare {
        LineShare {
            left: BURST,
            since: now,
            suppressed: 0,
        }
    }

    /// Adds what has come to it by now.
    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.since).as_secs();
        let more = u32::try_from(passed / EACH.as_secs()).unwrap_or(u32::MAX);
        self.left = self.left.saturating_add(more);
        self.since += EACH * more.min(BURST);
        if self.left >= BURST {
            (self.left, self.since) = (BURST, now);
        }
    }

    fn take(&mut self, now: Instant) -> bool {
        self.refill(now);
        let is_left = self.left > 0;
        self.left = self.left.saturating_sub(1);
        is_left
    }
}

impl LineLimit {
    /// How many lines were left out.
    #[must_use]
    pub fn suppressed(&self) -> u64 {
        self.suppressed.load(Ordering::Relaxed)
    }

    /// A line that was admitted found no room on its way to the reader of the log, or was refused by it.
    pub(super) fn lose(&self) {
        self.suppressed.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether a line about a disk may be printed. If not, it is counted.
    fn admits(&self, minor: Option<u32>, kind: LineClass, now: Instant) -> bool {
        let mut shares = self.shares();
        let share = shares
            .entry((minor, kind))
            .or_insert_with(|| LineShare::new(now));
        let is_admitted = share.take(now);
        if !is_admitted {
            share.suppressed = share.suppressed.saturating_add(1);
            self.suppressed.fetch_add(1, Ordering::Relaxed);
        }
        is_admitted
    }

    /// Returns the number of lines left out since the last report, for the disks that have room for a report; for all
    /// of them at the end. The line that tells is one of those that a disk may write.
    pub fn left_out(&self, now: Instant, is_end: bool) -> BTreeMap<Option<u32>, u64> {
        let mut shares = self.shares();
        let mut told = BTreeMap::new();
        for ((minor, _), share) in &mut *shares {
            if share.suppressed > 0 && (share.take(now) || is_end) {
                *told.entry(*minor).or_default() += std::mem::take(&mut share.suppressed);
            }
        }
        // Disks come and go.
        shares.retain(|_, share| {
            share.refill(now);
            share.suppressed > 0 || share.left < BURST
        });
        told
    }

    /// A disk is gone, and one that is made with its number is another. Returns the number of lines about it left out
    /// since the last report.
    pub fn gone(&self, minor: u32) -> u64 {
        let mut shares = self.shares();
        let of_it = LineClass::ALL.map(|kind| shares.remove(&(Some(minor), kind)));
        of_it
            .into_iter()
            .flatten()
            .map(|share| share.suppressed)
            .sum()
    }

    fn shares(&self) -> MutexGuard<'_, BTreeMap<(Option<u32>, LineClass), LineShare>> {
        // The state that a panic has left is as good as any.
        self.shares.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The part of a subscriber that keeps to it.
    pub fn layer<S: Subscriber>(self: &Arc<Self>) -> impl Layer<S> + Send + Sync + 'static {
        Gate(self.clone())
    }
}

struct Gate(Arc<LineLimit>);

impl<S: Subscriber> Layer<S> for Gate {
    fn event_enabled(&self, event: &Event<'_>, _context: Context<'_, S>) -> bool {
        // The suppressed lines were counted among those of the disk, so the message about them always passes.
        let tells = event.metadata().fields().field("suppressed").is_some();
        let mut minor = Minor(None);
        event.record(&mut minor);
        let kind = LineClass::of(event.metadata());
        tells || self.0.admits(minor.0, kind, Instant::now())
    }
}

/// The disk that a line is about.
struct Minor(Option<u32>);

impl Visit for Minor {
    fn record_u64(&mut self, field: &Field, value: u64) {
        if field.name() == "minor" {
            self.0 = u32::try_from(value).ok();
        }
    }

    fn record_debug(&mut self, _field: &Field, _value: &dyn std::fmt::Debug) {}
}

#[cfg(test)]
mod tests {
    use super::{LineClass, LineLimit, BURST, EACH};
    use std::collections::BTreeMap;
    use std::time::{Duration, Instant};

    /// A disk's lines that nothing is wrong with.
    fn admits(limit: &LineLimit, minor: u32, now: Instant) -> bool {
        limit.admits(Some(minor), LineClass::Usual, now)
    }

    #[test]
    fn one_disk_does_not_take_the_lines_of_another() {
        let limit = LineLimit::default();
        let now = Instant::now();
        let admitted = (0..1000).filter(|_| admits(&limit, 3, now)).count();
        assert_eq!(admitted, BURST as usize);
        assert!(admits(&limit, 4, now) && limit.admits(None, LineClass::Usual, now));
        assert_eq!(limit.suppressed(), 1000 - u64::from(BURST));
    }

    #[test]
    fn what_was_left_out_is_told_once_when_there_is_room() {
        let limit = LineLimit::default();
        let now = Instant::now();
        for _ in 0..BURST + 7 {
            admits(&limit, 3, now);
        }
        assert_eq!(limit.left_out(now, false), BTreeMap::new());
        let later = now + EACH;
        assert_eq!(limit.left_out(later, false), BTreeMap::from([(Some(3), 7)]));
        // Telling it was the line that the disk may write by then.
        assert!(!admits(&limit, 3, later));
        assert_eq!(limit.left_out(later, true), BTreeMap::from([(Some(3), 1)]));
        assert_eq!(limit.left_out(later, true), BTreeMap::new());
    }

    #[test]
    fn a_disk_that_is_quiet_gets_all_its_lines_again_and_no_more() {
        let limit = LineLimit::default();
        let now = Instant::now();
        while admits(&limit, 3, now) {}
        let _ = limit.left_out(now, true);
        let later = now + EACH * 3 + Duration::from_secs(1);
        assert_eq!((0..9).filter(|_| admits(&limit, 3, later)).count(), 3);
        let _ = limit.left_out(later, true);
        let much_later = later + EACH * 10_000_000;
        assert_eq!(limit.left_out(much_later, false), BTreeMap::new());
        assert!(limit.shares().is_empty(), "nothing is kept of a quiet disk");
        let admitted = (0..1000).filter(|_| admits(&limit, 3, much_later));
        assert_eq!(admitted.count(), BURST as usize);
    }

    #[test]
    fn what_is_usual_or_said_by_a_process_takes_no_room_from_warnings() {
        let limit = LineLimit::default();
        let now = Instant::now();
        while admits(&limit, 3, now) {}
        while limit.admits(Some(3), LineClass::Said, now) {}
        let warns = |_: &u32| limit.admits(Some(3), LineClass::Trouble, now);
        assert_eq!((0..BURST + 2).filter(warns).count(), BURST as usize);
        // One usual line, one of a process's output, and two warnings.
        assert_eq!(limit.left_out(now, true), BTreeMap::from([(Some(3), 4)]));
    }

    #[test]
    fn a_disk_does_not_pay_for_the_one_that_had_its_number() {
        let limit = LineLimit::default();
        let now = Instant::now();
        while admits(&limit, 3, now) {}
        assert_eq!(limit.gone(3), 1);
        assert!(admits(&limit, 3, now));
        assert_eq!(limit.left_out(now, true), BTreeMap::new());
    }
}
