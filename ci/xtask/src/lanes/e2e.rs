// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The tests that run in a Xen machine: one boot, many tests.

use crate::build;
use crate::kernel::Kernel;
use crate::ktap;
use crate::machine::{Dom0, Host, Machine, Outcome};
use crate::recipes::Machines;
use crate::tally::Tally;
use crate::{package, payload, recipes, run, second};
use anyhow::{Context, Result};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

/// By default all requests are copied. With this the large ones are mapped.
const MAPPING: &str = "copy_max_segments=16";

/// The case of `vmtest` that plants a warning on dom0's console, and what it says there.
const PLANTED: (&str, &str) = ("planted.dom0_log", "WARNING: planted");

/// The tests of what honest guests and toolstacks do.
pub(super) fn tests(tally: &mut Tally, only: &str, seed: Option<u64>) -> Result<()> {
    let only = only.replace('\'', "");
    let script = format!("exec /t/vmtest run --only '{only}'{}\n", words(seed));
    let payload = with_faulty("e2e", &script)?;
    let mut planted = false;
    let mut outcome = report(tally, machine("e2e"), Kernel::Stock, &payload, |line| {
        planted |= line.starts_with("ok ") && line.ends_with(PLANTED.0);
    });
    if let (true, Ok(outcome)) = (planted, &mut outcome) {
        let all = outcome.splats.len();
        outcome.splats.retain(|splat| !splat.ends_with(PLANTED.1));
        let found = if outcome.splats.len() < all {
            Ok(())
        } else {
            Err(anyhow::anyhow!(
                "the warning that {} planted was not found",
                PLANTED.0
            ))
        };
        tally.check("e2e.consoles-are-judged", found);
    }
    consoles(tally, "e2e", outcome);
    Ok(())
}

/// Batches of random requests in the usual lane; each run has others.
const SOME_FUZZ: u32 = 100;

/// The tests of what a malicious frontend does: all with the parameters that are shipped, then those that are about
/// the pages of requests in the other ways, kept and mapped.
pub(super) fn hostile(tally: &mut Tally, seed: Option<u64>) -> Result<()> {
    let seed = words(seed);
    // blktapctrl uses the module.
    let script = format!(
        "/t/hostile run{seed}
         /t/hostile run --pages --keeps-grants --label kept{seed}
         busybox killall blktapctrl
         while busybox pidof blktapctrl >/dev/null; do sleep 0.1; done
         rmmod xen-blkback-rs && modprobe xen-blkback-rs {MAPPING} || exit 1
         /t/hostile run --pages --label mapped{seed}
         exec /t/hostile fuzz --cases {SOME_FUZZ}{seed}\n"
    );
    boot(tally, "hostile", "", &script)
}

/// The attacks of all rings, with large requests mapped.
pub(super) fn mapped(tally: &mut Tally, seed: Option<u64>) -> Result<()> {
    let script = format!("exec /t/hostile run --phy --label mapped{}\n", words(seed));
    boot(tally, "mapped", MAPPING, &script)
}

/// Guests that move, one way each. Long cases run where they are named in full.
const MOVES: &str = "migrate.raw,migrate.phy,migrate.s20_checkpoints,migrate.s21_failed";

/// The cases of tap disks, most of which leave all to the process otherwise.
pub(super) fn direct(tally: &mut Tally, seed: Option<u64>) -> Result<()> {
    const CASES: &str = "tap.*,handoff.*,snapshot.*,lease.*,ops.*";
    // They wait for what only a process does: to have a request, and to count.
    const NOT: &str =
        "tap.s05_stuck_storage,tap.gone_means_fenced,tap.s13_hung,tap.supervisor_dies";
    let script = format!(
        "export XENTAP_DIRECT=yes\nexec /t/vmtest run --only '{CASES},{MOVES}' --except '{NOT}'{}\n",
        words(seed)
    );
    cases(tally, "direct", &script)
}

/// The cases that take too long for each change and that the patterns `only` name, but not those
/// that `except` names.
pub(super) fn long(
    tally: &mut Tally,
    name: &str,
    only: &str,
    except: &str,
    seed: Option<u64>,
) -> Result<()> {
    let script = format!(
        "exec /t/vmtest run --nightly --only '{only}' --except '{except}'{}\n",
        words(seed)
    );
    cases(tally, name, &script)
}

