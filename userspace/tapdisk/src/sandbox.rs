// SPDX-License-Identifier: MIT OR Apache-2.0
//! Removes all rights that serving a disk does not need.
//!
//! A guest writes the content of images, and some of it is parsed here. An attacker who takes over this process that
//! way can open no file (landlock, and the filter), make no socket or process and no executable memory, and gain no
//! privilege; `io_uring`, which the filter does not see, accepts transfers only, because the ring was made before and
//! no other one can be.

use landlock::{
    Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetError,
    RulesetStatus, Scope, ABI,
};
use rustix::mm::{mlockall, MlockAllFlags};
use rustix::process::{
    configure_io_flusher_behavior, set_dumpable_behavior, setrlimit, DumpableBehavior, Resource,
    Rlimit,
};
use rustix::thread::{
    set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid, Gid, Uid,
};
use rustix::time::{clock_gettime, ClockId};
use seccompiler::{
    apply_filter, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule,
};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use tapdev::abi::ioctl as node;

/// A user without privileges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// Number of the user, not 0.
    pub uid: u32,
    /// Number of the group, not 0.
    pub gid: u32,
}

impl User {
    /// The user that `text` names: `UID:GID`, or a name of `/etc/passwd`.
    ///
    /// # Errors
    /// If there is no such user, or if it is root.
    pub fn find(text: &str) -> io::Result<Self> {
        let numbers = text
            .split_once(':')
            .and_then(|(uid, gid)| Some((uid.parse().ok()?, gid.parse().ok()?)));
        let found = match numbers {
            Some(numbers) => Some(numbers),
            None => entry(&fs::read_to_string("/etc/passwd")?, text),
        };
        match found {
            Some((uid, gid)) if uid != 0 && gid != 0 => Ok(Self { uid, gid }),
            Some(_) => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("the user {text} is root: name one without privileges"),
            )),
            None => Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!(
                    "there is no user {text}: make it with systemd-sysusers or adduser --system"
                ),
            )),
        }
    }
}

