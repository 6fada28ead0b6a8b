// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Grants, discards, and the content of the guest's pages.

use ring::abi::{OP_DISCARD, OP_FLUSH_DISKCACHE, OP_READ, OP_WRITE};
use ring::request::RequestLimits;
use sim::frontend::{BAD_GREF, RING_GREF};
use sim::machine::MachineSetup;
use sim::spec::{Expect, Gref, Spec};

use super::{each, requests, settle, unchanged};

#[test]
fn h23_bad_grants_fail_their_request_only() {
    let mut specs = Vec::new();
    for gref in [
        Gref::Raw(BAD_GREF),
        Gref::Raw(0),
        Gref::Raw(u32::MAX),
        Gref::Revoked,
    ] {
        for place in 0..5 {
            let mut segments = [(Gref::Fresh, 0, 7); 5];
            segments[place].0 = gref;
            for operation in [OP_READ, OP_WRITE] {
                for indirect in [false, true] {
                    specs.push(Spec {
                        indirect,
                        ..Spec::new(operation, 0)
                            .with(&segments)
                            .expect(Expect::Error)
                    });
                }
            }
        }
        specs.push(Spec::pages(OP_READ, 256, 4));
    }
    requests(unchanged, &specs);
    requests(|s| s.no_space = 50, &specs);
}

#[test]
fn h24_reads_into_read_only_pages_fail_without_retries() {
    let segments = [(Gref::Fresh, 0, 7), (Gref::ReadOnly, 0, 7)];
    each(unchanged, |world| {
        let read = Spec::new(OP_READ, 0).with(&segments).expect(Expect::Error);
        world.serve(&vec![read; 20]);
        assert!(world.engine.stats().passes <= 60);
        // Writing from a read-only page is legal.
        world.serve(&[Spec::new(OP_WRITE, 0).with(&segments)]);
        world.still_works();
    });
}

#[test]
fn h25_a_grant_may_end_while_its_request_runs() {
    // Mapped pages stay mapped; pages that are yet to be copied fail. Either way the request is answered.
    each(unchanged, |world| {
        let specs = [Spec::pages(OP_READ, 0, 5), Spec::pages(OP_WRITE, 64, 5)];
        let specs = specs.map(|spec| spec.expect(Expect::Any));
        let ids = world.send(&specs);
        let _pass = world.pass();
        for id in ids {
            world.machine.borrow_mut().front.revoke(id);
        }
        world.run_clean();
        let m = world.machine.borrow();
        let read = m.front.answers.iter().find(|a| a.operation == OP_READ);
        let mapped = m.setup.copy_max_segments == 0 || m.setup.keeps_grants;
        let status = if mapped { 0 } else { -1 };
        assert_eq!(read.map(|a| a.status), Some(status));
        drop(m);
        world.still_works();
    });
}

#[test]
fn h26_one_grant_may_be_everywhere() {
    each(unchanged, |world| {
        let gref = Gref::Raw(world.machine.borrow_mut().front.hold_page());
        let everywhere = |operation, count| Spec {
            indirect: count > 11,
            wild: true,
            ..Spec::new(operation, 0).with(&vec![(gref, 0, 7); count])
        };
        for operation in [OP_READ, OP_WRITE] {
            for count in [1, 11, 64] {
                world.serve(&vec![everywhere(operation, count); 6]);
            }
        }
        world.still_works();
    });
}

#[test]
fn h29_without_room_for_mappings_everything_is_copied() {
    for maptrack in [0, 1, 40, 300] {
        let specs = vec![Spec::indirect(OP_WRITE, 0, 256); 6];
        let mut reads = vec![Spec::indirect(OP_READ, 0, 256); 3];
        reads.extend(vec![Spec::pages(OP_READ, 0, 11); 20]);
        each(
            |s| s.maptrack = maptrack,
            |world| {
                world.serve(&specs);
                world.serve(&reads);
                world.still_works();
            },
        );
    }
}

