// SPDX-License-Identifier: MIT OR Apache-2.0
//! What an image needs beside itself, as its header says: who opens it decides whether it gets that.

/// What was found by a first look at an image's header. Nothing of it was followed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Bytes of the disk.
    pub size: u64,
    /// What the image goes on from.
    pub parent: Option<Parent>,
    /// The files that hold the content, in the order of the disk; empty if the image does.
    pub extents: Vec<Extent>,
}

/// A parent, as the image names it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parent {
    /// Its names, the best first: absolute, or from the folder of the image. An image may hold
    /// several that were true in different places.
    pub names: Vec<String>,
    /// The driver that the image asks for, if it says so.
    pub driver: Option<String>,
    /// What the parent calls itself, if the image knows: another one has other content.
    pub id: Option<String>,
    /// Another name that it may have instead: the child was being merged into it.
    pub other_id: Option<String>,
}

/// A file that holds a part of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Its name: absolute, or from the folder of the image.
    pub name: String,
    /// It is only to be read.
    pub read_only: bool,
}
