// SPDX-License-Identifier: MIT OR Apache-2.0
//! Output for people.

use crate::dirty;
use crate::group;
use crate::list::ListedDisk;
use crate::time::utc;
use crate::trace;
use control::stats::{Counter, Direct, Mapped, Mirror, Mirroring, Stats, Stream, Streaming};
use control::supervisor::{Event, HandedOff, HungAction, Policy, Reply, Snapshot, What};
use control::tapdisk::{Disk, OnError};
use control::FrozenDevices;
use std::fmt::Write;

/// An answer as text; empty where there is nothing to say.
pub(crate) fn reply(reply: &Reply) -> String {
    match reply {
        Reply::Done => String::new(),
        Reply::Process(process) => format!("{} pid={}\n", process.program, process.pid),
        Reply::Minor { minor } => format!("{minor}\n"),
        Reply::Pid { pid } => format!("{pid}\n"),
        Reply::Opened(disk) => format!("{}\n", self::disk(disk)),
        Reply::Policy(policy) => format!("{}\n", self::policy(policy)),
        Reply::Created { minor, pid, disk } => {
            format!("minor={minor} pid={pid} {}\n", self::disk(disk))
        }
        Reply::HandedOff(handed) => format!("{}\n", handed_off(handed)),
        Reply::Snapshot(taken) => told(taken),
        Reply::Snapshots { taken } => taken.iter().map(told).collect(),
        Reply::Groups { groups } => group::show(groups, true),
        Reply::Stream(stream) => format!("{}\n", self::stream(stream)),
        Reply::Mirror(mirror) => format!("{}\n", self::mirror(mirror)),
        Reply::Marks { marks } => dirty::marks(marks),
        Reply::Changed(changed) => changed.extents.iter().map(dirty::line).collect(),
        Reply::Parked { minors } => minors.iter().map(|minor| format!("{minor}\n")).collect(),
        Reply::Trace { trace } => trace::show(trace.as_ref()),
        Reply::Stats(stats) => self::stats(stats),
        // `list` and `top`, which ask for these, show them with the guests.
        Reply::Disks { .. } | Reply::Top { .. } => String::new(),
    }
}

fn disk(disk: &Disk) -> String {
    format!(
        "size={} block={} physical-block={} access={} discard={} engine={:?}",
        disk.size,
        disk.logical_block,
        disk.physical_block,
        if disk.read_only { "r" } else { "w" },
        if disk.discard { "yes" } else { "no" },
        disk.engine
    )
    .to_lowercase()
}

/// A disk that another process serves now.
pub(crate) fn handed_off(handed: &HandedOff) -> String {
    let from = handed.from.map_or("-".into(), |pid| pid.to_string());
    format!(
        "minor={} from={from} to={} pause_us={} version={} program={}",
        handed.minor,
        handed.to,
        handed.pause_us,
        handed.version,
        handed.program.display()
    )
}

/// Returns the line of a disk that switched to a new image.
fn snapshot(taken: &Snapshot) -> String {
    let pause = taken.pause_us.map_or("-".into(), |us| us.to_string());
    format!(
        "minor={} args={} parent={} pause_us={pause}",
        taken.minor,
        taken.target,
        taken.parent.display()
    )
}

/// Returns the result of a snapshot, and the administrator's next step.
fn told(taken: &Snapshot) -> String {
    let (target, parent) = (&taken.target, taken.parent.display());
    let mark = match taken.marked {
        true => format!("{parent} keeps the content of the snapshot, and no tap disk may write it: a file has no write permission (chmod a-w), a device a record in {}.", FrozenDevices::of_host().folder().display()),
        false => format!(
            "{parent} keeps the content of the snapshot, but could NOT be marked: ensure that no program writes it, such as the guest after a reboot with the old configuration, whose newer writes would be lost."
        ),
    };
    let beside = match taken.parent.parent() == target.path().and_then(|path| path.parent()) {
        true => String::new(),
        false => format!(
            " The old image is in another folder: name it there as well, with --files {parent}."
        ),
    };
    format!(
        "{}\n{mark}\nCHANGE THE DISK'S CONFIGURATION: from now on it must name {target}, also in xl's copy: `xl config-update GUEST FILE`. New writes of the guest are there only.{beside}\n",
        snapshot(taken)
    )
}

