// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tapimg info`: what images are.

use crate::chain::below;
use crate::cli::Info;
use crate::image_spec::{kind_name, ImageSpec};
use crate::open::{ImageOpener, DEEPEST};
use crate::progress::bytes;
use control::{shown, Code, Failure};
use diskio::File;
use formats::{look, luks, qcow2, vhdx, Below, ImageFormat, ImageNeeds, LAYERS, SECTOR};
use serde::Serialize;
use std::fmt::Write;
use std::os::unix::fs::PermissionsExt;

/// Facts about an image.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Facts {
    /// As it was named.
    image: String,
    /// Format of the image.
    kind: String,
    /// Path of the file or device.
    path: String,
    /// Bytes of the disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    /// Bytes of a logical sector.
    #[serde(skip_serializing_if = "Option::is_none")]
    sector_size: Option<u32>,
    /// Bytes of the file.
    file_size: u64,
    /// Bytes that the file system has allocated for the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    allocated: Option<u64>,
    /// The backing image.
    #[serde(skip_serializing_if = "Option::is_none")]
    parent: Option<ParentFacts>,
    /// Files with the content.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    extents: Vec<String>,
    /// Properties of a qcow2 image.
    #[serde(skip_serializing_if = "Option::is_none")]
    qcow2: Option<Qcow2Facts>,
    /// How it is encrypted, and how many keys open it.
    #[serde(skip_serializing_if = "Option::is_none")]
    encryption: Option<String>,
    /// Internal snapshots of a qcow2 image.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    snapshots: Vec<SnapshotFacts>,
    /// Dirty bitmaps of QEMU that the image keeps.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    bitmaps: Vec<BitmapFacts>,
    /// Reasons why the image, or one of its backing images, cannot be served as it is.
    problems: Vec<String>,
    /// Harmless facts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    notes: Vec<String>,
}

#[derive(Clone, Debug, Serialize)]
struct ParentFacts {
    /// As the image names it.
    names: Vec<String>,
    /// Format of the backing image, if the image names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<String>,
    /// Identifier of the backing image, if the image's format has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
struct Qcow2Facts {
    /// Version of the format: 2 or 3.
    version: u32,
    /// Bytes of a cluster.
    cluster_size: u64,
    /// The image has extended L2 entries.
    subclusters: bool,
    /// Method of compressed clusters.
    compression: &'static str,
    /// The refcounts may be wrong.
    dirty: bool,
    /// A program has marked the image as corrupt.
    corrupt: bool,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct SnapshotFacts {
    /// Identifier of the snapshot.
    id: String,
    /// Name of the snapshot.
    name: String,
    /// Bytes of the disk in the snapshot.
    size: u64,
    /// Seconds since 1970.
    seconds: u32,
    /// Bytes of the virtual machine's state in the snapshot.
    memory: u64,
}

#[derive(Clone, Debug, Serialize)]
struct BitmapFacts {
    /// Name of the bitmap.
    name: String,
    /// Bytes of the disk for which a bit stands.
    granularity: u64,
    /// Each write of the disk sets bits.
    recording: bool,
    /// The bitmap has all writes that it should have; otherwise it is void.
    consistent: bool,
}

/// Looks at an image, and on request at all below it.
pub(crate) async fn info(opener: &ImageOpener, args: &Info) -> Result<Vec<Facts>, Failure> {
    let mut all = Vec::new();
    let mut next = Some(args.image.clone());
    while let Some(image) = next.take() {
        if all.len() > DEEPEST {
            break;
        }
        let (mut facts, needs) = match one(opener, &image).await {
            Ok(found) => found,
            // The first one must be there.
            Err(failure) if all.is_empty() => return Err(failure),
            Err(failure) => {
                all.push(Facts::missing(&image, failure));
                break;
            }
        };
        let parent = needs.and_then(|needs| below(opener, &image, &needs));
        let note = parent
            .as_ref()
            .and_then(|parent| not_beside(&args.image, parent));
        facts.notes.extend(note);
        all.push(facts);
        next = parent.filter(|_| args.chain);
    }
    let layers = all
        .iter()
        .filter(|facts| facts.kind != kind_name(Below::Raw));
    if layers.count() > LAYERS {
        all[0].problems.push(format!(
            "more than {LAYERS} images lie over each other: bring some of them together with `tapimg commit IMAGE` or `tapimg rebase IMAGE --no-parent`"
        ));
    }
    inherit(&mut all);
    // Whether it can be served shows when it is opened with all that it needs.
    let is_closed = all[0].encryption.is_some() && args.image.key.is_none();
    if is_closed {
        let note = "without its key this shows no more: name the file with the key, as key=FILE before the kind";
        all[0].notes.push(note.into());
    } else if all.iter().all(|facts| facts.problems.is_empty()) {
        match opener.disk(&args.image, None).await {
            Ok((_, shape)) => all[0].sector_size = Some(shape.logical_block),
            // It may be in order when it is free.
            Err(failure) if failure.code == Code::Busy => return Err(failure),
            Err(failure) => all[0].problems.push(failure.message),
        }
    }
    Ok(all)
}

/// Images that store no size of sectors have that of the image below, as far as that was looked at.
fn inherit(all: &mut [Facts]) {
    let mut below = None;
    for facts in all.iter_mut().rev() {
        let usual = match facts.parent {
            Some(_) => below,
            None => facts.size.map(|_| SECTOR),
        };
        facts.sector_size = facts.sector_size.or(usual);
        below = facts.sector_size;
    }
}

/// Says what blktapctrl demands before it serves a disk with a backing image: that is a file in the folder of the disk's
/// image without write permissions, or it is named for the disk.
fn not_beside(image: &ImageSpec, parent: &ImageSpec) -> Option<String> {
    // A file that is missing or cannot be looked at is a problem, which is told elsewhere.
    let (its, place) = (
        image.path.canonicalize().ok()?,
        parent.path.canonicalize().ok()?,
    );
    let its_facts = place.metadata().ok()?;
    let is_fixed = its_facts.permissions().mode() & 0o222 == 0;
    let may_be_fixed = its_facts.is_file() && its.parent() == place.parent();
    let place = place.display();
    match (may_be_fixed, is_fixed) {
        (true, true) => None,
        (true, false) => Some(format!(
            "blktapctrl serves the disk only after `chmod a-w {place}`, or if --files names that backing image"
        )),
        (false, _) => Some(format!(
            "blktapctrl serves the disk only if --files names {place}, a backing image in another folder or on a device"
        )),
    }
}

impl Facts {
    pub(crate) fn is_good(&self) -> bool {
        self.problems.is_empty()
    }

