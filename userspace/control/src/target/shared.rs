// SPDX-License-Identifier: MIT OR Apache-2.0
//! Disks that have what others have, too. xl knows the modes `r` and `w` and refuses any other word, so the `!` of `r!`
//! and `w!` is a word of the target.

use super::Target;
use crate::supervisor::Mode;

impl Target {
    /// Whether other disks may have it at once (`shared=yes`).
    pub fn is_shared(&self) -> bool {
        self.shared
    }

    /// Takes the `shared=` word out of the target, because it belongs to the disk and not to the image. Returns the
    /// mode with that.
    pub fn take_shared(&mut self, mode: Mode) -> Mode {
        match (std::mem::take(&mut self.shared), mode) {
            (true, Mode::Read) => Mode::ReadShared,
            (true, Mode::Write) => Mode::WriteShared,
            (_, mode) => mode,
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::supervisor::Mode;
    use crate::Target;

    #[test]
    fn that_others_may_have_it_is_said_before_the_driver() {
        let plain: Target = "aio:/srv/a".parse().unwrap();
        for (text, mode, all) in [
            ("shared=yes,aio:/srv/a", Mode::Write, Mode::WriteShared),
            (
                "shared=yes,aio:/srv/a",
                Mode::WriteShared,
                Mode::WriteShared,
            ),
            ("shared=yes,aio:/srv/a", Mode::Read, Mode::ReadShared),
            ("shared=yes,aio:/srv/a", Mode::ReadShared, Mode::ReadShared),
            ("aio:/srv/a", Mode::Read, Mode::Read),
            ("aio:/srv/a", Mode::WriteShared, Mode::WriteShared),
        ] {
            let mut target: Target = text.parse().unwrap();
            assert_eq!(target.to_string(), text);
            assert_eq!(
                Target::from_params(&format!("aio:{text}")),
                Ok(target.clone())
            );
            assert_eq!(target.take_shared(mode), all, "{text} and {mode}");
            assert_eq!(target, plain);
        }
        for wrong in [
            "shared=,aio:/a",
            "shared=no,aio:/a",
            "shared=yes,shared=yes,aio:/a",
            "shared=yes",
        ] {
            assert!(wrong.parse::<Target>().is_err(), "{wrong}");
        }
    }
}
