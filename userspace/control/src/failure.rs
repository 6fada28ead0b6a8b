// SPDX-License-Identifier: MIT OR Apache-2.0
//! Failures, which are the answers to requests that could not be carried out.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;

/// Kind of a failure: a program decides by this, never by the sentence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// The peer speaks another version of the protocol.
    Version,
    /// The message could not be understood, or misses something.
    Invalid,
    /// The named thing does not exist.
    NotFound,
    /// The named thing exists already.
    Exists,
    /// Another user has it.
    Busy,
    /// The disk is not in a state that allows this.
    State,
    /// The image is refused: its size, its blocks, or that it changed.
    Image,
    /// The asker may not.
    Denied,
    /// This program does not implement the operation.
    Unsupported,
    /// The operation took too long.
    Timeout,
    /// The connection or the process at its other end is gone.
    Gone,
    /// The system refused a call.
    System,
    /// A code of a newer peer.
    #[serde(other)]
    Other,
}

/// A failure: its kind and one sentence for a person.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The kind.
    pub code: Code,
    /// Names the thing and, where there is one, the remedy.
    pub message: String,
    /// The number of the system's error, if a call failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub errno: Option<i32>,
}

impl Failure {
    /// A failure of kind `code`.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            errno: None,
        }
    }

    /// A message that cannot be understood.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Code::Invalid, message)
    }

    /// Something that is not implemented.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(Code::Unsupported, message)
    }

    /// A call that the system refused: `what` says what was tried, such as `cannot open /srv/a`.
    /// The kind follows from the error.
    pub fn system(what: impl fmt::Display, error: &io::Error) -> Self {
        let code = match error.kind() {
            io::ErrorKind::NotFound => Code::NotFound,
            io::ErrorKind::AlreadyExists => Code::Exists,
            io::ErrorKind::PermissionDenied => Code::Denied,
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Code::Timeout,
            io::ErrorKind::ResourceBusy => Code::Busy,
            io::ErrorKind::Unsupported => Code::Unsupported,
            io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::UnexpectedEof => Code::Gone,
            _ => Code::System,
        };
        Self {
            errno: error.raw_os_error(),
            ..Self::new(code, format!("{what}: {error}"))
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::{Code, Failure};
    use std::io;

    #[test]
    fn a_failure_of_the_system_keeps_its_number_on_the_wire() {
        let full = io::Error::from_raw_os_error(28);
        let failure = Failure::system("cannot write /srv/a", &full);
        assert_eq!((failure.code, failure.errno), (Code::System, Some(28)));
        let sent = serde_json::to_string(&failure).unwrap();
        assert_eq!(serde_json::from_str::<Failure>(&sent).unwrap(), failure);
        // A failure of another program has no error number, and gets none that would mean nothing.
        let sent = serde_json::to_string(&Failure::new(Code::Busy, "no")).unwrap();
        assert_eq!(sent, r#"{"code":"busy","message":"no"}"#);
        assert_eq!(serde_json::from_str::<Failure>(&sent).unwrap().errno, None);
    }
}
