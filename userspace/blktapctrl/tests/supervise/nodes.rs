// SPDX-License-Identifier: MIT OR Apache-2.0
//! Nodes that the kernel does not let go, does not know from us, or tells something about.

use super::bed::{end, kill, test, which};
use blktapctrl::kernel::{Kernel, Make};
use control::supervisor::{Poison, Reply, Request, What};
use control::Code;
use rustix::process::Signal;

/// No other disk gets the image, and the disk is not gone, while a write of its process may still come.
#[test]
fn a_disk_whose_io_is_not_over_is_not_gone() {
    test("fenced", |bed| async move {
        bed.image("a.img", "A");
        let minor = bed.made(bed.create("a.img")).await;
        let fencing = |on| {
            let mut nodes = bed.kernel.nodes.borrow_mut();
            nodes.get_mut(&minor).expect("the node").fencing = on;
        };
        fencing(true);
        let destroy = || Request::Destroy {
            which: which(minor),
            timeout_s: 1,
            of: None,
        };
        let failure = bed.ask(destroy()).await.expect_err("it is fenced");
        assert_eq!(failure.code, Code::Busy);
        let says = |part: &str| assert!(failure.message.contains(part), "{failure}");
        says("I/O of its last process");
        says("a.img");
        assert_eq!(bed.rows().await.len(), 1, "it is still shown");
        let create = Request::Create(Box::new(bed.create("a.img")));
        assert_eq!(bed.ask(create).await.expect_err("in use").code, Code::Busy);
        fencing(false);
        assert_eq!(bed.ask(destroy()).await, Ok(Reply::Done));
        bed.assert_nothing_left().await;
        let again = bed.made(bed.create("a.img")).await;
        bed.destroy(again).await;
    });
}

#[test]
fn a_node_of_somebody_else_can_be_freed() {
    test("unknown", |bed| async move {
        let free = |minor| Request::Free { minor };
        let failure = bed.ask(free(5)).await.expect_err("there is none");
        assert_eq!(failure.code, Code::NotFound);
        let minor = bed.kernel.create(Make::default()).expect("a node");
        let bind = |to| {
            let mut nodes = bed.kernel.nodes.borrow_mut();
            nodes.get_mut(&minor).expect("the node").bound = to;
        };
        bind(Some((3, 51712)));
        let failure = bed.ask(free(minor)).await.expect_err("a guest has it");
        assert_eq!(failure.code, Code::Busy);
        assert!(
            failure.message.contains("xl block-detach 3 51712"),
            "{failure}"
        );
        bind(None);
        assert_eq!(bed.rows().await.len(), 1);
        assert_eq!(bed.ask(free(minor)).await, Ok(Reply::Done));
        bed.assert_nothing_left().await;
    });
}

/// A killed process did not die of a request; a crashed one may have.
#[test]
fn deaths_by_the_hand_of_others_are_excused() {
    test("excused", |bed| async move {
        bed.image("a.img", "A");
        let minor = bed.made(bed.create("a.img")).await;
        assert_eq!(
            bed.kernel.excused.get(),
            1,
            "before the first there is none"
        );
        bed.replaced(minor, kill).await;
        assert_eq!(bed.kernel.excused.get(), 2);
        bed.replaced(minor, |pid| end(pid, Signal::ABORT)).await;
        assert_eq!(bed.kernel.excused.get(), 2);
        bed.replaced(minor, |pid| end(pid, Signal::TERM)).await;
        assert_eq!(bed.kernel.excused.get(), 3);
    });
}

#[test]
fn a_request_of_which_processes_died_is_reported_once() {
    test("poison", |bed| async move {
        bed.image("a.img", "A");
        let minor = bed.made(bed.create("a.img")).await;
        let make = bed.kernel.nodes.borrow()[&minor].make;
        assert_eq!(make.max_deaths, 3);
        let crash = |pid| {
            bed.kernel
                .nodes
                .borrow_mut()
                .get_mut(&minor)
                .expect("the node")
                .poisoned = 1;
            end(pid, Signal::ABORT);
        };
        bed.replaced(minor, crash).await;
        bed.replaced(minor, crash).await;
        let told: Vec<What> = bed
            .events()
            .into_iter()
            .filter(|what| matches!(what, What::Poisoned { .. }))
            .collect();
        let request = Some(Poison {
            operation: "write".into(),
            sector: 4711,
            sectors: 8,
        });
        assert_eq!(told, [What::Poisoned { request, count: 1 }]);
    });
}
