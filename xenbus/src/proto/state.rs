// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The XenBus states, and a backend's reactions to them.
//!
//! The machine is level-triggered: it gets the present view and returns the next action. The driver carries that out,
//! reads the view again, and continues until no action is left. So a missed or a merged watch event costs nothing, and
//! a frontend that toggles its state gains nothing.

/// `XenbusState`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum XenbusState {
    /// The node is missing or unreadable.
    Unknown = 0,
    /// The toolstack made the directory.
    Initialising = 1,
    /// The backend waits for the frontend's details and for the physical device.
    InitWait = 2,
    /// The frontend has published its details.
    Initialised = 3,
    /// Requests flow.
    Connected = 4,
    /// The end is closing.
    Closing = 5,
    /// The end has closed.
    Closed = 6,
    /// Not used by block devices.
    Reconfiguring = 7,
    /// Not used by block devices.
    Reconfigured = 8,
}

impl XenbusState {
    /// Every state, in order of its number.
    pub const ALL: [XenbusState; 9] = [
        XenbusState::Unknown,
        XenbusState::Initialising,
        XenbusState::InitWait,
        XenbusState::Initialised,
        XenbusState::Connected,
        XenbusState::Closing,
        XenbusState::Closed,
        XenbusState::Reconfiguring,
        XenbusState::Reconfigured,
    ];

    /// Returns the state of a number; any number that is no state counts as [`XenbusState::Unknown`].
    pub fn from_number(number: u32) -> Self {
        usize::try_from(number)
            .ok()
            .and_then(|index| Self::ALL.get(index).copied())
            .unwrap_or(XenbusState::Unknown)
    }

    /// Returns the number on the wire.
    pub fn number(self) -> u32 {
        self as u32
    }
}

/// The rings of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rings {
    /// No ring is mapped.
    None,
    /// The rings are mapped and served.
    Served,
    /// Requests that were taken from the rings are being finished; the rings are given back after that.
    Draining,
}

/// The way in which the service of rings ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ending {
    /// The frontend waits for answers: it gets an answer for each request that was taken, without a time limit.
    Answered,
    /// The frontend has given its requests up: it gets only answers that the disk has soon.
    Soon,
    /// The frontend is gone: the rings are given back at once.
    Now,
}

/// Returns how to give back the rings of a frontend in this state; `unbound` if the device has no driver any more.
///
/// Rings with requests that are not answered can never be served again: a backend that attaches to them begins at the
/// first slot without an answer, and answers that came out of order have taken the slots of requests that still wait.
/// A frontend that may continue with its rings therefore has all answers before the backend leaves it.
pub fn ending(theirs: XenbusState, unbound: bool) -> Ending {
    match theirs {
        XenbusState::Initialised | XenbusState::Connected | XenbusState::Closing => {
            Ending::Answered
        }
        _ if unbound => Ending::Now,
        _ => Ending::Soon,
    }
}

/// Wish of the toolstack to keep a device (the key `online`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OnlineWish {
    /// The device stays.
    Yes,
    /// The toolstack is taking the device away: the driver connects no frontend any more.
    No,
    /// The key is missing, or no number. The C driver then still connects, and releases the device once its frontend
    /// has closed.
    Unsaid,
}

impl OnlineWish {
    /// Returns the meaning of a key of this number.
    pub fn of(number: Option<u32>) -> Self {
        match number {
            Some(0) => OnlineWish::No,
            Some(_) => OnlineWish::Yes,
            None => OnlineWish::Unsaid,
        }
    }

    /// Every answer.
    pub const ALL: [OnlineWish; 3] = [OnlineWish::Yes, OnlineWish::No, OnlineWish::Unsaid];
}

/// Present state of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// The state that this backend published last.
    pub ours: XenbusState,
    /// The state that the frontend's directory holds now.
    pub theirs: XenbusState,
    /// Wish of the toolstack.
    pub online: OnlineWish,
    /// The disk is open.
    pub disk: bool,
    /// The disk can be connected to: its provider has described it, and no queue or request of an earlier connection is
    /// left.
    pub ready: bool,
    /// Its rings.
    pub rings: Rings,
    /// The rings in the frontend's directory were refused, and the frontend has not acted since.
    pub refused: bool,
}

/// Next action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing; wait for a change.
    Wait,
    /// Publish the backend's offer and state InitWait.
    Offer,
    /// Map the frontend's rings, publish the disk and state Connected.
    Connect,
    /// Publish state Closing; the rings are still served.
    StartClosing,
    /// Take no more requests and give the rings back when all are answered; the state stays.
    Disconnect,
    /// Publish state Closed; the device stays for a reconnect.
    Close,
    /// Release the disk, publish state Closed, and release the device.
    Leave,
    /// The frontend shows a state that no frontend may have: report it and close.
    Refuse,
}