/// Numbers of a user and its group in the text of `/etc/passwd`.
fn entry(passwd: &str, name: &str) -> Option<(u32, u32)> {
    let line = passwd
        .lines()
        .find(|line| line.split(':').next() == Some(name))?;
    let mut fields = line.split(':').skip(2);
    Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

/// Reserves what the process needs while it still may: keeps its memory from being swapped, tells the kernel that
/// writing back may wait for this process, and forbids dumps of the guest's data. Steps that fail for lack of
/// privileges are skipped, and returned as notes.
///
/// # Errors
/// If the system refuses what needs no privileges.
pub fn prepare() -> io::Result<Vec<String>> {
    let mut notes = Vec::new();
    let mut note = |what: &str, result: rustix::io::Result<()>| {
        if let Err(error) = result {
            notes.push(format!("{what}: {error}"));
        }
    };
    let unlimited = Rlimit {
        current: None,
        maximum: None,
    };
    // Counts pages that are locked here, and those that io_uring pins.
    note(
        "memory cannot be locked without limit",
        setrlimit(Resource::Memlock, unlimited),
    );
    let all = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    note("memory may be swapped", mlockall(all));
    note(
        "the process is no I/O flusher",
        configure_io_flusher_behavior(true),
    );
    if let Err(error) = fs::write("/proc/self/oom_score_adj", "-500") {
        notes.push(format!(
            "the process is killed like any other when memory is short: {error}"
        ));
    }
    forbid_dumps()?;
    Ok(notes)
}

/// Forbids dumps of the process, which would have the content of disks and keys, and access by other processes of its
/// user. [`prepare`] includes this.
///
/// # Errors
/// The system refuses to.
pub fn forbid_dumps() -> io::Result<()> {
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, none)?;
    Ok(set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

/// Removes all unneeded rights from the calling thread. A process must call it in each of its threads.
///
/// # Errors
/// If the system refuses something else than landlock, which older kernels do not have: the missing part of that is
/// returned.
pub fn confine(user: Option<User>) -> io::Result<Option<String>> {
    // These look at the process' auxiliary vector at their first use, which needs a file.
    let _ = (
        rustix::param::page_size(),
        clock_gettime(ClockId::Monotonic),
    );
    set_no_new_privs(true)?;
    if let Some(user) = user {
        let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
        set_thread_groups(&[])?;
        set_thread_res_gid(gid, gid, gid)?;
        set_thread_res_uid(uid, uid, uid)?;
        // The change of user has made it readable for that user.
        set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    }
    let enforced = forbid_files().map_err(io::Error::other)?;
    apply_filter(&filter()?).map_err(io::Error::other)?;
    Ok(match enforced {
        RulesetStatus::FullyEnforced => None,
        RulesetStatus::PartiallyEnforced => Some(
            "this kernel's landlock is an old one: what it does not know only the filter of system calls forbids"
                .into(),
        ),
        RulesetStatus::NotEnforced => Some(
            "this kernel has no landlock (see the boot parameter lsm): only the filter of system calls forbids to open files"
                .into(),
        ),
    })
}

/// Forbids new files, ports and abstract sockets; open ones stay usable. Returns the part that the kernel enforces.
fn forbid_files() -> Result<RulesetStatus, RulesetError> {
    let all = ABI::V6;
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(all))?
        .handle_access(AccessNet::from_all(all))?
        .scope(Scope::from_all(all))?
        .create()?
        .restrict_self()
        .map(|status| status.ruleset)
}

/// The system calls that are allowed with any arguments.
const CALLS: &[i64] = &[
    // Data.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_fdatasync,
    libc::SYS_fadvise64,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_setup,
    libc::SYS_io_destroy,
    libc::SYS_io_submit,
    libc::SYS_io_getevents,
    // Descriptors: those of the supervisor and of clients, which come over sockets.
    libc::SYS_accept4,
    libc::SYS_recvmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_close,
    // Other processors have only the newer call.
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    // The end of a lease.
    libc::SYS_timer_create,
    libc::SYS_timer_settime,
    libc::SYS_timer_delete,
    // Memory.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    // The rest of a program's life.
    libc::SYS_futex,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_getrandom,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_sched_yield,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// `BLKSSZGET`, `BLKPBSZGET`, `BLKDISCARD`, `FIONBIO`, and the calls of a disk's node.
const IOCTLS: &[u32] = &[
    0x1268,
    0x127b,
    0x1277,
    0x5421,
    node::INFO,
    node::SET_PARAMS,
    node::CLAIM,
    node::START,
    node::EXCHANGE,
    node::MAP,
];

const FCNTLS: &[i32] = &[
    libc::F_GETFD,
    libc::F_SETFD,
    libc::F_GETFL,
    libc::F_SETFL,
    libc::F_DUPFD_CLOEXEC,
    libc::F_OFD_SETLK,
];

/// Returns the filter: a call that is not in the lists fails with `EPERM`.
fn filter() -> io::Result<BpfProgram> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        CALLS.iter().map(|call| (*call, Vec::new())).collect();
    let equal = |place: u8, value: u64| only(place, SeccompCmpOp::Eq, value);
    rules.insert(
        libc::SYS_ioctl,
        each(IOCTLS, |number| equal(1, u64::from(*number)))?,
    );
    // CAST: the constants are not negative.
    rules.insert(
        libc::SYS_fcntl,
        each(FCNTLS, |number| equal(1, *number as u64))?,
    );
    let executable = libc::PROT_EXEC as u64;
    let plain = [SeccompCmpOp::MaskedEq(executable)];
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        let rule = each(&plain, |operator| only(2, operator.clone(), 0))?;
        rules.insert(call, rule);
    }
    let filter = SeccompFilter::new(
        rules,
        // CAST: it is not negative.
        SeccompAction::Errno(libc::EPERM as u32),
        SeccompAction::Allow,
        std::env::consts::ARCH
            .try_into()
            .map_err(io::Error::other)?,
    );
    filter
        .and_then(BpfProgram::try_from)
        .map_err(io::Error::other)
}

/// Returns one rule for each entry of a list.
fn each<T>(
    list: &[T],
    rule: impl Fn(&T) -> Result<SeccompRule, seccompiler::BackendError>,
) -> io::Result<Vec<SeccompRule>> {
    list.iter()
        .map(rule)
        .collect::<Result<_, _>>()
        .map_err(io::Error::other)
}

/// Argument `place`, of 32 bits, compares to `value` like this.
fn only(
    place: u8,
    operator: SeccompCmpOp,
    value: u64,
) -> Result<SeccompRule, seccompiler::BackendError> {
    let condition = SeccompCondition::new(place, SeccompCmpArgLen::Dword, operator, value)?;
    SeccompRule::new(vec![condition])
}

#[cfg(test)]
mod tests {
    use super::{apply_filter, BpfProgram, SeccompAction, SeccompFilter};
    use super::{confine, entry, User};
    use diskio::{Data, Engine, File, MappingAccess, Region, Runtime};
    use std::fs;
    use std::io::ErrorKind;
    use std::net::UdpSocket;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::process::Command;
    use std::thread;
    use tapdev::{KernelNode, Node};

