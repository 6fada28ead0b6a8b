// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tapimg create`: new images.

use crate::cli::{Create, Layout};
use crate::named::Named;
use crate::open::{identity, Opener};
use crate::target::Target;
use control::{Code, Failure};
use diskio::File;
use drivers::Disk;
use formats::{qcow, qcow2, vhd, vmdk, Below, Kind};
use std::io;

/// What lies below a new image. As long as this is there nobody can write it.
#[derive(Debug)]
pub(crate) struct Parent {
    image: Named,
    /// The disk, for reading.
    pub(crate) disk: Disk,
    /// Bytes of it.
    pub(crate) size: u64,
    /// What it calls itself.
    id: Id,
}

#[derive(Debug)]
enum Id {
    None,
    Vhd([u8; 16]),
    Vmdk(u32),
}

/// Makes an image.
pub(crate) async fn create(opener: &Opener, args: &Create) -> Result<(), Failure> {
    let image = &args.image;
    check(image, &args.layout)?;
    let parent = match &args.layout.parent {
        Some(parent) => Some(Parent::open(opener, parent, image).await?),
        None => None,
    };
    let size = match (args.size, &parent) {
        (Some(size), _) => size.0,
        (None, Some(parent)) => parent.size,
        (None, None) => {
            return Err(Failure::invalid(format!(
                "say how large {image} is to be, such as: tapimg create {image} 10G"
            )))
        }
    };
    let target = Target::begin(opener, image, args.force).await?;
    if target.is_device() && image.kind == Below::Raw {
        return Err(Failure::invalid(format!(
            "{} is a device, which is a raw image as it is: there is nothing to make",
            image.path.display()
        )));
    }
    match make(target.file(), image, size, &args.layout, parent.as_ref()).await {
        Ok(()) => target.keep().await,
        Err(failure) => Err(target.give_up(image.said(failure)).await),
    }
}

/// Refuses what a kind of image does not have, before anything is touched.
pub(crate) fn check(image: &Named, layout: &Layout) -> Result<(), Failure> {
    let refuse = |what: &str, who: &str| {
        Err(Failure::invalid(format!(
            "{image}: {what}: leave that out, or use {who}"
        )))
    };
    let kind = match image.kind {
        Below::Raw => None,
        Below::Format(kind) => Some(kind),
    };
    if kind != Some(Kind::Qcow2) && (layout.cluster_size.is_some() || layout.subclusters) {
        return refuse(
            "only qcow2 images are made with clusters of any size",
            "qcow2",
        );
    }
    if let Some(size) = layout.cluster_size {
        if !size.0.is_power_of_two() || !(512..=2 << 20).contains(&size.0) {
            return Err(Failure::invalid(format!(
                "{image}: a cluster cannot have {} bytes: use a power of two from 512 to 2M",
                size.0
            )));
        }
    }
    if kind != Some(Kind::Vhd) && layout.fixed {
        return refuse("only a VHD is fixed or not", "vhd");
    }
    if layout.fixed && layout.parent.is_some() {
        return refuse("a fixed VHD has no parent", "a dynamic one");
    }
    let Some(parent) = &layout.parent else {
        return Ok(());
    };
    match (kind, parent.kind) {
        (None, _) => refuse("a raw image has no parent", "qcow2"),
        (Some(Kind::Vhd), Below::Raw | Below::Format(Kind::Vhd))
        | (Some(Kind::Vmdk), Below::Format(Kind::Vmdk))
        | (Some(Kind::Qcow2 | Kind::Qcow), _) => Ok(()),
        (Some(Kind::Vhd), _) => refuse("the parent of a VHD is a VHD or raw", "qcow2"),
        (Some(Kind::Vmdk), _) => refuse("the parent of a VMDK is a VMDK", "qcow2"),
    }
}

impl Parent {
    /// Opens and locks what is to lie below `child`.
    pub(crate) async fn open(
        opener: &Opener,
        image: &Named,
        child: &Named,
    ) -> Result<Self, Failure> {
        apart(image, child)?;
        let (disk, shape) = opener.disk(image, None).await?;
        let id = match image.kind {
            Below::Format(Kind::Vhd) => {
                let file = opener.file(&image.path, opener.reading).await?;
                Id::Vhd(
                    vhd::id(&file)
                        .await
                        .map_err(|failure| image.said(failure))?,
                )
            }
            Below::Format(Kind::Vmdk) => {
                let file = opener.file(&image.path, opener.reading).await?;
                let id = vmdk::id(&file)
                    .await
                    .map_err(|failure| image.said(failure))?;
                let number = u32::from_str_radix(&id, 16);
                Id::Vmdk(number.map_err(|_| {
                    Failure::new(
                        Code::Image,
                        format!("{image} calls itself {id:?}, which is no number"),
                    )
                })?)
            }
            _ => Id::None,
        };
        Ok(Self {
            image: image.clone(),
            disk,
            size: shape.size,
            id,
        })
    }
}

