// SPDX-License-Identifier: GPL-2.0-only

//! Interfaces of Xen for a backend: its bus, xenstore, grants, event channels, mapped rings.

pub(crate) mod claims;
pub(crate) mod device;
pub(crate) mod driver;
pub(crate) mod evtchn;
pub(crate) mod grant;
pub(crate) mod guest_mapping;
pub(crate) mod ring_map;
pub(crate) mod store;
mod trial;
pub(crate) mod watch;
