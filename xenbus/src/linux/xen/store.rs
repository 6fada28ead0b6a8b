// SPDX-License-Identifier: GPL-2.0-only

//! Xenstore: reading, writing, transactions. Everything here may sleep.
//!
//! Wraps `xenbus_read`, `xenbus_directory`, `xenbus_write`, `xenbus_rm`, `xenbus_transaction_start` and
//! `xenbus_transaction_end` (include/xen/xenbus.h).

use crate::linux::sys;
use crate::proto::state::XenbusState;
use crate::proto::text::parse_u32;
use kernel::bindings;
use kernel::error::{from_err_ptr, to_result};
use kernel::ffi::c_uint;
use kernel::prelude::*;
use kernel::str::CString;
use kernel::sync::atomic::{ordering::Full, AtomicFlag};

const NONE: sys::XenbusTransaction = sys::XenbusTransaction { id: 0 };

fn read_in(
    transaction: sys::XenbusTransaction,
    dir: &CStr,
    key: &CStr,
    value: &mut [u8],
) -> Result<usize> {
    let mut len: c_uint = 0;
    // SAFETY: Both are C strings, and `len` is valid for the call.
    let raw = from_err_ptr(unsafe {
        sys::xenbus_read(transaction, dir.as_char_ptr(), key.as_char_ptr(), &mut len)
    })?;
    let len = len as usize;
    let part = len.min(value.len());
    // SAFETY: The call returned a buffer of `len` bytes that has no other user.
    let bytes = unsafe { core::slice::from_raw_parts(raw.cast::<u8>(), part) };
    for (to, from) in value.iter_mut().zip(bytes) {
        *to = *from;
    }
    // SAFETY: The buffer is ours to free.
    unsafe { bindings::kfree(raw) };
    Ok(len)
}

/// Reads a key into `value` and returns its length, which may be more than fits; `None` if there is no such key.
/// An error says nothing about the key.
pub(crate) fn read(dir: &CStr, key: &CStr, value: &mut [u8]) -> Result<Option<usize>> {
    read_if_there(NONE, dir, key, value)
}

fn read_if_there(
    transaction: sys::XenbusTransaction,
    dir: &CStr,
    key: &CStr,
    value: &mut [u8],
) -> Result<Option<usize>> {
    match read_in(transaction, dir, key, value) {
        Err(error) if error == ENOENT => Ok(None),
        other => other.map(Some),
    }
}

/// Reads a decimal number; `None` if there is none.
pub(crate) fn read_number(dir: &CStr, key: &CStr) -> Result<Option<u32>> {
    read_number_in(NONE, dir, key)
}

fn read_number_in(
    transaction: sys::XenbusTransaction,
    dir: &CStr,
    key: &CStr,
) -> Result<Option<u32>> {
    let mut value = [0; 16];
    let len = read_if_there(transaction, dir, key, &mut value)?;
    Ok(len.and_then(|len| value.get(..len)).and_then(parse_u32))
}

fn read_state_in(transaction: sys::XenbusTransaction, dir: &CStr) -> Result<XenbusState> {
    let mut value = [0; 16];
    let len = read_in(transaction, dir, c"state", &mut value)?;
    let number = value.get(..len).and_then(parse_u32);
    Ok(number.map_or(XenbusState::Unknown, XenbusState::from_number))
}

/// Reads the state of a device's directory; a value that is no state is Unknown.
pub(crate) fn read_state(dir: &CStr) -> Result<XenbusState> {
    read_state_in(NONE, dir)
}

/// Writes a number in decimal.
pub(crate) fn write_number(dir: &CStr, key: &CStr, value: u64) -> Result {
    Transaction(NONE).write_number(dir, key, value)
}

/// Writes a key.
pub(crate) fn write(dir: &CStr, key: &CStr, value: &CStr) -> Result {
    Transaction(NONE).write(dir, key, value)
}

/// Removes a key.
pub(crate) fn remove(dir: &CStr, key: &CStr) -> Result {
    Transaction(NONE).remove(dir, key)
}

/// Bytes that [`each_key`] passes of a name.
const NAME_MAX: usize = 48;

