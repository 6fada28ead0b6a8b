// SPDX-License-Identifier: MIT OR Apache-2.0
//! The control groups of guests.

use super::bed::{block_on, test, until, Bed, Succession};
use blktapctrl::groups::Groups;
use blktapctrl::watch;
use std::fs;
use std::path::Path;
use std::rc::Rc;

/// Has a supervisor look at xenstore, and give guests groups.
fn follow(bed: &Bed) {
    let template = bed.dir.join("cgroup/guest-%d");
    let template = template.to_str().expect("text").parse().expect("a place");
    let groups = Groups::seen_in(template, &bed.dir.join("proc"));
    bed.lifecycle.use_groups(groups);
    let lifecycle = bed.lifecycle.clone();
    let store: Rc<dyn blktapctrl::store::Store> = Rc::new(bed.store.clone());
    tokio::task::spawn_local(async move { watch::follow(&lifecycle, store).await });
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
