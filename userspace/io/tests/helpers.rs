// SPDX-License-Identifier: MIT OR Apache-2.0
//! Work that other threads do.

use diskio::{Engine, Errno, Runtime};
use std::cell::Cell;
use std::rc::Rc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

const ENGINES: [Engine; 3] = [Engine::Uring, Engine::Aio, Engine::Sync];

#[test]
fn work_elsewhere_stops_nobody_here() {
    for engine in ENGINES {
        let runtime = Runtime::new();
        runtime.io.select(engine).unwrap();
        runtime.io.start_helpers(2).unwrap();
        let here = thread::current().id();
        let done = Rc::new(Cell::new(0));
        let mut senders = Vec::new();
        // More than there are threads; the first two have to be let go from here.
        for number in 0..8_u64 {
            let (sender, receiver) = channel::<u64>();
            senders.push(sender);
            let (io, done) = (runtime.io.clone(), done.clone());
            runtime.tasks.spawn(async move {
                let work = move || (receiver.recv(), thread::current().id());
                let (got, its) = io.elsewhere(work).await.unwrap();
                assert_eq!(got, Ok(number));
                assert_ne!(its, here);
                done.set(done.get() + 1);
            });
        }
        runtime.turn(false).unwrap();
        assert_eq!(done.get(), 0);
        for (number, sender) in senders.iter().enumerate().rev() {
            sender.send(number as u64).unwrap();
        }
        runtime.finish().unwrap();
        assert_eq!(done.get(), 8);
    }
}

#[test]
fn work_that_panics_is_an_error_and_the_thread_stays() {
    let runtime = Runtime::new();
    runtime.io.start_helpers(1).unwrap();
    for _ in 0..2 {
        let io = runtime.io.clone();
        let result = runtime.block_on(async move {
            let wrong = io
                .elsewhere(|| assert!(thread::current().name().is_none()))
                .await;
            (wrong, io.elsewhere(|| 5).await)
        });
        assert_eq!(result.unwrap(), (Err(Errno::IO), Ok(5)));
    }
}

#[test]
fn nobody_has_to_wait_for_work_until_it_is_over() {
    let runtime = Runtime::new();
    runtime.io.start_helpers(1).unwrap();
    let (sender, receiver) = channel::<()>();
    let io = runtime.io.clone();
    let result = runtime.block_on(async move {
        let work = io.elsewhere(move || receiver.recv());
        io.within(Duration::from_millis(1), work).await
    });
    assert_eq!(result.unwrap().map(drop), Err(Errno::TIMEDOUT));
    sender.send(()).unwrap();
    let io = runtime.io.clone();
    let next = runtime.block_on(async move { io.elsewhere(|| 6).await });
    assert_eq!(next.unwrap(), Ok(6));
}

#[test]
fn every_helper_does_what_each_must_do_to_itself() {
    let runtime = Runtime::new();
    runtime.io.start_helpers(3).unwrap();
    let (sender, receiver) = channel();
    let told = runtime.io.on_helpers(move || {
        sender.send(thread::current().id()).unwrap();
        Ok(())
    });
    told.unwrap();
    let mut threads = Vec::new();
    while let Ok(id) = receiver.try_recv() {
        assert!(!threads.contains(&id));
        threads.push(id);
    }
    assert_eq!(threads.len(), 3);
    let failed = runtime
        .io
        .on_helpers(|| Err(std::io::ErrorKind::Other.into()));
    assert!(failed.is_err());
}

#[test]
fn without_helpers_it_is_done_here() {
    let runtime = Runtime::new();
    let io = runtime.io.clone();
    let its = runtime.block_on(async move { io.elsewhere(|| thread::current().id()).await });
    assert_eq!(its.unwrap(), Ok(thread::current().id()));
    runtime
        .io
        .on_helpers(|| Err(std::io::ErrorKind::Other.into()))
        .unwrap();
}
