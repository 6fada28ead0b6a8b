// SPDX-License-Identifier: MIT OR Apache-2.0
//! A part of a trace, and whether all of it is there.

use control::{Code, Failure};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use trace::{Operation, Trace, TraceEntry, TraceRecord, TraceSegment, What, BLOCK};

/// A place in a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Point {
    /// The request of this number.
    Number(u64),
    /// Nanoseconds since the beginning of the trace.
    Time(u64),
}

impl Point {
    const UNITS: [(&'static str, u64); 4] = [
        ("ns", 1),
        ("us", 1_000),
        ("ms", 1_000_000),
        ("s", 1_000_000_000),
    ];

    /// Returns true if the record is the bound of the window, or behind it.
    fn is_reached(self, record: &TraceRecord) -> bool {
        match self {
            Self::Number(number) => record.number >= number,
            Self::Time(ns) => record.time_ns >= ns,
        }
    }

    fn is_passed(self, record: &TraceRecord) -> bool {
        match self {
            Self::Number(number) => record.number > number,
            Self::Time(ns) => record.time_ns > ns,
        }
    }
}

impl FromStr for Point {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            String::from(
                "write the number of a request, such as 120, or a time since the trace began with its unit, such as 1500ms \
                 or 2s",
            )
        };
        let number = |digits: &str| digits.parse::<u64>().map_err(|_| wrong());
        let mut units = Self::UNITS.iter();
        let timed = units.find_map(|(unit, ns)| Some((text.strip_suffix(unit)?, ns)));
        match timed {
            Some((digits, ns)) => {
                let time = number(digits)?.checked_mul(*ns);
                time.map(Self::Time).ok_or_else(wrong)
            }
            None => number(text).map(Self::Number),
        }
    }
}

/// Result of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReplayOutcome {
    /// The request was executed.
    Done,
    /// The request failed with this error.
    Failed(u32),
    /// Unknown: it may or may not have been carried out.
    Unknown,
}

impl fmt::Display for ReplayOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done => f.write_str("ok"),
            Self::Failed(errno) => write!(f, "error-{errno}"),
            Self::Unknown => f.write_str("unknown"),
        }
    }
}

/// A part of a trace.
pub(super) struct Window {
    path: PathBuf,
    pub(super) trace: Trace,
    from: Option<Point>,
    to: Option<Point>,
    /// Numbers of the first and the last request that the trace has.
    pub(super) has: Option<(u64, u64)>,
    /// First and last request that this part has.
    pub(super) holds: Option<(u64, u64)>,
    failed: BTreeMap<u64, u32>,
    unknown: BTreeSet<u64>,
}

impl Window {
    /// Looks at all of a trace.
    pub(super) fn open(
        path: &Path,
        from: Option<Point>,
        to: Option<Point>,
    ) -> Result<Window, Failure> {
        let file = File::open(path).map_err(|error| {
            Failure::system(format!("cannot open the trace {}", path.display()), &error)
        })?;
        let trace = Trace::open(file).map_err(|failure| said(path, failure))?;
        let mut window = Window {
            path: path.into(),
            trace,
            from,
            to,
            has: None,
            holds: None,
            failed: BTreeMap::new(),
            unknown: BTreeSet::new(),
        };
        for number in window.trace.segments().to_vec() {
            let segment = window.trace.segment(number);
            let segment = segment.map_err(|failure| said(path, failure))?;
            for record in segment.iter().flat_map(TraceSegment::records) {
                window.add(record);
            }
        }
        Ok(window)
    }

    fn add(&mut self, record: &TraceRecord) {
        let number = record.number;
        match record.what {
            What::Request(_) => {
                self.unknown.insert(number);
                let first = self.has.map_or(number, |(first, _)| first);
                self.has = Some((first, number));
                if self.holds(record) {
                    let first = self.holds.map_or(number, |(first, _)| first);
                    self.holds = Some((first, number));
                }
            }
            What::Done { errno } => {
                self.unknown.remove(&number);
                if errno != 0 {
                    self.failed.insert(number, errno);
                }
            }
            What::Segment | What::Opened { .. } => {}
        }
    }

    /// The request is in this part.
    pub(super) fn holds(&self, record: &TraceRecord) -> bool {
        self.from.is_none_or(|from| from.is_reached(record))
            && !self.to.is_some_and(|to| to.is_passed(record))
    }

