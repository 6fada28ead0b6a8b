// SPDX-License-Identifier: MIT OR Apache-2.0
//! Names of guests, which only xenstore has.
//!
//! A name is never worth a wait: a xenstore that hangs costs a second, and a domain that may not see the names of others,
//! such as a driver domain, shows numbers.

use super::Host;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// The socket of a xenstored in this domain, and the device that leads to one in another domain.
const SOCKET: &str = "/run/xenstored/socket";
const DEVICE: &str = "/dev/xen/xenbus";
/// Longest time in which names are waited for.
const LIMIT: Duration = Duration::from_secs(1);

/// Numbers of messages: the question for a value, and the answer that something is wrong.
const READ: u32 = 2;
const ERROR: u32 = 16;
/// Length of a message without its content, and of the longest content.
const HEAD: usize = 16;
const MAX: usize = 4096;

/// Names of guests by their numbers, as far as xenstore tells them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct GuestNames {
    names: BTreeMap<u32, String>,
    /// Reason why a name is missing, if one is.
    pub(crate) why: Option<String>,
}

impl GuestNames {
    /// Asks for the names of these guests. Never fails, and takes a second at most.
    pub(crate) fn read(host: &Host, guests: impl IntoIterator<Item = u32>) -> GuestNames {
        let guests: BTreeSet<u32> = guests.into_iter().collect();
        let mut told = GuestNames::default();
        if guests.is_empty() {
            return told;
        }
        let Some(turn) = QueryTurn::take(&host.asks_names) else {
            told.why = Some("xenstore has not answered the last question yet".into());
            return told;
        };
        let (to, answers) = mpsc::channel();
        let paths = (host.path(SOCKET), host.path(DEVICE));
        let limit = Instant::now() + LIMIT;
        thread::spawn(move || {
            let _turn = turn;
            ask(&paths, guests, &to);
        });
        loop {
            let left = limit.saturating_duration_since(Instant::now());
            match answers.recv_timeout(left) {
                Ok(Ok((guest, name))) => drop(told.names.insert(guest, name)),
                Ok(Err(why)) => told.why = Some(why),
                Err(mpsc::RecvTimeoutError::Disconnected) => return told,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    told.why = Some("xenstore does not answer".into());
                    return told;
                }
            }
        }
    }

    /// The names that an earlier question got.
    pub(crate) fn of(names: impl IntoIterator<Item = (u32, String)>) -> GuestNames {
        GuestNames {
            names: names.into_iter().collect(),
            why: None,
        }
    }

    /// Returns the name of a guest.
    pub(crate) fn get(&self, guest: u32) -> Option<&str> {
        self.names.get(&guest).map(String::as_str)
    }

    /// Returns the name of a guest that no other guest has.
    pub(crate) fn unique(&self, guest: u32) -> Option<&str> {
        let name = self.get(guest)?;
        let others = self.names.values().filter(|other| *other == name);
        (others.count() == 1).then_some(name)
    }

    /// Returns the word by which a command line names a guest: its name if that says which one, else its number.
    pub(crate) fn typed(&self, guest: u32) -> String {
        // A name of digits alone would be taken for a number.
        let name = self
            .unique(guest)
            .filter(|name| name.parse::<u32>().is_err());
        name.map_or_else(|| guest.to_string(), str::to_owned)
    }
}

#[cfg(test)]
impl<const COUNT: usize> From<[(u32, &str); COUNT]> for GuestNames {
    fn from(names: [(u32, &str); COUNT]) -> GuestNames {
        GuestNames::of(names.map(|(guest, name)| (guest, name.into())))
    }
}

/// The right to ask, which one thread has: a xenstore that hangs does not get a thread for each picture of `top`.
struct QueryTurn(Arc<AtomicBool>);

impl QueryTurn {
    fn take(taken: &Arc<AtomicBool>) -> Option<QueryTurn> {
        let was = taken.swap(true, Ordering::AcqRel);
        (!was).then(|| QueryTurn(taken.clone()))
    }
}

