// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tapimg create`: new images.

use crate::cli::{CreateImage, Layout};
use crate::image_spec::ImageSpec;
use crate::made::MadeImage;
use crate::open::{identity, ImageOpener};
use crate::sector::{of_new, stored};
use crate::target::Target;
use control::{Code, Failure, NewSize};
use diskio::File;
use drivers::Disk;
use formats::{fits, luks, qcow, qcow2, random, vhd, vmdk, Base, Below, ImageFormat, LAYERS};
use std::io;
use std::path::Path;
use std::time::Duration;

/// Backing image of a new image. As long as this exists, its lock lets no other program write it.
#[derive(Debug)]
pub(crate) struct Parent {
    /// Its name and kind for the new image.
    base: Base,
    /// The disk, for reading.
    pub(crate) disk: Disk,
    /// Bytes of it.
    pub(crate) size: u64,
    /// Bytes of a logical sector.
    pub(crate) sector: u32,
}

/// Makes an image.
pub(crate) async fn create(opener: &ImageOpener, args: &CreateImage) -> Result<MadeImage, Failure> {
    let image = &args.image;
    check(image, &args.layout)?;
    let parent = match &args.layout.parent {
        Some(parent) => Some(Parent::open(opener, parent, image).await?),
        None => None,
    };
    let size = size_of(args, parent.as_ref())?;
    let sector = of_new(opener, image, &args.layout, size, None, parent.as_ref()).await?;
    let target = Target::begin(opener, image, args.force).await?;
    if target.is_device() && image.kind == Below::Raw {
        return Err(Failure::invalid(format!(
            "{} is a device, which is a raw image as it is: there is nothing to make",
            image.path.display()
        )));
    }
    let compression = qcow2::Compression::Zlib;
    let made = make(
        target.file(),
        image,
        (size, sector),
        &args.layout,
        compression,
        parent.as_ref(),
    );
    match made.await {
        Ok(()) => {
            let file = target.keep().await?;
            MadeImage::new(image, size, &file, args.layout.parent.as_ref())
        }
        Err(failure) => Err(target.give_up(image.said(failure)).await),
    }
}

/// Returns the bytes of the disk in a new image.
fn size_of(args: &CreateImage, parent: Option<&Parent>) -> Result<u64, Failure> {
    let image = &args.image;
    match (args.size, parent) {
        (None, Some(parent)) => Ok(parent.size),
        (Some(NewSize::Bytes(size)), _) => Ok(size),
        (Some(size), Some(parent)) => size.of(parent.size).ok_or_else(|| {
            Failure::invalid(format!(
                "{image}: no disk can be that large: give another size"
            ))
        }),
        (None | Some(NewSize::More(_)), None) => Err(Failure::invalid(format!(
            "say how large {image} is to be, such as `tapimg create {image} 10G`; +1G is for an image with --parent"
        ))),
    }
}

