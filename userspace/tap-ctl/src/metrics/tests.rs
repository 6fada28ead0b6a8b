// SPDX-License-Identifier: MIT OR Apache-2.0

use super::exposition::{Labels, Text};
use super::{replace, text};
use crate::host::made::{block, phy, Made};
use crate::sample::{gather, HostSample, Supervisor};
use crate::status::verdict::Limits;
use crate::status::{fake, report};
use control::supervisor::{Counted, Group};
use serde_json::Value;
use std::collections::BTreeSet;
use std::time::Duration;

const ALERTS: &str = include_str!("../../../../ci/packaging/xentap-alerts.yml");
const DASHBOARD: &str = include_str!("../../../../ci/packaging/xentap-dashboard.json");

/// A host with a disk of each kind.
fn both() -> HostSample {
    let made = Made::new();
    block(&made, "8:16", "sdb", [100, 2500, 3]);
    phy(&made, "vbd-3-51712", "8:10");
    made.file(
        "/sys/bus/xen-backend/devices/vbd-3-51712/statistics/wr_sect",
        "8\n",
    );
    for (name, text) in [
        ("in_flight", "3"),
        ("oldest_ns", "2500000000"),
        ("wr_done", "4"),
        ("wr_ns", "1000000000"),
        ("page_wait_ns", "500000000"),
        ("pieces", "0"),
        ("passes", "9"),
        ("ring_full", "1"),
        ("ring_slots", "64"),
    ] {
        made.file(
            &format!("/sys/bus/xen-backend/devices/vbd-3-51712/statistics/{name}"),
            text,
        );
    }
    let parameters = "/sys/module/xen_blkback_rs/parameters";
    for (name, text) in [
        ("memory_kib", "4"),
        ("domain_memory_mib", "256"),
        ("host_memory_mib", "9"),
    ] {
        made.file(&format!("{parameters}/{name}"), text);
    }
    made.file("/proc/stat", "cpu 1 1 1 1 1 1 1 1\n");
    let mut look = gather(&made.host(), Vec::new(), Supervisor::Answers);
    let mut tap = fake::tap(0);
    fake::kernel(&mut tap).oldest_ns = 1_500_000_000;
    fake::stats(&mut tap).write.latency.add(1_000_000);
    if let Some(row) = &mut tap.tap {
        row.resident = Some(4096);
    }
    look.disks.push(tap);
    look
}

/// Returns a look at disks where the kernel may serve the tap disk, and the process has had two requests of it.
fn direct() -> HostSample {
    let mut look = both();
    let kernel = fake::kernel(look.disks.last_mut().expect("the tap disk"));
    kernel.backings = 1;
    let mapped = kernel.mapped.get_or_insert_default();
    (mapped.missed.pieces, mapped.evicted) = (2, 5);
    look
}

fn metrics(look: &HostSample) -> String {
    let limits = Limits {
        slow: Duration::from_millis(100),
        hung: Duration::from_secs(5),
    };
    text(look, &report(look, look, limits))
}

