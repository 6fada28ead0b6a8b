// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The tests that run in a Xen machine: one boot, many tests.

mod ceph;

use crate::artifacts::Machines;
use crate::build;
use crate::kernel::Dom0Kernel;
use crate::ktap;
use crate::machine::{Dom0, HostCable, Machine, MachineHost, RunOutcome};
use crate::tally::TestTally;
use crate::{artifacts, package, payload, peer_machine, run};
use anyhow::{Context, Result};
pub(super) use ceph::ceph;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

/// Parameter with which large requests are mapped; by default all requests are copied.
const MAPPING: &str = "copy_max_segments=16";

/// The case of `vmtest` that plants a warning on dom0's console, and that warning.
const PLANTED: (&str, &str) = ("planted.dom0_log", "WARNING: planted");

/// Runs the tests of honest guests and toolstacks.
pub(super) fn tests(tally: &mut TestTally, only: &str, seed: Option<u64>) -> Result<()> {
    let only = only.replace('\'', "");
    let script = format!("exec /t/vmtest run --only '{only}'{}\n", words(seed));
    let payload = with_faulty("e2e", &script)?;
    let mut planted = false;
    let mut outcome = report(tally, machine("e2e"), Dom0Kernel::Stock, &payload, |line| {
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

/// Batches of random requests in the usual lane; they differ in each run.
const SOME_FUZZ: u32 = 100;

/// Runs the tests of a malicious frontend: all with the default parameters, then those about the pages of requests with
/// persistent grants and with mapped requests.
pub(super) fn hostile(tally: &mut TestTally, seed: Option<u64>) -> Result<()> {
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

/// Runs the attacks on all rings, with large requests mapped.
pub(super) fn mapped(tally: &mut TestTally, seed: Option<u64>) -> Result<()> {
    let script = format!("exec /t/hostile run --phy --label mapped{}\n", words(seed));
    boot(tally, "mapped", MAPPING, &script)
}

/// Migrations of guests, one way each. Long cases run only if their full name is given.
const MOVES: &str = "migrate.raw,migrate.phy,migrate.s20_checkpoints,migrate.s21_failed";

/// Runs the cases of tap disks with passthrough, most of which otherwise use only the process.
pub(super) fn direct(tally: &mut TestTally, seed: Option<u64>) -> Result<()> {
    const CASES: &str = "tap.*,handoff.*,snapshot.*,lease.*,ops.*";
    // These cases wait for something that only a process does: to have a request, and to count.
    const NOT: &str =
        "tap.s05_stuck_storage,tap.gone_means_fenced,tap.s13_hung,tap.supervisor_dies";
    let script = format!(
        "export XENTAP_DIRECT=yes\nexec /t/vmtest run --only '{CASES},{MOVES}' --except '{NOT}'{}\n",
        words(seed)
    );
    cases(tally, "direct", &script)
}

/// Runs the cases that take too long for each change and that the patterns `only` name, but not those that `except`
/// names.
pub(super) fn long(
    tally: &mut TestTally,
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

/// Runs the cases about xenstore, with the other one of Xen's two daemons.
pub(super) fn xenstored(tally: &mut TestTally, seed: Option<u64>) -> Result<()> {
    const CASES: &str =
        "xenstore.*,lifecycle.*,takeover.*,tap.file,tap.supervisor_dies,domain.many";
    let script = format!(
        "busybox pidof xenstored >/dev/null || {{ echo 'Bail out! it does not run' >\"$REPORT\"; exit 1; }}
         exec /t/vmtest run --only '{CASES},{MOVES}'{}\n",
        words(seed)
    );
    let mut machine = machine("xenstored");
    machine.dom0_args = "xenstored=c".into();
    cases_on(tally, machine, &script)
}

/// Runs tests on a PVH dom0, where each mapped page changes tables of the processor.
pub(super) fn pvh(tally: &mut TestTally, seed: Option<u64>) -> Result<()> {
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

/// Suites whose stock kernels are tested as guests: Linux 6.1 and 6.12.
const GUESTS: &[&str] = &["bookworm", "trixie"];

/// Runs guests with older kernels, which use other features.
pub(super) fn guests(tally: &mut TestTally, seed: Option<u64>) -> Result<()> {
    const CASES: &str =
        "phy.pv.*,phy.pvh.*,rings.*,tap.file,lifecycle.save_restore,takeover.load,handoff.s29_load";
    for suite in GUESTS {
        let name = format!("guests-{suite}");
        let script = format!("exec /t/vmtest run --only '{CASES}'{}\n", words(seed));
        let machines = artifacts::with_guests_of(suite)?;
        let payload = everything(&name, &script, &machines)?;
        let outcome = report_on(tally, machine(&name), &machines, &payload, |_| ());
        consoles(tally, &name, outcome);
    }
    Ok(())
}

/// Runs cases of `vmtest`, in a machine of their own.
fn cases(tally: &mut TestTally, name: &str, script: &str) -> Result<()> {
    cases_on(tally, machine(name), script)
}

fn cases_on(tally: &mut TestTally, machine: Machine, script: &str) -> Result<()> {
    let name = machine.name.clone();
    let payload = with_faulty(&name, script)?;
    // Only cases that take long use it.
    payload::add_guest_agent(&payload, &artifacts::machines(Dom0Kernel::Stock)?)?;
    let outcome = report(tally, machine, Dom0Kernel::Stock, &payload, |_| ());
    consoles(tally, &name, outcome);
    Ok(())
}

/// Makes a payload for `vmtest`, with the module that has planted faults as well.
fn with_faulty(name: &str, script: &str) -> Result<PathBuf> {
    let payload = with_everything(name, script, Dom0Kernel::Stock)?;
    let faulty = payload.join("faulty");
    fs::create_dir_all(&faulty)?;
    fs::copy(build::faulty_module()?, faulty.join("xen-blkback-rs.ko"))?;
    Ok(payload)
}

/// Cases that cannot run there: planted faults stop such a kernel. So does the C driver, from which a takeover starts,
/// because it has a work item on its stack without the annotation for the kernel's checks. The last case needs RAID,
/// which such a kernel does not have.
const NOT_CHECKED: &str = "planted.*,takeover.*,tap.claimed_in_parts";

/// Runs honest guests and a malicious frontend on a dom0 whose kernel checks locks, memory and leaks.
pub(super) fn debug(tally: &mut TestTally, only: &str, seed: Option<u64>) -> Result<()> {
    let (only, seed) = (only.replace('\'', ""), words(seed));
    // First the malicious ones, because leaks are searched at the end.
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
    let payload = with_everything("debug", &script, Dom0Kernel::Checked)?;
    let mut machine = machine("debug");
    machine.timeout = Duration::from_secs(4 * 60 * 60);
    let outcome = report(tally, machine, Dom0Kernel::Checked, &payload, |_| ());
    consoles(tally, "debug", outcome);
    Ok(())
}

/// The size of a disk that two hosts share: 64 MiB.
const SHARED: u64 = 64 << 20;

/// Runs the tests of two hosts on a network of their own, with disks that both have and with disks that each has alone.
pub(super) fn hosts(tally: &mut TestTally, seed: Option<u64>) -> Result<()> {
    let script = format!(
        "case \" $(cat /proc/cmdline) \" in *\" host=second \"*) exec /t/vmtest peer ;; esac\n\
         exec /t/vmtest run --beside host --nightly{}\n",
        words(seed)
    );
    let machines = artifacts::two_hosts()?;
    let payload = everything("hosts", &script, &machines)?;
    let folder = shared_folder("hosts")?;
    // The image, and the record of its lease.
    let disks = ["disk.raw", "lease.raw"].map(|name| folder.join(name));
    for disk in &disks {
        File::create(disk)?.set_len(SHARED)?;
    }
    let host = |name, host| {
        let mut machine = machine(name);
        machine.disks = disks.to_vec();
        machine.cable = Some(HostCable {
            host,
            folder: folder.clone(),
        });
        machine
    };
    let both = [
        host("hosts", MachineHost::First),
        host("hosts-second", MachineHost::Second),
    ];
    two_machines(tally, both, &machines, &payload);
    Ok(())
}

/// Makes an empty folder for what two machines share.
fn shared_folder(name: &str) -> Result<PathBuf> {
    let folder = build::repository()?.join(format!("target/vm/{name}.shared"));
    run::remove_tree(&folder)?;
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// Boots two machines with one payload, counts the tests that the first one reports, and judges both consoles.
fn two_machines(
    tally: &mut TestTally,
    [first, second]: [Machine; 2],
    machines: &Machines,
    payload: &Path,
) {
    let name = first.name.clone();
    let (ended, end) = channel();
    let (outcome, second) = thread::scope(|scope| {
        let second = scope.spawn(|| peer_machine::keep(&second, machines, payload, &{ end }));
        let outcome = report_on(tally, first, machines, payload, |_| ());
        drop(ended);
        (outcome, second.join())
    });
    consoles(tally, &name, outcome);
    let second =
        second.unwrap_or_else(|_| Err(anyhow::anyhow!("the second machine's thread panicked")));
    tally.check(&format!("{name}.second-console-is-clean"), second);
}

/// A part of the packages' life on a host with systemd, which boots for each.
struct LifePart {
    name: &'static str,
    /// More words for the host's kernel command line.
    words: &'static str,
    /// True if the host has a copy of its own disk, for a guest with its system.
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

/// All parts. Each finds the disk as the one before has left it.
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

/// Installs, upgrades under load, downgrades and removes packages on a host that keeps its disk.
pub(super) fn life(tally: &mut TestTally, _seed: Option<u64>) -> Result<()> {
    // The name of the part comes from the kernel's command line.
    const SCRIPT: &str =
        "exec /t/vmtest life \"$(sed -n 's/.*\\blife=\\([a-z]*\\).*/\\1/p' /proc/cmdline)\"\n";
    let machines = artifacts::hosts()?;
    let payload = payload::new("life", SCRIPT)?;
    let repository = payload.join("repository");
    for made in [package::all, package::next] {
        made(&repository)?;
    }
    let keys = build::repository()?.join("target/vm/life.keys");
    let key = package::repository::key_for_tests(&keys)?;
    package::repository::sign(&repository, &key, "file:/t/repository")?;
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
            // The host is down, so its file system is consistent.
            let copy = disk.join("copy.img");
            copy_disk(&root, &copy)?;
            machine.disks.push(copy);
        }
        // Each line on a console of Xen takes a while.
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

/// Sends random requests of a malicious frontend; each run reports its seed.
pub(super) fn fuzz(tally: &mut TestTally, seed: Option<u64>) -> Result<()> {
    boot(
        tally,
        "fuzz",
        MAPPING,
        &format!("exec /t/hostile fuzz --cases 2000{}\n", words(seed)),
    )
}

/// Makes random calls of a malicious process.
pub(super) fn fuzz_tap(tally: &mut TestTally, seed: Option<u64>) -> Result<()> {
    boot(
        tally,
        "fuzz-tap",
        "",
        &format!("exec /t/hostile fuzz-tap --cases 500{}\n", words(seed)),
    )
}

/// Returns the arguments that pass a seed to a test program.
fn words(seed: Option<u64>) -> String {
    seed.map_or(String::new(), |seed| format!(" --seed {seed}"))
}

/// Boots the machine for a test. `options` are those of the module.
fn boot(tally: &mut TestTally, name: &str, options: &str, script: &str) -> Result<()> {
    let payload = with_everything(name, script, Dom0Kernel::Stock)?;
    let conf = payload.join("overlay/usr/lib/modprobe.d/test.conf");
    fs::write(&conf, format!("options xen-blkback-rs {options}\n"))
        .with_context(|| format!("cannot write {}", conf.display()))?;
    let outcome = report(tally, machine(name), Dom0Kernel::Stock, &payload, |_| ());
    consoles(tally, name, outcome);
    Ok(())
}

/// Boots with this payload, and counts the reported tests; each line goes to `on_line` as well.
fn report(
    tally: &mut TestTally,
    machine: Machine,
    kernel: Dom0Kernel,
    payload: &Path,
    on_line: impl FnMut(&str),
) -> Result<RunOutcome> {
    let machines = artifacts::machines(kernel)?;
    report_on(tally, machine, &machines, payload, on_line)
}

/// Boots these machines with this payload, and counts the reported tests.
fn report_on(
    tally: &mut TestTally,
    machine: Machine,
    machines: &Machines,
    payload: &Path,
    mut on_line: impl FnMut(&str),
) -> Result<RunOutcome> {
    let mut reader = ktap::Reader::default();
    let outcome = machine.run(machines, payload, |line| {
        on_line(line);
        reader.line(line, tally);
    });
    reader.finish(tally);
    outcome
}

/// Judges the consoles.
fn consoles(tally: &mut TestTally, name: &str, outcome: Result<RunOutcome>) {
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

/// Makes a payload with the installed module for this kernel, the programs and a guest.
pub(crate) fn with_everything(name: &str, script: &str, kernel: Dom0Kernel) -> Result<PathBuf> {
    everything(name, script, &artifacts::machines(kernel)?)
}

/// Makes a payload for these machines with the installed module, the programs and a guest.
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