/// Returns the next action for a device in this state.
///
/// A driver that carries out each action and calls this again with a new view always reaches [`Action::Wait`] or the
/// end of the device, so it may loop. Rules (blkif.h and what frontends in use expect):
/// - Initialised and Connected are the same request to connect; some frontends skip the first.
/// - Connected is visible only while rings are served: before they are given back, and before
///   Closed, a frontend sees Closing.
/// - Rings are given back before Closed can be seen, the disk before it if the device
///   goes for good.
/// - A frontend in Initialising starts again, whatever it did before: if it has not closed, the backend closes first,
///   and the frontend may have gone through Closed faster than the driver saw.
pub fn step(view: &View) -> Action {
    if view.rings == Rings::Draining {
        return Action::Wait;
    }
    let served = view.rings == Rings::Served;
    let closing = matches!(view.ours, XenbusState::Closing | XenbusState::Closed);
    match view.theirs {
        XenbusState::Unknown if served && !closing => Action::StartClosing,
        XenbusState::Unknown if served => Action::Disconnect,
        XenbusState::Unknown => Action::Leave,
        XenbusState::Initialising => match view.ours {
            XenbusState::Initialising | XenbusState::Unknown => Action::Offer,
            XenbusState::InitWait if !served => Action::Wait,
            _ => start_again(view),
        },
        XenbusState::Initialised | XenbusState::Connected => match view.ours {
            XenbusState::Connected if served => Action::Wait,
            // The toolstack is taking the device away: the frontend must see us close.
            _ if view.online == OnlineWish::No && closing => Action::Wait,
            _ if view.online == OnlineWish::No => Action::StartClosing,
            XenbusState::Initialising | XenbusState::Unknown => Action::Offer,
            _ if view.refused || !view.disk => Action::Wait,
            _ if served => Action::Disconnect,
            _ if !view.ready => Action::Wait,
            _ => Action::Connect,
        },
        XenbusState::Closing if closing => Action::Wait,
        XenbusState::Closing => Action::StartClosing,
        XenbusState::Closed if !closing => Action::StartClosing,
        XenbusState::Closed if served => Action::Disconnect,
        XenbusState::Closed if view.online != OnlineWish::Yes => Action::Leave,
        XenbusState::Closed if view.ours == XenbusState::Closing => Action::Close,
        XenbusState::Closed => Action::Wait,
        XenbusState::InitWait | XenbusState::Reconfiguring | XenbusState::Reconfigured
            if closing =>
        {
            Action::Wait
        }
        XenbusState::InitWait | XenbusState::Reconfiguring | XenbusState::Reconfigured => {
            Action::Refuse
        }
    }
}

/// Returns the next action for a device in the state `view`, except for [`View::online`], which is read only if it
/// matters, because reading it from xenstore costs more than all the rest.
///
/// # Errors
///
/// The error of `online`, if it was called.
pub fn step_asking<E>(
    view: View,
    online: impl FnOnce() -> Result<OnlineWish, E>,
) -> Result<Action, E> {
    let with = |online| step(&View { online, ..view });
    let action = with(OnlineWish::Yes);
    if OnlineWish::ALL
        .into_iter()
        .all(|other| with(other) == action)
    {
        return Ok(action);
    }
    online().map(with)
}

/// Result of an attempt to publish a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Publishing {
    /// The state is stored.
    Written,
    /// The directory belongs to a new device already.
    Gone,
    /// The toolstack is taking the device away and has written our state, which is now the one in the directory.
    TakenAway,
}

/// Returns whether `now` may replace `before`, the state that this backend published last, in a directory that holds
/// `there`. Call it in the transaction that stores `now`.
///
/// A toolstack that takes a device away writes Closing and `online` in one transaction. The frontend would never see
/// that if the backend overwrote it.
pub fn publishing(
    before: XenbusState,
    there: XenbusState,
    online: OnlineWish,
    now: XenbusState,
) -> Publishing {
    let closes = |state| matches!(state, XenbusState::Closing | XenbusState::Closed);
    match (there, now) {
        (XenbusState::Initialising, _) if before != XenbusState::Initialising => Publishing::Gone,
        (XenbusState::Closing, _) if !closes(before) && !closes(now) => Publishing::TakenAway,
        // Closing and Closed may be our own.
        (_, XenbusState::Connected) if online == OnlineWish::No => Publishing::TakenAway,
        _ => Publishing::Written,
    }
}

/// Returns the action for a frontend in Initialising while this backend is past InitWait: its earlier connection is
/// closed.
fn start_again(view: &View) -> Action {
    match view.ours {
        XenbusState::Closing | XenbusState::Closed if view.rings == Rings::Served => {
            Action::Disconnect
        }
        XenbusState::Closing | XenbusState::Closed if view.online != OnlineWish::Yes => {
            Action::Leave
        }
        // Closing may stand for a disk that cannot be opened. The toolstack must see that until there is one; a
        // frontend that writes its details after that is connected nevertheless.
        XenbusState::Closing if !view.disk => Action::Wait,
        XenbusState::Closing => Action::Close,
        XenbusState::Closed => Action::Offer,
        _ => Action::StartClosing,
    }
}
