// SPDX-License-Identifier: MIT OR Apache-2.0
//! The layout of the dashboard, and what its panels show.

use serde_json::{json, Value};
use std::collections::{BTreeMap, BTreeSet};

const DASHBOARD: &str = include_str!("../../../../ci/packaging/xentap-dashboard.json");
const METRICS: &str = include_str!("../../../../docs/reference/metrics.md");

/// Columns of Grafana's grid.
const COLUMNS: u64 = 24;

/// Endings of the series of a histogram.
const ENDINGS: [&str; 3] = ["_bucket", "_sum", "_count"];

fn dashboard() -> Value {
    serde_json::from_str(DASHBOARD).expect("it is JSON")
}

/// Returns what is wrong with the panels.
fn complaints(dashboard: &Value) -> Vec<String> {
    let panels = dashboard["panels"].as_array().expect("panels");
    let mut complaints = layout(panels);
    let mut titles = BTreeSet::new();
    for panel in panels {
        let title = panel["title"].as_str().unwrap_or_default();
        if title.is_empty() || !titles.insert(title) {
            complaints.push(format!("{title}: no title of its own"));
        }
        if panel["type"] != "row" {
            complaints.extend(
                content(panel)
                    .into_iter()
                    .map(|what| format!("{title}: {what}")),
            );
        }
    }
    complaints
}

/// Returns the cells of the grid that no panel or several panels have.
fn layout(panels: &[Value]) -> Vec<String> {
    let mut cells: BTreeMap<(u64, u64), u64> = BTreeMap::new();
    let mut complaints = Vec::new();
    for panel in panels {
        let at = |key: &str| panel["gridPos"][key].as_u64().unwrap_or_default();
        let (x, y, width, height) = (at("x"), at("y"), at("w"), at("h"));
        if width == 0 || height == 0 || x + width > COLUMNS {
            complaints.push(format!("{}: no place in the grid", panel["title"]));
        }
        for cell in (y..y + height).flat_map(|y| (x..x + width).map(move |x| (y, x))) {
            *cells.entry(cell).or_default() += 1;
        }
    }
    let rows = cells.keys().map(|(y, _)| y + 1).max().unwrap_or_default();
    for y in 0..rows {
        let of_row = (0..COLUMNS).map(|x| cells.get(&(y, x)).copied().unwrap_or_default());
        let counts: BTreeSet<u64> = of_row.collect();
        if counts != BTreeSet::from([1]) {
            complaints.push(format!(
                "grid row {y}: cells have {counts:?} panels, not one"
            ));
        }
    }
    complaints
}

/// Returns what is wrong within a panel.
fn content(panel: &Value) -> Vec<String> {
    let mut complaints = Vec::new();
    let unit = panel["fieldConfig"]["defaults"]["unit"].as_str();
    if unit.unwrap_or_default().is_empty() {
        complaints.push("no unit".into());
    }
    let targets = panel["targets"].as_array().map_or(&[][..], Vec::as_slice);
    let expressions: Vec<&str> = targets
        .iter()
        .filter_map(|it| it["expr"].as_str())
        .collect();
    if expressions.iter().all(|expression| expression.is_empty()) {
        complaints.push("nothing is shown".into());
    }
    for expression in &expressions {
        complaints.extend(unknown_metrics(expression));
    }
    if panel["type"] == "table" {
        complaints.extend(order(panel, &expressions));
    }
    complaints
}

/// Returns the metrics of this project that the reference does not have.
fn unknown_metrics(expression: &str) -> Vec<String> {
    let is_part = |byte: char| byte.is_ascii_alphanumeric() || byte == '_';
    let words = expression.split(move |byte| !is_part(byte));
    let metrics = words.filter(|word| word.starts_with("xen_"));
    let is_known = |metric: &str| {
        let endings = ENDINGS
            .iter()
            .filter_map(|ending| metric.strip_suffix(ending));
        let mut names = std::iter::once(metric).chain(endings);
        names.any(|name| METRICS.contains(&format!("| `{name}` |")))
    };
    let unknown = metrics.filter(|metric| !is_known(metric));
    unknown
        .map(|metric| format!("{metric} is no metric"))
        .collect()
}

