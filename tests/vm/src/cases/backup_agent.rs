// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Backups of a disk whose file system QEMU's guest agent freezes, over a channel of Xen: the agent of Debian in a guest.

use super::tap::{image, VDEV};
use super::{Case, Context, SharedGuest};
use crate::guest::{Config, Guest, GuestKind};
use crate::sh::{self, Output};
use crate::tap::{self, ServedDisk};
use anyhow::{ensure, Context as _, Result};
use std::fs;
use std::path::Path;
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// The guest, and the socket of its agent that `--freeze` uses without a value.
const NAME: &str = "frozen";
const SOCKETS: &str = "/run/xentap/agent";
/// MiB of the disk.
const SIZE: u32 = 48;
const LIMIT: Duration = Duration::from_secs(180);
/// Folder of the backups, and the tapimg that waits with the copy until the file `GO` exists.
const FOLDER: &str = "/srv/vmtest/agent-backups";
const TAPIMG: &str = "/srv/vmtest/agent-tapimg";
const COPYING: &str = "/srv/vmtest/agent-copying";
const GO: &str = "/srv/vmtest/agent-go";
/// System calls of `tap-ctl backup`, where the answer of the agent is seen.
const TRACE: &str = "/run/vmtest/agent.trace";
/// Exit status of a backup whose file systems were not frozen.
const REFUSED: i32 = 6;

/// Starts the agent as the manual says.
const START: &str = "mkdir -p /tmp/qga && qemu-ga --daemonize --method=isa-serial --path=/dev/hvc1 --statedir=/tmp/qga \
    --pidfile=/tmp/qga/pid --logfile=/tmp/qga/log --verbose --fsfreeze-hook=/tmp/hook";
/// The agent calls it before it freezes, and waits if the file `/tmp/hold` exists.
const HOOK: &str = "printf '#!/bin/sh\\nwhile [ -e /tmp/hold ]; do touch /tmp/held; usleep 50000; done\\n' >/tmp/hook; \
    chmod +x /tmp/hook";
/// Writes small files to the disk, one after the other, with the time of each in `/tmp/ticks`.
const WRITE: &str = "i=0; rm -f /tmp/stop /tmp/ticks; while [ ! -e /tmp/stop ]; do i=$((i+1)); \
    dd if=/dev/zero of=/mnt/f$((i%16)) bs=16k count=1 conv=fsync 2>/dev/null || exit 1; \
    cut -d' ' -f1 /proc/uptime >>/tmp/ticks; done";

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    use GuestKind::{Hvm, Pv, Pvh};
    let case = |name, about, run: fn(&mut Context) -> Result<()>| {
        let case = Case::new(name, about, SharedGuest::Nothing, run);
        case.supervised().no_leaks().nightly()
    };
    let about = "QEMU's agent freezes the file system for a backup, which then needs no journal; a backup without it does";
    vec![
        case("backup.agent", about, |context| agreed(context, Pv)),
        case("backup.agent_pvh", about, |context| agreed(context, Pvh)),
        case("backup.agent_hvm", about, |context| agreed(context, Hvm)),
        case(
            "backup.agent_lost",
            "an agent that is silent, or is killed while the file system is frozen, leaves a message and a way to thaw",
            lost,
        ),
    ]
}

/// A guest with an agent and a mounted file system on a tap disk.
struct AgentBed {
    guest: Guest,
    disk: ServedDisk,
    image: String,
}

impl AgentBed {
    fn new(context: &mut Context, kind: GuestKind) -> Result<AgentBed> {
        let image = image(context, "agent.img", SIZE)?;
        make_tool(context)?;
        fs::create_dir_all(SOCKETS)?;
        let config = Config {
            agent: Some(format!("{SOCKETS}/{NAME}")),
            ..Config::new(NAME, kind, 1)
        };
        let guest = Guest::create(config)?;
        let disk = ServedDisk::attach(&guest, &tap::disk(&format!("aio:{image}"), VDEV, "w"))?;
        guest.run(&format!(
            "mkfs.ext4 -q /dev/{VDEV} && mount -t ext4 /dev/{VDEV} /mnt"
        ))?;
        guest.run(HOOK)?;
        sh::wait_for("the guest's end of the channel", LIMIT, || {
            // The node of the device is there without a channel, too.
            Ok(guest.status("[ -e /sys/bus/xen/devices/console-1 ]")?.rc == 0)
        })?;
        guest.run(START)?;
        Ok(AgentBed { guest, disk, image })
    }

    /// Takes a backup beside other actions.
    fn back_up(&self, options: &str) -> JoinHandle<Result<Output>> {
        let line = format!("{} {options} --json", command());
        thread::spawn(move || sh::status(&["sh", "-c", &line], LIMIT))
    }

    /// Restores the newest backup, and returns true if its file system wants its journal to be replayed.
    fn restored_wants_replay(&self, to: &str) -> Result<bool> {
        let target = format!("aio:{to}");
        let words = ["tap-ctl", "restore", FOLDER, &target, "--force"];
        sh::run_for(&words, LIMIT)?;
        wants_replay(to)
    }

