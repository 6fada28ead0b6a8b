// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The checked reading of the frontend's directory.
//!
//! The guest writes every value there. A key that is absent has a default or is an error; a key that is there and
//! malformed is always an error that names it. The driver reads each key once.

use crate::proto::text::{parse_u32, Name};
use crate::ring::abi::{Protocol, MAX_RING_ORDER};

/// Grant references of the largest ring.
pub const MAX_RING_PAGES: usize = 1 << MAX_RING_ORDER;

/// Most bytes that are read of a value; every legal value is shorter.
pub const VALUE_SIZE: usize = 64;

/// The frontend's directory.
pub trait Directory {
    /// Reads a key into `value` and returns its length, which is more than `VALUE_SIZE` if the
    /// value is longer than that; `None` if the key is absent, or the frontend has made it unreadable for us.
    ///
    /// # Errors
    ///
    /// The backend cannot find out now whether the key is there. The caller must not take that for its absence, because
    /// a frontend whose `protocol` is overlooked is served in another layout.
    fn read(&self, key: &Name, value: &mut [u8; VALUE_SIZE]) -> Result<Option<usize>, Unread>;
}

/// Xenstore does not answer: no memory, or a shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unread;

/// Limits and features of this backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Largest number of queues, as advertised.
    pub max_queues: u32,
    /// Largest ring order, as advertised.
    pub max_ring_order: u8,
    /// The layout of a frontend that does not name its own.
    pub default_protocol: Protocol,
}

impl Offer {
    /// Returns this offer, raised to the `queues` and the `order` that the frontend was offered before if this backend
    /// can serve them, with at most `most_queues` queues.
    pub fn with_earlier(self, queues: Option<u32>, order: Option<u32>, most_queues: u32) -> Self {
        let queues = queues.unwrap_or(0).min(most_queues);
        let order = order.unwrap_or(0).min(MAX_RING_ORDER.into());
        Self {
            max_queues: self.max_queues.max(queues),
            // CAST: at most `MAX_RING_ORDER`.
            max_ring_order: self.max_ring_order.max(order as u8),
            ..self
        }
    }
}

/// Checked request of the frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrontendRequest {
    /// Layout of its slots.
    pub protocol: Protocol,
    /// Number of queues, 1 to the advertised maximum.
    pub queues: u32,
    /// Ring order, 0 to the advertised maximum.
    pub order: u8,
    /// The frontend grants persistently, and expects that its pages stay mapped.
    pub keeps_grants: bool,
    /// True if the references are in `ring-refN`, as announced by `ring-page-order`.
    numbered: bool,
}

/// The ring of one queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ring {
    /// Grant references of its pages; the first [`FrontendRequest::pages`] count.
    pub refs: [u32; MAX_RING_PAGES],
    /// The event channel's port in the frontend's domain.
    pub port: u32,
}

/// Fault of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyFault {
    /// The key is not there.
    Missing,
    /// The value has the wrong form.
    Malformed,
    /// The value is larger than advertised, or zero where it may not be.
    OutOfRange,
    /// Xenstore did not answer for the key.
    Unread,
}

/// A key that keeps the frontend from being connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyError {
    /// The key, below the frontend's directory.
    pub key: Name,
    /// Its fault.
    pub fault: KeyFault,
}

impl KeyError {
    /// Returns the description for the administrator.
    pub fn text(&self) -> &'static str {
        match self.fault {
            KeyFault::Missing => "is missing",
            KeyFault::Malformed => "is not a number or name this backend knows",
            KeyFault::OutOfRange => "is outside what this backend offers",
            KeyFault::Unread => {
                "cannot be read now: there is no memory, or xenstore does not answer"
            }
        }
    }
}

fn key(name: &str) -> Name {
    Name::new(format_args!("{name}"))
}

fn read(
    dir: &impl Directory,
    key: Name,
    value: &mut [u8; VALUE_SIZE],
) -> Result<Option<usize>, KeyError> {
    let fault = KeyFault::Unread;
    dir.read(&key, value)
        .map_err(|Unread| KeyError { key, fault })
}

fn read_u32(dir: &impl Directory, key: Name) -> Result<Option<u32>, KeyError> {
    let mut value = [0; VALUE_SIZE];
    let Some(len) = read(dir, key, &mut value)? else {
        return Ok(None);
    };
    let malformed = KeyError {
        key,
        fault: KeyFault::Malformed,
    };
    let text = value.get(..len).ok_or(malformed)?;
    parse_u32(text).ok_or(malformed).map(Some)
}

