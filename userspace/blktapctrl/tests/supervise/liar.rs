// SPDX-License-Identifier: MIT OR Apache-2.0
//! A process that says it is another one.

use super::bed::{test, until};
use blktapctrl::recovery;
use control::supervisor::What;
use control::tapdisk::{Process, Reply, Request, State, Status};
use control::Channel;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command};

/// A process that has nothing to do with disks.
struct Bystander(Child);

impl Drop for Bystander {
    fn drop(&mut self) {
        // It may have been ended, which is what the test looks for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Answers all requests as an idle tapdisk which says that it is process `pid`.
fn lie(stream: UnixStream, pid: u32) {
    let mut channel = Channel::new(stream);
    while let Ok(Some((question, _))) = channel.receive::<Request>() {
        let answer = match question.body {
            Request::Ping => Reply::Process(Process {
                pid,
                program: "liar".into(),
                abi: 1,
                notes: false,
                marks: false,
                traces: false,
                shares: false,
            }),
            Request::Status => Reply::Status(Box::new(Status {
                state: State::Idle,
                node: None,
                open: None,
                disk: None,
                owes: false,
            })),
            // It stays, so that it would be killed.
            _ => Reply::Done,
        };
        if channel.answer(question.id, Ok(answer)).is_err() {
            return;
        }
    }
}

#[test]
fn a_process_that_says_it_is_another_one_has_that_not_ended() {
    test("liar", |bed| async move {
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "sleep", "1000"])
            .spawn();
        let mut bystander = Bystander(child.expect("a process"));
        let pid = bystander.0.id();
        let listener = UnixListener::bind(bed.dir.join("run/tapdisk/new-1-1.sock"));
        let listener = listener.expect("a socket");
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                std::thread::spawn(move || lie(stream, pid));
            }
        });
        recovery::disks(&bed.lifecycle).await;
        let says = until("an event", || async {
            bed.registry()
                .events
                .after(0)
                .into_iter()
                .find_map(|event| match event.what {
                    What::Unknown { why } => Some(why),
                    _ => None,
                })
        })
        .await;
        let expected = format!("says that it is process {pid}");
        assert!(says.contains(&expected), "{says}");
        let status = bystander.0.try_wait().expect("a child");
        assert!(status.is_none(), "it was ended: {status:?}");
    });
}
