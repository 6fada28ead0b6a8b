// SPDX-License-Identifier: MIT OR Apache-2.0
//! Supervises the processes that serve tap disks.

use anyhow::{Context, Result};
use blktapctrl::blocking_io::{blocking_io, LIMIT};
use blktapctrl::folder::Folder;
use blktapctrl::groups::{Groups, Template};
use blktapctrl::lifecycle::Lifecycle;
use blktapctrl::log::{self, LineLimit};
use blktapctrl::process::{user_of, Program};
use blktapctrl::record::Files;
use blktapctrl::registry::Registry;
use blktapctrl::systemd::Systemd;
use blktapctrl::{folder, nodes, ram_files, recovery, server, watch, watchdog};
use clap::Parser;
use control::supervisor::What;
use control::{ExitStatus, Failure, FrozenDevices};
use rustix::mm::{mlockall, MlockAllFlags};
use rustix::process::{getuid, setrlimit, Resource, Rlimit};
use std::fs::Permissions;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;
use tokio::net::UnixListener;
use tokio::signal::unix::{signal, SignalKind};

/// Supervises the processes that serve Xen's tap disks.
///
/// blktapctrl makes the disks that `tap-ctl` and the script `block-tap-rs` ask for, starts a `tapdisk` for each,
/// replaces it at once if it dies, and takes the disk away when its guest lets go of it. The processes alone serve the
/// guests: they continue when this program stops, and it takes them over when it starts again.
#[derive(Parser)]
#[command(name = "blktapctrl", version)]
struct Cli {
    /// Stay in the foreground. This is what happens in any case; the option says so.
    #[arg(long)]
    foreground: bool,
    /// When told to stop (SIGTERM), end all disks, too. Those that a guest is connected to lose their
    /// process: the guest waits.
    #[arg(long)]
    stop_all: bool,
    /// The program that serves a disk.
    #[arg(long, value_name = "PROGRAM", default_value = control::installed::TAPDISK)]
    tapdisk: PathBuf,
    /// The user that it runs as: a name in /etc/passwd.
    #[arg(long, value_name = "NAME", default_value = "xentap")]
    user: String,
    /// Where sockets and records are.
    #[arg(long, value_name = "DIR", default_value = "/run/xentap")]
    folder: PathBuf,
    /// A folder in which disks may have files beside their image, and sockets of servers; may be given more than once.
    /// One that is missing is reported, and used once it is there. A file that a disk writes must be named for the disk
    /// all the same: tap-ctl create --files.
    #[arg(long, value_name = "DIR")]
    files: Vec<PathBuf>,
    /// The kernel serves disks by itself, beside their process, whose images are raw (aio:) where it can: their guests
    /// are served faster, and also while a process is replaced. direct=yes, or direct=no, in front of a target says
    /// it for one disk.
    #[arg(
        long,
        value_name = "yes|no",
        env = "XENTAP_DIRECT",
        default_value = "yes",
        action = clap::ArgAction::Set,
        value_parser = control::yes_or_no
    )]
    direct: bool,
    /// Give each guest a control group (cgroup v2) here, in which what does the I/O of its disks is, phy disks too: a
    /// path that ends with a name in which %d stands for the number of the domain. Then io.max and io.weight of that
    /// group hold for the guest.
    #[arg(long, value_name = "PATH", env = "XENTAP_CGROUP", value_parser = place_of_groups)]
    cgroup: Option<PlaceOfGroups>,
    /// Log more.
    #[arg(long, short)]
    verbose: bool,
}

/// Where the groups of guests are.
#[derive(Clone)]
struct PlaceOfGroups {
    /// Its text, as given.
    text: String,
    /// Nothing if it is empty, which says that there are none.
    template: Option<Template>,
}

fn place_of_groups(text: &str) -> Result<PlaceOfGroups, String> {
    let template = match text {
        "" => None,
        text => Some(text.parse()?),
    };
    let text = text.to_owned();
    Ok(PlaceOfGroups { text, template })
}

