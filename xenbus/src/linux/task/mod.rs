// SPDX-License-Identifier: GPL-2.0-only

//! Threads, their sleep, and work queues.

pub(crate) mod kthread;
pub(crate) mod wake_event;
pub(crate) mod workqueue;
