// SPDX-License-Identifier: MIT OR Apache-2.0
//! Metadata contexts of an NBD client: holes, ranges that the guest has changed since a mark (a dirty bitmap), and the
//! dirty bitmaps that the image stores.
//!
//! Both kinds of bitmaps have the names that QEMU gives to them, so that its tools, and those made for it, find them. A
//! mark hides a bitmap of the image with the same name, because the administrator has set it for this disk.

use super::wire::{self, Choice, Chunk, ClientRequest, OptionReply};
use super::{Client, MAX_EXTENTS};
use crate::internal_request;
use crate::session::{ChangedSince, StoredBitmap};
use control::{Code, Failure};
use diskio::Errno;
use drivers::nbd::proto::{ALLOCATION, DIRTY, STATE_DIRTY, STATE_HOLE, STATE_ZERO};
use drivers::{Content, DirtyExtent};
use std::collections::HashSet;
use std::rc::Rc;

/// Characters of a text that says why something failed, at most: the protocol has 4096 bytes for it.
const LONGEST: usize = 512;

/// Metadata context that a client may choose.
#[derive(Clone, Debug)]
pub(super) enum Context {
    /// Holes.
    Allocation,
    /// Ranges that have changed since a mark.
    Since(Rc<ChangedSince>),
    /// Dirty bitmap that the image stores.
    Stored(Rc<StoredBitmap>),
}

impl Context {
    fn name(&self) -> Vec<u8> {
        match self {
            Self::Allocation => ALLOCATION.to_vec(),
            Self::Since(since) => [DIRTY, since.name().to_string().as_bytes()].concat(),
            Self::Stored(stored) => [DIRTY, stored.name().as_bytes()].concat(),
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

/// A client may mean dirty bitmaps.
fn may_mean_bitmaps(asked: &wire::Contexts<'_>, is_list: bool) -> bool {
    let of_bitmaps = |query: &&[u8]| query.starts_with(DIRTY) || DIRTY.starts_with(query);
    (is_list && asked.queries.is_empty()) || asked.queries.iter().any(of_bitmaps)
}

/// Text of a failure, for a client.
fn text(failure: &Failure) -> String {
    failure.message.chars().take(LONGEST).collect()
}

/// Lengths and states of extents of a dirty bitmap.
fn states(found: Vec<DirtyExtent>) -> Vec<(u64, u32)> {
    let state = |is_dirty| if is_dirty { STATE_DIRTY } else { 0 };
    let found = found.into_iter();
    found.map(|part| (part.len, state(part.is_dirty))).collect()
}

/// Contexts that a client may mean.
struct OfferedContexts {
    contexts: Vec<Context>,
    /// Reason why the bitmaps that the image stores are not among them.
    missing: Option<Failure>,
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
        let why = text(&failure);
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
        let OfferedContexts {
            mut contexts,
            missing,
        } = match self.offered(&asked, is_list).await {
            Ok(offered) => offered,
            Err(failure) => return self.refuse(choice, &failure).await,
        };
        contexts.retain(|context| context.is_meant(&asked, is_list));
        if let Some(failure) = missing.as_ref().filter(|_| !is_list) {
            return self.refuse(choice, failure).await;
        }
        for (number, context) in (1..).zip(&contexts) {
            let context = wire::context(number, &context.name());
            self.answer(choice, OptionReply::MetaContext, &context)
                .await?;
        }
        if let Some(failure) = &missing {
            return self.refuse(choice, failure).await;
        }
        if !is_list {
            self.contexts.replace(contexts);
        }
        self.answer(choice, OptionReply::Ack, &[]).await
    }

    async fn refuse(&self, choice: Choice, failure: &Failure) -> Result<bool, Errno> {
        let why = text(failure);
        self.answer(choice, OptionReply::Policy, why.as_bytes())
            .await
    }

    /// Returns the contexts that a client may mean. Damage of the image's bitmaps keeps no client from the marks.
    async fn offered(
        &self,
        asked: &wire::Contexts<'_>,
        is_list: bool,
    ) -> Result<OfferedContexts, Failure> {
        let mut contexts = vec![Context::Allocation];
        let mut missing = None;
        if may_mean_bitmaps(asked, is_list) {
            let marks = self.session.since_marks().await?;
            contexts.extend(marks.into_iter().map(Context::Since));
            let names: HashSet<Vec<u8>> = contexts.iter().map(Context::name).collect();
            let is_known = |query: &&[u8]| !query.starts_with(DIRTY) || names.contains(*query);
            if is_list || !asked.queries.iter().all(is_known) {
                match self.session.stored_bitmaps().await {
                    Ok(stored) => {
                        let stored = stored.into_iter().map(Rc::new).map(Context::Stored);
                        contexts.extend(stored.filter(|one| !names.contains(&one.name())));
                    }
                    Err(failure) => missing = Some(failure),
                }
            }
        }
        Ok(OfferedContexts { contexts, missing })
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
                    states(self.session.changed(since, offset, len, most).await?)
                }
                Context::Stored(stored) => {
                    states(self.session.dirty(stored, offset, len, most).await?)
                }
            });
        }
        Ok(all)
    }
}