fn need_u32(dir: &impl Directory, key: Name) -> Result<u32, KeyError> {
    let missing = KeyError {
        key,
        fault: KeyFault::Missing,
    };
    read_u32(dir, key)?.ok_or(missing)
}

fn protocol(dir: &impl Directory, offer: &Offer) -> Result<Protocol, KeyError> {
    let key = key("protocol");
    let mut value = [0; VALUE_SIZE];
    let Some(len) = read(dir, key, &mut value)? else {
        return Ok(offer.default_protocol);
    };
    match value.get(..len) {
        Some(b"x86_64-abi") => Ok(Protocol::Abi64),
        Some(b"x86_32-abi") => Ok(Protocol::Abi32),
        Some(b"arm-abi") if cfg!(target_arch = "aarch64") => Ok(Protocol::Abi64),
        _ => Err(KeyError {
            key,
            fault: KeyFault::Malformed,
        }),
    }
}

impl FrontendRequest {
    /// Reads and checks the frontend's request.
    pub fn read(dir: &impl Directory, offer: &Offer) -> Result<Self, KeyError> {
        let protocol = protocol(dir, offer)?;
        let queues_key = key("multi-queue-num-queues");
        let queues = read_u32(dir, queues_key)?.unwrap_or(1);
        if queues == 0 || queues > offer.max_queues {
            return Err(KeyError {
                key: queues_key,
                fault: KeyFault::OutOfRange,
            });
        }
        let order_key = key("ring-page-order");
        let order = read_u32(dir, order_key)?;
        let max = offer.max_ring_order.min(MAX_RING_ORDER);
        if order.is_some_and(|order| order > u32::from(max)) {
            return Err(KeyError {
                key: order_key,
                fault: KeyFault::OutOfRange,
            });
        }
        let keeps_grants = read_u32(dir, key("feature-persistent"))?.unwrap_or(0) != 0;
        Ok(Self {
            protocol,
            keeps_grants,
            queues,
            // CAST: at most `MAX_RING_ORDER`.
            order: order.unwrap_or(0) as u8,
            numbered: order.is_some(),
        })
    }

    /// Returns the number of pages of each ring, 1 to 16.
    pub fn pages(&self) -> usize {
        1 << self.order.min(MAX_RING_ORDER)
    }

    /// Returns the number of slots of each ring.
    pub fn slots(&self) -> u32 {
        self.protocol
            .ring_size(self.order.min(MAX_RING_ORDER))
            .unwrap_or(0)
    }

    /// Reads and checks the ring of queue `queue`.
    ///
    /// `ring-page-order` alone decides whether `ring-ref` or `ring-refN` counts, because an earlier driver in the same
    /// domain may have left keys of the other kind. Order 0 with only `ring-ref` is accepted, because some frontends
    /// write that.
    pub fn ring(&self, dir: &impl Directory, queue: u32) -> Result<Ring, KeyError> {
        let named = |name: keys::RingKey| {
            if self.queues == 1 {
                Name::new(format_args!("{name}"))
            } else {
                Name::new(format_args!("queue-{queue}/{name}"))
            }
        };
        let mut refs = [0; MAX_RING_PAGES];
        for (index, gref) in refs.iter_mut().enumerate().take(self.pages()) {
            let single = named(keys::RingKey::RingRef);
            *gref = if !self.numbered {
                need_u32(dir, single)?
            } else {
                let numbered = named(keys::RingKey::RingRefN(index));
                match read_u32(dir, numbered)? {
                    Some(gref) => gref,
                    None if self.order == 0 => need_u32(dir, single)?,
                    None => {
                        return Err(KeyError {
                            key: numbered,
                            fault: KeyFault::Missing,
                        })
                    }
                }
            };
        }
        let port_key = named(keys::RingKey::EventChannel);
        let port = need_u32(dir, port_key)?;
        if port == 0 {
            return Err(KeyError {
                key: port_key,
                fault: KeyFault::OutOfRange,
            });
        }
        Ok(Ring { refs, port })
    }
}

/// Names of the keys of one ring.
mod keys {
    use core::fmt;

    /// A key of one ring.
    #[derive(Clone, Copy)]
    pub(super) enum RingKey {
        RingRef,
        RingRefN(usize),
        EventChannel,
    }

    impl fmt::Display for RingKey {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            match self {
                RingKey::RingRef => f.write_str("ring-ref"),
                RingKey::RingRefN(index) => write!(f, "ring-ref{index}"),
                RingKey::EventChannel => f.write_str("event-channel"),
            }
        }
    }
}