#[test]
fn disks_of_both_kinds_are_told() {
    let text = metrics(&both());
    // A value that the driver does not count is not shown as 0.
    assert!(!text.contains(r#"kind="phy",operation="read""#), "{text}");
    for line in [
        r#"xen_disk_written_bytes_total{guest="3",vdev="xvda",kind="phy"} 4096"#,
        r#"xen_disk_storage_seconds_total{guest="3",vdev="xvda",kind="phy"} 2.5"#,
        r#"xen_disk_severity{guest="3",vdev="xvda",kind="phy"} 0"#,
        r#"xen_disk_in_flight{guest="3",vdev="xvda",kind="phy"} 3"#,
        r#"xen_disk_oldest_seconds{guest="3",vdev="xvda",kind="phy"} 2.5"#,
        r#"xen_disk_completed_total{guest="3",vdev="xvda",kind="phy",operation="write"} 4"#,
        r#"xen_disk_time_seconds_total{guest="3",vdev="xvda",kind="phy",operation="write"} 1"#,
        r#"xen_disk_page_wait_seconds_total{guest="3",vdev="xvda",kind="phy"} 0.5"#,
        r#"xen_disk_ring_full_total{guest="3",vdev="xvda",kind="phy"} 1"#,
        r#"xen_disk_ring_slots{guest="3",vdev="xvda",kind="phy"} 64"#,
        r#"xen_disk_verdict{guest="3",vdev="xvdb",kind="tap",minor="0",verdict="ok"} 1"#,
        r#"xen_tap_oldest_seconds{guest="3",vdev="xvdb",kind="tap",minor="0"} 1.5"#,
        r#"xen_tap_request_seconds_bucket{guest="3",vdev="xvdb",kind="tap",minor="0",operation="write",le="0.000524288"} 0"#,
        r#"xen_tap_request_seconds_bucket{guest="3",vdev="xvdb",kind="tap",minor="0",operation="write",le="0.001048576"} 1"#,
        r#"xen_tap_request_seconds_count{guest="3",vdev="xvdb",kind="tap",minor="0",operation="write"} 1"#,
        "xen_disk_memory_limit_bytes 9437184",
        "xen_disk_supervisor_up 1",
    ] {
        assert!(text.lines().any(|its| its == line), "{line}: {text}");
    }
}

#[test]
fn what_the_supervisor_could_not_tell_is_counted_if_it_counts() {
    let mut look = both();
    let names = ["events_lost", "traces_failed", "log_lines_suppressed"];
    let text = metrics(&look);
    for name in names {
        assert!(!text.contains(name), "an older one counts nothing: {text}");
    }
    look.counted = Some(Counted {
        events_lost: 1,
        traces_failed: 2,
        lines_suppressed: 3,
    });
    let text = metrics(&look);
    for (name, count) in names.into_iter().zip(1..) {
        let line = format!("xen_disk_{name}_total {count}");
        assert!(text.lines().any(|its| its == line), "{line}: {text}");
    }
}

#[test]
fn groups_are_told_of_if_there_are_any() {
    let mut look = both();
    assert!(!metrics(&look).contains("xen_disk_group"));
    look.groups = vec![Group {
        name: "all.7".parse().expect("a name"),
        limits: control::Limits {
            bytes: 1 << 20,
            ..control::Limits::default()
        },
        members: Vec::new(),
        bytes: 12,
        requests: 2,
    }];
    let text = metrics(&look);
    for line in [
        r#"xen_disk_group_disks{group="all.7"} 0"#,
        r#"xen_disk_group_limit_bytes_per_second{group="all.7"} 1048576"#,
        r#"xen_disk_group_bytes_total{group="all.7"} 12"#,
    ] {
        assert!(text.lines().any(|its| its == line), "{line}: {text}");
    }
}

/// Returns the names of the printed metrics, without the endings of histograms.
fn names(text: &str) -> BTreeSet<&str> {
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    types.filter_map(|line| line.split(' ').next()).collect()
}

/// Tests that there is nothing that the collector refuses: a repeated family, a sample without or apart from its
/// family, a repeated sample.
#[test]
fn the_text_is_well_formed() {
    let text = metrics(&both());
    let types = text
        .lines()
        .filter(|line| line.starts_with("# TYPE "))
        .count();
    assert_eq!(names(&text).len(), types);
    let (mut family, mut seen) = ("", BTreeSet::new());
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            family = rest.split(' ').next().expect("a name");
            continue;
        }
        if line.starts_with('#') {
            continue;
        }
        let (sample, value) = line.rsplit_once(' ').expect("a value");
        assert!(sample.starts_with(family), "{line}");
        assert!(value.parse::<f64>().is_ok(), "{line}");
        assert!(seen.insert(sample), "{line}");
    }
}

