// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Division of the memory for data among guests: arithmetic without locks, memory or time.
//!
//! Every queue is *promised* its minimum when it connects, for as long as it is connected. The rest of the bounds is
//! *lent* on request. A guest that is refused because others have it all is *hungry*: until it has had its share, no
//! other guest gets more than its own, and those that have more learn how much they owe. The share is what there is to
//! lend, divided by the guests that have borrowed something or are hungry.
//!
//! The size of an offer is decided before the frontend asks: a disk is *offered* no more queues than it has memory
//! reserved for. The part of a guest's memory that its next disk may have shrinks with each disk that it has, so that
//! all of them can connect.

/// Number of disks among which half of a guest's memory is divided.
const DISKS: u32 = 255;
/// The next disk may have this part of the memory that is not kept for the disks after it.
const PART: u32 = 16;
/// Pages for which a hungry guest makes others give back at once.
const MEAL: u32 = 64;

/// Upper limits, in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// For all guests.
    pub host: u32,
    /// For each guest.
    pub guest: u32,
}

/// Reason why a queue cannot be promised its minimum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Its guest has all that one may have.
    Guest,
    /// All guests together have it.
    Host,
}

/// The books of all guests together.
#[derive(Debug, Default)]
pub struct HostLedger {
    promised: u32,
    /// Pages for what frontends were offered and have not asked for yet.
    reserved: u32,
    lent: u32,
    /// Guests that have borrowed something or are hungry.
    sharers: u32,
    hungry: u32,
}

/// The books of one guest.
#[derive(Debug, Default)]
pub struct GuestLedger {
    promised: u32,
    reserved: u32,
    /// Disks that were offered something, whether they are connected or not.
    disks: u32,
    lent: u32,
    hungry: bool,
    mappings: u32,
}

impl GuestLedger {
    /// Pages promised and lent.
    pub fn held(&self) -> u32 {
        self.promised.saturating_add(self.lent)
    }

    /// Reserves mappings of its pages, which take room in the hypervisor's table of this domain;
    /// `false` if it would have more than `most`.
    pub fn reserve_mappings(&mut self, count: u32, most: u32) -> bool {
        let all = self.mappings.checked_add(count);
        match all.filter(|all| *all <= most) {
            Some(all) => {
                self.mappings = all;
                true
            }
            None => false,
        }
    }

    /// Ends a reservation of mappings.
    pub fn release_mappings(&mut self, count: u32) {
        self.mappings = self.mappings.saturating_sub(count);
    }

    fn shares(&self) -> bool {
        self.lent > 0 || self.hungry
    }
}

impl HostLedger {
    /// Pages promised and lent to all guests.
    pub fn held(&self) -> u32 {
        self.promised.saturating_add(self.lent)
    }

    /// Promises a guest pages.
    ///
    /// # Errors
    ///
    /// The pages do not fit into the bounds, even if all that is lent came back.
    pub fn promise(
        &mut self,
        guest: &mut GuestLedger,
        pages: u32,
        bounds: Bounds,
    ) -> Result<(), Refusal> {
        let all = self.promised.checked_add(pages);
        let own = guest.promised.checked_add(pages);
        let all = all.filter(|all| *all <= bounds.host).ok_or(Refusal::Host)?;
        guest.promised = own
            .filter(|own| *own <= bounds.guest)
            .ok_or(Refusal::Guest)?;
        self.promised = all;
        Ok(())
    }

    /// Promises a guest pages of which `reserved` at most are reserved for this disk; they are not any more afterwards.
    /// Returns how many were.
    ///
    /// # Errors
    ///
    /// The guest would have more than its bound with the pages that are reserved for other disks, or all guests more than
    /// the host's. Then nothing has changed.
    pub fn promise_reserved(
        &mut self,
        guest: &mut GuestLedger,
        pages: u32,
        reserved: u32,
        bounds: Bounds,
    ) -> Result<u32, Refusal> {
        let used = pages.min(reserved).min(guest.reserved);
        let left = guest.reserved.saturating_sub(used);
        let own = bounds.guest.saturating_sub(left);
        self.promise(
            guest,
            pages,
            Bounds {
                guest: own,
                ..bounds
            },
        )?;
        self.unreserve(guest, used);
        Ok(used)
    }

    /// Counts one more disk of a guest. Returns the pages that it may be offered, if one queue needs `least`.
    pub fn add_disk(&mut self, guest: &mut GuestLedger, least: u32, bounds: Bounds) -> u32 {
        guest.disks = guest.disks.saturating_add(1);
        let left = |bound: u32, promised: u32, reserved: u32| {
            bound.saturating_sub(promised).saturating_sub(reserved)
        };
        let own = left(bounds.guest, guest.promised, guest.reserved);
        let to_come = DISKS.saturating_sub(guest.disks);
        let kept = least.saturating_mul(to_come).min(bounds.guest / 2);
        let host = left(bounds.host, self.promised, self.reserved);
        let part = |pages: u32| pages.checked_div(PART).unwrap_or(0);
        part(own.saturating_sub(kept)).min(part(host)).max(least)
    }

