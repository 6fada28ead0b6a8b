// SPDX-License-Identifier: MIT OR Apache-2.0
//! Results of the verbs that make an image, for programs.

use crate::image_spec::{kind_name, ImageSpec};
use control::Failure;
use diskio::File;
use serde::Serialize;

/// A new image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct MadeImage {
    /// As the command line names it.
    image: String,
    /// Kind of the image, such as `qcow2`.
    kind: &'static str,
    /// Absolute path of the file or device.
    path: String,
    /// Bytes of the disk.
    size: u64,
    /// Bytes of the file or device.
    file_size: u64,
    /// Bytes that the file system has allocated for a file.
    #[serde(skip_serializing_if = "Option::is_none")]
    allocated: Option<u64>,
    /// Backing image, as the command line names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    parent: Option<String>,
}

/// Result of a conversion.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct ConvertResult {
    /// The image that was read, as the command line names it.
    pub(crate) from: String,
    /// The new image.
    #[serde(flatten)]
    pub(crate) made: MadeImage,
    /// Bytes of the disk that were copied, before compression. Zeroes and bytes that are as in the parent do not count.
    pub(crate) copied: u64,
    /// With --damaged: bytes that could not be read, which are zeroes in the copy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) lost: Option<u64>,
    /// Where the first of them are: the byte and the length of each range.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) lost_at: Vec<[u64; 2]>,
}

impl MadeImage {
    /// Describes an image that is whole and durable in `file`, with a disk of `size` bytes.
    pub(crate) fn new(
        image: &ImageSpec,
        size: u64,
        file: &File,
        parent: Option<&ImageSpec>,
    ) -> Result<Self, Failure> {
        let seeing = |error| Failure::system(format!("cannot look at {image}"), &error);
        Ok(Self {
            image: image.to_string(),
            kind: kind_name(image.kind),
            path: image.path.display().to_string(),
            size,
            file_size: file.size().map_err(seeing)?,
            allocated: match file.is_device() {
                true => None,
                false => Some(file.allocated().map_err(seeing)?),
            },
            parent: parent.map(ImageSpec::to_string),
        })
    }
}
