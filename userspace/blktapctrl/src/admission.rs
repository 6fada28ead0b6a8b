// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who gets an image.
//!
//! What may take long is looked at first: file systems, devices, xenstore. The decision itself waits
//! for nothing, and what it allows counts as used before anybody else is asked: so nobody waits for
//! anybody, and two who ask at once do not both get the image.

use crate::apart::{apart, LIMIT};
use crate::disk::Disk;
use crate::host::Host;
use crate::image::Image;
use crate::sharing::{self, Identity, Machines, Mount, User};
use crate::users;
use control::supervisor::Mode;
use control::{Code, Failure};
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;

/// What was seen of the users of an image, outside of the supervisor.
struct Seen {
    /// All that the image is: itself, loop devices on it, the file below it.
    images: Vec<Identity>,
    /// Other backends.
    backends: Vec<User>,
    /// The virtual machines of who asks.
    machines: Machines,
    mounts: Vec<Mount>,
    /// What else dom0's kernel does with it.
    claims: Vec<String>,
    /// Its kernel has promised it to somebody, whoever that is.
    promised: bool,
}

impl Host {
    /// Does `work` for an image that nobody uses in a way that forbids it, and that counts as used
    /// when the work is done. `except` is a disk that gives up what it used; without it the image is
    /// for a new disk. The work is told whether another process of ours uses the image as well, so
    /// that neither may lock it against the other.
    ///
    /// # Errors
    /// Says who uses it, or what the work says.
    pub async fn admit<T>(
        &self,
        image: Option<&Arc<Image>>,
        mode: Mode,
        vbd: Option<&str>,
        except: Option<u32>,
        work: impl FnOnce(bool) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let seen = match image {
            Some(image) => Some((image, self.look(image, vbd).await?)),
            None => None,
        };
        let mut machines: BTreeMap<String, Machines> = BTreeMap::new();
        // Who came meanwhile belongs to a machine, too.
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
                decide(image, mode, &ours, &seen)?
            }
            None => false,
        };
        work(beside)
    }

    /// A directory that a disk of ours is for and that `wanted` likes.
    fn first_directory(&self, wanted: impl Fn(&str) -> bool) -> Option<String> {
        let all = self.all();
        let ours = all
            .iter()
            .filter_map(|disk| disk.record.borrow().vbd.clone());
        let unknown = self.unknown.borrow();
        let unknown = unknown.values().filter_map(|disk| disk.peek.vbd.clone());
        ours.chain(unknown).find(|vbd| wanted(vbd))
    }

    /// A backend's directory has one disk.
    fn check_single(&self, vbd: Option<&str>) -> Result<(), Failure> {
        let Some(vbd) = vbd else {
            return Ok(());
        };
        let exists = |minor| {
            let message = format!("{vbd} has the tap disk {minor} already");
            Err(Failure::new(Code::Exists, message))
        };
        let has_it = |disk: &&Rc<Disk>| disk.record.borrow().vbd.as_deref() == Some(vbd);
        if let Some(disk) = self.all().iter().find(has_it) {
            return exists(disk.minor);
        }
        let unknown = self.unknown.borrow();
        let has_it =
            |(_, disk): &(&u32, &crate::unknown::Unknown)| disk.peek.vbd.as_deref() == Some(vbd);
        match unknown.iter().find(has_it) {
            Some((minor, _)) => exists(*minor),
            None => Ok(()),
        }
    }

    /// The users of images among our own disks. A disk that goes from one image to another uses both.
    fn users(&self, except: Option<u32>, machines: &BTreeMap<String, Machines>) -> Vec<User> {
        let user = |minor: u32, images: Vec<Identity>, mode, vbd: Option<&String>| User {
            name: match vbd {
                Some(vbd) => format!("tap disk {minor} of {vbd}"),
                None => format!("tap disk {minor}"),
            },
            images,
            mode,
            machines: vbd
                .and_then(|vbd| machines.get(vbd).cloned())
                .unwrap_or_default(),
        };
        let mut users = Vec::new();
        for disk in self.all() {
            let record = disk.record.borrow();
            let next = record.next.as_ref().and_then(|next| next.identity);
            let images: Vec<Identity> = record.identity.into_iter().chain(next).collect();
            if Some(disk.minor) != except && !images.is_empty() {
                users.push(user(disk.minor, images, record.mode, record.vbd.as_ref()));
            }
        }
        for (minor, disk) in &*self.unknown.borrow() {
            let images: Vec<Identity> = disk.peek.identity.into_iter().collect();
            // What is not known is taken for a writer.
            let mode = disk.peek.mode.unwrap_or(Mode::Write);
            users.push(user(*minor, images, mode, disk.peek.vbd.as_ref()));
        }
        users
    }

    /// Looks who uses an image outside of the supervisor.
    async fn look(&self, image: &Arc<Image>, vbd: Option<&str>) -> Result<Seen, Failure> {
        let views = self.views.borrow().clone();
        let table = views.mounts().map_err(unseen)?;
        let images = users::same(&views, &table, image).await?;
        let backends = match self.store() {
            Some(store) => {
                let mut ours: Vec<String> = vbd.map(str::to_owned).into_iter().collect();
                while let Some(new) = self.first_directory(|vbd| !ours.iter().any(|our| our == vbd))
                {
                    ours.push(new);
                }
                users::backends(&*store, &ours).await.map_err(unseen)?
            }
            None => Vec::new(),
        };
        let claimed = image.clone();
        let path = image.path().to_path_buf();
        Ok(Seen {
            machines: self.machines(vbd).await.map_err(unseen)?,
            mounts: table.devices(&views),
            claims: users::claims(&views, &images).map_err(unseen)?,
            promised: apart(&path, LIMIT, move || claimed.is_promised()).await?,
            images,
            backends,
        })
    }

    /// The virtual machines of the guest of a backend's directory.
    async fn machines(&self, vbd: Option<&str>) -> io::Result<Machines> {
        let domain = vbd.and_then(|vbd| vbd.split('/').nth(2));
        match (self.store(), domain) {
            (Some(store), Some(domain)) => users::machines(&*store, domain).await,
            _ => Ok(Machines::new()),
        }
    }
}

/// Decides, and says whether an own disk uses the image, too.
fn decide(image: &Image, mode: Mode, ours: &[User], seen: &Seen) -> Result<bool, Failure> {
    let beside = sharing::is_beside(&seen.images, mode, ours);
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
