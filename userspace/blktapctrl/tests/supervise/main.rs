// SPDX-License-Identifier: MIT OR Apache-2.0
//! The supervisor with a fake kernel, a fake xenstore and real processes that fake a tapdisk.

mod bed;
mod commit;
mod credentials;
mod death;
mod dirty_bitmap;
mod disks;
mod events;
mod fake;
mod fd_broker;
mod frozen;
mod groups;
mod handoff;
mod keys;
mod lease;
mod left;
mod liar;
mod log;
mod mirror;
mod nodes;
mod park;
mod passthrough;
mod quota;
mod ram_files;
mod reservation;
mod rules;
mod said;
mod sanlock;
mod sharing;
mod snapshot;
mod start;
mod steps;
mod stream;
mod suspend;
mod tls;
mod trace;
mod troubles;
mod unread;

/// Not a test: what runs as a tapdisk.
#[test]
#[ignore = "runs as a process of the other tests"]
fn fake_tapdisk() {
    if let Some(dir) = std::env::var_os("FAKE_TAPDISK") {
        fake::run(dir.as_ref());
    }
}
