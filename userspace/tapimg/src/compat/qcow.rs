// SPDX-License-Identifier: MIT OR Apache-2.0
//! `qcow-create`, `img2qcow` and `qcow2raw`, as blktap had them.

use super::{mib, named};
use crate::cli;
use crate::image_spec::ImageSpec;
use crate::open::ImageOpener;
use crate::signals::Stop;
use crate::{convert, create};
use clap::Parser;
use control::Failure;
use formats::{Below, ImageFormat};
use std::path::PathBuf;

const QCOW: Below = Below::Format(ImageFormat::Qcow);

/// Makes a qcow image, with the options of blktap's program of this name.
///
/// An existing image is replaced, unless it is in use.
#[derive(Debug, Parser)]
#[command(name = "qcow-create", version)]
pub(super) struct Make {
    /// Accepted without effect: space is allocated by writes
    #[arg(short)]
    reserve: bool,
    #[command(flatten)]
    parents: Parents,
    /// Size of the disk in MiB
    #[arg(value_name = "SIZE")]
    size: u64,
    /// The image
    #[arg(value_name = "FILE")]
    image: PathBuf,
    /// Backing image, which must not change any more
    #[arg(value_name = "BACKING")]
    parent: Option<PathBuf>,
}

/// Makes a qcow image of a raw one, as blktap's program of this name.
///
/// An existing image is replaced, unless it is in use.
#[derive(Debug, Parser)]
#[command(name = "img2qcow", version)]
pub(super) struct FromRaw {
    /// The image to make
    #[arg(value_name = "QCOW")]
    to: PathBuf,
    /// The raw image
    #[arg(value_name = "RAW")]
    from: PathBuf,
}

/// Makes a raw image of a qcow one and all that lies below it, as blktap's program of this name.
///
/// An existing image is replaced, unless it is in use; onto a device only its content is.
#[derive(Debug, Parser)]
#[command(name = "qcow2raw", version)]
pub(super) struct ToRaw {
    #[command(flatten)]
    parents: Parents,
    /// The image to make
    #[arg(value_name = "RAW")]
    to: PathBuf,
    /// The qcow image
    #[arg(value_name = "QCOW")]
    from: PathBuf,
}

#[derive(Debug, clap::Args)]
struct Parents {
    /// Kind of the images below, which a qcow image does not name: aio (raw) or qcow. This program never guesses it,
    /// because a guest controls the content
    #[arg(short = 'f', value_name = "KIND", default_value = "aio")]
    parents: cli::ParentKind,
}

impl Make {
    pub(super) fn parents(&self) -> Option<Below> {
        Some(self.parents.parents.0)
    }

    pub(super) async fn run(&self, opener: &ImageOpener) -> Result<String, Failure> {
        let parent = self.parent.as_deref();
        let layout = cli::Layout {
            parent: parent
                .map(|path| named(path, self.parents.parents.0))
                .transpose()?,
            ..cli::Layout::default()
        };
        let create = cli::CreateImage {
            image: named(&self.image, QCOW)?,
            size: Some(control::NewSize::Bytes(mib(self.size)?.0)),
            layout,
            force: true,
        };
        let made = create::create(opener, &create).await;
        made.map(|_| String::new())
    }
}

impl FromRaw {
    pub(super) async fn run(&self, opener: &ImageOpener) -> Result<String, Failure> {
        copy(
            opener,
            named(&self.from, Below::Raw)?,
            named(&self.to, QCOW)?,
        )
        .await
    }
}

impl ToRaw {
    pub(super) fn parents(&self) -> Option<Below> {
        Some(self.parents.parents.0)
    }

    pub(super) async fn run(&self, opener: &ImageOpener) -> Result<String, Failure> {
        copy(
            opener,
            named(&self.from, QCOW)?,
            named(&self.to, Below::Raw)?,
        )
        .await
    }
}

async fn copy(opener: &ImageOpener, from: ImageSpec, to: ImageSpec) -> Result<String, Failure> {
    let convert = cli::Convert {
        from,
        to,
        layout: cli::Layout::default(),
        compress: None,
        snapshot: None,
        damaged: false,
        part: cli::Part::default(),
        force: true,
        progress: false,
    };
    let made = convert::convert(opener, &Stop::default(), &convert).await;
    made.map(|_| String::new())
}

#[cfg(test)]
mod tests {
    use super::{FromRaw, Make, ToRaw};
    use clap::{CommandFactory, Parser};

    #[test]
    fn descriptions_are_sound() {
        Make::command().debug_assert();
        FromRaw::command().debug_assert();
        ToRaw::command().debug_assert();
    }

    #[test]
    fn lines_of_old_scripts_are_understood() {
        for line in [
            "qcow-create 1024 /a.qcow",
            "qcow-create -r 1024 /a.qcow",
            "qcow-create 1024 /b.qcow /a.img",
            "qcow-create -f qcow 1024 /b.qcow /a.qcow",
        ] {
            assert!(Make::try_parse_from(line.split(' ')).is_ok(), "{line}");
        }
        assert!(FromRaw::try_parse_from(["img2qcow", "/a.qcow", "/a.img"]).is_ok());
        assert!(ToRaw::try_parse_from(["qcow2raw", "/dev/vg/a", "/a.qcow"]).is_ok());
        assert!(Make::try_parse_from(["qcow-create", "-f", "guess", "1", "/a"]).is_err());
    }
}
