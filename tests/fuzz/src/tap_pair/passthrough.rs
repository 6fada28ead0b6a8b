// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Requests that a queue executes without the process, and the mappings for them.

use ring::numbers::DiskTag;
use ring::response::ResponseStatus;
use ring::tap::abi;
use ring::tap::extent::{DataExtent, ExtentAccess, Sectors, Source};
use ring::tap::map::tree::{Leaf, LeafSlot};
use ring::tap::map::ExtentMap;
use ring::tap::shadow::passthrough::{RequestPart, RequestParts, Start};
use ring::tap::shadow::Op;

use super::{number, Pair, ShadowStep, BACKINGS, SIZE, ZEROES};
use crate::tap_model::{wire, For, Stage, Undone, VecMap};

/// Maps parts of 16 sectors, two of which have changed places.
fn scatter(map: &mut VecMap, backing: u16) {
    for part in 0..264 {
        let extent = DataExtent {
            range: Sectors::new(16 * part, 16).expect("it is not empty"),
            place: 16 * (part ^ 1),
            source: Source::Backing(number(backing)),
            access: ExtentAccess::ReadWrite,
        };
        let _taken = map.set(&extent, map.generation());
    }
}

pub(super) fn mappings(leaves: usize, backings: u16) -> Box<VecMap> {
    let (slots, leaves) = (vec![LeafSlot::FREE; leaves], vec![Leaf::FREE; leaves]);
    let mut map = ExtentMap::new(slots, leaves, SIZE, true);
    for (backing, what) in (0..backings).zip(BACKINGS) {
        assert!(map.add_backing(number(backing), what));
    }
    Box::new(map)
}

impl Pair {
    /// A queue begins the request that it has just `posted`, or another one of this tag.
    pub(super) fn begin(&mut self, tag: u16, posted: bool) {
        let waits = |s: &u64| {
            let request = &self.model.undone[s];
            request.stage == Stage::Waiting && request.whose == For::Unknown
        };
        let sequence = self.model.sequence_of(tag).filter(waits);
        let free = posted && self.model.is_left_to_queues();
        let free = sequence.filter(|s| free || self.model.blocker(*s).is_none());
        self.seen.begun_beside += u64::from(free.is_some_and(|s| self.model.blocker(s).is_some()));
        let expected = free.and_then(|s| self.expect_start(s));
        let mut parts = RequestParts::default();
        let start = self.shadow.begin(DiskTag::new(tag), &mut parts);
        let got = start.map(|start| (start, parts.as_slice().to_vec()));
        assert_eq!(got, expected, "{self:?}");
        self.seen.begun += u64::from(start.is_some());
        self.seen.begun_in_parts += u64::from(start.is_some() && parts.as_slice().len() > 1);
        let reads_zeroes = parts.as_slice().iter().any(|part| part.sector.is_none());
        self.seen.begun_with_zeroes += u64::from(start.is_some() && reads_zeroes);
    }

    /// Returns the expected start of a request that nothing blocks, which its queue executes from now on if it can.
    fn expect_start(&mut self, sequence: u64) -> Option<(Start, Vec<RequestPart>)> {
        let (backing, parts) = self.model.place(sequence)?;
        let request = self.model.undone.get_mut(&sequence).expect("it waits");
        request.stage = Stage::Direct(backing);
        let start = Start {
            backing,
            op: wire(request.request.op),
            sectors: request.range().end - request.range().start,
            segments: request.request.segments,
        };
        Some((start, parts))
    }

    pub(super) fn resume(&mut self, queue: u16, max: usize) {
        let ready = self.model.ready(queue);
        let gone = |s: &&u64| self.model.clone().place(**s).is_none();
        let missed = ready.iter().filter(gone).count();
        // The shadow may try them in any order.
        let max = if missed > 0 { usize::MAX } else { max };
        self.told &= !1u64.wrapping_shl(queue.into());
        let mut got = Vec::new();
        let each = |tag: DiskTag, start, parts: &[RequestPart]| {
            got.push((tag.number(), (start, parts.to_vec())));
        };
        self.shadow.resume(queue, max, each);
        assert_eq!(got.len(), max.min(ready.len() - missed), "{self:?}");
        for (tag, start) in &got {
            let sequence = self.model.sequence_of(*tag).expect("it waits");
            assert!(ready.contains(&sequence), "{self:?}");
            let expected = self.expect_start(sequence);
            assert_eq!(Some(start), expected.as_ref(), "{self:?}");
        }
        if max == usize::MAX {
            for sequence in self.model.ready(queue) {
                let request = self.model.undone.get_mut(&sequence);
                request.expect("it waits").whose = For::Process;
            }
        }
        self.seen.resumed += got.len() as u64;
        self.seen.missed += missed as u64;
    }

