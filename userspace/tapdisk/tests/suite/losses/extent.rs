// SPDX-License-Identifier: MIT OR Apache-2.0
//! A commit into a VMDK that has its content in another file: an error of that file's flush ends the commit, and the guest
//! is owed nothing, because it has written nothing there.

use super::chance::Chance;
use super::storage::{memory, reopen, Volatile};
use control::tapdisk::{Engine, FdGrant, Open, Reply, Request, RequestedFile};
use diskio::{Errno, Op, OperationFate, Runtime};
use formats::{qcow2, vmdk};
use std::cell::Cell;
use std::fs::File;
use std::rc::Rc;
use tapdev::fake::FakeTap;
use tapdev::Tap;
use tapdisk::Session;

const SIZE: u64 = 1 << 20;

/// A VMDK, its extent, and a qcow2 image over both.
fn images() -> (File, File, File) {
    let (below, extent, top) = (memory(&[]), memory(&[]), memory(&[]));
    let runtime = Runtime::new();
    let file = |file| diskio::File::new(&runtime.io, reopen(file, true)).expect("a file");
    let (its, content, own) = (file(&below), file(&extent), file(&top));
    let made = runtime.block_on(async move {
        let what = vmdk::VmdkCreate {
            form: vmdk::Form::MonolithicFlat,
            size: SIZE,
            name: "base.vmdk".into(),
            parent: None,
            cid: 0x1234_5678,
        };
        vmdk::create(&its, &[content], &what).await?;
        let backing = qcow2::BackingImage {
            name: "/base.vmdk".into(),
            format: Some("vmdk".into()),
        };
        let plan = qcow2::Qcow2Create {
            backing: Some(backing),
            ..qcow2::Qcow2Create::new(SIZE)
        };
        qcow2::create(&own, &plan).await
    });
    made.expect("it ends").expect("images");
    (below, extent, top)
}

/// Gives the process what it asks for, until it ends.
async fn supervise(session: Rc<Session>, below: File, extent: Volatile) {
    let mut known = 0;
    while let Ok(Reply::Needs { needs }) = session
        .handle(Request::Needs { after: known }, Vec::new())
        .await
    {
        for need in needs {
            known = known.max(need.number);
            let (provided, fd) = match need.what {
                RequestedFile::State { size } => {
                    let file = memory(&[]);
                    file.set_len(size).expect("memory");
                    (FdGrant::Shared, reopen(file, true))
                }
                RequestedFile::Parent { path } if path.ends_with("base.vmdk") => {
                    (FdGrant::Locked, reopen(&below, false))
                }
                // Both users of the extent are this process.
                _ => (FdGrant::Shared, extent.descriptor()),
            };
            let question = Request::Provide {
                number: need.number,
                provided,
                backing: None,
            };
            assert_eq!(session.handle(question, vec![fd]).await, Ok(Reply::Done));
        }
    }
}

fn open(target: &str) -> Open {
    Open {
        engine: Engine::Sync,
        may_ask: true,
        ..Open::new(target.parse().expect("a target"))
    }
}

#[test]
fn error_of_an_extent_ends_the_commit_and_is_not_the_guests() {
    let (below, extent, top) = images();
    let extent = Volatile::new(extent, Chance(0));
    let runtime = Runtime::new();
    let session = Session::new(&runtime);
    let fake = FakeTap::new(4).expect("a node");
    let tap = Tap::open(fake.open().expect("a node")).expect("a node");
    session.attach(tap).expect("a node");
    let (fails, its) = (Cell::new(true), extent.clone());
    runtime.io.decide_by(move |op| match op {
        Op::Sync { file } if its.is(file) && fails.take() => OperationFate::Fail(Errno::IO),
        _ => OperationFate::Execute,
    });
    let image = reopen(&below, true);
    runtime
        .tasks
        .spawn(supervise(session.clone(), below, extent));
    let its = session.clone();
    runtime.tasks.spawn(async move {
        let image_of_top = vec![reopen(&top, true)];
        let opened = its.handle(Request::Open(open("qcow2:/top")), image_of_top);
        assert!(matches!(opened.await, Ok(Reply::Disk(_))));
        let question = Request::Mirror {
            open: open("vmdk:/base.vmdk"),
            rate: 1,
            below: true,
        };
        let failure = its.handle(question, vec![image]).await.expect_err("a loss");
        assert!(failure.message.contains("may be lost"), "{failure}");
        match its.handle(Request::Status, Vec::new()).await {
            Ok(Reply::Status(status)) => assert!(!status.owes, "{status:?}"),
            other => panic!("{other:?}"),
        }
        its.end();
    });
    session.run().expect("the kernel talks to the process");
    runtime.tasks.clear();
}
