// SPDX-License-Identifier: MIT OR Apache-2.0
//! How long to wait before a process that died is started again.

use std::time::Duration;

/// A process that lived this long is well: what came before is forgotten.
const WELL: Duration = Duration::from_secs(60);
/// The first pause that is one.
const FIRST: Duration = Duration::from_millis(100);
/// Pauses grow up to this.
const LAST: Duration = Duration::from_secs(30);

/// The deaths of a process in a row.
#[derive(Clone, Copy, Debug, Default)]
pub struct Backoff {
    deaths: u32,
}

impl Backoff {
    /// The process died after it had lived for `lived`, and had `answered` requests or not: the
    /// pause before the next one. None at all for the first death, because a guest waits. As long
    /// as each process gets something done the pauses stay short: the guest makes progress, but
    /// must not make the host start processes without end.
    pub fn died(&mut self, lived: Duration, answered: bool) -> Duration {
        if lived >= WELL {
            self.deaths = 0;
        } else if answered {
            self.deaths = self.deaths.min(1);
        }
        self.deaths = self.deaths.saturating_add(1);
        match self.deaths {
            1 => Duration::ZERO,
            deaths => FIRST
                .saturating_mul(1u32.checked_shl(deaths - 2).unwrap_or(u32::MAX))
                .min(LAST),
        }
    }

    /// Deaths in a row.
    #[must_use]
    pub fn deaths(&self) -> u32 {
        self.deaths
    }
}

#[cfg(test)]
mod tests {
    use super::Backoff;
    use std::time::Duration;

    #[test]
    fn first_death_costs_nothing_and_pauses_grow() {
        let mut backoff = Backoff::default();
        let pauses: Vec<u128> = (0..12)
            .map(|_| backoff.died(Duration::from_millis(5), false).as_millis())
            .collect();
        assert_eq!(
            pauses,
            [0, 100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600, 30000, 30000]
        );
    }

    #[test]
    fn a_long_life_is_a_new_start() {
        let mut backoff = Backoff::default();
        for _ in 0..5 {
            backoff.died(Duration::from_secs(1), false);
        }
        assert_eq!(backoff.died(Duration::from_secs(60), false), Duration::ZERO);
        assert_eq!(backoff.deaths(), 1);
    }

    #[test]
    fn pauses_stay_short_while_requests_are_answered() {
        let mut backoff = Backoff::default();
        let mut died = |answered| backoff.died(Duration::from_secs(1), answered).as_millis();
        assert_eq!([died(true), died(true), died(true)], [0, 100, 100]);
        assert_eq!([died(false), died(false), died(true)], [200, 400, 100]);
    }

    #[test]
    fn deaths_without_end_do_not_overflow() {
        let mut backoff = Backoff {
            deaths: u32::MAX - 1,
        };
        assert_eq!(backoff.died(Duration::ZERO, false), Duration::from_secs(30));
        assert_eq!(backoff.died(Duration::ZERO, false), Duration::from_secs(30));
    }
}
