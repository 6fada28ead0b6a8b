// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The results in one small picture: a line for each job, and on it each backend's speed as a multiple
//! of the C driver's.

use super::chart::{begin, text, OURS_COLOUR};
use super::result::{Results, TitledName, OURS};
use std::fmt::Write;

const WIDTH: u32 = 1000;
const LEFT: f64 = 470.0;
const RIGHT: f64 = 960.0;
const TOP: u32 = 128;
const LINE: u32 = 25;
/// End of the axis; larger values are drawn there.
const MOST: f64 = 2.0;

/// The shown backends, with their colours. The first one is the reference, 1.
const SHOWN: [(&str, &str); 5] = [
    ("c", "#2b2d42"),
    ("c-plain", "#8d99ae"),
    ("qdisk", "#e9a23b"),
    ("tap-aio", "#2a9d8f"),
    (OURS, OURS_COLOUR),
];

/// Returns the picture.
pub(crate) fn overview(results: &Results) -> String {
    let reference = SHOWN[0].0;
    let jobs: Vec<&TitledName> = results
        .jobs
        .iter()
        .filter(|job| results.ratio(OURS, reference, &job.name).is_some())
        .collect();
    let height = TOP + LINE * u32::try_from(jobs.len()).unwrap_or(0) + 40;
    let mut svg = begin(WIDTH, height);
    let title = "Speed as a multiple of the C driver's (persistent grants)";
    text(&mut svg, (24, 34), "20", "#222", title);
    let note = "Further right is better. One boot of an emulated machine; time is counted in executed instructions.";
    text(&mut svg, (24, 56), "13", "#666", note);
    legend(&mut svg, results);
    axis(&mut svg, height - 34);
    for (index, job) in jobs.iter().enumerate() {
        let y = TOP + LINE * u32::try_from(index).unwrap_or(0);
        row(&mut svg, results, job, y);
    }
    svg.push_str("</svg>\n");
    svg
}

fn legend(svg: &mut String, results: &Results) {
    let mut x = 24;
    for (name, colour) in SHOWN {
        let Some(backend) = results.backends.iter().find(|backend| backend.name == name) else {
            continue;
        };
        dot(svg, f64::from(x + 6), 78, name, colour);
        text(svg, (x + 18, 82), "13", "#333", &backend.title);
        x += 46 + 6 * u32::try_from(backend.title.len()).unwrap_or(0);
    }
}

fn place(ratio: f64) -> f64 {
    LEFT + ratio.clamp(0.0, MOST) / MOST * (RIGHT - LEFT)
}

fn axis(svg: &mut String, bottom: u32) {
    for quarter in 0..=8_u8 {
        let ratio = f64::from(quarter) / 4.0;
        let x = place(ratio);
        let colour = if quarter == 4 { "#777" } else { "#e4e7ec" };
        let _ = writeln!(
            svg,
            "<path d=\"M{x:.1} {} V{bottom}\" stroke=\"{colour}\"/>",
            TOP - 14
        );
        if quarter % 2 == 0 {
            let _ = writeln!(
                svg,
                "<text x=\"{x:.1}\" y=\"{}\" font-size=\"12\" fill=\"#666\" text-anchor=\"middle\">{ratio} x</text>",
                TOP - 20
            );
        }
    }
}

/// Draws the line of one job, this driver last.
fn row(svg: &mut String, results: &Results, job: &TitledName, y: u32) {
    let middle = y + 8;
    let _ = writeln!(
        svg,
        "<path d=\"M{LEFT} {middle} H{RIGHT}\" stroke=\"#f0f1f4\"/>"
    );
    text(svg, (24, y + 12), "13", "#222", &job.title);
    for (name, colour) in SHOWN {
        let Some(ratio) = results.ratio(name, SHOWN[0].0, &job.name) else {
            continue;
        };
        dot(svg, place(ratio), middle, name, colour);
        if name == OURS {
            let _ = writeln!(
                svg,
                "<text x=\"{:.1}\" y=\"{}\" font-size=\"12\" fill=\"{colour}\" text-anchor=\"end\" font-weight=\"600\">{ratio:.2}</text>",
                LEFT - 10.0,
                y + 12
            );
        }
    }
}

fn dot(svg: &mut String, x: f64, y: u32, name: &str, colour: &str) {
    let radius = if name == OURS { 6.5 } else { 5.0 };
    let _ = writeln!(
        svg,
        "<circle cx=\"{x:.1}\" cy=\"{y}\" r=\"{radius}\" fill=\"{colour}\" stroke=\"#fff\"/>"
    );
}

#[cfg(test)]
mod tests {
    use super::super::result::tests::results;

    #[test]
    fn jobs_without_the_reference_are_left_out() {
        let svg = super::overview(&results(&[("phy", 120.0), ("c", 100.0)]));
        assert!(svg.contains(">1.20</text>"), "{svg}");
        assert_eq!(svg.matches("<circle").count(), 4);
        let svg = super::overview(&results(&[("phy", 120.0)]));
        assert!(!svg.contains(">1.20</text>"), "{svg}");
    }

    #[test]
    fn what_is_beyond_the_axis_stands_at_its_end() {
        assert_eq!(super::place(9.0), super::RIGHT);
        assert_eq!(super::place(1.0), (super::LEFT + super::RIGHT) / 2.0);
    }
}