#[test]
fn h31_a_ring_page_as_data_confuses_nobody() {
    // Sectors of zeros, and sectors that make every index impossible.
    for install in [false, true] {
        for operation in [OP_READ, OP_WRITE] {
            each(unchanged, |world| {
                if install {
                    world.machine.borrow_mut().install(0xffff_fff0, 0, 64);
                }
                let ring = Spec {
                    wild: true,
                    ..Spec::new(operation, 0)
                        .with(&[(Gref::Raw(RING_GREF), 0, 7)])
                        .expect(Expect::Any)
                };
                let honest = Spec::pages(OP_READ, 128, 3);
                world.send(&[honest.clone(), ring, honest]);
                settle(world);
                assert_eq!(world.engine.pass().broken, operation == OP_READ);
                world.close_clean();
                let m = world.machine.borrow();
                let answered: Vec<_> = m.front.answers.iter().map(|a| a.operation).collect();
                assert_eq!(answered.len(), 3, "each is answered once: {answered:?}");
            });
        }
    }
}

#[test]
fn h33_reads_overtake_a_huge_discard() {
    let huge = 10 << 20;
    each(
        |s| s.limits.sectors = huge,
        |world| {
            let discard = Spec {
                discard: huge,
                ..Spec::new(OP_DISCARD, 0)
            };
            world.send(&[discard]);
            let _pass = world.pass();
            world.machine.borrow_mut().disk_step();
            world.send(&[Spec::pages(OP_READ, 1 << 20, 1)]);
            let _pass = world.pass();
            world.run_clean();
            let m = world.machine.borrow();
            let order: Vec<_> = m.front.answers.iter().map(|a| a.operation).collect();
            assert_eq!(order, [OP_READ, OP_DISCARD]);
        },
    );
}

#[test]
fn h34_discards_are_checked() {
    let discard = |sector, discard, expect| Spec {
        discard,
        ..Spec::new(OP_DISCARD, sector).expect(expect)
    };
    requests(
        |s| s.limits.block_sectors = 8,
        &[
            discard(0, 0, Expect::Okay),
            discard(4096, 0, Expect::Okay),
            discard(4, 8, Expect::Error),
            discard(8, 4, Expect::Error),
            discard(4088, 16, Expect::Error),
            discard(4088, 8, Expect::Okay),
        ],
    );
    let refused = [discard(0, 8, Expect::NotSupported)];
    requests(|s| s.limits.discard = false, &refused);
}

#[test]
fn h36_a_secure_discard_that_was_not_offered_is_a_plain_one() {
    let secure = Spec {
        discard: 8,
        flag: 1,
        ..Spec::new(OP_DISCARD, 0)
    };
    requests(unchanged, &[secure]);
}

#[test]
fn r38_the_padding_of_responses_is_zero() {
    for junk in [0xa5, 0xff] {
        let change = |s: &mut MachineSetup| {
            s.junk = junk;
            s.limits = RequestLimits {
                discard: false,
                ..s.limits
            };
        };
        // The fake looks at every response's padding when it is published.
        requests(
            change,
            &[
                Spec::pages(OP_READ, 0, 1),
                Spec::pages(OP_WRITE, u64::MAX, 1).expect(Expect::Error),
                Spec::new(OP_DISCARD, 0).expect(Expect::NotSupported),
                Spec::new(200, 0).expect(Expect::NotSupported),
                Spec::indirect(OP_READ, 0, 12),
                Spec::new(OP_FLUSH_DISKCACHE, 0),
            ],
        );
    }
}

#[test]
fn r38_padding_that_is_not_zero_would_be_found() {
    each(unchanged, |world| {
        let mut m = world.machine.borrow_mut();
        m.ring.slot(0).fill(0);
        m.ring.slot(0)[13] = 0xa5;
        m.published(1);
        assert!(
            m.problems.iter().any(|p| p.contains("padding")),
            "{:?}",
            m.problems
        );
    });
}

#[test]
fn r38_pages_show_nothing_of_other_requests() {
    // A read that fails on its way must not copy what the page held before.
    each(
        |s| s.bad_sectors = 8..9,
        |world| {
            world.serve(&[Spec::pages(OP_WRITE, 64, 11)]);
            world.serve(&[Spec::pages(OP_READ, 0, 4), Spec::pages(OP_READ, 64, 11)]);
        },
    );
}
