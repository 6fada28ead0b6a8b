// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! A hostile frontend, case by case; the numbers are those of the project's list of such cases.
//!
//! After each case a valid load on the same ring must be served as if nothing had been, and
//! nothing may be left behind: pages, slots, mappings.

use ring::abi::{
    Protocol, OP_DISCARD, OP_FLUSH_DISKCACHE, OP_READ, OP_WRITE, OP_WRITE_BARRIER, REQ_EVENT,
    REQ_PROD, RSP_EVENT, RSP_PROD,
};
use ring::index::{BackRing, RingError};
use ring::request::Limits;
use sim::frontend::{Expect, Gref, Spec, BAD_GREF, RING_GREF};
use sim::machine::Setup;
use sim::ring::FakeRing;
use sim::world::{Storage, World};

/// Runs a case on every layout and data path.
fn each(change: impl Fn(&mut Setup), case: impl Fn(&mut World<'_>)) {
    for protocol in [Protocol::Abi64, Protocol::Abi32] {
        for copy_max_segments in [0, u16::MAX] {
            let mut setup = Setup {
                protocol,
                copy_max_segments,
                ..Setup::default()
            };
            change(&mut setup);
            let mut storage = Storage::new(&setup);
            let mut world = World::new(&mut storage, setup, 1);
            case(&mut world);
        }
    }
}

/// Serves the requests of a case, each with the answer it expects, then a valid load.
fn requests(change: impl Fn(&mut Setup), specs: &[Spec]) {
    each(change, |world| {
        let answers = world.serve(specs);
        assert_eq!(answers.len(), specs.len(), "one answer to each");
        world.still_works();
    });
}

fn unchanged(_setup: &mut Setup) {}

/// Lets the engine and the disk finish without the guest's doing anything.
fn settle(world: &mut World<'_>) {
    for _ in 0..10_000 {
        let again = world.engine.pass().again || world.engine.must_stay_awake();
        let mut m = world.machine.borrow_mut();
        if m.disk.running() == 0 && !m.disk.has_completions() && !again {
            return;
        }
        m.disk_step();
    }
    panic!("the engine does not come to rest");
}

#[track_caller]
fn closes_cleanly(world: &mut World<'_>) {
    world.close();
    let problems = world.verdict();
    assert!(problems.is_empty(), "{problems:#?}");
}

#[test]
fn h01_a_producer_index_beyond_the_ring_stops_it_for_good() {
    for jump in [33, 34, 1 << 16, 1 << 31, u32::MAX] {
        each(unchanged, |world| {
            world.send(&[Spec::pages(OP_WRITE, 0, 4)]);
            let _pass = world.pass();
            let maps = world.machine.borrow().host.mappings.len();
            world.machine.borrow_mut().ring.store(REQ_PROD, jump);
            assert!(world.engine.pass().broken, "{jump}");
            assert!(!world.engine.must_stay_awake());
            // It does not come back to life when the index is put right.
            world.machine.borrow_mut().ring.store(REQ_PROD, 2);
            let pass = world.engine.pass();
            assert!(pass.broken && pass.taken == 0);
            assert_eq!(world.machine.borrow().host.mappings.len(), maps);
            assert_eq!(world.machine.borrow().accesses.slots, 1);
            closes_cleanly(world);
            let answers = world.machine.borrow().front.answers.len();
            assert_eq!(answers, 1, "what was taken before is answered");
        });
    }
}

#[test]
fn h02_indices_wrap_and_may_go_back() {
    each(unchanged, |world| {
        let setup = world.machine.borrow().setup.clone();
        let mut storage = Storage::new(&setup);
        let mut wrapping = World::attached_at(&mut storage, setup, 1, 0xffff_ffe7);
        for _ in 0..5 {
            wrapping.serve(&vec![Spec::pages(OP_READ, 0, 1); 32]);
        }
        wrapping.still_works();
        assert!(wrapping.machine.borrow().front.req_prod < 1000);

        world.send(&vec![Spec::pages(OP_READ, 0, 1); 3]);
        let _pass = world.pass();
        world.machine.borrow_mut().ring.store(REQ_PROD, 1);
        let pass = world.engine.pass();
        assert!(!pass.broken && pass.taken == 0, "nothing new is there");
        world.machine.borrow_mut().ring.store(REQ_PROD, 3);
        world.run_clean();
        assert_eq!(
            world.machine.borrow().accesses.slots,
            3,
            "each is taken once"
        );
        world.still_works();
    });
}

#[test]
fn h03_a_producer_index_is_read_once_a_pass() {
    each(unchanged, |world| {
        world.send(&[Spec::pages(OP_READ, 0, 1)]);
        world.machine.borrow_mut().rewrite_req_prod = Some(1000);
        let before = world.machine.borrow().accesses.req_prod;
        let pass = world.engine.pass();
        assert_eq!(world.machine.borrow().accesses.req_prod, before + 1);
        assert!(pass.taken == 1 && !pass.broken, "only what was read counts");
        // Put right before the next look: nothing has happened.
        world.machine.borrow_mut().ring.store(REQ_PROD, 1);
        world.run_clean();
        world.still_works();
    });
}

#[test]
fn h04_the_backends_words_may_be_overwritten() {
    for junk in [0, 7, 1 << 31, u32::MAX] {
        each(unchanged, |world| {
            for round in 1..=3 {
                world.send(&vec![Spec::pages(OP_READ, 0, 1); 4]);
                let spoil = |world: &mut World<'_>| {
                    let mut m = world.machine.borrow_mut();
                    m.ring.store(RSP_PROD, junk);
                    m.ring.store(REQ_EVENT, junk);
                };
                spoil(world);
                settle(world);
                assert_eq!(world.machine.borrow().ring.load(RSP_PROD), 4 * round);
                assert_eq!(world.machine.borrow().ring.load(REQ_EVENT), 4 * round + 1);
                world.machine.borrow_mut().consume();
            }
            world.run_clean();
            world.still_works();
        });
    }
}

