// SPDX-License-Identifier: MIT OR Apache-2.0
//! Rules for sharing an image, which are those of Xen's `block` script, for tap disks.
//!
//! | wanted | refused if the image is |
//! |---|---|
//! | `r` | mounted read-write in dom0, or written (`w`) by another virtual machine |
//! | `w` | mounted in dom0, or used in any way by another virtual machine |
//! | `r!`, `w!` | never: whoever says so coordinates the users himself |
//!
//! A virtual machine may use an image twice, because a guest and the stub domain that runs its devices both do. A
//! device in use by dom0's kernel (a swap area, a part of an array or of a volume group, a device that is claimed in
//! any other way) is refused but for `r!` and `w!`. Not seen: a guest's partition beside another guest's whole disk,
//! other hosts.

use crate::image::Identity;
use control::supervisor::Mode;
use std::collections::BTreeSet;

/// The virtual machines that a user of an image belongs to: its own and, of a stub domain, the one
/// that it serves. Empty for dom0's own tools.
pub type MachineSet = BTreeSet<String>;

/// Someone who uses an image.
#[derive(Clone, Debug)]
pub struct ImageUser {
    /// Name of the user, for a message.
    pub name: String,
    /// Images that it uses; a loop device counts as the file below it too.
    pub images: Vec<Identity>,
    /// Mode in which it uses them.
    pub mode: Mode,
    /// By which domain.
    pub domain: Option<String>,
    /// By whom.
    pub machines: MachineSet,
}

/// A file system that is mounted from a block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceMount {
    /// The block device's number.
    pub rdev: u64,
    /// Path of the mount.
    pub place: String,
    /// The mount is writable.
    pub write: bool,
}

/// Decides whether an image may be used.
///
/// `images` are all things that the image is: itself, and loop devices over it.
///
/// # Errors
/// Says who uses it already, and how to use it all the same.
pub fn check(
    images: &[Identity],
    mode: Mode,
    machines: &MachineSet,
    others: &[ImageUser],
    mounts: &[DeviceMount],
) -> Result<(), String> {
    if mode.is_shared() {
        return Ok(());
    }
    let writes = !mode.is_read_only();
    let as_what = if writes { "written" } else { "read" };
    let mounted = mounts
        .iter()
        .filter(|mount| writes || mount.write)
        .find(|mount| images.contains(&Identity::Device { rdev: mount.rdev }));
    if let Some(mount) = mounted {
        return Err(format!(
            "it is mounted at {} in dom0 and cannot be {as_what} by a guest: unmount it, or use the mode {mode}!",
            mount.place
        ));
    }
    let conflict = others
        .iter()
        .filter(|user| user.images.iter().any(|image| images.contains(image)))
        // As in Xen's script: a reader stands who writes under his own responsibility.
        .filter(|user| writes || user.mode == Mode::Write)
        .find(|user| user.machines.is_disjoint(machines));
    match conflict {
        None => Ok(()),
        Some(user) => Err(format!(
            "it is in use by {} (mode {}) and cannot be {as_what} by another guest: detach it there, or use the mode {mode}! if both know of each other",
            user.name, user.mode
        )),
    }
}

/// Decides whether an image may be used that dom0's kernel itself uses, other than by a mount.
///
/// # Errors
/// Says what for, and how to use it all the same.
pub fn check_claims(mode: Mode, claims: &[String]) -> Result<(), String> {
    match claims.first() {
        Some(claim) if !mode.is_shared() => Err(format!(
            "{claim} in dom0: take it out of that first, or use the mode {mode}!"
        )),
        _ => Ok(()),
    }
}

/// Checks a device that the kernel has claimed for a user that no other check shows.
///
/// # Errors
/// The device is claimed, and the mode is not shared.
pub fn check_promised(mode: Mode, promised: bool) -> Result<(), String> {
    if promised && !mode.is_shared() {
        return Err(format!(
            "something in dom0 has claimed it for itself (see lsblk and fuser): end that, or use the mode {mode}!"
        ));
    }
    Ok(())
}

