// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tapimg map`: where there is data.

use crate::cli::Map;
use crate::open::{failed, ImageOpener};
use crate::Error;
use control::json_line;
use drivers::{Content, Extent};
use serde::Serialize;
use std::io::{self, Write};

/// Bytes for which extents are requested at once.
const SOME: u64 = 1 << 30;

/// Writes a map, as it is found: it may be long.
pub(crate) async fn map(
    opener: &ImageOpener,
    args: &Map,
    json: bool,
    out: &mut dyn Write,
) -> Result<(), Error> {
    let image = &args.image;
    let (disk, shape) = opener.disk(image, None).await?;
    let mut rows = Rows {
        out,
        json,
        count: 0,
    };
    rows.begin(&image.to_string(), shape.size)?;
    let mut row: Option<(u64, Extent)> = None;
    let mut at = 0;
    while at < shape.size {
        let some = (shape.size - at).min(SOME);
        let found = match args.layer {
            true => disk.layer(at, some).await,
            false => disk.extents(at, some).await,
        };
        for extent in found.map_err(|error| failed("find out what is in", image, at, error))? {
            match &mut row {
                Some((_, last)) if last.content == extent.content => last.len += extent.len,
                _ => {
                    if let Some((begin, last)) = row.replace((at, extent)) {
                        rows.add(begin, last)?;
                    }
                }
            }
            at += extent.len;
        }
    }
    if let Some((begin, last)) = row {
        rows.add(begin, last)?;
    }
    rows.end()
}

/// Data of a disk.
#[derive(Serialize)]
struct DiskExtents {
    /// The image, as the command line names it.
    image: String,
    /// Bytes of the disk.
    size: u64,
    /// Ranges of the disk, in order: all of it.
    extents: [MapRange; 0],
}

/// A range of a disk.
#[derive(Serialize)]
struct MapRange {
    /// First byte.
    offset: u64,
    /// Bytes.
    length: u64,
    /// Content of the range.
    content: MapContent,
}

/// Content of a range.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
enum MapContent {
    /// Data.
    Data,
    /// Zeroes, which take no space.
    Hole,
    /// The content of the backing image, with `--layer`.
    Below,
}

struct Rows<'o> {
    out: &'o mut dyn Write,
    json: bool,
    count: u64,
}

impl Rows<'_> {
    fn begin(&mut self, image: &str, size: u64) -> Result<(), Error> {
        match self.json {
            true => {
                let map = DiskExtents {
                    image: image.into(),
                    size,
                    extents: [],
                };
                // The ranges follow in the same object.
                let begin = json_line(&map).map_err(io::Error::other)?;
                write!(self.out, "{}", begin.trim_end_matches("]}"))?;
            }
            false => writeln!(self.out, "{:>18} {:>18} CONTENT", "OFFSET", "LENGTH")?,
        }
        Ok(())
    }

    fn add(&mut self, offset: u64, extent: Extent) -> Result<(), Error> {
        let content = match extent.content {
            Content::Data => "data",
            Content::Hole => "hole",
            Content::Below => "below",
        };
        let length = extent.len;
        match self.json {
            true => {
                let comma = if self.count > 0 { "," } else { "" };
                let range = MapRange {
                    offset,
                    length,
                    content: match extent.content {
                        Content::Data => MapContent::Data,
                        Content::Hole => MapContent::Hole,
                        Content::Below => MapContent::Below,
                    },
                };
                let range = serde_json::to_string(&range).map_err(io::Error::other)?;
                write!(self.out, "{comma}{range}")?;
            }
            false => writeln!(self.out, "{offset:>18} {length:>18} {content}")?,
        }
        self.count += 1;
        Ok(())
    }

    fn end(&mut self) -> Result<(), Error> {
        if self.json {
            writeln!(self.out, "]}}")?;
        }
        Ok(self.out.flush()?)
    }
}
