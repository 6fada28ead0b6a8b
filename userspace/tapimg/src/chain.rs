// SPDX-License-Identifier: MIT OR Apache-2.0
//! The images that lie below one.

use crate::follow::parents;
use crate::image_spec::{parse_kind, ImageSpec};
use crate::open::{identity, ImageOpener, Use, DEEPEST};
use control::{Code, Failure};
use diskio::File;
use formats::{look, qcow2, Below, ImageFormat, ImageNeeds};
use std::fs;

/// The image below, by the first of its names that leads somewhere.
pub(crate) fn below(
    opener: &ImageOpener,
    image: &ImageSpec,
    needs: &ImageNeeds,
) -> Option<ImageSpec> {
    let parent = needs.parent.as_ref()?;
    let kind = match &parent.driver {
        Some(name) => parse_kind(name).ok()?,
        None => opener.parents?,
    };
    let places = parents(&opener.moved, &parent.names, &image.path);
    let paths: Vec<_> = places.into_iter().filter_map(Result::ok).collect();
    let there = paths.iter().find(|path| fs::exists(path).unwrap_or(false));
    let path = there.or(paths.first())?.clone();
    Some(ImageSpec::plain(kind, path))
}

/// Refuses to put an image over itself, or over one that has it as a backing image.
pub(crate) async fn refuse_loop(
    opener: &ImageOpener,
    image: &ImageSpec,
    parent: &ImageSpec,
) -> Result<(), Failure> {
    let of = |image: &ImageSpec| {
        identity(&image.path)
            .map_err(|error| Failure::system(format!("cannot look at {image}"), &error))
    };
    let own = of(image)?;
    let mut next = Some(parent.clone());
    for _ in 0..DEEPEST {
        let Some(at) = next.take() else { break };
        let its = of(&at)?;
        if its.is_some() && its == own {
            return Err(Failure::invalid(format!(
                "{parent} has {image} in its chain, or is that itself: name another image"
            )));
        }
        let (Below::Format(kind), Some(_)) = (at.kind, its) else {
            break;
        };
        let file = opener.file(&at.path, Use::Look).await?;
        let needs = look(kind, &file)
            .await
            .map_err(|failure| at.said(failure))?;
        next = below(opener, &at, &needs);
    }
    Ok(())
}

/// Refuses a chain in which an image is damaged in a way that reads as zeroes: what lies behind the end of a
/// qcow2 image does, so one that was cut off would be copied as if nothing were missing.
pub(crate) async fn refuse_damage(opener: &ImageOpener, image: &ImageSpec) -> Result<(), Failure> {
    if image.ova.is_some() {
        // A VMDK without a parent.
        return Ok(());
    }
    let mut next = Some(image.clone());
    for _ in 0..DEEPEST {
        let Some(image) = next.take() else { break };
        let Below::Format(kind) = image.kind else {
            break;
        };
        let file = opener.file(&image.path, Use::Read).await?;
        let needs = look(kind, &file)
            .await
            .map_err(|failure| image.said(failure))?;
        next = below(opener, &image, &needs);
        if kind == ImageFormat::Qcow2 {
            refuse_damaged(&image, &file).await?;
        }
    }
    Ok(())
}

/// Refuses a qcow2 image that is damaged in that way.
pub(crate) async fn refuse_damaged(image: &ImageSpec, file: &File) -> Result<(), Failure> {
    let found = qcow2::check(file, &image.path.display().to_string(), false).await?;
    match found.damaged {
        0 => Ok(()),
        count => Err(Failure::new(
            Code::Image,
            format!(
                "{image} is damaged: {count} entries of its tables are invalid, perhaps because it was cut off; \
                 copy what there is, with zeroes in place of what is lost: `tapimg convert --damaged {image} NEW`"
            ),
        )),
    }
}
