// SPDX-License-Identifier: GPL-2.0-only

//! Reasons that a frontend could not be connected, in words for the administrator.

use crate::connect_retry::{is_shortage, store_recovers};
use crate::proto::frontend::{KeyError, KeyFault};
use kernel::prelude::*;
use kernel::str::CString;

/// Reason that a frontend could not be connected.
pub(crate) enum ConnectError {
    /// A key in its directory is no good.
    Key(KeyError),
    /// A step failed. The error decides whether the step is tried again.
    Step(&'static str, Error),
    /// A step failed because of the frontend.
    Frontend(&'static str, Error),
    /// The toolstack is taking the device away.
    TakenAway,
    /// Xenstore failed an operation.
    Store(&'static str, Error),
}

impl From<KeyError> for ConnectError {
    fn from(error: KeyError) -> Self {
        Self::Key(error)
    }
}

impl ConnectError {
    /// Returns true for a shortage: the connect may work later although the frontend does nothing.
    pub(crate) fn passes(&self) -> bool {
        let errno = |error: &Error| error.to_errno().saturating_neg();
        match self {
            Self::Key(error) => error.fault == KeyFault::Unread,
            Self::Step(_, error) => is_shortage(errno(error)),
            Self::Store(_, error) => store_recovers(errno(error)),
            Self::Frontend(..) | Self::TakenAway => false,
        }
    }

    /// Returns the reason without its details. Two failures in a row with one reason are reported once.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::Key(error) => error.text(),
            Self::TakenAway => "the toolstack is taking the disk away",
            Self::Step(step, _) | Self::Frontend(step, _) | Self::Store(step, _) => step,
        }
    }

    /// Returns the error number and the text for the administrator.
    pub(crate) fn describe(&self) -> (Error, Result<CString>) {
        let again = match self.passes() {
            true => "; the backend tries again until it works or the frontend closes",
            false => "",
        };
        match self {
            Self::Key(error) => (
                match error.fault {
                    KeyFault::Unread => EAGAIN,
                    KeyFault::Missing | KeyFault::Malformed | KeyFault::OutOfRange => EINVAL,
                },
                CString::try_from_fmt(fmt!(
                    "the frontend's key {} {}{again}",
                    error.key.as_str(),
                    error.text()
                )),
            ),
            Self::TakenAway => (EPIPE, CString::try_from_fmt(fmt!("{}", self.reason()))),
            Self::Step(step, error) | Self::Frontend(step, error) | Self::Store(step, error) => {
                (*error, CString::try_from_fmt(fmt!("{step}{again}")))
            }
        }
    }
}
