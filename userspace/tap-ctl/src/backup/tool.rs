// SPDX-License-Identifier: MIT OR Apache-2.0
//! tapimg, which copies, compares and merges images.

use control::{Code, Driver, Extent, Failure, Target};
use rustix::process::{kill_process, Pid, Signal};
use serde::Deserialize;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::ffi::OsString;
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// Time between two looks whether it has ended.
const STEP: Duration = Duration::from_millis(20);

/// Bytes that tapimg prints at most.
const LONGEST: u64 = 1 << 20;

/// Result of a copy, of which only this matters here.
#[derive(Debug, Deserialize)]
pub(crate) struct CopiedImage {
    /// Bytes of the disk that the new image has itself.
    pub(crate) copied: u64,
    /// Bytes of storage that its file takes.
    pub(crate) allocated: Option<u64>,
}

/// A tapimg that has ended.
struct EndedTool {
    status: ExitStatus,
    /// Its standard output.
    output: String,
}

/// tapimg, and whether a signal has ended the work.
///
/// tapimg shows its progress where the standard error is a terminal.
#[derive(Debug)]
pub(crate) struct CopyTool {
    program: PathBuf,
    rate: Option<u32>,
    /// A program reads the output: tapimg has no terminal.
    is_quiet: bool,
    stop: Arc<AtomicBool>,
}

