// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The seeds of tests with random cases: new ones in each run, or those that the environment names.
//!
//! | variable | effect on each test that runs |
//! |---|---|
//! | `SEED=N` | its seeds count up from N: a run that failed is repeated |
//! | `SEEDS=N` | it has N cases |
//! | `SEEDS_PERCENT=N` | it has N percent of its usual cases, or runs for N percent of its usual time |
//!
//! A test whose sums must show that it exercised anything has few cases to lose: [`Seeds::few`] ignores the percentage.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{Duration, Instant};

/// Returns a seed that no run had before. The caller prints it.
#[must_use]
pub fn fresh_seed() -> u64 {
    // Short enough to be typed again.
    RandomState::new().build_hasher().finish() >> 24
}

/// The seeds of one test, which count up from the first.
#[derive(Debug, Clone)]
pub struct Seeds {
    next: u64,
    given: u64,
    least: u64,
    /// More than the least number are given until then.
    until: Option<Instant>,
}

impl Seeds {
    /// Returns the seeds for this number of cases, or as many as the environment wants.
    ///
    /// # Panics
    /// A variable is not a number.
    #[must_use]
    pub fn new(count: u64) -> Seeds {
        Seeds::from(&Wanted::from_environment(), count, None)
    }

    /// Returns as [`Seeds::new`] does the seeds of a test that shows nothing with fewer.
    ///
    /// # Panics
    /// A variable is not a number.
    #[must_use]
    pub fn few(count: u64) -> Seeds {
        let mut wanted = Wanted::from_environment();
        wanted.percent = wanted.percent.max(100);
        Seeds::from(&wanted, count, None)
    }

    /// Returns seeds for at least this number of cases, and for as many more as begin within this time.
    ///
    /// # Panics
    /// A variable is not a number.
    #[must_use]
    pub fn for_time(least: u64, time: Duration) -> Seeds {
        Seeds::from(&Wanted::from_environment(), least, Some(time))
    }

    fn from(wanted: &Wanted, count: u64, time: Option<Duration>) -> Seeds {
        let first = wanted.first.unwrap_or_else(fresh_seed);
        println!("seeds from {first} on: SEED={first} repeats them");
        let scaled = match time {
            // The time is what a percentage changes: with fewer cases the sums would not show that all was exercised.
            Some(_) => count,
            None => (count.saturating_mul(wanted.percent) / 100).max(1),
        };
        let time = time.map(|time| time.mul_f64(wanted.percent as f64 / 100.0));
        let until = time.and_then(|time| Instant::now().checked_add(time));
        Seeds {
            next: first,
            given: 0,
            least: wanted.count.unwrap_or(scaled),
            until: until.filter(|_| wanted.count.is_none()),
        }
    }

    /// Returns the number of seeds that were given. Sums of one case show little.
    #[must_use]
    pub fn given(&self) -> u64 {
        self.given
    }
}

impl Iterator for Seeds {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        let in_time = || self.until.is_some_and(|until| Instant::now() < until);
        if self.given >= self.least && !in_time() {
            return None;
        }
        let seed = self.next;
        self.next = seed.wrapping_add(1);
        self.given += 1;
        Some(seed)
    }
}

/// Values of the variables in the environment.
#[derive(Debug)]
struct Wanted {
    first: Option<u64>,
    count: Option<u64>,
    percent: u64,
}

impl Wanted {
    fn from_environment() -> Wanted {
        Wanted {
            first: number("SEED"),
            count: number("SEEDS"),
            percent: number("SEEDS_PERCENT").unwrap_or(100),
        }
    }
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let number = text.parse();
    Some(number.unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seeds(first: Option<u64>, count: Option<u64>, percent: u64) -> Seeds {
        let wanted = Wanted {
            first,
            count,
            percent,
        };
        Seeds::from(&wanted, 10, None)
    }

    #[test]
    fn a_seed_repeats_its_cases() {
        let all: Vec<u64> = seeds(Some(7), None, 100).collect();
        assert_eq!(all, (7..17).collect::<Vec<_>>());
        assert_eq!(seeds(Some(9), Some(1), 100).collect::<Vec<_>>(), [9]);
        assert_eq!(seeds(Some(u64::MAX), Some(2), 100).last(), Some(0));
    }

    #[test]
    fn a_percentage_changes_the_number_of_cases() {
        assert_eq!(seeds(None, None, 40).count(), 4);
        assert_eq!(seeds(None, None, 400).count(), 40);
        // None is no test, and a number that is named counts.
        assert_eq!(seeds(None, None, 1).count(), 1);
        assert_eq!(seeds(None, Some(3), 400).count(), 3);
    }

    #[test]
    fn a_time_that_is_over_leaves_the_least_number() {
        let wanted = |percent| Wanted {
            first: None,
            count: None,
            percent,
        };
        let over = Seeds::from(&wanted(100), 10, Some(Duration::ZERO));
        assert_eq!(over.count(), 10);
        let mut long = Seeds::from(&wanted(1), 10, Some(Duration::from_secs(360_000)));
        assert_eq!(long.by_ref().take(1000).count(), 1000);
        assert_eq!(long.given(), 1000);
    }
}
