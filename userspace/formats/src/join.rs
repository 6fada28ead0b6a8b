// SPDX-License-Identifier: MIT OR Apache-2.0
//! Several things at the same time.

use diskio::Errno;
use std::future::{poll_fn, Future};
use std::pin::{pin, Pin};
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

/// Waits until all of them are over, and says whether one failed. None is dropped while its I/O is under
/// way.
pub(crate) async fn all<F>(steps: Vec<F>) -> Result<(), Errno>
where
    F: Future<Output = Result<(), Errno>>,
{
    let mut steps: Vec<Option<Pin<Box<F>>>> =
        steps.into_iter().map(|step| Some(Box::pin(step))).collect();
    let mut failed = None;
    poll_fn(|cx| {
        let mut pending = false;
        for place in &mut steps {
            let Some(step) = place else { continue };
            match step.as_mut().poll(cx) {
                Poll::Pending => pending = true,
                Poll::Ready(result) => {
                    *place = None;
                    failed = failed.or(result.err());
                }
            }
        }
        match pending {
            true => Poll::Pending,
            false => Poll::Ready(failed.map_or(Ok(()), Err)),
        }
    })
    .await
}
