// SPDX-License-Identifier: MIT OR Apache-2.0
//! Encryption of a connection to the server of an export, in the syntax of a configuration.

use crate::Failure;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Path, PathBuf};

/// The files, all of them PEM, with which a disk and its server prove to each other who they are. Encryption is not
/// optional once the target has it: a server that does not encrypt is not used.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Tls {
    authorities: PathBuf,
    own: Option<(PathBuf, PathBuf)>,
}

/// One of the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TlsFile {
    /// Certificates of authorities, of which one has signed the server's.
    Authorities,
    /// The certificate that the server is shown, and those between that and its authority.
    Certificate,
    /// The key of that.
    Key,
}

impl TlsFile {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Authorities, Self::Certificate, Self::Key];

    /// Returns the word that names its path.
    pub fn word(self) -> &'static str {
        match self {
            Self::Authorities => "tls-ca",
            Self::Certificate => "tls-cert",
            Self::Key => "tls-key",
        }
    }

    fn of_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|file| file.word() == word)
    }
}

impl Tls {
    /// The path of a file, if there is one.
    #[must_use]
    pub fn path(&self, file: TlsFile) -> Option<&Path> {
        let (certificate, key) = self.own.as_ref().map(|(c, k)| (c, k)).unzip();
        match file {
            TlsFile::Authorities => Some(&self.authorities),
            TlsFile::Certificate => certificate.map(PathBuf::as_path),
            TlsFile::Key => key.map(PathBuf::as_path),
        }
    }

    /// The server is shown a certificate.
    #[must_use]
    pub fn has_own(&self) -> bool {
        self.own.is_some()
    }
}

/// Formats the words before a driver.
impl fmt::Display for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for file in TlsFile::ALL {
            if let Some(path) = self.path(file) {
                write!(f, "{}={},", file.word(), path.display())?;
            }
        }
        Ok(())
    }
}

/// Parses the path of a word.
///
/// # Errors
/// It is no path of a file; `example` would be one.
pub(crate) fn named_file(word: &str, path: &str, example: &str) -> Result<PathBuf, Failure> {
    let place = PathBuf::from(path);
    match place.is_absolute() && !path.contains(char::is_control) {
        true => Ok(place),
        false => Err(Failure::invalid(format!(
            "{word}={path:?} names no file: write its absolute path, such as {word}={example}"
        ))),
    }
}

/// The words so far.
#[derive(Debug, Default)]
pub(crate) struct Said([Option<PathBuf>; 3]);

impl Said {
    /// Is it one of the words?
    pub(crate) fn knows(word: &str) -> bool {
        TlsFile::of_word(word).is_some()
    }

    /// Takes the path of a word; returns the earlier path of that word, if there was one.
    pub(crate) fn take(&mut self, word: &str, path: &str) -> Result<Option<PathBuf>, Failure> {
        let place = named_file(word, path, &format!("/etc/xentap/{word}.pem"))?;
        let slot = TlsFile::of_word(word).and_then(|file| self.0.get_mut(file as usize));
        Ok(slot.and_then(|slot| slot.replace(place)))
    }

    /// All of it.
    ///
    /// # Errors
    /// A word is missing beside the given ones.
    pub(crate) fn whole(self) -> Result<Option<Tls>, Failure> {
        match self.0 {
            [None, None, None] => Ok(None),
            [Some(authorities), None, None] => Ok(Some(Tls {
                authorities,
                own: None,
            })),
            [Some(authorities), Some(certificate), Some(key)] => Ok(Some(Tls {
                authorities,
                own: Some((certificate, key)),
            })),
            [None, _, _] => Err(Failure::invalid(
                "tls-cert= and tls-key= are shown to a server that is known by its authority: say that with \
                 tls-ca=FILE",
            )),
            [Some(_), _, _] => Err(Failure::invalid(
                "tls-cert= and tls-key= belong together: say both, or neither if the server wants no certificate",
            )),
        }
    }
}