impl CopyTool {
    /// From now on signals end only the copy that runs, so that the caller can clean up.
    ///
    /// # Errors
    /// The system refuses to.
    pub(crate) fn start(
        program: &Path,
        rate: Option<u32>,
        is_quiet: bool,
    ) -> Result<Self, Failure> {
        let stop = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register(signal, stop.clone())
                .map_err(|error| Failure::system("cannot wait for signals", &error))?;
        }
        Ok(Self {
            program: program.to_owned(),
            rate,
            is_quiet,
            stop,
        })
    }

    /// Says what tapimg does next, where its progress is seen.
    fn announce(&self, text: &str) {
        if !self.is_quiet && io::stderr().is_terminal() {
            crate::complain(text);
        }
    }

    /// # Errors
    /// A signal has ended the work.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        match self.stop.load(Ordering::Relaxed) {
            true => Err(Failure::new(Code::Other, "ended by a signal")),
            false => Ok(()),
        }
    }

    /// Copies an image to a new file; with a parent only the ranges, which differ from that. Returns what tapimg
    /// says of the new one.
    pub(crate) fn convert(
        &self,
        from: &str,
        to: &str,
        options: &[OsString],
        ranges: Option<&[Extent]>,
    ) -> Result<CopiedImage, Failure> {
        let mut words: Vec<OsString> = ["convert", from, to, "--json"].map(OsString::from).into();
        words.extend(options.iter().cloned());
        self.announce(&format!("copying {from} to {to}"));
        let ended = self.run(words, ranges, true)?;
        if !ended.status.success() {
            return Err(Failure::new(
                Code::System,
                format!("tapimg could not copy {from} to {to}: see its message"),
            ));
        }
        serde_json::from_str(&ended.output).map_err(|error| {
            Failure::new(
                Code::System,
                format!(
                    "{} answered something else: {error}: install it and tap-ctl from one package",
                    self.program.display()
                ),
            )
        })
    }

    /// Compares an image with its copy.
    pub(crate) fn compare(
        &self,
        one: &str,
        other: &str,
        ranges: Option<&[Extent]>,
    ) -> Result<(), Failure> {
        let words = ["compare", one, other].map(OsString::from).into();
        self.announce(&format!("comparing {one} and {other}"));
        let ended = self.run(words, ranges, true)?;
        match ended.status.code() {
            Some(0) => Ok(()),
            Some(1) => Err(Failure::new(
                Code::Image,
                format!("the copy {other} differs from {one}, so it is not used: check the storage of both"),
            )),
            _ => Err(Failure::new(
                Code::System,
                format!("tapimg could not compare {one} and {other}: see its message"),
            )),
        }
    }

    /// Merges an image that no disk uses into its backing image. A signal does not end that.
    pub(crate) fn commit(&self, overlay: &Path) -> Result<(), Failure> {
        let mut image = OsString::from("qcow2:");
        image.push(overlay);
        let ended = self.run(vec!["commit".into(), image], None, false)?;
        match ended.status.success() {
            true => Ok(()),
            false => Err(Failure::new(
                Code::System,
                format!(
                    "tapimg could not merge {} into its backing image: see its message",
                    overlay.display()
                ),
            )),
        }
    }

    fn failed(&self, error: &io::Error) -> Failure {
        Failure::system(format!("cannot run {}", self.program.display()), error)
    }

    /// Runs tapimg, which ends with this process, so that no copy continues after a kill.
    fn run(
        &self,
        words: Vec<OsString>,
        ranges: Option<&[Extent]>,
        may_stop: bool,
    ) -> Result<EndedTool, Failure> {
        let mut command = Command::new(&self.program);
        command
            .arg("--die-with")
            .arg(std::process::id().to_string());
        command.args(words).stdout(Stdio::piped());
        if may_stop {
            if let Some(rate) = self.rate {
                command.arg("--rate").arg(rate.to_string());
            }
        }
        // Ranges go through a pipe, which leaves no file behind.
        match ranges {
            Some(_) => command
                .args(["--changed", "/dev/stdin"])
                .stdin(Stdio::piped()),
            None => command.stdin(Stdio::null()),
        };
        if self.is_quiet {
            command.stderr(Stdio::piped());
        }
        let mut child = command.spawn().map_err(|error| self.failed(&error))?;
        let text: String = ranges
            .unwrap_or_default()
            .iter()
            .map(crate::dirty::line)
            .collect();
        let writer = child.stdin.take().map(|mut pipe| {
            // tapimg says what is wrong if it ends before it has read all.
            thread::spawn(move || pipe.write_all(text.as_bytes()))
        });
        let messages = child.stderr.take().map(|mut pipe| {
            // The reader of the messages may be gone.
            thread::spawn(move || io::copy(&mut pipe, &mut io::stderr()).map(|_| ()))
        });
        // Whatever it prints, it never waits for this program.
        let reader = child.stdout.take().map(|pipe| {
            thread::spawn(move || {
                let mut text = String::new();
                pipe.take(LONGEST).read_to_string(&mut text).map(|_| text)
            })
        });
        let status = self.wait(&mut child, may_stop);
        if let Some(Ok(Err(error))) = writer.map(thread::JoinHandle::join) {
            if status.as_ref().is_ok_and(ExitStatus::success) {
                return Err(self.failed(&error));
            }
        }
        // Messages come before those of this program.
        let _ = messages.map(thread::JoinHandle::join);
        let status = status?;
        let output = match reader.map(thread::JoinHandle::join) {
            Some(Ok(read)) => read.map_err(|error| self.failed(&error))?,
            _ => String::new(),
        };
        Ok(EndedTool { status, output })
    }

    fn wait(&self, child: &mut Child, may_stop: bool) -> Result<ExitStatus, Failure> {
        loop {
            let ended = child.try_wait().map_err(|error| self.failed(&error))?;
            if let Some(status) = ended {
                // A signal of the terminal ends tapimg, too.
                return match may_stop {
                    true => self.check().map(|()| status),
                    false => Ok(status),
                };
            }
            if may_stop && self.check().is_err() {
                // By a signal after which tapimg removes the image that it has begun.
                kill_process(Pid::from_child(child), Signal::TERM)
                    .map_err(|error| self.failed(&error.into()))?;
                let status = child.wait().map_err(|error| self.failed(&error))?;
                return self.check().map(|()| status);
            }
            thread::sleep(STEP);
        }
    }
}

/// Returns the image of a target as tapimg names it.
///
/// # Errors
/// The target has no file.
pub(crate) fn image(target: &Target) -> Result<String, Failure> {
    let kind = match target.driver() {
        Driver::Sync => Driver::Aio,
        driver => driver,
    };
    let path = target.path().and_then(Path::to_str);
    let path = path.ok_or_else(|| Failure::unsupported(format!("{target} has no file")))?;
    Ok(format!("{kind}:{path}"))
}
