// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs calls that may hang on threads of their own: a network file system may not answer, and no other work may wait
//! for that.

use crate::log::{tell, LogContext};
use control::{Code, Failure};
use std::collections::BTreeMap;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{oneshot, OwnedSemaphorePermit, Semaphore};

/// How long a file system may take to say what a file is, or to open it.
pub const LIMIT: Duration = Duration::from_secs(30);
/// Bytes of the stack of a thread. The work is a few system calls.
const STACK: usize = 256 << 10;

/// The queue for a path, with one caller at a time, so that a hung file system costs a thread for each path and not one
/// for each attempt.
#[derive(Clone)]
struct PathQueue {
    alone: Arc<Semaphore>,
    /// When the one who looks began.
    since: Instant,
}

static PLACES: Mutex<BTreeMap<PathBuf, PathQueue>> = Mutex::new(BTreeMap::new());

fn places() -> std::sync::MutexGuard<'static, BTreeMap<PathBuf, PathQueue>> {
    PLACES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Does something with a file, and waits for it for at most `limit`. Later questions about a path
/// that has not answered for so long are refused at once, until it answers.
///
/// # Errors
/// It does not answer, or what the work says.
pub async fn blocking_io<T: Send + 'static>(
    path: &Path,
    limit: Duration,
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let asked = async {
        let alone = enter(path, limit).await?;
        let (sender, receiver) = oneshot::channel();
        let place = path.to_path_buf();
        let thread = std::thread::Builder::new().stack_size(STACK);
        let spawned = thread.spawn(move || {
            let result = work();
            leave(&place, alone);
            // The caller may have given up.
            let _ = sender.send(result);
        });
        spawned.map_err(|error| Failure::system("cannot start a thread", &error))?;
        receiver.await.map_err(|_| late(path))?
    };
    match tokio::time::timeout(limit, asked).await {
        Ok(result) => result,
        Err(_) => Err(late(path)),
    }
}

/// Drops a value on a thread of its own, because closing a file waits for its file system, and with NFS and FUSE for
/// the server.
pub fn let_go<T: Send + 'static>(value: T) {
    // Not dropped here if there is no thread for it: better it stays than that all disks wait.
    let value = ManuallyDrop::new(value);
    let thread = std::thread::Builder::new().stack_size(STACK);
    if let Err(error) = thread.spawn(move || drop(ManuallyDrop::into_inner(value))) {
        tell!(
            error,
            LogContext::default().because(&error),
            "cannot start a thread, so a file stays open: {error}"
        );
    }
}

/// Waits until no other caller is using a path.
async fn enter(path: &Path, limit: Duration) -> Result<OwnedSemaphorePermit, Failure> {
    let alone = {
        let mut places = places();
        let place = places.entry(path.into()).or_insert_with(|| PathQueue {
            alone: Arc::new(Semaphore::new(1)),
            since: Instant::now(),
        });
        if place.alone.available_permits() == 0 && place.since.elapsed() >= limit {
            return Err(late(path));
        }
        place.alone.clone()
    };
    let permit = alone.acquire_owned().await.map_err(|_| late(path))?;
    if let Some(place) = places().get_mut(path) {
        place.since = Instant::now();
    }
    Ok(permit)
}

/// Leaves a path: the next caller enters, or the entry is removed.
fn leave(path: &Path, alone: OwnedSemaphorePermit) {
    let mut places = places();
    // One copy is in the table, one in the permit: no other caller waits.
    let last = places
        .get(path)
        .is_some_and(|place| Arc::strong_count(&place.alone) == 2);
    drop(alone);
    if last {
        places.remove(path);
    }
}

fn late(path: &Path) -> Failure {
    Failure::new(
        Code::Timeout,
        format!(
            "the file system of {} does not answer: see to its storage",
            path.display()
        ),
    )
}

/// Pretends that a caller has been using a path for long, until the returned permit is dropped.
#[cfg(test)]
pub(crate) fn pretend_stuck(path: &Path) -> OwnedSemaphorePermit {
    let alone = Arc::new(Semaphore::new(1));
    let permit = alone.clone().try_acquire_owned();
    let place = PathQueue {
        alone,
        since: Instant::now() - LIMIT,
    };
    places().insert(path.into(), place);
    permit.expect("nobody else has it")
}

#[cfg(test)]
mod tests {
    use super::{blocking_io, let_go, places};
    use control::Code;
    use std::path::Path;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::{mpsc, Arc};
    use std::time::{Duration, Instant};

    #[test]
    fn what_hangs_when_it_is_closed_holds_nobody_up() {
        struct Dead(mpsc::Receiver<()>, mpsc::Sender<()>);
        impl Drop for Dead {
            fn drop(&mut self) {
                let _ = self.0.recv();
                let _ = self.1.send(());
            }
        }
        let (answer, silence) = mpsc::channel();
        let (closed, told) = mpsc::channel();
        let_go(Dead(silence, closed));
        assert_eq!(told.try_recv(), Err(mpsc::TryRecvError::Empty));
        drop(answer);
        told.recv_timeout(Duration::from_secs(10)).expect("closed");
    }

    #[test]
    fn a_path_that_does_not_answer_costs_one_thread_and_holds_nobody_up() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let dead = Path::new("/dead/a.img");
            let short = Duration::from_millis(50);
            let (answer, silence) = mpsc::channel::<()>();
            let (begun, begins) = mpsc::channel::<()>();
            let threads = Arc::new(AtomicU32::new(0));
            let counted = threads.clone();
            let first = blocking_io(dead, short, move || {
                counted.fetch_add(1, Ordering::SeqCst);
                let _ = begun.send(());
                let _ = silence.recv();
                Ok(())
            });
            assert_eq!(first.await.expect_err("no answer").code, Code::Timeout);
            // A busy host may take longer than that to start a thread.
            let patience = Duration::from_secs(10);
            begins.recv_timeout(patience).expect("a thread");
            let start = Instant::now();
            for _ in 0..100 {
                let counted = threads.clone();
                let again = blocking_io(dead, short, move || {
                    counted.fetch_add(1, Ordering::SeqCst);
                    Ok(())
                });
                let failure = again.await.expect_err("still no answer");
                assert!(failure.message.contains("/dead/a.img"), "{failure}");
            }
            assert!(start.elapsed() < Duration::from_secs(2));
            assert_eq!(threads.load(Ordering::SeqCst), 1);
            let other = blocking_io(Path::new("/well/b.img"), patience, || Ok(7));
            assert_eq!(other.await, Ok(7));
            // It answers at last.
            drop(answer);
            let limit = Instant::now() + patience;
            while blocking_io(dead, short, || Ok(())).await.is_err() {
                assert!(Instant::now() < limit, "it is usable again");
            }
            assert!(places().get(dead).is_none());
        });
    }
}
