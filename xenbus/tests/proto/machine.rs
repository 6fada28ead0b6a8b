// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! A driver and its surroundings without Xen: it carries out what the state machine says, and
//! checks at each step what a guest or a toolstack may see of it.

use xenbus::proto::state::{
    publishing, step, Action, OnlineWish, Publishing, Rings, View, XenbusState,
};

/// The steps that the driver's work takes before it queues itself again; coming to rest must never
/// need as many.
const STEPS: u32 = 16;

/// A device, its frontend and its disk.
#[derive(Clone, Debug)]
pub(crate) struct DeviceWorld {
    /// View of the state machine.
    pub(crate) view: View,
    /// The frontend's keys can be used.
    pub(crate) good_keys: bool,
    /// This domain has too little of something for a connect.
    pub(crate) is_short: bool,
    /// The device was given up.
    pub(crate) left: bool,
    /// Every state that was published, in order.
    pub(crate) published: Vec<XenbusState>,
    /// Times that the frontend was reported for an impossible state.
    pub(crate) reports: u32,
    /// Times that the frontend's directory was read to connect.
    pub(crate) attempts: u32,
    /// State in the directory.
    pub(crate) there: XenbusState,
    /// The toolstack takes the device away while the driver is about to publish what comes next.
    pub(crate) detach_in_between: bool,
}

impl DeviceWorld {
    /// A device as the toolstack makes it.
    pub(crate) fn new() -> Self {
        Self::looking_like(View {
            ours: XenbusState::Initialising,
            theirs: XenbusState::Initialising,
            online: OnlineWish::Yes,
            disk: false,
            ready: true,
            rings: Rings::None,
            refused: false,
        })
    }

    /// A device that looks like this.
    pub(crate) fn looking_like(view: View) -> Self {
        Self {
            view,
            good_keys: true,
            is_short: false,
            left: false,
            published: Vec::new(),
            reports: 0,
            attempts: 0,
            there: view.ours,
            detach_in_between: false,
        }
    }

    // Events of the machine.

    /// The frontend writes its state.
    pub(crate) fn write(&mut self, theirs: XenbusState) {
        self.view.theirs = theirs;
        self.view.refused = false;
    }

    /// The toolstack wants the device to stay, or not.
    pub(crate) fn set_online(&mut self, online: OnlineWish) {
        self.view.online = online;
    }

    /// The toolstack takes the device away: it writes our state, too.
    pub(crate) fn detach(&mut self) {
        self.set_online(OnlineWish::No);
        self.there = XenbusState::Closing;
    }

    /// The hotplug script names a disk that can be opened.
    pub(crate) fn disk_comes(&mut self) {
        if !self.left {
            self.view.disk = true;
        }
    }

    /// The hotplug script names something that cannot be opened.
    pub(crate) fn disk_is_bad(&mut self) {
        if !self.left && !self.view.disk {
            self.publish(XenbusState::Closing);
        }
    }

    /// The disk can be connected to, or not.
    pub(crate) fn set_ready(&mut self, ready: bool) {
        self.view.ready = ready;
    }

    /// Everything that was taken from the rings is answered, and they are given back.
    pub(crate) fn drained(&mut self) {
        if self.view.rings == Rings::Draining {
            self.view.rings = Rings::None;
        }
    }

    // Steps of the driver.

    /// Does one step; `false` if there is none to do.
    pub(crate) fn one_step(&mut self) -> bool {
        if self.left {
            return false;
        }
        match step(&self.view) {
            Action::Wait => return false,
            Action::Offer => self.publish(XenbusState::InitWait),
            Action::Connect => return self.connect(),
            Action::StartClosing => self.publish(XenbusState::Closing),
            Action::Disconnect => {
                assert_eq!(self.view.rings, Rings::Served, "nothing to disconnect");
                self.view.rings = Rings::Draining;
            }
            Action::Close => self.publish(XenbusState::Closed),
            Action::Leave => {
                assert_eq!(self.view.rings, Rings::None, "left with rings");
                self.view.disk = false;
                self.left = true;
                self.publish(XenbusState::Closed);
            }
            Action::Refuse => {
                self.reports += 1;
                self.publish(XenbusState::Closing);
            }
        }
        true
    }

