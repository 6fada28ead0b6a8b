// SPDX-License-Identifier: MIT OR Apache-2.0
//! Numbers in headers and tables, and the messages about invalid ones.

use control::{Code, Failure};
use diskio::{Data, Errno};
use std::collections::BTreeMap;

/// The `N` bytes from `at` on; zeroes if they are not there.
pub(crate) fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let end = at.saturating_add(N);
    let found = bytes.get(at..end).and_then(|found| found.try_into().ok());
    found.unwrap_or([0; N])
}

/// Returns the number at `at`; `None` if the bytes end before.
pub(crate) fn be32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let found = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes(found.try_into().ok()?))
}

pub(crate) fn be64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let found = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_be_bytes(found.try_into().ok()?))
}

/// The number at `at`; 0 if it is not there.
pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    be32_at(bytes, at).unwrap_or(0)
}

pub(crate) fn be64(bytes: &[u8], at: usize) -> u64 {
    be64_at(bytes, at).unwrap_or(0)
}

pub(crate) fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array(bytes, at))
}

pub(crate) fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

pub(crate) fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

/// Puts `value` at `at`, if there is room for it.
pub(crate) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    let end = at.saturating_add(value.len());
    if let Some(place) = bytes.get_mut(at..end) {
        place.copy_from_slice(value);
    }
}

/// `value` up to the next multiple of `unit`, which is not 0.
pub(crate) fn round_up(value: u64, unit: u64) -> Option<u64> {
    value.checked_next_multiple_of(unit)
}

/// The image is refused.
pub(crate) fn refused(message: impl Into<String>) -> Failure {
    Failure::new(Code::Image, message)
}

/// Refuses files that were given along with an image that is one file.
pub(crate) fn no_extents(format: &str, count: usize) -> Result<(), Failure> {
    match count {
        0 => Ok(()),
        _ => Err(refused(format!(
            "the {format} is one file, and others were given: leave them out"
        ))),
    }
}

/// I/O on the image failed while `what` was tried.
pub(crate) fn failed(what: &str) -> impl FnOnce(Errno) -> Failure + '_ {
    move |error| Failure::system(what, &error.into())
}

/// Numbers for the statistics of a driver.
pub(crate) fn counters<const N: usize>(numbers: [(&str, u64); N]) -> BTreeMap<String, u64> {
    numbers
        .map(|(name, number)| (name.to_string(), number))
        .into()
}

/// Pieces of a range that lie in one unit each: the unit, where in it the piece begins, where in the
/// range that is, and how long it is.
pub(crate) fn pieces(
    offset: u64,
    len: u64,
    unit: u64,
) -> impl Iterator<Item = (u64, u64, u64, u64)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let left = len.checked_sub(at).filter(|left| *left > 0)?;
        let place = offset.checked_add(at)?;
        let (number, within) = (place / unit, place % unit);
        let count = left.min(unit - within);
        let from = at;
        at += count;
        Some((number, within, from, count))
    })
}

/// The part of a request's bytes that [`pieces`] names.
pub(crate) fn part(data: &Data, at: u64, len: u64) -> Data {
    // CAST: it is inside of the data.
    data.part(at as usize, len as usize)
}
