// SPDX-License-Identifier: MIT OR Apache-2.0
//! The control groups of guests.

use super::bed::{block_on, kill, test, until, Bed, Succession};
use super::handoff::{handed, new_program, request};
use blktapctrl::groups::Groups;
use blktapctrl::recovery;
use blktapctrl::watch;
use std::fs;
use std::path::Path;
use std::rc::Rc;

/// Has a supervisor look at xenstore, and give guests groups.
fn follow(bed: &Bed) {
    follow_with(bed, Some("cgroup"));
}

/// Follows the guests' groups in this folder, or none. True if it knows of any.
fn follow_with(bed: &Bed, tree: Option<&str>) -> bool {
    let template = tree.map(|tree| {
        let template = bed.dir.join(tree).join("guest-%d");
        template.to_str().expect("text").parse().expect("a place")
    });
    let file = bed.registry().folder.cgroups();
    let processes = bed.dir.join("proc");
    fs::create_dir_all(&processes).expect("a folder");
    let groups = Groups::seen_in(template, &file, &processes);
    let has_groups = groups.is_some();
    if let Some(groups) = groups {
        bed.lifecycle.use_groups(groups);
    }
    let lifecycle = bed.lifecycle.clone();
    let store: Rc<dyn blktapctrl::store::Store> = Rc::new(bed.store.clone());
    // Disks can be made before that has come to it.
    bed.registry().use_store(Some(store.clone()));
    tokio::task::spawn_local(async move { watch::follow(&lifecycle, store).await });
    has_groups
}

/// A disk of a guest that is served.
async fn served(bed: &Bed, domain: u32, image: &str) -> u32 {
    let directory = format!("backend/vbd/{domain}/51712");
    bed.image(image, "A");
    let mut create = bed.create(image);
    create.vbd = Some(directory.clone());
    bed.store.put(&directory, &[("frontend", "f")]);
    let minor = bed.made(create).await;
    bed.store.put(&directory, &[("tap-status", "live")]);
    minor
}

async fn pid_of(bed: &Bed, minor: u32) -> String {
    bed.row(minor).await.pid.expect("a process").to_string()
}

/// Waits until the one who was put into a group last is this one.
async fn is_in(group: &Path, pid: &str) {
    let procs = group.join("cgroup.procs");
    until("somebody in a group", || async {
        let last = fs::read_to_string(&procs).ok();
        last.filter(|last| last == pid).map(drop)
    })
    .await;
}

/// The guest ends, and so does its group. A real one has no such files when everybody in it has ended.
async fn ends(bed: &Bed, domain: u32, group: &Path) {
    for file in fs::read_dir(group).expect("the group") {
        fs::remove_file(file.expect("one").path()).expect("a file");
    }
    bed.store.drop(&format!("backend/vbd/{domain}"));
    until("the end of the group", || async {
        (!group.exists()).then_some(())
    })
    .await;
}

/// A thread of the kernel that serves a disk.
fn thread(dir: &Path, pid: u32, name: &str) {
    let folder = dir.join("proc").join(pid.to_string());
    fs::create_dir_all(&folder).expect("a folder");
    let stat = format!("{pid} ({name}) S 2 0 0 0 -1 2129984 0");
    fs::write(folder.join("stat"), stat).expect("a file");
}

#[test]
fn who_does_the_io_of_a_guest_is_in_its_group_as_long_as_it_has_disks() {
    test("groups", |bed| async move {
        let tree = bed.dir.join("cgroup");
        fs::create_dir_all(&tree).expect("a folder");
        // Its phy disk was there before the supervisor.
        thread(&bed.dir, 70, "4.xvda-0");
        bed.store.put("backend/vbd/4/51712", &[("state", "4")]);
        follow(&bed);
        let last_in = |group: &str| {
            let file = tree.join(group).join("cgroup.procs");
            fs::read_to_string(file).ok()
        };
        until("the thread in its group", || async {
            last_in("guest-4").filter(|pid| pid == "70").map(drop)
        })
        .await;
        assert_eq!(last_in("guest-3"), None);

        bed.image("a.img", "A");
        let directory = "backend/vbd/3/51712";
        let mut create = bed.create("a.img");
        create.vbd = Some(directory.into());
        bed.store.put(directory, &[("frontend", "f")]);
        let minor = bed.made(create).await;
        bed.store.put(directory, &[("tap-status", "live")]);
        let first = bed.row(minor).await.pid.expect("a process").to_string();
        until("the process in its group", || async {
            last_in("guest-3").filter(|pid| *pid == first).map(drop)
        })
        .await;

        // A real group has no such file when everybody in it has ended.
        fs::remove_file(tree.join("guest-3/cgroup.procs")).expect("a file");
        bed.store.drop("backend/vbd/3");
        until("the end of the group", || async {
            (!tree.join("guest-3").exists()).then_some(())
        })
        .await;
        assert!(tree.join("guest-4").exists());
    });
}

