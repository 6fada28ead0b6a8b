// SPDX-License-Identifier: MIT OR Apache-2.0
//! The framing: lines of JSON, and the descriptors that belong to them.
//!
//! A question is `{"version":1,"id":7,"fds":1,"body":{...}}`, its answer repeats the `id`; what an answer holds is
//! `{"ok":...}` or `{"error":{"code":...,"message":...}}`. Descriptors are sent with the bytes of the line that counts
//! them in `fds`, and belong to lines in the order in which they arrive. Messages of a peer are bounded: [`MAX_LINE`]
//! and [`MAX_FDS`].

use crate::{Code, Failure, VERSION};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;

/// Bytes of a line at most, without its end.
pub const MAX_LINE: usize = 1 << 20;
/// Descriptors of a message at most.
pub const MAX_FDS: usize = 8;

/// A message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Envelope<T> {
    /// [`VERSION`] of the sender.
    pub version: u32,
    /// Names a question in its answer; chosen by who asks. 0 in messages that answer no question: events.
    pub id: u64,
    /// Descriptors that come with the message.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub fds: usize,
    /// Body of the message.
    pub body: T,
}

fn is_zero(number: &usize) -> bool {
    *number == 0
}

/// Content of an answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome<T> {
    /// The request was executed.
    Ok(T),
    /// The request failed.
    Error(Failure),
}

impl<T> From<Result<T, Failure>> for Outcome<T> {
    fn from(result: Result<T, Failure>) -> Self {
        match result {
            Ok(value) => Self::Ok(value),
            Err(failure) => Self::Error(failure),
        }
    }
}

impl<T> From<Outcome<T>> for Result<T, Failure> {
    fn from(outcome: Outcome<T>) -> Self {
        match outcome {
            Outcome::Ok(value) => Ok(value),
            Outcome::Error(failure) => Err(failure),
        }
    }
}

impl<T> Envelope<T> {
    /// A message of this version.
    pub fn new(id: u64, fds: usize, body: T) -> Self {
        Self {
            version: VERSION,
            id,
            fds,
            body,
        }
    }
}

/// A message that arrived, and its descriptors.
pub type Received<T> = (Envelope<T>, Vec<OwnedFd>);

/// The line of a message, with its end.
pub fn encode<T: Serialize>(message: &Envelope<T>) -> Result<Vec<u8>, Failure> {
    let mut line = serde_json::to_vec(message)
        .map_err(|error| Failure::invalid(format!("cannot encode a message: {error}")))?;
    if line.len() > MAX_LINE || message.fds > MAX_FDS {
        return Err(Failure::invalid(format!(
            "a message of {} bytes with {} descriptors is too long: {MAX_LINE} and {MAX_FDS} are the most",
            line.len(),
            message.fds
        )));
    }
    line.push(b'\n');
    Ok(line)
}

/// Puts messages together from what arrives in pieces.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    /// Up to here there is no end of a line.
    searched: usize,
    fds: VecDeque<OwnedFd>,
}

impl Decoder {
    /// Takes what arrived. An error is final: the connection is to be closed, because it is not
    /// known any more where a message begins.
    pub fn push(
        &mut self,
        bytes: &[u8],
        fds: impl IntoIterator<Item = OwnedFd>,
    ) -> Result<(), Failure> {
        self.fds.extend(fds);
        self.bytes.extend_from_slice(bytes);
        // Two messages may be on their way at once, one of them not complete.
        if self.bytes.len() > 2 * (MAX_LINE + 1) || self.fds.len() > 2 * MAX_FDS {
            return Err(Failure::invalid(
                "the peer sends more than a message may hold",
            ));
        }
        Ok(())
    }

    /// The next message, if it has arrived in full. A message that is well formed and of another
    /// version, or not understood, is an error that names its `id` and leaves the rest readable.
    pub fn message<T: DeserializeOwned>(&mut self) -> Result<Option<Received<T>>, RefusedMessage> {
        let Some(line) = self.line()? else {
            return Ok(None);
        };
        let head: Head = serde_json::from_slice(&line).map_err(|error| RefusedMessage {
            id: None,
            failure: Failure::invalid(format!("a message is not understood: {error}")),
        })?;
        if head.fds > MAX_FDS || head.fds > self.fds.len() {
            return Err(RefusedMessage {
                id: None,
                failure: Failure::invalid(format!(
                    "a message counts {} descriptors, and {} came",
                    head.fds,
                    self.fds.len()
                )),
            });
        }
        let fds = self.fds.drain(..head.fds).collect();
        if head.version != VERSION {
            return Err(RefusedMessage {
                id: Some(head.id),
                failure: Failure::new(
                    Code::Version,
                    format!(
                        "the peer speaks version {} of the protocol and this program {VERSION}: use programs of one release",
                        head.version
                    ),
                ),
            });
        }
        let message = serde_json::from_slice(&line).map_err(|error| RefusedMessage {
            id: Some(head.id),
            failure: Failure::invalid(format!("a message is not understood: {error}")),
        })?;
        Ok(Some((message, fds)))
    }

    /// Takes the next line out of the buffer.
    fn line(&mut self) -> Result<Option<Vec<u8>>, RefusedMessage> {
        let end = self.bytes[self.searched..]
            .iter()
            .position(|byte| *byte == b'\n');
        let length = end.map_or(self.bytes.len(), |end| self.searched + end);
        if length > MAX_LINE {
            return Err(RefusedMessage {
                id: None,
                failure: Failure::invalid(format!("a message is longer than {MAX_LINE} bytes")),
            });
        }
        if end.is_none() {
            self.searched = self.bytes.len();
            return Ok(None);
        }
        let mut line: Vec<u8> = self.bytes.drain(..=length).collect();
        line.pop();
        self.searched = 0;
        Ok(Some(line))
    }

    /// True if a message has begun and is not complete.
    pub fn is_torn(&self) -> bool {
        !self.bytes.is_empty() || !self.fds.is_empty()
    }
}

/// A message that was not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedMessage {
    /// The question to answer with the failure; without it the connection is to be closed.
    pub id: Option<u64>,
    /// The failure.
    pub failure: Failure,
}

/// The part of a message that stays the same in all versions.
#[derive(Deserialize)]
struct Head {
    version: u32,
    id: u64,
    #[serde(default)]
    fds: usize,
}