    /// `false` if the driver rests, to try again later.
    fn connect(&mut self) -> bool {
        assert!(self.view.disk, "connected without a disk");
        assert!(self.view.ready, "connected to a disk that is not ready");
        assert!(!self.view.refused, "tried again what was refused");
        assert_eq!(self.view.rings, Rings::None, "mapped a second time");
        self.attempts += 1;
        if !self.good_keys {
            self.view.refused = true;
            self.publish(XenbusState::Closing);
            return true;
        }
        if self.is_short {
            return false;
        }
        self.view.rings = Rings::Served;
        self.publish(XenbusState::Connected);
        true
    }

    fn publish(&mut self, state: XenbusState) {
        if std::mem::take(&mut self.detach_in_between) {
            self.detach();
        }
        if publishing(self.view.ours, self.there, self.view.online, state) == Publishing::TakenAway
        {
            self.view.ours = self.there;
            self.view.refused = true;
            if self.view.rings == Rings::Served {
                self.view.rings = Rings::Draining;
            }
            return;
        }
        if state == XenbusState::Closed {
            assert_eq!(self.view.rings, Rings::None, "Closed while rings are held");
            let seen = matches!(self.view.ours, XenbusState::Closing | XenbusState::Closed);
            // Where the frontend's directory is gone, no reader could miss Closing.
            assert!(
                seen || self.view.theirs == XenbusState::Unknown,
                "Closed without Closing, after {:?}",
                self.published
            );
        }
        (self.view.ours, self.there) = (state, state);
        self.published.push(state);
    }

    /// Looks and acts until there is nothing to do; returns the number of steps.
    pub(crate) fn look(&mut self) -> u32 {
        let mut steps = 0;
        while self.one_step() {
            self.check();
            steps += 1;
            assert!(steps < STEPS, "no rest: {:?}", self.published);
        }
        steps
    }

    /// Looks with all requests in flight answered.
    pub(crate) fn settle(&mut self) {
        self.look();
        self.drained();
        self.look();
        self.drained();
        self.look();
        assert_ne!(self.view.rings, Rings::Draining, "drains again and again");
    }

    /// Checks the invariants of any moment.
    pub(crate) fn check(&self) {
        let View {
            ours, rings, disk, ..
        } = self.view;
        if ours == XenbusState::Connected {
            assert!(rings == Rings::Served && disk, "Connected, but {self:?}");
        }
        if ours == XenbusState::Closed {
            assert_eq!(rings, Rings::None, "Closed, but {self:?}");
        }
        if rings != Rings::None {
            assert!(disk, "rings without a disk: {self:?}");
        }
    }

    /// Checks the state when nothing moves any more: it follows from the present states of the frontend and the
    /// toolstack, whatever happened before.
    pub(crate) fn check_rest(&self) {
        let View {
            ours,
            theirs,
            online,
            disk,
            ready,
            rings,
            refused,
        } = self.view;
        let closed_or_left = if online == OnlineWish::Yes {
            !self.left && ours == XenbusState::Closed && rings == Rings::None
        } else {
            self.left
        };
        let good = match theirs {
            XenbusState::Unknown => self.left,
            XenbusState::Closed => closed_or_left,
            XenbusState::Initialising if disk && online == OnlineWish::Yes => {
                ours == XenbusState::InitWait
            }
            // Closing stands for a disk that cannot be opened.
            XenbusState::Initialising => {
                self.left
                    || matches!(ours, XenbusState::InitWait | XenbusState::Closing) && !disk
                    || online != OnlineWish::Yes
            }
            // A device that the toolstack is taking away is not connected any more; one that is
            // connected waits for its frontend.
            XenbusState::Initialised | XenbusState::Connected if online == OnlineWish::No => {
                matches!(
                    ours,
                    XenbusState::Connected | XenbusState::Closing | XenbusState::Closed
                )
            }
            XenbusState::Initialised | XenbusState::Connected
                if disk && !refused && ready && !(self.is_short && self.good_keys) =>
            {
                ours == XenbusState::Connected
            }
            // The disk may stop being ready for another connection while there is one.
            XenbusState::Initialised | XenbusState::Connected if ours == XenbusState::Connected => {
                rings == Rings::Served
            }
            XenbusState::Initialised | XenbusState::Connected => {
                rings == Rings::None
                    && matches!(
                        ours,
                        XenbusState::InitWait | XenbusState::Closing | XenbusState::Closed
                    )
            }
            _ => matches!(ours, XenbusState::Closing | XenbusState::Closed),
        };
        assert!(good || self.left, "came to rest as {self:?}");
    }
}
