// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a command line names a disk. Every verb that works on one takes `GUEST [VDEV]`, `-m MINOR` and `--vbd PATH`.
//!
//! A verb with a word of its own behind them, such as the target of `mirror`, takes the last word for that.

use super::{OverlayFormat, Verb};
use clap::{ArgGroup, Args};
use control::{Driver, Failure, Target};
use std::path::{Path, PathBuf};

/// A disk, by its guest and its name there, by its node, its process or its backend's directory.
#[derive(Clone, Debug, Default, Args)]
#[group(skip)]
#[command(group = ArgGroup::new("disk").args(["guest", "pid", "minor", "vbd"]).required(true).multiple(true))]
pub(crate) struct Which {
    /// Guest of the disk: its name or its number, as in xl list
    #[arg(value_name = "GUEST", conflicts_with_all = ["pid", "minor", "vbd"])]
    pub(crate) guest: Option<String>,
    /// The disk's name in the guest, such as xvda, or its number; may be left out if the guest has one tap disk
    #[arg(value_name = "VDEV", requires = "guest")]
    pub(crate) vdev: Option<String>,
    /// Its process
    #[arg(short, long)]
    pub(crate) pid: Option<u32>,
    /// Its node, as in tap-ctl list
    #[arg(short, long)]
    pub(crate) minor: Option<u32>,
    /// The backend's directory in xenstore for which it was made
    #[arg(long, value_name = "PATH")]
    pub(crate) vbd: Option<String>,
    /// True if a number alone was taken for that of its node.
    #[arg(skip)]
    pub(crate) is_lone: bool,
}

impl Which {
    /// Takes a number alone for that of a node, as verbs did before they knew guests.
    fn take_lone(&mut self) {
        let number = self.guest.as_deref().map(str::parse::<u32>);
        if let (Some(Ok(minor)), None) = (number, &self.vdev) {
            *self = Which {
                minor: Some(minor),
                is_lone: true,
                ..Which::default()
            };
        }
    }

    /// Whether it is named by another thing than its guest.
    fn is_direct(&self) -> bool {
        self.pid.is_some() || self.minor.is_some() || self.vbd.is_some()
    }
}