    /// Returns the result of a request.
    pub(super) fn outcome(&self, number: u64) -> ReplayOutcome {
        match self.failed.get(&number) {
            Some(errno) => ReplayOutcome::Failed(*errno),
            None if self.unknown.contains(&number) => ReplayOutcome::Unknown,
            None => ReplayOutcome::Done,
        }
    }

    /// A segment of the trace, which must not be overwritten meanwhile.
    pub(super) fn segment(&self, number: u64) -> Result<TraceSegment, Failure> {
        let found = self.trace.segment(number);
        let found = found.map_err(|failure| said(&self.path, failure))?;
        found.ok_or_else(|| {
            self.refused(
                "it is being overwritten: copy it first, or end it: `tap-ctl trace MINOR --end`",
            )
        })
    }

    fn refused(&self, why: impl fmt::Display) -> Failure {
        said(&self.path, Failure::new(Code::Image, why.to_string()))
    }

    /// All that was done is there, to do it again to a disk of so many bytes.
    pub(super) fn check(&self, size: u64) -> Result<(), Failure> {
        let Some((first, last)) = self.has else {
            return Err(self.refused("no request is in this trace"));
        };
        if !self.trace.header().data {
            return Err(self.refused(
                "no request has its data: only a trace with data can be replayed: begin one with `tap-ctl trace MINOR --output FILE --data`",
            ));
        }
        let is_late = match self.from {
            Some(Point::Number(number)) => number < first,
            // The time of the last overwritten request is unknown.
            None | Some(Point::Time(_)) => self.holds.is_none_or(|(held, _)| held == first),
        };
        if first > 1 && is_late {
            return Err(self.refused(format!(
                "requests before {first} are overwritten, and {first} to {last} have their data: replay --from a later \
                 number onto an image as it was then, or give the next trace a larger --size"
            )));
        }
        if self.holds.is_none() {
            return Err(self.refused(format!(
                "it has requests {first} to {last}, and none of them is in this window"
            )));
        }
        let mut before = None;
        for number in self.trace.segments() {
            for record in self.segment(*number)?.records() {
                if let (What::Request(entry), true) = (record.what, self.holds(record)) {
                    self.check_one(size, record, &entry, before)?;
                    before = Some(record.number);
                }
            }
        }
        Ok(())
    }

    /// A request can be done again; `before` is the number of the one before in this window.
    fn check_one(
        &self,
        size: u64,
        record: &TraceRecord,
        entry: &TraceEntry,
        before: Option<u64>,
    ) -> Result<(), Failure> {
        let number = record.number;
        let cannot = |why: &str| {
            let (first, last) = self.has.unwrap_or_default();
            self.refused(format!(
                "request {number} cannot be replayed: {why}; the trace has {first} to {last}: choose others with --from \
                 and --until"
            ))
        };
        if before.is_some_and(|before| before.checked_add(1) != Some(number)) {
            return Err(cannot("those before it are missing"));
        }
        let is_change = !matches!(entry.operation, Operation::Read | Operation::Flush);
        if !is_change || matches!(self.outcome(number), ReplayOutcome::Failed(_)) {
            return Ok(());
        }
        let bytes = entry.sectors.checked_mul(BLOCK);
        let end = entry.sector.checked_add(entry.sectors);
        let end = end.and_then(|end| end.checked_mul(BLOCK));
        if entry.operation == Operation::Write && bytes != Some(record.data.len() as u64) {
            return Err(cannot("the data of a write is not there"));
        }
        match end {
            Some(end) if end <= size => Ok(()),
            _ => Err(cannot(&format!(
                "it changes sectors behind the {} of the image, which is no copy of this disk",
                size / BLOCK
            ))),
        }
    }
}

fn said(path: &Path, failure: Failure) -> Failure {
    Failure::new(failure.code, format!("{}: {failure}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::Point;

    #[test]
    fn a_place_is_a_number_or_a_time() {
        for (text, point) in [
            ("0", Point::Number(0)),
            ("120", Point::Number(120)),
            ("2s", Point::Time(2_000_000_000)),
            ("1500ms", Point::Time(1_500_000_000)),
            ("7us", Point::Time(7_000)),
            ("7ns", Point::Time(7)),
        ] {
            assert_eq!(text.parse(), Ok(point), "{text}");
        }
        for text in ["", "s", "-1", "1.5s", "1 s", "1m", "99999999999999999999s"] {
            let wrong = text.parse::<Point>().expect_err("no place");
            assert!(wrong.contains("1500ms"), "{text}: {wrong}");
        }
    }
}
