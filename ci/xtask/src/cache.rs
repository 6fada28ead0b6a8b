// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Artefacts that are downloaded or built once, and kept outside the checkout.
//!
//! Each artefact is one directory `NAME-KEY`, where KEY is a hash of all inputs. It is built as `NAME-KEY.partial`
//! under a lock and renamed at the end, so an existing one is complete.

use crate::steps::{RunningStep, StepKind};
use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Returns the folder of all artefacts; creates it when it does not exist.
pub(crate) fn dir() -> Result<PathBuf> {
    let env = |name: &str| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    let dir = match env("XEN_BLKBACK_RS_CACHE") {
        Some(dir) => dir,
        None => env("XDG_CACHE_HOME")
            .or_else(|| env("HOME").map(|home| home.join(".cache")))
            .context("no cache folder: set XEN_BLKBACK_RS_CACHE")?
            .join("xen-blkback-rs"),
    };
    fs::create_dir_all(&dir).with_context(|| {
        format!(
            "cannot make the cache {}: set XEN_BLKBACK_RS_CACHE",
            dir.display()
        )
    })?;
    Ok(dir.canonicalize()?)
}

/// Returns the hash of the inputs of an artefact (64-bit FNV-1a: it names a folder and protects nothing).
pub(crate) fn key(inputs: &[&str]) -> String {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for input in inputs {
        for byte in input.bytes().chain([0xff]) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    format!("{hash:016x}")
}

/// One artefact in the cache.
#[derive(Debug)]
pub(crate) struct Artefact<'a> {
    /// The first half of the folder's name.
    pub(crate) name: &'a str,
    /// Name in the progress lines.
    pub(crate) title: &'a str,
    /// Approximate duration, for the progress line.
    pub(crate) about: &'a str,
    /// All inputs that determine its content.
    pub(crate) inputs: Vec<&'a str>,
}

impl Artefact<'_> {
    /// Returns the artefact's folder, built with `make` if the cache does not have it. `make` gets the unfinished
    /// folder and a path for its log.
    pub(crate) fn get(&self, make: impl FnOnce(&Path, &Path) -> Result<()>) -> Result<PathBuf> {
        self.get_in(&dir()?, make)
    }

    fn get_in(
        &self,
        cache: &Path,
        make: impl FnOnce(&Path, &Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let stem = format!("{}-{}", self.name, key(&self.inputs));
        let done = cache.join(&stem);
        if done.is_dir() {
            return Ok(done);
        }
        let _lock = lock(&cache.join(format!("{stem}.lock")))?;
        if done.is_dir() {
            return Ok(done);
        }
        let partial = cache.join(format!("{stem}.partial"));
        crate::run::remove_tree(&partial)?;
        fs::create_dir(&partial)?;
        let log = cache.join(format!("{stem}.log"));
        fs::write(&log, "")?;
        eprintln!("building {} (about {}) ...", self.title, self.about);
        let start = Instant::now();
        let _step = RunningStep::begin(
            StepKind::Build,
            self.title,
            &format!("building {}", self.title),
        );
        make(&partial, &log).with_context(|| format!("cannot build {}", self.title))?;
        fs::rename(&partial, &done)?;
        eprintln!("built {} in {} s", self.title, start.elapsed().as_secs());
        Ok(done)
    }
}

/// Waits for an exclusive lock on `path`, which is released when the value is dropped.
pub(crate) fn lock(path: &Path) -> Result<Flock<File>> {
    let open = || File::options().create(true).append(true).open(path);
    let file = open().with_context(|| format!("cannot open the lock {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((file, nix::errno::Errno::EWOULDBLOCK)) => {
            eprintln!("waiting for another run that holds {}", path.display());
            Flock::lock(file, FlockArg::LockExclusive)
                .map_err(|(_, error)| error)
                .with_context(|| format!("cannot lock {}", path.display()))
        }
        Err((_, error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn artefact(input: &str) -> Artefact<'_> {
        Artefact {
            name: "thing",
            title: "the thing",
            about: "no time",
            inputs: vec![input],
        }
    }

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("xtask-{}-{name}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn second_run_reuses_what_the_first_built() {
        let cache = scratch("reuse");
        let built = artefact("a")
            .get_in(&cache, |dir, _| Ok(fs::write(dir.join("f"), "1")?))
            .unwrap();
        let again = artefact("a")
            .get_in(&cache, |_, _| panic!("built twice"))
            .unwrap();
        assert_eq!(built, again);
        assert_eq!(fs::read_to_string(again.join("f")).unwrap(), "1");
        fs::remove_dir_all(cache).unwrap();
    }

    #[test]
    fn failed_build_leaves_nothing_that_the_next_run_would_use() {
        let cache = scratch("fail");
        let fail = artefact("a").get_in(&cache, |dir, _| {
            fs::write(dir.join("half"), "made")?;
            anyhow::bail!("interrupted")
        });
        assert!(fail.is_err());
        let built = artefact("a").get_in(&cache, |_, _| Ok(())).unwrap();
        assert!(!built.join("half").exists());
        fs::remove_dir_all(cache).unwrap();
    }

    #[test]
    fn other_inputs_are_another_artefact() {
        assert_ne!(key(&["a", "b"]), key(&["ab"]));
        assert_ne!(key(&["a"]), key(&["b"]));
    }
}