/// A line as tap-ctl has always printed it: words `name=value`.
pub(crate) fn row(disk: &ListedDisk) -> String {
    let row = &disk.row;
    let mut line = String::new();
    let mut add = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            // Writing to a string cannot fail.
            let _ = write!(
                line,
                "{}{name}={value}",
                if line.is_empty() { "" } else { " " }
            );
        }
    };
    add("pid", row.pid.map(|pid| pid.to_string()));
    add("minor", row.minor.map(|minor| minor.to_string()));
    let state = row.state.map(|state| format!("{state:?}").to_lowercase());
    add("state", state.or_else(|| Some("none".into())));
    add("args", row.target.as_ref().map(ToString::to_string));
    add("mode", row.mode.map(|mode| mode.to_string()));
    if let Some(kernel) = &row.kernel {
        add("kernel", Some(kernel.state.clone()));
        add("waiting", Some(kernel.waiting.to_string()));
        add("delivered", Some(kernel.delivered.to_string()));
        let some = |number: u32| (number > 0).then(|| number.to_string());
        add("isolated", some(kernel.isolated));
        add("poisoned", some(kernel.poisoned));
        add("failed_flushes", some(kernel.failed_flushes));
        add("memory_kib", some(kernel.memory_kib));
        let direct = kernel.by_itself();
        add("direct", direct.map(|direct| direct.executed.to_string()));
        add(
            "executing",
            direct.map(|direct| direct.executing.to_string()),
        );
    }
    add("restarts", Some(row.restarts.to_string()));
    add("vbd", row.vbd.clone());
    add("doing", row.doing.map(|doing| doing.to_string()));
    if let Some(binary) = &row.binary {
        add("version", binary.version.clone());
        add("program", Some(binary.path.display().to_string()));
        add("replaced", binary.replaced.then(|| "yes".into()));
    }
    add("vdev", disk.vdev.clone());
    add("guest", disk.guest_word.as_deref().map(quoted));
    // Last, because it is a sentence.
    add("unknown", row.unknown.clone());
    line + "\n"
}

/// A guest's name may be anything. One that would be several words, or end a line, stands between quotes.
fn quoted(name: &str) -> String {
    let is_plain = |c: char| !c.is_whitespace() && !c.is_control() && !"\"\\".contains(c);
    match !name.is_empty() && name.chars().all(is_plain) {
        true => name.to_owned(),
        false => format!("{name:?}"),
    }
}

/// Returns a list for people: a table with the columns that they need first. All of it is in JSON, and in the lines.
pub(crate) fn table(disks: &[ListedDisk]) -> String {
    let number = |number: Option<u32>| number.map_or("-".into(), |number| number.to_string());
    let words = disks.iter().filter_map(|disk| disk.guest_word.as_deref());
    let width = words
        .map(|word| word.chars().count())
        .max()
        .unwrap_or(0)
        .max(5);
    let mut text = format!(
        "{:width$} VDEV     MINOR     PID STATE     KERNEL     WAIT  BUSY RESTARTS MODE TARGET\n",
        "GUEST"
    );
    for disk in disks {
        let row = &disk.row;
        let state = row.state.map(|state| format!("{state:?}").to_lowercase());
        let kernel = row.kernel.as_ref();
        let _ = writeln!(
            text,
            "{:width$} {:8} {:>5} {:>7} {:9} {:10} {:>4} {:>5} {:>8} {:4} {}",
            disk.guest_word.as_deref().unwrap_or("-"),
            disk.vdev.as_deref().unwrap_or("-"),
            number(row.minor),
            number(row.pid),
            state.as_deref().unwrap_or("none"),
            kernel.map_or("-", |kernel| &kernel.state),
            number(kernel.map(|kernel| kernel.waiting)),
            number(kernel.map(|kernel| kernel.delivered)),
            row.restarts,
            row.mode.map_or("-".into(), |mode| mode.to_string()),
            row.target.as_ref().map_or("-".into(), ToString::to_string),
        );
        if let Some(direct) = kernel.and_then(|kernel| kernel.by_itself()) {
            let _ = writeln!(text, "      {}", by_itself(direct));
        }
        if let Some(why) = &row.unknown {
            let _ = writeln!(text, "      unknown: {why}");
        }
        if let Some(doing) = &row.doing {
            let _ = writeln!(text, "      {doing} has begun and is not done");
        }
    }
    text
}

/// Returns the kernel's work for a disk beside its process (passthrough).
pub(crate) fn by_itself(direct: Direct) -> String {
    let Direct {
        executed,
        executing,
        ..
    } = direct;
    format!(
        "direct: the kernel has served {executed} requests by itself, and serves {executing} now"
    )
}

