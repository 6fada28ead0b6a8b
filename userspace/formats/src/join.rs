// SPDX-License-Identifier: MIT OR Apache-2.0
//! Two things at the same time.

use std::future::{poll_fn, Future};
use std::pin::pin;
use std::task::Poll;

/// The results of both, when both are done.
pub(crate) async fn both<T, U>(
    first: impl Future<Output = T>,
    second: impl Future<Output = U>,
) -> (T, U) {
    let (mut first, mut second) = (pin!(first), pin!(second));
    let (mut one, mut two) = (None, None);
    poll_fn(move |cx| {
        if one.is_none() {
            if let Poll::Ready(value) = first.as_mut().poll(cx) {
                one = Some(value);
            }
        }
        if two.is_none() {
            if let Poll::Ready(value) = second.as_mut().poll(cx) {
                two = Some(value);
            }
        }
        match (one.take(), two.take()) {
            (Some(one), Some(two)) => Poll::Ready((one, two)),
            (left, right) => {
                (one, two) = (left, right);
                Poll::Pending
            }
        }
    })
    .await
}