/// Refuses two names of the same file.
pub(crate) fn apart(one: &Named, other: &Named) -> Result<(), Failure> {
    let of = |image: &Named| {
        identity(&image.path)
            .map_err(|error| Failure::system(format!("cannot look at {image}"), &error))
    };
    match (of(one)?, of(other)?) {
        (Some(a), Some(b)) if a == b => Err(Failure::invalid(format!(
            "{one} and {other} are the same file: name another one"
        ))),
        _ => Ok(()),
    }
}

/// Makes the image that will have the name `image` in an empty file, or on a device.
pub(crate) async fn make(
    file: &File,
    image: &Named,
    size: u64,
    layout: &Layout,
    parent: Option<&Parent>,
) -> Result<(), Failure> {
    let kind = match image.kind {
        Below::Raw => return raw(file, image, size).await,
        Below::Format(kind) => kind,
    };
    let name = parent
        .map(|parent| parent.image.name_from(image))
        .transpose()?;
    match kind {
        Kind::Qcow2 => {
            let plan = qcow2::Plan {
                cluster: layout.cluster_size.map_or(64 << 10, |size| size.0),
                extended: layout.subclusters,
                backing: name.zip(parent).map(|(name, parent)| qcow2::Backing {
                    name,
                    format: Some(parent.image.qemu_name().to_string()),
                }),
                ..qcow2::Plan::new(size)
            };
            qcow2::create(file, &plan).await
        }
        Kind::Qcow => qcow::create(file, &qcow::Create { size, parent: name }).await,
        Kind::Vhd => vhd::create(file, &of_vhd(size, layout, name, parent)?).await,
        Kind::Vmdk => {
            let cid = match parent.map(|parent| &parent.id) {
                Some(Id::Vmdk(cid)) => *cid,
                _ => 0,
            };
            let what = vmdk::Create {
                form: vmdk::Form::MonolithicSparse,
                size,
                name: own_name(image)?,
                parent: name.map(|name| (name, cid)),
                cid: u32::from_ne_bytes(random()?) >> 1,
            };
            vmdk::create(file, &[], &what).await
        }
    }
}

fn of_vhd(
    size: u64,
    layout: &Layout,
    name: Option<String>,
    parent: Option<&Parent>,
) -> Result<vhd::Create, Failure> {
    let id = match parent.map(|parent| &parent.id) {
        Some(Id::Vhd(id)) => *id,
        _ => [0; 16],
    };
    Ok(vhd::Create {
        kind: match (&name, layout.fixed) {
            (Some(_), _) => vhd::Kind::Differencing,
            (None, true) => vhd::Kind::Fixed,
            (None, false) => vhd::Kind::Dynamic,
        },
        size,
        id: random()?,
        parent: name.map(|path| vhd::ParentOf { path, id }),
        reserve: 0,
    })
}

async fn raw(file: &File, image: &Named, size: u64) -> Result<(), Failure> {
    let failed =
        |error: io::Error| Failure::system(format!("cannot make {image} of {size} bytes"), &error);
    if !file.is_device() {
        let made = file.set_size(size).await;
        return made.map_err(|error| failed(error.into()));
    }
    let room = file.size().map_err(failed)?;
    match room < size {
        true => Err(Failure::new(
            Code::Image,
            format!("{image} has {room} bytes, and the disk {size}: make the device larger"),
        )),
        false => Ok(()),
    }
}

fn own_name(image: &Named) -> Result<String, Failure> {
    let name = image.path.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| {
        Failure::invalid(format!(
            "the name of {} is not UTF-8, and it is in the image: use another one",
            image.path.display()
        ))
    })?;
    Ok(name.to_string())
}

/// Bytes that nobody else has.
fn random<const N: usize>() -> Result<[u8; N], Failure> {
    let mut bytes = [0; N];
    let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    match got {
        Ok(count) if count == N => Ok(bytes),
        Ok(_) => Err(Failure::new(
            Code::System,
            "the system has no random numbers",
        )),
        Err(error) => Err(Failure::system("cannot get random numbers", &error.into())),
    }
}
