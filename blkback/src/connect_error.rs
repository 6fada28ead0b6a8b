// SPDX-License-Identifier: GPL-2.0-only

//! Why a frontend could not be connected, in words for the administrator.

use crate::proto::frontend::{Fault, KeyError};
use kernel::prelude::*;
use kernel::str::CString;

/// Why a frontend could not be connected.
pub(crate) enum ConnectError {
    /// A key in its directory is no good.
    Key(KeyError),
    /// A step failed.
    Step(&'static str, Error),
    /// The toolstack is taking the device away.
    TakenAway,
    /// A step failed that may go well in a while, although nobody does anything.
    Later(&'static str, Error),
}

impl From<KeyError> for ConnectError {
    fn from(error: KeyError) -> Self {
        Self::Key(error)
    }
}

impl ConnectError {
    /// True if it may go well in a while, although nobody does anything.
    pub(crate) fn passes(&self) -> bool {
        match self {
            Self::Key(error) => error.fault == Fault::Unread,
            Self::Step(..) | Self::TakenAway => false,
            Self::Later(..) => true,
        }
    }

    /// What to tell the administrator.
    pub(crate) fn describe(&self) -> (Error, Result<CString>) {
        match self {
            Self::Key(error) => (
                match error.fault {
                    Fault::Unread => EAGAIN,
                    Fault::Missing | Fault::Malformed | Fault::OutOfRange => EINVAL,
                },
                CString::try_from_fmt(fmt!(
                    "the frontend's key {} {}",
                    error.key.as_str(),
                    error.text()
                )),
            ),
            Self::TakenAway => (
                EPIPE,
                CString::try_from_fmt(fmt!("the toolstack is taking the disk away")),
            ),
            Self::Step(step, error) | Self::Later(step, error) => {
                (*error, CString::try_from_fmt(fmt!("{step}")))
            }
        }
    }
}
