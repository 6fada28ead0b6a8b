// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A device that stands still on command: requests to it wait until it resumes.

use crate::disk::{run, BackingDevice};
use crate::wait;
use anyhow::{anyhow, ensure, Context, Result};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Longest standstill of a device. Then waiting requests end, so that the attack fails instead of hanging.
const LONGEST: Duration = Duration::from_secs(60);

/// A device of device mapper that maps all of another one. Dropping it removes it.
pub(crate) struct StoppableDevice {
    name: &'static str,
    gone: bool,
}

/// The device stands still while this value lives.
pub(crate) struct Standstill {
    over: Sender<()>,
    /// Thread that limits the time. It returns true unless it had to resume the device itself.
    watch: Option<JoinHandle<Result<bool>>>,
}

impl StoppableDevice {
    /// Makes a device of this name over a disk, which no other program can open exclusively while it exists.
    pub(crate) fn over(disk: &BackingDevice, name: &'static str) -> Result<StoppableDevice> {
        let table = format!("0 {} linear {} 0", disk.sectors, disk.path().display());
        run(&["dmsetup", "create", name, "--table", &table])?;
        let device = StoppableDevice { name, gone: false };
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

    /// Stops the device. Requests are neither lost nor failed: all of them are executed later.
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

    /// Removes the device. It must not be open any more.
    pub(crate) fn remove(mut self) -> Result<()> {
        self.gone = true;
        run(&["dmsetup", "remove", "--retry", self.name])
    }
}

impl Standstill {
    /// Resumes the device.
    ///
    /// # Errors
    ///
    /// Fails if the device had to resume before, because the test's steps have then waited for it.
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
        // The thread has ended if the time is over.
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

impl Drop for StoppableDevice {
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
