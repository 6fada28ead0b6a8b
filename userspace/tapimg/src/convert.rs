// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tapimg convert`: the same disk in another image.

use crate::chain::refuse_damage;
use crate::cli::Convert;
use crate::create::{apart, check, make, Parent};
use crate::made::{ConvertResult, MadeImage};
use crate::named::Named;
use crate::open::{failed, ImageOpener};
use crate::progress::Progress;
use crate::runs::{runs, Run};
use crate::salvage::Lost;
use crate::sector::of_new;
use crate::stop::Stop;
use crate::target::Target;
use crate::walk::{self, Piece, Side, Walk};
use control::Failure;
use diskio::{Bytes, Data, Errno, Io};
use drivers::Disk;
use formats::{Below, ImageFormat, Options};
use std::rc::Rc;

/// Source and destination of a copy.
struct Copy<'c> {
    io: &'c Io,
    from: (&'c Named, Disk),
    to: (&'c Named, Disk),
    /// Backing image of the new image.
    parent: Option<(&'c Named, Disk)>,
    /// Parts that the copy leaves out may not be zeroes.
    is_dirty: bool,
    /// Unreadable parts become zeroes, and are collected here.
    lost: Option<Rc<Lost>>,
}

/// Converts.
pub(crate) async fn convert(
    opener: &ImageOpener,
    stop: &Stop,
    args: &Convert,
) -> Result<ConvertResult, Failure> {
    let (from, to, layout) = (&args.from, &args.to, &args.layout);
    apart(from, to)?;
    check(to, layout)?;
    let snapshot = args.snapshot.as_deref();
    let (disk, shape) = opener.disk(from, snapshot).await?;
    let lost = args.damaged.then(|| Rc::new(Lost::new(&shape)));
    if !args.damaged {
        refuse_damage(opener, from).await?;
    }
    let parent = match &layout.parent {
        Some(parent) => Some(Parent::open(opener, parent, to).await?),
        None => None,
    };
    let (its, below) = (Some(shape.logical_block), parent.as_ref());
    let sector = of_new(opener, to, layout, shape.size, its, below).await?;
    let target = Target::begin(opener, to, args.force).await?;
    let progress = Progress::new(shape.size, args.progress);
    let work = async {
        let file = target.file();
        make(file, to, (shape.size, sector), layout, parent.as_ref())
            .await
            .map_err(|failure| to.said(failure))?;
        let options = Options::new(to.path.display().to_string());
        let (new, its) = opener.disk_of(to, file.clone(), options).await?;
        if its.size > shape.size {
            diskio::say!(
                "tapimg: {to} has {} bytes more than the disk: they stay as they are",
                its.size - shape.size
            );
        }
        let copy = Copy {
            io: &opener.io,
            from: (from, disk.clone()),
            to: (to, new.clone()),
            parent: layout
                .parent
                .as_ref()
                .zip(parent.as_ref())
                .map(|(image, parent)| (image, parent.disk.clone())),
            is_dirty: starts_dirty(to, &target),
            lost: lost.clone(),
        };
        let below = parent.as_ref().map_or(0, |parent| parent.size);
        copy.all(shape.size, below, stop, &progress).await?;
        let last = |error: Errno| failed("finish", to, shape.size, error);
        new.flush().await.map_err(last)?;
        new.inactivate().await.map_err(last)
    };
    let done = work.await;
    progress.end();
    match done {
        Ok(()) => {
            let file = target.keep().await?;
            let lost = lost.as_deref();
            if let Some(text) = lost.and_then(|lost| lost.text(from)) {
                diskio::say!("tapimg: {text}");
            }
            Ok(ConvertResult {
                from: from.to_string(),
                made: MadeImage::new(to, shape.size, &file, layout.parent.as_ref())?,
                lost: lost.map(Lost::bytes),
                lost_at: lost.map(Lost::first).unwrap_or_default(),
            })
        }
        Err(failure) => Err(target.give_up(failure).await),
    }
}

/// Whether unused parts of a new image may differ from zeroes: the storage has old data there, or zeroes that are none
/// once they are decrypted.
fn starts_dirty(image: &Named, target: &Target) -> bool {
    match image.kind {
        Below::Raw => target.is_device(),
        Below::Format(kind) => kind == ImageFormat::Luks,
    }
}

impl Copy<'_> {
    /// Copies `size` bytes; the disk below has `below`.
    async fn all(
        &self,
        size: u64,
        below: u64,
        stop: &Stop,
        progress: &Progress,
    ) -> Result<(), Failure> {
        let source = Side::new(self.from.0, &self.from.1, size).salvaged(self.lost.clone());
        // Without a parent there is a hole in its place.
        let (image, disk) = self.parent.as_ref().unwrap_or(&self.from);
        let under = Side::new(image, disk, below);
        let walk = Walk::new([source, under], size);
        let each = move |piece: Piece<2>| async move {
            self.piece(piece).await?;
            progress.add(piece.len);
            Ok(())
        };
        walk.each(|| stop.is_wanted(), each).await?;
        stop.check(progress, "")
    }

    /// Reads a piece of what is copied.
    async fn source(&self, offset: u64, len: u64) -> Result<Data, Failure> {
        let (from, disk) = &self.from;
        match (
            walk::read(self.io, from, disk, offset, len).await,
            &self.lost,
        ) {
            (Err(_), Some(lost)) => lost.read(self.io, disk, offset, len).await,
            (read, _) => read,
        }
    }

    async fn piece(&self, piece: Piece<2>) -> Result<(), Failure> {
        let Piece { offset, len, data } = piece;
        let [is_data, is_below] = data;
        let (to, new) = &self.to;
        if !is_data && !is_below {
            return match self.is_dirty {
                true => walk::zero(to, new, offset, len).await,
                false => Ok(()),
            };
        }
        let source = match is_data {
            true => Some(self.source(offset, len).await?),
            false => None,
        };
        let below = match &self.parent {
            Some((image, disk)) if is_below => {
                Some(walk::read(self.io, image, disk, offset, len).await?)
            }
            _ => None,
        };
        let Some(source) = source else {
            // CAST: at most a piece.
            let zeroes = Data::zeroed(len as usize);
            let zeroes = zeroes.map_err(|error| failed("write", to, offset, error))?;
            for run in runs(&zeroes, below.as_ref()) {
                if let Run::Zero(range) = run {
                    let at = offset + range.start as u64;
                    walk::zero(to, new, at, range.len() as u64).await?;
                }
            }
            return Ok(());
        };
        if self.is_dirty {
            return walk::write(to, new, offset, Bytes::from(source)).await;
        }
        let runs = runs(&source, below.as_ref());
        let source = Bytes::from(source);
        for run in runs {
            match run {
                Run::Data(range) => {
                    let at = offset + range.start as u64;
                    let part = source.part(range.start, range.len());
                    walk::write(to, new, at, part).await?;
                }
                Run::Zero(range) => {
                    let at = offset + range.start as u64;
                    walk::zero(to, new, at, range.len() as u64).await?;
                }
            }
        }
        Ok(())
    }
}
