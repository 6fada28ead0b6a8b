// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tapimg check`: whether an image is damaged.

use crate::cli::Check;
use crate::image_spec::ImageSpec;
use crate::open::{ImageOpener, Use};
use crate::walk::PIECE;
use control::{Code, Failure};
use diskio::{Data, Errno};
use drivers::{Content, Disk};
use formats::{qcow2, vhd, Below, ImageFormat};
use serde::Serialize;
use std::fmt::Write;

/// Bytes of the disk whose extents are requested at once, so that a hole takes few requests.
const ASKED: u64 = 1 << 30;

/// Places that are named; more are counted.
const NAMED: usize = 16;

/// Findings of a check.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Findings {
    /// Nothing is wrong that would do harm.
    sound: bool,
    /// qcow2: clusters that are unused and that are not free. They do no harm.
    #[serde(skip_serializing_if = "Option::is_none")]
    leaks: Option<u64>,
    /// qcow2: clusters that are used and that a later write may allocate once more.
    #[serde(skip_serializing_if = "Option::is_none")]
    unsafe_clusters: Option<u64>,
    /// qcow2: entries of tables that cannot be.
    #[serde(skip_serializing_if = "Option::is_none")]
    damaged_entries: Option<u64>,
    /// qcow2: entries of tables with bits that have no meaning.
    #[serde(skip_serializing_if = "Option::is_none")]
    reserved_bits: Option<u64>,
    /// qcow2: clusters with a table in which something else is, too.
    #[serde(skip_serializing_if = "Option::is_none")]
    overlapping_tables: Option<u64>,
    /// qcow2: refcount structures that cannot be where their table has them.
    #[serde(skip_serializing_if = "Option::is_none")]
    misplaced_refcounts: Option<u64>,
    /// qcow2: entries whose cluster has other users, which they deny.
    #[serde(skip_serializing_if = "Option::is_none")]
    shared_entries: Option<u64>,
    /// qcow2: entries that do not say that their cluster has no other user. They do no harm.
    #[serde(skip_serializing_if = "Option::is_none")]
    unmarked_entries: Option<u64>,
    /// Findings before the repair.
    #[serde(skip_serializing_if = "Option::is_none")]
    repaired: Option<Repaired>,
    /// VHD: what is wrong with one of its two footers. The other one is enough to serve it.
    #[serde(skip_serializing_if = "Option::is_none")]
    footers: Option<String>,
    /// Why the image cannot be used at all.
    #[serde(skip_serializing_if = "Option::is_none")]
    refused: Option<String>,
    /// Pieces of the disk that cannot be read.
    unreadable: u64,
    /// Where the first of them begin.
    unreadable_at: Vec<u64>,
}

/// Findings that were repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct Repaired {
    /// Number of `leaks`.
    leaks: u64,
    /// Number of `unsafe_clusters`.
    unsafe_clusters: u64,
    /// Number of `misplaced_refcounts`.
    misplaced_refcounts: u64,
    /// Number of `shared_entries`.
    shared_entries: u64,
    /// Number of `unmarked_entries`.
    unmarked_entries: u64,
}

impl Findings {
    pub(crate) fn is_good(&self) -> bool {
        self.sound
    }

    /// Returns the findings without a damaged footer of which there is another one.
    pub(crate) fn without_footers(self) -> Self {
        let is_all = self.footers.is_some() && self.refused.is_none() && self.unreadable == 0;
        Self {
            sound: self.sound || is_all,
            footers: None,
            ..self
        }
    }

    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        let mut say = |line: String| {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{line}");
        };
        if let Some(done) = self.repaired {
            say(format!(
                "repaired: {} clusters were lost, {} had too small a refcount, {} entries had a wrong flag",
                done.leaks,
                done.unsafe_clusters,
                done.shared_entries + done.unmarked_entries
            ));
            if done.misplaced_refcounts > 0 {
                say("repaired: the refcounts were where something else is, and are in another place now".into());
            }
        }
        if let Some(why) = &self.refused {
            say(why.clone());
        }
        if let Some(why) = &self.footers {
            say(format!(
                "{why}: if the disk is what it should be, make a new image: `tapimg convert IMAGE NEW`"
            ));
        }
        let many = |count: Option<u64>| count.filter(|count| *count > 0);
        if let Some(count) = many(self.damaged_entries) {
            say(format!(
                "{count} entries of tables cannot be: what they held is lost; copy what is left: `tapimg convert --damaged IMAGE NEW`"
            ));
        }
        if let Some(count) = many(self.overlapping_tables) {
            say(format!(
                "{count} clusters with tables are used by something else, too: do not write to the image; copy it: \
                 `tapimg convert IMAGE NEW`"
            ));
        }
        if let Some(count) = many(self.reserved_bits) {
            say(format!(
                "{count} entries of tables have bits that have no meaning: copy the image: `tapimg convert IMAGE NEW`"
            ));
        }
        if let Some(count) = many(self.misplaced_refcounts) {
            say(format!(
                "{count} refcount structures are where they cannot be, or where something else is: do not write to the \
                 image before `tapimg check --repair IMAGE`"
            ));
        }
        if let Some(count) = many(self.shared_entries) {
            say(format!(
                "{count} entries deny that their cluster has other users: do not write to the image before `tapimg check \
                 --repair IMAGE`"
            ));
        }
        if let Some(count) = many(self.unsafe_clusters) {
            say(format!(
                "{count} clusters are in use and may be allocated once more: do not write to the image before \
                 `tapimg check --repair IMAGE`"
            ));
        }
        if let Some(count) = many(self.leaks) {
            say(format!(
                "{count} clusters are lost, which does no harm: `tapimg check --repair IMAGE` takes them back"
            ));
        }
        if let Some(count) = many(self.unmarked_entries) {
            say(format!(
                "{count} entries do not say that their cluster has no other user, which does no harm: `tapimg check \
                 --repair IMAGE` mends it"
            ));
        }
        if self.unreadable > 0 {
            let places: Vec<String> = self.unreadable_at.iter().map(u64::to_string).collect();
            let more = self.unreadable - self.unreadable_at.len() as u64;
            let more = if more > 0 {
                format!(" and {more} more")
            } else {
                String::new()
            };
            say(format!(
                "the disk cannot be read at byte {}{more}: its tables or its storage are damaged",
                places.join(", ")
            ));
        }
        say(match self.sound {
            true => "nothing is wrong".into(),
            false => "the image is damaged".into(),
        });
        text
    }
}