/// The cases that are about xenstore, with the other one of Xen's two daemons.
pub(super) fn xenstored(tally: &mut Tally, seed: Option<u64>) -> Result<()> {
    const CASES: &str = "xenstore.*,lifecycle.*,takeover.*,tap.file,tap.supervisor_dies";
    let script = format!(
        "busybox pidof xenstored >/dev/null || {{ echo 'Bail out! it does not run' >\"$REPORT\"; exit 1; }}
         exec /t/vmtest run --only '{CASES},{MOVES}'{}\n",
        words(seed)
    );
    let mut machine = machine("xenstored");
    machine.dom0_args = "xenstored=c".into();
    cases_on(tally, machine, &script)
}

/// A dom0 with hardware help, for which each page that is mapped changes tables of the processor.
pub(super) fn pvh(tally: &mut Tally, seed: Option<u64>) -> Result<()> {
    const CASES: &str =
        "phy.*,rings.*,faults.*,lifecycle.*,takeover.*,tap.*,handoff.*,direct.*,snapshot.*";
    let script = format!(
        "exec /t/vmtest run --only '{CASES},{MOVES}'{}\n",
        words(seed)
    );
    let mut machine = machine("pvh");
    machine.dom0 = Dom0::Pvh;
    cases_on(tally, machine, &script)
}

/// The suites whose stock kernels guests are tried with: Linux 6.1 and 6.12.
const GUESTS: &[&str] = &["bookworm", "trixie"];

/// Guests with older kernels: what they ask for and leave out, and what is done below them.
pub(super) fn guests(tally: &mut Tally, seed: Option<u64>) -> Result<()> {
    const CASES: &str =
        "phy.pv.*,phy.pvh.*,rings.*,tap.file,lifecycle.save_restore,takeover.load,handoff.s29_load";
    for suite in GUESTS {
        let name = format!("guests-{suite}");
        let script = format!("exec /t/vmtest run --only '{CASES}'{}\n", words(seed));
        let machines = recipes::with_guests_of(suite)?;
        let payload = everything(&name, &script, &machines)?;
        let outcome = report_on(tally, machine(&name), &machines, &payload, |_| ());
        consoles(tally, &name, outcome);
    }
    Ok(())
}

/// Cases of `vmtest`, in a machine of their own.
fn cases(tally: &mut Tally, name: &str, script: &str) -> Result<()> {
    cases_on(tally, machine(name), script)
}

fn cases_on(tally: &mut Tally, machine: Machine, script: &str) -> Result<()> {
    let name = machine.name.clone();
    let payload = with_faulty(&name, script)?;
    let outcome = report(tally, machine, Kernel::Stock, &payload, |_| ());
    consoles(tally, &name, outcome);
    Ok(())
}

/// A payload for `vmtest`, with the module that has planted faults as well.
fn with_faulty(name: &str, script: &str) -> Result<PathBuf> {
    let payload = with_everything(name, script, Kernel::Stock)?;
    let faulty = payload.join("faulty");
    fs::create_dir_all(&faulty)?;
    fs::copy(build::faulty_module()?, faulty.join("xen-blkback-rs.ko"))?;
    Ok(payload)
}

/// What cannot run there: planted faults stop such a kernel, and so does the C driver, from which a disk is taken over,
/// because it has a work item on its stack that it does not tell the kernel's checks of. The last one needs RAID, which
/// such a kernel does not have.
const NOT_CHECKED: &str = "planted.*,takeover.*,tap.claimed_in_parts";

/// Honest guests and a malicious frontend, on a dom0 whose kernel checks locks, memory and leaks by itself.
pub(super) fn debug(tally: &mut Tally, only: &str, seed: Option<u64>) -> Result<()> {
    let (only, seed) = (only.replace('\'', ""), words(seed));
    // First the malicious ones: what has been lost is looked for at the end.
    let mut script = String::new();
    if only == super::ALL {
        script = format!(
            "/t/hostile run{seed}
             [ $? -lt 2 ] || echo 'Bail out! hostile has broken off' >\"$REPORT\"\n"
        );
    }
    script += &format!(
        "exec /t/vmtest run --checked-kernel --only '{only}' --except '{NOT_CHECKED}'{seed}\n"
    );
    let payload = with_everything("debug", &script, Kernel::Checked)?;
    let mut machine = machine("debug");
    machine.timeout = Duration::from_secs(4 * 60 * 60);
    let outcome = report(tally, machine, Kernel::Checked, &payload, |_| ());
    consoles(tally, "debug", outcome);
    Ok(())
}

