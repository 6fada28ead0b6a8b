// SPDX-License-Identifier: MIT OR Apache-2.0
//! An image and its chain of backing images, found by the names in their headers. The creator of an image wrote its
//! header and no guest can change it, so the header is trusted to name the parent; the provider of the files
//! ([`Files`]) decides whether a file is opened at all.

use crate::field::refused;
use crate::open::{id, named};
use crate::{look, open, Below, ImageFormat, ImageParts, Options, Parent, Storage};
use control::{Code, Failure};
use drivers::Disk;
use std::path::{Path, PathBuf};

/// Images over each other at most, of a disk that is served.
pub const LAYERS: usize = 64;
/// Bytes of tables that an image deep in a chain may keep at least.
const CACHE: usize = 1 << 20;

/// Provider of the files that images name.
#[allow(async_fn_in_trait, reason = "everything is in one thread")]
pub trait Files<S> {
    /// The file at `path`, which is absolute, locked: for writing, as the image itself, or only to be read.
    async fn open(&self, path: &Path, writable: bool) -> Result<S, Failure>;

    /// Returns the path of the data file that the qcow2 image at `image`, an absolute path, names.
    ///
    /// # Errors
    /// The name leads to no file.
    fn data_file(&self, name: &str, image: &Path) -> Result<PathBuf, Failure> {
        resolve(name, image)
    }

    /// The number by which the kernel knows the file at `path`, which was opened to be read.
    fn backing(&self, _path: &Path) -> Option<u16> {
        None
    }

    /// Returns the paths at which the parent of the image at `child` may be, the best first: by default those that the
    /// image names.
    fn places(&self, names: &[String], child: &Path) -> Vec<Result<PathBuf, Failure>> {
        names.iter().map(|name| resolve(name, child)).collect()
    }

    /// The disk that a raw file is, which is only read.
    fn raw(&self, file: S) -> Disk;
}

/// Image of a chain whose files were found.
struct Layer<S> {
    kind: ImageFormat,
    image: S,
    path: PathBuf,
    extents: Vec<S>,
}

/// A backing image that was found.
enum Found<S> {
    Raw(Disk),
    Image(ImageFormat, S, PathBuf),
}

/// Returns the disk in `image` with its whole chain of backing images. `path` is the absolute path of the image; names
/// in its header are relative to that folder. Backing images are opened read-only. The caller must have locked `image`.
///
/// # Errors
/// A file is missing or refused, or differs from what the header of its child says.
pub async fn open_chain<S: Storage>(
    kind: ImageFormat,
    image: S,
    path: &Path,
    options: Options,
    files: &impl Files<S>,
) -> Result<Disk, Failure> {
    let mut layers: Vec<Layer<S>> = Vec::new();
    let mut next = (kind, image, path.to_path_buf());
    let mut disk = loop {
        let (kind, image, path) = next;
        let said = |failure| named(path.display(), failure);
        let needs = look(kind, &image).await.map_err(said)?;
        let writable = options.writable && layers.is_empty();
        let mut extents = Vec::new();
        for extent in &needs.extents {
            let place = match kind {
                ImageFormat::Qcow2 => files.data_file(&extent.name, &path),
                _ => resolve(&extent.name, &path),
            };
            let place = place.map_err(said)?;
            let file = files.open(&place, writable && !extent.read_only).await;
            extents.push(file.map_err(said)?);
        }
        let found = match &needs.parent {
            Some(parent) => {
                let found = below(kind, parent, &path, &options, files).await;
                Some(found.map_err(said)?)
            }
            None => None,
        };
        layers.push(Layer {
            kind,
            image,
            path,
            extents,
        });
        next = match found {
            None => break None,
            Some(Found::Raw(disk)) => break Some(disk),
            Some(Found::Image(kind, image, path)) => (kind, image, path),
        };
        if layers.len() >= options.layers {
            return Err(refused(format!(
                "{} images lie over each other and {} is one more: bring some of them together: `tapimg commit IMAGE`",
                layers.len(),
                next.2.display()
            )));
        }
    };
    while let Some(layer) = layers.pop() {
        let own = of_layer(&options, &layer.path, layers.len());
        let parts = ImageParts {
            parent: disk,
            extents: layer.extents,
        };
        let opened = open(layer.kind, layer.image, parts, own);
        if !layers.is_empty() {
            opened.set_backing(files.backing(&layer.path));
        }
        disk = Some(opened);
    }
    disk.ok_or_else(|| Failure::invalid("there is no image"))
}

/// Returns the options of the image that lies under `depth` others. Each may keep half as many bytes in memory as the
/// one above it, so that a long chain does not need much more than one image.
fn of_layer(options: &Options, path: &Path, depth: usize) -> Options {
    if depth == 0 {
        return options.clone();
    }
    // CAST: there are few layers.
    let share = options.cache.checked_shr(depth as u32).unwrap_or(0);
    Options {
        name: path.display().to_string(),
        writable: false,
        discard: false,
        cache: share.max(CACHE),
        snapshot: None,
        parents: options.parents,
        layers: options.layers,
        key: None,
    }
}

