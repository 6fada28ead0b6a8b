// SPDX-License-Identifier: MIT OR Apache-2.0
//! Clients that have an image of Ceph, and how one of them is fenced off. The cluster itself decides who writes: this
//! asks it by its own programs, `rbd` and `ceph`, with the user and the key of the disk's target.
//!
//! A client that may write has a *watch* on the image, which ends half a minute after its host has died, and usually the
//! image's lock, which stays. A client on the cluster's blocklist writes nothing any more, whatever it has.

use crate::program;
use control::{Code, Failure};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// The kernel's mappings of this host.
const MAPPINGS: &str = "/sys/bus/rbd/devices";
/// Limit for each program.
const LIMIT: Duration = Duration::from_secs(30);
/// The watch of a fenced client ends at once if its connection stands, else half a minute later.
const WATCH_ENDS: Duration = Duration::from_secs(60);
/// Seconds for which a client is fenced. Ceph's default is an hour, and a host that was suspended may wake up later. A
/// client that was mapped anew has another address, so this may be long.
const FENCED: &str = "2592000";

/// An image of Ceph, and how its cluster is reached.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct CephImage {
    /// Options of `rbd` and `ceph`.
    access: Vec<String>,
    /// `POOL/IMAGE` or `POOL/NAMESPACE/IMAGE`.
    name: String,
}

/// A client of the cluster, which is a mapping of a kernel or a program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct CephClient {
    /// Its number in the cluster, by which a break names it.
    client: u64,
    /// Its address, by which the cluster fences it.
    address: String,
    /// Whether it has the image's lock; it can get that from another one that is alive.
    has_lock: bool,
    /// Whether it is a mapping of this host.
    is_here: bool,
}

/// A client that was fenced.
#[derive(Debug, Serialize)]
pub(super) struct BrokenCephLock {
    /// Always `free`.
    pub(super) state: &'static str,
    /// The client, which has the image no more.
    pub(super) was: CephClient,
}

/// Holders of an image.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub(super) enum CephView {
    /// Clients have it open for writing.
    Held {
        /// These are the clients, of which one has the lock.
        clients: Vec<CephClient>,
    },
    /// No client has it, and the next one gets it.
    Free {
        /// This client has left its lock, as a dead one does.
        last: Option<CephClient>,
    },
}

/// Part of the answer of `rbd status`.
#[derive(Deserialize)]
struct ImageStatus {
    watchers: Vec<ImageWatcher>,
}

#[derive(Deserialize)]
struct ImageWatcher {
    address: String,
    client: u64,
}

/// Part of the answer of `rbd lock ls`.
#[derive(Deserialize)]
struct ImageLock {
    id: String,
    locker: String,
    address: String,
}

impl ImageLock {
    /// The number of its client. Locks with other identifiers are not those of writers: an administrator has made them.
    fn client(&self) -> Option<u64> {
        let number = self.locker.strip_prefix("client.")?.parse().ok()?;
        self.id.starts_with("auto ").then_some(number)
    }
}

impl CephImage {
    /// Returns the image of a target `rbd:...`, before which its options may be; nothing for a target of another kind.
    pub(super) fn of_target(target: &str) -> Option<Result<CephImage, Failure>> {
        let mut rest = target.strip_prefix("tap:").unwrap_or(target);
        let mut access = Vec::new();
        while !rest.starts_with("rbd:") {
            let (word, after) = rest.split_once(',')?;
            let (name, value) = word.split_once('=')?;
            match name {
                "conf" | "id" | "keyring" => access.extend([format!("--{name}"), value.into()]),
                // Options of the kernel's client, which have commas as well.
                "options" => {
                    rest = &rest[rest.find(",rbd:")? + 1..];
                    continue;
                }
                _ => return None,
            }
            rest = after;
        }
        let name = rest.strip_prefix("rbd:")?.to_owned();
        Some(checked(&name).map(|()| CephImage { access, name }))
    }

