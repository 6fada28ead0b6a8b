// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Writing the backend's own directory, with few requests to xenstore and few keys.
//!
//! A domain may have ten transactions at once and a thousand keys, and a transaction fails where another one has
//! written what it read. So a transaction writes only the state, and reads only the keys that decide about it: a frontend
//! reads all other keys after it has seen the state. A key is not written while its absence means
//! its value.

use super::state::{publishing, OnlineWish, Publishing, XenbusState};
use super::text::without_nul;

/// Keys of the backend's directory that the backend writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PublishedKey {
    /// Segments of an indirect request at most.
    Segments,
    /// Queues of a frontend at most.
    Queues,
    /// Size of a ring at most, as a power of two of pages.
    Order,
    /// Flushes are carried out.
    Flush,
    /// Discards are carried out.
    Discard,
    /// Granularity of a discard, in bytes.
    DiscardGranularity,
    /// Offset of the first granule, in bytes.
    DiscardAlignment,
    /// A discard can be a secure one.
    DiscardSecure,
    /// Barriers are carried out.
    Barrier,
    /// Pages that the frontend keeps granted stay mapped.
    Persistent,
    /// Size in sectors of 512 bytes.
    Sectors,
    /// Flags of the disk.
    Info,
    /// Logical block size, in bytes.
    SectorSize,
    /// Physical block size, in bytes.
    PhysicalSectorSize,
}

impl PublishedKey {
    /// All keys.
    pub const ALL: [Self; 14] = [
        Self::Segments,
        Self::Queues,
        Self::Order,
        Self::Flush,
        Self::Discard,
        Self::DiscardGranularity,
        Self::DiscardAlignment,
        Self::DiscardSecure,
        Self::Barrier,
        Self::Persistent,
        Self::Sectors,
        Self::Info,
        Self::SectorSize,
        Self::PhysicalSectorSize,
    ];

    /// Name of the key.
    pub fn name(self) -> &'static core::ffi::CStr {
        match self {
            Self::Segments => c"feature-max-indirect-segments",
            Self::Queues => c"multi-queue-max-queues",
            Self::Order => c"max-ring-page-order",
            Self::Flush => c"feature-flush-cache",
            Self::Discard => c"feature-discard",
            Self::DiscardGranularity => c"discard-granularity",
            Self::DiscardAlignment => c"discard-alignment",
            Self::DiscardSecure => c"discard-secure",
            Self::Barrier => c"feature-barrier",
            Self::Persistent => c"feature-persistent",
            Self::Sectors => c"sectors",
            Self::Info => c"info",
            Self::SectorSize => c"sector-size",
            Self::PhysicalSectorSize => c"physical-sector-size",
        }
    }

    /// Value that the frontend takes if the key is absent (`blkif.h`); `None` if the backend has to write it in any case.
    /// The next driver of the device learns from [`PublishedKey::Persistent`] what the frontend knows.
    fn default(self, sector_size: Option<u64>) -> Option<u64> {
        match self {
            Self::Segments
            | Self::Flush
            | Self::Discard
            | Self::DiscardAlignment
            | Self::DiscardSecure
            | Self::Barrier
            | Self::Order => Some(0),
            Self::Queues => Some(1),
            Self::PhysicalSectorSize => sector_size,
            Self::DiscardGranularity
            | Self::Persistent
            | Self::Sectors
            | Self::Info
            | Self::SectorSize => None,
        }
    }
}

/// Values of some keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Values([Option<u64>; PublishedKey::ALL.len()]);

impl Values {
    /// Sets the value of a key.
    pub fn set(&mut self, key: PublishedKey, value: u64) {
        if let Some(place) = self.0.get_mut(key as usize) {
            *place = Some(value);
        }
    }

    /// Returns the value of a key.
    pub fn get(&self, key: PublishedKey) -> Option<u64> {
        self.0.get(key as usize).copied().flatten()
    }

    /// True if the frontend takes this value of the key for granted.
    fn is_default(&self, key: PublishedKey) -> bool {
        let value = self.get(key);
        value.is_some() && value == key.default(self.get(PublishedKey::SectorSize))
    }
}

/// Keys that are in the directory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Present(u32);

