// SPDX-License-Identifier: MIT OR Apache-2.0
//! A bit for each unit of a disk, which is set if there may be something else than before.

/// The bits of a disk, or of its beginning: units behind them count as set.
#[derive(Debug)]
pub(crate) struct Bitmap {
    bytes: Vec<u8>,
    /// Bytes of the disk that a bit stands for.
    unit: u64,
}

impl Bitmap {
    /// Makes a bitmap of these bytes, each bit of which covers `unit` bytes of the disk.
    pub(crate) fn new(bytes: Vec<u8>, unit: u64) -> Self {
        Self { bytes, unit }
    }

    /// As many bits, and none of them is set.
    pub(crate) fn none_of(&self) -> Self {
        Self::new(vec![0; self.bytes.len()], self.unit)
    }

    /// Bytes of the disk that a bit stands for.
    pub(crate) fn unit(&self) -> u64 {
        self.unit
    }

    /// The bit of a unit is set.
    pub(crate) fn has(&self, number: u64) -> bool {
        let place = usize::try_from(number / 8).unwrap_or(usize::MAX);
        let byte = self.bytes.get(place);
        byte.is_none_or(|byte| byte & 1 << (number % 8) != 0)
    }

    /// Computes the change that sets the bits of all units that a range of the disk touches: the index of its first
    /// byte, and the new bytes. `None` if all of these bits are set already.
    pub(crate) fn with(&self, offset: u64, len: u64) -> Option<(usize, Vec<u8>)> {
        let end = offset.saturating_add(len.checked_sub(1)?);
        let (first, last) = (offset / self.unit, end / self.unit);
        let place = |unit: u64| usize::try_from(unit / 8).unwrap_or(usize::MAX);
        let behind = place(last).saturating_add(1).min(self.bytes.len());
        let from = place(first);
        let old = self.bytes.get(from..behind)?;
        // CAST: both are places in the map.
        let wanted = |index: usize| within((from + index) as u64, first, last);
        let mut pairs = old.iter().enumerate();
        if pairs.all(|(index, byte)| byte | wanted(index) == *byte) {
            return None;
        }
        let new = old.iter().enumerate();
        let new = new.map(|(index, byte)| byte | wanted(index)).collect();
        Some((from, new))
    }

    /// Makes the change that [`with`](Self::with) has returned.
    pub(crate) fn set(&mut self, from: usize, new: &[u8]) {
        let places = self.bytes.iter_mut().skip(from);
        places.zip(new).for_each(|(old, new)| *old = *new);
    }

    /// Sets the bits of all that a range of the disk touches.
    pub(crate) fn add(&mut self, offset: u64, len: u64) {
        if let Some((from, new)) = self.with(offset, len) {
            self.set(from, &new);
        }
    }
}

/// The bits of a byte of the map that stand for the units from `first` to `last`.
fn within(index: u64, first: u64, last: u64) -> u8 {
    let bit = |number: u64| (first..=last).contains(&(index * 8 + number));
    (0..8)
        .filter(|&number| bit(number))
        .fold(0, |byte, number| byte | 1 << number)
}

#[cfg(test)]
mod tests {
    use super::Bitmap;

    #[test]
    fn what_is_behind_the_end_is_set() {
        let mut bits = Bitmap::new(vec![0, 0], 512);
        bits.add(9 * 512 + 511, 2);
        bits.add(15 * 512, 9 << 20);
        bits.add(0, 0);
        let set: Vec<u64> = (0..20).filter(|&number| bits.has(number)).collect();
        assert_eq!(set, [9, 10, 15, 16, 17, 18, 19]);
        assert!(bits.has(u64::MAX));
        assert!(!bits.none_of().has(9) && bits.none_of().has(16));
    }
}
