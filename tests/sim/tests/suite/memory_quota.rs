// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Shares of memory: bounds that change at any time, and fairness between guests.

use blkback::memory_quota::{Bounds, GuestLedger, HostLedger, Refusal};
use seeds::Seeds;
use sim::rng::Rng;

const BLOCK: u32 = 8;

/// The host as its guests see it; each guest's queues request memory for as long as they need some.
struct ShareScene {
    host: HostLedger,
    guests: Vec<(GuestLedger, u32)>,
    bounds: Bounds,
}

impl ShareScene {
    fn new(guests: usize, bounds: Bounds) -> Self {
        let mut host = HostLedger::default();
        let guests = (0..guests).map(|_| {
            let mut guest = GuestLedger::default();
            assert_eq!(host.promise(&mut guest, 32, bounds), Ok(()));
            (guest, 0)
        });
        Self {
            guests: guests.collect(),
            host,
            bounds,
        }
    }

    fn borrow(&mut self, who: usize) -> bool {
        let (guest, lent) = &mut self.guests[who];
        let got = self.host.lend(guest, BLOCK, self.bounds);
        *lent += if got { BLOCK } else { 0 };
        got
    }

    fn give_back(&mut self, who: usize, pages: u32) {
        let (guest, lent) = &mut self.guests[who];
        let pages = pages.min(*lent);
        self.host.take_back(guest, pages);
        *lent -= pages;
    }

    /// Returns memory that the guest owes, in whole blocks.
    fn pay(&mut self, who: usize) {
        let owed = self.host.owed(&self.guests[who].0, self.bounds);
        self.give_back(who, owed.next_multiple_of(BLOCK));
    }

    fn lent(&self, who: usize) -> u32 {
        self.guests[who].1
    }
}

#[test]
fn a_thousand_disks_connect_while_one_guest_has_borrowed_all() {
    let bounds = Bounds {
        host: 64 * 1024,
        guest: 64 * 1024,
    };
    let mut scene = ShareScene::new(2, bounds);
    while scene.borrow(0) {}
    assert_eq!(scene.host.held(), 64 * 1024);
    let (guest, _) = &mut scene.guests[1];
    for disk in 0..1000 {
        assert_eq!(scene.host.promise(guest, 45, bounds), Ok(()), "disk {disk}");
    }
    assert_eq!(scene.host.owed(&scene.guests[0].0, bounds), 45 * 1000);
    scene.pay(0);
    assert!(scene.host.held() <= bounds.host);
}

#[test]
fn what_is_promised_stays_within_both_bounds() {
    let bounds = Bounds {
        host: 100,
        guest: 60,
    };
    let mut scene = ShareScene::new(2, bounds);
    let (a, _) = &mut scene.guests[0];
    assert_eq!(scene.host.promise(a, 29, bounds), Err(Refusal::Guest));
    assert_eq!(scene.host.promise(a, 28, bounds), Ok(()));
    let (b, _) = &mut scene.guests[1];
    assert_eq!(scene.host.promise(b, 9, bounds), Err(Refusal::Host));
    assert_eq!(scene.host.promise(b, 8, bounds), Ok(()));
    scene.host.release(b, 8);
    assert_eq!(scene.host.held(), 92);
}

#[test]
fn a_guest_that_comes_late_gets_its_share() {
    let bounds = Bounds {
        host: 64 * 2 + 1024,
        guest: 8192,
    };
    let mut scene = ShareScene::new(4, bounds);
    while scene.borrow(0) {}
    assert_eq!(scene.lent(0), 1024, "alone it gets all");
    for late in 1..4 {
        let mut rounds = 0;
        while scene.lent(late) < 1024 / (late as u32 + 1) - BLOCK {
            // The first guest asks again and again, and all pay what they owe.
            for who in 0..=late {
                while scene.borrow(who) {}
                scene.pay(who);
            }
            rounds += 1;
            assert!(rounds < 200, "{late} has only {}", scene.lent(late));
        }
    }
    for who in 0..4 {
        assert!(
            scene.lent(who) >= 1024 / 4 - 2 * BLOCK,
            "{}",
            scene.lent(who)
        );
    }
    // Guests that leave free their part for the others.
    for who in 1..4 {
        scene.give_back(who, u32::MAX);
        scene.host.is_content(&mut scene.guests[who].0);
    }
    while scene.borrow(0) {}
    assert_eq!(scene.lent(0), 1024);
}

#[test]
fn a_guest_at_its_own_bound_takes_nothing_from_others() {
    let bounds = Bounds {
        host: 2048,
        guest: 96,
    };
    let mut scene = ShareScene::new(2, bounds);
    while scene.borrow(0) {}
    assert_eq!(scene.lent(0), 64);
    assert!(!scene.host.has_hungry());
    assert_eq!(scene.host.owed(&scene.guests[1].0, bounds), 0);
}

#[test]
fn any_order_of_events_keeps_the_books() {
    for seed in Seeds::new(2000) {
        let mut rng = Rng::new(seed);
        let many = rng.range(1, 6) as usize;
        let random = |rng: &mut Rng| Bounds {
            host: 32 * many as u32 + rng.below(600) as u32,
            guest: 32 + rng.below(400) as u32,
        };
        let bounds = random(&mut rng);
        let mut scene = ShareScene::new(many, bounds);
        for step in 0..400 {
            let who = rng.index(many);
            match rng.below(20) {
                0 => scene.bounds = random(&mut rng),
                1..=3 => scene.give_back(who, BLOCK * rng.below(9) as u32),
                4 => scene.pay(who),
                5 => scene.host.is_content(&mut scene.guests[who].0),
                _ => {
                    let before = scene.host.held();
                    let got = scene.borrow(who);
                    let (guest, bounds) = (&scene.guests[who].0, scene.bounds);
                    assert!(!got || scene.host.held() <= bounds.host, "{seed}, {step}");
                    assert!(!got || guest.held() <= bounds.guest, "{seed}, {step}");
                    assert!(got || scene.host.held() == before, "{seed}, {step}");
                }
            }
            let lent: u32 = scene.guests.iter().map(|(_, lent)| lent).sum();
            assert_eq!(scene.host.held(), 32 * many as u32 + lent, "{seed}, {step}");
        }
        // When all pay and no guest asks, the current bounds hold.
        for who in 0..many {
            scene.host.is_content(&mut scene.guests[who].0);
        }
        for _ in 0..4 {
            (0..many).for_each(|who| scene.pay(who));
        }
        assert!(scene.host.held() <= scene.bounds.host, "{seed}");
        for (guest, _) in &scene.guests {
            assert!(guest.held() <= scene.bounds.guest, "{seed}");
        }
        // Then each guest gets a part, if there is enough for all.
        let room = scene.bounds.host - 32 * many as u32;
        let share = (room / many as u32).min(scene.bounds.guest - 32);
        for _ in 0..100 {
            for who in 0..many {
                scene.borrow(who);
                scene.pay(who);
            }
        }
        for who in 0..many {
            let least = (share / BLOCK * BLOCK).saturating_sub(BLOCK);
            assert!(
                scene.lent(who) >= least,
                "{seed}: {} of {share}",
                scene.lent(who)
            );
        }
    }
}
