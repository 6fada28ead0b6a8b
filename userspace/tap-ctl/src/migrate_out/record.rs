// SPDX-License-Identifier: MIT OR Apache-2.0
//! A file for each disk that is served from another host: what a further run needs if the first one did not end. A
//! reboot of this host ends the guest too, so the file is in `/run`.

use crate::host::Host;
use control::{Failure, Target};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Version of the form.
pub(super) const VERSION: u32 = 1;

/// Folder of the files.
const FOLDER: &str = "run/xentap/move";

/// Where a disk is served from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct MoveRecord {
    /// Always [`VERSION`].
    pub(super) version: u32,
    /// The other host.
    pub(super) host: String,
    /// TCP port of this host at which the tunnel begins.
    pub(super) port: u16,
    /// The image there, KIND:PATH.
    pub(super) image: String,
}

/// Returns the target of the export at the end of a tunnel from this port.
pub(super) fn target(port: u16) -> Result<Target, Failure> {
    // As an address and not as a unix socket, so that tapdisk takes the server for one that may execute a request long
    // after the connection was lost.
    format!("nbd://127.0.0.1:{port}/disk").parse()
}

impl MoveRecord {
    fn file(host: &Host, minor: u32) -> PathBuf {
        host.path(Path::new(FOLDER).join(format!("{minor}.json")))
    }

    /// Returns the record of a disk, if there is one.
    ///
    /// # Errors
    /// The file cannot be read, or is not of this version.
    pub(super) fn read(host: &Host, minor: u32) -> Result<Option<MoveRecord>, Failure> {
        let file = Self::file(host, minor);
        let text = match fs::read_to_string(&file) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(Failure::system(
                    format!("cannot read {}", file.display()),
                    &error,
                ))
            }
        };
        let record: Result<MoveRecord, _> = serde_json::from_str(&text);
        match record {
            Ok(record) if record.version == VERSION => Ok(Some(record)),
            _ => Err(Failure::invalid(format!(
                "{} was not written by this version of tap-ctl: if `tap-ctl list` shows no export at 127.0.0.1, remove it",
                file.display()
            ))),
        }
    }

    /// Whether a disk with this target is served from there.
    pub(super) fn serves(&self, served: &Target) -> bool {
        target(self.port).is_ok_and(|own| own.to_string() == served.to_string())
    }

    /// Writes the record.
    ///
    /// # Errors
    /// The file system refuses it, and the disk must not switch.
    pub(super) fn keep(&self, host: &Host, minor: u32) -> Result<(), Failure> {
        let file = Self::file(host, minor);
        let write = || -> std::io::Result<()> {
            fs::create_dir_all(host.path(FOLDER))?;
            let new = file.with_extension("new");
            fs::write(&new, serde_json::to_vec(self)?)?;
            fs::rename(&new, &file)
        };
        write().map_err(|error| Failure::system(format!("cannot write {}", file.display()), &error))
    }

    /// Removes the record of a disk.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub(super) fn remove(host: &Host, minor: u32) -> Result<(), Failure> {
        let file = Self::file(host, minor);
        match fs::remove_file(&file) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(Failure::system(
                format!("cannot remove {}", file.display()),
                &error,
            )),
            _ => Ok(()),
        }
    }
}
