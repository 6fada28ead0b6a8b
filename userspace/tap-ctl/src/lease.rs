// SPDX-License-Identifier: MIT OR Apache-2.0
//! Leases, which decide which of several hosts may write an image. This works without the supervisor, because
//! administrators need it when hosts are dead.

mod rbd;

use crate::cli::LeaseVerb;
use control::{Code, Failure, LeaseKind, Target};
use lease::{date, Holder, HolderIsDead, Lease, LeaseClaim, LeaseView};
use rbd::{BrokenCephLock, CephImage};
use serde::Serialize;
use serde_json::{json, Value};
use std::path::Path;

/// A lease that was broken.
#[derive(Serialize)]
struct BrokenLease {
    /// Always `free`.
    state: &'static str,
    /// The holder that it had; nothing if it had none.
    was: Option<Holder>,
}

/// Runs the verb; returns the output for people and for programs.
pub(crate) fn run(verb: &LeaseVerb) -> Result<(String, Value), Failure> {
    match verb {
        LeaseVerb::Show { image } => {
            if let Some(image) = CephImage::of_target(image) {
                let view = image?.inspect()?;
                let told = json!(view);
                return Ok((rbd::show(&view), told));
            }
            let view = find(image)?.inspect()?;
            let told = json!(view);
            Ok((show(&view), told))
        }
        LeaseVerb::Break {
            image,
            holder_is_dead,
        } => {
            if let Some(image) = CephImage::of_target(image) {
                let was = image?.break_off(*holder_is_dead)?;
                let text = format!("state=free was={}\n", rbd::words(&was));
                return Ok((text, json!(BrokenCephLock { state: "free", was })));
            }
            let mut lease = find(image)?;
            let view = lease.inspect();
            if matches!(
                &view,
                Ok(LeaseView::Free {
                    generation: 0,
                    last: None
                })
            ) {
                let why = format!("no host has a lease of {image}, so there is none to break");
                return Err(Failure::new(Code::NotFound, why));
            }
            if lease.watches() {
                crate::complain("watching for 13 seconds whether the holder is silent");
            }
            let generation = *holder_is_dead;
            let broken = lease.break_off(HolderIsDead { generation })?;
            let text = match &broken {
                Some(was) => format!("state=free was={}\n", holder(was)),
                None => "state=free\n".into(),
            };
            let told = BrokenLease {
                state: "free",
                was: broken,
            };
            Ok((text, json!(told)))
        }
    }
}

/// The lease of a target, or of the image at a path: the record beside it if there is one, else what its storage has
/// reserved, else its lock.
fn find(text: &str) -> Result<Box<dyn Lease>, Failure> {
    let target = Target::from_params(text)?;
    let image = target.path().ok_or_else(|| {
        Failure::invalid(format!(
            "{text} has no image, so no host but this one has it"
        ))
    })?;
    let beside = LeaseKind::Record(None);
    let has_record = lease::place(&beside, image)
        .record
        .is_some_and(|record| record.exists());
    let claim = LeaseClaim::new("tap-ctl")?;
    match target.lease() {
        LeaseKind::Lock if has_record => lease::open(&beside, image, claim),
        LeaseKind::Lock => match reservation(image, &claim) {
            Some(reserved) => Ok(reserved),
            None => lease::open(&LeaseKind::Lock, image, claim),
        },
        kind => lease::open(kind, image, claim),
    }
}

/// Returns the reservation in the storage of an image. Most have nothing, and cannot.
fn reservation(image: &Path, claim: &LeaseClaim) -> Option<Box<dyn Lease>> {
    let mut lease = lease::open(&LeaseKind::Reservation, image, claim.clone()).ok()?;
    let is_held = matches!(lease.inspect(), Ok(LeaseView::Held(_)));
    is_held.then_some(lease)
}

fn show(view: &LeaseView) -> String {
    match view {
        LeaseView::Held(who) => format!("state=held {}\n", holder(who)),
        LeaseView::Claimed(who) => format!("state=claimed {}\n", holder(who)),
        LeaseView::Free { generation, last } => {
            let last = last.as_ref().map(|who| format!(" last-{}", holder(who)));
            format!(
                "state=free generation={generation}{}\n",
                last.unwrap_or_default()
            )
        }
    }
}

/// Words `name=value`; a lock does not say who has it, of a reservation little more is known than its key, and of a lease
/// of sanlock's the host, not its disk.
fn holder(who: &Holder) -> String {
    if who.host.is_empty() {
        return "host=unknown".into();
    }
    let here = if who.is_here { " here" } else { "" };
    if let Some(key) = &who.key {
        return format!("host={} key={key}{here}", who.host);
    }
    if let Some(owner) = &who.sanlock {
        let since = match who.since_ms {
            0 => "unknown".into(),
            ms => format!("{:?}", date(ms)),
        };
        return format!(
            "host={} host-id={} host-generation={} host-state={} generation={} since={since}{here}",
            who.host, owner.host_id, owner.generation, owner.state, who.generation,
        );
    }
    format!(
        "host={} generation={} since={:?} disk={:?}{here}",
        who.host,
        who.generation,
        date(who.since_ms),
        who.disk,
    )
}

#[cfg(test)]
mod tests {
    use super::run;
    use crate::cli::{Cli, LeaseVerb, Verb};
    use clap::Parser;
    use control::Code;
    use lease::LeaseClaim;
    use std::time::Duration;