/// Why the process had the others, and how the map of the disk is.
fn by_process(mapped: &Mapped) -> String {
    let reasons = mapped.missed.by_reason();
    let reasons = reasons.map(|(reason, count)| format!("{reason}={count}"));
    let Mapped {
        room,
        evicted,
        refused,
        recalled,
        ..
    } = mapped;
    format!(
        "left to the process: {}\nmap: room={room} evicted={evicted} refused={refused} recalled={recalled}",
        reasons.join(" ")
    )
}

/// How far an image is that takes over what is below it.
fn stream(stream: &Stream) -> String {
    let state = match &stream.state {
        Streaming::Running => Ok("running"),
        Streaming::Done => Ok("done"),
        Streaming::Ended => Ok("ended"),
        Streaming::Failed { why } => Err(why),
    };
    job("stream", state, stream.offset, stream.copied)
}

/// How far a disk is copied to another image.
fn mirror(mirror: &Mirror) -> String {
    let state = match &mirror.state {
        Mirroring::Copying => Ok("copying"),
        Mirroring::Same => Ok("same"),
        Mirroring::Complete => Ok("complete"),
        Mirroring::Ended => Ok("ended"),
        Mirroring::Failed { why } => Err(why),
    };
    job("mirror", state, mirror.offset, mirror.copied)
}

/// A job on a whole disk: its state, or why it has failed.
fn job(name: &str, state: Result<&str, &String>, offset: u64, copied: u64) -> String {
    let (state, why) = match state {
        Ok(state) => (state, String::new()),
        Err(why) => ("failed", format!(" why={why}")),
    };
    format!("{name}={state} offset={offset} copied={copied}{why}")
}

fn policy(policy: &Policy) -> String {
    let on = |what| match what {
        OnError::Report => "report",
        OnError::Stop => "stop",
    };
    let hung = match policy.hung {
        HungAction::Report => "report",
        HungAction::Kill => "kill",
    };
    format!(
        "limits={{{}}} group={} on-no-space={} on-error={} hung={hung} hung-after={} fail-after={} max-deaths={}",
        policy.limits,
        policy.group.as_ref().map_or("none".into(), ToString::to_string),
        on(policy.on_no_space),
        on(policy.on_error),
        policy.hung_after_s,
        policy.fail_after_s,
        policy.max_deaths
    )
}

/// Returns the counters of a process.
pub(crate) fn stats(stats: &Stats) -> String {
    let mut text = format!(
        "{:8} {:>12} {:>16} {:>8} {:>10} {:>10} {:>10}\n",
        "", "requests", "bytes", "errors", "50%<us", "99%<us", "max<us"
    );
    for (name, counter) in counters(stats) {
        let below = |share| counter.latency.below(share) / 1000;
        let _ = writeln!(
            text,
            "{name:8} {:>12} {:>16} {:>8} {:>10} {:>10} {:>10}",
            counter.requests,
            counter.bytes,
            counter.errors,
            below(0.5),
            below(0.99),
            below(1.0)
        );
    }
    let _ = writeln!(
        text,
        "version={} replayed={} in-flight={} turns={} sleeps={} calls={} nbd={}",
        stats.version,
        stats.replayed,
        stats.in_flight,
        stats.turns,
        stats.sleeps,
        stats.calls,
        stats.nbd
    );
    if stats.limits.is_some() || stats.held > 0 {
        let limits = stats.limits.unwrap_or_default();
        let ms = stats.held_ns / 1_000_000;
        let _ = writeln!(text, "limits {limits}: held={} held-ms={ms}", stats.held);
    }
    if stats.failed_traces > 0 {
        let _ = writeln!(text, "traces failed={}", stats.failed_traces);
    }
    if let Some(direct) = stats.direct {
        let _ = writeln!(text, "{}", by_itself(direct));
        if let Some(mapped) = &direct.mapped {
            let _ = writeln!(text, "{}", by_process(mapped));
        }
    }
    if let Some(scrub) = &stats.scrub {
        let state = if scrub.running { "at" } else { "ended at" };
        let _ = writeln!(
            text,
            "scrub {state} {}: read={} errors={}",
            scrub.offset, scrub.read, scrub.errors
        );
    }
    if let Some(stream) = &stats.stream {
        let _ = writeln!(text, "{}", self::stream(stream));
    }
    if let Some(mirror) = &stats.mirror {
        let _ = writeln!(text, "{}", self::mirror(mirror));
    }
    for (name, number) in &stats.driver {
        let _ = writeln!(text, "{name}={number}");
    }
    text
}