impl Verb {
    /// Gives the words of the command line their meaning, where the last one is no part of a disk's name.
    ///
    /// # Errors
    /// There are too many words, or too few.
    pub(crate) fn settle(&mut self) -> Result<(), Failure> {
        match self {
            Verb::Snapshot(snapshot) => snapshot.settle(),
            Verb::Mirror(mirror) => mirror.settle("mirror"),
            Verb::Commit(mirror) => mirror.settle("commit"),
            Verb::Backup(backup) => backup.settle(),
            Verb::Trace(trace) => {
                trace.which.take_lone();
                Ok(())
            }
            Verb::Handoff(handoff) => {
                handoff.which.take_lone();
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Returns the disks that the verb works on.
    pub(crate) fn disks(&mut self) -> Vec<&mut Which> {
        match self {
            Verb::Detach(which) | Verb::Stats(which) => vec![which],
            Verb::Open(open) => vec![&mut open.which],
            Verb::Close(close) => vec![&mut close.which],
            Verb::Pause(pause) => vec![&mut pause.which],
            Verb::Unpause(unpause) => vec![&mut unpause.which],
            Verb::Handoff(handoff) => vec![&mut handoff.which],
            Verb::Resize(resize) => vec![&mut resize.which],
            Verb::Set(set) => vec![&mut set.which],
            Verb::Scrub(scrub) => vec![&mut scrub.which],
            Verb::Stream(stream) => vec![&mut stream.which],
            Verb::Mirror(mirror) | Verb::Commit(mirror) => vec![&mut mirror.which],
            Verb::Dirty(dirty) => vec![&mut dirty.which],
            Verb::Trace(trace) => vec![&mut trace.which],
            Verb::Destroy(destroy) => vec![&mut destroy.which],
            Verb::Backup(backup) => backup.disks.iter_mut().collect(),
            Verb::Snapshot(snapshot) => snapshot.disks.iter_mut().map(|(which, _)| which).collect(),
            _ => Vec::new(),
        }
    }

    /// Returns the number that was taken for that of a node because it stood alone.
    pub(crate) fn lone_minor(&mut self) -> Option<u32> {
        let mut disks = self.disks().into_iter();
        disks.find(|which| which.is_lone)?.minor
    }
}

/// Copying a disk.
#[derive(Debug, Args)]
pub(crate) struct Mirror {
    /// Guest of the disk: its name or its number, as in xl list
    #[arg(value_name = "GUEST")]
    guest: Option<String>,
    /// The disk's name in the guest, such as xvda, or its number; may be left out if the guest has one tap disk
    #[arg(value_name = "VDEV")]
    vdev: Option<String>,
    /// Image to which the disk switches, such as qcow2:/srv/b.qcow2; for commit the one below. It is the last word
    #[arg(value_name = "TARGET")]
    last: Option<String>,
    /// Process of the disk
    #[arg(short, long)]
    pid: Option<u32>,
    /// Node of the disk, as in tap-ctl list
    #[arg(short, long)]
    minor: Option<u32>,
    /// The backend's directory in xenstore for which the disk was made
    #[arg(long, value_name = "PATH")]
    vbd: Option<String>,
    /// Most MiB in a second, or another amount with its suffix, such as 1.5G
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = super::some_mib)]
    pub(crate) rate: u32,
    /// Begin it, and wait until it is over: the exit status says whether it was done
    #[arg(long)]
    pub(crate) wait: bool,
    /// End the one that runs
    #[arg(long, conflicts_with_all = ["wait", "rate"])]
    pub(crate) cancel: bool,
    /// Say how far it is, or how the last one has ended, and change nothing
    #[arg(long, conflicts_with_all = ["wait", "rate", "cancel"])]
    pub(crate) show: bool,
    /// The disk.
    #[arg(skip)]
    pub(crate) which: Which,
    /// The image.
    #[arg(skip)]
    pub(crate) target: Option<Target>,
}

impl Mirror {
    fn settle(&mut self, verb: &str) -> Result<(), Failure> {
        let words = [self.guest.take(), self.vdev.take(), self.last.take()];
        let mut words: Vec<String> = words.into_iter().flatten().collect();
        self.which = Which {
            pid: self.pid,
            minor: self.minor,
            vbd: self.vbd.clone(),
            ..Which::default()
        };
        let has_target = !self.cancel && !self.show;
        if has_target {
            let last = words.pop().ok_or_else(|| self.usage(verb))?;
            self.target = Some(last.parse().map_err(|why: Failure| {
                Failure::invalid(format!(
                    "the last word is the image, and {last} is none: {why}"
                ))
            })?);
        }
        let mut words = words.into_iter();
        (self.which.guest, self.which.vdev) = (words.next(), words.next());
        // A disk is named in one way.
        let is_named_once = self.which.guest.is_some() != self.which.is_direct();
        match is_named_once && words.next().is_none() {
            true => Ok(()),
            false => Err(self.usage(verb)),
        }
    }

