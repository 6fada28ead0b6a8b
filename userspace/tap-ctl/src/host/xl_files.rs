// SPDX-License-Identifier: MIT OR Apache-2.0
//! The files in which administrators write configurations of guests.

use super::Host;
use std::fs;
use std::path::{Path, PathBuf};

/// Folder of the files.
const FOLDER: &str = "/etc/xen";
/// Bytes of the largest file that is taken for a configuration.
const LARGEST: u64 = 1 << 20;

/// A file that may be a configuration.
pub(crate) struct ConfigurationFile {
    pub(crate) path: PathBuf,
    text: String,
}

impl ConfigurationFile {
    /// Returns the lines without comments.
    pub(crate) fn lines(&self) -> impl Iterator<Item = &str> {
        let lines = self.text.lines();
        lines.map(|line| line.split('#').next().unwrap_or(line))
    }

    /// Whether it is the configuration of a guest with this name.
    fn is_of(&self, guest: &str) -> bool {
        self.lines().any(|line| {
            let Some((key, value)) = line.split_once('=') else {
                return false;
            };
            let is_quote = |c: char| c == '"' || c == '\'' || c.is_whitespace() || c == ';';
            key.trim() == "name" && value.trim_matches(is_quote) == guest
        })
    }
}

/// Returns all files that can be read.
pub(crate) fn all(host: &Host) -> Vec<ConfigurationFile> {
    let folder = host.path(FOLDER);
    let mut files = Vec::new();
    for name in host.names(&folder) {
        let file = folder.join(&name);
        let is_small = |data: &fs::Metadata| data.is_file() && data.len() <= LARGEST;
        if fs::metadata(&file).is_ok_and(|data| is_small(&data)) {
            files.push(ConfigurationFile {
                path: Path::new(FOLDER).join(&name),
                text: host.optional(&file).unwrap_or_default(),
            });
        }
    }
    files
}

/// Returns the file of a guest, if one alone is.
pub(crate) fn of_guest(host: &Host, guest: &str) -> Option<PathBuf> {
    let mut its = all(host).into_iter().filter(|file| file.is_of(guest));
    let first = its.next()?;
    its.next().is_none().then_some(first.path)
}