/// Checks.
pub(crate) async fn check(opener: &ImageOpener, args: &Check) -> Result<Findings, Failure> {
    let image = &args.image;
    let is_qcow2 = image.kind == Below::Format(ImageFormat::Qcow2);
    if args.repair && !is_qcow2 {
        return Err(Failure::invalid(format!(
            "{image}: only qcow2 images have something that can be repaired: leave --repair out"
        )));
    }
    let mut findings = Findings::default();
    let tables = match is_qcow2 {
        true => refcounts(opener, image, args.repair, &mut findings).await,
        false => Ok(()),
    };
    let tables = match tables {
        Ok(()) if image.kind == Below::Format(ImageFormat::Vhd) => {
            footers(opener, image, &mut findings).await
        }
        tables => tables,
    };
    let walked = match tables {
        Ok(()) => walk(opener, image, args.data, &mut findings).await,
        refused => refused,
    };
    match walked {
        Err(failure) if matches!(failure.code, Code::Image) => {
            findings.refused = Some(failure.message);
        }
        result => result?,
    }
    let none = |count: Option<u64>| count.unwrap_or(0) == 0;
    findings.sound = findings.refused.is_none()
        && findings.footers.is_none()
        && findings.unreadable == 0
        && none(findings.damaged_entries)
        && none(findings.reserved_bits)
        && none(findings.overlapping_tables)
        && none(findings.misplaced_refcounts)
        && none(findings.shared_entries)
        && none(findings.unsafe_clusters);
    Ok(findings)
}

/// Compares refcounts with what is used.
async fn refcounts(
    opener: &ImageOpener,
    image: &ImageSpec,
    repair: bool,
    findings: &mut Findings,
) -> Result<(), Failure> {
    let how = if repair { Use::Write } else { opener.reading };
    let file = opener.file(&image.path, how).await?;
    let name = image.path.display().to_string();
    if repair {
        match qcow2::check(&file, &name, true).await {
            Ok(found) => {
                findings.repaired = Some(Repaired {
                    leaks: found.leaks,
                    unsafe_clusters: found.unsafe_clusters,
                    misplaced_refcounts: found.refcounts,
                    shared_entries: found.shared,
                    unmarked_entries: found.unmarked,
                });
            }
            // The faults are reported nevertheless.
            Err(failure) if matches!(failure.code, Code::Image) => {
                findings.refused = Some(failure.message);
            }
            Err(failure) => return Err(failure),
        }
    }
    let found = qcow2::check(&file, &name, false).await?;
    findings.leaks = Some(found.leaks);
    findings.unsafe_clusters = Some(found.unsafe_clusters);
    findings.damaged_entries = Some(found.damaged);
    findings.reserved_bits = Some(found.reserved);
    findings.overlapping_tables = Some(found.overlaps);
    findings.misplaced_refcounts = Some(found.refcounts);
    findings.shared_entries = Some(found.shared);
    findings.unmarked_entries = Some(found.unmarked);
    Ok(())
}

/// Looks at both footers of a VHD.
async fn footers(
    opener: &ImageOpener,
    image: &ImageSpec,
    findings: &mut Findings,
) -> Result<(), Failure> {
    let file = opener.file(&image.path, opener.reading).await?;
    let found = vhd::footers(&file).await;
    findings.footers = found.map_err(|failure| image.said(failure))?;
    Ok(())
}

/// Looks at all that leads to data, and perhaps at that.
async fn walk(
    opener: &ImageOpener,
    image: &ImageSpec,
    data: bool,
    findings: &mut Findings,
) -> Result<(), Failure> {
    let (disk, shape) = opener.disk(image, None).await?;
    let mut at = 0;
    while at < shape.size {
        let all = shape.size - at;
        if let Ok(len) = seen(opener, &disk, at, all.min(ASKED), data).await {
            at += len;
            continue;
        }
        // Of a large range this may be what is at its end.
        let some = all.min(PIECE - at % PIECE);
        at += match seen(opener, &disk, at, some, data).await {
            Ok(len) => len,
            Err(_) => {
                findings.unreadable += 1;
                if findings.unreadable_at.len() < NAMED {
                    findings.unreadable_at.push(at);
                }
                some
            }
        };
    }
    Ok(())
}

/// How many bytes from `at` on can be read: an error if none can.
async fn seen(
    opener: &ImageOpener,
    disk: &Disk,
    at: u64,
    len: u64,
    data: bool,
) -> Result<u64, Errno> {
    let mut done = 0;
    for extent in disk.extents(at, len).await? {
        let end = done + extent.len;
        while data && extent.content == Content::Data && done < end {
            let some = (end - done).min(PIECE);
            // CAST: at most a piece.
            let bytes: Data = opener.io.buffer(some as usize)?;
            match disk.read(at + done, bytes).await {
                Ok(()) => done += some,
                Err(error) if done == 0 => return Err(error),
                Err(_) => return Ok(done),
            }
        }
        done = end;
    }
    Ok(done)
}