/// Some user or mount is known that uses the image.
#[must_use]
pub fn is_used(images: &[Identity], others: &[ImageUser], mounts: &[DeviceMount]) -> bool {
    let mounted = |mount: &DeviceMount| images.contains(&Identity::Device { rdev: mount.rdev });
    mounts.iter().any(mounted)
        || others
            .iter()
            .any(|user| user.images.iter().any(|image| images.contains(image)))
}

/// Other permitted users of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OtherUsers {
    /// None, or all of them read.
    Nobody,
    /// A migrating guest: another domain has the image for this virtual machine, and one of the two will resume. Each
    /// locks the image when it has its turn.
    Moving,
    /// Another user writes it or will see it written, so an exclusive lock would keep one of the two out.
    Shared,
}

/// Finds out who uses an image beside a domain of these machines.
#[must_use]
pub fn beside(
    images: &[Identity],
    mode: Mode,
    domain: Option<&str>,
    machines: &MachineSet,
    others: &[ImageUser],
) -> OtherUsers {
    let at_once = |user: &&ImageUser| {
        user.images.iter().any(|image| images.contains(image))
            && (!mode.is_read_only() || !user.mode.is_read_only())
    };
    // A stub domain belongs to a machine of its own as well.
    let moves = |user: &ImageUser| {
        !machines.is_empty()
            && user.machines == *machines
            && user.domain.as_deref() != domain
            && !user.mode.is_shared()
            && !mode.is_shared()
    };
    let mut found = OtherUsers::Nobody;
    for user in others.iter().filter(at_once) {
        match moves(user) {
            true if found != OtherUsers::Shared => found = OtherUsers::Moving,
            true => {}
            false => found = OtherUsers::Shared,
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{
        beside, check, check_claims, check_promised, DeviceMount, Identity, ImageUser, MachineSet,
        Mode, OtherUsers,
    };

    const IMAGE: Identity = Identity::File { dev: 1, ino: 7 };
    const DEVICE: Identity = Identity::Device { rdev: 0x0701 };

    fn mode(text: &str) -> Mode {
        text.parse().expect("a mode")
    }

    fn machines(names: &[&str]) -> MachineSet {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    fn user(text: &str, vm: &[&str]) -> ImageUser {
        ImageUser {
            name: "guest 3".into(),
            images: vec![IMAGE],
            mode: mode(text),
            domain: Some("3".into()),
            machines: machines(vm),
        }
    }

    /// Tests all pairs of a requested mode and an existing one, between two machines.
    #[test]
    fn table_of_modes() {
        // (wanted, there, allowed)
        let table = [
            ("r", "r", true),
            ("r", "w", false),
            ("r", "w!", true),
            ("r", "r!", true),
            ("w", "r", false),
            ("w", "w", false),
            ("w", "r!", false),
            ("w", "w!", false),
            ("r!", "w", true),
            ("w!", "w", true),
            ("w!", "r", true),
            ("w!", "w!", true),
        ];
        for (wanted, there, allowed) in table {
            let others = [user(there, &["/vm/b"])];
            let result = check(&[IMAGE], mode(wanted), &machines(&["/vm/a"]), &others, &[]);
            assert_eq!(
                result.is_ok(),
                allowed,
                "{wanted} beside {there}: {result:?}"
            );
        }
    }

    #[test]
    fn another_image_is_no_conflict() {
        let other = Identity::File { dev: 1, ino: 8 };
        let others = [user("w", &["/vm/b"])];
        assert!(check(&[other], mode("w"), &machines(&["/vm/a"]), &others, &[]).is_ok());
    }

    #[test]
    fn a_machine_may_use_its_image_twice() {
        let others = [user("w", &["/vm/stub", "/vm/a"])];
        assert!(check(&[IMAGE], mode("w"), &machines(&["/vm/a"]), &others, &[]).is_ok());
        // A user without a machine shares its machine with no other user.
        let others = [user("w", &[])];
        assert!(check(&[IMAGE], mode("w"), &machines(&[]), &others, &[]).is_err());
    }

    #[test]
    fn readers_lock_together_and_writers_do_not() {
        for (wanted, there, shared) in [
            ("r", "r", false),
            ("r", "w", true),
            ("w", "r", true),
            ("w", "w", true),
        ] {
            let (others, vm) = ([user(there, &["/vm/a"])], machines(&["/vm/a"]));
            let expected = match shared {
                true => OtherUsers::Shared,
                false => OtherUsers::Nobody,
            };
            let found = |image| beside(&[image], mode(wanted), Some("3"), &vm, &others);
            assert_eq!(found(IMAGE), expected);
            assert_eq!(found(DEVICE), OtherUsers::Nobody);
        }
    }

    /// The virtual machine of another domain is one that migrates; a stub domain's is not.
    #[test]
    fn who_moves_is_told_from_who_shares() {
        let found = |wanted, there, domain, vm: &[&str]| {
            let others = [user(there, &["/vm/a"])];
            beside(&[IMAGE], mode(wanted), Some(domain), &machines(vm), &others)
        };
        assert_eq!(found("w", "w", "4", &["/vm/a"]), OtherUsers::Moving);
        assert_eq!(found("r", "w", "4", &["/vm/a"]), OtherUsers::Moving);
        assert_eq!(found("r", "r", "4", &["/vm/a"]), OtherUsers::Nobody);
        assert_eq!(found("w!", "w!", "4", &["/vm/a"]), OtherUsers::Shared);
        assert_eq!(
            found("w", "w", "4", &["/vm/a", "/vm/stub"]),
            OtherUsers::Shared
        );
        assert_eq!(found("w", "w", "3", &["/vm/a"]), OtherUsers::Shared);
        let both = [user("w", &["/vm/a"]), user("w", &["/vm/a", "/vm/stub"])];
        let vm = machines(&["/vm/a"]);
        assert_eq!(
            beside(&[IMAGE], mode("w"), Some("4"), &vm, &both),
            OtherUsers::Shared
        );
    }

    #[test]
    fn a_mount_is_a_user() {
        let mount = |write| {
            [DeviceMount {
                rdev: 0x0701,
                place: "/mnt".into(),
                write,
            }]
        };
        let both = [IMAGE, DEVICE];
        let none = machines(&[]);
        assert!(check(&both, mode("w"), &none, &[], &mount(false)).is_err());
        assert!(check(&both, mode("w"), &none, &[], &mount(true)).is_err());
        assert!(check(&both, mode("r"), &none, &[], &mount(false)).is_ok());
        assert!(check(&both, mode("r"), &none, &[], &mount(true)).is_err());
        assert!(check(&both, mode("w!"), &none, &[], &mount(true)).is_ok());
        assert!(check(&[IMAGE], mode("w"), &none, &[], &mount(true)).is_ok());
    }

    #[test]
    fn what_the_kernel_has_for_itself_is_not_free() {
        let claims = ["it is a swap area".to_owned()];
        for wanted in ["r", "w"] {
            let error = check_claims(mode(wanted), &claims).expect_err("claimed");
            assert!(error.contains("swap") && error.contains('!'), "{error}");
            assert!(check_promised(mode(wanted), true).is_err());
            assert!(check_promised(mode(wanted), false).is_ok());
            assert!(check_claims(mode(wanted), &[]).is_ok());
        }
        assert!(check_claims(mode("w!"), &claims).is_ok());
        assert!(check_promised(mode("r!"), true).is_ok());
    }

    #[test]
    fn message_names_the_user_and_the_remedy() {
        let others = [user("w", &["/vm/b"])];
        let error = check(&[IMAGE], mode("w"), &machines(&[]), &others, &[]).expect_err("conflict");
        assert!(error.contains("guest 3") && error.contains("w!"), "{error}");
    }
}
