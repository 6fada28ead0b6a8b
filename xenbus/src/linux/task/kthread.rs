// SPDX-License-Identifier: GPL-2.0-only

//! Kernel threads.
//!
//! Wraps `kthread_create_on_node`, `kthread_stop_put` (include/linux/kthread.h) and `wake_up_process`
//! (include/linux/sched.h).

use core::ptr::NonNull;
use kernel::bindings;
use kernel::error::from_err_ptr;
use kernel::ffi::{c_int, c_void};
use kernel::prelude::*;
use kernel::sync::{Arc, Completion};

/// Work of a thread.
pub(crate) trait Runner: Sized + Send + 'static {
    /// Runs as the body of the thread; the thread ends when it returns.
    fn run(self);
}

struct Start<R> {
    runner: KBox<R>,
    started: Arc<Completion>,
}

/// A running thread. Dropping it waits for its end; tell it to stop first.
///
/// # Invariants
///
/// `task` is a thread made by [`Thread::spawn`] that has entered its body; we hold a reference.
pub(crate) struct Thread {
    task: NonNull<bindings::task_struct>,
}

// SAFETY: A task may be stopped from any thread.
unsafe impl Send for Thread {}
// SAFETY: There is no method that takes `&self`.
unsafe impl Sync for Thread {}

impl Thread {
    /// Starts a thread. Its name is cut to 15 bytes in listings. May sleep.
    pub(crate) fn spawn<R: Runner>(name: &CStr, runner: KBox<R>) -> Result<Self> {
        let started = Arc::pin_init(Completion::new(), GFP_KERNEL)?;
        let start = KBox::new(
            Start {
                runner,
                started: started.clone(),
            },
            GFP_KERNEL,
        )?;
        let data = KBox::into_raw(start);
        // SAFETY: The format takes one string, which is given; `body::<R>` takes ownership of
        // `data` when the thread runs.
        let task = from_err_ptr(unsafe {
            bindings::kthread_create_on_node(
                Some(body::<R>),
                data.cast(),
                bindings::NUMA_NO_NODE,
                c"%s".as_char_ptr(),
                name.as_char_ptr(),
            )
        })
        .inspect_err(|_| {
            // SAFETY: The thread was not made, so `data` is still ours.
            drop(unsafe { KBox::from_raw(data) });
        })?;
        // SAFETY: `task` was just made and cannot be gone before it runs.
        unsafe { bindings::get_task_struct(task) };
        // SAFETY: `task` is valid.
        unsafe { bindings::wake_up_process(task) };
        // A thread that is stopped before it has entered its body never enters it, and its data would be lost.
        started.wait_for_completion();
        // INVARIANT: It has entered its body, and the reference was taken above.
        Ok(Self {
            task: NonNull::new(task).ok_or(ENOMEM)?,
        })
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        // SAFETY: By the invariant the task is a kernel thread to which we hold a reference, which
        // this gives back.
        unsafe { bindings::kthread_stop_put(self.task.as_ptr()) };
    }
}

extern "C" fn body<R: Runner>(data: *mut c_void) -> c_int {
    // SAFETY: `data` comes from `KBox::into_raw` in `spawn` and is given to this call alone.
    let start = unsafe { KBox::<Start<R>>::from_raw(data.cast()) };
    let Start { runner, started } = KBox::into_inner(start);
    started.complete_all();
    drop(started);
    KBox::into_inner(runner).run();
    0
}
