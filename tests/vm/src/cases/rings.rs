// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Every shape of ring that a frontend can ask for.

use super::basic::{compare, verify_job, FIO};
use super::{skip, Case, Context, SharedGuest};
use crate::guest::{AttachedVbd, Guest};
use crate::hotplug;
use crate::sh;
use crate::xs;
use anyhow::{ensure, Context as _, Result};
use std::time::Duration;

/// Time in which a guest must remove a disk that the backend has closed.
const UNUSED: Duration = Duration::from_secs(30);

/// Properties that a frontend requests.
#[derive(Clone, Copy)]
struct RingShape {
    queues: u64,
    order: u64,
    /// The most segments of an indirect request.
    segments: u64,
    persistent: bool,
}

/// The longest rings, with both kinds of grants. With persistent grants the frontend allocates a page for every
/// segment of every slot of the ring at once, so a long ring and long requests together need more memory than a small
/// guest has.
const SHAPES: &[RingShape] = &[shape(4, 3, 0, true)];

/// With these every order and every number of queues, and each pair of the other choices at least once.
const MORE_SHAPES: &[RingShape] = &[
    shape(4, 4, 256, false),
    shape(1, 0, 32, false),
    shape(2, 1, 256, true),
    shape(3, 2, 256, false),
    shape(1, 4, 32, true),
];

const fn shape(queues: u64, order: u64, segments: u64, persistent: bool) -> RingShape {
    RingShape {
        queues,
        order,
        segments,
        persistent,
    }
}

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    let case = |shape: &RingShape| {
        let RingShape {
            queues,
            order,
            segments,
            persistent,
        } = *shape;
        let grants = if persistent { "persistent" } else { "fresh" };
        let name = format!("rings.q{queues}_o{order}_s{segments}_{grants}");
        let about = format!(
            "{queues} queues of {} pages, {segments} indirect segments, {grants} grants",
            1 << order
        );
        let shape = *shape;
        Case::new(&name, &about, SharedGuest::PvWide, move |context| {
            one(context, shape)
        })
    };
    let mut all: Vec<Case> = SHAPES.iter().map(case).collect();
    all.extend(MORE_SHAPES.iter().map(|shape| case(shape).nightly()));
    all.push(Case::new(
        "rings.defaults_back",
        "the frontend's defaults after all that",
        SharedGuest::PvWide,
        defaults,
    ));
    all.push(Case {
        ours: true,
        ..Case::new(
            "rings.events",
            "each event of a guest is ended once, and none that brought requests is called spurious: the kernel would hold back the next one",
            SharedGuest::Pv,
            events,
        )
    });
    all
}

fn events(context: &mut Context) -> Result<()> {
    // The completions come one by one, each of which wakes the queue, without an event of the guest.
    let slow = [("irqmode", "2"), ("completion_nsec", "300000")];
    let device = context.null_blk(32, &slow)?;
    let guest = context.pv()?;
    let vbd = guest.attach(&hotplug::disk(&device.path(), "xvda", "w")?)?;
    let random = "--rw=randread --bs=4k --iodepth=16 --number_ios=2000";
    let fio = "fio --name=events --filename=/dev/xvda --size=32m --direct=1 --ioengine=libaio --output-format=terse";
    guest.run_for(&format!("{fio} {random}"), FIO)?;
    let events = vbd.number("xenbus/events")?;
    let spurious = vbd.number("xenbus/spurious_events")?;
    let delayed = vbd.number("xenbus/jiffies_eoi_delayed")?;
    context.note(&format!(
        "{events} events, {spurious} of them spurious; the next one was held back for {delayed} ticks"
    ))?;
    // An event may find its requests taken with those of the one before. Two in a row would delay the next one.
    ensure!(
        delayed == 0 && spurious * 4 <= events,
        "of {events} events {spurious} were called spurious, and {delayed} ticks were waited for that"
    );
    let guest = context.pv()?;
    guest.detach(&vbd)
}