#[test]
fn h05_an_extreme_response_event_makes_no_storm() {
    for event in [0, 1, 2, 1 << 31, u32::MAX, u32::MAX - 3] {
        each(unchanged, |world| {
            for round in 1..=4 {
                world.machine.borrow_mut().ring.store(RSP_EVENT, event);
                world.send(&vec![Spec::pages(OP_READ, 0, 1); 5]);
                settle(world);
                assert_eq!(world.machine.borrow().front.answers.len(), 5 * round);
                world.machine.borrow_mut().consume();
            }
            let published = world.machine.borrow().accesses.published;
            assert!(world.engine.stats().notified <= published);
            world.run_clean();
            world.still_works();
        });
    }
}

#[test]
fn h06_a_guest_that_consumes_nothing_gets_no_more_than_a_ring() {
    each(unchanged, |world| {
        for round in 1..=3 {
            world.send(&vec![Spec::pages(OP_READ, 0, 1); 32]);
            assert!(world.engine.pass().taken <= 32);
            assert!(world.engine.in_flight() <= 32);
            settle(world);
            assert_eq!(world.machine.borrow().front.answers.len(), 32 * round);
        }
        // One more than fits while none is answered.
        world.send(&vec![Spec::pages(OP_READ, 0, 1); 32]);
        let _pass = world.pass();
        world.send(&[Spec::pages(OP_READ, 0, 1)]);
        assert_eq!(world.engine.pass().taken, 0);
        assert_eq!(world.engine.in_flight(), 32);
        assert!(!world.engine.must_stay_awake(), "it need not even look");
        settle(world);
        // The extra request is found at the next look at the index, and not served.
        assert!(world.engine.pass().broken);
        assert_eq!(world.machine.borrow().front.answers.len(), 32 * 4);
        closes_cleanly(world);
    });
}

