// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The results as a picture: for each job the speed of each backend, and the cost of an I/O by place.

use super::counts::{PlaceOwner, PLACES, TOTAL};
use super::result::{ResultRow, Results, TitledName, CONTROL, IO, OURS};
use std::fmt::Write;

const WIDTH: u32 = 1240;
const LABELS: u32 = 250;
const BARS: u32 = 330;
/// Start of the second column of bars.
const SECOND: u32 = 770;
const LINE: u32 = 22;
const HEAD: u32 = 34;
const TOP: u32 = 118;
pub(super) const OURS_COLOUR: &str = "#d1495b";
const OTHER_COLOUR: &str = "#8d99ae";

/// Returns the head of a picture, with a white background.
pub(super) fn begin(width: u32, height: u32) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" font-family=\"system-ui, sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    )
}

/// Returns the picture.
pub(crate) fn chart(results: &Results) -> String {
    let shown: Vec<_> = results
        .backends
        .iter()
        .filter(|backend| backend.name != CONTROL)
        .collect();
    // Some jobs have no speed, or run only on some backends.
    let jobs: Vec<(&TitledName, Vec<(&str, &ResultRow)>)> = results
        .jobs
        .iter()
        .map(|job| {
            let rows = shown
                .iter()
                .filter_map(|b| Some((b.title.as_str(), results.row(&b.name, &job.name)?)))
                .filter(|(_, row)| row.iops.median > 0.0);
            (job, rows.collect::<Vec<_>>())
        })
        .filter(|(_, rows)| !rows.is_empty())
        .collect();
    let panel = |rows: usize| HEAD + u32::try_from(rows).unwrap_or(0) * LINE + 14;
    let height = TOP + 40 + jobs.iter().map(|(_, rows)| panel(rows.len())).sum::<u32>();
    let mut svg = begin(WIDTH, height);
    text(
        &mut svg,
        (24, 34),
        "22",
        "#222",
        "Disks of a Xen guest, one boot, one null_blk in memory",
    );
    let note = "Time is counted in executed instructions: a second is a thousand million of them. Whiskers: lowest and highest round.";
    text(&mut svg, (24, 56), "13", "#666", note);
    legend(&mut svg);
    let mut y = TOP;
    for (job, rows) in &jobs {
        let title = match job.unit.as_str() {
            IO => job.title.clone(),
            unit => format!("{} (per {unit})", job.title),
        };
        text(&mut svg, (24, y + 20), "15", "#222", &title);
        draw(&mut svg, rows, y + HEAD, results);
        y += panel(rows.len());
    }
    svg.push_str("</svg>\n");
    svg
}

fn legend(svg: &mut String) {
    let mut x = 24;
    text(svg, (x, 82), "12", "#444", "Where instructions are spent:");
    x += 190;
    for place in PLACES
        .iter()
        .filter(|place| place.whose != PlaceOwner::Both)
    {
        let words = place.head;
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"72\" width=\"11\" height=\"11\" fill=\"{}\"><title>{}</title></rect>",
            place.colour, place.name
        );
        text(svg, (x + 16, 82), "12", "#444", words);
        x += 24 + 7 * u32::try_from(words.len()).unwrap_or(0);
    }
    let speed = "per second (more is better)";
    text(svg, (LABELS, 110), "13", "#222", speed);
    let cost = "instructions for each (fewer is better)";
    text(svg, (SECOND, 110), "13", "#222", cost);
}

