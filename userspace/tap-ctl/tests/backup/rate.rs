// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rate of backups and restores.

use crate::Bed;
use std::fs;
use std::time::{Duration, Instant};

/// Bytes in a second of `--rate 1`.
const RATE: u64 = 1 << 20;

impl Bed {
    /// Runs a command, and returns the command lines of each tapimg, and how long all took.
    fn timed(&self, line: &str) -> (Vec<String>, Duration) {
        fs::write(self.path("at/calls"), "").expect("written");
        let begin = Instant::now();
        self.good(line);
        let took = begin.elapsed();
        let calls = fs::read_to_string(self.path("at/calls")).expect("calls");
        (calls.lines().map(String::from).collect(), took)
    }
}

/// Returns the shortest time in which so many bytes may be read.
fn least(bytes: u64) -> Duration {
    Duration::from_secs_f64(bytes as f64 / RATE as f64)
}

#[test]
fn a_rate_limits_each_step_of_a_backup_and_of_a_restore() {
    let bed = Bed::new(&[("a.img", 51712)]);
    let tool = bed.tool();
    let (calls, took) = bed.timed(&format!("backup 3 DIR --rate 1 {tool}"));
    let data = bed.list()[0]["data_size"].as_u64().expect("bytes");
    assert!(data > RATE / 8, "{data}");
    // The copy, and its comparison with the disk: a limit of time is only exceeded, however slow the host is.
    assert!(
        took >= least(2 * data),
        "{data} bytes twice within {took:?}"
    );
    assert_eq!(calls.len(), 2, "{calls:?}");
    for call in &calls {
        assert!(
            call.ends_with(" --rate 1") || call.contains(" --rate 1 "),
            "{call}"
        );
    }
    assert_eq!(bed.state().merge_rates, [RATE]);
    let (calls, took) = bed.timed(&format!("restore DIR aio:SRV/new.img --rate 1 {tool}"));
    assert!(
        took >= least(2 * data),
        "{data} bytes twice within {took:?}"
    );
    assert!(
        calls.iter().all(|call| call.contains(" --rate 1")),
        "{calls:?}"
    );
    bed.assert_restorable();
}

#[test]
fn without_a_rate_copies_have_no_limit() {
    let bed = Bed::new(&[("a.img", 51712)]);
    let (calls, _) = bed.timed(&format!("backup 3 DIR {}", bed.tool()));
    assert!(
        !calls.iter().any(|call| call.contains("--rate")),
        "{calls:?}"
    );
    let rates = bed.state().merge_rates.clone();
    assert!(rates.iter().all(|rate| *rate > RATE), "{rates:?}");
}

#[test]
fn a_rate_of_nothing_is_refused_before_the_disk_is_touched() {
    let bed = Bed::new(&[("a.img", 51712)]);
    for rate in ["0", "fast", "-1"] {
        let refused = bed.run(&format!("backup 3 DIR --rate {rate} {}", bed.tool()));
        assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    }
    assert_eq!(bed.state().requests, 0);
}