/// Finds the backing image of the image of this kind at `child`. If the header has several names, the first one that leads
/// to the expected content counts; if none does, the failure lists the failures of all.
async fn below<S: Storage>(
    kind: ImageFormat,
    parent: &Parent,
    child: &Path,
    options: &Options,
    files: &impl Files<S>,
) -> Result<Found<S>, Failure> {
    let what = match &parent.driver {
        Some(name) => name
            .parse()
            .map_err(|failure| named("the backing image", failure))?,
        None => options.parents.ok_or_else(|| {
            refused(format!(
                "it does not say what its parent {:?} is, which is not guessed: name it in the configuration, or in the image with qemu-img rebase -u -F",
                parent.names.first().map_or("", String::as_str)
            ))
        })?,
    };
    let mut failures: Vec<Failure> = Vec::new();
    for place in files.places(&parent.names, child) {
        match try_place(place, what, parent, files).await {
            Ok(found) => return Ok(found),
            Err(failure) => failures.push(failure),
        }
    }
    let code = failures.first().map_or(Code::Image, |failure| failure.code);
    let all: Vec<&str> = failures.iter().map(|one| one.message.as_str()).collect();
    match all.is_empty() {
        true => Err(refused(
            "it has a parent and does not name it: the image is damaged",
        )),
        false if code == Code::NotFound => Err(Failure::new(
            code,
            format!(
                "{}: if the parent was moved, {}",
                all.join("; "),
                moved(kind)
            ),
        )),
        false => Err(Failure::new(code, all.join("; "))),
    }
}

/// Says what to do about an image of this kind whose parent is in another place.
fn moved(kind: ImageFormat) -> &'static str {
    match kind {
        ImageFormat::Vhdx => {
            "move it back, because a VHDX is never changed, or make a new image: `tapimg convert IMAGE NEW --parent-at PARENT`"
        }
        _ => "name its place: `tapimg rebase IMAGE --moved --parent PARENT`",
    }
}

async fn try_place<S: Storage>(
    place: Result<PathBuf, Failure>,
    what: Below,
    parent: &Parent,
    files: &impl Files<S>,
) -> Result<Found<S>, Failure> {
    let path = place?;
    let file = files.open(&path, false).await?;
    let Below::Format(kind) = what else {
        let disk = files.raw(file);
        disk.set_backing(files.backing(&path));
        return Ok(Found::Raw(disk));
    };
    is_meant(parent, kind, &file, &path).await?;
    Ok(Found::Image(kind, file, path))
}

/// Refuses an image that is not the parent that its child means, in formats in which that names the parent's content.
///
/// # Errors
/// The image has other content, or cannot be read.
pub async fn is_meant<S: Storage>(
    parent: &Parent,
    kind: ImageFormat,
    file: &S,
    path: &Path,
) -> Result<(), Failure> {
    let Some(wanted) = &parent.id else {
        return Ok(());
    };
    let said = |failure| named(path.display(), failure);
    let found = id(kind, file).await.map_err(said)?;
    let is_it = |id: &String| found.as_ref() == Some(id);
    match std::iter::once(wanted).chain(&parent.other_id).any(is_it) {
        true => Ok(()),
        false => Err(refused(format!(
            "{} is not the parent that is meant, {wanted}: it was changed or replaced",
            path.display()
        ))),
    }
}

/// Resolves a name in the image at `image` to a path.
pub fn resolve(name: &str, image: &Path) -> Result<PathBuf, Failure> {
    if name.starts_with("json:") || name.contains("://") {
        return Err(Failure::unsupported(format!(
            "it names {name:?}, and only files can be opened: change that with qemu-img rebase -u"
        )));
    }
    let path = Path::new(name.strip_prefix("file:").unwrap_or(name));
    match image.parent() {
        _ if path.is_absolute() => Ok(path.to_path_buf()),
        Some(folder) if folder.is_absolute() => Ok(folder.join(path)),
        _ => Err(Failure::invalid(format!(
            "{name:?} cannot be found from {}, which is no absolute path of an image",
            image.display()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::{of_layer, resolve, CACHE, LAYERS};
    use crate::Options;
    use std::path::Path;

    #[test]
    fn names_lead_from_the_folder_of_the_image() {
        let image = Path::new("/srv/vm/a.qcow2");
        for (name, path) in [
            ("base.img", "/srv/vm/base.img"),
            ("../base.img", "/srv/vm/../base.img"),
            ("/b.img", "/b.img"),
            ("file:b.img", "/srv/vm/b.img"),
            ("a:b.img", "/srv/vm/a:b.img"),
        ] {
            assert_eq!(resolve(name, image).unwrap(), Path::new(path));
        }
        for name in ["json:{}", "nbd://host/a", "https://host/a"] {
            assert!(resolve(name, image).is_err(), "{name}");
        }
        assert!(resolve("b.img", Path::new("a.qcow2")).is_err());
    }

    #[test]
    fn long_chain_keeps_little() {
        let options = Options::new("top");
        let all = (0..LAYERS).map(|depth| of_layer(&options, Path::new("/a"), depth).cache);
        assert!(all.sum::<usize>() <= 2 * options.cache + LAYERS * CACHE);
    }
}