    fn verb(line: &str) -> LeaseVerb {
        match Cli::try_parse_from(line.split(' ')).map(|cli| cli.verb) {
            Ok(Verb::Lease { verb }) => verb,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn a_lease_is_shown_and_not_broken_unless_its_generation_is_named() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let image = dir.path().join("a.img");
        std::fs::write(&image, b"image").unwrap();
        let target = format!("lease=record,aio:{}", image.display());
        let show = verb(&format!("tap-ctl lease show {target}"));
        assert_eq!(run(&show).unwrap().0, "state=free generation=0\n");
        let never = verb(&format!("tap-ctl lease break {target} --holder-is-dead 1"));
        let refused = run(&never).unwrap_err();
        assert_eq!(refused.code, Code::NotFound, "{refused}");
        let mut claim = LeaseClaim::new("guest 3, xvda").unwrap();
        claim.host.name = "alpha".into();
        let kind = "record".parse().unwrap();
        let mut holder = lease::open(&kind, &image, claim).unwrap();
        holder.take(Duration::ZERO).unwrap();
        // Of an image alone, the record beside it counts.
        let path = verb(&format!("tap-ctl lease show {}", image.display()));
        let (text, json) = run(&path).unwrap();
        assert!(
            text.starts_with("state=held host=alpha generation=1 since="),
            "{text}"
        );
        assert_eq!(json["state"], "held");
        assert_eq!(json["disk"], "guest 3, xvda");
        let other = verb(&format!("tap-ctl lease break {target} --holder-is-dead 7"));
        let refused = run(&other).unwrap_err();
        assert_eq!(refused.code, Code::Busy);
        assert!(refused.message.contains("host alpha"), "{refused}");
        holder.give_up().unwrap();
        let (text, json) = run(&other).unwrap();
        assert_eq!(text, "state=free\n");
        assert_eq!(json["was"], serde_json::Value::Null);
        let none = run(&verb("tap-ctl lease show ram:1M")).unwrap_err();
        assert_eq!(none.code, Code::Invalid);
    }

    #[test]
    fn a_break_needs_the_operators_word() {
        let without = "tap-ctl lease break /srv/a.img".split(' ');
        assert!(Cli::try_parse_from(without).is_err());
        for (text, number) in [("7", 7), ("0x3fa2c00107abcdef", 0x3fa2_c001_07ab_cdef)] {
            let line = format!("tap-ctl lease break /srv/a.img --holder-is-dead {text}");
            match verb(&line) {
                LeaseVerb::Break { holder_is_dead, .. } => assert_eq!(holder_is_dead, number),
                LeaseVerb::Show { .. } => panic!("{line}"),
            }
        }
        let wrong = "tap-ctl lease break /srv/a.img --holder-is-dead 3fa2c".split(' ');
        assert!(Cli::try_parse_from(wrong).is_err());
    }

    #[test]
    fn a_lease_of_sanlock_is_shown_with_its_host() {
        let dir = tempfile::tempdir().unwrap();
        let storage = lease::sanlock::fake::LockspaceStorage::default();
        let [here, there] = [1, 2].map(|number| storage.node(dir.path(), number).unwrap());
        let text = "sanlock:vms:a:/srv/leases";
        let Ok(control::LeaseKind::Sanlock(resource)) = text.parse() else {
            panic!("{text}");
        };
        let image = std::path::Path::new("/srv/a.img");
        let mut open = [&here, &there].map(|node| {
            let claim = LeaseClaim::new("tap-ctl").unwrap();
            node.lease(&resource, image, claim)
        });
        let free = open[1].inspect().unwrap();
        assert_eq!(super::show(&free), "state=free generation=0\n");
        open[0].take(Duration::ZERO).unwrap();
        let view = open[1].inspect().unwrap();
        let shown = super::show(&view);
        let begin = "state=held host=alpha host-id=1 host-generation=1 host-state=live generation=1 since=\"2";
        assert!(shown.starts_with(begin), "{shown}");
        assert_eq!(serde_json::json!(view)["sanlock"]["host_id"], 1);
        let shown = super::show(&open[0].inspect().unwrap());
        assert!(shown.ends_with(" here\n"), "{shown}");
    }

    #[test]
    fn a_reservation_is_shown_with_its_key() {
        let target = lease::reservation::fake::ScsiTarget::default();
        let image = std::path::Path::new("/dev/sdx");
        let own = LeaseClaim::new("a disk").unwrap();
        let mut lease = target.lease(1, image, own.clone());
        assert_eq!(
            super::show(&lease.inspect().unwrap()),
            "state=free generation=0\n"
        );
        lease.take(Duration::ZERO).unwrap();
        let view = lease.inspect().unwrap();
        let shown = super::show(&view);
        let begin = format!("state=held host={} key=0x", own.host.name);
        assert!(
            shown.starts_with(&begin) && shown.ends_with(" here\n"),
            "{shown}"
        );
        let mut other = own;
        (other.host.machine, other.host.boot) = ([7; 16], [7; 16]);
        let seen = target.lease(2, image, other).inspect().unwrap();
        assert!(
            super::show(&seen).starts_with("state=held host=id-"),
            "{seen:?}"
        );
        let json = serde_json::json!(view);
        assert!(shown.contains(json["key"].as_str().unwrap()), "{json}");
        // A file has none.
        let refused = run(&verb(
            "tap-ctl lease show lease=reservation,aio:/etc/passwd",
        ));
        assert_eq!(refused.unwrap_err().code, Code::Unsupported);
    }
}
