// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reads all of the disk that holds data, at a rate, to find what cannot be read before the guest does.
//!
//! What fails is told to the supervisor and not to the guest, who goes on. It goes on over a pause, and ends
//! with the image: when that is closed for good, or another one takes its place.

use crate::inside::{Request, Work};
use crate::{Seen, Server, Session};
use control::stats::Scrub as Progress;
use control::tapdisk::Call;
use diskio::{Data, Errno};
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

/// The scrub of a session.
#[derive(Debug, Default)]
pub(crate) struct Scrub {
    /// Bytes in a second.
    rate: Cell<u64>,
    /// Number of the one that runs, or ran last, and the image that it reads.
    job: Cell<u64>,
    image: Cell<u64>,
    /// Of that one.
    progress: RefCell<Option<Progress>>,
}

impl Scrub {
    /// How far it is.
    pub(crate) fn progress(&self) -> Option<Progress> {
        self.progress.borrow().clone()
    }

    fn runs(&self) -> bool {
        let progress = self.progress.borrow();
        progress.as_ref().is_some_and(|progress| progress.running)
    }
}

/// Begins a scrub of `rate` bytes in a second. One that runs goes on with this rate, or ends if it
/// is 0.
pub(crate) fn start(session: &Rc<Session>, rate: u64) {
    let scrub = session.scrub();
    let image = session.image();
    scrub.rate.set(rate);
    if rate == 0 || scrub.runs() && scrub.image.get() == image {
        return;
    }
    scrub.job.set(scrub.job.get().wrapping_add(1));
    scrub.image.set(image);
    scrub.progress.replace(Some(Progress {
        running: true,
        ..Progress::default()
    }));
    let job = Job {
        session: session.clone(),
        number: scrub.job.get(),
        image,
    };
    session.runtime().clone().tasks.spawn(async move {
        if let Err(error) = job.run().await {
            eprintln!("tapdisk: the scrub is not finished: {error}");
        }
        job.update(|progress| progress.running = false);
    });
}

/// A scrub.
struct Job {
    session: Rc<Session>,
    number: u64,
    image: u64,
}

/// A piece of the disk: how long it is, and how much of it was read, or could not be.
struct Piece {
    len: u64,
    read: u64,
}

impl Job {
    async fn run(&self) -> Result<(), Errno> {
        // CAST: it is small.
        let buffer = Data::zeroed(PIECE as usize)?;
        let mut at = 0;
        loop {
            let start = Instant::now();
            let Some(server) = self.session.running_from(self.image).await else {
                self.closed();
                return Ok(());
            };
            // Until it is dropped the image stays open.
            let hold = server.hold();
            let left = server.size().saturating_sub(at);
            if left == 0 {
                return Ok(());
            }
            let piece = self.look(&server, &buffer, at, left).await;
            drop((hold, server));
            at += piece.len;
            self.update(|progress| {
                progress.offset = at;
                progress.read += piece.read;
            });
            if !self.keep_rate(start, piece.read).await? {
                return Ok(());
            }
        }
    }

    /// Reads the next piece if it holds data.
    async fn look(&self, server: &Rc<Server>, buffer: &Data, at: u64, left: u64) -> Piece {
        // Pieces end where large blocks do, wherever data begins.
        let len = (PIECE - at % PIECE).min(left);
        let found = server.disk().extents(at, left).await;
        let extent = match found.and_then(|all| all.first().copied().ok_or(Errno::IO)) {
            Ok(extent) => extent,
            Err(error) => {
                // Nobody knows what is there. It takes the time of a piece that is read: of a disk that is
                // gone, all pieces fail at once.
                self.failed(server, at, len, error);
                return Piece { len, read: len };
            }
        };
        if extent.content == Content::Hole {
            // There may be many of them in a row.
            others_first().await;
            let len = extent.len;
            return Piece { len, read: 0 };
        }
        let len = len.min(extent.len);
        let request = Request {
            // CAST: at most a piece.
            work: Work::Read(buffer.part(0, len as usize)),
            offset: at,
            len,
            fua: false,
        };
        if let Err(failed) = request.execute(server, &Seen::default()).await {
            self.failed(server, at, len, failed.error);
        }
        Piece { len, read: len }
    }

    fn failed(&self, server: &Server, at: u64, len: u64, error: Errno) {
        server.tell(Call::Read, at, len, error, false);
        self.update(|progress| progress.errors += 1);
    }

    /// Waits until `bytes`, whose work began at `start`, have taken the time that they should. False if
    /// the job is to end.
    async fn keep_rate(&self, start: Instant, bytes: u64) -> Result<bool, Errno> {
        loop {
            let rate = self.session.scrub().rate.get();
            if rate == 0 {
                return Ok(false);
            }
            if self.session.image() != self.image {
                self.closed();
                return Ok(false);
            }
            let time = Duration::try_from_secs_f64(bytes as f64 / rate as f64);
            let left = time
                .unwrap_or(Duration::MAX)
                .saturating_sub(start.elapsed());
            if left.is_zero() {
                return Ok(true);
            }
            self.session.runtime().io.sleep(left.min(NOTICE)).await?;
        }
    }

    fn closed(&self) {
        eprintln!("tapdisk: the scrub is not finished: its image is not served any more");
    }

    /// Changes what is told, unless that is of a later one.
    fn update(&self, change: impl FnOnce(&mut Progress)) {
        let scrub = self.session.scrub();
        if scrub.job.get() != self.number {
            return;
        }
        if let Some(progress) = scrub.progress.borrow_mut().as_mut() {
            change(progress);
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
