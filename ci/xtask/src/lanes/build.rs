// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The module and the programs build, and packages are made of them.

use crate::package::{self, again, tried};
use crate::tally::Tally;
use crate::{build, kernel, run};
use anyhow::Result;
use std::path::Path;
use std::process::Command;

pub(super) fn tests(tally: &mut Tally) -> Result<()> {
    tally.check("build.programs", build::programs().map(drop));
    tally.check("build.module", build::module().map(drop));
    packages(tally, OF_PACKAGES)
}

/// What must hold of packages in a folder.
type Holds = fn(&Path) -> Result<()>;

const OF_PACKAGES: &[(&str, Holds)] = &[
    ("package.lintian", tried::judged),
    ("package.life", tried::live),
    ("package.beside-xen", tried::beside_xen),
];

/// What takes minutes.
const OF_PACKAGES_LONG: &[(&str, Holds)] = &[
    ("package.dkms", tried::dkms),
    ("package.made-again", again::made_again),
];

/// Packages of it can be made, and what takes long holds of them.
pub(super) fn long(tally: &mut Tally, _seed: Option<u64>) -> Result<()> {
    packages(tally, OF_PACKAGES_LONG)
}

/// What is run of the lane e2e on each other kernel: I/O in the kernel and through a process, and the module comes
/// and goes.
const ON_OTHERS: &str = "phy.pv.fio_verify,tap.file,lifecycle.reload";

/// The module is built for the other kernels that are known, and serves disks there.
pub(super) fn other_kernels(tally: &mut Tally, seed: Option<u64>) -> Result<()> {
    let release = kernel::release()?;
    let others = kernel::SERIES
        .iter()
        .filter(|series| !kernel::is_of(&release, series));
    for series in others {
        let name = format!("kernels.{series}");
        match kernel::offered(series) {
            Ok(true) => tally.check(&name, on_kernel(series, seed)),
            Ok(false) => tally.skip(&name, "the archive has no stock kernel of it any more"),
            Err(error) => tally.fail(&name, &format!("{error:#}")),
        }
    }
    Ok(())
}

/// A command is for one kernel, so another one of ours does this.
fn on_kernel(series: &str, seed: Option<u64>) -> Result<()> {
    let command = || -> Result<Command> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--kernel", series]);
        Ok(command)
    };
    let source = build::repository()?;
    run::shown(command()?.args(["build", "--source"]).arg(source))?;
    let mut test = command()?;
    test.args(["test", "--lane", "e2e", "--only", ON_OTHERS]);
    if let Some(seed) = seed {
        test.args(["--seed", &seed.to_string()]);
    }
    run::shown(&mut test)
}

/// Packages of it can be made, and do what an administrator expects of them.
fn packages(tally: &mut Tally, hold: &[(&str, Holds)]) -> Result<()> {
    let out = build::repository()?.join("target/packages-tried");
    if out.exists() {
        run::remove_tree(&out)?;
    }
    let made = package::all(&out);
    let are_made = made.is_ok();
    tally.check("package.made", made.map(drop));
    for (name, holds) in hold {
        if are_made {
            tally.check(name, holds(&out));
        } else {
            tally.skip(name, "there are no packages");
        }
    }
    Ok(())
}