    /// Runs a program with the target's user, and returns its output.
    fn ask(&self, program: &str, words: &[&str]) -> Result<String, Failure> {
        let mut line = vec![program];
        line.extend(self.access.iter().map(String::as_str));
        line.extend(words);
        let said = program::output(&line, LIMIT).map_err(|error| {
            Failure::new(Code::System, format!("cannot run {program}: {error}"))
        })?;
        if said.status.success() {
            return Ok(String::from_utf8_lossy(&said.stdout).into_owned());
        }
        let complaint = String::from_utf8_lossy(&said.stderr);
        let is_option = |word: &&str| word.starts_with("--");
        let verb = words.iter().copied().skip_while(is_option);
        let verb: Vec<&str> = verb.take_while(|word| !is_option(word)).take(2).collect();
        let verb = verb.join(" ");
        Err(self.failed(said.status.code(), &format!("{program} {verb}"), &complaint))
    }

    /// Returns the failure of a program with this status and these words.
    fn failed(&self, status: Option<i32>, doing: &str, complaint: &str) -> Failure {
        let name = &self.name;
        let lines = complaint.lines().filter(|line| !line.trim().is_empty());
        let lines: Vec<&str> = lines.collect();
        // The last line may only say that there is no connection, and the one before it why.
        let reason = match lines.len() {
            0 => "it gave no reason".into(),
            count => lines[count.saturating_sub(2)..].join("; "),
        };
        let failed = format!("{doing} of rbd:{name} failed: {reason}");
        let (code, why) = match status {
            Some(124 | 137) => (
                Code::Timeout,
                format!("the cluster of rbd:{name} did not answer in {} s: see `ceph -s`, and the network to its monitors", LIMIT.as_secs()),
            ),
            Some(127) => (
                Code::System,
                format!("{doing}: the program is not installed: `apt install ceph-common`"),
            ),
            Some(2) if reason.contains("error opening") => (Code::NotFound, failed),
            Some(1 | 13) => (
                Code::Denied,
                format!("{failed}; the user and the key are those in front of rbd: (id=, keyring=)"),
            ),
            _ => (Code::System, failed),
        };
        Failure::new(code, why)
    }

    fn ask_json<T: for<'a> Deserialize<'a>>(&self, words: &[&str]) -> Result<T, Failure> {
        let text = self.ask("rbd", &[words, &["--format", "json", &self.name]].concat())?;
        serde_json::from_str(&text).map_err(|error| {
            let why = format!("rbd {} answers {text:?}: {error}", words.join(" "));
            Failure::new(Code::System, why)
        })
    }

    fn locks(&self) -> Result<Vec<ImageLock>, Failure> {
        self.ask_json(&["lock", "ls"])
    }

    /// Returns who has the image.
    pub(super) fn inspect(&self) -> Result<CephView, Failure> {
        let status: ImageStatus = self.ask_json(&["status"])?;
        let here = self.own_clients(Path::new(MAPPINGS));
        Ok(view(status.watchers, &self.locks()?, &here))
    }

    /// Returns the clients of this host's mappings of the image.
    fn own_clients(&self, mappings: &Path) -> Vec<u64> {
        // Without the module there is no folder. A mapping may go at any moment.
        let entries = fs::read_dir(mappings).into_iter().flatten().flatten();
        let read = |folder: &Path, file: &str| -> Option<String> {
            let text = fs::read_to_string(folder.join(file)).ok()?;
            Some(text.trim().to_owned())
        };
        let client = |folder: &Path| {
            let mut parts = vec![read(folder, "pool")?];
            parts.extend(read(folder, "pool_ns").filter(|it| !it.is_empty()));
            parts.push(read(folder, "name")?);
            let client = read(folder, "client_id")?;
            let number = client.strip_prefix("client")?.parse().ok()?;
            (parts.join("/") == self.name).then_some(number)
        };
        entries.filter_map(|it| client(&it.path())).collect()
    }

    /// Fences a client whose host is dead, as the administrator says, and takes the image's lock from it. Should it
    /// live, all its writes fail from then on: those of all disks that share its connection to the cluster.
    pub(super) fn break_off(&self, client: u64) -> Result<CephClient, Failure> {
        let holder = self.holder(client)?;
        self.ask(
            "ceph",
            &["osd", "blocklist", "add", &holder.address, FENCED],
        )?;
        self.wait_unwatched(client)?;
        let locks = self.locks()?;
        if let Some(lock) = locks.iter().find(|lock| lock.client() == Some(client)) {
            // rbd would fence it once more, for an hour only.
            let keep = "--rbd-blocklist-on-break-lock=false";
            self.ask(
                "rbd",
                &[keep, "lock", "rm", &self.name, &lock.id, &lock.locker],
            )?;
        }
        Ok(holder)
    }

