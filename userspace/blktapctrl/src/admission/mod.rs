// SPDX-License-Identifier: MIT OR Apache-2.0
//! Decides which disk gets an image.
//!
//! Slow checks come first: file systems, devices, xenstore. The decision itself does not wait, and an image that it
//! grants counts as used before the next request is decided: so no request waits for another, and two concurrent ones
//! do not both get the image.

mod backends;
mod claims;
mod files;
mod loops;
mod mounts;
pub mod sharing;
mod views;

use crate::blocking_io::{blocking_io, LIMIT};
use crate::disk::Disk;
use crate::image::{Identity, Image};
use crate::overlay;
use crate::record::{DiskPart, PartRole};
use crate::registry::Registry;
use crate::store::{directory, relative};
use control::supervisor::{Check, Mode};
use control::tapdisk::Open;
use control::{Code, Failure, LeaseKind, SaidRules};
pub(crate) use files::check_files;
use mounts::MountTable;
pub(crate) use sharing::OtherUsers;
use sharing::{DeviceMount, ImageUser, MachineSet};
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use views::KernelViews;

/// The users of an image that were found outside of the supervisor.
struct FoundUsers {
    /// All that the image is: itself, loop devices on it, the file below it.
    images: Vec<Identity>,
    /// Other backends.
    backends: Vec<ImageUser>,
    /// The virtual machines of who asks.
    machines: MachineSet,
    mounts: Vec<DeviceMount>,
    /// Other uses of it by dom0's kernel.
    claims: Vec<String>,
    /// dom0's kernel has an exclusive claim on it, of an unknown holder.
    promised: bool,
}

/// Decides which disks may use an image.
pub struct Admission {
    registry: Rc<Registry>,
    views: KernelViews,
    /// Where files beside the image of any disk may be, and sockets of servers.
    folders: Vec<PathBuf>,
}

/// A mode decides what a tapdisk may do.
///
/// # Errors
/// The driver cannot do that.
pub(crate) fn with_mode(mut open: Open, mode: Mode) -> Result<Open, Failure> {
    if mode == Mode::WriteShared && open.target.driver().has_one_writer() {
        return Err(Failure::unsupported(format!(
            "{} cannot be used with the mode w!: who writes it changes tables, or keeps what is not durable yet, of \
             which another writer would not learn; use the mode w, or a raw image",
            open.target
        )));
    }
    if let Some(below) = open.target.below().filter(|_| mode.is_read_only()) {
        return Err(Failure::invalid(format!(
            "{} keeps what a guest writes, and with the mode {mode} it writes nothing: use {}:{}",
            open.target,
            below.driver,
            below.path.display()
        )));
    }
    if *open.target.lease() != LeaseKind::Lock && mode == Mode::WriteShared {
        return Err(Failure::invalid(format!(
            "{} cannot be used with the mode w!: a lease lets one host write, and that mode several; leave one \
             of the two away",
            open.target
        )));
    }
    if open.target.limits().is_some() {
        return Err(Failure::invalid(format!(
            "{}: give the limits when the disk is made, or later: `tap-ctl set -m MINOR --bps 20M`; remove bps= and iops=",
            open.target
        )));
    }
    if let Some(group) = open.target.group() {
        return Err(Failure::invalid(format!(
            "{}: name the group when the disk is made, or later: `tap-ctl set -m MINOR --group {group}`; remove group={group}",
            open.target
        )));
    }
    if open.target.rules() != SaidRules::default() {
        return Err(Failure::invalid(format!(
            "{}: say what happens on errors when the disk is made, or later: `tap-ctl set -m MINOR --on-error stop`; remove on-error= and the like",
            open.target
        )));
    }
    if open.target.is_shared() {
        return Err(Failure::invalid(format!(
            "{}: set shared access to a disk when it is made, or with --mode w!; remove shared=yes",
            open.target
        )));
    }
    open.read_only = mode.is_read_only();
    open.shared = mode.is_shared();
    open.whole_blocks = mode.is_shared() && !mode.is_read_only();
    Ok(open)
}