#[test]
fn h07_attach_takes_any_index_at_which_the_ring_can_be() {
    each(unchanged, |world| {
        let m = world.machine.clone();
        let attach = |rsp_prod: u32, req_prod: u32| {
            m.borrow_mut().ring.store(RSP_PROD, rsp_prod);
            m.borrow_mut().ring.store(REQ_PROD, req_prod);
            BackRing::attach(FakeRing::new(m.clone()), 32).map(|_| ())
        };
        for rsp_prod in [0, 1, 0xffff_fff0, 1 << 31] {
            assert_eq!(attach(rsp_prod, rsp_prod), Ok(()));
            assert_eq!(attach(rsp_prod, rsp_prod.wrapping_add(32)), Ok(()));
            for ahead in [33, 1 << 31, u32::MAX] {
                let req_prod = rsp_prod.wrapping_add(ahead);
                let overflow = RingError::Overflow { req_prod, rsp_prod };
                assert_eq!(attach(rsp_prod, req_prod), Err(overflow));
            }
        }
        let setup = m.borrow().setup.clone();
        let mut storage = Storage::new(&setup);
        World::attached_at(&mut storage, setup, 1, 0xffff_fff0).still_works();
    });
}

#[test]
fn h08_a_slot_is_fetched_once() {
    let specs = [
        Spec::pages(OP_WRITE, 0, 11),
        Spec::indirect(OP_WRITE, 128, 40),
        Spec::pages(OP_READ, 512, 11),
        Spec::new(OP_FLUSH_DISKCACHE, 0),
        Spec {
            discard: 64,
            ..Spec::new(OP_DISCARD, 1024)
        },
        Spec::pages(OP_WRITE_BARRIER, 2048, 2),
        Spec::new(77, 0).expect(Expect::NotSupported),
    ];
    each(
        |setup| setup.scribble = true,
        |world| {
            world.serve(&specs);
            assert_eq!(world.machine.borrow().accesses.slots, specs.len() as u64);
            world.still_works();
        },
    );
}

#[test]
fn h09_segment_counts_out_of_range_are_errors() {
    let mut specs = Vec::new();
    for operation in [OP_READ, OP_WRITE, OP_WRITE_BARRIER, OP_FLUSH_DISKCACHE] {
        for count in [0, 12, 13, 128, 255] {
            if count == 0 && operation >= OP_WRITE_BARRIER {
                continue;
            }
            specs.push(Spec {
                count: Some(count),
                ..Spec::pages(operation, 0, 11).expect(Expect::Error)
            });
        }
    }
    requests(unchanged, &specs);
}

#[test]
fn h10_segments_outside_of_their_page_are_errors() {
    let mut bounds = vec![(1, 0), (7, 6), (7, 0), (8, 8), (255, 255), (255, 0), (8, 7)];
    bounds.extend((8..=255).map(|last| (0, last)));
    let mut specs = Vec::new();
    for (first, last) in bounds {
        let segments = [(Gref::Fresh, 0, 7), (Gref::Fresh, first, last)];
        for operation in [OP_READ, OP_WRITE] {
            let spec = Spec::new(operation, 0).with(&segments);
            specs.push(spec.clone().expect(Expect::Error));
            specs.push(Spec {
                indirect: true,
                ..spec.expect(Expect::Error)
            });
        }
    }
    each(unchanged, |world| {
        world.serve(&specs);
        assert_eq!(world.engine.stats().rd_req + world.engine.stats().wr_req, 0);
        assert_eq!(world.engine.stats().mapped, 0, "nothing was mapped");
        world.still_works();
    });
}

#[test]
fn h11_sums_that_overflow_are_errors() {
    let mut specs = Vec::new();
    for sector in [
        u64::MAX,
        u64::MAX - 7,
        u64::MAX - 8,
        u64::MAX - 87,
        1 << 63,
        (1 << 55) - 1,
        4097,
    ] {
        for operation in [OP_READ, OP_WRITE] {
            specs.push(Spec::pages(operation, sector, 11).expect(Expect::Error));
            specs.push(Spec::indirect(operation, sector, 256).expect(Expect::Error));
        }
        for discard in [1, 8, u64::MAX, u64::MAX - sector] {
            specs.push(Spec {
                discard,
                ..Spec::new(OP_DISCARD, sector).expect(Expect::Error)
            });
        }
    }
    // Only a discard of nothing at the very end would fit.
    specs.retain(|s| s.operation != OP_DISCARD || s.discard > 0);
    requests(unchanged, &specs);
}

