// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Requests that must be refused, and oddities that must not.

use ring::abi::{OP_DISCARD, OP_FLUSH_DISKCACHE, OP_READ, OP_WRITE, OP_WRITE_BARRIER};
use sim::frontend::BAD_GREF;
use sim::machine::MachineSetup;
use sim::spec::{Expect, Gref, Spec};

use super::{each, requests, unchanged};

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
    let end = MachineSetup::default().limits.sectors;
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
                    let right = (last + 1 - first) % block == 0 && shift == 0;
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
        let change = |s: &mut MachineSetup| {
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
