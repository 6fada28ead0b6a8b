// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Builds of the module and the programs, and of packages.

use crate::package::{self, checks, reproducible};
use crate::tally::TestTally;
use crate::{build, kernel, run};
use anyhow::Result;
use std::path::Path;
use std::process::Command;

pub(super) fn tests(tally: &mut TestTally) -> Result<()> {
    tally.check("build.programs", build::programs().map(drop));
    tally.check("build.module", build::module().map(drop));
    packages(tally, OF_PACKAGES)
}

/// Check of packages in a folder.
type Holds = fn(&Path) -> Result<()>;

const OF_PACKAGES: &[(&str, Holds)] = &[
    ("package.lintian", checks::judged),
    ("package.life", checks::live),
    ("package.beside-xen", checks::beside_xen),
    ("package.repository", checks::repository),
];

/// Checks that take minutes.
const OF_PACKAGES_LONG: &[(&str, Holds)] = &[
    ("package.dkms", checks::dkms),
    ("package.made-again", reproducible::made_again),
];

/// Makes packages, and runs the long checks on them.
pub(super) fn long(tally: &mut TestTally, _seed: Option<u64>) -> Result<()> {
    packages(tally, OF_PACKAGES_LONG)
}

/// Cases of the lane e2e for each other kernel: I/O in the kernel and through a process, and a reload of the module.
const ON_OTHERS: &str = "phy.pv.fio_verify,tap.file,lifecycle.reload";

/// Builds the module for the other known kernels, and serves disks there.
pub(super) fn other_kernels(tally: &mut TestTally, seed: Option<u64>) -> Result<()> {
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

/// Runs a command for another kernel, because this one is for one kernel only.
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

/// Makes packages, and checks that they behave as an administrator expects.
fn packages(tally: &mut TestTally, hold: &[(&str, Holds)]) -> Result<()> {
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
