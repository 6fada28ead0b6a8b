// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tapimg convert`: the same disk in another image.

use crate::chain::refuse_damage;
use crate::cli::Convert;
use crate::create::{apart, check, make, Parent};
use crate::dirty_runs::{runs, Run};
use crate::image_spec::ImageSpec;
use crate::made::{ConvertResult, MadeImage};
use crate::open::{failed, ImageOpener};
use crate::packed;
use crate::part::{DiskRanges, WorkPace};
use crate::progress::Progress;
use crate::salvage::Lost;
use crate::sector::of_new;
use crate::signals::Stop;
use crate::target::Target;
use crate::walk::{self, Piece, Side, Walk};
use control::Failure;
use diskio::{Bytes, Data, Errno, Io};
use drivers::Disk;
use formats::qcow2::Compression;
use formats::{Below, ImageFormat, Options};
use std::cell::Cell;
use std::rc::Rc;

/// Source of a copy.
pub(crate) struct Copy<'c> {
    pub(crate) io: &'c Io,
    from: (&'c ImageSpec, Disk),
    /// Bytes of the disk.
    pub(crate) size: u64,
    /// Bytes of a logical sector of the new disk.
    pub(crate) sector: u32,
    /// Backing image of the new image.
    pub(crate) parent: Option<(&'c ImageSpec, &'c Parent)>,
    /// Unreadable parts become zeroes, and are collected here.
    lost: Option<Rc<Lost>>,
    /// The parts that may differ from the parent.
    ranges: Option<DiskRanges>,
    pace: WorkPace,
    /// Bytes of the disk that the new image has itself.
    copied: Cell<u64>,
}

/// Destination of a copy that is not compressed.
struct PlainCopy<'c> {
    from: &'c Copy<'c>,
    to: (&'c ImageSpec, Disk),
    /// Parts that the copy leaves out may not be zeroes.
    is_dirty: bool,
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
    packed::check(args)?;
    let ranges = args.part.ranges()?;
    if ranges.is_some() && layout.parent.is_none() {
        return Err(Failure::invalid(
            "--changed leaves the rest to the parent, and there is none: name it with --parent",
        ));
    }
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
    let all = ranges.as_ref();
    let all = all.map_or(shape.size, |ranges| ranges.bytes(shape.size));
    let progress = Progress::new(all, args.progress);
    let copy = Copy {
        io: &opener.io,
        from: (from, disk),
        size: shape.size,
        sector,
        parent: layout.parent.as_ref().zip(parent.as_ref()),
        lost: lost.clone(),
        ranges,
        pace: WorkPace::new(args.part.rate),
        copied: Cell::new(0),
    };
    let work = async {
        let file = target.file();
        match args.compress {
            Some(how) => packed::copy(opener, args, how, &copy, file, stop, &progress).await,
            None => plain(opener, args, &copy, &target, stop, &progress).await,
        }
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
                copied: copy.copied.get(),
                lost: lost.map(Lost::bytes),
                lost_at: lost.map(Lost::first).unwrap_or_default(),
            })
        }
        Err(failure) => Err(target.give_up(failure).await),
    }
}

/// Whether unused parts of a new image may differ from zeroes: the storage has old data there, or zeroes that are none
/// once they are decrypted.
fn starts_dirty(image: &ImageSpec, target: &Target) -> bool {
    match image.kind {
        Below::Raw => target.is_device(),
        Below::Format(kind) => kind == ImageFormat::Luks,
    }
}

/// Copies into an image of any format.
async fn plain(
    opener: &ImageOpener,
    args: &Convert,
    copy: &Copy<'_>,
    target: &Target,
    stop: &Stop,
    progress: &Progress,
) -> Result<(), Failure> {
    let (to, layout, file) = (&args.to, &args.layout, target.file());
    let parent = copy.parent.map(|(_, parent)| parent);
    let compression = Compression::Zlib;
    let shape = (copy.size, copy.sector);
    make(file, to, shape, layout, compression, parent)
        .await
        .map_err(|failure| to.said(failure))?;
    let options = Options::new(to.path.display().to_string());
    let (new, its) = opener.disk_of(to, file.clone(), options).await?;
    if its.size > copy.size {
        diskio::say!(
            "tapimg: {to} has {} bytes more than the disk: they stay as they are",
            its.size - copy.size
        );
    }
    let all = PlainCopy {
        from: copy,
        to: (to, new.clone()),
        is_dirty: starts_dirty(to, target),
    };
    let all = &all;
    let each = move |piece: Piece<2>| async move {
        all.piece(piece).await?;
        progress.add(piece.len);
        let has_data = piece.data[0];
        all.from.pay(if has_data { piece.len } else { 0 }).await
    };
    copy.walk().each(|| stop.is_wanted(), each).await?;
    stop.check(progress, "")?;
    let last = |error: Errno| failed("finish", to, copy.size, error);
    new.flush().await.map_err(last)?;
    new.inactivate().await.map_err(last)
}

impl Copy<'_> {
    /// The disk and the one below the new image, side by side.
    pub(crate) fn walk(&self) -> Walk<2> {
        let source = Side::new(self.from.0, &self.from.1, self.size).salvaged(self.lost.clone());
        // Without a parent there is a hole in its place.
        let under = match self.parent {
            Some((image, parent)) => Side::new(image, &parent.disk, parent.size),
            None => Side::new(self.from.0, &self.from.1, 0),
        };
        Walk::new([source, under], self.size).within(self.ranges.clone())
    }

    /// Waits after a read of `bytes`, if the copy has a rate.
    pub(crate) async fn pay(&self, bytes: u64) -> Result<(), Failure> {
        self.pace.pay(self.io, bytes).await
    }

    /// Counts bytes that the new image has itself.
    pub(crate) fn count(&self, bytes: u64) {
        self.copied.set(self.copied.get() + bytes);
    }

    /// True if only some ranges are copied.
    pub(crate) fn is_partial(&self) -> bool {
        self.ranges.is_some()
    }

    /// Reads a piece of what is copied.
    pub(crate) async fn source(&self, offset: u64, len: u64) -> Result<Data, Failure> {
        let (from, disk) = &self.from;
        match (
            walk::read(self.io, from, disk, offset, len).await,
            &self.lost,
        ) {
            (Err(_), Some(lost)) => lost.read(self.io, disk, offset, len).await,
            (read, _) => read,
        }
    }
}

impl PlainCopy<'_> {
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
            true => self.from.source(offset, len).await?,
            // CAST: at most a piece.
            false => {
                Data::zeroed(len as usize).map_err(|error| failed("write", to, offset, error))?
            }
        };
        let below = match self.from.parent {
            Some((image, parent)) if is_below => {
                Some(walk::read(self.from.io, image, &parent.disk, offset, len).await?)
            }
            _ => None,
        };
        if self.is_dirty {
            self.from.count(if is_data { len } else { 0 });
            return walk::write(to, new, offset, Bytes::from(source)).await;
        }
        let runs = runs(&source, below.as_ref());
        let source = Bytes::from(source);
        for run in runs {
            match run {
                Run::Data(range) => {
                    let at = offset + range.start as u64;
                    self.from.count(range.len() as u64);
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
