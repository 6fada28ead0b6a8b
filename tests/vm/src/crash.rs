// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Loads a kernel that starts when the one that runs has crashed. The tools of distributions do that with more than a guest
//! of the tests has.

use crate::sys;
use anyhow::{Context, Result};
use std::ffi::CString;
use std::fs::File;
use std::path::PathBuf;

/// Kernel to load.
#[derive(clap::Args)]
pub(crate) struct CrashArgs {
    /// The kernel.
    kernel: PathBuf,
    /// Its initramfs.
    initramfs: PathBuf,
    /// The words of its command line.
    #[arg(trailing_var_arg = true)]
    words: Vec<String>,
}

/// Loads it.
pub(crate) fn load(args: &CrashArgs) -> Result<()> {
    let open = |path: &PathBuf| {
        File::open(path).with_context(|| format!("cannot open {}", path.display()))
    };
    let (kernel, initramfs) = (open(&args.kernel)?, open(&args.initramfs)?);
    let words = CString::new(args.words.join(" "))?;
    sys::load_for_crash(&kernel, &initramfs, &words).context(
        "cannot load the kernel for a crash: has this one crashkernel= on its command line?",
    )
}
