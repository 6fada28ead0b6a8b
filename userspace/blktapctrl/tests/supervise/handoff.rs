// SPDX-License-Identifier: MIT OR Apache-2.0
//! Disks that pass from a process to another one, and new processes that fail at that.

use super::bed::{block_on, end, kill, test, until, which, Bed, Succession};
use super::fake;
use blktapctrl::recovery;
use control::supervisor::{HandedOff, PendingOperation, ProcessBinary, Reply, Request, Row, What};
use control::tapdisk::State;
use control::{Code, Failure};
use rustix::process::{Signal, WaitOptions};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// A program beside the usual one, which behaves as the files in a folder of its own say.
pub(crate) fn new_program(dir: &Path, files: &[(&str, &str)]) -> PathBuf {
    let folder = dir.join("new");
    fs::create_dir_all(&folder).expect("a folder");
    for (name, text) in files {
        fs::write(folder.join(name), text).expect("write");
    }
    fake::program(&folder)
}

pub(crate) fn request(program: Option<PathBuf>, timeout_s: u32) -> Request {
    Request::Handoff {
        which: which(0),
        program,
        timeout_s,
    }
}

pub(crate) async fn handed(bed: &Bed, program: Option<PathBuf>) -> HandedOff {
    match bed.ask(request(program, 20)).await {
        Ok(Reply::HandedOff(handed)) => handed,
        other => panic!("{other:?}"),
    }
}