/// Draws the bars of one job.
fn draw(svg: &mut String, rows: &[(&str, &ResultRow)], top: u32, results: &Results) {
    // dom0's own speed has another scale than a guest's, so its bar may be cut off.
    let best = |of: fn(&ResultRow) -> f64| {
        let guests = rows.iter().filter(|(_, row)| row.backend != "native");
        guests.map(|(_, row)| of(row)).fold(1.0, f64::max)
    };
    let fastest = best(|row| row.iops.high) * 1.05;
    let dearest = best(total) * 1.05;
    for (index, (title, row)) in rows.iter().enumerate() {
        let y = top + LINE * u32::try_from(index).unwrap_or(0);
        let colour = if row.backend.starts_with(OURS) {
            OURS_COLOUR
        } else {
            OTHER_COLOUR
        };
        text(
            svg,
            (24, y + 13),
            "13",
            if row.backend == OURS {
                OURS_COLOUR
            } else {
                "#333"
            },
            title,
        );
        let scale = |value: f64| (value / fastest).min(1.0) * f64::from(BARS);
        let length = scale(row.iops.median);
        let _ = writeln!(svg, "<rect x=\"{LABELS}\" y=\"{y}\" width=\"{length:.1}\" height=\"16\" rx=\"2\" fill=\"{colour}\"/>");
        whisker(svg, y + 8, scale(row.iops.low), scale(row.iops.high));
        let mut label = match row.iops.median {
            few if few < 100.0 => format!("{few:.1}"),
            many => format!("{many:.0}"),
        };
        if row.backend == "native" && row.iops.median > fastest {
            label.push_str(" (cut off)");
        } else if let Some(ratio) = results.ratio(&row.backend, OURS, &row.job) {
            if row.backend != OURS {
                label.push_str(&format!("  ({ratio:.2} x ours)"));
            }
        }
        let after = f64::from(LABELS) + scale(row.iops.high).max(length) + 6.0;
        let _ = writeln!(
            svg,
            "<text x=\"{after:.0}\" y=\"{}\" font-size=\"12\" fill=\"#333\">{label}</text>",
            y + 13
        );
        stack(svg, row, y, dearest);
    }
}

fn whisker(svg: &mut String, y: u32, low: f64, high: f64) {
    if high - low < 1.0 {
        return;
    }
    let (from, to) = (f64::from(LABELS) + low, f64::from(LABELS) + high);
    let _ = writeln!(svg, "<path d=\"M{from:.1} {0} V{1} M{from:.1} {y} H{to:.1} M{to:.1} {0} V{1}\" stroke=\"#222\" fill=\"none\"/>", y - 4, y + 4);
}

/// Draws the cost of an I/O, by place.
fn stack(svg: &mut String, row: &ResultRow, y: u32, dearest: f64) {
    let mut x = f64::from(SECOND);
    let end = f64::from(SECOND + BARS);
    for place in PLACES {
        let (name, colour) = (place.name, place.colour);
        let value = row
            .instructions
            .get(name)
            .map_or(0.0, |figure| figure.median.max(0.0));
        let width = (value / dearest * f64::from(BARS)).min(end - x);
        if width >= 0.3 {
            let _ = writeln!(svg, "<rect x=\"{x:.1}\" y=\"{y}\" width=\"{width:.1}\" height=\"16\" fill=\"{colour}\"><title>{name}: {value:.0}</title></rect>");
        }
        x += width;
    }
    let _ = writeln!(
        svg,
        "<text x=\"{:.0}\" y=\"{}\" font-size=\"12\" fill=\"#333\">{:.1} k</text>",
        x + 6.0,
        y + 13,
        total(row) / 1000.0
    );
}

fn total(row: &ResultRow) -> f64 {
    row.instructions
        .get(TOTAL)
        .map_or(0.0, |figure| figure.median)
}

/// Writes words at a place.
pub(super) fn text(svg: &mut String, at: (u32, u32), size: &str, colour: &str, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(
        svg,
        "<text x=\"{}\" y=\"{}\" font-size=\"{size}\" fill=\"{colour}\">{words}</text>",
        at.0, at.1
    );
}

#[cfg(test)]
mod tests {
    use super::super::result::tests::results;

    #[test]
    fn picture_has_every_backend_and_no_bare_ampersand() {
        let svg = super::chart(&results(&[("phy", 120.0), ("c", 100.0)]));
        assert!(
            svg.contains("the phy &amp; more") && svg.contains("the c &amp; more"),
            "{svg}"
        );
        assert!(svg.contains("0.83 x ours"), "{svg}");
        assert_eq!(svg.matches("<svg").count(), svg.matches("</svg>").count());
    }
}