    pub(super) fn end(&mut self, tag: u16, status: ResponseStatus) {
        let result = self.shadow.ended(DiskTag::new(tag), status);
        let direct = |s: &u64| matches!(self.model.undone[s].stage, Stage::Direct(_));
        let Some(sequence) = self.model.sequence_of(tag).filter(direct) else {
            return assert_eq!(result, None, "{self:?}");
        };
        let mut request = self.model.undone.remove(&sequence).expect("it is there");
        if status == ResponseStatus::Okay || request.request.op == Op::Flush {
            self.model.executed += 1;
            self.model.failed_flushes += u32::from(status != ResponseStatus::Okay);
            self.seen.executed += 1;
            return assert_eq!(result, Some(status), "{self:?}");
        }
        request.stage = Stage::Waiting;
        request.whose = For::Unknown;
        request.replay = true;
        // The request arrives anew.
        self.model.undone.insert(self.model.sequence, request);
        self.model.sequence += 1;
        self.seen.redone += 1;
        assert_eq!(result, None, "{self:?}");
    }

    /// The process changes mappings if it is served; the host changes the backings.
    pub(super) fn map(&mut self, step: ShadowStep) {
        let live = self.model.state == abi::STATE_LIVE;
        let busy = |number| self.shadow.is_executing_in(number);
        let may = match step {
            ShadowStep::Add(backing) => !busy(number(backing)),
            ShadowStep::Remove(_) => true,
            _ => live,
        };
        let (shadow, model) = (self.shadow.map(), &mut self.model.mappings.0);
        let (Some(shadow), Some(model), true) = (shadow, model, may) else {
            return;
        };
        for map in [shadow, model] {
            match step {
                ShadowStep::Set(range, access, backing, ago) => {
                    let extent = DataExtent {
                        range,
                        place: match backing {
                            ZEROES => 0,
                            _ => range.start(),
                        },
                        source: match backing {
                            ZEROES => Source::Zeroes,
                            _ => Source::Backing(number(backing)),
                        },
                        access,
                    };
                    let generation = map.generation().wrapping_sub(ago);
                    let _taken = map.set(&extent, generation);
                }
                ShadowStep::Scatter(backing) => scatter(map, backing),
                ShadowStep::SetFlush => {
                    let _taken = map.set_flush();
                }
                ShadowStep::Recall(range) => map.recall(&range),
                ShadowStep::Add(backing) => {
                    let what = BACKINGS[usize::from(backing)];
                    let _added = map.add_backing(number(backing), what);
                }
                ShadowStep::Remove(backing) => {
                    let _removed = map.remove_backing(number(backing));
                }
                _ => {}
            }
        }
    }

    /// Compares the state that exists only if mappings are possible.
    pub(super) fn compare_mapped(&mut self) {
        let known = self.shadow.map().as_ref().expect("as the model");
        let model = &self.model;
        let expected = model.mappings.0.as_ref().expect("the caller looked");
        assert!(known.extents().eq(expected.extents()), "{self:?}");
        assert_eq!(known.generation(), expected.generation(), "{self:?}");
        assert_eq!(known.flushed(), expected.flushed(), "{self:?}");
        assert_eq!(known.evicted() + expected.evicted(), 0, "too few leaves");
        for backing in (0..).take(BACKINGS.len()).map(number) {
            let executing = model.executing(|of, _| of == Some(backing)) > 0;
            assert_eq!(self.shadow.is_executing_in(backing), executing, "{self:?}");
        }
        let any = model.executing(|_, _| true) > 0;
        assert_eq!(self.shadow.is_executing(&Sectors::ALL), any, "{self:?}");
        for (sequence, request) in &model.undone {
            for (_, earlier) in model.undone.range(..sequence) {
                let stages = [request.stage, earlier.stage];
                // Requests that queues execute may overlap, unless the process has one.
                let both = !stages.contains(&Stage::Waiting) && stages.contains(&Stage::Delivered);
                assert!(!(both && earlier.conflicts(request)), "{self:?}");
            }
            // The shadow has woken every queue that could begin a request.
            let waits = request.stage == Stage::Waiting && request.whose == For::Queue;
            assert!(!waits || self.told >> request.queue & 1 == 1, "{self:?}");
            if let Some(range) = Sectors::between(request.range().start, request.range().end) {
                let meets = |r: &Undone| {
                    let range = r.range().start.max(range.start())..r.range().end.min(range.end());
                    !range.is_empty()
                };
                let executing = model.executing(|_, r| meets(r)) > 0;
                assert_eq!(self.shadow.is_executing(&range), executing, "{self:?}");
            }
        }
        self.look_on();
    }
}
