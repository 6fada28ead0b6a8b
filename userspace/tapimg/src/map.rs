// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tapimg map`: where there is data.

use crate::cli::Map;
use crate::open::{failed, ImageOpener};
use crate::Error;
use drivers::{Content, Extent};
use std::io::Write;

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

struct Rows<'o> {
    out: &'o mut dyn Write,
    json: bool,
    count: u64,
}

impl Rows<'_> {
    fn begin(&mut self, image: &str, size: u64) -> Result<(), Error> {
        match self.json {
            true => {
                let image = serde_json::Value::from(image).to_string();
                let image = control::shown_json(&image);
                write!(
                    self.out,
                    "{{\"json_version\":{},\"image\":{image},\"size\":{size},\"extents\":[",
                    control::JSON_VERSION
                )?;
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
                write!(
                    self.out,
                    "{comma}{{\"offset\":{offset},\"length\":{length},\"content\":\"{content}\"}}"
                )?;
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
