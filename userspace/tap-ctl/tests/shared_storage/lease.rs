// SPDX-License-Identifier: MIT OR Apache-2.0
//! Holders of an image of Ceph, and how a dead host's client is fenced and its lock broken.

use crate::host::{HostFolder, SharedCluster};
use jsonpages::JsonPages;
use std::process::Output;

const TARGET: &str = "id=xen,rbd:vms/web";

fn beds() -> (SharedCluster, HostFolder, HostFolder) {
    let cluster = SharedCluster::new();
    let [alpha, beta] = ["alpha", "beta"].map(|name| cluster.host(name));
    for host in [&alpha, &beta] {
        host.guest(3, "web", "uuid-web");
    }
    (cluster, alpha, beta)
}

fn show(host: &HostFolder) -> String {
    let said = host.tap_ctl(&["lease", "show", TARGET]);
    assert!(said.status.success(), "{said:?}");
    String::from_utf8_lossy(&said.stdout).into_owned()
}

fn break_off(host: &HostFolder, client: &str) -> Output {
    host.tap_ctl(&["lease", "break", TARGET, "--holder-is-dead", client])
}

/// Returns the reason of a failure with this status.
fn refused(said: &Output, status: i32) -> String {
    assert_eq!(said.status.code(), Some(status), "{said:?}");
    String::from_utf8_lossy(&said.stderr).into_owned()
}

#[test]
fn client_is_shown_fenced_and_then_its_lock_is_gone() {
    let (cluster, alpha, beta) = beds();
    assert_eq!(show(&beta), "state=free\n");
    alpha.attach(&alpha.disk(3, 51712, "rbd:vms/web", "w"));
    let line = "client=101 address=alpha:0/101 lock=yes";
    // Metadata that another client has written has taken the lock for a moment.
    assert!(show(&beta).starts_with("state=held client=101 address=alpha:0/101"));
    cluster.write("images/vms/web/lock", "101 shared\n");
    cluster.write("images/vms/web/lock.address", "alpha:0/101\n");
    assert_eq!(show(&beta), format!("state=held {line}\n"));
    let why = refused(&break_off(&beta, "7"), 3);
    assert!(why.contains("the client 101 at alpha:0/101"), "{why}");
    assert_eq!(cluster.read("blocklist"), "");
    let broken = break_off(&beta, "101");
    assert!(broken.status.success(), "{broken:?}");
    assert_eq!(
        String::from_utf8_lossy(&broken.stdout),
        format!("state=free was={line}\n")
    );
    assert_eq!(cluster.read("blocklist"), "alpha:0/101 2592000");
    assert_eq!(cluster.read("images/vms/web/lock"), "");
    let calls = beta.calls();
    let place = |words: &str| {
        calls
            .find(words)
            .unwrap_or_else(|| panic!("{words}: {calls}"))
    };
    // A lock that is broken before the client is fenced lets that write beside the next one.
    assert!(place("ceph --id xen osd blocklist add") < place("lock rm vms/web"));
    assert_eq!(show(&beta), "state=free\n");
    beta.attach(&beta.disk(3, 51712, "rbd:vms/web", "w"));
}

#[test]
fn lock_that_a_dead_client_has_left_is_broken_as_well() {
    let (cluster, _alpha, beta) = beds();
    cluster.write("images/vms/web/lock", "55 shared\n");
    cluster.write("images/vms/web/lock.address", "alpha:0/55\n");
    let line = "client=55 address=alpha:0/55 lock=yes";
    assert_eq!(show(&beta), format!("state=free last-{line}\n"));
    let broken = break_off(&beta, "55");
    assert!(broken.status.success(), "{broken:?}");
    assert_eq!(cluster.read("blocklist"), "alpha:0/55 2592000");
    assert_eq!(show(&beta), "state=free\n");
    let why = refused(&break_off(&beta, "55"), 4);
    assert!(why.contains("no client has rbd:vms/web"), "{why}");
}

#[test]
fn client_that_cannot_be_fenced_keeps_its_lock() {
    let (cluster, alpha, beta) = beds();
    alpha.attach(&alpha.disk(3, 51712, "rbd:vms/web", "w"));
    cluster.write("images/vms/web/lock", "101 shared\n");
    beta.fail("ceph", 13, "Error EACCES: access denied");
    let why = refused(&break_off(&beta, "101"), 6);
    assert!(
        why.contains("osd blocklist of rbd:vms/web failed: Error EACCES"),
        "{why}"
    );
    assert_eq!(cluster.read("images/vms/web/lock"), "101 shared");
    assert_eq!(cluster.watchers("vms/web").len(), 1);
}

#[test]
fn what_the_cluster_refuses_is_named() {
    let (_cluster, _alpha, beta) = beds();
    let none = "rbd: error opening image web: (2) No such file or directory";
    let key = "monclient(hunting): handle_auth_bad_method server allowed_methods [2] but i only support [2]\nrbd: couldn't connect to the cluster!";
    for (status, complaint, exit, words) in [
        (2, none, 4, "error opening image web"),
        (13, key, 6, "handle_auth_bad_method"),
        (13, key, 6, "id=, keyring="),
        (5, "rbd: something else", 6, "rbd status"),
    ] {
        beta.fail("status", status, complaint);
        let why = refused(&beta.tap_ctl(&["lease", "show", TARGET]), exit);
        assert!(why.contains(words), "{why}");
    }
    let why = refused(&beta.tap_ctl(&["lease", "show", "rbd:vms/web@daily"]), 2);
    assert!(why.contains("is a snapshot"), "{why}");
}

#[test]
fn holders_are_printed_for_programs_as_on_the_pages() {
    let (cluster, alpha, beta) = beds();
    let pages = JsonPages::of_checkout();
    let run = |verb: &str, words: &[&str]| {
        let said = beta.tap_ctl(&[&["lease", verb, TARGET, "--json"], words].concat());
        assert!(said.status.success(), "{said:?}");
        let printed = String::from_utf8_lossy(&said.stdout).into_owned();
        pages.assert_documented(&format!("tap-ctl lease {verb}"), &printed);
        printed
    };
    assert!(run("show", &[]).contains("\"last\":null"));
    alpha.attach(&alpha.disk(3, 51712, "rbd:vms/web", "w"));
    cluster.write("images/vms/web/lock", "101 shared\n");
    cluster.write("images/vms/web/lock.address", "alpha:0/101\n");
    assert!(run("show", &[]).contains("\"client\":101"));
    assert!(run("break", &["--holder-is-dead", "101"]).contains("\"was\":{"));
}