/// Calls `visit` with the name of each key in a directory, of which it passes the first bytes. Fails with ENOENT if
/// there is no such directory.
pub(crate) fn each_key(dir: &CStr, mut visit: impl FnMut(&[u8])) -> Result {
    let mut count: c_uint = 0;
    // SAFETY: Both are C strings, and `count` is valid for the call.
    let raw = from_err_ptr(unsafe {
        sys::xenbus_directory(NONE, dir.as_char_ptr(), c"".as_char_ptr(), &mut count)
    })?;
    // SAFETY: The call returned an array of `count` C strings, all in one buffer, that has no other user.
    let names = unsafe { core::slice::from_raw_parts(raw, count as usize) };
    for name in names {
        let mut bytes = [0u8; NAME_MAX];
        let mut len: usize = 0;
        for (index, to) in bytes.iter_mut().enumerate() {
            // SAFETY: As above; the loop ends at the NUL.
            let byte = unsafe { name.add(index).read() };
            if byte == 0 {
                break;
            }
            *to = byte;
            len = index.wrapping_add(1);
        }
        visit(bytes.get(..len).unwrap_or_default());
    }
    // SAFETY: The buffer is ours to free.
    unsafe { bindings::kfree(raw.cast()) };
    Ok(())
}

/// An open transaction, or none.
pub(crate) struct Transaction(sys::XenbusTransaction);

impl Transaction {
    /// Reads the state of a device's directory; a value that is no state is Unknown.
    pub(crate) fn read_state(&self, dir: &CStr) -> Result<XenbusState> {
        read_state_in(self.0, dir)
    }

    /// Reads a decimal number; `None` if there is none.
    pub(crate) fn read_number(&self, dir: &CStr, key: &CStr) -> Result<Option<u32>> {
        read_number_in(self.0, dir, key)
    }

    /// Writes a key.
    pub(crate) fn write(&self, dir: &CStr, key: &CStr, value: &CStr) -> Result {
        // SAFETY: All three are C strings.
        to_result(unsafe {
            sys::xenbus_write(
                self.0,
                dir.as_char_ptr(),
                key.as_char_ptr(),
                value.as_char_ptr(),
            )
        })
    }

    /// Reads a key into `value` and returns its length, which may be more than fits; `None` if there is no such key.
    pub(crate) fn read(&self, dir: &CStr, key: &CStr, value: &mut [u8]) -> Result<Option<usize>> {
        read_if_there(self.0, dir, key, value)
    }

    /// Removes a key, or the directory if the key is empty.
    pub(crate) fn remove(&self, dir: &CStr, key: &CStr) -> Result {
        // SAFETY: Both are C strings.
        to_result(unsafe { sys::xenbus_rm(self.0, dir.as_char_ptr(), key.as_char_ptr()) })
    }

    /// Writes a number in decimal.
    pub(crate) fn write_number(&self, dir: &CStr, key: &CStr, value: u64) -> Result {
        let text = CString::try_from_fmt(fmt!("{value}"))?;
        self.write(dir, key, &text)
    }
}

kernel::sync::global_lock! {
    // SAFETY: `Transactions::new`, which the module calls before it registers its driver, initialises it once.
    unsafe(uninit) static TURN: Mutex<()> = ();
}

static INITIALISED: AtomicFlag = AtomicFlag::new(false);

/// The right to use transactions; the module holds it while it is loaded.
pub(crate) struct Transactions(());

impl Transactions {
    /// Works once in the life of the module. May sleep.
    pub(crate) fn new() -> Result<Self> {
        if INITIALISED.xchg(true, Full) {
            return Err(EBUSY);
        }
        // SAFETY: The flag sees to it that this is done once, and nothing uses the lock before.
        unsafe { TURN.init() };
        Ok(Self(()))
    }
}

/// Times that a transaction is tried again when another one was in its way.
const ATTEMPTS: u32 = 100;

/// Does all that `body` does, or nothing. `body` may be called several times.
///
/// A domain may have few transactions at once (ten), which other programs in it need, too. So this driver has one at a
/// time, and disks that connect at the same moment wait for each other: never in the xenwatch thread.
pub(crate) fn transaction<T>(mut body: impl FnMut(&Transaction) -> Result<T>) -> Result<T> {
    for _ in 0..ATTEMPTS {
        // Others have their turn before the next attempt.
        let _turn = TURN.lock();
        let mut raw = NONE;
        // SAFETY: `raw` is valid for the call.
        to_result(unsafe { sys::xenbus_transaction_start(&mut raw) })?;
        let result = body(&Transaction(raw));
        // SAFETY: The transaction was started above and is ended once.
        let ended = to_result(unsafe { sys::xenbus_transaction_end(raw, result.is_err()) });
        let value = result?;
        match ended {
            Err(error) if error == EAGAIN => continue,
            other => return other.map(|()| value),
        }
    }
    Err(EAGAIN)
}
