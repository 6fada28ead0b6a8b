// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Who gets how much of the memory for data: arithmetic without locks, memory or time.
//!
//! Every queue is *promised* what it cannot do without, when it connects, for as long as it is
//! connected. What is left of the bounds is *lent* to whoever asks. A guest that is refused because
//! others have it all is *hungry*: until it has had its share, no other guest gets more than its
//! own, and those that have more are told how much they owe. The share is what there is to lend,
//! divided by the guests that have borrowed something or are hungry.

/// Pages for which a hungry guest makes others give back at once.
const MEAL: u32 = 64;

/// How much there may be, in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// For all guests.
    pub host: u32,
    /// For each guest.
    pub guest: u32,
}

/// Why a queue cannot be promised what it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Its guest has all that one may have.
    Guest,
    /// All guests together have it.
    Host,
}

/// The books of all guests together.
#[derive(Debug, Default)]
pub struct Host {
    promised: u32,
    lent: u32,
    /// Guests that have borrowed something or are hungry.
    sharers: u32,
    hungry: u32,
}

/// The books of one guest.
#[derive(Debug, Default)]
pub struct Guest {
    promised: u32,
    lent: u32,
    hungry: bool,
    mappings: u32,
}

impl Guest {
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

impl Host {
    /// Pages promised and lent to all guests.
    pub fn held(&self) -> u32 {
        self.promised.saturating_add(self.lent)
    }

    /// Promises a guest pages.
    ///
    /// # Errors
    ///
    /// What is promised fits into the bounds, whatever is lent.
    pub fn promise(
        &mut self,
        guest: &mut Guest,
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

    /// Ends a promise.
    pub fn release(&mut self, guest: &mut Guest, pages: u32) {
        self.promised = self.promised.saturating_sub(pages);
        guest.promised = guest.promised.saturating_sub(pages);
    }

    /// What each guest can borrow, if all who want something want that much.
    fn share(&self, bounds: Bounds) -> u32 {
        let room = bounds.host.saturating_sub(self.promised);
        room.checked_div(self.sharers).unwrap_or(room)
    }

    /// Lends a guest pages; `false` if it gets none. It may be hungry then: see
    /// [`has_hungry`](Self::has_hungry).
    pub fn lend(&mut self, guest: &mut Guest, pages: u32, bounds: Bounds) -> bool {
        let own = guest.lent.saturating_add(pages);
        if own > bounds.guest.saturating_sub(guest.promised) {
            // Nobody else is the reason.
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
        // It is one of those who share now; if it has its share, it is not hungry.
        self.change(guest, |guest| guest.hungry = true);
        if own > self.share(bounds) {
            self.change(guest, |guest| guest.hungry = false);
        }
        false
    }

    /// Takes back pages that were lent.
    pub fn take_back(&mut self, guest: &mut Guest, pages: u32) {
        let pages = pages.min(guest.lent);
        self.lent = self.lent.saturating_sub(pages);
        self.change(guest, |guest| guest.lent = guest.lent.wrapping_sub(pages));
    }

    /// A guest wants nothing more at present.
    pub fn is_content(&mut self, guest: &mut Guest) {
        self.change(guest, |guest| guest.hungry = false);
    }

    /// True while a guest is hungry.
    pub fn has_hungry(&self) -> bool {
        self.hungry > 0
    }

    /// Pages that a guest has to give back as soon as it does not use them.
    pub fn owed(&self, guest: &Guest, bounds: Bounds) -> u32 {
        let own_bound = bounds.guest.saturating_sub(guest.promised);
        let over_own = guest.lent.saturating_sub(own_bound);
        let others_are_hungry = self.hungry.saturating_sub(u32::from(guest.hungry));
        let room = bounds.host.saturating_sub(self.promised);
        let wanted = others_are_hungry.saturating_mul(MEAL);
        let lacking = self.lent.saturating_add(wanted).saturating_sub(room);
        let over_share = guest.lent.saturating_sub(self.share(bounds));
        over_own.max(over_share.min(lacking))
    }

    fn change(&mut self, guest: &mut Guest, how: impl FnOnce(&mut Guest)) {
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