/// Returns the requests that the new program got.
fn new_log(dir: &Path) -> Vec<String> {
    let text = fs::read_to_string(dir.join("new/log")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

/// Checks that only the disk's process is left of a hand-off.
fn assert_alone(bed: &Bed, row: &Row) {
    assert_eq!((row.state, row.doing), (Some(State::Running), None));
    let sockets = fs::read_dir(bed.dir.join("run/tapdisk")).expect("a folder");
    let sockets: Vec<_> = sockets
        .map(|entry| entry.expect("one").file_name())
        .collect();
    assert_eq!(sockets, ["0.sock"]);
}

/// Waits for the end of a process. No parent waits for those of a supervisor that has ended: their numbers stay.
async fn is_gone(pid: u32) {
    until("the end of a process", || async {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        (stat.is_empty() || stat.contains(") Z ")).then_some(())
    })
    .await;
}

#[test]
fn a_new_process_takes_the_disk_and_the_old_one_ends() {
    test("handoff", |bed| async move {
        bed.image("a.img", "A");
        bed.made(bed.create("a.img")).await;
        let old = bed.row(0).await.pid.expect("a process");
        let program = new_program(&bed.dir, &[]);
        let first = handed(&bed, Some(program.clone())).await;
        assert_eq!((first.minor, first.from), (0, Some(old)));
        assert_eq!((&first.program, first.version.as_str()), (&program, "fake"));
        let row = bed.row(0).await;
        assert_eq!((row.pid, row.restarts), (Some(first.to), 0));
        assert_alone(&bed, &row);
        is_gone(old).await;
        // The old one let go before the new one got anything, and was not replaced.
        assert_eq!(bed.log(), ["attach 0", "open w A", "close", "exit"]);
        assert_eq!(new_log(&bed.dir), ["attach 0", "open w A"]);
        assert!(bed.events().contains(&What::HandedOff(first.clone())));
        let died = |what: &What| matches!(what, What::Died { .. } | What::Unknown { .. });
        assert!(!bed.events().iter().any(died), "{:?}", bed.events());
        // The new program is the disk's: who dies is replaced by it.
        bed.replaced(0, kill).await;
        assert_eq!(new_log(&bed.dir).len(), 4);
        // And back to the usual one.
        let second = handed(&bed, None).await;
        assert_eq!(bed.row(0).await.pid, Some(second.to));
        bed.replaced(0, kill).await;
        assert_eq!(new_log(&bed.dir).last().expect("a line"), "exit");
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
    });
}

/// S30, S31: however the new process fails, the old one continues to serve, and the failure has the reason.
#[test]
fn a_new_process_that_fails_loses() {
    let version =
        "it is made for version 7 of the kernel's interface, and the module has version 1";
    // Each entry has the way in which it fails, whether the old one has let go before that, and the message.
    let ways: [(&str, &str, bool, Code, &str); 9] = [
        (
            "dumb",
            "",
            false,
            Code::Timeout,
            "does not start: it did not do that within 1 s",
        ),
        ("abi", "7", false, Code::Version, version),
        ("abi", "0", false, Code::Version, "made for version 0"),
        (
            "unfit",
            "no header",
            false,
            Code::Image,
            "cannot open the image: no header",
        ),
        (
            "size",
            "4096",
            false,
            Code::Image,
            "the image has 4096 bytes, and the guest's disk 1048576",
        ),
        ("leave", "", true, Code::System, "cannot serve it: tapdisk"),
        ("die", "", true, Code::System, "ended with the exit code 3"),
        (
            "refuse",
            "locked",
            true,
            Code::Image,
            "cannot serve it: locked",
        ),
        (
            "hang",
            "",
            true,
            Code::Timeout,
            "cannot serve it: it did not do that within 1 s",
        ),
    ];
    for (number, (file, text, let_go, code, why)) in ways.into_iter().enumerate() {
        test(&format!("loses-{number}"), |bed| async move {
            bed.image("a.img", "A");
            bed.made(bed.create("a.img")).await;
            let old = bed.row(0).await.pid;
            let program = new_program(&bed.dir, &[(file, text)]);
            let failure = bed.ask(request(Some(program), 1)).await;
            let failure = failure.expect_err("it cannot");
            assert_eq!(failure.code, code, "{failure}");
            assert!(failure.message.contains(why), "{failure}");
            assert!(
                failure.message.starts_with("disk 0 is not handed over: "),
                "{failure}"
            );
            let row = bed.row(0).await;
            assert_eq!((row.pid, row.restarts), (old, 0));
            assert_alone(&bed, &row);
            let kept = |what: &What| matches!(what, What::Kept { pid, .. } if *pid == old);
            assert_eq!(bed.events().iter().filter(|what| kept(what)).count(), 1);
            let mut served = vec!["attach 0", "open w A"];
            if let_go {
                served.extend(["close", "attach 0", "open w A"]);
            }
            assert_eq!(bed.log(), served);
            // Nothing of the attempt stays: the program that dies is replaced by the old one.
            bed.replaced(0, kill).await;
            assert_eq!(bed.row(0).await.doing, None);
        });
    }
}

#[test]
fn what_is_no_program_is_refused_at_once() {
    test("no-program", |bed| async move {
        bed.image("a.img", "A");
        bed.made(bed.create("a.img")).await;
        let text = bed.image("text", "no program");
        let broken = bed.image("broken", "no program either");
        fs::set_permissions(&broken, fs::Permissions::from_mode(0o755)).expect("chmod");
        for (program, code, why) in [
            ("tapdisk".into(), Code::Invalid, "no absolute path"),
            (bed.dir.join("none"), Code::NotFound, "cannot use"),
            (text, Code::Invalid, "is no program"),
            // The system finds that out.
            (broken, Code::System, "cannot start"),
        ] {
            let failure = bed.ask(request(Some(program), 1)).await;
            let failure = failure.expect_err("no program");
            assert_eq!(failure.code, code, "{failure}");
            assert!(failure.message.contains(why), "{failure}");
            assert_alone(&bed, &bed.row(0).await);
        }
        assert_eq!(bed.log(), ["attach 0", "open w A"]);
    });
}

/// A program that ends before it answers anything: the failure has its exit status.
#[test]
fn a_program_that_ends_at_once_is_told_by_its_end() {
    test("ends", |bed| async move {
        bed.image("a.img", "A");
        bed.made(bed.create("a.img")).await;
        let program = bed.image("false", "#!/bin/sh\nexit 3\n");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("chmod");
        for _ in 0..10 {
            let failure = bed.ask(request(Some(program.clone()), 20)).await;
            let failure = failure.expect_err("it ends");
            let why = "ended with the exit code 3";
            assert!(failure.message.contains(why), "{failure}");
        }
        assert_eq!(bed.log(), ["attach 0", "open w A"]);
    });
}

/// The old process dies: while the new one is prepared, or when it is to let go.
#[test]
fn the_death_of_the_old_process_does_not_stop_it() {
    test("old-dies-early", |bed| async move {
        bed.image("a.img", "A");
        bed.made(bed.create("a.img")).await;
        let old = bed.row(0).await.pid.expect("a process");
        let program = new_program(&bed.dir, &[("dumb", "")]);
        let dumb = bed.dir.join("new/dumb");
        let (asked, ()) = futures::future::join(bed.ask(request(Some(program), 20)), async {
            is_prepared(&bed).await;
            kill(old);
            is_gone(old).await;
            fs::remove_file(dumb).expect("remove");
        })
        .await;
        // The supervisor asks it again on a connection that did not end.
        assert!(
            asked.is_ok() || bed.row(0).await.state == Some(State::Running),
            "{asked:?}"
        );
        until("a process that serves", || async {
            let row = bed.row(0).await;
            (row.state == Some(State::Running) && row.doing.is_none()).then_some(())
        })
        .await;
    });
    test("old-dies-late", |bed| async move {
        bed.image("a.img", "A");
        bed.made(bed.create("a.img")).await;
        let old = bed.row(0).await.pid.expect("a process");
        fs::write(bed.dir.join("held"), "").expect("write");
        let program = new_program(&bed.dir, &[]);
        let (asked, ()) = futures::future::join(handed(&bed, Some(program)), async {
            until("the question to let go", || async {
                bed.log().contains(&"close".into()).then_some(())
            })
            .await;
            kill(old);
        })
        .await;
        let row = bed.row(0).await;
        assert_eq!((row.pid, asked.from), (Some(asked.to), Some(old)));
        assert_alone(&bed, &row);
        assert_eq!(new_log(&bed.dir), ["attach 0", "open w A"]);
    });
}

/// Waits until the new process runs.
async fn is_prepared(bed: &Bed) {
    until("the new process", || async {
        let disk = bed.registry().get(0)?;
        let successor = disk.successor.borrow().clone();
        successor.map(drop)
    })
    .await;
}

/// The new one has just begun to serve, and dies before the supervisor knows.
#[test]
fn the_death_of_a_new_process_that_serves_is_one_like_any_other() {
    test("new-dies", |bed| async move {
        bed.image("a.img", "A");
        bed.made(bed.create("a.img")).await;
        let program = new_program(&bed.dir, &[]);
        let first = handed(&bed, Some(program)).await;
        kill(first.to);
        until("the next process", || async {
            let row = bed.row(0).await;
            (row.restarts == 1 && row.state == Some(State::Running)).then_some(())
        })
        .await;
        assert_eq!(
            new_log(&bed.dir),
            ["attach 0", "open w A", "attach 0", "open w A"]
        );
    });
}

/// The old process alone knows the writes that could not be made durable, and tells the guest.
#[test]
fn a_process_that_lost_something_keeps_its_disk() {
    test("lost", |bed| async move {
        bed.image("a.img", "A");
        bed.made(bed.create("a.img")).await;
        let old = bed.row(0).await.pid;
        fake::put(bed.dir.join("lost"), "no room");
        let program = new_program(&bed.dir, &[]);
        let failure = bed.ask(request(Some(program), 20)).await;
        let failure = failure.expect_err("it lost something");
        assert!(
            failure.message.contains("cannot let go: no room"),
            "{failure}"
        );
        assert_eq!(bed.row(0).await.pid, old);
        assert_alone(&bed, &bed.row(0).await);
        assert_eq!(new_log(&bed.dir), [""; 0]);
    });
}

#[test]
fn only_what_is_served_is_handed_over() {
    test("not-served", |bed| async move {
        bed.image("a.img", "A");
        bed.made(bed.create("a.img")).await;
        let pause = Request::Pause {
            which: which(0),
            timeout_s: 0,
        };
        bed.ask(pause).await.expect("a pause");
        let failure = bed.ask(request(None, 1)).await.expect_err("it is paused");
        assert_eq!(failure.code, Code::State);
        assert!(failure.message.contains("unpause it first"), "{failure}");
        assert_eq!(bed.row(0).await.doing, None);
    });
}

/// A disk that is taken away meanwhile takes both processes along.
#[test]
fn a_disk_that_goes_leaves_neither_process() {
    test("doomed", |bed| async move {
        bed.image("a.img", "A");
        bed.made(bed.create("a.img")).await;
        let old = bed.row(0).await.pid.expect("a process");
        let program = new_program(&bed.dir, &[("dumb", "")]);
        let asked = bed.ask(request(Some(program), 20));
        let (asked, new) = futures::future::join(asked, async {
            is_prepared(&bed).await;
            let disk = bed.registry().get(0).expect("the disk");
            let new = disk.successor.borrow().as_ref().expect("one").pid();
            bed.destroy(0).await;
            new
        })
        .await;
        assert!(
            matches!(
                asked,
                Err(Failure {
                    code: Code::State,
                    ..
                })
            ),
            "{asked:?}"
        );
        is_gone(old).await;
        is_gone(new).await;
        bed.assert_nothing_left().await;
    });
}

/// The old process waits for a server that does not answer, and so does who asked; the disk may go all the same, and others
/// are answered.
#[test]
fn a_disk_whose_process_cannot_let_go_can_be_taken_away() {
    test("doomed-held", |bed| async move {
        bed.image("a.img", "A");
        bed.image("b.img", "B");
        bed.made(bed.create("a.img")).await;
        let other = bed.made(bed.create("b.img")).await;
        let old = bed.row(0).await.pid.expect("a process");
        fs::write(bed.dir.join("held"), "").expect("write");
        let asked = bed.ask(request(Some(new_program(&bed.dir, &[])), 20));
        let (asked, new) = futures::future::join(asked, async {
            until("the question to let go", || async {
                bed.log().contains(&"close".into()).then_some(())
            })
            .await;
            let disk = bed.registry().get(0).expect("the disk");
            let new = disk.successor.borrow().as_ref().expect("one").pid();
            bed.destroy(other).await;
            bed.destroy(0).await;
            new
        })
        .await;
        let failure = asked.expect_err("it is gone");
        assert_eq!(failure.code, Code::State, "{failure}");
        is_gone(old).await;
        is_gone(new).await;
        bed.assert_nothing_left().await;
        fs::remove_file(bed.dir.join("held")).expect("remove");
    });
}

/// A list says what each process runs.
#[test]
fn a_list_says_which_program_serves() {
    test("binary", |bed| async move {
        bed.image("a.img", "A");
        bed.made(bed.create("a.img")).await;
        let us = std::env::current_exe().expect("this program");
        let expected = ProcessBinary {
            path: fs::canonicalize(us).expect("a path"),
            replaced: false,
            version: Some("fake".into()),
        };
        until("what the process says of itself", || async {
            (bed.row(0).await.binary.as_ref() == Some(&expected)).then_some(())
        })
        .await;
    });
}

/// Lets the supervisor end at each of its steps; the next one finishes the hand-off or undoes it.
#[test]
fn a_handoff_is_finished_or_undone_by_the_next_supervisor() {
    let (mut step, mut new) = (0, 0);
    loop {
        let host = Succession::new(&format!("handing-{step}"));
        let program = new_program(&host.dir, &[]);
        let (crashed, old) = block_on(async {
            let bed = host.bed();
            bed.image("a.img", "A");
            bed.made(bed.create("a.img")).await;
            let old = bed.row(0).await.pid.expect("a process");
            host.kernel.crash.left.set(Some(step));
            let (bed, request) = (bed.clone(), request(Some(program), 20));
            let asked = tokio::task::spawn_local(async move { bed.ask(request).await });
            until("the end of the hand-off or of the supervisor", || async {
                (asked.is_finished() || host.kernel.crash.happened.get()).then_some(())
            })
            .await;
            (host.kernel.crash.happened.get(), old)
        });
        host.kernel.crash.left.set(None);
        host.kernel.crash.happened.set(false);
        block_on(async {
            let bed = host.bed();
            recovery::disks(&bed.lifecycle).await;
            new += u32::from(settled(&bed, old, &format!("step {step}")).await);
            bed.lifecycle.destroy_all(bed.registry().all()).await;
            bed.assert_nothing_left().await;
        });
        if !crashed {
            break;
        }
        step += 1;
    }
    assert!(step >= 8, "{step} steps");
    // The last ones, at which the new one serves already.
    assert!(new >= 3, "{new} of {step}");
}

/// Waits until one process serves; true if it is the new one. The other one ends.
async fn settled(bed: &Rc<Bed>, old: u32, when: &str) -> bool {
    let pid = until(&format!("a good end after {when}"), || async {
        let row = bed.row(0).await;
        let calm = row.doing.is_none() && row.state == Some(State::Running);
        row.pid.filter(|_| calm)
    })
    .await;
    let unknown = |what: &What| matches!(what, What::Unknown { .. });
    assert!(!bed.events().iter().any(unknown), "{:?}", bed.events());
    let opened = bed.kernel.nodes.borrow()[&0].opened;
    assert!(opened <= 3, "{when}: the node was opened {opened} times");
    if pid != old {
        is_gone(old).await;
    }
    assert_alone(bed, &bed.row(0).await);
    pid != old
}

/// The supervisor ends while one of the processes does not answer, and one of them ends before the next
/// supervisor comes.
#[test]
fn a_death_after_that_of_the_supervisor_is_seen_to() {
    for (number, (stuck, dead)) in [
        ("held", "old"),
        ("held", "new"),
        ("hang", "old"),
        ("hang", "new"),
        ("hang", "both"),
    ]
    .into_iter()
    .enumerate()
    {
        let host = Succession::new(&format!("two-deaths-{number}"));
        let files: &[_] = if stuck == "hang" {
            &[("hang", "")]
        } else {
            &[]
        };
        let program = new_program(&host.dir, files);
        let (old, new) = block_on(async {
            let bed = host.bed();
            bed.image("a.img", "A");
            bed.made(bed.create("a.img")).await;
            let old = bed.row(0).await.pid.expect("a process");
            if stuck == "held" {
                fs::write(host.dir.join("held"), "").expect("write");
            }
            let (next, request) = (bed.clone(), request(Some(program), 20));
            tokio::task::spawn_local(async move { next.ask(request).await });
            until("the switch", || async {
                let log = match stuck {
                    "held" => bed.log().contains(&"close".into()),
                    _ => new_log(&host.dir).contains(&"attach 0".into()),
                };
                log.then_some(())
            })
            .await;
            assert_eq!(bed.row(0).await.doing, Some(PendingOperation::Handoff));
            let disk = bed.registry().get(0).expect("the disk");
            let new = disk.successor.borrow().as_ref().expect("one").pid();
            (old, new)
        });
        for (name, pid) in [("old", old), ("new", new)] {
            if dead == name || dead == "both" {
                end(pid, Signal::KILL);
                // As the system does for a supervisor that has ended.
                let pid = rustix::process::Pid::from_raw(pid.try_into().expect("a pid"));
                rustix::process::waitpid(pid, WaitOptions::empty()).expect("it ends");
            }
        }
        for file in ["held", "new/hang"] {
            let _ = fs::remove_file(host.dir.join(file));
        }
        block_on(async {
            let bed = host.bed();
            recovery::disks(&bed.lifecycle).await;
            settled(&bed, old, &format!("{stuck}, {dead}")).await;
            bed.lifecycle.destroy_all(bed.registry().all()).await;
            bed.assert_nothing_left().await;
        });
    }
}