/// As a guest and its stub domain do.
///
/// # Errors
/// The driver cannot do that.
pub(crate) fn beside_others(mut open: Open, beside: OtherUsers) -> Result<Open, Failure> {
    let shares = beside == OtherUsers::Shared;
    if shares && open.target.driver().has_one_writer() {
        return Err(Failure::new(
            Code::Busy,
            format!(
                "{} is in use by another disk, too, and one of the two writes it: what the one \
                 that writes has in memory of it, such as tables, would be wrong for the other; detach it there, or use \
                 a raw image",
                open.target
            ),
        ));
    }
    open.shared |= shares;
    Ok(open)
}

impl Admission {
    /// Decides for the disks of a registry. Files that a disk needs beside its image may be in `folders`.
    #[must_use]
    pub fn new(registry: Rc<Registry>, folders: Vec<PathBuf>) -> Admission {
        Admission {
            registry,
            views: KernelViews::default(),
            folders,
        }
    }

    /// Does `work` if no user of the image forbids it; the image counts as used when the work is done. `except` is a
    /// disk that gives up what it used; without it the image is for a new disk. The work learns from [`OtherUsers`] whether
    /// another of our processes uses the image as well: then neither may lock it against the other, or one of the two
    /// is to release it.
    ///
    /// # Errors
    /// Says who uses it, or what the work says.
    pub async fn admit<T>(
        &self,
        image: Option<&Arc<Image>>,
        mode: Mode,
        vbd: Option<&str>,
        except: Option<u32>,
        work: impl FnOnce(OtherUsers) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let seen = match image {
            Some(image) => Some((image, self.look(image, vbd).await?)),
            None => None,
        };
        let mut machines: BTreeMap<String, MachineSet> = BTreeMap::new();
        // Directories that came in between belong to a machine, too.
        while let Some(new) = self.first_directory(|vbd| !machines.contains_key(vbd)) {
            let its = self.machines(Some(&new)).await.map_err(unseen)?;
            machines.insert(new, its);
        }
        if except.is_none() {
            self.check_single(vbd)?;
        }
        let beside = match seen {
            Some((image, seen)) => {
                let ours = self.users(except, &machines);
                let domain = vbd.and_then(domain_of);
                let beside = decide(image, mode, domain, &ours, &seen)?;
                if beside != OtherUsers::Nobody {
                    self.check_stays(image, &seen.images)?;
                }
                beside
            }
            None => OtherUsers::Nobody,
        };
        work(beside)
    }

    /// Says whether an image may be used, and changes nothing.
    ///
    /// # Errors
    /// Says who uses it.
    pub async fn check(&self, check: Check) -> Result<(), Failure> {
        let mut target = check.target;
        target.take_limits();
        target.take_group();
        target.take_rules();
        let mode = target.take_shared(check.mode);
        let open = with_mode(Open::new(target), mode)?;
        let vbd = check.vbd.as_deref().map(relative);
        if self.registry.made_before(vbd, &open, mode).is_some() {
            return Ok(());
        }
        let image = self.registry.image_that_would_be(&open).await?;
        self.check_not_frozen(image.as_ref(), mode).await?;
        let work = |beside| beside_others(open, beside).map(drop);
        self.admit(image.as_ref(), mode, vbd, None, work).await
    }

    /// Refuses a device that a disk with this mode would write and that is the backing image of a newer one, also while
    /// no disk has that. A file says it by its permissions.
    ///
    /// # Errors
    /// The device is such a one, or it is not known whether it is.
    pub async fn check_not_frozen(
        &self,
        image: Option<&Arc<Image>>,
        mode: Mode,
    ) -> Result<(), Failure> {
        let Some(image) = image.filter(|image| image.is_device() && !mode.is_read_only()) else {
            return Ok(());
        };
        let (image, records) = (image.clone(), self.registry.folder.frozen().clone());
        let folder = records.folder().to_path_buf();
        let look = move || overlay::check_not_frozen(&image, &records);
        blocking_io(&folder, LIMIT, look).await
    }

