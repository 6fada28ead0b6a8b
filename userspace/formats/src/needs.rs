// SPDX-License-Identifier: MIT OR Apache-2.0
//! Files that an image needs beside itself, as its header names them: the program that opens the image decides whether
//! it gets them.

/// Result of a first look at an image's header. No name in it was followed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageNeeds {
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of a logical sector, if the image stores them; otherwise they are those of its parent, or 512.
    pub sector: Option<u32>,
    /// Parent image; `None` if the image has none.
    pub parent: Option<Parent>,
    /// The files that hold the content, in the order of the disk; empty if the image does.
    pub extents: Vec<ExtentFile>,
}

/// A parent, as the image names it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parent {
    /// Its names, the best first: absolute, or from the folder of the image. An image may hold
    /// several that were true in different places.
    pub names: Vec<String>,
    /// The driver that the image asks for, if it says so.
    pub driver: Option<String>,
    /// Identity of the parent's content, if the image has it: a parent with another one has other content.
    pub id: Option<String>,
    /// Another name that it may have instead: the child was being merged into it.
    pub other_id: Option<String>,
}

/// A file that holds a part of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtentFile {
    /// Its name: absolute, or from the folder of the image.
    pub name: String,
    /// True if it may only be read.
    pub read_only: bool,
}
