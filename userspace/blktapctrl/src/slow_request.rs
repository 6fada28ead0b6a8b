// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reports a request that takes long once, and once again when that is over.

use control::supervisor::Kernel;
use std::cell::Cell;
use std::time::Duration;

/// How long a request may take before it is reported.
const LONG: Duration = Duration::from_secs(30);

/// The reported slow request of a disk.
#[derive(Debug, Default)]
pub struct SlowRequest(Cell<Option<ReportedRequest>>);

#[derive(Clone, Copy, Debug)]
struct ReportedRequest {
    /// Process that has it.
    pid: u32,
    /// How old it was when it was looked at last.
    age: Duration,
    /// Requests that were answered by then.
    committed: u64,
}

/// News to report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum News {
    /// The process has had one for so long.
    Takes { pid: u32, age: Duration },
    /// The process answered the request.
    Answered { pid: u32, age: Duration },
    /// The process has not answered it, and has it no more.
    Returned { pid: u32, age: Duration },
}

impl SlowRequest {
    /// Looks at what the kernel says of the oldest request, and who has it.
    pub(crate) fn look(&self, pid: Option<u32>, now: &Kernel) -> Vec<News> {
        let mut news = Vec::new();
        let age = Duration::from_nanos(now.oldest_ns);
        if let Some(ReportedRequest {
            pid: its,
            age: was,
            committed,
        }) = self.0.get()
        {
            if pid == Some(its) && age >= was {
                self.0.set(Some(ReportedRequest {
                    pid: its,
                    age,
                    committed: now.committed,
                }));
                return news;
            }
            self.0.set(None);
            let is_answered = pid == Some(its) && now.committed > committed;
            news.push(match is_answered {
                true => News::Answered { pid: its, age: was },
                false => News::Returned { pid: its, age: was },
            });
        }
        if let Some(pid) = pid.filter(|_| age >= LONG) {
            let committed = now.committed;
            self.0.set(Some(ReportedRequest {
                pid,
                age,
                committed,
            }));
            news.push(News::Takes { pid, age });
        }
        news
    }
}

#[cfg(test)]
mod tests {
    use super::{News, SlowRequest};
    use control::supervisor::Kernel;
    use std::time::Duration;

    fn at(seconds: u64, committed: u64) -> Kernel {
        Kernel {
            oldest_ns: seconds * 1_000_000_000,
            committed,
            ..Kernel::default()
        }
    }

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn it_is_said_once_and_once_again_when_it_ends() {
        let slow = SlowRequest::default();
        let pid = 7;
        assert_eq!(slow.look(Some(pid), &at(29, 5)), []);
        let takes = |age| News::Takes { pid, age };
        assert_eq!(slow.look(Some(pid), &at(30, 5)), [takes(s(30))]);
        // Others are answered meanwhile.
        assert_eq!(slow.look(Some(pid), &at(35, 9)), []);
        assert_eq!(slow.look(Some(pid), &at(40, 9)), []);
        let answered = |age| News::Answered { pid, age };
        assert_eq!(slow.look(Some(pid), &at(0, 10)), [answered(s(40))]);
        assert_eq!(slow.look(Some(pid), &at(0, 10)), []);
        // One follows the other.
        assert_eq!(slow.look(Some(pid), &at(50, 10)), [takes(s(50))]);
        let both = [answered(s(50)), takes(s(31))];
        assert_eq!(slow.look(Some(pid), &at(31, 11)), both);
    }

    #[test]
    fn a_process_that_leaves_takes_its_request_along() {
        let slow = SlowRequest::default();
        let takes = |pid| News::Takes { pid, age: s(30) };
        let returned = |pid| News::Returned { pid, age: s(30) };
        assert_eq!(slow.look(Some(7), &at(30, 5)), [takes(7)]);
        assert_eq!(slow.look(None, &at(0, 5)), [returned(7)]);
        assert_eq!(slow.look(Some(8), &at(30, 5)), [takes(8)]);
        // It is paused: nothing was answered.
        assert_eq!(slow.look(Some(8), &at(0, 5)), [returned(8)]);
        // The next process has an old one as well.
        assert_eq!(slow.look(Some(8), &at(30, 5)), [takes(8)]);
        assert_eq!(slow.look(Some(9), &at(30, 5)), [returned(8), takes(9)]);
    }
}