    /// A disk of a backend's directory that is not there would stay for ever.
    ///
    /// # Errors
    /// It is not there, or xenstore does not say.
    pub async fn check_directory(&self, vbd: &str) -> Result<(), Failure> {
        if directory(vbd) != Some(vbd) {
            return Err(Failure::invalid(format!(
                "{vbd} is no backend directory such as backend/vbd/3/51712"
            )));
        }
        let store = self.registry.store().ok_or_else(|| {
            Failure::new(
                Code::State,
                "there is no connection to xenstore: is xenstored running?",
            )
        })?;
        let frontend = store.read(&format!("{vbd}/frontend")).await;
        match frontend.map_err(|error| Failure::system(format!("cannot read {vbd}"), &error))? {
            Some(_) => Ok(()),
            None => Err(Failure::new(
                Code::NotFound,
                format!("the backend directory {vbd} is gone"),
            )),
        }
    }

    /// A directory that a disk of ours is for and that `wanted` likes.
    fn first_directory(&self, wanted: impl Fn(&str) -> bool) -> Option<String> {
        let all = self.registry.all();
        let ours = all
            .iter()
            .filter_map(|disk| disk.record.borrow().vbd.clone());
        let left = self.registry.left_alone();
        let left = left.into_iter().filter_map(|disk| disk.peek.vbd);
        ours.chain(left).find(|vbd| wanted(vbd))
    }

    /// Checks that the image is not one that a disk is about to leave, or moves to, by a mirror.
    fn check_stays(&self, image: &Image, images: &[Identity]) -> Result<(), Failure> {
        let leaves = |disk: &&Rc<Disk>| {
            let record = disk.record.borrow();
            let mut parts = record.parts.iter();
            let goes_to = |part: &DiskPart| {
                part.role == PartRole::Mirror
                    && part.identity.is_some_and(|its| images.contains(&its))
            };
            let is_left = record.identity.is_some_and(|its| images.contains(&its));
            record.mirror.is_some() && (is_left || parts.any(goes_to))
        };
        match self.registry.all().iter().find(leaves) {
            None => Ok(()),
            Some(disk) => Err(Failure::new(
                Code::Busy,
                format!(
                    "{} is not free: {} is being copied to another image and will switch to it, and this is one of the two: \
                     wait for that, or end it: `tap-ctl mirror -m {} --cancel`",
                    image.path().display(),
                    disk.name(),
                    disk.minor
                ),
            )),
        }
    }

    /// Refuses a backend's directory in xenstore that another disk has already.
    fn check_single(&self, vbd: Option<&str>) -> Result<(), Failure> {
        let Some(vbd) = vbd else {
            return Ok(());
        };
        let exists = |minor| {
            let message = format!("{vbd} has the tap disk {minor} already");
            Err(Failure::new(Code::Exists, message))
        };
        let has_it = |disk: &&Rc<Disk>| disk.record.borrow().vbd.as_deref() == Some(vbd);
        if let Some(disk) = self.registry.all().iter().find(has_it) {
            return exists(disk.minor);
        }
        let mut left = self.registry.left_alone().into_iter();
        match left.find(|disk| disk.peek.vbd.as_deref() == Some(vbd)) {
            Some(disk) => exists(disk.minor),
            None => Ok(()),
        }
    }

