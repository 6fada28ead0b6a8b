// SPDX-License-Identifier: MIT OR Apache-2.0
//! The control groups of guests.

use super::bed::{test, until};
use blktapctrl::groups::Groups;
use blktapctrl::watch;
use std::fs;
use std::rc::Rc;

#[test]
fn who_does_the_io_of_a_guest_is_in_its_group_as_long_as_it_has_disks() {
    test("groups", |bed| async move {
        let (proc, tree) = (bed.dir.join("proc"), bed.dir.join("cgroup"));
        fs::create_dir_all(proc.join("70")).expect("a folder");
        fs::create_dir_all(&tree).expect("a folder");
        // A thread of the kernel, whose phy disk was there before the supervisor.
        fs::write(proc.join("70/stat"), "70 (4.xvda-0) S 2 0 0 0 -1 2129984 0").expect("a file");
        bed.store.put("backend/vbd/4/51712", &[("state", "4")]);
        let template = tree.join("guest-%d");
        let template = template.to_str().expect("text").parse().expect("a place");
        bed.lifecycle.use_groups(Groups::seen_in(template, &proc));
        let lifecycle = bed.lifecycle.clone();
        let store: Rc<dyn blktapctrl::store::Store> = Rc::new(bed.store.clone());
        tokio::task::spawn_local(async move { watch::follow(&lifecycle, store).await });
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