#[test]
fn who_serves_is_told() {
    let served = |look: &HostSample, by: &str| {
        let start = format!(
            r#"xen_disk_served{{guest="3",vdev="xvdb",kind="tap",minor="0",driver="xen-blkback-rs",by="{by}"}} 1"#
        );
        let text = metrics(look);
        assert!(text.lines().any(|line| line == start), "{by}: {text}");
    };
    let mut look = both();
    assert!(metrics(&look).contains(r#"kind="phy",driver="xen-blkback-rs",by="kernel"} 1"#));
    served(&look, "process");
    let tap = look.disks.last_mut().expect("the tap disk");
    fake::kernel(tap).backings = 1;
    served(&look, "kernel and process");
    let tap = look.disks.last_mut().and_then(|disk| disk.tap.as_mut());
    tap.expect("the tap disk").row.pid = None;
    served(&look, "kernel");
    fake::kernel(look.disks.last_mut().expect("the tap disk")).backings = 0;
    served(&look, "nobody");
}

#[test]
fn what_is_left_to_the_process_is_told_by_the_reason() {
    let disk = r#"guest="3",vdev="xvdb",kind="tap",minor="0""#;
    let text = metrics(&direct());
    for line in [
        format!(r#"xen_tap_missed_total{{{disk},reason="pieces"}} 2"#),
        format!(r#"xen_tap_missed_total{{{disk},reason="unmapped"}} 0"#),
        format!("xen_tap_evicted_total{{{disk}}} 5"),
    ] {
        assert!(text.lines().any(|its| its == line), "{line}: {text}");
    }
    assert!(!metrics(&both()).contains("xen_tap_missed_total{"));
}

/// The names of metrics in expressions that are no sample of a host with a disk of each kind.
fn not_told<'a>(expressions: impl Iterator<Item = &'a str>) -> BTreeSet<&'a str> {
    let text = metrics(&direct());
    let is_part = |byte: char| byte.is_ascii_alphanumeric() || byte == '_';
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    let told: BTreeSet<&str> = samples
        .filter_map(|line| line.split(|byte| !is_part(byte)).next())
        .collect();
    let words = expressions.flat_map(|line| line.split(move |byte| !is_part(byte)));
    let used: BTreeSet<&str> = words.filter(|word| word.starts_with("xen_")).collect();
    assert!(used.len() > 3, "{used:?}");
    used.into_iter()
        .filter(|word| !told.contains(word))
        .collect()
}

#[test]
fn alerts_are_about_metrics_that_are_told() {
    let lines = ALERTS.lines();
    let expressions = lines.filter_map(|line| line.trim().strip_prefix("expr: "));
    assert_eq!(not_told(expressions), BTreeSet::new());
}

/// The objects and lists below a value, and itself.
fn below(value: &Value) -> Vec<&Value> {
    let children: Vec<&Value> = match value {
        Value::Array(list) => list.iter().collect(),
        Value::Object(map) => map.values().collect(),
        _ => Vec::new(),
    };
    let deeper = children.into_iter().flat_map(below);
    std::iter::once(value).chain(deeper).collect()
}

#[test]
fn the_dashboard_is_about_metrics_that_are_told() {
    let dashboard: Value = serde_json::from_str(DASHBOARD).expect("it is JSON");
    let all = below(&dashboard);
    // Of panels and notes, and of what can be chosen.
    let expressions = all
        .iter()
        .flat_map(|value| [&value["expr"], &value["query"]]);
    assert_eq!(
        not_told(expressions.filter_map(Value::as_str)),
        BTreeSet::new()
    );
    let text = metrics(&direct());
    for legend in all
        .iter()
        .filter_map(|value| value["legendFormat"].as_str())
    {
        for label in legend.split("{{").skip(1) {
            let label = label.split("}}").next().expect("a part");
            // Prometheus adds the host.
            let is_told = label == "instance" || text.contains(&format!("{label}=\""));
            assert!(is_told, "{label}");
        }
    }
}

/// The dashboard works with whatever Prometheus its reader has, and shows each panel.
#[test]
fn the_dashboard_can_be_imported() {
    let dashboard: Value = serde_json::from_str(DASHBOARD).expect("it is JSON");
    let sources = below(&dashboard);
    for source in sources.iter().filter_map(|value| value.get("datasource")) {
        assert_eq!(source["uid"], "${datasource}");
    }
    let panels = dashboard["panels"].as_array().expect("panels");
    let mut seen = (BTreeSet::new(), BTreeSet::new());
    for panel in panels {
        let at = &panel["gridPos"];
        assert!(seen.0.insert(panel["id"].as_u64()), "{panel}");
        assert!(
            seen.1.insert((at["x"].as_u64(), at["y"].as_u64())),
            "{panel}"
        );
    }
}

#[test]
fn values_of_labels_are_escaped() {
    let mut text = Text::default();
    text.family(("a", "gauge", "What."));
    text.sample(&Labels::default().with("b", Some("c\"\\\n".into())), 1.0);
    text.family(("without", "gauge", "Samples."));
    assert_eq!(
        text.done(),
        "# HELP a What.\n# TYPE a gauge\na{b=\"c\\\"\\\\\\n\"} 1\n"
    );
}

#[test]
fn a_file_is_exchanged_as_a_whole() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("xen.prom");
    for text in ["one", "two"] {
        replace(&path, text).expect("written");
        assert_eq!(std::fs::read_to_string(&path).expect("read"), text);
    }
    assert_eq!(std::fs::read_dir(folder.path()).expect("read").count(), 1);
}

#[test]
fn a_link_where_the_file_is_written_is_not_followed() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("xen.prom");
    let precious = folder.path().join("precious");
    std::fs::write(&precious, "precious").expect("written");
    std::os::unix::fs::symlink(&precious, folder.path().join("xen.prom.new")).expect("a link");
    replace(&path, "one").expect("written");
    let is = |path| std::fs::read_to_string(path).expect("read");
    assert_eq!(
        (is(&precious), is(&path)),
        ("precious".into(), "one".into())
    );
    assert!(!path.is_symlink());
}
