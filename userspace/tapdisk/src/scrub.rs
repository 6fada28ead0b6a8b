// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reads all of the disk that holds data, at a rate, to find what cannot be read before the guest does.
//!
//! What fails is told to the supervisor and not to the guest, who goes on. It ends with the process.

use crate::inside::{Request, Work};
use crate::{Seen, Session};
use control::stats::Scrub as Progress;
use diskio::{Data, Errno, Io};
use drivers::Content;
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant};

/// Bytes that are read at once, and that others may have to wait for.
const PIECE: u64 = 1 << 20;
/// A change of the rate is noticed after this time.
const NOTICE: Duration = Duration::from_millis(200);

/// How fast a job goes.
#[derive(Debug, Default)]
pub(crate) struct Rate(Cell<u64>);

impl Rate {
    /// Waits until `bytes`, whose work began at `start`, have taken the time that they should. False
    /// if the job is to end.
    async fn keep(&self, io: &Io, start: Instant, bytes: u64) -> Result<bool, Errno> {
        loop {
            let rate = self.0.get();
            if rate == 0 {
                return Ok(false);
            }
            let time = Duration::try_from_secs_f64(bytes as f64 / rate as f64);
            let left = time
                .unwrap_or(Duration::MAX)
                .saturating_sub(start.elapsed());
            if left.is_zero() {
                return Ok(true);
            }
            io.sleep(left.min(NOTICE)).await?;
        }
    }
}

/// The scrub of a session.
#[derive(Debug, Default)]
pub(crate) struct Scrub {
    rate: Rate,
    /// Of the one that runs, or ran last.
    progress: RefCell<Option<Progress>>,
}

impl Scrub {
    /// How far it is.
    pub(crate) fn progress(&self) -> Option<Progress> {
        self.progress.borrow().clone()
    }

    fn update(&self, change: impl FnOnce(&mut Progress)) {
        if let Some(progress) = self.progress.borrow_mut().as_mut() {
            change(progress);
        }
    }
}

/// Begins a scrub of `rate` bytes in a second. One that runs goes on with this rate, or ends if it
/// is 0.
pub(crate) fn start(session: &Rc<Session>, rate: u64) {
    let scrub = session.scrub();
    scrub.rate.0.set(rate);
    let runs = scrub.progress().is_some_and(|progress| progress.running);
    if runs || rate == 0 {
        return;
    }
    scrub.progress.replace(Some(Progress {
        running: true,
        ..Progress::default()
    }));
    let session = session.clone();
    session.runtime().clone().tasks.spawn(async move {
        if let Err(error) = run(&session).await {
            eprintln!("tapdisk: the scrub is not finished: {error}");
        }
        session.scrub().update(|progress| progress.running = false);
    });
}

async fn run(session: &Session) -> Result<(), Errno> {
    let scrub = session.scrub();
    // CAST: it is small.
    let buffer = Data::zeroed(PIECE as usize)?;
    let mut at = 0;
    loop {
        let start = Instant::now();
        let server = session.running().await;
        // Until it is dropped the image stays open.
        let hold = server.hold();
        let left = server.size().saturating_sub(at);
        if left == 0 {
            return Ok(());
        }
        let extents = server.disk().extents(at, left).await?;
        let extent = extents.first().ok_or(Errno::IO)?;
        let mut read = 0;
        if extent.content == Content::Hole {
            at += extent.len;
            // There may be many of them in a row.
            others_first().await;
        } else {
            // Pieces end where large blocks do, wherever data begins.
            read = (PIECE - at % PIECE).min(extent.len);
            // CAST: at most a piece.
            let request = Request {
                work: Work::Read(buffer.part(0, read as usize)),
                offset: at,
                len: read,
                fua: false,
            };
            if let Err(failed) = request.execute(&server, &Seen::default()).await {
                server.tell(request.call(), at, read, failed.error, false);
                scrub.update(|progress| progress.errors += 1);
            }
            at += read;
        }
        drop((hold, server));
        scrub.update(|progress| {
            progress.offset = at;
            progress.read += read;
        });
        if !scrub.rate.keep(&session.runtime().io, start, read).await? {
            return Ok(());
        }
    }
}

/// Lets everything else that is ready run once.
async fn others_first() {
    let mut is_over = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut is_over, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
