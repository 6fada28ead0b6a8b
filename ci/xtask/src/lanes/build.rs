// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The module and the programs build, and the module cannot panic or use up the stack.

use crate::check::{frames, panics};
use crate::package::{self, again, tried};
use crate::tally::Tally;
use crate::{build, run};
use anyhow::Result;
use std::path::Path;

pub(super) fn tests(tally: &mut Tally) -> Result<()> {
    tally.check("build.programs", build::programs().map(drop));
    match build::module() {
        Ok(module) => {
            tally.pass("build.module");
            tally.check("build.module-cannot-panic", panics::check(&module));
            tally.check("build.module-stack-frames", frames::check(&module));
        }
        Err(error) => {
            tally.fail("build.module", &format!("{error:#}"));
            tally.skip("build.module-cannot-panic", "there is no module");
            tally.skip("build.module-stack-frames", "there is no module");
        }
    }
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
