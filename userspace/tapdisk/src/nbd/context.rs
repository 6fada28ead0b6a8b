// SPDX-License-Identifier: MIT OR Apache-2.0
//! Metadata contexts of an NBD client: holes, and ranges that the guest has changed since a mark (a dirty bitmap).
//!
//! A mark has the name that QEMU gives to such things, so that its tools, and those made for it, find it.

use super::wire::{self, Choice, Chunk, ClientRequest, OptionReply};
use super::{Client, MAX_EXTENTS};
use crate::internal_request;
use crate::session::Since;
use control::{Code, Failure};
use diskio::Errno;
use drivers::nbd::proto::{ALLOCATION, DIRTY, STATE_DIRTY, STATE_HOLE, STATE_ZERO};
use drivers::Content;
use std::rc::Rc;

/// Characters of a text that says why something failed, at most: the protocol has 4096 bytes for it.
const LONGEST: usize = 512;

/// Metadata context that a client may choose.
#[derive(Clone, Debug)]
pub(super) enum Context {
    /// Holes.
    Allocation,
    /// Ranges that have changed since a mark.
    Since(Rc<Since>),
}

impl Context {
    fn name(&self) -> Vec<u8> {
        match self {
            Self::Allocation => ALLOCATION.to_vec(),
            Self::Since(since) => [DIRTY, since.name().to_string().as_bytes()].concat(),
        }
    }

    /// A client asks for this.
    fn is_meant(&self, asked: &wire::Contexts<'_>, is_list: bool) -> bool {
        let name = self.name();
        let all = |query: &[u8]| is_list && query.ends_with(b":") && name.starts_with(query);
        let mut queries = asked.queries.iter();
        (is_list && asked.queries.is_empty()) || queries.any(|query| *query == name || all(query))
    }
}

/// A client may mean marks.
fn may_mean_marks(asked: &wire::Contexts<'_>, is_list: bool) -> bool {
    let of_marks = |query: &&[u8]| query.starts_with(DIRTY) || DIRTY.starts_with(query);
    (is_list && asked.queries.is_empty()) || asked.queries.iter().any(of_marks)
}

/// Reason why a client gets no answer about extents.
struct RefusedContext {
    error: Errno,
    why: String,
}

impl From<Errno> for RefusedContext {
    fn from(error: Errno) -> Self {
        let why = String::new();
        Self { error, why }
    }
}

impl From<Failure> for RefusedContext {
    fn from(failure: Failure) -> Self {
        let error = match failure.code {
            Code::Invalid => Errno::INVAL,
            _ => Errno::IO,
        };
        let why = failure.message.chars().take(LONGEST).collect();
        Self { error, why }
    }
}

impl Client {
    /// Answers a client's choice of metadata contexts; [`Choice::SetMetaContext`] replaces the earlier choice, also if
    /// it fails.
    pub(super) async fn choose_context(&self, choice: Choice, data: &[u8]) -> Result<bool, Errno> {
        let is_list = choice == Choice::ListMetaContext;
        if !is_list {
            self.contexts.take();
        }
        let asked = match wire::contexts(data) {
            Some(asked) if self.has_chunks.get() => asked,
            _ => return self.answer(choice, OptionReply::Invalid, &[]).await,
        };
        if !self.is_ours(asked.export) {
            return self.answer(choice, OptionReply::UnknownExport, &[]).await;
        }
        let mut meant = vec![Context::Allocation];
        if may_mean_marks(&asked, is_list) {
            let marks = self.session.since_marks().await.map_err(|failure| {
                diskio::say!("tapdisk: an NBD client gets no dirty bitmaps: {failure}");
                Errno::IO
            })?;
            meant.extend(marks.into_iter().map(Context::Since));
        }
        meant.retain(|context| context.is_meant(&asked, is_list));
        for (number, context) in (1..).zip(&meant) {
            let context = wire::context(number, &context.name());
            self.answer(choice, OptionReply::MetaContext, &context)
                .await?;
        }
        if !is_list {
            self.contexts.replace(meant);
        }
        self.answer(choice, OptionReply::Ack, &[]).await
    }

    /// Answers a question for extents: a chunk for each context, or one that says why not.
    pub(super) async fn tell_extents(&self, request: &ClientRequest) -> Result<(), Errno> {
        let contexts = self.contexts.borrow().clone();
        let told = self.extents(request, &contexts).await;
        self.session.count_nbd();
        match told {
            Ok(told) => {
                for (number, parts) in (1..).zip(&told) {
                    let chunk = Chunk::BlockStatus { number, parts };
                    let is_last = number as usize == told.len();
                    self.write(&wire::chunk(request.cookie, &chunk, is_last))
                        .await?;
                }
                Ok(())
            }
            Err(RefusedContext { error, why }) => {
                let chunk = Chunk::Error(error, &why);
                self.write(&wire::chunk(request.cookie, &chunk, true)).await
            }
        }
    }

    /// Lengths and states of extents, for each context.
    async fn extents(
        &self,
        request: &ClientRequest,
        contexts: &[Context],
    ) -> Result<Vec<Vec<(u64, u32)>>, RefusedContext> {
        let (offset, len) = (request.offset, request.len.into());
        let most = if request.one { 1 } else { MAX_EXTENTS };
        let mut all = Vec::new();
        for context in contexts {
            all.push(match context {
                Context::Allocation => {
                    let found = internal_request::extents(&self.session, offset, len, most).await?;
                    let state = |content| match content {
                        Content::Data | Content::Below => 0,
                        Content::Hole => STATE_HOLE | STATE_ZERO,
                    };
                    let found = found.into_iter();
                    found.map(|part| (part.len, state(part.content))).collect()
                }
                Context::Since(since) => {
                    let found = self.session.changed(since, offset, len, most).await?;
                    let state = |is_changed| if is_changed { STATE_DIRTY } else { 0 };
                    let found = found.into_iter();
                    found
                        .map(|part| (part.len, state(part.is_changed)))
                        .collect()
                }
            });
        }
        Ok(all)
    }
}
