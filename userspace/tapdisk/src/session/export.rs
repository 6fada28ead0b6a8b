// SPDX-License-Identifier: MIT OR Apache-2.0
//! Opening the disk of an export. The supervisor makes the connections, and opens the files that prove the identity of
//! both ends.

use super::image::Parts;
use crate::FdBroker;
use control::tapdisk::RequestedFile;
use control::{Export, Failure, Listener, Target, TlsFile};
use drivers::nbd::{self, Credentials, Nbd};
use drivers::{Disk, DiskInfo};
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::rc::Rc;

/// Bytes of a file of certificates at most: those of all authorities that a distribution knows are less.
const MOST: u64 = 1 << 20;

impl Parts<'_> {
    /// The disk that a server has.
    pub(super) async fn export(&self, export: &Export) -> Result<(Disk, DiskInfo), Failure> {
        let open = self.open;
        if !open.may_ask {
            return Err(Failure::unsupported(format!(
                "{export} is behind a connection, which only a supervisor makes: let blktapctrl serve it"
            )));
        }
        let server = Server {
            needs: self.session.needs.clone(),
            target: open.target.clone(),
        };
        let (settle, unflushed) = self.session.exports.get().unwrap_or_else(|| {
            let settle = match export.socket() {
                Some(_) => nbd::RetryTimes::default(),
                None => nbd::RetryTimes::network(),
            };
            (settle, nbd::UNFLUSHED)
        });
        let options = nbd::Options {
            export: export.name().to_owned(),
            name: export.to_string(),
            writable: !open.read_only && !self.looks,
            tls: must_prove(&open.target)?,
            settle,
            unflushed,
        };
        let disk = Nbd::new(&self.session.runtime, server, options);
        drivers::activate(Disk::new(disk), open).await
    }
}

/// Returns the host name that a server's certificate must have, if it needs one.
fn must_prove(target: &Target) -> Result<Option<String>, Failure> {
    match (target.tls(), target.export().map(Export::listener)) {
        (None, _) => Ok(None),
        (Some(_), Some(Listener::Tcp { host, .. })) => Ok(Some(host.clone())),
        (Some(_), _) => Err(Failure::invalid(format!(
            "{target} has no host whose certificate could be looked at"
        ))),
    }
}

/// Factory of connections to a server, which the supervisor makes.
#[derive(Debug)]
struct Server {
    needs: Rc<FdBroker>,
    target: Target,
}

impl Server {
    /// The content of a file.
    async fn content(&self, file: TlsFile) -> Result<Vec<u8>, Failure> {
        let target = self.target.clone();
        let given = self
            .needs
            .ask(RequestedFile::Credential { target, file })
            .await?;
        let mut content = Vec::new();
        let read = File::from(given.fd)
            .take(MOST + 1)
            .read_to_end(&mut content);
        let name = || format!("the file of {}= of {}", file.word(), self.target);
        match read {
            Err(error) => Err(Failure::system(format!("cannot read {}", name()), &error)),
            // CAST: it is in memory.
            Ok(len) if len as u64 > MOST => Err(Failure::invalid(format!(
                "{} has more than {MOST} bytes, as no file of certificates has",
                name()
            ))),
            Ok(_) => Ok(content),
        }
    }
}

impl nbd::Connect for Server {
    async fn connect(&self) -> Result<OwnedFd, Failure> {
        let target = self.target.clone();
        let given = self.needs.ask(RequestedFile::Server { target }).await?;
        Ok(given.fd)
    }

    async fn credentials(&self) -> Result<Credentials, Failure> {
        let authorities = self.content(TlsFile::Authorities).await?;
        let own = match self.target.tls().is_some_and(|tls| tls.has_own()) {
            true => Some((
                self.content(TlsFile::Certificate).await?,
                self.content(TlsFile::Key).await?,
            )),
            false => None,
        };
        Ok(Credentials { authorities, own })
    }
}