#[test]
fn group_of_a_guest_outlives_the_supervisor_and_not_the_guest() {
    let host = Succession::new("groups-next");
    let tree = host.dir.join("cgroup");
    fs::create_dir_all(&tree).expect("a folder");
    let guests = [("3.xvda-0", "guest-3", 30), ("4.xvda-0", "guest-4", 40)];
    block_on(async {
        let bed = host.bed();
        for (name, group, pid) in guests {
            thread(&bed.dir, pid, name);
            bed.store.put(
                &format!("backend/vbd/{}/51712", &group[6..]),
                &[("state", "4")],
            );
        }
        follow(&bed);
        for (_, group, _) in guests {
            let tree = &tree;
            until("the group", || async move {
                tree.join(group).join("cgroup.procs").exists().then_some(())
            })
            .await;
        }
    });
    // One of the guests ends while there is no supervisor; a real group has no such files.
    for (_, group, pid) in guests {
        fs::remove_file(tree.join(group).join("cgroup.procs")).expect("a file");
        if group == "guest-3" {
            fs::remove_dir_all(host.dir.join("proc").join(pid.to_string())).expect("a folder");
        }
    }
    block_on(async {
        let bed = host.bed();
        bed.store.put("backend/vbd/4/51712", &[("state", "4")]);
        follow(&bed);
        until("the end of the group that nobody needs", || async {
            (!tree.join("guest-3").exists()).then_some(())
        })
        .await;
        let procs = tree.join("guest-4/cgroup.procs");
        until("the thread in the group that was there", || async {
            procs.exists().then_some(())
        })
        .await;
        fs::remove_file(&procs).expect("a file");
        bed.store.drop("backend/vbd/4");
        until("the end of the other group", || async {
            (!tree.join("guest-4").exists()).then_some(())
        })
        .await;
    });
}

#[test]
fn a_supervisor_with_groups_finds_who_is_served_without() {
    let host = Succession::new("groups-later");
    let tree = host.dir.join("cgroup");
    let (first, second) = (tree.join("guest-3"), tree.join("guest-4"));
    fs::create_dir_all(&tree).expect("a folder");
    let phy = [("state", "4")];
    let (minor, pid) = block_on(async {
        let bed = host.bed();
        thread(&bed.dir, 40, "4.xvda-0");
        bed.store.put("backend/vbd/4/51712", &phy);
        assert!(!follow_with(&bed, None), "there is nowhere to make any");
        let minor = served(&bed, 3, "a.img").await;
        assert!(!first.exists() && !second.exists());
        (minor, pid_of(&bed, minor).await)
    });
    block_on(async {
        let bed = host.bed();
        bed.store
            .put("backend/vbd/3/51712", &[("frontend", "f"), ("state", "4")]);
        bed.store.put("backend/vbd/4/51712", &phy);
        recovery::disks(&bed.lifecycle).await;
        assert!(follow_with(&bed, Some("cgroup")));
        is_in(&first, &pid).await;
        is_in(&second, "40").await;
        assert_eq!(pid_of(&bed, minor).await, pid);
        bed.assert_nobody_died();
        ends(&bed, 3, &first).await;
        ends(&bed, 4, &second).await;
        bed.emptied().await;
        bed.assert_nothing_left().await;
    });
}

