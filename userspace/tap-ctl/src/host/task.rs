// SPDX-License-Identifier: MIT OR Apache-2.0
//! The threads that serve disks: those of queues in the kernel, and processes.

use super::{numbers, Host};
use serde::Serialize;
use std::path::Path;
use std::time::Duration;

/// The thread that makes all threads of the kernel.
const KTHREADD: u32 = 2;

/// A thread.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Task {
    /// Its number.
    pub(crate) pid: u32,
    /// Name of the thread.
    pub(crate) name: String,
    /// The letter that ps(1) shows: `D` if it waits and cannot be interrupted.
    pub(crate) state: char,
    /// Time that it had a processor.
    pub(crate) ran: Duration,
    /// Time that it could have run and had none.
    pub(crate) waited: Duration,
    /// How often it had one.
    pub(crate) turns: u64,
    /// The function of the kernel in which it sleeps.
    pub(crate) sleeps_in: Option<String>,
}

impl Task {
    /// The threads of the process of this number, the first one first; none if there is no process.
    pub(crate) fn of_process(host: &Host, pid: u32) -> Vec<Task> {
        let folder = host.path(format!("/proc/{pid}"));
        let Some((_, first)) = read(host, &folder, pid) else {
            return Vec::new();
        };
        let folder = folder.join("task");
        // It may end meanwhile.
        let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let others = names.filter_map(|name| name.parse().ok());
        let others = others.filter(|tid| *tid != pid);
        let others = others.filter_map(|tid: u32| read(host, &folder.join(tid.to_string()), tid));
        let others = others.map(|(_, task)| task);
        [first].into_iter().chain(others).collect()
    }

    /// Finds this thread in an earlier look.
    pub(crate) fn among<'a>(&self, before: &'a [Task]) -> Option<&'a Task> {
        before.iter().find(|task| task.pid == self.pid)
    }
}

/// The threads whose parent is the kernel and whose name is that of a queue, as `3.xvda-0`.
pub(crate) fn queues(host: &Host) -> Vec<Task> {
    let names = host.names(&host.path("/proc")).into_iter();
    let pids = names.filter_map(|name| name.parse::<u32>().ok());
    let all = pids.filter_map(|pid| {
        // Most are something else: the name alone is cheap.
        let name = comm(&host.path(format!("/proc/{pid}/comm")))?;
        is_queue(&name).then(|| read(host, &host.path(format!("/proc/{pid}")), pid))?
    });
    all.filter(|(parent, _)| *parent == KTHREADD)
        .map(|(_, task)| task)
        .collect()
}

/// A process that ends meanwhile is no trouble, and leaves nothing to read.
fn comm(path: &Path) -> Option<String> {
    Some(std::fs::read_to_string(path).ok()?.trim().to_owned())
}

fn is_queue(name: &str) -> bool {
    let parts = name.split_once('.').and_then(|(guest, rest)| {
        let (disk, queue) = rest.rsplit_once('-')?;
        Some((guest, disk, queue))
    });
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    parts.is_some_and(|(guest, disk, queue)| digits(guest) && !disk.is_empty() && digits(queue))
}

/// The parent of a process, and its thread of which this folder tells.
fn read(host: &Host, folder: &Path, pid: u32) -> Option<(u32, Task)> {
    let stat = comm(&folder.join("stat"))?;
    // The name may have any characters, brackets too.
    let (start, rest) = stat.rsplit_once(')')?;
    let mut words = rest.split_whitespace();
    let state = words.next()?.chars().next()?;
    let parent = words.next()?.parse().ok()?;
    let schedule = host.optional(&folder.join("schedstat")).unwrap_or_default();
    let schedule: Vec<u64> = numbers(&schedule);
    let at = |place: usize| schedule.get(place).copied().unwrap_or(0);
    let sleeps_in = comm(&folder.join("wchan")).filter(|place| !matches!(place.as_str(), "" | "0"));
    let name = start.split_once('(').map_or("", |(_, name)| name);
    let task = Task {
        pid,
        name: name.to_owned(),
        state,
        ran: Duration::from_nanos(at(0)),
        waited: Duration::from_nanos(at(1)),
        turns: at(2),
        sleeps_in,
    };
    Some((parent, task))
}

#[cfg(test)]
mod tests {
    use super::super::made::Made;
    use super::{is_queue, queues, Task};
    use std::time::Duration;

    fn process(made: &Made, pid: u32, name: &str, parent: u32, state: char) {
        made.file(&format!("/proc/{pid}/comm"), &format!("{name}\n"));
        let stat = format!("{pid} ({name}) {state} {parent} 0 0\n");
        made.file(&format!("/proc/{pid}/stat"), &stat);
        made.file(&format!("/proc/{pid}/schedstat"), "1000 2000 3\n");
        made.file(&format!("/proc/{pid}/wchan"), "io_schedule");
    }

    #[test]
    fn threads_of_queues_are_the_kernels() {
        let made = Made::new();
        process(&made, 40, "3.xvda-0", 2, 'D');
        process(&made, 41, "3.xvda-1", 700, 'S');
        process(&made, 42, "kworker/0:1", 2, 'I');
        made.file("/proc/uptime", "1 1\n");
        let found = queues(&made.host());
        let expected = Task {
            pid: 40,
            name: "3.xvda-0".into(),
            state: 'D',
            ran: Duration::from_nanos(1000),
            waited: Duration::from_nanos(2000),
            turns: 3,
            sleeps_in: Some("io_schedule".into()),
        };
        assert_eq!(found, [expected]);
        assert_eq!(Task::of_process(&made.host(), 7), []);
    }

    #[test]
    fn a_process_has_the_threads_of_its_folder() {
        let made = Made::new();
        process(&made, 9, "tapdisk", 1, 'S');
        for (tid, name) in [(9, "tapdisk"), (12, "helper")] {
            made.file(
                &format!("/proc/9/task/{tid}/stat"),
                &format!("{tid} ({name}) R 1 0 0\n"),
            );
            made.file(&format!("/proc/9/task/{tid}/schedstat"), "5 6 7\n");
        }
        let found = Task::of_process(&made.host(), 9);
        let found: Vec<_> = found
            .iter()
            .map(|it| (it.pid, it.name.as_str(), it.turns))
            .collect();
        assert_eq!(found, [(9, "tapdisk", 3), (12, "helper", 7)]);
    }

    #[test]
    fn names_of_queues() {
        assert!(is_queue("12.xvda-0") && is_queue("3.sd-b-12"));
        assert!(!is_queue("xvda-0") && !is_queue("3.-0") && !is_queue("3.xvda"));
    }

    #[test]
    fn a_name_with_brackets_is_read() {
        let made = Made::new();
        process(&made, 9, "a) R 1 (b", 1, 'T');
        let [task] = &Task::of_process(&made.host(), 9)[..] else {
            panic!("it is there, with one thread");
        };
        assert_eq!((task.state, task.name.as_str()), ('T', "a) R 1 (b"));
    }
}