    /// Returns the number of files that the guest has written.
    fn ticks(&self) -> Result<usize> {
        let text = self.guest.run("cat /tmp/ticks 2>/dev/null | wc -l")?;
        text.trim().parse().context("`wc` printed no number")
    }

    /// Waits until the guest has written more files than now.
    fn wait_writes(&self) -> Result<()> {
        let before = self.ticks()?;
        sh::wait_for("a write of the guest", LIMIT, || {
            Ok(self.ticks()? > before + 2)
        })
    }

    /// Returns the longest time in seconds between two writes of the guest.
    fn longest_wait(&self) -> Result<f64> {
        let text = self.guest.run("cat /tmp/ticks")?;
        let times: Result<Vec<f64>, _> = text.split_whitespace().map(str::parse).collect();
        let times = times.context("a time")?;
        let gaps = times.windows(2).map(|pair| pair[1] - pair[0]);
        Ok(gaps.fold(0.0, f64::max))
    }

    /// Returns how often the agent's log has these words.
    fn logged(&self, words: &str) -> Result<usize> {
        let log = self.guest.run("cat /tmp/qga/log")?;
        Ok(log.matches(words).count())
    }

    /// Checks that the disk is served from its own image, and that nothing is beside that.
    fn check_chain(&self) -> Result<()> {
        super::backup::check_chain(&self.disk, &self.image)
    }

    fn end(self) -> Result<()> {
        self.guest.run("umount /mnt && killall qemu-ga")?;
        self.disk.goes_with(self.guest)
    }
}

fn command() -> String {
    format!("tap-ctl backup {NAME} {VDEV} {FOLDER} --tapimg {TAPIMG}")
}

/// Makes a tapimg that says when it begins a copy, and waits until it may.
fn make_tool(context: &mut Context) -> Result<()> {
    let script = format!(
        "#!/bin/sh\n[ \"$3\" = convert ] && {{ touch {COPYING}; while [ ! -e {GO} ]; do sleep 0.05; done; }}\n\
         exec tapimg \"$@\"\n"
    );
    fs::create_dir_all(FOLDER).context("cannot make the folder of backups")?;
    sh::program(TAPIMG, &script)?;
    fs::write(GO, "")?;
    context.at_end(format!("remove {FOLDER}"), || {
        fs::remove_dir_all(FOLDER)?;
        sh::run(&["rm", "-f", TAPIMG, COPYING, GO]).map(drop)
    });
    Ok(())
}

/// Returns true if a mount of the file system in this image would replay its journal.
fn wants_replay(image: &str) -> Result<bool> {
    let text = sh::run(&["dumpe2fs", "-h", image])?;
    let features = text
        .lines()
        .find(|line| line.starts_with("Filesystem features:"));
    Ok(features
        .context("the image has no file system")?
        .contains("needs_recovery"))
}

/// Returns the output of a backup that must have this status.
fn ended(backup: JoinHandle<Result<Output>>, status: i32) -> Result<Output> {
    let output = backup
        .join()
        .unwrap_or_else(|_| anyhow::bail!("the thread of the backup has died"))?;
    ensure!(
        output.rc == status,
        "the backup ended with {}: {}",
        output.rc,
        output.text
    );
    Ok(output)
}

fn agreed(context: &mut Context, kind: GuestKind) -> Result<()> {
    let restored = image(context, "agent-restored.img", SIZE)?;
    let bed = AgentBed::new(context, kind)?;
    let writer = bed.guest.start(WRITE)?;
    bed.wait_writes()?;
    ended(bed.back_up(""), 0)?;
    ensure!(
        bed.restored_wants_replay(&restored)?,
        "the file system of a backup without --freeze wants no replay, so nothing shows a freeze"
    );
    ensure!(
        bed.logged("filesystem freeze")? == 0,
        "the agent froze before"
    );
    fs::remove_file(GO)?;
    // No program flushes it.
    bed.guest.run("echo all of it >/mnt/unsynced")?;
    fs::remove_file(COPYING)?;
    let backup = bed.back_up("--freeze");
    sh::wait_for("the copy", LIMIT, || {
        Ok(Path::new(COPYING).exists() || backup.is_finished())
    })?;
    // The copy is still to come.
    let writes = bed.wait_writes();
    fs::write(GO, "")?;
    let output = ended(backup, 0)?;
    writes.context("the guest writes nothing while the copy is made")?;
    ensure!(
        output.stdout.contains("\"file-system\""),
        "{}",
        output.stdout
    );
    bed.check_chain()?;
    ensure!(
        !bed.restored_wants_replay(&restored)?,
        "the file system of a frozen guest wants a replay"
    );
    sh::run(&["e2fsck", "-fn", &restored]).context("the file system of the backup is damaged")?;
    let text = sh::run(&["debugfs", "-R", "cat /unsynced", &restored])?;
    ensure!(text == "all of it\n", "the file in the backup has `{text}`");
    for words in [
        "due to filesystem freeze",
        "re-enabled due to filesystem unfreeze",
    ] {
        let count = bed.logged(words)?;
        ensure!(count == 1, "the agent's log has `{words}` {count} times");
    }
    bed.guest.run("touch /tmp/stop")?;
    let done = bed.guest.wait(writer, LIMIT)?;
    ensure!(done.rc == 0, "a write of the guest failed: {}", done.text);
    let wait = bed.longest_wait()?;
    ensure!(wait < 30.0, "a write of the guest waited for {wait} s");
    context.note(&format!("the longest wait of a write was {wait} s"))?;
    bed.end()
}

