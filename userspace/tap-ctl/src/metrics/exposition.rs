// SPDX-License-Identifier: MIT OR Apache-2.0
//! The text format of Prometheus, version 0.0.4.

use super::MetricFamily;
use control::stats::{Histogram, CLASSES};
use std::fmt::Write;

/// Labels of a sample.
#[derive(Clone, Debug, Default)]
pub(super) struct Labels(String);

impl Labels {
    /// Adds a label; without a value nothing, because an empty label equals an absent one.
    pub(super) fn with(mut self, name: &str, value: Option<String>) -> Labels {
        let Some(value) = value else {
            return self;
        };
        if !self.0.is_empty() {
            self.0.push(',');
        }
        let escaped = value
            .replace('\\', "\\\\")
            .replace('"', "\\\"")
            .replace('\n', "\\n");
        // Writing to a string cannot fail.
        let _ = write!(self.0, "{name}=\"{escaped}\"");
        self
    }
}

/// A text with families of samples.
#[derive(Debug, Default)]
pub(super) struct Text {
    text: String,
    /// Lines before the first sample of a family; a family without samples is left out.
    heading: String,
    name: &'static str,
}

impl Text {
    /// Samples of this family follow.
    pub(super) fn family(&mut self, (name, kind, what): MetricFamily) {
        self.name = name;
        self.heading = format!("# HELP {name} {what}\n# TYPE {name} {kind}\n");
    }

    /// A sample of the family.
    pub(super) fn sample(&mut self, labels: &Labels, value: f64) {
        self.line("", labels, value);
    }

    /// A histogram of the family: how many were below each bound, in seconds.
    pub(super) fn histogram(&mut self, labels: &Labels, histogram: &Histogram) {
        let mut below = 0;
        for class in 0..CLASSES {
            below += histogram.counts[class];
            // Classes are powers of two of nanoseconds: those below 4 us are added up, and the last one has no bound.
            if (11..CLASSES - 1).contains(&class) {
                let bound = (2u64 << class) as f64 / 1e9;
                let labels = labels.clone().with("le", Some(bound.to_string()));
                self.line("_bucket", &labels, below as f64);
            }
        }
        let all = labels.clone().with("le", Some("+Inf".into()));
        self.line("_bucket", &all, below as f64);
        self.line("_count", labels, below as f64);
    }

    fn line(&mut self, ending: &str, labels: &Labels, value: f64) {
        self.text.push_str(&std::mem::take(&mut self.heading));
        let labels = match labels.0.as_str() {
            "" => String::new(),
            labels => format!("{{{labels}}}"),
        };
        let _ = writeln!(self.text, "{}{ending}{labels} {value}", self.name);
    }

    /// The whole text.
    pub(super) fn done(self) -> String {
        self.text
    }
}
