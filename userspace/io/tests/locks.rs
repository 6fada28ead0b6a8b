// SPDX-License-Identifier: MIT OR Apache-2.0
//! Duration of an image's lock.

use diskio::{lock_whole, Engine, Errno, File, LockKind, LockPart, Runtime};
use std::fs;
use std::future::Future;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::pin;
use std::sync::mpsc::channel;
use std::task::{Context, Waker};
use std::thread;

/// A file that is opened again and again.
struct LockedFile(tempfile::NamedTempFile);

impl LockedFile {
    fn new() -> Self {
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        file.as_file().set_len(4096).unwrap();
        Self(file)
    }

    fn open(&self) -> OwnedFd {
        let mut options = fs::File::options();
        let file = options.read(true).write(true).open(self.0.path());
        file.unwrap().into()
    }

    fn open_in(&self, runtime: &Runtime) -> File {
        File::new(&runtime.io, self.open()).unwrap()
    }
}

#[test]
fn lock_is_of_the_description() {
    let (image, runtime) = (LockedFile::new(), Runtime::new());
    let first = image.open();
    let copy = first.try_clone().unwrap();
    lock_whole(first.as_fd(), LockKind::Write).unwrap();
    let second = image.open_in(&runtime);
    let refused = second.lock(LockKind::Read).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::WouldBlock);
    drop(first);
    let refused = second.lock(LockKind::Read);
    assert!(refused.is_err(), "a copy still holds it");
    drop(copy);
    second.lock(LockKind::Read).unwrap();
    image.open_in(&runtime).lock(LockKind::Read).unwrap();
}

/// A process that ends in order leaves no lock behind, whatever the kernel still does with the file: a worker of
/// `io_uring` may have it for some time after a flush.
#[test]
fn lock_ends_with_the_image() {
    let image = LockedFile::new();
    for engine in [Engine::Uring, Engine::Aio, Engine::Sync] {
        for part in [LockPart::Whole, LockPart::Data, LockPart::Fence] {
            let runtime = Runtime::new();
            runtime.io.select(engine).unwrap();
            let fd = image.open();
            let _kernel = fd.try_clone().unwrap();
            let first = File::new(&runtime.io, fd).unwrap();
            first.lock_part(LockKind::Write, part).unwrap();
            let second = image.open_in(&runtime);
            let copy = first.clone();
            drop(first);
            assert!(second.lock(LockKind::Write).is_err(), "it is in use");
            runtime.tasks.spawn(async move {
                copy.flush().await.unwrap();
            });
            runtime.finish().unwrap();
            second.lock(LockKind::Write).unwrap();
        }
    }
}

/// Work in another thread continues when its caller stops waiting.
#[test]
fn lock_stays_while_another_thread_is_at_work() {
    let (image, runtime) = (LockedFile::new(), Runtime::new());
    runtime.io.start_helpers(1).unwrap();
    let first = image.open_in(&runtime);
    first.lock(LockKind::Write).unwrap();
    let second = image.open_in(&runtime);
    // The thread has something else to do before.
    let (go, wait) = channel::<()>();
    let io = runtime.io.clone();
    runtime.tasks.spawn(async move {
        io.elsewhere(move || wait.recv()).await.unwrap().unwrap();
    });
    runtime.turn(false).unwrap();
    let late = {
        let mut longer = pin!(first.set_size(8192));
        longer
            .as_mut()
            .poll(&mut Context::from_waker(Waker::noop()))
    };
    assert!(late.is_pending());
    drop(first);
    assert!(second.lock(LockKind::Write).is_err(), "it is at work");
    go.send(()).unwrap();
    while let Err(error) = second.lock(LockKind::Write) {
        assert_eq!(Errno::from_io_error(&error), Some(Errno::AGAIN));
        thread::yield_now();
    }
    assert_eq!(second.size().unwrap(), 8192);
    runtime.finish().unwrap();
}
