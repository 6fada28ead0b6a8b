// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tapimg snapshot`: makes an image over a backing image, and lists the snapshots in one.

use crate::cli::{CreateImage, Layout, Snapshot};
use crate::create::create;
use crate::info::{snapshots, SnapshotFacts};
use crate::open::ImageOpener;
use control::Failure;
use formats::{Below, ImageFormat};
use serde::Serialize;
use std::fmt::Write;

/// The new image, or the list.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct SnapshotAnswer {
    /// The image, as the command line names it.
    image: String,
    /// The new image over it.
    #[serde(skip_serializing_if = "Option::is_none")]
    overlay: Option<String>,
    /// The snapshots in it, if the list was requested.
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshots: Option<Vec<SnapshotFacts>>,
}

impl SnapshotAnswer {
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        if let Some(overlay) = &self.overlay {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{overlay} has the backing image {}", self.image);
        }
        for one in self.snapshots.iter().flatten() {
            let _ = writeln!(text, "{}", one.text());
        }
        text
    }
}

/// Makes an overlay, or lists.
pub(crate) async fn snapshot(
    opener: &ImageOpener,
    args: &Snapshot,
) -> Result<SnapshotAnswer, Failure> {
    let image = &args.image;
    let mut answer = SnapshotAnswer {
        image: image.to_string(),
        overlay: None,
        snapshots: None,
    };
    if let Some(overlay) = &args.overlay {
        let what = CreateImage {
            image: overlay.clone(),
            size: None,
            layout: Layout {
                parent: Some(image.clone()),
                ..Layout::default()
            },
            force: false,
        };
        create(opener, &what).await?;
        answer.overlay = Some(overlay.to_string());
        return Ok(answer);
    }
    if image.kind != Below::Format(ImageFormat::Qcow2) {
        return Err(Failure::invalid(format!(
            "{image}: only qcow2 images have snapshots inside: name the image to make over it"
        )));
    }
    let file = opener.file(&image.path, opener.reading).await?;
    let all = snapshots(&file).await;
    answer.snapshots = Some(all.map_err(|failure| image.said(failure))?);
    Ok(answer)
}
