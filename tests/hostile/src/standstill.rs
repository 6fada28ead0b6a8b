// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A device that stands still when it is told to: what is asked of it waits until it goes on.

use crate::disk::{run, Disk};
use crate::wait;
use anyhow::{anyhow, ensure, Context, Result};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// A device stands still for so long at most. What has waited for it by then ends, so that the attack fails instead of
/// standing still itself.
const LONGEST: Duration = Duration::from_secs(60);

/// A device of device mapper that is all of another one. Dropping it takes it away.
pub(crate) struct Stoppable {
    name: &'static str,
    gone: bool,
}

/// While it lives the device stands still.
pub(crate) struct Standstill {
    over: Sender<()>,
    /// Ends with whether nobody else has let the device go on before.
    watch: Option<JoinHandle<Result<bool>>>,
}

impl Stoppable {
    /// A device of this name over a disk, which nobody else can have exclusively meanwhile.
    pub(crate) fn over(disk: &Disk, name: &'static str) -> Result<Stoppable> {
        let table = format!("0 {} linear {} 0", disk.sectors, disk.path().display());
        run(&["dmsetup", "create", name, "--table", &table])?;
        let device = Stoppable { name, gone: false };
        let path = device.path();
        wait::until(
            "the node of a device of device mapper",
            Duration::from_secs(10),
            || Ok(path.exists().then_some(())),
        )?;
        Ok(device)
    }

    fn path(&self) -> PathBuf {
        Path::new("/dev/mapper").join(self.name)
    }

    /// Opens it for reading and writing.
    pub(crate) fn open(&self) -> Result<File> {
        let path = self.path();
        let file = File::options().read(true).write(true).open(&path);
        file.with_context(|| format!("cannot open {}", path.display()))
    }

    /// Nothing is lost and nothing fails: all of it is executed later.
    pub(crate) fn stop(&self) -> Result<Standstill> {
        let name = self.name;
        run(&["dmsetup", "suspend", "--noflush", "--nolockfs", name])?;
        let (over, told) = mpsc::channel();
        let watch = thread::spawn(move || {
            let in_time = told.recv_timeout(LONGEST) != Err(RecvTimeoutError::Timeout);
            run(&["dmsetup", "resume", name])?;
            Ok(in_time)
        });
        Ok(Standstill {
            over,
            watch: Some(watch),
        })
    }

    /// Takes it away. Nobody may have it open any more.
    pub(crate) fn remove(mut self) -> Result<()> {
        self.gone = true;
        run(&["dmsetup", "remove", "--retry", self.name])
    }
}

impl Standstill {
    /// Lets the device go on.
    ///
    /// # Errors
    ///
    /// It had to go on before: what was done meanwhile has waited for it.
    pub(crate) fn end(mut self) -> Result<()> {
        ensure!(
            self.go_on()?,
            "something waited for {LONGEST:?}, until the device went on"
        );
        Ok(())
    }

    fn go_on(&mut self) -> Result<bool> {
        let Some(watch) = self.watch.take() else {
            return Ok(true);
        };
        // It has ended if the time is over.
        let _ended = self.over.send(());
        watch
            .join()
            .map_err(|_| anyhow!("the thread that lets the device go on died"))?
    }
}

impl Drop for Standstill {
    fn drop(&mut self) {
        if let Err(error) = self.go_on() {
            eprintln!("hostile: a device stands still: {error:#}");
        }
    }
}

impl Drop for Stoppable {
    fn drop(&mut self) {
        if !self.gone {
            if let Err(error) = run(&["dmsetup", "remove", "--retry", self.name]) {
                eprintln!(
                    "hostile: cannot remove {}: {error:#}",
                    self.path().display()
                );
            }
        }
    }
}