/// The size of a disk that two hosts share: 64 MiB.
const SHARED: u64 = 64 << 20;

/// What two hosts do with one disk, on a network with nothing else.
pub(super) fn hosts(tally: &mut Tally, seed: Option<u64>) -> Result<()> {
    let script = format!(
        "case \" $(cat /proc/cmdline) \" in *\" host=second \"*) exec /t/vmtest peer ;; esac\n\
         exec /t/vmtest run --hosts --nightly{}\n",
        words(seed)
    );
    let payload = with_everything("hosts", &script, Kernel::Stock)?;
    let folder = build::repository()?.join("target/vm/hosts.shared");
    run::remove_tree(&folder)?;
    fs::create_dir_all(&folder)?;
    // The image, and the record of its lease.
    let disks = ["disk.raw", "lease.raw"].map(|name| folder.join(name));
    for disk in &disks {
        File::create(disk)?.set_len(SHARED)?;
    }
    let host = |name, host| {
        let mut machine = machine(name);
        machine.disks = disks.to_vec();
        machine.host = Some(host);
        machine
    };
    let machines = recipes::machines(Kernel::Stock)?;
    let second = host("hosts-second", Host::Second);
    let (ended, end) = channel();
    let (outcome, second) = thread::scope(|scope| {
        let second = scope.spawn(|| second::keep(&second, &machines, &payload, &{ end }));
        let first = host("hosts", Host::First);
        let outcome = report(tally, first, Kernel::Stock, &payload, |_| ());
        drop(ended);
        (outcome, second.join())
    });
    consoles(tally, "hosts", outcome);
    let second =
        second.unwrap_or_else(|_| Err(anyhow::anyhow!("the second host's thread panicked")));
    tally.check("hosts.second-console-is-clean", second);
    Ok(())
}

/// A part of the life of the packages on a host with systemd, for which it is booted.
struct LifePart {
    name: &'static str,
    /// What more the host's kernel is told.
    words: &'static str,
    /// Whether the host has a copy of its own disk, for a guest with the same system.
    has_copy: bool,
}

impl LifePart {
    const fn new(name: &'static str) -> LifePart {
        LifePart {
            name,
            words: "",
            has_copy: false,
        }
    }
}

/// The whole life. Each part finds the disk as the one before has left it.
const LIFE: &[LifePart] = &[
    LifePart::new("installed"),
    LifePart {
        words: "module.sig_enforce=1",
        ..LifePart::new("refused")
    },
    LifePart {
        has_copy: true,
        ..LifePart::new("domains")
    },
    LifePart::new("upgraded"),
    LifePart::new("removed"),
];

/// Packages are installed, upgraded under load, downgraded and removed on a host that keeps its disk.
pub(super) fn life(tally: &mut Tally, _seed: Option<u64>) -> Result<()> {
    // As the kernel's command line says.
    const SCRIPT: &str =
        "exec /t/vmtest life \"$(sed -n 's/.*\\blife=\\([a-z]*\\).*/\\1/p' /proc/cmdline)\"\n";
    let machines = recipes::hosts()?;
    let payload = payload::new("life", SCRIPT)?;
    let repository = payload.join("repository");
    for made in [package::all, package::next] {
        made(&repository)?;
    }
    package::index(&repository)?;
    let programs = build::programs()?;
    payload::add_program(&payload, &programs.join("vmtest"))?;
    payload::add_guest(&payload, &machines, &programs.join("vmtest"))?;
    let disk = build::repository()?.join("target/vm/life.disk");
    run::remove_tree(&disk)?;
    fs::create_dir_all(&disk)?;
    let root = disk.join("root.img");
    copy_disk(&machines.dom0.join("dom0.img"), &root)?;
    let before = tally.failed;
    for part in LIFE {
        let name = format!("life-{}", part.name);
        let mut machine = machine(&name);
        machine.root = Some(root.clone());
        if part.has_copy {
            // The host is down, so its file system is whole.
            let copy = disk.join("copy.img");
            copy_disk(&root, &copy)?;
            machine.disks.push(copy);
        }
        // Each line on a console of Xen takes its time.
        machine.dom0_args = format!("life={} systemd.show_status=no {}", part.name, part.words);
        let outcome = report_on(tally, machine, &machines, &payload, |_| ());
        consoles(tally, &name, outcome);
        if tally.failed > before {
            // The parts that follow build on it.
            break;
        }
    }
    run::remove_tree(&disk)
}

