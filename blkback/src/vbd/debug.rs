// SPDX-License-Identifier: GPL-2.0-only

//! Files of a device in debugfs: its queues, and how long I/O takes, with the spans before and after it, while counting
//! is on.

use crate::engine::timing::latency::{FIRST_STEP_NS, STEPS};
use crate::linux::debug;
use crate::linux::xen::device::XenDevice;
use crate::totals::Totals;
use core::pin::Pin;
use kernel::debugfs::{Dir, File};
use kernel::fmt;
use kernel::prelude::*;
use kernel::str::CString;
use kernel::sync::Arc;
use kernel::uaccess::UserSliceReader;

/// A device's folder. Dropping it waits for current readers and writers of its files. May sleep.
#[pin_data]
pub(super) struct DebugFolder {
    #[pin]
    queues: File<Arc<Totals>>,
    #[pin]
    latency: File<Arc<Totals>>,
    _dir: Dir,
}

impl DebugFolder {
    /// Makes the folder and its files. May sleep.
    pub(super) fn new(device: &XenDevice, totals: &Arc<Totals>) -> Result<Pin<KBox<Self>>> {
        let (domain, number) = (device.otherend_id(), device.number());
        let name = CString::try_from_fmt(fmt!("vbd-{domain}-{number}"))?;
        let dir = debug::folder(&name).ok_or(ENODEV)?;
        let folder = try_pin_init!(Self {
            queues <- dir.read_callback_file(c"queues", totals.clone(), &queues),
            latency <- dir.read_write_callback_file(c"latency", totals.clone(), &latency, &switch),
            _dir: dir.clone(),
        } ? Error);
        KBox::pin_init(folder, GFP_KERNEL)
    }
}

fn queues(totals: &Arc<Totals>, out: &mut fmt::Formatter<'_>) -> fmt::Result {
    out.write_str(
        "queue in_flight oldest_us reads writes flushes discards passes ring_full events page_wait_us kept_pages\n",
    )?;
    let mut number = 0u32;
    totals.each_queue(|queue| {
        let [reads, writes, flushes, discards] = queue.asked;
        let told = fmt::Write::write_fmt(
            out,
            fmt!(
                "{number} {} {} {reads} {writes} {flushes} {discards} {} {} {} {} {}\n",
                queue.in_flight,
                queue.oldest_ns / 1000,
                queue.passes,
                queue.ring_full,
                queue.notified,
                queue.page_wait_ns / 1000,
                queue.kept
            ),
        );
        number = number.wrapping_add(1);
        told
    })
}

/// Prints a line for each step that has counted anything: its upper bound in microseconds, and the counts. The last
/// step counts all longer times too.
fn latency(totals: &Arc<Totals>, out: &mut fmt::Formatter<'_>) -> fmt::Result {
    let counts = if totals.measures() { "on" } else { "off" };
    fmt::Write::write_fmt(
        out,
        fmt!("counting {counts}\nbelow_us reads writes flushes discards ring pages answer\n"),
    )?;
    let mut below_ns = FIRST_STEP_NS;
    for step in 0..STEPS {
        let counts = totals.latencies(step);
        if counts.iter().any(|count| *count != 0) {
            fmt::Write::write_fmt(out, fmt!("{}", below_ns / 1000))?;
            for count in counts {
                fmt::Write::write_fmt(out, fmt!(" {count}"))?;
            }
            out.write_str("\n")?;
        }
        below_ns = below_ns.wrapping_mul(2);
    }
    Ok(())
}

/// Switches counting: `1` on, `0` off.
fn switch(totals: &Arc<Totals>, from: &mut UserSliceReader) -> Result {
    let word: u8 = from.read()?;
    match word {
        b'0' => totals.measure(false),
        b'1' => totals.measure(true),
        _ => return Err(EINVAL),
    }
    Ok(())
}