/// A backup whose snapshot waits while the file system is frozen, because blktapctrl is stopped.
struct HeldBackup(JoinHandle<Result<Output>>);

impl HeldBackup {
    fn begin(bed: &AgentBed, limit: u32) -> Result<HeldBackup> {
        bed.guest.run("rm -f /tmp/held; touch /tmp/hold")?;
        let traced = format!(
            "strace -f -o {TRACE} -e trace=write {} --freeze --freeze-limit {limit}",
            command()
        );
        let backup = thread::spawn(move || sh::status(&["sh", "-c", &traced], LIMIT));
        sh::wait_for("the agent's hook", LIMIT, || {
            Ok(bed.guest.status("[ -e /tmp/held ]")?.rc == 0)
        })?;
        signal_supervisor("STOP")?;
        bed.guest.run("rm /tmp/hold")?;
        sh::wait_for("the freeze", LIMIT, || {
            Ok(fs::read_to_string(TRACE)?.contains("write(1, \"\\\"frozen\\\"\\n\""))
        })?;
        Ok(HeldBackup(backup))
    }

    /// Lets the snapshot be taken, and returns the end of the backup.
    fn end(self, status: i32) -> Result<Output> {
        signal_supervisor("CONT")?;
        ended(self.0, status)
    }
}

fn signal_supervisor(signal: &str) -> Result<()> {
    sh::run(&["busybox", "killall", &format!("-{signal}"), "blktapctrl"]).map(drop)
}

/// Follows the message about a guest that may still be frozen. Debian's kernel refuses that by default.
fn thaw_by_kernel(bed: &AgentBed) -> Result<()> {
    let thaw_says = |words: &str| {
        sh::run(&["xl", "sysrq", NAME, "j"])?;
        sh::wait_for(words, LIMIT, || Ok(bed.guest.run("dmesg")?.contains(words)))
    };
    thaw_says("This sysrq operation is disabled")?;
    let before = bed.ticks()?;
    bed.guest.run("echo 502 >/proc/sys/kernel/sysrq")?;
    ensure!(bed.ticks()? == before, "the file system was not frozen");
    thaw_says("Emergency Thaw of all frozen filesystems")?;
    bed.wait_writes().context("the guest is still frozen")
}

fn lost(context: &mut Context) -> Result<()> {
    context.at_end("let blktapctrl run", || signal_supervisor("CONT"));
    let bed = AgentBed::new(context, GuestKind::Pv)?;
    let writer = bed.guest.start(WRITE)?;
    bed.wait_writes()?;
    // The chain has a dirty bitmap from here on.
    ended(bed.back_up(""), 0)?;

    bed.guest.run("killall -STOP qemu-ga")?;
    let output = ended(bed.back_up("--freeze --freeze-limit 5"), REFUSED)?;
    ensure!(
        output.text.contains("the agent does not answer"),
        "{}",
        output.text
    );
    ensure!(!output.text.contains("still be frozen"), "{}", output.text);
    bed.wait_writes()?;
    bed.check_chain()?;
    bed.guest.run("killall -CONT qemu-ga")?;
    ended(bed.back_up("--freeze"), 0).context("after an agent that was silent")?;

    // As a service manager does.
    let held = HeldBackup::begin(&bed, 40)?;
    bed.guest.run(&format!("killall -KILL qemu-ga; {START}"))?;
    held.end(0)
        .context("with an agent that was started again")?;
    bed.wait_writes()?;
    bed.check_chain()?;

    let held = HeldBackup::begin(&bed, 10)?;
    bed.guest.run("killall -KILL qemu-ga")?;
    let output = held.end(REFUSED)?;
    let remedy = format!("may still be frozen: the agent does not answer. `xl sysrq {NAME} j`");
    ensure!(output.text.contains(&remedy), "{}", output.text);
    bed.check_chain()?;
    thaw_by_kernel(&bed)?;
    bed.guest.run("touch /tmp/stop")?;
    let done = bed.guest.wait(writer, LIMIT)?;
    ensure!(done.rc == 0, "a write of the guest failed: {}", done.text);
    bed.guest.run(START)?;
    bed.end()
}
