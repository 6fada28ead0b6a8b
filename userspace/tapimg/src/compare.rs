// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tapimg compare`: whether guests see the same.

use crate::cli::Compare;
use crate::dirty_runs::difference;
use crate::open::ImageOpener;
use crate::part::WorkPace;
use crate::progress::Progress;
use crate::walk::{self, Piece, Side, Walk};
use control::Failure;
use serde::Serialize;
use std::cell::Cell;

/// How two disks differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct DiskDifference {
    /// The disks have the same content.
    identical: bool,
    /// The first byte that differs.
    #[serde(skip_serializing_if = "Option::is_none")]
    first_difference: Option<u64>,
    /// Bytes of each.
    sizes: [u64; 2],
}

impl DiskDifference {
    pub(crate) fn is_good(&self) -> bool {
        self.identical
    }

    pub(crate) fn text(&self) -> String {
        let [one, other] = self.sizes;
        match (self.first_difference, self.identical) {
            (Some(at), _) => format!("they differ, first at byte {at}\n"),
            (None, true) if one == other => "they are the same\n".into(),
            (None, true) => {
                format!("they are the same, but one has {one} bytes and the other {other}: the rest is zeroes\n")
            }
            (None, false) => format!("they differ: one has {one} bytes and the other {other}\n"),
        }
    }
}

/// Compares.
pub(crate) async fn compare(
    opener: &ImageOpener,
    args: &Compare,
) -> Result<DiskDifference, Failure> {
    let images = [&args.one, &args.other];
    let ranges = args.part.ranges()?;
    let (one, its) = opener.disk(images[0], None).await?;
    let (other, others) = opener.disk(images[1], None).await?;
    let disks = [one, other];
    let sizes = [its.size, others.size];
    if args.strict && sizes[0] != sizes[1] {
        return Ok(DiskDifference {
            identical: false,
            first_difference: None,
            sizes,
        });
    }
    let all = sizes[0].max(sizes[1]);
    let len = ranges.as_ref().map_or(all, |ranges| ranges.bytes(all));
    let progress = Progress::new(len, args.progress);
    let pace = WorkPace::new(args.part.rate);
    let first = Cell::new(None);
    let side = |number: usize| Side::new(images[number], &disks[number], sizes[number]);
    let (disks, progress_ref, first_ref, pace) = (&disks, &progress, &first, &pace);
    let work = move |piece: Piece<2>| async move {
        let Piece { offset, len, data } = piece;
        let mut seen = [None, None];
        for number in 0..2 {
            if data[number] {
                let (image, disk) = (images[number], &disks[number]);
                seen[number] = Some(walk::read(&opener.io, image, disk, offset, len).await?);
            }
        }
        if let Some(at) = difference(seen[0].as_ref(), seen[1].as_ref()) {
            let at = offset + at as u64;
            let before = first_ref.get().unwrap_or(u64::MAX);
            first_ref.set(Some(at.min(before)));
        }
        progress_ref.add(len);
        match data.contains(&true) {
            true => pace.pay(&opener.io, len).await,
            false => Ok(()),
        }
    };
    // Pieces before the difference are done or under way when it is found.
    let done = Walk::new([side(0), side(1)], all)
        .within(ranges)
        .each(|| first.get().is_some(), work)
        .await;
    progress.end();
    done?;
    Ok(DiskDifference {
        identical: first.get().is_none(),
        first_difference: first.get(),
        sizes,
    })
}
