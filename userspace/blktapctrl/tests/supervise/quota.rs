// SPDX-License-Identifier: MIT OR Apache-2.0
//! Disks that share limits, with processes that hang, die and are replaced, and supervisors that end.

use super::bed::{block_on, kill, test, until, which, Bed, Succession};
use super::fake;
use blktapctrl::recovery;
use control::supervisor::{
    Changes, Check, Create, Group, GroupChanges, Mode, Policy, Reply, Request,
};
use control::{Code, Failure, GroupName, InGroup, RateShare};
use std::fs;
use std::rc::Rc;
use std::time::Duration;

/// Bytes that the group of a test may do in a second.
const ALL: u64 = 64 << 20;

fn name() -> GroupName {
    "customer-7".parse().expect("a name")
}

fn bytes(bytes: u64) -> GroupChanges {
    GroupChanges {
        bytes: Some(bytes),
        ..GroupChanges::default()
    }
}

async fn set_group(bed: &Bed, changes: GroupChanges) -> Result<Group, Failure> {
    let name = name();
    one(bed.ask(Request::SetGroup { name, changes }).await?)
}

fn one(reply: Reply) -> Result<Group, Failure> {
    match reply {
        Reply::Groups { mut groups } if groups.len() == 1 => Ok(groups.remove(0)),
        other => panic!("{other:?}"),
    }
}

async fn show(bed: &Bed) -> Group {
    let name = Some(name());
    let reply = bed.ask(Request::Groups { name }).await.expect("a group");
    one(reply).expect("a group")
}

/// A disk of the group.
fn member(bed: &Bed, image: &str) -> Create {
    bed.image(image, image);
    let create = bed.create(image);
    Create {
        policy: Policy {
            group: Some(name()),
            ..Policy::default()
        },
        ..create
    }
}

async fn put(bed: &Bed, minor: u32, group: InGroup) -> Result<Policy, Failure> {
    let changes = Changes {
        group: Some(group),
        ..Changes::default()
    };
    let which = which(minor);
    match bed.ask(Request::Set { which, changes }).await? {
        Reply::Policy(policy) => Ok(policy),
        other => panic!("{other:?}"),
    }
}

/// Returns the last share that the process of a disk got; nothing if it is in no group.
fn told(bed: &Bed, minor: u32) -> Option<RateShare> {
    let text = fs::read(bed.dir.join(format!("share-{minor}"))).expect("a share");
    serde_json::from_slice(&text).expect("a share")
}

fn pace(bed: &Bed, minor: u32) -> u64 {
    let share = told(bed, minor).expect("in a group");
    share.pace.bytes.expect("a limit")
}

/// The guest of a disk asks for as much as there is, or for nothing any more.
fn asks(bed: &Bed, minor: u32, much: bool) {
    let (came, lacks) = (
        bed.dir.join(format!("came-{minor}")),
        bed.dir.join(format!("lacks-{minor}")),
    );
    let before: u64 = fs::read_to_string(&came).map_or(0, |text| text.parse().expect("a number"));
    match much {
        true => {
            fs::write(&lacks, "").expect("write");
            fake::put(&came, (before + 1).to_string());
        }
        false => fs::remove_file(&lacks).expect("remove"),
    }
}

/// Waits until a disk may do so many hundredths of what the group may, or more.
async fn has(bed: &Bed, minor: u32, hundredths: u64) {
    until(
        &format!("{hundredths} hundredths for disk {minor}"),
        || async {
            let has = pace(bed, minor);
            (has >= ALL / 100 * hundredths).then_some(())
        },
    )
    .await;
}