#[test]
fn h12_the_last_sector_is_inside_and_the_next_is_not() {
    let end = Setup::default().limits.sectors;
    let mut specs = Vec::new();
    for operation in [OP_READ, OP_WRITE] {
        specs.push(Spec::pages(operation, end - 88, 11));
        specs.push(Spec::pages(operation, end - 87, 11).expect(Expect::Error));
        specs.push(Spec::indirect(operation, end - 256, 32));
        specs.push(Spec::indirect(operation, end - 255, 32).expect(Expect::Error));
        let one = [(Gref::Fresh, 3, 3)];
        specs.push(Spec::new(operation, end - 1).with(&one));
        specs.push(Spec::new(operation, end).with(&one).expect(Expect::Error));
    }
    requests(unchanged, &specs);
}

#[test]
fn h12_a_shrunk_disk_refuses_what_no_longer_fits() {
    each(unchanged, |world| {
        world.serve(&[Spec::pages(OP_WRITE, 2048, 4)]);
        world.engine.set_sectors(2048);
        world.serve(&[
            Spec::pages(OP_READ, 2048, 1).expect(Expect::Error),
            Spec::pages(OP_WRITE, 2041, 1).expect(Expect::Error),
            Spec::indirect(OP_READ, 2048 - 8, 2).expect(Expect::Error),
            Spec::pages(OP_WRITE, 2040, 1),
        ]);
        world.still_works();
    });
}

#[test]
fn h13_what_is_not_whole_blocks_is_an_error() {
    for block in [2u8, 4, 8] {
        let mut specs = Vec::new();
        for first in 0..8u8 {
            for last in first..8 {
                for shift in 0..u64::from(block) {
                    let right = first % block == 0 && (last + 1) % block == 0 && shift == 0;
                    let spec = Spec::new(OP_WRITE, 64 + shift)
                        .with(&[(Gref::Fresh, first, last)])
                        .expect(if right { Expect::Okay } else { Expect::Error });
                    let read = Spec {
                        operation: OP_READ,
                        ..spec.clone()
                    };
                    let indirect = Spec {
                        indirect: true,
                        ..spec.clone()
                    };
                    specs.extend([spec, read, indirect]);
                }
            }
        }
        requests(|s| s.limits.block_sectors = u32::from(block), &specs);
    }
}

#[test]
fn h14_a_read_only_disk_is_not_written() {
    let specs = [
        Spec::pages(OP_WRITE, 0, 1).expect(Expect::Error),
        Spec::indirect(OP_WRITE, 0, 20).expect(Expect::Error),
        Spec::pages(OP_WRITE_BARRIER, 0, 1).expect(Expect::Error),
        Spec::new(OP_WRITE_BARRIER, 0).expect(Expect::Error),
        Spec::pages(OP_FLUSH_DISKCACHE, 0, 1).expect(Expect::Error),
        Spec {
            discard: 8,
            ..Spec::new(OP_DISCARD, 0).expect(Expect::Error)
        },
        Spec::new(OP_FLUSH_DISKCACHE, 0),
    ];
    requests(|s| s.limits.read_only = true, &specs);
}

#[test]
fn h15_unknown_operations_are_answered_at_full_rate() {
    each(unchanged, |world| {
        for operation in [4].into_iter().chain(7..=255) {
            let specs = vec![Spec::new(operation, 0).expect(Expect::NotSupported); 32];
            world.serve(&specs);
        }
        let stats = *world.engine.stats();
        assert_eq!(stats.refused, 250 * 32);
        assert!(stats.passes <= 250 * 3, "{} passes", stats.passes);
        assert_eq!(world.machine.borrow().disk.batches, 0);
        world.still_works();
    });
}

