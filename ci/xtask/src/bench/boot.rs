// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! One boot of the measuring machine: its input and its output.

use super::collect::Collector;
use super::result::{Results, WASTEFUL};
use super::{counts, BenchArgs};
use crate::artifacts::{self, Machines};
use crate::kernel::Dom0Kernel;
use crate::machine::Machine;
use crate::root::Root;
use crate::{build, install, payload, run as process};
use anyhow::{ensure, Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Boots the machine and collects the results.
pub(super) fn measure(args: &BenchArgs) -> Result<Results> {
    let machines = artifacts::machines(Dom0Kernel::Stock)?;
    let mut machine = Machine::new("bench");
    machine.icount = true;
    machine.checks = false;
    // Each domain has processors of its own, so that the counters distinguish them. Unused processors would change the
    // order in which the others take turns.
    let each = if args.names("2cpu") { 2 } else { 1 };
    machine.smp = 2 * each;
    machine.xen_args = format!("dom0_max_vcpus={each} dom0_vcpus_pin");
    machine.dom0_args = "noblkback".into();
    machine.timeout = Duration::from_secs(60 * args.minutes.unwrap_or(150));
    machine.plugin = Some(plugin(&machines)?);
    if args.functions {
        machine.plugin_args = "blocks=on".into();
    }
    let payload = fill(args, &machines)?;
    eprintln!("booting Xen and dom0 in QEMU, with time counted in instructions ...");
    // The machine may have to wait for another one before it starts.
    let mut start = None;
    let mut collector = Collector::default();
    let mut raw = String::new();
    let outcome = machine.run(&machines, &payload, |line| {
        raw.push_str(line);
        raw.push('\n');
        collector.line(line);
        if let Some(progress) = collector.progress() {
            let start = start.get_or_insert_with(Instant::now);
            eprintln!("{:5} s  {progress}", start.elapsed().as_secs());
        }
    })?;
    fs::write(outcome.console.with_file_name("report.jsonl"), raw)?;
    if let Err(reason) = outcome.verdict() {
        collector.broke_off(&reason);
    }
    let counts = outcome.console.with_file_name("plugin.out");
    let text = fs::read_to_string(&counts)
        .with_context(|| format!("QEMU's plugin wrote no {}", counts.display()))?;
    let mut results = collector.results(&counts::parse(&text)?)?;
    results.quick = args.quick;
    results.versions.extend(versions(args, &machines)?);
    Ok(results)
}

/// Returns the versions of QEMU and of the payload, which the machine does not know.
fn versions(args: &BenchArgs, machines: &Machines) -> Result<[(String, String); 2]> {
    let mut qemu = Root::new(&machines.build_root).command("qemu-system-x86_64");
    let qemu = process::output(qemu.arg("--version"))?;
    let first = qemu.lines().next().unwrap_or_default();
    let driver = match &args.module {
        Some(module) => module.display().to_string(),
        None => {
            let mut git = Command::new("git");
            git.arg("-C").arg(build::repository()?);
            let commit = git.args(["describe", "--always", "--dirty", "--abbrev=12"]);
            process::output(commit)?.trim().to_string()
        }
    };
    Ok([
        ("QEMU".into(), first.into()),
        ("this driver".into(), driver),
    ])
}

/// Makes the payload: this project's module, the measuring program, and a guest.
fn fill(args: &BenchArgs, machines: &Machines) -> Result<PathBuf> {
    let programs = build::programs()?;
    let module = match &args.module {
        Some(module) => module.canonicalize()?,
        None => build::module()?,
    };
    let dir = payload::new("bench", &script(args))?;
    fs::copy(&module, dir.join("xen-blkback-rs.ko"))
        .with_context(|| format!("cannot copy {}", module.display()))?;
    if args.wants(WASTEFUL) {
        fs::copy(build::wasteful_module()?, dir.join("wasteful.ko"))
            .context("cannot copy the wasteful build of the module")?;
    }
    payload::add_program(&dir, &programs.join("bench"))?;
    let overlay = dir.join("overlay");
    install::to(&module, Some(&programs), &overlay)?;
    // The measurement depends on the loaded driver, so no setting may choose one.
    fs::remove_dir_all(overlay.join("usr/lib/modprobe.d"))?;
    payload::add_guest(&dir, machines, &programs.join("vmtest"))?;
    Ok(dir)
}

/// Returns the script that dom0 runs.
fn script(args: &BenchArgs) -> String {
    let mut line = "exec /t/bench".to_string();
    if args.quick {
        line.push_str(" --quick");
    }
    let quoted = |text: &str| text.replace('\'', "");
    for (option, value) in [("--backends", &args.backends), ("--jobs", &args.jobs)] {
        if let Some(names) = value {
            line.push_str(&format!(" {option} '{}'", quoted(names)));
        }
    }
    if args.functions {
        line.push_str(" --functions");
    }
    if let Some(rounds) = args.rounds {
        line.push_str(&format!(" --rounds {rounds}"));
    }
    line.push('\n');
    line
}

/// Compiles the plugin in the build root, because it must fit the QEMU there, and needs nothing else.
fn plugin(machines: &Machines) -> Result<PathBuf> {
    let repository = build::repository()?;
    let out = repository.join("target/bench");
    fs::create_dir_all(&out)?;
    let root = Root::new(&machines.build_root)
        .bind_read_only(&repository.join("tests/bench/plugin/src"), "/mnt/a")
        .bind(&out, "/mnt/b");
    let script =
        "rustc --edition 2021 -O -C linker=gcc-14 --crate-type cdylib --crate-name plugin \
                  -o /mnt/b/plugin.so /mnt/a/lib.rs";
    process::shown(&mut root.script(script)).context("cannot compile QEMU's plugin")?;
    let file = out.join("plugin.so");
    ensure!(
        Path::new(&file).exists(),
        "the compiler made no {}",
        file.display()
    );
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::{script, BenchArgs};

    #[test]
    fn wishes_reach_the_machine() {
        let args = BenchArgs {
            quick: true,
            backends: Some("phy,c".into()),
            rounds: Some(2),
            ..BenchArgs::default()
        };
        assert_eq!(
            script(&args),
            "exec /t/bench --quick --backends 'phy,c' --rounds 2\n"
        );
    }
}
