// SPDX-License-Identifier: MIT OR Apache-2.0
//! Operations, and what carries them out.

use crate::aio::Aio;
use crate::helpers::Helpers;
use crate::pool::Pool;
use crate::sync;
use crate::table::SlotTable;
use crate::uring::Uring;
use crate::{op_result, Bytes, Data, Errno, Opened, Region, ResultMailbox};
use rustix::time::{
    timerfd_create, timerfd_settime, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags,
    Timespec,
};
use std::cell::{Cell, RefCell};
use std::future::{poll_fn, Future};
use std::io;
use std::os::fd::OwnedFd;
use std::pin::{pin, Pin};
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

/// An operation. It owns its descriptors and its memory.
#[derive(Clone, Debug)]
pub enum Op {
    /// Reads at an offset in bytes; the result is the number of bytes.
    Read {
        /// The file.
        file: Rc<Opened>,
        /// Bytes from its beginning.
        offset: u64,
        /// Buffer for the data.
        data: Data,
    },
    /// Writes at an offset in bytes; the result is the number of bytes.
    Write {
        /// The file.
        file: Rc<Opened>,
        /// Bytes from its beginning.
        offset: u64,
        /// Data to write.
        data: Bytes,
        /// True if the data must be durable when the operation is over (`RWF_DSYNC`).
        durable: bool,
    },
    /// Makes earlier writes durable (`fdatasync`).
    Sync {
        /// The file.
        file: Rc<Opened>,
    },
    /// Makes a range read as zeroes without writing it, and gives its space back if `hole`.
    Zero {
        /// The file.
        file: Rc<Opened>,
        /// Bytes from its beginning.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Give the space back.
        hole: bool,
    },
    /// Tells a block device to forget a range.
    Discard {
        /// The device.
        file: Rc<Opened>,
        /// Bytes from its beginning.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Waits until a descriptor is readable or writable.
    Ready {
        /// The descriptor.
        fd: Rc<OwnedFd>,
        /// True to wait until it is writable.
        write: bool,
    },
    /// A command of a character device (`IORING_OP_URING_CMD`), which only [`Engine::Uring`] has.
    Command {
        /// The device.
        fd: Rc<OwnedFd>,
        /// Number of the command.
        number: u32,
        /// Its argument.
        argument: [u8; 16],
        /// The memory that the argument points to.
        keep: Rc<Region>,
        /// True if it is over as soon as it is submitted, and the thread need not sleep for its end, unless
        /// [`Io::heed_quick`] asks for that.
        quick: bool,
    },
}

/// Mechanism that carries out operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// `io_uring`.
    Uring,
    /// Linux AIO for data, `poll` for the rest.
    Aio,
    /// A plain call for each operation when it is submitted; `poll` for the rest.
    Sync,
}

/// Decision of a test's storage about an operation of [`Engine::Sync`].
#[cfg(feature = "fake")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OperationFate {
    /// The system executes it now.
    Execute,
    /// The operation fails, and the system does not learn of it.
    Fail(Errno),
    /// The operation stays under way, and the storage decides at the next [`Io::enter`].
    Later,
}

/// Decides on each operation.
#[cfg(feature = "fake")]
pub(crate) type Decide = Rc<dyn Fn(&Op) -> OperationFate>;

/// Learns of each file that leaves the page cache.
#[cfg(feature = "fake")]
type Forgotten = Rc<dyn Fn(&Opened)>;

/// Carries out operations. Copies are the same thing.
#[derive(Clone, Debug)]
pub struct Io(Rc<IoState>);

/// Holds [`Decide`] and [`Forgotten`], which cannot be printed.
#[cfg(feature = "fake")]
#[derive(Default)]
struct Decider(RefCell<Option<Decide>>, RefCell<Option<Forgotten>>);

#[cfg(feature = "fake")]
impl std::fmt::Debug for Decider {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Decider")
            .field(&self.0.borrow().is_some())
            .finish()
    }
}