fn main() -> ExitCode {
    let cli: Cli = manual::parse();
    // Its end waits until the last lines are out.
    let log = match log::start(cli.verbose) {
        Ok(log) => log,
        Err(error) => {
            eprintln!("blktapctrl: cannot begin a log: {error}");
            return ExitStatus::Failed.into();
        }
    };
    let limit = log.limit.clone();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let result = runtime.context("cannot start").and_then(|runtime| {
        let result = tokio::task::LocalSet::new().block_on(&runtime, run(&cli, limit));
        // A thread may be stuck in a file system that does not answer.
        runtime.shutdown_background();
        result
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitStatus::Failed.into()
        }
    }
}

/// Says who begins, and with which settings.
fn introduce(cli: &Cli) {
    let folders = cli.files.iter().map(|folder| folder.display().to_string());
    let folders = folders.collect::<Vec<_>>().join(" ");
    let word = |is: bool| if is { "yes" } else { "no" };
    let place_of_groups = match &cli.cgroup {
        Some(place) if !place.text.is_empty() => &place.text,
        _ => "-",
    };
    let version = env!("CARGO_PKG_VERSION");
    tracing::info!(
        version,
        "blktapctrl {version} begins: tapdisk={} user={} folder={} files={} direct={} cgroup={} stop-all={} verbose={}",
        cli.tapdisk.display(),
        cli.user,
        cli.folder.display(),
        if folders.is_empty() { "-" } else { &folders },
        word(cli.direct),
        place_of_groups,
        word(cli.stop_all),
        word(cli.verbose)
    );
}

async fn run(cli: &Cli, limit: Arc<LineLimit>) -> Result<()> {
    introduce(cli);
    // Only root can start a process of another user: a test does not.
    let user = getuid().is_root().then(|| cli.user.clone());
    let program = Program {
        path: cli.tapdisk.clone(),
        user: user.clone(),
    };
    lift_limits();
    lock_memory();
    let place = cli.folder.display();
    let folder = Folder::make(&cli.folder, FrozenDevices::of_host())
        .with_context(|| format!("cannot make {place}"))?;
    let _claim = folder.claim().map_err(anyhow::Error::msg)?;
    if let Err(error) = ram_files::mount_folders(&folder) {
        let place = folder.memory();
        tracing::warn!(
            "disks of memory are in {} itself, because nothing can be mounted there: {error}",
            place.display()
        );
    }
    let records = Box::new(Files(folder.clone()));
    let registry = Registry::new(folder, records, Box::new(nodes::HostDriver));
    // It is set once.
    let _ = registry.limit.set(limit);
    let began = What::Began {
        version: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
    };
    registry.events.add(None, began);
    let lifecycle = Lifecycle::new(registry.clone(), program, cli.files.clone());
    lifecycle.direct.set(cli.direct);
    let place = cli.cgroup.as_ref();
    let template = place.and_then(|place| place.template.clone());
    if let Some(groups) = Groups::open(template, &registry.folder.cgroups()) {
        lifecycle.use_groups(groups);
    }
    // Before anything that may fail or hang: a process without a supervisor loses its lease within seconds.
    recovery::disks(&lifecycle).await;
    let (listener, given) = listener(&registry.folder.control())?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
    tokio::task::spawn_local(watch::keep(lifecycle.clone(), None));
    tokio::task::spawn_local(lifecycle.clone().watch_suspended());
    tokio::task::spawn_local(watchdog::watch(registry.clone()));
    tokio::task::spawn_local(server::serve(lifecycle.clone(), listener));
    tokio::task::spawn_local(look_at_settings(cli.files.clone(), user));
    let systemd = Systemd::ours();
    if let Some(systemd) = systemd.clone() {
        tokio::task::spawn_local(systemd.keep_told());
    }
    tracing::info!("ready: {} disks are supervised", registry.all().len());
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    if let Some(systemd) = &systemd {
        systemd.tell_end().await;
    }
    stop(cli, &lifecycle, given).await
}