/// Refuses what a kind of image does not have, before anything is touched.
pub(crate) fn check(image: &ImageSpec, layout: &Layout) -> Result<(), Failure> {
    let refuse = |what: &str, who: &str| {
        Err(Failure::invalid(format!(
            "{image}: {what}: leave that out, or use {who}"
        )))
    };
    let kind = match image.kind {
        Below::Raw => None,
        Below::Format(kind) => Some(kind),
    };
    if kind == Some(ImageFormat::Vhdx) {
        return Err(read_only(image));
    }
    check_key(image, layout)?;
    if kind != Some(ImageFormat::Qcow2) && (layout.cluster_size.is_some() || layout.subclusters) {
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
    if kind != Some(ImageFormat::Vhd) && layout.fixed {
        return refuse("only a VHD is fixed or not", "vhd");
    }
    if kind != Some(ImageFormat::Vhd) && layout.reserve.is_some() {
        return refuse("only a VHD has a table that room is left in", "vhd");
    }
    if layout.fixed && layout.parent.is_some() {
        return refuse("a fixed VHD has no parent", "a dynamic one");
    }
    let Some(parent) = &layout.parent else {
        return Ok(());
    };
    match kind {
        None => refuse("a raw image has no parent", "qcow2"),
        Some(kind) => fits(kind, parent.kind).map_err(|failure| image.said(failure)),
    }
}

impl Parent {
    /// Opens and locks what is to lie below `child`.
    pub(crate) async fn open(
        opener: &ImageOpener,
        image: &ImageSpec,
        child: &ImageSpec,
    ) -> Result<Self, Failure> {
        apart(image, child)?;
        if image.is_sealed() {
            return Err(Failure::invalid(format!(
                "{image} is encrypted, and {child} over it would not be: an encrypted image cannot be a backing image"
            )));
        }
        // The child has to be one that can be served.
        let opener = &ImageOpener {
            layers: LAYERS - 1,
            ..opener.clone()
        };
        let (disk, shape) = opener.disk(image, None).await?;
        let file = opener.file(&image.path, opener.reading).await?;
        let base = Base::of(image.kind, &image.path, &file, &child.path).await;
        Ok(Self {
            base: base.map_err(|failure| image.said(failure))?,
            disk,
            size: shape.size,
            sector: shape.logical_block,
        })
    }
}

/// Refuses two names of the same file.
pub(crate) fn apart(one: &ImageSpec, other: &ImageSpec) -> Result<(), Failure> {
    let of = |image: &ImageSpec| {
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

/// Makes the image that will have the name `image` in an empty file, or on a device, with a disk of that many bytes and
/// bytes of a logical sector.
pub(crate) async fn make(
    file: &File,
    image: &ImageSpec,
    (size, sector): (u64, u32),
    layout: &Layout,
    compression: qcow2::Compression,
    parent: Option<&Parent>,
) -> Result<(), Failure> {
    let kind = match image.kind {
        Below::Raw => return raw(file, image, size).await,
        Below::Format(kind) => kind,
    };
    let base = parent.map(|parent| &parent.base);
    match kind {
        ImageFormat::Qcow2 => {
            let plan = qcow2::Qcow2Create {
                cluster: layout.cluster_size.map_or(64 << 10, |size| size.0),
                extended: layout.subclusters,
                backing: base.map(Base::backing),
                compression,
                sector: stored(sector, parent),
                encryption: encryption(image, layout)?,
                ..qcow2::Qcow2Create::new(size)
            };
            qcow2::create(file, &plan).await
        }
        ImageFormat::Qcow => {
            let parent = base.map(|base| base.name().to_string());
            qcow::create(file, &qcow::QcowCreate { size, parent }).await
        }
        ImageFormat::Vhd => vhd::create(file, &of_vhd(size, layout, base)?).await,
        ImageFormat::Vhdx => Err(read_only(image)),
        ImageFormat::Luks => {
            let how = encryption(image, layout)?.ok_or_else(|| no_key(image))?;
            luks::create(file, size, &how).await
        }
        ImageFormat::Vmdk => vmdk::create(file, &[], &of_vmdk(image, size, base)?).await,
    }
}

/// A VMDK in one file.
pub(crate) fn of_vmdk(
    image: &ImageSpec,
    size: u64,
    base: Option<&Base>,
) -> Result<vmdk::VmdkCreate, Failure> {
    Ok(vmdk::VmdkCreate {
        form: vmdk::Form::MonolithicSparse,
        size,
        name: own_name(image)?,
        parent: base.map(Base::of_vmdk),
        cid: u32::from_ne_bytes(random()?) >> 1,
    })
}

/// Refuses options that do not fit the encryption of an image.
fn check_key(image: &ImageSpec, layout: &Layout) -> Result<(), Failure> {
    let refuse = |why: String| Err(Failure::invalid(format!("{image}: {why}")));
    match &image.key {
        None if image.is_sealed() => Err(no_key(image)),
        None if layout.iter_time.is_some() => refuse(
            "--iter-time is how long a key is to be tried, and there is none: name one with key=FILE,, or leave that out"
                .into(),
        ),
        None => Ok(()),
        Some(key) => {
            let of = |path: &Path| {
                let name = path.display();
                identity(path)
                    .map_err(|error| Failure::system(format!("cannot look at {name}"), &error))
            };
            match (of(key)?, of(&image.path)?) {
                (Some(a), Some(b)) if a == b => refuse(
                    "it is the file with its own key, which would be lost: name another one".into(),
                ),
                _ => Ok(()),
            }
        }
    }
}

/// Returns the failure of an image that can only be made with a key.
fn no_key(image: &ImageSpec) -> Failure {
    Failure::invalid(format!(
        "{image}: it is encrypted, and no key was named: write key=FILE,{image} with a file that has one"
    ))
}

/// How an image is encrypted; nothing if it is not.
fn encryption(image: &ImageSpec, layout: &Layout) -> Result<Option<luks::Encryption>, Failure> {
    let key = image.secret()?;
    Ok(key.map(|key| luks::Encryption {
        key,
        iter_time: layout
            .iter_time
            .map_or(luks::ITER_TIME, Duration::from_millis),
    }))
}

/// Returns the failure of an image of a read-only kind.
fn read_only(image: &ImageSpec) -> Failure {
    Failure::invalid(format!(
        "{image}: a VHDX is read and not made: make a qcow2 image or a VHD"
    ))
}

fn of_vhd(size: u64, layout: &Layout, base: Option<&Base>) -> Result<vhd::VhdCreate, Failure> {
    Ok(vhd::VhdCreate {
        kind: match (base, layout.fixed) {
            (Some(_), _) => vhd::VhdKind::Differencing,
            (None, true) => vhd::VhdKind::Fixed,
            (None, false) => vhd::VhdKind::Dynamic,
        },
        size,
        id: random()?,
        parent: base.map(Base::of_vhd),
        reserve: layout.reserve.map_or(0, |size| size.0),
    })
}

async fn raw(file: &File, image: &ImageSpec, size: u64) -> Result<(), Failure> {
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

fn own_name(image: &ImageSpec) -> Result<String, Failure> {
    let name = image.path.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| {
        Failure::invalid(format!(
            "the name of {} is not UTF-8, and it is in the image: use another one",
            image.path.display()
        ))
    })?;
    Ok(name.to_string())
}