    /// Installs the system-call filter of a thread: each thread has its own.
    #[test]
    fn forbidden_calls_are_refused_and_transfers_are_not() {
        let child = thread::spawn(|| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(1 << 16).unwrap();
            let null = fs::File::open("/dev/null").unwrap();
            let runtime = Runtime::new();
            runtime.io.prepare_uring().unwrap();
            runtime.io.start_helpers(2).unwrap();
            let others = runtime.io.on_helpers(|| confine(None).map(drop));
            others.unwrap();
            confine(None).unwrap();
            let refused = |result: std::io::Result<()>| {
                assert_eq!(result.unwrap_err().kind(), ErrorKind::PermissionDenied);
            };
            refused(fs::File::open("/etc/passwd").map(drop));
            refused(fs::File::open("/proc/self/status").map(drop));
            refused(fs::create_dir("/tmp/x"));
            refused(UdpSocket::bind("127.0.0.1:0").map(drop));
            refused(UnixStream::pair().map(drop));
            refused(Command::new("/bin/true").spawn().map(drop));
            refused(thread::Builder::new().spawn(|| ()).map(drop));
            refused(Runtime::new().io.prepare_uring());
            for _ in 0..4 {
                let io = runtime.io.clone();
                let open = || fs::File::open("/etc/passwd").map(drop);
                let opened = runtime.block_on(async move { io.elsewhere(open).await });
                refused(opened.unwrap().unwrap());
            }
            // TIOCGWINSZ is not in the list.
            refused(
                rustix::termios::tcgetwinsize(&null)
                    .map(drop)
                    .map_err(Into::into),
            );
            // The file is no node, but the question is allowed, here and in the thread that waits for a revocation.
            let mapper = KernelNode::new(null.into()).mapper().unwrap();
            let ask = move || mapper.maps(&[]).map(drop);
            let asked = runtime.block_on({
                let io = runtime.io.clone();
                let ask = ask.clone();
                async move { io.elsewhere(ask).await.unwrap() }
            });
            for asked in [ask(), asked.unwrap()] {
                assert_eq!(asked.unwrap_err().raw_os_error(), Some(libc::ENOTTY));
            }
            for engine in [Engine::Uring, Engine::Aio, Engine::Sync] {
                runtime.io.select(engine).unwrap();
                let file = File::new(&runtime.io, file.try_clone().unwrap().into()).unwrap();
                let data = Data::copied(&[3; 4096]).unwrap();
                runtime
                    .block_on(async move {
                        file.write(0, data.clone()).await.unwrap();
                        let flush = async || file.flush().await;
                        file.write_durable(0, data.clone(), flush).await.unwrap();
                        file.read(4096, data).await.unwrap();
                        file.discard(0, 4096).await.unwrap();
                        file.flush().await.unwrap();
                        file.forget().unwrap();
                        file.part(0, 8192).await.unwrap();
                        file.lock(diskio::LockKind::Write).unwrap();
                        file.size().unwrap();
                        // An image that has tables grows.
                        rustix::fs::ftruncate(&file, 1 << 17).unwrap();
                    })
                    .unwrap();
            }
            Region::map(file.as_fd(), 0, 4096, MappingAccess::Write).unwrap();
            drop(vec![0_u8; 64 << 20]);
        });
        child.join().unwrap();
    }

    #[test]
    fn landlock_that_is_missing_is_told() {
        let without = thread::spawn(|| {
            let rules = [(libc::SYS_landlock_create_ruleset, Vec::new())];
            let filter = SeccompFilter::new(
                rules.into_iter().collect(),
                SeccompAction::Allow,
                SeccompAction::Errno(libc::ENOSYS as u32),
                std::env::consts::ARCH.try_into().unwrap(),
            );
            apply_filter(&BpfProgram::try_from(filter.unwrap()).unwrap()).unwrap();
            confine(None).unwrap()
        });
        let note = without.join().unwrap().expect("a note");
        assert!(note.contains("no landlock"), "{note}");
    }

    #[test]
    fn users() {
        let passwd =
            "root:x:0:0::/:/bin/sh\nxentap2:x:9:9::/:\nxentap:x:990:991::/:/sbin/nologin\n";
        assert_eq!(entry(passwd, "xentap"), Some((990, 991)));
        assert_eq!(entry(passwd, "xen"), None);
        assert_eq!(entry("broken:x", "broken"), None);
        let user = User::find("5:6").unwrap();
        assert_eq!((user.uid, user.gid), (5, 6));
        assert_eq!(
            User::find("0:6").unwrap_err().kind(),
            ErrorKind::InvalidInput
        );
        assert_eq!(
            User::find("root").unwrap_err().kind(),
            ErrorKind::InvalidInput
        );
        assert_eq!(
            User::find("no such user").unwrap_err().kind(),
            ErrorKind::NotFound
        );
    }
}