    /// Returns the client with this number, if it has the image or has left its lock.
    fn holder(&self, client: u64) -> Result<CephClient, Failure> {
        let name = &self.name;
        let all = match self.inspect()? {
            CephView::Held { clients } => clients,
            CephView::Free { last } => last.into_iter().collect(),
        };
        let Some(holder) = all.iter().find(|it| it.client == client) else {
            let Some(other) = all.first() else {
                let why = format!("no client has rbd:{name}, so there is none to break");
                return Err(Failure::new(Code::NotFound, why));
            };
            let why = format!(
                "the client {client} has not rbd:{name}, but the client {} at {}",
                other.client, other.address
            );
            return Err(Failure::new(Code::Busy, why));
        };
        if holder.is_here {
            let why = format!("the client {client} is this host, which has rbd:{name} mapped: detach its disk (`xl block-detach DOMAIN VDEV`)");
            return Err(Failure::new(Code::Busy, why));
        }
        Ok(holder.clone())
    }

    fn wait_unwatched(&self, client: u64) -> Result<(), Failure> {
        let end = Instant::now() + WATCH_ENDS;
        loop {
            let status: ImageStatus = self.ask_json(&["status"])?;
            if status.watchers.iter().all(|it| it.client != client) {
                return Ok(());
            }
            if Instant::now() >= end {
                let why = format!("the client {client} is fenced, but has watched rbd:{} for {} s since: see `rbd status {}`, then give this command once more", self.name, WATCH_ENDS.as_secs(), self.name);
                return Err(Failure::new(Code::Timeout, why));
            }
            sleep(Duration::from_millis(500));
        }
    }
}

/// Refuses what is no name of an image, such as an option of a program.
fn checked(name: &str) -> Result<(), Failure> {
    let is_part = |part: &str| {
        let mut letters = part.chars();
        letters
            .next()
            .is_some_and(|it| it.is_ascii_alphanumeric() || "_.".contains(it))
            && letters.all(|it| it.is_ascii_alphanumeric() || "_.:+=~-".contains(it))
    };
    if name.contains('@') {
        let why = format!("rbd:{name} is a snapshot, which no client writes");
        return Err(Failure::invalid(why));
    }
    let parts = name.split('/').count();
    if !(2..=3).contains(&parts) || !name.split('/').all(is_part) {
        let why = format!("rbd:{name} is no POOL/IMAGE or POOL/NAMESPACE/IMAGE");
        return Err(Failure::invalid(why));
    }
    Ok(())
}

/// Joins the answers of the cluster. Clients that are `here` are this host's.
fn view(watchers: Vec<ImageWatcher>, locks: &[ImageLock], here: &[u64]) -> CephView {
    let has_lock = |client| locks.iter().any(|lock| lock.client() == Some(client));
    if watchers.is_empty() {
        let left = locks.iter().find_map(|lock| Some((lock.client()?, lock)));
        let last = left.map(|(client, lock)| CephClient {
            client,
            address: lock.address.clone(),
            has_lock: true,
            is_here: here.contains(&client),
        });
        return CephView::Free { last };
    }
    let client = |watcher: ImageWatcher| CephClient {
        has_lock: has_lock(watcher.client),
        is_here: here.contains(&watcher.client),
        client: watcher.client,
        address: watcher.address,
    };
    CephView::Held {
        clients: watchers.into_iter().map(client).collect(),
    }
}

/// Lines of words `name=value`, one for each client.
pub(super) fn show(view: &CephView) -> String {
    match view {
        CephView::Held { clients } => clients
            .iter()
            .map(|it| format!("state=held {}\n", words(it)))
            .collect(),
        CephView::Free { last: None } => "state=free\n".into(),
        CephView::Free { last: Some(last) } => format!("state=free last-{}\n", words(last)),
    }
}