fn counters(stats: &Stats) -> [(&'static str, &Counter); 5] {
    [
        ("read", &stats.read),
        ("write", &stats.write),
        ("flush", &stats.flush),
        ("discard", &stats.discard),
        ("zeroes", &stats.zeroes),
    ]
}

/// An event in one line.
pub(crate) fn event(event: &Event) -> String {
    let disk = event
        .minor
        .map_or("-".to_owned(), |minor| format!("disk {minor}"));
    let what = match &event.what {
        What::Created {
            target: Some(target),
        } => format!("made for {target}"),
        What::Created { target: None } => "made".into(),
        What::Started { pid } => format!("served by tapdisk {pid}"),
        What::Died { pid, how } => format!("tapdisk {pid} {how}"),
        What::Hung {
            pid,
            for_ms,
            killed,
        } => {
            let then = if *killed { "killed" } else { "not killed" };
            format!("tapdisk {pid} has not answered for {for_ms} ms, {then}")
        }
        What::Poisoned { request, count } => {
            let request = request
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default();
            format!("a request made its processes die, and failed: {request}; {count} so far")
        }
        What::Trouble { .. } => trouble(&event.what),
        What::Failed { message, retry_ms } => {
            format!("no process: {message}; next attempt in {retry_ms} ms")
        }
        What::HandedOff(handed) => format!("handed over: {}", handed_off(handed)),
        What::Kept { pid, why } => {
            let pid = pid.map_or("no process".into(), |pid| format!("tapdisk {pid}"));
            format!("not handed over, {pid} serves: {why}")
        }
        What::Snapshot(taken) => format!("switched to a new image: {}", snapshot(taken)),
        What::SnapshotUndone { why } => format!("no snapshot was made, it keeps its image: {why}"),
        What::Streamed { target, outcome } => outcome.told(target),
        What::Moved(moved) => moved.told(),
        What::Mirrored { target, outcome } => outcome.told(target),
        What::Unmarked { why } => {
            format!("its dirty bitmaps are lost, so the next backup has to be a full one: {why}")
        }
        What::Untraced { path, why } => {
            format!("its trace in {} has ended: {why}", path.display())
        }
        What::Paused => "paused".into(),
        What::Unpaused => "resumed".into(),
        What::Inactive => "released its image, because the guest is suspended".into(),
        What::Active => "opened its image again and resumed".into(),
        What::Held { why } => format!("holds its guest's requests: {why}"),
        What::Resized { size } => format!("has {size} bytes now"),
        What::Unknown { why } => format!("ignored: {why}"),
        What::Refused { why } => why.clone(),
        What::NotDirect { why } => {
            format!("no passthrough, the process serves all requests: {why}")
        }
        What::Reconnected { path } => format!("connected to {} again", path.display()),
        What::Destroyed => "destroyed".into(),
        What::Began { version, pid } => format!("blktapctrl {version} begins, as process {pid}"),
        What::Lost { count } => format!("{count} events were not kept"),
        What::Renumbered => "the numbers begin anew, and earlier events are unknown".into(),
        What::Other => "an event that only a newer tap-ctl knows".into(),
    };
    let at = utc(event.at_ms);
    let number = event.guest.map(|guest| guest.to_string());
    let guest = event.guest_name.clone().or(number);
    let names = [guest, event.vdev.clone()].into_iter().flatten();
    let names: String = names.map(|name| name + " ").collect();
    format!("{at} {:>4} {names}{disk}: {what}", event.number)
}

/// Returns the description of an error on an image.
fn trouble(what: &What) -> String {
    let What::Trouble {
        trouble,
        target,
        error,
        more,
        stopped,
    } = what
    else {
        return String::new();
    };
    let image = target
        .as_ref()
        .map_or("its image".into(), ToString::to_string);
    let others = match more {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let then = match stopped {
        true => "; paused until unpause",
        false => "",
    };
    format!(
        "{} of {} bytes at {} of {image}: {error}{others}{then}",
        trouble.what, trouble.len, trouble.offset
    )
}

#[cfg(test)]
mod tests {
    use super::{event, quoted, row, stats, table};
    use crate::host::xenstore::GuestNames;
    use crate::list::{self, ListedDisk};
    use control::stats::{Direct, Mapped, Missed, Stats};
    use control::supervisor::{Event, Kernel, Mode, Row, What};
    use control::tapdisk::State;

    fn listed(row: Row) -> ListedDisk {
        list::listed(row, &GuestNames::default())
    }

    fn sample() -> Row {
        Row {
            minor: Some(4),
            pid: Some(312),
            state: Some(State::Running),
            kernel: Some(Kernel {
                state: "live".into(),
                waiting: 1,
                delivered: 2,
                committed: 3,
                memory_kib: 2300,
                ..Kernel::default()
            }),
            target: "aio:/srv/a.img".parse().ok(),
            mode: Some(Mode::Write),
            vbd: None,
            disk: None,
            restarts: 0,
            doing: None,
            unknown: None,
            stopped: None,
            state_bytes: 0,
            binary: None,
        }
    }

    /// Xen's script block-tap cuts this at white space and looks for the words.
    #[test]
    fn a_line_of_the_list() {
        assert_eq!(
            row(&listed(sample())),
            "pid=312 minor=4 state=running args=aio:/srv/a.img mode=w kernel=live waiting=1 delivered=2 memory_kib=2300 restarts=0\n"
        );
    }

    #[test]
    fn what_the_kernel_serves_by_itself_is_shown() {
        let mut direct = sample();
        direct.kernel = Some(Kernel {
            backings: 1,
            direct: 4711,
            executing: 3,
            ..Kernel::default()
        });
        let line = row(&listed(direct.clone()));
        assert!(line.contains(" direct=4711 executing=3 "), "{line}");
        let said = "direct: the kernel has served 4711 requests by itself, and serves 3 now";
        let text = table(&[sample(), direct.clone()].map(listed));
        assert_eq!(text.matches("direct").count(), 1, "{text}");
        assert!(text.contains(said), "{text}");
        let mut counted = Stats::default();
        assert!(!stats(&counted).contains("direct"));
        counted.direct = direct.kernel.and_then(|kernel| kernel.by_itself());
        assert!(stats(&counted).contains(said));
        assert!(!stats(&counted).contains("left to"), "an older driver");
        let missed = Missed {
            partial: 3,
            ..Missed::default()
        };
        let mapped = Mapped {
            missed,
            room: 1024,
            evicted: 7,
            ..Mapped::default()
        };
        counted.direct = counted.direct.map(|direct| Direct {
            mapped: Some(mapped),
            ..direct
        });
        let text = stats(&counted);
        let left = "left to the process: unmapped=0 partial=3 read-only=0 ";
        assert!(text.contains(left), "{text}");
        assert!(text.contains("map: room=1024 evicted=7 "), "{text}");
        let json = serde_json::to_value(&counted).expect("numbers");
        assert_eq!(json["direct"]["executed"], 4711);
    }

    #[test]
    fn a_name_of_several_words_is_one_word() {
        for (name, shown) in [("web", "web"), ("a b", r#""a b""#), ("a\nb", r#""a\nb""#)] {
            assert_eq!(quoted(name), shown);
        }
    }

    #[test]
    fn an_event_names_the_guest_before_the_disk() {
        let mut one = Event {
            number: 7,
            series: 1,
            at_ms: 0,
            minor: Some(4),
            guest: Some(3),
            guest_name: Some("web".into()),
            vdev: Some("xvda".into()),
            what: What::Paused,
        };
        let text = event(&one);
        assert!(text.ends_with("   7 web xvda disk 4: paused"), "{text}");
        one.guest_name = None;
        let text = event(&one);
        assert!(text.ends_with("   7 3 xvda disk 4: paused"), "{text}");
        (one.guest, one.vdev) = (None, None);
        let text = event(&one);
        assert!(text.ends_with("   7 disk 4: paused"), "{text}");
    }

    #[test]
    fn an_event_of_a_release_names_the_disk() {
        let released = Event {
            number: 7,
            series: 1,
            at_ms: 0,
            minor: Some(4),
            guest: Some(3),
            guest_name: Some("web".into()),
            vdev: Some("xvda".into()),
            what: What::Inactive,
        };
        let words = ": released its image";
        let text = event(&released);
        assert!(text.contains(&format!("disk 4{words}")), "{text}");
    }

    #[test]
    fn a_table_has_a_line_for_each_disk() {
        let mut unknown = sample();
        unknown.unknown = Some("it is of a newer one".into());
        let text = table(&[sample(), unknown].map(listed));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4, "{text}");
        let words: Vec<&str> = lines[1].split_whitespace().collect();
        let expected = [
            "-",
            "-",
            "4",
            "312",
            "running",
            "live",
            "1",
            "2",
            "0",
            "w",
            "aio:/srv/a.img",
        ];
        assert_eq!(words, expected);
        assert!(lines[3].contains("it is of a newer one"), "{text}");
    }

    #[test]
    fn manual_has_each_verb_and_option() {
        use clap::CommandFactory;
        let page = manual::page(crate::cli::Cli::command(), "").expect("a page");
        let page = String::from_utf8(page).expect("text");
        recommended::assert_page_is_complete(crate::cli::Cli::command(), &page);
        assert!(page.contains(".SH NOTES\n.nf\nA target"), "{page}");
        assert!(!page.contains("GENERATE"), "{page}");
    }
}