impl Drop for QueryTurn {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Sends the name of each guest, or why there is none.
fn ask(
    (socket, device): &(PathBuf, PathBuf),
    guests: BTreeSet<u32>,
    to: &mpsc::Sender<Result<(u32, String), String>>,
) {
    let tell = |answer| to.send(answer).is_ok();
    let mut store: Box<dyn StoreStream> = match connect(socket, device) {
        Ok(store) => store,
        Err(error) => {
            tell(Err(format!("cannot reach xenstore: {error}")));
            return;
        }
    };
    for (id, guest) in (1..).zip(guests) {
        let goes_on = match value(&mut *store, id, &format!("/local/domain/{guest}/name")) {
            Ok(Ok(name)) if name.is_empty() => true,
            Ok(Ok(name)) => tell(Ok((guest, name))),
            Ok(Err(why)) => tell(Err(format!(
                "xenstore does not tell the name of domain {guest}: {why}"
            ))),
            Err(error) => {
                tell(Err(format!("cannot ask xenstore: {error}")));
                false
            }
        };
        if !goes_on {
            return;
        }
    }
}

/// A connection.
trait StoreStream: Read + Write {}

impl<T: Read + Write> StoreStream for T {}

fn connect(socket: &PathBuf, device: &PathBuf) -> io::Result<Box<dyn StoreStream>> {
    match UnixStream::connect(socket) {
        Ok(stream) => {
            stream.set_read_timeout(Some(LIMIT))?;
            stream.set_write_timeout(Some(LIMIT))?;
            Ok(Box::new(stream))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let opened = OpenOptions::new().read(true).write(true).open(device);
            Ok(Box::new(opened?))
        }
        Err(error) => Err(error),
    }
}

/// Asks for the value of a key; the inner error is xenstore's answer.
fn value(store: &mut dyn StoreStream, id: u32, path: &str) -> io::Result<Result<String, String>> {
    let length = u32::try_from(path.len() + 1).map_err(io::Error::other)?;
    let mut message: Vec<u8> = [READ, id, 0, length]
        .into_iter()
        .flat_map(u32::to_ne_bytes)
        .collect();
    message.extend(path.bytes());
    message.push(0);
    store.write_all(&message)?;
    let mut head = [0; HEAD];
    store.read_exact(&mut head)?;
    let mut words = head
        .chunks_exact(4)
        .filter_map(|word| Some(u32::from_ne_bytes(word.try_into().ok()?)));
    let mut next = || words.next().unwrap_or(0);
    let (kind, its, _, length) = (next(), next(), next(), next());
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if length > MAX || its != id {
        return Err(io::Error::other("the answer is not understood"));
    }
    let mut content = vec![0; length];
    store.read_exact(&mut content)?;
    let text = String::from_utf8_lossy(&content);
    let text = text.trim_end_matches('\0').to_owned();
    Ok(match kind {
        READ => Ok(text),
        ERROR => Err(text),
        other => Err(format!("answer {other}")),
    })
}

#[cfg(test)]
pub(crate) mod fake {
    //! A xenstored that knows names of guests.

    use super::{ERROR, HEAD, READ, SOCKET};
    use crate::host::made::Made;
    use std::fs;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;
    use std::thread;

    /// Answers at a host's socket as long as the test runs.
    pub(crate) fn serve(made: &Made, names: &[(u32, &str)]) {
        let path = made.host().path(SOCKET);
        fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        let listener = UnixListener::bind(path).expect("a socket");
        let names: Vec<(String, String)> = names
            .iter()
            .map(|(guest, name)| (format!("/local/domain/{guest}/name\0"), (*name).into()))
            .collect();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.expect("a caller");
                let mut head = [0; HEAD];
                while stream.read_exact(&mut head).is_ok() {
                    let mut path = vec![0; usize::from(head[12])];
                    stream.read_exact(&mut path).expect("the rest");
                    let known = names.iter().find(|(key, _)| key.as_bytes() == path);
                    let (kind, text) = match known {
                        Some((_, name)) => (READ, name.as_str()),
                        None => (ERROR, "ENOENT\0"),
                    };
                    let length = u32::try_from(text.len()).expect("short");
                    head[..4].copy_from_slice(&kind.to_ne_bytes());
                    head[12..].copy_from_slice(&length.to_ne_bytes());
                    stream.write_all(&head).expect("answered");
                    stream.write_all(text.as_bytes()).expect("answered");
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::{fake, GuestNames, LIMIT, SOCKET};
    use crate::host::made::Made;
    use std::fs;
    use std::os::unix::net::UnixListener;
    use std::time::Instant;

    #[test]
    fn names_are_read_and_a_missing_one_is_explained() {
        let made = Made::new();
        fake::serve(&made, &[(0, "Domain-0"), (3, "web"), (4, "web"), (5, "7")]);
        let names = GuestNames::read(&made.host(), [0, 3, 4, 5, 9]);
        assert_eq!((names.get(3), names.get(9)), (Some("web"), None));
        assert_eq!((names.unique(0), names.unique(3)), (Some("Domain-0"), None));
        let why = names.why.as_deref().unwrap_or_default();
        assert!(why.contains("domain 9: ENOENT"), "{why}");
        let typed = [0, 3, 5, 9].map(|guest| names.typed(guest));
        assert_eq!(typed, ["Domain-0", "3", "5", "9"]);
    }

    #[test]
    fn without_xenstore_and_beside_one_that_hangs_there_are_no_names() {
        let made = Made::new();
        assert_eq!(GuestNames::read(&made.host(), []).why, None);
        let none = GuestNames::read(&made.host(), [3]);
        assert!(none.why.is_some_and(|why| why.contains("cannot reach")));
        let path = made.host().path(SOCKET);
        fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        let _silent = UnixListener::bind(path).expect("a socket");
        let (host, begun) = (made.host(), Instant::now());
        let hung = GuestNames::read(&host, [3]);
        assert!(hung.why.is_some() && hung.get(3).is_none());
        assert!(begun.elapsed() < LIMIT * 5, "{:?}", begun.elapsed());
    }
}
