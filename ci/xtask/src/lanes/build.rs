// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The module and the programs build, and the module cannot panic or use up the stack.

use crate::build;
use crate::check::{frames, panics};
use crate::tally::Tally;
use anyhow::Result;

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
    Ok(())
}
