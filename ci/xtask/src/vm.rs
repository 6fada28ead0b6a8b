// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! `cargo xtask vm`: a dom0 to work in, with the files of a package.

use crate::artifacts::Machines;
use crate::kernel::Dom0Kernel;
use crate::machine::{Dom0, Machine, MachineEnd};
use crate::{artifacts, build, payload};
use anyhow::{Context, Result};
use std::path::Path;
use std::process::ExitCode;

/// Start of the report's last line, which has the command's exit code.
const END: &str = "xtask: the command ended with ";

/// Arguments of the command.
#[derive(Debug, clap::Args)]
pub(crate) struct VmArgs {
    /// Processors of the machine.
    #[arg(long, default_value_t = 2)]
    smp: u32,
    /// More words for Xen's command line.
    #[arg(
        long,
        default_value = "",
        value_name = "WORDS",
        allow_hyphen_values = true
    )]
    xen_args: String,
    /// More words for dom0's kernel command line, such as `noblkback` (load no disk backend).
    #[arg(
        long,
        default_value = "",
        value_name = "WORDS",
        allow_hyphen_values = true
    )]
    dom0_args: String,
    /// Run dom0 as PVH, behind an IOMMU.
    #[arg(long)]
    pvh_dom0: bool,
    /// Give dom0 a kernel with lockdep and kmemleak, and memory for that; it is built first (12 min).
    #[arg(long, conflicts_with_all = ["stock", "module"])]
    checked_kernel: bool,
    /// Do not install this project's module and programs: the C driver serves the disks.
    #[arg(long)]
    stock: bool,
    /// Leave out the programs and the guest; only the module is built.
    #[arg(long)]
    bare: bool,
    /// Use this module in place of the one of the checkout.
    #[arg(long, value_name = "KO", conflicts_with = "stock")]
    module: Option<std::path::PathBuf>,
    /// Name the folder of its logs, below `target/vm`. Two commands at once need two names.
    #[arg(long, default_value = "vm", value_parser = folder_name)]
    name: String,
    /// Kill the machine of a CMD after this many seconds.
    #[arg(long, default_value_t = 300)]
    timeout: u64,
    /// Run this shell command in dom0, print its output, and leave with its exit code.
    #[arg(last = true, value_name = "CMD")]
    command: Vec<String>,
}

/// Boots the machine.
pub(crate) fn vm(args: &VmArgs) -> Result<ExitCode> {
    let script = if args.command.is_empty() {
        interactive()
    } else {
        once(&args.command.join(" "))
    };
    let payload = payload::new(&args.name, &script)?;
    let kernel = match args.checked_kernel {
        true => Dom0Kernel::Checked,
        false => Dom0Kernel::Stock,
    };
    let machines = artifacts::machines(kernel)?;
    fill(args, &payload, &machines)?;
    let mut machine = Machine::new(&args.name);
    machine.smp = args.smp;
    machine.xen_args.clone_from(&args.xen_args);
    machine.dom0_args.clone_from(&args.dom0_args);
    if args.pvh_dom0 {
        machine.dom0 = Dom0::Pvh;
    }
    machine.timeout = std::time::Duration::from_secs(args.timeout);
    if args.command.is_empty() {
        eprintln!("booting; leave with `exit`, or at any time with Ctrl-A x");
        machine.run_on_terminal(&machines, &payload)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut code = None;
    let outcome = machine.run(&machines, &payload, |line| match line.strip_prefix(END) {
        Some(number) => code = number.parse::<u8>().ok(),
        None => println!("{line}"),
    })?;
    if let MachineEnd::Killed(seconds) = outcome.end {
        eprintln!("error: the command had {seconds} s: `--timeout` gives it more");
    }
    outcome.verdict()?;
    let code = code.with_context(|| {
        format!(
            "the command did not say how it ended; the console log is {}",
            outcome.console.display()
        )
    })?;
    Ok(ExitCode::from(code))
}

/// Adds the requested ones of module, programs and guest to the payload.
fn fill(args: &VmArgs, payload: &Path, machines: &Machines) -> Result<()> {
    let programs = if args.bare {
        None
    } else {
        Some(build::programs()?)
    };
    if !args.stock {
        let module = match &args.module {
            Some(module) => module.canonicalize()?,
            None => build::module_for(machines.kernel)?,
        };
        payload::add_installed(payload, machines, &module, programs.as_deref())?;
    }
    if let Some(programs) = programs {
        for program in build::program_files(&programs)? {
            payload::add_program(payload, &program)?;
        }
        payload::add_guest(payload, machines, &programs.join("vmtest"))?;
        payload::add_guest_agent(payload, machines)?;
    }
    Ok(())
}

/// Reads the name of a folder.
fn folder_name(text: &str) -> Result<String, String> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    match text.bytes().all(fits) && !text.is_empty() {
        true => Ok(text.to_owned()),
        false => Err("a name has letters, digits and hyphens".to_owned()),
    }
}

fn interactive() -> String {
    "echo 'This is dom0. /t holds the programs and a guest. Leave with: exit'\n\
     setsid -c bash -i </dev/hvc0 >/dev/hvc0 2>&1\n"
        .into()
}

fn once(command: &str) -> String {
    let quoted = command.replace('\'', r"'\''");
    // Only one process at a time may open the port, so it is opened once.
    format!("exec >\"$REPORT\" 2>&1\nunset REPORT\nbash -c '{quoted}'\necho \"{END}$?\"\n")
}

#[cfg(test)]
mod tests {
    use super::once;

    #[test]
    fn command_keeps_its_quotes() {
        assert!(once("echo 'a b'").contains(r"bash -c 'echo '\''a b'\'''"));
    }
}