#[test]
fn a_group_is_divided_among_those_who_work() {
    test("quota-divided", |bed| async move {
        set_group(&bed, bytes(ALL)).await.expect("a group");
        for image in ["a.img", "b.img"] {
            bed.made(member(&bed, image)).await;
        }
        // A configuration names the group in the same way.
        let path = bed.image("c.img", "c");
        let text = format!("group=customer-7,sync:{}", path.display());
        let mut third = bed.create("c.img");
        third.open.target = text.parse().expect("a target");
        let check = Check {
            target: third.open.target.clone(),
            mode: Mode::Write,
            vbd: None,
        };
        bed.ask(Request::Check(check)).await.expect("free");
        bed.made(third).await;
        let group = show(&bed).await;
        let minors: Vec<u32> = group.members.iter().map(|member| member.minor).collect();
        assert_eq!((minors, group.limits.bytes), (vec![0, 1, 2], ALL));
        // One works, and has what the others leave; then two do.
        asks(&bed, 1, true);
        has(&bed, 1, 95).await;
        assert_eq!(told(&bed, 1).expect("a share").after.bytes, Some(ALL / 3));
        asks(&bed, 2, true);
        has(&bed, 2, 45).await;
        let sum: u64 = [0, 1, 2].map(|minor| pace(&bed, minor)).iter().sum();
        assert!(sum <= ALL, "{sum}");
        let group = show(&bed).await;
        let lacks: Vec<bool> = group.members.iter().map(|member| member.lacks).collect();
        assert_eq!(lacks, [false, true, true]);
        asks(&bed, 1, false);
        has(&bed, 2, 95).await;
    });
}

#[test]
fn a_process_that_hangs_or_dies_is_in_nobodys_way() {
    test("quota-hangs", |bed| async move {
        set_group(&bed, bytes(ALL)).await.expect("a group");
        for image in ["a.img", "b.img"] {
            bed.made(member(&bed, image)).await;
        }
        for minor in [0, 1] {
            asks(&bed, minor, true);
        }
        has(&bed, 0, 45).await;
        has(&bed, 1, 45).await;
        // One answers no more, and the other one has all after a while.
        let hangs = bed.dir.join("hangs-0");
        fs::write(&hangs, "").expect("write");
        has(&bed, 1, 95).await;
        let group = show(&bed).await;
        assert!(
            !group.members[0].lacks && group.members[1].lacks,
            "{group:?}"
        );
        fs::remove_file(&hangs).expect("remove");
        has(&bed, 0, 45).await;
        // One that dies begins with its part.
        bed.replaced(0, kill).await;
        has(&bed, 0, 45).await;
        // A new process has it, too.
        let handoff = Request::Handoff {
            which: which(0),
            program: None,
            timeout_s: 0,
        };
        bed.ask(handoff).await.expect("handed over");
        has(&bed, 0, 45).await;
        // A disk that goes leaves its part.
        bed.destroy(0).await;
        has(&bed, 1, 100).await;
    });
}

#[test]
fn disks_come_and_go_while_they_are_served() {
    test("quota-set", |bed| async move {
        set_group(&bed, bytes(ALL)).await.expect("a group");
        bed.image("a.img", "A");
        let minor = bed.made(bed.create("a.img")).await;
        assert_eq!(told(&bed, minor), None);
        let named = || InGroup::Named(name());
        let policy = put(&bed, minor, named()).await.expect("in the group");
        assert_eq!(policy.group, Some(name()));
        has(&bed, minor, 100).await;
        let failure = bed
            .ask(Request::RemoveGroup { name: name() })
            .await
            .expect_err("it has a disk");
        assert_eq!(failure.code, Code::Busy);
        assert!(
            failure.message.contains("`tap-ctl set -m 0 --group none`"),
            "{failure}"
        );
        // A new limit is heard.
        set_group(&bed, bytes(2 * ALL)).await.expect("changed");
        has(&bed, minor, 200).await;
        // Limits that make no sense change nothing.
        for wrong in [0, 1] {
            let failure = set_group(&bed, bytes(wrong)).await.expect_err("too little");
            assert_eq!(failure.code, Code::Invalid);
        }
        assert_eq!(show(&bed).await.limits.bytes, 2 * ALL);
        put(&bed, minor, InGroup::None).await.expect("in none");
        assert_eq!(told(&bed, minor), None);
        let removed = bed.ask(Request::RemoveGroup { name: name() }).await;
        assert_eq!(removed, Ok(Reply::Done));
        let failure = put(&bed, minor, named()).await.expect_err("no group");
        assert_eq!(failure.code, Code::NotFound);
        assert!(failure.message.contains("tap-ctl group set"), "{failure}");
        let reply = bed
            .ask(Request::Create(Box::new(member(&bed, "b.img"))))
            .await;
        assert_eq!(reply.expect_err("no group").code, Code::NotFound);
    });
}

