// SPDX-License-Identifier: MIT OR Apache-2.0
//! A new image with a backing image: how it names that, and how it is created.

use crate::base::SECTOR;
use crate::vhd::{self, ParentOf};
use crate::{qcow2, vmdk, Below, ImageFormat, Storage};
use control::{Code, Failure};
use rustix::io::Errno;
use rustix::rand::{getrandom, GetRandomFlags};
use std::path::Path;

/// Identity of an image's content, in formats whose children store it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ContentId {
    None,
    Vhd([u8; 16]),
    Vmdk(u32),
}

/// Backing image of a new image, as the new header describes it.
#[derive(Clone, Debug)]
pub struct Base {
    kind: Below,
    name: String,
    id: ContentId,
}

impl Base {
    /// Describes the image at `path`, whose content is in `image`, for a child at `child`. Both paths are absolute.
    ///
    /// # Errors
    /// The image cannot be read, or the header cannot store its name.
    pub async fn of<S: Storage>(
        kind: Below,
        path: &Path,
        image: &S,
        child: &Path,
    ) -> Result<Self, Failure> {
        let id = match kind {
            Below::Format(ImageFormat::Vhd) => ContentId::Vhd(vhd::id(image).await?),
            Below::Format(ImageFormat::Vmdk) => ContentId::Vmdk(number(&vmdk::id(image).await?)?),
            _ => ContentId::None,
        };
        let name = name_from(path, child)?;
        Ok(Self { kind, name, id })
    }

    /// Returns its name, relative to the folder of the child if possible.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// As a qcow2 image has it.
    pub fn backing(&self) -> qcow2::BackingImage {
        named(self.kind, self.name.clone())
    }

    /// Returns the form that a VHD stores. A raw backing image has an identity of zeroes.
    pub fn of_vhd(&self) -> ParentOf {
        ParentOf {
            path: self.name.clone(),
            id: match self.id {
                ContentId::Vhd(id) => id,
                _ => [0; 16],
            },
        }
    }

    /// As a VMDK has it.
    pub fn of_vmdk(&self) -> (String, u32) {
        let id = match self.id {
            ContentId::Vmdk(id) => id,
            _ => 0,
        };
        (self.name.clone(), id)
    }
}

fn number(id: &str) -> Result<u32, Failure> {
    u32::from_str_radix(id, 16).map_err(|_| {
        let why = format!("it calls itself {id:?}, which is no number");
        Failure::new(Code::Image, why)
    })
}

/// The name of `image` in the header of `child`: from its folder if it is there, so that both can be moved.
fn name_from(image: &Path, child: &Path) -> Result<String, Failure> {
    let name = match (image.parent() == child.parent(), image.file_name()) {
        (true, Some(name)) => name,
        _ => image.as_os_str(),
    };
    let name = name.to_str().ok_or_else(|| {
        Failure::invalid(format!(
            "the name of {} is not UTF-8, so no image can have it as its parent: rename it",
            image.display()
        ))
    })?;
    // Other programs take the part before a colon for a protocol.
    let begin = name.split('/').next().unwrap_or(name);
    Ok(match begin.contains(':') {
        true => format!("./{name}"),
        false => name.to_string(),
    })
}

/// Describes the backing image at `path` as a qcow2 image at `child` stores it.
///
/// # Errors
/// The header cannot store its name.
pub fn backing(kind: Below, path: &Path, child: &Path) -> Result<qcow2::BackingImage, Failure> {
    Ok(named(kind, name_from(path, child)?))
}

fn named(kind: Below, name: String) -> qcow2::BackingImage {
    let format = Some(kind.qemu_name().to_string());
    qcow2::BackingImage { name, format }
}

/// Refuses an image of a kind that cannot lie over one of another.
///
/// # Errors
/// Says what can.
pub fn fits(kind: ImageFormat, below: Below) -> Result<(), Failure> {
    match (kind, below) {
        (ImageFormat::Vhd, Below::Raw | Below::Format(ImageFormat::Vhd))
        | (ImageFormat::Vmdk, Below::Format(ImageFormat::Vmdk))
        | (ImageFormat::Qcow2 | ImageFormat::Qcow, _) => Ok(()),
        (ImageFormat::Vhd, _) => Err(Failure::invalid(
            "the parent of a VHD is a VHD or raw: use qcow2",
        )),
        (ImageFormat::Vmdk, _) => Err(Failure::invalid(
            "the parent of a VMDK is a VMDK: use qcow2",
        )),
        (ImageFormat::Vhdx, _) => Err(Failure::invalid("a VHDX is read and not made: use qcow2")),
        (ImageFormat::Luks, _) => Err(Failure::invalid(
            "a LUKS image cannot have a backing image: use qcow2",
        )),
    }
}

