// SPDX-License-Identifier: MIT OR Apache-2.0
//! Points in time as people read them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Days of 400 years, after which the calendar repeats.
const ERA: u64 = 146_097;
/// Days from the first of March of the year 0 to the first of January 1970.
const EPOCH: u64 = 719_468;

/// Returns the milliseconds since 1970; 0 on a clock that is before that.
pub(crate) fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.unwrap_or(Duration::ZERO).as_millis();
    u64::try_from(now).unwrap_or(u64::MAX)
}

/// Milliseconds since 1970 as RFC 3339 has them, in UTC.
pub(crate) fn utc(ms: u64) -> String {
    let (seconds, ms) = (ms / 1000, ms % 1000);
    let (year, month, day) = date(seconds / 86400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{ms:03}Z")
}

/// Year, month and day of so many days after the first of January 1970. Years begin in March, so that the
/// day that is not always there is the last one.
fn date(days: u64) -> (u64, u64, u64) {
    let days = days + EPOCH;
    let (era, day) = (days / ERA, days % ERA);
    let year = (day - day / 1460 + day / 36524 - day / (ERA - 1)) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    // Five months, from March on, are 153 days, twice in a year and once in part.
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let year = era * 400 + year;
    match month {
        0..=9 => (year, month + 3, day),
        _ => (year + 1, month - 9, day),
    }
}

#[cfg(test)]
mod tests {
    use super::utc;

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00"),
            (951_782_399, "2000-02-28T23:59:59"),
            (951_782_400, "2000-02-29T00:00:00"),
            (951_868_800, "2000-03-01T00:00:00"),
            (1_735_689_599, "2024-12-31T23:59:59"),
            (1_795_333_862, "2026-11-22T07:51:02"),
            (4_107_542_400, "2100-03-01T00:00:00"),
        ] {
            assert_eq!(utc(seconds * 1000 + 7), format!("{text}.007Z"));
        }
    }
}
