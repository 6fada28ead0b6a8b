// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images whose I/O may be over later than the process.

mod common;

use common::{Image, Process, SECTORS, SIZE};
use control::tapdisk::{Engine, Open, Reply, Request, State};
use control::{Code, Failure};
use diskio::{Bytes, Data, Errno};
use drivers::{Attributes, Disk, Driver, Fence, Limits, Shape};
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
