// SPDX-License-Identifier: MIT OR Apache-2.0
//! NBD clients are told where the disk was written since its marks.
//!
//! The maps of the marks are the supervisor's. It is asked for what they say once, and what this process notes from then on
//! is added: so all that was written and answered before a client asks is in what it is told, and a client that asks a
//! thousand times is a client that the supervisor hears of once. It is asked again after everything that may have ended a
//! mark, and by its number, so that another one of the same name is not taken for it. Of a mark that is gone a client
//! hears that it is, never that nothing has changed.

use super::Session;
use crate::bits::Bits;
use crate::inside;
use crate::notes::Notes;
use crate::Server;
use control::{Code, Failure, Mark, MarkName};
use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::Future;
use std::rc::{Rc, Weak};
use std::time::Duration;

/// How long a supervisor may be away while somebody wants to know something of marks.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is known of marks.
#[derive(Debug, Default)]
pub(super) struct Marks {
    /// How often something may have become of them.
    changes: Cell<u64>,
    /// Those that clients want to know something of. They share it: it may be a megabyte.
    known: RefCell<Vec<Weak<Since>>>,
}

impl Marks {
    /// Something may have become of them: the supervisor is to be asked again.
    pub(super) fn look_again(&self) {
        self.changes.set(self.changes.get().wrapping_add(1));
    }

    fn since(&self, mark: Mark) -> Rc<Since> {
        let mut known = self.known.borrow_mut();
        known.retain(|since| since.strong_count() > 0);
        let mut all = known.iter().filter_map(Weak::upgrade);
        if let Some(since) = all.find(|since| since.number == mark.number) {
            return since;
        }
        let since = Rc::new(Since {
            number: mark.number,
            name: mark.name,
            known: RefCell::default(),
        });
        known.push(Rc::downgrade(&since));
        since
    }
}

/// Where the disk was written since a mark.
#[derive(Debug)]
pub(crate) struct Since {
    number: u64,
    name: MarkName,
    known: RefCell<Option<Known>>,
}

impl Since {
    /// The name of the mark.
    pub(crate) fn name(&self) -> &MarkName {
        &self.name
    }

    fn unknown(&self, why: impl fmt::Display) -> Failure {
        let name = &self.name;
        Failure::new(
            Code::NotFound,
            format!("it is not known what has changed since the mark {name}, so copy all of the disk: {why}"),
        )
    }
}

/// What the supervisor has said.
#[derive(Debug)]
struct Known {
    at: Moment,
    bits: Bits,
}

/// What it says is good as long as none of these changes: this process alone writes then, and notes it in one map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Moment {
    serve: u64,
    changes: u64,
    size: u64,
}

/// A part of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// Bytes, not 0.
    pub(crate) len: u64,
    /// It may have been written.
    pub(crate) is_changed: bool,
}

impl Session {
    /// The marks of the disk.
    ///
    /// # Errors
    /// The supervisor does not say.
    pub(crate) async fn since_marks(&self) -> Result<Vec<Rc<Since>>, Failure> {
        // There are none, and nobody who would have to be asked, where nothing is noted.
        if self.running().await.notes().is_none() {
            return Ok(Vec::new());
        }
        let marks = self.in_time(self.needs.marks()).await?;
        Ok(marks
            .into_iter()
            .map(|mark| self.marks.since(mark))
            .collect())
    }

    /// Up to `most` parts in a row, which need not reach the end of the range, with all that was written since a mark and
    /// answered before this was called.
    ///
    /// # Errors
    /// The range is none of the disk; or nobody knows.
    pub(crate) async fn changed(
        &self,
        since: &Since,
        offset: u64,
        len: u64,
        most: usize,
    ) -> Result<Vec<Part>, Failure> {
        loop {
            let server = self.running().await;
            inside::check(&server, offset, len)
                .map_err(|_| Failure::invalid("that is no range of whole blocks of the disk"))?;
            let notes = server.notes();
            let notes = notes.ok_or_else(|| since.unknown("nothing is noted any more"))?;
            let now = self.moment(&server);
            // Nothing is waited for from here to the answer.
            if let Some(known) = &*since.known.borrow() {
                if known.at == now {
                    return Ok(parts(&known.bits, &notes.bits(), offset, len, most));
                }
            }
            let bits = self.in_time(self.heard(since, now.size, &notes)).await;
            let bits = bits.map_err(|failure| since.unknown(failure))?;
            since.known.replace(Some(Known { at: now, bits }));
        }
    }

    fn moment(&self, server: &Server) -> Moment {
        Moment {
            serve: self.serves(),
            changes: self.marks.changes.get(),
            size: server.size(),
        }
    }

    /// What the supervisor says.
    async fn heard(&self, since: &Since, size: u64, notes: &Notes) -> Result<Bits, Failure> {
        let mut bits = notes.bits().none_of();
        let mut from = 0;
        loop {
            let changed = self.needs.changed(since.number, size, from).await?;
            for part in &changed.extents {
                bits.add(part.offset, part.length);
            }
            match changed.next {
                None => return Ok(bits),
                Some(next) if next > from => from = next,
                Some(_) => return Err(Failure::invalid("blktapctrl says the same again")),
            }
        }
    }

    async fn in_time<T>(
        &self,
        answer: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let answer = async { Ok(answer.await) };
        let answer = self.runtime().io.within(PATIENCE, answer).await;
        answer.map_err(|error| Failure::system("blktapctrl does not answer", &error.into()))?
    }
}

/// What either of them has.
fn parts(one: &Bits, other: &Bits, offset: u64, len: u64, most: usize) -> Vec<Part> {
    let (unit, end) = (one.unit(), offset + len);
    let mut parts: Vec<Part> = Vec::new();
    let mut at = offset;
    while at < end {
        let number = at / unit;
        let next = (number + 1).saturating_mul(unit).min(end);
        let is_changed = one.has(number) || other.has(number);
        let count = parts.len();
        match parts.last_mut() {
            Some(last) if last.is_changed == is_changed => last.len += next - at,
            _ if count == most => break,
            _ => parts.push(Part {
                len: next - at,
                is_changed,
            }),
        }
        at = next;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::{parts, Bits, Part};

    #[test]
    fn parts_are_in_a_row() {
        let one = Bits::new(vec![0b0000_0011], 1024);
        let other = Bits::new(vec![0b0001_0110], 1024);
        let found = |offset, len, most| {
            let part = |part: Part| (part.len, part.is_changed);
            let parts = parts(&one, &other, offset, len, most);
            parts.into_iter().map(part).collect::<Vec<_>>()
        };
        let all = [
            (3072, true),
            (1024, false),
            (1024, true),
            (3072, false),
            (4096, true),
        ];
        assert_eq!(found(0, 12288, 9), all);
        assert_eq!(found(0, 12288, 5), all);
        assert_eq!(found(0, 12288, 2), all[..2]);
        assert_eq!(
            found(512, 3072, 9),
            [(2560, true), (512, false)],
            "no whole units"
        );
        assert_eq!(found(3584, 512, 1), [(512, false)]);
    }
}