/// Limits that an administrator has set stay, whatever the next supervisor's settings are.
#[test]
fn guest_keeps_its_group_under_a_supervisor_that_makes_none() {
    let host = Succession::new("groups-none");
    let tree = host.dir.join("cgroup");
    let (first, second) = (tree.join("guest-3"), tree.join("guest-4"));
    fs::create_dir_all(&tree).expect("a folder");
    let minor = block_on(async {
        let bed = host.bed();
        thread(&bed.dir, 40, "4.xvda-0");
        bed.store.put("backend/vbd/4/51712", &[("state", "4")]);
        follow(&bed);
        let minor = served(&bed, 3, "a.img").await;
        is_in(&first, &pid_of(&bed, minor).await).await;
        is_in(&second, "40").await;
        fs::write(first.join("io.max"), "254:3 rbps=1048576").expect("a limit");
        minor
    });
    block_on(async {
        let bed = host.bed();
        let directory = "backend/vbd/3/51712";
        bed.store.put(directory, &[("frontend", "f")]);
        bed.store.put("backend/vbd/4/51712", &[("state", "4")]);
        recovery::disks(&bed.lifecycle).await;
        assert!(follow_with(&bed, None), "some are left");
        bed.replaced(minor, kill).await;
        bed.store.put(directory, &[("tap-status", "live")]);
        is_in(&first, &pid_of(&bed, minor).await).await;
        // Its frontend connects once more.
        fs::remove_file(second.join("cgroup.procs")).expect("a file");
        bed.store.put("backend/vbd/4/51712", &[("state", "4")]);
        is_in(&second, "40").await;
        let other = served(&bed, 5, "b.img").await;
        thread(&bed.dir, 50, "5.xvda-0");
        bed.store.put("backend/vbd/5/51712", &[("state", "4")]);
        ends(&bed, 4, &second).await;
        assert!(!tree.join("guest-5").exists(), "disk {other} has a group");
        let limit = fs::read_to_string(first.join("io.max"));
        assert_eq!(limit.expect("the limit"), "254:3 rbps=1048576");
        ends(&bed, 3, &first).await;
        bed.store.drop("backend/vbd/5");
        bed.emptied().await;
        bed.assert_nothing_left().await;
    });
    block_on(async {
        let bed = host.bed();
        assert!(!follow_with(&bed, None), "there are none any more");
    });
}

#[test]
fn guest_keeps_its_group_where_it_is_and_new_ones_are_made_elsewhere() {
    let host = Succession::new("groups-elsewhere");
    for tree in ["cgroup", "other"] {
        fs::create_dir_all(host.dir.join(tree)).expect("a folder");
    }
    let (old, new) = (
        host.dir.join("cgroup/guest-3"),
        host.dir.join("other/guest-5"),
    );
    block_on(async {
        let bed = host.bed();
        follow(&bed);
        let minor = served(&bed, 3, "a.img").await;
        is_in(&old, &pid_of(&bed, minor).await).await;
    });
    block_on(async {
        let bed = host.bed();
        bed.store
            .put("backend/vbd/3/51712", &[("frontend", "f"), ("state", "4")]);
        recovery::disks(&bed.lifecycle).await;
        follow_with(&bed, Some("other"));
        let minor = served(&bed, 5, "b.img").await;
        is_in(&new, &pid_of(&bed, minor).await).await;
        assert!(!host.dir.join("other/guest-3").exists());
        ends(&bed, 3, &old).await;
        ends(&bed, 5, &new).await;
        bed.emptied().await;
        // Only where groups are made is one looked for.
        let known = fs::read_to_string(bed.registry().folder.cgroups()).expect("a file");
        assert!(!known.contains("cgroup/"), "{known}");
        bed.assert_nothing_left().await;
    });
}

/// Xenstore says that the disk is served while the process that takes it over is not its process yet, and nothing later.
#[test]
fn process_that_takes_a_disk_over_is_in_the_group_before_it_serves() {
    test("groups-handoff", |bed| async move {
        let group = bed.dir.join("cgroup/guest-3");
        fs::create_dir_all(bed.dir.join("cgroup")).expect("a folder");
        follow(&bed);
        let minor = served(&bed, 3, "a.img").await;
        is_in(&group, &pid_of(&bed, minor).await).await;
        let next = handed(&bed, None).await.to.to_string();
        let last = fs::read_to_string(group.join("cgroup.procs")).expect("a group");
        assert_eq!(last, next);
        bed.assert_nobody_died();
    });
}

#[test]
fn process_that_is_about_to_serve_is_found_by_a_supervisor_with_groups() {
    test("groups-between", |bed| async move {
        fs::create_dir_all(bed.dir.join("cgroup")).expect("a folder");
        bed.image("a.img", "A");
        let mut create = bed.create("a.img");
        create.vbd = Some("backend/vbd/3/51712".into());
        bed.store
            .put("backend/vbd/3/51712", &[("frontend", "f"), ("state", "4")]);
        let store = Rc::new(bed.store.clone());
        bed.registry().use_store(Some(store));
        let minor = bed.made(create).await;
        let program = new_program(&bed.dir, &[("hang", "")]);
        let asked = tokio::task::spawn_local({
            let (bed, ask) = (bed.clone(), request(Some(program), 300));
            async move { bed.ask(ask).await }
        });
        let disk = bed.registry().get(minor).expect("the disk");
        let next = until("a process that has the node", || async {
            let next = disk.successor.borrow().as_ref().map(|next| next.pid());
            next.filter(|_| bed.kernel.nodes.borrow()[&minor].opened == 2)
        })
        .await;
        follow(&bed);
        is_in(&bed.dir.join("cgroup/guest-3"), &next.to_string()).await;
        assert!(!asked.is_finished());
    });
}