#[derive(Debug)]
struct IoState {
    engine: Cell<Engine>,
    /// Made early and kept, because a sandbox may forbid to make it later. The ring is dropped before the table, as
    /// `aio` is, because both wait for the table's operations.
    uring: RefCell<Option<Uring>>,
    aio: RefCell<Option<Aio>>,
    table: RefCell<SlotTable>,
    /// System calls made.
    calls: Cell<u64>,
    /// Times that the thread slept in one of them.
    sleeps: Cell<u64>,
    /// The end of a quick command ends a sleep.
    heeds_quick: Cell<bool>,
    /// Memory to be used again.
    pool: Rc<Pool>,
    helpers: RefCell<Option<Rc<Helpers>>>,
    #[cfg(feature = "fake")]
    decider: Decider,
}

impl Default for Io {
    fn default() -> Self {
        Self::new()
    }
}

impl Io {
    /// With plain calls at first, see [`select`](Self::select).
    pub fn new() -> Self {
        Self(Rc::new(IoState {
            table: RefCell::new(SlotTable::default()),
            engine: Cell::new(Engine::Sync),
            uring: RefCell::new(None),
            aio: RefCell::new(None),
            calls: Cell::new(0),
            sleeps: Cell::new(0),
            heeds_quick: Cell::new(false),
            pool: Rc::default(),
            helpers: RefCell::new(None),
            #[cfg(feature = "fake")]
            decider: Decider::default(),
        }))
    }

    /// Asks `decide` about each further operation of [`Engine::Sync`] but [`Op::Ready`] and [`Op::Command`], for tests.
    #[cfg(feature = "fake")]
    pub fn decide_by(&self, decide: impl Fn(&Op) -> OperationFate + 'static) {
        self.0.decider.0.replace(Some(Rc::new(decide)));
    }

    /// Calls `forgotten` with each file that leaves the page cache by [`File::forget`](crate::File::forget), for tests.
    #[cfg(feature = "fake")]
    pub fn forget_by(&self, forgotten: impl Fn(&Opened) + 'static) {
        self.0.decider.1.replace(Some(Rc::new(forgotten)));
    }

    /// A file leaves the page cache.
    #[cfg(feature = "fake")]
    pub(crate) fn forgets(&self, file: &Opened) {
        if let Some(forgotten) = &*self.0.decider.1.borrow() {
            forgotten(file);
        }
    }

    /// Makes the `io_uring`, so that it can be selected later from within a sandbox. The ring accepts only the
    /// operations of [`Op`].
    pub fn prepare_uring(&self) -> io::Result<()> {
        let mut uring = self.0.uring.borrow_mut();
        if uring.is_none() {
            *uring = Some(Uring::new()?);
        }
        Ok(())
    }

    /// Returns memory of `len` bytes for a transfer, aligned to a page. Its content is left from earlier transfers, and
    /// it goes back to the pool when its last user drops it.
    pub fn buffer(&self, len: usize) -> Result<Data, Errno> {
        let region = self.0.pool.take(len).map_err(|_| Errno::NOMEM)?;
        Data::at_begin(region, len).ok_or(Errno::INVAL)
    }

    /// Keeps at least that many unused bytes for [`buffer`](Self::buffer) from now on: for callers that hold as many
    /// and drop all of them at once.
    pub fn keep_buffers(&self, bytes: usize) {
        self.0.pool.keep(bytes);
    }

    /// Starts threads for [`elsewhere`](Self::elsewhere), which a sandbox would forbid. They inherit this thread's
    /// blocked signals.
    pub fn start_helpers(&self, count: usize) -> io::Result<()> {
        *self.0.helpers.borrow_mut() = Some(Rc::new(Helpers::start(count)?));
        Ok(())
    }

    /// Has every helper do something to itself, such as to enter a sandbox.
    pub fn on_helpers(
        &self,
        work: impl Fn() -> io::Result<()> + Send + Sync + 'static,
    ) -> io::Result<()> {
        match self.0.helpers.borrow().as_ref() {
            Some(helpers) => helpers.on_each(work),
            None => Ok(()),
        }
    }

