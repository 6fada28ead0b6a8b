// SPDX-License-Identifier: MIT OR Apache-2.0
//! Finds the images that other backends use, from xenstore.

use super::sharing::{ImageUser, MachineSet};
use super::views::{device_number, identity, GLANCE};
use crate::blocking_io::blocking_io;
use crate::image::Identity;
use crate::store::{is_hidden, Store};
use control::supervisor::Mode;
use std::io;
use std::path::Path;

/// The kinds of backends that are queried, and the key that names the image of one. A disk of `vbd` is in use when its
/// script has found a device for it, and not before: else two that begin at once would refuse each other. QEMU has no
/// script. Tap disks, of `vbd3` as well, are known without asking.
const KINDS: &[(&str, BackendKey)] = &[
    ("vbd", BackendKey::PhysicalDevice),
    ("qdisk", BackendKey::Params),
];

/// A key of a backend's directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BackendKey {
    /// `physical-device`, a number.
    PhysicalDevice,
    /// `params`, a path with formats in front.
    Params,
}

/// The virtual machines of a domain: its own, and the one that it is the stub domain of. Where those are
/// hidden, in a driver domain, each domain is a machine.
///
/// # Errors
/// Xenstore does not answer.
pub(super) async fn machines(store: &dyn Store, domain: &str) -> io::Result<MachineSet> {
    let mut machines = MachineSet::new();
    match store.read(&format!("/local/domain/{domain}/vm")).await {
        Err(error) if is_hidden(&error) => {
            machines.insert(format!("domain {domain}"));
            return Ok(machines);
        }
        own => machines.extend(own?),
    }
    let target = store
        .read(&format!("/local/domain/{domain}/target"))
        .await?;
    if let Some(target) = target {
        machines.extend(store.read(&format!("/local/domain/{target}/vm")).await?);
    }
    Ok(machines)
}

/// Returns the users of images by other backends than those of the disks in `ours`, which are directories.
///
/// # Errors
/// Xenstore does not answer.
pub(super) async fn backends(store: &dyn Store, ours: &[String]) -> io::Result<Vec<ImageUser>> {
    let mut all = Vec::new();
    for (kind, key) in KINDS {
        for domain in store.list(&format!("backend/{kind}")).await? {
            for device in store.list(&format!("backend/{kind}/{domain}")).await? {
                let directory = format!("backend/{kind}/{domain}/{device}");
                if ours.contains(&directory) {
                    continue;
                }
                all.push((domain.clone(), directory, *key));
            }
        }
    }
    // At once: some images may not answer.
    let users = all
        .iter()
        .map(|(domain, directory, key)| backend(store, domain, directory, *key));
    let users = futures::future::join_all(users).await;
    let users: io::Result<Vec<Option<ImageUser>>> = users.into_iter().collect();
    Ok(users?.into_iter().flatten().collect())
}

/// Returns the user of the image of the backend at `directory`, if it has one.
async fn backend(
    store: &dyn Store,
    domain: &str,
    directory: &str,
    key: BackendKey,
) -> io::Result<Option<ImageUser>> {
    let read = |name: &str| format!("{directory}/{name}");
    let image = match key {
        BackendKey::PhysicalDevice => {
            let number = store.read(&read("physical-device")).await?;
            let rdev = number.as_deref().and_then(|text| device_number(text, 16));
            rdev.map(|rdev| Identity::Device { rdev })
        }
        BackendKey::Params => {
            let params = store.read(&read("params")).await?;
            match params.as_deref().and_then(path_of).map(Path::to_path_buf) {
                // An image that does not answer is not one that does.
                Some(path) => blocking_io(&path.clone(), GLANCE, move || Ok(identity(&path)))
                    .await
                    .unwrap_or_default(),
                None => None,
            }
        }
    };
    let Some(image) = image else {
        return Ok(None);
    };
    let mode = store.read(&read("mode")).await?.unwrap_or_default();
    // A domain without a virtual machine is being removed: as in Xen's script, it is no user of the image.
    let machines = machines(store, domain).await?;
    if machines.is_empty() && domain != "0" {
        return Ok(None);
    }
    Ok(Some(ImageUser {
        name: format!("the disk {directory}"),
        images: vec![image],
        // A mode that is unknown counts as writing.
        mode: mode.parse().unwrap_or(Mode::Write),
        domain: Some(domain.to_owned()),
        machines,
    }))
}

/// The path in `params`, which has formats in front.
fn path_of(params: &str) -> Option<&Path> {
    let at = params.find('/')?;
    let (formats, path) = params.split_at(at);
    (formats.is_empty() || formats.ends_with(':')).then_some(Path::new(path))
}

#[cfg(test)]
mod tests {
    use super::path_of;
    use std::path::Path;

    #[test]
    fn what_backends_write_down() {
        let path = |text| path_of(text).map(Path::to_path_buf);
        assert_eq!(path("/dev/vg/lv"), Some("/dev/vg/lv".into()));
        assert_eq!(path("aio:qcow2:/srv/a:b"), Some("/srv/a:b".into()));
        assert_eq!(path("vg/lv"), None);
        assert_eq!(path("ram:64M"), None);
    }
}
