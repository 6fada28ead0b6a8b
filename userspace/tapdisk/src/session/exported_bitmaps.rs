// SPDX-License-Identifier: MIT OR Apache-2.0
//! Dirty bitmaps for NBD clients: the ranges that the guest has changed since each mark, and the bitmaps that the image
//! itself stores.
//!
//! The supervisor has the content of the marks. This process asks it for their content once, and adds the bits of its
//! own dirty bitmap: so an answer to a client covers all writes that were answered before its question, and a thousand
//! questions of clients cost the supervisor one. It asks again after each event that may have ended a mark, and by the
//! mark's number, so that a later mark of the same name is not confused with it. If a mark is gone, the client gets an
//! error, never an empty answer.
//!
//! The driver knows the bitmaps of the image. Another program may change them while the disk is paused, so a client
//! reads them only until the image is opened again.

use super::Session;
use crate::bitmap::Bitmap;
use crate::dirty_bitmap::DirtyBitmap;
use crate::internal_request;
use crate::Server;
use control::{Code, Failure, Mark, MarkName};
use drivers::DirtyExtent;
use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::Future;
use std::rc::{Rc, Weak};
use std::time::Duration;

/// Time that a supervisor may be away while a client asks about marks.
const PATIENCE: Duration = Duration::from_secs(60);

/// Marks that clients know.
#[derive(Debug, Default)]
pub(super) struct Marks {
    /// Number of events that may have changed or ended one.
    changes: Cell<u64>,
    /// Marks that clients ask about. They share the content, which may be a megabyte.
    known: RefCell<Vec<Weak<ChangedSince>>>,
}

impl Marks {
    /// DirtyBitmap that a mark may have changed or ended, so that the next question goes to the supervisor again.
    pub(super) fn look_again(&self) {
        self.changes.set(self.changes.get().wrapping_add(1));
    }

    fn since(&self, mark: Mark) -> Rc<ChangedSince> {
        let mut known = self.known.borrow_mut();
        known.retain(|since| since.strong_count() > 0);
        let mut all = known.iter().filter_map(Weak::upgrade);
        if let Some(since) = all.find(|since| since.number == mark.number) {
            return since;
        }
        let since = Rc::new(ChangedSince {
            number: mark.number,
            name: mark.name,
            known: RefCell::default(),
        });
        known.push(Rc::downgrade(&since));
        since
    }
}

/// Ranges that the guest has changed since a mark.
#[derive(Debug)]
pub(crate) struct ChangedSince {
    number: u64,
    name: MarkName,
    known: RefCell<Option<Known>>,
}

impl ChangedSince {
    /// The name of the mark.
    pub(crate) fn name(&self) -> &MarkName {
        &self.name
    }

    fn unknown(&self, why: impl fmt::Display) -> Failure {
        let name = &self.name;
        Failure::new(
            Code::NotFound,
            format!("the changes since the dirty bitmap {name} are unknown, so copy all of the disk: {why}"),
        )
    }
}

/// Content of a mark, from the supervisor.
#[derive(Debug)]
struct Known {
    at: Moment,
    bits: Bitmap,
}

/// Validity of that content: it is right as long as none of these fields changes, because only this process then
/// changes the disk, with one bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Moment {
    serve: u64,
    changes: u64,
    size: u64,
}

/// A dirty bitmap that the image stores.
#[derive(Debug)]
pub(crate) struct StoredBitmap {
    name: String,
    /// Number of the opening of the image.
    serve: u64,
}

impl StoredBitmap {
    /// Returns its name in the image.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }
}

impl Session {
    /// The marks of the disk.
    ///
    /// # Errors
    /// The supervisor does not say.
    pub(crate) async fn since_marks(&self) -> Result<Vec<Rc<ChangedSince>>, Failure> {
        // Without a dirty bitmap there are no marks, and there may be no supervisor to ask.
        if self.running().await.notes().is_none() {
            return Ok(Vec::new());
        }
        let marks = self.in_time(self.needs.marks()).await?;
        Ok(marks
            .into_iter()
            .map(|mark| self.marks.since(mark))
            .collect())
    }

