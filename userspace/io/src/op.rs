// SPDX-License-Identifier: MIT OR Apache-2.0
//! Operations, and what carries them out.

use crate::aio::Aio;
use crate::helpers::Helpers;
use crate::pool::Pool;
use crate::sync;
use crate::table::Table;
use crate::uring::Uring;
use crate::{Bytes, Data, Errno, Opened, Region};
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

/// One operation. It keeps what it works on.
#[derive(Clone, Debug)]
pub enum Op {
    /// Reads at an offset in bytes; the result is the number of bytes.
    Read {
        /// The file.
        file: Rc<Opened>,
        /// Bytes from its beginning.
        offset: u64,
        /// Where to.
        data: Data,
    },
    /// Writes at an offset in bytes; the result is the number of bytes.
    Write {
        /// The file.
        file: Rc<Opened>,
        /// Bytes from its beginning.
        offset: u64,
        /// Where from.
        data: Bytes,
        /// What is written is durable when the operation is over (`RWF_DSYNC`).
        durable: bool,
    },
    /// Makes what was written durable (`fdatasync`).
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
    /// Waits until a descriptor can be read, or written.
    Ready {
        /// The descriptor.
        fd: Rc<OwnedFd>,
        /// Wait until it can be written.
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
        /// It is over as soon as it is handed over, and nobody sleeps just for that, unless
        /// [`Io::heed_quick`] says so.
        quick: bool,
    },
}

/// How operations are carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// `io_uring`.
    Uring,
    /// Linux AIO for data, `poll` for the rest.
    Aio,
    /// Each when it is submitted, by a plain call; `poll` for the rest.
    Sync,
}

/// Carries out operations. Copies are the same thing.
#[derive(Clone, Debug)]
pub struct Io(Rc<Inner>);

#[derive(Debug)]
struct Inner {
    engine: Cell<Engine>,
    /// Made early and kept, because a sandbox may forbid to make it later. It and `aio` are dropped
    /// before the table, whose operations they wait for.
    uring: RefCell<Option<Uring>>,
    aio: RefCell<Option<Aio>>,
    table: RefCell<Table>,
    /// System calls made.
    calls: Cell<u64>,
    /// Times that the thread slept in one of them.
    sleeps: Cell<u64>,
    /// The end of a quick command ends a sleep.
    heeds_quick: Cell<bool>,
    /// Memory to be used again.
    pool: Rc<Pool>,
    helpers: RefCell<Option<Rc<Helpers>>>,
}

impl Default for Io {
    fn default() -> Self {
        Self::new()
    }
}

impl Io {
    /// With plain calls at first, see [`select`](Self::select).
    pub fn new() -> Self {
        Self(Rc::new(Inner {
            table: RefCell::new(Table::default()),
            engine: Cell::new(Engine::Sync),
            uring: RefCell::new(None),
            aio: RefCell::new(None),
            calls: Cell::new(0),
            sleeps: Cell::new(0),
            heeds_quick: Cell::new(false),
            pool: Rc::default(),
            helpers: RefCell::new(None),
        }))
    }

    /// Makes the `io_uring`, so that it can be selected later from within a sandbox. It accepts no
    /// operation but those of [`Op`].
    pub fn prepare_uring(&self) -> io::Result<()> {
        let mut uring = self.0.uring.borrow_mut();
        if uring.is_none() {
            *uring = Some(Uring::new()?);
        }
        Ok(())
    }

    /// Memory of `len` bytes for a transfer, aligned to a page. What is in it is left from earlier ones,
    /// to which it goes back when nobody uses it any more.
    pub fn buffer(&self, len: usize) -> Result<Data, Errno> {
        let region = self.0.pool.take(len).map_err(|_| Errno::NOMEM)?;
        Data::at_begin(region, len).ok_or(Errno::INVAL)
    }

    /// From now on so many bytes at least are kept for [`buffer`](Self::buffer) while nobody uses them: for who holds
    /// that many and lets go of all at once.
    pub fn keep_buffers(&self, bytes: usize) {
        self.0.pool.keep(bytes);
    }

    /// Starts threads for [`elsewhere`](Self::elsewhere), which a sandbox would forbid. They inherit
    /// what this thread has blocked of signals.
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

    /// The result of work that may sleep or takes long: a helper does it, or this thread if there is
    /// none. Work that nobody waits for any more is done all the same.
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

    /// Closes the `io_uring`, which is the only way to end an [`Op::Command`] that waits at a
    /// device: the device is let go of. What one has brought until then is its result. Fails if I/O is under way.
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

    /// How operations are carried out now.
    pub fn engine(&self) -> Engine {
        self.0.engine.get()
    }

    /// Makes I/O on this region cheaper where the engine can do that (`io_uring` pins its pages
    /// once). One region at a time; `None` for none. Says whether it is done.
    pub fn register(&self, region: Option<&Rc<Region>>) -> io::Result<bool> {
        match self.0.uring.borrow_mut().as_mut() {
            Some(uring) if self.engine() == Engine::Uring => uring.register(region),
            _ => Ok(false),
        }
    }

    /// Begins an operation with the next [`enter`](Self::enter). Its result is what the system call
    /// would return.
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

    /// Waits until `fd` can be written.
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

    /// Whether the end of a quick command is something to wake up for: somebody waits for it.
    pub fn heed_quick(&self, heed: bool) {
        self.0.heeds_quick.set(heed);
    }

    /// Hands over everything that was submitted and takes what is done; with `wait`, sleeps until
    /// something is done. Sleeps for ever if nothing is under way, so that is an error.
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

    /// Operations that change a file and failed: whoever executes them for this machine may still do so.
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
#[must_use = "an operation whose result nobody looks at"]
pub struct Pending {
    io: Io,
    slot: Option<usize>,
}

impl Pending {
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
                Poll::Ready(
                    u32::try_from(result)
                        .map_err(|_| Errno::from_raw_os_error(result.wrapping_neg())),
                )
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
