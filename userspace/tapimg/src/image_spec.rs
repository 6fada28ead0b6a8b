// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images as they are named on the command line: `qcow2:/srv/a.qcow2`.

use control::{open_named, Failure, FileSecrecy};
use formats::luks::ImageKey;
use formats::{Below, ImageFormat};
use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::str::FromStr;

/// Kind of an image, and its path. The command line names the kind, and this program never guesses it, because a guest
/// controls the content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ImageSpec {
    /// Raw, or which format.
    pub(crate) kind: Below,
    /// Absolute.
    pub(crate) path: PathBuf,
    /// The file with its key, if it is encrypted.
    pub(crate) key: Option<PathBuf>,
    /// The disk to use, if the path names an OVA.
    pub(crate) ova: Option<OvaDisk>,
}

/// A disk in an OVA: its name there, if it is not the only one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OvaDisk(pub(crate) Option<String>);

/// The name of a kind, as a configuration has it.
pub(crate) fn kind_name(kind: Below) -> &'static str {
    match kind {
        Below::Raw => "aio",
        Below::Format(kind) => kind.name(),
    }
}

/// All names, for messages.
fn kinds() -> String {
    let formats = ImageFormat::ALL.map(ImageFormat::name).join(", ");
    format!("aio (raw), {formats}")
}

/// A kind of image, from one of its names.
pub(crate) fn parse_kind(name: &str) -> Result<Below, Failure> {
    // The other name of raw files in configurations.
    let name = if name == "sync" { "aio" } else { name };
    let unknown =
        |_| Failure::invalid(format!("there is no kind {name:?}: use one of {}", kinds()));
    name.parse().map_err(unknown)
}

impl ImageSpec {
    /// One that is not encrypted.
    pub(crate) fn plain(kind: Below, path: PathBuf) -> Self {
        Self {
            kind,
            path,
            key: None,
            ova: None,
        }
    }

    /// A disk in an OVA, at the path of that or with its name behind it.
    fn in_ova(path: PathBuf) -> Self {
        let kind = Below::Format(ImageFormat::Vmdk);
        let inside = path.parent().zip(path.file_name());
        let (path, name) = match inside.filter(|(ova, _)| ova.is_file()) {
            Some((ova, name)) => (ova.to_owned(), Some(name.to_string_lossy().into_owned())),
            None => (path, None),
        };
        Self {
            ova: Some(OvaDisk(name)),
            ..Self::plain(kind, path)
        }
    }

    /// Refuses a disk in an OVA, of which all is only read.
    ///
    /// # Errors
    /// The image is such a disk.
    pub(crate) fn refuse_ova(&self) -> Result<(), Failure> {
        match self.ova {
            None => Ok(()),
            Some(_) => Err(Failure::invalid(format!(
                "{self} is a disk in an OVA, which only convert, compare and map read: make an image of it: \
                 `tapimg convert {self} qcow2:NEW`"
            ))),
        }
    }

    /// Reads the key, if the command line names one.
    pub(crate) fn secret(&self) -> Result<Option<ImageKey>, Failure> {
        let Some(path) = &self.key else {
            return Ok(None);
        };
        // As the supervisor has it, so that what is made here can be served.
        let file = open_named(path, "key", FileSecrecy::Secret)?;
        let key = ImageKey::read(fs::File::from(file)).map_err(|failure| {
            let name = path.display();
            Failure::new(failure.code, format!("key={name}: {}", failure.message))
        })?;
        Ok(Some(key))
    }

    /// Whether it is encrypted, by its kind or key on the command line.
    pub(crate) fn is_sealed(&self) -> bool {
        self.key.is_some() || self.kind == Below::Format(ImageFormat::Luks)
    }

    /// Adds the image's path to a failure.
    pub(crate) fn said(&self, failure: Failure) -> Failure {
        let path = self.path.display().to_string();
        match failure.message.contains(&path) {
            true => failure,
            false => Failure::new(failure.code, format!("{path}: {}", failure.message)),
        }
    }
}

impl fmt::Display for ImageSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.ova {
            None => write!(f, "{}:{}", kind_name(self.kind), self.path.display()),
            Some(OvaDisk(None)) => write!(f, "ova:{}", self.path.display()),
            Some(OvaDisk(Some(name))) => write!(f, "ova:{}/{name}", self.path.display()),
        }
    }
}