    fn usage(&self, verb: &str) -> Failure {
        let end = match (self.cancel, self.show) {
            (true, _) => "--cancel",
            (_, true) => "--show",
            _ => "aio:/srv/a.img",
        };
        let example = ["tap-ctl", verb, "web xvda", end].join(" ");
        let other = ["tap-ctl", verb, "-m 0", end].join(" ");
        Failure::invalid(format!(
            "name the disk once, and then the image unless --cancel or --show is there, as in `{example}` or `{other}`"
        ))
    }
}

/// A disk that switches to a new image.
#[derive(Debug, Args)]
pub(crate) struct Snapshot {
    /// Guest of the disk, its name there (may be left out if the guest has one tap disk), and where the new image is to
    /// be, best in the folder of the one that the disk has; nothing may be there. More disks of the same instant follow
    /// in the same way. With -m or --vbd the new image alone
    #[arg(value_name = "GUEST [VDEV] NEW", required = true)]
    words: Vec<PathBuf>,
    /// Node of the disk, as in tap-ctl list; several times for several disks, whose new images follow in that order
    #[arg(short, long, conflicts_with = "vbd")]
    minor: Vec<u32>,
    /// The backend's directory in xenstore for which the disk was made; several times as -m
    #[arg(long, value_name = "PATH")]
    vbd: Vec<String>,
    /// Format of the new images; a VHD only over a VHD or a raw image
    #[arg(long, value_enum, default_value_t)]
    pub(crate) format: OverlayFormat,
    /// Each disk with its new image.
    #[arg(skip)]
    pub(crate) disks: Vec<(Which, PathBuf)>,
}

impl Snapshot {
    fn settle(&mut self) -> Result<(), Failure> {
        let by_minor = self.minor.iter().map(|minor| Which {
            minor: Some(*minor),
            ..Which::default()
        });
        let by_directory = self.vbd.iter().map(|vbd| Which {
            vbd: Some(vbd.clone()),
            ..Which::default()
        });
        let direct: Vec<Which> = by_minor.chain(by_directory).collect();
        let words = std::mem::take(&mut self.words);
        self.disks = match direct.is_empty() {
            true => named(&words)?,
            false if direct.len() == words.len() => direct.into_iter().zip(words).collect(),
            false => {
                return Err(Failure::invalid(
                    "name a new image for each disk: `tap-ctl snapshot -m 0 -m 1 /srv/b.qcow2 /srv/d.qcow2`",
                ))
            }
        };
        self.disks.iter().try_for_each(|(_, image)| is_path(image))
    }
}

/// Parts words into disks with their new images: after a guest a word that looks like a disk's name is one, unless it is
/// the last, and the next one is the image.
fn named(words: &[PathBuf]) -> Result<Vec<(Which, PathBuf)>, Failure> {
    let text = |word: &PathBuf| word.to_str().map(str::to_owned);
    let (mut disks, mut rest) = (Vec::new(), words);
    while let [guest, behind @ ..] = rest {
        let vdev = match behind {
            [vdev, _, ..] => text(vdev).filter(|vdev| control::is_vdev(vdev)),
            _ => None,
        };
        let behind = behind.get(usize::from(vdev.is_some())..);
        // A path is no guest.
        let guest = text(guest).filter(|guest| !guest.contains('/'));
        let (Some(guest), Some([image, others @ ..])) = (guest, behind) else {
            return Err(Failure::invalid(
                "name each disk with its new image: `tap-ctl snapshot web xvda /srv/b.qcow2 web xvdb /srv/d.qcow2`",
            ));
        };
        let mut which = Which {
            guest: Some(guest),
            vdev,
            ..Which::default()
        };
        which.take_lone();
        disks.push((which, image.clone()));
        rest = others;
    }
    Ok(disks)
}

/// A target instead of a path would be a file in a folder that has the driver's name.
fn is_path(image: &Path) -> Result<(), Failure> {
    let text = image.display().to_string();
    match text.split_once(':') {
        Some((driver, path)) if driver.parse::<Driver>().is_ok() => {
            let form = ["--format", driver].join(" ");
            Err(Failure::invalid(format!(
                "the new image {text} is to be a path without the driver: write {path}, and {form} if that is not the default"
            )))
        }
        _ => Ok(()),
    }
}

/// Settings of a trace.
#[derive(Debug, Args)]
pub(crate) struct Trace {
    #[command(flatten)]
    pub(crate) which: Which,
    /// Begin, in this file, where nothing may be
    #[arg(short, long, alias = "to", value_name = "FILE", conflicts_with = "end")]
    pub(crate) output: Option<PathBuf>,
    /// Store the data of writes, too: then the writes can be replayed
    #[arg(long, requires = "output")]
    pub(crate) data: bool,
    /// Bytes of the file, 16M to 64G
    #[arg(long, default_value = "64M", requires = "output", value_parser = control::typed_size)]
    pub(crate) size: u64,
    /// End
    #[arg(long)]
    pub(crate) end: bool,
}

/// A disk, or all of them, for new processes.
#[derive(Debug, Args)]
pub(crate) struct Handoff {
    #[command(flatten)]
    pub(crate) which: Which,
    /// All disks that are served; those that fail are named, and stay with the process that they have
    #[arg(long, group = "disk", value_name = "PROGRAM", conflicts_with_all = ["guest", "minor", "pid", "vbd", "to"])]
    pub(crate) all: Option<Option<PathBuf>>,
    /// The tapdisk to run from now on, and whenever the disk's process is replaced; what blktapctrl starts
    /// by default if not said
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) to: Option<PathBuf>,
    /// Disks that are handed over at once
    #[arg(short, long, default_value_t = 4, requires = "all", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) jobs: u32,
    /// Seconds that the new process gets for each of its steps
    #[arg(short, long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) timeout: u32,
}

#[cfg(test)]
mod tests {
    use crate::cli::{Cli, Verb};
    use clap::Parser;
    use control::Failure;