    /// A disk of a guest is not offered anything any more.
    pub fn remove_disk(&mut self, guest: &mut GuestLedger) {
        guest.disks = guest.disks.saturating_sub(1);
    }

    /// Reserves pages for a disk's offer, or as many as the guest has left. Returns their number. Returns how many.
    pub fn reserve(&mut self, guest: &mut GuestLedger, pages: u32, bounds: Bounds) -> u32 {
        let left = bounds.guest.saturating_sub(guest.promised);
        let pages = pages.min(left.saturating_sub(guest.reserved));
        guest.reserved = guest.reserved.saturating_add(pages);
        self.reserved = self.reserved.saturating_add(pages);
        pages
    }

    /// Ends a reservation.
    pub fn unreserve(&mut self, guest: &mut GuestLedger, pages: u32) {
        guest.reserved = guest.reserved.saturating_sub(pages);
        self.reserved = self.reserved.saturating_sub(pages);
    }

    /// Ends a promise.
    pub fn release(&mut self, guest: &mut GuestLedger, pages: u32) {
        self.promised = self.promised.saturating_sub(pages);
        guest.promised = guest.promised.saturating_sub(pages);
    }

    /// Pages that each guest can borrow, if all borrowers and hungry guests get as much.
    fn share(&self, bounds: Bounds) -> u32 {
        let room = bounds.host.saturating_sub(self.promised);
        room.checked_div(self.sharers).unwrap_or(room)
    }

    /// Lends a guest pages; `false` if it gets none. The guest may be hungry then: see
    pub fn lend(&mut self, guest: &mut GuestLedger, pages: u32, bounds: Bounds) -> bool {
        let own = guest.lent.saturating_add(pages);
        if own > bounds.guest.saturating_sub(guest.promised) {
            // The guest's own bound is the reason, not another guest.
            return false;
        }
        let others_are_hungry = self.hungry > u32::from(guest.hungry);
        let fits = self.lent.saturating_add(pages) <= bounds.host.saturating_sub(self.promised);
        if fits && (!others_are_hungry || own <= self.share(bounds)) {
            self.change(guest, |guest| {
                guest.lent = own;
                guest.hungry = false;
            });
            self.lent = self.lent.saturating_add(pages);
            return true;
        }
        // The guest is one of those that share now; if it has its share, it is not hungry.
        self.change(guest, |guest| guest.hungry = true);
        if own > self.share(bounds) {
            self.change(guest, |guest| guest.hungry = false);
        }
        false
    }

    /// Takes back pages that were lent.
    pub fn take_back(&mut self, guest: &mut GuestLedger, pages: u32) {
        let pages = pages.min(guest.lent);
        self.lent = self.lent.saturating_sub(pages);
        self.change(guest, |guest| guest.lent = guest.lent.wrapping_sub(pages));
    }

    /// Records that a guest needs nothing more at present.
    pub fn is_content(&mut self, guest: &mut GuestLedger) {
        self.change(guest, |guest| guest.hungry = false);
    }

    /// True while a guest is hungry.
    pub fn has_hungry(&self) -> bool {
        self.hungry > 0
    }

    /// Pages that a guest has to give back as soon as it does not use them.
    pub fn owed(&self, guest: &GuestLedger, bounds: Bounds) -> u32 {
        let own_bound = bounds.guest.saturating_sub(guest.promised);
        let over_own = guest.lent.saturating_sub(own_bound);
        let others_are_hungry = self.hungry.saturating_sub(u32::from(guest.hungry));
        let room = bounds.host.saturating_sub(self.promised);
        let wanted = others_are_hungry.saturating_mul(MEAL);
        let lacking = self.lent.saturating_add(wanted).saturating_sub(room);
        let over_share = guest.lent.saturating_sub(self.share(bounds));
        over_own.max(over_share.min(lacking))
    }

    fn change(&mut self, guest: &mut GuestLedger, how: impl FnOnce(&mut GuestLedger)) {
        let (shared, hungry) = (guest.shares(), guest.hungry);
        how(guest);
        let step = |count: u32, before: bool, now: bool| {
            count
                .saturating_add(u32::from(now))
                .saturating_sub(u32::from(before))
        };
        self.sharers = step(self.sharers, shared, guest.shares());
        self.hungry = step(self.hungry, hungry, guest.hungry);
    }
}

/// Largest number of queues, and order of their rings, for which `share` pages are enough: at most these, and at least
/// one queue with a ring of one page. A queue with a ring of an order takes `pages(order)`.
pub fn fit(queues: u32, order: u8, share: u32, pages: impl Fn(u8) -> u32) -> (u32, u8) {
    let fits = |order: &u8| pages(*order) <= share;
    let order = (0..=order).rev().find(fits).unwrap_or(0);
    let many = share.checked_div(pages(order)).unwrap_or(queues);
    (many.clamp(1, queues.max(1)), order)
}
