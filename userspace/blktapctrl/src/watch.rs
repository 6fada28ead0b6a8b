// SPDX-License-Identifier: MIT OR Apache-2.0
//! Watches the backends' directories in xenstore.
//!
//! A disk goes when the directory for which it was made goes, whether or not a script says so, and the kernel serves no
//! guest from it: a xenstored that was started anew is empty, and guests run on. The kind `vbd3` (`backendtype=tap`) is
//! also served where no script of ours runs: without any script the supervisor makes the disk here; after Xen's
//! `block-tap`, which makes it with tap-ctl, the supervisor tells the driver its number.
//!
//! Other programs may serve disks of that kind too, so the driver does nothing with one before its
//! directory says that it is ours (`tap-server`). That cannot be left to the scripts: libxl runs them
//! when the driver has offered the disk.

use crate::disk::Disk;
use crate::groups::Groups;
use crate::kernel::{self, Kernel};
use crate::lifecycle::Lifecycle;
use crate::log::{tell, LogContext};
use crate::registry::Registry;
use crate::store::{self, Store, Xenstore};
use control::supervisor::{Create, Policy, Which};
use control::tapdisk::Open;
use control::{Code, Failure, Target};
use futures::StreamExt;
use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// The kind of backends that is ours even without a script.
const TAP: &str = "backend/vbd3";
/// The key of a directory of that kind that says which program serves it, and what it holds if we do.
const SERVER_KEY: &str = "tap-server";
const SERVER: &str = "blktapctrl";
/// Prefix of the names of the scripts that make a disk with tap-ctl: Xen's and ours.
const SCRIPTS: &str = "block-tap";
/// Changes when a domain has ended, or was suspended.
const RELEASED: &str = "@releaseDomain";
/// Time between the first two questions whether the kernel serves a guest, because it sends no notification of the end;
/// it doubles.
const FIRST: Duration = Duration::from_millis(20);
/// The most that it becomes.
const MOST: Duration = Duration::from_secs(1);
/// After this time it is worth a word.
const LONG: Duration = Duration::from_secs(10);
/// Where the disks of a script are.
const VBD: &str = "backend/vbd";