impl FromStr for ImageSpec {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Self, Failure> {
        let rest = text.strip_prefix("tap:").unwrap_or(text);
        let (key, rest) = key_before(rest)?;
        let (kind, path) = rest
            .split_once(':')
            .filter(|(kind, _)| !kind.contains('/'))
            .ok_or_else(|| {
                Failure::invalid(format!(
                    "{text:?} does not say what the image is, which is never guessed: write KIND:PATH, such as \
                     qcow2:{text}, where KIND is one of {}",
                    kinds()
                ))
            })?;
        let is_ova = kind == "ova";
        let kind = match is_ova {
            true => Below::Format(ImageFormat::Vmdk),
            false => parse_kind(kind)?,
        };
        if path.is_empty() || path.contains('\0') {
            return Err(Failure::invalid(format!(
                "{text:?} names no file: write KIND:PATH, such as {}:/srv/a.img",
                kind_name(kind)
            )));
        }
        let path = std::path::absolute(path)
            .map_err(|error| Failure::system(format!("cannot find {path:?}"), &error))?;
        if is_ova && key.is_none() {
            return Ok(Self::in_ova(path));
        }
        let may_have = matches!(kind, Below::Format(ImageFormat::Luks | ImageFormat::Qcow2));
        match may_have || key.is_none() {
            true => Ok(Self {
                key,
                ..Self::plain(kind, path)
            }),
            false => Err(Failure::invalid(format!(
                "{text:?} is no image that could be encrypted, which is luks: and qcow2:; remove key="
            ))),
        }
    }
}

/// Splits off the file with a key, if there is one.
fn key_before(text: &str) -> Result<(Option<PathBuf>, &str), Failure> {
    let Some(rest) = text.strip_prefix("key=") else {
        return Ok((None, text));
    };
    let (path, rest) = rest
        .split_once(',')
        .filter(|(path, _)| !path.is_empty())
        .ok_or_else(|| {
            Failure::invalid(format!(
                "{text:?} names no key and no image: write key=FILE,KIND:PATH, such as \
                 key=/etc/xentap/a.key,luks:/srv/a.img"
            ))
        })?;
    Ok((Some(path.into()), rest))
}

#[cfg(test)]
mod tests {
    use super::ImageSpec;
    use formats::{Below, ImageFormat};
    use std::path::Path;

    #[test]
    fn an_image_is_named_with_its_kind() {
        for (text, kind, path) in [
            ("qcow2:/a:b", Below::Format(ImageFormat::Qcow2), "/a:b"),
            ("tap:vhd:/a", Below::Format(ImageFormat::Vhd), "/a"),
            ("vpc:/a", Below::Format(ImageFormat::Vhd), "/a"),
            ("aio:/a", Below::Raw, "/a"),
            ("sync:/a", Below::Raw, "/a"),
            ("raw:/a", Below::Raw, "/a"),
            ("ova:/a", Below::Format(ImageFormat::Vmdk), "/a"),
        ] {
            let named: ImageSpec = text.parse().unwrap();
            assert_eq!((named.kind, named.path.as_path()), (kind, Path::new(path)));
        }
        let named: ImageSpec = "raw:a.img".parse().unwrap();
        assert!(named.path.is_absolute() && named.path.ends_with("a.img"));
        let named: ImageSpec = "tap:key=a=b.key,luks:/a,b".parse().unwrap();
        assert_eq!(
            (named.kind, named.path.as_path()),
            (Below::Format(ImageFormat::Luks), Path::new("/a,b"))
        );
        assert_eq!(named.key.as_deref(), Some(Path::new("a=b.key")));
        for text in [
            "",
            "key=",
            "key=a",
            "key=,luks:/a",
            "key=a,vhd:/a",
            "key=a,ova:/a",
            "ova:",
            "key=a,aio:/a",
            "/a",
            "qcow2",
            "qcow2:",
            "qcow3:/a",
            "./a:b",
            "aio:/a\0b",
        ] {
            assert!(text.parse::<ImageSpec>().is_err(), "{text:?}");
        }
    }
}