    /// Returns the result of work that may sleep or takes long: a helper does it, or this thread if there is none. The
    /// work continues if the caller stops waiting.
    pub async fn elsewhere<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Errno> {
        let helpers = self.0.helpers.borrow().clone();
        match helpers {
            Some(helpers) => helpers.run(self, work).await,
            None => Ok(work()),
        }
    }

    /// From now on operations are carried out in this way. Fails if that is not possible here, and
    /// if operations other than [`Op::Ready`] are under way.
    pub fn select(&self, engine: Engine) -> io::Result<()> {
        if engine == self.engine() {
            return Ok(());
        }
        let mut table = self.0.table.borrow_mut();
        if table.has_transfers() {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        match engine {
            Engine::Uring => {
                drop(table);
                self.prepare_uring()?;
                table = self.0.table.borrow_mut();
            }
            Engine::Aio => {
                let mut aio = self.0.aio.borrow_mut();
                if aio.is_none() {
                    *aio = Some(Aio::new()?);
                }
            }
            Engine::Sync => {}
        }
        if self.engine() == Engine::Uring {
            if let Some(uring) = self.0.uring.borrow_mut().as_mut() {
                uring.cancel_all(&mut table)?;
            }
        }
        table.queue_all_ready();
        self.0.engine.set(engine);
        Ok(())
    }

    /// Closes the `io_uring`, which is the only way to end an [`Op::Command`] that waits at a device, and releases the
    /// device. A command that has ended by then has its result. Fails if I/O is under way.
    pub fn close_uring(&self) -> io::Result<()> {
        let mut table = self.0.table.borrow_mut();
        if table.transfers() > 0 {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        let mut uring = self.0.uring.borrow_mut().take();
        if let Some(uring) = uring.as_mut().filter(|_| self.engine() == Engine::Uring) {
            uring.cancel_all(&mut table)?;
        }
        drop(uring);
        if self.engine() == Engine::Uring {
            table.end_commands();
            table.queue_all_ready();
            self.0.engine.set(Engine::Sync);
        }
        Ok(())
    }

    /// Returns the engine in use.
    pub fn engine(&self) -> Engine {
        self.0.engine.get()
    }

    /// Makes I/O on this region cheaper where the engine can do that (`io_uring` pins its pages once). One region at a
    /// time; `None` for none. Returns true if the engine does it.
    pub fn register(&self, region: Option<&Rc<Region>>) -> io::Result<bool> {
        match self.0.uring.borrow_mut().as_mut() {
            Some(uring) if self.engine() == Engine::Uring => uring.register(region),
            _ => Ok(false),
        }
    }

    /// Queues an operation, which begins with the next [`enter`](Self::enter). The result is that of the system call.
    pub fn submit(&self, op: Op) -> Pending {
        let slot = self.0.table.borrow_mut().insert(op);
        Pending {
            io: self.clone(),
            slot: Some(slot),
        }
    }

    /// Waits until `fd` can be read.
    pub async fn readable(&self, fd: &Rc<OwnedFd>) -> Result<(), Errno> {
        let op = Op::Ready {
            fd: fd.clone(),
            write: false,
        };
        self.submit(op).await.map(drop)
    }

    /// Waits until `fd` is writable.
    pub async fn writable(&self, fd: &Rc<OwnedFd>) -> Result<(), Errno> {
        let op = Op::Ready {
            fd: fd.clone(),
            write: true,
        };
        self.submit(op).await.map(drop)
    }

    /// Waits for some time.
    pub async fn sleep(&self, time: Duration) -> Result<(), Errno> {
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)?;
        let none = Timespec::default();
        // A time of zero would be no timer at all.
        let time =
            Timespec::try_from(time.max(Duration::from_nanos(1))).map_err(|_| Errno::INVAL)?;
        let timer = Rc::new(timer);
        let once = Itimerspec {
            it_interval: none,
            it_value: time,
        };
        timerfd_settime(&timer, TimerfdTimerFlags::empty(), &once)?;
        self.readable(&timer).await
    }

    /// The result of `work`, or [`Errno::TIMEDOUT`] if it takes longer than `limit`: it is dropped then.
    pub async fn within<T>(
        &self,
        limit: Duration,
        work: impl Future<Output = Result<T, Errno>>,
    ) -> Result<T, Errno> {
        let (mut work, mut late) = (pin!(work), pin!(self.sleep(limit)));
        poll_fn(|cx| match work.as_mut().poll(cx) {
            Poll::Pending => late
                .as_mut()
                .poll(cx)
                .map(|slept| slept.and(Err(Errno::TIMEDOUT))),
            done => done,
        })
        .await
    }

    /// Sets whether the end of a quick command wakes the thread, because a task waits for it.
    pub fn heed_quick(&self, heed: bool) {
        self.0.heeds_quick.set(heed);
    }

    /// Submits all operations and takes results; with `wait`, sleeps until there is a result. If no operation is under
    /// way it would sleep for ever, so that is an error.
    pub fn enter(&self, wait: bool) -> io::Result<()> {
        let mut table = self.0.table.borrow_mut();
        if table.is_idle() {
            return match wait {
                true => Err(io::Error::new(
                    io::ErrorKind::Deadlock,
                    "there is nothing to wait for",
                )),
                false => Ok(()),
            };
        }
        let calls = match self.engine() {
            Engine::Uring => match self.0.uring.borrow_mut().as_mut() {
                Some(uring) => uring.enter(&mut table, wait, self.0.heeds_quick.get())?,
                None => return Err(io::ErrorKind::Unsupported.into()),
            },
            Engine::Aio => match self.0.aio.borrow_mut().as_mut() {
                Some(aio) => aio.enter(&mut table, wait)?,
                None => return Err(io::ErrorKind::Unsupported.into()),
            },
            #[cfg(feature = "fake")]
            Engine::Sync => sync::enter(&mut table, wait, self.0.decider.0.borrow().as_ref())?,
            #[cfg(not(feature = "fake"))]
            Engine::Sync => sync::enter(&mut table, wait)?,
        };
        self.0.calls.set(self.0.calls.get() + calls);
        self.0.sleeps.set(self.0.sleeps.get() + u64::from(wait));
        Ok(())
    }

    /// Operations that are not over, but for [`Op::Ready`] and [`Op::Command`]: those of data.
    pub fn transfers(&self) -> usize {
        self.0.table.borrow().transfers()
    }

    /// Returns the number of operations that change a file and failed: a server that executes them for this machine may
    /// still do so.
    pub fn failed(&self) -> u64 {
        self.0.table.borrow().failed()
    }

    /// System calls that were made, and how often the thread was let sleep in them.
    pub fn counts(&self) -> (u64, u64) {
        (self.0.calls.get(), self.0.sleeps.get())
    }
}

/// The result of an operation, once it is over. Dropping this does not end the operation, but for
/// [`Op::Ready`].
#[derive(Debug)]
#[must_use = "an operation whose result is dropped"]
pub struct Pending {
    io: Io,
    slot: Option<usize>,
}

impl Pending {
    /// Has the result delivered to a mailbox, with this token, instead of waiting for it. The operation does not end early.
    pub fn deliver_to(mut self, mailbox: &ResultMailbox, token: u64) {
        if let Some(slot) = self.slot.take() {
            self.io.0.table.borrow_mut().post(slot, mailbox, token);
        }
    }

    /// Ends the operation early if it can be; its result is then [`Errno::CANCELED`].
    pub fn cancel(&self) {
        if let Some(slot) = self.slot {
            self.io.0.table.borrow_mut().cancel(slot);
        }
    }
}

impl Future for Pending {
    type Output = Result<u32, Errno>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let slot = self.slot.expect("polled again after the result");
        let result = self.io.0.table.borrow_mut().poll(slot, cx.waker());
        match result {
            Some(result) => {
                self.slot = None;
                Poll::Ready(op_result(result))
            }
            None => Poll::Pending,
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if let Some(slot) = self.slot {
            self.io.0.table.borrow_mut().detach(slot);
        }
    }
}