/// Where tap-ctl asks: the socket that systemd listens on, so that questions wait while this program
/// is started anew, or one of our own. True if it was given.
fn listener(path: &Path) -> Result<(UnixListener, bool)> {
    let stdin = std::io::stdin();
    let given = rustix::net::sockopt::socket_acceptconn(&stdin) == Ok(true);
    let listener = if given {
        std::os::unix::net::UnixListener::from(stdin.as_fd().try_clone_to_owned()?)
    } else {
        folder::remove(path).with_context(|| format!("cannot remove {}", path.display()))?;
        let listener = std::os::unix::net::UnixListener::bind(path)
            .with_context(|| format!("cannot listen at {}", path.display()))?;
        std::fs::set_permissions(path, Permissions::from_mode(0o600))
            .with_context(|| format!("cannot protect {}", path.display()))?;
        listener
    };
    listener
        .set_nonblocking(true)
        .context("cannot use the control socket")?;
    let listener = UnixListener::from_std(listener).context("cannot use the control socket")?;
    Ok((listener, given))
}

async fn stop(cli: &Cli, lifecycle: &Rc<Lifecycle>, given: bool) -> Result<()> {
    let registry = &lifecycle.registry;
    if cli.stop_all {
        lifecycle.destroy_all(registry.all()).await;
    }
    let left = registry.all().len();
    if left > 0 {
        tracing::info!("{left} disks continue without supervision");
    }
    watchdog::tell_left_out(registry, true);
    if given {
        return Ok(());
    }
    let path = registry.folder.control();
    folder::remove(&path).with_context(|| format!("cannot remove {}", path.display()))
}

/// Says what is wrong with the settings. Disks that do not need it are served all the same, and it may come later, such
/// as a folder of a file system on a network.
async fn look_at_settings(folders: Vec<PathBuf>, user: Option<String>) {
    for folder in folders {
        let place = folder.clone();
        let found = blocking_io(&folder, LIMIT, move || {
            std::fs::canonicalize(&place).map_err(|error| {
                Failure::system(format!("cannot use --files {}", place.display()), &error)
            })
        });
        if let Err(failure) = found.await {
            tracing::error!("{failure}");
        }
    }
    if let Some(name) = user {
        let found = blocking_io(Path::new("/etc/passwd"), LIMIT, move || user_of(&name));
        if let Err(failure) = found.await {
            tracing::error!("no process of a disk can be started: {failure}");
        }
    }
}

/// One thread renews leases and replaces processes. It must not wait for swap, nor for the storage of the program's
/// file, which may be on a disk that it supervises, or on one that hangs.
fn lock_memory() {
    // All that there is now is brought into memory, the program too; what comes later when it is used, because most of a
    // stack never is.
    let now = mlockall(MlockAllFlags::CURRENT);
    let later = mlockall(MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT);
    if let Err(error) = now.and(later) {
        tracing::warn!(
            "memory is not locked, so this program may have to wait for swap and for the storage of its own file ({error}): allow it to lock memory without limit, as LimitMEMLOCK=infinity in its unit does"
        );
    }
}

/// Processes lock what serves requests into memory, and this program holds a few descriptors for
/// each disk.
fn lift_limits() {
    for resource in [Resource::Memlock, Resource::Nofile] {
        let most = match resource {
            Resource::Nofile => Some(1 << 20),
            _ => None,
        };
        let limit = Rlimit {
            current: most,
            maximum: most,
        };
        if let Err(error) = setrlimit(resource, limit) {
            tracing::debug!("cannot lift the limit {resource:?}: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Cli;
    use clap::CommandFactory;

    #[test]
    fn help_fits_80_columns() {
        recommended::assert_help_fits(manual::fitted(Cli::command(), 80), 80);
    }

    #[test]
    fn commands_that_are_recommended_can_be_typed() {
        recommended::check_program::<Cli>("blktapctrl");
    }
}