/// Words about a client.
pub(super) fn words(it: &CephClient) -> String {
    let lock = if it.has_lock { "yes" } else { "no" };
    let here = if it.is_here { " here" } else { "" };
    format!(
        "client={} address={} lock={lock}{here}",
        it.client, it.address
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(target: &str) -> CephImage {
        CephImage::of_target(target).unwrap().unwrap()
    }

    #[test]
    fn words_in_front_of_an_image_reach_its_cluster() {
        let plain = image("rbd:vms/web");
        assert_eq!((plain.access.len(), plain.name.as_str()), (0, "vms/web"));
        let all = image("tap:conf=/etc/c.conf,id=xen,keyring=/etc/k,options=ms_mode=secure,noshare,rbd:vms/blue/web");
        let access = "--conf /etc/c.conf --id xen --keyring /etc/k";
        assert_eq!(
            (all.access.join(" ").as_str(), all.name.as_str()),
            (access, "vms/blue/web")
        );
        for other in [
            "aio:/srv/a,rbd:vms/web",
            "lease=record,aio:/a",
            "drbd:r0",
            "options=a",
        ] {
            assert_eq!(CephImage::of_target(other), None, "{other}");
        }
        for wrong in [
            "rbd:vms",
            "rbd:vms/--help",
            "rbd:vms/web@daily",
            "rbd:a/b/c/d",
            "rbd:/web",
        ] {
            let refused = CephImage::of_target(wrong).unwrap();
            assert_eq!(refused.unwrap_err().code, Code::Invalid, "{wrong}");
        }
    }

    /// The texts are those of a cluster of Ceph 18.2.
    fn seen(watchers: &str, locks: &str, here: &[u64]) -> CephView {
        let status: ImageStatus =
            serde_json::from_str(&format!("{{\"watchers\":[{watchers}]}}")).unwrap();
        let locks: Vec<ImageLock> = serde_json::from_str(&format!("[{locks}]")).unwrap();
        view(status.watchers, &locks, here)
    }

    const WATCHER: &str =
        r#"{"address":"10.0.0.2:0/3886477364","client":4193,"cookie":139624756286288}"#;
    const LOCK: &str =
        r#"{"id":"auto 139624756286288","locker":"client.4193","address":"10.0.0.2:0/3886477364"}"#;

    #[test]
    fn clients_are_shown_with_their_watch_and_their_lock() {
        let held = seen(WATCHER, LOCK, &[]);
        let line = "client=4193 address=10.0.0.2:0/3886477364 lock=yes";
        assert_eq!(show(&held), format!("state=held {line}\n"));
        let json = serde_json::json!(held);
        assert_eq!(json["state"], "held");
        assert_eq!(json["clients"][0]["client"], 4193);
        let ours = seen(WATCHER, "", &[4193]);
        assert!(show(&ours).ends_with(" lock=no here\n"), "{ours:?}");
        let left = seen("", LOCK, &[]);
        assert_eq!(show(&left), format!("state=free last-{line}\n"));
        assert_eq!(show(&seen("", "", &[])), "state=free\n");
        // A lock that an administrator has made by hand says nothing about writers.
        let by_hand = LOCK.replace("auto 139624756286288", "mine");
        assert_eq!(show(&seen("", &by_hand, &[])), "state=free\n");
    }

    #[test]
    fn mappings_of_this_host_are_known_by_their_image() {
        let dir = tempfile::tempdir().unwrap();
        for (id, (namespace, name, client)) in [("", "web", 7), ("blue", "web", 8), ("", "db", 9)]
            .into_iter()
            .enumerate()
        {
            let folder = dir.path().join(id.to_string());
            fs::create_dir(&folder).unwrap();
            for (file, text) in [("pool", "vms"), ("pool_ns", namespace), ("name", name)] {
                fs::write(folder.join(file), format!("{text}\n")).unwrap();
            }
            fs::write(folder.join("client_id"), format!("client{client}\n")).unwrap();
        }
        assert_eq!(image("rbd:vms/web").own_clients(dir.path()), [7]);
        assert_eq!(image("rbd:vms/blue/web").own_clients(dir.path()), [8]);
        let none = image("rbd:vms/web").own_clients(Path::new("/none"));
        assert!(none.is_empty(), "{none:?}");
    }
}
