// SPDX-License-Identifier: MIT OR Apache-2.0
//! The module that is loaded and the one that is installed, and whether they are the same: by the build identifier,
//! which the linker gives to each module, and which Linux shows of those that are loaded.

use crate::xen_host::output;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use takeover::{BackendDriver, Modules};

/// The module that may be exchanged.
const DRIVER: BackendDriver = BackendDriver::Rs;
/// Bytes of a build identifier, at the end of its note.
const ID: usize = 20;

/// The module that modprobe would load.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct InstalledModule {
    path: PathBuf,
    /// Parameters from the host's settings, in the syntax of insmod.
    pub(crate) parameters: Vec<String>,
}

fn folder(driver: BackendDriver) -> PathBuf {
    Path::new("/sys/module").join(driver.module().replace('-', "_"))
}

/// Returns true if the module is loaded and initialized.
pub(crate) fn is_loaded(driver: BackendDriver) -> io::Result<bool> {
    match fs::read_to_string(folder(driver).join("initstate")) {
        Ok(state) => Ok(state.trim() == "live"),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Returns the module that modprobe would load, and its parameters.
pub(crate) fn installed() -> io::Result<InstalledModule> {
    let said = output(
        "modprobe",
        &["--ignore-install", "--show-depends", DRIVER.module()],
    )?;
    last_of(&said).ok_or_else(|| {
        io::Error::other(format!(
            "modprobe does not say where {} is: `{}`",
            DRIVER.module(),
            said.trim()
        ))
    })
}

/// After all that it needs.
fn last_of(said: &str) -> Option<InstalledModule> {
    let mut words = said.lines().last()?.split_whitespace();
    (words.next()? == "insmod").then_some(())?;
    Some(InstalledModule {
        path: words.next()?.into(),
        parameters: words.map(str::to_owned).collect(),
    })
}

/// Compares what is loaded with what is installed, and with the copy that was kept.
pub(crate) fn compare(copy: &Path) -> io::Result<Modules> {
    if !is_loaded(DRIVER)? {
        let why = format!(
            "{} is not loaded: modprobe {}",
            DRIVER.module(),
            DRIVER.module()
        );
        return Err(io::Error::other(why));
    }
    let loaded = loaded()?;
    if contains(&content(&installed()?.path)?, &loaded) {
        return Ok(Modules::Same);
    }
    match fs::read(copy) {
        Ok(bytes) if contains(&bytes, &loaded) => Ok(Modules::WayBack),
        _ => Ok(Modules::NoWayBack(copy.display().to_string())),
    }
}

/// A file is there, and is not the module that is loaded.
pub(crate) fn is_another(copy: &Path) -> bool {
    match (fs::read(copy), loaded()) {
        (Ok(bytes), Ok(loaded)) => !contains(&bytes, &loaded),
        _ => false,
    }
}

/// The build identifier of the module that is loaded.
fn loaded() -> io::Result<Vec<u8>> {
    let path = folder(DRIVER).join("notes/.note.gnu.build-id");
    let note = fs::read(&path)
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
    let at = note.len().checked_sub(ID);
    let id = at.and_then(|at| note.get(at..)).map(<[u8]>::to_vec);
    id.ok_or_else(|| io::Error::other(format!("{} has no identifier", path.display())))
}

/// Why a module could not be loaded, with what that means where the kernel has refused its signature.
pub(crate) fn explained(error: io::Error) -> io::Error {
    let said = error.to_string();
    // As the C library writes EKEYREJECTED and ENOKEY.
    let of_keys = ["Key was rejected by service", "Required key not available"];
    match of_keys.iter().any(|words| said.contains(words)) {
        true => io::Error::other(format!(
            "{said}: this kernel loads only modules that are signed with a key that it knows: xen-blkback-rs(8), SECURE BOOT"
        )),
        false => error,
    }
}

/// A module, unpacked as modprobe would.
fn content(path: &Path) -> io::Result<Vec<u8>> {
    let program = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => {
            return fs::read(path).map_err(|error| {
                io::Error::new(error.kind(), format!("{}: {error}", path.display()))
            })
        }
    };
    let done = std::process::Command::new(program)
        .arg("-dc")
        .arg(path)
        .output();
    let done = done.map_err(|error| io::Error::new(error.kind(), format!("{program}: {error}")))?;
    match done.status.success() {
        true => Ok(done.stdout),
        false => Err(io::Error::other(format!(
            "{program} cannot unpack {}",
            path.display()
        ))),
    }
}

fn contains(bytes: &[u8], id: &[u8]) -> bool {
    bytes.windows(ID).any(|window| window == id)
}

#[cfg(test)]
mod tests {
    use super::{contains, explained, last_of};
    use std::io;
    use std::path::Path;

    #[test]
    fn what_modprobe_says_is_understood() {
        let said = "insmod /lib/modules/7.3/kernel/xen-gntdev.ko \n\
                    insmod /lib/modules/7.3/updates/xen-blkback-rs.ko max_queues=4 copy_max_segments=8 \n";
        let installed = last_of(said).unwrap();
        assert_eq!(
            installed.path,
            Path::new("/lib/modules/7.3/updates/xen-blkback-rs.ko")
        );
        assert_eq!(
            installed.parameters,
            ["max_queues=4", "copy_max_segments=8"]
        );
        assert_eq!(last_of("builtin xen_blkback_rs"), None);
        assert_eq!(last_of(""), None);
    }

    #[test]
    fn a_signature_that_is_refused_is_explained() {
        let said = |why: &str| {
            let line = format!("modprobe xen-blkback-rs: ERROR: could not insert: {why}");
            explained(io::Error::other(line)).to_string()
        };
        for refused in ["Key was rejected by service", "Required key not available"] {
            let told = said(refused);
            assert!(
                told.contains(refused) && told.contains("SECURE BOOT"),
                "{told}"
            );
        }
        assert!(said("Invalid argument").ends_with("Invalid argument"));
    }

    #[test]
    fn an_identifier_is_found_anywhere() {
        let id = [7; 20];
        let mut file = vec![0; 100];
        assert!(!contains(&file, &id));
        file.extend(id);
        assert!(contains(&file, &id));
        assert!(!contains(&[7; 19], &id));
    }
}
