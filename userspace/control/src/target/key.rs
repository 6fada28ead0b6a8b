// SPDX-License-Identifier: MIT OR Apache-2.0
//! Encrypted images: a word before the driver names the file with the key.

use super::Target;
use crate::Failure;
use std::path::{Path, PathBuf};

impl Target {
    /// Returns the absolute path of the file with the key of the image; nothing if the target names none.
    pub fn key(&self) -> Option<&Path> {
        self.key.as_deref()
    }

    /// Returns this target with a key.
    ///
    /// # Errors
    /// No image of this driver has one, or the kernel was to serve it, which knows no keys.
    pub fn with_key(self, key: PathBuf) -> Result<Self, Failure> {
        if !self.driver.may_have_key() {
            return Err(Failure::invalid(format!(
                "{self} is no image that could be encrypted, which is luks: and qcow2:; remove key="
            )));
        }
        if self.direct == Some(true) {
            return Err(Failure::invalid(format!(
                "{self} is to be encrypted, and the kernel, which direct=yes has serve it, knows no keys: leave \
                 direct= or key= away"
            )));
        }
        Ok(Self {
            key: Some(key.into_boxed_path()),
            ..self
        })
    }

    /// The kernel may do I/O on the image without its process: never on one that is encrypted.
    pub fn may_map(&self) -> bool {
        self.driver.may_map() && self.key.is_none()
    }
}

#[cfg(test)]
mod tests {
    use crate::{Driver, Target};
    use std::path::Path;

    #[test]
    fn a_key_is_said_before_the_driver() {
        for text in [
            "key=/etc/xentap/a.key,luks:/srv/a.img",
            "direct=no,key=/k,qcow2:/srv/a.qcow2",
            "lease=record,cache=1048576,key=/k=1,bps=1048576,iops=0,qcow2:/srv/a,b",
        ] {
            let target: Target = text.parse().unwrap();
            assert_eq!(target.to_string(), text);
            assert_eq!(Target::from_params(&format!("aio:{text}")), Ok(target));
        }
        let target: Target = "tap:key=/k,tap:luks:/a".parse().unwrap();
        assert_eq!(
            (target.driver(), target.key()),
            (Driver::Luks, Some(Path::new("/k")))
        );
        assert_ne!(target, "key=/other,luks:/a".parse().unwrap());
        assert_eq!("luks:/a".parse::<Target>().unwrap().key(), None);
        for (wrong, remedy) in [
            ("key=/k,aio:/a", "remove key="),
            ("key=/k,vhd:/a", "luks: and qcow2:"),
            ("key=/k,cow:qcow2:/a", "remove key="),
            ("key=/k,nbd://host/a", "remove key="),
            ("key=/k,direct=yes,qcow2:/a", "knows no keys"),
            ("direct=yes,key=/k,qcow2:/a", "knows no keys"),
            ("direct=no,key=/k,luks:/a", "remove direct="),
            ("key=k,luks:/a", "absolute path"),
            ("key=,luks:/a", "absolute path"),
            ("key=/k\n,luks:/a", "absolute path"),
            ("key=/k,key=/k,luks:/a", "twice"),
            ("key=/k", "ends after key="),
            ("cow:luks:/a", "encrypted"),
        ] {
            let failure = wrong.parse::<Target>().unwrap_err();
            assert!(failure.message.contains(remedy), "{wrong}: {failure}");
        }
    }

    #[test]
    fn the_kernel_is_given_nothing_that_is_encrypted() {
        for (text, may) in [
            ("qcow2:/a", true),
            ("key=/k,qcow2:/a", false),
            ("key=/k,luks:/a", false),
            ("luks:/a", false),
        ] {
            let target: Target = text.parse().unwrap();
            assert_eq!(target.may_map(), may, "{text}");
        }
    }
}