    /// The users of images among our own disks. A disk that goes from one image to another uses both.
    fn users(
        &self,
        except: Option<u32>,
        machines: &BTreeMap<String, MachineSet>,
    ) -> Vec<ImageUser> {
        let user = |minor: u32, images: Vec<Identity>, mode, vbd: Option<&String>| ImageUser {
            name: match vbd {
                Some(vbd) => format!("tap disk {minor} of {vbd}"),
                None => format!("tap disk {minor}"),
            },
            images,
            mode,
            domain: vbd.and_then(|vbd| domain_of(vbd)).map(str::to_owned),
            machines: vbd
                .and_then(|vbd| machines.get(vbd).cloned())
                .unwrap_or_default(),
        };
        let mut users = Vec::new();
        for disk in self.registry.all() {
            let record = disk.record.borrow();
            let next = record.next.as_ref().and_then(|next| next.identity);
            let made = record.overlay.as_ref().and_then(|made| made.identity);
            let images = record.identity.into_iter().chain(next).chain(made);
            let images: Vec<Identity> = images.collect();
            if Some(disk.minor) != except && !images.is_empty() {
                users.push(user(disk.minor, images, record.mode, record.vbd.as_ref()));
            }
            let next = record.next.iter().flat_map(|next| &next.parts);
            for part in record.parts.iter().chain(next) {
                let images: Vec<Identity> = part.identity.into_iter().collect();
                if Some(disk.minor) != except && !images.is_empty() {
                    users.push(user(disk.minor, images, part.mode, record.vbd.as_ref()));
                }
            }
        }
        for disk in self.registry.left_alone() {
            let next = disk.peek.next.as_ref().and_then(|next| next.identity);
            let images: Vec<Identity> = disk.peek.identity.into_iter().chain(next).collect();
            let vbd = disk.peek.vbd.as_ref();
            // A disk whose mode is unknown counts as a writer.
            let mode = disk.peek.mode.unwrap_or(Mode::Write);
            users.push(user(disk.minor, images, mode, vbd));
            for part in disk.peek.all_parts() {
                let images: Vec<Identity> = part.identity.into_iter().collect();
                users.push(user(disk.minor, images, part.mode, vbd));
            }
        }
        users
    }

    /// Looks who uses an image outside of the supervisor.
    async fn look(&self, image: &Arc<Image>, vbd: Option<&str>) -> Result<FoundUsers, Failure> {
        if image.is_export() {
            // Other clients of an export are its server's affair.
            return Ok(FoundUsers {
                images: vec![image.identity()],
                backends: Vec::new(),
                machines: self.machines(vbd).await.map_err(unseen)?,
                mounts: Vec::new(),
                claims: Vec::new(),
                promised: false,
            });
        }
        let views = &self.views;
        let table = MountTable::read(views).map_err(unseen)?;
        let images = loops::same(views, &table, image).await?;
        let backends = match self.registry.store() {
            Some(store) => {
                let mut ours: Vec<String> = vbd.map(str::to_owned).into_iter().collect();
                while let Some(new) = self.first_directory(|vbd| !ours.iter().any(|our| our == vbd))
                {
                    ours.push(new);
                }
                backends::backends(&*store, &ours).await.map_err(unseen)?
            }
            None => Vec::new(),
        };
        let claimed = image.clone();
        let path = image.path().to_path_buf();
        Ok(FoundUsers {
            machines: self.machines(vbd).await.map_err(unseen)?,
            mounts: table.devices(views),
            claims: claims::claims(views, &images).map_err(unseen)?,
            promised: blocking_io(&path, LIMIT, move || claimed.is_promised()).await?,
            images,
            backends,
        })
    }

    /// The virtual machines of the guest of a backend's directory.
    async fn machines(&self, vbd: Option<&str>) -> io::Result<MachineSet> {
        let domain = vbd.and_then(domain_of);
        match (self.registry.store(), domain) {
            (Some(store), Some(domain)) => backends::machines(&*store, domain).await,
            _ => Ok(MachineSet::new()),
        }
    }
}

/// The domain of the guest of a backend's directory.
fn domain_of(vbd: &str) -> Option<&str> {
    vbd.split('/').nth(2)
}

/// Decides, and says whether an own disk uses the image, too.
fn decide(
    image: &Image,
    mode: Mode,
    domain: Option<&str>,
    ours: &[ImageUser],
    seen: &FoundUsers,
) -> Result<OtherUsers, Failure> {
    let beside = sharing::beside(&seen.images, mode, domain, &seen.machines, ours);
    let others = [ours, seen.backends.as_slice()].concat();
    let free = sharing::check(&seen.images, mode, &seen.machines, &others, &seen.mounts)
        .and_then(|()| sharing::check_claims(mode, &seen.claims))
        .and_then(|()| {
            let known = sharing::is_used(&seen.images, &others, &seen.mounts);
            sharing::check_promised(mode, seen.promised && !known)
        });
    match free {
        Ok(()) => Ok(beside),
        Err(why) => Err(Failure::new(
            Code::Busy,
            format!("{} is not free: {why}", image.path().display()),
        )),
    }
}

fn unseen(error: io::Error) -> Failure {
    Failure::system("cannot see who uses the image", &error)
}