#[test]
fn a_group_has_no_more_disks_than_it_can_serve() {
    test("quota-room", |bed| async move {
        set_group(&bed, bytes(1 << 20)).await.expect("a group");
        for image in 0..8 {
            bed.made(member(&bed, &format!("{image}.img"))).await;
        }
        let ninth = Request::Create(Box::new(member(&bed, "8.img")));
        let failure = bed.ask(ninth).await.expect_err("too many");
        assert!(failure.message.contains("--bps 1179648"), "{failure}");
        // A process that is older than groups would know no limit.
        set_group(&bed, bytes(ALL)).await.expect("more");
        fs::write(bed.dir.join("old"), "").expect("write");
        bed.image("9.img", "9");
        let minor = bed.made(bed.create("9.img")).await;
        let failure = put(&bed, minor, InGroup::Named(name())).await;
        let failure = failure.expect_err("older");
        assert!(failure.message.contains("tap-ctl handoff 8"), "{failure}");
        assert_eq!(show(&bed).await.members.len(), 8);
        let handoff = Request::Handoff {
            which: which(0),
            program: None,
            timeout_s: 0,
        };
        let failure = bed.ask(handoff).await.expect_err("older");
        assert!(failure.message.contains("older than groups"), "{failure}");
        fs::remove_file(bed.dir.join("old")).expect("remove");
    });
}

#[test]
fn groups_outlive_the_supervisor() {
    let host = Succession::new("quota-outlive");
    block_on(async {
        let bed = host.bed();
        set_group(&bed, bytes(ALL)).await.expect("a group");
        for image in ["a.img", "b.img"] {
            bed.made(member(&bed, image)).await;
        }
        asks(&bed, 0, true);
        has(&bed, 0, 95).await;
    });
    let before = fs::read(host.dir.join("share-0")).expect("a share");
    block_on(async {
        let bed = host.bed();
        recovery::disks(&bed.lifecycle).await;
        let group = show(&bed).await;
        assert_eq!((group.members.len(), group.limits.bytes), (2, ALL));
        // No process gets a new share before the one that it has ends.
        let share: RateShare = serde_json::from_slice(&before).expect("a share");
        until("another share", || async {
            (told(&bed, 0).expect("a share").until > share.until).then_some(())
        })
        .await;
        let now = told(&bed, 0).expect("a share").until;
        assert!(
            now > share.until + Duration::from_millis(1500),
            "{now:?} {share:?}"
        );
        asks(&bed, 1, true);
        has(&bed, 1, 45).await;
        end(&bed).await;
    });
}

async fn end(bed: &Rc<Bed>) {
    for minor in [0, 1] {
        bed.destroy(minor).await;
    }
    let removed = bed.ask(Request::RemoveGroup { name: name() }).await;
    assert_eq!(removed, Ok(Reply::Done));
    bed.assert_nothing_left().await;
    let left = fs::read_dir(bed.dir.join("run/groups"))
        .expect("a folder")
        .count();
    assert_eq!(left, 0);
}

#[test]
fn a_group_that_is_lost_or_cannot_be_read_limits_all_the_same() {
    let host = Succession::new("quota-lost");
    block_on(async {
        let bed = host.bed();
        set_group(&bed, bytes(ALL)).await.expect("a group");
        for image in ["a.img", "b.img"] {
            bed.made(member(&bed, image)).await;
        }
    });
    let file = host.dir.join("run/groups/customer-7.json");
    fs::write(&file, "{").expect("write");
    block_on(async {
        let bed = host.bed();
        recovery::disks(&bed.lifecycle).await;
        let failure = bed.ask(Request::Groups { name: Some(name()) }).await;
        assert_eq!(failure.expect_err("not there").code, Code::NotFound);
        bed.replaced(0, kill).await;
        assert_eq!(pace(&bed, 0), 1 << 20);
        // Once it is there again, its disks have their parts.
        let group = set_group(&bed, bytes(ALL)).await.expect("a group");
        assert_eq!(group.members.len(), 2);
        has(&bed, 0, 45).await;
        end(&bed).await;
    });
}