/// A table that shows a figure has the worst disks: it is sorted by that, downwards, and of so many rows at most, or only
/// of disks with a bad verdict.
fn order(panel: &Value, expressions: &[&str]) -> Vec<String> {
    let transformations = panel["transformations"]
        .as_array()
        .map_or(&[][..], Vec::as_slice);
    let organized = transformations.iter().find(|it| it["id"] == "organize");
    let options = organized.map_or(&Value::Null, |it| &it["options"]);
    if options["excludeByName"]["Value"] == true {
        return Vec::new();
    }
    let figure = options["renameByName"]["Value"].as_str().unwrap_or("Value");
    let wanted = json!([{ "displayName": figure, "desc": true }]);
    let mut complaints = Vec::new();
    if panel["options"]["sortBy"] != wanted {
        complaints.push(format!("not sorted by {figure} with the worst first"));
    }
    let is_limited = |expression: &&str| {
        expression.starts_with("topk($top, ") || expression.contains("verdict!~\"ok|")
    };
    if !expressions.iter().all(is_limited) {
        complaints.push("a row for each disk of all hosts: use topk".into());
    }
    complaints
}

#[test]
fn the_dashboard_is_laid_out_without_a_fault() {
    assert_eq!(complaints(&dashboard()), [""; 0]);
}

/// Returns the complaints about the dashboard with a fault in the first panel of a kind with this title.
fn planted(title: &str, pointer: &str, value: Value) -> String {
    let mut dashboard = dashboard();
    let panels = dashboard["panels"].as_array_mut().expect("panels");
    let mut titled = panels.iter_mut().filter(|panel| panel["title"] == title);
    let panel = titled.next().expect("the panel");
    let place = panel.pointer_mut(pointer);
    *place.unwrap_or_else(|| panic!("{title}: {pointer}")) = value;
    complaints(&dashboard).join("\n")
}

#[test]
fn planted_faults_of_the_dashboard_are_found() {
    let table = "Busiest disks";
    let unknown = ["xen", "disk", "planted"].join("_");
    for (title, pointer, value, complaint) in [
        (
            "Well",
            "/gridPos/x",
            json!(7),
            "grid row 1: cells have {0, 1, 2} panels",
        ),
        (
            "Well",
            "/gridPos/w",
            json!(0),
            "Well\": no place in the grid",
        ),
        (
            "Files not read",
            "/gridPos/w",
            json!(5),
            "no place in the grid",
        ),
        ("Well", "/title", json!(""), "no title of its own"),
        (
            "Well",
            "/title",
            json!("Verdict"),
            "Verdict: no title of its own",
        ),
        (
            "Well",
            "/fieldConfig/defaults/unit",
            json!(""),
            "Well: no unit",
        ),
        ("Well", "/targets", json!([]), "Well: nothing is shown"),
        (
            "Well",
            "/targets/0/expr",
            json!(&unknown),
            "_planted is no metric",
        ),
        (
            "Well",
            "/targets/0/expr",
            json!(format!("sum({unknown})")),
            "_planted is no metric",
        ),
        (
            table,
            "/options/sortBy/0/desc",
            json!(false),
            "not sorted by Bytes a second",
        ),
        (
            table,
            "/options/sortBy/0/displayName",
            json!("Guest"),
            "not sorted by",
        ),
        (
            table,
            "/targets/0/expr",
            json!("xen_disk_severity"),
            "use topk",
        ),
        (
            "Who serves",
            "/transformations/0/options/excludeByName/Value",
            json!(false),
            "not sorted",
        ),
    ] {
        let found = planted(title, pointer, value);
        assert!(found.contains(complaint), "{title}{pointer}: {found}");
    }
}
