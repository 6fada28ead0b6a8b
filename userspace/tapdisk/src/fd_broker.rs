// SPDX-License-Identifier: MIT OR Apache-2.0
//! Asks the supervisor for files that this process cannot open: the supervisor decides, and sends a descriptor.

use crate::io_errors::wait;
use control::tapdisk::{FdGrant, FdRequest, RequestedFile};
use control::{Changed, Failure, Mark};
use std::cell::RefCell;
use std::future::poll_fn;
use std::os::fd::OwnedFd;
use std::task::{Poll, Waker};

/// Descriptor that the supervisor has given.
#[derive(Debug)]
pub struct Given {
    /// Descriptor.
    pub fd: OwnedFd,
    /// True if it must be locked, as the image is.
    pub lock: bool,
    /// The number by which the kernel knows it.
    pub backing: Option<u16>,
}

/// Answer of the supervisor.
#[derive(Debug)]
enum SupervisorAnswer {
    Given(Given),
    Marks(Vec<Mark>),
    Changed(Changed),
}

/// Open question.
#[derive(Debug)]
struct OpenQuestion {
    need: FdRequest,
    answer: Option<Result<SupervisorAnswer, Failure>>,
    waker: Option<Waker>,
}

#[derive(Debug, Default)]
struct NeedState {
    last: u64,
    asked: Vec<OpenQuestion>,
    /// Supervisors that wait for needs.
    listening: Vec<Waker>,
}

/// Open questions of this process to the supervisor.
#[derive(Debug, Default)]
pub struct FdBroker(RefCell<NeedState>);

impl FdBroker {
    /// Asks the supervisor for a file, and waits for the answer. A supervisor that starts during the wait gets the
    /// question, too.
    ///
    /// # Errors
    /// The supervisor refuses, with its reason.
    pub async fn ask(&self, what: RequestedFile) -> Result<Given, Failure> {
        match self.answer(what).await? {
            SupervisorAnswer::Given(given) => Ok(given),
            other => Err(something_else(&other)),
        }
    }

    /// The marks of the disk.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub(crate) async fn marks(&self) -> Result<Vec<Mark>, Failure> {
        match self.answer(RequestedFile::Marks).await? {
            SupervisorAnswer::Marks(marks) => Ok(marks),
            other => Err(something_else(&other)),
        }
    }

    /// Asks for the ranges of a disk of `size` bytes that have changed since a mark, from byte `from` on.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub(crate) async fn changed(
        &self,
        mark: u64,
        size: u64,
        from: u64,
    ) -> Result<Changed, Failure> {
        match self
            .answer(RequestedFile::Changed { mark, size, from })
            .await?
        {
            SupervisorAnswer::Changed(changed) if changed.mark == mark => Ok(changed),
            other => Err(something_else(&other)),
        }
    }

    async fn answer(&self, what: RequestedFile) -> Result<SupervisorAnswer, Failure> {
        let number = self.add(what);
        // If the caller stops waiting for the answer, the question is withdrawn.
        let _withdrawn = QuestionGuard(self, number);
        poll_fn(|cx| self.poll(number, cx.waker())).await
    }

    fn add(&self, what: RequestedFile) -> u64 {
        let mut state = self.0.borrow_mut();
        state.last += 1;
        let number = state.last;
        state.asked.push(OpenQuestion {
            need: FdRequest { number, what },
            answer: None,
            waker: None,
        });
        for waker in state.listening.drain(..) {
            waker.wake();
        }
        number
    }

    fn poll(&self, number: u64, waker: &Waker) -> Poll<Result<SupervisorAnswer, Failure>> {
        let mut state = self.0.borrow_mut();
        let asked = state.asked.iter_mut().find(|a| a.need.number == number);
        match asked {
            Some(asked) => match asked.answer.take() {
                Some(answer) => Poll::Ready(answer),
                None => {
                    asked.waker = Some(waker.clone());
                    Poll::Pending
                }
            },
            None => Poll::Ready(Err(Failure::invalid("the question for that was withdrawn"))),
        }
    }

    /// Waits until there is a need with a higher number than `after` that has no answer; all of those.
    pub async fn after(&self, after: u64) -> Vec<FdRequest> {
        poll_fn(|cx| {
            let mut state = self.0.borrow_mut();
            let open = state.asked.iter().filter(|asked| asked.answer.is_none());
            let new = open.filter(|asked| asked.need.number > after);
            let needs: Vec<FdRequest> = new.map(|asked| asked.need.clone()).collect();
            if needs.is_empty() {
                wait(&mut state.listening, cx.waker());
                return Poll::Pending;
            }
            Poll::Ready(needs)
        })
        .await
    }

    /// The supervisor has decided.
    ///
    /// # Errors
    /// The descriptor is missing.
    pub fn provide(
        &self,
        number: u64,
        provided: FdGrant,
        fd: Option<OwnedFd>,
        backing: Option<u16>,
    ) -> Result<(), Failure> {
        let missing = || Failure::invalid("the descriptor of what is provided is missing");
        let given = |fd: Option<OwnedFd>, lock| {
            Ok::<_, Failure>(SupervisorAnswer::Given(Given {
                fd: fd.ok_or_else(missing)?,
                lock,
                backing,
            }))
        };
        let answer = match provided {
            FdGrant::Refused(failure) => Err(failure),
            FdGrant::Locked => Ok(given(fd, true)?),
            FdGrant::Shared => Ok(given(fd, false)?),
            FdGrant::Marks(marks) => Ok(SupervisorAnswer::Marks(marks)),
            FdGrant::Changed(changed) => Ok(SupervisorAnswer::Changed(changed)),
        };
        let mut state = self.0.borrow_mut();
        let asked = state.asked.iter_mut().find(|a| a.need.number == number);
        // Two supervisors may answer, or the caller may have stopped waiting: only the first answer counts.
        if let Some(asked) = asked.filter(|asked| asked.answer.is_none()) {
            asked.answer = Some(answer);
            if let Some(waker) = asked.waker.take() {
                waker.wake();
            }
        }
        Ok(())
    }
}

fn something_else(answer: &SupervisorAnswer) -> Failure {
    Failure::invalid(format!("an answer to something else: {answer:?}"))
}

/// Withdraws a question when its caller stops waiting.
struct QuestionGuard<'a>(&'a FdBroker, u64);

impl Drop for QuestionGuard<'_> {
    fn drop(&mut self) {
        let mut state = self.0 .0.borrow_mut();
        state.asked.retain(|asked| asked.need.number != self.1);
    }
}
