// SPDX-License-Identifier: MIT OR Apache-2.0
//! Requests to a tapdisk.

use super::system::is_gone;
use super::{Process, SOON};
use crate::rpc_client::{unexpected, RpcClient};
use control::stats::Stats;
use control::tapdisk::{self, Reply, Request, Status};
use control::{Code, Failure};
use std::os::fd::BorrowedFd;
use std::time::Duration;

impl Process {
    /// One more connection to it, for questions whose answers take their time.
    ///
    /// # Errors
    /// It does not listen any more.
    pub async fn another_link(&self) -> Result<RpcClient, Failure> {
        let socket = self.socket.borrow().clone().unwrap_or_default();
        RpcClient::connect(&socket).await.map_err(|error| {
            let what = format!("cannot connect to {}", socket.display());
            match is_gone(&error) {
                true => Failure::new(Code::Gone, format!("{what}: {error}")),
                false => Failure::system(what, &error),
            }
        })
    }

    /// Asks it, one question at a time.
    ///
    /// # Errors
    /// The failure that it reports, or that it does not answer.
    pub async fn ask(
        &self,
        question: &Request,
        fds: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<Reply, Failure> {
        let late = || {
            Failure::new(
                Code::Timeout,
                format!(
                    "tapdisk {} has not answered an earlier question yet",
                    self.pid()
                ),
            )
        };
        let mut place = tokio::time::timeout(limit, self.link.lock())
            .await
            .map_err(|_| late())?;
        let mut link = match place.take() {
            Some(link) => link,
            None => {
                let socket = self.socket.borrow().clone().unwrap_or_default();
                RpcClient::connect(&socket).await.map_err(|error| {
                    let what = format!("cannot ask tapdisk {}", self.pid());
                    Failure::new(Code::Gone, format!("{what}: {error}"))
                })?
            }
        };
        let answer = link.ask(question, fds, limit).await;
        if link.is_whole() {
            *place = Some(link);
        }
        answer
    }

    /// The program that the process names.
    ///
    /// # Errors
    /// It says nothing, or speaks another version of the protocol.
    pub async fn introduce(&self, limit: Duration) -> Result<tapdisk::Process, Failure> {
        // On a connection of its own: who has just been started may take its time.
        let asked = async {
            let mut link = self.another_link().await?;
            link.ask(&Request::Ping, &[], limit).await
        };
        match asked.await? {
            Reply::Process(what) => {
                self.version.replace(Some(what.program.clone()));
                Ok(what)
            }
            reply => Err(unexpected(&reply)),
        }
    }

    /// Asks for its status.
    ///
    /// # Errors
    /// It says nothing, or something else.
    pub async fn status(&self) -> Result<Status, Failure> {
        match self.ask(&Request::Status, &[], SOON).await? {
            Reply::Status(status) => Ok(*status),
            reply => Err(unexpected(&reply)),
        }
    }

    /// Asks for its counters.
    ///
    /// # Errors
    /// It says nothing, or something else.
    pub async fn stats(&self, limit: Duration) -> Result<Box<Stats>, Failure> {
        match self.ask(&Request::Stats, &[], limit).await? {
            Reply::Stats(stats) => Ok(stats),
            reply => Err(unexpected(&reply)),
        }
    }

    /// Has it read all data of its disk, at so many bytes in a second; 0 ends that.
    ///
    /// # Errors
    /// It says nothing, or it does not serve a disk.
    pub async fn scrub(&self, rate: u64) -> Result<(), Failure> {
        self.tell(&Request::Scrub { rate }, None, SOON).await
    }

    /// Has it do something, perhaps with a descriptor.
    ///
    /// # Errors
    /// It does not, or does not say so in time.
    pub async fn tell(
        &self,
        what: &Request,
        fd: Option<BorrowedFd<'_>>,
        limit: Duration,
    ) -> Result<(), Failure> {
        let fds: Vec<_> = fd.into_iter().collect();
        match self.ask(what, &fds, limit).await? {
            Reply::Done => Ok(()),
            reply => Err(unexpected(&reply)),
        }
    }
}