fn one(context: &mut Context, shape: RingShape) -> Result<()> {
    let device = context.null_blk(32, &[])?;
    let guest = context.wide()?;
    reload(
        guest,
        &format!(
            "max_queues={} max_ring_page_order={} max_indirect_segments={} feature_persistent={}",
            shape.queues,
            shape.order,
            shape.segments,
            u8::from(shape.persistent)
        ),
    )?;
    let vbd = guest.attach(&hotplug::disk(&device.path(), "xvda", "w")?)?;
    context.check_driver(&vbd)?;
    let offered = [
        ("multi-queue-max-queues", shape.queues),
        ("max-ring-page-order", shape.order),
    ];
    for (key, wanted) in offered {
        let most = xs::read(&format!("{}/{key}", vbd.backend))?
            .map_or(Ok(0), |text| text.parse::<u64>())?;
        if most < wanted {
            guest.detach(&vbd)?;
            reload(guest, "")?;
            return skip(format!(
                "the backend offers {key} = {most}, the case needs {wanted}"
            ));
        }
    }
    check_shape(guest, &vbd, shape)?;
    guest.run_for(&verify_job("/dev/xvda", 5, 150, 512), FIO)?;
    // One job for each CPU of the guest, so that every queue works.
    guest.run_for(
        "fio --name=all --filename=/dev/xvda --size=2m --offset_increment=2m --offset=8m --numjobs=4 --cpus_allowed=0-3 \
         --cpus_allowed_policy=split --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite --bsrange=4k-128k --blockalign=4k \
         --verify=crc32c --verify_fatal=1 --do_verify=1 --output-format=terse",
        FIO,
    )?;
    compare(guest, "xvda", &device.path(), 16)?;
    guest.detach(&vbd)
}

/// Loads the frontend again, with other parameters. The guest must have no disk.
fn reload(guest: &Guest, parameters: &str) -> Result<()> {
    // The backend is through before the guest has taken the last disk apart.
    sh::wait_for("the guest's frontend driver to be unused", UNUSED, || {
        Ok(guest.run("cat /sys/module/xen_blkfront/refcnt")?.trim() == "0")
    })?;
    guest
        .run(&format!(
            "rmmod xen_blkfront && insmod /mod/*xen-blkfront.ko {parameters}"
        ))
        .map(drop)
}

/// Checks that the negotiated properties are the requested ones.
fn check_shape(guest: &Guest, vbd: &AttachedVbd, shape: RingShape) -> Result<()> {
    let key = |name: &str| -> Result<Option<u64>> {
        let text = xs::read(&format!("{}/{name}", vbd.frontend))?;
        text.map(|text| text.parse().with_context(|| format!("{name} is `{text}`")))
            .transpose()
    };
    ensure!(
        key("ring-page-order")?.unwrap_or(0) == shape.order,
        "the ring's order is {:?}, not {}",
        key("ring-page-order")?,
        shape.order
    );
    let queues = key("multi-queue-num-queues")?.unwrap_or(1);
    ensure!(
        queues == shape.queues,
        "{queues} queues were negotiated, not {}",
        shape.queues
    );
    let directory = if shape.queues > 1 {
        format!("{}/queue-{}", vbd.frontend, shape.queues - 1)
    } else {
        vbd.frontend.clone()
    };
    let pages = xs::list(&directory)?
        .iter()
        .filter(|name| name.starts_with("ring-ref"))
        .count();
    ensure!(
        pages == 1 << shape.order,
        "{pages} ring pages are in {directory}, not {}",
        1 << shape.order
    );
    let used = guest
        .run("ls /sys/block/xvda/mq")?
        .split_whitespace()
        .count() as u64;
    ensure!(
        used == shape.queues,
        "the guest's disk has {used} queues, not {}",
        shape.queues
    );
    Ok(())
}

fn defaults(context: &mut Context) -> Result<()> {
    let device = context.null_blk(32, &[])?;
    let guest = context.wide()?;
    reload(guest, "")?;
    let vbd = guest.attach(&hotplug::disk(&device.path(), "xvda", "w")?)?;
    guest.run_for(&verify_job("/dev/xvda", 3, 90, 512), FIO)?;
    guest.detach(&vbd)
}