    fn settled(line: &str) -> Result<Verb, Failure> {
        let cli = Cli::try_parse_from(line.split(' '));
        let mut verb = cli
            .map_err(|error| Failure::invalid(error.to_string()))?
            .verb;
        verb.settle().map(|()| verb)
    }

    /// Guest, vdev and node of each disk of a line.
    fn disks(line: &str) -> Vec<(Option<String>, Option<String>, Option<u32>)> {
        let mut verb = settled(line).unwrap_or_else(|why| panic!("{line}: {why}"));
        let disks = verb.disks().into_iter();
        disks
            .map(|which| (which.guest.clone(), which.vdev.clone(), which.minor))
            .collect()
    }

    fn web(vdev: &str) -> (Option<String>, Option<String>, Option<u32>) {
        let vdev = (!vdev.is_empty()).then(|| vdev.to_owned());
        (Some("web".into()), vdev, None)
    }

    #[test]
    fn every_verb_of_a_disk_takes_its_guest_its_node_and_its_directory() {
        for (verb, end) in [
            ("pause", ""),
            ("unpause", ""),
            ("close", " -f"),
            ("detach", ""),
            ("open", " -a aio:/srv/a.img"),
            ("stats", ""),
            ("destroy", ""),
            ("resize", " --size 1G"),
            ("set", " --bps 20M"),
            ("scrub", ""),
            ("stream", " --show"),
            ("dirty", " --mark a"),
            ("trace", " --output /dev/shm/a"),
            ("handoff", " -t 5"),
            ("mirror", " aio:/srv/b.img --wait"),
            ("mirror", " --cancel"),
            ("commit", " aio:/srv/b.img"),
            ("commit", " --show"),
            ("snapshot", " /srv/b.qcow2"),
        ] {
            let of = |disk: &str| disks(&format!("tap-ctl {verb} {disk}{end}"));
            assert_eq!(of("web xvda"), [web("xvda")], "{verb}");
            assert_eq!(of("web"), [web("")], "{verb}");
            assert_eq!(of("3 51712")[0].1.as_deref(), Some("51712"), "{verb}");
            assert_eq!(of("-m 7"), [(None, None, Some(7))], "{verb}");
            let mut by = settled(&format!("tap-ctl {verb} --vbd backend/vbd/3/51712{end}"));
            let its = by.as_mut().map(|verb| verb.disks()[0].vbd.clone());
            assert_eq!(its, Ok(Some("backend/vbd/3/51712".into())), "{verb}");
            for wrong in [format!("-m 7 web{end}"), end.trim().to_owned()] {
                let line = format!("tap-ctl {verb} {wrong}");
                assert!(settled(line.trim()).is_err(), "{line}");
            }
        }
    }

    #[test]
    fn a_number_alone_is_a_node_where_it_was_one() {
        for line in [
            "tap-ctl trace 3",
            "tap-ctl handoff 3",
            "tap-ctl snapshot 3 /srv/b.qcow2",
        ] {
            let mut verb = settled(line).expect(line);
            assert_eq!(verb.lone_minor(), Some(3), "{line}");
        }
        let mut verb = settled("tap-ctl pause 3").expect("a guest");
        assert_eq!(verb.lone_minor(), None);
        assert_eq!(disks("tap-ctl pause 3")[0].0.as_deref(), Some("3"));
    }

    #[test]
    fn several_disks_of_a_snapshot_are_told_apart() {
        let both = disks("tap-ctl snapshot web xvda /srv/b.qcow2 web xvdb d.qcow2");
        assert_eq!(both, [web("xvda"), web("xvdb")]);
        let both = disks("tap-ctl snapshot web b.qcow2 web xvdb");
        assert_eq!(both, [web(""), web("")]);
        let both = disks("tap-ctl snapshot -m 4 -m 5 /srv/b.qcow2 /srv/d.qcow2");
        assert_eq!(both, [(None, None, Some(4)), (None, None, Some(5))]);
        for (line, words) in [
            ("tap-ctl snapshot -m 4 -m 5 /a", "for each disk"),
            ("tap-ctl snapshot web", "each disk"),
            ("tap-ctl snapshot web xvda qcow2:/x", "write /x"),
            ("tap-ctl mirror web xvda b.img", "b.img is none"),
            ("tap-ctl mirror -m 0 web aio:/a", "web xvda"),
        ] {
            let why = settled(line).expect_err(line).message;
            assert!(why.contains(words), "{line}: {why}");
        }
    }
}