#[test]
fn h16_identifiers_are_echoed_whatever_they_are() {
    for id in [0, 1, u64::MAX, 1 << 63, 0x0123_4567_89ab_cdef] {
        let flush = Spec::new(OP_FLUSH_DISKCACHE, 0).id(id);
        let unknown = Spec::new(99, 0).id(id).expect(Expect::NotSupported);
        let mut specs = vec![flush; 5];
        specs.extend(vec![unknown; 5]);
        specs.push(Spec::pages(OP_READ, 0, 2).id(id));
        specs.push(Spec::indirect(OP_WRITE, 0, 2).id(id));
        each(unchanged, |world| {
            let answers = world.serve(&specs);
            assert!(answers.iter().all(|a| a.id == id) && answers.len() == 12);
            world.still_works();
        });
    }
}

#[test]
fn h17_the_handle_is_ignored() {
    let with = |handle, spec| Spec { handle, ..spec };
    let specs: Vec<_> = [0, 1, 0xffff]
        .into_iter()
        .flat_map(|handle| {
            [
                with(handle, Spec::pages(OP_WRITE, 0, 2)),
                with(handle, Spec::new(OP_FLUSH_DISKCACHE, 0)),
            ]
        })
        .collect();
    requests(unchanged, &specs);
}

#[test]
fn h18_the_sector_of_an_empty_flush_is_nothing() {
    for flush in [true, false] {
        let specs: Vec<_> = [0, 4096, u64::MAX, 1 << 63, 3]
            .into_iter()
            .flat_map(|sector| {
                [
                    Spec::new(OP_FLUSH_DISKCACHE, sector),
                    Spec::new(OP_WRITE_BARRIER, sector),
                ]
            })
            .collect();
        let change = |s: &mut Setup| {
            s.limits.flush = flush;
            s.limits.block_sectors = 8;
        };
        requests(change, &specs);
    }
}

#[test]
fn h19_indirect_requests_are_checked_before_their_pages_are_read() {
    let mut specs = Vec::new();
    for count in [0, 257, 512, 513, 4096, 65535] {
        for operation in [OP_READ, OP_WRITE] {
            specs.push(Spec {
                count: Some(count),
                ..Spec::indirect(operation, 0, 2).expect(Expect::Error)
            });
        }
    }
    for operation in 2..=255 {
        specs.push(Spec::indirect(operation, 0, 1).expect(Expect::Error));
    }
    requests(unchanged, &specs);
}

#[test]
fn h20_descriptors_are_parsed_from_a_private_copy() {
    requests(
        |s| s.scribble = true,
        &[
            Spec::indirect(OP_WRITE, 0, 256),
            Spec::indirect(OP_WRITE, 2048, 30),
            Spec::indirect(OP_READ, 0, 200),
        ],
    );
}

#[test]
fn h21_only_the_needed_descriptor_pages_count() {
    // Every honest request here has references beyond the first that were never granted.
    let bad = |gref| Spec {
        descriptor: Some(gref),
        ..Spec::indirect(OP_READ, 0, 12).expect(Expect::Error)
    };
    requests(
        unchanged,
        &[
            Spec::indirect(OP_WRITE, 0, 256),
            bad(BAD_GREF),
            bad(0),
            Spec::indirect(OP_READ, 0, 256),
        ],
    );
}

#[test]
fn h22_a_descriptor_page_may_be_a_data_page() {
    let segments = [
        (Gref::Descriptor, 0, 7),
        (Gref::Fresh, 0, 7),
        (Gref::Fresh, 2, 5),
    ];
    let read = Spec {
        indirect: true,
        ..Spec::new(OP_READ, 0).with(&segments)
    };
    each(unchanged, |world| {
        world.machine.borrow_mut().install(0xffff_fff0, 0, 64);
        world.serve(&[read.clone(), read.clone()]);
        world.still_works();
    });
}

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
        // Writing from such a page is right.
        world.serve(&[Spec::new(OP_WRITE, 0).with(&segments)]);
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
                closes_cleanly(world);
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
        let change = |s: &mut Setup| {
            s.junk = junk;
            s.limits = Limits {
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
