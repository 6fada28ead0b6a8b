// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Waits for changes that no event tells.

use std::thread;
use std::time::{Duration, Instant};

/// Polls until `found` returns something; returns nothing once `limit` is over. `pauses` are the least and the most time
/// between two polls: a poll that runs programs takes processor time away from what it waits for, so the pause is twice as
/// long as the poll was.
///
/// # Errors
/// `found` fails.
pub fn until<T, E>(
    limit: Duration,
    pauses: [Duration; 2],
    mut found: impl FnMut() -> Result<Option<T>, E>,
) -> Result<Option<T>, E> {
    let deadline = Instant::now() + limit;
    loop {
        let begun = Instant::now();
        if let Some(value) = found()? {
            return Ok(Some(value));
        }
        let now = Instant::now();
        if now >= deadline {
            return Ok(None);
        }
        thread::sleep((2 * now.duration_since(begun)).clamp(pauses[0], pauses[1]));
    }
}

#[cfg(test)]
mod tests {
    use super::until;
    use std::time::Duration;

    const PAUSES: [Duration; 2] = [Duration::ZERO; 2];

    #[test]
    fn a_poll_ends_with_a_value_an_error_or_the_limit() {
        let mut left = 3;
        let found = until(Duration::from_secs(60), PAUSES, || {
            left -= 1;
            Ok::<_, ()>((left == 0).then_some(7))
        });
        assert_eq!((found, left), (Ok(Some(7)), 0));
        let none = until(Duration::ZERO, PAUSES, || Ok::<Option<u8>, ()>(None));
        assert_eq!(none, Ok(None));
        let failed = until(Duration::from_secs(60), PAUSES, || {
            Err::<Option<u8>, _>("no")
        });
        assert_eq!(failed, Err("no"));
    }
}
