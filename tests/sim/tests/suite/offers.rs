// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! How many queues the disks of one guest are offered, so that all of them fit into its memory.

use blkback::engine::{BlockGroup, Mapping, PendingRequest, SegmentEntry};
use blkback::memory_quota::{fit, Bounds, GuestLedger, HostLedger, Refusal};

const MIB: u32 = 256;
const DEFAULT: Bounds = Bounds {
    host: 8192 * MIB,
    guest: 256 * MIB,
};
/// Queues of a large dom0, and the order of rings, that are offered to the first disk.
const QUEUES: u32 = 16;
const ORDER: u8 = 4;

/// Pages that a queue takes always (`phy::bytes`), with a ring of this order. The tables of the engine are counted
/// here; the rest is what the kernel takes beside them, as the table of docs/explanation/memory.md has it.
fn pages(order: u8) -> u32 {
    const COPY: u16 = 1024;
    const MAP: usize = 1056;
    const REST: usize = 256;
    let slots = [32, 64, 128, 256, 512][usize::from(order)];
    let (own, descriptors) = (16 * 4096, 8 * 4096);
    let entries = (usize::from(COPY) + MAP + REST) * size_of::<SegmentEntry>();
    let tables = entries
        + slots * size_of::<PendingRequest>()
        + BlockGroup::needed(COPY) * size_of::<BlockGroup>()
        + MAP * size_of::<Mapping>();
    let (places, grants) = (17 << 10, 36 << 10);
    let bios = (8 << 10) + slots * 328;
    let all = own + descriptors + tables + places + grants + bios;
    u32::try_from(all.div_ceil(4096)).unwrap()
}

/// A disk: what it was offered, what is still reserved for it, and what it was promised.
struct OfferedDisk {
    queues: u32,
    order: u8,
    reserved: u32,
    promised: u32,
}

struct OfferScene {
    host: HostLedger,
    guest: GuestLedger,
    bounds: Bounds,
}

impl OfferScene {
    fn new(bounds: Bounds) -> Self {
        Self {
            host: HostLedger::default(),
            guest: GuestLedger::default(),
            bounds,
        }
    }

    fn offer(&mut self) -> OfferedDisk {
        let least = pages(ORDER);
        let share = self.host.add_disk(&mut self.guest, least, self.bounds);
        let (queues, order) = fit(QUEUES, ORDER, share, pages);
        let needed = queues * pages(order);
        OfferedDisk {
            queues,
            order,
            reserved: self.host.reserve(&mut self.guest, needed, self.bounds),
            promised: 0,
        }
    }

    /// The frontend asks for so many queues, with rings of this order. The rest of the reservation is given back.
    fn connect(&mut self, disk: &mut OfferedDisk, queues: u32, order: u8) -> Result<(), Refusal> {
        for _ in 0..queues {
            let used = self.host.promise_reserved(
                &mut self.guest,
                pages(order),
                disk.reserved,
                self.bounds,
            )?;
            disk.reserved -= used;
            disk.promised += pages(order);
        }
        self.host.unreserve(&mut self.guest, disk.reserved);
        disk.reserved = 0;
        Ok(())
    }

    fn remove(&mut self, disk: &OfferedDisk) {
        self.host.unreserve(&mut self.guest, disk.reserved);
        self.host.release(&mut self.guest, disk.promised);
        self.host.remove_disk(&mut self.guest);
    }
}

#[test]
fn the_figures_are_those_of_the_manual() {
    // 218 KiB and 397 KiB, by the table of docs/explanation/memory.md.
    assert!((50..=60).contains(&pages(0)), "{}", pages(0));
    assert!((95..=115).contains(&pages(4)), "{}", pages(4));
}

#[test]
fn as_many_disks_as_a_guest_can_have_fit_into_its_memory() {
    // All are offered before the first connects, as when a guest boots; and one after the other.
    for at_once in [true, false] {
        for (queues, order) in [(QUEUES, ORDER), (QUEUES, 0), (1, ORDER)] {
            let mut scene = OfferScene::new(DEFAULT);
            let mut disks = Vec::new();
            for number in 0..255 {
                let mut disk = scene.offer();
                if !at_once {
                    let (queues, order) = (queues.min(disk.queues), order.min(disk.order));
                    let done = scene.connect(&mut disk, queues, order);
                    assert_eq!(done, Ok(()), "disk {number}");
                }
                disks.push(disk);
            }
            for (number, disk) in disks.iter_mut().enumerate().filter(|_| at_once) {
                let (queues, order) = (queues.min(disk.queues), order.min(disk.order));
                assert_eq!(scene.connect(disk, queues, order), Ok(()), "disk {number}");
            }
            assert!(scene.guest.held() <= DEFAULT.guest);
        }
    }
}

#[test]
fn the_first_disks_are_offered_all() {
    let mut scene = OfferScene::new(DEFAULT);
    for number in 0..8 {
        let disk = scene.offer();
        let offered = (disk.queues, disk.order);
        assert_eq!(offered, (QUEUES, ORDER), "disk {number}");
    }
}

#[test]
fn each_disk_is_offered_at_most_as_much_as_the_one_before() {
    for guest in [16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB] {
        let mut scene = OfferScene::new(Bounds { guest, ..DEFAULT });
        let mut last = QUEUES;
        for number in 0..300 {
            let disk = scene.offer();
            assert!(disk.queues <= last, "disk {number} of {guest}");
            assert!(disk.queues >= 1);
            last = disk.queues;
        }
        assert_eq!(last, 1);
    }
}

#[test]
fn a_disk_gets_what_it_was_offered_whatever_others_do_meanwhile() {
    let mut scene = OfferScene::new(DEFAULT);
    let mut first = scene.offer();
    let mut others = Vec::new();
    // Others take what there is.
    loop {
        let mut disk = scene.offer();
        let (queues, order) = (disk.queues, disk.order);
        if scene.connect(&mut disk, queues, order).is_err() {
            break;
        }
        others.push(disk);
    }
    assert!(others.len() >= 255);
    let (queues, order) = (first.queues, first.order);
    assert_eq!((queues, order), (QUEUES, ORDER));
    assert_eq!(scene.connect(&mut first, queues, order), Ok(()));
    assert!(scene.guest.held() <= DEFAULT.guest);
}

#[test]
fn disks_that_are_gone_leave_their_part_to_others() {
    let mut scene = OfferScene::new(DEFAULT);
    for _ in 0..3 {
        let disks: Vec<_> = (0..300).map(|_| scene.offer()).collect();
        assert_eq!(disks[0].queues, QUEUES);
        disks.iter().for_each(|disk| scene.remove(disk));
    }
    assert_eq!(scene.guest.held(), 0);
}

#[test]
fn the_memory_of_the_host_shrinks_offers_as_well() {
    let bounds = Bounds {
        host: 64 * MIB,
        guest: 256 * MIB,
    };
    let mut scene = OfferScene::new(bounds);
    let first = scene.offer();
    assert!(
        first.queues < QUEUES && first.queues > 1,
        "{}",
        first.queues
    );
}
