// SPDX-License-Identifier: MIT OR Apache-2.0
//! Opens files for the process that serves, which can open none: the image, and what is named in that.
//!
//! The maker of an image chose the names in it, and an image that takes over the process that serves could ask for
//! anything. So a file is given only if it is beside the image, or if the user has allowed it.

use crate::open::{open_file, Use};
use control::tapdisk::{FdGrant, Open, Reply, Request, RequestedFile};
use control::{open_named, Channel, Code, Failure, FileSecrecy};
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// Opens files for one disk.
#[derive(Debug)]
pub(super) struct FileBroker {
    open: Open,
    /// Folders of the image: where its name is, and where its file is. Files directly in them may be named by it.
    beside: Vec<PathBuf>,
    /// Files and folders that the user has allowed.
    allowed: Vec<PathBuf>,
}

impl FileBroker {
    /// Prepares to open files for the disk of `open`, also those that `allowed` names or that are below them.
    pub(super) fn new(open: Open, allowed: &[PathBuf]) -> Result<Self, Failure> {
        let found = |path: &Path| {
            fs::canonicalize(path)
                .map_err(|error| Failure::system(format!("cannot find {}", path.display()), &error))
        };
        let below = open.target.below().map(|below| below.path.as_path());
        let mut beside = Vec::new();
        let mut allowed: Vec<_> = allowed
            .iter()
            .map(|path| found(path))
            .collect::<Result<_, _>>()?;
        if let Some(path) = open.target.path().or(below) {
            let file = found(path)?;
            // Beside a block device are those of everything else.
            if !is_block_device(&file)? {
                let folders = [path.parent(), file.parent()];
                for folder in folders.into_iter().flatten() {
                    beside.push(found(folder)?);
                }
            }
            if below.is_some() {
                allowed.push(file);
            }
        }
        Ok(Self {
            open,
            beside,
            allowed,
        })
    }

    /// Returns the image, open, or the memory of a disk that has some; nothing for others.
    pub(super) fn image(&self) -> Result<Option<OwnedFd>, Failure> {
        let target = &self.open.target;
        if let Some(path) = target.path() {
            let file = open_file(path, self.how(), target.driver().is_direct())?;
            return Ok(Some(file.into()));
        }
        if !target.has_own_memory() {
            return Ok(None);
        }
        memory(target.size().unwrap_or(0)).map(Some)
    }

    fn how(&self) -> Use {
        match self.open.read_only {
            true => Use::Read,
            false => Use::Write,
        }
    }

    /// Answers the questions of the process that serves, until that ends.
    pub(super) fn answer(&self, mut channel: Channel) -> Result<(), Failure> {
        let mut known = 0;
        loop {
            let question = Request::Needs { after: known };
            let needs = match channel.ask(question, &[]) {
                Ok(Reply::Needs { needs }) => needs,
                Ok(reply) => return Err(super::unexpected(&reply)),
                Err(failure) if failure.code == Code::Gone => return Ok(()),
                Err(failure) => return Err(failure),
            };
            for need in needs {
                known = known.max(need.number);
                let (fd, provided) = match self.provide(&need.what) {
                    Ok(given) => given,
                    Err(failure) => (None, FdGrant::Refused(failure)),
                };
                let question = Request::Provide {
                    number: need.number,
                    provided,
                    backing: None,
                };
                let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
                channel.ask::<_, Reply>(question, &fds)?;
            }
        }
    }

    fn provide(&self, what: &RequestedFile) -> Result<(Option<OwnedFd>, FdGrant), Failure> {
        let target = &self.open.target;
        let file = match what {
            RequestedFile::Parent { path } => {
                let path = self.admit(path, "a backing image")?;
                let is_direct = !target.caches_below();
                return Ok((
                    Some(open_file(&path, Use::Read, is_direct)?.into()),
                    FdGrant::Locked,
                ));
            }
            RequestedFile::Extent { path } => {
                let path = self.admit(path, "a part of it")?;
                let file = open_file(&path, self.how(), target.driver().is_direct())?;
                return Ok((Some(file.into()), FdGrant::Locked));
            }
            RequestedFile::Key { target: asked } if asked == target => {
                let key = target.key().ok_or_else(|| refused("a key"))?;
                open_named(key, "key", FileSecrecy::Secret)?
            }
            // Counters for the next process, which there is none of.
            RequestedFile::State { size } => memory(*size)?,
            RequestedFile::Marks => return Ok((None, FdGrant::Marks(Vec::new()))),
            _ => return Err(refused("something")),
        };
        Ok((Some(file), FdGrant::Shared))
    }

    /// Returns where a file is that the image names, if it may be used.
    fn admit(&self, path: &Path, what: &str) -> Result<PathBuf, Failure> {
        let image = &self.open.target;
        let found = fs::canonicalize(path).map_err(|error| {
            let named = path.display();
            Failure::system(
                format!("cannot open {named}, which {image} names as {what}"),
                &error,
            )
        })?;
        let is_beside = found
            .parent()
            .is_some_and(|folder| self.beside.iter().any(|own| own == folder));
        if is_beside
            || self
                .allowed
                .iter()
                .any(|allowed| found.starts_with(allowed))
        {
            return Ok(found);
        }
        Err(Failure::new(
            Code::Denied,
            format!(
                "{image} names {} as {what}, which is not in the folder of the image: if it is right that clients can \
                 read it, add --allow {}",
                path.display(),
                found.display()
            ),
        ))
    }
}

fn is_block_device(path: &Path) -> Result<bool, Failure> {
    let found = fs::metadata(path);
    let found = found
        .map_err(|error| Failure::system(format!("cannot look at {}", path.display()), &error))?;
    Ok(found.file_type().is_block_device())
}

fn memory(size: u64) -> Result<OwnedFd, Failure> {
    let memory = tapdisk::own_memory(size);
    memory.map_err(|error| Failure::system("cannot make memory", &error))
}

fn refused(what: &str) -> Failure {
    Failure::unsupported(format!("a served disk gets {what} from blktapctrl only"))
}