/// Keeps a connection to xenstore, for ever, and looks at what changes there.
pub async fn keep(lifecycle: Rc<Lifecycle>, first: Option<Xenstore>) {
    let mut connection = first;
    let mut told = false;
    loop {
        let result = match connection.take() {
            Some(store) => follow(&lifecycle, Rc::new(store)).await,
            None => match Xenstore::connect().await {
                Ok(store) => follow(&lifecycle, Rc::new(store)).await,
                Err(error) => Err(error),
            },
        };
        lifecycle.registry.use_store(None);
        match result {
            Ok(()) => {
                tell!(
                    warn,
                    LogContext::default(),
                    "the connection to xenstore has ended: connecting again"
                );
                told = false;
            }
            Err(error) if !told => {
                told = true;
                tell!(
                    warn,
                    LogContext::default().because(&error),
                    "cannot use xenstore: {error}: trying again"
                );
            }
            Err(_) => {}
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// Looks at changes until the connection ends.
///
/// # Errors
/// Xenstore refuses to be watched.
pub async fn follow(lifecycle: &Rc<Lifecycle>, store: Rc<dyn Store>) -> io::Result<()> {
    let vbd = store.watch(VBD).await?;
    let tap = store.watch(TAP).await?;
    let released = match store.watch(RELEASED).await {
        Ok(released) => released,
        // Disks are served all the same.
        Err(error) => {
            tell!(error, LogContext::default().because(&error), "it is not known when guests are suspended, so a guest that moves waits for the end of the domain that it leaves: {RELEASED} cannot be watched: {error}");
            Box::pin(futures::stream::pending())
        }
    };
    lifecycle.registry.use_store(Some(store.clone()));
    let changes = futures::stream::select(futures::stream::select(vbd, tap), released);
    let mut changes = changes.ready_chunks(1024);
    while let Some(paths) = changes.next().await {
        let mut directories = BTreeSet::new();
        // Domains that may have a group and no disks any more.
        let mut grouped = BTreeSet::new();
        for path in paths {
            if path == RELEASED {
                lifecycle.look_for_suspended();
                continue;
            }
            match store::directory(&path) {
                Some(directory) => drop(directories.insert(directory.to_owned())),
                // Something above: of a whole domain, or the first event of the watch.
                None => {
                    directories.extend(all(lifecycle, &*store).await?);
                    grouped.extend(lifecycle.groups().iter().flat_map(|groups| groups.ours()));
                }
            }
        }
        let mut domains: BTreeSet<u32> = directories
            .iter()
            .filter_map(|directory| store::domain(directory))
            .collect();
        domains.append(&mut grouped);
        for directory in directories {
            look(lifecycle, &store, &directory).await?;
        }
        if let Some(groups) = lifecycle.groups() {
            group(lifecycle, &groups, &*store, domains).await?;
        }
    }
    Ok(())
}

/// All directories that matter: those of our disks, and those that are to have one; with groups of guests those of other
/// disks, too.
async fn all(lifecycle: &Lifecycle, store: &dyn Store) -> io::Result<Vec<String>> {
    let ours = lifecycle.registry.all();
    let mut all: Vec<String> = ours
        .iter()
        .filter_map(|disk| disk.record.borrow().vbd.clone())
        .collect();
    let kinds = match lifecycle.groups() {
        Some(_) => &[TAP, VBD][..],
        None => &[TAP],
    };
    for kind in kinds {
        for domain in store.list(kind).await? {
            for device in store.list(&format!("{kind}/{domain}")).await? {
                all.push(format!("{kind}/{domain}/{device}"));
            }
        }
    }
    Ok(all)
}

/// Attempts to remove a group, with a pause between them, because its members may still be ending when its last disk
/// goes.
const TRIES: u32 = 20;
const AGAIN: Duration = Duration::from_millis(500);

/// Puts who does the I/O of domains' disks into their groups, and removes those of domains without disks.
async fn group(
    lifecycle: &Lifecycle,
    groups: &Rc<Groups>,
    store: &dyn Store,
    domains: BTreeSet<u32>,
) -> io::Result<()> {
    let mut served = Vec::new();
    for domain in domains {
        let mut disks = store.list(&format!("{VBD}/{domain}")).await?;
        disks.extend(store.list(&format!("{TAP}/{domain}")).await?);
        if disks.is_empty() {
            tokio::task::spawn_local(remove(groups.clone(), domain));
        } else {
            served.push((domain, processes(lifecycle, domain)));
        }
    }
    if !served.is_empty() {
        groups.place(&served);
    }
    Ok(())
}

/// The tapdisks of a domain, and those that are about to be.
fn processes(lifecycle: &Lifecycle, domain: u32) -> Vec<u32> {
    let disks = lifecycle.registry.all();
    let of_domain = disks.iter().filter(|disk| disk.domain() == Some(domain));
    let processes = of_domain.flat_map(|disk| {
        let successor = disk.successor.borrow().clone();
        disk.serving().ok().into_iter().chain(successor)
    });
    processes.map(|process| process.pid()).collect()
}

async fn remove(groups: Rc<Groups>, domain: u32) {
    for _ in 0..TRIES {
        if groups.remove(domain) {
            return;
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Looks at one directory.
async fn look(lifecycle: &Rc<Lifecycle>, store: &Rc<dyn Store>, directory: &str) -> io::Result<()> {
    let disks: Vec<Rc<Disk>> = lifecycle
        .registry
        .all()
        .into_iter()
        .filter(|disk| disk.record.borrow().vbd.as_deref() == Some(directory))
        .collect();
    if disks.is_empty() && !directory.starts_with(TAP) {
        return Ok(());
    }
    let there = store.read(&format!("{directory}/frontend")).await?;
    if there.is_none() {
        for disk in disks
            .into_iter()
            .filter(|disk| !disk.unlisted.replace(true))
        {
            let (lifecycle, directory) = (lifecycle.clone(), directory.to_owned());
            tokio::task::spawn_local(async move {
                end_unlisted(&lifecycle, &directory, &disk).await;
                disk.unlisted.set(false);
            });
        }
    } else if !disks.is_empty() {
        name_guest(&disks, &**store, directory).await?;
    } else {
        // Opening an image takes long; others must not wait for it.
        let (lifecycle, store, directory) =
            (lifecycle.clone(), store.clone(), directory.to_owned());
        tokio::task::spawn_local(async move {
            if let Err(error) = offer_or_tell(&lifecycle, &*store, &directory).await {
                tell!(
                    warn,
                    LogContext::default().at(&directory).because(&error),
                    "{directory}: xenstore does not answer: {error}"
                );
            }
        });
    }
    Ok(())
}

/// Destroys a disk without a directory as soon as the kernel serves no guest from it, unless the directory comes back.
async fn end_unlisted(lifecycle: &Rc<Lifecycle>, directory: &str, disk: &Rc<Disk>) {
    let registry = &lifecycle.registry;
    let (since, mut told, mut pause) = (Instant::now(), false, FIRST);
    loop {
        let is_listed = is_listed(registry, directory).await;
        if is_listed == Some(true) {
            return;
        }
        let why = match in_use(&*registry.kernel, disk.minor) {
            None if is_listed == Some(false) => break,
            None => "its return cannot be checked".into(),
            Some(why) => why,
        };
        if !told && since.elapsed() >= LONG {
            told = true;
            tell!(
                warn,
                disk.about(),
                "disk {}: xenstore has no {directory} any more, but {why}: the disk stays until that ends",
                disk.minor
            );
        }
        let slept = async {
            tokio::time::sleep(pause).await;
            Ok(())
        };
        if disk.unless_doomed(slept).await.is_err() {
            return;
        }
        pause = (pause * 2).min(MOST);
    }
    if let Err(failure) = lifecycle.destroy(disk).await {
        tell!(warn, disk.about().failed(&failure), "{failure}");
    }
    let place = (
        lifecycle.groups(),
        store::domain(directory),
        registry.store(),
    );
    if let (Some(groups), Some(domain), Some(store)) = place {
        if let Err(error) = group(lifecycle, &groups, &*store, [domain].into()).await {
            let about = disk.about().because(&error);
            tell!(
                warn,
                about,
                "the group of domain {domain} is not looked at: {error}"
            );
        }
    }
}

/// Xenstore has a directory; nothing if it does not say, because there is no connection at the moment.
async fn is_listed(registry: &Registry, directory: &str) -> Option<bool> {
    let frontend = registry.store()?;
    let frontend = frontend.read(&format!("{directory}/frontend")).await;
    frontend.ok().map(|there| there.is_some())
}

/// Why a disk may have a guest, by what the kernel says of it.
fn in_use(kernel: &dyn Kernel, minor: u32) -> Option<String> {
    match kernel::node(kernel, minor) {
        Ok(node) => {
            let (domain, _) = node?.bound?;
            Some(format!("the kernel serves domain {domain} from it"))
        }
        Err(error) => Some(format!(
            "the kernel does not say whether it serves a guest ({error})"
        )),
    }
}

/// Learns the name of the guest that disks belong to, for the log.
async fn name_guest(disks: &[Rc<Disk>], store: &dyn Store, directory: &str) -> io::Result<()> {
    let Some(domid) = LogContext::default().at(directory).domid else {
        return Ok(());
    };
    if disks.iter().all(|disk| disk.guest.borrow().is_some()) {
        return Ok(());
    }
    let name = match store.read(&format!("/local/domain/{domid}/name")).await {
        Err(error) if store::is_hidden(&error) => return Ok(()),
        name => name?,
    };
    for disk in disks {
        disk.guest.replace(name.clone());
    }
    Ok(())
}

async fn offer_or_tell(
    lifecycle: &Rc<Lifecycle>,
    store: &dyn Store,
    directory: &str,
) -> io::Result<()> {
    match offer(lifecycle, store, directory).await? {
        Ok(()) => Ok(()),
        // Two events told about it, and the other one is being followed.
        Err(failure) if failure.code == Code::Exists => Ok(()),
        Err(failure) => {
            let message = failure.message;
            tell!(
                warn,
                LogContext::default().at(directory),
                "{directory}: {message}"
            );
            put(store, directory, "hotplug-error", &message).await?;
            put(store, directory, "hotplug-status", "error").await
        }
    }
}

/// Whether a directory of the kind `vbd3` is ours, with the present knowledge: by its script, and without one by its
/// target. The directory of another server may have equal words, so another name under `tap-server` takes precedence.
/// If it is ours, the driver learns that.
async fn is_ours(store: &dyn Store, directory: &str, script: &str) -> io::Result<bool> {
    let read = |name: &str| format!("{directory}/{name}");
    if let Some(server) = store.read(&read(SERVER_KEY)).await? {
        return Ok(server == SERVER);
    }
    let ours = if script.is_empty() {
        let params = store.read(&read("params")).await?;
        params.is_some_and(|params| Target::from_params(&params).is_ok())
    } else {
        let name = Path::new(script).file_name();
        name.is_some_and(|name| name.to_string_lossy().starts_with(SCRIPTS))
    };
    if ours {
        put(store, directory, SERVER_KEY, SERVER).await?;
    }
    Ok(ours)
}

/// Gives a directory of the kind `vbd3` its disk, unless a script of ours does that.
async fn offer(
    lifecycle: &Rc<Lifecycle>,
    store: &dyn Store,
    directory: &str,
) -> io::Result<Result<(), Failure>> {
    let read = |name: &str| format!("{directory}/{name}");
    let script = store.read(&read("script")).await?.unwrap_or_default();
    if !is_ours(store, directory, &script).await?
        || store.read(&read("tap-minor")).await?.is_some()
        || store
            .read(&read("hotplug-status"))
            .await?
            .is_some_and(|status| status != "connected")
    {
        return Ok(Ok(()));
    }
    let minor = match store.read(&read("minor")).await? {
        Some(minor) => adopt(&lifecycle.registry, directory, &minor),
        None if script.is_empty() => {
            let params = store.read(&read("params")).await?;
            let mode = store.read(&read("mode")).await?;
            match (params, mode) {
                (Some(params), Some(mode)) => create(lifecycle, directory, &params, &mode).await,
                // More comes.
                _ => return Ok(Ok(())),
            }
        }
        None => return Ok(Ok(())),
    };
    let minor = match minor {
        Ok(minor) => minor,
        Err(failure) => return Ok(Err(failure)),
    };
    put(store, directory, "tap-minor", &minor.to_string()).await?;
    put(store, directory, "hotplug-status", "connected").await?;
    Ok(Ok(()))
}

/// A disk that Xen's script made with tap-ctl becomes that of its directory.
fn adopt(registry: &Registry, directory: &str, minor: &str) -> Result<u32, Failure> {
    let number = minor.parse().map_err(|_| {
        Failure::invalid(format!("the key minor holds `{minor}`, which is no number"))
    })?;
    let disk = registry.find(&Which {
        minor: Some(number),
        ..Which::default()
    })?;
    let mut record = disk.record.borrow_mut();
    if let Some(other) = &record.vbd {
        return Err(Failure::new(
            Code::Busy,
            format!("tap disk {number} belongs to {other} already"),
        ));
    }
    record.vbd = Some(directory.into());
    drop(record);
    registry.note(&disk);
    Ok(number)
}

async fn create(
    lifecycle: &Rc<Lifecycle>,
    directory: &str,
    params: &str,
    mode: &str,
) -> Result<u32, Failure> {
    let create = Create {
        open: Open::new(Target::from_params(params)?),
        mode: mode.parse()?,
        minor: None,
        policy: Policy::default(),
        arena_kib: 0,
        vbd: Some(directory.into()),
        nbd: true,
        no_wait: false,
        files: Vec::new(),
    };
    lifecycle.create(create).await.map(|made| made.minor)
}

/// Writes a key into a directory that may be going: it must not come back by that.
async fn put(store: &dyn Store, directory: &str, name: &str, value: &str) -> io::Result<()> {
    store.write(&format!("{directory}/{name}"), value).await?;
    if store
        .read(&format!("{directory}/frontend"))
        .await?
        .is_none()
    {
        store.remove(directory).await?;
    }
    Ok(())
}
