// SPDX-License-Identifier: MIT OR Apache-2.0
//! Size of a disk's logical sectors, where it is to be another one than the image's or its storage's own.

use super::Target;
use crate::Failure;

/// Bytes that the logical sectors of a disk may have: those of all partition tables there are.
const SIZES: [u32; 2] = [512, 4096];

impl Target {
    /// Returns the bytes of a logical sector that the guest is to see; nothing if the image or its storage decides.
    pub fn sector_size(&self) -> Option<u32> {
        self.sector
    }

    /// Returns this target with logical sectors of 512 or 4096 bytes.
    ///
    /// # Errors
    /// They have another size.
    pub fn with_sector_size(self, size: u32) -> Result<Self, Failure> {
        match SIZES.contains(&size) {
            true => Ok(Self {
                sector: Some(size),
                ..self
            }),
            false => Err(Failure::invalid(format!(
                "sector-size={size}: a guest's sectors have 512 or 4096 bytes: write sector-size=512 or \
                 sector-size=4096, or remove it, and the image or its storage decides"
            ))),
        }
    }
}

/// Parses the bytes of a logical sector.
pub(super) fn sector_size(text: &str) -> Result<u32, Failure> {
    text.parse().map_err(|_| {
        Failure::invalid(format!(
            "sector-size={text}: write a number of bytes, which is 512 or 4096"
        ))
    })
}

#[cfg(test)]
mod tests {
    use crate::Target;

    #[test]
    fn the_size_of_sectors_is_said_before_the_driver() {
        for (text, size) in [
            ("sector-size=512,aio:/dev/vg/a", Some(512)),
            ("direct=no,sector-size=4096,vhd:/srv/a,b", Some(4096)),
            ("sector-size=4096,ram:1048576", Some(4096)),
            ("aio:/dev/vg/a", None),
        ] {
            let target: Target = text.parse().unwrap();
            assert_eq!(target.to_string(), text);
            assert_eq!(target.sector_size(), size, "{text}");
        }
        for (wrong, remedy) in [
            ("sector-size=520,aio:/a", "512 or 4096"),
            ("sector-size=4K,aio:/a", "512 or 4096"),
            ("sector-size=512,sector-size=512,aio:/a", "twice"),
            ("sector-size=512", "ends after sector-size="),
            ("sectorsize=512,aio:/a", "do you mean sector-size=?"),
        ] {
            let failure = wrong.parse::<Target>().unwrap_err();
            assert!(failure.message.contains(remedy), "{wrong}: {failure}");
        }
    }
}
