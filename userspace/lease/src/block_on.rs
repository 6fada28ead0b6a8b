// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs async code that never waits but by blocking; it is async only for the models of hosts.

use control::{Code, Failure};
use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

/// The result of such work.
pub(crate) fn block_on<T, E: From<Failure>>(
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    match pin!(work).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => result,
        Poll::Pending => Err(E::from(Failure::new(
            Code::System,
            "a lease waits for something that does not block",
        ))),
    }
}