/// Copies an image, with its holes.
fn copy_disk(from: &Path, to: &Path) -> Result<()> {
    let mut copy = Command::new("cp");
    copy.args(["--sparse=always", "--reflink=auto"]);
    run::shown(copy.arg(from).arg(to))
}

/// Random requests of a malicious frontend; each run says its seed.
pub(super) fn fuzz(tally: &mut Tally, seed: Option<u64>) -> Result<()> {
    boot(
        tally,
        "fuzz",
        MAPPING,
        &format!("exec /t/hostile fuzz --cases 2000{}\n", words(seed)),
    )
}

/// Random calls of a malicious process.
pub(super) fn fuzz_tap(tally: &mut Tally, seed: Option<u64>) -> Result<()> {
    boot(
        tally,
        "fuzz-tap",
        "",
        &format!("exec /t/hostile fuzz-tap --cases 500{}\n", words(seed)),
    )
}

/// The words that name a seed to a program of the tests.
fn words(seed: Option<u64>) -> String {
    seed.map_or(String::new(), |seed| format!(" --seed {seed}"))
}

/// `options` are those of the module.
fn boot(tally: &mut Tally, name: &str, options: &str, script: &str) -> Result<()> {
    let payload = with_everything(name, script, Kernel::Stock)?;
    let conf = payload.join("overlay/usr/lib/modprobe.d/test.conf");
    fs::write(&conf, format!("options xen-blkback-rs {options}\n"))
        .with_context(|| format!("cannot write {}", conf.display()))?;
    let outcome = report(tally, machine(name), Kernel::Stock, &payload, |_| ());
    consoles(tally, name, outcome);
    Ok(())
}

/// Boots with this payload, and counts what is reported; each line goes to `on_line` as well.
fn report(
    tally: &mut Tally,
    machine: Machine,
    kernel: Kernel,
    payload: &Path,
    on_line: impl FnMut(&str),
) -> Result<Outcome> {
    let machines = recipes::machines(kernel)?;
    report_on(tally, machine, &machines, payload, on_line)
}

/// The same on these machines.
fn report_on(
    tally: &mut Tally,
    machine: Machine,
    machines: &Machines,
    payload: &Path,
    mut on_line: impl FnMut(&str),
) -> Result<Outcome> {
    let mut reader = ktap::Reader::default();
    let outcome = machine.run(machines, payload, |line| {
        on_line(line);
        reader.line(line, tally);
    });
    reader.finish(tally);
    outcome
}

/// Judges the consoles.
fn consoles(tally: &mut Tally, name: &str, outcome: Result<Outcome>) {
    tally.check(
        &format!("{name}.consoles-are-clean"),
        outcome.and_then(|outcome| outcome.verdict()),
    );
}

fn machine(name: &str) -> Machine {
    let mut machine = Machine::new(name);
    machine.timeout = Duration::from_secs(60 * 60);
    machine
}

/// A payload with the module for this kernel installed, the programs and a guest.
pub(crate) fn with_everything(name: &str, script: &str, kernel: Kernel) -> Result<PathBuf> {
    everything(name, script, &recipes::machines(kernel)?)
}

/// The same for these machines.
fn everything(name: &str, script: &str, machines: &Machines) -> Result<PathBuf> {
    let payload = payload::new(name, script)?;
    let programs = build::programs()?;
    let module = build::module_for(machines.kernel)?;
    payload::add_installed(&payload, machines, &module, Some(&programs))?;
    for program in build::program_files(&programs)? {
        payload::add_program(&payload, &program)?;
    }
    payload::add_guest(&payload, machines, &programs.join("vmtest"))?;
    Ok(payload)
}