/// Properties of a new image over another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverlayPlan {
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of a logical sector, which are those of the backing disk.
    pub sector: u32,
    /// Bytes of a cluster of the image below, if a commit into it must work while the guest does: of a smaller one a
    /// commit writes a part of a cluster there, and the rest may move. 1 if that does not matter.
    pub unit: u64,
}

/// Makes an image without content of its own in an empty file, and makes it durable.
///
/// # Errors
/// The kind is not one for this, or the storage fails.
pub async fn overlay<S: Storage>(
    file: &S,
    kind: ImageFormat,
    plan: OverlayPlan,
    base: &Base,
) -> Result<(), Failure> {
    let OverlayPlan { size, sector, unit } = plan;
    fits(kind, base.kind)?;
    match kind {
        ImageFormat::Qcow2 => {
            let backing = Some(base.backing());
            let usual = qcow2::Qcow2Create::new(size);
            let plan = qcow2::Qcow2Create {
                backing,
                sector: (sector != SECTOR).then_some(sector),
                cluster: match base.kind {
                    Below::Format(ImageFormat::Qcow2) => usual.cluster.max(unit),
                    // Other images have blocks of another kind, or no larger clusters.
                    _ => usual.cluster,
                },
                ..usual
            };
            qcow2::create(file, &plan).await?;
        }
        ImageFormat::Vhd => {
            let what = vhd::VhdCreate {
                kind: vhd::VhdKind::Differencing,
                size,
                id: random()?,
                parent: Some(base.of_vhd()),
                reserve: 0,
            };
            vhd::create(file, &what).await?;
        }
        // qcow does not name the type of its backing image, a VMDK stores the identity of the parent's content, which
        // changes when that is changed, and this program does not create the others for a running disk.
        ImageFormat::Qcow | ImageFormat::Vmdk | ImageFormat::Vhdx | ImageFormat::Luks => {
            return Err(Failure::unsupported(format!(
                "a running disk cannot switch to a new {kind} image: use qcow2 or vhd"
            )))
        }
    }
    let flushed = file.flush().await;
    flushed.map_err(|error| Failure::system("cannot make the new image durable", &error.into()))
}

/// Returns random bytes, such as the identity of a new image.
///
/// # Errors
/// The system has none.
pub fn random<const N: usize>() -> Result<[u8; N], Failure> {
    let mut bytes = [0; N];
    fill_by_chance(&mut bytes)?;
    Ok(bytes)
}

/// Fills `bytes` with random bytes.
pub(crate) fn fill_by_chance(bytes: &mut [u8]) -> Result<(), Failure> {
    let mut done = 0;
    while done < bytes.len() {
        // The system may return fewer bytes than requested.
        match getrandom(&mut bytes[done..], GetRandomFlags::empty()) {
            Ok(0) => {
                return Err(Failure::new(
                    Code::System,
                    "the system has no random numbers",
                ))
            }
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(error) => return Err(Failure::system("cannot get random numbers", &error.into())),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{fits, name_from};
    use crate::{Below, ImageFormat};
    use std::path::Path;

    #[test]
    fn a_parent_is_named_from_the_folder_of_its_child() {
        let from = |image: &str, child: &str| {
            name_from(Path::new(image), Path::new(child)).expect("a name")
        };
        assert_eq!(from("/srv/a.img", "/srv/b.qcow2"), "a.img");
        assert_eq!(from("/srv/a.img", "/srv/b/c.qcow2"), "/srv/a.img");
        assert_eq!(from("/dev/vg/a", "/srv/b.qcow2"), "/dev/vg/a");
        assert_eq!(from("/srv/a:b.img", "/srv/b.qcow2"), "./a:b.img");
        assert_eq!(from("/srv/a:b.img", "/srv/b/c.qcow2"), "/srv/a:b.img");
    }

    #[test]
    fn what_lies_over_what() {
        let vhd = Below::Format(ImageFormat::Vhd);
        assert!(
            fits(ImageFormat::Qcow2, vhd).is_ok() && fits(ImageFormat::Qcow2, Below::Raw).is_ok()
        );
        assert!(fits(ImageFormat::Vhd, vhd).is_ok() && fits(ImageFormat::Vhd, Below::Raw).is_ok());
        assert!(fits(ImageFormat::Vhd, Below::Format(ImageFormat::Qcow2)).is_err());
        assert!(fits(ImageFormat::Vmdk, Below::Raw).is_err());
    }
}