impl Present {
    /// Records the name of an existing key.
    pub fn note(&mut self, name: &[u8]) {
        for key in PublishedKey::ALL {
            if without_nul(key.name()) == Some(name) {
                self.0 |= Self::bit(key);
            }
        }
    }

    fn has(self, key: PublishedKey) -> bool {
        self.0 & Self::bit(key) != 0
    }

    fn bit(key: PublishedKey) -> u32 {
        1u32.wrapping_shl(key as u32)
    }
}

/// The backend's directory in xenstore. Each call is one request, to which xenstore answers.
pub trait BackendStore {
    /// Failure of a request. It says nothing about the key.
    type Error;
    /// An open transaction.
    type Transaction<'t>: Transaction<Error = Self::Error>;

    /// Lists the keys of the directory; `None` if there is no directory.
    ///
    /// # Errors
    ///
    /// Xenstore does not answer.
    fn present(&mut self) -> Result<Option<Present>, Self::Error>;

    /// Writes a key, in no transaction.
    ///
    /// # Errors
    ///
    /// The key is not written.
    fn write(&mut self, key: PublishedKey, value: u64) -> Result<(), Self::Error>;

    /// Does all that `body` does in one transaction, or nothing. `body` may be called several times.
    ///
    /// # Errors
    ///
    /// Nothing is done.
    fn atomically<T>(
        &mut self,
        body: impl FnMut(&Self::Transaction<'_>) -> Result<T, Self::Error>,
    ) -> Result<T, Self::Error>;
}

/// Requests of a transaction, in the backend's directory.
pub trait Transaction {
    /// Failure of a request.
    type Error;

    /// Reads the state; `None` if there is no such key.
    ///
    /// # Errors
    ///
    /// Xenstore does not answer.
    fn state(&self) -> Result<Option<XenbusState>, Self::Error>;

    /// Reads the wish of the toolstack.
    ///
    /// # Errors
    ///
    /// Xenstore does not answer.
    fn online(&self) -> Result<OnlineWish, Self::Error>;

    /// Writes the state.
    ///
    /// # Errors
    ///
    /// The state is not written.
    fn set_state(&self, state: XenbusState) -> Result<(), Self::Error>;

    /// Removes the directory, if it is not the toolstack's: it has no key `frontend`.
    ///
    /// # Errors
    ///
    /// Xenstore does not answer.
    fn remove_leftovers(&self) -> Result<(), Self::Error>;
}

/// Publishes `values` and then the state `now` after `before`, or does not publish the state. Nothing is published where
/// the directory is gone, and then the directory stays gone.
///
/// # Errors
///
/// Xenstore does not answer, or refuses a key. Xenstore may have stored some of the values.
pub fn publish<S: BackendStore>(
    store: &mut S,
    before: XenbusState,
    now: XenbusState,
    values: &Values,
) -> Result<Publishing, S::Error> {
    let writes = write_values(store, values)?;
    if writes == Writes::Gone {
        return Ok(Publishing::Gone);
    }
    store.atomically(|t| {
        let Some(there) = t.state()? else {
            // The toolstack may have removed the directory before the last write, which then has made it again.
            if writes == Writes::Some {
                t.remove_leftovers()?;
            }
            return Ok(Publishing::Gone);
        };
        // Only what is about to be served is held against it.
        let online = match now {
            XenbusState::Connected => t.online()?,
            _ => OnlineWish::Unsaid,
        };
        let result = publishing(before, there, online, now);
        if result == Publishing::Written {
            t.set_state(now)?;
        }
        Ok(result)
    })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Writes {
    /// There was nothing to write.
    None,
    /// The backend wrote keys.
    Some,
    /// There is no directory.
    Gone,
}

fn write_values<S: BackendStore>(store: &mut S, values: &Values) -> Result<Writes, S::Error> {
    let mut set = PublishedKey::ALL
        .into_iter()
        .filter_map(|key| Some((key, values.get(key)?)))
        .peekable();
    if set.peek().is_none() {
        return Ok(Writes::None);
    }
    let Some(present) = store.present()? else {
        return Ok(Writes::Gone);
    };
    let mut writes = Writes::None;
    for (key, value) in set {
        // A value of an earlier driver, or of an earlier connection, has to be overwritten.
        if values.is_default(key) && !present.has(key) {
            continue;
        }
        store.write(key, value)?;
        writes = Writes::Some;
    }
    Ok(writes)
}
