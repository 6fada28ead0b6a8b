// SPDX-License-Identifier: MIT OR Apache-2.0
//! Work on all of a disk, from its beginning to its end, beside its guest and at a rate. A job survives a pause, and
//! ends with the image: when that is closed for good, or another one takes its place.

pub(crate) mod mirror;
pub(crate) mod scrub;
pub(crate) mod stream;

use crate::mirror_target::MirrorTarget;
use crate::{Server, Session};
use control::Failure;
use diskio::Errno;
use scrub::Scrub;
use std::cell::{Cell, Ref, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant};
use stream::Stream;

/// Bytes that are worked on at once, and that others may have to wait for.
const PIECE: u64 = crate::mirror_target::PIECE;
/// A change of the rate is noticed after this time.
const NOTICE: Duration = Duration::from_millis(200);

/// The jobs of a session: at most one of each kind.
#[derive(Debug, Default)]
pub(crate) struct Jobs {
    pub(crate) scrub: Job<Scrub>,
    pub(crate) stream: Job<Stream>,
    pub(crate) mirror: Job<Rc<MirrorTarget>>,
}

/// A job, and how far it is. There may be none.
#[derive(Debug)]
pub(crate) struct Job<P> {
    /// Bytes in a second; 0 to end it.
    rate: Cell<u64>,
    /// Number of the one that runs, or ran last, and the image that it works on.
    number: Cell<u64>,
    image: Cell<u64>,
    /// Number of the time that this was served when it began.
    serve: Cell<u64>,
    /// Progress of the last job.
    progress: RefCell<Option<P>>,
}

impl<P> Default for Job<P> {
    fn default() -> Self {
        Self {
            rate: Cell::default(),
            number: Cell::default(),
            image: Cell::default(),
            serve: Cell::default(),
            progress: RefCell::default(),
        }
    }
}

impl<P> Job<P> {
    /// Returns the progress.
    pub(crate) fn progress(&self) -> Ref<'_, Option<P>> {
        self.progress.borrow()
    }

    /// Returns true if it works, or has worked, on the image in its present opening.
    fn is_of(&self, session: &Session) -> bool {
        self.progress.borrow().is_some() && self.serve.get() == session.serves()
    }
}

/// A piece of the disk: how long it is, and how much work it was, in bytes.
struct DiskPiece {
    len: u64,
    work: u64,
}

/// End of a walk over the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WalkEnd {
    /// At the end of the disk.
    Through,
    /// The supervisor has ended it.
    Stopped,
    /// The image is not served any more.
    Closed,
}

/// Handle of a task that does a job.
struct Worker<P> {
    session: Rc<Session>,
    job: fn(&Jobs) -> &Job<P>,
    number: u64,
    image: u64,
}

impl<P: Clone + 'static> Worker<P> {
    /// For a new job on the image that is served, which is there from now on, in place of the last one.
    fn begin(session: &Rc<Session>, job: fn(&Jobs) -> &Job<P>, progress: P) -> Self {
        let (its, image) = (job(session.jobs()), session.image());
        its.number.set(its.number.get().wrapping_add(1));
        its.image.set(image);
        its.serve.set(session.serves());
        its.progress.replace(Some(progress));
        Self {
            session: session.clone(),
            job,
            number: its.number.get(),
            image,
        }
    }

    fn job(&self) -> &Job<P> {
        (self.job)(self.session.jobs())
    }

    /// Changes the job's progress, unless a later job has taken its place.
    fn update(&self, change: impl FnOnce(&mut P)) {
        let job = self.job();
        if job.number.get() != self.number {
            return;
        }
        if let Some(progress) = job.progress.borrow_mut().as_mut() {
            change(progress);
        }
    }

    /// Goes over the disk piece by piece. `step` gets a place and the bytes behind it, and says how long the piece
    /// is that it has done.
    async fn walk(
        &self,
        mut step: impl AsyncFnMut(&Rc<Server>, u64, u64) -> Result<DiskPiece, Failure>,
    ) -> Result<WalkEnd, Failure> {
        let mut at = 0;
        loop {
            let start = Instant::now();
            // Nothing of it may be under way then.
            while self.server().is_some_and(|server| server.is_draining()) {
                self.rest(NOTICE).await?;
            }
            let Some(server) = self.session.running_from(self.image).await else {
                return Ok(WalkEnd::Closed);
            };
            // Until it is dropped the image stays open.
            let hold = server.hold();
            let left = server.size().saturating_sub(at);
            if left == 0 {
                return Ok(WalkEnd::Through);
            }
            if self.is_to_end() {
                return Ok(WalkEnd::Stopped);
            }
            let piece = step(&server, at, left).await?;
            drop((hold, server));
            at += piece.len;
            if piece.work == 0 {
                // There may be many of them in a row.
                others_first().await;
            }
            if let Some(end) = self.keep_rate(start, piece.work).await? {
                return Ok(end);
            }
        }
    }

    /// Waits until the job's rate allows `bytes` for the time since `start`. Returns early with the reason if the job
    /// has to end.
    async fn keep_rate(&self, start: Instant, bytes: u64) -> Result<Option<WalkEnd>, Failure> {
        loop {
            if self.is_to_end() {
                return Ok(Some(WalkEnd::Stopped));
            }
            let rate = self.job().rate.get();
            if self.session.image() != self.image {
                return Ok(Some(WalkEnd::Closed));
            }
            let time = Duration::try_from_secs_f64(bytes as f64 / rate as f64);
            let left = time
                .unwrap_or(Duration::MAX)
                .saturating_sub(start.elapsed());
            if left.is_zero() {
                return Ok(None);
            }
            self.rest(left.min(NOTICE)).await?;
        }
    }

    async fn rest(&self, time: Duration) -> Result<(), Failure> {
        let slept = self.session.runtime().io.sleep(time).await;
        slept.map_err(|error| failed("cannot wait", error))
    }

    fn server(&self) -> Option<Rc<Server>> {
        self.session.server()
    }

    /// Bytes of the disk.
    fn size(&self) -> u64 {
        self.server().map_or(0, |server| server.size())
    }

    /// Returns true if the supervisor wants the job to end.
    fn is_to_end(&self) -> bool {
        self.job().rate.get() == 0
    }
}

/// Returns the bytes of a piece from `at` on: pieces end at multiples of `PIECE`, wherever the work begins.
fn piece(at: u64, left: u64) -> u64 {
    (PIECE - at % PIECE).min(left)
}

fn failed(what: impl std::fmt::Display, error: Errno) -> Failure {
    Failure::system(what, &error.into())
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