    fn new(image: &ImageSpec) -> Self {
        Self {
            image: image.to_string(),
            kind: kind_name(image.kind).into(),
            path: image.path.display().to_string(),
            ..Self::default()
        }
    }

    fn missing(image: &ImageSpec, failure: Failure) -> Self {
        Self {
            problems: vec![failure.message],
            ..Self::new(image)
        }
    }

    pub(crate) fn text(&self) -> String {
        let mut text = format!("image: {}\n", self.image);
        let mut say = |name: &str, value: &str| {
            // Writing to a string cannot fail. An image's text stays on its own line.
            let _ = writeln!(text, "  {name}: {}", shown(value));
        };
        if let Some(size) = self.size {
            say(
                "size of the disk",
                &format!("{} ({size} bytes)", bytes(size)),
            );
        }
        if let Some(size) = self.sector_size {
            say("logical sectors", &format!("{size} bytes"));
        }
        let on_disk = match self.allocated {
            Some(allocated) => format!(
                "{} of a file of {}",
                bytes(allocated),
                bytes(self.file_size)
            ),
            None => format!("a device of {}", bytes(self.file_size)),
        };
        say("space in use", &on_disk);
        if let Some(parent) = &self.parent {
            let kind = parent
                .kind
                .as_deref()
                .unwrap_or("of a kind that it does not say");
            say("parent", &format!("{} ({kind})", parent.names.join(" or ")));
        }
        for extent in &self.extents {
            say("content in", extent);
        }
        if let Some(its) = &self.qcow2 {
            say("version", &its.version.to_string());
            let parts = if its.subclusters {
                ", with subclusters"
            } else {
                ""
            };
            say(
                "clusters",
                &format!("{}{parts}, {}", bytes(its.cluster_size), its.compression),
            );
        }
        if let Some(how) = &self.encryption {
            say("encrypted", how);
        }
        for one in &self.snapshots {
            say("snapshot", &one.text());
        }
        for one in &self.bitmaps {
            say("dirty bitmap", &one.text());
        }
        for note in &self.notes {
            say("note", note);
        }
        for problem in &self.problems {
            say("cannot be served", problem);
        }
        text
    }
}

/// One image. The facts include its faults.
async fn one(
    opener: &ImageOpener,
    image: &ImageSpec,
) -> Result<(Facts, Option<ImageNeeds>), Failure> {
    let file = opener.file(&image.path, opener.reading).await?;
    let seeing = |error| Failure::system(format!("cannot look at {image}"), &error);
    let mut facts = Facts {
        file_size: file.size().map_err(seeing)?,
        ..Facts::new(image)
    };
    if !file.is_device() {
        facts.allocated = Some(file.allocated().map_err(seeing)?);
    }
    let Below::Format(kind) = image.kind else {
        facts.size = Some(facts.file_size);
        facts.sector_size = Some(file.blocks().map_err(seeing)?.0);
        return Ok((facts, None));
    };
    let needs = match look(kind, &file).await {
        Ok(needs) => needs,
        Err(failure) => {
            facts.problems.push(failure.message);
            return Ok((facts, None));
        }
    };
    facts.size = Some(needs.size);
    facts.sector_size = needs.sector;
    facts.extents = needs
        .extents
        .iter()
        .map(|extent| extent.name.clone())
        .collect();
    facts.parent = needs.parent.as_ref().map(|parent| ParentFacts {
        names: parent.names.clone(),
        kind: parent.driver.clone(),
        id: parent.id.clone(),
    });
    if kind == ImageFormat::Vhdx {
        let changes = vhdx::unreplayed(&file).await;
        if changes.map_err(|failure| image.said(failure))? > 0 {
            facts.notes.push(
                "it was not closed: what its log has is shown, and the image stays as it is".into(),
            );
        }
    }
    match encryption(kind, &file).await {
        Ok(how) => facts.encryption = how,
        Err(failure) => facts.problems.push(failure.message),
    }
    if kind == ImageFormat::Qcow2 {
        if let Err(failure) = add_qcow2(&file, &mut facts).await {
            facts.problems.push(failure.message);
        }
    }
    Ok((facts, Some(needs)))
}

/// How an image is encrypted, if it is.
async fn encryption(kind: ImageFormat, file: &File) -> Result<Option<String>, Failure> {
    let header = match kind {
        ImageFormat::Luks => Some(luks::header(file).await?),
        ImageFormat::Qcow2 => qcow2::encryption(file).await?,
        _ => None,
    };
    Ok(header.map(|its| format!("LUKS, {}, keys: {}", its.cipher(), its.keys())))
}

async fn add_qcow2(file: &File, facts: &mut Facts) -> Result<(), Failure> {
    let header = qcow2::header(file).await?;
    facts.qcow2 = Some(Qcow2Facts {
        version: header.version,
        cluster_size: header.cluster(),
        subclusters: header.has_subclusters(),
        compression: match header.compression {
            qcow2::Compression::Zlib => "zlib",
            qcow2::Compression::Zstd => "zstd",
        },
        dirty: header.is_dirty(),
        corrupt: header.is_corrupt(),
    });
    if header.is_dirty() {
        let note = "it was not closed: its refcounts are repaired when it is opened for writing, or by `tapimg check --repair IMAGE`";
        facts.notes.push(note.into());
    }
    if header.is_corrupt() {
        let problem = "its header says that it is corrupt, so it can be served read-only and converted, and not written: \
                       repair it with qemu-img check -r all";
        facts.problems.push(problem.into());
    }
    facts.snapshots = snapshots(file).await?;
    match qcow2::bitmaps(file).await {
        Ok(all) => facts.bitmaps = all.into_iter().map(BitmapFacts::from).collect(),
        // The disk can be served all the same.
        Err(failure) => facts.notes.push(failure.message),
    }
    Ok(())
}

/// The snapshots in a qcow2 image.
pub(crate) async fn snapshots(file: &File) -> Result<Vec<SnapshotFacts>, Failure> {
    let all = qcow2::snapshots(file).await?.into_iter();
    let facts = |one: qcow2::DiskSnapshot| SnapshotFacts {
        id: one.id,
        name: one.name,
        size: one.size,
        seconds: one.seconds,
        memory: one.memory,
    };
    Ok(all.map(facts).collect())
}

impl From<qcow2::DiskBitmap> for BitmapFacts {
    fn from(bitmap: qcow2::DiskBitmap) -> Self {
        Self {
            name: bitmap.name,
            granularity: bitmap.granularity,
            recording: bitmap.is_recording,
            consistent: bitmap.is_consistent,
        }
    }
}

impl BitmapFacts {
    fn text(&self) -> String {
        let unit = bytes(self.granularity);
        let state = match (self.consistent, self.recording) {
            (true, true) => "records writes",
            (true, false) => "is disabled",
            (false, _) => "is void: it was not stored after the last write, so the next backup has to be a full one",
        };
        format!("{:?}, a bit for {unit}, {state}", self.name)
    }
}

impl SnapshotFacts {
    pub(crate) fn text(&self) -> String {
        let Self { id, name, size, .. } = self;
        let (size, seconds) = (bytes(*size), self.seconds);
        format!("{id} {name:?}, {size}, made at {seconds} s since 1970")
    }
}
