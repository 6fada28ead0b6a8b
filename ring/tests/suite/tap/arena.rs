// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! A guest that moves between hosts with different numbers of processors.

use ring::tap::arena::{offered, pages, share, MAX_SEGMENTS, MIN_SEGMENTS};
use ring::tap::checked::MAX_ARENA_KIB;

/// Queues that hosts offer: one for each processor, at most 64.
const HOSTS: [u32; 12] = [1, 2, 3, 4, 8, 16, 17, 20, 32, 46, 47, 64];
/// Segments of Linux's largest request with default settings.
const USUAL_REQUEST: u16 = 32;

fn sizes() -> impl Iterator<Item = Option<u32>> {
    let asked = (1..=MAX_ARENA_KIB / 1024).map(|mib| Some(mib * 1024));
    core::iter::once(None).chain(asked)
}

#[test]
fn a_guest_is_offered_as_much_by_every_host() {
    for size in sizes() {
        let on = |host| offered(pages(size, host));
        for (here, there) in HOSTS.into_iter().flat_map(|a| HOSTS.map(|b| (a, b))) {
            assert_eq!(
                on(here),
                on(there),
                "{size:?} KiB, hosts of {here} and of {there} processors"
            );
        }
    }
}

#[test]
fn every_queue_can_hold_what_is_offered() {
    for size in sizes() {
        for host in HOSTS {
            let pages = pages(size, host);
            assert!(u32::from(pages) * 4 <= MAX_ARENA_KIB);
            assert!(u32::from(pages) * 4 >= size.unwrap_or(2048));
            for queues in 1..=host {
                let offered = offered(pages);
                assert!(
                    offered <= share(pages, queues),
                    "{size:?}, {queues} of {host}"
                );
                assert!((USUAL_REQUEST..=MAX_SEGMENTS).contains(&offered));
                assert!(offered >= MIN_SEGMENTS);
            }
        }
    }
}
