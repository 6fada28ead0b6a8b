// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images whose I/O may be over later than the process.

mod common;

use common::{Image, Process, SECTORS, SIZE};
use control::tapdisk::{Engine, Open, Reply, Request, State};
use control::{Code, Failure};
use diskio::{Bytes, Data, Errno};
use drivers::{Attributes, Disk, Driver, Fence, Limits, Shape};
use ring::response::Status;
use ring::tap::shadow::Op;
use std::time::{Duration, Instant};
use tapdev::fake::Fake;

/// Storage behind a network.
struct Elsewhere {
    settle_ms: u32,
}

impl Driver for Elsewhere {
    async fn activate(&self) -> Result<Shape, Failure> {
        Ok(Shape {
            size: SIZE,
            logical_block: 512,
            physical_block: 512,
            discard: None,
            write_cache: true,
            fua: false,
            limits: Limits::default(),
        })
    }
    fn fence(&self) -> Fence {
        Fence::Session {
            settle_ms: self.settle_ms,
        }
    }
    async fn read(&self, _: u64, data: Data) -> Result<(), Errno> {
        data.fill(0, data.len(), 0);
        Ok(())
    }
    async fn write(&self, _: u64, _: Bytes, _: Attributes) -> Result<(), Errno> {
        Ok(())
    }
    async fn flush(&self) -> Result<(), Errno> {
        Ok(())
    }
}

/// A process that serves it, or will as soon as it may.
fn serving(fake: &Fake, settle_ms: u32) -> Process {
    Process::start_with(fake, move |session| {
        let its = session.clone();
        session.runtime().tasks.spawn(async move {
            let disk = Disk::new(Elsewhere { settle_ms });
            let shape = disk.activate().await.unwrap();
            let open = Open::new("null:1M".parse().unwrap());
            its.serve_disk(open, disk, shape).await.unwrap();
        });
    })
}

#[test]
fn image_of_another_kind_of_storage_is_refused_before_the_guest_knows() {
    let (fake, image) = (Fake::new(4).unwrap(), Image::new(2 * SIZE));
    let mut process = serving(&fake, 60_000);
    fake.wait_for_params();
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    let unpause = Request::Unpause(image.open(Engine::Auto));
    let refused = process.ask(unpause, Some(&image)).unwrap_err();
    assert_eq!(refused.code, Code::State, "{refused}");
    assert_eq!(fake.info().sectors, SECTORS, "the guest was told of it");
    assert_eq!(process.status().state, State::Paused);
    process.exit();
}

/// That kernel does not know that I/O may be over later.
#[test]
fn under_an_older_kernel_the_process_waits_itself() {
    const SETTLES: Duration = Duration::from_millis(400);
    let fake = Fake::before_claims(4).unwrap();
    let process = serving(&fake, 400);
    let tag = fake.send(Op::Write, 0, &[1; 512], false).unwrap();
    assert_eq!(fake.answer(tag, 0).unwrap().0, Status::Okay);
    process.kill();
    let begun = Instant::now();
    let process = serving(&fake, 400);
    let tag = fake.send(Op::Write, 0, &[2; 512], false).unwrap();
    assert_eq!(fake.answer(tag, 0).unwrap().0, Status::Okay);
    assert!(begun.elapsed() >= SETTLES, "{:?}", begun.elapsed());
    process.exit();
}
