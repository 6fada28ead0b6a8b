// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory that several disks have at once: a word before the driver names it.

use super::Target;
use crate::changed::{is_name, LONGEST_NAME};
use crate::{Driver, Failure};
use std::fmt;
use std::str::FromStr;

/// The name of memory, which is chosen by who makes the first disk with it: 1 to 64 letters, digits, dots, dashes and
/// underscores, without a dot in front.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemoryName(String);

impl FromStr for MemoryName {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Self, Failure> {
        match is_name(text) && !text.starts_with('.') {
            true => Ok(Self(text.into())),
            false => Err(Failure::invalid(format!(
                "name={text:?} is no name of memory: use 1 to {LONGEST_NAME} letters, digits, dots, dashes and \
                 underscores, and no dot in front"
            ))),
        }
    }
}

impl fmt::Display for MemoryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Target {
    /// The name of the memory: all disks of the host that say it show the same bytes. Nothing for memory of one disk.
    pub fn name(&self) -> Option<&MemoryName> {
        self.name.as_deref()
    }

    /// Returns this target in memory of this name.
    ///
    /// # Errors
    /// It is no memory.
    pub fn with_name(self, name: MemoryName) -> Result<Self, Failure> {
        if self.driver != Driver::Ram {
            return Err(Failure::invalid(format!(
                "{self} is no memory that several disks could have, which is ram:; remove name="
            )));
        }
        Ok(Self {
            name: Some(Box::new(name)),
            ..self
        })
    }

    /// Whether the guest's writes are in memory that no other disk has.
    pub fn has_own_memory(&self) -> bool {
        self.driver.has_memory() && self.name.is_none()
    }
}

#[cfg(test)]
mod tests {
    use crate::{MemoryName, Target};

    #[test]
    fn name_of_memory_is_said_before_the_driver() {
        for (text, written) in [
            ("name=scratch,ram:64M", "name=scratch,ram:67108864"),
            ("tap:name=a.b-c_1,tap:ram:512", "name=a.b-c_1,ram:512"),
            (
                "name=7,iops=500,shared=yes,ram:512",
                "bps=0,iops=500,shared=yes,name=7,ram:512",
            ),
        ] {
            let target: Target = text.parse().unwrap();
            assert_eq!(target.to_string(), written);
            assert_eq!(written.parse(), Ok(target.clone()));
            assert_eq!(Target::from_params(&format!("aio:{text}")), Ok(target));
        }
        let target: Target = "name=scratch,ram:64M".parse().unwrap();
        assert_eq!(target.name().unwrap().to_string(), "scratch");
        assert!(!target.has_own_memory());
        assert_ne!(target, "name=other,ram:64M".parse().unwrap());
        let private: Target = "ram:64M".parse().unwrap();
        assert_eq!(private.name(), None);
        assert!(private.has_own_memory());
        for (wrong, remedy) in [
            ("name=a,aio:/a", "remove name="),
            ("name=a,cow:/a", "remove name="),
            ("name=a,null:1M", "remove name="),
            ("name=a,nbd://host/a", "remove name="),
            ("name=a,name=a,ram:1M", "twice"),
            ("name=a,ram:", "has no size"),
            ("name=a", "ends after name="),
            ("lease=record,name=a,ram:1M", "remove lease=record"),
            ("direct=yes,name=a,ram:1M", "remove direct="),
            ("ram:1M,a", "has no size"),
        ] {
            let failure = wrong.parse::<Target>().unwrap_err();
            assert!(failure.message.contains(remedy), "{wrong}: {failure}");
        }
    }

    #[test]
    fn name_of_memory_is_no_path() {
        let longest = "a".repeat(64);
        for name in ["a", "A-z_0.9", "-", &longest] {
            assert_eq!(name.parse::<MemoryName>().unwrap().to_string(), name);
        }
        let longer = "a".repeat(65);
        for name in [
            "", ".", "..", ".a", "/", "a/b", "../a", "a b", "a\0", "a\n", "\u{e9}", &longer,
        ] {
            let failure = name.parse::<MemoryName>().unwrap_err();
            assert!(failure.message.contains("1 to 64 letters"), "{failure}");
            assert!(format!("name={name},ram:1M").parse::<Target>().is_err());
        }
    }
}