    /// Returns up to `most` contiguous extents, which need not reach the end of the range. They cover all writes since a
    /// mark that were answered before this call.
    ///
    /// # Errors
    /// The range is outside of the disk or not a whole number of its blocks, or the content of the mark is unknown.
    pub(crate) async fn changed(
        &self,
        since: &ChangedSince,
        offset: u64,
        len: u64,
        most: usize,
    ) -> Result<Vec<DirtyExtent>, Failure> {
        loop {
            let server = self.running().await;
            check_range(&server, offset, len)?;
            let notes = server.notes();
            let notes =
                notes.ok_or_else(|| since.unknown("the disk has no dirty bitmap any more"))?;
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

    /// Returns the dirty bitmaps that the image stores and that can be relied on.
    ///
    /// # Errors
    /// The image does not say.
    pub(crate) async fn stored_bitmaps(&self) -> Result<Vec<StoredBitmap>, Failure> {
        let server = self.running().await;
        let _hold = server.hold();
        let serve = self.serves();
        let names = server.disk().bitmaps().await?;
        let stored = |name| StoredBitmap { name, serve };
        Ok(names.into_iter().map(stored).collect())
    }

    /// Returns up to `most` contiguous extents, which need not reach the end of the range. They cover all writes that
    /// were answered before this call.
    ///
    /// # Errors
    /// The range is outside of the disk or not a whole number of its blocks, or the bitmap cannot be relied on.
    pub(crate) async fn dirty(
        &self,
        stored: &StoredBitmap,
        offset: u64,
        len: u64,
        most: usize,
    ) -> Result<Vec<DirtyExtent>, Failure> {
        let server = self.running().await;
        let _hold = server.hold();
        check_range(&server, offset, len)?;
        if self.serves() != stored.serve {
            return Err(Failure::new(
                Code::State,
                format!(
                    "the image was opened again, and its dirty bitmap {:?} may be another one by now: connect again",
                    stored.name
                ),
            ));
        }
        server.disk().dirty(&stored.name, offset, len, most).await
    }

    fn moment(&self, server: &Server) -> Moment {
        Moment {
            serve: self.serves(),
            changes: self.marks.changes.get(),
            size: server.size(),
        }
    }

    /// Asks the supervisor for the content of a mark.
    async fn heard(
        &self,
        since: &ChangedSince,
        size: u64,
        notes: &DirtyBitmap,
    ) -> Result<Bitmap, Failure> {
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

fn check_range(server: &Server, offset: u64, len: u64) -> Result<(), Failure> {
    internal_request::check(server, offset, len)
        .map_err(|_| Failure::invalid("that is no range of whole blocks of the disk"))
}

/// Returns the union of two bitmaps in a range.
fn parts(one: &Bitmap, other: &Bitmap, offset: u64, len: u64, most: usize) -> Vec<DirtyExtent> {
    let (unit, end) = (one.unit(), offset + len);
    let mut parts: Vec<DirtyExtent> = Vec::new();
    let mut at = offset;
    while at < end {
        let number = at / unit;
        let next = (number + 1).saturating_mul(unit).min(end);
        let is_dirty = one.has(number) || other.has(number);
        let count = parts.len();
        match parts.last_mut() {
            Some(last) if last.is_dirty == is_dirty => last.len += next - at,
            _ if count == most => break,
            _ => parts.push(DirtyExtent {
                len: next - at,
                is_dirty,
            }),
        }
        at = next;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::{parts, Bitmap, DirtyExtent};

    #[test]
    fn parts_are_in_a_row() {
        let one = Bitmap::new(vec![0b0000_0011], 1024);
        let other = Bitmap::new(vec![0b0001_0110], 1024);
        let found = |offset, len, most| {
            let part = |part: DirtyExtent| (part.len, part.is_dirty);
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
